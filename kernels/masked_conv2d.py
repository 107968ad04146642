"""2-D convolution with a masked weight: ``sparsebilevel::masked_conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    input = native.in_memory(input)
    if gpu_products.runs(input, weight):
        return gpu_products.conv2d(input, weight, mask, bias, (stride, padding, dilation, groups))
    support = sparse_support("masked_conv2d", input, weight, mask, stride[0] * stride[1], passes="forward")
    if support is None:
        z = dense.effective_weight(weight, mask, input.dtype)
        return torch.ops.aten.convolution(input, z, bias, stride, padding, dilation, False, [0, 0], groups)
    geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
    size = input.shape[0], weight.shape[0], *geometry.output_size(input.shape[2:], weight.shape[2:])
    output = plans.empty_maps(size, gpu_products.is_channels_last(input, weight), input.dtype)
    return plans.conv2d(input, weight, support, bias, geometry, output)


_masked_conv2d = torch.library.custom_op("sparsebilevel::masked_conv2d", _forward, mutates_args=(), tags=TAGS)


@_masked_conv2d.register_fake
def _(input, weight, mask, bias, mask_scores, grad_sink, positions, stride, padding, dilation, groups):
    z = weight.to(input.dtype)
    return torch.ops.aten.convolution(input, z, bias, stride, padding, dilation, False, [0, 0], groups)


def _dense_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Needs,
    library: Any = reference,
    z: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of ``needs``; differentiable by ``library=reference``, and faster by ``dense``.

    ``z`` is the effective weight, if it has a history of its own.
    """
    is_shape = not needs.input and weight.dtype == input.dtype  # that is all which the other gradients need
    if z is None:
        z = weight if is_shape else library.effective_weight(weight, mask, input.dtype)
    grad_input, grad, grad_bias = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        z,
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [needs.input, needs.grad, needs.bias],
    )
    if needs.grad:
        distribute = dense.distribute if library is dense else distribute_gradient
        return grad_input, *distribute(grad, weight, mask, positions, needs), grad_bias
    return grad_input, None, None, None, grad_bias


