"""Gradients over the wire: a communication hook for DistributedDataParallel that leaves out what masks make zero."""

from __future__ import annotations

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
            and all(a is b for a, b in zip(self.masks, masks, strict=True))
            and self.versions == _versions(masks)
        )


def _versions(masks: list[Tensor | None]) -> list[int]:
    return [0 if mask is None else mask._version for mask in masks]


class SparseAllReduce:
    """Averages the gradients of a DDP model, those of sparse layers at the positions of their masks only.

    The gradient of a sparse layer's weight is zero outside of the mask. Of each bucket the other elements go into one
    vector, which is reduced and written back: no positions are sent. Parameters without a mask (scores that are
    Parameters among them) travel whole beside them, as do weights that another kind of module uses too and those that
    share their gradient with scores. The averages are those of DDP without a hook.

    Once for each change of a bucket's masks the ranks compare their hashes. So masks must change on all ranks between
    the same two backward passes, which methods (:class:`Sparsifier`) see to. The gradients of scores that methods
    average themselves (``effective_grad``) are not DDP's and not counted here.

    Args:
        ddp: the wrapped model, which has no hook yet; this one is registered.

    Attributes:
        bytes_sent: what this rank gave to all_reduce, hashes included, in all backward passes so far. A ring sends
            ``2 (w - 1) / w`` times as much over the wire of each of ``w`` ranks.
        dense_bytes: what it would have been without the hook.

    Raises:
        TypeError: ``ddp`` is not a DistributedDataParallel.
        RuntimeError: in a backward pass, on all ranks: their masks differ.
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
        ddp.register_comm_hook(None, self._hook)

    def __repr__(self) -> str:
        share = f" ({self.bytes_sent / self.dense_bytes:.1%})" if self.dense_bytes else ""
        return f"SparseAllReduce({self.bytes_sent} bytes sent of {self.dense_bytes} dense{share})"

    def _hook(self, state, bucket):  # DDP looks at annotations, and does not take them as strings
        buffer = bucket.buffer()
        positions = self._positions_of(bucket)
        sparse = positions.num_sent < positions.total
        sent = _gather(buffer, positions) if sparse else buffer
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
            return _scatter(values, positions, buffer) if sparse else values

        return work.get_future().then(finish)

    def _positions_of(self, bucket: Any) -> _Positions:
        parameters, buffer = bucket.parameters(), bucket.buffer()
        masks = [gradient_mask_of(parameter) for parameter in parameters]
        known = self._positions.get(bucket.index())
        if known is None or not known.hold_for(parameters, masks, buffer.numel()):
            known = self._positions[bucket.index()] = self._compute(bucket, masks)
        return known

    def _compute(self, bucket: Any, masks: list[Tensor | None]) -> _Positions:
        """A collective call: all ranks come here for the same bucket."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        dense = {
            id(parameter)
            for module in self._model.modules()
            if not isinstance(module, SparseMaskedModule)
            for parameter in module.parameters(recurse=False)
        }
        wanted = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
        for parameter, gradient, mask in zip(parameters, bucket.gradients(), masks, strict=True):
            if mask is not None and id(parameter) not in dense:
                # In the order of the memory, where DDP lays a gradient out like its parameter, if that has no gaps.
                gapless = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
                stride = parameter.stride() if gapless else gradient.stride()
                start = gradient.storage_offset() - buffer.storage_offset()
                wanted.as_strided(gradient.shape, stride, start).copy_(mask)
        has_kernels = cuda.available(buffer.device)
        support = BinaryMask.of(wanted) if has_kernels else None
        bits, (count, mask_hash, *_) = mask_to_bits(wanted if has_kernels else wanted.cpu())
        if any(mask is not None for mask in masks):
            self._compare(torch.tensor([mask_hash - (1 << 63), count], device=buffer.device), parameters)
        indices = None if has_kernels or buffer.device.type == "cpu" else wanted.nonzero().view(-1)
        return _Positions(parameters, masks, _versions(masks), wanted.numel(), count, bits, support, indices)

    def _compare(self, mine: Tensor, parameters: list[Tensor]) -> None:
        ends = torch.cat([mine, ~mine])  # their maxima are the largest and, but for the bits, the smallest of all ranks
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        self.bytes_sent += ends.numel() * ends.itemsize
        if not torch.equal(ends[: mine.numel()], ~ends[mine.numel() :]):
            names = ", ".join(
                self._names[parameter] for parameter in parameters if gradient_mask_of(parameter) is not None
            )
            raise RuntimeError(f"ranks disagree on the masks of {names}; change masks on all ranks together")


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
