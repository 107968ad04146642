"""Sparse tensors as messages: ``pack`` and ``unpack``, in the format of docs/message-format.md.

A message holds the values at the positions of a mask, and the positions in the form that is smallest, or none of them
where both sides have the mask. It is checked, checksum and sizes first, before anything is allocated or written.
"""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import cuda, native, reference
from .binarize import BinaryMask

FORMATS = {"dense": 0, "values": 1, "bitmap": 2, "hierarchical": 3, "delta8": 4, "block16": 5}
"""Format -> its code in a message."""
_AUTO = ("bitmap", "hierarchical", "delta8", "block16", "dense")  # of equal sizes the first: dense forgets the mask
MODES = ("overwrite", "accumulate", "scatter")
MAX_BYTES = 1 << 32

_MAGIC, _VERSION = b"SBPK", 1
_PREAMBLE = struct.Struct("<4sIHHIQQ")  # magic, CRC-32C, version, flags, tensors, bytes of the message, zero
_ENTRY = struct.Struct(
    "<BBBBIQQQII"
)  # dtype, dtype of values, format, dims, name, count, hash, index bytes, block, zero
_CHECKED_FROM = 8  # the checksum is that of all bytes from here on
_NAMED = 1  # the flag of a mapping
_MAX_DIMS = 64
_BLOCK, _ESCAPE = 1 << 16, 255  # elements of a block of block16; byte of delta8 that skips so many elements
_DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_VALUE_DTYPES = {**_DTYPES, 4: torch.int8}
_OUT_DTYPES = (*_DTYPES.values(), torch.float64)
_CODES = {dtype: code for code, dtype in _VALUE_DTYPES.items()}
_NAMES = {name: format for format, name in FORMATS.items()}
# Scales of int8: the least has all bits of its mantissa, and 127 times the largest is still finite.
_LEAST_SCALE, _LARGEST_SCALE = torch.finfo(torch.float32).tiny, 2.6793884e36  # 0x1.020406p+121
_ON_GRID = 2.0**-21  # relative; a step times its scale, divided by it again, is within a quarter of that

Tensors = Tensor | Mapping[str, Tensor] | nn.Module


class PackError(ValueError):
    """A message that cannot be made, or one that is not whole, not consistent or not the expected one."""


class Entry(NamedTuple):
    """One tensor of a message."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the tensor."""
    value_dtype: torch.dtype
    """Of the values in the message; int8 has scales."""
    format: str
    num_values: int
    """Number of values."""
    mask_hash: int
    index_bytes: int
    block: int
    """Values that share a scale; 0 means all."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scales(self) -> int:
        if self.value_dtype != torch.int8:
            return 0
        return -(-self.num_values // self.block) if self.block else min(self.num_values, 1)

    @property
    def block_of_values(self) -> int:
        """As ``block``, without the values that are not there: a message may name blocks larger than any memory."""
        return max(1, min(self.block or self.num_values, self.num_values))

    @property
    def value_bytes(self) -> int:
        """Bytes of values and scales."""
        return 4 * self.scales + self.num_values * self.value_dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of the message that follow its head for this tensor; both sections are padded."""
        return _padded(self.index_bytes) + _padded(self.value_bytes)


class Message:
    """What :func:`pack` returns: ``bytes(message)``, ``len(message)``, and without a copy ``message.data``.

    Attributes:
        data: the bytes, a uint8 array.
        entries: what it holds of every tensor: format, counts, sizes.
    """

    def __init__(self, data: np.ndarray, entries: tuple[Entry, ...]) -> None:
        self.data = data
        self.entries = entries

    def __bytes__(self) -> bytes:
        return self.data.tobytes()

    def __len__(self) -> int:
        return self.data.size

    def __repr__(self) -> str:
        what = ", ".join(f"{e.name or 'tensor'} {list(e.shape)}: {e.num_values} {e.format}" for e in self.entries[:3])
        more = f", and {len(self.entries) - 3} more" if len(self.entries) > 3 else ""
        return f"Message({len(self)} bytes; {what}{more})"


