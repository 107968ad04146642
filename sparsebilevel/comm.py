"""How workers talk to each other: in one process for simulation and tests, or in many over torch.distributed.

An algorithm is written for all workers of a process at once, as ``{worker: value}``: `LocalCommunicator` holds all of
them, `TorchCommunicator` one. So both run the same code, and give the same numbers. Messages are bytes (`.pack` makes
them), each with a header and a checksum; a damaged one is sent again. Nobody waits without a limit for a worker that
gives no sign of life.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ._checks import check_number, check_whole

Outgoing = Mapping[int, Mapping[int, bytes]]
Incoming = dict[int, dict[int, bytes]]

_HEADER = struct.Struct("<4sIQqI")  # magic, checksum of the payload, its length, notice, checksum of the header so far
_MAGIC = b"SBGM"
_GOOD, _DAMAGED, _NO_HEADER = b"\1", b"\0", b"\2"  # how a message arrived; of the last, the header alone comes again
_TAG, _PAYLOAD_TAG = 0, 1  # a header can overtake the payload that waits for it
RETRIES = 3
BACKENDS = ("auto", "gloo", "nccl")


class _Header(NamedTuple):
    checksum: int
    size: int
    notice: int


class CommunicationError(RuntimeError):
    """A worker does not answer, or its messages keep arriving damaged."""


class Communicator:
    """Base class.

    Attributes:
        ranks: the workers in this process that are alive.
        world_size: number of workers at the start.
        lost: workers that do not answer any more, as far as the workers in this process know.
        notice: a number that spreads with every message; all workers soon have the largest that any of them set.
        sent: bytes sent by the workers of this process, headers and repetitions included, by kind.
        resent: messages that arrived damaged and were sent again.
        tamper: for tests; maps (sender, receiver, data) to what arrives, of payloads and, between processes, of
            headers.
    """

    ranks: tuple[int, ...]
    world_size: int

    def __init__(self) -> None:
        self.lost: set[int] = set()
        self.notice = 0
        self.sent: Counter[str] = Counter()
        self.resent = 0
        self.tamper: Callable[[int, int, bytes], bytes] | None = None

    def exchange(self, outgoing: Outgoing, kind: str) -> Incoming:
        """Send ``outgoing[worker][neighbour]`` and receive what the neighbours send at the same time.

        Every worker sends one message to each neighbour and gets one from it. Returns
        ``{worker: {neighbour: payload}}`` without those neighbours that were lost.

        Raises:
            CommunicationError: a neighbour does not answer in time, unless lost workers are to be dropped.
        """
        raise NotImplementedError

    def gather(self, values: Mapping[int, bytes]) -> dict[int, bytes] | None:
        """What every living worker hands in, at the process of worker 0; None elsewhere. Not counted as traffic."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait until every living worker is here."""

    def alive(self) -> contextlib.AbstractContextManager[None]:
        """In it a worker may take longer than the limit, and waits that long for the others, which must be in it too.

        It ends with a `barrier`, so that nobody goes on, and waits with a limit, for one who is still in it.
        """
        return contextlib.nullcontext()

    def welcome(self, round: int, clocks: Mapping[str, int]) -> set[int]:
        """Lost workers that are back from this round on; called at the start of every round.

        Args:
            round, clocks: where this process stands, for those who come back.
        """
        return set()

    def close(self) -> None:
        """End the connections."""


