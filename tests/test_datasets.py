"""Reading data sets: what comes out of well-formed files, and what is said about missing and damaged ones."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsebilevel.data import load_data
from sparsebilevel.data.datasets import IMAGE_SETS

MD5 = "ignore:.*differs from the published file"


def test_digits() -> None:
    data = load_data("digits", batch_size=64)
    assert (data.num_classes, data.input_shape, data.val) == (10, (1, 8, 8), None)
    assert len(data.train) == 1437 // 64
    assert len(data.test) == -(-360 // 64)
    assert data.test.labels.bincount().tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    total = data.train.labels.bincount() + data.test.labels.bincount()
    assert total.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    x, y = next(iter(data.train))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((64, 1, 8, 8), torch.float32, (64,), torch.int64)
    images = torch.cat([x for x, _ in load_data("digits", batch_size=1437).train])
    assert images.mean().abs() < 1e-3
    assert (images.std() - 1).abs() < 1e-3


def write_cifar(folder: Path, names: dict[str, int], label_key: str, classes: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, samples in names.items():
        images = rng.integers(0, 256, (samples, 3072), dtype=np.uint8)
        labels = [i % classes for i in range(samples)]
        content = {b"data": images, label_key.encode(): labels, b"filenames": [b"x.png"] * samples}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    names = {f"data_batch_{i}": 20 for i in range(1, 6)} | {"test_batch": 30}
    write_cifar(tmp_path / "cifar-10-batches-py", names, "labels", 10)
    return tmp_path


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings(MD5)
def test_cifar10(cifar10: Path, inside: bool) -> None:
    folder = cifar10 / "cifar-10-batches-py"
    data = load_data("cifar10", folder if inside else cifar10, batch_size=30)
    assert (data.num_classes, data.input_shape) == (10, (3, 32, 32))
    assert len(data.train.labels) == 100
    assert len(data.test.labels) == 30
    raw = pickle.loads((folder / "test_batch").read_bytes())[b"data"].reshape(-1, 3, 32, 32)
    mean, std = IMAGE_SETS["cifar10"].mean, IMAGE_SETS["cifar10"].std
    expected = (torch.tensor(raw) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ((x, y),) = data.test
    torch.testing.assert_close(x, expected)
    assert y.tolist() == [i % 10 for i in range(30)]


@pytest.mark.filterwarnings(MD5)
def test_cifar100(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-100-python", {"train": 200, "test": 100}, "fine_labels", 100)
    data = load_data("cifar100", tmp_path, batch_size=50)
    assert (data.num_classes, len(data.train), len(data.test)) == (100, 4, 2)
    assert data.test.labels.tolist() == list(range(100))


def test_cifar_files_that_are_not_the_published_ones_are_reported(cifar10: Path) -> None:
    with pytest.warns(UserWarning, match="differs from the published file") as warnings:
        load_data("cifar10", cifar10, batch_size=10)
    assert len(warnings) == 6


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


@pytest.mark.filterwarnings(MD5)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "damaged"),
        (pickle.dumps([1, 2]), "TypeError"),
        (pickle.dumps({b"data": 3, b"labels": [1]}), r"not uint8 \[N, 3072\]"),
        (pickle.dumps({b"labels": [1]}), "KeyError"),
        (pickle.dumps({b"data": Evil(), b"labels": [1]}), r"refers to \w+\.print"),
    ],
)
def test_damaged_cifar(cifar10: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str) -> None:
    (cifar10 / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)data_batch_3 is damaged.*{reason}.*|{reason}") as error:
        load_data("cifar10", cifar10, batch_size=10)
    assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings(MD5)
def test_damaged_cifar_labels(cifar10: Path) -> None:
    path = cifar10 / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(path.read_bytes())
    for labels, reason in (([10] * 30, "labels 10..10"), ([0] * 29, "30 images and 29 labels"), ("a", "not a list")):
        path.write_bytes(pickle.dumps(content | {b"labels": labels}, protocol=2))
        with pytest.raises(ValueError, match=f"test_batch is damaged .*{reason}"):
            load_data("cifar10", cifar10, batch_size=10)
    whole = pickle.dumps(content, protocol=2)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="test_batch is damaged"):
        load_data("cifar10", cifar10, batch_size=10)


def write_mnist(folder: Path, *, compress: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, samples in (("train", 40), ("t10k", 20)):
        images = struct.pack(">4B3I", 0, 0, 8, 3, samples, 28, 28) + bytes(i % 256 for i in range(samples * 784))
        labels = struct.pack(">4BI", 0, 0, 8, 1, samples) + bytes(i % 10 for i in range(samples))
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            path = folder / (name + ".gz" * compress)
            path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
def test_mnist(tmp_path: Path, folder: str, compress: bool) -> None:
    write_mnist(tmp_path / folder, compress=compress)
    data = load_data("mnist", tmp_path, batch_size=20)
    assert (data.num_classes, data.input_shape, len(data.train)) == (10, (1, 28, 28), 2)
    ((x, y),) = data.test
    pixels = (x * 0.3081 + 0.1307) * 255
    torch.testing.assert_close(pixels.flatten(), torch.arange(20 * 784) % 256.0, atol=1e-3, rtol=0)
    assert y.tolist() == [i % 10 for i in range(20)]


def test_damaged_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    contents = {
        "end-of-stream": whole[:-20],
        "[Nn]ot a gzipped file": b"nonsense",
        "no idx header": gzip.compress(b"\0\0\x08\x01" + bytes(20)),
        r"bytes of data, its header says \[40, 28, 28\]": gzip.compress(gzip.decompress(whole)[:-1]),
    }
    for reason, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.gz is damaged .*{reason}"):
            load_data("mnist", tmp_path, batch_size=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"data_batch_1 does not exist; get it from https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("cifar100", r"train does not exist; get it from .*cifar-100-python.tar.gz"),
        ("mnist", r"train-images-idx3-ubyte does not exist; get it from .*mnist"),
    ],
)
def test_missing_files(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: {tmp_path}.*{message}"):
        load_data(name, tmp_path, batch_size=2)
