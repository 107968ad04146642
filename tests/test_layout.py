"""Networks in the layout of the sparse CPU kernels against the same networks as they were written."""

import collections
import concurrent.futures
import contextlib
import copy
import gc
import inspect
import operator
import pickle
import random
import re
import threading
import types
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import sparsebilevel as sb
from sparsebilevel import layout, models
from sparsebilevel.kernels import lines, native, plans
from sparsebilevel.layout import InLayout

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, residual blocks with functional and module ReLUs, a strided shortcut, pooling and a classifier."""

    def __init__(self, momentum=0.1, affine=True, track=True, bias=False):
        super().__init__()

        def norm(channels):
            bn = nn.BatchNorm2d(channels, momentum=momentum, affine=affine, track_running_stats=track)
            if affine:
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.uniform_(bn.bias, -0.5, 0.5)
            return bn

        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=bias), norm(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=bias), norm(8)
        self.conv4, self.bn4 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=bias), norm(12)
        self.conv5, self.bn5 = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3, bias=bias), norm(12)
        self.shortcut, self.bn6 = nn.Conv2d(8, 12, 1, stride=2, bias=bias), norm(12)
        self.relu, self.same, self.pool = nn.ReLU(inplace=True), nn.Identity(), nn.AvgPool2d(2)
        self.fc = nn.Linear(12 * 2 * 2, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        x = torch.relu(y + self.same(x))
        y = self.bn5(self.conv5(self.relu(self.bn4(self.conv4(x)))))
        y += self.bn6(self.shortcut(x))
        x = self.pool(self.relu(y))
        return self.fc(torch.flatten(x, 1))


def pair(net, sparsity=0.6, **kwargs):
    """The sparse network as it is, and a copy in the layout."""
    plain = sb.sparsify(net, sparsity, seed=0, **kwargs)
    optimized = sb.optimize_for_cpu(copy.deepcopy(plain))
    assert isinstance(optimized, InLayout)
    return plain, optimized


def traces_of(optimized):
    return [trace for structure in optimized._graphs._structures for trace in structure.traces]


def plans_of(optimized):
    return [plan for trace in traces_of(optimized) for plan in trace.plans.values()]


def compare(plain, optimized, x, rtol=2e-4, backward=True):
    """Outputs, gradients of everything, and statistics."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    a, b = plain(inputs[0]), optimized(inputs[1])
    assert_close(b, a, rtol=rtol, atol=rtol)
    if backward:
        dy = torch.randn_like(a)
        a.backward(dy)
        b.backward(dy)
        got = [inputs[1].grad, *(p.grad for p in optimized.parameters())]
        for g, want in zip(got, [inputs[0].grad, *(p.grad for p in plain.parameters())], strict=True):
            assert (g is None) == (want is None)
            if want is not None:
                assert_close(g, want, rtol=rtol, atol=rtol * max(1.0, float(want.abs().max())))
    for (name, got), (_, want) in zip(optimized.named_buffers(), plain.named_buffers(), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("images", [2, 16, 37])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_and_inference(images, memory_format):
    plain, optimized = pair(Net())
    for _ in range(2):
        compare(plain, optimized, torch.randn(images, 3, 8, 8).to(memory_format=memory_format))
    plain.eval()
    optimized.eval()
    compare(plain, optimized, torch.randn(images, 3, 8, 8))
    assert len(plans_of(optimized)) == 2
    assert None not in plans_of(optimized)
    with torch.no_grad():
        compare(plain, optimized, torch.randn(1, 3, 8, 8), backward=False)


def test_a_few_images_run_as_written(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "auto")
    plain, optimized = pair(Net())
    plans = []
    monkeypatch.setattr(layout._Graphs, "find", lambda self, model, state, settled: plans.append(state))
    for images, size, in_lines in ((1, 8, 0), (4, 8, 0), (5, 8, 1), (12, 64, 0), (13, 64, 1), (17, 64, 0), (16, 8, 1)):
        del plans[:]
        for net in (plain, optimized):
            net.fc = nn.Identity()
        x = torch.randn(images, 3, size, size)
        assert torch.equal(optimized(x), plain(x))
        assert len(plans) == in_lines


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"affine": False}, {"track": False}, {"bias": True}], ids=lambda s: next(iter(s))
)
def test_kinds_of_normalization(settings):
    plain, optimized = pair(Net(**settings))
    for _ in range(3):
        compare(plain, optimized, torch.randn(20, 3, 8, 8))
    plain.eval()
    optimized.eval()
    compare(plain, optimized, torch.randn(20, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet20", 16), ("resnet18_cifar", 16), ("vgg19_bn", 32), ("mobilenet_v2", 32), ("resnet18", 64)],
)
def test_known_architectures_stay_in_lines(name, size, monkeypatch):
    plain, optimized = pair(models.create_model(name, 10).eval(), 0.8)
    entered, left = [], []
    to_lines, from_lines = lines.to_lines, lines._from_lines
    monkeypatch.setattr(lines, "to_lines", lambda x, dtype: entered.append(x.shape) or to_lines(x, dtype))
    monkeypatch.setattr(lines, "_from_lines", lambda *a: left.append(a[0].shape) or from_lines(*a))
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        # Rounding adds up over tens of layers; a wrong layer would be off by its whole output.
        assert_close(optimized(x), plain(x), rtol=1e-2, atol=1e-3)
    assert entered == [x.shape]
    assert len(left) == (name == "vgg19_bn")  # the others leave as means


class Uses(nn.Module):
    """One value in the roles that gradients can meet in."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        if self.kind == "block":  # convolution, and addition past it
            return F.relu(self.bn2(self.conv2(y)) + y)
        if self.kind == "beside":  # convolution beside the addition
            z = F.relu(self.bn2(self.conv2(x)) + y)
            return z + self.conv3(y)
        if self.kind == "two additions":
            return F.relu(self.bn2(self.conv2(x)) + y) + F.relu(self.bn3(self.conv3(x)) + y)
        if self.kind == "two convolutions":
            return self.conv2(y) * 2 + self.conv3(y)
        if self.kind == "itself":
            return F.relu(y + y)
        if self.kind == "no relu":
            return self.bn2(self.conv2(y)) + y
        if self.kind == "broadcast":
            return self.bn2(self.conv2(y)) + y.mean((2, 3), keepdim=True)
        return y.mean((2, 3))


@pytest.mark.parametrize(
    "kind", ["block", "beside", "two additions", "two convolutions", "itself", "no relu", "broadcast", "mean"]
)
def test_gradients_meet(kind):
    plain, optimized = pair(Uses(kind), 0.3)
    compare(plain, optimized, torch.randn(18, 4, 6, 6))


class Between(nn.Module):
    """Ordinary tensors between parts that are in lines, and values that go past them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.pool = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        self.shuffle, self.gate = nn.PixelShuffle(2), nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=1.0):
        y = F.relu(self.bn1(self.conv1(x)))
        if self.kind == "past an unknown module":
            z = torch.cat([self.shuffle(y)] * 4, 1)[:, :, ::2, ::2]
            return self.bn2(self.conv2(z)) + y
        if self.kind == "gate":  # squeeze and excitation
            return self.conv2(y * torch.sigmoid(self.gate(self.pool(y)))) + y
        if self.kind == "slice and pad":
            return self.conv2(F.pad(y[:, 2:6, 1:, ::2], (0, 1, 1, 0, 2, 2))) * scale
        if self.kind == "several results":
            return {"maps": y, "more": [self.conv2(y), self.pool(y).flatten(1)]}
        return self.conv2(y), y + self.conv3(y)


