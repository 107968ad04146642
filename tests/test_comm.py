"""Workers in processes of their own: the same numbers as in one process, and no wait without a limit."""

import math
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sparsebilevel.comm import _HEADER, CommunicationError, LocalCommunicator, TorchCommunicator
from sparsebilevel.decentralized import Decentralized, Gossip, Settings, make_problem, make_topology

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)


def vector(rank):
    return torch.randn(50, generator=torch.Generator().manual_seed(rank))


def connect(rank, folder, size, kind=TorchCommunicator, name="store", **options):
    torch.set_num_threads(1)
    topology = make_topology("ring", size)
    store = dist.FileStore(f"{folder}/{name}", size)
    store.set_timeout(timedelta(seconds=20))
    comm = kind(topology.edges(), store=store, rank=rank, world_size=size, **options)
    return comm, Gossip(comm, topology)


class OwnGpus(TorchCommunicator):
    """What workers with a GPU each do, but that gloo stands for nccl, and the CPU for the GPUs."""

    def _gpu(self):
        return f"gpu {self.rank}"

    def _make_payload_group(self, store, rank, limit):
        return dist.ProcessGroupGloo(dist.PrefixStore("payloads", store), rank, 2, limit)


class OneGpu(OwnGpus):
    def _gpu(self):
        return "gpu 0"


class OneWithoutGpu(OwnGpus):
    def _gpu(self):
        return f"gpu {self.rank}" if self.rank else ""


