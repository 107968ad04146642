"""Unstructured masks in federated training: what server and clients do with one mask that all of them agree on.

With ``z = m * theta`` and ``G = dloss/dz``, every method here needs of the data nothing but mean gradients. For a given
mask and given open weights the mean of G over the clients is linear in what each of them computes, and the scores are a
function of it alone. So the *scores stay on the server*, with the weights that are closed, and there the library's own
method takes its step with the clients' mean G as if it had come from one backward pass. A client gets and sends open
weights, and G where the server asks for it.

The implicit term is formed on the server too, for a reason beyond bytes: the lower level minimizes the clients' *mean*
loss, so both factors of ``(1/gamma) c * G_lower * G`` are means over clients. A mean of the clients' products would add
the variance of G between them, which is largest where their data differ, and says nothing about the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import pack, unpack
from ..methods import OMP, BiDST, BiP, Sparsifier
from ..nn import sparse_layers, sparsify
from .local import FlatModule, sgd
from .models import StandardizedConv2d
from .settings import Settings

_BIDST_HORIZON = 100  # local steps after which a grown weight is judged, BiDST's own default


class MaskedModule(FlatModule):
    """A network with sparse layers as one vector, with its mask, and with effective gradients where they are wanted.

    ``gradient`` is that of the weights, zero where the mask is closed; with zeros in ``values`` there, steps of SGD
    leave them zero.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        spans = {id(p): self.spans[name] for name, p in module.named_parameters()}
        self._layers = [(spans[id(layer.weight)], layer) for _, layer in sparse_layers(module)]

    @property
    def prunable(self) -> Tensor:
        """Bool [P]: the weights of sparse layers."""
        return self._assemble(False, lambda layer: torch.ones_like(layer.mask))

    @property
    def mask(self) -> Tensor:
        """Bool [P], True for every other parameter."""
        return self._assemble(True, lambda layer: layer.mask)

    def _assemble(self, elsewhere: bool, of: Callable[[Any], Tensor]) -> Tensor:
        out = torch.full(self.values.shape, elsewhere, device=self.values.device)
        for span, layer in self._layers:
            out[span] = of(layer).reshape(-1)
        return out

    def set_mask(self, mask: Tensor) -> None:
        """Compute with this mask from now on; bool [P]."""
        for span, layer in self._layers:
            layer.set_mask(mask[span].view(layer.mask.shape), check=False)

    def collect(self, where: Tensor | None) -> None:
        """Sum G over the backward passes from now on at ``where``, bool [P], nowhere outside of sparse layers."""
        for span, layer in self._layers:
            wanted = None if where is None else where[span]
            if wanted is None or not wanted.any():
                layer.collect("none")
            elif wanted.all():
                layer.collect("all")
            else:
                layer.collect("search", wanted.nonzero().squeeze(1))

    def collected(self) -> Tensor:
        """The sum, float [P], zero where nothing was collected."""
        out = torch.zeros_like(self.values)
        for span, layer in self._layers:
            grad = layer.effective_grad
            if grad is not None and layer.support_positions is not None:
                out[span].index_add_(0, layer.support_positions, grad)
            elif grad is not None:
                out[span] += grad.reshape(-1)
        return out


def check_prunable(model: nn.Module) -> None:
    """Raise ValueError if single weights of its convolutions cannot be pruned."""
    odd = [name for name, module in model.named_modules() if isinstance(module, StandardizedConv2d)]
    if odd:
        raise ValueError(
            f"the {len(odd)} convolutions {odd[0]!r} and so on have standardized weights, whose zeros would not stay "
            "zeros; single weights can be pruned with set_norm(..., standardize=False)"
        )


def _distribution(settings: Settings) -> str:
    return settings.distribution if settings.method == "bidst" else "global"


