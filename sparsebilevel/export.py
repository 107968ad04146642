"""Trained networks for use elsewhere: plain PyTorch, safetensors, ONNX, physically smaller, or 2:4 for tensor cores.

============  =========================================================================================================
format        what is written
============  =========================================================================================================
dense         state dict (``torch.save``) of the original dense model, zeros in place of what the masks hide
safetensors   the same in a .safetensors file
onnx          an ONNX program of the densified model; input ``input`` [batch, C, H, W], output ``logits``
sliced        a smaller network that computes the same, from filter or channel masks; read it with `load_sliced`
2:4           state dict in half precision whose linear weights are packed by ``torch.sparse``, written on the GPU
============  =========================================================================================================
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ._checks import check_shape
from ._slicing import slice_model
from .federated import load_network as load_federated
from .masks import NM
from .nn import densify, sparsify
from .training.build import create_network
from .training.checkpoint import (
    CheckpointError,
    check_architecture,
    is_mask_key,
    load_checkpoint,
    load_masks,
    masked_layers,
    naming,
    network_state,
)
from .training.config import Config

__all__ = ["FORMATS", "export_model", "load_network", "load_sliced", "slice_model", "to_semi_structured"]

_IMAGE_SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
_BY_SUFFIX = {".pth": "dense", ".pt": "dense", ".safetensors": "safetensors", ".onnx": "onnx"}
_IMAGE_SIZES = {"imagefolder": 224, "fake": 32}  # unless the run says another


def export_model(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    format: str | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    client: int | None = None,
) -> Path:
    """Write the network of a run in another format; averaged weights (EMA) if the run kept any.

    Args:
        source: folder of a run, or one of its checkpoints (``best.pth``); of a federated run the folder of a method.
        output: file to write, whose suffix is that of the format: ``.safetensors``, ``.onnx``, or ``.pth`` or ``.pt``
            for all others. Its folder is made. An existing one is replaced, and only by a complete one.
        format: one of ``FORMATS``; see the module's documentation. None goes by the suffix, and ``.pth`` and ``.pt``
            are ``dense``.
        input_shape: (C, H, W) of one sample, for ``onnx`` and ``sliced``; by default that of the run's data.
        client: of a federated run, the device whose smaller network is written; None for the server's. Its state dict
            fits what :func:`sparsebilevel.federated.load_network` gives for that client.

    Returns:
        ``output`` as a path.

    Raises:
        FileNotFoundError, ValueError: no such run or checkpoint, or damaged; unknown format, or a suffix that is not
            the format's; a model or device that the format does not suit.
        ImportError: ``safetensors`` and ``onnx`` need ``pip install 'sparsebilevel[export]'``.
    """
    output = Path(output)
    if input_shape is not None:
        check_shape("input_shape", input_shape, "(C, H, W) of one sample")
    if format is not None and format not in _WRITERS:
        raise ValueError(f"format={format!r} is not known; allowed: {', '.join(FORMATS)}")
    if output.is_dir():
        raise ValueError(f"output={str(output)!r} is not allowed; expected a file, and this is a folder")
    if format is None:
        _check_suffix(output, None)
        format = _BY_SUFFIX[output.suffix.lower()]
    path = _checkpoint_path(source)
    if output.resolve() == path.resolve():
        raise ValueError(f"output={str(output)!r} is the source itself; give another file")
    config: Mapping[str, Any] = (checkpoint := load_checkpoint(path))
    if "norm" in config and "features" in config:
        if format == "sliced":
            raise ValueError("format='sliced' is not allowed for a federated run, whose networks are cut already")
        model, shape = load_federated(path, client), input_shape or config.get("input_shape")
        if format == "onnx" and shape is None:
            raise ValueError("input_shape=None is not allowed for this run, which does not say it; expected (C, H, W)")
    elif client is not None:
        raise ValueError(f"client={client} is not allowed: {path} is not of a federated run")
    else:
        model, config = _network(checkpoint, path)
        shape = input_shape or input_shape_of(config)
    _check_suffix(output, format)
    output.parent.mkdir(parents=True, exist_ok=True)
    with naming(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        temporary = Path(folder) / output.name
        _WRITERS[format](model, config, torch.zeros(2, *(shape or ())), temporary)
        os.replace(temporary, output)
    return output


def _check_suffix(output: Path, format: str | None) -> None:
    """Refuse a name that says another format than it has, as who reads the file goes by it, or says none."""
    if format is None:
        allowed = tuple(_BY_SUFFIX)
    else:
        allowed = (f".{format}",) if format in ("safetensors", "onnx") else (".pth", ".pt")
    if output.suffix.lower() not in allowed:
        told = "" if format is None else f" with format={format!r}"
        names = f"a name that ends in {', '.join(allowed)}"
        raise ValueError(f"output={str(output)!r} is not allowed{told}; expected {names}")


# -- reading what a run has left ---------------------------------------------------------------------------------------


def load_network(source: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run on the CPU, with its sparse layers and masks, in evaluation mode; and the run's config.

    Args:
        source: folder of a run (its ``checkpoint.pth`` is read) or a checkpoint.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or of another architecture than its config says.
    """
    path = _checkpoint_path(source)
    return _network(load_checkpoint(path), path)


