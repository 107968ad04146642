"""What open gates cost, penalties for more than a budget, and gates that keep to one.

Two counts, which differ and must not be mixed up:

- ``T``, DWNP's measure, drives the constraint: multiply-adds plus three per output number, of the convolutions that
  gates touch and of nothing else. It is differentiable in the gates.
- the true FLOPs, two per multiply-add of all convolutions and linear layers, as `sparsebilevel.costs` counts them; the
  sliced network has exactly these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .._checks import check_number
from ..costs import count_costs
from .models import GatePoint, forward_positions, gate_sizes, is_depthwise


class GateCosts:
    """Costs of a network as functions of its gates, computed on the CPU.

    Args:
        model: dense, with all channels.
        points: its gate points.
        input_shape: (C, H, W) of one sample.

    Attributes:
        sizes: channels of every gate point.
        total: T of all gates open, an int (ResNet-56 on CIFAR-10: 126,590,976).
        true_total: FLOPs of the whole network, an int.
        least: T of one channel at each gate point, as a fraction of the total: no budget below it can be met.

    DWNP's code divides a depth-wise convolution's cost by its first number of groups, which makes it quadratic in the
    open channels. Here it is what the sliced network has, linear in them; the total is the same.
    """

    def __init__(self, model: nn.Module, points: Sequence[GatePoint], input_shape: Sequence[int]) -> None:
        self.sizes = gate_sizes(model, points)
        positions = forward_positions(model, input_shape)
        inputs = {point.consumer: i for i, point in enumerate(points)}
        outputs = {name: i for i, point in enumerate(points) for name in (point.producer, *point.channelwise)}
        rows = []  # output positions, kernel positions, channels in and out, and the gate points these depend on
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and (name in inputs or name in outputs):
                kernel = module.weight[0, 0].numel()
                each = 1 if is_depthwise(module) else module.in_channels // module.groups
                rows.append((positions[name], kernel, each, module.out_channels, inputs.get(name), outputs.get(name)))
        where, kernels, ins, outs, in_points, out_points = zip(*rows, strict=True)
        self._positions, self._kernels, self._in, self._out = (
            torch.tensor(column, dtype=torch.float64) for column in (where, kernels, ins, outs)
        )
        none = len(points)
        self._in_point, self._out_point = (
            torch.tensor([none if p is None else p for p in column]) for column in (in_points, out_points)
        )
        self._group = torch.arange(none).repeat_interleave(torch.tensor(self.sizes))
        every = torch.ones(sum(self.sizes))
        self.total = int(self(every))
        self._fixed = count_costs(model, input_shape).flops_dense - 2 * int(self._multiply_adds(every).sum())
        self.true_total = self.true_flops(every)
        one = torch.zeros_like(every)
        one[torch.tensor(self.sizes).cumsum(0) - 1] = 1
        self.least = float(self.ratio(one))

    def _channels(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Open channels in and out of every convolution, float64 ``[convolutions]``."""
        if gates.shape != (sum(self.sizes),):
            raise ValueError(f"gates of shape {list(gates.shape)} do not fit; expected [{sum(self.sizes)}]")
        sums = torch.zeros(len(self.sizes) + 1, dtype=torch.float64).index_add(
            0, self._group, gates.to(self._group.device, torch.float64)
        )
        none = len(self.sizes)
        into = torch.where(self._in_point == none, self._in, sums[self._in_point])
        return into, torch.where(self._out_point == none, self._out, sums[self._out_point])

    def _multiply_adds(self, gates: Tensor) -> Tensor:
        into, out = self._channels(gates)
        return self._positions * self._kernels * into * out

    def __call__(self, gates: Tensor) -> Tensor:
        """T of gates ``[G]`` in [0, 1], a float64 scalar with a gradient."""
        _, out = self._channels(gates)
        return (self._multiply_adds(gates) + 3 * self._positions * out).sum()

    def ratio(self, gates: Tensor) -> Tensor:
        """T / ``total``, a float64 scalar with a gradient."""
        return self(gates) / self.total

    def true_flops(self, gates: Tensor) -> int:
        """FLOPs of a forward pass of the network that has only the channels with gates 1 (or True), ``[G]``."""
        return self._fixed + 2 * int(self._multiply_adds(gates.detach()).sum())

    def kept(self, gates: Tensor) -> list[int]:
        """Open channels of every gate point."""
        return [int(part.sum()) for part in gates.split(self.sizes)]

    # -- gates within a budget ----------------------------------------------------------------------------------------

    def fit(
        self,
        logits: Tensor,
        budget: float,
        within: Tensor | None = None,
        threshold: float = 0.0,
        fill: bool = False,
    ) -> Tensor:
        """The gates to export: those with the largest logits, of which T is at most ``budget * total``.

        Open are the gates above ``threshold``. If they cost too much, those with the smallest logits are closed, as few
        as will do; their number is found by bisection. Each gate point keeps its best channel.

        Args:
            logits: ``[G]``, of a hypernetwork or any score.
            budget: fraction of ``total``, in (0, 1].
            within: bool ``[G]``; only these may be open (a device's, within the server's).
            threshold: of an open gate.
            fill: also open gates below the threshold, largest first, and pass over those that the budget does not
                allow; so T is less than the cheapest gate below it, if any gate may still be opened.

        Returns:
            bool ``[G]``.

        Raises:
            ValueError: one channel a gate point costs more than the budget; NaN logits.
        """
        check_number("budget", budget, most=1, without_least=True)
        if logits.isnan().any():
            raise ValueError("logits has NaNs")
        allowed = torch.ones_like(logits, dtype=torch.bool) if within is None else within
        scores = logits.detach().double().masked_fill(~allowed, -torch.inf)
        best = torch.zeros_like(allowed)
        start = 0
        for size in self.sizes:
            best[start + int(scores[start : start + size].argmax())] = True
            start += size
        order = torch.argsort(scores, descending=True, stable=True)
        candidates = allowed if fill else allowed & (logits > threshold)
        order = order[(candidates & ~best)[order]]

        def kept(count: int) -> Tensor:
            chosen = best.clone()
            chosen[order[:count]] = True
            return chosen

        def is_affordable(count: int) -> bool:
            return float(self(kept(count))) <= budget * self.total

        if not is_affordable(0):
            least = float(self.ratio(best))
            raise ValueError(f"budget={budget} cannot be met: one channel at each gate point costs {least:.4f} of all")
        low, high = 0, len(order)
        while low < high:  # the largest affordable count: low is one, and above high none
            middle = (low + high + 1) // 2
            low, high = (middle, high) if is_affordable(middle) else (low, middle - 1)
        chosen = kept(low)
        for gate in order[low:].tolist() if fill else ():
            chosen[gate] = True  # the next one is too dear, one of a cheaper layer may not be
            chosen[gate] = float(self(chosen)) <= budget * self.total
        return chosen


