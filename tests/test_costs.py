"""Costs: published sizes and counts, tied and unusual layers, and that counting leaves no trace."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn

import sparsebilevel as sb
from sparsebilevel import costs
from sparsebilevel.kernels import PASSES, native
from sparsebilevel.models import create_model


@pytest.fixture(scope="module")
def resnet50():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    with torch.device("meta"):
        return create_model("resnet50", num_classes=1000)


@pytest.mark.parametrize(
    ("sparsity", "distribution", "megabytes"),
    [
        (None, None, 102.122),
        (0.9, "erk", 13.499),
        (0.95, "erk", 8.399),
        (0.9, "uniform", 13.532),
        (0.95, "uniform", 8.433),
        (0.99, "erk", 4.354),
    ],
)
def test_sizes_published_for_rigl(resnet50, sparsity, distribution, megabytes):
    """Evci et al. 2020, README of google-research/rigl; algorithms.md section 7.1."""
    model = copy.deepcopy(resnet50)
    if sparsity is not None:
        # With 99 % too, the published network has a dense first layer, outside the budget of the others.
        stem_is_dense = distribution == "uniform" or sparsity == 0.99
        sb.sparsify(model, sparsity, distribution, exclude=["conv1"] if stem_is_dense else [])
    assert round(costs.count_costs(model, (3, 224, 224)).size_bytes / 1e6, 3) == megabytes


@pytest.mark.parametrize(
    ("sparsity", "distribution", "ratio"), [(0.8, "erk", 0.4138), (0.9, "erk", 0.2418), (0.9, "uniform", 0.1260)]
)
def test_flops_published_for_rigl(resnet50, sparsity, distribution, ratio):
    model = sb.sparsify(copy.deepcopy(resnet50), sparsity, distribution, dense_first=distribution == "uniform")
    found = costs.count_costs(model, (3, 224, 224))
    assert found.flops_dense == pytest.approx(2 * 4089.18e6, rel=1e-4)
    assert found.flops_theoretical / found.flops_dense == pytest.approx(ratio, abs=6e-5)


def test_counts_of_resnet20_are_the_same_on_cpu_and_meta_device(monkeypatch):
    model = sb.sparsify(create_model("resnet20"), 0.9, "erk")
    found = costs.count_costs(model, (3, 32, 32))
    assert found == costs.count_costs(model, (3, 32, 32), device="cpu")
    assert found == costs.count_costs(copy.deepcopy(model).to("meta"), (3, 32, 32))
    assert found.params_total == 269_722
    assert found.flops_dense == pytest.approx(2 * 40.55e6, rel=1e-3)
    kept = sum(int(layer.mask.sum()) for _, layer in sb.sparse_layers(model))
    assert found.params_nonzero == 269_722 - 268_336 + kept
    assert found.compression == 269_722 / found.params_nonzero
    assert found.sparsity == found.global_sparsity == pytest.approx(0.9, abs=1e-5)
    assert found.flops_theoretical <= found.flops_executed <= found.flops_dense  # as the kernels are chosen
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "dense")
    assert costs.count_costs(model, (3, 32, 32)).flops_executed == found.flops_dense
    assert found.flops_theoretical / found.flops_dense == pytest.approx(0.1857, abs=1e-4)
    assert sum(row["flops_theoretical"] for row in found.layers) == found.flops_theoretical
    assert json.loads(json.dumps(found.to_dict()))["speedup"] == pytest.approx(found.speedup)


def test_densified_network_costs_what_the_sparse_one_does():
    model = sb.sparsify(create_model("digits_cnn"), 0.9)
    sparse, dense = (costs.count_costs(m, (1, 8, 8)) for m in (model, sb.densify(model)))
    assert dense.params_nonzero == sparse.params_nonzero
    assert dense.flops_theoretical == sparse.flops_theoretical
    assert dense.global_sparsity == sparse.global_sparsity
    assert dense.sparsity == 0  # it has no masks


def test_counting_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    sb.sparsify(model, 0.5)
    model[1].eval()
    state, flags, rng = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], torch.get_rng_state()
    for device in (None, "cpu"):
        costs.count_costs(model, (3, 8, 8), device)
    costs.measure_step(model, (2, 3, 8, 8), 2, repeats=2)
    costs.measure_layers(model, torch.zeros(2, 3, 8, 8), repeats=2)
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_tied_and_repeated_layers_count_once_in_parameters_and_at_each_use_in_flops():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model = sb.sparsify(Tied(), 0.75)
    found = costs.count_costs(model, (8,))
    assert (found.params_total, found.params_nonzero) == (64, 16)
    assert (found.flops_dense, found.flops_theoretical) == (3 * 128, 3 * 32)
    assert [row["name"] for row in found.layers] == ["a"]


def test_attention_grouped_and_transposed_layers():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = costs.count_costs(encoder, (5, 16))
    assert found.flops_dense == found.flops_executed == 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32)
    convolutions = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ConvTranspose2d(8, 2, 2, stride=2))
    found = costs.count_costs(convolutions, (4, 6, 6))
    assert found.flops_dense == found.flops_executed == 2 * 36 * (8 * 2 * 9 + 8 * 2 * 4)


def test_scores_are_no_part_of_the_network():
    model = sb.sparsify(nn.Linear(4, 4), 0.5)
    model.set_mask_scores(nn.Parameter(torch.rand(4, 4)))
    found = costs.count_costs(model, (4,))
    assert (found.params_total, found.params_nonzero) == (20, 12)
    assert found.size_bytes == 4 * 12 + 2


def test_values_in_control_flow_run_on_the_models_own_device():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x) if bool(x.sum() == 0) else x

    assert costs.count_costs(Branching(), (4,)).flops_dense == 24


def test_network_without_layers():
    found = costs.count_costs(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), (4,))
    assert (found.params_total, found.flops_dense, found.speedup, found.compression) == (8, 0, 1.0, 1.0)


def test_wrong_input_shape_is_named():
    with pytest.raises(ValueError, match=r"input_shape=\(4, 8, 8\).*Sequential"):
        costs.count_costs(create_model("digits_cnn"), (4, 8, 8))
    for shape in (8, (1, 8, 8.0), (1, 0, 8), "188"):
        with pytest.raises(ValueError, match=r"input_shape=.* is not allowed; expected the shape of one sample"):
            costs.count_costs(create_model("digits_cnn"), shape)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "mobilenet_v3_small", "inception_v3", "densenet121"])
def test_torchvision_models(name):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    with torch.device("meta"):
        model = create_model(name, num_classes=1000, **({"init_weights": False} if name == "inception_v3" else {}))
    found = costs.count_costs(model, (3, 299, 299) if name == "inception_v3" else (3, 224, 224))
    macs = {"vit_b_16": 16.87e9, "swin_t": 4.3e9, "mobilenet_v3_small": 56.5e6, "inception_v3": 5.71e9}
    assert found.flops_dense == pytest.approx(2 * macs.get(name, 2.834e9), rel=0.02)


def test_measured_step():
    model = sb.sparsify(create_model("mlp"), 0.9)
    times = costs.measure_step(model, (8, 64), 10, repeats=3)
    assert times["ratio"] == pytest.approx(times["dense_ms"] / times["sparse_ms"])
    assert times["repeats"] == 3
    assert costs.measure_step(model, (8, 64), 10, repeats=10_000, budget_s=0.0)["repeats"] == 1
    with pytest.raises(ValueError, match="batch_shape"):
        costs.measure_step(model, (0, 64), 10)
    for name, value in (("repeats", 0), ("repeats", 1.5), ("num_classes", 0), ("num_classes", "10"), ("budget_s", -1)):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
            costs.measure_step(model, (8, 64), **{"num_classes": 10, name: value})


def test_measured_layers():
    model = sb.sparsify(create_model("digits_cnn"), 0.9)
    rows = costs.measure_layers(model, torch.zeros(2, 1, 8, 8), repeats=2)
    assert [row["name"] for row in rows] == [name for name, _ in sb.sparse_layers(model)]
    assert rows[1]["input_shape"] == [2, 32, 8, 8]
    for row, (_, layer) in zip(rows, sb.sparse_layers(model), strict=True):
        assert row["ratio"] == layer.measured_ratio > 0
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        # Nobody needs the gradient of the images.
        assert list(row["passes"]) == [what for what in PASSES if what != "input_grad" or row is not rows[0]]
        assert {what: found["ratio"] for what, found in row["passes"].items()} == layer.measured_passes
        assert all(found["backend"] == layer.backends[what].name for what, found in row["passes"].items())


def test_measured_passes_are_those_that_training_asks_for(monkeypatch):
    model = sb.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5)
    model[1].requires_grad_(False)
    model[1].collect("all")  # HYDRA: the weight is frozen, its scores learn
    calls = []
    masked_linear = importlib.import_module("sparsebilevel.kernels.masked_linear")
    backward = masked_linear._dense_backward
    monkeypatch.setattr(masked_linear, "_dense_backward", lambda *a, **k: calls.append(a[5]) or backward(*a, **k))
    first, second = costs.measure_layers(model, torch.zeros(2, 8), repeats=1)
    assert list(first["passes"]) == ["forward", "weight_grad"]
    assert list(second["passes"]) == ["forward", "input_grad"]  # the dense twin has nothing to set against the scores
    asked = {tuple(name for name, need in needs._asdict().items() if need) for needs in calls}
    weights = ("weight", "bias")
    assert asked == {weights, ("input",), ("sink",), ("input", "sink")}
    assert model[0].weight.grad is None
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
def test_measured_step_in_layout():
    model = sb.sparsify(create_model("resnet20"), 0.9)
    times = costs.measure_step(model, (2, 3, 8, 8), 10, repeats=1, in_layout=True)
    assert times["in_layout_ratio"] == pytest.approx(times["dense_ms"] / times["in_layout_ms"])
    assert not isinstance(model, sb.layout.InLayout)


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
def test_sparse_kernels_execute_what_the_mask_keeps(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3))
    sb.sparsify(model, 0.75, exclude=["0"])
    for backend in ("sparse", "dense"):
        monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
        first, second = costs.count_costs(model, (3, 8, 8)).layers
        assert first["flops_executed"] == first["flops_dense"]
        expected = second["flops_theoretical"] if backend == "sparse" else second["flops_dense"]
        assert second["flops_executed"] == expected
    assert second["flops_theoretical"] < second["flops_dense"]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_on_inputs_that_are_not_contiguous(bias):
    """torch takes bmm there where no gradient is asked for."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 32, bias=bias)

        def forward(self, x):
            y = self.linear(x.flatten(2).transpose(1, 2))
            return y @ y.transpose(1, 2)  # of activations, which do not count

    for device in (None, "cpu"):
        found = costs.count_costs(Tokens(), (8, 8, 8), device)
        assert found.flops_dense == found.layers[0]["flops_dense"] == 2 * 64 * 8 * 32
    sparse = sb.sparsify(Tokens(), 0.5)
    assert costs.count_costs(sparse, (8, 8, 8)).flops_theoretical == 64 * 8 * 32


