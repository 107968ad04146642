"""Unstructured masks in federated rounds."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsebilevel import BiDST, BiP, PackError, sparsify
from sparsebilevel.cli import main
from sparsebilevel.data import load_data
from sparsebilevel.data.partition import matching_partition, partition
from sparsebilevel.federated import Settings, make_federation, set_norm
from sparsebilevel.federated.local import FlatModule, full_gradient, train_weights
from sparsebilevel.federated.settings import UNSTRUCTURED
from sparsebilevel.federated.unstructured import (
    MaskedModule,
    Pruner,
    check_prunable,
    decay_closed,
    pack_masked,
    unpack_masked,
)
from sparsebilevel.models import create_model
from sparsebilevel.models.resnet import resnet_cifar
from sparsebilevel.nn import sparse_layers
from sparsebilevel.training.checkpoint import load_checkpoint, save_checkpoint

QUICK = {"epochs": 6, "finetune_epochs": 2, "batch_size": 25, "local_steps": 2, "lr": 0.05, "finetune_lr": 0.05}
QUICK |= {"mask_interval": 2}


def make_data(clients=4, train=240, how="dirichlet"):
    """The first digits, shared out."""
    data = load_data("digits", batch_size=25, eval_batch_size=360)
    data = dataclasses.replace(data, train=data.train.subset(torch.arange(0, 1437, 1437 // train)[:train]))
    parts = partition(data.train.labels, clients, how, balance=True)
    return data, parts, matching_partition(data.train.labels, parts, data.test.labels)


def make_net(norm="group"):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 3, 1, 1), nn.BatchNorm2d(24)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))
    return set_norm(model, norm, standardize=False)


def make_run(method, clients=4, norm="group", data=None, report=lambda message: None, **changes):
    settings = Settings(method, **{**QUICK, **changes})
    budgets = [1.0] * clients
    return make_federation(make_net(norm), [], *(data or make_data(clients)), budgets, settings, report=report)


def assert_same(a, b):
    """Two states, bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        elif name != "history":  # which has times
            assert value == b[name], name


# -- what clients compute ----------------------------------------------------------------------------------------------


def make_batches(count, dtype=torch.float32):
    return [(torch.randn(12, 1, 8, 8, dtype=dtype), torch.randint(10, (12,))) for _ in range(count)]


@pytest.mark.parametrize("part", [1.0, 0.4, 0.0])
def test_collected_gradients_are_those_of_the_effective_weights(part):
    dense = make_net().double()
    flat = MaskedModule(sparsify(copy.deepcopy(dense), 0.5, init="dense"))
    mask = ~flat.prunable | (torch.rand(flat.values.shape) < 0.5)
    where = flat.prunable & (torch.rand(flat.values.shape) < part)
    values = torch.randn_like(flat.values)
    flat.load(values * mask)
    flat.set_mask(mask)
    assert torch.equal(flat.mask, mask)
    flat.collect(where)
    batches = make_batches(3, dtype=torch.float64)
    total = torch.zeros_like(values)
    for x, y in batches:
        gradient = flat.gradient_of(lambda x=x, y=y: F.cross_entropy(flat.module(x), y))[1]
        with torch.no_grad():
            for name, p in dense.named_parameters():
                p.copy_((values * mask)[flat.spans[name]].view(p.shape))
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        truth = torch.cat([p.grad.reshape(-1) for p in dense.parameters()])
        assert_close(gradient, truth * mask)
        total += truth
    assert_close(flat.collected(), total * where)
    flat.collect(None)
    assert flat.collected().abs().max() == 0


def test_closed_weights_stay_zero_in_local_steps():
    flat = MaskedModule(sparsify(make_net(), 0.5, init="random"))
    mask = flat.mask
    start = flat.values * mask
    flat.load(start)
    momentum, _ = train_weights(flat, make_batches(4), start, torch.zeros_like(start), 0.05, 0.9, 1e-3)
    assert (flat.values[~mask] == 0).all()
    assert (momentum[~mask] == 0).all()
    assert (flat.values[mask] != start[mask]).float().mean() > 0.9


