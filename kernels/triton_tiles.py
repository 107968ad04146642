"""Which tiles of a mask hold a True, and lists of them, in Triton, for :mod:`.block_sparse`.

What is made has a size that does not depend on the mask, and nothing waits for the device: a CUDA graph can make the
lists anew in every replay, so that they follow the mask. Imported where it is needed, since it imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import launch

# Tiles of a row that a program looks at, where their bytes are side by side: by bytes, and by words.
_ABREAST, _ABREAST_WORDS = 8, 4
_WIDTH = 1024  # entries of a list, or positions


@triton.jit
def _occupied_tiles(
    mask,
    tiles,
    sides,
    N,
    K,
    TAPS,
    stride_n,
    stride_k,
    stride_tap,
    BLOCK: tl.constexpr,
    ABREAST: tl.constexpr,
    SIDES: tl.constexpr,
    PER_WORD: tl.constexpr,
):
    """Which of ABREAST tiles of side BLOCK hold a True. With SIDES that marks its output and its input too.

    The mask is of words of so many inputs, which K and the strides count. Without SIDES these need not be told apart.
    """
    ACROSS: tl.constexpr = BLOCK // PER_WORD
    columns = tl.cdiv(K, ACROSS)
    groups = tl.cdiv(columns, ABREAST)
    row, column = tl.program_id(0) // groups, tl.program_id(0) % groups * ABREAST
    n, k = row * BLOCK + tl.arange(0, BLOCK), column * ACROSS + tl.arange(0, ACROSS * ABREAST)
    at = n[:, None].to(tl.int64) * stride_n + k[None, :].to(tl.int64) * stride_k
    inside = (n[:, None] < N) & (k[None, :] < K)
    column += tl.arange(0, ABREAST)
    of_outputs, of_inputs = tl.zeros([BLOCK], tl.int32), tl.zeros([ACROSS * ABREAST], tl.int32)
    for tap in range(0, TAPS):
        held = (tl.load(mask + at + tap * stride_tap, mask=inside, other=0) != 0).to(tl.int32)
        down = tl.max(held, 0)
        if SIDES:
            of_outputs, of_inputs = tl.maximum(of_outputs, tl.max(held, 1)), tl.maximum(of_inputs, down)
        of_tiles = tl.max(tl.reshape(down, [ABREAST, ACROSS]), 1).to(tl.int8)
        tl.store(tiles + (row * columns + column) * TAPS + tap, of_tiles, mask=column < columns)
    if SIDES:  # all who store there store the same
        tl.store(sides + n, tl.full([BLOCK], 1, tl.int8), mask=of_outputs != 0)
        tl.store(sides + N + k, tl.full([ACROSS * ABREAST], 1, tl.int8), mask=of_inputs != 0)


@triton.jit
def _mark_positions(
    positions, tiles, sides, size, limit, N, K, TAPS, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SIDES: tl.constexpr
):
    """Marks the tiles, outputs and inputs of flat positions in a mask of ``limit`` weights; negative ones are none."""
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    position = tl.load(positions + i, mask=i < size, other=-1)
    given = (position >= 0) & (position < limit)
    place, tap = position // TAPS, position % TAPS
    n, k = place // K, place % K
    one = tl.full([WIDTH], 1, tl.int8)
    tl.store(tiles + (n // BLOCK * tl.cdiv(K, BLOCK) + k // BLOCK) * TAPS + tap, one, mask=given)
    if SIDES:
        tl.store(sides + n, one, mask=given)
        tl.store(sides + N + k, one, mask=given)


@triton.jit
def _held(
    occupied,
    members,
    row,
    c,
    height,
    cols,
    stride_row,
    stride_col,
    REPEAT: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
):
    """What a list has in columns ``c``: 0 where it has no tile, else 1; of a pair 1 for the first, plus 2 for both."""
    at = c // REPEAT * stride_col
    if PAIRED:
        first, second = 2 * row, 2 * row + 1
        if HAS_MEMBERS:
            first, second = tl.load(members + first), tl.load(members + second)
        # Not (c < cols) & (first < height), of which the interpreter of Triton 3.9 makes no mask.
        width, second_width = tl.where(first < height, cols, 0), tl.where(second < height, cols, 0)
        one = tl.load(occupied + first // REPEAT * stride_row + at, mask=c < width, other=0)
        two = tl.load(occupied + second // REPEAT * stride_row + at, mask=c < second_width, other=0)
        return (one != 0).to(tl.int32) + 2 * (two != 0).to(tl.int32)
    return (tl.load(occupied + row * stride_row + at, mask=c < cols, other=0) != 0).to(tl.int32)


@triton.jit
def _count_tiles(
    occupied,
    members,
    counts,
    height,
    cols,
    stride_row,
    stride_col,
    REPEAT: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    count = tl.zeros([WIDTH], tl.int32)
    for c in range(0, cols, WIDTH):
        at = c + tl.arange(0, WIDTH)
        held = _held(occupied, members, row, at, height, cols, stride_row, stride_col, REPEAT, PAIRED, HAS_MEMBERS)
        count += (held != 0).to(tl.int32)
    tl.store(counts + row, tl.sum(count, 0))


@triton.jit
def _list_tiles(
    occupied,
    members,
    counts,
    order,
    starts,
    tiles,
    rows,
    height,
    cols,
    stride_row,
    stride_col,
    REPEAT: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_MEMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A list of the tiles of a row, or of a pair of rows, and its place among those of others."""
    row, lists = tl.program_id(0), tl.num_programs(0)
    mine = tl.load(counts + row)
    before, longer = tl.zeros([WIDTH], tl.int32), tl.zeros([WIDTH], tl.int32)
    for i in range(0, lists, WIDTH):
        other = i + tl.arange(0, WIDTH)
        count = tl.load(counts + other, mask=other < lists, other=-1)
        before += tl.where(other < row, count, 0)
        longer += ((count > mine) | ((count == mine) & (other < row))).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(order + tl.sum(longer, 0), row)
    tl.store(starts + row, start)
    if row == lists - 1:
        tl.store(starts + lists, start + mine)
    if PAIRED and not HAS_MEMBERS:
        tl.store(members + 2 * row, 2 * row)
        tl.store(members + 2 * row + 1, 2 * row + 1)
    for i in range(0, cols, WIDTH):
        c = i + tl.arange(0, WIDTH)
        held = _held(occupied, members, row, c, height, cols, stride_row, stride_col, REPEAT, PAIRED, HAS_MEMBERS)
        is_kept = (held != 0).to(tl.int32)
        at = start + tl.cumsum(is_kept, 0) - 1
        if PAIRED:
            tl.store(tiles + at, 4 * c + held, mask=held != 0)
        else:
            tl.store(tiles + at, c, mask=held != 0)
            tl.store(rows + at, tl.zeros([WIDTH], tl.int32) + row, mask=held != 0)
        start += tl.sum(is_kept, 0)


