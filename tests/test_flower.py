"""The federation as a Flower app: conversions, strategies, and the example over grids of three kinds."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("flwr")
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before it is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from sparsebilevel.federated import Federation, FederationError, LocalExchange, slice_gates
from sparsebilevel.federated.aggregate import aggregate_masked
from sparsebilevel.federated.flower import (
    DWNPStrategy,
    PackedGrid,
    PrunedFedAvg,
    client_number,
    device_gates,
    from_records,
    make_client_app,
    pack_arrays,
    pack_mod,
    to_records,
    unpack_arrays,
)
from sparsebilevel.training.checkpoint import load_checkpoint, save_checkpoint

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "flower"


def load_task():
    spec = importlib.util.spec_from_file_location("flower_example_task", EXAMPLE / "task.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


task = load_task()


def read_config():
    tomli = pytest.importorskip("tomli")  # of flwr's dependencies
    config = tomli.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return config | {"clients": 3, "epochs": 1, "finetune-epochs": 1, "local-steps": 5, "batch-size": 50}


def make_config(**changes):
    return read_config() | {name.replace("_", "-"): value for name, value in changes.items()}


def run_own(config, fault=None):
    """The same federation in this process alone."""
    made, devices = task.make_task(config), task.make_clients(config)
    exchange = LocalExchange(devices)
    if fault is not None:
        exchange.fault = fault
    sizes = [len(loader.indices) for loader in devices.loaders]
    run = Federation(
        made.model, made.points, made.input_shape, sizes, made.budgets, made.settings, exchange, made.hypernetwork
    )
    while not run.is_done:
        run.round()
    return run


def make_strategy(config, **options):
    made = task.make_task(config)
    options = {"timeout": 60.0, "evaluate_every": 0} | options
    return DWNPStrategy(
        made.model, made.points, made.input_shape, made.budgets, made.settings, made.hypernetwork, **options
    )


def make_app(config, mods=None):
    return make_client_app(lambda context: task.make_clients(config), mods)


def assert_same_run(a, b):
    """Weights, masks and positions, bit for bit."""
    for name in ("weights", "statistics", "momentum"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.gates is None) == (b.gates is None)
    assert a.gates is None or all(map(torch.equal, a.gates, b.gates))
    if a.hyper is not None:
        assert torch.equal(a.hyper.values, b.hyper.values)
    assert a.positions == b.positions
    assert a.failures == b.failures
    assert (a.sent, a.received) == (b.sent, b.received)


class LoopGrid(Grid):
    """Carries messages to a ClientApp in this process; ``states`` are the contexts of the nodes, which have odd ids."""

    def __init__(self, app, clients, **node_config):
        self.app = app
        self.states = {}
        for k in range(clients):
            self.add(k, **node_config)
        self.silent = set()
        self.seen = []

    def add(self, client, node=None, **node_config):
        node = 1001 + 7 * client if node is None else node
        self.states[node] = Context(1, node, {"partition-id": client, **node_config}, RecordDict(), {})
        return node

    def set_run(self, run):
        self._run = run

    @property
    def run(self):
        return self._run

    def create_message(self, *args, **kwargs):
        raise NotImplementedError("deprecated")

    def get_node_ids(self):
        return list(self.states)

    def push_messages(self, messages):
        raise NotImplementedError("the strategies send and receive at once")

    def pull_messages(self, message_ids):
        raise NotImplementedError("the strategies send and receive at once")

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{len(self.seen)}-{number}"
            received = pickle.loads(pickle.dumps(message))
            self.seen.append(received)
            node = message.metadata.dst_node_id
            if node in self.silent:
                continue
            try:
                reply = self.app(received, self.states[node])
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=received)
            replies.append(pickle.loads(pickle.dumps(reply)))
        return replies[::-1]  # whoever is last comes first


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes of Flower have here; sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """What a process of a Flower run is."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


# -- messages ----------------------------------------------------------------------------------------------------------


