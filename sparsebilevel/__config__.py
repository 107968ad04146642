"""What was built, what is installed, and what each part needs: ``python -m sparsebilevel.__config__``."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from typing import Any

import numpy
import torch

from . import __version__
from .kernels import cuda as cuda_kernels
from .kernels import native

# Optional packages: (package, its extra or None, what it is for).
_OPTIONAL = (
    ("torchvision", "vision", "image models and data sets"),
    ("tensorboard", "log", "TensorBoard logs"),
    ("tqdm", "log", "progress bars"),
    ("matplotlib", "report", "plots"),
    ("flwr", "flower", "federated training with Flower"),
    ("safetensors", "export", "safetensors export"),
    ("onnx", "export", "ONNX export"),
    ("onnxscript", "export", "ONNX export"),
    ("triton", None, "Triton kernels; comes with the CUDA builds of torch"),
)


def info() -> dict[str, Any]:
    """The facts that `show` prints, as plain values that `json` can write.

    Keys: ``sparsebilevel``, ``python``, ``platform``, ``torch``, ``numpy`` (versions); ``extension`` (``loaded``,
    ``reason`` and, if loaded, ``compiler``, ``flags``, ``nvcc``, ``isa_compiled``, ``isa_cpu``, ``isa_used``);
    ``threads`` (of torch, passed to the kernels; and OpenMP's default); ``cuda`` (torch's CUDA version, the device, the
    library of ``kernels``: ``"loaded"``, or why not);
    ``optional`` (package -> ``version`` or None, ``extra``, ``purpose``).
    """
    cuda = torch.cuda.is_available()
    return {
        "sparsebilevel": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "extension": _extension(),
        "threads": {
            "torch": torch.get_num_threads(),
            "openmp": native.lib.openmp_max_threads() if native.available() else None,
        },
        "cuda": {
            "torch": torch.version.cuda,
            "device": torch.cuda.get_device_name() if cuda else None,
            "kernels": cuda_kernels.load()[1],
        },
        "optional": {
            package: {"version": _version(package), "extra": extra, "purpose": purpose}
            for package, extra, purpose in _OPTIONAL
        },
    }


def show() -> None:
    """Print `info` for people."""
    facts = info()
    rows = [(name, facts[name]) for name in ("sparsebilevel", "python", "platform", "torch", "numpy")]

    extension = facts["extension"]
    if extension["loaded"]:
        isa = f"{extension['isa_used']} (compiled: {', '.join(extension['isa_compiled'])}; CPU: {extension['isa_cpu']})"
        rows += [("C++ extension", "loaded"), ("  compiler", extension["compiler"]), ("  flags", extension["flags"])]
        rows += [("  instruction set", isa), ("  nvcc at build", extension["nvcc"] or "not found or switched off")]
    else:
        advice = "; needs a C++ compiler at installation" if extension["reason"] == "it was not built" else ""
        rows += [("C++ extension", f"missing: {extension['reason']}{advice}")]

    threads, cuda = facts["threads"], facts["cuda"]
    rows += [("threads", f"{threads['torch']} (OpenMP default: {threads['openmp'] or 'unknown'})")]
    rows += [("CUDA", f"torch {cuda['torch'] or 'without CUDA'}, device: {cuda['device'] or 'none'}")]
    rows += [("  kernels", cuda["kernels"])]
    for package, optional in facts["optional"].items():
        needed = (
            f"`pip install 'sparsebilevel[{optional['extra']}]'`" if optional["extra"] else f"`pip install {package}`"
        )
        version = optional["version"] or f"missing: {needed}"
        rows += [(package, f"{version}  ({optional['purpose']})")]

    rows += [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("SPARSEBILEVEL_")]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _extension() -> dict[str, Any]:
    if not native.available():
        return {"loaded": False, "reason": native.reason}
    build = json.loads(native.lib.build_info)
    return {
        "loaded": True,
        "reason": native.reason,
        "compiler": build["compiler"],
        "flags": build["flags"],
        "nvcc": build["nvcc"],
        "isa_compiled": build["isa"],
        "isa_cpu": native.lib.cpu_isa().name,
        "isa_used": native.lib.isa().name,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    show()
