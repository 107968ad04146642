"""The dense library on ``m * theta``: what :mod:`.reference` gives, in less time on CPUs.

For the implementations of the masked ops. Nothing here can be differentiated, or traced by a compiler: there the
reference is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, plans, reference
from .dispatch import takes_onednn

_SMALL = 1 << 14  # elements up to which plain torch, in fewer calls, is faster
_LARGE = 1 << 18  # elements from which on memory is worth keeping: malloc would fetch new pages at every step


def effective_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """:func:`.reference.effective_weight`, bit for bit.

    ``torch.where`` branches at every element, and the processor mispredicts a random mask: at 80 % that takes ten times
    as long as selecting bits does.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() <= _SMALL:
        return reference.effective_weight(weight, mask)
    bits = _empty_like(weight).view(torch.int32).copy_(mask).neg_()  # all of them, or none
    return bits.bitwise_and_(weight.view(torch.int32)).view(torch.float32)


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`.reference.masked_linear`, up to rounding: by oneDNN where that is faster."""
    z = effective_weight(weight, mask)
    is_usual = input.dtype == weight.dtype and (
        bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1])
    )
    if not (is_usual and input.numel() and takes_onednn(tuple(weight.shape), weight.dtype, weight.device.type)):
        return torch.nn.functional.linear(input, z, bias)
    rows = torch.ops.mkldnn._linear_pointwise(input.reshape(-1, input.shape[-1]), z, bias, "none", [], "")
    return rows.view(*input.shape[:-1], weight.shape[0])


def linear_weight_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """:func:`.reference.linear_weight_grad`."""
    size = grad_output.shape[-1] * input.shape[-1]
    is_float = grad_output.dtype == input.dtype == torch.float32
    if input.device.type != "cpu" or not is_float or size < _LARGE or not native.available():
        return reference.linear_weight_grad(grad_output, input)
    grad = plans.empty(grad_output.shape[-1], input.shape[-1])
    return torch.mm(grad_output.reshape(-1, grad.shape[0]).t(), input.reshape(-1, grad.shape[1]), out=grad)


def _empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` of float32 tensors."""
    if tensor.numel() < _LARGE or not native.available():
        return torch.empty_like(tensor)
    strides = torch.empty_like(tensor, device="meta").stride()
    return plans.empty(tensor.numel()).as_strided(tensor.shape, strides)
