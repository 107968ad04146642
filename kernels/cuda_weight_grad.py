"""The gradients that follow from a dense ``G``, in CUDA for Hopper (csrc/cuda/weight_grad_sm90.cu).

For linear layers in 16 bits; :func:`.triton_matmul.weight_grad` has the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda, gpu


def takes(dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> bool:
    """Whether it multiplies these contiguous matrices of one type, for a weight and a mask that are contiguous too."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype in (x.dtype, torch.float32)
        and mask.dtype == torch.bool
        and cuda.available(x.device)
        and gpu.capability(x.device) == (9, 0)
        # What the hardware copies begins at a multiple of 16 bytes, in every row; others go four by four.
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        and dy.data_ptr() % 16 == x.data_ptr() % 16 == weight.data_ptr() % 16 == mask.data_ptr() % 4 == 0
        and dy.numel() > 0
        and x.numel() > 0
    )


def weight_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    need_weight: bool = True,
    need_scores: bool = True,
    need_sink: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``mask * G``, ``weight * G`` and ``G = dy.T @ x``, where they are needed, without writing G in between.

    Args:
        dy, x, weight, mask: which the kernel takes; ``[T, N]``, ``[T, K]``, ``[N, K]`` and ``[N, K]``.
        need_weight, need_scores, need_sink: which results are wanted; the others are None.

    Returns:
        Gradient of the weight in its type; of the scores, and G, in float32.
    """
    needs = need_weight, need_scores, need_sink
    dtypes = weight.dtype, torch.float32, torch.float32
    outs = [torch.empty_like(weight, dtype=dtype) if need else None for need, dtype in zip(needs, dtypes, strict=True)]
    cuda.launch(
        "weight_grad",
        x.device,
        *(dy.data_ptr(), x.data_ptr(), weight.data_ptr(), mask.data_ptr()),
        *(None if out is None else out.data_ptr() for out in outs),
        *(len(x), *weight.shape, cuda.SCORE_TYPES[x.dtype], cuda.SCORE_TYPES[weight.dtype]),
        gpu.processors(x.device),
    )
    return outs[0], outs[1], outs[2]
