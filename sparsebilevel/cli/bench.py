"""``sparsebilevel bench``: what a sparse network costs in time, layer by layer, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import SparseMaskedConv2d, Static, sparse_layers, sparsify
from .._checks import LARGEST_WHOLE, check_whole
from ..costs import measure_layers, measure_step, tune_layers
from ..export import input_shape_of, load_network
from ..kernels import measurements, native
from ..training.build import check_runs, create_network
from ..training.config import MOST_THREADS
from ..training.runtime import choose_device

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIZES = {
    "digits_cnn": (1, 8),
    "mlp": (1, 8),
}  # channels, height and width; 3 x 32 x 32 for what is named "cifar" or ours


def bench(
    model: str,
    sparsity: float | None = None,
    distribution: str | None = None,
    pattern: str | None = None,
    batch_size: int = 64,
    image_size: int | None = None,
    num_classes: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    tune: str | None = None,
) -> dict[str, float]:
    """Print the layer table with measured times, and the time of a whole training step, which is returned.

    The step runs dense, with sparse layers and, where that works, as ``optimize_for_cpu`` rewrites the network.

    Args:
        model: a name (then the masks are random, at ``sparsity``) or the folder of a run (then they are its own).
        sparsity, distribution, pattern, num_classes: of a named model; by default 0.9, uniform, unstructured and 10.
        batch_size: images in a batch.
        image_size: their height and width, of a named model; by default what it was made for.
        device, threads: where to measure.
        tune: fp32, bf16 or fp16: on a GPU, measure first which kernels suit the layers when they compute in that type,
            and keep the times (:func:`~sparsebilevel.costs.tune_layers`).
    """
    sizes = {"batch_size": batch_size, "image_size": image_size, "num_classes": num_classes, "threads": threads}
    for name, value in sizes.items():
        if value is not None:
            check_whole(name, value, 1, MOST_THREADS if name == "threads" else LARGEST_WHOLE)
    if tune is not None and tune not in _TYPES:
        raise ValueError(f"tune={tune!r} is not known; allowed: {', '.join(_TYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device)
    if Path(model, "config.json").exists():
        asked = {"sparsity": sparsity, "distribution": distribution, "pattern": pattern, **sizes}
        for name in ("sparsity", "distribution", "pattern", "image_size", "num_classes"):
            if asked[name] is not None:
                raise ValueError(f"{name}={asked[name]!r} is not allowed with a run, which has its own: {model}")
        network, shape, num_classes = _from_run(Path(model))
    else:
        num_classes = 10 if num_classes is None else num_classes
        network, shape = _from_name(model, num_classes, image_size)
        share = 0.9 if sparsity is None else sparsity
        sparsify(network, share, distribution or "uniform", pattern or "unstructured", seed=0)
    network.to(place)
    masks = Static(network)
    x = torch.randn(batch_size, *shape, device=place)
    if tune is not None:
        if len(shape) == 3:  # as the kernels for convolutions want both
            last: dict[str, Any] = {"memory_format": torch.channels_last}
            network.to(**last)
            x = x.contiguous(**last)
        found = tune_layers(network, x, _TYPES[tune])
        print(f"{len(found)} products measured; {measurements.path()}")
    measure_layers(network, x)
    print(masks)
    times = measure_step(network, (batch_size, *shape), num_classes, in_layout=_has_layout(network, place))
    where = (
        f"{place.type}, {torch.get_num_threads()} threads" if place.type == "cpu" else torch.cuda.get_device_name(place)
    )
    line = f"training step, batch {batch_size}, {where}: dense {times['dense_ms']:.2f} ms; "
    line += f"sparse layers {times['sparse_ms']:.2f} ms, {times['ratio']:.2f}x"
    if "in_layout_ms" in times:
        line += f"; optimize_for_cpu {times['in_layout_ms']:.2f} ms, {times['in_layout_ratio']:.2f}x"
    print(line)
    return times


def _has_layout(network: torch.nn.Module, place: torch.device) -> bool:
    """Whether ``optimize_for_cpu`` has something to do."""
    is_usable = place.type == "cpu" and native.available()
    return is_usable and any(isinstance(layer, SparseMaskedConv2d) for _, layer in sparse_layers(network))


def _from_name(name: str, num_classes: int, image_size: int | None) -> tuple[torch.nn.Module, tuple[int, ...]]:
    from ..models import list_models

    channels, size = _SIZES.get(name, (3, 32 if name in list_models() else 224))
    size = image_size or size
    network = create_network(name, num_classes, (channels, size, size))
    wanted = getattr(network, "image_size", None)  # which vision transformers have
    if wanted not in (size, None):
        raise ValueError(f"image_size={size} is not allowed; {name} takes images of {wanted}x{wanted} only")
    check_runs(network, name, (channels, size, size))
    return network, (channels, size, size)


def _from_run(run: Path) -> tuple[torch.nn.Module, tuple[int, ...], int]:
    network, config = load_network(run)
    if not any(True for _ in sparse_layers(network)):
        raise ValueError(f"the run in {run} has no masks; give the name of its model, {config['arch']}, and --sparsity")
    shape = input_shape_of(config)
    with torch.no_grad():
        classes = network(torch.zeros(1, *shape)).shape[1]
    return network, shape, classes
