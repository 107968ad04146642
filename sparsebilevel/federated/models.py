"""Which channels of a network have gates: finding them, closing them in a forward pass, and cutting them out.

A gate stands after the normalization and activation of a convolution whose output only the next convolution of the same
block reads. So block outputs, the stem, shortcuts and the classifier keep their channels, as in DWNP (Gao et al. 2024,
section 3.3).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_whole
from .._slicing import cut_channels
from ..models import create_model
from ..nn import sparsify
from ..training.checkpoint import CheckpointError, check_architecture, load_checkpoint, masked_layers

NORMS = ("batch", "group")


# -- normalization -----------------------------------------------------------------------------------------------------


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and standard deviation 1 (Qiao et al. 2019, weight standardization).

    A filter of a single weight, as a 1x1 convolution has that slicing left one input channel, is taken as it is: it has
    no standard deviation, and without its mean it would be 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight[0].numel() == 1:
            return super().forward(input)
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        return self._conv_forward(input, weight / std, self.bias)


def set_norm(model: nn.Module, norm: str = "group", standardize: bool = True) -> nn.Module:
    """Give a dense network the normalization of federated training, in place.

    The statistics of batch normalization differ too much between clients whose classes differ. DWNP's code has
    ``GroupNorm(1, C)`` in its place, over all channels and positions of a sample, with scales that start at 0.5, and
    standardized weights in the convolutions of its ResNets.

    Args:
        model: with ``nn.BatchNorm2d``; its convolutions keep their weights.
        norm: ``group``, or ``batch`` to leave the network as it is.
        standardize: with ``group``: also standardize the weights of all convolutions that are not depth-wise.

    Returns:
        The same model.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not known; allowed: {', '.join(NORMS)}")
    for module in list(model.modules()) if norm == "group" else ():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                group = nn.GroupNorm(1, child.num_features, child.eps)
                nn.init.constant_(group.weight, 0.5)
                setattr(module, name, group.to(child.weight))
            elif standardize and type(child) is nn.Conv2d and child.groups == 1:
                child.__class__ = StandardizedConv2d
    return model


# -- gate points -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatePoint:
    """Channels that are opened and closed together, by the names of the modules that have them.

    Attributes:
        name: of the block, for reports.
        producer: convolution that puts them out.
        channelwise: what treats each of them by itself on the way: normalization and depth-wise convolutions.
        consumer: the only convolution that reads them.
    """

    name: str
    producer: str
    channelwise: tuple[str, ...]
    consumer: str


def find_gate_points(model: nn.Module) -> list[GatePoint]:
    """The gate points of a network of residual blocks, in the order of its layers.

    A block is a module with ``conv1``, ``conv2``, ... and ``bn1``, ``bn2``, ... and a ``shortcut`` or ``downsample``:
    those of this package and torchvision's ResNets. Its last convolution gives the block's output, which is not gated.
    The channels before and after a depth-wise convolution share a gate, as in DWNP's MobileNet-v2.

    Raises:
        ValueError: there is no such block; then give `GatePoint` objects of your own.
    """
    points: list[GatePoint] = []
    for block, module in model.named_modules():
        if not (hasattr(module, "shortcut") or hasattr(module, "downsample")):
            continue
        convolutions = [name for name, child in module.named_children() if _is_numbered(name, "conv", child)]
        producer, between = "", list[str]()
        for name in convolutions:
            child: Any = getattr(module, name)
            full = f"{block}.{name}".lstrip(".")
            norm = f"bn{name.removeprefix('conv')}"
            norms = [f"{block}.{norm}".lstrip(".")] if isinstance(getattr(module, norm, None), nn.Module) else []
            if producer and child.groups == child.in_channels == child.out_channels:
                between += [full, *norms]
                continue
            if producer:
                several = sum(point.name.partition(":")[0] == block for point in points)
                points.append(GatePoint(f"{block}:{several + 1}" if several else block, producer, tuple(between), full))
            producer, between = full, norms
    if not points:
        raise ValueError(
            f"{type(model).__name__} has no residual blocks whose channels could be gated; choose a ResNet or "
            "MobileNet-v2, or give GatePoint objects"
        )
    return points