def pack(
    values: Tensors,
    mask: Tensors | None = None,
    format: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    block: int = 0,
    generator: torch.Generator | None = None,
) -> Message:
    """The values at the positions of a mask, as a message for :func:`unpack`.

    Args:
        values: a tensor of any shape and strides, float32, float16 or bfloat16, on the CPU, or on a GPU where the CUDA
            kernels are built; or a mapping from names to tensors; or a model, of which the ``weight`` of each sparse
            layer is taken, and nothing else: no bias, no normalization, no dense layer. A message of
            all floating tensors of a model, masked weights at their masks and the others whole, is
            ``pack({n: t for n, t in model.state_dict().items() if t.is_floating_point() and not
            n.endswith("mask_scores")}, model)``, which ``unpack(message, out=other.state_dict())`` writes into another
            model, whose masks and scores stay its own.
        mask: bool, of the shape of ``values``; a mapping or a model where that is one, in which tensors without a mask
            may be missing. None: that of the model, else everything is sent.
        format: how positions are written. ``values``: not at all, the receiver has the mask, which is verified by its
            hash; ``bitmap``; ``hierarchical``: the bytes of the bitmap that are not zero; ``delta8``: distances;
            ``block16``: positions in blocks of 65536; ``dense``: all elements, zeros outside of the mask; ``auto``: the
            smallest of all but the first, for each tensor.
        dtype: of the values in the message; None keeps that of the tensor. ``torch.int8`` scales them by the largest
            magnitude, at least 1.5e-36, and rounds stochastically, so that the mean of many messages is exact to
            float32's rounding (where they are unpacked into 16 bits, the nearest number is written: for the mean give a
            float32 ``out``). What is on the grid stays there: a float32 tensor that came out of an int8 message goes
            through the next one, of the same mask and block, unchanged.
        block: with int8, how many values share a scale; 0 for all of a tensor.
        generator: of the random numbers of int8.

    Raises:
        PackError: a shape, dtype, device, format or value is not as above, or a model has no masks. With int8, values
            must be finite. It is a ValueError.
    """
    if format != "auto" and format not in FORMATS:
        raise PackError(f"format is {format!r}; allowed: auto, {', '.join(FORMATS)}")
    if dtype is not None and dtype not in _CODES:
        raise PackError(f"dtype is {dtype}; allowed: {_list(_CODES)}")
    if not isinstance(block, numbers.Integral) or not 0 <= block < 1 << 32:
        raise PackError(f"block={block!r} is not allowed; expected a whole number, from 0 to {(1 << 32) - 1}")
    if values is None:
        raise TypeError("values is None; expected a tensor, a mapping of tensors or a model")
    named = not isinstance(values, Tensor)
    if isinstance(values, nn.Module) and mask is None:
        mask = values
    tensors, masks = _by_name(values, "values"), _by_name(mask, "mask", masks=True)
    if isinstance(values, nn.Module) and not tensors:
        raise PackError(
            f"values is a {type(values).__name__} without masks, and of a model the masked weights are packed; to send "
            "all of it give a mapping: {name: t for name, t in model.state_dict().items() if t.is_floating_point()}"
        )
    tied = {name for name, _ in _sparse_layers(values)} if isinstance(values, nn.Module) else set()
    for name in masks:
        if name not in tensors and name not in tied:
            raise PackError(f"mask has {name!r}, which values has not; that has: {', '.join(tensors) or 'nothing'}")
    plans = [(t, *_plan(name, t.detach(), masks.get(name), format, dtype, block)) for name, t in tensors.items()]

    head = b"".join(_head(entry) for _, entry, _ in plans)
    offset = _PREAMBLE.size + len(head)
    size = offset + sum(entry.payload_bytes for _, entry, _ in plans)
    data = np.empty(size, np.uint8)
    preamble = _PREAMBLE.pack(_MAGIC, 0, _VERSION, _NAMED * named, len(plans), size, 0)
    data[:offset] = np.frombuffer(preamble + head, np.uint8)
    for tensor, entry, bits in plans:
        _write(entry, tensor.detach(), bits, data[offset : offset + entry.payload_bytes], generator)
        offset += entry.payload_bytes
    data[4:8] = np.frombuffer(struct.pack("<I", _crc32c(data[_CHECKED_FROM:])), np.uint8)
    return Message(data, tuple(entry for _, entry, _ in plans))