def budget_penalty(ratio: Tensor, budget: float, two_sided: bool = False) -> Tensor:
    """How much a cost is above its budget: log(max(ratio, budget) / budget), R of DWNP's equation 6.

    Args:
        ratio: T / total, scalar.
        budget: fraction of the total, in (0, 1].
        two_sided: the code's: a cost below the budget is penalized too, log(budget / ratio), and within 0.005 of it
            there is no gradient.
    """
    check_number("budget", budget, most=1, without_least=True)
    if not two_sided:
        return torch.log(ratio.clamp(min=budget) / budget)
    if ratio > budget:
        return torch.log(ratio.clamp(min=budget + 0.005) / budget)
    return torch.log(budget / ratio.clamp(max=budget - 0.005))


def parse_budgets(name: str, text: str | float | Sequence[float], clients: int, seed: int = 0) -> list[float]:
    """A budget for every device.

    Args:
        name: what messages call it.
        text: one number for all; a list, or numbers with commas, one for each; ``"uniform:LOW:HIGH"`` draws them.
        clients: number of devices.
        seed: of the draws.
    """
    try:
        if isinstance(text, str) and text.startswith("uniform:"):
            low, high = (float(part) for part in text.removeprefix("uniform:").split(":"))
            if not 0 <= low <= high <= 1:
                raise ValueError
            budgets = np.random.default_rng(seed).uniform(low, high, clients).tolist()
        else:
            parts = text.split(",") if isinstance(text, str) else [text] if isinstance(text, (int, float)) else text
            budgets = [float(part) for part in parts]
            budgets = budgets * clients if len(budgets) == 1 else budgets
        if len(budgets) != clients or not all(0 < budget <= 1 for budget in budgets):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name}={text!r} is not allowed; expected a fraction in (0, 1], {clients} of them with commas, or "
            "uniform:LOW:HIGH"
        ) from None
    return budgets
