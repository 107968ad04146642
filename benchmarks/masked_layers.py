"""What the benchmarks of single layers share: variants of a layer, the loop over layers and sparsities, the tables.

Every variant of a layer is timed forward alone (without autograd), and forward and backward through autograd (with the
gradients of input and weight, those of earlier steps discarded), in turns in one process. The baseline is the faster
float32 dense variant of the same turns. Before it is timed, a variant must give the output and the input gradient of
the dense layer.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from timing import core_to_core_ns, interleave, markdown_table, write_result
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsebilevel as sb
from sparsebilevel.kernels import choose_backend
from sparsebilevel.kernels.plans import Geometry, active_support
from sparsebilevel.masks import random_mask

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
SEARCH_SPACE = 0.05  # of BiDST: entries that learn beside the active ones, as a fraction of all
MODES = ("forward", "forward + backward")


class Skip(Exception):
    """A variant that does not run here, and why."""


class Case(NamedTuple):
    """A layer to be measured: dense, with zeros where ``mask`` is False, its input, and how plans see it."""

    dense: nn.Module
    mask: Tensor
    x: Tensor
    geometry: Geometry

    @classmethod
    def make(cls, dense: nn.Module, x: Tensor, sparsity: float, geometry: Geometry) -> Case:
        mask = random_mask(dense.weight.shape, round((1 - sparsity) * dense.weight.numel()), sb.Unstructured())
        with torch.no_grad():
            dense.weight.mul_(mask)
        return cls(dense, mask, x, geometry)

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """Input and weight as those of a convolution."""
        missing = (None,) * (4 - self.x.dim())
        return self.x[(..., *missing)], self.dense.weight.detach()[(..., *missing)]


class Variant(NamedTuple):
    """``make``: Case -> (layer, input in the layout that it wants)."""

    make: Callable[[Case], tuple[Any, Tensor]]
    tolerance: float = 1e-3  # relative, of output and input gradient
    trains: bool = True
    baseline: bool = False
    chained: int = 1  # so many such layers, one after the other; times are those of one


def channels_last(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Both in channels_last; a linear layer and its rows stay as they are."""
    if x.dim() < 4:
        return layer, x
    return layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def dense(case: Case) -> tuple[nn.Module, Tensor]:
    """The layer as it is."""
    return copy.deepcopy(case.dense), case.x


def dense_bfloat16(case: Case) -> tuple[nn.Module, Tensor]:
    """Half the bytes, and twice the arithmetic where the processor has it."""
    return channels_last(copy.deepcopy(case.dense).bfloat16(), case.x.bfloat16())


def pruned(case: Case) -> tuple[nn.Module, Tensor]:
    """``torch.nn.utils.prune``: the dense layer after a multiplication with the mask."""
    return channels_last(prune.custom_from_mask(copy.deepcopy(case.dense), "weight", case.mask), case.x)


def sparse(case: Case) -> tuple[nn.Module, Tensor]:
    """Ours, on ordinary tensors."""
    layer = sb.sparsify(copy.deepcopy(case.dense), 0.0, init="dense")
    layer.set_mask(case.mask)
    return layer, case.x


def sparse_bfloat16(case: Case) -> tuple[nn.Module, Tensor]:
    """Ours on half the bytes; the arithmetic stays float32."""
    layer, x = sparse(case)
    return channels_last(layer.bfloat16(), x.bfloat16())


CHAIN = 8


def sparse_in_lines(case: Case) -> tuple[nn.Module, Tensor]:
    """A chain of ours that stays in the layout of the kernels: each layer costs an eighth of the way in and out."""
    layer, x = channels_last(*sparse(case))
    if layer(x).shape != x.shape:
        raise Skip("a chain of layers needs maps that stay as they are")
    return sb.optimize_for_cpu(nn.Sequential(*(copy.deepcopy(layer) for _ in range(CHAIN)))), x


def sparse_search(case: Case) -> tuple[nn.Module, Tensor]:
    """Ours, with the gradient that BiDST asks for: at active positions and a search space."""
    layer, x = sparse(case)
    searched = torch.rand(case.mask.shape) < SEARCH_SPACE
    layer.collect("search", (case.mask | searched).reshape(-1).nonzero().squeeze(1))
    return channels_last(layer, x)