def unpack(
    message: Message | bytes | bytearray | memoryview | np.ndarray | Tensor,
    mask: Tensors | None = None,
    *,
    out: Tensors | None = None,
    mode: str = "overwrite",
    alpha: float = 1.0,
    return_mask: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """The tensor of a message of :func:`pack`, or the mapping from names to tensors.

    The whole message is checked before the first element is written; it must not change meanwhile.

    Args:
        message: what :func:`pack` returned, or its bytes (uint8 arrays and tensors on the CPU too).
        mask: bool, of the tensor's shape, or a mapping or a model: needed by the format ``values``, else compared.
        out: floating point, of the tensor's shape, where :func:`pack` takes tensors from: written to, and returned. For
            a message with names a mapping or a model that has these names; others are left alone. A model also lends
            its masks.
        mode: ``overwrite`` writes zeros outside of the mask, ``scatter`` writes at the positions of the mask only, and
            ``accumulate`` adds there ``alpha`` times the values to ``out``.
        alpha: factor of ``accumulate``.
        return_mask: return ``(tensor, mask)``, or two mappings.
        max_bytes: the most that the tensors of the message may take when they are dense. Bits of masks, and values that
            must be converted (int8, other dtypes, ``accumulate``), take memory in passing, a small multiple of it.

    Raises:
        PackError: the message is not whole or not consistent, larger than ``max_bytes``, of another mask, or does not
            fit ``out``. Nothing has been written then.
    """
    if mode not in MODES:
        raise PackError(f"mode is {mode!r}; allowed: {', '.join(MODES)}")
    if mode != "overwrite" and out is None:
        raise PackError(f"mode {mode!r} changes a tensor that exists: give it as out=")
    if alpha != 1 and mode != "accumulate":
        raise PackError(f"alpha is {alpha}, which only the mode 'accumulate' uses, and mode is {mode!r}")
    data = _as_array(message)
    named, parts = _read(data, max_bytes)
    masks, outs = _by_name(mask, "mask", masks=True), _by_name(out, "out")
    lent = _by_name(out, "out", masks=True) if isinstance(out, nn.Module) and mask is None else {}
    for what, given in (("out", out), ("mask", mask)):
        if given is not None and isinstance(given, Tensor) == named:
            raise PackError(
                f"{what} is a {type(given).__name__}; the message holds {'named tensors' if named else 'one tensor'}"
            )
    if mode == "accumulate":
        _check_apart([entry.name for entry, _ in parts], outs)
    read = []
    for entry, payload in parts:
        target = None if out is None else _checked_out(entry, outs)
        known = masks.get(entry.name)
        if mask is not None and known is None and entry.format not in ("values", "dense"):
            has = ", ".join(masks) or "nothing"
            raise PackError(f"mask has no {entry.name!r}, which the message has at positions; mask has: {has}")
        if known is None and entry.format in ("values", "dense"):  # others bring masks that may be new
            known = lent.get(entry.name)
        bits = _read_positions(entry, payload, known)
        if bits is None and (return_mask or mode != "overwrite"):
            raise PackError(f"{_of(entry)}: the message is dense and does not tell the mask; give it as mask=")
        read.append((entry, payload, bits, target))

    tensors, found = {}, {}
    with torch.no_grad():
        for entry, payload, bits, target in read:
            raw = payload[_padded(entry.index_bytes) :]
            tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu") if target is None else target
            _write_values(entry, raw, bits, tensor, mode, alpha)
            tensors[entry.name] = tensor
            if return_mask and bits is not None:  # which was seen above
                found[entry.name] = torch.from_numpy(_mask_of(bits, entry.numel)).view(entry.shape)
    if not named:
        return (tensors[""], found[""]) if return_mask else tensors[""]
    return (tensors, found) if return_mask else tensors


# -- arguments --------------------------------------------------------------------------------------------------------


def _list(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _by_name(argument: Any, what: str, masks: bool = False) -> dict[str, Tensor]:
    """Tensors by their names; that of a single one is empty."""
    if argument is None:
        return {}
    if isinstance(argument, nn.Module):
        layers = _sparse_layers(argument)
        if not masks:  # a weight that several layers share goes under the first of its names; masks are known by all
            first = {id(m.weight): n for n, m in reversed(layers)}
            layers = [(n, m) for n, m in layers if first[id(m.weight)] == n]
        argument = {n: m.mask if masks else m.weight for n, m in layers}
    named: Mapping[str, Any] = argument if isinstance(argument, Mapping) else {"": argument}
    for name, tensor in named.items():
        item = f"{what}[{name!r}]" if named is argument else what
        if not isinstance(name, str):
            raise TypeError(f"{what} has the name {name!r}; names are strings")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{item} is a {type(tensor).__name__}; expected a tensor, a mapping of tensors or a model")
        if not (tensor.device.type == "cpu" or cuda.available(tensor.device)) or tensor.layout != torch.strided:
            raise PackError(f"{item} is {tensor.layout} on {tensor.device}; expected torch.strided on cpu or cuda")
        if masks and tensor.dtype != torch.bool:
            raise PackError(f"{item} is {tensor.dtype}; expected torch.bool")
    return dict(named)


def _sparse_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names of weights, and the layers that have a mask of them."""
    return [(f"{n}.weight" if n else "weight", m) for n, m in model.named_modules() if _is_sparse(m)]


def _is_sparse(module: Any) -> bool:
    """Whether a module has a weight and its mask, which others, as for causal attention, have not."""
    mask, weight = module._buffers.get("mask"), getattr(module, "weight", None)
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and isinstance(weight, Tensor)
        and weight.shape == mask.shape
    )


def _check_apart(names: Sequence[str], outs: Mapping[str, Tensor]) -> None:
    """Refuse to add to what two names of a message stand for, as tied weights do in a state dict."""
    found: dict[int, str] = {}
    for name in names:
        out = outs.get(name)
        if out is None or not out.numel():
            continue
        first = found.setdefault(out.data_ptr(), name)
        if first != name:
            raise PackError(
                f"out has {first!r} and {name!r} in the same memory, to which mode 'accumulate' would add twice; pack "
                "one of them"
            )


def _of(entry: Entry) -> str:
    return f"tensor {entry.name!r}" if entry.name else "tensor"


def _checked_mask(mask: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(mask.shape) != shape:
        of = f" of {name!r}" if name else ""
        raise PackError(f"mask{of} has shape {list(mask.shape)}; the tensor has {list(shape)}")
    return mask.contiguous()


def _checked_out(entry: Entry, outs: dict[str, Tensor]) -> Tensor:
    if entry.name not in outs:
        raise PackError(f"out has no {entry.name!r}, which the message has; out has: {', '.join(outs) or 'nothing'}")
    out = outs[entry.name]
    if tuple(out.shape) != entry.shape or out.dtype not in _OUT_DTYPES:
        raise PackError(
            f"out for {_of(entry)} is {out.dtype} of shape {list(out.shape)}; the message needs {_list(_OUT_DTYPES)} "
            f"of shape {list(entry.shape)}"
        )
    if _overlaps(out):
        raise PackError(
            f"out for {_of(entry)} has elements that share memory (shape {list(out.shape)}, strides "
            f"{list(out.stride())}); expected one whose elements are apart, such as out.contiguous()"
        )
    return out


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements of a tensor are at the same place."""
    steps = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    if not tensor.numel():
        return False
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:  # each dimension steps over all that is inside of it
        return False
    if sum(stride * (size - 1) for stride, size in steps) + 1 < tensor.numel():  # more elements than places
        return True
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in steps:
        places = (places[:, None] + stride * torch.arange(size, device="cpu")).view(-1)
    return places.unique().numel() < tensor.numel()


# -- writing ----------------------------------------------------------------------------------------------------------


def _padded(size: int) -> int:
    """Sections begin at multiples of 8 bytes."""
    return -(-size // 8) * 8


def _plan(
    name: str, tensor: Tensor, mask: Tensor | None, format: str, dtype: torch.dtype | None, block: int
) -> tuple[Entry, np.ndarray]:
    """What will be sent of a tensor, and the bits of its mask."""
    of = f"[{name!r}]" if name else ""
    if tensor.dtype not in _DTYPES.values():
        raise PackError(f"values{of} is {tensor.dtype}; allowed: {_list(_DTYPES.values())}")
    if tensor.dim() > _MAX_DIMS:
        raise PackError(f"values{of} has {tensor.dim()} dimensions; at most {_MAX_DIMS} are allowed")
    shape, n, value_dtype = tuple(tensor.shape), tensor.numel(), dtype or tensor.dtype
    if mask is None:
        bits = _all_ones(n)
        summary = _summarize(bits, n)
    else:
        bits, summary = mask_to_bits(_checked_mask(mask, shape, name))
    count, mask_hash, hierarchical, delta8 = summary
    index_bytes = {
        "bitmap": -(-n // 8),
        "hierarchical": hierarchical,
        "delta8": delta8,
        "block16": 4 * -(-n // _BLOCK) + 2 * count,
        "dense": 0,
        "values": 0,
    }

    def entry(format: str) -> Entry:
        sent = n if format == "dense" else count
        scaled = block if value_dtype == torch.int8 else 0
        return Entry(name, shape, tensor.dtype, value_dtype, format, sent, mask_hash, index_bytes[format], scaled)

    if format != "auto":
        return entry(format), bits
    return min(map(entry, _AUTO), key=lambda e: e.payload_bytes), bits


def _head(entry: Entry) -> bytes:
    name = entry.name.encode()
    head = _ENTRY.pack(
        _CODES[entry.dtype],
        _CODES[entry.value_dtype],
        FORMATS[entry.format],
        len(entry.shape),
        len(name),
        entry.num_values,
        entry.mask_hash,
        entry.index_bytes,
        entry.block,
        0,
    )
    head += struct.pack(f"<{len(entry.shape)}Q", *entry.shape) + name
    return head.ljust(_padded(len(head)), b"\0")


def _write(entry: Entry, tensor: Tensor, bits: np.ndarray, out: np.ndarray, generator: torch.Generator | None) -> None:
    """The positions and values of one tensor."""
    index_bytes = _padded(entry.index_bytes)
    if entry.index_bytes:
        _encode_positions(entry.format, bits, entry.numel, out[: entry.index_bytes])
        out[entry.index_bytes : index_bytes] = 0
    section = out[index_bytes : index_bytes + entry.value_bytes]
    out[index_bytes + entry.value_bytes :] = 0
    tensor = tensor.contiguous()
    if entry.format != "dense" and entry.value_dtype == entry.dtype:
        gather_values(tensor, bits, entry.numel, section)
        return
    if entry.format == "dense":
        values = torch.where(
            torch.from_numpy(_mask_of(bits, entry.numel)).view(entry.shape),
            tensor.cpu(),
            torch.zeros((), dtype=tensor.dtype, device="cpu"),
        ).reshape(-1)
    else:
        values = torch.empty(entry.num_values, dtype=tensor.dtype, device="cpu")
        gather_values(tensor, bits, entry.numel, bytes_of(values))
    if entry.value_dtype == torch.int8:
        values, scales = _quantize(values.float(), entry, generator)
        section[: 4 * entry.scales] = bytes_of(scales)
    section[4 * entry.scales :] = bytes_of(values.to(entry.value_dtype))


def _quantize(values: Tensor, entry: Entry, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """int8 values and the float32 scales that they are multiples of."""
    if not bool(values.isfinite().all()):
        raise PackError(f"values of {_of(entry)} must be finite for int8; {int((~values.isfinite()).sum())} are not")
    scales = torch.zeros(entry.scales, dtype=torch.float32, device="cpu")
    if entry.num_values:
        rows = torch.nn.functional.pad(values, (0, -entry.num_values % entry.block_of_values))
        # Of every maximum (each mantissa was tried) 127 * scale, rounded, which comes out, gives the same scale again.
        scales = (rows.view(entry.scales, -1).abs().amax(1) / 127).clamp(_LEAST_SCALE, _LARGEST_SCALE)
    steps = values / _scale_of_values(scales, entry)
    nearest, below = steps.round(), steps.floor()
    above = torch.rand(entry.num_values, generator=generator, dtype=torch.float32, device="cpu") < steps - below
    is_on_grid = (steps - nearest).abs() <= _ON_GRID * nearest.abs()  # the largest among them, which must not change
    return torch.where(is_on_grid, nearest, below + above).to(torch.int8), scales


def _scale_of_values(scales: Tensor, entry: Entry) -> Tensor:
    return scales.repeat_interleave(entry.block_of_values)[: entry.num_values]


# -- reading: every byte may be hostile -------------------------------------------------------------------------------


def _as_array(message: Any) -> np.ndarray:
    if isinstance(message, Message):
        return message.data
    if isinstance(message, Tensor):
        if message.dtype != torch.uint8 or message.dim() != 1 or message.device.type != "cpu":
            raise TypeError(f"message is {message.dtype} of shape {list(message.shape)}; expected 1-D uint8 on the CPU")
        message = message.numpy()
    try:
        return np.ascontiguousarray(np.frombuffer(message, np.uint8))
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(f"message is a {type(message).__name__}; expected bytes: {error}") from None


def _read(data: np.ndarray, max_bytes: int) -> tuple[bool, list[tuple[Entry, np.ndarray]]]:
    """The entries of a message and the bytes of each, once all of them are known to fit."""
    if data.size < _PREAMBLE.size:
        raise PackError(f"message has {data.size} bytes; the shortest has {_PREAMBLE.size}")
    magic, crc, version, flags, count, size, zero = _PREAMBLE.unpack(data[: _PREAMBLE.size].tobytes())
    if magic != _MAGIC:
        raise PackError(f"message begins with {magic!r}; expected {_MAGIC!r}")
    if version != _VERSION:
        raise PackError(f"message has version {version}; this library reads {_VERSION}")
    if size != data.size:
        raise PackError(f"message says that it has {size} bytes, and has {data.size}")
    computed = _crc32c(data[_CHECKED_FROM:])
    if crc != computed:
        raise PackError(f"message has the checksum {crc:#010x}; its bytes have {computed:#010x}")
    if flags not in (0, _NAMED) or zero or (count != 1 and not flags):
        raise PackError(f"message has flags {flags} and {count} tensors; without names it must have one")

    offset, dense_bytes, entries, names = _PREAMBLE.size, 0, [], set()
    for _ in range(count):
        entry, offset = _read_entry(data, offset)
        dense_bytes += entry.numel * max(entry.dtype.itemsize, entry.value_dtype.itemsize)
        if dense_bytes > max_bytes or math.prod(max(d, 1) for d in entry.shape) > max_bytes:
            raise PackError(f"{_of(entry)} of shape {list(entry.shape)} exceeds max_bytes = {max_bytes}")
        if entry.name in names or (entry.name and not flags):
            raise PackError(f"{_of(entry)}: the name occurs twice, or in a message without names")
        _check_sizes(entry)
        names.add(entry.name)
        entries.append(entry)
    needed = offset + sum(entry.payload_bytes for entry in entries)
    if needed != data.size:
        raise PackError(f"message has {data.size} bytes; its tensors need {needed}")
    parts = []
    for entry in entries:
        payload = data[offset : offset + entry.payload_bytes]
        positions, values = payload[: _padded(entry.index_bytes)], payload[_padded(entry.index_bytes) :]
        if positions[entry.index_bytes :].any() or values[entry.value_bytes :].any():
            raise PackError(f"{_of(entry)}: bytes between its parts are not zero")
        if entry.value_dtype == torch.int8 and (values[4 * entry.scales : entry.value_bytes] == 0x80).any():
            raise PackError(f"{_of(entry)}: an int8 value is -128; allowed: -127 to 127")
        parts.append((entry, payload))
        offset += payload.size
    return bool(flags), parts


def _read_entry(data: np.ndarray, begin: int) -> tuple[Entry, int]:
    """The entry at ``begin``, and where the next one begins."""
    if begin + _ENTRY.size > data.size:
        raise PackError(f"message ends at {data.size}, within the entry at {begin}")
    fields = _ENTRY.unpack(data[begin : begin + _ENTRY.size].tobytes())
    dtype, value_dtype, format, dims, name_bytes, count, mask_hash, index_bytes, block, zero = fields
    known = dtype in _DTYPES and value_dtype in _VALUE_DTYPES and format in _NAMES and dims <= _MAX_DIMS
    if not known or zero:
        raise PackError(
            f"entry at {begin} has unknown codes: dtypes {dtype}, {value_dtype}, format {format}, {dims} dims"
        )
    name_begin = begin + _ENTRY.size + 8 * dims
    end = begin + _padded(_ENTRY.size + 8 * dims + name_bytes)
    if end > data.size:
        raise PackError(f"message ends at {data.size}, within the entry at {begin}")
    if data[name_begin + name_bytes : end].any():
        raise PackError(f"entry at {begin}: the bytes behind its name are not zero")
    shape = struct.unpack(f"<{dims}Q", data[begin + _ENTRY.size : name_begin].tobytes())
    try:
        name = data[name_begin : name_begin + name_bytes].tobytes().decode()
    except UnicodeDecodeError as error:
        raise PackError(f"entry at {begin} has a name that is not UTF-8: {error}") from None
    types = _DTYPES[dtype], _VALUE_DTYPES[value_dtype]
    return Entry(name, shape, *types, _NAMES[format], count, mask_hash, index_bytes, block), end


def _check_sizes(entry: Entry) -> None:
    """Whether counts and sizes can be those of the shape; `_read_positions` finds whether they are."""
    n, count, size = entry.numel, entry.num_values, entry.index_bytes
    least, most = {
        "dense": (0, 0),
        "values": (0, 0),
        "bitmap": (-(-n // 8), -(-n // 8)),
        "hierarchical": (-(-n // 64), -(-n // 64) + min(count, -(-n // 8))),
        "delta8": (count, count + n // _ESCAPE),
        "block16": (4 * -(-n // _BLOCK) + 2 * count,) * 2,
    }[entry.format]
    if count > n or (entry.format == "dense" and count != n) or not least <= size <= most:
        raise PackError(f"{_of(entry)}: {count} values and {size} bytes of {entry.format} do not fit {n} elements")
    if entry.block and entry.value_dtype != torch.int8:
        raise PackError(f"{_of(entry)}: block is {entry.block} for {entry.value_dtype}; only int8 has blocks")


def _read_positions(entry: Entry, payload: np.ndarray, mask: Tensor | None) -> np.ndarray | None:
    """The bits of the mask; None for a dense message of a mask that is not known."""
    n = entry.numel
    bits: np.ndarray | None = None
    if mask is not None:
        bits, (count, mask_hash, *_) = mask_to_bits(_checked_mask(mask, entry.shape, entry.name))
        if mask_hash != entry.mask_hash or count != (entry.num_values if entry.format != "dense" else count):
            raise PackError(
                f"{_of(entry)}: the mask has {count} of {n} positions and hash {mask_hash:#018x}; the sender's has "
                f"{entry.num_values if entry.format != 'dense' else 'other ones'} and {entry.mask_hash:#018x}"
            )
    if entry.format == "values":
        if bits is None:
            raise PackError(f"{_of(entry)}: the message holds values only; give the mask of the sender as mask=")
    elif entry.format == "dense":
        if bits is None:
            bits = _all_ones(n)
            bits = bits if _summarize(bits, n)[1] == entry.mask_hash else None
    else:
        bits = _decode_positions(entry.format, payload[: entry.index_bytes], n)
        if bits is None or _summarize(bits, n)[:2] != (entry.num_values, entry.mask_hash):
            raise PackError(
                f"{_of(entry)}: its {entry.format} is not that of {entry.num_values} positions of this mask"
            )
    return bits


def _read_values(entry: Entry, raw: np.ndarray) -> Tensor:
    scales = torch.empty(entry.scales, dtype=torch.float32, device="cpu")
    bytes_of(scales)[:] = raw[: 4 * entry.scales]
    values = torch.empty(entry.num_values, dtype=entry.value_dtype, device="cpu")
    bytes_of(values)[:] = raw[4 * entry.scales : entry.value_bytes]
    if entry.value_dtype != torch.int8:
        return values
    return values.float() * _scale_of_values(scales, entry)


def _write_values(
    entry: Entry, raw: np.ndarray, bits: np.ndarray | None, tensor: Tensor, mode: str, alpha: float
) -> None:
    """Last of all: nothing here refuses anything."""
    flat = tensor.contiguous()
    n, aligned = entry.numel, raw.ctypes.data % entry.value_dtype.itemsize == 0
    if entry.format == "dense" and mode == "overwrite":
        flat.view(-1).copy_(_read_values(entry, raw))
    elif bits is not None:  # which it is here
        source = raw[: entry.value_bytes]
        if entry.format == "dense" or entry.value_dtype != flat.dtype or mode == "accumulate" or not aligned:
            values = _read_values(entry, raw)
            if entry.format == "dense":
                values = values[torch.from_numpy(_mask_of(bits, n))]
            if mode == "accumulate":
                before = torch.empty(values.numel(), dtype=flat.dtype, device="cpu")
                gather_values(flat, bits, n, bytes_of(before))
                values = before.add_(values, alpha=alpha)
            source = bytes_of(values.to(flat.dtype))
        scatter_values(source, bits, flat, keep=mode != "overwrite")
    if flat is not tensor:
        tensor.copy_(flat)


# -- C++, or numpy in its place: the same bytes ------------------------------------------------------------------------
# Of what lies on a GPU only bits and the values at them travel.


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _as_integers(tensor: Tensor) -> np.ndarray:
    """Elements that keep their bits whatever they mean."""
    return bytes_of(tensor).view(f"u{tensor.dtype.itemsize}")


def _all_ones(n: int) -> np.ndarray:
    bits = np.full(-(-n // 64), ~np.uint64(0))
    if n % 64:
        bits[-1] = (1 << n % 64) - 1
    return bits


def mask_to_bits(mask: Tensor) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    n = mask.numel()
    if cuda.available(mask.device):
        bits = BinaryMask.of(mask).words.cpu().numpy().view(np.uint64)
        return bits, _summarize(bits, n)
    if not native.available():
        bits = reference.mask_to_bits(mask.reshape(-1).numpy())
        return bits, reference.summarize_bits(bits, n)
    bits = np.empty(-(-n // 64), np.uint64)
    return bits, native.lib.mask_to_bits(mask.data_ptr(), n, bits.ctypes.data, torch.get_num_threads())


def _summarize(bits: np.ndarray, n: int) -> tuple[int, int, int, int]:
    if not native.available():
        return reference.summarize_bits(bits, n)
    return native.lib.summarize_bits(bits.ctypes.data, n, torch.get_num_threads())


def _mask_of(bits: np.ndarray, n: int) -> np.ndarray:
    if not native.available():
        return reference.bits_to_mask(bits, n)
    mask = np.empty(n, bool)
    native.lib.bits_to_mask(bits.ctypes.data, n, mask.ctypes.data, torch.get_num_threads())
    return mask


def _encode_positions(format: str, bits: np.ndarray, n: int, out: np.ndarray) -> None:
    if not native.available():
        out[:] = reference.encode_positions(format, bits, n)
    else:
        native.lib.encode_positions(FORMATS[format], bits.ctypes.data, n, out.ctypes.data, torch.get_num_threads())


def _decode_positions(format: str, data: np.ndarray, n: int) -> np.ndarray | None:
    if not native.available():
        return reference.decode_positions(format, data, n)
    bits, threads = np.empty(-(-n // 64), np.uint64), torch.get_num_threads()
    valid = native.lib.decode_positions(FORMATS[format], data.ctypes.data, data.size, n, bits.ctypes.data, threads)
    return bits if valid else None


def gather_values(dense: Tensor, bits: np.ndarray, n: int, out: np.ndarray) -> None:
    """Values of a contiguous tensor at the bits, as bytes."""
    size = dense.dtype.itemsize
    if cuda.available(dense.device):
        words, counts = _on_device(bits, n, dense.device)
        values = torch.empty(out.size // size, dtype=dense.dtype, device=dense.device)
        out[:] = bytes_of(cuda.gather_values(dense, words, counts, values).cpu())
    elif not native.available():
        out[:] = _as_integers(dense)[reference.bits_to_mask(bits, n)].view(np.uint8)
    else:
        threads = torch.get_num_threads()
        native.lib.gather_values(dense.data_ptr(), size, bits.ctypes.data, n, out.ctypes.data, threads)


def scatter_values(source: np.ndarray, bits: np.ndarray, dense: Tensor, keep: bool) -> None:
    """Bytes of values to the bits of a contiguous tensor; zeros elsewhere unless that is to be kept."""
    n, size = dense.numel(), dense.dtype.itemsize
    if cuda.available(dense.device):
        words, counts = _on_device(bits, n, dense.device)
        values = torch.empty(source.size // size, dtype=dense.dtype, device="cpu")
        bytes_of(values)[:] = source
        cuda.scatter_values(values.to(dense.device), words, counts, dense, keep=keep)
        return
    if not native.available():
        flat = _as_integers(dense)
        if not keep:
            flat[:] = 0
        flat[reference.bits_to_mask(bits, n)] = source.view(f"u{size}")
    else:
        threads = torch.get_num_threads()
        native.lib.scatter_values(source.ctypes.data, size, bits.ctypes.data, n, dense.data_ptr(), keep, threads)
    torch.autograd.graph.increment_version(dense)


def _on_device(bits: np.ndarray, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    words = torch.from_numpy(bits.view(np.int64)).to(device)
    return words, cuda.count_words(words, n)


def _crc32c(data: np.ndarray) -> int:
    if not native.available():
        return reference.crc32c(data)
    return native.lib.crc32c(data.ctypes.data, data.size, torch.get_num_threads())
