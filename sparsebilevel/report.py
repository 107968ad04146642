"""Reports from run folders: a page with pictures, and a table for the terminal.

What is shown follows Blalock et al. 2020 (arXiv 2003.03033): compression ratio *and* theoretical speed-up with their
conventions, realised beside nominal sparsity, accuracy and its change against the dense network, mean and standard
deviation over seeds. The accuracy of the last epoch is the main figure, that of the epoch chosen on validation data
stands beside it, and the test set never chooses.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .training.checkpoint import naming, write_text
from .training.config import METHOD_OPTIONS, RUN_FIELDS, Config

__all__ = ["Group", "Run", "describe_changes", "group_runs", "make_report", "print_table", "read_run", "read_runs"]

CONVENTIONS = (
    "Sparsity is the fraction of zeros in the sparse layers: as asked for, and as counted in the trained masks. "
    "Compression is all parameters / non-zero parameters, biases and normalization included. "
    "Theoretical speed-up is of forward FLOPs in convolutions and linear layers, dense / (dense times density of each "
    "layer), two FLOPs a multiply-add; nothing says that it is reached. "
    "Topology changes are counted; a mask that may change at every step is continuous, and its overlap with the first "
    "one (intersection over union) is given. "
    "Step is measured: time of a training step of the dense network / of the sparse one (above 1: faster than dense). "
    'Accuracy is top-1 on the test set after the last epoch; "selected" is the test accuracy at the epoch that '
    "validation chose, where there was validation data. "
    "Figures after ± are standard deviations over the runs of a row (n - 1), one a seed where nothing else is said."
)
# Repetitions of one experiment may differ in these; those that ended early are no repetitions.
_REPETITION_FIELDS = {*RUN_FIELDS, "seed", "init_from", "eval_freq", "checkpoint_freq", "versions", "resolved"}
_REPETITION_FIELDS -= {"max_steps"}
# Of these a comparison of methods is made; all other fields should be equal in its rows.
_METHOD_FIELDS = set().union(*METHOD_OPTIONS.values())
_OWN_FIELDS = {*_REPETITION_FIELDS, "method", "sparsity", *_METHOD_FIELDS}
# As config.json has them; also for what runs of an older version lack.
_DEFAULTS = json.loads(json.dumps(dataclasses.asdict(Config())))
_SPARSE_FIELDS = ("layer_sparsity", "distribution", "pattern", "layer_pattern", "dense_first", "exclude", "rescale")


@dataclasses.dataclass
class Run:
    """What a run folder holds. ``result`` is None while a run is incomplete."""

    path: Path
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    topology: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def is_dense(self) -> bool:
        return self.config["method"] == "dense"

    @property
    def resolved(self) -> dict[str, Any]:
        """What the configuration does not say; nothing in runs of older versions."""
        return self.config.get("resolved") or {}

    @property
    def processes(self) -> int:
        return self.resolved.get("processes", 1)

    @property
    def origin(self) -> dict[str, Any] | None:
        """How the network of ``init_from`` was trained, but for its seed; None without one."""
        if not self.config.get("init_from"):
            return None
        config = self.resolved.get("init_from_config")
        return _recipe(_DEFAULTS | config) if config else {}

    def repeats(self, other: Run) -> bool:
        """Whether it is the other once more: of the same seed and start, with the same figures."""

        def figures(run: Run) -> list[Any]:
            rows = [run.result or {}, *run.epochs]
            told = [{k: v for k, v in row.items() if not k.startswith(("time_", "bytes_"))} for row in rows]
            return [run.config.get("seed"), run.config.get("init_from"), *told]

        return self.result is not None and figures(self) == figures(other)


@dataclasses.dataclass
class Group:
    """Runs whose configurations differ in the seed alone; ``label`` tells them from the others in a report.

    ``repeats`` are runs that are others once more: they are listed and do not count.
    """

    runs: list[Run]
    label: str = ""
    repeats: list[Run] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def subject(self) -> tuple[str, str, str]:
        """What was trained: (data set, architecture, digest of the data). Only groups of one subject are compared."""
        return self.config["data"], self.config["arch"], self.runs[0].resolved.get("data_digest", "")

    @property
    def is_dense(self) -> bool:
        return self.runs[0].is_dense

    def values(self, *path: str) -> list[float]:
        """A figure of every complete run, such as ``values("costs", "compression")``; without those that lack it."""
        found = []
        for run in self.runs:
            value: Any = run.result
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                found.append(float(value))
        return found


# -- reading -----------------------------------------------------------------------------------------------------------


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the folder of a run, complete or not. A damaged line at the end of the log is left out, with a warning.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
        ValueError: a damaged config or a log that is damaged before its end.
    """
    path = Path(path)
    for name in ("config.json", "log.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not the folder of a run: it has no {name}")
    try:
        config = json.loads((path / "config.json").read_text())
        names = {name: config[name] for name in ("method", "arch", "data")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {type(error).__name__}: {error}") from error
    rows: dict[str, list[dict[str, Any]]] = {"epoch": [], "topology": [], "layers": [], "result": []}
    lines = (path / "log.jsonl").read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.setdefault(row["type"], []).append(row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"line {number} of {path / 'log.jsonl'} is damaged: {line[:80]!r}") from None
            warnings.warn(f"the last line of {path / 'log.jsonl'} is damaged and left out", stacklevel=2)
    layers = rows["layers"][-1]["layers"] if rows["layers"] else []
    result = rows["result"][-1] if rows["result"] else None
    if result is not None and rows["epoch"]:  # older runs have it there alone
        result.setdefault("mask_iou_start", rows["epoch"][-1].get("mask_iou_start"))
    return Run(path, _DEFAULTS | config | names, rows["epoch"], rows["topology"], layers, result)


def read_runs(run_dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read several run folders; a folder that is none stands for all runs directly in it.

    What is beside runs is passed over with a warning: an empty folder, as a run that did not start leaves, and runs of
    ``sparsebilevel federated`` and ``decentralized``, which have tables of their own.

    Raises:
        FileNotFoundError: a folder does not exist, or none holds a run.
        ValueError: no folder given, all of other commands, or damaged files.
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, (str, os.PathLike)) else [Path(p) for p in run_dirs]
    if not folders:
        raise ValueError("run_dirs is empty; give at least one folder of a run")
    found: dict[Path, Run] = {}
    passed_over: list[ValueError | FileNotFoundError] = []
    for folder in folders:
        inner = [] if _is_run(folder) else sorted(path.parent for path in folder.glob("*/config.json"))
        for path in inner or [folder]:
            error = _why_no_run(path)
            if error is None:
                found.setdefault(path.resolve(), read_run(path))
            elif folder.is_dir():
                passed_over.append(error)
            else:
                raise error
    if not found:
        if len(passed_over) == 1:
            raise passed_over[0]
        reasons = "; ".join(dict.fromkeys(map(str, passed_over)))
        raise type(passed_over[0])(f"none of {', '.join(map(str, folders))} holds a run: {reasons}")
    for error in passed_over:
        warnings.warn(f"{error}; it is left out", stacklevel=2)
    return list(found.values())


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "log.jsonl").is_file()


