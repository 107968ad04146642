"""Patterns: exact counts, ties, global rankings, random masks."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebilevel.masks import (
    NM,
    Block,
    Channel,
    Filter,
    Unstructured,
    check_sparsity,
    global_masks,
    parse_pattern,
    random_mask,
)

linear_shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
conv_shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
patterns = st.one_of(
    st.sampled_from([Unstructured(), Filter(), Channel()]), st.builds(Block, st.integers(1, 4), st.integers(1, 4))
)
quick = settings(max_examples=80, deadline=None)


def groups_by_hand(pattern, shape) -> torch.Tensor:
    """Group number of every weight, written down once more from the documentation."""
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    rows = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    cols = torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    if isinstance(pattern, Unstructured):
        return index
    if isinstance(pattern, Filter):
        return rows
    if isinstance(pattern, Channel):
        return cols
    taps = torch.Size(shape[2:]).numel()
    tap = index % taps
    return ((rows // pattern.bh) * -(-shape[1] // pattern.bw) + cols // pattern.bw) * taps + tap


def mask_by_hand(pattern, scores, k) -> torch.Tensor:
    """The k groups of the largest sums, ties to the smaller group."""
    groups = groups_by_hand(pattern, scores.shape)
    sums = [float(scores[groups == g].double().sum()) for g in range(int(groups.max()) + 1)]
    best = sorted(range(len(sums)), key=lambda g: (-sums[g], g))[:k]
    return torch.isin(groups, torch.tensor(best, dtype=torch.int64))


@quick
@given(st.one_of(linear_shapes, conv_shapes), patterns, st.data())
def test_mask_keeps_exactly_the_k_best_groups(shape, pattern, data):
    # Small whole numbers: sums are exact and ties are common.
    values = data.draw(st.lists(st.integers(-2, 2), min_size=torch.Size(shape).numel(), max_size=10_000))
    scores = torch.tensor(values[: torch.Size(shape).numel()], dtype=torch.float32).view(shape)
    k = data.draw(st.integers(0, pattern.num_groups(shape)))
    mask = pattern.mask(scores, k)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert pattern.count(mask) == k
    assert torch.equal(mask, mask_by_hand(pattern, scores, k))


@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Channel(), Block(2, 3)])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 3)])
def test_ties_go_to_the_smaller_index(pattern, shape):
    total = pattern.num_groups(shape)
    for k in (0, 1, total // 2, total):
        kept = pattern.group_scores(pattern.mask(torch.zeros(shape), k).float()) > 0
        assert kept.tolist() == [i < k for i in range(total)]


@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Channel(), Block(2, 3)])
def test_a_mask_does_not_depend_on_the_memory_format(pattern):
    scores = torch.randn(5, 7, 3, 3)
    k = pattern.num_groups(scores.shape) // 3
    assert torch.equal(
        pattern.mask(scores, k), pattern.mask(scores.to(memory_format=torch.channels_last), k).contiguous()
    )


@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Channel(), Block(2, 2), NM(2, 4)])
def test_nan_scores_raise(pattern):
    scores = torch.zeros(4, 8)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pattern.mask(scores, 2)
    with pytest.raises(ValueError, match="NaN"):
        global_masks({"a": scores}, 4, pattern)


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([(), (3, 3), (1, 2)]), st.data())
def test_nm_keeps_n_of_every_run(rows, runs, kernel, data):
    m = data.draw(st.integers(2, 5))
    n = data.draw(st.integers(1, m - 1))
    shape = (rows, runs * m, *kernel)
    scores = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(rows + 7 * runs)).float()
    mask = NM(n, m).mask(scores)
    by_run = mask.movedim(1, -1).reshape(-1, m)
    assert (by_run.sum(1) == n).all()
    for kept, values in zip(by_run.tolist(), scores.movedim(1, -1).reshape(-1, m).tolist(), strict=True):
        assert {i for i in range(m) if kept[i]} == set(sorted(range(m), key=lambda i: (-values[i], i))[:n])


@quick
@given(shape=st.one_of(linear_shapes, conv_shapes), pattern=patterns, data=st.data())
def test_check_accepts_what_the_pattern_makes_and_nothing_else(shape, pattern, data):
    k = data.draw(st.integers(0, pattern.num_groups(shape)))
    mask = random_mask(shape, k, pattern)
    pattern.check(mask)
    groups = groups_by_hand(pattern, shape)
    position = data.draw(st.integers(0, mask.numel() - 1))
    alone = int((groups == groups.reshape(-1)[position]).sum()) == 1
    mask.view(-1)[position] ^= True
    if alone:
        pattern.check(mask)
    else:
        with pytest.raises(ValueError, match="mask does not fit pattern .* positions break it, the first is"):
            pattern.check(mask)


def test_check_of_nm_allows_fewer_and_all_and_no_more():
    pattern = NM(2, 4)
    mask = pattern.mask(torch.randn(3, 8, 2, 2))
    pattern.check(mask)
    pattern.check(torch.zeros_like(mask))
    pattern.check(torch.ones_like(mask))  # not pruned yet
    mask[1, 4:, 0, 1] = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match=r"NM\(n=2, m=4\): 3 positions break it, the first is \[1, 4, 0, 1\]"):
        pattern.check(mask)


def test_nm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="6 input channels, not a multiple of m=4"):
        NM(2, 4).mask(torch.zeros(3, 6))
    for n, m in ((0, 4), (4, 4), (5, 4), (-1, 2)):
        with pytest.raises(ValueError, match=rf"NM\(n={n}, m={m}\) is not allowed; expected whole numbers, 1 <= n < m"):
            NM(n, m)


@pytest.mark.parametrize(("bh", "bw", "name"), [(0, 4, "bh=0"), (4, -1, "bw=-1")])
def test_block_refuses_empty_blocks(bh, bw, name):
    with pytest.raises(ValueError, match=f"{name} is not allowed"):
        Block(bh, bw)


# -- global -----------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.data())
def test_global_masks_are_one_ranking(sizes, data):
    scores = {f"layer{i}": torch.randint(-3, 4, (n, 2)).float() for i, n in enumerate(sizes)}
    total = 2 * sum(sizes)
    k = data.draw(st.integers(len(sizes), total))
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    best = sorted(range(total), key=lambda i: (-float(flat[i]), i))[:k]
    expected = torch.zeros(total, dtype=torch.bool)
    expected[best] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = global_masks(scores, k)
    kept = torch.cat([m.reshape(-1) for m in masks.values()])
    assert int(kept.sum()) == k
    assert all(m.any() for m in masks.values())
    would_empty = any(not part.any() for part in expected.split([2 * n for n in sizes]))
    assert bool(caught) == would_empty
    if not would_empty:
        assert torch.equal(kept, expected)


def test_a_layer_that_the_ranking_would_empty_keeps_its_best_group():
    scores = {"large": torch.tensor([[5.0, 4.0, 3.0, 2.0]]), "small": torch.tensor([[0.1, 0.3, 0.2]])}
    with pytest.warns(UserWarning, match="layers 'small' would lose all weights in a global choice of 3 of 7 groups"):
        masks = global_masks(scores, 3)
    assert masks["large"].tolist() == [[True, True, False, False]]
    assert masks["small"].tolist() == [[False, True, False]]


@pytest.mark.parametrize("pattern", [Filter(), Channel(), Block(1, 64)])
def test_sums_of_16_bits_are_told_apart(pattern):
    scores = torch.ones(8, 64, dtype=torch.bfloat16)
    for row in range(8):
        scores[row, : 8 - row] = 0.99609375  # the last one has the largest sum
    if isinstance(pattern, Channel):
        scores = scores.t().contiguous()
    want = pattern.expand(torch.arange(8) >= 4, scores.shape)
    assert torch.equal(global_masks({"a": scores}, 4, pattern)["a"], want)
    assert torch.equal(pattern.mask(scores, 4), want)


def test_global_masks_of_filters():
    scores = {"a": torch.tensor([[1.0, 1.0], [3.0, -3.0]]), "b": torch.tensor([[9.0], [0.5], [8.0]])}
    masks = global_masks(scores, 3, Filter())
    assert masks["a"].tolist() == [[True, True], [False, False]]
    assert masks["b"].tolist() == [[True], [False], [True]]


def test_global_masks_of_nm_keep_the_runs():
    masks = global_masks({"a": torch.randn(4, 8), "b": torch.randn(2, 4)}, 20, NM(2, 4))
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in masks.values())


@pytest.mark.parametrize("k", [-1, 0, 1, 9])
def test_global_masks_refuse_impossible_counts(k):
    with pytest.raises(ValueError, match=f"k={k} is not allowed; 2 layers with 8 groups allow 2 to 8"):
        global_masks({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, k)


# -- random -----------------------------------------------------------------------------------------------------------


@quick
@given(st.one_of(linear_shapes, conv_shapes), patterns, st.data())
def test_random_masks_are_exact_and_repeatable(shape, pattern, data):
    k = data.draw(st.integers(0, pattern.num_groups(shape)))
    seed = data.draw(st.integers(0, 1000))
    first, second = (random_mask(shape, k, pattern, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert pattern.count(first) == k
    assert int(first.sum()) == int((groups_of_mask(pattern, first)).sum())
    assert torch.equal(first, second)
    assert first.device.type == "cpu"


def groups_of_mask(pattern, mask):
    """The mask with every touched group full: equal to the mask itself if groups live and die together."""
    return pattern.expand(pattern.group_scores(mask.float()) > 0, mask.shape)


def test_random_masks_follow_the_seed_and_are_spread_out():
    first, second = (random_mask((100, 100), 1000, Unstructured(), torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(first, second)
    assert 60 < int(first.sum(1).gt(5).sum())  # 10 a row are expected; no row hogs them
    nm = random_mask((8, 8), 32, NM(2, 4), torch.Generator().manual_seed(0))
    assert (nm.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Block(2, 3), NM(1, 4)])
def test_random_masks_are_drawn_on_the_cpu_whatever_the_default_device(pattern):
    expected = random_mask((8, 8), 4, pattern, torch.Generator().manual_seed(3))
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        assert torch.empty(1).is_meta
        found = random_mask((8, 8), 4, pattern, torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)
    torch.set_default_device("meta")
    try:
        found = random_mask((8, 8), 4, pattern, torch.Generator().manual_seed(3))
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


# -- spelling and small things ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("Filter", Filter()),
        ("channel", Channel()),
        ("block:64x32", Block(64, 32)),
        ("block:8:4", Block(8, 4)),
        ("nm:2:4", NM(2, 4)),
        (Block(3, 5), Block(3, 5)),
    ],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "rows", "block", "block:8", "block:axb", "nm:4:2", "nm:2:4:8", "filter:0", "filter:3:4", "block:0x4"]
)
def test_parse_pattern_names_what_is_allowed(text):
    allowed = "unstructured, filter, channel, filter:MULTIPLE, channel:MULTIPLE, block:BHxBW, nm:N:M"
    with pytest.raises(ValueError, match=f"pattern={text!r} is not allowed; expected one of {allowed}"):
        parse_pattern(text)


def test_global_masks_know_nothing_of_multiples():
    with pytest.raises(ValueError, match=r"pattern=Filter\(multiple=4\) is not allowed in a ranking over all layers"):
        global_masks({"a": torch.rand(8, 2)}, 4, Filter(4))
    assert global_masks({"a": torch.rand(8, 2)}, 4, Filter())["a"].sum() == 8


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.9", None, True])
def test_sparsity_outside_its_range(value):
    with pytest.raises(ValueError, match=r"sparsity=.* is not allowed; expected a number in \[0, 1\)"):
        check_sparsity(value)


def test_global_masks_keep_the_count_where_scores_are_minus_infinity():
    scores = {"b": torch.tensor([5.0, 6.0] + [-math.inf] * 4), "a": torch.full((4,), -math.inf)}
    with pytest.warns(UserWarning, match="layers 'a' would lose all weights"):
        masks = global_masks(scores, 6)
    assert masks["b"].tolist() == [True] * 5 + [False]
    assert masks["a"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("make", [lambda: Block(2.0, 2), lambda: Block(0, 2), lambda: Filter(1.5), lambda: NM(2.0, 4)])
def test_sizes_of_patterns_are_whole_numbers(make):
    with pytest.raises(ValueError, match="expected (a )?whole numbers?, "):
        make()


@pytest.mark.parametrize("k", [-3, 17])
def test_random_masks_of_counts_that_are_not_there(k):
    with pytest.raises(ValueError, match=rf"k={k} is not allowed; a weight of shape \[4, 4\] has 16 groups"):
        random_mask((4, 4), k, Unstructured())


def test_runs_that_do_not_divide_the_inputs_are_named_by_the_check():
    with pytest.raises(ValueError, match=r"weight of shape \[4, 6\] has 6 input channels, not a multiple of m=4"):
        NM(2, 4).check(torch.ones(4, 6, dtype=torch.bool))
