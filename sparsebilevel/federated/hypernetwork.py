"""Gates from a hypernetwork: which channels the server and each device have (Gao et al. 2024, DWNP, sections 3.3-3.5).

Every sub-network has an embedding; a recurrent network over the gate points turns it into logits, one a channel. A
logit above 0 is an open gate. In training the gates are drawn, and gradients go straight through the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_number

NOISES = ("logistic", "gumbel")


class Hypernetwork(nn.Module):
    """Logits of all gates, of the server (0) and the devices (1 to ``clients``).

    Args:
        sizes: channels of every gate point.
        clients: devices; 0 for a network that all share.
        shared: one recurrent network and one embedding table for server and devices, as the paper has it; False: one
            for each, the server's with fixed orthogonal inputs, as in the paper's code.
        base: is added to the logits, so that all gates are open at first.
        features: of the embedding, for each gate point.
        hidden: of the recurrent network, in each of its two directions.

    The heads are weight-normalized, but for those of the devices' own network with ``shared=False`` (as in the code).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        clients: int,
        *,
        shared: bool = True,
        base: float = 3.0,
        features: int = 64,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes={list(sizes)!r} is not allowed; expected the channels of at least one gate point")
        if clients < 0:
            raise ValueError(f"clients={clients} is not allowed; expected at least 0")
        self.base, self.shared, self.clients = base, shared, clients
        self.points = len(sizes)
        self.server = _Generator(sizes, features, hidden, normalized=True)
        self.embedding: nn.Embedding | None = None
        self.devices: _Generator | None = None
        if shared:
            self.embedding = nn.Embedding(clients + 1, self.points * features)
        else:
            self.register_buffer("inputs", nn.init.orthogonal_(torch.zeros(self.points, features)))
            if clients:
                self.embedding = nn.Embedding(clients, self.points * features)
                self.devices = _Generator(sizes, features, hidden, normalized=False)

    def forward(self, which: Tensor) -> Tensor:
        """Logits ``[B, G]`` of sub-networks ``which``, int64 ``[B]``; G is the sum of ``sizes``."""
        if self.shared:
            assert self.embedding is not None
            return self.base + self.server(self.embedding(which).unflatten(1, (self.points, -1)))
        rows = []
        for number in which.tolist():
            if number == 0:
                rows.append(self.server(self.inputs[None]))  # type: ignore[index]
            else:
                assert self.embedding is not None
                assert self.devices is not None
                embedded = self.embedding(which.new_tensor([number - 1]))
                rows.append(self.devices(embedded.unflatten(1, (self.points, -1))))
        return self.base + torch.cat(rows)

    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of the server ``[G]`` and of all devices ``[clients, G]``, without gradients."""
        every = self(torch.arange(self.clients + 1))
        return every[0], every[1:]


class _Generator(nn.Module):
    """Embeddings ``[B, points, features]`` to logits ``[B, G]``: the gate points are the sequence of a two-way GRU."""

    def __init__(self, sizes: Sequence[int], features: int, hidden: int, normalized: bool) -> None:
        super().__init__()
        self.gru = nn.GRU(features, hidden, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)
        heads = [nn.Linear(2 * hidden, size, bias=False) for size in sizes]
        self.heads = nn.ModuleList(nn.utils.parametrizations.weight_norm(h) if normalized else h for h in heads)

    def forward(self, embedded: Tensor) -> Tensor:
        states, _ = self.gru(embedded.transpose(0, 1))
        states = F.relu(self.norm(states))
        return torch.cat([head(state) for head, state in zip(self.heads, states, strict=True)], 1)


def sample_gates(
    logits: Tensor,
    temperature: float = 0.4,
    noise: str = "logistic",
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random gates whose gradient is that of a soft gate: sigmoid((logits + noise) / temperature).

    Args:
        logits: floating, any shape.
        temperature: above 0; the smaller, the nearer a soft gate is to 0 or 1.
        noise: ``logistic``, the difference of two Gumbel numbers, is the Gumbel-sigmoid of Jang et al. 2016, with
            P(open) = sigmoid(logits); ``gumbel`` is one such number, as in DWNP's code, with
            P(open) = 1 - exp(-exp(logits)), which leaves hardly a gate closed until its logit is near 0.
        hard: give 0 or 1, with the soft gate's gradient (straight through); False: the soft gate itself.
        generator: of the noise.
    """
    _check_noise(noise)
    check_number("temperature", temperature, without_least=True)
    tiny = torch.finfo(logits.dtype).tiny
    where = logits.device if generator is None else generator.device  # a generator's numbers are the same everywhere
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=where).to(logits.device)
    uniform = uniform.clamp(tiny, 1 - torch.finfo(logits.dtype).eps)
    drawn = uniform.log() - torch.log1p(-uniform) if noise == "logistic" else -torch.log(-uniform.log())
    soft = torch.sigmoid((logits + drawn) / temperature)
    return soft if not hard else (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


def _check_noise(noise: str) -> None:
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} is not known; allowed: {', '.join(NOISES)}")


def open_threshold(noise: str = "logistic") -> float:
    """The logit above which a drawn gate is more often open than closed: 0, or ln ln 2 for ``gumbel``."""
    _check_noise(noise)
    return 0.0 if noise == "logistic" else math.log(math.log(2))


def merge_gates(server: Tensor, device: Tensor) -> Tensor:
    """Gates of a device inside the server's: server * device, where ``server`` is at least 0.5, else ``server``.

    Where the server's gate is closed, no gradient reaches the device's (section 3.5: devices should not update what the
    server pruned).

    Args:
        server, device: floating, of shapes that broadcast.
    """
    return server * torch.where(server < 0.5, torch.ones_like(device), device)