def _why_no_run(path: Path) -> ValueError | FileNotFoundError | None:
    """What is wrong with a folder as that of a run of ``train``; None if nothing."""
    if (command := _other_command(path)) is not None:
        shows = {"federated": "its own table (results.csv) and pictures", "decentralized": "a picture of its own"}
        return ValueError(
            f"{path} is of a {command} run, which has {shows[command]}; expected runs of `sparsebilevel train`"
        )
    if not _is_run(path):
        return FileNotFoundError(f"{path} holds no run; expected config.json and log.jsonl in it, or in its folders")
    return None


def _other_command(path: Path) -> str | None:
    """Which other command than ``train`` wrote a folder, as far as it is known."""
    for place in (path, path.parent):  # the others have one for each method or algorithm in that of the run
        if (place / "facts.json").exists():
            return "federated"
        try:
            config = json.loads((place / "config.json").read_text())
        except (OSError, ValueError):  # there is none, or `read_run` says what is wrong with it
            continue
        if isinstance(config, dict) and "algorithm" in config:
            return "decentralized"
    return None


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Put runs that differ in the seed alone together: dense first, then in order of method and sparsity."""
    groups: dict[str, Group] = {}
    for run in runs:
        # Seeds may start from dense networks of their own, of one recipe.
        facts = [_recipe(run.config), run.origin, run.processes, run.resolved.get("data_digest")]
        group = groups.setdefault(json.dumps(facts, sort_keys=True, default=str), Group([]))
        (group.repeats if any(map(run.repeats, group.runs)) else group.runs).append(run)
    ordered = sorted(
        groups.values(),
        key=lambda g: (g.subject, not g.is_dense, g.config["method"], g.config.get("sparsity", 0)),
    )
    for group in ordered:
        rivals = [g for g in ordered if g.subject == group.subject and g.config["method"] == group.config["method"]]
        values = {name: group.config.get(name) for name in _distinguishing(rivals)}
        shown = {name: value for name, value in values.items() if value != _DEFAULTS.get(name)}
        told = [f"{name}={_short(value)}" for name, value in shown.items()]
        if group.config.get("init_from") and not all(g.config.get("init_from") for g in rivals):
            told.append("init_from")
        origin, origins = group.runs[0].origin or {}, [g.runs[0].origin for g in rivals if g.runs[0].origin]
        odd = [name for name, value in origin.items() if any(other.get(name) != value for other in origins)]
        told += [f"init_from {name}={_short(origin[name])}" for name in odd]
        if len({g.runs[0].processes for g in rivals}) > 1:
            told.append(f"{group.runs[0].processes} process{'es' * (group.runs[0].processes > 1)}")
        details = ", ".join(told)
        group.label = group.config["method"] + (f" ({details})" if details else "")
    return ordered


def _distinguishing(groups: list[Group]) -> list[str]:
    """As few fields as tell these groups apart, beside the sparsity; what only follows from others is left out."""

    def classes(names: list[str]) -> int:
        return len({tuple(str(g.config.get(name)) for name in names) for g in groups})

    known = dict.fromkeys(name for g in groups for name in g.config)
    names = [name for name in known if name not in {*_REPETITION_FIELDS, "sparsity"} and classes([name]) > 1]
    # A method's own options say most, and are the last to be left out.
    for name in sorted(names, key=_METHOD_FIELDS.__contains__):
        rest = [other for other in names if other != name]
        names = rest if classes(rest) == classes(names) else names
    return names


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    """What repetitions of an experiment have in common, as config.json has it."""
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in _REPETITION_FIELDS}, default=str))


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# -- the table ---------------------------------------------------------------------------------------------------------

_COLUMNS = (
    *("method", "seeds", "sparsity asked", "realised", "compression", "theoretical speed-up"),
    *("size MB", "accuracy %", "change"),
    *("selected %", "topology changes", "step", "time"),
)


def _figure(values: Sequence[float], scale: float = 1.0) -> str:
    """Mean and, of several values, standard deviation."""
    if not values:
        return "-"
    text = f"{scale * statistics.fmean(values):.2f}"
    return f"{text} ± {scale * deviation(values):.2f}" if len(values) > 1 else text


def deviation(values: Sequence[float]) -> float:
    """Standard deviation (n - 1) of several values; NaN, which `statistics.stdev` cannot take, if one is NaN."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.fmean(values)) if values else "-"


