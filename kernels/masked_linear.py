"""Linear layer with a masked weight: ``sparsebilevel::masked_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .gradient import check_masked_operands, distribute_gradient, register_autocast, save_gradient_dtypes


@torch.library.custom_op("sparsebilevel::masked_linear", mutates_args=())
def _masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    mask_scores: Tensor | None,
    grad_sink: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    return reference.masked_linear(input, weight, mask, bias)


@_masked_linear.register_fake
def _(input, weight, mask, bias, mask_scores, grad_sink, positions):
    return torch.nn.functional.linear(input, weight, bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, mask, _bias, mask_scores, grad_sink, positions = inputs
    ctx.save_for_backward(input, weight, mask, positions)
    save_gradient_dtypes(ctx, mask_scores, grad_sink)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mask, positions = ctx.saved_tensors
    need_input, need_weight, _, need_bias, need_scores, need_sink, _ = ctx.needs_input_grad
    grad_input = grad_bias = None
    grad_weight = grad_scores = grad_sink = None
    rows = grad_output.reshape(-1, grad_output.shape[-1])
    if need_input:
        grad_input = grad_output.matmul(reference.effective_weight(weight, mask))
    if need_weight or need_scores or need_sink:
        grad = rows.t().mm(input.reshape(-1, input.shape[-1]))
        needs = (need_weight, need_scores, need_sink)
        grad_weight, grad_scores, grad_sink = distribute_gradient(ctx, grad, weight, mask, positions, needs)
    if need_bias:
        grad_bias = rows.sum(0)
    return grad_input, grad_weight, None, grad_bias, grad_scores, grad_sink, None


_masked_linear.register_autograd(_backward, setup_context=_setup_context)
register_autocast("masked_linear", operands=frozenset({0, 1, 3}))


@register_flop_formula(torch.ops.sparsebilevel.masked_linear)
def _masked_linear_flops(input_shape, weight_shape, *_, **__) -> int:
    """Executed FLOPs (two a multiply-add) of the dense product behind the mask."""
    rows = 1
    for size in input_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    *,
    mask_scores: Tensor | None = None,
    grad_sink: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """``input @ (mask * weight).T + bias`` under the gradient contract of :mod:`sparsebilevel.kernels.gradient`.

    Args:
        input: ``[..., K]``, floating point.
        weight: ``[N, K]``. Its gradient is ``mask * G``.
        mask: ``[N, K]``, bool, True = kept.
        bias: ``[N]`` or None.
        mask_scores: ``[N, K]``; takes no part in the forward, its gradient is ``weight * G``.
        grad_sink: leaf made by :func:`~sparsebilevel.kernels.make_grad_sink`; its ``.grad`` accumulates ``G``.
        positions: int64 ``[capacity]`` flat positions at which the sink wants ``G``, negative = padding; None is dense.

    Returns:
        ``[..., N]`` in the dtype of ``input`` (under autocast in the autocast dtype).

    Raises:
        ValueError: operands whose shapes or dtypes do not fit, naming the argument.
    """
    check_masked_operands(weight, mask, mask_scores, grad_sink, positions)
    if input.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"input has shape {list(input.shape)}; its last size must be {weight.shape[1]}, the weight's")
    return torch.ops.sparsebilevel.masked_linear(input, weight, mask, bias, mask_scores, grad_sink, positions)
