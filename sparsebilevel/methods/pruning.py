"""Pruning a trained dense network: one-shot (OMP), iterative with rewinding (IMP), and learned scores (HYDRA)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number, check_whole
from ..masks import NM, as_fraction, global_masks
from ..nn import sparse_layers
from .base import MaskedWeight, Scope, Sparsifier, Storage, logger


def top_masks(sparsifier: Sparsifier, scores: dict[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    """Masks of the largest scores at the exact counts of the sparsifier: one ranking over all layers, or one a layer.

    Layers whose target is dense stay dense and take no part in a global ranking.
    """
    weights = sparsifier.weights
    free = {n: s for n, s in scores.items() if not weights[n].is_dense}
    masks = {n: torch.ones_like(weights[n].mask) for n in scores if n not in free}
    if scope == "layer":
        return masks | {n: weights[n].pattern.mask(s, weights[n].num_kept) for n, s in free.items()}
    by_pattern: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, s in free.items():
        by_pattern[weights[name].pattern][name] = s
    for pattern, group in by_pattern.items():
        masks |= global_masks(group, sum(weights[n].num_kept for n in group), pattern)
    return masks


def warn_of_single_targets(sparsifier: Sparsifier, advice: str = "") -> None:
    """A ranking over all layers keeps the sum of their targets only: say so where layers were given their own."""
    by_pattern: dict[Any, list[MaskedWeight]] = defaultdict(list)
    for masked in sparsifier.weights.values():
        if not masked.is_dense and not isinstance(masked.pattern, NM):
            by_pattern[masked.pattern].append(masked)
    for group in by_pattern.values():
        share = sum(masked.num_kept for masked in group) / sum(masked.num_groups for masked in group)
        odd = [masked for masked in group if abs(masked.num_kept - share * masked.num_groups) > 1]
        if odd:
            logger.warning(
                "%s ranks all layers together, at sparsity %.3g, whatever their own target is, as %.3g for %r%s",
                *(type(sparsifier).__name__, 1 - share, 1 - odd[0].num_kept / odd[0].num_groups, odd[0].name, advice),
            )


class OMP(Sparsifier):
    """One-shot magnitude pruning of a trained network, then training under the fixed mask.

    The mask is chosen in the constructor.

    Args:
        scope: the largest ``|theta|`` over all layers together (``global``; None is the same, and warns where layers
            have targets of their own) or in each ``layer``.
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`.
    """

    def __init__(self, model: Any, optimizer: Any = None, *, scope: Scope | None = None, **kwargs: Any) -> None:
        _check_scope("global" if scope is None else scope)
        self.scope, self._chose_scope = scope or "global", scope is not None
        super().__init__(model, optimizer, **kwargs)

    def initialize(self) -> None:
        if not self._chose_scope:
            warn_of_single_targets(self, "; scope='layer' keeps to it")
        for masked in self.weights.values():
            # Whatever mask sparsify drew: to grow from it would set the trained weights outside of it to zero.
            masked.set_mask(torch.ones_like(masked.mask))
        magnitudes = {name: masked.weight.detach().abs() for name, masked in self.weights.items()}
        self._apply_masks(top_masks(self, magnitudes, self.scope))


class IMP(Sparsifier):
    """Iterative magnitude pruning with rewinding (Frankle & Carbin 2019; late rewinding: Frankle et al. 2020).

    Train, prune a fraction of the *remaining* weights by magnitude over all layers together, set the survivors back to
    their values at the rewind step, and train again. Layers whose target is dense stay out of it. The loop trains
    ``levels + 1`` times and calls :meth:`advance` in between::

        for level in range(imp.levels + 1):
            train_one_cycle()              # sparsifier.step() after every optimizer step
            if level < imp.levels:
                imp.advance()

    Args:
        levels: prunings. The fraction kept at each is the ``levels``-th root of the final density, or ``1 - rate``.
        rate: fraction of the remaining weights pruned at each level (0.2 in the literature); then ``levels`` levels
            give the density ``(1 - rate) ** levels`` whatever target the model has.
        rewind_step: optimizer step, counted in the first cycle, to whose values the network goes back; 0 = its start.
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`.
    """

    scope: Scope = "global"

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        levels: int = 3,
        rate: float | None = None,
        rewind_step: int = 0,
        **kwargs: Any,
    ) -> None:
        check_whole("levels", levels, 1)
        check_whole("rewind_step", rewind_step, 0)
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"rate={rate!r} is not allowed; expected a number in (0, 1) or None")
        self.levels, self.rate, self.rewind_step = levels, rate, rewind_step
        self.level = 0
        self.rewind_point: dict[str, Tensor] | None = None
        super().__init__(model, optimizer, **kwargs)

    def initialize(self) -> None:
        """Start dense, whatever mask ``sparsify`` drew."""
        patterns = {masked.pattern for masked in self._prunable().values()}
        if len(patterns) != 1 or any(isinstance(pattern, NM) for pattern in patterns):
            raise ValueError(
                f"IMP ranks all layers together level by level; it needs layers of one pattern, not NM, got {patterns}"
            )
        for pattern in patterns:
            pattern.check_ranking()
        warn_of_single_targets(self)
        for masked in self.weights.values():
            masked.set_mask(torch.ones_like(masked.mask))  # not grown: that would set the weights to zero
        if self.rewind_step == 0:
            self.save_rewind_point()

    def learn(self, grads: dict[str, Tensor]) -> None:
        if self.step_count == self.rewind_step:
            self.save_rewind_point()

    def save_rewind_point(self) -> None:
        """Remember parameters and buffers as they are now (masks excepted)."""
        state = self.model.state_dict()
        self.rewind_point = {key: value.detach().clone() for key, value in without_masks(self.model, state).items()}

    def target_counts(self, level: int) -> int:
        """Groups kept after ``level`` prunings over all layers whose target is not dense."""
        total = sum(masked.num_groups for masked in self._prunable().values())
        if self.rate is not None:
            for _ in range(level):
                total -= math.ceil(as_fraction(self.rate) * total)
            return total
        final = sum(masked.num_kept for masked in self._prunable().values())
        return final if level >= self.levels else round(total * (final / total) ** (level / self.levels))

    def target_count(self) -> int:
        dense = sum(masked.num_kept for masked in self.weights.values() if masked.is_dense)
        return dense + self.target_counts(self.level)

    @torch.no_grad()
    def advance(self) -> None:
        """Prune to the next level, rewind the survivors and forget all optimizer state.

        Raises:
            RuntimeError: after the last level, before the rewind step was reached, or after ``release()``.
        """
        self._refuse_released()
        if self.level == self.levels:
            raise RuntimeError(f"all {self.levels} levels are done")
        if self.rewind_point is None:
            raise RuntimeError(f"rewind_step={self.rewind_step} was not reached; {self.step_count} steps were taken")
        self.level += 1
        self.change_topology()
        rewind(self, self.rewind_point)

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        # Summed magnitudes of pruned groups are 0: minus infinity keeps them out even where survivors are 0 too.
        prunable = self._prunable()
        scores = {n: w.weight.abs().masked_fill(~w.mask, -math.inf) for n, w in prunable.items()}
        return global_masks(scores, self.target_counts(self.level), next(iter(prunable.values())).pattern)

    def _prunable(self) -> dict[str, MaskedWeight]:
        return {name: masked for name, masked in self.weights.items() if not masked.is_dense}

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"level": float(self.level)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"level": self.level, "rewind_point": self.rewind_point}

    def load_state_dict(self, state: Any) -> None:
        self._check_origin(state)
        before, self.level = self.level, state["level"]  # says how many weights the masks keep
        try:
            super().load_state_dict(state)
        except ValueError:
            self.level = before
            raise
        self.rewind_point = state["rewind_point"]


def without_masks(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state of ``model`` that are neither masks nor scores."""
    names = {f"{name}.{b}".lstrip(".") for name, _ in sparse_layers(model) for b in ("mask", "mask_scores")}
    return {key: value for key, value in state.items() if key not in names}


