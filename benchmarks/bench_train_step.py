"""Whole training steps of sparse networks against dense ones: gradients to zero, forward, loss, backward, fused SGD.

    pytest benchmarks/bench_train_step.py          # pytest-benchmark's table: small networks at 90 %
    python benchmarks/bench_train_step.py          # interleaved medians -> results/train_step.json, and .png
    python benchmarks/bench_train_step.py --plot   # the picture again, from the figures that are there

Uniform masks leave the first and the last layer dense, ERK ones none. Batches are random numbers in the memory format
of the network. Which layers take a sparse kernel is the library's own choice, and counted in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from masked_layers import SPARSITIES, Skip, sparseprop, speedup_cell
from timing import RESULTS, core_to_core_ns, interleave, markdown_table, write_result
from torch import Tensor, nn

import sparsebilevel as sb
from sparsebilevel.models import create_model


class Network(NamedTuple):
    """A model by name and the shape of its batches."""

    model: str
    batch: int
    size: int
    classes: int

    @property
    def large(self) -> bool:
        return self.size > 32


NETWORKS = {
    "resnet32": Network("resnet32", 64, 32, 10),
    "resnet32x2": Network("resnet32x2", 64, 32, 10),
    "vgg19_bn": Network("vgg19_bn_cifar", 64, 32, 10),
    "resnet18": Network("resnet18", 16, 224, 1000),
    "resnet50": Network("resnet50", 16, 224, 1000),
}


class Variant(NamedTuple):
    """``make``: (dense model of its own, sparsity, shape of a batch) -> model to train."""

    make: Callable[[nn.Module, float, tuple[int, ...]], nn.Module]
    channels_last: bool = True
    baseline: bool = False
    bfloat16: bool = False  # under autocast


def ends(model: nn.Module) -> list[str]:
    """Names of the first and the last layer."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [names[0], names[-1]]


def dense(model: nn.Module, *_: Any) -> nn.Module:
    """As it is."""
    return model


def uniform(model: nn.Module, sparsity: float, *_: Any) -> nn.Module:
    """The same sparsity in every layer but the first and the last."""
    return sb.sparsify(model, sparsity, exclude=ends(model), seed=0)


def in_layout(model: nn.Module, sparsity: float, *_: Any) -> nn.Module:
    """The masks of `uniform`, and maps that stay in the layout of the kernels."""
    return sb.optimize_for_cpu(uniform(model, sparsity))


def drop_in(model: nn.Module, sparsity: float, *_: Any) -> nn.Module:
    """The masks of `uniform` on ordinary maps, batch normalization with addition and ReLU in one pass."""
    return sb.optimize_for_cpu(uniform(model, sparsity), layout="channels_last")


def erk(model: nn.Module, sparsity: float, *_: Any) -> nn.Module:
    """Large layers sparser than small ones, in the layout."""
    return sb.optimize_for_cpu(sb.sparsify(model, sparsity, "erk", seed=0))


