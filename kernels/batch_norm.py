"""2-D batch normalization with residual addition and ReLU in one pass: ``F.batch_norm`` on ordinary channels_last maps.

The CPU kernels (csrc/cpu/batch_norm.h) take float32 and bfloat16 maps with float32 statistics and affine parameters,
and sum in float64; everything else runs as torch runs it. An autograd function rather than a custom op, whose own cost
would be three times as high: a step calls it tens of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import native, plans, reference
from .gradient import is_left_to_torch


def _is_plain(maps: Tensor) -> bool:
    """Whether the kernels can read it."""
    return (
        type(maps) in native.PLAIN
        and maps.dtype in (torch.float32, torch.bfloat16)
        and maps.is_cpu
        and maps.layout is torch.strided
        and maps.is_contiguous(memory_format=torch.channels_last)
        and not maps.is_neg()  # only marked as negative in memory
        and not maps._is_zerotensor()
    )


def _is_vector(vector: Tensor | None, channels: int) -> bool:
    return vector is None or (
        type(vector) in native.PLAIN
        and vector.dtype == torch.float32
        and vector.shape == (channels,)
        and vector.is_cpu
        and vector.is_contiguous()
        and not vector.is_neg()
    )


def _takes(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
) -> bool:
    if not native.available() or native.watched() or (training and eps <= 0):
        return False
    if forward_ad._current_level >= 0:  # tangents would be dropped without a word
        return False
    if not isinstance(input, Tensor) or input.dim() != 4 or not _is_plain(input):
        return False
    channels, elements = input.shape[1], input.numel()
    if not elements or (training and elements == channels) or (running_mean is None) != (running_var is None):
        return False
    if not training and running_mean is None:
        return False
    if not all(_is_vector(v, channels) for v in (running_mean, running_var, weight, bias)):
        return False
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and _is_plain(residual)
    )


def _rows(maps: Tensor) -> tuple[int, int, bool]:
    channels = maps.shape[1]
    return maps.numel() // channels, channels, maps.dtype == torch.bfloat16


def _empty_like(maps: Tensor) -> Tensor:
    return plans.empty_maps(maps.shape, channels_last=True, dtype=maps.dtype)


def _forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and ``[4, C]`` terms for the backward pass."""
    out, terms = _empty_like(input), plans.vectors(4, input.shape[1])
    native.lib.batch_norm_nhwc_forward(
        _rows(input),
        input.data_ptr(),
        native.address(residual),
        native.address(weight),
        native.address(bias),
        native.address(running_mean),
        native.address(running_var),
        momentum,
        eps,
        training,
        relu,
        out.data_ptr(),
        terms.data_ptr(),
        torch.get_num_threads(),
    )
    if training and running_mean is not None and running_var is not None:
        torch.autograd.graph.increment_version([running_mean, running_var])
    return out, terms


