"""What a training run needs of its surroundings: ranks, signals, the device and its random numbers."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import is_mask_key


class Interrupted(Exception):
    """A signal ended the run after a checkpoint was written; ``exit_code`` is the customary 128 + signal."""

    def __init__(self, signum: int, folder: Path, step: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"{name}: stopped after step {step}; a checkpoint is in {folder}, --resume continues")
        self.exit_code = 128 + signum


class StopSignals:
    """Notes SIGTERM and SIGINT for the loop, which looks after each step. A second signal acts at once."""

    def __init__(self) -> None:
        self.signal = 0  # its number, or 0 for none yet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self.signal = signum
        signal.signal(signum, self._before[signum])

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and the few things they tell each other."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks; ``values`` stays as it is."""
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest value of all ranks."""
        if self.world == 1:
            return value
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def share_statistics(self, model: nn.Module) -> None:
        """Rank 0's statistics of normalization layers for all: each rank has updated them with batches of its own."""
        for name, buffer in model.named_buffers():
            if self.world > 1 and buffer.is_floating_point() and not is_mask_key(name):
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started (nccl on CUDA, gloo else), or this one alone."""
    chosen = choose_device(device)
    owns = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if chosen.type == "cuda" and chosen.index is None:  # set_device takes an index only
        index = int(os.environ.get("LOCAL_RANK", 0)) if owns else torch.cuda.current_device()
        chosen = torch.device("cuda", index)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if owns:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        joined = dist.is_available() and dist.is_initialized()
        yield Ranks(chosen, dist.get_rank(), dist.get_world_size()) if joined else Ranks(chosen)
    finally:
        if owns:
            gc.collect()  # DDP's reducers sit in reference cycles, and must not outlive their group
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is not known; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not allowed; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: this torch finds no CUDA device")
    return device


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Continue from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """What is drawn inside from torch's global generators follows from the seed; they go on as if nothing was drawn."""
    state = rng_state(device)  # fork_rng takes five times as long
    try:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        set_rng_state(device, state)
