"""Who talks to whom, and with what weights.

A mixing matrix ``W`` is float64 ``[K, K]``, symmetric and doubly stochastic, with ``W[k, j] > 0`` only where workers k
and j share an edge. Repeated mixing brings all workers to their mean if all its eigenvalues but the first are below 1
in magnitude; the *spectral gap* is what is missing to 1. A connected graph is not enough for that: where it is
bipartite and nobody gives weight to its own value, -1 is an eigenvalue, and a disagreement only changes its sign.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_whole

GRAPHS = ("ring", "path", "torus", "complete", "star", "exponential", "one-peer", "erdos-renyi", "file")
WEIGHTS = ("metropolis", "lazy")

Edge = tuple[int, int]


def make_graph(name: str, size: int, *, probability: float = 0.5, seed: int = 0, path: str | None = None) -> Tensor:
    """Adjacency of a graph, bool ``[size, size]``, symmetric, without loops. (For ``one-peer``, that of all rounds.)

    Args:
        name: one of `GRAPHS`. ``torus`` is the squarest grid that has ``size`` nodes, with wrapped ends; in
            ``exponential`` k is joined to k ± 1, 2, 4, ...
        size: number of workers, at least 1.
        probability: of an edge of ``erdos-renyi``, which is drawn again until it is connected.
        seed: of ``erdos-renyi``.
        path: of ``file``: JSON, a list of edges ``[[0, 1], ...]``.

    Raises:
        ValueError: an unknown name, a size that the graph cannot have, a path for another graph than ``file``, or a
            graph that is not connected.
    """
    check_whole("size", size, 1)
    if name not in GRAPHS:
        raise ValueError(f"graph={name!r} is not known; allowed: {', '.join(GRAPHS)}")
    if name != "file" and path is not None:
        raise ValueError(f"graph={name!r} reads no edges from {path!r}; expected graph='file'")
    if name == "file":
        if path is None:
            raise ValueError("graph='file' needs the path of a file with edges")
        edges = _read_edges(path, size)
    elif name == "erdos-renyi":
        return _erdos_renyi(size, probability, seed)
    else:
        makers: dict[str, Callable[[int], list[Edge]]] = {
            "ring": lambda n: [(k, (k + 1) % n) for k in range(n)],
            "path": lambda n: [(k, k + 1) for k in range(n - 1)],
            "torus": _torus,
            "complete": lambda n: [(i, j) for i in range(n) for j in range(i)],
            "star": lambda n: [(0, k) for k in range(1, n)],
            "exponential": lambda n: [(k, (k + 2**p) % n) for k in range(n) for p in range((n - 1).bit_length())],
            "one-peer": lambda n: [edge for matching in _matchings(n) for edge in matching],
        }
        edges = makers[name](size)
    adjacency = _adjacency(edges, size)
    check_connected(adjacency, name)
    return adjacency


def _adjacency(edges: Sequence[Edge], size: int) -> Tensor:
    adjacency = torch.zeros(size, size, dtype=torch.bool)
    for i, j in edges:
        if i != j:
            adjacency[i, j] = adjacency[j, i] = True
    return adjacency


def _torus(size: int) -> list[Edge]:
    rows = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    columns = size // rows
    at = [[r * columns + c for c in range(columns)] for r in range(rows)]
    right = [(at[r][c], at[r][(c + 1) % columns]) for r in range(rows) for c in range(columns)]
    return right + [(at[r][c], at[(r + 1) % rows][c]) for r in range(rows) for c in range(columns)]


def _matchings(size: int) -> list[list[Edge]]:
    """In round p worker k meets the one whose number differs in bit p; after log2(size) rounds all have the mean."""
    if size & (size - 1):
        raise ValueError(f"graph='one-peer' needs a power of two of workers, got {size}")
    return [[(k, k ^ (1 << p)) for k in range(size) if k < k ^ (1 << p)] for p in range(size.bit_length() - 1)]


def _erdos_renyi(size: int, probability: float, seed: int) -> Tensor:
    check_number("probability", probability, most=1, without_least=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        upper = (torch.rand(size, size, generator=generator) < probability).triu(1)
        if is_connected(upper | upper.T):
            return upper | upper.T
    raise ValueError(f"graph='erdos-renyi': no connected graph of {size} workers in 1000 draws at {probability=}")


def _read_edges(path: str, size: int) -> list[Edge]:
    try:
        edges = [(operator.index(i), operator.index(j)) for i, j in json.loads(Path(path).read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of edges such as [[0, 1], [1, 2]]: {error}") from None
    for edge in edges:
        if not all(0 <= k < size for k in edge):
            raise ValueError(f"{path}: edge {list(edge)} names a worker outside 0..{size - 1}")
    return edges


def is_connected(adjacency: Tensor) -> bool:
    """Whether every worker can be reached from worker 0."""
    reached = torch.zeros(len(adjacency), dtype=torch.bool)
    reached[0] = True
    for _ in range(len(adjacency)):
        reached = reached | adjacency[reached].any(0)
    return bool(reached.all())


def check_connected(adjacency: Tensor, name: str = "graph") -> None:
    """Raise ValueError if the graph falls apart."""
    if not is_connected(adjacency):
        raise ValueError(f"{name}: the graph of {len(adjacency)} workers is not connected, so that they cannot agree")


def mixing_matrix(adjacency: Tensor, weights: str = "metropolis") -> Tensor:
    """Metropolis weights ``1 / (1 + max(degrees))``, or half of them and half of one's own value (``lazy``)."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not known; allowed: {', '.join(WEIGHTS)}")
    degree = adjacency.sum(1).double()
    matrix = torch.where(adjacency, 1 / (1 + torch.maximum(degree[:, None], degree[None, :])), 0.0)
    matrix += torch.diag(1 - matrix.sum(1))
    return (matrix + torch.eye(len(matrix), dtype=torch.float64)) / 2 if weights == "lazy" else matrix


