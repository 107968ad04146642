"""Data, model and optimizer of a training run, from its `Config`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data import Data, list_data, load_data
from ..models import create_model
from ..optim import SGD, AdamW
from .config import Config
from .runtime import Ranks


def make_data(c: Config, ranks: Ranks) -> Data:
    """The loaders of this rank, on its device."""
    if c.data not in list_data():
        raise ValueError(f"data={c.data!r} is not known; allowed: {', '.join(list_data())}")
    names = ("batch_size", "eval_batch_size", "augment", "validation", "seed", "channels_last", "image_size")
    options: dict[str, Any] = {name: getattr(c, name) for name in (*names, "num_classes", "num_samples")}
    place: dict[str, Any] = {"device": ranks.device, "rank": ranks.rank, "world_size": ranks.world}
    return load_data(c.data, c.data_path, num_workers=c.workers, **place, **options)


def create_network(arch: str, num_classes: int, input_shape: Sequence[int]) -> nn.Module:
    """The dense network of that name for samples of ``input_shape`` (C, H, W): `mlp` takes all of their numbers."""
    return create_model(arch, num_classes, math.prod(input_shape) if arch == "mlp" else input_shape[0])


def make_model(c: Config, data: Data, device: torch.device) -> nn.Module:
    """The dense network, with random weights from torch's global generator."""
    model: Any = create_network(c.arch, data.num_classes, data.input_shape).to(device)
    size, wanted = data.input_shape[1], getattr(model, "image_size", None)  # which vision transformers have
    if wanted not in (size, None):
        raise ValueError(
            f"image_size={c.image_size}: {c.arch} takes images of {wanted}x{wanted}, and those of {c.data} are "
            f"{size}x{size}; give image_size={wanted} (imagefolder and fake have one) or another arch"
        )
    check_runs(model, c.arch, data.input_shape, device)
    return model.to(memory_format=torch.channels_last) if c.channels_last else model


@torch.no_grad()
def check_runs(model: nn.Module, arch: str, shape: Sequence[int], device: torch.device | None = None) -> None:
    """Raise ValueError if samples of that shape are too small for the network ``arch``, or it gives no logits."""
    model.eval()
    try:
        logits = model(torch.zeros(1, *shape, device=device))
    except RuntimeError as error:
        size = "x".join(map(str, shape))
        raise ValueError(f"arch={arch!r} does not run on samples of shape {size}: {error}") from error
    finally:
        model.train()
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"arch={arch!r} returns a {type(logits).__name__}; expected logits")


def make_optimizer(c: Config, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW with two groups: weights, and the biases and normalization layers ("norm")."""
    small = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "norm": False}]
    groups += [{"params": small, "norm": True}] if small else []
    if c.opt == "adamw":
        return AdamW(groups, lr=c.lr, weight_decay=c.weight_decay)
    return SGD(groups, c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov)
