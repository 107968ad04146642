"""Which samples each worker or client has: a training set shared out, and a test set shared out to match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._checks import check_number, check_whole

PARTITIONS = ("iid", "dirichlet", "label", "shards", "source")

_DRAWS = 1000  # of one that leaves a worker with too few samples
_LEAST = 10  # samples of a worker
_EQUAL = 1e12  # an alpha from which on all shares are equal; sums of larger ones overflow


def partition(
    targets: Tensor,
    workers: int,
    how: str = "iid",
    *,
    alpha: float = 0.5,
    balance: bool = False,
    shards: int = 2,
    sources: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Positions of each worker's samples; together all of them, each once, and none empty.

    Args:
        targets: int64 ``[n]``, classes; any integers will do.
        workers: number of workers or clients, at most n.
        how: ``iid``: at random, sizes equal to within one; ``dirichlet``: each class is shared out in proportions drawn
            from Dirichlet(alpha), anew until every worker has 10 samples, or n // workers if that is less; ``label``:
            sorted by class and cut in equal pieces; ``shards``: sorted by class, cut in ``shards`` pieces a worker, and
            these dealt at random (McMahan et al. 2017); ``source``: whole sources, the largest first, each to the
            worker that has least.
        alpha: of ``dirichlet``, a finite number above 0; the smaller, the more unequal.
        balance: of ``dirichlet``: a worker that has its equal share, n / workers samples, gets nothing of the classes
            that are shared out after that. This is the scheme of NIID-Bench, CCVR and DWNP's code.
        shards: of ``shards``: pieces that each worker gets, and so about the most classes that it sees.
        sources: int64 ``[n]``, for ``source``.
        seed: of the draws.

    Returns:
        For each worker int64 ``[n_k]``, ascending.

    Raises:
        ValueError: an unknown ``how``, a number out of range, or no Dirichlet draw gave every worker enough.
    """
    n = len(targets)
    if how not in PARTITIONS:
        raise ValueError(f"partition={how!r} is not known; allowed: {', '.join(PARTITIONS)}")
    check_whole("workers", workers, 1)
    check_whole("seed", seed, 0)
    if workers > n:
        raise ValueError(f"workers={workers} is not allowed; expected 1 to {n}, the number of samples")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    if how == "iid":
        return [part.sort().values for part in order.tensor_split(workers)]
    if how == "source":
        return _by_source(sources, n, workers)
    if how == "dirichlet":
        return _dirichlet(targets, order, workers, alpha, balance, seed)
    by_class = order[torch.argsort(targets[order], stable=True)]
    if how == "label":
        return [part.sort().values for part in by_class.tensor_split(workers)]
    check_whole("shards", shards, 1)
    if shards > n // workers:
        raise ValueError(f"shards={shards} is not allowed; expected 1 to {n // workers}, the samples of a worker")
    pieces = by_class.tensor_split(workers * shards)
    dealt = torch.randperm(len(pieces), generator=generator).view(workers, shards)
    return [torch.cat([pieces[i] for i in hand]).sort().values for hand in dealt.tolist()]


def _dirichlet(targets: Tensor, order: Tensor, workers: int, alpha: float, balance: bool, seed: int) -> list[Tensor]:
    check_number("alpha", alpha, without_least=True)
    n = len(targets)
    least = min(_LEAST, n // workers)
    random = np.random.default_rng(seed)
    members = [order[targets[order] == label] for label in targets.unique()]
    for _ in range(_DRAWS):
        parts: list[list[Tensor]] = [[] for _ in range(workers)]
        held = np.zeros(workers)
        for of_class in members:
            share = random.dirichlet([min(alpha, _EQUAL)] * workers)
            if balance:
                hungry = held < n / workers  # never none, while samples are left
                share = share * hungry if (share * hungry).sum() > 0 else hungry.astype(float)
                share = share / share.sum()
            for k, piece in enumerate(_cut(of_class, share)):
                parts[k].append(piece)
                held[k] += len(piece)
        if held.min() >= least:
            return [torch.cat(part).sort().values for part in parts]
    raise ValueError(
        f"partition='dirichlet': with {alpha=} no draw of {_DRAWS} gave each of {workers} workers {least} samples"
    )


def _cut(members: Tensor, share: np.ndarray) -> list[Tensor]:
    """``members`` in consecutive pieces whose sizes are as ``share``, which sums to one."""
    ends = np.round(np.cumsum(share) * len(members)).astype(int)[:-1]
    return list(members.tensor_split(ends.tolist()))


def _by_source(sources: Tensor | None, n: int, workers: int) -> list[Tensor]:
    if sources is None:
        raise ValueError("partition='source': this data set does not say where its samples come from")
    if len(sources) != n:
        raise ValueError(f"sources has {len(sources)} entries; expected {n}, one for each sample")
    names, counts = sources.unique(return_counts=True)
    if len(names) < workers:
        raise ValueError(f"partition='source': {len(names)} sources are not enough for {workers} workers")
    share, load = {}, [0] * workers
    for i in torch.argsort(counts, descending=True, stable=True).tolist():
        worker = load.index(min(load))
        share[int(names[i])] = worker
        load[worker] += int(counts[i])
    owner = torch.tensor([share[int(source)] for source in sources])
    return [(owner == k).nonzero().flatten() for k in range(workers)]


def matching_partition(targets: Tensor, parts: Sequence[Tensor], others: Tensor, seed: int = 0) -> list[Tensor]:
    """Share out other samples, those of the test, in the proportions that ``parts`` have in each class.

    A worker with a third of the training samples of a class gets a third of its test samples, to within one sample. So
    it is tested on what it was trained on, whatever the partition; one that has few samples may get no test samples.

    DWNP's code draws the proportions once and applies its balance rule to each set by itself, which makes the two
    differ; these are those of the training set as they came out. A class that is in ``others`` only is shared out by
    the workers' sizes.

    Args:
        targets: int64 ``[n]``, classes of the training samples.
        parts: positions of each worker's training samples.
        others: int64 ``[m]``, classes of the samples to share out.
        seed: of the order in which each class is cut.

    Returns:
        For each worker int64 positions in ``others``, ascending; together all of them, each once.
    """
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    sizes = np.array([len(part) for part in parts], dtype=float)
    pieces: list[list[Tensor]] = [[] for _ in parts]
    for label in others.unique():
        counts = np.array([int((targets[part] == label).sum()) for part in parts], dtype=float)
        share = counts if counts.sum() else sizes
        for part, piece in zip(pieces, _cut(order[others[order] == label], share / share.sum()), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in pieces]
