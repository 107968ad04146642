"""What a client computes: steps of its optimizer on a module whose parameters are one vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.runtime import rng_state, set_rng_state

Batch = tuple[Tensor, Tensor]


class FlatModule:
    """A module's parameters as one vector ``values`` [P], and their gradients as another, ``gradient`` [P].

    The parameters become views of ``values``; what is written there, the module computes with, in `gradient_of`, and
    otherwise after `load`. ``statistics`` [B] are the floating buffers (running means and variances of batch
    normalization), which are averaged like parameters; counters start anew when they are loaded. ``trained`` [P], bool,
    has not the parameters that are frozen (``requires_grad=False``), or is None if there are none.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = dict(module.named_parameters())
        self.values = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.gradient = torch.zeros_like(self.values)
        self.spans: dict[str, slice] = {}
        start = 0
        for name, p in named.items():
            self.spans[name] = span = slice(start, start + p.numel())
            p.data = self.values[span].view(p.shape)
            p.grad = self.gradient[span].view(p.shape)
            start = span.stop
        self._parameters = list(named.values())
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        counters = [b for b in module.buffers() if not b.is_floating_point() and b.dtype != torch.bool]
        self._counters = [(b, b.clone()) for b in counters]
        self.trained: Tensor | None = None
        if not all(p.requires_grad for p in self._parameters):
            which = torch.tensor([p.requires_grad for p in self._parameters])
            self.trained = which.repeat_interleave(torch.tensor([p.numel() for p in self._parameters])).to(
                self.values.device
            )

    @property
    def statistics(self) -> Tensor:
        return torch.cat([b.reshape(-1) for b in self._buffers]) if self._buffers else self.values.new_zeros(0)

    def load(self, values: Tensor, statistics: Tensor | None = None) -> None:
        """Compute with these from now on; they are copied."""
        self.values.copy_(values)
        self._note_written()
        if statistics is not None:
            parts = statistics.split([b.numel() for b in self._buffers]) if self._buffers else ()
            for buffer, part in zip(self._buffers, parts, strict=True):
                buffer.copy_(part.view(buffer.shape))
            for counter, first in self._counters:
                counter.copy_(first)

    def _note_written(self) -> None:
        """Views made through ``.data`` have versions of their own, by which layers know that a masked copy is old."""
        torch.autograd.graph.increment_version(self._parameters)

    def add_decay(self, gradient: Tensor, values: Tensor, weight_decay: float) -> Tensor:
        """The gradient with that of the weight decay, of which frozen parameters have none."""
        return gradient.add(values if self.trained is None else values * self.trained, alpha=weight_decay)

    def gradient_of(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """``loss()`` without its graph, and its gradient [P], which the next call overwrites."""
        self._note_written()
        self.gradient.zero_()
        value = loss()
        value.backward()
        return value.detach(), self.gradient


def sgd(values: Tensor, gradient: Tensor, momentum: Tensor, lr: float, decay: float) -> None:
    """One step as torch's SGD takes it (momentum = decay * momentum + gradient), in place."""
    momentum.mul_(decay).add_(gradient)
    values.sub_(momentum, alpha=lr)


def adamw(
    values: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step as torch's AdamW takes it, in place; ``step`` counts from 1."""
    values.mul_(1 - lr * weight_decay)
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
    values.addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** step))


def train_weights(
    flat: FlatModule,
    batches: Iterable[Batch],
    start: Tensor,
    momentum: Tensor,
    lr: float,
    decay: float,
    weight_decay: float,
    mime: str = "",
    correction: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Local steps from ``start``, which ``flat`` holds; it holds the new weights afterwards.

    Without ``mime`` these are steps of SGD with momentum, whose state changes with them. Mime (Karimireddy et al. 2020)
    keeps the state m that the server has: y <- y - lr (g + decay m), with g the gradient at y (``mime_lite``) or that
    minus the gradient at ``start`` on the same batch plus ``correction``, the clients' mean full gradient (``mime``).
    Weight decay is part of every gradient.

    Args:
        flat: the network.
        batches: (inputs [n, ...], int64 targets [n]), one a step.
        start, momentum, correction: float [P].
        lr, decay, weight_decay: of SGD; ``decay`` is its momentum factor.
        mime: empty, ``mime_lite`` or ``mime``.

    Returns:
        The momentum after the steps (with Mime unchanged), and sums over the samples: ``loss``, ``correct``, ``count``.
    """
    momentum = momentum.clone()
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in batches:

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            logits = flat.module(x)
            with torch.no_grad():
                hits = (logits.argmax(1) == y).sum()
            value = F.cross_entropy(logits, y)
            sums.add_(torch.tensor([len(y) * value.item(), float(hits), float(len(y))], dtype=torch.float64))
            return value

        draws = rng_state(flat.values.device)
        gradient = flat.add_decay(flat.gradient_of(loss)[1], flat.values, weight_decay)
        if not mime:
            sgd(flat.values, gradient, momentum, lr, decay)
            continue
        if mime == "mime":
            assert correction is not None
            here = flat.values.clone()
            # Statistics of normalization are those of the passes that train, so this one leaves none.
            buffers = [b for b in flat.module.buffers() if b.dtype != torch.bool]
            before = [b.clone() for b in buffers]
            flat.load(start)
            set_rng_state(flat.values.device, draws)  # both are gradients of one function, the same units dropped
            there = flat.gradient_of(lambda x=x, y=y: F.cross_entropy(flat.module(x), y))[1]  # type: ignore[misc]
            gradient += correction - flat.add_decay(there, start, weight_decay)
            flat.load(here)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        flat.values.sub_(gradient.add(momentum, alpha=decay), alpha=lr)
    return momentum, dict(zip(("loss", "correct", "count"), sums.tolist(), strict=True))


def full_gradient(flat: FlatModule, batches: Iterable[Batch], weight_decay: float) -> Tensor:
    """Gradient of the mean loss over all samples of ``batches`` at the weights that ``flat`` holds, float [P]."""
    total, count = torch.zeros_like(flat.values), 0
    for x, y in batches:
        total += flat.gradient_of(lambda x=x, y=y: F.cross_entropy(flat.module(x), y, reduction="sum"))[1]  # type: ignore[misc]
        count += len(y)
    return flat.add_decay(total / count, flat.values, weight_decay)
