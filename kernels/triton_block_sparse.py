"""Products with weights that are zero in whole tiles, in Triton: what is summed are the tiles of a list.

Weights lie dense in memory, ``[N, K]`` row-major; when the mask changes only the lists do (:mod:`.block_sparse`).
Imported where it is needed, since it imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu
from .gpu import on_device
from .triton_matmul import block_c, load_mask, load_tile, operands, precision, start, upcast

BLOCK_T = 128


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
    INPUT_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of ``x @ weight.T``, or of ``x @ weight``: summed over the kept tiles of its rows, or columns.

    The longest lists come first, so that no program is still busy with one when the others are done.
    """
    if INPUT_GRAD:
        M, C = K, N
    else:
        M, C = N, K
    tiles_t = tl.cdiv(T, BLOCK_T)
    m_tile = tl.load(order + tl.program_id(0) // tiles_t)
    t0 = tl.program_id(0) % tiles_t * BLOCK_T
    m0 = m_tile * BLOCK
    STEPS: tl.constexpr = BLOCK // BLOCK_C
    acc = tl.zeros([BLOCK_T, BLOCK], tl.float32)
    for i in range(tl.load(starts + m_tile) * STEPS, tl.load(starts + m_tile + 1) * STEPS):
        c = tl.load(index + i // STEPS) * BLOCK + i % STEPS * BLOCK_C
        a = load_tile(x, t0, c, T, C, BLOCK_T, BLOCK_C, DESCRIPTOR, UPCAST)
        if INPUT_GRAD:
            b = load_tile(weight, c, m0, N, K, BLOCK_C, BLOCK, DESCRIPTOR, UPCAST)
        else:
            b = load_tile(weight, m0, c, N, K, BLOCK, BLOCK_C, DESCRIPTOR, UPCAST).T
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    t, m = t0 + tl.arange(0, BLOCK_T), m0 + tl.arange(0, BLOCK)
    if HAS_BIAS:
        acc += tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    inside = (t[:, None] < T) & (m[None, :] < M)
    local = tl.arange(0, BLOCK_T)[:, None] * M + tl.arange(0, BLOCK)[None, :]
    tl.store(out + start(t0, m0, M) + local, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _block_weight_grad(
    dy,
    x,
    mask,
    grad_weight,
    starts,
    index,
    rows,
    T,
    N,
    K,
    DESCRIPTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``mask * (dy.T @ x)`` in the kept tiles; the rest of ``grad_weight`` is left as it is.

    How many tiles there are is known to the device alone: a program takes every so many-th.
    """
    tiles_n = tl.cdiv(N, BLOCK)
    for i in range(tl.program_id(0), tl.load(starts + tiles_n), tl.num_programs(0)):
        n0, k0 = tl.load(rows + i) * BLOCK, tl.load(index + i) * BLOCK
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for t in range(0, T, BLOCK_T):
            a = load_tile(dy, t, n0, T, N, BLOCK_T, BLOCK, DESCRIPTOR, UPCAST)
            b = load_tile(x, t, k0, T, K, BLOCK_T, BLOCK, DESCRIPTOR, UPCAST)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        n, k = n0 + tl.arange(0, BLOCK), k0 + tl.arange(0, BLOCK)
        inside = (n[:, None] < N) & (k[None, :] < K)
        acc = tl.where(load_mask(mask, n0, k0, N, K, BLOCK, BLOCK, False), acc, 0.0)
        local = tl.arange(0, BLOCK)[:, None] * K + tl.arange(0, BLOCK)[None, :]
        tl.store(grad_weight + start(n0, k0, K) + local, acc.to(grad_weight.dtype.element_ty), mask=inside)


def options(block: int) -> dict[str, int]:
    """How the product for tiles of a side is compiled. Two of the stages go to the list, which is read ahead."""
    return {"num_warps": 8 if block == 128 else 4, "num_stages": 5 if block == 128 else 6}


def block_matmul(
    x: Tensor,
    weight: Tensor,
    block: int,
    order: Tensor,
    starts: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    input_grad: bool = False,
) -> Tensor:
    """``x [T, K] @ weight.T + bias``, or with ``input_grad`` ``x [T, N] @ weight``, where other tiles are zero.

    Args:
        x, weight: contiguous, of one type: float32, bfloat16 or float16; weight ``[N, K]``, zeros in place.
        block: side of a tile: 128, 64 or 32.
        order, starts, index: a ``TileList`` of rows of tiles, or with ``input_grad`` of columns.
        bias: ``[N]`` or None.
    """
    n, k = weight.shape
    out = torch.empty(x.shape[0], k if input_grad else n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    summed = min(block, block_c(x.dtype))
    tile = (summed, block) if input_grad else (block, summed)
    (x_operand, w_operand), is_descriptor = operands((x, BLOCK_T, summed), (weight, *tile))
    with on_device(x.device):
        _block_matmul[(triton.cdiv(out.shape[0], BLOCK_T) * len(order),)](
            *(x_operand, w_operand, bias, out, order, starts, index, x.shape[0], n, k),
            INPUT_GRAD=input_grad,
            HAS_BIAS=bias is not None,
            DESCRIPTOR=is_descriptor,
            BLOCK=block,
            BLOCK_T=BLOCK_T,
            BLOCK_C=summed,
            PRECISION=precision(x.dtype),
            UPCAST=upcast(),
            **options(block),
        )
    return out


def block_weight_grad(
    dy: Tensor, x: Tensor, mask: Tensor, block: int, starts: Tensor, index: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """``mask * (dy.T @ x)`` in ``dtype``, of which only the tiles that hold a True are computed.

    Args:
        dy, x: contiguous ``[T, N]`` and ``[T, K]``, of one type: float32, bfloat16 or float16.
        mask: contiguous bool ``[N, K]``.
        block, starts, index: as in :func:`block_matmul`, of rows of tiles.
        rows: of each tile of the list, the row.
    """
    (t, n), k = dy.shape, x.shape[1]
    grad = torch.zeros(n, k, dtype=dtype, device=x.device)
    if grad.numel():
        summed = block_c(x.dtype)
        (dy_operand, x_operand), is_descriptor = operands((dy, summed, block), (x, summed, block))
        with on_device(x.device):
            _block_weight_grad[(min(len(index), 2 * gpu.processors(x.device)),)](
                *(dy_operand, x_operand, mask.view(torch.int8), grad, starts, index, rows, t, n, k),
                DESCRIPTOR=is_descriptor,
                BLOCK=block,
                BLOCK_T=summed,
                PRECISION=precision(x.dtype),
                UPCAST=upcast(),
                num_warps=options(block)["num_warps"],
                num_stages=3,
            )
    return grad