def test_recurrent_layers_cost_the_same_on_every_device():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(24, 5)

        def forward(self, x):
            return self.fc(self.rnn(x)[0][:, -1])

    steps, directions = 6, 2
    by_hand = 2 * steps * directions * (4 * 12 * (8 + 12) + 4 * 12 * (24 + 12)) + 2 * 24 * 5
    for device in (None, "cpu"):
        assert costs.count_costs(Network(), (6, 8), device).flops_dense == by_hand


def test_batched_products_with_a_weight_count():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3, 8, 4)), nn.Parameter(torch.ones(3, 1, 4))

        def forward(self, x):  # [B, 3, 8]
            y = torch.baddbmm(self.bias, x.movedim(1, 0), self.weight)
            return torch.baddbmm(y, y, y.new_ones(3, 4, 4)).sum()  # of activations

    assert costs.count_costs(Experts(), (3, 8)).flops_dense == 2 * 3 * 8 * 4


def test_bits_of_masks_are_rounded_up_to_bytes():
    model = sb.sparsify(nn.Linear(3, 3, bias=False), 0.5, seed=0)  # nine bits, of whichever four weights stay
    kept = int(model.mask.sum())
    assert costs.count_costs(model, (3,)).size_bytes == 4 * kept + 2


def test_measures_networks_that_return_more_than_classes():
    class Two(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y.square().sum()

    model = nn.Sequential(sb.sparsify(nn.Sequential(nn.Linear(16, 8)), 0.5), Two(8, 4))
    assert costs.measure_step(model, (4, 16), 4, repeats=1)["sparse_ms"] > 0


def test_masks_that_keep_all_take_no_bytes():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    dense = costs.count_costs(model, (16,)).size_bytes
    assert costs.count_costs(sb.sparsify(model, 0.5, init="dense"), (16,)).size_bytes == dense
