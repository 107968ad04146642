"""What one upper step of BiP costs: ours against the way the published code works.

Ours is one forward and backward pass, the closed-form hypergradient, and an exact selection of the k largest scores.
The published code forms the upper-level direction from *two* forward and backward passes (all parameters trainable,
then the weights frozen) beside the lower level's own, and sorts all scores in every forward pass. Here its way of
working is written out on the same network and batch: same masks, same arithmetic, no code of theirs.

    pytest benchmarks/bench_bip_step.py          # pytest-benchmark's table
    python benchmarks/bench_bip_step.py          # interleaved medians -> results/bip_step.json
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timing import interleave, write_result
from torch import Tensor, nn

import sparsebilevel as sb
from sparsebilevel.models import create_model

BATCH, SPARSITY = 128, 0.9
ARCHITECTURES = ("resnet20", "resnet18_cifar")


class SortedTopK(torch.autograd.Function):
    """Straight-through global top-k of |scores| by a full sort, as the released code does in every forward pass."""

    @staticmethod
    def forward(ctx, k: int, *scores: Tensor):
        flat = torch.cat([s.abs().flatten() for s in scores])
        order = flat.argsort()
        mask = torch.zeros_like(flat)
        mask[order[-k:]] = 1
        ctx.save_for_backward(*scores)
        return tuple(m.view_as(s) for m, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        return None, *(g * s.sign() for g, s in zip(grads, ctx.saved_tensors, strict=True))


class PublishedUpperStep:
    """The upper level as the released code takes it: two passes, an element-wise product of their gradients, a step."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        names = {id(m): name for name, m in model.named_modules()}
        self.weight_names = [f"{names[id(m)]}.weight" for m in layers]
        self.weights = [m.weight for m in layers]
        self.scores = [w.detach().clone().requires_grad_() for w in self.weights]
        self.k = round((1 - SPARSITY) * sum(w.numel() for w in self.weights))

    def _gradients(self, inputs: list[Tensor]) -> list[Tensor]:
        masks = SortedTopK.apply(self.k, *self.scores)
        masked = {n: w * m for n, w, m in zip(self.weight_names, self.weights, masks, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(self.model, masked, (self.x,)), self.y)
        return list(torch.autograd.grad(loss, inputs))

    def __call__(self) -> None:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        everything = self._gradients([*self.scores, *trainable])[: len(self.scores)]
        scores_only = self._gradients(self.scores)
        with torch.no_grad():
            for s, q1, q2 in zip(self.scores, everything, scores_only, strict=True):
                s.sub_(q2 - 1e-4 * q1 * q2, alpha=0.1)


def make_variants(arch: str) -> dict:
    """The same network and batch three times: a dense training pass, our upper step, the published one."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    dense, ours, published = (create_model(arch).to(memory_format=torch.channels_last) for _ in range(3))
    sb.sparsify(ours, SPARSITY, init="dense")
    bip = sb.BiP(ours, torch.optim.SGD(ours.parameters(), lr=0.1))

    def dense_pass() -> None:
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()

    return {
        "dense forward + backward": dense_pass,
        "upper step, ours": lambda: bip.upper_step(lambda: F.cross_entropy(ours(x), y)),
        "upper step, published way": PublishedUpperStep(published, x, y),
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("variant", ["dense forward + backward", "upper step, ours", "upper step, published way"])
def bench_upper_step(benchmark, arch: str, variant: str) -> None:
    benchmark.group = f"BiP upper step, {arch}, batch {BATCH}"
    benchmark.pedantic(make_variants(arch)[variant], rounds=5, warmup_rounds=1)


def main() -> None:
    figures = {}
    for arch in ARCHITECTURES:
        times = interleave(make_variants(arch), rounds=9 if arch == "resnet20" else 5, warmup=1)
        base = times["dense forward + backward"]["ms"]
        for name, row in times.items():
            row["ratio_to_dense_pass"] = row["ms"] / base
            print(f"{arch:16} {name:28} {row['ms']:9.1f} ms  {row['ratio_to_dense_pass']:.2f}x", flush=True)
        figures[arch] = times
    print(write_result("bip_step", {"batch": BATCH, "sparsity": SPARSITY, "dtype": "float32", "figures": figures}))


if __name__ == "__main__":
    main()