class _BatchNorm(Function):
    """The result ``uses`` times: their gradients are added up on the way, for which autograd would take a pass."""

    @staticmethod
    def forward(
        ctx: Any,
        uses: int,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, ...]:
        out, terms = _forward(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu)
        # Without a residual the sign of the result follows from the input.
        ctx.save_for_backward(input, weight, terms, out if relu and residual is not None else None)
        ctx.training, ctx.eps, ctx.relu = training, eps, relu
        ctx.set_materialize_grads(False)
        return out, *(out.data for _ in range(uses - 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, needs_input, _, _, needs_weight, needs_bias, _, _, _, needs_residual, _ = ctx.needs_input_grad
        grad, more = _two([g for g in grads if g is not None])
        if grad is None:
            return (None,) * 11
        input, weight, terms, out = ctx.saved_tensors
        maps = None
        if not native.watched() and not is_left_to_torch(grad) and not (more is not None and is_left_to_torch(more)):
            maps = [
                m if m is None else m.contiguous(memory_format=torch.channels_last) for m in (grad, more, input, out)
            ]
        found: tuple[Tensor | None, ...]
        if maps is not None and all(m is None or _is_plain(m) for m in maps):
            found = _backward(ctx, *maps, terms, needs_residual)  # type: ignore[arg-type, call-arg]
        else:
            found = _differentiable_backward(ctx, grad if more is None else grad + more, input, weight, terms, out)
        grad_input, grad_weight, grad_bias, grad_residual = found
        return (
            *(None, grad_input if needs_input else None, None, None),
            *(grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None, None),
            *(grad_residual if needs_residual else None, None),
        )


def _two(grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """At most two gradients with the same sum; None for those that are missing."""
    while len(grads) > 2:
        grads.append(grads.pop() + grads.pop())
    first, second, *_ = *grads, None, None
    return first, second


def _backward(
    ctx: Any,
    grad: Tensor,
    more: Tensor | None,
    input: Tensor,
    out: Tensor | None,
    terms: Tensor,
    needs_residual: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual."""
    changes = ctx.relu or more is not None  # else the gradient of the residual is that of the result
    grad_input, grad_residual = _empty_like(input), _empty_like(input) if needs_residual and changes else None
    vectors = plans.vectors(2, input.shape[1])
    native.lib.batch_norm_nhwc_backward(
        _rows(input),
        terms.data_ptr(),
        ctx.training,
        ctx.relu,
        grad.data_ptr(),
        native.address(more),
        input.data_ptr(),
        native.address(out),
        grad_input.data_ptr(),
        native.address(grad_residual),
        vectors.data_ptr(),
        vectors.data_ptr() + 4 * input.shape[1],
        torch.get_num_threads(),
    )
    return grad_input, vectors[0], vectors[1], grad_residual if changes else grad


def _differentiable_backward(
    ctx: Any, grad: Tensor, input: Tensor, weight: Tensor | None, terms: Tensor, out: Tensor | None
) -> tuple[Tensor, ...]:
    """The same by torch's own operators."""
    mean, inverse, scale, shift = terms[:, :, None, None]
    if ctx.relu:
        before = torch.addcmul(shift, input.detach().float(), scale) if out is None else out
        grad = torch.where(before <= 0, 0.0, grad)
    statistics = None if ctx.training else (mean, inverse)
    return *reference.batch_norm_backward(grad, input, weight, ctx.eps, statistics), grad


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``F.batch_norm``, then ``+ residual``, then ReLU.

    One pass over memory, and one more for the statistics, on float32 or bfloat16 maps in channels_last on the CPU with
    float32 vectors; there the results do not depend on the number of threads. All else goes to torch, and so does what
    torch.compile and other tracers see. Twice differentiable.

    Args:
        input: ``[B, C, H, W]``, floating point.
        running_mean, running_var: ``[C]`` or None; updated in training.
        weight, bias: ``[C]`` or None.
        training, momentum, eps: as in ``torch.nn.functional.batch_norm``.
        residual: of the input's shape (or one that broadcasts), or None.
        relu: whether a ReLU follows.

    Returns:
        ``[B, C, H, W]``, of the input's dtype.

    Raises:
        ValueError, RuntimeError: what torch refuses, as torch says it: one value per channel in training, vectors that
            do not fit.
    """
    arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
    return batch_norm_for_uses(1, *arguments, residual, relu)[0]


def batch_norm_for_uses(
    uses: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> tuple[Tensor, ...]:
    """:func:`batch_norm` for ``uses`` users of its result, which must not write to it, each with a tensor of its own.

    The tensors share their memory, and the gradients that come back are added up in the backward pass of the op.
    """
    arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
    if not _takes(input, running_mean, running_var, weight, bias, training, eps, residual):
        return (reference.batch_norm(*arguments, residual=residual, relu=relu),) * uses
    if torch.is_grad_enabled():
        return _BatchNorm.apply(uses, *arguments, residual, relu)
    return (_forward(*arguments, residual, relu)[0],) * uses