class Flat(nn.Module):
    """A network with its results in one tensor."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return flatten(self.net(x))


def flatten(out):
    if isinstance(out, torch.Tensor):
        return out.flatten(1)
    values = out.values() if isinstance(out, dict) else out
    return torch.cat([flatten(v) for v in values], 1)


@pytest.mark.parametrize("kind", ["past an unknown module", "gate", "slice and pad", "several results", "pair"])
@pytest.mark.parametrize("images", [3, 18])
def test_segments(kind, images):
    plain, optimized = pair(Between(kind), 0.3)
    compare(Flat(plain), Flat(optimized), torch.randn(images, 8, 6, 6))


def test_arguments_are_bound_as_written():
    plain, optimized = pair(Between("slice and pad").eval(), 0.3)
    x = torch.randn(16, 8, 6, 6)
    for args, kwargs in (((x, 2.0), {}), ((x,), {"scale": 3.0}), ((), {"x": x})):
        assert_close(optimized(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="scales"):
        optimized(x, scales=1.0)


def test_what_writes_to_a_shared_tensor_is_left_as_it_is():
    class Writes(Between):
        def forward(self, x):
            y = self.bn1(self.conv1(x))
            z = F.relu(y, inplace=True)
            return self.conv2(y) + z

    model = sb.sparsify(Writes("writes"), 0.5)
    for name in ("lines", "channels_last"):
        with pytest.warns(UserWarning, match="relu writes to a tensor that others read"):
            assert sb.optimize_for_cpu(model, name) is model
        assert type(model) is Writes


def test_maps_without_a_batch_run_as_written():
    class Convs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.conv2(F.relu(self.conv1(x)))

    plain, optimized = pair(Convs(), 0.3)
    x = torch.randn(8, 9, 9)
    assert_close(optimized(x), plain(x))
    assert_close(optimized(x.unsqueeze(0))[0], plain(x), rtol=1e-4, atol=1e-4)


def test_gradients_of_some_parameters_and_twice():
    plain, optimized = pair(Uses("block"), 0.3)
    x = torch.randn(18, 4, 6, 6)
    dy = torch.randn(18, 4, 6, 6)
    for wanted in (["conv1.weight"], ["bn2.weight"], ["conv2.weight", "bn1.bias"]):
        losses = [(net(x) * dy).sum() for net in (plain, optimized)]
        for _ in range(2):
            expected, got = (
                torch.autograd.grad(loss, [net.get_parameter(n) for n in wanted], retain_graph=True)
                for loss, net in zip(losses, (plain, optimized), strict=True)
            )
            assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_frozen_parameters():
    plain, optimized = pair(Uses("block"), 0.3)
    for net in (plain, optimized):
        net.conv1.weight.requires_grad_(False)
        net.bn2.requires_grad_(False)
    compare(plain, optimized, torch.randn(18, 4, 6, 6))


@pytest.mark.parametrize("support", ["all", "active", "search"])
def test_collects_the_effective_gradient(support):
    plain, optimized = pair(Net())
    for net in (plain, optimized):
        for _, layer in sb.sparse_layers(net):
            positions = torch.arange(-1, layer.weight.numel(), 3) if support == "search" else None
            layer.collect(support, positions)
    compare(plain, optimized, torch.randn(20, 3, 8, 8))
    for (_, a), (_, b) in zip(sb.sparse_layers(plain), sb.sparse_layers(optimized), strict=True):
        assert_close(b.effective_grad, a.effective_grad, rtol=1e-3, atol=1e-3)


def test_a_method_trains_the_same_network():
    losses = []
    for optimize in (False, True):
        torch.manual_seed(0)
        model = sb.sparsify(Net(), 0.8, seed=0)
        if optimize:
            sb.optimize_for_cpu(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier = sb.BiDST(model, optimizer, update_freq=5, update_end=20)
        x, y = torch.randn(40, 3, 8, 8), torch.randint(0, 5, (40,))
        for _ in range(12):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sparsifier.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_is_the_same_model_to_everybody_else(tmp_path):
    plain, optimized = pair(Net())
    x = torch.randn(16, 3, 8, 8)
    optimized.eval()
    expected = optimized(x)
    assert isinstance(optimized, Net)
    assert type(optimized).__name__ == "Net"
    assert list(optimized.state_dict()) == list(plain.state_dict())
    assert sb.optimize_for_cpu(optimized) is optimized
    for other in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert isinstance(other, InLayout)
        assert torch.equal(other(x), expected)
        assert other.conv2.weight is not optimized.conv2.weight
        other.conv2.weight.data.zero_()
        assert not torch.equal(other(x), expected)
    torch.save(optimized, tmp_path / "model.pth")
    assert torch.equal(torch.load(tmp_path / "model.pth", weights_only=False)(x), expected)
    dense = sb.densify(optimized)
    assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)
    assert type(dense) is type(copy.deepcopy(dense))
    assert not any(isinstance(module, InLayout) for module in dense.modules())
    assert type(dense) is Net
    assert "_graphs" not in vars(dense)
    assert inspect.signature(optimized.forward) == inspect.signature(plain.forward)


@pytest.mark.parametrize("names", [("conv3", "bn4"), ("relu", "same", "pool"), ("inner",)], ids="-".join)
def test_hooks_see_ordinary_tensors(names):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            return self.inner(x)

    plain, optimized = pair(Outer().eval())
    seen = []
    for net in (plain, optimized):
        for name in names:
            module = net.inner if name == "inner" else net.inner.get_submodule(name)
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    x = torch.randn(16, 3, 8, 8)
    a = plain(x)
    expected = list(seen)
    seen.clear()
    assert_close(optimized(x), a, rtol=1e-4, atol=1e-4)
    assert len(seen) == len(expected) > 0
    for got, want in zip(seen, expected, strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_a_forward_reads_of_training_is_not_frozen():
    class Dropping(Net):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, training=self.training)

    plain, optimized = pair(Dropping())
    x = torch.randn(16, 3, 8, 8)
    assert (optimized(x) == 0).any()
    plain(x)
    for net in (plain, optimized):
        net.eval()
    assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-4)
    optimized.train()
    assert (optimized(x) == 0).any()


def test_replaced_modules_are_used():
    plain, optimized = pair(Net().eval())
    for net in (plain, optimized):
        net.relu, net.bn4, net.fc = nn.ELU(), nn.GroupNorm(3, 12), nn.Linear(48, 2)
        torch.nn.init.constant_(net.fc.weight, 0.1)
        torch.nn.init.zeros_(net.fc.bias)
    x = torch.randn(16, 3, 8, 8)
    assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-4)


def test_replaced_modules_of_the_same_kind_and_changed_settings_are_used():
    class Pooled(Uses):
        def __init__(self):
            super().__init__("pooled")
            self.pool, self.act = nn.MaxPool2d(2), nn.LeakyReLU(0.1)

        def forward(self, x):
            return self.conv2(self.pool(self.act(self.bn1(self.conv1(x)))))

    plain, optimized = pair(Pooled(), 0.3)
    x = torch.randn(18, 4, 6, 6)
    compare(plain, optimized, x)
    conv1, conv2 = (sb.SparseMaskedConv2d(*channels, 3, padding=1, sparsity=0.3) for channels in ((4, 12), (12, 5)))
    for net in (plain, optimized):
        net.zero_grad()
        net.conv1, net.conv2 = copy.deepcopy(conv1), copy.deepcopy(conv2)
        net.bn1, net.act, net.pool.kernel_size = nn.BatchNorm2d(12), nn.LeakyReLU(0.4), 3
    compare(plain, optimized, x)
    optimized.bn1 = nn.BatchNorm2d(7)
    with pytest.raises(RuntimeError, match="12"):
        optimized(x)


def add_modules(net, how):
    if how == "append":
        net.append(nn.Sigmoid())
    elif how == "extend":
        net.extend([nn.Identity(), nn.Sigmoid()])
    elif how == "insert":
        net.insert(3, nn.Hardtanh(-0.1, 0.1))
    else:
        net[0] = nn.Sequential(*net[0], nn.Sigmoid())


@pytest.mark.parametrize("how", ["append", "extend", "insert", "in a part"])
@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_added_modules_are_used(how, layout):
    start = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plain = sb.sparsify(nn.Sequential(start, nn.ReLU(), nn.Conv2d(8, 8, 3)), 0.5, seed=0)
    optimized = sb.optimize_for_cpu(copy.deepcopy(plain), layout)
    x = torch.randn(16, 3, 8, 8)
    compare(plain, optimized, x)
    for net in (plain, optimized):
        net.zero_grad()
        add_modules(net, how)
    compare(plain, optimized, x)
    assert len(plans_of(optimized)) == 2
    del optimized[3:], plain[3:]
    compare(plain, optimized, x)


class Reads(nn.Module):
    """A forward that depends on what its modules hold."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.drop = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Dropout(0.0)
        self.temperature, self.stride, self.activation, self.shift, self.unread = 1.0, (1, 1), F.relu, None, 0
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x):
        x = self.activation(self.conv1(x)) * (self.factor * 2)
        if self.shift is not None:
            x = x + self.shift
        x = self.conv2(x)[:, :, :: self.stride[0], :: self.stride[1]] * getattr(self, "gain", 1)
        return x / self.temperature * self.scale + self.drop.p


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", 0.01), ("stride", (2, 1)), ("activation", torch.tanh), ("scale", 3.0), ("gain", 2.0)],
        *[("factor", torch.full((1,), 3.0)), ("shift", nn.Parameter(torch.ones(1))), ("drop.p", 0.5)],
    ],
)
def test_attributes_are_not_frozen(name, value):
    plain, optimized = pair(Reads(), 0.5)
    x = torch.randn(16, 4, 8, 8)
    compare(plain, optimized, x)
    for net in (plain, optimized):
        net.zero_grad()
        module, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(module), attribute, value)
    assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-3)
    traces = len(traces_of(optimized))
    assert traces == (1 if name == "factor" else 2)  # of a buffer it is the graph that asks
    assert None not in plans_of(optimized)
    if name in ("temperature", "stride"):
        optimized.temperature, optimized.stride = plain.temperature, plain.stride = 1.0, (1, 1)
        assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-4)
        assert len(traces_of(optimized)) == traces


