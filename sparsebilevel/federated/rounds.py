"""The rounds of federated training: weights and hypernetwork in turns, with virtual clients in one process or several.

A round is one exchange with the clients. In a round of *weights* the sampled clients take ``local_steps`` (r_W) steps
from the server's weights, each with the gates of its own sub-network, and the server averages what they send. In a
round of the *hypernetwork* they take ``hyper_steps`` (r_theta) steps on it with the weights frozen. After the start of
the hypernetwork, a quarter of the epochs, such a round follows every ``hyper_interval * hyper_steps`` (r_HN r_theta)
steps on the weights. This is DWNP's Algorithm 1 with one difference: the r_theta steps between two averages of the
hypernetwork are taken in a row, where the algorithm spreads them over the steps on the weights.

All randomness is a function of (seed, purpose, round, client), and all other state is in `Federation.state_dict`, so a
run that is resumed repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data, Loader
from ..training.loop import TrainingError
from ..training.runtime import Ranks
from .flops import GateCosts, budget_penalty
from .hypernetwork import NOISES, Hypernetwork, merge_gates, open_threshold, sample_gates
from .local import FlatModule, adamw, full_gradient, train_weights
from .models import GatePoint, apply_gates, slice_gates

AVERAGES = ("mean", "mime_lite", "mime")
# The phases of each: the hypernetwork is trained with the weights (train+search), after them (search), or not at all.
METHODS = {
    "dwnp": ("train+search", "prune", "finetune"),
    "fedilp": ("train+search", "prune", "finetune"),
    "fedosp": ("train", "search", "prune", "finetune"),
    "filter": ("train", "prune", "finetune"),
    "random": ("train", "prune", "finetune"),
    "fedavg": ("train", "finetune"),
}

# Second words of a seed, one for each purpose.
_ORDER, _HYPER_PART, _HYPER_ORDER, _NOISE, _SAMPLE, _SCORES = range(6)


class FederationError(TrainingError):
    """The run cannot go on: too few clients return anything that can be used."""


@dataclass(frozen=True)
class Settings:
    """Of a federation; the defaults are DWNP's (section 4.1), where it says them, and its code's else.

    Attributes:
        method: one of `METHODS`.
        epochs: of training before pruning; an epoch has as many steps on each client as their mean data set has
            batches.
        finetune_epochs: after pruning.
        search_epochs: of the hypernetwork alone (fedosp).
        sample: clients of a round (S); None: all.
        min_clients: a round with fewer is repeated; None: half of those sampled.
        retries: of a round, with clients drawn anew.
        batch_size: of a client (a smaller data set is one batch).
        lr, momentum, weight_decay: of the local SGD. In training lr falls to a tenth at half of the epochs and again at
            three quarters, in fine-tuning along a cosine to 0, from ``finetune_lr``.
        local_steps: on the weights in a round (r_W).
        average: of the clients' momentum: ``mean`` of what they have after their steps (as DWNP's code), or Mime's
            ``mime_lite`` and ``mime``, which costs a gradient over each client's whole data set a round.
        weighting: of clients in averages: ``uniform`` (equation 1) or by ``samples``.
        hyper_lr, hyper_weight_decay: of the hypernetwork's local AdamW; lr falls to a tenth at half of the epochs.
        hyper_steps: on the hypernetwork in a round (r_theta).
        hyper_interval: steps on the weights for one on the hypernetwork (r_HN).
        hyper_start: part of the epochs before the hypernetwork is trained.
        hyper_part: part of a client's samples that train the hypernetwork; the weights have all.
        separate: the server has a hypernetwork of its own, see `Hypernetwork`.
        embedding: rows of devices in an average: ``mean`` of all clients (Algorithm 1), which divides the step of a row
            by their number, or the ``own`` device's alone.
        strength: lambda of the penalty on the budgets.
        two_sided: the penalty is the code's.
        detach_server: the devices' penalty does not push the server's gates (as in the code; else they sink with them).
        noise, temperature, soft: of the gates while the hypernetwork is trained, see `sample_gates`. The code has
            ``gumbel`` and soft gates in the loss.
        server_budget: kept fraction of T on the server (p_s), for DWNP.
        device_networks: what a device trains after pruning: the server's network with its other gates closed
            (``masked``, as DWNP's code), or its own ``sliced`` network. Then it gets, computes and sends only what it
            keeps, what it trains is what it will use, and an entry is averaged over the devices that have it.
        fill: exported gates use the budget up, where the hypernetwork stays below it.
        seed: of everything.
    """

    method: str = "dwnp"
    epochs: int = 200
    finetune_epochs: int = 200
    search_epochs: int = 50
    sample: int | None = None
    min_clients: int | None = None
    retries: int = 3
    batch_size: int = 25
    lr: float = 0.1
    finetune_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    local_steps: int = 5
    average: str = "mean"
    weighting: str = "uniform"
    hyper_lr: float = 1e-3
    hyper_weight_decay: float = 1e-2
    hyper_steps: int = 2
    hyper_interval: int = 10
    hyper_start: float = 0.25
    hyper_part: float = 0.1
    separate: bool = False
    embedding: str = "mean"
    strength: float = 2.0
    two_sided: bool = False
    detach_server: bool = True
    noise: str = "logistic"
    temperature: float = 0.4
    soft: bool = False
    server_budget: float = 0.8
    device_networks: str = "masked"
    fill: bool = False
    seed: int = 0

    def validate(self, clients: int) -> None:
        """Raise ValueError, naming the setting, its value and what is allowed."""
        choices = {"method": METHODS, "average": AVERAGES, "weighting": ("uniform", "samples"), "noise": NOISES}
        choices |= {"embedding": ("mean", "own"), "device_networks": ("masked", "sliced")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(allowed)}")
        least = {"epochs": 1, "finetune_epochs": 0, "search_epochs": 1, "retries": 0, "batch_size": 1, "seed": 0}
        least |= {"local_steps": 1, "hyper_steps": 1, "hyper_interval": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; expected at least {low}")
        for name in ("lr", "finetune_lr", "weight_decay", "hyper_lr", "hyper_weight_decay", "strength"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; expected a finite number >= 0")
        for name in ("momentum", "hyper_start"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; expected a number in [0, 1)")
        for name in ("hyper_part", "server_budget"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; expected a number in (0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r} is not allowed; expected a number above 0")
        for name in ("sample", "min_clients"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= (self.sample or clients if name == "min_clients" else clients):
                raise ValueError(f"{name}={value} is not allowed; expected 1 to the clients of a round, of {clients}")


@dataclass(frozen=True)
class Phase:
    """A part of the run: ``rounds`` rounds of weights, or of the hypernetwork alone (``search``); ``prune`` is one."""

    name: str
    epochs: int
    rounds: int


class _Share(NamedTuple):
    """The network that a client trains, and where its entries are in the server's vectors."""

    flat: FlatModule
    values: Any
    statistics: Any


class Federation:
    """A server and its virtual clients, which share one network in turns.

    Args:
        model: dense; is changed.
        points: its gate points (none are needed for ``fedavg``).
        data: `load_data`'s; its training loader's augmentation is the clients'.
        parts, test_parts: positions of each client's training and test samples.
        budgets: kept fraction of T for each device (p_d). Methods without sub-networks of the devices' own prune the
            one network to the smallest of them.
        settings: how to run.
        hypernetwork: None makes one, from torch's global generator.
        report: gets messages for people, about clients that were left out.
        ranks: processes that share the clients' work, client k for rank k modulo their number; None: this one alone.
            The numbers are the same.

    Attributes:
        model: the server's network; after pruning the smaller one.
        gates: what was pruned: bool ``[G]`` of the server and ``[clients, G]`` of the devices; None before.
        done: rounds so far; ``phase`` the index of the current phase, ``phase_round`` the rounds done in it.
        sent, received: bytes by kind, down to the clients whose work was used and up from them, tensors alone.
        failures: how often a client's part in a round was left out.
        fault: for tests and simulations: called as ``fault(kind, round, client)`` before a client's work; raises where
            the client is to fail.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[GatePoint],
        data: Data,
        parts: Sequence[Tensor],
        test_parts: Sequence[Tensor],
        budgets: Sequence[float],
        settings: Settings,
        hypernetwork: Hypernetwork | None = None,
        report: Callable[[str], None] = lambda message: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.clients = len(parts)
        settings.validate(self.clients)
        if not len(test_parts) == len(budgets) == self.clients:
            raise ValueError(f"{self.clients} parts, {len(test_parts)} test_parts, {len(budgets)} budgets: must agree")
        self.settings, self.points, self.budgets, self.report = settings, list(points), list(budgets), report
        self.ranks = ranks or Ranks(torch.device("cpu"))
        self.costs = GateCosts(model, points, data.input_shape) if points else None
        if self.costs is None and settings.method != "fedavg":
            raise ValueError(f"points is empty; method {settings.method} needs gate points")
        self.input_shape = data.input_shape
        self.sizes = [len(part) for part in parts]
        self._loaders = [self._loader(data.train, part, _ORDER, k) for k, part in enumerate(parts)]
        self._hyper_loaders = [
            self._loader(data.train, self._choose(part, k), _HYPER_ORDER, k) for k, part in enumerate(parts)
        ]
        self._tests = [data.test.subset(part) if len(part) else None for part in test_parts]

        self.personal = settings.method == "dwnp"  # devices have sub-networks of their own
        self.hyper: FlatModule | None = None
        if settings.method in ("dwnp", "fedilp", "fedosp"):
            assert self.costs is not None
            devices = self.clients if self.personal else 0
            hypernetwork = hypernetwork or Hypernetwork(self.costs.sizes, devices, shared=not settings.separate)
            self.hyper = FlatModule(hypernetwork)
            self.hyper_mean = torch.zeros_like(self.hyper.values)
            self.hyper_square = torch.zeros_like(self.hyper.values)
        self.hyper_step = self.hyper_rounds = 0
        self._use(model)
        self.momentum = torch.zeros_like(self.weights)
        self.gates: tuple[Tensor, Tensor] | None = None

        self.steps_per_epoch = max(1, sum(self.sizes) // (self.clients * settings.batch_size))
        self.phases = [self._phase(name) for name in METHODS[settings.method]]
        self.phases = [phase for phase in self.phases if phase.rounds]
        self.done = self.phase = self.phase_round = 0
        self.positions = {"weights": [0] * self.clients, "hypernetwork": [0] * self.clients}
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.failures = [0] * self.clients
        self.fault: Callable[[str, int, int], None] = lambda kind, round, client: None

    def _phase(self, name: str) -> Phase:
        s = self.settings
        if name == "prune":
            return Phase(name, 0, 1)
        epochs = {"search": s.search_epochs, "finetune": s.finetune_epochs}.get(name, s.epochs)
        steps = s.hyper_steps if name == "search" else s.local_steps
        return Phase(name, epochs, math.ceil(epochs * self.steps_per_epoch / steps))

    def _loader(self, train: Loader, part: Tensor, purpose: int, client: int) -> Loader:
        return train.subset(
            part,
            batch_size=min(self.settings.batch_size, len(part)),
            seed=self._seed(purpose, client),
            drop_last=True,
        )

    def _choose(self, part: Tensor, client: int) -> Tensor:
        """A client's samples for the hypernetwork."""
        count = max(1, round(self.settings.hyper_part * len(part)))
        order = torch.randperm(len(part), generator=self._generator(_HYPER_PART, client))
        return part[order[:count]].sort().values

    def _seed(self, *words: int) -> int:
        return int(np.random.SeedSequence((self.settings.seed, *words)).generate_state(1)[0])

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(*words))

    def _use(self, model: nn.Module) -> None:
        """Make this the server's network."""
        self.model = model
        self.flat = FlatModule(model)
        self.weights, self.statistics = self.flat.values.clone(), self.flat.statistics.clone()
        self._slices: list[_Share] | None = None

    def _use_gates(self, server: Tensor, devices: Tensor) -> None:
        """Cut the network, and make those of the devices."""
        self._use(slice_gates(self.model, self.points, server))
        self.gates = (server, devices)
        if self.personal and self.settings.device_networks == "sliced":
            numbered = copy.deepcopy(self.model).double()  # every entry is its own position
            tensors = (numbered.parameters(), (b for b in numbered.buffers() if b.is_floating_point()))
            for group in tensors:
                start = 0
                for tensor in group:
                    tensor.data = torch.arange(start, start + tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
                    start += tensor.numel()
            self._slices = []
            for is_open in devices[:, server]:
                kept = FlatModule(slice_gates(numbered, self.points, is_open))
                flat = FlatModule(slice_gates(self.model, self.points, is_open))
                self._slices.append(_Share(flat, kept.values.long(), kept.statistics.long()))

    def _share(self, client: int) -> _Share:
        return _Share(self.flat, slice(None), slice(None)) if self._slices is None else self._slices[client]

    # -- the course of a run ------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return self.phase == len(self.phases)

    @property
    def epoch(self) -> float:
        """Epochs done in this phase."""
        phase = self.phases[self.phase]
        return phase.epochs * self.phase_round / phase.rounds

    def round(self) -> dict[str, Any]:
        """The next round, with those of the hypernetwork if they are due; or pruning, which is one round.

        Returns:
            ``round``, ``phase``, ``epoch``, ``lr``, ``train_loss``, ``train_acc`` (of rounds of weights), and of those
            of the hypernetwork the means over clients and steps ``hyper_loss``, ``hyper_acc``, ``server_penalty``,
            ``device_penalty``.

        Raises:
            FederationError: too few clients, again and again.
        """
        if self.is_done:
            raise ValueError("the run is at its end")
        phase = self.phases[self.phase]
        row: dict[str, Any] = {}
        if phase.name == "prune":
            self.prune()
        elif phase.name == "search":
            row |= self._hyper_round()
        else:
            row |= self._weights_round(phase)
            if phase.name == "train+search":
                before, after = (self._hyper_rounds_due(phase, self.phase_round + more) for more in (0, 1))
                for _ in range(after - before):
                    row |= self._hyper_round()
        self.done += 1
        self.phase_round += 1
        row |= {"round": self.done, "phase": phase.name, "epoch": self.epoch}
        if self.phase_round == phase.rounds:
            self.phase, self.phase_round = self.phase + 1, 0
        return row

    def _hyper_rounds_due(self, phase: Phase, rounds: int) -> int:
        s = self.settings
        steps = rounds * s.local_steps - s.hyper_start * phase.epochs * self.steps_per_epoch
        return max(0, math.floor(steps / (s.hyper_interval * s.hyper_steps)))

    def _lr(self, phase: Phase) -> float:
        part = self.phase_round / phase.rounds
        if phase.name == "finetune":
            return self.settings.finetune_lr * (1 + math.cos(math.pi * part)) / 2
        return self.settings.lr * 0.1 ** (part >= 0.5) * 0.1 ** (part >= 0.75)

    # -- clients ------------------------------------------------------------------------------------------------------

    def _collect(
        self, kind: str, clients: Sequence[int] | None, work: Callable[[int], dict[str, Any]]
    ) -> dict[int, dict[str, Any]]:
        """What clients return, by number, without those that fail or return something that is not finite.

        Args:
            kind: of round, for counts and messages.
            clients: None draws them. If too few can be used, those given are asked again, or others drawn.
            work: of one client; the tensors in what it returns are sent, and ``down`` are the bytes that it got.
        """
        s = self.settings
        sampled = s.sample or self.clients
        least = s.min_clients if s.min_clients is not None else math.ceil(sampled / 2)
        for attempt in range(s.retries + 1):
            chosen: Sequence[int] = clients if clients is not None else self._draw(kind, attempt)
            mine = [k for k in chosen if k % self.ranks.world == self.ranks.rank]
            outcomes: dict[int, dict[str, Any] | str] = {}
            for part in self.ranks.gather({k: self._attempt(kind, k, work) for k in mine}):
                outcomes |= part
            results = {}
            for k in chosen:  # in the same order however they are spread
                outcome = outcomes[k]
                if isinstance(outcome, str):
                    self.failures[k] += 1
                    self.report(f"round {self.done + 1} ({kind}): client {k} is left out: {outcome}")
                else:
                    results[k] = outcome
            if len(results) >= least:
                for result in results.values():
                    self._count(self.sent, kind, result.pop("down"))
                    self._count(self.received, kind, _bytes(*(t for t in result.values() if isinstance(t, Tensor))))
                return results
            self.report(f"round {self.done + 1} ({kind}): {len(results)} clients, at least {least} are needed")
        raise FederationError(
            f"round {self.done + 1} ({kind}): {len(results)} of {len(chosen)} clients returned something that can be "
            f"used, at least {least} are needed, in {attempt + 1} attempts; the last failed because: {outcome}"
        )

    def _attempt(self, kind: str, client: int, work: Callable[[int], dict[str, Any]]) -> dict[str, Any] | str:
        """What the client returns, or why it cannot be used."""
        try:
            self.fault(kind, self.done, client)
            result = work(client)
        except Exception as error:  # whatever is wrong with one client, the others go on
            return f"{error}" or type(error).__name__
        odd = [n for n, value in result.items() if isinstance(value, Tensor) and not value.isfinite().all()]
        return f"not finite: {', '.join(odd)}" if odd else result

    def _draw(self, kind: str, attempt: int) -> list[int]:
        sampled = self.settings.sample or self.clients
        if sampled == self.clients:
            return list(range(self.clients))
        words = (_SAMPLE, self.done, self.hyper_rounds, int(kind == "hypernetwork"), attempt)
        return torch.randperm(self.clients, generator=self._generator(*words))[:sampled].sort().values.tolist()

    @staticmethod
    def _count(counter: dict[str, int], kind: str, count: int) -> None:
        counter[kind] = counter.get(kind, 0) + count

    def _mean(self, results: Mapping[int, Mapping[str, Any]], name: str, old: Tensor) -> Tensor:
        """Average over the clients that have an entry, in their order; ``old`` where there is none."""
        total, weights = torch.zeros_like(old), torch.zeros_like(old)
        for k, result in results.items():
            weight = self.sizes[k] if self.settings.weighting == "samples" else 1
            share = self._share(k)
            where = {"statistics": share.statistics, "hypernetwork": slice(None)}.get(name, share.values)
            total[where] += weight * result[name]
            weights[where] += weight
        return torch.where(weights > 0, total / weights.clamp_min(1), old)

    def _batches(self, kind: str, client: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = (self._loaders if kind == "weights" else self._hyper_loaders)[client]
        return itertools.islice(loader.stream(self.positions[kind][client]), count)

    def _load(self, client: int) -> FlatModule:
        """The client's network with the server's weights."""
        share = self._share(client)
        share.flat.load(self.weights[share.values], self.statistics[share.statistics])
        return share.flat

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _weights_round(self, phase: Phase) -> dict[str, Any]:
        s, lr = self.settings, self._lr(phase)
        mime = "" if s.average == "mean" else s.average
        # The devices' own networks have no other channels.
        gates = self.client_gates() if self._slices is None else None

        def start(k: int) -> contextlib.AbstractContextManager[None]:
            self._load(k).module.train()
            return self._gated(None if gates is None else gates[k])

        correction, survivors = None, None
        if mime:

            def gradient(k: int) -> dict[str, Any]:
                share = self._share(k)
                down = _bytes(self.weights[share.values], self.statistics[share.statistics])
                loader = self._loaders[k]
                every = loader.source.batches(loader.indices.split(loader.batch_size), None)
                with start(k):
                    return {"gradient": full_gradient(share.flat, every, s.weight_decay), "down": down}

            results = self._collect("weights", None, gradient)
            correction, survivors = self._mean(results, "gradient", torch.zeros_like(self.weights)), list(results)

        def work(k: int) -> dict[str, Any]:
            flat, values, _ = share = self._share(k)
            point, state = self.weights[values], self.momentum[values]
            direction = correction[values] if mime == "mime" and correction is not None else None
            down = [state] if direction is None else [state, direction]
            if not mime:  # else it has them
                down += [point, self.statistics[share.statistics]]
            if gates is not None and phase.name != "finetune":  # after pruning devices know their gates
                down.append(gates[k])
            size = _bytes(*down)
            batches = self._batches("weights", k, s.local_steps)
            with start(k):
                state, sums = train_weights(
                    flat, batches, point, state, lr, s.momentum, s.weight_decay, mime, direction
                )
            update: dict[str, Any] = {"weights": flat.values.clone(), "statistics": flat.statistics, "down": size}
            return update | sums | ({} if mime else {"momentum": state})

        results = self._collect("weights", survivors, work)
        for k in results:
            self.positions["weights"][k] += s.local_steps
        self.weights = self._mean(results, "weights", self.weights)
        self.statistics = self._mean(results, "statistics", self.statistics)
        if correction is not None:
            self.momentum = self.momentum.mul(s.momentum).add_(correction)
        else:
            self.momentum = self._mean(results, "momentum", self.momentum)
        self.flat.load(self.weights, self.statistics)
        loss, correct, count = (sum(r[name] for r in results.values()) for name in ("loss", "correct", "count"))
        return {"lr": lr, "train_loss": loss / count, "train_acc": correct / count}

    def _hyper_round(self) -> dict[str, Any]:
        assert self.hyper is not None
        s, hyper = self.settings, self.hyper
        phase = self.phases[self.phase]
        lr = s.hyper_lr * (0.1 if self.phase_round >= phase.rounds / 2 else 1)
        values = hyper.values.clone()
        self.flat.load(self.weights, self.statistics)
        self.model.eval().requires_grad_(False)

        def work(k: int) -> dict[str, Any]:
            down = _bytes(values, self.hyper_mean, self.hyper_square, self.weights, self.statistics)
            hyper.load(values)
            mean, square = self.hyper_mean.clone(), self.hyper_square.clone()
            figures = torch.zeros(4, dtype=torch.float64)
            for i, (x, y) in enumerate(self._batches("hypernetwork", k, s.hyper_steps)):
                generator = self._generator(_NOISE, self.hyper_rounds, k, i)
                _, gradient = hyper.gradient_of(lambda x=x, y=y, g=generator: self._loss(k, x, y, g, figures))  # type: ignore[misc]
                adamw(hyper.values, gradient, mean, square, self.hyper_step + i + 1, lr, s.hyper_weight_decay)
            return {"hypernetwork": torch.stack([hyper.values, mean, square]), "figures": figures, "down": down}

        try:
            results = self._collect("hypernetwork", None, work)
        finally:
            self.model.requires_grad_(True)
            hyper.load(values)
        new = self._mean(results, "hypernetwork", torch.stack([values, self.hyper_mean, self.hyper_square]))
        if s.embedding == "own":
            for k, result in results.items():
                new[:, self._row(k)] = result["hypernetwork"][:, self._row(k)]
        hyper.load(new[0])
        self.hyper_mean, self.hyper_square = new[1].clone(), new[2].clone()
        self.hyper_step += s.hyper_steps
        self.hyper_rounds += 1
        for k in results:
            self.positions["hypernetwork"][k] += s.hyper_steps
        figures = torch.stack([r["figures"] for r in results.values()]).mean(0) / s.hyper_steps
        names = ("hyper_loss", "hyper_acc", "server_penalty", "device_penalty")
        return {"hyper_lr": lr} | dict(zip(names, figures.tolist(), strict=True))

    def _row(self, client: int) -> slice:
        """Where a device's embedding lies in the hypernetwork's vector."""
        assert self.hyper is not None
        network: Any = self.hyper.module
        if not self.personal:
            return slice(0, 0)
        width = network.embedding.embedding_dim
        first = self.hyper.spans["embedding.weight"].start + width * (client + int(network.shared))
        return slice(first, first + width)

    def _loss(self, k: int, x: Tensor, y: Tensor, generator: torch.Generator, figures: Tensor) -> Tensor:
        """The hypernetwork's on one batch (equation 6); ``figures`` gets what goes into the log."""
        s = self.settings
        assert self.hyper is not None
        assert self.costs is not None
        logits = self.hyper.module(torch.tensor([0, k + 1] if self.personal else [0]))

        def draw(hard: bool) -> Tensor:
            return sample_gates(logits, s.temperature, s.noise, hard, generator)

        hard = draw(True)
        used = draw(False) if s.soft else hard
        server = used[0]
        with self._gated(merge_gates(server, used[1]) if self.personal else server):
            output = self.model(x)
        loss = F.cross_entropy(output, y)
        penalties = [budget_penalty(self.costs.ratio(hard[0]), self._server_budget(), s.two_sided)]
        if self.personal:
            outer = hard[0].detach() if s.detach_server else hard[0]
            penalties.append(
                budget_penalty(self.costs.ratio(merge_gates(outer, hard[1])), self.budgets[k], s.two_sided)
            )
        with torch.no_grad():
            row = [loss.item(), (output.argmax(1) == y).double().mean().item(), *(p.item() for p in penalties)]
            figures[: len(row)] += torch.tensor(row, dtype=torch.float64)
        return loss + s.strength * sum(penalties).to(loss.dtype)  # type: ignore[union-attr]

    # -- gates --------------------------------------------------------------------------------------------------------

    def _server_budget(self) -> float:
        return self.settings.server_budget if self.personal else min(self.budgets)

    def _gated(self, gates: Tensor | None) -> contextlib.AbstractContextManager[None]:
        """The network with these gates; it may have been sliced to the server's."""
        if gates is None:
            return contextlib.nullcontext()
        if gates.dtype == torch.bool:
            gates = gates.to(self.weights.dtype)
        return apply_gates(self.model, self.points, gates)

    def client_gates(self) -> Tensor | None:
        """Bool ``[clients, G]``, what each device has of the server's present network; None: all of it.

        Without noise: the sub-networks are frozen while the weights are trained.
        """
        if self.gates is not None:
            server, devices = self.gates
            return devices[:, server] if self.personal else None
        if self.hyper is None or self.hyper_rounds == 0:
            return None
        server_logits, device_logits = self.hyper.module.logits()  # type: ignore[operator]
        threshold = open_threshold(self.settings.noise)
        server = server_logits > threshold
        return server & (device_logits > threshold) if self.personal else server.expand(self.clients, -1)

    def server_gates(self) -> Tensor | None:
        """Bool ``[G]``, the server's sub-network before pruning; None: all of it."""
        if self.gates is not None or self.hyper is None or self.hyper_rounds == 0:
            return None
        return self.hyper.module.logits()[0] > open_threshold(self.settings.noise)  # type: ignore[operator]

    def export_gates(self) -> tuple[Tensor, Tensor]:
        """Gates within the budgets: bool ``[G]`` of the server, and ``[clients, G]`` of the devices, inside of it."""
        s = self.settings
        assert self.costs is not None
        if self.hyper is None:
            server = self.costs.fit(self._scores(), self._server_budget(), fill=True)
            return server, server.expand(self.clients, -1).clone()
        threshold = open_threshold(s.noise)
        logits, device_logits = self.hyper.module.logits()  # type: ignore[operator]
        server = self.costs.fit(logits, self._server_budget(), None, threshold, s.fill)
        if not self.personal:
            return server, server.expand(self.clients, -1).clone()
        devices = [
            self.costs.fit(row, budget, server, threshold, s.fill)
            for row, budget in zip(device_logits, self.budgets, strict=True)
        ]
        return server, torch.stack(devices)

    def _scores(self) -> Tensor:
        """Of every gate: the part of its gate point's channels that it is worth more than, in [0, 1).

        ``filter``: by the sum of absolute weights of its filter (Li et al. 2017); ``random``: by lot. So every gate
        point loses the same part of its channels.
        """
        ranks = []
        generator = self._generator(_SCORES)
        for point in self.points:
            weight: Any = self.model.get_submodule(point.producer).weight
            norm = weight.detach().abs().flatten(1).sum(1)
            worth = norm if self.settings.method == "filter" else torch.rand(len(norm), generator=generator)
            ranks.append(worth.argsort(stable=True).argsort(stable=True).double() / len(worth))
        return torch.cat(ranks)

    def prune(self) -> None:
        """Cut the server's closed channels out of the network, for good; the momentum starts anew."""
        server, devices = self.export_gates()
        self.flat.load(self.weights, self.statistics)
        self._use_gates(server, devices)
        self.momentum = torch.zeros_like(self.weights)
        for k in range(self.clients if self.personal else 0):
            self._count(self.sent, "masks", _bytes(devices[k, server]))

    def device_model(self, client: int) -> nn.Module:
        """The physically smaller network of one device, after pruning; what `layers_changed_by_slicing` says holds."""
        self.flat.load(self.weights, self.statistics)
        gates = self.client_gates()
        if self.gates is None or gates is None:
            return copy.deepcopy(self.model)
        return slice_gates(self.model, self.points, gates[client])

    # -- figures ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Accuracy of the devices on their own test samples, and of the server's network on all; and costs.

        Returns:
            ``device_acc`` (None for a device without test samples), ``pooled_acc`` (all of them together),
            ``server_acc``; ``server_ratio`` and ``device_ratio``, T of the gates as a fraction of the total;
            ``server_flops``, ``device_flops`` and ``dense_flops``, true ones; ``server_kept`` and ``union_kept``, open
            channels of every gate point of the server and of any device, ``device_kept`` their means over devices.
        """
        self.flat.load(self.weights, self.statistics)
        self.model.eval()
        gates, server = self.client_gates(), self.server_gates()
        hits = server_hits = 0
        accuracies: list[float | None] = []
        for k, loader in enumerate(self._tests):
            if loader is None:
                accuracies.append(None)
                continue
            if self._slices is not None:
                own = _correct(self._load(k).module.eval(), loader)
            else:
                own = self._hits(loader, None if gates is None else gates[k])
            hits += own
            server_hits += own if gates is None else self._hits(loader, server)
            accuracies.append(own / len(loader.indices))
        total = sum(len(loader.indices) for loader in self._tests if loader is not None)
        row = {"device_acc": accuracies, "pooled_acc": hits / total, "server_acc": server_hits / total}
        return row | self._costs(gates, server)

    def _hits(self, loader: Loader, gates: Tensor | None) -> int:
        with self._gated(gates):
            return _correct(self.model, loader)

    @torch.no_grad()
    def evaluate_sliced(self) -> float:
        """``pooled_acc`` of the devices' physically smaller networks, which can differ from that of closed gates."""
        tests = {k: loader for k, loader in enumerate(self._tests) if loader is not None}
        hits = sum(_correct(self.device_model(k).eval(), loader) for k, loader in tests.items())
        return hits / sum(len(loader.indices) for loader in tests.values())

    def _costs(self, gates: Tensor | None, server: Tensor | None) -> dict[str, Any]:
        if self.costs is None:
            return {}
        costs = self.costs
        if self.gates is not None:
            server, gates = self.gates
        every = torch.ones(sum(costs.sizes), dtype=torch.bool)
        server = every if server is None else server
        gates = server.expand(self.clients, -1) if gates is None else gates
        kept = torch.tensor([costs.kept(row) for row in gates], dtype=torch.float64)
        return {
            "server_ratio": float(costs.ratio(server)),
            "device_ratio": [float(costs.ratio(row)) for row in gates],
            "server_flops": costs.true_flops(server),
            "device_flops": [costs.true_flops(row) for row in gates],
            "dense_flops": costs.true_total,
            "server_kept": costs.kept(server),
            "union_kept": costs.kept(gates.any(0)),
            "device_kept": kept.mean(0).tolist(),
        }

    # -- saving -------------------------------------------------------------------------------------------------------

    _COUNTERS = ("done", "phase", "phase_round", "hyper_step", "hyper_rounds")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on; "model" is the network's own state dict."""
        self.flat.load(self.weights, self.statistics)
        state: dict[str, Any] = {"model": {name: value.clone() for name, value in self.model.state_dict().items()}}
        state |= {"settings": dataclasses.asdict(self.settings), "budgets": self.budgets}
        state |= {"weights": self.weights, "statistics": self.statistics, "momentum": self.momentum}
        state |= {name: getattr(self, name) for name in self._COUNTERS}
        state |= {"positions": {name: list(values) for name, values in self.positions.items()}}
        state |= {"sent": dict(self.sent), "received": dict(self.received), "failures": list(self.failures)}
        state["gates"] = None if self.gates is None else list(self.gates)
        state["hypernetwork"] = None
        if self.hyper is not None:
            state["hypernetwork"] = [self.hyper.values.clone(), self.hyper_mean, self.hyper_square]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, in a federation made with the same arguments.

        Raises:
            ValueError: other settings or budgets.
        """
        ours = dataclasses.asdict(self.settings) | {"budgets": self.budgets}
        theirs = state["settings"] | {"budgets": list(state["budgets"])}
        odd = [name for name, value in ours.items() if theirs.get(name) != value]
        if odd:
            raise ValueError(f"the checkpoint is of a run with other {', '.join(odd)}")
        if state["gates"] is not None:
            server, devices = state["gates"]
            if self.gates is None:
                self._use_gates(server, devices)
        self.model.load_state_dict(state["model"])
        self.weights, self.statistics, self.momentum = (
            state[name].clone() for name in ("weights", "statistics", "momentum")
        )
        self.flat.load(self.weights, self.statistics)
        for name in self._COUNTERS:
            setattr(self, name, state[name])
        self.positions = {name: list(values) for name, values in state["positions"].items()}
        self.sent, self.received = dict(state["sent"]), dict(state["received"])
        self.failures = list(state["failures"])
        if self.hyper is not None:
            values, self.hyper_mean, self.hyper_square = (t.clone() for t in state["hypernetwork"])
            self.hyper.load(values)


def _bytes(*tensors: Tensor) -> int:
    """Size of tensors, bool ones a bit an entry."""
    return sum(-(-t.numel() // 8) if t.dtype == torch.bool else t.numel() * t.itemsize for t in tensors)


def _correct(model: nn.Module, loader: Loader) -> int:
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
