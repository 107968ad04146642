"""Which kernel runs a masked op, and why: the only place that knows speeds."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

BACKENDS = ("dense",)


class Backend(NamedTuple):
    """A choice and the reason for it, as layers and the command line show it."""

    name: str
    reason: str


def choose_backend(
    op: str, weight_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, density: float
) -> Backend:
    """Backend for one op (``"masked_linear"`` or ``"masked_conv2d"``) on one layer.

    ``SPARSEBILEVEL_BACKEND`` forces a backend by name.

    Raises:
        ValueError: ``SPARSEBILEVEL_BACKEND`` names none.
    """
    forced = os.environ.get("SPARSEBILEVEL_BACKEND", "auto")
    if forced not in ("auto", *BACKENDS):
        raise ValueError(f"SPARSEBILEVEL_BACKEND={forced!r} is not known; allowed: auto, {', '.join(BACKENDS)}")
    if forced != "auto":
        return Backend(forced, "forced by SPARSEBILEVEL_BACKEND")
    library = "cuBLAS/cuDNN" if device.type == "cuda" else "oneDNN/BLAS"
    return Backend("dense", f"{library} on m*theta; no sparse kernel for {device.type} in this version")
