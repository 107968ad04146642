"""Image data sets: reading their files, and giving out samples by index. `sparsebilevel.data` makes loaders of them.

The embedded digits (`digits.npz`) are E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0; see digits.txt beside the file.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._torchvision import import_torchvision

Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """One part of a data set held in memory: `images` uint8 [N, C, H, W] and `labels` int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """How to read a data set and what is customary for it.

    `mean` and `std` are per channel, of pixels divided by `max_pixel`. Augmentation shifts by up to `pad` pixels and,
    with `flip`, mirrors at random; `augment` says whether it is on unless asked otherwise.
    """

    read: Callable[[Path], tuple[Split, Split]]  # data path -> train, test
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    augment: bool
    max_pixel: int = 255


def _find(name: str, data_path: Path, candidates: Sequence[str], source: str) -> Path:
    for candidate in candidates:
        if (data_path / candidate).is_file():
            return data_path / candidate
    raise FileNotFoundError(f"{name}: {data_path / candidates[0]} does not exist; get it from {source}")


def _damaged(path: Path, reason: str, source: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}); get it again from {source}")


def _to_split(path: Path, images: np.ndarray, labels: np.ndarray, num_classes: int, source: str) -> Split:
    if len(images) == 0 or len(images) != len(labels):
        raise _damaged(path, f"{len(images)} images and {len(labels)} labels", source)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise _damaged(path, f"labels {labels.min()}..{labels.max()}, must be in 0..{num_classes - 1}", source)
    # The copies are writable and owned by torch; frombuffer and pickle may give arrays that are neither.
    return Split(torch.tensor(images, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64))


# -- digits ------------------------------------------------------------------------------------------------------------


def read_digits(_data_path: Path) -> tuple[Split, Split]:
    """The embedded digits, pixels 0..16: 1437 for training and 360 for the test.

    The split is fixed: sort by class, keeping the file's order within a class; every fifth image, from the first on, is
    a test image. So each class is a fifth of itself in the test set, to within one image.
    """
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images = torch.from_numpy(arrays["images"]).unsqueeze(1)
        labels = torch.from_numpy(arrays["labels"]).long()
    by_class = torch.argsort(labels, stable=True)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[by_class[::5]] = True
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])


# -- CIFAR -------------------------------------------------------------------------------------------------------------


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module has moved between versions of NumPy
_ARRAY_PARTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): codecs.encode,  # bytes, where Python 3 wrote protocol 2
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, bytes, numbers and NumPy arrays. Anything else is refused, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ARRAY_PARTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no data set needs") from None


_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


def _read_cifar(data_path: Path, folder: str, files: Sequence[str], label_key: bytes, num_classes: int) -> Split:
    source = (
        f"https://www.cs.toronto.edu/~kriz/cifar.html (cifar-{num_classes}-python.tar.gz, unpacked in the data path)"
    )
    parts = []
    for name in files:
        path = _find(f"cifar{num_classes}", data_path, (f"{folder}/{name}", name), source)
        content = path.read_bytes()
        try:
            batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
            images, labels = batch[b"data"], np.asarray(batch[label_key])
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise _damaged(path, f"{type(error).__name__}: {error}", source) from error
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,):
            raise _damaged(path, "its data are not uint8 [N, 3072]", source)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise _damaged(path, "its labels are not a list of integers", source)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != _CIFAR_MD5[name]:
            warnings.warn(f"{path} differs from the published file (MD5); its content is used as it is", stacklevel=2)
        parts.append(_to_split(path, images.reshape(-1, 3, 32, 32), labels, num_classes, source))
    return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def read_cifar10(data_path: Path) -> tuple[Split, Split]:
    """The Python pickles of CIFAR-10, in data_path/cifar-10-batches-py or in data_path itself."""
    folder, train = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
    return (
        _read_cifar(data_path, folder, train, b"labels", 10),
        _read_cifar(data_path, folder, ["test_batch"], b"labels", 10),
    )


def read_cifar100(data_path: Path) -> tuple[Split, Split]:
    """The Python pickles of CIFAR-100 (fine labels), in data_path/cifar-100-python or in data_path itself."""
    return (
        _read_cifar(data_path, "cifar-100-python", ["train"], b"fine_labels", 100),
        _read_cifar(data_path, "cifar-100-python", ["test"], b"fine_labels", 100),
    )


# -- MNIST -------------------------------------------------------------------------------------------------------------


_MNIST_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/ (the four .gz files)"


