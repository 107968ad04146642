"""How many weights each layer keeps (distributions), and when topologies change (schedules).

Every distribution ends in exact integer counts. ``erk`` reproduces the densities of Evci et al. 2020 (RigL, appendix);
``er`` is the Erdos-Renyi rule of Mocanu et al. 2018.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

from .masks import NM, Channel, Filter, Pattern, Unstructured, check_sparsity

T = TypeVar("T")

DISTRIBUTIONS = ("uniform", "er", "erk", "global")


def erdos_renyi_densities(
    shapes: Mapping[str, Sequence[int]], sparsity: float | Fraction, *, kernel: bool = True
) -> tuple[dict[str, Fraction], float]:
    """Exact layer densities ``min(1, eps * raw)`` that keep ``(1 - sparsity)`` of all weights together, and ``eps``.

    ``raw`` is (sum of sizes) / (product of sizes) over all dimensions (``kernel=True``, ERK) or over the first two only
    (ER). Layers that would exceed density 1 are made dense, all of those attaining the maximum at once, and ``eps`` is
    solved again for the rest (Evci et al. 2020).
    """
    density = 1 - check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {}
    for name, shape in shapes.items():
        dims = shape if kernel else shape[:2]
        raw[name] = Fraction(sum(dims), math.prod(dims))
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        if not free:
            return dict.fromkeys(shapes, Fraction(1)), math.inf
        budget = density * sum(sizes[n] for n in free) - (1 - density) * sum(sizes[n] for n in dense)
        eps = budget / sum(raw[n] * sizes[n] for n in free)
        largest = max(raw[n] for n in free)
        if eps * largest <= 1:
            return {n: Fraction(1) if n in dense else eps * raw[n] for n in shapes}, float(eps)
        dense |= {n for n in free if raw[n] == largest}


def layer_counts(
    shapes: Mapping[str, Sequence[int]],
    sparsity: float | Mapping[str, float],
    distribution: str = "uniform",
    pattern: Pattern | Mapping[str, Pattern] | None = None,
    dense_layers: Collection[str] = (),
) -> dict[str, int]:
    """Groups of its pattern that each layer keeps.

    Args:
        shapes: layer name -> weight shape, in model order.
        sparsity: target over all layers, or values by layer name or glob pattern, of which the first that fits holds:
            ``{"fc": 0, "layer1.*": 0.8, "*": 0.9}`` (then ``distribution`` has nothing to share out).
        distribution: ``uniform`` (every layer the same, no re-balancing for dense ones), ``er``, ``erk``, or ``global``
            (one ranking over all layers of a pattern: the counts returned are only a starting point, their sum is
            exact).
        pattern: unstructured if None; or patterns by layer, in the form of ``sparsity``. ``NM`` fixes its own counts,
            whatever the target, and stands outside of it.
        dense_layers: layers kept dense, e.g. the first one, as the literature does with ``uniform``. They stand outside
            the target: the others are not made sparser for their sake.

    Returns:
        layer name -> number of groups kept, each at least 1. With ``er``, ``erk`` and ``global`` the fractions are
        rounded so that the sum over the layers of a pattern is exact, unless it asks for multiples: then each layer's
        is the nearest.

    Raises:
        ValueError: unknown distribution, names or patterns that no layer has, layers without a value, sparsity outside
            [0, 1) or too high to leave each layer one group.
    """
    _check_names("dense_layers", dense_layers, shapes)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r} is not known; allowed: {', '.join(DISTRIBUTIONS)}")
    patterns = layer_patterns(pattern or Unstructured(), shapes, dense_layers)
    groups = {name: _num_groups(name, shape, patterns.get(name), dense_layers) for name, shape in shapes.items()}
    densities: dict[str, Fraction]
    if isinstance(sparsity, Mapping):
        by_name = {name: 1 - check_sparsity(value, f"sparsity[{name!r}]") for name, value in sparsity.items()}
        densities = first_that_fits("sparsity", by_name, shapes, dense_layers, default="0.9")
        distribution = "uniform"
    elif distribution in ("er", "erk"):
        shared = {n: shapes[n] for n in shapes if n not in dense_layers and not isinstance(patterns[n], NM)}
        densities, _ = erdos_renyi_densities(shared, sparsity, kernel=distribution == "erk")
    else:
        densities = dict.fromkeys(shapes, 1 - check_sparsity(sparsity))
    free = [name for name in shapes if name not in dense_layers]
    densities |= {name: 1 - p.sparsity for name in free if isinstance(p := patterns[name], NM)}

    counts = {name: groups[name] for name in dense_layers}
    for p in dict.fromkeys(patterns[name] for name in free):
        wanted = {name: groups[name] * densities[name] for name in free if patterns[name] == p}
        if distribution == "global":
            p.check_ranking()
        multiples = isinstance(p, (Filter, Channel)) and p.multiple > 1
        if distribution == "uniform" or multiples or isinstance(p, NM):
            counts |= {name: p.round_count(count, groups[name]) for name, count in wanted.items()}
        else:
            counts |= _round_to_total(wanted, groups, round(sum(wanted.values())))
    return {name: counts[name] for name in shapes}


def layer_patterns(
    pattern: Pattern | Mapping[str, Pattern], layers: Collection[str], dense_layers: Collection[str] = ()
) -> dict[str, Pattern]:
    """Pattern of every layer; those of ``dense_layers`` need none."""
    if isinstance(pattern, Mapping):
        return first_that_fits("pattern", pattern, layers, dense_layers, default="'unstructured'")
    return dict.fromkeys(layers, pattern)


def first_that_fits(
    argument: str, values: Mapping[str, T], layers: Collection[str], optional: Collection[str], *, default: str
) -> dict[str, T]:
    """Layer name -> value of the first entry that fits it, for all layers but the optional ones.

    Args:
        argument: name of ``values``, for errors.
        values: by layer name or glob pattern; every entry must hold for some layer.
        default: a value for "*" that the error for a layer without one suggests.
    """
    found: dict[str, T] = {}
    for pattern, value in values.items():
        if not isinstance(pattern, str):
            raise ValueError(f"{argument} has {pattern!r}; expected names of layers or glob patterns of them")
        fitting = [name for name in layers if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"{argument} has {pattern!r}, which no layer matches; the layers are {list(layers)[:20]}")
        left = {name: value for name in fitting if name not in found}
        if not left and pattern != "*":  # a default may find nothing left
            raise ValueError(
                f"{argument} has {pattern!r} after entries that match its layers already; the first that fits holds, "
                "so that the special ones come before the general ones"
            )
        found |= left
    if missing := [name for name in layers if name not in found and name not in optional]:
        raise ValueError(
            f"{argument} has no value for {missing[:5]}; name them, or end with a default such as '*': {default}"
        )
    return found


def _num_groups(name: str, shape: Sequence[int], pattern: Pattern | None, dense_layers: Collection[str]) -> int:
    if pattern is None or (isinstance(pattern, NM) and name in dense_layers):
        return math.prod(shape)  # what stays dense need not fit
    try:
        return pattern.num_groups(shape)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}; exclude it, or keep it dense") from None


def _check_names(argument: str, names: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"{argument} names unknown layers {unknown[:5]}; the layers are {list(known)[:20]}")


def _round_to_total(wanted: Mapping[str, Fraction], limits: Mapping[str, int], total: int) -> dict[str, int]:
    """Largest-remainder rounding to a sum of exactly ``total``, each count between 1 and its limit."""
    counts = {n: min(limits[n], max(1, math.floor(w))) for n, w in wanted.items()}
    by_need = sorted(wanted, key=lambda n: counts[n] - wanted[n])  # the most under-served first; sort is stable
    while (short := total - sum(counts.values())) != 0:
        step = 1 if short > 0 else -1
        candidates = [n for n in (by_need if step > 0 else reversed(by_need)) if 1 <= counts[n] + step <= limits[n]]
        if not candidates:
            raise ValueError(
                f"sparsity is too high: it leaves {total} groups to {len(counts)} layers, which need one each"
            )
        for n in candidates[: abs(short)]:
            counts[n] += step
    return counts


@dataclasses.dataclass(frozen=True)
class UpdateSchedule:
    """When topologies change: at steps ``t`` with ``t % freq == 0`` and ``start <= t < end``.

    A change at the very last step would leave no step to train what has grown, hence the open end.

    Attributes:
        freq: optimizer steps between changes; 0 = never.
        start: first step at which a change may happen (step counts start at 1).
        end: first step at which none may happen any more; None = never ends.
    """

    freq: int = 0
    start: int = 1
    end: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.freq, numbers.Real) or not 0 <= self.freq < math.inf or self.freq % 1:
            raise ValueError(f"update_freq={self.freq!r} is not allowed; expected a whole number of steps, 0 = never")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"update_end={self.end} is not allowed; it is before update_start={self.start}")

    def is_due(self, step: int) -> bool:
        if not self.freq or step % self.freq or step < self.start:
            return False
        return self.end is None or step < self.end


def cosine_drop_fraction(step: int, end: int, initial: float) -> float:
    """``initial / 2 * (1 + cos(pi * step / end))``, 0 from ``end`` on (Evci et al. 2020, eq. 1)."""
    return 0.0 if step >= end else initial / 2 * (1 + math.cos(math.pi * step / end))
