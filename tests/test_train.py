"""The training loop: every method runs, a run repeats itself, is resumed to the same bits, and refuses bad input."""

import dataclasses
import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import batch, sgd, take_step, tiny_net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import sparsebilevel as sb
from sparsebilevel.export import load_network
from sparsebilevel.kernels import native
from sparsebilevel.layout import InLayout
from sparsebilevel.masks import NM, Filter, Unstructured
from sparsebilevel.training import build
from sparsebilevel.training import checkpoint as ckpt
from sparsebilevel.training.config import LOOP_OPTIONS, METHOD_NAMES, METHOD_OPTIONS, default_search_space, parse_steps
from sparsebilevel.training.loop import Config, Trainer, TrainingError, train
from sparsebilevel.training.plan import Phase, learning_rate, make_plan, score_lr_factor
from sparsebilevel.training.runlog import Progress, RunFolder, open_folder, read_log
from sparsebilevel.training.runtime import Interrupted, Ranks, StopSignals, process_group

# Two epochs of five steps on real data: an eighth of a second.
TINY = {"epochs": 2, "batch_size": 256, "measure": False, "quiet": True, "validation": 0.1, "seed": 3}
METHOD_ARGUMENTS = {
    "dense": {},
    "static": {"distribution": "erk"},
    "set": {"update_freq": "2"},
    "rigl": {"update_freq": "2", "rigl_paper": True},
    "bidst": {"update_freq": "2"},
    "omp": {"pretrain_epochs": 1},
    "imp": {"levels": 2, "epochs": 1, "rewind_step": "2"},
    "hydra": {"pretrain_epochs": 1, "finetune_epochs": 1},
    "bip": {"pretrain_epochs": 1, "finetune_epochs": 1, "upper_split": "0.3", "lower_steps": 2, "rewind": "pretrained"},
}


def make_config(folder, **changes):
    return Config(**{**TINY, "output_dir": str(folder), **changes})


def timeless(run):
    """The log without what may differ between two equal runs."""
    rows = read_log(run)
    return [{k: v for k, v in row.items() if not k.startswith(("time_", "bytes_"))} for row in rows]


def assert_same(a, b):
    """Two nested values with equal tensors, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    assert timeless(a) == timeless(b)
    one, two = (torch.load(run / "checkpoint.pth", weights_only=True) for run in (a, b))
    for key in ("model", "ema", "ema_steps", "optimizer", "rng", "epoch", "step"):
        assert_same(one[key], two[key])


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(n)``: SIGTERM reaches the process during step ``n`` of the run; None: no more signals."""
    wanted = []
    step = Progress.step

    def step_and_signal(self, epoch):
        step(self, epoch)
        if self.done in wanted:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "step", step_and_signal)
    return lambda n: wanted.__setitem__(slice(None), [] if n is None else [n])


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method(method, tmp_path):
    result = train(make_config(tmp_path, method=method, **METHOD_ARGUMENTS[method]))
    rows = read_log(tmp_path)
    assert rows[-1] == result
    assert [row["type"] for row in rows[-2:]] == ["layers", "result"]
    epochs = [row for row in rows if row["type"] == "epoch"]
    assert [row["epoch"] for row in epochs] == list(range(1, len(epochs) + 1))
    assert {"train_loss", "val_acc", "test_acc", "sparsity", "time_epoch_s"} <= epochs[-1].keys()

    assert result["sparsity"] == pytest.approx(0.0 if method == "dense" else 0.9, abs=1e-4)
    assert result["costs"]["params_total"] == 65_834
    assert sum(row["total"] for row in rows[-2]["layers"]) == (0 if method == "dense" else 65_440)
    topology = [row for row in rows if row["type"] == "topology"]
    assert len(topology) == result["topology_changes"]
    assert (len(topology) > 0) == (method in ("set", "rigl", "bidst", "imp"))
    assert ("mask_iou_start" in result) == (method in ("hydra", "bip"))
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert not any(key.endswith("mask_scores") for key in state["model"]) or method == "bidst"
    for key, mask in state["model"].items():
        if key.endswith(".mask"):
            assert not state["model"][key.replace("mask", "weight")][~mask].any()


@pytest.fixture
def in_layout(monkeypatch):
    """Whether the network was in the layout of the sparse kernels, at each training step."""
    seen = []
    step = Trainer.train_step
    monkeypatch.setattr(
        Trainer, "train_step", lambda self, *a: step(self, *a) or seen.append(isinstance(self.model, InLayout))
    )
    return seen


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_trains_in_the_layout_of_the_sparse_kernels(amp, tmp_path, in_layout):
    results, states = {}, {}
    for flag in (True, False):
        del in_layout[:]
        folder = tmp_path / str(flag)
        config = make_config(
            folder, method="static", optimize_for_cpu=flag, channels_last=True, model_ema=True, amp=amp
        )
        results[flag] = train(config)
        assert set(in_layout) == {flag}
        assert json.loads((folder / "config.json").read_text())["optimize_for_cpu"] is flag
        states[flag] = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    assert list(states[True]) == list(states[False])
    assert results[True]["train_acc"] == pytest.approx(results[False]["train_acc"], abs=0.03)
    assert results[True]["costs"] == results[False]["costs"]
    with pytest.raises(ValueError, match="optimize_for_cpu was True, now False"):
        train(dataclasses.replace(config, output_dir=str(tmp_path / "True"), resume=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dense"},
        {"amp": "fp16", "max_steps": 1},
        {"arch": "mlp"},
        {"method": "omp", "pretrain_epochs": 1, "epochs": 1},
    ],
    ids=str,
)
def test_keeps_the_layout_where_it_is_of_use(changes, tmp_path, in_layout):
    train(make_config(tmp_path, **{"method": "static", **changes}))
    pretrained = changes.get("pretrain_epochs", 0) * native.available()  # it becomes sparse after them
    assert set(in_layout) == ({False, True} if pretrained else {False})
    assert in_layout == sorted(in_layout)


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
def test_a_network_that_cannot_be_traced_is_trained_as_it_is(tmp_path, monkeypatch, in_layout):
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else x)

    make = build.create_model
    monkeypatch.setattr(build, "create_model", lambda *a, **k: Untraceable(*make(*a, **k).children()))
    with pytest.warns(UserWarning, match="Untraceable cannot be traced, so its layers convert one by one"):
        result = train(make_config(tmp_path, method="static", epochs=1))
    assert not any(in_layout)
    assert result["epoch"] == 1


def test_sparsity_by_layer(tmp_path):
    by_layer = {"layer_sparsity": ("14=0", "[36]=0.5"), "sparsity": 0.8}
    train(make_config(tmp_path, method="rigl", update_freq="2", **by_layer, max_steps=4))
    train(make_config(tmp_path, method="rigl", update_freq="2", **by_layer, resume=True))
    layers = next(row for row in read_log(tmp_path) if row["type"] == "layers")["layers"]
    densities = {row["name"]: round(row["density"], 2) for row in layers}
    assert densities == {"0": 0.2, "3": 0.5, "6": 0.5, "9": 0.2, "14": 1.0}
    with pytest.raises(
        ValueError, match=r"another configuration \(layer_sparsity was \['14=0', '\[36\]=0.5'\], now \[\]"
    ):
        train(make_config(tmp_path, method="rigl", update_freq="2", sparsity=0.8, resume=True))


def test_rewinding_to_an_initialization_that_was_not_trained_from_is_named(tmp_path, caplog):
    train(make_config(tmp_path / "dense", method="dense", max_steps=2))
    start = {"method": "imp", "levels": 1, "epochs": 1, "init_from": str(tmp_path / "dense" / "checkpoint.pth")}
    train(make_config(tmp_path / "same", **start))
    assert "rewinds" not in caplog.text
    train(make_config(tmp_path / "other", **start | {"seed": 4}))
    assert "was trained from seed 3, and this run, of seed 4, rewinds to an initialization of its own" in caplog.text


def test_pruning_an_untrained_network_is_named(tmp_path, caplog):
    train(make_config(tmp_path / "trained", method="omp", pretrain_epochs=1, epochs=1))
    train(
        make_config(tmp_path / "next", method="omp", epochs=1, init_from=str(tmp_path / "trained"))  # its last one
    )
    assert "prunes a trained network" not in caplog.text
    train(make_config(tmp_path / "untrained", method="omp", max_steps=1))
    assert "method omp prunes a trained network, and this one is at its initialization" in caplog.text


