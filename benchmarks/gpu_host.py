"""What the host does for one step of a layer on a GPU, in microseconds: measured on any machine, without a GPU.

    python benchmarks/gpu_host.py              # interleaved medians -> results/gpu_host.json
    python benchmarks/gpu_host.py --limits     # on a GPU: eager steps on both sides of the limits that follow

A layer alone waits for the host where its kernels are done before the next are launched. Here everything runs as on a
GPU but for the launches of our kernels, which are made and go nowhere; the tensors lie on the CPU and are so small that
what torch computes with them takes next to no time. So results are wrong, and times too small by what the driver takes
for a launch, and by autograd's second thread. Triton specializes and looks up each kernel as for an H100.

With ``--limits`` nothing is pretended: whole eager steps, one after another, of layers that :mod:`.dense` and
:mod:`.dispatch` leave to torch because the device would wait for the host, left to it and not, beside dense ones.
"""

from __future__ import annotations

import copy
import os

os.environ["SPARSEBILEVEL_MEASUREMENTS"] = os.devnull  # nobody's times: choices follow the rule

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import triton
from timing import interleave, markdown_table, write_result
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sparsebilevel as sb
from sparsebilevel.kernels import block_sparse, cuda, dense, dispatch, gpu, masked_linear, reference

SIZE, BLOCK = 256, 64
TOKENS = 8
LAYERS = 16  # of a network


class _Nowhere:
    """Triton's driver of an H100 that does nothing; launcher and library in one."""

    def __init__(self, *_: Any) -> None:
        self.utils, self.launcher_cls = self, _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class _Library:
    """The CUDA kernels, of which each succeeds."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0


def pretend() -> None:
    """From now on the CPU counts as an H100."""
    torch.set_num_threads(1)
    driver.set_active(_Nowhere())
    gpu.DEVICES.add("cpu")
    gpu.capability = lambda device: (9, 0)  # type: ignore[assignment]
    cuda.DEVICES = frozenset({"cpu", "cuda"})
    cuda.load = lambda: (_Library(), "not there")  # type: ignore[assignment]
    # What masks hold, which is looked at once, is known.
    block_sparse.occupied_tiles = reference.tiles_of
    block_sparse._mark = lambda positions, mask, tiles, sides: None  # here those of the mask


class ByHand(nn.Module):
    """``w * m``, and where scores learn the gradient ``w * G`` of those, as one writes it with torch alone."""

    def __init__(self, layer: Any, with_scores: bool) -> None:
        super().__init__()
        self.weight, self.mask = layer.weight, layer.mask.float()
        self.scores = nn.Parameter(torch.ones_like(self.mask)) if with_scores else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K]`` to ``[B, N]``."""
        mask = self.mask if self.scores is None else self.mask + self.scores - self.scores.detach()
        return F.linear(x, self.weight * mask)


class Function(nn.Module):
    """``masked_linear`` as a function."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K]`` to ``[B, N]``."""
        return masked_linear(x, self.layer.weight, self.layer.mask)


Case = tuple[nn.Module, Callable[..., None]]


def make(size: int, pattern: str, learns: str) -> Any:
    layer = sb.SparseMaskedLinear(size, size, bias=False, sparsity=0.75, pattern=pattern)
    if pattern != "unstructured":  # one tile of each row and column: none of them is dropped as a whole
        tiles = torch.eye(size // BLOCK, dtype=torch.bool)
        layer.set_mask(tiles.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1))
    if learns == "scores":
        layer.set_mask_scores(nn.Parameter(torch.rand(size, size)))
    if learns == "search":
        layer.collect("search", layer.mask.reshape(-1).nonzero().squeeze(1))
    if learns == "all":
        layer.collect("all")
    return layer


_steppers: WeakKeyDictionary[nn.Module, torch.optim.Optimizer | None] = WeakKeyDictionary()