def _is_numbered(name: str, stem: str, child: nn.Module) -> bool:
    return name.startswith(stem) and name.removeprefix(stem).isdigit() and isinstance(child, nn.Conv2d)


def gate_sizes(model: nn.Module, points: Sequence[GatePoint]) -> list[int]:
    """Channels of every gate point; a vector of all gates has their sum of entries, in this order."""
    return [_layer(model, point.producer).out_channels for point in points]


def _layer(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


@contextlib.contextmanager
def apply_gates(model: nn.Module, points: Sequence[GatePoint], gates: Tensor) -> Iterator[None]:
    """Inside of it, the model's forward passes multiply the gated channels by their gates.

    Each convolution that reads them, depth-wise ones too, gets its input multiplied; so a gate is after the activation,
    whatever that is. Gradients reach ``gates``.

    Args:
        model, points: a network and its gate points.
        gates: floating ``[G]``, G the sum of `gate_sizes`.
    """
    sizes = gate_sizes(model, points)
    if gates.shape != (sum(sizes),):
        raise ValueError(f"gates of shape {list(gates.shape)} do not fit; expected [{sum(sizes)}]")

    def multiply(by: Tensor) -> Callable[..., Any]:
        return lambda _module, args: (args[0] * by.view(1, -1, 1, 1), *args[1:])

    handles = []
    try:
        for point, gate in zip(points, gates.split(sizes), strict=True):
            readers = [name for name in point.channelwise if is_depthwise(_layer(model, name))]
            for name in (*readers, point.consumer):
                handles.append(_layer(model, name).register_forward_pre_hook(multiply(gate)))
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- slicing -----------------------------------------------------------------------------------------------------------


def layers_changed_by_slicing(model: nn.Module, points: Sequence[GatePoint]) -> dict[str, str]:
    """Layers that compute something else once closed channels are cut out, and why; empty if none.

    With batch normalization, or one group a channel, a network with closed gates and its sliced copy are the same
    function. Statistics over several channels are not those of the channels that stay; fine-tuning makes up for it.
    """
    changed = {}
    for point in points:
        for name in point.channelwise:
            norm = _layer(model, name)
            if isinstance(norm, nn.GroupNorm) and norm.num_groups < norm.num_channels:
                changed[name] = "its statistics are over channels that were cut out too"
        if isinstance(_layer(model, point.consumer), StandardizedConv2d):
            changed[point.consumer] = "its filters are standardized over inputs that were cut out too"
    return changed


@torch.no_grad()
def slice_gates(model: nn.Module, points: Sequence[GatePoint], is_open: Tensor) -> nn.Module:
    """A copy of the network without the channels whose gates are closed.

    The gate points have the same names in it. `layers_changed_by_slicing` says whether it is the same function.

    Args:
        model, points: a network and its gate points.
        is_open: bool ``[G]``, which channels stay; at least one of each gate point.

    Returns:
        A smaller network of the same classes, on the same device.

    Raises:
        ValueError: a shape that does not fit, a gate point without an open gate, or a normalization in several groups,
            which would not fit the channels that stay.
    """
    sizes = gate_sizes(model, points)
    if is_open.dtype != torch.bool or is_open.shape != (sum(sizes),):
        raise ValueError(f"is_open: got {is_open.dtype} {list(is_open.shape)}, expected torch.bool [{sum(sizes)}]")
    small = copy.deepcopy(model)
    for point, keep in zip(points, is_open.split(sizes), strict=True):
        if not keep.any():
            raise ValueError(f"is_open closes all channels of {point.name!r}; at least one must stay")
        producer, consumer = _layer(small, point.producer), _layer(small, point.consumer)
        producer.weight = _cut(producer.weight, keep, 0)
        producer.bias = None if producer.bias is None else _cut(producer.bias, keep, 0)
        producer.out_channels = int(keep.sum())
        for name in point.channelwise:
            layer = _layer(small, name)
            if isinstance(layer, nn.GroupNorm):
                if layer.num_groups not in (1, layer.num_channels):
                    raise ValueError(f"{name!r} has {layer.num_groups} groups; only 1, or one a channel, can be sliced")
                layer.num_groups = 1 if layer.num_groups == 1 else int(keep.sum())
            cut_channels(layer, keep)
        consumer.weight = _cut(consumer.weight, keep, 1)
        consumer.in_channels = int(keep.sum())
    return small


def _cut(parameter: nn.Parameter, keep: Tensor, dim: int) -> nn.Parameter:
    positions = keep.nonzero().flatten().to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, positions), requires_grad=parameter.requires_grad)


