"""Methods from scratch on the embedded digits, with an MLP of three layers: small, but far from saturated at 98 %.

First what ``sparsify(rescale=True)`` brings where nothing normalizes; then, rescaled and at 98 %, what learning the
topology brings, and what BiDST's settings do, one at a time.

    python benchmarks/compare_digits.py     # ten minutes; writes results/digits_mlp.json
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

from timing import markdown_table, write_result

from sparsebilevel.training.config import Config
from sparsebilevel.training.loop import train

SCRATCH = ("static", "set", "rigl", "bidst")
ABLATIONS: dict[str, dict[str, Any]] = {
    "no search space": {"search_space": 0.0},
    "search space of 5 %": {"search_space": 0.05},
    "search space of 20 %": {"search_space": 0.2},
    "no implicit term": {"implicit": "none"},
    "implicit term on active weights too": {"implicit_on": "all"},
    "implicit term with curvature": {"implicit": "curvature"},
    "the same batch's gradient as factor": {"lower_gradient": "batch"},
    "Gumbel noise": {"gumbel": True},
}


def settings() -> dict[str, dict[str, Any]]:
    """What to train, by name."""
    runs: dict[str, dict[str, Any]] = {"dense": {"method": "dense"}}
    for sparsity in (0.9, 0.95, 0.98):
        for rescale in (False, True):
            for method in SCRATCH:
                name = f"{method}, {sparsity:.0%}, {'rescaled' if rescale else 'as initialized'}"
                runs[name] = {"method": method, "sparsity": sparsity, "rescale": rescale}
    for name, changes in ABLATIONS.items():
        runs[f"bidst, 98%, rescaled, {name}"] = {"method": "bidst", "sparsity": 0.98, "rescale": True} | changes
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # that the network has no normalization is the point

    rows: dict[str, dict[str, Any]] = {}
    for name, fields in settings().items():
        accuracies = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                common = {"arch": "mlp", "distribution": "erk", "epochs": args.epochs, "measure": False, "quiet": True}
                result = train(Config(**common | fields, seed=seed, output_dir=str(Path(folder) / "run")))
            accuracies.append(100 * result["test_acc"])
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        rows[name] = {"accuracy": statistics.mean(accuracies), "deviation": deviation, "accuracies": accuracies}
        rows[name]["topology_changes"] = result["topology_changes"]
    cells = [[name, f"{row['accuracy']:.1f} ± {row['deviation'] or 0:.1f}"] for name, row in rows.items()]
    print(markdown_table(["run", "accuracy, %"], cells))
    print(write_result("digits_mlp", {"settings": vars(args) | {"arch": "mlp", "data": "digits"}, "figures": rows}))


if __name__ == "__main__":
    main()
