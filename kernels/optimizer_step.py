"""Steps of SGD and AdamW on the weights of a mask: on the CPU on the active ones alone (csrc/cpu/optimizer_step.h).

A step moves memory, and memory moves in cache lines: what counts is not how many weights are active but how many
*pieces* of 16 weights hold one. Of an unstructured mask at 90 % those are four in five.

On a GPU a step takes all weights of many layers in one launch, and writes their masked copies (:mod:`.apply_mask`) in
the same pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu, native
from .apply_mask import kept_copy, lies_alike, note_written

# From benchmarks/bench_optimizer_step.py: a weight with more of its pieces active is stepped faster as a whole, and one
# of fewer elements costs more to look after than to step.
_LARGEST_SHARE = 0.5
SMALLEST = 1 << 16


class ActiveWeight(NamedTuple):
    """What a step on one weight takes: float32 tensors of one shape and the same strides, without gaps."""

    pieces: Any
    weight: Tensor
    grad: Tensor
    state: Sequence[Tensor]
    step: float = 1
    """AdamW: number of this step, counted from 1."""


def find_pieces(mask: Tensor, weight: Tensor, state: Sequence[Tensor]) -> Any | None:
    """The pieces of ``mask`` for steps on ``weight``, or None where the dense step is due.

    It is where weight or state hold anything but zeros outside of the mask, since a dense step would change those,
    where it is faster, and where there is no extension.

    Args:
        mask: bool, of the weight's shape.
        weight, state: as in :class:`ActiveWeight`.
    """
    if not native.available() or weight.numel() < SMALLEST or mask.shape != weight.shape or not mask.is_cpu:
        return None
    if any(t.shape != weight.shape or t.dtype != torch.float32 or not t.is_cpu for t in state):
        return None
    if mask.stride() != weight.stride():
        mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
    most = int(_LARGEST_SHARE * weight.numel() / 16)
    addresses = [tensor.data_ptr() for tensor in (weight, *state)]
    return native.lib.find_active_pieces(mask.data_ptr(), mask.numel(), addresses, most, torch.get_num_threads())


def _arguments(weights: Iterable[ActiveWeight]) -> list[tuple]:
    arguments = []
    for w in weights:
        first, second, *_ = *(tensor.data_ptr() for tensor in w.state), 0, 0
        arguments.append((w.pieces, w.weight.data_ptr(), w.grad.data_ptr(), first, second, w.weight.numel(), w.step))
    return arguments


def _tell_autograd(weights: Iterable[ActiveWeight]) -> None:
    torch.autograd.graph.increment_version([tensor for w in weights for tensor in (w.weight, *w.state)])


def sgd_step(
    weights: Sequence[ActiveWeight],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One step of ``torch.optim.SGD``, in place; the state is the momentum buffer, or nothing without momentum."""
    settings = (lr, momentum, dampening, weight_decay, nesterov, maximize)
    native.lib.sgd_step(_arguments(weights), *settings, torch.get_num_threads())
    _tell_autograd(weights)


def adamw_step(
    weights: Sequence[ActiveWeight],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of ``torch.optim.AdamW``, in place; the state is ``exp_avg`` and ``exp_avg_sq``; ``eps > 0``."""
    settings = (lr, *betas, eps, weight_decay, maximize)
    native.lib.adamw_step(_arguments(weights), *settings, torch.get_num_threads())
    _tell_autograd(weights)


class GpuWeight(NamedTuple):
    """What a step on one weight of a GPU takes: float32 tensors of one shape and the same strides, without gaps."""

    weight: Tensor
    grad: Tensor
    mask: Tensor
    copy: Tensor
    state: Sequence[Tensor]
    step: Tensor | None = None
    """AdamW: number of this step, counted from 1, a float32 on the device."""
    scores: SteppedScores | None = None
    """Scores to step beside it; the gradient is then ``G``."""


class SteppedScores(NamedTuple):
    """Scores of a :class:`GpuWeight`: tensors like its weight."""

    scores: Tensor
    state: Sequence[Tensor]
    step: Tensor | None = None


def gpu_weight(weight: Tensor, mask: Tensor, state: Sequence[Tensor]) -> GpuWeight | None:
    """The weight for a step on the GPU, or None where torch's own is due: where no copy is kept of it."""
    grad = weight.grad
    if grad is None or not gpu.available(weight.device) or gpu.is_capturing(weight.device):
        return None
    copy = kept_copy(weight, mask)
    if copy is None or not lies_alike(weight, mask, copy, grad, *state):
        return None
    if any(t.dtype != torch.float32 for t in (weight, *state)):
        return None
    return GpuWeight(weight, grad, mask, copy, state)


def with_scores(masked: GpuWeight, of_scores: SteppedScores) -> GpuWeight | None:
    """The same with its scores, or None where these cannot be stepped beside it."""
    tensors = (of_scores.scores, *of_scores.state)
    if any(t.dtype != torch.float32 for t in tensors) or not lies_alike(masked.weight, masked.mask, *tensors):
        return None
    return masked._replace(scores=of_scores)


def _by_type(weights: Sequence[GpuWeight]) -> Iterable[list[GpuWeight]]:
    groups: dict[tuple, list[GpuWeight]] = {}
    for w in weights:
        groups.setdefault((w.weight.device, w.grad.dtype, w.copy.dtype), []).append(w)
    return groups.values()


def _columns(group: Sequence[GpuWeight]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    return [w.weight for w in group], [w.grad for w in group], [w.mask for w in group], [w.copy for w in group]


def _scores(group: Sequence[GpuWeight], settings: Mapping[str, Any] | None) -> Any:
    from . import triton_elementwise

    if settings is None:
        return None
    found = [w.scores for w in group if w.scores is not None]
    state = list(zip(*(s.state for s in found), strict=True))
    return triton_elementwise.Scores(
        [s.scores for s in found], state, settings, [s.step for s in found if s.step is not None]
    )


def masked_sgd_step(
    weights: Sequence[GpuWeight], settings: Mapping[str, Any], scores_settings: Mapping[str, Any] | None = None
) -> None:
    """:func:`sgd_step` on a GPU; the state is there. With settings of scores, on those as well, which all then have."""
    from . import triton_elementwise

    for group in _by_type(weights):
        buffers = [w.state[0] for w in group] if group[0].state else None
        scores = _scores(group, scores_settings)
        triton_elementwise.sgd_step(*_columns(group), buffers, scores, fresh=False, **settings)
    for w in weights:
        note_written(w.weight, w.mask, w.copy)


def masked_adamw_step(
    weights: Sequence[GpuWeight], settings: Mapping[str, Any], scores_settings: Mapping[str, Any] | None = None
) -> None:
    """:func:`adamw_step` on a GPU, otherwise as :func:`masked_sgd_step`."""
    from . import triton_elementwise

    for group in _by_type(weights):
        averages, squares = ([w.state[i] for w in group] for i in (0, 1))
        steps = [w.step for w in group if w.step is not None]
        scores = _scores(group, scores_settings)
        triton_elementwise.adamw_step(*_columns(group), averages, squares, steps, scores, **settings)
    for w in weights:
        note_written(w.weight, w.mask, w.copy)
