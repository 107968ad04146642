"""Lists of the tiles of a mask that hold a True, and products that touch no others.

A mask of a block pattern is zero in whole tiles, and so is its weight; any other mask may be as well. A tile is a
square of outputs and inputs, of a convolution at one tap, as the groups of ``masks.Block`` are. The lists are made on
the device, have the same length whatever the mask is, and are kept until the mask changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import gpu
from .dispatch import Structure

BLOCKS = (128, 64, 32)
"""Sides of the tiles, in the order of preference: what is the fastest for each tile first."""


class TileList(NamedTuple):
    """Kept tiles, row by row; all int32.

    Attributes:
        order: ``[rows]``, all rows of tiles, those with the most kept tiles first.
        starts: ``[rows + 1]``, where those of a row begin in ``tiles``; the last is how many there are.
        tiles: ``[rows * cols]``, column of each kept tile: of a convolution that of its channels times the number of
            taps, plus the tap. What comes after the last is not to be used.
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor


def tile_list(occupied: Tensor) -> TileList:
    """The list of ``occupied`` (bool ``[rows, cols]``), without waiting for the device."""
    rows, cols = occupied.shape
    counts = occupied.sum(1)
    starts = F.pad(counts.cumsum(0), (1, 0))
    # The occupied ones first, each group in row-major order.
    index = torch.sort(occupied.reshape(-1), descending=True, stable=True).indices % max(cols, 1)
    order = torch.sort(counts, descending=True, stable=True).indices
    return TileList(order.int(), starts.int(), index.int())


