"""Sparse messages: round trips, the same bytes from every implementation, sizes, and what is refused."""

import math
import struct
import subprocess
import sys

import message_format
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from message_format import signed
from torch import nn

import sparsebilevel as sb
from sparsebilevel import PackError, pack, unpack
from sparsebilevel.kernels import native, reference
from sparsebilevel.kernels.pack import FORMATS

INDEXED = ["bitmap", "hierarchical", "delta8", "block16"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DENSITIES = [0, 0.001, 0.02, 0.1, 0.5, 0.98, 1]
CORPUS = list(message_format.seeds())
SHAPES = [(), (0,), (3, 0, 2), (1,), (63,), (64,), (8, 5, 3, 3), (70_001,)]

needs_native = pytest.mark.skipif(not native.available(), reason=f"C++ extension: {native.reason}")


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(native, "lib", None)
    elif not native.available():
        pytest.skip(f"C++ extension: {native.reason}")
    return request.param


def same(a, b):
    """Equal bits, NaNs and signs of zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def drawn(shape, density, dtype=torch.float32):
    values = torch.randn(shape).to(dtype)
    return values, torch.rand(shape) < density


def masked(values, mask):
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trips(shape, dtype, backend):
    for density in DENSITIES:
        values, mask = drawn(shape, density, dtype)
        for format in ("auto", *FORMATS):
            message = pack(values, mask, format)
            known = mask if message.entries[0].format in ("values", "dense") else None
            data = bytes(message)
            for sent in (message, data, bytearray(data), torch.frombuffer(bytearray(data), dtype=torch.uint8)):
                tensor, found = unpack(sent, known, return_mask=True)
                assert same(tensor, masked(values, mask))
                assert torch.equal(found, mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_values_survive(dtype, backend):
    special = torch.tensor([math.nan, -math.nan, -0.0, math.inf, 1e-45, 65504.0]).to(dtype).repeat(40)
    mask = torch.rand(240) < 0.5
    assert same(unpack(pack(special, mask, "bitmap")), masked(special, mask))


def test_strides_do_not_matter(backend):
    values, mask = torch.randn(4, 6, 5, 5), torch.rand(4, 6, 5, 5) < 0.3
    message = bytes(pack(values, mask))
    other = values.to(memory_format=torch.channels_last)
    assert bytes(pack(other, mask.to(memory_format=torch.channels_last))) == message
    assert bytes(pack(values.permute(3, 1, 0, 2).permute(2, 1, 3, 0), mask)) == message
    for mode in ("overwrite", "scatter", "accumulate"):
        out, expected = torch.ones_like(other), torch.ones(4, 6, 5, 5)
        unpack(message, out=out, mode=mode)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert same(out, unpack(message, out=expected, mode=mode))


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (3, 2)), ((4, 1, 3), (7, 0, 2)), ((3, 4), (1, 10))])
def test_elements_apart_are_written_whatever_their_strides(shape, strides, backend):
    values = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    memory = torch.zeros(40)
    out = memory.as_strided(shape, strides)
    unpack(pack(values), out=out)
    assert torch.equal(out, values)
    assert memory.count_nonzero() == values.numel()


@pytest.mark.parametrize("out_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes(dtype, out_dtype, backend):
    for density in (0, 0.1, 0.97, 1):
        values, mask = drawn((30, 50), density, dtype)
        for format in ("auto", "values", "dense", "delta8"):
            message = pack(values, mask, format)
            start = torch.randn(30, 50).to(out_dtype)

            out = start.clone()
            version = out._version
            assert unpack(message, mask, out=out) is out
            assert same(out, masked(values, mask).to(out_dtype))
            assert out._version > version

            out = start.clone()
            unpack(message, mask, out=out, mode="scatter")
            assert same(out, torch.where(mask, values.to(out_dtype), start))

            for alpha in (1.0, 0.25):
                out, expected = start.clone(), start.clone()
                unpack(message, mask, out=out, mode="accumulate", alpha=alpha)
                expected[mask] = expected[mask].add_(values[mask], alpha=alpha)
                assert same(out, expected)


def test_unpacks_into_a_parameter(backend):
    weight = nn.Parameter(torch.ones(10))
    unpack(pack(torch.arange(10.0), torch.arange(10) < 4), out=weight)
    assert weight.tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0, 0]
    assert weight.requires_grad


def test_values_can_travel_in_fewer_bits(backend):
    values, mask = drawn((100, 100), 0.1)
    message = pack(values, mask, dtype=torch.bfloat16)
    assert message.entries[0].value_bytes == 2 * int(mask.sum())
    assert same(unpack(message), masked(values.bfloat16().float(), mask))


@pytest.mark.parametrize("block", [0, 1, 16, 1000, 2**32 - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_one_step_and_repeatable(block, dtype, backend):
    values, mask = drawn((50, 70), 0.2, dtype)
    first, second = (
        pack(values, mask, "bitmap", dtype=torch.int8, block=block, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert bytes(first) == bytes(second)
    result = unpack(first)
    assert result.dtype == dtype
    sent = values[mask].float()
    rows = sent[None]
    if 0 < block < sent.numel():
        rows = nn.functional.pad(sent, (0, -sent.numel() % block)).view(-1, block)
    step = (rows.abs().amax(1) / 127).repeat_interleave(rows.shape[1])[: sent.numel()]
    assert ((result[mask].float() - sent).abs() <= step * (1 + 1e-5) + sent.abs() * torch.finfo(dtype).eps).all()
    assert not result[~mask].any()


def test_int8_does_not_depend_on_the_default_dtype(backend):
    values, mask = drawn((50, 70), 0.2, torch.float32)
    messages = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            messages.append(pack(values, mask, dtype=torch.int8, generator=torch.Generator().manual_seed(3)))
            assert unpack(messages[-1]).dtype == torch.float32
            assert bytes(pack(unpack(messages[-1]), mask, dtype=torch.int8)) == bytes(messages[-1])
        finally:
            torch.set_default_dtype(torch.float32)
    assert bytes(messages[0]) == bytes(messages[1])


def test_int8_rounds_without_bias():
    values = torch.linspace(-1, 1, 101)
    generator = torch.Generator().manual_seed(0)
    mean = sum(unpack(pack(values, dtype=torch.int8, generator=generator)) for _ in range(400)) / 400
    assert (mean - values).abs().max() < 5 * (0.5 / 127) / math.sqrt(400)


@pytest.mark.parametrize("rounding", [0.0, 1 - 2.0**-24])
@pytest.mark.parametrize("block", [0, 7, 64])
def test_int8_values_on_the_grid_stay(block, rounding, monkeypatch):
    """Whatever the random numbers, and whatever the scale."""
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        values = torch.randn(500, generator=generator) * 2.0 ** (5 * i - 120)
        once = unpack(pack(values, dtype=torch.int8, block=block, generator=generator))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda n, **_: torch.full((n,), rounding))
            assert same(unpack(pack(once, dtype=torch.int8, block=block)), once)


def test_int8_of_the_largest_and_smallest_numbers():
    largest = torch.finfo(torch.float32).max
    found = unpack(pack(torch.tensor([largest, 1.0, -largest]), dtype=torch.int8))
    assert found.isfinite().all()
    assert found.tolist() == pytest.approx([largest, 0, -largest], rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    for value in (1e-37, 3e-40):
        values = torch.full((100_000,), value)
        mean = unpack(pack(values, dtype=torch.int8, generator=generator)).double().mean()
        error = 0.5 * torch.finfo(torch.float32).tiny / math.sqrt(100_000)  # of a mean of steps of the least scale
        assert abs(mean - value) < 5 * error


def test_int8_of_zeros_and_nothing(backend):
    for n in (0, 10):
        assert same(unpack(pack(torch.zeros(n), dtype=torch.int8)), torch.zeros(n))
    with pytest.raises(PackError, match=r"values of tensor must be finite for int8; 1 are not"):
        pack(torch.tensor([1.0, math.nan]), dtype=torch.int8)


def test_names(backend):
    tensors = {"a": torch.randn(40, 3), "b": torch.randn(7).half(), "ünï.weight": torch.randn(())}
    masks = {"a": torch.rand(40, 3) < 0.2}
    message = pack(tensors, masks)
    result, found = unpack(bytes(message), return_mask=True)
    assert list(result) == list(tensors)
    assert same(result["a"], masked(tensors["a"], masks["a"]))
    assert same(result["b"], tensors["b"])
    assert torch.equal(found["a"], masks["a"])
    assert found["b"].all()
    out = {name: torch.ones_like(t) for name, t in tensors.items()} | {"more": torch.ones(2)}
    unpack(message, out=out)
    assert same(out["a"], result["a"])
    assert out["more"].eq(1).all()
    assert unpack(pack({})) == {}


def test_models(backend):
    def model():
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
        return sb.sparsify(network, 0.5, seed=0)

    torch.manual_seed(1)
    sender, receiver = model(), model()
    bias = receiver[0].bias.clone()
    for format in ("auto", "values"):
        message = pack(sender, format=format)
        assert [entry.name for entry in message.entries] == ["0.weight", "3.weight"]
        unpack(message, out=receiver)
        for ours, theirs in ((receiver[0], sender[0]), (receiver[3], sender[3])):
            assert same(ours.weight, theirs.effective_weight())
    assert torch.equal(receiver[0].bias, bias)
    # New masks reach a model that has others; values alone do not.
    receiver[0].set_mask(~receiver[0].mask)
    unpack(pack(sender), out=receiver)
    with pytest.raises(PackError, match=r"tensor '0.weight': the mask has 108 of 216 positions and hash"):
        unpack(pack(sender, format="values"), out=receiver)


def test_all_of_a_model_travels_as_a_mapping(backend):
    """As the docstring of pack says: masked weights at their masks, everything else whole."""

    def model(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
        nn.init.normal_(network[1].running_mean)
        return sb.sparsify(network, 0.9, seed=0, exclude=["3"])

    sender, receiver = model(1), model(2)
    floating = {name: t for name, t in sender.state_dict().items() if t.is_floating_point()}
    message = pack(floating, sender)
    assert [e.name for e in message.entries if e.format != "dense"] == ["0.weight"]
    unpack(message, out=receiver.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(receiver.eval()(x), sender.eval()(x))


def test_a_model_without_masks_is_refused():
    with pytest.raises(ValueError, match=r"values is a Linear without masks, .*give a mapping: \{name: t for name"):
        pack(nn.Linear(3, 2))


# -- sizes ------------------------------------------------------------------------------------------------------------

# Sparsity -> bits of index for each element: the best of the simple formats on random masks.
BEST = {0.5: 1.0, 0.8: 0.957, 0.9: 0.695, 0.95: 0.40, 0.98: 0.161, 0.99: 0.087, 0.999: 0.016}


@pytest.mark.parametrize("sparsity", BEST)
def test_auto_is_as_small_as_the_best_simple_format(sparsity):
    n = 1 << 20
    values, mask = drawn((n,), 1 - sparsity)
    (entry,) = pack(values, mask, dtype=torch.bfloat16).entries
    assert 8 * entry.index_bytes / n <= 1.08 * BEST[sparsity]


@given(st.integers(0, 3000), st.floats(0, 1), st.sampled_from([*DTYPES, torch.int8]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_never_larger_than_dense(n, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values, mask = torch.randn(n, generator=generator), torch.rand(n, generator=generator) < density
    message = pack(values, mask, dtype=dtype)
    others = [pack(values, mask, format, dtype=dtype) for format in (*INDEXED, "dense")]
    assert len(message) == min(map(len, others))


# -- every implementation writes the same bytes and reads them alike ---------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_all_implementations_agree(isa, monkeypatch):
    cases = []
    for n in (1, 70_001, 300_007):
        for density in (0, 0.0005, 0.03, 0.3, 1):
            values, mask = drawn((n,), density)
            if n > 1 and density == 0.03:
                mask[: n // 2] = False  # parts without a position
            dtype = DTYPES[len(cases) % 3]
            cases.append((values.to(dtype), mask, dtype))
    lib, before, threads = native.lib, native.lib.isa(), torch.get_num_threads()
    try:
        lib.set_isa(lib.Isa.__members__[isa])
        for values, mask, dtype in cases:
            for format in FORMATS:
                monkeypatch.setattr(native, "lib", None)
                expected = bytes(pack(values, mask, format))
                monkeypatch.setattr(native, "lib", lib)
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    assert bytes(pack(values, mask, format)) == expected
                    assert same(unpack(expected, mask), masked(values, mask))
                    out = torch.ones(values.shape, dtype=dtype)
                    unpack(expected, mask, out=out, mode="scatter")
                    assert same(out, torch.where(mask, values, torch.ones((), dtype=dtype)))
    finally:
        lib.set_isa(before)
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_checksum(isa):
    before = native.lib.isa()
    native.lib.set_isa(native.lib.Isa.__members__[isa])
    try:
        for size in (0, 1, 7, 8, 9, 255, 256, 1023, 1024, 1031, 5000, 1 << 20):
            data = np.frombuffer(np.random.default_rng(size).bytes(size + 1), np.uint8)[1:]  # not aligned
            for threads in (1, 3):
                assert native.lib.crc32c(data.ctypes.data, size, threads) == reference.crc32c(data)
    finally:
        native.lib.set_isa(before)
    assert reference.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


@needs_native
def test_large_tensors_are_written_past_the_caches():
    values, mask = drawn((1 << 21) + 77, 0.1)  # 8 MiB, from where on stores stream
    out = torch.full((mask.numel() + 1,), 7.0)
    for offset in (0, 1):  # aligned and not
        unpack(pack(values, mask), out=out[offset : offset + mask.numel()])
        assert same(out[offset : offset + mask.numel()], masked(values, mask))
    assert out[0] == masked(values, mask)[0]


def test_a_message_written_by_hand(backend):
    """docs/message-format.md, followed to the letter."""
    body = struct.pack("<HHIQQ", 1, 0, 1, 104, 0)
    words = [0b10010]
    hash = 0
    for i, word in enumerate(words):
        x = word ^ (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        hash = (hash + (x ^ x >> 31)) % 2**64
    body += struct.pack("<BBBBIQQQII", 1, 1, 4, 2, 0, 2, hash, 2, 0, 0) + struct.pack("<QQ", 2, 3)
    body += bytes([1, 2]).ljust(8, b"\0") + struct.pack("<ff", 1.5, -2.0)
    message = signed(b"SBPK\0\0\0\0" + body)
    expected = torch.tensor([[0, 1.5, 0], [0, -2.0, 0]])
    assert torch.equal(unpack(message), expected)
    assert bytes(pack(expected, expected != 0, "delta8")) == message


# -- hostile messages -------------------------------------------------------------------------------------------------


def some_messages():
    values, mask = drawn((37, 11), 0.2)
    for format in FORMATS:
        yield bytes(pack(values, mask, format)), mask
    yield bytes(pack(values, mask, dtype=torch.int8, block=10)), mask
    yield bytes(pack({"a": values.half(), "b": values}, {"a": mask})), {"a": mask}


def test_every_flipped_bit_and_every_truncation_is_found(backend):
    for message, mask in some_messages():
        step = 1 if backend == "native" else 41
        for bit in range(0, 8 * len(message), step):
            data = bytearray(message)
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(PackError):
                unpack(data, mask)
        for size in range(0, len(message), step):
            with pytest.raises(PackError):
                unpack(message[:size], mask)
        with pytest.raises(PackError, match="says that it has"):
            unpack(message + b"\0", mask)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(range(len(CORPUS))), st.integers(0, 2**32 - 1))
def test_mutated_messages_mean_to_us_what_they_mean_to_another_reader(which, seed):
    """Refused by both, with nothing written, or the same tensors; see message_format.py."""
    message, mask = CORPUS[which]
    message_format.check(message_format.mutate(message, np.random.default_rng(seed)), mask)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_another_reader_reads_our_messages(dtype, format, backend):
    for n in (0, 1, 64, 65, 4001):
        for density in (0, 0.002, 0.1, 1):
            values, mask = drawn((n,), density)
            message = bytes(pack(values, mask, format, dtype=dtype, block=7))
            known = mask if format == "values" else None
            _, tensors = message_format.read(message, known)
            assert same(tensors[""][0], unpack(message, known))
            assert dtype != torch.float32 or same(tensors[""][0], masked(values, mask))
            assert tensors[""][1] is None or torch.equal(tensors[""][1], mask)


@needs_native
@pytest.mark.slow
def test_many_mutated_messages():
    command = [sys.executable, message_format.__file__, "--count", "100000"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("100000 messages")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(INDEXED), st.integers(0, 300), st.binary(max_size=80))
def test_arbitrary_positions(format, n, data):
    """Both readers accept the same bytes, and only those that are written for what they read."""
    data = np.frombuffer(data, np.uint8)
    expected = reference.decode_positions(format, data, n)
    if expected is not None:
        assert reference.encode_positions(format, expected, n).tobytes() == data.tobytes()
    if native.available():
        bits = np.empty(-(-n // 64), np.uint64)
        valid = native.lib.decode_positions(FORMATS[format], data.ctypes.data, data.size, n, bits.ctypes.data, 2)
        assert valid == (expected is not None)
        assert not valid or np.array_equal(bits, expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1 << 40,), r"of shape \[1099511627776\] exceeds max_bytes = 4294967296"), ((0, 1 << 63), "exceeds max_bytes")],
)
def test_a_small_message_cannot_ask_for_much_memory(shape, message):
    forged = bytearray(bytes(pack(torch.zeros([0] * len(shape)), torch.zeros([0] * len(shape)).bool(), "delta8")))
    forged[72 : 72 + 8 * len(shape)] = struct.pack(f"<{len(shape)}Q", *shape)
    with pytest.raises(PackError, match=message):
        unpack(signed(forged))


def test_the_limit_is_the_callers():
    message = pack(torch.ones(100), torch.arange(100) < 5)
    with pytest.raises(PackError, match=r"tensor of shape \[100\] exceeds max_bytes = 399"):
        unpack(message, max_bytes=399)
    unpack(message, max_bytes=400)
    two = pack({"a": torch.ones(100), "b": torch.ones(100)})
    with pytest.raises(PackError, match=r"tensor 'b' of shape \[100\] exceeds max_bytes = 700"):
        unpack(two, max_bytes=700)


def test_nothing_is_half_written(backend):
    values, mask = torch.randn(50), torch.rand(50) < 0.5
    message = pack({"a": values, "b": values}, {"a": mask, "b": mask}, "values")
    out = {"a": torch.ones(50), "b": torch.ones(50)}
    for masks in ({"a": mask, "b": ~mask}, {"a": mask}):
        with pytest.raises(PackError):
            unpack(message, masks, out=out)
    with pytest.raises(PackError):
        unpack(message, {"a": mask, "b": mask}, out={"a": out["a"], "b": torch.ones(49)})
    assert out["a"].eq(1).all()
    assert out["b"].eq(1).all()


def test_refusals():
    values, mask = torch.randn(6, 2), torch.rand(6, 2) < 0.5
    for arguments, match in [
        (
            (values, mask, "zip"),
            r"format is 'zip'; allowed: auto, dense, values, bitmap, hierarchical, delta8, block16",
        ),
        ((values.double(), mask), r"values is torch.float64; allowed: float32, float16, bfloat16"),
        ((values, mask[:5]), r"mask has shape \[5, 2\]; the tensor has \[6, 2\]"),
        ((values, mask.float()), r"mask is torch.float32; expected torch.bool"),
        ((values.to("meta"), mask), r"values is torch.strided on meta; expected torch.strided on cpu"),
        (({"a": values}, {"b": mask}), r"mask has 'b', which values has not; that has: a"),
    ]:
        with pytest.raises(PackError, match=match):
            pack(*arguments)
    with pytest.raises(PackError, match=r"dtype is torch.int32; allowed: float32, float16, bfloat16, int8"):
        pack(values, mask, dtype=torch.int32)
    for block in (-1, 1.5, None):
        with pytest.raises(
            PackError, match=rf"block={block} is not allowed; expected a whole number, from 0 to 4294967"
        ):
            pack(values, mask, block=block)
    for nothing in ([1.0], None):
        with pytest.raises(TypeError, match=r"values is .*; expected a tensor, a mapping of tensors or a model"):
            pack(nothing)
    with pytest.raises(TypeError, match=r"message is a str; expected bytes"):
        unpack("SBPK")
    message = pack(values, mask, "bitmap")
    for keywords, match in [
        ({"mode": "add"}, r"mode is 'add'; allowed: overwrite, accumulate, scatter"),
        ({"mode": "scatter"}, r"mode 'scatter' changes a tensor that exists: give it as out="),
        ({"alpha": 2.0}, r"alpha is 2.0, which only the mode 'accumulate' uses, and mode is 'overwrite'"),
        ({"out": values[:3]}, r"out for tensor is torch.float32 of shape \[3, 2\]; the message needs .* \[6, 2\]"),
        ({"out": mask}, r"out for tensor is torch.bool of shape"),
        ({"out": torch.zeros(1, 2).expand(6, 2)}, r"out for tensor has elements that share memory"),
        ({"out": torch.zeros(8).as_strided((6, 2), (1, 1))}, r"share memory \(shape \[6, 2\], strides \[1, 1\]\)"),
        ({"out": torch.zeros(15).as_strided((6, 2), (2, 4))}, r"share memory"),
        ({"out": {"a": values}}, r"out is a dict; the message holds one tensor"),
        ({"mask": ~mask}, r"tensor: the mask has \d+ of 12 positions and hash"),
    ]:
        with pytest.raises(PackError, match=match):
            unpack(message, **keywords)
    with pytest.raises(PackError, match=r"the message holds values only; give the mask of the sender as mask="):
        unpack(pack(values, mask, "values"))
    with pytest.raises(PackError, match=r"the message is dense and does not tell the mask; give it as mask="):
        unpack(pack(values, mask, "dense"), out=values, mode="scatter")
    with pytest.raises(PackError, match=r"message begins with b'ZIPP'; expected b'SBPK'"):
        unpack(b"ZIPP" + bytes(message)[4:])
    with pytest.raises(PackError, match=r"message has version 2; this library reads 1"):
        unpack(signed(bytes(message)[:8] + b"\2" + bytes(message)[9:]))
    assert issubclass(PackError, ValueError)


def test_masks_that_are_not_those_of_the_message():
    scores = torch.randn(8, 8)
    mask = scores > 1
    named = pack({"fc.weight": scores}, {"fc.weight": mask})
    with pytest.raises(PackError, match="mask has no 'fc.weight', which the message has at positions; mask has: mod"):
        unpack(named, {"module.fc.weight": mask})
    with pytest.raises(PackError, match="mask is a Tensor; the message holds named tensors"):
        unpack(named, mask)
    with pytest.raises(PackError, match="mask is a dict; the message holds one tensor"):
        unpack(pack(scores, mask), {"fc.weight": mask})


def test_tensors_are_made_on_the_cpu_whatever_the_default_device_is():
    scores = torch.randn(8, 8)
    with torch.device("meta"):
        for message in (pack(scores, scores > 1), pack(scores)):
            got = unpack(message)
            assert got.device.type == "cpu"


def test_nothing_is_added_twice_to_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    message = pack({name: torch.ones(4, 4) for name in model.state_dict()})
    with pytest.raises(PackError, match=r"out has '0.weight' and '1.weight' in the same memory, .* would add twice"):
        unpack(message, out=model.state_dict(), mode="accumulate")
    assert torch.equal(model[0].weight, before)
    unpack(message, out=model.state_dict())
    sb.sparsify(model, 0.5)
    message = pack(model)
    assert [entry.name for entry in message.entries] == ["0.weight"]
    values = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    assert [entry.num_values for entry in pack(values, model).entries] == [8, 8]  # both names are masked
    weight = model[0].weight.detach().clone()
    unpack(message, out=model, mode="accumulate")
    assert torch.equal(model[0].weight, torch.where(model[0].mask, 2 * weight, weight))


def test_buffers_called_mask_of_other_modules():
    model = nn.Linear(16, 48)
    attention = nn.Module()
    attention.qkv = model
    attention.register_buffer("mask", torch.ones(5, 5).tril().bool())  # causal
    sb.sparsify(attention, 0.5)
    message = pack(attention)
    assert [entry.name for entry in message.entries] == ["qkv.weight"]
    attention.qkv.weight.data.zero_()
    unpack(message, out=attention)
    assert attention.qkv.weight.count_nonzero() == 384


@pytest.mark.parametrize("format", ["bitmap", "dense"])
def test_max_bytes_is_that_of_the_tensors_and_not_of_the_message(format):
    """int8 values become float32: the message is a quarter of what it unpacks to."""
    message = pack(torch.ones(100), format=format, dtype=torch.int8)
    with pytest.raises(PackError, match=r"tensor of shape \[100\] exceeds max_bytes = 399"):
        unpack(message, max_bytes=399)
    assert unpack(message, max_bytes=400).numel() == 100