def test_networks_without_normalization_need_rescale(tmp_path, caplog):
    deep = {"method": "static", "arch": "mlp", "sparsity": 0.98, "epochs": 4, "batch_size": 64, "validation": 0}
    plain = train(make_config(tmp_path / "plain", **deep))
    assert "mlp has no normalization layers and may hardly learn under a sparse mask; try rescale" in caplog.text
    caplog.clear()
    rescaled = train(make_config(tmp_path / "rescaled", **deep, rescale=True))
    assert rescaled["test_acc"] > plain["test_acc"] + 0.2
    train(make_config(tmp_path / "filter", method="static", arch="mlp", pattern="filter", max_steps=1))
    assert caplog.text.rstrip().endswith("may hardly learn under a sparse mask")
    caplog.clear()
    train(make_config(tmp_path / "cnn", method="static", max_steps=1))
    train(make_config(tmp_path / "dense", method="dense", arch="mlp", max_steps=1))
    assert "no normalization" not in caplog.text


def test_pattern_by_layer(tmp_path):
    by_layer = {"layer_pattern": ("14=nm:2:4", "[36]=filter:4"), "sparsity": 0.75}
    train(make_config(tmp_path, method="bidst", update_freq="2", search_space=0.1, **by_layer, max_steps=4))
    train(make_config(tmp_path, method="bidst", update_freq="2", search_space=0.1, **by_layer, resume=True))
    network, _ = load_network(tmp_path)
    patterns = {name: layer.pattern for name, layer in sb.sparse_layers(network)}
    assert patterns == {"0": Unstructured(), "3": Filter(4), "6": Filter(4), "9": Unstructured(), "14": NM(2, 4)}
    for _, layer in sb.sparse_layers(network):
        layer.pattern.check(layer.mask)
        assert layer.pattern.count(layer.mask) == layer.num_kept < layer.pattern.num_groups(layer.weight.shape)


def test_a_run_of_a_version_without_a_field_is_resumed(tmp_path):
    train(make_config(tmp_path, method="static", max_steps=4))
    file = tmp_path / "config.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "layer_sparsity"}
    file.write_text(json.dumps(older))
    assert train(make_config(tmp_path, method="static", resume=True))["epoch"] == 2


def test_equal_runs_have_equal_logs(tmp_path):
    for name in "ab":
        train(make_config(tmp_path / name, method="bidst", update_freq="2", model_ema=True))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert config["resolved"]["search_space"] == 0.05


def test_selection_is_by_validation_alone(tmp_path):
    result = train(make_config(tmp_path, method="dense", epochs=4))
    epochs = [row for row in read_log(tmp_path) if row["type"] == "epoch"]
    best = max(epochs, key=lambda row: (row["val_acc"], -row["epoch"]))
    assert (result["selected_epoch"], result["test_acc_selected"]) == (best["epoch"], best["test_acc"])
    assert result["test_acc"] == epochs[-1]["test_acc"]
    kept = torch.load(tmp_path / "best.pth", weights_only=True)
    assert {"model", "ema", "ema_steps", "config"} == kept.keys()


@pytest.mark.parametrize(("cut", "changes"), [(7, {}), (10, {"eval_freq": 3})], ids=["in an epoch", "after one"])
def test_what_max_steps_cuts_off_is_not_selected(cut, changes, tmp_path, monkeypatch):
    """A resumed run does the rest of the epoch, or does not evaluate there, and never sees that network again."""
    accuracies = {cut: 0.9}  # by step; of all other steps 0.5
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: dict.fromkeys(("val_acc", "test_acc"), accuracies.get(self.step, 0.5))
    )
    config = make_config(tmp_path, method="static", arch="mlp", epochs=4, **changes)
    first = train(dataclasses.replace(config, max_steps=cut))
    expected = None if changes else 1
    assert (first["test_acc"], first["selected_epoch"]) == (0.9, expected)
    assert (tmp_path / "best.pth").exists() == (expected is not None)
    result = train(dataclasses.replace(config, resume=True))
    assert result["selected_epoch"] == changes.get("eval_freq", 1)


def test_best_network_of_a_run_that_was_cut_and_resumed(tmp_path):
    config = make_config(tmp_path / "whole", method="static", arch="mlp", batch_size=32, lr=0.6, validation=0.05)
    config = dataclasses.replace(config, lr_scheduler="constant", seed=0)
    train(config)
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), resume=True)
    train(dataclasses.replace(parts, max_steps=53))
    train(parts)
    one, two = (torch.load(tmp_path / name / "best.pth", weights_only=True)["model"] for name in ("whole", "parts"))
    assert_same(one, two)


def test_without_validation_nothing_is_selected(tmp_path):
    result = train(make_config(tmp_path, method="dense", epochs=1, validation=0))
    assert result["test_acc_selected"] is None
    assert not (tmp_path / "best.pth").exists()


# A CPU takes a minute for convolutions in fp16.
@pytest.mark.parametrize(
    ("amp", "arch"), [("bf16", "auto"), ("fp16", "mlp"), pytest.param("fp16", "auto", marks=pytest.mark.slow)]
)
def test_mixed_precision_with_all_the_rest(amp, arch, tmp_path):
    changes = {"amp": amp, "accumulate": 2, "clip_grad_norm": 1.0, "channels_last": True, "label_smoothing": 0.1}
    changes |= {"opt": "adamw", "lr": 1e-2, "norm_weight_decay": 0.0, "lr_warmup_epochs": 1, "batch_size": 128}
    changes |= {"arch": "mlp", "batch_size": 64} if arch == "mlp" else {}
    result = train(make_config(tmp_path, method="bidst", update_freq="2", **changes))
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-4)
    losses = [row["train_loss"] for row in read_log(tmp_path) if row["type"] == "epoch"]
    assert losses[1] < losses[0] - 0.05


@pytest.mark.parametrize("arch", ["mlp", pytest.param("auto", marks=pytest.mark.slow)])
def test_bip_with_fp16(arch, tmp_path):
    arch = {"arch": arch} if arch != "auto" else {}
    result = train(make_config(tmp_path, method="bip", amp="fp16", max_steps=3, **arch))
    assert read_log(tmp_path)[0]["upper_steps"] > 0
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-4)


def test_starting_from_a_dense_network(tmp_path):
    dense = tmp_path / "dense"
    train(make_config(dense, method="dense", epochs=6, validation=0))
    source = str(dense / "checkpoint.pth")
    for method in ("omp", "hydra", "bip", "imp"):
        arguments = {"imp": {"levels": 1}, "omp": {"lr": 0.0}}.get(method, {})
        folder = tmp_path / method
        train(make_config(folder, method=method, init_from=source, epochs=1, validation=0, **arguments))
        assert (folder / "checkpoint.pth").exists()
    weights = {n: w for n, w in torch.load(source, weights_only=True)["model"].items() if n.endswith("weight")}
    pruned = torch.load(tmp_path / "omp" / "checkpoint.pth", weights_only=True)["model"]
    for name in ("3.weight", "14.weight"):
        kept = pruned[name.replace("weight", "mask")]
        torch.testing.assert_close(pruned[name], weights[name] * kept, rtol=0, atol=0)


def test_imp_from_a_dense_network_rewinds_to_the_initial_weights(tmp_path):
    dense = tmp_path / "dense"
    train(make_config(dense, method="dense", epochs=3))
    source = str(dense / "checkpoint.pth")
    train(make_config(tmp_path / "imp", method="imp", levels=1, init_from=source, epochs=1, lr=0.0))
    torch.manual_seed(TINY["seed"])
    initial = sb.models.create_model("digits_cnn", 10, 1).state_dict()["3.weight"]
    state = torch.load(tmp_path / "imp" / "checkpoint.pth", weights_only=True)["model"]
    torch.testing.assert_close(state["3.weight"], initial * state["3.mask"], rtol=0, atol=0)
    trained = torch.load(source, weights_only=True)["model"]["3.weight"].abs()
    assert trained[state["3.mask"]].min() >= trained[~state["3.mask"]].quantile(0.9)


def test_starting_from_averaged_weights(tmp_path):
    result = train(make_config(tmp_path / "ema", method="rigl", update_freq="2", model_ema=True))
    sources = {name: tmp_path / "ema" / name for name in ("checkpoint.pth", "best.pth", "old.pth")}
    checkpoint = torch.load(sources["checkpoint.pth"], weights_only=True)
    assert checkpoint["ema"].keys() == checkpoint["model"].keys()
    assert checkpoint["ema_steps"] == result["step"]
    older = checkpoint | {"ema": checkpoint["ema"] | {"ema_steps": torch.tensor(checkpoint.pop("ema_steps"))}}
    torch.save(older, sources["old.pth"])
    for name, source in sources.items():
        folder = tmp_path / f"from_{name}"
        train(make_config(folder, method="static", init_from=str(source), epochs=1, lr=0.0, weight_decay=0.0))
        start = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
        if name != "best.pth":
            assert torch.equal(start["3.weight"], checkpoint["ema"]["3.weight"])
            assert not torch.equal(start["3.weight"], checkpoint["model"]["3.weight"])
        assert torch.equal(start["3.mask"], ckpt.network_state(ckpt.load_checkpoint(source))["3.mask"])


