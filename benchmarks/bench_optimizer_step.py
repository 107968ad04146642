"""Optimizer steps of sparse networks: ``sparsebilevel.optim`` against the fused and the default steps of torch.

    pytest benchmarks/bench_optimizer_step.py          # pytest-benchmark's table: VGG-19
    python benchmarks/bench_optimizer_step.py          # interleaved medians -> results/optimizer_step.json

Whole steps, all parameters of a network, as they are after a backward pass. Uniform masks leave the first and the last
layer dense, ERK ones none. Between two of its steps an optimizer loses the caches to another, which moves hundreds of
megabytes (of the large networks), as it would to a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_layers import SPARSITIES
from timing import core_to_core_ns, interleave, markdown_table, write_result
from torch import nn

import sparsebilevel as sb
from sparsebilevel.models import create_model

NETWORKS = {"resnet32": 10, "vgg19_bn_cifar": 10, "resnet50": 1000}  # and their classes
MASKS = ("uniform", "erk", "filter")
ALGORITHMS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4},  # a rate so low that it stays the same problem
    "AdamW": {"lr": 1e-6},
}
VARIANTS = {
    "ours": lambda name: getattr(sb.optim, name),
    "fused": lambda name: lambda *args, **kw: getattr(torch.optim, name)(*args, fused=True, **kw),
    "default": lambda name: getattr(torch.optim, name),
}


def sparse_network(network: str, masks: str, sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(network, NETWORKS[network])
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    ends = () if masks == "erk" else (names[0], names[-1])
    distribution, pattern = (
        ("erk" if masks == "erk" else "uniform"),
        ("filter" if masks == "filter" else "unstructured"),
    )
    return sb.sparsify(model, sparsity, distribution, pattern, exclude=ends, seed=0)


def prepare(network: str, masks: str, sparsity: float, algorithm: str, variant: str) -> tuple[nn.Module, Callable]:
    """The model, which holds the masks, and the optimizer's step; gradients are random numbers."""
    model = sparse_network(network, masks, sparsity)
    optimizer = VARIANTS[variant](algorithm)(model.parameters(), **ALGORITHMS[algorithm])
    sb.Static(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _, layer in sb.sparse_layers(model):
        layer.weight.grad.mul_(layer.mask)
    return model, optimizer.step


def measure(network: str, masks: str, sparsity: float, rounds: int) -> dict[str, Any]:
    """algorithm -> variant -> figures of `interleave`, and ``ratio``: time of torch's fused step over ours."""
    figures: dict[str, Any] = {"core_to_core_ns": core_to_core_ns()}
    for algorithm in ALGORITHMS:
        rows: dict[str, Any] = {}
        # The two that are compared follow each other and nothing else; and one step makes a sample, since of several in
        # a row the later ones would find their memory in the caches.
        for together, count in ((("ours", "fused"), rounds), (("default",), min(rounds, 3))):
            made = {variant: prepare(network, masks, sparsity, algorithm, variant) for variant in together}
            steps = {variant: step for variant, (_, step) in made.items()}
            rows |= interleave(steps, rounds=count, min_sample_s=0, max_foreign=math.inf)
        figures[algorithm] = {"variants": rows, "ratio": rows["fused"]["ms"] / rows["ours"]["ms"]}
    return figures


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
def bench_optimizer_step(benchmark, sparsity: float, variant: str, algorithm: str) -> None:
    benchmark.group = f"{algorithm} step, {sparsity:.0%}, VGG-19"
    model, step = prepare("vgg19_bn_cifar", "uniform", sparsity, algorithm, variant)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    assert model is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="FRACTION")
    parser.add_argument("--quick", action="store_true", help="hardly measured: only see that all runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    rows = []
    for network in args.networks:
        for masks in MASKS:
            for sparsity in args.sparsities:
                found = measure(network, masks, sparsity, rounds=1 if args.quick else 15)
                figures.setdefault(network, {}).setdefault(masks, {})[f"{sparsity:g}"] = found
                cells = [f"{found[a]['variants'][v]['ms']:.2f}" for a in ALGORITHMS for v in VARIANTS]
                ratios = [f"{found[a]['ratio']:.2f}x" for a in ALGORITHMS]
                rows.append([network, masks, f"{sparsity:.0%}", *cells, *ratios])
                print(*rows[-1], flush=True)
    header = ["network", "masks", "sparsity", *(f"{a} {v}" for a in ALGORITHMS for v in VARIANTS)]
    print("\nms a step; torch's fused step over ours\n")
    print(markdown_table([*header, *(f"{a} ratio" for a in ALGORITHMS)], rows), "\n")
    if args.networks == list(NETWORKS) and args.sparsities == list(SPARSITIES) and not args.quick:
        print(write_result("optimizer_step", {"figures": figures}))


if __name__ == "__main__":
    main()
