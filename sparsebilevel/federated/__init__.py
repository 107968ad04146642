"""Federated channel pruning with a sub-network for every device (DWNP, Gao et al. 2024)."""

from .flops import GateCosts, budget_penalty, parse_budgets
from .hypernetwork import Hypernetwork, merge_gates, open_threshold, sample_gates
from .models import (
    NORMS,
    GatePoint,
    StandardizedConv2d,
    apply_gates,
    find_gate_points,
    gate_sizes,
    layers_changed_by_slicing,
    set_norm,
    slice_gates,
)
from .rounds import METHODS, Federation, FederationError, Settings

__all__ = [
    "METHODS",
    "NORMS",
    "Federation",
    "FederationError",
    "GateCosts",
    "GatePoint",
    "Hypernetwork",
    "Settings",
    "StandardizedConv2d",
    "apply_gates",
    "budget_penalty",
    "find_gate_points",
    "gate_sizes",
    "layers_changed_by_slicing",
    "merge_gates",
    "open_threshold",
    "parse_budgets",
    "sample_gates",
    "set_norm",
    "slice_gates",
]
