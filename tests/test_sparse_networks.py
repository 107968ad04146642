"""Whole networks on the sparse CPU kernels, layer by layer and in layout: gradients, threads, training, compilation."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import sparsebilevel as sb
from sparsebilevel._torchvision import import_torchvision
from sparsebilevel.data import load_data
from sparsebilevel.kernels import native
from sparsebilevel.models import create_model
from sparsebilevel.models.resnet import BasicBlock, resnet_cifar

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
ISAS = [i for i in native.lib.Isa.__members__.values() if i <= native.lib.cpu_isa()] if native.available() else []


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    best, threads = native.lib.isa(), torch.get_num_threads()
    yield
    native.lib.set_isa(best)
    torch.set_num_threads(threads)


def small_bottleneck() -> nn.Module:
    """All parts of torchvision's ResNet-50, with a block a stage and a quarter of the inner channels."""
    import_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=16)


def channels_last(net, x):
    return net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


PATHS = {
    "layers": lambda net, x: (net, x),
    "layers, channels_last": channels_last,
    "in layout": lambda net, x: (sb.optimize_for_cpu(net), x),
    "in layout, channels_last": lambda net, x: (sb.optimize_for_cpu(net), x.to(memory_format=torch.channels_last)),
}


# -- gradients ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def keep_relus_off_zero(net: nn.Module, x: torch.Tensor) -> float:
    """Shifts the biases of the normalizations so that no ReLU has an input near zero; returns how near the nearest is.

    One ReLU that rounding switches changes gradients by more than all other rounding errors together, and among
    millions of inputs some are always within rounding errors of zero. But a channel has only thousands: its bias moves
    zero into the middle of the widest gap between them. Then every float32 forward pass that is any good has the ReLUs
    of the float64 one, and gradients can be compared without anything being taken over from one to the other.
    """
    norms: list[nn.BatchNorm2d] = []  # in the order of their calls: the last before a ReLU is one that it follows
    nearest = []

    def shift(_module, inputs):
        norm, maps = norms[-1], inputs[0]
        values = maps.transpose(0, 1).flatten(1).sort().values
        values = torch.cat([values[:, :1] - 0.1, values, values[:, -1:] + 0.1], 1)  # a channel may be constant
        middles = (values[:, 1:] + values[:, :-1]) / 2
        widest = torch.where(middles.abs() < 0.2, values.diff(), 0).argmax(1, keepdim=True)
        bias = (norm.bias - middles.gather(1, widest).squeeze(1)).float()  # as the float32 network can have it
        maps = maps + (bias - norm.bias)[:, None, None]
        norm.bias.copy_(bias)
        nearest.append(maps.abs().min().item())
        return maps

    hooks = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(lambda norm, *_: norms.append(norm)))
        elif isinstance(module, nn.ReLU):
            hooks.append(module.register_forward_pre_hook(shift))
    net(x)
    for hook in hooks:
        hook.remove()
    return min(nearest)


def check_gradients(make, size, images, sparsity, bounds):
    """Every parameter's gradient of one step against the dense network with the zeros in place, in float64."""
    net = sb.sparsify(make(), sparsity, seed=0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    x, labels = torch.randn(images, 3, size, size), torch.randint(10, (images,))
    exact = sb.densify(net).double()
    assert keep_relus_off_zero(exact, x.double()) > 5e-5  # some ten times the rounding errors there
    net.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    F.cross_entropy(exact(x.double()), labels).backward()
    masks = {f"{name}.weight": layer.mask for name, layer in sb.sparse_layers(net)}
    expected = {name: p.grad * masks.get(name, 1) for name, p in exact.named_parameters()}

    for path, bound in bounds.items():
        candidate, inputs = PATHS[path](copy.deepcopy(net), x)
        F.cross_entropy(candidate(inputs), labels).backward()
        for name, p in candidate.named_parameters():
            error = float((p.grad - expected[name]).norm() / expected[name].norm())
            assert error < bound, f"{path}: {name}"


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize(
    ("make", "size"),
    [(partial(create_model, "resnet20", 10), 16), (small_bottleneck, 32)],
    ids=["resnet20", "bottleneck"],
)
def test_gradients_of_a_network(make, size, sparsity):
    """At 1e-6 to 1e-5: PyTorch's sums in batch normalization are still short."""
    check_gradients(make, size, 18, sparsity, dict.fromkeys(PATHS, 5e-5))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.9, 0.95])
