"""BiP and BiDST: the hypergradient against finite differences and closed forms, and the invariants of both methods."""

from __future__ import annotations

import copy
import gc
import io
import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_training import (
    batch,
    compute_loss,
    dense_gradients,
    masks_of,
    same_masks,
    sgd,
    sparse_net,
    take_step,
    train,
)
from torch import nn

import sparsebilevel as sb
from sparsebilevel.methods import hypergradient

DOUBLE = torch.float64


def total(weight, c, grad, formula, scale, curvature=None):
    return sum(hypergradient(weight, c, grad, formula=formula, scale=scale, curvature=curvature))


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.05, 1.0, 20.0])
def test_the_hypergradient_is_exact_for_a_linear_loss(gamma):
    """l(z) = c'z: theta* = -m*c / gamma and F(m) = l(m * theta*(m)) has the gradient -2 m c^2 / gamma."""
    c, m = torch.randn(2, 30, dtype=DOUBLE)
    m = m.sigmoid()

    def best_response(mask):
        return -mask * c / gamma

    def outer(mask):
        return (c * mask * best_response(mask)).sum()

    found = total(best_response(m), m, c, "derived", 1 / gamma)
    step = 1e-5
    for i in range(30):
        up, down = m.clone(), m.clone()
        up[i] += step
        down[i] -= step
        assert found[i] == pytest.approx(float(outer(up) - outer(down)) / (2 * step), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(found, -2 * m * c.square() / gamma)


def lower_optimum(features, target, c, gamma, iterations=0):
    """argmin over theta of |X (c*theta) - y|^2 / 2n + gamma/2 |theta|^2, its G, and the Hessian with respect to z."""
    n = len(target)
    hessian = features.T @ features / n
    system = c[:, None] * hessian * c[None] + gamma * torch.eye(len(c), dtype=DOUBLE)
    theta = torch.linalg.solve(system, c * (features.T @ target) / n)
    grad = hessian @ (c * theta) - features.T @ target / n
    return theta, grad, hessian


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_at_the_lower_optimum_the_two_terms_are_equal(gamma):
    for seed in range(10):
        torch.manual_seed(seed)
        m = (torch.rand(8, dtype=DOUBLE) < 0.6).double()
        theta, grad, _ = lower_optimum(torch.randn(40, 8, dtype=DOUBLE), torch.randn(40, dtype=DOUBLE), m, gamma)
        torch.testing.assert_close(theta, -m * grad / gamma)  # the optimum is one
        torch.testing.assert_close(total(theta, m, grad, "derived", 1 / gamma), 2 * theta * grad)


@pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_curvature_mends_the_size_of_the_implicit_term(gamma):
    """Least squares with uncorrelated features, exact diagonal: .99-1.00 of the true size; derived is too large."""
    ratios, plain = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        features, _ = torch.linalg.qr(torch.randn(60, 5, dtype=DOUBLE))
        features *= torch.rand(5, dtype=DOUBLE).add(0.5).mul(math.sqrt(60))
        target = torch.randn(60, dtype=DOUBLE)
        c = torch.rand(5, dtype=DOUBLE) * 0.9 + 0.1
        theta, grad, hessian = lower_optimum(features, target, c, gamma)

        def outer(mask, features=features, target=target):
            best, _, _ = lower_optimum(features, target, mask, gamma)
            return (features @ (mask * best) - target).square().sum() / (2 * len(target))

        true = torch.autograd.functional.jacobian(outer, c)
        ratios.append(float(total(theta, c, grad, "curvature", 1 / gamma, hessian.diagonal()).norm() / true.norm()))
        plain.append(float(total(theta, c, grad, "derived", 1 / gamma).norm() / true.norm()))
    assert 0.99 <= sorted(ratios)[20] <= 1.01
    assert sorted(plain)[20] > (1.5 if gamma <= 0.1 else 1.0)


def test_curvature_is_derived_where_the_loss_is_flat():
    theta, grad, c = torch.randn(3, 20)
    assert torch.allclose(
        total(theta, c, grad, "curvature", 3.0, torch.zeros(20)), total(theta, c, grad, "derived", 3.0), rtol=1e-4
    )


def test_the_modes_are_the_formulas_they_name():
    theta, grad = torch.randn(2, 20, dtype=DOUBLE)
    c, h = torch.rand(2, 20, dtype=DOUBLE)
    s = 0.37
    expected = {
        "none": torch.zeros(20, dtype=DOUBLE),
        "derived": -s * c * grad**2,
        "printed": -s * grad,
        "code": -s * (theta * grad) ** 2,
        "curvature": -c * grad * (grad + c * h * theta) / (1 / s + c**2 * h),
    }
    for formula, implicit in expected.items():
        direct, found = hypergradient(theta, c, grad, formula=formula, scale=s, curvature=h)
        torch.testing.assert_close(direct, theta * grad)
        torch.testing.assert_close(found, implicit)
        assert not hypergradient(theta, c, grad, formula=formula, scale=0.0, curvature=h)[1].any()
    mask = c > 0.5
    for formula in expected:  # masks are bool in BiP
        as_bool = hypergradient(theta, mask, grad, formula=formula, scale=s, curvature=h)[1]
        torch.testing.assert_close(
            as_bool, hypergradient(theta, mask.double(), grad, formula=formula, scale=s, curvature=h)[1]
        )
    with pytest.raises(
        ValueError, match="formula='exact' is not known; allowed: derived, printed, code, curvature, none"
    ):
        hypergradient(theta, c, grad, formula="exact", scale=1.0)


@pytest.mark.parametrize("formula", ["derived", "curvature"])
def test_the_two_levels_may_have_gradients_of_their_own(formula):
    theta, grad, lower = torch.randn(3, 20, dtype=DOUBLE)
    c, h = torch.rand(2, 20, dtype=DOUBLE)
    s = 0.37
    expected = {
        "derived": -s * c * lower * grad,
        "curvature": -c * grad * (lower + c * h * theta) / (1 / s + c**2 * h),
    }[formula]
    direct, found = hypergradient(theta, c, grad, formula=formula, scale=s, lower_grad=lower, curvature=h)
    torch.testing.assert_close(direct, theta * grad)
    torch.testing.assert_close(found, expected)
    same = hypergradient(theta, c, grad, formula=formula, scale=s, lower_grad=grad, curvature=h)[1]
    assert torch.equal(same, hypergradient(theta, c, grad, formula=formula, scale=s, curvature=h)[1])


class RunningMean:
    """Adam's bias-corrected mean, from its definition: weights ``decay^age`` over all values so far."""

    def __init__(self, decay):
        self.decay, self.values = decay, []

    def add(self, value):
        self.values.append(value.clone())

    def read(self):
        weights = [self.decay**age for age in range(len(self.values))][::-1]
        total = sum(w * v for w, v in zip(weights, self.values, strict=True))
        return total / sum(weights) if weights else 0.0


@pytest.mark.parametrize(("lower_gradient", "noise_counts"), [("mean", False), ("batch", True)])
def test_the_noise_of_a_batch_is_no_credit(lower_gradient, noise_counts):
    """Batches with mean 0.3 and deviation 1: earlier batches know the mean, the same batch its noise as well."""
    model = sb.sparsify(nn.Linear(100, 40, bias=False), 0.5, init="dense")
    nn.init.zeros_(model.weight)
    bip = sb.BiP(model, score_lr=1.0, implicit_scale=1.0, lower_gradient=lower_gradient)
    steps = 400
    for _ in range(steps):
        bip._update_scores({"": 0.3 + torch.randn(40, 100)})
    credit = bip.weights[""].scores[model.mask].mean().item() / steps
    assert credit == pytest.approx(0.3**2 + noise_counts * 1.0, rel=0.05)


# -- BiP --------------------------------------------------------------------------------------------------------------


def build_bip(sparsity=0.8, model_args=None, **kwargs):
    model = sparse_net(sparsity, init="dense", **(model_args or {}))
    opt = sgd(model)
    return model, opt, sb.BiP(model, opt, **kwargs)


@pytest.mark.parametrize("lower_gradient", ["mean", "batch"])
@pytest.mark.parametrize("implicit", ["none", "paper", "code", "curvature"])
def test_upper_step_is_the_formula(implicit, lower_gradient):
    settings = {"lower_gradient": lower_gradient, "gradient_decay": 0.8, "score_momentum": 0.6}
    model, _, bip = build_bip(implicit=implicit, implicit_scale=3.0, score_lr=0.7, **settings)
    velocity = {}
    means, squares = ({n: RunningMean(decay) for n in bip.weights} for decay in (0.8, 0.99))
    for step in range(1, 5):
        gradients = dense_gradients(model, lambda dense, step=step: compute_loss(dense, step))
        expected = {}
        for name, masked in bip.weights.items():
            theta, m, g = masked.weight.detach(), masked.mask.float(), gradients[name]
            lower = means[name].read() if lower_gradient == "mean" else g  # of earlier batches, or of this one
            means[name].add(g)
            squares[name].add(g**2)
            h = squares[name].read()
            implicit_term = {
                "none": torch.zeros_like(g),
                "paper": -3 * m * lower * g,
                "code": -3 * (theta * g) ** 2,
                "curvature": -m * g * (lower + m * h * theta) / (1 / 3 + m**2 * h),
            }[implicit]
            velocity[name] = 0.6 * velocity.get(name, 0) + theta * g + implicit_term
            expected[name] = masked.scores - 0.7 * velocity[name]
        bip.upper_step(lambda step=step: compute_loss(model, step))
        for name, masked in bip.weights.items():
            torch.testing.assert_close(masked.scores, expected[name], rtol=1e-4, atol=1e-6)
        flat = torch.cat([m.scores.reshape(-1) for m in bip.weights.values()])
        kept = torch.cat([m.mask.reshape(-1) for m in bip.weights.values()])
        assert flat[kept].min() >= flat[~kept].max()  # one ranking over all layers
        assert int(kept.sum()) == sum(m.num_kept for m in bip.weights.values())
    assert bip.metrics()["upper_steps"] == 4


@pytest.mark.parametrize("initial_scores", ["energy", "magnitude"])
def test_bip_starts_as_one_shot_magnitude_pruning(initial_scores):
    model, _, bip = build_bip(initial_scores=initial_scores)
    for name, layer in sb.sparse_layers(model):
        weight = layer.weight.detach()
        expected = weight * weight / 2 if initial_scores == "energy" else weight.abs()
        torch.testing.assert_close(bip.weights[name].scores, expected)
    omp_model = sparse_net(0.8, init="dense")
    assert same_masks(masks_of(bip), masks_of(sb.OMP(omp_model)))


def test_a_score_follows_the_movement_of_its_weight():
    """Plain gradient descent, both levels on one batch: the direct term keeps the score at ``theta^2 / 2``."""
    model = sparse_net(0.5, init="dense")
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    bip = sb.BiP(model, opt, implicit="none")
    start = {n: m.weight.detach().square() / 2 for n, m in bip.weights.items()}
    stayed = masks_of(bip)
    for step in range(20):
        bip.upper_step(lambda step=step: compute_loss(model, step))
        opt.zero_grad()
        compute_loss(model, step).backward()
        opt.step()
        bip.step()
        stayed = {n: stayed[n] & m.mask for n, m in bip.weights.items()}
    for name, masked in bip.weights.items():
        energy = masked.weight.detach().square() / 2
        moved = (energy - start[name])[stayed[name]]
        missed = (energy - masked.scores)[stayed[name]]
        assert missed.norm() < 0.03 * moved.norm()


def test_upper_step_costs_one_forward_and_one_backward_and_leaves_the_weights_alone():
    model, opt, bip = build_bip(score_lr=1.0)
    train(model, opt, bip, 2)
    opt.zero_grad()
    compute_loss(model, 5).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: g.clone() for n, g in grads.items()}
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = copy.deepcopy(opt.state_dict()["state"])
    forwards, backwards = [], []
    hooks = [
        model[3].register_forward_hook(lambda *_: forwards.append(1)),
        model[3].register_full_backward_hook(lambda *_: backwards.append(1)),
    ]
    masks = masks_of(bip)
    loss = bip.upper_step(lambda: compute_loss(model, 99))
    for hook in hooks:
        hook.remove()
    assert (len(forwards), len(backwards)) == (1, 1)
    assert not loss.requires_grad
    assert not same_masks(masks, masks_of(bip))
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name])
        assert p.grad is grads[name]
        assert torch.equal(p.grad, copies[name])
    changed = {n: masks[n] ^ m.mask for n, m in bip.weights.items()}
    for i, (name, _) in enumerate(model.named_parameters()):
        buffer, layer = opt.state_dict()["state"][i]["momentum_buffer"], name.rsplit(".", 1)[0]
        untouched = ~changed[layer] if layer in changed and name.endswith("weight") else ...
        assert torch.equal(buffer[untouched], state[i]["momentum_buffer"][untouched])
        if layer in changed and name.endswith("weight"):
            assert not buffer[changed[layer]].any()


