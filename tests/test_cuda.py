"""The CUDA kernels, exactly as they are written, on the CPU (tests/csrc/cuda_emulation.h and hopper_emulation.h); what
nvcc makes of them; and, where there is a GPU, the same results there."""

import contextlib
import ctypes
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsebilevel as sb
from sparsebilevel.distributed import SparseAllReduce
from sparsebilevel.kernels import (
    BinaryMask,
    binarize,
    block_sparse,
    cuda,
    cuda_block_sparse,
    cuda_weight_grad,
    dispatch,
    gpu,
    reference,
)
from sparsebilevel.kernels.block_sparse import BlockLayout, pair_list
from sparsebilevel.kernels.pack import pack, unpack

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATION = ROOT / "tests" / "csrc" / "hopper_emulation.h"  # and cuda_emulation.h
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VALUES = [-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.0, math.inf]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
needs_library = pytest.mark.skipif(cuda.load()[0] is None, reason=f"CUDA library: {cuda.load()[1]}")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels compiled for their emulation."""
    found = filter(None, map(shutil.which, ("g++", "clang++", "c++")))
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(found, "")]
    if not compiler[0] or sys.platform != "linux":
        pytest.skip("no C++ compiler, or none for the emulation")
    folder = tmp_path_factory.mktemp("cuda")
    target = folder / "emulated.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += ["-DSPARSEBILEVEL_CHUNKS_AT_A_TIME=16"]  # so that few scores are enough for several chunks of a warp
    command = [*compiler, *flags, "-include", EMULATION, "-x", "c++", *SOURCES, "-o", target]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return cuda.declare(ctypes.CDLL(str(target)))


@pytest.fixture
def emulated(library, monkeypatch):
    """Runs everything that a GPU would on the CPU. Returns how to choose among the orders of the threads."""
    monkeypatch.setattr(cuda, "DEVICES", {"cpu"})
    monkeypatch.setattr(cuda, "load", lambda: (library, "emulated"))
    seed = library.set_emulation_seed
    seed.argtypes = [ctypes.c_uint64]
    seed(0)
    return seed


def written(scores, k, seed=None):
    """Masks, words and counts of `cuda.binarize`, in memory that held something else, and with fences around it."""
    outs, fences = [], []
    for s in scores:
        parts = []
        for size, dtype in (
            (s.numel(), torch.bool),
            (-(-s.numel() // 64), torch.int64),
            (-(-s.numel() // 1024) + 1, torch.int64),
        ):
            bytes = torch.full((size * dtype.itemsize + 256,), 0xA5, dtype=torch.uint8)
            fences.append((bytes, 64, 64 + size * dtype.itemsize))
            parts.append(bytes[64 : 64 + size * dtype.itemsize].view(dtype))
        outs.append(parts)
    errors = cuda.binarize(scores, outs, k)
    for bytes, begin, end in fences:
        assert (bytes[:begin] == 0xA5).all()
        assert (bytes[end:] == 0xA5).all()
    return outs, errors.tolist()


def expect(scores, k, outs):
    mask = reference.binarize(torch.cat([s.reshape(-1) for s in scores]), k)
    for s, part, (bools, words, counts) in zip(scores, mask.split([s.numel() for s in scores]), outs, strict=True):
        expected_words, expected_counts = reference.mask_words(part)
        assert set(bools.view(torch.uint8).unique().tolist()) <= {0, 1}
        assert torch.equal(bools, part.view(-1)), s.shape
        assert torch.equal(words, expected_words)
        assert torch.equal(counts, expected_counts)


@st.composite
def drawn_list(draw):
    dtype = draw(st.sampled_from(DTYPES))
    sizes = draw(st.lists(st.sampled_from([0, 1, 7, 63, 64, 65, 1000, 1024, 1025, 3000]), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    few = torch.tensor(VALUES, dtype=torch.float64)[: draw(st.integers(1, len(VALUES)))]
    is_few = draw(st.booleans())
    scores = []
    for size in sizes:
        values = few[torch.randint(len(few), (size + 1,), generator=generator)]
        values = (values if is_few else torch.randn(size + 1, generator=generator)).to(dtype)
        scores.append(values[draw(st.integers(0, 1)) :][:size])  # at any multiple of an element
    total = sum(sizes)
    return scores, draw(st.one_of(st.integers(0, total), st.sampled_from([0, min(1, total), max(total - 1, 0), total])))


@given(drawn=drawn_list(), seed=st.integers(0, 1 << 32))
@settings(max_examples=40, deadline=None)
def test_lists(library, drawn, seed):
    scores, k = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "DEVICES", {"cpu"})
        patch.setattr(cuda, "load", lambda: (library, "emulated"))
        library.set_emulation_seed(ctypes.c_uint64(seed))
        outs, errors = written(scores, k)
        expect(scores, k, outs)
        assert errors == [0] * (len(scores) + 1) + [1]


def large_scores(kind, n):
    return {
        "normal": lambda: torch.randn(n),
        "constant": lambda: torch.ones(n),
        "two values": lambda: torch.randn(n).sign(),  # all chunks have more inside than is kept of them
        "sorted": lambda: torch.arange(n).float(),
        "one bucket": lambda: torch.ones(n) + torch.rand(n) * 1e-5,
        "misleading": lambda: torch.zeros(n).index_fill_(0, torch.arange(1000), 1.0).add_(torch.zeros(n)),
        "uneven": lambda: torch.cat([torch.randn(n // 2) * 1e-3 + 1.3, torch.randn(n - n // 2)]),
    }[kind]()


@pytest.mark.parametrize("kind", ["normal", "constant", "two values", "sorted", "one bucket", "misleading", "uneven"])
def test_several_blocks(kind, emulated):
    n = 66 * 1024 + 5
    scores = large_scores(kind, n)
    for seed, (k, dtype) in enumerate([(n // 10, torch.float32), (900, torch.bfloat16), (n - 1, torch.float16)]):
        emulated(seed)
        parts = list(scores.to(dtype).split([5000, n - 5000]))
        outs, errors = written(parts, k)
        expect(parts, k, outs)
        assert errors == [0, 0, 0, 1]


def test_a_sample_that_misleads_costs_time_only(emulated):
    """All that is not zero hides from the sample, and is next to zero or far away."""
    n, count = 40_000, 8192
    first = [i * (n // count) + min(i, n % count) for i in range(count + 1)]
    drawn = [((i + 1) * 0x9E3779B97F4A7C15 % (1 << 64) >> 33) * (first[i + 1] - first[i]) >> 31 for i in range(count)]
    hidden = torch.ones(n, dtype=torch.bool)
    hidden[[begin + at for begin, at in zip(first, drawn, strict=False)]] = False
    places = hidden.nonzero().view(-1)[::20]
    for values in ([1e-45, 3e-45], [1.0, 2.0, math.inf], [-1e-45, -3e-45], [-1.0, -2.0, -math.inf]):
        scores = torch.zeros(n)
        scores[places] = torch.tensor(values)[torch.arange(len(places)) % len(values)]
        for taken in (1, len(places) // 2, len(places) // 2 + 1, len(places) - 1, len(places), len(places) + 1):
            k = taken if values[0] > 0 else n - taken
            outs, _ = written([scores], k)
            expect([scores], k, outs)


def test_chunks_whose_keys_are_just_kept_or_not(emulated):
    """128 keys of a chunk are kept; here some have as many inside of the window, and others a few more or less."""
    chunks = torch.randn(60, 1024)
    for i, inside in enumerate(range(122, 135)):
        chunks[5 + i] = torch.randn(1024).sign() * 10
        chunks[5 + i, torch.randperm(1024)[:inside]] = torch.randn(inside) * 1e-4
    scores = chunks.view(-1)
    k = int((scores > 0).sum())
    for more in (-40, 0, 3):
        outs, _ = written([scores], k + more)
        expect([scores], k + more, outs)


def test_many_tensors(emulated):
    scores = [torch.randn(int(n)) for n in torch.randint(1, 40, (150,))]  # more than one launch tells the kernels
    outs, _ = written(scores, 700)
    expect(scores, 700, outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype, emulated):
    shapes = [
        (70, 2),
        (5, 4),
        (9, 8),
        (33, 5),
        (33, 16),
        (9, 17),
        (5, 64),
        (4, 65),
        (2, 300),
        (3, 1030),
        (2, 4097),
        (300, 1),
        (4, 0),
        (3, 6, 5),
    ]
    for shape in shapes:
        for fill in (torch.randn, lambda *s: torch.randn(*s).round()):
            scores = fill(*shape).to(dtype)
            for k in {0, 1, shape[1] // 2, max(shape[1] - 1, 0), shape[1]}:
                if k > shape[1]:
                    continue
                rows = scores.movedim(1, -1)
                expected = reference.binarize_rows(rows.reshape(-1, max(shape[1], 1)), k) if rows.numel() else rows
                expected = expected.bool().view(rows.shape).movedim(-1, 1)
                assert torch.equal(binarize(scores, k, dim=1), expected), (shape, k)
                found = binarize(scores, torch.tensor(k), dim=1, words=True)
                assert torch.equal(found.mask, expected)
                words, counts = reference.mask_words(expected)
                assert torch.equal(found.words, words)
                assert torch.equal(found.counts, counts)


def test_words_of_any_mask(emulated):
    for n in (0, 1, 64, 1000, 1024, 70_000):
        for offset in (0, 3):
            mask = (torch.rand(n + offset) < 0.3)[offset:]
            words = torch.full((-(-n // 64),), -1)
            counts = torch.full((-(-n // 1024) + 1,), -1)
            cuda.mask_words(mask, words, counts)
            expected_words, expected_counts = reference.mask_words(mask)
            assert torch.equal(words, expected_words)
            assert torch.equal(counts, expected_counts)
            assert torch.equal(cuda.count_words(words, n), expected_counts)


def test_tiles(emulated):
    for shape in ((70, 130), (1, 1), (64, 64), (3, 0)):
        mask = torch.rand(shape) < 0.02
        words, _ = reference.mask_words(mask)
        for rows, cols in ((1, 1), (2, 5), (8, 64), (3, 100), (1000, 1000)):
            tiles = torch.ones(-(-shape[0] // rows), -(-shape[1] // cols)).bool()
            cuda.occupied_tiles(words, *shape, rows, cols, tiles)
            if mask.numel():
                assert torch.equal(tiles, reference.occupied_tiles(words, *shape, rows, cols))
            assert torch.equal(BinaryMask.of(mask).tiles(rows, cols), tiles)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8])
def test_gather_and_scatter(dtype, emulated):
    for n, share in ((0, 0.5), (1, 1), (1000, 0), (5000, 0.1), (4096, 1), (66 * 1024 + 3, 0.5)):
        mask, dense = torch.rand(n) < share, (torch.randn(n) * 8).to(dtype)
        words, counts = reference.mask_words(mask)
        expected = dense[mask]
        fence = torch.full((expected.numel() + 2,), 77).to(dtype)
        assert torch.equal(cuda.gather_values(dense, words, counts, fence[1:-1]), expected)
        assert fence[[0, -1]].tolist() == [77, 77]
        values = (torch.randn(expected.numel()) * 8).to(dtype)
        for keep in (False, True):
            fence = torch.cat([torch.full((1,), 77).to(dtype), dense, torch.full((1,), 77).to(dtype)])
            cuda.scatter_values(values, words, counts, fence[1:-1], keep=keep)
            kept = dense if keep else torch.zeros_like(dense)
            assert torch.equal(fence[1:-1], kept.masked_scatter(mask, values))
            assert fence[[0, -1]].tolist() == [77, 77]
        if dtype in DTYPES:
            for alpha in (1.0, -0.3):
                # Exact in float64, then rounded once. Two roundings, to float32 and to 16 bits, differ where ties meet.
                exact = dense.double() + torch.tensor(alpha).double() * torch.zeros(n).double().masked_scatter(
                    mask, values.double()
                )
                found = cuda.accumulate_values(values, words, counts, dense.clone(), alpha)
                assert torch.equal(found, torch.where(mask, exact.float().to(dtype), dense))


FORMATS = ["values", "bitmap", "hierarchical", "delta8", "block16", "dense", "auto"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_messages_are_those_of_the_cpu(format, dtype, library, monkeypatch):
    values, mask, before = torch.randn(70, 41).to(dtype).t(), torch.rand(41, 70) < 0.1, torch.randn(41, 70).to(dtype)

    def all_of_it():
        messages = [bytes(pack(values, mask, format)), bytes(pack({"a": values[0], "b": values}, format="dense"))]
        generator = torch.Generator().manual_seed(0)
        messages.append(bytes(pack(values, mask, format, dtype=torch.int8, block=100, generator=generator)))
        nothing = torch.zeros_like(mask)
        messages.append(bytes(pack(values, nothing, format)))
        found = [unpack(messages[3], nothing, out=before.clone(), mode=mode) for mode in ("overwrite", "accumulate")]
        found += [
            unpack(message, mask, out=before.t().clone().t(), mode=mode)
            for message in (messages[0], messages[2])
            for mode in ("overwrite", "accumulate", "scatter")
        ]
        return messages, found

    messages, found = all_of_it()
    calls = []
    monkeypatch.setattr(cuda, "DEVICES", {"cpu"})
    monkeypatch.setattr(cuda, "load", lambda: (library, "emulated"))
    for name in ("gather_values", "scatter_values"):
        function = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *a, f=function, n=name, **k: [calls.append(n), f(*a, **k)][1])
    there, found_there = all_of_it()
    assert messages == there
    for one, other in zip(found, found_there, strict=True):
        assert torch.equal(one, other)
    assert {"gather_values", "scatter_values"} <= set(calls)


def test_hook_gathers_with_the_kernels(emulated, tmp_path, monkeypatch):
    calls = []
    gather = cuda.gather_values
    monkeypatch.setattr(cuda, "gather_values", lambda *arguments: [calls.append(1), gather(*arguments)][1])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7))
        sb.sparsify(model, sparsity=0.8)
        ddp = DistributedDataParallel(model)
        hook = SparseAllReduce(ddp)
        inputs = torch.randn(4, 30)
        for _ in range(2):
            ddp.zero_grad()
            ddp(inputs).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(inputs).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    finally:
        dist.destroy_process_group()
    assert calls
    assert hook.bytes_sent < hook.dense_bytes


def test_half_floats_round_to_even(emulated):
    """Every float16, and sums that are halfway between two."""
    dense = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    dense = dense[~dense.isnan()]
    words, counts = reference.mask_words(torch.ones(dense.numel(), dtype=torch.bool))
    for values in (torch.zeros_like(dense), dense * 0.75, dense.roll(1)):
        expected = (dense.float() + values.float()).half()
        assert torch.equal(
            cuda.accumulate_values(values, words, counts, dense.clone()).view(torch.int16), expected.view(torch.int16)
        ) or torch.equal(
            expected.nan_to_num(), cuda.accumulate_values(values, words, counts, dense.clone()).nan_to_num()
        )


def test_public_function(emulated):
    scores = torch.randn(3, 4, 5).permute(2, 0, 1)
    for k in (7, torch.tensor(7), torch.tensor([7], dtype=torch.int32)):
        assert torch.equal(binarize(scores, k), reference.binarize(scores.contiguous(), 7))
    one, two = binarize([scores, torch.randn(9).half()], 7, words=True)  # in their common type
    assert int(one.counts[-1] + two.counts[-1]) == 7
    assert torch.equal(binarize(scores.double(), 7), reference.binarize(scores.contiguous(), 7))
    assert binarize(torch.zeros(0), 0, words=True).counts.tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_found(dtype, emulated):
    scores = torch.randn(10).to(dtype)
    scores[[2, 7]] = math.nan
    scores[4] = -math.nan
    with pytest.raises(ValueError, match=r"^conv must not be NaN: 3 of 10 are; fc must not be NaN: 3 of 5 are$"):
        binarize([scores, torch.zeros(0, dtype=dtype), scores[[2, 4, 7, 0, 1]]], 0, names=["conv", "bn", "fc"])
    with pytest.raises(ValueError, match=r"^scores must not be NaN: 3 of 10 are$"):
        binarize(scores.view(2, 5), 1, dim=1)
    fine = torch.zeros(10, dtype=dtype)
    for k in (-1, 11):
        with pytest.raises(ValueError, match=r"k must be in \[0, 10\]"):
            binarize(fine, torch.tensor(k))
        with pytest.raises(ValueError, match=r"k must be in \[0, 10\] for scores of shape \[10\], got"):
            binarize(fine, k)
    with pytest.raises(ValueError, match=r"k must be in \[0, 5\]"):
        binarize(fine.view(2, 5), torch.tensor(6), dim=1)


def test_asynchronous_errors_name_the_tensors(monkeypatch):
    """What is done on a GPU, where nobody waits for the errors."""
    from sparsebilevel.kernels.binarize import _check_errors

    class OnGpu:
        device = torch.device("cuda")

        def __getitem__(self, index):
            return "flag"

    told = []
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: told.append(arguments))
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    _check_errors(OnGpu(), [], ["conv", "fc"], 9)
    _check_errors(OnGpu(), [], [f"layer{i}.weight" for i in range(100)], 9)
    assert told[0] == ("flag", "conv, fc must not be NaN, and k must be in [0, 9]")
    assert len(told[1][1]) < 250


def test_opcheck(emulated):
    scores = torch.randn(4, 3, 2)
    for dim in (None, [1]):
        args = ([scores, scores[0]], torch.tensor(2), dim, dim is None, "a\nb")
        torch.library.opcheck(torch.ops.sparsebilevel.binarize.default, args)


def test_a_missing_barrier_is_found(tmp_path):
    """That the emulation sees what it is there for."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    code = """
    #include "device.h"
    __global__ void reverse(int* data, bool barrier, bool divergent) {
      SPARSEBILEVEL_SHARED(part, int[64]);
      part[threadIdx.x] = data[threadIdx.x];
      if (barrier && !(divergent && threadIdx.x > 40)) __syncthreads();
      data[threadIdx.x] = part[63 - threadIdx.x];
    }
    int main(int argc, char** argv) {
      int data[64];
      for (int i = 0; i < 64; ++i) data[i] = i;
      int* address = data;
      SPARSEBILEVEL_LAUNCH(reverse, 1, 64, nullptr, address, argv[1][0] != 'n', argv[1][0] == 'd');
      for (int i = 0; i < 64; ++i) if (data[i] != 63 - i) return 1;
      return 0;
    }
    """
    (tmp_path / "reverse.cpp").write_text(code)
    program = tmp_path / "reverse"
    include = ["-include", EMULATION, f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run([compiler, "-std=c++17", *include, tmp_path / "reverse.cpp", "-o", program], check=True)
    assert subprocess.run([program, "barrier"]).returncode == 0
    assert subprocess.run([program, "none"]).returncode == 1
    ran = subprocess.run([program, "divergent"], capture_output=True, text=True)
    assert "a barrier that not all threads reach" in ran.stderr


# -- Hopper's tensor cores ---------------------------------------------------------------------------------------------


def small_integers(*shape, dtype):
    """Of which all sums are exact."""
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("master", [True, False], ids=["float32", "halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 8), (64, 128, 136), (70, 136, 264), (300, 72, 40)])
def test_weight_gradients(t, n, k, dtype, master, seed, emulated):
    torch.manual_seed(seed)
    emulated(seed)
    dy, x = small_integers(t, n, dtype=dtype), small_integers(t, k, dtype=dtype)
    w, m = small_integers(n, k, dtype=torch.float32 if master else dtype), torch.rand(n, k) < 0.4
    needs = [(True, True, True), (True, True, False), (False, False, True)][seed]
    named = dict(zip(("need_weight", "need_scores", "need_sink"), needs, strict=True))
    outs = cuda_weight_grad.weight_grad(dy, x, w, m, **named)
    for out, want in zip(outs, reference.split_gradient(dy.float().t() @ x.float(), w, m, needs), strict=True):
        assert (out is None) == (want is None)
        assert out is None or (out.dtype == want.dtype and torch.equal(out, want))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 8), (9, 72, 136), (300, 136, 264), (513, 256, 64)])
def test_products_of_tiles(t, n, k, block, dtype, seed, emulated):
    torch.manual_seed(seed)
    emulated(seed)
    tiles = torch.rand(-(-n // block), -(-k // block)) < 0.5
    x, dy, w = (small_integers(*size, dtype=dtype) for size in ((t, k), (t, n), (n, k)))
    w *= tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    bias = [None, small_integers(n, dtype=dtype), small_integers(n, dtype=torch.float32)][(t + seed) % 3]
    layout = BlockLayout(block, tiles, 0.5)
    if seed:
        layout.settle()
    y = cuda_block_sparse.block_matmul(x, w, layout.pairs(False), bias)
    assert torch.equal(y, (x.float() @ w.float().t() + (0 if bias is None else bias.float())).to(dtype))
    dx = cuda_block_sparse.block_matmul(dy, w, layout.pairs(True), input_grad=True)
    assert torch.equal(dx, (dy.float() @ w.float()).to(dtype))


# -- lists for products of tiles ---------------------------------------------------------------------------------------


def multiplied(x, weight, lists, *, input_grad=False):
    """What the kernel does: the products of the tiles of its lists, and of no others."""
    weight = weight.t() if input_grad else weight
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    assert sorted(lists.order.tolist()) == list(range(len(lists.members)))
    for pair in lists.order.tolist():
        for half, row in enumerate(lists.members[pair].tolist()):
            rows = slice(64 * row, 64 * row + 64)
            out[:, rows] = 0
            for entry in lists.tiles[lists.starts[pair] : lists.starts[pair + 1]].tolist():
                columns = slice(64 * (entry // 4), 64 * (entry // 4) + 64)
                assert 0 < entry % 4
                if entry >> half & 1:
                    out[:, rows] += x[:, columns] @ weight[rows, columns].t()
    return out


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([64, 128]), st.integers(1, 700), st.integers(1, 300), st.floats(0, 1), st.integers(0, 99))
def test_pairs_hold_every_tile_once(block, n, k, density, seed):
    torch.manual_seed(seed)
    tiles = torch.rand(-(-n // block), -(-k // block)) < density
    mask = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    x, dy, w = (torch.randint(-4, 5, size).float() for size in ((3, k), (3, n), (n, k)))
    z = torch.where(mask, w, 0)
    layout = BlockLayout(block, tiles, density)
    for _ in range(2):  # with w, of which only the kept tiles may be read
        assert torch.equal(multiplied(x, w, layout.pairs(False)), x @ z.t())
        assert torch.equal(multiplied(dy, w, layout.pairs(True), input_grad=True), dy @ z)
        layout.settle()


def test_rows_that_have_much_in_common_are_pairs():
    torch.manual_seed(0)
    half = torch.rand(32, 64) < 0.2
    order = torch.randperm(64)
    occupied = torch.cat([half, half])[order]
    assert int(pair_list(occupied, 64).starts[-1]) > 1.5 * int(half.sum())
    assert int(pair_list(occupied, 64, settled=True).starts[-1]) == int(half.sum())
    assert torch.equal(block_sparse.match(torch.zeros(1000, 5, dtype=torch.bool))[0], torch.tensor([0, 1]))


def test_without_measurements_outputs_take_more_tiles_than_weight_gradients(monkeypatch):
    device, structure = torch.device("cpu"), dispatch.Structure(((64, 0.8),))
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(dispatch.measurements, "times", lambda *_: {})
    for runs, wanted in ((True, "block"), (False, "dense")):
        monkeypatch.setattr(cuda_block_sparse, "runs", lambda *_, runs=runs: runs)
        dispatch._choose_product.cache_clear()
        arguments = torch.bfloat16, device, 512, (256, 256), structure
        assert dispatch.choose_product("forward", *arguments)[0].name == wanted
        assert dispatch.choose_product("weight_grad", *arguments)[0].name == "dense"
    dispatch._choose_product.cache_clear()


def test_a_mask_settles_when_it_stays(monkeypatch):
    monkeypatch.setattr(block_sparse, "_SETTLED", 4)
    monkeypatch.setattr(cuda_block_sparse, "takes", lambda *_: True)
    given = []
    monkeypatch.setattr(cuda_block_sparse, "block_matmul", lambda *a, **_: given.append(a[2]))
    layout = BlockLayout(64, torch.rand(8, 8) < 0.5, 0.5)
    for _ in range(3):
        layout.forward(torch.zeros(1, 512), torch.zeros(512, 512))
        layout.input_grad(torch.zeros(1, 512), torch.zeros(512, 512))
    assert given[0] is given[2] is not given[4]
    assert given[1] is not given[3] is given[5]
    assert given[4] is layout.pairs(False)


# -- the library that nvcc built -------------------------------------------------------------------------------------


def disassembled(name):
    """The kernels of a name, for Hopper."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [shutil.which("cuobjdump") or tools / "cuobjdump", "-sass", "-arch", "sm_90a", cuda.load()[0]._name]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [part for part in text.split("Function : ")[1:] if name in part.split("\n")[0]]


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_library_loads_without_a_driver_and_says_what_is_missing():
    library = cuda.load()[0]
    assert library.sparsebilevel_binarize_workspace(3, 10) > 10 * 1024 // 8
    with pytest.raises(RuntimeError, match="CUDA kernel mask_words: .*(driver|device)"):
        cuda.launch("mask_words", torch.device("cpu"), 0, 1, 0, 0, 0)
    x, lists = torch.zeros(8, 64, dtype=torch.bfloat16), pair_list(torch.ones(1, 1, dtype=torch.bool), 64)
    with pytest.raises(RuntimeError, match="CUDA kernel block_matmul: "):
        cuda_block_sparse.block_matmul(x, x, lists)
    with pytest.raises(RuntimeError, match="CUDA kernel weight_grad: "):
        cuda_weight_grad.weight_grad(x, x, torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.bool))


