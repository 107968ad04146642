"""The sparse CPU kernels against float64 autograd, on every instruction set that this machine has."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsebilevel.kernels import make_grad_sink, masked_conv2d, masked_linear, native

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


LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded")


def laid_out(tensor, layout):
    """The same values in other memory."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return tensor


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, filters = (groups * draw(st.sampled_from([1, 2, 3, 5, 8, 17, 21])) for _ in range(2))
    kernel, stride, padding, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(0, 2)), draw(pairs(1, 2))
    size = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 18))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    images = draw(st.sampled_from([1, 3, 15, 16, 17, 40, 64]))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0, "one weight", "one row"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (filters, channels // groups, *kernel)
    if isinstance(density, str):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[-1] = density == "one row"
        mask[-1, -1, -1, -1] = True
    else:
        mask = torch.rand(shape, generator=generator) < density
    x = torch.randn(images, channels, *size, generator=generator)
    w, b = torch.randn(shape, generator=generator), torch.randn(filters, generator=generator)
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
    weight_layout = draw(st.sampled_from(LAYOUTS[:2]))
    positions = None
    if draw(st.booleans()):
        positions = torch.tensor(draw(st.lists(st.integers(-2, w.numel() - 1), max_size=20)), dtype=torch.int64)
    return x, w, mask, b, (stride, padding, dilation, groups), layouts, weight_layout, positions, generator


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@given(convolutions())
@settings(deadline=None, max_examples=60)
def test_convolution(isa, problem):
    native.lib.set_isa(isa)
    x, w, m, b, geometry, layouts, weight_layout, positions, generator = problem
    leaves = [t.double().requires_grad_() for t in (x, torch.where(m, w, 0), b)]
    expected = F.conv2d(*leaves, *geometry)
    dy = torch.randn(expected.shape, generator=generator)
    if layouts[1] == "expanded":
        dy = dy[..., :1, :1].expand_as(dy)
    expected.backward(dy.double())
    dx, g, db = (leaf.grad for leaf in leaves)

    x = laid_out(x, layouts[0]).requires_grad_()
    w, m = (laid_out(t, weight_layout) for t in (w, m))
    w.requires_grad_()
    b.requires_grad_()
    sink = None if positions is None else make_grad_sink(w, positions)
    y = masked_conv2d(x, w, m, b, *geometry, grad_sink=sink, positions=positions)
    y.backward(laid_out(dy, layouts[1]))

    close = {"rtol": 1e-4, "atol": 2e-5 * max(1.0, w.numel() / w.shape[0]) ** 0.5}
    assert_close(y.double(), expected, **close)
    assert_close(x.grad.double(), dx, **close)
    assert_close(b.grad.double(), db, rtol=1e-4, atol=1e-3)
    sums = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(dy.numel() / dy.shape[1])) ** 0.5 + 1e-5}
    assert_close(w.grad.double(), g * m, **sums)
    if positions is not None:
        at = torch.where(positions >= 0, g.flatten()[positions.clamp(min=0)], 0)
        assert_close(sink.grad.double(), at, **sums)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("rows", [(1,), (16,), (5, 7), (64,), (300,)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (10, 3), (33, 130)], ids=str)
def test_linear(isa, rows, size):
    native.lib.set_isa(isa)
    generator = torch.Generator().manual_seed(0)
    n, k = size
    x, w, b = (torch.randn(s, generator=generator) for s in ((*rows, k), (n, k), (n,)))
    m = torch.rand(n, k, generator=generator) < 0.3
    leaves = [t.double().requires_grad_() for t in (x, torch.where(m, w, 0), b)]
    expected = F.linear(*leaves)
    dy = torch.randn(expected.shape, generator=generator)
    expected.backward(dy.double())
    given = [t.requires_grad_() for t in (x, w, b)]
    y = masked_linear(x, w, m, b)
    y.backward(dy)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert_close(y.double(), expected, **close)
    for got, want, keep in zip(given, leaves, (True, m, True), strict=True):
        assert_close(got.grad.double(), want.grad * keep, **close)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_results_do_not_depend_on_the_number_of_threads(isa):
    native.lib.set_isa(isa)
    torch.manual_seed(0)
    x, w = torch.randn(50, 24, 13, 11), torch.randn(40, 24, 3, 3)
    m, dy = torch.rand_like(w) < 0.15, torch.randn(50, 40, 7, 6)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = masked_conv2d(leaves[0], leaves[1], m, None, 2, 1)
        y.backward(dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_a_plan_never_outlives_its_mask():
    x, w = torch.randn(16, 4, 6, 6), torch.randn(5, 4, 3, 3)
    mask = torch.zeros(w.shape, dtype=torch.bool)
    for step in range(4):
        mask.view(-1)[step::4] = True  # in place, past every method of the library
        assert_close(masked_conv2d(x, w, mask), F.conv2d(x, torch.where(mask, w, 0)), rtol=1e-4, atol=1e-4)
    mask.data = torch.rand(w.shape) < 0.5
    assert_close(masked_conv2d(x, w, mask), F.conv2d(x, torch.where(mask, w, 0)), rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_hidden_is_never_read():
    """What torch.where hides stays hidden: inf and NaN under a zero of the mask."""
    x, w = torch.randn(16, 4, 6, 6), torch.randn(5, 4, 3, 3)
    mask = torch.rand(w.shape) < 0.5
    expected = masked_conv2d(x, w, mask)
    assert torch.equal(masked_conv2d(x, torch.where(mask, w, float("nan")), mask), expected)


def test_many_non_zeros_in_one_output_channel():
    """More than an int16 can count."""
    x, w = torch.randn(16, 3700, 3, 3), torch.randn(1, 3700, 3, 3)
    mask = torch.ones(w.shape, dtype=torch.bool)
    expected = F.conv2d(x.double(), w.double())
    assert_close(masked_conv2d(x, w, mask).double(), expected, rtol=1e-4, atol=1e-2)
