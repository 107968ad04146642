"""Products with weights that are zero in whole tiles, in CUDA for Hopper (csrc/cuda/block_sparse_sm90.cu).

For linear layers in 16 bits with tiles of 128 and 64; :mod:`.triton_block_sparse` has the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cuda, gpu

if TYPE_CHECKING:
    from .block_sparse import PairList


def runs(block: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel for tiles of a side, of a type, on a device."""
    is_kind = block in (128, 64) and dtype in (torch.bfloat16, torch.float16)
    return is_kind and cuda.available(device) and gpu.capability(device) == (9, 0)


def takes(block: int, x: Tensor, weight: Tensor) -> bool:
    """Whether it multiplies these contiguous matrices of one type."""
    return (
        runs(block, x.dtype, x.device)
        # What the hardware copies begins at a multiple of 16 bytes, in every row.
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
        and x.numel() > 0
        and weight.numel() > 0
    )


def _rows_at_a_time(rows: int, pairs: int, processors: int) -> int:
    """As many rows as share a load of the weights; fewer, where some processors would have nothing to do."""
    return 128 if -(-rows // 256) * pairs <= processors // 2 else 256


def block_matmul(
    x: Tensor, weight: Tensor, lists: PairList, bias: Tensor | None = None, *, input_grad: bool = False
) -> Tensor:
    """``x [T, K] @ weight.T + bias``, or with ``input_grad`` ``x [T, N] @ weight``, where other tiles are zero.

    Args:
        x, weight: which the kernels take; weight ``[N, K]``, zeros in place.
        lists: of the rows of tiles of the weight, or with ``input_grad`` of the columns.
        bias: ``[N]``, of 16 or 32 bits, or None.
    """
    (n, k), t, pairs = weight.shape, x.shape[0], len(lists.order)
    out = torch.empty(t, k if input_grad else n, dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    held = (None, 0) if bias is None else (bias.data_ptr(), cuda.SCORE_TYPES[bias.dtype])
    processors = gpu.processors(x.device)
    rows = _rows_at_a_time(t, pairs, processors)
    cuda.launch(
        "block_matmul",
        x.device,
        *(x.data_ptr(), weight.data_ptr(), *held, out.data_ptr(), *(part.data_ptr() for part in lists), pairs),
        *(t, n, k, input_grad, cuda.SCORE_TYPES[x.dtype], rows, processors),
    )
    return out
