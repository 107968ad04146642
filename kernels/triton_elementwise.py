"""What touches every weight once a step, in Triton: many tensors in one launch, each element read and written once.

A launch walks a table of addresses in chunks of 1024 elements. Everything is computed in float32, which is exact for a
selection, and right in the interpreter, where bfloat16 has no arithmetic. Imported where it is needed, since it imports
Triton; callers are :mod:`.apply_mask`, :mod:`.split_gradient` and :mod:`.optimizer_step`.

No function waits for the device: a table comes from pinned memory, and is kept for the next step. While a
CUDA graph is captured there is none: a replay would read it from memory that is somebody else's by then. Then each
tensor has a launch of its own, and so has a single one always, which is faster.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu
from .gpu import launch

ROWS = 32
CHUNK = 32 * ROWS
"""Elements a program handles: as rows of 32, so that a row shares one word of a packed mask."""
# Four elements a thread, loads of 16 bytes of float32: with more a step of weights and scores has so many registers
# that too few threads fit, which takes 1.4 times as long (H200). A copy, which needs few, takes 1.1 times as long with
# four as with eight.
WARPS, WARPS_OF_COPY = 8, 4
_FIXED = {"ROWS": ROWS, "num_warps": WARPS}
_FIXED_OF_COPY = {"ROWS": ROWS, "num_warps": WARPS_OF_COPY}
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.bool: tl.int8,
    torch.int64: tl.int32,  # packed words, read by halves
}


@triton.jit
def _address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(TYPE)), ALIGN)


@triton.jit
def _at(first, ROWS: tl.constexpr):
    return first * (32 * ROWS) + tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _load(pointer, at, size, FULL: tl.constexpr):
    """A chunk as float32; where it is full there is no bounds mask, which would break up 16-byte loads."""
    if FULL:
        values = tl.load(pointer + at)
    else:
        values = tl.load(pointer + at, mask=at < size, other=0)
    return values.to(tl.float32)


@triton.jit
def _store(pointer, at, size, values, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + at, values.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + at, values.to(pointer.dtype.element_ty), mask=at < size)


@triton.jit
def _keep(mask, first, at, size, ROWS: tl.constexpr, FULL: tl.constexpr):
    """Where a mask is True: of a byte for each position, or of bits, the least significant first."""
    if mask.dtype.element_ty == tl.int8:
        if FULL:
            keep = tl.load(mask + at) != 0
        else:
            keep = tl.load(mask + at, mask=at < size, other=0) != 0
    else:
        word = first * ROWS + tl.arange(0, ROWS)[:, None]
        if FULL:
            words = tl.load(mask + word)
        else:
            words = tl.load(mask + word, mask=word * 32 < size, other=0)
        keep = ((words >> tl.arange(0, 32)[None, :]) & 1) != 0
    return keep


@triton.jit
def _apply_chunk(weight, mask, out, first, size, ROWS: tl.constexpr, FULL: tl.constexpr):
    at = _at(first, ROWS)
    keep = _keep(mask, first, at, size, ROWS, FULL)
    # Of rows that are dropped as a whole, as a mask of tiles drops them, the weights are not read.
    row = tl.broadcast_to(tl.max(keep.to(tl.int32), axis=1)[:, None] != 0, (ROWS, 32))
    values = tl.load(weight + at, mask=row if FULL else row & (at < size), other=0).to(tl.float32)
    _store(out, at, size, tl.where(keep, values, 0.0), FULL)


@triton.jit
def _apply_mask(
    table,
    chunks,
    WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    OUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``out = mask * weight`` of every tensor of the table."""
    row = table + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * 4
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64)
    size = tl.load(row)
    weight, mask = _address(row, 1, WEIGHT, ALIGN), _address(row, 2, MASK, ALIGN)
    out = _address(row, 3, OUT, ALIGN)
    if (first + 1) * (32 * ROWS) <= size:
        _apply_chunk(weight, mask, out, first, size, ROWS, True)
    else:
        _apply_chunk(weight, mask, out, first, size, ROWS, False)


