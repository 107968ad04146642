"""Timing on a machine that is not quiet: variants interleaved in one process, medians, disturbed samples dropped.

A figure from here is a ratio of medians of the same run. Absolute times on a shared machine mean little.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def _busy_seconds() -> float | None:
    """CPU seconds used on the machine by everybody; None where /proc/stat does not exist."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (int(f) for f in fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 15,
    min_sample_s: float = 0.05,
    warmup: int = 2,
    max_foreign: float = 0.15,
) -> dict[str, dict[str, float]]:
    """Time each variant once a round, ``rounds`` times.

    A sample repeats its variant for at least ``min_sample_s`` and is dropped if other processes used more than the
    fraction ``max_foreign`` of one core meanwhile; all of a variant's samples disturbed means none are dropped, and
    ``dropped`` says so.

    Returns:
        variant -> {"ms": median, "min_ms", "max_ms", "samples", "dropped"}.
    """
    repeats = {}
    for name, run in variants.items():
        for _ in range(warmup):
            run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(min_sample_s / max(time.perf_counter() - start, 1e-9)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
            for _ in range(repeats[name]):
                run()
            wall = time.perf_counter() - start
            foreign = 0.0 if busy is None else (_busy_seconds() or 0.0) - busy - (time.process_time() - own)
            samples[name].append((wall * 1e3 / repeats[name], foreign / wall))
    result = {}
    for name, taken in samples.items():
        kept = [ms for ms, foreign in taken if foreign <= max_foreign] or [ms for ms, _ in taken]
        result[name] = {
            "ms": statistics.median(kept),
            "min_ms": min(kept),
            "max_ms": max(kept),
            "samples": len(kept),
            "dropped": len([1 for _, foreign in taken if foreign > max_foreign]),
        }
    return result


def environment() -> dict[str, Any]:
    """Hardware and versions that a published figure must name."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(name: str, payload: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json`` with the environment beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **payload}, indent=1) + "\n")
    return path
