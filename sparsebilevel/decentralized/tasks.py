"""What the workers train: a module and a loss as a function of one flat vector, and the data each worker has.

Masks apply to any named parameter, recurrent weights too: the module runs through `torch.func.functional_call` with
z = x ⊙ y in the place of its parameters.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import check_whole
from ..data.datasets import IMAGE_SETS, read_digits
from ..data.partition import PARTITIONS as PARTITIONS
from ..data.partition import partition as partition
from ..training.runtime import seeded

Loss = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor], Tensor]

TASKS = ("svm", "rnn", "resnet")
TASK_DATA = {"svm": ("digits", "a9a", "covtype", "imdb"), "rnn": ("sent140",), "resnet": ("cifar10", "digits")}
TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "svm": {"lr": 0.2},
    "rnn": {"lr": 0.3},
    # A trained network: what is known of its weights is their size, from which the mask starts; a mask that must sum to
    # the number of kept weights would shrink them all, and with them the inputs of normalization layers that do not
    # adapt. The tables of saga, a vector for each batch, would be too large.
    "resnet": {
        "lr": 0.02,
        "lower": "sgd",
        "upper": "storm",
        "inner_steps": 4,
        "constraint": "count",
        "initial_mask": "magnitude",
        "mask_lr": 0.0003,
        "normalize": "tensor",
    },
}
"""What suits a task where neither the algorithm nor the user says otherwise: fields of `algorithms.Settings`."""


class Objective:
    """The loss of a module as a function of a flat vector of its parameters, those with a mask first.

    Parameters that are frozen (``requires_grad=False``) stay in the module, as they are.
    Normalization layers use the statistics they have (evaluation mode): batch statistics would make the loss of one
    sample depend on the others, and the two gradients of a variance-reduced estimate gradients of two functions.
    Dropout is on, with masks that follow from the key of the evaluation, as all that torch draws in it.

    Args:
        module: its parameters are the initial weights. Its output is one tensor, a row a sample.
        loss: ``loss(output, target)``, the mean over a batch.
        masked: names or glob patterns of the parameters that have a mask, or one; None: all with two or more
            dimensions.
    """

    def __init__(self, module: nn.Module, loss: Loss, masked: str | Sequence[str] | None = None) -> None:
        masked = [masked] if isinstance(masked, str) else masked
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("module has no parameter that requires a gradient")
        for pattern in masked or ():
            if not fnmatch.filter(parameters, pattern):
                raise ValueError(f"masked={pattern!r} fits no parameter; there are: {', '.join(parameters)}")
        chosen = [
            name
            for name, p in parameters.items()
            if (p.dim() > 1 if masked is None else any(fnmatch.fnmatchcase(name, pattern) for pattern in masked))
        ]
        self.names = chosen + [name for name in parameters if name not in chosen]
        self.shapes = [parameters[name].shape for name in self.names]
        self.sizes = [parameters[name].numel() for name in self.names]
        self.masked_names = chosen
        self.maskable, self.size = sum(self.sizes[: len(chosen)]), sum(self.sizes)
        self.module, self.loss = module, loss
        module.train()
        for child in module.modules():
            if isinstance(child, (nn.modules.batchnorm._NormBase,)):
                child.eval()

    def flat(self) -> Tensor:
        """The module's parameters as one vector ``[P]``, float32."""
        parameters = dict(self.module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.names]).float()

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """The parameters that a vector ``[P]`` stands for, as views."""
        parts = torch.split(z, self.sizes)
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def state_dict(self, z: Tensor) -> dict[str, Tensor]:
        """The module's state dict with the parameters ``z``, on the CPU."""
        state, values = self.module.state_dict(), self.split(z)
        first = {p: name for name, p in self.module.named_parameters()}  # of a shared parameter the name in `names`
        for name, p in self.module.named_parameters(remove_duplicate=False):
            state[name] = values.get(first[p], state[name])
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def output(self, z: Tensor, inputs: Tensor) -> Tensor:
        """The module's output with the parameters ``z``."""
        return functional_call(self.module, self.split(z), (inputs,))

    def gradient(self, z: Tensor, inputs: Tensor, targets: Tensor, key: int) -> Tensor:
        """Of the mean loss, ``[P]``."""
        z = z.detach().requires_grad_()
        with seeded(z.device, key):
            loss = self.loss(self.output(z, inputs), targets)
        (gradient,) = torch.autograd.grad(loss, z)
        return gradient

    @torch.no_grad()
    def evaluate(self, z: Tensor, inputs: Tensor) -> Tensor:
        """The output without dropout."""
        was_training = [m for m in self.module.modules() if m.training]
        self.module.eval()
        out = self.output(z, inputs)
        for m in was_training:
            m.training = True
        return out