def _read_idx(data_path: Path, name: str, ndim: int) -> tuple[Path, np.ndarray]:
    candidates = [f"{folder}{name}{suffix}" for folder in ("MNIST/raw/", "") for suffix in ("", ".gz")]
    path = _find("mnist", data_path, candidates, _MNIST_SOURCE)
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, str(error), _MNIST_SOURCE) from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, 8, ndim)):  # 8 = unsigned bytes
        raise _damaged(path, f"no idx header of {ndim}-dimensional bytes", _MNIST_SOURCE)
    shape = np.frombuffer(content, ">u4", ndim, 4).tolist()
    if len(content) != header + int(np.prod(shape, dtype=object)):
        raise _damaged(path, f"{len(content) - header} bytes of data, its header says {shape}", _MNIST_SOURCE)
    return path, np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_mnist(data_path: Path) -> tuple[Split, Split]:
    """The idx files of MNIST, gzipped or not, in data_path/MNIST/raw or in data_path itself."""

    def read(part: str) -> Split:
        path, images = _read_idx(data_path, f"{part}-images-idx3-ubyte", 3)
        _, labels = _read_idx(data_path, f"{part}-labels-idx1-ubyte", 1)
        return _to_split(path, images[:, None], labels, 10, _MNIST_SOURCE)

    return read("train"), read("t10k")


# -- fake --------------------------------------------------------------------------------------------------------------


