"""Gradient tracking: each worker follows the mean of all workers' gradients, not its own.

    combine-then-adapt   X <- mix(X) - lr u,      u <- mix(u) + v_new - v_old
    adapt-then-combine   X <- mix(X - lr u),      u <- mix(u + v_new - v_old)

u and v start from zero; then the mean of u over the workers is that of v at every step. Without tracking u is v, and
workers whose data differ settle at a distance from the solution, and from each other, that is proportional to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .gossip import Gossip, Values

TRACKING = ("none", "cta", "atc")


class TrackedStep:
    """Gossip steps on one variable of all workers of this process.

    Args:
        gossip: mixes.
        tracking: ``none``, ``cta`` or ``atc``.
        kind: of the variable, for the byte counters; trackers count as ``trackers``.
    """

    def __init__(self, gossip: Gossip, tracking: str, kind: str) -> None:
        if tracking not in TRACKING:
            raise ValueError(f"tracking={tracking!r} is not known; allowed: {', '.join(TRACKING)}")
        self.gossip, self.kind = gossip, kind
        # One worker tracks its own gradient: rounding of u + v - v would be the only difference.
        self.tracking = tracking if gossip.topology.size > 1 else "none"
        self.tracker: Values = {}
        self.gradient: Values = {}

    def restart(self) -> None:
        """Start again from zero at the next step: what a lost worker took along must not be followed any longer."""
        self.tracker, self.gradient = {}, {}

    def __call__(
        self,
        values: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        lr: float,
        masks: Mapping[int, Tensor] | None = None,
        limit: Callable[[Tensor], Tensor] | None = None,
    ) -> Values:
        """The variables after one step.

        Args:
            values: the variables X.
            gradients: estimates v at them.
            lr: step size.
            masks: bool; nothing changes, and nothing is sent, outside of them.
            limit: changes the step ``lr u`` before it is taken (clipping).
        """
        trackers = self._track(gradients, masks)
        steps = {}
        for k, u in trackers.items():
            step = lr * u
            if limit is not None:
                step = limit(step)
            steps[k] = step if masks is None else step * masks[k]
        if self.tracking == "cta":
            mixed = self.gossip.mix(values, self.kind, masks)
            return {k: v - steps[k] for k, v in mixed.items()}
        return self.gossip.mix({k: v - steps[k] for k, v in values.items()}, self.kind, masks)

    def _track(self, gradients: Mapping[int, Tensor], masks: Mapping[int, Tensor] | None) -> Values:
        if self.tracking == "none":
            return dict(gradients)
        if not self.tracker:  # workers that start later than others still send as many messages
            self.tracker = {k: torch.zeros_like(g) for k, g in gradients.items()}
            self.gradient = self.tracker
        change = {k: g - self.gradient[k] for k, g in gradients.items()}
        variable = f"trackers of {self.kind}"
        if self.tracking == "cta":
            mixed = self.gossip.mix({k: self.tracker[k] for k in gradients}, "trackers", masks, variable)
            self.tracker = {k: u + change[k] for k, u in mixed.items()}
        else:
            moved = {k: self.tracker[k] + change[k] for k in gradients}
            self.tracker = self.gossip.mix(moved, "trackers", masks, variable)
        self.gradient = dict(gradients)
        return self.tracker

    def state_dict(self, k: int) -> dict[str, Tensor]:
        """What the checkpoint of worker k must hold; nothing before the first step, or without tracking."""
        parts = {"tracker": self.tracker, "gradient": self.gradient}
        return {name: values[k] for name, values in parts.items() if k in values}

    def load_state_dict(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Continue from ``state_dict(k)``."""
        if state:
            self.tracker[k], self.gradient[k] = state["tracker"], state["gradient"]