def test_a_run_of_a_version_that_counted_among_the_averages_is_resumed(tmp_path):
    config = make_config(tmp_path / "whole", method="rigl", update_freq="2", model_ema=True)
    train(config)
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), resume=True)
    train(dataclasses.replace(parts, max_steps=6))
    file = tmp_path / "parts" / "checkpoint.pth"
    state = torch.load(file, weights_only=True)
    state["ema"]["ema_steps"] = torch.tensor(state.pop("ema_steps"))
    torch.save(state, file)
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_means_of_a_log_row_begin_after_the_last_one(tmp_path, monkeypatch):
    calls = []
    for name in ("metrics", "reset_metrics"):
        real = getattr(sb.Static, name)
        monkeypatch.setattr(sb.Static, name, lambda self, name=name, real=real: calls.append(name) or real(self))
    train(make_config(tmp_path, method="static"))
    assert calls == ["metrics", "reset_metrics"] * 2


def test_static_takes_over_the_masks_of_a_sparse_network(tmp_path):
    train(make_config(tmp_path / "rigl", method="rigl", update_freq="2"))
    source = str(tmp_path / "rigl" / "checkpoint.pth")
    train(make_config(tmp_path / "static", method="static", init_from=source, epochs=1))
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("rigl", "static"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith("mask"))


def test_static_takes_over_masks_that_were_ranked_over_all_layers(tmp_path, caplog):
    """Their counts are not the uniform ones: nothing may be drawn to make them so."""
    train(make_config(tmp_path / "omp", method="omp", distribution="global", epochs=1))
    caplog.clear()  # OMP has warned that its network is untrained
    source = str(tmp_path / "omp" / "checkpoint.pth")
    train(make_config(tmp_path / "static", method="static", init_from=source, epochs=1))
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True)["model"] for n in ("omp", "static"))
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith("mask"))
    densities = [float(one[key].float().mean()) for key in one if key.endswith("mask")]
    assert max(densities) - min(densities) > 0.1
    assert not caplog.records
    train(make_config(tmp_path / "more", method="rigl", init_from=source, epochs=1, sparsity=0.95))
    assert "keep 6544 groups and stay as they are; the configuration asks for 3272" in caplog.text


def test_masks_that_hide_nothing_are_a_start_for_random_ones(tmp_path):
    train(make_config(tmp_path / "imp", method="imp", levels=1, epochs=1, max_steps=2))  # not pruned yet
    source = str(tmp_path / "imp" / "checkpoint.pth")
    assert torch.load(source, weights_only=True)["model"]["3.mask"].all()
    assert train(make_config(tmp_path / "set", method="set", init_from=source, epochs=1))["sparsity"] > 0.89


def test_masks_that_do_not_fit_the_pattern_are_refused(tmp_path):
    train(make_config(tmp_path / "rigl", method="rigl", update_freq="2"))
    source = {"init_from": str(tmp_path / "rigl" / "checkpoint.pth"), "pattern": "filter", "epochs": 1}
    with pytest.raises(ValueError, match=r"rigl/checkpoint.pth: layer '0': mask does not fit pattern Filter\(\)"):
        train(make_config(tmp_path / "static", method="static", **source))
    train(make_config(tmp_path / "omp", method="omp", **source))  # which chooses its masks itself


def test_a_run_on_folders_of_images(tmp_path, stop_after):
    """Read by a worker process, with a validation part, and resumed in the middle of an epoch."""
    try:
        sb._torchvision.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    from PIL import Image

    for part, samples in (("train", 20), ("val", 4)):
        for label, colour in (("blue", (20, 40, 200)), ("red", (200, 40, 20))):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(samples):
                image = Image.new("RGB", (24 + i, 20), tuple(c + i for c in colour))
                image.save(tmp_path / "images" / part / label / f"{i}.png")
    images = {"data": "imagefolder", "data_path": str(tmp_path / "images"), "image_size": 16, "workers": 1}
    config = make_config(tmp_path / "whole", method="static", arch="resnet20", **images, batch_size=8, epochs=3)
    config = dataclasses.replace(config, sparsity=0.5, validation=8)
    result = train(config)
    assert (result["step"], result["test_acc"]) == (3 * 4, 1.0)
    assert result["test_acc_selected"] == 1.0
    config = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), resume=True)
    stop_after(6)
    pytest.raises(Interrupted, train, config)
    stop_after(None)
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_divergence_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    train(make_config(tmp_path, method="static", epochs=4, max_steps=2))
    before = (tmp_path / "checkpoint.pth").read_bytes()
    monkeypatch.setattr("sparsebilevel.training.loop.learning_rate", lambda *_: 1e30)
    with pytest.raises(TrainingError, match="not finite.*smaller lr"):
        train(make_config(tmp_path, method="static", epochs=4, resume=True))
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_nan_scores_are_named(tmp_path, monkeypatch):
    learn = sb.BiDST.learn

    def poison(self, grads):
        learn(self, grads)
        next(iter(self.weights.values())).scores.fill_(float("nan"))

    monkeypatch.setattr(sb.BiDST, "learn", poison)
    with pytest.raises(
        TrainingError, match=r"weights, gradients or scores are NaN \(step 1, lr .*smaller lr"
    ) as caught:
        train(make_config(tmp_path, method="bidst", update_freq="2"))
    assert "scores must not be NaN" in str(caught.value.__cause__)


@pytest.mark.parametrize("method", ["rigl", "bidst", "bip"])
def test_divergence_that_a_method_meets_first(method, tmp_path):
    """It ranks what is NaN before the loop looks at the loss."""
    changes = {} if method == "bip" else {"update_freq": "2"}
    with pytest.raises(TrainingError, match=r"(loss is not finite|are NaN).*\(step \d+, lr 1e\+20\); try a smaller lr"):
        train(make_config(tmp_path, method=method, arch="mlp", lr=1e20, lr_scheduler="constant", **changes))


def test_what_a_method_refuses_of_a_sound_run_stays(tmp_path, monkeypatch):
    def refuse(self, scaler=None):
        raise ValueError("no such thing")

    monkeypatch.setattr(sb.Static, "step", refuse)
    with pytest.raises(ValueError, match="no such thing"):
        train(make_config(tmp_path, method="static"))


# -- resuming ---------------------------------------------------------------------------------------------------------

RESUMED = {
    "dense": {},
    "rigl": {"update_freq": "3", "accumulate": 2, "batch_size": 128},
    "bidst": {"update_freq": "3", "model_ema": True, "accumulate": 2, "batch_size": 128},
    "imp": {"levels": 1, "model_ema": True, "rewind_step": "3"},
    "hydra": {"pretrain_epochs": 1, "epochs": 1, "finetune_epochs": 1},
    "bip": {"pretrain_epochs": 1, "epochs": 1, "finetune_epochs": 1, "model_ema": True, "lower_steps": 2},
}


@pytest.mark.parametrize("method", RESUMED)
def test_resume_is_bit_identical(method, tmp_path, stop_after):
    """Stopped in the middle of each epoch and at the end of one, in one run."""
    config = make_config(tmp_path / "whole", method=method, **RESUMED[method])
    train(config)
    total = read_log(tmp_path / "whole")[-1]["step"]
    config = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), resume=True)
    for step in (2, 5, 7, total - 1):
        stop_after(step)
        with pytest.raises(Interrupted, match=f"SIGTERM: stopped after step {step};.*--resume continues") as caught:
            train(config)
        assert caught.value.exit_code == 143
    stop_after(None)
    train(config)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    log = (tmp_path / "parts" / "log.jsonl").read_bytes()
    train(config)  # a finished run stays as it is
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == log


def test_a_signal_after_the_last_step_ends_the_command_too(tmp_path, monkeypatch):
    """Else `ablate` and `demo` would go on with their next run."""
    measure = Trainer._measure
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", lambda self: signal.raise_signal(signal.SIGINT) or measure(self))
        with pytest.raises(Interrupted, match="SIGINT: stopped after step 10") as caught:
            train(make_config(tmp_path, method="static"))
    assert caught.value.exit_code == 130
    result = train(make_config(tmp_path, method="static", resume=True))
    assert result == read_log(tmp_path)[-1]
    assert result["step"] == 10


