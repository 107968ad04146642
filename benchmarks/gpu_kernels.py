"""Checks the Triton kernels on a GPU, and times them beside dense layers, plain masked layers and torch.compile.

    python benchmarks/gpu_kernels.py [--output FILE] [--quick] [--tune]

``check`` compares every kernel with float64 on fresh random numbers, in memory that held NaN before; ``time`` takes
medians of CUDA events with the L2 cache flushed, of launches as they are and of a captured graph. Beside each time
stands its floor: what must be read and written at the bandwidth of a copy, or the multiplications at the speed of a
dense product, both measured here. ``--tune`` writes the table that layers choose by. Results go to
``benchmarks/results/gpu_kernels.json``, and a table to standard output. Nobody has run this on a GPU yet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebilevel.kernels import (
    make_grad_sink,
    masked_linear,
    measurements,
    reference,
    triton_conv2d,
    triton_elementwise,
    triton_matmul,
)
from sparsebilevel.kernels.block_sparse import BLOCKS, BlockLayout, occupied_tiles

TOKENS = (512, 1024, 2048, 8192)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
WIDTH = 4096


# -- correctness -------------------------------------------------------------------------------------------------------


def _poison(device: torch.device, elements: int) -> None:
    """Leave NaN in the memory that the allocator gives out next."""
    torch.full((elements,), float("nan"), device=device)


def _error(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Largest error, in roundings to the type of ``got`` of the sum of the absolute values that were summed."""
    if not got.numel():
        return 0.0
    eps = torch.finfo(got.dtype).eps
    return float(((got.double() - want).abs() / (eps * (scale + 1e-30))).nan_to_num(1e9).max())


