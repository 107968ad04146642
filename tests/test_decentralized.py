"""Graphs, mixing, estimators and tracking, and the algorithms, in one process."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sparsebilevel.comm import CommunicationError, LocalCommunicator
from sparsebilevel.decentralized import gossip as gossip_module
from sparsebilevel.decentralized.estimators import ESTIMATORS, Estimator, mean_cost
from sparsebilevel.decentralized.gossip import Gossip, consensus_error
from sparsebilevel.decentralized.graphs import (
    GRAPHS,
    Topology,
    check_mixing_matrix,
    make_graph,
    make_topology,
    mixing_matrix,
)
from sparsebilevel.decentralized.tracking import TrackedStep
from sparsebilevel.kernels import pack


def mean(values):
    """Over the workers, without the rounding of a sum in float32."""
    return torch.stack([v.double() for v in values.values()]).mean(0)


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 9, 12, 16])
@pytest.mark.parametrize("name", [n for n in GRAPHS if n not in ("file", "one-peer")])
def test_every_graph_gives_a_mixing_matrix(name, size):
    topology = make_topology(name, size)
    (matrix,) = topology.matrices
    assert torch.equal(matrix, matrix.T)
    assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64))
    others = torch.linalg.eigvalsh(matrix)[:-1].abs()
    assert topology.gap == pytest.approx(1 - others.max().item() if size > 1 else 1)
    assert topology.gap > 0


def test_known_spectral_gaps():
    assert make_topology("ring", 8).gap == pytest.approx(0.195262, abs=1e-6)
    assert make_topology("ring", 16).gap == pytest.approx(1 - 0.949253, abs=1e-6)
    assert make_topology("complete", 5).gap == pytest.approx(1)
    assert make_topology("ring", 1).gap == make_topology("ring", 2).gap == 1
    lazy = mixing_matrix(make_graph("ring", 8), "lazy")
    assert torch.linalg.eigvalsh(lazy).min() >= 0


def test_one_peer_reaches_the_mean_after_a_turn():
    topology = make_topology("one-peer", 8)
    assert len(topology.matrices) == 3
    assert topology.gap == 1
    assert all(len(topology.weights(k, t)) == 1 for k in range(8) for t in range(3))
    values = {k: torch.tensor([float(k)], dtype=torch.float64) for k in range(8)}
    gossip = Gossip(LocalCommunicator(8), topology, steps=3)
    assert consensus_error(gossip.mix(values, "x")) < 1e-12


def test_graph_from_file(tmp_path):
    path = tmp_path / "edges.json"
    path.write_text(json.dumps([[0, 1], [1, 2]]))
    assert torch.equal(make_graph("file", 3, path=str(path)), make_graph("path", 3))
    with pytest.raises(ValueError, match="not connected"):
        make_graph("file", 4, path=str(path))
    with pytest.raises(ValueError, match="outside 0..1"):
        make_graph("file", 2, path=str(path))
    for text in ("{}3", "[[0, 0.9]]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no list of edges"):
            make_graph("file", 2, path=str(path))
    for name in ("ring", "one-peer"):
        with pytest.raises(ValueError, match=f"graph='{name}' reads no edges from .*expected graph='file'"):
            make_topology(name, 2, path=str(path))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make_graph("rings", 3), "graph='rings' is not known"),
        (lambda: make_graph("ring", 0), "size=0"),
        (lambda: make_graph("ring", 2.5), "size=2.5 is not allowed; expected a whole number, at least 1"),
        (lambda: Gossip(LocalCommunicator(3), make_topology("ring", 3), steps=1.5), "steps=1.5 is not allowed"),
        (lambda: make_graph("one-peer", 6), "power of two"),
        (lambda: make_graph("erdos-renyi", 4, probability=0), "probability=0"),
        (lambda: mixing_matrix(make_graph("ring", 3), "max"), "weights='max'"),
        (lambda: check_mixing_matrix(torch.tensor([[0.5, 0.5], [0.4, 0.6]])), "not symmetric"),
        (lambda: check_mixing_matrix(torch.eye(2) * 0.9), "row 0 sums to 0.89999"),
        (lambda: check_mixing_matrix(torch.tensor([[1.5, -0.5], [-0.5, 1.5]])), "not negative"),
        (lambda: check_mixing_matrix(torch.ones(2, 3)), r"\[K, K\]"),
        (lambda: make_topology("path", 3, matrix=torch.full((3, 3), 1 / 3)), r"\[0, 2\] is not an edge"),
        (lambda: Topology(torch.eye(3)), "not connected"),
        (lambda: Topology(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), "spectral gap of 0.0e.*lazy"),
        (lambda: Topology(mixing_matrix(make_graph("ring", 4)) * 1.5 - 0.5 * torch.eye(4)), "spectral gap"),
    ],
)
def test_bad_graphs_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -- mixing ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 9), numel=st.integers(0, 40), masked=st.booleans(), seed=st.integers(0, 99))
def test_mixing_keeps_the_mean_and_brings_workers_together(size, numel, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    values = {k: torch.randn(numel, generator=generator) for k in range(size)}
    masks = {k: torch.rand(numel, generator=generator) < 0.6 for k in range(size)} if masked else None
    gossip = Gossip(LocalCommunicator(size), make_topology("ring", size))
    once = gossip.mix(values, "x", masks)
    twice = gossip.mix(once, "x", masks)  # positions are known by now
    assert_close(mean(twice), mean(values), rtol=1e-5, atol=1e-5)
    assert consensus_error(twice) <= consensus_error(values) + 1e-6
    for k in range(size if masked else 0):
        assert torch.equal(twice[k][~masks[k]], values[k][~masks[k]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_is_multiplication_by_the_matrix(dtype):
    topology = make_topology("erdos-renyi", 6, seed=1)
    values = torch.randn(6, 10, dtype=dtype)
    mixed = Gossip(LocalCommunicator(6), topology).mix(dict(enumerate(values)), "x")
    assert_close(torch.stack([mixed[k] for k in range(6)]), topology.matrices[0].to(dtype) @ values)


def test_chebyshev_mixes_faster_and_keeps_the_mean():
    values = {k: torch.randn(5, dtype=torch.float64) for k in range(16)}
    errors = {}
    for chebyshev in (False, True):
        gossip = Gossip(LocalCommunicator(16), make_topology("ring", 16), steps=20, chebyshev=chebyshev)
        mixed = gossip.mix(values, "x")
        assert_close(mean(mixed), mean(values))
        errors[chebyshev] = consensus_error(mixed)
    assert errors[True] < errors[False] / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_compressed_mixing_keeps_the_mean_and_costs_less(dtype):
    values = {k: torch.randn(2000) for k in range(4)}
    exact, small = (Gossip(LocalCommunicator(4), make_topology("ring", 4), dtype=d) for d in (torch.float32, dtype))
    start, mixed = dict(values), values
    for _ in range(20):
        values, mixed = exact.mix(values, "x"), small.mix(mixed, "x")
    assert_close(mean(mixed), mean(start), atol=1e-5, rtol=0)
    assert consensus_error(mixed) < 0.02 * consensus_error(start)
    assert small.comm.sent["x"] < exact.comm.sent["x"] * dtype.itemsize / 4 + 20 * 8 * 100


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_mixing_keeps_the_mean_however_messages_round(dtype, masked, monkeypatch):
    # The sender goes by what the receivers read; if it rounded itself, a message that rounds otherwise would show.
    def crude(value, *args, **options):
        return pack(value * 1.1, *args, **options)

    monkeypatch.setattr(gossip_module, "pack", crude)
    values = {k: torch.randn(2000, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    start = mean(values)
    gossip = Gossip(LocalCommunicator(4), make_topology("ring", 4), dtype=dtype)
    masks = {k: torch.arange(2000) % 4 != k for k in range(4)} if masked else None
    for _ in range(3):
        values = gossip.mix(values, "x", masks)
        assert (mean(values) - start).abs().max() < 1e-6
    assert all(bool((gossip.error["x"][k][~masks[k]] == 0).all()) for k in range(4 if masked else 0))


def test_int8_rounds_at_random_but_the_same_way_in_every_run():
    values = {k: torch.randn(100) for k in range(3)}
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        gossip = Gossip(LocalCommunicator(3), make_topology("ring", 3), dtype=torch.int8)
        runs.append(gossip.mix(gossip.mix(values, "x"), "x"))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in range(3))
    messages = {gossip._encode(k, values[0], None, True) for k in range(3)}
    assert len(messages) == 3  # every worker has numbers of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_mixing_leaves_alone_what_is_outside_the_masks(dtype):
    masks = {k: torch.arange(60) % 3 != k % 3 for k in range(8)}
    values = {k: 1e3 * torch.randn(60) for k in range(8)}
    values[0][~masks[0]] = math.inf
    gossip = Gossip(LocalCommunicator(8), make_topology("ring", 8), steps=5, chebyshev=True, dtype=dtype)
    mixed = gossip.mix(values, "x", masks)
    assert consensus_error({k: v[masks[0]] for k, v in mixed.items()}) > 0
    for k in range(8):
        assert torch.equal(mixed[k][~masks[k]], values[k][~masks[k]])
        assert mixed[k][masks[k]].isfinite().all()


def test_variables_of_one_kind_have_residuals_of_their_own():
    gossip = Gossip(LocalCommunicator(2), make_topology("ring", 2), dtype=torch.int8)
    for size, variable in ((6, "first"), (9, "second"), (6, "first")):
        gossip.mix({k: torch.randn(size) for k in range(2)}, "x", variable=variable)
    assert {name: left[0].numel() for name, left in gossip.error.items()} == {"first": 6, "second": 9}
    assert list(gossip.comm.sent) == ["x"]


def test_messages_under_a_known_mask_are_small():
    size, numel = 4, 10_000
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel)[: numel // 10]] = True
    masks = {k: mask.clone() for k in range(size)}
    gossip = Gossip(LocalCommunicator(size), make_topology("ring", size))
    values = {k: torch.randn(numel) for k in range(size)}
    bytes_of = []
    for use in (None, masks, masks, masks):
        before = gossip.comm.sent["x"]
        gossip.mix(values, "x", use)
        bytes_of.append(gossip.comm.sent["x"] - before)
    dense, first, second, third = bytes_of
    assert dense > 8 * second
    assert first > second == third


def test_a_lost_neighbour_is_weighted_out():
    comm = LocalCommunicator(4)
    gossip = Gossip(comm, make_topology("ring", 4))
    values = {k: torch.tensor([float(k)], dtype=torch.float64) for k in range(4)}
    comm.fail(2)
    values = {k: values[k] for k in comm.ranks}
    for _ in range(60):
        values = gossip.mix(values, "x")
    assert_close(torch.cat(list(values.values())), torch.full((3,), 4 / 3, dtype=torch.float64))


def test_damaged_messages_are_sent_again():
    comm = LocalCommunicator(3)
    gossip = Gossip(comm, make_topology("ring", 3))
    values = {k: torch.randn(4) for k in range(3)}
    right = gossip.mix(values, "x")
    hits = []

    def tamper(sender, receiver, payload):
        if (sender, receiver) == (1, 2) and not hits:
            hits.append(1)
            return payload[:-1] + bytes([payload[-1] ^ 1])
        return payload

    comm.tamper = tamper
    again = gossip.mix(values, "x")
    assert hits
    assert comm.resent == 1
    assert all(torch.equal(right[k], again[k]) for k in range(3))
    comm.tamper = lambda sender, receiver, payload: b"x" * len(payload)
    with pytest.raises(CommunicationError, match="damaged 4 times"):
        gossip.mix(values, "x")


# -- estimators --------------------------------------------------------------------------------------------------------


class Quadratic:
    """Mean over samples of |A_i p - b_i|^2 / 2."""

    def __init__(self, samples=12, dims=4, seed=0, shift=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.size = samples
        self.a = torch.randn(samples, dims, dims, generator=generator, dtype=torch.float64) / 2
        self.b = torch.randn(samples, dims, generator=generator, dtype=torch.float64) + shift
        self.keys = []

    def __call__(self, point, indices, key):
        self.keys.append((tuple(indices.tolist()), key))
        (p,) = point
        a, b = self.a[indices], self.b[indices]
        return torch.einsum("nij,ni->j", a, a @ p - b) / len(indices)

    def hessian(self):
        return torch.einsum("nij,nik->jk", self.a, self.a) / self.size

    def constant(self):
        return torch.einsum("nij,ni->j", self.a, self.b) / self.size


@pytest.mark.parametrize("name", ESTIMATORS)
def test_both_gradients_of_a_difference_see_the_same_samples_and_key(name):
    oracle = Quadratic()
    estimator = Estimator(name, oracle.size, oracle, 3, period=4)
    for t in range(9):
        oracle.keys.clear()
        estimator((torch.full((4,), 0.1 * t, dtype=torch.float64),))
        assert len(set(oracle.keys)) == 1


@pytest.mark.parametrize("name", ["svrg", "spider", "storm", "finite", "saga"])
def test_variance_reduction_converges_where_sgd_does_not(name):
    oracle = Quadratic(samples=20)
    solution = torch.linalg.solve(oracle.hessian(), oracle.constant())
    distance = {}
    for which in ("sgd", name):
        estimator, p = Estimator(which, oracle.size, oracle, 4, rho=0.1), torch.zeros(4, dtype=torch.float64)
        for _ in range(3000):
            p = p - 0.1 * estimator((p,))
        distance[which] = (p - solution).norm().item()
    # storm keeps some noise at a constant rho; the others converge.
    assert distance[name] < (0.9 * distance["sgd"] if name == "storm" else 1e-6)


def test_estimators_with_all_samples_give_the_gradient():
    oracle = Quadratic()
    p = (torch.ones(4, dtype=torch.float64),)
    full = oracle(p, torch.arange(12), 0)
    for name in ("svrg", "spider", "finite", "saga"):
        assert_close(Estimator(name, oracle.size, oracle, 12)(p), full)


def test_saga_follows_its_formula_and_takes_one_gradient_a_step():
    oracle = Quadratic(samples=10)
    estimator = Estimator("saga", oracle.size, oracle, 3)
    batches = [torch.arange(b, 10, 4) for b in range(4)]
    table = [torch.zeros(4, dtype=torch.float64) for _ in batches]
    for t in range(20):
        oracle.keys.clear()
        p = (torch.full((4,), 0.1 * t, dtype=torch.float64),)
        value = estimator(p)
        ((indices, _),) = oracle.keys
        chosen = indices[0]
        assert list(indices) == batches[chosen].tolist()
        gradient = Quadratic(samples=10)(p, batches[chosen], 0)
        mean = sum(len(b) * h for b, h in zip(batches, table, strict=True)) / 10
        assert_close(value, gradient - table[chosen] + mean)
        table[chosen] = gradient
    assert mean_cost("saga", 10, 3) == 2.5


@pytest.mark.parametrize("size", [3, 16, 50])
@pytest.mark.parametrize("rho", [0.1, 1.0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_cost_of_estimators_is_what_they_evaluate(name, rho, size):
    oracle = Quadratic(samples=size)
    estimator = Estimator(name, size, oracle, 8, rho=rho)
    calls = 40 * estimator.period
    for _ in range(calls):
        estimator((torch.zeros(4, dtype=torch.float64),))
    evaluated = sum(len(indices) for indices, _ in oracle.keys)
    assert mean_cost(name, size, 8, rho) == pytest.approx(evaluated / calls, rel=0.05)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_resume_to_the_same_numbers(name):
    def run(estimator, steps, p):
        for _ in range(steps):
            p = p - 0.05 * estimator((p,))
        return p

    whole = Estimator(name, 12, Quadratic(), 3, period=3)
    start = torch.ones(4, dtype=torch.float64)
    end = run(whole, 11, start)
    first = Estimator(name, 12, Quadratic(), 3, period=3)
    middle = run(first, 5, start)
    second = Estimator(name, 12, Quadratic(), 3, period=3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(run(second, 6, middle), end)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"name": "adam"}, "estimator='adam'"), ({"batch_size": 0}, "batch_size=0"), ({"rho": 2}, "rho=2")],
)
def test_bad_estimators_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Estimator(**{"name": "sgd", "size": 12, "gradient": Quadratic(), "batch_size": 2, **options})


# -- tracking ----------------------------------------------------------------------------------------------------------


def run_quadratics(tracking, lr, steps=1000, topology=None):
    """Distance of the workers from the common solution, and from each other."""
    topology = topology or make_topology("ring", 8)
    workers = topology.size
    oracles = [Quadratic(seed=k, shift=2.0 * k) for k in range(workers)]
    hessian = sum(o.hessian() for o in oracles)
    solution = torch.linalg.solve(hessian, sum(o.constant() for o in oracles))
    step = TrackedStep(Gossip(LocalCommunicator(workers), topology), tracking, "x")
    values = {k: torch.zeros(4, dtype=torch.float64) for k in range(workers)}
    for _ in range(steps):
        gradients = {k: oracles[k]((v,), torch.arange(12), 0) for k, v in values.items()}
        values = step(values, gradients, lr)
        if tracking != "none":
            gap = mean(step.tracker) - mean(gradients)
            assert gap.abs().max() < 1e-12 * max(1.0, max(g.abs().max().item() for g in gradients.values()))
    error = max((v - solution).norm().item() for v in values.values())
    return error, consensus_error(values)


def pairs_in_turn():
    """Three workers on a path, of which two meet at a time: no variable may always meet the same two."""
    pair = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return Topology([torch.block_diag(pair, one), torch.block_diag(one, pair)])


TURNS = {
    "ring": lambda: make_topology("ring", 8),
    "one-peer": lambda: make_topology("one-peer", 4),
    "pairs": pairs_in_turn,
}


@pytest.mark.parametrize("graph", TURNS)
@pytest.mark.parametrize("tracking", ["atc", "cta"])
def test_tracking_converges_exactly(tracking, graph):
    error, consensus = run_quadratics(tracking, 0.05 if graph == "ring" else 0.02, 2000, TURNS[graph]())
    assert error < 1e-9
    assert consensus < 1e-9


@pytest.mark.parametrize("tracking", ["none", "atc", "cta"])
def test_steps_go_on_without_a_lost_worker(tracking):
    comm = LocalCommunicator(4)
    step = TrackedStep(Gossip(comm, make_topology("complete", 4)), tracking, "x")
    values = {k: torch.full((3,), float(k)) for k in range(4)}
    values = step(values, values, 0.1)
    comm.fail(2)
    values = {k: values[k] for k in comm.ranks}
    for _ in range(3):
        values = step(values, values, 0.1)
    assert values.keys() == {0, 1, 3}
    assert all(v.isfinite().all() for v in values.values())


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_every_variable_meets_all_matrices_of_a_graph_that_changes(kinds):
    gossip = Gossip(LocalCommunicator(8), make_topology("one-peer", 8))
    values = {f"variable {i}": {k: torch.tensor([float(k + i)]) for k in range(8)} for i in range(kinds)}
    for _ in range(3):
        values = {name: gossip.mix(v, "x", variable=name) for name, v in values.items()}
    for i, v in enumerate(values.values()):
        assert all(x.item() == 3.5 + i for x in v.values())


def test_without_tracking_there_is_a_plateau_proportional_to_the_step():
    errors = [run_quadratics("none", lr) for lr in (0.02, 0.01, 0.005)]
    for before, after in zip(errors, errors[1:], strict=False):
        assert after[0] > 1e-3
        assert before[0] / after[0] == pytest.approx(2, rel=0.25)
        assert before[1] / after[1] == pytest.approx(2, rel=0.25)


def test_complete_graph_is_synchronous_averaging():
    oracles = [Quadratic(seed=k) for k in range(4)]
    topology = Topology(torch.full((4, 4), 0.25, dtype=torch.float64))
    step = TrackedStep(Gossip(LocalCommunicator(4), topology), "none", "x")
    values = {k: torch.zeros(4, dtype=torch.float64) for k in range(4)}
    central = torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        values = step(values, {k: oracles[k]((v,), torch.arange(12), 0) for k, v in values.items()}, 0.05)
        central = central - 0.05 * sum(o((central,), torch.arange(12), 0) for o in oracles) / 4
    for v in values.values():
        assert_close(v, central, rtol=1e-12, atol=1e-12)


def test_the_example_of_the_document_reaches_the_solution():
    document = (Path(__file__).parent.parent / "docs" / "decentralized.md").read_text()
    (code,) = re.findall(r"\*\*Of your own\.\*\*.*?```python\n(.*?)```", document, re.DOTALL)
    x, y = torch.randn(8, 40, 20), torch.randn(8, 40)
    scope = {"torch": torch, "x": x, "y": y}
    exec(code, scope)
    rows = x.reshape(-1, 20)
    solution = torch.linalg.solve(rows.T @ rows / 320 + 0.1 * torch.eye(20), rows.T @ y.reshape(-1) / 320)
    assert all((w - solution).norm() < 1e-3 * solution.norm() for w in scope["weights"].values())


def test_one_worker_takes_plain_steps_bit_for_bit():
    oracle, p = Quadratic(), torch.zeros(4, dtype=torch.float64)
    step = TrackedStep(Gossip(LocalCommunicator(1), make_topology("ring", 1)), "atc", "x")
    values = {0: p}
    for t in range(30):
        indices = torch.tensor([t % 12])
        values = step(values, {0: oracle((values[0],), indices, 0)}, 0.05)
        p = p - 0.05 * oracle((p,), indices, 0)
    assert torch.equal(values[0], p)
    assert math.isfinite(p.sum())


def test_a_matrix_of_numpy_and_a_stack_of_matrices():
    pair = torch.full((2, 2), 0.5, dtype=torch.float64)
    assert torch.equal(Topology(pair.numpy()).matrices[0], pair)
    assert len(Topology(torch.stack([pair, pair])).matrices) == 2


def test_masks_of_values_that_are_sent_as_they_are():
    gossip = Gossip(LocalCommunicator(2), make_topology("ring", 2))
    values = {k: torch.ones(3, dtype=torch.float64) for k in range(2)}
    with pytest.raises(ValueError, match="masks are not allowed with values of float64"):
        gossip.mix(values, "x", {k: torch.ones(3, dtype=torch.bool) for k in range(2)})


def test_the_torus_and_its_wrapped_ends():
    adjacency = make_graph("torus", 12)  # 3 rows of 4
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for r in range(3):
        for c in range(4):
            for other in ((r + 1) % 3 * 4 + c, (r - 1) % 3 * 4 + c, r * 4 + (c + 1) % 4, r * 4 + (c - 1) % 4):
                expected[4 * r + c, other] = True
    assert torch.equal(adjacency, expected)


def test_random_graphs_have_the_asked_number_of_edges_and_follow_the_seed():
    first, again, other = (make_graph("erdos-renyi", 60, probability=0.3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.sum().item() / (60 * 59) == pytest.approx(0.3, abs=0.05)


def test_lazy_weights_keep_half_of_the_own_value():
    adjacency = make_graph("ring", 6)
    matrix = mixing_matrix(adjacency)
    assert_close(mixing_matrix(adjacency, "lazy"), (matrix + torch.eye(6, dtype=torch.float64)) / 2)
    topology = make_topology("ring", 6, "lazy")
    assert topology.weights(0, 0) == pytest.approx({1: 1 / 6, 5: 1 / 6})


def test_one_worker_needs_no_peer():
    assert make_topology("one-peer", 1).edges() == []


def test_chebyshev_follows_its_formula():
    topology = make_topology("ring", 8)
    gossip = Gossip(LocalCommunicator(8), topology, steps=4, chebyshev=True)
    values = torch.randn(8, 5, dtype=torch.float64)
    q = math.sqrt(1 - topology.second_eigenvalue**2)
    e, before, now = (1 - q) / (1 + q), values, values
    for _ in range(4):
        before, now = now, (1 + e) * topology.matrices[0] @ now - e * before
    mixed = gossip.mix(dict(enumerate(values)), "x")
    assert_close(torch.stack([mixed[k] for k in range(8)]), now)


def test_what_rounding_has_left_goes_into_the_next_message():
    """So a sum of messages is right, where each of them is not."""
    gossip = Gossip(LocalCommunicator(2), make_topology("complete", 2), dtype=torch.bfloat16)
    values = {0: torch.tensor([1.001]), 1: torch.tensor([0.0])}
    received = [2 * gossip._changes(values, "x", None, "x")[1].item() for _ in range(50)]
    assert len(set(received)) > 1
    assert sum(received) / 50 == pytest.approx(1.001, abs=2e-4)


def test_the_random_numbers_of_rounding_are_new_in_every_mixing():
    gossip = Gossip(LocalCommunicator(2), make_topology("ring", 2), dtype=torch.int8)
    value = torch.linspace(-1, 1, 100)
    first = gossip._encode(0, value, None, True)
    gossip.clocks["x"] += 1
    assert gossip._encode(0, value, None, True) != first


def test_spider_and_finite_follow_their_formulas():
    oracle = Quadratic(samples=10)
    points = [(torch.full((4,), 0.1 * t, dtype=torch.float64),) for t in range(12)]
    spider, finite = Estimator("spider", 10, oracle, 3, period=5), Estimator("finite", 10, oracle, 3, rho=0.3)
    batches = [torch.arange(b, 10, 4) for b in range(4)]
    table = [torch.zeros(4, dtype=torch.float64) for _ in batches]
    for t, p in enumerate(points):
        oracle.keys.clear()
        found = spider(p)
        indices = torch.tensor(oracle.keys[0][0])
        if t % 5 == 0:
            value = oracle(p, torch.arange(10), 0)
        else:
            value = oracle(p, indices, 0) - oracle(points[t - 1], indices, 0) + value
        assert_close(found, value)
    for t, p in enumerate(points):
        oracle.keys.clear()
        found = finite(p)
        chosen = oracle.keys[0][0][0]
        now, mean = oracle(p, batches[chosen], 0), sum(len(b) * h for b, h in zip(batches, table, strict=True)) / 10
        if t == 0:
            estimate = now
        else:
            before = oracle(points[t - 1], batches[chosen], 0)
            estimate = now - before + 0.7 * estimate + 0.3 * (before - table[chosen] + mean)
        assert_close(found, estimate)
        table[chosen] = now


def test_the_keys_of_evaluations_differ():
    oracle = Quadratic()
    estimator = Estimator("sgd", oracle.size, oracle, 3)
    for _ in range(5):
        estimator((torch.zeros(4, dtype=torch.float64),))
    assert len({key for _, key in oracle.keys}) == 5


def test_both_orders_of_tracking_follow_their_formulas():
    topology = make_topology("ring", 4)
    matrix = topology.matrices[0]
    for tracking in ("cta", "atc"):
        step = TrackedStep(Gossip(LocalCommunicator(4), topology), tracking, "x")
        x, u, old = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
        for _ in range(3):
            v = torch.randn(4, 3, dtype=torch.float64)
            found = step(dict(enumerate(x)), dict(enumerate(v)), 0.1)
            u = matrix @ u + v - old if tracking == "cta" else matrix @ (u + v - old)
            x, old = (matrix @ x - 0.1 * u if tracking == "cta" else matrix @ (x - 0.1 * u)), v
            assert_close(torch.stack([found[k] for k in range(4)]), x)


@pytest.mark.parametrize("tracking", ["cta", "atc"])
def test_steps_under_masks_stay_in_them(tracking):
    step = TrackedStep(Gossip(LocalCommunicator(4), make_topology("ring", 4)), tracking, "x")
    masks = {k: torch.arange(20) % 4 != k for k in range(4)}
    values = start = {k: torch.randn(20) for k in range(4)}
    for _ in range(3):
        gradients = {k: torch.randn(20) for k in range(4)}
        values = step(values, gradients, 0.1, masks)
    for k in range(4):
        assert torch.equal(values[k][~masks[k]], start[k][~masks[k]])
        assert not torch.isclose(values[k][masks[k]], start[k][masks[k]]).any()
        assert_close(step.tracker[k][~masks[k]], gradients[k][~masks[k]])  # nobody else has a part in it there
        assert not torch.isclose(step.tracker[k][masks[k]], gradients[k][masks[k]]).any()


def test_repetitions_and_headers_are_counted():
    comm = LocalCommunicator(2)
    comm.exchange({0: {1: b"12345"}, 1: {0: b"123"}}, "x")
    header = (comm.sent["x"] - 8) // 2
    assert comm.sent == {"x": 8 + 2 * header}
    assert header == 28
    tries = []
    comm.tamper = lambda sender, receiver, payload: tries.append(1) or (payload if len(tries) > 3 else b"?")
    assert comm.exchange({0: {1: b"12345"}, 1: {}}, "y") == {0: {}, 1: {0: b"12345"}}
    assert comm.sent["y"] == 4 * (header + 5)
    comm.fail(1)
    assert comm.lost == {1}
