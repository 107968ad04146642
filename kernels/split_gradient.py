"""One dense ``G`` to the gradients that follow from it: ``split_gradient``, of many layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gpu, reference
from .apply_mask import check_mask, elementwise, lies_alike


def split_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    need_weight: bool = True,
    need_scores: bool = True,
    need_sink: bool = False,
) -> tuple[list[Tensor] | None, list[Tensor] | None, list[Tensor] | None]:
    """``mask * G``, ``weight * G`` and a copy of ``G`` for each tensor; on a GPU in one launch for each type.

    Exact after accumulation and all-reduce: it is linear, and it is not where a formula with ``G * G`` belongs.

    Args:
        grads: ``G = dloss/d(mask * weight)`` of each layer, floating point.
        weights: each of its ``G``'s shape.
        masks: each bool and of the weight's shape, or its packed words, int64 ``[ceil(size / 64)]``.
        need_weight, need_scores, need_sink: which of the three results are wanted; the others are None.

    Returns:
        Lists of gradients of the weights, in their dtype; of the mask scores; and ``G`` itself, the last two float32,
        or float64 if ``G`` is.

    Raises:
        ValueError: lists of different lengths; a weight or mask that does not fit, naming it.
    """
    if not len(grads) == len(weights) == len(masks):
        raise ValueError(f"{len(grads)} grads, {len(weights)} weights and {len(masks)} masks; expected as many of each")
    for i, (grad, weight, mask) in enumerate(zip(grads, weights, masks, strict=True)):
        if grad.shape != weight.shape or grad.device != weight.device:
            raise ValueError(
                f"grads[{i}] has shape {list(grad.shape)} on {grad.device}; expected {list(weight.shape)} on "
                f"{weight.device}, as weights[{i}]"
            )
        check_mask(f"masks[{i}]", mask, weight)
    needs = need_weight, need_scores, need_sink
    outs: list[list[Tensor | None]] = [[None] * len(grads) for _ in needs]
    groups: dict[tuple, list[int]] = {}
    with torch.no_grad():
        for i, (grad, weight, mask) in enumerate(zip(grads, weights, masks, strict=True)):
            types = grad.device, grad.dtype, weight.dtype, mask.dtype
            if gpu.available(grad.device) and lies_alike(weight, mask, grad):
                groups.setdefault(types, []).append(i)
            else:
                bools = mask if mask.dtype == torch.bool else reference.unpacked(mask, weight.shape)
                for out, value in zip(outs, reference.split_gradient(grad, weight, bools, needs), strict=True):
                    out[i] = value
        for at in groups.values():
            inputs = [[column[i] for i in at] for column in (grads, weights, masks)]
            made: list[list[Tensor] | None] = []
            dtypes = weights[at[0]].dtype, torch.float32, torch.float32
            for column, need, dtype in zip(outs, needs, dtypes, strict=True):
                made.append([torch.empty_like(g, dtype=dtype) for g in inputs[0]] if need else None)
                for i, tensor in zip(at, made[-1] or (), strict=False):
                    column[i] = tensor
            elementwise().split_gradient(*inputs, *made)
    grad_weights, grad_scores, sinks = (out if need else None for out, need in zip(outs, needs, strict=True))
    return grad_weights, grad_scores, sinks  # type: ignore[return-value]


def split_one(
    grad: Tensor, weight: Tensor, mask: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`split_gradient` of a single tensor with a bool mask, of which callers know that all fit."""
    need_weight, need_scores, need_sink = needs
    if not (need_weight or need_scores or need_sink):
        return None, None, None
    if not lies_alike(weight, mask, grad):
        with torch.no_grad():
            return reference.split_gradient(grad, weight, mask, needs)
    grad_weight = torch.empty_like(grad, dtype=weight.dtype) if need_weight else None
    grad_scores = torch.empty_like(grad, dtype=torch.float32) if need_scores else None
    sink = torch.empty_like(grad, dtype=torch.float32) if need_sink else None
    elementwise().split_one(grad, weight, mask, grad_weight, grad_scores, sink)
    return grad_weight, grad_scores, sink


def gather_support(grad: Tensor, positions: Tensor) -> Tensor:
    """``G`` at flat ``positions``, in the type of a sink: :func:`.reference.gather_support` in one launch.

    Where the kernels run, as the callers know.
    """
    if elementwise().takes_support(grad, positions):
        return elementwise().gather_support(grad, positions)
    with torch.no_grad():
        return reference.gather_support(grad, positions).to(torch.promote_types(grad.dtype, torch.float32))