def test_attributes_that_change_all_the_time(monkeypatch):
    monkeypatch.setattr(layout, "_KEPT", 2)
    monkeypatch.setattr(layout, "_RUNS", 4)
    plain, optimized = pair(Reads(), 0.5)
    x = torch.randn(16, 4, 8, 8)
    for step in range(8):
        optimized.unread = step
        optimized(x)
    assert optimized._graphs._traced == 1
    for step in range(12):
        optimized.temperature = plain.temperature = 2.0 + step
        assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-4)
    assert optimized._graphs._traced == 2 + 20 // 4
    assert len(traces_of(optimized)) == 2


ELSEWHERE = types.SimpleNamespace(seen=None)


class Acts(nn.Module):
    """A forward that does more than to compute its result."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen, self.counts, self.aux = kind, 0, ([], {}), Counter(calls=0), None
        self.conv1, self.conv2, self.norm = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.conv1(x)).relu()
        if self.kind == "attribute":
            self.aux = y.square().mean()
        elif self.kind == "new attribute":
            self.conv2.last = y
        elif self.kind == "number":
            self.calls += 1
        elif self.kind == "list":
            self.seen[0].append(y)
        elif self.kind == "dict":
            self.counts["calls"] += 1
        elif self.kind == "elsewhere":
            ELSEWHERE.seen = y
        elif self.kind == "random" and random.random() < 0.5:
            return y
        elif self.kind == "numpy" and np.random.rand() < 0.5:
            return y
        elif self.kind == "torch" and torch.rand(1) < 0.5:
            return y
        elif self.kind == "no_grad":
            with torch.no_grad():
                y = y + y.mean()
        elif self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.conv2(y)
        elif self.kind == "sums":
            sums = torch.zeros(8, 1, 1)
            sums += y.mean((0, 2, 3)).view(8, 1, 1)
            return self.conv2(y) + sums.mean()
        return self.conv2(y)


def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def random_states():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()


def kept(net):
    """What forwards may have left behind."""
    return net.aux is None, net.calls, len(net.seen[0]), net.counts, "last" in vars(net.conv2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *[("attribute", "changes Acts.aux"), ("new attribute", "changes SparseMaskedConv2d.last")],
        *[("number", "changes Acts.calls"), ("list", "changes Acts.seen"), ("dict", "changes Acts.counts")],
        *[("elsewhere", "keeps values elsewhere"), ("random", "random"), ("numpy", "random"), ("torch", "random")],
        *[("no_grad", "grad mode"), ("autocast", "autocast"), ("sums", "each forward makes anew")],
    ],
)
def test_a_forward_that_does_more_cannot_be_traced(kind, message):
    before, later = (sb.sparsify(Acts(k), 0.5, seed=0) for k in (kind, "nothing"))
    before, nothing = copy.deepcopy(before), kept(before)
    states = random_states()
    with pytest.warns(UserWarning, match=f"Acts cannot be traced.*{message}"):
        sb.optimize_for_cpu(before)
    assert random_states() == states
    assert kept(before) == nothing
    sb.optimize_for_cpu(later)
    later.kind = kind  # from now on
    x = torch.randn(16, 4, 8, 8)
    for net in (before, later):
        plain = sb.sparsify(Acts(kind), 0.5, seed=0)
        plain.load_state_dict(net.state_dict())
        for model in (plain, net):
            seed()
            for _ in range(2):
                out = model(x)
            assert type(out) is torch.Tensor
            loss = out.float().square().mean()
            (loss if model.aux is None else loss + model.aux).backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
        assert kept(net) == kept(plain)


def test_tensors_that_a_forward_makes():
    class Makes(Reads):
        def forward(self, x):
            return super().forward(x) * torch.tensor([2.0]) + torch.arange(4.0)

    plain, optimized = pair(Makes(), 0.5)
    x = torch.randn(16, 4, 8, 8)
    for training in (True, False):
        for net in (plain, optimized):
            net.train(training)
        compare(plain, optimized, x)
    assert None not in plans_of(optimized)
    assert vars(optimized).keys() - vars(plain).keys() == {"_graphs"}


def test_slices_of_a_sequential_run_as_written():
    net = sb.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 0.5, seed=0)
    expected = net[:2]
    optimized = sb.optimize_for_cpu(copy.deepcopy(net))
    x = torch.randn(16, 3, 8, 8)
    for part in (optimized[:2], copy.deepcopy(optimized[:2]), pickle.loads(pickle.dumps(optimized[:2]))):
        assert isinstance(part, nn.Sequential)
        assert torch.equal(part(x), expected(x))
    part = optimized[:2]
    assert sb.optimize_for_cpu(part) is part
    assert part._graphs is not optimized._graphs
    compare(expected, part, x)
    dense = sb.densify(optimized[:2])
    assert type(dense) is nn.Sequential

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(net)

        def forward(self, x):
            x = self.layers[:1](x)
            return self.layers[1:](x if x.sum() > 0 else -x)

    plain = Halves()
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="Halves cannot be traced"):
        sb.optimize_for_cpu(model)
    assert isinstance(model.layers, InLayout)
    compare(plain, model, x)


class Several(Between):
    def __init__(self):
        super().__init__("pair")

    def _forward(self, x):
        return super().forward(x)

    def forward(self, *maps):
        return self._forward(maps[0])[0]


@pytest.mark.parametrize(
    "make", [Net, Several, lambda: nn.Sequential(Between("pair"))], ids=["Net", "Several", "parts"]
)
def test_other_tracers_see_the_model_as_written(make):
    plain, optimized = pair(make().eval(), 0.5)
    traced, expected = (torch.fx.symbolic_trace(net) for net in (optimized, plain))
    assert traced.code == expected.code
    x = torch.randn(16, 3 if make is Net else 8, 8, 8)
    assert_close(traced(x), plain(x))
    assert flatten(optimized(x)).shape == flatten(plain(x)).shape
    assert None not in plans_of(optimized)
    assert not vars(optimized).keys() - vars(plain).keys() - {"_graphs"}


def test_compilers_see_the_model_as_written():
    plain, optimized = pair(Reads().eval(), 0.5)
    x = torch.randn(16, 4, 8, 8)
    expected = plain(x)
    assert torch.equal(torch.compile(optimized, backend="eager", fullgraph=True)(x), expected)
    dynamic = {"x": {0: torch.export.Dim("images")}}
    exported = torch.export.export(optimized, (x,), dynamic_shapes=dynamic).module()
    assert_close(exported(x[:5]), expected[:5])
    assert torch.equal(torch.jit.trace(optimized, (x,))(x), expected)


def test_other_types_run_the_model_as_written():
    plain, optimized = pair(Net().eval())
    x = torch.randn(16, 3, 8, 8)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert torch.equal(optimized(x), plain(x))
    assert optimized.double()(x.double()).dtype == torch.float64


class Branching(Net):
    """A forward that depends on values, and parts that do not."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.more = nn.ModuleList([nn.Sequential(Between("pair")), nn.BatchNorm2d(8)])

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_what_cannot_be_traced_uses_the_fused_kernel(layout, monkeypatch):
    plain = sb.sparsify(Branching(), 0.5, seed=0).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="Branching cannot be traced, so its layers convert one by one.*fused kernel"):
        assert sb.optimize_for_cpu(model, layout) is model
    assert type(model) is Branching
    assert isinstance(model.conv1, InLayout)
    assert isinstance(model.more[0], InLayout)
    for norm in (model.bn1, model.more[1]):
        assert isinstance(norm, sb.FusedBatchNorm2d)
    changed = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="Branching cannot be traced"):  # in another layout, too
        sb.optimize_for_cpu(changed, "lines" if layout == "channels_last" else "channels_last")
    assert changed.conv1._graphs.layout != model.conv1._graphs.layout == layout
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compare(copy.deepcopy(plain), other, torch.randn(18, 3, 8, 8).to(memory_format=torch.channels_last))
    assert repr(model) == repr(plain)
    dense = sb.densify(model)
    assert {type(m) for m in dense.modules()} == {type(m) for m in sb.densify(plain).modules()}


