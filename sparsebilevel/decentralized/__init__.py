"""Decentralized bi-level pruning: workers on a graph learn one sparse model by talking to their neighbours only."""

from .algorithms import ALGORITHMS, Decentralized, Settings
from .estimators import ESTIMATORS, Estimator
from .gossip import Gossip, consensus_error
from .graphs import GRAPHS, Topology, make_topology
from .tasks import Objective, Problem, Samples, make_problem, partition
from .tracking import TrackedStep

__all__ = [
    "ALGORITHMS",
    "ESTIMATORS",
    "GRAPHS",
    "Decentralized",
    "Estimator",
    "Gossip",
    "Objective",
    "Problem",
    "Samples",
    "Settings",
    "Topology",
    "TrackedStep",
    "consensus_error",
    "make_problem",
    "make_topology",
    "partition",
]
