"""Gradients over the wire: a communication hook for DistributedDataParallel that leaves out what masks make zero."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .kernels import BinaryMask, cuda
from .kernels.pack import bytes_of, gather_values, mask_to_bits, scatter_values
from .nn import SparseMaskedModule, gradient_mask_of


class _Positions(NamedTuple):
    """What of a bucket is sent, for as long as its parameters have these masks."""

    parameters: list[Tensor]
    masks: list[Tensor | None]
    versions: list[int]
    total: int  # elements of the bucket
    num_sent: int  # of them
    bits: np.ndarray
    support: BinaryMask | None  # the bits on a GPU, where its kernels are
    indices: Tensor | None  # those of the bits, int64 [num_sent], where there are no kernels

    def hold_for(self, parameters: list[Tensor], masks: list[Tensor | None], total: int) -> bool:
        return (
            self.total == total
            and len(self.parameters) == len(parameters)
            and all(a is b for a, b in zip(self.parameters, parameters, strict=True))
            and _are_unchanged(self.masks, self.versions, masks)
        )


class _Masks(NamedTuple):
    """The masks of a model's parameters, and what tells them from others."""

    seen: list[Tensor | None]  # of each parameter
    versions: list[int]
    used: Mapping[Tensor, Tensor | None]  # by parameter, those outside of which nothing is sent
    sizes: Mapping[Tensor, int]  # by parameter, elements that are sent
    hashes: Tensor  # int64 [parameters], 0 without a mask
    digest: int  # of the hashes
    ends: Tensor | None  # int64 [2], the digest and its bits turned, where the gradients are; None without masks


def _versions(masks: list[Tensor | None]) -> list[int]:
    return [0 if mask is None else mask._version for mask in masks]


def _are_unchanged(known: list[Tensor | None], versions: list[int], masks: list[Tensor | None]) -> bool:
    return all(a is b for a, b in zip(known, masks, strict=True)) and versions == _versions(masks)


class SparseAllReduce:
    """Averages the gradients of a DDP model, those of sparse layers at the positions of their masks only.

    The gradient of a sparse layer's weight is zero outside of the mask. Of each bucket the other elements go into one
    vector, which is reduced and written back: no positions are sent. Parameters without a mask (scores that are
    Parameters among them) travel whole beside them, as do weights that another kind of module uses too and those that
    share their gradient with scores. The averages are those of DDP without a hook, unless something else than its layer
    reads a masked weight, as a penalty on it or ``F.linear(x, layer.weight)`` does: outside of the mask a gradient from
    there is dropped.

    Masks must change on all ranks between the same two backward passes, which methods (:class:`Sparsifier`) see to. In
    each pass the ranks compare a hash of all masks, 16 bytes that travel beside the first bucket: a rank whose masks
    have changed waits for the others' before it sends, the others look at them at the end. The gradients of scores that
    methods average themselves (``effective_grad``) are not DDP's and not counted here.

    Args:
        ddp: the wrapped model, which has no hook yet; this one is registered.

    Attributes:
        bytes_sent: what this rank gave to all_reduce, hashes included, in all backward passes so far. A ring sends
            ``2 (w - 1) / w`` times as much over the wire of each of ``w`` ranks.
        dense_bytes: what it would have been without the hook.

    Raises:
        TypeError: ``ddp`` is not a DistributedDataParallel.
        RuntimeError: in a backward pass, on all ranks: their masks differ, whichever of them changed. Gradients hold
            anything then.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        if not isinstance(ddp, DistributedDataParallel):
            raise TypeError(f"ddp is a {type(ddp).__name__}; expected a DistributedDataParallel")
        self.bytes_sent = 0
        self.dense_bytes = 0
        self._group = ddp.process_group
        self._model: nn.Module = ddp.module
        self._names = {parameter: name for name, parameter in ddp.module.named_parameters()}
        self._positions: dict[int, _Positions] = {}
        self._mine: _Masks | None = None
        self._agreed: _Masks | None = None  # the last that all ranks had
        self._comparison: Any = None  # of this backward pass, on its way
        self._differs = False  # known before the first bucket was sent
        ddp.register_comm_hook(None, self._hook)

    def __repr__(self) -> str:
        share = f" ({self.bytes_sent / self.dense_bytes:.1%})" if self.dense_bytes else ""
        return f"SparseAllReduce({self.bytes_sent} bytes sent of {self.dense_bytes} dense{share})"

    def _hook(self, state, bucket):  # DDP looks at annotations, and does not take them as strings
        if bucket.index() == 0:
            self._begin(bucket.buffer().device)
        future = self._reduce(bucket)
        if bucket.is_last() and (self._differs or not self._is_equal()):
            self._raise(bucket.buffer().device)
        return future

    def _reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:
        assert self._agreed is not None
        buffer = bucket.buffer()
        positions = None if self._differs else self._positions_of(bucket)
        if positions is None:  # the other ranks wait for as much as all have agreed on
            sent = buffer.new_zeros(sum(self._agreed.sizes[parameter] for parameter in bucket.parameters()))
        else:
            sent = _gather(buffer, positions) if positions.num_sent < positions.total else buffer
            sent /= dist.get_world_size(self._group)
        self.bytes_sent += sent.numel() * sent.itemsize
        self.dense_bytes += buffer.numel() * buffer.itemsize
        if sent.numel() == 0:  # the same on all ranks
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(buffer.zero_())
            return done
        work = dist.all_reduce(sent, group=self._group, async_op=True)

        def finish(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
            values = reduced.value()[0]
            if positions is None or sent is buffer:
                return buffer
            return _scatter(values, positions, buffer)

        return work.get_future().then(finish)

    # -- masks that all ranks have ------------------------------------------------------------------------------------

    def _begin(self, device: torch.device) -> None:
        """Before the first bucket: start to compare masks. The end is awaited where this rank's have changed."""
        self._mine = self._look(device)
        self._comparison, self._differs = None, False
        if self._mine.ends is not None:
            ends = self._mine.ends.clone()
            self._comparison = dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self.bytes_sent += ends.numel() * ends.itemsize
        if self._agreed is None or self._agreed.digest != self._mine.digest:
            self._differs = not self._is_equal()
            if self._differs and self._agreed is None:  # on all ranks: nothing can be sent
                self._raise(device)
        if not self._differs:
            self._agreed = self._mine

    def _is_equal(self) -> bool:
        """Whether all ranks have this rank's masks."""
        assert self._mine is not None
        if self._comparison is None:
            return True
        # In a callback, which on a GPU runs in a stream that waits for nothing else.
        largest, smallest = self._comparison.get_future().then(lambda reduced: reduced.value()[0].tolist()).wait()
        return bool(largest == ~smallest == self._mine.digest)  # the smallest came as the largest with its bits turned

    def _raise(self, device: torch.device) -> None:
        """A collective call: all ranks come here, to find the masks that differ."""
        assert self._mine is not None
        mine = self._mine.hashes.to(device)
        ends = torch.cat([mine, ~mine])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        odd = (ends[: mine.numel()] != ~ends[mine.numel() :]).tolist()
        names = ", ".join(name for name, is_odd in zip(self._names.values(), odd, strict=True) if is_odd)
        raise RuntimeError(f"ranks disagree on the masks of {names}; change masks on all ranks together")

    def _look(self, device: torch.device) -> _Masks:
        """The masks as they are now."""
        seen, mine = [gradient_mask_of(parameter) for parameter in self._names], self._mine
        if mine is not None and _are_unchanged(mine.seen, mine.versions, seen):
            return mine
        dense = {
            id(parameter)
            for module in self._model.modules()
            if not isinstance(module, SparseMaskedModule)
            for parameter in module.parameters(recurse=False)
        }
        used = {p: None if id(p) in dense else mask for p, mask in zip(self._names, seen, strict=True)}
        sizes, hashes = {}, []
        for parameter, mask in used.items():
            sizes[parameter], mask_hash = parameter.numel(), 1 << 63
            if mask is not None:
                _, (sizes[parameter], mask_hash, *_) = mask_to_bits(_readable(mask.contiguous()))
            hashes.append(mask_hash - (1 << 63))
        together = hashlib.blake2b(np.array(hashes, np.int64).tobytes(), digest_size=8).digest()
        digest = int.from_bytes(together, "little", signed=True)
        has_masks = any(mask is not None for mask in used.values())
        ends = torch.tensor([digest, ~digest], device=device) if has_masks else None
        return _Masks(seen, _versions(seen), used, sizes, torch.tensor(hashes), digest, ends)

    def _positions_of(self, bucket: Any) -> _Positions:
        assert self._mine is not None
        parameters, buffer = bucket.parameters(), bucket.buffer()
        masks = [self._mine.used[parameter] for parameter in parameters]
        known = self._positions.get(bucket.index())
        if known is None or not known.hold_for(parameters, masks, buffer.numel()):
            known = self._positions[bucket.index()] = _compute(bucket, masks)
        return known


