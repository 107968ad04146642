"""The sparse CPU kernels against float64 autograd, on every instruction set that this machine has."""

import copy
import itertools
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import sparsebilevel as sb
from sparsebilevel.kernels import (
    PASSES,
    choose_backend,
    describe,
    dispatch,
    make_grad_sink,
    masked_conv2d,
    masked_linear,
    native,
    plans,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
ISAS = [i for i in native.lib.Isa.__members__.values() if i <= native.lib.cpu_isa()] if native.available() else []


@pytest.fixture(autouse=True)
def _sparse(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    best = native.lib.isa()
    threads = torch.get_num_threads()
    yield
    native.lib.set_isa(best)
    torch.set_num_threads(threads)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded", "cropped", "cropped channels_last", "apart")
LAYOUTS += ("shifted",)


def laid_out(tensor, layout):
    """The same values in other memory; what is beside them is NaN (True in masks)."""
    channels_last = layout.endswith("channels_last") and tensor.dim() == 4
    if layout.startswith("cropped"):
        around = tensor.new_full([size + 2 for size in tensor.shape], float("nan"))
        if channels_last:
            around = around.contiguous(memory_format=torch.channels_last)
        return around[(slice(1, -1),) * tensor.dim()].copy_(tensor)
    if channels_last:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    if layout == "apart":
        around = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
        return around[(slice(None, None, 2),) * tensor.dim()].copy_(tensor)
    if layout == "shifted":  # to no multiple of anything
        return tensor.new_full([tensor.numel() + 1], float("nan"))[1:].view(tensor.shape).copy_(tensor)
    return tensor


def expanded(tensor, layout):
    """Values that are equal along the first dimension, and only one of them in memory, if the layout says so."""
    return tensor[:1].expand_as(tensor) if layout == "expanded" else tensor


def drawn_mask(draw, shape, generator):
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0, "one weight", "one row", "all rows but one"]))
    if not isinstance(density, str):
        return torch.rand(shape, generator=generator) < density
    mask = torch.full(shape, density == "all rows but one")
    mask[-1] = density == "one row"
    if density == "one weight":
        mask.view(-1)[-1] = True
    return mask


def drawn_positions(draw, weight):
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(st.integers(-2, weight.numel() - 1), max_size=20)), dtype=torch.int64)


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, filters = (groups * draw(st.sampled_from([1, 2, 3, 5, 8, 17, 21])) for _ in range(2))
    kernel, stride, padding, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(0, 2)), draw(pairs(1, 2))
    size = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 18))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    images = draw(st.integers(1, 15) | st.sampled_from([16, 17, 33, 40, 64]))  # lanes of pixels, or of images
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (filters, channels // groups, *kernel)
    mask = drawn_mask(draw, shape, generator)
    x, w, b = (torch.randn(s, generator=generator) for s in ((images, channels, *size), shape, (filters,)))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 5))
    return (x, w, mask, b), (stride, padding, dilation, groups), layouts, drawn_positions(draw, w), draw(DTYPES)


