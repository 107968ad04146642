"""Steps of SGD and AdamW on the active weights of a mask, on the CPU (csrc/cpu/optimizer_step.h).

A step moves memory, and memory moves in cache lines: what counts is not how many weights are active but how many
*pieces* of 16 weights hold one. Of an unstructured mask at 90 % those are four in five.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

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