# -- channels_last -----------------------------------------------------------------------------------------------------


def pair_channels_last(net, sparsity=0.6):
    plain = net.to(memory_format=torch.channels_last)
    plain = sb.sparsify(plain, sparsity, seed=0) if sparsity else plain
    return plain, sb.optimize_for_cpu(copy.deepcopy(plain), layout="channels_last")


@pytest.fixture
def fused(monkeypatch):
    """What the fused op is called with: residual or not, ReLU or not, uses."""
    calls = []
    original = sb.nn.batch_norm_for_uses
    monkeypatch.setattr(
        sb.nn,
        "batch_norm_for_uses",
        lambda *a: calls.append((a[9] is not None, a[10], a[0])) or original(*a),
    )
    return calls


@pytest.mark.parametrize("images", [1, 18])
def test_channels_last_in_training_and_inference(images, fused):
    plain, optimized = pair_channels_last(Net())
    for training in (True, True, False):
        plain.train(training)
        optimized.train(training)
        compare(plain, optimized, torch.randn(images, 3, 8, 8).to(memory_format=torch.channels_last))
    per_run = [
        (False, True, 2),
        (False, True, 1),
        (True, True, 2),
        (False, True, 1),
        (False, False, 1),
        (True, True, 1),
    ]
    assert sorted(fused[: len(per_run)]) == sorted(per_run)
    assert len(plans_of(optimized)) == 2
    assert None not in plans_of(optimized)