def test_resume_after_a_crash_repeats_what_the_checkpoint_lacks(tmp_path, monkeypatch):
    """Killed between two checkpoints, with a last line cut in half."""
    config = make_config(tmp_path / "whole", method="set", update_freq="2", epochs=4, checkpoint_freq=2)
    train(config)
    crashed = tmp_path / "crashed"
    config = dataclasses.replace(config, output_dir=str(crashed))
    steps = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", lambda *_: 1 / (17 - next(steps)))
        pytest.raises(ZeroDivisionError, train, config)
    assert sum(row["type"] == "epoch" for row in read_log(crashed)) == 3
    with (crashed / "log.jsonl").open("a") as log:
        log.write('{"type": "epoch", "epo')
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "whole", crashed)


def test_max_steps_and_then_the_rest(tmp_path):
    config = make_config(tmp_path / "whole", method="bidst", update_freq="2", model_ema=True)
    train(config)
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"), resume=True)
    assert train(dataclasses.replace(parts, max_steps=3))["step"] == 3
    assert train(dataclasses.replace(parts, max_steps=7))["step"] == 7
    train(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_refuses_another_configuration(tmp_path):
    train(make_config(tmp_path, method="static"))
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="another configuration.*lr was 0.1, now 0.2"):
        train(make_config(tmp_path, method="static", resume=True, lr=0.2))
    assert content == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_resume_refuses_an_edited_configuration(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"lr": 0.2}))
    with pytest.raises(ckpt.CheckpointError, match=r"checkpoint.pth is of another configuration \(lr was 0.1, now 0.2"):
        train(make_config(run, method="static", lr=0.2, resume=True))


def test_resume_refuses_to_lose_a_log(tmp_path):
    train(make_config(tmp_path, method="static"))
    (tmp_path / "checkpoint.pth").unlink()
    with pytest.raises(ValueError, match=r"checkpoint.pth is missing, but the log holds 2 epochs"):
        train(make_config(tmp_path, method="static", resume=True))


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run; tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(make_config(folder, method="static"))
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"", "empty"),
        (lambda data: data[:20_000] + bytes(255 - b for b in data[20_000:20_256]) + data[20_256:], "damaged"),
        (lambda data: b"not a checkpoint at all", "no checkpoint"),
    ],
)
def test_damaged_checkpoint(damage, message, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoint.pth"
    path.write_bytes(damage(path.read_bytes()))
    content = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(ckpt.CheckpointError, match=f"{path}.*{message}"):
        train(make_config(run, method="static", resume=True))
    assert content == {file.name: file.read_bytes() for file in run.iterdir()}


def test_checkpoint_of_another_architecture(finished, tmp_path):
    with pytest.raises(ckpt.CheckpointError, match=r"another architecture: .*missing: 3.bias.*unexpected: 0.weight"):
        train(make_config(tmp_path / "a", method="omp", arch="mlp", init_from=str(finished / "checkpoint.pth")))
    assert not (tmp_path / "a").exists()
    state = torch.load(finished / "checkpoint.pth", weights_only=True)["model"]
    state["14.weight"] = torch.zeros(5, 64)
    with pytest.raises(ckpt.CheckpointError, match=r"14.weight \[5, 64\] instead of \[10, 64\]"):
        ckpt.check_architecture(sb.models.create_model("digits_cnn"), state, "x.pth")


@pytest.mark.parametrize(
    "state",
    [{"model": None}, {"model": [torch.zeros(2)]}, {"state_dict": None}, {1: torch.zeros(2)}, {"model": {"w": 1}}],
)
def test_something_else_than_a_state_dict(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ckpt.CheckpointError, match=r"x.pth has no state dict under 'model' or 'state_dict'"):
        ckpt.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["best", "elapsed", "totals", "scaler"])
