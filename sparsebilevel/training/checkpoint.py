"""Checkpoints: written atomically, read with ``weights_only=True``, checked before anything is changed.

A checkpoint is a dictionary; "model" holds the state dict (masks included), "ema" the averaged one or None and
"ema_steps" how many steps it has averaged, and the rest is what a training run needs to continue, see
`sparsebilevel.training.loop`. Bare state dicts are read as well.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..nn import sparse_layers


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system inside name ``path``; a disk that is full does not say which file it had no place for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, so that ``path`` holds, at every moment, either the old content or the new one."""
    # Two runs that are started in one folder must not write into one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds, at every moment, either the old content or the new one."""
    with _replacing(path) as file:
        torch.save(dict(state), file)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as atomically as a checkpoint."""
    with _replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # paths may hold what is no text in this locale


def remove_temporaries(folder: Path, pattern: str) -> None:
    """Remove what processes that were killed while they wrote a file NAME have left: ``.NAME.*`` beside it."""
    for temporary in folder.glob(pattern):
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or that of a run's folder, onto the CPU. A bare state dict comes back as ``{"model": ...}``.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, damaged, or something else than a checkpoint.
    """
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if damage := _find_damage(path):
        raise CheckpointError(f"checkpoint {path} cannot be read: {damage}. Restore a copy, or start a new run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} cannot be read: it is damaged or no checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__}; expected a dictionary")
    if "model" not in state:
        state = {"model": state.get("state_dict", state)}
    model = state["model"]
    if not isinstance(model, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in model.items()
    ):
        raise CheckpointError(f"checkpoint {path} has no state dict under 'model' or 'state_dict'")
    return state | _split_average(state.get("ema"))


def _split_average(ema: Any) -> dict[str, Any]:
    """The entries "ema" and "ema_steps" of a checkpoint that has the two in one, and else nothing.

    Such are those of older versions, where the count stood among the weights, and what `EMA.state_dict` gives.
    """
    if not isinstance(ema, Mapping):
        return {}
    if set(ema) == {"module", "steps"}:
        return {"ema": ema["module"], "ema_steps": ema["steps"]}
    if "ema_steps" in ema:
        weights = {key: value for key, value in ema.items() if key != "ema_steps"}
        return {"ema": weights, "ema_steps": int(ema["ema_steps"])}
    return {}


def network_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of the network that a checkpoint is read for: of the averaged weights if it has any."""
    return dict(checkpoint.get("ema") or checkpoint["model"])


def _find_damage(path: Path) -> str:
    """What is wrong with the file as an archive; empty if nothing. torch itself does not compare the checksums."""
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        return "it is truncated" if is_archive else ""
    return f"it is damaged (the checksum of {broken} is wrong)" if broken else ""


def check_architecture(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError, naming the keys, if ``state`` is of another model; masks may be there or not."""
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if not is_mask_key(k)}
    theirs = {k: tuple(v.shape) for k, v in state.items() if not is_mask_key(k)}
    odd = {
        "missing": sorted(ours.keys() - theirs.keys()),
        "unexpected": sorted(theirs.keys() - ours.keys()),
        "of another shape": [
            f"{k} {list(theirs[k])} instead of {list(ours[k])}" for k in ours if k in theirs and ours[k] != theirs[k]
        ],
    }
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:5] + ['...'] * (len(keys) > 5))}" for what, keys in odd.items() if keys
    ]
    if found:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {'; '.join(found)}")


def is_mask_key(key: str) -> bool:
    """Whether a key of a state dict is of a mask or of its scores, which a dense network does not have."""
    return key.rpartition(".")[2] in ("mask", "mask_scores")


def masked_layers(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have a mask in a state dict."""
    return [key.removesuffix("mask").removesuffix(".") for key in state if key.rpartition(".")[2] == "mask"]


def _key(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def initial_weights(path: str | Path) -> dict[str, Tensor]:
    """State of a checkpoint to start from: averaged weights if there are any, zeros where its masks hide a weight."""
    state = network_state(load_checkpoint(path))
    for layer in masked_layers(state):
        if _key(layer, "weight") in state:
            state[_key(layer, "weight")] = state[_key(layer, "weight")] * state[_key(layer, "mask")]
    return state


def hides_weights(state: Mapping[str, Tensor]) -> bool:
    """Whether the masks of ``state`` hide anything. Masks that keep all are those of a network yet to be pruned."""
    return not all(bool(state[_key(layer, "mask")].all()) for layer in masked_layers(state))


def load_dense(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load parameters and buffers, but no masks."""
    check_architecture(model, state, path)
    model.load_state_dict({k: v for k, v in state.items() if not is_mask_key(k)}, strict=True)


def load_masks(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Take over the masks of ``state`` where it has any for the sparse layers of ``model``, and what they keep.

    The counts become the layers' targets: masks that were ranked over all layers differ from the uniform ones, and a
    method would otherwise draw weights at random until they do not.

    Raises:
        CheckpointError: a mask that does not fit the layer's pattern; ``path`` says where the state is from.
    """
    for name, layer in sparse_layers(model):
        mask = state.get(_key(name, "mask"))
        if mask is not None and mask.shape == layer.mask.shape:
            try:
                layer.set_mask(mask.to(layer.mask.device))
            except ValueError as error:
                raise CheckpointError(f"checkpoint {path}: layer {name!r}: {error}") from None
            layer.num_kept = layer.pattern.count(layer.mask)