@pytest.mark.parametrize(
    "kind", ["block", "beside", "two additions", "two convolutions", "itself", "no relu", "broadcast", "mean"]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_meet_in_channels_last(kind, memory_format):
    plain, optimized = pair_channels_last(Uses(kind), 0.3)
    compare(plain, optimized, torch.randn(18, 4, 6, 6).to(memory_format=memory_format))


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"affine": False}, {"track": False}, {"bias": True}], ids=lambda s: next(iter(s))
)
def test_kinds_of_normalization_in_channels_last(settings):
    plain, optimized = pair_channels_last(Net(**settings), 0)  # a dense network
    for _ in range(2):
        compare(plain, optimized, torch.randn(20, 3, 8, 8))


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "resnet18"])
def test_known_architectures_in_channels_last(name, fused):
    size = 64 if name == "resnet18" else 32
    plain, optimized = pair_channels_last(models.create_model(name, 10), 0.8)
    for net in (plain, optimized):
        if name == "mobilenet_v2":
            net.eval()  # in training it drops values at random
    x = torch.randn(4, 3, size, size)
    found = [net(x) for net in (plain, optimized)]
    # Rounding adds up over tens of layers.
    assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)
    assert len(fused) == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert sum(residual for residual, _, _ in fused) == {"resnet20": 9, "mobilenet_v2": 10, "resnet18": 8}[name]
    for out in found:
        out.square().sum().backward()
    for p, q in zip(plain.parameters(), optimized.parameters(), strict=True):
        assert_close(q.grad, p.grad, rtol=0.05, atol=0.02 * float(p.grad.abs().max()) + 1e-6)


def test_bfloat16_and_autocast_in_channels_last(fused):
    plain, optimized = pair_channels_last(Uses("block"), 0.3)
    x = torch.randn(18, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), optimized(x)
    assert a.dtype == b.dtype == torch.bfloat16
    assert_close(b, a, rtol=5e-2, atol=5e-2)
    assert len(fused) == 2


def test_layouts_can_be_changed_and_are_kept():
    plain, optimized = pair_channels_last(Net())
    x = torch.randn(16, 3, 8, 8)
    for name in ("channels_last", "lines", "channels_last"):
        assert sb.optimize_for_cpu(optimized, name) is optimized
        for other in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
            assert other._graphs.layout == name
            assert isinstance(other, Net)
            assert type(other).__mro__[1:3] == (InLayout, Net)
        compare(copy.deepcopy(plain), copy.deepcopy(optimized), x)
    with pytest.raises(ValueError, match="layout='nchw' is not known; allowed: lines, channels_last"):
        sb.optimize_for_cpu(optimized, "nchw")


def test_hooks_in_channels_last():
    plain, optimized = pair_channels_last(Net())
    seen = []
    for net in (plain, optimized):
        net.bn4.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    compare(plain, optimized, torch.randn(18, 3, 8, 8))
    assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


