"""Dynamic sparse training by rule: Static, SET and RigL. Weights are stored sparse, counts are fixed."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number
from ..kernels import binarize
from ..masks import NM
from ..schedules import cosine_drop_fraction
from .base import MaskedWeight, Sparsifier, logger, naming


class Static(Sparsifier):
    """A fixed mask for the whole of training: the random control every method must beat."""


class SET(Sparsifier):
    """Sparse evolutionary training (Mocanu et al. 2018), with RigL's schedule: drop the smallest, grow at random.

    At a change each layer drops the fraction ``f_t`` of its active groups with the smallest ``|theta|`` and grows as
    many among all others. A dropped group may be grown back at once, and is then untouched: value and momentum stay.

    Args:
        drop_fraction: initial ``f_0``; decays with a cosine to 0 at ``update_end`` (constant if that is None).
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`; ``update_freq`` defaults to 100 steps.
    """

    def __init__(self, model: Any, optimizer: Any = None, *, drop_fraction: float = 0.3, **kwargs: Any) -> None:
        self.drop_fraction = check_number("drop_fraction", drop_fraction, most=1)
        kwargs.setdefault("update_freq", 100)
        super().__init__(model, optimizer, **kwargs)

    def initialize(self) -> None:
        if any(isinstance(masked.pattern, NM) for masked in self.weights.values()):
            raise ValueError(
                f"pattern NM is not allowed with {type(self).__name__}: its groups cannot be exchanged freely"
            )
        super().initialize()

    def current_drop_fraction(self) -> float:
        """``f_t`` at the current step (Evci et al. 2020, eq. 1)."""
        if self.schedule.end is None:
            return self.drop_fraction
        return cosine_drop_fraction(self.step_count, self.schedule.end, self.drop_fraction)

    def grow_scores(self, masked: MaskedWeight, grads: dict[str, Tensor]) -> Tensor | None:
        """Scores ``[num_groups]`` by which dropped and inactive groups compete to be grown. Here random.

        None leaves the layer as it is.
        """
        return torch.rand(masked.num_groups, generator=self.generator, device="cpu").to(masked.weight.device)

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        fraction = self.current_drop_fraction()
        masks = {}
        for name, masked in self.weights.items():
            if not masked.weight.requires_grad:
                continue  # what grows in a frozen layer could not learn
            active = masked.group_mask()
            changes = min(int(fraction * masked.num_kept), masked.num_groups - masked.num_kept)
            growth = self.grow_scores(masked, grads) if changes else None
            if growth is None:
                continue
            magnitude = masked.pattern.group_scores(masked.weight.abs())
            with naming(name):
                kept = binarize(magnitude.masked_fill(~active, -math.inf), masked.num_kept - changes)
                grown = binarize(growth.masked_fill(kept, -math.inf), changes)
            masks[name] = masked.pattern.expand(kept | grown, masked.weight.shape)
        return masks


class RigL(SET):
    """RigL (Evci et al. 2020): SET, but growing where the dense gradient is largest.

    The dense gradient is computed at the steps of a change and at no other. A layer that has none at such a step, like
    an expert that no token was sent to, keeps its mask.

    Args:
        paper: at a step of a change the mask update *replaces* the optimizer's step, as in the paper and the authors'
            code (so it needs the optimizer); by default the step is taken first, as RigL's PyTorch ports do.
        ...: as :class:`SET`.
    """

    def __init__(self, model: Any, optimizer: Any = None, *, paper: bool = False, **kwargs: Any) -> None:
        self.paper = paper
        super().__init__(model, optimizer, **kwargs)
        self._watch_steps()

    def __setstate__(self, state: dict[str, Any]) -> None:  # of copies, whose optimizers have no hooks
        super().__setstate__(state)
        self._watch_steps()

    def _watch_steps(self) -> None:
        """With ``paper``, leave the optimizer no gradients at a step that the mask update replaces."""
        this = weakref.ref(self)  # the optimizer must not keep the method alive

        def withhold_gradients(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
            # Parameters without a gradient are left alone by every optimizer: no decay, no momentum, no step.
            rigl = this()
            if rigl is None or not rigl.paper or not rigl.schedule.is_due(rigl.step_count + 1):
                return None
            optimizer.zero_grad(set_to_none=True)
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                return None

            def evaluate() -> Any:
                loss = closure()
                optimizer.zero_grad(set_to_none=True)
                return loss

            return (args[0], evaluate), {name: value for name, value in kwargs.items() if name != "closure"}

        for opt in self.optimizers if self.paper else ():
            opt.register_step_pre_hook(withhold_gradients)

    def initialize(self) -> None:
        if self.paper and not self.optimizers:
            raise ValueError("paper=True replaces steps of the optimizer, but no optimizer was given")
        if self.schedule.freq and self.schedule.end is None:
            logger.warning(
                "RigL without update_end= goes on to exchange %g of the weights every %d steps; in the paper it falls "
                "to 0 at 75 %% of the training",
                *(self.drop_fraction, self.schedule.freq),
            )
        super().initialize()

    def release(self) -> None:
        super().release()
        self.paper = False  # else it would go on withholding gradients

    def grow_scores(self, masked: MaskedWeight, grads: dict[str, Tensor]) -> Tensor | None:
        if masked.name not in grads:
            raise RuntimeError("RigL grows by gradients, and change_topology got none; steps at a change collect them")
        grad = grads[masked.name]
        if not grad.any():  # of a layer that this step did not reach; equal scores would grow the first rows
            return None
        return masked.pattern.group_scores(grad.abs())

    def prepare_collection(self) -> None:
        due = self.schedule.is_due(self.step_count + 1)
        for masked in self.weights.values():
            masked.collect("all" if due else "none")
