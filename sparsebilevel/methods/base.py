"""What every method shares: exact counts, one place where masks change, state, and the table that ``print`` shows."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from ..kernels import Backend, binarize, describe
from ..masks import NM, Pattern, random_mask
from ..nn import SparseMaskedModule, close_fast_paths, sparse_layers
from ..schedules import UpdateSchedule, layer_counts

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("sparsebilevel")

Storage = Literal["sparse", "dense"]
Scope = Literal["global", "layer"]

# Which method works on a layer. Beside the layers, not in them: copies of a model are free, and nothing is kept alive.
_AT_WORK: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Sparsifier]] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile, so that layer names do not depend on them."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class MaskedWeight:
    """One weight with its mask, whichever and however many layers use it.

    Layers that share a weight share its mask: a change is written to all of them, and their effective gradients add up.
    Scores are learned once: the first of the layers holds them.

    Attributes:
        name: of the first layer.
        weight: theta, the Parameter.
        mask: bool, of the weight's shape; changed by :meth:`Sparsifier.set_masks`.
        pattern: which weights live and die together.
        num_groups, num_kept: groups of the pattern in all, and those that the mask is to keep.
        scores: float32, of the weight's shape, where :meth:`set_scores` has installed them.
    """

    def __init__(self, name: str, layers: list[SparseMaskedModule]) -> None:
        self.name = name
        self.layers = layers

    @property
    def weight(self) -> nn.Parameter:
        return self.layers[0].weight

    @property
    def mask(self) -> Tensor:
        return self.layers[0].mask

    @property
    def pattern(self) -> Pattern:
        return self.layers[0].pattern

    @property
    def num_kept(self) -> int:
        return self.layers[0].num_kept

    @num_kept.setter
    def num_kept(self, value: int) -> None:
        for layer in self.layers:
            layer.num_kept = value

    @property
    def num_groups(self) -> int:
        return self.pattern.num_groups(self.weight.shape)

    @property
    def is_dense(self) -> bool:
        """The target keeps every group: such a weight stays dense, and no ranking over layers counts it."""
        return self.num_kept == self.num_groups

    @property
    def scores(self) -> Tensor:
        scores = self.layers[0].mask_scores
        assert scores is not None, f"{self.name} has no mask_scores"
        return scores

    def set_scores(self, scores: Tensor | None) -> None:
        for layer in self.layers:
            layer.set_mask_scores(scores if layer is self.layers[0] else None)

    def set_mask(self, mask: Tensor) -> None:
        for layer in self.layers:
            layer.set_mask(mask, check=False)

    def group_mask(self) -> Tensor:
        """Bool ``[num_groups]``: which groups of the pattern are kept."""
        return self.pattern.groups_of(self.mask)

    def collect(self, support: Any, positions: Tensor | None = None) -> None:
        for layer in self.layers:
            layer.collect(support, positions)

    def zero_effective_grad(self) -> None:
        for layer in self.layers:
            layer.zero_effective_grad()

    @property
    def effective_grad(self) -> Tensor | None:
        """``G`` summed over the layers; zero where they took no part in the loss, None where none is collected."""
        if self.layers[0].score_support == "none":
            return None
        grads = [layer.effective_grad for layer in self.layers if layer.effective_grad is not None]
        if not grads:
            positions = self.layers[0].support_positions
            return torch.zeros_like(self.weight if positions is None else positions, dtype=torch.float32)
        return grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)


def _listed(optimizers: Any) -> list[torch.optim.Optimizer]:
    """``optimizer`` as methods take it: one, several or None."""
    return [] if optimizers is None else list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]


@torch.no_grad()
def change_mask(
    masked: MaskedWeight, mask: Tensor, optimizers: Iterable[torch.optim.Optimizer], storage: Storage
) -> None:
    """Change mask, weight and optimizer state together; the only place where a mask changes.

    A grown weight starts with fresh optimizer state, and a dropped one leaves none behind: with momentum it would go on
    moving. With ``sparse`` storage weight and state are exactly zero wherever the mask is False, and plain optimizer
    steps keep them so (the gradient ``mask * G`` is zero there); with ``dense`` storage a dropped weight stays stored.
    """
    grown, dropped = mask & ~masked.mask, masked.mask & ~mask
    stale = (grown | ~mask) if storage == "sparse" else (grown | dropped)
    weight = masked.weight
    if storage == "sparse":
        weight.masked_fill_(stale, 0)
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # its directions are vectors of all weights together
            optimizer.state.clear()
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(stale, 0)
    masked.set_mask(mask)


class NotFiniteError(ValueError):
    """A gradient is not finite, of a batch to be left out or of a run that has diverged. Nothing has changed."""


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Say which layer, and what to do, where scores are refused for their NaNs."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{name!r}: {error}; a loss or gradient was. Where the loop leaves a batch out, "
            "call sparsifier.zero_grad() beside optimizer.zero_grad()"
        ) from error


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """int64 checksum of tensors, computed where they are: the sum of splitmix64 over eight bytes and their place."""
    total: Tensor | None = None
    for tensor in tensors:
        raw = tensor.detach().reshape(-1).view(torch.uint8)
        lanes = nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
        lanes = lanes + torch.arange(lanes.numel(), device=lanes.device) * -7046029254386353131
        for factor in (-4658895280553007687, -7723592293110705685):
            lanes = (lanes ^ (lanes >> 31)) * factor
        value = (lanes ^ (lanes >> 31)).sum()
        total = value if total is None else total.to(value.device) * 1_000_003 + value
    assert total is not None
    return total


class Sparsifier:
    """Base class of all methods. The user's loop stays as it is; ``step`` is called after ``optimizer.step``.

    ::

        sb.sparsify(model, sparsity=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = sb.RigL(model, optimizer, update_freq=100, update_end=25_000)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            sparsifier.step()

    Subclasses override :meth:`initialize` (the first masks), :meth:`learn` (every step), :meth:`propose_masks` (at
    topology changes) and :meth:`prepare_collection` (which effective gradients the next backward must give);
    docs/methods.md has examples.

    Args:
        model: has been through :func:`sparsebilevel.sparsify`; may be wrapped in DDP or compiled.
        optimizer: the user's, or several of them, or None; its state follows the masks. Never wrapped.
        sparsity: None takes over the target given to ``sparsify``, or where masks hide weights already, as another
            method or a checkpoint has left them, what these keep; another one changes it, with a message.
        distribution: of a ``sparsity`` given here (None is ``uniform``), see
            :func:`~sparsebilevel.schedules.layer_counts`.
        update_freq: optimizer steps between topology changes; 0 = never.
        update_start, update_end: changes happen at steps ``update_start <= t < update_end``.
        seed: of this method's own random draws (equal on all ranks).

    Attributes:
        weights: :class:`MaskedWeight` by the name of the layer; of layers that share a weight, the first.
        optimizers: a list of those that were given.
        schedule: when the topology changes, an :class:`~sparsebilevel.schedules.UpdateSchedule`.
        step_count: steps that were taken.
        generator: of the method's random draws, on the CPU.
        storage: ``sparse`` (weight and optimizer state are zero where the mask is False) or ``dense`` (they are kept).
        scope: ``layer`` (each keeps a number of groups of its own) or ``global`` (all layers together keep one).
        continuous: the mask may change at every step.
        bytes_sent: what this rank has given to all_reduce, gradients of its own, since it was made; see
            :class:`SparseAllReduce` for those of the weights.

    A model has one method at a time; see :meth:`release`.

    Raises:
        ValueError: a model without sparse layers, or on which another method works; arguments outside what they allow.
    """

    storage: Storage = "sparse"
    scope: Scope = "layer"  # each layer keeps its own count, or all together keep one
    # The mask may change at every step: too often for a history, so that metrics compare it with the first one.
    continuous = False
    finished = False  # the mask is final: see finish() of BiP and HYDRA
    _warned_of_readers = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        *,
        sparsity: float | Mapping[str, float] | None = None,
        distribution: str | None = None,
        update_freq: int = 0,
        update_start: int = 1,
        update_end: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = unwrap(model)
        self.optimizers = _listed(optimizer)
        for given in self.optimizers:
            if not isinstance(given, torch.optim.Optimizer):
                raise ValueError(
                    f"optimizer is or has a {type(given).__name__}; expected a torch.optim.Optimizer, several, or None"
                )
            if isinstance(getattr(given, "optim", None), torch.optim.Optimizer):
                raise ValueError(
                    f"optimizer is a {type(given).__name__}, which keeps its state in another optimizer, on some ranks "
                    "only; a method clears the state of dropped weights and expects a plain torch.optim.Optimizer"
                )
        self.weights = self._find_weights()
        self._refuse_company()
        held = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        if self.optimizers and not any(id(masked.weight) in held for masked in self.weights.values()):
            raise ValueError(
                "optimizer holds none of the model's sparse weights; is it that of another model? Give none where the "
                "weights are frozen"
            )
        self.schedule = UpdateSchedule(update_freq, update_start, update_end)
        self.step_count = 0
        self.released = False
        self.bytes_sent = 0
        self.history: list[dict[str, float]] = []
        self.generator = torch.Generator().manual_seed(seed)
        self._has_own_target = sparsity is not None
        if sparsity is not None:
            self._retarget(sparsity, distribution or "uniform")
        elif distribution is not None:
            raise ValueError(f"distribution={distribution!r} belongs to a sparsity, and none was given with it")
        self._agree_on_masks()
        with torch.no_grad():
            self.initialize()
        if self.scope == "layer":  # an ``initialize`` may leave the masks as it finds them
            self._set_counts({name: masked.pattern.count(masked.mask) for name, masked in self.weights.items()})
        self.first_masks = self._copy_masks() if self.continuous else {}
        self.prepare_collection()
        for layer in self._layers():  # last: a method that could not be made leaves the model free
            _AT_WORK[layer] = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        """Torch sends no generator to a spawned process, but what it holds."""
        return self.__dict__ | {"generator": self.generator.get_state().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles, which work on a copy of the model."""
        self.__dict__.update(state)
        if not isinstance(self.generator, torch.Generator):
            self.generator = torch.Generator().set_state(torch.from_numpy(self.generator))
        for layer in () if self.released else self._layers():
            if _AT_WORK.get(layer, lambda: None)() is None:  # a shallow copy works on the same model
                _AT_WORK[layer] = weakref.ref(self)

    def _layers(self) -> Iterator[SparseMaskedModule]:
        return (layer for masked in self.weights.values() for layer in masked.layers)

    def _refuse_company(self) -> None:
        for layer in self._layers():
            other = _AT_WORK.get(layer, lambda: None)()
            if other is not None:
                raise ValueError(
                    f"model has a method already, {type(other).__name__} at step {other.step_count}, and two would "
                    "undo each other's changes; delete it or call its release() before you make another"
                )

    def release(self) -> None:
        """Leave the model, masks as they are, to another method. This one is not to be stepped any more.

        Scores go, unless they are the user's Parameters.
        """
        self.released = True
        for masked in self.weights.values():
            if _AT_WORK.get(masked.layers[0], lambda: None)() is not self:
                continue
            if not isinstance(masked.layers[0].mask_scores, nn.Parameter):  # which is the user's
                masked.set_scores(None)
            for layer in masked.layers:
                _AT_WORK.pop(layer, None)
                layer.collect("none")

    def zero_grad(self) -> None:
        """Forget what backward passes have collected since the last step.

        Every backward pass through the model counts, in the way of gradients that accumulate. ``optimizer.zero_grad()``
        does not reach what a method collects: call this beside it after a pass that is not to count, as one that made
        adversarial examples or of a batch that is skipped.
        """
        for masked in self.weights.values():
            masked.zero_effective_grad()

    def _find_weights(self) -> dict[str, MaskedWeight]:
        by_weight: dict[int, MaskedWeight] = {}
        for name, layer in sparse_layers(self.model):
            if not isinstance(layer._parameters.get("weight"), nn.Parameter):
                raise ValueError(
                    f"the weight of {name!r} is computed (weight_norm, spectral_norm, parametrize); a method changes "
                    "weights where they are stored and expects a Parameter"
                )
            if layer.weight.is_meta:
                raise ValueError(
                    f"the weight of {name!r} is on the meta device; give the model memory and values first"
                )
            if hasattr(layer.weight, "device_mesh") or layer.weight.shape != layer.mask.shape:
                raise ValueError(
                    f"the weight of {name!r} has shape {list(layer.weight.shape)} where its mask has "
                    f"{list(layer.mask.shape)}, or is a DTensor; methods do not support weights that are spread over "
                    "devices (FSDP, tensor parallelism): use DistributedDataParallel"
                )
            by_weight.setdefault(id(layer.weight), MaskedWeight(name, [])).layers.append(layer)
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in self.model.modules()):
            raise ValueError("model is in FullyShardedDataParallel, which methods do not support; use DDP")
        for name, module in self.model.named_modules():
            own = [] if isinstance(module, SparseMaskedModule) else module._parameters.values()
            if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, SparseMaskedModule):
                logger.warning(
                    "%r is nn.MultiheadAttention, which reads the weight of its projection past the mask", name
                )
            for masked in (by_weight[id(p)] for p in own if id(p) in by_weight):
                logger.warning(
                    "%r (%s) shares the weight of %r and reads it without the mask: it loses what the mask drops and "
                    "trains what it hides; leave that layer out (exclude=), as sparsify does with those tied before",
                    *(name, type(module).__name__, masked.name),
                )
        close_fast_paths(self.model)
        if not by_weight:
            raise ValueError("model has no sparse layers; call sparsebilevel.sparsify(model, sparsity=...) first")
        return {masked.name: masked for masked in by_weight.values()}

    def _retarget(self, sparsity: float | Mapping[str, float], distribution: str) -> None:
        # Layers that are dense by their target stay so, if there are others and no word is said of them.
        dense = [] if isinstance(sparsity, Mapping) else [name for name, w in self.weights.items() if w.is_dense]
        free = {n: w for n, w in self.weights.items() if n not in dense} or self.weights
        shapes = {name: tuple(w.weight.shape) for name, w in free.items()}
        counts = layer_counts(shapes, sparsity, distribution, {name: w.pattern for name, w in free.items()})
        changed = {name: k for name, k in counts.items() if k != self.weights[name].num_kept}
        if changed:
            logger.warning(
                "%s changes the target of %d layers to sparsity=%s", type(self).__name__, len(changed), sparsity
            )
        for name, k in changed.items():
            self.weights[name].num_kept = k

    # -- what subclasses override -------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Bring masks, weights and scores into the state in which the method starts. Runs once, in the constructor.

        Here every mask keeps the target from now on: random groups go or come where it keeps another number, with a
        warning. A method that chooses otherwise, or later, overrides this.
        """
        if not self._has_own_target:
            self._take_over_counts()
        odd = {n: k for n, w in self.weights.items() if (k := w.pattern.count(w.mask)) != w.num_kept}
        if odd:
            logger.warning(
                "%s changes the masks of %d layers at random, from %d groups in all to their target of %d; masks of "
                "your own choice are to be set before it is made, without sparsity=",
                *(type(self).__name__, len(odd), sum(odd.values()), sum(self.weights[n].num_kept for n in odd)),
            )
        for masked in self.weights.values():
            self._change(masked, self._resized(masked))

    def _take_over_counts(self) -> None:
        """Keep masks that another method or a checkpoint has left with counts of their own; dense ones are a start."""
        kept = {name: masked.pattern.count(masked.mask) for name, masked in self.weights.items()}
        is_start = all(kept[name] == masked.num_groups for name, masked in self.weights.items())
        if is_start or all(kept[name] == masked.num_kept for name, masked in self.weights.items()):
            return
        total = sum(masked.num_kept for masked in self.weights.values())
        logger.log(
            logging.INFO if sum(kept.values()) == total else logging.WARNING,
            "%s takes over masks that keep %d groups, in each layer as many as now; the target of sparsify was %d "
            "(give sparsity= to change them)",
            *(type(self).__name__, sum(kept.values()), total),
        )
        for name, masked in self.weights.items():
            masked.num_kept = kept[name]

    def learn(self, grads: dict[str, Tensor]) -> None:
        """Use the effective gradients of one optimizer step (summed over accumulation, averaged over ranks)."""

    def propose_masks(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """New masks, by name, at a topology change; names left out keep theirs."""
        return {}

    def prepare_collection(self) -> None:
        """Ask the layers for the effective gradients that the next step needs. By default none."""
        for masked in self.weights.values():
            masked.collect("none")

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Call once after every ``optimizer.step()`` (and, with a GradScaler, before ``scaler.update()``).

        Returns:
            True if the topology changed.

        Raises:
            RuntimeError: ``scaler`` has not stepped an optimizer since its last update; no backward pass has run since
                the last step, and the method needs its gradient.
        """
        grads = self._take_grads(scaler)
        if grads is None:
            return False  # the scaler skipped the optimizer's step, so there is none to count
        return self.step_with(grads)

    @torch.no_grad()
    def step_with(self, grads: dict[str, Tensor]) -> bool:
        """:meth:`step` with effective gradients from elsewhere, as a federated server gets them from its clients.

        Args:
            grads: ``G`` by the names of :attr:`weights`, float32: ``[capacity]`` at the ``support_positions`` of a
                layer that collects there, else of the weight's shape. They may be written over.

        Returns:
            True if the topology changed.
        """
        self._refuse_released()
        self.step_count += 1
        self.learn(grads)
        changed = self.schedule.is_due(self.step_count)
        if changed or self.step_count == 1:
            self._warn_of_readers()
        if changed:
            self.change_topology(grads)
        self.prepare_collection()
        return changed

    def _warn_of_readers(self) -> None:
        """Once, of gradients outside of a mask: something but the layer reads the weight, and trains what is hidden."""
        if self._warned_of_readers:
            return
        for name, masked in self.weights.items():
            grad = masked.weight.grad
            if grad is None or any(layer.shares_gradient for layer in masked.layers):
                continue
            if bool(((grad.abs() > 0) & ~masked.mask).any()):  # a NaN says nothing
                self._warned_of_readers = True
                logger.warning(
                    "%r has a gradient where its mask is False: code beside the layer reads its weight and trains what "
                    "the mask hides; it should read layer.effective_weight()",
                    name,
                )
                return

    def _refuse_maximize(self) -> None:
        """Scores are learned to make the loss smaller."""
        if any(group.get("maximize") for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer has maximize=True, and {type(self).__name__} learns scores by which the loss falls; "
                "minimize its negative"
            )

    def _refuse_released(self) -> None:
        if self.released and not self.finished:
            raise RuntimeError(f"{type(self).__name__} was released, and its model is not its own any more")

    @torch.no_grad()
    def change_topology(self, grads: dict[str, Tensor] | None = None) -> None:
        """Adopt the method's proposed masks now, and record how much changed and how long it took.

        Raises:
            RuntimeError: after ``release()``.
        """
        self._refuse_released()
        start = self._now()
        before = self._copy_masks()
        if self.scope == "layer" and (odd := self._odd_counts()):
            logger.warning("%s gives masks that have changed their target again: %s", type(self).__name__, odd)
        self.set_masks(self.propose_masks(grads or {}))
        seconds = self._now() - start
        grown = sum(int((w.mask & ~before[n]).sum()) for n, w in self.weights.items())
        record = {"step": self.step_count, "iou": self._iou(before), "grown": grown, "seconds": seconds}
        self.history.append(record)

    def _copy_masks(self) -> dict[str, Tensor]:
        return {name: masked.mask.clone() for name, masked in self.weights.items()}

    def _iou(self, masks: Mapping[str, Tensor]) -> float:
        """Intersection over union of the masks as they are with others, over all layers together."""
        shared = sum(int((masks[n] & w.mask).sum()) for n, w in self.weights.items())
        return shared / max(sum(int((masks[n] | w.mask).sum()) for n, w in self.weights.items()), 1)

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Give layers these masks: masks, weights and optimizer state change together, and all ranks must agree.

        Each layer keeps as many groups as its mask from now on. A method with ``scope="global"`` keeps its sum over all
        layers.

        Args:
            masks: by the names of :attr:`weights`; bool, True = kept, of the weight's shape, on any device. Layers that
                are left out keep theirs.

        Raises:
            ValueError: a name that is not known, or a mask that does not fit; nothing has changed then.
            RuntimeError: the method was released or has finished; ranks have different masks.
        """
        if self.released and masks:
            raise RuntimeError(f"{type(self).__name__} was released, and its model is not its own any more")
        counts = {name: self._checked_count(name, mask) for name, mask in masks.items()}
        if self.scope == "layer":
            self._set_counts(counts)
        elif masks:
            total = sum(counts[n] if n in counts else w.pattern.count(w.mask) for n, w in self.weights.items())
            if total != self.target_count():
                raise ValueError(
                    f"masks keep {total} groups, and {type(self).__name__} keeps {self.target_count()} over all layers"
                )
        self._apply_masks(masks)

    def _checked_count(self, name: str, mask: Tensor) -> int:
        """Groups that a mask keeps; ValueError if it is none for the weight of this name."""
        if name not in self.weights:
            allowed = ", ".join(map(repr, self.weights))
            raise ValueError(f"masks has {name!r}, which is no weight of the method; allowed: {allowed}")
        masked = self.weights[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != masked.weight.shape:
            found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the mask of {name!r} is a {found}; expected torch.bool {list(masked.weight.shape)}, True = kept"
            )
        try:
            masked.pattern.check(mask)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
        return masked.pattern.count(mask)

    def _apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """:meth:`set_masks` of masks that are known to fit."""
        for name, mask in masks.items():
            self._change(self.weights[name], mask)
        if _world_size() > 1 and not self._ranks_agree():
            raise RuntimeError(f"ranks disagree on the masks after step {self.step_count}; were their gradients equal?")

    def _change(self, masked: MaskedWeight, mask: Tensor) -> None:
        change_mask(masked, mask.to(masked.mask.device), self.optimizers, self.storage)

    def _resized(self, masked: MaskedWeight) -> Tensor:
        """The current mask with exactly ``num_kept`` groups: random ones go or come where the target moved."""
        active, pattern = masked.group_mask().cpu(), masked.pattern
        if int(active.sum()) == masked.num_kept:
            return masked.mask
        if isinstance(pattern, NM):
            return random_mask(masked.weight.shape, masked.num_kept, pattern, self.generator)
        # Kept groups before all others.
        preference = torch.rand(active.numel(), generator=self.generator, device="cpu") + active
        return pattern.expand(binarize(preference, masked.num_kept), masked.weight.shape)

    def _take_grads(self, scaler: torch.amp.GradScaler | None) -> dict[str, Tensor] | None:
        """Effective gradients by name, unscaled and averaged over ranks; None for a step that the scaler skipped."""
        if not all(isinstance(layer, SparseMaskedModule) for layer in self._layers()):
            raise RuntimeError(f"the model of {type(self).__name__} was densified in place; call release() before")
        asked = [layer for layer in self._layers() if layer.score_support != "none"]
        if asked and all(layer.effective_grad is None for layer in asked):
            raise RuntimeError(
                f"{type(self).__name__} needs the gradient of this step, and no backward pass has gone through its "
                "model's sparse layers since the last one; was it of another model, or under no_grad?"
            )
        grads = {name: g for name, masked in self.weights.items() if (g := masked.effective_grad) is not None}
        if _world_size() > 1 and grads:
            flat = torch.cat([g.reshape(-1) for g in grads.values()])
            dist.all_reduce(flat)
            self.bytes_sent += flat.numel() * flat.itemsize
            flat /= _world_size()
            parts = flat.split([g.numel() for g in grads.values()])
            grads = {name: part.view_as(g) for (name, g), part in zip(grads.items(), parts, strict=True)}
        if scaler is not None and scaler.is_enabled():
            if self._scaler_skipped(scaler) or not all(bool(g.isfinite().all()) for g in grads.values()):
                self.zero_grad()
                if not self._training_optimizers():
                    raise RuntimeError(
                        f"gradients overflow at the scale {scaler.get_scale()}, which nothing lowers, since all "
                        "parameters are frozen; use bfloat16, or a GradScaler with a smaller init_scale"
                    )
                return None
            grads = {name: g / scaler.get_scale() for name, g in grads.items()}
        return grads

    def _scaler_skipped(self, scaler: torch.amp.GradScaler) -> bool:
        states = [scaler._per_optimizer_states[id(optimizer)] for optimizer in self._training_optimizers()]
        if states and all(state["stage"] is not OptState.STEPPED for state in states):
            raise RuntimeError(
                "the scale of these gradients is not known; call scaler.step(optimizer), "
                "sparsifier.step(scaler) and scaler.update() in this order"
            )
        return any(bool(found) for state in states for found in state["found_inf_per_device"].values())

    def _training_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those with a parameter that is not frozen: the others give a scaler nothing to do."""
        return [o for o in self.optimizers if any(p.requires_grad for g in o.param_groups for p in g["params"])]

    # -- ranks --------------------------------------------------------------------------------------------------------

    def _ranks_agree(self) -> bool:
        mine = checksum(masked.mask for masked in self.weights.values())
        if dist.get_backend() == "nccl":  # which carries nothing from the CPU, where a federated server has its masks
            mine = mine.cuda()
        low, high = mine.clone(), mine.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        return bool(low == high)

    def _agree_on_masks(self) -> None:
        """At the start rank 0's masks hold everywhere: DDP has not broadcast them."""
        if _world_size() > 1 and not self._ranks_agree():
            logger.warning("ranks start with different masks; those of rank 0 are taken")
            for masked in self.weights.values():
                mask = masked.mask.to(torch.uint8)
                dist.broadcast(mask, 0)
                masked.set_mask(mask.bool())

    def _now(self) -> float:
        if next(iter(self.weights.values())).weight.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- what a user reads and saves ----------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Realised fraction of zeros over all sparse layers (a tied weight counts once)."""
        total = sum(w.mask.numel() for w in self.weights.values())
        return 1 - sum(int(w.mask.sum()) for w in self.weights.values()) / total

    def metrics(self) -> dict[str, float]:
        """Figures for a log: sparsity, topology changes so far, and what the method adds of its own."""
        out = {"sparsity": self.sparsity, "topology_changes": float(len(self.history))}
        if self.history:
            out["mask_iou"] = self.history[-1]["iou"]
            out["topology_seconds"] = sum(record["seconds"] for record in self.history)
        if self.first_masks:
            out["mask_iou_start"] = self._iou(self.first_masks)
        return out

    def reset_metrics(self) -> None:
        """Begin anew with what :meth:`metrics` gives means of; to be called when they have been logged."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but masks and scores, which the model's own ``state_dict`` holds. Loads with ``weights_only``."""
        return {
            "method": type(self).__name__,
            "checksum": self._checksum(),
            "step_count": self.step_count,
            "num_kept": {name: masked.num_kept for name, masked in self.weights.items()},
            "history": [dict(record) for record in self.history],
            "generator": self.generator.get_state(),
            "first_masks": dict(self.first_masks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, after the model has got its own state.

        A method's constructor starts scores afresh. So build it first, then load the model's state, then this; or call
        :meth:`resume` where the model has its state already.

        Raises:
            ValueError: a state of another method, of another version, or of a model with other layers, masks or scores.
        """
        self._check_origin(state)
        self._check_masks(state)
        self._set_counts(state["num_kept"])
        self.step_count = state["step_count"]
        self.history = [dict(record) for record in state["history"]]
        self.generator.set_state(state["generator"])
        self.first_masks = self._on_devices(state["first_masks"])
        self.prepare_collection()

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state of another method or version, or of a model with other layers."""
        if state.get("method") != type(self).__name__:
            raise ValueError(f"state is of method {state.get('method')!r}; expected {type(self).__name__!r}")
        # A state without a checksum is older than checksums.
        if missing := sorted(set(self.state_dict()) - set(state) - {"checksum"}):
            raise ValueError(f"state lacks {', '.join(missing)}; another version of sparsebilevel wrote it")
        if set(state["num_kept"]) != set(self.weights):
            odd = sorted(set(state["num_kept"]) ^ set(self.weights))
            raise ValueError(f"state belongs to a model with other layers; they differ in {odd[:5]}")

    def _check_masks(self, state: Mapping[str, Any], *, scores: bool = True) -> None:
        """Raise ValueError unless the masks, and scores, are those that were saved with the state."""
        expected = state.get("checksum")  # None: older than checksums, so that only the counts are known
        if expected == self._checksum(scores=scores):
            return  # whatever they keep: somebody may have set them behind the method's back
        before = {name: masked.num_kept for name, masked in self.weights.items()}
        self._set_counts(state["num_kept"])
        difference = self._odd_counts()
        self._set_counts(before)
        if expected is not None:
            difference = difference or "they keep as many weights, but have other values"
        if difference:
            raise ValueError(
                f"the model's masks and scores are not those of the state ({difference}); build the method, then load "
                "the model's state, one that was saved together with this, and then this"
            )

    def target_count(self) -> int:
        """Groups that all masks together keep now."""
        return sum(masked.num_kept for masked in self.weights.values())

    @classmethod
    def resume(cls, state: Mapping[str, Any] | None, model: nn.Module, optimizer: Any = None, **kwargs: Any) -> Self:
        """Build the method over a model and optimizers that have their states already, as trainers load them.

        What the constructor makes of masks, weights, scores and the optimizers' state is undone before ``state`` is
        loaded. Meanwhile there is a second copy of all of them.

        Args:
            state: of :meth:`state_dict`, saved together with the model's; None begins anew.
            model, optimizer, **kwargs: as the constructor takes them.

        Raises:
            ValueError: as the constructor and :meth:`load_state_dict`.
        """
        if state is None:
            return cls(model, optimizer, **kwargs)
        optimizers = _listed(optimizer)
        before = copy.deepcopy((model.state_dict(), [one.state_dict() for one in optimizers]))
        sparsifier = cls(model, optimizers or None, **kwargs)
        model.load_state_dict(before[0])
        for one, its_state in zip(optimizers, before[1], strict=True):
            one.load_state_dict(its_state)
        try:
            sparsifier.load_state_dict(state)
        except Exception:
            sparsifier.release()  # which takes the scores away
            model.load_state_dict(before[0])
            raise
        return sparsifier

    def _set_counts(self, counts: Mapping[str, int]) -> None:
        for name, kept in counts.items():
            self.weights[name].num_kept = kept

    def _checksum(self, *, scores: bool = True) -> int:
        """Of all masks, and of the scores that there are."""
        found = (t for w in self.weights.values() for t in (w.mask, w.layers[0].mask_scores if scores else None))
        return int(checksum(t for t in found if t is not None))

    def _odd_counts(self) -> str:
        """Which masks do not keep what they should, in words; nothing if all do."""
        kept = {name: masked.pattern.count(masked.mask) for name, masked in self.weights.items()}
        odd = [
            f"{n!r} keeps {k}, not {self.weights[n].num_kept}" for n, k in kept.items() if k != self.weights[n].num_kept
        ]
        # A ranking over all layers gives each of them its count; then only the sum is known.
        if not odd or (self.scope != "layer" and sum(kept.values()) == self.target_count()):
            return ""
        return f"{sum(kept.values())} groups are kept, the target is {self.target_count()}; {'; '.join(odd[:5])}"

    def _on_devices(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors by weight name, each on its weight's device: a state may have been loaded elsewhere."""
        return {name: t.to(self.weights[name].weight.device, copy=True) for name, t in tensors.items()}

    def __str__(self) -> str:
        layers = {name: masked.layers[0] for name, masked in self.weights.items()}
        is_measured = any(layer.measured_passes for layer in layers.values())
        short = {"forward": "forward", "input_grad": "input", "weight_grad": "weight"} if is_measured else {}
        rows = [("layer", "shape", "sparsity", "pattern", "time vs dense", *short.values(), "backend")]
        reasons: dict[str, set[str]] = {}
        for name, layer in layers.items():
            backends = layer.backends
            ratio = _estimate(backends) if layer.measured_ratio is None else f"{layer.measured_ratio:.2f}x"
            shape = "x".join(map(str, layer.weight.shape))
            facts = (name, shape, f"{layer.sparsity:.4f}", type(layer.pattern).__name__, ratio)
            passes = [f"{layer.measured_passes[what]:.2f}x" if what in layer.measured_passes else "-" for what in short]
            rows.append((*facts, *passes, describe(backends)))
            for backend in backends.values():
                reasons.setdefault(f"{backend.name}: {backend.reason}", set()).add(name)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        covered = sum(w.weight.numel() for w in self.weights.values())
        share = covered / sum(p.numel() for n, p in self.model.named_parameters() if not n.endswith("mask_scores"))
        title = f"{type(self).__name__}: sparsity {self.sparsity:.4f} over {len(self.weights)} weights "
        title += f"({100 * share:.1f} % of all parameters), step {self.step_count}, "
        title += "mask changes continuously" if self.continuous else f"{len(self.history)} topology changes"
        footer = [f"{why} ({len(names)} layers)" for why, names in reasons.items()]
        if any(layer.measured_ratio is None for layer in layers.values()):
            footer.append("measure with sparsebilevel.costs.measure_layers(model, example_input)")
        return "\n".join([title, *lines, *footer])


def _estimate(backends: Mapping[str, Backend]) -> str:
    """Time against dense of a layer that nobody has measured."""
    gains = [backend.estimate if backend.name == "sparse" else 1.0 for backend in backends.values()]
    if None in gains or all(backend.name == "dense" for backend in backends.values()):
        return "not measured"
    return f"about {len(gains) / sum(1 / gain for gain in gains if gain):.1f}x"


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
