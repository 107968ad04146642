"""The k largest scores on a GPU without the CUDA library: radix select in Triton, which is installed beside torch.

Exact and without waiting for the device, as csrc/cuda/binarize.cu is, and slower: it reads the scores six times (those
of 16 bits four times). Imported where it is needed, since it imports Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
_HISTOGRAM_BLOCK = 4096
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}


@triton.jit
def _key(bits, INFINITY: tl.constexpr):
    """Greater for greater scores, equal for both zeros; and whether it is NaN, which is less than all others.

    ``bits`` are the scores as integers: the interpreter cannot compute with bfloat16.
    """
    IS_WIDE: tl.constexpr = INFINITY > 0xFFFF
    SIGN: tl.constexpr = 0x80000000 if IS_WIDE else 0x8000
    bits = bits.to(tl.int64)
    magnitude = bits & (SIGN - 1)
    nan = magnitude > INFINITY
    key = tl.where(bits < 0, SIGN - magnitude, SIGN + magnitude)
    return tl.where(nan, 0, key), nan


@triton.jit
def _histogram(scores, size, prefix, bins, SHIFT: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the digits at SHIFT of the keys that begin with ``prefix``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key, _ = _key(tl.load(scores + at, mask=at < size, other=0), INFINITY)
    inside = (at < size) & ((key >> (SHIFT + 8)) == tl.load(prefix))
    counts = tl.histogram(((key >> SHIFT) & 255).to(tl.int32), 256, mask=inside)
    tl.atomic_add(bins + tl.arange(0, 256), counts)


@triton.jit
def _choose(prefix, need, bins):
    """Appends to ``prefix`` the digit of the k-th largest, of which ``need`` are still to be found. Clears ``bins``."""
    digit = 255 - tl.arange(0, 256)
    counts = tl.load(bins + digit).to(tl.int64)
    found = tl.sum((tl.cumsum(counts, 0) < tl.load(need)).to(tl.int64), 0)
    found = tl.minimum(found, 255)
    tl.store(need, tl.load(need) - tl.sum(tl.where(255 - digit < found, counts, 0), 0))
    tl.store(prefix, tl.load(prefix) * 256 + 255 - found)
    tl.debug_barrier()
    tl.store(bins + digit, tl.zeros([256], tl.int32))


@triton.jit
def _count(scores, size, threshold, counts, INFINITY: tl.constexpr, CHUNK: tl.constexpr):
    """Counts of each chunk ``[3, ...]`` in a row each: above the threshold, equal to it, NaN."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    key, nan = _key(tl.load(scores + at, mask=at < size, other=0), INFINITY)
    least = tl.load(threshold)
    valid = at < size
    counts += 3 * tl.program_id(0)
    tl.store(counts, tl.sum((valid & (key > least)).to(tl.int32), 0))
    tl.store(counts + 1, tl.sum((valid & (key == least)).to(tl.int32), 0))
    tl.store(counts + 2, tl.sum((valid & nan).to(tl.int32), 0))


@triton.jit
def _write(scores, size, threshold, need, ties_before, mask, words, INFINITY: tl.constexpr, CHUNK: tl.constexpr):
    """What is kept of a chunk: all above the threshold, and the first ``need`` of those equal to it."""
    chunk = tl.program_id(0)
    at = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    key, _ = _key(tl.load(scores + at, mask=at < size, other=0), INFINITY)
    least = tl.load(threshold)
    valid = at < size
    tie = valid & (key == least)
    rank = tl.cumsum(tie.to(tl.int32), 0) + tl.load(ties_before + chunk)
    kept = (valid & (key > least)) | (tie & (rank <= tl.load(need)))
    tl.store(mask + at, kept.to(tl.int8), mask=valid)
    bits = kept.to(tl.int64) << (tl.arange(0, CHUNK) % 64).to(tl.int64)
    word = chunk.to(tl.int64) * (CHUNK // 64) + tl.arange(0, CHUNK // 64)
    tl.store(words + word, tl.sum(tl.reshape(bits, [CHUNK // 64, 64]), 1), mask=word * 64 < size)


def binarize(scores: Sequence[Tensor], outs: Sequence[Sequence[Tensor]], k: int | Tensor) -> Tensor:
    """As ``cuda.binarize``."""
    device, dtype = scores[0].device, scores[0].dtype
    bits = [s.reshape(-1).view(torch.int32 if dtype == torch.float32 else torch.int16) for s in scores]
    total = sum(b.numel() for b in bits)
    chunks = [triton.cdiv(b.numel(), CHUNK) for b in bits]
    if isinstance(k, Tensor):
        asked = k.to(device, torch.int64).reshape(1)
    else:  # filled there: a copy from the host could not be captured in a graph
        asked = torch.full((1,), k, dtype=torch.int64, device=device)
    wanted = asked.clamp(0, total)
    need = wanted.clone()
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    bins = torch.zeros(256, dtype=torch.int32, device=device)
    counts = torch.zeros(sum(chunks), 3, dtype=torch.int32, device=device)
    options = {"INFINITY": _INFINITY[dtype]}
    first = [sum(chunks[:i]) for i in range(len(chunks))]
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for shift in range(8 * dtype.itemsize - 8, -1, -8):
            for b in bits:
                if b.numel():
                    grid = (triton.cdiv(b.numel(), _HISTOGRAM_BLOCK),)
                    _histogram[grid](b, b.numel(), prefix, bins, shift, BLOCK=_HISTOGRAM_BLOCK, num_warps=8, **options)
            _choose[(1,)](prefix, need, bins)
        for b, n, begin in zip(bits, chunks, first, strict=True):
            if n:
                _count[(n,)](b, b.numel(), prefix, counts[begin:], CHUNK=CHUNK, **options)
        sums = torch.zeros(sum(chunks) + 1, 3, dtype=torch.int64, device=device)
        torch.cumsum(counts, 0, out=sums[1:])
        before = sums[:, 1].contiguous()
        kept = sums[:, 0] + torch.minimum(before, need)
        for b, (mask, words, totals), n, begin in zip(bits, outs, chunks, first, strict=True):
            if n:
                mask, positions = mask.view(-1).view(torch.int8), before[begin:]
                _write[(n,)](b, b.numel(), prefix, need, positions, mask, words, CHUNK=CHUNK, **options)
            torch.sub(kept[begin : begin + n + 1], kept[begin], out=totals)
    nans = [sums[begin + n, 2] - sums[begin, 2] for n, begin in zip(chunks, first, strict=True)]
    errors = torch.stack([*nans, (asked != wanted)[0].long()])
    return torch.cat([errors, (errors.sum() == 0).long()[None]]).int()
