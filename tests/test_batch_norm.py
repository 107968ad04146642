"""Fused batch normalization against float64 autograd, on every instruction set that this machine has."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close

import sparsebilevel as sb
from sparsebilevel.kernels import batch_norm, native, reference
from sparsebilevel.kernels.batch_norm import batch_norm_for_uses

ISAS = [i for i in native.lib.Isa.__members__.values() if i <= native.lib.cpu_isa()] if native.available() else []
needs_native = pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _restore():
    isa, threads = native.available() and native.lib.isa(), torch.get_num_threads()
    yield
    if native.available():
        native.lib.set_isa(isa)
    torch.set_num_threads(threads)


def maps(shape, dtype=torch.float32, shift=0.0):
    values = torch.randn(shape) + shift
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def poison_pool(elements):
    """What the pool hands out next holds NaN."""
    if native.available():
        from sparsebilevel.kernels import plans

        held = [plans.empty(elements).fill_(float("nan")) for _ in range(3)]
        del held


def is_ours(out):
    return out.grad_fn.name() == "_BatchNormBackward"


def check(shape, dtype=torch.float32, *, training=True, residual=False, relu=False, affine=True, running=True, uses=1):
    """Result, running statistics and all gradients."""
    channels = shape[1]
    operands = [maps(shape, dtype, shift=1.0)]
    if residual:
        operands.append(maps(shape, dtype))
    if affine:
        operands += [torch.rand(channels) + 0.5, torch.randn(channels)]
    leaves = [t.clone().requires_grad_() for t in operands]
    exact = [t.double().requires_grad_() for t in operands]
    statistics = [torch.randn(channels), torch.rand(channels) + 0.5] if running or not training else [None, None]
    moved = [s if s is None else s.double() for s in statistics]

    def run(function, tensors, held):
        x, *rest = tensors
        other = rest.pop(0) if residual else None
        weight, bias = rest or (None, None)
        return function(x, *held, weight, bias, training, 0.3, 1e-3, residual=other, relu=relu)

    poison_pool(operands[0].numel())
    if uses == 1:
        outs = (run(batch_norm, leaves, statistics),)
    else:
        outs = run(
            lambda *a, residual, relu: batch_norm_for_uses(uses, *a, residual, relu),
            leaves,
            statistics,
        )
        assert len({out.data_ptr() for out in outs}) == 1
    want = run(reference.batch_norm, exact, moved)
    assert is_ours(outs[0]) == native.available()
    assert outs[0].dtype == dtype
    near = TOLERANCE[dtype]
    assert_close(outs[0].double(), want, rtol=near, atol=near)
    for got, expected in zip(statistics, moved, strict=True):
        if got is not None:
            assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    # Where rounding could have moved the sign of an activation there is no gradient to compare.
    grads = [torch.where(want.abs() < near, 0, torch.randn(shape)).to(dtype) for _ in outs]
    poison_pool(operands[0].numel())
    torch.autograd.backward(outs, grads)
    want.backward(sum(g.double() for g in grads))
    for got, expected in zip(leaves, exact, strict=True):
        assert got.grad.dtype == got.dtype
        largest = float(expected.grad.abs().max())
        assert_close(got.grad.double(), expected.grad, rtol=5 * near, atol=5 * near * max(1.0, largest))


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_values_statistics_and_gradients(isa, data):
    native.lib.set_isa(isa)
    draw = data.draw
    channels = draw(st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 70, 131]))
    shape = (draw(st.integers(1, 9)), channels, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    training = draw(st.booleans()) and shape[0] * shape[2] * shape[3] > 3
    flags = {name: draw(st.booleans()) for name in ("residual", "relu", "affine", "running")}
    dtype, uses = draw(st.sampled_from([torch.float32, torch.bfloat16])), draw(st.sampled_from([1, 1, 2, 3]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    check(shape, dtype, training=training, uses=uses, **flags)


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("shape", [(64, 16, 12, 12), (300, 5, 1, 1), (2, 520, 7, 7)], ids=str)
def test_sizes_that_are_cut_up(isa, shape):
    native.lib.set_isa(isa)
    check(shape, residual=True, relu=True, uses=2)
    check(shape, torch.bfloat16, relu=True)


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_results_do_not_depend_on_the_number_of_threads(isa, dtype):
    native.lib.set_isa(isa)
    x, residual, grad = (maps((33, 20, 9, 7), dtype) for _ in range(3))
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, residual, torch.ones(20), torch.zeros(20))]
        running = torch.zeros(20), torch.ones(20)
        out = batch_norm(leaves[0], *running, *leaves[2:], True, residual=leaves[1], relu=True)
        out.backward(grad)
        found.append([out, *running, *(leaf.grad for leaf in leaves)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_statistics_of_maps_far_from_zero(isa):
    native.lib.set_isa(isa)
    x = maps((40, 6, 30, 30), shift=1000.0)
    running = torch.zeros(6), torch.ones(6)
    got = batch_norm(x, *running, training=True, momentum=1.0)
    exact = x.double()
    assert_close(running[0].double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    assert_close(running[1].double(), exact.var((0, 2, 3)), rtol=1e-5, atol=0)
    assert_close(got.double(), F.batch_norm(exact, None, None, training=True), rtol=0, atol=1e-3)


@needs_native
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_bfloat16_is_rounded_as_torch_rounds_it(isa):
    native.lib.set_isa(isa)
    values = torch.randint(-(2**31), 2**31, (3000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    values = torch.cat([values, torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, 1e-40])])
    scale = torch.where(values.abs() < 1e30, values, 1.5)  # as the weight, which is float32: 1 * weight + 0
    x = torch.ones(1, len(scale), 1, 1, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    running = torch.zeros(len(scale)), torch.ones(len(scale))
    got = batch_norm(x, *running, scale, None, False, 0.1, 0.0)
    assert torch.equal(got.flatten(), scale.bfloat16())


@needs_native
@pytest.mark.parametrize("residual", [False, True])
def test_nan_and_infinity_pass_as_in_torch(residual):
    x = maps((4, 20, 3, 3))
    x[0, 1, 0, 0], x[1, 2, 0, 0], x[2, 18, 1, 1] = float("nan"), float("inf"), -float("inf")
    other = maps(x.shape) if residual else None
    arguments = torch.zeros(20), torch.ones(20), torch.ones(20), torch.zeros(20), False, 0.1, 1e-5
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ops = batch_norm, reference.batch_norm
    found = [op(leaf, *arguments, residual=other, relu=True) for op, leaf in zip(ops, leaves, strict=True)]
    assert_close(found[0], found[1], equal_nan=True)
    for out in found:
        out.backward(torch.ones_like(out))
    assert_close(leaves[0].grad, leaves[1].grad, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(),
        lambda x: x.double(),
        lambda x: x[:, ::2],
        lambda x: x[:, :, 1:],
        lambda x: x[:0],
        lambda x: torch.complex(x, x).conj().imag.contiguous(memory_format=torch.channels_last),
        lambda x: x.half(),
    ],
    ids=["NCHW", "float64", "channels apart", "cropped", "empty", "lazily negated", "float16"],
)
def test_others_run_as_torch_runs_them(change):
    x = change(maps((3, 6, 5, 4)))
    running = [torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
    running[1] += 1
    training = x.numel() > 0
    other = x * 2
    want = reference.batch_norm(x, *(r.clone() for r in running), training=training, residual=other, relu=True)
    got = batch_norm(x, *running, training=training, residual=other, relu=True)
    assert_close(got, want)
    assert got.stride() == want.stride() or x.is_neg() or not x.numel()


@needs_native
def test_operands_of_other_kinds_fall_back():
    x, vector = maps((4, 6, 3, 3)).requires_grad_(), torch.rand(6)
    assert is_ours(batch_norm(x, None, None, vector, training=True))
    for others in (
        {"weight": torch.rand(12)[::2]},
        {"residual": maps((4, 6, 3, 3)).contiguous()},
        {"residual": torch.randn(4, 6, 1, 1)},
        {"weight": vector.bfloat16(), "bias": vector.bfloat16()},
    ):
        x32 = x if "bias" not in others else x.detach().bfloat16().requires_grad_()
        out = batch_norm(x32, None, None, training=True, **others)
        assert not is_ours(out)
        assert_close(out, reference.batch_norm(x32, None, None, training=True, **others))


def test_what_torch_refuses_is_refused():
    x = maps((1, 4, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x, None, None, training=True)
    with pytest.raises(RuntimeError, match="running_mean"):
        batch_norm(x, None, None)
    with pytest.raises(RuntimeError, match="3"):
        batch_norm(maps((2, 4, 2, 2)), torch.zeros(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        batch_norm(maps((2, 4, 2, 2)), torch.zeros(4), torch.ones(4), residual=maps((2, 4, 3, 3)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_double_backward(training, residual):
    operands = [maps((3, 4, 3, 2)), torch.rand(4) + 0.5, torch.randn(4), maps((3, 4, 3, 2))]
    found = []
    for function, dtype in ((batch_norm, torch.float32), (reference.batch_norm, torch.float64)):
        torch.manual_seed(1)
        x, weight, bias, other = (t.to(dtype).requires_grad_() for t in operands)
        out = function(
            *(x, torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype), weight, bias, training),
            residual=other if residual else None,
            relu=True,
        )
        leaves = [x, weight, bias] + ([other] if residual else [])
        first = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        found.append([*first, *second])
    for got, want in zip(*found, strict=True):
        assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * max(1.0, float(want.detach().abs().max())))


@pytest.mark.parametrize("wanted", ["input", "weight", "residual", "bias"])
def test_some_gradients(wanted):
    operands = {
        "input": maps((3, 4, 3, 2)),
        "weight": torch.rand(4),
        "bias": torch.rand(4),
        "residual": maps((3, 4, 3, 2)),
    }
    operands[wanted].requires_grad_()
    grads = []
    for function in (batch_norm, reference.batch_norm):
        out = function(running_mean=None, running_var=None, training=True, relu=True, **operands)
        grads.append(torch.autograd.grad(out.square().sum(), operands[wanted])[0])
    assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_gradients_of_other_layouts():
    x = maps((3, 4, 6, 5)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for leaf, function in ((x, batch_norm), (y, reference.batch_norm)):
        out = function(leaf, None, None, training=True, relu=True)
        (out.mean((2, 3)).pow(2).sum() + (out.contiguous() * torch.arange(30.0).view(6, 5)).sum()).backward()
    assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@needs_native
def test_compilers_transforms_and_modes_see_torch(monkeypatch):
    monkeypatch.setattr(native.lib, "batch_norm_nhwc_forward", None)  # would fail
    x, module = maps((3, 4, 5, 5)), sb.FusedBatchNorm2d(4, relu=True)
    module.eval()
    with pytest.raises(TypeError):
        module(x)
    want = F.relu(F.batch_norm(x, module.running_mean, module.running_var))
    with torch.no_grad():
        assert_close(torch.jit.trace(module, x, check_trace=False)(x), want)
        assert_close(torch.export.export(module, (x,)).module()(x), want)
        assert_close(torch.compile(module, backend="eager")(x), want)
        assert_close(torch.func.vmap(module)(torch.stack([x, x]))[1], want)
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert_close(module(x), want)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x)).shape == x.shape


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("relu", [False, True])
def test_module_is_batch_norm_2d(settings, relu):
    plain, fused = nn.BatchNorm2d(5, **settings), sb.FusedBatchNorm2d(5, **settings, relu=relu)
    assert isinstance(fused, nn.BatchNorm2d)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    fused.load_state_dict(plain.state_dict())
    assert repr(fused) == repr(plain).replace("BatchNorm2d", "FusedBatchNorm2d").replace(
        ")", ", relu=True)" if relu else ")"
    )
    for training in (True, True, False):
        x, residual = maps((6, 5, 4, 4)), maps((6, 5, 4, 4))
        for module in (plain, fused):
            module.train(training)
        want = plain(x) + residual
        assert_close(fused(x, residual), want.relu() if relu else want, rtol=1e-4, atol=1e-5)
        for got, expected in zip(fused.buffers(), plain.buffers(), strict=True):
            assert_close(got, expected, rtol=1e-5, atol=1e-6)
    x = maps((6, 5, 4, 4))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        assert type(other) is sb.FusedBatchNorm2d
        assert torch.equal(other(x), fused(x))


def test_module_refuses_maps_without_batch_and_keeps_its_count():
    module = sb.FusedBatchNorm2d(4)
    with pytest.raises(ValueError, match=r"input has shape \[4, 3, 3\]; expected \[B, C, H, W\]"):
        module(torch.randn(4, 3, 3))
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("relu", [False, True])
def test_autocast(relu):
    conv, x = nn.Conv2d(3, 8, 3), maps((4, 3, 8, 8))
    conv.to(memory_format=torch.channels_last)
    plain, fused = nn.BatchNorm2d(8), sb.FusedBatchNorm2d(8, relu=relu)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        want, got = plain(y), fused(y)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want.relu() if relu else want, rtol=2e-2, atol=2e-2)


@needs_native
def test_a_running_mean_that_moves_is_noticed():
    module = sb.FusedBatchNorm2d(4)
    version = module.running_mean._version
    module(maps((3, 4, 2, 2)))
    assert module.running_mean._version > version


@pytest.mark.parametrize("residual", [False, True])
def test_results_can_be_written_to(residual):
    x, other = maps((8, 16, 32, 32)).requires_grad_(), maps((8, 16, 32, 32))
    grads = []
    for module in (sb.FusedBatchNorm2d(16), nn.BatchNorm2d(16)):
        out = module(x, other) if residual and isinstance(module, sb.FusedBatchNorm2d) else module(x)
        out = out + other if residual and type(module) is nn.BatchNorm2d else out
        out = F.relu(out, inplace=True)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert_close(*grads, rtol=1e-4, atol=1e-3)
    out = sb.FusedBatchNorm2d(16, relu=True)(x, other).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    x, weight, bias = maps((3, 4, 5, 5)), torch.rand(4), torch.rand(4)
    results = []
    for default in (torch.float32, dtype):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.set_default_dtype(default)
        try:
            out = batch_norm(leaves[0], None, None, *leaves[1:], training=True, relu=True)
            assert is_ours(out)
            out.square().sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append([out, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@needs_native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_batched_gradients(residual, training):
    module = sb.FusedBatchNorm2d(4, relu=True).train(training)
    x, other = maps((3, 4, 5, 5)).requires_grad_(), maps((3, 4, 5, 5)).requires_grad_()
    out = module(x, other) if residual else module(x)
    assert is_ours(out)
    leaves = [x, *module.parameters(), *([other] if residual else [])]
    grads = torch.randn(2, *out.shape)
    got = torch.autograd.grad(out, leaves, grads, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in grads]
    for found, wanted in zip(got, zip(*each, strict=True), strict=True):
        assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_tangents_are_those_of_torch(grad_mode):
    module = sb.FusedBatchNorm2d(4, relu=True).eval()
    x, tangent = maps((3, 4, 5, 5)), maps((3, 4, 5, 5))
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        out = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
    assert_close(out.tangent, torch.where(out.primal > 0, tangent / (1 + module.eps) ** 0.5, 0))


@pytest.mark.parametrize("tracked", [True, False])
def test_statistics_that_are_switched_off_stay(tracked):
    """As in torch: a layer that no longer tracks uses those of the batch in training, and moves nothing."""
    ours, theirs = sb.FusedBatchNorm2d(4), nn.BatchNorm2d(4)
    x = maps((3, 4, 5, 5), shift=1.0)
    for module in (ours, theirs):
        module.track_running_stats = tracked
        module(x)
    assert_close(ours.running_mean, theirs.running_mean)
    assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == int(tracked)
    assert_close(ours.eval()(x), theirs.eval()(x))
