"""What a run writes: its folder, log.jsonl, TensorBoard, and the progress that a person sees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

try:
    import fcntl
except ImportError:  # not of a POSIX system
    fcntl = None  # type: ignore[assignment]

from ..nn import sparse_layers
from .checkpoint import naming, remove_temporaries, write_text
from .config import Config, read_json

FILES = ("config.json", "log.jsonl", "checkpoint.pth", "best.pth")


def open_folder(
    output_dir: str,
    config: Mapping[str, Any],
    free: Container[str],
    resume: bool,
    overwrite: bool,
    written: Sequence[str],
) -> None:
    """Make the folder of a command's run and write its ``config.json``; `RunFolder` is that of ``train``.

    The folder is this process's to its end, or to `release_folder`.

    Args:
        output_dir: where to.
        config: what the run is, in values that JSON has.
        free: names in it that may differ when a run is resumed.
        resume: continue the run that is there, if there is one.
        overwrite: take a folder that is not empty.
        written: glob patterns of what a run leaves there. It is removed unless the run goes on, since ``resume`` would
            take it for this run's.

    Raises:
        OSError: the folder is not writable.
        ValueError: it is not empty, or ``resume`` finds a run of another configuration or a damaged one, or another
            process is writing there.
    """
    if not output_dir:  # which would be the current folder, and `overwrite` removes a run from it
        raise ValueError("output_dir='' is not allowed; expected a text that is not empty")
    folder = Path(output_dir)
    check_writable(folder)
    lock_folder(folder)
    path = folder / "config.json"
    if resume and path.exists():
        before = read_json(path)
        odd = [name for name, value in config.items() if name not in free and before.get(name) != value]
        if odd:
            raise ValueError(
                f"resume: the run in {folder} has another configuration ({', '.join(odd)}); repeat the flags of its "
                "first command"
            )
    elif folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"output_dir={str(folder)!r} is not empty; give --resume, --overwrite or another folder")
    else:
        for pattern in written:
            for old in folder.glob(pattern):
                old.unlink()
    for pattern in (path.name, *written):
        place, slash, name = pattern.rpartition("/")
        remove_temporaries(folder, f"{place}{slash}.{name}.*")
    write_text(path, json.dumps(config, indent=2) + "\n")


def check_writable(folder: Path) -> None:
    """Make the folder of a run; raise OSError, which names it as ``output_dir``, if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"output_dir={str(folder)!r} is not writable: {error.strerror or error}") from None


def lock_folder(folder: Path) -> None:
    """Keep other processes out of a folder, as far as the system can: a run that is started again may still run.

    Raises:
        ValueError: another process has it.
    """
    if fcntl is None or folder.resolve() in _locked:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):  # a file system without locks is no reason not to train
            raise ValueError(f"output_dir={str(folder)!r}: another process is writing a run there") from None
    else:
        _locked[folder.resolve()] = descriptor


def release_folder(folder: Path) -> None:
    """Let other processes have a folder again; the end of this one does so too."""
    descriptor = _locked.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


_locked: dict[Path, int] = {}  # open folders, which hold the locks


