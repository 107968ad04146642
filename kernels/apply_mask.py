"""Masked copies ``m * theta`` in the dtype that a layer computes in, and which of them are still good.

On a GPU the multiplication by the mask costs a pass over the weight before every product. So the copy is kept: it is
made when the first product asks for it, and again when weight or mask have changed since, of all layers at once.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from . import gpu, native, reference


def apply_mask(
    weights: Sequence[Tensor], masks: Sequence[Tensor], outs: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """``masks * weights``, selected rather than multiplied, of many tensors; on a GPU in one launch for each type.

    Args:
        weights: floating point, of any shapes and types.
        masks: each bool and of its weight's shape, or its packed words, int64 ``[ceil(size / 64)]`` in row-major order
            (see ``BinaryMask``).
        outs: written to, each of its weight's shape and on its device; of any floating types. By default new tensors,
            like the weights.

    Returns:
        ``outs``.

    Raises:
        ValueError: lists of different lengths; a mask or an output that does not fit its weight, naming it.
    """
    outs = [torch.empty_like(w) for w in weights] if outs is None else outs
    if not len(weights) == len(masks) == len(outs):
        raise ValueError(f"{len(weights)} weights, {len(masks)} masks and {len(outs)} outs; expected as many of each")
    for i, (weight, mask, out) in enumerate(zip(weights, masks, outs, strict=True)):
        check_mask(f"masks[{i}]", mask, weight)
        if out.shape != weight.shape or out.device != weight.device or not out.is_floating_point():
            raise ValueError(
                f"outs[{i}] is {out.dtype} of shape {list(out.shape)} on {out.device}; expected floating point "
                f"{list(weight.shape)} on {weight.device}, as weights[{i}]"
            )
    groups: dict[tuple, list[tuple[Tensor, Tensor, Tensor]]] = {}
    with torch.no_grad():
        for weight, mask, out in zip(weights, masks, outs, strict=True):
            if gpu.available(weight.device) and lies_alike(weight, mask, out):
                types = weight.device, weight.dtype, mask.dtype, out.dtype
                groups.setdefault(types, []).append((weight, mask, out))
            else:
                bools = mask if mask.dtype == torch.bool else reference.unpacked(mask, weight.shape)
                out.copy_(reference.effective_weight(weight, bools))
        for group in groups.values():
            elementwise().apply_mask(*zip(*group, strict=True))
    return outs


@functools.cache
def elementwise() -> Any:
    """The kernels, which import Triton; an import statement would look for them at every call."""
    from . import triton_elementwise

    return triton_elementwise


def check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    """Refuse a mask, bool or packed, that does not fit the weight."""
    expected = weight.shape if mask.dtype == torch.bool else torch.Size([-(-weight.numel() // 64)])
    if mask.dtype not in (torch.bool, torch.int64) or mask.shape != expected or mask.device != weight.device:
        raise ValueError(
            f"{name} is {mask.dtype} of shape {list(mask.shape)} on {mask.device}; expected torch.bool "
            f"{list(weight.shape)} or int64 words [{-(-weight.numel() // 64)}], on {weight.device}"
        )


def lies_alike(weight: Tensor, mask: Tensor, *others: Tensor) -> bool:
    """Whether the elementwise kernels take them: known types, and each element at the same place in memory."""
    if not elementwise().takes(weight, mask, *others):
        return False
    strides = weight.stride()
    for tensor in others if mask.dtype == torch.int64 else (mask, *others):
        if tensor.stride() != strides and _strides(tensor) != _strides(weight):
            return False
    # Packed words are in row-major order, whatever the order in memory is.
    return is_dense(weight) if mask.dtype == torch.bool else weight.is_contiguous() and mask.is_contiguous()


def _strides(tensor: Tensor) -> list[int]:
    """Where there is something to step over."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def is_dense(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has neither gaps nor overlaps, whatever the order of its dimensions is."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    return tensor.permute(order).is_contiguous()


