"""masked_conv2d against plain autograd on the effective weight ``z = mask * weight``."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sparsebilevel.kernels import make_grad_sink, masked_conv2d, native, reference

OPERANDS = ("input", "weight", "bias", "mask_scores", "grad_sink")


def operands(x=(2, 4, 6, 5), w=(6, 4, 3, 3), density=0.5, dtype=torch.float64):
    """Input, weight, mask, bias and scores; the floating ones are leaves."""
    drawn = [torch.randn(s, dtype=dtype, requires_grad=True) for s in (x, w, w[:1], w)]
    return drawn[0], drawn[1], torch.rand(w) < density, drawn[2], drawn[3]


def oracle(x, w, m, b, dy, *geometry):
    """Output, and gradients of input, z and bias, by plain autograd on z."""
    leaves = [t.detach().requires_grad_() for t in (x, torch.where(m, w, 0.0), b)]
    y = F.conv2d(*leaves, *geometry)
    return y.detach(), torch.autograd.grad(y, leaves, torch.ones_like(y) if dy is None else dy)


def numbers(low, high):
    return st.integers(low, high) | st.tuples(st.integers(low, high), st.integers(low, high))


def pair(value):
    return (value, value) if isinstance(value, int) else value


@st.composite
def problems(draw):
    groups, cin, cout = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, dilation = pair(draw(numbers(1, 4))), draw(numbers(1, 3))
    padding = draw(numbers(0, 2) | st.sampled_from(["same", "valid"]))
    stride = 1 if padding == "same" else draw(numbers(1, 3))
    size = [d * (r - 1) + 1 + draw(st.integers(0, 5)) for d, r in zip(pair(dilation), kernel, strict=True)]
    batch = draw(st.sampled_from([[], [0], [1], [3]]))
    w_shape = (cout * groups, cin, *kernel)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    x, w, m, b, s = operands((*batch, cin * groups, *size), w_shape, density)
    if draw(st.booleans()):
        w = w.detach().to(memory_format=torch.channels_last).requires_grad_()
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed"]))
    if layout == "transposed":
        x = x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    elif layout == "channels_last" and batch:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    positions = None
    if draw(st.booleans()):
        positions = torch.tensor(draw(st.lists(st.integers(-2, w.numel() - 1), max_size=8)), dtype=torch.int64)
    return x, w, m, b, s, positions, (stride, padding, dilation, groups)


@given(problems())
@settings(deadline=None, max_examples=250)
def test_values_and_all_gradients_keep_the_contract(problem):
    x, w, m, b, s, positions, geometry = problem
    sink = make_grad_sink(w, positions)
    y = masked_conv2d(x, w, m, b, *geometry, mask_scores=s, grad_sink=sink, positions=positions)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected, (dx, g, db) = oracle(x, w, m, b, dy, *geometry)
    assert_close(y.detach(), expected)
    assert_close(x.grad, dx)
    assert_close(w.grad, g * m)
    assert_close(b.grad, db)
    assert_close(s.grad, g * w.detach())
    if positions is None:
        assert_close(sink.grad, g)
    else:
        at = [0.0 if p < 0 else g.flatten()[p].item() for p in positions.tolist()]
        assert_close(sink.grad, torch.tensor(at, dtype=g.dtype))
    assert_close(reference.masked_conv2d(x, w, m, b, *geometry), y)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_depthwise(size):
    x, w, m, b, s = operands((2, 6, size, size), (6, 1, 3, 3))
    sink = make_grad_sink(w)
    y = masked_conv2d(x, w, m, b, padding=1, groups=6, grad_sink=sink)
    y.sum().backward()
    expected, (dx, g, _) = oracle(x, w, m, b, None, 1, 1, 1, 6)
    assert_close(y.detach(), expected)
    assert_close(x.grad, dx)
    assert_close(sink.grad, g)


@pytest.mark.parametrize("wanted", [c for r in range(1, 6) for c in itertools.combinations(OPERANDS, r)], ids="-".join)
def test_gives_and_computes_only_what_is_asked(wanted):
    wanted = set(wanted)
    x, w, m, b, s = operands()
    named = dict(zip(OPERANDS, (x, w, b, s, make_grad_sink(w)), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    with FlopCounterMode(display=False) as forward:
        y = masked_conv2d(x, w, m, b, mask_scores=s, grad_sink=named["grad_sink"])
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert {name for name, tensor in named.items() if tensor.grad is not None} == wanted
    products = ("input" in wanted) + bool(wanted & {"weight", "mask_scores", "grad_sink"})
    assert backward.get_total_flops() == products * forward.get_total_flops()
    _, (dx, g, db) = oracle(x, w, m, b, None)
    expected = dict(zip(OPERANDS, (dx, g * m, db, g * w.detach(), g), strict=True))
    for name in wanted:
        assert_close(named[name].grad, expected[name])


def test_counts_the_flops_of_the_dense_layer():
    for geometry in [(1, 0, 1, 1), (2, 1, 1, 2), ((1, 2), 2, 2, 4)]:
        x, w, m, b, _ = operands((2, 4, 8, 7), (8, 4 // geometry[-1], 3, 3))
        with FlopCounterMode(display=False) as dense:
            F.conv2d(x, w, b, *geometry).sum().backward()
        with FlopCounterMode(display=False) as masked:
            masked_conv2d(x, w, m, b, *geometry).sum().backward()
        assert masked.get_total_flops() == dense.get_total_flops() > 0


def test_gradcheck_and_gradgradcheck():
    x, w, m, b, _ = operands((2, 4, 5, 4), (4, 2, 3, 2))
    geometry = (2, 1, 1, 2)
    assert torch.autograd.gradcheck(lambda x, b: masked_conv2d(x, w, m, b, *geometry), (x, b))
    assert torch.autograd.gradcheck(lambda w: masked_conv2d(x, torch.where(m, w, 0.0), m, b, *geometry), (w,))
    assert torch.autograd.gradgradcheck(lambda x, w, b: masked_conv2d(x, w, m, b, *geometry), (x, w, b))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format):
    x, w, m, b, s = operands((2, 4, 5, 5), (6, 2, 3, 3))
    x, w, m = (t.detach().to(memory_format=memory_format) for t in (x, w, m))
    x.requires_grad_()
    w.requires_grad_()
    positions = torch.tensor([3, 0, -1])
    op, geometry = torch.ops.sparsebilevel.masked_conv2d.default, ([2, 1], [1, 0], [1, 2], 2)
    torch.library.opcheck(op, (x, w, m, b, s, make_grad_sink(w), None, *geometry))
    torch.library.opcheck(op, (x, w, m, None, None, make_grad_sink(w, positions), positions, *geometry))
    torch.library.opcheck(op, (x, w, m, b, None, w, None, *geometry))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_low_precision_is_close_and_collects_in_float32(dtype, memory_format):
    x, w, m, b, s = operands(dtype=dtype)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    s = s.detach().float().requires_grad_()
    sink = make_grad_sink(w)
    y = masked_conv2d(x, w, m, b, padding=1, mask_scores=s, grad_sink=sink)
    y.sum().backward()
    expected, (dx, g, db) = oracle(x.double(), w.double(), m, b.double(), None, 1, 1)
    assert y.dtype == x.grad.dtype == w.grad.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert sink.grad.dtype == s.grad.dtype == torch.float32
    for got, want in ((y, expected), (x.grad, dx), (w.grad, g * m), (b.grad, db), (sink.grad, g)):
        assert_close(got.double(), want, atol=30 * torch.finfo(dtype).eps, rtol=30 * torch.finfo(dtype).eps)
    assert_close(s.grad, w.detach().float() * sink.grad)  # not rounded to the compute dtype


def test_autocast_computes_in_the_users_dtype_and_keeps_gradients_in_float32():
    x, w, m, b, s = operands(dtype=torch.float32)
    sink = make_grad_sink(w)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, w, m, b, padding=1, mask_scores=s, grad_sink=sink)
        assert_close(y, F.conv2d(x, torch.where(m, w, 0.0), b, padding=1))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, w, b, s, sink)} == {torch.float32}
    assert_close(s.grad, w.detach().to(torch.bfloat16) * sink.grad)  # not rounded again


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nothing_leaks_through_zeros_of_the_mask(poison):
    x, w, m, b, _ = operands()
    m[0, 1] = False
    with torch.no_grad():
        w[0, 1] = poison
    y = masked_conv2d(x, w, m, b)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    w.grad = None
    with torch.no_grad():
        x[:, 1] = poison  # now G of input channel 1 is not finite
    m[:, 1] = False
    sink = make_grad_sink(w)
    masked_conv2d(x, w, m, b, grad_sink=sink).nan_to_num(0, 0, 0).sum().backward()
    assert not sink.grad[:, 1].isfinite().any()
    assert torch.equal(w.grad[:, 1], torch.zeros(6, 3, 3, dtype=w.dtype))


def test_accumulates_exactly_over_two_backwards():
    x, w, m, b, _ = operands()
    positions = torch.tensor([7, -1, 0, 215])
    sink, where = make_grad_sink(w), make_grad_sink(w, positions)
    total = 0
    for scale in (1.0, -3.0):
        dy = torch.full((2, 6, 4, 3), scale, dtype=w.dtype)
        masked_conv2d(x, w, m, b, grad_sink=sink).backward(dy)
        masked_conv2d(x, w, m, b, grad_sink=where, positions=positions).backward(dy)
        total = total + oracle(x, w, m, b, dy)[1][1].flatten()
    assert torch.equal(sink.grad.flatten(), total)
    assert torch.equal(where.grad, torch.stack([total[7], torch.zeros_like(total[0]), total[0], total[215]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(6, 4, 3, 3)}, r"mask has dtype torch.float32; expected torch.bool"),
        ({"mask": torch.ones(6, 4, dtype=torch.bool)}, r"mask has shape \[6, 4\]; expected \[6, 4, 3, 3\]"),
        ({"input": torch.ones(2, 3, 6, 5)}, r"input has 3 channels, but weight and groups=1 ask for 4"),
        ({"bias": torch.ones(5)}, r"bias has shape \[5\]; expected \[6\], one for each output"),
        ({"groups": 2}, r"input has 4 channels, but weight and groups=2 ask for 8"),
        ({"input": torch.ones(6, 5)}, r"input has shape \[6, 5\]; expected \[B, C, H, W\] or \[C, H, W\]"),
        ({"padding": "full"}, r"padding='full' is not allowed; expected an int, a pair, 'valid' or 'same'"),
        ({"padding": "same", "stride": 2}, r"padding='same' needs stride 1, got stride=\(2, 2\)"),
    ],
)
def test_bad_operands_are_named(change, message):
    x, w, m, b, _ = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**({"input": x, "weight": w, "mask": m, "bias": b} | change))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_can_be_written_to(memory_format, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    x, weight = (
        torch.randn(8, 16, 32, 32).to(memory_format=memory_format),
        torch.randn(16, 16, 3, 3, requires_grad=True),
    )
    y = masked_conv2d(x.to(memory_format=memory_format), weight, torch.rand(weight.shape) < 0.2, padding=1)
    F.relu(y, inplace=True).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("geometry", "name"),
    [
        ({"groups": 2}, "groups=2 is not allowed; expected a divisor of the weight's 9 outputs"),
        ({"groups": 0}, "groups=0"),
        ({"padding": -1}, "padding=-1 is not allowed; expected a whole number, at least 0, or two of them"),
        ({"dilation": 0}, "dilation=0 is not allowed; expected a whole number, at least 1"),
        ({"stride": (1, 0)}, r"stride=\(1, 0\) is not allowed"),
        ({"stride": (1, 1, 1)}, r"stride=\(1, 1, 1\) is not allowed"),
    ],
)
def test_geometry_that_torch_refuses(backend, geometry, name, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    groups = max(geometry.get("groups", 1), 1)
    x, w = torch.randn(16, 8, 6, 6), torch.randn(9, 8 // groups, 3, 3)
    with pytest.raises(ValueError, match=name):
        masked_conv2d(x, w, torch.rand(w.shape) < 0.1, **geometry)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_geometry_of_one_number_in_a_sequence(backend, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    x, w = torch.randn(16, 8, 6, 6), torch.randn(8, 8, 3, 3)
    m = torch.rand(w.shape) < 0.1
    geometry = {"stride": (2,), "padding": [1], "dilation": (1,)}
    assert_close(masked_conv2d(x, w, m, **geometry), F.conv2d(x, w * m, **geometry), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not native.available(), reason="no C++ extension")
def test_plans_refuse_groups_that_do_not_divide_the_channels(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    w = torch.randn(9, 4, 3, 3)
    with pytest.raises(ValueError, match="groups that do not divide the channels"):
        torch.ops.sparsebilevel.masked_conv2d(
            torch.randn(16, 8, 6, 6), w, torch.rand(w.shape) < 0.1, None, None, None, None, [1, 1], [1, 1], [1, 1], 2
        )


@pytest.mark.parametrize("stride", [2, (2, 1), (1, 2)], ids=str)
def test_padding_same_refuses_any_stride(stride):
    w = torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        masked_conv2d(torch.randn(2, 3, 8, 8), w, w > 0, stride=stride, padding="same")
