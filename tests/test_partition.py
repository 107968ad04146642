"""Training and test samples shared out over workers and clients."""

import numpy as np
import pytest
import torch

from sparsebilevel.data.partition import PARTITIONS, matching_partition, partition


def counts(targets, parts, classes):
    """[workers, classes]"""
    return torch.stack([targets[part].bincount(minlength=classes) for part in parts])


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("how", PARTITIONS)
@pytest.mark.parametrize("classes", [2, 10, 37])
def test_every_sample_goes_to_one_worker(how, balance, classes):
    targets = torch.randint(classes, (3000,))
    sources = torch.randint(40, (3000,))
    parts = partition(targets, 12, how, balance=balance, sources=sources, seed=3)
    assert len(parts) == 12
    assert torch.cat(parts).sort().values.tolist() == list(range(3000))
    assert min(map(len, parts)) >= 10
    again = partition(targets, 12, how, balance=balance, sources=sources, seed=3)
    assert all(map(torch.equal, parts, again))
    other = partition(targets, 12, how, balance=balance, sources=sources, seed=4)
    assert how == "source" or not all(map(torch.equal, parts, other))


def test_workers_with_their_share_get_no_further_class():
    """The rule of NIID-Bench: at most an equal share before the last class that one gets anything of."""
    targets = torch.randint(10, (5000,))
    for seed in range(5):
        held = counts(targets, partition(targets, 8, "dirichlet", alpha=0.3, balance=True, seed=seed), 10)
        for worker in held:
            last = int(worker.nonzero().max())
            assert worker[:last].sum() < 5000 / 8
    free = counts(targets, partition(targets, 8, "dirichlet", alpha=0.3, seed=0), 10)
    assert any(int(w[: int(w.nonzero().max())].sum()) >= 5000 / 8 for w in free)


def test_the_balance_rule_by_hand():
    """The same draws as the rule applied class by class, in plain words."""
    targets = torch.arange(600) % 3
    parts = partition(targets, 4, "dirichlet", alpha=1.0, balance=True, seed=5)
    random, sizes = np.random.default_rng(5), np.zeros(4)
    while sizes.min() < 10:
        sizes = np.zeros(4)
        for _ in range(3):
            q = random.dirichlet([1.0] * 4) * (sizes < 150)
            ends = np.round(np.cumsum(q / q.sum()) * 200)
            sizes += np.diff(ends, prepend=0)
    assert [len(part) for part in parts] == sizes.tolist()


def test_a_small_alpha_makes_workers_more_different():
    targets = torch.randint(10, (5000,))

    def classes_seen(alpha):
        held = counts(targets, partition(targets, 10, "dirichlet", alpha=alpha, balance=True), 10)
        return float((held > 0.02 * held.sum(1, keepdim=True)).sum(1).float().mean())

    assert classes_seen(0.1) < classes_seen(0.5) - 1 < classes_seen(100.0) - 2


def test_shards_hold_few_classes():
    targets = torch.arange(2000) % 10
    parts = partition(targets, 10, "shards", shards=2, seed=1)
    assert {len(part) for part in parts} == {200}
    assert max(len(targets[part].unique()) for part in parts) <= 2
    assert max(len(targets[part].unique()) for part in partition(targets, 10, "shards", shards=1)) == 1


@pytest.mark.parametrize("how", ["iid", "dirichlet", "label", "shards"])
def test_the_test_set_has_the_proportions_of_training(how):
    train, test = torch.randint(10, (5000,)), torch.randint(10, (1000,))
    parts = partition(train, 7, how, balance=True, seed=2)
    matching = matching_partition(train, parts, test, seed=2)
    assert torch.cat(matching).sort().values.tolist() == list(range(1000))
    ours, theirs = counts(test, matching, 10).double(), counts(train, parts, 10).double()
    expected = theirs / theirs.sum(0) * test.bincount(minlength=10)
    assert (ours - expected).abs().max() <= 1
    assert not any(map(torch.equal, matching, matching_partition(train, parts, test, seed=3)))


def test_a_class_without_training_samples_goes_by_size():
    parts = [torch.arange(30), torch.arange(30, 40)]
    matching = matching_partition(torch.zeros(40, dtype=torch.int64), parts, torch.ones(8, dtype=torch.int64))
    assert [len(part) for part in matching] == [6, 2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 41}, "workers=41"),
        ({"workers": 0}, "workers=0"),
        ({"how": "random"}, "partition='random'"),
        ({"how": "shards", "shards": 11}, "shards=11 .* expected 1 to 10"),
        ({"how": "dirichlet", "alpha": float("nan")}, "alpha=nan"),
        ({"how": "dirichlet", "alpha": 1e-3}, "no draw of 1000"),
    ],
)
def test_bad_arguments_are_refused(options, match):
    options = {"workers": 4, **options}
    with pytest.raises(ValueError, match=match):
        partition(torch.zeros(40, dtype=torch.int64), **options)


@pytest.mark.parametrize("how", PARTITIONS)
def test_positions_are_ascending(how):
    targets, sources = torch.randint(10, (500,)), torch.randint(40, (500,))
    parts = partition(targets, 6, how, sources=sources)
    for part in (*parts, *matching_partition(targets, parts, torch.randint(10, (90,)))):
        assert torch.equal(part, part.sort().values)


def test_equal_shares_of_an_alpha_beyond_all_sums():
    """Of numbers so large the sum would be infinite, and shares of it NaN."""
    targets = torch.arange(1000) % 10
    held = counts(targets, partition(targets, 5, "dirichlet", alpha=1e308), 10)
    assert torch.equal(held, torch.full((5, 10), 20))