def describe_changes(results: Sequence[dict[str, Any]]) -> str:
    """Mean number of topology changes in some result rows; where masks change at every step, their overlap instead."""
    overlaps = [row["mask_iou_start"] for row in results if row.get("mask_iou_start") is not None]
    if overlaps:
        return f"continuous, IoU {statistics.fmean(overlaps):.2f}"
    return _mean([row["topology_changes"] for row in results if "topology_changes" in row], "{:g}")


def _duration(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    mean = statistics.fmean(seconds)
    if mean < 120:
        return f"{mean:.1f} s"
    return f"{mean / 60:.1f} min" if mean < 7200 else f"{mean / 3600:.1f} h"


def _row(group: Group, dense: Group | None) -> list[str]:
    accuracy = group.values("test_acc")
    baseline = dense.values("test_acc") if dense is not None else []
    change = "-"
    if accuracy and baseline and not group.is_dense:
        change = f"{100 * (statistics.fmean(accuracy) - statistics.fmean(baseline)):+.2f}"
    by_layer = group.config.get("layer_sparsity")
    complete = sum(run.result is not None for run in group.runs)
    seeds = len({run.config.get("seed") for run in group.runs})
    count = str(complete) if complete == len(group.runs) else f"{complete} of {len(group.runs)}"
    return [
        group.label,
        count if seeds == len(group.runs) else f"{count} runs, {seeds} seed{'s' * (seeds > 1)}",
        "-" if group.is_dense else f"{group.config.get('sparsity', 0):g}{', by layer' * bool(by_layer)}",
        "-" if group.is_dense else _mean(group.values("costs", "sparsity") or group.values("sparsity"), "{:.4f}"),
        _mean(group.values("costs", "compression"), "{:.2f}x"),
        _mean(group.values("costs", "speedup"), "{:.2f}x"),
        _mean([size / 1e6 for size in group.values("costs", "size_bytes")], "{:.3f}"),
        _figure(accuracy, scale=100),
        change,
        _figure(group.values("test_acc_selected"), scale=100),
        describe_changes([run.result for run in group.runs if run.result is not None]),
        _mean(group.values("time_step_ratio"), "{:.2f}x"),
        _duration(group.values("time_total_s")),
    ]


# What must agree for a dense run to be the baseline of another, where there are several.
_RECIPE = (
    *("epochs", "batch_size", "accumulate", "opt", "lr", "lr_scheduler", "weight_decay", "label_smoothing", "augment"),
    *("model_ema", "validation", "amp"),
)


def _baseline(group: Group, members: list[Group]) -> Group | None:
    """The dense runs that ``group`` is compared with: those it started from, the only ones, or those of its recipe."""
    dense = [g for g in members if g.is_dense and g.values("test_acc")]
    if origin := [g for g in dense if _recipe(g.config) == group.runs[0].origin]:
        return origin[0]
    if len(dense) > 1:
        dense = [g for g in dense if all(g.config.get(name) == group.config.get(name) for name in _RECIPE)]
    return dense[0] if len(dense) == 1 else None


def _sections(groups: list[Group]) -> list[tuple[str, list[Group], list[list[str]]]]:
    """One (title, groups, rows) a subject."""
    out = []
    for subject in dict.fromkeys(group.subject for group in groups):
        members = [group for group in groups if group.subject == subject]
        rows = [_row(group, _baseline(group, members)) for group in members]
        out.append((_title(members[0], groups), members, rows))
    return out


def _title(group: Group, groups: list[Group]) -> str:
    """Architecture and data, and where these lie if others have the same name."""
    data, arch, _ = group.subject
    others = {g.subject for g in groups if g.subject[:2] == (data, arch)}
    return f"{arch} on {data}" + (f" in {group.config.get('data_path')}" if len(others) > 1 else "")


def _notes(groups: list[Group]) -> list[str]:
    """What a reader of the tables must know beside the figures."""
    notes = []
    for subject in dict.fromkeys(group.subject for group in groups):
        members = [group for group in groups if group.subject == subject]
        title = _title(members[0], groups)
        if not any(g.is_dense and g.values("test_acc") for g in members):
            notes.append(f"{title}: no complete dense run is among these, so no change is given.")
        names = dict.fromkeys(name for group in members for name in group.config if name not in _OWN_FIELDS)
        odd = [name for name in names if _differs(name, members)]
        odd += ["the number of processes"] * (len({run.processes for group in members for run in group.runs}) > 1)
        if odd:
            notes.append(f"{title}: beside method and sparsity, rows differ in {', '.join(odd)}.")
    for run in (run for group in groups for run in group.repeats):
        notes.append(f"{run.path} repeats another run, with the same figures, and does not count.")
    for run in (run for group in groups for run in group.runs if run.result is None):
        done = f"after epoch {run.epochs[-1]['epoch']}" if run.epochs else "before its first epoch ended"
        notes.append(f"{run.path} is incomplete ({done}) and not part of the figures.")
    return notes


def _differs(name: str, groups: list[Group]) -> bool:
    compared = [g for g in groups if not (g.is_dense and name in _SPARSE_FIELDS)]
    return len({str(g.config.get(name)) for g in compared}) > 1


def print_table(run_dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> str:
    """The table of :func:`make_report` as text for a terminal; columns that nobody fills are left out."""
    groups = group_runs(read_runs(run_dirs))
    lines = []
    for title, _, rows in _sections(groups):
        filled = [i for i in range(len(_COLUMNS)) if any(row[i] != "-" for row in rows)]
        cells = [[row[i] for i in filled] for row in [list(_COLUMNS), *rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append(title)
        for row in cells:
            pairs = enumerate(zip(row, widths, strict=True))
            lines.append("  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in pairs).rstrip())
        lines.append("")
    return "\n".join([*lines, *_notes(groups)]).rstrip()


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal }
th:first-child, td:first-child { text-align: left } td:nth-child(8) { font-weight: 600 }
figure { margin: 1.5em 0 } img { max-width: 100%; height: auto } figcaption, .small { color: #555; font-size: 13px }
"""


def make_report(
    run_dirs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> Path:
    """Write a page with tables and pictures. It is one file; the pictures lie beside it as PNG files too.

    Args:
        run_dirs: folders of runs, or folders that hold such folders. Runs that differ in the seed alone are averaged;
            incomplete ones are drawn and listed, and do not count.
        output: an .html file, or a folder in which ``report.html`` is written. Folders are made.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError, ValueError: a folder without a run, or damaged files in it.
        ImportError: matplotlib is missing; ``pip install 'sparsebilevel[report]'``.
    """
    from ._plots import draw

    groups = group_runs(read_runs(run_dirs))
    output = Path(output)
    page = output if output.suffix in (".html", ".htm") else output / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    sections = _sections(groups)
    parts = []
    for number, (title, members, rows) in enumerate(sections):
        stem = page.stem if len(sections) == 1 else f"{page.stem}_{number + 1}"
        figures = []
        for name, caption, picture in draw(members):
            with naming(path := page.parent / f"{stem}_{name}.png"):
                path.write_bytes(picture)
            figures.append(_figure_html(name, caption, picture))
        parts.append(f"<h2>{html.escape(title)}</h2>\n{_table_html(rows)}\n" + "\n".join(figures))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(groups))
    listed = [run for group in groups for run in (*group.runs, *group.repeats)]
    runs = "".join(f"<li>{html.escape(_describe(run))}</li>" for run in listed)
    write_text(
        page,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Sparse training report</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>Sparse training report</h1>\n" + "\n".join(parts) + f"\n<h2>How to read the figures</h2>\n"
        f"<p>{html.escape(CONVENTIONS)}</p>\n<ul>{notes}</ul>\n"
        f'<h2>Runs</h2>\n<ul class="small">{runs}</ul>\n</body></html>\n',
    )
    return page


def _figure_html(name: str, caption: str, picture: bytes) -> str:
    data = base64.b64encode(picture).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _table_html(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _describe(run: Run) -> str:
    """Folder, seed, versions and last figures of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in run.config.get("versions", {}).items())
    accuracy = (run.result or {}).get("test_acc")
    figures = "incomplete" if accuracy is None or math.isnan(accuracy) else f"{100 * accuracy:.2f} %"
    return f"{run.path}: {run.config['method']}, seed {run.config.get('seed', '?')}, {figures}" + (
        f" ({versions})" if versions else ""
    )
