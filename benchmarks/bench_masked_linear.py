"""Sparse linear layers against dense ones and others' sparse ones, in training.

pytest benchmarks/bench_masked_linear.py              # pytest-benchmark's table, at 90 %
python benchmarks/bench_masked_linear.py              # interleaved medians -> results/masked_linear.json
python benchmarks/bench_masked_linear.py --passes     # the kernels alone -> results/masked_linear_passes.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import masked_layers
import pytest
import torch
from masked_layers import Case, Variant
from torch import Tensor, nn

from sparsebilevel.kernels.plans import Geometry


def make(size: int, batch: int, sparsity: float) -> Case:
    """A square layer."""
    return Case.make(nn.Linear(size, size, bias=False), torch.randn(batch, size), sparsity, Geometry())


LAYERS = {f"{size}-b{batch}": partial(make, size, batch) for size, batch in ((1024, 256), (1024, 64), (4096, 64))}


def onednn(case: Case) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """oneDNN where F.linear calls another BLAS: forward only, on operands that are in its format already."""
    weight = case.dense.weight.detach().to_mkldnn()
    return lambda x: torch._C._nn.mkldnn_linear(x, weight, None), case.x.to_mkldnn()


class CSRLinear(nn.Module):
    """``torch.sparse``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K]`` to ``[B, N]``."""
        return (self.weight @ x.t()).t()


def csr(case: Case) -> tuple[nn.Module, Tensor]:
    """MKL's products with a CSR weight, and autograd's way back through them."""
    return CSRLinear(case.dense.weight), case.x


def sparseprop(case: Case) -> tuple[Any, Tensor]:
    """SparseProp: CSR, vectors over the batch."""
    return masked_layers.sparseprop().SparseLinear.from_dense(case.dense), case.x


VARIANTS = {
    "dense": Variant(masked_layers.dense, baseline=True),
    "dense oneDNN": Variant(onednn, trains=False, baseline=True),
    "dense bfloat16": Variant(masked_layers.dense_bfloat16, tolerance=0.03),
    "prune": Variant(masked_layers.pruned),
    "sparse": Variant(masked_layers.sparse),
    "sparse bfloat16": Variant(masked_layers.sparse_bfloat16, tolerance=0.03),
    "sparse, BiDST's gradient": Variant(masked_layers.sparse_search),
    "sparse, dense gradient": Variant(masked_layers.sparse_all),
    "torch.sparse CSR": Variant(csr),
    "SparseProp": Variant(sparseprop),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def bench_masked_linear(benchmark, layer: str, variant: str) -> None:
    benchmark.group = f"linear, 90 %, {layer}"
    masked_layers.bench(benchmark, LAYERS[layer](0.9), VARIANTS[variant])


if __name__ == "__main__":
    masked_layers.main("masked_linear", LAYERS, VARIANTS, __doc__)
