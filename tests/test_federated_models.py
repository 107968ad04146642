"""Gates, the hypernetwork, what gates cost, and slicing."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sparsebilevel.costs import count_costs
from sparsebilevel.federated.flops import GateCosts, budget_penalty, parse_budgets
from sparsebilevel.federated.hypernetwork import Hypernetwork, merge_gates, open_threshold, sample_gates
from sparsebilevel.federated.models import (
    GatePoint,
    StandardizedConv2d,
    apply_gates,
    check_gate_points,
    find_gate_points,
    gate_sizes,
    layers_changed_by_slicing,
    set_norm,
    slice_gates,
)
from sparsebilevel.models import create_model, list_models


def network(name="resnet20", norm="batch", size=8):
    model = set_norm(create_model(name), norm)
    for module in model.modules():  # as after training: no channel is like another
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), torch.randn(3, 3, size, size)


def random_gates(model, points, share=0.6):
    gates = [torch.rand(size) < share for size in gate_sizes(model, points)]
    for gate in gates:
        gate[0] = True
    return torch.cat(gates)


# -- gate points -------------------------------------------------------------------------------------------------------


def test_resnet56_has_the_papers_gates():
    model = create_model("resnet56")
    points = find_gate_points(model)
    assert gate_sizes(model, points) == [16] * 9 + [32] * 9 + [64] * 9
    assert points[0] == GatePoint("stages.0.0", "stages.0.0.conv1", ("stages.0.0.bn1",), "stages.0.0.conv2")


@pytest.mark.parametrize(("name", "blocks"), [("resnet18_cifar", 8), ("resnet34_cifar", 16)])
def test_resnets_have_a_gate_a_block(name, blocks):
    assert len(find_gate_points(create_model(name))) == blocks


def test_mobilenet_gates_stand_before_and_after_the_depthwise_convolution():
    model = create_model("mobilenet_v2_cifar")
    points = find_gate_points(model)
    assert len(points) == 17
    block = "blocks.1"
    assert points[1] == GatePoint(
        block, f"{block}.conv1", (f"{block}.bn1", f"{block}.conv2", f"{block}.bn2"), f"{block}.conv3"
    )
    assert gate_sizes(model, points)[:3] == [32, 96, 144]


def test_bottlenecks_have_two_gates():
    points = find_gate_points(create_model("resnet50"))
    assert len(points) == 32
    assert [point.name for point in points[:2]] == ["layer1.0", "layer1.0:2"]
    assert points[0].consumer == points[1].producer == "layer1.0.conv2"


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no residual blocks"):
        find_gate_points(create_model("digits_cnn"))


def test_gates_multiply_what_the_next_convolution_reads():
    model, x = network()
    points = find_gate_points(model)[:1]
    gates = torch.rand(16)
    block = model.stages[0][0]
    seen = {}
    block.conv2.register_forward_hook(lambda _m, args, _o: seen.update(inside=args[0]))
    with apply_gates(model, points, gates):
        model(x)
    stem = model.relu(model.bn1(model.conv1(x)))
    assert_close(seen["inside"], block.relu(block.bn1(block.conv1(stem))) * gates.view(1, -1, 1, 1))
    plain = model(x)
    with apply_gates(model, points, torch.ones(16)):
        assert torch.equal(model(x), plain)
    with pytest.raises(ValueError, match=r"\[15\] do not fit; expected \[16\]"), apply_gates(model, points, gates[1:]):
        pass


def test_gradients_reach_gates():
    model, x = network("mobilenet_v2_cifar", size=4)
    model.double()
    points = find_gate_points(model)[:2]
    gates = torch.rand(128, dtype=torch.float64, requires_grad=True)

    def output(values):
        with apply_gates(model, points, values):
            return model(x.double()[:1]).sum(1)

    assert torch.autograd.gradcheck(output, gates, fast_mode=True)


# -- normalization -----------------------------------------------------------------------------------------------------


def test_group_norm_takes_the_place_of_batch_norm():
    model = set_norm(create_model("resnet20"), "group")
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 19
    assert {m.num_groups for m in norms} == {1}
    assert all(torch.equal(m.weight, torch.full_like(m.weight, 0.5)) for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, StandardizedConv2d) for m in model.modules()) == 19
    mobile = set_norm(create_model("mobilenet_v2_cifar"), "group", standardize=False)
    assert not any(isinstance(m, StandardizedConv2d) for m in mobile.modules())
    with pytest.raises(ValueError, match="norm='layer'"):
        set_norm(model, "layer")


def test_standardized_filters():
    layer = StandardizedConv2d(4, 3, 3, padding=1, bias=False).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = torch.stack([(w - w.mean()) / (w.std() + 1e-5) for w in layer.weight])
    assert_close(layer(x), nn.functional.conv2d(x, weight, padding=1))


# -- slicing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "resnet18_cifar", "mobilenet_v2_cifar", "resnet50"])
def test_sliced_networks_compute_what_closed_gates_do(name):
    model, x = network(name, size=64 if name == "resnet50" else 8)
    points = find_gate_points(model)
    gates = random_gates(model, points)
    assert layers_changed_by_slicing(model, points) == {}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = slice_gates(model, points, gates)
    with torch.no_grad(), apply_gates(model, points, gates.float()):
        expected = model(x)
    assert_close(small(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert gate_sizes(small, points) == [int(part.sum()) for part in gates.split(gate_sizes(model, points))]


@pytest.mark.parametrize("name", [*list_models(), "resnet50"])
def test_one_channel_at_each_gate_point_is_a_network(name):
    """Filters of a single weight, as 1x1 convolutions have then, cannot be standardized."""
    model = set_norm(create_model(name))
    try:
        points = find_gate_points(model)
    except ValueError:
        pytest.skip("has no gate points")
    sizes = gate_sizes(model, points)
    gates = torch.zeros(sum(sizes), dtype=torch.bool)
    gates[torch.tensor([0, *sizes[:-1]]).cumsum(0)] = True
    small = slice_gates(model, points, gates).eval()
    output = small(torch.randn(2, 3, 32, 32))
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in small.parameters())


def test_statistics_over_channels_are_said_to_change():
    model, x = network(norm="group")
    points = find_gate_points(model)
    every = torch.ones(sum(gate_sizes(model, points)), dtype=torch.bool)
    assert_close(slice_gates(model, points, every)(x), model(x))
    changed = layers_changed_by_slicing(model, points)
    assert set(changed) == {name for point in points for name in (*point.channelwise, point.consumer)}
    gates = random_gates(model, points)
    small = slice_gates(model, points, gates)
    with torch.no_grad(), apply_gates(model, points, gates.float()):
        difference = (small(x) - model(x)).abs().max()
    assert difference > 1e-2  # or nothing would have to be said


def test_one_group_a_channel_is_the_same_function():
    model, x = network()
    for block in (block for stage in model.stages for block in stage):
        block.bn1 = nn.GroupNorm(block.bn1.num_features, block.bn1.num_features)
    points = find_gate_points(model)
    gates = random_gates(model, points)
    assert layers_changed_by_slicing(model, points) == {}
    small = slice_gates(model, points, gates)
    with torch.no_grad(), apply_gates(model, points, gates.float()):
        assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)
    model.stages[0][0].bn1 = nn.GroupNorm(4, 16)
    with pytest.raises(ValueError, match="has 4 groups"):
        slice_gates(model, points, gates)


def test_bad_gates_are_refused():
    model, _ = network()
    points = find_gate_points(model)
    gates = random_gates(model, points)
    gates[:16] = False
    with pytest.raises(ValueError, match="closes all channels of 'stages.0.0'"):
        slice_gates(model, points, gates)
    with pytest.raises(ValueError, match=r"expected torch.bool \[336\]"):
        slice_gates(model, points, gates.float())


# -- costs -------------------------------------------------------------------------------------------------------------


def test_t_of_all_gates_is_the_total():
    model = create_model("resnet56")
    points = find_gate_points(model)
    costs = GateCosts(model, points, (3, 32, 32))
    assert costs.total == 126_590_976  # DWNP's code
    assert float(costs(torch.ones(1008))) == costs.total
    for share, expected in ((0.8, 0.801), (0.5, 0.503)):
        assert_close(float(costs.ratio(torch.full((1008,), share))), expected, rtol=0, atol=5e-4)
    assert costs.true_total == count_costs(model, (3, 32, 32)).flops_dense


def test_t_follows_the_papers_formula():
    model = create_model("resnet20")
    points = find_gate_points(model)
    costs = GateCosts(model, points, (3, 32, 32))
    gates = random_gates(model, points)
    expected = 0
    for gate, block in zip(gates.split(costs.sizes), itertools.chain(*model.stages), strict=True):
        c, width = int(gate.sum()), block.conv2.out_channels
        area = 1024 * 16**2 // width**2
        expected += 9 * block.conv1.in_channels * c * area + 3 * c * area + 9 * c * width * area + 3 * width * area
    assert float(costs(gates)) == expected


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet20", "resnet18_cifar", "mobilenet_v2_cifar", "resnet50"])
def test_the_true_count_is_that_of_the_sliced_network(name, norm):
    shape = (3, 64, 64) if name == "resnet50" else (3, 16, 16)
    model, _ = network(name, norm)
    points = find_gate_points(model)
    costs = GateCosts(model, points, shape)
    gates = random_gates(model, points)
    small = slice_gates(model, points, gates)
    assert costs.true_flops(gates) == count_costs(small, shape).flops_dense < costs.true_total
    assert float(costs(gates)) == GateCosts(small, points, shape).total
    assert costs.kept(gates) == gate_sizes(small, points)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2_cifar", "resnet50"])
def test_t_has_the_right_gradient(name):
    model = create_model(name)
    costs = GateCosts(model, find_gate_points(model), (3, 32, 32))
    gates = torch.rand(sum(costs.sizes), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(costs.ratio, gates, fast_mode=True)


def test_penalties():
    ratio = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    assert_close(budget_penalty(ratio, 0.5).item(), math.log(1.5))
    (gradient,) = torch.autograd.grad(budget_penalty(ratio, 0.5), ratio)
    assert_close(gradient.item(), 1 / 0.75)
    below = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    assert budget_penalty(below, 0.5).item() == 0
    assert torch.autograd.grad(budget_penalty(below, 0.5), below)[0].item() == 0
    assert_close(budget_penalty(below, 0.5, two_sided=True).item(), math.log(2))
    (gradient,) = torch.autograd.grad(budget_penalty(below, 0.5, two_sided=True), below)
    assert_close(gradient.item(), -1 / 0.25)
    for near in (0.4951, 0.5, 0.5049):
        inside = torch.tensor(near, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(budget_penalty(inside, 0.5, two_sided=True), inside)[0].item() == 0
    for budget in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"budget={budget} is not allowed; expected a number in \(0, 1\]"):
            budget_penalty(ratio, budget)


@settings(max_examples=40, deadline=None)
@given(budget=st.floats(0.15, 1.0), fill=st.booleans(), seed=st.integers(0, 1000))
def test_exported_gates_keep_to_the_budget_and_close_no_more_than_they_must(costs, budget, fill, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(costs.sizes), generator=generator)
    within = torch.rand(len(logits), generator=generator) < 0.9
    for part in within.split(costs.sizes):
        part[3] = True
    gates = costs.fit(logits, budget, within, fill=fill)
    assert float(costs(gates)) <= budget * costs.total
    assert not (gates & ~within).any()
    assert min(costs.kept(gates)) >= 1
    wanted = within if fill else within & (logits > 0)
    left = (wanted & ~gates).nonzero().flatten()
    if len(left):  # the next one would not fit, and none that is closed is better than one that is open
        one_more = gates.clone()
        one_more[left[logits[left].argmax()]] = True
        assert float(costs(one_more)) > budget * costs.total
    for gate in left.tolist() if fill else ():  # and no other one does either
        one_more = gates.clone()
        one_more[gate] = True
        assert float(costs(one_more)) > budget * costs.total


@pytest.fixture(scope="module")
def costs():
    model = create_model("resnet20")
    return GateCosts(model, find_gate_points(model), (3, 32, 32))


def test_gates_that_fit_stay_as_they_are(costs):
    logits = torch.randn(sum(costs.sizes))
    assert torch.equal(costs.fit(logits, 1.0), logits > 0)


def test_impossible_budgets_are_refused(costs):
    logits = torch.randn(sum(costs.sizes))
    with pytest.raises(ValueError, match="budget=0.01 cannot be met: one channel at each gate point costs 0.0"):
        costs.fit(logits, 0.01)
    with pytest.raises(ValueError, match="budget=0 is not allowed"):
        costs.fit(logits, 0)
    with pytest.raises(ValueError, match="NaN"):
        costs.fit(logits * torch.nan, 0.5)


def test_budgets():
    assert parse_budgets("device_flops", "0.5", 3) == [0.5] * 3
    assert parse_budgets("device_flops", 0.5, 2) == [0.5] * 2
    assert parse_budgets("device_flops", "0.3,0.5", 2) == [0.3, 0.5]
    drawn = parse_budgets("device_flops", "uniform:0.3:0.7", 40, seed=1)
    assert 0.3 <= min(drawn) < 0.4 < 0.6 < max(drawn) <= 0.7
    assert drawn == parse_budgets("device_flops", "uniform:0.3:0.7", 40, seed=1)
    for text in ("0", "1.1", "0.5,0.5", "uniform:0.3", "half", "nan"):
        with pytest.raises(ValueError, match="device_flops='"):
            parse_budgets("device_flops", text, 3)


# -- gates and the hypernetwork ----------------------------------------------------------------------------------------


def test_the_hypernetwork_has_the_codes_sizes():
    sizes = [16] * 9 + [32] * 9 + [64] * 9
    network = Hypernetwork(sizes, 10, shared=False)
    gru = sum(p.numel() for p in network.server.gru.parameters())
    heads = sum(p.numel() for name, p in network.devices.named_parameters() if name.startswith("heads"))
    assert (gru, heads) == (148_992, 258_048)
    assert network.embedding.weight.shape == (10, 27 * 64)
    shared = Hypernetwork(sizes, 10)
    assert shared.embedding.weight.shape == (11, 27 * 64)
    assert shared.devices is None


@pytest.mark.parametrize("shared", [True, False])
def test_all_gates_start_open_and_devices_differ(shared):
    network = Hypernetwork([16, 32, 64], 4, shared=shared)
    server, devices = network.logits()
    assert server.shape == (112,)
    assert devices.shape == (4, 112)
    assert server.min() > 0
    assert devices.min() > 0
    assert_close(network(torch.tensor([3, 0])), torch.stack([devices[2], server]))
    assert (devices[0] - devices[1]).abs().max() > 1e-3
    assert (devices[0] - server).abs().max() > 1e-3
    alone = Hypernetwork([16, 32], 0, shared=shared)
    assert alone.logits()[1].shape == (0, 48)


def test_devices_learn_from_their_own_row():
    network = Hypernetwork([8, 8], 3)
    network(torch.tensor([0, 2])).sum().backward()
    touched = network.embedding.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("noise", "probability"),
    [("logistic", lambda x: 1 / (1 + math.exp(-x))), ("gumbel", lambda x: 1 - math.exp(-math.exp(x)))],
)
def test_gates_open_as_often_as_their_logits_say(noise, probability):
    for logit in (-1.0, 0.0, 1.5):
        drawn = sample_gates(torch.full((200_000,), logit), noise=noise, generator=torch.Generator().manual_seed(1))
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        assert abs(drawn.mean().item() - probability(logit)) < 0.005
    assert_close(probability(open_threshold(noise)), 0.5)
    with pytest.raises(ValueError, match="noise='normal' is not known; allowed: logistic, gumbel"):
        open_threshold("normal")


def test_hard_gates_have_the_gradient_of_soft_ones():
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, dtype=torch.float64)

    def gradient(hard):
        gates = sample_gates(logits, hard=hard, generator=torch.Generator().manual_seed(3))
        return gates, torch.autograd.grad((weight * gates).sum(), logits)[0]

    (hard, g_hard), (soft, g_soft) = gradient(True), gradient(False)
    assert torch.equal(hard, (soft >= 0.5).double())
    assert torch.equal(g_hard, g_soft)
    assert torch.autograd.gradcheck(
        lambda x: sample_gates(x, hard=False, generator=torch.Generator().manual_seed(3)), logits
    )
    for options in ({"noise": "normal"}, {"temperature": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            sample_gates(logits, **options)


def test_devices_learn_nothing_where_the_server_is_closed():
    server = torch.tensor([1.0, 0.0, 0.6, 0.4], requires_grad=True)
    device = torch.tensor([0.3, 0.3, 0.3, 0.3], requires_grad=True)
    merged = merge_gates(server, device)
    assert_close(merged, torch.tensor([0.3, 0.0, 0.18, 0.4]))
    merged.sum().backward()
    assert_close(device.grad, torch.tensor([1.0, 0.0, 0.6, 0.0]))
    assert_close(server.grad, torch.tensor([0.3, 1.0, 0.3, 1.0]))


class Repeated(nn.Module):
    """Runs its two convolutions three times."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x):
        for _ in range(3):
            x = x + self.conv2(self.conv1(x).relu())
        return x


def test_a_convolution_counts_as_often_as_it_runs():
    model, point = Repeated(), GatePoint("block", "conv1", (), "conv2")
    costs = GateCosts(model, [point], (4, 8, 8))
    gates = torch.arange(16) < 4
    small = slice_gates(model, [point], gates)
    assert costs.true_flops(gates) == count_costs(small, (4, 8, 8)).flops_dense
    assert costs.true_total == count_costs(model, (4, 8, 8)).flops_dense


def test_gate_points_that_cannot_be_are_named():
    point = GatePoint("block", "conv1", (), "conv2")
    with pytest.raises(ValueError, match="points has 'conv1' as producer more than once; a channel has one gate"):
        check_gate_points(Repeated(), [point, point], (4, 8, 8))
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    with pytest.raises(ValueError, match=r"points\[0\] \('twice': '0' to '2'\)"):
        check_gate_points(model, [GatePoint("twice", "0", ("1",), "2")], (1, 8, 8))