def test_kernels_may_be_loaded_while_a_graph_is_captured(monkeypatch):
    mode = [0]  # of this thread: global

    def exchange(given):
        given._obj.value, mode[0] = mode[0], given._obj.value

    monkeypatch.setattr(gpu, "_exchange_capture_mode", lambda: exchange)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for error in (None, RuntimeError("a launch that failed")):
        with contextlib.suppress(RuntimeError), gpu.on_device(torch.device("cuda", 0)):
            assert mode == [2]  # relaxed
            if error:
                raise error
        assert mode == [0]


@needs_library
def test_a_library_of_another_version_is_not_taken(monkeypatch):
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda path: object())
    library, reason = cuda.load.__wrapped__()
    assert library is None
    assert "it does not load" in reason


def test_which_weight_gradients_are_for_hopper(monkeypatch):
    monkeypatch.setattr(cuda, "available", lambda device: True)
    dy, x, w, m = (torch.zeros(8, 16), torch.zeros(8, 24), torch.zeros(16, 24), torch.zeros(16, 24, dtype=torch.bool))
    half, other = torch.bfloat16, torch.float16

    operands = {"dy": dy.to(half), "x": x.to(half), "weight": w, "mask": m}

    def takes(**others):
        return cuda_weight_grad.takes(**operands | others)

    assert not takes()  # no such GPU
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    assert takes()
    assert takes(weight=w.to(half))
    assert takes(dy=dy.to(other), x=x.to(other), weight=w.to(other))
    assert not takes(dy=dy, x=x)
    assert not takes(weight=w.to(other))
    assert not takes(weight=w.double())
    assert not takes(mask=torch.zeros(6, dtype=torch.int64))
    assert not takes(dy=dy[:0].to(half), x=x[:0].to(half))
    assert not takes(x=torch.zeros(8, 20, dtype=half), weight=torch.zeros(16, 20))
    assert not takes(x=torch.zeros(8 * 24 + 1, dtype=half)[1:].view(8, 24))


