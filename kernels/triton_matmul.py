"""Products with masked weights in Triton: output and input gradient, and the weight gradient with all that follows.

The matrices are those of a linear layer, row-major: ``x [T, K]``, ``dy [T, N]``, weight and mask ``[N, K]``; a 1x1
convolution in channels_last is one with the pixels as rows. Imported where it is needed, since it imports Triton.

The mask is of bytes, or packed to 32-bit words along K, which must then be a multiple of 32. A word is loaded once and
spread by a reshape: with a pointer for each element the kernels would need more shared memory than there is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import gpu
from .gpu import launch, precision

# Rows and features of the output, and what is summed at a time. Registers and shared memory: tests/test_triton.py.
BLOCK_T, BLOCK_M, BLOCK_C = 128, 128, 64
_GROUP = 8  # tiles of rows side by side, so that their weights are in the L2 cache


@triton.jit
def start(row, col, cols):
    """Where a tile begins. What is 64 bits wide is this one number; offsets within a tile take half the registers."""
    return tl.cast(row, tl.int64) * cols + col


@triton.jit
def load_tile(
    source,
    row,
    col,
    rows,
    cols,
    R: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    UPCAST: tl.constexpr,
    TAPS: tl.constexpr = 1,
    tap=0,
):
    """The tile ``[R, C]`` at (row, col) of a row-major matrix ``[rows, cols]``; zero where it sticks out.

    Of one of TAPS such matrices, if those lie side by side. A descriptor knows nothing of that: there ``cols`` must be
    a multiple of C, or what sticks out must not matter.
    """
    if DESCRIPTOR:
        tile = source.load([row, tap * cols + col])
    else:
        r, c = row + tl.arange(0, R), col + tl.arange(0, C)
        inside = (r[:, None] < rows) & (c[None, :] < cols)
        local = tl.arange(0, R)[:, None] * (TAPS * cols) + tl.arange(0, C)[None, :]
        tile = tl.load(source + start(row, tap * cols + col, TAPS * cols) + local, mask=inside, other=0.0)
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_mask(mask, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr):
    """The tile ``[BLOCK_N, BLOCK_K]`` of a mask; False where it sticks out."""
    n = n0 + tl.arange(0, BLOCK_N)
    if BITS:
        word = k0 // 32 + tl.arange(0, BLOCK_K // 32)
        inside = (n[:, None] < N) & (word[None, :] * 32 < K)
        local = tl.arange(0, BLOCK_N)[:, None] * (K // 32) + tl.arange(0, BLOCK_K // 32)[None, :]
        words = tl.load(mask + start(n0, k0 // 32, K // 32) + local, mask=inside, other=0)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = tl.reshape(bits, [BLOCK_N, BLOCK_K]) != 0
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n[:, None] < N) & (k[None, :] < K)
        local = tl.arange(0, BLOCK_N)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
        keep = tl.load(mask + start(n0, k0, K) + local, mask=inside, other=0) != 0
    return keep


@triton.jit
def _load_transposed_mask(mask, n0, k0, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr):
    """The same as ``[BLOCK_K, BLOCK_N]``, loaded that way: transposing registers would go through shared memory."""
    n = n0 + tl.arange(0, BLOCK_N)
    if BITS:
        word = k0 // 32 + tl.arange(0, BLOCK_K // 32)
        inside = (n[None, :] < N) & (word[:, None] * 32 < K)
        local = tl.arange(0, BLOCK_N)[None, :] * (K // 32) + tl.arange(0, BLOCK_K // 32)[:, None]
        words = tl.load(mask + start(n0, k0 // 32, K // 32) + local, mask=inside, other=0)
        bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
        keep = tl.reshape(bits, [BLOCK_K, BLOCK_N]) != 0
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (n[None, :] < N) & (k[:, None] < K)
        local = tl.arange(0, BLOCK_N)[None, :] * K + tl.arange(0, BLOCK_K)[:, None]
        keep = tl.load(mask + start(n0, k0, K) + local, mask=inside, other=0) != 0
    return keep


@triton.jit
def _masked_matmul(
    x,
    weight,
    mask,
    bias,
    out,
    T,
    N,
    K,
    INPUT_GRAD: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``out [T, M]``, as its transpose ``A [M, C] @ x.T [C, T]`` with A the masked weight, or its transpose.

    So the masked weight is the left operand, which tensor cores take from registers, where the mask is applied.
    """
    if INPUT_GRAD:
        M, C = K, N
    else:
        M, C = N, K
    tiles_m, tiles_t = tl.cdiv(M, BLOCK_M), tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_m)
    height = min(tiles_t - group * GROUP, GROUP)
    t0 = (group * GROUP + pid % (GROUP * tiles_m) % height) * BLOCK_T
    m0 = pid % (GROUP * tiles_m) // height * BLOCK_M
    acc = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for c in range(0, C, BLOCK_C):
        b = load_tile(x, t0, c, T, C, BLOCK_T, BLOCK_C, DESCRIPTOR, UPCAST)
        if INPUT_GRAD:
            n, k = c + tl.arange(0, BLOCK_C), m0 + tl.arange(0, BLOCK_M)
            inside = (n[None, :] < N) & (k[:, None] < K)
            local = tl.arange(0, BLOCK_C)[None, :] * K + tl.arange(0, BLOCK_M)[:, None]
            a = tl.load(weight + start(c, m0, K) + local, mask=inside, other=0.0)
            keep = _load_transposed_mask(mask, c, m0, N, K, BLOCK_C, BLOCK_M, BITS)
            if UPCAST:
                a = a.to(tl.float32)
        else:
            a = load_tile(weight, m0, c, N, K, BLOCK_M, BLOCK_C, False, UPCAST)
            keep = load_mask(mask, m0, c, N, K, BLOCK_M, BLOCK_C, BITS)
        a = tl.where(keep, a, 0.0).to(b.dtype)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    m, t = m0 + tl.arange(0, BLOCK_M), t0 + tl.arange(0, BLOCK_T)
    if HAS_BIAS:
        acc += tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    inside = (m[:, None] < M) & (t[None, :] < T)
    local = tl.arange(0, BLOCK_T)[None, :] * M + tl.arange(0, BLOCK_M)[:, None]
    tl.store(out + start(t0, m0, M) + local, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_in_turn(acc, workspace, turns, tile, split, SPLITS: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The sums ``acc [N, K]`` of a part of a tile and of the parts before it, whose turn is waited for.

    And whether it is the last of them, which has the whole sum.
    """
    local = tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]
    sums = workspace + start(tile, 0, N * K) + local
    if split > 0:
        while tl.atomic_cas(turns + tile, split, split, sem="acquire") != split:
            pass
        acc += tl.load(sums, cache_modifier=".cg")  # not from the L1 cache, which others do not write to
    is_last = split == SPLITS - 1
    if not is_last:
        tl.store(sums, acc)
        tl.debug_barrier()
    tl.atomic_xchg(turns + tile, (split + 1) % SPLITS, sem="release")  # zero again for the next launch
    return acc, is_last


@triton.jit
def _weight_grad(
    dy,
    x,
    weight,
    mask,
    grad_weight,
    grad_scores,
    sink,
    workspace,
    turns,
    T,
    N,
    K,
    split_rows,
    SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    BITS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``G = dy.T @ x`` in float32 registers, and from there ``mask * G``, ``weight * G`` and ``G``.

    Programs walk over the tiles. With SPLITS > 1 the rows of a tile are split between as many programs, which add up in
    turn, the first first: the sum is the same in every run. There must be a program for each part then, since it waits
    for the one before.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    parts = tl.cdiv(N, BLOCK_N) * tiles_k * SPLITS
    for part in range(tl.program_id(0), parts, tl.num_programs(0)):
        tile, split = part // SPLITS, part % SPLITS
        n0, k0 = tile // tiles_k * BLOCK_N, tile % tiles_k * BLOCK_K
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for t in range(split * split_rows, min(T, (split + 1) * split_rows), BLOCK_T):
            a = load_tile(dy, t, n0, T, N, BLOCK_T, BLOCK_N, DESCRIPTOR, UPCAST)
            b = load_tile(x, t, k0, T, K, BLOCK_T, BLOCK_K, DESCRIPTOR, UPCAST)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        is_last = True
        if SPLITS > 1:
            acc, is_last = add_in_turn(acc, workspace, turns, tile, split, SPLITS, BLOCK_N, BLOCK_K)
        if is_last:
            n, k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
            at = start(n0, k0, K)
            local = tl.arange(0, BLOCK_N)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
            inside = (n[:, None] < N) & (k[None, :] < K)
            if HAS_WEIGHT:
                keep = load_mask(mask, n0, k0, N, K, BLOCK_N, BLOCK_K, BITS)
                kept = tl.where(keep, acc, 0.0)
                tl.store(grad_weight + at + local, kept.to(grad_weight.dtype.element_ty), mask=inside)
            if HAS_SCORES:
                w = tl.load(weight + at + local, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_scores + at + local, w * acc, mask=inside)
            if HAS_SINK:
                tl.store(sink + at + local, acc, mask=inside)


# -- launches ----------------------------------------------------------------------------------------------------------


def block_c(dtype: torch.dtype) -> int:
    """What is summed at a time: as many bytes of every type."""
    return BLOCK_C if dtype.itemsize == 2 else BLOCK_C // 2


def upcast() -> bool:
    """Whether tiles are turned to float32 as they are loaded: the interpreter is wrong about bfloat16."""
    return triton.knobs.runtime.interpret


def operand(matrix: Tensor, rows: int, cols: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """What a kernel gets to load tiles ``[rows, cols]`` of a matrix: a descriptor where large ones are used."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.itemsize % 16 == 0
    has_large_tiles = gpu.has_large_tiles(gpu.capability(matrix.device))
    if has_large_tiles and aligned and matrix.numel() and matrix.itemsize == 2:
        # Not from_tensor: of a single row the stride may be anything, which it would refuse.
        return TensorDescriptor(matrix, matrix.shape, [matrix.shape[1], 1], [rows, cols]), True
    return matrix, False


def operands(*matrices: tuple[Tensor, int, int]) -> tuple[list[Tensor | TensorDescriptor], bool]:
    """The same of several, of which all or none are descriptors."""
    made = [operand(*matrix) for matrix in matrices]
    if all(is_descriptor for _, is_descriptor in made):
        return [m for m, _ in made], True
    return [matrix for matrix, _, _ in matrices], False


def _mask_argument(mask: Tensor, cols: int) -> tuple[Tensor, bool]:
    """A mask as the kernels take it, and whether it is packed."""
    if mask.dtype == torch.bool:
        return mask.view(torch.int8), False
    if cols % 32:
        raise ValueError(f"mask is packed, and the weight has {cols} columns; expected a multiple of 32")
    return mask.view(torch.int32), True


def masked_matmul(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, *, input_grad: bool = False
) -> Tensor:
    """``x [T, K] @ (mask * weight).T + bias``, or with ``input_grad`` ``x [T, N] @ (mask * weight)``.

    Args:
        x: contiguous; float32, bfloat16 or float16.
        weight: contiguous ``[N, K]``; rounded to the type of ``x`` if it is of another.
        mask: contiguous bool ``[N, K]``, or its int64 words, see ``BinaryMask``, if 32 divides K.
        bias: ``[N]`` or None.

    Returns:
        ``[T, N]`` or ``[T, K]`` in the type of ``x``.
    """
    n, k = weight.shape
    out = torch.empty(x.shape[0], k if input_grad else n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    given, is_packed = _mask_argument(mask, k)
    bias = None if bias is None else bias.contiguous()
    block_t = min(BLOCK_T, max(16, triton.next_power_of_2(x.shape[0])))
    summed = block_c(x.dtype)
    (x_operand,), is_descriptor = operands((x, block_t, summed))
    grid = (triton.cdiv(out.shape[0], block_t) * triton.cdiv(out.shape[1], BLOCK_M),)
    launch(
        x.device,
        _masked_matmul,
        grid,
        *(x_operand, weight, given, bias, out, x.shape[0], n, k),
        INPUT_GRAD=input_grad,
        BITS=is_packed,
        HAS_BIAS=bias is not None,
        DESCRIPTOR=is_descriptor,
        BLOCK_T=block_t,
        BLOCK_M=BLOCK_M,
        BLOCK_C=summed,
        GROUP=_GROUP,
        PRECISION=precision(x.dtype),
        UPCAST=upcast(),
        num_warps=8,
        num_stages=3,
    )
    return out


def weight_tile(capability: tuple[int, int]) -> int:
    """Columns of a tile of the weight gradient: half as many where the sums would spill."""
    return BLOCK_M if gpu.has_large_tiles(capability) else BLOCK_M // 2


def grad_stages(is_descriptor: bool) -> int:
    """Tiles of the weight gradient that are on their way at a time."""
    return 4 if is_descriptor else 3


def weight_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    need_weight: bool = True,
    need_scores: bool = True,
    need_sink: bool = False,
    splits: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``mask * G``, ``weight * G`` and ``G = dy.T @ x``, where they are needed, without writing G in between.

    Args:
        dy, x: contiguous ``[T, N]`` and ``[T, K]`` of one type: float32, bfloat16 or float16.
        weight, mask: as in :func:`masked_matmul`.
        need_weight, need_scores, need_sink: which results are wanted; the others are None.
        splits: parts of T that are summed side by side; by default as many as keep the device busy, up to four.

    Returns:
        Gradient of the weight in its type; of the scores, and G, in float32.
    """
    (t, n), k = dy.shape, x.shape[1]
    needs = need_weight, need_scores, need_sink
    outs = [
        torch.empty_like(weight, dtype=dtype) if need else None
        for need, dtype in zip(needs, (weight.dtype, torch.float32, torch.float32), strict=True)
    ]
    if not weight.numel():
        return outs[0], outs[1], outs[2]
    block_k = weight_tile(gpu.capability(x.device))
    tiles = triton.cdiv(n, BLOCK_M) * triton.cdiv(k, block_k)
    processors, summed = gpu.processors(x.device), block_c(x.dtype)
    if splits is None:
        splits = max(1, min(4, processors // tiles, triton.cdiv(t, 4 * summed)))
    rows = triton.cdiv(triton.cdiv(max(t, 1), splits), summed) * summed
    given, is_packed = _mask_argument(mask, k)
    workspace = turns = None
    if splits > 1:
        workspace = torch.empty(tiles * BLOCK_M * block_k, dtype=torch.float32, device=x.device)
        turns = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    (dy_operand, x_operand), is_descriptor = operands((dy, summed, BLOCK_M), (x, summed, block_k))
    launch(
        x.device,
        _weight_grad,
        # The sums take all registers of a multiprocessor: as many programs as there are run side by side.
        (tiles * splits if splits > 1 else min(tiles, processors),),
        *(dy_operand, x_operand, weight, given, *outs, workspace, turns, t, n, k, rows),
        SPLITS=splits,
        HAS_WEIGHT=need_weight,
        HAS_SCORES=need_scores,
        HAS_SINK=need_sink,
        BITS=is_packed,
        DESCRIPTOR=is_descriptor,
        BLOCK_T=summed,
        BLOCK_N=BLOCK_M,
        BLOCK_K=block_k,
        PRECISION=precision(x.dtype),
        UPCAST=upcast(),
        num_warps=8,
        num_stages=grad_stages(is_descriptor),
    )
    return outs[0], outs[1], outs[2]
