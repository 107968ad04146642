"""Pure-torch truth of every op.

Three uses: the oracle that every kernel is tested against, the fallback where nothing faster runs, and the baseline of
the benchmarks. Everything here is ordinary differentiable torch, works in any dtype and on any device, and is written
to be read rather than to be fast.

Notation: ``theta`` the weight, ``m`` the boolean mask (True = kept), ``z = m * theta`` the effective weight and
``G = dloss/dz`` its gradient. Both gradients of the product follow from ``G``: ``dtheta = m * G``, ``dm = theta * G``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def effective_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``z = m * theta``, selected rather than multiplied: an inf or NaN under a zero of the mask stays hidden.

    In ``dtype``, by default that of the weight.
    """
    z = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    # torch 2.11 compiles a zero gradient for an autograd.Function that ends in a conversion to the same type.
    return z if dtype is None or dtype == z.dtype else z.to(dtype)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ (m * theta).T + bias``.

    Shapes: input ``[..., K]``, weight and mask ``[N, K]``, bias ``[N]``; returns ``[..., N]``.
    """
    return F.linear(input, effective_weight(weight, mask, input.dtype), bias)


def linear_input_grad(grad_output: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """Gradient ``[..., K]`` of the input of a linear layer, from that of its output ``[..., N]``."""
    return masked_linear(grad_output, weight.t(), mask.t())


def linear_weight_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """``G [N, K]`` of a linear layer, from the gradient of its output ``[..., N]`` and its input ``[..., K]``."""
    return grad_output.reshape(-1, grad_output.shape[-1]).t().mm(input.reshape(-1, input.shape[-1]))


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with ``m * theta``.

    Shapes: input ``[B, C, H, W]``, weight and mask ``[N, C / groups, R, S]``, bias ``[N]``; returns ``[B, N, P, Q]``.
    """
    return F.conv2d(input, effective_weight(weight, mask, input.dtype), bias, stride, padding, dilation, groups)


def gather_support(grad: Tensor, positions: Tensor) -> Tensor:
    """``G`` at flat ``positions`` (int64 ``[capacity]``, row-major; negative entries are padding and give 0)."""
    values = grad.reshape(-1)[positions.clamp(min=0)]
    return torch.where(positions >= 0, values, torch.zeros((), dtype=values.dtype, device=values.device))


def binarize(scores: Tensor, k: int | Tensor) -> Tensor:
    """Boolean mask of the ``k`` largest scores; equal scores are taken in row-major order."""
    return binarize_rows(scores.reshape(1, -1), k).view(scores.shape)


def binarize_rows(scores: Tensor, k: int | Tensor) -> Tensor:
    """Boolean mask of the ``k`` largest scores of each row; shapes ``[N, K]``. A tensor ``k`` is read on its device.

    A stable sort settles the ties. NaN has no rank and must be refused by the caller.
    """
    # Adding zero turns -0.0 into +0.0: the two are equal and must tie.
    order = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(k, int):
        return mask.scatter_(1, order[:, :k], True)
    return mask.scatter_(1, order, (torch.arange(scores.shape[1], device=scores.device) < k).expand_as(order))


def unpacked(words: Tensor, shape: torch.Size) -> Tensor:
    """The boolean mask ``shape`` of its int64 words, see ``BinaryMask``."""
    bits = words[:, None] >> torch.arange(64, device=words.device) & 1
    return bits.reshape(-1)[: shape.numel()].view(shape).bool()


