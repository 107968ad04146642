"""Training, from a `Config` to a folder with the trained network. Read `train` and `Trainer.run` first.

::

    sparsebilevel train --method bidst --arch resnet32x2 --data cifar10 --sparsity 0.9 --output-dir runs/first
    sparsebilevel train --preset bidst-resnet50-imagenet --data-path /data/imagenet --sparsity 0.95
    torchrun --nproc-per-node 8 --no-python sparsebilevel train ...   # batch size: of one process

The phases of a run, each with a fresh optimizer state and learning-rate schedule:

=====================  ================================================================================
dense                  train
static set rigl bidst  [pretrain, dense] -> train
omp                    [pretrain] -> prune at once -> train
imp                    train dense -> (prune, rewind, train) for each level
hydra bip              [pretrain] -> prune (the mask is learned) -> [finetune under the final mask]
=====================  ================================================================================

With ``init_from`` the dense phase is left out: its result is read from a checkpoint.

The folder of a run:

config.json
    All fields of `Config`, "versions" and "resolved" (the method's options as they came out).
log.jsonl
    One object a line. Fields that begin with ``time_`` are times; all others repeat exactly in a second run, but for
    ``bytes_``, what a rank of several has given to all_reduce.

    - type "epoch": epoch, phase, step (optimizer steps so far), lr, train_loss, train_acc, val_loss, val_acc,
      test_loss, test_acc (of the averaged weights with ``model_ema``; test_acc5 from 100 classes on), sparsity and the
      method's own figures, time_epoch_s, time_images_per_s.
    - type "topology": step (of the method), iou, grown, time_s. Methods that change their mask at every step have none.
    - type "layers", at the end: "layers", a list of {name, shape, total, nonzero, density}.
    - type "result", last: test_acc (of the last epoch), test_acc_selected and selected_epoch (chosen by validation
      among whole epochs; None without), sparsity, costs (of `costs.count_costs`), topology_changes, mask_iou_start
      (overlap with the first mask, of methods that change it at every step), time_total_s, time_topology_s and, if
      measured, time_step_ratio, time_step_sparse_ms, time_step_dense_ms. The test set never selects anything.
checkpoint.pth
    Everything needed to go on: see `Trainer.save`. best.pth is the state of the best validation accuracy.

A run that is resumed, at the end of an epoch or in the middle of one, gives the same numbers on a CPU as one that was
not interrupted: data order and augmentation are functions of (seed, epoch, batch), the learning rate is one of the
step, and all other state is in the checkpoint, which is taken right after a step, when no gradient is pending.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import METHODS, SparseAllReduce, SparseMaskedConv2d, optimize_for_cpu, sparse_layers, sparsify
from ..kernels import native
from ..methods import HYDRA, IMP, BiP, NotFiniteError, Sparsifier
from .build import make_data, make_model, make_optimizer
from .checkpoint import (
    CheckpointError,
    check_architecture,
    hides_weights,
    initial_weights,
    load_checkpoint,
    load_dense,
    load_masks,
    save_checkpoint,
)
from .config import SCRATCH_METHODS, TWO_PHASE_METHODS, Config, parse_amount
from .ema import EMA
from .plan import Phase, learning_rate, make_plan, score_lr_factor
from .runlog import Progress, RunFolder, check_tensorboard, describe_epoch, layer_rows, rename_times
from .runtime import Interrupted, Ranks, StopSignals, process_group, rng_state, set_rng_state

__all__ = ["Config", "Interrupted", "TrainingError", "train"]

logger = logging.getLogger("sparsebilevel")


class TrainingError(RuntimeError):
    """The run cannot go on, for a reason that lies in the run (divergence)."""


def train(config: Config) -> dict[str, Any]:
    """Run ``config`` to its end and return the result row of its log.

    Raises:
        ValueError, OSError, ImportError: what the run needs is wrong or missing; nothing on disk was changed.
        TrainingError: the loss is not finite any more, or what is trained is NaN. The last checkpoint is intact.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written, and ``resume`` continues. After the last step
            the run is completed first, and ``resume`` returns its result.
    """
    config.validate()
    folder = RunFolder(config)
    with process_group(config.device) as ranks, StopSignals() as stop, _torch_settings():
        try:
            trainer = Trainer(config, folder, ranks, stop)
            result = trainer.run()
        except BaseException:
            folder.forget()
            raise
        finally:
            folder.release()
        if stop.signal:  # after the last step: whoever has more runs to do is to stop too
            raise Interrupted(stop.signal, folder.path, trainer.step)
        return result


@contextlib.contextmanager
def _torch_settings() -> Iterator[None]:
    """Afterwards torch has the threads, and refuses the operations, that it did before."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class Trainer:
    """A run: what it consists of (constructor), its course (`run`), and how it is saved and restored."""

    # What a checkpoint holds beside the states of model, optimizer, scaler and method, random states, and sums.
    STATE = ("phase_index", "phase_epoch", "batch", "epoch", "step", "best", "last", "topology_logged", "rewind_point")

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks, stop: StopSignals) -> None:
        self.config, self.folder, self.ranks, self.stop = config, folder, ranks, stop
        if ranks.is_main:
            self.folder.check()
            if config.tensorboard:
                check_tensorboard()
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        self.device = ranks.device
        self.data = make_data(config, ranks)
        self.loaders = {"train": self.data.train, "prune": self.data.train}
        if config.method == "bip":
            upper = config.resolve("upper_split")
            upper = upper if upper == "same" else parse_amount(upper)
            self.loaders["prune"], self.loaders["upper"] = self.data.split(upper, config.upper_batch_size)
        self.plan = make_plan(config, self.loaders)
        self._warn_of_early_milestones()

        torch.manual_seed(config.seed)  # equal weights on all ranks
        self.model = make_model(config, self.data, self.device)
        torch.manual_seed(config.seed + ranks.rank)  # and dropout of their own
        self.optimizer = make_optimizer(config, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.sparsifier: Sparsifier | None = None
        self.ema: EMA | None = None
        self.initial_state: dict[str, Tensor] = {}
        self.rewind_point = self._copy_state() if config.rewind == "init" else None
        self.net: nn.Module = self.model  # compiled and distributed, in `enter`
        self.hook: SparseAllReduce | None = None
        self.upper_batches: Iterator[tuple[Tensor, Tensor]] | None = None

        self.phase_index = self.phase_epoch = self.batch = 0  # of the next step: phase, epoch in it, step in that epoch
        self.epoch = self.step = 0  # epochs and optimizer steps of the whole run so far
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, samples of this epoch
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}
        self.topology_logged = 0
        self.elapsed = 0.0

    # -- the course of a run ------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Start or resume, go through the phases, and finish."""
        checkpoint = self._find_checkpoint()
        if checkpoint is None:
            self._check_method()
            self.enter(self.plan[0])
        else:
            self.restore(checkpoint)
            results = self.ranks.gather(self.folder.result() if self._is_done() else None)
            if results[0] is not None:
                return results[0]
        self.ranks.barrier()  # everybody has looked at the folder before it changes
        if self.ranks.is_main:
            self.folder.open(
                self._resolved(is_new=checkpoint is None), None if checkpoint is None else checkpoint["log_bytes"]
            )
        total = min(sum(phase.steps for phase in self.plan), self.config.max_steps or math.inf)
        self.started = time.perf_counter() - self.elapsed
        self.progress = Progress(self._quiet(), int(total), self.step)
        try:
            while not self._is_done():
                phase = self.plan[self.phase_index]
                if self.phase_epoch == self.batch == 0 and (self.phase_index or checkpoint is not None):
                    self.enter(phase)
                self.train_epoch(phase)
                self.end_epoch(phase)
            return self.finish()
        except ValueError as error:
            self._check_numbers(error)
            raise
        finally:
            self.progress.close()
            self.folder.close()

    def enter(self, phase: Phase) -> None:
        """What happens before a phase; then a fresh optimizer state and fresh averages."""
        for action in phase.before:
            if action == "load":
                assert self.config.init_from is not None
                self.initial_state = initial_weights(self.config.init_from)
                load_dense(self.model, self.initial_state, self.config.init_from)
                self._warn_of_another_initialization()
            elif action == "start":
                self._warn_of_untrained_weights()
                if self.config.rewind == "pretrained":
                    self.rewind_point = self._copy_state()
                self.sparsifier = self.start_method(self.model, self.optimizer)
            elif action == "advance":
                assert isinstance(self.sparsifier, IMP)
                self.sparsifier.advance()
            elif action == "finish":
                self._finish_method()
        self.optimizer.state.clear()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.amp == "fp16")
        self._equip()

    def start_method(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Sparsifier:
        """Make the model sparse and the method that learns its masks."""
        c = self.config
        init: Any = "random" if c.method in SCRATCH_METHODS else "dense"
        layers: dict[str, Any] = {"exclude": c.exclude, "dense_first": c.dense_first, "rescale": c.rescale}
        sparsify(model, c.target(), c.distribution, c.patterns(), init=init, seed=c.seed, **layers)
        if init == "random" and hides_weights(self.initial_state):  # the others choose masks by the weights
            self._take_over_masks(model)
        sparsifier = METHODS[c.method](model, optimizer, seed=c.seed, **self._method_arguments())
        self.score_lr: float | None = getattr(sparsifier, "score_lr", None)
        return sparsifier

    def _warn_of_untrained_weights(self) -> None:
        """OMP, HYDRA and BiP prune what is trained; at initialization they have nothing to choose by.

        And where nothing normalizes, signals fade from layer to layer under a random mask.
        """
        c = self.config
        normalizes = any("Norm" in type(module).__name__ for module in self.model.modules())
        if c.method in SCRATCH_METHODS and not (normalizes or c.rescale or c.pretrain_epochs or c.init_from):
            advice = "" if c.pattern.startswith("filter") else "; try rescale"  # which scales no filter
            logger.warning("%s has no normalization layers and may hardly learn under a sparse mask%s", c.arch, advice)
        if c.method in ("omp", *TWO_PHASE_METHODS) and not c.pretrain_epochs and not c.init_from:
            logger.warning(
                "method %s prunes a trained network, and this one is at its initialization; give init_from, or "
                "pretrain_epochs to train it first",
                c.method,
            )

    def _warn_of_early_milestones(self) -> None:
        """What papers give in epochs are steps here where no unit is given."""
        counts = [int(text) for text in self.config.lr_milestones.split(",") if text.strip().isdigit()]
        if self.config.lr_scheduler == "step" and counts and max(counts) < self.plan[0].steps_per_epoch:
            logger.warning(
                "lr_milestones=%r are optimizer steps, all of them in the first epoch of %d; epochs are written 80ep",
                *(self.config.lr_milestones, self.plan[0].steps_per_epoch),
            )

    def _warn_of_another_initialization(self) -> None:
        """To rewind to weights that ``init_from`` was not trained from is the control of lottery tickets."""
        c = self.config
        if c.method != "imp" and c.rewind != "init":
            return
        assert c.init_from is not None
        seed = (load_checkpoint(c.init_from).get("config") or {}).get("seed")
        if seed != c.seed:
            logger.warning(
                "init_from: %s was trained from %s, and this run, of seed %s, rewinds to an initialization of its own; "
                "train both with one seed",
                *(c.init_from, "an unknown initialization" if seed is None else f"seed {seed}", c.seed),
            )

    def _take_over_masks(self, model: nn.Module) -> None:
        """Those of ``init_from``, and say so where they are not as sparse as the configuration has it."""
        assert self.config.init_from is not None
        targets = [layer.num_kept for _, layer in sparse_layers(model)]
        load_masks(model, self.initial_state, self.config.init_from)
        kept = [layer.num_kept for _, layer in sparse_layers(model)]
        # Counts that are spread over the layers in another way, or rounded there, are the same sparsity.
        if abs(sum(kept) - sum(targets)) > 0.01 * sum(targets):
            logger.warning(
                "init_from: the masks of %s keep %d groups and stay as they are; the configuration asks for %d",
                *(self.config.init_from, sum(kept), sum(targets)),
            )

    def train_epoch(self, phase: Phase) -> None:
        """The rest of the current epoch, or as much of it as ``max_steps`` allows."""
        self.model.train()
        batches = self.loaders.get(phase.name, self.data.train).iterate(self.epoch, self.batch * self.config.accumulate)
        self.epoch_start, self.epoch_start_batch = time.perf_counter(), self.batch
        while self.batch < phase.steps_per_epoch and not self._is_cut():
            self.train_step(phase, batches)
            self.batch += 1
            self.step += 1
            self.progress.step(self.epoch + 1)
            if self.step % self.config.print_freq == 0:
                self._check_finite()
            if signum := self.ranks.largest(self.stop.signal):  # which need not have reached this rank
                self.save()
                raise Interrupted(signum, self.folder.path, self.step)
        if self._is_cut():
            self.save()

    def train_step(self, phase: Phase, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step: [upper level,] forward and backward over the accumulated batches, weights, masks."""
        c, phase_step = self.config, self.phase_epoch * phase.steps_per_epoch + self.batch
        self._set_learning_rates(phase, phase_step)
        if phase.name == "prune" and c.method == "bip" and phase_step % c.resolve("lower_steps") == 0:
            self.upper_step()
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(c.accumulate):
            x, y = next(batches)
            with self._gradient_sync(part + 1 == c.accumulate):
                with self.autocast():
                    logits = self.net(x)
                    loss = F.cross_entropy(logits, y, label_smoothing=c.label_smoothing)
                self.scaler.scale(loss / c.accumulate).backward()
            with torch.no_grad():
                hits = (logits.argmax(1) == y).sum()
                self.totals += torch.stack([loss.double() * len(y), hits.double(), hits.new_tensor(len(y)).double()])
        if not self._weights_are_frozen():
            if c.clip_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_grad_norm)
            self.scaler.step(self.optimizer)
        if self.sparsifier is not None:
            self.sparsifier.step(self.scaler)
        if not self._weights_are_frozen():
            self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)

    def upper_step(self) -> None:
        """BiP's step on the mask, on a batch of its own."""
        assert isinstance(self.sparsifier, BiP)
        assert self.upper_batches is not None
        x, y = next(self.upper_batches)
        # Not through DDP: the method reduces what it needs itself, and the weights' gradients are thrown away.
        net = self.net.module if isinstance(self.net, nn.parallel.DistributedDataParallel) else self.net

        def loss() -> Tensor:
            with self.autocast():
                return F.cross_entropy(net(x), y, label_smoothing=self.config.label_smoothing)

        scaler = self.scaler if self.scaler.is_enabled() else None
        self.sparsifier.upper_step(loss, scaler, max_norm=self.config.clip_grad_norm)

    def end_epoch(self, phase: Phase) -> None:
        """Evaluate, log, select, and save. An epoch cut short by ``max_steps`` is logged only; its position stays."""
        self._check_finite()
        c = self.config
        seconds = time.perf_counter() - self.epoch_start
        images = (self.batch - self.epoch_start_batch) * c.accumulate * self._images_per_pass(phase)
        loss, correct, count = self.ranks.sum(self.totals).tolist()
        row: dict[str, Any] = {"epoch": self.epoch + 1, "phase": phase.name, "step": self.step}
        row |= {"lr": self.optimizer.param_groups[0]["lr"], "train_loss": loss / count, "train_acc": correct / count}
        is_last = self.epoch + 1 == sum(p.epochs for p in self.plan)
        # Only what a run without max_steps evaluates too is selected: a resumed run repeats the cut epoch.
        is_due = self.batch == phase.steps_per_epoch and (is_last or (self.epoch + 1) % c.eval_freq == 0)
        if self._is_cut() or is_due:
            row |= self.evaluate()
        if self.sparsifier is None:
            row |= {"sparsity": 0.0}
        else:
            row |= rename_times(self.sparsifier.metrics())
            self.sparsifier.reset_metrics()  # means of the next row begin here
        row |= {"time_epoch_s": seconds, "time_images_per_s": images / seconds}
        self._log_topology()
        self._log("epoch", row)
        self.progress.print(describe_epoch(row, sum(p.epochs for p in self.plan)))
        self.last = row
        best_so_far = -1.0 if self.best is None else self.best["val_acc"]
        if is_due and self.phase_index == len(self.plan) - 1 and row.get("val_acc", -1.0) > best_so_far:
            self.best = {name: row[name] for name in ("epoch", "val_acc", "test_acc")}
            if self.ranks.is_main:
                save_checkpoint(self.folder.best, self._network_state())
        if self._is_cut():
            return
        self.epoch, self.phase_epoch, self.batch = self.epoch + 1, self.phase_epoch + 1, 0
        self.totals.zero_()
        if self.phase_epoch == phase.epochs:
            self.phase_index, self.phase_epoch = self.phase_index + 1, 0
        if self.phase_epoch == 0 or self.epoch % c.checkpoint_freq == 0:
            self.save()

    def finish(self) -> dict[str, Any]:
        """Make the mask final, count what the network costs, and write the last rows."""
        if not self._is_cut():
            self._finish_method()
            self.save()
        self._log("layers", {"layers": layer_rows(self.model)})
        row = {name: getattr(self.config, name) for name in ("method", "arch", "data", "seed")}
        row |= {"sparsity_target": 0.0 if self.config.method == "dense" else self.config.sparsity}
        accuracies = ("train_acc", "val_acc", "test_loss", "test_acc")
        row |= {name: self.last.get(name) for name in ("epoch", "step", *accuracies)}
        best = self.best or {}
        row |= {"test_acc_selected": best.get("test_acc"), "selected_epoch": best.get("epoch")}
        row |= {"topology_changes": len(self.sparsifier.history) if self.sparsifier else 0}
        if self.sparsifier is not None and self.sparsifier.first_masks:
            row |= {"mask_iou_start": self.sparsifier.metrics()["mask_iou_start"]}
        row |= {"time_topology_s": sum(r["seconds"] for r in self.sparsifier.history) if self.sparsifier else 0.0}
        row |= {"time_total_s": time.perf_counter() - self.started}
        if self.hook is not None and self.sparsifier is not None:
            scores = self.sparsifier.bytes_sent
            row |= {"bytes_sent": self.hook.bytes_sent + scores, "bytes_sent_dense": self.hook.dense_bytes + scores}
        if self.ranks.is_main:
            row |= self._measure()
        result = self._log("result", row)
        self.ranks.barrier()
        return result

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on validation and test data, of the averaged weights if there are any."""
        model = self.model if self.ema is None else self.ema.module
        self.ranks.share_statistics(model)
        model.eval()
        row: dict[str, float] = {}
        for name, loader in (("val", self.data.val), ("test", self.data.test)):
            if loader is None:
                continue
            totals = torch.zeros(4, dtype=torch.float64, device=self.device)
            for x, y in loader:
                with self.autocast():
                    logits = model(x)
                loss = F.cross_entropy(logits.float(), y, reduction="sum")
                hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                totals += torch.stack([loss, hits[:, 0].sum(), hits.sum(), y.new_tensor(len(y))]).double()
            total_loss, correct, correct5, count = self.ranks.sum(totals).tolist()
            row |= {f"{name}_loss": total_loss / count, f"{name}_acc": correct / count}
            if self.data.num_classes >= 100:
                row[f"{name}_acc5"] = correct5 / count
        return row

    def _measure(self) -> dict[str, Any]:
        from .. import costs

        shape = self.data.input_shape
        model = copy.deepcopy(self.model)
        row: dict[str, Any] = {"costs": costs.count_costs(model, shape, self.device).to_dict()}
        row["sparsity"] = row["costs"]["sparsity"]
        if self.config.measure and self.sparsifier is not None:
            times = costs.measure_step(model, (self.config.batch_size, *shape), self.data.num_classes)
            row |= {"time_step_ratio": times["ratio"], "time_step_sparse_ms": times["sparse_ms"]}
            row |= {"time_step_dense_ms": times["dense_ms"]}
        return row

    # -- saving and restoring -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint. All ranks take part: each has a random state of its own."""
        self._check_finite()
        totals = self.ranks.sum(self.totals).cpu()
        rng = self.ranks.gather(rng_state(self.device))
        if not self.ranks.is_main:
            return
        state = self._network_state() | {name: getattr(self, name) for name in self.STATE}
        state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state |= {"sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict()}
        state |= {"totals": totals, "rng": rng, "log_bytes": self.folder.log_bytes()}
        sent = (0, 0) if self.hook is None else (self.hook.bytes_sent, self.hook.dense_bytes)
        state |= {"bytes_sent": (*sent, 0 if self.sparsifier is None else self.sparsifier.bytes_sent)}
        state |= {"elapsed": time.perf_counter() - self.started}
        save_checkpoint(self.folder.checkpoint, state)

    def _network_state(self) -> dict[str, Any]:
        ema = {"module": None, "steps": 0} if self.ema is None else self.ema.state_dict()
        state = {"model": self.model.state_dict(), "ema": ema["module"], "ema_steps": ema["steps"]}
        return state | {"config": dataclasses.asdict(self.config)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that `save` wrote."""
        path = self.folder.checkpoint
        lacking = {
            *self.STATE,
            "config",
            "optimizer",
            "scaler",
            "sparsifier",
            "log_bytes",
            "rng",
            "totals",
            "elapsed",
        } - state.keys()
        if lacking:
            raise CheckpointError(f"checkpoint {path} is not of a training run (it lacks {', '.join(sorted(lacking))})")
        # config.json alone does not tell: it may have been edited, and flags that are not given come from it.
        if odd := self.config.differences(state["config"]):
            raise CheckpointError(f"checkpoint {path} is of another configuration ({odd})")
        check_architecture(self.model, state["model"], path)
        if len(state["rng"]) != self.ranks.world:
            raise CheckpointError(f"checkpoint {path} is of {len(state['rng'])} processes, not of {self.ranks.world}")
        if state["sparsifier"] is not None:
            self.sparsifier = self.start_method(self.model, self.optimizer)
        self.model.load_state_dict(state["model"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in (*self.STATE, "elapsed"):
            setattr(self, name, state[name])
        self._equip()
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict({"module": state["ema"], "steps": state["ema_steps"]})
        *sent, scores = state.get("bytes_sent", (0, 0, 0))  # which older versions did not keep
        if self.hook is not None:
            self.hook.bytes_sent, self.hook.dense_bytes = sent
        if self.sparsifier is not None:
            self.sparsifier.bytes_sent = scores
        if self.ranks.is_main:
            self.totals.copy_(state["totals"])
        set_rng_state(self.device, state["rng"][self.ranks.rank])

    def _find_checkpoint(self) -> dict[str, Any] | None:
        if not self.config.resume:
            return None
        if self.folder.checkpoint.exists():
            return load_checkpoint(self.folder.checkpoint)
        self.folder.check_nothing_lost()
        if self.ranks.is_main:
            logger.warning("resume: there is no run in %s, and a new one starts", self.folder.path)
        return None

    # -- small parts --------------------------------------------------------------------------------------------------

    def _equip(self) -> None:
        """Forms of the model for this machine, as it is now, averages, and the upper level's batches."""
        if self._has_layout():
            # In the mode in which it trains, whatever came before. What cannot be traced stays, with a warning.
            optimize_for_cpu(self.model.train())
        self.net = self.model
        if self.config.compile:  # inside of DDP, as PyTorch advises: the graph is then the model's alone
            self.net = torch.compile(self.net)  # type: ignore[assignment]
        if self.ranks.world > 1 and any(p.requires_grad for p in self.model.parameters()):
            self.net = nn.parallel.DistributedDataParallel(self.net)
            if self.sparsifier is not None:
                before, self.hook = self.hook, SparseAllReduce(self.net)
                if before is not None:
                    self.hook.bytes_sent += before.bytes_sent
                    self.hook.dense_bytes += before.dense_bytes
        self.ema = EMA(self.model, self.config.model_ema_decay) if self.config.model_ema else None
        if "upper" in self.loaders and isinstance(self.sparsifier, BiP):
            phase = self.plan[min(self.phase_index, len(self.plan) - 1)]
            done = self.phase_epoch * phase.steps_per_epoch + self.batch
            self.upper_batches = self.loaders["upper"].stream(-(-done // self.config.resolve("lower_steps")))

    def _has_layout(self) -> bool:
        """Whether the model is trained in the layout of the sparse kernels; what the masks are does not matter."""
        c, layers = self.config, sparse_layers(self.model)
        is_usable = self.device.type == "cpu" and native.available() and c.amp != "fp16" and not c.compile
        return c.optimize_for_cpu and is_usable and any(isinstance(m, SparseMaskedConv2d) for _, m in layers)

    def _check_method(self) -> None:
        """Find out now, and not after the pretraining, whether the method can work on this model."""
        if self.config.method != "dense" and "start" not in self.plan[0].before:
            model = copy.deepcopy(self.model)
            self.start_method(model, make_optimizer(self.config, model))

    def _method_arguments(self) -> dict[str, Any]:
        phase = next(phase for phase in self.plan if "start" in phase.before)
        arguments = self.config.method_arguments(phase.steps_per_epoch, phase.steps)
        if arguments.get("rewind_step", 0) > (0 if self.config.init_from else phase.steps):
            raise ValueError(f"rewind_step={self.config.rewind_step!r} is not allowed; the first cycle is too short")
        return arguments

    def _resolved(self, is_new: bool) -> dict[str, Any]:
        """What the configuration came to here, and what it does not say: processes, data, and the start of the run."""
        loop = {name: self.config.resolve(name) for name in ("score_lr_scheduler", "lower_steps", "upper_split")}
        method = {} if self.config.method == "dense" else self._method_arguments()
        facts: dict[str, Any] = {"processes": self.ranks.world, "data_digest": self.data.digest()}
        if is_new and self.config.init_from is not None:
            facts["init_from_config"] = load_checkpoint(self.config.init_from).get("config") or {}
        return method | {name: value for name, value in loop.items() if value is not None} | facts

    def _set_learning_rates(self, phase: Phase, phase_step: int) -> None:
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(c, phase, phase_step)
            is_exempt = group["norm"] and c.norm_weight_decay is not None
            group["weight_decay"] = c.norm_weight_decay if is_exempt else phase.weight_decay
        scheduler = c.resolve("score_lr_scheduler")
        if scheduler not in (None, "constant") and phase.name in ("prune", "train") and self.sparsifier is not None:
            factor = score_lr_factor(scheduler, phase_step / phase.steps)
            if self.score_lr is not None:  # None follows the learning rate
                self.sparsifier.score_lr = self.score_lr * factor  # type: ignore[attr-defined]

    def _finish_method(self) -> None:
        if isinstance(self.sparsifier, (BiP, HYDRA)) and not self.sparsifier.finished:
            if isinstance(self.sparsifier, BiP):
                self.sparsifier.finish(self.rewind_point)
            else:
                self.sparsifier.finish()
            self.rewind_point = None

    def _weights_are_frozen(self) -> bool:
        return isinstance(self.sparsifier, HYDRA) and not self.sparsifier.finished

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none")

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[Any]:
        is_ddp = isinstance(self.net, nn.parallel.DistributedDataParallel)
        return self.net.no_sync() if is_ddp and not is_last else contextlib.nullcontext()  # type: ignore[operator]

    def _copy_state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _images_per_pass(self, phase: Phase) -> int:
        return self.loaders.get(phase.name, self.data.train).batch_size * self.ranks.world

    def _check_finite(self) -> None:
        if not math.isfinite(float(self.totals[0])):
            raise self._divergence("the loss is not finite any more")

    def _check_numbers(self, error: ValueError) -> None:
        """Raise TrainingError where a method refused what it got because the run has diverged: no input was bad."""
        self._check_finite()
        state = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        has_nan = any(bool(values.isnan().any()) for values in state)  # scores outside of a search space are infinite
        if has_nan or isinstance(error, NotFiniteError):
            raise self._divergence("weights, gradients or scores are NaN") from error

    def _divergence(self, what: str) -> TrainingError:
        rate = self.optimizer.param_groups[0]["lr"]
        return TrainingError(f"{what} (step {self.step}, lr {rate:.4g}); try a smaller lr")

    def _is_cut(self) -> bool:
        return self.config.max_steps is not None and self.step >= self.config.max_steps

    def _is_done(self) -> bool:
        return self._is_cut() or self.phase_index == len(self.plan)

    def _quiet(self) -> Config:
        return self.config if self.ranks.is_main else dataclasses.replace(self.config, quiet=True)

    def _log(self, kind: str, row: dict[str, Any]) -> dict[str, Any]:
        return self.folder.write(kind, row) if self.ranks.is_main else row

    def _log_topology(self) -> None:
        for record in [] if self.sparsifier is None else self.sparsifier.history[self.topology_logged :]:
            self._log("topology", rename_times(record))
            self.topology_logged += 1
