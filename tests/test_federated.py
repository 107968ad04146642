"""The rounds of federated training, and the command `sparsebilevel federated`."""

import copy
import csv
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsebilevel.cli import main
from sparsebilevel.costs import count_costs
from sparsebilevel.data import load_data, make_seed
from sparsebilevel.data.partition import matching_partition, partition
from sparsebilevel.export import export_model
from sparsebilevel.federated import GatePoint, Hypernetwork, find_gate_points, load_network, set_norm
from sparsebilevel.federated.aggregate import aggregate_masked
from sparsebilevel.federated.hypernetwork import merge_gates, sample_gates
from sparsebilevel.federated.local import FlatModule, adamw, full_gradient, sgd, train_weights
from sparsebilevel.federated.models import apply_gates, check_gate_points
from sparsebilevel.federated.rounds import Federation, FederationError, make_federation
from sparsebilevel.federated.settings import METHODS, UNSTRUCTURED, Settings
from sparsebilevel.models.resnet import resnet_cifar
from sparsebilevel.nn import densify
from sparsebilevel.report import read_runs
from sparsebilevel.training.checkpoint import load_checkpoint, save_checkpoint

QUICK = {"epochs": 8, "finetune_epochs": 2, "search_epochs": 4, "batch_size": 25, "local_steps": 2}
QUICK |= {"hyper_interval": 2, "hyper_lr": 0.02}