def test_upper_and_lower_batches_are_separate():
    model, opt, bip = build_bip()
    scores = {n: m.scores.clone() for n, m in bip.weights.items()}
    opt.zero_grad()
    compute_loss(model, 1).backward()
    opt.step()
    bip.step()
    assert all(torch.equal(m.scores, scores[n]) for n, m in bip.weights.items())  # a lower step teaches scores nothing
    opt.zero_grad()
    bip.upper_step(lambda: compute_loss(model, 2))
    assert all(p.grad is None for p in model.parameters())
    assert any(not torch.equal(m.scores, scores[n]) for n, m in bip.weights.items())


def test_the_lower_step_moves_active_weights_by_the_gradient_and_all_by_the_ridge():
    model, _, bip = build_bip()
    opt = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.3)
    theta = {n: m.weight.detach().clone() for n, m in bip.weights.items()}
    gradients = dense_gradients(model, lambda dense: compute_loss(dense, 1))
    compute_loss(model, 1).backward()
    opt.step()
    for name, masked in bip.weights.items():
        expected = theta[name] - 0.1 * (masked.mask * gradients[name] + 0.3 * theta[name])
        torch.testing.assert_close(masked.weight.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", ["filter", "channel", "block:2x2"])
def test_bip_patterns_keep_equal_ratios(pattern):
    model, opt, bip = build_bip(0.5, {"pattern": pattern}, score_lr=2.0)
    assert bip.scope == "layer"
    for step in range(6):
        take_step(model, opt, bip, step)
        for masked in bip.weights.values():
            assert masked.pattern.count(masked.mask) == masked.num_kept == round(Fraction(masked.num_groups, 2))


def test_bip_global_filters_on_request():
    model, opt, bip = build_bip(0.5, {"pattern": "filter"}, scope="global", score_lr=2.0)
    train(model, opt, bip, 4)
    assert sum(m.pattern.count(m.mask) for m in bip.weights.values()) == sum(m.num_kept for m in bip.weights.values())


def test_bip_leaves_dense_layers_dense():
    model, opt, bip = build_bip(0.8, {"dense_first": True})
    train(model, opt, bip, 3)
    assert bip.weights["0"].mask.all()
    assert int(bip.weights["3"].mask.sum() + bip.weights["6"].mask.sum()) == 86 + 72


@pytest.mark.parametrize("with_masks", [False, True])
def test_bip_finishes_and_rewinds(with_masks):
    model, opt, bip = build_bip(score_lr=1.0)
    start = {k: v.clone() for k, v in model.state_dict().items() if with_masks or "mask" not in k}
    train(model, opt, bip, 5)
    masks = masks_of(bip)
    bip.finish(rewind_to=start)
    assert same_masks(masks, masks_of(bip))
    assert not opt.state
    for name, masked in bip.weights.items():
        assert torch.equal(masked.weight, start[f"{name}.weight"] * masks[name])
    assert not any("mask_scores" in key for key in model.state_dict())
    train(model, opt, bip, 20)
    assert not any(m.weight[~m.mask].any() for m in bip.weights.values())
    assert same_masks(masks, masks_of(bip))
    with pytest.raises(RuntimeError, match="upper_step after finish"):
        bip.upper_step(lambda: compute_loss(model, 1))


@pytest.mark.parametrize("steps", [3, 150])
def test_a_run_without_upper_steps_is_said_once(steps, caplog):
    model, opt, bip = build_bip()
    for step in range(steps):
        compute_loss(model, step).backward()
        opt.step()
        bip.step()
    assert ("no upper_step in 100 steps" in caplog.text) == (steps > 100)
    bip.finish()
    assert caplog.text.count("its mask is still that of one-shot magnitude pruning") == 1
    states = model.state_dict(), bip.state_dict()
    model, _, bip = build_bip()
    caplog.clear()
    model.load_state_dict(states[0])
    bip.load_state_dict(states[1])
    assert bip.finished
    assert not caplog.text


def test_an_upper_step_of_another_model_is_refused():
    model, _, bip = build_bip()
    with pytest.raises(RuntimeError, match="BiP needs the gradient of this step.* was it of another model"):
        bip.upper_step(lambda: compute_loss(copy.deepcopy(model), 0))


def test_rewinding_to_another_model_is_refused():
    _, _, bip = build_bip()
    with pytest.raises(RuntimeError, match="size mismatch"):
        bip.finish(rewind_to={k: v[:1] for k, v in bip.model.state_dict().items() if v.dim()})


def test_an_error_in_the_closure_leaves_gradients_and_scores_alone():
    model, _, bip = build_bip()
    compute_loss(model, 0).backward()
    grads = [p.grad for p in model.parameters()]
    scores = {n: m.scores.clone() for n, m in bip.weights.items()}

    def closure():
        compute_loss(model, 1)
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        bip.upper_step(closure)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(m.scores, scores[n]) for n, m in bip.weights.items())
    assert all(m.layers[0].score_support == "none" for m in bip.weights.values())


