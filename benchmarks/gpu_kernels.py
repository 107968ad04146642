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
import math
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
    small_layer = measurements.Convolution(2, 5, 4, 40, 33, stride=(2, 1), padding=(1, 0))
    convolutions = [
        measurements.Convolution(8, 14, 14, 256, 128),
        measurements.Convolution(5, 15, 13, 136, 72, stride=(2, 2)),
        measurements.Convolution(3, 9, 8, 64, 192, kernel=(3, 2), padding=(2, 0), dilation=(2, 1)),
    ]
    for layer, dtype in itertools.product([small_layer] if small else convolutions, dtypes):
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
    return errors


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
    torch.backends.cudnn.benchmark = True  # the library at its best
    errors = check(device)
    wrong = {name: error for name, error in errors.items() if error > 4}
    rows = time(device, quick=options.quick)
    if options.tune:
        matrices = [(t, WIDTH, WIDTH) for t in TOKENS]
        measurements.measure([*matrices, *CONVOLUTIONS], torch.bfloat16, device)
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
