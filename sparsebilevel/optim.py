"""``SGD`` and ``AdamW`` as in ``torch.optim``, faster on the weights of sparse layers.

They take the same arguments, keep the same state under the same names, and give the numbers of torch's fused steps::

    optimizer = sb.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

A method whose weights are stored sparse keeps weight and state at zero where the mask is False, and there a dense step
would change nothing. So a step moves the active weights only, where that is faster: on float32 weights on the CPU, if
enough cache lines of a weight hold no active one (filter masks, wide blocks; unstructured ones from about 96 %).
Everything else takes torch's step: the fused one, unless ``fused``, ``foreach`` or a setting that it does not know asks
for another. Where weights or state are not zero outside of the mask (BiP, HYDRA; a network trained dense) a dense step
would change them, so it is taken; nobody need say so, since the optimizer looks, again whenever a mask, weight or state
has changed between its steps.

On a GPU the float32 weights of sparse layers are stepped in one launch that also writes the masked copies which their
layers compute with. Where mask scores are trained beside their weights, :func:`share_gradient` spares their gradients.

The gradient of a sparse layer's weight is zero where the mask is False. What somebody else adds to it there, such as
noise, moves dropped weights in a dense step, and does not where the active ones are stepped alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels import gpu, optimizer_step, split_gradient
from .kernels.optimizer_step import ActiveWeight, GpuWeight, SteppedScores
from .nn import SparseMaskedModule, is_gradient_shared, layers_sharing_gradient, mask_of, note_sharing, sparse_layers


def share_gradient(model: nn.Module, enabled: bool = True) -> list[str]:
    """Let each sparse layer whose scores are trained beside its weight keep one gradient for both.

    Both gradients, ``m * G`` of the weight and ``theta * G`` of the scores (straight through), follow from ``G``, that
    of ``m * theta``. From now on backward leaves ``G`` in ``weight.grad``, dense and in the weight's dtype, and nothing
    in ``mask_scores.grad``; a step of :class:`SGD` or :class:`AdamW` makes both of it, with theta as it was before the
    step. Numbers, state and checkpoints are those without it, up to the order of sums. On a GPU one launch reads ``G``,
    steps both and writes ``m * theta``; on the CPU, and in steps that torch takes, both are written out for the time of
    the step::

        for _, layer in sb.sparse_layers(model):
            layer.set_mask_scores(nn.Parameter(torch.randn_like(layer.weight)))
        sb.optim.share_gradient(model)
        optimizer = sb.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    ``G`` is a Parameter's gradient as any other: it accumulates, DistributedDataParallel averages it, GradScaler
    unscales it and looks in it for infinities, ``zero_grad`` forgets it. Three things are different:

    - clipping measures and clips ``G``, where the mask is False too, and not the two gradients that follow from it;
    - what else gives the weight a gradient, such as a penalty in the loss, is taken for a part of ``G``
      (``weight_decay`` is not; what else gives the scores one is added to theirs);
    - scores have no gradient in backward, which DistributedDataParallel refuses at the second step (unless it finds
      unused parameters): wrap the model after ``mask_scores.requires_grad_(False)`` on each layer. Scores then send
      nothing.

    Args:
        model: its layers share if their ``mask_scores`` is a Parameter of the weight's dtype, float32 or float64, if
            neither is also another layer's, if the weight requires a gradient and if no method collects one. Others
            stay as they are.
        enabled: False undoes it. Gradients that are there must be zeroed.

    Returns:
        Names of the layers that share, or did.

    Raises:
        ValueError: no layer of ``model`` can share.
        RuntimeError: in a step, of another optimizer; of one that has a weight without its scores, or scores without
            their weight.
    """
    layers = dict(sparse_layers(model))
    if enabled:
        uses = Counter(id(p) for layer in layers.values() for p in layer._parameters.values())
        names = [name for name, layer in layers.items() if _can_share(layer, uses)]
        if not names:
            raise ValueError(
                "model has no sparse layer that can share its gradient; expected one whose mask_scores is a Parameter "
                "of its weight's dtype, float32 or float64, without a method that collects gradients"
            )
    else:
        names = [name for name, layer in layers.items() if layer.shares_gradient]
    for name in names:
        note_sharing(layers[name], enabled)
    return names


def _can_share(layer: SparseMaskedModule, uses: Mapping[int, int]) -> bool:
    scores, weight = layer.mask_scores, layer.weight
    return (
        isinstance(scores, nn.Parameter)
        and uses[id(scores)] == uses[id(weight)] == 1
        and scores.dtype == weight.dtype
        and scores.dtype in (torch.float32, torch.float64)
        and weight.requires_grad
        and layer.score_support == "none"
    )


class _Found:
    """The active pieces of a weight (None: the dense step), and the tensors they were found from, as these were.

    What torch writes to a tensor counts its version up. What goes past it, through ``.data``, is not seen.
    """

    def __init__(self, pieces: Any | None, tensors: Sequence[Tensor]) -> None:
        self.pieces = pieces
        # Held, not by weak references, with which torch swaps no tensors: but for masks the optimizer has them anyway.
        self._tensors = [(t, t.data_ptr()) for t in tensors]
        self.remember(tensors)

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Take these, the same tensors, as they are now."""
        self._versions = [t._version for t in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, unchanged."""
        return [t._version for t in tensors] == self._versions and all(
            known is t and address == t.data_ptr() for t, (known, address) in zip(tensors, self._tensors, strict=True)
        )


def _fit(weight: Tensor, grad: Tensor, state: Sequence[Tensor]) -> bool:
    """Whether the fused steps take them: float32 on the CPU, of the same strides, without gaps."""
    if not _is_plain(weight, grad) or not grad.is_cpu:
        return False
    strides = grad.stride()
    if weight.stride() != strides:
        return False
    for tensor in state:  # no all(...): this runs for every parameter at every step
        if tensor.stride() != strides:
            return False
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _is_plain(weight: Tensor, grad: Tensor) -> bool:
    """Whether both are float32 and strided, and the weight is none of the subclasses (DTensor) without fused steps."""
    return (
        type(weight) in _PLAIN
        and weight.dtype is torch.float32
        and grad.dtype is torch.float32
        and grad.layout is torch.strided
    )


_PLAIN = (nn.Parameter, Tensor)


class _Pair(NamedTuple):
    """A weight and its scores, which share a gradient, and the groups that they are in."""

    weight: Tensor
    scores: Tensor
    mask: Tensor
    weight_group: dict[str, Any]
    scores_group: dict[str, Any]


class _ActiveSteps:
    """The step of both optimizers: what is active alone first, then torch's own for the rest."""

    splits_gradients = True  # of layers that share one

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    defaults: dict[str, Any]
    _dense_step: Callable[..., Any]  # torch's step without its hooks, which our own has already

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        raise NotImplementedError

    def _step_on_gpu(
        self, group: dict[str, Any], weights: Sequence[GpuWeight], scores_group: dict[str, Any] | None = None
    ) -> None:
        raise NotImplementedError

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as in torch.

        Args:
            closure: evaluates the model again and returns the loss, which is returned.
        """
        if not torch.compiler.is_compiling():
            return self._step(closure)
        if not is_gradient_shared():
            return super().step(closure)  # type: ignore[misc]
        return torch.compiler.disable(self._step)(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        looked_at: list[tuple[_Found, list[Tensor]]] = []
        with self._split_gradients(), torch.set_grad_enabled(self.defaults["differentiable"]):
            try:
                self.param_groups = rest = [rest for group in groups for rest in self._step_group(group, looked_at)]
                self._dense_step()
            finally:
                self.param_groups = groups
        # Torch's fused steps do not count versions up, and autograd would take what a graph has saved for unchanged.
        torch.autograd.graph.increment_version([p for group in rest if group["fused"] for p in group["params"]])
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
        on_gpu: list[GpuWeight] = []
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
                elif (masked := self._gpu_weight(weight, state)) is not None:
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
            if "step" in self.state.get(next(iter(active)), {}):
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

    def _gpu_weight(self, weight: Tensor, state: Sequence[Tensor]) -> GpuWeight | None:
        mask = mask_of(weight)
        found = None if mask is None else optimizer_step.gpu_weight(weight, mask, state)
        step = self.state.get(weight, {}).get("step")
        return found if found is None or step is None else found._replace(step=step)

    @contextlib.contextmanager
    def _split_gradients(self) -> Iterator[None]:
        """Within it weights and scores that share a gradient have their own, or none: then they have been stepped."""
        pairs = self._pairs()
        kept = [(parameter, parameter.grad) for pair in pairs for parameter in pair[:2]]
        try:
            if pairs:
                self._step_or_split(pairs)
            yield
        finally:
            for parameter, grad in kept:
                parameter.grad = grad

    def _pairs(self) -> list[_Pair]:
        pairs: list[_Pair] = []
        held: dict[int, dict[str, Any]] = {}
        for layer in layers_sharing_gradient():
            held = held or {id(p): group for group in self.param_groups for p in group["params"]}
            weight, scores = layer.weight, layer.mask_scores
            assert scores is not None
            groups = held.get(id(weight)), held.get(id(scores))
            if groups[0] is not None and groups[1] is not None:
                if weight.grad is not None:
                    pairs.append(_Pair(weight, scores, layer.mask, groups[0], groups[1]))
            elif groups[0] is not None or groups[1] is not None:
                has, lacks = ("weight", "mask_scores") if groups[1] is None else ("mask_scores", "weight")
                raise RuntimeError(
                    f"optimizer has the {has} of a layer of shape {list(weight.shape)}, and not its {lacks}; expected "
                    "both, since they share a gradient (share_gradient)"
                )
        return pairs

    @torch.no_grad()
    def _step_or_split(self, pairs: Sequence[_Pair]) -> None:
        together: dict[tuple[int, int], list[tuple[_Pair, GpuWeight]]] = {}
        apart: list[_Pair] = []
        takes = {id(group): self._takes(group) for group in self.param_groups}
        for pair in pairs:
            both = takes[id(pair.weight_group)] and takes[id(pair.scores_group)] and self._stepped_together(pair)
            if both:
                together.setdefault((id(pair.weight_group), id(pair.scores_group)), []).append((pair, both))
            else:
                apart.append(pair)
        grads = [pair.weight.grad for pair in apart if pair.weight.grad is not None]
        of_weights, of_scores, _ = split_gradient(grads, [pair.weight for pair in apart], [pair.mask for pair in apart])
        for pair, of_weight, of_score in zip(apart, of_weights or (), of_scores or (), strict=True):
            pair.weight.grad = of_weight
            pair.scores.grad = of_score if pair.scores.grad is None else of_score + pair.scores.grad
        for found in together.values():
            self._step_on_gpu(found[0][0].weight_group, [both for _, both in found], found[0][0].scores_group)
            for pair, _ in found:
                pair.weight.grad = None

    def _stepped_together(self, pair: _Pair) -> GpuWeight | None:
        """Both for one pass on a GPU; None where they take steps of their own."""
        if not gpu.available(pair.weight.device) or pair.scores.grad is not None:
            return None
        states: list[list[Tensor]] = []
        for parameter, group in ((pair.weight, pair.weight_group), (pair.scores, pair.scores_group)):
            kept, names = self.state.get(parameter, {}), self._state_names(group)
            states.append([kept[name] for name in names if kept.get(name) is not None])
            step = kept.get("step")
            if len(states[-1]) < len(names) or (step is not None and step.device != parameter.device):
                return None
        masked = self._gpu_weight(pair.weight, states[0])
        step = self.state.get(pair.scores, {}).get("step")
        return masked and optimizer_step.with_scores(masked, SteppedScores(pair.scores, states[1], step))

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

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return {name: group[name] for name in names}

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        optimizer_step.sgd_step(weights, **self._settings(group))

    def _step_on_gpu(
        self, group: dict[str, Any], weights: Sequence[GpuWeight], scores_group: dict[str, Any] | None = None
    ) -> None:
        of_scores = scores_group and self._settings(scores_group)
        optimizer_step.masked_sgd_step(weights, self._settings(group), of_scores)


class AdamW(_ActiveSteps, torch.optim.AdamW):
    """``torch.optim.AdamW``, see there for the arguments; see :mod:`sparsebilevel.optim`."""

    _dense_step = inspect.unwrap(torch.optim.AdamW.step)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}

    def _step_weights(self, group: dict[str, Any], weights: Sequence[ActiveWeight]) -> None:
        optimizer_step.adamw_step(weights, **self._settings(group))

    def _step_on_gpu(
        self, group: dict[str, Any], weights: Sequence[GpuWeight], scores_group: dict[str, Any] | None = None
    ) -> None:
        steps = [w.step for w in weights] + [w.scores.step for w in weights if w.scores is not None]
        torch._foreach_add_([step for step in steps if step is not None], 1)
        of_scores = scores_group and self._settings(scores_group)
        optimizer_step.masked_adamw_step(weights, self._settings(group), of_scores)