class RunFolder:
    """The folder of a run. Nothing in it is touched before `open`, which a failed start never reaches."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.output_dir)
        self.log, self.checkpoint, self.best = (self.path / name for name in FILES[1:])
        self._board: Any = None
        self._is_new = not self.path.exists()

    def check(self) -> None:
        """Refuse a folder that cannot be written to, or that holds something and is neither resumed nor overwritten.

        From here to `release` it is this process's.

        Raises:
            OSError: the folder is not writable.
            ValueError: it is not empty, or holds a run of another configuration, or another process writes to it.
        """
        check_writable(self.path)
        lock_folder(self.path)
        if self.config.resume:
            self._check_same_config()
        elif not self.config.overwrite and any(self.path.iterdir()):
            raise ValueError(
                f"output_dir={str(self.path)!r} is not empty; give resume to continue its run, overwrite to replace "
                "it, or another folder"
            )

    def release(self) -> None:
        """Let other processes have the folder."""
        release_folder(self.path)

    def forget(self) -> None:
        """Remove the folder after a start that failed, if `check` made it and nothing came into it."""
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.path.rmdir()

    def _check_same_config(self) -> None:
        written = self.path / "config.json"
        if not written.exists():
            if self.checkpoint.exists():
                raise ValueError(f"{written} is missing, so that the run in {self.path} cannot be resumed")
            return
        if odd := self.config.differences(read_json(written)):
            raise ValueError(f"resume: the run in {self.path} has another configuration ({odd})")

    def check_nothing_lost(self) -> None:
        """Before a resumed run without a checkpoint starts afresh: refuse if its log says that there was one."""
        rows = read_log(self.path) if self.log.exists() else []
        epochs = sum(row["type"] == "epoch" for row in rows)
        if epochs > self.config.checkpoint_freq:
            raise ValueError(
                f"resume: {self.checkpoint} is missing, but the log holds {epochs} epochs; restore it, or give "
                "overwrite to start again"
            )

    def open(self, resolved: dict[str, Any], log_bytes: int | None = None) -> None:
        """Start writing (None), or continue: what the log holds beyond ``log_bytes`` is done again, and cut off.

        Raises:
            ValueError: the run that goes on was trained on other data.
        """
        if log_bytes is not None:
            resolved = self._resolved_before(resolved) | resolved
        config = dataclasses.asdict(self.config) | {"versions": _versions(), "resolved": resolved}
        text = json.dumps(config, indent=2) + "\n"  # what fails does so before anything is removed
        for path in (self.path / name for name in FILES):
            remove_temporaries(self.path, f".{path.name}.*")
            if log_bytes is None:
                path.unlink(missing_ok=True)
        write_text(self.path / "config.json", text)
        self.log.touch()
        os.truncate(self.log, min(log_bytes or 0, self.log.stat().st_size))
        if self.config.tensorboard:
            last = max((row["step"] for row in read_log(self.path) if row["type"] == "epoch"), default=-1)
            self._board = _summary_writer(self.path, last + 1)  # as the log: what comes after is done again

    def _resolved_before(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """What the run was resolved to when it began, which ``resolved`` must agree with on the data."""
        before = read_json(self.path / "config.json").get("resolved", {})
        if "data_digest" in before and before["data_digest"] != resolved["data_digest"]:
            raise ValueError(
                f"resume: the run in {self.path} was trained on other data than {self.config.data} in "
                f"data_path={self.config.data_path!r}"
            )
        return before

    def log_bytes(self) -> int:
        """Length of the log now."""
        return self.log.stat().st_size

    def write(self, kind: str, row: dict[str, Any]) -> dict[str, Any]:
        """Append a line of type ``kind``."""
        row = {"type": kind, **row}
        with naming(self.log), self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None and kind == "epoch":
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
            self._board.flush()
        return row

    def result(self) -> dict[str, Any] | None:
        """The result row, if the log ends with one: then the run is complete."""
        rows = read_log(self.path) if self.log.exists() else []
        return rows[-1] if rows and rows[-1]["type"] == "result" else None

    def close(self) -> None:
        self.release()
        if self._board is not None:
            self._board.close()


def read_log(run: str | Path, fields: tuple[str, ...] = ("type",)) -> list[dict[str, Any]]:
    """All rows of a run's log, each with ``fields``; a last line cut short by a crash is left out.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged before its end. Whoever writes it anew would lose what follows.
    """
    path = Path(run) / "log.jsonl"
    rows = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and row.keys() >= set(fields):
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"line {number} of {path} is damaged: {line[:80]!r}")
    return rows


def check_tensorboard() -> None:
    """Raise ImportError, saying what to install, if TensorBoard is not there."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("tensorboard=True needs TensorBoard: pip install 'sparsebilevel[log]'") from error


def _summary_writer(path: Path, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=purge_step)


def _versions() -> dict[str, str]:
    import torch

    from .. import __version__

    return {"sparsebilevel": __version__, "torch": torch.__version__, "python": platform.python_version()}


class Progress:
    """A tqdm bar over all steps of the run, or without tqdm a line every ``print_freq`` steps; both with an ETA."""

    def __init__(self, config: Config, total: int, done: int) -> None:
        self.quiet = config.quiet
        self.every, self.total, self.done, self.first = config.print_freq, total, done, done
        self.start = time.perf_counter()
        self.bar: Any = None
        if not self.quiet and sys.stderr is not None:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            # Where no terminal rewrites the line, every refresh is a line of its own.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            options = {"desc": config.method, "unit": "step", "mininterval": interval, "dynamic_ncols": True}
            self.bar = tqdm(total=total, initial=done, **options)

    def step(self, epoch: int) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif not self.quiet and self.done % self.every == 0:
            pace = (time.perf_counter() - self.start) / (self.done - self.first)
            eta = _clock(pace * (self.total - self.done))
            self.print(f"epoch {epoch}  step {self.done}/{self.total}  {1 / pace:.1f} steps/s  ETA {eta}")

    def print(self, text: str) -> None:
        if self.quiet:
            return
        try:
            if self.bar is not None:
                self.bar.write(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # nobody reads it any more, and the run goes on
            self.quiet = True

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def rename_times(values: dict[str, Any]) -> dict[str, Any]:
    """Names of times as the log has them: what does not repeat begins with ``time_`` or ``bytes_``."""
    names = {"seconds": "time_s", "topology_seconds": "time_topology_s"}
    return {names.get(name, name): value for name, value in values.items()}


def describe_epoch(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees after an epoch."""
    parts = [f"epoch {row['epoch']:3}/{epochs} {row['phase']:8}", f"loss {row['train_loss']:.4f}"]
    accuracies = [name for name in ("train_acc", "val_acc", "test_acc") if name in row]
    parts += [f"{name.removesuffix('_acc')} {100 * row[name]:.2f} %" for name in accuracies]
    return "  ".join([*parts, f"sparsity {row['sparsity']:.4f}", f"{row['time_images_per_s']:.0f} images/s"])


def layer_rows(model: nn.Module) -> list[dict[str, Any]]:
    """Size and density of every sparse layer."""
    rows = []
    for name, layer in sparse_layers(model):
        kept, total = int(layer.mask.sum()), layer.mask.numel()
        shape = list(layer.weight.shape)
        rows.append({"name": name, "shape": shape, "total": total, "nonzero": kept, "density": kept / total})
    return rows
