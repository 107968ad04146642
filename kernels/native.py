"""Loads the C++ extension, once, and says why where it cannot.

``SPARSEBILEVEL_NATIVE=0`` keeps it unloaded (pure PyTorch); ``SPARSEBILEVEL_CPU=scalar|avx2|avx512`` limits the
instruction set of its kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any

import torch  # Before the extension: both then share the OpenMP runtime that torch brings along.


@functools.cache
def is_on(name: str, value: str) -> bool:
    """Whether the value of an environment variable leaves on what it can switch off; empty is as if it were not set."""
    if value.lower() in ("", "1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r} is not known; allowed: 0, 1, false, true, no, yes, off, on")


def _load() -> tuple[Any, str]:
    if not is_on("SPARSEBILEVEL_NATIVE", os.environ.get("SPARSEBILEVEL_NATIVE", "")):
        return None, "switched off by SPARSEBILEVEL_NATIVE=0"
    try:
        module = importlib.import_module("sparsebilevel._C")
    except ImportError as error:
        reason = "it was not built" if isinstance(error, ModuleNotFoundError) else f"it does not load ({error})"
        warnings.warn(
            f"The C++ extension of sparsebilevel is missing: {reason}. Everything works on pure PyTorch, only the fast "
            "sparse CPU kernels are unavailable. To get them, install a C++ compiler such as g++ and run "
            "`pip install --force-reinstall --no-deps -v .` in the source tree; the output says what fails. "
            "SPARSEBILEVEL_NATIVE=0 silences this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason
    isa = os.environ.get("SPARSEBILEVEL_CPU")
    if isa:
        allowed = list(module.Isa.__members__)
        if isa not in allowed:
            raise ValueError(f"SPARSEBILEVEL_CPU={isa!r} is not known; allowed: {', '.join(allowed)}")
        module.set_isa(module.Isa.__members__[isa])
    return module, "loaded"


lib: Any
"""The extension module, or None."""
reason: str
"""``"loaded"``, or why `lib` is None."""

lib, reason = _load()


def available() -> bool:
    """Whether the C++ kernels can be called."""
    return lib is not None


def isa() -> str:
    """Instruction set that they use."""
    return lib.isa().name


PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Of tensors of other classes, fake ones among them, the memory is nobody else's to read."""


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is only marked as zero, as some gradients of torch are, or as negative, as a kernel can read it."""
    return tensor.clone() if tensor._is_zerotensor() or tensor.is_neg() else tensor


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor lies; 0 of none."""
    return 0 if tensor is None else tensor.data_ptr()


def watched() -> bool:
    """Whether somebody wants to see operators rather than what they do: compilers, tracers, transforms, modes."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