@dataclass
class Samples:
    """``inputs [n, ...]`` (uint8 inputs become float32 in batches) and ``targets`` int64 ``[n]``."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Samples:
        """The samples on a device."""
        return Samples(self.inputs.to(device), self.targets.to(device))


class Problem:
    """An objective and the samples of each worker.

    Args:
        objective: the network and its loss; its module moves to ``device``.
        train: all training samples.
        parts: for each worker, the positions of its samples in ``train``: a tensor or a sequence of integers.
        test: for the figures. There are accuracies of networks that give scores ``[n, classes]``, where targets are
            classes ``[n]``, whole numbers.
        eval_samples: at most so many of a worker's samples tell its loss in a report.
        prepare: makes the network's input of a batch of ``inputs``; default: uint8 becomes float32.
        device: where networks compute. Samples are drawn on the CPU, so that they do not depend on it.

    Raises:
        ValueError: inputs and targets that do not fit each other, positions that are not in ``train``, or a worker
            without any.
    """

    def __init__(
        self,
        objective: Objective,
        train: Samples,
        parts: Sequence[Tensor | Sequence[int]],
        test: Samples,
        eval_samples: int = 4096,
        prepare: Prepare | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_whole("eval_samples", eval_samples, 1)
        for name, samples in (("train", train), ("test", test)):
            if len(samples.inputs) != len(samples.targets):
                raise ValueError(f"{name} has {len(samples.inputs)} inputs and {len(samples.targets)} targets")
        self.parts = [torch.as_tensor(part).cpu() for part in parts]
        for k, part in enumerate(self.parts):
            if len(part) == 0:
                raise ValueError(f"worker {k} has no samples; use fewer workers or another partition")
            low, high = part.min().item(), part.max().item()
            if part.dtype == torch.bool or part.is_floating_point() or low < 0 or high >= len(train):
                raise ValueError(f"parts[{k}] has {low}..{high}; expected positions in 0..{len(train) - 1}")
        self.device = torch.device(device)
        objective.module.to(self.device)
        self.objective, self.train, self.test_set = objective, train.to(self.device), test.to(self.device)
        self.sizes = [len(part) for part in parts]
        self.mean_size = sum(self.sizes) / len(self.sizes)
        self.size, self.maskable = objective.size, objective.maskable
        self.eval_samples = eval_samples
        self.prepare = prepare or (lambda inputs: inputs.float() if inputs.dtype == torch.uint8 else inputs)

    def initial(self) -> Tensor:
        """Initial weights ``[P]``."""
        return self.objective.flat()

    def gradient(self, k: int, z: Tensor, indices: Tensor, key: int) -> Tensor:
        """Of worker k's mean loss over its samples ``indices``."""
        chosen = self.parts[k][indices].to(self.device)
        return self.objective.gradient(z, self.prepare(self.train.inputs[chosen]), self.train.targets[chosen], key)

    def local_loss(self, k: int, z: Tensor) -> float:
        """Mean loss over (the first of) worker k's samples."""
        chosen = self.parts[k][: self.eval_samples].to(self.device)
        return self._loss(self._outputs(z, self.train.inputs[chosen]), self.train.targets[chosen])

    def _outputs(self, z: Tensor, inputs: Tensor) -> Tensor:
        """In batches whose feature maps stay in the CPU's cache."""
        return torch.cat([self.objective.evaluate(z, self.prepare(part)) for part in inputs.split(128)])

    def _loss(self, output: Tensor, targets: Tensor) -> float:
        """Infinite where an output is not finite: the hinge loss of NaN would be zero."""
        return self.objective.loss(output, targets).item() if output.isfinite().all() else math.inf

    def test(self, z: Tensor) -> dict[str, float]:
        """``test_loss``; of a classifier ``test_acc`` too, and ``test_auc`` with two classes."""
        output, targets = self._outputs(z, self.test_set.inputs), self.test_set.targets
        out = {"test_loss": self._loss(output, targets)}
        is_classifier = output.dim() == 2 and output.shape[1] > 1 and targets.dim() == 1
        if not is_classifier or targets.is_floating_point():
            return out
        out["test_acc"] = (output.argmax(1) == targets).float().mean().item()
        if output.shape[1] == 2:
            out["test_auc"] = area_under_curve(output[:, 1] - output[:, 0], targets == 1)
        return out

    def split_masked(self, x: Tensor) -> list[Tensor]:
        """A vector ``[maskable]`` in the shapes of the parameters that have a mask."""
        count = len(self.objective.masked_names)
        parts = torch.split(x, self.objective.sizes[:count])
        return [part.view(shape) for part, shape in zip(parts, self.objective.shapes[:count], strict=True)]


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive sample scores above a negative one, ties counting half; NaN with one class only."""
    values, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # mean rank of equal scores
    p = int(positive.sum())
    n = len(scores) - p
    return ((ranks[positive].sum().item() - p * (p + 1) / 2) / (p * n)) if p and n else math.nan


# -- networks ----------------------------------------------------------------------------------------------------------


class LinearSVM(nn.Module):
    """Two linear layers without a nonlinearity: features -> hidden -> classes. Input ``[N, features]``."""

    def __init__(self, features: int, classes: int = 2, hidden: int = 20) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.flatten(1)))


def hinge(output: Tensor, targets: Tensor) -> Tensor:
    """Mean squared multi-class hinge loss (squared, since variance reduction wants a smooth function)."""
    return F.multi_margin_loss(output, targets, p=2)


class TextRNN(nn.Module):
    """Fixed word vectors, a recurrent network with tanh, and a linear layer on its last state.

    Args:
        vectors: float32 ``[words, dims]``; word 0 stands before the beginning of short texts.
        hidden: size of the state.
        layers: recurrent layers.

    Input int64 ``[N, T]``, word numbers; output ``[N, classes]``.
    """

    def __init__(self, vectors: Tensor, hidden: int = 128, layers: int = 2, classes: int = 2) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.hidden, self.layers = hidden, layers
        size = vectors.shape[1]
        bound = hidden**-0.5
        for layer in range(layers):
            for name, shape in (("ih", (hidden, size)), ("hh", (hidden, hidden)), ("b", (2, hidden))):
                parameter = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                self.register_parameter(f"{name}{layer}", parameter)
            size = hidden
        self.fc = nn.Linear(hidden, classes)

    def forward(self, words: Tensor) -> Tensor:
        x = self.vectors[words]  # type: ignore[index]
        weights: list[Tensor] = []
        for layer in range(self.layers):
            biases = getattr(self, f"b{layer}")
            weights += [getattr(self, f"ih{layer}"), getattr(self, f"hh{layer}"), biases[0], biases[1]]
        start = x.new_zeros(self.layers, len(x), self.hidden)
        output, _ = torch.rnn_tanh(x, start, weights, True, self.layers, 0.0, False, False, True)
        return self.fc(output[:, -1])


# -- data --------------------------------------------------------------------------------------------------------------


def make_problem(
    task: str = "svm",
    data: str = "digits",
    data_path: str = ".",
    workers: int = 8,
    *,
    how: str = "dirichlet",
    alpha: float = 0.5,
    hidden: int | None = None,
    init_from: str | None = None,
    limit: int | None = None,
    eval_samples: int = 4096,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """A task of this library, shared out.

    Args:
        task: ``svm`` (mask on the first matrix only), ``rnn`` (on recurrent, input and output weights) or ``resnet``
            (on convolutions and the linear layer; start it from a trained network).
        data: ``digits`` (embedded), ``a9a``, ``covtype``, ``imdb``, ``sent140``, ``cifar10``.
        data_path: where the files lie.
        workers: number of workers.
        how, alpha: see `partition`.
        hidden: size of the hidden layer; default 20 and 128.
        init_from: run of ``sparsebilevel train`` on the same data, its folder or a checkpoint, with the network and the
            weights to start from (``resnet``); None: a network with random weights.
        limit: use only so many training samples, a random choice.
        eval_samples, device: see `Problem`.
        seed: of initial weights, partition, and what ``limit`` leaves. Training and test samples are the same for all.

    Raises:
        ValueError: a value that is not allowed.
        FileNotFoundError: the files are not there.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not known; allowed: {', '.join(TASKS)}")
    if data not in TASK_DATA[task]:
        raise ValueError(f"data={data!r} does not go with task={task!r}; allowed: {', '.join(TASK_DATA[task])}")
    for name, value in (("limit", limit), ("hidden", hidden)):
        if value is not None:
            check_whole(name, value, 1)
    if init_from is not None and task != "resnet":
        raise ValueError(f"init_from={init_from!r} is for task='resnet', not {task!r}")
    path = Path(data_path)
    sources, prepare = None, None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if task == "svm":
            train, test, sources = _READERS[data](path)
            classes = int(max(train.targets.max(), test.targets.max())) + 1
            module: nn.Module = LinearSVM(train.inputs[0].numel(), classes, hidden or 20)
            objective = Objective(module, hinge, ["fc1.weight"])
        elif task == "rnn":
            vectors, train, test = _read_sent140(path)
            objective = Objective(TextRNN(vectors, hidden or 128), F.cross_entropy, ["ih*", "hh*", "fc.weight"])
        else:
            objective, train, test, prepare = _resnet(data, path, init_from)
    if limit is not None and limit < len(train):
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        train = Samples(train.inputs[chosen], train.targets[chosen])
        sources = None if sources is None else sources[chosen]
    parts = partition(train.targets, workers, how, alpha=alpha, sources=sources, seed=seed)
    return Problem(objective, train, parts, test, eval_samples, prepare, device)