class _Copy:
    """A masked copy, and what it was made from."""

    def __init__(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        self.weight = weakref.ref(weight, functools.partial(_copies.pop, id(weight)))
        self.mask = weakref.ref(mask)
        self.layout = _layout(weight, mask)
        with torch.inference_mode(False):  # a copy made in that mode could not be saved for a backward later
            self.tensor = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self.is_plain = lies_alike(weight, mask, self.tensor)
        self.seen: tuple | None = None
        self.written = False  # by the optimizer whose step is not yet over
        self.stepped: tuple | None = None  # the stream of the last step of an optimizer, and what it left
        self.idle = 0  # steps of an optimizer since anybody asked for it
        self.streams: list[int] = []  # the one that wrote it last, and those that have waited for it
        self.writer: Any = None  # the first of them

    def is_of(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether these are the tensors, where they were and as they were laid out."""
        return self.weight() is weight and self.mask() is mask and self.layout == _layout(weight, mask)

    def is_fresh(self, weight: Tensor, mask: Tensor) -> bool:
        return self.seen == _state(weight, mask)

    def wrote(self, state: tuple) -> None:
        """Say that the current stream has written ``mask * weight`` of this state."""
        stream = gpu.stream_id(self.tensor.device)
        if self.streams[:1] != [stream]:
            self.writer = gpu.stream(self.tensor.device)
            if self.streams and stream not in self.streams:
                self.tensor.record_stream(self.writer)
        self.seen, self.streams = state, [stream]

    def note_step(self, stream: int) -> None:
        """Say that an optimizer whose step ran on a stream may have changed the weight."""
        self.idle += 1
        weight, mask = self.weight(), self.mask()
        if not self.written and weight is not None and mask is not None:
            self.seen, self.stepped = None, (stream, _state(weight, mask))
        self.written = False

    def was_stepped(self, stream: int, weight: Tensor, mask: Tensor) -> bool:
        """Whether nothing but a step of an optimizer on this stream has changed the weight, and it will be used.

        Another stream may be writing it otherwise.
        """
        return self.idle <= 1 and self.streams == [stream] and self.stepped == (stream, _state(weight, mask))

    def use(self) -> Tensor:
        """The copy, for the current stream, which waits for the one that wrote it if that is another."""
        self.idle = 0
        if (number := gpu.stream_id(self.tensor.device)) not in self.streams:
            stream = gpu.stream(self.tensor.device)
            self.tensor.record_stream(stream)
            stream.wait_stream(self.writer)
            self.streams.append(number)
        return self.tensor


def _layout(weight: Tensor, mask: Tensor) -> tuple:
    """What ``model.double()``, ``.to(memory_format=...)`` and ``.data`` change of tensors that stay."""
    return weight.device, weight.dtype, weight.shape, weight.stride(), mask.stride()


def _state(weight: Tensor, mask: Tensor) -> tuple:
    """What changes when torch writes to them, or gives them other memory. What goes past it is not seen (``.data``)."""
    return weight._version, weight.data_ptr(), mask._version, mask.data_ptr()


_copies: dict[int, dict[torch.dtype, _Copy]] = {}  # by the id of a weight, for as long as it lives
_in_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weights that a captured optimizer writes: True
_NO_COPIES: dict[torch.dtype, _Copy] = {}
_MOST_IDLE = 3  # steps of an optimizer in which a copy is not asked for, as one for an evaluation in another dtype
_lock = threading.RLock()


def compute_copy(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask * weight`` in ``dtype``, not to be written to: the copy that is kept, on devices with our kernels.

    When one is out of date so are, after a step of an optimizer, those of all other layers: all whose optimizer stepped
    on this stream are made again, in one launch. Who asks for none in three steps has none any more. While a CUDA graph
    is captured nothing is kept, since the graph is to follow the weight; nor ever after of a weight whose optimizer was
    captured, since a replay changes it without a trace.

    ``SPARSEBILEVEL_COMPUTE_COPY=0`` makes it anew each time, for who changes weights through ``.data`` and not in a
    step of an optimizer.
    """
    copy = _copies.get(id(weight), _NO_COPIES).get(dtype)
    if copy is not None and keeps() and copy.is_of(weight, mask) and not gpu.is_capturing(weight.device):
        if copy.is_fresh(weight, mask):
            return copy.use()
        with _lock:  # what else is to be known of the two was seen when the copy was first made
            if _copies.get(id(weight), _NO_COPIES).get(dtype) is copy:  # no step was captured meanwhile
                if not copy.is_fresh(weight, mask):
                    _refresh(copy)
                return copy.use()
    if not _may_keep(weight, mask):
        made = gpu.shared()
        if made is not None and dtype in made:
            return made[dtype]
        if gpu.available(weight.device) and _strides(mask) == _strides(weight) and is_dense(weight):
            once = apply_mask([weight], [mask], [torch.empty_like(weight, dtype=dtype)])[0]
        else:
            once = reference.effective_weight(weight, mask).to(dtype)
        if made is not None:
            made[dtype] = once
        return once
    with _lock:
        copy = _copies.get(id(weight), _NO_COPIES).get(dtype)
        if copy is None or not copy.is_of(weight, mask):
            _watch_optimizers()
            copy = _Copy(weight, mask, dtype)
            others = _copies.get(id(weight), _NO_COPIES).items()  # of which a weight of another type needs none
            _copies[id(weight)] = {other: kept for other, kept in others if kept.is_of(weight, mask)} | {dtype: copy}
        if not copy.is_fresh(weight, mask):
            _refresh(copy)
        return copy.use()


@functools.cache
def _watch_optimizers() -> None:
    """From now on, forget copies of weights after a step of an optimizer.

    Torch's fused steps write weights without counting their versions up, and so do those of others that write through
    ``.data``.
    """

    def forget(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        streams: dict[torch.device, int | None] = {}  # None while a graph is captured
        with _lock:
            # Torch's own write to no weight without a gradient, but for LBFGS, which counts the version up.
            needs_gradient = type(optimizer).__module__.startswith("torch.optim.")
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    device = weight.device
                    if device not in streams:
                        streams[device] = None if gpu.is_capturing(device) else gpu.stream_id(device)
                    stream = streams[device]
                    if stream is None:
                        _copies.pop(id(weight), None)
                        _in_graphs[weight] = True
                        continue
                    copies = _copies.get(id(weight))
                    if copies is None or (needs_gradient and weight.grad is None):
                        continue
                    for copy in copies.values():
                        copy.note_step(stream)
                    if any(copy.idle >= _MOST_IDLE for copy in copies.values()):
                        _copies[id(weight)] = {dtype: c for dtype, c in copies.items() if c.idle < _MOST_IDLE}

    register_optimizer_step_post_hook(forget)


def keeps() -> bool:
    """Whether what is made of weights and masks is kept until they change."""
    return native.is_on("SPARSEBILEVEL_COMPUTE_COPY", gpu.setting("SPARSEBILEVEL_COMPUTE_COPY"))


def _may_keep(weight: Tensor, mask: Tensor) -> bool:
    return (
        gpu.available(weight.device)
        and keeps()
        and weight.is_leaf
        and is_dense(weight)
        and weight not in _in_graphs
        and not (weight.is_inference() or mask.is_inference())  # these count no versions
        and not gpu.is_capturing(weight.device)
        and not _is_sharding()
    )


def _is_sharding() -> bool:
    """Whether ``fully_shard`` (FSDP2) is used in this process.

    It frees weights and gathers them again, often at the same address and always without counting their versions up;
    and who shards weights would not have whole copies of them kept.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())  # it makes a class of each that it wraps


def _refresh(asked: _Copy) -> None:
    """Make a copy again, and every other that the same step of an optimizer has put out of date."""
    device = asked.layout[0]
    stream = gpu.stream_id(device)
    # By what one launch takes; the state of before, since another thread may change a weight meanwhile.
    stale: dict[tuple, list[tuple[Tensor, Tensor, _Copy, tuple]]] = {}
    for copies in list(_copies.values()):
        for dtype, copy in copies.items():
            weight, mask = copy.weight(), copy.mask()
            if weight is None or mask is None or copy.layout[0] != device or copy.is_fresh(weight, mask):
                continue
            if copy is not asked and not (copy.was_stepped(stream, weight, mask) and copy.is_of(weight, mask)):
                continue
            found = weight, mask, copy, _state(weight, mask)
            stale.setdefault((copy.is_plain, weight.dtype, dtype), []).append(found)
    for (is_plain, *_), group in stale.items():
        weights, masks, copies_, states = zip(*group, strict=True)
        outs = [copy.tensor for copy in copies_]
        if is_plain:
            elementwise().apply_mask(weights, masks, outs)
        else:
            with torch.no_grad():
                alike = [torch.empty_like(w, dtype=torch.bool).copy_(m) for w, m in zip(weights, masks, strict=True)]
            apply_mask(weights, alike, outs)
        for copy, state in zip(copies_, states, strict=True):
            copy.wrote(state)


def give_back(weight: Tensor, mask: Tensor) -> None:
    """Keep no copies any more that are not of these as they lie now: on another device, of another type."""
    with _lock:
        copies = _copies.get(id(weight))
        if copies is not None:
            _copies[id(weight)] = {dtype: copy for dtype, copy in copies.items() if copy.is_of(weight, mask)}


def forget_copies(weight: Tensor) -> None:
    """Keep nothing of a weight, and hold no weak reference to it or to its mask."""
    with _lock:
        _copies.pop(id(weight), None)
        _in_graphs.pop(weight, None)


def kept_copy(weight: Tensor, mask: Tensor) -> Tensor | None:
    """A copy that is kept of a weight, for an optimizer that writes it in the same pass, and then says so."""
    with _lock:
        copies = [copy for copy in _copies.get(id(weight), _NO_COPIES).values() if copy.is_of(weight, mask)]
        return min(copies, key=lambda copy: copy.idle).tensor if copies else None


def note_written(weight: Tensor, mask: Tensor, tensor: Tensor) -> None:
    """Say, in a step of an optimizer, that ``tensor``, a kept copy, holds ``mask * weight`` as it is now."""
    with _lock:
        for copy in _copies.get(id(weight), _NO_COPIES).values():
            if copy.tensor is tensor:
                copy.wrote(_state(weight, mask))
                copy.written = True
