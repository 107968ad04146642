"""Lists of the tiles of a mask that hold a True, and products that touch no others.

A mask of a block pattern is zero in whole tiles, and so is its weight; any other mask may be as well. The lists are
made on the device, have the same length whatever the mask is, and are kept until the mask changes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import gpu

BLOCKS = (128, 64, 32)
"""Sides of the tiles, in the order of preference: what is the fastest for each tile first."""


class TileList(NamedTuple):
    """Kept tiles, row by row; all int32.

    Attributes:
        order: ``[rows]``, all rows of tiles, those with the most kept tiles first.
        starts: ``[rows + 1]``, where those of a row begin in ``tiles``; the last is how many there are.
        tiles: ``[rows * cols]``, column of each kept tile. What comes after the last is not to be used.
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
    """Which tiles of a bool mask ``[N, K]`` hold a True: bool ``[ceil(N / block), ceil(K / block)]``."""
    mask = mask.flatten(1)
    n, k = mask.shape
    padded = F.pad(mask, (0, -k % block, 0, -n % block))
    return padded.view(-(-n // block), block, -(-k // block), block).any(3).any(1)


class BlockLayout:
    """The tiles of side ``block`` that a mask ``[N, K]`` keeps, from both sides.

    Attributes:
        block: the side.
        density: fraction of tiles that are kept.
        by_row, by_column: lists of the mask and of its transpose.
        row_of: int32, the row of each tile of ``by_row``.
    """

    def __init__(self, block: int, occupied: Tensor, density: float) -> None:
        self.block, self.density = block, density
        self.by_row, self.by_column = tile_list(occupied), tile_list(occupied.t())
        kept = torch.arange(occupied.numel(), device=occupied.device, dtype=torch.int32)
        self.row_of = torch.searchsorted(self.by_row.starts, kept, right=True, out_int32=True) - 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, K] @ weight.T + bias``; weight ``[N, K]`` has zeros where the mask is False."""
        from . import triton_block_sparse

        return triton_block_sparse.block_matmul(x, weight, self.block, *self.by_row, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy [T, N] @ weight``."""
        from . import triton_block_sparse

        return triton_block_sparse.block_matmul(dy, weight, self.block, *self.by_column, input_grad=True)

    def weight_grad(self, dy: Tensor, x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """``mask * (dy.T @ x)`` in ``dtype``."""
        from . import triton_block_sparse

        starts, tiles = self.by_row.starts, self.by_row.tiles
        return triton_block_sparse.block_weight_grad(dy, x, mask, self.block, starts, tiles, self.row_of, dtype)


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
        """Of a tensor with all outputs along ``dim``, those that are kept."""
        return tensor if self.rows is None else tensor.index_select(dim, self.rows)

    def inputs(self, tensor: Tensor, dim: int) -> Tensor:
        """Likewise with inputs."""
        return tensor if self.columns is None else tensor.index_select(dim, self.columns)

    def weight(self, weight: Tensor) -> Tensor:
        """The smaller weight, of both."""
        return self.inputs(self.outputs(weight, 0), 1)

    def expand_outputs(self, tensor: Tensor, dim: int, size: int) -> Tensor:
        """The inverse of :meth:`outputs`, with zeros for what was dropped; ``size`` along ``dim``."""
        return _expand(tensor, dim, self.rows, size)

    def expand_inputs(self, tensor: Tensor, dim: int, size: int) -> Tensor:
        """The inverse of :meth:`inputs`."""
        return _expand(tensor, dim, self.columns, size)


def _expand(tensor: Tensor, dim: int, index: Tensor | None, size: int) -> Tensor:
    if index is None:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    full = torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    return full.zero_().index_copy_(dim, index, tensor)


class _Seen(NamedTuple):
    state: tuple
    densities: dict[int, float]
    kept: tuple[int, int]
    layouts: dict[int, BlockLayout]
    slices: list[Slices]


_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tile_densities(mask: Tensor) -> dict[int, float] | None:
    """Fraction of tiles of each of :data:`BLOCKS` that a bool mask ``[N, K]`` keeps; None if it may not be asked for.

    The mask of a 1x1 convolution, ``[N, K, 1, 1]``, is taken as it is, since what is known is kept by tensor. Asked for
    once for every change of the mask, since it waits for the device; not while a CUDA graph is captured.
    """
    seen = _look_at(mask)
    return None if seen is None else seen.densities


def slice_density(mask: Tensor) -> float | None:
    """Fraction of the products left when outputs and inputs that ``mask`` drops as a whole are; None as above."""
    seen = _look_at(mask)
    return None if seen is None else seen.kept[0] * seen.kept[1] / (mask.shape[0] * mask.shape[1])


def slices(mask: Tensor) -> Slices:
    """The :class:`Slices` of a mask whose :func:`slice_density` is known; kept until the mask changes."""
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
        occupied = occupied_tiles(mask, block)
        seen.layouts[block] = BlockLayout(block, occupied, seen.densities[block])
    return seen.layouts[block]


def _look_at(mask: Tensor) -> _Seen | None:
    # A graph would go on with lists that a change of the mask frees.
    if mask.is_inference() or not mask.numel() or gpu.is_capturing(mask.device):
        return None
    state = mask._version, mask.data_ptr(), mask.shape, mask.stride()
    seen = _seen.get(mask)
    if seen is None or seen.state != state:
        sides = mask.flatten(1).any(1).sum(), mask.transpose(0, 1).flatten(1).any(1).sum()
        fractions = [occupied_tiles(mask, block).double().mean() for block in BLOCKS]
        *found, rows, columns = torch.stack([*fractions, *(side.double() for side in sides)]).tolist()
        densities = dict(zip(BLOCKS, found, strict=True))
        seen = _seen[mask] = _Seen(state, densities, (int(rows), int(columns)), {}, [])
    return seen
