"""``sparsebilevel demo``: a small network on the embedded digits, dense and with 90 % of its weights gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..training.config import Config
from ..training.loop import train
from ..training.presets import PRESETS
from .tables import result_table


def demo(output: Path, sparsity: float = 0.9, epochs: int | None = None, resume: bool = False) -> dict[str, Any]:
    """Train `digits_cnn` dense and by BiDST from the same seed, print the comparison, and write a report.

    Args:
        output: folder; the two runs go to ``dense`` and ``bidst`` below it and replace those of an earlier demo.
        sparsity: of the sparse run.
        epochs: of both runs; default the preset's.
        resume: continue an earlier demo of the same settings instead.

    Returns:
        The result row of the sparse run.
    """
    recipe: dict[str, Any] = PRESETS["bidst-digits"] | {"sparsity": sparsity, "resume": resume, "overwrite": not resume}
    if epochs is not None:
        recipe["epochs"] = epochs
    common = {name: value for name, value in recipe.items() if name not in ("method", "update_freq")}
    runs = [output / "dense", output / "bidst"]
    print("1/2  the network dense", flush=True)
    dense = train(Config(method="dense", output_dir=str(runs[0]), **common))
    print(f"2/2  the same network by BiDST, {100 * sparsity:g} % sparse", flush=True)
    sparse = train(Config(output_dir=str(runs[1]), **recipe))

    print(f"\n{result_table(sparse, dense)}\n")
    print(f"runs:   {runs[0]}, {runs[1]}")
    try:
        from ..report import make_report

        print(f"report: {make_report(runs, output / 'report.html')}")
    except ImportError as error:
        print(f"report: not written; {error}")
    return sparse