class Pruner:
    """The server's part: a method of the library at work on the server's weights, fed with the clients' gradients.

    Args:
        model: the dense network; is changed (its layers get masks, all open at first but BiDST's).
        settings: of the federation; the method is one of `UNSTRUCTURED`.
        rounds: of weights before the mask is fixed, after which BiDST changes it no more.

    Attributes:
        flat: the server's network. Its values are those of the last call, not always the server's latest.
        method: the library's; None while all weights are open.
    """

    def __init__(self, model: nn.Module, settings: Settings, rounds: int) -> None:
        self.settings, self.rounds = settings, rounds
        check_prunable(model)
        init: Any = "random" if settings.method == "bidst" else "dense"  # BiDST starts at once
        sparsify(model, settings.sparsity, _distribution(settings), init=init, seed=settings.seed)
        self.flat = MaskedModule(model)
        self.method: Sparsifier | None = None
        self.momentum = torch.zeros_like(self.flat.values)
        # Never stepped: it tells the method how far a round moves a weight, and holds the momentum that is to be
        # cleared where a weight comes or goes.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=settings.momentum)
        for name, p in model.named_parameters():
            self.optimizer.state[p]["momentum_buffer"] = self.momentum[self.flat.spans[name]].view(p.shape)

    @property
    def mask(self) -> Tensor:
        """Bool [P]: the open entries; parameters that no mask covers are open."""
        return self.flat.mask

    def learning(self) -> Tensor | None:
        """Bool [P]: where the method needs G of every round of weights; None: nowhere."""
        if not isinstance(self.method, BiDST):
            return None
        weights = {id(masked.weight): masked for masked in self.method.weights.values() if not masked.is_dense}
        method = self.method

        def of(layer: Any) -> Tensor:
            masked = weights.get(id(layer.weight))
            return torch.zeros_like(layer.mask) if masked is None else method.learning_mask(masked)

        return self.flat._assemble(False, of)

    def start(self, weights: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the first mask from the weights as they are.

        Returns:
            Weights and momentum with what the method makes of closed ones: BiP keeps their values.
        """
        return self._on(weights, momentum, self._make)

    def _make(self) -> None:
        s, model, optimizer = self.settings, self.flat.module, self.optimizer
        if s.method == "bip":
            self.method = BiP(model, optimizer)
        elif s.method == "bidst":
            horizon = max(1, round(_BIDST_HORIZON / s.local_steps))
            schedule: dict[str, Any] = {"update_freq": s.mask_interval, "update_end": self.rounds}
            self.method = BiDST(model, optimizer, search_space=s.search_space, horizon=horizon, seed=s.seed, **schedule)
        else:
            self.method = OMP(model, optimizer)

    def learn(self, weights: Tensor, momentum: Tensor, gradient: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """A step of the upper level.

        Args:
            weights, momentum: float [P], the server's.
            gradient: float [P], the clients' mean G: over batches of an upper level of their own for BiP, of the local
                steps of the round that is just over for BiDST.
            lr: of the clients' steps. BiP's scores take a step as the library's do, whatever number of steps on the
                weights goes with it; those of BiDST as many of them in one as the clients took.

        Returns:
            Weights and momentum after it. Where a weight came or went its momentum is zero; what BiDST grows or drops
            is zero, and what BiP opens has the value with which it was closed.
        """
        assert self.method is not None
        steps = self.settings.local_steps if self.settings.method == "bidst" else 1
        self.optimizer.param_groups[0]["lr"] = lr * steps

        def work() -> None:
            assert self.method is not None
            grads = {}
            for name, masked in self.method.weights.items():
                part = gradient[self.flat.spans[f"{name}.weight" if name else "weight"]]
                positions = masked.layers[0].support_positions
                if isinstance(self.method, BiP):
                    grads[name] = part.view(masked.weight.shape)
                elif positions is not None:
                    grads[name] = part[positions]
            if isinstance(self.method, BiP):
                self.method.upper_step_with(grads)
            else:
                self.method.step_with(grads)

        return self._on(weights, momentum, work)

    def figures(self) -> dict[str, float]:
        """For the log: mean absolute direct and implicit terms since the last call."""
        metrics = {} if self.method is None else self.method.metrics()
        return {name: metrics[name] for name in ("direct", "implicit") if name in metrics}

    def finish(self, weights: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the mask for good; closed weights become zero."""

        def work() -> None:
            if isinstance(self.method, BiP):
                self.method.finish()

        return self._on(weights, momentum, work)

    def _on(self, weights: Tensor, momentum: Tensor, work: Callable[[], None]) -> tuple[Tensor, Tensor]:
        self.flat.load(weights)
        self.momentum.copy_(momentum)
        work()
        return self.flat.values.clone(), self.momentum.clone()

    def state_dict(self) -> dict[str, Any] | None:
        """The method's own; masks and scores are in the network's. None while all weights are open."""
        return None if self.method is None else self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None, model: dict[str, Tensor]) -> None:
        """Continue from `state_dict` and the network's, in a `Pruner` made with the same arguments."""
        if state is not None and self.method is None:
            self._make()
        self.flat.module.load_state_dict(model)
        if self.method is not None and state is not None:
            self.method.load_state_dict(state)