@st.composite
def products(draw):
    n, k = (draw(st.sampled_from([1, 3, 10, 33, 130])) for _ in range(2))
    rows = draw(st.sampled_from([(1,), (3,), (15,), (16,), (17,), (33,), (5, 7), (2, 3, 4), (64,), (300,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = drawn_mask(draw, (n, k), generator)
    x, w, b = (torch.randn(s, generator=generator) for s in ((*rows, k), (n, k), (n,)))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 5))
    return (x, w, mask, b), (), layouts, drawn_positions(draw, w), draw(DTYPES)


def check(op, operands, geometry=(), layouts=("contiguous",) * 5, positions=None, dtype=torch.float32):
    """Output and gradients against float64, with the layouts of input, weight, mask, bias and output gradient.

    The op runs on NaN first, with all weights and in blocks of images that are full: whatever memory it keeps for the
    next call then holds NaN, and a value that is read before it is written shows.
    """
    operands = (t if t.dtype == torch.bool else t.to(dtype) for t in operands)
    x, w, m, b = (expanded(t, layout) for t, layout in zip(operands, layouts[:4], strict=True))
    leaves = [t.double().requires_grad_() for t in (x, torch.where(m, w, 0), b)]
    expected = (F.conv2d if op is masked_conv2d else F.linear)(*leaves, *geometry)
    dy = torch.randn(expected.shape).to(dtype)
    if layouts[4] == "expanded":
        dy = dy[..., :1, :1].expand_as(dy) if dy.dim() > 1 else dy[:1].expand_as(dy)
    expected.backward(dy.double())
    dx, g, db = (leaf.grad for leaf in leaves)

    def run(x, w, m, b, dy):
        x, w, m, b, dy = (laid_out(t, layout) for t, layout in zip((x, w, m, b, dy), layouts, strict=True))
        x, w, b = (t.detach().requires_grad_() for t in (x, w, b))
        sink = None if positions is None else make_grad_sink(w, positions)
        y = op(x, w, m, b, *geometry, grad_sink=sink, positions=positions)
        y.backward(dy)
        return y.detach(), x.grad, w.grad, b.grad, None if sink is None else sink.grad

    whole = [t.new_full((-(-t.shape[0] // 16) * 16, *t.shape[1:]), float("nan")) for t in (x, dy)]
    run(whole[0], w * float("nan"), torch.ones_like(m), b * float("nan"), whole[1])
    y, grad_x, grad_w, grad_b, at_positions = run(x, w, m, b, dy)

    assert {t.dtype for t in (y, grad_x, grad_w, grad_b)} == {dtype}
    rtol = 1e-4 if dtype == torch.float32 else 2**-8  # of bfloat16: results are rounded once, sums are float32
    assert_close(y.double(), expected.detach(), rtol=rtol, atol=2e-5 * max(1.0, w.numel() / w.shape[0]) ** 0.5)
    assert_close(grad_x.double(), dx, rtol=rtol, atol=2e-5 * max(1.0, w.numel() / w.shape[1]) ** 0.5)
    assert_close(grad_b.double(), db, rtol=rtol, atol=1e-3)
    sums = {"rtol": rtol, "atol": 1e-5 * max(1.0, dy.numel() / w.shape[0]) ** 0.5 + 1e-5}
    assert_close(grad_w.double(), g * m, **sums)
    assert not grad_w[~m].any()
    if positions is not None:
        at = torch.where(positions >= 0, g.flatten()[positions.clamp(min=0)], 0)
        assert at_positions.dtype == torch.float32
        assert_close(at_positions.double(), at, rtol=1e-4, atol=sums["atol"])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@given(convolutions())
@settings(deadline=None, max_examples=100)
def test_convolution(isa, problem):
    native.lib.set_isa(isa)
    check(masked_conv2d, *problem)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@given(products())
@settings(deadline=None, max_examples=60)
def test_linear(isa, problem):
    native.lib.set_isa(isa)
    check(masked_linear, *problem)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    "case", ["convolution", "convolution, channels_last", "one image", "few images, channels_last", "linear"]
)
def test_results_do_not_depend_on_the_number_of_threads(case, isa):
    native.lib.set_isa(isa)
    op, x, w, geometry = masked_linear, torch.randn(500, 130), torch.randn(70, 130), ()
    if case != "linear":
        images = 1 if case.startswith("one") else 5 if case.startswith("few") else 50
        op, x, w, geometry = masked_conv2d, torch.randn(images, 24, 13, 11), torch.randn(160, 24, 3, 3), (2, 1)
    if case.endswith("channels_last"):
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    m, b, positions = torch.rand(w.shape) < 0.15, torch.randn(len(w)), torch.arange(-1, w.numel(), 7)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        sink = make_grad_sink(w, positions)
        y = op(leaves[0], leaves[1], m, leaves[2], *geometry, grad_sink=sink, positions=positions)
        y.backward(torch.arange(y.numel()).sin().view(y.shape))
        results.append([y.detach(), sink.grad, *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.xfail(reason="PyTorch divides a single sum among the threads, and the gradients of biases are its sums")
@pytest.mark.parametrize("op", [masked_conv2d, masked_linear])
def test_the_bias_of_one_filter_does_not_depend_on_the_number_of_threads(op):
    shape = (64, 3, 32, 32) if op is masked_conv2d else (70000, 3)
    x, w = torch.randn(shape), torch.randn(1, 3, *[1] * (len(shape) - 2))
    for _ in range(8):  # sums in another order are sometimes equal
        dy, grads = torch.randn(shape[0], 1, *shape[2:]), []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            b = torch.zeros(1, requires_grad=True)
            op(x, w, torch.ones_like(w, dtype=torch.bool), b).backward(dy)
            grads.append(b.grad)
        assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("filters", [5, 6])  # 5 x 36 is no multiple of 8, the number of bools compared at once
def test_a_plan_never_outlives_its_mask(filters, layout):
    x, w = torch.randn(16, 4, 6, 6), torch.randn(filters, 4, 3, 3)
    mask = laid_out(torch.zeros(w.shape, dtype=torch.bool), layout)
    for step in range(4):
        mask |= torch.arange(w.numel()).view(w.shape) % 4 == step  # in place, past every method of the library
        assert_close(masked_conv2d(x, w, mask), F.conv2d(x, torch.where(mask, w, 0)), rtol=1e-4, atol=1e-4)
    for last in (False, True):
        mask[-1, -1, -1, -1] = last
        assert_close(masked_conv2d(x, w, mask), F.conv2d(x, torch.where(mask, w, 0)), rtol=1e-4, atol=1e-4)
    mask.data = torch.rand(w.shape) < 0.5
    assert_close(masked_conv2d(x, w, mask), F.conv2d(x, torch.where(mask, w, 0)), rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_hidden_is_never_read():
    """What torch.where hides stays hidden: inf and NaN under a zero of the mask."""
    x, w = torch.randn(16, 4, 6, 6), torch.randn(5, 4, 3, 3)
    mask = torch.rand(w.shape) < 0.5
    expected = masked_conv2d(x, w, mask)
    assert torch.equal(masked_conv2d(x, torch.where(mask, w, float("nan")), mask), expected)


# -- where other sparse kernels fail -----------------------------------------------------------------------------------


def drawn(images, channels, size, filters, kernel=3, groups=1, density=0.3):
    """Input, weight, mask and bias of a convolution."""
    w = torch.randn(filters, channels // groups, kernel, kernel)
    return torch.randn(images, channels, size, size), w, torch.rand(w.shape) < density, torch.randn(filters)


@pytest.mark.parametrize("images", [5, 12, 100])
def test_an_incomplete_batch(images):
    """No multiple of 8, as the last one of an epoch."""
    check(masked_conv2d, drawn(images, 8, 10, 12), (1, 1))
    w = torch.randn(20, 30)
    check(masked_linear, (torch.randn(images, 30), w, torch.rand(w.shape) < 0.3, torch.randn(20)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("images", "size"), [(1, 1), (1, 2), (3, 7), (4, 7), (7, 8), (2, 14), (1, 56), (1, 300), (9, 5)]
)
@pytest.mark.parametrize("geometry", [(1, 1), (2, 1), (1, 2, 2), (3, 0, 1, 4)])
def test_few_images(images, size, memory_format, geometry):
    """Pixels take the lanes: a tile of several images, of several rows, of a part of a row."""
    x, w, m, b = drawn(images, 8, size, 12, kernel=1 if size < 3 else 3, groups=(*geometry, 1, 1)[3])
    layout = "contiguous" if memory_format is torch.contiguous_format else "channels_last"
    positions = torch.tensor([3, -1, 0, w.numel() - 1])
    check(masked_conv2d, (x, w, m, b), geometry, (layout,) * 5, positions)


def tiling(shape, images, layout):
    """Of a plan for 3x3 windows on maps ``[C, H, W]``; the last figure is how many images a line takes."""
    channels, *size = shape
    support, w = plans.Support(torch.ones(8, channels, 3, 3, dtype=torch.bool)), torch.empty(8, channels, 3, 3)
    x = torch.empty(images, *shape)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    operands = () if layout == "lines" else (x, x)
    return support.plan(False, x.shape, w, plans.Geometry(padding=(1, 1)), operands).tiling


def test_lanes_are_what_fills_them():
    """Pixels for batches that leave lanes empty, and for NCHW maps where they are large enough."""

    def images_of_a_line(*args):
        return tiling(*args)[-1]

    for layout in ("NCHW", "channels_last"):
        assert [images_of_a_line((8, 14, 14), n, layout) for n in (1, 4, 8, 17)] == [1, 1, 1, 1]
    assert [images_of_a_line((8, 28, 28), n, "channels_last") for n in (15, 16, 64)] == [16, 16, 16]
    assert [images_of_a_line((8, 28, 28), n, "NCHW") for n in (15, 16, 64)] == [1, 1, 1]
    assert [images_of_a_line((8, 2, 2), n, layout) for n in (2, 8) for layout in ("NCHW", "channels_last")] == [
        1,
        1,
        16,
        16,
    ]
    assert [images_of_a_line((8, 28, 28), n, "lines") for n in (1, 64)] == [16, 16]


def test_a_plan_for_ordinary_tensors_refuses_lines():
    w = torch.zeros(4, 4, 1, 1)
    support, x = plans.Support(torch.ones(w.shape, dtype=torch.bool)), torch.zeros(1, 4, 9, 9)
    plan = support.plan(False, x.shape, w, plans.Geometry(), (x, x))
    lines = plans.lines_maps(plans.to_lines(x), 1)
    with pytest.raises(ValueError, match="a plan for ordinary tensors, given lines"):
        plan.forward(w.data_ptr(), False, lines, (x.data_ptr(), False, 1, x.stride()), 0, False, 1)


def test_maps_that_are_only_marked_as_negative():
    x, w, m, b = drawn(2, 8, 9, 5)
    negative = torch.complex(x, -x).conj().imag  # what is in memory is -x
    assert negative.is_neg()
    for images in (1, 2):
        expected = F.conv2d(negative[:images], torch.where(m, w, 0), b, 1, 1)
        assert_close(masked_conv2d(negative[:images], w, m, b, 1, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [7, 14])
def test_maps_that_are_not_contiguous(size, memory_format):
    """Convolutions take what the one before made, in its layout, and the expanded gradient of mean pooling."""
    x, w, m, _ = drawn(20, 8, size, 8)
    x = x.to(memory_format=memory_format)
    results = []
    for op in (masked_conv2d, F.conv2d):
        dtype = torch.float32 if op is masked_conv2d else torch.float64
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, w.flip(0))]
        y = leaves[0]
        for weight, mask in zip(leaves[1:], (m, m.flip(1)), strict=True):
            y = op(y, weight, mask, None, 1, 1) if op is masked_conv2d else op(y, weight * mask, None, 1, 1)
            y = F.silu(y)
        y.mean((2, 3)).square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_millions_of_non_zeros():
    """More sums than a thread's stack could hold, at no sparsity."""
    x, w, _, b = drawn(16, 512, 3, 512)
    check(masked_conv2d, (x, w, torch.ones(w.shape, dtype=torch.bool), b), (1, 1))


def test_many_non_zeros_in_one_output_channel():
    """More than an int16 can count."""
    x, w, _, b = drawn(16, 3700, 3, 2)
    m = torch.ones(w.shape, dtype=torch.bool)
    m[1] = torch.rand(w.shape[1:]) < 0.1
    check(masked_conv2d, (x, w, m, b))


@pytest.mark.parametrize("op", [masked_conv2d, masked_linear])
def test_a_large_weight(op):
    """Whose gradient lies in memory that is kept."""
    if op is masked_conv2d:
        check(op, drawn(20, 64, 6, 128, density=0.1), (2, 1))
    else:
        w = torch.randn(300, 400)
        check(op, (torch.randn(40, 400), w, torch.rand(w.shape) < 0.1, torch.randn(300)))


def test_groups():
    check(masked_conv2d, drawn(20, 16, 9, 24, groups=4), (1, 1, 1, 4))
    check(masked_conv2d, drawn(20, 16, 9, 16, groups=16, density=0.7), (2, 1, 1, 16))  # depthwise


def test_dilation():
    check(masked_conv2d, drawn(20, 8, 9, 12), (1, 2, 2))


def test_masks_are_saved_and_grow():
    """The same Parameter, with its momentum; G is there where nothing has grown yet."""
    net = sb.sparsify(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False)), 0.8)
    layer, weight = net[0], net[0].weight
    assert [name for name in net.state_dict() if name.endswith("mask")] == ["0.mask"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(20, 4, 6, 6)
    layer.collect("all")
    for grown in (False, True):
        dense = sb.densify(net)
        for model in (net, dense):
            model.zero_grad()
            model(x).square().sum().backward()
        assert_close(layer.effective_grad, dense[0].weight.grad, rtol=1e-4, atol=1e-3)
        assert_close(weight.grad, dense[0].weight.grad * layer.mask, rtol=1e-4, atol=1e-3)
        optimizer.step()
        if not grown:
            momentum = optimizer.state[weight]["momentum_buffer"]
            layer.set_mask(layer.mask | (torch.rand(layer.mask.shape) < 0.5))
            layer.zero_effective_grad()
    assert layer.weight is weight
    assert optimizer.state[weight]["momentum_buffer"] is momentum


@pytest.mark.parametrize("op", ["forward", "input gradient", "weight gradient"])
def test_other_threads_go_on_while_a_kernel_runs(op):
    """Each pass is one long call; a thread that needs Python between naps never waits as long as half of it."""
    torch.set_num_threads(1)
    x, w, m, _ = drawn(128, 128, 28, 128, density=0.5)
    x.requires_grad_(op == "input gradient")
    w.requires_grad_(op == "weight gradient")
    y = masked_conv2d(x, w, m, None, 1, 1)  # the plan is there then
    dy = torch.randn_like(y)
    awake, done = [], threading.Event()

    def nap():
        while not done.is_set():
            time.sleep(0.001)
            awake.append(time.perf_counter())

    thread = threading.Thread(target=nap)
    thread.start()
    try:
        begin = time.perf_counter()
        if op == "forward":
            masked_conv2d(x, w, m, None, 1, 1)
        else:
            y.backward(dy)
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    moments = torch.tensor([begin, *(t for t in awake if begin < t < end), end], dtype=torch.float64)
    assert moments.diff().max() < 0.5 * (end - begin)


def test_an_input_gradient_that_nobody_needs_is_not_computed(monkeypatch):
    calls = []
    compute = plans.conv2d_input_grad
    monkeypatch.setattr(plans, "conv2d_input_grad", lambda *operands: calls.append(0) or compute(*operands))
    w = torch.randn(5, 4, 3, 3, requires_grad=True)
    mask = torch.rand(w.shape) < 0.5
    for needed in (False, True):
        x = torch.randn(16, 4, 6, 6, requires_grad=needed)
        masked_conv2d(x, w, mask).sum().backward()
        rows, flat = torch.randn(16, 36, requires_grad=needed), w.view(5, 36)
        masked_linear(rows, flat, mask.view(5, 36)).sum().backward()
        assert len(calls) == 2 * needed


def test_a_loaded_mask_is_the_one_that_runs():
    net, other = (sb.sparsify(nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3)), 0.8) for _ in range(2))
    x = torch.randn(16, 4, 6, 6)
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert_close(other(x), sb.densify(net)(x), rtol=1e-4, atol=1e-4)


@given(st.data())
def test_learning_support(data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=60)))
    search = torch.tensor(data.draw(st.lists(st.integers(-3, len(mask) - 1), max_size=80)), dtype=torch.int64)
    support = plans.LearningSupport(mask, search)
    active = mask.nonzero().squeeze(1).tolist()
    assert support.positions.tolist() == sorted({*active, *(p for p in search.tolist() if p >= 0)})
    assert support.positions[support.active].tolist() == active
    values = torch.cat([support.positions, torch.tensor([-1])])  # -1 takes the last
    assert values[support.wanted].tolist() == [max(p, -1) for p in search.tolist()]


def test_a_search_space_of_padding_beside_no_weights():
    w, positions = torch.randn(5, 4, 3, 3, requires_grad=True), torch.tensor([-1, -1])
    sink = make_grad_sink(w, positions)
    mask = torch.zeros(w.shape, dtype=torch.bool)
    masked_conv2d(torch.randn(16, 4, 6, 6), w, mask, grad_sink=sink, positions=positions).sum().backward()
    assert sink.grad.tolist() == [0, 0]
    assert not w.grad.any()


@pytest.mark.parametrize("op", [masked_conv2d, masked_linear])
def test_positions_outside_the_weight_are_refused(op):
    shape = (5, 4, 3, 3) if op is masked_conv2d else (5, 36)
    w = torch.randn(shape, requires_grad=True)
    x, mask = torch.randn(16, *shape[1:]), torch.rand(shape) < 0.5
    positions = torch.tensor([0, w.numel()])
    y = op(x, w, mask, grad_sink=make_grad_sink(w, positions), positions=positions)
    with pytest.raises(IndexError, match="positions has 180; expected less than 180"):
        y.sum().backward()


@pytest.mark.parametrize("searched", [False, True])
def test_the_gradient_has_the_dtype_and_the_layout_of_the_weight(searched):
    w = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    mask = torch.rand(w.shape) < 0.5
    positions = torch.tensor([7, 3, -1]) if searched else None
    sink = make_grad_sink(w, positions) if searched else None
    x = torch.randn(16, 4, 6, 6)
    torch.set_default_dtype(torch.float64)
    try:
        masked_conv2d(x, w, mask, grad_sink=sink, positions=positions).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert w.grad.dtype == torch.float32
    assert w.grad.stride() == w.stride()


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_bfloat16_is_rounded_as_pytorch_rounds(isa):
    native.lib.set_isa(isa)
    ties = (
        torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00018000, 0x7F800001]).to(torch.int32).view(torch.float32)
    )
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -3.4e38])
    x = torch.cat([ties, -ties, special, torch.randn(100) * 10.0 ** torch.randint(-38, 38, (100,))]).view(1, 1, 1, -1)
    rounded = x.bfloat16()
    data = plans.to_lines(x, torch.bfloat16)
    assert torch.equal(data[0, :, :, :, 0].nan_to_num(7.0), rounded[0].nan_to_num(7.0))
    for dtype in (torch.float32, torch.bfloat16):
        back = plans.from_lines(data, torch.empty(x.shape, dtype=dtype))
        assert torch.equal(back.nan_to_num(7.0), rounded.to(dtype).nan_to_num(7.0))