def make_content():
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45, -1.5])
    content = {name: special.to(d) for name, d in (("w16", torch.float16), ("w32", torch.float32))}
    content |= {"weights": torch.randn(5, 7).t(), "step": 3, "lr": 0.1 + 0.2, "kind": "weights"}
    content |= {"hypernetwork": torch.randn(3, 4, dtype=torch.float64), "gates": torch.rand(9) < 0.5}
    return content | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "n": torch.tensor([2**40, -1])}


def assert_same_content(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert (value.shape, value.dtype) == (b[name].shape, b[name].dtype), name
            assert value.contiguous().numpy().tobytes() == b[name].numpy().tobytes(), name
        else:
            assert (value, type(value)) == (b[name], type(b[name])), name


@pytest.mark.parametrize("packed", [False, True])
def test_messages_become_records_and_back(packed):
    content = make_content()
    records = to_records(content)
    if packed:
        content["w16"], content["w32"] = (content[name] + 0.0 for name in ("w16", "w32"))  # no -0.0
        records = unpack_arrays(pack_arrays(records))
    assert_same_content(from_records(pickle.loads(pickle.dumps(records))), content)
    assert from_records(records)["weights"].is_contiguous()  # sums depend on strides
    assert list(records["gates"]) == ["gates"]
    assert list(records["hypernetwork"]) == ["hypernetwork"]
    assert "weights" in records["arrays"]
    assert dict(records["config"]) == {"step": 3, "lr": 0.1 + 0.2, "kind": "weights"}
    reply = {"loss": 0.1, "count": 3, "path": "here"}
    records = to_records(reply)
    assert dict(records["metrics"]) == {"loss": 0.1, "count": 3}
    assert_same_content(from_records(records), reply)


def test_messages_share_arrays():
    weights, arrays = torch.randn(10), {}
    first, second = (to_records({"weights": weights[:], "part": weights[:k]}, arrays) for k in (4, 5))
    assert first["arrays"]["weights"] is second["arrays"]["weights"]
    assert first["arrays"]["part"].numpy().shape == (4,)
    assert second["arrays"]["part"].numpy().shape == (5,)


def test_packing_leaves_zeros_out():
    weights = torch.randn(200, 50) * (torch.rand(200, 50) < 0.1)
    gates = torch.rand(10_001) < 0.5
    records = RecordDict({"arrays": ArrayRecord({"weights": Array(weights.numpy()), "dense": Array(np.ones(500))})})
    records["gates"] = ArrayRecord({"gates": Array(gates.numpy())})
    records["config"] = ConfigRecord({"lr": 0.5})
    packed = pack_arrays(records)
    assert len(packed["arrays"]["weights"].data) < 0.15 * len(records["arrays"]["weights"].data)
    assert len(packed["gates"]["gates"].data) == 1251
    assert packed["arrays"]["dense"].stype == records["arrays"]["dense"].stype
    assert packed["config"] == {"lr": 0.5}
    with pytest.raises(TypeError, match=r"sparsebilevel\.pack"):  # who does not unpack does not get wrong numbers
        packed["arrays"]["weights"].numpy()
    assert pack_arrays(packed)["arrays"]["weights"].data == packed["arrays"]["weights"].data
    back = unpack_arrays(packed)
    assert back["arrays"]["weights"].numpy().tobytes() == (weights + 0.0).numpy().tobytes()
    assert np.array_equal(back["gates"]["gates"].numpy(), gates.numpy())


def test_bytes_are_counted_on_both_sides():
    def echo(message, context):
        assert message.content["arrays"]["w"].numpy().shape == (1000,)
        half = message.content["arrays"]["w"].numpy() * (np.arange(1000) % 2)
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(half.astype(np.float32))})}), reply_to=message)

    app = ClientApp(mods=[pack_mod])
    app.train()(echo)
    loop = LoopGrid(app, 2)
    grid = PackedGrid(loop)
    weights = ArrayRecord({"w": Array(np.where(np.arange(1000) < 100, 1, 0).astype(np.float32))})
    for _ in range(3):
        messages = [Message(RecordDict({"arrays": weights}), node, "train") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=1))
        assert [reply.content["arrays"]["w"].numpy().sum() for reply in replies] == [50, 50]
    dense = len(weights["w"].data)
    assert grid.bytes["sent-dense"] == grid.bytes["received-dense"] == 6 * dense
    assert grid.bytes["received"] < grid.bytes["sent"] < 0.2 * 6 * dense
    for context in loop.states.values():
        counts = dict(context.state["bytes"])
        assert 2 * counts["received"] == grid.bytes["sent"]
        assert 2 * counts["sent"] == grid.bytes["received"]
        assert counts["sent-dense"] == counts["received-dense"] == 3 * dense


