"""The Triton kernels in Triton's interpreter, against plain torch. tests/test_triton.py runs this in its own process:

TRITON_INTERPRET must be set before a kernel is defined, and kernels that are compiled ahead of time must not see it.
On a machine with a GPU, SPARSEBILEVEL_TEST_DEVICE=cuda runs the same tests of the kernels as they are compiled.
"""

import copy
import functools
import itertools
import json
import os
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsebilevel as sb
from sparsebilevel.kernels import (
    PASSES,
    block_sparse,
    cuda_block_sparse,
    dense,
    dispatch,
    gpu,
    gpu_products,
    make_grad_sink,
    masked_conv2d,
    masked_linear,
    measurements,
    reference,
    triton_block_sparse,
    triton_conv2d,
    triton_elementwise,
    triton_matmul,
    triton_tiles,
)
from sparsebilevel.kernels.apply_mask import apply_mask, compute_copy
from sparsebilevel.kernels.block_sparse import BlockLayout, look, occupied_tiles
from sparsebilevel.kernels.dispatch import Structure, choose_product
from sparsebilevel.kernels.split_gradient import gather_support, split_gradient
from sparsebilevel.masks import Block
from sparsebilevel.optim import share_gradient

apply_mask_module = sys.modules[compute_copy.__module__]
DEVICE = torch.device(os.environ.get("SPARSEBILEVEL_TEST_DEVICE", "cpu"))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(5,), (64, 3), (2, 3, 3, 3), (0, 4), (1,), (4096,), (33, 130)]


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    """Tensors are made on the device; the CPU counts as one of the kernels: layers and optimizers go as on a GPU."""
    monkeypatch.setattr(gpu, "DEVICES", {"cpu", "cuda"})
    # Or all layers were left to torch: there is nothing that is not small here.
    monkeypatch.setattr(dense, "_SMALL_ON_GPU", -1)
    monkeypatch.setattr(dense, "_SMALL_IF_BRIEF", -1)
    monkeypatch.setattr(dispatch, "_HOST_S", 0.0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # what is compared with is exact
    with DEVICE:
        yield
    if DEVICE.type == "cuda":  # after use_stream
        torch.cuda.set_stream(torch.cuda.default_stream())


def close(got, want, dtype=None):
    """Equal up to one rounding to the dtype of ``got``."""
    eps = torch.finfo(dtype or got.dtype).eps
    assert_close(got.double(), want.double(), rtol=2 * eps, atol=1e-6)


def layers(dtype, sizes=SIZES):
    weights = [torch.randn(size).to(dtype) for size in sizes]
    masks = [torch.rand(size) < 0.5 for size in sizes]
    for w, m in zip(weights, masks, strict=True):
        w[~m & (torch.rand(m.shape) < 0.5)] = float("nan")  # what the mask hides stays hidden
    return weights, masks


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "to"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_apply_mask(dtype, to, packed):
    weights, masks = layers(dtype)
    # Memory that begins elsewhere than at a multiple of 16 bytes, and one in channels_last.
    weights.append(torch.randn(70).to(dtype)[3:])
    masks.append(torch.rand(70)[3:] < 0.5)
    if not packed:
        weights.append(torch.randn(5, 4, 3, 3).to(dtype, memory_format=torch.channels_last))
        masks.append((torch.rand(5, 4, 3, 3) < 0.5).contiguous(memory_format=torch.channels_last))
    outs = [torch.empty_like(w, dtype=to).fill_(float("nan")) for w in weights]
    versions = [out._version for out in outs]
    given = [reference.mask_words(m)[0] for m in masks] if packed else masks
    apply_mask(weights, given, outs)
    for w, m, out, version in zip(weights, masks, outs, versions, strict=True):
        close(out, torch.where(m, w, 0), to)
        assert not out[~m].any()
        assert out._version > version


def test_what_the_kernels_do_not_take_goes_to_torch():
    w, m = torch.randn(6, 8), torch.rand(8, 6).t() < 0.5
    assert torch.equal(apply_mask([w, w.double()], [m, m])[1], torch.where(m, w, 0).double())
    assert torch.equal(apply_mask([w[:, ::2]], [m[:, ::2]])[0], torch.where(m, w, 0)[:, ::2])
    words = reference.mask_words(m)[0]
    got = apply_mask([w.double(), w.t().contiguous().t()], [words, words])
    assert torch.equal(got[0], torch.where(m, w, 0).double())
    assert torch.equal(got[1], torch.where(m, w, 0))
    big = torch.randn(3, 64)
    words = reference.mask_words(big > 0)[0]
    strided = torch.stack([words, ~words], 1)[:, 0]
    assert torch.equal(apply_mask([big], [strided])[0], big.clamp(min=0))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
@pytest.mark.parametrize(("dtype", "of_weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_split_gradient(dtype, of_weight, needs):
    weights, masks = layers(of_weight)
    grads = [torch.randn(w.shape).to(dtype) for w in weights]
    packed = [reference.mask_words(m)[0] for m in masks]
    named = dict(zip(("need_weight", "need_scores", "need_sink"), needs, strict=True))
    for given in (masks, packed):
        outs = split_gradient(grads, weights, given, **named)
        for i, (g, w, m) in enumerate(zip(grads, weights, masks, strict=True)):
            for out, want in zip(outs, reference.split_gradient(g, w, m, needs), strict=True):
                assert (out is None) == (want is None)
                if out is not None:
                    assert out[i].dtype == want.dtype
                    close(out[i].nan_to_num(7), want.nan_to_num(7))
                    assert out[i].data_ptr() != g.data_ptr() or not g.numel()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(33, 130), (5,), (6, 5, 3, 2), (4, 1, 3, 3), (3, 4, 1, 1), (2, 0)])
def test_gather_support(shape, dtype, monkeypatch):
    grad = torch.randn(shape).to(dtype)
    orders = [grad] + ([grad.contiguous(memory_format=torch.channels_last)] if grad.dim() == 4 else [])
    for count in (0, 1, 5000):
        positions = torch.randint(-2, grad.numel() + 2, (count,))
        given = positions.where((positions >= 0) & (positions < grad.numel()), -1)  # the others are 0
        for g in orders:
            torch.full((5000,), float("nan"))  # what the allocator gives out next
            got = gather_support(g, positions)
            assert got.dtype == torch.float32
            flat = torch.cat([g.reshape(-1), g.new_zeros(1)]).float()
            assert torch.equal(got, flat[given])
    with monkeypatch.context() as only:
        only.setattr(triton_elementwise, "gather_support", None)
        if len(shape) == 2 and grad.numel():
            every_other = grad[:, ::2]  # in no order that the kernel knows
            got = gather_support(every_other, torch.tensor([3, -1]))
            assert torch.equal(got, torch.stack([every_other.flatten()[3], grad.new_zeros(())]).float())
        if grad.numel():
            assert gather_support(grad.double(), torch.tensor([-1])).dtype == torch.float64


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_step(momentum, nesterov, maximize):
    if nesterov and not momentum:
        pytest.skip("torch refuses it")
    weights = [torch.randn(size) for size in SIZES]
    masks = [torch.rand(size) < 0.5 for size in SIZES]
    settings = {"lr": 0.1, "momentum": momentum, "dampening": 0.0 if nesterov else 0.1}
    settings |= {"weight_decay": 0.01, "nesterov": nesterov, "maximize": maximize}
    expected = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(expected, **settings)
    buffers = [torch.full_like(w, float("nan")) for w in weights] if momentum else None
    copies = [torch.full_like(w, float("nan"), dtype=torch.bfloat16) for w in weights]
    for step in range(3):
        grads = [torch.randn(size) for size in SIZES]
        triton_elementwise.sgd_step(weights, grads, masks, copies, buffers, fresh=step == 0, **settings)
        for w, g, m in zip(expected, grads, masks, strict=True):
            w.grad = torch.where(m, g, 0)
        optimizer.step()
    for w, e, m, c in zip(weights, expected, masks, copies, strict=True):
        assert_close(w, e.detach())
        close(c, torch.where(m, w, 0))


SGD_PAIRS = [
    ({"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, {"lr": 0.3, "maximize": True}),
    ({}, {"lr": 0.3, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.02}),
    ({"momentum": 0.9, "maximize": True}, {"momentum": 0.5, "nesterov": True}),
]
ADAMW_PAIRS = [
    ({"weight_decay": 0.01}, {"lr": 0.3, "betas": (0.5, 0.8), "eps": 1e-4, "weight_decay": 0.1}),
    ({"maximize": True}, {"lr": 0.01}),
]


@pytest.mark.parametrize(
    ("name", "of_weights", "of_scores"),
    [("SGD", *pair) for pair in SGD_PAIRS] + [("AdamW", *pair) for pair in ADAMW_PAIRS],
    ids=str,
)
def test_steps_of_weights_and_scores(name, of_weights, of_scores):
    weights, scores = ([torch.randn(size) for size in SIZES] for _ in range(2))
    masks = [torch.rand(size) < 0.5 for size in SIZES]
    expected = [[t.clone().requires_grad_() for t in tensors] for tensors in (weights, scores)]
    groups = [{"params": expected[0], **of_weights}, {"params": expected[1], **of_scores}]
    optimizer = getattr(torch.optim, name)(groups, lr=0.1, foreach=False)
    copies = [torch.full_like(w, float("nan"), dtype=torch.bfloat16) for w in weights]
    state = [[[torch.zeros_like(w) for w in weights] for _ in range(2)] for _ in range(2)]
    for step in range(3):
        grads = [torch.randn(size) for size in SIZES]
        for w, s, g, m in zip(*expected, grads, masks, strict=True):
            w.grad, s.grad = torch.where(m, g, 0), w.detach() * g
        optimizer.step()
        settings, scores_settings = optimizer.param_groups
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        names = names if name == "SGD" else ("lr", "betas", "eps", "weight_decay", "maximize")
        first, second = ({name: group[name] for name in names} for group in optimizer.param_groups)
        if name == "SGD":
            held = state[0][0] if first["momentum"] else None
            stepped = triton_elementwise.Scores(scores, state[1][:1] if second["momentum"] else [], second)
            triton_elementwise.sgd_step(weights, grads, masks, copies, held, stepped, fresh=step == 0, **first)
        else:
            steps = [torch.tensor(step + 1.0)] * len(SIZES)
            stepped = triton_elementwise.Scores(scores, state[1], second, steps)
            triton_elementwise.adamw_step(weights, grads, masks, copies, *state[0], steps, stepped, **first)
    for got, want in zip((weights, scores), expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
    for w, m, c in zip(weights, masks, copies, strict=True):
        close(c, torch.where(m, w, 0))


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_step(maximize):
    weights = [torch.randn(size) for size in SIZES]
    masks = [torch.rand(size) < 0.5 for size in SIZES]
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": maximize}
    expected = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(expected, **settings)
    state = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    copies = [torch.full_like(w, float("nan"), dtype=torch.float16) for w in weights]
    for step in range(3):
        grads = [torch.randn(size).bfloat16() for size in SIZES]
        steps = [torch.tensor(step + 1.0)] * len(SIZES)
        triton_elementwise.adamw_step(weights, grads, masks, copies, *state, steps, **settings)
        for w, g, m in zip(expected, grads, masks, strict=True):
            w.grad = torch.where(m, g.float(), 0)
        optimizer.step()
    for w, e, m, c in zip(weights, expected, masks, copies, strict=True):
        assert_close(w, e.detach())
        close(c, torch.where(m, w, 0))


# -- the masked copies -------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """How many tensors each launch of apply_mask took."""
    counts = []
    original = triton_elementwise.apply_mask

    def counted(weights, masks, outs):
        counts.append(len(weights))
        original(weights, masks, outs)

    monkeypatch.setattr(triton_elementwise, "apply_mask", counted)
    monkeypatch.setattr(apply_mask_module, "_copies", type(apply_mask_module._copies)())
    return counts


def small_model(**kwargs):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 4, 5), torch.nn.Linear(5, 4)
    )
    return sb.sparsify(model, 0.5, **kwargs)


def test_one_launch_a_step_and_none_for_an_unchanged_model(launches):
    model = small_model()
    x = torch.randn(2, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = [m for m in model if hasattr(m, "mask")]
    for step in range(3):
        model(x).sum().backward()
        model(x).sum().backward()  # accumulation: nothing has changed
        assert launches == ([1] * len(sparse) if step == 0 else [len(sparse)])
        launches.clear()
        optimizer.step()
    sparse[1].set_mask(~sparse[1].mask, check=False)
    optimizer.zero_grad()
    y = model(x)
    assert launches == [len(sparse) - 1, 1]  # whose mask somebody has changed since
    assert_close(y, sb.densify(model)(x))


def test_copies_that_nobody_asks_for_any_more_go(launches):
    """As of an evaluation in another dtype; those of the training are not held up by them."""
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    optimizer = torch.optim.SGD([w], lr=0.1)
    compute_copy(w, m, torch.float32)
    for step in range(4):
        assert_close(compute_copy(w, m, torch.bfloat16), torch.where(m, w, 0).bfloat16())
        assert set(apply_mask_module._copies[id(w)]) == {torch.bfloat16} | ({torch.float32} if step < 3 else set())
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert launches == [1] * 6  # one of them for the other, which had been asked for before the first step
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_the_optimizer_writes_the_copy_that_is_used():
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    optimizer = torch.optim.SGD([w], lr=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        compute_copy(w, m, dtype)
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert apply_mask_module.kept_copy(w, m).dtype == torch.bfloat16


def test_no_copies_are_kept_where_weights_are_sharded(monkeypatch):
    """Gathered anew, they lie where they lay, and no version counts up."""

    class FSDPModule:
        pass

    class FSDPLinear(FSDPModule):  # as fully_shard makes one, which stays for the rest of the process
        pass

    monkeypatch.setattr(torch.distributed.fsdp, "FSDPModule", FSDPModule)
    w, m = torch.randn(16, 8), torch.rand(16, 8) < 0.5
    compute_copy(w, m, torch.float32)
    with torch.autograd._unsafe_preserve_version_counter(w):
        w.mul_(2)
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_copies_are_given_back_when_a_model_goes_elsewhere(launches):
    model = small_model()
    model(torch.randn(2, 3, 4, 4))
    assert sum(map(len, apply_mask_module._copies.values())) == 3
    model.double()
    assert sum(map(len, apply_mask_module._copies.values())) == 0


def test_a_changed_tensor_never_meets_an_old_copy(launches):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5

    def right():
        copy = compute_copy(w, m, torch.float32)
        return torch.equal(copy, torch.where(m, w, 0))

    for change in (
        lambda: w.detach().add_(1),
        lambda: m.logical_not_(),
        lambda: torch._foreach_mul_([w.detach()], 2.0),
        lambda: setattr(w, "data", torch.randn(6, 8)),
        lambda: w.detach().copy_(torch.zeros(6, 8)),
    ):
        assert right()
        assert right()
        before = len(launches)
        change()
        assert right()
        assert len(launches) == before + 1
    m2 = torch.rand(6, 8) < 0.5
    assert torch.equal(compute_copy(w, m2, torch.float32), torch.where(m2, w, 0))
    assert right()
    with torch.inference_mode():
        of_inference = w + 1
        assert torch.equal(compute_copy(of_inference, m, torch.float32), torch.where(m, of_inference, 0))


def test_weights_with_gaps_or_overlaps(launches):
    for w in (
        torch.randn(6, 11)[:, :8],
        torch.randn(1, 8).expand(6, 8),
        torch.randn(6, 8).t(),
        torch.randn(1, 9)[:, :8],
    ):
        m = torch.rand(w.shape) < 0.5
        for _ in range(2):
            assert torch.equal(compute_copy(w.requires_grad_(), m, torch.float32), torch.where(m, w, 0))


def test_a_captured_optimizer_leaves_no_old_copy(launches, monkeypatch):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    optimizer = torch.optim.SGD([w], lr=0.1)
    w.grad = torch.randn(6, 8)
    compute_copy(w, m, torch.float32)
    with monkeypatch.context() as capture:
        capture.setattr(gpu, "is_capturing", lambda device: True)
        optimizer.step()
    for _ in range(2):
        w.data.add_(1)  # a replay counts no version up, and calls no hook
        assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


class Stream(torch.cuda.Stream if DEVICE.type == "cuda" else object):
    """Of a GPU, or as far as copies look at it; notes for whom it waits."""

    def __init__(self):
        self.waits = []

    def wait_stream(self, other):
        self.waits.append(other)
        if DEVICE.type == "cuda":
            super().wait_stream(other)


def use_stream(monkeypatch, stream):
    """Make it the current one."""
    monkeypatch.setattr(gpu, "stream", lambda device: stream)
    if DEVICE.type == "cuda":
        stream.synchronize()
        torch.cuda.current_stream().synchronize()  # what the tests do beside copies needs no order then
        torch.cuda.set_stream(stream)
    else:
        monkeypatch.setattr(gpu, "stream_id", lambda device: id(stream))


def test_another_stream_waits_for_the_one_that_wrote_a_copy(launches, monkeypatch):
    first, second = Stream(), Stream()
    if DEVICE.type != "cuda":
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def on(stream, w):
        use_stream(monkeypatch, stream)
        assert torch.equal(compute_copy(w, masks[w], torch.float32), torch.where(masks[w], w, 0))

    one, other = (torch.nn.Parameter(torch.randn(6, 8)) for _ in range(2))
    masks = {w: torch.rand(6, 8) < 0.5 for w in (one, other)}
    on(first, one)
    on(first, one)
    on(second, one)
    on(second, one)
    assert (first.waits, second.waits) == ([], [first])
    on(second, other)
    optimizers = {w: torch.optim.SGD([w], lr=0.1) for w in (one, other)}
    for stream, w in ((first, one), (second, other)):
        use_stream(monkeypatch, stream)
        w.grad = torch.ones_like(w)
        optimizers[w].step()
    launches.clear()
    on(first, one)
    assert launches == [1]  # the weights of the second stream may not be ready
    on(second, other)
    assert launches == [1, 1]
    assert (first.waits, second.waits) == ([], [first])


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}, {}], ids=str)
def test_optimizers_leave_no_old_copy(settings, launches):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam):
        optimizer = make([w], lr=0.1, **settings)
        for _ in range(2):
            w.grad = torch.randn(6, 8)
            optimizer.step()
            assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))

    class ThroughData(torch.optim.Optimizer):
        def step(self):
            w.data.add_(1)

    ThroughData([w], {}).step()
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_a_federations_vectors_leave_no_old_copy(launches):
    """Its clients write one vector, of which the weights are views that torch does not know as such."""
    from sparsebilevel.federated.local import train_weights
    from sparsebilevel.federated.unstructured import MaskedModule

    flat = MaskedModule(sb.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4)), 0.5))
    mask = flat.mask
    start = torch.randn_like(flat.values) * mask
    batches = [(torch.randn(6, 16), torch.randint(4, (6,))) for _ in range(3)]
    flat.load(start)
    train_weights(flat, batches, start, torch.zeros_like(start), 0.5, 0.9, 0.0)
    assert launches  # copies were kept

    plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
    for p, values in zip(plain.parameters(), start.split([p.numel() for p in plain.parameters()]), strict=True):
        p.data = values.view(p.shape).clone()
    optimizer = torch.optim.SGD(plain.parameters(), 0.5, momentum=0.9)
    masks = mask.split([p.numel() for p in plain.parameters()])
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        for p, kept in zip(plain.parameters(), masks, strict=True):
            p.grad *= kept.view(p.shape)
        optimizer.step()
    assert_close(flat.values, torch.cat([p.detach().reshape(-1) for p in plain.parameters()]), rtol=1e-4, atol=1e-5)
    flat.load(start)
    x = batches[0][0]
    first = flat.module(x)
    flat.load(2 * start)
    assert (flat.module(x) - first).abs().max() > 1e-2


