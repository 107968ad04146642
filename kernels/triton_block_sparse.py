"""Products with weights that are zero in whole tiles, in Triton: what is summed are the tiles of a list.

Weights lie dense in memory, ``[N, K]`` row-major; when the mask changes only the lists do (:mod:`.block_sparse`). A
weight of a convolution, in channels_last ``[N, R, S, K]``, is one such matrix for each tap, side by side; the rows of
the other operand are pixels, gathered where the tap looks. Imported where it is needed, since it imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu
from .block_sparse import Geometry
from .gpu import precision
from .triton_conv2d import empty_maps
from .triton_matmul import add_in_turn, block_c, load_tile, operand, operands, start, upcast

if TYPE_CHECKING:
    from .block_sparse import TileList

BLOCK_T = 128
_GROUP_ROWS = 2048  # of 4096 features in 16 bits: 16 MiB of an L2 cache of 40 to 60


@triton.jit
def _pixels(t, y0, x0, H, W, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Image, row and column of the ``t``-th of the pixels of maps ``[H, W]`` that are a stride apart, from (y0, x0).

    And how many of them there are in a map, which may be none.
    """
    height, width = tl.cdiv(H - y0, STRIDE_Y), tl.cdiv(W - x0, STRIDE_X)
    row = t // max(width, 1) % max(height, 1)
    return t // max(height * width, 1), y0 + row * STRIDE_Y, x0 + t % max(width, 1) * STRIDE_X, height * width


