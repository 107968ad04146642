"""Whole training steps of masked networks on a GPU, beside dense ones, plain masked ones and torch.compile.

    python benchmarks/gpu_training.py [--rows a,b,c,d,e,f] [--budget SECONDS] [--output FILE] [--quick] [--device cpu]

a. ResNet-50, unstructured masks at 90 % in every layer, frozen and with learned scores;
b. ResNet-50 at half of its FLOPs by channel masks: inner channels of the bottlenecks, and tied widths of whole stages;
c. memory beyond the dense network, in bytes a weight: linear layers 4096 x 4096 and few tokens;
d. the MLP of a transformer, 4096 -> 16384 -> 4096: unstructured masks and blocks of 64 x 64 at 90 %;
e, f. networks of a, and of b, under torch.compile, last since compiling takes longer than all the rest.

A step is: gradients to none, forward under bfloat16 autocast, loss, backward, and SGD with momentum on float32 weights
(fused). The variants of a row take turns in one process; times are medians, of steps one after another, and ratios are
to the dense network of the same row. ``loss`` is that of the first step, and the same up to rounding for the same
masks. ``FLOPs`` is the part of the dense products that is left to do. The floor beside each time is a sum over
convolutions and linear layers, of the larger of two for each of their three products: FLOPs at the speed of a dense
product, and what it reads and writes in bfloat16 at the speed of a copy, both measured here. All else in a step comes
on top of it.

Results go to ``benchmarks/results/gpu_training.json`` after each row, and tables to standard output. The file's other
rows stay; one of another machine, or of other sizes, is refused (``--output``). Rows b, e and f take minutes to
prepare: give each a call of its own. ``--device cpu --quick --output FILE`` runs the same lines where there is no GPU;
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_kernels import ceilings
from timing import RESULTS, markdown_table
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparsebilevel as sb
from sparsebilevel._torchvision import import_torchvision
from sparsebilevel.costs import count_costs
from sparsebilevel.export import slice_model
from sparsebilevel.kernels import PASSES
from sparsebilevel.kernels.block_sparse import look

STARTED = time.monotonic()
SPARSITY = 0.9
# Fractions of channels that leave half of ResNet-50's FLOPs, with numbers of them that are multiples of 8, 32 or 64.
INNER_ONLY = {"inner": 0.56, "stages": 1.0}
INNER_32 = {"inner": 0.6, "stages": 1.0, "multiple": 32}
TIED_32 = {"inner": 0.7, "stages": 0.7, "multiple": 32}
TIED_64 = {"inner": 0.62, "stages": 0.75, "multiple": 64}


class Sizes(NamedTuple):
    """What is trained on, and how often it is timed."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    batch: int = 256
    image: int = 224
    width: int = 4096
    tokens: int = 8192
    linears: int = 8
    rounds: int = 7
    repeats: int = 3


QUICK = Sizes(depths=(1, 1, 1, 1), batch=4, image=64, width=256, tokens=32, linears=2, rounds=2, repeats=1)


class Task(NamedTuple):
    """``make``: the dense network, always with the same weights. ``loss``: of its output for the batch ``x``."""

    make: Callable[[], nn.Module]
    x: Tensor
    loss: Callable[[Tensor], Tensor]


class Variant(NamedTuple):
    """How a network is trained: ``convert`` takes the dense one, ``optimizer`` its parameters."""

    convert: Callable[[nn.Module], nn.Module] = lambda model: model
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
    compiled: bool = False
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Multiplications that are needed of a dense forward, input gradient and weight gradient."""


# -- networks ----------------------------------------------------------------------------------------------------------


def resnet50(depths: tuple[int, ...], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    resnet = import_torchvision().models.resnet
    with device:
        return resnet.ResNet(resnet.Bottleneck, list(depths))


def masked(model: nn.Module, scores: bool = False, **options: Any) -> nn.Module:
    """With masks, and with scores that the optimizer steps; ``options`` as in ``sb.sparsify``."""
    sb.sparsify(model, **{"sparsity": SPARSITY, "seed": 0, **options})
    for _, layer in sb.sparse_layers(model):
        if scores:
            layer.set_mask_scores(nn.Parameter(torch.zeros_like(layer.weight)))
        if options.get("pattern") == "block:64x64" and (held := look(layer.mask)) is not None:
            held.layout(64).settle()  # as a mask does that stays for some hundred steps
    return model


learned = functools.partial(masked, scores=True)


def sharing(model: nn.Module, **options: Any) -> nn.Module:
    """With scores that have one gradient with their weights, for ``sb.optim``."""
    sb.optim.share_gradient(learned(model, **options))
    return model


def searching(model: nn.Module, share: float, **options: Any) -> nn.Module:
    """With masks whose scores learn as BiDST's do: where the mask is open, and in a random ``share`` of the groups."""
    masked(model, **options)
    for _, layer in sb.sparse_layers(model):
        groups = torch.rand_like(layer.pattern.group_scores(layer.weight.detach())) < share
        learning = layer.mask | layer.pattern.expand(groups, layer.weight.shape)
        layer.collect("search", learning.reshape(-1).nonzero().squeeze(1))
    return model


