"""The tables of README.md and docs/cpu.md, from the figures in results/.

python benchmarks/tables.py step       # whole training steps: results/train_step.json
python benchmarks/tables.py masks      # masks of the largest scores: results/binarize.json
python benchmarks/tables.py layers     # single layers: results/masked_conv2d.json and masked_linear.json
python benchmarks/tables.py small      # forward passes of few images: results/masked_conv2d.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from timing import RESULTS, markdown_table

STEPS = {
    "layers alone": "sparse NHWC",
    '`layout="channels_last"`': "drop-in with own norm",
    "**`optimize_for_cpu`**": "in layout",
    "the same, ERK masks": "in layout, ERK",
    "the same, bfloat16": "in layout, bf16",
    "dense, bfloat16": "dense NHWC, bf16",
    "SparseProp": "SparseProp",
}
NETWORKS = {
    "resnet32": "ResNet-32 (CIFAR, 64)",
    "resnet32x2": "ResNet-32, doubled (CIFAR, 64)",
    "vgg19_bn": "VGG-19 (CIFAR, 64)",
    "resnet18": "ResNet-18 (224², 16)",
    "resnet50": "ResNet-50 (224², 16)",
}
MEDIANS = {
    "channels_last": "sparse NHWC",
    "channels_last, bfloat16": "sparse NHWC bfloat16",
    "staying in lines": "sparse in lines",
    "NCHW": "sparse NCHW",
    "channels_last, gradient of BiDST": "sparse NHWC, BiDST's gradient",
    "channels_last, gradient of BiP": "sparse NHWC, dense gradient",
    "dense in bfloat16": "dense NHWC bfloat16",
}


def load(name: str) -> dict[str, Any]:
    """The figures of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())["figures"]


def row(name: str, by_sparsity: dict[str, Any], figure: Callable[[Any], float | None]) -> list[str]:
    """A name and a ratio for each sparsity."""
    found = map(figure, by_sparsity.values())
    return [name, *("" if ratio is None else f"{ratio:.1f}x" for ratio in found)]


def header(first: str, figures: dict[str, Any]) -> list[str]:
    """Of a table whose columns are the sparsities of the first entry."""
    return [first, *(f"{float(s):.0%}".replace("%", " %") for s in next(iter(figures.values())))]


def steps() -> str:
    """Speed-up over the faster dense layout."""
    figures = load("train_step")
    rows = [
        row(f"{title}, {name}", figures[network], lambda f, v=variant: f["variants"].get(v, {}).get("speedup"))
        for network, title in NETWORKS.items()
        if network in figures
        for name, variant in STEPS.items()
    ]
    return markdown_table(header("speed-up of a training step", figures), rows)


def speedup(variant: str) -> Callable[[Any], float | None]:
    """Forward and backward, over the faster dense layout."""
    return lambda found: found["forward + backward"].get(variant, {}).get("speedup")


def over_sparseprop(found: dict[str, Any]) -> float | None:
    """The better of its two kernels."""
    rows = found["forward + backward"]
    theirs = [rows[name]["ms"] for name in rows if name.startswith("SparseProp")]
    return min(theirs) / rows["sparse NHWC"]["ms"] if theirs else None


def medians(figures: dict[str, Any], figure: Callable[[Any], float | None]) -> dict[str, float | None]:
    """Of the 3x3 layers on full batches, by sparsity."""
    layers = [by for name, by in figures.items() if "-3x3@" in name and int(name.rpartition("-b")[2]) >= 16]
    found: dict[str, float | None] = {}
    for sparsity in layers[0]:
        ratios = [ratio for by in layers if (ratio := figure(by[sparsity])) is not None]
        found[sparsity] = statistics.median(ratios) if ratios else None
    return found


def layers() -> str:
    """Each layer, and medians of the 3x3 convolutions on full batches."""
    convolutions, linear = load("masked_conv2d"), load("masked_linear")
    rows: list[list[str]] = []
    rows += (row(name, by, speedup("sparse NHWC")) for name, by in convolutions.items())
    rows += (row(f"linear {name}", by, speedup("sparse")) for name, by in linear.items())
    figures: Iterable[tuple[str, Callable[[Any], float | None]]] = [
        *((name, speedup(variant)) for name, variant in MEDIANS.items()),
        ("channels_last, over SparseProp", over_sparseprop),
    ]
    rows += (row(f"**median of 3x3**, {name}", medians(convolutions, f), lambda ratio: ratio) for name, f in figures)
    return markdown_table(header("forward + backward of a layer", convolutions), rows)


def small() -> str:
    """Forward passes of one image and of four, over the faster dense layout."""
    figures = load("masked_conv2d")

    def cell(layer: str, sparsity: str) -> str:
        found = (figures[f"{layer}-b{batch}"][sparsity]["forward"]["sparse NHWC"]["speedup"] for batch in (1, 4))
        return " / ".join(f"{speedup:.1f}" for speedup in found) + "x"

    layers = [name.removesuffix("-b1") for name in figures if name.endswith("-b1")]
    rows = [[layer, *(cell(layer, sparsity) for sparsity in figures[f"{layer}-b1"])] for layer in layers]
    return markdown_table(header("forward of a layer, batch 1 / 4", figures), rows)


def masks() -> str:
    """Milliseconds, of all cases that others take part in."""
    others = ["torch.topk", "torch.kthvalue", "numpy.partition", "read once"]
    rows = [
        [case, *(f"{found[name]['ms']:.3g}" if name in found else "" for name in ["ours", *others])]
        for case, by in load("binarize").items()
        if "torch.topk" in (found := by["variants"])
    ]
    return markdown_table(["scores, kept: ms", "ours", *others], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"step": steps, "layers": layers, "small": small, "masks": masks}
    parser.add_argument("table", choices=tables)
    print(tables[parser.parse_args().table]())


if __name__ == "__main__":
    main()