@needs_library
def test_the_weight_gradient_uses_hoppers_instructions():
    kernels = disassembled("weight_grad")
    assert len(kernels) == 4
    for kernel in kernels:
        for instruction in (
            r"HGMMA\.64x256x16\.F32\S* R\d+, gdesc\[UR\d+\]\.tnspA\.tnspB",
            "UTMALDG",
            r"CCTL\.\S*PF2",
            r"LDG\.E\.EF",
            r"STG\.E\.EF\.128",
        ):
            assert re.search(instruction, kernel), instruction


@needs_library
def test_products_of_tiles_use_hoppers_instructions():
    kernels = disassembled("block_matmul")
    assert len(kernels) == 8
    for kernel in kernels:
        for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "STSM"):
            assert instruction in kernel, instruction


def usage_of(text):
    """Registers and bytes of stack by kernel and architecture, as cuobjdump -res-usage has them."""
    usage, arch = {}, ""
    for line in text.splitlines():
        arch = match[1] if (match := re.search(r"arch = (sm_\w+)", line)) else arch
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            usage[arch, name] = int(match[1]), int(match[2])
    return usage


@needs_library
def test_kernels_fit_into_registers():
    triton = pytest.importorskip("triton")
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", cuda.load()[0]._name]
    usage = usage_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert {arch for arch, _ in usage} == {"sm_80", "sm_90a"}
    for (arch, name), (registers, stack) in usage.items():
        # A block of 1024 threads fits with 64 registers each, three of 256 with 80, and one of nine warps with 168.
        limits = {"sample": 64, "block_matmul": 168, "weight_grad": 168}
        assert registers <= next((most for part, most in limits.items() if part in name), 80), (arch, name)
        assert stack == 0, (arch, name)


