"""The server of a federation: rounds of weights and of the hypernetwork in turns.

A round is one exchange with the clients. In a round of *weights* the sampled clients take ``local_steps`` (r_W) steps
from the server's weights, each with the gates of its own sub-network, and the server averages what they send. In a
round of the *hypernetwork* they take ``hyper_steps`` (r_theta) steps on it with the weights frozen. After the start of
the hypernetwork, a quarter of the epochs, such a round follows every ``hyper_interval * hyper_steps`` (r_HN r_theta)
steps on the weights. This is DWNP's Algorithm 1 with one difference: the r_theta steps between two averages of the
hypernetwork are taken in a row, where the algorithm spreads them over the steps on the weights.

All randomness is a function of (seed, purpose, round, client), and all other state is in `Federation.state_dict`, so a
run that is resumed repeats an uninterrupted one bit for bit.

Under an unstructured mask rounds of *scores* take the place of those of the hypernetwork, see `unstructured`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_number, check_whole
from ..costs import count_costs
from ..data import Data
from ..kernels import PackError
from ..training.loop import TrainingError
from ..training.runtime import Ranks
from .client import Clients, LocalExchange, Message, make_seed
from .flops import GateCosts
from .hypernetwork import Hypernetwork, open_threshold
from .local import FlatModule
from .models import GatePoint, check_gate_points, gate_sizes, slice_gates
from .settings import METHODS, Settings
from .unstructured import Pruner, decay_closed, pack_masked, unpack_masked, unpack_vector

Exchange = Callable[[Mapping[int, Message]], Mapping[int, Message | str]]

# Second words of a seed, one for each purpose; the clients' are in `client`.
_SAMPLE, _LOT = 4, 5
# What a reply has by the kind of the request; see `Clients`.
_REPLIES = {
    "weights": ("weights", "statistics", "loss", "correct", "count"),
    "gradient": ("gradient",),
    "hypernetwork": ("hypernetwork", "loss", "accuracy", "server_penalty", "device_penalty"),
    "energy": ("energy",),
    "scores": ("effective", "loss"),
    "evaluate": ("correct", "count"),
}
_DRAWS = {"hypernetwork": 1, "scores": 2}  # a round of weights may go with rounds of these, of other clients


class FederationError(TrainingError):
    """The run cannot go on: too few clients return anything that can be used."""


@dataclass(frozen=True)
class Phase:
    """A part of the run: ``rounds`` rounds of weights, or of the hypernetwork alone (``search``); ``prune`` is one."""

    name: str
    epochs: int
    rounds: int


class _Share(NamedTuple):
    """Where a client's entries are in the server's vectors."""

    values: Any = slice(None)
    statistics: Any = slice(None)


class Federation:
    """The server: it has the network, asks clients for work on it, and averages what they reply.

    `make_federation` makes one with virtual clients.

    Args:
        model: dense; is changed.
        points: its gate points (none are needed for ``fedavg``).
        input_shape: (C, H, W) of one sample.
        sizes: training samples of every client.
        budgets: kept fraction of T for each device (p_d). Methods without sub-networks of the devices' own prune the
            one network to the smallest of them.
        settings: how to run.
        exchange: carries requests by client to them, see `Clients`, and returns their replies, or the reasons why there
            is none; a client that is missing in what it returns has not answered.
        hypernetwork: None where the method has none.
        report: gets messages for people, about clients that were left out.

    Attributes:
        weights, statistics, momentum: the server's, as `Clients` describes vectors; what is written there holds.
        model: the network that they are loaded into, after pruning the smaller one; what is written there is lost.
        exchange: may be replaced. A reply that lacks something, or does not fit, is left out with a message.
        gates: what was pruned: bool ``[G]`` of the server and ``[clients, G]`` of the devices; None before.
        done: rounds so far; ``phase`` the index of the current phase, ``phase_round`` the rounds done in it.
        sent, received: bytes of the tensors in messages of training by kind, down to the clients whose work was used
            and up from them; bool ones count as a bit an entry.
        failures: how often a client's part in a round was left out.
        pruner: of an unstructured mask; else None.
    """

    weights: Tensor
    statistics: Tensor
    momentum: Tensor

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[GatePoint],
        input_shape: Sequence[int],
        sizes: Sequence[int],
        budgets: Sequence[float],
        settings: Settings,
        exchange: Exchange,
        hypernetwork: Hypernetwork | None = None,
        report: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.clients = len(sizes)
        settings.validate(self.clients)
        if len(budgets) != self.clients:
            raise ValueError(f"{self.clients} sizes, {len(budgets)} budgets: must agree")
        self.settings, self.points, self.budgets, self.sizes = settings, list(points), list(budgets), list(sizes)
        self.exchange, self.report = exchange, report
        self.costs = GateCosts(model, points, input_shape) if points else None
        if self.costs is None and settings.method != "fedavg" and not settings.unstructured:
            raise ValueError(f"points is empty; method {settings.method} needs gate points")
        if (hypernetwork is None) == settings.has_hypernetwork:
            needs = "needs" if settings.has_hypernetwork else "has no use for"
            raise ValueError(f"method {settings.method} {needs} a hypernetwork; got {hypernetwork!r:.40}")
        self.input_shape = tuple(input_shape)
        if self.costs is not None and settings.method != "fedavg":
            wanted = {f"device_flops[{k}]": budget for k, budget in enumerate(budgets)}
            wanted |= {"server_flops": settings.server_flops} if settings.personal else {}
            for name, budget in wanted.items():
                check_number(name, budget, most=1, without_least=True)
                if budget < self.costs.least:
                    raise ValueError(
                        f"{name}={budget} cannot be met; expected at least {self.costs.least:.4f}, what one channel at "
                        "each gate point costs"
                    )
            check_gate_points(model, points, input_shape)

        self.hyper = None if hypernetwork is None else FlatModule(hypernetwork)
        if self.hyper is not None:
            self.hyper_mean = torch.zeros_like(self.hyper.values)
            self.hyper_square = torch.zeros_like(self.hyper.values)
        self.hyper_step = self.hyper_rounds = 0
        self.steps_per_epoch = max(1, sum(self.sizes) // (self.clients * settings.batch_size))
        self.phases = [self._phase(name) for name in METHODS[settings.method]]
        self.phases = [phase for phase in self.phases if phase.rounds]
        self.pruner = Pruner(model, settings, self.phases[0].rounds) if settings.unstructured else None
        self._use(model)
        self.momentum = torch.zeros_like(self.weights)
        self.gates: tuple[Tensor, Tensor] | None = None
        if self.pruner is not None and settings.method == "bidst":  # sparse from the start
            self.weights, self.momentum = self.pruner.start(self.weights, self.momentum)

        self.done = self.phase = self.phase_round = 0
        self.positions = {kind: [0] * self.clients for kind in ("weights", "hypernetwork", "scores")}
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.failures = [0] * self.clients

    def _phase(self, name: str) -> Phase:
        s = self.settings
        if name == "prune":
            return Phase(name, 0, 1)
        epochs = {"search": s.search_epochs, "finetune": s.finetune_epochs}.get(name, s.epochs)
        steps = s.hyper_steps if name == "search" else s.local_steps
        return Phase(name, epochs, math.ceil(epochs * self.steps_per_epoch / steps))

    def _generator(self, *words: int) -> torch.Generator:
        return torch.Generator().manual_seed(make_seed(self.settings.seed, *words))

    def _use(self, model: nn.Module) -> None:
        """Make this the server's network."""
        self.model = model
        self.flat = FlatModule(model) if self.pruner is None else self.pruner.flat
        self.weights, self.statistics = self.flat.values.clone(), self.flat.statistics.clone()
        self._shares: list[_Share] | None = None

    def _use_gates(self, server: Tensor, devices: Tensor) -> None:
        """Cut the network, and find what the devices have of it."""
        self._use(slice_gates(self.model, self.points, server))
        self.gates = (server, devices)
        if self.settings.personal and self.settings.device_networks == "sliced":
            numbered = copy.deepcopy(self.model).double()  # every entry is its own position
            tensors = (numbered.parameters(), (b for b in numbered.buffers() if b.is_floating_point()))
            for group in tensors:
                start = 0
                for tensor in group:
                    tensor.data = torch.arange(start, start + tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
                    start += tensor.numel()
            slices = (FlatModule(slice_gates(numbered, self.points, is_open)) for is_open in devices[:, server])
            self._shares = [_Share(kept.values.long(), kept.statistics.long()) for kept in slices]

    def _share(self, client: int) -> _Share:
        return _Share() if self._shares is None else self._shares[client]

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
            ``device_penalty``. Where scores of single weights took a step: ``mask_changed``, the part of the open
            weights that was closed, ``direct`` and ``implicit``, the mean sizes of the terms, and ``upper_loss`` (bip).

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
        elif self.pruner is not None:
            if phase.name == "train+mask":
                row |= self._mask_round(phase)
            row |= self._weights_round(phase)
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
            if self.pruner is not None and phase.name == "train+mask":
                self.weights, self.momentum = self.pruner.finish(self.weights, self.momentum)
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
        self, kind: str, clients: Sequence[int] | None, request: Callable[[int], Message]
    ) -> dict[int, Message]:
        """The replies of clients by number, without those that fail or reply something that is not finite.

        Args:
            kind: of round, for counts and messages.
            clients: None draws them. If too few can be used, those given are asked again, or others drawn.
            request: to one client.
        """
        s = self.settings
        sampled = s.sample or self.clients
        least = s.min_clients if s.min_clients is not None else math.ceil(sampled / 2)
        for attempt in range(s.retries + 1):
            chosen: Sequence[int] = clients if clients is not None else self._draw(kind, attempt)
            requests = {k: request(k) for k in chosen}
            replies, reasons = self._ask(kind, requests)
            for k in reasons:
                self.failures[k] += 1
            if len(replies) >= least:
                for counter, at in ((self.sent, 0), (self.received, 1)):
                    counter[kind] = counter.get(kind, 0) + sum(reply["bytes"][at] for reply in replies.values())
                return replies
            self.report(f"round {self.done + 1} ({kind}): {len(replies)} clients, at least {least} are needed")
        raise FederationError(
            f"round {self.done + 1} ({kind}): {len(replies)} of {len(chosen)} clients returned something that can be "
            f"used, at least {least} are needed, in {attempt + 1} attempts; the last failed because: "
            f"{list(reasons.values())[-1]}"
        )

    def _ask(self, kind: str, requests: Mapping[int, Message]) -> tuple[dict[int, Message], dict[int, str]]:
        """Replies that can be used, in the order of the requests, and the reasons why others cannot.

        ``bytes`` of a reply are those of the request and its own.
        """
        replies: dict[int, Message] = {}
        reasons: dict[int, str] = {}
        requests = {k: self._seal(request) for k, request in requests.items()}
        outcomes = self.exchange(requests)
        for k, request in requests.items():
            outcome = outcomes.get(k, "no reply")
            if not isinstance(outcome, str):
                outcome = self._checked(request, outcome)
            if not isinstance(outcome, str):
                outcome = self._open(request, outcome)
            if not isinstance(outcome, str):
                odd = [n for n, v in outcome.items() if isinstance(v, Tensor) and not v.isfinite().all()]
                if not odd:
                    replies[k] = outcome
                    continue
                outcome = f"not finite: {', '.join(odd)}"
            reasons[k] = outcome
            self.report(f"round {self.done + 1} ({kind}): client {k} is left out: {outcome}")
        return replies, reasons

    def _draw(self, kind: str, attempt: int) -> list[int]:
        sampled = self.settings.sample or self.clients
        if sampled == self.clients:
            return list(range(self.clients))
        words = (_SAMPLE, self.done, self.hyper_rounds, _DRAWS.get(kind, 0), attempt)
        return torch.randperm(self.clients, generator=self._generator(*words))[:sampled].sort().values.tolist()

    def _seal(self, request: Message) -> Message:
        """What travels: with an unstructured mask vectors are packed."""
        return request if self.pruner is None else pack_masked(request, self.pruner.mask, positions=True)

    def _checked(self, request: Message, reply: Any) -> Message | str:
        """The reply, or what is wrong with it: a device may run anything."""
        if not isinstance(reply, dict):
            return f"the reply is a {type(reply).__name__}"
        needed = list(_REPLIES[request["kind"]])
        if request["kind"] == "weights" and self.settings.average == "mean":
            needed.append("momentum")
        if "learning" in request:
            needed.append("effective")
        if missing := [name for name in needed if name not in reply]:
            return f"the reply has no {', '.join(missing)}"
        like = request | {"gradient": request["weights"]}
        if "energy" in needed:
            assert self.costs is not None
            like["energy"] = torch.zeros(sum(self.costs.sizes), dtype=torch.float64)
        for name in needed:
            given, expected = reply[name], like.get(name)
            if self.settings.unstructured and isinstance(given, Tensor) and given.dtype == torch.uint8:
                continue  # packed under a mask, which is compared when it is opened
            if isinstance(expected, Tensor):
                if not isinstance(given, Tensor) or (given.shape, given.dtype) != (expected.shape, expected.dtype):
                    return f"the reply's {name} is not of the shape and dtype of the request's"
            elif not isinstance(given, (int, float)):
                return f"the reply's {name} is not a number"
        return reply

    def _open(self, request: Message, reply: Message) -> Message | str:
        """The reply with its vectors whole, or what is wrong with it."""
        size = _bytes(request), _bytes(reply)
        if self.pruner is not None:
            try:
                reply, _ = unpack_masked(reply, self.pruner.mask)
                if "effective" in reply:
                    where = request.get("learning", self.pruner.flat.prunable)
                    reply["effective"] = unpack_vector(reply["effective"], where)
            except PackError as error:
                return str(error)
        return reply | {"bytes": size}

    def _mean(self, replies: Mapping[int, Message], name: str, old: Tensor) -> Tensor:
        """Average over the clients that have an entry, in their order; ``old`` where there is none."""
        total, weights = torch.zeros_like(old), torch.zeros_like(old)
        for k, reply in replies.items():
            weight = self.sizes[k] if self.settings.weighting == "samples" else 1
            share = self._share(k)
            where = {"statistics": share.statistics, "hypernetwork": slice(None)}.get(name, share.values)
            total[where] += weight * reply[name]
            weights[where] += weight
        return torch.where(weights > 0, total / weights.clamp_min(1), old)

    def _request(self, kind: str, client: int, gates: Tensor | None) -> Message:
        """One to a client about its network; ``gates`` [clients, G] are those of the devices."""
        share = self._share(client)
        request: Message = {"kind": kind, "round": self.done}
        request |= {"weights": self.weights[share.values], "statistics": self.statistics[share.statistics]}
        if self.gates is not None:
            server, devices = self.gates
            request["channels"] = server if self._shares is None else devices[client]
        if gates is not None and self._shares is None:  # the devices' own networks have no other channels
            request["gates"] = gates[client]
        return request

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _weights_round(self, phase: Phase) -> dict[str, Any]:
        s, lr = self.settings, self._lr(phase)
        gates = self.client_gates()
        learning = self.pruner.learning() if self.pruner is not None and phase.name != "finetune" else None
        correction, survivors = None, None
        if s.average != "mean":
            replies = self._collect("gradient", None, lambda k: self._request("gradient", k, gates))
            correction, survivors = self._mean(replies, "gradient", torch.zeros_like(self.weights)), list(replies)

        def request(k: int) -> Message:
            values = self._share(k).values
            message = self._request("weights", k, gates)
            message |= {"lr": lr, "position": self.positions["weights"][k], "momentum": self.momentum[values]}
            message |= {} if learning is None else {"learning": learning}
            return message | ({"correction": correction[values]} if s.average == "mime" else {})  # type: ignore[index]

        replies = self._collect("weights", survivors, request)
        for k in replies:
            self.positions["weights"][k] += s.local_steps
        row: dict[str, Any] = {}
        old = self.weights, self.momentum
        self.weights = self._mean(replies, "weights", self.weights)
        self.statistics = self._mean(replies, "statistics", self.statistics)
        if correction is not None:
            self.momentum = self.momentum.mul(s.momentum).add_(correction)
        else:
            self.momentum = self._mean(replies, "momentum", self.momentum)
        if self.pruner is not None:
            self._keep_closed(old, lr)
        if learning is not None:
            row |= self._learn(self._mean(replies, "effective", torch.zeros_like(self.weights)), lr)
        self.flat.load(self.weights, self.statistics)
        loss, correct, count = (sum(r[name] for r in replies.values()) for name in ("loss", "correct", "count"))
        return row | {"lr": lr, "train_loss": loss / count, "train_acc": correct / count}

    # -- unstructured masks -------------------------------------------------------------------------------------------

    def _mask_round(self, phase: Phase) -> dict[str, Any]:
        """BiP's first mask and its steps on the scores, where they are due: clients give gradients for them."""
        s, pruner = self.settings, self.pruner
        assert pruner is not None
        after = self.phase_round - int(s.mask_start * phase.rounds)
        if s.method != "bip" or after < 0:
            return {}
        if after == 0:
            self.weights, self.momentum = pruner.start(self.weights, self.momentum)
        if after % s.mask_interval:
            return {}

        def request(k: int) -> Message:
            return self._request("scores", k, None) | {"position": self.positions["scores"][k]}

        replies = self._collect("scores", None, request)
        for k in replies:
            self.positions["scores"][k] += s.mask_batches
        gradient = self._mean(replies, "effective", torch.zeros_like(self.weights))
        row = self._learn(gradient, self._lr(phase))
        return row | {"upper_loss": statistics.fmean(reply["loss"] for reply in replies.values())}

    def _learn(self, gradient: Tensor, lr: float) -> dict[str, Any]:
        """A step of the upper level, see `Pruner.learn`; for the log, the part of the open weights that changed."""
        assert self.pruner is not None
        before = self.pruner.mask
        self.weights, self.momentum = self.pruner.learn(self.weights, self.momentum, gradient, lr)
        after = self.pruner.mask
        row: dict[str, Any] = {"mask_changed": int((before & ~after).sum()) / int(before.sum())}
        return row | self.pruner.figures()

    def _keep_closed(self, old: tuple[Tensor, Tensor], lr: float) -> None:
        """Closed weights, which no client has, go on from their ``old`` values and momentum."""
        assert self.pruner is not None
        s, is_open, mime = self.settings, self.pruner.mask, self.settings.average != "mean"
        closed = ~is_open if self.flat.trained is None else ~is_open & self.flat.trained
        weights, momentum = decay_closed(*old, closed, s.local_steps, lr, s.momentum, s.weight_decay, mime)
        self.weights = torch.where(is_open, self.weights, weights)
        self.momentum = torch.where(is_open, self.momentum, momentum)

    # -- the hypernetwork ---------------------------------------------------------------------------------------------

    def _hyper_round(self) -> dict[str, Any]:
        s, hyper = self.settings, self.hyper
        assert hyper is not None
        lr = s.hyper_lr * (0.1 if self.phase_round >= self.phases[self.phase].rounds / 2 else 1)
        old = torch.stack([hyper.values, self.hyper_mean, self.hyper_square])

        def request(k: int) -> Message:
            message = self._request("hypernetwork", k, None) | {"hypernetwork": old, "lr": lr}
            position = self.positions["hypernetwork"][k]
            return message | {"position": position, "step": self.hyper_step, "turn": self.hyper_rounds}

        replies = self._collect("hypernetwork", None, request)
        new = self._mean(replies, "hypernetwork", old)
        if s.embedding == "own":
            for k, reply in replies.items():
                new[:, self._row(k)] = reply["hypernetwork"][:, self._row(k)]
        hyper.load(new[0])
        self.hyper_mean, self.hyper_square = new[1].clone(), new[2].clone()
        self.hyper_step += s.hyper_steps
        self.hyper_rounds += 1
        for k in replies:
            self.positions["hypernetwork"][k] += s.hyper_steps
        names = {"loss": "hyper_loss", "accuracy": "hyper_acc"}
        row = {
            names.get(name, name): statistics.fmean(reply[name] for reply in replies.values()) / s.hyper_steps
            for name in ("loss", "accuracy", "server_penalty", "device_penalty")
        }
        return {"hyper_lr": lr} | row

    def _row(self, client: int) -> slice:
        """Where a device's embedding lies in the hypernetwork's vector."""
        assert self.hyper is not None
        network: Any = self.hyper.module
        if not self.settings.personal:
            return slice(0, 0)
        width = network.embedding.embedding_dim
        first = self.hyper.spans["embedding.weight"].start + width * (client + int(network.shared))
        return slice(first, first + width)

    # -- gates --------------------------------------------------------------------------------------------------------

    def _server_budget(self) -> float:
        return self.settings.server_flops if self.settings.personal else min(self.budgets)

    def client_gates(self) -> Tensor | None:
        """Bool ``[clients, G]``, what each device has of the server's present network; None: all of it.

        Without noise: the sub-networks are frozen while the weights are trained.
        """
        if self.gates is not None:
            server, devices = self.gates
            return devices[:, server] if self.settings.personal else None
        if self.hyper is None or self.hyper_rounds == 0:
            return None
        server_logits, device_logits = self.hyper.module.logits()  # type: ignore[operator]
        threshold = open_threshold(self.settings.noise)
        server = server_logits > threshold
        return server & (device_logits > threshold) if self.settings.personal else server.expand(self.clients, -1)

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
            scores = self._energies() if s.method == "energy" else self._ranks()
            server = self.costs.fit(scores, self._server_budget(), fill=True)
            return server, server.expand(self.clients, -1).clone()
        threshold = open_threshold(s.noise)
        logits, device_logits = self.hyper.module.logits()  # type: ignore[operator]
        server = self.costs.fit(logits, self._server_budget(), None, threshold, s.fill)
        if not self.settings.personal:
            return server, server.expand(self.clients, -1).clone()
        devices = [
            self.costs.fit(row, budget, server, threshold, s.fill)
            for row, budget in zip(device_logits, self.budgets, strict=True)
        ]
        return server, torch.stack(devices)

    def _energies(self) -> Tensor:
        """Of every gate: the squares of its channel's activations, summed over positions and devices; float64 ``[G]``.

        All of them are asked, also where rounds have a sample of clients, since there is no other round of this kind.
        """
        replies = self._collect("energy", range(self.clients), lambda k: self._request("energy", k, None))
        return torch.stack([reply["energy"] for reply in replies.values()]).sum(0)

    def _ranks(self) -> Tensor:
        """Of every gate: the part of its gate point's channels that it is worth more than, in [0, 1).

        ``filter``: by the sum of absolute weights of its filter (Li et al. 2017); ``random``: by lot. So every gate
        point loses the same part of its channels.
        """
        ranks = []
        generator = self._generator(_LOT)
        for point in self.points:
            weight: Any = self.model.get_submodule(point.producer).weight
            norm = weight.detach().abs().flatten(1).sum(1)
            worth = norm if self.settings.method == "filter" else torch.rand(len(norm), generator=generator)
            ranks.append(worth.argsort(stable=True).argsort(stable=True).double() / len(worth))
        return torch.cat(ranks)

    def prune(self) -> None:
        """Cut what is closed out of the network, for good; the momentum starts anew."""
        if self.pruner is not None:
            self.weights, self.momentum = self.pruner.start(self.weights, torch.zeros_like(self.weights))
            return
        server, devices = self.export_gates()
        self.flat.load(self.weights, self.statistics)
        self._use_gates(server, devices)
        self.momentum = torch.zeros_like(self.weights)

    def device_model(self, client: int) -> nn.Module:
        """The physically smaller network of one device, after pruning; what `layers_changed_by_slicing` says holds.

        With methods that cut no channels it is a copy of the server's.

        Raises:
            ValueError: no such client, or nothing is pruned yet.
        """
        check_whole("client", client, 0, self.clients - 1)
        cuts = self.pruner is None and "prune" in METHODS[self.settings.method]
        if cuts and self.gates is None:
            raise ValueError(
                f"the network is not pruned yet: round {self.done} of phase {self.phases[self.phase].name}"
            )
        self.flat.load(self.weights, self.statistics)
        gates = self.client_gates()
        if self.gates is None or gates is None:
            return copy.deepcopy(self.model)
        return slice_gates(self.model, self.points, gates[client])

    # -- figures ------------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Accuracy of the devices on their own test samples, and of the server's network on all; and costs.

        Clients that do not answer are left out.

        Returns:
            ``device_acc`` (None for a device without test samples), ``pooled_acc`` (all of them together),
            ``server_acc``; with an unstructured mask ``sparsity`` (of the weights that it covers) and
            ``params_nonzero``; else ``server_ratio`` and ``device_ratio``, T of the gates as a fraction of the total;
            ``server_flops``, ``device_flops`` and ``dense_flops``, true ones; ``server_kept`` and ``union_kept``, open
            channels of every gate point of the server and of any device, ``device_kept`` their means over devices.
        """
        gates, server = self.client_gates(), self.server_gates()
        own = self._ask_all(lambda k: self._request("evaluate", k, gates))
        pooled = on_server = _accuracy(own.values())
        if gates is not None:
            base: Message = {"kind": "evaluate", "round": self.done}
            base |= {"weights": self.weights, "statistics": self.statistics}
            base |= {} if self.gates is None else {"channels": self.gates[0]}
            base |= {} if server is None else {"gates": server}
            on_server = _accuracy(self._ask_all(lambda k: base).values())
        row: dict[str, Any] = {"device_acc": self._by_device(own)}
        return row | {"pooled_acc": pooled, "server_acc": on_server} | self._costs(gates, server)

    def evaluate_devices(self, personalize: bool = False) -> tuple[float | None, list[float | None]]:
        """Accuracy of what the devices really have in the end, after pruning their physically smaller networks.

        That can differ from the accuracy with closed gates, see `layers_changed_by_slicing`.

        Args:
            personalize: first each device trains its network by itself, for ``personalize_epochs`` of `Settings`. So
                methods with one network for all can be compared with those that have one for each device.

        Returns:
            Of the samples of all devices together; and of each device's, None for one without test samples.
        """
        s = self.settings

        def request(k: int) -> Message:
            message = self._request("evaluate", k, None)
            if self.gates is not None:
                flat = FlatModule(self.device_model(k))
                message |= {"weights": flat.values, "statistics": flat.statistics, "channels": self.gates[1][k]}
            if personalize:
                steps = max(1, round(s.personalize_epochs * self.steps_per_epoch))
                message |= {"steps": steps, "lr": s.finetune_lr, "position": self.positions["weights"][k]}
            return message

        found = self._ask_all(request)
        return _accuracy(found.values()), self._by_device(found)

    def _by_device(self, found: Mapping[int, Message]) -> list[float | None]:
        return [_accuracy([found[k]]) if k in found else None for k in range(self.clients)]

    def _ask_all(self, request: Callable[[int], Message]) -> dict[int, Message]:
        return self._ask("evaluate", {k: request(k) for k in range(self.clients)})[0]

    def _costs(self, gates: Tensor | None, server: Tensor | None) -> dict[str, Any]:
        if self.pruner is not None:
            counted = count_costs(self.model, self.input_shape)
            return {
                "sparsity": counted.sparsity,
                "params_nonzero": counted.params_nonzero,
                "server_flops": counted.flops_theoretical,
                "device_flops": [counted.flops_theoretical] * self.clients,
                "dense_flops": counted.flops_dense,
            }
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
        state["mask"] = None if self.pruner is None else self.pruner.state_dict()
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
        if self.pruner is None:
            self.model.load_state_dict(state["model"])
        else:
            self.pruner.load_state_dict(state["mask"], state["model"])
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

    def adopt_training(self, state: Mapping[str, Any]) -> None:
        """Continue from another method's `state_dict` after the phase ``train``, which is the same with all methods."""
        if self.phases[0].name != "train" or state["phase"] != 1 or state["phase_round"]:
            raise ValueError("state is not one after the phase 'train', or this method has none")
        own = self.state_dict()
        model = {name: state["model"].get(name, value) for name, value in own["model"].items()}  # it may have no masks
        kept = {name: own[name] for name in ("settings", "hypernetwork", "mask")}
        self.load_state_dict({**state, **kept, "model": model})


