"""Masks of the k largest scores: ``sparsebilevel.binarize`` against torch and NumPy.

    pytest benchmarks/bench_binarize.py          # pytest-benchmark's table: 25.6 million scores in one tensor
    python benchmarks/bench_binarize.py          # interleaved medians -> results/binarize.json

The others give a mask in two steps: ``topk`` scatters its indices, ``kthvalue`` and ``numpy.partition`` find a
threshold to compare with, which of equal scores may keep too many. ``read once`` sums the scores: no selection can be
faster.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timing import core_to_core_ns, interleave, markdown_table, write_result
from torch import Tensor, nn

import sparsebilevel as sb
from sparsebilevel.models import create_model

Variants = dict[str, Callable[[], Any]]

NUMEL = 25_557_032  # as many as ResNet-50 has parameters
ROWS = (4096, 4096)


def topk(scores: Tensor, k: int, dim: int = -1) -> Tensor:
    indices = torch.topk(scores, k, dim, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, indices, True)


def kthvalue(scores: Tensor, k: int) -> Tensor:
    return scores >= torch.kthvalue(scores, scores.numel() - k + 1).values


def numpy_partition(scores: Tensor, k: int) -> Tensor:
    at = scores.numel() - k
    return scores >= torch.from_numpy(np.partition(scores.numpy(), at)[at : at + 1])


def normal(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0))


def one_tensor(density: float, numel: int = NUMEL) -> Variants:
    scores = normal(numel)
    bfloat16, float16, k = scores.bfloat16(), scores.half(), round(density * numel)
    return {
        "ours": lambda: sb.binarize(scores, k),
        "ours, words": lambda: sb.binarize(scores, k, words=True),
        "ours, bfloat16": lambda: sb.binarize(bfloat16, k),
        "ours, float16": lambda: sb.binarize(float16, k),
        "numpy.partition": lambda: numpy_partition(scores, k),
        "torch.kthvalue": lambda: kthvalue(scores, k),
        "torch.topk": lambda: topk(scores, k),
        "read once": scores.sum,
    }


def hints(numel: int = NUMEL) -> Variants:
    """Scores that go to and fro in steps of the given size, beside a deviation of 1."""
    scores, noise, k = normal(numel), torch.randn(numel), round(0.1 * numel)

    def stepping(size: float, hint: Tensor | None) -> Callable[[], Any]:
        states = itertools.cycle([scores + size * i * noise for i in (0, 1, 2, 1)] if size else [scores])
        return lambda: sb.binarize(next(states), k, hint=hint)

    return {
        "ours": stepping(0, None),
        **{f"hint, steps of {size:g}": stepping(size, torch.zeros(2, dtype=torch.int32)) for size in (0, 1e-3, 1e-2)},
    }


def hard(density: float) -> Variants:
    """Scores that are hard to tell apart or deceive a sample."""
    scores = {
        "ours": normal(NUMEL),
        "all equal": torch.ones(NUMEL),
        "two values": normal(NUMEL).sign_(),
        "in one bucket": torch.rand(NUMEL).mul_(1e-5).add_(1),
        "all but 1 % zero": normal(NUMEL).relu_().mul_(torch.rand(NUMEL) < 0.02),
        "sorted": normal(NUMEL).sort().values,
        "wide": normal(NUMEL).mul_(40).exp_(),
    }
    k = round(density * NUMEL)
    return {name: lambda s=s: sb.binarize(s, k) for name, s in scores.items()}


def resnet50_list(density: float) -> Variants:
    """Magnitudes of all weights of ResNet-50 under one k; the others need them end to end."""
    torch.manual_seed(0)
    modules = create_model("resnet50", 1000).modules()
    scores = [m.weight.detach().abs() for m in modules if isinstance(m, (nn.Conv2d, nn.Linear))]
    k = round(density * sum(s.numel() for s in scores))

    def joined() -> Tensor:
        return torch.cat([s.reshape(-1) for s in scores])

    return {
        "ours": lambda: sb.binarize(scores, k),
        "ours, words": lambda: sb.binarize(scores, k, words=True),
        "numpy.partition": lambda: numpy_partition(joined(), k),
        "torch.kthvalue": lambda: kthvalue(joined(), k),
        "torch.topk": lambda: topk(joined(), k),
        "read once": lambda: [s.sum() for s in scores],
    }


def rows(density: float) -> Variants:
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(0))
    k = round(density * ROWS[1])
    return {
        "ours": lambda: sb.binarize(scores, k, dim=1),
        "torch.topk": lambda: topk(scores, k, 1),
        "read once": scores.sum,
    }


def two_of_four() -> Variants:
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(0)).unflatten(1, (-1, 4))
    return {
        "ours": lambda: sb.binarize(scores, 2, dim=2),
        "torch.topk": lambda: topk(scores, 2, 2),
        "read once": scores.sum,
    }


CASES: dict[str, Callable[[], Variants]] = {
    **{f"25.56 M, {d:.0%}": lambda d=d: one_tensor(d) for d in (0.1, 0.5, 0.01)},
    "1 M, 10%": lambda: one_tensor(0.1, 1 << 20),
    "64 k, 10%": lambda: one_tensor(0.1, 1 << 16),
    "25.56 M, 10%, again": hints,
    "1 M, 10%, again": lambda: hints(1 << 20),
    "25.56 M, hard, 10%": lambda: hard(0.1),
    "layers of ResNet-50, 10%": lambda: resnet50_list(0.1),
    "rows of 4096, 10%": lambda: rows(0.1),
    "2:4": two_of_four,
}


@pytest.mark.parametrize("variant", ["ours", "ours, words", "ours, bfloat16", "numpy.partition", "read once"])
def bench_binarize(benchmark, variant: str) -> None:
    benchmark.group = f"mask of 10 % of {NUMEL:,} scores"
    benchmark.pedantic(one_tensor(0.1)[variant], rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="hardly measured: only see that all runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    table = []
    for case in args.cases:
        variants = CASES[case]()
        # Those that take up to a second are measured apart, so that the others wait less for one another.
        slow = {name: variants.pop(name) for name in ("torch.topk", "torch.kthvalue") if name in variants}
        found = interleave(variants, rounds=1 if args.quick else 15, min_sample_s=0 if args.quick else 0.05)
        found |= interleave(slow, rounds=1 if args.quick else 3, min_sample_s=0, warmup=0 if args.quick else 1)
        figures[case] = {"core_to_core_ns": core_to_core_ns(), "variants": found}
        for name, figure in found.items():
            table.append([case, name, f"{figure['ms']:.3g}", f"{figure['ms'] / found['ours']['ms']:.2g}x"])
            print(*table[-1], flush=True)
    print()
    print(markdown_table(["scores, kept", "how", "ms", "time over ours"], table), "\n")
    if args.cases == list(CASES) and not args.quick:
        print(write_result("binarize", {"figures": figures}))


if __name__ == "__main__":
    main()
