"""The server's average where devices keep different entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def aggregate_masked(
    updates: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    old: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Weighted average of every entry over the devices that keep it; ``old`` where none of them does.

    What a device sends at an entry that it does not keep, or with a weight of 0, is not looked at. Sums are in float64;
    integers are rounded.

    Args:
        updates: of each device, tensors by name, of the names and shapes of ``old``.
        masks: of each device, bool tensors by name, of the shapes of ``old``, True where it keeps the entry; a tensor
            without a mask is kept whole.
        weights: of each device, finite and at least 0.
        old: tensors by name, floating or integer.

    Returns:
        Tensors by name, of the dtypes of ``old``.

    Raises:
        ValueError: the lists differ in length, a weight is out of range, a mask is not bool, or a name or shape differs
            from ``old``'s.
    """
    if not len(updates) == len(masks) == len(weights):
        raise ValueError(f"{len(updates)} updates, {len(masks)} masks, {len(weights)} weights: must agree")
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights={list(weights)!r} is not allowed; expected finite numbers >= 0")
    for update, mask in zip(updates, masks, strict=True):
        if update.keys() != old.keys() or not mask.keys() <= old.keys():
            raise ValueError(f"updates {list(update)} and masks {list(mask)} do not fit old, {list(old)}")
        for name, tensor in (*update.items(), *mask.items()):
            if tensor.shape != old[name].shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(old[name].shape)}, as in old")
        for name, tensor in mask.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"the mask of {name} has dtype {tensor.dtype}; expected torch.bool")
    result = {}
    for name, before in old.items():
        total = torch.zeros(before.shape, dtype=torch.float64, device=before.device)
        count = torch.zeros_like(total)
        for update, mask, weight in zip(updates, masks, weights, strict=True):
            if weight == 0:  # and not 0 * NaN
                continue
            kept = mask.get(name)
            value = update[name].to(total)
            # Not value * kept: an entry that is not kept may hold anything, such as NaN.
            total += weight * (value if kept is None else torch.where(kept, value, torch.zeros_like(value)))
            count += weight if kept is None else weight * kept
        mean = total / count
        if not before.is_floating_point():
            mean = mean.round()
        result[name] = torch.where(count > 0, mean.to(before.dtype), before)
    return result
