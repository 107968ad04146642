"""Dense networks by name: the CIFAR and digits networks of the sparse-training literature, and all of torchvision's.

They are plain PyTorch modules without any sparse code; `sparsebilevel.sparsify` works on them as on any other module.
Their parameter and multiply-add counts are checked by the tests, because names such as "ResNet-32" mean different
networks in different papers: `resnet32` is He et al.'s (0.46 M parameters), `resnet32x2` the doubled one (1.86 M) of
the GraSP, MEST and BiDST papers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from .._torchvision import import_torchvision
from .mobilenet import mobilenet_v2_cifar, mobilenet_v2_dwnp
from .resnet import resnet18_cifar, resnet34_cifar, resnet_cifar
from .small import digits_cnn, mlp
from .vgg import vgg19_bn_cifar

__all__ = ["create_model", "list_models"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet_cifar, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}_b": partial(resnet_cifar, depth, shortcut="B") for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet32x2": partial(resnet_cifar, 32, shortcut="B", width=32),
    "resnet18_cifar": resnet18_cifar,
    "resnet34_cifar": resnet34_cifar,
    "vgg19_bn_cifar": vgg19_bn_cifar,
    "mobilenet_v2_cifar": mobilenet_v2_cifar,
    "mobilenet_v2_dwnp": mobilenet_v2_dwnp,
    "digits_cnn": digits_cnn,
    "mlp": mlp,
}


def list_models() -> list[str]:
    """The names of this package's own models; `create_model` takes torchvision's classification models too."""
    return list(_MODELS)


def create_model(name: str, num_classes: int = 10, in_channels: int | None = None, **kwargs: Any) -> nn.Module:
    """Build the model called `name`, with random weights from the global generator of torch.

    Args:
        name: one of `list_models()`, or a torchvision classification model (`resnet50`, `mobilenet_v2`, ...).
        num_classes: size of the output.
        in_channels: channels of the input [N, in_channels, H, W]. By default 1 for `digits_cnn` and 3 for other
            convolutional networks; torchvision's accept only 3. For `mlp` the number of input features.
        **kwargs: further arguments of that model, such as `hidden=(300, 100)` for `mlp`.

    Raises:
        ValueError: unknown name (near matches are listed), or a count below 1.
        ImportError: `name` is not ours and torchvision is not installed.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}={value}: must be at least 1")
    if name in _MODELS:
        if in_channels is not None:
            kwargs["in_channels"] = in_channels
        return _MODELS[name](num_classes, **kwargs)

    try:
        torchvision = import_torchvision()
    except ImportError as error:
        raise ImportError(f"model {name!r} is not one of {', '.join(_MODELS)}, and {error}", name=error.name) from None
    known = _torchvision_models(torchvision)
    if name not in known:
        near = difflib.get_close_matches(name, [*_MODELS, *known], n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"ours are {', '.join(_MODELS)}"
        raise ValueError(f"unknown model {name!r}; {hint} (any torchvision classification model is accepted too)")
    if in_channels not in (None, 3):
        raise ValueError(f"in_channels={in_channels}: torchvision's {name} takes 3 channels")
    if name in ("googlenet", "inception_v3"):  # in training these give further outputs
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)


def _torchvision_models(torchvision: ModuleType) -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)
