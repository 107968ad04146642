"""The federation as a Flower app: `DWNPStrategy` on the server, `make_client_app` on the devices.

The server's engine is the same `Federation` as in one process, with an exchange that goes over Flower's grid, and the
devices are the same `Clients`; so the same seeds give the same numbers. `PrunedFedAvg` is for other apps whose devices
have masks of their own, and `pack_mod` with `PackedGrid` for any app whose arrays have zeros.

A node is the client whose number its ``node_config`` has as ``partition-id``, as Flower's simulation sets it:
``flower-supernode --node-config "partition-id=3"``.

Needs ``pip install 'sparsebilevel[flower]'``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels import PackError, pack, unpack
from ..training.checkpoint import save_checkpoint
from .aggregate import aggregate_masked
from .client import Clients
from .client import Message as Content
from .hypernetwork import Hypernetwork
from .local import FlatModule
from .models import GatePoint, slice_gates
from .rounds import Federation
from .settings import Settings

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg, Result, Strategy
except ImportError as error:
    raise ImportError("sparsebilevel.federated.flower needs Flower: pip install 'sparsebilevel[flower]'") from error

# Record of a tensor by its name in a message; the others are in "arrays", where Flower's own strategies have theirs.
_RECORDS = {"gates": "gates", "channels": "gates", "learning": "gates", "hypernetwork": "hypernetwork"}
_PACKED, _BITS = "sparsebilevel.pack", "sparsebilevel.bits"  # ways to serialize an array, beside Flower's
_POLL = 1.0  # seconds between looks for nodes
_log = logging.getLogger("flwr")

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


# -- messages ----------------------------------------------------------------------------------------------------------


def to_records(content: Mapping[str, Any], arrays: dict[Any, Array] | None = None) -> RecordDict:
    """A message of the engine as Flower's records.

    Tensors are in the ArrayRecords ``gates`` (bool), ``hypernetwork`` and ``arrays`` (all others), words, and in
    requests numbers too, in the ConfigRecord ``config``, and numbers of replies in the MetricRecord ``metrics``.
    `from_records` gives the same message back, bit for bit.

    Args:
        content: tensors of dtypes that NumPy has, floats, integers and strings by name; a request has a ``kind``.
        arrays: those of messages that are sent together, to share what they have in common; is added to.
    """
    arrays = {} if arrays is None else arrays
    records: dict[str, Any] = {}
    is_request = "kind" in content
    for name, value in content.items():
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in arrays:
                arrays[key] = Array(value.detach().cpu().contiguous().numpy())
            records.setdefault(_RECORDS.get(name, "arrays"), ArrayRecord())[name] = arrays[key]
        elif is_request or isinstance(value, str):
            records.setdefault("config", ConfigRecord())[name] = value
        else:
            records.setdefault("metrics", MetricRecord())[name] = value
    return RecordDict(records)


def _tensors(record: Any) -> dict[str, Tensor]:
    """Of an ArrayRecord."""
    return dict(record.to_torch_state_dict())


def from_records(records: RecordDict) -> Content:
    """The message of the engine that `to_records` made these records of."""
    content: Content = {}
    for record in records.values():
        content |= _tensors(record) if isinstance(record, ArrayRecord) else dict(record)
    return content


# -- packing -----------------------------------------------------------------------------------------------------------


def pack_arrays(records: RecordDict, arrays: dict[int, Array] | None = None) -> RecordDict:
    """The same records with fewer bytes: arrays with zeros as `sparsebilevel.pack` has them, bool ones a bit an entry.

    Arrays that do not get smaller, and those of other dtypes than float32, float16 and bool, stay as they are. A zero
    with a sign, as weight * mask has many, loses it.

    Args:
        records: are not changed.
        arrays: those that were packed before, by ``id`` of what they were made of; is added to.
    """
    arrays = {} if arrays is None else arrays
    packed = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                if id(array) not in arrays:
                    arrays[id(array)] = _pack_array(array)
            record = ArrayRecord({key: arrays[id(array)] for key, array in record.items()})
        packed[name] = record
    return packed


def _pack_array(array: Array) -> Array:
    if array.dtype not in ("float32", "float16", "bool") or array.stype in (_PACKED, _BITS):
        return array
    dense = array.numpy()
    if array.dtype == "bool":
        stype, data = _BITS, np.packbits(dense).tobytes()
    else:
        values = torch.from_numpy(dense)
        stype, data = _PACKED, bytes(pack(values, values != 0))
    return Array(array.dtype, tuple(array.shape), stype, data) if len(data) < len(array.data) else array


def unpack_arrays(records: RecordDict) -> RecordDict:
    """What `pack_arrays` was given, but for signs of zeros."""
    dense = RecordDict()
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            record = ArrayRecord({key: _unpack_array(array) for key, array in record.items()})
        dense[name] = record
    return dense


def _unpack_array(array: Array) -> Array:
    if array.stype == _BITS:
        bits = np.unpackbits(np.frombuffer(array.data, np.uint8), count=math.prod(array.shape))
        return Array(bits.astype(bool).reshape(array.shape))
    return Array(unpack(array.data).numpy()) if array.stype == _PACKED else array


def _size(records: RecordDict) -> int:
    """Bytes of the arrays."""
    return sum(len(array.data) for record in records.array_records.values() for array in record.values())


def pack_mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """A mod for a ClientApp: unpacks what comes, and packs the reply. The server needs a `PackedGrid`.

    The MetricRecord ``bytes`` of ``context.state`` counts those of arrays so far, ``received`` and ``sent``, and as
    they would have been without packing, ``received-dense`` and ``sent-dense``.
    """
    counts: dict[str, Any] = dict(context.state.metric_records.get("bytes", {}))

    def add(name: str, packed: RecordDict, dense: RecordDict) -> None:
        for key, records in ((name, packed), (f"{name}-dense", dense)):
            counts[key] = counts.get(key, 0) + _size(records)

    packed, message.content = message.content, unpack_arrays(message.content)
    add("received", packed, message.content)
    reply = call_next(message, context)
    if reply.has_content():
        dense, reply.content = reply.content, pack_arrays(reply.content)
        add("sent", reply.content, dense)
    context.state["bytes"] = MetricRecord(counts)
    return reply


class PackedGrid(Grid):
    """A grid whose messages are packed, for any strategy: ``strategy.start(PackedGrid(grid), ...)``.

    The ClientApp needs `pack_mod`. A reply that cannot be unpacked becomes an empty one, with a warning.

    Attributes:
        bytes: of arrays so far: ``sent`` and ``received``, and as they would have been without packing,
            ``sent-dense`` and ``received-dense``.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.bytes = dict.fromkeys(("sent", "sent-dense", "received", "received-dense"), 0)

    def set_run(self, run: Any) -> None:
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        return self.grid.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        return self.grid.create_message(*args, **options)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(self._pack(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._unpack(self.grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._unpack(self.grid.send_and_receive(self._pack(messages), timeout=timeout))

    def _pack(self, messages: Iterable[Message]) -> list[Message]:
        messages, arrays = list(messages), dict[int, Array]()
        packed = [pack_arrays(message.content, arrays) for message in messages]
        for message, content in zip(messages, packed, strict=True):
            self.bytes["sent"] += _size(content)
            self.bytes["sent-dense"] += _size(message.content)
        # Only now: what `arrays` knows by its id must live until all is packed.
        for message, content in zip(messages, packed, strict=True):
            message.content = content
        return messages

    def _unpack(self, messages: Iterable[Message]) -> list[Message]:
        messages = list(messages)
        for message in messages:
            if message.has_content():
                packed = message.content
                try:
                    message.content = unpack_arrays(packed)
                except PackError as error:  # one bad reply must not end the round
                    _log.warning("node %d: its reply is dropped: %s", message.metadata.src_node_id, error)
                    message.content = RecordDict()
                self.bytes["received"] += _size(packed)
                self.bytes["received-dense"] += _size(message.content)
        return messages


# -- the server --------------------------------------------------------------------------------------------------------


class PrunedFedAvg(FedAvg):
    """FedAvg for devices with masks of their own: an entry is averaged over the devices whose mask keeps it.

    A reply has, beside the arrays and metrics that FedAvg expects, an ArrayRecord of bool masks, by the names of the
    arrays; an array without a mask is kept whole. An entry that no device keeps stays as it is on the server. All else
    is FedAvg's. See `aggregate_masked`.

    Args:
        *args, **options: of FedAvg.
        masks_key: name of the ArrayRecord of masks in replies.
    """

    def __init__(self, *args: Any, masks_key: str = "masks", **options: Any) -> None:
        super().__init__(*args, **options)
        self.masks_key = masks_key
        self._arrays = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's; the arrays are remembered for entries that no device keeps."""
        self._arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The masked average, and FedAvg's average of metrics.

        Raises:
            ValueError: an array or mask has another name or shape than the server's arrays.
        """
        replies = list(replies)
        answers = [reply.content for reply in replies if reply.has_content()]
        masks = [_tensors(answer.pop(self.masks_key, ArrayRecord())) for answer in answers]
        arrays, metrics = super().aggregate_train(server_round, replies)  # checks them too
        if arrays is None:
            return None, metrics
        updates = [_tensors(*answer.array_records.values()) for answer in answers]
        counts: list[Any] = [record[self.weighted_by_key] for a in answers for record in a.metric_records.values()]
        mean = aggregate_masked(updates, masks, counts, _tensors(self._arrays))
        return ArrayRecord(mean), metrics


class DWNPStrategy(Strategy):
    """A `Federation` whose clients are Flower's nodes, with any of its methods: DWNP and those it is compared with.

    ``start`` runs it to the end. One Flower round is one round of the federation: some exchanges over the grid (Mime's
    gradient, weights, hypernetwork), each repeated if too few clients answer, or pruning. Since Flower's loop knows one
    exchange a round, `configure_train` and `configure_evaluate` hold them themselves and leave nothing to send.

    Args:
        model, points, input_shape, settings, hypernetwork: see `Federation`; of the same structure as the clients'.
        budgets: kept fraction of T for each client; their number is that of the clients.
        timeout: seconds to wait for replies of an exchange; a client that has not answered then is left out.
        evaluate_every: rounds between evaluations on the clients, each one exchange or two; 0: none but the last.
        report: gets messages for people; None: Flower's log.

    Attributes:
        federation: the engine, from `connect` on: its weights, gates, counts of bytes and failures, ``state_dict``.
        rows: what its rounds and evaluations returned.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[GatePoint],
        input_shape: Sequence[int],
        budgets: Sequence[float],
        settings: Settings,
        hypernetwork: Hypernetwork | None = None,
        timeout: float = 3600.0,
        evaluate_every: int = 1,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout!r} is not allowed; expected seconds above 0")
        if evaluate_every < 0:
            raise ValueError(f"evaluate_every={evaluate_every} is not allowed; expected at least 0")
        self.model, self.points, self.input_shape = model, list(points), tuple(input_shape)
        self.budgets, self.settings, self.hypernetwork = list(budgets), settings, hypernetwork
        self.timeout, self.evaluate_every = timeout, evaluate_every
        self.report = report or _log.warning
        self.federation: Federation | None = None
        self.rows: list[dict[str, Any]] = []
        self._grid: Grid | None = None
        self._nodes: dict[int, int] = {}  # node of each client
        self._known: set[int] = set()  # nodes that have been asked who they are
        self._sizes: dict[int, int] = {}  # training samples of each client
        self._figures: dict[str, Any] | None = None  # of an evaluation that was due

    # -- nodes --------------------------------------------------------------------------------------------------------

    def connect(self, grid: Grid) -> Federation:
        """Wait for a node of every client, and make the federation, which may then continue from a checkpoint.

        Raises:
            TimeoutError: not all have come within ``timeout``.
        """
        self._grid = grid
        if self.federation is None:
            end = time.monotonic() + self.timeout
            self._find_nodes()
            while len(self._nodes) < len(self.budgets):
                if time.monotonic() > end:
                    missing = sorted(set(range(len(self.budgets))) - set(self._nodes))
                    raise TimeoutError(f"no nodes of the clients {missing} after {self.timeout} s")
                time.sleep(_POLL)
                self._find_nodes()
            sizes = [self._sizes[k] for k in range(len(self.budgets))]
            self.federation = Federation(
                self.model,
                self.points,
                self.input_shape,
                sizes,
                self.budgets,
                self.settings,
                self._exchange,
                self.hypernetwork,
                self.report,
            )
        return self.federation

    def _find_nodes(self) -> None:
        """Ask nodes that are new who they are, and forget those that are gone."""
        assert self._grid is not None
        online = set(self._grid.get_node_ids())
        self._known &= online
        self._nodes = {client: node for client, node in self._nodes.items() if node in online}
        new = sorted(online - self._known)
        answers = self._send({node: Message(RecordDict(), node, "query", ttl=self.timeout) for node in new})
        self._known |= set(new)  # whoever does not answer now is not waited for again
        for node in new:
            answer = answers.get(node, f"no reply within {self.timeout} s")
            if isinstance(answer, str):
                self.report(f"node {node} does not say which client it is, and is left out: {answer}")
                continue
            client: Any = answer.get("client")
            samples = answer.get("samples")
            if client not in range(len(self.budgets)) or not isinstance(samples, int) or samples < 1:
                clients = len(self.budgets)
                self.report(f"node {node} is left out: it is client {client} of {clients}, with {samples} samples")
                continue
            if client in self._nodes:  # a device that was started again has a new node
                self.report(f"client {client} is now node {node}, no longer {self._nodes[client]}")
            self._nodes[client] = node
            self._sizes[client] = samples

    def _send(self, messages: Mapping[int, Message]) -> dict[int, Content | str]:
        """Replies to messages, or why there is none, by the same keys; those that do not come in time are missing."""
        assert self._grid is not None
        if not messages:
            return {}
        replies = list(self._grid.send_and_receive(list(messages.values()), timeout=self.timeout))
        keys = {message.metadata.message_id: key for key, message in messages.items()}
        outcomes: dict[int, Content | str] = {}
        for reply in replies:
            try:
                outcome = f"{reply.error.reason}" if reply.has_error() else from_records(reply.content)
            except Exception as error:  # whatever is wrong with one reply, the others count
                outcome = f"{error}"
            outcomes[keys[reply.metadata.reply_to_message_id]] = outcome
        return outcomes

    def _exchange(self, requests: Mapping[int, Content]) -> dict[int, Content | str]:
        self._find_nodes()
        outcomes: dict[int, Content | str] = dict.fromkeys(requests, "no node has its partition-id")
        arrays: dict[Any, Array] = {}
        messages = {}
        for k, request in requests.items():
            if k in self._nodes:
                kind = "evaluate" if request["kind"] == "evaluate" else "train"
                messages[k] = Message(to_records(request, arrays), self._nodes[k], kind, ttl=self.timeout)
                outcomes[k] = f"no reply within {self.timeout} s"
        return outcomes | self._send(messages)

    # -- Flower's rounds ----------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation, to its end if ``num_rounds`` does not say otherwise.

        Args:
            grid: Flower's.
            initial_arrays: state dict of the model to start from; None: as it is.
            num_rounds: at most so many.
            timeout: seconds to wait for replies; None: that of the strategy.
            train_config, evaluate_config: must be empty, the settings say how clients train.
            evaluate_fn: called as ``evaluate_fn(round, arrays)`` before the first round and after each, with the state
                dict of the server's network, which pruning makes smaller.

        Returns:
            Flower's result: the last state dict, and metrics by round.

        Raises:
            FederationError: too few clients, again and again.
            TimeoutError: not all clients have come.
            ValueError: a config is not empty, or ``initial_arrays`` come after `connect`.
        """
        if train_config or evaluate_config:
            raise ValueError("train_config and evaluate_config must be empty; the settings say how clients train")
        if initial_arrays is not None:
            if self.federation is not None:
                raise ValueError("initial_arrays come too late, after connect(); the federation has its weights")
            self.model.load_state_dict(initial_arrays.to_torch_state_dict())
        self.timeout = self.timeout if timeout is None else timeout
        run = self.connect(grid)
        left = sum(phase.rounds for phase in run.phases) - run.done
        rounds = left if num_rounds is None else min(num_rounds, left)
        return super().start(grid, self.arrays(), rounds, self.timeout, None, None, evaluate_fn)

    def arrays(self) -> ArrayRecord:
        """State dict of the server's network."""
        if self.federation is None:
            return ArrayRecord(self.model.state_dict())
        return ArrayRecord(self.federation.state_dict()["model"])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Hold the next round; nothing is left to send."""
        run = self.connect(grid)
        self._grid = grid
        if not run.is_done:
            self.rows.append(run.round())
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The server's network after the round, and the round's figures."""
        return self.arrays(), _metrics(self.rows[-1])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Hold an evaluation if it is due; nothing is left to send."""
        run = self.connect(grid)
        self._figures = None
        if run.is_done or (self.evaluate_every and run.done % self.evaluate_every == 0):
            self._figures = run.evaluate()
            self.rows[-1] |= self._figures
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The figures of `Federation.evaluate`, if they were due."""
        return None if self._figures is None else _metrics(self._figures)

    def summary(self) -> None:
        """Log what will run."""
        _log.info("\t├──> Method: %s, %d clients", self.settings.method, len(self.budgets))
        if self.federation is not None:
            phases = ", ".join(f"{phase.name} {phase.rounds}" for phase in self.federation.phases)
            _log.info("\t└──> Rounds: %s; %d done", phases, self.federation.done)

    # -- after the run ------------------------------------------------------------------------------------------------

    def export(self) -> dict[int, dict[str, Any] | str]:
        """Have every device cut its own network out of the server's present one, by the mask that it has kept.

        The server does not send the masks. See `make_client_app` for what a device does with its network.

        Returns:
            By client ``params``, the number of its network's parameters, ``correct`` of ``count`` own test samples, and
            ``path``, where it has written it, if it has; or the reason why there is none.

        Raises:
            ValueError: the federation has not begun, or its devices have no networks of their own.
        """
        run = self.federation
        if run is None:
            raise ValueError("export() comes after start()")
        if not self.settings.personal:
            raise ValueError(f"method {self.settings.method} has one network for all devices: see arrays()")
        self._find_nodes()
        request: Content = {"weights": run.weights, "statistics": run.statistics}
        if run.gates is not None:
            request["channels"] = run.gates[0]
        arrays: dict[Any, Array] = {}
        messages = {
            k: Message(to_records(request, arrays), node, "query.export", ttl=self.timeout)
            for k, node in sorted(self._nodes.items())
        }
        answers = dict.fromkeys(range(run.clients), f"no reply within {self.timeout} s")
        return answers | self._send(messages)


def _metrics(row: Mapping[str, Any]) -> MetricRecord:
    """The numbers of a row, and its lists of numbers, of which None is NaN."""
    metrics = MetricRecord()
    for name, value in row.items():
        if isinstance(value, list):
            metrics[name] = [math.nan if number is None else number for number in value]
        elif isinstance(value, (int, float)):
            metrics[name] = value
    return metrics


# -- the devices -------------------------------------------------------------------------------------------------------


def make_client_app(clients: Callable[[Context], Clients], mods: list[Mod] | None = None) -> ClientApp:
    """A ClientApp whose nodes are the clients of a `DWNPStrategy`.

    Its ``train`` and ``evaluate`` answer the requests of `Clients`, and ``query`` says which client the node is. The
    mask of the device is kept in ``context.state["gates"]``, bool ``[G]`` over the channels of the dense network, by
    the name ``gates``; it changes with every request to train. With it ``query.export`` needs the server's weights
    only: it cuts the device's network out of them, counts its hits on the own test samples, and writes it to the file
    ``export-path`` of the node's ``node_config``, if there is one: ``model``, the state dict of the smaller network,
    and ``gates``, with which `slice_gates` makes that network of the dense one.

    Args:
        clients: gives the `Clients` of the context's run and node. It is called for every message, so it should keep
            what is slow to make, with `functools.cache` for instance.
        mods: of the app, such as `pack_mod`.
    """
    app = ClientApp(mods=mods)

    def answer(message: Message, context: Context) -> Message:
        request = from_records(message.content)
        reply = clients(context)(client_number(context), request)
        if request["kind"] in ("weights", "gradient"):  # with its own gates; others may have the server's
            context.state.pop("gates", None)
            if (gates := _own_gates(request)) is not None:
                context.state["gates"] = ArrayRecord({"gates": Array(gates.numpy())})
        return Message(to_records(reply), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        client, loaders = client_number(context), clients(context).loaders
        if not 0 <= client < len(loaders):
            raise ValueError(
                f"partition-id={client} of the node_config is not allowed; expected 0 to {len(loaders) - 1}"
            )
        return Message(to_records({"client": client, "samples": len(loaders[client].indices)}), reply_to=message)

    @app.query("export")
    def export(message: Message, context: Context) -> Message:
        devices, request, gates = clients(context), from_records(message.content), device_gates(context)
        if gates is None:
            raise ValueError("this node has kept no mask; it gets one when it trains after the hypernetwork's start")
        channels = request.get("channels")
        inside = gates if channels is None else gates[channels]
        network = slice_gates(devices._network(request).module, devices.points, inside)
        flat = FlatModule(network)
        own: Content = {"kind": "evaluate", "weights": flat.values, "statistics": flat.statistics, "channels": gates}
        reply = devices(client_number(context), own) | {"params": flat.values.numel()}
        path = context.node_config.get("export-path")
        if path is not None:
            state = {name: value.cpu().clone() for name, value in network.state_dict().items()}
            save_checkpoint(Path(str(path)), {"model": state, "gates": gates})
            reply["path"] = str(path)
        return Message(to_records(reply), reply_to=message)

    return app


def client_number(context: Context) -> int:
    """The client that a node is: the ``partition-id`` of its ``node_config``.

    Raises:
        ValueError: it has none.
    """
    number = context.node_config.get("partition-id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"partition-id={number!r} of the node_config is not allowed; expected the client's number")
    return number


def device_gates(context: Context) -> Tensor | None:
    """The mask that a node has kept, bool ``[G]`` over the channels of the dense network; None: all of them."""
    record = context.state.get("gates")
    return None if record is None else _tensors(record)["gates"]


def _own_gates(request: Content) -> Tensor | None:
    """The device's mask over the channels of the dense network, of a request to train."""
    channels, gates = request.get("channels"), request.get("gates")
    if channels is None or gates is None:
        return gates if channels is None else channels
    own = channels.clone()
    own[channels] = gates
    return own
