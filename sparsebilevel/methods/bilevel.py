"""Masks learned by bi-level optimization: BiP (prune a trained network) and BiDST (train sparse from scratch).

Upper level: choose the mask; lower level: train theta under it with the ridge ``(gamma/2)||theta||^2``. With ``c`` the
(relaxed) mask, ``z = c * theta`` and ``G = dloss/dz``, the implicit function theorem without the loss's Hessian gives
``dtheta*/dc = -(1/gamma) diag(G)`` and the hypergradient

    dl/dc = theta * G  -  (1/gamma) * c * G * G            (direct term, implicit term)

(Zhang et al. 2022, BiP; Ji et al. 2024, BiDST, eqs. 5-9; the printed eq. 9 lost the factor ``c * G``). It is formed
once a step, from the effective gradient, after accumulation, unscaling and all-reduce: it is not linear in ``G``.

Two properties decide how well this works with mini-batches, and set the defaults here:

* The two factors of ``G * G`` belong to different levels: one says how the lower level's solution moves, the other how
  the upper level's loss takes it. Taken from one batch their product is ``mean(G)^2`` plus the variance of the
  mini-batch gradient, which drowns it. With ``lower_gradient="mean"`` the lower level's factor is a running mean over
  *earlier* batches, and the noise of the two is independent. That is worth 3.7 points to BiDST on CIFAR-10 at 98 %; on
  the digits, whose gradients have little noise, it costs 1.7 (README, "Measured").
* Summed along training, the direct term is the movement of the weight: a gradient step changes ``theta^2 / 2`` by
  ``-lr * theta * G``, and with momentum by ``-lr / (1 - momentum) * theta * G`` in the mean. With that step size a
  score that starts at ``theta^2 / 2`` stays there, and the implicit term is a credit on what a weight will be worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import check_number, check_whole
from ..masks import as_fraction
from .base import MaskedWeight, NotFiniteError, Scope, Sparsifier, Storage, _world_size, logger, naming
from .pruning import rewind, top_masks, warn_of_single_targets

_PATIENCE = 100  # steps of the lower level after which BiP asks for the upper one
# Where optimizers keep the squares of gradients that they divide by the root of: Adam's kin, RMSprop, Adagrad.
_SQUARES = ("exp_avg_sq", "square_avg", "sum")
FORMULAS = ("derived", "printed", "code", "curvature", "none")


def hypergradient(
    weight: Tensor,
    c: Tensor,
    grad: Tensor,
    *,
    formula: str,
    scale: float | Tensor,
    lower_grad: Tensor | None = None,
    curvature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(direct, implicit)`` terms of ``dloss/dc``; their sum is the hypergradient.

    Args:
        weight: theta, any shape.
        c: mask or relaxed mask of the same shape, values in [0, 1].
        grad: effective gradient ``G`` of the same shape.
        formula: of the implicit term:
            ``derived``: ``-scale * c * G_lower * G`` (BiP as published; BiDST as derived);
            ``printed``: ``-scale * G`` (BiDST eq. 9 as printed; the sign of G carries no importance);
            ``code``: ``-scale * (theta * G)^2`` (what BiP's released code computes);
            ``curvature``: keeps a diagonal ``h`` of the Hessian, which mends the size of the term:
            ``-c * G * (G_lower + c * h * theta) / (gamma + c^2 * h)`` with ``gamma = 1 / scale``;
            ``none``: 0.
        scale: ``1 / gamma``, a setting of its own: the theory couples it inversely to the ridge of the lower level.
        lower_grad: ``G_lower``, the lower level's estimate of ``G``; None is ``grad`` itself, as the papers have it.
        curvature: ``h``, of the same shape, for ``curvature``.
    """
    lower_grad = grad if lower_grad is None else lower_grad
    direct = weight * grad
    if formula == "none" or (not isinstance(scale, Tensor) and scale == 0):
        return direct, torch.zeros_like(direct)
    if formula == "derived":
        return direct, -scale * c * lower_grad * grad
    if formula == "printed":
        return direct, -scale * grad
    if formula == "code":
        return direct, -scale * direct.square()
    if formula == "curvature":
        assert curvature is not None
        return direct, -grad * c * (lower_grad + c * curvature * weight) / (1 / scale + c * c * curvature)
    raise ValueError(f"formula={formula!r} is not known; allowed: {', '.join(FORMULAS)}")


