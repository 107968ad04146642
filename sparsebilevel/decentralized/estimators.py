"""Estimators of a worker's local gradient from few samples.

A function ``gradient(point, indices, key)`` gives the mean gradient over samples ``indices`` at a point, a tuple of
tensors (the weights; or the mask and the weights; ...). All random numbers of one evaluation, dropout masks among them,
follow from ``key``: an estimator that subtracts two gradients evaluates both on the same samples with the same key.
v is the estimate, B the batch, and ' marks what is of the step before.

    sgd       v = g(p; B)
    svrg      v = g(p; B) - g(s; B) + g(s; all),                   snapshot s = p every `period` steps
    spider    v = g(p; B) - g(p'; B) + v',                         v = g(p; all) every `period` steps
    storm     v = g(p; B) + (1 - rho) (v' - g(p'; B))              rho = 1 is sgd, rho = 0 spider without restarts
    finite    v = g(p; B) - g(p'; B) + (1 - rho) v' + rho (g(p'; B) - h_B + mean h),  then h_B = g(p; B)
    saga      v = g(p; B) - h_B + mean h,                          then h_B = g(p; B)

`finite` and `saga` need no full gradients. They work over fixed batches B of the local samples, with the last gradient
``h`` of each (zero before the first), so their memory is one vector a batch: much for large networks. `finite` is the
finite-sum form used in decentralized minimax methods. `saga` (Defazio, Bach and Lacoste-Julien, arXiv 1407.0202; with
gradient tracking it is GT-SAGA, Xin, Kar and Khan, arXiv 1909.11774) takes one gradient a step, the others take two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_whole

Point = tuple[Tensor, ...]

Gradient = Callable[[Point, Tensor, int], Tensor]
"""Mean gradient over samples (int64 ``[B]``) at a point, of the point's shape; the last argument is the key."""

ESTIMATORS = ("sgd", "svrg", "spider", "storm", "finite", "saga")


def mix_seed(*numbers: int) -> int:
    """A seed from several numbers, different for different numbers and orders (64-bit FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for byte in int(number).to_bytes(8, "little", signed=True):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63


def mean_cost(name: str, size: int, batch_size: int, rho: float = 0.1, period: int = 0) -> float:
    """Sample gradients of one call of an `Estimator` of ``size`` samples, on average in the long run."""
    batch: float = min(batch_size, size)
    if name in ("svrg", "spider"):
        period = period or max(1, int(size // batch))
        return (size + 2 * batch * (period - 1)) / period
    if name in ("finite", "saga"):  # all samples in equal batches
        batch = size / math.ceil(size / batch)
    return batch if name in ("sgd", "saga") or (name == "storm" and rho == 1) else 2 * batch


class Estimator:
    """One worker's estimate of one gradient; a call gives that at the next point.

    Args:
        name: one of `ESTIMATORS`.
        size: number of the worker's samples.
        gradient: of the function.
        batch_size: samples of a mini-batch, drawn with replacement (of ``finite`` and ``saga`` without: they have fixed
            batches); at most as many as there are.
        seed: of the batches. Batch number t follows from it and t alone.
        rho: of ``storm`` and ``finite``.
        period: of ``svrg`` and ``spider``; 0 means one epoch.
    """

    def __init__(
        self,
        name: str,
        size: int,
        gradient: Gradient,
        batch_size: int,
        seed: int = 0,
        rho: float = 0.1,
        period: int = 0,
    ) -> None:
        if name not in ESTIMATORS:
            raise ValueError(f"estimator={name!r} is not known; allowed: {', '.join(ESTIMATORS)}")
        check_whole("batch_size", batch_size, 1)
        check_number("rho", rho, most=1)
        check_whole("period", period, 0)
        self.name, self.size, self.gradient, self.seed, self.rho = name, size, gradient, seed, rho
        self.batch_size = min(batch_size, size)
        self.period = period or max(1, size // self.batch_size)
        self.count = 0
        self._last: Point | None = None  # point of the step before; of svrg, the snapshot
        self._value: Tensor | None = None  # estimate of the step before; of svrg, the full gradient at the snapshot
        self._table: dict[int, Tensor] = {}
        self._mean: Tensor | None = None
        self._step: Callable[[Point, Tensor, int], Tensor] = getattr(self, f"_{name}")

    def __call__(self, point: Point) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.count))
        if self.name in ("finite", "saga"):
            batches = -(-self.size // self.batch_size)
            self._chosen = int(torch.randint(batches, (), generator=generator))
            indices = torch.arange(self._chosen, self.size, batches)
        else:
            indices = torch.randint(self.size, (self.batch_size,), generator=generator)
        key = int(torch.randint(2**31, (), generator=generator))
        value = self._step(point, indices, key)
        self.count += 1
        return value

    def _full(self, point: Point, key: int) -> Tensor:
        return self.gradient(point, torch.arange(self.size), key)

    def _keep(self, point: Point, value: Tensor) -> Tensor:
        self._last, self._value = tuple(t.clone() for t in point), value
        return value

    def _sgd(self, point: Point, indices: Tensor, key: int) -> Tensor:
        return self.gradient(point, indices, key)

    def _svrg(self, point: Point, indices: Tensor, key: int) -> Tensor:
        if self.count % self.period == 0:
            return self._keep(point, self._full(point, key))
        assert self._last is not None
        assert self._value is not None
        return self.gradient(point, indices, key) - self.gradient(self._last, indices, key) + self._value

    def _spider(self, point: Point, indices: Tensor, key: int) -> Tensor:
        if self.count % self.period == 0:
            return self._keep(point, self._full(point, key))
        assert self._last is not None
        assert self._value is not None
        step = self.gradient(point, indices, key) - self.gradient(self._last, indices, key)
        return self._keep(point, step + self._value)

    def _storm(self, point: Point, indices: Tensor, key: int) -> Tensor:
        value = self.gradient(point, indices, key)
        if self._last is not None and self._value is not None and self.rho < 1:
            value = value + (1 - self.rho) * (self._value - self.gradient(self._last, indices, key))
        return self._keep(point, value)

    def _finite(self, point: Point, indices: Tensor, key: int) -> Tensor:
        now = self.gradient(point, indices, key)
        if self._last is None or self._value is None or self._mean is None:
            self._mean, value = torch.zeros_like(now), now
        else:
            before = self.gradient(self._last, indices, key)
            old = self._table.get(self._chosen, torch.zeros_like(now))
            value = now - before + (1 - self.rho) * self._value + self.rho * (before - old + self._mean)
        share = len(indices) / self.size
        assert self._mean is not None
        self._mean = self._mean + share * (now - self._table.get(self._chosen, torch.zeros_like(now)))
        self._table[self._chosen] = now
        return self._keep(point, value)

    def _saga(self, point: Point, indices: Tensor, key: int) -> Tensor:
        now = self.gradient(point, indices, key)
        if self._mean is None:
            self._mean = torch.zeros_like(now)
        change = now - self._table.get(self._chosen, torch.zeros_like(now))
        value = change + self._mean
        self._mean = self._mean + len(indices) / self.size * change
        self._table[self._chosen] = now
        return value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "count": self.count,
            "last": self._last,
            "value": self._value,
            "table": dict(self._table),
            "mean": self._mean,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.count = state["count"]
        self._last = None if state["last"] is None else tuple(state["last"])
        self._value, self._table, self._mean = state["value"], dict(state["table"]), state["mean"]
