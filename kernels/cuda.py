"""The CUDA kernels (csrc/cuda): loads their library at the first call, and launches them on torch's current stream.

Loading needs no driver. ``SPARSEBILEVEL_CUDA=0`` keeps the library unloaded; pure PyTorch takes its place.

No function waits for the device, and what one allocates comes from torch: all can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gpu, native

DEVICES = frozenset({"cuda"})
"""Types of devices that the kernels run on. The tests have them emulated on the CPU."""
SHORT_ROW = 16
"""The longest slices that the kernel can step over what lies inside of, as ``kShortRow`` in csrc/cuda/binarize.cu."""
_CHUNK = 1024
SCORE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def load() -> tuple[Any, str]:
    """The library, or None; and ``"loaded"``, or why not."""
    if not native.is_on("SPARSEBILEVEL_CUDA", os.environ.get("SPARSEBILEVEL_CUDA", "")):
        return None, "switched off by SPARSEBILEVEL_CUDA=0"
    package = __name__.partition(".")[0]
    folder = Path(str(__import__(package).__file__)).parent
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_cuda{suffix}").exists()]
    if not paths:
        return None, "it was not built"
    try:
        return declare(ctypes.CDLL(str(paths[0]))), "loaded"
    except (OSError, AttributeError) as error:  # or it is of another version
        return None, f"it does not load ({error})"


def declare(library: Any) -> Any:
    """Tells ctypes the types of the functions."""
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for name, result, *arguments in (
        ("binarize_workspace", size, size, size),
        ("binarize", number, pointer, size, number, pointer, size, pointer, pointer, pointer),
        ("binarize_rows", number, pointer, size, size, size, number, pointer, size, pointer, pointer, pointer),
        ("mask_words", number, pointer, size, pointer, pointer, pointer, pointer),
        ("occupied_tiles", number, pointer, size, size, size, size, pointer, pointer),
        ("gather_values", number, pointer, number, pointer, pointer, size, pointer, pointer),
        ("scatter_values", number, pointer, number, pointer, pointer, size, pointer, number, pointer),
        ("accumulate_values", number, pointer, number, real, pointer, pointer, size, pointer, pointer),
        ("block_matmul", number, *[pointer] * 3, number, *[pointer] * 5, number, *[size] * 3, *[number] * 4, pointer),
        ("weight_grad", number, *[pointer] * 7, *[number] * 6, pointer),
        ("error_text", ctypes.c_char_p, number),
    ):
        function = getattr(library, f"sparsebilevel_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: NVIDIA's from compute capability 8.0 on."""
    is_known = device.type != "cuda" or gpu.capability(device) >= (8, 0)
    return device.type in DEVICES and is_known and load()[0] is not None


def launch(name: str, device: torch.device, *arguments: Any) -> None:
    with gpu.on_device(device):
        error = getattr(load()[0], f"sparsebilevel_{name}")(*arguments, gpu.stream_id(device))
    if error:
        raise RuntimeError(f"CUDA kernel {name}: {load()[0].sparsebilevel_error_text(error).decode()}")


def _on_device(k: int | Tensor, device: torch.device) -> tuple[Tensor | None, int]:
    """k as the kernels take it: a tensor on the device, which the caller keeps, or a number."""
    return (k.to(device, torch.int64), 0) if isinstance(k, Tensor) else (None, k)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def takes(dtype: torch.dtype, size: int) -> bool:
    """Whether scores can be ranked: their type, and how many there are."""
    return dtype in SCORE_TYPES and size < 1 << 32