def test_autocast_is_obeyed(monkeypatch):
    net = sb.sparsify(nn.Sequential(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3)), 0.5)
    x = torch.randn(16, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = net(x), sb.densify(net)(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, rtol=2**-6, atol=2**-6)
    y.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.any() for leaf in (x, *net.parameters()))


def test_float16_takes_the_dense_library():
    conv = sb.sparsify(nn.Conv2d(4, 5, 3), 0.5).half()
    assert conv.backend.name == "dense"
    assert "float32 and bfloat16, not torch.float16" in conv.backend.reason


def test_threads_share_a_plan():
    w = torch.randn(20, 12, 3, 3)
    mask = torch.rand(w.shape) < 0.3
    batches = [torch.randn(n, 12, 9, 9) for n in (16, 5, 33, 16, 48, 16, 1, 16)]

    def run(x):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = masked_conv2d(leaves[0], leaves[1], mask, None, 2, 1)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected = [run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for got in [list(pool.map(run, batches)) for _ in range(5)]:
            for tensors, others in zip(got, expected, strict=True):
                assert all(map(torch.equal, tensors, others))


# -- the choice, pass by pass ------------------------------------------------------------------------------------------

CALLS = {"forward": "conv2d", "input_grad": "conv2d_input_grad", "weight_grad": "conv2d_weight_grad"}


@pytest.fixture
def sparse_passes(monkeypatch):
    """Passes that ran on the sparse kernels, in order."""
    ran = []
    for name, function in CALLS.items():
        compute = getattr(plans, function)
        monkeypatch.setattr(plans, function, lambda *a, n=name, f=compute: ran.append(n) or f(*a))
    return ran


@pytest.fixture
def prices(monkeypatch):
    """``prices(*passes)``: the rule finds the sparse kernels cheap in these passes only."""

    def set_prices(*cheap):
        monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "auto")
        costs = {name: dispatch._Cost(0.0 if name in cheap else 1e9, 0.0) for name in PASSES}
        monkeypatch.setattr(dispatch, "_COSTS", {"masked_conv2d": costs, "masked_linear": costs})
        dispatch._choose.cache_clear()

    yield set_prices
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("cheap", [c for r in range(4) for c in itertools.combinations(PASSES, r)], ids="-".join)
@pytest.mark.parametrize("op", [masked_conv2d, masked_linear])
def test_each_pass_has_a_choice_of_its_own(op, cheap, prices, sparse_passes):
    prices(*cheap)
    shape = (6, 4, 3, 3) if op is masked_conv2d else (6, 36)
    x, w, b = torch.randn(17, *shape[1:]), torch.randn(shape), torch.randn(6)
    m, positions = torch.rand(shape) < 0.4, torch.tensor([5, 0, -1, 40])
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    sink = make_grad_sink(w, positions)
    y = op(leaves[0], leaves[1], m, leaves[2], grad_sink=sink, positions=positions)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert tuple(sparse_passes) == cheap

    plain = [t.double().requires_grad_() for t in (x, torch.where(m, w, 0), b)]
    expected = F.conv2d(*plain) if op is masked_conv2d else F.linear(*plain)
    expected.backward(dy.double())
    g = plain[1].grad
    at = torch.where(positions >= 0, g.flatten()[positions.clamp(min=0)], 0)
    gradients = ((leaves[0].grad, plain[0].grad), (leaves[1].grad, g * m), (leaves[2].grad, plain[2].grad))
    for got, want in ((y, expected), (sink.grad, at), *gradients):
        assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Linear(36, 6)], ids=lambda layer: type(layer).__name__)