def test_messages_are_packed_and_opened():
    mask = torch.rand(1000) < 0.1
    values = torch.randn(1000) * mask
    message = {"kind": "weights", "weights": values, "momentum": 2 * values, "statistics": torch.ones(3), "lr": 0.1}
    packed = pack_masked(message, mask, positions=True)
    assert {name for name, v in packed.items() if isinstance(v, torch.Tensor) and v.dtype == torch.uint8} == {
        "weights",
        "momentum",
    }
    opened, told = unpack_masked(packed)
    assert torch.equal(told, mask)
    assert torch.equal(opened["weights"], values)
    assert torch.equal(opened["momentum"], 2 * values)
    assert opened["lr"] == 0.1
    reply, _ = unpack_masked(pack_masked({"weights": values}, mask), mask)
    assert torch.equal(reply["weights"], values)
    with pytest.raises(PackError, match="mask"):
        unpack_masked(pack_masked({"weights": values}, mask), ~mask)
    everything = torch.ones(1000, dtype=torch.bool)
    assert pack_masked(message, everything, positions=True) is message
    assert unpack_masked(message)[1] is None
    almost = everything.clone()
    almost[3] = False  # sending all would be the shortest, but does not tell the mask
    opened, told = unpack_masked(pack_masked({"weights": message["statistics"].new_ones(1000)}, almost, positions=True))
    assert torch.equal(told, almost)
    assert opened["weights"][3] == 0


# -- one client is the library's method --------------------------------------------------------------------------------


def alone(method, **changes):
    """A federation of one client with one step a round."""
    changes = {"local_steps": 1, "epochs": 6, "finetune_epochs": 1, "weight_decay": 1e-3} | changes
    return make_run(method, 1, data=make_data(1, 125, how="iid"), **changes)


def train_library(model, optimizer, batch, lr):
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def assert_equal_states(run, model, optimizer):
    states = (optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in model.parameters())
    assert_close(run.weights, torch.cat([p.detach().reshape(-1) for p in model.parameters()]), rtol=1e-4, atol=1e-5)
    assert_close(run.momentum, torch.cat([state.reshape(-1) for state in states]), rtol=1e-4, atol=1e-5)
    for (_, a), (_, b) in zip(sparse_layers(model), sparse_layers(run.model), strict=True):
        assert torch.equal(a.mask, b.mask)
        if a.mask_scores is not None:
            assert_close(a.mask_scores, b.mask_scores, rtol=1e-4, atol=1e-6)


def test_one_client_is_bip():
    """Masks, scores, momentum, and weights, closed ones among them."""
    run = alone("bip", mask_start=0.4, mask_interval=1, mask_batches=1)
    model = sparsify(make_net(), 0.9, "global", init="dense")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    clients = run.exchange.clients
    lower, upper = clients.loaders[0].stream(), clients.upper_loaders[0].stream()
    start, bip, masks = int(0.4 * run.phases[0].rounds), None, set()
    for i in range(run.phases[0].rounds):
        if i >= start:
            bip = bip or BiP(model, optimizer)
            x, y = next(upper)
            optimizer.param_groups[0]["lr"] = run._lr(run.phases[0])
            bip.upper_step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        row = run.round()
        train_library(model, optimizer, next(lower), row["lr"])
        if i + 1 < run.phases[0].rounds:  # then zeros are stored
            assert_equal_states(run, model, optimizer)
            masks.add(run.pruner.mask.numpy().tobytes())
            assert i < start or ((run.weights != 0) & ~run.pruner.mask).any()
    assert len(masks) > 5
    bip.finish()
    assert_equal_states(run, model, optimizer)
    assert (run.weights[~run.pruner.mask] == 0).all()


def test_nothing_is_said_of_masks_that_bidst_draws(caplog):
    alone("bidst", mask_interval=4)
    assert not caplog.records