def _compute_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    positions: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` (see Needs) asks for, in its order."""
    wanted = Needs(*needs)
    input, grad_output = native.in_memory(input), native.in_memory(grad_output)
    grads: dict[str, Tensor | None] = {}
    geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
    if gpu_products.runs(input, weight):
        operands = grad_output, input, weight, mask
        if wanted.input:
            grads["input"] = gpu_products.conv2d_input_grad(*operands, (stride, padding, dilation, groups))
        if wanted.grad:
            given = positions, (stride, padding, dilation, groups), wanted
            found = gpu_products.conv2d_weight_grad(*operands, *given) or (None, None, None)
            grads |= dict(zip(("weight", "scores", "sink"), found, strict=True))
        grads = {name: grad for name, grad in grads.items() if grad is not None}
        for_input, for_weight = None, None
    else:
        for_input, for_weight = sparse_grads(
            "masked_conv2d", input, weight, mask, wanted, positions, stride[0] * stride[1]
        )
    if for_input is not None:
        channels_last = gpu_products.is_channels_last(input, weight)
        grad_input = plans.empty_maps(input.shape, channels_last, input.dtype)
        grads["input"] = plans.conv2d_input_grad(grad_output, weight, for_input, geometry, grad_input)
    if for_weight is not None:
        learning = positions if wanted.sink else None
        grads["weight"], grads["sink"] = plans.conv2d_weight_grad(
            input, grad_output, weight, for_weight, mask, learning, geometry
        )
    if wanted.bias and (for_weight is not None or not wanted.grad):  # else oneDNN gives it on the way
        grads["bias"] = grad_output.sum((0, 2, 3))
    missing = Needs(*(need and name not in grads for name, need in zip(Needs._fields, wanted, strict=True)))
    if any(missing):
        others = _dense_backward(
            *(grad_output, input, weight, mask, positions, stride, padding, dilation, groups, missing),
            library=dense,
        )
        grads |= {name: grad for name, grad in zip(Needs._fields, others, strict=True) if grad is not None}
    return [grads[name] for name, need in zip(Needs._fields, wanted, strict=True) if need]  # type: ignore[misc]


_masked_conv2d_backward = torch.library.custom_op(
    "sparsebilevel::masked_conv2d_backward", _compute_backward, mutates_args=(), tags=TAGS
)


@_masked_conv2d_backward.register_fake
def _(grad_output, input, weight, mask, positions, stride, padding, dilation, groups, needs):
    grads = _dense_backward(
        grad_output, input, weight, mask, positions, stride, padding, dilation, groups, Needs(*needs)
    )
    return [grad for grad in grads if grad is not None]


_backward = dense.backward_of("masked_conv2d_backward", _compute_backward, _dense_backward)
_masked_conv2d.register_autograd(_backward, setup_context=dense.setup_context)
_OPERANDS = frozenset({0, 1, 3})
register_autocast("masked_conv2d", _OPERANDS)
_eager = eager_function(_forward, dense.setup_context, _backward)


@register_flop_formula(torch.ops.sparsebilevel.masked_conv2d)
def _masked_conv2d_flops(input_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """Executed FLOPs (two a multiply-add) of the dense convolution behind the mask."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape), transposed=False)


@register_flop_formula(torch.ops.sparsebilevel.masked_conv2d_backward)
def _masked_conv2d_backward_flops(grad_shape, input_shape, weight_shape, _mask, _positions, *geometry, **__) -> int:
    """Of the dense products that are asked for, counted as torch counts them."""
    needs = Needs(*geometry[-1])
    grad, x, w = list(grad_shape), list(input_shape), list(weight_shape)
    flops = conv_flop_count(grad, w, x, transposed=True) if needs.input else 0
    if needs.grad:
        x, grad, w = ([shape[1], shape[0], *shape[2:]] for shape in (x, grad, w))
        flops += conv_flop_count(x, grad, w, transposed=False)
    return flops


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    mask_scores: Tensor | None = None,
    grad_sink: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """``conv2d(input, mask * weight) + bias`` under the gradient contract of :mod:`sparsebilevel.kernels.gradient`.

    Args:
        input: ``[B, C, H, W]`` or ``[C, H, W]``, floating point, any memory format.
        weight: ``[N, C / groups, R, S]``. Its gradient is ``mask * G``.
        mask: of the weight's shape, bool, True = kept.
        bias: ``[N]`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, padding strings included.
        mask_scores: of the weight's shape; takes no part in the forward, its gradient is ``weight * G``.
        grad_sink: leaf made by :func:`~sparsebilevel.kernels.make_grad_sink`; its ``.grad`` accumulates ``G``. Or the
            weight itself, whose gradient then is ``G``.
        positions: int64 ``[capacity]`` flat positions at which the sink wants ``G``, negative = padding; None is dense.

    Returns:
        ``[B, N, P, Q]`` (``[N, P, Q]`` for an input without batch).

    Raises:
        ValueError: operands whose shapes or dtypes do not fit, naming the argument.
    """
    check_masked_operands(weight, mask, mask_scores, grad_sink, positions)
    refuse_tangents(input, weight, bias, mask_scores)
    if input.dim() not in (3, 4):
        raise ValueError(f"input has shape {list(input.shape)}; expected [B, C, H, W] or [C, H, W]")
    check_product(input, weight, bias)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups={groups} is not allowed; expected a divisor of the weight's {weight.shape[0]} outputs"
        )
    channels = weight.shape[1] * groups
    if input.shape[-3] != channels:
        raise ValueError(f"input has {input.shape[-3]} channels, but weight and groups={groups} ask for {channels}")
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    input, padding = _resolve_padding(input, weight, stride, padding, dilation)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    args = (batched, weight, mask, bias, mask_scores, grad_sink, positions, stride, padding, dilation, groups)
    output = call(torch.ops.sparsebilevel.masked_conv2d, _eager, reference.masked_conv2d, _OPERANDS, args)
    return output if input.dim() == 4 else output.squeeze(0)


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value] if isinstance(value, int) else list(value)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or any(v < least for v in pair):
        raise ValueError(f"{name}={value!r} is not allowed; expected a whole number, at least {least}, or two of them")
    return pair


def _resolve_padding(
    input: Tensor, weight: Tensor, stride: list[int], padding: int | Sequence[int] | str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Turn string padding into numbers; an odd total of ``"same"`` pads the input by one more on the far side first."""
    if not isinstance(padding, str):
        return input, _pair("padding", padding, 0)
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        raise ValueError(f"padding={padding!r} is not allowed; expected an int, a pair, 'valid' or 'same'")
    if any(s != 1 for s in stride):
        raise ValueError(f"padding='same' needs stride 1, got stride={tuple(stride)}")
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, [0, total[1] % 2, 0, total[0] % 2])
    return input, [t // 2 for t in total]
