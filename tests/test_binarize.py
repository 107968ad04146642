"""Exactness of the k largest scores, against Python's own sort."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebilevel.kernels import binarize, binarize_many, native, reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few distinct values, so that ties are the rule; both zeros, infinities, and the smallest denormal of float32.
VALUES = [-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.0, math.inf]

needs_native = pytest.mark.skipif(not native.available(), reason=f"C++ extension: {native.reason}")


def oracle(scores, k):
    """Largest first, then smaller index: the definition, in Python."""
    values = scores.reshape(-1).tolist()
    kept = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])
    return torch.tensor([i in kept for i in range(len(values))], dtype=torch.bool).view(scores.shape)


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


@st.composite
def drawn_scores(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    numel = math.prod(shape)
    values = draw(st.lists(st.sampled_from(VALUES), min_size=numel, max_size=numel))
    scores = torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES))).view(shape)
    order = draw(st.permutations(range(len(shape))))
    return scores.permute(order), draw(st.integers(0, numel))


@given(drawn_scores())
@settings(max_examples=300, deadline=None)
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
def test_many_select_together(drawn, data):
    tensors = [scores for scores, _ in drawn]
    k = data.draw(st.integers(0, sum(t.numel() for t in tensors)))
    masks = binarize_many(tensors, k)
    assert [mask.shape for mask in masks] == [t.shape for t in tensors]
    if tensors:
        joined = torch.cat([t.reshape(-1).double() for t in tensors])
        assert torch.equal(torch.cat([mask.reshape(-1) for mask in masks]), oracle(joined, k))


@needs_native
@pytest.mark.parametrize("kind", ["normal", "rounded", "constant", "sorted", "wide"])
@pytest.mark.parametrize("isa", ["scalar", "avx512"])
def test_large_agrees_with_reference_for_any_threads(kind, isa, threads):
    n = 200_003  # several parts of unequal size
    scores = {
        "normal": lambda: torch.randn(n),
        "rounded": lambda: torch.randn(n).mul(4).round(),
        "constant": lambda: torch.ones(n),
        "sorted": lambda: torch.arange(n).float(),
        "wide": lambda: torch.randn(n).mul(40).exp() * torch.randn(n).sign(),
    }[kind]()
    before = native.lib.isa()
    native.lib.set_isa(native.lib.Isa.__members__[isa])
    try:
        for k in (0, 1, n // 10, n // 2, n - 1, n):
            expected = reference.binarize(scores, k)
            for count in (1, 2, 5):
                threads(count)
                assert torch.equal(binarize(scores, k), expected)
    finally:
        native.lib.set_isa(before)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_with_its_count(dtype, backend):
    scores = torch.randn(10).to(dtype)
    scores[[2, 7]] = math.nan
    scores[4] = -math.nan
    with pytest.raises(ValueError, match=r"scores must not be NaN: 3 of 10 are"):
        binarize(scores, 5)
    with pytest.raises(ValueError, match=r"scores must not be NaN: 3 of 12 are"):
        binarize_many([torch.zeros(2, dtype=dtype), scores], 0)


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range_is_refused(k, backend):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 6\] for scores of shape \[2, 3\], got {k}"):
        binarize(torch.randn(2, 3), k)


def test_other_refusals():
    with pytest.raises(TypeError, match=r"scores must be floating point, got torch\.int64"):
        binarize(torch.arange(3), 1)
    with pytest.raises(ValueError, match="for no scores, got 1"):
        binarize_many([], 1)
    assert binarize_many([], 0) == []


def test_scores_that_require_grad_give_a_mask_without():
    scores = torch.randn(8, requires_grad=True)
    mask = binarize(scores, 3)
    assert not mask.requires_grad
    (mask * scores).sum().backward()
    assert torch.equal(scores.grad, mask.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad, backend):
    scores = torch.randn(4, 3, 2).to(dtype).permute(2, 0, 1).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.sparsebilevel.binarize.default, (scores, 5))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    def layer(x, scores):
        return x * binarize(scores, 10)

    scores = torch.randn(4, 25)
    x = torch.randn(4, 25)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x, scores), layer(x, scores))
