"""Compare decentralized algorithms at equal numbers of sample gradients; writes a JSON file, a table and pictures.

    python benchmarks/compare_decentralized.py tune --data a9a
    python benchmarks/compare_decentralized.py run --data a9a --seeds 0 1 2
    python benchmarks/compare_decentralized.py ablate --data a9a
    python benchmarks/compare_decentralized.py bytes
    python benchmarks/compare_decentralized.py table

`tune` gives every algorithm the learning rate, of one grid for all, that ends with the lowest upper loss (training
samples only) on seed 0 and at the largest of the sparsities; it writes benchmarks/results/decentralized_lr.json, and
saves its best run, which is that of `run` with the same flags. `run` takes those, or --lr for all, halved where a run
diverges, and adds to, or replaces runs of, benchmarks/results/decentralized_a9a.json and so on, so that seeds can be
run one by one. `ablate` changes one thing about `bilevel` at a time, and gives what it has to magnitude pruning, at its
learning rate. `table` prints Markdown and draws the curves of the first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsebilevel._plots import decentralized_curves
from sparsebilevel.comm import LocalCommunicator
from sparsebilevel.decentralized import (
    ALGORITHMS,
    Decentralized,
    Gossip,
    Problem,
    Samples,
    Settings,
    make_problem,
    make_topology,
)
from sparsebilevel.decentralized.algorithms import DENSE_ALGORITHMS
from sparsebilevel.decentralized.tasks import TASK_SETTINGS
from sparsebilevel.training.checkpoint import load_checkpoint
from sparsebilevel.training.runlog import read_log

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = RESULTS / "decentralized_lr.json"
TASK = {"digits": "svm", "a9a": "svm", "covtype": "svm", "imdb": "svm", "sent140": "rnn", "cifar10": "resnet"}


def problem_of(args: argparse.Namespace, seed: int) -> Problem:
    problem = make_problem(
        TASK[args.data], args.data, args.data_path, args.workers, hidden=args.hidden, init_from=args.init_from,
        limit=args.limit, eval_samples=args.eval_samples, seed=seed,
    )  # fmt: skip
    test, count = problem.test_set, args.test_samples
    problem.test_set = Samples(test.inputs[:count], test.targets[:count])
    return problem


def describe_start(args: argparse.Namespace) -> dict[str, Any] | None:
    """Of the run that networks start from, what it was and how good."""
    if args.init_from is None:
        return None
    config = load_checkpoint(Path(args.init_from) / "checkpoint.pth")["config"]
    chosen = {name: config[name] for name in ("arch", "epochs", "batch_size", "lr", "seed")}
    return chosen | {"test_acc": read_log(args.init_from)[-1]["test_acc"]}


def read_learning_rates() -> dict[str, dict[str, dict[str, float | None]]]:
    """``{data: {algorithm: {learning rate: upper loss, or None where the run diverged}}}``."""
    return json.loads(LEARNING_RATES.read_text()) if LEARNING_RATES.exists() else {}


def tune(args: argparse.Namespace) -> None:
    problem, sparsity = problem_of(args, 0), max(args.sparsities)
    for name in args.algorithms:
        losses: dict[str, float | None] = {}
        least = math.inf
        for lr in args.grid:
            began = time.perf_counter()
            try:
                rows = train(problem, name, sparsity, args, lr, 0)
                loss = rows[-1]["upper_loss"]
            except ValueError:  # weights that are not finite
                loss = math.inf
            losses[str(lr)] = round(loss, 6) if math.isfinite(loss) else None
            if loss < least:
                least = loss
                save(entry_of(problem, name, sparsity, args, 0, lr, rows, time.perf_counter() - began))
        print(args.data, name, losses, flush=True)
        known = read_learning_rates()
        known.setdefault(args.data, {})[name] = losses
        rows = [f'"{d}": {{\n' + ",\n".join(f'"{n}": {json.dumps(v)}' for n, v in algorithms.items()) + "}"
                for d, algorithms in known.items()]  # fmt: skip
        LEARNING_RATES.write_text("{" + ",\n".join(rows) + "}\n")


def tuned(data: str, name: str) -> float:
    losses = read_learning_rates()[data][name]
    return float(min((lr for lr, loss in losses.items() if loss is not None), key=lambda lr: losses[lr]))


def train_tuned(
    problem: Problem, name: str, sparsity: float, args: argparse.Namespace, seed: int
) -> tuple[float, list[dict[str, Any]]]:
    """(learning rate, rows); the rate is halved until the run does not diverge."""
    lr = args.lr or tuned(args.data, name)
    while True:
        try:
            rows = train(problem, name, sparsity, args, lr, seed)
            if math.isfinite(rows[-1]["upper_loss"]):
                return lr, rows
        except ValueError:  # weights that are not finite
            pass
        lr /= 2


def entry_of(
    problem: Problem,
    name: str,
    sparsity: float,
    args: argparse.Namespace,
    seed: int,
    lr: float,
    rows: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """What the file of results holds of a run."""
    return {
        "task": TASK[args.data],
        "data": args.data,
        "algorithm": name,
        "sparsity": None if name in DENSE_ALGORITHMS else sparsity,
        "seed": seed,
        "workers": args.workers,
        "graph": args.graph,
        "epochs": args.epochs,
        "lr": lr,
        "batch_size": args.batch_size,
        "hidden": args.hidden,
        "init_from": describe_start(args),
        "limit": args.limit,
        "samples": problem.sizes,
        "test_samples": len(problem.test_set),
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def run(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        problem = problem_of(args, seed)
        for sparsity in args.sparsities:
            for name in args.algorithms:
                if name in DENSE_ALGORITHMS and sparsity != args.sparsities[0]:
                    continue  # the same run
                began = time.perf_counter()
                lr, rows = train_tuned(problem, name, sparsity, args, seed)
                entry = entry_of(problem, name, sparsity, args, seed, lr, rows, time.perf_counter() - began)
                save(entry)
                last = rows[-1]
                print(
                    f"{args.data:8} {sparsity:.0%} seed {seed} {name:22} loss {last['upper_loss']:.4f} "
                    f"acc {last['test_acc']:.4f} {last['bytes_total'] / 1e6:7.1f} MB {entry['seconds']} s",
                    flush=True,
                )


def train(
    problem: Problem,
    name: str,
    sparsity: float,
    args: argparse.Namespace,
    lr: float,
    seed: int,
    changes: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    gossip = Gossip(LocalCommunicator(args.workers), make_topology(args.graph, args.workers))
    settings = Settings(
        **{**TASK_SETTINGS[TASK[args.data]], "batch_size": args.batch_size, **ALGORITHMS[name]}
        | {"sparsity": sparsity, "lr": lr, "seed": seed, **(changes or {})}
    )
    training = Decentralized(problem, gossip, settings, args.epochs * problem.mean_size)
    rows = []
    every = max(1, training.rounds // args.reports)
    while training.done < training.rounds:
        training.round()
        if training.done % every == 0 or training.done == training.rounds:
            rows.append(training.evaluate())
    return rows


KEY = ("data", "algorithm", "sparsity", "seed")


ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bilevel": ("bilevel", {}),
    "estimators storm": ("bilevel", {"lower": "storm", "upper": "storm"}),
    "estimators sgd": ("bilevel", {"lower": "sgd", "upper": "sgd"}),
    "1 inner step": ("bilevel", {"inner_steps": 1}),
    "10 inner steps": ("bilevel", {"inner_steps": 10}),
    "constant steps": ("bilevel", {"schedule": "constant"}),
    "lr 0.1": ("bilevel", {"lr": 0.1}),
    "mask_lr 0.01": ("bilevel", {"mask_lr": 0.01}),
    "without tracking": ("bilevel", {"tracking": "none"}),
    "magnitude-after, saga": ("magnitude-after", {"lower": "saga"}),
    "magnitude-during, saga": ("magnitude-during", {"lower": "saga"}),
}


def ablate(args: argparse.Namespace) -> None:
    path = RESULTS / "decentralized_ablation.json"
    losses: dict[str, list[float | None]] = {label: [] for label in ABLATIONS}
    for seed in args.seeds:
        problem = problem_of(args, seed)
        for label, (name, changes) in ABLATIONS.items():
            try:
                lr = tuned(args.data, "bilevel")
                loss = train(problem, name, max(args.sparsities), args, lr, seed, changes)[-1]["upper_loss"]
            except ValueError:  # weights that are not finite
                loss = math.inf
            losses[label].append(round(loss, 6) if math.isfinite(loss) else None)
            print(f"{args.data} seed {seed} {label:22} {loss:.4f}", flush=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    known[args.data] = {"sparsity": max(args.sparsities), "epochs": args.epochs, "limit": args.limit,
                        "seeds": args.seeds, "upper_loss": losses}  # fmt: skip
    path.write_text(json.dumps(known, indent=1) + "\n")


def read(data: str) -> list[dict[str, Any]]:
    path = RESULTS / f"decentralized_{data}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def save(entry: dict[str, Any]) -> None:
    runs = [e for e in read(entry["data"]) if any(e[k] != entry[k] for k in KEY)] + [entry]
    lines = ",\n".join(json.dumps(e) for e in runs)
    path = RESULTS / f"decentralized_{entry['data']}.json"
    path.write_text(f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n')


def table(args: argparse.Namespace) -> None:
    """Sorted by the distance to `bilevel`, seed by seed: seeds differ more than algorithms do."""
    header = "data pruned algorithm seeds upper_loss over_bilevel accuracy_% AUC consensus_error MB_sent".split()
    print(f"| {' | '.join(header).replace('_', ' ')} |")
    print(f"|{'---|' * len(header)}")
    for data in TASK:
        mine = read(data)
        for sparsity in sorted({e["sparsity"] or 0 for e in mine}):
            runs: dict[str, dict[int, dict[str, Any]]] = {}
            for e in mine:
                if (e["sparsity"] or 0) == sparsity:
                    runs.setdefault(e["algorithm"], {})[e["seed"]] = e["rows"][-1]
            lines = []
            for name, rows in runs.items():
                ours = runs.get("bilevel", {})
                over = [rows[k]["upper_loss"] - ours[k]["upper_loss"] for k in rows if k in ours]
                losses = over or [row["upper_loss"] for row in rows.values()]
                lines.append((statistics.fmean(losses), line(data, sparsity, name, list(rows.values()), over)))
            print("\n".join(text for _, text in sorted(lines)))
        for sparsity in sorted({e["sparsity"] or 0 for e in mine} - {0}):
            seed = mine[0]["seed"]
            curves = {
                e["algorithm"]: e["rows"] for e in mine if e["seed"] == seed and e["sparsity"] in (None, sparsity)
            }
            path = RESULTS / f"decentralized_{data}_{round(100 * sparsity)}.png"
            path.write_bytes(decentralized_curves(curves))


def line(data: str, sparsity: float, name: str, rows: list[dict[str, Any]], over: list[float]) -> str:
    def mean(values: list[float], digits: int = 4) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    cells = (
        data,
        f"{sparsity:.0%}" if sparsity else "dense",
        name,
        str(len(rows)),
        mean([row["upper_loss"] for row in rows]),
        mean(over) if over and name != "bilevel" else "-",
        mean([100 * row["test_acc"] for row in rows], 2),
        mean([row["test_auc"] for row in rows]) if "test_auc" in rows[0] else "-",
        f"{statistics.fmean(row['consensus_error'] for row in rows):.1e}",
        f"{statistics.fmean(row['bytes_total'] for row in rows) / 1e6:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def count_bytes(args: argparse.Namespace) -> None:
    """Bytes of a whole run at 90 % over the number of inner steps, beside the dense run of as many steps."""
    problem = make_problem("svm", args.data, args.data_path, args.workers, hidden=100, limit=args.limit)
    out = []
    for inner in (1, 10, 50):
        for name in ("bilevel", "d-sgd-tracking", "d-sgd"):
            gossip = Gossip(LocalCommunicator(args.workers), make_topology(args.graph, args.workers))
            settings = Settings(**{"sparsity": 0.9, "lower": "sgd", **ALGORITHMS[name], "inner_steps": inner})
            training = Decentralized(problem, gossip, settings, budget=1e9)
            training.rounds = args.steps // inner
            training.search_rounds = max(1, training.rounds // 2)
            last, per_step = 0, 0
            while training.done < training.rounds:
                last = gossip.comm.sent["weights"]
                training.round()
                per_step = (gossip.comm.sent["weights"] - last) // (inner * args.workers)
            sent = dict(gossip.comm.sent)
            out.append({"algorithm": name, "inner_steps": inner, "rounds": training.rounds, "bytes": sent,
                        "total": sum(sent.values()), "weights_of_a_worker_in_a_step_at_the_end": per_step})  # fmt: skip
            print(out[-1], flush=True)
    (RESULTS / "decentralized_bytes.json").write_text(
        json.dumps({"data": args.data, "maskable": problem.maskable, "runs": out}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("tune", "run", "ablate", "table", "bytes"))
    parser.add_argument("--data", choices=tuple(TASK), default="a9a")
    parser.add_argument("--data-path", default=".data")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.2, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=10.0, help="sample gradients, in epochs of the mean worker")
    parser.add_argument("--grid", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.4], help="learning rates (tune)")
    parser.add_argument("--lr", type=float, help="one for all algorithms, instead of those that tune found (run)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=16000, help="training samples [%(default)s]")
    parser.add_argument("--eval-samples", type=int, default=4096, help="of a worker, for its loss [%(default)s]")
    parser.add_argument("--test-samples", type=int, help="use only the first so many")
    parser.add_argument("--reports", type=int, default=8, help="figures during a run [%(default)s]")
    parser.add_argument("--init-from", help="folder of a run of `sparsebilevel train` (cifar10)")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--graph", default="ring")
    parser.add_argument("--steps", type=int, default=200, help="steps on the weights (bytes)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"tune": tune, "run": run, "ablate": ablate, "table": table, "bytes": count_bytes}[args.action](args)


if __name__ == "__main__":
    main()