def test_one_client_is_bidst():
    run = alone("bidst", mask_interval=4)
    model = sparsify(make_net(), 0.9, "erk", seed=run.settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    rounds = run.phases[0].rounds
    bidst = BiDST(model, optimizer, update_freq=4, update_end=rounds)
    batches, masks = run.exchange.clients.loaders[0].stream(), set()
    assert_equal_states(run, model, optimizer)
    while not run.is_done:
        row = run.round()
        train_library(model, optimizer, next(batches), row["lr"])
        if row["phase"] != "finetune":
            bidst.step()
        assert_equal_states(run, model, optimizer)
        masks.add(run.pruner.mask.numpy().tobytes())
    assert 5 < len(masks) <= 1 + (rounds - 1) // 4  # a change late in the run may leave all as it is


@pytest.mark.parametrize("average", ["mean", "mime_lite", "mime"])
def test_closed_weights_take_the_steps_of_weights_without_gradient(average):
    """Those of a client that has them, whatever the average; then the server's momentum takes its own, with Mime."""
    model = nn.Linear(3, 2)
    model.unused = nn.Parameter(torch.randn(5))
    flat, mime = FlatModule(model), "" if average == "mean" else average
    start, momentum = flat.values.clone(), torch.randn_like(flat.values)
    batches = [(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(3)]
    correction = full_gradient(flat, batches, 0.2)
    expected, _ = train_weights(flat, batches, start, momentum, 0.1, 0.9, 0.2, mime, correction)
    if mime:
        expected = 0.9 * momentum + correction
    closed = torch.zeros_like(start, dtype=torch.bool)
    closed[flat.spans["unused"]] = True
    weights, state = decay_closed(start, momentum, closed, 3, 0.1, 0.9, 0.2, bool(mime))
    assert_close(weights[closed], flat.values[closed])
    assert_close(state[closed], expected[closed])
    assert torch.equal(weights[~closed], start[~closed])


def test_closed_weights_of_a_federation_follow_its_average():
    run = make_run("bip", average="mime_lite", mask_start=0.0, local_steps=3, weight_decay=0.1)
    run.round()
    closed, old = ~run.pruner.mask, (run.weights, run.momentum)
    lr = run.round()["lr"]
    expected = decay_closed(*old, closed, 3, lr, run.settings.momentum, 0.1, mime=True)
    assert old[1][closed].abs().max() > 0
    assert torch.equal(run.weights[closed], expected[0][closed])
    assert torch.equal(run.momentum[closed], expected[1][closed])


def test_clients_need_no_closed_weights_for_the_scores():
    """What clients who had all weights and scores would do: steps on scores of their own, which are averaged."""
    run = make_run("bip", 3, mask_start=0.0, epochs=1)
    clients, batches = run.exchange.clients, []
    expected = torch.zeros_like(run.weights)
    model = sparsify(make_net(), 0.9, "global", init="dense")
    bip = BiP(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9))
    flat = MaskedModule(model)
    start = torch.cat([layer.mask_scores.reshape(-1) for _, layer in sparse_layers(model)])
    for k in range(3):
        stream = clients.upper_loaders[k].stream()
        batches = [next(stream) for _ in range(run.settings.mask_batches)]
        scores = flat.values.square() / 2
        for x, y in batches:
            flat.collect(flat.prunable)
            flat.gradient_of(lambda x=x, y=y: F.cross_entropy(model(x), y))
            scores -= 0.05 / (1 - 0.9) / len(batches) * flat.values * flat.collected()
        expected += scores / 3
    run._mask_round(run.phases[0])
    ours = torch.cat([layer.mask_scores.reshape(-1) for _, layer in sparse_layers(run.model)])
    assert (ours - start).abs().max() > 1e-5
    assert_close(ours, expected[flat.prunable], rtol=1e-4, atol=1e-7)
    del bip


def test_the_implicit_term_is_of_mean_gradients():
    """Not the mean of the clients' terms, which would add how much they differ."""
    settings = Settings("bip", sparsity=0.5)
    pruner = Pruner(make_net(), settings, 4)
    weights, momentum = pruner.start(pruner.flat.values.clone(), pruner.momentum.clone())
    there = pruner.flat.prunable
    gradients = [torch.randn_like(weights), torch.randn_like(weights)]
    scores = weights.square() / 2
    mean = torch.zeros_like(weights)
    for i, gradient in enumerate(gradients):
        scores -= 0.5 * (weights * gradient - pruner.mask * mean * gradient)
        mean = gradient if i == 0 else mean
        weights, momentum = pruner.learn(weights, momentum, gradient, 0.05)
    ours = torch.cat([layer.mask_scores.reshape(-1) for _, layer in sparse_layers(pruner.flat.module)])
    assert_close(ours, scores[there], rtol=1e-4, atol=1e-5)


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", UNSTRUCTURED)
@pytest.mark.parametrize("sparsity", [0.9, 0.5])
def test_the_mask_has_its_exact_count(method, sparsity):
    run = make_run(method, sparsity=sparsity, average="mime_lite" if sparsity == 0.5 else "mean")
    total = int(run.pruner.flat.prunable.sum())
    kept = round(total * (1 - sparsity))
    if method == "bidst":  # each layer rounds
        kept = sum(layer.num_kept for _, layer in sparse_layers(run.model))
        assert abs(kept - total * (1 - sparsity)) < 10
    counts = []
    while not run.is_done:
        run.round()
        counts.append(int((run.pruner.mask & run.pruner.flat.prunable).sum()))
    assert set(counts) <= {total, kept}
    assert counts[0] == (kept if method == "bidst" else total)
    assert counts[-1] == kept
    assert (run.weights[~run.pruner.mask] == 0).all()
    figures = run.evaluate()
    assert figures["sparsity"] == pytest.approx(1 - kept / total)
    assert figures["params_nonzero"] == int((run.pruner.mask).sum())
    assert figures["server_flops"] < figures["dense_flops"]
    network = run.device_model(0)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in network.parameters()]), run.weights)