def make_data(clients=4, train=240, seed=0, how="dirichlet", **options):
    """The first digits, shared out."""
    data = load_data("digits", batch_size=25, eval_batch_size=360, seed=seed, **options)
    data = dataclasses.replace(data, train=data.train.subset(torch.arange(0, 1437, 1437 // train)[:train]))
    parts = partition(data.train.labels, clients, how, balance=True, seed=seed)
    return data, parts, matching_partition(data.train.labels, parts, data.test.labels)


def make_run(method="dwnp", clients=4, norm="group", data=None, report=None, budgets=None, **changes):
    torch.manual_seed(changes.get("seed", 0))
    model = set_norm(resnet_cifar(8, in_channels=1, width=8), norm)
    data, parts, tests = data or make_data(clients)
    settings = Settings(method=method, **{**QUICK, **changes})
    report = report or (lambda message: None)
    budgets = budgets or [0.5] * clients
    return make_federation(model, find_gate_points(model), data, parts, tests, budgets, settings, report=report)


def finish(run):
    rows = []
    while not run.is_done:
        rows.append(run.round())
    return rows


def assert_same(a, b):
    """Two states, bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        elif isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            assert all(map(torch.equal, value, b[name])), name
        else:
            assert value == b[name], name


# -- local steps -------------------------------------------------------------------------------------------------------


def test_local_optimizers_are_torchs():
    gradients = torch.randn(5, 40, dtype=torch.float64)
    start = torch.randn(40, dtype=torch.float64)
    for kind in ("sgd", "adamw"):
        p = nn.Parameter(start.clone())
        theirs = (
            torch.optim.SGD([p], 0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW([p], 0.1, weight_decay=0.02)
        )
        ours, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for i, gradient in enumerate(gradients):
            p.grad = gradient.clone()
            theirs.step()
            if kind == "sgd":
                sgd(ours, gradient, mean, 0.1, 0.9)
            else:
                adamw(ours, gradient, mean, square, i + 1, 0.1, 0.02)
        assert_close(ours, p.detach(), rtol=1e-12, atol=1e-12)


def test_a_flat_module_is_the_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    twin, x = copy.deepcopy(model), torch.randn(4, 1, 8, 8)
    flat = FlatModule(model)
    _, gradient = flat.gradient_of(lambda: flat.module(x).square().sum())
    twin(x).square().sum().backward()
    assert torch.equal(gradient, torch.cat([p.grad.reshape(-1) for p in twin.parameters()]))
    assert_close(flat.statistics, torch.cat([twin[1].running_mean, twin[1].running_var]))
    flat.load(torch.zeros_like(flat.values), torch.ones(4))
    assert all(p.abs().max() == 0 for p in model.parameters())
    assert model[1].running_mean.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("method", "options"), [("dwnp", {"hyper_start": 0.0}), ("fedavg", {"average": "mime"}), ("bip", {"sparsity": 0.5})]
)
def test_frozen_parameters_stay(method, options):
    torch.manual_seed(0)
    model = set_norm(resnet_cifar(8, in_channels=1, width=8), "group", standardize=False)
    model.stages[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data, parts, tests = make_data()
    settings = Settings(method=method, **{**QUICK, "weight_decay": 0.1, "epochs": 2, **options})
    points = [] if method == "bip" else find_gate_points(model)
    run = make_federation(model, points, data, parts, tests, [0.5] * 4, settings)
    while run.phases[run.phase].name == run.phases[0].name:
        run.round()
    after = densify(run.model).state_dict() if method == "bip" else run.model.state_dict()
    for name, value in before.items():
        kept = after[name] != 0  # of bip's mask
        assert torch.equal(after[name][kept], value[kept]) == name.startswith("stages.0"), name


class Drops(nn.Module):
    """A network that draws numbers, by a function, and counts its batches."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(F.dropout(self.bn(self.conv(x)).relu().mean((2, 3)), 0.5, self.training))


@pytest.mark.parametrize("average", ["mean", "mime"])
def test_what_networks_draw_is_a_function_of_the_request(average):
    data, parts, tests = make_data()

    def make():
        torch.manual_seed(0)
        settings = Settings(method="fedavg", **{**QUICK, "average": average})
        return make_federation(Drops(), [], data, parts, tests, [0.5] * 4, settings)

    whole, first, second = make(), make(), make()
    for _ in range(4):
        whole.round()
    for _ in range(2):
        first.round()
    torch.manual_seed(5)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.round()
    assert torch.equal(whole.weights, second.weights)
    assert torch.equal(whole.statistics, second.statistics)


def test_mimes_two_gradients_drop_the_same():
    flat, x, y = FlatModule(Drops().eval()), torch.randn(8, 1, 8, 8), torch.arange(8)
    flat.module.train()
    flat.module.bn.eval()
    start = flat.values.clone()
    correction, zero = torch.randn_like(start), torch.zeros_like(start)
    train_weights(flat, [(x, y)], start, zero, 0.1, 0.9, 0.0, "mime", correction)
    assert_close(flat.values, start - 0.1 * correction)  # at the start both gradients are one


def test_one_client_is_plain_training():
    data, parts, tests = make_data(1, 100, how="iid")
    run = make_run("fedavg", 1, data=(data, parts, tests), local_steps=3, epochs=2, finetune_epochs=0)
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    batches = run.exchange.clients.loaders[0].stream()
    for _ in range(run.phases[0].rounds):
        row = run.round()
        for _ in range(3):
            x, y = next(batches)
            optimizer.param_groups[0]["lr"] = row["lr"]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert run.is_done
    assert_close(run.weights, torch.cat([p.detach().reshape(-1) for p in model.parameters()]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_averages_are_those_of_the_clients(norm):
    run = make_run("fedavg", 3, norm=norm, local_steps=2, data=make_data(3))
    alone = []
    for k in range(3):
        other = make_run("fedavg", 3, norm=norm, local_steps=2, data=make_data(3), min_clients=1)

        def only(kind, round, client, k=k):
            if client != k:
                raise ConnectionError("gone")

        other.exchange.fault = only
        other.round()
        alone.append(other)
    run.round()
    for name in ("weights", "momentum", "statistics"):
        assert_close(getattr(run, name), torch.stack([getattr(o, name) for o in alone]).mean(0), rtol=1e-4, atol=1e-5)
    weighted = make_run("fedavg", 3, norm=norm, local_steps=2, data=make_data(3), weighting="samples")
    weighted.round()
    share = torch.tensor(weighted.sizes, dtype=torch.float32).view(-1, 1) / sum(weighted.sizes)
    assert_close(weighted.weights, (torch.stack([o.weights for o in alone]) * share).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", ["mime_lite", "mime"])
def test_mime_is_the_mean_when_all_clients_take_one_full_step(average):
    """Then the gradient at the server's point is the local one, and the corrections cancel."""
    options = {"batch_size": 240, "local_steps": 1, "epochs": 20, "finetune_epochs": 0, "lr": 0.01}
    runs = [make_run("fedavg", 3, data=make_data(3), average=how, **options) for how in ("mean", average)]
    for run in runs:
        for _ in range(4):
            run.round()
        run.flat.load(run.weights)
    assert (runs[0].momentum.abs() > 0).any()
    for name in ("weights", "momentum"):
        assert_close(getattr(runs[1], name), getattr(runs[0], name), rtol=1e-3, atol=1e-4)
    several = make_run("fedavg", 3, data=make_data(3), average=average, **{**options, "local_steps": 3})
    plain = make_run("fedavg", 3, data=make_data(3), **{**options, "local_steps": 3})
    several.round()
    plain.round()
    assert (several.weights - plain.weights).abs().max() > 1e-3


def test_mime_corrects_the_drift_of_clients():
    """Local full-batch steps with correction start along the mean gradient on every client."""
    run = make_run("fedavg", 2, data=make_data(2, how="label"), average="mime", batch_size=240, local_steps=1)
    steps = []
    run._mean, mean = lambda results, name, old: steps.append((name, results)) or mean(results, name, old), run._mean
    start = run.weights.clone()
    run.round()
    updates = [r["weights"] - start for name, results in steps if name == "weights" for r in results.values()]
    assert len(updates) == 2
    assert_close(updates[0], updates[1], rtol=1e-3, atol=1e-5)


def test_mime_takes_the_statistics_of_its_steps_alone():
    """The pass at the server's weights, for the correction, leaves those of BatchNorm as they are."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    plain, mime = FlatModule(copy.deepcopy(model)), FlatModule(copy.deepcopy(model))
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    start, zeros = plain.values.clone(), torch.zeros_like(plain.values)
    correction = full_gradient(FlatModule(model), [(x, y)], 0.0)
    train_weights(plain, [(x, y)], start, zeros, 0.1, 0.0, 0.0)
    train_weights(mime, [(x, y)], start, zeros, 0.1, 0.0, 0.0, "mime", correction)
    assert_close(mime.values, plain.values)
    assert torch.equal(mime.statistics, plain.statistics)
    assert mime.module[1].num_batches_tracked == 1


def test_a_device_without_weight_is_not_looked_at():
    updates = [{"w": torch.tensor([float("nan"), 1.0])}, {"w": torch.tensor([3.0, 5.0])}]
    result = aggregate_masked(updates, [{}, {}], [0, 2], {"w": torch.zeros(2)})
    assert result["w"].tolist() == [3, 5]


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_weights_and_hypernetwork_are_trained_in_turns():
    run = make_run(epochs=12, local_steps=3, hyper_interval=2, hyper_steps=2, hyper_start=0.25)
    seen = []

    def watch(kind, round, client):
        if client == 0:
            seen.append((kind, round, run.weights.clone(), run.hyper.values.clone()))

    run.exchange.fault = watch
    phase = run.phases[0]
    for _ in range(phase.rounds):
        run.round()
    start = 0.25 * 12 * run.steps_per_epoch
    hyper = [round for kind, round, *_ in seen if kind == "hypernetwork"]
    expected = int((phase.rounds * 3 - start) // 4)
    assert len(hyper) == run.hyper_rounds == expected > 0
    assert (hyper[0] + 1) * 3 >= start + 4 > hyper[0] * 3
    for (kind, _, w, h), (_, _, w_next, h_next) in zip(seen, seen[1:], strict=False):
        assert torch.equal(w, w_next) == (kind == "hypernetwork")
        assert torch.equal(h, h_next) == (kind == "weights")
    assert run.hyper_step == 2 * run.hyper_rounds


@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNSTRUCTURED])
def test_every_method_keeps_to_its_budget(method):
    run = make_run(method, budgets=[0.5, 0.6, 0.45, 0.5])
    dense = sum(p.numel() for p in run.model.parameters())
    rows = finish(run)
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    figures = run.evaluate()
    assert len(figures["device_acc"]) == 4
    size = sum(p.numel() for p in run.model.parameters())
    if method == "fedavg":
        assert size == dense
        assert figures["server_ratio"] == 1
        assert run.gates is None
        return
    server, devices = run.gates
    assert not (devices & ~server).any()
    assert size < dense
    assert figures["server_ratio"] <= (0.8 if method == "dwnp" else 0.45)
    if method == "dwnp":
        for ratio, budget in zip(figures["device_ratio"], run.budgets, strict=True):
            assert ratio <= budget
        assert len({tuple(row.tolist()) for row in devices}) > 1
    else:
        assert torch.equal(devices, server.expand(4, -1))
    if method in ("filter", "random", "energy"):
        assert figures["server_ratio"] > 0.35
    assert figures["server_flops"] < figures["dense_flops"]
    assert figures["union_kept"] <= figures["server_kept"]


def test_training_learns():
    run = make_run("fedavg", data=make_data(4, 1000), epochs=4, finetune_epochs=0)
    before = run.evaluate()["pooled_acc"]
    finish(run)
    assert before < 0.3 < 0.8 < run.evaluate()["pooled_acc"]


def test_the_penalty_closes_gates():
    run = make_run("fedosp", epochs=1, search_epochs=40, hyper_lr=0.02, finetune_epochs=0)
    finish(run)
    assert run.hyper_rounds > 10
    logits = run.hyper.module.logits()[0]
    assert run.costs.ratio(logits > 0) < 0.6  # by itself, before the export closes what is left


def test_filters_with_small_weights_go_first():
    run = make_run("filter", epochs=1)
    with torch.no_grad():
        run.model.stages[0][0].conv1.weight[3] *= 1e-3
    run.weights = run.flat.values.clone()
    scores = run._ranks()
    assert scores[:8].argmin() == 3
    server, _ = run.export_gates()
    kept = run.costs.kept(server)
    shares = [k / size for k, size in zip(kept, run.costs.sizes, strict=True)]
    assert max(shares) - min(shares) <= 1 / 8 + 1e-9  # the same part of each


def test_energy_is_the_sum_of_squared_activations():
    run = make_run("energy", norm="batch", epochs=1)
    clients = run.exchange.clients
    model = copy.deepcopy(run.model).eval()
    expected = torch.zeros(3, dtype=torch.float64)
    for loader in clients.loaders:
        x = torch.cat([x for x, _ in loader.source.batches(loader.indices.split(10), None)])
        with torch.no_grad():
            block = model.stages[1][0]
            hidden = F.relu(block.bn1(block.conv1(model.stages[0](F.relu(model.bn1(model.conv1(x)))))))
            expected += hidden.double().square().sum((2, 3)).mean(0)[:3]
    energies = run._energies()
    assert_close(energies[8:11], expected, rtol=1e-5, atol=1e-8)
    assert run.received == {"energy": 4 * 8 * len(energies)}
    server, _ = run.export_gates()
    assert energies[~server].max() <= energies[server].max()
    kept = run.costs.kept(server)
    assert len({k / size for k, size in zip(kept, run.costs.sizes, strict=True)}) > 1  # one ranking over all layers


def test_energies_are_of_all_clients_where_rounds_have_a_sample():
    whole, sampled = make_run("energy", epochs=1), make_run("energy", epochs=1, sample=1)
    assert torch.equal(sampled._energies(), whole._energies())


def test_methods_with_the_same_training_share_it():
    first, alone = make_run("fedavg"), make_run("fedosp")
    while first.phase == 0:
        first.round()
    state = copy.deepcopy(first.state_dict())
    run = make_run("fedosp")
    run.adopt_training(state)
    finish(run)
    finish(alone)
    assert_same(run.state_dict(), alone.state_dict())
    with pytest.raises(ValueError, match="this method has none"):
        make_run("dwnp").adopt_training(state)
    with pytest.raises(ValueError, match="not one after"):
        make_run("filter").adopt_training(make_run("fedavg").state_dict())


@pytest.mark.parametrize("method", ["dwnp", "fedavg"])
def test_hypernetworks_are_for_methods_that_need_one(method):
    run = make_run(method)
    hypernetwork = None if method == "dwnp" else Hypernetwork(run.costs.sizes, 4)
    with pytest.raises(ValueError, match=f"method {method} (needs|has no use for) a hypernetwork"):
        Federation(run.model, run.points, (1, 8, 8), run.sizes, run.budgets, run.settings, run.exchange, hypernetwork)


@pytest.mark.parametrize("separate", [False, True])
def test_own_rows_are_not_divided_by_the_number_of_clients(separate):
    moved = {}
    for embedding in ("mean", "own"):
        run = make_run(embedding=embedding, hyper_weight_decay=0.0, separate=separate)
        network: Hypernetwork = run.hyper.module
        before = network.embedding.weight.detach().clone()
        run._hyper_round()
        moved[embedding] = network.embedding.weight.detach() - before
    first = 0 if separate else 1  # the server's row comes before them
    assert_close(moved["own"][first:], 4 * moved["mean"][first:], rtol=1e-2, atol=1e-5)
    assert_close(moved["own"][:first], moved["mean"][:first])


def test_sampled_clients_only():
    run = make_run("fedavg", sample=2, local_steps=2)
    taken = []
    run.exchange.fault = lambda kind, round, client: taken.append((round, client))
    for _ in range(4):
        run.round()
    rounds = [{client for round, client in taken if round == i} for i in range(4)]
    assert {len(clients) for clients in rounds} == {2}
    assert len(set().union(*rounds)) > 2
    assert sum(run.positions["weights"]) == 4 * 2 * 2


def test_bytes_are_counted():
    run = make_run("fedavg", finetune_epochs=0)
    run.round()
    size = 4 * run.weights.numel()
    assert run.sent == {"weights": 4 * 2 * size}  # weights and momentum to each client
    assert run.received == {"weights": 4 * 2 * size}
    run = make_run()
    run._hyper_round()
    hyper = 4 * run.hyper.values.numel()
    assert run.sent == {"hypernetwork": 4 * (3 * hyper + size)}
    assert run.received == {"hypernetwork": 4 * 3 * hyper}
    gates = run.client_gates()
    run.round()
    assert run.sent["weights"] == 4 * (2 * size + -(-len(gates[0]) // 8))


def test_devices_train_their_sliced_networks():
    masked, run = (make_run(device_networks=how, norm="batch", finetune_epochs=4) for how in ("masked", "sliced"))
    for federation in (masked, run):
        while federation.phases[federation.phase].name != "finetune":
            federation.round()
    # With batch normalization both are the same function.
    assert run.evaluate() == masked.evaluate()
    server, devices = run.gates
    shared, nobody = devices[:, server].all(0), ~devices[:, server].any(0)
    assert shared.any()
    assert nobody.any()
    before, sent = run.weights.clone(), run.received["weights"]
    filters = run.costs.kept(server)[0]
    run.round()
    masked.round()
    sizes = [sum(p.numel() for p in run.device_model(k).parameters()) for k in range(4)]
    statistics = [sum(b.numel() for b in run.device_model(k).buffers() if b.dim()) for k in range(4)]
    assert run.received["weights"] - sent == 4 * (2 * sum(sizes) + sum(statistics))
    first = run.flat.spans["stages.0.0.conv1.weight"]
    changed = (run.weights != before)[first].view(filters, -1).any(1)
    assert changed.tolist() == (~nobody[:filters]).tolist()
    for k in range(4):
        span = run.device_model(k).stages[0][0].conv1.weight
        own = devices[k, server][:filters]
        assert torch.equal(span, run.model.stages[0][0].conv1.weight[own])
    # A filter that all devices have is averaged alike.
    together = shared[:filters]
    ours, theirs = (f.weights[first].view(filters, -1)[together] for f in (run, masked))
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dwnp", "filter", "fedavg", "bidst"])
def test_devices_train_by_themselves_in_the_end(method):
    norm = "batch" if method == "bidst" else "group"
    torch.manual_seed(0)
    model = set_norm(resnet_cifar(8, in_channels=1, width=8), norm, standardize=method != "bidst")
    points = find_gate_points(model) if method in ("dwnp", "filter") else []
    settings = Settings(method=method, **{**QUICK, "epochs": 4}, personalize_epochs=2, finetune_lr=0.05)
    run = make_federation(model, points, *make_data(), [0.5] * 4, settings)
    finish(run)
    state = copy.deepcopy(run.state_dict())
    accuracy, by_device = run.evaluate_devices(personalize=True)
    assert_same(run.state_dict(), state)  # nobody gets what a device has learned

    clients, steps = run.exchange.clients, round(2 * run.steps_per_epoch)
    correct = []
    for k in range(4):
        model = run.device_model(k).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batches = clients.loaders[k].stream(run.positions["weights"][k])
        for _ in range(steps):
            x, y = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        correct.append(sum(int((model(x).argmax(1) == y).sum()) for x, y in clients.tests[k]))
    counts = [len(test.indices) for test in clients.tests]
    assert accuracy == pytest.approx(sum(correct) / sum(counts), abs=2.5 / sum(counts))
    for found, hits, count in zip(by_device, correct, counts, strict=True):
        assert found == pytest.approx(hits / count, abs=2.5 / count)
    assert accuracy != run.evaluate_devices()[0]


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({}, 0.01, r"device_flops\[2\]=0.01 cannot be met; expected at least 0.0"),
        ({}, 1.5, r"device_flops\[2\]=1.5 is not allowed; expected a number in \(0, 1\]"),
        ({}, "0.5", r"device_flops\[2\]='0.5' is not allowed"),
        ({"server_flops": 0.02}, 0.5, r"server_flops=0.02 cannot be met; expected at least 0.0"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_at_once(changes, budget, message):
    with pytest.raises(ValueError, match=message):
        make_run(budgets=[0.5, 0.5, budget, 0.5], **changes)


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channelwise": ()}, r"points\[1\] \('stages.1.0': .*does not run without one of its channels"),
        ({"consumer": "stages.0.0.conv2"}, r"points\[.\] .*does not run without one of its channels"),
        ({"producer": "conv1", "channelwise": ("bn1",)}, "does not run without one of its channels"),
    ],
)
def test_wrong_gate_points_are_refused_at_once(change, message, norm):
    model = set_norm(resnet_cifar(8, in_channels=1, width=8), norm)
    points = find_gate_points(model)
    check_gate_points(model, points, (1, 8, 8))
    points[1] = dataclasses.replace(points[1], **change)
    with pytest.raises(ValueError, match=message):
        check_gate_points(model, points, (1, 8, 8))


def test_a_gate_point_that_changes_the_function_is_refused():
    """A convolution that reads its channels both by itself and past the gate."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(x) + x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match=r"points\[0\] \('a': 'first' to 'second'\): .*computes something else"):
        check_gate_points(Twice(), [GatePoint("a", "first", (), "second")], (1, 3, 3))


def test_parts_are_tensors_or_plain_sequences():
    data, parts, tests = make_data(train=80)
    rows = [make_run(data=(data, *ways)).round() for ways in ((parts, tests), ([p.tolist() for p in parts], tests))]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"parts\[1\] is empty"):
        make_run(data=(data, [parts[0], [], *parts[2:]], tests))
    with pytest.raises(ValueError, match="positions are torch.bool: must be whole numbers"):
        make_run(data=(data, [torch.ones(80, dtype=torch.bool), *parts[1:]], tests))


def test_there_is_no_device_network_before_pruning():
    run = make_run()
    with pytest.raises(ValueError, match="not pruned yet: round 0 of phase train"):
        run.device_model(0)
    for client in (4, 1.0, "0"):
        with pytest.raises(
            ValueError, match=rf"client={client!r} is not allowed; expected a whole number, from 0 to 3"
        ):
            run.device_model(client)


def test_clients_that_fail_are_left_out_and_counted():
    messages = []
    run = make_run(report=messages.append)
    clean = make_run()

    def fault(kind, round, client):
        if client == 2 and round in (0, 2):
            raise TimeoutError("no answer")

    run.exchange.fault = fault
    for _ in range(3):
        run.round()
        clean.round()
    assert run.failures == [0, 0, 2, 0]
    assert messages == [f"round {i} (weights): client 2 is left out: no answer" for i in (1, 3)]
    assert run.positions["weights"] == [6, 6, 2, 6]
    assert not torch.equal(run.weights, clean.weights)


def test_values_that_are_not_finite_are_left_out():
    messages = []
    run = make_run("fedavg", report=messages.append)
    loader = run.exchange.clients.loaders[1]

    class Broken:
        labels = loader.source.labels

        def batches(self, *args):
            for x, y in loader.source.batches(*args):
                yield x * torch.nan, y

    run.exchange.clients.loaders[1] = dataclasses.replace(loader, source=Broken())
    run.round()
    assert run.weights.isfinite().all()
    assert run.failures == [0, 1, 0, 0]
    assert messages == ["round 1 (weights): client 1 is left out: not finite: weights, momentum"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda reply: reply | {"weights": torch.full((1,), 1e3)},
            "weights is not of the shape and dtype of the request",
        ),
        (lambda reply: reply | {"statistics": torch.ones(1)}, "statistics is not of the shape"),
        (lambda reply: reply | {"momentum": reply["momentum"][:-1]}, "momentum is not of the shape"),
        (lambda reply: reply | {"weights": reply["weights"].double()}, "weights is not of the shape and dtype"),
        (lambda reply: {n: v for n, v in reply.items() if n != "momentum"}, "the reply has no momentum"),
        (lambda reply: reply | {"loss": "low"}, "loss is not a number"),
        (lambda reply: None, "the reply is a NoneType"),
    ],
)
def test_replies_that_do_not_fit_are_left_out(change, message):
    messages = []
    run, clean = make_run("fedavg", norm="batch", report=messages.append), make_run("fedavg", norm="batch")
    inner, other = run.exchange, clean.exchange
    run.exchange = lambda requests: {k: change(r) if k == 1 else r for k, r in inner(requests).items()}
    clean.exchange = lambda requests: {k: "no answer" if k == 1 else r for k, r in other(requests).items()}
    run.round()
    clean.round()
    assert run.failures == [0, 1, 0, 0]
    assert message in messages[0]
    assert torch.equal(run.weights, clean.weights)
    assert torch.equal(run.statistics, clean.statistics)


def test_what_is_written_to_the_servers_vectors_holds():
    run = make_run("fedavg")
    run.round()
    before = run.evaluate()["server_acc"]
    run.weights.zero_()
    assert run.evaluate()["server_acc"] != before


def test_a_round_with_too_few_clients_is_repeated():
    run = make_run("fedavg", sample=2, min_clients=2)
    calls = []

    def fault(kind, round, client):
        calls.append(client)
        if len(calls) <= 2:
            raise RuntimeError("busy")

    run.exchange.fault = fault
    run.round()
    assert len(calls) == 4
    assert run.done == 1
    assert sum(run.failures) == 2

    def always(kind, round, client):
        raise RuntimeError("busy")

    run.exchange.fault = always
    state = copy.deepcopy(run.state_dict())
    with pytest.raises(FederationError, match="0 of 2 clients .* at least 2 are needed, in 4 attempts.*: busy"):
        run.round()
    after = run.state_dict()
    del state["failures"], after["failures"]
    assert_same(after, state)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dwnp", {"device_networks": "sliced"}),
        (
            "dwnp",
            {"sample": 2, "embedding": "own", "separate": True, "noise": "gumbel", "soft": True, "two_sided": True},
        ),
        ("fedosp", {"average": "mime", "norm": "batch"}),
        ("filter", {"average": "mime_lite"}),
    ],
)
def test_a_run_goes_on_from_any_round(method, options, tmp_path):
    run = make_run(method, **options)
    states = [copy.deepcopy(run.state_dict())]
    while not run.is_done:
        run.round()
        states.append(copy.deepcopy(run.state_dict()))
    result = run.evaluate()
    for start in sorted({0, 1, len(states) // 2, run.phases[0].rounds, len(states) - 2}):
        save_checkpoint(tmp_path / "checkpoint.pth", states[start])
        torch.rand(3)  # other random numbers on the way change nothing
        again = make_run(method, **options)
        again.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pth"))
        finish(again)
        assert_same(again.state_dict(), states[-1])
        assert again.evaluate() == result


def test_other_settings_are_refused():
    state = make_run().state_dict()
    with pytest.raises(ValueError, match="other lr"):
        make_run(lr=0.2).load_state_dict(state)
    with pytest.raises(ValueError, match="other budgets"):
        make_run(budgets=[0.5, 0.5, 0.5, 0.6]).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "fedprox"}, "method='fedprox'"),
        ({"average": "sum"}, "average='sum'"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"hyper_start": 1.0}, "hyper_start=1.0"),
        ({"server_flops": 0.0}, "server_flops=0.0"),
        ({"sample": 5}, "sample=5 is not allowed; expected 1 to 4, the clients"),
        ({"sample": 1.5}, "sample=1.5 is not allowed; expected a whole number"),
        ({"sample": 2, "min_clients": 3}, "min_clients=3 is not allowed; expected 1 to 2, the clients of a round"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("inf")}, "temperature=inf is not allowed; expected a finite number above 0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"epochs": "2"}, "epochs='2'"),
        ({"batch_size": 2.5}, "batch_size=2.5 is not allowed; expected a whole number, at least 1"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Settings(**options).validate(4)


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = ["federated", "--clients", "3", "--arch", "resnet20", "--limit", "150", "--batch-size", "25", "--epochs", "4"]
COMMAND += ["--finetune-epochs", "2", "--search-epochs", "2", "--hyper-interval", "1", "--local-steps", "2", "--quiet"]
COMMAND += ["--personalize-epochs", "1"]


def read_rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time_")} for row in rows]


def test_the_command_compares_methods(tmp_path, capsys):
    main([*[c for c in COMMAND if c != "--quiet"], "--baselines", "filter", "fedavg", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "slicing changes what stages.0.0.bn1 computes: its statistics are over channels" in out
    table = out[out.index("method ") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["dwnp", "filter", "fedavg"]
    result = read_rows(tmp_path / "dwnp")[-1]
    assert result["type"] == "result"
    assert 0 <= result["acc_after_pruning"] <= 1
    cells = table[2].split()
    for name in ("personalized_acc", "sliced_acc"):
        assert f"{100 * result[name]:.2f}" in cells
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dwnp", "filter", "fedavg"]
    assert float(rows[0]["FLOPs devices"]) == round(sum(result["device_flops"]) / 3)
    assert rows[2]["sliced %"] == ""
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["settings"]["lr"] == Settings.lr
    assert facts["device_budgets"] == [0.5] * 3
    assert sum(facts["training_samples"]) == 150
    assert max(result["device_ratio"]) <= 0.5
    assert result["server_ratio"] <= 0.8
    assert result["params"]["device"] < result["params"]["server"] < result["params"]["dense"]
    assert set(result["time_forward_ms"]) == {"dense", "server", "device"}
    assert {"weights", "hypernetwork"} == set(result["bytes_down"])
    state = load_checkpoint(tmp_path / "dwnp" / "model.pth")
    assert state["device_gates"].shape == (3, 9 * (16 + 32 + 64) // 3)
    assert (tmp_path / "channels.png").stat().st_size > 1000
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_command_says_that_no_device_gets_more_than_the_server(tmp_path, capsys):
    flags = ["--server-flops", "0.4", "--max-rounds", "1", "--output-dir", str(tmp_path)]
    main([*[c for c in COMMAND if c != "--quiet"], *flags])
    assert "device_flops up to 0.5 are above server_flops=0.4: no device gets more" in capsys.readouterr().out


def test_fewer_samples_than_a_batch_are_one_batch(tmp_path):
    flags = ["--method", "fedavg", "--limit", "5", "--epochs", "1", "--finetune-epochs", "0"]
    main([*COMMAND, *flags, "--arch", "resnet8", "--output-dir", str(tmp_path)])
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert sum(facts["training_samples"]) == 5
    assert facts["settings"]["batch_size"] == 25
    rows = read_rows(tmp_path / "fedavg")
    assert rows[-1]["type"] == "result"
    assert rows[-1]["rounds"] == {"train": 1}


@pytest.mark.parametrize("method", ["dwnp", "fedavg", "bidst"])
def test_networks_of_a_run_are_loaded(method, tmp_path):
    flags = ["--output-dir", str(tmp_path), "--method", method, "--epochs", "2"]
    main([*COMMAND, *flags])
    result = read_rows(tmp_path / method)[-1]
    data = load_data("digits", batch_size=25, eval_batch_size=400)
    data = dataclasses.replace(data, train=data.train.subset(torch.arange(150) * 1437 // 150))
    parts = partition(data.train.labels, 3, "dirichlet", balance=True)
    tests = matching_partition(data.train.labels, parts, data.test.labels)
    x, y = next(iter(data.test))
    with torch.no_grad():
        for k, part in enumerate(tests):
            model = load_network(tmp_path / method, client=k)
            accuracy = (model(x[part]).argmax(1) == y[part]).double().mean()
            expected = result.get("sliced_device_acc", result["device_acc"])[k]
            assert float(accuracy) == pytest.approx(expected, abs=1.5 / len(part))
    server = load_network(tmp_path / method / "model.pth")
    assert count_costs(server, (1, 8, 8)).params_nonzero == result["params"]["server"]
    with pytest.raises(ValueError, match=r"client=3 is not allowed; expected a whole number, from 0 to 2"):
        load_network(tmp_path / method, client=3)
    main(["export", str(tmp_path / method), "-o", str(tmp_path / "small.pth"), "--client", "2"])
    expected, found = densify(model).state_dict(), torch.load(tmp_path / "small.pth", weights_only=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_cannot_be_exported_of_a_run_is_said(tmp_path):
    main([*COMMAND, "--output-dir", str(tmp_path), "--method", "dwnp", "--epochs", "1", "--max-rounds", "20"])
    output = tmp_path / "out.pth"
    with pytest.raises(ValueError, match=r"dwnp is of a federated run, which has its own table \(results.csv\)"):
        read_runs(tmp_path / "dwnp")
    with pytest.raises(ValueError, match=r"is a folder of run folders; name one of them: dwnp"):
        export_model(tmp_path, output)
    with pytest.raises(ValueError, match="format='sliced' is not allowed for a federated run"):
        export_model(tmp_path / "dwnp", output, "sliced")
    with pytest.raises(ValueError, match=r"client=9 is not allowed; expected a whole number, from 0 to 2"):
        export_model(tmp_path / "dwnp", output, client=9)
    saved = torch.load(tmp_path / "dwnp" / "model.pth", weights_only=True)
    del saved["input_shape"]  # as older versions wrote it
    torch.save(saved, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="input_shape=None is not allowed for this run"):
        export_model(tmp_path / "old.pth", tmp_path / "out.onnx", "onnx")
    assert not output.exists()
    export_model(tmp_path / "old.pth", output)
    for change in ({"num_classes": 7}, {"device_gates": None}):
        torch.save(saved | change, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"odd.pth is of another architecture: .* of another shape: "):
            export_model(tmp_path / "odd.pth", output, client=0)


def test_the_command_goes_on_from_its_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*COMMAND, "--output-dir", str(whole)])
    for stop in ("3", "5", "1000"):
        main([*COMMAND, "--output-dir", str(parts), "--checkpoint-freq", "2", "--max-rounds", stop, "--resume"])
    rows = [without_times(read_rows(folder / "dwnp")) for folder in (whole, parts)]
    assert rows[0] == rows[1]
    for name in ("model", "device_gates"):
        states = [load_checkpoint(folder / "dwnp" / "model.pth")[name] for folder in (whole, parts)]
        assert_same(*(state if name == "model" else {name: state} for state in states))


def test_torchrun_gives_the_numbers_of_one_process(torchrun, tmp_path):
    main([*COMMAND, "--output-dir", str(tmp_path / "one")])
    torchrun([*COMMAND, "--output-dir", str(tmp_path / "many")])
    rows = [without_times(read_rows(tmp_path / name / "dwnp")) for name in ("one", "many")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "device='tpu'"),
        (["--arch", "digits_cnn"], "has no residual blocks"),
        (["--device-flops", "2"], "device_flops='2'"),
        (["--device-flops", "uniform:0:inf"], "device_flops='uniform:0:inf'"),
        (["--device-flops", "0.001"], "device_flops[0]=0.001 cannot be met"),
        (["--baselines", "fedprox"], "method='fedprox'"),
        (["--clients", "0", "--device-flops", "uniform:0.3:0.5"], "clients=0"),
        (["--sample", "9"], "sample=9"),
        (["--limit", "0"], "limit=0"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--max-rounds", "-1"], "max_rounds=-1 is not allowed; expected at least 1"),
        (["--checkpoint-freq", "-2"], "checkpoint_freq=-2 is not allowed; expected at least 0"),
        (["--alpha", "inf"], "alpha=inf is not allowed; expected a finite number above 0"),
        (["--data", "cifar10", "--data-path", "/nowhere"], "does not exist"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--output-dir", str(tmp_path / "run"), *flags])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_replaces_another_does_not_go_on_from_it(tmp_path):
    flags = [*COMMAND, "--method", "random", "--baselines", "fedavg", "--epochs", "2", "--finetune-epochs", "1"]
    run, new = (["--output-dir", str(tmp_path / name)] for name in ("run", "new"))
    main([*flags, *run, "--alpha", "0.5"])
    main([*flags, *run, "--alpha", "100", "--overwrite", "--max-rounds", "1"])
    main([*flags, *run, "--alpha", "100", "--resume"])
    main([*flags, *new, "--alpha", "100"])
    for name in ("random", "fedavg"):
        rows = [without_times(read_rows(tmp_path / folder / name)) for folder in ("run", "new")]
        assert rows[0] == rows[1]


def test_a_run_goes_on_after_a_crash_at_any_place(tmp_path):
    flags = [*COMMAND, "--method", "fedavg", "--epochs", "2", "--finetune-epochs", "1", "--checkpoint-freq", "1"]
    flags += ["--output-dir", str(tmp_path)]
    main([*flags, "--max-rounds", "2"])
    folder = tmp_path / "fedavg"
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"type": "round", "rou')
    main([*flags, "--resume"])
    rows = read_rows(folder)
    assert [row["type"] for row in rows].count("result") == 1
    (folder / "model.pth").unlink()  # between the result and the network
    main([*flags, "--resume"])
    assert (folder / "model.pth").exists()
    assert without_times(read_rows(folder)) == without_times(rows)


def test_a_folder_is_not_overwritten(tmp_path, capsys, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit):
        main([*COMMAND, "--output-dir", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*COMMAND, "--output-dir", str(tmp_path / "notes" / "run")])
    assert "notes/run' is not writable: Not a directory" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(SystemExit):
        main([*COMMAND, "--output-dir", "", "--overwrite"])
    assert "output_dir='' is not allowed" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text() == "mine"


def test_resume_says_that_its_log_was_lost(tmp_path, capsys):
    flags = [*(flag for flag in COMMAND if flag != "--quiet"), "--output-dir", str(tmp_path), "--checkpoint-freq", "1"]
    main([*flags, "--max-rounds", "2"])
    (log,) = tmp_path.glob("*/log.jsonl")
    log.write_text(log.read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    main([*flags, "--max-rounds", "3", "--resume"])
    assert f"{log} lacks 1 of the 2 rounds done" in capsys.readouterr().out
    assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == [1, 3]


def test_a_damaged_config_is_named(tmp_path, capsys):
    for content, reason in (("", "is not JSON"), ("[]", "holds a list; expected an object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit):
            main([*COMMAND, "--output-dir", str(tmp_path), "--resume"])
        assert f"config.json {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options"),
    [("dwnp", {}), ("dwnp", {"detach_server": False}), ("fedosp", {}), ("dwnp", {"noise": "gumbel", "soft": True})],
)
def test_a_device_trains_the_hypernetwork_by_adamw_on_its_own_loss(method, options):
    """Two rounds of one of three clients, step by step: batches, noise, penalties, decay and what is reported."""
    options |= {"hyper_steps": 2, "hyper_weight_decay": 0.1, "strength": 3.0, "hyper_part": 1.0, "server_flops": 0.5}
    run = make_run(method, 3, budgets=[0.4, 0.3, 0.5], **options)
    s, clients, personal = run.settings, run.exchange.clients, method == "dwnp"
    network, model = copy.deepcopy(run.hyper.module), copy.deepcopy(run.model).eval()
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, weight_decay=0.1)
    stream, state = clients.hyper_loaders[1].stream(), torch.zeros(3, run.hyper.values.numel())
    state[0] = run.hyper.values
    for turn in range(2):
        request = run._request("hypernetwork", 1, None) | {"hypernetwork": state, "lr": 0.01, "turn": turn}
        reply = clients(1, request | {"position": 2 * turn, "step": 2 * turn})
        state, sums = (
            reply["hypernetwork"],
            dict.fromkeys(("loss", "accuracy", "server_penalty", "device_penalty"), 0.0),
        )
        for i in range(2):
            x, y = next(stream)
            logits = network(torch.tensor([0, 2] if personal else [0]))
            noise = torch.Generator().manual_seed(make_seed(s.seed, 3, turn, 1, i))
            hard = sample_gates(logits, s.temperature, s.noise, True, noise)
            used = sample_gates(logits, s.temperature, s.noise, False, noise) if s.soft else hard
            with apply_gates(model, run.points, merge_gates(*used) if personal else used[0]):
                output = model(x)
            loss = F.cross_entropy(output, y)
            penalties = [(run.costs.ratio(hard[0]) / (0.5 if personal else 0.3)).log().clamp(min=0)]
            if personal:
                outer = hard[0].detach() if s.detach_server else hard[0]
                penalties.append((run.costs.ratio(merge_gates(outer, hard[1])) / 0.3).log().clamp(min=0))
            optimizer.zero_grad()
            (loss + 3.0 * sum(penalties)).float().backward()
            optimizer.step()
            sums["loss"] += loss.item()
            sums["accuracy"] += (output.argmax(1) == y).float().mean().item()
            for name, penalty in zip(("server_penalty", "device_penalty"), penalties, strict=False):
                sums[name] += penalty.item()
        assert sums["server_penalty"] > 0
        assert_close(state[0], torch.cat([p.detach().reshape(-1) for p in network.parameters()]), rtol=1e-3, atol=1e-5)
        for name, value in sums.items():
            assert reply[name] == pytest.approx(value, rel=1e-4), name


def test_the_rate_of_the_hypernetwork_falls_at_half_of_its_phase():
    run = make_run("fedosp", epochs=1, finetune_epochs=0, search_epochs=8)
    rates = [row["hyper_lr"] for row in finish(run) if "hyper_lr" in row]
    half = -(-len(rates) // 2)
    assert rates == pytest.approx([0.02] * half + [0.002] * (len(rates) - half))


def test_kept_channels_are_means_over_the_devices():
    run = make_run()
    gates = torch.rand(4, sum(run.costs.sizes)) < 0.5
    run.client_gates = lambda: gates
    figures = run.evaluate()
    parts = [part.float().sum(1).mean().item() for part in gates.split(run.costs.sizes, 1)]
    assert figures["device_kept"] == pytest.approx(parts)
    assert figures["union_kept"] == [int(part.any(0).sum()) for part in gates.split(run.costs.sizes, 1)]


def test_a_round_is_repeated_with_clients_drawn_anew():
    run, taken = make_run("fedavg", sample=2, retries=5), []

    def busy(kind, round, client):
        taken.append(client)
        raise RuntimeError("busy")

    run.exchange.fault = busy
    with pytest.raises(FederationError, match="in 6 attempts"):
        run.round()
    assert len(set(zip(taken[::2], taken[1::2], strict=True))) > 1


def test_statistics_of_normalization_follow_the_clients():
    run = make_run("fedavg", 3, norm="batch", data=make_data(3))
    exchange, replies, start = run.exchange, {}, run.statistics.clone()
    run.exchange = lambda requests: replies.update(exchange(requests)) or replies
    run.round()
    assert (run.statistics - start).abs().max() > 0.01
    assert_close(run.statistics, torch.stack([reply["statistics"] for reply in replies.values()]).mean(0))


def test_full_gradients_are_those_of_the_devices_own_gates():
    run = make_run("dwnp", average="mime", weight_decay=0.1)
    gates = torch.rand(4, sum(run.costs.sizes)) < 0.7
    clients, model = run.exchange.clients, copy.deepcopy(run.model)
    found = clients(2, run._request("gradient", 2, gates))["gradient"]
    x, y = next(iter(clients.loaders[2].source.batches([clients.loaders[2].indices], None)))
    with apply_gates(model, run.points, gates[2].float()):
        F.cross_entropy(model(x), y).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()]) + 0.1 * run.weights
    assert_close(found, expected, rtol=1e-3, atol=1e-5)