def test_upper_step_with_a_scaler():
    def run(scale, factor=1.0):
        model, _, bip = build_bip(score_lr=1.0)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            bip.upper_step(lambda step=step: compute_loss(model, step) * factor, scaler)
        return bip

    plain, scaled = run(None), run(256.0)
    for a, b in zip(plain.weights.values(), scaled.weights.values(), strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
    skipped = run(256.0, factor=float("inf"))
    assert skipped.upper_steps == 0
    assert not skipped._mean_grad.sums
    assert all(m.scores.isfinite().all() for m in skipped.weights.values())


def test_gradients_in_the_buckets_of_ddp_survive_an_upper_step(tmp_path):
    def run(wrap):
        model, _, bip = build_bip()
        net = wrap(model)
        for step in range(2):  # DDP settles its buckets after the first backward pass
            model.zero_grad()
            compute_loss(net, step).backward()
        bip.upper_step(lambda: compute_loss(net, 2))
        compute_loss(net, 3).backward()  # accumulation goes on
        return [p.grad.clone() for p in model.parameters()]

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        found = run(lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))
    finally:
        gc.collect()  # the wrapped model holds the process group, whose threads must end before the process does
        dist.destroy_process_group()
    torch.testing.assert_close(found, run(lambda model: model))


def test_after_finish_a_topology_change_changes_nothing():
    model, opt, bip = build_bip(update_freq=2)
    train(model, opt, bip, 3)
    bip.finish()
    kept = masks_of(bip)
    train(model, opt, bip, 4, start=3)
    assert same_masks(kept, masks_of(bip))


# -- BiDST ------------------------------------------------------------------------------------------------------------


def build_bidst(sparsity=0.8, model_args=None, opt_args=None, **kwargs):
    model = sparse_net(sparsity, **(model_args or {}))
    opt = sgd(model, **(opt_args or {}))
    defaults = {"search_space": 0.1, "update_freq": 5}
    return model, opt, sb.BiDST(model, opt, **defaults | kwargs)


def search_space(bidst):
    return {n: bidst.learning_mask(m) & ~m.mask for n, m in bidst.weights.items()}


def test_scores_start_at_what_the_weights_are_worth():
    _, _, bidst = build_bidst(tau=0.8, initial_score=-0.4, margin=0.25)
    psi = 1 / (1 + math.exp(0.4 / 0.8))
    for name, masked in bidst.weights.items():
        expected = -0.4 + psi * (1 - psi) / 0.8 * masked.weight.detach() ** 2 / 2
        torch.testing.assert_close(masked.scores[masked.mask], expected[masked.mask])
        extra = search_space(bidst)[name]
        assert extra.any()
        assert (masked.scores[extra] == torch.tensor(-0.4 - 0.25)).all()
        assert (masked.scores[~(masked.mask | extra)] == -math.inf).all()
    build_bidst(initial_score=-1e6)  # saturated, but no overflow


