"""The k largest scores as a boolean mask: ``sparsebilevel::binarize``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, reference


def binarize(scores: Tensor, k: int) -> Tensor:
    """Mask of exactly the ``k`` largest scores.

    Of equal scores the one with the smaller row-major index is taken first; ``-0.0`` equals ``0.0`` and infinities are
    ordinary values. The result depends neither on the number of threads nor on the memory format, and has no gradient.

    Args:
        scores: any shape; float16, bfloat16, float32 or float64.
        k: how many to keep, ``0 <= k <= scores.numel()``.

    Returns:
        bool, contiguous, of the shape and on the device of ``scores``.

    Raises:
        ValueError: ``k`` is out of range, or there are NaNs among the scores.
        TypeError: the scores are not floating point.
    """
    return torch.ops.sparsebilevel.binarize(scores.detach(), k)


def binarize_many(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of the ``k`` largest scores of all tensors together.

    As :func:`binarize` on the tensors laid end to end, so that of equal scores those of the earlier tensor come first.
    Mixed dtypes are compared in their common type.

    Args:
        scores: tensors of any shapes, on one device.
        k: how many to keep in total, ``0 <= k <= sum of the sizes``.

    Returns:
        One bool tensor for each tensor of scores, of its shape.

    Raises:
        ValueError: ``k`` is out of range, or there are NaNs among the scores.
        TypeError: the scores are not floating point.
    """
    if not scores:
        if k != 0:
            raise ValueError(f"k must be in [0, 0] for no scores, got {k}")
        return []
    mask = binarize(torch.cat([s.detach().reshape(-1) for s in scores]), k)
    parts = mask.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


@torch.library.custom_op("sparsebilevel::binarize", mutates_args=())
def _binarize(scores: Tensor, k: int) -> Tensor:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if not 0 <= k <= scores.numel():
        raise ValueError(f"k must be in [0, {scores.numel()}] for scores of shape {list(scores.shape)}, got {k}")
    # float64 would lose order in the 32-bit keys of the kernel; the half types fit them exactly.
    if native.available() and scores.device.type == "cpu" and scores.dtype != torch.float64:
        scores = scores.float().contiguous()
        mask = torch.empty(scores.shape, dtype=torch.bool)
        threads = torch.get_num_threads()
        nans = native.lib.binarize(scores.data_ptr(), scores.numel(), k, mask.data_ptr(), threads)
        _check_nans(nans, scores)
        return mask
    _check_nans(int(scores.isnan().sum()), scores)
    return reference.binarize(scores, k)


@_binarize.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


def _check_nans(count: int, scores: Tensor) -> None:
    if count:
        raise ValueError(f"scores must not be NaN: {count} of {scores.numel()} are")