def occupied_tiles(mask: Tensor, block: int, sides: Tensor | None = None) -> Tensor:
    """Which tiles of side ``block`` of a bool mask ``[N, K, ...]`` hold a True: bool ``[ceil(N / block), ...]``.

    Args:
        mask: of any strides.
        block: a power of two.
        sides: bool ``[N + K]``; what is True is marked there at its output, and at N plus its input.
    """
    n, k, *taps = mask.shape
    maps = mask.view(torch.int8).flatten(2).transpose(1, 2) if taps else mask.view(torch.int8)[:, None]  # [N, taps, K]
    tiles = torch.empty(-(-n // block), -(-k // block), *taps, dtype=torch.bool, device=mask.device)
    if not tiles.numel():
        return tiles
    abreast, per_word = (_ABREAST, 1) if maps.stride(2) == 1 else (1, 1)
    if sides is None and block >= 16 and maps.stride(2) == 1 and _has_words(maps):
        maps, abreast, per_word = maps.view(torch.int32), _ABREAST_WORDS, 4
    stride_n, stride_tap, stride_k = maps.stride()
    launch(
        mask.device,
        _occupied_tiles,
        (tiles.shape[0] * triton.cdiv(tiles.shape[1], abreast),),
        *(maps, tiles.view(torch.int8), None if sides is None else sides.view(torch.int8)),
        *(n, maps.shape[2], maps.shape[1], stride_n, stride_k, stride_tap),
        BLOCK=block,
        ABREAST=abreast,
        SIDES=sides is not None,
        PER_WORD=per_word,
    )
    return tiles


def _has_words(maps: Tensor) -> bool:
    """Whether bytes side by side are words of four."""
    numbers = *maps.stride()[:2], maps.shape[2], maps.storage_offset(), maps.data_ptr()
    return not any(number % 4 for number in numbers)


def mark_positions(positions: Tensor, shape: torch.Size, tiles: Tensor, sides: Tensor | None, block: int) -> None:
    """Marks what holds a position: in ``tiles``, as of :func:`occupied_tiles`, and in ``sides`` ``[N + K]`` or None.

    Args:
        positions: int64, flat and row-major in a mask of ``shape``; negative ones are padding.
    """
    n, k = shape[:2]
    positions = positions.reshape(-1).contiguous()
    if positions.numel() and tiles.numel():
        taps = shape[2:].numel()
        launch(
            tiles.device,
            _mark_positions,
            (triton.cdiv(positions.numel(), _WIDTH),),
            *(positions, tiles.view(torch.int8), None if sides is None else sides.view(torch.int8)),
            *(positions.numel(), n * k * taps, n, k, taps),
            BLOCK=block,
            WIDTH=_WIDTH,
            SIDES=sides is not None,
        )


def tile_list(occupied: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a ``TileList`` of ``occupied``, bool ``[rows, cols]`` of any strides."""
    return _lists(occupied, len(occupied), occupied.shape[1], 1, None)


def pair_list(occupied: Tensor, repeat: int, members: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of a ``PairList`` of tiles of half of the side ``repeat`` times that of those in ``occupied``.

    Args:
        occupied: bool ``[rows, cols]``, of any strides.
        repeat: 2 if each of its tiles counts as two by two, else 1.
        members: int32 ``[pairs, 2]``; by default rows side by side.
    """
    rows, cols = occupied.shape[0] * repeat, occupied.shape[1] * repeat
    given = members
    if members is None:
        members = torch.empty(-(-rows // 2), 2, dtype=torch.int32, device=occupied.device)
    order, starts, tiles, _ = _lists(occupied, len(members), cols, repeat, members, given is not None)
    return order, starts, tiles, members


def _lists(
    occupied: Tensor, lists: int, cols: int, repeat: int, members: Tensor | None, has_members: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = lists, lists, lists + 1, lists * cols, 0 if members is not None else lists * cols
    order, counts, starts, tiles, rows = (
        torch.empty(length, dtype=torch.int32, device=occupied.device) for length in lengths
    )
    if not lists:
        starts.zero_()
    else:
        source = occupied.view(torch.int8)
        sizes = occupied.shape[0] * repeat, cols, *occupied.stride()
        fixed = {"REPEAT": repeat, "PAIRED": members is not None, "HAS_MEMBERS": has_members, "WIDTH": _WIDTH}
        into = order, starts, tiles, rows
        launch(occupied.device, _count_tiles, (lists,), source, members, counts, *sizes, **fixed)
        launch(occupied.device, _list_tiles, (lists,), source, members, counts, *into, *sizes, **fixed)
    return order, starts, tiles, rows
