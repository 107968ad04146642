"""Loaders: what they read, what they refuse, and that every batch depends on (seed, epoch, batch number) alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsebilevel._torchvision import import_torchvision
from sparsebilevel.data import Data, Loader, list_data, load_data, tensor_data
from sparsebilevel.data.datasets import _shift_and_flip
from sparsebilevel.data.partition import partition


def fake(**changes: object) -> Data:
    arguments = {"batch_size": 8, "num_samples": 100, "image_size": 6, "augment": True} | changes
    return load_data("fake", **arguments)  # type: ignore[arg-type]


def same(first: object, second: object) -> bool:
    """Whether two iterables of batches are bitwise equal."""
    pairs = list(zip(list(first), list(second), strict=True))  # type: ignore[call-overload]
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def positions(loader: Loader, epoch: int = 0) -> list[int]:
    """The samples of an epoch, in order, read off by replacing the labels."""
    source = loader.source
    source._device_labels = torch.arange(len(source.labels))  # type: ignore[attr-defined]
    return [i for _, y in loader.iterate(epoch) for i in y.tolist()]


def test_fake_is_deterministic_and_can_be_learned() -> None:
    first, second = fake(num_classes=7, augment=False), fake(num_classes=7, augment=False)
    assert same(first.train, second.train)
    assert first.num_classes == 7
    assert first.input_shape == (3, 6, 6)
    x, y = next(iter(fake(batch_size=100, augment=False).train))
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    test = [(x, y) for x, y in fake(augment=False).test]
    correct = sum((torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).sum().item() for x, y in test)
    assert correct >= 24  # of 25, by the nearest class mean


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_without_a_traceback(workers: int, tmp_path: Path) -> None:
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from PIL import Image

    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(path := tmp_path / part / "cat" / "1.png")
    path.write_bytes(path.read_bytes()[:-40])  # PIL names the file of what is no image, but not of half of one
    data = load_data("imagefolder", tmp_path, batch_size=1, image_size=16, num_workers=workers)
    with pytest.raises(ValueError, match=r"^\S*/val/cat/1.png cannot be read as an image \(.*\)$"):
        list(data.test)


def test_imagefolder(tmp_path: Path) -> None:
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, samples in (("train", 6), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(samples):
                image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
                image.save(tmp_path / part / label / f"{i}.png")

    def load(**changes: object) -> Data:
        arguments = {"batch_size": 4, "image_size": 16, "num_workers": 0} | changes
        return load_data("imagefolder", tmp_path, **arguments)  # type: ignore[arg-type]

    data = load(validation=2)
    assert (data.num_classes, data.input_shape) == (2, (3, 16, 16))
    assert (len(data.train.labels), len(data.test.labels)) == (10, 6)
    state = torch.get_rng_state()
    batches = list(data.train.iterate(1))
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert batches[0][0].shape == (4, 3, 16, 16)
    # Augmentation belongs to the sample, so neither a resumed epoch nor the number of workers changes it.
    assert same(batches[1:], data.train.iterate(1, 1))
    assert same(batches, load(validation=2, num_workers=1).train.iterate(1))
    assert not same(batches, data.train.iterate(2))
    assert data.val is not None
    assert same(data.val, data.val)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(ValueError, match="must hold the same classes"):
        load()
    with pytest.raises(FileNotFoundError, match="must hold train/ and val/"):
        load_data("imagefolder", tmp_path / "nowhere", batch_size=2)


# -- order, augmentation, resuming -------------------------------------------------------------------------------------


def test_an_epoch_depends_on_seed_and_epoch_only() -> None:
    first, second = fake().train, fake().train
    torch.manual_seed(1)
    expected = list(first.iterate(3))
    torch.manual_seed(2)
    for epoch in range(3):
        list(second.iterate(epoch))
    assert same(expected, second.iterate(3))
    second.set_epoch(3)
    assert same(expected, second)
    assert len(expected) == len(second) == 12
    assert not same(expected, first.iterate(4))
    assert not same(expected, fake(seed=1).train.iterate(3))


def test_the_global_generators_are_left_alone() -> None:
    data, state = fake(validation=0.1), torch.get_rng_state()
    list(data.train), list(data.test), list(data.split(0.5)[1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_resuming_within_an_epoch(start: int) -> None:
    train = fake().train
    assert same(list(train.iterate(2))[start:], fake().train.iterate(2, start))


def test_stream_runs_through_the_epochs() -> None:
    train = fake().train
    expected = [*train.iterate(0), *train.iterate(1), *train.iterate(2)]
    assert same(expected, islice(train.stream(), 36))
    assert same(expected[17:], islice(train.stream(17), 19))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch(world_size: int) -> None:
    data = [fake(rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [positions(d.train, epoch=1) for d in data]
    assert len({len(s) for s in seen}) == 1  # equal shares
    assert len(set().union(*seen)) == sum(map(len, seen))  # disjoint
    assert sorted(i for d in data for i in positions(d.test)) == list(range(25))  # all, once


def test_augmentation_of_a_sample_does_not_depend_on_the_world_size() -> None:
    whole = torch.cat([x for x, _ in fake(batch_size=50).train])
    parts = [torch.cat([x for x, _ in fake(batch_size=50, rank=rank, world_size=2).train]) for rank in range(2)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])


def test_shift_and_flip() -> None:
    x = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4).expand(18, 1, 3, 4)
    y = _shift_and_flip(x, torch.arange(18), pad=1, flip=True)
    padded = torch.nn.functional.pad(x[0, 0], (1, 1, 1, 1))
    for draw in range(18):
        dy, dx, mirrored = draw % 3, draw // 3 % 3, draw // 9
        crop = padded[dy : dy + 3, dx : dx + 4]
        assert torch.equal(y[draw, 0], crop.flip(1) if mirrored else crop)
    assert torch.equal(_shift_and_flip(x, torch.full((18,), 4), pad=1, flip=False), x)


def test_augmentation_can_be_switched_off() -> None:
    def images(*, augment: bool, seed: int) -> list[bytes]:
        loader = fake(augment=augment).train.subset(range(8), seed=seed)
        return sorted(image.numpy().tobytes() for x, _ in loader for image in x)

    assert images(augment=False, seed=0) == images(augment=False, seed=1)
    assert images(augment=True, seed=0) != images(augment=True, seed=1)


def test_channels_last() -> None:
    x, _ = next(iter(fake(channels_last=True).train))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, next(iter(fake().train))[0])


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [10, 0.1])
def test_validation_split(validation: float) -> None:
    data = fake(validation=validation, batch_size=1)
    assert data.val is not None
    assert len(data.val.labels) == 10
    train, val = positions(data.train), positions(data.val)
    assert sorted(train + val) == list(range(100))
    assert sorted(val) == sorted(data.val.indices.tolist())
    assert torch.equal(data.val.indices, fake(validation=validation, rank=1, world_size=2).val.indices)  # type: ignore[union-attr]
    assert not torch.equal(data.val.indices, fake(validation=validation, seed=1).val.indices)  # type: ignore[union-attr]


def test_bilevel_split_same() -> None:
    data = fake()
    lower, upper = data.split("same", batch_size=4)
    assert lower is data.train
    assert upper.batch_size == 4
    assert torch.equal(lower.indices, upper.indices)
    assert same(upper, fake().split("same", batch_size=4)[1])
    assert positions(lower)[:96] != positions(upper)[:96]


def test_bilevel_split_held_out() -> None:
    data = fake(validation=20, batch_size=2)
    lower, upper = data.split(0.25)
    assert (len(lower.labels), len(upper.labels)) == (60, 20)
    assert data.val is not None
    parts = [set(part.indices.tolist()) for part in (lower, upper, data.val)]
    assert set.union(*parts) == set(range(100))
    assert sum(map(len, parts)) == 100
    assert len(data.split(7)[1].labels) == 7


def test_subset() -> None:
    train = fake().train
    client = train.subset([5, 2, 9], batch_size=2, drop_last=False)
    assert client.indices.tolist() == [5, 2, 9]
    assert [len(y) for _, y in client] == [2, 1]
    assert torch.equal(client.labels, train.labels[[5, 2, 9]])
    assert client.subset(torch.tensor([2]), batch_size=1).indices.tolist() == [9]  # positions in the subset


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"batch_size": -3}, "batch_size=-3: must be at least 1"),
        ({"batch_size": 101}, "batch_size=101: no batch from 100 samples"),
        ({"batch_size": 51, "world_size": 2}, r"batch_size=51: no batch from 100 samples for 2 rank\(s\)"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: must be at least 1"),
        ({"validation": 100}, "validation=100: must be a fraction between 0 and 1 or a count below the 100"),
        ({"validation": -1}, "validation=-1: must be"),
        ({"validation": 1.0}, r"validation=1\.0: must be"),
        ({"validation": 0.001}, r"validation=0\.001: must be .* leave at least one"),
        ({"validation": float("nan")}, "validation=nan: must be"),
        ({"validation": True}, "validation=True: must be"),
        ({"rank": 2, "world_size": 2}, r"rank=2: must be in 0\.\.1"),
        ({"world_size": 0}, "world_size=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"num_workers": -1}, "num_workers=-1: must be at least 0"),
        ({"image_size": 0}, "image_size=0: must be at least 1"),
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
    ],
)
def test_bad_arguments(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake(**changes)


def test_bad_names_and_options() -> None:
    with pytest.raises(ValueError, match=r"name='cifar': unknown data set; must be one of digits, mnist, cifar10"):
        load_data("cifar", batch_size=1)
    with pytest.raises(ValueError, match="image_size=9: digits has its own"):
        load_data("digits", batch_size=1, image_size=9)
    assert list_data() == ["digits", "mnist", "cifar10", "cifar100", "imagefolder", "fake"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: data.train.iterate(0, 13), r"start_batch=13: must be in 0\.\.12"),
        (lambda data: data.train.iterate(-1), "epoch=-1: must be at least 0"),
        (lambda data: data.train.set_epoch(-1), "epoch=-1: must be at least 0"),
        (lambda data: data.train.subset([0, 100]), r"positions=0\.\.100: must be in 0\.\.99"),
        (lambda data: data.train.subset(torch.ones(100, dtype=torch.bool)), "positions are torch.bool: must be whole"),
        (lambda data: data.train.subset([0.5]), "positions are torch.float32: must be whole numbers"),
        (lambda data: data.train.subset([]), "no batch from 0 samples"),
        (lambda data: data.split("half"), "upper='half': must be 'same'"),
        (lambda data: data.split(0), "upper=0: must be a fraction between 0 and 1 or a count below the 100"),
    ],
)
def test_bad_calls(call: Callable[[Data], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(fake())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_dirichlet_takes_finite_numbers_above_0(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha={alpha} is not allowed; expected a finite number above 0"):
        partition(torch.arange(40) % 4, 2, "dirichlet", alpha=alpha)


def test_the_least_number_of_samples_that_a_worker_needs_is_said() -> None:
    """A third of so few, and not 10."""
    with pytest.raises(ValueError, match=r"no draw of 1000 gave each of 3 workers 2 samples"):
        partition(torch.zeros(6, dtype=torch.int64), 3, "dirichlet", alpha=1e-3)


def test_own_samples() -> None:
    x, y = torch.randn(20, 2, 3, 4), torch.arange(20) % 3
    data = tensor_data((x, y), (x[:7], y[:7].int()), batch_size=5, validation=0.25, seed=1)
    assert data.num_classes == 3
    assert data.input_shape == (2, 3, 4)
    got = [torch.cat(part) for part in zip(*data.test, strict=True)]
    assert torch.equal(got[0], x[:7])
    assert torch.equal(got[1], y[:7])
    assert data.val is not None
    assert sorted([*data.train.indices.tolist(), *data.val.indices.tolist()]) == list(range(20))
    for images, labels in data.train:
        assert images.dtype == torch.float32
        rows = [int((x == image).flatten(1).all(1).nonzero()) for image in images]
        assert labels.tolist() == y[rows].tolist()
    assert tensor_data((x.double(), y), (x, y), batch_size=4, num_classes=9).num_classes == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": (torch.zeros(4, 2, 3, 3), torch.zeros(4, dtype=torch.int64))}, r"test: inputs \[4, 2, 3, 3\]"),
        ({"train": (torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))}, r"train: inputs \[4, 8\]"),
        ({"test": (torch.zeros(4, 2, 3, 4), torch.zeros(3, dtype=torch.int64))}, r"labels \[3\]"),
        ({"test": (torch.zeros(4, 2, 3, 4), torch.zeros(4))}, r"test: 4 labels of torch.float32"),
        ({"test": (torch.zeros(4, 2, 3, 4), torch.tensor([0, 1, 2, -1]))}, r"labels -1..2: must be in 0..2"),
        ({"num_classes": 2}, r"labels 0..2: must be in 0..1"),
        ({"rank": 1}, r"rank=1: must be in 0..0"),
    ],
)
def test_own_samples_that_do_not_fit(change: dict[str, object], message: str) -> None:
    samples = torch.zeros(6, 2, 3, 4), torch.arange(6) % 3
    arguments: dict[str, object] = {"train": samples, "test": samples, "batch_size": 2} | change
    with pytest.raises(ValueError, match=message):
        tensor_data(**arguments)  # type: ignore[arg-type]


def test_evaluation_has_a_batch_size_of_its_own() -> None:
    for data in (fake(validation=0.25), fake(validation=0.25, eval_batch_size=5)):
        expected = 5 if data.test.batch_size == 5 else 8
        for loader in (data.val, data.test):
            assert loader is not None
            assert len(next(iter(loader))[1]) == loader.batch_size == expected
    assert fake(eval_batch_size=5).test.batch_size == 5
    assert fake(eval_batch_size=5).train.batch_size == 8