# -- PrunedFedAvg ------------------------------------------------------------------------------------------------------


def make_replies(updates, masks, examples, key="masks"):
    replies = []
    for k, (update, mask, count) in enumerate(zip(updates, masks, examples, strict=True)):
        question = Message(RecordDict(), k + 1, "train")
        content = RecordDict({"arrays": ArrayRecord(update)})
        content["metrics"] = MetricRecord({"num-examples": count, "loss": float(k)})
        if mask:
            content[key] = ArrayRecord(mask)
        replies.append(Message(content, reply_to=question))
    return replies


def test_pruned_fedavg_averages_over_masks():
    shapes = {"a": (6, 5), "b": (6,)}
    old, *updates = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(4))
    masks = [{"a": torch.rand(6, 5) < 0.3}, {"a": torch.rand(6, 5) < 0.3, "b": torch.rand(6) < 0.3}, {}]
    masks[2] = {"a": torch.zeros(6, 5, dtype=torch.bool)}
    loop = LoopGrid(ClientApp(), 3)
    strategy = PrunedFedAvg(min_train_nodes=3, min_available_nodes=3, masks_key="kept")
    sent = list(strategy.configure_train(1, ArrayRecord(old), ConfigRecord(), loop))
    assert len(sent) == 3
    failed = Message(Error(1, "gone"), reply_to=sent[0])
    arrays, metrics = strategy.aggregate_train(1, [*make_replies(updates, masks, [10, 20, 30], "kept"), failed])
    expected = aggregate_masked(updates, masks, [10, 20, 30], old)
    assert all(torch.equal(value, expected[name]) for name, value in arrays.to_torch_state_dict().items())
    assert (expected["a"] == old["a"]).any()
    assert metrics["loss"] == pytest.approx((20 + 60) / 60)
    assert strategy.aggregate_train(2, [failed]) == (None, None)


def test_pruned_fedavg_without_masks_is_fedavg():
    old, *updates = ({"a": torch.randn(6, 5)} for _ in range(4))
    loop = LoopGrid(ClientApp(), 3)
    results = []
    for strategy in (FedAvg(), PrunedFedAvg()):
        list(strategy.configure_train(1, ArrayRecord(old), ConfigRecord(), loop))
        results.append(strategy.aggregate_train(1, make_replies(updates, [{}, {}, {}], [1, 2, 3])))
    (theirs, their_metrics), (ours, our_metrics) = results
    assert_close(ours.to_torch_state_dict()["a"], theirs.to_torch_state_dict()["a"])
    assert our_metrics == their_metrics


def test_pruned_fedavg_over_a_packed_grid():
    """Clients that add their number to what they keep; the server's arrays after two rounds."""
    masks = [torch.tensor([1, 1, 0, 0] * 250, dtype=torch.bool), torch.tensor([0, 1, 1, 0] * 250, dtype=torch.bool)]

    def train(message, context):
        k = context.node_config["partition-id"]
        weights = message.content["arrays"].to_torch_state_dict()["w"]
        content = RecordDict({"arrays": ArrayRecord({"w": (weights + k + 1) * masks[k]})})
        content["masks"] = ArrayRecord({"w": masks[k]})
        content["metrics"] = MetricRecord({"num-examples": 10 * (k + 1)})
        return Message(content, reply_to=message)

    app = ClientApp(mods=[pack_mod])
    app.train()(train)
    grid = PackedGrid(LoopGrid(app, 2))
    strategy = PrunedFedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord({"w": torch.full((1000,), 5.0)}), num_rounds=2)
    expected = torch.tensor([7, 5 + 2 * 5 / 3, 9, 5] * 250)
    assert_close(result.arrays.to_torch_state_dict()["w"], expected)
    assert grid.bytes["received"] < 0.6 * grid.bytes["received-dense"]