def swapped(model: nn.Module, sparsity: float, shape: tuple[int, ...]) -> nn.Module:
    """The masks of `uniform` through SparseProp's own conversion, which leaves a layer dense where that is faster."""
    sparseprop()
    from sparseprop.utils import swap_modules_with_sparse

    skipped = ",".join(ends(model))
    model = sb.densify(uniform(model, sparsity), inplace=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return swap_modules_with_sparse(model, shape, inplace=True, skip_modules=skipped)


VARIANTS = {
    "dense NCHW": Variant(dense, channels_last=False, baseline=True),
    "dense NHWC": Variant(dense, baseline=True),
    "sparse NCHW": Variant(uniform, channels_last=False),
    "sparse NHWC": Variant(uniform),
    "drop-in with own norm": Variant(drop_in),
    "in layout": Variant(in_layout),
    "in layout, ERK": Variant(erk),
    "dense NHWC, bf16": Variant(dense, bfloat16=True),
    "in layout, bf16": Variant(in_layout, bfloat16=True),
    "SparseProp": Variant(swapped, channels_last=False),
}


def training_step(model: nn.Module, x: Tensor, y: Tensor, bfloat16: bool) -> Callable[[], None]:
    """A step on the batch, again and again: at a rate so low that it stays the same problem."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def prepare(network: Network, variant: Variant, sparsity: float) -> tuple[nn.Module, Callable[[], None]]:
    """The model and its step; the same weights, masks and batch for all variants of a network."""
    torch.manual_seed(0)
    model = create_model(network.model, network.classes)
    x = torch.randn(network.batch, 3, network.size, network.size)
    y = torch.randint(network.classes, (network.batch,))
    model = variant.make(model, sparsity, tuple(x.shape))
    if variant.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, training_step(model, x, y, variant.bfloat16)


def measure(network: Network, sparsity: float, effort: dict[str, Any]) -> dict[str, Any]:
    """variant -> figures of `interleave`, ``speedup`` over the best dense, ``sparse_layers``: [on our kernels, all]."""
    figures: dict[str, Any] = {"core_to_core_ns": core_to_core_ns(), "left_out": {}, "variants": {}}
    steps, layers = {}, {}
    for name, variant in VARIANTS.items():
        try:
            model, steps[name] = prepare(network, variant, sparsity)
        except Skip as reason:
            figures["left_out"][name] = str(reason)
            continue
        backends = [layer.backend.name for _, layer in sb.sparse_layers(model)]
        layers[name] = [backends.count("sparse"), len(backends)]
    rows = interleave(steps, **effort)
    base = min(row["ms"] for name, row in rows.items() if VARIANTS[name].baseline)
    for name, row in rows.items():
        figures["variants"][name] = row | {"speedup": base / row["ms"], "sparse_layers": layers[name]}
    return figures


def plot(results: Path) -> Path:
    """Speed-up over sparsity, a panel for each network, beside the figures."""
    from matplotlib.figure import Figure

    figures = json.loads(results.read_text())["figures"]
    figure = Figure(figsize=(3.2 * len(figures), 3.6), layout="constrained")
    panels = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for panel, (network, by_sparsity) in zip(panels, figures.items(), strict=True):
        for name, variant in VARIANTS.items():
            taken = [
                (s, found["variants"][name]["speedup"]) for s, found in by_sparsity.items() if name in found["variants"]
            ]
            if taken and not variant.baseline:
                panel.plot(*zip(*taken, strict=True), marker="o", label=name)
        panel.axhline(1, color="#555555", linewidth=0.8, label="best dense")
        panel.set(title=network, xlabel="sparsity", ylim=(0, None))
    panels[0].set_ylabel("speed-up of a training step")
    panels[0].legend(fontsize="small")
    picture = results.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return picture


@pytest.mark.parametrize("network", [name for name, network in NETWORKS.items() if not network.large])
@pytest.mark.parametrize("variant", VARIANTS)
def bench_train_step(benchmark, network: str, variant: str) -> None:
    benchmark.group = f"training step, 90 %, {network}"
    try:
        _, step = prepare(NETWORKS[network], VARIANTS[variant], 0.9)
    except Skip as reason:
        pytest.skip(str(reason))
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="FRACTION")
    parser.add_argument("--quick", action="store_true", help="small networks, hardly measured: only see that all runs")
    parser.add_argument(
        "--save", metavar="NAME", help="write results/NAME.json, of a selection too; adds networks to it"
    )
    parser.add_argument("--plot", action="store_true", help="only draw the figures of the last complete run")
    args = parser.parse_args()
    results = RESULTS / "train_step.json"
    if args.plot:
        if not results.exists():
            parser.error(f"--plot needs {results}, which a run of everything writes")
        print(plot(results))
        return
    torch.set_num_threads(args.threads)
    chosen = [name for name in args.networks if not (args.quick and NETWORKS[name].large)]
    effort = {"rounds": 1, "min_sample_s": 0.001, "warmup": 1} if args.quick else {"rounds": 7, "min_sample_s": 0.4}
    figures: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    rows = []
    for name in chosen:
        for sparsity in args.sparsities:
            print(f"{name}, {sparsity:.0%} ...", flush=True)
            found = measure(NETWORKS[name], sparsity, effort)
            figures[name][f"{sparsity:g}"] = found
            rows.append([name, f"{sparsity:.0%}", *(speedup_cell(found["variants"].get(v)) for v in VARIANTS)])
            for variant, reason in found["left_out"].items():
                print(f"left out: {variant}, {reason}")
    print("\nms a step (speed-up over the best dense)\n")
    print(markdown_table(["network", "sparsity", *VARIANTS], rows), "\n")
    if args.save:
        print(write_result(args.save, {"figures": figures}, keep=True))
    elif chosen == list(NETWORKS) and args.sparsities == list(SPARSITIES) and not args.quick:
        print(write_result("train_step", {"figures": figures}))
        with contextlib.suppress(ImportError):
            print(plot(results))


if __name__ == "__main__":
    main()