def test_an_active_score_follows_the_movement_of_its_weight():
    """Plain gradient descent: the direct term keeps the score at ``psi' * theta^2 / 2``, here ``theta^2 / 8``."""
    model = sparse_net(0.5)
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    bidst = sb.BiDST(model, opt)
    start = {n: m.weight.detach().square() / 8 for n, m in bidst.weights.items()}
    train(model, opt, bidst, 20)
    for name, masked in bidst.weights.items():
        worth = masked.weight.detach().square() / 8
        moved = (worth - start[name])[masked.mask]
        missed = (worth - masked.scores)[masked.mask]
        assert missed.norm() < 0.03 * moved.norm()


@pytest.mark.parametrize("implicit_on", ["search", "all"])
@pytest.mark.parametrize("lower_gradient", ["mean", "batch"])
@pytest.mark.parametrize("implicit", ["derived", "paper", "curvature", "none"])
def test_the_score_update_is_the_formula(implicit, lower_gradient, implicit_on):
    settings = {"lower_gradient": lower_gradient, "implicit_on": implicit_on, "gradient_decay": 0.8}
    opt_args = {"lr": 0.3, "momentum": 0.5}
    model, opt, bidst = build_bidst(implicit=implicit, implicit_scale=50.0, tau=0.8, opt_args=opt_args, **settings)
    means, squares = ({n: RunningMean(decay) for n in bidst.weights} for decay in (0.8, 0.99))
    for step in range(1, 5):
        gradients = dense_gradients(model, lambda dense, step=step: compute_loss(dense, step))
        before = {n: m.scores.clone() for n, m in bidst.weights.items()}
        opt.zero_grad()
        compute_loss(model, step).backward()
        opt.step()
        theta = {n: m.weight.detach().clone() for n, m in bidst.weights.items()}
        bidst.step()
        for name, masked in bidst.weights.items():
            u, w, g = before[name], theta[name], gradients[name]
            psi = torch.sigmoid(u / 0.8)
            lower = means[name].read() if lower_gradient == "mean" else g  # of earlier batches, or of this one
            means[name].add(g)
            squares[name].add(g**2)
            h = squares[name].read()
            implicit_term = {
                "derived": -50 * psi * lower * g,
                "paper": -50 * g,
                "curvature": -psi * g * (lower + psi * h * w) / (1 / 50 + psi**2 * h),
                "none": torch.zeros_like(g),
            }[implicit]
            if implicit_on == "search":
                implicit_term = implicit_term * ~masked.mask
            expected = u - 0.3 / (1 - 0.5) * (w * g + implicit_term) * psi * (1 - psi) / 0.8
            inside = u > -math.inf
            torch.testing.assert_close(masked.scores[inside], expected[inside], rtol=1e-4, atol=1e-6)
            assert (masked.scores[~inside] == -math.inf).all()


def test_the_implicit_scale_is_the_horizon_until_the_next_change():
    _, opt, bidst = build_bidst(update_freq=40, opt_args={"lr": 0.2, "momentum": 0.5})
    name = next(iter(bidst.weights))
    assert bidst.current_implicit_scale(name) == pytest.approx(40 * 0.2 / (1 - 0.5))
    opt.param_groups[0]["lr"] = 0.05
    assert bidst.current_implicit_scale(name) == pytest.approx(40 * 0.05 / (1 - 0.5))
    _, _, bidst = build_bidst(update_freq=40, implicit_scale=3.0)
    assert bidst.current_implicit_scale(name) == 3.0
    # Over an interval longer than the horizon, credits add up to what they would over the horizon.
    _, _, bidst = build_bidst(update_freq=40, horizon=10, opt_args={"lr": 0.2, "momentum": 0.5})
    assert 40 * bidst.current_implicit_scale(name) == pytest.approx(10 * 10 * 0.2 / (1 - 0.5))


def test_no_update_interval_is_said(caplog):
    build_bidst(update_freq=0)
    assert "never changes the topology" in caplog.text


def test_the_search_space_learns_through_the_implicit_term_only():
    moved = {}
    for implicit in ("none", "derived", "paper"):
        model, opt, bidst = build_bidst(implicit=implicit, implicit_scale=10.0, lower_gradient="batch")
        extra = search_space(bidst)
        before = {n: m.scores.clone() for n, m in bidst.weights.items()}
        train(model, opt, bidst, 3)
        moved[implicit] = torch.cat([(m.scores - before[n])[extra[n]] for n, m in bidst.weights.items()])
        active = torch.cat([(m.scores - before[n])[m.mask] for n, m in bidst.weights.items()])
        assert active.abs().max() > 0
    assert (moved["none"] == 0).all()
    assert (moved["derived"] >= 0).all()
    assert (moved["derived"] > 0).float().mean() > 0.9
    assert 0.2 < (moved["paper"] > 0).float().mean() < 0.8


def test_the_first_batch_gives_no_credit():
    """No earlier batch says how the lower level moves; from the second on the credit may have either sign."""
    model, opt, bidst = build_bidst()
    extra = search_space(bidst)
    train(model, opt, bidst, 1)
    assert all((m.scores[extra[n]] == 0).all() for n, m in bidst.weights.items())
    train(model, opt, bidst, 1, start=1)
    credit = torch.cat([m.scores[extra[n]] for n, m in bidst.weights.items()])
    assert (credit != 0).float().mean() > 0.8
    assert 0.1 < (credit > 0).float().mean() < 0.9


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "block:2x2", "block:4x4", "nm:1:2"])
@pytest.mark.parametrize("gumbel", [True, False])
def test_counts_search_space_and_topology(pattern, gumbel):
    sparsity = 0.5 if pattern != "unstructured" else 0.8
    settings = {"search_space": 0.3, "gumbel": gumbel, "initial_score": 0.125, "margin": 0.0625}
    model, opt, bidst = build_bidst(sparsity, {"pattern": pattern}, implicit_scale=1e5, **settings)
    wanted = {n: min(round(0.3 * m.num_groups), m.num_groups - m.num_kept) for n, m in bidst.weights.items()}
    changes = 0
    for step in range(1, 21):
        old, old_space = masks_of(bidst), search_space(bidst)
        changed = take_step(model, opt, bidst, step)
        assert changed == (step % 5 == 0)
        for name, masked in bidst.weights.items():
            extra = search_space(bidst)[name]
            assert masked.pattern.count(masked.mask) == masked.num_kept
            assert masked.pattern.count(extra) == wanted[name]
            assert ((masked.scores > -math.inf) == (masked.mask | extra)).all()
            assert masked.scores[masked.mask | extra].isfinite().all()
            assert not masked.weight[~masked.mask].any()
            grown, left = masked.mask & ~old[name], old[name] & ~masked.mask
            if changed:
                changes += int(grown.sum())
                assert not (grown & ~old_space[name]).any()  # only the search space grows
                assert not (left & ~extra).any()  # and what leaves goes back there,
                assert (masked.scores[extra] == 0.125 - 0.0625).all()  # where everything starts anew
                assert not opt.state[masked.weight]["momentum_buffer"][grown | left].any()
            else:
                assert not (grown | left).any()
                assert torch.equal(extra, old_space[name])
    assert changes > 0
    if pattern.startswith("nm"):
        assert all((m.mask.movedim(1, -1).reshape(-1, 2).sum(1) == 1).all() for m in bidst.weights.values())


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "block:4x5"])
def test_without_learning_the_topology_stays(pattern):
    model, opt, bidst = build_bidst(0.6, {"pattern": pattern}, search_space=0.3, score_lr=0.0)
    before = masks_of(bidst)
    train(model, opt, bidst, 12)
    assert len(bidst.history) == 2
    assert same_masks(before, masks_of(bidst))
    assert all(record["iou"] == 1 and record["grown"] == 0 for record in bidst.history)


