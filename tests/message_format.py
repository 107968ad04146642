"""A second reader of sparse messages, written from docs/message-format.md with struct and numpy, and a fuzzer of both.

    python tests/message_format.py --count 1000000     # mutated messages; no more than --seconds

Of every mutated message both readers must say the same: refused, or these tensors and masks, bit for bit. Memory is
limited, and a message that takes seconds ends the run.
"""

import argparse
import faulthandler
import math
import resource
import struct
import time

import numpy as np
import torch

from sparsebilevel import PackError, pack, unpack
from sparsebilevel.kernels import native, reference

DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
ITEMSIZE = {1: 4, 2: 2, 3: 2, 4: 1}
LIMIT = 1 << 16  # max_bytes


def require(condition):
    if not condition:
        raise ValueError("not a message")


def padded(size):
    return (size + 7) // 8 * 8


def hash_of(mask):
    words = np.frombuffer(
        np.packbits(mask, bitorder="little").tobytes().ljust(padded(-(-mask.size // 8)), b"\0"), "<u8"
    )
    total = 0
    for i, word in enumerate(words.tolist()):
        x = word ^ ((i + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        total += x ^ x >> 31
    return total % 2**64


def positions_of(code, data, n):
    """The mask that the bytes of a format name."""
    mask = np.zeros(n, bool)
    if code in (2, 3):
        if code == 3:
            words = -(-n // 64)
            require(len(data) >= words)
            present = np.unpackbits(np.frombuffer(data[:words], np.uint8), bitorder="little").astype(bool)
            there = np.frombuffer(data[words:], np.uint8)
            require(there.all() and there.size == present.sum() and not present[-(-n // 8) :].any())
            groups = np.zeros(present.size, np.uint8)
            groups[present] = there
            data = groups[: -(-n // 8)].tobytes()
        require(len(data) == -(-n // 8))
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        require(not bits[n:].any())
        mask = bits[:n].astype(bool)
    elif code == 4:
        at = 0
        for i, byte in enumerate(data):
            at += byte
            if byte == 255:
                require(i + 1 < len(data))
                continue
            require(at < n)
            mask[at] = True
            at += 1
    else:
        blocks = -(-n // 65536)
        require(len(data) >= 4 * blocks)
        counts = struct.unpack_from(f"<{blocks}I", data)
        require(len(data) == 4 * blocks + 2 * sum(counts))
        offset = 4 * blocks
        for block, count in enumerate(counts):
            inside = struct.unpack_from(f"<{count}H", data, offset)
            offset += 2 * count
            require(all(a < b for a, b in zip(inside, inside[1:], strict=False)))
            require(not inside or block * 65536 + inside[-1] < n)
            mask[[block * 65536 + p for p in inside]] = True
    return mask


def values_of(code, data):
    if code == 3:
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {1: "<f4", 2: "<f2", 4: "i1"}[code]).astype(np.float32)


def read(message, known_mask=None):
    """``(named, {name: (tensor, mask)})``; mask None where the message does not tell; ValueError."""
    require(len(message) >= 32)
    magic, crc, version, flags, tensors, size, zero = struct.unpack_from("<4sIHHIQQ", message)
    require(magic == b"SBPK" and version == 1 and flags in (0, 1) and zero == 0 and size == len(message))
    require(crc == checksum(message[8:]) and (flags or tensors == 1))
    require(known_mask is None or not flags)  # one mask for named tensors
    entries, offset, dense_bytes = [], 32, 0
    for _ in range(tensors):
        require(offset + 40 <= size)
        dtype, sent, code, dims, name_bytes, count, hash, index_bytes, block, zero = struct.unpack_from(
            "<BBBBIQQQII", message, offset
        )
        end = offset + padded(40 + 8 * dims + name_bytes)
        require(dtype in DTYPES and sent in ITEMSIZE and code <= 5 and dims <= 64 and zero == 0 and end <= size)
        shape = struct.unpack_from(f"<{dims}Q", message, offset + 40)
        name_at = offset + 40 + 8 * dims
        name = message[name_at : name_at + name_bytes].decode()  # UnicodeDecodeError is a ValueError
        require(not any(message[name_at + name_bytes : end]) and (flags or not name))
        n = math.prod(shape)
        dense_bytes += n * max(ITEMSIZE[dtype], ITEMSIZE[sent])
        require(dense_bytes <= LIMIT and math.prod(max(d, 1) for d in shape) <= LIMIT)
        require(count <= n and (code != 0 or count == n) and (sent == 4 or block == 0) and name not in dict(entries))
        require(code > 1 or index_bytes == 0)
        entries.append((name, (dtype, sent, code, shape, n, count, hash, index_bytes, block)))
        offset = end
    result = {}
    for name, (dtype, sent, code, shape, n, count, hash, index_bytes, block) in entries:
        scales = 0 if sent != 4 else -(-count // block) if block else min(count, 1)
        begin = offset + padded(index_bytes)
        end = begin + 4 * scales + count * ITEMSIZE[sent]
        require(padded(end) <= size)
        require(not any(message[offset + index_bytes : begin]) and not any(message[end : padded(end)]))
        known = None if name else known_mask
        mask = None if known is None else known.numpy().reshape(-1)
        require(known is None or tuple(known.shape) == shape)
        if code == 1:
            require(mask is not None)
        elif code > 1:
            mask = positions_of(code, message[offset : offset + index_bytes], n)
            require(known is None or (mask == known.numpy().reshape(-1)).all())
        elif mask is None and hash_of(np.ones(n, bool)) == hash:
            mask = np.ones(n, bool)
        require(mask is None or hash_of(mask) == hash)
        require(code == 0 or mask.sum() == count)
        values = values_of(sent, message[begin + 4 * scales : end])
        if sent == 4:
            require(not (values == -128).any())
            of = np.frombuffer(message[begin : begin + 4 * scales], "<f4")
            with np.errstate(all="ignore"):
                values = values * of[np.arange(count) // (block or max(count, 1))]
        dense = np.zeros(n, np.float32)
        dense[slice(None) if code == 0 else mask] = values
        tensor = torch.from_numpy(dense).to(DTYPES[dtype]).reshape(shape)
        result[name] = tensor, None if mask is None else torch.from_numpy(mask).reshape(shape)
        offset = padded(end)
    require(offset == size)
    return bool(flags), result


def checksum(data):
    data = np.frombuffer(bytes(data), np.uint8)
    return native.lib.crc32c(data.ctypes.data, data.size, 1) if native.available() else reference.crc32c(data)


def signed(message):
    """The message with the checksum that its bytes ask for, as a hostile sender has it."""
    return bytes(message[:4]) + struct.pack("<I", checksum(message[8:])) + bytes(message[8:])


def same_values(a, b):
    """Equal bits; any NaN equals any, since conversions may change its payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nans = a.isnan() & b.isnan()
    integer = torch.int32 if a.itemsize == 4 else torch.int16
    a, b = (x.contiguous().view(-1).view(integer) for x in (a, b))
    return bool(((a == b) | nans.reshape(-1)).all())


def check(message, mask=None):
    """Both readers on one message. True where they accept it."""
    try:
        named, expected = read(message, mask)
    except ValueError:
        named, expected = False, None
    try:
        found = unpack(message, mask, max_bytes=LIMIT)
    except PackError:
        assert expected is None, "unpack refuses a message that the format allows"
        out = torch.full((37, 11), 7.0)
        try:
            unpack(message, mask, out=out, max_bytes=LIMIT)
        except PackError:
            assert out.eq(7).all(), "a refused message was written"
            return False
        raise AssertionError("a message is refused without out=, and not with it") from None
    assert expected is not None, "unpack accepts what the format does not allow"
    assert isinstance(found, dict) == named
    found = found if named else {"": found}
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert same_values(tensor, expected[name][0]), name
    if all(mask is not None for _, mask in expected.values()):
        _, masks = unpack(message, mask, max_bytes=LIMIT, return_mask=True)
        masks = masks if named else {"": masks}
        assert all(torch.equal(masks[name], mask) for name, (_, mask) in expected.items())
    return True


def seeds():
    """Messages to start from, and the mask that a receiver knows."""
    torch.manual_seed(0)
    values = torch.randn(37, 11)
    for density in (0.02, 0.2, 0.9):
        mask = torch.rand(37, 11) < density
        for format in ("dense", "values", "bitmap", "hierarchical", "delta8", "block16"):
            message = bytes(pack(values, mask, format))
            yield message, None
            yield message, mask
        for format in ("delta8", "values"):
            yield bytes(pack(values, mask, format, dtype=torch.int8, block=10)), mask
            yield bytes(pack(values.bfloat16(), mask, format)), mask
        masks = {"a": mask, "c": torch.rand(5) < 0.5}
        yield bytes(pack({"a": values.half(), "b": values[:0], "c": values[0, :5]}, masks)), None


NUMBERS = (0, 1, 2**15, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 407, 408)
EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 127, 128, 254, 255)


def mutate(message, rng):
    """Some damage, most of it where the header lies; two times in three with a right checksum."""
    data = bytearray(message)
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.integers(7)
        at = int(rng.integers(0, min(len(data), 100 if rng.random() < 0.6 else len(data)) or 1))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 1 and data:
            data[at % len(data)] = EDGES[rng.integers(len(EDGES))]
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 10))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 10)))
        elif kind == 4:
            width = int(rng.choice([2, 4, 8]))
            number = int(rng.choice([0, 1, 2**15, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 407, 408])) % 2 ** (
                8 * width
            )
            at -= at % width
            data[at : at + width] = number.to_bytes(width, "little")
        elif kind == 5:
            other = int(rng.integers(0, len(data) or 1))
            length = int(rng.integers(1, 17))
            data[at : at + length] = data[other : other + length]
        else:
            del data[int(rng.integers(0, len(data) + 1)) :]
    if rng.random() < 0.7 and len(data) >= 24:
        data[16:24] = struct.pack("<Q", len(data))
    return signed(data) if rng.random() < 0.67 and len(data) >= 8 else bytes(data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, start, accepted, done = np.random.default_rng(args.seed), time.monotonic(), 0, 0
    corpus = list(seeds())
    for message, mask in corpus:
        assert check(message, mask) or mask is None  # values without the mask
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    for done in range(1, args.count + 1):
        if done % 1000 == 1:
            faulthandler.dump_traceback_later(30, exit=True)
        original, mask = corpus[rng.integers(len(corpus))]
        message = mutate(original, rng)
        try:
            accepted += check(message, mask)
        except BaseException:
            print(f"message {done}: {message.hex()}, mask given: {mask is not None}")
            raise
        if time.monotonic() - start > args.seconds:
            break
    faulthandler.cancel_dump_traceback_later()
    print(f"{done} messages, {accepted} accepted by both readers, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
