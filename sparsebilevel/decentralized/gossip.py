"""Mixing: every worker replaces its vector by a weighted mean of those of its neighbours and its own.

    v_k  <-  v_k + sum_j w_kj (v_j - v_k),    at the positions that both masks have

The sum of differences is the usual weighted mean, and needs no weight for oneself: what a lost neighbour does not send
counts for the worker itself, so that the matrix of those who are left is still symmetric and doubly stochastic. With
masks, positions that only one side has are left alone, so that the mean over the workers stays what it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import check_whole
from ..comm import Communicator
from ..kernels import pack, unpack
from ..kernels.pack import Message
from .estimators import mix_seed
from .graphs import Topology

Values = dict[int, Tensor]

_FORMAT_AT, _VALUES = 34, 1  # byte of a message that holds the format of its tensor; one of its codes


class Gossip:
    """Mixes vectors over a graph.

    Messages are packed: all values, or those at the positions of the sender's mask. The positions themselves travel
    once, after the mask has changed; from then on the receiver has them, and gets values with the hash of the mask,
    which `unpack` compares.

    Args:
        comm: connects the workers.
        topology: neighbours and weights.
        steps: mixings in a row for each call of `mix`.
        chebyshev: accelerate them: with s the second eigenvalue, ``v_{t+1} = (1 + e) W v_t - e v_{t-1}``,
            ``e = (1 - q) / (1 + q)``, ``q = sqrt(1 - s^2)``. It needs a graph that does not change.
        dtype: of values in messages, float32, bfloat16 or int8. What rounding loses is added to the next message of the
            same variable (error feedback). The sender too takes its own value as it was sent, so that the mean over the
            workers stays what it is but for the rounding of sums.
    """

    def __init__(
        self,
        comm: Communicator,
        topology: Topology,
        steps: int = 1,
        chebyshev: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if topology.size != comm.world_size:
            raise ValueError(f"topology has {topology.size} workers, the communicator {comm.world_size}")
        check_whole("steps", steps, 1)
        if chebyshev and len(topology.matrices) > 1:
            raise ValueError("chebyshev=True needs a graph that does not change")
        if dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(f"dtype={dtype} is not allowed; expected float32, bfloat16 or int8")
        self.comm, self.topology, self.steps, self.dtype = comm, topology, steps, dtype
        q = math.sqrt(1 - topology.second_eigenvalue**2)
        self.momentum = (1 - q) / (1 + q) if chebyshev else 0.0
        # Mixings done of each variable: each meets all matrices of a changing graph in turn, whatever else is mixed.
        self.clocks: Counter[str] = Counter()
        self.error: dict[str, Values] = {}  # what rounding has left, by variable and worker
        self._told: dict[tuple[int, int], Tensor | None] = {}  # (sender, receiver) -> mask that the receiver has
        self._known: dict[tuple[int, int], Tensor] = {}  # (receiver, sender) -> the sender's mask

    def forget(self) -> None:
        """Send positions anew. Done when a checkpoint is written or read, so that both go on with the same bytes.

        What is known of others stays: they need not forget in the same round, and go on with values alone.
        """
        self._told.clear()

    def mix(
        self,
        values: Mapping[int, Tensor],
        kind: str,
        masks: Mapping[int, Tensor] | None = None,
        variable: str | None = None,
    ) -> Values:
        """Mixed copies of ``values``.

        Args:
            values: ``{worker: tensor}`` of equal shapes, for all living workers of this process. float64 is sent as it
                is, for tests, and without masks.
            kind: what it is, for the byte counters.
            masks: bool, of the same shape: only there are values sent and mixed. One is known by its object: a changed
                mask must be a new one, and the same one need not be sent again.
            variable: which of those that share a kind it is, since what rounding has left, and the turn of a graph that
                changes, belong to one of them; None: the only one.
        """
        if masks is not None and any(v.dtype == torch.float64 for v in values.values()):
            raise ValueError("masks are not allowed with values of float64, which are sent as they are")
        current = dict(values)
        steps: Mapping[int, Tensor | float] = dict.fromkeys(values, 0.0)
        for _ in range(self.steps):
            changes = self._changes(current, kind, masks, variable or kind)
            if self.momentum:  # the formula above as steps, which are exactly zero where nothing is mixed
                e = self.momentum
                changes = {k: (1 + e) * change + e * steps[k] for k, change in changes.items()}
            current = {k: v + changes[k] for k, v in current.items()}
            steps = changes
        return current

    def _changes(self, values: Values, kind: str, masks: Mapping[int, Tensor] | None, variable: str) -> Values:
        """``W v - v`` of one mixing."""
        outgoing: dict[int, dict[int, bytes]] = {}
        own: Values = {}
        for k, value in values.items():
            mask = masks[k] if masks is not None else None
            is_exact = self.dtype == torch.float32 or value.dtype == torch.float64
            residuals = self.error.setdefault(variable, {}) if not is_exact else {}
            wanted = value + residuals[k] if k in residuals else value
            own[k] = value
            ready: dict[bool, bytes] = {}  # the same message for all who know the mask, and one for all who do not
            outgoing[k] = {}
            for j in self.topology.weights(k, self.clocks[variable]):
                is_known = mask is None or self._told.get((k, j)) is mask
                if is_known not in ready:
                    ready[is_known] = self._encode(k, wanted, mask, is_known)
                outgoing[k][j] = ready[is_known]
                if mask is not None:
                    self._told[k, j] = mask
            if ready and not is_exact:
                # Its own value as the receivers read it, which is the same in both messages: the mean stays exact.
                message = next(iter(ready.values()))
                own[k] = unpack(message, None if mask is None else mask.cpu()).to(value.device)
                left = wanted - own[k]
                residuals[k] = left if mask is None else left.masked_fill(~mask, 0.0)
        incoming = self.comm.exchange(outgoing, kind)
        out: Values = {}
        for k, value in values.items():
            out[k] = torch.zeros_like(value)
            weights = self.topology.weights(k, self.clocks[variable])
            for j in sorted(incoming.get(k, {})):
                difference = self._decode(k, j, incoming[k][j], value, masks is not None) - own[k]
                if masks is not None:  # filled, since infinity times zero is not zero
                    difference.masked_fill_(~(self._known[k, j] & masks[k]), 0.0)
                out[k].add_(difference, alpha=weights[j])
        self.clocks[variable] += 1
        return out

    def _encode(self, k: int, value: Tensor, mask: Tensor | None, is_known: bool) -> bytes:
        value, mask = value.contiguous().cpu(), None if mask is None else mask.cpu()
        if value.dtype == torch.float64:
            return bytes(pack(value.view(torch.float32), format="dense"))
        dtype = None if self.dtype == torch.float32 else self.dtype

        def packed(format: str) -> Message:
            # int8 rounds at random. Numbers of this worker and mixing alone: equal in every form of a message, however
            # the workers are spread over processes, and when a run is resumed.
            generator = torch.Generator().manual_seed(mix_seed(k, self.clocks.total()))
            return pack(value, mask, format, dtype=dtype, generator=generator)

        message = packed("dense" if mask is None else "values" if is_known else "auto")
        if mask is not None and message.entries[0].format == "dense":  # which would not tell the mask
            message = packed("bitmap")
        return bytes(message)

    def _decode(self, k: int, j: int, data: bytes, like: Tensor, is_masked: bool) -> Tensor:
        if like.dtype == torch.float64:
            return unpack(data).view(torch.float64).to(like.device)
        if not is_masked:
            return unpack(data).to(like.device)
        if data[_FORMAT_AT] == _VALUES:
            value = unpack(data, self._known[k, j].cpu())
        else:
            value, mask = unpack(data, return_mask=True)
            self._known[k, j] = mask.to(like.device)
        return value.to(like.device)


def consensus_error(values: Mapping[int, Tensor]) -> float:
    """Root of the mean squared distance of the workers' vectors from their mean."""
    stacked = torch.stack([v.double() for v in values.values()])
    return (stacked - stacked.mean(0)).square().sum(1).mean().sqrt().item()
