"""Which kernel runs a masked op, and why: the only place that knows speeds.

The choice is a rule, not a measurement made on the way: near the break-even a measurement would fall one way in one run
and the other way in the next, and runs that should be equal bit for bit would not be.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .plans import Support, active_support

BACKENDS = ("dense", "sparse")

# What the sparse CPU kernels pay at an output pixel, in multiply-adds of the dense library: for a non-zero, and for
# moving a pixel of one channel into or out of their layout. From benchmarks/bench_masked_conv2d.py.
_NON_ZERO, _CHANNEL = 2.0, 12.0
_LANES = 16


class Backend(NamedTuple):
    """A choice and the reason for it, as layers and the command line show it."""

    name: str
    reason: str
    estimate: float | None = None
    """Time of the dense library over that of the sparse kernel, as the rule behind the choice has it."""


def choose_backend(
    op: str,
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    non_zeros: int,
    *,
    stride: int = 1,
    images: int = _LANES,
) -> Backend:
    """Backend for one op (``"masked_linear"`` or ``"masked_conv2d"``) on one layer.

    Args:
        op, weight_shape, dtype, device: of the layer.
        non_zeros: weights that the op works on.
        stride: input pixels to an output pixel.
        images: size of the batch; by default one that fills the lanes of the kernels.

    ``SPARSEBILEVEL_BACKEND`` forces a backend by name, where it can run.

    Raises:
        ValueError: ``SPARSEBILEVEL_BACKEND`` names none.
    """
    forced = os.environ.get("SPARSEBILEVEL_BACKEND", "auto")
    if forced not in ("auto", *BACKENDS):
        raise ValueError(f"SPARSEBILEVEL_BACKEND={forced!r} is not known; allowed: auto, {', '.join(BACKENDS)}")
    return _choose(forced, op, weight_shape, dtype, device.type, non_zeros, stride, images)


@functools.lru_cache(maxsize=4096)
def _choose(
    forced: str,
    op: str,
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    non_zeros: int,
    stride: int,
    images: int,
) -> Backend:
    library = "cuBLAS/cuDNN" if device == "cuda" else "oneDNN/BLAS"
    if forced == "dense":
        return Backend("dense", "forced by SPARSEBILEVEL_BACKEND")
    if device != "cpu":
        return Backend("dense", f"{library} on m*theta; no sparse kernel for {device} in this version")
    if dtype != torch.float32:
        return Backend("dense", f"{library} on m*theta; the sparse CPU kernels take float32, not {dtype}")
    if not native.available():
        return Backend("dense", f"{library} on m*theta; the C++ extension is not there: {native.reason}")
    if forced == "sparse":
        return Backend("sparse", "forced by SPARSEBILEVEL_BACKEND")
    out_channels, fan_in, *kernel = weight_shape
    dense = out_channels * fan_in
    for size in kernel:
        dense *= size
    channels = stride * fan_in + out_channels
    padded = -(-images // _LANES) * _LANES / max(images, 1)
    ratio = dense / max((_NON_ZERO * non_zeros + _CHANNEL * channels) * padded, 1)
    if ratio <= 1:
        return Backend("dense", f"{library} on m*theta; the sparse CPU kernel would be slower", ratio)
    return Backend("sparse", f"sparse CPU kernel, {native.isa()}", ratio)


def sparse_support(
    op: str, input: Tensor, weight: Tensor, mask: Tensor, stride: int = 1, images: int | None = None
) -> Support | None:
    """Support of ``mask`` if the sparse kernels take this op on so many ``images`` (by default the first size)."""
    if input.device.type != "cpu" or not native.available() or not input.numel() or not mask.numel():
        return None
    if input.dtype != torch.float32 or weight.dtype != torch.float32:
        return None
    support = active_support(mask)
    chosen = choose_backend(
        op,
        tuple(weight.shape),
        weight.dtype,
        weight.device,
        support.non_zeros,
        stride=stride,
        images=input.shape[0] if images is None else images,
    )
    return support if chosen.name == "sparse" else None