def test_a_gradient_of_all_scores_takes_the_dense_library_for_one_pass(layer, sparse_passes):
    layer = sb.sparsify(copy.deepcopy(layer), 0.8)
    x = torch.randn(16, *layer.weight.shape[1:], requires_grad=True)
    for collect, scores in (("none", False), ("all", False), ("none", True)):
        layer.collect(collect)
        layer.set_mask_scores(nn.Parameter(torch.rand_like(layer.weight)) if scores else None)
        del sparse_passes[:]
        layer(x).sum().backward()
        expected = list(PASSES[: 3 if (collect, scores) == ("none", False) else 2])
        assert sparse_passes == expected
        assert [name for name, backend in layer.backends.items() if backend.name == "sparse"] == expected
        assert ("backend=sparse, weight gradient dense" in repr(layer)) == (len(expected) == 2)
    assert "the gradient is wanted everywhere" in layer.backends["weight_grad"].reason
    layer.collect("none")
    layer.set_mask_scores(None)
    assert describe(layer.backends) == "sparse"


def test_a_search_space_counts_in_the_weight_gradient_alone(monkeypatch, sparse_passes):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "auto")
    layer = sb.sparsify(nn.Conv2d(64, 64, 3), 0.95)
    x = torch.randn(16, 64, 6, 6, requires_grad=True)
    for searched, passes in ((400, 3), (30_000, 2)):
        layer.collect("search", torch.arange(searched))
        del sparse_passes[:]
        layer(x).sum().backward()
        assert sparse_passes == list(PASSES[:passes])
        assert [backend.name for backend in layer.backends.values()].count("sparse") == passes