def _readable(mask: Tensor) -> Tensor:
    """Where its bits can be made of it."""
    return mask if cuda.available(mask.device) else mask.cpu()


def _compute(bucket: Any, masks: list[Tensor | None]) -> _Positions:
    buffer, parameters = bucket.buffer(), bucket.parameters()
    wanted = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
    for parameter, gradient, mask in zip(parameters, bucket.gradients(), masks, strict=True):
        if mask is not None:
            # In the order of the memory, where DDP lays a gradient out like its parameter, if that has no gaps.
            gapless = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
            stride = parameter.stride() if gapless else gradient.stride()
            start = gradient.storage_offset() - buffer.storage_offset()
            wanted.as_strided(gradient.shape, stride, start).copy_(mask)
    has_kernels = cuda.available(buffer.device)
    support = BinaryMask.of(wanted) if has_kernels else None
    bits, (count, *_) = mask_to_bits(_readable(wanted))
    indices = None if has_kernels or buffer.device.type == "cpu" else wanted.nonzero().view(-1)
    return _Positions(parameters, masks, _versions(masks), wanted.numel(), count, bits, support, indices)


def _gather(buffer: Tensor, positions: _Positions) -> Tensor:
    if positions.indices is not None:
        return buffer.index_select(0, positions.indices)
    values = torch.empty(positions.num_sent, dtype=buffer.dtype, device=buffer.device)
    if positions.support is not None:
        return cuda.gather_values(buffer, positions.support.words, positions.support.counts, values)
    gather_values(buffer, positions.bits, positions.total, bytes_of(values))
    return values


def _scatter(values: Tensor, positions: _Positions, buffer: Tensor) -> Tensor:
    if positions.indices is not None:
        return buffer.zero_().index_copy_(0, positions.indices, values)
    if positions.support is not None:
        return cuda.scatter_values(values, positions.support.words, positions.support.counts, buffer)
    scatter_values(bytes_of(values), positions.bits, buffer, keep=False)
    return buffer
