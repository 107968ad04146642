"""Times of products on a GPU, measured once on a machine and kept in a file: what :mod:`.dispatch` chooses by.

Nothing is measured on the way, since near the break-even one run would go one way and the next another. ``measure``
does it when somebody asks (``costs.tune_layers``, ``sparsebilevel bench --tune``), and a process reads the file once.
It lies in ``~/.cache/sparsebilevel/gpu.json``, or where ``SPARSEBILEVEL_MEASUREMENTS`` says.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .gpu import on_device

if TYPE_CHECKING:
    from .block_sparse import BlockLayout, Geometry

DENSITIES = (0.125, 0.5)
"""Fractions of tiles at which the products of blocks are timed; between and beyond, time is linear in it."""


def path() -> Path:
    """The file."""
    given = os.environ.get("SPARSEBILEVEL_MEASUREMENTS")
    if given:
        return Path(given)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/.cache"
    )  # which raises for nobody without a home
    return Path(folder) / "sparsebilevel/gpu.json"


def device_name(device: torch.device) -> str:
    """What a device is called in the file, with the versions that its times hang on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}"


class Window(NamedTuple):
    """What a convolution looks at that is no product of matrices."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        pairs = zip(("kernel", "stride", "dilation"), self[:3], strict=True)
        return " ".join([*(f"{name} {y}x{x}" for name, (y, x) in pairs), f"groups {self.groups}"])


def key(product: str, dtype: torch.dtype, rows: int, n: int, k: int, window: Window | None = None) -> str:
    """A product in the file: of ``rows``, to the next power of two, with a weight ``[n, k]``, or such a convolution."""
    name = f"{product} {str(dtype).removeprefix('torch.')} {1 << max(rows - 1, 0).bit_length()} {n} {k}"
    return name if window is None else f"{name} {window}"


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


def times(
    device: torch.device, product: str, dtype: torch.dtype, rows: int, n: int, k: int, window: Window | None = None
) -> dict[str, Any]:
    """Seconds by backend (``dense``, ``fused``; of ``block128`` and so on a list, at :data:`DENSITIES`), or nothing."""
    return of_device(device).get(key(product, dtype, rows, n, k, window), {})


def of_device(device: torch.device) -> dict[str, dict[str, Any]]:
    """All of its times by product."""
    return _load(path()).get(device_name(device), {})


def at_density(measured: list[float], density: float) -> float:
    """Seconds at a density between or beyond those measured."""
    (d0, d1), (t0, t1) = DENSITIES, measured
    return max(t0 + (density - d0) * (t1 - t0) / (d1 - d0), 0.0)


def save(device: torch.device, found: dict[str, dict[str, Any]]) -> None:
    """Add times to the file, and use them from now on."""
    global _saved
    file = path()
    _load.cache_clear()  # another process may have written since
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


def products(
    x: Tensor, dy: Tensor, w: Tensor, mask: Tensor, geometry: Geometry | None = None
) -> dict[str, dict[str, Run]]:
    """Calls that compute each product of a layer, by the dense library and by the fused kernel.

    Args:
        x, dy, w, mask: matrices; or with a ``geometry`` maps and weight of a convolution, all in channels_last.
        geometry: stride, padding, dilation and groups.
    """
    from . import triton_conv2d, triton_matmul
    from .gpu_products import fused_weight_grad
    from .split_gradient import split_gradient

    if geometry is None:
        masked, master = triton_matmul.masked_matmul, w.float()  # as under autocast
        return {
            "forward": {"dense": lambda: x @ w.t(), "fused": functools.partial(masked, x, w, mask)},
            "input_grad": {"dense": lambda: dy @ w, "fused": functools.partial(masked, dy, w, mask, input_grad=True)},
            "weight_grad": {
                "dense": lambda: split_gradient([dy.t() @ x], [master], [mask]),
                "fused": functools.partial(fused_weight_grad, dy, x, master, mask),
            },
        }
    stride, padding, dilation, groups = geometry
    options = None, stride, padding, dilation, False, [0, 0], groups
    backward = functools.partial(torch.ops.aten.convolution_backward, dy, x, w, *options)
    return {
        "forward": {
            "dense": functools.partial(torch.ops.aten.convolution, x, w, *options),
            "fused": functools.partial(triton_conv2d.masked_conv2d, x, w, mask, None, geometry),
        },
        "input_grad": {
            "dense": functools.partial(backward, [True, False, False]),
            "fused": functools.partial(triton_conv2d.input_grad, dy, x, w, mask, geometry),
        },
        "weight_grad": {
            "dense": lambda: split_gradient([backward([False, True, False])[1]], [w], [mask]),
            "fused": functools.partial(triton_conv2d.weight_grad, dy, x, w, mask, geometry),
        },
    }


def block_products(
    blocks: BlockLayout, x: Tensor, dy: Tensor, w: Tensor, mask: Tensor, geometry: Geometry | None = None
) -> dict[str, Run]:
    """The same over the tiles of a layout."""
    if geometry is None:
        return {
            "forward": functools.partial(blocks.forward, x, w),
            "input_grad": functools.partial(blocks.input_grad, dy, w),
            "weight_grad": functools.partial(blocks.weight_grad, dy, x, mask, w.dtype),
        }
    return {
        "forward": functools.partial(blocks.conv2d, x, w, None, geometry),
        "input_grad": functools.partial(blocks.conv2d_input_grad, dy, w, x.shape, geometry),
        "weight_grad": functools.partial(blocks.conv2d_weight_grad, dy, x, mask, w.shape[2:], w.dtype, geometry),
    }


class Convolution(NamedTuple):
    """A layer that is timed: maps ``[images, k, height, width]``, weight ``[n, k, *kernel]``."""

    images: int
    height: int
    width: int
    n: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self) -> Geometry:
        return self.stride, self.padding, self.dilation, 1

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.dilation)

    def operands(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Maps, gradient of the output and weight, in channels_last."""
        x = torch.randn(self.images, self.k, self.height, self.width, device=device)
        w = torch.randn(self.n, self.k, *self.kernel, device=device)
        dy = torch.randn_like(torch.nn.functional.conv2d(x, w, None, *self.geometry))
        x, dy, w = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy, w))
        return x, dy, w


