"""Timing on a machine that is not quiet: variants interleaved in one process, medians, disturbed samples dropped.

A figure from here is a ratio of medians of the same run. Absolute times on a shared machine mean little.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import sparsebilevel as sb
from sparsebilevel.kernels import native

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


# Two threads hand an integer to and fro.
_PING_PONG = """
#include <sched.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
alignas(128) std::atomic<int> ball{0};
constexpr int kBatches = 50, kRounds = 1000;
void pin(const char* cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(std::atoi(cpu), &set);
  sched_setaffinity(0, sizeof set, &set);
}
void pass(int when, int then) {
  while (ball.load(std::memory_order_acquire) != when) {}
  ball.store(then, std::memory_order_release);
}
int main(int, char** argv) {
  std::thread other([=] {
    pin(argv[2]);
    for (int i = 0; i < kBatches * kRounds; ++i) pass(2 * i + 1, 2 * i + 2);
  });
  pin(argv[1]);
  double best = 1e30;
  for (int batch = 0, i = 0; batch < kBatches; ++batch) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < kRounds; ++round, ++i) pass(2 * i, 2 * i + 1);
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  other.join();
  std::printf("%f", best / kRounds);
}
"""


@functools.cache
def _ping_pong_program() -> tuple[tempfile.TemporaryDirectory[str], str] | None:
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None or not hasattr(os, "sched_getaffinity"):
        return None
    folder = tempfile.TemporaryDirectory()
    program = str(Path(folder.name) / "ping_pong")
    command = [compiler, "-std=c++17", "-O2", "-pthread", "-x", "c++", "-", "-o", program]
    built = subprocess.run(command, input=_PING_PONG, text=True, capture_output=True)
    return (folder, program) if built.returncode == 0 else None  # the folder goes when nobody holds it


def core_to_core_ns() -> float | None:
    """Nanoseconds that a cache line takes from the first core of this process to its second and back.

    A virtual machine's cores may share a cache at one moment and not at the next, which changes by half what several
    threads do with one another's data: a figure must say in which state it was taken. None where there is one core or
    no compiler.
    """
    built = _ping_pong_program()
    cores = sorted(os.sched_getaffinity(0))[:2] if built else []
    if built is None or len(cores) < 2:
        return None
    try:
        ran = subprocess.run([built[1], *map(str, cores)], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    return round(float(ran.stdout), 1) if ran.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Hardware and versions that a published figure must name."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
        # Names do not tell generations apart: AMD EPYC is family 25 as Zen 3 and 4, and 26 as Zen 5.
        generation = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
        model = ", ".join([found.get("model name", model), *generation])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native.isa() if native.available() else None,
        "core_to_core_ns": core_to_core_ns(),
        "sparsebilevel": sb.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(name: str, payload: Mapping[str, Any], *, keep: bool = False) -> Path:
    """Write ``results/NAME.json`` with the environment beside the figures.

    ``keep``: figures under other keys that were taken on the same hardware and versions stay in the file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"environment": environment(), **payload}
    if keep and path.exists():
        before = json.loads(path.read_text())
        varying = {"core_to_core_ns", "date"}
        if all(before["environment"].get(k) == v for k, v in result["environment"].items() if k not in varying):
            result["figures"] = before["figures"] | result["figures"]
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as Markdown, in columns that line up."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