@pytest.mark.parametrize(("name", "size", "images"), [("resnet32", 32, 64), ("resnet50", 64, 20)])
def test_gradients_of_a_large_network(name, size, images, sparsity):
    """In layout they are exact to 3e-5 and better. Layer by layer the batch normalization is PyTorch's, whose float32
    sums over channels_last maps are that inexact in the dense network too: up to 2e-4 here."""
    bounds = {"layers": 1e-4, "layers, channels_last": 1e-3, "in layout": 1e-4, "in layout, channels_last": 1e-4}
    check_gradients(partial(create_model, name, 10), size, images, sparsity, bounds)


class Block(nn.Module):
    """A convolution of any geometry, a residual one, and a strided one; everything that is fused in layout."""

    def __init__(self, channels, filters, geometry, second, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, filters, **geometry, bias=False), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = nn.Conv2d(filters, filters, **second, bias=False), nn.BatchNorm2d(filters)
        self.conv3, self.relu = nn.Conv2d(filters, 5, 3, stride, padding=1), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.conv3(self.relu(self.bn2(self.conv2(y)) + y))


@st.composite
def blocks(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, filters = (groups * draw(st.sampled_from([1, 2, 5, 8, 17])) for _ in range(2))
    pairs = [st.tuples(*[st.integers(low, high)] * 2) for low, high in ((1, 4), (1, 3), (0, 2), (1, 2))]
    geometry = dict(zip(("kernel_size", "stride", "padding", "dilation"), draw(st.tuples(*pairs)), strict=True))
    reach = [d * (k - 1) + 1 for k, d in zip(geometry["kernel_size"], geometry["dilation"], strict=True)]
    # At least 4x4 pixels behind it: statistics of fewer values amplify rounding errors.
    size = [r + 3 * s + draw(st.integers(0, 9)) for r, s in zip(reach, geometry["stride"], strict=True)]
    dilation = draw(st.integers(1, 2))
    second = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "groups": draw(st.sampled_from([1, groups]))}
    torch.manual_seed(draw(st.integers(0, 2**31)))
    net = Block(channels, filters, geometry | {"groups": groups}, second, draw(st.integers(1, 2)))
    net = sb.sparsify(net, 0.5)
    for _, layer in sb.sparse_layers(net):
        density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        mask = torch.rand(layer.mask.shape) < density
        mask[-1] = draw(st.booleans())
        layer.set_mask(mask)
    return net, torch.randn(draw(st.sampled_from([1, 3, 15, 16, 17, 33])), channels, *size)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@given(blocks())