def mix(rank, folder, size, kind):
    comm, gossip = connect(rank, folder, size, kind, timeout=20)
    values = {rank: vector(rank)}
    masks = {rank: torch.arange(50) % 2 == rank % 2}
    for _ in range(3):
        values = gossip.mix(values, "dense")
    for _ in range(3):
        values = gossip.mix(values, "masked", masks)
    rounded = Gossip(gossip.comm, gossip.topology, dtype=torch.int8)  # at random
    for _ in range(3):
        values = rounded.mix(values, "rounded", masks)
    gathered = comm.gather({rank: bytes([rank])})
    assert gathered == ({k: bytes([k]) for k in range(size)} if rank == 0 else None)
    comm.barrier()
    torch.save((values[rank], dict(comm.sent)), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("kind", [TorchCommunicator, OwnGpus])
@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_give_the_numbers_of_one_process(size, kind, tmp_path):
    if size == 1 and kind is OwnGpus:
        pytest.skip("one worker has nobody to send to")
    torch.multiprocessing.spawn(mix, (str(tmp_path), size, kind), nprocs=size)
    gossip = Gossip(LocalCommunicator(size), make_topology("ring", size))
    values = {k: vector(k) for k in range(size)}
    masks = {k: torch.arange(50) % 2 == k % 2 for k in range(size)}
    for _ in range(3):
        values = gossip.mix(values, "dense")
    for _ in range(3):
        values = gossip.mix(values, "masked", masks)
    rounded = Gossip(gossip.comm, gossip.topology, dtype=torch.int8)  # at random
    for _ in range(3):
        values = rounded.mix(values, "rounded", masks)
    total = dict.fromkeys(gossip.comm.sent, 0)
    for k in range(size):
        value, sent = torch.load(tmp_path / f"{k}.pt")
        assert torch.equal(value, values[k])
        for kind, count in sent.items():
            total[kind] += count
    assert total == dict(gossip.comm.sent)


def choose_backend(rank, folder, size):
    chosen = {}
    for kind, on_failure in ((OwnGpus, "error"), (OwnGpus, "drop"), (OneGpu, "error"), (OneWithoutGpu, "error")):
        name = f"{kind.__name__} {on_failure}"
        comm, _ = connect(rank, folder, size, kind, name, on_failure=on_failure)
        chosen[name] = comm.backend
        comm.barrier()
        try:
            connect(rank, folder, size, kind, f"{name} nccl", on_failure=on_failure, backend="nccl")
        except ValueError as error:
            chosen[f"{name} nccl"] = str(error)
    torch.save(chosen, f"{folder}/{rank}.pt")
    comm.barrier()


def test_nccl_is_for_workers_that_have_a_gpu_of_their_own(tmp_path):
    torch.multiprocessing.spawn(choose_backend, (str(tmp_path), 3), nprocs=3)
    for k in range(3):
        chosen = torch.load(tmp_path / f"{k}.pt")
        assert chosen.pop("OwnGpus error") == "nccl"
        assert [chosen.pop(f"{n} error") for n in ("OneGpu", "OneWithoutGpu")] == ["gloo"] * 2
        assert chosen.pop("OwnGpus drop") == "gloo"
        assert "on_failure='drop'" in chosen.pop("OwnGpus drop nccl")
        assert "workers 0 and 1 share a GPU" in chosen.pop("OneGpu error nccl")
        assert "worker 0 has no GPU" in chosen.pop("OneWithoutGpu error nccl")
        assert not chosen


def repeat(rank, folder, size, kind, header):
    comm, gossip = connect(rank, folder, size, kind, timeout=20)
    damaged = []

    def tamper(sender, receiver, payload):
        if (sender, receiver) == (0, 1) and (len(payload) == _HEADER.size) == header and len(damaged) < 2:
            damaged.append(1)
            return payload[:-1] + bytes([payload[-1] ^ 1])
        return payload

    comm.tamper = tamper
    values = gossip.mix(gossip.mix({rank: vector(rank)}, "x"), "x")
    torch.save((values[rank], comm.resent, comm.sent["x"]), f"{folder}/{rank}.pt")
    comm.barrier()


@pytest.mark.parametrize("kind", [TorchCommunicator, OwnGpus])
@pytest.mark.parametrize("header", [False, True])
def test_a_damaged_message_is_sent_again(header, kind, tmp_path):
    torch.multiprocessing.spawn(repeat, (str(tmp_path), 3, kind, header), nprocs=3)
    gossip = Gossip(LocalCommunicator(3), make_topology("ring", 3))
    expected = gossip.mix(gossip.mix({k: vector(k) for k in range(3)}, "x"), "x")
    message = gossip.comm.sent["x"] // 12  # bytes: 3 workers, 2 neighbours, 2 mixings
    for k in range(3):
        value, resent, sent = torch.load(tmp_path / f"{k}.pt")
        assert torch.equal(value, expected[k])
        assert resent == (2 if k == 0 else 0)
        assert sent == 4 * message + resent * (_HEADER.size if header else message)


def always_damaged(rank, folder, size, on_failure):
    comm, gossip = connect(rank, folder, size, timeout=5, on_failure=on_failure)
    comm.tamper = lambda sender, receiver, data: b"\0" * len(data) if (sender, receiver) == (2, 1) else data
    try:
        gossip.mix({rank: vector(rank)}, "x")
        result = sorted(comm.lost), ""
    except CommunicationError as error:
        result = sorted(comm.lost), str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    time.sleep(1)  # the others may still be reading


@pytest.mark.parametrize("on_failure", ["error", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_neighbour_whose_messages_stay_damaged_is_lost(on_failure, tmp_path):
    run_processes(always_damaged, 4, str(tmp_path), 4, on_failure)
    for k, other in ((1, 2), (2, 1)):
        lost, message = torch.load(tmp_path / f"{k}.pt")
        assert lost == [other]
        assert ("a message arrived damaged 4 times" in message) == (on_failure == "error")


def lose_one(rank, folder, size, kind, how, on_failure):
    comm, gossip = connect(rank, folder, size, kind, timeout=3, on_failure=on_failure)
    values = {rank: vector(rank)}
    try:
        for step in range(40):
            if rank == 2 and step == 3:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(8)
                return
            values = gossip.mix(values, "x")
        result = values[rank], sorted(comm.lost), ""
    except CommunicationError as error:
        result = None, sorted(comm.lost), str(error)
    comm.close()
    torch.save(result, f"{folder}/{rank}.pt")
    if on_failure == "drop":
        time.sleep(1)  # the others may still be reading


def run_processes(work, size, *args):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(k, *args)) for k in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 90
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging


@pytest.mark.parametrize("how", ["kill", pytest.param("hang", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("on_failure", "kind"), [("error", TorchCommunicator), ("drop", TorchCommunicator), ("error", OwnGpus)]
)
def test_a_worker_that_stops_answering(how, on_failure, kind, tmp_path):
    run_processes(lose_one, 4, str(tmp_path), 4, kind, how, on_failure)
    results = {k: torch.load(tmp_path / f"{k}.pt") for k in (0, 1, 3)}
    if on_failure == "error":
        for k in (1, 3):
            value, lost, message = results[k]
            assert value is None
            assert f"worker {k}: worker " in message
            assert "does not answer" in message
            assert 2 in lost or k == 3
    else:
        mean = sum(results[k][0] for k in results) / 3
        for value, _, message in results.values():
            assert not message
            assert torch.allclose(value, mean, atol=1e-3)
        assert results[1][1] == results[3][1] == [2]


def slow_report(rank, folder, size, on_failure):
    """Worker 1 takes longer than the limit for its part of a report, and worker 0 for making it."""
    comm, gossip = connect(rank, folder, size, timeout=1, on_failure=on_failure)
    problem = make_problem(workers=size, hidden=4, limit=100)
    run = Decentralized(problem, gossip, Settings(batch_size=8), 2000)
    summarize, loss = run._summarize, problem.local_loss
    run._summarize = lambda gathered: take_long(2.5, summarize, gathered)
    problem.local_loss = lambda k, z: take_long(2.5 if rank == 1 and run.done == 0 else 0, loss, k, z)
    rows = []
    for _ in range(2):
        rows.append(run.evaluate())
        run.round()
    torch.save((rows, sorted(comm.lost)), f"{folder}/{rank}.pt")
    comm.barrier()


def take_long(seconds, function, *args):
    time.sleep(seconds)
    return function(*args)


@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_report_may_take_longer_than_the_limit(on_failure, tmp_path):
    run_processes(slow_report, 3, str(tmp_path), 3, on_failure)
    for k in range(3):
        rows, lost = torch.load(tmp_path / f"{k}.pt")
        assert not lost
        assert [row and row["workers"] for row in rows] == ([3, 3] if k == 0 else [None, None])


def hang_in_a_report(rank, folder, size, on_failure):
    comm, _ = connect(rank, folder, size, timeout=2, on_failure=on_failure)
    try:
        with comm.alive():
            if rank == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            gathered = comm.gather({rank: b"x"})
        result = gathered and sorted(gathered), ""
    except CommunicationError as error:
        result = None, str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    time.sleep(1)  # the others may still be reading


@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_worker_that_hangs_in_a_report_is_noticed(on_failure, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=hang_in_a_report, args=(k, str(tmp_path), 3, on_failure)) for k in range(3)]
    for process in processes:
        process.start()
    try:
        for process in processes[:2]:
            process.join(90)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    gathered, message = torch.load(tmp_path / "0.pt")
    assert gathered == ([0, 1] if on_failure == "drop" else None)
    assert ("worker 2 does not answer" in message) == (on_failure == "error")
    _, message = torch.load(tmp_path / "1.pt")
    assert ("worker 0 does not answer" in message) == (on_failure == "error")
    assert "on_failure='drop'" not in message  # nobody can go on without worker 0


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_never_start_are_told_in_one_error(rank, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        CommunicationError, match=rf"worker {rank}: the 2 workers did not all find .*:{port} within 1 s"
    ):
        TorchCommunicator([(0, 1)], timeout=1)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="on_failure='retry'"):
        TorchCommunicator([], on_failure="retry")
    with pytest.raises(ValueError, match="backend='mpi'"):
        TorchCommunicator([], backend="mpi")
    for timeout in (0, math.inf, math.nan, "60"):
        with pytest.raises(ValueError, match=f"timeout={timeout!r}"):
            TorchCommunicator([], timeout=timeout)
    for size in (0, 1.5, None):
        with pytest.raises(ValueError, match=f"world_size={size} is not allowed; expected a whole number, at least 1"):
            LocalCommunicator(size)
