"""Lists of the tiles of a mask that hold a True, and products that touch no others.

A mask of a block pattern is zero in whole tiles, and so is its weight; any other mask may be as well. A tile is a
square of outputs and inputs, of a convolution at one tap, as the groups of ``masks.Block`` are. The lists are made on
the device, have the same length whatever the mask is, and are kept until the mask changes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cuda_block_sparse, gpu, reference
from .apply_mask import keeps
from .dispatch import Structure

_SETTLED = 500  # products after which a mask seems to stay: pairing its rows well takes as long as it saves in so many

BLOCKS = (128, 64, 32)
"""Sides of the tiles, in the order of preference: what is the fastest for each tile first."""


class TileList(NamedTuple):
    """Kept tiles, row by row; all int32.

    Attributes:
        order: ``[rows]``, all rows of tiles, those with the most kept tiles first.
        starts: ``[rows + 1]``, where those of a row begin in ``tiles``; the last is how many there are.
        tiles: ``[rows * cols]``, column of each kept tile: of a convolution that of its channels times the number of
            taps, plus the tap. What comes after the last is not to be used.
        rows: ``[rows * cols]``, row of each kept tile.
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor
    rows: Tensor


class PairList(NamedTuple):
    """Kept tiles of side 64 by pairs of rows, which are multiplied with one load; all int32.

    Attributes:
        order, starts, tiles: as of a :class:`TileList`, of pairs; ``tiles`` has 4 times the column, plus 1 if the first
            of the pair has a tile there, plus 2 if the second has.
        members: ``[pairs, 2]``, which rows are a pair; one beyond the last where there is none.
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor
    members: Tensor


def occupied_tiles(mask: Tensor, block: int, sides: Tensor | None = None) -> Tensor:
    """Which tiles of a bool mask ``[N, K, ...]`` hold a True: bool ``[ceil(N / block), ceil(K / block), ...]``.

    Outputs and inputs that hold one are marked in ``sides``, bool ``[N + K]``.
    """
    if gpu.available(mask.device):
        from . import triton_tiles

        return triton_tiles.occupied_tiles(mask, block, sides)
    return reference.tiles_of(mask, block, sides)


def tile_list(occupied: Tensor) -> TileList:
    """The list of ``occupied`` (bool ``[rows, cols]``), without waiting for the device."""
    if gpu.available(occupied.device):
        from . import triton_tiles

        return TileList(*triton_tiles.tile_list(occupied))
    return TileList(*reference.tile_list(occupied))


def pair_list(occupied: Tensor, block: int, *, settled: bool = False) -> PairList:
    """The list of ``occupied`` tiles of side 64 or 128, of rows side by side.

    If the mask has ``settled``, of those that have much in common (:func:`match`). Results are the same to the bit.
    """
    members = match(occupied) if settled and block == 64 else None
    if gpu.available(occupied.device):
        from . import triton_tiles

        return PairList(*triton_tiles.pair_list(occupied, block // 64, members))
    return PairList(*reference.pair_list(occupied, block // 64, members))


def match(occupied: Tensor) -> Tensor:
    """Pairs of rows that have many columns in common: int32 ``[ceil(rows / 2), 2]``.

    Greedy: in each round those are paired who like each other the best of all that are left. That takes the host some
    milliseconds, and waits for the device.
    """
    rows = F.pad(occupied, (0, 0, 0, len(occupied) % 2)).cpu().numpy().astype(np.float32)
    index = np.arange(len(rows))
    # Of those who are liked as well the neighbour, else anyone: there is always a pair then, and mostly many.
    lots = np.triu(np.random.default_rng(0).random((len(rows), len(rows)), np.float32) / 2, 1)
    liking = rows @ rows.T + (lots + lots.T)
    liking[index, index ^ 1] += 0.5
    np.fill_diagonal(liking, -np.inf)
    pairs, left = [np.zeros((0, 2), np.int64)], index
    while len(left):
        best = liking[np.ix_(left, left)].argmax(1)
        mutual = (best[best] == np.arange(len(left))) & (np.arange(len(left)) < best)
        chosen = np.stack([left[mutual], left[best[mutual]]], 1)
        pairs.append(chosen)
        left = np.setdiff1d(left, chosen)
    return torch.from_numpy(np.concatenate(pairs).astype(np.int32)).to(occupied.device)


Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation and groups of a convolution; here of one group."""


