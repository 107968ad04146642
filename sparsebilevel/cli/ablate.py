"""``sparsebilevel ablate``: vary one setting at a time around a configuration, and tabulate what it does."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import describe_changes
from ..training.config import Config, field_types
from ..training.loop import train
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
        return {"implicit_scale": [0.0, 1.0, *reciprocal]}
    raise ValueError(f"method={config.method!r} has no usual ablation; name what to vary with --grid FIELD=V1,V2")


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``["search_space=0,0.05"]`` to ``{"search_space": [0.0, 0.05]}``."""
    types, grid = field_types(), {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in types or not values:
            raise ValueError(
                f"grid={text!r} is not allowed; expected FIELD=V1,V2,... with a field of the configuration"
            )
        kind = types[name][0]
        try:
            grid[name] = [_parse_bool(v) if kind is bool else kind(v) for v in values.split(",")]
        except ValueError:
            raise ValueError(f"grid={text!r} is not allowed; {name} takes values of type {kind.__name__}") from None
    return grid


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def ablate(
    config: Config, grid: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> dict[Setting, list[dict[str, Any]]]:
    """Run ``config`` as it is and with each value of each field of the grid; print and return the results.

    Args:
        config: its ``output_dir`` holds a folder for each run; with ``resume`` finished runs are read, not repeated.
        grid: as on the command line; None is the method's usual ablation.
        seeds: every setting runs with each of them; None is the configuration's one seed.
    """
    chosen = parse_grid(grid) if grid else usual_grid(config)
    settings: list[Setting] = [None, *((name, value) for name, values in chosen.items() for value in values)]
    variants = {s: config if s is None else _vary(config, *s) for s in settings}
    for variant in variants.values():
        variant.validate()
    results: dict[Setting, list[dict[str, Any]]] = {}
    for setting, variant in variants.items():
        for seed in seeds or [config.seed]:
            folder = Path(config.output_dir) / f"{_label(setting)}-seed{seed}"
            if not config.quiet:
                print(f"{_label(setting)}, seed {seed}", flush=True)
            run = dataclasses.replace(variant, seed=seed, output_dir=str(folder))
            results.setdefault(setting, []).append(train(run))
    print(ablation_table(results))
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
        accuracies = [100 * run["test_acc"] for run in runs]
        spread = f" +- {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        seconds = statistics.mean(run["time_total_s"] for run in runs)
        sparsity = statistics.mean(run["sparsity"] for run in runs)
        accuracy = f"{statistics.mean(accuracies):.2f}{spread}"
        rows.append((_label(setting), accuracy, f"{sparsity:.4f}", describe_changes(runs), f"{seconds:.1f}"))
    return text_table(rows, ("setting", "test accuracy %", "sparsity", "topology changes", "seconds"))


def _label(setting: Setting) -> str:
    return (
        "default"
        if setting is None
        else f"{setting[0]}={setting[1]:g}"
        if isinstance(setting[1], float)
        else "=".join(map(str, setting))
    )
