"""Checks the Triton kernels on a GPU, and times them beside dense layers, plain masked layers and torch.compile.

    python benchmarks/gpu_kernels.py check [--output FILE] [--shard I/N] [--small]
    python benchmarks/gpu_kernels.py steps|time|tune [--output FILE] [--budget S] [--quick]

``check`` compares every kernel with float64 on fresh random numbers, in memory that held NaN before; ``time`` takes
medians of CUDA events with the L2 cache flushed, of launches that wait in the queue and of a captured graph; ``steps``
does it of whole layers, also eager, one after another, with what launching costs, and all variants of one in turn.
Masks of tiles have settled (``BlockLayout.settle``). Beside each time stands its floor: what must be read and written
at the bandwidth of a copy, or the multiplications at the speed of a dense product, both measured here. ``tune`` writes
the table that layers choose by. ``gpu_check.py`` runs this with all that runs on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import statistics
import time as clock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebilevel import optim
from sparsebilevel.kernels import (
    cuda_block_sparse,
    cuda_weight_grad,
    masked_linear,
    measurements,
    reference,
    triton_conv2d,
    triton_elementwise,
    triton_matmul,
)
from sparsebilevel.kernels.block_sparse import BLOCKS, BlockLayout, look, occupied_tiles
from sparsebilevel.nn import SparseMaskedLinear

# In roundings. Tensor cores cut the running sum after every few products, so long sums of float32 are off by some; what
# is left out of a sum, or counted twice, is off by thousands.
MOST_ERROR = 64
# ResNet-50's stages 3 and 4 at 224x224.
CONVOLUTIONS = (
    measurements.Convolution(256, 14, 14, 256, 256),
    measurements.Convolution(256, 7, 7, 512, 512),
)
BLOCK_SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9)
TOKENS = (512, 1024, 2048, 8192)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
WIDTH = 4096


# -- correctness -------------------------------------------------------------------------------------------------------


_NEEDS = ("need_weight", "need_scores", "need_sink")


def _poison(device: torch.device, elements: int) -> None:
    """Leave NaN in the memory that the allocator gives out next."""
    torch.full((elements,), float("nan"), device=device)


def _error(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Largest error, in roundings to the type of ``got`` of the sum of the absolute values that were summed."""
    if not got.numel():
        return 0.0
    eps = torch.finfo(got.dtype).eps
    return float(((got.double() - want).abs() / (eps * (scale + 1e-30))).nan_to_num(1e9).max())