class BlockLayout:
    """The tiles of side ``block`` that a mask keeps, from both sides.

    Attributes:
        block: the side.
        density: fraction of tiles that are kept; a hint, of how many parts the weight gradient is summed in.
        occupied: bool, which tiles are kept: ``[ceil(N / block), ceil(K / block)]``, of a convolution with taps.
    """

    def __init__(self, block: int, occupied: Tensor, density: float) -> None:
        self.block, self.density, self.occupied = block, density, occupied
        self._by_column: dict[tuple, TileList] = {}
        self._pairs: dict[tuple[bool, bool], PairList] = {}
        self._products = 0

    @functools.cached_property
    def by_row(self) -> TileList:
        """List of the mask."""
        return tile_list(self.occupied.flatten(1))

    @property
    def by_column(self) -> TileList:
        """List of the transposed mask."""
        return self.for_input_grad(((1, 1), (0, 0), (1, 1), 1))

    def pairs(self, input_grad: bool) -> PairList:
        """The :func:`pair_list` of the mask, or of the transposed mask, of a linear layer."""
        self._products += 1
        if self._products == _SETTLED and not gpu.is_capturing(self.occupied.device):
            self.settle()
        settled = (input_grad, True)
        return self._pairs[settled] if settled in self._pairs else self._pair(input_grad, False)

    def settle(self) -> None:
        """Pair rows well, for a mask that stays."""
        for input_grad in (False, True):
            self._pair(input_grad, True)

    def _pair(self, input_grad: bool, settled: bool) -> PairList:
        if (input_grad, settled) not in self._pairs:
            occupied = self.occupied.flatten(1)  # of a 1x1 convolution too
            occupied = occupied.t() if input_grad else occupied
            self._pairs[input_grad, settled] = pair_list(occupied, self.block, settled=settled)
        return self._pairs[input_grad, settled]

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
                arange = functools.partial(torch.arange, device=kept.device)
                down, across = (
                    (arange(stride)[:, None] + padding - arange(taps) * dilation) % stride == 0
                    for stride, padding, dilation, taps in zip(*geometry[:3], kept.shape[2:], strict=True)
                )
                reached = down[:, None, :, None] & across[None, :, None, :]  # [phase, phase, tap, tap]
                kept = (reached[:, :, None, None] & kept).flatten(0, 2)
            self._by_column[key] = tile_list(kept.flatten(1))
        return self._by_column[key]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [T, K] @ weight.T + bias``; weight ``[N, K]`` has zeros where the mask is False."""
        from . import triton_block_sparse

        if cuda_block_sparse.takes(self.block, x, weight):
            return cuda_block_sparse.block_matmul(x, weight, self.pairs(input_grad=False), bias)
        return triton_block_sparse.block_matmul(x, weight, self.block, self.by_row, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy [T, N] @ weight``."""
        from . import triton_block_sparse

        if cuda_block_sparse.takes(self.block, dy, weight):
            return cuda_block_sparse.block_matmul(dy, weight, self.pairs(input_grad=True), input_grad=True)
        return triton_block_sparse.block_matmul(dy, weight, self.block, self.by_column, input_grad=True)

    def weight_grad(self, dy: Tensor, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``mask * (dy.T @ x)`` in ``dtype``; without a mask ``dy.T @ x`` in the kept tiles, and zero elsewhere."""
        return self._weight_grad(dy, x, mask, (dy.shape[1], x.shape[1]), dtype, None)

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Convolution of maps with ``weight [N, K, R, S]``, all in channels_last; zeros where the mask is False."""
        from . import triton_block_sparse, triton_conv2d

        size = triton_conv2d.output_size(x, weight, geometry)
        return triton_block_sparse.block_conv2d(x, weight, self.block, self.by_row, bias, size, geometry)

    def conv2d_input_grad(self, dy: Tensor, weight: Tensor, size: Sequence[int], geometry: Geometry) -> Tensor:
        """Gradient of its input, of ``size``, from that of its output."""
        from . import triton_block_sparse

        lists = self.for_input_grad(geometry)
        return triton_block_sparse.block_conv2d(dy, weight, self.block, lists, None, size, geometry, input_grad=True)

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
        return triton_block_sparse.block_weight_grad(
            dy, x, mask, shape, self.block, self.by_row, dtype, geometry, splits=splits
        )


class Slices:
    """Outputs and inputs of a linear layer or convolution that are not dropped as a whole.

    Args:
        sides: bool ``[N]`` and ``[K]``, which are kept.
        kept: how many.

    Attributes:
        rows, columns: int64, ascending; None where all are kept.
        density: fraction of the dense products that is left.
    """

    def __init__(self, sides: tuple[Tensor, Tensor], kept: tuple[int, int]) -> None:
        self.rows, self.columns = (
            None if count == len(side) else side.nonzero().squeeze(1) for side, count in zip(sides, kept, strict=True)
        )
        self.density = kept[0] * kept[1] / (len(sides[0]) * len(sides[1]))

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


class Occupancy:
    """Where a mask holds a True: by tiles, by outputs and by inputs; or a mask and the positions that learn beside it.

    Args:
        tiles: of the smallest side, see :func:`occupied_tiles`.
        sides: bool ``[N + K]``, outputs and inputs.
        counts: by :func:`_tally`.

    Attributes:
        densities: fraction of tiles of each of :data:`BLOCKS` that hold one.
    """

    def __init__(self, tiles: Tensor, sides: Tensor, outputs: int, counts: Sequence[int]) -> None:
        self.tiles, self.sides, self.counts = tiles, sides, counts
        self._sizes = [_fold_shape(tiles, block).numel() for block in BLOCKS] + [outputs, len(sides) - outputs]
        self.densities = {block: n / size for block, n, size in zip(BLOCKS, counts, self._sizes, strict=False)}
        self._layouts: dict[int, BlockLayout] = {}
        self._structures: dict[bool, Structure] = {}
        self._slices: Slices | None = None

    @property
    def drops_nothing(self) -> bool:
        """Whether no tile, output or input is empty."""
        return self._sizes == list(self.counts)

    def structure(self, tiles: bool = True) -> Structure:
        """For the choice of a kernel, of those for ``tiles`` too or not."""
        if tiles not in self._structures:
            slices = self.counts[-2] * self.counts[-1] / (self._sizes[-2] * self._sizes[-1])
            self._structures[tiles] = Structure(tuple(self.densities.items()) if tiles else (), slices)
        return self._structures[tiles]

    def layout(self, block: int) -> BlockLayout:
        """The lists of its tiles; kept."""
        if block not in self._layouts:
            self._layouts[block] = BlockLayout(block, _fold(self.tiles, block), self.densities[block])
        return self._layouts[block]

    def slices(self) -> Slices:
        """What is left without dropped outputs and inputs; kept."""
        if self._slices is None:
            sides = self.sides[: self._sizes[-2]], self.sides[self._sizes[-2] :]
            self._slices = Slices(sides, (self.counts[-2], self.counts[-1]))
        return self._slices


class _Unkept:
    """The tiles of a mask, and of ``positions`` beside it, as they are when they are asked for: without a wait.

    So a CUDA graph looks anew in every replay. Which kernels there are was decided by what the mask held when it was
    ``last`` looked at. ``without`` is the same without the positions, if it is there.
    """

    def __init__(self, mask: Tensor, positions: Tensor | None, last: Occupancy, without: _Unkept | None) -> None:
        self._mask, self._positions, self._without, self.densities = mask, positions, without, last.densities
        self._layouts: dict[int, BlockLayout] = {}

    @functools.cached_property
    def _tiles(self) -> Tensor:
        tiles = occupied_tiles(self._mask, BLOCKS[-1]) if self._without is None else self._without._tiles.clone()
        if self._positions is not None:
            _mark(self._positions, self._mask, tiles, None)
        return tiles

    def structure(self, tiles: bool = True) -> Structure:
        """As of an :class:`Occupancy`; how much could be cut out may change, and so would the sizes of tensors."""
        return Structure(tuple(self.densities.items()) if tiles else ())

    def layout(self, block: int) -> BlockLayout:
        """Lists that the graph makes."""
        if block not in self._layouts:
            self._layouts[block] = BlockLayout(block, _fold(self._tiles, block), self.densities[block])
        return self._layouts[block]


class _Seen(NamedTuple):
    state: tuple
    occupancy: Occupancy
    learning: WeakTensorKeyDictionary  # of positions: (their state, the occupancy with them)


# Of masks: what was seen, by the stream that looked. Each has its own: it makes lists when they are asked for, and has
# their memory back when the mask has changed.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()  # of who goes through it, or adds to it


def look(mask: Tensor, positions: Tensor | None = None) -> Occupancy | _Unkept | None:
    """What a bool mask ``[N, K, ...]`` holds, and the ``positions`` beside it; None if that may not be asked for.

    Asked for once for every change of mask or positions, since it waits for the device. Kept as long as they are. For a
    mask that was looked at before, a CUDA graph that is captured finds its tiles itself; and so does each product
    outside of one where nothing is to be kept (``SPARSEBILEVEL_COMPUTE_COPY=0``).

    Args:
        mask: of a layer.
        positions: int64, flat and row-major in the mask; negative ones are padding.
    """
    if mask.is_inference() or not mask.numel():  # it may change unseen
        return None
    if gpu.is_capturing(mask.device):
        return _look_unkept(mask, positions)
    stream = gpu.stream_id(mask.device)
    if not keeps():
        if stream not in _seen.get(mask, _NOTHING):
            _look_again(mask, stream)
        return _look_unkept(mask, positions)
    seen = _seen.get(mask, _NOTHING).get(stream)
    if seen is None or seen.state != _state(mask):
        _look_again(mask, stream)
        seen = _seen[mask][stream]
    if positions is None or seen.occupancy.drops_nothing:
        return seen.occupancy
    if positions.is_inference():
        return None
    found = seen.learning.get(positions)
    if found is None or found[0] != _state(positions):
        found = seen.learning[positions] = _state(positions), _look_beside(mask, positions, seen.occupancy)
    return found[1]


_NOTHING: dict[Any, _Seen] = {}


def forget_tiles(mask: Tensor) -> None:
    """Forget what was seen of a mask, and hold no weak reference to it."""
    with _lock:
        _seen.pop(mask, None)


def _look_unkept(mask: Tensor, positions: Tensor | None) -> _Unkept | None:
    """What forward and backward of a layer share in a graph; None if the mask dropped nothing, or was never seen."""
    by_stream, made = _seen.get(mask, _NOTHING), gpu.shared()
    if not by_stream:
        return None
    seen = [*by_stream.values()][-1]  # whichever stream it was
    last = seen.occupancy if positions is None else seen.learning.get(positions, (None, seen.occupancy))[1]
    if seen.occupancy.drops_nothing or last.drops_nothing:
        return None
    made = {} if made is None else made
    key = "tiles", positions is not None
    if key not in made:
        made[key] = _Unkept(mask, positions, last, made.get(("tiles", False)))
    return made[key]


def _state(tensor: Tensor) -> tuple:
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def _survey(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Occupied tiles of the smallest side; outputs and inputs, one after the other."""
    sides = torch.zeros(mask.shape[0] + mask.shape[1], dtype=torch.bool, device=mask.device)
    return occupied_tiles(mask, BLOCKS[-1], sides), sides


def _mark(positions: Tensor, mask: Tensor, tiles: Tensor, sides: Tensor | None) -> None:
    """Count positions among what the mask holds."""
    from . import triton_tiles

    triton_tiles.mark_positions(positions, mask.shape, tiles, sides, BLOCKS[-1])


def _fold_shape(tiles: Tensor, block: int) -> torch.Size:
    times = block // BLOCKS[-1]
    return torch.Size([-(-tiles.shape[0] // times), -(-tiles.shape[1] // times), *tiles.shape[2:]])


def _fold(tiles: Tensor, block: int) -> Tensor:
    """Tiles of side ``block`` of those of the smallest side."""
    return tiles if block == BLOCKS[-1] else occupied_tiles(tiles, block // BLOCKS[-1])


def _tally(tiles: Tensor, sides: Tensor, outputs: int) -> Tensor:
    """How many tiles of each of :data:`BLOCKS`, outputs and inputs are occupied, on the device."""
    parts = *(_fold(tiles, block) for block in BLOCKS), sides[:outputs], sides[outputs:]
    return torch.stack([part.sum() for part in parts])


def _look_again(asked: Tensor, stream: int) -> None:
    """Look at a mask, and at every other that this stream alone has seen and that has changed: with a single wait.

    Those that others have seen, too, another may be changing just now.
    """
    with _lock:
        seen = [(mask, by_stream[stream]) for mask, by_stream in _seen.items() if [*by_stream] == [stream]]
        stale = [mask for mask, before in seen if before.state != _state(mask)]
        masks = [asked, *(m for m in stale if m is not asked and m.device == asked.device and m.numel())]
        states = [_state(mask) for mask in masks]  # of before, since another thread may change a mask meanwhile
        surveys = [_survey(mask) for mask in masks]
        counts = torch.stack([_tally(*survey, len(mask)) for mask, survey in zip(masks, surveys, strict=True)]).tolist()
        for mask, state, survey, numbers in zip(masks, states, surveys, counts, strict=True):
            found = _Seen(state, Occupancy(*survey, len(mask), numbers), WeakTensorKeyDictionary())
            others = {number: kept for number, kept in _seen.get(mask, _NOTHING).items() if number != stream}
            _seen[mask] = others | {stream: found}  # the latest is the last; at once, since others read without a lock


def _look_beside(mask: Tensor, positions: Tensor, without: Occupancy) -> Occupancy:
    tiles, sides = without.tiles.clone(), without.sides.clone()
    _mark(positions, mask, tiles, sides)
    numbers = _tally(tiles, sides, len(mask)).tolist()
    return without if numbers == without.counts else Occupancy(tiles, sides, len(mask), numbers)
