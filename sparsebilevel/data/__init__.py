"""Data loaders whose every batch is a function of (seed, epoch, batch number), so that a resumed run repeats itself.

`load_data` reads a data set and gives a `Data` with `train`, `val` and `test` loaders. Small images are held as uint8
tensors on the device and shifted, flipped and normalised there a batch at a time; an image folder goes through worker
processes. Orders and augmentation come from generators of their own, never from the global ones of torch, NumPy or
Python, and are the same on every device.

The data set `digits` is part of the package: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998, doi:10.24432/C50P49, licensed under CC BY 4.0.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .datasets import IMAGE_SETS, Batch, FolderSource, ReadySource, Source, TensorSource, make_fake

__all__ = ["Data", "Loader", "list_data", "load_data", "tensor_data"]


# The data sets without files of a fixed shape, and the arguments of `load_data` that only they take.
_OPTIONS = {"imagefolder": ("image_size",), "fake": ("image_size", "num_classes", "num_samples")}


def list_data() -> list[str]:
    """The names that `load_data` takes."""
    return [*IMAGE_SETS, *_OPTIONS]


# Second words of a seed, one for each independent use of it.
_ORDER, _VALIDATION, _UPPER_PART, _UPPER_ORDER = range(4)


def make_seed(*words: int) -> int:
    """One 32-bit seed from several; close words, such as seeds 0 and 1, give unrelated results."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _check_at_least(least: int, **arguments: int | None) -> None:
    for argument, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"{argument}={value}: must be at least {least}")