def occupied_tiles(mask: Tensor, block: int) -> Tensor:
    """Which tiles of a bool mask ``[N, K, ...]`` hold a True: bool ``[ceil(N / block), ceil(K / block), ...]``."""
    n, k, *taps = mask.shape
    padded = F.pad(mask, (*[0, 0] * len(taps), 0, -k % block, 0, -n % block))
    return padded.view(-(-n // block), block, -(-k // block), block, *taps).any(3).any(1)


Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups of a convolution; here of one group."""


class BlockLayout:
    """The tiles of side ``block`` that a mask keeps, from both sides.

    Attributes:
        block: the side.
        density: fraction of tiles that are kept; a hint, of how many parts the weight gradient is summed in.
        occupied: bool, which tiles are kept: ``[ceil(N / block), ceil(K / block)]``, of a convolution with taps.
        by_row: list of the mask.
        row_of: int32, the row of each tile of ``by_row``.
    """

    def __init__(self, block: int, occupied: Tensor, density: float) -> None:
        self.block, self.density, self.occupied = block, density, occupied
        self.by_row = tile_list(occupied.flatten(1))
        kept = torch.arange(occupied.numel(), device=occupied.device, dtype=torch.int32)
        self.row_of = torch.searchsorted(self.by_row.starts, kept, right=True, out_int32=True) - 1
        self._by_column: dict[tuple, TileList] = {}

    @property
    def by_column(self) -> TileList:
        """List of the transposed mask."""
        return self.for_input_grad(((1, 1), (0, 0), (1, 1), 1))

    def for_input_grad(self, geometry: Geometry) -> TileList:
        """List of the transposed mask for the input gradient of a convolution.

        The taps that reach a pixel hang on its row and column modulo the stride. Pixels of one such phase have lists of
        their own, of those taps alone: rows are (phase down, phase across, tile of inputs).
        """
        strides = tuple(geometry[0])
        key = (strides, tuple(geometry[1]), tuple(geometry[2])) if max(strides) > 1 else ()
        if key not in self._by_column:
            kept = self.occupied.transpose(0, 1)
            if key:
                down, across = (
                    (torch.arange(stride)[:, None] + padding - torch.arange(taps) * dilation) % stride == 0
                    for stride, padding, dilation, taps in zip(*geometry[:3], kept.shape[2:], strict=True)
                )
                reached = down[:, None, :, None] & across[None, :, None, :]  # [phase, phase, tap, tap]
                kept = (reached[:, :, None, None].to(kept.device) & kept).flatten(0, 2)
            self._by_column[key] = tile_list(kept.flatten(1))
        return self._by_column[key]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, K] @ weight.T + bias``; weight ``[N, K]`` has zeros where the mask is False."""
        from . import triton_block_sparse

        return triton_block_sparse.block_matmul(x, weight, self.block, *self.by_row, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy [T, N] @ weight``."""
        from . import triton_block_sparse

        return triton_block_sparse.block_matmul(dy, weight, self.block, *self.by_column, input_grad=True)

    def weight_grad(self, dy: Tensor, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``mask * (dy.T @ x)`` in ``dtype``; without a mask ``dy.T @ x`` in the kept tiles, and zero elsewhere."""
        return self._weight_grad(dy, x, mask, (dy.shape[1], x.shape[1]), dtype, None)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Convolution of maps with ``weight [N, K, R, S]``, all in channels_last; zeros where the mask is False."""
        from . import triton_block_sparse, triton_conv2d

        size = triton_conv2d.output_size(x, weight, geometry)
        return triton_block_sparse.block_conv2d(x, weight, self.block, *self.by_row, bias, size, geometry)

    def conv2d_input_grad(self, dy: Tensor, weight: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
        """Gradient of its input, of ``size``, from that of its output."""
        from . import triton_block_sparse

        lists = self.for_input_grad(geometry)
        return triton_block_sparse.block_conv2d(dy, weight, self.block, *lists, None, size, geometry, input_grad=True)

    def conv2d_weight_grad(
        self, dy: Tensor, x: Tensor, mask: Tensor | None, taps: Sequence[int], dtype: torch.dtype, geometry: Geometry
    ) -> Tensor:
        """As :meth:`weight_grad`, of a convolution; maps and mask lie in channels_last, and so does the result."""
        return self._weight_grad(dy, x, mask, (dy.shape[1], x.shape[1], *taps), dtype, geometry)

    def _weight_grad(
        self,
        dy: Tensor,
        x: Tensor,
        mask: Tensor | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        geometry: Geometry | None,
    ) -> Tensor:
        from . import triton_block_sparse

        # Few tiles leave most of the device idle, unless the rows are split between several programs.
        kept, rows = max(round(self.density * self.occupied.numel()), 1), dy.numel() // max(shape[0], 1)
        splits = max(1, min(8, 2 * gpu.processors(x.device) // kept, rows // 512))
        lists = self.by_row.starts, self.by_row.tiles, self.row_of
        return triton_block_sparse.block_weight_grad(
            dy, x, mask, shape, self.block, *lists, dtype, geometry, splits=splits
        )


class Slices:
    """Outputs and inputs that a mask of a linear layer or convolution does not drop as a whole.

    Attributes:
        rows, columns: int64, ascending; None where all are kept.
        density: fraction of the dense products that is left.
    """

    def __init__(self, mask: Tensor, kept_rows: int, kept_columns: int) -> None:
        by_row = mask.flatten(1).any(1)
        by_column = mask.transpose(0, 1).flatten(1).any(1)
        self.rows = None if kept_rows == mask.shape[0] else by_row.nonzero().squeeze(1)
        self.columns = None if kept_columns == mask.shape[1] else by_column.nonzero().squeeze(1)
        self.density = kept_rows * kept_columns / (mask.shape[0] * mask.shape[1])

    def outputs(self, tensor: Tensor, dim: int) -> Tensor:
        """Of a tensor with all outputs along ``dim``, those that are kept; in channels_last if it is."""
        return tensor if self.rows is None else _select(tensor, dim, self.rows)

    def inputs(self, tensor: Tensor, dim: int) -> Tensor:
        """Likewise with inputs."""
        return tensor if self.columns is None else _select(tensor, dim, self.columns)

    def weight(self, weight: Tensor) -> Tensor:
        """The smaller weight, of both."""
        return self.inputs(self.outputs(weight, 0), 1)

    def expand_outputs(self, tensor: Tensor, dim: int, size: int, channels_last: bool = False) -> Tensor:
        """The inverse of :meth:`outputs`, with zeros for what was dropped; ``size`` along ``dim``."""
        return _expand(tensor, dim, self.rows, size, channels_last)

    def expand_inputs(self, tensor: Tensor, dim: int, size: int, channels_last: bool = False) -> Tensor:
        """The inverse of :meth:`inputs`."""
        return _expand(tensor, dim, self.columns, size, channels_last)


_NHWC, _NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """``index_select``, which of channels_last would make rows."""
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.index_select(dim, index)
    return tensor.permute(_NHWC).index_select(_NHWC.index(dim), index).permute(_NCHW)


def _expand(tensor: Tensor, dim: int, index: Tensor | None, size: int, channels_last: bool) -> Tensor:
    if index is None:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    full = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    return full.zero_().index_copy_(dim, index, tensor)


class _Seen(NamedTuple):
    state: tuple
    stream: Any
    occupied: dict[int, Tensor]
    densities: dict[int, float]
    kept: tuple[int, int]
    layouts: dict[int, BlockLayout]
    slices: list[Slices]
    structures: dict[bool, Structure]
    holds: WeakTensorKeyDictionary  # of positions: (their state, the answers)


_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_NOTHING = Structure()


def tile_densities(mask: Tensor) -> dict[int, float] | None:
    """Fraction of tiles of each of :data:`BLOCKS` that a bool mask ``[N, K, ...]`` keeps; None if not to be asked for.

    Asked for once for every change of the mask, since it waits for the device; not while a CUDA graph is captured.
    """
    seen = _look_at(mask)
    return None if seen is None else seen.densities


def structure(mask: Tensor, tiles: bool = True) -> Structure:
    """What a mask drops as a whole, in ``tiles`` too or not; nothing where that may not be asked for, as above."""
    seen = _look_at(mask)
    if seen is None:
        return _NOTHING
    found = seen.structures.get(tiles)
    if found is None:
        slices = seen.kept[0] * seen.kept[1] / (mask.shape[0] * mask.shape[1])
        found = seen.structures[tiles] = Structure(tuple(seen.densities.items()) if tiles else (), slices)
    return found


def slices(mask: Tensor) -> Slices:
    """The :class:`Slices` of a mask whose :func:`structure` is known; kept until the mask changes."""
    seen = _look_at(mask)
    assert seen is not None
    if not seen.slices:
        seen.slices.append(Slices(mask, *seen.kept))
    return seen.slices[0]


def layout(mask: Tensor, block: int) -> BlockLayout:
    """The layout of a mask whose :func:`tile_densities` are known; kept until the mask changes."""
    seen = _look_at(mask)
    assert seen is not None
    if block not in seen.layouts:
        seen.layouts[block] = BlockLayout(block, seen.occupied[block], seen.densities[block])
    return seen.layouts[block]


def holds(mask: Tensor, positions: Tensor) -> dict[int, bool]:
    """Whether all ``positions`` lie in tiles that ``mask`` keeps, by their side.

    Under 0, whether they lie in outputs and inputs that are not dropped as a whole. Asked for once for every change of
    mask or positions, since it waits for the device; of a mask whose :func:`tile_densities` are known.

    Args:
        mask: bool ``[N, K, ...]``.
        positions: int64, flat and row-major in the mask; negative ones are padding.
    """
    seen = _look_at(mask)
    assert seen is not None
    if all(density == 1 for density in seen.densities.values()) and seen.kept == mask.shape[:2]:
        return dict.fromkeys((0, *BLOCKS), True)
    if positions.is_inference():  # it may change unseen
        return dict.fromkeys((0, *BLOCKS), False)
    state = positions._version, positions.data_ptr(), positions.shape
    found = seen.holds.get(positions)
    if found is None or found[0] != state:
        at, k, taps = positions.clamp(min=0), mask.shape[1], mask.shape[2:].numel()
        row, column, tap = at // (k * taps), at // taps % k, at % taps
        inside = [mask.flatten(1).any(1)[row] & mask.transpose(0, 1).flatten(1).any(1)[column]]
        for block, occupied in seen.occupied.items():
            inside.append(occupied.reshape(*occupied.shape[:2], -1)[row // block, column // block, tap])
        answers = torch.stack([(tile | (positions < 0)).all() for tile in inside]).tolist()
        found = seen.holds[positions] = state, dict(zip((0, *BLOCKS), answers, strict=True))
    return found[1]


def _state(mask: Tensor) -> tuple:
    return mask._version, mask.data_ptr(), mask.shape, mask.stride()


def _look_at(mask: Tensor) -> _Seen | None:
    # A graph would go on with lists that a change of the mask frees.
    if mask.is_inference() or not mask.numel() or gpu.is_capturing(mask.device):
        return None
    seen = _seen.get(mask)
    if seen is None or seen.state != _state(mask):
        _look_again(mask)
        seen = _seen[mask]
    return seen


def _look_again(asked: Tensor) -> None:
    """Look at a mask, and at every other that has changed and was last looked at in this stream: with a single wait."""
    stream = gpu.stream(asked.device)
    stale = [m for m, seen in list(_seen.items()) if seen.stream == stream and seen.state != _state(m)]
    stale = [m for m in stale if m is not asked and m.device == asked.device and m.numel()]
    looks: list[dict[int, Tensor]] = []
    numbers: list[Tensor] = []
    for mask in (asked, *stale):
        small = occupied_tiles(mask, BLOCKS[-1])
        occupied = {
            block: small if block == BLOCKS[-1] else occupied_tiles(small, block // BLOCKS[-1]) for block in BLOCKS
        }
        looks.append(occupied)
        sides = mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1)
        numbers.append(torch.stack([side.sum() for side in (*occupied.values(), *sides)]))
    counts = torch.stack(numbers).tolist()
    for mask, occupied, (*tiles, rows, columns) in zip((asked, *stale), looks, counts, strict=True):
        densities = {block: n / occupied[block].numel() for block, n in zip(occupied, tiles, strict=True)}
        made: Any = {}, [], {}, WeakTensorKeyDictionary()  # nothing yet
        _seen[mask] = _Seen(_state(mask), stream, occupied, densities, (rows, columns), *made)