def check_mixing_matrix(matrix: Tensor, adjacency: Tensor | None = None) -> Tensor:
    """``matrix`` as float64, if it is symmetric, doubly stochastic, non-negative, connected and fits the graph.

    Raises:
        ValueError: it is not; the message says where.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"mixing matrix: expected [K, K], got {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
        raise ValueError("mixing matrix: entries must be finite and not negative")
    gap = (matrix - matrix.T).abs().max().item()
    if gap > 1e-9:
        raise ValueError(f"mixing matrix: not symmetric (by up to {gap:.3g})")
    sums = (matrix.sum(1) - 1).abs()
    if sums.max() > 1e-6:
        raise ValueError(f"mixing matrix: row {int(sums.argmax())} sums to {matrix.sum(1)[sums.argmax()]:.9g}, not 1")
    off = matrix.clone().fill_diagonal_(0) > 0
    if adjacency is not None and bool((off & ~adjacency).any()):
        raise ValueError(f"mixing matrix: {(off & ~adjacency).nonzero()[0].tolist()} is not an edge of the graph")
    return matrix


class Topology:
    """Mixing matrices, used in turn.

    Args:
        matrices: one, or several for a graph that changes; the graph of all together must be connected.

    Attributes:
        size: number of workers.
        second_eigenvalue: the most that is left of a disagreement after one mixing; of several matrices the geometric
            mean over a turn.
        gap: the spectral gap, 1 - ``second_eigenvalue``; 0.195262 for a ring of 8.

    Raises:
        ValueError: a matrix that is not symmetric and doubly stochastic, a graph that is not connected, or matrices
            without a spectral gap.
    """

    def __init__(self, matrices: Tensor | Sequence[Tensor]) -> None:
        given: list[Any] = [matrices] if getattr(matrices, "ndim", 0) == 2 else list(matrices)  # NumPy's arrays too
        if not given:
            raise ValueError("matrices is empty; expected at least one mixing matrix")
        self.matrices = [check_mixing_matrix(matrix) for matrix in given]
        if len({len(matrix) for matrix in self.matrices}) > 1:
            raise ValueError("matrices: all must have the same size")
        self.size = len(self.matrices[0])
        self.adjacency = torch.stack([m > 0 for m in self.matrices]).any(0).fill_diagonal_(False)
        check_connected(self.adjacency, "mixing matrices")
        turn = self.matrices[0]
        for matrix in self.matrices[1:]:
            turn = matrix @ turn
        # The second singular value is what is left of a disagreement after a turn, symmetric or not.
        left = torch.linalg.matrix_norm(turn - 1 / self.size, 2).item() if self.size > 1 else 0.0
        self.second_eigenvalue = min(left, 1.0) ** (1 / len(given)) if left > 1e-12 else 0.0
        self.gap = 1 - self.second_eigenvalue
        if self.gap < 1e-9:
            raise ValueError(
                f"matrices have a spectral gap of {self.gap:.1e}; expected at least 1e-9: a disagreement can be as "
                "large as before after every turn, so that the workers never agree; use lazy weights, (W + I) / 2"
            )
        self._rows = [[{j: m[k, j].item() for j in range(self.size) if j != k and m[k, j] > 0}
                       for k in range(self.size)] for m in self.matrices]  # fmt: skip

    def weights(self, worker: int, step: int) -> dict[int, float]:
        """``{neighbour: weight}`` at the given step; the rest to 1 is the worker's own."""
        return self._rows[step % len(self._rows)][worker]

    def edges(self) -> list[Edge]:
        """All pairs that ever exchange anything."""
        return [(i, j) for i, j in self.adjacency.nonzero().tolist() if i < j]


def make_topology(
    name: str,
    size: int,
    weights: str = "metropolis",
    *,
    probability: float = 0.5,
    seed: int = 0,
    path: str | None = None,
    matrix: Tensor | None = None,
) -> Topology:
    """The graph `make_graph` with the weights `mixing_matrix`, or with ``matrix``, which must fit it."""
    adjacency = make_graph(name, size, probability=probability, seed=seed, path=path)
    if name == "one-peer" and matrix is None:
        steps = [_adjacency(matching, size) for matching in _matchings(size)] or [adjacency]
        return Topology([mixing_matrix(step, weights) for step in steps])
    return Topology(mixing_matrix(adjacency, weights) if matrix is None else check_mixing_matrix(matrix, adjacency))
