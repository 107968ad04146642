"""The command ``sparsebilevel federated``: a method and its baselines on one partition, with figures and pictures.

The folder of a run: ``config.json`` (the flags), ``facts.json`` (what they come to), ``results.csv``, ``curves.png``,
``channels.png``, and for each method a folder with ``log.jsonl`` (a row a round; those that were evaluated have
accuracies and costs; the last one is of type "result"), ``checkpoint.pth`` (everything needed to go on) and at the end
``model.pth`` (the server's network and all gates).
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..costs import count_costs
from ..data import Data, load_data
from ..data.partition import matching_partition, partition
from ..federated.flops import parse_budgets
from ..federated.models import find_gate_points, layers_changed_by_slicing, set_norm
from ..federated.rounds import Federation, make_federation
from ..federated.settings import METHODS, UNSTRUCTURED, Settings
from ..federated.unstructured import check_prunable
from ..models import create_model
from ..training.checkpoint import load_checkpoint, save_checkpoint, write_text
from ..training.runlog import open_folder, read_log
from ..training.runtime import Ranks, process_group
from .tables import text_table

# Where and how long to run, not what: free to differ when a run is resumed.
_RUN_FLAGS = ("output_dir", "resume", "overwrite", "quiet", "max_rounds", "data_path", "checkpoint_freq", "baselines")
# What a run leaves in its folder, beside config.json and facts.json.
_WRITTEN = ("*/checkpoint.pth", "*/log.jsonl", "*/model.pth", "results.csv", "*.png")


def federated(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the method and its baselines; the result row of each that came to its end, by name (on rank 0)."""
    with process_group(args.device) as ranks:
        return _federated(args, ranks)


def _federated(args: argparse.Namespace, ranks: Ranks) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys([args.method, *args.baselines]))
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method={name!r} is not known; allowed: {', '.join(METHODS)}")
    for flag, least in (("evaluations", 1), ("max_rounds", 1), ("checkpoint_freq", 0)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"{flag}={value} is not allowed; expected at least {least}")
    settings = make_settings(args)
    # Clients make batches of their own, of all their samples where these are fewer than batch_size.
    data = load_data(args.data, args.data_path, batch_size=1, eval_batch_size=250, seed=args.seed, device=ranks.device)
    if args.limit is not None:
        data = dataclasses.replace(data, train=_first(data, args.limit))
    labels = data.train.labels
    if not 1 <= args.clients <= len(labels):
        raise ValueError(f"clients={args.clients} is not allowed; expected 1 to {len(labels)}, the training samples")
    settings.validate(args.clients)
    budgets = parse_budgets("device_flops", args.device_flops, args.clients, args.seed)
    parts = partition(
        labels, args.clients, args.partition, alpha=args.alpha, balance=True, shards=args.shards, seed=args.seed
    )
    tests = matching_partition(labels, parts, data.test.labels, args.seed)
    if any(name in UNSTRUCTURED for name in names):
        check_prunable(make_network(args, data))

    def build(name: str) -> tuple[Federation, nn.Module]:
        torch.manual_seed(args.seed)
        model = make_network(args, data)
        dense = copy.deepcopy(model)
        has_none = name in UNSTRUCTURED or (name == "fedavg" and not _has_points(model))
        points = [] if has_none else find_gate_points(model)
        chosen = dataclasses.replace(settings, method=name)
        return make_federation(model, points, data, parts, tests, budgets, chosen, report=say, ranks=ranks), dense

    say = (lambda text: None) if args.quiet or not ranks.is_main else lambda text: print(text, flush=True)
    for name in names:
        build(name)  # what is wrong with networks and budgets shows before the folder is touched
    folder = Path(args.output_dir)
    if ranks.is_main:
        _open_folder(args)
        _write_facts(folder / "facts.json", settings, budgets, parts, tests)
    ranks.barrier()
    if settings.personal and max(budgets) > settings.server_flops:
        say(f"device_flops up to {max(budgets)} are above server_flops={settings.server_flops}: no device gets more")
    sizes = [len(part) for part in parts]
    say(f"{args.arch} on {args.data}: {args.clients} clients ({args.partition}), samples {sizes}")
    results, logs = {}, {}
    shape = data.num_classes, _features(args, data)
    trained: dict[str, Any] = {}  # the phase "train", which is the same for all methods that have it
    for name in names:
        run, dense = build(name)
        rows = run_method(name, run, dense, args, folder / name, ranks, say, trained, shape)
        logs[name] = rows
        if rows and rows[-1]["type"] == "result":
            results[name] = rows[-1]
    if results:
        say(result_table(results))
        if any(r.get("sliced_acc") not in (None, r["pooled_acc"]) for r in results.values()):
            say("FLOPs of devices are of their smaller networks, which reach 'sliced %'; 'tuned %' is before cutting")
    if ranks.is_main:
        _draw(logs, folder)
        _write_csv(results, folder / "results.csv")
    say(f"run folder: {folder}")
    return results