def test_the_search_space_is_repeatable_and_drawn_anew():
    def run(seed):
        model, opt, bidst = build_bidst(seed=seed)
        first = search_space(bidst)
        train(model, opt, bidst, 5)
        return first, search_space(bidst)

    (a0, a1), (b0, b1), (c0, _) = run(1), run(1), run(2)
    assert same_masks(a0, b0)
    assert same_masks(a1, b1)
    assert not same_masks(a0, c0)
    assert all((a0[n] & ~a1[n]).any() for n in a0)


@pytest.mark.parametrize("gumbel", [True, False])
def test_scores_stay_bounded(gumbel):
    """|g| = 0.01, lambda = 1e-4 and a step of 0.1: plain scores overflow within a thousand steps."""
    model = sb.sparsify(nn.Linear(20, 20, bias=False), 0.8, seed=0)
    bidst = sb.BiDST(model, search_space=0.1, score_lr=0.1, implicit_scale=1e4, gumbel=gumbel)
    signs = torch.randn(20, 20).sign()
    for _ in range(1000):
        (model(torch.eye(20)) * signs * 0.01).sum().backward()
        bidst.step()
    inside = model.mask_scores[bidst.learning_mask(bidst.weights[""])]
    assert inside.isfinite().all()
    assert inside.abs().max() < 1000
    assert torch.sigmoid(inside).min() > 0


@pytest.mark.parametrize("name", ["derived", "curvature"])
def test_accumulated_gradients_make_one_hypergradient(name):
    def run(parts):
        model, opt, bidst = build_bidst(implicit=name, update_freq=2)
        model.eval()  # the statistics of a batch would differ from those of its halves
        for step in range(4):
            x, y = batch(step)
            opt.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(xs), ys) / parts).backward()
            opt.step()
            bidst.step()
        return bidst

    for whole, halves in zip(run(1).weights.values(), run(2).weights.values(), strict=True):
        inside = whole.scores > -math.inf
        assert torch.equal(inside, halves.scores > -math.inf)
        assert torch.equal(whole.mask, halves.mask)
        torch.testing.assert_close(whole.scores[inside], halves.scores[inside], rtol=1e-3, atol=1e-5)


def test_what_grows_keeps_its_credit_and_what_leaves_loses_it():
    model, opt, bidst = build_bidst(update_freq=0, implicit_scale=300.0, initial_score=0.1, margin=0.05)
    train(model, opt, bidst, 5)
    before, masks = {n: m.scores.clone() for n, m in bidst.weights.items()}, masks_of(bidst)
    bidst.change_topology()
    changes = 0
    for name, masked in bidst.weights.items():
        grown, left = masked.mask & ~masks[name], masks[name] & ~masked.mask
        changes += int(grown.sum())
        assert torch.equal(masked.scores[masked.mask], before[name][masked.mask])
        assert (masked.scores[left] == torch.tensor(0.1 - 0.05)).all()
        if grown.any():
            assert before[name][grown].min() >= before[name][left].max()
    assert changes > 0