def test_a_compiled_step_leaves_no_old_copy(launches):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(w):
        with torch.no_grad():
            w.add_(1)

    for _ in range(2):
        assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))
        step(w)
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_weights_that_another_stream_steps_are_left_to_it(launches, monkeypatch):
    """Although this one made the copy: it has waited for nobody who may be writing the weight."""
    first, second = Stream(), Stream()
    if DEVICE.type != "cuda":
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    weights = [torch.nn.Parameter(torch.randn(6, 8)) for _ in range(2)]
    m = torch.rand(6, 8) < 0.5
    use_stream(monkeypatch, first)
    for w in weights:
        compute_copy(w, m, torch.float32)
    for stream, w in ((second, weights[0]), (first, weights[1])):
        use_stream(monkeypatch, stream)
        compute_copy(w, m, torch.float32)
        w.grad = torch.ones_like(w)
        torch.optim.SGD([w], lr=0.1).step()
    launches.clear()
    assert torch.equal(compute_copy(weights[1], m, torch.float32), torch.where(m, weights[1], 0))
    assert launches == [1]
    use_stream(monkeypatch, second)
    assert torch.equal(compute_copy(weights[0], m, torch.float32), torch.where(m, weights[0], 0))
    assert launches == [1, 1]


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_a_step_leaves_alone_keep_their_copies(fused, launches):
    """Autograd would refuse a backward pass of theirs that is still to come, since the copy was written to."""
    one, other = (sb.SparseMaskedLinear(8, 4, sparsity=0.5) for _ in range(2))
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1, fused=fused)
    x = torch.randn(3, 8)
    for layer in (one, other):
        layer(x)
    launches.clear()
    y = one(x)
    for _ in range(2):
        optimizer.zero_grad()
        other(x).sum().backward()
        optimizer.step()
    assert launches == [1]
    y.sum().backward()
    assert_close(one.weight.grad, x.sum(0).expand(4, 8) * one.mask)


def test_what_another_thread_changes_meanwhile_is_not_taken_for_fresh(monkeypatch):
    """The change comes between the launch and the note of what it was made from."""
    w, m = torch.nn.Parameter(torch.randn(64, 64)), torch.rand(64, 64) < 0.5
    changes = [lambda: w.detach().add_(1), lambda: m.zero_()]

    def then_change(function):
        def run(*given):
            found = function(*given)
            if changes:
                changes.pop(0)()
            return found

        return run

    with monkeypatch.context() as other:
        other.setattr(triton_elementwise, "apply_mask", then_change(triton_elementwise.apply_mask))
        compute_copy(w, m, torch.float32)
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))
    with monkeypatch.context() as other:
        other.setattr(block_sparse, "_survey", then_change(block_sparse._survey))
        assert look(m).densities[32] == 1.0
    assert look(m).densities[32] == 0.0
    assert not changes


def test_without_copies_kept(launches, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_COMPUTE_COPY", "0")
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    for _ in range(2):
        assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))
        w.data.add_(1)
    assert launches == [1, 1]


def test_without_lists_kept(monkeypatch):
    """Tiles follow a mask that changes unseen, as by the replay of a graph."""
    monkeypatch.setenv("SPARSEBILEVEL_COMPUTE_COPY", "0")
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
    w, x = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(8, 64, requires_grad=True)
    m = torch.zeros(64, 64, dtype=torch.bool)
    m[:32, :32] = True
    positions = torch.tensor([40 * 64 + 40, -1])
    for tile in (slice(0, 32), slice(32, 64)):
        m.data[tile, tile] = True
        sink = make_grad_sink(w, positions)
        y = masked_linear(x, w, m, grad_sink=sink, positions=positions)
        assert_close(y, F.linear(x, torch.where(m, w, 0)))
        dx, dw, ds = torch.autograd.grad(y.sum(), (x, w, sink))
        assert_close(dx, torch.where(m, w, 0).sum(0).expand(8, 64))
        assert_close(dw, x.detach().sum(0).expand(64, 64) * m)
        assert_close(ds, torch.stack([x.detach().sum(0)[40], torch.zeros(())]))


