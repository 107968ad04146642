"""Whether the Triton kernels run on a device, and how they are launched.

``SPARSEBILEVEL_TRITON=0`` keeps Triton unused: everything then runs on cuBLAS, cuDNN and torch's own kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .native import is_on

DEVICES = {"cuda"}
"""Types of devices that the kernels run on. The tests add the CPU, where Triton's interpreter takes them."""


_environment = getattr(os.environ, "_data", None) if os.name == "posix" else None


def setting(name: str, default: str = "") -> str:
    """An environment variable, as it is now.

    Layers ask for several at every call; ``os.environ`` takes a microsecond for each, what lies behind it a tenth.
    """
    if _environment is None:
        return os.environ.get(name, default)
    value = _environment.get(_encoded(name))
    return default if value is None else os.fsdecode(value)


_encoded = functools.cache(os.fsencode)


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: NVIDIA's from compute capability 8.0 on."""
    return device.type in DEVICES and is_on("SPARSEBILEVEL_TRITON", setting("SPARSEBILEVEL_TRITON")) and _runs(device)


@functools.cache
def _runs(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type != "cuda" or (torch.version.cuda is not None and capability(device) >= (8, 0))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_large_tiles(capability: tuple[int, int]) -> bool:
    """Whether tensor cores multiply large tiles out of 227 KiB of shared memory, to which the hardware copies them.

    Those of Hopper (9.x) and of Blackwell in data centres (10.x, 11.x) do; its other GPUs (12.x) are, to a kernel, like
    Ada's (8.9), with 99 KiB.
    """
    return (9, 0) <= capability < (12, 0)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied, in Triton's words: as torch's own products are told to."""
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where this was set
    return "tf32" if dtype == torch.float32 and is_tf32 else "ieee"


def fuses_exactly(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products that take the mask in Triton are as exact as asked for.

    For sm_100 and its like Triton 3.6 compiles those of float32 to products of TF32 even where "ieee" asks for others.
    """
    return dtype != torch.float32 or precision(dtype) == "tf32" or not (10, 0) <= capability(device) < (12, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has; some, of what is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def stream(device: torch.device) -> Any:
    """The current stream; None of what is no GPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def stream_id(device: torch.device) -> int:
    """The current stream as a number, which takes a tenth of the time of :func:`stream`; 0 of what is no GPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph, to run later on what the memory holds then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Shared(threading.local):
    made: dict[Any, Any] | None = None


_shared = _Shared()


@contextlib.contextmanager
def sharing(made: dict[Any, Any] | None) -> Iterator[None]:
    """Within, :func:`shared` is ``made``."""
    before, _shared.made = _shared.made, made
    try:
        yield
    finally:
        _shared.made = before


def shared() -> dict[Any, Any] | None:
    """What forward and backward of one layer share while a CUDA graph is captured, in which nothing else may be kept.

    Copies of the weight by their dtype, and lists of tiles; None elsewhere.
    """
    return _shared.made


def on_device(device: torch.device) -> Any:
    """Context in which kernels are launched on ``device``."""
    if device.type != "cuda":
        return _HERE
    if torch.cuda.is_current_stream_capturing():
        return _capturing_on(device)
    return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


_HERE = contextlib.nullcontext()


def launch(device: torch.device, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on ``device`` and its current stream, in less time on the host.

    Triton takes longer to find a compiled kernel than to launch it, so those found before are kept, under all that it
    compiles by: types, whether addresses and numbers are multiples of 16, the number 1, numbers beyond 32 bits.

    Args:
        kernel: what ``triton.jit`` made.
        arguments: those that a compiled kernel takes: tensors, numbers, None, descriptors.
        constants: those that it is compiled with, and options such as ``num_warps``.
    """
    kinds: list[Any] = [id(kernel), device.index, *constants, *constants.values()]
    for argument in arguments:  # in this place, since each launch comes by
        kind = type(argument)
        if kind in _TENSORS or isinstance(argument, torch.Tensor):
            kinds.append(argument.dtype)
            kinds.append(not argument.data_ptr() & 15)
        elif kind is int:
            kinds.append("one" if argument == 1 else not argument & 15)
            kinds.append(-(1 << 31) <= argument < 1 << 31)
        elif argument is None or kind is float:
            kinds.append(kind)
        else:  # a descriptor
            kinds.append((argument.base.dtype, *argument.block_shape))
    key = tuple(kinds)
    found = _launched.get(key)
    with on_device(device):
        if found is not None:
            compiled, values = found
            blocks = *grid, 1, 1
            compiled[blocks](*arguments, *values, stream=stream_id(device))
            return
        compiled = kernel[grid](*arguments, **constants)
    if compiled is not None and _is_known_triton():
        names = [param.name for param in kernel.params if param.is_constexpr]
        if len(arguments) + len(names) != len(kernel.params) or not constants.keys() >= set(names):
            raise TypeError(f"{kernel.__name__}: constants {', '.join(names)} must be keywords, arguments must not")
        _launched[key] = compiled, tuple(constants[name] for name in names)


_launched: dict[tuple, tuple[Any, tuple]] = {}  # compiled kernels and their constants
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})  # which isinstance takes longer for


@functools.cache
def _is_known_triton() -> bool:
    """Whether a compiled kernel is launched with constants among its arguments, as by ``jit`` itself."""
    import triton

    return (3, 4) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 10)


@contextlib.contextmanager
def _capturing_on(device: torch.device) -> Iterator[None]:
    """The same while a CUDA graph is captured: a kernel that was not launched before is loaded first.

    That could be a kernel which only graphs have. Captures refuse it to threads that do not ask for it.
    """
    mode, exchange = ctypes.c_int(_RELAXED), _exchange_capture_mode()
    with torch.cuda.device(device):
        exchange(ctypes.byref(mode))
        try:
            yield
        finally:
            exchange(ctypes.byref(mode))


_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _exchange_capture_mode() -> Any:
    """Swaps the mode of this thread, an int, for another."""
    return ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll").cuThreadExchangeStreamCaptureMode