class _RunningMean:
    """Exponential means of one quantity, by layer, corrected for their start at zero (as in Adam)."""

    def __init__(self, name: str, decay: float) -> None:
        self.decay = check_number(name, decay, most=1, without_most=True)
        self.sums: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}

    def read(self, name: str, like: Tensor) -> Tensor:
        """The mean so far, zero before the first update."""
        if name not in self.sums:
            return torch.zeros_like(like)
        return self.sums[name] / (1 - self.decay ** self.steps[name])

    def update(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value)
        self.sums[name].lerp_(value.to(self.sums[name].dtype), 1 - self.decay)
        self.steps[name] = self.steps.get(name, 0) + 1

    def move(self, name: str, old: Tensor, new: Tensor, numel: int, fill: Callable[[Tensor], Tensor]) -> None:
        """Follow a change of positions; new ones start at ``fill(sums)``."""
        if name in self.sums:
            dense = fill(self.sums[name]).repeat(numel)
            dense[old] = self.sums[name]
            self.sums[name] = dense[new]

    def clear(self) -> None:
        self.sums.clear()
        self.steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "steps": dict(self.steps)}

    def load_state_dict(self, sums: dict[str, Tensor], steps: dict[str, int]) -> None:
        self.sums, self.steps = sums, dict(steps)


