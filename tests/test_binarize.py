"""Exactness of the k largest scores, against Python's own sort."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsebilevel as sb
from sparsebilevel.kernels import BinaryMask, binarize, native, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few distinct values, so that ties are the rule; both zeros, infinities, and the smallest denormal of float32.
VALUES = [-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.0, math.inf]

needs_native = pytest.mark.skipif(not native.available(), reason=f"C++ extension: {native.reason}")


def oracle(scores, k):
    """Largest first, then smaller index: the definition, in Python."""
    values = scores.reshape(-1).tolist()
    kept = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    return torch.tensor([i in kept for i in range(len(values))], dtype=torch.bool).view(scores.shape)


def row_oracle(scores, k, dims):
    """`oracle` in each slice along ``dims``."""
    order = [d for d in range(scores.dim()) if d not in dims] + list(dims)
    moved = scores.permute(order)
    length = math.prod(scores.shape[d] for d in dims)
    rows = [oracle(row, k) for row in moved.reshape(-1, length)] if scores.numel() else []
    mask = torch.stack(rows) if rows else torch.zeros(0, dtype=torch.bool)
    return mask.view(moved.shape).permute([order.index(d) for d in range(len(order))])


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    """Runs a test on the C++ kernel and on pure torch."""
    if request.param == "reference":
        monkeypatch.setattr(native, "lib", None)
    elif not native.available():
        pytest.skip(f"C++ extension: {native.reason}")
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    """Limits the kernels to one instruction set, as far as the processor goes."""
    if not native.available():
        pytest.skip(f"C++ extension: {native.reason}")
    before = native.lib.isa()
    native.lib.set_isa(native.lib.Isa.__members__[request.param])
    yield request.param
    native.lib.set_isa(before)


@st.composite
def drawn_scores(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    numel = math.prod(shape)
    values = draw(st.lists(st.sampled_from(VALUES), min_size=numel, max_size=numel))
    scores = torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES))).view(shape)
    order = draw(st.permutations(range(len(shape))))
    return scores.permute(order), draw(st.integers(0, numel))


@given(drawn_scores())
@settings(max_examples=200, deadline=None)
def test_is_exact(drawn):
    scores, k = drawn
    expected = oracle(scores, k)
    mask = binarize(scores, k)
    assert mask.dtype is torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, expected)
    assert torch.equal(reference.binarize(scores, k), expected)


@given(st.lists(drawn_scores(), max_size=4), st.data())
@settings(deadline=None)
def test_lists_are_ranked_together(drawn, data):
    tensors = [scores for scores, _ in drawn]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    masks = binarize(tensors, k)
    assert [mask.shape for mask in masks] == [t.shape for t in tensors]
    if tensors:
        joined = torch.cat([t.reshape(-1).double() for t in tensors])
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), oracle(joined, k))


@given(drawn_scores(), st.data())
@settings(deadline=None)
def test_slices_are_ranked_each_for_itself(drawn, data):
    scores, _ = drawn
    if scores.dim() == 0:
        return
    dims = data.draw(st.lists(st.integers(0, scores.dim() - 1), min_size=1, unique=True))
    k = data.draw(st.integers(0, math.prod(scores.shape[d] for d in dims)))
    mask = binarize(scores, k, dim=[d - scores.dim() * data.draw(st.integers(0, 1)) for d in dims])
    assert mask.is_contiguous()
    assert torch.equal(mask, row_oracle(scores, k, sorted(dims)))


def large_scores(kind, n, dtype):
    scores = {
        "normal": lambda: torch.randn(n),
        "rounded": lambda: torch.randn(n).mul(4).round(),
        "two values": lambda: torch.randn(n).sign(),
        "constant": lambda: torch.ones(n),
        "sorted": lambda: torch.arange(n).float().div(n),
        "reversed": lambda: torch.arange(n).float().div(-n),
        "wide": lambda: torch.randn(n).mul(40).exp() * torch.randn(n).sign(),
        "periodic": lambda: torch.arange(n).remainder(94).float(),  # near the stride of the sample
        "one bucket": lambda: torch.ones(n) + torch.rand(n) * 1e-5,
        "few": lambda: torch.zeros(n).index_fill_(0, torch.randint(n, (20,)), 1).add_(torch.zeros(n).neg()),
    }[kind]()
    return scores.to(dtype)


@pytest.mark.parametrize(
    "kind",
    ["normal", "rounded", "two values", "constant", "sorted", "reversed", "wide", "periodic", "one bucket", "few"],
)
def test_large_agrees_with_reference_for_any_threads(kind, isa, threads):
    sizes = [60_001, 0, 40_002]  # blocks of unequal size
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = large_scores(kind, sum(sizes), dtype)
        order = torch.sort(scores + 0.0, descending=True, stable=True).indices
        for k in (0, 1, 10_000, 50_003, sum(sizes) - 1, sum(sizes)):
            expected = torch.zeros(sum(sizes), dtype=torch.bool)
            expected[order[:k]] = True
            for count in (1, 2, 3, 8):
                threads(count)
                assert torch.equal(torch.cat(binarize(list(scores.split(sizes)), k)), expected)


@pytest.mark.parametrize("shape", [(300, 257), (4000, 4), (40, 32, 3, 3), (3, 20_000)])
def test_large_slices_agree_with_reference(shape, isa, threads):
    for dtype in (torch.float32, torch.bfloat16):
        scores = torch.randn(shape).mul(4).to(dtype)
        for k in (1, 2, shape[1] - 1):
            rows = scores.movedim(1, -1)
            expected = reference.binarize_rows(rows.reshape(-1, shape[1]), k).view(rows.shape).movedim(-1, 1)
            for count in (1, 3):
                threads(count)
                assert torch.equal(binarize(scores, k, dim=1), expected)


@needs_native
def test_a_sample_that_misleads_costs_time_only(threads):
    # All that is large hides between the places that a sample of regular steps, and of most others, would look at.
    scores = torch.zeros(1 << 20)
    scores[:1000] = torch.arange(1000).float()
    scores[5000:5003] = math.inf
    for k in (1, 3, 4, 500, 1003, 1004, 500_000):
        assert torch.equal(binarize(scores, k), reference.binarize(scores, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_format_does_not_break_ties(dtype, backend):
    scores = torch.zeros(2, 3, 4, 5, dtype=dtype)
    expected = torch.arange(scores.numel()).view(scores.shape) < 17
    for other in (
        scores,
        scores.to(memory_format=torch.channels_last),
        torch.zeros((), dtype=dtype).expand(2, 3, 4, 5),
    ):
        assert torch.equal(binarize(other, 17), expected)


@needs_native
def test_denormals_count_where_they_are_flushed():
    scores = torch.tensor([0.0, 1e-45, -1e-45, 2e-45])
    torch.set_flush_denormal(True)
    try:
        assert binarize(scores, 2).tolist() == [False, True, False, True]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("shape", [(0,), (), (7, 9), (64, 32), (5, 40, 3, 3), (1, 3000)])
@pytest.mark.parametrize("dim", [None, -1])
def test_words_counts_and_tiles(shape, dim, backend):
    if dim is not None and not shape:
        return
    scores = torch.randn(shape)
    k = scores.numel() // 10 if dim is None else shape[-1] // 2
    found = binarize(scores, k, dim=dim, words=True)
    assert isinstance(found, BinaryMask)
    assert torch.equal(found.mask, binarize(scores, k, dim=dim))
    flat = found.mask.reshape(-1).tolist()
    words = [sum(bit << j for j, bit in enumerate(flat[i : i + 64])) for i in range(0, len(flat), 64)]
    assert [word % (1 << 64) for word in found.words.tolist()] == words
    assert found.counts.tolist() == [*(sum(flat[:i]) for i in range(0, len(flat), 1024)), sum(flat)]
    assert found.words.dtype == found.counts.dtype == torch.int64
    if not shape:
        return
    matrix = found.mask.reshape(shape[0], -1) if scores.numel() else found.mask.reshape(0, 0)
    for rows, cols in ((1, 1), (2, 5), (8, 64), (3, 100), (1000, 1000)):
        tiles = found.tiles(rows, cols)
        parts = [[t.any() for t in strip.split(cols, 1)] for strip in matrix.split(rows)] if scores.numel() else []
        assert tiles.tolist() == [[bool(t) for t in strip] for strip in parts]


def test_words_of_lists(backend):
    scores = [torch.randn(70), torch.randn(3, 50), torch.randn(0)]
    found = binarize(scores, 30, words=True)
    assert sum(int(f.counts[-1]) for f in found) == 30
    for f, s in zip(found, scores, strict=True):
        assert f.mask.shape == s.shape
        words, counts = reference.mask_words(f.mask)
        assert torch.equal(f.words, words)
        assert torch.equal(f.counts, counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_with_name_and_count(dtype, backend):
    scores = torch.randn(10).to(dtype)
    scores[[2, 7]] = math.nan
    scores[4] = -math.nan
    with pytest.raises(ValueError, match=r"^scores must not be NaN: 3 of 10 are$"):
        binarize(scores, 5)
    with pytest.raises(ValueError, match=r"^scores\[1\] must not be NaN: 3 of 10 are$"):
        binarize([torch.zeros(2, dtype=dtype), scores], 0)
    with pytest.raises(ValueError, match=r"^conv must not be NaN: 3 of 10 are; fc must not be NaN: 3 of 5 are$"):
        binarize([scores, torch.zeros(2, dtype=dtype), scores[[2, 4, 7, 0, 1]]], 0, names=["conv", "bn", "fc"])
    with pytest.raises(ValueError, match=r"^rows must not be NaN: 3 of 10 are$"):
        binarize(scores.view(2, 5), 1, dim=1, names=["rows"])


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range_is_refused(k, backend):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 6\] for scores of shape \[2, 3\], got {k}"):
        binarize(torch.randn(2, 3), k)
    with pytest.raises(ValueError, match=rf"k must be in \[0, 6\] for 2 tensors of scores, got {k}"):
        binarize([torch.randn(2), torch.randn(4)], k)
    with pytest.raises(ValueError, match=rf"k must be in \[0, 2\] for slices along \[0\] of shape \[2, 3\], got {k}"):
        binarize(torch.randn(2, 3), k, dim=0)


def test_k_may_be_a_tensor():
    scores = torch.randn(20)
    for k in (torch.tensor(3), torch.tensor([3], dtype=torch.int32)):
        assert torch.equal(binarize(scores, k), binarize(scores, 3))
    with pytest.raises(ValueError, match=r"got 21"):
        binarize(scores, torch.tensor(21))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_k_may_be_an_integer_of_numpy(dtype):
    scores = torch.randn(4, 5)
    assert torch.equal(binarize(scores, dtype(3)), binarize(scores, 3))
    assert torch.equal(sb.binarize(scores, dtype(2), pattern="filter"), sb.binarize(scores, 2, pattern="filter"))


def test_other_refusals():
    with pytest.raises(TypeError, match=r"scores must be floating point \(.*\), got torch\.int64"):
        binarize(torch.arange(3), 1)
    with pytest.raises(ValueError, match=r"k must be in \[0, 0\] for 0 tensors of scores, got 1"):
        binarize([], 1)
    assert binarize([], 0) == []
    assert binarize([], 0, words=True) == []
    numbers = (0.5, True, None, "2", np.float64(2), np.bool_(True), np.array(2.0))
    for k in (*numbers, torch.tensor(2.0), torch.tensor([1, 2]), torch.tensor(True)):
        with pytest.raises(TypeError, match="k must be an integer or a tensor of one, got"):
            binarize(torch.randn(3), k)
    with pytest.raises(ValueError, match="names must be a list of 1"):
        binarize(torch.randn(3), 1, names=["a", "b"])
    with pytest.raises(ValueError, match=r"dim must be in \[-2, 1\] for scores of shape \[2, 3\], got \[2\]"):
        binarize(torch.randn(2, 3), 1, dim=2)
    with pytest.raises(ValueError, match="rows=0, cols=4"):
        binarize(torch.randn(3), 1, words=True).tiles(0, 4)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drift", [0, 1e-3, 0.1, "other"])
def test_a_hint_changes_nothing(dtype, drift, isa, threads):
    scores, hint = torch.randn(120_001), torch.zeros(2, dtype=torch.int32)
    for step, k in enumerate((12_000, 12_000, 12_000, 11_900, 1, 120_001, 0, 60_000)):
        threads(1 + step % 3)
        parts = scores.to(dtype).split([50_000, 70_001])
        found = binarize(parts, k, hint=hint)
        assert all(torch.equal(a, b) for a, b in zip(found, binarize(parts, k), strict=True))
        scores = torch.randn(120_001) * step if drift == "other" else scores + drift * torch.randn(120_001)


@needs_native
def test_a_hint_is_used():
    # Of one value: the window is that value, and remains in the hint; a stale one is replaced.
    hint = torch.zeros(2, dtype=torch.int32)
    for value in (1.0, 1.0, 2.0):
        bits = torch.full((5000,), value)
        assert int(binarize(bits, 2500, hint=hint).sum()) == 2500
        assert hint.tolist() == bits[:2].view(torch.int32).tolist()
    for nonsense in ([5, 4], [-(2**31), 2**31 - 1], [1, 2], [2**31 - 1, -(2**31)]):
        scores, hint = torch.randn(5000), torch.tensor([nonsense, nonsense], dtype=torch.int32).t()[:, 0]
        assert torch.equal(binarize(scores, 70, hint=hint), binarize(scores, 70))
        low, high = hint.contiguous().view(torch.float32).tolist()
        assert low <= scores.sort().values[-70] <= high or hint.tolist() == [0, 0]


def test_a_hint_is_refused():
    scores, hint = torch.randn(4, 5), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"hint is not allowed with dim=1"):
        binarize(scores, 1, dim=1, hint=hint)
    with pytest.raises(ValueError, match=r"hint is not allowed with pattern NM"):
        sb.binarize(torch.randn(4, 4), pattern="nm:2:4", hint=hint)
    for wrong in (hint.long(), hint[:1]):
        with pytest.raises(ValueError, match=r"hint must be torch\.int32 of shape \[2\] on the scores' device, got"):
            binarize(scores, 1, hint=wrong)
    assert torch.equal(binarize(scores.double(), 1, hint=hint), binarize(scores.double(), 1))


GROUPS = {  # pattern -> the group of each position, which is named by its first
    "filter": lambda o, i, tap: (o, 0, 0),
    "channel": lambda o, i, tap: (0, i, 0),
    "block:2x3": lambda o, i, tap: (o // 2, i // 3, tap),
}


@given(st.data())
@settings(deadline=None)
def test_groups_are_ranked_by_their_sums(data):
    pattern = data.draw(st.sampled_from(list(GROUPS)))
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    # Whole numbers, whose sums are exact in any order; those of float16 would overflow in it.
    entry = st.sampled_from([0.0, -0.0, 1.0, -2.0, 50_000.0])
    scores, sums = [], {}
    for t, shape in enumerate(shapes):
        values = data.draw(st.lists(entry, min_size=math.prod(shape), max_size=math.prod(shape)))
        scores.append(torch.tensor(values).to(dtype).view(shape))
        matrix = scores[-1].double().reshape(shape[0], shape[1], -1)
        for position in itertools.product(*map(range, matrix.shape)):
            key = (t, *GROUPS[pattern](*position))
            sums[key] = sums.get(key, 0) + matrix[position].item()
    keys = sorted(sums)  # row-major
    k = data.draw(st.integers(0, len(keys)))
    kept = set(sorted(keys, key=lambda key: (-sums[key], key))[:k])
    one = len(scores) == 1 and data.draw(st.booleans())
    masks = sb.binarize(scores[0] if one else scores, k, pattern=pattern)
    for t, (mask, s) in enumerate(zip([masks] if one else masks, scores, strict=True)):
        assert mask.shape == s.shape
        assert mask.is_contiguous()
        matrix = mask.reshape(s.shape[0], s.shape[1], -1)
        for position in itertools.product(*map(range, matrix.shape)):
            assert bool(matrix[position]) == ((t, *GROUPS[pattern](*position)) in kept)


@pytest.mark.parametrize("pattern", [sb.Filter(), sb.Channel(), sb.Block(4, 3)])
def test_sums_do_not_depend_on_the_number_of_threads(pattern, threads):
    scores = torch.randn(130, 70, 3, 3)
    threads(1)
    expected = pattern.group_scores(scores)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(pattern.group_scores(scores), expected)


@pytest.mark.parametrize("shape", [(6, 8), (5, 4, 3, 3)])
def test_n_of_m(shape):
    scores = torch.randn(shape).mul(2).round()
    mask = sb.binarize(scores, pattern="nm:2:4")
    assert torch.equal(mask, row_oracle(scores.unflatten(1, (-1, 4)), 2, [2]).flatten(1, 2))
    one, two = sb.binarize([scores, -scores], pattern=sb.NM(2, 4), words=True)
    assert torch.equal(one.mask, mask)
    assert torch.equal(two.words, reference.mask_words(sb.binarize(-scores, pattern="nm:2:4"))[0])


def test_groups_have_words(backend):
    found = sb.binarize(torch.randn(40, 30), 7, pattern="block:4x4", words=True)
    assert torch.equal(found.words, reference.mask_words(found.mask)[0])
    assert torch.equal(found.counts, reference.mask_words(found.mask)[1])
    assert int(found.tiles(4, 4).sum()) == 7
    with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.float32"):
        BinaryMask.of(torch.zeros(3))


def test_groups_refuse():
    scores = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"k must be in \[0, 4\] for scores summed by filter of shape \[4\], got 5"):
        sb.binarize(scores, 5, pattern="filter")
    with pytest.raises(ValueError, match=r"k=3 is not allowed with pattern NM\(n=1, m=2\)"):
        sb.binarize(scores, 3, pattern="nm:1:2")
    with pytest.raises(ValueError, match=r"dim=1 is not allowed with pattern Filter\(\)"):
        sb.binarize(scores, 3, pattern="filter", dim=1)
    with pytest.raises(ValueError, match=r"fc must have two dimensions or more for pattern Filter\(\), got \[4\]"):
        sb.binarize(scores[:, 0], 3, pattern="filter", names=["fc"])
    with pytest.raises(TypeError, match="k must be an integer or a tensor of one, got None"):
        sb.binarize(scores, pattern="filter")
    scores[1, 2], scores[2, :2] = math.nan, torch.tensor([math.inf, -math.inf])
    with pytest.raises(ValueError, match="^scores summed by filter must not be NaN: 2 of 4 are$"):
        sb.binarize(scores, 1, pattern="filter")
    with pytest.raises(ValueError, match=r"^fc must not be NaN: 1 of 24 are$"):
        sb.binarize(scores, pattern="nm:1:2", names=["fc"])


def test_single_scores_go_to_the_kernel():
    scores = [torch.randn(4, 6), torch.randn(3)]
    for mask, expected in zip(sb.binarize(scores, 5), binarize(scores, 5), strict=True):
        assert torch.equal(mask, expected)
    assert torch.equal(sb.binarize(scores[0], 2, dim=1), binarize(scores[0], 2, dim=1))
    assert torch.equal(sb.binarize(scores[1], 2, words=True).words, binarize(scores[1], 2, words=True).words)


def test_scores_that_require_grad_give_a_mask_without():
    scores = torch.randn(8, requires_grad=True)
    mask = binarize(scores, 3)
    assert not mask.requires_grad
    (mask * scores).sum().backward()
    assert torch.equal(scores.grad, mask.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dim", [None, [1]])
def test_opcheck(dtype, requires_grad, dim, backend):
    scores = torch.randn(4, 3, 2).to(dtype).permute(2, 0, 1).requires_grad_(requires_grad)
    args = ([scores, scores[0]], torch.tensor(2), dim, dim is None, "a\nb")
    torch.library.opcheck(torch.ops.sparsebilevel.binarize.default, args)


def test_opcheck_of_tiles(backend):
    words = binarize(torch.randn(9, 40), 20, words=True).words
    torch.library.opcheck(torch.ops.sparsebilevel.occupied_tiles.default, (words, 9, 40, 2, 16))


def test_opcheck_of_words(backend):
    torch.library.opcheck(torch.ops.sparsebilevel.mask_words.default, (torch.randn(9, 40).t() > 0,))


def test_fake_tensors():
    with FakeTensorMode():
        one, two = binarize([torch.randn(3, 500), torch.randn(7)], 5, words=True)
        assert one.mask.shape == (3, 500)
        assert (one.words.shape, one.counts.shape, two.words.shape) == ((24,), (3,), (1,))
        assert one.tiles(2, 64).shape == (2, 8)
        assert binarize(torch.randn(4, 8), torch.tensor(2), dim=1).shape == (4, 8)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    def layer(x, scores, k):
        one, two = binarize([scores, scores[:2]], 10)
        tiles = binarize(scores, k, words=True).tiles(2, 8)
        blocks = sb.binarize(scores, k, pattern="block:2x2", words=True)
        return x * one * binarize(scores, 3, dim=1) + two.sum() + tiles.sum() + blocks.mask + blocks.counts[-1]

    scores = torch.randn(4, 25)
    x = torch.randn(4, 25)
    k = torch.tensor(7)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, scores, k), layer(x, scores, k))


def test_on_the_meta_device():
    scores = torch.empty(4, 8, device="meta")
    for mask in (binarize(scores, 3), binarize(scores, 3, dim=1), sb.binarize(scores, pattern="nm:2:4")):
        assert mask.is_meta
        assert (mask.shape, mask.dtype) == ((4, 8), torch.bool)
    found = binarize([scores, scores], 3, words=True)
    assert [part.shape for part in found[1]] == [(4, 8), (1,), (2,)]


@pytest.mark.parametrize(
    ("scores", "arguments", "error", "message"),
    [
        ({"fc": torch.ones(3)}, {}, TypeError, "scores must be a tensor or a list of tensors, got dict"),
        (np.ones(3), {}, TypeError, "scores must be a tensor or a list of tensors, got ndarray"),
        (torch.ones(3).to(torch.float8_e4m3fn), {}, TypeError, r"\(float32, .*\), got torch.float8_e4m3fn"),
        (torch.ones(3), {"dim": "0"}, TypeError, "dim must be an integer or integers, got '0'"),
        (torch.tensor(1.0), {"dim": 0}, ValueError, r"scores is a scalar, which has no dimension; got dim=\[0\]"),
        (
            torch.ones(4, 8),
            {"k": 3, "pattern": "block:4x4", "names": ["fc"]},
            ValueError,
            r"k must be in \[0, 2\] for fc summed by block of shape \[2\], got 3",
        ),
    ],
)
def test_more_of_what_is_refused(scores, arguments, error, message):
    with pytest.raises(error, match=message):
        sb.binarize(scores, **{"k": 1} | arguments)


def test_numpy_integers_are_dimensions():
    scores = torch.rand(4, 8)
    assert torch.equal(binarize(scores, 2, dim=np.int64(1)), binarize(scores, 2, dim=1))
