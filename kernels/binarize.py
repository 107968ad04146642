"""The k largest scores as a boolean mask: ``sparsebilevel::binarize``."""

from __future__ import annotations

import functools
import math
import numbers
import os
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, native, reference

_SHORT_ROW = native.lib.BINARIZE_SHORT_ROW if native.available() else 0


class BinaryMask(NamedTuple):
    """A mask in the forms that kernels read, see ``binarize(..., words=True)``."""

    mask: Tensor
    """bool, of the shape of the scores."""
    words: Tensor
    """int64 ``[ceil(numel / 64)]``: row-major position ``p`` is bit ``p % 64`` of word ``p // 64``, lowest first."""
    counts: Tensor
    """int64 ``[ceil(numel / 1024) + 1]``: how many before each 1024th position are True, and last how many of all."""

    @staticmethod
    def of(mask: Tensor) -> BinaryMask:
        """The other forms of a bool ``mask`` of any shape."""
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
        return BinaryMask(mask, *_mask_words(mask))

    def tiles(self, rows: int, cols: int) -> Tensor:
        """Which tiles of ``rows`` x ``cols`` hold a True.

        The mask is taken as a matrix of its first dimension and the product of the others; edge tiles may be smaller.

        Returns:
            bool ``[ceil(N / rows), ceil(K / cols)]``.
        """
        if rows < 1 or cols < 1:
            raise ValueError(f"a tile has at least one row and column, got rows={rows}, cols={cols}")
        if self.mask.dim() == 0:
            raise ValueError("a mask of one dimension or more has tiles, got a scalar")
        height = self.mask.shape[0]
        return _occupied_tiles(self.words, height, self.mask.numel() // max(height, 1), rows, cols)


def binarize(
    scores: Tensor | Sequence[Tensor],
    k: int | Tensor | None,
    *,
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: bool = False,
    hint: Tensor | None = None,
) -> Any:
    """:func:`sparsebilevel.binarize` of single scores: arguments, results and errors are described and typed there."""
    names = named(scores, names)
    tensors = [s.detach() if s.requires_grad else s for s in ([scores] if isinstance(scores, Tensor) else scores)]
    dims: list[int] | None = None
    if dim is not None:
        along: Any = [dim] if isinstance(dim, numbers.Integral) else dim
        if isinstance(along, str) or not all(isinstance(d, numbers.Integral) for d in along):
            raise TypeError(f"dim must be an integer or integers, got {dim!r}")
        dims = [int(d) for d in along]
    if isinstance(k, Tensor) and (k.numel() != 1 or k.dtype == torch.bool or k.is_floating_point() or k.is_complex()):
        raise TypeError(f"k must be an integer or a tensor of one, got {k.dtype} of shape {list(k.shape)}")
    if not isinstance(k, (int, Tensor, torch.SymInt)) and isinstance(k, numbers.Integral):  # NumPy's
        k = int(k)
    if isinstance(k, bool) or not isinstance(k, (int, Tensor, torch.SymInt)):
        raise TypeError(f"k must be an integer or a tensor of one, got {k!r}")
    if hint is not None:
        if dim is not None:
            raise ValueError(f"hint is not allowed with dim={dim!r}: each slice has a threshold of its own")
        if hint.dtype != torch.int32 or hint.shape != (2,) or any(hint.device != s.device for s in tensors):
            raise ValueError(
                "hint must be torch.int32 of shape [2] on the scores' device, "
                f"got {hint.dtype} of shape {list(hint.shape)} on {hint.device}"
            )
    if native.watched() or any(type(s) not in native.PLAIN or s.is_meta for s in tensors):
        held = k if isinstance(k, Tensor) else torch.full((), k, dtype=torch.int64, device="cpu")
        found = _binarize(tensors, held, dims, words, "\n".join(names)) if tensors else []
    else:  # without the dispatcher, which costs as much as some ten thousand scores
        found = _select(tensors, k, dims, words, names, hint)
    if words:
        results: Any = list(map(BinaryMask._make, zip(*(found[i::3] for i in range(3)), strict=True)))
    else:
        results = found
    return results[0] if isinstance(scores, Tensor) else results


def named(scores: Tensor | Sequence[Tensor], names: Sequence[str] | None) -> Sequence[str]:
    """What messages call each tensor: ``names``, checked, or names by its place."""
    if not isinstance(scores, Tensor):
        if (
            not isinstance(scores, Sized)
            or isinstance(scores, Mapping)
            or not all(isinstance(s, Tensor) for s in scores)
        ):
            raise TypeError(f"scores must be a tensor or a list of tensors, got {type(scores).__name__}")
    if names is None:
        return ["scores"] if isinstance(scores, Tensor) else [f"scores[{i}]" for i in range(len(scores))]
    count = 1 if isinstance(scores, Tensor) else len(scores)
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names must be a list of {count}, one for each tensor of scores, got {names!r}")
    return names


# An integer in its schema would have to be known when a graph is compiled, a tensor need not. Names are lines of one
# string since a schema has no lists of strings.
@torch.library.custom_op("sparsebilevel::binarize", mutates_args=())
def _binarize(scores: Sequence[Tensor], k: Tensor, dim: Sequence[int] | None, words: bool, names: str) -> list[Tensor]:
    return _select(scores, k, dim, words, names.split("\n"))


@_binarize.register_fake
def _(scores: Sequence[Tensor], k: Tensor, dim: Sequence[int] | None, words: bool, names: str) -> list[Tensor]:
    return [part for s in scores for part in _empty(s, words)]


def _empty(scores: Tensor, words: bool) -> list[Tensor]:
    """What is returned for one tensor, unwritten: its mask, and on request words and counts."""
    numel = scores.numel()
    parts = [torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)]
    if words:
        parts += [
            scores.new_empty(size, dtype=torch.int64) for size in ((numel + 63) // 64, (numel + 1023) // 1024 + 1)
        ]
    return parts


_FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16


def _select(
    scores: Sequence[Tensor],
    k: int | Tensor,
    dim: Sequence[int] | None,
    words: bool,
    names: Sequence[str],
    hint: Tensor | None = None,
) -> list[Tensor]:
    for name, s in zip(names, scores, strict=True):
        if s.dtype not in _FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise TypeError(f"{name} must be floating point ({allowed}), got {s.dtype}")
    if len({s.device for s in scores}) > 1:
        raise ValueError(f"scores must be on one device, got {', '.join(sorted({str(s.device) for s in scores}))}")
    if dim is not None:
        return [part for name, s in zip(names, scores, strict=True) for part in _select_rows(s, k, dim, words, name)]
    total = sum(s.numel() for s in scores)
    dtype = functools.reduce(torch.promote_types, {s.dtype for s in scores}) if scores else torch.float32
    device = scores[0].device if scores else torch.device("cpu")
    gpu = cuda if cuda.available(device) and cuda.takes(dtype, total) else None
    k = _as_read(k, device, gpu)
    if isinstance(k, int) and not 0 <= k <= total:
        of = f"{names[0]} of shape {list(scores[0].shape)}" if len(scores) == 1 else f"{len(scores)} tensors of scores"
        raise ValueError(f"k must be in [0, {total}] for {of}, got {k}")
    if not scores:
        return []
    if gpu:
        held = [s if s.dtype == dtype and s.is_contiguous() else s.to(dtype).contiguous() for s in scores]
        outs = [_empty(s, words) for s in held]
        _check_errors(gpu.binarize(held, outs, k), scores, names, total)
        return [part for out in outs for part in out]
    if not _is_native(device, dtype):
        _check_errors(_errors(scores, k, total), scores, names, total)
        mask = reference.binarize(torch.cat([s.reshape(-1) for s in scores]), k)
        parts = mask.split([s.numel() for s in scores])
        # Copies, since an operator must not return views of one another.
        masks = [part.view(s.shape).clone() for part, s in zip(parts, scores, strict=True)]
        return [part for mask in masks for part in ([mask, *reference.mask_words(mask)] if words else [mask])]
    held = [s.to(dtype).contiguous() for s in scores]
    outs = [_empty(s, words) for s in held]
    arguments = [
        (s.data_ptr(), s.numel(), out[0].data_ptr(), out[1].data_ptr() if words else 0)
        for s, out in zip(held, outs, strict=True)
    ]
    assert isinstance(k, int)
    window = hint.contiguous() if hint is not None else None
    where = 0 if window is None else window.data_ptr()
    nans = native.lib.binarize(arguments, _score_type(dtype), k, torch.get_num_threads(), where)
    if hint is not None and window is not None and window is not hint:
        hint.copy_(window)
    _check_nans(nans, scores, names)
    if words:
        for _, bits, counts in outs:
            _count(bits, counts)
    return [part for out in outs for part in out]


def _select_rows(scores: Tensor, k: int | Tensor, dim: Sequence[int], words: bool, name: str) -> list[Tensor]:
    """`_select` in each slice of one tensor along dimensions ``dim``."""
    shape = scores.shape
    if not shape:
        raise ValueError(f"{name} is a scalar, which has no dimension; got dim={list(dim)}")
    if not dim or any(not -len(shape) <= d < len(shape) for d in dim):
        raise ValueError(
            f"dim must be in [{-len(shape)}, {len(shape) - 1}] for {name} of shape {list(shape)}, got {list(dim)}"
        )
    dims = sorted({d % len(shape) for d in dim})
    length = math.prod(shape[d] for d in dims)
    gpu = cuda if cuda.available(scores.device) and cuda.takes(scores.dtype, length) else None
    k = _as_read(k, scores.device, gpu)
    if isinstance(k, int) and not 0 <= k <= length:
        raise ValueError(f"k must be in [0, {length}] for slices along {list(dim)} of shape {list(shape)}, got {k}")
    # [outer, length, inner]: as they lie, where the dimensions adjoin and the kernel can step over what comes inside.
    is_native = _is_native(scores.device, scores.dtype)
    short_row = cuda.SHORT_ROW if gpu else _SHORT_ROW if is_native else 0
    order = list(range(len(shape)))
    inner = math.prod(shape[dims[-1] + 1 :])
    if dims != order[dims[0] : dims[-1] + 1] or (inner != 1 and length > short_row):
        order = [d for d in order if d not in dims] + dims
        inner = 1
    rows = scores.permute(order).contiguous()
    outer = rows.numel() // max(length * inner, 1)
    if gpu:
        mask = rows.new_empty(rows.shape, dtype=torch.bool)
        _check_errors(gpu.binarize_rows(rows, outer, length, inner, mask, k), [scores], [name], length)
    elif is_native:
        mask = rows.new_empty(rows.shape, dtype=torch.bool)
        where = (rows.data_ptr(), outer, length, inner, _score_type(rows.dtype), k, mask.data_ptr())
        nans = native.lib.binarize_rows(*where, torch.get_num_threads()) if rows.numel() else 0
        _check_nans([nans], [scores], [name])
    else:
        _check_errors(_errors([scores], k, length), [scores], [name], length)
        mask = reference.binarize_rows(rows.reshape(-1, max(length, 1)), k).view(rows.shape)
    inverse = [order.index(d) for d in range(len(shape))]
    mask = mask.permute(inverse).contiguous()
    return [mask, *_words_of(mask)] if words else [mask]


def _words_of(mask: Tensor) -> list[Tensor]:
    if cuda.available(mask.device) and mask.numel() < 1 << 32:
        mask = mask.contiguous()
        _, bits, counts = _empty(mask, True)
        cuda.mask_words(mask, bits, counts)
        return [bits, counts]
    if not native.available() or not mask.is_cpu:
        return list(reference.mask_words(mask))
    mask = mask.contiguous()
    _, bits, counts = _empty(mask, True)
    native.lib.pack_words(mask.data_ptr(), mask.numel(), bits.data_ptr(), torch.get_num_threads())
    _count(bits, counts)
    return [bits, counts]


@torch.library.custom_op("sparsebilevel::mask_words", mutates_args=())
def _mask_words(mask: Tensor) -> list[Tensor]:
    return _words_of(mask)


@_mask_words.register_fake
def _(mask: Tensor) -> list[Tensor]:
    return _empty(mask, True)[1:]


@torch.library.custom_op("sparsebilevel::occupied_tiles", mutates_args=())
def _occupied_tiles(words: Tensor, height: int, width: int, rows: int, cols: int) -> Tensor:
    tiles = words.new_empty(-(-height // rows), -(-width // cols), dtype=torch.bool)
    if cuda.available(words.device):
        cuda.occupied_tiles(words.contiguous(), height, width, rows, cols, tiles)
        return tiles
    if not native.available() or not words.is_cpu:
        return reference.occupied_tiles(words, height, width, rows, cols)
    shape = (height, width, rows, cols)
    native.lib.occupied_tiles(words.contiguous().data_ptr(), shape, tiles.data_ptr(), torch.get_num_threads())
    return tiles


@_occupied_tiles.register_fake
def _(words: Tensor, height: int, width: int, rows: int, cols: int) -> Tensor:
    return words.new_empty((height + rows - 1) // rows, (width + cols - 1) // cols, dtype=torch.bool)


def _as_read(k: int | Tensor, device: torch.device, gpu: Any) -> int | Tensor:
    """A number, unless ``k`` is where the scores are and can be read there: a GPU would have to be waited for."""
    return k if isinstance(k, Tensor) and k.device.type == device.type and (gpu or k.is_cuda) else int(k)


def _is_native(device: torch.device, dtype: torch.dtype) -> bool:
    # The keys of the kernel have 32 bits, in which float64 would lose its order.
    return native.available() and device.type == "cpu" and dtype != torch.float64


def _score_type(dtype: torch.dtype) -> Any:
    return getattr(native.lib.ScoreType, str(dtype).removeprefix("torch."))


def _count(words: Tensor, counts: Tensor) -> None:
    native.lib.count_words(words.data_ptr(), 64 * words.numel(), counts.data_ptr())


def _check_nans(counts: Sequence[int], scores: Sequence[Tensor], names: Sequence[str]) -> None:
    if any(counts):
        found = zip(names, counts, scores)  # noqa: B905 (no counts means no NaN)
        told = "; ".join(f"{name} must not be NaN: {count} of {s.numel()} are" for name, count, s in found if count)
        raise ValueError(told)


def _errors(scores: Sequence[Tensor], k: int | Tensor, most: int) -> Tensor:
    """What ``cuda.binarize`` returns, by torch."""
    nans = torch.stack([s.isnan().sum() for s in scores])
    is_bad = ((k < 0) | (k > most)).reshape(1) if isinstance(k, Tensor) else nans.new_zeros(1)
    errors = torch.cat([nans, is_bad])
    return torch.cat([errors, (errors.sum() == 0)[None]])


def _check_errors(errors: Tensor, scores: Sequence[Tensor], names: Sequence[str], most: int) -> None:
    """Raises what kernels found, on a GPU without waiting for them: see ``cuda.binarize``."""
    if errors.device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "1":
        message = f"{', '.join(names)} must not be NaN, and k must be in [0, {most}]"
        # Longer ones torch refuses.
        torch._assert_async(errors[-1], message if len(message) < 250 else f"{message[:120]} ... {message[-120:]}")
        return
    *nans, is_bad, _ = errors.tolist()
    _check_nans(nans, scores, names)
    if is_bad:
        raise ValueError(f"k must be in [0, {most}]")
