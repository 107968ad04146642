"""Settings of a training run: one dataclass whose fields are the flags of the command line.

Where a moment or an interval is meant, ``"100"`` is optimizer steps, ``"8ep"`` is epochs, and ``"0.75"`` is a fraction
of the phase in which the method works (`parse_steps`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import LARGEST_WHOLE, check_number, check_whole

if TYPE_CHECKING:
    from ..masks import Pattern  # with torch, which a help text does without

METHOD_NAMES = ("dense", "static", "set", "rigl", "bidst", "omp", "imp", "hydra", "bip")

_SCHEDULE = ("update_freq", "update_start", "update_end")
# What each method can be told. Most go to its constructor; those in LOOP_OPTIONS are the training loop's own.
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "static": (),
    "set": (*_SCHEDULE, "drop_fraction"),
    "rigl": (*_SCHEDULE, "drop_fraction", "rigl_paper"),
    "bidst": (
        *_SCHEDULE,
        *(
            "search_space",
            "implicit",
            "implicit_scale",
            "horizon",
            "score_lr",
            "score_lr_scheduler",
            "gumbel",
            "tau",
            "tau_end",
        ),
        *("implicit_on", "lower_gradient", "gradient_decay", "initial_score", "margin", "curvature_decay"),
    ),
    "omp": ("scope",),
    "imp": ("levels", "rate", "rewind_step"),
    "hydra": ("score_lr", "score_lr_scheduler", "score_momentum", "score_weight_decay", "scope"),
    "bip": (
        *("implicit", "implicit_scale", "score_lr", "score_lr_scheduler", "score_momentum", "scope", "curvature_decay"),
        *("initial_scores", "lower_gradient", "gradient_decay"),
        *("lower_steps", "upper_split", "upper_batch_size", "rewind"),
    ),
}
LOOP_OPTIONS = ("score_lr_scheduler", "lower_steps", "upper_split", "upper_batch_size", "rewind")
# Defaults of the loop where they differ from the constructors' (which know neither epochs nor the length of a run).
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "set": {"update_freq": "100", "update_end": "0.75"},
    "rigl": {"update_freq": "100", "update_end": "0.75"},
    "bidst": {"update_freq": "8ep", "update_end": "1.0", "score_lr_scheduler": "constant"},
    "hydra": {"score_lr_scheduler": "cosine"},
    "bip": {"score_lr_scheduler": "step", "lower_steps": 1, "upper_split": "same", "rewind": "none"},
}
# Methods whose first mask is random, and that may train from scratch.
SCRATCH_METHODS = ("static", "set", "rigl", "bidst")
# Methods that work in a phase "prune" of their own, with a fixed mask to fine-tune under afterwards.
TWO_PHASE_METHODS = ("hydra", "bip")
# Fields that say where and how to run, not what to compute: they may differ when a run is resumed.
RUN_FIELDS = (
    *("output_dir", "resume", "overwrite", "quiet", "print_freq", "tensorboard", "data_path", "workers", "threads"),
    *("device", "max_steps", "measure", "eval_batch_size"),
)


# More than any machine has: where the system refuses a thread, OpenMP ends the process.
MOST_THREADS = 4096
# Largest sizes of numbers, by type and by field: what torch's integers and weights can hold.
LARGEST: dict[type | str, int | float] = {int: LARGEST_WHOLE, float: (2 - 2**-23) * 2.0**127, "threads": MOST_THREADS}

# Titles under which the help lists the fields of `Config`: each stands over the field named and those after it.
SECTIONS = {
    "method": "method, model and data",
    "sparsity": "sparsity",
    "epochs": "training",
    "update_freq": "options of methods (a method refuses those that it does not have)",
    "device": "machine",
    "output_dir": "run",
}


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Config` with what the command line shows of it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class Config:
    """Everything a run depends on. ``None`` means the default of the method, the data set or the phase before."""

    # -- what is trained
    method: str = option("bidst", "how the mask is found; dense trains without one", METHOD_NAMES)
    arch: str = option("digits_cnn", "model: one of this package's, or any torchvision classification model")
    data: str = option("digits", "data set: digits, mnist, cifar10, cifar100, imagefolder or fake")
    data_path: str = option(".data", "where the data set's files lie")
    image_size: int | None = option(None, "height and width of the images (imagefolder and fake)")
    num_classes: int | None = option(None, "classes (fake)")
    num_samples: int | None = option(None, "training samples (fake)")
    validation: float = option(0, "part of the training set held out to select by: a fraction (0.1) or a count (500)")
    augment: bool | None = option(None, "shift and flip the training images; default depends on the data set")
    # -- sparsity
    sparsity: float = option(0.9, "fraction of zeros in the sparse layers, in [0, 1)")
    layer_sparsity: tuple[str, ...] = option(
        (), "NAME=VALUE pairs for layers with another one: names or glob patterns, of which the first that fits holds"
    )
    distribution: str = option("uniform", "how layers share it", ("uniform", "er", "erk", "global"))
    pattern: str = option(
        "unstructured",
        "weights that live together: unstructured, filter[:MULTIPLE], channel[:MULTIPLE], block:BHxBW, nm:N:M",
    )
    layer_pattern: tuple[str, ...] = option((), "NAME=PATTERN pairs for layers with another one, as layer_sparsity")
    dense_first: bool = option(False, "keep the first layer dense")
    rescale: bool = option(
        False, "scale the initial weights so that masks keep their norms; for networks without normalization layers"
    )
    exclude: tuple[str, ...] = option((), "layers to leave dense: names or glob patterns")
    # -- training
    epochs: int = option(30, "epochs with the method (of each cycle with imp)")
    pretrain_epochs: int = option(0, "dense epochs before the method starts (the first cycle of imp)")
    finetune_epochs: int = option(0, "epochs under the final mask (hydra, bip)")
    init_from: str | None = option(None, "start from the weights in this checkpoint instead of pretraining")
    batch_size: int = option(64, "training samples of one process in one pass")
    eval_batch_size: int | None = option(None, "samples in a batch of validation and test; default: batch size")
    accumulate: int = option(1, "passes whose gradients make one optimizer step")
    opt: str = option("sgd", "optimizer", ("sgd", "adamw"))
    lr: float = option(0.1, "learning rate")
    momentum: float = option(0.9, "momentum of SGD")
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(5e-4, "weight decay")
    norm_weight_decay: float | None = option(None, "weight decay of biases and normalization layers; default: the same")
    lr_scheduler: str = option("cosine", "course of the learning rate", ("cosine", "step", "constant"))
    lr_warmup_epochs: float = option(0, "epochs of linear warm-up at the start of each phase")
    lr_min: float = option(0.0, "learning rate at which the cosine ends")
    lr_milestones: str = option("0.5,0.75", "where the step schedule falls: epochs (80ep,120ep), fractions or steps")
    lr_gamma: float = option(0.1, "factor by which it falls")
    pretrain_lr: float | None = option(None, "learning rate of pretraining; default: lr")
    pretrain_weight_decay: float | None = option(None, "weight decay of pretraining; default: weight decay")
    finetune_lr: float | None = option(None, "learning rate of fine-tuning; default: lr")
    finetune_weight_decay: float | None = option(None, "weight decay of fine-tuning; default: weight decay")
    label_smoothing: float = option(0.0, "label smoothing, in [0, 1)")
    clip_grad_norm: float | None = option(None, "largest gradient norm")
    model_ema: bool = option(False, "keep averaged weights and evaluate those")
    model_ema_decay: float = option(0.999, "decay of the average for one optimizer step")
    # -- options of methods; None is the method's default, and a method that has no such option refuses it
    update_freq: str | None = option(
        None, "interval of mask changes: 100 (steps), 8ep (epochs), 0.05 (of the run); 0 = never"
    )
    update_start: str | None = option(None, "when they may start; same forms")
    update_end: str | None = option(None, "when they end; same forms")
    drop_fraction: float | None = option(None, "fraction of the active weights exchanged at first (set, rigl)")
    rigl_paper: bool | None = option(None, "a topology change replaces the optimizer step, as in RigL's own code")
    search_space: float | None = option(None, "extra positions that learn, of all (bidst); default by sparsity")
    implicit: str | None = option(None, "implicit gradient: derived (bidst), paper, code (bip), curvature or none")
    implicit_scale: float | None = option(None, "1/gamma (bip) or 1/lambda (bidst) of the implicit gradient")
    implicit_on: str | None = option(None, "where it acts (bidst)", ("search", "all"))
    lower_gradient: str | None = option(
        None, "its lower-level factor: a running mean, or this batch's", ("mean", "batch")
    )
    gradient_decay: float | None = option(None, "of the running mean behind lower_gradient=mean")
    horizon: int | None = option(None, "steps after which a grown weight is judged (bidst, without implicit_scale)")
    score_lr: float | None = option(None, "step size of the mask scores")
    score_lr_scheduler: str | None = option(None, "its course", ("cosine", "step", "constant"))
    score_momentum: float | None = option(None, "momentum of the mask scores (hydra, bip)")
    score_weight_decay: float | None = option(None, "weight decay of the mask scores (hydra)")
    gumbel: bool | None = option(None, "noise in the relaxed mask (bidst)")
    tau: float | None = option(None, "temperature of the relaxed mask (bidst)")
    tau_end: float | None = option(None, "temperature at update_end (bidst)")
    initial_scores: str | None = option(None, "scores at the start (bip)", ("energy", "magnitude"))
    initial_score: float | None = option(None, "score of active weights at the start (bidst)")
    margin: float | None = option(None, "how far below it the search space starts (bidst)")
    curvature_decay: float | None = option(None, "of the running mean behind implicit=curvature")
    scope: str | None = option(None, "one ranking over all layers, or one a layer", ("global", "layer"))
    levels: int | None = option(None, "prunings of imp")
    rate: float | None = option(None, "part of the remaining weights that imp prunes a level; default by sparsity")
    rewind_step: str | None = option(None, "moment of the first cycle to which imp goes back; 0 = initial weights")
    lower_steps: int | None = option(None, "optimizer steps for one step on the mask (bip)")
    upper_split: str | None = option(None, "data of the upper level (bip): same, or a part held out for it")
    upper_batch_size: int | None = option(None, "batch size of the upper level (bip)")
    rewind: str | None = option(
        None, "set weights that survive back to this point (bip)", ("none", "init", "pretrained")
    )
    # -- machine
    device: str = option("auto", "cpu, cuda, cuda:1 or auto")
    amp: str = option("none", "automatic mixed precision", ("none", "bf16", "fp16"))
    channels_last: bool = option(False, "memory format of images and weights")
    compile: bool = option(False, "torch.compile the model")
    optimize_for_cpu: bool = option(
        True, "keep feature maps in the layout of the sparse kernels (CPU, sparse convolutions, not fp16 or compiled)"
    )
    seed: int = option(0, "of weights, masks, orders and augmentation")
    deterministic: bool = option(False, "refuse operations that are not repeatable (CUDA)")
    threads: int | None = option(None, "CPU threads of one process; default: torch's")
    workers: int = option(4, "processes that read images (imagefolder)")
    # -- run
    output_dir: str = option("runs/train", "folder of the run")
    resume: bool = option(False, "continue the run in this folder, if there is one")
    overwrite: bool = option(False, "replace the run in this folder")
    eval_freq: int = option(1, "epochs between evaluations (the last epoch is always evaluated)")
    checkpoint_freq: int = option(1, "epochs between checkpoints (the last is always written)")
    max_steps: int | None = option(None, "stop after this many optimizer steps; resume goes on to the full length")
    measure: bool = option(True, "measure the time of a training step against the dense network at the end")
    tensorboard: bool = option(False, "write TensorBoard logs too")
    print_freq: int = option(100, "steps between lines where there is no progress bar")
    quiet: bool = option(False, "print nothing but warnings and errors")

    def __post_init__(self) -> None:
        """Turn NumPy's numbers, paths, and numbers for moments into what JSON and checkpoints hold."""
        for name, (kind, _) in field_types().items():
            setattr(self, name, _as_builtin(getattr(self, name), kind))

    def validate(self) -> None:
        """Raise ValueError at the first value that is not allowed; needs neither data nor model."""
        self.__post_init__()  # fields may have been set since
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name}={value!r} is not known; allowed: {', '.join(choices)}")
            if value == "":
                raise ValueError(f"{field.name}='' is not allowed; expected a text that is not empty")
        self._validate_numbers()
        check_fields(dataclasses.asdict(self), "configuration")
        self._validate_method()
        if not (isinstance(self.sparsity, (int, float)) and 0 <= self.sparsity < 1):
            raise ValueError(f"sparsity={self.sparsity!r} is not allowed; expected a number in [0, 1)")
        if self.layer_sparsity and self.distribution != "uniform":
            raise ValueError(
                f"distribution={self.distribution!r} has nothing to share out with layer_sparsity; expected uniform"
            )
        self.target()
        self.patterns()
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    def _validate_numbers(self) -> None:
        for name, (kind, _) in field_types().items():
            value, most = getattr(self, name), LARGEST.get(name, LARGEST.get(kind))
            if most is not None and isinstance(value, (int, float)) and not abs(value) <= most:  # NaN is not either
                raise ValueError(f"{name}={value!r} is not allowed; expected a finite number, at most {most} in size")
        at_least = dict.fromkeys(
            ("batch_size", "accumulate", "eval_freq", "checkpoint_freq", "print_freq", "epochs")
            + ("eval_batch_size", "max_steps", "threads", "upper_batch_size", "lower_steps"),
            1,
        )
        at_least |= dict.fromkeys(("pretrain_epochs", "finetune_epochs", "seed", "workers"), 0)
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, least)
        for name in (
            *("lr", "pretrain_lr", "finetune_lr", "lr_min", "lr_gamma", "lr_warmup_epochs", "momentum"),
            *("weight_decay", "norm_weight_decay", "pretrain_weight_decay", "finetune_weight_decay"),
        ):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
        for name in ("label_smoothing", "model_ema_decay"):
            check_number(name, getattr(self, name), most=1, without_most=True)
        if self.clip_grad_norm is not None:
            check_number("clip_grad_norm", self.clip_grad_norm, without_least=True)

    def _validate_method(self) -> None:
        for name in self.options_unknown_to(self.method):
            value = getattr(self, name)
            if name == "finetune_epochs":
                allowed = " and ".join(TWO_PHASE_METHODS)
                raise ValueError(f"finetune_epochs={value}: only {allowed} fine-tune; give more epochs")
            if name == "pretrain_epochs":
                raise ValueError(f"pretrain_epochs={value}: method dense has nothing to pretrain for")
            takers = ", ".join(m for m, names in METHOD_OPTIONS.items() if name in names)
            raise ValueError(f"{name}={value!r}: method {self.method} has no such option ({takers})")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0")
        for text in self.lr_milestones.split(","):
            parse_steps("lr_milestones", text, 1, 1)
        if self.pretrain_epochs and self.init_from:
            raise ValueError(f"init_from={self.init_from!r} replaces pretraining; drop pretrain_epochs")
        if self.rescale and (self.method not in SCRATCH_METHODS or self.pretrain_epochs or self.init_from):
            raise ValueError(
                f"rescale=True scales random initial weights; expected one of {', '.join(SCRATCH_METHODS)} as method, "
                "without pretrain_epochs and init_from"
            )
        if self.rewind not in (None, "none") and not self.finetune_epochs:
            raise ValueError(f"rewind={self.rewind!r} needs finetune_epochs: rewound weights must be trained again")
        if self.upper_split not in (None, "same"):
            try:
                parse_amount(self.upper_split)
            except ValueError:
                raise ValueError(
                    f"upper_split={self.upper_split!r} is not allowed; expected same, a count (500) or a fraction (0.1)"
                ) from None
        if self.method == "hydra" and self.amp == "fp16":
            raise ValueError("amp='fp16' is not allowed with hydra, whose weights have no gradients to scale; use bf16")

    def options_unknown_to(self, method: str) -> dict[str, Any]:
        """Fields that were given for another method, and that ``method`` refuses, with the values that it takes."""
        taken = METHOD_OPTIONS.get(method)
        if taken is None:  # no method: `validate` says so
            return {}
        every = {name for names in METHOD_OPTIONS.values() for name in names}
        refused: dict[str, Any] = dict.fromkeys(sorted(every.difference(taken)))
        refused |= {} if method in TWO_PHASE_METHODS else {"finetune_epochs": 0}
        refused |= {"pretrain_epochs": 0} if method == "dense" else {}
        return {name: value for name, value in refused.items() if getattr(self, name) != value}

    def target(self) -> float | dict[str, float]:
        """The sparsity as `sparsebilevel.sparsify` takes it: one for all layers, or by name with a default."""
        values: dict[str, float] = {}
        for text in self.layer_sparsity:
            name, _, value = text.rpartition("=")
            try:
                values[name] = float(value)
                if not (name and 0 <= values[name] < 1):
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"layer_sparsity={text!r} is not allowed; expected NAME=VALUE with a value in [0, 1)"
                ) from None
        return values | {"*": values.get("*", self.sparsity)} if values else self.sparsity

    def patterns(self) -> Pattern | dict[str, Pattern]:
        """The pattern as `sparsebilevel.sparsify` takes it: one for all layers, or by name with a default."""
        from ..masks import parse_pattern

        patterns: dict[str, Pattern] = {}
        for text in self.layer_pattern:
            name, _, pattern = text.partition("=")
            try:
                if not name:
                    raise ValueError("the name is missing")
                patterns[name] = parse_pattern(pattern)
            except ValueError as error:
                raise ValueError(f"layer_pattern={text!r} is not allowed; expected NAME=PATTERN: {error}") from None
        default = parse_pattern(self.pattern)
        return patterns | {"*": patterns.get("*", default)} if patterns else default

    # -- what a method gets -------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> Any:
        """An option of the method as given, else as the loop's or the literature's default; None: the constructor's."""
        value = getattr(self, name)
        if value is not None:
            return value
        if name == "search_space" and self.method == "bidst":
            return default_search_space(self.arch, self.sparsity)
        return METHOD_DEFAULTS.get(self.method, {}).get(name)

    def method_arguments(self, steps_per_epoch: int, total_steps: int) -> dict[str, Any]:
        """Keyword arguments of the method's constructor; moments and intervals in steps."""
        arguments = {}
        for name in METHOD_OPTIONS[self.method]:
            value = self.resolve(name)
            if name in LOOP_OPTIONS or value is None:
                continue
            if name in (*_SCHEDULE, "rewind_step"):
                value = parse_steps(name, value, steps_per_epoch, total_steps)
            if name == "update_freq" and self.update_freq is None:
                value = min(value, max(1, total_steps // 16))  # the topology of a short run changes too
            arguments["paper" if name == "rigl_paper" else name] = value
        return arguments

    def differences(self, other: Mapping[str, Any]) -> str:
        """Fields that change what is computed and differ from ``other``, a config as files and checkpoints have it."""
        mine, defaults, theirs = (
            json.loads(json.dumps(fields)) for fields in (dataclasses.asdict(self), dataclasses.asdict(Config()), other)
        )
        theirs = defaults | theirs  # which may be of a version that did not have a field yet
        odd = (name for name, value in mine.items() if name not in RUN_FIELDS and theirs[name] != value)
        return "; ".join(f"{name} was {theirs[name]!r}, now {mine[name]!r}" for name in odd)


def default_search_space(arch: str, sparsity: float) -> float:
    """BiDST's search space by sparsity, as its appendix has it: .05, .03, .02 at 90, 95, 98 % (MobileNet-v2: more)."""
    small, medium, large = (0.04, 0.05, 0.08) if arch.startswith("mobilenet") else (0.02, 0.03, 0.05)
    return large if sparsity <= 0.9 else medium if sparsity <= 0.95 else small


def parse_steps(name: str, text: str | int | float, steps_per_epoch: int, total_steps: int) -> int:
    """Optimizer steps from ``"100"`` (steps), ``"8ep"`` (epochs) or ``"0.75"`` (fraction of ``total_steps``)."""
    text = str(text).strip()
    try:
        if text.endswith("ep"):
            steps = float(text[:-2]) * steps_per_epoch
        else:
            steps = int(text) if text.isdigit() else float(text) * total_steps
            if not text.isdigit() and not 0 <= float(text) <= 1:
                raise ValueError
        if not (math.isfinite(steps) and steps >= 0):
            raise ValueError
    except (ValueError, OverflowError):
        allowed = "steps (100), epochs (8ep) or a fraction of the run between 0.0 and 1.0"
        raise ValueError(f"{name}={text!r} is not allowed; expected {allowed}") from None
    nonzero = steps > 0
    return max(round(steps), int(nonzero))


def parse_amount(text: str | float) -> float:
    """A count (``"500"``) or a fraction (``"0.1"``)."""
    return int(text) if str(text).strip().isdigit() else float(text)


def _as_builtin(value: Any, kind: type) -> Any:
    """``value`` of a builtin type, where that loses nothing."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, numbers.Number) and type(value).__name__ in ("bool_", "bool"):  # NumPy's is no number
        return bool(value)
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return str(value) if kind is str and type(value) in (int, float) else value
    value = int(value) if isinstance(value, numbers.Integral) else float(value)
    return str(value) if kind is str else value


@functools.cache
def field_types() -> dict[str, tuple[type, bool]]:
    """``field -> (type, may be None)`` of `Config`; ``tuple`` stands for a tuple of strings."""
    out = {}
    for name, hint in typing.get_type_hints(Config).items():
        optional = isinstance(hint, types.UnionType)
        if optional:
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        out[name] = (tuple if typing.get_origin(hint) is tuple else hint, optional)
    return out


def read_config(path: str | Path) -> dict[str, Any]:
    """Fields from a JSON file: written by hand, or the config.json of a run.

    Of the config.json of a run its folder is left out, and whether that was resumed, overwritten or cut short.

    Raises:
        ValueError: no JSON object, or unknown fields.
    """
    content = read_json(path)
    of_run = {"versions", "resolved"}
    if of_run & content.keys():  # then these say what became of that run, not what another is to do
        of_run |= {"resume", "overwrite", "max_steps", "output_dir"}
    return check_fields({k: v for k, v in content.items() if k not in of_run}, str(path))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError, naming the file, if there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:  # no text is one too
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object with the fields of a run")
    return content


def check_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``values`` with lists made tuples; raises ValueError for unknown names and wrong types."""
    known = field_types()
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}; allowed: {', '.join(known)}")
    out = {}
    for name, value in values.items():
        kind, optional = known[name]
        value = tuple(value) if kind is tuple and isinstance(value, list) else value
        accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
        fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        fits = fits and (kind is not tuple or all(isinstance(text, str) for text in value))
        if not fits and not (value is None and optional):
            expected = "a list of texts" if kind is tuple else kind.__name__
            raise ValueError(f"{where}: {name}={value!r} is not allowed; expected {expected}")
        out[name] = value
    return out
