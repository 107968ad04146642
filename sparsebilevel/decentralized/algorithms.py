"""Decentralized bi-level pruning (formulation of this library, see docs/decentralized.md), and its rivals.

Worker k of K has a loss L_k, weights y_k and a relaxed mask x_k in [0, 1]; its network computes with x ⊙ y.

    lower level   y*(x) = argmin_y  mean_k L_k(x ⊙ y) + ridge/2 |y|²
    upper level   min over x in X   mean_k L_k(x ⊙ y*(x)) + strength R(x)

A round takes some steps on y and one projected step on x. After a part of the rounds the workers agree on one binary
mask with exactly the asked number of zeros, and train the weights under it. All algorithms here are settings of one
class; `ALGORITHMS` lists them. With G = dL/d(x ⊙ y): dL/dy = x ⊙ G and dL/dx = y ⊙ G.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_number, check_whole
from ..comm import CommunicationError
from ..kernels import binarize
from ..masks import check_sparsity
from .estimators import ESTIMATORS, Estimator, Gradient, Point, mean_cost, mix_seed
from .gossip import Gossip, Values, consensus_error
from .graphs import is_connected
from .tasks import Problem
from .tracking import TRACKING, TrackedStep

HYPERGRADIENTS = ("direct", "implicit", "penalty")
CONSTRAINTS = ("simplex", "box", "count")
INITIAL_MASKS = ("ones", "magnitude")
NORMALIZATIONS = ("none", "mask", "tensor")
REGULARIZERS = ("none", "l1", "group")
MASKS = ("learned", "dense", "magnitude-after", "magnitude-during")
CLIPS = ("none", "update", "mask")
SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass
class Settings:
    """What an algorithm is made of. The first block is what `ALGORITHMS` chooses.

    Attributes:
        mask: ``learned``, ``dense``, or by magnitude: at the end of the search (``magnitude-after``), or along the same
            course as a learned one (``magnitude-during``).
        hypergradient: ``direct``, ``implicit`` or ``penalty``.
        inner_steps: steps on the weights in a round.
        lower, upper: estimators of the weights' gradient and of the hypergradient, see `estimators`.
        tracking: ``none``, ``cta`` or ``atc``, see `tracking`.
        clip: ``update``: steps on the weights are clipped to ±``clip_at``; ``mask``: mask entries below ``clip_at``
            become zero, in the place of the constraint.
        sparsity: asked fraction of zeros among the weights that have a mask.
        constraint: on the relaxed mask: ``simplex`` (its sum), ``count`` (its entries that are not zero) or ``box``.
        initial_mask: ``ones``, or ``magnitude``: the ranks of the initial weights' magnitudes, by their number.
        regularizer: ``none``, ``l1`` or ``group`` (norms of rows), times ``strength``.
        ridge: of the lower level.
        lr, mask_lr: first step sizes of weights and mask; ``schedule`` is their course.
        normalize: ``mask_lr`` is the mean size of a step on the entries of the ``mask``, or of each ``tensor`` of it;
            with ``none`` it multiplies the hypergradient.
        batch_size: samples of one gradient.
        rho: of ``storm`` and ``finite``.
        period: of ``svrg`` and ``spider``, in steps; 0 is an epoch.
        epsilon: of the penalty.
        implicit_scale: factor of the implicit term, in the place of 1 / ``ridge``.
        search: part of the rounds in which the mask is open.
        seed: of all batches.
    """

    mask: str = "learned"
    hypergradient: str = "direct"
    inner_steps: int = 2
    lower: str = "saga"
    upper: str = "saga"
    tracking: str = "atc"
    clip: str = "none"
    # the problem
    sparsity: float = 0.8
    constraint: str = "simplex"
    initial_mask: str = "ones"
    regularizer: str = "none"
    strength: float = 0.0
    ridge: float = 1e-4
    # the steps
    lr: float = 0.1
    mask_lr: float = 0.05
    schedule: str = "cosine"
    normalize: str = "mask"
    batch_size: int = 32
    rho: float = 0.1
    period: int = 0
    epsilon: float = 0.1
    implicit_scale: float | None = None
    clip_at: float = 0.4
    # the run
    search: float = 0.5
    seed: int = 0

    def validate(self, maskable: int) -> None:
        """Raise ValueError, naming the setting, where a value is not allowed; ``maskable`` weights have a mask."""
        check_sparsity(self.sparsity)
        choices = {
            "mask": MASKS,
            "hypergradient": HYPERGRADIENTS,
            "lower": ESTIMATORS,
            "upper": ESTIMATORS,
            "tracking": TRACKING,
            "clip": CLIPS,
            "schedule": SCHEDULES,
            "constraint": CONSTRAINTS,
            "initial_mask": INITIAL_MASKS,
            "normalize": NORMALIZATIONS,
            "regularizer": REGULARIZERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(allowed)}")
        for name, least in {"inner_steps": 1, "batch_size": 1, "period": 0, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)
        for name in ("lr", "mask_lr", "epsilon"):
            check_number(name, getattr(self, name), without_least=True)
        for name in ("strength", "ridge"):
            check_number(name, getattr(self, name))
        if self.implicit_scale is not None:
            check_number("implicit_scale", self.implicit_scale)
        check_number("rho", self.rho, most=1)
        check_number("search", self.search, most=1, without_least=True)
        # Entries of the mask are at most 1: a larger limit would leave none.
        check_number("clip_at", self.clip_at, most=1 if self.clip == "mask" else math.inf, without_least=True)
        if self.mask != "dense" and not maskable:
            raise ValueError(f"mask={self.mask!r} is not allowed where no parameter has a mask; expected 'dense'")
        if self.mask != "dense" and round(self.sparsity * maskable) == maskable:
            raise ValueError(f"sparsity={self.sparsity!r} is too high: it leaves none of {maskable} weights")
        if self.hypergradient == "implicit" and self.implicit_scale is None and self.ridge == 0:
            raise ValueError("hypergradient='implicit' needs ridge > 0, or an implicit_scale")


_STORM = {"lower": "storm", "upper": "storm", "inner_steps": 10}
_PENALTY = {"hypergradient": "penalty", "upper": "sgd", "lower": "sgd", "tracking": "none"}
_ASCENT = {"hypergradient": "penalty", "inner_steps": 1, "lower": "storm", "upper": "storm", "tracking": "atc"}
_PLAIN = {"lower": "sgd", "upper": "sgd", "tracking": "none", "mask": "dense", "inner_steps": 10}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "bilevel": {},
    "bilevel-storm": _STORM,
    "bilevel-implicit": {"hypergradient": "implicit"},
    "bilevel-penalty": {"hypergradient": "penalty"},
    "d-svrgda": {**_ASCENT, "mask": "dense"},
    "d-svrgda-clip-update": {**_ASCENT, "clip": "update"},
    "d-svrgda-clip-mask": {**_ASCENT, "clip": "mask"},
    "d-f2bsa-1": {**_PENALTY, "inner_steps": 1},
    "d-f2bsa-5": {**_PENALTY, "inner_steps": 5},
    "d-f2bsa-10": {**_PENALTY, "inner_steps": 10},
    "d-f2bsa-vr": {**_PENALTY, "inner_steps": 1, "upper": "storm"},
    "d-sgd": _PLAIN,
    "d-sgd-tracking": {**_PLAIN, "tracking": "atc"},
    "magnitude-after": {**_PLAIN, "tracking": "atc", "mask": "magnitude-after"},
    "magnitude-during": {**_PLAIN, "tracking": "atc", "mask": "magnitude-during"},
}
"""Name -> the settings that make it. All d-svrgda and d-f2bsa are reconstructions, see docs/decentralized.md."""

DENSE_ALGORITHMS = tuple(name for name, choice in ALGORITHMS.items() if choice.get("mask") == "dense")


# -- projections -------------------------------------------------------------------------------------------------------


def project_capped_simplex(x: Tensor, total: float) -> Tensor:
    """Onto 0 <= x <= 1 with sum ``total``: ``clip(x - mu, 0, 1)``, mu by bisection in float64."""
    if not 0 <= total <= x.numel():
        raise ValueError(f"total={total!r} is not allowed; expected a number in [0, {x.numel()}]")
    if total == x.numel():
        return torch.ones_like(x)
    wide = x.double()
    low, high = (wide.min() - 1).item(), wide.max().item()  # the sums there are numel and 0
    for _ in range(60):
        middle = (low + high) / 2
        if (wide - middle).clamp(0, 1).sum().item() > total:
            low = middle
        else:
            high = middle
    return (wide - (low + high) / 2).clamp(0, 1).to(x.dtype)


def project_count(x: Tensor, count: int) -> Tensor:
    """Onto 0 <= x <= 1 with at most ``count`` entries that are not zero: the largest, ties to the smaller index."""
    return x.clamp(0, 1) * binarize(x, count)


class Decentralized:
    """An algorithm on a problem. `round` goes one round on; `evaluate` says where it stands.

    Args:
        problem: the network, its loss and the data of each worker.
        gossip: connects the workers of this process with the others.
        settings: see `Settings`.
        budget: sample gradients that a worker may compute on average; it fixes `rounds`.

    Raises:
        ValueError: a setting or a budget that is not allowed, another number of workers in ``problem`` than in
            ``gossip``, or no parameter has a mask and ``settings.mask`` is not ``dense``.

    Attributes:
        rounds: number of rounds of the run.
        search_rounds: those in which the mask is still open.
        done: rounds so far.
        evaluations: sample gradients that each worker here has computed.
        x, y: mask ``[P]`` and weights ``[P]`` of each worker here, P all parameters, those with a mask first; on the
            problem's device. With the penalty form y is ``[2 P]``: the weights, and those of the lower level alone.
    """

    def __init__(self, problem: Problem, gossip: Gossip, settings: Settings, budget: float) -> None:
        settings.validate(problem.maskable)
        check_number("budget", budget, without_least=True)
        if len(problem.sizes) != gossip.comm.world_size:
            raise ValueError(f"problem has parts for {len(problem.sizes)} workers, gossip {gossip.comm.world_size}")
        self.problem, self.gossip, self.settings = problem, gossip, settings
        s, self.size, self.maskable = settings, problem.size, problem.maskable
        self.kept = self.maskable - round(check_sparsity(s.sparsity) * self.maskable)
        if s.mask == "dense":
            self.kept = self.maskable
        self.device = problem.device
        self._begin(agreed=False)
        copies = 2 if self.is_penalty else 1
        mask, weights = self._initial()
        self.x: Values = {k: mask.clone() for k in gossip.comm.ranks}
        self.y: Values = {k: weights.repeat(copies) for k in gossip.comm.ranks}
        self._masks: Values = {}
        self.done = 0
        self.evaluations = dict.fromkeys(gossip.comm.ranks, 0)
        self._process = gossip.comm.ranks[0]  # by which the others know this process, whoever of it is lost
        # At worker 0 the last counts that it knows, of lost workers too: by worker, by process, by that and kind.
        self._evaluated, self._resent, self._sent = Counter[int](), Counter[int](), Counter[tuple[int, str]]()
        self._lost = 0
        cost = s.inner_steps * self._mean_cost(s.lower)
        upper_cost = copies * self._mean_cost(s.upper) if s.mask == "learned" else 0.0
        later_cost = cost * (copies if s.mask == "dense" else 1)  # under an agreed mask there is one level
        mean_cost = s.search * (copies * cost + upper_cost) + (1 - s.search) * later_cost
        self.rounds = max(2, int(budget / mean_cost))
        self.search_rounds = max(1, int(s.search * self.rounds))
        self._update_masks()

    def _initial(self) -> tuple[Tensor, Tensor]:
        """Mask and weights at the start; their product is the problem's network in any case."""
        weights = self.problem.initial()
        mask = torch.ones_like(weights)
        if self.settings.initial_mask == "magnitude" and self.settings.mask == "learned":
            order = weights[: self.maskable].abs().argsort(stable=True)
            ranks = torch.arange(1, self.maskable + 1, dtype=mask.dtype, device=mask.device)
            mask[order] = ranks / self.maskable
        return mask, weights / mask

    def _begin(self, agreed: bool) -> None:
        """New estimators and trackers. From the agreement on, the lower level is all there is, and a new problem."""
        s, gossip = self.settings, self.gossip
        self.is_penalty = not agreed and s.hypergradient == "penalty" and s.mask in ("learned", "dense")
        ranks = gossip.comm.ranks
        self.lower = {k: self._estimator(k, s.lower, self._lower_gradient, 2 if agreed else 0) for k in ranks}
        self.upper = {k: self._estimator(k, s.upper, self._upper_gradient, 1) for k in ranks}
        self.lower_step = TrackedStep(gossip, s.tracking, "weights")
        self.upper_step = TrackedStep(gossip, s.tracking, "mask")
        gossip.error.clear()  # of other vectors, with the penalty of another length

    def _estimator(self, k: int, name: str, gradient: Callable[..., Tensor], level: int) -> Estimator:
        s = self.settings
        of_worker: Gradient = functools.partial(gradient, k)
        seed = mix_seed(s.seed, k, level)
        return Estimator(name, self.problem.sizes[k], of_worker, s.batch_size, seed, s.rho, s.period)

    def _mean_cost(self, name: str) -> float:
        """Of a call of an estimator, over all workers: every process must come to the same number of rounds."""
        s, sizes = self.settings, self.problem.sizes
        return sum(mean_cost(name, size, s.batch_size, s.rho, s.period) for size in sizes) / len(sizes)

    # -- the two levels

    def _gradient(self, k: int, z: Tensor, indices: Tensor, key: int) -> Tensor:
        self.evaluations[k] += len(indices)
        return self.problem.gradient(k, z, indices, key)

    def _lower_gradient(self, k: int, point: Point, indices: Tensor, key: int) -> Tensor:
        """Of the lower level at (x, y); with the penalty, of its y times epsilon and of its z."""
        x, y = point
        ridge, P = self.settings.ridge, self.size
        first = x * self._gradient(k, x * y[:P], indices, key)
        if not self.is_penalty:
            return first + ridge * y
        second = x * self._gradient(k, x * y[P:], indices, key)
        # epsilon (L(x y) + (1/epsilon) (L(x y) + ridge/2 |y|^2)): of the size of the lower level's own gradient
        return torch.cat([(1 + self.settings.epsilon) * first, second]) + ridge * y

    def _upper_gradient(self, k: int, point: Point, indices: Tensor, key: int) -> Tensor:
        """The hypergradient of L at (x, y), of the positions that have a mask."""
        x, y = point
        s, P, d = self.settings, self.size, self.maskable
        g = self._gradient(k, x * y[:P], indices, key)[:d]
        direct = y[:d] * g
        if s.hypergradient == "implicit":
            scale = 1 / s.ridge if s.implicit_scale is None else s.implicit_scale
            return direct - scale * x[:d] * g * g
        if self.is_penalty:
            below = self._gradient(k, x * y[P:], indices, key)[:d]
            return direct + (direct - y[P : P + d] * below) / s.epsilon
        return direct

    def _regularizer_gradient(self, x: Tensor) -> Tensor:
        s = self.settings
        if s.regularizer == "none" or s.strength == 0:
            return torch.zeros_like(x)
        if s.regularizer == "l1":
            return torch.full_like(x, s.strength)
        parts = [s.strength * _group_gradient(part) for part in self.problem.split_masked(x)]
        return torch.cat([part.reshape(-1) for part in parts])

    def regularizer(self, x: Tensor) -> float:
        """``strength * R(x)`` of the positions that have a mask."""
        s = self.settings
        if s.regularizer == "none":
            return 0.0
        if s.regularizer == "l1":
            return s.strength * x.sum().item()
        return s.strength * sum(_norms(part).sum().item() for part in self.problem.split_masked(x))

    # -- a round

    def round(self) -> None:
        """Steps on the weights, then one on the mask while that is open.

        Raises:
            CommunicationError: a neighbour does not answer, or those who are left are not connected any more.
            ValueError: weights are no longer finite when a mask is made of them, or the run is at its end.
        """
        if self.done == self.rounds:
            raise ValueError("the run is at its end")
        self._notice_losses()
        s = self.settings
        lr = s.lr * self._cosine(self.done, self.rounds)
        for _ in range(s.inner_steps):
            gradients = {k: self.lower[k]((self.x[k], self.y[k])) for k in self.y}
            limit = (lambda step: step.clamp(-s.clip_at, s.clip_at)) if s.clip == "update" else None
            self.y = self.lower_step(self.y, gradients, lr, self._lower_masks(), limit)
        self.done += 1
        if self.done <= self.search_rounds and s.mask == "learned":
            self._mask_step()
        elif self.done < self.search_rounds and s.mask == "magnitude-during":
            for k, x in self.x.items():
                x = torch.cat(
                    [binarize(self._magnitude(self.y[k][: self.maskable]), self._count()).float(), x[self.maskable :]]
                )
                self.x[k] = x
            self._update_masks()
        if self.done == self.search_rounds and s.mask != "dense":
            self._agree()

    def _notice_losses(self) -> None:
        """Restart all trackers in the same round after a worker was lost: its part of their mean went with it."""
        comm = self.gossip.comm
        if comm.welcome(self.done, self.gossip.clocks):
            self.gossip.forget()  # those who are back do not know what others do
            comm.notice = max(comm.notice, self.done + comm.world_size)
        if len(comm.lost) > self._lost:
            self._check_connected()
            # The number spreads with the messages, over one edge a mixing; by then everyone has heard of it.
            comm.notice = max(comm.notice, self.done + comm.world_size)
        self._lost = len(comm.lost)  # of which the others know, or hear
        for name in ("x", "y", "_masks"):
            setattr(self, name, {k: v for k, v in getattr(self, name).items() if k in comm.ranks})
        if comm.notice == self.done > 0:
            self.lower_step.restart()
            self.upper_step.restart()

    def _check_connected(self) -> None:
        """Parts that hear nothing of each other would end with a mask each. Worker 0 hears of all losses in reports."""
        lost = self.gossip.comm.lost
        left = [k for k in range(self.gossip.comm.world_size) if k not in lost]
        if not is_connected(self.gossip.topology.adjacency[left][:, left]):
            raise CommunicationError(
                f"without the lost workers {sorted(lost)} the graph of the others is not connected, so that they "
                "cannot agree; take one with more edges"
            )

    def _cosine(self, done: int, rounds: int) -> float:
        """What is left of a step size after ``done`` of ``rounds``: its end decides how much noise stays."""
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * done / rounds)

    def _count(self) -> int:
        """Weights that the mask keeps now: from all to `kept` along a cubic, which prunes early when much is left."""
        done = min(1.0, self.done / max(1, 0.8 * self.search_rounds))
        return self.kept + round((self.maskable - self.kept) * (1 - done) ** 3)

    def _mask_step(self) -> None:
        s, d = self.settings, self.maskable
        estimates = {k: self.upper[k]((self.x[k], self.y[k])) for k in self.x}
        gradients = {k: v + self._regularizer_gradient(self.x[k][:d]) for k, v in estimates.items()}
        lr = s.mask_lr * self._cosine(self.done - 1, self.search_rounds)
        limit = None if s.normalize == "none" else (lambda step: self._rescale(step, lr))
        mixed = self.upper_step({k: x[:d] for k, x in self.x.items()}, gradients, lr, None, limit)
        for k, x in mixed.items():
            if s.clip == "mask":
                x = x.clamp(0, 1)
                x = x * (x >= s.clip_at)
            elif s.constraint == "box":
                x = x.clamp(0, 1)
            elif s.constraint == "simplex":
                x = project_capped_simplex(x, self._count())
            else:
                x = project_count(x, self._count())
            self.x[k] = torch.cat([x, self.x[k][d:]])
        self._update_masks()

    def _rescale(self, step: Tensor, size: float) -> Tensor:
        """A step on the mask of the mean size ``size``, over all of it or in every tensor."""
        if self.settings.normalize == "mask":
            return _scale_to(step, size)
        return torch.cat([_scale_to(part, size).flatten() for part in self.problem.split_masked(step)])

    def _update_masks(self) -> None:
        """Boolean supports; the object stays the same as long as the mask does, by which gossip knows it."""
        for k, x in self.x.items():
            mask = x > 0
            mask = mask.repeat(2) if self.is_penalty else mask
            if k not in self._masks or not torch.equal(mask, self._masks[k]):
                self._masks[k] = mask

    def _lower_masks(self) -> Values | None:
        return None if self.settings.mask == "dense" else self._masks

    # -- one mask for all

    def _agree(self) -> None:
        """Average the scores, let the first worker's largest be the mask, and fold x into the weights under it."""
        d, comm = self.maskable, self.gossip.comm
        scores = {k: self._scores(self.x[k][:d], self.y[k][:d]) for k in self.x}
        if comm.world_size > 1:
            topology = self.gossip.topology
            fast = Gossip(comm, topology, chebyshev=len(topology.matrices) == 1)
            left = math.sqrt(fast.momentum) or topology.second_eigenvalue  # of a disagreement, after one mixing
            turns = math.log(1e-3) / math.log(max(left, 1e-3)) / len(topology.matrices)
            fast.steps = math.ceil(turns) * len(topology.matrices)
            fast.clocks = self.gossip.clocks
            scores = fast.mix(scores, "agreement")
        masks = self._flood({k: binarize(score, self.kept) for k, score in scores.items()})
        P = self.size
        for k, mask in masks.items():
            x = torch.cat([mask.float(), self.x[k][d:]])
            self.x[k], self.y[k] = x, self.x[k] * self.y[k][:P]
        self._begin(agreed=True)
        self._update_masks()

    def _scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Importances: the mask, and among equals the magnitude; magnitude alone where the mask is not learned."""
        magnitude = self._magnitude(y)
        if self.settings.mask != "learned":
            return magnitude * x if self.settings.mask == "magnitude-during" else magnitude
        return x + 1e-4 * magnitude / magnitude.max().clamp_min(1e-30)

    def _magnitude(self, y: Tensor) -> Tensor:
        if not y.isfinite().all():
            raise ValueError(f"lr={self.settings.lr!r} is too large: the weights are no longer finite")
        return y.abs()

    def _flood(self, masks: Mapping[int, Tensor]) -> Values:
        """The mask of the first living worker, handed on from neighbour to neighbour, one bit a weight.

        It takes as many exchanges as the longest way can have: workers that know of different losses, and would go by
        the graph that is left, would not do the same number.
        """
        comm, topology = self.gossip.comm, self.gossip.topology
        best = {k: struct.pack("<q", k) + np.packbits(mask.cpu().numpy()).tobytes() for k, mask in masks.items()}
        for _ in range(comm.world_size - 1):
            neighbours = {k: topology.adjacency[k].nonzero().flatten().tolist() for k in best}
            incoming = comm.exchange({k: dict.fromkeys(neighbours[k], best[k]) for k in best}, "agreement")
            best = {k: min([best[k], *incoming[k].values()], key=lambda b: struct.unpack_from("<q", b)) for k in best}
        bits = {k: np.unpackbits(np.frombuffer(b[8:], np.uint8), count=self.maskable) for k, b in best.items()}
        return {k: torch.from_numpy(b).bool().to(self.device) for k, b in bits.items()}

    # -- where it stands

    def evaluate(self) -> dict[str, Any] | None:
        """A row of figures, at the process of worker 0; None elsewhere. All processes must call it.

        ``upper_loss`` and, of classifiers, ``test_acc`` (``test_auc`` of two classes) are those of the workers' mean,
        binarized to the asked sparsity, the former as a mean over the workers' data; ``local_loss`` is that of each
        worker's own model on its own data; ``sparsity`` is what the mean model really has, of the positions with a
        mask; ``mask_sparsity`` the zeros in the workers' relaxed masks; ``mask_agreed`` whether those have become one
        binary mask; ``consensus_error`` that of the effective weights; ``workers`` how many are left, of which all
        these are. ``evaluations``, sample gradients of a worker on average, ``bytes``, by kind, and ``resent`` count
        what lost workers had done by their last report too. All workers wait until the row is made, however long that
        takes.

        Raises:
            CommunicationError: a worker does not answer, or those who are left are not connected any more.
            ValueError: weights are no longer finite.
        """
        comm, P = self.gossip.comm, self.size
        with comm.alive():
            out = {}
            for k in comm.ranks:
                counts = {
                    "evaluations": self.evaluations[k],
                    "process": self._process,
                    "resent": comm.resent,
                    "sent": comm.sent,
                    "local_loss": self.problem.local_loss(k, self.x[k] * self.y[k][:P]),
                }
                text = json.dumps(counts).encode()
                state = torch.cat([self.x[k], self.y[k][:P]]).cpu().numpy().tobytes()
                out[k] = struct.pack("<I", len(text)) + text + state
            gathered = comm.gather(out)
            if gathered is None:
                return None
            self._check_connected()
            return self._summarize(gathered)

    def _summarize(self, gathered: Mapping[int, bytes]) -> dict[str, Any]:
        P, d = self.size, self.maskable
        xs, ys, losses = {}, {}, []
        for k, data in gathered.items():
            (length,) = struct.unpack_from("<I", data)
            counts = json.loads(data[4 : 4 + length])
            losses.append(counts["local_loss"])
            # Of equal names the larger count stays: a worker that comes back has those of its checkpoint.
            process = counts["process"]
            self._evaluated |= Counter({k: counts["evaluations"]})
            self._resent |= Counter({process: counts["resent"]})
            self._sent |= Counter({(process, kind): count for kind, count in counts["sent"].items()})
            state = torch.frombuffer(bytearray(data[4 + length :]), dtype=torch.float32).to(self.device)
            xs[k], ys[k] = state[:P], state[P:]
        self.mean_x = torch.stack(list(xs.values())).mean(0)
        self.mean_y = torch.stack(list(ys.values())).mean(0)
        z = self.final_weights()
        # F at one model for all: workers that drift apart have lower losses, each on its own data.
        common = [self.problem.local_loss(k, z) for k in gathered]
        loss = sum(common) / len(common) + self.regularizer(self.mean_x[:d])
        is_binary = self.done >= self.search_rounds and self.settings.mask != "dense"
        masks = [x[:d] for x in xs.values()]
        sent = Counter[str]()
        for (_, kind), count in self._sent.items():
            sent[kind] += count
        return {
            "round": self.done,
            "evaluations": self._evaluated.total() / self.gossip.comm.world_size,
            "upper_loss": loss,
            "local_loss": sum(losses) / len(losses),
            **self.problem.test(z),
            "consensus_error": consensus_error({k: xs[k] * ys[k] for k in xs}),
            "sparsity": 1 - torch.count_nonzero(self.final_mask()).item() / d if d else 0.0,
            "mask_sparsity": sum((x[:d] == 0).float().mean().item() for x in xs.values()) / len(xs),
            "mask_agreed": is_binary and all(torch.equal(mask, masks[0]) for mask in masks),
            "bytes": dict(sent),
            "bytes_total": sent.total(),
            "resent": self._resent.total(),
            "workers": len(gathered),
        }

    def final_mask(self) -> Tensor:
        """Bool ``[d]`` of the mean model of the last `evaluate`: what the asked sparsity leaves."""
        d = self.maskable
        if not hasattr(self, "mean_x"):
            raise RuntimeError("the mean model is gathered by evaluate(), at the process of worker 0 alone")
        return binarize(self._scores(self.mean_x[:d], self.mean_y[:d]), self.kept)

    def final_weights(self) -> Tensor:
        """Effective weights ``[P]`` of the mean model of the last `evaluate`, under `final_mask`."""
        mask = self.final_mask()
        z = self.mean_x * self.mean_y
        return torch.cat([z[: self.maskable] * mask, z[self.maskable :]])

    # -- checkpoints, one for each worker

    def state_dict(self, k: int) -> dict[str, Any]:
        """All that worker k needs to go on to the same numbers, the bytes sent among them."""
        self.gossip.forget()
        comm = self.gossip.comm
        is_first = k == comm.ranks[0]
        return {
            "model": {"x": self.x[k], "y": self.y[k]},
            "settings": dataclasses.asdict(self.settings),
            "round": self.done,
            "rounds": self.rounds,
            "clocks": dict(self.gossip.clocks),
            "notice": comm.notice,
            "lower": self.lower[k].state_dict(),
            "upper": self.upper[k].state_dict(),
            "lower_step": self.lower_step.state_dict(k),
            "upper_step": self.upper_step.state_dict(k),
            "error": {kind: values[k] for kind, values in self.gossip.error.items() if k in values},
            "sent": dict(comm.sent) if is_first else {},
            "evaluations": self.evaluations[k],
        }

    def rejoin(self, state: dict[str, Any]) -> None:
        """Come back to the running others with the last checkpoint of this process's worker.

        Raises:
            ValueError: they have agreed on a mask in the meantime.
        """
        comm = self.gossip.comm
        self.load_state_dict({comm.ranks[0]: state})
        round, clocks = comm.return_to(self.rounds)  # type: ignore[attr-defined]
        if state["round"] < self.search_rounds <= round and self.settings.mask != "dense":
            raise ValueError(
                f"checkpoint of worker {comm.ranks[0]} is of round {state['round']}, before the workers agreed on a "
                "mask; it cannot join them any more"
            )
        self.done, self.gossip.clocks, self._lost = round, Counter(clocks), len(comm.lost)
        comm.notice = max(comm.notice, round + comm.world_size)
        self.lower_step.restart()
        self.upper_step.restart()

    def load_state_dict(self, states: Mapping[int, dict[str, Any]]) -> None:
        """Continue from the ``state_dict`` of each worker here.

        Raises:
            ValueError: they are of different rounds, or of another run. Nothing has changed then.
        """
        rounds = {k: state["round"] for k, state in states.items()}
        if len(set(rounds.values())) > 1:
            raise ValueError(f"checkpoints are of different rounds: {rounds}; remove those that the others lack")
        ours = dataclasses.asdict(self.settings)
        for k, state in states.items():
            theirs = state.get("settings", {})
            odd = [name for name, value in ours.items() if theirs.get(name) != value]
            odd += ["sizes"] if state["model"]["x"].shape != self.x[k].shape else []
            odd += ["number of rounds"] if state["rounds"] != self.rounds else []
            odd += ["version"] if "clocks" not in state else []
            if odd:
                raise ValueError(f"checkpoint of worker {k} is of another run (other {', '.join(odd)})")
        comm = self.gossip.comm
        self._begin(agreed=next(iter(rounds.values())) >= self.search_rounds and self.settings.mask != "dense")
        for k, state in _to_device(dict(states), self.device).items():
            self.x[k], self.y[k] = state["model"]["x"], state["model"]["y"]
            self.done, comm.notice, self.gossip.clocks = state["round"], state["notice"], Counter(state["clocks"])
            self.lower[k].load_state_dict(state["lower"])
            self.upper[k].load_state_dict(state["upper"])
            self.lower_step.load_state_dict(k, state["lower_step"])
            self.upper_step.load_state_dict(k, state["upper_step"])
            for kind, value in state["error"].items():
                self.gossip.error.setdefault(kind, {})[k] = value
            for kind, count in state["sent"].items():
                comm.sent[kind] += count
            self.evaluations[k] = state["evaluations"]
        self.gossip.forget()
        self._update_masks()


def _to_device(state: Any, device: torch.device) -> Any:
    """The tensors in dictionaries, tuples and lists, on a device; checkpoints are read onto the CPU."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: _to_device(value, device) for key, value in state.items()}
    if isinstance(state, (tuple, list)):
        return type(state)(_to_device(value, device) for value in state)
    return state


def _scale_to(step: Tensor, size: float) -> Tensor:
    mean = step.abs().mean()
    return step * (size / mean) if mean > 0 else step


def _group_gradient(x: Tensor) -> Tensor:
    """Of the sum over rows of their Euclidean norms; zero where a row is zero."""
    shape = (-1, *[1] * (x.dim() - 1))
    return x / _norms(x).clamp_min(1e-12).view(shape)


def _norms(x: Tensor) -> Tensor:
    """Of the rows; of a vector each entry is one."""
    return x.unsqueeze(-1).flatten(1).norm(dim=1)