@triton.jit
def _block_matmul(
    x,
    weight,
    bias,
    out,
    order,
    starts,
    index,
    T,
    N,
    K,
    images,
    H,
    W,
    SH,
    SW,
    pad_y,
    pad_x,
    dil_y,
    dil_x,
    CONV: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of ``x @ weight.T``, or of ``x @ weight``: summed over the kept tiles of its rows, or columns.

    Programs go by groups of as many rows of ``x`` as the L2 cache holds. Of each group the longest lists come first, so
    that no program is still busy with one when the others are done.

    CONV: ``x`` are maps ``[SH, SW]``, and ``out`` maps ``[H, W]``. Pixels of the gradient of the input that are a
    stride apart are reached by the same taps, at the same distance: such a phase has its own lists, and its pixels,
    of which T is the most, look at neighbours as those of a convolution of stride 1 do.
    """
    if INPUT_GRAD:
        M, C = K, N
    else:
        M, C = N, K
    TAPS: tl.constexpr = R * S
    STEPS: tl.constexpr = BLOCK // BLOCK_C
    tiles_t = tl.cdiv(T, BLOCK_T)
    lists = tl.num_programs(0) // tiles_t
    group = tl.program_id(0) // (GROUP * lists)
    height = min(tiles_t - group * GROUP, GROUP)
    place = tl.program_id(0) - group * GROUP * lists
    row = tl.load(order + place // height)
    t0 = (group * GROUP + place % height) * BLOCK_T
    t, c_local = t0 + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    m0 = row * BLOCK
    if CONV:
        if INPUT_GRAD:
            tiles_m = tl.cdiv(M, BLOCK)
            m0 = row % tiles_m * BLOCK
            y0, x0 = row // tiles_m // STRIDE_X, row // tiles_m % STRIDE_X
            image, y, x_, area = _pixels(t, y0, x0, H, W, STRIDE_Y, STRIDE_X)
            top, left = y // STRIDE_Y, x_ // STRIDE_X
        else:
            image, y, x_, area = _pixels(t, 0, 0, H, W, 1, 1)
            top, left = y * STRIDE_Y - pad_y, x_ * STRIDE_X - pad_x
        is_pixel = t < images * area
        source = x + ((image.to(tl.int64) * SH + top) * SW + left)[:, None] * C + c_local[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for i in range(tl.load(starts + row) * STEPS, tl.load(starts + row + 1) * STEPS):
        tile = tl.load(index + i // STEPS)
        c, tap = tile // TAPS * BLOCK + i % STEPS * BLOCK_C, tile % TAPS
        if CONV:
            if INPUT_GRAD:
                down, right = (y0 + pad_y - tap // S * dil_y) // STRIDE_Y, (x0 + pad_x - tap % S * dil_x) // STRIDE_X
            else:
                down, right = tap // S * dil_y, tap % S * dil_x
            up, across = top + down, left + right
            inside = is_pixel & (up >= 0) & (up < SH) & (across >= 0) & (across < SW)
            inside = inside[:, None] & (c + c_local[None, :] < C)
            a = tl.load(source + (start(down * SW + right, 0, C) + c), mask=inside, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
        else:
            a = load_tile(x, t0, c, T, C, BLOCK_T, BLOCK_C, DESCRIPTOR, UPCAST)
        if INPUT_GRAD:
            b = load_tile(weight, c, m0, N, K, BLOCK_C, BLOCK, DESCRIPTOR, UPCAST, TAPS, tap)
        else:
            b = load_tile(weight, m0, c, N, K, BLOCK, BLOCK_C, DESCRIPTOR, UPCAST, TAPS, tap).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    m = m0 + tl.arange(0, BLOCK)
    if HAS_BIAS:
        acc += tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    if CONV:
        pixel = ((image.to(tl.int64) * H + y) * W + x_)[:, None] * M
        tl.store(out + pixel + m[None, :], acc.to(out.dtype.element_ty), mask=is_pixel[:, None] & (m[None, :] < M))
    else:
        inside = (t[:, None] < T) & (m[None, :] < M)
        local = tl.arange(0, BLOCK_T)[:, None] * M + tl.arange(0, BLOCK)[None, :]
        tl.store(out + start(t0, m0, M) + local, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _block_weight_grad(
    dy,
    x,
    mask,
    grad,
    workspace,
    turns,
    starts,
    index,
    rows,
    T,
    N,
    K,
    split_rows,
    H,
    W,
    SH,
    SW,
    pad_y,
    pad_x,
    dil_y,
    dil_x,
    CONV: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``dy.T @ x``, with HAS_MASK times ``mask``, in the kept tiles; the rest of ``grad`` is left as it is.

    How many tiles there are is known to the device alone: a program takes every so many-th. With SPLITS > 1 the rows
    of a tile are split between as many programs, which add up in turn; there must be a program for each part then.
    CONV: ``x`` are maps ``[SH, SW]``, and ``dy`` maps ``[H, W]``.
    """
    TAPS: tl.constexpr = R * S
    for part in range(tl.program_id(0), tl.load(starts + tl.cdiv(N, BLOCK)) * SPLITS, tl.num_programs(0)):
        i, split = part // SPLITS, part % SPLITS
        tile = tl.load(index + i)
        n0, k0, tap = tl.load(rows + i) * BLOCK, tile // TAPS * BLOCK, tile % TAPS
        first = split * split_rows
        n, k = n0 + tl.arange(0, BLOCK), k0 + tl.arange(0, BLOCK)
        if CONV:
            down, right = tap // S * dil_y - pad_y, tap % S * dil_x - pad_x
            image, y, x_, _ = _pixels(first + tl.arange(0, BLOCK_T), 0, 0, H, W, 1, 1)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for t in range(first, min(T, first + split_rows), BLOCK_T):
            a = load_tile(dy, t, n0, T, N, BLOCK_T, BLOCK, DESCRIPTOR, UPCAST)
            if CONV:
                up, left = y * STRIDE_Y + down, x_ * STRIDE_X + right
                inside = (up >= 0) & (up < SH) & (left >= 0) & (left < SW) & (t + tl.arange(0, BLOCK_T) < T)
                source = x + ((image.to(tl.int64) * SH + up) * SW + left)[:, None] * K + k[None, :]
                b = tl.load(source, mask=inside[:, None] & (k[None, :] < K), other=0.0)
                if UPCAST:
                    b = b.to(tl.float32)
                # The pixels BLOCK_T further on, without the divisions.
                x_ += BLOCK_T % W
                y += BLOCK_T // W % H + (x_ >= W).to(tl.int32)
                x_ = tl.where(x_ >= W, x_ - W, x_)
                image += BLOCK_T // (H * W) + (y >= H).to(tl.int32)
                y = tl.where(y >= H, y - H, y)
            else:
                b = load_tile(x, t, k0, T, K, BLOCK_T, BLOCK, DESCRIPTOR, UPCAST)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        is_last = True
        if SPLITS > 1:
            acc, is_last = add_in_turn(acc, workspace, turns, i, split, SPLITS, BLOCK, BLOCK)
        if is_last:
            inside = (n[:, None] < N) & (k[None, :] < K)
            at = start(n0, tap * K + k0, TAPS * K)
            local = tl.arange(0, BLOCK)[:, None] * (TAPS * K) + tl.arange(0, BLOCK)[None, :]
            if HAS_MASK:
                acc = tl.where(tl.load(mask + at + local, mask=inside, other=0) != 0, acc, 0.0)
            tl.store(grad + at + local, acc.to(grad.dtype.element_ty), mask=inside)


def options(block: int, conv: bool = False) -> dict[str, int]:
    """How the product for tiles of a side is compiled. Two of the stages go to the list, which is read ahead.

    The addresses of pixels take registers too: those of a convolution are spread over more threads.
    """
    is_large = block == 128 or (conv and block == 64)
    return {"num_warps": 8 if is_large else 4, "num_stages": 5 if block == 128 else 6}


def grad_options(block: int, is_deep: bool) -> dict[str, int]:
    """The same of the weight gradient; deep where the hardware copies the tiles of both operands."""
    stages = (5 if block == 128 else 4) if is_deep else 3
    return {"num_warps": options(block)["num_warps"], "num_stages": stages}


def grad_rows(dtype: torch.dtype, block: int, conv: bool) -> int:
    """Rows that the weight gradient sums at a time: more of them where they are narrow."""
    return block_c(dtype) * (2 if block == 32 and not conv else 1)


def tile_rows(dtype: torch.dtype, conv: bool, block: int) -> int:
    """Rows of a tile of the result: twice as many for narrow ones, half as many where registers would spill."""
    if conv:
        return BLOCK_T // 2 if dtype == torch.float32 else BLOCK_T
    return 2 * BLOCK_T if block == 32 and dtype != torch.float32 else BLOCK_T


class _Maps(NamedTuple):
    """What the kernels are told of a convolution."""

    sizes: tuple[int | None, ...]  # images, and what follows them among the arguments
    window: dict[str, int]


_MATRIX = _Maps((None,) * 9, {"CONV": False, "R": 1, "S": 1, "STRIDE_Y": 1, "STRIDE_X": 1})


def _maps(of: Tensor, source: Tensor, taps: Sequence[int], geometry: Geometry) -> _Maps:
    """A convolution that writes, or reads, ``of`` where it looks at ``source``."""
    (stride_y, stride_x), (pad_y, pad_x), (dil_y, dil_x), _ = geometry
    sizes = of.shape[0], *of.shape[2:], *source.shape[2:], pad_y, pad_x, dil_y, dil_x
    return _Maps(sizes, {"CONV": True, "R": taps[0], "S": taps[1], "STRIDE_Y": stride_y, "STRIDE_X": stride_x})


def _pixels_of(maps: Tensor) -> Tensor:
    """Maps, or a weight, in channels_last as a matrix ``[pixels, C]``."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def block_matmul(
    x: Tensor,
    weight: Tensor,
    block: int,
    lists: TileList,
    bias: Tensor | None = None,
    *,
    input_grad: bool = False,
) -> Tensor:
    """``x [T, K] @ weight.T + bias``, or with ``input_grad`` ``x [T, N] @ weight``, where other tiles are zero.

    Args:
        x, weight: contiguous, of one type: float32, bfloat16 or float16; weight ``[N, K]``, zeros in place.
        block: side of a tile: 128, 64 or 32.
        lists: of rows of tiles, or with ``input_grad`` of columns.
        bias: ``[N]`` or None.
    """
    n, k = weight.shape
    out = torch.empty(x.shape[0], k if input_grad else n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    summed = min(block, block_c(x.dtype))
    tile = (summed, block) if input_grad else (block, summed)
    (x_operand, w_operand), is_descriptor = operands((x, tile_rows(x.dtype, False, block), summed), (weight, *tile))
    sizes = x.shape[0], n, k
    _launch(x_operand, w_operand, _contiguous(bias), out, lists, sizes, block, input_grad, is_descriptor, _MATRIX)
    return out


def block_conv2d(
    source: Tensor,
    weight: Tensor,
    block: int,
    lists: TileList,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Geometry,
    *,
    input_grad: bool = False,
) -> Tensor:
    """A convolution, or with ``input_grad`` the gradient of its input, where other tiles are zero.

    Args:
        source: ``[B, K, H, W]``, or the gradient of the output; in channels_last, float32, bfloat16 or float16.
        weight: ``[N, K, R, S]`` in channels_last, of the type of ``source``, zeros in place.
        block: side of a tile: 128, 64 or 32.
        lists: of rows of tiles; with ``input_grad`` of columns, phase by phase.
        bias: ``[N]`` or None.
        size: of the result.
        geometry: one group.
    """
    out = empty_maps(size, source)
    if not out.numel():
        return out
    n, k, *taps = weight.shape
    stride = geometry[0] if input_grad else (1, 1)
    rows = out.shape[0] * triton.cdiv(out.shape[2], stride[0]) * triton.cdiv(out.shape[3], stride[1])
    summed = min(block, block_c(source.dtype))
    tile = (summed, block) if input_grad else (block, summed)
    matrix = _pixels_of(weight).view(n, -1)
    w_operand, is_descriptor = operand(matrix, *tile) if k % summed == 0 else (matrix, False)
    maps = _maps(out, source, taps, geometry)
    _launch(source, w_operand, _contiguous(bias), out, lists, (rows, n, k), block, input_grad, is_descriptor, maps)
    return out


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _launch(
    x: Any,
    weight: Any,
    bias: Tensor | None,
    out: Tensor,
    lists: TileList,
    sizes: tuple[int, int, int],
    block: int,
    input_grad: bool,
    is_descriptor: bool,
    maps: _Maps,
) -> None:
    is_conv = bool(maps.window["CONV"])
    block_t = tile_rows(out.dtype, is_conv, block)
    gpu.launch(
        out.device,
        _block_matmul,
        (-(-sizes[0] // block_t) * len(lists.order),),
        *(x, weight, bias, out, lists.order, lists.starts, lists.tiles, *sizes, *maps.sizes),
        **maps.window,
        INPUT_GRAD=input_grad,
        HAS_BIAS=bias is not None,
        DESCRIPTOR=is_descriptor,
        BLOCK=block,
        BLOCK_T=block_t,
        BLOCK_C=min(block, block_c(out.dtype)),
        GROUP=_GROUP_ROWS // block_t,
        PRECISION=precision(out.dtype),
        UPCAST=upcast(),
        **options(block, is_conv),
    )


def block_weight_grad(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weight_shape: Sequence[int],
    block: int,
    lists: TileList,
    dtype: torch.dtype,
    geometry: Geometry | None = None,
    *,
    splits: int = 1,
) -> Tensor:
    """``mask * G`` in ``dtype``, of which only the tiles that hold a True are computed; without a mask G, in those.

    Args:
        dy, x: contiguous ``[T, N]`` and ``[T, K]``, of one type: float32, bfloat16 or float16. With a ``geometry`` maps
            in channels_last.
        mask: bool, contiguous or in channels_last, or None.
        weight_shape: ``[N, K]``, or of a convolution ``[N, K, R, S]``.
        block, lists: as in :func:`block_matmul`, of rows of tiles.
        geometry: of a convolution with one group.
        splits: parts of T that are summed side by side.
    """
    n, k, *taps = weight_shape
    is_conv = geometry is not None
    if is_conv:
        grad = torch.empty(*weight_shape, dtype=dtype, device=x.device, memory_format=torch.channels_last).zero_()
    else:
        grad = torch.zeros(*weight_shape, dtype=dtype, device=x.device)
    if not grad.numel() or not dy.numel():
        return grad
    summed = grad_rows(x.dtype, block, is_conv)
    if geometry is not None:
        maps = _maps(dy, x, taps, geometry)
        dy_operand, is_descriptor = operand(_pixels_of(dy), summed, block)
        x_operand: Any = x
    else:
        maps = _MATRIX
        (dy_operand, x_operand), is_descriptor = operands((dy, summed, block), (x, summed, block))
    t = dy.numel() // n
    workspace = turns = None
    programs = min(len(lists.tiles), 2 * gpu.processors(x.device))
    if splits > 1:
        programs = len(lists.tiles) * splits
        workspace = torch.empty(len(lists.tiles) * block * block, dtype=torch.float32, device=x.device)
        turns = torch.zeros(len(lists.tiles), dtype=torch.int32, device=x.device)
    gpu.launch(
        x.device,
        _block_weight_grad,
        (programs,),
        *(dy_operand, x_operand, None if mask is None else mask.view(torch.int8), grad, workspace, turns),
        *(lists.starts, lists.tiles, lists.rows, t, n, k, -(-t // (splits * summed)) * summed),
        *maps.sizes[1:],
        **maps.window,
        SPLITS=splits,
        HAS_MASK=mask is not None,
        DESCRIPTOR=is_descriptor,
        BLOCK=block,
        BLOCK_T=summed,
        PRECISION=precision(x.dtype),
        UPCAST=upcast(),
        **grad_options(block, is_descriptor and geometry is None),
    )
    return grad