# -- DWNPStrategy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device_networks": "sliced", "device_flops": "0.5,0.3,0.4"},
        {"average": "mime", "sample": 2, "weighting": "samples"},
        {"method": "energy", "clients": 2},
        {"method": "fedavg", "clients": 2},
        {"method": "bidst", "clients": 2, "mask_interval": 1, "lr": 0.05, "epochs": 4},
        {"method": "bip", "clients": 2, "mask_interval": 1, "lr": 0.05, "epochs": 4, "mask_start": 0.5},
    ],
    ids=["dwnp", "sliced", "mime", "energy", "fedavg", "bidst", "bip"],
)
def test_the_same_seeds_give_the_same_numbers(changes):
    config = make_config(**changes)
    own = run_own(config)
    loop = LoopGrid(make_app(config, [pack_mod]), config["clients"])
    strategy = make_strategy(config)
    rounds = []
    result = strategy.start(PackedGrid(loop), evaluate_fn=lambda number, arrays: rounds.append(number))
    run = strategy.federation
    assert run.is_done
    assert_same_run(run, own)
    assert run.evaluate() == own.evaluate()
    assert rounds == list(range(run.done + 1))
    state = result.arrays.to_torch_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own.model.state_dict().items())
    assert len(result.train_metrics_clientapp) == run.done == len(strategy.rows)
    assert list(result.evaluate_metrics_clientapp) == [run.done]
    assert result.evaluate_metrics_clientapp[run.done]["pooled_acc"] == own.evaluate()["pooled_acc"] > 0.3


def test_devices_keep_their_masks_and_export_their_networks(tmp_path):
    for how in ("masked", "sliced"):
        config = make_config(device_networks=how)
        loop = LoopGrid(make_app(config), 3)
        for k, context in enumerate(loop.states.values()):
            context.node_config["export-path"] = str(tmp_path / f"{how}{k}.pth")
        strategy = make_strategy(config)
        strategy.start(loop)
        run = strategy.federation
        server, devices = run.gates
        for k, context in enumerate(loop.states.values()):
            assert torch.equal(device_gates(context), devices[k])
        loop.seen.clear()
        answers = strategy.export()
        assert not any("gates" in request.content.get("gates", {}) for request in loop.seen)
        hits = sum(answer["correct"] for answer in answers.values())
        assert hits / sum(answer["count"] for answer in answers.values()) == run.evaluate_devices()[0]
        dense = task.make_task(config).model
        for k, answer in answers.items():
            small = run.device_model(k)
            assert answer["params"] == sum(p.numel() for p in small.parameters())
            saved = load_checkpoint(answer["path"])
            mine = slice_gates(dense, run.points, saved["gates"])
            mine.load_state_dict(saved["model"])
            x = torch.randn(2, *run.input_shape)
            assert torch.equal(mine.eval()(x), small.eval()(x))
        assert strategy.federation.client_gates() is not None


def test_masks_follow_the_training():
    config = make_config(epochs=3)
    loop = LoopGrid(make_app(config), 3)
    strategy = make_strategy(config, evaluate_every=1)
    masks = []

    def look(number, arrays):
        masks.append([device_gates(context) for context in loop.states.values()])

    strategy.start(loop, num_rounds=3, evaluate_fn=look)
    assert masks == [[None] * 3] * 4  # the hypernetwork has been trained at the end of the third round
    gates = strategy.federation.client_gates()
    assert gates is not None
    assert "has kept no mask" in strategy.export()[0]
    strategy.start(loop, num_rounds=1)
    for k, context in enumerate(loop.states.values()):
        assert torch.equal(device_gates(context), gates[k])


def test_nodes_that_fail_are_left_out_and_counted():
    config = make_config(min_clients=1, epochs=2)

    def fault(kind, round, client):
        if client == 1 and round in (1, 2) and kind == "weights":
            raise RuntimeError("no battery")

    own = run_own(config, fault)
    good = make_app(config)

    def app(message, context):
        request = from_records(message.content)
        if request and client_number(context) == 1 and request["round"] in (1, 2) and request["kind"] == "weights":
            raise RuntimeError("no battery")
        return good(message, context)

    messages = []
    strategy = make_strategy(config, report=messages.append)
    strategy.start(LoopGrid(app, 3))
    assert strategy.federation.failures == [0, 2, 0]
    assert messages == [f"round {i} (weights): client 1 is left out: no battery" for i in (2, 3)]
    assert_same_run(strategy.federation, own)


