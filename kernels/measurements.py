"""Times of products on a GPU, measured once on a machine and kept in a file: what :mod:`.dispatch` chooses by.

Nothing is measured on the way, since near the break-even one run would go one way and the next another. ``measure``
does it when somebody asks (``benchmarks/gpu_kernels.py --tune``), and a process reads the file once. It lies in
``~/.cache/sparsebilevel/gpu.json``, or where ``SPARSEBILEVEL_MEASUREMENTS`` says.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .gpu import on_device

DENSITIES = (0.125, 0.5)
"""Fractions of tiles at which the products of blocks are timed; between and beyond, time is linear in it."""


def path() -> Path:
    """The file."""
    given = os.environ.get("SPARSEBILEVEL_MEASUREMENTS")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparsebilevel/gpu.json"


def device_name(device: torch.device) -> str:
    """What a device is called in the file, with the versions that its times hang on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}"


def key(product: str, dtype: torch.dtype, rows: int, n: int, k: int) -> str:
    """A product in the file: of ``rows``, to the next power of two, with a weight ``[n, k]``."""
    return f"{product} {str(dtype).removeprefix('torch.')} {1 << max(rows - 1, 0).bit_length()} {n} {k}"


@functools.lru_cache(maxsize=1)
def _load(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


_saved = 0


def generation() -> int:
    """Changes when there are new times."""
    return _saved


def times(device: torch.device, product: str, dtype: torch.dtype, rows: int, n: int, k: int) -> dict[str, Any]:
    """Seconds by backend (``dense``, ``fused``; of ``block128`` and so on a list, at :data:`DENSITIES`), or nothing."""
    return _load(path()).get(device_name(device), {}).get(key(product, dtype, rows, n, k), {})


def at_density(measured: list[float], density: float) -> float:
    """Seconds at a density between or beyond those measured."""
    (d0, d1), (t0, t1) = DENSITIES, measured
    return max(t0 + (density - d0) * (t1 - t0) / (d1 - d0), 0.0)


def save(device: torch.device, found: dict[str, dict[str, Any]]) -> None:
    """Add times to the file, and use them from now on."""
    global _saved
    file = path()
    kept = _load(file)
    merged = kept | {device_name(device): kept.get(device_name(device), {}) | found}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(merged, indent=1))
    partial.replace(file)
    _load.cache_clear()
    _saved += 1


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call, after some to warm up; on a GPU that of the device alone, with nothing in its L2 cache."""
    run()
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    with on_device(device):
        torch.cuda.synchronize()
        # For so long the device waits before a call, of which all launches are then in its queue; at 2 GHz.
        cycles = int(2e9 * (50e-6 + 1.5 * _host_seconds(run)))
        flush = torch.empty(1 << 28, dtype=torch.int8, device=device)  # larger than any L2 cache
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            torch.cuda._sleep(cycles)
            flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _host_seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


Run = Callable[[], Any]


def products(x: Tensor, dy: Tensor, w: Tensor, mask: Tensor) -> dict[str, dict[str, Run]]:
    """Calls that compute each product of a layer, by the dense library and by the fused kernel."""
    from . import triton_matmul
    from .split_gradient import split_gradient

    masked = triton_matmul.masked_matmul
    return {
        "forward": {"dense": lambda: x @ w.t(), "fused": functools.partial(masked, x, w, mask)},
        "input_grad": {"dense": lambda: dy @ w, "fused": functools.partial(masked, dy, w, mask, input_grad=True)},
        "weight_grad": {
            "dense": lambda: split_gradient([dy.t() @ x], [w], [mask]),
            "fused": functools.partial(triton_matmul.weight_grad, dy, x, w, mask),
        },
    }


def block_products(blocks: Any, x: Tensor, dy: Tensor, w: Tensor, mask: Tensor) -> dict[str, Run]:
    """The same over the tiles of a ``BlockLayout``."""
    return {
        "forward": functools.partial(blocks.forward, x, w),
        "input_grad": functools.partial(blocks.input_grad, dy, w),
        "weight_grad": functools.partial(blocks.weight_grad, dy, x, mask, w.dtype),
    }


def measure(
    shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device, repeats: int = 20
) -> dict[str, dict[str, Any]]:
    """Time every backend on products of ``rows`` with weights ``[n, k]``, for each (rows, n, k); and save the times.

    Random values: zeros would let the clock go faster.
    """
    from .block_sparse import BLOCKS, BlockLayout

    found: dict[str, dict[str, Any]] = {}
    for rows, n, k in shapes:
        x, dy, w = (torch.randn(size, device=device).to(dtype) for size in ((rows, k), (rows, n), (n, k)))
        mask = torch.rand(n, k, device=device) < 0.5
        entries = {name: found.setdefault(key(name, dtype, rows, n, k), {}) for name in products(x, dy, w, mask)}
        for product, runs in products(x, dy, w, mask).items():
            for name, run in runs.items():
                entries[product][name] = seconds(run, device, repeats)
        for block in BLOCKS:
            tiles = torch.rand(-(-n // block), -(-k // block), device=device)
            for density in DENSITIES:
                blocks = BlockLayout(block, tiles <= tiles.flatten().quantile(density), density)
                for product, run in block_products(blocks, x, dy, w, mask).items():
                    entries[product].setdefault(f"block{block}", []).append(seconds(run, device, repeats))
    save(device, found)
    return found
