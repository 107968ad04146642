"""Pure-torch truth of every op.

Three uses: the oracle that every kernel is tested against, the fallback where nothing faster runs, and the baseline of
the benchmarks. Everything here is ordinary differentiable torch, works in any dtype and on any device, and is written
to be read rather than to be fast.

Notation: ``theta`` the weight, ``m`` the boolean mask (True = kept), ``z = m * theta`` the effective weight and
``G = dloss/dz`` its gradient. Both gradients of the product follow from ``G``: ``dtheta = m * G``, ``dm = theta * G``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """``z = m * theta``, selected rather than multiplied: an inf or NaN under a zero of the mask stays hidden."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def masked_linear(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ (m * theta).T + bias``.

    Shapes: input ``[..., K]``, weight and mask ``[N, K]``, bias ``[N]``; returns ``[..., N]``.
    """
    return F.linear(input, effective_weight(weight, mask), bias)


def linear_weight_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """``G [N, K]`` of a linear layer, from the gradient of its output ``[..., N]`` and its input ``[..., K]``."""
    return grad_output.reshape(-1, grad_output.shape[-1]).t().mm(input.reshape(-1, input.shape[-1]))


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with ``m * theta``.

    Shapes: input ``[B, C, H, W]``, weight and mask ``[N, C / groups, R, S]``, bias ``[N]``; returns ``[B, N, P, Q]``.
    """
    return F.conv2d(input, effective_weight(weight, mask), bias, stride, padding, dilation, groups)


def gather_support(grad: Tensor, positions: Tensor) -> Tensor:
    """``G`` at flat ``positions`` (int64 ``[capacity]``, row-major; negative entries are padding and give 0)."""
    values = grad.reshape(-1)[positions.clamp(min=0)]
    return torch.where(positions >= 0, values, torch.zeros((), dtype=values.dtype, device=values.device))


def binarize(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the ``k`` largest scores; equal scores are taken in row-major order."""
    return binarize_rows(scores.reshape(1, -1), k).view(scores.shape)


def binarize_rows(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the ``k`` largest scores of each row; shapes ``[N, K]``.

    A stable sort settles the ties. NaN has no rank and must be refused by the caller.
    """
    # Adding zero turns -0.0 into +0.0: the two are equal and must tie.
    order = torch.sort(scores + 0.0, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], True)


def mask_words(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as int64 words and what comes before each 1024th position, see ``BinaryMask``."""
    flat = mask.reshape(-1).long()
    bits = F.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    counts = F.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024).sum(1).cumsum(0)
    return (bits << torch.arange(64, device=mask.device)).sum(1), F.pad(counts, (1, 0))


def occupied_tiles(words: Tensor, height: int, width: int, rows: int, cols: int) -> Tensor:
    """Which tiles ``[rows, cols]`` of a mask ``[height, width]``, given as words, hold a True."""
    bits = words[:, None] >> torch.arange(64, device=words.device) & 1
    mask = bits.reshape(-1)[: height * width].view(height, width)
    mask = F.pad(mask, (0, -width % cols, 0, -height % rows))
    down, across = mask.shape[0] // rows, mask.shape[1] // cols
    return mask.view(down, rows, across, cols).sum((1, 3)) > 0


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
    """``F.batch_norm``, then ``+ residual``, then ReLU. Shapes: input ``[B, C, H, W]``, vectors ``[C]``."""
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of a batch normalization, as differentiable functions of all operands.

    ``statistics`` are mean and 1 / deviation, ``[C, 1, 1]``, if they are constants; else they are those of the batch.
    """
    x, grad = (t.float() if t.dtype == torch.bfloat16 else t for t in (input, grad_output))
    if statistics is None:
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        inverse = torch.rsqrt(var + eps)
    else:
        mean, inverse = statistics
    normalized = (x - mean) * inverse
    grad_weight, grad_bias = (grad * normalized).sum((0, 2, 3)), grad.sum((0, 2, 3))
    grad = grad if weight is None else grad * weight[:, None, None]
    if statistics is None:
        means = ((t * grad).mean((0, 2, 3), keepdim=True) for t in (1.0, normalized))
        grad = grad - next(means) - normalized * next(means)
    return (grad * inverse).to(input.dtype), grad_weight, grad_bias