def test_silent_nodes_and_nodes_that_are_gone_or_new():
    config = make_config(min_clients=1, method="fedavg", finetune_epochs=3)
    good = make_app(config)

    def app(message, context):
        reply = good(message, context)
        if "says" in context.node_config:
            reply.content["metrics"]["client"] = context.node_config["says"]
        if "mumbles" in context.node_config:
            reply.content = RecordDict({"metrics": MetricRecord({"samples": 3})})
        return reply

    loop = LoopGrid(app, 3)
    messages = []
    strategy = make_strategy(config, report=messages.append, timeout=5)
    strategy.start(loop, num_rounds=1)
    nodes = list(loop.states)
    loop.silent.add(nodes[0])
    strategy.start(loop, num_rounds=1)
    assert messages.pop() == "round 2 (weights): client 0 is left out: no reply within 5 s"
    del loop.states[nodes[0]]
    strategy.start(loop, num_rounds=1)
    assert messages.pop() == "round 3 (weights): client 0 is left out: no node has its partition-id"
    loop.add(0, node=77)
    loop.add(2, node=78)
    loop.add(9, node=79)
    loop.add("x", node=80)
    loop.add(0, node=81, says=-1)
    loop.add(0, node=82, mumbles=True)
    strategy.start(loop, num_rounds=1)
    assert messages == [
        f"client 2 is now node 78, no longer {nodes[2]}",
        "node 79 does not say which client it is, and is left out: partition-id=9 of the node_config is not allowed; "
        "expected 0 to 2",
        "node 80 does not say which client it is, and is left out: partition-id='x' of the node_config is not allowed; "
        "expected the client's number",
        f"node 81 is left out: it is client -1 of 3, with {strategy.federation.sizes[0]} samples",
        "node 82 is left out: it is client None of 3, with 3 samples",
    ]
    assert strategy.federation.failures == [2, 0, 0]
    assert loop.seen[-1].metadata.dst_node_id == 78
    asked = len(loop.seen)
    strategy.start(loop, num_rounds=1)
    assert len(loop.seen) == asked + 3  # nobody is asked again who he is
    loop.silent.update(loop.states)
    with pytest.raises(FederationError, match="0 of 3 clients .* no reply within 5 s"):
        strategy.start(loop)


def test_malformed_replies_are_left_out():
    config = make_config(min_clients=1)
    good = make_app(config)
    changes = [
        (lambda reply: reply.pop("momentum"), "the reply has no momentum"),
        (lambda reply: reply.update(weights=reply["weights"][:-1]), "weights is not of the shape and dtype"),
        (lambda reply: reply.update(weights=reply["weights"].double()), "weights is not of the shape and dtype"),
        (lambda reply: reply.update(loss="low"), "the reply's loss is not a number"),
        (lambda reply: reply.update(statistics=3), "statistics is not of the shape and dtype"),
    ]
    for change, reason in changes:

        def app(message, context, change=change):
            answer = good(message, context)
            content = from_records(answer.content)
            if "weights" in content and client_number(context) == 0:
                change(content)
                answer.content = to_records(content)
            return answer

        messages = []
        strategy = make_strategy(config, report=messages.append)
        strategy.start(LoopGrid(app, 3), num_rounds=1)
        assert strategy.federation.failures == [1, 0, 0]
        assert len(messages) == 1
        assert reason in messages[0]


