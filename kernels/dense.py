"""The dense library on ``m * theta``: what :mod:`.reference` gives, in less time on CPUs.

For the implementations of the masked ops. But for :func:`layer_weight` nothing here can be differentiated, or traced by
a compiler: there the reference is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import gpu, native, plans, reference
from .apply_mask import compute_copy
from .dispatch import library_is_best, takes_onednn, waits_for_host
from .gradient import (
    Needs,
    check_masked_operands,
    distribute_gradient,
    is_left_to_torch,
    refuse_tangents,
    runs_directly,
)
from .split_gradient import gather_support, split_one

_SMALL = 1 << 14  # elements up to which plain torch, in fewer calls, is faster
_LARGE = 1 << 18  # elements from which on memory is worth keeping: malloc would fetch new pages at every step
# Elements up to which a layer on a GPU leaves all of it to torch. That moves up to 16 bytes more of each than a kept
# copy and our gradient do, of so many in about the time of a launch, and the host has many microseconds less to do.
_SMALL_ON_GPU = 1 << 20
# And up to which it does where its products take so few seconds that the host is waited for, whatever it launches: that
# is 1.14 to 1.36 times as fast on the machine of an H200 (benchmarks/gpu_host.py --limits).
_SMALL_IF_BRIEF, _BRIEF_S = 1 << 22, 50e-6


def effective_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """:func:`.reference.effective_weight`, bit for bit, or rounded to ``dtype``. Not to be written to.

    ``torch.where`` branches at every element, and the processor mispredicts a random mask: at 80 % that takes ten times
    as long as selecting bits does.
    """
    if gpu.available(weight.device):
        return compute_copy(weight, mask, dtype or weight.dtype)
    if dtype is not None and dtype != weight.dtype:
        return reference.effective_weight(weight, mask).to(dtype)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() <= _SMALL:
        return reference.effective_weight(weight, mask)
    bits = _empty_like(weight).view(torch.int32).copy_(mask).neg_()  # all of them, or none
    return bits.bitwise_and_(weight.view(torch.int32)).view(torch.float32)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`.reference.masked_linear`, up to rounding: by oneDNN where that is faster."""
    z = effective_weight(weight, mask, input.dtype)
    is_usual = input.dtype == weight.dtype and (
        bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
    )
    if not (is_usual and input.numel() and takes_onednn(tuple(weight.shape), weight.dtype, weight.device.type)):
        return torch.nn.functional.linear(input, z, bias)
    rows = torch.ops.mkldnn._linear_pointwise(input.reshape(-1, input.shape[-1]), z, bias, "none", [], "")
    return rows.view(*input.shape[:-1], weight.shape[0])


