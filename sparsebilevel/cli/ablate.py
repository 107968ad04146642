"""``sparsebilevel ablate``: vary one setting at a time around a configuration, and tabulate what it does."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import describe_changes
from ..training.config import Config, field_types
from ..training.loop import TrainingError, train
from . import converter
from .tables import text_table

Setting = tuple[str, Any] | None


def usual_grid(config: Config) -> dict[str, list[Any]]:
    """What the papers vary: BiDST's search space and lambda (here 1/lambda), BiP's scale of the implicit term.

    BiP's theory wants 1/gamma with gamma the ridge of the lower level, hence ``1 / weight_decay``; 0 leaves it out.
    """
    if config.method == "bidst":
        scales = [0.0, *(10.0**k for k in range(8))]
        return {"search_space": [0.0, 0.01, 0.02, 0.03, 0.05, 0.1], "implicit_scale": scales}
    if config.method == "bip":
        reciprocal = [1 / config.weight_decay] if config.weight_decay else []
        return {"implicit_scale": list(dict.fromkeys([0.0, 1.0, *reciprocal]))}
    raise ValueError(f"method={config.method!r} has no usual ablation; name what to vary with --grid FIELD=V1,V2")


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["search_space=0,0.05", "exclude=fc,fc conv1"]`` to ``{"search_space": [0.0, 0.05], "exclude": ...}``.

    Each value is read as its flag reads it, and names of a list are parted by blanks: ``[("fc",), ("fc", "conv1")]``.
    """
    types = field_types()
    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in types or not values:
            raise ValueError(
                f"grid={text!r} is not allowed; expected FIELD=V1,V2,... with a field of the configuration"
            )
        if name in ("seed", "output_dir"):
            raise ValueError(f"grid={text!r} is not allowed; every run has its own {name}, and seeds are for --seeds")
        kind, optional = types[name]
        convert = converter(name, kind, optional)
        try:
            grid.setdefault(name, []).extend(convert(value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"grid={text!r} is not allowed; {name} takes values of type {kind.__name__}") from None
    return grid


def ablate(
    config: Config, grid: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> dict[Setting, list[dict[str, Any]]]:
    """Run ``config`` as it is and with each value of each field of the grid; print and return the results.

    Args:
        config: its ``output_dir`` holds a folder for each run; with ``resume`` finished runs are read, not repeated.
        grid: as on the command line; None is the method's usual ablation.
        seeds: every setting runs with each of them; None is the configuration's one seed.

    A value that is the configuration's own is not trained again.

    Raises:
        ValueError: a value that is not allowed, or one that is given twice; nothing was trained.
        TrainingError: runs diverged. All others are finished, and the table has been printed.
    """
    chosen = parse_grid(grid) if grid else usual_grid(config)
    settings: list[Setting] = [None, *((name, value) for name, values in chosen.items() for value in values)]
    runs: dict[str, tuple[Setting, Config]] = {}
    for setting in settings:
        variant = config if setting is None else _vary(config, *setting)
        for seed in seeds or [config.seed]:
            name = f"{_label(setting)}-seed{seed}".replace("/", "_")  # paths too are values
            if name in runs:
                raise ValueError(f"{_label(setting)} with seed {seed} is asked for twice; expected different values")
            run = dataclasses.replace(variant, seed=seed, output_dir=str(Path(config.output_dir) / name))
            run.validate()
            runs[name] = setting, run
    results: dict[Setting, list[dict[str, Any]]] = {}
    trained: list[tuple[Config, dict[str, Any] | None]] = []
    lost: list[str] = []
    for setting, run in runs.values():
        same = [found for other, found in trained if other == dataclasses.replace(run, output_dir=other.output_dir)]
        label = f"{_label(setting)}, seed {run.seed}"
        if not config.quiet:
            print(f"{label}{': the same as a run before' * bool(same)}", flush=True)
        try:
            result = same[0] if same else train(run)
        except TrainingError as error:  # grids are made to find where that is
            print(f"{label}: {error}", flush=True)
            lost.append(label)
            result = None
        trained.append((run, result))
        results.setdefault(setting, [])
        if result is not None:
            results[setting].append(result)
    print(ablation_table(results))
    if lost:
        raise TrainingError(f"{len(lost)} of {len(runs)} runs did not come to an end: {'; '.join(lost)}")
    return results


def _vary(config: Config, name: str, value: Any) -> Config:
    """``config`` with one field changed; another method goes without the options that it does not have."""
    if name != "method":
        return dataclasses.replace(config, **{name: value})
    foreign = config.options_unknown_to(value)
    if foreign and not config.quiet:
        print(f"method={value} has no {', '.join(foreign)}: left out")
    return dataclasses.replace(config, method=value, **foreign)


def ablation_table(results: dict[Setting, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over seeds of the last epoch's accuracy, setting by setting."""
    rows = []
    for setting, runs in results.items():
        if not runs:
            rows.append((_label(setting), "diverged", "-", "-", "-"))
            continue
        accuracies = [100 * run["test_acc"] for run in runs]
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        seconds = statistics.mean(run["time_total_s"] for run in runs)
        sparsity = statistics.mean(run["sparsity"] for run in runs)
        accuracy = f"{statistics.mean(accuracies):.2f}{spread}"
        rows.append((_label(setting), accuracy, f"{sparsity:.4f}", describe_changes(runs), f"{seconds:.1f}"))
    return text_table(rows, ("setting", "test accuracy %", "sparsity", "topology changes", "seconds"))


def _label(setting: Setting) -> str:
    """What tables and folders call a setting: as short as it can be told from all others."""
    if setting is None:
        return "default"
    name, value = setting
    if isinstance(value, float) and float(f"{value:g}") == value:
        value = f"{value:g}"
    return f"{name}={' '.join(value) if isinstance(value, tuple) else value}"
