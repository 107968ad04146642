"""Compare federated pruning methods at equal rounds and device budgets; writes a JSON file and a table.

    python benchmarks/compare_federated.py run --alphas 0.5 0.1 --seeds 0 1 2 -- --epochs 20 --finetune-epochs 10
    python benchmarks/compare_federated.py run --methods bidst bip magnitude fedavg --results digits_unstructured
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
                    save(args.results, entry | {"result": row})


def save(name: str, entry: dict[str, Any]) -> None:
    path = RESULTS / f"federated_{name}.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    key = ("method", "alpha", "seed", "flags")
    entries = [e for e in entries if any(e[k] != entry[k] for k in key)]
    path.write_text(json.dumps([*entries, entry], indent=1) + "\n")


def table(args: argparse.Namespace) -> None:
    """One for each alpha; without the columns that none of the methods has."""
    entries = json.loads((RESULTS / f"federated_{args.results}.json").read_text())
    for alpha in sorted({e["alpha"] for e in entries}, reverse=True):
        lines = []
        for name in dict.fromkeys(e["method"] for e in entries):
            rows = [e["result"] for e in entries if (e["method"], e["alpha"]) == (name, alpha)]
            if rows:
                lines.append({"method": name, "seeds": str(len(rows))} | _cells(rows))
        titles = [title for title in lines[0] if any(line[title] != "-" for line in lines)]
        print(f"\nalpha = {alpha}\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        for line in lines:
            print(f"| {' | '.join(line[title] for title in titles)} |")


def _cells(rows: list[dict[str, Any]]) -> dict[str, str]:
    accuracies = {"before": "acc_before_pruning", "pruned": "acc_after_pruning", "tuned": "pooled_acc"}
    accuracies |= {"devices sliced": "sliced_acc", "personalized": "personalized_acc"}
    cells = {f"{title} %": _spread(rows, key) for title, key in accuracies.items()}
    cells |= {"sparsity": _mean(rows, "sparsity", ".3f"), "T server": _mean(rows, "server_ratio", ".3f")}
    cells |= {"T devices": _mean(rows, "device_ratio", ".3f"), "FLOPs devices": _mean(rows, "device_flops", ",.0f")}
    down, up = (statistics.fmean(sum(r[key].values()) for r in rows) / 1e6 for key in ("bytes_down", "bytes_up"))
    return cells | {"MB down": f"{down:,.0f}", "MB up": f"{up:,.0f}", "MB": f"{down + up:,.0f}"}


def _mean(rows: list[dict[str, Any]], key: str, format: str) -> str:
    values = [statistics.fmean(v) if isinstance(v := row[key], list) else v for row in rows if key in row]
    return f"{statistics.fmean(values):{format}}" if values else "-"


def sizes(args: argparse.Namespace) -> None:
    """Parameters, and milliseconds of a forward pass of 64 samples on the CPU, of the first device's sliced network."""
    entries = json.loads((RESULTS / f"federated_{args.results}.json").read_text())
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
    parser.add_argument("--results", help="name of the file of results; that of the data if not given")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, help="one command a seed: they share training")
    parser.add_argument("--label", default="", help="is added to the methods' names, for runs with other flags")
    words = [*sys.argv[1:], "--"]
    cut = words.index("--")
    arguments = parser.parse_args(words[:cut], argparse.Namespace(flags=words[cut + 1 : -1]))
    arguments.results = arguments.results or arguments.data
    {"run": run, "table": table, "sizes": sizes}[arguments.action](arguments)
