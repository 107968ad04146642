"""masked_linear against plain autograd on the effective weight ``z = mask * weight``."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sparsebilevel.kernels import dense, dispatch, make_grad_sink, masked_linear, reference

OPERANDS = ("input", "weight", "bias", "mask_scores", "grad_sink")


def operands(rows=(3,), n=4, k=5, density=0.5, dtype=torch.float64):
    """Input, weight, mask, bias and scores; the floating ones are leaves."""
    drawn = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((*rows, k), (n, k), (n,), (n, k))]
    return drawn[0], drawn[1], torch.rand(n, k) < density, drawn[2], drawn[3]


def oracle(x, w, m, b, dy):
    """Output, and gradients of input, z and bias, by plain autograd on z."""
    leaves = [t.detach().requires_grad_() for t in (x, torch.where(m, w, 0.0), b)]
    y = F.linear(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy)


@st.composite
def problems(draw):
    rows = draw(st.lists(st.integers(0, 4), max_size=3))
    x, w, m, b, s = operands(
        rows, draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    )
    if draw(st.booleans()):  # the same values, transposed in memory
        x, w = (t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t for t in (x, w))
    positions = None
    if draw(st.booleans()):
        positions = torch.tensor(draw(st.lists(st.integers(-2, w.numel() - 1), max_size=8)), dtype=torch.int64)
    return x, w, m, b, s, positions


@given(problems())
@settings(deadline=None, max_examples=150)
def test_values_and_all_gradients_keep_the_contract(problem):
    x, w, m, b, s, positions = problem
    sink = make_grad_sink(w, positions)
    y = masked_linear(x, w, m, b, mask_scores=s, grad_sink=sink, positions=positions)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected, (dx, g, db) = oracle(x, w, m, b, dy)
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
    assert_close(reference.masked_linear(x, w, m, b), y)


@pytest.mark.parametrize("wanted", [c for r in range(1, 6) for c in itertools.combinations(OPERANDS, r)], ids="-".join)
def test_gives_and_computes_only_what_is_asked(wanted):
    wanted = set(wanted)
    x, w, m, b, s = operands()
    named = dict(zip(OPERANDS, (x, w, b, s, make_grad_sink(w)), strict=True))
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted)
    with FlopCounterMode(display=False) as flops:
        y = masked_linear(x, w, m, b, mask_scores=s, grad_sink=named["grad_sink"])
        y.sum().backward()
    assert {name for name, tensor in named.items() if tensor.grad is not None} == wanted
    products = 1 + ("input" in wanted) + bool(wanted & {"weight", "mask_scores", "grad_sink"})
    assert flops.get_total_flops() == products * 2 * 3 * 4 * 5
    _, (dx, g, db) = oracle(x, w, m, b, torch.ones_like(y))
    expected = dict(zip(OPERANDS, (dx, g * m, db, g * w.detach(), g), strict=True))
    for name in wanted:
        assert_close(named[name].grad, expected[name])


def test_counts_the_flops_of_the_dense_layer():
    for shape in [(5,), (3, 5), (2, 3, 5)]:
        x, w, m, b, _ = operands(shape[:-1])
        with FlopCounterMode(display=False) as dense:
            F.linear(x, w, b).sum().backward()
        with FlopCounterMode(display=False) as masked:
            masked_linear(x, w, m, b).sum().backward()
        assert masked.get_total_flops() == dense.get_total_flops() > 0


def test_gradcheck_and_gradgradcheck():
    x, w, m, b, _ = operands()
    assert torch.autograd.gradcheck(lambda x, b: masked_linear(x, w, m, b), (x, b))
    assert torch.autograd.gradcheck(lambda w: masked_linear(x, torch.where(m, w, 0.0), m, b), (w,))
    assert torch.autograd.gradgradcheck(lambda x, w, b: masked_linear(x, w, m, b), (x, w, b))


def test_opcheck():
    x, w, m, b, s = operands((2, 3))
    positions = torch.tensor([3, 0, -1])
    op = torch.ops.sparsebilevel.masked_linear.default
    torch.library.opcheck(op, (x, w, m, b, s, make_grad_sink(w), None))
    torch.library.opcheck(op, (x[0, 0], w, m, None, None, make_grad_sink(w, positions), positions))
    torch.library.opcheck(op, (x, w, m, b, None, w, None))
    torch.library.opcheck(op, (x.detach(), w.detach(), m, b.detach(), None, None, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_close_and_collects_in_float32(dtype):
    x, w, m, b, s = operands(dtype=dtype)
    s = s.detach().float().requires_grad_()
    sink = make_grad_sink(w)
    y = masked_linear(x, w, m, b, mask_scores=s, grad_sink=sink)
    y.sum().backward()
    expected, (dx, g, db) = oracle(x.double(), w.double(), m, b.double(), torch.ones_like(y).double())
    assert y.dtype == x.grad.dtype == w.grad.dtype == dtype
    assert sink.grad.dtype == s.grad.dtype == torch.float32
    for got, want in ((y, expected), (x.grad, dx), (w.grad, g * m), (b.grad, db), (sink.grad, g)):
        assert_close(got.double(), want, atol=10 * torch.finfo(dtype).eps, rtol=10 * torch.finfo(dtype).eps)
    assert_close(s.grad, w.detach().float() * sink.grad)  # not rounded to the compute dtype


def test_autocast_computes_in_the_users_dtype_and_keeps_gradients_in_float32():
    x, w, m, b, s = operands(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        sink = make_grad_sink(w)
        with torch.autocast("cpu", dtype):
            y = masked_linear(x, w, m, b, mask_scores=s, grad_sink=sink)
            assert_close(y, F.linear(x, torch.where(m, w, 0.0), b))
            with torch.autocast("cpu", enabled=False):
                assert masked_linear(x, w, m, b).dtype == torch.float32
        y.float().sum().backward()
        assert y.dtype == dtype
        assert {t.grad.dtype for t in (x, w, b, s, sink)} == {torch.float32}
        assert_close(s.grad, w.detach().to(dtype) * sink.grad)  # not rounded again
        s.grad = None
    double = [t.double() if t.is_floating_point() else t for t in (x, w, m, b)]
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_linear(*double).dtype == torch.float64


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_nothing_leaks_through_zeros_of_the_mask(poison):
    x, w, m, b, _ = operands()
    m[0, 1] = False
    with torch.no_grad():
        w[0, 1] = poison
    y = masked_linear(x, w, m, b)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    w.grad, x.grad = None, None
    with torch.no_grad():
        x[:, 1] = poison  # now column 1 of G is not finite
    m[:, 1] = False
    sink = make_grad_sink(w)
    masked_linear(x, w, m, b, grad_sink=sink).nan_to_num(0, 0, 0).sum().backward()
    assert not sink.grad[:, 1].isfinite().any()
    assert torch.equal(w.grad[:, 1], torch.zeros(4, dtype=w.dtype))


def test_accumulates_exactly_over_two_backwards():
    x, w, m, b, _ = operands()
    positions = torch.tensor([7, 7, -1, 0])
    sink, where = make_grad_sink(w), make_grad_sink(w, positions)
    total = 0
    for scale in (1.0, -3.0):
        dy = torch.full((3, 4), scale, dtype=w.dtype)
        masked_linear(x, w, m, b, grad_sink=sink).backward(dy)
        masked_linear(x, w, m, b, grad_sink=where, positions=positions).backward(dy)
        total = total + oracle(x, w, m, b, dy)[1][1]
    assert torch.equal(sink.grad, total)
    assert torch.equal(where.grad, torch.stack([total[1, 2], total[1, 2], torch.zeros_like(total[0, 0]), total[0, 0]]))


def test_sink_takes_no_memory_until_it_collects():
    sink = make_grad_sink(torch.zeros(300, 200))
    assert sink.untyped_storage().nbytes() == 4
    assert sink.is_leaf
    assert sink.grad is None


def test_mask_or_positions_changed_before_backward_are_noticed():
    x, w, m, b, _ = operands()
    positions = torch.tensor([0, 1])
    for change in (lambda: m.copy_(~m), lambda: positions.add_(1)):
        y = masked_linear(x, w, m, b, grad_sink=make_grad_sink(w, positions), positions=positions)
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_scores_may_change_before_backward():
    """No value of theirs is read, as in ``w * (m + s - s.detach())``."""
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    m, s = torch.rand(4, 5) < 0.5, torch.zeros(4, 5, requires_grad=True)
    y = masked_linear(x, w, m, mask_scores=s)
    with torch.no_grad():
        s.add_(1)
    y.sum().backward()
    assert_close(s.grad, w * x.detach().sum(0))


def test_forward_mode_is_refused_rather_than_dropped():
    x, w, m, b, _ = (t.detach() for t in operands())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        masked_linear(forward_ad.make_dual(x, x), w, m, b)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: masked_linear(x, w, m, b), (x,), (x,))
    y = masked_linear(x, w, m, b)  # which no tangent reaches
    v = torch.randn(2, 4, dtype=y.dtype)
    _, tangent = torch.func.jvp(lambda v: F.linear(masked_linear(x, w, m, b), v), (v,), (2 * v,))
    assert_close(tangent, F.linear(y, 2 * v))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_functional_gradients_are_those_of_autograd(backend, monkeypatch):
    """Of every sample, as torch.func gives them."""
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    x, w, m, b, s = (t.detach() for t in operands(rows=(6,), dtype=torch.float32))

    def loss(w, b, s, x):
        return masked_linear(x[None], w, m, b, mask_scores=s).square().sum()

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, None, None, 0))(w, b, s, x)
    for i in range(len(x)):
        leaves = [t.clone().requires_grad_() for t in (w, b, s)]
        loss(*leaves, x[i]).backward()
        for got, leaf in zip(found, leaves, strict=True):
            assert_close(got[i], leaf.grad)
    sink = make_grad_sink(w)
    with pytest.raises(NotImplementedError, match="nothing can be collected"):
        torch.func.grad(lambda w: masked_linear(x, w, m, grad_sink=sink).sum())(w)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_many_gradients_at_once(backend, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    x, w, m, b, _ = operands(rows=(6,), dtype=torch.float32)
    y, dy = masked_linear(x, w, m, b), torch.randn(3, 6, 4)
    found = torch.autograd.grad(y, (x, w, b), dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        want = torch.autograd.grad(y, (x, w, b), dy[i], retain_graph=True)
        for got, one in zip(found, want, strict=True):
            assert_close(got[i], one)


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_gradients_that_are_marked_as_zero(backend, monkeypatch):
    """Torch gives them out, as for ``sgn``; there is no memory behind them."""
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    x, w, m, b, _ = operands(rows=(40,), n=32, k=32, dtype=torch.float32)
    (torch.sgn(masked_linear(x, w, m, b)) * 3).sum().backward()
    assert not any(leaf.grad.any() for leaf in (x, w, b))
    marked = torch.complex(torch.zeros(40, 32), x.detach()).conj().imag  # as negative
    assert marked.is_neg()
    assert_close(masked_linear(marked, w, m, b), masked_linear(-x.detach(), w, m, b))


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_runs_where_only_deterministic_algorithms_may(backend, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    x, w, m, b, _ = operands(rows=(6,), dtype=torch.float32)
    positions = torch.tensor([3, 0, 7, -1])
    grads = []
    for is_deterministic in (False, True):
        sink = make_grad_sink(w, positions)
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            loss = masked_linear(x, w, m, b, grad_sink=sink, positions=positions).square().sum()
            grads.append(torch.autograd.grad(loss, (x, w, sink)))
        finally:
            torch.use_deterministic_algorithms(False)
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_vmap_gives_the_batched_result():
    x, w, m, b, _ = (t.detach() for t in operands((6,)))
    assert_close(torch.func.vmap(lambda x: masked_linear(x, w, m, b))(x), masked_linear(x, w, m, b))


# -- the dense library -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (0, 3), (60, 50, 3, 3), (600, 700)], ids=str)
def test_selected_bits_are_those_of_where(shape):
    w, m = torch.randn(shape), torch.rand(shape) < 0.5
    w[torch.rand(shape) < 0.3] = float("nan")
    w[torch.rand(shape) < 0.3] = float("-inf")
    w[torch.rand(shape) < 0.2] = -0.0
    layouts = [(w, m), (w.transpose(0, 1), m.transpose(0, 1)), (w[::2], m[::2]), (w, m.mT.contiguous().mT)]
    if w.dim() == 4:
        layouts.append((w.contiguous(memory_format=torch.channels_last), m))
    for weight, mask in layouts:
        got, expected = dense.effective_weight(weight, mask), reference.effective_weight(weight, mask)
        assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
        assert got.numel() < 20_000 or got.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize("rows", [(0,), (1,), (), (5, 0), (3, 7), (64,)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "cropped", "expanded"])
def test_large_dense_layers_keep_the_contract(rows, layout, monkeypatch):
    """They may take oneDNN, which small ones above do not."""
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "dense")
    x, w, m, b, s = operands(rows, 520, 530, dtype=torch.float32)
    w, dy = w.detach(), torch.randn(*rows, 520)
    if layout == "transposed":
        x, w, dy = (t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach() for t in (x, w, dy))
    elif layout == "cropped":
        x, w = (torch.cat([t.detach()] * 2, -1)[..., t.shape[-1] // 2 :][..., : t.shape[-1]] for t in (x, w))
    elif layout == "expanded":
        x, dy = x.detach()[..., :1].expand_as(x), torch.ones(()).expand_as(dy)
    w.requires_grad_()
    x = x.detach().requires_grad_()
    sink = make_grad_sink(w)
    y = masked_linear(x, w, m, b, mask_scores=s, grad_sink=sink)
    y.backward(dy)
    expected, (dx, g, db) = oracle(x.double(), w.double(), m, b.double(), dy.double())
    for got, want in ((y, expected), (x.grad, dx), (w.grad, g * m), (b.grad, db), (sink.grad, g)):
        assert_close(got.double(), want, rtol=1e-4, atol=1e-3)
    assert_close(s.grad, w.detach() * sink.grad)


def test_large_dense_layers_can_be_differentiated_twice(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "dense")
    x, w, m, b, _ = operands((4,), 520, 530, dtype=torch.float32)
    twice = []
    for y in (masked_linear(x, w, m, b), F.linear(x, torch.where(m, w, 0.0), b)):
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b)))
    for got, want in zip(*twice, strict=True):
        assert_close(got, want, rtol=1e-3, atol=1e-2 * want.abs().max().item())


def test_the_reason_names_the_dense_library(monkeypatch):
    def reason(shape, passes="forward"):
        return dispatch.choose_backend("masked_linear", shape, torch.float32, torch.device("cpu"), 9**9, passes=passes)[
            1
        ]

    monkeypatch.setattr(dispatch, "_has_onednn_linear", lambda: True)
    dispatch._choose.cache_clear()
    assert reason((1024, 1024)).startswith("oneDNN on m*theta; ")
    assert reason((1024, 1024), "weight_grad").startswith("BLAS on m*theta; ")
    assert reason((10, 512)).startswith("BLAS on m*theta; ")
    monkeypatch.setattr(dispatch, "_has_onednn_linear", lambda: False)
    dispatch._choose.cache_clear()
    assert reason((1024, 1024)).startswith("BLAS on m*theta; ")
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.ones(4, 5)}, r"mask has dtype torch.float32; expected torch.bool"),
        ({"mask": torch.ones(5, 4, dtype=torch.bool)}, r"mask has shape \[5, 4\]; expected \[4, 5\]"),
        ({"input": torch.ones(3, 4)}, r"input has shape \[3, 4\]; its last size must be 5"),
        ({"input": torch.tensor(1.0)}, r"input has shape \[\]; its last size must be 5"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool, device="meta")}, "mask is on meta; expected cpu, the weight's"),
        ({"positions": torch.zeros(2, device="meta").long()}, "positions is on meta; expected cpu, the weight's"),
        ({"bias": torch.ones(1)}, r"bias has shape \[1\]; expected \[4\], one for each output"),
        ({"bias": torch.ones(4).double()}, "bias has dtype torch.float64; expected torch.float32, the weight's"),
        ({"mask_scores": torch.ones(4)}, r"mask_scores has shape \[4\]; expected \[4, 5\]"),
        ({"grad_sink": torch.zeros(3)}, r"grad_sink has shape \[3\]; expected \[4, 5\], the weight's"),
        ({"grad_sink": torch.zeros(3), "positions": torch.zeros(2).long()}, r"expected \[2\], that of positions"),
    ],
)
def test_bad_operands_are_named(change, message):
    x, w, m, b, _ = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        masked_linear(**({"input": x, "weight": w, "mask": m, "bias": b} | change))


def test_second_derivatives_of_a_weight_that_is_its_own_sink():
    """What the gradient of the input owes to ``mask * weight`` goes out as ``G`` too, and not as ``mask * G``."""
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    m = torch.rand(4, 5) < 0.5

    def penalty(x, output):
        (grad,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        return grad.square().sum()

    x, w, z = x.requires_grad_(), w.requires_grad_(), (m * w).detach().requires_grad_()
    (found,) = torch.autograd.grad(penalty(x, masked_linear(x, w, m, grad_sink=w)), w)
    (expected,) = torch.autograd.grad(penalty(x, F.linear(x, z)), z)
    torch.testing.assert_close(found, expected)
    assert found[~m].any()
