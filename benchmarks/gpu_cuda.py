"""Checks the CUDA kernels (binarize, pack) on a GPU, and times them beside torch's own functions.

    python benchmarks/gpu_cuda.py check|sanitize|time [--output FILE] [--budget SECONDS] [--quick]

``check`` compares masks, words, counts and values bit for bit with a stable sort of the scores in float64, in memory
that held something else before; ``sanitize`` is a few small checks, to be run under compute-sanitizer. ``time`` takes
medians of CUDA events, of launches as they are and of a captured graph, with the L2 cache flushed before each. Beside
ours stand torch's own functions and the byte floor: what must be read and written, at the bandwidth of a copy.
``gpu_check.py`` builds the library and runs this with all that runs on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import re
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

POISON = 0xA5
RESNET50 = [
    *[(64, 3, 7, 7), (1000, 2048)],
    *itertools.chain.from_iterable(
        [
            (width, before if block == 0 else 4 * width, 1, 1),
            (width, width, 3, 3),
            (4 * width, width, 1, 1),
            *([(4 * width, before, 1, 1)] if block == 0 else []),
        ]
        for width, before, blocks in ((64, 64, 3), (128, 256, 4), (256, 512, 6), (512, 1024, 3))
        for block in range(blocks)
    ),
]
STARTED = time.monotonic()


def note(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.1f} s] {text}", flush=True)


def import_everything() -> dict[str, Any]:
    """The modules that are checked: a path that does not import must not be found out on a machine that is rented."""
    names = ("binarize", "cuda", "pack", "reference")
    modules = {name: importlib.import_module(f"sparsebilevel.kernels.{name}") for name in names}
    modules["package"] = importlib.import_module("sparsebilevel")
    library, reason = modules["cuda"].load()
    if library is None:
        sys.exit(f"the CUDA library is missing: {reason}")
    return modules


class Check:
    """Compares, and counts."""

    def __init__(self, torch: Any, modules: dict[str, Any], device: str) -> None:
        self.torch, self.device = torch, device
        self.cuda = modules["cuda"]
        self.binarize, self.reference = modules["package"].binarize, modules["reference"]
        self.pack, self.unpack = modules["pack"].pack, modules["pack"].unpack
        self.passed: dict[str, int] = {}
        self.failed: list[str] = []

    def equal(self, what: str, case: str, found: Any, expected: Any) -> None:
        if found.shape == expected.shape and self.torch.equal(found, expected):
            self.passed[what] = self.passed.get(what, 0) + 1
        else:
            self.failed.append(f"{what}: {case}")
            note(f"FAILED {what}: {case}")

    def poisoned(self, size: int, dtype: Any) -> Any:
        bytes = self.torch.full((size * dtype.itemsize,), POISON, dtype=self.torch.uint8, device=self.device)
        return bytes.view(dtype)

    def outs(self, scores: list[Any]) -> list[tuple[Any, Any, Any]]:
        torch = self.torch
        return [
            (
                self.poisoned(s.numel(), torch.bool),
                self.poisoned(-(-s.numel() // 64), torch.int64),
                self.poisoned(-(-s.numel() // 1024) + 1, torch.int64),
            )
            for s in scores
        ]

    def scores(self, kind: str, n: int, dtype: Any) -> Any:
        torch = self.torch
        few = torch.tensor([float("-inf"), -1.0, -0.0, 0.0, 1e-45, 1.0, float("inf")], device=self.device)
        values = {
            "normal": lambda: torch.randn(n, device=self.device),
            "uniform": lambda: torch.rand(n, device=self.device),
            "constant": lambda: torch.ones(n, device=self.device),
            "two values": lambda: torch.randn(n, device=self.device).sign(),
            "few values": lambda: few[torch.randint(7, (n,), device=self.device)],
            "sorted": lambda: torch.arange(n, device=self.device).float(),
            "one bucket": lambda: 1 + torch.rand(n, device=self.device) * 1e-5,
            "misleading": lambda: (torch.arange(n, device=self.device) < n // 1000).float() * torch.rand_like(few[0]),
        }[kind]()
        return values.to(dtype)

    def lists(self, implementation: Any, name: str, sizes: list[int], kinds: tuple[str, ...]) -> None:
        torch = self.torch
        total = sum(sizes)
        for dtype, kind in itertools.product((torch.float32, torch.float16, torch.bfloat16), kinds):
            joined = self.scores(kind, total, dtype)
            scores = list(joined.split(sizes))
            scores = [s.clone() if i % 2 else s for i, s in enumerate(scores)]  # aligned, or as they lie
            for k in sorted({0, 1, total // 10, total // 2, max(total - 1, 0), total}):
                case = f"{name}, {dtype}, {kind}, {len(sizes)} tensors of {total}, k={k}"
                expected = self.reference.binarize(joined.double(), k).split(sizes)
                outs = self.outs(scores)
                on_device = torch.tensor(k, device=self.device)
                errors = implementation.binarize(scores, outs, on_device if k % 2 else k)
                self.equal(name, f"errors of {case}", errors[-1].bool(), torch.tensor(True, device=self.device))
                for part, (mask, words, counts) in zip(expected, outs, strict=True):
                    expected_words, expected_counts = self.reference.mask_words(part)
                    self.equal(name, f"mask of {case}", mask.view(torch.uint8), part.view(torch.uint8))
                    self.equal(name, f"words of {case}", words, expected_words)
                    self.equal(name, f"counts of {case}", counts, expected_counts)

    def rows(self, shapes: list[tuple[int, ...]]) -> None:
        torch = self.torch
        for shape, dtype in itertools.product(shapes, (torch.float32, torch.float16, torch.bfloat16)):
            scores = torch.randn(shape, device=self.device).mul(8).round().to(dtype)
            rows = scores.movedim(1, -1)
            for k in {0, 1, shape[1] // 4, shape[1]}:
                flat = self.reference.binarize_rows(rows.reshape(-1, shape[1]).double(), k)
                expected = flat.view(rows.shape).movedim(-1, 1).contiguous()
                found = self.binarize(scores, k, dim=1, words=True)
                words, counts = self.reference.mask_words(expected)
                for part, right in ((found.mask, expected), (found.words, words), (found.counts, counts)):
                    self.equal("rows", f"{dtype}, {shape}, k={k}", part, right)

    def values(self, n: int) -> None:
        torch = self.torch
        dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64)
        for dtype, share in itertools.product(dtypes, (0.0, 0.02, 0.1, 0.5, 1.0)):
            case = f"{dtype}, {n}, {share}"
            mask = torch.rand(n, device=self.device) < share
            words, counts = self.poisoned(-(-n // 64), torch.int64), self.poisoned(-(-n // 1024) + 1, torch.int64)
            self.cuda.mask_words(mask, words, counts)
            expected_words, expected_counts = self.reference.mask_words(mask)
            self.equal("words of masks", case, words, expected_words)
            self.equal("words of masks", case, counts, expected_counts)
            dense = torch.randn(n, device=self.device).mul(8).to(dtype)
            right = dense[mask]
            found = self.cuda.gather_values(dense, words, counts, self.poisoned(right.numel(), dtype))
            self.equal("gather", case, found, right)
            expected = torch.where(mask, dense, torch.zeros_like(dense))
            self.equal(
                "scatter", case, self.cuda.scatter_values(right, words, counts, self.poisoned(n, dtype)), expected
            )
            other = torch.randn(n, device=self.device).mul(8).to(dtype)
            expected = torch.where(mask, dense, other)
            kept = self.cuda.scatter_values(right, words, counts, other.clone(), keep=True)
            self.equal("scatter, keep", case, kept, expected)
            if dtype.is_floating_point:
                added = self.cuda.accumulate_values(right, words, counts, other.clone())
                self.equal(
                    "accumulate", case, added, torch.where(mask, (other.float() + dense.float()).to(dtype), other)
                )

    def messages(self, n: int) -> None:
        """Those of tensors on the device are those of the CPU, and are written back there."""
        torch = self.torch
        for dtype, share in itertools.product((torch.float32, torch.float16, torch.bfloat16), (0.0, 0.01, 0.3, 1.0)):
            values, mask = torch.randn(n, device=self.device).to(dtype), torch.rand(n, device=self.device) < share
            for format in ("values", "bitmap", "hierarchical", "delta8", "block16", "dense"):
                case = f"{dtype}, {n}, {share}, {format}"
                message = self.pack(values, mask, format)
                expected = self.pack(values.cpu(), mask.cpu(), format)
                found, right = (torch.frombuffer(bytearray(bytes(m)), dtype=torch.uint8) for m in (message, expected))
                self.equal("pack", case, found, right)
                out = torch.randn(n, device=self.device).to(dtype)
                kept = torch.where(mask, values, out)
                self.equal("unpack", case, self.unpack(message, mask, out=out.clone(), mode="scatter"), kept)
                kept = torch.where(mask, values, torch.zeros_like(out))
                self.equal("unpack", case, self.unpack(message, mask, out=out), kept)

    def without_library(self, n: int) -> None:
        """Sorting in its place, which must not wait for the device either."""
        torch = self.torch
        scores, k = self.scores("few values", n, torch.float32), torch.tensor(n // 3, device="cuda")
        with unittest.mock.patch.object(self.cuda, "load", return_value=(None, "switched off")):
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = self.binarize(scores, k, words=True)
            except RuntimeError as error:
                self.failed.append(f"without the library: {error}")
                return
            finally:
                torch.cuda.set_sync_debug_mode("default")
        expected = self.reference.binarize(scores.double(), n // 3)
        self.equal("without the library", f"k={n // 3}", found.mask, expected)
        self.equal("without the library", f"words, k={n // 3}", found.words, self.reference.mask_words(expected)[0])

    def graph(self, n: int) -> None:
        """A captured launch, replayed with other scores and another k."""
        torch = self.torch
        scores, k = torch.randn(n, device="cuda"), torch.tensor(10, device="cuda")
        self.binarize(scores, k)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mask = self.binarize(scores, k)
        for number in (5, n // 3, n):
            scores.normal_()
            k.fill_(number)
            graph.replay()
            self.equal("graph", f"k={number}", mask, self.reference.binarize(scores.double(), number))

    def everything(self, size: int) -> None:
        kinds = ("normal", "few values", "constant", "two values", "sorted", "one bucket", "misleading")
        lists = [[1], [1023, 0, 1025], [size], [size // 3, 1, size // 2, 777], [5] * 300]
        for sizes in lists:
            self.lists(self.cuda, "CUDA", sizes, kinds)
        lengths = (2, 4, 8, 11, 16, 17, 64, 65, 1000, 1024, 4000, 5000)
        self.rows([(size // 1000 + 1, n) for n in lengths] + [(33, 20, 3, 3), (17, 4, 30)])
        if self.device == "cuda":
            self.without_library(size)
        self.values(size + 1)
        self.values(100)
        self.messages(size // 10)
        if self.device == "cuda":
            self.graph(size)


class Timer:
    def __init__(self, torch: Any, repeats: int) -> None:
        self.torch, self.repeats = torch, repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def median_us(self, function: Callable[[], Any]) -> float:
        torch = self.torch
        function()
        times = []
        for _ in range(self.repeats):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # so that the launches wait in the queue, and only the device is timed
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        return statistics.median(times)

    def copy_gb_s(self) -> float:
        source = self.torch.empty(1 << 30, dtype=self.torch.uint8, device="cuda")
        target = self.torch.empty_like(source)
        return 2 * source.numel() / self.median_us(lambda: target.copy_(source)) / 1e3

    def by_kernel(self, function: Callable[[], Any]) -> dict[str, float]:
        """Mean microseconds of each kernel and launch, in order of the launches, with the cache flushed before."""
        profiler = self.torch.profiler
        calls = 5
        self.torch.cuda.synchronize()
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                self.flush.zero_()
                function()
            self.torch.cuda.synchronize()
        events = [e for e in profile.events() if str(e.device_type).endswith("CUDA") and "sparsebilevel" in e.name]
        events.sort(key=lambda e: e.time_range.start)
        each = len(events) // calls
        times: dict[str, float] = {}
        for i, event in enumerate(events[: each * calls]):
            name = re.search(r"(\w+)[<(]", event.name.partition("(anonymous namespace)::")[2])
            key = f"{i % each} {name[1] if name else event.name[:60]}"
            times[key] = times.get(key, 0.0) + event.time_range.elapsed_us() / calls
        note(", ".join(f"{name} {us:.1f}" for name, us in times.items()))
        return times

    def graph_us(self, function: Callable[[], Any]) -> float:
        torch = self.torch
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.median_us(graph.replay)


def measure(torch: Any, modules: dict[str, Any], quick: bool, budget: float) -> list[dict[str, Any]]:
    cuda, binarize = modules["cuda"], modules["package"].binarize
    timer = Timer(torch, 5 if quick else 20)
    bandwidth = timer.copy_gb_s()
    note(f"copy: {bandwidth:.0f} GB/s")
    rows: list[dict[str, Any]] = [{"what": "copy", "GB/s": bandwidth}]

    def add(what: str, floor_bytes: float, **times: Callable[[], Any]) -> None:
        row: dict[str, Any] = {"what": what, "floor_us": floor_bytes / bandwidth / 1e3}
        for name, function in times.items():
            if time.monotonic() - STARTED > budget:
                row[name] = "no time left"
                continue
            try:
                row[name] = (timer.graph_us if name.endswith("graph") else timer.median_us)(function)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                row[name] = f"{type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
        note(
            f"{what}: "
            + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "what")
        )

    def by_topk(scores: Any, k: int) -> Any:
        flat = scores.view(-1)
        indices = flat.topk(k, sorted=False).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, indices, True)

    sizes = [1 << 20] if quick else [25_557_032, 100_000_000]
    for n, dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        scores = torch.randn(n, device="cuda").to(dtype)
        k = n // 10
        on_device = torch.tensor(k, device="cuda")
        outs = [
            (torch.empty_like(scores, dtype=torch.bool), torch.empty(-(-n // 64), dtype=torch.int64, device="cuda"))
        ]
        outs = [(*outs[0], torch.empty(-(-n // 1024) + 1, dtype=torch.int64, device="cuda"))]
        add(
            f"binarize {n} {dtype}",
            n * (dtype.itemsize + 1 + 1 / 8),  # one read of the scores; a mask, words
            ours=lambda s=scores, k=on_device: binarize(s, k),
            ours_graph=lambda s=scores, k=on_device: binarize(s, k),
            kernels_graph=lambda s=scores, o=outs, k=on_device: cuda.binarize([s], o, k),
            topk=lambda s=scores, k=k: by_topk(s, k),
            sort=lambda s=scores: s.sort(),
        )
        with contextlib.suppress(RuntimeError):  # a profiler may be forbidden
            rows[-1]["by_kernel_us"] = timer.by_kernel(lambda s=scores, o=outs, k=on_device: cuda.binarize([s], o, k))
    n = sizes[0]
    for kind in ("constant", "two values", "sorted"):
        scores = Check(torch, modules, "cuda").scores(kind, n, torch.float32)
        add(f"binarize {n} {kind}", n * 5.125, ours_graph=lambda s=scores: binarize(s, n // 10))
    shapes = RESNET50[:5] if quick else RESNET50
    layers = [torch.randn(shape, device="cuda") for shape in shapes]
    total = sum(s.numel() for s in layers)
    add(
        f"binarize {len(layers)} layers of ResNet-50",
        total * 5.125,
        ours=lambda: binarize(layers, total // 10),
        ours_graph=lambda: binarize(layers, total // 10),
        cat_topk=lambda: by_topk(torch.cat([s.view(-1) for s in layers]), total // 10),
    )
    side = 512 if quick else 4096
    for length in (4, 16, 64, 256, 1000, side):
        scores = torch.randn(side * side // length, length, device="cuda")
        add(
            f"binarize {scores.numel()} in rows of {length}",
            scores.numel() * 5,
            ours_graph=lambda s=scores, k=length // 4: binarize(s, k, dim=1),
            topk=lambda s=scores, k=length // 4: torch.zeros_like(s, dtype=torch.bool).scatter_(
                1, s.topk(k, dim=1, sorted=False).indices, True
            ),
        )
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.randn(n, device="cuda").to(dtype)
        found = binarize(torch.rand(n, device="cuda"), n // 10, words=True)
        mask, words, counts = found
        values = dense[mask]
        size = dtype.itemsize
        # Of unstructured masks nearly all sectors of 32 bytes hold a position, so the dense tensor is read whole.
        gathered = n * (size + 1 / 8) + values.numel() * size
        add(
            f"gather {n} {dtype}, 10 %",
            gathered,
            ours_graph=lambda d=dense, w=words, c=counts, v=values: cuda.gather_values(d, w, c, v),
            index=lambda d=dense, m=mask: d[m],
        )
        add(
            f"scatter {n} {dtype}, 10 %",
            gathered,
            ours_graph=lambda d=dense, w=words, c=counts, v=values: cuda.scatter_values(v, w, c, d),
            masked_scatter=lambda d=dense, m=mask, v=values: torch.zeros_like(d).masked_scatter_(m, v),
        )
        add(
            f"accumulate {n} {dtype}, 10 %",
            gathered + n * size,
            ours_graph=lambda d=dense, w=words, c=counts, v=values: cuda.accumulate_values(v, w, c, d),
        )
    add(
        f"words of a mask of {n}",
        n * 1.125,
        ours_graph=lambda: cuda.mask_words(mask, words, counts),
    )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | floor, us | ours, us | of the floor | others, us |", "|---|---|---|---|---|"]
    for row in rows[1:]:
        ours = row.get("ours_graph")
        known = [k for k in row if k not in ("what", "floor_us", "ours_graph", "by_kernel_us")]
        others = ", ".join(f"{k} {row[k]:.0f}" if isinstance(row[k], float) else f"{k}: {row[k]}" for k in known)
        figures = f"{ours:.1f} | {ours / row['floor_us']:.2f}" if isinstance(ours, float) else f"{ours} | "
        lines.append(f"| {row['what']} | {row['floor_us']:.1f} | {figures} | {others} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("check", "sanitize", "time"))
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds, after which no row is begun")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    import torch

    modules = import_everything()
    if not torch.cuda.is_available():
        note("everything imports; there is no GPU, so nothing is checked or timed")
        return 0
    torch.manual_seed(0)
    check = Check(torch, modules, "cuda")
    result: dict[str, Any] = {}
    if args.what == "time":
        result = {"times": measure(torch, modules, args.quick, args.budget)}
        print(table(result["times"]))
    elif args.what == "sanitize":
        check.lists(check.cuda, "CUDA", [70_000, 0, 1025], ("normal", "two values"))
        check.rows([(100, 4), (9, 50), (7, 3000)])
        check.values(3001)
    else:
        check.everything(50_000 if args.quick else 300_000)
    torch.cuda.synchronize()
    if args.what != "time":
        note(f"passed: {check.passed}; failed: {len(check.failed)}")
        result = {"passed": check.passed, "failed": check.failed}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return bool(check.failed)


if __name__ == "__main__":
    sys.exit(main())