@pytest.mark.parametrize("backend", ["block", "fused", "dense"])
def test_gradients_that_are_marked_as_zero(backend, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    w, x = torch.nn.Parameter(torch.randn(64, 64)), torch.randn(8, 64, requires_grad=True)
    m = torch.zeros(64, 64, dtype=torch.bool)
    m[:32, :32] = True
    (torch.sgn(masked_linear(x, w, m)) * 3).sum().backward()
    assert not x.grad.any()
    assert not w.grad.any()
    marked = torch.complex(torch.zeros(8, 64), x.detach()).conj().imag  # as negative
    assert_close(masked_linear(marked, w, m), F.linear(-x.detach(), torch.where(m, w, 0)))


def test_what_a_captured_graph_holds_follows_weight_and_mask(launches, monkeypatch):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    copy = compute_copy(w, m, torch.float32)
    look(m).layout(32)
    launches.clear()
    monkeypatch.setattr(gpu, "is_capturing", lambda device: True)
    again = compute_copy(w, m, torch.float32)
    assert torch.equal(again, copy)
    assert again.data_ptr() != copy.data_ptr()
    assert look(torch.rand(6, 8) < 0.5) is None  # what was never looked at
    monkeypatch.setattr(triton_elementwise, "_table", None)  # it would be copied from the host
    launches.clear()
    x = torch.randn(3, 8, requires_grad=True)
    masked_linear(x, w, m).sum().backward()
    assert_close(w.grad, x.detach().sum(0).expand(6, 8) * m)
    assert_close(x.grad, torch.where(m, w, 0).sum(0).expand(3, 8))
    assert launches == [1]  # the backward takes the copy of the forward
    outs = apply_mask([w, w.detach() + 1], [m, ~m])
    assert torch.equal(outs[1], torch.where(m, 0, w + 1))


class NoWaiting(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: to wait for the device, and to copy from memory that pages."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        made = func(*args, **(kwargs or {}))
        assert all(t.device.type == DEVICE.type for t in tree_leaves((args, made)) if isinstance(t, torch.Tensor)), name
        return made


@pytest.mark.parametrize("kind", ["linear", "linear search", "linear in CUDA", "conv1x1", "conv3x3 stride 2"])
def test_a_captured_graph_finds_the_tiles_of_a_mask_itself(kind, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
    last = {"memory_format": torch.channels_last}
    kernel = () if "linear" in kind else (1, 1) if "1x1" in kind else (3, 3)
    options = {"stride": 2, "padding": 1} if "stride" in kind else {}
    shape, block = (64, 96, *kernel) if kernel else (256, 192), 64 if "CUDA" in kind else 32
    x = torch.randn(9, 192) if not kernel else torch.randn(2, 96, 4, 4).contiguous(**last)
    w, m = torch.randn(shape), block_mask(shape, block, 0.4)
    if kernel:
        w, m = w.contiguous(**last), m.contiguous(**last)
    pairs, sides = [], []
    if "CUDA" in kind:
        if DEVICE.type == "cuda":
            pytest.skip("the kernel that Python stands in for")
        monkeypatch.setattr(cuda_block_sparse, "takes", lambda block, *_: sides.append(block) or block > 32)

        def product(x, weight, lists, bias=None, *, input_grad=False):
            pairs.append(int(lists.starts[-1]))
            return x @ (weight if input_grad else weight.t())

        monkeypatch.setattr(cuda_block_sparse, "block_matmul", product)
    x.requires_grad_()
    w.requires_grad_()
    masked, plain = (masked_conv2d, F.conv2d) if kernel else (masked_linear, F.linear)
    positions = torch.randint(-1, w.numel(), (9,)) if "search" in kind else None
    launched = []
    for name in ("block_matmul", "block_conv2d", "block_weight_grad"):
        function = getattr(triton_block_sparse, name)
        monkeypatch.setattr(triton_block_sparse, name, lambda *a, f=function, **k: (launched.append(f), f(*a, **k))[1])

    def step():
        x.grad = w.grad = None
        sink = None if positions is None else make_grad_sink(w, positions)
        y = masked(x, w, m, grad_sink=sink, positions=positions, **options)
        y.square().sum().backward()
        return y, x.grad, w.grad, None if sink is None else sink.grad

    step()
    before = list(launched)
    assert len(before) == (1 if "CUDA" in kind else 3)
    launched.clear()
    # Since it was looked at the mask has changed, as it may between replays.
    m.copy_(block_mask(shape, block, 0.7) if not kernel else block_mask(shape, block, 0.7).contiguous(**last))
    if positions is not None:
        positions.copy_(torch.randint(-1, w.numel(), (9,)))
    seen = dict(block_sparse._seen[m])
    with monkeypatch.context() as capture, NoWaiting() if DEVICE.type == "cpu" and not pairs else nullcontext():
        capture.setattr(gpu, "is_capturing", lambda device: True)
        y, x_grad, w_grad, sink_grad = step()
    assert block_sparse._seen[m] == seen  # nothing is kept
    assert launched == before
    x2, z = x.detach().requires_grad_(), torch.where(m, w, 0).detach().requires_grad_()
    expected = plain(x2, z, **options)
    expected.square().sum().backward()
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    for got, want in ((y, expected), (x_grad, x2.grad), (w_grad, z.grad * m)):
        assert_close(got, want, **tolerance)
    if positions is not None:
        assert_close(sink_grad, torch.where(positions < 0, 0, z.grad.reshape(-1)[positions]), **tolerance)
    if pairs:
        held = reference.tiles_of(m, sides[-1])
        assert pairs[2:] == [int(reference.pair_list(tiles, sides[-1] // 64)[1][-1]) for tiles in (held, held.t())]


def test_a_layer_takes_the_fused_gradient_in_a_graph_where_that_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "gpu.json"))
    layer, x = sb.SparseMaskedLinear(64, 32, bias=False, sparsity=0.5), torch.randn(16, 64)
    layer.set_mask_scores(torch.nn.Parameter(torch.zeros(32, 64)))
    name = measurements.key("weight_grad", torch.float32, 16, 32, 64)
    measurements.save(x.device, {name: {"dense": 2.0, "fused": 1.0}})
    launched = []
    fused = gpu_products.fused_weight_grad
    monkeypatch.setattr(gpu_products, "fused_weight_grad", lambda *a, **k: (launched.append(k), fused(*a, **k))[1])
    for captures in (False, True):
        monkeypatch.setattr(gpu, "is_capturing", lambda device, captures=captures: captures)
        layer.zero_grad()
        layer(x).sum().backward()
        assert len(launched) == captures  # without a graph the layer would wait for Python longer than it saves
        g = x.sum(0).expand(32, 64)
        assert_close(layer.weight.grad, g * layer.mask)
        assert_close(layer.mask_scores.grad, g * layer.weight)
    monkeypatch.setattr(gpu, "is_capturing", lambda device: False)
    measurements.save(x.device, {name: {"dense": 2.0, "fused": 1.0}})
    shown = layer.backends["weight_grad"]
    assert shown.name == "dense"
    assert "in a CUDA graph masked product in one kernel, measured" in shown.reason


def test_a_shared_gradient_is_not_rounded_in_a_graph(monkeypatch):
    layer, x = sb.SparseMaskedLinear(64, 32, bias=False, sparsity=0.5), torch.randn(16, 64)
    layer.set_mask_scores(torch.nn.Parameter(torch.zeros(32, 64)))
    share_gradient(layer)
    products = []
    product = gpu_products.linear_weight_grad
    monkeypatch.setattr(gpu_products, "linear_weight_grad", lambda *given: (products.append(given), product(*given))[1])

    def step():
        layer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = layer(x)
        y.sum().backward()

    if DEVICE.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            step()
        graph.replay()
    else:
        monkeypatch.setattr(gpu, "is_capturing", lambda device: True)
        step()
    assert len(products) == 1
    g = x.bfloat16().double().sum(0).expand(32, 64)
    # The CPU has no product that is not rounded.
    assert_close(layer.weight.grad.double(), g, rtol=1e-6 if DEVICE.type == "cuda" else 2**-8, atol=1e-5)


def test_a_layer_that_cuts_out_what_is_dropped_is_dense_in_a_graph(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "slice")
    x, w, m = torch.randn(5, 64), torch.randn(40, 64), torch.zeros(40, 64, dtype=torch.bool)
    m[:20, :32] = True
    assert_close(masked_linear(x, w, m), x @ torch.where(m, w, 0).t())
    m[20:] = True
    monkeypatch.setattr(gpu, "is_capturing", lambda device: True)
    assert_close(masked_linear(x, w, m), x @ torch.where(m, w, 0).t())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA graphs")
@pytest.mark.parametrize(
    "op",
    ["linear", "conv", "tiles", "tiles in CUDA", "tiles in CUDA settled", "tiles search", "conv tiles"]
    + ["linear fused", "linear fused in CUDA"],
)
def test_a_captured_step_follows_weight_and_mask(op, monkeypatch, tmp_path):
    is_linear, dtype = "conv" not in op, torch.bfloat16 if "CUDA" in op else torch.float32
    shape = (256, 128) if is_linear else (64, 32, 3, 3)
    x = torch.randn(16, 128) if is_linear else torch.randn(2, 32, 8, 8)
    w, m, s = torch.randn(shape), torch.rand(shape) < 0.5, torch.zeros(shape)
    if "tiles" in op:
        monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
        m, s = block_mask(shape, 64 if "CUDA" in op else 32, 0.4), None
    if not is_linear:
        x, w, m = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, m))
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    s = None if s is None else s.requires_grad_()
    positions = torch.randint(-1, w.numel(), (40,)) if "search" in op else None
    sink = None if positions is None else make_grad_sink(w, positions)
    if "settled" in op:  # the graph lists pairs of neighbours, which nobody has asked for before
        look(m).layout(64).settle()
    masked, plain = (masked_linear, F.linear) if is_linear else (masked_conv2d, F.conv2d)
    if "fused" in op:  # which the layer is in graphs alone, so that its kernels are loaded there
        monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "gpu.json"))
        names = [measurements.key(name, dtype, 16, 256, 128) for name in PASSES]
        measurements.save(DEVICE, dict.fromkeys(names, {"dense": 2.0, "fused": 1.0}))
        layer = sb.SparseMaskedLinear(128, 256, bias=False, device=DEVICE)
        layer.weight, layer.mask = torch.nn.Parameter(w.detach()), m
        layer.set_mask_scores(torch.nn.Parameter(s.detach()))
        w, s = layer.weight, layer.mask_scores
    leaves = [leaf for leaf in (x, w, s, sink) if leaf is not None]

    def step():
        for leaf in leaves:
            leaf.grad = None
        y = layer(x) if "fused" in op else masked(x, w, m, mask_scores=s, grad_sink=sink, positions=positions)
        y.square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(2):
        with torch.no_grad():
            w.normal_()
            m.copy_(block_mask(shape, 32, 0.3) if "tiles" in op else torch.rand(shape) < 0.3)
            x.normal_()
            if positions is not None:
                positions.copy_(torch.randint(-1, w.numel(), (40,)))
        graph.replay()
        z = torch.where(m, w, 0).detach().requires_grad_()
        x2 = x.detach().requires_grad_()
        expected = plain(x2, z)
        expected.square().sum().backward()
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1.0}
        assert_close(y, expected, **tolerance)
        assert_close(x.grad, x2.grad, **tolerance)
        assert_close(w.grad, z.grad * m, **tolerance)
        if s is not None:
            assert_close(s.grad, (z.grad * w.detach()).to(s.dtype), **tolerance)
        if sink is not None:
            assert_close(sink.grad, torch.where(positions < 0, 0, z.grad.reshape(-1)[positions]), **tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_train_after_a_validation_in_inference_mode(kind):
    layer = sb.SparseMaskedLinear(8, 4, sparsity=0.5) if kind == "linear" else sb.SparseMaskedConv2d(8, 4, 1)
    x = torch.randn(3, 8) if kind == "linear" else torch.randn(3, 8, 4, 4)
    with torch.inference_mode():
        before = layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert_close(layer(x), before.clone())
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    z = torch.where(layer.mask, layer.weight, 0)
    assert_close(layer(x), F.linear(x, z, layer.bias) if kind == "linear" else F.conv2d(x, z, layer.bias))


def test_copies_are_not_used_once_they_are_switched_off(monkeypatch):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    compute_copy(w, m, torch.float32)
    w.data.add_(1)  # which nobody sees
    monkeypatch.setenv("SPARSEBILEVEL_COMPUTE_COPY", "0")
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_what_is_kept_goes_with_the_weight_and_its_type(monkeypatch):
    copies = apply_mask_module._copies
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    for dtype in (torch.float32, torch.float16):
        compute_copy(w, m, dtype)
    assert set(copies[id(w)]) == {torch.float32, torch.float16}
    w.data = w.data.bfloat16()
    assert torch.equal(compute_copy(w, m, torch.bfloat16), torch.where(m, w, 0))
    assert set(copies[id(w)]) == {torch.bfloat16}
    other, key = torch.nn.Parameter(torch.randn(6, 8)), id(w)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    with monkeypatch.context() as full:
        full.setattr(torch, "empty_like", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            compute_copy(other, m, torch.float32)
    assert id(other) not in copies
    del w
    assert key not in copies


def test_copies_follow_a_change_of_type():
    """Those of the model, and of another whose copies are made again at the same time."""
    model, other = small_model(), small_model()
    x = torch.randn(2, 3, 4, 4)
    for m in (model, other):
        m(x)
    model.double()
    dense = sb.densify(model)
    with torch.no_grad():
        for w in (p for m in (model, dense, other) for p in m.parameters()):
            w.mul_(2)
    assert_close(model(x.double()), dense(x.double()))
    assert_close(other(x), sb.densify(other)(x))


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_conversions_that_swap_tensors(pattern):
    """Torch refuses them while anybody holds a weak reference to weight or mask."""
    model, other, x = small_model(pattern=pattern), small_model(pattern=pattern), torch.randn(2, 3, 4, 4)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model(x).sum().backward()
        model.zero_grad()
        model.load_state_dict(other.state_dict())
        assert_close(model(x), sb.densify(other)(x))
        model.double()
        assert_close(model(x.double()), sb.densify(other).double()(x.double()), rtol=1e-4, atol=1e-5)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_copies_follow_a_mask_whose_order_changes():
    w, m = torch.nn.Parameter(torch.randn(6, 5, 3, 3)), torch.rand(6, 5, 3, 3) < 0.5
    compute_copy(w, m, torch.float32)
    m.data = m.data.clone(memory_format=torch.channels_last)
    assert torch.equal(compute_copy(w, m, torch.float32), torch.where(m, w, 0))


def test_what_triton_is_not_to_run_is_not_looked_at(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_TRITON", "0")
    monkeypatch.setattr(dispatch, "_HOST_S", 1.0)
    monkeypatch.setattr(triton_tiles, "mark_positions", None)
    monkeypatch.setattr(block_sparse, "_look_again", None)
    layer = sb.SparseMaskedLinear(64, 64, sparsity=0.5, pattern="filter")
    layer.collect("search", torch.tensor([3, -1]))
    x = torch.randn(4, 64)
    y = layer(x)
    assert_close(y, F.linear(x, torch.where(layer.mask, layer.weight, 0), layer.bias))
    y.sum().backward()


def test_copies_go_with_their_weights(launches):
    w, m = torch.nn.Parameter(torch.randn(6, 8)), torch.rand(6, 8) < 0.5
    compute_copy(w, m, torch.float32)
    assert len(apply_mask_module._copies) == 1
    del w
    assert len(apply_mask_module._copies) == 0


# -- the layers, on the dense library ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["linear", "conv", "channels_last"])
def test_layers_keep_the_contract(op, cast):
    shape = (6, 5) if op == "linear" else (6, 5, 3, 3)
    x = torch.randn(4, 5) if op == "linear" else torch.randn(2, 5, 6, 6)
    w, m, s, b = torch.randn(shape), torch.rand(shape) < 0.5, torch.randn(shape), torch.randn(6)
    if op == "channels_last":
        x, w, m, s = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, m, s))
    masked, plain = (masked_linear, F.linear) if op == "linear" else (masked_conv2d, F.conv2d)
    leaves = [t.requires_grad_() for t in (x, w, b, s)]
    sink, positions = make_grad_sink(w), torch.tensor([3, -1, 0])
    where = make_grad_sink(w, positions)
    with torch.autocast(DEVICE.type, cast or torch.bfloat16, enabled=cast is not None):
        y = masked(x, w, m, b, mask_scores=s, grad_sink=sink)
        y2 = masked(x, w, m, b, grad_sink=where, positions=positions)
    dy = torch.randn_like(y)
    y.backward(dy)
    y2.backward(dy)
    z = torch.where(m, w, 0).detach().requires_grad_()
    x2, b2 = (t.detach().requires_grad_() for t in (x, b))
    with torch.autocast(DEVICE.type, cast or torch.bfloat16, enabled=cast is not None):
        expected = plain(x2, z, b2)
    expected.backward(dy)
    assert y.dtype == (cast or torch.float32)
    assert {t.grad.dtype for t in (*leaves, sink, where)} == {torch.float32}
    tolerance = {"rtol": 1e-2, "atol": 1e-1} if cast else {}  # sums in another order, rounded
    assert_close(y, expected, **tolerance)
    assert_close(x.grad, 2 * x2.grad, **tolerance)
    assert_close(b.grad, 2 * b2.grad, **tolerance)
    assert_close(w.grad, 2 * z.grad * m, **tolerance)
    assert_close(sink.grad, z.grad, **tolerance)
    assert_close(s.grad, w.detach() * sink.grad)  # of the weight as it is, not as it was cast
    assert_close(where.grad, torch.stack([z.grad.flatten()[3], torch.tensor(0.0), z.grad.flatten()[0]]), **tolerance)


def test_operands_of_two_types_are_refused():
    with pytest.raises(ValueError, match=r"input has dtype torch.float64; expected torch.float32"):
        masked_linear(torch.randn(2, 3).double(), torch.randn(4, 3), torch.rand(4, 3) < 0.5)


@pytest.mark.parametrize("sink", ["none", "search", "all", "scores", "shared"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layers_with_unstructured_masks_are_the_dense_library(kind, sink, launches, monkeypatch):
    """A masked copy is all that they need of ours, and the mask is not looked at."""
    monkeypatch.setattr(block_sparse, "_look_again", None)
    layer = torch.nn.Linear(12, 8) if kind == "linear" else torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
    layer = sb.sparsify(torch.nn.Sequential(layer), 0.5)[0]
    x = torch.randn(2, 5, 12) if kind == "linear" else torch.randn(2, 4, 6, 6)
    if sink in ("scores", "shared"):
        layer.set_mask_scores(torch.nn.Parameter(torch.randn_like(layer.weight)))
    if sink == "shared":
        share_gradient(layer)
    where = torch.tensor([3, 7, -1, 0])
    for _ in range(2):
        if sink in ("search", "all"):
            layer.collect(sink, where if sink == "search" else None)
        layer.zero_grad()
        x2, z, b2 = (
            t.detach().clone().requires_grad_() for t in (x, torch.where(layer.mask, layer.weight, 0), layer.bias)
        )
        want = F.linear(x2, z, b2) if kind == "linear" else F.conv2d(x2, z, b2, 2, 1)
        dy = torch.randn_like(want)
        want.backward(dy)
        got = layer(x.requires_grad_())
        (x_grad,) = torch.autograd.grad(got, x, dy, retain_graph=True)
        got.backward(dy)
        g = z.grad
        for ours, exact in ((got, want), (x_grad, x2.grad), (layer.bias.grad, b2.grad)):
            assert_close(ours, exact)
        assert_close(layer.weight.grad, g if sink == "shared" else g * layer.mask)
        if sink == "scores":
            assert_close(layer.mask_scores.grad, g * layer.weight.detach())
        if sink in ("search", "all"):
            expected = torch.where(where < 0, 0, g.flatten()[where]) if sink == "search" else g
            assert_close(layer.effective_grad, expected)
        layer.set_mask(~layer.mask)
        with torch.no_grad():
            layer.weight.mul_(2)
    assert len(launches) == 2  # a copy each time


@pytest.mark.parametrize("sink", ["none", "search", "all", "scores", "shared"])
@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_layers_with_little_work_are_left_to_torch(kind, sink, monkeypatch):
    """Whatever the mask drops; it is looked at, for a graph that may be captured later."""
    groups = 2 if kind == "groups" else 1
    layer = torch.nn.Linear(64, 64) if kind == "linear" else torch.nn.Conv2d(64, 64, 3, stride=2, groups=groups)
    layer = sb.sparsify(torch.nn.Sequential(layer), 0.75, pattern="filter")[0]
    if sink in ("scores", "shared"):
        layer.set_mask_scores(torch.nn.Parameter(torch.randn_like(layer.weight)))
    if sink == "shared":
        share_gradient(layer)
    where = torch.tensor([3, 7, -1, 0])
    x = torch.randn(8, 64) if kind == "linear" else torch.randn(2, 64, 5, 5)

    def step():
        if sink in ("search", "all"):
            layer.collect(sink, where if sink == "search" else None)
        x2 = x.detach().requires_grad_()
        y = layer(x2)
        y.square().sum().backward()
        grads = [x2.grad, layer.weight.grad, layer.bias.grad, layer.effective_grad]
        grads += [layer.mask_scores.grad] if sink == "scores" else []
        layer.zero_grad()
        return y, *grads

    ours = step()
    products = []
    choose = gpu_products._choose
    monkeypatch.setattr(gpu_products, "_choose", lambda *given, **kw: (products.append(given), choose(*given, **kw))[1])
    for most, by_torch in ((1.0, True), (0.0, False)):
        monkeypatch.setattr(dispatch, "_HOST_S", most)
        layer.set_mask(layer.mask)  # as if it had changed
        for got, expected in zip(step(), ours, strict=True):
            assert_close(got, expected)
        assert (products == []) == by_torch
        seen = block_sparse._seen.get(layer.mask, {})
        assert kind == "groups" or any(found.state == block_sparse._state(layer.mask) for found in seen.values())
    with monkeypatch.context() as forced:
        forced.setattr(dispatch, "_HOST_S", 1.0)
        forced.setenv("SPARSEBILEVEL_BACKEND", "slice")
        products.clear()
        step()
        assert products


@pytest.mark.parametrize("sink", ["none", "search"])
def test_a_graph_has_tiles_after_eager_steps_of_little_work(sink, monkeypatch):
    layer = sb.SparseMaskedLinear(256, 256, pattern="block:64x64")
    layer.set_mask(torch.block_diag(*[torch.ones(64, 64)] * 4).bool())
    if sink == "search":
        layer.collect(sink, torch.tensor([3, 7, -1]))
    x = torch.randn(8, 256, requires_grad=True)
    launched = []
    for name in ("block_matmul", "block_weight_grad"):
        function = getattr(triton_block_sparse, name)
        monkeypatch.setattr(
            triton_block_sparse, name, lambda *a, f=function, n=name, **k: (launched.append(n), f(*a, **k))[1]
        )

    def step():
        x.grad = None
        layer.zero_grad()
        layer.zero_effective_grad()
        y = layer(x)
        y.square().sum().backward()
        return y, x.grad, layer.weight.grad, layer.bias.grad, layer.effective_grad

    with monkeypatch.context() as little:
        little.setattr(dispatch, "_HOST_S", 1.0)
        eager = step()
        assert launched == []
        little.setattr(gpu, "is_capturing", lambda device: True)
        captured = step()
    assert launched == ["block_matmul", "block_matmul", "block_weight_grad"]
    for got, expected in zip(captured, eager, strict=True):
        assert_close(got, expected)


def test_layers_say_that_steps_of_little_work_are_torchs_own():
    layer = sb.SparseMaskedLinear(256, 256, sparsity=0.9, pattern="filter")
    assert layer.backends["forward"].name == "slice"
    assert "PyTorch's own layer in eager steps" in str(layer)


def test_how_much_work_is_little(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "_HOST_S", 500e-6)
    monkeypatch.setattr(gpu, "processors", lambda device: 132)
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    assert not dispatch.waits_for_host(8192, (4096, 4096), torch.bfloat16, device)
    assert dispatch.waits_for_host(1024, (4096, 4096), torch.bfloat16, device)
    assert not dispatch.waits_for_host(1024, (4096, 4096), torch.float32, device)
    monkeypatch.setattr(gpu, "capability", lambda device: (12, 0))
    assert not dispatch.waits_for_host(1024, (4096, 4096), torch.bfloat16, device)
    monkeypatch.setattr(gpu, "capability", lambda device: (8, 0))
    assert not dispatch.waits_for_host(2048, (4096, 4096), torch.bfloat16, device)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_small_layers_are_left_to_torch(kind, cast, launches, monkeypatch):
    """To the same numbers; what more than the weight wants a gradient of is not."""
    # The interpreter cuts off what a GPU rounds.
    tolerance = {"rtol": 0.02, "atol": 0.05} if cast == torch.bfloat16 else {}
    layer = torch.nn.Linear(12, 8) if kind == "linear" else torch.nn.Conv2d(3, 8, 2)
    layer = sb.sparsify(torch.nn.Sequential(layer), 0.5)[0]
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, float("nan"))  # hidden
    x = torch.randn(2, 5, 12) if kind == "linear" else torch.randn(2, 3, 6, 6)

    def step():
        x2 = x.detach().requires_grad_()
        with torch.autocast(DEVICE.type, cast or torch.bfloat16, enabled=cast is not None):
            y = layer(x2)
        y.square().sum().backward()
        grads = layer.weight.grad, layer.bias.grad, x2.grad
        layer.zero_grad()
        return y, *grads

    ours, n = step(), layer.weight.numel()
    assert launches == [1]
    torch.autograd.graph.increment_version(layer.weight)  # or the copy were still good
    for most, if_brief, seconds, made in (
        (n, n, 0.0, 1),
        (n - 1, n, 1.0, 1),
        (n - 1, n, 0.0, 2),
        (n - 1, n - 1, 1.0, 3),
    ):
        monkeypatch.setattr(dense, "_SMALL_ON_GPU", most)
        monkeypatch.setattr(dense, "_SMALL_IF_BRIEF", if_brief)
        monkeypatch.setattr(dense, "_BRIEF_S", seconds)
        for got, expected in zip(step(), ours, strict=True):
            assert got.dtype == expected.dtype
            assert_close(got, expected, **tolerance)
        assert len(launches) == made  # a copy where torch is not left to select
        torch.autograd.graph.increment_version(layer.weight)
    monkeypatch.setattr(dense, "_SMALL_ON_GPU", n)
    layer.collect("all")
    step()
    assert len(launches) == 4
    assert layer.effective_grad.isfinite().all()


def test_gradients_of_gradients_of_a_layer(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_COMPUTE_COPY", "0")  # what is compared with changes weights through .data
    for layer, x in ((torch.nn.Linear(4, 3), torch.randn(5, 4)), (torch.nn.Conv2d(2, 3, 2), torch.randn(2, 2, 3, 3))):
        layer = sb.sparsify(torch.nn.Sequential(layer.double()), 0.5)[0]
        x = x.double().requires_grad_()

        def product(x, w, layer=layer):
            return torch.func.functional_call(layer, {"weight": w}, (x,))

        w = torch.where(layer.mask, layer.weight, 0).detach().requires_grad_()
        # cuDNN's gradients differ from one call to the next.
        assert torch.autograd.gradcheck(product, (x, w), nondet_tol=1e-9)
        assert torch.autograd.gradgradcheck(product, (x, w), nondet_tol=1e-9)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sink", ["none", "search", "all", "scores", "shared"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_whole_and_once(pattern, sink, compiler):
    """Our ops where they may do better than the dense library, else its own."""
    torch._dynamo.reset()
    eager = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding="same"), torch.nn.Flatten(), torch.nn.Linear(72, 4))
    sb.sparsify(eager, 0.5, pattern=pattern)
    layers = [layer for _, layer in sb.sparse_layers(eager)]
    if sink in ("scores", "shared"):
        for layer in layers:
            layer.set_mask_scores(torch.nn.Parameter(torch.randn_like(layer.weight)))
    twin = copy.deepcopy(eager)
    models = eager, twin
    if sink == "shared":
        for model in models:
            share_gradient(model)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    forwards = eager, torch.compile(twin, fullgraph=True, backend=keep)
    for step in range(3):
        x, dy, found = torch.randn(3, 4, 3, 3), torch.randn(3, 4), []
        for model, forward in zip(models, forwards, strict=True):
            for layer in [layer for _, layer in sb.sparse_layers(model)]:
                if sink in ("search", "all"):
                    layer.collect(sink, torch.tensor([step, 5, -1]) if sink == "search" else None)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y = forward(x)
            model.zero_grad()
            (y.float() * dy).sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            found.append([y, grads, [layer.effective_grad for _, layer in sb.sparse_layers(model)]])
        for got, want in zip(tree_leaves(found[1]), tree_leaves(found[0]), strict=True):
            if want is None:
                assert got is None
                continue
            assert_close(got, want, rtol=0.05, atol=0.05)
            assert got.dtype == want.dtype
        for model in models:
            for _, layer in sb.sparse_layers(model):
                layer.set_mask(~layer.mask, check=False)
                with torch.no_grad():
                    layer.weight.add_(0.1)
    ours = [node for node in graphs[0].graph.nodes if "sparsebilevel" in str(node.target)]
    assert len(graphs) == 1
    assert bool(ours) == (pattern == "block:4x4")


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_where_the_copy_has_the_type_of_the_weight(dtype, compiler):
    torch._dynamo.reset()
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False).to(dtype)), 0.5)[0]
    layer.set_mask_scores(torch.nn.Parameter(torch.randn_like(layer.weight)))
    x, dy = torch.randn(5, 16, dtype=dtype, requires_grad=True), torch.randn(5, 8, dtype=dtype)
    found = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend=compiler)):
        x.grad = layer.weight.grad = layer.mask_scores.grad = None
        forward(x).backward(dy)
        found.append([x.grad, layer.weight.grad, layer.mask_scores.grad])
    for got, want in zip(found[1], found[0], strict=True):
        assert_close(got, want, rtol=0.02, atol=0.02)
        assert want.abs().max() > 0.1


