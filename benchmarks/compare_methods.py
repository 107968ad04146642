"""All methods on one budget: accuracy on CIFAR-10 at 90 %, mean and deviation over seeds.

One dense network a seed is trained first. Static, SET, RigL and BiDST train from scratch for the same number of epochs;
OMP, IMP, HYDRA and BiP start from that dense network and get as many epochs again (IMP as many for each of its levels).
Topology changes are scaled to the short run so that each method makes as many as its paper does in a full one.

    python benchmarks/compare_methods.py --data-path .data --output-dir runs/compare
    python benchmarks/compare_methods.py --data-path .data --output-dir runs/compare98 --sparsity 0.98 --epochs 10 \
        --methods static set rigl rigl-19 bidst bidst-batch bidst-20 --seeds 0 1 2 3 4 --name cifar10_methods_98
    python benchmarks/compare_methods.py --arch resnet32x2 --epochs 158 --batch-size 64 --device cuda ...

The first writes results/cifar10_methods.json, the second results/cifar10_methods_98.json.

Finished runs are kept and not repeated, and an interrupted one is resumed; runs of other settings are refused.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from timing import write_result

from sparsebilevel.report import describe_changes
from sparsebilevel.training.config import Config
from sparsebilevel.training.loop import train

# Topology changes of a full run: BiDST changes every 8 of 158 epochs; RigL and SET every 100 of 32 000 steps until 3/4.
# "rigl-19" is the control: RigL with as many changes as BiDST, which leaves what it grows more steps to learn.
# For `--methods`: "bidst-batch" has the published factor of the implicit term, "bidst-20" a search space of 20 %.
BIDST_CHANGES, RIGL_INTERVALS = 19, 320
FROM_SCRATCH = ("dense", "static", "set", "rigl", "rigl-19", "bidst")
FROM_DENSE = ("omp", "imp", "hydra", "bip")
BIDST_VARIANTS = {"bidst-batch": {"lower_gradient": "batch"}, "bidst-20": {"search_space": 0.2}}


def settings(method: str, epochs: int, steps: int) -> dict[str, Any]:
    """What a method is told beside the common settings; ``steps`` are the optimizer steps of ``epochs``."""
    if method in ("set", "rigl"):
        return {"update_freq": str(max(1, round(steps / RIGL_INTERVALS))), "update_end": "0.75"}
    if method == "rigl-19":
        return {"update_freq": str(round(0.75 * steps / (BIDST_CHANGES + 1))), "update_end": "0.75"}
    if method.startswith("bidst"):
        timing = {"update_freq": str(steps // (BIDST_CHANGES + 1) + 1), "update_end": "1.0"}
        return timing | BIDST_VARIANTS.get(method, {})
    if method == "imp":
        return {"levels": 3}
    if method == "hydra":
        tuning = max(1, round(epochs * 2 / 3))
        return {"epochs": epochs - tuning, "finetune_epochs": tuning, "scope": "global"}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-path", default=".data")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/compare"))
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*FROM_SCRATCH, *FROM_DENSE])
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="cifar10_methods", help="results/NAME.json")
    args = parser.parse_args()
    free = ("data_path", "output_dir", "device")
    odd = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in free]
    if odd and args.name == parser.get_default("name"):  # whose file has the figures of the README
        parser.error(f"{', '.join(odd)} are not those of results/{args.name}.json; give --name too")

    common = {
        **{"data": "cifar10", "data_path": args.data_path, "arch": args.arch, "batch_size": args.batch_size},
        **{"epochs": args.epochs, "lr": 0.1, "weight_decay": 1e-4, "channels_last": True, "amp": args.amp},
        **{"device": args.device, "eval_batch_size": 500, "measure": False, "quiet": True, "validation": 0},
    }
    steps = 50_000 // args.batch_size * args.epochs
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method in args.methods:
            folder = args.output_dir / f"{method}-{seed}"
            fields = common | {"method": method.split("-")[0], "seed": seed, "output_dir": str(folder), "resume": True}
            if method != "dense":
                distribution = "global" if method in FROM_DENSE else "erk"
                fields |= {"sparsity": args.sparsity, "distribution": distribution}
                fields |= settings(method, args.epochs, steps)
            if method in FROM_DENSE:
                fields["init_from"] = str(args.output_dir / f"dense-{seed}" / "checkpoint.pth")
            result = train(Config(**fields))
            rows[method].append(result)
            print(
                f"seed {seed} {method:7} {100 * result['test_acc']:.2f} %  {result['time_total_s']:.0f} s", flush=True
            )
    figures = {method: summarize(results) for method, results in rows.items()}
    arguments = {k: v for k, v in vars(args).items() if k not in ("data_path", "output_dir", "name")}
    path = write_result(args.name, {"settings": arguments, "amp": args.amp, "figures": figures})
    print(table(figures), path, sep="\n")


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [100 * r["test_acc"] for r in results]
    return {
        "accuracy": statistics.mean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "accuracies": accuracies,
        "sparsity": results[0]["sparsity"],
        "topology_changes": results[0]["topology_changes"],
        "mask_iou_start": results[0].get("mask_iou_start"),
        "seconds": min(r["time_total_s"] for r in results),  # the run that others disturbed least
        "topology_seconds": statistics.mean(r.get("time_topology_s") or 0 for r in results),
        "flops_theoretical": results[0]["costs"]["flops_theoretical"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| method | accuracy, % | sparsity | changes | time, s |", "|---|---|---|---|---|"]
    for method, row in rows.items():
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        figures = (
            f"{row['accuracy']:.2f}{spread}",
            f"{row['sparsity'] or 0:.3f}",
            describe_changes([row]),
        )
        lines.append(f"| {method} | {' | '.join(figures)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
