"""The algorithms of decentralized pruning, their tasks, and the command `sparsebilevel decentralized`."""

import copy
import dataclasses
import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sparsebilevel.cli import main
from sparsebilevel.comm import CommunicationError, LocalCommunicator
from sparsebilevel.data import datasets
from sparsebilevel.decentralized import (
    ALGORITHMS,
    Decentralized,
    Gossip,
    Objective,
    Problem,
    Samples,
    Settings,
    make_problem,
    make_topology,
    partition,
)
from sparsebilevel.decentralized.algorithms import project_capped_simplex, project_count
from sparsebilevel.decentralized.estimators import mix_seed
from sparsebilevel.decentralized.gossip import consensus_error
from sparsebilevel.decentralized.tasks import TextRNN, area_under_curve, hinge
from sparsebilevel.kernels import binarize
from sparsebilevel.models import create_model
from sparsebilevel.training.checkpoint import load_checkpoint, save_checkpoint
from sparsebilevel.training.runlog import read_log


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the command sets it


def make_run(
    name="bilevel", workers=4, budget=600, problem=None, graph="ring", dtype=torch.float32, comm=None, **changes
):
    problem = problem or make_problem(workers=workers, hidden=4, seed=1)
    gossip = Gossip(comm or LocalCommunicator(workers), make_topology(graph, workers), dtype=dtype)
    options = {"batch_size": 8, "inner_steps": 3, **ALGORITHMS[name], **changes}
    return Decentralized(problem, gossip, Settings(**options), budget)


# -- projections -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30), part=st.floats(0, 1))
def test_the_capped_simplex_is_met_and_no_point_of_it_is_nearer(values, part):
    x = torch.tensor(values)
    total = part * len(values)
    p = project_capped_simplex(x, total)
    assert p.min() >= 0
    assert p.max() <= 1
    assert p.sum().item() == pytest.approx(total, abs=1e-4)
    # A projection p of x has (x - p) . (q - p) <= 0 for every q of the set; a vertex of it is the hardest q.
    q = torch.zeros_like(x)
    order = torch.argsort(x - p, descending=True)
    whole = int(total)
    q[order[:whole]] = 1
    if whole < len(values):
        q[order[whole]] = total - whole
    assert ((x - p) @ (q - p)).item() <= 1e-3


def test_the_count_projection():
    x = torch.tensor([2.0, -1.0, 0.5, 0.4, 0.5])
    assert project_count(x, 2).tolist() == [1, 0, 0.5, 0, 0]
    with pytest.raises(ValueError, match="total=9"):
        project_capped_simplex(x, 9)