def linear_input_grad(grad_output: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """:func:`.reference.linear_input_grad`."""
    if gpu.available(weight.device):
        return grad_output.matmul(effective_weight(weight, mask, grad_output.dtype))
    return masked_linear(grad_output, weight.t(), mask.t())


def linear_weight_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """:func:`.reference.linear_weight_grad`."""
    size = grad_output.shape[-1] * input.shape[-1]
    is_float = grad_output.dtype == input.dtype == torch.float32
    if input.device.type != "cpu" or not is_float or size < _LARGE or not native.available():
        return reference.linear_weight_grad(grad_output, input)
    grad = plans.empty(grad_output.shape[-1], input.shape[-1])
    return torch.mm(grad_output.reshape(-1, grad.shape[0]).t(), input.reshape(-1, grad.shape[1]), out=grad)


def distribute(
    grad: Tensor, weight: Tensor, mask: Tensor, positions: Tensor | None, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`.gradient.distribute_gradient`; on a GPU what is dense in one pass."""
    if not gpu.available(grad.device):
        return distribute_gradient(grad, weight, mask, positions, needs, effective_weight)
    if not needs.sink or positions is None:
        return split_one(grad, weight, mask, (needs.weight, needs.scores, needs.sink))
    grad_weight, grad_scores, _ = split_one(grad, weight, mask, (needs.weight, needs.scores, False))
    return grad_weight, grad_scores, gather_support(grad, positions)


def layer_weight(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    mask_scores: Tensor | None = None,
    grad_sink: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor | None:
    """``mask * weight`` for torch's own product with ``input``, where that is all that a masked op would do; else None.

    That is so on a GPU, for masks that drop nothing as a whole. The gradient ``G`` that torch finds for it goes out
    under the contract of :mod:`.gradient`. A masked op costs more time on the host, and what stands around it cannot
    be fused with it. What a small layer waits for is the host, and so torch selects and splits for it, where nobody
    but the weight asks for a gradient.

    Args:
        input: what the layer is called with.
        weight, mask, mask_scores, grad_sink, positions: as of a masked op.

    Returns:
        Of the weight's shape, in the dtype that autocast has for it, or its own.
    """
    device = weight.device
    kind = device.type
    if kind not in gpu.DEVICES:
        return None
    is_traced = torch.compiler.is_compiling()
    if not (is_traced or runs_directly(input, weight, mask)) or not library_is_best(device):
        return None
    check_masked_operands(weight, mask, mask_scores, grad_sink, positions)
    refuse_tangents(weight, mask_scores)
    dtype = weight.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    is_plain = mask_scores is None and grad_sink is None
    if is_plain and not is_traced and _is_small(input, weight, dtype) and not gpu.is_capturing(device):
        return torch.where(mask, weight, _zero(weight.dtype, device))
    shares = grad_sink is weight
    if shares and not is_traced and dtype.itemsize == 2 and weight.dim() == 2 and gpu.is_capturing(device):
        return None  # the op gets G unrounded from the library, and needs no pass for it; host time it has in a graph
    sink = None if shares else grad_sink
    if is_traced:
        return _TracedWeight.apply(weight, mask_scores, sink, mask, positions, dtype, shares)
    return _LayerWeight.apply(weight, mask_scores, sink, (mask, positions, dtype, shares))


def differentiable_weight(
    weight: Tensor,
    mask: Tensor,
    mask_scores: Tensor | None,
    grad_sink: Tensor | None,
    positions: Tensor | None,
    dtype: torch.dtype,
    shares: bool,
) -> Tensor:
    """``mask * weight`` in ``dtype``, of operators of torch, whose gradient goes out under the contract of masked ops.

    For backward passes that somebody differentiates: what the gradient of the input owes to ``mask * weight`` belongs
    to ``G`` too. With ``shares`` the gradient of the weight is ``G``.
    """
    return _TracedWeight.apply(weight, mask_scores, grad_sink, mask, positions, dtype, shares)


def _is_small(input: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's ``where`` and its gradient take less time than a kept copy and ours."""
    size = weight.numel()
    if size <= _SMALL_ON_GPU or size > _SMALL_IF_BRIEF:
        return size <= _SMALL_ON_GPU
    rows = input.numel() // weight.shape[1]  # of a convolution with strides more than there are
    return waits_for_host(rows, tuple(weight.shape), dtype, weight.device, _BRIEF_S)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """One that is kept: to make it would take as long as to select by it."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device="cpu").to(device)  # which waits: any stream may read it


class _LayerWeight(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, _scores: Tensor | None, _sink: Tensor | None, rest: tuple) -> Tensor:
        mask, positions, dtype, ctx.shares = rest  # as one: each argument takes time on its way
        ctx.save_for_backward(weight, mask, positions)
        return effective_weight(weight, mask, dtype).detach()  # the copy itself has no history, this one will

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_split(ctx, grad, distribute_gradient if is_left_to_torch(grad) else distribute), None


class _TracedWeight(Function):
    """The same of operations that a compiler sees through."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        _scores: Tensor | None,
        _sink: Tensor | None,
        mask: Tensor,
        positions: Tensor | None,
        dtype: torch.dtype,
        shares: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, mask, positions)
        ctx.shares = shares
        return reference.effective_weight(weight, mask, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_split(ctx, grad, distribute_gradient), None, None, None, None


def _split(ctx: Any, grad: Tensor, by: Callable[..., Any]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    weight, mask, positions = ctx.saved_tensors
    need_weight, need_scores, need_sink = ctx.needs_input_grad[:3]
    if ctx.shares:
        _, grad_scores, grad_sink = by(grad, weight, mask, positions, Needs(False, False, need_scores, True, False))
        return grad_sink, grad_scores, None
    return by(grad, weight, mask, positions, Needs(False, need_weight, need_scores, need_sink, False))


def _empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` of float32 tensors."""
    if tensor.numel() < _LARGE or not native.available():
        return torch.empty_like(tensor)
    strides = torch.empty_like(tensor, device="meta").stride()
    return plans.empty(tensor.numel()).as_strided(tensor.shape, strides)


def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Of a masked op: input, weight, mask, bias, scores, sink, positions, and what the product takes beside them."""
    input, weight, mask, _bias, scores, sink, positions, *ctx.geometry = inputs
    ctx.sink_is_weight = sink is weight
    ctx.save_for_backward(input, weight, mask, positions)
    ctx.asking = scores, None if ctx.sink_is_weight else sink  # not saved: of these no value is read, and it may change


def backward_of(name: str, directly: Callable[..., Any], differentiably: Callable[..., Any]) -> Callable[..., Any]:
    """Backward of a masked op: the op ``name``, or ``directly`` what it does, or by operators of torch."""

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, positions = ctx.saved_tensors
        scores, sink = ctx.asking
        need_input, need_weight, _, need_bias, need_scores, need_sink = ctx.needs_input_grad[:6]
        needs = Needs(need_input, need_weight and not ctx.sink_is_weight, need_scores, need_sink, need_bias)
        operands = grad_output, input, weight, mask
        grads: Any
        if is_left_to_torch(grad_output):
            z = differentiable_weight(weight, mask, scores, sink, positions, input.dtype, ctx.sink_is_weight)
            grads = differentiably(*operands, positions, *ctx.geometry, needs, z=z)
        else:
            op = directly if runs_directly(*operands) else getattr(torch.ops.sparsebilevel, name)
            given = iter(op(*operands, positions, *ctx.geometry, needs))
            grads = [next(given) if need else None for need in needs]
        grad_input, grad_weight, grad_scores, grad_sink, grad_bias = grads
        rest = [None] * (1 + len(ctx.geometry))
        return grad_input, grad_weight, None, grad_bias, grad_scores, grad_sink, *rest

    return backward