@triton.jit(do_not_specialize=["size"])
def _apply_mask_one(weight, mask, out, size, ROWS: tl.constexpr):
    """``out = mask * weight`` of one tensor."""
    first = tl.program_id(0).to(tl.int64)
    if (first + 1) * (32 * ROWS) <= size:
        _apply_chunk(weight, mask, out, first, size, ROWS, True)
    else:
        _apply_chunk(weight, mask, out, first, size, ROWS, False)


@triton.jit
def _split_chunk(
    grad,
    weight,
    mask,
    grad_weight,
    grad_scores,
    sink,
    first,
    size,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    at = _at(first, ROWS)
    g = _load(grad, at, size, FULL)
    if HAS_WEIGHT:
        keep = _keep(mask, first, at, size, ROWS, FULL)
        _store(grad_weight, at, size, tl.where(keep, g, 0.0), FULL)
    if HAS_SCORES:
        _store(grad_scores, at, size, _load(weight, at, size, FULL) * g, FULL)
    if HAS_SINK:
        _store(sink, at, size, g, FULL)


@triton.jit
def _split_gradient(
    table,
    chunks,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    MASK: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``mask * G``, ``weight * G`` and ``G`` of every tensor of the table, the last two as float32."""
    row = table + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * 7
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64)
    size = tl.load(row)
    grad, weight = _address(row, 1, GRAD, ALIGN), _address(row, 2, WEIGHT, ALIGN)
    mask, grad_weight = _address(row, 3, MASK, ALIGN), _address(row, 4, GRAD_WEIGHT, ALIGN)
    scores, sink = _address(row, 5, tl.float32, ALIGN), _address(row, 6, tl.float32, ALIGN)
    if (first + 1) * (32 * ROWS) <= size:
        _split_chunk(
            *(grad, weight, mask, grad_weight, scores, sink, first, size),
            *(HAS_WEIGHT, HAS_SCORES, HAS_SINK, ROWS, True),
        )
    else:
        _split_chunk(
            *(grad, weight, mask, grad_weight, scores, sink, first, size),
            *(HAS_WEIGHT, HAS_SCORES, HAS_SINK, ROWS, False),
        )


@triton.jit(do_not_specialize=["size"])
def _split_gradient_one(
    grad,
    weight,
    mask,
    grad_weight,
    grad_scores,
    sink,
    size,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_SINK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``mask * G``, ``weight * G`` and ``G`` of one tensor, in the types of the outputs."""
    first = tl.program_id(0).to(tl.int64)
    if (first + 1) * (32 * ROWS) <= size:
        _split_chunk(
            *(grad, weight, mask, grad_weight, grad_scores, sink, first, size),
            *(HAS_WEIGHT, HAS_SCORES, HAS_SINK, ROWS, True),
        )
    else:
        _split_chunk(
            *(grad, weight, mask, grad_weight, grad_scores, sink, first, size),
            *(HAS_WEIGHT, HAS_SCORES, HAS_SINK, ROWS, False),
        )


@triton.jit(do_not_specialize=["size", "limit"])
def _gather_support(grad, positions, out, size, limit, channels, taps, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr):
    """``G``, of ``limit`` elements, at ``size`` flat positions in row-major order; 0 at those that it has not."""
    at = tl.program_id(0).to(tl.int64) * (32 * ROWS) + tl.arange(0, 32 * ROWS)
    position = tl.load(positions + at, mask=at < size, other=-1)
    keep = (position >= 0) & (position < limit)
    if CHANNELS_LAST:
        flat = position.to(tl.int32)  # divisions of 64 bits take three times the registers
        row, tap = flat // taps, flat % taps
        position = (row // channels * taps + tap) * channels + row % channels
    values = tl.load(grad + position, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, values, mask=at < size)


@triton.jit
def _sgd(
    value,
    g,
    buffer,
    at,
    size,
    lr,
    momentum,
    dampening,
    weight_decay,
    NESTEROV: tl.constexpr,
    MOMENTUM: tl.constexpr,
    FRESH: tl.constexpr,
    FULL: tl.constexpr,
):
    """What SGD makes of values with the gradient ``g``; the momentum is written."""
    g += weight_decay * value
    if MOMENTUM:
        if FRESH:
            b = g
        else:
            b = momentum * _load(buffer, at, size, FULL) + (1 - dampening) * g
        _store(buffer, at, size, b, FULL)
        if NESTEROV:
            g += momentum * b
        else:
            g = b
    return value - lr * g


@triton.jit
def _sgd_chunk(
    grad,
    weight,
    mask,
    copy,
    buffer,
    scores,
    scores_buffer,
    first,
    size,
    lr,
    momentum,
    dampening,
    weight_decay,
    scores_lr,
    scores_momentum,
    scores_dampening,
    scores_weight_decay,
    NESTEROV: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCORES_NESTEROV: tl.constexpr,
    SCORES_MOMENTUM: tl.constexpr,
    SCORES_SIGN: tl.constexpr,
    FRESH: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    at = _at(first, ROWS)
    keep = _keep(mask, first, at, size, ROWS, FULL)
    g, w = _load(grad, at, size, FULL), _load(weight, at, size, FULL)
    if HAS_SCORES:
        s = _sgd(
            *(_load(scores, at, size, FULL), SCORES_SIGN * (w * g), scores_buffer, at, size),
            *(scores_lr, scores_momentum, scores_dampening, scores_weight_decay),
            *(SCORES_NESTEROV, SCORES_MOMENTUM, FRESH, FULL),
        )
        _store(scores, at, size, s, FULL)
    w = _sgd(
        *(w, tl.where(keep, SIGN * g, 0.0), buffer, at, size),
        *(lr, momentum, dampening, weight_decay, NESTEROV, MOMENTUM, FRESH, FULL),
    )
    _store(weight, at, size, w, FULL)
    if HAS_COPY:
        _store(copy, at, size, tl.where(keep, w, 0.0), FULL)


@triton.jit
def _sgd_step(
    table,
    chunks,
    lr,
    momentum,
    dampening,
    weight_decay,
    scores_lr,
    scores_momentum,
    scores_dampening,
    scores_weight_decay,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    COPY: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCORES_NESTEROV: tl.constexpr,
    SCORES_MOMENTUM: tl.constexpr,
    SCORES_SIGN: tl.constexpr,
    FRESH: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``torch.optim.SGD`` on float32 weights with gradient ``mask * G``, which also writes ``mask * weight``.

    And on scores with gradient ``weight * G``, of the weight before the step, if there are any.
    """
    row = table + tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64) * 8
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64)
    size = tl.load(row)
    grad, weight = _address(row, 1, GRAD, ALIGN), _address(row, 2, tl.float32, ALIGN)
    mask, copy = _address(row, 3, MASK, ALIGN), _address(row, 4, COPY, ALIGN)
    buffer, scores = _address(row, 5, tl.float32, ALIGN), _address(row, 6, tl.float32, ALIGN)
    scores_buffer = _address(row, 7, tl.float32, ALIGN)
    if (first + 1) * (32 * ROWS) <= size:
        _sgd_chunk(
            *(grad, weight, mask, copy, buffer, scores, scores_buffer, first, size),
            *(lr, momentum, dampening, weight_decay),
            *(scores_lr, scores_momentum, scores_dampening, scores_weight_decay),
            *(NESTEROV, MOMENTUM, SIGN, HAS_SCORES, SCORES_NESTEROV, SCORES_MOMENTUM, SCORES_SIGN),
            *(FRESH, HAS_COPY, ROWS, True),
        )
    else:
        _sgd_chunk(
            *(grad, weight, mask, copy, buffer, scores, scores_buffer, first, size),
            *(lr, momentum, dampening, weight_decay),
            *(scores_lr, scores_momentum, scores_dampening, scores_weight_decay),
            *(NESTEROV, MOMENTUM, SIGN, HAS_SCORES, SCORES_NESTEROV, SCORES_MOMENTUM, SCORES_SIGN),
            *(FRESH, HAS_COPY, ROWS, False),
        )


@triton.jit
def _adamw(
    value,
    g,
    average,
    square,
    at,
    size,
    step_size,
    root_correction,
    lr,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    FULL: tl.constexpr,
):
    """What AdamW makes of values with the gradient ``g``; the moments are written.

    The rests are 1 - beta, which has lost half of its digits if it is computed of a beta in float32.
    """
    a = _load(average, at, size, FULL)
    a += rest1 * (g - a)
    q = beta2 * _load(square, at, size, FULL) + rest2 * g * g
    _store(average, at, size, a, FULL)
    _store(square, at, size, q, FULL)
    return value * (1 - lr * weight_decay) - step_size * a / (tl.sqrt(q) / root_correction + eps)


@triton.jit
def _adamw_chunk(
    grad,
    weight,
    mask,
    copy,
    average,
    square,
    scores,
    scores_average,
    scores_square,
    corrections,
    first,
    size,
    lr,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    scores_lr,
    scores_rest1,
    scores_beta2,
    scores_rest2,
    scores_eps,
    scores_weight_decay,
    SIGN: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCORES_SIGN: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    at = _at(first, ROWS)
    keep = _keep(mask, first, at, size, ROWS, FULL)
    g, w = _load(grad, at, size, FULL), _load(weight, at, size, FULL)
    if HAS_SCORES:
        s = _adamw(
            *(_load(scores, at, size, FULL), SCORES_SIGN * (w * g), scores_average, scores_square, at, size),
            *(tl.load(corrections + 2), tl.load(corrections + 3)),
            *(scores_lr, scores_rest1, scores_beta2, scores_rest2, scores_eps, scores_weight_decay, FULL),
        )
        _store(scores, at, size, s, FULL)
    w = _adamw(
        *(w, tl.where(keep, SIGN * g, 0.0), average, square, at, size),
        *(tl.load(corrections), tl.load(corrections + 1), lr, rest1, beta2, rest2, eps, weight_decay, FULL),
    )
    _store(weight, at, size, w, FULL)
    if HAS_COPY:
        _store(copy, at, size, tl.where(keep, w, 0.0), FULL)


@triton.jit
def _adamw_step(
    table,
    chunks,
    corrections,
    lr,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    scores_lr,
    scores_rest1,
    scores_beta2,
    scores_rest2,
    scores_eps,
    scores_weight_decay,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    COPY: tl.constexpr,
    SIGN: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    SCORES_SIGN: tl.constexpr,
    HAS_COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``torch.optim.AdamW`` likewise. ``corrections``: of each tensor two, two of its scores."""
    tensor = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    row = table + tensor * 10
    first = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64)
    size = tl.load(row)
    grad, weight = _address(row, 1, GRAD, ALIGN), _address(row, 2, tl.float32, ALIGN)
    mask, copy = _address(row, 3, MASK, ALIGN), _address(row, 4, COPY, ALIGN)
    average, square = _address(row, 5, tl.float32, ALIGN), _address(row, 6, tl.float32, ALIGN)
    scores = _address(row, 7, tl.float32, ALIGN)
    scores_average, scores_square = _address(row, 8, tl.float32, ALIGN), _address(row, 9, tl.float32, ALIGN)
    corrections += tensor * 4
    if (first + 1) * (32 * ROWS) <= size:
        _adamw_chunk(
            *(grad, weight, mask, copy, average, square, scores, scores_average, scores_square),
            *(corrections, first, size, lr, rest1, beta2, rest2, eps, weight_decay),
            *(scores_lr, scores_rest1, scores_beta2, scores_rest2, scores_eps, scores_weight_decay),
            *(SIGN, HAS_SCORES, SCORES_SIGN, HAS_COPY, ROWS, True),
        )
    else:
        _adamw_chunk(
            *(grad, weight, mask, copy, average, square, scores, scores_average, scores_square),
            *(corrections, first, size, lr, rest1, beta2, rest2, eps, weight_decay),
            *(scores_lr, scores_rest1, scores_beta2, scores_rest2, scores_eps, scores_weight_decay),
            *(SIGN, HAS_SCORES, SCORES_SIGN, HAS_COPY, ROWS, False),
        )


# -- launches ----------------------------------------------------------------------------------------------------------

_MOST_TABLES = 64
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_tables_lock = threading.Lock()


def _kept(key: tuple, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A small tensor on the device that is kept for those who ask for it again, on the same stream.

    What it is copied from is not kept: torch gives the pinned memory out again once the copy is over, and to get more
    from the driver would wait for the device.
    """
    key = (device, gpu.stream_id(device), key)
    with _tables_lock:
        found = _tables.get(key)
        if found is None:
            made = make()
            found = made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
            while len(_tables) >= _MOST_TABLES:
                _tables.popitem(last=False)
            _tables[key] = found
        _tables.move_to_end(key)
    return found


def _table(columns: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, Tensor, int]:
    """Addresses of many tensors, ``[tensors, 1 + columns]`` behind their sizes, ``[chunks, 2]`` (tensor, chunk), and
    what a compiled kernel may take for granted of the addresses: they are multiples of 16, or less.

    Gradients lie elsewhere in every step; the chunks follow from the sizes alone.
    """
    device = next(t for t in columns[0] if t is not None).device
    sizes = tuple([t.numel() for t in columns[0]])  # type: ignore[union-attr]
    addresses = [tuple([0 if t is None else t.data_ptr() for t in column]) for column in columns]
    bits = functools.reduce(operator.or_, itertools.chain(*addresses), 16)
    rows = (sizes, *addresses)

    def chunks() -> Tensor:
        counts = (torch.tensor(sizes, device="cpu") + CHUNK - 1) // CHUNK
        tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
        first = torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]
        return torch.stack([tensor, first], 1).int()

    def table() -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device="cpu").t().contiguous()

    return _kept(rows, table, device), _kept(sizes, chunks, device), bits & -bits


def _column(tensors: Sequence[Tensor] | None, length: int) -> Sequence[Tensor | None]:
    return tensors or [None] * length


def _type(column: Sequence[Tensor | None]) -> tl.dtype:
    return _TYPES[next((t.dtype for t in column if t is not None), torch.float32)]


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels know the types: float32, bfloat16, float16; of masks bool, or int64 words."""
    for tensor in tensors:  # no all(...): this runs for every layer
        if tensor is not None and tensor.dtype not in _TYPES:
            return False
    return True


def _one_by_one(tensors: Sequence[Tensor]) -> bool:
    """Whether each has a launch of its own."""
    return len(tensors) == 1 or (bool(tensors) and gpu.is_capturing(tensors[0].device))


def _mask_argument(mask: Tensor) -> Tensor:
    """A mask as a kernel takes it that is given tensors and not addresses: bytes, or halves of words."""
    return mask.view(torch.int8 if mask.dtype == torch.bool else torch.int32)


def apply_mask(weights: Sequence[Tensor], masks: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Writes ``outs = masks * weights``: of one type a column, of equal strides and without gaps a row."""
    if _one_by_one(weights):
        for weight, mask, out in zip(weights, masks, outs, strict=True):
            if size := weight.numel():
                operands = weight, _mask_argument(mask), out, size
                launch(weight.device, _apply_mask_one, (-(-size // CHUNK),), *operands, **_FIXED_OF_COPY)
        torch.autograd.graph.increment_version(list(outs))
        return
    table, chunks, align = _table([weights, masks, outs])
    types = {"WEIGHT": _type(weights), "MASK": _type(masks), "OUT": _type(outs)}
    if len(chunks):
        launch(table.device, _apply_mask, (len(chunks),), table, chunks, ALIGN=align, **_FIXED_OF_COPY, **types)
    torch.autograd.graph.increment_version(list(outs))


def split_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    grad_weights: Sequence[Tensor] | None,
    grad_scores: Sequence[Tensor] | None,
    sinks: Sequence[Tensor] | None,
) -> None:
    """Writes ``masks * grads``, ``weights * grads`` and ``grads`` to the outputs that are not None."""
    outs = [_column(column, len(grads)) for column in (grad_weights, grad_scores, sinks)]
    if _one_by_one(grads):
        for tensors in zip(grads, weights, masks, *outs, strict=True):
            split_one(*tensors)
        return
    wanted = _wanted(*(column or None for column in (grad_weights, grad_scores, sinks)))
    table, chunks, align = _table([grads, weights, masks, *outs])
    types = {"GRAD": _type(grads), "WEIGHT": _type(weights), "MASK": _type(masks), "GRAD_WEIGHT": _type(outs[0])}
    if len(chunks):
        launch(table.device, _split_gradient, (len(chunks),), table, chunks, ALIGN=align, **_FIXED, **types, **wanted)


def split_one(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    grad_weight: Tensor | None,
    grad_scores: Tensor | None,
    sink: Tensor | None,
) -> None:
    """:func:`split_gradient` of one tensor."""
    if size := grad.numel():
        operands = grad, weight, _mask_argument(mask), grad_weight, grad_scores, sink, size
        wanted = _wanted(grad_weight, grad_scores, sink)
        launch(grad.device, _split_gradient_one, (-(-size // CHUNK),), *operands, **wanted, **_FIXED)


def takes_support(grad: Tensor, positions: Tensor) -> bool:
    """Whether :func:`gather_support` knows the type and the order of a gradient."""
    if not takes(grad) or positions.dtype != torch.int64 or not positions.is_contiguous():
        return False
    return grad.is_contiguous() or (
        grad.dim() == 4 and grad.numel() < 1 << 31 and grad.is_contiguous(memory_format=torch.channels_last)
    )


def gather_support(grad: Tensor, positions: Tensor) -> Tensor:
    """:func:`.reference.gather_support` in float32, of what :func:`takes_support`."""
    out = torch.empty(positions.shape, dtype=torch.float32, device=grad.device)
    if size := positions.numel():
        channels_last = not grad.is_contiguous()
        channels, taps = (grad.shape[1], grad.shape[2] * grad.shape[3]) if channels_last else (1, 1)
        operands = grad, positions, out, size, grad.numel(), channels, taps
        launch(grad.device, _gather_support, (-(-size // CHUNK),), *operands, CHANNELS_LAST=channels_last, **_FIXED)
    return out


def _wanted(grad_weight: Any, grad_scores: Any, sink: Any) -> dict[str, bool]:
    """Which outputs there are, for a kernel."""
    return {
        "HAS_WEIGHT": grad_weight is not None,
        "HAS_SCORES": grad_scores is not None,
        "HAS_SINK": sink is not None,
    }


class Scores(NamedTuple):
    """What a step takes of scores that it steps beside their weights, with the gradient ``weight * G``."""

    scores: Sequence[Tensor | None]
    state: Sequence[Sequence[Tensor | None]]
    """Columns: of the momentum, or of the two moments."""
    settings: Mapping[str, Any]
    steps: Sequence[Tensor] = ()


def _sgd_settings(settings: Mapping[str, Any]) -> list[float]:
    return [float(settings[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]


def sgd_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    buffers: Sequence[Tensor] | None,
    scores: Scores | None = None,
    *,
    fresh: bool,
    **settings: Any,
) -> None:
    """One step of ``torch.optim.SGD`` in place, on weights and, with settings of their own, on scores.

    Args:
        weights, masks, copies: float32 weights, their masks, and what ``mask * weight`` is written to.
        grads: ``G``, or ``mask * G`` where there are no scores.
        buffers: of the momentum, or None without.
        scores: likewise, the state is the buffers or nothing.
        fresh: the buffers hold nothing yet.
        settings: lr, momentum, dampening, weight_decay, nesterov, maximize.
    """
    none = [None] * len(weights)
    of_scores = scores or Scores(none, [], settings)
    columns = [grads, weights, masks, copies or none, buffers or none, of_scores.scores, *(of_scores.state or [none])]
    table, chunks, align = _table(columns)
    if len(chunks):
        launch(
            table.device,
            _sgd_step,
            (len(chunks),),
            *(table, chunks, *_sgd_settings(settings), *_sgd_settings(of_scores.settings)),
            GRAD=_type(grads),
            MASK=_type(masks),
            COPY=_type(columns[3]),
            NESTEROV=settings["nesterov"],
            MOMENTUM=buffers is not None,
            SIGN=_sign(settings),
            HAS_SCORES=scores is not None,
            SCORES_NESTEROV=of_scores.settings["nesterov"],
            SCORES_MOMENTUM=bool(of_scores.state),
            SCORES_SIGN=_sign(of_scores.settings),
            FRESH=fresh,
            HAS_COPY=copies is not None,
            ALIGN=align,
            **_FIXED,
        )
    _tell_autograd(weights, *columns[3:])


def _adamw_settings(settings: Mapping[str, Any]) -> list[float]:
    beta1, beta2 = settings["betas"]
    numbers = settings["lr"], 1 - beta1, beta2, 1 - beta2, settings["eps"], settings["weight_decay"]
    return [float(number) for number in numbers]


def _adamw_corrections(settings: Mapping[str, Any], steps: Sequence[Tensor]) -> list[Tensor]:
    # Torch keeps the numbers on the device. In float64: 1 - 0.999 ** step loses half of the digits of a float32.
    step = torch.stack(list(steps)).double()
    beta1, beta2 = settings["betas"]
    return [settings["lr"] / (1 - beta1**step), (1 - beta2**step).sqrt()]


def adamw_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    scores: Scores | None = None,
    **settings: Any,
) -> None:
    """One step of ``torch.optim.AdamW`` in place, otherwise as :func:`sgd_step`.

    Args:
        weights, grads, masks, copies, scores: as there; the state of scores is averages and squares.
        averages, squares: the moments.
        steps: numbers of this step, float32 on the device.
        settings: lr, betas, eps, weight_decay, maximize.
    """
    none = [None] * len(weights)
    of_scores = scores or Scores(none, [none, none], settings)
    columns = [grads, weights, masks, copies or none, averages, squares, of_scores.scores, *of_scores.state]
    table, chunks, align = _table(columns)
    corrections = _adamw_corrections(settings, steps)
    corrections += corrections if scores is None else _adamw_corrections(scores.settings, scores.steps)
    if len(chunks):
        launch(
            table.device,
            _adamw_step,
            (len(chunks),),
            *(table, chunks, torch.stack(corrections, 1).float()),
            *(*_adamw_settings(settings), *_adamw_settings(of_scores.settings)),
            GRAD=_type(grads),
            MASK=_type(masks),
            COPY=_type(columns[3]),
            SIGN=_sign(settings),
            HAS_SCORES=scores is not None,
            SCORES_SIGN=_sign(of_scores.settings),
            HAS_COPY=copies is not None,
            ALIGN=align,
            **_FIXED,
        )
    _tell_autograd(weights, *columns[3:])


def _sign(settings: Mapping[str, Any]) -> int:
    return -1 if settings["maximize"] else 1


def _tell_autograd(*columns: Sequence[Tensor | None]) -> None:
    torch.autograd.graph.increment_version([t for column in columns for t in column if t is not None])