def test_the_running_means_follow_their_positions():
    model, opt, bidst = build_bidst(implicit="curvature")
    train(model, opt, bidst, 4)
    masked = bidst.weights["3"]

    def values(mean):
        return dict(zip(masked.layers[0].support_positions.tolist(), mean.sums["3"].tolist(), strict=True))

    means = {bidst._mean_grad: 0.0, bidst._curvature: float(bidst._curvature.sums["3"].mean())}
    old = {mean: values(mean) for mean in means}
    bidst.change_topology()
    for mean, fresh in means.items():  # what is new there has no gradient yet, and the curvature of the layer
        new = values(mean)
        assert old[mean].keys() & new.keys()
        assert new.keys() - old[mean].keys()
        for position, value in new.items():
            assert value == pytest.approx(old[mean].get(position, fresh), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"cls": cls, "lower_gradient": lower_gradient, "implicit": implicit} | more
        for cls, more in [
            (sb.BiDST, {"gumbel": True, "tau_end": 0.5, "update_end": 100}),
            (sb.BiDST, {"implicit_on": "all", "margin": 0.1, "initial_score": 0.2}),
            (sb.BiP, {"score_momentum": 0.0}),
            (sb.BiP, {"score_momentum": 0.9, "initial_scores": "magnitude", "score_lr": 0.1}),
        ]
        for lower_gradient in ("mean", "batch")
        for implicit in ("paper", "curvature", "none")
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_run(settings):
    def build(seed):
        model = sparse_net(0.8, seed, init="random" if cls is sb.BiDST else "dense")
        opt = sgd(model)
        return model, opt, cls(model, opt, **settings)

    settings = dict(settings)
    cls = settings.pop("cls")
    if cls is sb.BiDST:
        settings |= {"search_space": 0.1, "update_freq": 3}
    first = build(0)
    train(*first, 7)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = build(77)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for run in (first, second):
        train(*run, 8, start=7)
    for (key, a), b in zip(first[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(first[2].generator.get_state(), second[2].generator.get_state())
    a, b = (run[2].metrics() for run in (first, second))
    assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}


def test_a_mask_from_outside_gives_its_positions_a_score():
    model, opt, bidst = build_bidst(initial_score=0.3, margin=0.1)
    train(model, opt, bidst, 7)
    masked = bidst.weights["3"]
    before, old, extra = masked.scores.clone(), masked.mask.clone(), search_space(bidst)["3"]
    outside = (~bidst.learning_mask(masked)).reshape(-1).nonzero()[:10].squeeze(1)
    mask = old.clone()
    mask.view(-1)[old.view(-1).nonzero()[:10].squeeze(1)] = False
    mask.view(-1)[outside] = True
    bidst.set_masks({"3": mask})
    assert (masked.scores.view(-1)[outside] == torch.tensor(0.3)).all()
    assert torch.equal(masked.scores[mask & old], before[mask & old])
    assert int(search_space(bidst)["3"].sum()) == int(extra.sum())
    train(model, opt, bidst, 3, start=7)
    assert masked.scores[masked.mask].isfinite().all()
    assert int(masked.mask.sum()) == masked.num_kept


@pytest.mark.parametrize("kept", [0, 40, 86, 400, 432])
def test_a_mask_of_another_size_keeps_the_size_of_the_search_space(kept):
    _, _, bidst = build_bidst()
    old, mask = bidst.weights["3"].mask.clone(), torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    mask.view(-1)[:kept] = True
    bidst.set_masks({"3": mask})
    left = int((old & ~mask).sum())  # more may leave than E is meant to hold
    assert int(search_space(bidst)["3"].sum()) == min(max(43, left), 432 - kept)


def test_a_second_method_on_a_model_starts_afresh():
    model = sparse_net(0.3, distribution="erk")  # with a dense layer
    opt = sgd(model)
    rigl = sb.RigL(model, opt, update_freq=1)
    assert all(m.layers[0].score_support == "all" for m in rigl.weights.values())
    rigl.release()
    for seed in (1, 2):
        bidst = None
        bidst = sb.BiDST(model, opt, search_space=0.1, seed=seed)
        for masked in bidst.weights.values():
            found, expected = masked.layers[0].support_positions, bidst.learning_mask(masked).reshape(-1).nonzero()
            assert found is None if masked.is_dense else torch.equal(found, expected.squeeze(1))
        train(model, opt, bidst, 2)


def test_scores_of_a_model_that_goes_to_channels_last_still_learn():
    def run(memory_format):
        model, opt, bidst = build_bidst()
        model.to(memory_format=memory_format)
        train(model, opt, bidst, 2)
        return bidst.weights["3"].scores

    scores = run(torch.channels_last)
    assert not scores.is_contiguous()
    torch.testing.assert_close(scores.contiguous(), run(torch.contiguous_format))


def test_gumbel_moves_psi_and_never_the_mask():
    model, opt, bidst = build_bidst(gumbel=True, update_freq=0)
    other_model, other_opt, other = build_bidst(gumbel=False, update_freq=0)
    before = masks_of(bidst)
    train(model, opt, bidst, 3)
    train(other_model, other_opt, other, 3)
    assert same_masks(before, masks_of(bidst))
    assert torch.equal(model[3].weight, other_model[3].weight)  # the forward pass sees no noise
    assert not torch.equal(bidst.weights["3"].scores, other.weights["3"].scores)


def test_the_temperature_goes_down_until_the_end():
    _, _, bidst = build_bidst(tau=1.0, tau_end=0.5, update_end=100)
    for step, tau in ((0, 1.0), (50, 0.75), (100, 0.5), (300, 0.5)):
        bidst.step_count = step
        assert bidst.current_tau() == pytest.approx(tau)
    _, _, bidst = build_bidst(tau=0.7, tau_end=None, update_end=100)
    bidst.step_count = 50
    assert bidst.current_tau() == 0.7


@pytest.mark.parametrize("size", [0, 0.0, 0.99])
def test_extreme_search_spaces(size):
    model, opt, bidst = build_bidst(search_space=size)
    before = masks_of(bidst)
    train(model, opt, bidst, 6)
    for name, masked in bidst.weights.items():
        assert int(masked.mask.sum()) == masked.num_kept
        if not size:
            assert torch.equal(masked.mask, before[name])
        else:
            assert bidst.learning_mask(masked).all()


def test_bidst_with_erk_leaves_its_dense_layers_alone():
    model, opt, bidst = build_bidst(0.3, {"distribution": "erk"})
    dense = [n for n, m in bidst.weights.items() if m.num_kept == m.num_groups]
    assert dense
    train(model, opt, bidst, 6)
    for name, masked in bidst.weights.items():
        assert int(masked.mask.sum()) == masked.num_kept
        assert (masked.layers[0].score_support == "none") == (name in dense)


def test_the_score_step_follows_the_learning_rate_of_its_weight():
    model = sparse_net()
    opt = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[1:].parameters(), "lr": 0.1}])
    bidst = sb.BiDST(model, opt, gumbel=False)
    before = {n: m.scores.clone() for n, m in bidst.weights.items()}
    take_step(model, opt, bidst, 0)
    assert torch.equal(bidst.weights["0"].scores, before["0"])
    assert not torch.equal(bidst.weights["3"].scores, before["3"])
    opt.param_groups[0] |= {"lr": 0.2, "momentum": 0.75}
    assert [bidst.current_score_lr(name) for name in ("0", "3")] == [pytest.approx(0.8), 0.1]
    bidst = None
    assert sb.BiP(model, torch.optim.Adam(model.parameters(), 1e-3)).current_score_lr("3") == 1e-3
    assert sb.BiP(model, score_lr=0.3).current_score_lr("3") == 0.3
    with pytest.raises(ValueError, match="'3' is in no optimizer, which gives its scores no pace; give score_lr and "):
        sb.BiDST(model, torch.optim.SGD(model[0].parameters(), 0.1))


def constant_steps(make, grad, steps=200):
    """How far a weight goes for a constant gradient, a step, over that gradient; with a run of BiDST that knows it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    sb.sparsify(model, 0.0)
    opt = make(model.parameters())
    bidst = sb.BiDST(model, opt, score_lr=None, implicit="none")
    for _ in range(steps):
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.full((2, 2), grad)
        opt.step()
    return float((before - model[0].weight.detach())[0, 0]) / grad, float(bidst.current_score_lr("0"))


class CountingAdam(torch.optim.Optimizer):
    """Adam whose step is a number, as outside of torch."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p] or {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = state
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 0.1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 0.001)
            mean = state["exp_avg"] / (1 - 0.9 ** state["step"])
            square = state["exp_avg_sq"] / (1 - 0.999 ** state["step"])
            p.sub_(0.01 * mean / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("grad", [1e-3, 2.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, 0.01),
        lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9),
        lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9, dampening=0.5),
        lambda ps: torch.optim.Adam(ps, 0.01),
        lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.0),
        lambda ps: torch.optim.RMSprop(ps, 0.01, alpha=0.9),
        lambda ps: torch.optim.RMSprop(ps, 0.01, alpha=0.9, momentum=0.8),
        lambda ps: torch.optim.Adagrad(ps, 0.01),
        lambda ps: torch.optim.Adadelta(ps, 1.0),
        lambda ps: CountingAdam(ps),
    ],
)
def test_the_score_step_is_that_of_the_weights_whatever_the_optimizer(make, grad):
    moved, rate = constant_steps(make, grad)
    assert rate == pytest.approx(moved, rel=2e-3)  # Adadelta's last step has changed its mean of steps


def test_scores_learn_as_fast_with_adam_as_with_sgd():
    grown = {}
    for name, make in (("sgd", sgd), ("adamw", lambda model: torch.optim.AdamW(model.parameters(), 3e-3))):
        model = sparse_net(0.9)
        opt = make(model)
        bidst = sb.BiDST(model, opt, update_freq=20)
        train(model, opt, bidst, 60)
        grown[name] = sum(record["grown"] for record in bidst.history)
    assert grown["adamw"] > grown["sgd"] / 2 > 0


