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

from ..methods import OMP, BiDST, BiP, Sparsifier
from ..nn import sparse_layers, sparsify
from .local import FlatModule, sgd

# Those whose devices all have the server's mask, single weights of it; "magnitude" is the baseline.
UNSTRUCTURED = ("bip", "bidst", "magnitude")

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


class ServerMask:
    """The server's part: a method of the library at work on the server's weights, fed with the clients' gradients.

    Args:
        model: the dense network; is changed (its layers get masks, all open at first).
        name: one of `UNSTRUCTURED`.
        sparsity: of the weights of all convolutions and linear layers, in [0, 1).
        distribution: of BiDST's layers, see `sparsebilevel.sparsify`; the others rank all layers together.
        search_space: BiDST's, a fraction of a layer's entries.
        momentum: of the clients' SGD.
        local_steps: of the clients in a round.
        interval: rounds of weights between BiDST's changes of the mask; ``end``: rounds of weights after which it
            changes no more.
        seed: of BiDST's random draws.

    Attributes:
        flat: the server's network. Its values are those of the last call, not always the server's latest.
        method: the library's; None while all weights are open.
        version: counts the changes of the mask, of which clients must be told.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        sparsity: float,
        *,
        distribution: str = "erk",
        search_space: float = 0.05,
        momentum: float = 0.9,
        local_steps: int = 1,
        interval: int = 1,
        end: int | None = None,
        seed: int = 0,
    ) -> None:
        distribution = distribution if name == "bidst" else "global"
        sparsify(model, sparsity, distribution, init="dense", seed=seed)
        self.flat = MaskedModule(model)
        self.name, self.version = name, 0
        self._search_space, self._local_steps, self._interval, self._end = search_space, local_steps, interval, end
        self._seed = seed
        self.method: Sparsifier | None = None
        self.momentum = torch.zeros_like(self.flat.values)
        # Never stepped: it tells the method how far a round moves a weight, and holds the momentum that is to be
        # cleared where a weight comes or goes.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
        for key, p in model.named_parameters():
            self.optimizer.state[p]["momentum_buffer"] = self.momentum[self.flat.spans[key]].view(p.shape)

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
        model, optimizer = self.flat.module, self.optimizer
        if self.name == "bip":
            self.method = BiP(model, optimizer)
        elif self.name == "bidst":
            horizon = max(1, round(_BIDST_HORIZON / self._local_steps))
            self.method = BiDST(
                model,
                optimizer,
                search_space=self._search_space,
                horizon=horizon,
                update_freq=self._interval,
                update_end=self._end,
                seed=self._seed,
            )
        else:
            self.method = OMP(model, optimizer)

    def learn(
        self, weights: Tensor, momentum: Tensor, gradient: Tensor, lr: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """A step of the upper level.

        Args:
            weights, momentum: float [P], the server's.
            gradient: float [P], the clients' mean G: over batches of an upper level of their own for BiP, of the local
                steps of the round that is just over for BiDST.
            lr: of the clients' steps.
            steps: on the weights for this one on the scores, by which the step of the scores is as much longer.

        Returns:
            Weights and momentum after it. Where a weight came or went its momentum is zero; what BiDST grows or drops
            is zero, and what BiP opens has the value with which it was closed.
        """
        assert self.method is not None
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

    def finish(self, weights: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the mask for good; closed weights become zero."""

        def work() -> None:
            if isinstance(self.method, BiP):
                self.method.finish()

        return self._on(weights, momentum, work)

    def _on(self, weights: Tensor, momentum: Tensor, work: Callable[[], None]) -> tuple[Tensor, Tensor]:
        before = self.mask
        self.flat.load(weights)
        self.momentum.copy_(momentum)
        work()
        self.version += not torch.equal(before, self.mask)
        return self.flat.values.clone(), self.momentum.clone()

    def state_dict(self) -> dict[str, Any]:
        """The mask, the scores, and the method's own state."""
        scores = {name: layer.mask_scores for name, layer in sparse_layers(self.flat.module)}
        return {
            "version": self.version,
            "mask": self.mask,
            "scores": {name: value.clone() for name, value in scores.items() if value is not None},
            "method": None if self.method is None else self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, in a `ServerMask` made with the same arguments."""
        if state["method"] is not None and self.method is None:
            self._make()
        self.flat.set_mask(state["mask"])
        for name, layer in sparse_layers(self.flat.module):
            layer.set_mask_scores(state["scores"].get(name))
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.version = state["version"]


def decay_closed(
    weights: Tensor, momentum: Tensor, closed: Tensor, steps: int, lr: float, decay: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Steps of SGD with momentum where the mask is closed: there is no gradient but that of the weight decay.

    The server takes them, since clients do not have closed weights. With them a federation of one client is the
    library's method; without, closed weights would win against open ones, which decay.

    Args:
        weights, momentum: float [P].
        closed: bool [P].

    Returns:
        New weights and momentum, unchanged elsewhere.
    """
    values, state = weights[closed], momentum[closed]
    for _ in range(steps):
        sgd(values, weight_decay * values, state, lr, decay)
    weights, momentum = weights.clone(), momentum.clone()
    weights[closed], momentum[closed] = values, state
    return weights, momentum
