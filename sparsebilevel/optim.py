"""``SGD`` and ``AdamW`` as in ``torch.optim``, faster on the weights of sparse layers.

They take the same arguments, keep the same state under the same names, and give the numbers of torch's fused steps::

    optimizer = sb.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

A method whose weights are stored sparse keeps weight and state at zero where the mask is False, and there a dense step
would change nothing. So a step moves the active weights only, where that is faster: on float32 weights on the CPU, if
enough cache lines of a weight hold no active one (filter, channel and block masks; unstructured ones from about 96 %).
Everything else takes torch's step: the fused one, unless ``fused``, ``foreach`` or a setting that it does not know asks
for another. Where weights or state are not zero outside of the mask (BiP, HYDRA; a network trained dense) a dense step
would change them, so it is taken; nobody need say so, since the optimizer looks, again whenever a mask, weight or state
has changed between its steps.

On a GPU the float32 weights of sparse layers are stepped in one launch that also writes the masked copies which their
layers compute with.

The gradient of a sparse layer's weight is zero where the mask is False. What somebody else adds to it there, such as
noise, moves dropped weights in a dense step, and does not where the active ones are stepped alone.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import gpu, optimizer_step
from .kernels.optimizer_step import ActiveWeight, MaskedWeight
from .nn import mask_of


class _Found:
    """The active pieces of a weight (None: the dense step), and the tensors they were found from, as these were.

    What torch writes to a tensor counts its version up. What goes past it, through ``.data``, is not seen.
    """

    def __init__(self, pieces: Any | None, tensors: Sequence[Tensor]) -> None:
        self.pieces = pieces
        self._tensors = [(weakref.ref(t), t.data_ptr()) for t in tensors]
        self.remember(tensors)

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Take these, the same tensors, as they are now."""
        self._versions = [t._version for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        return [t._version for t in tensors] == self._versions and all(
            ref() is t and address == t.data_ptr() for t, (ref, address) in zip(tensors, self._tensors, strict=True)
        )


def _fit(weight: Tensor, grad: Tensor, state: Sequence[Tensor]) -> bool:
    """Whether the fused steps take them: float32 on the CPU, of the same strides, without gaps."""
    if grad.layout is not torch.strided or grad.dtype is not torch.float32 or not grad.is_cpu:
        return False
    strides = grad.stride()
    if weight.dtype is not torch.float32 or weight.stride() != strides:
        return False
    for tensor in state:  # no all(...): this runs for every parameter at every step
        if tensor.stride() != strides:
            return False
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _is_plain(weight: Tensor, grad: Tensor) -> bool:
    return weight.dtype is torch.float32 and grad.dtype is torch.float32 and grad.layout is torch.strided


class _ActiveSteps:
    """The step of both optimizers: what is active alone first, then torch's own for the rest."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    _dense_step: Callable[..., Any]  # torch's step without its hooks, which our own has already

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        raise NotImplementedError

    def _step_on_gpu(self, group: dict[str, Any], weights: Sequence[MaskedWeight]) -> None:
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as in torch.

        Args:
            closure: evaluates the model again and returns the loss, which is returned.
        """
        if torch.compiler.is_compiling():
            return super().step(closure)  # type: ignore[misc]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        looked_at: list[tuple[_Found, list[Tensor]]] = []
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            try:
                self.param_groups = [rest for group in groups for rest in self._step_group(group, looked_at)]
                self._dense_step()
            finally:
                self.param_groups = groups
        for found, tensors in looked_at:
            found.remember(tensors)
        return loss

    def _step_group(self, group: dict[str, Any], looked_at: list[tuple[_Found, list[Tensor]]]) -> list[dict[str, Any]]:
        """Step active weights; returns groups of what is left for torch's step."""
        if not self._takes(group):
            return [group]
        names = self._state_names(group)
        active: dict[Tensor, tuple[Any, list[Tensor]]] = {}
        fused: list[Tensor] = []
        fresh: list[Tensor] = []  # apart: torch's fused step takes either tensors with state or tensors without
        others: list[Tensor] = []
        on_gpu: list[MaskedWeight] = []
        for weight in group["params"]:
            grad = weight.grad
            if grad is None:
                continue
            kept = self.state.get(weight, {})
            state = [kept[name] for name in names if kept.get(name) is not None]
            if gpu.available(weight.device):
                step = kept.get("step")
                if not _is_plain(weight, grad) or (step is not None and step.device != weight.device):
                    others.append(weight)
                elif len(state) < len(names):  # torch's fused step makes a state that ours can go on with
                    fresh.append(weight)
                elif (masked := self._masked_weight(weight, state)) is not None:
                    on_gpu.append(masked)
                else:
                    fused.append(weight)
            elif not _fit(weight, grad, state):
                others.append(weight)
            elif len(state) < len(names):
                fresh.append(weight)
            elif weight.numel() < optimizer_step.SMALLEST or (mask := mask_of(weight)) is None or weight in active:
                fused.append(weight)
            else:
                found = self._find(mask, weight, state)
                looked_at.append((found, [mask, weight, *state]))
                if found.pieces is None:
                    fused.append(weight)
                else:
                    active[weight] = found.pieces, state
        if active:
            steps = [1.0] * len(active)
            if "step" in self.state[next(iter(active))]:
                counts = [self.state[weight]["step"] for weight in active]
                torch._foreach_add_(counts, 1)
                steps = [float(count) for count in counts]
            self._step_weights(
                group,
                [
                    ActiveWeight(pieces, weight, weight.grad, state, step)  # type: ignore[arg-type]
                    for (weight, (pieces, state)), step in zip(active.items(), steps, strict=True)
                ],
            )
        if on_gpu:
            self._step_on_gpu(group, on_gpu)
        parts = [(fused, True), (fresh, True), (others, group["fused"])]
        return [group | {"params": params, "fused": choice} for params, choice in parts if params]

    def _masked_weight(self, weight: Tensor, state: Sequence[Tensor]) -> MaskedWeight | None:
        mask = mask_of(weight)
        found = None if mask is None else optimizer_step.masked_weight(weight, mask, state)
        step = self.state.get(weight, {}).get("step")
        return found if found is None or step is None else found._replace(step=step)

    def _takes(self, group: dict[str, Any]) -> bool:
        """Whether the group asks for nothing that fused steps, ours or torch's, do not do or do otherwise."""
        values = [*group.values(), *group.get("betas", ())]
        return (
            group["fused"] is not False
            and group["foreach"] is None
            and not any(group.get(name) for name in ("differentiable", "capturable", "amsgrad"))
            and group.get("eps", 1) > 0  # without it what is zero divides by zero
            and not any(isinstance(value, Tensor) for value in values)
            and getattr(self, "grad_scale", None) is None
            and getattr(self, "found_inf", None) is None
        )

    def _find(self, mask: Tensor, weight: Tensor, state: Sequence[Tensor]) -> _Found:
        # Beside the state, which goes into checkpoints; copies and pickles of an optimizer start without.
        cache: dict[int, _Found] = self.__dict__.setdefault("_found", {})
        found = cache.get(id(weight))
        if found is None or not found.holds([mask, weight, *state]):
            pieces = optimizer_step.find_pieces(mask, weight, state)
            found = cache[id(weight)] = _Found(pieces, [mask, weight, *state])
        return found


class SGD(_ActiveSteps, torch.optim.SGD):
    """``torch.optim.SGD``, see there for the arguments; see :mod:`sparsebilevel.optim`."""

    _dense_step = inspect.unwrap(torch.optim.SGD.step)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        optimizer_step.sgd_step(weights, **{name: group[name] for name in names})

    def _step_on_gpu(self, group: dict[str, Any], weights: Sequence[MaskedWeight]) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        optimizer_step.masked_sgd_step(weights, **{name: group[name] for name in names})


class AdamW(_ActiveSteps, torch.optim.AdamW):
    """``torch.optim.AdamW``, see there for the arguments; see :mod:`sparsebilevel.optim`."""

    _dense_step = inspect.unwrap(torch.optim.AdamW.step)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        names = ("lr", "betas", "eps", "weight_decay", "maximize")
        optimizer_step.adamw_step(weights, **{name: group[name] for name in names})

    def _step_on_gpu(self, group: dict[str, Any], weights: Sequence[MaskedWeight]) -> None:
        torch._foreach_add_([w.step for w in weights if w.step is not None], 1)
        names = ("lr", "betas", "eps", "weight_decay", "maximize")
        optimizer_step.masked_adamw_step(weights, **{name: group[name] for name in names})
