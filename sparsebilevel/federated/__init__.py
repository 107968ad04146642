"""Federated pruning: channels, with a sub-network for every device (DWNP, Gao et al. 2024), and single weights."""

from .client import Clients, LocalExchange
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
    load_network,
    set_norm,
    slice_gates,
)
from .rounds import Federation, FederationError, make_federation
from .settings import METHODS, UNSTRUCTURED, Settings

__all__ = [
    "METHODS",
    "NORMS",
    "UNSTRUCTURED",
    "Clients",
    "Federation",
    "FederationError",
    "GateCosts",
    "GatePoint",
    "Hypernetwork",
    "LocalExchange",
    "Settings",
    "StandardizedConv2d",
    "apply_gates",
    "budget_penalty",
    "find_gate_points",
    "gate_sizes",
    "layers_changed_by_slicing",
    "load_network",
    "make_federation",
    "merge_gates",
    "open_threshold",
    "parse_budgets",
    "sample_gates",
    "set_norm",
    "slice_gates",
]
