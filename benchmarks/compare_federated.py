"""Compare federated pruning methods at equal rounds and device budgets; writes a JSON file and a table.

    python benchmarks/compare_federated.py run --alphas 0.5 0.1 --seeds 0 1 2 -- --epochs 20 --finetune-epochs 10
    python benchmarks/compare_federated.py table    # and: sizes

What follows ``--`` goes to `sparsebilevel federated`. `run` adds to, or replaces runs of,
benchmarks/results/federated_digits.json and so on, so that seeds can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsebilevel.cli import main as command

RESULTS = Path(__file__).parent / "results"
METHODS = ("fedavg", "random", "filter", "energy", "fedosp", "fedilp", "dwnp")


def run(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        for alpha in args.alphas:
            name, *others = args.methods
            flags = ["--method", name, "--baselines", *others, "--data", args.data, "--alpha", str(alpha)]
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                run_flags = ["--quiet", "--checkpoint-freq", "0", "--output-dir", folder]
                command(["federated", *flags, "--seed", str(seed), *args.flags, *run_flags])
                print(alpha, seed, f"{time.perf_counter() - began:.0f} s", flush=True)
                for method in args.methods:
                    row = json.loads((Path(folder) / method / "log.jsonl").read_text().splitlines()[-1])
                    entry = {"method": method + args.label, "alpha": alpha, "seed": seed, "flags": args.flags}
                    save(args.data, entry | {"result": row})


def save(data: str, entry: dict[str, Any]) -> None:
    path = RESULTS / f"federated_{data}.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    key = ("method", "alpha", "seed", "flags")
    entries = [e for e in entries if any(e[k] != entry[k] for k in key)]
    path.write_text(json.dumps([*entries, entry], indent=1) + "\n")


COLUMNS = ("method", "seeds", "before %", "pruned %", "tuned %", "devices sliced %")
COLUMNS += ("T server", "T devices", "FLOPs devices", "MB")


def table(args: argparse.Namespace) -> None:
    entries = json.loads((RESULTS / f"federated_{args.data}.json").read_text())
    for alpha in sorted({e["alpha"] for e in entries}, reverse=True):
        print(f"\nalpha = {alpha}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for name in dict.fromkeys(e["method"] for e in entries):
            rows = [e["result"] for e in entries if (e["method"], e["alpha"]) == (name, alpha)]
            if rows:
                accuracies = ("acc_before_pruning", "acc_after_pruning", "pooled_acc", "device_acc_sliced")
                cells = [name, str(len(rows)), *(_spread(rows, key) for key in accuracies)]
                cells.append(f"{statistics.fmean(r['server_ratio'] for r in rows):.3f}")
                cells.append(f"{statistics.fmean(statistics.fmean(r['device_ratio']) for r in rows):.3f}")
                cells.append(f"{statistics.fmean(statistics.fmean(r['device_flops']) for r in rows):,.0f}")
                total = statistics.fmean(sum(r["bytes_up"].values()) + sum(r["bytes_down"].values()) for r in rows)
                print(f"| {' | '.join([*cells, f'{total / 1e6:,.0f}'])} |")


def sizes(args: argparse.Namespace) -> None:
    """Parameters, and milliseconds of a forward pass of 64 samples on the CPU, of the first device's sliced network."""
    entries = json.loads((RESULTS / f"federated_{args.data}.json").read_text())
    columns = ("method", "runs", "FLOPs", "parameters", "ms dense", "ms device", "faster")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in dict.fromkeys(e["method"] for e in entries):
        rows = [e["result"] for e in entries if e["method"] == name and "dense" in e["result"]["params"]]
        if not rows:
            continue  # older runs timed two networks only
        part = statistics.fmean(r["device_flops"][0] / r["dense_flops"] for r in rows)
        kept = statistics.fmean(r["params"]["device"] / r["params"]["dense"] for r in rows)
        dense, device = (statistics.median(r["time_forward_ms"][k] for r in rows) for k in ("dense", "device"))
        ratio = statistics.median(r["time_forward_ms"]["dense"] / r["time_forward_ms"]["device"] for r in rows)
        print(f"| {name} | {len(rows)} | {part:.3f} | {kept:.3f} | {dense:.2f} | {device:.2f} | {ratio:.2f}x |")


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * row[key] for row in rows if key in row]
    if not values:
        return "-"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "sizes"))
    parser.add_argument("--data", default="digits")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="one command a seed: they share training")
    parser.add_argument("--label", default="", help="is added to the methods' names, for runs with other flags")
    words = [*sys.argv[1:], "--"]
    cut = words.index("--")
    arguments = parser.parse_args(words[:cut], argparse.Namespace(flags=words[cut + 1 : -1]))
    {"run": run, "table": table, "sizes": sizes}[arguments.action](arguments)
