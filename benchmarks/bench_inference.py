"""Small batches in inference: whole sparse networks against dense ones.

python benchmarks/bench_inference.py   # interleaved medians -> results/inference.json

Uniform masks at 90 %, first and last layer dense; the baseline is the faster of dense NCHW and channels_last.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from masked_layers import speedup_cell
from timing import interleave, markdown_table, write_result
from torch import Tensor, nn

import sparsebilevel as sb
from sparsebilevel.models import create_model

NETWORKS = {"resnet32": 32, "resnet32x2": 32, "resnet18": 224, "resnet50": 224}  # and the size of its images
BATCHES = (1, 2, 4, 8, 12)
VARIANTS = ("dense NCHW", "dense NHWC", "sparse NCHW", "sparse NHWC", "sparse NHWC, optimize_for_cpu")


def make(name: str) -> dict[str, nn.Module]:
    """The variants of a network, in eval mode."""
    dense = create_model(name, 10).eval()
    sparse = sb.sparsify(copy.deepcopy(dense), 0.9).eval()
    networks = {}
    for variant in VARIANTS:
        network = copy.deepcopy(sparse if variant.startswith("sparse") else dense)
        network = network.to(memory_format=torch.channels_last if "NHWC" in variant else torch.contiguous_format)
        networks[variant] = sb.optimize_for_cpu(network) if variant.endswith("cpu") else network
    return networks


def inference(network: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward pass without autograd."""

    def run() -> None:
        with torch.no_grad():
            network(x)

    return run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="IMAGES")
    args = parser.parse_args()
    torch.manual_seed(0)
    figures: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    for name in args.networks:
        networks, figures[name] = make(name), {}
        for batch in args.batches:
            x = torch.randn(batch, 3, NETWORKS[name], NETWORKS[name])
            images = {"NHWC": x.contiguous(memory_format=torch.channels_last), "NCHW": x}
            runs = {key: inference(net, images["NHWC" if "NHWC" in key else "NCHW"]) for key, net in networks.items()}
            rows = interleave(runs, rounds=7)
            base = min(row["ms"] for key, row in rows.items() if key.startswith("dense"))
            figures[name][batch] = {key: row | {"speedup": base / row["ms"]} for key, row in rows.items()}
    cells = [
        [name, str(batch), *(speedup_cell(row[key]) for key in VARIANTS)]
        for name, by_batch in figures.items()
        for batch, row in by_batch.items()
    ]
    print("inference, 90 %: ms (speed-up over the best dense)\n")
    print(markdown_table(["network", "batch", *VARIANTS], cells))
    if args.networks == list(NETWORKS) and args.batches == list(BATCHES):
        print(write_result("inference", {"figures": figures}))


if __name__ == "__main__":
    main()
