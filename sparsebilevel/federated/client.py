"""What the devices compute: replies to the server's requests.

A message is a dict of tensors, numbers and words, which anything can carry. A client keeps nothing between requests but
its data, its budget and the settings: a request has everything else, so the same request gives the same reply wherever
and whenever it is answered.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data, Loader, make_seed
from ..nn import sparsify
from ..training.runtime import Ranks, seeded
from .flops import GateCosts, budget_penalty
from .hypernetwork import Hypernetwork, merge_gates, sample_gates
from .local import FlatModule, adamw, full_gradient, train_weights
from .models import GatePoint, apply_gates, slice_gates
from .settings import Settings
from .unstructured import MaskedModule, pack_masked, pack_vector, unpack_masked

Message = dict[str, Any]

# Second words of a seed, one for each purpose; the server's are in `rounds`.
_ORDER, _HYPER_PART, _HYPER_ORDER, _NOISE = range(4)
_UPPER_ORDER, _DROPOUT = 6, 7


class Clients:
    """The devices of a federation, called as ``clients(client, request)`` for a reply.

    Those of one process share the network that they compute with.

    Args:
        model: the dense network; only its structure matters.
        points: its gate points.
        data: `load_data`'s; its training loader's augmentation is the clients'.
        parts, test_parts: positions of each client's training and test samples, tensors or plain sequences. A process
            that answers for some clients only can give the others anything, such as one sample.
        budgets: kept fraction of T for each device, see `Federation`.
        settings: the server's.
        hypernetwork: the server's, for its structure; None where the method has none.
        device: where they compute; ``data`` is there too. Messages are on the CPU.

    Requests, by ``kind``, all with ``weights`` [P] and ``statistics`` [B] of the network (its parameters one after the
    other, and its floating buffers), the ``channels`` (bool [G])
    that are left of it, and which of these have open ``gates``, a bool each. What is absent is all of them.

    - ``weights``: ``local_steps`` steps from batch number ``position`` on, with ``momentum`` [P], ``lr`` and for Mime
      ``correction`` [P]. Replies with ``weights``, ``statistics``, ``momentum`` (not with Mime), and the sums ``loss``,
      ``correct`` and ``count`` over the samples.
    - ``gradient``: replies with the ``gradient`` [P] of the mean loss over all training samples.
    - ``hypernetwork``: ``hyper_steps`` steps from batch ``position`` on, with ``hypernetwork`` [3, H], its values and
      AdamW's two states after ``step`` steps, ``lr``, and ``turn``, the number of the round among its kind. Replies
      with ``hypernetwork`` and sums over the steps: ``loss``, ``accuracy``, ``server_penalty``, ``device_penalty``.
    - ``energy``: replies with ``energy`` [G], float64, of every gate point's activations the sum of squares over the
      positions, averaged over the training samples.
    - ``evaluate``: replies with ``correct`` of ``count`` test samples. With ``steps`` the device first takes so many by
      itself, from batch ``position`` on, with ``lr`` falling along a cosine to 0; nobody gets what it has learned.

    Under an unstructured mask vectors [P] come and go packed, see `pack_masked`; ``weights`` tell the mask. Then there
    are also:

    - ``weights`` with ``learning`` (bool [P]): replies also with ``effective``, packed: the mean over the steps of the
      gradient of the effective weights, there.
    - ``scores``: replies with ``effective`` of all weights of sparse layers, the mean over ``mask_batches`` batches
      from batch ``position`` on, and their mean ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[GatePoint],
        data: Data,
        parts: Sequence[Tensor | Sequence[int]],
        test_parts: Sequence[Tensor | Sequence[int]],
        budgets: Sequence[float],
        settings: Settings,
        hypernetwork: Hypernetwork | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.settings, self.points, self.budgets = settings, list(points), list(budgets)
        self.costs = GateCosts(model, points, data.input_shape) if points else None
        own = [torch.as_tensor(part) for part in parts]
        for k, part in enumerate(own):
            if not len(part):
                raise ValueError(f"parts[{k}] is empty; expected a training sample at least")
        self.loaders = [self._loader(data.train, part, _ORDER, k) for k, part in enumerate(own)]
        self.hyper_loaders = [
            self._loader(data.train, self._choose(part, k), _HYPER_ORDER, k) for k, part in enumerate(own)
        ]
        self.tests = [data.test.subset(part) if len(part) else None for part in test_parts]
        self.upper_loaders = [self._loader(data.train, part, _UPPER_ORDER, k) for k, part in enumerate(own)]
        self.hyper = None if hypernetwork is None else FlatModule(copy.deepcopy(hypernetwork).to(self.device))
        network = copy.deepcopy(model).to(self.device)
        dense = MaskedModule(sparsify(network, init="dense")) if settings.unstructured else FlatModule(network)
        self._networks = {b"": dense}  # by the channels that are left

    def _loader(self, train: Loader, part: Tensor, purpose: int, client: int) -> Loader:
        seed = make_seed(self.settings.seed, purpose, client)
        return train.subset(part, batch_size=min(self.settings.batch_size, len(part)), seed=seed, drop_last=True)

    def _choose(self, part: Tensor, client: int) -> Tensor:
        """A client's samples for the hypernetwork."""
        count = max(1, round(self.settings.hyper_part * len(part)))
        generator = torch.Generator().manual_seed(make_seed(self.settings.seed, _HYPER_PART, client))
        return part[torch.randperm(len(part), generator=generator)[:count]].sort().values

    def __call__(self, client: int, request: Message) -> Message:
        work: Callable[[int, Message], Message] = {
            "weights": self._train,
            "gradient": self._full_gradient,
            "hypernetwork": self._train_hypernetwork,
            "energy": self._energy,
            "scores": self._score,
            "evaluate": self._evaluate,
        }[request["kind"]]
        request, mask = unpack_masked(request)
        request = {n: v.to(self.device) if isinstance(v, Tensor) and n != "channels" else v for n, v in request.items()}
        flat = self._networks[b""]
        if isinstance(flat, MaskedModule):
            flat.set_mask(torch.ones_like(flat.values, dtype=torch.bool) if mask is None else mask.to(self.device))
            flat.collect(request.get("learning", flat.prunable if request["kind"] == "scores" else None))
        # What networks draw themselves, as dropout does, is a function of the request, too.
        words = request.get("round", 0), *request["kind"].encode()
        with seeded(self.device, make_seed(self.settings.seed, _DROPOUT, client, *words)):
            reply = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in work(client, request).items()}
        if "effective" in reply:
            assert isinstance(flat, MaskedModule)
            reply["effective"] = pack_vector(reply["effective"], request.get("learning", flat.prunable).cpu())
        return reply if mask is None else pack_masked(reply, mask)

    def _network(self, request: Message) -> FlatModule:
        """The network of the request, which holds its weights."""
        channels: Tensor | None = request.get("channels")
        key = b"" if channels is None else channels.numpy().tobytes()
        if channels is not None and key not in self._networks:
            self._networks[key] = FlatModule(slice_gates(self._networks[b""].module, self.points, channels))
        flat = self._networks[key]
        flat.load(request["weights"], request["statistics"])
        return flat

    def _gated(self, flat: FlatModule, gates: Tensor | None) -> contextlib.AbstractContextManager[None]:
        if gates is None:
            return contextlib.nullcontext()
        return apply_gates(flat.module, self.points, gates.to(flat.values.dtype))

    def _train(self, client: int, request: Message) -> Message:
        s, flat = self.settings, self._network(request)
        batches = itertools.islice(self.loaders[client].stream(request["position"]), s.local_steps)
        mime = "" if s.average == "mean" else s.average
        flat.module.train()
        with self._gated(flat, request.get("gates")):
            momentum, sums = train_weights(
                flat,
                batches,
                request["weights"],
                request["momentum"],
                request["lr"],
                s.momentum,
                s.weight_decay,
                mime,
                request.get("correction"),
            )
        reply: Message = {"weights": flat.values.clone(), "statistics": flat.statistics}
        if "learning" in request:
            assert isinstance(flat, MaskedModule)
            passes = 2 * s.local_steps if mime == "mime" else s.local_steps
            reply["effective"] = flat.collected() / passes
        return reply | ({} if mime else {"momentum": momentum}) | sums

    def _score(self, client: int, request: Message) -> Message:
        s, flat = self.settings, self._network(request)
        assert isinstance(flat, MaskedModule)
        batches = itertools.islice(self.upper_loaders[client].stream(request["position"]), s.mask_batches)
        flat.module.train()
        loss = 0.0
        for x, y in batches:
            loss += flat.gradient_of(lambda x=x, y=y: F.cross_entropy(flat.module(x), y))[0].item()  # type: ignore[misc]
        return {"effective": flat.collected() / s.mask_batches, "loss": loss / s.mask_batches}

    def _full_gradient(self, client: int, request: Message) -> Message:
        flat, loader = self._network(request), self.loaders[client]
        every = loader.source.batches(loader.indices.split(loader.batch_size), None)
        flat.module.train()
        with self._gated(flat, request.get("gates")):
            return {"gradient": full_gradient(flat, every, self.settings.weight_decay)}

    def _train_hypernetwork(self, client: int, request: Message) -> Message:
        s, hyper, flat = self.settings, self.hyper, self._network(request)
        assert hyper is not None
        values, mean, square = (part.clone() for part in request["hypernetwork"])
        hyper.load(values)
        sums = dict.fromkeys(("loss", "accuracy", "server_penalty", "device_penalty"), 0.0)
        batches = itertools.islice(self.hyper_loaders[client].stream(request["position"]), s.hyper_steps)
        frozen = [p for p in flat.module.eval().parameters() if not p.requires_grad]
        flat.module.requires_grad_(False)
        try:
            for i, (x, y) in enumerate(batches):
                noise = torch.Generator().manual_seed(make_seed(s.seed, _NOISE, request["turn"], client, i))
                _, gradient = hyper.gradient_of(lambda x=x, y=y, n=noise: self._loss(client, flat, x, y, n, sums))  # type: ignore[misc]
                step = request["step"] + i + 1
                adamw(hyper.values, gradient, mean, square, step, request["lr"], s.hyper_weight_decay)
        finally:
            flat.module.requires_grad_(True)
            for p in frozen:
                p.requires_grad_(False)
        return {"hypernetwork": torch.stack([hyper.values, mean, square])} | sums

    def _loss(
        self, client: int, flat: FlatModule, x: Tensor, y: Tensor, noise: torch.Generator, sums: dict[str, float]
    ) -> Tensor:
        """The hypernetwork's on one batch (equation 6); its parts are added to ``sums``."""
        s = self.settings
        assert self.hyper is not None
        assert self.costs is not None
        logits = self.hyper.module(torch.tensor([0, client + 1] if s.personal else [0], device=self.device))

        def draw(hard: bool) -> Tensor:
            return sample_gates(logits, s.temperature, s.noise, hard, noise)

        hard = draw(True)
        used = draw(False) if s.soft else hard
        server = used[0]
        with apply_gates(flat.module, self.points, merge_gates(server, used[1]) if s.personal else server):
            output = flat.module(x)
        loss = F.cross_entropy(output, y)
        budget = s.server_flops if s.personal else min(self.budgets)
        penalties = {"server_penalty": budget_penalty(self.costs.ratio(hard[0]), budget, s.two_sided)}
        if s.personal:
            outer = hard[0].detach() if s.detach_server else hard[0]
            ratio = self.costs.ratio(merge_gates(outer, hard[1]))
            penalties["device_penalty"] = budget_penalty(ratio, self.budgets[client], s.two_sided)
        with torch.no_grad():
            figures = {"loss": loss, "accuracy": (output.argmax(1) == y).double().mean()} | penalties
            for name, value in figures.items():
                sums[name] += value.item()
        return loss + s.strength * sum(penalties.values()).to(loss)  # type: ignore[union-attr]

    @torch.no_grad()
    def _energy(self, client: int, request: Message) -> Message:
        flat, loader = self._network(request), self.loaders[client]
        sums: dict[str, Tensor] = {}

        def add(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: Any) -> None:
                sums[name] = sums.get(name, 0) + args[0].double().square().sum((0, 2, 3))

            return hook

        consumers = {point.name: flat.module.get_submodule(point.consumer) for point in self.points}
        handles = [consumer.register_forward_pre_hook(add(name)) for name, consumer in consumers.items()]
        try:
            flat.module.eval()
            for x, _ in loader.source.batches(loader.indices.split(loader.batch_size), None):
                flat.module(x)
        finally:
            for handle in handles:
                handle.remove()
        return {"energy": torch.cat([sums[point.name] for point in self.points]) / len(loader.indices)}

    def _evaluate(self, client: int, request: Message) -> Message:
        loader = self.tests[client]
        if loader is None:
            return {"correct": 0, "count": 0}
        flat = self._network(request)
        with self._gated(flat, request.get("gates")):
            if "steps" in request:
                self._personalize(client, flat, request)
            flat.module.eval()
            with torch.no_grad():
                correct = sum(int((flat.module(x).argmax(1) == y).sum()) for x, y in loader)
        return {"correct": correct, "count": len(loader.indices)}

    def _personalize(self, client: int, flat: FlatModule, request: Message) -> None:
        s, steps, momentum = self.settings, request["steps"], torch.zeros_like(flat.values)
        batches = itertools.islice(self.loaders[client].stream(request["position"]), steps)
        flat.module.train()
        for i, batch in enumerate(batches):
            lr = request["lr"] * (1 + math.cos(math.pi * i / steps)) / 2
            momentum, _ = train_weights(flat, [batch], flat.values, momentum, lr, s.momentum, s.weight_decay)


class LocalExchange:
    """Carries requests to clients of this process, or of several that share the work: client k's is rank k's modulo
    their number. The numbers are the same.

    Args:
        clients: who answer.
        ranks: processes; None: this one alone.

    Attributes:
        fault: for tests and simulations: called as ``fault(kind, round, client)`` before a client's work; raises where
            the client is to fail.
    """

    def __init__(self, clients: Clients, ranks: Ranks | None = None) -> None:
        self.clients = clients
        self.ranks = ranks or Ranks(torch.device("cpu"))
        self.fault: Callable[[str, int, int], None] = lambda kind, round, client: None

    def __call__(self, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        """The replies by client, or why there is none."""
        mine = {k: r for k, r in requests.items() if k % self.ranks.world == self.ranks.rank}
        replies: dict[int, Message | str] = {}
        for part in self.ranks.gather(dict(self._answers(mine))):
            replies |= part
        return replies

    def _answers(self, requests: Mapping[int, Message]) -> Iterator[tuple[int, Message | str]]:
        for k, request in requests.items():
            try:
                self.fault(request["kind"], request["round"], k)
                yield k, self.clients(k, request)
            except Exception as error:  # whatever is wrong with one client, the others go on
                yield k, f"{error}" or type(error).__name__
