"""Averaged weights of a network whose masks change while it is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_number
from ..methods.base import unwrap
from ..nn import sparse_layers


class EMA:
    """Averaged weights under the current masks, in a copy of the model that can be evaluated.

    ::

        sb.sparsify(model, sparsity=0.9)
        ema = sb.EMA(model, decay=0.999)
        sparsifier = sb.BiDST(model, optimizer, update_freq=1000)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            sparsifier.step()
            ema.update(model)                     # last: the masks may have changed in this step
        logits = ema.module(x)                    # in evaluation mode
        dense = sb.densify(ema.module)

    ``torch.optim.swa_utils.AveragedModel`` does not know what a mask is: with ``use_buffers`` it fails on masks, or
    with a ``multi_avg_fn`` mixes them; without, it copies buffers, statistics of normalization layers among them. It
    pairs them by their order, which scores that come and go upset. Here parameters and floating buffers are averaged,
    masks and counters are copied, and scores are left to the model. A weight that grows starts at zero, and its average
    does so too.

    The decay starts low, ``(1 + t) / (10 + t)`` at step ``t``, so that the initial weights are soon forgotten.

    Args:
        model: after :func:`sparsebilevel.sparsify`, before or after its method is made; is copied. May be wrapped in
            DDP or compiled; the copy is not.
        decay: of the average for one step, in [0, 1).

    Attributes:
        module: the copy, in evaluation mode and without gradients. It may be moved to another device.
        steps: how many steps have been averaged.

    Raises:
        ValueError: ``decay`` is outside of what is allowed.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.steps = check_number("decay", decay, most=1, without_most=True), 0
        self.module = copy.deepcopy(unwrap(model)).requires_grad_(False).eval()
        for _, layer in sparse_layers(self.module):
            layer.collect("none")
            layer.set_mask_scores(None)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards ``model``. Call it after the steps of optimizer and method.

        Raises:
            ValueError: ``model`` has other tensors than when the copy was made, as after ``sparsify``.
        """
        model = unwrap(model)
        ours, theirs = _tensors(self.module), _tensors(model)
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())
            raise ValueError(f"model is not as it was when this EMA was made; they differ in {odd[:5]}. Make a new one")
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, mine in ours.items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name].to(mine), 1 - decay)
            else:
                mine.copy_(theirs[name])
        for (_, mine), (_, layer) in zip(sparse_layers(self.module), sparse_layers(model), strict=True):
            # Where the method stores zeros the average does so too, and a weight that grows again starts there. A
            # dropped weight that the method keeps in store is averaged like the others.
            mine.weight.masked_fill_(~mine.mask & (layer.weight == 0).to(mine.mask.device), 0)

    def state_dict(self) -> dict[str, Any]:
        """``{"module": state dict of the averaged model, "steps": their number}``. Loads with ``weights_only``."""
        return {"module": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: something else than such a state.
            RuntimeError: a state of another model.
        """
        if not {"module", "steps"} <= state.keys():
            raise ValueError(
                f"state has the keys {sorted(state)[:5]}; expected 'module' and 'steps', as state_dict has"
            )
        self.module.load_state_dict(state["module"])
        self.steps = int(state["steps"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without scores, which come and go with the method that learns them."""
    scores = {f"{name}.mask_scores".lstrip(".") for name, _ in sparse_layers(model)}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value for name, value in named if name not in scores}
