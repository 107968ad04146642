"""Tables for people, of what a finished run has to say about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report import describe_changes


def result_table(result: dict[str, Any], dense: dict[str, Any] | None = None) -> str:
    """The figures of a result row, and the accuracy of the same network trained dense if its row is given."""
    costs = result["costs"]
    full = costs["flops_dense"]
    rows = [("test accuracy, last epoch", _percent(result["test_acc"]))]
    if result.get("test_acc_selected") is not None:
        epoch = result["selected_epoch"]
        rows += [(f"test accuracy, chosen by validation (epoch {epoch})", _percent(result["test_acc_selected"]))]
    if dense is not None:
        change = 100 * (result["test_acc"] - dense["test_acc"])
        rows += [("same network dense, same budget", f"{_percent(dense['test_acc'])}  ({change:+.2f} points)")]
    rows += [
        ("realised sparsity, sparse layers", f"{costs['sparsity']:.4f}"),
        ("realised sparsity, all conv and linear weights", f"{costs['global_sparsity']:.4f}"),
        ("parameters", f"{costs['params_nonzero']:,} non-zero of {costs['params_total']:,}"),
        ("compression ratio", f"{costs['compression']:.2f}x"),
        ("FLOPs of a forward pass, dense", f"{full:,}"),
        ("FLOPs, theoretical", f"{costs['flops_theoretical']:,}  ({_ratio(costs['flops_theoretical'], full)})"),
        ("FLOPs, executed", f"{costs['flops_executed']:,}  ({_ratio(costs['flops_executed'], full)})"),
    ]
    if "time_step_ratio" in result:
        sparse, full_ms = result["time_step_sparse_ms"], result["time_step_dense_ms"]
        ratio = result["time_step_ratio"]
        word = "as fast as" if 0.97 <= ratio <= 1.03 else "faster than" if ratio > 1 else "slower than"
        rows += [("time of a training step", f"{sparse:.2f} ms, dense {full_ms:.2f} ms  ({ratio:.2f}x, {word} dense)")]
    together = f"  ({result['time_topology_s']:.2f} s together)" if result["topology_changes"] else ""
    if "bytes_sent" in result:
        share = _ratio(result["bytes_sent"], result["bytes_sent_dense"])
        rows += [("gradients given to all_reduce", f"{result['bytes_sent'] / 1e6:,.1f} MB a rank  ({share})")]
    rows += [("topology changes", describe_changes([result]) + together)]
    rows += [("time of the run", f"{result['time_total_s']:.1f} s")]
    return text_table(rows)


def text_table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Columns aligned to the left, with a rule below the header."""
    every = [*([header] if header else []), *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _ratio(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} % of dense" if whole else "-"