def make_network(args: argparse.Namespace, data: Data) -> nn.Module:
    """The dense network with its normalization, the same one for all methods of a run."""
    model = create_model(args.arch, data.num_classes, _features(args, data))
    return set_norm(model, args.norm, standardize=_standardizes(args))


def _features(args: argparse.Namespace, data: Data) -> int:
    """What a network's first layer reads."""
    return math.prod(data.input_shape) if args.arch == "mlp" else data.input_shape[0]


def _standardizes(args: argparse.Namespace) -> bool:
    """Whether convolutions have standardized weights, whose zeros would not stay zeros."""
    if args.standardize is not None:
        return bool(args.standardize)
    is_unstructured = any(name in UNSTRUCTURED for name in (args.method, *args.baselines))
    return not args.arch.startswith("mobilenet") and not is_unstructured


def _has_points(model: nn.Module) -> bool:
    try:
        return bool(find_gate_points(model))
    except ValueError:
        return False


def _first(data: Data, limit: int) -> Any:
    """``limit`` training samples, chosen evenly over the data set."""
    total = len(data.train.indices)
    if not 1 <= limit <= total:
        raise ValueError(f"limit={limit} is not allowed; expected 1 to {total}")
    return data.train.subset(torch.arange(limit) * total // limit)


def make_settings(args: argparse.Namespace) -> Settings:
    """Those of the main method; what was not given is `Settings`'s own."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    return Settings(**given)


def _open_folder(args: argparse.Namespace) -> None:
    config = {k: v for k, v in vars(args).items() if k not in ("command", "traceback")}
    open_folder(args.output_dir, config, _RUN_FLAGS, args.resume, args.overwrite, _WRITTEN)


def _write_facts(
    path: Path, settings: Settings, budgets: list[float], parts: Sequence[Tensor], tests: Sequence[Tensor]
) -> None:
    """What the flags come to: all settings with their defaults, what was drawn, and versions."""
    facts: dict[str, Any] = {"settings": dataclasses.asdict(settings), "device_budgets": budgets}
    facts |= {"training_samples": [len(part) for part in parts], "test_samples": [len(part) for part in tests]}
    facts |= {"sparsebilevel": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_text(path, json.dumps(facts, indent=2) + "\n")


def run_method(
    name: str,
    run: Federation,
    dense: nn.Module,
    args: argparse.Namespace,
    folder: Path,
    ranks: Ranks,
    say: Callable[[str], None],
    trained: dict[str, Any],
    shape: tuple[int, int],
) -> list[dict[str, Any]]:
    """Run, or continue, one method; its rows. Rank 0 alone writes.

    ``trained`` gets the state and the rows of the phase ``train``, or has those of another method; ``shape`` is classes
    and input features, which the saved network is made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoint = folder / "log.jsonl", folder / "checkpoint.pth"
    rows: list[dict[str, Any]] = []
    if args.resume and checkpoint.exists():
        run.load_state_dict(load_checkpoint(checkpoint))
        rows = [row for row in read_log(folder, ("type", "round")) if row["round"] <= run.done] if log.exists() else []
        if lost := run.done - sum(row["type"] == "round" for row in rows):
            say(f"{name}: {log} lacks {lost} of the {run.done} rounds done; the plots go without them")
    ranks.barrier()  # all have read what the first is about to change
    if rows and rows[-1]["type"] == "result" and (folder / "model.pth").exists():
        return rows
    rows = [row for row in rows if row["type"] != "result"]
    if not run.done and trained and run.phases[0].name == "train":
        run.adopt_training(trained["state"])
        rows = list(trained["rows"])
        say(f"{name}: the phase 'train' is that of {trained['name']}")
    if ranks.is_main:
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
    rounds = sum(phase.rounds for phase in run.phases)
    every = max(1, rounds // args.evaluations)
    last = min(rounds, args.max_rounds or rounds)
    figures: dict[str, Any] = {}

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        if ranks.is_main:
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    while run.done < last:
        row = {"type": "round"} | run.round()
        upcoming = None if run.is_done else run.phases[run.phase].name
        if run.done % every == 0 or upcoming != row["phase"]:
            figures = run.evaluate()
            row |= figures
            say(_line(name, rounds, row))
        write(row)
        if row["phase"] == "train" and upcoming != "train":
            trained |= {"name": name, "state": copy.deepcopy(run.state_dict()), "rows": list(rows)}
        if ranks.is_main and args.checkpoint_freq and (run.done % args.checkpoint_freq == 0 or run.done == last):
            save_checkpoint(checkpoint, run.state_dict())
    if run.is_done:
        write(_result(run, dense, rows, figures or run.evaluate()))
        sizes, times = rows[-1]["params"], rows[-1]["time_forward_ms"]
        parts = (f"{kind} {sizes[kind]:,} and {times[kind]:.2f} ms" for kind in sizes)
        say(f"{name}: parameters, and time of a forward pass of 64 samples: {', '.join(parts)}")
        for why, layer in _changed(run).items():
            say(f"{name}: slicing changes what {layer} computes: {why}")
        if ranks.is_main:
            gates = {} if run.gates is None else {"server_gates": run.gates[0], "device_gates": run.gates[1]}
            network = {"arch": args.arch, "norm": args.norm, "standardize": _standardizes(args)}
            network |= {"num_classes": shape[0], "features": shape[1], "clients": run.clients}
            network |= {"input_shape": list(run.input_shape)}
            save_checkpoint(folder / "model.pth", {"model": run.state_dict()["model"]} | network | gates)
    return rows


def _changed(run: Federation) -> dict[str, str]:
    """What slicing changes, and the first layer of each kind."""
    first: dict[str, str] = {}
    changed = layers_changed_by_slicing(run.model, run.points) if run.gates is not None else {}
    for layer, why in changed.items():
        first.setdefault(why, layer)
    return first


def _result(run: Federation, dense: nn.Module, rows: list[dict[str, Any]], figures: dict[str, Any]) -> dict[str, Any]:
    """Accuracy before and after pruning and at the end, costs, bytes, and measured sizes and times.

    The sizes and times are those of the dense network, the server's and the first device's, physically smaller ones;
    a size is the number of parameters that are not masked.
    """
    evaluated = [row for row in rows if "pooled_acc" in row]
    result = {"type": "result", "round": run.done} | figures
    pruned = next((i for i, row in enumerate(evaluated) if row["phase"] == "prune"), None)
    if pruned:
        before, after = evaluated[pruned - 1 : pruned + 1]
        result |= {"acc_before_pruning": before["pooled_acc"], "acc_after_pruning": after["pooled_acc"]}
    result |= {"bytes_down": run.sent, "bytes_up": run.received, "failures": run.failures}
    result |= {"hyper_rounds": run.hyper_rounds, "rounds": {phase.name: phase.rounds for phase in run.phases}}
    if run.settings.personal and run.gates is not None:
        result["sliced_acc"], result["sliced_device_acc"] = run.evaluate_devices()
    if run.settings.personalize_epochs:
        result["personalized_acc"], result["personalized_device_acc"] = run.evaluate_devices(personalize=True)
    networks = {"dense": dense, "server": run.model, "device": run.device_model(0)}
    result["params"] = {name: count_costs(net, run.input_shape).params_nonzero for name, net in networks.items()}
    result |= {"time_forward_ms": _forward_times(networks, run)}
    return result


@torch.no_grad()
def _forward_times(networks: dict[str, nn.Module], run: Federation) -> dict[str, float]:
    """Median milliseconds of a forward pass of 64 samples on the CPU, the networks in turns."""
    x = torch.zeros(64, *run.input_shape)
    times: dict[str, list[float]] = {name: [] for name in networks}
    for network in networks.values():
        network.eval()(x)
    for _ in range(9):
        for name, network in networks.items():
            start = time.perf_counter()
            network(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _line(name: str, rounds: int, row: dict[str, Any]) -> str:
    loss = f"  loss {row['train_loss']:.4f}" if "train_loss" in row else ""
    cost = ""
    if "server_ratio" in row:
        mean = statistics.fmean(row["device_ratio"])
        cost = f"  T: server {row['server_ratio']:.3f}, devices {mean:.3f}"
    elif "sparsity" in row:
        cost = f"  sparsity {row['sparsity']:.4f}"
    return (
        f"{name:9} round {row['round']:5}/{rounds} {row['phase']:13}{loss}  accuracy: devices "
        f"{100 * row['pooled_acc']:.2f} %, server {100 * row['server_acc']:.2f} %{cost}"
    )


def result_table(results: dict[str, dict[str, Any]]) -> str:
    """The end of every run, side by side."""
    return text_table(*_cells(results))


def _write_csv(results: dict[str, dict[str, Any]], path: Path) -> None:
    """The table for other programs: numbers without separators, nothing where there is none."""
    rows, header = _cells(results)
    text = io.StringIO()
    csv.writer(text).writerows(
        [header, *(["" if cell == "-" else cell.replace(",", "") for cell in row] for row in rows)]
    )
    write_text(path, text.getvalue())


def _cells(results: dict[str, dict[str, Any]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    header = (
        *("method", "before %", "pruned %", "tuned %", "worst device %", "server %", "sliced %", "worst sliced %"),
        "personalized %",
        *("sparsity", "T server", "T devices", "FLOPs server", "FLOPs devices", "down MB", "up MB"),
    )
    table = []
    for name, r in results.items():
        worst = min(a for a in r["device_acc"] if a is not None)
        cells = [f"{100 * r[key]:.2f}" if key in r else "-" for key in ("acc_before_pruning", "acc_after_pruning")]
        cells += [f"{100 * value:.2f}" for value in (r["pooled_acc"], worst, r["server_acc"])]
        worst_sliced = min((a for a in r.get("sliced_device_acc", ()) if a is not None), default=None)
        for value in (r.get("sliced_acc"), worst_sliced, r.get("personalized_acc")):
            cells.append("-" if value is None else f"{100 * value:.2f}")
        for key in ("sparsity", "server_ratio", "device_ratio", "server_flops", "device_flops"):
            value = r.get(key, "-")
            value = statistics.fmean(value) if isinstance(value, list) else value
            cells.append(value if value == "-" else f"{value:,.0f}" if key.endswith("flops") else f"{value:.4f}")
        cells += [f"{sum(r[key].values()) / 1e6:.1f}" for key in ("bytes_down", "bytes_up")]
        table.append((name, *cells))
    return table, header


def _draw(logs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    try:
        from .._plots import federated_channels, federated_curves
    except ImportError:  # the figures are in the logs; pictures need matplotlib
        return
    (folder / "curves.png").write_bytes(federated_curves(logs))
    results = {name: rows[-1] for name, rows in logs.items() if rows and "server_kept" in rows[-1]}
    if results:
        (folder / "channels.png").write_bytes(federated_channels(results))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    from ..data.partition import PARTITIONS
    from ..federated import settings as r
    from ..federated.models import NORMS

    def add(group: Any, field: str, help: str, **options: Any) -> None:
        """A flag of `Settings`; not given, the setting keeps its default."""
        default = getattr(Settings, field)
        if "choices" not in options and "action" not in options:
            options["type"] = int if default is None else type(default)
        help = help if default in (None, False) else f"{help} [{default}]"
        group.add_argument(f"--{field.replace('_', '-')}", default=None, help=help, **options)

    group = parser.add_argument_group("federation")
    add(group, "method", "what to run", choices=tuple(METHODS))
    parser.set_defaults(method=Settings.method)
    group.add_argument("--baselines", nargs="*", default=[], metavar="METHOD", help="to compare it with")
    group.add_argument("--clients", type=int, default=10, help="devices [%(default)s]")
    choices = [how for how in PARTITIONS if how != "source"]
    group.add_argument("--partition", choices=choices, default="dirichlet", help="of the samples [%(default)s]")
    group.add_argument("--alpha", type=float, default=0.5, help="of dirichlet [%(default)s]")
    group.add_argument("--shards", type=int, default=2, help="of shards: pieces a client gets [%(default)s]")
    add(group, "sample", "clients of a round [all]")
    add(group, "min_clients", "repeat a round with fewer [half of those asked]")
    add(group, "retries", "of a round with too few clients")
    add(group, "average", "of the clients' momentum", choices=r.AVERAGES)
    add(group, "weighting", "of clients in averages", choices=("uniform", "samples"))
    group = parser.add_argument_group("network and data")
    group.add_argument("--arch", default="resnet20", help="a network of residual blocks [%(default)s]")
    group.add_argument("--norm", choices=NORMS, default="group", help="normalization [%(default)s]")
    help = "standardized weights in convolutions, with group normalization; they rule out pruning of single weights "
    help += "[for ResNets, if no such method runs]"
    group.add_argument("--standardize", action=argparse.BooleanOptionalAction, default=None, help=help)
    group.add_argument("--data", default="digits", help="digits (embedded), mnist, cifar10, cifar100, fake")
    group.add_argument("--data-path", default=".data", help="where its files lie [%(default)s]")
    group.add_argument("--limit", type=int, help="use only so many training samples")
    group = parser.add_argument_group("budgets")
    add(group, "server_flops", "kept part of T on the server")
    help = "on the devices: one number, one each with commas, or uniform:LOW:HIGH [%(default)s]"
    group.add_argument("--device-flops", default="0.5", help=help)
    add(group, "device_networks", "what devices train after pruning", choices=("masked", "sliced"))
    add(group, "fill", "use up a budget that the hypernetwork stays below", action="store_true")
    group = parser.add_argument_group("weights")
    add(group, "epochs", "before pruning")
    add(group, "finetune_epochs", "after pruning")
    help = "of each device by itself, in the end; accuracy after them is reported beside that before"
    add(group, "personalize_epochs", help)
    add(group, "batch_size", "of a client")
    add(group, "lr", "of the clients' SGD")
    add(group, "finetune_lr", "after pruning")
    add(group, "momentum", "of the clients' SGD")
    add(group, "weight_decay", "of the clients' SGD")
    add(group, "local_steps", "in a round (r_W)")
    group = parser.add_argument_group("hypernetwork")
    add(group, "hyper_interval", "steps on the weights for one on the hypernetwork (r_HN)")
    add(group, "hyper_steps", "in a round (r_theta)")
    add(group, "hyper_start", "part of the epochs before it is trained")
    add(group, "hyper_part", "part of a client's samples that train it")
    add(group, "hyper_lr", "of the clients' AdamW")
    add(group, "hyper_weight_decay", "of the clients' AdamW")
    add(group, "search_epochs", "of the hypernetwork alone (fedosp)")
    add(group, "separate", "one for the server and one for the devices", action="store_true")
    add(group, "embedding", "rows of devices in an average", choices=("mean", "own"))
    add(group, "strength", "of the penalties on budgets")
    add(group, "two_sided", "penalize costs below a budget too", action="store_true")
    help = "the devices' penalty does not push the server's gates"
    add(group, "detach_server", help, action=argparse.BooleanOptionalAction)
    add(group, "noise", "of the gates", choices=r.NOISES)
    add(group, "temperature", "of the gates")
    add(group, "soft", "soft gates in the hypernetwork's loss", action="store_true")
    group = parser.add_argument_group("unstructured masks (bip, bidst, magnitude)")
    add(group, "sparsity", "of the weights of convolutions and linear layers")
    add(group, "distribution", "over the layers, of bidst", choices=("erk", "uniform"))
    add(group, "search_space", "of bidst, as a part of a layer's weights")
    add(group, "mask_start", "part of the epochs before bip closes weights")
    add(group, "mask_interval", "rounds for a step of bip on the mask, and between changes of bidst")
    add(group, "mask_batches", "of each client, for a step of bip on the mask")
    group = parser.add_argument_group("run")
    add(group, "seed", "of everything")
    parser.set_defaults(seed=0, batch_size=Settings.batch_size)
    group.add_argument("--device", default="auto", help="where clients compute: cpu, cuda or auto [%(default)s]")
    group.add_argument("--output-dir", default="runs/federated", help="[%(default)s]")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoints")
    group.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    group.add_argument("--checkpoint-freq", type=int, default=20, help="rounds between checkpoints; 0: none")
    group.add_argument("--max-rounds", type=int, help="stop each method after so many rounds, as if interrupted")
    group.add_argument("--evaluations", type=int, default=10, help="during a run [%(default)s]")
    group.add_argument("--quiet", action="store_true")