class _TermSizes:
    """Mean absolute direct and implicit terms since the last reset: the first thing to look at when tuning."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.direct: Tensor | float = 0.0
        self.implicit: Tensor | float = 0.0
        self.count = 0

    def add(self, direct: Tensor, implicit: Tensor) -> None:
        self.direct = self.direct + direct.abs().sum()
        self.implicit = self.implicit + implicit.abs().sum()
        self.count += direct.numel()

    def read(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {"direct": float(self.direct) / self.count, "implicit": float(self.implicit) / self.count}

    def state_dict(self) -> dict[str, Any]:
        return {"direct": self.direct, "implicit": self.implicit, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.direct, self.implicit, self.count = state["direct"], state["implicit"], state["count"]


class _BiLevel(Sparsifier):
    """What BiP and BiDST share: the settings of the hypergradient and the running means it needs."""

    IMPLICIT: Mapping[str, str]

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        implicit: str,
        implicit_scale: float | None,
        lower_gradient: str,
        gradient_decay: float,
        curvature_decay: float,
        score_lr: float | None,
        **kwargs: Any,
    ) -> None:
        for argument, value in (("score_lr", score_lr), ("implicit_scale", implicit_scale)):
            if value is None and optimizer is None:
                raise ValueError(f"{argument}=None takes the optimizer's learning rate, but no optimizer was given")
        self.formula = self.IMPLICIT[_choose("implicit", implicit, self.IMPLICIT)]
        self.implicit_scale = None if implicit_scale is None else check_number("implicit_scale", implicit_scale)
        self.lower_gradient = _choose("lower_gradient", lower_gradient, ("mean", "batch"))
        self.score_lr = None if score_lr is None else check_number("score_lr", score_lr)
        self._mean_grad = _RunningMean("gradient_decay", gradient_decay)
        self._curvature = _RunningMean("curvature_decay", curvature_decay)
        self._sizes = _TermSizes()
        self._warned_of_rate = False
        super().__init__(model, optimizer, **kwargs)

    def _hypergradient(self, name: str, weight: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        lower = curvature = None
        if self.lower_gradient == "mean" and self.formula in ("derived", "curvature"):  # the others do not use it
            lower = self._mean_grad.read(name, grad)
            self._mean_grad.update(name, grad)
        if self.formula == "curvature":
            self._curvature.update(name, grad.square())
            curvature = self._curvature.read(name, grad)
        scale = self.current_implicit_scale(name)
        return hypergradient(weight, c, grad, formula=self.formula, scale=scale, lower_grad=lower, curvature=curvature)

    _learns_under_frozen_weights = False  # masks of frozen weights stay as they are

    def _check_optimizers(self) -> None:
        """Raise ValueError where the scores cannot take their pace from the optimizer."""
        self._refuse_maximize()
        if self.score_lr is not None and self.implicit_scale is not None:
            return
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for name, masked in self.weights.items():
            frozen = not masked.weight.requires_grad
            if masked.is_dense or (frozen and not self._learns_under_frozen_weights):
                continue
            group = next((g for g in groups if any(p is masked.weight for p in g["params"])), None)
            if group is None or (frozen and "dampening" not in group):  # but for SGD, steps say what the pace is
                missing = " and ".join(n for n in ("score_lr", "implicit_scale") if getattr(self, n) is None)
                raise ValueError(
                    f"{name!r} is {'frozen' if frozen else 'in no optimizer'}, which gives its scores no pace; give "
                    f"{missing}, or leave the layer out of sparsify"
                )

    def current_score_lr(self, name: str) -> float | Tensor:
        """Step size of the scores of a layer: as given, or the one at which the direct term follows ``theta^2 / 2``.

        A scalar tensor, not waited for, where the optimizer's state says it.
        """
        return self._effective_lr(name) if self.score_lr is None else self.score_lr

    def current_implicit_scale(self, name: str) -> float | Tensor:
        """Scale of the implicit term of a layer."""
        assert self.implicit_scale is not None
        return self.implicit_scale

    def _effective_lr(self, name: str) -> float | Tensor:
        """How far a weight goes in a step for a constant gradient, over that gradient.

        Momentum repeats each gradient. Optimizers that divide by the size of gradients, as Adam does, divide by that of
        the layer: the root of the mean square over its active weights.
        """
        masked = self.weights[name]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is masked.weight for p in group["params"]):
                    return self._rate_of(masked, optimizer, group)
        raise ValueError(f"score_lr or implicit_scale is None, but no optimizer holds {name!r} to take its rate from")

    def _rate_of(
        self, masked: MaskedWeight, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
    ) -> float | Tensor:
        if group["lr"] is None:
            raise ValueError(f"{type(optimizer).__name__} has lr=None, no step size; give score_lr and implicit_scale")
        rate, momentum = float(group["lr"]), float(group.get("momentum", 0))
        if momentum >= 1:
            raise ValueError(
                f"the optimizer's momentum is {momentum}, which gives no step size; give score_lr and implicit_scale"
            )
        if momentum:
            rate *= (1 - float(group.get("dampening", 0))) / (1 - momentum)
        state = optimizer.state.get(masked.weight, {})
        key = next((key for key in _SQUARES if key in state), None)
        if key is None:
            if state and "dampening" not in group and not self._warned_of_rate:
                self._warned_of_rate = True
                taken = [name for name in ("score_lr", "implicit_scale") if getattr(self, name) is None]
                logger.warning(
                    "%s takes %s for plain SGD, since no %s is given, and its steps are of another size",
                    *(type(self).__name__, type(optimizer).__name__, " and no ".join(taken)),
                )
            return rate
        eps = group.get("eps", 1e-8)
        mean = self._active_mean(masked, state[key])
        if key == "exp_avg_sq" and "betas" in group and "step" in state:
            missing = group["betas"][1] ** state["step"]  # a number or a tensor, as the optimizer counts
            mean = mean / (1 - (missing.to(mean.device) if isinstance(missing, Tensor) else missing))
        if "acc_delta" in state:  # Adadelta, whose steps have the size of those before
            return rate * (self._active_mean(masked, state["acc_delta"]) + eps).sqrt() / (mean + eps).sqrt()
        return rate / (mean.sqrt() + eps)

    @staticmethod
    def _active_mean(masked: MaskedWeight, values: Tensor) -> Tensor:
        return torch.where(masked.mask, values, 0).sum() / masked.mask.sum()

    def metrics(self) -> dict[str, float]:
        return super().metrics() | self._sizes.read()

    def reset_metrics(self) -> None:
        self._sizes.reset()

    def state_dict(self) -> dict[str, Any]:
        means = {"mean_grad": self._mean_grad.state_dict(), "curvature": self._curvature.state_dict()}
        return super().state_dict() | means | {"sizes": self._sizes.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        for key, mean in (("mean_grad", self._mean_grad), ("curvature", self._curvature)):
            mean.load_state_dict(self._on_devices(state[key]["sums"]), state[key]["steps"])
        self._sizes.load_state_dict(state["sizes"])


class BiP(_BiLevel):
    """Bi-level pruning of a trained network (Zhang et al., NeurIPS 2022).

    Alternate N ordinary optimizer steps on the weights (lower level, mask fixed) with one :meth:`upper_step` on a batch
    of its own: a gradient step on the scores and a projection to the exact count. Weights are stored dense, so that a
    dropped one can return. ::

        sb.sparsify(model, sparsity=0.9, init="dense")       # a trained model
        bip = sb.BiP(model, optimizer)
        for (x, y), (xu, yu) in zip(lower_loader, upper_loader):
            bip.upper_step(lambda: F.cross_entropy(model(xu), yu))
            optimizer.zero_grad(); F.cross_entropy(model(x), y).backward(); optimizer.step()
            bip.step()
        bip.finish()                                          # zeros are stored; fine-tune on if you like

    Whichever way the scores start, the first mask is one-shot magnitude pruning (of groups by the sum of their scores).

    Args:
        initial_scores: ``energy`` (``theta^2 / 2``, the scale on which the direct term moves) or ``magnitude``
            (``|theta|``, as published).
        implicit: ``paper`` (``-scale * m * G_lower * G``), ``code`` (``-scale * (theta * G)^2``, the released code),
            ``curvature`` or ``none``.
        implicit_scale: ``1 / gamma`` of the hypergradient. Separate from the optimizer's weight decay: in the theory
            the two are reciprocal, in the released code both are 1e-4.
        lower_gradient: ``mean`` (a running mean over the batches of earlier upper steps) or ``batch`` (the upper batch
            itself, as published).
        score_lr: step size beta of the scores (assign it to follow a schedule; 0.1 as published); None is
            ``lr / (1 - momentum)`` of the weight's parameter group, with Adam and its kin over the size of the layer's
            gradients, at which a score follows ``theta^2 / 2`` if one lower step goes with an upper step.
        score_momentum: of the SGD on the scores.
        scope: ``global`` (one ranking over all layers; the default for unstructured masks) or ``layer`` (equal ratios;
            the default for filter and channel masks).
        gradient_decay, curvature_decay: of the running means of ``G`` and ``G^2``.
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`.
    """

    storage: Storage = "dense"
    continuous = True
    _learns_under_frozen_weights = True
    IMPLICIT = {"paper": "derived", "code": "code", "curvature": "curvature", "none": "none"}

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        initial_scores: str = "energy",
        implicit: str = "paper",
        implicit_scale: float = 1.0,
        lower_gradient: str = "mean",
        score_lr: float | None = None,
        score_momentum: float = 0.0,
        scope: Scope | None = None,
        gradient_decay: float = 0.9,
        curvature_decay: float = 0.99,
        **kwargs: Any,
    ) -> None:
        self.initial_scores = _choose("initial_scores", initial_scores, ("energy", "magnitude"))
        self.score_momentum = check_number("score_momentum", score_momentum)
        check_number("implicit_scale", implicit_scale)  # None is BiDST's
        if scope not in ("global", "layer", None):
            raise ValueError(f"scope={scope!r} is not known; allowed: global, layer, None")
        self._scope = scope
        self.upper_steps = 0
        self._warned = False
        self._velocity: dict[str, Tensor] = {}
        super().__init__(
            model,
            optimizer,
            implicit=implicit,
            implicit_scale=implicit_scale,
            lower_gradient=lower_gradient,
            gradient_decay=gradient_decay,
            curvature_decay=curvature_decay,
            score_lr=score_lr,
            **kwargs,
        )

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """How masks are projected: over all layers together or layer by layer."""
        if self._scope is not None:
            return self._scope
        unstructured = all(m.num_groups == m.weight.numel() for m in self.weights.values())
        return "global" if unstructured else "layer"

    def initialize(self) -> None:
        self._check_optimizers()
        if self._scope is None and self.scope == "global":
            warn_of_single_targets(self, "; scope='layer' keeps to it")
        for masked in self.weights.values():
            weight = masked.weight.detach().float()
            masked.set_scores(weight.square() / 2 if self.initial_scores == "energy" else weight.abs())
        self._apply_masks(self.propose_masks({}))

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.finished:
            return {}
        return top_masks(self, {name: masked.scores for name, masked in self.weights.items()}, self.scope)

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        changed = super().step(scaler)
        if self.step_count == _PATIENCE:
            self._warn_without_upper_steps()
        return changed

    def _warn_without_upper_steps(self) -> None:
        if self.step_count and not (self.upper_steps or self.finished or self._warned):
            self._warned = True
            logger.warning(
                "BiP has seen no upper_step in %d steps: its mask is still that of one-shot magnitude pruning",
                self.step_count,
            )

    def upper_step(
        self,
        closure: Callable[[], Tensor],
        scaler: torch.amp.GradScaler | None = None,
        *,
        max_norm: float | None = None,
    ) -> Tensor:
        """One step of the upper level; costs one forward and one backward pass.

        Gradients that the parameters already hold are put back afterwards, and no parameter is changed (unless hooks on
        gradients do so, as of optimizers that step in backward).

        Args:
            closure: computes the loss of an upper batch (or of several); ``upper_step`` calls backward.
            scaler: the loop's GradScaler, if any. A gradient that is not finite is skipped then.
            max_norm: of the gradient of all parameters together, as the loop clips it for the weights: else the scores
                are ahead of these where the loop clips.

        Returns:
            The loss, detached.

        Raises:
            NotFiniteError: without a scaler, a gradient that is not finite; no score has changed then.
        """
        if self.finished:
            raise RuntimeError("upper_step after finish(): the mask is fixed")
        self._refuse_released()
        if max_norm is not None:
            check_number("max_norm", max_norm, without_least=True)
        parameters = list(self.model.parameters())
        # With gradient_as_bucket_view DDP computes into the memory of the gradients that are there.
        shared = dist.is_available() and dist.is_initialized()
        kept = [p.grad.clone() if shared and p.grad is not None else p.grad for p in parameters]
        for masked in self.weights.values():
            masked.collect("all")
        try:
            for p in parameters:
                p.grad = None
            with torch.enable_grad():
                loss = closure()
                (loss if scaler is None else scaler.scale(loss)).backward()
            with torch.no_grad():
                grads = self._take_grads(None)
                assert grads is not None
                scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
                if scale != 1:
                    grads = {name: g / scale for name, g in grads.items()}
                if max_norm is not None:
                    factor = self._clip_factor(max_norm, scale)
                    grads = {name: g * factor for name, g in grads.items()}
                if scaler is None or not _not_finite(grads):
                    self.upper_step_with(grads)
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
            for masked in self.weights.values():
                masked.collect("none")
        return loss.detach()

    def _clip_factor(self, max_norm: float, scale: float) -> Tensor:
        """The factor by which ``clip_grad_norm_`` would shrink the gradients that the parameters have now."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if (ranks := _world_size()) > 1:  # the closure may not have gone through DDP
            for grad in grads:
                dist.all_reduce(grad)
                self.bytes_sent += grad.numel() * grad.itemsize
                grad /= ranks
        return (max_norm / (torch.nn.utils.get_total_norm(grads) / scale + 1e-6)).clamp(max=1)

    @torch.no_grad()
    def upper_step_with(self, grads: dict[str, Tensor]) -> None:
        """:meth:`upper_step` with effective gradients from elsewhere, as a federated server gets them from its clients.

        Args:
            grads: ``G`` of an upper batch by the names of :attr:`weights`, float32, of the weights' shapes.
        """
        if self.finished:
            raise RuntimeError("upper_step_with after finish(): the mask is fixed")
        if odd := _not_finite(grads):
            raise NotFiniteError(f"the gradient of {odd[0]!r} is not finite in this upper batch; no score has changed")
        self._update_scores(grads)
        self._apply_masks(self.propose_masks(grads))
        self.upper_steps += 1

    def _update_scores(self, grads: dict[str, Tensor]) -> None:
        for name, grad in grads.items():
            masked = self.weights[name]
            if masked.is_dense:
                continue  # and stays so
            direct, implicit = self._hypergradient(name, masked.weight, masked.mask, grad)
            self._sizes.add(direct, implicit)
            velocity = direct.add_(implicit)
            if self.score_momentum:
                past = self._velocity.get(name)
                velocity = velocity if past is None else past.mul_(self.score_momentum).add_(velocity)
                self._velocity[name] = velocity
            masked.scores.sub_(velocity * self.current_score_lr(name))

    @torch.no_grad()
    def finish(self, rewind_to: dict[str, Tensor] | None = None) -> None:
        """Keep the mask for good: zeros are stored, the scores go, and another method may follow.

        Training may continue as fine-tuning.

        Args:
            rewind_to: a model state (as IMP's rewinding uses) to which surviving weights go back. BiP does not need it.
        """
        if self.finished:
            return
        self._refuse_released()
        self._warn_without_upper_steps()
        self.finished, self.storage = True, "sparse"
        self._velocity.clear()
        self._mean_grad.clear()
        self._curvature.clear()
        for masked in self.weights.values():
            masked.set_scores(None)
            self._change(masked, masked.mask.clone())
        if rewind_to is not None:
            rewind(self, rewind_to)
        self.release()

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"upper_steps": float(self.upper_steps)}

    def state_dict(self) -> dict[str, Any]:
        own = {"finished": self.finished, "upper_steps": self.upper_steps, "velocity": dict(self._velocity)}
        return super().state_dict() | own

    def load_state_dict(self, state: Any) -> None:
        self._check_origin(state)
        if state["finished"] and not self.finished:
            self._check_masks(state, scores=False)
            self.finish()
        super().load_state_dict(state)
        self.upper_steps = state["upper_steps"]
        self._velocity = self._on_devices(state["velocity"])


class BiDST(_BiLevel):
    """Bi-level dynamic sparse training (Ji et al., ICML 2024), with the corrections listed below.

    Every learnable position holds a score ``u``; the relaxed mask is ``psi = sigmoid(u / tau)``. Learnable are the
    active positions A and a random extra *search space* E, where weight and weight gradient are zero but the mask
    learns. The scores take a hypergradient step after every optimizer step, from the same backward pass; the topology
    changes only every ``update_freq`` steps, to the largest scores over A and E, layer by layer.

    Where the paper leaves a choice or cannot be followed to the letter:

    * the ridge of the lower level is ``||theta||^2`` (with ``||psi * theta||^2``, as printed, the exact hypergradient
      is 0);
    * ``implicit="derived"`` restores the factor that the printed eq. 9 lost; ``paper`` is the printed form;
    * ``psi = sigmoid(u / tau)`` is bounded (plain scores in E stay at zero for ever or overflow);
    * the forward pass uses the *current* binary mask between topology changes;
    * the score of a weight is worth what the direct term would have made of it, had it grown from zero: it starts
      ``psi' * theta^2 / 2`` above ``initial_score``, which is the score of a weight that is zero. So E starts there, a
      weight that grows keeps the credit that it earned in E, and a weight that is dropped goes back to
      ``initial_score`` (less ``margin``) with its value;
    * at a change, what leaves A enters E, and the rest of E is drawn anew;
    * ``G`` is taken as the loop has clipped it, which is read off the gradients of the active weights;
    * the implicit term moves E only (``implicit_on="search"``): in A the lower level does solve for theta, so that the
      response of theta to its mask is already in the movement that the direct term sums.

    ``mask_scores`` holds ``u``, and minus infinity outside A and E.

    Args:
        search_space: size of E as a fraction of all entries of a layer, in [0, 1). Scores are noisy, and the highest of
            many are those with the most noise: with mini-batches it should not be much larger than A (README,
            "Measured").
        implicit: ``derived``, ``paper``, ``curvature`` or ``none``.
        implicit_scale: ``1 / lambda`` of the hypergradient; a setting of its own beside the optimizer's weight decay
            (the paper's is 1e4). None follows from ``horizon``: see :meth:`current_implicit_scale`.
        horizon: steps after which a grown weight is judged, where ``implicit_scale`` is None.
        implicit_on: ``search`` (positions in E) or ``all`` (A too, as published).
        lower_gradient: ``mean`` (a running mean over earlier batches) or ``batch`` (this one, as published).
        score_lr: step size of the scores; None is ``lr / (1 - momentum)`` of the weight's parameter group, with
            Adam and its kin over the size of the layer's gradients.
        gumbel: add logistic noise (a difference of two Gumbels) to ``u`` in psi; the hard mask is not affected.
        tau: temperature of the relaxation; with ``tau_end`` it goes linearly there until ``update_end``.
        initial_score, margin: the score of a weight that is zero, and how far below it E starts.
        gradient_decay, curvature_decay: of the running means of ``G`` and ``G^2``.
        ...: as :class:`~sparsebilevel.methods.base.Sparsifier`.
    """

    IMPLICIT = {"derived": "derived", "paper": "printed", "curvature": "curvature", "none": "none"}

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        search_space: float = 0.05,
        implicit: str = "derived",
        implicit_scale: float | None = None,
        horizon: int = 100,
        implicit_on: str = "search",
        lower_gradient: str = "mean",
        score_lr: float | None = None,
        gumbel: bool = False,
        tau: float = 1.0,
        tau_end: float | None = None,
        initial_score: float = 0.0,
        margin: float = 0.0,
        gradient_decay: float = 0.9,
        curvature_decay: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if not all(0 < value < math.inf for value in (tau, tau if tau_end is None else tau_end)):
            raise ValueError(f"tau={tau!r}, tau_end={tau_end!r} are not allowed; temperatures are positive")
        if not math.isfinite(initial_score):
            raise ValueError(f"initial_score={initial_score!r} is not allowed; expected a finite number")
        check_whole("horizon", horizon, 1)
        self.horizon = horizon
        self.search_space = check_number("search_space", search_space, most=1, without_most=True)
        self.implicit_on = _choose("implicit_on", implicit_on, ("search", "all"))
        self.gumbel, self.tau, self.tau_end = gumbel, tau, tau_end
        self.initial_score, self.margin = initial_score, check_number("margin", margin)
        super().__init__(
            model,
            optimizer,
            implicit=implicit,
            implicit_scale=implicit_scale,
            lower_gradient=lower_gradient,
            gradient_decay=gradient_decay,
            curvature_decay=curvature_decay,
            score_lr=score_lr,
            **kwargs,
        )
        if not self.schedule.freq:
            logger.warning("BiDST without update_freq never changes the topology")

    # -- search space -------------------------------------------------------------------------------------------------

    def initialize(self) -> None:
        self._check_optimizers()
        super().initialize()
        for masked in self.weights.values():
            mask = masked.mask  # whose strides the scores must not have: they are row-major, as positions are
            scores = torch.full(mask.shape, -math.inf, dtype=torch.float32, device=mask.device)
            psi = (1 + math.tanh(self.initial_score / self.tau / 2)) / 2  # the sigmoid, without overflow
            worth = psi * (1 - psi) / self.tau * masked.weight.float().square() / 2
            scores[masked.mask] = self.initial_score + worth[masked.mask]
            self._fill_search_space(masked, scores)
            masked.set_scores(scores)
            self._collect_search_space(masked)

    def _fill_search_space(self, masked: MaskedWeight, scores: Tensor) -> None:
        """Draw random groups into E until it has its exact size; ``scores`` is -inf outside A and E."""
        pattern, shape = masked.pattern, masked.weight.shape
        outside = (~pattern.groups_of(scores > -math.inf)).cpu().nonzero().squeeze(1)
        inside = masked.num_groups - outside.numel() - int(masked.group_mask().sum())
        missing = round(masked.num_groups * as_fraction(self.search_space)) - inside
        order = torch.randperm(outside.numel(), generator=self.generator, device="cpu")
        drawn = torch.zeros(masked.num_groups, dtype=torch.bool, device="cpu")
        drawn[outside[order[: max(missing, 0)]]] = True
        scores[pattern.expand(drawn, shape).to(scores.device)] = self.initial_score - self.margin

    def learning_mask(self, masked: MaskedWeight) -> Tensor:
        """Positions whose score learns: active or in the search space (bool, of the weight's shape)."""
        return masked.scores > -math.inf

    def prepare_collection(self) -> None:
        for masked in self.weights.values():  # which positions to collect changes with the masks only
            masked.zero_effective_grad()

    # -- the upper level ----------------------------------------------------------------------------------------------

    def current_tau(self) -> float:
        """Temperature at the current step."""
        end = self.schedule.end
        if self.tau_end is None or not end:
            return self.tau
        return self.tau + (self.tau_end - self.tau) * min(1.0, self.step_count / end)

    def current_implicit_scale(self, name: str) -> float | Tensor:
        """Scale of the implicit term of a layer: as given, or from the horizon at which a grown weight is judged.

        The lower level's ridge solution ``-G / gamma`` is where a gradient flow from zero arrives after the time
        ``1 / gamma``. So a weight that is judged by what it becomes in ``horizon`` steps has that many steps of the
        effective learning rate, or as many as lie between two topology changes, if those are fewer. Where they are
        more, their credits are scaled to the sum of ``horizon`` of them: a gradient does not go on for ever.
        """
        if self.implicit_scale is not None:
            return self.implicit_scale
        steps = min(self.schedule.freq, self.horizon)
        return self._effective_lr(name) * steps * steps / max(self.schedule.freq, 1)

    def learn(self, grads: dict[str, Tensor]) -> None:
        tau = self.current_tau()
        for name, grad in grads.items():
            masked = self.weights[name]
            if not masked.weight.requires_grad:
                continue  # nothing that grows there could learn: a frozen layer keeps its mask
            positions = masked.layers[0].support_positions
            if positions is None:
                raise RuntimeError(f"{name!r} collects no search space any more; did another call its collect()?")
            weight, active = masked.weight.reshape(-1)[positions], masked.mask.reshape(-1)[positions]
            grad = grad * self._clipping(masked, positions, active, grad)
            scores = masked.scores.reshape(-1)
            u = scores[positions]
            psi = torch.sigmoid((u + self._noise(u) if self.gumbel else u) / tau)
            direct, implicit = self._hypergradient(name, weight, psi, grad)
            if self.implicit_on == "search":
                implicit.masked_fill_(active, 0)
            self._sizes.add(direct, implicit)
            u = u - self.current_score_lr(name) * (direct + implicit) * psi * (1 - psi) / tau
            scores[positions] = u.to(scores.dtype)
            if not masked.scores.is_contiguous():  # the model went to channels_last meanwhile, and reshape copied
                masked.scores.copy_(scores.view(masked.scores.shape))

    @staticmethod
    def _clipping(masked: MaskedWeight, positions: Tensor, active: Tensor, grad: Tensor) -> Tensor | float:
        """How much of ``G`` the loop has left of it in ``weight.grad``, which is ``m * G`` before it is clipped.

        Scores are to go at the pace of the weights, and so by the gradient that these are stepped with. What is not a
        multiple of ``G`` is no clipping; torch's Nesterov steps, for one, may leave their own direction there.
        """
        if masked.weight.grad is None:
            return 1.0
        whole = torch.where(active, grad, 0)
        left = torch.where(active, masked.weight.grad.reshape(-1)[positions].to(whole.dtype), 0)
        product = (whole * left).sum()
        share = product / whole.square().sum()
        is_multiple = share * (product / left.square().sum()) > 0.999  # the squared cosine of their angle
        return torch.where(is_multiple & (share > 0) & (share < 1), share, 1)

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.rand(like.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return noise.to(like.device).logit_(1e-6)

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {}
        for name, masked in self.weights.items():
            if masked.is_dense or not masked.weight.requires_grad:
                continue
            with naming(name):
                masks[name] = masked.pattern.mask(self._mean_scores(masked), masked.num_kept)
        return masks

    def _mean_scores(self, masked: MaskedWeight) -> Tensor:
        """Scores whose sum over a group is the mean: blocks at the edges may be smaller than the others."""
        pattern, scores = masked.pattern, masked.scores
        return scores / pattern.expand(pattern.group_scores(torch.ones_like(scores)), scores.shape)

    def _apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Change the masks, and renew the search space around them."""
        before = {name: self.weights[name].mask.clone() for name in masks}
        super()._apply_masks(masks)
        for name in masks:
            masked = self.weights[name]
            self._renew_search_space(masked, left=before[name] & ~masked.mask)

    def _renew_search_space(self, masked: MaskedWeight, left: Tensor) -> None:
        old = masked.layers[0].support_positions
        old = None if old is None else old.clone()  # collect() writes over it
        masked.scores.masked_fill_(masked.mask & ~self.learning_mask(masked), self.initial_score)  # from outside of E
        masked.scores.masked_fill_(~masked.mask, -math.inf)
        masked.scores.masked_fill_(left, self.initial_score - self.margin)
        self._fill_search_space(masked, masked.scores)
        self._collect_search_space(masked)
        new = masked.layers[0].support_positions
        if old is not None and new is not None:
            numel = masked.scores.numel()
            self._mean_grad.move(masked.name, old, new, numel, fill=lambda sums: sums.new_zeros(()))
            # A zero curvature would make the steps of what is new huge; the layer's mean is a better guess.
            self._curvature.move(masked.name, old, new, numel, fill=torch.mean)

    def _collect_search_space(self, masked: MaskedWeight) -> None:
        if masked.is_dense:
            masked.collect("none")
        else:
            masked.collect("search", self.learning_mask(masked).reshape(-1).nonzero().squeeze(1))

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        for masked in self.weights.values():
            self._collect_search_space(masked)


def _not_finite(grads: Mapping[str, Tensor]) -> list[str]:
    return [name for name, grad in grads.items() if not bool(grad.isfinite().all())]


def _choose(argument: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is not known; allowed: {', '.join(allowed)}")
    return value
