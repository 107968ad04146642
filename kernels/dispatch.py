"""Which kernel runs a pass of a masked op, and why: the only place that knows speeds.

The choice is a rule, not a measurement made on the way: near the break-even a measurement would fall one way in one run
and the other way in the next, and runs that should be equal bit for bit would not be.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_block_sparse, gpu, measurements, native
from .gradient import Needs
from .measurements import Window
from .plans import Support, active_support

BACKENDS = ("dense", "sparse", "fused", "block", "slice")
PASSES = ("forward", "input_grad", "weight_grad")
"""The products of a layer. Each has a choice of its own: one may want the dense library and another not."""


class _Cost(NamedTuple):
    """What a sparse CPU kernel pays at an output pixel, in multiply-adds of the dense library."""

    non_zero: float
    channel: float  # to move a pixel of one channel into its layout, or out of it
    weight: float = 0.0  # for each weight, kept or not, but for a whole call: to find the plan, to fill in a gradient


# Least squares over what the passes of the layers in benchmarks/bench_masked_conv2d.py, bench_masked_linear.py and of
# smaller ones take, sparse and dense, at 50 to 95 %: a fit of 1 = ratio * (non_zero * non_zeros + channel * channels) /
# weights, for ratios between 0.5 and 3.5 (what is far from the break-even need not fit). For 1 to 12 images the
# same fits times the lanes that a pixel then takes, and with the costs of a call (seen in 512 channels on 7x7 maps).
_COSTS = {
    "masked_conv2d": {
        "forward": _Cost(1.6, 16.0, 5.0),
        "input_grad": _Cost(1.6, 5.0, 5.0),
        "weight_grad": _Cost(1.6, 18.0, 15.0),
    },
    "masked_linear": {
        "forward": _Cost(1.7, 35.0),
        "input_grad": _Cost(2.0, 26.0),
        "weight_grad": _Cost(2.0, 37.0),
    },
}
# How much faster the dense library is with bfloat16 operands than with float32 ones, where the processor multiplies
# them itself. Ours computes in float32 whatever is stored; without such instructions so does the dense library.
_DENSE_BFLOAT16 = 2.0
_SPARSE_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16
# Elements of a weight from which on oneDNN multiplies faster than the BLAS that F.linear calls: 1.2 to 1.8 times on an
# AMD processor (MKL is slow there). Smaller ones its calls' own cost slows down.
_ONEDNN_LINEAR = 1 << 18


class Backend(NamedTuple):
    """A choice and the reason for it, as layers and the command line show it."""

    name: str
    reason: str
    estimate: float | None = None
    """Time of the dense library over that of the sparse kernel, as the rule behind the choice has it."""


class Structure(NamedTuple):
    """What a mask drops as a whole, as the choice on a GPU takes it."""

    tiles: tuple[tuple[int, float], ...] = ()
    """Sides of tiles, and the fraction of each that is kept; those for which the product has a kernel."""
    slices: float = 1.0
    """Fraction of the products that is left when outputs and inputs dropped as a whole are cut out."""


# Where nothing was measured: most tiles kept at which they are taken. On an H200 a product of 8192 x 4096 x 4096 in
# Triton is as fast as the dense one at 0.86, 0.56 and 0.3; in CUDA at 0.95.
_MOST_TILES = {128: 0.7, 64: 0.45, 32: 0.2}
_MOST_TILES_CUDA = 0.85
# FLOPs in the time in which a byte is moved: 150 to 240 with tensor cores (A100, H200, H100), and without them.
_BALANCE = {torch.float32: 16, torch.bfloat16: 200, torch.float16: 200}
_MOST_SLICED = 0.8  # of the estimated time of the dense product: an estimate is no measurement
# Host time of a step with kernels of tiles, or of a sliced product, about, in seconds: 0.4e-3 on a Xeon; on the machine
# of an H200 0.9e-3 in a network and 1.3e-3 alone (benchmarks/gpu_host.py, and with --limits).
_HOST_S = 1e-3
# FLOP/s that a multiprocessor reaches in dense products of 16 and of 32 bits, about, by compute capability: A100, H100,
# B200; and of others, as for desktops. Measured on an H200 in 16 bits, else by what is published.
_FLOPS = {(8, 0): (2.5e12, 0.2e12), (9, 0): (6e12, 0.5e12), (10, 0): (12e12, 0.5e12)}
_FLOPS_OF_OTHERS = 1.2e12, 0.6e12
# What may stand between two times that are to count as different.
_MARGIN = 0.97


def forced_backend() -> str:
    """The backend that ``SPARSEBILEVEL_BACKEND`` names, or "auto"."""
    forced = gpu.setting("SPARSEBILEVEL_BACKEND") or "auto"
    if forced not in ("auto", *BACKENDS):
        raise ValueError(f"SPARSEBILEVEL_BACKEND={forced!r} is not known; allowed: auto, {', '.join(BACKENDS)}")
    return forced


def choose_product(
    product: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    weight_shape: tuple[int, ...],
    structure: Structure,
    *,
    dense_grad: bool = False,
    window: Window | None = None,
) -> tuple[Backend, int]:
    """Backend of one product on a GPU, and the side of its tiles, or 0: by what was measured there, or by a rule.

    Args:
        product: one of :data:`PASSES`.
        dtype: computed in.
        rows: of the input: tokens, or pixels.
        weight_shape: ``[N, K, ...]``.
        structure: of the mask.
        dense_grad: as in :func:`choose_backend`.
        window: of a convolution that is no product of matrices. Its kernels for tiles are chosen where they were
            measured to be faster than cuDNN, or forced.
    """
    forced = forced_backend()
    ours = gpu.available(device) and dtype in (torch.float32, torch.bfloat16, torch.float16)
    file = gpu.setting("SPARSEBILEVEL_MEASUREMENTS"), measurements.generation()
    fuses = ours and gpu.fuses_exactly(dtype, device)
    return _choose_product(
        forced, file, ours, fuses, product, dtype, device, rows, weight_shape, structure, dense_grad, window
    )


@functools.lru_cache(maxsize=4096)
def _choose_product(
    forced: str,
    file: tuple[str, int],
    ours: bool,
    fuses: bool,
    product: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    weight_shape: tuple[int, ...],
    structure: Structure,
    dense_grad: bool,
    window: Window | None,
) -> tuple[Backend, int]:
    """The choice itself, which takes longer than a launch; ``file`` says which measurements it is of."""
    tiles = structure.tiles if ours and not (dense_grad and product == "weight_grad") else ()
    can_slice = structure.slices < 1 and not (dense_grad and product == "weight_grad")
    n, k = weight_shape[:2]
    measured = measurements.times(device, product, dtype, rows, n, k, window) if ours else {}
    candidates: list[tuple[float, Backend, int]] = []  # (time or, where nothing was measured, fraction of dense)
    how = "measured on this device" if measured else "by an estimate, not measured on this device"
    dense = measured.get("dense", 1.0)
    if fuses and forced in ("auto", "fused") and (measured.get("fused") or forced == "fused"):
        candidates.append((measured.get("fused", 1.0), Backend("fused", f"masked product in one kernel, {how}"), 0))
    if forced in ("auto", "block"):
        for block, kept in tiles:
            name = f"block{block}"
            is_cuda = product != "weight_grad" and window is None and cuda_block_sparse.runs(block, dtype, device)
            most = _MOST_TILES_CUDA if is_cuda else _MOST_TILES[block]
            cost = kept / (2 * most)  # of the dense product, as far as anyone knows
            if name in measured:
                cost = measurements.at_density(measured[name], kept)
            elif forced == "auto" and (window is not None or kept > most):
                continue
            reason = f"{kept:.0%} of the {block}x{block} tiles kept, {how}"
            candidates.append(
                (cost if name in measured or not measured else dense * cost, Backend("block", reason), block)
            )
    if can_slice and forced in ("auto", "slice"):
        cost = _slice_cost(rows, weight_shape, structure.slices, dtype)
        if forced == "slice" or cost <= _MOST_SLICED:
            reason = f"{structure.slices:.0%} of the product left without dropped outputs and inputs, by an estimate"
            candidates.append((dense * cost, Backend("slice", reason), 0))
    library = "cuBLAS/cuDNN on m*theta"
    if not candidates:
        if forced == "auto":
            why = f"{library}; nothing else is faster, {how}"
        elif forced == "dense":
            why = "forced by SPARSEBILEVEL_BACKEND"
        else:
            why = f"{library}; SPARSEBILEVEL_BACKEND={forced} cannot run here"
        return Backend("dense", why, 1.0), 0
    time, backend, block = min(candidates, key=lambda candidate: candidate[0])
    if forced == "auto" and time > _MARGIN * dense:
        return Backend("dense", f"{library}; the others are slower, {how}", dense / time if time else None), 0
    reason = f"forced by SPARSEBILEVEL_BACKEND; {backend.reason}" if forced != "auto" else backend.reason
    return Backend(backend.name, reason, dense / time if time else None), block


def library_is_best(device: torch.device) -> bool:
    """Whether all products of masks that drop nothing as a whole go to the dense library on a GPU.

    So it is unless another backend is forced; or, while a CUDA graph is captured, was measured there to be faster for
    some of them. Elsewhere such a layer waits for Python more than a fused kernel saves.
    """
    if forced_backend() not in ("auto", "dense"):
        return False
    if not gpu.is_capturing(device):
        return True
    return not _is_fused_faster((gpu.setting("SPARSEBILEVEL_MEASUREMENTS"), measurements.generation()), device)


# As torch.compiler.assume_constant_result does, which imports the compiler for it: two seconds in every process.
library_is_best._dynamo_marked_constant = True  # type: ignore[attr-defined]


def waits_for_host(
    rows: int, weight_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seconds: float | None = None
) -> bool:
    """Whether a GPU does the products of a dense layer's step in less time than ``seconds``.

    By default those that the host takes to launch kernels of ours for one. Where the device waits for launches, as for
    a layer alone and in networks of such layers, but not in a CUDA graph, it is faster dense then, whatever the mask
    drops and whatever was measured, which is time of the device.
    """
    speed = _FLOPS.get(gpu.capability(device), _FLOPS_OF_OTHERS)[dtype.itemsize > 2] * gpu.processors(device)
    return 6 * rows * math.prod(weight_shape) < (_HOST_S if seconds is None else seconds) * speed


@functools.lru_cache
def _is_fused_faster(file: tuple[str, int], device: torch.device) -> bool:
    every = measurements.of_device(device).values()
    return any(times["fused"] <= _MARGIN * times["dense"] for times in every if {"fused", "dense"} <= times.keys())


def _slice_cost(rows: int, weight_shape: tuple[int, ...], kept: float, dtype: torch.dtype) -> float:
    """Time of a product without what is dropped, over that of the dense one, if either FLOPs or bytes limit both.

    The kept inputs are gathered, the kept outputs scattered among zeros: of a product limited by bytes that is more
    than is saved.
    """
    n, k, *taps = weight_shape
    weight = n * k * math.prod(taps)
    flops, per_element = 2 * rows * weight, _BALANCE.get(dtype, 16) * dtype.itemsize
    side = math.sqrt(kept)
    dense = max(flops, per_element * (rows * (k + n) + weight))
    small = max(kept * flops, per_element * (side * rows * (k + n) + kept * weight))
    around = per_element * rows * (2 * side * k + n + 2 * side * n)
    return (small + around) / max(dense, 1)


def choose_backend(
    op: str,
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    non_zeros: int,
    *,
    stride: int = 1,
    groups: int = 1,
    images: int = _LANES,
    pixels: int | None = None,
    passes: str | Sequence[str] = PASSES,
    dense_grad: bool = False,
    structure: Structure | None = None,
    window: Window | None = None,
) -> Backend:
    """Backend for one op (``"masked_linear"`` or ``"masked_conv2d"``) on one layer.

    Args:
        op, weight_shape, dtype, device: of the layer.
        non_zeros: weights that the op works on; in the weight gradient, those that learn.
        stride: input pixels to an output pixel.
        groups: of the convolution.
        images: size of the batch; by default one that fills the lanes of the kernels.
        pixels: of an output map, if the maps are ordinary tensors: they fill the lanes where images do not.
        passes: one of :data:`PASSES`, or several that are to go the same way.
        dense_grad: the weight gradient is wanted everywhere, so that it is a dense product whatever the mask is.
        structure: of the mask, for layers on a GPU. There ``images`` times ``pixels`` is the size of the input.
        window: as in :func:`choose_product`, for layers on a GPU.

    ``SPARSEBILEVEL_BACKEND`` forces a backend by name, where it can run.

    Raises:
        ValueError: ``SPARSEBILEVEL_BACKEND`` names none; an unknown pass.
    """
    forced = forced_backend()
    passes = (passes,) if isinstance(passes, str) else tuple(passes)
    if not passes or not set(passes) <= set(PASSES):
        raise ValueError(f"passes={passes!r} is not known; allowed: {', '.join(PASSES)}")
    if structure is not None and gpu.available(device):
        rows = images * (pixels or 1)
        options: dict[str, Any] = {"dense_grad": dense_grad, "window": window}
        found = [choose_product(name, dtype, device, rows, weight_shape, structure, **options)[0] for name in passes]
        return min(found, key=lambda backend: backend.estimate or 1.0)  # the one that gains the least
    geometry = stride, groups, images, pixels
    return _choose(forced, op, weight_shape, dtype, device.type, non_zeros, geometry, passes, dense_grad)


@functools.lru_cache(maxsize=4096)
def _choose(
    forced: str,
    op: str,
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    non_zeros: int,
    geometry: tuple[int, int, int, int | None],
    passes: tuple[str, ...],
    dense_grad: bool,
) -> Backend:
    library = f"{_dense_library(op, weight_shape, dtype, device, passes)} on m*theta"
    if forced == "dense":
        return Backend("dense", "forced by SPARSEBILEVEL_BACKEND")
    if device != "cpu":
        return Backend("dense", f"{library}; without Triton no other kernel runs on {device}")
    if dtype not in _SPARSE_DTYPES:
        return Backend("dense", f"{library}; the sparse CPU kernels take float32 and bfloat16, not {dtype}")
    if not native.available():
        return Backend("dense", f"{library}; the C++ extension is not there: {native.reason}")
    if dense_grad and "weight_grad" in passes:
        return Backend("dense", f"{library}; the gradient is wanted everywhere, not at the mask's weights alone")
    if forced in ("fused", "block", "slice"):
        return Backend("dense", f"{library}; SPARSEBILEVEL_BACKEND={forced} is for GPUs")
    if forced == "sparse":
        return Backend("sparse", "forced by SPARSEBILEVEL_BACKEND")
    stride, groups, images, pixels = geometry
    out_channels, fan_in = weight_shape[:2]
    channels = stride * fan_in * groups + out_channels
    weights = math.prod(weight_shape)
    padded = -(-images // _LANES) * _LANES / max(images, 1)
    lanes = ""
    if pixels is not None and padded > (of_pixels := _pixel_lanes(weight_shape, pixels)):
        padded, lanes = of_pixels, ", lanes of pixels"
    costs = [_COSTS[op][name] for name in passes]
    sparse = padded * sum(cost.non_zero * non_zeros + cost.channel * channels for cost in costs)
    if pixels is not None:
        sparse += sum(cost.weight for cost in costs) * weights / max(images * pixels, 1)
    dense = float(len(passes) * weights)
    if dtype == torch.bfloat16 and _multiplies_bfloat16():
        dense /= _DENSE_BFLOAT16
    ratio = dense / max(sparse, 1)
    if ratio <= 1:
        empty = f", its lanes filled to {1 / padded:.0%}" if padded > 1.5 else ""
        return Backend("dense", f"{library}; the sparse CPU kernel would be slower{empty}", ratio)
    return Backend("sparse", f"sparse CPU kernel, {native.isa()}{lanes}", ratio)


def _pixel_lanes(weight_shape: tuple[int, ...], pixels: int) -> float:
    """Lanes that a pixel takes where they hold those of one image, as if these were slower and not more.

    Rows have a halo between them, and begin anywhere in a cache line then: csrc/cpu/masked_conv2d.cpp.
    """
    halo = max(weight_shape[2:], default=1) - 1
    side = math.isqrt(max(pixels, 1))
    lines = -(-side * (side + halo) // _LANES)
    return (1.25 if halo else 1.0) * lines * _LANES / side**2


def lines_pay(images: int, pixels: int) -> bool:
    """Whether a network runs faster with all maps in lines than layer by layer, for a batch of images of that size.

    In lines a small batch leaves lanes empty; layer by layer its pixels fill them, but each layer costs a call of its
    own, which is what counts for small images. Measured on ResNets and VGG, 1 to 12 images.
    """
    filled = images / (-(-images // _LANES) * _LANES)
    return filled > (0.75 if pixels >= 48 * 48 else 0.25) or os.environ.get("SPARSEBILEVEL_BACKEND") == "sparse"


def _dense_library(
    op: str, weight_shape: tuple[int, ...], dtype: torch.dtype, device: str, passes: tuple[str, ...]
) -> str:
    if device != "cpu":
        return "cuBLAS/cuDNN" if device == "cuda" else "dense library"
    if op == "masked_conv2d":
        return "oneDNN"
    return "oneDNN" if takes_onednn(weight_shape, dtype, device) and passes != ("weight_grad",) else "BLAS"


def takes_onednn(weight_shape: tuple[int, ...], dtype: torch.dtype, device: str) -> bool:
    """Whether linear layers of this weight go to oneDNN, where they run dense, and not to ``F.linear``.

    Output and input gradient; the weight gradient is not faster there.
    """
    is_large = math.prod(weight_shape) >= _ONEDNN_LINEAR
    return is_large and device == "cpu" and dtype == torch.float32 and _has_onednn_linear()


@functools.cache
def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()


@functools.cache
def _has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def sparse_support(
    op: str,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: int = 1,
    images: int | None = None,
    *,
    groups: int | None = None,
    passes: str | Sequence[str] = PASSES,
) -> Support | None:
    """Support of ``mask`` if the sparse kernels take ``passes``, which go the same way, else None.

    Args:
        op, stride, passes: as in :func:`choose_backend`.
        input, weight, mask: operands of the op; given the next two, ``input`` is read for its type alone.
        images, groups: size of the batch and groups of channels, of maps in lines; by default those of the input.
    """
    if not _can_run_sparse(input, weight, mask):
        return None
    support = active_support(mask)
    geometry = _geometry(input, weight, stride) if images is None or groups is None else (stride, groups, images, None)
    return support if _is_sparse(op, weight, support.non_zeros, geometry, passes) else None


def sparse_grads(
    op: str, input: Tensor, weight: Tensor, mask: Tensor, needs: Needs, positions: Tensor | None, stride: int = 1
) -> tuple[Support | None, Support | None]:
    """Support of ``mask`` for the input gradient and for the weight gradient; None where it is dense or not needed.

    Args:
        op, input, weight, mask, stride: as in :func:`sparse_support`.
        needs, positions: what the backward must give.
    """
    with_weight = needs.grad and not needs.dense_grad(positions)
    if not (needs.input or with_weight) or not _can_run_sparse(input, weight, mask):
        return None, None
    support = active_support(mask)
    learning = support.non_zeros
    if needs.sink and positions is not None:  # those of methods hold the active ones too
        learning = max(learning, positions.numel())
    geometry = _geometry(input, weight, stride)
    with_input = needs.input and _is_sparse(op, weight, support.non_zeros, geometry, "input_grad")
    with_weight = with_weight and _is_sparse(op, weight, learning, geometry, "weight_grad")
    return support if with_input else None, support if with_weight else None


def _can_run_sparse(input: Tensor, weight: Tensor, mask: Tensor) -> bool:
    is_cpu = input.device.type == "cpu" and native.available()
    is_float = input.dtype == weight.dtype and input.dtype in _SPARSE_DTYPES
    return is_cpu and is_float and input.numel() > 0 and mask.numel() > 0


def _geometry(input: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    pixels = math.prod(input.shape[2:]) // stride
    return stride, input.shape[1] // weight.shape[1], input.shape[0], pixels


def _is_sparse(
    op: str, weight: Tensor, non_zeros: int, geometry: tuple[int, int, int, int | None], passes: str | Sequence[str]
) -> bool:
    options: dict[str, Any] = dict(zip(("stride", "groups", "images", "pixels"), geometry, strict=True))
    options["passes"] = passes
    return choose_backend(op, tuple(weight.shape), weight.dtype, weight.device, non_zeros, **options).name == "sparse"


def describe(backends: Mapping[str, Backend]) -> str:
    """The choices of a layer, by pass, in few words: ``sparse``, or ``sparse, weight gradient dense``."""
    names = [backend.name for backend in backends.values()]
    usual = max(BACKENDS, key=names.count)
    others = [
        f"{name.replace('_grad', ' gradient')} {backend.name}"
        for name, backend in backends.items()
        if backend.name != usual
    ]
    return ", ".join([usual, *others])
