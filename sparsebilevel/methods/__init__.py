"""Methods: each a :class:`Sparsifier` beside the user's own loop."""

from .base import NotFiniteError, Sparsifier
from .bilevel import BiDST, BiP, hypergradient
from .dst import SET, RigL, Static
from .pruning import HYDRA, IMP, OMP

METHODS: dict[str, type[Sparsifier]] = {
    "static": Static,
    "set": SET,
    "rigl": RigL,
    "bidst": BiDST,
    "omp": OMP,
    "imp": IMP,
    "hydra": HYDRA,
    "bip": BiP,
}

__all__ = [
    "HYDRA",
    "IMP",
    "METHODS",
    "OMP",
    "SET",
    "BiDST",
    "BiP",
    "NotFiniteError",
    "RigL",
    "Sparsifier",
    "Static",
    "hypergradient",
]
