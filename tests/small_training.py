"""A tiny network and its training loop, for the tests of the methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import sparsebilevel as sb


def tiny_net() -> nn.Module:
    """Two convolutions, a normalization and a classifier, for inputs [N, 2, 6, 6]; 54*2 + 54*8 + 72*5 weights."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


def sparse_net(sparsity=0.8, seed=0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return sb.sparsify(tiny_net(), sparsity, seed=seed, **kwargs)


def batch(step: int, size: int = 8, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same data for the same step, whatever was drawn before."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(size, 2, 6, 6, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def sgd(model: nn.Module, lr: float = 0.05, **kwargs) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, **{"momentum": 0.9, "weight_decay": 5e-4} | kwargs)


def compute_loss(model: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def take_step(model, optimizer, sparsifier, step: int) -> bool:
    """One step of the user's loop, with an upper step first where the method has one."""
    if isinstance(sparsifier, sb.BiP) and not sparsifier.finished:
        sparsifier.upper_step(lambda: compute_loss(model, 10_000 + step))
    optimizer.zero_grad()
    loss = compute_loss(model, step)
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    return sparsifier.step()


def train(model, optimizer, sparsifier, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        take_step(model, optimizer, sparsifier, step)


def masks_of(sparsifier) -> dict[str, torch.Tensor]:
    return {name: masked.mask.clone() for name, masked in sparsifier.weights.items()}


def same_masks(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dense_gradients(model: nn.Module, loss_of) -> dict[str, torch.Tensor]:
    """dloss/d(mask * theta) by plain autograd on a densified copy: what the library's collection must equal."""
    names = [name for name, _ in sb.sparse_layers(model)]
    dense = sb.densify(model)
    loss_of(dense).backward()
    return {name: dense.get_submodule(name).weight.grad for name in names}