class Fused(nn.Module):
    """Blocks written with FusedBatchNorm2d."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2, self.bn3 = (sb.FusedBatchNorm2d(4, relu=relu) for relu in (True, True, False))

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y), residual=y)
        return self.bn3(y, x)


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_modules_that_are_fused_already(layout):
    plain = sb.sparsify(Fused(), 0.3).to(memory_format=torch.channels_last)
    optimized = sb.optimize_for_cpu(copy.deepcopy(plain), layout)
    x = torch.randn(18, 4, 6, 6).to(memory_format=torch.channels_last)
    compare(plain, optimized, x)
    for net in (plain, optimized):
        net.bn1.relu = False
    compare(plain, optimized, x)
    assert len(plans_of(optimized)) == 2
    assert None not in plans_of(optimized)


def test_refuses_a_model_without_sparse_convolutions():
    with pytest.raises(ValueError, match="model has no sparse convolution, .*; call sparsify first"):
        sb.optimize_for_cpu(Net())


def test_one_value_per_channel_is_refused_as_in_torch():
    plain, optimized = pair(Net())
    x = torch.randn(1, 3, 1, 1)
    for net in (plain, optimized):
        with pytest.raises(ValueError, match="more than"):
            net(x)


def apart(vector):
    """The same values, with others between them."""
    return torch.stack([vector, torch.full_like(vector, 100)], 1)[:, 0]


@pytest.mark.parametrize("name", ["conv2.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"])
def test_vectors_that_are_not_contiguous(name):
    plain, optimized = pair(Uses("two convolutions"), 0.3)
    module, vector = name.split(".")
    values = torch.rand(4) + 0.5
    for net in (plain, optimized):
        new = apart(values)
        setattr(net.get_submodule(module), vector, new if vector.startswith("running") else nn.Parameter(new))
    compare(plain, optimized, torch.randn(18, 4, 6, 6))


def test_an_input_that_is_lazily_negated():
    plain, optimized = pair(Uses("block"), 0.3)
    x = torch.randn(18, 4, 6, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert_close(optimized(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(4, dtype=torch.float64)], ids=["short", "float64"])
def test_a_bias_that_does_not_fit_is_refused(bias):
    for net in pair(Uses("block"), 0.3):
        net.conv2.bias = nn.Parameter(bias)
        with pytest.raises(ValueError, match="bias (is|has)"):
            net(torch.randn(18, 4, 6, 6))


def test_statistics_of_maps_far_from_zero():
    """A float32 mean of squares would lose every digit here."""
    x = (torch.randn(40, 6, 30, 30, dtype=torch.float64) + 1000).float()
    steps = [lines.Statistics(0, 0), lines.Normalize(0, 0, False, None, 1)]
    program = lines.Program(1, steps, [lines.Maps(1)], channels=[6], convolutions=0)
    running = torch.zeros(6), torch.ones(6)
    (got,) = program([x], lines.Operands([], [lines.Normalization(None, None, running, 1e-5, 1.0, True)]))
    exact = x.double()
    assert_close(running[0].double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    assert_close(running[1].double(), exact.var((0, 2, 3)), rtol=1e-5, atol=0)
    assert_close(got.double(), F.batch_norm(exact, None, None, training=True), rtol=0, atol=1e-3)


@pytest.mark.parametrize("images", [5, 32])
@pytest.mark.parametrize("train", [True, False])
def test_autocast_keeps_maps_in_bfloat16(images, train, monkeypatch):
    plain, optimized = pair(Net(bias=True).train(train))
    x = torch.randn(images, 3, 8, 8)
    seen = []
    execute = lines.Program.__call__
    monkeypatch.setattr(lines.Program, "__call__", lambda *args: seen.append(args[3]) or execute(*args))
    with torch.autocast("cpu", torch.bfloat16):
        got = optimized(x)
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert got.dtype == torch.bfloat16
    exact = copy.deepcopy(plain).double()
    expected = exact(x.double())
    error = (got - expected).norm() / expected.norm()
    assert error < 0.02, error
    dy = torch.randn_like(expected)
    got.backward(dy.bfloat16())
    expected.backward(dy)
    whole = torch.cat([q.grad.flatten() for q in exact.parameters()]).norm()
    for (name, p), q in zip(optimized.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        # Signs before a ReLU differ here and there; biases before a normalization have no gradient.
        assert (p.grad - q.grad).norm() < 0.25 * q.grad.norm() + 0.01 * whole, name
    for name, buffer in exact.named_buffers():
        if "running" in name:
            assert_close(optimized.get_buffer(name).double(), buffer, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("support", ["all", "active", "search"])
def test_autocast_collects_the_effective_gradient(support):
    plain, optimized = pair(Net())
    x = torch.randn(16, 3, 8, 8)
    for net, dtype in ((plain, torch.float32), (optimized, torch.bfloat16)):
        for _, layer in sb.sparse_layers(net):
            searched = torch.arange(0, layer.weight.numel(), 3) if support == "search" else None
            layer.collect(support, searched)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = net(x).float().square().sum()
        loss.backward()
    for (_, a), (_, b) in zip(sb.sparse_layers(plain), sb.sparse_layers(optimized), strict=True):
        found, expected = b.effective_grad, a.effective_grad
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (17, 5, 3, 7), (32, 16, 4, 4), (5, 40, 1, 9), (3, 70, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_and_back(shape, memory_format, dtype):
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
    data = plans.to_lines(x)
    assert data.shape == (-(-shape[0] // 16), *shape[1:], 16)
    assert torch.equal(lines._from_lines(data, shape[0]), x)
    assert not data.permute(0, 4, 1, 2, 3).reshape(-1, *shape[1:])[shape[0] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(2, 2, 0, 1), (3, 2, 1, 1), ((3, 2), (1, 2), (1, 0), (2, 1))], ids=str
)
def test_max_pool(kernel, stride, padding, dilation, dtype):
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    settings = [s if isinstance(s, tuple) else (s, s) for s in (kernel, stride, padding, dilation)]
    x = torch.randn(18, 5, 9, 8).round(decimals=1).to(dtype)  # with equal values
    x[0, 0, 4, 4] = float("nan")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    expected = pool(leaves[0])
    program = lines.Program(1, [lines.MaxPool(*settings, 0, 1)], [lines.Maps(1)], channels=[], convolutions=0)
    (got,) = program([leaves[1]], lines.Operands([], []), dtype)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))
    dy = torch.randn_like(expected)
    expected[1:].backward(dy[1:])
    got[1:].backward(dy[1:])
    assert_close(leaves[1].grad, leaves[0].grad)


def test_memory_is_kept_and_can_be_given_back():
    plans.release_memory()
    before = native.lib.pool_in_use()
    first = plans.empty(1000, 16)
    assert native.lib.pool_in_use() == before + 65536
    address = first.data_ptr()
    view = first[3:]
    del first
    assert native.lib.pool_in_use() == before + 65536  # the view holds it
    del view
    assert (native.lib.pool_in_use(), native.lib.pool_waiting()) == (before, 65536)
    again = plans.empty(1001, 16)  # another size of the same number of pages
    assert again.data_ptr() == address
    del again
    plans.release_memory()
    assert native.lib.pool_waiting() == 0
    mask = torch.rand(8, 8) < 0.5
    support = plans.active_support(mask)
    alive = weakref.ref(support)
    del support
    plans.release_memory()  # of masks and their positions, too
    gc.collect()
    assert alive() is None


def test_programs_are_gone_with_their_model():
    optimized = sb.optimize_for_cpu(sb.sparsify(Reads(), 0.3), "lines")
    optimized(torch.randn(18, 4, 6, 6)).sum().backward()
    parts = [part for plan in plans_of(optimized) for part, _, _ in plan.parts]
    alive = [weakref.ref(part._program) for part in parts if hasattr(part, "_program")]
    assert alive
    del optimized, parts
    gc.collect()
    assert not any(program() for program in alive)


# -- arguments, statistics and transforms ------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x, skip=None, mode="plain", scale=1.0):
        x = self.norm(self.conv(x))
        if mode == "relu":
            x = x.relu()
        return x * scale if skip is None else x * scale + skip


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_optional_arguments_decide_what_a_forward_does(layout):
    plain = sb.sparsify(Optional(), 0.95)
    optimized, x = sb.optimize_for_cpu(copy.deepcopy(plain), layout=layout), torch.randn(32, 16, 8, 8)
    for arguments in ({}, {"skip": x}, {"mode": "relu"}, {"scale": 2.0}, {"scale": torch.tensor(3.0)}, {"skip": x}, {}):
        assert_close(optimized(x, **arguments), plain(x, **arguments))
    assert_close(optimized(x, x, "relu"), plain(x, x, "relu"))
    if layout == "lines":
        assert len(optimized._graphs._structures[-1].traces) == 6  # one for each kind of call
    with pytest.raises(TypeError, match="positional arguments"):
        optimized(x, None, "plain", 1.0, 2.0)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_a_normalization_that_is_used_again(momentum, counts, track):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=momentum)

        def forward(self, x):
            for _ in range(3):
                x = self.norm(self.conv(x))
            return x

    plain = sb.sparsify(Again(), 0.95)
    plain.norm.track_running_stats = track
    if not counts:
        plain.norm.num_batches_tracked = None
    optimized, x = sb.optimize_for_cpu(copy.deepcopy(plain)), torch.randn(32, 16, 8, 8)
    for _ in range(2):
        assert_close(optimized(x), plain(x), rtol=1e-3, atol=1e-4)
    assert_close(optimized.state_dict(), plain.state_dict())


def test_vmap_sees_the_model_as_it_was_written():
    plain = sb.sparsify(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)), 0.9).eval()
    optimized, x = sb.optimize_for_cpu(copy.deepcopy(plain)), torch.randn(2, 16, 16, 8, 8)
    assert_close(torch.func.vmap(optimized)(x), torch.func.vmap(plain)(x))


# -- what others set, and where a model is not what it seems -----------------------------------------------------------


@contextlib.contextmanager
def defaults(dtype, device):
    """For new tensors."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("dtype", "device"), [("float64", "cpu"), ("bfloat16", "cpu"), ("float32", "meta")])