def test_replies_that_cannot_be_read_are_left_out():
    config = make_config(method="fedavg", min_clients=1)
    good = make_app(config, [pack_mod])

    def app(message, context):
        answer = good(message, context)
        record = answer.content.get("arrays", {})
        if client_number(context) == 0 and "statistics" in record:
            record["w"] = Array("float32", (9,), "sparsebilevel.pack", b"SBPK, but damaged")
        if client_number(context) == 1 and "statistics" in record:
            record["w"] = Array("float32", (9,), "unknown", b"")
        return answer

    messages = []
    strategy = make_strategy(config, report=messages.append)
    strategy.start(PackedGrid(LoopGrid(app, 3)), num_rounds=1)
    assert strategy.federation.failures == [1, 1, 0]
    assert "client 0 is left out: the reply has no weights" in messages[0]
    assert "client 1 is left out: Unsupported serialization type" in messages[1]


def test_malformed_energies_are_left_out():
    config = make_config(method="energy", min_clients=1)
    good = make_app(config)

    def app(message, context):
        answer = good(message, context)
        content = from_records(answer.content)
        if "energy" in content and client_number(context) == 2:
            answer.content = to_records({"energy": content["energy"][1:]})
        return answer

    messages = []
    strategy = make_strategy(config, report=messages.append)
    strategy.start(LoopGrid(app, 3))
    assert len(messages) == 1
    assert "client 2 is left out: the reply's energy is not of the shape" in messages[0]
    assert strategy.federation.gates is not None


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    config = make_config()
    own = run_own(config)
    strategy = make_strategy(config)
    strategy.start(LoopGrid(make_app(config), 3), num_rounds=4)
    save_checkpoint(tmp_path / "checkpoint.pth", strategy.federation.state_dict())
    again = make_strategy(config)
    loop = LoopGrid(make_app(config), 3)
    again.connect(loop).load_state_dict(load_checkpoint(tmp_path / "checkpoint.pth"))
    again.start(loop)
    assert again.federation.done == own.done
    assert_same_run(again.federation, own)


def test_initial_arrays_and_arguments_that_do_not_fit():
    config = make_config(method="fedavg")
    loop = LoopGrid(make_app(config), 3)
    other = make_strategy(make_config(method="fedavg", seed=5))
    strategy = make_strategy(config)
    strategy.start(loop, initial_arrays=other.arrays(), num_rounds=0)
    state = strategy.arrays().to_torch_state_dict()
    assert all(torch.equal(value, state[name]) for name, value in other.model.state_dict().items())
    with pytest.raises(ValueError, match="initial_arrays come too late"):
        strategy.start(loop, initial_arrays=other.arrays())
    with pytest.raises(ValueError, match="must be empty"):
        strategy.start(loop, train_config=ConfigRecord({"lr": 1.0}))
    with pytest.raises(ValueError, match="timeout=0"):
        make_strategy(config, timeout=0)
    with pytest.raises(ValueError, match="evaluate_every=-1"):
        make_strategy(config, evaluate_every=-1)
    with pytest.raises(TimeoutError, match=r"clients \[2\]"):
        make_strategy(config, timeout=0.01).start(LoopGrid(make_app(config), 2))
    with pytest.raises(ValueError, match="after start"):
        make_strategy(config).export()
    with pytest.raises(ValueError, match="fedavg has one network for all devices"):
        strategy.export()


# -- Flower's own processes --------------------------------------------------------------------------------------------


