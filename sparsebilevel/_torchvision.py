"""One guarded way to import torchvision, which is optional and does not import beside every build of torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# Python code of torchvision refers to these operators even where the compiled extension that defines them did not load.
_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the definitions live as long as this object


def import_torchvision() -> ModuleType:
    """Import and return `torchvision`, with its models, datasets and transforms.

    A wheel built for another torch (the CUDA wheel beside a CPU torch, say) cannot load its compiled operators, and its
    import fails with "operator torchvision::nms does not exist" although models, datasets and transforms need no such
    operator. Then the missing operators are declared, without an implementation, and the import is repeated; calling
    one of them (box and region operators only) still fails.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _library
    if "torchvision" in sys.modules:  # maybe imported by the user, in their own way
        return sys.modules["torchvision"]
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":  # something that torchvision itself needs
            raise
        message = "torchvision is not installed; install it with `pip install sparsebilevel[vision]`"
        raise ImportError(message, name="torchvision") from None
    except RuntimeError as error:
        if _library is not None or "operator torchvision::" not in str(error):
            raise
    # Only now, since a healthy extension defines these operators itself and fails if they exist.
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _MISSING_SCHEMAS:
        _library.define(schema)
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]  # halves of the failed import
    return importlib.import_module("torchvision")
