"""What server and devices agree on. All of it follows from the run's configuration, see pyproject.toml."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsebilevel.data import load_data
from sparsebilevel.data.partition import matching_partition, partition
from sparsebilevel.federated import (
    Clients,
    GatePoint,
    Hypernetwork,
    Settings,
    find_gate_points,
    parse_budgets,
    set_norm,
)
from sparsebilevel.federated.rounds import make_hypernetwork
from sparsebilevel.models import create_model

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}


class Task(NamedTuple):
    model: nn.Module
    points: list[GatePoint]
    input_shape: tuple[int, int, int]
    hypernetwork: Hypernetwork | None
    budgets: list[float]
    settings: Settings


def make_task(config: Mapping[str, Any]) -> Task:
    """The networks at the start, the budgets of the devices, and how to run."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    given = {name.replace("-", "_"): value for name, value in config.items()}
    settings = Settings(**{name: value for name, value in given.items() if name in fields})
    clients, shape = given["clients"], SHAPES[given["data"]]
    torch.manual_seed(settings.seed)
    model = create_model(given["arch"], 100 if given["data"] == "cifar100" else 10, shape[0])
    standardize = not given["arch"].startswith("mobilenet") and not settings.unstructured
    model = set_norm(model, "group", standardize=standardize)
    points = find_gate_points(model)
    budgets = parse_budgets("device-flops", given["device_flops"], clients, settings.seed)
    return Task(model, points, shape, make_hypernetwork(model, points, clients, settings), budgets, settings)


def make_clients(config: Mapping[str, Any], data_path: str = ".data") -> Clients:
    """The devices, made once in a process. Here everybody has all data, and looks at its own part only.

    A device with data of its own makes a `Data` of them, and gives its own positions as part, and one sample as that of
    each of the others.
    """
    return _make_clients(tuple(sorted(config.items())), data_path)


@functools.cache
def _make_clients(items: tuple[tuple[str, Any], ...], data_path: str) -> Clients:
    config = dict(items)
    task = make_task(config)
    seed, clients = task.settings.seed, config["clients"]
    data = load_data(config["data"], data_path, batch_size=task.settings.batch_size, eval_batch_size=250, seed=seed)
    labels = data.train.labels
    parts = partition(labels, clients, "dirichlet", alpha=config["alpha"], balance=True, seed=seed)
    tests = matching_partition(labels, parts, data.test.labels, seed)
    return Clients(task.model, task.points, data, parts, tests, task.budgets, task.settings, task.hypernetwork)