def step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Forward and backward under autocast; then weights count as new, as after a step of an optimizer."""
    parameters = list(module.parameters())
    with torch.autocast(x.device.type, torch.bfloat16):
        y = module(x)
    y.backward(grad)
    torch.autograd.graph.increment_version(parameters)
    if module not in _steppers:
        is_sparse = any(True for _ in sb.sparse_layers(module))
        _steppers[module] = torch.optim.SGD(parameters) if is_sparse else None
    if (optimizer := _steppers[module]) is not None:
        for hook in _global_optimizer_post_hooks.values():  # ours, which its step would run into
            hook(optimizer, (), {})
    x.grad = None
    for parameter in parameters:
        parameter.grad = None


def limited(small: int, host_s: float) -> Callable[..., None]:
    """The same with other limits to what is left to torch: most elements of a weight, least seconds of a step."""

    def run(module: nn.Module, x: Tensor, grad: Tensor) -> None:
        before = dense._SMALL_ON_GPU, dense._SMALL_IF_BRIEF, dispatch._HOST_S
        dense._SMALL_ON_GPU, dense._SMALL_IF_BRIEF, dispatch._HOST_S = small, small, host_s
        step(module, x, grad)
        dense._SMALL_ON_GPU, dense._SMALL_IF_BRIEF, dispatch._HOST_S = before

    return run


large = limited(-1, 0.0)  # as if weight and batch were large
small = limited(1 << 40, 1e9)  # as if both were small
brief = limited(-1, 1e9)  # as if the batch were: a layer of blocks is then on a kept copy


def single_layers() -> dict[str, Case]:
    # Of small tensors: the dense product of large ones would be measured too.
    plain = {learns: make(16, "unstructured", learns) for learns in ("none", "scores", "all", "search")}
    blocks = {learns: make(SIZE, f"block:{BLOCK}x{BLOCK}", learns) for learns in ("none", "search")}
    return {
        "dense": (nn.Linear(16, 16, bias=False), step),
        "by hand": (ByHand(plain["none"], False), step),
        "by hand, scores": (ByHand(plain["none"], True), step),
        "layer of at most 2^20 weights": (plain["none"], step),
        "larger layer": (plain["none"], large),
        "layer, scores": (plain["scores"], step),
        "layer, G collected everywhere": (plain["all"], step),
        "layer, search space": (plain["search"], step),
        "masked_linear as a function": (Function(plain["none"]), step),
        "blocks of 64": (blocks["none"], large),
        "blocks of 64, search space": (blocks["search"], large),
    }


def networks() -> dict[str, Case]:
    def network(layer: Callable[[], nn.Module]) -> nn.Module:
        return nn.Sequential(*(layer() for _ in range(LAYERS)))

    return {
        f"{name}, one of {LAYERS}": (network(layer), run)
        for name, layer, run in (
            ("dense", lambda: nn.Linear(16, 16, bias=False), step),
            ("by hand", lambda: ByHand(make(16, "unstructured", "none"), False), step),
            ("by hand, scores", lambda: ByHand(make(16, "unstructured", "none"), True), step),
            ("layer of at most 2^20 weights", lambda: make(16, "unstructured", "none"), step),
            ("larger layer", lambda: make(16, "unstructured", "none"), large),
            ("layer, scores", lambda: make(16, "unstructured", "scores"), step),
            ("layer, search space", lambda: make(16, "unstructured", "search"), step),
        )
    }


def measure(cases: dict[str, Case], rounds: int) -> dict[str, dict[str, Any]]:
    """Times of a step, of a network those of one layer."""
    variants = {}
    for name, (module, run) in cases.items():
        size = SIZE if "blocks" in name else 16
        x, grad = torch.rand(TOKENS, size, requires_grad=True), torch.rand(TOKENS, size, dtype=torch.bfloat16)
        variants[name] = lambda module=module, run=run, x=x, grad=grad: run(module, x, grad)
        if "blocks" in name:
            kernels = {choice.name for choice in module.backends.values()}  # type: ignore[union-attr,operator]
            assert kernels == {"block"}, f"{name} takes {kernels}; expected block"
    times = interleave(variants, rounds=rounds, min_sample_s=0.02)
    for name, (module, _) in cases.items():
        if isinstance(module, nn.Sequential):
            times[name] |= {key: times[name][key] / LAYERS for key in ("ms", "min_ms")}
    return times


def eager_steps(device: torch.device, quick: bool = False) -> list[dict[str, Any]]:
    """Seconds of eager steps on a GPU, of one layer and of one of several in a row.

    Returns:
        Rows with ``what``, ``layers``, and the medians of ``dense``, ``left`` to torch and ``ours``.
    """
    rows = []
    for pattern, size, tokens in LIMITS[:: 4 if quick else 1]:
        for layers in (1, 4 if pattern != "unstructured" else LAYERS):
            x = torch.randn(tokens, size, device=device, dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn_like(x)
            plain = nn.Sequential(*(nn.Linear(size, size, bias=False, device=device) for _ in range(layers)))
            masked = nn.Sequential(
                *(sb.SparseMaskedLinear(size, size, False, device, sparsity=0.9, pattern=pattern) for _ in plain)
            )
            left = small if pattern == "unstructured" else brief
            # Layers of their own: copies that nobody asks for are given up, which is not what a training is like.
            runs = {"dense": (plain, step), "left": (copy.deepcopy(masked), left), "ours": (masked, large)}
            samples: dict[str, list[float]] = {name: [] for name in runs}
            for number in range(4 if quick else 14):
                for name, (module, run) in runs.items():
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    for _ in range(max(1, 12 // layers)):
                        run(module, x, grad)
                    torch.cuda.synchronize()
                    if number >= 2:  # the first compile, and look at masks
                        samples[name].append((time.perf_counter() - begin) / max(1, 12 // layers) / layers)
            times = {name: statistics.median(taken) for name, taken in samples.items()}
            rows.append({"what": f"{pattern}, {size} x {size}, {tokens} tokens", "layers": layers} | times)
    return rows


KINDS = ("dense", "left", "ours")
# Patterns, sizes and tokens on both sides of the limits.
LIMITS = [("unstructured", size, 512) for size in (256, 512, 1024, 1536, 2048)]
LIMITS += [("unstructured", 1024, 4096)]
LIMITS += [(f"block:{BLOCK}x{BLOCK}", 4096, tokens) for tokens in (512, 1024, 2048, 3072, 4096, 8192)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="only try that everything runs")
    parser.add_argument("--limits", action="store_true", help="on a GPU, steps on both sides of the limits")
    parser.add_argument("--output", type=Path, help="JSON of --limits")
    arguments = parser.parse_args()
    if arguments.limits:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU")
        found = eager_steps(torch.device("cuda"), arguments.quick)
        cells = [[row["what"], str(row["layers"]), *(f"{row[key] * 1e6:.0f}" for key in KINDS)] for row in found]
        print(markdown_table(["us for a layer", "of", *KINDS], cells))
        if arguments.output:
            arguments.output.write_text(json.dumps({"limits": found}, indent=1) + "\n")
        return
    pretend()
    times = {}
    for cases in single_layers, networks:  # one after the other: a step looks at all copies that are kept
        times |= measure(cases(), 2 if arguments.quick else arguments.rounds)
    rows = [[name, f"{time['ms'] * 1e3:.0f}", f"{time['min_ms'] * 1e3:.0f}"] for name, time in times.items()]
    print(markdown_table(["step of", "median us", "least us"], rows))
    if not arguments.quick:
        print(write_result("gpu_host", {"triton": triton.__version__, "figures": times}))


if __name__ == "__main__":
    main()
