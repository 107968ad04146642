"""What ``sparsify(rescale=True)`` brings where nothing normalizes: an MLP of three layers, on the embedded digits.

python benchmarks/compare_rescaling.py     # two minutes; writes results/digits_rescaling.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from timing import markdown_table, write_result

from sparsebilevel.training.config import Config
from sparsebilevel.training.loop import train

METHODS = ("dense", "static", "rigl", "bidst")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for sparsity in (0.9, 0.95, 0.98) if method != "dense" else (0.0,):
            for rescale in (False, True) if method != "dense" else (False,):
                fields = {"method": method, "arch": "mlp", "epochs": args.epochs, "measure": False, "quiet": True}
                if method != "dense":
                    fields |= {"sparsity": sparsity, "distribution": "erk", "rescale": rescale}
                accuracies = []
                for seed in args.seeds:
                    with tempfile.TemporaryDirectory() as folder:
                        result = train(Config(**fields, seed=seed, output_dir=str(Path(folder) / "run")))
                    accuracies.append(100 * result["test_acc"])
                rows.append({"method": method, "sparsity": sparsity, "rescale": rescale, "accuracies": accuracies})
    cells = [
        [row["method"], f"{row['sparsity']:g}", str(row["rescale"]), f"{statistics.mean(row['accuracies']):.1f}"]
        for row in rows
    ]
    print(markdown_table(["method", "sparsity", "rescale", "accuracy, %"], cells))
    settings = {"arch": "mlp", "data": "digits", "distribution": "erk", "epochs": args.epochs, "seeds": args.seeds}
    print(write_result("digits_rescaling", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