def test_all_learn():
    for method in UNSTRUCTURED:
        run = make_run(method, data=make_data(4, 720), epochs=4, finetune_epochs=6, local_steps=3, mask_start=0.25)
        before = run.evaluate()["pooled_acc"]
        while not run.is_done:
            run.round()
        assert before < 0.3 < 0.75 < run.evaluate()["pooled_acc"], method


def test_bytes_are_those_of_the_messages():
    run = make_run("bidst", epochs=4)
    entries, open_entries = run.weights.numel(), int(run.pruner.mask.sum())
    learning = int(run.pruner.learning().sum())
    run.round()
    statistics = 4 * run.statistics.numel()
    up, down = run.received["weights"] / 4, run.sent["weights"] / 4
    values, head = 4 * open_entries, 80  # of each packed vector
    assert up == pytest.approx(2 * values + 4 * learning + statistics + 3 * head, abs=3 * 8)
    positions = down - (2 * values + statistics + 2 * head + entries / 8)  # and the learning positions, a bit each
    assert 0 < positions < entries / 8
    run = make_run("bip", epochs=4, mask_start=0.0, mask_interval=2)
    run.round()
    assert set(run.sent) == set(run.received) == {"scores", "weights"}
    assert run.received["scores"] == pytest.approx(4 * (4 * int(run.pruner.flat.prunable.sum()) + head), abs=4 * 8)
    assert run.sent["scores"] < run.received["scores"] / 6


def test_messages_are_about_eight_times_smaller():
    """At 90 %, of a network large enough for headers not to count, and with the positions in every request."""
    torch.manual_seed(0)
    model = set_norm(create_model("resnet20", 10, 1), standardize=False)
    settings = Settings("bidst", **{**QUICK, "epochs": 1})
    data = make_data(2, 60)
    run = make_federation(model, [], *data, [1.0] * 2, settings)
    assert run.round()["phase"] == "train+mask"
    sent, received = dict(run.sent), dict(run.received)
    assert run.round()["phase"] == "finetune"
    dense = 2 * 2 * 4 * run.weights.numel()  # weights and momentum, two clients
    assert 8 < dense / (run.sent["weights"] - sent["weights"]) < 9.5
    assert 9 < dense / (run.received["weights"] - received["weights"]) < 10


