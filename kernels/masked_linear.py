"""Linear layer with a masked weight: ``sparsebilevel::masked_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dense, gpu_products, native, plans, reference
from .dispatch import sparse_grads, sparse_support
from .gradient import (
    TAGS,
    Needs,
    call,
    check_masked_operands,
    check_product,
    distribute_gradient,
    eager_function,
    refuse_tangents,
    register_autocast,
)
from .plans import Geometry


def _forward(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    mask_scores: Tensor | None,
    grad_sink: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    rows = native.in_memory(_rows(input))
    if gpu_products.runs(rows, weight):
        output = gpu_products.linear(rows, weight, mask, bias)
        return output if rows is input else output.view(*input.shape[:-1], weight.shape[0])
    support = sparse_support("masked_linear", rows, weight, _maps(mask), passes="forward")
    if support is None:
        return dense.masked_linear(input, weight, mask, bias)
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    plans.conv2d(_maps(rows), _maps(weight), support, bias, Geometry(), _maps(output.view(-1, weight.shape[0])))
    return output


_masked_linear = torch.library.custom_op("sparsebilevel::masked_linear", _forward, mutates_args=(), tags=TAGS)


def _rows(tensor: Tensor) -> Tensor:
    """``[..., K]`` as ``[B, K]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _maps(rows: Tensor) -> Tensor:
    """``[B, K]`` as the 1x1 maps of a convolution."""
    return rows[:, :, None, None]


@_masked_linear.register_fake
def _(input, weight, mask, bias, mask_scores, grad_sink, positions):
    return torch.nn.functional.linear(input, weight.to(input.dtype), bias)


def _dense_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    needs: Needs,
    library: Any = reference,
    z: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of ``needs``; differentiable by ``library=reference``, and faster by ``dense``.

    ``z`` is the effective weight, if it has a history of its own.
    """
    grad_input = grad_weight = grad_scores = grad_sink = grad_bias = None
    if needs.input:
        grad_input = library.linear_input_grad(grad_output, weight, mask) if z is None else grad_output.matmul(z)
    if needs.grad:
        grad = library.linear_weight_grad(grad_output, input)
        distribute = dense.distribute if library is dense else distribute_gradient
        grad_weight, grad_scores, grad_sink = distribute(grad, weight, mask, positions, needs)
    if needs.bias:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
    return grad_input, grad_weight, grad_scores, grad_sink, grad_bias


def _compute_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: Tensor, positions: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that ``needs`` (see Needs) asks for, in its order."""
    wanted = Needs(*needs)
    grads: dict[str, Tensor | None] = {}
    rows, grad_rows = native.in_memory(_rows(input)), native.in_memory(_rows(grad_output))
    if gpu_products.runs(rows, weight):
        if wanted.input:
            grad_input = gpu_products.linear_input_grad(grad_rows, weight, mask)
            grads["input"] = grad_input if rows is input else grad_input.view(input.shape)
        if wanted.grad:
            found = gpu_products.linear_weight_grad(grad_rows, rows, weight, mask, positions, wanted)
            grads |= dict(zip(("weight", "scores", "sink"), found, strict=True))
        if wanted.bias:
            grads["bias"] = grad_rows.sum(0)
        return [grads[name] for name, need in zip(Needs._fields, wanted, strict=True) if need]  # type: ignore[misc]
    for_input, for_weight = sparse_grads("masked_linear", rows, weight, _maps(mask), wanted, positions)
    if for_input is not None:
        grad_input = torch.empty_like(rows)
        plans.conv2d_input_grad(_maps(grad_rows), _maps(weight), for_input, Geometry(), _maps(grad_input))
        grads["input"] = grad_input.view(input.shape)
    if for_weight is not None:
        learning = positions if wanted.sink else None
        grad_weight, grads["sink"] = plans.conv2d_weight_grad(
            _maps(rows), _maps(grad_rows), _maps(weight), for_weight, _maps(mask), learning, Geometry()
        )
        grads["weight"] = grad_weight.view(weight.shape)
    missing = Needs(*(need and name not in grads for name, need in zip(Needs._fields, wanted, strict=True)))
    if any(missing):
        others = _dense_backward(grad_output, input, weight, mask, positions, missing, dense)
        grads |= {name: grad for name, grad in zip(Needs._fields, others, strict=True) if grad is not None}
    return [grads[name] for name, need in zip(Needs._fields, wanted, strict=True) if need]  # type: ignore[misc]


_masked_linear_backward = torch.library.custom_op(
    "sparsebilevel::masked_linear_backward", _compute_backward, mutates_args=(), tags=TAGS
)


@_masked_linear_backward.register_fake
def _(grad_output, input, weight, mask, positions, needs):
    grads = _dense_backward(grad_output, input, weight, mask, positions, Needs(*needs))
    return [grad for grad in grads if grad is not None]


_backward = dense.backward_of("masked_linear_backward", _compute_backward, _dense_backward)
_masked_linear.register_autograd(_backward, setup_context=dense.setup_context)
_OPERANDS = frozenset({0, 1, 3})
register_autocast("masked_linear", _OPERANDS)
_eager = eager_function(_forward, dense.setup_context, _backward)


@register_flop_formula(torch.ops.sparsebilevel.masked_linear)
def _masked_linear_flops(input_shape, weight_shape, *_, **__) -> int:
    """Executed FLOPs (two a multiply-add) of the dense product behind the mask."""
    rows = 1
    for size in input_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.sparsebilevel.masked_linear_backward)
def _masked_linear_backward_flops(_grad, input_shape, weight_shape, _mask, _positions, needs, **__) -> int:
    """As many for each of the two products that are asked for."""
    wanted = Needs(*needs)
    return _masked_linear_flops(input_shape, weight_shape) * (wanted.input + wanted.grad)


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
        grad_sink: leaf made by :func:`~sparsebilevel.kernels.make_grad_sink`; its ``.grad`` accumulates ``G``. Or the
            weight itself, whose gradient then is ``G``.
        positions: int64 ``[capacity]`` flat positions at which the sink wants ``G``, negative = padding; None is dense.

    Returns:
        ``[..., N]`` in the dtype of ``input`` (under autocast in the autocast dtype).

    Raises:
        ValueError: operands whose shapes or dtypes do not fit, naming the argument.
    """
    check_masked_operands(weight, mask, mask_scores, grad_sink, positions)
    refuse_tangents(input, weight, bias, mask_scores)
    if input.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"input has shape {list(input.shape)}; its last size must be {weight.shape[1]}, the weight's")
    check_product(input, weight, bias)
    args = (input, weight, mask, bias, mask_scores, grad_sink, positions)
    return call(torch.ops.sparsebilevel.masked_linear, _eager, reference.masked_linear, _OPERANDS, args)
