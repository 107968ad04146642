"""Packing and unpacking of sparse tensors: ``sparsebilevel.pack`` against indexing in torch and numpy.

    pytest benchmarks/bench_pack.py          # pytest-benchmark's table
    python benchmarks/bench_pack.py          # interleaved medians -> results/pack.json

25.56 M float32 values (the parameters of ResNet-50), random masks. Ours makes whole messages: positions in the smallest
format, or none where the receiver has the mask ("values"), hash and checksum; and checks them. ``t[mask]`` and
``t[mask] = v`` move the values only, and without the zeros around them. The floor is one copy of as many bytes as must
be read and written: values and mask to message, and message to values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timing import interleave, markdown_table, write_result
from torch import Tensor

import sparsebilevel as sb

NUMEL = 25_560_000
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
OURS = ("ours", "ours, values")
VARIANTS = (*OURS, "torch", "numpy", "floor")


def floor(read: int, written: int) -> Callable[[], Any]:
    """Moves so many bytes: as many as go both ways are copied, the rest read or written alone."""
    source, target = torch.ones(read // 4), torch.ones(written // 4)
    both = min(source.numel(), target.numel())

    def run() -> None:
        target[:both].copy_(source[:both])
        if both < source.numel():
            source[both:].sum()
        target[both:].zero_()

    return run


def prepare(sparsity: float) -> dict[str, dict[str, Callable[[], Any]]]:
    """pack or unpack -> variant -> what is timed."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(NUMEL, generator=generator)
    mask = torch.rand(NUMEL, generator=generator) >= sparsity
    out, values = torch.zeros(NUMEL), dense[mask]
    numpy_dense, numpy_mask, numpy_out = dense.numpy(), mask.numpy(), out.numpy()
    numpy_values = values.numpy()
    message, bare = sb.pack(dense, mask), sb.pack(dense, mask, "values")

    def assign(target: Tensor) -> None:
        target[mask] = values

    def numpy_assign() -> None:
        numpy_out[numpy_mask] = numpy_values

    assert torch.equal(sb.unpack(message, out=out), dense * mask)
    assert np.array_equal(numpy_dense[numpy_mask], numpy_values)
    return {
        "pack": {
            "ours": lambda: sb.pack(dense, mask),
            "ours, values": lambda: sb.pack(dense, mask, "values"),
            "torch": lambda: dense[mask],
            "numpy": lambda: numpy_dense[numpy_mask],
            "floor": floor(4 * NUMEL + NUMEL, len(message)),
        },
        "unpack": {
            "ours": lambda: sb.unpack(message, out=out),
            "ours, values": lambda: sb.unpack(bare, mask, out=out),
            "torch": lambda: assign(out),
            "numpy": numpy_assign,
            "floor": floor(len(message), 4 * NUMEL),
        },
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
def bench_pack(benchmark, sparsity: float, direction: str, variant: str) -> None:
    benchmark.group = f"{direction}, {sparsity:.0%}"
    benchmark.pedantic(prepare(sparsity)[direction][variant], rounds=5, warmup_rounds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="FRACTION")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {}
    rows = []
    for sparsity in args.sparsities:
        for direction, runs in prepare(sparsity).items():
            found = interleave(runs, rounds=args.rounds)
            ratios = {name: found["torch"]["ms"] / found[name]["ms"] for name in OURS}
            figures.setdefault(direction, {})[f"{sparsity:g}"] = {"variants": found, "ratio": ratios}
            cells = [f"{found[variant]['ms']:.2f}" for variant in VARIANTS]
            rows.append([direction, f"{sparsity:.1%}", *cells, *(f"{ratio:.1f}x" for ratio in ratios.values())])
            print(*rows[-1], flush=True)
    print(f"\n{NUMEL / 1e6:g} M float32, ms; torch's indexing over ours\n")
    print(markdown_table(["", "sparsity", *VARIANTS, *(f"torch / {name}" for name in OURS)], rows), "\n")
    if args.sparsities == list(SPARSITIES) and args.rounds >= 15:
        print(write_result("pack", {"numel": NUMEL, "figures": figures}))


if __name__ == "__main__":
    main()