Read = tuple[Samples, Samples, Tensor | None]


def _resnet(data: str, path: Path, init_from: str | None) -> tuple[Objective, Samples, Samples, Prepare]:
    from ..export import load_network
    from ..models import create_model
    from ..nn import densify

    spec = IMAGE_SETS[data]
    train, test = (Samples(*split) for split in spec.read(path))
    if init_from is None:
        name = "resnet18_cifar" if data == "cifar10" else "resnet20"
        model = create_model(name, spec.num_classes, train.inputs.shape[1])
    else:
        model, config = load_network(init_from)
        model = densify(model)
        if config["data"] != data:
            raise ValueError(f"init_from={init_from!r}: the network is of data={config['data']!r}, not of {data!r}")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) * spec.max_pixel for values in (spec.mean, spec.std))

    def prepare(images: Tensor) -> Tensor:
        return (images.float() - mean.to(images.device)) / std.to(images.device)

    masked = [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return Objective(model, F.cross_entropy, masked), train, test, prepare


def _digits(path: Path) -> Read:
    train, test = (Samples(s.images.flatten(1).float() / 16, s.labels) for s in read_digits(path))
    return train, test, None


def _find(path: Path, name: str, source: str) -> Path:
    if not (path / name).is_file():
        raise FileNotFoundError(f"{path / name} does not exist; get it from {source}, or leave out --data")
    return path / name


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside names the file: one that is damaged can raise nearly anything."""
    try:
        yield
    except OSError:  # names it
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def _a9a(path: Path) -> Read:
    source = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html"
    train, test = (_read_libsvm(_find(path, name, source), 123) for name in ("a9a", "a9a.t"))
    return train, test, None


def _read_libsvm(path: Path, features: int) -> Samples:
    with _reading(path):
        lines = path.read_text().splitlines()
    if not lines:
        raise ValueError(f"{path} is damaged (it is empty)")
    inputs, targets = torch.zeros(len(lines), features, dtype=torch.uint8), torch.zeros(len(lines), dtype=torch.int64)
    rows, columns = [], []
    for i, line in enumerate(lines):
        try:
            label, *entries = line.split()
            numbers = [int(entry.partition(":")[0]) for entry in entries]
            targets[i] = int(label) > 0
            if odd := [number for number in numbers if not 1 <= number <= features]:
                raise ValueError(f"feature {odd[0]}, must be in 1..{features}")
        except ValueError as error:
            raise ValueError(f"{path} is damaged (line {i + 1}: {error})") from None
        rows += [i] * len(numbers)
        columns += [number - 1 for number in numbers]
    inputs[rows, columns] = 1
    return Samples(inputs, targets)


def _covtype(path: Path) -> Read:
    """Class 2 against the rest, a fifth for the test; sources are the four wilderness areas."""
    folder = path / "covtype"
    files = sorted(folder.glob("covtype*.npz"))
    if not files:
        raise FileNotFoundError(
            f"{folder}/covtype*.npz does not exist: arrays num [n, 10], wilderness [n], soil [n], label [n] of "
            "https://archive.ics.uci.edu/dataset/31/covertype"
        )
    with _reading(files[0]), np.load(files[0]) as arrays:
        numbers, wilderness, soil, label = (torch.from_numpy(arrays[n].astype(np.int64))
                                            for n in ("num", "wilderness", "soil", "label"))  # fmt: skip
        sizes = [len(column) for column in (numbers, wilderness, soil, label)]
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(f"num, wilderness, soil and label have {sizes} rows")
    numbers = numbers.float()
    deviation = numbers.std(0)
    numbers = (numbers - numbers.mean(0)) / deviation.where(deviation > 0, 1)  # of a column that is constant
    one_hot = [F.one_hot(column - column.min()).float() for column in (wilderness, soil)]
    inputs, targets = torch.cat([numbers, *one_hot], 1), (label == 2).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Samples(inputs[train], targets[train]), Samples(inputs[test], targets[test]), wilderness[train]


_WORD = re.compile(r"[a-z']+")


def _imdb(path: Path, words: int = 2000) -> Read:
    """Whether a review has each of the most frequent words of the training reviews. Sources are films, where known."""
    source = "https://ai.stanford.edu/~amaas/data/sentiment/"
    texts: list[list[set[str]]] = []
    labels: list[Tensor] = []
    for part in ("train", "test"):
        file = _find(path, f"imdb/imdb_{part}.tsv", source)
        with _reading(file):
            fields = [row.split("\t", 3) for row in file.read_text(encoding="utf-8").split("\n") if row]
            targets = torch.tensor([int(f[0]) for f in fields])
            texts.append([set(_WORD.findall(f[3].lower())) for f in fields])
            if not any(texts[-1]) or targets.abs().max() > 1:
                raise ValueError("it must have words, and labels -1, 0 and 1")
            labels.append(targets.clamp_min(0))
    counts = Counter(word for text in texts[0] for word in sorted(text))
    number = {word: i for i, (word, _) in enumerate(counts.most_common(words))}
    out = []
    for reviews, targets in zip(texts, labels, strict=True):
        inputs = torch.zeros(len(reviews), words, dtype=torch.uint8)
        pairs = [(i, number[word]) for i, text in enumerate(reviews) for word in text if word in number]
        rows_, columns = zip(*pairs, strict=True)
        inputs[list(rows_), list(columns)] = 1
        out.append(Samples(inputs, targets))
    return out[0], out[1], None


_READERS: dict[str, Callable[[Path], Read]] = {
    "digits": _digits,
    "a9a": _a9a,
    "covtype": _covtype,
    "imdb": _imdb,
}


def _read_sent140(path: Path, length: int = 24, frequent: int = 2000) -> tuple[Tensor, Samples, Samples]:
    """Tweets as the last ``length`` known words; a fifth for the test. Word vectors from ``glove*.npz``.

    Of the ``frequent`` most frequent words of the training tweets, those without a vector get a random one of the same
    spread: small files of vectors lack most words that tell a mood.
    """
    files = sorted((path / "glove").glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"{path}/glove/*.npz does not exist: word vectors (arrays of words and of vectors)")
    with _reading(files[0]), np.load(files[0]) as arrays:
        named = {name: arrays[name] for name in arrays.files}
        vectors = torch.from_numpy(next(a for a in named.values() if a.ndim == 2 and a.dtype.kind == "f")).float()
        words = [str(w) for w in next(a for a in named.values() if a.ndim == 1 and a.dtype.kind in "US")]
        if len(words) != len(vectors):
            raise ValueError(f"it has {len(words)} words and {len(vectors)} vectors")
    tweets, targets = [], []
    for label, name in enumerate(("negative", "positive")):
        file = _find(path, f"sent140/{name}.txt", "http://help.sentiment140.com/for-students")
        for text in io.StringIO(file.read_text(encoding="utf-8", errors="replace")):
            tweets.append(_WORD.findall(text.lower()))
            targets.append(label)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    counts = Counter(word for i in train.tolist() for word in tweets[i])
    known = set(words)
    words += [word for word, _ in counts.most_common(frequent) if word not in known]
    more = torch.randn(len(words) - len(vectors), vectors.shape[1], generator=torch.Generator().manual_seed(0))
    table = torch.cat([torch.zeros(1, vectors.shape[1]), vectors, more * vectors.std()])
    number = {word: i + 1 for i, word in enumerate(words)}
    inputs = torch.zeros(len(tweets), length, dtype=torch.int64)
    for row, tweet in zip(inputs, tweets, strict=True):
        if numbers := [number[word] for word in tweet if word in number][-length:]:
            row[-len(numbers) :] = torch.tensor(numbers)
    labels = torch.tensor(targets)
    return table, Samples(inputs[train], labels[train]), Samples(inputs[test], labels[test])