class LocalCommunicator(Communicator):
    """All workers in this process."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        check_whole("world_size", world_size, 1)
        self.world_size = world_size
        self.ranks = tuple(range(world_size))

    def fail(self, rank: int) -> None:
        """Simulate the loss of a worker: it sends nothing more."""
        self.ranks = tuple(k for k in self.ranks if k != rank)
        self.lost.add(rank)

    def exchange(self, outgoing: Outgoing, kind: str) -> Incoming:
        incoming: Incoming = {k: {} for k in outgoing}
        for k, messages in outgoing.items():
            for j, payload in messages.items():
                if j in incoming:
                    incoming[j][k] = self._carry(k, j, payload, kind)
        return incoming

    def _carry(self, k: int, j: int, payload: bytes, kind: str) -> bytes:
        for _ in range(RETRIES + 1):
            self.sent[kind] += _HEADER.size + len(payload)
            arrived = self.tamper(k, j, payload) if self.tamper else payload
            if self.tamper is None or zlib.crc32(arrived) == zlib.crc32(payload):
                return arrived
            self.resent += 1
        raise CommunicationError(f"worker {j}: the message of worker {k} arrived damaged {RETRIES + 1} times")

    def gather(self, values: Mapping[int, bytes]) -> dict[int, bytes] | None:
        return dict(values)


def _with_store(method: Callable[..., Any]) -> Callable[..., Any]:
    """Say whose end it is when the store does not answer any more."""

    @functools.wraps(method)
    def call(self: TorchCommunicator, *args: Any) -> Any:
        try:
            return method(self, *args)
        except dist.DistNetworkError as error:
            raise CommunicationError(
                f"worker {self.rank}: worker 0, which keeps the store where workers find each other, does not answer "
                f"({_first_line(error)})"
            ) from None

    return call


class TorchCommunicator(Communicator):
    """One worker in this process; the others in processes that torchrun, or anything that sets its variables, started.

    Each edge is a gloo process group of its own: if a neighbour dies or hangs, that edge alone breaks. Where every
    worker has a GPU of its own, the payloads of messages go over nccl, by a second group for each edge; headers,
    answers and reports stay with gloo, which says in time who does not answer.

    Args:
        edges: all pairs of workers that will ever exchange messages; the same in every process.
        timeout: seconds to wait for a neighbour; with ``drop``, and in `alive`, for a sign of life of it.
        on_failure: ``error`` raises where a neighbour does not answer; ``drop`` goes on without it.
        rejoin: this worker was lost, and comes back: call `return_to` before the first round.
        device: where this worker computes.
        backend: what carries the payloads: ``gloo``, ``nccl``, or by ``auto`` nccl where that is possible. nccl needs a
            GPU for every worker that no other shares, and that none is lost (``on_failure="error"``, no ``rejoin``): a
            call that nobody answers would stay on the GPU.
        store: where the workers find each other; None: that of torchrun (environment variables).
        rank, world_size: of this process; None with ``store=None``.

    Attributes:
        backend: ``gloo`` or ``nccl``.

    Raises:
        ValueError: an argument that is not allowed, or nccl where it is not possible.
        CommunicationError: a worker did not start, or a neighbour did not connect, in time.
    """

    def __init__(
        self,
        edges: Iterable[tuple[int, int]],
        timeout: float = 60.0,
        on_failure: str = "error",
        rejoin: bool = False,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        store: dist.Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if on_failure not in ("error", "drop"):
            raise ValueError(f"on_failure={on_failure!r} is not known; allowed: error, drop")
        check_number("timeout", timeout, without_least=True)
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is not known; allowed: {', '.join(BACKENDS)}")
        self.timeout, self.on_failure = timeout, on_failure
        if store is None:
            store, rank, world_size = _rendezvous(timeout)
        if rank is None or world_size is None:
            raise ValueError("rank and world_size must be given with a store")
        self._store = dist.PrefixStore("sparsebilevel", store)
        self.rank, self.world_size, self.ranks = rank, world_size, (rank,)
        self.device = torch.device(device)
        self._groups: dict[int, Any] = {}
        self._payload_groups: dict[int, Any] = {}  # empty with gloo, whose groups carry payloads too
        self._is_patient = False  # in `alive`
        self._answered: dict[int, str] = {}
        wanted = {(min(e), max(e)) for e in edges} | {(0, k) for k in range(1, world_size)}  # a star to report on
        # The same order everywhere, so that nobody waits in a circle.
        self._others = [sum(edge) - rank for edge in sorted(wanted) if rank in edge]
        self._returns: dict[int, tuple[int, str]] = {}  # lost worker -> (round where we stop for it, its key)
        is_lossy = on_failure == "drop" or rejoin
        obstacle = "on_failure='drop' and rejoin need gloo" if is_lossy else self._obstacle_to_nccl()
        if backend == "nccl" and obstacle:
            raise ValueError(f"backend='nccl' is not possible: {obstacle}")
        self.backend = "gloo" if backend == "gloo" or obstacle else "nccl"
        for other in self._others if not rejoin else ():
            self._connect(other)

    @_with_store
    def _obstacle_to_nccl(self) -> str:
        """Why nccl cannot carry the payloads; empty if it can. All workers come to the same answer."""
        mine = self._gpu()
        self._store.set(f"gpu/{self.rank}", mine)
        users: dict[str, int] = {}
        for k in range(self.world_size) if mine else (self.rank,):
            try:
                gpu = self._store.get(f"gpu/{k}").decode()
            except dist.DistStoreError as error:
                raise CommunicationError(
                    f"worker {self.rank}: worker {k} did not start in time ({_first_line(error)})"
                ) from None
            if not gpu:
                return f"worker {k} has no GPU to compute on, or a torch without nccl"
            if gpu in users:
                return f"workers {users[gpu]} and {k} share a GPU"
            users[gpu] = k
        return ""

    def _gpu(self) -> str:
        """The GPU of this worker, by a name that no other GPU has; empty where nccl has none to use."""
        if self.device.type != "cuda" or not dist.is_nccl_available():
            return ""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def _connect(self, other: int, name: str = "edge") -> None:
        low, high = sorted((self.rank, other))
        store = dist.PrefixStore(f"{name}/{low}-{high}", self._store)
        limit = timedelta(seconds=self.timeout)
        try:
            self._groups[other] = dist.ProcessGroupGloo(store, int(self.rank == high), 2, limit)
            if self.backend == "nccl":
                self._payload_groups[other] = self._make_payload_group(store, int(self.rank == high), limit)
        except RuntimeError as error:
            raise CommunicationError(
                f"worker {self.rank}: worker {other} did not connect within {self.timeout:g} s ({_first_line(error)})"
            ) from None

    def _make_payload_group(self, store: dist.Store, rank: int, limit: timedelta) -> Any:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # else waits return at once, and have no limit
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, 2, options)

    def _fail(self, other: int, reason: str) -> None:
        self.lost.add(other)
        if self.on_failure == "error":
            advice = ". With on_failure='drop' the others would go on without it" if other else ""  # not without 0
            raise CommunicationError(
                f"worker {self.rank}: worker {other} does not answer ({reason}; the limit is {self.timeout:g} s). If "
                f"it ended with such an error too, that one says who was lost before{advice}"
            )
        if other == 0:
            raise CommunicationError(f"worker {self.rank}: worker 0, which keeps the log, does not answer ({reason})")

    # -- one edge: None means that the worker is lost

    def _channel(self, other: int, tag: int) -> tuple[Any, torch.device]:
        """The group that carries what has this tag, and the device of its tensors."""
        if tag == _PAYLOAD_TAG and self._payload_groups:
            return self._payload_groups[other], self.device
        return self._groups[other], torch.device("cpu")

    def _send(self, other: int, data: bytes, tag: int = _TAG) -> list[Any] | None:
        group, device = self._channel(other, tag)
        buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(device)
        try:
            # The tensor is kept beside the work, since it must live until that has ended.
            return [group.send([buffer], int(self.rank < other), tag), buffer]
        except RuntimeError as error:
            self._fail(other, _first_line(error))
            return None

    def _receive(self, other: int, size: int, deadline: float, tag: int = _TAG) -> bytes | None:
        group, device = self._channel(other, tag)
        buffer = torch.zeros(max(size, 1), dtype=torch.uint8, device=device)
        try:
            work = group.recv([buffer], int(self.rank < other), tag)
            self._wait(work, deadline, other)
        except dist.DistNetworkError:  # of the store, not of this edge
            raise
        except RuntimeError as error:
            self._fail(other, _first_line(error))
            return None
        return buffer.cpu().numpy().tobytes()[:size]

    def _finish(self, other: int, sent: list[Any] | None, deadline: float, is_answered: bool = False) -> None:
        """Wait until what `_send` has begun is sent; it is soon if the other has answered."""
        if sent is None or other in self.lost:
            return
        try:
            self._wait(sent[0], deadline, None if is_answered else other)
        except dist.DistNetworkError:  # as above
            raise
        except RuntimeError as error:
            self._fail(other, _first_line(error))

    def _wait(self, work: Any, deadline: float, other: int | None = None) -> None:
        if (self.on_failure == "drop" or self._is_patient) and other is not None:
            self._wait_for(work, other)
            return
        left = max(deadline - time.monotonic(), 0.001)
        if not work.wait(timedelta(seconds=left)):
            raise RuntimeError("timed out")

    def _wait_for(self, work: Any, other: int) -> None:
        """Tell a worker that hangs from one that only waits for it: the latter says so, in the store, now and then.

        gloo breaks an edge whose wait ran out, so it waits in a thread, and with a limit for the worst case, in which
        each worker waits for the next. In `alive` that cannot be: the others compute, or wait for worker 0.
        """
        outcome: list[RuntimeError | None] = []
        limit = timedelta(days=365) if self._is_patient else timedelta(seconds=self.timeout * (self.world_size + 1))

        def wait() -> None:
            try:
                work.wait(limit)
                outcome.append(None)
            except RuntimeError as error:
                outcome.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        sign, since = self._sign_of(other), time.monotonic()
        while True:
            thread.join(self.timeout / 4)
            if not thread.is_alive():
                if outcome[0] is not None:
                    raise outcome[0]
                return
            self._sign()
            if (latest := self._sign_of(other)) != sign:
                sign, since = latest, time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise RuntimeError("timed out")

    def _sign(self) -> None:
        """A sign of life: a value that this worker has not written before."""
        self._store.set(f"alive/{self.rank}", str(time.monotonic_ns()))

    def _sign_of(self, other: int) -> bytes:
        key = f"alive/{other}"
        return self._store.get(key) if self._store.check([key]) else b""

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        stop = threading.Event()

        def sign() -> None:
            with contextlib.suppress(RuntimeError):  # without the store, who waits for this worker notices that itself
                while not stop.wait(self.timeout / 4):
                    self._sign()

        thread = threading.Thread(target=sign, daemon=True)
        thread.start()
        self._is_patient = True
        try:
            yield
            self.barrier()
        finally:
            self._is_patient = False
            stop.set()
            thread.join()

    @_with_store
    def exchange(self, outgoing: Outgoing, kind: str) -> Incoming:
        messages = {j: m for j, m in outgoing[self.rank].items() if j not in self.lost}
        received: dict[int, bytes] = {}
        payloads: dict[int, list[Any]] = {}  # those on their way, which end when the receiver asks for them
        sending, expecting = dict.fromkeys(messages, _DAMAGED), set(messages)
        for _ in range(RETRIES + 1):
            deadline = time.monotonic() + self.timeout
            works: list[tuple[int, list[Any] | None]] = []
            for j, wanted in sorted(sending.items()):
                works.append((j, self._post_header(j, messages[j], kind)))
                is_due = wanted == _DAMAGED and self.backend == "gloo" and j not in self.lost
                if is_due and (work := self._post_payload(j, messages[j], kind)):
                    payloads[j] = work
            heads = {j: self._take_header(j, deadline) for j in sorted(expecting - self.lost)}
            if self.backend == "nccl":
                arrived = self._swap({j: messages[j] for j in sending}, heads, kind, deadline)
            else:
                arrived = {j: self._receive(j, head.size, deadline, _PAYLOAD_TAG) for j, head in heads.items() if head}
            verdicts = {j: self._judge(head, arrived.get(j)) for j, head in heads.items()}
            for j, verdict in verdicts.items():
                if verdict == _GOOD:
                    received[j] = arrived[j]  # type: ignore[assignment]  # there is one
            works += [(j, self._send(j, verdict)) for j, verdict in verdicts.items() if j not in self.lost]
            answers = {j: self._receive(j, 1, deadline) for j in sorted(set(sending) - self.lost)}
            works += [(j, payloads.pop(j)) for j in sorted(payloads) if answers.get(j) != _NO_HEADER]
            for j, sent in works:
                self._finish(j, sent, deadline, is_answered=True)
            expecting = {j for j, verdict in verdicts.items() if verdict != _GOOD} - self.lost
            sending = {j: answer for j, answer in answers.items() if answer and answer != _GOOD and j not in self.lost}
            self.resent += len(sending)
            if not sending and not expecting:
                break
        for j in sorted(expecting | set(sending)):
            self._fail(j, f"a message arrived damaged {RETRIES + 1} times")
        return {self.rank: {j: received[j] for j in sorted(received) if j not in self.lost}}

    def _post_header(self, j: int, payload: bytes, kind: str) -> list[Any] | None:
        self.sent[kind] += _HEADER.size
        head = _HEADER.pack(_MAGIC, zlib.crc32(payload), len(payload), self.notice, 0)[:-4]
        head += struct.pack("<I", zlib.crc32(head))
        return self._send(j, self.tamper(self.rank, j, head) if self.tamper else head)

    def _post_payload(self, j: int, payload: bytes, kind: str) -> list[Any] | None:
        self.sent[kind] += len(payload)
        return self._send(j, self.tamper(self.rank, j, payload) if self.tamper else payload, _PAYLOAD_TAG)

    def _take_header(self, j: int, deadline: float) -> _Header | None:
        """Receive a header; None if it is damaged: then the payload has to wait, since its length is not known."""
        data = self._receive(j, _HEADER.size, deadline)
        if data is None:
            return None
        magic, checksum, size, notice, own_checksum = _HEADER.unpack(data)
        if magic != _MAGIC or zlib.crc32(data[:-4]) != own_checksum:
            return None
        return _Header(checksum, size, notice)

    def _judge(self, head: _Header | None, payload: bytes | None) -> bytes:
        """How a message arrived."""
        if head is None:
            return _NO_HEADER
        if payload is None or zlib.crc32(payload) != head.checksum:
            return _DAMAGED
        self.notice = max(self.notice, head.notice)
        return _GOOD

    def _swap(
        self, outgoing: Mapping[int, bytes], heads: Mapping[int, _Header | None], kind: str, deadline: float
    ) -> dict[int, bytes | None]:
        """Send and receive payloads over nccl, which knows no tags, and whose calls wait for their counterpart.

        So both ends of an edge first say whether they know what comes, and then take turns, the smaller number first.
        Edges come in an order that all workers share: nobody waits in a circle.
        """
        told = {j: self._send(j, _GOOD if head else _NO_HEADER) for j, head in heads.items() if j not in self.lost}
        asked = {j for j in sorted(outgoing) if self._receive(j, 1, deadline) == _GOOD}
        arrived: dict[int, bytes | None] = {}
        for j in sorted({*outgoing, *heads}):
            head = heads.get(j)
            for sender in sorted((self.rank, j)):
                if sender == j and head is not None:
                    arrived[j] = self._receive(j, head.size, deadline, _PAYLOAD_TAG)
                elif sender == self.rank and j in asked:
                    self._finish(j, self._post_payload(j, outgoing[j], kind), deadline)
        for j, sent in told.items():
            self._finish(j, sent, deadline)
        return arrived

    @_with_store
    def gather(self, values: Mapping[int, bytes]) -> dict[int, bytes] | None:
        deadline = time.monotonic() + self.timeout
        mine = values[self.rank]
        if self.rank:
            for part in (struct.pack("<Q", len(mine)), mine):
                self._finish(0, self._send(0, part), deadline)
            return None
        out = {0: mine}
        for k in range(1, self.world_size):
            if k not in self.lost and (size := self._receive(k, 8, deadline)) is not None:
                value = self._receive(k, struct.unpack("<Q", size)[0], deadline)
                if value is not None:
                    out[k] = value
        return out

    @_with_store
    def barrier(self) -> None:
        self.gather({self.rank: b""})
        deadline = time.monotonic() + self.timeout
        if self.rank:
            self._receive(0, 1, deadline)
        else:
            for k in [k for k in self._groups if k not in self.lost]:
                self._finish(k, self._send(k, _GOOD), deadline)

    # -- a lost worker comes back. It asks in the store; those who share an edge with it promise to stop at a later
    # round unless they have heard when it starts, and it starts in the last of these rounds. The promises are so far
    # ahead that all have made one before the first stops: two workers are never further apart than the graph is wide.

    @_with_store
    def welcome(self, round: int, clocks: Mapping[str, int]) -> set[int]:
        back = set()
        if self._returns:
            self._sign()  # who comes back waits for the promised round
        for j in sorted(self.lost & set(self._others)):
            if j not in self._returns:
                key = f"return/{j}/{self._store.add(f'returns/{j}', 0)}"
                if key.endswith("/0") or key == self._answered.get(j):
                    continue
                self._answered[j] = key
                self._returns[j] = round + self.world_size + 5, key
                self._store.set(f"{key}/promise/{self.rank}", str(self._returns[j][0]))
            promise, key = self._returns[j]
            if round < promise and not self._store.check([f"{key}/start"]):
                continue
            try:
                deadline = time.monotonic() + 2 * self.timeout
                while not self._store.check([f"{key}/start"]):
                    if time.monotonic() > deadline:
                        raise RuntimeError("timed out")
                    self._sign()  # the neighbours wait meanwhile, and have not lost this worker
                    time.sleep(0.02)
                if round == int(self._store.get(f"{key}/start")):
                    self._store.set(f"{key}/clocks", json.dumps([dict(clocks), self.notice]))
                    self._connect(j, key)
                    back.add(j)
                    self.lost.discard(j)
                    del self._returns[j]
            except dist.DistNetworkError:
                raise
            except RuntimeError:  # it was lost again
                del self._returns[j]
        return back

    @_with_store
    def return_to(self, rounds: int) -> tuple[int, dict[str, int]]:
        """(round, clocks) in which this worker is back; neighbours that do not answer in time count as lost.

        Raises:
            CommunicationError: worker 0 does not answer, or the run of ``rounds`` rounds is over by then.
        """
        key = f"return/{self.rank}/{self._store.add(f'returns/{self.rank}', 1)}"
        seen: dict[int, int] = {}
        sign, since = self._sign_of(0), time.monotonic()
        while len(seen) < len(self._others) and time.monotonic() - since < self.timeout:
            for j in self._others:
                if j not in seen and self._store.check([f"{key}/promise/{j}"]):
                    seen[j] = int(self._store.get(f"{key}/promise/{j}"))
            if 0 not in seen and (latest := self._sign_of(0)) != sign:  # in a report, as all of them are
                sign, since = latest, time.monotonic()
            time.sleep(0.005)
        self.lost = set(self._others) - set(seen)
        if self._others[0] == 0 and 0 not in seen:
            raise CommunicationError(f"worker {self.rank}: worker 0 does not answer within {self.timeout:g} s")
        start = max(seen.values())
        self._store.set(f"{key}/start", str(start))
        if start >= rounds:
            raise CommunicationError(f"worker {self.rank}: the run is over before it could be joined again")
        sign, since = self._sign_of(0), time.monotonic()
        while not self._store.check([f"{key}/clocks"]):
            if (latest := self._sign_of(0)) != sign:
                sign, since = latest, time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise CommunicationError(f"worker {self.rank}: no worker came to round {start} in {self.timeout:g} s")
            time.sleep(0.005)
        clocks, self.notice = json.loads(self._store.get(f"{key}/clocks"))
        for j in self._others:
            if j in seen:
                self._connect(j, key)
        return start, clocks

    def close(self) -> None:
        for group in self._payload_groups.values():
            group.abort()  # what a lost worker has left unanswered would be waited for
        self._payload_groups.clear()
        self._groups.clear()


def _rendezvous(timeout: float) -> tuple[dist.Store, int, int]:
    """Store, rank and number of workers, from the variables that torchrun sets."""
    try:
        return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        rank, size, host, port = (os.environ[v] for v in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise CommunicationError(
            f"worker {rank}: the {size} workers did not all find each other at {host}:{port} within {timeout:g} s: one "
            f"of them did not start, or the address is not worker 0's ({_first_line(error)})"
        ) from None


def launched_world_size() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:160]