@pytest.mark.parametrize("name", ["linear", "linear_backward", "conv2d", "conv2d_backward"])
def test_compilers_capture_no_op_that_keeps_memory(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.sparsebilevel, f"masked_{name}").default.tags


# -- products ----------------------------------------------------------------------------------------------------------

SHAPES = [(3, 5, 7), (70, 100, 64), (130, 40, 96), (1, 1, 32), (0, 4, 32), (5, 140, 130)]  # T, N, K


def matrices(shape, dtype):
    """x, dy, weight and mask, with values that every type has."""
    t, n, k = shape
    x, dy, w = (torch.randint(-8, 9, size).to(dtype) / 8 for size in ((t, k), (t, n), (n, k)))
    return x, dy, w, torch.rand(n, k) < 0.4


def test_descriptors_load_what_pointers_do(monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    x, dy, w, m = matrices((70, 104, 64), torch.bfloat16)
    assert triton_matmul.operands((x, 16, 64))[1]
    z = torch.where(m, w, 0).float()
    close(triton_matmul.masked_matmul(x, w, m), x.float() @ z.t())
    close(triton_matmul.masked_matmul(dy, w, m, input_grad=True), dy.float() @ z)
    g = dy.float().t() @ x.float()
    assert_close(triton_matmul.weight_grad(dy, x, w, m, need_sink=True)[2], g)
    blocks = BlockLayout(64, occupied_tiles(m, 64), 1.0)
    close(blocks.forward(x, z.bfloat16()), x.float() @ z.t())
    close(blocks.input_grad(dy, z.bfloat16()), dy.float() @ z)
    assert_close(blocks.weight_grad(dy, x, m, torch.float32), g * m)
    assert not triton_matmul.operands((x[:, :3].contiguous(), 16, 64))[1]
    row = torch.randn(1, 67).bfloat16()[:, :64]  # contiguous, with a stride that is no multiple of 16 bytes
    close(triton_matmul.masked_matmul(row, w, m), row.float() @ z.t())
    for capability in ((8, 0), (8, 9), (12, 0)):  # the last has descriptors, but no room for tiles that use them
        monkeypatch.setattr(gpu, "capability", lambda device, capability=capability: capability)
        assert not triton_matmul.operands((x, 16, 64))[1]
        assert triton_matmul.weight_tile(capability) < triton_matmul.weight_tile((10, 0))


def test_float32_is_multiplied_as_torch_is_told():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name in ("tf32", "ieee"):
            matmul.fp32_precision = name
            assert gpu.precision(torch.float32) == name
            assert gpu.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_is_fused_where_triton_multiplies_less_exactly(forced, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "times.json"))
    names = [measurements.key("forward", dtype, 64, 64, 64) for dtype in (torch.float32, torch.bfloat16)]
    measurements.save(DEVICE, dict.fromkeys(names, {"dense": 2.0, "fused": 1.0}))
    if forced:
        monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "fused")

    def chosen(dtype):
        return choose_product("forward", dtype, DEVICE, 64, (64, 64), Structure())[0].name

    monkeypatch.setattr(gpu, "precision", lambda dtype: "ieee")
    for capability, name in (((9, 0), "fused"), ((10, 0), "dense"), ((10, 3), "dense"), ((12, 0), "fused")):
        monkeypatch.setattr(gpu, "capability", lambda device, capability=capability: capability)
        assert (chosen(torch.float32), chosen(torch.bfloat16)) == (name, "fused")
    monkeypatch.setattr(gpu, "capability", lambda device: (10, 0))
    monkeypatch.setattr(gpu, "precision", lambda dtype: "tf32")
    assert chosen(torch.float32) == "fused"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_matmul(shape, dtype):
    x, dy, w, m = matrices(shape, dtype)
    b = torch.randint(-8, 9, w.shape[:1]).to(dtype)
    z = torch.where(m, w, 0).float()
    w[~m] = float("nan")
    given = [m] if shape[2] % 32 else [m, reference.mask_words(m)[0].clone()]
    for mask in given:
        close(triton_matmul.masked_matmul(x, w, mask, b), x.float() @ z.t() + b.float())
        close(triton_matmul.masked_matmul(dy, w, mask, input_grad=True), dy.float() @ z)
    close(triton_matmul.masked_matmul(x, w.float(), m), x.float() @ z.t())  # master weights
    strided = torch.stack([b, b], 1)[:, 0]
    close(triton_matmul.masked_matmul(x, w, m, strided), x.float() @ z.t() + b.float())


