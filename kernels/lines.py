"""Ops on feature maps in lines: contiguous float32 ``[ceil(B / 16), C, H, W, 16]``, sixteen images side by side.

The layout of the sparse CPU kernels (csrc/cpu/line_kernels.h). Lanes past the last image of the batch ``B`` hold
anything in maps, and zero in gradients; no sum reads them. For use by :mod:`sparsebilevel.layout`; float32 on the CPU,
once differentiable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import native, plans
from .gradient import Needs, distribute_gradient
from .plans import LANES, Geometry, Support, empty, to_lines
from .reference import effective_weight

Pair = tuple[int, int]


def _from_lines(lines: Tensor, images: int) -> Tensor:
    maps = torch.empty(images, *lines.shape[1:4], memory_format=torch.channels_last)
    return plans.from_lines(lines, maps)


class ToLines(Function):
    """Maps ``[B, C, H, W]`` of any strides to lines."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.images = maps.shape[0]
        return to_lines(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _from_lines(grad.contiguous(), ctx.images)


class FromLines(Function):
    """Lines to maps ``[images, C, H, W]`` in channels_last."""

    @staticmethod
    def forward(ctx: Any, lines: Tensor, images: int) -> Tensor:
        return _from_lines(lines, images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return to_lines(grad), None


def _extent(lines: Tensor, images: int) -> list[int]:
    return [images, lines.shape[1], lines.shape[2] * lines.shape[3]]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclasses.dataclass
class Norm:
    """A batch normalization of lines: what it does to each channel, and what follows it.

    Attributes:
        terms: ``[4, C]``: mean, 1 / standard deviation, and scale and shift of ``scale * x + shift``.
        training: the first two are functions of the lines, and gradients go through them.
        relu: a ReLU follows (after the addition of the residual, if there is one).
    """

    terms: Tensor
    training: bool
    relu: bool = False

    @classmethod
    def of_batch(
        cls,
        lines: Tensor,
        images: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        running: tuple[Tensor, Tensor] | None,
        momentum: float,
    ) -> Norm:
        """By the batch's own statistics; ``running`` mean and variance move towards them by ``momentum``."""
        terms = torch.empty(4, lines.shape[1])
        native.lib.batch_norm_terms(
            _extent(lines, images),
            lines.data_ptr(),
            _address(weight),
            _address(bias),
            eps,
            0 if running is None else running[0].data_ptr(),
            0 if running is None else running[1].data_ptr(),
            momentum,
            terms.data_ptr(),
            torch.get_num_threads(),
        )
        return cls(terms, training=True)

    @classmethod
    def of_running(cls, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Tensor, Tensor]) -> Norm:
        """By the ``running`` mean and variance."""
        mean, inverse = running[0], torch.rsqrt(running[1] + eps)
        scale = inverse if weight is None else inverse * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return cls(torch.stack([mean, inverse, scale, shift]), training=False)

    def backward(
        self,
        grad: Tensor,
        lines: Tensor,
        activation: Tensor | None,
        images: int,
        grad_lines: Tensor,
        grad_residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Writes ``grad_lines`` (may be ``grad``) and ``grad_residual``; returns gradients of weight and bias."""
        grad_weight, grad_bias = torch.empty(2, lines.shape[1]).unbind()
        mean, inverse, scale, shift = self.terms.unbind()
        native.lib.batch_norm_backward(
            _extent(lines, images),
            grad.data_ptr(),
            lines.data_ptr(),
            _address(activation),
            scale.data_ptr(),
            shift.data_ptr(),
            mean.data_ptr(),
            inverse.data_ptr(),
            self.relu,
            self.training,
            grad_lines.data_ptr(),
            _address(grad_residual),
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
            torch.get_num_threads(),
        )
        return grad_weight, grad_bias


class Join:
    """Where the two gradients of maps meet that a convolution and, past it, an addition use, as in a residual block.

    The addition's gradient comes first. It is left here, and the convolution adds its own to it while it computes,
    instead of autograd in a pass of its own. If the convolution should have come first, both go the usual way.

    Attributes:
        awaited: a convolution will take what is left here; without one nothing may be.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.awaited = False
        self.convolved = False

    def leave(self, gradient: Tensor) -> Tensor | None:
        """What the addition returns as gradient."""
        if self.convolved or not self.awaited:
            return gradient
        self.gradient = gradient
        return None

    def take(self) -> Tensor | None:
        """What the convolution is to add its gradient to."""
        gradient, self.gradient, self.convolved = self.gradient, None, True
        return gradient


class Normalize(Function):
    """``relu(weight * (lines - mean) / deviation + bias + residual)``; residual and ReLU are optional."""

    @staticmethod
    def forward(
        ctx: Any,
        lines: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: Norm,
        images: int,
        join: Join | None,
    ) -> Tensor:
        out = empty(*lines.shape)
        native.lib.batch_norm_forward(
            _extent(lines, images),
            lines.data_ptr(),
            _address(residual),
            norm.terms[2].data_ptr(),
            norm.terms[3].data_ptr(),
            norm.relu,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        # Without a residual the sign of the activation follows from the lines.
        ctx.save_for_backward(lines, out if norm.relu and residual is not None else None)
        ctx.norm, ctx.images, ctx.join = norm, images, join
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lines, activation = ctx.saved_tensors
        needs, norm = ctx.needs_input_grad, ctx.norm
        grad = grad.contiguous()
        grad_lines, grad_residual = empty(*lines.shape), None
        if needs[3] and norm.relu:
            grad_residual = empty(*lines.shape)
        grad_weight, grad_bias = norm.backward(grad, lines, activation, ctx.images, grad_lines, grad_residual)
        if needs[3] and not norm.relu:
            grad_residual = grad
        elif grad_residual is not None and ctx.join is not None:
            grad_residual = ctx.join.leave(grad_residual)
        return (
            grad_lines if needs[0] else None,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
            grad_residual,
            None,
            None,
            None,
        )


class MaxPool(Function):
    """Maximum over windows, for settings as ``F.max_pool2d`` takes them (pairs)."""

    @staticmethod
    def forward(ctx: Any, lines: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
        blocks, channels, height, width, _ = lines.shape
        out_size = Geometry(stride, padding, dilation).output_size((height, width), kernel)
        out = empty(blocks, channels, *out_size, LANES)
        ctx.shape = [height, width, *out_size, *kernel, *stride, *padding, *dilation]
        native.lib.max_pool_forward(
            ctx.shape, blocks * channels, lines.data_ptr(), out.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(lines, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lines, out = ctx.saved_tensors
        grad, grad_lines = grad.contiguous(), empty(*lines.shape)
        native.lib.max_pool_backward(
            ctx.shape,
            lines.shape[0] * lines.shape[1],
            lines.data_ptr(),
            out.data_ptr(),
            grad.data_ptr(),
            grad_lines.data_ptr(),
            torch.get_num_threads(),
        )
        return grad_lines, None, None, None, None


@dataclasses.dataclass
class Convolution:
    """What a convolution is, beside the operands that have gradients."""

    mask: Tensor
    support: Support
    positions: Tensor | None
    geometry: Geometry
    images: int
    norm: Norm | None
    join: Join | None


class Convolve(Function):
    """Masked convolution of ``relu(norm(lines))``, or of the lines as they are; gradients as the masked ops give."""

    @staticmethod
    def forward(
        ctx: Any,
        lines: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        mask_scores: Tensor | None,
        grad_sink: Tensor | None,
        convolution: Convolution,
    ) -> Tensor:
        c = convolution
        size = c.geometry.output_size(lines.shape[2:4], weight.shape[2:])
        out = empty(lines.shape[0], weight.shape[0], *size, LANES)
        plan = c.support.plan(False, (c.images, *lines.shape[1:4]), weight, c.geometry)
        maps = _arguments(lines, c, c.norm), _arguments(out, c)
        plan.forward(weight.data_ptr(), *maps, _address(bias), False, torch.get_num_threads())
        ctx.save_for_backward(lines, weight)
        ctx.convolution = c
        if c.join is not None:
            c.join.awaited = True
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lines, weight = ctx.saved_tensors
        c: Convolution = ctx.convolution
        need_lines, need_norm_weight, need_norm_bias, need_weight, need_bias, need_scores, need_sink, _ = (
            ctx.needs_input_grad
        )
        grad = grad.contiguous()
        shape = (c.images, *lines.shape[1:4])
        grad_lines = grad_norm_weight = grad_norm_bias = grad_weight = grad_scores = grad_sink = None
        if need_lines or need_norm_weight or need_norm_bias:
            joined = None if c.join is None else c.join.take()
            grad_lines = empty(*lines.shape) if joined is None else joined
            maps = _arguments(grad, c), _arguments(grad_lines, c)
            plan = c.support.plan(True, shape, weight, c.geometry)
            plan.forward(weight.data_ptr(), *maps, 0, joined is not None, torch.get_num_threads())
        needs = Needs(False, need_weight, need_scores, need_sink, False)
        if need_scores or (need_sink and c.positions is None):
            # A dense G is a matter for the dense library.
            dense = _dense_weight_grad(lines, grad, weight, c)
            grad_weight, grad_scores, grad_sink = distribute_gradient(dense, weight, c.mask, c.positions, needs)
        elif needs.grad:
            maps = _arguments(lines, c, c.norm), _arguments(grad, c)
            positions = c.positions if need_sink else None
            grad_weight, grad_sink = plans.weight_grad(*maps, shape, weight, c.support, c.mask, positions, c.geometry)
        if grad_lines is not None and c.norm is not None:
            grad_norm_weight, grad_norm_bias = c.norm.backward(grad_lines, lines, None, c.images, grad_lines, None)
        return (
            grad_lines if need_lines else None,
            grad_norm_weight if need_norm_weight else None,
            grad_norm_bias if need_norm_bias else None,
            grad_weight if need_weight else None,
            grad.sum((0, 2, 3, 4)) if need_bias else None,
            grad_scores,
            grad_sink,
            None,
        )


def _arguments(lines: Tensor, c: Convolution, norm: Norm | None = None) -> tuple:
    """Maps in lines as the extension takes them, read through ``norm``."""
    through = None
    if norm is not None:
        scale = norm.terms.data_ptr() + 2 * norm.terms.shape[1] * norm.terms.element_size()
        through = scale, scale + norm.terms.shape[1] * norm.terms.element_size(), norm.relu
    return lines.data_ptr(), c.images, through


def _dense_weight_grad(lines: Tensor, grad: Tensor, weight: Tensor, c: Convolution) -> Tensor:
    if c.norm is not None:
        scale, shift = (t[:, None, None, None] for t in c.norm.terms[2:])
        lines = torch.addcmul(shift, lines, scale)
        lines = lines.relu_() if c.norm.relu else lines
    stride, padding, dilation, groups = c.geometry
    operands = _from_lines(grad, c.images), _from_lines(lines, c.images), effective_weight(weight, c.mask)
    _, dense, _ = torch.ops.aten.convolution_backward(
        *operands, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )
    return dense