def test_defaults_for_new_tensors_change_nothing(dtype, device):
    nets = [sb.optimize_for_cpu(pair(Net())[0]) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(20, 3, 8, 8)
    for net in nets:
        for _, layer in sb.sparse_layers(net):
            layer.collect("search", torch.arange(-1, layer.weight.numel(), 3))
    nets[0](x).square().sum().backward()
    with defaults(getattr(torch, dtype), device):
        nets[1](x).square().sum().backward()
    for want, got in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    for (_, want), (_, got) in zip(*map(sb.sparse_layers, nets), strict=True):
        assert torch.equal(got.effective_grad, want.effective_grad)


@pytest.mark.parametrize("names", [("conv1",), ("conv2", "conv3")], ids="-".join)
def test_weights_that_are_not_float32_run_as_written(names):
    plain, optimized = pair(Net(bias=True))
    for net in (plain, optimized):
        for name in names:
            net.get_submodule(name).bfloat16()
    x = torch.randn(16, 3, 8, 8)
    with pytest.raises(ValueError, match="input has dtype torch.float32") as expected:
        plain(x)
    with pytest.raises(ValueError, match="input has dtype torch.float32") as got:
        optimized(x)
    assert str(got.value) == str(expected.value)
    with torch.autocast("cpu", torch.bfloat16):
        compare(plain, optimized, x)


@pytest.mark.parametrize("changed", ["mask", "positions"])
def test_a_mask_or_positions_changed_before_backward_are_noticed(changed):
    _, optimized = pair(Uses("block"), 0.3)
    layer = optimized.conv2
    layer.collect("search", torch.tensor([0, 1]))
    out = optimized(torch.randn(18, 4, 6, 6))
    if changed == "mask":
        layer.mask.logical_not_()
    else:
        layer._sink_arguments()["positions"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_a_forward_of_one_layer_alone_is_called(layout):
    plain = sb.sparsify(Net().eval(), 0.6, seed=0)
    optimized = sb.optimize_for_cpu(plain, layout)
    x, called = torch.randn(16, 3, 8, 8), []
    expected = optimized(x)
    for name in ("conv3", "bn4", "relu"):
        layer = optimized.get_submodule(name)
        layer.forward = lambda x, name=name, forward=layer.forward: called.append(name) or forward(x)
    assert_close(optimized(x), expected, rtol=1e-4, atol=1e-4)
    assert sorted(called) == ["bn4", "conv3", "relu", "relu", "relu"]
    # Of the model itself it may call the one that there was.
    optimized.forward = lambda x, forward=optimized.forward: called.append("model") or forward(x)
    optimized(x)
    assert called[5] == "model"
    del called[:]
    for name in ("conv3", "bn4", "relu", ""):
        del optimized.get_submodule(name).forward
    assert torch.equal(optimized(x), expected)
    assert not called


def test_hooks_of_all_modules_and_modes_see_the_model_as_written():
    plain, optimized = pair(Net().eval())
    x, seen = torch.randn(16, 3, 8, 8), []
    expected = plain(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, _i, _o: seen.append(type(module).__name__))
    try:
        assert torch.equal(optimized(x), expected)
    finally:
        handle.remove()
    assert seen.count("SparseMaskedConv2d") == 6
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        assert torch.equal(optimized(x), expected)
    assert counter.get_total_flops() > 0


class Results(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.conv1, self.conv2, self.make = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), make

    def forward(self, x):
        y = self.conv1(x)
        return self.make(y, self.conv2(y))


class Own(dict):
    pass


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: {"a": a, "b": [b, (a, {"b": b})]},
        lambda a, b: collections.OrderedDict(b=b, a=[a]),
        lambda a, b: [a, Pair(b, {"a": a})],
        lambda a, b: (a, b, None, 3),
    ],
    ids=["dict", "OrderedDict", "named", "tuple"],
)
def test_results_are_the_callers(make):
    plain, optimized = pair(Results(make), 0.3)
    x = torch.randn(18, 4, 8, 8)
    expected, got = plain(x), optimized(x)
    assert None not in plans_of(optimized)
    (values, structure), (want, structure_of_want) = map(torch.utils._pytree.tree_flatten, (got, expected))
    assert structure == structure_of_want
    assert_close(values[:2], want[:2], rtol=1e-4, atol=1e-4)
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert list(got) == list(expected)
        got["loss"] = 1
    elif isinstance(got, list):
        got.append(1)
        got[1].second["loss"] = 1
    assert torch.utils._pytree.tree_structure(optimized(x)) == structure


def test_results_of_other_kinds_are_left_as_they_are():
    model = sb.sparsify(Results(lambda a, b: Own(a=a, b=b)), 0.3)
    with pytest.warns(UserWarning, match="its forward makes a Own"):
        sb.optimize_for_cpu(model)
    assert type(model(torch.randn(18, 4, 8, 8))) is Own


def test_batched_gradients_are_refused():
    _, optimized = pair(Uses("block"), 0.3)
    x = torch.randn(18, 4, 6, 6, requires_grad=True)
    out = optimized(x)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(out, x, torch.randn(2, *out.shape), is_grads_batched=True)


class Convs(nn.Module):
    """Something between two convolutions."""

    def __init__(self, between):
        super().__init__()
        self.conv1, self.conv2, self.between = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), between

    def forward(self, x):
        x = self.conv1(x)
        self.between(x)
        return self.conv2(x)


def scaled_chunk(x):
    a, _ = x.chunk(2, 1)
    a.mul_(3.0)


@pytest.mark.parametrize(
    "writes",
    [
        lambda x: x[:, :4].mul_(2.0),
        scaled_chunk,
        lambda x: torch.clamp(x, min=0, out=x),
        lambda x: x.detach().mul_(2.0),
        lambda x: x.data.mul_(2.0),
        lambda x: F.relu(x.flatten(2), inplace=True),
        lambda x: operator.setitem(x, (slice(None), 0), 0.0),
    ],
    ids=["slice", "chunk", "out", "detach", "data", "inplace", "setitem"],
)
def test_what_writes_through_a_view_is_left_as_it_is(writes):
    plain = sb.sparsify(Convs(writes).eval(), 0.3)
    with torch.no_grad():
        x = torch.randn(18, 8, 6, 6)
        for name in ("lines", "channels_last"):
            model = copy.deepcopy(plain)
            with pytest.warns(UserWarning, match="Convs cannot be traced"):
                sb.optimize_for_cpu(model, name)
            assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_what_writes_to_a_result_of_its_own_is_traced():
    class Writes(Convs):
        def forward(self, x):
            y = self.conv1(x)
            z = (y + x).view(x.size(0), 8, -1).mul_(2.0).relu_().view_as(x)
            z = torch.cat([z[:, :4], y[:, 4:]], 1)
            z += y
            return self.conv2(F.relu(z, inplace=True))

    plain, optimized = pair(Writes(None), 0.3)
    compare(plain, optimized, torch.randn(18, 8, 6, 6))
    assert None not in plans_of(optimized)


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_writes_to_arguments_and_buffers_are_seen(layout):
    class Writes(Convs):
        def __init__(self):
            super().__init__(None)
            self.norm = nn.BatchNorm2d(8)
            self.register_buffer("total", torch.zeros(18, 8, 6, 6))

        def forward(self, x, skip):
            skip = skip.add_(self.norm(self.conv1(x)))
            self.total.add_(self.conv2(skip))
            return F.relu(skip)

    plain = sb.sparsify(Writes(), 0.3)
    optimized, x = sb.optimize_for_cpu(copy.deepcopy(plain), layout), torch.randn(18, 8, 6, 6)
    skips = [torch.ones(18, 8, 6, 6) for _ in range(2)]
    with torch.no_grad():
        expected, got = plain(x, skips[0]), optimized(x, skips[1])
    assert None not in plans_of(optimized)
    assert_close((got, skips[1], optimized.total), (expected, skips[0], plain.total), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(-1,), (8, -1), (2, 4, 36), (torch.int32,)], ids=str)
def test_views_of_maps(sizes):
    class Views(Convs):
        def forward(self, x):
            y = self.conv2(self.conv1(x))
            return y.contiguous().view(*sizes) if torch.int32 in sizes else y.view(x.size(0), *sizes)

    plain, optimized = pair(Views(None), 0.3)
    x = torch.randn(18, 8, 6, 6)
    expected, got = plain(x), optimized(x)
    assert None not in plans_of(optimized)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.is_floating_point():
        compare(plain, optimized, x)


# -- threads, and classes that copy and save themselves ----------------------------------------------------------------


