"""The ops behind the layers: reference, native and Triton kernels, and the choice between them.

One operation has one stem: ``binarize`` lives in ``kernels/binarize.py``, ``csrc/cpu/binarize.cpp`` and
``tests/test_binarize.py``. This package imports nothing else of ``sparsebilevel``.
"""

from .apply_mask import apply_mask
from .batch_norm import batch_norm
from .binarize import BinaryMask, binarize
from .dispatch import BACKENDS, PASSES, Backend, choose_backend, describe
from .gradient import make_grad_sink
from .masked_conv2d import masked_conv2d
from .masked_linear import masked_linear
from .pack import PackError, pack, unpack
from .plans import release_memory
from .split_gradient import split_gradient

__all__ = [
    "BACKENDS",
    "PASSES",
    "Backend",
    "BinaryMask",
    "PackError",
    "apply_mask",
    "batch_norm",
    "binarize",
    "choose_backend",
    "describe",
    "make_grad_sink",
    "masked_conv2d",
    "masked_linear",
    "pack",
    "release_memory",
    "split_gradient",
    "unpack",
]
