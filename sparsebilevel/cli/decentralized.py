"""``sparsebilevel decentralized``: workers on a graph train one sparse model, in this process or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch

from ..comm import BACKENDS, Communicator, LocalCommunicator, TorchCommunicator, launched_world_size
from ..decentralized.algorithms import ALGORITHMS, Decentralized, Settings
from ..decentralized.gossip import Gossip
from ..decentralized.graphs import Topology, make_topology
from ..decentralized.tasks import TASK_SETTINGS, Problem, make_problem
from ..training.checkpoint import load_checkpoint, save_checkpoint, write_text
from ..training.config import read_json
from ..training.runlog import open_folder, read_log
from ..training.runtime import choose_device
from .tables import text_table

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Where and how to run, not what: free to differ when a run is resumed.
_RUN_FLAGS = (
    "output_dir",
    "resume",
    "overwrite",
    "rejoin",
    "timeout",
    "on_failure",
    "quiet",
    "max_rounds",
    "data_path",
    "device",
    "backend",
    "run_id",
)
_WRITTEN = ("*/worker*-*.pth", "*/model.pth", "*/log.jsonl", "*.png")  # what a run leaves, beside config.json


def decentralized(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run the algorithm and its baselines; rows of figures by name (empty but in the process of worker 0)."""
    world = launched_world_size()
    workers = args.workers if args.workers is not None else world if world > 1 else 8
    if world > 1 and workers != world:
        raise ValueError(f"workers={workers} is not allowed: {world} processes were started, one for each worker")
    names = list(dict.fromkeys([args.algorithm, *args.baselines]))
    for name in names:
        if name not in ALGORITHMS:
            raise ValueError(f"algorithm={name!r} is not known; allowed: {', '.join(ALGORITHMS)}")
    for flag in ("epochs", "evaluations"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < math.inf:
            raise ValueError(f"{flag}={getattr(args, flag)} is not allowed; expected a finite number above 0")
    for flag, least in (("reports", 1), ("max_rounds", 1), ("checkpoint_freq", 0), ("mixings", 1)):
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise ValueError(f"{flag}={getattr(args, flag)} is not allowed; expected at least {least}")
    device = _choose_device(args.device)
    torch.set_num_threads(1)  # small products, and sums that do not depend on how the workers are spread
    topology = make_topology(
        args.graph, workers, args.weights, probability=args.probability, seed=args.seed, path=args.graph_file
    )
    problem = make_problem(
        args.task, args.data, args.data_path, workers, how=args.partition, alpha=args.alpha, hidden=args.hidden,
        init_from=args.init_from, limit=args.limit, device=device, seed=args.seed,
    )  # fmt: skip
    # What is wrong with the settings shows before the folder is touched.
    _make_gossip(LocalCommunicator(workers), topology, args)
    for name in names:
        make_settings(name, args).validate(problem.maskable)
    comm: Communicator = LocalCommunicator(workers)
    if world > 1:
        comm = TorchCommunicator(
            topology.edges(), args.timeout, args.on_failure, args.rejoin, device=device, backend=args.backend
        )
    elif args.rejoin:
        raise ValueError("rejoin needs the other workers; it is for one of several processes")
    is_main = 0 in comm.ranks
    folder = Path(args.output_dir)
    if is_main:
        _open_folder(folder, args, workers)
        if not args.quiet:
            print(f"{args.task} on {args.data}: {workers} workers, {args.partition}, samples {problem.sizes}")
            print(f"graph {args.graph}: spectral gap {topology.gap:.6f}; {problem.maskable:,} weights have a mask")
            print(f"device {device}{_describe(comm)}")
    if args.rejoin and (is_main or len(names) > 1):
        raise ValueError("rejoin works for workers other than 0, and with one algorithm (--baselines without names)")
    if not args.rejoin:
        comm.barrier()
    run_id = _run_id(folder)
    results = {}
    try:
        for name in names:
            results[name] = run_algorithm(name, problem, topology, comm, args, folder / name, run_id)
        comm.barrier()
    finally:
        comm.close()
    if is_main:
        if not args.quiet:
            print(_table(results))
        _draw(results, folder)
        if not args.quiet:
            print(f"run folder: {folder}")
    return results if is_main else {}


def _choose_device(name: str) -> torch.device:
    """The device of this process. Processes of one machine share out its GPUs in turns, if no index is given."""
    device = choose_device(name)
    if device.type == "cuda" and device.index is None:
        # Without torchrun there is no local rank; ranks that are started together are usually those of one machine.
        rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))
        device = torch.device("cuda", rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _describe(comm: Communicator) -> str:
    if isinstance(comm, TorchCommunicator):
        return f" (of worker {comm.rank}); messages between {comm.world_size} processes over {comm.backend}"
    return "; all workers in this process"


def _open_folder(folder: Path, args: argparse.Namespace, workers: int) -> None:
    config = {k: v for k, v in vars(args).items() if k not in ("command", "traceback")} | {"workers": workers}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    # Checkpoints bear it too: a worker that a run before this one has lost may still write.
    is_old = args.resume and (folder / "config.json").exists()
    config["run_id"] = _run_id(folder) if is_old else secrets.token_hex(8)
    open_folder(args.output_dir, config, _RUN_FLAGS, args.resume, args.overwrite, _WRITTEN)


def _run_id(folder: Path) -> str | None:
    """Of the run in this folder; None on a machine that does not share it with worker 0."""
    written = folder / "config.json"
    return read_json(written).get("run_id") if written.exists() else None


def make_settings(name: str, args: argparse.Namespace) -> Settings:
    """Those of the task, changed by the algorithm and by the command line."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    chosen = ALGORITHMS[name] if name != args.algorithm else {**ALGORITHMS[name], **given}
    return Settings(**{**TASK_SETTINGS[args.task], **given, **chosen})


def _make_gossip(comm: Communicator, topology: Topology, args: argparse.Namespace) -> Gossip:
    return Gossip(comm, topology, args.mixings, args.chebyshev, _DTYPES[args.message_dtype])


def run_algorithm(
    name: str,
    problem: Problem,
    topology: Topology,
    comm: Communicator,
    args: argparse.Namespace,
    folder: Path,
    run_id: str | None,
) -> list[dict[str, Any]]:
    """Run, or continue, one algorithm; its rows of figures."""
    comm.sent.clear()
    comm.notice = comm.resent = 0
    gossip = _make_gossip(comm, topology, args)
    budget = args.epochs * problem.mean_size if args.evaluations is None else args.evaluations
    run = Decentralized(problem, gossip, make_settings(name, args), budget)
    is_main = 0 in comm.ranks
    rows: list[dict[str, Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    start = _latest_round(folder, comm.world_size) if args.resume and not args.rejoin else 0
    if args.rejoin:
        (k,) = comm.ranks
        numbers = _rounds_of(folder, k)
        if not numbers:
            raise ValueError(f"rejoin: {folder} has no checkpoint of worker {k}")
        start = numbers[-1]
        run.rejoin(_load(folder / f"worker{k}-{start}.pth", run_id))
    elif start:
        run.load_state_dict({k: _load(folder / f"worker{k}-{start}.pth", run_id) for k in comm.ranks})
    saved = [start]
    if args.resume and not args.rejoin:
        comm.barrier()  # nobody writes or removes anything before all have seen what there is
        for k in comm.ranks:
            _remove_others(folder, k, saved)  # later ones, of which some lacked: what follows may be another course
    if is_main:
        if not start:
            (folder / "model.pth").unlink(missing_ok=True)
        kept = read_log(folder, ("round",)) if start and log.exists() else []
        rows = [row for row in kept if row["round"] <= start]
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
    every = max(1, run.rounds // args.reports)
    last = min(run.rounds, args.max_rounds or run.rounds)

    def report() -> None:
        row = run.evaluate()
        if row is not None and not (rows and rows[-1]["round"] == row["round"]):
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not args.quiet:
                print(_line(name, run.rounds, row), flush=True)

    # At the end nothing is left to do, but the network is asked for, and the figures if the log was lost.
    if run.done == 0 or (run.done == run.rounds and not args.rejoin):
        report()
    while run.done < last:
        run.round()
        if run.done % every == 0 or run.done == run.rounds:
            report()
        if args.checkpoint_freq and (run.done % args.checkpoint_freq == 0 or run.done == last):
            # Two: when a run is cut short, some workers may have written the last one and others not.
            saved = [saved[-1], run.done]
            for k in comm.ranks:
                save_checkpoint(folder / f"worker{k}-{run.done}.pth", {**run.state_dict(k), "run_id": run_id})
                _remove_others(folder, k, saved)
    if is_main and rows and run.done == run.rounds:
        state = problem.objective.state_dict(run.final_weights())
        shaped = zip(problem.objective.masked_names, problem.split_masked(run.final_mask()), strict=True)
        masks = {parameter: mask.cpu().clone() for parameter, mask in shaped}
        save_checkpoint(folder / "model.pth", {"model": state, "masks": masks})
    return rows


def _rounds_of(folder: Path, k: int) -> list[int]:
    found = (re.fullmatch(rf"worker{k}-(\d+)\.pth", path.name) for path in folder.glob(f"worker{k}-*.pth"))
    return sorted(int(match[1]) for match in found if match)


def _latest_round(folder: Path, workers: int) -> int:
    """The last round of which every worker has a checkpoint; 0 if no worker has any.

    Raises:
        ValueError: there are checkpoints, but none of a round that all have; after a worker was lost that is usual.
    """
    found = {k: _rounds_of(folder, k) for k in range(workers)}
    common = set.intersection(*map(set, found.values()))
    if not common and any(found.values()):
        listed = "; ".join(f"worker {k}: {', '.join(map(str, rounds)) or 'none'}" for k, rounds in found.items())
        raise ValueError(
            f"resume: there is no round of which all workers have a checkpoint in {folder} ({listed}); remove "
            f"{folder}/worker*-*.pth to start again"
        )
    return max(common, default=0)


def _load(path: Path, run_id: str | None) -> dict[str, Any]:
    """A checkpoint of this run."""
    state = load_checkpoint(path)
    if state.get("run_id") != run_id:
        raise ValueError(
            f"{path} is of another run ({state.get('run_id')}) than this folder ({run_id}); remove it, or start again "
            "with --overwrite"
        )
    return state


def _remove_others(folder: Path, k: int, kept: list[int]) -> None:
    for number in set(_rounds_of(folder, k)) - set(kept):
        (folder / f"worker{k}-{number}.pth").unlink(missing_ok=True)


def _line(name: str, rounds: int, row: dict[str, Any]) -> str:
    auc = f"  AUC {row['test_auc']:.4f}" if "test_auc" in row else ""
    return (
        f"{name:20} round {row['round']:4}/{rounds}  upper loss {row['upper_loss']:.4f}  accuracy "
        f"{100 * row['test_acc']:.2f} %{auc}  consensus {row['consensus_error']:.1e}  sparsity {row['sparsity']:.4f}  "
        f"sent {_megabytes(row['bytes_total'])}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    header = (
        "algorithm",
        "upper loss",
        "accuracy %",
        "AUC",
        "consensus",
        "sparsity",
        "evaluations",
        "sent",
        "most of it",
    )
    table = []
    for name, rows in results.items():
        row = rows[-1]
        most = max(row["bytes"], key=row["bytes"].get) if row["bytes"] else "-"
        table.append(
            (
                name,
                f"{row['upper_loss']:.4f}",
                f"{100 * row['test_acc']:.2f}",
                f"{row['test_auc']:.4f}" if "test_auc" in row else "-",
                f"{row['consensus_error']:.1e}",
                f"{row['sparsity']:.4f}",
                f"{row['evaluations']:.0f}",
                _megabytes(row["bytes_total"]),
                most,
            )
        )
    return text_table(table, header)


def _draw(results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    try:
        from .._plots import decentralized_curves
    except ImportError:  # the figures are in the log; pictures need matplotlib
        return
    (folder / "curves.png").write_bytes(decentralized_curves(results))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    from ..decentralized import algorithms as a
    from ..decentralized.graphs import GRAPHS, WEIGHTS
    from ..decentralized.tasks import PARTITIONS, TASK_SETTINGS, TASKS

    def default(field: str) -> str:
        """Of `Settings`, and of the tasks that have their own."""
        own = [f"{task}: {settings[field]}" for task, settings in TASK_SETTINGS.items() if field in settings]
        return f"[{', '.join([str(getattr(Settings, field)), *own])}]"

    add = parser.add_argument
    add("--workers", type=int, help="number of workers [8, or the processes that torchrun started]")
    add("--graph", choices=GRAPHS, default="ring", help="who talks to whom [%(default)s]")
    add("--graph-file", metavar="FILE", help="JSON list of edges, for --graph file")
    add("--probability", type=float, default=0.5, help="of an edge of erdos-renyi [%(default)s]")
    add("--weights", choices=WEIGHTS, default="metropolis", help="mixing weights [%(default)s]")
    add("--mixings", type=int, default=1, help="mixings in a row [%(default)s]")
    add("--chebyshev", action="store_true", help="accelerate several mixings")
    add("--message-dtype", choices=tuple(_DTYPES), default="float32", help="of values in messages [%(default)s]")
    group = parser.add_argument_group("task")
    group.add_argument("--task", choices=TASKS, default="svm", help="network and loss [%(default)s]")
    group.add_argument("--data", default="digits", help="digits (embedded), a9a, covtype, imdb, sent140, cifar10")
    group.add_argument("--data-path", default=".data", help="where its files lie [%(default)s]")
    group.add_argument("--partition", choices=PARTITIONS, default="dirichlet", help="of the samples [%(default)s]")
    group.add_argument("--alpha", type=float, default=0.5, help="of dirichlet [%(default)s]")
    group.add_argument("--hidden", type=int, help="size of the hidden layer [svm: 20, rnn: 128]")
    group.add_argument("--init-from", metavar="RUN", help="run of `sparsebilevel train` to start from (resnet)")
    group.add_argument("--limit", type=int, help="use only so many training samples")
    group = parser.add_argument_group("algorithm (what is not given is the algorithm's own)")
    group.add_argument("--algorithm", default="bilevel", help=f"{', '.join(ALGORITHMS)} [%(default)s]")
    group.add_argument("--baselines", nargs="*", default=["d-sgd", "magnitude-after"],
                       help="to compare it with; none without names [d-sgd magnitude-after]")  # fmt: skip
    group.add_argument(
        "--epochs", type=float, default=50.0, help="sample gradients: epochs of the mean worker [%(default)s]"
    )
    group.add_argument("--evaluations", type=float, help="sample gradients of a worker, instead")
    group.add_argument("--sparsity", type=float, help=f"fraction of zeros [{Settings.sparsity}]")
    group.add_argument("--hypergradient", choices=a.HYPERGRADIENTS)
    group.add_argument("--constraint", choices=a.CONSTRAINTS, help=default("constraint"))
    group.add_argument("--initial-mask", choices=a.INITIAL_MASKS, help=default("initial_mask"))
    group.add_argument("--regularizer", choices=a.REGULARIZERS)
    group.add_argument("--strength", type=float, help="of the regularizer")
    group.add_argument("--tracking", choices=("none", "cta", "atc"))
    group.add_argument("--lower", choices=a.ESTIMATORS, help=f"estimator of the weights' gradient {default('lower')}")
    group.add_argument("--upper", choices=a.ESTIMATORS, help=f"estimator of the hypergradient {default('upper')}")
    group.add_argument("--inner-steps", type=int, help=f"steps on the weights in a round {default('inner_steps')}")
    group.add_argument("--batch-size", "-b", type=int, help=f"[{Settings.batch_size}]")
    group.add_argument("--lr", type=float, help=f"of the weights {default('lr')}")
    group.add_argument("--schedule", choices=a.SCHEDULES, help=f"of both step sizes [{Settings.schedule}]")
    group.add_argument("--mask-lr", type=float, help=f"of the mask {default('mask_lr')}")
    group.add_argument("--normalize", choices=a.NORMALIZATIONS, help=f"its mean, over what {default('normalize')}")
    group.add_argument("--ridge", type=float, help=f"on the weights [{Settings.ridge}]")
    group.add_argument("--rho", type=float, help=f"of storm and finite [{Settings.rho}]")
    group.add_argument("--epsilon", type=float, help=f"of the penalty [{Settings.epsilon}]")
    group.add_argument("--clip-at", type=float, help=f"threshold of clipping [{Settings.clip_at}]")
    group.add_argument("--search", type=float, help=f"part of the rounds before the mask is fixed [{Settings.search}]")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto [%(default)s]")
    group.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="of messages between processes: nccl needs a GPU a worker"
    )
    group = parser.add_argument_group("run")
    help = "seconds to wait for a neighbour that gives no sign of life [%(default)s]"
    group.add_argument("--timeout", type=float, default=60.0, help=help)
    group.add_argument("--on-failure", choices=("error", "drop"), default="error", help="if one does not answer")
    group.add_argument("--rejoin", action="store_true", help="this worker was lost: join the others again")
    group.add_argument("--output-dir", default="runs/decentralized", help="[%(default)s]")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint of all workers")
    group.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    group.add_argument("--checkpoint-freq", type=int, default=20, help="rounds between checkpoints; 0: none")
    group.add_argument("--max-rounds", type=int, help="stop after so many rounds, as if interrupted")
    group.add_argument("--reports", type=int, default=10, help="reports in a run [%(default)s]")
    group.add_argument("--quiet", action="store_true")
