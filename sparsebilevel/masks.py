"""Mask patterns: from scores to a boolean mask with an exact count.

A *pattern* says which weights live and die together. It cuts a weight into groups of equal standing (single weights,
blocks, filters, input channels), so that choosing a mask is choosing ``k`` groups: those with the largest summed score,
ties to the smaller index. Scores are importances: larger means more worth keeping, and the sign counts.

Shapes: a weight is ``[N, K]`` (Linear) or ``[N, C, R, S]`` (Conv2d); scores and masks have the weight's shape.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, overload

import torch
from torch import Tensor

from . import kernels
from .kernels import BinaryMask
from .kernels.binarize import named


def as_fraction(value: float) -> Fraction:
    """The decimal a user typed, exactly: ``0.9`` is 9/10 and not the nearest binary float below or above it."""
    return Fraction(repr(float(value)))


def check_sparsity(sparsity: float | Fraction, name: str = "sparsity") -> Fraction:
    """``sparsity`` as a fraction, refused outside [0, 1)."""
    if not isinstance(sparsity, numbers.Real) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"{name}={sparsity!r} is not allowed; expected a number in [0, 1)")
    return sparsity if isinstance(sparsity, Fraction) else as_fraction(float(sparsity))


def _is_whole(count: int) -> bool:
    return isinstance(count, numbers.Integral) and not isinstance(count, bool) and count >= 1


def _sum(scores: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """In float32 at least: in 16 bits the sums of many groups would be equal."""
    return scores.sum(dims, dtype=torch.promote_types(scores.dtype, torch.float32))


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Base class: how a weight is cut into groups. Subclasses say how many and how scores and masks map to them."""

    def num_groups(self, shape: Sequence[int]) -> int:
        """Number of groups in a weight of ``shape``; raises ValueError where the pattern does not fit it."""
        raise NotImplementedError

    def group_scores(self, scores: Tensor) -> Tensor:
        """Scores ``[num_groups]``, the sums over the groups, float32 at least, of scores shaped as the weight."""
        raise NotImplementedError

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        """Bool mask of ``shape`` from bool ``groups`` ``[num_groups]``."""
        raise NotImplementedError

    def round_count(self, wanted: Fraction, groups: int) -> int:
        """How many of ``groups`` a layer keeps that is to keep ``wanted`` of them: at least one."""
        return max(1, round(wanted))

    def check_ranking(self) -> None:
        """Raise ValueError if the groups of several layers may not be ranked together, which leaves each any number."""

    def mask(self, scores: Tensor, k: int) -> Tensor:
        """Mask of the ``k`` groups with the largest scores, see :func:`binarize`."""
        return binarize(scores, k, pattern=self)

    def groups_of(self, mask: Tensor) -> Tensor:
        """Bool ``[num_groups]``: which groups have at least one True in ``mask``."""
        return self.group_scores(mask.float()) > 0

    def count(self, mask: Tensor) -> int:
        """Groups of ``mask`` that are kept: those with at least one True."""
        return int(self.groups_of(mask).sum())

    def check(self, mask: Tensor) -> None:
        """Raise ValueError if the bool ``mask`` is none of this pattern; any count will do. Waits for the device."""
        odd = self._violations(mask)
        if odd.any():
            position = odd.nonzero()[0].tolist()
            raise ValueError(
                f"mask does not fit pattern {self}: {int(odd.sum())} positions break it, the first is {position}"
            )

    def _violations(self, mask: Tensor) -> Tensor:
        """Bool, of the mask's shape: positions that are False while their group is kept."""
        return self.expand(self.groups_of(mask), mask.shape) & ~mask


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight for itself."""

    def num_groups(self, shape: Sequence[int]) -> int:
        return math.prod(shape)

    def group_scores(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def groups_of(self, mask: Tensor) -> Tensor:
        return mask.reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        return groups.reshape(tuple(shape))

    def check(self, mask: Tensor) -> None:
        """Every mask is of this pattern."""


@dataclasses.dataclass(frozen=True, repr=False)
class _Slices(Pattern):
    """Channels of one side.

    Attributes:
        multiple: counts are multiples of it, at least one of them; or all channels. Libraries are faster with those.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if not _is_whole(self.multiple):
            raise ValueError(f"multiple={self.multiple} is not allowed; expected a whole number, at least 1")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.multiple == 1 else f'multiple={self.multiple}'})"

    def round_count(self, wanted: Fraction, groups: int) -> int:
        nearest = min(max(1, round(wanted / self.multiple)) * self.multiple, groups)
        return min(nearest, groups, key=lambda count: abs(count - wanted))

    def check_ranking(self) -> None:
        if self.multiple > 1:
            raise ValueError(
                f"pattern={self} is not allowed in a ranking over all layers, which leaves each any number; choose the "
                "channels layer by layer, or any multiple"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class Filter(_Slices):
    """Whole output channels: rows of a Linear, filters of a Conv2d. Bias and norm of the channel are left alone."""

    def num_groups(self, shape: Sequence[int]) -> int:
        return shape[0]

    def group_scores(self, scores: Tensor) -> Tensor:
        return _sum(scores.flatten(1), 1)

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        return groups.view(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).contiguous()


@dataclasses.dataclass(frozen=True, repr=False)
class Channel(_Slices):
    """Whole input channels: columns of a Linear, ``weight[:, c]`` of a Conv2d."""

    def num_groups(self, shape: Sequence[int]) -> int:
        return shape[1]

    def group_scores(self, scores: Tensor) -> Tensor:
        return _sum(scores.transpose(0, 1).flatten(1), 1)

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        return groups.view(1, -1, *[1] * (len(shape) - 2)).expand(tuple(shape)).contiguous()


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
    """Blocks of ``bh`` output by ``bw`` input channels, separately for each kernel tap. Edge blocks may be smaller."""

    bh: int
    bw: int

    def __post_init__(self) -> None:
        for name in ("bh", "bw"):
            if not _is_whole(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; expected a whole number, at least 1")

    def _grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return -(-shape[0] // self.bh), -(-shape[1] // self.bw), math.prod(shape[2:])

    def num_groups(self, shape: Sequence[int]) -> int:
        return math.prod(self._grid(shape))

    def group_scores(self, scores: Tensor) -> Tensor:
        rows, cols, taps = self._grid(scores.shape)
        padded = scores.new_zeros(rows * self.bh, cols * self.bw, taps)
        padded[: scores.shape[0], : scores.shape[1]] = scores.reshape(*scores.shape[:2], taps)
        return _sum(padded.view(rows, self.bh, cols, self.bw, taps), (1, 3)).reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        full = groups.view(self._grid(shape)).repeat_interleave(self.bh, 0).repeat_interleave(self.bw, 1)
        return full[: shape[0], : shape[1]].reshape(tuple(shape)).contiguous()


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` of every ``m`` consecutive input channels of an output (2:4 is ``NM(2, 4)``).

    The count is the pattern's own: a layer's sparsity is ``1 - n/m`` whatever a distribution says, and only the choice
    inside each run of ``m`` is learned. The number of input channels must be a multiple of ``m``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_is_whole(self.n) and _is_whole(self.m) and self.n < self.m):
            raise ValueError(f"NM(n={self.n}, m={self.m}) is not allowed; expected whole numbers, 1 <= n < m")

    @property
    def sparsity(self) -> Fraction:
        return 1 - Fraction(self.n, self.m)

    def num_groups(self, shape: Sequence[int]) -> int:
        if shape[1] % self.m:
            raise ValueError(
                f"weight of shape {list(shape)} has {shape[1]} input channels, not a multiple of m={self.m}"
            )
        return math.prod(shape)

    def group_scores(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int]) -> Tensor:
        return groups.reshape(tuple(shape))

    def mask(self, scores: Tensor, k: int | None = None, name: str = "scores") -> Tensor:
        self.num_groups(scores.shape)
        return kernels.binarize(scores.unflatten(1, (-1, self.m)), self.n, dim=2, names=[name]).flatten(1, 2)

    def _violations(self, mask: Tensor) -> Tensor:
        """Kept positions of runs with more than ``n`` of them; none if all are kept, as before pruning."""
        self.num_groups(mask.shape)
        per_run = mask.movedim(1, -1).unflatten(-1, (-1, self.m)).sum(-1, keepdim=True)
        crowded = (per_run > self.n).expand(*per_run.shape[:-1], self.m).flatten(-2).movedim(-1, 1)
        return mask & crowded & ~mask.all()


_NAMES = {"unstructured": Unstructured, "filter": Filter, "channel": Channel, "block": Block, "nm": NM}


def parse_pattern(text: str | Pattern) -> Pattern:
    """A pattern from its spelling: ``unstructured``, ``filter``, ``channel:32``, ``block:64x64``, ``nm:2:4``."""
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise ValueError(f"pattern={text!r} is not allowed; expected a Pattern or its name, such as 'block:64x64'")
    name, _, rest = text.lower().partition(":")
    try:
        numbers = [int(part) for part in rest.replace("x", ":").split(":")] if rest else []
        return _NAMES[name](*numbers)
    except (KeyError, TypeError, ValueError) as error:
        allowed = "unstructured, filter, channel, filter:MULTIPLE, channel:MULTIPLE, block:BHxBW, nm:N:M"
        raise ValueError(f"pattern={text!r} is not allowed; expected one of {allowed}") from error


@overload
def binarize(
    scores: Tensor,
    k: int | Tensor | None = None,
    *,
    pattern: str | Pattern = "unstructured",
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: Literal[False] = False,
    hint: Tensor | None = None,
) -> Tensor: ...
@overload
def binarize(
    scores: Tensor,
    k: int | Tensor | None = None,
    *,
    pattern: str | Pattern = "unstructured",
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: Literal[True],
    hint: Tensor | None = None,
) -> BinaryMask: ...
@overload
def binarize(
    scores: Sequence[Tensor],
    k: int | Tensor | None = None,
    *,
    pattern: str | Pattern = "unstructured",
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: Literal[False] = False,
    hint: Tensor | None = None,
) -> list[Tensor]: ...
@overload
def binarize(
    scores: Sequence[Tensor],
    k: int | Tensor | None = None,
    *,
    pattern: str | Pattern = "unstructured",
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: Literal[True],
    hint: Tensor | None = None,
) -> list[BinaryMask]: ...
def binarize(
    scores: Tensor | Sequence[Tensor],
    k: int | Tensor | None = None,
    *,
    pattern: str | Pattern = "unstructured",
    dim: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    words: bool = False,
    hint: Tensor | None = None,
) -> Tensor | BinaryMask | list[Tensor] | list[BinaryMask]:
    """Mask of exactly the ``k`` largest scores, or groups of scores.

    Of equal scores the one with the smaller row-major index is taken first, and in a list that of the earlier tensor;
    ``-0.0`` equals ``0.0``, infinities and denormals are ordinary values. The result depends neither on the number of
    threads nor on the memory format, and has no gradient.

    Args:
        scores: any shape; float16, bfloat16, float32 or float64. Of a list, on one device, the ``k`` largest of all
            tensors together are kept; different dtypes are compared in their common type.
        k: how many to keep; an integer tensor of one element, on any device, is read where it is needed, on a GPU
            without waiting for it if the scores are there.
        pattern: what lives and dies together, as in :func:`sparsify`: ``"block:BHxBW"``, ``"filter"`` or ``"channel"``
            keep the ``k`` groups with the largest sums, formed in float32 at least; ``"nm:N:M"`` keeps the ``n``
            largest of every ``m`` input channels and takes no ``k``. Scores then have two dimensions or more.
        dim: keep ``k`` of each slice along this dimension, or of these together: ``dim=1`` gives the rows of a matrix
            an equal number, ``dim=(1, 2, 3)`` the filters of a convolution. A list is then not ranked together.
        names: what error messages call the tensors of scores.
        words: return :class:`BinaryMask`, of which ``mask`` is one part.
        hint: int32 ``[2]`` on the scores' device, zeros at first and overwritten, for a caller that comes back with
            scores that changed a little: the search begins where the last one ended. Counts decide whether that was
            right, so it changes the time and never the result. Not with ``dim`` and ``nm``; where the C++ kernel is
            not called directly (no extension, float64, a GPU, compiled functions) it is left alone.

    Returns:
        bool, contiguous, of the shape and on the device of ``scores``; for a list a list.

    Raises:
        ValueError: ``k`` is out of range, the pattern does not fit, or there are NaNs among the scores or the sums.
        TypeError: the scores are not floating point, or ``k`` is not an integer.

    On a GPU nothing waits for the scores: NaNs, and a ``k`` out of range that lies there, fail a device-side assertion
    that names the tensors and shows at the next synchronization; with ``CUDA_LAUNCH_BLOCKING=1`` they raise as above.
    """
    pattern = parse_pattern(pattern)
    if isinstance(pattern, Unstructured):
        return kernels.binarize(scores, k, dim=dim, names=names, words=words, hint=hint)
    if dim is not None:
        raise ValueError(f"dim={dim!r} is not allowed with pattern {pattern}; a pattern has slices of its own")
    names = named(scores, names)
    tensors = [scores] if isinstance(scores, Tensor) else list(scores)
    for name, s in zip(names, tensors, strict=True):
        if s.dim() < 2:
            raise ValueError(f"{name} must have two dimensions or more for pattern {pattern}, got {list(s.shape)}")
    if isinstance(pattern, NM):
        if k is not None:
            raise ValueError(f"k={k} is not allowed with pattern {pattern}, which keeps {pattern.n} of {pattern.m}")
        if hint is not None:
            raise ValueError(f"hint is not allowed with pattern {pattern}: there is no common threshold")
        masks = [pattern.mask(s, name=name) for name, s in zip(names, tensors, strict=True)]
    else:
        sums = [pattern.group_scores(s.detach().to(torch.promote_types(s.dtype, torch.float32))) for s in tensors]
        kind = type(pattern).__name__.lower()  # torch.compile cannot format the object
        kept = kernels.binarize(sums, k, names=[f"{name} summed by {kind}" for name in names], hint=hint)
        masks = [pattern.expand(mask, s.shape) for mask, s in zip(kept, tensors, strict=True)]
    results = [BinaryMask.of(mask) for mask in masks] if words else masks
    return results[0] if isinstance(scores, Tensor) else results


def global_masks(scores: Mapping[str, Tensor], k: int, pattern: Pattern | None = None) -> dict[str, Tensor]:
    """Masks of the ``k`` largest groups over all layers together, at least one group a layer.

    A layer that the ranking would empty keeps its best group, at the cost of the weakest groups kept elsewhere, and a
    warning says so: a network with an empty layer computes a constant.

    Args:
        scores: layer name -> scores shaped as the layer's weight.
        k: groups kept in total; at least the number of layers.
        pattern: unstructured if None. ``NM`` leaves nothing to choose between layers: each keeps its own count.

    Raises:
        ValueError: ``k`` below the number of layers or above the number of groups; NaN scores; a pattern whose counts
            are multiples, which a ranking over all layers knows nothing of.
    """
    pattern = pattern or Unstructured()
    pattern.check_ranking()
    if isinstance(pattern, NM):
        return {name: pattern.mask(s) for name, s in scores.items()}
    groups = {name: pattern.group_scores(s) for name, s in scores.items()}
    names = [f"scores of {name}" for name in groups]
    total = sum(g.numel() for g in groups.values())
    if not len(groups) <= k <= total:
        raise ValueError(
            f"k={k} is not allowed; {len(groups)} layers with {total} groups allow {len(groups)} to {total}"
        )
    kept = kernels.binarize(list(groups.values()), k, names=names)
    empty = [name for name, mask in zip(groups, kept, strict=True) if not mask.any()]
    if empty:
        warnings.warn(
            f"layers {', '.join(map(repr, empty))} would lose all weights in a global choice of {k} of {total} groups; "
            "one group is kept in each",
            stacklevel=2,
        )
        # The best group of every layer is safe; the rest compete for what is left.
        best = [int(g.argmax()) for g in groups.values()]
        rest = [torch.cat([g[:i], g[i + 1 :]]) for g, i in zip(groups.values(), best, strict=True)]
        others = kernels.binarize(rest, k - len(groups))
        kept = [torch.cat([mask[:i], mask.new_ones(1), mask[i:]]) for mask, i in zip(others, best, strict=True)]
    return {name: pattern.expand(mask, scores[name].shape) for name, mask in zip(groups, kept, strict=True)}


def random_mask(shape: Sequence[int], k: int, pattern: Pattern, generator: torch.Generator | None = None) -> Tensor:
    """Mask of exactly ``k`` groups drawn without replacement. Drawn on the CPU: the same on every device."""
    if isinstance(pattern, NM):
        return pattern.mask(torch.rand(tuple(shape), generator=generator, device="cpu"))
    groups = pattern.num_groups(shape)
    if not 0 <= k <= groups:
        raise ValueError(f"k={k} is not allowed; a weight of shape {list(shape)} has {groups} groups")
    chosen = torch.zeros(groups, dtype=torch.bool, device="cpu")
    chosen[torch.randperm(chosen.numel(), generator=generator, device="cpu")[:k]] = True
    return pattern.expand(chosen, shape)