def split_gradient(
    grad: Tensor, weight: Tensor, mask: Tensor, needs: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``m * G``, ``theta * G`` and ``G``, where ``needs`` asks: the first in the weight's dtype, the others in float32.

    In float64 if ``G`` is.
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    need_weight, need_scores, need_sink = needs
    return (
        effective_weight(grad, mask).to(weight.dtype) if need_weight else None,
        weight.to(wide.dtype) * wide if need_scores else None,
        wide if need_sink else None,
    )


def mask_words(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as int64 words and what comes before each 1024th position, see ``BinaryMask``."""
    flat = mask.reshape(-1).long()
    bits = F.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    counts = F.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024).sum(1).cumsum(0)
    return (bits << torch.arange(64, device=mask.device)).sum(1), F.pad(counts, (1, 0))


def tiles_of(mask: Tensor, block: int, sides: Tensor | None = None) -> Tensor:
    """Which tiles of a bool mask ``[N, K, ...]`` hold a True: bool ``[ceil(N / block), ceil(K / block), ...]``.

    Outputs and inputs that hold one are marked in ``sides``, bool ``[N + K]``.
    """
    n, k, *taps = mask.shape
    if sides is not None:
        sides |= torch.cat([mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1)])
    padded = F.pad(mask, (*[0, 0] * len(taps), 0, -k % block, 0, -n % block))
    return padded.view(-(-n // block), block, -(-k // block), block, *taps).any(3).any(1)


def tile_list(occupied: Tensor) -> tuple[Tensor, ...]:
    """The fields of a ``TileList`` of bool ``[rows, cols]``."""
    rows, cols = (torch.arange(size, device=occupied.device) for size in occupied.shape)
    return _sorted_lists(occupied, cols.expand_as(occupied), rows[:, None].expand_as(occupied))


def pair_list(occupied: Tensor, repeat: int, members: Tensor | None = None) -> tuple[Tensor, ...]:
    """The fields of a ``PairList``; of each tile ``repeat`` by ``repeat``, and without ``members`` of neighbours."""
    occupied = occupied.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1)
    occupied = F.pad(occupied, (0, 0, 0, len(occupied) % 2))
    if members is None:
        members = torch.arange(len(occupied), device=occupied.device, dtype=torch.int32).view(-1, 2)
    first, second = occupied[members.long()].unbind(1)
    columns = torch.arange(occupied.shape[1], device=occupied.device)
    return *_sorted_lists(first | second, 4 * columns + first + 2 * second), members


def _sorted_lists(occupied: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Rows by how many are occupied, where each begins, and ``values`` of the occupied ones in row-major order."""
    counts = occupied.sum(1)
    starts = F.pad(counts.cumsum(0), (1, 0))
    index = torch.sort(occupied.reshape(-1), descending=True, stable=True).indices
    order = torch.sort(counts, descending=True, stable=True).indices
    return order.int(), starts.int(), *(value.reshape(-1)[index].int() for value in values)


def occupied_tiles(words: Tensor, height: int, width: int, rows: int, cols: int) -> Tensor:
    """Which tiles ``[rows, cols]`` of a mask ``[height, width]``, given as words, hold a True."""
    bits = words[:, None] >> torch.arange(64, device=words.device) & 1
    mask = bits.reshape(-1)[: height * width].view(height, width)
    mask = F.pad(mask, (0, -width % cols, 0, -height % rows))
    down, across = mask.shape[0] // rows, mask.shape[1] // cols
    return mask.view(down, rows, across, cols).sum((1, 3)) > 0


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``F.batch_norm``, then ``+ residual``, then ReLU. Shapes: input ``[B, C, H, W]``, vectors ``[C]``."""
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a batch normalization, as differentiable functions of all operands.

    ``statistics`` are mean and 1 / deviation, ``[C, 1, 1]``, if they are constants; else they are those of the batch.
    """
    x, grad = (t.float() if t.dtype == torch.bfloat16 else t for t in (input, grad_output))
    if statistics is None:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        inverse = torch.rsqrt(var + eps)
    else:
        mean, inverse = statistics
    normalized = (x - mean) * inverse
    grad_weight, grad_bias = (grad * normalized).sum((0, 2, 3)), grad.sum((0, 2, 3))
    grad = grad if weight is None else grad * weight[:, None, None]
    if statistics is None:
        means = ((t * grad).mean((0, 2, 3), keepdim=True) for t in (1.0, normalized))
        grad = grad - next(means) - normalized * next(means)
    return (grad * inverse).to(input.dtype), grad_weight, grad_bias


# -- sparse messages: masks as bits, their positions in four formats, CRC-32C (docs/message-format.md) -----------------
# In numpy, which has the integers. Bits are uint64 ``[ceil(n / 64)]``, zero beyond ``n``; bytes are uint8 arrays.

_BLOCK, _ESCAPE = 1 << 16, 255  # elements of a block of block16; byte of delta8 that skips so many elements
_CRC_POLYNOMIAL = 0x82F63B78


def mask_to_bits(mask: np.ndarray) -> np.ndarray:
    """Bits of a flat boolean mask."""
    bits = np.zeros(-(-mask.size // 64) * 8, np.uint8)
    packed = np.packbits(mask, bitorder="little")
    bits[: packed.size] = packed
    return bits.view("<u8")


def bits_to_mask(bits: np.ndarray, n: int) -> np.ndarray:
    return np.unpackbits(bits.view(np.uint8), bitorder="little")[:n].view(bool)


def summarize_bits(bits: np.ndarray, n: int) -> tuple[int, int, int, int]:
    """Number of bits set, hash of all of them, and the bytes that hierarchical and delta8 take."""
    positions = np.flatnonzero(bits_to_mask(bits, n))
    x = bits ^ (np.arange(1, bits.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    groups = np.count_nonzero(bits.view(np.uint8))
    escapes = int(((np.diff(positions, prepend=-1) - 1) // _ESCAPE).sum())
    return positions.size, int(x.sum(dtype=np.uint64)), bits.size + groups, positions.size + escapes


def encode_positions(format: str, bits: np.ndarray, n: int) -> np.ndarray:
    """Bytes that name the bits set; of n = 0 none."""
    if format == "bitmap":
        return bits.view(np.uint8)[: -(-n // 8)]
    if format == "hierarchical":
        groups = bits.view(np.uint8)
        return np.concatenate([np.packbits(groups != 0, bitorder="little"), groups[groups != 0]])
    positions = np.flatnonzero(bits_to_mask(bits, n))
    if format == "delta8":
        gaps = np.diff(positions, prepend=-1) - 1
        ends = np.cumsum(gaps // _ESCAPE + 1)
        out = np.full(ends[-1] if ends.size else 0, _ESCAPE, np.uint8)
        out[ends - 1] = gaps % _ESCAPE
        return out
    counts = np.bincount(positions // _BLOCK, minlength=-(-n // _BLOCK)).astype("<u4")
    return np.concatenate([counts.view(np.uint8), (positions % _BLOCK).astype("<u2").view(np.uint8)])


def decode_positions(format: str, data: np.ndarray, n: int) -> np.ndarray | None:
    """The bits; None unless ``data`` is exactly what :func:`encode_positions` gives for some ``n`` bits."""
    words, mask = -(-n // 64), np.zeros(n, bool)
    if format == "bitmap":
        if data.size != -(-n // 8):
            return None
        bits = np.zeros(8 * words, np.uint8)
        bits[: data.size] = data
    elif format == "hierarchical":
        if data.size < words:
            return None
        top, groups = np.unpackbits(data[:words], bitorder="little").view(bool), data[words:]
        if groups.size != np.count_nonzero(top) or not groups.all():
            return None
        bits = np.zeros(8 * words, np.uint8)
        bits[top] = groups
    elif format == "delta8":
        if data.size and data[-1] == _ESCAPE:  # escapes to nowhere
            return None
        positions = (np.cumsum(data, dtype=np.int64) + np.cumsum(data != _ESCAPE) - 1)[data != _ESCAPE]
        if positions.size and positions[-1] >= n:
            return None
        mask[positions] = True
        return mask_to_bits(mask)
    else:
        blocks = -(-n // _BLOCK)
        if data.size < 4 * blocks:
            return None
        counts = data[: 4 * blocks].copy().view("<u4").astype(np.int64)
        if data.size != 4 * blocks + 2 * int(counts.sum()):
            return None
        positions = data[4 * blocks :].copy().view("<u2") + np.repeat(np.arange(blocks) * _BLOCK, counts)
        if (positions[1:] <= positions[:-1]).any() or (positions >= n).any():
            return None
        mask[positions] = True
        return mask_to_bits(mask)
    words_of_bits = bits.view("<u8")
    return words_of_bits if n % 64 == 0 or words_of_bits[-1] >> np.uint64(n % 64) == 0 else None


def crc32c(data: np.ndarray) -> int:
    """CRC-32C (Castagnoli) of bytes, in columns that are computed side by side and then joined."""
    rows = 256
    head = data[: data.size % rows]
    crc = _crc_of_rows(head[:, None], 0xFFFFFFFF)[0]
    # A column's checksum from zero; that of the whole is linear in them and in what came before.
    columns = _crc_of_rows(data[head.size :].reshape(-1, rows).T, 0)
    columns = np.concatenate([[crc], columns])
    size = rows
    while columns.size > 1:  # neighbours are joined; zeros in front change nothing
        if columns.size % 2:
            columns = np.concatenate([[0], columns])
        columns = _crc_multiply(columns[::2], _crc_power(size)) ^ columns[1::2]
        size *= 2
    return int(columns[0]) ^ 0xFFFFFFFF


def _crc_of_rows(rows: np.ndarray, start: int) -> np.ndarray:
    table = np.arange(256, dtype=np.int64)
    for _ in range(8):
        table = (table >> 1) ^ ((table & 1) * _CRC_POLYNOMIAL)
    crc = np.full(rows.shape[1], start, np.int64)
    for row in rows:
        crc = (crc >> 8) ^ table[(crc ^ row) & 0xFF]
    return crc


def _crc_multiply(a: np.ndarray, b: int) -> np.ndarray:
    """Product of polynomials over GF(2) modulo that of CRC-32C, the highest power in the lowest bit."""
    product = np.zeros_like(a)
    for bit in range(31, -1, -1):
        product ^= (a >> bit & 1) * b
        b = (b >> 1) ^ ((b & 1) * _CRC_POLYNOMIAL)
    return product


def _crc_power(size: int) -> int:
    """x to the ``8 * size``; ``size`` a power of two."""
    power = np.array([1 << 23])
    while size > 1:
        power = _crc_multiply(power, int(power[0]))
        size //= 2
    return int(power[0])