def check(device: torch.device, *, small: bool = False, shard: tuple[int, int] = (0, 1)) -> dict[str, float]:
    """Largest error of each kernel, in roundings; more than :data:`MOST_ERROR` is a bug.

    Args:
        device: a GPU; or the CPU, where Triton's interpreter runs the kernels.
        small: sizes for the interpreter.
        shard: (i, n), to check every n-th shape and type alone, from the i-th on: most of the time goes to compiling.
    """
    errors: dict[str, float] = {}

    def note(name: str, got: Tensor, want: Tensor, scale: Tensor) -> None:
        errors[name] = max(errors.get(name, 0.0), _error(got, want, scale))

    shapes = [(70, 40, 96)] if small else [(8, 256, 512), (1000, 384, 544), (4096, 1024, 1000), (513, 77, 130)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (t, n, k), dtype in itertools.islice(itertools.product(shapes, dtypes), *shard[:1], None, shard[1]):
        label = str(dtype).removeprefix("torch.")
        x, dy, w = (torch.randn(size, device=device).to(dtype) for size in ((t, k), (t, n), (n, k)))
        m = torch.rand(n, k, device=device) < 0.3
        x64, dy64, w64 = (value.double() for value in (x, dy, w))
        z = torch.where(m, w64, 0)
        g, g_scale = dy64.t() @ x64, dy64.abs().t() @ x64.abs()
        taps = torch.randn(n, 6, 3, 2, device=device).to(dtype)
        for grad in (w, taps, taps.contiguous(memory_format=torch.channels_last)):
            positions = torch.randint(-1, grad.numel(), (5000,), device=device)
            flat = torch.cat([grad.reshape(-1), grad.new_zeros(1)]).double()
            want = flat[positions]  # the last of it where they are negative
            _poison(device, 5000)
            note(f"gather_support {label}", triton_elementwise.gather_support(grad, positions), want, want.abs())
        masks = [m] if k % 32 else [m, reference.mask_words(m)[0]]
        for mask in masks:
            _poison(device, 4 * n * k + 2 * t * max(n, k))
            y = triton_matmul.masked_matmul(x, w, mask)
            note(f"masked_matmul {label}", y, x64 @ z.t(), x64.abs() @ z.abs().t())
            dx = triton_matmul.masked_matmul(dy, w, mask, input_grad=True)
            note(f"masked_matmul input_grad {label}", dx, dy64 @ z, dy64.abs() @ z.abs())
            for splits in (None, 1, 3):
                _poison(device, 4 * n * k)
                dw, ds, sink = triton_matmul.weight_grad(dy, x, w, mask, need_sink=True, splits=splits)
                again = triton_matmul.weight_grad(dy, x, w, mask, need_sink=True, splits=splits)[2]
                if not torch.equal(sink, again):
                    errors[f"weight_grad {label} differs between two runs"] = float("inf")
                note(f"weight_grad {label}", dw, g * m, g_scale)
                note(f"weight_grad scores {label}", ds, g * w64, g_scale * w64.abs())
                note(f"weight_grad sink {label}", sink, g, g_scale)
            for master in (w, w.float()):
                if not cuda_weight_grad.takes(dy, x, master, mask):
                    continue
                _poison(device, 4 * n * k)
                dw, ds, sink = cuda_weight_grad.weight_grad(dy, x, master, mask, need_sink=True)
                alone = [
                    cuda_weight_grad.weight_grad(dy, x, master, mask, **dict(zip(_NEEDS, only, strict=True)))
                    for only in itertools.permutations((True, False, False))
                ]
                for i, all_three in enumerate((dw, ds, sink)):
                    if not all(torch.equal(outs[i], all_three) for outs in alone if outs[i] is not None):
                        errors[f"CUDA weight_grad {label} differs between two runs"] = float("inf")
                note(f"CUDA weight_grad {label}", dw, g * m, g_scale)
                note(f"CUDA weight_grad scores {label}", ds, g * w64, g_scale * w64.abs())
                note(f"CUDA weight_grad sink {label}", sink, g, g_scale)
            out = torch.full_like(w, float("nan"))
            triton_elementwise.apply_mask([w], [mask], [out])
            note(f"apply_mask {label}", out, z, z.abs())
        for block in BLOCKS:
            tiles = torch.rand(-(-n // block), -(-k // block), device=device) < 0.5
            kept = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k].contiguous()
            blocks, zeroed = BlockLayout(block, occupied_tiles(kept, block), 0.5), torch.where(kept, w, 0)
            z64 = zeroed.double()
            forward, input_grad = x64 @ z64.t(), dy64 @ z64
            for name in ("CUDA", "Triton") if cuda_block_sparse.takes(block, x, zeroed) else ("Triton",):
                with _only_triton(name == "Triton"):
                    _poison(device, 2 * t * max(n, k))
                    y, dx = blocks.forward(x, zeroed), blocks.input_grad(dy, zeroed)
                note(f"{name} block{block} forward {label}", y, forward, x64.abs() @ z64.abs().t())
                note(f"{name} block{block} input_grad {label}", dx, input_grad, dy64.abs() @ z64.abs())
            grad = blocks.weight_grad(dy, x, kept, torch.float32)
            note(f"block{block} weight_grad {label}", grad, g * kept, g_scale)
        last = {"memory_format": torch.channels_last}
        geometry = ([2, 1], [1, 0], [1, 1], 2)
        x = torch.randn(2, 8, 9, 8, device=device).to(dtype).contiguous(**last)
        w = torch.randn(16, 4, 3, 3, device=device).to(dtype).contiguous(**last)
        m = (torch.rand(w.shape, device=device) < 0.5).contiguous(**last)
        z = torch.where(m, w, 0).double()
        want = F.conv2d(x.double(), z, None, *geometry)
        scale = F.conv2d(x.double().abs(), z.abs(), None, *geometry)
        note(f"masked_conv2d {label}", triton_conv2d.masked_conv2d(x, w, m, None, geometry), want, scale)
    small_layer = measurements.Convolution(2, 5, 4, 40, 33, stride=(2, 1), padding=(1, 0))
    convolutions = [
        measurements.Convolution(8, 14, 14, 256, 128),
        measurements.Convolution(5, 15, 13, 136, 72, stride=(2, 2)),
        measurements.Convolution(3, 9, 8, 64, 192, kernel=(3, 2), padding=(2, 0), dilation=(2, 1)),
    ]
    layers = [small_layer] if small else convolutions
    for layer, dtype in itertools.islice(itertools.product(layers, dtypes), *shard[:1], None, shard[1]):
        label = str(dtype).removeprefix("torch.")
        x, dy, w = layer.operands(dtype, device)
        if not triton_conv2d.takes(w, x, dy):
            continue
        for block in BLOCKS:
            tiles = torch.rand(-(-layer.n // block), -(-layer.k // block), *layer.kernel, device=device) < 0.5
            kept = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[: layer.n, : layer.k]
            kept = kept.contiguous(memory_format=torch.channels_last)
            zeroed = torch.where(kept, w, 0).contiguous(memory_format=torch.channels_last)
            blocks = BlockLayout(block, tiles, float(tiles.double().mean()))
            wanted = {name: _conv64(layer, name, x, dy, zeroed) for name in ("forward", "input_grad", "weight_grad")}
            runs = measurements.block_products(blocks, x, dy, zeroed, kept, layer.geometry)
            for name, run in runs.items():
                _poison(device, 2 * max(x.numel(), dy.numel()))
                want, scale = wanted[name]
                got = run()
                if not torch.equal(got, run()):
                    errors[f"block{block} conv2d {name} {label} differs between two runs"] = float("inf")
                note(f"block{block} conv2d {name} {label}", got, want * kept if name == "weight_grad" else want, scale)
    if not shard[0]:
        _check_steps(device, [(n, k) for _, n, k in shapes], note)
    return errors


@contextlib.contextmanager
def _only_triton(only: bool) -> Iterator[None]:
    """Products over tiles in Triton, where there is a CUDA kernel too."""
    takes = cuda_block_sparse.takes
    cuda_block_sparse.takes = (lambda *_: False) if only else takes
    try:
        yield
    finally:
        cuda_block_sparse.takes = takes


def _conv64(layer: measurements.Convolution, product: str, x: Tensor, dy: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A product of a convolution in float64, and the same of absolute values."""

    def compute(x: Tensor, dy: Tensor, w: Tensor) -> Tensor:
        if product == "forward":
            return F.conv2d(x, w, None, *layer.geometry)
        if product == "input_grad":
            return torch.nn.grad.conv2d_input(x.shape, w, dy, *layer.geometry)
        return torch.nn.grad.conv2d_weight(x, w.shape, dy, *layer.geometry)

    x, dy, w = (t.double() for t in (x, dy, w))
    return compute(x, dy, w), compute(x.abs(), dy.abs(), w.abs())


# Exact in float32, so that rounding them is no part of an error.
_SGD = {"lr": 0.125, "momentum": 0.875, "dampening": 0.25, "weight_decay": 0.5, "nesterov": False, "maximize": False}
_ADAMW = {"lr": 0.125, "betas": (0.875, 0.96875), "eps": 2.0**-20, "weight_decay": 0.5, "maximize": False}
_STEP = 3  # AdamW's number of the step


def _step64(value: Tensor, grad: Tensor, state: list[Tensor], settings: dict[str, Any], sign: int = -1) -> list[Tensor]:
    """New values and state in float64; given absolute values and the sign 1, what was summed for them."""
    lr, decay = settings["lr"], settings["weight_decay"]
    if "momentum" in settings:
        momentum = settings["momentum"] * state[0] + (1 - settings["dampening"]) * (grad + decay * value)
        return [value + sign * lr * momentum, momentum]
    beta1, beta2 = settings["betas"]
    average, square = beta1 * state[0] + (1 - beta1) * grad, beta2 * state[1] + (1 - beta2) * grad * grad
    root = (square / (1 - beta2**_STEP)).sqrt() + settings["eps"]
    return [value * (1 - lr * decay) + sign * lr / (1 - beta1**_STEP) * average / root, average, square]


def _check_steps(
    device: torch.device, shapes: list[tuple[int, int]], note: Callable[[str, Tensor, Tensor, Tensor], None]
) -> None:
    """The steps of SGD and AdamW, of weights alone and with scores from one gradient."""
    for name, settings in (("sgd_step", _SGD), ("adamw_step", _ADAMW)):
        of_scores = settings | {"lr": 0.25, "weight_decay": 0.25}
        for with_scores in (False, True):
            weights, scores, grads = ([torch.randn(size, device=device) for size in shapes] for _ in range(3))
            masks = [torch.rand(size, device=device) < 0.3 for size in shapes]
            copies = [torch.full_like(w, float("nan"), dtype=torch.bfloat16) for w in weights]
            moments = 1 if name == "sgd_step" else 2
            state, state2 = ([[torch.rand_like(w) for w in weights] for _ in range(moments)] for _ in range(2))
            wanted: list[tuple[str, Tensor, list[Tensor], list[Tensor]]] = []
            for i, (w, s, g, m) in enumerate(zip(weights, scores, grads, masks, strict=True)):
                w64, s64, g64 = (t.double() for t in (w, s, g))
                for what, value, grad, column, group in (
                    ("weights", w64, torch.where(m, g64, 0), state, settings),
                    ("scores", s64, w64 * g64, state2, of_scores),
                )[: 1 + with_scores]:
                    held = [moment[i].double() for moment in column]
                    tensors = [(weights if what == "weights" else scores)[i], *(moment[i] for moment in column)]
                    results = _step64(value, grad, held, group)
                    scales = _step64(value.abs(), grad.abs(), [h.abs() for h in held], group, 1)
                    wanted += [
                        (f"{name} {what if j == 0 else f'state of {what}'}", tensor, results[j], scales[j])
                        for j, tensor in enumerate(tensors)
                    ]
            steps = [torch.full((), float(_STEP), device=device)] * len(weights)
            stepped = triton_elementwise.Scores(scores, state2, of_scores, steps) if with_scores else None
            if name == "sgd_step":
                triton_elementwise.sgd_step(weights, grads, masks, copies, state[0], stepped, fresh=False, **settings)
            else:
                triton_elementwise.adamw_step(weights, grads, masks, copies, *state, steps, stepped, **settings)
            for what, got, want, scale in wanted:
                note(what, got, want, scale)
            for w, m, copy in zip(weights, masks, copies, strict=True):
                note(f"{name} copies", copy, torch.where(m, w, 0).double(), w.double().abs())


# -- speed -------------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, *, small: bool = False) -> tuple[float, float]:
    """Bytes a second that a copy moves, and FLOPs a second of a dense bfloat16 product; ``small`` sizes for a CPU."""
    source = torch.randn(1 << (20 if small else 27), device=device)
    target = torch.empty_like(source)
    bandwidth = 8 * source.numel() / measurements.seconds(lambda: target.copy_(source), device)
    rows, width = (256, 256) if small else (8192, WIDTH)
    a = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    b = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    return bandwidth, 2 * rows * width * width / measurements.seconds(lambda: a @ b, device)


def _graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a captured CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


SEARCHED = 0.05  # of the groups that a mask does not keep, those whose scores learn
SEARCHING = f"ours, scores in a search space of {SEARCHED:.0%}"
TOGETHER = "ours, one gradient of weights and scores"  # optim.share_gradient


def _steps(t: int, device: torch.device, master: torch.dtype, pattern: str) -> dict[str, Callable[[], Any]]:
    """One step of a linear layer with learned scores: output, and gradients of input, weight and scores.

    In :data:`TOGETHER` the last two are one, of which ``sb.optim`` makes both.

    Args:
        t: rows.
        device: a GPU, or the CPU to try it out.
        master: type of weights and scores; products are of bfloat16, under autocast.
        pattern: of the mask, of which a tenth is kept.
    """
    x = torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(WIDTH, WIDTH, device=device, dtype=master))
    learned, together, searching, frozen = (
        SparseMaskedLinear(WIDTH, WIDTH, False, device, master, sparsity=0.9, pattern=pattern) for _ in range(4)
    )
    for made in (learned, together, searching, frozen):
        made.weight = w
        made.set_mask(learned.mask.clone())
    m, s = learned.mask, torch.nn.Parameter(torch.zeros_like(w))
    learned.set_mask_scores(s)
    groups = torch.rand_like(frozen.pattern.group_scores(w.detach())) < SEARCHED
    searched = m | frozen.pattern.expand(groups, w.shape)
    searching.collect("search", searched.reshape(-1).nonzero().squeeze(1))
    for made in (learned, together, searching, frozen):
        if pattern != "unstructured" and (held := look(made.mask)) is not None:
            held.layout(64).settle()  # as in a training where the mask stays for some hundred steps
    dy = torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16)

    def layer(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        soft = m.to(w.dtype) + (s - s.detach())  # straight through
        return F.linear(x, w * soft)

    compiled, compiled_ours = torch.compile(layer, dynamic=False), torch.compile(learned, dynamic=False)
    forwards = {
        "dense": lambda: F.linear(x, w),
        "unfused": lambda: layer(x, w, s),
        "ours": lambda: learned(x),
        "ours, frozen mask": lambda: frozen(x),
    }
    if master == torch.float32:  # as scores are
        together.set_mask_scores(torch.nn.Parameter(torch.zeros_like(w)))
        optim.share_gradient(together)
        forwards[TOGETHER] = lambda: together(x)
    if pattern == "unstructured":
        forwards |= {
            "torch.compile": lambda: compiled(x, w, s),
            "ours, torch.compile": lambda: compiled_ours(x),
            "ours, the function": lambda: masked_linear(x, w, m, mask_scores=s),
        }
    else:
        forwards[SEARCHING] = lambda: searching(x)

    def step(forward: Callable[[], Tensor]) -> None:
        x.grad = w.grad = s.grad = None
        torch.autograd.graph.increment_version(w)  # as if an optimizer had changed it: copies are made again
        with torch.autocast(device.type, torch.bfloat16):
            y = forward()
        y.backward(dy)

    return {name: functools.partial(step, forward) for name, forward in forwards.items()}


def _whole_steps(t: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The step of :func:`_steps` with unstructured masks and float32 weights, and then SGD on weights and scores."""
    x = torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16)

    def made(scores: bool) -> SparseMaskedLinear:
        layer = SparseMaskedLinear(WIDTH, WIDTH, False, device, sparsity=0.9)
        if scores:
            layer.set_mask_scores(torch.nn.Parameter(torch.zeros_like(layer.weight)))
        return layer

    def by_hand(layer: SparseMaskedLinear, x: Tensor) -> Tensor:
        scores = layer.mask_scores
        return F.linear(x, layer.weight * (layer.mask.float() + (scores - scores.detach())))

    compiled = torch.compile(by_hand, dynamic=False)
    dense, unfused, unfused_compiled, ours, together = made(False), *(made(True) for _ in range(4))
    optim.share_gradient(together)
    variants = {
        "dense": (dense, lambda: F.linear(x, dense.weight), torch.optim.SGD),
        "unfused": (unfused, lambda: by_hand(unfused, x), torch.optim.SGD),
        "torch.compile": (unfused_compiled, lambda: compiled(unfused_compiled, x), torch.optim.SGD),
        "ours": (ours, lambda: ours(x), optim.SGD),
        "ours, one gradient": (together, lambda: together(x), optim.SGD),
    }

    def step(layer: SparseMaskedLinear, forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            y = forward()
        y.backward(dy)
        optimizer.step()

    runs = {}
    for name, (layer, forward, kind) in variants.items():
        optimizer = kind(layer.parameters(), lr=1e-5, momentum=0.9, fused=True)
        runs[name] = functools.partial(step, layer, forward, optimizer)
    return runs


def _time_steps(
    t: int, device: torch.device, master: torch.dtype, pattern: str, floor: float, rounds: int = 10
) -> list[dict[str, Any]]:
    """Rows of the variants of :func:`_steps`."""
    steps, label = _steps(t, device, master, pattern), str(master).removeprefix("torch.")
    left = {}  # of the products, where the mask drops tiles
    if pattern != "unstructured":
        left = {"ours": 0.4, TOGETHER: 0.4, "ours, frozen mask": 0.1, SEARCHING: (0.1 + 0.1 + 0.1 + 0.9 * SEARCHED) / 3}
    what = f"{'' if pattern == 'unstructured' else f'{pattern}, '}{label} weights, {t} tokens"
    rows = {name: {"what": f"step {name}, {what}", "floor": floor * left.get(name, 1.0)} for name in steps}
    return _in_turn(steps, rows, device, rounds, in_queue=pattern != "unstructured")


def _in_turn(
    steps: dict[str, Callable[[], Any]],
    rows: dict[str, dict[str, Any]],
    device: torch.device,
    rounds: int,
    *,
    in_queue: bool = False,
    captured: dict[str, Callable[[], Any]] | None = None,
) -> list[dict[str, Any]]:
    """Adds the times of the variants of a step, which run in turn so that the clock is the same for all.

    Eager and in a graph, of ``captured`` if these are others; ``in_queue``: and what the device takes, for steps whose
    launches take longer than they run.
    """
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, run in steps.items():
        try:
            run()
            runs[name, "eager"] = run
            if in_queue:
                runs[name, "device"] = run
            runs[name, "graph"] = _graph(run if captured is None else captured[name])
        except Exception as error:  # the other rows are still wanted
            rows[name]["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            if key[1] != "eager":
                taken[key].append(measurements.seconds(run, device, 3))
                continue
            torch.cuda.synchronize()
            begin = clock.perf_counter()
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            taken[key].append((clock.perf_counter() - begin) / 10)
    for (name, kind), times in taken.items():
        rows[name]["seconds" if kind == "eager" else kind] = statistics.median(times)
    return list(rows.values())


class Rows:
    """What was measured, in the file of results as soon as it is there: a call may be ended from outside."""

    def __init__(self, output: Path | None, first: dict[str, Any]) -> None:
        self.output, self.result = output, {"times": [first]}

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.result["times"] += rows
        if self.output:
            self.output.write_text(json.dumps(self.result, indent=1) + "\n")


def _lists(occupied: Tensor) -> None:
    """All that a step of a linear layer needs of a mask."""
    layout = BlockLayout(64, occupied, 0.1)
    for side in (False, True):
        layout.pairs(input_grad=side)
    assert layout.by_row


def steps(rows: Rows, device: torch.device, quick: bool, until: float, flops: float) -> None:
    """Rows of whole steps of a layer, of which ``seconds`` are eager; the arguments are those of :func:`time`."""
    cases: list[tuple[torch.dtype | None, int, str]]
    tokens = TOKENS[-1:] if quick else TOKENS[1::2] + TOKENS[::2]  # what matters most first
    cases = [(torch.float32, t, "unstructured") for t in tokens[:2]]
    cases += [(master, TOKENS[-1], "block:64x64") for master in (torch.float32, torch.bfloat16)]
    cases += [(None, t, "unstructured") for t in tokens[:2]]  # with an optimizer
    cases += [(torch.float32, t, "unstructured") for t in tokens[2:]]
    cases += [(torch.bfloat16, t, "unstructured") for t in tokens]
    cases += [] if quick else [(master, TOKENS[-2], "block:64x64") for master in (torch.float32, torch.bfloat16)]
    for master, t, pattern in cases:
        if clock.monotonic() > until:
            rows.add([{"what": f"{pattern}, {master} weights, {t} tokens", "error": "no time left"}])
            continue
        floor = 3 * 2 * t * WIDTH * WIDTH / flops
        if master is not None:
            rows.add(_time_steps(t, device, master, pattern, floor))
            continue
        runs, captured = (_whole_steps(t, device) for _ in range(2))  # no copies are kept of what a graph steps
        names = {name: {"what": f"step and optimizer {name}, {t} tokens", "floor": floor} for name in runs}
        rows.add(_in_turn(runs, names, device, 10, captured=captured))


def time(rows: Rows, device: torch.device, quick: bool, until: float, flops: float, bandwidth: float) -> None:
    """Rows of every kernel and baseline: ``what``; ``seconds``, of launches in the queue, ``graph``, and ``floor``.

    Args:
        rows: where they go.
        quick: few sizes.
        until: by the monotonic clock, when the rest is left out.
        flops, bandwidth: a second, of :func:`ceilings`.
    """

    def note(what: str, run: Callable[[], Any], floor: float, graph: bool = True) -> None:
        row: dict[str, Any] = {"what": what, "floor": floor}
        for kind, prepare in (("seconds", lambda: run), ("graph", lambda: _graph(run)))[: 1 + graph]:
            if clock.monotonic() > until:
                row[f"{kind}_error"] = "no time left"
                continue
            try:
                row[kind] = measurements.seconds(prepare(), device)
            except Exception as error:  # the other rows are still wanted
                row[f"{kind}_error"] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{what}, {kind}: {row[f'{kind}_error']}", flush=True)
        rows.add([row])

    for t in TOKENS[-1:] if quick else TOKENS:  # would a gradient that the library writes in float32 save the pass?
        x, dy = (torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
        what, floor = f"dense weight gradient, {t} tokens", 2 * t * WIDTH * WIDTH / flops
        note(what, lambda x=x, dy=dy: torch.mm(dy.t(), x), floor)
        note(f"{what}, then float32", lambda x=x, dy=dy: torch.mm(dy.t(), x).float(), floor)
        note(f"{what}, in float32", lambda x=x, dy=dy: torch.mm(dy.t(), x, out_dtype=torch.float32), floor)
    for t, block in itertools.product(TOKENS[-1:] if quick else TOKENS, BLOCKS):
        x, dy, w = (torch.randn(size, WIDTH, device=device).bfloat16() for size in (t, t, WIDTH))
        note(f"dense forward, {t} tokens", lambda x=x, w=w: x @ w.t(), 2 * t * WIDTH * WIDTH / flops)
        for sparsity in SPARSITIES[2:4] if quick else SPARSITIES:
            side = WIDTH // block
            kept = round((1 - sparsity) * side * side)
            tiles = torch.zeros(side * side, dtype=torch.bool, device=device)
            tiles[torch.randperm(side * side, device=device)[:kept]] = True
            blocks = BlockLayout(block, tiles.view(side, side), 1 - sparsity)
            blocks.settle()
            mask = tiles.view(side, side).repeat_interleave(block, 0).repeat_interleave(block, 1)
            floor = max(2 * t * WIDTH * WIDTH * (1 - sparsity) / flops, 4 * t * WIDTH / bandwidth)
            for product, run in measurements.block_products(blocks, x, dy, w, mask).items():
                note(f"block{block} {product}, sparsity {sparsity}, {t} tokens", run, floor)
    for layer, sparsity in itertools.product(CONVOLUTIONS, BLOCK_SPARSITIES[2:4] if quick else BLOCK_SPARSITIES):
        x, dy, w = layer.operands(torch.bfloat16, device)
        work, moved = 2 * dy.numel() * w[0].numel(), 2 * (x.numel() + dy.numel())
        name = f"{layer.n} channels, {layer.height}x{layer.width}, batch {layer.images}"
        if sparsity == (BLOCK_SPARSITIES[2] if quick else BLOCK_SPARSITIES[0]):
            whole = torch.ones_like(w, dtype=torch.bool)
            for product, runs in measurements.products(x, dy, w, whole, layer.geometry).items():
                floor = max(work / flops, moved / bandwidth)
                what = f"{product} and m*G, theta*G" if product == "weight_grad" else product
                note(f"conv3x3 dense cuDNN {what}, {name}", runs["dense"], floor)
        for block in BLOCKS:
            shape = -(-layer.n // block), -(-layer.k // block), *layer.kernel
            tiles = torch.zeros(math.prod(shape), dtype=torch.bool, device=device)
            tiles[torch.randperm(len(tiles), device=device)[: round((1 - sparsity) * len(tiles))]] = True
            tiles = tiles.view(shape)
            blocks = BlockLayout(block, tiles, float(tiles.double().mean()))
            mask = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)
            mask = mask.contiguous(memory_format=torch.channels_last)
            z = (w * mask).contiguous(memory_format=torch.channels_last)
            floor = max(work * blocks.density / flops, moved / bandwidth)
            products = measurements.block_products(blocks, x, dy, z, mask, layer.geometry)
            for product, run in products.items():
                note(f"conv3x3 block{block} {product}, sparsity {sparsity}, {name}", run, floor)
    layers = [torch.randn(WIDTH, WIDTH, device=device) for _ in range(4)]
    masks = [torch.rand(WIDTH, WIDTH, device=device) < 0.1 for _ in layers]
    note("which tiles a mask holds", lambda: occupied_tiles(masks[0], 64), WIDTH * WIDTH / bandwidth)
    held = torch.rand(WIDTH // 64, WIDTH // 64, device=device) < 0.1
    note("lists of its tiles, and of pairs of both sides", lambda: _lists(held), 0.0)
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in layers]
    grads = [torch.randn_like(w) for w in layers]
    buffers = [torch.zeros_like(w) for w in layers]
    settings = {"lr": 0.0, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    size = sum(w.numel() for w in layers)
    note("apply_mask", lambda: triton_elementwise.apply_mask(layers, masks, copies), 7 * size / bandwidth)
    outs = [[torch.empty_like(w) for w in layers] for _ in range(2)]
    split = triton_elementwise.split_gradient
    note("split_gradient", lambda: split(grads, layers, masks, *outs, None), 17 * size / bandwidth)
    step = triton_elementwise.sgd_step
    run = lambda: step(layers, grads, masks, copies, buffers, fresh=False, **settings)  # noqa: E731
    note("sgd_step", run, 23 * size / bandwidth)
    scores, moments = ([torch.zeros_like(w) for w in layers] for _ in range(2))
    of_scores = triton_elementwise.Scores(scores, [moments], settings)
    run = lambda: step(layers, grads, masks, copies, buffers, of_scores, fresh=False, **settings)  # noqa: E731
    note("sgd_step of weights and scores from one gradient", run, 39 * size / bandwidth)
    by_torch = torch.optim.SGD(scores, **settings, fused=True)
    for tensor, grad, buffer in zip(scores, outs[1], moments, strict=True):
        tensor.grad, by_torch.state[tensor]["momentum_buffer"] = grad, buffer

    def apart() -> None:
        split(grads, layers, masks, *outs, None)
        step(layers, outs[0], masks, copies, buffers, fresh=False, **settings)
        by_torch.step()

    note("split_gradient, sgd_step, torch's SGD on the scores", apart, 60 * size / bandwidth, graph=False)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | us | device | in a graph | floor |", "|---|---|---|---|---|"]
    for row in rows:
        times = [f"{row[kind] * 1e6:.1f}" if kind in row else "-" for kind in ("seconds", "device", "graph", "floor")]
        lines.append(f"| {row['what']} | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "steps", "time", "tune"))
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--small", action="store_true", help="check: one small shape")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="check: the I-th of N parts")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds, after which no row is begun")
    parser.add_argument("--quick", action="store_true", help="few sizes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # the library at its best
    wrong: dict[str, float] = {}
    result: dict[str, Any] = {}
    if options.what == "check":
        i, n = map(int, options.shard.split("/"))
        errors = check(device, small=options.small, shard=(i, n))
        wrong = {name: error for name, error in errors.items() if error > MOST_ERROR}
        result = {"errors": errors, "wrong": wrong}
        print(f"{len(errors)} checks, {len(wrong)} failed {wrong or ''}")
    elif options.what in ("steps", "time"):
        until = clock.monotonic() + options.budget
        bandwidth, flops = ceilings(device)
        rows = Rows(options.output, {"what": "ceilings", "bytes_per_s": bandwidth, "flops_per_s": flops})
        if options.what == "steps":
            steps(rows, device, options.quick, until, flops)
        else:
            time(rows, device, options.quick, until, flops, bandwidth)
        result = rows.result
        print(table(rows.result["times"][1:]))
    else:
        matrices = [(t, WIDTH, WIDTH) for t in (TOKENS[1::2] if options.quick else TOKENS)]
        layers = [*matrices, *(() if options.quick else CONVOLUTIONS)]
        result = measurements.measure(layers, torch.bfloat16, device)
        print(f"{len(result)} products measured; {measurements.path()}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
