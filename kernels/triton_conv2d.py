"""Convolutions with masked weights as products of matrices that nobody writes down (implicit GEMM), in Triton.

Maps lie in channels_last, ``[B, H, W, C]`` in memory, and weight and mask likewise, ``[N, R, S, C / groups]``. Rows of
the products are pixels. Imported where it is needed, since it imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sparse import Geometry
from .gpu import capability, fuses_exactly, has_large_tiles, launch, precision
from .triton_matmul import block_c, upcast

# Pixels, and channels of the result; the registers of the addresses leave no room for more.
BLOCK_T, BLOCK_M = 128, 64


def tile_pixels(capability: tuple[int, int]) -> int:
    """Pixels of a tile: half as many where registers would spill."""
    return BLOCK_T if has_large_tiles(capability) else BLOCK_T // 2


@triton.jit
def _source(y, x, r, s, SH, SW, stride_y, stride_x, pad_y, pad_x, dil_y, dil_x, INPUT_GRAD: tl.constexpr):
    """Pixels, in a source map ``[SH, SW]``, that tap (r, s) brings to pixels (y, x), and whether there is one."""
    if INPUT_GRAD:
        up, left = y + pad_y - r * dil_y, x + pad_x - s * dil_x
        valid = (up >= 0) & (left >= 0) & (up % stride_y == 0) & (left % stride_x == 0)
        up, left = up // stride_y, left // stride_x
    else:
        up, left = y * stride_y - pad_y + r * dil_y, x * stride_x - pad_x + s * dil_x
        valid = (up >= 0) & (left >= 0)
    return up, left, valid & (up < SH) & (left < SW)


@triton.jit
def _masked_conv2d(
    source,
    weight,
    mask,
    bias,
    out,
    pixels,
    H,
    W,
    SH,
    SW,
    N,
    C,
    R,
    S,
    groups,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dil_y,
    dil_x,
    INPUT_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output, or gradient of the input, of maps ``[H, W]`` from those of the other, ``[SH, SW]``.

    ``N`` and ``C`` are outputs and inputs of a group. As in the linear kernels the masked weight is the left operand.
    """
    if INPUT_GRAD:
        M, D = C, N
    else:
        M, D = N, C
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = tl.program_id(1)
    m0 = tl.program_id(0) % tiles_m * BLOCK_M
    t = tl.program_id(0) // tiles_m * BLOCK_T + tl.arange(0, BLOCK_T)
    image, y, x = t // (H * W), t // W % H, t % W
    m, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(D, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for step in range(0, R * S * blocks):
        tap, d0 = step // blocks, step % blocks * BLOCK_C
        up, left, valid = _source(
            *(y, x, tap // S, tap % S, SH, SW, stride_y, stride_x, pad_y, pad_x, dil_y, dil_x, INPUT_GRAD)
        )
        row = ((image * SH + up) * SW + left).to(tl.int64) * (D * groups)
        inside = (valid & (t < pixels))[None, :] & (d0 + d[:, None] < D)
        b = tl.load(source + group * D + d0 + row[None, :] + d[:, None], mask=inside, other=0.0)
        inside = (m[:, None] < M) & (d0 + d[None, :] < D)
        if INPUT_GRAD:
            local = (group * N + d0 + d[None, :]) * (R * S * C) + tap * C + m[:, None]
        else:
            local = (group * N + m[:, None]) * (R * S * C) + tap * C + d0 + d[None, :]
        a = tl.load(weight + local, mask=inside, other=0.0)
        keep = tl.load(mask + local, mask=inside, other=0) != 0
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.where(keep, a, 0.0).to(b.dtype), b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + group * M + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    at = t.to(tl.int64)[None, :] * (M * groups) + group * M + m[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m[:, None] < M) & (t < pixels)[None, :])


@triton.jit
def _conv2d_weight_grad(
    dy,
    source,
    weight,
    mask,
    grad_weight,
    grad_scores,
    sink,
    pixels,
    H,
    W,
    SH,
    SW,
    N,
    C,
    R,
    S,
    groups,
    stride_y,
    stride_x,
    pad_y,
    pad_x,
    dil_y,
    dil_x,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``mask * G``, ``weight * G`` and ``G`` of one tap and tile; ``dy`` has the pixels ``[H, W]``."""
    tiles_k = tl.cdiv(C, BLOCK_K)
    group, tap = tl.program_id(1), tl.program_id(2)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for t0 in range(0, pixels, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        image, y, x = t // (H * W), t // W % H, t % W
        up, left, valid = _source(
            *(y, x, tap // S, tap % S, SH, SW, stride_y, stride_x, pad_y, pad_x, dil_y, dil_x, False)
        )
        row = ((image * SH + up) * SW + left).to(tl.int64) * (C * groups)
        inside = (valid & (t < pixels))[:, None] & (k[None, :] < C)
        b = tl.load(source + group * C + row[:, None] + k[None, :], mask=inside, other=0.0)
        inside = (t[:, None] < pixels) & (n[None, :] < N)
        a = tl.load(dy + group * N + t[:, None].to(tl.int64) * (N * groups) + n[None, :], mask=inside, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    inside = (n[:, None] < N) & (k[None, :] < C)
    at = (group * N + n[:, None]) * (R * S * C) + tap * C + k[None, :]
    if HAS_WEIGHT:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
        tl.store(grad_weight + at, tl.where(keep, acc, 0.0).to(grad_weight.dtype.element_ty), mask=inside)
    if HAS_SCORES:
        tl.store(grad_scores + at, tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * acc, mask=inside)
    if HAS_SINK:
        tl.store(sink + at, acc, mask=inside)


"""Stride, padding, dilation, groups."""


def _sizes(weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    stride, padding, dilation, groups = geometry
    n, c, r, s = weight.shape
    return (n // groups, c, r, s, groups, *stride, *padding, *dilation)


def output_size(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Of the convolution of maps ``x`` with a weight."""
    stride, padding, dilation, _ = geometry
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return x.shape[0], weight.shape[0], *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sides)


def empty_maps(size: Sequence[int], like: Tensor) -> Tensor:
    """Maps in channels_last, of the type and on the device of ``like``."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def takes(weight: Tensor, *maps: Tensor) -> bool:
    """Whether all lie in channels_last, in numbers that 32 bits hold, and are multiplied as exactly as asked for."""
    if not fuses_exactly(maps[-1].dtype, weight.device):
        return False
    tensors = (weight, *maps)
    return weight.numel() < 1 << 31 and all(
        t.is_contiguous(memory_format=torch.channels_last) and t.numel() // max(t.shape[1], 1) < 1 << 31
        for t in tensors
    )


def _run(
    source: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, out: Tensor, geometry: Geometry, grad: bool
) -> Tensor:
    if not out.numel():
        return out
    groups = geometry[3]
    pixels, channels = out.numel() // out.shape[1], out.shape[1] // groups
    block_t = tile_pixels(capability(out.device))
    grid = triton.cdiv(pixels, block_t) * triton.cdiv(channels, BLOCK_M), groups
    bias = None if bias is None else bias.contiguous()
    launch(
        out.device,
        _masked_conv2d,
        grid,
        *(source, weight, mask.view(torch.int8), bias, out, pixels, *out.shape[2:], *source.shape[2:]),
        *_sizes(weight, geometry),
        INPUT_GRAD=grad,
        HAS_BIAS=bias is not None,
        BLOCK_T=block_t,
        BLOCK_M=BLOCK_M,
        BLOCK_C=block_c(source.dtype),
        PRECISION=precision(source.dtype),
        UPCAST=upcast(),
        num_warps=8,
        num_stages=3,
    )
    return out


def masked_conv2d(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``conv2d(x, mask * weight) + bias``, of maps in channels_last.

    Args:
        x: ``[B, C, H, W]``; float32, bfloat16 or float16.
        weight, mask: ``[N, C / groups, R, S]`` and bool, in channels_last; the weight is rounded to the type of ``x``.
        bias: ``[N]`` or None.
    """
    return _run(x, weight, mask, bias, empty_maps(output_size(x, weight, geometry), x), geometry, False)


def input_grad(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of ``x`` from that of the output, ``dy``."""
    return _run(dy, weight, mask, None, empty_maps(x.shape, dy), geometry, True)


def weight_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    geometry: Geometry,
    *,
    need_weight: bool = True,
    need_scores: bool = True,
    need_sink: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``mask * G`` in the weight's type, ``weight * G`` and ``G`` in float32; None where they are not needed."""
    needs = need_weight, need_scores, need_sink
    outs = [
        torch.empty_like(weight, dtype=dtype) if need else None
        for need, dtype in zip(needs, (weight.dtype, torch.float32, torch.float32), strict=True)
    ]
    if weight.numel():
        n, c, r, s, groups, *steps = _sizes(weight, geometry)
        pixels = dy.numel() // dy.shape[1]
        grid = triton.cdiv(n, BLOCK_M) * triton.cdiv(c, BLOCK_M), groups, r * s
        launch(
            x.device,
            _conv2d_weight_grad,
            grid,
            *(dy, x, weight, mask.view(torch.int8), *outs, pixels, *dy.shape[2:], *x.shape[2:]),
            *(n, c, r, s, groups, *steps),
            HAS_WEIGHT=need_weight,
            HAS_SCORES=need_scores,
            HAS_SINK=need_sink,
            BLOCK_T=block_c(x.dtype),
            BLOCK_N=BLOCK_M,
            BLOCK_K=BLOCK_M,
            PRECISION=precision(x.dtype),
            UPCAST=upcast(),
            num_warps=4,
            num_stages=3,
        )
    return outs[0], outs[1], outs[2]