def test_an_optimizer_whose_steps_are_not_known_is_named(caplog):
    for given, missing in (
        ({}, "score_lr and no implicit_scale is"),
        ({"score_lr": 0.1}, "implicit_scale is"),
        ({"implicit_scale": 1.0}, "score_lr is"),
    ):
        caplog.clear()
        model = sparse_net()
        opt = torch.optim.Rprop(model.parameters(), 0.01)
        train(model, opt, sb.BiDST(model, opt, update_freq=2, **given), 3)
        assert caplog.text.count(f"BiDST takes Rprop for plain SGD, since no {missing} given") == 1
    caplog.clear()
    model = sb.sparsify(nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)), 0.5)
    opt = torch.optim.Muon(model.parameters(), 0.02)  # has a momentum, and steps of another size
    bidst = sb.BiDST(model, opt, update_freq=2)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        opt.step()
        bidst.step()
    assert caplog.text.count("BiDST takes Muon for plain SGD") == 1
    model = sparse_net()
    opt = torch.optim.SGD(model.parameters(), 0.01, momentum=1.0)
    with pytest.raises(ValueError, match="momentum is 1.0, which gives no step size; give score_lr and implicit_scale"):
        train(model, opt, sb.BiDST(model, opt, update_freq=2), 1)


def test_a_gradient_that_was_nan_is_named_with_its_layer():
    model = sparse_net()
    opt = sgd(model)
    bidst = sb.BiDST(model, opt, update_freq=2)
    (compute_loss(model, 0) * float("nan")).backward()  # skipped by the loop
    opt.zero_grad()
    with pytest.raises(ValueError, match=r"'0': scores must not be NaN.*sparsifier.zero_grad\(\) beside"):
        train(model, opt, bidst, 2)


@pytest.mark.parametrize("name", ["bip", "bidst"])
def test_metrics_may_be_read_again(name):
    model = sparse_net(init="dense" if name == "bip" else "random")
    opt = sgd(model)
    sparsifier = sb.BiP(model, opt) if name == "bip" else sb.BiDST(model, opt, update_freq=10)
    train(model, opt, sparsifier, 3)
    assert sparsifier.metrics() == sparsifier.metrics()
    assert sparsifier.metrics()["direct"] > 0
    sparsifier.reset_metrics()
    assert "direct" not in sparsifier.metrics()


def test_a_model_may_become_double_between_steps():
    model = sparse_net()
    opt = sgd(model)
    bidst = sb.BiDST(model, opt, update_freq=10)
    train(model, opt, bidst, 3)
    model.double()
    x, y = batch(5)
    F.cross_entropy(model(x.double()), y).backward()
    bidst.step()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (sb.BiP, {"implicit": "exact"}, "implicit='exact' is not known; allowed: paper, code, curvature, none"),
        (sb.BiP, {"implicit_scale": -1.0}, "implicit_scale=-1.0 is not allowed; expected a finite number >= 0"),
        (sb.BiP, {"score_lr": float("nan")}, "score_lr=nan is not allowed; expected a finite number >= 0"),
        (sb.BiP, {"score_momentum": -0.9}, "score_momentum=-0.9 is not allowed"),
        (sb.BiP, {"scope": "net"}, "scope='net' is not known; allowed: global, layer"),
        (sb.BiP, {"curvature_decay": 1.0}, r"curvature_decay=1.0 is not allowed; expected a number in \[0, 1\)"),
        (sb.BiDST, {"implicit": "code"}, "implicit='code' is not known; allowed: derived, paper, curvature, none"),
        (sb.BiDST, {"horizon": 0}, "horizon=0 is not allowed; expected a whole number, at least 1"),
        (sb.BiDST, {"horizon": "5"}, "horizon='5' is not allowed; expected a whole number, at least 1"),
        (sb.BiP, {"implicit_scale": None}, "implicit_scale=None is not allowed; expected a finite number >= 0"),
        (sb.BiDST, {"implicit_scale": float("inf")}, "implicit_scale=inf is not allowed"),
        (sb.BiDST, {"search_space": 1.0}, r"search_space=1.0 is not allowed; expected a number in \[0, 1\)"),
        (sb.BiDST, {"search_space": -0.1}, "search_space=-0.1 is not allowed"),
        (sb.BiDST, {"tau": 0.0}, "tau=0.0, tau_end=None are not allowed; temperatures are positive"),
        (sb.BiDST, {"tau": float("nan")}, "tau=nan, tau_end=None are not allowed"),
        (sb.BiDST, {"tau_end": -1.0}, "tau=1.0, tau_end=-1.0 are not allowed"),
        (sb.BiDST, {"margin": -0.1}, "margin=-0.1 is not allowed; expected a finite number >= 0"),
        (sb.BiDST, {"initial_score": math.inf}, "initial_score=inf is not allowed; expected a finite number"),
        (sb.BiDST, {"initial_score": math.nan}, "initial_score=nan is not allowed; expected a finite number"),
        (sb.BiDST, {"implicit_on": "active"}, "implicit_on='active' is not known; allowed: search, all"),
        (sb.BiDST, {"lower_gradient": "sum"}, "lower_gradient='sum' is not known; allowed: mean, batch"),
        (sb.BiDST, {"gradient_decay": 1.0}, r"gradient_decay=1.0 is not allowed; expected a number in \[0, 1\)"),
        (sb.BiP, {"lower_gradient": "sum"}, "lower_gradient='sum' is not known; allowed: mean, batch"),
        (sb.BiP, {"initial_scores": "theta"}, "initial_scores='theta' is not known; allowed: energy, magnitude"),
        (sb.BiP, {"optimizer": None}, "score_lr=None takes the optimizer's learning rate, but no optimizer was given"),
        (sb.BiDST, {"score_lr": -0.1}, "score_lr=-0.1 is not allowed; expected a finite number >= 0"),
        (
            sb.BiDST,
            {"optimizer": None},
            "score_lr=None takes the optimizer's learning rate, but no optimizer was given",
        ),
        (sb.BiDST, {"curvature_decay": -0.1}, "curvature_decay=-0.1 is not allowed"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    model = sparse_net()
    with pytest.raises(ValueError, match=message):
        cls(model, **{"optimizer": sgd(model)} | arguments)


# -- clipped, frozen and broken gradients -----------------------------------------------------------------------------


def clipped_run(cls, lr, factor, steps=9):
    """Scores, weights and masks after steps on gradients that were shrunk to a fraction, of both levels."""
    model = sparse_net(0.8, init="random" if cls is sb.BiDST else "dense")
    opt = sgd(model, lr, weight_decay=0.0)
    method = cls(model, opt, **({"update_freq": 3, "search_space": 0.2} if cls is sb.BiDST else {"implicit": "none"}))
    shrunk = []
    for step in range(steps):
        opt.zero_grad()
        compute_loss(model, step).backward()
        if cls is sb.BiP:  # the upper batch is the same one
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            max_norm = float(factor * norm) if factor < 1 else None
            method.upper_step(lambda step=step: compute_loss(model, step), max_norm=max_norm)
        for p in model.parameters():
            p.grad *= factor
        opt.step()
        if cls is sb.BiDST:
            for w in method.weights.values():
                at = w.layers[0].support_positions
                shrunk.append(float(method._clipping(w, at, w.mask.reshape(-1)[at], w.effective_grad)))
        method.step()
    scores = [torch.where(w.scores.isfinite(), w.scores, 0) for w in method.weights.values()]
    return [*scores, *(p.detach() for p in model.parameters()), *(w.mask for w in method.weights.values())], shrunk


@pytest.mark.parametrize("cls", [sb.BiDST, sb.BiP])
def test_scores_keep_the_pace_of_weights_whose_gradients_are_clipped(cls):
    """Gradients of a quarter are, to weights and so to scores, a learning rate of a quarter."""
    clipped, shrunk = clipped_run(cls, 0.2, 0.25)
    slow, whole = clipped_run(cls, 0.05, 1.0)
    fast, _ = clipped_run(cls, 0.2, 1.0)
    assert shrunk == pytest.approx([0.25] * len(shrunk))
    assert set(whole) <= {1.0}  # to the last bit: who does not clip notices nothing
    for a, b in zip(clipped, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(clipped[0], fast[0])


def test_what_is_no_clipping_leaves_the_gradient_alone():
    model, opt, bidst = build_bidst()
    masked = bidst.weights["3"]
    at = masked.layers[0].support_positions
    active, grad = masked.mask.reshape(-1)[at], torch.randn(at.numel())
    assert bidst._clipping(masked, at, active, grad) == 1  # no gradient, as after zero_grad
    for left in (0.0, -1.0, 4096.0, math.nan):
        dense = torch.zeros(masked.weight.numel())
        dense[at] = grad * left
        masked.weight.grad = dense.view_as(masked.weight)
        assert bidst._clipping(masked, at, active, grad) == 1
    assert bidst._clipping(masked, at, active, torch.zeros_like(grad)) == 1
    dense[at] = 0.5 * grad
    masked.weight.grad = dense.view_as(masked.weight)
    assert bidst._clipping(masked, at, active, grad) == pytest.approx(0.5)
    dense[at[::2]] *= 0.5  # another direction
    assert bidst._clipping(masked, at, active, grad) == 1
    tiny = 1e-18 * grad  # whose squares would vanish if they were multiplied
    dense[at] = 0.5 * tiny
    assert bidst._clipping(masked, at, active, tiny) == pytest.approx(0.5)
    bidst.step_with({n: torch.zeros(w.layers[0].support_positions.numel()) for n, w in bidst.weights.items()})


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, "1"])
def test_a_norm_that_none_is_to_exceed_is_positive(max_norm):
    model, _, bip = build_bip()
    with pytest.raises(ValueError, match=f"max_norm={max_norm!r} is not allowed; expected a finite number above 0"):
        bip.upper_step(lambda: compute_loss(model, 0), max_norm=max_norm)