# -- algorithms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_and_prunes_to_the_asked_rate(name, sparsity):
    run = make_run(name, budget=2500, sparsity=sparsity)
    before = run.evaluate()
    for _ in range(run.rounds):
        run.round()
    row = run.evaluate()
    assert row["upper_loss"] < 0.9 * before["upper_loss"]
    assert row["test_acc"] > 0.4
    dense = ALGORITHMS[name].get("mask") == "dense"
    assert row["sparsity"] == pytest.approx(0 if dense else round(sparsity * 256) / 256)
    assert 0.7 * 2500 <= row["evaluations"] <= 1.3 * 2500
    if not dense:
        masks = [x[:256] for x in run.x.values()]
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        assert set(masks[0].unique().tolist()) <= {0.0, 1.0}
        assert row["bytes"]["agreement"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs_with_rounded_messages(name, dtype):
    # Trackers of mask and weights are of one kind and differ in size, and the penalty's weights shrink.
    run = make_run(name, budget=800, dtype=dtype, sparsity=0.5)
    assert 1 < run.search_rounds < run.rounds
    before = run.evaluate()
    for _ in range(run.rounds):
        run.round()
    row = run.evaluate()
    assert row["upper_loss"] < before["upper_loss"]
    assert row["mask_agreed"] == (ALGORITHMS[name].get("mask") != "dense")
    assert set(run.gossip.error) <= {"weights", "mask", "trackers of weights", "trackers of mask"}


def test_all_processes_do_the_same_number_of_rounds_and_the_budget_is_met():
    problem = make_problem(workers=8, alpha=0.1, seed=2, hidden=4)
    assert min(problem.sizes) < 32 < max(problem.sizes)
    for name in ("bilevel", "d-svrgda", "d-sgd"):
        for options in ({}, {"lower": "svrg"}):
            rounds = set()
            for k in range(8):
                comm = LocalCommunicator(8)
                comm.ranks = (k,)
                rounds.add(make_run(name, 8, 50 * problem.mean_size, problem, comm=comm, **options).rounds)
            assert len(rounds) == 1, (name, options)
    data = problem.train
    uneven = Problem(problem.objective, data, [torch.arange(10), torch.arange(10, len(data))], problem.test_set)
    run = make_run("d-sgd", 2, 20_000, uneven, batch_size=32)
    for _ in range(run.rounds):
        run.round()
    assert run.evaluate()["evaluations"] == pytest.approx(20_000, rel=0.02)


@pytest.mark.parametrize("constraint", ["simplex", "box", "count"])
@pytest.mark.parametrize("regularizer", ["none", "l1", "group"])
def test_constraints_and_regularizers(constraint, regularizer):
    run = make_run(constraint=constraint, regularizer=regularizer, strength=1e-3, sparsity=0.5)
    for _ in range(run.search_rounds - 1):
        run.round()
        for x in run.x.values():
            assert 0 <= x.min() <= x.max() <= 1
            if constraint == "simplex":
                assert x[:256].sum().item() == pytest.approx(run._count(), abs=0.01)
            if constraint == "count":
                assert torch.count_nonzero(x[:256]) <= run._count()
    assert (run.regularizer(run.x[0][:256]) > 0) == (regularizer != "none")


def test_the_gradient_of_the_group_regularizer():
    run = make_run(regularizer="group", strength=0.3)
    x = torch.rand(256, requires_grad=True)
    value = sum(0.3 * part.flatten(1).norm(dim=1).sum() for part in run.problem.split_masked(x))
    (expected,) = torch.autograd.grad(value, x)
    assert_close(run._regularizer_gradient(x.detach()), expected)
    assert run.regularizer(x.detach()) == pytest.approx(value.item())


def regression(dims=5, samples=40, seed=3):
    """A linear model with one output and a squared loss: its lower level has a closed form."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, dims, generator=generator)
    targets = inputs @ torch.randn(dims, generator=generator) + 0.5 * torch.randn(samples, generator=generator)
    objective = Objective(nn.Linear(dims, 1, bias=False), lambda out, y: (out[:, 0] - y).square().mean() / 2)
    data = Samples(inputs, targets)
    return Problem(objective, data, [torch.arange(samples)], data), inputs.double(), targets.double()


def test_the_penalty_has_a_bias_linear_in_epsilon():
    problem, a, b = regression()
    ridge, x = 0.1, torch.tensor([0.3, 0.9, 0.5, 1.0, 0.7], dtype=torch.float64)

    def lower(x, scale):
        ax = a * x
        hessian = scale * ax.T @ ax / len(a) + ridge * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(hessian, scale * ax.T @ b / len(a))

    at = x.clone().requires_grad_()
    (true,) = torch.autograd.grad(((a * at) @ lower(at, 1.0) - b).square().mean() / 2, at)
    errors = []
    for epsilon in (0.4, 0.2, 0.1, 0.05):
        run = make_run("bilevel-penalty", workers=1, problem=problem, ridge=ridge, epsilon=epsilon)
        y = torch.cat([lower(x, 1 + epsilon), lower(x, 1.0)]).float()
        everything = torch.arange(len(a))
        assert run._lower_gradient(0, (x.float(), y), everything, 0).abs().max() < 1e-5
        gradient = run._upper_gradient(0, (x.float(), y), everything, 0)
        errors.append((gradient.double() - true).norm().item())
    for before, after in zip(errors, errors[1:], strict=False):
        assert before / after == pytest.approx(2, rel=0.3)


def test_the_implicit_form_doubles_the_direct_one_at_the_lower_solution():
    problem, a, b = regression()
    ridge = 0.1
    x = torch.tensor([0.3, 0.9, 0.5, 1.0, 0.7], dtype=torch.float64)
    ax = a * x
    y = torch.linalg.solve(ax.T @ ax / len(a) + ridge * torch.eye(5, dtype=torch.float64), ax.T @ b / len(a)).float()
    gradients = {}
    for form in ("direct", "implicit"):
        run = make_run(workers=1, problem=problem, ridge=ridge, hypergradient=form)
        gradients[form] = run._upper_gradient(0, (x.float(), y), torch.arange(len(a)), 0)
    assert_close(gradients["implicit"], 2 * gradients["direct"], rtol=1e-3, atol=1e-5)


def test_one_worker_is_the_centralized_algorithm_bit_for_bit():
    problem = make_problem(workers=1, hidden=4, seed=1)
    run = make_run(workers=1, problem=problem, lower="sgd", upper="sgd", sparsity=0.5)
    s, d, x, y = run.settings, run.maskable, torch.ones(run.size), problem.initial()
    counts = [0, 0]

    def batch(level):
        generator = torch.Generator().manual_seed(mix_seed(mix_seed(s.seed, 0, level), counts[level]))
        counts[level] += 1
        chosen = torch.randint(problem.sizes[0], (s.batch_size,), generator=generator)
        return problem.train.inputs[problem.parts[0][chosen]], problem.train.targets[problem.parts[0][chosen]]

    def gradient(level):
        inputs, targets = batch(level)
        z = (x * y).requires_grad_()
        loss = hinge(
            torch.func.functional_call(problem.objective.module, problem.objective.split(z), (inputs,)), targets
        )
        return torch.autograd.grad(loss, z)[0]

    for t in range(run.search_rounds - 1):
        run.round()
        lr = s.lr * (0.5 + 0.5 * math.cos(math.pi * t / run.rounds))
        mask_lr = s.mask_lr * (0.5 + 0.5 * math.cos(math.pi * t / run.search_rounds))
        for _ in range(s.inner_steps):
            y = y - lr * (x * gradient(0) + s.ridge * y) * (x > 0)
        step = mask_lr * (y[:d] * gradient(1)[:d])
        step = step * (mask_lr / step.abs().mean())
        x = torch.cat([project_capped_simplex(x[:d] - step, run._count()), x[d:]])
        assert torch.equal(run.x[0], x), t
        assert torch.equal(run.y[0], y), t


def test_runs_resume_bit_for_bit_and_with_the_same_bytes():
    for stop in (2, 14):  # before and after the workers have agreed
        whole, first, second = (make_run("bilevel-penalty", budget=2000, lower="finite") for _ in range(3))
        assert whole.search_rounds < 14 < whole.rounds
        for t in range(whole.rounds):
            whole.round()
            if t + 1 == stop:
                [whole.state_dict(k) for k in range(4)]
        for _ in range(stop):
            first.round()
        states = {k: first.state_dict(k) for k in range(4)}
        second.load_state_dict(states)
        while second.done < second.rounds:
            second.round()
        assert all(torch.equal(whole.y[k], second.y[k]) and torch.equal(whole.x[k], second.x[k]) for k in range(4))
        assert whole.evaluate() == second.evaluate()
    states[1]["round"] += 1
    with pytest.raises(ValueError, match="different rounds"):
        make_run("bilevel-penalty", budget=2000, lower="finite").load_state_dict(states)


@pytest.mark.parametrize(
    "changes", [{"sparsity": 0.5}, {"seed": 3}, {"lr": 0.2}, {"tracking": "none"}, {"constraint": "box"}]
)
def test_states_of_other_runs_are_refused_and_change_nothing(changes):
    other, run = make_run(**changes), make_run()
    other.round()
    states = {k: run.state_dict(k) for k in (0, 1)} | {k: other.state_dict(k) | {"round": 0} for k in (2, 3)}
    x, lower = dict(run.x), run.lower
    with pytest.raises(ValueError, match=f"checkpoint of worker 2 is of another run .other {next(iter(changes))}"):
        run.load_state_dict(states)
    assert run.done == 0
    assert run.lower is lower
    assert all(run.x[k] is x[k] for k in x)


def test_a_run_goes_back_to_before_the_agreement():
    run, whole = (make_run("bilevel-penalty", budget=2000) for _ in range(2))
    start = {k: copy.deepcopy(run.state_dict(k)) for k in range(4)}
    for each in (run, whole):
        while each.done < each.rounds:
            each.round()
    run.load_state_dict(start)
    assert run.is_penalty
    while run.done < run.rounds:
        run.round()
    assert all(torch.equal(whole.y[k], run.y[k]) for k in range(4))


@pytest.mark.parametrize("name", ["d-sgd", "magnitude-during"])
def test_a_run_that_diverges_says_so(name):
    run = make_run(name, budget=3000, lr=100.0)

    def train():
        for _ in range(run.rounds):
            run.round()
            assert run.evaluate()["upper_loss"] > 0  # the hinge loss of NaN would be zero

    with pytest.raises(ValueError, match=r"lr=100.0 is too large"):
        train()


def test_a_mask_that_starts_from_magnitudes_changes_nothing_at_first_and_prunes_the_smallest():
    run = make_run(initial_mask="magnitude", constraint="count", sparsity=0.5)
    d, initial = run.maskable, run.problem.initial()
    x, y = run.x[0], run.y[0]
    assert_close(x * y, initial)
    assert x[:d].sort().values.tolist() == pytest.approx([(i + 1) / d for i in range(d)])
    assert torch.equal(x[:d].argsort(), initial[:d].abs().argsort())
    assert bool((x[d:] == 1).all())
    run.done = run.search_rounds
    assert torch.equal(project_count(x[:d], run._count()) > 0, binarize(initial[:d].abs(), d // 2))
    assert bool((make_run("magnitude-during", initial_mask="magnitude").x[0] == 1).all())


def test_mask_steps_are_scaled_over_the_mask_or_in_every_tensor():
    step = torch.randn(sum(p.numel() for p in (nn.Linear(6, 5).weight, nn.Linear(5, 2).weight)))
    step[:30] *= 1000
    parts = {}
    for normalize in ("mask", "tensor"):
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        samples = Samples(torch.randn(8, 6), torch.arange(8) % 2)
        problem = Problem(Objective(net, nn.functional.cross_entropy), samples, [torch.arange(8)], samples)
        run = make_run(workers=1, problem=problem, normalize=normalize)
        scaled = run._rescale(step, 0.01)
        parts[normalize] = [part.abs().mean().item() for part in run.problem.split_masked(scaled)]
        assert torch.equal(scaled.sign(), step.sign())
    assert parts["tensor"] == pytest.approx([0.01, 0.01])
    assert parts["mask"][0] > 100 * parts["mask"][1]


def test_step_sizes_go_to_zero_along_a_cosine():
    run = make_run(budget=600)
    factors = [run._cosine(t, run.rounds) for t in range(run.rounds)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert 0 < factors[-1] < 0.1
    assert make_run(schedule="constant")._cosine(5, 6) == 1


@pytest.mark.parametrize("kind", ["one logit", "regression", "vectors"])
def test_accuracies_are_those_of_classifiers(kind):
    outputs = 3 if kind == "vectors" else 1
    x, y = torch.randn(80, 6), torch.randn(80, outputs) if kind == "vectors" else torch.randn(80)
    module = nn.Sequential(nn.Linear(6, outputs), *([] if kind == "vectors" else [nn.Flatten(0)]))
    if kind == "one logit":
        module, y = module[0], (y > 0).long()

    def loss(output, target):
        if kind == "one logit":
            return nn.functional.binary_cross_entropy_with_logits(output[:, 0], target.float())
        return nn.functional.mse_loss(output, target)

    parts = [torch.arange(k, 60, 4) for k in range(4)]
    problem = Problem(Objective(module, loss), Samples(x[:60], y[:60]), parts, Samples(x[60:], y[60:]))
    run = make_run(problem=problem, budget=100)
    with pytest.raises(RuntimeError, match=r"the mean model is gathered by evaluate\(\)"):
        run.final_weights()
    run.round()
    row = run.evaluate()
    assert math.isfinite(row["test_loss"])
    assert "test_acc" not in row
    assert run.final_weights().shape == (run.size,)


@pytest.mark.parametrize("graph", ["ring", "one-peer"])
def test_workers_agree_on_scores_that_they_share(graph, monkeypatch):
    seen, mix = [], Gossip.mix

    def watch(self, values, kind, *args):
        mixed = mix(self, values, kind, *args)
        if kind == "agreement":
            seen.append((consensus_error(values), consensus_error(mixed)))
        return mixed

    monkeypatch.setattr(Gossip, "mix", watch)
    run = make_run("magnitude-after", workers=8, budget=400, graph=graph)
    for _ in range(run.rounds):
        run.round()
    ((before, after),) = seen
    assert after < 0.01 * before


def test_training_goes_on_without_a_lost_worker_and_trackers_start_again():
    run = make_run("d-sgd-tracking", workers=4, budget=1500, graph="complete")
    for _ in range(5):
        run.round()
    run.gossip.comm.fail(2)
    for _ in range(6):
        run.round()
    row = run.evaluate()
    assert row["workers"] == 3
    tracker, gradient = (sum(values.values()) / 3 for values in (run.lower_step.tracker, run.lower_step.gradient))
    assert_close(tracker, gradient, rtol=0, atol=1e-5)


def test_figures_do_not_fall_or_jump_when_a_worker_is_lost():
    def fail(run):
        run.gossip.comm.fail(2)

    def die(run):  # what worker 0 sees when processes of their own hand in their counts, and one is gone
        gather = run.gossip.comm.gather
        run.gossip.comm.gather = lambda values: gather({k: v for k, v in values.items() if k != 2})

    for lose in (fail, die):
        run = make_run("d-sgd", workers=4, budget=3000, graph="complete", inner_steps=1)
        seen = []
        for t in range(8):
            if t == 4:
                lose(run)
            run.round()
            seen.append(run.evaluate())
        assert [row["workers"] for row in seen] == [4] * 4 + [3] * 4
        for name in ("evaluations", "bytes_total"):
            steps = [b[name] - a[name] for a, b in zip(seen, seen[1:], strict=False)]
            assert min(steps) > 0, name
            assert max(steps) < 1.01 * steps[0], name


def test_figures_do_not_fall_when_a_worker_comes_back_with_older_counts():
    run = make_run(workers=2)
    before = run.evaluate()
    run.round()
    after = run.evaluate()
    run.evaluations = dict.fromkeys(run.evaluations, 0)
    run.gossip.comm.sent.clear()
    again = run.evaluate()
    assert again["evaluations"] == after["evaluations"] > before["evaluations"] == 0
    assert again["bytes"] == after["bytes"]


@pytest.mark.parametrize("when", [2, 100])
def test_workers_that_a_loss_has_cut_off_from_each_other_do_not_go_on(when):
    run = make_run(workers=3, budget=900, graph="path")
    for _ in range(min(when, run.rounds)):
        run.round()
    run.gossip.comm.fail(1)
    for step in (run.round, run.evaluate) if run.done < run.rounds else (run.evaluate,):
        with pytest.raises(CommunicationError, match=r"without the lost workers \[1\] .* not connected"):
            step()


def test_masks_that_differ_are_not_called_agreed():
    run = make_run(workers=3, budget=900)
    assert not run.evaluate()["mask_agreed"]
    for _ in range(run.rounds):
        run.round()
    assert run.evaluate()["mask_agreed"]
    run.x[1][:2] = 1 - run.x[1][:2]
    assert not run.evaluate()["mask_agreed"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": 0.96}, "sparsity=0.96 is too high: it leaves none of 10 weights"),
        ({"mask": "soft"}, "mask='soft'"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"initial_mask": "random"}, "initial_mask='random'"),
        ({"normalize": "layer"}, "normalize='layer'"),
        ({"inner_steps": 0}, "inner_steps=0 is not allowed; expected a whole number, at least 1"),
        ({"inner_steps": 1.5}, "inner_steps=1.5"),
        ({"batch_size": math.nan}, "batch_size=nan"),
        ({"period": 2.5}, "period=2.5"),
        ({"seed": None}, "seed=None"),
        ({"rho": 2}, r"rho=2 is not allowed; expected a number in \[0, 1\]"),
        ({"implicit_scale": math.inf}, "implicit_scale=inf"),
        ({"implicit_scale": -1.0}, "implicit_scale=-1.0 is not allowed; expected a finite number >= 0"),
        ({"clip": "mask", "clip_at": 1.5}, r"clip_at=1.5 is not allowed; expected a number in \(0, 1\]"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": math.inf}, "lr=inf is not allowed; expected a finite number above 0"),
        ({"lr": 0}, "lr=0"),
        ({"ridge": -1}, "ridge=-1"),
        ({"search": 0}, "search=0"),
        ({"hypergradient": "implicit", "ridge": 0}, "needs ridge > 0"),
    ],
)
def test_bad_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Settings(**options).validate(10)


@pytest.mark.parametrize("budget", [math.nan, math.inf, -5])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget} is not allowed"):
        make_run(budget=budget)


def own_problem(module, masked=None):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 6, generator=generator), torch.arange(120) % 3
    parts = list(torch.arange(80).split(20))
    objective = Objective(module, nn.functional.cross_entropy, masked)
    return Problem(objective, Samples(x[:80], y[:80]), parts, Samples(x[80:], y[80:]))


def test_parts_are_tensors_or_plain_sequences():
    problem = own_problem(nn.Linear(6, 3))
    data, parts = problem.train, problem.parts
    plain = Problem(problem.objective, data, [part.tolist() for part in parts], problem.test_set)
    assert all(torch.equal(a, b) for a, b in zip(plain.parts, parts, strict=True))
    z = problem.initial()
    assert plain.local_loss(1, z) == problem.local_loss(1, z)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"parts": [[0, 1], [-1]]}, r"parts\[1\] has -1..-1; expected positions in 0..7"),
        ({"parts": [[0, 8], [1]]}, r"parts\[0\] has 0..8"),
        ({"parts": [torch.ones(8, dtype=torch.bool)]}, r"parts\[0\] has True..True"),
        ({"parts": [[0.5]]}, r"parts\[0\] has 0.5..0.5"),
        ({"train": Samples(torch.zeros(8, 6), torch.zeros(3))}, "train has 8 inputs and 3 targets"),
        ({"eval_samples": 0}, "eval_samples=0 is not allowed"),
    ],
)
def test_bad_problems_are_refused(changes, match):
    samples = Samples(torch.zeros(8, 6), torch.zeros(8, dtype=torch.int64))
    given = {"train": samples, "parts": [[0, 1], [2]], "test": samples} | changes
    with pytest.raises(ValueError, match=match):
        Problem(Objective(nn.Linear(6, 3), nn.functional.cross_entropy), **given)


@pytest.mark.parametrize("workers", [3, 5])
def test_a_problem_has_a_part_for_each_worker(workers):
    with pytest.raises(ValueError, match=f"problem has parts for 4 workers, gossip {workers}"):
        make_run(workers=workers, problem=own_problem(nn.Linear(6, 3)))


def test_no_round_comes_after_the_last():
    run = make_run("d-sgd", problem=own_problem(nn.Linear(6, 3)), budget=1)
    for _ in range(run.rounds):
        run.round()
    with pytest.raises(ValueError, match="the run is at its end"):
        run.round()


def test_frozen_parameters_stay():
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    run = make_run(problem=own_problem(module))
    assert run.size == 21
    while run.done < run.rounds:
        run.round()
    run.evaluate()
    state = run.problem.objective.state_dict(run.final_weights())
    assert torch.equal(state["0.weight"], before)
    assert not torch.equal(state["2.weight"], module[2].weight)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        own_problem(module.requires_grad_(False))


def test_the_state_of_shared_parameters_has_one_value():
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    module[2].weight = module[0].weight
    problem = own_problem(module)
    z = torch.randn(problem.size)
    state = problem.objective.state_dict(z)
    assert torch.equal(state["0.weight"], state["2.weight"])
    x = problem.test_set.inputs
    expected = problem.objective.evaluate(z, x)
    module.load_state_dict(state)
    assert torch.equal(module.eval()(x), expected)


class DropsByFunction(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_all_that_a_network_draws_follows_from_the_key():
    problem = own_problem(DropsByFunction(6, 3))
    z, indices = problem.initial(), torch.arange(20)
    before = torch.get_rng_state()
    first, again, other = (problem.gradient(0, z, indices, key) for key in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vector_with_a_mask_has_a_group_for_each_entry():
    run = make_run(problem=own_problem(nn.Linear(6, 3), ["*"]), regularizer="group", strength=0.5)
    x = torch.rand(run.maskable)
    weight, bias = run.problem.split_masked(x)
    assert run.regularizer(x) == pytest.approx(0.5 * (weight.norm(dim=1).sum() + bias.sum()).item())
    gradient = run._regularizer_gradient(x)
    assert_close(gradient[18:], torch.full((3,), 0.5))


def test_a_mask_needs_parameters_that_have_one():
    with pytest.raises(ValueError, match="mask='learned' is not allowed where no parameter has a mask"):
        make_run(problem=own_problem(nn.Linear(6, 3), []))
    make_run("d-sgd", problem=own_problem(nn.Linear(6, 3), [])).round()


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["iid", "dirichlet", "label", "source"])
def test_partitions_give_every_sample_once(how):
    targets = torch.arange(400) % 4
    parts = partition(targets, 5, how, sources=torch.arange(400) % 7, seed=2)
    assert torch.cat(parts).sort().values.tolist() == list(range(400))
    assert min(map(len, parts)) > 0
    classes = [len(targets[part].unique()) for part in parts]
    if how == "label":
        assert max(classes) <= 2
    if how == "iid":
        assert {len(part) for part in parts} == {80}
        assert min(classes) == 4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: partition(torch.zeros(3), 4), "workers=4"),
        (lambda: partition(torch.zeros(3), 2, "size"), "partition='size'"),
        (lambda: partition(torch.zeros(3), 2, "source"), "does not say"),
        (lambda: partition(torch.zeros(9), 2, "source", sources=torch.zeros(9)), "1 sources are not enough"),
        (lambda: partition(torch.zeros(9), 2, "dirichlet", alpha=0), "alpha=0"),
        (lambda: make_problem("cnn"), "task='cnn'"),
        (lambda: make_problem("svm", "cifar10"), "data='cifar10' does not go with task='svm'"),
        (lambda: make_problem(hidden=0), "hidden=0 is not allowed"),
        (lambda: make_problem(limit=9.5), "limit=9.5 is not allowed"),
        (lambda: Objective(nn.Linear(2, 2), hinge, ["fc.*"]), r"masked='fc.\*' fits no parameter"),
    ],
)
def test_bad_tasks_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_missing_files_are_named(tmp_path):
    for task, data in (("svm", "a9a"), ("svm", "covtype"), ("svm", "imdb"), ("rnn", "sent140")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            make_problem(task, data, str(tmp_path))


def test_libsvm_files_are_read(tmp_path):
    lines = [f"{'+1' if i % 2 else '-1'} {i % 5 + 1}:1 123:1" for i in range(60)]
    for name in ("a9a", "a9a.t"):
        (tmp_path / name).write_text("\n".join(lines))
    problem = make_problem("svm", "a9a", str(tmp_path), workers=3, how="iid")
    assert problem.train.inputs.sum().item() == 120
    assert problem.train.targets.tolist() == [0, 1] * 30
    assert problem.maskable == 123 * 20
    for text, reason in (("+1 three:1", "line 1"), ("+1 1:1\n-1 0:1", "line 2: feature 0"), ("", "it is empty")):
        (tmp_path / "a9a").write_text(text)
        with pytest.raises(ValueError, match=rf"a9a is damaged \({reason}"):
            make_problem("svm", "a9a", str(tmp_path), workers=1)


def test_a_constant_column_stays_finite(tmp_path):
    (tmp_path / "covtype").mkdir()
    rest = {name: np.arange(20) % 4 for name in ("wilderness", "soil", "label")}
    np.savez(tmp_path / "covtype" / "covtype.npz", num=np.arange(20)[:, None] * np.array([1, 0]), **rest)
    inputs = make_problem("svm", "covtype", str(tmp_path), workers=2).train.inputs
    assert inputs.isfinite().all()
    assert inputs[:, 0].std() > 0.9
    assert not inputs[:, 1].any()


def test_damaged_files_are_named(tmp_path):
    for name in ("covtype", "imdb", "glove"):
        (tmp_path / name).mkdir()
    columns = {name: np.arange(20) for name in ("wilderness", "soil", "label")} | {"num": np.ones((20, 10))}
    words, vectors = np.array(["good", "sun"]), np.ones((3, 3), np.float32)
    for file, arrays, reason in (
        ("covtype/covtype.npz", {"num": columns["num"]}, "KeyError"),
        ("covtype/covtype.npz", columns | {"label": np.arange(19)}, r"have \[20, 20, 20, 19\] rows"),
        ("glove/glove.npz", {"vectors": vectors}, "StopIteration"),
        ("glove/glove.npz", {"words": words, "vectors": vectors}, "2 words and 3 vectors"),
    ):
        np.savez(tmp_path / file, **arrays)
        task, data = ("rnn", "sent140") if file.startswith("glove") else ("svm", "covtype")
        with pytest.raises(ValueError, match=rf"{file} is damaged \(.*{reason}"):
            make_problem(task, data, str(tmp_path))
    whole = (tmp_path / "covtype" / "covtype.npz").read_bytes()
    (tmp_path / "covtype" / "covtype.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"covtype.npz is damaged \(BadZipFile"):
        make_problem("svm", "covtype", str(tmp_path))
    for text, reason in (("1\tx", "IndexError"), ("7\t0\t0\tgood", "labels"), ("1\t0\t0\t!", "words"), ("", "words")):
        (tmp_path / "imdb" / "imdb_train.tsv").write_text(text)
        with pytest.raises(ValueError, match=rf"imdb_train.tsv is damaged \(.*{reason}"):
            make_problem("svm", "imdb", str(tmp_path))


def test_frequent_words_of_tweets_without_a_vector_get_one(tmp_path):
    for name in ("glove", "sent140"):
        (tmp_path / name).mkdir()
    vectors = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    np.savez(tmp_path / "glove" / "glove.npz", words=np.array(["good", "sun"]), vectors=vectors)
    (tmp_path / "sent140" / "positive.txt").write_text("A good sun!\n" * 10)
    (tmp_path / "sent140" / "negative.txt").write_text("no sun\n" * 10)
    problem = make_problem("rnn", "sent140", str(tmp_path), workers=2, how="iid", hidden=4)
    table = problem.objective.module.vectors
    assert torch.equal(table[1:3], torch.from_numpy(vectors))
    assert table.shape == (5, 3)  # nothing, good, sun, and of the tweets: a, no
    assert problem.train.inputs.shape == (16, 24)
    for words, target in zip(problem.train.inputs, problem.train.targets, strict=True):
        sentence = words[words > 0].tolist()
        assert sentence[-1] == 2
        assert sentence[:-1] in ([[3, 1], [4, 1]] if target else [[3], [4]])


def test_area_under_curve():
    assert area_under_curve(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])) == 0.75
    assert area_under_curve(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5


def test_masks_reach_recurrent_weights():
    objective = Objective(TextRNN(torch.randn(9, 3), hidden=4), nn.functional.cross_entropy, ["ih*", "hh*"])
    words = torch.randint(9, (6, 5))
    z = objective.flat()
    gradient = objective.gradient(z, words, torch.randint(2, (6,)), 0)
    assert all(part.abs().sum() > 0 for part in objective.split(gradient).values())
    assert_close(objective.evaluate(z, words), objective.module(words).detach())
    reference = nn.RNN(3, 4, 2, batch_first=True)
    own = objective.split(z)
    with torch.no_grad():
        for layer in range(2):
            getattr(reference, f"weight_ih_l{layer}").copy_(own[f"ih{layer}"])
            getattr(reference, f"weight_hh_l{layer}").copy_(own[f"hh{layer}"])
            getattr(reference, f"bias_ih_l{layer}").copy_(own[f"b{layer}"][0])
            getattr(reference, f"bias_hh_l{layer}").copy_(own[f"b{layer}"][1])
        states, _ = reference(objective.module.vectors[words])
        assert_close(objective.evaluate(z, words), objective.module.fc(states[:, -1]))


def test_dropout_masks_follow_from_the_key_and_norms_keep_their_statistics():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    assert Objective(net, nn.functional.cross_entropy, "*.weight").masked_names == ["0.weight", "1.weight", "3.weight"]
    objective = Objective(net, nn.functional.cross_entropy)
    x, y, z = torch.randn(5, 6), torch.randint(2, (5,)), objective.flat()
    before = net[1].running_mean.clone()
    random = torch.random.get_rng_state()
    one, same, other = (objective.gradient(z, x, y, key) for key in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(net[1].running_mean, before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_resnet_on_images():
    problem = make_problem("resnet", "digits", workers=2, limit=60)
    run = make_run(workers=2, problem=problem, budget=20, batch_size=2, inner_steps=1)
    run.round()
    assert run.maskable == sum(m.weight.numel() for m in problem.objective.module.modules()
                               if isinstance(m, (nn.Conv2d, nn.Linear)))  # fmt: skip
    assert all(torch.isfinite(y).all() for y in run.y.values())


def test_a_trained_network_is_where_a_resnet_starts_from(tmp_path):
    flags = ["--method", "dense", "--arch", "resnet8", "--epochs", "1", "--lr", "0.05", "--no-measure", "--quiet"]
    main(["train", *flags, "--output-dir", str(tmp_path / "dense")])
    trained = read_log(tmp_path / "dense")[-1]
    for source in (tmp_path / "dense", tmp_path / "dense" / "checkpoint.pth"):
        problem = make_problem("resnet", "digits", workers=2, init_from=str(source))
        run = make_run("d-sgd", workers=2, problem=problem)
        # The same inputs, weights and statistics of normalization layers.
        assert run.evaluate()["test_acc"] == pytest.approx(trained["test_acc"], abs=1e-6)
        assert trained["test_acc"] > 0.3
    before = load_checkpoint(tmp_path / "dense" / "checkpoint.pth")["model"]
    options = ["--workers", "2", "--baselines", "--evaluations", "40", "--limit", "60", "--sparsity", "0.5"]
    main(command(tmp_path / "sparse", "--task", "resnet", "--init-from", str(tmp_path / "dense"), *options))
    after = torch.load(tmp_path / "sparse" / "bilevel" / "model.pth")
    assert after["model"].keys() == before.keys()
    assert torch.equal(after["model"]["bn1.running_mean"], before["bn1.running_mean"])
    assert sum(int(m.sum()) for m in after["masks"].values()) == sum(m.numel() for m in after["masks"].values()) // 2


@pytest.mark.parametrize(
    ("task", "data", "match"),
    [("svm", "digits", "is for task='resnet'"), ("resnet", "cifar10", "the network is of data='digits'")],
)
def test_a_network_to_start_from_must_fit(task, data, match, tmp_path, monkeypatch):
    images = datasets.Split(torch.zeros(9, 3, 32, 32, dtype=torch.uint8), torch.arange(9))
    read = dataclasses.replace(datasets.IMAGE_SETS["cifar10"], read=lambda path: (images, images))
    monkeypatch.setitem(datasets.IMAGE_SETS, "cifar10", read)
    state = create_model("digits_cnn").state_dict()
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": state, "config": {"arch": "digits_cnn", "data": "digits"}})
    with pytest.raises(ValueError, match=match):
        make_problem(task, data, init_from=str(tmp_path))


# -- the command -------------------------------------------------------------------------------------------------------

FLAGS = ["--epochs", "1", "--batch-size", "8", "--hidden", "4", "--reports", "3", "--seed", "3", "--inner-steps", "4"]


def command(folder, *flags):
    return ["decentralized", *FLAGS, "--output-dir", str(folder), "--quiet", *flags]


def rows(folder, name="bilevel"):
    return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]


def test_the_command_writes_figures_pictures_and_the_network(tmp_path, capsys):
    main([f for f in command(tmp_path, "--workers", "4", "--sparsity", "0.75") if f != "--quiet"])
    out = capsys.readouterr().out
    assert "spectral gap 0.666667" in out
    for name in ("bilevel", "d-sgd", "magnitude-after"):
        assert name in out
        assert rows(tmp_path, name)[-1]["bytes_total"] > 0
    assert rows(tmp_path)[-1]["sparsity"] == 0.75
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = torch.load(tmp_path / "bilevel" / "model.pth")
    assert saved["masks"]["fc1.weight"].sum() == 64
    assert not saved["model"]["fc1.weight"][~saved["masks"]["fc1.weight"]].any()


def test_the_command_resumes_to_the_same_numbers(tmp_path):
    flags = ["--workers", "3", "--baselines", "--checkpoint-freq", "4", "--epochs", "3"]
    main(command(tmp_path / "whole", *flags))
    main(command(tmp_path / "cut", *flags, "--max-rounds", "6"))
    main(command(tmp_path / "cut", *flags, "--resume"))
    main(command(tmp_path / "cut", *flags, "--resume"))  # there is nothing left to do
    # The interrupted run wrote one checkpoint more, after which positions are sent anew.
    ignored = ("bytes", "bytes_total")
    whole, cut = ([{k: v for k, v in row.items() if k not in ignored} for row in rows(tmp_path / n)]
                  for n in ("whole", "cut"))  # fmt: skip
    assert whole == cut
    models = [torch.load(tmp_path / n / "bilevel" / "model.pth") for n in ("whole", "cut")]
    assert all(torch.equal(models[0]["model"][n], models[1]["model"][n]) for n in models[0]["model"])


def test_resume_leaves_out_a_line_that_was_cut_short(tmp_path):
    flags = ["--workers", "2", "--baselines", "--epochs", "3"]
    main(command(tmp_path, *flags, "--max-rounds", "6"))
    with (tmp_path / "bilevel" / "log.jsonl").open("a") as file:
        file.write('{"round": 7, "eval')
    main(command(tmp_path, *flags, "--resume"))
    assert [row["round"] for row in rows(tmp_path)] == sorted({row["round"] for row in rows(tmp_path)})
    assert (tmp_path / "bilevel" / "model.pth").exists()


def test_resume_of_a_complete_run_without_its_log_reports_the_end(tmp_path, capsys):
    flags = ["--workers", "2", "--baselines", "--epochs", "3"]
    main(command(tmp_path, *flags))
    before = rows(tmp_path)
    (tmp_path / "bilevel" / "log.jsonl").unlink()
    main([flag for flag in command(tmp_path, *flags, "--resume") if flag != "--quiet"])
    assert rows(tmp_path) == before[-1:]
    assert f"{100 * before[-1]['test_acc']:.2f}" in capsys.readouterr().out


def test_resume_keeps_a_log_that_is_damaged_before_its_end(tmp_path, capsys):
    flags = ["--workers", "2", "--baselines", "--epochs", "3", "--reports", "9"]
    main(command(tmp_path, *flags, "--max-rounds", "6"))
    log = tmp_path / "bilevel" / "log.jsonl"
    whole = log.read_text()
    for damaged in (whole.replace("{", "", 1), "{}\n" + whole):
        log.write_text(damaged)
        with pytest.raises(SystemExit):
            main(command(tmp_path, *flags, "--resume"))
        assert f"line 1 of {log} is damaged" in capsys.readouterr().err
        assert log.read_text() == damaged


def test_a_run_that_replaces_another_does_not_go_on_from_its_checkpoints(tmp_path):
    flags = ["--workers", "2", "--baselines", "--checkpoint-freq", "4"]
    main(command(tmp_path / "run", *flags, "--epochs", "3"))
    main(command(tmp_path / "run", *flags, "--overwrite", "--max-rounds", "6"))
    main(command(tmp_path / "run", *flags, "--resume"))
    main(command(tmp_path / "new", *flags))
    new, run = (rows(tmp_path / name)[-1] for name in ("new", "run"))
    assert {**new, "bytes": 0, "bytes_total": 0} == {**run, "bytes": 0, "bytes_total": 0}


def test_resume_does_not_start_again_where_a_worker_lacks_a_checkpoint(tmp_path, capsys):
    flags = ["--workers", "3", "--baselines", "--checkpoint-freq", "4", "--epochs", "3"]
    main(command(tmp_path, *flags, "--max-rounds", "8"))
    folder = tmp_path / "bilevel"
    (folder / "worker1-4.pth").rename(folder / "worker1-1.pth")  # as if it had been lost early
    (folder / "worker1-8.pth").unlink()
    before = (folder / "log.jsonl").read_text()
    with pytest.raises(SystemExit):
        main(command(tmp_path, *flags, "--resume"))
    assert "worker 0: 4, 8; worker 1: 1; worker 2: 4, 8" in capsys.readouterr().err
    assert (folder / "log.jsonl").read_text() == before
    assert len(list(folder.glob("worker*-*.pth"))) == 5


def test_resume_leaves_no_checkpoints_of_another_course(tmp_path, capsys):
    flags = ["--workers", "2", "--baselines", "--checkpoint-freq", "2", "--epochs", "3"]
    main(command(tmp_path / "run", *flags, "--max-rounds", "6"))
    folder = tmp_path / "run" / "bilevel"
    (folder / "worker1-6.pth").unlink()
    (folder / "worker0-90.pth").write_bytes(b"not of this run")
    main(command(tmp_path / "run", *flags, "--resume", "--max-rounds", "7"))
    assert sorted(path.name for path in folder.glob("worker*")) == [
        f"worker{k}-{n}.pth" for k in (0, 1) for n in (6, 7)
    ]
    # A worker of another run, which this folder had before, writes its checkpoint late.
    main(command(tmp_path / "other", *flags, "--max-rounds", "7"))
    (tmp_path / "other" / "bilevel" / "worker1-7.pth").replace(folder / "worker1-7.pth")
    with pytest.raises(SystemExit):
        main(command(tmp_path / "run", *flags, "--resume"))
    assert "worker1-7.pth is of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--algorithm", "sgd"], "algorithm='sgd' is not known"),
        (["--data", "mnist"], "does not go with"),
        (["--workers", "0", "--graph", "star", "--epochs", "0"], "epochs=0"),
        (["--graph", "one-peer", "--workers", "3"], "power of two"),
        (["--device", "tpu"], "device='tpu' is not"),
        (["--reports", "0"], "reports=0 is not allowed; expected at least 1"),
        (["--max-rounds", "-1"], "max_rounds=-1 is not allowed; expected at least 1"),
        (["--checkpoint-freq", "-1"], "checkpoint_freq=-1 is not allowed; expected at least 0"),
        (["--epochs", "inf"], "epochs=inf is not allowed; expected a finite number"),
        (["--evaluations", "inf"], "evaluations=inf is not allowed"),
        (["--evaluations", "nan"], "evaluations=nan is not allowed"),
        (["--hidden", "-1"], "hidden=-1 is not allowed; expected a whole number, at least 1"),
        (["--hidden", "0"], "hidden=0 is not allowed"),
        (["--lr", "-1"], "lr=-1.0 is not allowed"),
        (["--rho", "2"], "rho=2.0 is not allowed"),
        (["--mixings", "0"], "mixings=0 is not allowed; expected at least 1"),
        (["--algorithm", "d-svrgda-clip-mask", "--clip-at", "1.5"], "clip_at=1.5 is not allowed"),
    ],
)
def test_bad_flags_end_in_one_line(flags, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "new", *flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_torchrun_gives_the_numbers_of_one_process(size, torchrun, tmp_path):
    flags = ["--baselines", "d-sgd-tracking"]
    main(command(tmp_path / "one", *flags, "--workers", str(size)))
    torchrun(command(tmp_path / "many", *flags), size)
    for name in ("bilevel", "d-sgd-tracking"):
        assert rows(tmp_path / "one", name) == rows(tmp_path / "many", name)


class Workers:
    """Processes that no launcher ends together: one a worker, with the variables that torchrun sets."""

    def __init__(self, size, folder, flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        self.run = [sys.executable, "-m", "sparsebilevel", *command(folder / "run", "--baselines", *flags)]
        self.common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [self.start(k) for k in range(size)]

    def start(self, rank, *flags):
        return subprocess.Popen(
            [*self.run, *flags],
            cwd=self.folder,
            env={**self.common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_rows(self, count):
        log, deadline = self.folder / "run" / "bilevel" / "log.jsonl", time.monotonic() + 100
        while not (log.exists() and log.read_text().count("\n") >= count):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes)
            time.sleep(0.02)

    def errors(self):
        return [process.communicate(timeout=200)[1] for process in self.processes]

    def codes(self):
        return [process.returncode for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()


FAILING = ["--timeout", "10", "--reports", "40"]


@pytest.mark.parametrize("on_failure", ["error", "drop"])
@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_worker_is_killed_in_the_middle_of_a_run(on_failure, size, tmp_path):
    with Workers(size, tmp_path, [*FAILING, "--on-failure", on_failure, "--epochs", "8"]) as workers:
        workers.wait_for_rows(3)
        workers.processes[2].kill()
        errors = workers.errors()
    codes = [code for k, code in enumerate(workers.codes()) if k != 2]
    if on_failure == "error":
        assert codes == [1] * (size - 1)
        # Worker 0, say, may have ended because of worker 2 before worker 1 has noticed that either is gone.
        blamed = {k: int(re.search(rf"worker {k}: worker (\d+)", errors[k])[1]) for k in range(size) if k != 2}
        for k in blamed:
            for _ in range(size):
                k = blamed.get(k, k)
            assert k == 2, errors
    else:
        assert codes == [0] * (size - 1), errors
        last = rows(tmp_path / "run")[-1]
        assert last["workers"] == size - 1
        assert last["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert last["mask_agreed"]
        assert last["consensus_error"] < rows(tmp_path / "run")[1]["consensus_error"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
def test_a_killed_worker_comes_back_with_its_checkpoint(size, tmp_path):
    flags = [*FAILING, "--on-failure", "drop", "--epochs", "50", "--search", "0.05", "--checkpoint-freq", "20"]
    with Workers(size, tmp_path, flags) as workers:
        workers.wait_for_rows(8)
        workers.processes[2].kill()
        workers.processes[2].wait()
        workers.processes[2] = workers.start(2, "--rejoin")
        errors = workers.errors()
    assert workers.codes() == [0] * size, errors
    alive = [row["workers"] for row in rows(tmp_path / "run")]
    assert alive[0] == alive[-1] == size
    assert size - 1 in alive
    assert rows(tmp_path / "run")[-1]["consensus_error"] < 0.1


@pytest.mark.slow
def test_without_worker_0_all_end_and_resume(tmp_path):
    flags = [*FAILING, "--on-failure", "drop", "--epochs", "20", "--checkpoint-freq", "3"]
    with Workers(4, tmp_path, flags) as workers:
        workers.wait_for_rows(8)
        workers.processes[0].kill()
        errors = workers.errors()
    assert workers.codes()[1:] == [1] * 3
    assert all("worker 0" in error for error in errors[1:]), errors
    with Workers(4, tmp_path, [*flags, "--resume"]) as workers:
        errors = workers.errors()
    assert workers.codes() == [0] * 4, errors
    last = rows(tmp_path / "run")[-1]
    assert last["workers"] == 4
    assert last["mask_agreed"]


def test_the_algorithms_are_what_the_document_says():
    made = {name: Settings(**choice) for name, choice in ALGORITHMS.items()}
    assert made["d-svrgda-clip-update"].clip == "update"
    assert made["d-svrgda-clip-mask"].clip == "mask"
    assert {name for name, s in made.items() if s.inner_steps == 10} == {
        *("bilevel-storm", "d-f2bsa-10", "d-sgd", "d-sgd-tracking", "magnitude-after", "magnitude-during")
    }
    assert made["d-sgd"].tracking == "none"
    for name in ("d-sgd-tracking", "magnitude-after", "magnitude-during"):
        assert made[name].tracking == "atc"


@pytest.mark.parametrize("search", [0.25, 0.8])
def test_the_budget_is_met_however_long_the_search_is(search):
    run = make_run(budget=1500, search=search)
    for _ in range(run.rounds):
        run.round()
    assert run.evaluate()["evaluations"] == pytest.approx(1500, rel=0.1)


@pytest.mark.parametrize("regularizer", ["l1", "group"])
def test_the_regularizer_pushes_the_mask_down(regularizer):
    """One step on the mask from a hypergradient of zero is one along the regularizer alone."""
    run = make_run(
        "bilevel-penalty", workers=1, regularizer=regularizer, strength=0.3, constraint="box", normalize="none"
    )
    d, k = run.maskable, 0
    run.upper = {k: lambda point: torch.zeros(d)}
    x = torch.rand(run.size).clamp(0.2, 0.8)
    run.x, run.done = {k: x}, 1
    run._mask_step()
    expected = (x[:d] - run.settings.mask_lr * run._regularizer_gradient(x[:d])).clamp(0, 1)
    assert_close(run.x[k][:d], expected)
    assert run.regularizer(run.x[k][:d]) < run.regularizer(x[:d])


def test_the_l1_regularizer_is_in_the_reported_loss():
    run = make_run(regularizer="l1", strength=0.5)
    plain = make_run()
    figures = [each.evaluate()["upper_loss"] for each in (run, plain)]
    assert run.regularizer(run.x[0][: run.maskable]) == pytest.approx(0.5 * run.maskable)
    assert figures[0] - figures[1] == pytest.approx(0.5 * run.maskable, rel=1e-4)


def test_the_reported_loss_is_that_of_the_pruned_network():
    run = make_run(sparsity=0.8)
    run.round()
    row, z = run.evaluate(), run.final_weights()
    assert torch.count_nonzero(z[: run.maskable]) == run.kept
    losses = [run.problem.local_loss(k, z) for k in range(4)]
    assert row["upper_loss"] == pytest.approx(sum(losses) / 4)
    assert run.problem.local_loss(0, run.mean_x * run.mean_y) != pytest.approx(losses[0])