def decay_closed(
    weights: Tensor,
    momentum: Tensor,
    closed: Tensor,
    steps: int,
    lr: float,
    decay: float,
    weight_decay: float,
    mime: bool = False,
) -> tuple[Tensor, Tensor]:
    """A round's steps where the mask is closed: there is no gradient but that of the weight decay.

    The server takes them, since clients do not have closed weights. With them a federation of one client is the
    library's method; without, closed weights would win against open ones, which decay.

    Args:
        weights, momentum: float [P].
        closed: bool [P].
        steps, lr, decay, weight_decay: of SGD with momentum, see `train_weights`.
        mime: the momentum stays during the steps, and takes one of its own with the gradient at ``weights``.

    Returns:
        New weights and momentum, unchanged elsewhere.
    """
    values, state = weights[closed], momentum[closed]
    gradient = weight_decay * values
    for _ in range(steps):
        if mime:
            values = values - lr * (weight_decay * values + decay * state)
        else:
            sgd(values, weight_decay * values, state, lr, decay)
    if mime:
        state = decay * state + gradient
    weights, momentum = weights.clone(), momentum.clone()
    weights[closed], momentum[closed] = values, state
    return weights, momentum


# -- messages ----------------------------------------------------------------------------------------------------------

# Vectors [P] of a message that are zero where the mask is closed.
_MASKED = ("weights", "momentum", "correction", "gradient")


def pack_masked(message: dict[str, Any], mask: Tensor, positions: bool = False) -> dict[str, Any]:
    """The message with its vectors packed: the values where ``mask`` (bool [P]) is open, as uint8 tensors.

    Args:
        positions: the receiver does not have the mask: that of ``weights`` tells it. If the mask is open everywhere,
            the message stays as it is.
    """
    if positions and mask.all():
        return message
    packed = dict(message)
    for name in _MASKED:
        if name in message:
            packed[name] = pack_vector(message[name], mask, positions and name == "weights")
    return packed


def pack_vector(values: Tensor, mask: Tensor, positions: bool = False) -> Tensor:
    """A message of `sparsebilevel.pack` as a uint8 tensor, in the smallest format that tells ``positions`` or not."""
    message = pack(values, mask, "auto" if positions else "values")
    if positions and message.entries[0].format == "dense":  # which does not tell them
        message = pack(values, mask, "bitmap")
    return torch.from_numpy(message.data)


def unpack_vector(message: Tensor, mask: Tensor) -> Tensor:
    """Float [P], zero where ``mask`` is closed, which must be the sender's.

    Raises:
        PackError: the message is damaged, or of another mask.
    """
    return unpack(message, mask, max_bytes=4 * mask.numel())


def unpack_masked(message: dict[str, Any], mask: Tensor | None = None) -> tuple[dict[str, Any], Tensor | None]:
    """What `pack_masked` was given, and the mask; None if all weights are open.

    Raises:
        PackError: a message is damaged, or of another mask.
    """
    opened = dict(message)
    for name in _MASKED:  # weights first
        data = message.get(name)
        if isinstance(data, Tensor) and data.dtype == torch.uint8:
            if name == "weights" and mask is None:
                opened[name], mask = unpack(data, return_mask=True)
            else:
                opened[name] = unpack(data, mask)
    return opened, mask