def test_an_upper_batch_without_a_finite_gradient_changes_nothing():
    model, _, bip = build_bip()
    bip.upper_step(lambda: compute_loss(model, 0))
    before = [w.scores.clone() for w in bip.weights.values()]
    with pytest.raises(ValueError, match="the gradient of '0' is not finite in this upper batch; no score has changed"):
        bip.upper_step(lambda: compute_loss(model, 1) * math.nan)
    assert all(torch.equal(a, w.scores) for a, w in zip(before, bip.weights.values(), strict=True))
    bip.upper_step(lambda: compute_loss(model, 2))
    assert bip.upper_steps == 2


def test_frozen_layers_of_bip_need_a_pace():
    model = sparse_net(0.8, init="dense")
    model[0].requires_grad_(False)
    for opt in (torch.optim.Adam(model.parameters(), 0.1), torch.optim.SGD(model[1:].parameters(), 0.1)):
        with pytest.raises(ValueError, match="'0' is frozen, which gives its scores no pace; give score_lr, or leave"):
            sb.BiP(model, opt)
    assert sb.BiP(model, torch.optim.SGD(model.parameters(), 0.1)).current_score_lr("0") == 0.1
    bip = sb.BiP(model, torch.optim.SGD(model[1:].parameters(), 0.1), score_lr=0.1)
    before = bip.weights["0"].scores.clone()
    bip.upper_step(lambda: compute_loss(model, 0))
    assert not torch.equal(before, bip.weights["0"].scores)
    bip.release()
    sb.BiDST(model, torch.optim.SGD(model[1:].parameters(), 0.1))  # whose frozen layers keep their masks


def test_layers_that_are_dense_by_their_target_need_none():
    model = sparse_net({"0": 0, "*": 0.8}, init="dense")
    bip = sb.BiP(model, torch.optim.SGD(model[1:].parameters(), 0.1))
    bip.upper_step(lambda: compute_loss(model, 0))
    assert bip.weights["0"].mask.all()


@pytest.mark.parametrize("cls", [sb.BiDST, sb.BiP, sb.HYDRA])
def test_a_loss_that_is_maximized_is_refused(cls):
    model = sparse_net(0.8)
    with pytest.raises(
        ValueError, match=f"optimizer has maximize=True, and {cls.__name__} learns .* minimize its negative"
    ):
        cls(model, torch.optim.AdamW(model.parameters(), maximize=True))
    sb.RigL(model, torch.optim.AdamW(model.parameters(), maximize=True))


def test_an_optimizer_that_makes_its_own_steps_gives_no_pace():
    model, opt, bidst = build_bidst()
    opt.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="SGD has lr=None, no step size; give score_lr and implicit_scale"):
        bidst.current_score_lr("3")


def test_the_pace_is_that_of_the_active_weights():
    """The state of an optimizer is zero where the mask is False, and has no part in the mean."""
    model = sparse_net(0.9)
    opt = torch.optim.Adam(model.parameters(), 0.01)
    bidst = sb.BiDST(model, opt, implicit="none")
    take_step(model, opt, bidst, 0)
    for name, masked in bidst.weights.items():
        square = opt.state[masked.weight]["exp_avg_sq"][masked.mask].mean() / (1 - 0.999)
        assert float(bidst.current_score_lr(name)) == pytest.approx(0.01 / float(square) ** 0.5, rel=1e-3)


def test_the_sizes_of_both_terms_are_means_over_the_weights():
    model = sparse_net(0.5, init="dense")
    bip = sb.BiP(model, sgd(model), lower_gradient="batch", implicit_scale=3.0)
    grads = {name: torch.randn_like(masked.weight) for name, masked in bip.weights.items()}
    terms = [
        hypergradient(w.weight.detach(), w.mask, grads[name], formula="derived", scale=3.0)
        for name, w in bip.weights.items()
    ]
    bip.upper_step_with({name: grad.clone() for name, grad in grads.items()})
    found = bip.metrics()
    for name, parts in zip(("direct", "implicit"), zip(*terms, strict=True), strict=True):
        assert found[name] == pytest.approx(float(torch.cat([p.flatten() for p in parts]).abs().mean()), rel=1e-5)


def test_nothing_is_said_of_an_adam_that_has_not_stepped_yet(caplog):
    model = sparse_net(0.5, init="dense")
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    bip = sb.BiP(model, opt)
    take_step(model, opt, bip, 0)
    assert not caplog.records
