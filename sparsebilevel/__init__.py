"""sparsebilevel: train neural networks whose sparsity mask is learned."""

from importlib.util import find_spec

if find_spec("sparsebilevel.kernels") is None:
    raise ImportError(
        f"this is the source tree of sparsebilevel ({__path__[0]}), which hides the installed package. Start Python in "
        "another folder, use the command `sparsebilevel` (under torchrun: --no-python sparsebilevel), or install with "
        "`pip install --no-build-isolation -e .`"
    )

# ruff: noqa: E402
from . import optim
from .layout import optimize_for_cpu
from .masks import NM, Block, Channel, Filter, Pattern, Unstructured
from .methods import HYDRA, IMP, METHODS, OMP, SET, BiDST, BiP, RigL, Sparsifier, Static
from .nn import SparseMaskedConv2d, SparseMaskedLinear, densify, sparse_layers, sparsify

__version__ = "0.1.0"

__all__ = [
    "HYDRA",
    "IMP",
    "METHODS",
    "NM",
    "OMP",
    "SET",
    "BiDST",
    "BiP",
    "Block",
    "Channel",
    "Filter",
    "Pattern",
    "RigL",
    "SparseMaskedConv2d",
    "SparseMaskedLinear",
    "Sparsifier",
    "Static",
    "Unstructured",
    "densify",
    "optim",
    "optimize_for_cpu",
    "sparse_layers",
    "sparsify",
]