def test_checkpoint_that_lacks_something(key, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    del state[key]
    torch.save(state, run / "checkpoint.pth")
    with pytest.raises(ckpt.CheckpointError, match=f"not of a training run .it lacks {key}"):
        train(make_config(run, method="static", resume=True))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth does not exist"):
        train(make_config(tmp_path, method="omp", init_from=str(tmp_path / "nowhere.pth")))


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    ckpt.save_checkpoint(path, {"model": {"w": torch.ones(3)}})

    def break_off(state, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match=r"No space left on device: '.*/checkpoint.pth'"):
        ckpt.save_checkpoint(path, {"model": {}})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert torch.equal(ckpt.load_checkpoint(path)["model"]["w"], torch.ones(3))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    folder = RunFolder(make_config(tmp_path))
    folder.log.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/log.jsonl'"):
        folder.write("epoch", {})
    monkeypatch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=r"No space left on device: '.*/config.json'"):
        ckpt.write_text(tmp_path / "config.json", "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("resume", [True, False])
def test_what_a_killed_command_was_writing_is_removed(resume, tmp_path):
    """Of the commands whose runs have a folder for each method."""
    (tmp_path / "bip").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for name in (".config.json.4711", "bip/.checkpoint.pth.4711", "bip/.worker1-20.pth.4711"):
        (tmp_path / name).write_bytes(b"half of it")
    open_folder(tmp_path, {}, (), resume, not resume, ("*/checkpoint.pth", "*/worker*.pth"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.json"]


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_killed_run_was_writing_is_removed(how, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    names = {path.name for path in run.iterdir()}
    for name in (".checkpoint.pth.4711", ".best.pth.4711", ".config.json.new"):
        (run / name).write_bytes(b"half of it")
    (run / "log.jsonl").write_text("".join((run / "log.jsonl").read_text().splitlines(keepends=True)[:-1]))
    train(make_config(run, method="static", **{how: True}))
    assert {path.name for path in run.iterdir()} == names


def test_bare_state_dicts_are_read(tmp_path):
    model = sb.models.create_model("digits_cnn")
    for content in (model.state_dict(), {"state_dict": model.state_dict()}):
        torch.save(content, tmp_path / "w.pth")
        assert ckpt.load_checkpoint(tmp_path / "w.pth")["model"].keys() == model.state_dict().keys()
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(ckpt.CheckpointError, match="holds a list"):
        ckpt.load_checkpoint(tmp_path / "w.pth")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_filled_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty; give resume.*overwrite"):
        train(make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_the_run_only_when_the_new_one_starts(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    content = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="unknown model"):
        train(make_config(run, arch="resnet20000", overwrite=True))
    assert content == {path.name: path.read_bytes() for path in run.iterdir()}
    train(make_config(run, method="dense", overwrite=True))
    assert json.loads((run / "config.json").read_text())["method"] == "dense"
    assert len([row for row in read_log(run) if row["type"] == "epoch"]) == 2


def test_an_empty_folder_of_the_user_stays_when_a_start_fails(tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        train(make_config(tmp_path, arch="resnet20000"))
    assert tmp_path.exists()


def test_a_damaged_config_is_named(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for content, reason in (
        (b"", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[]", "holds a list; expected an object"),
    ):
        (run / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"run/config\.json {reason}"):
            train(make_config(run, resume=True))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir=.*is not writable: Not a directory"):
        train(make_config(tmp_path / "file" / "run"))


# -- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 is not allowed; expected a number in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 is not allowed"),
        (
            {"layer_sparsity": ("fc",)},
            r"layer_sparsity='fc' is not allowed; expected NAME=VALUE with a value in \[0, 1\)",
        ),
        ({"layer_sparsity": ("fc=1",)}, r"layer_sparsity='fc=1' is not allowed"),
        ({"layer_sparsity": ("fc=0.5",)}, r"sparsity has 'fc', which no layer matches; the layers are \['0', '3'"),
        (
            {"layer_sparsity": ("3=0",), "distribution": "erk"},
            "distribution='erk' has nothing to share out with layer_s",
        ),
        ({"layer_pattern": ("fc",)}, r"layer_pattern='fc' is not allowed; expected NAME=PATTERN: pattern='' is not"),
        ({"layer_pattern": ("=filter",)}, "layer_pattern='=filter' is not allowed; .*: the name is missing"),
        ({"layer_pattern": ("fc=filter",)}, r"pattern has 'fc', which no layer matches; the layers are \['0', '3'"),
        ({"sparsity": float("nan")}, r"sparsity=nan is not allowed"),
        ({"batch_size": 0}, r"batch_size=0 is not allowed; expected a whole number, at least 1"),
        ({"batch_size": 100_000}, r"batch_size=100000"),
        ({"epochs": 0}, r"epochs=0"),
        ({"accumulate": 1000}, r"accumulate=1000 is not allowed; an epoch of phase train has 5 batches"),
        ({"method": "magic"}, r"method='magic' is not known; allowed: dense, static"),
        ({"arch": "resnet20000"}, r"unknown model 'resnet20000'"),
        ({"data": "cifar11"}, r"data='cifar11' is not known; allowed: digits, mnist, cifar10"),
        ({"data": "cifar10", "data_path": "/nowhere"}, r"/nowhere"),
        ({"pattern": "stripes"}, r"pattern='stripes' is not allowed"),
        ({"distribution": "fair"}, r"distribution='fair' is not known"),
        ({"exclude": ("0", "3", "6", "9", "14")}, r"no nn.Linear or nn.Conv2d to convert"),
        ({"opt": "lbfgs"}, r"opt='lbfgs' is not known; allowed: sgd, adamw"),
        ({"lr": float("nan")}, r"lr=nan is not allowed"),
        ({"norm_weight_decay": float("nan")}, r"norm_weight_decay=nan is not allowed"),
        ({"pretrain_weight_decay": -1.0}, r"pretrain_weight_decay=-1.0 is not allowed; expected a finite number >= 0"),
        ({"finetune_weight_decay": -1.0}, r"finetune_weight_decay=-1.0 is not allowed"),
        ({"lr_gamma": float("inf")}, r"lr_gamma=inf is not allowed"),
        ({"lr_gamma": -0.1}, r"lr_gamma=-0.1 is not allowed"),
        ({"seed": 2**63}, r"seed=9223372036854775808 is not allowed; expected .*, at most 9223372036854775807"),
        ({"eval_batch_size": 10**21}, r"eval_batch_size=10{21} is not allowed"),
        ({"max_steps": 10**400}, r"max_steps=10{400} is not allowed"),
        ({"threads": 4097}, r"threads=4097 is not allowed; expected a finite number, at most 4096"),
        ({"lr_warmup_epochs": 1e308}, r"lr_warmup_epochs=1e\+308 is not allowed; .* at most 3.4028234663852886e\+38"),
        ({"initial_score": -1e308}, r"initial_score=-1e\+308 is not allowed"),
        ({"margin": 1e308}, r"margin=1e\+308 is not allowed"),
        ({"update_freq": "1" + 400 * "0"}, r"update_freq='10{400}' is not allowed; expected steps"),
        ({"method": "omp", "init_from": ""}, r"init_from='' is not allowed; expected a text that is not empty"),
        ({"data_path": ""}, r"data_path='' is not allowed"),
        ({"device": "abacus"}, r"device='abacus' is not known"),
        ({"method": "rigl", "tau": 2.0}, r"tau=2.0: method rigl has no such option \(bidst\)"),
        ({"method": "dense", "update_freq": "3"}, r"update_freq='3': method dense has no such option"),
        ({"method": "static", "finetune_epochs": 1}, r"finetune_epochs=1: only hydra and bip"),
        ({"method": "dense", "pretrain_epochs": 1}, r"pretrain_epochs=1"),
        (
            {"method": "bip", "rescale": True},
            r"rescale=True scales random initial weights; expected one of static, set",
        ),
        ({"rescale": True, "init_from": "x"}, r"rescale=True scales random initial weights"),
        ({"method": "omp", "pretrain_epochs": 1, "init_from": "x"}, r"init_from='x' replaces pretraining"),
        ({"method": "bip", "rewind": "init"}, r"rewind='init' needs finetune_epochs"),
        ({"method": "hydra", "amp": "fp16"}, r"amp='fp16' is not allowed with hydra"),
        ({"method": "imp", "rewind_step": "100"}, r"rewind_step='100' is not allowed; the first cycle is too short"),
        ({"update_freq": "often"}, r"update_freq='often' is not allowed; expected steps \(100\), epochs \(8ep\)"),
        ({"update_end": "1.5"}, r"update_end='1.5' is not allowed"),
        ({"lr_milestones": "0.5,now"}, r"lr_milestones='now' is not allowed"),
        ({"implicit": "magic"}, r"implicit='magic' is not known; allowed: derived"),
        ({"method": "rigl", "pattern": "nm:2:4", "arch": "mlp", "pretrain_epochs": 9}, r"pattern NM is not allowed"),
        ({"validation": 2.0}, r"validation=2.0"),
        (
            {"method": "bip", "upper_split": "half"},
            r"upper_split='half' is not allowed; expected same, a count \(500\)",
        ),
        ({"resume": True, "overwrite": True}, r"resume and overwrite exclude each other"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        train(make_config(tmp_path / "run", **{"method": "bidst", **changes}))
    assert not (tmp_path / "run").exists()


def test_the_largest_seed(tmp_path):
    assert train(make_config(tmp_path, method="bidst", arch="mlp", epochs=1, seed=2**63 - 1))["epoch"] == 1


def test_a_network_that_takes_one_image_size_only(tmp_path):
    try:
        sb._torchvision.import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="image_size=None: vit_b_16 takes .* 224x224, .* fake are 32x32; give .*=224"):
        train(make_config(tmp_path / "run", arch="vit_b_16", data="fake"))


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'sparsebilevel\[log\]'"):
        train(make_config(tmp_path, tensorboard=True))


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(tmp_path, method="bidst", update_freq="2", tensorboard=True)
    train(dataclasses.replace(config, max_steps=7))  # an epoch, and two steps of the next, which the rest logs again
    train(dataclasses.replace(config, resume=True))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    rows = [row for row in read_log(tmp_path) if row["type"] == "epoch"]
    for name in ("train_loss", "test_acc", "sparsity", "mask_iou"):
        written = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert written == [(row["step"], pytest.approx(row[name])) for row in rows], name


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"), [("100", 100), ("8ep", 80), ("0.5ep", 5), ("0.75", 300), ("1.0", 400), ("0", 0), ("0.0001", 1)]
)
def test_parse_steps(text, steps):
    assert parse_steps("update_freq", text, steps_per_epoch=10, total_steps=400) == steps


@pytest.mark.parametrize("method", METHOD_NAMES[1:])
def test_options_are_those_of_the_constructors(method):
    taken = {"rigl_paper" if name == "paper" else name for name in _arguments(sb.METHODS[method])}
    taken -= {"sparsity", "distribution", "seed"}
    if not any(name in METHOD_OPTIONS[method] for name in ("update_freq",)):
        taken -= {"update_freq", "update_start", "update_end"}
    assert {name for name in METHOD_OPTIONS[method] if name not in LOOP_OPTIONS} == taken


def _arguments(cls):
    names = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            names |= {p.name for p in inspect.signature(base).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return names


def test_defaults_of_the_methods():
    bidst = Config(method="bidst", epochs=148).method_arguments(100, 14_800)
    assert (bidst["update_freq"], bidst["update_end"], bidst["search_space"]) == (800, 14_800, 0.05)
    schedule = sb.schedules.UpdateSchedule(bidst["update_freq"], 1, bidst["update_end"])
    assert sum(map(schedule.is_due, range(1, 14_801))) == 18
    rigl = Config(method="rigl").method_arguments(100, 10_000)
    assert (rigl["update_freq"], rigl["update_end"]) == (100, 7500)
    assert Config(method="rigl").method_arguments(10, 160)["update_freq"] == 10  # a short run changes too
    assert Config(method="rigl", update_freq="100").method_arguments(10, 160)["update_freq"] == 100
    assert [default_search_space("resnet50", s) for s in (0.9, 0.95, 0.98)] == [0.05, 0.03, 0.02]
    assert [default_search_space("mobilenet_v2_cifar", s) for s in (0.9, 0.95, 0.98)] == [0.08, 0.05, 0.04]


def test_learning_rate():
    phase = Phase("train", epochs=10, steps_per_epoch=10, lr=1.0, weight_decay=0)
    cosine = Config(lr_warmup_epochs=1, lr_min=0.1)
    rates = [learning_rate(cosine, phase, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert 0.1 < rates[99] < 0.101
    steps = Config(lr_scheduler="step", lr_milestones="0.5,8ep")
    assert [learning_rate(steps, phase, step) for step in (49, 50, 79, 80)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert learning_rate(Config(lr_scheduler="constant"), phase, 99) == 1.0
    assert [score_lr_factor("step", p) for p in (0.4, 0.5, 0.75)] == pytest.approx([1, 0.1, 0.01])
    assert score_lr_factor("cosine", 0.5) == pytest.approx(0.5)
    assert score_lr_factor("constant", 0.9) == 1.0


def test_plan():
    loaders = {"train": [0] * 10, "prune": [0] * 6}

    def plan(**changes):
        return [
            (p.name, p.epochs, p.steps_per_epoch, p.before) for p in make_plan(Config(epochs=3, **changes), loaders)
        ]

    assert plan(method="dense") == [("train", 3, 10, ())]
    assert plan(method="dense", init_from="x") == [("train", 3, 10, ("load",))]
    assert plan(method="bidst", accumulate=4) == [("train", 3, 2, ("start",))]
    assert plan(method="bip", pretrain_epochs=2, finetune_epochs=1) == [
        ("pretrain", 2, 10, ()),
        ("prune", 3, 6, ("start",)),
        ("finetune", 1, 10, ("finish",)),
    ]
    assert plan(method="imp", levels=1) == [("train", 3, 10, ("start",)), ("train", 3, 10, ("advance",))]
    assert plan(method="imp", levels=1, init_from="x") == [("train", 3, 10, ("start", "load", "advance"))]


def test_ema_averages_weights_and_statistics_and_copies_masks():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    sb.sparsify(model, 0.5, seed=0)
    ema = sb.EMA(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.masked_fill_(~model[0].mask, 0)
    old = ema.module[0].weight.clone()
    new_mask = ~model[0].mask
    with torch.no_grad():
        model[0].set_mask(new_mask)
        model[0].weight.copy_(torch.ones(4, 4) * new_mask)
        model[1].running_mean.fill_(1.0)
        model[1].num_batches_tracked.fill_(7)
    ema.update(model)
    decay = 2 / 11
    assert torch.equal(ema.module[0].mask, new_mask)
    expected = torch.where(new_mask, old * decay + (1 - decay), 0.0)
    torch.testing.assert_close(ema.module[0].weight, nn.Parameter(expected, requires_grad=False))
    torch.testing.assert_close(ema.module[1].running_mean, torch.full((4,), 1 - decay))
    assert ema.module[1].num_batches_tracked == 7
    again = sb.EMA(model, decay=0.5)
    again.load_state_dict(ema.state_dict())
    assert again.steps == 1
    assert_same(again.state_dict(), ema.state_dict())


def make_method(name, model):
    """A method whose masks change within a few steps."""
    optimizer = sgd(model)
    fast = {"score_lr": 5.0} if name in ("BiP", "HYDRA") else {"update_freq": 2}
    return optimizer, getattr(sb, name)(model, optimizer, **fast)


@pytest.mark.parametrize("name", ["BiDST", "RigL", "BiP", "HYDRA"])
def test_ema_in_a_loop_of_ones_own(name, tmp_path):
    """Scores come after it was made and go before it is done; its masks are the model's and its weights an average."""
    torch.manual_seed(0)
    model = sb.sparsify(tiny_net(), 0.8, seed=0)
    ema = sb.EMA(torch.compile(model), decay=0.5)  # wrapped, and never compiled
    optimizer, sparsifier = make_method(name, model)
    first = {n: m.mask.clone() for n, m in sb.sparse_layers(model)}
    average = {n: p.detach().clone() for n, p in ema.module.named_parameters()}
    for step in range(6):
        take_step(model, optimizer, sparsifier, step)
        if step == 4 and name in ("BiP", "HYDRA"):
            sparsifier.finish()
        ema.update(model)
        decay = min(0.5, (2 + step) / (11 + step))
        average = {n: decay * average[n] + (1 - decay) * p.detach() for n, p in model.named_parameters()}
        for n, layer in sb.sparse_layers(model):
            average[f"{n}.weight"][~layer.mask & (layer.weight == 0)] = 0
            assert torch.equal(ema.module.get_submodule(n).mask, layer.mask)
    assert not all(torch.equal(first[n], m.mask) for n, m in sb.sparse_layers(model))
    for n, p in ema.module.named_parameters():
        torch.testing.assert_close(p.detach(), average[n])
    assert not any("mask_scores" in key for key in ema.module.state_dict())
    assert not ema.module.training
    assert all(not layer.weight[~layer.mask].any() for _, layer in sb.sparse_layers(sb.densify(ema.module)))

    torch.save(ema.state_dict(), tmp_path / "ema.pth")
    again = sb.EMA(model)
    again.load_state_dict(torch.load(tmp_path / "ema.pth", weights_only=True))
    assert_same(again.state_dict(), ema.state_dict())
    x, _ = batch(99)
    torch.testing.assert_close(again.module(x), ema.module(x))


@pytest.mark.parametrize("name", ["RigL", "BiDST"])
def test_what_torchs_average_does_to_masks(name):
    """The reason for an EMA of our own: if this fails, torch has learned what a mask is, or to refuse it."""
    torch.manual_seed(0)
    model = sb.sparsify(tiny_net(), 0.8, seed=0)
    theirs = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    ours = sb.EMA(model, decay=0.5)
    optimizer, sparsifier = make_method(name, model)
    failed = None
    for step in range(6):
        take_step(model, optimizer, sparsifier, step)
        ours.update(model)
        try:
            theirs.update_parameters(model)
        except (RuntimeError, TypeError) as error:
            failed = error
            break
    masks = [(ours.module.get_submodule(n).mask, m.mask) for n, m in sb.sparse_layers(model)]
    assert all(torch.equal(a, b) for a, b in masks)
    right = [torch.equal(theirs.module.get_submodule(n).mask, m.mask) for n, m in sb.sparse_layers(model)]
    assert failed is not None or not all(right)


def test_ema_refuses_what_it_cannot_follow():
    model = tiny_net()
    ema = sb.EMA(model)
    before = ema.state_dict()["module"]["0.weight"].clone()
    sb.sparsify(model, 0.8)
    with pytest.raises(ValueError, match=r"differ in \['0.mask', '3.mask', '6.mask'\]. Make a new one"):
        ema.update(model)
    assert ema.steps == 0
    assert torch.equal(ema.module[0].weight, before)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay=.* is not allowed; expected a number in \[0, 1\)"):
            sb.EMA(model, decay)
    with pytest.raises(ValueError, match=r"state has the keys \['0.mask', .*; expected 'module' and 'steps'"):
        ema.load_state_dict(model.state_dict())


def test_ema_leaves_buffers_of_others_to_be_copied():
    """One that is called mask, as attention has it, is none of ours."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("mask", torch.zeros(4, dtype=torch.bool))
    ema = sb.EMA(sb.sparsify(model, 0.5))
    model.mask.fill_(True)
    ema.update(model)
    assert ema.module.mask.all()


def test_progress_line_has_an_eta(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    progress = Progress(Config(print_freq=2), total=10, done=4)
    progress.step(1)
    progress.step(1)
    assert "step 6/10" in (line := capsys.readouterr().out)
    assert "ETA 0:00:00" in line


# -- processes --------------------------------------------------------------------------------------------------------


def launch(*arguments, processes=None):
    """Start the command line in a process of its own, or under torchrun."""
    command = [sys.executable, "-m"]
    if processes:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In a folder where the source tree does not hide the installed package.
    return subprocess.Popen([*command, "sparsebilevel", *map(str, arguments)], env=environment, cwd=sys.prefix, **pipes)


def run(*arguments, processes=None, timeout=500):
    process = launch(*arguments, processes=processes)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def test_two_processes(tmp_path):
    """Ranks whose masks differ would raise."""
    flags = ["train", "--epochs", 1, "--method", "bidst", "--update-freq", 2, "--no-measure", "--model-ema"]
    code, output = run(*flags, "--batch-size", 128, "--output-dir", tmp_path, processes=2)
    assert code == 0, output
    rows = read_log(tmp_path)
    assert [row["type"] for row in rows].count("epoch") == 1
    assert rows[-1]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert rows[-1]["topology_changes"] > 0
    assert 0 < rows[-1]["bytes_sent"] < rows[-1]["bytes_sent_dense"]
    assert "gradients given to all_reduce" in output
    assert len(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["rng"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bip", "hydra", "imp", "rigl"])
def test_two_processes_resume(method, tmp_path):
    arguments = {"imp": ["--levels", 1], "rigl": ["--update-freq", 2]}
    flags = ["train", "--method", method, "--epochs", 2, "--batch-size", 64, "--no-measure", "--accumulate", 2]
    flags += arguments.get(method, ["--pretrain-epochs", 1, "--finetune-epochs", 1])
    code, output = run(*flags, "--output-dir", tmp_path / "whole", processes=2)
    assert code == 0, output
    flags += ["--output-dir", tmp_path / "parts", "--resume"]
    for steps in (["--max-steps", 7], ["--max-steps", 13], []):
        code, output = run(*flags, *steps, processes=2)
        assert code == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidst", "rigl", "imp", "bip"])
def test_sigterm_from_outside(method, tmp_path):
    flags = ["train", "--method", method, "--epochs", 12, "--batch-size", 32, "--no-measure", "--model-ema"]
    flags += {"imp": ["--levels", 1], "bip": ["--pretrain-epochs", 2]}.get(method, ["--update-freq", 7])
    code, output = run(*flags, "--output-dir", tmp_path / "whole")
    assert code == 0, output
    flags += ["--output-dir", tmp_path / "parts", "--resume"]
    process = launch(*flags, "--print-freq", 1)
    for line in process.stdout:
        if line.startswith("epoch   3/"):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    assert "--resume continues" in output
    assert read_log(tmp_path / "parts")[-1]["type"] == "epoch"
    code, output = run(*flags)
    assert code == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98])
def test_resnet50_preset_under_torchrun(sparsity, tmp_path):
    """The ImageNet recipe with two processes, bf16 autocast and compile on tiny random images; stopped and resumed."""
    import_torchvision = pytest.importorskip("sparsebilevel._torchvision").import_torchvision
    try:
        import_torchvision()
    except ImportError as error:
        pytest.skip(str(error))
    flags = ["train", "--preset", "bidst-resnet50-imagenet", "--sparsity", sparsity, "--data", "fake", "--no-measure"]
    flags += ["--image-size", 32, "--num-classes", 10, "--num-samples", 32, "--batch-size", 4, "--eval-batch-size", 16]
    flags += ["--epochs", 1, "--update-freq", 2, "--lr-warmup-epochs", 0, "--output-dir", tmp_path, "--resume"]
    flags += ["--compile"] if sparsity == 0.9 else []
    for steps in (2, 4):
        code, output = run(*flags, "--max-steps", steps, processes=2, timeout=580)
        assert code == 0, output
    result = read_log(tmp_path)[-1]
    assert result["step"] == 4
    assert result["costs"]["params_total"] == 23_528_522
    resolved = json.loads((tmp_path / "config.json").read_text())["resolved"]
    assert resolved["search_space"] == {0.9: 0.05, 0.95: 0.03, 0.98: 0.02}[sparsity]
    layers = next(row for row in read_log(tmp_path) if row["type"] == "layers")["layers"]
    assert layers[0]["density"] == 1.0  # the first layer is dense
    assert all(row["density"] == pytest.approx(1 - sparsity, abs=1e-3) for row in layers[1:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bidst", "rigl", "bip", "hydra", "imp"])
def test_compile(method, tmp_path):
    arguments = METHOD_ARGUMENTS[method]
    result = train(make_config(tmp_path / "compiled", method=method, compile=True, **arguments))
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-4)
    eager = train(make_config(tmp_path / "eager", method=method, **arguments))
    assert result["train_acc"] == pytest.approx(eager["train_acc"], abs=0.1)


@pytest.fixture
def two_ranks(tmp_path):
    """What the loop takes for two processes: a group of this one alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield Ranks(torch.device("cpu"), rank=0, world=2)
    torch.distributed.destroy_process_group()


def test_a_signal_that_only_another_rank_got(two_ranks, tmp_path, monkeypatch):
    """As where one of several machines is to be given back, or torchrun's signal has reached one rank so far."""

    def answer(values, op=None):
        if values.ndim == 0:  # the question after each step
            values.fill_(signal.SIGTERM)

    monkeypatch.setattr(torch.distributed, "all_reduce", answer)
    monkeypatch.setattr(Trainer, "save", lambda self: None)
    config = make_config(tmp_path / "run", method="dense")
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 1;") as caught:
        Trainer(config, RunFolder(config), two_ranks, StopSignals()).run()
    assert caught.value.exit_code == 143


def test_a_resumed_run_goes_on_counting_bytes(two_ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, value])
    config = make_config(tmp_path / "run", method="bidst", update_freq="2", max_steps=3)
    sent = Trainer(config, RunFolder(config), two_ranks, StopSignals()).run()["bytes_sent"]
    config = dataclasses.replace(config, max_steps=6, resume=True)
    result = Trainer(config, RunFolder(config), two_ranks, StopSignals()).run()
    assert (result["step"], 3 * result["bytes_sent"]) == (4, 4 * sent)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_ddp_does_not_send_masks_and_scores_at_every_forward(is_compiled, two_ranks, tmp_path):
    config = make_config(tmp_path / "run", method="bidst", update_freq="2", compile=is_compiled)
    trainer = Trainer(config, RunFolder(config), two_ranks, StopSignals())
    trainer.enter(trainer.plan[0])
    sent = {id(buffer) for buffer in trainer.net.modules_buffers}
    assert {id(b) for n, b in trainer.model.named_buffers() if "running" in n} <= sent
    ours = [b for _, layer in sb.sparse_layers(trainer.model) for b in (layer.mask, layer.mask_scores)]
    assert len(ours) == 10
    assert not sent & {id(b) for b in ours}


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("auto", 1), ("cuda:3", 3)])
def test_a_gpu_is_chosen_by_its_index(name, index, monkeypatch):
    """torch.cuda.set_device refuses a device without one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    with process_group(name) as ranks:
        assert ranks.device == torch.device("cuda", index)
    assert chosen == [index]


def test_numpys_numbers_and_paths_are_settings_that_can_be_saved(tmp_path):
    config = make_config(
        tmp_path / "run", method="rigl", lr=np.float64(0.05), batch_size=np.int64(64), sparsity=np.float32(0.5)
    )
    config.seed, config.quiet, config.update_freq = np.int32(3), np.bool_(True), 2  # also those that are set later
    config.output_dir = tmp_path / "run"
    train(config)
    kinds = {name: type(value) for name, value in dataclasses.asdict(config).items()}
    assert [kinds[name] for name in ("lr", "batch_size", "seed", "quiet")] == [float, int, int, bool]
    assert (config.update_freq, config.output_dir) == ("2", str(tmp_path / "run"))
    assert ckpt.load_checkpoint(tmp_path / "run")["config"] == dataclasses.asdict(config)
    train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize(
    ("name", "value"), [("data_path", 3.5), ("exclude", ("fc", 3)), ("nesterov", 1), ("opt", None)]
)
def test_settings_of_other_types_are_refused_before_anything_is_replaced(name, value, tmp_path):
    config = make_config(tmp_path / "run", method="static")
    train(config)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=name if name != "data_path" else "3.5"):
        train(dataclasses.replace(config, overwrite=True, data="mnist", **{name: value}))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_goes_on_with_its_own_data_alone(tmp_path):
    for folder, seed in (("easy", 0), ("hard", 1), ("copy", 0)):
        write_mnist(tmp_path / folder, seed)
    config = make_config(tmp_path / "run", method="static", arch="mlp", data="mnist", data_path=str(tmp_path / "easy"))
    config.batch_size = 16
    train(dataclasses.replace(config, epochs=2, max_steps=1))
    resumed = dataclasses.replace(config, epochs=2, resume=True)
    with pytest.raises(
        ValueError, match=r"resume: the run in .*run was trained on other data than mnist in data_path="
    ):
        train(dataclasses.replace(resumed, data_path=str(tmp_path / "hard")))
    train(dataclasses.replace(resumed, data_path=str(tmp_path / "copy")))


def write_mnist(folder, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for part, count in (("train", 80), ("t10k", 20)):
        for name, code, shape in (("images-idx3", 3, (count, 28, 28)), ("labels-idx1", 1, (count,))):
            values = rng.integers(0, 256 if code == 3 else 10, shape, np.uint8)
            head = bytes([0, 0, 8, code]) + np.array(shape, ">i4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(head + values.tobytes())


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX systems")
def test_two_processes_do_not_write_to_one_folder(tmp_path):
    config = make_config(tmp_path / "run", method="static")
    train(config)
    code = f"import fcntl, os, time; d = os.open({str(tmp_path / 'run')!r}, os.O_RDONLY); fcntl.flock(d, fcntl.LOCK_EX)"
    with subprocess.Popen([sys.executable, "-c", f"{code}; print(1, flush=True); time.sleep(60)"], stdout=-1) as other:
        other.stdout.readline()
        for changes in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"output_dir='.*run': another process is writing a run there"):
                train(dataclasses.replace(config, **changes))
        other.kill()
    train(dataclasses.replace(config, overwrite=True))


def test_training_leaves_torch_as_it_was(tmp_path):
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(make_config(tmp_path / "run", method="static", threads=threads + 1))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_num_threads() == threads
    finally:
        torch.use_deterministic_algorithms(False)


def test_milestones_in_steps_are_said_where_they_are_too_early_to_be_meant(tmp_path, caplog):
    config = make_config(tmp_path / "run", method="static", lr_scheduler="step", lr_milestones="1,2")
    train(config)
    assert "lr_milestones='1,2' are optimizer steps, all of them in the first epoch" in caplog.text
    caplog.clear()
    train(dataclasses.replace(config, lr_milestones="1ep,2ep", overwrite=True))
    assert "lr_milestones" not in caplog.text


def test_networks_that_images_are_too_small_for(tmp_path):
    with pytest.raises(ValueError, match=r"arch='vgg19_bn_cifar' does not run on samples of shape 1x8x8: "):
        train(make_config(tmp_path / "run", method="dense", arch="vgg19_bn_cifar"))
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume_is_said(tmp_path, caplog):
    train(make_config(tmp_path / "typo", method="static", resume=True, max_steps=1))
    assert f"resume: there is no run in {tmp_path / 'typo'}, and a new one starts" in caplog.text


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_is_the_loop_that_one_would_write(averaged, tmp_path):
    """Weights, losses, accuracies and averages of a dense run, of plain torch."""
    settings = {"method": "dense", "epochs": 3, "batch_size": 100, "accumulate": 3, "clip_grad_norm": 0.05, "seed": 5}
    settings |= {"label_smoothing": 0.1, "weight_decay": 0.05, "norm_weight_decay": 0.01, "lr": 0.05, "eval_freq": 2}
    config = make_config(tmp_path, **settings, lr_scheduler="constant", model_ema=averaged, model_ema_decay=0.9)
    train(config)
    rows = [row for row in read_log(tmp_path) if row["type"] == "epoch"]

    data = build.make_data(config, Ranks(torch.device("cpu")))
    torch.manual_seed(5)
    net = build.make_model(config, data, torch.device("cpu"))
    groups = [{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.05}]
    groups += [{"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.01}]
    optimizer, ema = torch.optim.SGD(groups, 0.05, momentum=0.9), sb.EMA(net, 0.9)
    for epoch, row in enumerate(rows):
        net.train()
        batches, seen, steps = data.train.iterate(epoch), [], len(data.train) // 3
        for _ in range(steps):
            optimizer.zero_grad()
            for x, y in itertools.islice(batches, 3):
                logits = net(x)
                loss = F.cross_entropy(logits, y, label_smoothing=0.1)
                (loss / 3).backward()
                seen.append((loss.item(), float((logits.argmax(1) == y).float().mean())))
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
            ema.update(net)
        assert row["step"] == (epoch + 1) * steps
        expected = np.mean(seen, axis=0)
        assert (row["train_loss"], row["train_acc"]) == pytest.approx(tuple(expected), rel=1e-4)
        assert row["time_images_per_s"] == pytest.approx(300 * steps / row["time_epoch_s"])
        assert ("test_acc" in row) == (epoch > 0)  # every second one, and the last
        for name, loader in [("val", data.val), ("test", data.test)] if epoch else []:
            with torch.no_grad():
                pairs = [((ema.module if averaged else net.eval())(x), y) for x, y in loader]
            logits, y = map(torch.cat, zip(*pairs, strict=True))
            assert row[f"{name}_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-3)
            assert row[f"{name}_acc"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    state = ckpt.load_checkpoint(tmp_path)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-3, atol=1e-5)
        if averaged:
            torch.testing.assert_close(state["ema"][name], ema.module.state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rewind", ["init", "pretrained"])
def test_bip_rewinds_to_weights_of_before_its_phase(rewind, tmp_path, monkeypatch):
    """Which training must not have moved meanwhile: with finetune_lr=0 they are what the checkpoint holds."""
    start, start_method = {}, Trainer.start_method

    def note(self, model, optimizer):
        if model is self.model:  # and not the copy on which the method is tried
            start.update({name: value.clone() for name, value in model.state_dict().items()})
        return start_method(self, model, optimizer)

    monkeypatch.setattr(Trainer, "start_method", note)
    changes = {"rewind": rewind, "finetune_epochs": 1, "finetune_lr": 0.0, "pretrain_epochs": int(rewind != "init")}
    train(make_config(tmp_path, method="bip", **changes))
    end = ckpt.load_checkpoint(tmp_path)["model"]
    for name in ckpt.masked_layers(end):
        mask = end[f"{name}.mask"]
        assert 0 < mask.sum() < mask.numel()
        torch.testing.assert_close(end[f"{name}.weight"][mask], start[f"{name}.weight"][mask], rtol=0, atol=0)


def test_the_upper_level_is_smoothed_and_clipped_as_the_lower_one(tmp_path, monkeypatch):
    given, upper_step = [], sb.BiP.upper_step

    def note(self, loss, scaler=None, *, max_norm=None):
        given.append((float(loss()), max_norm))
        return upper_step(self, loss, scaler, max_norm=max_norm)

    monkeypatch.setattr(sb.BiP, "upper_step", note)
    for smoothing in (0.0, 0.5):
        settings = {"label_smoothing": smoothing, "clip_grad_norm": 0.25, "max_steps": 1}
        train(make_config(tmp_path / str(smoothing), method="bip", **settings))
    (plain, _), (smoothed, _) = given
    assert abs(plain - smoothed) > 1e-4
    assert [max_norm for _, max_norm in given] == [0.25, 0.25]


def test_overwriting_leaves_no_best_network_of_the_run_before(tmp_path):
    train(make_config(tmp_path, method="static"))
    assert (tmp_path / "best.pth").exists()
    train(make_config(tmp_path, method="static", validation=0, overwrite=True))
    assert not (tmp_path / "best.pth").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    """The row of an epoch is written before the checkpoint; that it is all there is loses nothing."""
    train(make_config(tmp_path, method="static"))
    expected = timeless(tmp_path)
    (tmp_path / "checkpoint.pth").unlink()
    lines = (tmp_path / "log.jsonl").read_text().splitlines(True)
    first = next(i for i, line in enumerate(lines) if json.loads(line)["type"] == "epoch")
    (tmp_path / "log.jsonl").write_text("".join(lines[: first + 1]))
    train(make_config(tmp_path, method="static", resume=True))
    assert timeless(tmp_path) == expected


@pytest.mark.parametrize("max_steps", [None, 7])
def test_what_a_person_sees(max_steps, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train(make_config(tmp_path, method="static", quiet=False, print_freq=1, max_steps=max_steps))
    out, row = capsys.readouterr().out, [row for row in read_log(tmp_path) if row["type"] == "epoch"][-1]
    steps = 10 if max_steps is None else 7
    assert f"step {steps}/{steps} " in out
    for name in ("train", "val", "test"):
        assert f"{name} {100 * row[f'{name}_acc']:.2f} %" in out.splitlines()[-1]


@pytest.mark.parametrize("name", ["BiDST", "BiP"])
def test_ema_of_a_model_whose_method_collects_does_not(name):
    torch.manual_seed(0)
    model = sb.sparsify(tiny_net(), 0.8, seed=0)
    optimizer, sparsifier = make_method(name, model)
    take_step(model, optimizer, sparsifier, 0)
    ema = sb.EMA(model)
    assert all(layer.score_support == "none" for _, layer in sb.sparse_layers(ema.module))
    assert not ema.module(batch(0)[0]).requires_grad


def test_ema_of_a_kept_weight_that_is_zero_is_an_average():
    model = sb.sparsify(nn.Linear(4, 4), 0.5, seed=0)
    ema = sb.EMA(model)
    before = ema.module.weight.clone()
    with torch.no_grad():
        model.weight.zero_()
    ema.update(model)
    torch.testing.assert_close(ema.module.weight.detach(), before * model.mask * (2 / 11))


def test_fp16_clips_what_the_optimizer_steps_by(tmp_path):
    """Gradients as they are, not as the scaler holds them, 65536 times as large: of those 100 would cut most off."""
    ends = []
    for name, value in (("given", 100.0), ("none", None)):
        config = make_config(tmp_path / name, method="static", arch="mlp", batch_size=64, amp="fp16", max_steps=4)
        train(dataclasses.replace(config, clip_grad_norm=value))
        ends.append(ckpt.load_checkpoint(tmp_path / name)["model"])
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_in_fp16_goes_on_with_its_scale(tmp_path):
    whole = make_config(tmp_path / "whole", method="static", arch="mlp", batch_size=64, amp="fp16", max_steps=9)
    train(whole)
    parts = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"), resume=True)
    train(dataclasses.replace(parts, max_steps=4))
    train(parts)
    one, two = (ckpt.load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert_same(one["scaler"], two["scaler"])
    assert two["scaler"]["_growth_tracker"] == 9
    assert_same(one["model"], two["model"])


@pytest.mark.parametrize("scheduler", ["cosine", "step"])
def test_the_scores_step_size_falls_over_the_whole_phase(scheduler, tmp_path, monkeypatch):
    rates, step = [], sb.HYDRA.step

    def note(self, *args, **kwargs):
        rates.append(self.score_lr)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sb.HYDRA, "step", note)
    train(make_config(tmp_path, method="hydra", score_lr=0.3, score_lr_scheduler=scheduler))
    assert rates == pytest.approx([0.3 * score_lr_factor(scheduler, i / 10) for i in range(10)])


def test_warm_up_of_a_part_of_an_epoch_is_rounded():
    """0.29 times 100 is 28.999999999999996."""
    phase = Phase("train", epochs=1, steps_per_epoch=100, lr=1.0, weight_decay=0)
    config = Config(lr_warmup_epochs=0.29, lr_scheduler="constant")
    rates = [learning_rate(config, phase, step) for step in range(30)]
    assert rates == pytest.approx([*((i + 1) / 29 for i in range(29)), 1.0])
