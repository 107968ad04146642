"""How to run a federation: what the server and all clients agree on before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_number, check_whole
from .hypernetwork import NOISES

AVERAGES = ("mean", "mime_lite", "mime")
# The phases of each: the hypernetwork is trained with the weights (train+search), after them (search), or not at all.
METHODS = {
    "dwnp": ("train+search", "prune", "finetune"),
    "fedilp": ("train+search", "prune", "finetune"),
    "fedosp": ("train", "search", "prune", "finetune"),
    "filter": ("train", "prune", "finetune"),
    "energy": ("train", "prune", "finetune"),
    "random": ("train", "prune", "finetune"),
    "fedavg": ("train", "finetune"),
    "bip": ("train+mask", "finetune"),
    "bidst": ("train+mask", "finetune"),
    "magnitude": ("train", "prune", "finetune"),
}
# Those that prune single weights; all devices have the same mask.
UNSTRUCTURED = ("bip", "bidst", "magnitude")


@dataclass(frozen=True)
class Settings:
    """Of a federation; the defaults are DWNP's (section 4.1), where it says them, and its code's else.

    Attributes:
        method: one of `METHODS`.
        epochs: of training before pruning; an epoch has as many steps on each client as their mean data set has
            batches.
        finetune_epochs: after pruning.
        search_epochs: of the hypernetwork alone (fedosp).
        personalize_epochs: in the end, of each device by itself, before its accuracy is taken once more; 0: not done.
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
        server_flops: kept fraction of T on the server (p_s), for DWNP.
        device_networks: what a device trains after pruning: the server's network with its other gates closed
            (``masked``, as DWNP's code), or its own ``sliced`` network. Then it gets, computes and sends only what it
            keeps, what it trains is what it will use, and an entry is averaged over the devices that have it.
        fill: exported gates use the budget up, where the hypernetwork stays below it.
        sparsity: of the weights of all convolutions and linear layers, for the methods in `UNSTRUCTURED`.
        distribution: over the layers, for ``bidst``: ``erk`` or ``uniform``; the others rank all weights together.
        search_space: of ``bidst``, as a part of a layer's weights.
        mask_start: part of the epochs before ``bip`` closes weights.
        mask_interval: rounds of weights for each step of ``bip`` on the mask, and between the changes of ``bidst``.
        mask_batches: of each client, for a step of ``bip`` on the mask.
        seed: of everything.
    """

    method: str = "dwnp"
    epochs: int = 200
    finetune_epochs: int = 200
    search_epochs: int = 50
    personalize_epochs: int = 0
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
    server_flops: float = 0.8
    device_networks: str = "masked"
    fill: bool = False
    sparsity: float = 0.9
    distribution: str = "erk"
    search_space: float = 0.05
    mask_start: float = 0.5
    mask_interval: int = 4
    mask_batches: int = 2
    seed: int = 0

    @property
    def personal(self) -> bool:
        """Whether devices have sub-networks of their own."""
        return self.method == "dwnp"

    @property
    def unstructured(self) -> bool:
        """Whether single weights are pruned, and not channels."""
        return self.method in UNSTRUCTURED

    @property
    def has_hypernetwork(self) -> bool:
        """Whether gates come from one."""
        return any("search" in phase for phase in METHODS[self.method])

    def validate(self, clients: int) -> None:
        """Raise ValueError, naming the setting, its value and what is allowed."""
        choices = {"method": METHODS, "average": AVERAGES, "weighting": ("uniform", "samples"), "noise": NOISES}
        choices |= {"embedding": ("mean", "own"), "device_networks": ("masked", "sliced")}
        choices |= {"distribution": ("erk", "uniform")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(allowed)}")
        least = {"epochs": 1, "finetune_epochs": 0, "search_epochs": 1, "personalize_epochs": 0}
        least |= {"retries": 0, "batch_size": 1, "seed": 0}
        least |= {"local_steps": 1, "hyper_steps": 1, "hyper_interval": 1, "mask_interval": 1, "mask_batches": 1}
        for name, low in least.items():
            check_whole(name, getattr(self, name), low)
        for name in ("lr", "finetune_lr", "weight_decay", "hyper_lr", "hyper_weight_decay", "strength"):
            check_number(name, getattr(self, name))
        for name in ("momentum", "hyper_start", "sparsity", "search_space", "mask_start"):
            check_number(name, getattr(self, name), most=1, without_most=True)
        for name in ("hyper_part", "server_flops"):
            check_number(name, getattr(self, name), most=1, without_least=True)
        check_number("temperature", self.temperature, without_least=True)
        for name, most in (("sample", clients), ("min_clients", self.sample or clients)):
            value = getattr(self, name)
            if value is None:
                continue
            check_whole(name, value, 1)
            if value > most:
                whose = "the clients of a round" if name == "min_clients" else "the clients"
                raise ValueError(f"{name}={value} is not allowed; expected 1 to {most}, {whose}")
