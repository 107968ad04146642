"""What the settings of the bi-level methods do, one at a time: test accuracy on CIFAR-10 at 90 %, short runs.

BiDST trains from scratch (ERK), BiP prunes the dense networks that compare_methods.py has trained (global ranking).

    python benchmarks/ablate_bilevel.py --data-path .data --methods bidst --name cifar10_ablations_bidst
    python benchmarks/compare_methods.py --data-path .data --output-dir runs/compare --methods dense --name dense
    python benchmarks/ablate_bilevel.py --data-path .data --dense-dir runs/compare --methods bip --seeds 0 \
        --name cifar10_ablations_bip

Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from timing import write_result

from sparsebilevel.cli.ablate import ablate
from sparsebilevel.training.config import Config

BIDST_CHANGES = 19  # as in compare_methods.py
GRIDS = {
    "bidst": ["search_space=0,0.01,0.2", "implicit=none", "implicit_on=all", "lower_gradient=batch", "gumbel=true"],
    "bip": ["implicit=none", "implicit_scale=1,10000", "lower_gradient=batch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-path", default=".data")
    parser.add_argument("--dense-dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(GRIDS))
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--name", required=True, help="results/NAME.json")
    args = parser.parse_args()

    figures: dict[str, dict[str, Any]] = {}
    for method in args.methods:
        results: dict[Any, list[dict[str, Any]]] = {}
        for seed in args.seeds:
            fields = {
                **{"data": "cifar10", "data_path": args.data_path, "arch": args.arch, "batch_size": 128},
                **{"epochs": args.epochs, "lr": 0.1, "weight_decay": 1e-4, "channels_last": True, "amp": args.amp},
                **{
                    "eval_batch_size": 500,
                    "measure": False,
                    "quiet": True,
                    "validation": 0,
                    "method": method,
                    "resume": True,
                },
                **{"sparsity": 0.9, "seed": seed, "output_dir": str(args.output_dir / f"{method}-{seed}")},
            }
            if method == "bidst":
                steps = 50_000 // 128 * args.epochs
                fields |= {"distribution": "erk", "update_freq": str(steps // (BIDST_CHANGES + 1) + 1)}
                fields |= {"update_end": "1.0"}
            else:
                dense = args.dense_dir / f"dense-{seed}" / "checkpoint.pth"
                fields |= {"distribution": "global", "init_from": str(dense)}
            for setting, rows in ablate(Config(**fields), GRIDS[method]).items():
                results.setdefault(setting, []).extend(rows)
        figures[method] = {
            "defaults" if setting is None else f"{setting[0]}={setting[1]}": summarize(rows)
            for setting, rows in results.items()
        }
    arguments = {k: v for k, v in vars(args).items() if k not in ("data_path", "dense_dir", "output_dir", "name")}
    path = write_result(args.name, {"settings": arguments, "figures": figures})
    for method, rows in figures.items():
        print(f"| {method} | accuracy, % |\n|---|---|")
        for setting, row in rows.items():
            print(f"| {setting} | {row['accuracy']:.2f} ({', '.join(f'{a:.2f}' for a in row['accuracies'])}) |")
    print(path)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [100 * row["test_acc"] for row in rows]
    return {"accuracy": statistics.mean(accuracies), "accuracies": accuracies}


if __name__ == "__main__":
    main()
