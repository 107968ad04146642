"""The phases of a training run, and the courses of its step sizes: all functions of the step alone."""

from __future__ import annotations

import dataclasses
import math

from ..data import Loader
from .config import TWO_PHASE_METHODS, Config, parse_steps


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with a learning-rate schedule of its own, and what happens before it."""

    name: str  # pretrain, train, prune or finetune
    epochs: int
    steps_per_epoch: int
    lr: float
    weight_decay: float
    before: tuple[str, ...] = ()  # of: load (init_from), start (the method), advance (imp), finish (the mask is final)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def make_plan(c: Config, loaders: dict[str, Loader]) -> list[Phase]:
    """The phases of a run; the table in `sparsebilevel.training.loop`."""

    def phase(name: str, epochs: int, *before: str) -> Phase:
        loader = loaders.get(name, loaders["train"])
        lr = {"pretrain": c.pretrain_lr, "finetune": c.finetune_lr}.get(name)
        decay = {"pretrain": c.pretrain_weight_decay, "finetune": c.finetune_weight_decay}.get(name)
        lr, decay = c.lr if lr is None else lr, c.weight_decay if decay is None else decay
        steps = len(loader) // c.accumulate
        if steps == 0:
            allowed = f"an epoch of phase {name} has {len(loader)} batches"
            raise ValueError(f"accumulate={c.accumulate} is not allowed; {allowed}")
        return Phase(name, epochs, steps, lr, decay, tuple(before))

    if c.method == "imp":
        levels = 3 if c.levels is None else c.levels
        cycles = [phase("train", c.epochs, "advance") for _ in range(levels)]
        if c.init_from:
            return [dataclasses.replace(cycles[0], before=("start", "load", "advance")), *cycles[1:]]
        name, epochs = ("pretrain", c.pretrain_epochs) if c.pretrain_epochs else ("train", c.epochs)
        return [phase(name, epochs, "start"), *cycles]
    before = ("load",) if c.init_from else ()
    if c.method != "dense":
        before = (*before, "start")
    plan = [phase("prune" if c.method in TWO_PHASE_METHODS else "train", c.epochs, *before)]
    if c.pretrain_epochs:
        plan.insert(0, phase("pretrain", c.pretrain_epochs))
    if c.finetune_epochs:
        plan.append(phase("finetune", c.finetune_epochs, "finish"))
    return plan


def learning_rate(c: Config, phase: Phase, step: int) -> float:
    """Learning rate of step ``step`` (from 0) of a phase: linear warm-up, then the schedule."""
    warmup = min(round(c.lr_warmup_epochs * phase.steps_per_epoch), phase.steps - 1)
    if step < warmup:
        return phase.lr * (step + 1) / warmup
    if c.lr_scheduler == "cosine":
        progress = (step - warmup) / (phase.steps - warmup)
        return c.lr_min + (phase.lr - c.lr_min) * (1 + math.cos(math.pi * progress)) / 2
    if c.lr_scheduler == "step":
        texts, lengths = c.lr_milestones.split(","), (phase.steps_per_epoch, phase.steps)
        return phase.lr * c.lr_gamma ** sum(step >= parse_steps("lr_milestones", text, *lengths) for text in texts)
    return phase.lr


def score_lr_factor(scheduler: str, progress: float) -> float:
    """Course of the scores' step size over a phase: ``step`` falls tenfold at 50 and 75 %, as in BiP's code."""
    if scheduler == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75)) if scheduler == "step" else 1.0