def _bytes(message: Message) -> int:
    """Of the tensors; bool ones count as a bit an entry."""
    tensors = [value for value in message.values() if isinstance(value, Tensor)]
    return sum(-(-t.numel() // 8) if t.dtype == torch.bool else t.numel() * t.itemsize for t in tensors)


def _accuracy(replies: Iterable[Message]) -> float | None:
    """Of all samples of several clients together; None if there are none."""
    replies = list(replies)
    count = sum(reply["count"] for reply in replies)
    return sum(reply["correct"] for reply in replies) / count if count else None


def make_hypernetwork(model: nn.Module, points: Sequence[GatePoint], clients: int, settings: Settings) -> Any:
    """The `Hypernetwork` that a method needs, from torch's global generator; None if it needs none."""
    if not settings.has_hypernetwork or not points:
        return None
    return Hypernetwork(gate_sizes(model, points), clients if settings.personal else 0, shared=not settings.separate)


def make_federation(
    model: nn.Module,
    points: Sequence[GatePoint],
    data: Data,
    parts: Sequence[Tensor | Sequence[int]],
    test_parts: Sequence[Tensor | Sequence[int]],
    budgets: Sequence[float],
    settings: Settings,
    hypernetwork: Hypernetwork | None = None,
    report: Callable[[str], None] = lambda message: None,
    ranks: Ranks | None = None,
) -> Federation:
    """A federation with virtual clients.

    Args:
        data: `load_data`'s; its training loader's augmentation is the clients'.
        parts, test_parts: positions of each client's training and test samples.
        hypernetwork: None makes the one that the method needs, from torch's global generator.
        ranks: processes that share the clients' work, see `LocalExchange`, and the device on which they do; that of
            ``data``. The server is on the CPU.
        model, points, budgets, settings, report: see `Federation`.
    """
    if not len(test_parts) == len(budgets) == len(parts):
        raise ValueError(f"{len(parts)} parts, {len(test_parts)} test_parts, {len(budgets)} budgets: must agree")
    settings.validate(len(parts))
    hypernetwork = hypernetwork or make_hypernetwork(model, points, len(parts), settings)
    ranks = ranks or Ranks(torch.device("cpu"))
    clients = Clients(model, points, data, parts, test_parts, budgets, settings, hypernetwork, ranks.device)
    sizes = [len(part) for part in parts]
    exchange = LocalExchange(clients, ranks)
    return Federation(model, points, data.input_shape, sizes, budgets, settings, exchange, hypernetwork, report)