def test_a_small_batch_is_sparse_where_pixels_fill_the_lanes(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "auto")
    layer = (64, 64, 3, 3), torch.float32, torch.device("cpu"), 64 * 64 * 9 // 5
    in_lines = [choose_backend("masked_conv2d", *layer, images=n) for n in (1, 4, 16)]
    assert [found.name for found in in_lines] == ["dense", "dense", "sparse"]
    assert "slower, its lanes filled to 6%" in in_lines[0].reason
    for images in (1, 4, 8):
        found = choose_backend("masked_conv2d", *layer, images=images, pixels=28 * 28)
        assert found.name == "sparse"
        assert found.reason.endswith("lanes of pixels")
    assert choose_backend("masked_conv2d", *layer, images=1, pixels=1).name == "dense"
    w = torch.randn(layer[0])
    mask = torch.rand(w.shape) < 0.2
    for size, sparse in ((28, True), (1, False)):
        assert (dispatch.sparse_support("masked_conv2d", torch.empty(1, 64, size, size), w, mask) is not None) == sparse
    assert dispatch.sparse_support("masked_conv2d", w, w, mask, images=1, groups=1) is None  # in lines


def test_unknown_passes_are_refused():
    with pytest.raises(ValueError, match=r"passes=\('backward',\) is not known; allowed: forward, input_grad"):
        choose_backend("masked_linear", (4, 4), torch.float32, torch.device("cpu"), 4, passes="backward")