def test_words_must_begin_with_the_rows():
    x, _, w, m = matrices((3, 5, 7), torch.float32)
    with pytest.raises(ValueError, match="7 columns; expected a multiple of 32"):
        triton_matmul.masked_matmul(x, w, reference.mask_words(m)[0])


@pytest.mark.parametrize(("splits", "dtype"), [(None, torch.float32), (1, torch.float16), (3, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_grad(shape, dtype, splits):
    x, dy, w, m = matrices(shape, dtype)
    g = dy.float().t() @ x.float()
    outs = triton_matmul.weight_grad(dy, x, w, m, need_sink=True, splits=splits)
    for out, want in zip(outs, reference.split_gradient(g, w, m), strict=True):
        assert out.dtype == want.dtype
        close(out, want)
    if shape[2] % 32 == 0:
        words = reference.mask_words(m)[0]
        close(triton_matmul.weight_grad(dy, x, w, words, need_scores=False, splits=splits)[0], (g * m).to(dtype))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_weight_grad_gives_what_is_asked(needs):
    x, dy, w, m = matrices((9, 40, 50), torch.float32)
    named = dict(zip(("need_weight", "need_scores", "need_sink"), needs, strict=True))
    outs = triton_matmul.weight_grad(dy, x, w, m, **named)
    for out, want in zip(outs, reference.split_gradient(dy.t() @ x, w, m, needs), strict=True):
        assert (out is None) == (want is None)
        assert out is None or torch.equal(out, want)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_block_products(block, density, dtype):
    n, k, t = 2 * block + 7, block + 9, 37
    x, dy, w, _ = matrices((t, n, k), dtype)
    tiles = torch.rand(-(-n // block), -(-k // block)) < density
    m = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k].contiguous()
    m &= torch.rand(n, k) < 0.9  # what a kept tile drops is dropped
    b = torch.randint(-8, 9, (n,)).to(dtype)
    z = torch.where(m, w, 0)
    blocks = BlockLayout(block, occupied_tiles(m, block), density)
    close(blocks.forward(x, z, b), x.float() @ z.float().t() + b.float())
    close(blocks.input_grad(dy, z), dy.float() @ z.float())
    got = blocks.weight_grad(dy, x, m, torch.float32)
    assert_close(got, (dy.float().t() @ x.float()) * m)


CONVOLUTIONS = [  # images, inputs, height, width; outputs, kernel, stride, padding, dilation
    ((2, 37, 7, 6), (40, 3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 32, 8, 5), (72, 3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 70, 6, 9), (33, 3, 2), (2, 3), (0, 2), (1, 2)),
    ((1, 64, 9, 1), (32, 2, 2), (1, 1), (1, 3), (2, 3)),
    ((2, 40, 5, 5), (36, 1, 1), (2, 2), (0, 0), (1, 1)),  # phases that no tap reaches
    ((1, 33, 1, 4), (5, 2, 2), (3, 1), (2, 1), (3, 2)),  # a stride beyond the map: phases without pixels
]


@pytest.mark.parametrize(("density", "dtype"), [(0.0, torch.float32), (0.4, torch.float32), (0.4, torch.bfloat16)])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation"), CONVOLUTIONS, ids=str)
def test_block_convolutions(size, kernel, stride, padding, dilation, density, dtype):
    last, block = {"memory_format": torch.channels_last}, 32
    geometry = stride, padding, dilation, 1
    shape = kernel[0], size[1], *kernel[1:]
    pattern = Block(block, block)
    m = pattern.expand(torch.rand(pattern.num_groups(shape)) < density, shape)
    blocks = BlockLayout(block, occupied_tiles(m, block), density)
    assert torch.equal(blocks.occupied.flatten(), pattern.group_scores(m.float()) > 0)
    m = (m & (torch.rand(shape) < 0.9)).contiguous(**last)  # what a kept tile drops is dropped
    x, w = ((torch.randint(-8, 9, s) / 8).to(dtype).contiguous(**last) for s in (size, shape))
    b = torch.randint(-8, 9, (shape[0],)).to(dtype)
    z = torch.where(m, w, 0).contiguous(**last)
    x2, z2 = x.double().requires_grad_(), z.double().requires_grad_()
    expected = F.conv2d(x2, z2, b.double(), *geometry)
    dy = (torch.randint(-8, 9, expected.shape) / 8).to(dtype).contiguous(**last)
    expected.backward(dy.double())
    close(blocks.conv2d(x, z, b, geometry), expected)
    close(blocks.conv2d_input_grad(dy, z, size, geometry), x2.grad)
    got = blocks.conv2d_weight_grad(dy, x, m, kernel[1:], torch.float32, geometry)
    assert got.is_contiguous(**last)
    close(got, z2.grad * m)
    kept = pattern.expand(blocks.occupied.flatten(), shape)
    close(blocks.conv2d_weight_grad(dy, x, None, kernel[1:], torch.float32, geometry), z2.grad * kept)


@pytest.mark.parametrize(("block", "images"), [(64, (5, 18, 15)), (128, (2, 12, 11))])
def test_block_convolutions_of_large_tiles_and_whole_channel_blocks(block, images, monkeypatch):
    """Blocks that hold all taps; weights by descriptors; many rows, in several parts."""
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    last, geometry = {"memory_format": torch.channels_last}, ((1, 1), (1, 1), (1, 1), 1)
    n, k = block + 8, 2 * block
    x, w = (
        (torch.randint(-8, 9, s) / 8).bfloat16().contiguous(**last) for s in ((images[0], k, *images[1:]), (n, k, 3, 3))
    )
    m = block_mask((n, k, 3, 3), block, 0.5).contiguous(**last)
    m[:block, :block] = True
    z = torch.where(m, w, 0).contiguous(**last)
    blocks = BlockLayout(block, occupied_tiles(m, block), 0.1)
    assert blocks.by_row.starts.diff().remainder(9).eq(0).all()
    x2, z2 = x.double().requires_grad_(), z.double().requires_grad_()
    expected = F.conv2d(x2, z2, None, *geometry)
    dy = (torch.randint(-8, 9, expected.shape) / 8).bfloat16().contiguous(**last)
    expected.backward(dy.double())
    launched = []
    monkeypatch.setattr(
        triton_block_sparse, "operand", lambda *given: launched.append(triton_matmul.operand(*given)) or launched[-1]
    )
    close(blocks.conv2d(x, z, None, geometry), expected)
    close(blocks.conv2d_input_grad(dy, z, x.shape, geometry), x2.grad)
    close(blocks.conv2d_weight_grad(dy, x, m, (3, 3), torch.float32, geometry), z2.grad * m)
    assert [is_descriptor for _, is_descriptor in launched] == [True] * 3


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_block_weight_grad_in_parts(splits):
    x, dy, _, _ = matrices((150, 70, 40), torch.float32)
    m = block_mask((70, 40), 32, 0.6)
    blocks = BlockLayout(32, occupied_tiles(m, 32), 0.6)
    got = triton_block_sparse.block_weight_grad(dy, x, m, (70, 40), 32, blocks.by_row, torch.float32, splits=splits)
    assert_close(got, dy.t() @ x * m)


def test_block_lists():
    m = torch.zeros(100, 70, dtype=torch.bool)
    m[5, 33] = m[99, 69] = m[99, 0] = True
    blocks = BlockLayout(32, occupied_tiles(m, 32), 0.25)
    order, starts, index, rows = blocks.by_row
    assert order.tolist() == [3, 0, 1, 2]
    assert starts.tolist() == [0, 1, 1, 1, 3]
    assert index.shape == (12,)
    assert index[:3].tolist() == [1, 0, 2]
    assert rows[:3].tolist() == [0, 3, 3]
    assert blocks.by_column.starts.tolist() == [0, 1, 2, 3]
    assert blocks.by_column.tiles[:3].tolist() == [3, 0, 3]


LISTS = [(1, 1), (18, 3), (3, 35)]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", LISTS, ids=str)
def test_lists_are_those_of_plain_torch(shape, density, monkeypatch):
    monkeypatch.setattr(triton_tiles, "_WIDTH", 16)  # several steps of the loops
    for occupied in (torch.rand(shape) < density, (torch.rand(shape[::-1]) < density).t()):
        got, want = block_sparse.tile_list(occupied), reference.tile_list(occupied)
        count = int(want[1][-1])
        for given, (name, tensor) in zip(want, got._asdict().items(), strict=True):
            assert (tensor.dtype, tensor.shape) == (torch.int32, given.shape)
            size = count if name in ("tiles", "rows") else len(given)
            assert torch.equal(tensor[:size], given[:size]), name
        for block, settled in ((64, False), (64, True), (128, False)):
            got = block_sparse.pair_list(occupied, block, settled=settled)
            want = reference.pair_list(occupied, block // 64, block_sparse.match(occupied) if settled else None)
            count = int(want[1][-1])
            for given, (name, tensor) in zip(want, got._asdict().items(), strict=True):
                assert (tensor.dtype, tensor.shape) == (torch.int32, given.shape)
                size = count if name == "tiles" else len(given)
                assert torch.equal(tensor[:size], given[:size]), name


@pytest.mark.parametrize("shape", [(1, 1), (33, 100), (70, 36), (5, 40, 3, 2), (2, 3, 0, 1)], ids=str)
def test_occupied_tiles_and_sides(shape):
    mask = torch.rand(shape) < 0.02
    layouts = [mask, mask.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([mask, mask], -1)[..., 0]]
    if mask.dim() == 4:
        layouts.append(mask.contiguous(memory_format=torch.channels_last))
    for layout, block in itertools.product(layouts, (8, 32)):
        sides, want = torch.zeros(2, shape[0] + shape[1], dtype=torch.bool)
        assert torch.equal(block_sparse.occupied_tiles(layout, block, sides), reference.tiles_of(layout, block, want))
        assert torch.equal(sides, want)
        assert torch.equal(block_sparse.occupied_tiles(layout, block), reference.tiles_of(layout, block))
    learning = torch.randint(-3, max(mask.numel(), 1), (9,)) if mask.numel() else torch.tensor([-1])
    with_them = mask.flatten().clone()
    with_them[learning[learning >= 0]] = True
    with_them = with_them.view(shape)
    tiles, sides = block_sparse._survey(mask)
    block_sparse._mark(torch.stack([learning, learning], 1)[:, 0], mask, tiles, sides)
    want = torch.zeros_like(sides)
    assert torch.equal(tiles, reference.tiles_of(with_them, 32, want))
    assert torch.equal(sides, want)
    before = tiles.clone(), sides.clone()
    block_sparse._mark(torch.tensor([mask.numel(), 1 << 40]), mask, tiles, sides)  # nowhere
    assert torch.equal(tiles, before[0])
    assert torch.equal(sides, before[1])


def test_block_lists_are_made_again_when_the_mask_changes():
    m = torch.zeros(64, 64, dtype=torch.bool)
    m[0, 0] = True
    assert look(m).densities == {128: 1.0, 64: 1.0, 32: 0.25}
    assert look(m).layout(32) is look(m).layout(32)
    m[40, 40] = True
    assert look(m).densities[32] == 0.5
    assert look(m).layout(32).by_row.starts.tolist() == [0, 1, 2]
    assert look(m[:0]) is None
    assert look(m[:, :, None, None]).densities[32] == 0.5


def test_masks_that_changed_together_are_looked_at_together(monkeypatch):
    masks = [torch.rand(64, 64) < 0.5 for _ in range(3)]
    for mask in masks:
        look(mask)
    waits = []
    original = block_sparse._look_again
    monkeypatch.setattr(block_sparse, "_look_again", lambda *given: (waits.append(given), original(*given)))
    for mask in masks[:2]:
        mask.zero_()
    masks[0][40, 40] = True
    assert look(masks[0]).densities == {128: 1.0, 64: 1.0, 32: 0.25}
    assert look(masks[1]).densities == {128: 0.0, 64: 0.0, 32: 0.0}
    assert look(masks[2]).densities[32] == 1.0
    assert len(waits) == 1
    use_stream(monkeypatch, Stream())  # it may be writing the others just now
    for mask in masks:
        mask.logical_not_()
    assert look(masks[0]).densities[32] == 1.0
    assert look(masks[1]).densities[32] == 1.0
    assert len(waits) == 3


def test_threads_look_at_masks_side_by_side(monkeypatch):
    monkeypatch.setattr(block_sparse, "occupied_tiles", reference.tiles_of)
    shared, failed = [torch.rand(64, 64) < 0.5 for _ in range(3)], []

    def work():
        try:
            for _ in range(60):
                own = torch.ones(64, 64, dtype=torch.bool, device=DEVICE)
                for mask in (own, *shared):
                    torch.autograd.graph.increment_version(mask)
                    assert look(mask).densities[32] == 1.0
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == []


def test_each_stream_has_its_own_lists(monkeypatch):
    mask = torch.rand(64, 64) < 0.5
    first, second = Stream(), Stream()
    found = []
    for stream in (first, second, first, second):
        use_stream(monkeypatch, stream)
        found.append(look(mask).layout(32).by_row.tiles)
    assert found[0] is found[2]
    assert found[1] is found[3]
    assert found[0].data_ptr() != found[1].data_ptr()


# -- backends ----------------------------------------------------------------------------------------------------------


def block_mask(shape, block, density):
    tiles = torch.rand(-(-shape[0] // block), -(-shape[1] // block)) < density
    mask = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]].contiguous()
    return mask if len(shape) == 2 else mask[:, :, None, None].expand(shape).contiguous()


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3", "conv3x3 stride 2"])
@pytest.mark.parametrize(
    ("pattern", "backend"),
    [("unstructured", "dense"), ("unstructured", "fused"), ("unstructured", "slice"), ("block", "auto")]
    + [("block", "block"), ("filter", "auto"), ("filter", "slice"), ("empty", "auto"), ("empty", "slice")],
)
def test_every_backend_keeps_the_contract(backend, kind, pattern, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    kernel = () if kind == "linear" else (1, 1) if kind == "conv1x1" else (3, 3)
    shape, is_last = (40, 72, *kernel), kind.endswith("stride 2")  # weights elsewhere lie as they are made
    options = {"stride": 2, "padding": 1} if is_last else {}
    x = (
        torch.randn(9, 72)
        if kind == "linear"
        else torch.randn(2, 72, 4, 4).contiguous(memory_format=torch.channels_last)
    )
    w, b, s = torch.randn(shape), torch.randn(40), torch.randn(shape)
    m = torch.rand(shape) < 0.3
    if pattern == "block":
        m = block_mask(shape, 32, 0.5)
    elif pattern == "filter":
        m[torch.rand(40) < 0.5] = False
        m[:, torch.rand(72) < 0.5] = False
    elif pattern == "empty":
        m[:] = False
    if is_last:
        w, s, m = (t.contiguous(memory_format=torch.channels_last) for t in (w, s, m))
    x, w, b, s = (t.requires_grad_() for t in (x, w, b, s))
    masked, plain = (masked_linear, F.linear) if kind == "linear" else (masked_conv2d, F.conv2d)
    z = torch.where(m, w, 0).detach().requires_grad_()
    x2, b2 = (t.detach().requires_grad_() for t in (x, b))
    expected = plain(x2, z, b2, **options)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    kept = torch.cat([m.reshape(-1).nonzero().squeeze(1), torch.tensor([-1])])
    for positions in (kept, torch.arange(-1, w.numel(), 7)):
        sink = make_grad_sink(w, positions)
        masked(x, w, m, b, grad_sink=sink, positions=positions, **options).backward(dy)
        assert_close(sink.grad, torch.where(positions < 0, 0, z.grad.reshape(-1)[positions]), **tolerance)
        assert_close(w.grad, z.grad * m, **tolerance)
        x.grad = b.grad = w.grad = None
    for with_scores in (False, True):
        sink = make_grad_sink(w) if with_scores else None
        y = masked(x, w, m, b, mask_scores=s if with_scores else None, grad_sink=sink, **options)
        y.backward(dy)
        assert_close(y, expected, **tolerance)
        for got, want in ((x.grad, x2.grad), (b.grad, b2.grad), (w.grad, z.grad * m)):
            assert_close(got, want, **tolerance)
        x.grad = b.grad = w.grad = None
    assert_close(sink.grad, z.grad, **tolerance)
    assert_close(s.grad, w.detach() * sink.grad)


def steps(tensor):
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("backend", ["dense", "fused", "block", "slice"])
@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
def test_results_lie_in_memory_as_the_compiler_is_told(backend, kind, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    ops = torch.ops.sparsebilevel

    def compare(op, args):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        for got, told in zip(*((r if isinstance(r, list) else [r]) for r in (real, fake)), strict=True):
            assert (steps(got), got.shape, got.dtype) == (steps(told), told.shape, told.dtype)

    small = torch.zeros(40, 64, dtype=torch.bool)
    small[:20, :32] = torch.rand(20, 32) < 0.5
    orders = (torch.contiguous_format, torch.channels_last)
    needs = ([True] * 5, [True, True, False, False, True])
    if kind == "linear":
        for x, flip in itertools.product(
            (torch.randn(3, 4, 64), torch.randn(64, 5).t(), torch.randn(64)), (False, True)
        ):
            w, m = torch.randn(40, 64), small
            w, m = (t.t().contiguous().t() if flip else t for t in (w, m))
            compare(ops.masked_linear, (x, w, m, torch.randn(40), None, None, None))
            dy = torch.randn(*x.shape[:-1], 40)
            for wanted in needs:
                compare(ops.masked_linear_backward, (dy, x, w, m, None, wanted))
        return
    side = int(kind[-1])
    for of_x, of_w, of_dy in itertools.product(orders, orders, orders):
        x = torch.randn(2, 64, 5, 5).contiguous(memory_format=of_x)
        w = torch.randn(40, 64, side, side).contiguous(memory_format=of_w)
        m = (small[:, :, None, None] & (torch.rand(w.shape) < 0.9)).contiguous(memory_format=of_w)
        geometry = ([1, 1], [side // 2] * 2, [1, 1], 1)
        compare(ops.masked_conv2d, (x, w, m, None, None, None, None, *geometry))
        dy = torch.randn(2, 40, 5, 5).contiguous(memory_format=of_dy)
        for wanted in needs:
            compare(ops.masked_conv2d_backward, (dy, x, w, m, None, *geometry, wanted))
    x, w = torch.randn(2, 1, 5, 5), torch.randn(40, 1, side, side)  # both in NCHW and in channels_last
    compare(ops.masked_conv2d, (x, w, torch.rand(w.shape) < 0.5, None, None, None, None, *geometry))


@pytest.fixture
def block_grads(monkeypatch):
    """How many tiles the kernels for the weight gradient in tiles got, call by call."""
    given = []
    original = triton_block_sparse.block_weight_grad

    def counted(dy, x, mask, shape, block, lists, *args, **kwargs):
        given.append(int(lists.starts[-1]))
        return original(dy, x, mask, shape, block, lists, *args, **kwargs)

    monkeypatch.setattr(triton_block_sparse, "block_weight_grad", counted)
    return given


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_sink_has_the_weight_gradient_in_its_tiles_beside_those_of_the_mask(kind, block_grads, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
    monkeypatch.setattr(block_sparse, "BLOCKS", (32,))
    size = (5, 96) if kind == "linear" else (2, 96, 4, 5)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64) if kind == "linear" else torch.nn.Conv2d(96, 64, 3))
    layer = sb.sparsify(model, 0.5).to(memory_format=torch.channels_last)[0]
    x = torch.randn(size)
    x = x if kind == "linear" else x.contiguous(memory_format=torch.channels_last)
    layer.mask.copy_(torch.rand(layer.weight.shape) < 0.5)
    layer.mask[:32, :64] = layer.mask[32:, 64:] = False
    layer.mask[0, 64] = False
    kept, taps = layer.mask.reshape(-1).nonzero().squeeze(1), layer.weight[0, 0].numel()
    dropped, far = torch.tensor([64 * taps, -1]), torch.tensor([63 * taps, -1])  # in a kept tile, and in no such
    for support, positions, tiles in (
        ("none", None, 3 * taps),
        ("active", None, 3 * taps),
        ("search", torch.cat([kept, dropped]), 3 * taps),
        ("search", torch.cat([kept, far]), 3 * taps + 1),  # in the same buffer
        ("search", torch.cat([kept, dropped]), 3 * taps),
        ("all", None, 0),
    ):
        layer.collect(support, positions)
        layer.zero_grad()
        block_grads.clear()
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        assert block_grads == ([tiles] if tiles else []), support
        assert layer.backends["weight_grad"].name == ("block" if tiles else "dense")
        z = layer.effective_weight().detach().requires_grad_()
        (F.linear(x, z, layer.bias) if kind == "linear" else F.conv2d(x, z, layer.bias)).backward(dy)
        assert_close(layer.weight.grad, z.grad * layer.mask, rtol=1e-4, atol=1e-4)
        if support != "none":
            at = layer.support_positions
            want = z.grad if at is None else torch.where(at < 0, 0, z.grad.reshape(-1)[at])
            assert_close(layer.effective_grad, want, rtol=1e-4, atol=1e-4)


def test_what_is_left_of_a_weight_gradient_holds_the_positions_of_a_sink(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "slice")
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(36, 24)), 0.5)[0]
    layer.mask[:10] = layer.mask[:, 30:] = False
    kept = layer.mask.reshape(-1).nonzero().squeeze(1)
    for outside in ([], [3 * 36 + 31], [3 * 36 + 31, -1]):
        layer.collect("search", torch.cat([kept, torch.tensor(outside, dtype=torch.int64)]))
        held = look(layer.mask, layer.support_positions)
        assert held.structure().slices == (14 * 30 if not outside else 15 * 31) / (24 * 36)
        assert layer.backends["weight_grad"].name == "slice"
        x, dy = torch.randn(5, 36), torch.randn(5, 24)
        layer.zero_grad()
        layer(x).backward(dy)
        g, at = dy.t() @ x, layer.support_positions
        assert_close(layer.effective_grad, torch.where(at < 0, 0, g.reshape(-1)[at]))
        assert_close(layer.weight.grad, g * layer.mask)


def test_convolutions_go_by_tiles_where_that_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "gpu.json"))
    cpu, window = DEVICE, measurements.Window((3, 3))

    def choose(**kwargs):
        structure = Structure(((32, 0.1),))
        return choose_product("forward", torch.float32, cpu, 2 * 4 * 5, (32, 64, 3, 3), structure, **kwargs)[0]

    assert choose().name == "block"
    assert choose(window=window).name == "dense"
    assert "not measured" in choose(window=window).reason
    layer = measurements.Convolution(2, 4, 5, 32, 64)
    found = measurements.measure([layer], torch.float32, cpu, repeats=1)
    name = "forward float32 64 32 64 kernel 3x3 stride 1x1 dilation 1x1 groups 1"
    assert set(found[name]) == {"dense", "fused", "block128", "block64", "block32"}
    assert len(found) == 3
    assert "not measured" in choose().reason
    assert "not measured" in choose(window=window._replace(stride=(2, 2))).reason
    for seconds, backend in ((0.5, "block"), (2.0, "dense")):
        measurements.save(cpu, {name: {"dense": 1.0, "block32": [seconds, seconds]}})
        assert choose(window=window).name == backend
        assert "measured on this device" in choose(window=window).reason
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
    assert choose(window=window).name == "block"


def test_tuning_measures_what_the_layers_of_a_model_compute(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "gpu.json"))
    last = {"memory_format": torch.channels_last}
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.Conv2d(32, 32, 3, 2, padding=1, padding_mode="circular"),
        torch.nn.Conv2d(32, 32, 3, padding="same"),
        torch.nn.Conv2d(32, 40, 1),
        torch.nn.Conv2d(40, 40, 3, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(40, 8),
        torch.nn.Linear(8, 8),
        torch.nn.Linear(8, 8),
    ).to(**last)
    sb.sparsify(model, 0.5, pattern="block:4x4", include=["1", "2", "3", "4"])
    for i in (6, 7, 8):
        model[i] = sb.SparseMaskedLinear.from_dense(model[i], 0.5)
    x = torch.randn(2, 3, 6, 6).contiguous(**last)
    asked, measure = [], measurements.measure

    def small_ones(shapes, dtype, device, repeats, *, tiles):
        asked.append((set(shapes), dtype, tiles))
        return measure([shape for shape in shapes if len(shape) == 3][:1], dtype, device, 1)  # one matrix

    monkeypatch.setattr(measurements, "measure", small_ones)
    state = torch.get_rng_state()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = sb.costs.tune_layers(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    convolutions = {
        measurements.Convolution(2, 8, 8, 32, 32, stride=(2, 2), padding=(0, 0)),
        measurements.Convolution(2, 3, 3, 32, 32),
    }
    linear, others = {(2, 8, 40), (2, 8, 8)}, {(18, 40, 32)}
    assert asked == [(linear, torch.bfloat16, False), (others | convolutions, torch.bfloat16, True)]
    assert {"forward bfloat16 2 8 40", "weight_grad bfloat16 32 40 32"} <= set(found)
    assert set(measurements.of_device(x.device)) == set(found)
    assert "measured on this device" in model[3].backends["forward"].reason
    with pytest.raises(
        ValueError, match="example_input is on meta, where no kernel has to be measured; expected a GPU"
    ):
        sb.costs.tune_layers(model, x.to("meta"))


def test_choices_without_and_with_measurements(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "deep/gpu.json"))
    cpu = DEVICE

    def choose(tiles=None, slices=1.0, product="forward", **kwargs):
        structure = Structure(tuple((tiles or {}).items()), slices)
        return choose_product(product, torch.bfloat16, cpu, 30, (64, 64), structure, **kwargs)

    half = {128: 1.0, 64: 1.0, 32: 0.2}
    assert choose()[0].name == "dense"
    assert "not measured" in choose()[0].reason
    assert choose({128: 1.0, 64: 0.9, 32: 0.8})[0].name == "dense"
    assert choose(half)[0].name == "block"
    assert choose(half)[1] == 32
    assert choose(half, product="weight_grad", dense_grad=True)[0].name == "dense"
    assert choose(half, window=measurements.Window((3, 3)))[0].name == "dense"
    assert choose(slices=0.5)[0].name == "dense"  # gathering would take longer
    large = functools.partial(choose_product, "forward", torch.bfloat16, cpu, 8192, (4096, 4096))
    assert large(Structure((), 0.5))[0].name == "slice"
    assert large(Structure((), 0.9))[0].name == "dense"
    pixels = functools.partial(choose_product, "forward", torch.bfloat16, cpu, 256 * 56 * 56, (64, 256, 1, 1))
    assert pixels(Structure((), 0.25))[0].name == "dense"
    name = measurements.key("forward", torch.bfloat16, 30, 64, 64)
    assert name == "forward bfloat16 32 64 64"
    entry = {"dense": 2.0, "fused": 3.0, "block32": [1.0, 4.0]}
    measurements.save(cpu, {name: entry})
    assert choose()[0].name == "dense"
    assert "measured on this device" in choose()[0].reason
    assert choose(half)[0].name == "block"
    assert choose(half)[0].estimate == pytest.approx(2 / 1.6)
    assert choose({32: 0.4})[0].name == "dense"  # 3.2 s
    times = json.loads(measurements.path().read_text())
    measurements.path().write_text(json.dumps(times | {"of another process": {}}))
    measurements.save(cpu, {name: entry | {"fused": 1.0}})
    assert choose(half)[0].name == "fused"
    assert "of another process" in json.loads(measurements.path().read_text())
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "block")
    assert choose(half)[0].reason.startswith("forced")
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    assert choose(half)[0].reason == "cuBLAS/cuDNN on m*theta; SPARSEBILEVEL_BACKEND=sparse cannot run here"
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        choose()


def test_measuring_writes_what_the_choice_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEBILEVEL_MEASUREMENTS", str(tmp_path / "gpu.json"))
    cpu = DEVICE
    found = measurements.measure([(16, 32, 32)], torch.float32, cpu, repeats=1)
    assert len(found) == 3
    for product in PASSES:
        times = measurements.times(cpu, product, torch.float32, 16, 32, 32)
        assert set(times) == {"dense", "fused", "block128", "block64", "block32"}
        choice = choose_product(product, torch.float32, cpu, 16, (32, 32), Structure(((32, 1.0),)))[0]
        assert "measured on this device" in choice.reason


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_optimizers_step_as_torch_does_and_write_the_copies(name, launches):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01} if name == "SGD" else {"lr": 0.01}
    x = torch.randn(2, 3, 4, 4)
    results = []
    for library in (torch.optim, sb.optim):
        torch.manual_seed(1)
        model = small_model()
        optimizer = getattr(library, name)(model.parameters(), **settings)
        launches.clear()
        for step in range(4):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                launches.clear()
        if library is sb.optim:
            assert launches == []  # the optimizer has written them
        results.append([p.detach() for p in model.parameters()])
        results[-1] += [state[key] for state in optimizer.state.values() for key in state if state[key] is not None]
    for got, want in zip(*reversed(results), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_weights_and_scores_are_stepped_from_one_gradient(name, launches, monkeypatch):
    settings = {"momentum": 0.9, "weight_decay": 0.01} if name == "SGD" else {"weight_decay": 0.1}
    x = torch.randn(2, 3, 4, 4)
    split, results = [], []
    original = triton_elementwise.split_gradient
    monkeypatch.setattr(triton_elementwise, "split_gradient", lambda *args: (split.append(args[3:]), original(*args)))
    for shared in (False, True):
        torch.manual_seed(1)
        model = small_model()
        layers = [layer for _, layer in sb.sparse_layers(model)]
        for layer in layers:
            layer.set_mask_scores(torch.nn.Parameter(torch.randn_like(layer.weight)))
        if shared:
            sb.optim.share_gradient(model)
        scores = [layer.mask_scores for layer in layers]
        others = [p for p in model.parameters() if all(p is not s for s in scores)]
        groups = [{"params": others}, {"params": scores, "lr": 0.05, "weight_decay": 0.0}]
        optimizer = getattr(sb.optim, name)(groups, lr=0.01, **settings)
        for step in range(4):
            launches.clear()
            split.clear()
            model(x).square().sum().backward()
            model(x).square().sum().backward()
            if shared and step > 1:
                assert launches == []  # the optimizer has written the copies
            backward = len(split)
            optimizer.step()
            if shared:
                assert all(grads[:2] == (None, None) for grads in split[:backward])  # G alone
                assert len(split) == backward + (step == 0)  # torch makes the state
                assert any(layer.weight.grad.count_nonzero() > layer.mask.sum() for layer in layers[1:])
                assert all(layer.mask_scores.grad is None for layer in layers)
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
        results[-1] += [state[key] for state in optimizer.state.values() for key in state if state[key] is not None]
    for got, want in zip(*reversed(results), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- convolutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((3, 2), (2, 1), (0, 2), (1, 2), 2),
        ((1, 1), (2, 2), (0, 0), (1, 1), 1),
        ((2, 2), (1, 2), (1, 1), (2, 1), 4),
    ],
    ids=str,
)
def test_masked_conv2d(kernel, stride, padding, dilation, groups, dtype):
    last = {"memory_format": torch.channels_last}
    geometry = stride, padding, dilation, groups
    x = (torch.randint(-8, 9, (2, 8, 6, 5)) / 8).to(dtype).contiguous(**last)
    w = (torch.randint(-8, 9, (72 if groups == 1 else 8, 8 // groups, *kernel)) / 8).to(dtype).contiguous(**last)
    m, b = (torch.rand(w.shape) < 0.5).contiguous(**last), torch.randn(w.shape[0]).to(dtype)
    z = torch.where(m, w, 0).float().requires_grad_()
    x2 = x.float().requires_grad_()
    expected = F.conv2d(x2, z, b.float(), *geometry)
    dy = (torch.randint(-8, 9, expected.shape) / 8).to(dtype).contiguous(**last)
    expected.backward(dy.float())
    w[~m] = float("nan")
    close(triton_conv2d.masked_conv2d(x, w, m, b, geometry), expected)
    close(triton_conv2d.input_grad(dy, x, w, m, geometry), x2.grad)
    w = w.nan_to_num(0.5)
    outs = triton_conv2d.weight_grad(dy, x, w, m, geometry, need_sink=True)
    for out, want in zip(outs, reference.split_gradient(z.grad, w, m), strict=True):
        assert out.dtype == want.dtype
        close(out, want)


# -- over the wire -----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    """A process group of this process alone: nccl's on a GPU, else gloo's."""
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    if not (dist.is_available() and dist.is_backend_available(backend)):
        pytest.skip(f"needs torch.distributed with {backend}")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_hook_and_a_method_of_a_rank_by_itself(one_rank):
    """What they do on the device between and after the messages; that ranks add up is for several, over gloo."""

    def train(hooked):
        torch.manual_seed(0)
        model = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 40)), 0.8, seed=0)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        hook = sb.SparseAllReduce(ddp) if hooked else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = sb.BiDST(model, optimizer, update_freq=2, update_end=8)
        for step in range(6):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step), device="cpu").to(DEVICE)
            optimizer.zero_grad()
            ddp(x).square().mean().backward()
            optimizer.step()
            method.step()
        return model.state_dict(), hook

    (plain, _), (hooked, hook) = train(False), train(True)
    for name, tensor in plain.items():
        assert_close(hooked[name], tensor, rtol=1e-5, atol=1e-7)
    assert 0.2 < hook.bytes_sent / hook.dense_bytes < 0.25, hook