def measure(
    shapes: Iterable[tuple[int, int, int] | Convolution],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 20,
    *,
    tiles: bool = True,
) -> dict[str, dict[str, Any]]:
    """Time every backend on products of ``rows`` with weights ``[n, k]``, for each (rows, n, k); and save the times.

    Of a :class:`Convolution` too. Random values: zeros would let the clock go faster. Without ``tiles`` only what masks
    that drop none of them could take.
    """
    from .block_sparse import BLOCKS, BlockLayout

    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        geometry: Geometry | None = None
        window: Window | None = None
        if isinstance(shape, Convolution):
            x, dy, w = shape.operands(dtype, device)
            rows, n, k = x.numel() // shape.k, shape.n, shape.k
            geometry, window = shape.geometry, shape.window
        else:
            rows, n, k = shape
            x, dy, w = (torch.randn(size, device=device).to(dtype) for size in ((rows, k), (rows, n), (n, k)))
        mask = torch.rand_like(w, dtype=torch.float32) < 0.5
        runs = products(x, dy, w, mask, geometry)
        entries = {name: found.setdefault(key(name, dtype, rows, n, k, window), {}) for name in runs}
        for product, by_backend in runs.items():
            for name, run in by_backend.items():
                entries[product][name] = seconds(run, device, repeats)
        for block in BLOCKS if tiles else ():
            drawn = torch.rand(-(-n // block), -(-k // block), *w.shape[2:], device=device)
            for density in DENSITIES:
                blocks = BlockLayout(block, drawn <= drawn.flatten().quantile(density), density)
                for product, run in block_products(blocks, x, dy, w, mask, geometry).items():
                    entries[product].setdefault(f"block{block}", []).append(seconds(run, device, repeats))
    save(device, found)
    return found
