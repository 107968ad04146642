"""2-D convolution with a masked weight: ``sparsebilevel::masked_conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from . import reference
from .gradient import check_masked_operands, distribute_gradient, register_autocast, save_gradient_dtypes


@torch.library.custom_op("sparsebilevel::masked_conv2d", mutates_args=())
def _masked_conv2d(
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
    z = reference.effective_weight(weight, mask)
    return torch.ops.aten.convolution(input, z, bias, stride, padding, dilation, False, [0, 0], groups)


@_masked_conv2d.register_fake
def _(input, weight, mask, bias, mask_scores, grad_sink, positions, stride, padding, dilation, groups):
    return torch.ops.aten.convolution(input, weight, bias, stride, padding, dilation, False, [0, 0], groups)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, mask, bias, mask_scores, grad_sink, positions, *geometry = inputs
    ctx.save_for_backward(input, weight, mask, positions)
    ctx.geometry = geometry
    ctx.bias_sizes = None if bias is None else list(bias.shape)
    save_gradient_dtypes(ctx, mask_scores, grad_sink)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mask, positions = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    need_input, need_weight, _, need_bias, need_scores, need_sink = ctx.needs_input_grad[:6]
    need_grad = need_weight or need_scores or need_sink
    grad_input, grad, grad_bias = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        reference.effective_weight(weight, mask),
        ctx.bias_sizes,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [need_input, need_grad, need_bias],
    )
    grad_weight = grad_scores = grad_sink = None
    if need_grad:
        needs = (need_weight, need_scores, need_sink)
        grad_weight, grad_scores, grad_sink = distribute_gradient(ctx, grad, weight, mask, positions, needs)
    return grad_input, grad_weight, None, grad_bias, grad_scores, grad_sink, None, None, None, None, None


_masked_conv2d.register_autograd(_backward, setup_context=_setup_context)
register_autocast("masked_conv2d", operands=frozenset({0, 1, 3}))


@register_flop_formula(torch.ops.sparsebilevel.masked_conv2d)
def _masked_conv2d_flops(input_shape, weight_shape, *_, out_shape=None, **__) -> int:
    """Executed FLOPs (two a multiply-add) of the dense convolution behind the mask."""
    return conv_flop_count(list(input_shape), list(weight_shape), list(out_shape), transposed=False)


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
        grad_sink: leaf made by :func:`~sparsebilevel.kernels.make_grad_sink`; its ``.grad`` accumulates ``G``.
        positions: int64 ``[capacity]`` flat positions at which the sink wants ``G``, negative = padding; None is dense.

    Returns:
        ``[B, N, P, Q]`` (``[N, P, Q]`` for an input without batch).

    Raises:
        ValueError: operands whose shapes or dtypes do not fit, naming the argument.
    """
    check_masked_operands(weight, mask, mask_scores, grad_sink, positions)
    if input.dim() not in (3, 4):
        raise ValueError(f"input has shape {list(input.shape)}; expected [B, C, H, W] or [C, H, W]")
    channels = weight.shape[1] * groups
    if input.shape[-3] != channels:
        raise ValueError(f"input has {input.shape[-3]} channels, but weight and groups={groups} ask for {channels}")
    stride, dilation = _pair(stride), _pair(dilation)
    input, padding = _resolve_padding(input, weight, stride, padding, dilation)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output = torch.ops.sparsebilevel.masked_conv2d(
        batched, weight, mask, bias, mask_scores, grad_sink, positions, stride, padding, dilation, groups
    )
    return output if input.dim() == 4 else output.squeeze(0)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _resolve_padding(
    input: Tensor, weight: Tensor, stride: list[int], padding: int | Sequence[int] | str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Turn string padding into numbers; an odd total of ``"same"`` pads the input by one more on the far side first."""
    if not isinstance(padding, str):
        return input, _pair(padding)
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
