"""Sparse convolutions against dense ones and others' sparse ones, layer by layer, in training.

pytest benchmarks/bench_masked_conv2d.py              # pytest-benchmark's table, at 90 %
python benchmarks/bench_masked_conv2d.py              # interleaved medians -> results/masked_conv2d.json
python benchmarks/bench_masked_conv2d.py --passes     # the kernels alone -> results/masked_conv2d_passes.json
"""

from __future__ import annotations

from functools import partial
from typing import Any

import masked_layers
import pytest
import torch
from masked_layers import Case, Variant, channels_last
from torch import nn

from sparsebilevel.kernels.plans import Geometry


def make(channels: int, filters: int, kernel: int, size: int, batch: int, sparsity: float) -> Case:
    """A convolution with stride 1 that keeps the size of its maps."""
    conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False)
    x = torch.randn(batch, channels, size, size)
    return Case.make(conv, x, sparsity, Geometry(padding=(kernel // 2, kernel // 2)))


# Of ResNet-50 on ImageNet and ResNet-32 on CIFAR.
LAYERS = {
    f"{channels}-{filters}-{kernel}x{kernel}@{size}-b{batch}": partial(make, channels, filters, kernel, size, batch)
    for channels, filters, kernel, size, batch in (
        (64, 64, 3, 56, 16),
        (128, 128, 3, 28, 32),
        (256, 256, 3, 14, 32),
        (512, 512, 3, 7, 32),
        (256, 64, 1, 56, 32),
        (512, 2048, 1, 7, 32),
        (16, 16, 3, 32, 64),
        (32, 32, 3, 16, 64),
        (64, 64, 3, 8, 64),
        # Batches that leave most lanes to pixels.
        (64, 64, 3, 56, 1),
        (64, 64, 3, 56, 4),
        (128, 128, 3, 28, 1),
        (128, 128, 3, 28, 4),
        (256, 256, 3, 14, 1),
        (256, 256, 3, 14, 4),
        (512, 512, 3, 7, 1),
        (512, 512, 3, 7, 4),
        (256, 64, 1, 56, 1),
        (256, 64, 1, 56, 4),
        (32, 32, 3, 16, 1),
        (32, 32, 3, 16, 4),
    )
}


def sparseprop(over_width: bool, case: Case) -> tuple[Any, torch.Tensor]:
    """SparseProp's two kernels: its vectors run over the batch or over the width of the maps."""
    return masked_layers.sparseprop().SparseConv2d.from_dense(case.dense, vectorizing_over_on=over_width), case.x


VARIANTS = {
    "dense NCHW": Variant(masked_layers.dense, baseline=True),
    "dense NHWC": Variant(lambda case: channels_last(*masked_layers.dense(case)), baseline=True),
    "dense NHWC bfloat16": Variant(masked_layers.dense_bfloat16, tolerance=0.03),
    "prune NHWC": Variant(masked_layers.pruned),
    "sparse NCHW": Variant(masked_layers.sparse),
    "sparse NHWC": Variant(lambda case: channels_last(*masked_layers.sparse(case))),
    "sparse NHWC bfloat16": Variant(masked_layers.sparse_bfloat16, tolerance=0.03),
    "sparse in lines": Variant(masked_layers.sparse_in_lines, chained=masked_layers.CHAIN),
    "sparse NHWC, BiDST's gradient": Variant(masked_layers.sparse_search),
    "sparse NHWC, dense gradient": Variant(masked_layers.sparse_all),
    "SparseProp, batch": Variant(partial(sparseprop, False)),
    "SparseProp, width": Variant(partial(sparseprop, True)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def bench_masked_conv2d(benchmark, layer: str, variant: str) -> None:
    benchmark.group = f"convolution, 90 %, {layer}"
    masked_layers.bench(benchmark, LAYERS[layer](0.9), VARIANTS[variant])


if __name__ == "__main__":
    masked_layers.main("masked_conv2d", LAYERS, VARIANTS, __doc__)
