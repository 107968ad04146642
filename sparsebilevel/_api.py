"""What `sparsebilevel` offers. The package loads it at first use: it needs torch, and help texts do not."""

from . import optim
from .distributed import SparseAllReduce
from .kernels import BinaryMask, PackError, pack, unpack
from .layout import optimize_for_cpu
from .masks import NM, Block, Channel, Filter, Pattern, Unstructured, binarize
from .methods import HYDRA, IMP, METHODS, OMP, SET, BiDST, BiP, RigL, Sparsifier, Static
from .nn import FusedBatchNorm2d, SparseMaskedConv2d, SparseMaskedLinear, densify, sparse_layers, sparsify
from .training.ema import EMA

__all__ = [
    "EMA",
    "HYDRA",
    "IMP",
    "METHODS",
    "NM",
    "OMP",
    "SET",
    "BiDST",
    "BiP",
    "BinaryMask",
    "Block",
    "Channel",
    "Filter",
    "FusedBatchNorm2d",
    "PackError",
    "Pattern",
    "RigL",
    "SparseAllReduce",
    "SparseMaskedConv2d",
    "SparseMaskedLinear",
    "Sparsifier",
    "Static",
    "Unstructured",
    "binarize",
    "densify",
    "optim",
    "optimize_for_cpu",
    "pack",
    "sparse_layers",
    "sparsify",
    "unpack",
]