class StraightThrough(nn.Module):
    """``w * m`` as one writes it by hand, whose gradient reaches the scores of the mask too."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())
        self.scores = nn.Parameter(torch.zeros_like(self.mask))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.mask + (self.scores - self.scores.detach()))


def unfused(model: nn.Module) -> nn.Module:
    """Dense layers on ``w * m``, with the masks of `masked`."""
    masks = {name: layer.mask for name, layer in sb.sparse_layers(masked(copy.deepcopy(model)))}
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", StraightThrough(mask))
    return model


def channel_masks(model: nn.Module, inner: float, stages: float, multiple: int = 8) -> nn.Module:
    """Bottlenecks that keep a fraction of their inner channels, and one of each stage's; multiples, at random."""
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int, fraction: float) -> Tensor:
        kept = torch.zeros(channels, dtype=torch.bool)
        count = max(1, round(channels * fraction / multiple)) * multiple
        kept[torch.randperm(channels, generator=generator)[:count]] = True
        return kept

    def sides() -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """(layer, kept outputs, kept inputs)."""
        x = draw(model.conv1.out_channels, stages)
        yield model.conv1, x, torch.ones(3, dtype=torch.bool)
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            out = draw(stage[0].conv3.out_channels, stages)
            for block in stage:
                a, b = (draw(block.conv2.out_channels, inner) for _ in range(2))
                yield from ((block.conv1, a, x), (block.conv2, b, a), (block.conv3, out, b))
                if block.downsample is not None:
                    yield block.downsample[0], out, x
                x = out
        yield model.fc, torch.ones(model.fc.out_features, dtype=torch.bool), x

    cut = {layer: (rows, columns) for layer, rows, columns in sides() if not (rows.all() and columns.all())}
    masked(model, sparsity=0.0, include=list(cut), init="dense")
    for layer, (rows, columns) in cut.items():
        mask = (rows[:, None] & columns).to(layer.mask.device)
        layer.set_mask(mask[(..., *[None] * (layer.mask.dim() - 2))].expand_as(layer.mask))
    return model