def check(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """Largest error of each kernel, in roundings; more than 4 is a bug.

    Args:
        device: a GPU; or the CPU, where Triton's interpreter runs the kernels.
        small: sizes for the interpreter.
    """
    errors: dict[str, float] = {}

    def note(name: str, got: Tensor, want: Tensor, scale: Tensor) -> None:
        errors[name] = max(errors.get(name, 0.0), _error(got, want, scale))

    shapes = [(70, 40, 96)] if small else [(8, 256, 512), (1000, 384, 544), (4096, 1024, 1000), (513, 77, 130)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for (t, n, k), dtype in itertools.product(shapes, dtypes):
        label = str(dtype).removeprefix("torch.")
        x, dy, w = (torch.randn(size, device=device).to(dtype) for size in ((t, k), (t, n), (n, k)))
        m = torch.rand(n, k, device=device) < 0.3
        x64, dy64, w64 = (value.double() for value in (x, dy, w))
        z = torch.where(m, w64, 0)
        g, g_scale = dy64.t() @ x64, dy64.abs().t() @ x64.abs()
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
            out = torch.full_like(w, float("nan"))
            triton_elementwise.apply_mask([w], [mask], [out])
            note(f"apply_mask {label}", out, z, z.abs())
        for block in BLOCKS:
            tiles = torch.rand(-(-n // block), -(-k // block), device=device) < 0.5
            kept = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k].contiguous()
            blocks, zeroed = BlockLayout(block, occupied_tiles(kept, block), 0.5), torch.where(kept, w, 0)
            z64 = zeroed.double()
            _poison(device, 2 * t * max(n, k))
            note(f"block{block} forward {label}", blocks.forward(x, zeroed), x64 @ z64.t(), x64.abs() @ z64.abs().t())
            note(f"block{block} input_grad {label}", blocks.input_grad(dy, zeroed), dy64 @ z64, dy64.abs() @ z64.abs())
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
    _check_steps(device, [(n, k) for _, n, k in shapes], note)
    return errors


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


def _graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a captured CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _steps(t: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """One step of a linear layer with learned scores: output, and gradients of input, weight and scores."""
    x = torch.randn(t, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(WIDTH, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
    s, m = torch.zeros_like(w, requires_grad=True), torch.rand(WIDTH, WIDTH, device=device) < 0.1
    dy = torch.randn_like(x)
    sink = make_grad_sink(w)

    def clear() -> None:
        x.grad = w.grad = s.grad = sink.grad = None

    def dense() -> None:
        clear()
        F.linear(x, w).backward(dy)

    def layer(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        soft = m.to(w.dtype) + (s - s.detach())  # straight through
        return F.linear(x, w * soft)

    compiled = torch.compile(layer)

    def unfused() -> None:
        clear()
        layer(x, w, s).backward(dy)

    def with_compile() -> None:
        clear()
        compiled(x, w, s).backward(dy)

    def ours() -> None:
        clear()
        masked_linear(x, w, m, mask_scores=s).backward(dy)

    def frozen() -> None:
        clear()
        masked_linear(x, w, m).backward(dy)

    return {
        "dense": dense,
        "unfused": unfused,
        "torch.compile": with_compile,
        "ours": ours,
        "ours, frozen mask": frozen,
    }


def time(device: torch.device, *, quick: bool = False) -> list[dict[str, Any]]:
    """Seconds of every kernel and baseline: rows with ``what``, ``seconds``, ``graph``, and ``floor``."""
    rows: list[dict[str, Any]] = []
    source = torch.randn(1 << 27, device=device)
    target = torch.empty_like(source)
    bandwidth = 8 * source.numel() / measurements.seconds(lambda: target.copy_(source), device)
    a = torch.randn(8192, WIDTH, device=device, dtype=torch.bfloat16)
    b = torch.randn(WIDTH, WIDTH, device=device, dtype=torch.bfloat16)
    flops = 2 * 8192 * WIDTH * WIDTH / measurements.seconds(lambda: a @ b, device)
    rows.append({"what": "ceilings", "bytes_per_s": bandwidth, "flops_per_s": flops})

    def note(what: str, run: Callable[[], Any], floor: float, graph: bool = True) -> None:
        row: dict[str, Any] = {"what": what, "floor": floor, "seconds": measurements.seconds(run, device)}
        if graph:
            try:
                row["graph"] = measurements.seconds(_graph(run), device)
            except RuntimeError as error:
                row["graph_error"] = str(error)[:200]
        rows.append(row)

    for t in TOKENS[-1:] if quick else TOKENS:
        for name, run in _steps(t, device).items():
            note(f"step {name}, {t} tokens", run, 3 * 2 * t * WIDTH * WIDTH / flops, graph=False)
    for t, block in itertools.product(TOKENS[-1:] if quick else TOKENS, BLOCKS):
        x, dy, w = (torch.randn(size, WIDTH, device=device).bfloat16() for size in (t, t, WIDTH))
        note(f"dense forward, {t} tokens", lambda x=x, w=w: x @ w.t(), 2 * t * WIDTH * WIDTH / flops)
        for sparsity in SPARSITIES[2:4] if quick else SPARSITIES:
            side = WIDTH // block
            kept = round((1 - sparsity) * side * side)
            tiles = torch.zeros(side * side, dtype=torch.bool, device=device)
            tiles[torch.randperm(side * side, device=device)[:kept]] = True
            blocks = BlockLayout(block, tiles.view(side, side), 1 - sparsity)
            mask = tiles.view(side, side).repeat_interleave(block, 0).repeat_interleave(block, 1)
            floor = max(2 * t * WIDTH * WIDTH * (1 - sparsity) / flops, 4 * t * WIDTH / bandwidth)
            for product, run in measurements.block_products(blocks, x, dy, w, mask).items():
                note(f"block{block} {product}, sparsity {sparsity}, {t} tokens", run, floor)
    layers = [torch.randn(WIDTH, WIDTH, device=device) for _ in range(4)]
    masks = [torch.rand(WIDTH, WIDTH, device=device) < 0.1 for _ in layers]
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
    scores, held = ([torch.zeros_like(w) for w in layers] for _ in range(2))
    of_scores = triton_elementwise.Scores(scores, [held], settings)
    run = lambda: step(layers, grads, masks, copies, buffers, of_scores, fresh=False, **settings)  # noqa: E731
    note("sgd_step of weights and scores from one gradient", run, 39 * size / bandwidth)
    by_torch = torch.optim.SGD(scores, **settings, fused=True)
    for tensor, grad, buffer in zip(scores, outs[1], held, strict=True):
        tensor.grad, by_torch.state[tensor]["momentum_buffer"] = grad, buffer

    def apart() -> None:
        split(grads, layers, masks, *outs, None)
        step(layers, outs[0], masks, copies, buffers, fresh=False, **settings)
        by_torch.step()

    note("split_gradient, sgd_step, torch's SGD on the scores", apart, 60 * size / bandwidth, graph=False)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).parent / "results/gpu_kernels.json"
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--tune", action="store_true", help="also write the table that layers choose by")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    device = torch.device("cuda")
    errors = check(device)
    wrong = {name: error for name, error in errors.items() if error > 4}
    rows = time(device, quick=options.quick)
    if options.tune:
        shapes = [(t, WIDTH, WIDTH) for t in TOKENS]
        measurements.measure(shapes, torch.bfloat16, device)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"about": about, "errors": errors, "times": rows}, indent=1))
    for row in rows:
        if "seconds" in row:
            graph = f"{row['graph'] * 1e6:9.1f}" if "graph" in row else "        -"
            print(
                f"{row['what']:60} {row['seconds'] * 1e6:9.1f} us {graph} us graph {row['floor'] * 1e6:9.1f} us floor"
            )
    print(f"{len(errors)} checks, {len(wrong)} failed {wrong or ''}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