def binarize(scores: Sequence[Tensor], outs: Sequence[Sequence[Tensor]], k: int | Tensor) -> Tensor:
    """The ``k`` largest of all scores together.

    Args:
        scores: contiguous tensors of one type on one device, which :func:`takes`.
        outs: written to, for each tensor the parts of a ``BinaryMask`` or its mask only, contiguous; masks start at
            multiples of 16 bytes.
        k: a number, or a tensor of one, read on the device.

    Returns:
        int32 ``[len(scores) + 2]``: NaNs of each tensor; whether k is out of range; whether there was no error.
    """
    device, count = scores[0].device, len(scores)
    sizes = [s.numel() for s in scores]
    for size, (_, *parts) in zip(sizes, outs, strict=True):
        if parts and not size:
            parts[1].zero_()
    if not any(sizes):
        errors = torch.zeros(count + 2, dtype=torch.int32, device=device)
        errors[-1:].fill_(1)
        return errors
    errors = torch.empty(count + 2, dtype=torch.int32, device=device)
    chunks = [-(-size // _CHUNK) for size in sizes]
    needed = load()[0].sparsebilevel_binarize_workspace(count, sum(chunks))
    # Words and counts that nobody wants come after it: an allocation each would take longer than the kernels.
    wanted = len(outs[0]) > 1
    unwanted = 0 if wanted else sum(chunks) * (_CHUNK // 8 + 8) + 8 * count
    workspace = torch.empty(needed + unwanted, dtype=torch.uint8, device=device)
    values: list[int] = []
    at = workspace.data_ptr() + needed
    for s, size, out, n in zip(scores, sizes, outs, chunks, strict=True):
        if wanted:
            mask, words, counts = (part.data_ptr() for part in out)
        else:
            mask, words, counts = out[0].data_ptr(), at, at + n * _CHUNK // 8
            at = counts + 8 * (n + 1)
        values += (s.data_ptr(), mask, words, counts, size)
    table = (ctypes.c_int64 * len(values))(*values)
    held, number = _on_device(k, device)
    what = (table, count, SCORE_TYPES[scores[0].dtype], _address(held), number)
    launch("binarize", device, *what, workspace.data_ptr(), errors.data_ptr())
    return errors


def binarize_rows(scores: Tensor, outer: int, length: int, inner: int, mask: Tensor, k: int | Tensor) -> Tensor:
    """The ``k`` largest along the middle dimension of contiguous scores ``[outer, length, inner]``; writes ``mask``.

    ``inner`` is 1, or ``length`` at most :data:`SHORT_ROW`.

    Returns:
        int32 ``[3]``: NaNs; whether k is out of range; whether there was no error.
    """
    errors = torch.empty(3, dtype=torch.int32, device=scores.device)
    if scores.numel():
        held, number = _on_device(k, scores.device)
        shape = (outer, length, inner, SCORE_TYPES[scores.dtype])
        arguments = (scores.data_ptr(), *shape, _address(held), number, mask.data_ptr(), errors.data_ptr())
        launch("binarize_rows", scores.device, *arguments)
    else:
        errors.zero_()
        errors[2:].fill_(1)
    return errors


def mask_words(mask: Tensor, words: Tensor, counts: Tensor) -> None:
    """Writes words and counts, as in ``BinaryMask``, of a contiguous mask of fewer than 2^32 positions."""
    _mask_words(mask.data_ptr(), mask.numel(), words, counts)


def count_words(words: Tensor, size: int) -> Tensor:
    """The counts that belong to the words of a mask of ``size`` positions, fewer than 2^32."""
    counts = torch.empty(-(-size // _CHUNK) + 1, dtype=torch.int64, device=words.device)
    _mask_words(None, size, words, counts)
    return counts


def _mask_words(mask: int | None, size: int, words: Tensor, counts: Tensor) -> None:
    if not size:
        counts.zero_()
        return
    workspace = torch.empty(8 * counts.numel() + 64, dtype=torch.uint8, device=words.device)
    launch("mask_words", words.device, mask, size, words.data_ptr(), counts.data_ptr(), workspace.data_ptr())


def occupied_tiles(words: Tensor, height: int, width: int, rows: int, cols: int, tiles: Tensor) -> None:
    """Which tiles of a mask ``[height, width]`` hold a True, as ``BinaryMask.tiles``; writes contiguous ``tiles``."""
    if tiles.numel():
        launch("occupied_tiles", words.device, words.data_ptr(), height, width, rows, cols, tiles.data_ptr())


def gather_values(dense: Tensor, words: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """Writes ``values [count]``, those of ``dense`` at the positions of a mask in row-major order, and returns them.

    Args:
        dense: contiguous, of elements of 1, 2, 4 or 8 bytes.
        words, counts: those of the mask, see ``BinaryMask``.
        values: contiguous, of the dtype of ``dense``, as long as the mask has positions (``counts[-1]``, which a caller
            of a mask that stays knows without asking the device).
    """
    if dense.numel():
        where = (words.data_ptr(), counts.data_ptr(), dense.numel(), values.data_ptr())
        launch("gather_values", dense.device, dense.data_ptr(), dense.itemsize, *where)
    return values


def scatter_values(values: Tensor, words: Tensor, counts: Tensor, dense: Tensor, *, keep: bool = False) -> Tensor:
    """The inverse of :func:`gather_values`: writes ``dense``, with zeros elsewhere unless these are to be kept."""
    if dense.numel():
        where = (words.data_ptr(), counts.data_ptr(), dense.numel(), dense.data_ptr(), keep)
        launch("scatter_values", dense.device, values.data_ptr(), dense.itemsize, *where)
        torch.autograd.graph.increment_version(dense)
    return dense


def accumulate_values(values: Tensor, words: Tensor, counts: Tensor, dense: Tensor, alpha: float = 1.0) -> Tensor:
    """Adds ``alpha * values`` to ``dense`` at the positions: both float16, bfloat16 or float32; rounded once."""
    if dense.numel():
        where = (words.data_ptr(), counts.data_ptr(), dense.numel(), dense.data_ptr())
        launch("accumulate_values", dense.device, values.data_ptr(), SCORE_TYPES[dense.dtype], alpha, *where)
        torch.autograd.graph.increment_version(dense)
    return dense