# -- the script for machines with a GPU --------------------------------------------------------------------------------


def test_the_checks_for_gpus_pass_here(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu_kernels

    errors = gpu_kernels.check(DEVICE, small=True)
    x = torch.zeros(8, 64, dtype=torch.bfloat16, device=DEVICE)
    # Of two types: two products of tiles of two sides more, and three gradients.
    assert len(errors) == (88 + 2 * (4 + 3) if cuda_block_sparse.takes(64, x, x) else 88)
    assert max(errors.values()) <= 4, errors


def test_the_checks_for_gpus_fail(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu_kernels

    want = torch.ones(3, dtype=torch.float64)
    assert gpu_kernels._error(torch.tensor([1.0, 1.0, 1.0001]), want, want) > 4
    assert gpu_kernels._error(torch.tensor([1.0, 1.0, float("nan")]), want, want) > 4


def test_layers_say_what_they_take_and_why():
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.5)[0]
    assert "backend=dense (cuBLAS/cuDNN on m*theta; nothing else is faster, by an estimate" in repr(layer)
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 64)), 0.5, pattern="channel")[0]
    assert {backend.name for backend in layer.backends.values()} == {"dense"}  # too small to cut dropped inputs out
    blocks = torch.block_diag(*[torch.ones(32, 32)] * 8).bool()
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(256, 256)), 0.5)[0]
    layer.set_mask(blocks)
    assert {backend.name for backend in layer.backends.values()} == {"dense"}  # what it drops as a whole is not seen
    layer = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(256, 256)), 0.5, pattern="block:32x32")[0]
    layer.set_mask(blocks)
    assert {backend.name for backend in layer.backends.values()} == {"block"}
    assert "25% of the 64x64 tiles kept, by an estimate, not measured on this device" in repr(layer)
    layer.collect("all")
    assert layer.backends["weight_grad"].name == "dense"