# -- networks ----------------------------------------------------------------------------------------------------------


def network():
    """With a strided and a grouped convolution; smooth, lest a rounding error switch a unit off."""
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    layers += [nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.SiLU()]
    layers += [
        nn.Conv2d(24, 24, 3, groups=4, bias=False),
        nn.BatchNorm2d(24),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    ]
    return sb.sparsify(nn.Sequential(*layers), 0.7, seed=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_goes_as_with_dense_kernels(monkeypatch, memory_format):
    start = network().to(memory_format=memory_format)
    x, y = torch.randn(50, 3, 8, 8).to(memory_format=memory_format), torch.randint(4, (50,))
    losses = {}
    for backend in ("dense", "sparse"):
        monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
        net = copy.deepcopy(start)
        assert {layer.backend.name for _, layer in sb.sparse_layers(net)} == {backend}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        losses[backend] = []
        for step in range(40):
            if step == 20:
                net[3].set_mask(net[3].mask.roll(1, 0))
            batch = slice(step % 2 * 25, (step % 2 + 1) * 25)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["sparse"][-1] < 0.2 * losses["sparse"][0]
    assert losses["sparse"] == pytest.approx(losses["dense"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_fullgraph(memory_format):
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    eager = network().to(memory_format=memory_format)
    eager[3].collect("search", torch.tensor([0, 40, -1, 7]))
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(3):
        x = torch.randn(16, 3, 8, 8).to(memory_format=memory_format)
        for net, forward in ((eager, eager), (twin, compiled)):
            net.zero_grad()
            net[3].zero_effective_grad()
            forward(x).square().sum().backward()
        assert_close(twin[3].effective_grad, eager[3].effective_grad, rtol=1e-3, atol=1e-3)
        for a, b in zip(twin.parameters(), eager.parameters(), strict=True):
            assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
        for net in (eager, twin):
            net[6].set_mask(net[6].mask.roll(1, 0))
    torch._dynamo.reset()


def test_a_weight_that_is_a_slice():
    """Its gradient has other strides than itself."""
    x, whole = torch.randn(16, 6, 5, 5), torch.randn(40, 12, 3, 3)
    w = whole[::2, 3:9]
    m = torch.rand(w.shape) < 0.3
    leaves = [t.clone().requires_grad_() for t in (x, w.contiguous())]
    F.conv2d(leaves[0], torch.where(m, leaves[1], 0)).square().sum().backward()
    x.requires_grad_()
    whole.requires_grad_()
    masked_conv2d(x, whole[::2, 3:9], m).square().sum().backward()
    assert_close(x.grad, leaves[0].grad, rtol=1e-3, atol=1e-3)
    assert_close(whole.grad[::2, 3:9], leaves[1].grad, rtol=1e-3, atol=1e-2)


def test_operands_that_do_not_fit_are_refused_before_a_kernel_reads_them():
    x, w = torch.randn(16, 4, 3, 3), torch.randn(5, 4, 3, 3)
    mask = torch.rand(w.shape) < 0.5
    with pytest.raises(ValueError, match=r"bias has shape \[4\]; expected \[5\], one for each output"):
        masked_conv2d(x, w, mask, torch.zeros(4))
    with pytest.raises(ValueError, match="bias has dtype torch.float64; expected torch.float32"):
        masked_conv2d(x, w, mask, torch.zeros(5, dtype=torch.float64))
    for size in (1, 2):
        with pytest.raises(ValueError, match=r"input has maps of \[3, .\], too small"):
            masked_conv2d(x[..., :size], w, mask)