@torch.no_grad()
def check_gate_points(model: nn.Module, points: Sequence[GatePoint], input_shape: Sequence[int]) -> None:
    """Raise ValueError if channels of a gate point cannot be cut out: by running the network without one of each.

    Where slicing changes no layer (`layers_changed_by_slicing`), the result must be that of the closed gate, too.

    Args:
        model, points: a network and its gate points.
        input_shape: (C, H, W) of one sample.
    """
    producers = [point.producer for point in points]
    if twice := sorted({name for name in producers if producers.count(name) > 1}):
        raise ValueError(f"points has {', '.join(map(repr, twice))} as producer more than once; a channel has one gate")
    sizes, start = gate_sizes(model, points), 0
    exact = not layers_changed_by_slicing(model, points)
    weight = next(model.parameters())
    twin = copy.deepcopy(model).eval()
    x = torch.randn((1, *input_shape), generator=torch.Generator().manual_seed(0)).to(weight)
    for i, (point, size) in enumerate(zip(points, sizes, strict=True)):
        gates = torch.ones(sum(sizes), dtype=torch.bool)
        gates[start] = size == 1  # a last channel stays
        start += size
        what = f"points[{i}] ({point.name!r}: {point.producer!r} to {point.consumer!r})"
        try:
            sliced = slice_gates(twin, points, gates)(x)
        except (RuntimeError, AttributeError, ValueError, IndexError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{what}: the network does not run without one of its channels: {why}") from error
        if exact:
            with apply_gates(twin, points, gates.to(weight)):
                closed = twin(x)
            if not torch.allclose(sliced, closed, rtol=1e-3, atol=1e-3 * float(closed.abs().max())):
                raise ValueError(
                    f"{what}: without a channel the network computes something else than with its gate closed"
                )


def forward_positions(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Output positions (height times width) of every convolution, of all its calls for one sample ``(C, H, W)``."""
    positions: dict[str, int] = {}
    twin = copy.deepcopy(model).eval()

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            positions[name] = positions.get(name, 0) + output.shape[2] * output.shape[3]

        return hook

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        weight = next(twin.parameters())
        twin(torch.zeros((1, *input_shape), dtype=weight.dtype, device=weight.device))
    return positions


# -- what a run leaves -------------------------------------------------------------------------------------------------


def load_network(source: str | os.PathLike[str], client: int | None = None) -> nn.Module:
    """The network that a run of ``sparsebilevel federated`` has left, on the CPU, in evaluation mode.

    Args:
        source: the folder of a method in that of the run, or its ``model.pth``.
        client: a device, for the smaller network of its own; None for the server's.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or not such a file; no such client.
    """
    path = Path(source)
    path = path / "model.pth" if path.is_dir() else path
    saved = load_checkpoint(path)
    if "norm" not in saved or "features" not in saved:
        raise CheckpointError(f"{path} has no 'norm' or 'features'; expected model.pth of a federated run")
    model = create_model(saved["arch"], saved["num_classes"], saved["features"])
    set_norm(model, saved["norm"], saved["standardize"])
    gates = saved.get("device_gates")
    clients = saved["clients"]
    if client is not None:
        check_whole("client", client, 0, clients - 1)
    points = [] if gates is None else find_gate_points(model)
    if gates is not None:
        model = slice_gates(model, points, saved["server_gates"])
    state: dict[str, Tensor] = saved["model"]
    check_architecture(model, state, path)
    if sparse := masked_layers(state):
        sparsify(model, 0.0, include=sparse, init="dense")
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith(".mask_scores")})
    if client is not None and gates is not None:
        model = slice_gates(model, points, gates[client][saved["server_gates"]])
    return model.eval()