def sparse_all(case: Case) -> tuple[nn.Module, Tensor]:
    """Ours, with the gradient that BiP asks for: everywhere, which is the dense library's work."""
    layer, x = sparse(case)
    layer.collect("all")
    return channels_last(layer, x)


def sparseprop() -> Any:
    """The package of that name; see the README of IST-DASLab/sparseprop."""
    try:
        return importlib.import_module("sparseprop.modules")
    except ImportError:
        raise Skip("sparseprop is not installed (pip install --no-build-isolation sparseprop)") from None


def training_pass(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward; leaves the gradients of this pass only."""
    leaves = [x, *layer.parameters()]
    forget = getattr(layer, "zero_effective_grad", lambda: None)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        forget()
        layer(x).backward(grad)

    return run


def prepare(case: Case, variant: Variant) -> dict[str, Callable[[], Any]]:
    """mode -> what to time, after a comparison with the dense layer."""
    expected_x = case.x.detach().requires_grad_()
    expected = case.dense(expected_x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    layer, x = variant.make(case)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    y = forward()
    if variant.chained == 1:
        _compare("output", y, expected, variant.tolerance)
    runs = {"forward": forward}
    if variant.trains:
        x = x.detach().requires_grad_()
        runs["forward + backward"] = training_pass(layer, x, torch.empty_like(y).copy_(grad))
        runs["forward + backward"]()
        if variant.chained == 1:
            _compare("input gradient", x.grad, expected_x.grad, variant.tolerance)
    return runs


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    got = got.to_dense() if got.is_mkldnn else got
    error = ((got.float() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        raise Skip(f"its {what} is wrong by {error:.1g}")


def measure(case: Case, variants: Mapping[str, Variant], effort: Mapping[str, Any]) -> dict[str, Any]:
    """mode -> variant -> figures of `interleave` and ``speedup`` over the best dense variant; ``left_out`` says why.

    ``rule`` is the speed-up that the choice between dense and sparse goes by.
    """
    shape, stride = tuple(case.dense.weight.shape), math.prod(case.geometry.stride)
    op = "masked_linear" if len(shape) == 2 else "masked_conv2d"
    x, _ = case.maps
    size: dict[str, Any] = {"images": x.shape[0], "pixels": math.prod(x.shape[2:]) // stride, "stride": stride}
    rule = choose_backend(op, shape, torch.float32, torch.device("cpu"), int(case.mask.sum()), **size)
    figures: dict[str, Any] = {"core_to_core_ns": core_to_core_ns(), "rule": rule.estimate, "left_out": {}}
    runs: dict[str, dict[str, Callable[[], Any]]] = {mode: {} for mode in MODES}
    with mock.patch.dict(os.environ, SPARSEBILEVEL_BACKEND="sparse"):
        for name, variant in variants.items():
            try:
                for mode, run in prepare(case, variant).items():
                    runs[mode][name] = run
            except Skip as reason:
                figures["left_out"][name] = str(reason)
        for mode, of_mode in runs.items():
            rows = interleave(of_mode, **effort)
            for name, row in rows.items():
                row |= {key: row[key] / variants[name].chained for key in ("ms", "min_ms", "max_ms")}
            base = min(row["ms"] for name, row in rows.items() if variants[name].baseline)
            figures[mode] = {name: row | {"speedup": base / row["ms"]} for name, row in rows.items()}
    return figures


class Buffer(NamedTuple):
    """Maps of random numbers ``[B, C, H, W]`` in a layout, as plans take them."""

    memory: Tensor
    maps: tuple

    @classmethod
    def make(cls, shape: tuple[int, ...], layout: str) -> Buffer:
        images, *rest = shape
        if layout == "lines":
            memory = torch.randn(-(-images // 16), *rest, 16)
            return cls(memory, (memory.data_ptr(), False, images, None))
        memory = torch.randn(shape)
        if layout == "channels_last":
            memory = memory.contiguous(memory_format=torch.channels_last)
        return cls(memory, (memory.data_ptr(), False, images, memory.stride()))


def measure_passes(case: Case, effort: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels alone, on plans made before: "layout, pass" -> figures of `interleave`, GFLOP/s on the non-zeros."""
    threads = torch.get_num_threads()
    x, weight = case.maps
    out = x.shape[0], weight.shape[0], *case.geometry.output_size(x.shape[2:], weight.shape[2:])
    support = active_support(case.mask.view(weight.shape))
    grads = torch.empty(support.non_zeros)
    flops = 2 * support.non_zeros * out[0] * out[2] * out[3]

    def passes(layout: str) -> dict[str, Callable[[], None]]:
        source, grad_source, result, grad = (Buffer.make(shape, layout) for shape in (x.shape, x.shape, out, out))
        operands = () if layout == "lines" else (source.memory, result.memory)
        plan, transposed = (support.plan(back, x.shape, weight, case.geometry, operands) for back in (False, True))
        w, g = weight.data_ptr(), grads.data_ptr()
        return {
            "forward": lambda: plan.forward(w, False, source.maps, result.maps, 0, False, threads),
            "input gradient": lambda: transposed.forward(w, False, grad.maps, grad_source.maps, 0, False, threads),
            "weight gradient": lambda: plan.weight_grad(source.maps, grad.maps, g, False, False, threads),
        }

    runs = {}
    for layout in ("rows", "lines") if case.x.dim() == 2 else ("NCHW", "channels_last", "lines"):
        runs |= {f"{layout}, {name}": run for name, run in passes(layout).items()}
    rows = interleave(runs, **effort)
    return {name: row | {"gflops": flops / row["ms"] / 1e6} for name, row in rows.items()}


def main(
    name: str, layers: Mapping[str, Callable[[float], Case]], variants: Mapping[str, Variant], doc: str | None
) -> None:
    """The command line of the benchmark ``name``; ``layers`` make a Case at a sparsity."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", nargs="+", choices=layers, default=list(layers), metavar="LAYER")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="FRACTION")
    parser.add_argument("--passes", action="store_true", help="time the passes of our kernels alone, without autograd")
    parser.add_argument("--quick", action="store_true", help="hardly measure, only see that everything runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    effort = {"rounds": 2, "min_sample_s": 0.002, "warmup": 1} if args.quick else {"rounds": 7, "min_sample_s": 0.03}
    figures: dict[str, dict[str, Any]] = {layer: {} for layer in args.layers}
    for layer in args.layers:
        for sparsity in args.sparsities:
            print(f"{layer}, {sparsity:.0%} ...", flush=True)
            case = layers[layer](sparsity)
            figures[layer][f"{sparsity:g}"] = (
                measure_passes(case, effort) if args.passes else measure(case, variants, effort)
            )

    rows = [(layer, sparsity, found) for layer, by in figures.items() for sparsity, found in by.items()]
    if args.passes:
        columns = list(rows[0][2])
        cells = [[f"{found[c]['ms']:.3f} ({found[c]['gflops']:.0f})" for c in columns] for *_, found in rows]
        _print("ms (GFLOP/s on non-zeros)", columns, rows, cells)
    else:
        for mode in MODES:
            columns = [name for name in variants if any(name in found[mode] for *_, found in rows)]
            cells = [[speedup_cell(found[mode].get(column)) for column in columns] for *_, found in rows]
            _print(f"{mode}: ms (speed-up over the best dense)", columns, rows, cells)
        reasons = {f"{name}: {reason}" for *_, found in rows for name, reason in found["left_out"].items()}
        print(*sorted(reasons), sep="\n")
    complete = args.layers == list(layers) and args.sparsities == list(SPARSITIES) and not args.quick
    if complete:
        print(write_result(name + ("_passes" if args.passes else ""), {"figures": figures}))


def speedup_cell(row: Mapping[str, float] | None) -> str:
    """Of a table."""
    return "" if row is None else f"{row['ms']:.2f} ({row['speedup']:.2f}x)"


def _print(title: str, columns: list[str], rows: list[tuple], cells: list[list[str]]) -> None:
    lines = [[layer, f"{float(sparsity):.0%}", *line] for (layer, sparsity, _), line in zip(rows, cells, strict=True)]
    print(f"\n{title}\n\n{markdown_table(['layer', 'sparsity', *columns], lines)}\n")


def bench(benchmark: Any, case: Case, variant: Variant) -> None:
    """One variant for pytest-benchmark: forward and backward if it has both."""
    try:
        with mock.patch.dict(os.environ, SPARSEBILEVEL_BACKEND="sparse"):
            *_, run = prepare(case, variant).values()
            benchmark.pedantic(run, rounds=5, iterations=3, warmup_rounds=1)
    except Skip as reason:
        pytest.skip(str(reason))