class Programs:
    """Programs of Flower in a folder, without telemetry; all are ended at the end of a test."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.bin = Path(sys.executable).parent
        self.env = os.environ | {"FLWR_HOME": str(folder / "home"), "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.env |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        (folder / "home").mkdir()

    def start(self, name, *arguments):
        log = (self.folder / f"{len(self.started)}.{name}.log").open("w")
        program = subprocess.Popen(
            [self.bin / name, "--insecure", *arguments],
            cwd=self.folder,
            env=self.env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(program)
        return program

    def start_superlink(self, *arguments):
        """One that is ready, and the name of its connection for ``flwr run``."""
        http, control, fleet = free_ports(3)
        addresses = ["--control-api-address", f"127.0.0.1:{control}", "--fleet-api-address", f"127.0.0.1:{fleet}"]
        program = self.start(
            "flower-superlink", "--port", str(http), "--disable-runtime-dependency-installation", *addresses, *arguments
        )
        end = time.monotonic() + 60
        while not is_healthy(http):
            assert program.poll() is None, self.logs()
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)
        connection = f'[superlink.test]\naddress = "127.0.0.1:{http}"\ninsecure = true\n'
        (self.folder / "home" / "config.toml").write_text(connection)
        return f"127.0.0.1:{http}"

    def run_app(self, app, config, *arguments):
        """The result of the example, which runs on the superlink."""
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in config.items())
        (self.folder / "run.toml").write_text("".join(lines))
        done = subprocess.run(
            [self.bin / "flwr", "run", app, "test", "--stream", "--run-config", self.folder / "run.toml", *arguments],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        output = Path(config["output-dir"])
        assert (output / "result.json").exists(), done.stdout + done.stderr + self.logs()
        return json.loads((output / "result.json").read_text()), load_checkpoint(output / "checkpoint.pth")

    def logs(self):
        return "".join(f"\n== {path.name}\n{path.read_text()[-5000:]}" for path in self.folder.glob("*.log"))

    def end(self):
        for program in self.started[::-1]:  # the superlink, which ends its own children, last
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGTERM)
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def programs(tmp_path):
    programs = Programs(tmp_path)
    yield programs
    programs.end()


def assert_same_as_checkpoint(own, state):
    for name in ("weights", "statistics", "momentum"):
        assert torch.equal(getattr(own, name), state[name]), name
    assert all(map(torch.equal, own.gates, state["gates"]))
    assert torch.equal(own.hyper.values, state["hypernetwork"][0])
    assert own.positions == state["positions"]
    assert own.failures == state["failures"]


@pytest.mark.slow
def test_the_simulation_engine_gives_the_same_numbers(programs, tmp_path):
    config = make_config(output_dir=str(tmp_path / "out"), timeout=120.0, evaluate_every=0)
    programs.start_superlink("--simulation")
    resources = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
    result, state = programs.run_app(EXAMPLE, config, "--federation-config", resources)
    own = run_own(config)
    assert_same_as_checkpoint(own, state)
    figures = own.evaluate()
    assert {name: result[name] for name in figures} == figures
    assert result["failures"] == [0, 0, 0]
    assert result["bytes"]["sent"] < result["bytes"]["sent-dense"]
    hits = sum(device["correct"] for device in result["devices"].values())
    assert hits / sum(device["count"] for device in result["devices"].values()) == own.evaluate_devices()[0]


@pytest.mark.slow
def test_supernodes_give_the_same_numbers_and_one_fails(programs, tmp_path):
    app = tmp_path / "app"
    shutil.copytree(EXAMPLE, app, ignore=shutil.ignore_patterns("__pycache__"))
    code = (app / "client_app.py").read_text()
    assert "mods=[pack_mod]" in code
    code = code.replace("mods=[pack_mod]", "mods=[pack_mod, fail]")
    (app / "client_app.py").write_text(
        code.replace(
            "app = ",
            "def fail(message, context, call_next):\n"
            "    if context.node_config.get('fails') and message.metadata.message_type == 'train':\n"
            "        raise RuntimeError('no battery')\n"
            "    return call_next(message, context)\n\n\n"
            "app = ",
        )
    )
    config = make_config(output_dir=str(tmp_path / "out"), timeout=240.0, evaluate_every=0, local_steps=9)
    superlink = programs.start_superlink()
    for k, port in enumerate(free_ports(3)):
        node = f"partition-id={k} export-path='{tmp_path / f'device{k}.pth'}'" + (" fails=true" if k == 1 else "")
        programs.start("flower-supernode", "--superlink", superlink, "--port", str(port), "--node-config", node)
    result, state = programs.run_app(app, config)

    def fault(kind, round, client):
        if client == 1 and kind != "evaluate":
            raise RuntimeError("no battery")

    own = run_own(config, fault)
    assert own.failures[1] > 0
    assert own.failures[0] == own.failures[2] == 0
    assert_same_as_checkpoint(own, state)
    figures = own.evaluate()
    assert {name: result[name] for name in figures} == figures
    for k in (0, 2):  # whose masks have lived in their nodes
        saved = load_checkpoint(result["devices"][str(k)]["path"])
        assert torch.equal(saved["gates"], own.gates[1][k])
        expected = own.device_model(k).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in saved["model"].items())