# -- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """Runs rows as far as the budget goes, and keeps what was found."""

    def __init__(self, device: torch.device, sizes: Sizes, budget: float, output: Path) -> None:
        self.device, self.sizes, self.budget, self.output = device, sizes, budget, output
        self.ceilings = ceilings(device, small=sizes is QUICK)
        about = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
            "sizes": sizes._asdict(),
            "sparsity": SPARSITY,
            **dict(zip(("bytes_per_s", "flops_per_s"), self.ceilings, strict=True)),
        }
        about = json.loads(json.dumps(about))
        before = json.loads(output.read_text()) if output.exists() else {}
        measured = ("bytes_per_s", "flops_per_s")  # a little different each time
        odd = [k for k in about if k not in measured and before.get("about", about).get(k) != about[k]]
        if odd:
            raise SystemExit(f"{output} has rows of another {', '.join(odd)}; give another --output")
        self.results: dict[str, Any] = {"about": about, "rows": before.get("rows", {})}
        note(json.dumps(about))

    def guard(self, run: Callable[[], dict[str, Any] | None], *, budgeted: bool = True) -> dict[str, Any]:
        """What ``run`` returns, or why there is nothing: one row must not take the others with it."""
        if budgeted and time.monotonic() - STARTED > self.budget:
            return {"skipped": f"the budget of {self.budget:.0f} s was over"}
        try:
            return run() or {}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        finally:
            gc.collect()

    def keep(self, row: str, found: dict[str, Any]) -> None:
        self.results["rows"][row] = found
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.results, indent=1) + "\n")

    def compare(self, row: str, title: str, task: Task, variants: Mapping[str, Variant]) -> None:
        """Times of the steps of all variants, in turn; the first is the dense one."""
        rows: dict[str, dict[str, Any]] = {}
        steps: dict[str, Callable[[], Tensor]] = {}
        samples: dict[str, list[float]] = {name: [] for name in variants}

        def prepare(name: str) -> dict[str, Any]:
            steps[name], found = self.step(variants[name], task)
            return found

        def sample(name: str) -> None:
            samples[name].append(1e3 * self.seconds(steps[name]))

        for name in variants:
            rows[name] = self.guard(functools.partial(prepare, name))
            note(f"{row} {name}: {failure(rows[name]) or 'ready'}")
        for _ in range(self.sizes.rounds):
            for name in list(steps):
                # What is ready is timed, whatever the budget: seconds, after minutes of compilation.
                if failed := self.guard(functools.partial(sample, name), budgeted=False):
                    rows[name] |= failed
                    del steps[name]
        for name, found in rows.items():
            if taken := samples[name]:
                figures = {"ms": statistics.median(taken), "min_ms": min(taken), "max_ms": max(taken)}
                found |= figures | {"samples": len(taken)}
            for ratio, of in (("ratio", "ms"), ("flops_left", "flops")):
                if of in found and of in rows["dense"]:
                    found[ratio] = found[of] / rows["dense"][of]
        self.keep(row, {"title": title, "variants": rows})
        keys = {"ms": 3, "ratio": 3, "floor_ms": 3, "flops_left": 3, "loss": 4}
        cells = []
        for name, found in rows.items():
            figures = [f"{found[key]:.{digits}f}" if key in found else "-" for key, digits in keys.items()]
            cells.append([name, *figures, failure(found)])
        header = ["", "ms", "over dense", "floor, ms", "FLOPs", "loss", ""]
        print(f"\n{title}\n\n{markdown_table(header, cells)}\n", flush=True)

    def seconds(self, step: Callable[[], Tensor]) -> float:
        """Of a step among others like it, one after another: with what the host does, where the device waits for it."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(self.sizes.repeats):
            step()
        self.wait()
        return (time.perf_counter() - begin) / self.sizes.repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self, variant: Variant, task: Task) -> tuple[Callable[[], Tensor], dict[str, Any]]:
        """A training step that has been warmed up, and what is known of it."""
        model = variant.convert(task.make()).to(self.device, memory_format=torch.channels_last).train()
        found = self.floor(model, task, variant.shares)
        optimizer = variant.optimizer(model.parameters(), lr=1e-5, momentum=0.9, fused=True)
        network = torch.compile(model) if variant.compiled else model

        def step() -> Tensor:
            optimizer.zero_grad()
            task.x.grad = None
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = task.loss(network(task.x))
            loss.backward()
            optimizer.step()
            return loss.detach()

        found["loss"] = float(step())  # compiles, and lets cuDNN choose
        for _ in range(2):  # the state of the optimizer is there from the second on
            step()
        layers = [layer.backends for _, layer in sb.sparse_layers(model)]
        found["backends"] = {p: Counter(backends[p].name for backends in layers) for p in PASSES if layers}
        return step, found

    def floor(self, model: nn.Module, task: Task, shares: tuple[float, float, float]) -> dict[str, Any]:
        """FLOPs of the products of a step, and the milliseconds that they need at least."""
        bandwidth, speed = self.ceilings
        found = {"flops": 0.0, "floor_ms": 0.0}

        def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            flops = 2 * output.numel() * layer.weight[0].numel()
            moved = 2 * (inputs[0].numel() + output.numel() + layer.weight.numel())
            for share, needed in zip(shares, (True, inputs[0].requires_grad, True), strict=True):
                found["flops"] += needed * share * flops
                found["floor_ms"] += needed * 1e3 * max(share * flops / speed, moved / bandwidth)

        shapes = copy.deepcopy(model).to("meta")
        for module in shapes.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(add)
        shapes(task.x.to("meta").float())
        return found


def note(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", flush=True)


def failure(found: Mapping[str, Any]) -> str:
    return (found.get("error") or found.get("skipped") or "").split("\n")[0][:100]


# -- rows --------------------------------------------------------------------------------------------------------------


def compare_resnets(bench: Bench, row: str, what: str, variants: Mapping[str, Variant]) -> None:
    sizes, device = bench.sizes, bench.device
    x = torch.randn(sizes.batch, 3, sizes.image, sizes.image, device=device)
    y = torch.randint(1000, (sizes.batch,), device=device)
    make = functools.partial(resnet50, sizes.depths, device)
    x = x.contiguous(memory_format=torch.channels_last)
    title = f"ResNet-50, batch {sizes.batch}, {sizes.image} x {sizes.image}: {what}"
    bench.compare(row, title, Task(make, x, lambda output: F.cross_entropy(output, y)), variants)


def unstructured(bench: Bench) -> None:
    variants = {
        "dense": Variant(),
        "ours, scores": Variant(learned),
        "unfused, scores": Variant(unfused),
        "ours, frozen mask": Variant(masked),
        "ours, scores, sb.optim.SGD": Variant(learned, sb.optim.SGD),
        "ours, frozen mask, sb.optim.SGD": Variant(masked, sb.optim.SGD),
    }
    compare_resnets(bench, "a", "unstructured masks", variants)


def sliced(model: nn.Module, **cut: Any) -> nn.Module:
    """The smaller network that channel masks leave."""
    # On the CPU: there TF32 does not disturb the check that the smaller network computes the same.
    return slice_model(channel_masks(model.cpu(), **cut), torch.zeros(1, 3, 64, 64))


def channels(bench: Bench) -> None:
    example = channel_masks(resnet50(bench.sizes.depths, bench.device), **INNER_ONLY)
    costs = count_costs(example, (3, bench.sizes.image, bench.sizes.image))
    left = costs.flops_theoretical / costs.flops_dense
    variants = {
        "dense": Variant(),
        "inner channels, masks": Variant(functools.partial(channel_masks, **INNER_ONLY), shares=(left, left, left)),
        "inner channels in multiples of 32, sliced": Variant(functools.partial(sliced, **INNER_32)),
        "tied stages in multiples of 32, sliced": Variant(functools.partial(sliced, **TIED_32)),
        "tied stages in multiples of 64, sliced": Variant(functools.partial(sliced, **TIED_64)),
    }
    compare_resnets(bench, "b", "channel masks", variants)


def memory(bench: Bench) -> None:
    """Bytes a weight beyond the dense network, at each stage of `footprint`."""
    width, count, device = bench.sizes.width, bench.sizes.linears, bench.device

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False, device=device) for _ in range(count)))

    def collecting(model: nn.Module) -> nn.Module:
        for _, layer in sb.sparse_layers(kept(model)):
            layer.collect("all")
        return model

    x = torch.randn(64, width, device=device, dtype=torch.bfloat16)
    task = Task(make, x, lambda output: output.float().square().mean())
    kept = functools.partial(masked, sparsity=0.0, init="dense")  # what masks hold takes no memory
    variants = {"frozen mask": kept, "scores": functools.partial(kept, scores=True), "G collected": collecting}
    footprint(lambda model: model, task)  # what libraries allocate once
    dense = footprint(lambda model: model, task)
    rows: dict[str, dict[str, Any]] = {}
    for name, convert in variants.items():
        rows[name] = found = bench.guard(functools.partial(footprint, convert, task))
        note(f"c {name}: {failure(found) or 'measured'}")
        found |= {stage: (found[stage] - dense[stage]) / (count * width**2) for stage in dense if stage in found}
    title = f"{count} linear layers {width} x {width}, {len(x)} tokens: bytes a weight beyond dense"
    title += "" if device.type == "cuda" else " (not counted on a CPU)"
    bench.keep("c", {"title": title, "bytes_a_weight": rows, "dense_bytes": dense})
    cells = [[n, *(f"{f[s]:.3f}" if s in f else "-" for s in dense), failure(f)] for n, f in rows.items()]
    print(f"\n{title}\n\n{markdown_table(['', *dense, ''], cells)}\n", flush=True)


def footprint(convert: Callable[[nn.Module], nn.Module], task: Task) -> dict[str, int]:
    """Bytes as built (masks, scores), between steps (compute copies too), with gradients, and at most in a step."""
    on_gpu = task.x.is_cuda
    allocated = torch.cuda.memory_allocated if on_gpu else lambda: 0
    gc.collect()
    before = allocated()
    model = convert(task.make())
    found = {"built": allocated() - before}
    for _ in range(2):  # the second with everything there that is kept
        model.zero_grad()
        for _, layer in sb.sparse_layers(model):
            layer.zero_effective_grad()
        found["between"] = allocated() - before
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(task.x.device.type, torch.bfloat16):
            loss = task.loss(model(task.x))
        loss.backward()
        del loss
        found["gradients"] = allocated() - before
        found["peak"] = (torch.cuda.max_memory_allocated() if on_gpu else 0) - before
    return found


def mlp(bench: Bench) -> None:
    width, device = bench.sizes.width, bench.device

    def make() -> nn.Module:
        torch.manual_seed(0)
        into, out_of = ((width, 4 * width), (4 * width, width))
        return nn.Sequential(nn.Linear(*into, device=device), nn.GELU(), nn.Linear(*out_of, device=device))

    x = torch.randn(bench.sizes.tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    left = 1 - SPARSITY
    blocks = {"pattern": "block:64x64"}
    variants = {
        "dense": Variant(),
        "unstructured, scores": Variant(learned),
        "unstructured, scores, one gradient": Variant(sharing, sb.optim.SGD),
        "blocks, scores": Variant(functools.partial(learned, **blocks), shares=(left, left, 1.0)),
        "blocks, scores, one gradient": Variant(
            functools.partial(sharing, **blocks), sb.optim.SGD, shares=(left, left, 1.0)
        ),
        "blocks, scores in a search space of 5 %": Variant(
            functools.partial(searching, share=0.05, **blocks), shares=(left, left, left + 0.05 * SPARSITY)
        ),
        "blocks, frozen mask": Variant(functools.partial(masked, **blocks), shares=(left, left, left)),
    }
    title = f"MLP {width} -> {4 * width} -> {width}, {len(x)} tokens, blocks of 64 x 64"
    bench.compare("d", title, Task(make, x, lambda output: (output * dy).sum()), variants)


def compiled(bench: Bench) -> None:
    variants = {
        "dense": Variant(),
        "ours, scores, compiled": Variant(learned, compiled=True),
        "unfused, scores, compiled": Variant(unfused, compiled=True),
        "dense, compiled": Variant(compiled=True),
    }
    compare_resnets(bench, "e", "torch.compile", variants)


def compiled_channels(bench: Bench) -> None:
    variants = {
        "dense": Variant(compiled=True),
        "inner channels in multiples of 32, sliced": Variant(functools.partial(sliced, **INNER_32), compiled=True),
        "tied stages in multiples of 32, sliced": Variant(functools.partial(sliced, **TIED_32), compiled=True),
        "dense, eager": Variant(),
    }
    compare_resnets(bench, "f", "channel masks, torch.compile", variants)


ROWS = {"a": unstructured, "b": channels, "c": memory, "d": mlp, "e": compiled, "f": compiled_channels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), metavar="a,b,...", help="which, in this order")
    parser.add_argument(
        "--budget",
        type=float,
        default=420.0,
        metavar="SECONDS",
        help="nothing is begun after them; what is compiling then goes on",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_training.json")
    parser.add_argument("--quick", action="store_true", help="small sizes: only see that all runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    chosen = options.rows.split(",")
    if not set(chosen) <= set(ROWS):
        parser.error(f"--rows={options.rows} is not known; allowed: {', '.join(ROWS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    bench = Bench(torch.device(options.device), QUICK if options.quick else Sizes(), options.budget, options.output)
    for row in chosen:
        if failed := bench.guard(functools.partial(ROWS[row], bench)):
            if row not in bench.results["rows"]:  # what was found before is worth more
                bench.keep(row, failed)
            note(f"{row}: {failure(failed)}")
    note(f"written to {options.output}")


if __name__ == "__main__":
    main()