@needs_nvcc
@pytest.mark.slow
def test_nvcc_compiles_without_spills(tmp_path):
    for arch in ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"):
        for source in SOURCES:
            command = [
                "nvcc",
                "-std=c++17",
                "-O3",
                f"-gencode={arch}",
                "-Xptxas=-v",
                "-c",
                source,
                "-o",
                tmp_path / "o",
            ]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
            assert "warning" not in built.stderr, built.stderr
            spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", built.stderr)
            assert spills
            assert set(spills) == {("0", "0", "0")}


# -- on a GPU --------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    scores = [torch.randn(n, device="cuda").mul(4).to(dtype) for n in (100_001, 0, 3_000_000, 64)]
    for k in (0, 1, 10_000, 1_500_000, 3_100_064, 3_100_065):
        expected = reference.binarize(torch.cat(scores).cpu(), k).split([s.numel() for s in scores])
        for number in (k, torch.tensor(k, device="cuda")):
            for found, part in zip(binarize(scores, number, words=True), expected, strict=True):
                assert torch.equal(found.mask.cpu(), part)
                words, counts = reference.mask_words(part)
                assert torch.equal(found.words.cpu(), words)
                assert torch.equal(found.counts.cpu(), counts)
    rows = scores[2].view(3000, 1000)
    for length in (4, 8, 16, 50, 1000, 3000, 5000):
        part = rows.reshape(-1, length)
        assert torch.equal(binarize(part, length // 4, dim=1).cpu(), reference.binarize_rows(part.cpu(), length // 4))


@needs_gpu
def test_without_the_library_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(cuda, "load", lambda: (None, "switched off"))
    scores, k = torch.randn(3, 1000, device="cuda"), torch.tensor(700, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, rows = binarize(scores, k, words=True), binarize(scores, k, dim=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.mask.cpu(), reference.binarize(scores.cpu(), 700))
    assert torch.equal(found.words.cpu(), reference.mask_words(found.mask.cpu())[0])
    assert torch.equal(rows.cpu(), reference.binarize_rows(scores.cpu(), 700))


@needs_gpu
def test_captured_in_a_graph():
    scores, k = torch.randn(200_000, device="cuda"), torch.tensor(10, device="cuda")
    binarize(scores, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = binarize(scores, k)
    for number in (5, 70_000):
        scores.normal_()
        k.fill_(number)
        graph.replay()
        assert torch.equal(mask.cpu(), reference.binarize(scores.cpu(), number))