@settings(deadline=None, max_examples=50)
def test_blocks_in_layout(isa, problem):
    native.lib.set_isa(isa)
    net, x = problem
    exact = sb.densify(net).double()
    leaf = x.double().requires_grad_()
    keep_relus_off_zero(exact, leaf)
    net.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    expected = exact(leaf)
    dy = torch.randn(expected.shape)
    dy /= dy.norm()
    expected.backward(dy.double())
    masks = {f"{name}.weight": layer.mask for name, layer in sb.sparse_layers(net)}

    sb.optimize_for_cpu(net)
    spoiled = copy.deepcopy(net)  # leaves NaN in whatever memory is kept, in all images of a block
    nan = torch.full((-(-len(x) // 16) * 16, *x.shape[1:]), float("nan"), requires_grad=True)
    spoiled(nan).sum().backward()
    x.requires_grad_()
    y = net(x)
    y.backward(dy)
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert_close(x.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)
    for name, p in net.named_parameters():
        want = exact.get_parameter(name).grad * masks.get(name, 1)
        assert (p.grad - want).norm() < 1e-4 * max(1.0, float(want.norm())), name
    for name, want in exact.named_buffers():
        assert_close(net.get_buffer(name).double(), want.double(), rtol=1e-4, atol=1e-5)


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [18, 70])
@pytest.mark.parametrize("path", ["layers", "in layout", "in layout, channels_last"])
def test_a_step_does_not_depend_on_the_number_of_threads(path, images):
    """Bit for bit. PyTorch's own batch normalization of channels_last maps does, so "layers, channels_last" cannot."""
    net = sb.sparsify(create_model("resnet20", 10), 0.9, seed=0)
    x, labels = torch.randn(images, 3, 16, 16), torch.randint(10, (images,))
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        candidate, inputs = PATHS[path](copy.deepcopy(net), x)
        inputs.requires_grad_()
        inputs.grad = None
        loss = F.cross_entropy(candidate(inputs), labels)
        loss.backward()
        grads = {name: p.grad for name, p in candidate.named_parameters()}
        results.append({"loss": loss.detach(), "input": inputs.grad, **grads, **dict(candidate.named_buffers())})
    for other in results[1:]:
        assert [name for name in other if not torch.equal(other[name], results[0][name])] == []


# -- training ----------------------------------------------------------------------------------------------------------


def train_on_digits(backend, path, activation, epochs=4):
    """BiDST on a small residual network at 90 %; losses of all steps, and the masks after each change of topology."""
    torch.manual_seed(0)
    net = resnet_cifar(8, in_channels=1, shortcut="B", width=8)
    for module in (net, *(m for m in net.modules() if isinstance(m, BasicBlock))):
        module.relu = activation()
    net, _ = PATHS[path](sb.sparsify(net, 0.9, seed=0), torch.empty(0, 1, 8, 8))
    loader = load_data("digits", batch_size=50, channels_last=path.endswith("channels_last")).train
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sparsifier = sb.BiDST(net, optimizer, update_freq=20, update_end=epochs * len(loader))
    losses, masks = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEBILEVEL_BACKEND", backend)
        assert {layer.backend.name for _, layer in sb.sparse_layers(net)} == {backend}
        for _ in range(epochs):
            for x, labels in loader:
                loss = F.cross_entropy(net(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if sparsifier.step():
                    masks.append(torch.cat([layer.mask.flatten() for _, layer in sb.sparse_layers(net)]))
    return torch.tensor(losses), torch.stack(masks)


@cache
def train_on_dense_kernels(activation):
    losses, masks = train_on_digits("dense", "layers", activation)
    assert losses[-10:].mean() < 0.3 * losses[0]
    assert len(masks) == 5
    assert (masks[0] != masks[-1]).sum() > 100
    return losses, masks


TRAINING_PATHS = [path for path in PATHS if path != "in layout, channels_last"]


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_training_goes_where_dense_kernels_lead(path):
    """With a smooth activation rounding errors stay what they are: after 112 steps the losses differ by 2e-6, and by
    7e-6 between PyTorch's own two memory formats. One weight that grows in another place shows at 1e-4."""
    expected, expected_masks = train_on_dense_kernels(nn.SiLU)
    losses, masks = train_on_digits("sparse", path, nn.SiLU)
    assert_close(losses, expected, rtol=5e-5, atol=5e-5)
    assert torch.equal(masks, expected_masks)


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_training_with_relus_ends_where_dense_kernels_do(path):
    """Sooner or later rounding switches a ReLU, and soon after a weight grows in another place: from about the 20th
    step on the runs differ, as those of PyTorch's two memory formats do, which end at 0.44 and 0.48."""
    expected, _ = train_on_dense_kernels(nn.ReLU)
    losses, _ = train_on_digits("sparse", path, nn.ReLU)
    assert_close(losses[:15], expected[:15], rtol=1e-4, atol=1e-4)
    assert losses[-28:].mean() == pytest.approx(float(expected[-28:].mean()), rel=0.2)


# -- compilation and masks that change ---------------------------------------------------------------------------------


@torch._dynamo.config.patch(error_on_recompile=True)
def test_changes_of_topology_do_not_compile_again():
    torch._dynamo.reset()
    x, labels = torch.randn(40, 3, 8, 8), torch.randint(5, (40,))
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU()]
    start = sb.sparsify(nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5)), 0.8, seed=0)
    counter = CompileCounterWithBackend("aot_eager")
    runs = []
    for compiled in (False, True):
        net = copy.deepcopy(start)
        forward = torch.compile(net, backend=counter, fullgraph=True) if compiled else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        sparsifier = sb.BiDST(net, optimizer, update_freq=2, update_end=100)
        losses, changes = [], 0
        for _ in range(10):
            loss = F.cross_entropy(forward(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            changes += sparsifier.step()
        runs.append((losses, changes))
        assert counter.frame_count == compiled
    assert runs[1] == (pytest.approx(runs[0][0], rel=1e-4), 5)
    assert runs[0][1] == 5
    torch._dynamo.reset()


@pytest.mark.parametrize("path", PATHS)
def test_every_pass_follows_a_mask_that_changes_in_place(path):
    """Past all methods of the library, as an optimizer over flattened buffers or a broadcast of masks would do it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    net = sb.sparsify(net.append(nn.Linear(32, 5)), 0.5, seed=0)
    net, x = PATHS[path](net, torch.randn(18, 3, 6, 6))
    dy = torch.randn(18, 5)
    for _ in range(3):
        for _, layer in sb.sparse_layers(net):
            layer.mask.logical_xor_(torch.rand(layer.mask.shape) < 0.3)
        dense = sb.densify(net)
        net.zero_grad()
        dense.zero_grad()
        got, expected = net(x), dense(x)
        got.backward(dy)
        expected.backward(dy)
        assert_close(got, expected, rtol=1e-4, atol=1e-4)
        masks = {f"{name}.weight": layer.mask for name, layer in sb.sparse_layers(net)}
        for (name, p), q in zip(net.named_parameters(), dense.parameters(), strict=True):
            assert_close(p.grad, q.grad * masks.get(name, 1), rtol=1e-4, atol=1e-3)


# -- gradients that are special ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS, ids=str)
def test_what_a_relu_hides_stays_out_of_gradients_in_layout(isa):
    """An infinite activation in evaluation: 0 times it would be NaN."""
    native.lib.set_isa(isa)
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False))
    sb.sparsify(net, 0.0)
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    plain = copy.deepcopy(net).eval()
    in_layout = sb.optimize_for_cpu(net).eval()
    x = torch.randn(16, 1, 4, 4)
    x[0, 0, 0, 0] = -float("inf")
    grads = []
    for model in (plain, in_layout):
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].isfinite().all()
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("path", PATHS)
def test_gradients_that_are_marked_as_zero(path):
    """Torch gives them out, as for ``sgn``; there is no memory behind them."""
    net, x = PATHS[path](sb.sparsify(resnet_cifar(8), 0.9), torch.randn(16, 3, 16, 16))
    (torch.sgn(net(x)) * 3).sum().backward()
    assert not any(p.grad.any() for p in net.parameters())


def test_second_derivatives_in_layout_are_refused():
    """Autograd would give some of them, and leave out others."""
    net, x = PATHS["in layout"](sb.sparsify(resnet_cifar(8), 0.9), torch.randn(16, 3, 16, 16))
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)


def test_running_statistics_that_change_are_noticed_in_layout():
    net = sb.optimize_for_cpu(sb.sparsify(resnet_cifar(8), 0.9))
    x = torch.randn(16, 3, 16, 16)
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean._version
    net(x)
    assert norm.running_mean._version > before