def _network(checkpoint: Mapping[str, Any], path: Path) -> tuple[nn.Module, dict[str, Any]]:
    if not isinstance(checkpoint.get("config"), Mapping):
        raise CheckpointError(f"checkpoint {path} has no 'config'; expected one that `sparsebilevel train` wrote")
    config = dict(checkpoint["config"])
    state = network_state(checkpoint)
    model = _create(config, state)
    check_architecture(model, state, path)
    if layers := masked_layers(state):
        by_layer = tuple(config.get("layer_pattern", ()))
        pattern = Config(pattern=config.get("pattern", "unstructured"), layer_pattern=by_layer).patterns()
        sparsity = float(pattern.sparsity) if isinstance(pattern, NM) else 0.0  # for now; the masks say it
        dense_first = config.get("dense_first", False)
        sparsify(model, sparsity, pattern=pattern, include=layers, dense_first=dense_first, init="dense")
        load_masks(model, state, path)
    model.load_state_dict(state)
    return model.eval(), config


def _checkpoint_path(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if not path.is_dir():
        return path
    if (path / "model.pth").exists():  # of a federated run, which has more in its checkpoint
        return path / "model.pth"
    found = sorted(file.parent.name for file in path.glob("*/model.pth"))
    if found and not (path / "checkpoint.pth").exists():
        raise ValueError(f"{path} is a folder of run folders; name one of them: {', '.join(found)}")
    return path / "checkpoint.pth"


def _create(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The dense model of a config; the last layer, and so the last value of ``state``, has an entry a class."""
    sizes = [len(value) for key, value in state.items() if value.dim() and not is_mask_key(key)]
    return create_network(config["arch"], sizes[-1], input_shape_of(config))


def input_shape_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    data = config["data"]
    if data in _IMAGE_SHAPES:
        return _IMAGE_SHAPES[data]
    size = config.get("image_size") or _IMAGE_SIZES[data]
    return (3, size, size)


# -- one writer a format -----------------------------------------------------------------------------------------------


def _save(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # which says why it cannot be written; torch's and safetensors' own writers do not
        torch.save(state, file)


def _write_dense(model: nn.Module, config: Mapping[str, Any], x: Tensor, path: Path) -> None:
    _save(densify(model).state_dict(), path)


def _write_safetensors(model: nn.Module, config: Mapping[str, Any], x: Tensor, path: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("format safetensors needs `pip install 'sparsebilevel[export]'`") from error
    # The format knows no shared memory: a tied weight is written under each of its names.
    state = {name: value.clone().contiguous() for name, value in densify(model).state_dict().items()}
    path.write_bytes(save(state, metadata={"format": "pt", "arch": str(config["arch"])}))


def _write_onnx(model: nn.Module, config: Mapping[str, Any], x: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("format onnx needs `pip install 'sparsebilevel[export]'`") from error
    with warnings.catch_warnings():  # deprecations inside the exporter
        warnings.simplefilter("ignore")
        torch.onnx.export(
            densify(model),
            (x,),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _write_sliced(model: nn.Module, config: Mapping[str, Any], x: Tensor, path: Path) -> None:
    _save({"config": dict(config), "model": slice_model(model, x).state_dict()}, path)


def _write_semi_structured(model: nn.Module, config: Mapping[str, Any], x: Tensor, path: Path) -> None:
    _save(to_semi_structured(model).state_dict(), path)


_WRITERS: dict[str, Callable[[nn.Module, Mapping[str, Any], Tensor, Path], None]] = {
    "dense": _write_dense,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "sliced": _write_sliced,
    "2:4": _write_semi_structured,
}
FORMATS = tuple(_WRITERS)


# -- smaller networks --------------------------------------------------------------------------------------------------


def load_sliced(path: str | os.PathLike[str]) -> nn.Module:
    """The smaller network that format ``sliced`` wrote, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or not of this format.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    if "config" not in checkpoint:
        raise CheckpointError(f"{path} has no 'config'; expected a file that `sparsebilevel export` wrote as 'sliced'")
    state = checkpoint["model"]
    if masked_layers(state):
        raise CheckpointError(f"{path} has masks; expected a file that `sparsebilevel export` wrote as 'sliced'")
    model = _create(checkpoint["config"], state)
    for name, module in model.named_modules():
        _resize(module, name, state)
    check_architecture(model, state, path)
    model.load_state_dict(state)
    return model.eval()


def _resize(module: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Give a layer the sizes that its tensors have in ``state``, which says all there is to know."""
    weight = state.get(f"{name}.weight".lstrip("."))
    if weight is None or not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
        return
    if isinstance(module, nn.Conv2d):
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = len(weight)
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.num_features = len(weight)
    prefix = f"{name}.".lstrip(".")
    for key, value in state.items():
        own, _, inner = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or inner:
            continue
        if own in module._buffers:
            module._buffers[own] = torch.empty_like(value)
        else:
            module.register_parameter(own, nn.Parameter(torch.empty_like(value)))


# -- 2:4 ---------------------------------------------------------------------------------------------------------------


def _is_two_of_four(weight: Tensor) -> bool:
    """At most two of every four consecutive inputs are non-zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.view(len(weight), -1, 4) != 0).sum(2).le(2).all())


def to_semi_structured(model: nn.Module, dtype: torch.dtype = torch.float16) -> nn.Module:
    """A copy on the GPU whose 2:4-sparse linear layers run on sparse tensor cores (``torch.sparse``).

    Torch packs linear layers alone; convolutions, and layers whose sizes its kernels do not take, stay dense.

    Args:
        model: sparse or dense; its 2:4 weights are found by their values.
        dtype: float16 or bfloat16; the whole copy has it.

    Raises:
        ValueError: no linear layer has a 2:4 weight, or none has sizes that torch can pack.
        ValueError: no GPU with sparse tensor cores (compute capability 8.0 or later).
    """
    dense = densify(model)
    fitting = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear) and _is_two_of_four(m.weight)}
    if not fitting:
        raise ValueError(
            "format 2:4 needs linear layers with at most 2 non-zeros in every 4 consecutive inputs, and the model has "
            "none; train it with pattern nm:2:4 (torch packs no convolutions)"
        )
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is None or capability < (8, 0):
        here = "there is none" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        raise ValueError(f"format 2:4 needs an NVIDIA GPU of compute capability 8.0 or later; {here}")
    dense = dense.to("cuda", dtype).eval()
    refused = {}
    for name, module in fitting.items():
        try:
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
        except (RuntimeError, ValueError) as error:
            refused[name] = f"{name} {list(module.weight.shape)}: {error}"
    if len(refused) == len(fitting):
        raise ValueError(f"torch can pack none of the 2:4 layers: {'; '.join(refused.values())}")
    if refused:
        warnings.warn(f"these layers stay dense: {'; '.join(refused.values())}", stacklevel=2)
    return dense