def test_clients_that_fail_are_left_out():
    messages = []
    run = make_run("bip", mask_start=0.0, report=messages.append, min_clients=2)
    clients = run.exchange.clients

    def fault(kind, round, client):
        if client == 2 and kind == "scores":
            raise TimeoutError("no answer")

    def damaged(client, request):
        reply = type(clients)._train(clients, client, request)
        if client == 1:
            reply["weights"][:3] = torch.nan
        return reply

    run.exchange.fault = fault
    clients._train = damaged
    run.round()
    assert run.failures == [0, 1, 1, 0]
    assert messages[0] == "round 1 (scores): client 2 is left out: no answer"
    assert messages[1].startswith("round 1 (weights): client 1 is left out: ")
    assert run.weights.isfinite().all()
    assert run.positions["scores"] == [2, 2, 0, 2]


def test_a_message_of_another_mask_is_refused():
    run = make_run("bidst", min_clients=3)
    exchange = run.exchange

    def tampered(requests):
        replies = exchange(requests)
        other = run.pruner.mask.roll(1)
        replies[3]["weights"] = pack_masked({"weights": torch.ones_like(run.weights)}, other)["weights"]
        return replies

    run.exchange = tampered
    run.round()
    assert run.failures == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("bip", {"mask_start": 0.3, "mask_interval": 1}),
        ("bip", {"sample": 2, "average": "mime", "mask_start": 0.0}),
        ("bidst", {"mask_interval": 2, "norm": "batch"}),
        ("bidst", {"sample": 2, "average": "mime", "weighting": "samples"}),
        ("magnitude", {}),
    ],
)
def test_a_run_goes_on_from_any_round(method, options, tmp_path):
    run = make_run(method, epochs=4, **options)
    states = [copy.deepcopy(run.state_dict())]
    while not run.is_done:
        run.round()
        states.append(copy.deepcopy(run.state_dict()))
    result = run.evaluate()
    for start in sorted({0, 1, len(states) // 3, run.phases[0].rounds, len(states) - 2}):
        save_checkpoint(tmp_path / "checkpoint.pth", states[start])
        again = make_run(method, epochs=4, **options)
        again.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pth"))
        while not again.is_done:
            again.round()
        assert_same(again.state_dict(), states[-1])
        assert again.evaluate() == result


def test_standardized_weights_are_refused():
    model = set_norm(resnet_cifar(8, in_channels=1, width=8))
    with pytest.raises(ValueError, match=r"7 convolutions 'conv1'.* have standardized weights"):
        check_prunable(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"search_space": -0.1}, "search_space=-0.1"),
        ({"mask_start": 1.0}, "mask_start=1.0"),
        ({"mask_interval": 0}, "mask_interval=0"),
        ({"distribution": "global"}, "distribution='global'"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Settings("bip", **options).validate(4)


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = ["federated", "--method", "bidst", "--clients", "3", "--arch", "resnet8", "--limit", "150", "--epochs", "4"]
COMMAND += ["--finetune-epochs", "2", "--local-steps", "2", "--mask-interval", "1", "--quiet", "--lr", "0.05"]


def read_rows(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time_")} for row in rows]


def test_the_command(tmp_path, capsys):
    flags = [c for c in COMMAND if c != "--quiet"]
    main([*flags, "--baselines", "bip", "magnitude", "fedavg", "--output-dir", str(tmp_path)])
    table = capsys.readouterr().out.split("\nmethod ")[1].splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["bidst", "bip", "magnitude", "fedavg"]
    rows = {name: read_rows(tmp_path / name) for name in ("bidst", "bip", "magnitude", "fedavg")}
    results = {name: r[-1] for name, r in rows.items()}
    assert len({sum(r["rounds"].values()) - r["rounds"].get("prune", 0) for r in results.values()}) == 1
    assert results["magnitude"]["acc_before_pruning"] > 0
    assert results["bidst"]["params"]["device"] < results["bidst"]["params"]["dense"] / 8
    up = {name: sum(r["bytes_up"].values()) for name, r in results.items()}
    assert up["bidst"] < up["bip"] < up["magnitude"] + up["bip"]
    assert up["bidst"] < up["fedavg"] / 5
    assert all("direct" in row and "mask_changed" in row for row in rows["bidst"] if row.get("phase") == "train+mask")
    assert any("upper_loss" in row for row in rows["bip"])
    state = load_checkpoint(tmp_path / "bip" / "model.pth")
    model = set_norm(create_model("resnet8", 10, 1), state["norm"], state["standardize"])
    sparsify(model, 0.9).load_state_dict(state["model"])
    kept = sum(int(layer.mask.sum()) for _, layer in sparse_layers(model))
    assert kept == round(0.1 * sum(layer.mask.numel() for _, layer in sparse_layers(model)))
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_command_goes_on_from_its_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*COMMAND, "--output-dir", str(whole)])
    for stop in ("3", "5", "1000"):
        main([*COMMAND, "--output-dir", str(parts), "--checkpoint-freq", "2", "--max-rounds", stop, "--resume"])
    assert read_rows(whole / "bidst") == read_rows(parts / "bidst")


def test_torchrun_gives_the_numbers_of_one_process(torchrun, tmp_path):
    command = [*COMMAND, "--baselines", "bip"]
    main([*command, "--output-dir", str(tmp_path / "one")])
    torchrun([*command, "--output-dir", str(tmp_path / "many")])
    for method in ("bidst", "bip"):
        assert read_rows(tmp_path / "one" / method) == read_rows(tmp_path / "many" / method)


def test_standardized_weights_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([*COMMAND, "--standardize", "--output-dir", str(tmp_path / "run")])
    assert end.value.code == 2
    assert "have standardized weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_upper_loss_is_that_of_all_batches_and_clients():
    run = make_run("bip", 3, norm="batch", mask_start=0.0, mask_batches=3)
    run.evaluate()  # which leaves the clients' network in evaluation mode
    losses = []

    def watch(kind, round, client):
        model, stream = copy.deepcopy(run.model).train(), run.exchange.clients.upper_loaders[client].stream()
        batches = [next(stream) for _ in range(3)]
        losses.extend(F.cross_entropy(model(x), y).item() for x, y in batches)

    run.exchange.fault = watch
    row = run._mask_round(run.phases[0])
    assert len(losses) == 9
    assert row["upper_loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)


def test_effective_gradients_are_means_over_all_passes():
    """Mime has two a step, at the first step at the same weights."""
    found = []
    for average in ("mime_lite", "mime"):
        run = make_run("bidst", average=average, local_steps=1)
        request = run._request("weights", 0, None) | {"lr": 0.05, "position": 0, "momentum": run.momentum}
        request |= {"learning": run.pruner.learning(), "correction": torch.zeros_like(run.weights)}
        replies, _ = run._ask("weights", {0: request})
        found.append(replies[0]["effective"])
    assert found[0].abs().max() > 0
    assert_close(*found)


def test_closed_weights_that_are_frozen_stay():
    model = make_net()
    model[3].weight.requires_grad_(False)
    settings = Settings("bip", **{**QUICK, "weight_decay": 0.1, "mask_start": 0.0})
    run = make_federation(model, [], *make_data(), [1.0] * 4, settings)
    start, frozen = run.weights.clone(), ~run.flat.trained
    for _ in range(3):
        run.round()
    assert (frozen & ~run.pruner.mask).any()
    assert torch.equal(run.weights[frozen], start[frozen])