def test_other_threads_go_on_during_a_trace():
    other, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.randn(2, 8)
    expected, results = other(x), []
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        _, optimized = pair(Convs(lambda _: results.append(executor.submit(other, x).result())), 0.3)
        assert len(results) == 1
        assert torch.equal(results[0], expected)
        # They may use the model itself, and read what its trace does not depend on.
        optimized.between, optimized.unread = lambda _: None, 1
        maps = torch.randn(18, 8, 6, 6)
        expected = optimized(maps)
        optimized.eval()
        optimized.between = lambda y: isinstance(y, torch.Tensor) or executor.submit(work).result()

        def work():
            assert_close(optimized(maps), expected)
            results.append(optimized.unread)

        assert_close(optimized(maps), expected)
    assert results[1:] == [1]
    assert "unread" not in {read.name for trace in traces_of(optimized) for read in trace.reads}


def test_threads_wait_for_the_trace_of_a_model_that_they_share(monkeypatch):
    _, optimized = pair(Convs(lambda _: None).eval(), 0.3)
    optimized.train()
    x, trace, others = torch.randn(18, 8, 6, 6), layout._trace, []
    with concurrent.futures.ThreadPoolExecutor(1) as executor:

        def slow(*args):
            others.append(executor.submit(optimized, x))
            concurrent.futures.wait(others, timeout=0.2)
            return trace(*args)

        monkeypatch.setattr(layout, "_trace", slow)
        assert torch.equal(optimized(x), others[0].result(10))
    assert len(others) == 1
    assert None not in plans_of(optimized)


class Locked(Convs):
    """Of a lock no copy can be made."""

    def __init__(self):
        super().__init__(None)
        self.lock, self.itself = threading.Lock(), [self]

    def forward(self, x):
        return self.conv2(self.conv1(x))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def graph_module():
    return torch.fx.symbolic_trace(Between("pair"))


@pytest.mark.parametrize("make", [Locked, graph_module], ids=["state", "graph"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_classes_copy_and_save_themselves_as_they_do(make, way):
    plain, x = sb.sparsify(make(), 0.3), torch.randn(18, 8, 6, 6)
    optimized = sb.optimize_for_cpu(plain)
    other = way(optimized)
    assert isinstance(other, InLayout)
    assert other is not optimized
    assert_close(flatten(other(x)), flatten(optimized(x)), rtol=1e-4, atol=1e-4)
    assert (other.conv1.weight is optimized.conv1.weight) == (way is copy.copy)
    if make is Locked:
        assert other.lock is not optimized.lock
        assert other.itself[0] is (optimized if way is copy.copy else other)
        with pytest.raises(TypeError, match="lock"):
            copy.deepcopy(optimized.lock)


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_copies_are_of_one_class(layout):
    nets = [sb.optimize_for_cpu(sb.sparsify(Reads(), 0.3), layout).eval() for _ in range(2)]
    nets.append(copy.deepcopy(nets[0]))
    x = torch.randn(18, 4, 6, 6)
    state = torch.func.stack_module_state(nets)
    found = torch.vmap(lambda *own: torch.func.functional_call(nets[0], own, (x,)))(*state)
    for y, net in zip(found, nets, strict=True):
        assert_close(y, net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.BatchNorm2d(8)])
def test_results_can_be_written_to(end):
    net = sb.optimize_for_cpu(sb.sparsify(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), end), 0.3))
    y = net(torch.randn(18, 8, 8, 8))
    expected = y.detach().relu()
    y.relu_().sum().backward()
    assert torch.equal(y, expected)
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_an_empty_batch(layout):
    net = sb.optimize_for_cpu(sb.sparsify(Reads(), 0.3), layout).eval()
    assert net(torch.zeros(0, 4, 6, 6)).shape == (0, *net(torch.zeros(18, 4, 6, 6)).shape[1:])


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
def test_a_model_is_gone_with_its_last_reference(layout):
    optimized = sb.optimize_for_cpu(sb.sparsify(Reads(), 0.3), layout)
    optimized = copy.deepcopy(optimized)
    gc.collect()
    gc.disable()  # from here on: what the trace leaves behind holds no model
    try:
        optimized(torch.randn(18, 4, 6, 6)).sum().backward()
        optimized.eval()(torch.randn(18, 4, 6, 6))
        alive = weakref.ref(optimized)
        del optimized
        assert alive() is None
    finally:
        gc.enable()


class SharedHead(nn.Module):
    """One head on two levels of a pyramid, of which the second needs the first."""

    def __init__(self):
        super().__init__()
        self.top, self.side = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 1)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.out = nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, x):
        small = self.top(x)
        large = self.side(x) + nn.functional.interpolate(small, scale_factor=2.0)
        return [self.out(self.norm(self.conv(p)).relu()) for p in (large, small)]


class ReadsStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        before = self.norm.running_var * 1.0
        y = self.norm(self.conv(x))
        return y.mean((2, 3)), before, self.norm.running_mean * 1.0, self.norm.num_batches_tracked + 0.0


class TwoDraws(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4), nn.Linear(16, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        late = self.drop(self.a(self.conv(x).mean((2, 3))))
        return [
            late + self.drop(self.b(x.mean((2, 3)))) + nn.functional.dropout(x.mean((2, 3))[:, :4], 0.5, self.training)
        ]


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
@pytest.mark.parametrize("network", [SharedHead, ReadsStatistics, TwoDraws])
def test_states_change_in_the_order_of_the_program(network, layout):
    """Statistics of a normalization that is used twice or read, and random draws."""
    torch.manual_seed(0)
    plain = sb.sparsify(network(), 0.9, seed=0)
    optimized = sb.optimize_for_cpu(copy.deepcopy(plain), layout=layout)
    for seed in range(3):
        x = torch.randn(32, 16, 8, 8)
        outputs = []
        for model in (plain, optimized):
            torch.manual_seed(seed)
            outputs.append(model(x))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(plain.named_buffers(), optimized.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_supports_go_with_their_masks():
    plans.release_memory()
    for _ in range(3):
        model = sb.sparsify(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)), 0.9)
        model(torch.randn(16, 64, 8, 8)).sum().backward()
        assert len(plans._memory._kept) <= 3  # the first one of the next model sweeps
        del model


@pytest.mark.parametrize("layout", ["lines", "channels_last"])
@pytest.mark.parametrize("wrong", [nn.MaxPool2d(2, 2, 2), nn.BatchNorm2d(8, eps=0.0), nn.BatchNorm2d(8, eps=-1.0)])
def test_what_torch_refuses_in_a_layer_is_refused_in_layout(wrong, layout):
    """Or gives the same, where this version of torch does not refuse it."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)]
    model = sb.sparsify(nn.Sequential(convs[0], wrong, convs[1], nn.BatchNorm2d(8)), 0.9)
    ours = sb.optimize_for_cpu(copy.deepcopy(model), layout=layout)
    x = torch.randn(16, 8, 8, 8)
    try:
        expected = model(x)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error), match=re.escape(str(error).splitlines()[0][:40])):
            ours(x)
    else:
        torch.testing.assert_close(ours(x), expected, equal_nan=True, rtol=1e-3, atol=1e-4)