@torch.no_grad()
def rewind(sparsifier: Sparsifier, point: dict[str, Tensor]) -> None:
    """Set parameters and buffers back to ``point`` under the current masks, and clear the optimizers' state."""
    sparsifier.model.load_state_dict(without_masks(sparsifier.model, point))
    for optimizer in sparsifier.optimizers:
        optimizer.state.clear()
    for masked in sparsifier.weights.values():
        if sparsifier.storage == "sparse":
            masked.weight.masked_fill_(~masked.mask, 0)


def _check_scope(scope: str) -> None:
    if scope not in ("global", "layer"):
        raise ValueError(f"scope={scope!r} is not known; allowed: global, layer")


class HYDRA(Sparsifier):
    """HYDRA (Sehwag et al. 2020): the weights are frozen and scores are trained through a straight-through top-k.

    Scores start as ``sqrt(6 / fan_in) * theta / max|theta|``; the mask is the top-k of ``|s|``, renewed at every step;
    ``ds = sign(s) * theta * G`` by SGD with momentum. All parameters are frozen until :meth:`finish`, which removes the
    scores and leaves a fixed mask to fine-tune under. Until then they have no gradients, and a loop leaves out clipping
    and ``step`` and ``update`` of a GradScaler.

    Args:
        score_lr, score_momentum, score_weight_decay: of the SGD on the scores (assign ``score_lr`` to follow a
            schedule).
        scope: ``layer`` (the original) or ``global`` (the variant BiP is compared with).
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`.
    """

    storage: Storage = "dense"
    continuous = True

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        score_lr: float = 0.1,
        score_momentum: float = 0.9,
        score_weight_decay: float = 0.0,
        scope: Scope = "layer",
        **kwargs: Any,
    ) -> None:
        _check_scope(scope)
        self.score_lr = check_number("score_lr", score_lr)
        self.score_momentum = check_number("score_momentum", score_momentum)
        self.score_weight_decay = check_number("score_weight_decay", score_weight_decay)
        self.scope = scope
        self._velocity: dict[str, Tensor] = {}
        self._frozen: list[nn.Parameter] = []
        super().__init__(model, optimizer, **kwargs)
        self._frozen = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def initialize(self) -> None:
        self._refuse_maximize()
        for masked in self.weights.values():
            weight = masked.weight.detach().float()
            fan_in = weight[0].numel()
            masked.set_scores(math.sqrt(6 / fan_in) * weight / weight.abs().max().clamp(min=1e-30))
        self._apply_masks(self.propose_masks({}))

    def prepare_collection(self) -> None:
        for masked in self.weights.values():
            masked.collect("none" if self.finished else "all")

    def learn(self, grads: dict[str, Tensor]) -> None:
        if self.finished:
            return
        for name, grad in grads.items():
            scores = self.weights[name].scores
            direct = scores.sign() * self.weights[name].weight * grad + self.score_weight_decay * scores
            past = self._velocity.get(name)
            velocity = direct if past is None else past.mul_(self.score_momentum).add_(direct)
            self._velocity[name] = velocity
            scores.sub_(velocity, alpha=self.score_lr)
        self._apply_masks(self.propose_masks(grads))

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.finished:
            return {}
        return top_masks(self, {name: masked.scores.abs() for name, masked in self.weights.items()}, self.scope)

    @torch.no_grad()
    def finish(self) -> None:
        """Keep the mask for good: zeros are stored, scores go, parameters train again; another method may follow."""
        if self.finished:
            return
        self._refuse_released()
        self.finished, self.storage = True, "sparse"
        self._velocity.clear()
        for masked in self.weights.values():
            masked.set_scores(None)
            self._change(masked, masked.mask.clone())
        self.release()

    def release(self) -> None:
        super().release()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []  # whoever comes next may freeze them again

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"finished": self.finished, "velocity": dict(self._velocity)}

    def load_state_dict(self, state: Any) -> None:
        self._check_origin(state)
        if state["finished"] and not self.finished:
            self._check_masks(state, scores=False)
            self.finish()
        super().load_state_dict(state)
        self._velocity = self._on_devices(state["velocity"])