def make_fake(num_classes: int, image_size: int, num_samples: int) -> ImageSet:
    """Random colour images that can be learned: a fixed pattern for each class, under noise of about the same size.

    `num_samples` images for training and a quarter as many (at least one) for the test, always the same ones.
    """

    def read(_data_path: Path) -> tuple[Split, Split]:
        generator = torch.Generator().manual_seed(0)
        shape = (3, image_size, image_size)
        patterns = torch.randn(num_classes, *shape, generator=generator)

        def draw(samples: int) -> Split:
            labels = torch.randint(num_classes, (samples,), generator=generator)
            images = patterns[labels].add_(torch.randn(samples, *shape, generator=generator))
            return Split(images.mul_(40).add_(128).clamp_(0, 255).byte(), labels)

        return draw(num_samples), draw(max(1, num_samples // 4))

    return ImageSet(read, num_classes, (0.5,) * 3, (0.22,) * 3, pad=4, flip=True, augment=False)


IMAGE_SETS = {
    "digits": ImageSet(read_digits, 10, (0.3058,), (0.3762,), pad=1, flip=False, augment=False, max_pixel=16),
    "mnist": ImageSet(read_mnist, 10, (0.1307,), (0.3081,), pad=2, flip=False, augment=False),
    "cifar10": ImageSet(
        read_cifar10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, flip=True, augment=True
    ),
    "cifar100": ImageSet(
        read_cifar100, 100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), pad=4, flip=True, augment=True
    ),
}


# -- samples by index --------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Samples by index. `batches` yields (images float32 [B, C, H, W], labels int64 [B]) on the device."""

    labels: Tensor  # int64 [N], on the CPU

    def batches(self, indices: Sequence[Tensor], draws: Sequence[Tensor] | None) -> Iterator[Batch]:
        """One batch for each tensor of `indices`, augmented if `draws` gives each sample a random number below 2^31."""

    def digest(self, crc: int) -> int:
        """CRC-32, from that of what came before on, of the samples without their labels."""


class TensorSource:
    """Images in memory, augmented and normalised a batch at a time on the device."""

    def __init__(self, split: Split, spec: ImageSet, device: torch.device, memory_format: torch.memory_format) -> None:
        self.labels = split.labels
        self._images = split.images.to(device)
        self._device_labels = split.labels.to(device)
        self._pad, self._flip, self._memory_format = spec.pad, spec.flip, memory_format
        self._mean = torch.tensor(spec.mean, device=device).view(-1, 1, 1) * spec.max_pixel
        self._std = torch.tensor(spec.std, device=device).view(-1, 1, 1) * spec.max_pixel

    def batches(self, indices: Sequence[Tensor], draws: Sequence[Tensor] | None) -> Iterator[Batch]:
        device = self._images.device
        for batch, index in enumerate(indices):
            index = index.to(device, non_blocking=True)
            x = self._images[index]
            if draws is not None:
                x = _shift_and_flip(x, draws[batch].to(device, non_blocking=True), self._pad, self._flip)
            x = x.to(torch.float32, memory_format=self._memory_format).sub_(self._mean).div_(self._std)
            yield x, self._device_labels[index]

    def digest(self, crc: int) -> int:
        return zlib.crc32(self._images.cpu().contiguous().numpy().data, crc)


class ReadySource:
    """Samples in memory that are what the network reads; there is no augmentation."""

    def __init__(self, inputs: Tensor, labels: Tensor, device: torch.device) -> None:
        self.labels = labels.cpu()
        self._inputs, self._device_labels = inputs.to(device, torch.float32), labels.to(device)

    def batches(self, indices: Sequence[Tensor], draws: Sequence[Tensor] | None) -> Iterator[Batch]:
        for index in indices:
            index = index.to(self._inputs.device, non_blocking=True)
            yield self._inputs[index], self._device_labels[index]

    def digest(self, crc: int) -> int:
        return zlib.crc32(self._inputs.cpu().contiguous().numpy().data, crc)


def _shift_and_flip(x: Tensor, draws: Tensor, pad: int, flip: bool) -> Tensor:
    """Pad [B, C, H, W] by `pad` black pixels, crop at random to the old size and, with `flip`, mirror half of them.

    The digits of a draw in the mixed base (2 pad + 1, 2 pad + 1, 2) are the offsets and the flip.
    """
    offsets = 2 * pad + 1
    height, width = x.shape[2:]
    # All crops of all images are one strided view, from which a single gather copies the chosen ones.
    crops = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    x = crops[torch.arange(len(x), device=x.device), draws % offsets, draws // offsets % offsets]
    if flip:
        mirrored = (draws // offsets**2 % 2).bool().view(-1, 1, 1, 1)
        x = torch.where(mirrored, x.flip(3), x)
    return x


class DamagedImage(ValueError):
    """An image that cannot be read; the message names its file."""

    def __init__(self, text: str) -> None:
        # A loader raises a worker's error again with the traceback for its message, and the message last in it.
        super().__init__(text.rpartition("DamagedImage: ")[2].strip())


class FolderSource:
    """torchvision's ImageFolder with the usual ImageNet transforms, read by worker processes."""

    def __init__(
        self, root: Path, image_size: int, num_workers: int, device: torch.device, memory_format: torch.memory_format
    ) -> None:
        torchvision = import_torchvision()
        if not root.is_dir():
            raise FileNotFoundError(f"imagefolder: {root} does not exist; the data path must hold train/ and val/")
        self._folder = torchvision.datasets.ImageFolder(root)  # FileNotFoundError where a class has no image
        self.classes: list[str] = self._folder.classes
        self.labels = torch.tensor(self._folder.targets)
        t = torchvision.transforms
        normalize = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        self._augmented = t.Compose([t.RandomResizedCrop(image_size), t.RandomHorizontalFlip(), *normalize])
        # The customary margin: 256 before the crop to 224.
        self._plain = t.Compose([t.Resize(round(image_size * 256 / 224)), t.CenterCrop(image_size), *normalize])
        self._num_workers, self._device, self._memory_format = num_workers, device, memory_format

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Sample `key[0]`, augmented by the random number `key[1]` unless that is negative."""
        index, draw = key
        try:
            image, label = self._folder[index]
        except Exception as error:  # as with other damaged files
            path = self._folder.samples[index][0]
            raise DamagedImage(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error
        if draw < 0:
            return self._plain(image), label
        # torchvision's transforms draw from the global generator, which gets its state back. torch.manual_seed would
        # reseed the accelerators as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)
            return self._augmented(image), label

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, indices: Sequence[Tensor], draws: Sequence[Tensor] | None) -> Iterator[Batch]:
        keys = (
            [(i, -1) for i in index.tolist()]
            if draws is None
            else list(zip(index.tolist(), draws[batch].tolist(), strict=True))
            for batch, index in enumerate(indices)
        )
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # any object with __getitem__ will do
            batch_sampler=keys,
            num_workers=self._num_workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else the workers' base seed is drawn from the global generator
        )
        for x, y in loader:
            x = x.to(self._device, non_blocking=True, memory_format=self._memory_format)
            yield x, y.to(self._device, non_blocking=True)

    def digest(self, crc: int) -> int:
        """Of the names of the files, in place of what is in them."""
        names = (Path(path).relative_to(self._folder.root).as_posix() for path, _ in self._folder.samples)
        return zlib.crc32("\n".join(names).encode(), crc)