def _hold_out(argument: str, amount: float, total: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions (rest, held out), ascending, of a random choice of `amount` of `total`: a count or a fraction."""
    is_count = isinstance(amount, int) and not isinstance(amount, bool)
    valid = 0 < amount < (total if is_count else 1)
    count = int(amount if is_count else round(amount * total)) if valid else 0
    if not 0 < count < total:
        raise ValueError(
            f"{argument}={amount!r}: must be a fraction between 0 and 1 or a count below the {total} training samples, "
            "and leave at least one sample on either side"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values


@dataclass(eq=False, kw_only=True)
class Loader:
    """Batches (images float32 [B, C, H, W], labels int64 [B]) on the device, of some samples of a data set.

    A *training* loader shuffles anew for each epoch, augments if asked, gives each of the `world_size` ranks a disjoint
    share of the same size, and by default drops an incomplete last batch. Its batches depend on (seed, epoch, rank,
    world size) only. An *evaluation* loader gives every sample exactly once, in order; rank r has the samples r,
    r + world_size, ..., so the last batches, and even their number, may differ between ranks.

        for epoch in range(epochs):
            loader.set_epoch(epoch)          # else every epoch repeats the order of epoch 0
            for x, y in loader: ...

    Made by `load_data` and `tensor_data`; `subset` and `Data.split` give further ones.
    """

    source: Source = field(repr=False)
    indices: Tensor = field(repr=False)  # int64 [n] on the CPU: the samples, as positions in the training or test part
    batch_size: int  # of one rank
    train: bool
    augment: bool
    drop_last: bool
    seed: int
    rank: int
    world_size: int
    epoch: int = 0

    def __post_init__(self) -> None:
        _check_at_least(1, batch_size=self.batch_size)
        n = len(self.indices)
        # Equal shares in training, since ranks wait for each other; all samples in evaluation.
        self._share = slice(self.rank, n - n % self.world_size if self.train else n, self.world_size)
        share = len(range(n)[self._share])
        self._length = share // self.batch_size if self.drop_last else -(-share // self.batch_size)
        if n == 0 or (self.train and self._length == 0):
            raise ValueError(
                f"batch_size={self.batch_size}: no batch from {n} samples for {self.world_size} rank(s)"
                + (" with drop_last=True" if self.drop_last else "")
            )

    @property
    def labels(self) -> Tensor:
        """int64 [n] on the CPU, of all ranks' samples, in the order of `indices`."""
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iterating gives, from 0."""
        _check_at_least(0, epoch=epoch)
        self.epoch = epoch

    def iterate(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start_batch` on, the same ones that an uninterrupted epoch gives."""
        _check_at_least(0, epoch=epoch)
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch}: must be in 0..{len(self)}, the number of batches")
        indices, draws = self.indices, None
        if self.train:
            # Order and augmentation of the whole epoch at once, for all ranks; then each takes its share.
            generator = torch.Generator().manual_seed(make_seed(self.seed, _ORDER, epoch))
            indices = indices[torch.randperm(len(indices), generator=generator)]
            if self.augment:
                draws = torch.randint(2**31, (len(indices),), generator=generator)
        span = slice(start_batch, len(self))
        return self.source.batches(
            indices[self._share].split(self.batch_size)[span],
            None if draws is None else draws[self._share].split(self.batch_size)[span],
        )

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Batches without end, epoch after epoch; number `start` is the first, counted over all epochs."""
        epoch, batch = divmod(start, len(self))
        while True:
            yield from self.iterate(epoch, batch)
            epoch, batch = epoch + 1, 0

    def subset(
        self,
        positions: Tensor | Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
        seed: int | None = None,
        drop_last: bool | None = None,
    ) -> Loader:
        """A second, independent loader of the same kind, with what is given changed.

        Args:
            positions: integers [m], positions in this loader's `indices` and `labels`; default all of them.
            batch_size: samples in a batch of one rank.
            seed: of order and augmentation (training only); another seed gives an unrelated order of the same samples.
            drop_last: whether an incomplete last batch is left out.

        Raises:
            ValueError: a position is no whole number or outside 0..n-1, or not even one batch is left.
        """
        indices = self.indices
        if positions is not None:
            chosen = torch.as_tensor(positions)
            if chosen.dtype == torch.bool or (chosen.is_floating_point() and chosen.numel()):
                raise ValueError(
                    f"positions are {chosen.dtype}: must be whole numbers (of a mask, mask.nonzero()[:, 0])"
                )
            chosen = chosen.long()
            if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(indices):
                raise ValueError(
                    f"positions={int(chosen.min())}..{int(chosen.max())}: must be in 0..{len(indices) - 1}"
                )
            indices = indices[chosen]
        return replace(
            self,
            indices=indices,
            batch_size=self.batch_size if batch_size is None else batch_size,
            seed=self.seed if seed is None else seed,
            drop_last=self.drop_last if drop_last is None else drop_last,
        )


@dataclass(frozen=True, eq=False)
class Data:
    """A data set's loaders, and what a model must know: `num_classes` and `input_shape` = (C, H, W).

    `val` is the held-out part of the training set, read without augmentation, or None.
    """

    train: Loader
    val: Loader | None
    test: Loader
    num_classes: int
    input_shape: tuple[int, int, int]

    def digest(self) -> str:
        """Eight digits that tell these samples from others, wherever they lie."""
        crc = 0
        for part in (self.train, self.test):
            crc = zlib.crc32(part.source.labels.numpy().data, part.source.digest(crc))
        return f"{crc:08x}"

    def split(self, upper: float | Literal["same"], batch_size: int | None = None) -> tuple[Loader, Loader]:
        """The two training loaders (lower, upper) of a bilevel method whose levels have batches of their own.

        Args:
            upper: "same" for all training samples at both levels, in independent orders (as in BiP's code); or the
                part held out for the upper level alone, as a fraction or a count.
            batch_size: of the upper level; default the lower level's.

        Raises:
            ValueError: `upper` leaves either level without a sample, or with less than a batch.
        """
        train = self.train
        seed = make_seed(train.seed, _UPPER_ORDER)
        if upper == "same":
            return train, train.subset(batch_size=batch_size, seed=seed)
        if isinstance(upper, str):
            raise ValueError(f"upper={upper!r}: must be 'same', a fraction or a count")
        lower_part, upper_part = _hold_out("upper", upper, len(train.indices), make_seed(train.seed, _UPPER_PART))
        return train.subset(lower_part), train.subset(upper_part, batch_size=batch_size, seed=seed)


def load_data(
    name: str,
    data_path: str | os.PathLike[str] = ".",
    *,
    batch_size: int,
    eval_batch_size: int | None = None,
    device: torch.device | str = "cpu",
    augment: bool | None = None,
    validation: float = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
    num_workers: int = 4,
    image_size: int | None = None,
    num_classes: int | None = None,
    num_samples: int | None = None,
) -> Data:
    """Read the data set `name` and return its loaders.

    Args:
        name: `digits` (embedded), `mnist`, `cifar10`, `cifar100`, `imagefolder` or `fake` (random images).
        data_path: where its files lie: data_path/cifar-10-batches-py, data_path/MNIST/raw, ..., or data_path itself;
            for `imagefolder`, data_path/train and data_path/val, the latter used as the test set.
        batch_size: training samples in a batch of one rank.
        eval_batch_size: the same for validation and test; default `batch_size`.
        device: where batches, and data sets other than `imagefolder`, are held.
        augment: random shifts (and flips for CIFAR), or random resized crops and flips for `imagefolder`, in training.
            Default: yes for CIFAR and `imagefolder`, no for the others. A padded pixel is black before normalisation.
        validation: part of the training set held out, as a fraction (float) or a count (int); 0 for none.
        seed: of the orders, the augmentation and the held-out choice; at least 0.
        rank, world_size: this process and the number of processes that share each epoch.
        channels_last: give images in that memory format.
        num_workers: processes that read images (`imagefolder` only).
        image_size: height and width (`imagefolder`: default 224; `fake`: default 32; not for the others).
        num_classes, num_samples: classes and training samples of `fake` (default 10 and 1024; not for the others).

    Raises:
        FileNotFoundError: a file is missing; the message says where to get it.
        ValueError: a file is damaged, or an argument is outside its range.
        ImportError: `imagefolder` without torchvision.
    """
    if name not in list_data():
        raise ValueError(f"name={name!r}: unknown data set; must be one of {', '.join(list_data())}")
    options = {"image_size": image_size, "num_classes": num_classes, "num_samples": num_samples}
    for argument, value in options.items():
        if value is not None and argument not in _OPTIONS.get(name, ()):
            raise ValueError(f"{argument}={value}: {name} has its own, which cannot be changed")
    _check_at_least(0, seed=seed, num_workers=num_workers)
    _check_at_least(1, eval_batch_size=eval_batch_size, world_size=world_size, **options)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be in 0..{world_size - 1} (world_size={world_size})")

    path, device = Path(data_path).expanduser(), torch.device(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    train: Source
    test: Source
    if name == "imagefolder":
        size = image_size or 224
        train, test = (FolderSource(path / part, size, num_workers, device, memory_format) for part in ("train", "val"))
        if train.classes != test.classes:
            raise ValueError(f"{path}: train/ and val/ must hold the same classes")
        classes, input_shape, default_augment = len(train.classes), (3, size, size), True
    else:
        fake = name == "fake"
        spec = make_fake(num_classes or 10, image_size or 32, num_samples or 1024) if fake else IMAGE_SETS[name]
        splits = spec.read(path)
        channels, height, width = splits[0].images.shape[1:]
        train, test = (TensorSource(split, spec, device, memory_format) for split in splits)
        classes, input_shape, default_augment = spec.num_classes, (channels, height, width), spec.augment

    return _make_data(
        *(train, test, classes, input_shape, default_augment if augment is None else augment, batch_size),
        *(eval_batch_size, validation, seed, rank, world_size),
    )


def tensor_data(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    batch_size: int,
    eval_batch_size: int | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    validation: float = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Data:
    """The loaders of your own samples, as `load_data` gives those of a known data set.

    Args:
        train, test: inputs [n, C, H, W], as the network is to read them (normalised), and integer labels [n] from 0.
        num_classes: by default as many as the labels name.
        batch_size, eval_batch_size, device, validation, seed, rank, world_size: as in `load_data`.

    Raises:
        ValueError: tensors that do not fit each other, or labels outside of the classes.
    """
    _check_at_least(0, seed=seed)
    _check_at_least(1, eval_batch_size=eval_batch_size, world_size=world_size, num_classes=num_classes)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be in 0..{world_size - 1} (world_size={world_size})")
    for name, (inputs, labels) in (("train", train), ("test", test)):
        if inputs.dim() != 4 or inputs.shape[1:] != train[0].shape[1:] or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{name}: inputs {list(inputs.shape)} and labels {list(labels.shape)}; must be [n, C, H, W], of one "
                "size for both parts, and [n]"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool or not len(labels):
            raise ValueError(f"{name}: {len(labels)} labels of {labels.dtype}; must be integers, at least one")
    lowest, highest = (getattr(torch.cat([train[1].cpu(), test[1].cpu()]), name)() for name in ("min", "max"))
    classes = int(highest) + 1 if num_classes is None else num_classes
    if lowest < 0 or highest >= classes:
        raise ValueError(f"labels {int(lowest)}..{int(highest)}: must be in 0..{classes - 1}")
    sources = [ReadySource(inputs, labels.long(), torch.device(device)) for inputs, labels in (train, test)]
    channels, height, width = train[0].shape[1:]
    return _make_data(
        *(sources[0], sources[1], classes, (channels, height, width), False, batch_size),
        *(eval_batch_size, validation, seed, rank, world_size),
    )


def _make_data(
    train: Source,
    test: Source,
    classes: int,
    input_shape: tuple[int, int, int],
    augment: bool,
    batch_size: int,
    eval_batch_size: int | None,
    validation: float,
    seed: int,
    rank: int,
    world_size: int,
) -> Data:
    every = torch.arange(len(train.labels))
    held_out = None
    if validation:
        every, held_out = _hold_out("validation", validation, len(every), make_seed(seed, _VALIDATION))
    training = Loader(
        source=train,
        indices=every,
        batch_size=batch_size,
        train=True,
        augment=augment,
        drop_last=True,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
    evaluation = replace(training, batch_size=eval_batch_size, train=False, augment=False, drop_last=False)
    return Data(
        train=training,
        val=None if held_out is None else replace(evaluation, indices=held_out),
        test=replace(evaluation, source=test, indices=torch.arange(len(test.labels))),
        num_classes=classes,
        input_shape=input_shape,
    )
