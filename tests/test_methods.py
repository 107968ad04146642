"""What all methods share, and the rule-based ones: Static, SET, RigL, OMP, IMP and HYDRA."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import math
import pickle
import re
from multiprocessing.reduction import ForkingPickler

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
    tiny_net,
    train,
)
from torch import nn

import sparsebilevel as sb
from sparsebilevel.kernels import native
from sparsebilevel.masks import NM, Block, Channel, Filter, Unstructured
from sparsebilevel.methods.base import checksum

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, 1e-3, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-3, weight_decay=1e-1),
}
# Every method with topology changes every few steps; `init` goes to sparsify.
METHODS = {
    "static": (sb.Static, {}, "random"),
    "set": (sb.SET, {"update_freq": 4, "update_end": 200}, "random"),
    "rigl": (sb.RigL, {"update_freq": 4, "update_end": 200}, "random"),
    "rigl-paper": (sb.RigL, {"update_freq": 4, "update_end": 200, "paper": True}, "random"),
    "bidst": (sb.BiDST, {"update_freq": 4, "update_end": 200, "search_space": 0.1}, "random"),
    "bidst-curvature": (sb.BiDST, {"update_freq": 4, "implicit": "curvature", "gumbel": True}, "random"),
    "omp": (sb.OMP, {}, "dense"),
    "imp": (sb.IMP, {"levels": 2}, "dense"),
    "hydra": (sb.HYDRA, {"score_lr": 0.5}, "dense"),
    "bip": (sb.BiP, {"score_lr": 0.5, "score_momentum": 0.9}, "dense"),
    "bip-curvature": (sb.BiP, {"implicit": "curvature", "implicit_scale": 10.0}, "dense"),
}
SPARSE_STORED = [name for name, (cls, _, _) in METHODS.items() if cls.storage == "sparse" and cls is not sb.IMP]


def build(name, seed=0, optimizer="sgd", **overrides):
    cls, kwargs, init = METHODS[name]
    model = sparse_net(0.8, seed, distribution="erk", init=init)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, cls(model, opt, **kwargs | overrides)


def counts(sparsifier):
    return {name: int(masked.mask.sum()) for name, masked in sparsifier.weights.items()}


def state_tensors(optimizer, weight):
    return [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == weight.shape]


# -- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SPARSE_STORED)
def test_zeros_stay_exactly_zero(name, optimizer):
    model, opt, sparsifier = build(name, optimizer=optimizer)
    before = counts(sparsifier)
    for step in range(100 if optimizer == "sgd" else 30):
        take_step(model, opt, sparsifier, step)
        for masked in sparsifier.weights.values():
            assert not masked.weight[~masked.mask].any(), step
            assert all(not v[~masked.mask].any() for v in state_tensors(opt, masked.weight)), step
    assert counts(sparsifier) == before
    assert all(w.weight[w.mask].any() for w in sparsifier.weights.values())


def test_state_from_before_the_sparsifier_is_cleared_too():
    model = tiny_net()
    opt = sgd(model)
    for step in range(3):
        compute_loss(model, step).backward()
        opt.step()
    sb.sparsify(model, 0.8, seed=0)
    sparsifier = sb.Static(model, opt)
    for masked in sparsifier.weights.values():
        assert not masked.weight[~masked.mask].any()
        assert not opt.state[masked.weight]["momentum_buffer"][~masked.mask].any()
    train(model, opt, sparsifier, 10)
    assert not any(m.weight[~m.mask].any() for m in sparsifier.weights.values())


@pytest.mark.parametrize("name", ["set", "rigl", "bidst"])
def test_a_frozen_layer_keeps_its_mask(name):
    model, opt, sparsifier = build(name, update_freq=2)
    model[3].weight.requires_grad_(False)
    before, weight = masks_of(sparsifier), model[3].weight.clone()
    train(model, opt, sparsifier, 8)
    assert torch.equal(model[3].mask, before["3"])
    assert torch.equal(model[3].weight, weight)
    assert not same_masks(masks_of(sparsifier), before)  # the others go on


@pytest.mark.parametrize("name", ["rigl", "bidst", "hydra"])
def test_passes_that_are_not_to_count_can_be_forgotten(name):
    """As those that make adversarial examples."""
    results = []
    for passes in (0, 2):
        model, opt, sparsifier = build(name, **({"update_freq": 2} if name != "hydra" else {}))
        for step in range(6):
            for _ in range(passes):
                x = batch(50 + step)[0].requires_grad_()
                model(x).square().sum().backward()
                opt.zero_grad()
                sparsifier.zero_grad()
            take_step(model, opt, sparsifier, step)
        results.append((masks_of(sparsifier), list(model.parameters())))
    (masks, parameters), (other_masks, other_parameters) = results
    assert same_masks(masks, other_masks)
    assert all(torch.equal(a, b) for a, b in zip(parameters, other_parameters, strict=True))


@pytest.mark.parametrize("name", ["hydra", "bip"])
def test_dense_stored_methods_keep_dropped_weights(name):
    model, opt, sparsifier = build(name)
    start = {n: m.weight.detach().clone() for n, m in sparsifier.weights.items()}
    train(model, opt, sparsifier, 20)
    decay = (1 - 0.05 * 0.01) ** 20 * 0.5  # weight decay may shrink what is hidden, and momentum hastens it, not more
    for n, masked in sparsifier.weights.items():
        hidden = ~masked.mask
        assert (masked.weight[hidden].abs() >= decay * start[n][hidden].abs().clamp(max=1e-3)).float().mean() > 0.9
        assert not masked.layers[0].effective_weight()[hidden].any()


# -- drop and grow ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "block:2x3"])
@pytest.mark.parametrize("cls", [sb.SET, sb.RigL])
def test_drop_and_grow(cls, pattern):
    model = sparse_net(0.6, pattern=pattern)
    opt = sgd(model)
    sparsifier = cls(model, opt, update_freq=3, drop_fraction=0.5)
    for step in range(9):
        old = masks_of(sparsifier)
        changed = take_step(model, opt, sparsifier, step)
        assert changed == (step % 3 == 2)
        for name, masked in sparsifier.weights.items():
            assert masked.pattern.count(masked.mask) == masked.num_kept
            grown = masked.mask & ~old[name]
            assert grown.any() <= changed
            assert not masked.weight[grown].any()
            assert not opt.state[masked.weight]["momentum_buffer"][grown].any()
    assert len(sparsifier.history) == 3
    assert sum(record["grown"] for record in sparsifier.history) > 0


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    model = sparse_net(0.7)
    opt = sgd(model)
    sparsifier = sb.RigL(model, opt, update_freq=3, drop_fraction=0.4)
    for step in range(2):
        take_step(model, opt, sparsifier, step)
    gradients = dense_gradients(model, lambda dense: compute_loss(dense, 2))
    old = masks_of(sparsifier)
    opt.zero_grad()
    compute_loss(model, 2).backward()
    opt.step()
    weights = {n: m.weight.detach().clone() for n, m in sparsifier.weights.items()}
    buffers = {n: opt.state[m.weight]["momentum_buffer"].clone() for n, m in sparsifier.weights.items()}
    sparsifier.step()
    regrown = 0
    for name, masked in sparsifier.weights.items():
        active = [(abs(v), -i) for i, v in enumerate(weights[name].reshape(-1).tolist()) if old[name].reshape(-1)[i]]
        dropped = int(0.4 * len(active))
        kept = {-i for _, i in sorted(active, reverse=True)[: len(active) - dropped]}
        grads = gradients[name].abs().reshape(-1).tolist()
        grown = set(sorted((i for i in range(len(grads)) if i not in kept), key=lambda i: (-grads[i], i))[:dropped])
        new = set(masked.mask.reshape(-1).nonzero().squeeze(1).tolist())
        assert new == kept | grown
        # What was active before and after is untouched, also where it was dropped and grown back at once.
        both = old[name] & masked.mask
        regrown += len(grown & set(old[name].reshape(-1).nonzero().squeeze(1).tolist()))
        assert torch.equal(masked.weight[both], weights[name][both])
        assert torch.equal(opt.state[masked.weight]["momentum_buffer"][both], buffers[name][both])
    assert regrown > 0


def test_zero_weights_are_dropped_like_any_other():
    """Grown weights start at zero, as inactive ones are: the choice of what to keep must not confuse the two."""
    model = sparse_net(0.5)
    sparsifier = sb.SET(model, drop_fraction=0.2)
    with torch.no_grad():
        for masked in sparsifier.weights.values():
            masked.weight.zero_()
    before = masks_of(sparsifier)
    sparsifier.change_topology()
    for name, masked in sparsifier.weights.items():
        assert int((masked.mask & before[name]).sum()) >= masked.num_kept - int(0.2 * masked.num_kept)


def test_rigl_asks_for_the_dense_gradient_only_where_it_uses_it():
    model = sparse_net()
    opt = sgd(model)
    sparsifier = sb.RigL(model, opt, update_freq=4, update_end=9)
    collected = []
    for step in range(1, 14):
        opt.zero_grad()
        compute_loss(model, step).backward()
        collected += [step] if any(m.effective_grad is not None for m in sparsifier.weights.values()) else []
        opt.step()
        sparsifier.step()
    assert collected == [4, 8]


def test_rigl_paper_replaces_the_step_of_the_optimizer():
    def run(paper):
        model = sparse_net()
        opt = sgd(model, weight_decay=0.1)
        sparsifier = sb.RigL(model, opt, update_freq=3, paper=paper)
        train(model, opt, sparsifier, 2)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        buffers = {n: opt.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
        masks = masks_of(sparsifier)
        assert take_step(model, opt, sparsifier, 2)
        return model, opt, sparsifier, before, buffers, masks

    model, opt, sparsifier, before, buffers, masks = run(paper=True)
    for name, p in model.named_parameters():
        layer = name.rsplit(".", 1)[0]
        stayed = masks[layer] & sparsifier.weights[layer].mask if layer in masks and name.endswith("weight") else ...
        assert torch.equal(p[stayed], before[name][stayed])
        assert torch.equal(opt.state[p]["momentum_buffer"][stayed], buffers[name][stayed])
    take_step(model, opt, sparsifier, 3)
    assert not torch.equal(model[0].weight, before["0.weight"])
    model, _, sparsifier, before, _, masks = run(paper=False)
    stayed = masks["0"] & sparsifier.weights["0"].mask
    assert not torch.equal(model[0].weight[stayed], before["0.weight"][stayed])


def test_rigl_paper_withholds_the_step_of_a_closure_too():
    results = []
    for with_closure in (False, True):
        model, opt, sparsifier = build("rigl-paper", update_freq=2)
        for step in range(5):

            def closure(step=step, model=model, opt=opt):
                opt.zero_grad()
                loss = compute_loss(model, step)
                loss.backward()
                return loss

            loss = opt.step(closure) if with_closure else (closure(), opt.step())[0]
            assert loss > 0
            sparsifier.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_rigl_paper_withholds_the_steps_of_a_copy_too():
    originals = build("rigl-paper", update_freq=2)
    copies = copy.deepcopy(originals)
    for run in (originals, copies):
        train(*run, 5)
    assert all(torch.equal(a, b) for a, b in zip(originals[0].parameters(), copies[0].parameters(), strict=True))


def test_the_drop_fraction_follows_a_cosine():
    model = sparse_net()
    sparsifier = sb.SET(model, sgd(model), update_end=1000)
    for step, fraction in ((0, 0.3), (500, 0.15), (1000, 0.0)):
        sparsifier.step_count = step
        assert sparsifier.current_drop_fraction() == pytest.approx(fraction, abs=1e-12)
    model = sparse_net()
    assert sb.SET(model, sgd(model)).current_drop_fraction() == 0.3


def test_set_is_repeatable_by_its_seed():
    def run(seed):
        model = sparse_net()
        opt = sgd(model)
        sparsifier = sb.SET(model, opt, update_freq=2, seed=seed)
        train(model, opt, sparsifier, 8)
        return masks_of(sparsifier)

    assert same_masks(run(3), run(3))
    assert not same_masks(run(3), run(4))


def test_static_never_changes():
    model, opt, sparsifier = build("static")
    before = masks_of(sparsifier)
    train(model, opt, sparsifier, 12)
    assert same_masks(before, masks_of(sparsifier))
    assert sparsifier.history == []
    assert sparsifier.metrics()["topology_changes"] == 0


def test_a_layer_without_gradient_is_no_obstacle():
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "spare": nn.Linear(6, 4)})
    sb.sparsify(model, 0.5, seed=0)
    opt = sgd(model)
    for cls in (sb.RigL, sb.BiDST):
        sparsifier = None  # one method at a time
        sparsifier = cls(model, opt, update_freq=2)
        for _ in range(4):
            opt.zero_grad()
            model["used"](torch.randn(3, 6)).square().sum().backward()
            opt.step()
            sparsifier.step()
        assert counts(sparsifier) == {"used": 12, "spare": 12}


# -- pruning trained networks -----------------------------------------------------------------------------------------


def global_magnitude_masks(weights, k):
    """The k largest |theta| of all layers, in plain Python."""
    flat = [(-abs(v), n, i) for n, w in enumerate(weights) for i, v in enumerate(w.reshape(-1).tolist())]
    masks = [torch.zeros(w.numel(), dtype=torch.bool) for w in weights]
    for _, n, i in sorted(flat)[:k]:
        masks[n][i] = True
    return [m.view(w.shape) for m, w in zip(masks, weights, strict=True)]


def test_omp_is_global_magnitude_pruning():
    model = sparse_net(0.8, init="dense")
    weights = [layer.weight.detach().clone() for _, layer in sb.sparse_layers(model)]
    total = sum(w.numel() for w in weights)
    sparsifier = sb.OMP(model, sgd(model))
    expected = global_magnitude_masks(weights, sum(m.num_kept for m in sparsifier.weights.values()))
    for masked, mask, weight in zip(sparsifier.weights.values(), expected, weights, strict=True):
        assert torch.equal(masked.mask, mask)
        assert torch.equal(masked.weight, weight * mask)
    assert sparsifier.sparsity == pytest.approx(0.8, abs=1.5 / total)


def test_omp_by_layer_and_with_dense_layers():
    model = sparse_net(0.8, init="dense", dense_first=True)
    sparsifier = sb.OMP(model, scope="layer")
    assert counts(sparsifier) == {"0": 108, "3": 86, "6": 72}
    for masked in sparsifier.weights.values():
        assert masked.weight[masked.mask].abs().min() > 0
    model = sparse_net(0.8, init="dense", dense_first=True)
    sparsifier = sb.OMP(model)
    assert counts(sparsifier)["0"] == 108
    assert sum(counts(sparsifier).values()) == 108 + 86 + 72


@pytest.mark.parametrize("cls", [sb.OMP, sb.HYDRA, sb.BiP])
@pytest.mark.parametrize("pattern", [Filter(), Channel(), Block(2, 3), Block(4, 4), NM(1, 2)])
def test_pruning_keeps_the_counts_of_every_pattern(cls, pattern):
    model = sparse_net(0.5, init="dense", pattern=pattern)
    opt = sgd(model)
    sparsifier = cls(model, opt)
    total = sum(m.num_kept for m in sparsifier.weights.values())
    for step in range(3):
        take_step(model, opt, sparsifier, step)
        assert sum(m.pattern.count(m.mask) for m in sparsifier.weights.values()) == total
    if isinstance(pattern, NM):
        for masked in sparsifier.weights.values():
            assert (masked.mask.movedim(1, -1).reshape(-1, pattern.m).sum(1) == pattern.n).all()


def test_imp_prunes_a_fifth_of_what_is_left_and_rewinds():
    model = sparse_net(0.5, init="dense")
    start = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("mask")}
    opt = sgd(model)
    imp = sb.IMP(model, opt, levels=5, rate=0.2)
    remaining = total = sum(m.weight.numel() for m in imp.weights.values())
    for level in range(1, 6):
        train(model, opt, imp, 5, start=5 * level)
        previous = masks_of(imp)
        trained = [m.weight.detach().clone() for m in imp.weights.values()]
        imp.advance()
        remaining -= math.ceil(remaining / 5)
        assert sum(counts(imp).values()) == remaining
        assert remaining / total == pytest.approx(0.8**level, abs=5 / total)
        expected = global_magnitude_masks(trained, remaining)
        for (name, masked), mask in zip(imp.weights.items(), expected, strict=True):
            assert torch.equal(masked.mask, mask)
            assert not (masked.mask & ~previous[name]).any()
        assert not opt.state
        for key, value in model.state_dict().items():
            if not key.endswith("mask"):
                where = masks_of(imp).get(key.removesuffix(".weight"), ...)
                assert torch.equal(value[where], start[key][where]), key
    assert imp.metrics()["level"] == 5
    with pytest.raises(RuntimeError, match="all 5 levels are done"):
        imp.advance()


def test_imp_reaches_the_target_of_the_model_in_its_levels():
    model = sparse_net(0.9, init="dense")
    imp = sb.IMP(model, sgd(model), levels=3)
    seen = []
    for _ in range(3):
        imp.advance()
        seen.append(sum(counts(imp).values()))
    total = sum(m.weight.numel() for m in imp.weights.values())
    assert seen[-1] == sum(m.num_kept for m in imp.weights.values())
    assert seen == [pytest.approx(total * 0.1 ** (i / 3), abs=2) for i in (1, 2, 3)]


@pytest.mark.parametrize("rate", [None, 0.2])
def test_imp_leaves_dense_layers_out_of_the_ranking(rate):
    model = sparse_net(0.8, init="dense", dense_first=True)
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # any ranking would begin here
    imp = sb.IMP(model, sgd(model), levels=2, rate=rate)
    total = 54 * 8 + 72 * 5
    for level in (1, 2):
        trained = [imp.weights[n].weight.detach().clone() for n in ("3", "6")]
        imp.advance()
        kept = counts(imp)
        assert kept["0"] == 108
        remaining = kept["3"] + kept["6"]
        assert remaining == pytest.approx(total * (0.2 ** (level / 2) if rate is None else 0.8**level), abs=3)
        for name, mask in zip(("3", "6"), global_magnitude_masks(trained, remaining), strict=True):
            assert torch.equal(imp.weights[name].mask, mask)
    if rate is None:  # as one-shot pruning to the same target counts
        assert remaining == sum(counts(sb.OMP(sparse_net(0.8, init="dense", dense_first=True))).values()) - 108


def test_imp_takes_one_pattern_beside_dense_layers():
    model = sparse_net(0.5, init="dense", dense_first=True, pattern="filter")
    imp = sb.IMP(model, sgd(model), levels=1)
    imp.advance()
    assert {n: m.pattern.count(m.mask) for n, m in imp.weights.items()}["0"] == 108
    assert sum(imp.weights[n].pattern.count(imp.weights[n].mask) for n in ("3", "6")) == 4 + 2
    model = sparse_net(0.0, init="dense")
    with pytest.raises(ValueError, match="needs layers of one pattern, not NM, got set()"):
        sb.IMP(model, sgd(model))


def test_imp_never_takes_back_what_it_pruned():
    model = sparse_net(0.9, init="dense")
    imp = sb.IMP(model, levels=3)
    imp.advance()
    for _ in range(2):
        before = masks_of(imp)
        with torch.no_grad():
            for masked in imp.weights.values():
                masked.weight.zero_()  # survivors are as small as what was pruned
        imp.advance()
        assert not any((m.mask & ~before[n]).any() for n, m in imp.weights.items())


def test_imp_rewinds_to_a_later_step():
    model = sparse_net(0.5, init="dense")
    opt = sgd(model)
    imp = sb.IMP(model, opt, levels=2, rewind_step=3)
    train(model, opt, imp, 2)
    with pytest.raises(RuntimeError, match="rewind_step=3 was not reached; 2 steps were taken"):
        imp.advance()
    train(model, opt, imp, 1, start=2)
    early = {n: v.clone() for n, v in model.state_dict().items()}
    train(model, opt, imp, 4, start=3)
    imp.advance()
    for name, masked in imp.weights.items():
        assert torch.equal(masked.weight[masked.mask], early[f"{name}.weight"][masked.mask])
        assert not masked.weight[~masked.mask].any()
    assert torch.equal(model[1].running_mean, early["1.running_mean"])
    train(model, opt, imp, 4, start=7)  # passing the rewind step again must not move the point
    imp.advance()
    assert torch.equal(model[1].running_mean, early["1.running_mean"])


def test_hydra_trains_scores_and_nothing_else():
    model = sparse_net(0.7, init="dense")
    theta = {n: layer.weight.detach().clone() for n, layer in sb.sparse_layers(model)}
    opt = sgd(model)
    hydra = sb.HYDRA(model, opt, score_lr=0.3, score_momentum=0.5, score_weight_decay=0.01)
    scores, velocity = {}, {}
    for name, masked in hydra.weights.items():
        scores[name] = math.sqrt(6 / theta[name][0].numel()) * theta[name] / theta[name].abs().max()
        velocity[name] = torch.zeros_like(theta[name])
        torch.testing.assert_close(masked.scores, scores[name])
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(4):
        gradients = dense_gradients(model, lambda dense, step=step: force_grad(dense, step))
        take_step(model, opt, hydra, step)
        for name, masked in hydra.weights.items():
            s = scores[name]
            velocity[name] = 0.5 * velocity[name] + s.sign() * theta[name] * gradients[name] + 0.01 * s
            scores[name] = s - 0.3 * velocity[name]
            torch.testing.assert_close(masked.scores, scores[name], rtol=1e-4, atol=1e-6)
            best = masked.scores.abs().reshape(-1).topk(masked.num_kept).values.min()
            assert torch.equal(masked.mask, masked.scores.abs() >= best)
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    hydra.finish()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(key.endswith("mask_scores") for key in model.state_dict())
    kept = masks_of(hydra)
    train(model, opt, hydra, 5, start=10)
    assert same_masks(kept, masks_of(hydra))
    assert not any(m.weight[~m.mask].any() for m in hydra.weights.values())


def force_grad(dense, step):
    for p in dense.parameters():
        p.requires_grad_(True)
    return compute_loss(dense, step)


# -- saving and loading -----------------------------------------------------------------------------------------------


def save(model, opt, sparsifier):
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "sparsifier": sparsifier.state_dict()}, buffer)
    buffer.seek(0)
    return buffer


def assert_same_run(a, b):
    for (key, x), (_, y) in zip(a[0].state_dict().items(), b[0].state_dict().items(), strict=True):
        assert torch.equal(x, y), key
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        for x, y in zip(state_tensors(a[1], p), state_tensors(b[1], q), strict=True):
            assert torch.equal(x, y)
    plain = [{k: v for k, v in record.items() if k != "seconds"} for record in a[2].history]
    assert plain == [{k: v for k, v in record.items() if k != "seconds"} for record in b[2].history]
    assert a[2].step_count == b[2].step_count


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [6, 8])
def test_a_resumed_run_is_the_same_run(name, steps):
    first = build(name)
    train(*first, steps)
    if name == "imp":
        first[2].advance()
        train(*first, 2, start=steps)
    file = save(*first)
    second = build(name, seed=77)
    state = torch.load(file, weights_only=True)
    second[0].load_state_dict(state["model"])
    second[1].load_state_dict(state["opt"])
    second[2].load_state_dict(state["sparsifier"])
    assert_same_run(first, second)
    for run in (first, second):
        train(*run, 10, start=20)
        if name == "imp":
            run[2].advance()
            train(*run, 2, start=40)
    assert_same_run(first, second)


@pytest.mark.parametrize("name", ["hydra", "bip"])
def test_resuming_after_finish(name):
    first = build(name)
    train(*first, 3)
    first[2].finish()
    train(*first, 3, start=3)
    second = build(name, seed=77)
    state = torch.load(save(*first), weights_only=True)
    second[0].load_state_dict(state["model"])
    second[1].load_state_dict(state["opt"])
    second[2].load_state_dict(state["sparsifier"])
    for run in (first, second):
        train(*run, 5, start=6)
    assert_same_run(first, second)
    assert second[2].finished


def test_the_recorded_overlap_is_that_of_the_masks_before_and_after():
    _, _, sparsifier = build("set")
    before = torch.cat([m.flatten() for m in masks_of(sparsifier).values()]).clone()
    sparsifier.change_topology()
    after = torch.cat([m.flatten() for m in masks_of(sparsifier).values()])
    record = sparsifier.history[-1]
    assert record["grown"] == (after & ~before).sum() > 0
    assert record["iou"] == pytest.approx(float((after & before).sum() / (after | before).sum()))


def test_the_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="optimizer holds none of the model's sparse weights"):
        sb.RigL(sparse_net(0.5), sgd(sparse_net(0.5)))


@pytest.mark.parametrize("first", ["rigl-paper", "bidst", "bip"])
def test_a_second_method_is_refused_while_the_first_one_lives(first):
    model, opt, sparsifier = build(first)
    train(model, opt, sparsifier, 2)
    masks, name = masks_of(sparsifier), type(sparsifier).__name__
    with pytest.raises(ValueError, match=rf"model has a method already, {name} at step 2, .* call its release\(\)"):
        sb.Static(model, opt)
    with pytest.raises(ValueError, match="model has a method already"):
        sb.Static(model[:4])  # a part of it
    assert same_masks(masks, masks_of(sparsifier))
    sb.Static(copy.deepcopy(model))
    del sparsifier  # not even the optimizer keeps it
    sb.RigL(model, opt)


def test_a_method_that_was_released_acts_no_more():
    model, opt, rigl = build("rigl-paper", update_freq=1)
    rigl.release()
    static = sb.Static(model, opt)
    before = model[0].weight.detach().clone()
    take_step(model, opt, static, 0)
    assert not torch.equal(model[0].weight, before)
    assert all(layer.score_support == "none" for _, layer in sb.sparse_layers(model))
    with pytest.raises(ValueError, match="Static at step 1"):
        sb.SET(model)
    rigl.release()  # a second time: the model is not its own any more
    with pytest.raises(ValueError, match="Static at step 1"):
        sb.SET(model)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("bip", lambda bip: bip.finish()),
        ("bip", lambda bip: bip.upper_step(lambda: compute_loss(bip.model, 0))),
        ("hydra", lambda hydra: hydra.finish()),
        ("imp", lambda imp: imp.advance()),
        ("set", lambda method: method.change_topology()),
    ],
)
def test_a_method_that_was_released_leaves_the_next_one_alone(name, act):
    model, opt, sparsifier = build(name)
    take_step(model, opt, sparsifier, 0)
    sparsifier.release()
    static = sb.Static(model, opt)
    before = masks_of(static)
    with pytest.raises(RuntimeError, match=f"{type(sparsifier).__name__} was released, and its model is not its own"):
        act(sparsifier)
    assert same_masks(before, masks_of(static))


@pytest.mark.parametrize("name", ["hydra", "bip"])
def test_another_method_may_follow_when_the_mask_is_final(name):
    model, opt, sparsifier = build(name)
    train(model, opt, sparsifier, 2)
    sparsifier.finish()
    rigl = sb.RigL(model, opt, update_freq=1)
    train(model, opt, rigl, 2)
    assert len(rigl.history) == 2
    masks = masks_of(rigl)
    sparsifier.finish()  # once more: nothing is left to do
    assert same_masks(masks, masks_of(rigl))


def test_hydra_that_was_released_lets_the_next_one_freeze():
    model, _, first = build("hydra")
    first.finish()
    sb.HYDRA(model, score_lr=0.1)
    first.release()
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["bidst", "bip", "hydra"])
def test_release_takes_the_scores_along_and_lets_parameters_train(name):
    model, opt, sparsifier = build(name)
    sparsifier.release()
    assert not any(key.endswith("mask_scores") for key in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    if name == "bidst":
        compute_loss(model, 0).backward()
        with pytest.raises(RuntimeError, match="BiDST was released, and its model is not its own any more"):
            sparsifier.step()
    sb.Static(model, opt)


def test_release_leaves_scores_that_are_the_users():
    model, opt, sparsifier = build("static")
    model[3].set_mask_scores(nn.Parameter(torch.zeros(8, 6, 3, 3)))
    sparsifier.release()
    assert isinstance(model[3].mask_scores, nn.Parameter)


def test_a_method_that_cannot_be_made_leaves_the_model_free():
    model = sparse_net(pattern="nm:1:2")
    with pytest.raises(ValueError, match="pattern NM is not allowed with SET") as kept:  # the error holds the method
        sb.SET(model)
    sb.Static(model)
    assert kept.value.__traceback__ is not None


def test_states_of_other_methods_and_models_are_refused():
    _, _, rigl = build("rigl")
    _, _, bidst = build("bidst")
    with pytest.raises(ValueError, match="state is of method 'RigL'; expected 'BiDST'"):
        bidst.load_state_dict(rigl.state_dict())
    older = {key: value for key, value in bidst.state_dict().items() if key != "curvature"}
    with pytest.raises(ValueError, match="state lacks curvature; another version of sparsebilevel wrote it"):
        bidst.load_state_dict(older)
    other = nn.Sequential(nn.Linear(4, 4))
    sb.sparsify(other, 0.5)
    with pytest.raises(ValueError, match=r"state belongs to a model with other layers; they differ in \['3', '6'\]"):
        sb.RigL(other, sgd(other)).load_state_dict(rigl.state_dict())
    for name in ("bip", "hydra", "imp"):
        model, _, method = build(name)
        with pytest.raises(ValueError, match=f"state is of method 'RigL'; expected '{type(method).__name__}'"):
            method.load_state_dict(rigl.state_dict() | {"finished": True, "level": 2})
        finished = method.state_dict() | {"finished": True, "level": 2, "num_kept": {"of another model": 1}}
        with pytest.raises(ValueError, match="state belongs to a model with other layers"):
            method.load_state_dict(finished)
        assert not method.finished
        assert getattr(method, "level", 0) == 0
        assert not method.released


def test_rigl_says_that_it_grows_by_gradients():
    _, _, rigl = build("rigl")
    with pytest.raises(RuntimeError, match="RigL grows by gradients, and change_topology got none"):
        rigl.change_topology()


@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_refused_over_masks_of_another_count(name):
    first, second = build(name), build(name)
    take_step(*first, 0)
    second[0].load_state_dict(first[0].state_dict())
    masked = second[2].weights["3"]
    masked.mask.view(-1)[masked.mask.view(-1).nonzero()[0]] = False
    kept = masked.pattern.count(masked.mask)
    with pytest.raises(ValueError, match=f"not those of the state .*'3' keeps {kept}, not .*load the model's state"):
        second[2].load_state_dict(first[2].state_dict())


@pytest.mark.parametrize("name", ["hydra", "bip"])
def test_a_finished_state_is_refused_over_other_masks_before_it_finishes(name):
    first, second = build(name), build(name)
    train(*first, 3)
    first[2].finish()
    masked = second[2].weights["3"]
    masked.set_mask(masked.mask.roll(1))
    before = {key: value.clone() for key, value in second[0].state_dict().items()}
    with pytest.raises(ValueError, match="not those of the state"):
        second[2].load_state_dict(first[2].state_dict())
    assert not second[2].finished
    after = second[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["bidst", "bip", "hydra"])
def test_a_state_is_refused_over_scores_that_the_constructor_has_made(name):
    """The order of trainers that load a model's state before anything else."""
    model, opt, first = build(name)
    train(model, opt, first, 6)
    other = sparse_net(0.8, 1, distribution="erk", init="dense")
    other.load_state_dict(model.state_dict())
    second = type(first)(other, sgd(other))
    with pytest.raises(ValueError, match=r"not those of the state .* build the method, then load the model's state"):
        second.load_state_dict(first.state_dict())
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.step_count == 6


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_over_a_model_that_has_its_state(name):
    """The order of trainers that load models and optimizers before anything else."""
    model, opt, first = build(name)
    train(model, opt, first, 6)
    if name == "imp":
        first.advance()
        train(model, opt, first, 2, start=6)
    state = torch.load(save(model, opt, first), weights_only=True)
    cls, kwargs, init = METHODS[name]
    other = sparse_net(0.8, 1, distribution="erk", init=init)
    other_opt = OPTIMIZERS["sgd"](other.parameters())
    other.load_state_dict(state["model"])
    other_opt.load_state_dict(state["opt"])
    second = cls.resume(state["sparsifier"], other, other_opt, **kwargs)
    for run in ((model, opt, first), (other, other_opt, second)):
        train(*run, 6, start=20)
    assert_same_run((model, opt, first), (other, other_opt, second))


def test_resuming_from_nothing_begins_anew():
    model = sparse_net()
    sparsifier = sb.RigL.resume(None, model, sgd(model), update_freq=3)
    assert sparsifier.schedule.freq == 3
    assert sparsifier.step_count == 0
    sparsifier.release()
    with pytest.raises(ValueError, match="state is of method 'RigL'; expected 'SET'"):
        sb.SET.resume(sparsifier.state_dict(), model, sgd(model))


@pytest.mark.parametrize("name", ["hydra", "bidst"])
def test_a_refused_resumption_leaves_the_model_as_it_was(name):
    _, _, first = build(name)
    cls, kwargs, init = METHODS[name]
    other = sparse_net(0.8, 5, distribution="erk", init=init)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="not those of the state"):
        cls.resume(first.state_dict(), other, sgd(other), **kwargs)
    assert all(p.requires_grad for p in other.parameters())
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert all(layer.score_support == "none" for _, layer in sb.sparse_layers(other))
    sb.Static(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_a_method_hold_their_model(copied):
    model, _, sparsifier = build("bidst")
    other, second = copied((model, sparsifier))
    with pytest.raises(ValueError, match="model has a method already, BiDST"):
        sb.Static(other)
    copy.copy(second)  # of the same model: the method at work stays the one that is held
    second.release()
    assert all(layer.mask_scores is None for _, layer in sb.sparse_layers(other))
    sb.Static(other)
    with pytest.raises(ValueError, match="model has a method already, BiDST"):
        sb.Static(model)


class OptimizerAround(torch.optim.SGD):
    """As ZeroRedundancyOptimizer: the state is in another one."""

    def __init__(self, params):
        super().__init__(params, 0.1)
        self.optim = torch.optim.SGD(self.param_groups[0]["params"], 0.1, momentum=0.9)


class FullyShardedDataParallel(nn.Sequential):
    pass


def test_sharded_models_and_optimizers_are_refused():
    model = sparse_net()
    with pytest.raises(ValueError, match="optimizer is a OptimizerAround, which keeps its state in another optimizer"):
        sb.SET(model, OptimizerAround(model.parameters()))
    with pytest.raises(ValueError, match="model is in FullyShardedDataParallel, which methods do not support"):
        sb.SET(nn.Sequential(FullyShardedDataParallel(model)))
    with pytest.raises(ValueError, match="the weight of '0' is on the meta device"):
        sb.SET(sparse_net().to("meta"))
    model[0].weight = nn.Parameter(model[0].weight.detach().flatten()[:7])
    with pytest.raises(
        ValueError, match=r"the weight of '0' has shape \[7\] where its mask has \[6, 2, 3, 3\], or is a DTensor"
    ):
        sb.SET(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_methods_do_not_take_the_default_dtype(name, dtype):
    expected, _, _ = build(name)
    torch.set_default_dtype(dtype)
    try:
        cls, kwargs, init = METHODS[name]
        model = sparse_net(0.8, 0, distribution="erk", init=init).float()
        sparsifier = cls(model, sgd(model), **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    train(model, sparsifier.optimizers[0], sparsifier, 5)
    dtypes = {key: value.dtype for key, value in expected.state_dict().items()}
    assert {key: value.dtype for key, value in model.state_dict().items()} == dtypes


def test_a_state_is_refused_over_other_masks_of_the_same_counts():
    first, second = build("rigl"), build("rigl", seed=77)
    with pytest.raises(ValueError, match="they keep as many weights, but have other values"):
        second[2].load_state_dict(first[2].state_dict())
    older = {key: value for key, value in first[2].state_dict().items() if key != "checksum"}
    second[2].load_state_dict(older)  # which cannot know


def test_layers_with_counts_of_their_own_must_keep_them():
    """As many weights as the target has, but shared out in another way."""
    model = sparse_net(0.8)
    rigl = sb.RigL(model, sgd(model))
    state = rigl.state_dict()
    for name, value in (("0", True), ("3", False)):
        flat = rigl.weights[name].mask.view(-1)
        flat[(flat != value).nonzero()[0]] = value
    with pytest.raises(ValueError, match="'0' keeps 23, not 22; '3' keeps 85, not 86"):
        rigl.load_state_dict(state)


@pytest.mark.parametrize("name", METHODS)
def test_copies_and_pickles_have_a_model_of_their_own(name):
    first = build(name)
    train(*first, 2)
    for again in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert again[2].model is again[0]
        assert same_masks(masks_of(again[2]), masks_of(first[2]))
        take_step(*again, 2)
        assert again[2].step_count == 3
    assert first[2].step_count == 2


# -- models of many kinds ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("cls", [sb.RigL, sb.BiDST, sb.IMP, sb.HYDRA, sb.BiP])
def test_tied_weights_have_one_mask(cls):
    model = sb.sparsify(Tied(), 0.75, seed=0)
    opt = sgd(model)
    sparsifier = cls(model, opt)
    assert list(sparsifier.weights) == ["a"]
    kept = 64 if cls is sb.IMP else 16
    for step in range(3):
        if cls is sb.BiP:
            sparsifier.upper_step(lambda: model(torch.randn(4, 8)).square().sum())
        opt.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        opt.step()
        sparsifier.step()
        if step == 1 and cls is not sb.IMP:
            sparsifier.change_topology({"a": torch.randn(8, 8)})
        assert torch.equal(model.a.mask, model.b.mask)
        assert int(model.a.mask.sum()) == kept
    if cls is sb.IMP:
        sparsifier.advance()
        assert torch.equal(model.a.mask, model.b.mask)
        assert int(model.b.mask.sum()) < 64


@pytest.mark.parametrize("cls", [sb.BiDST, sb.HYDRA, sb.BiP])
def test_scores_of_tied_weights_are_held_once(cls):
    def build(seed):
        torch.manual_seed(seed)
        model = sb.sparsify(Tied(), 0.75, seed=seed)
        opt = sgd(model)
        return model, opt, cls(model, opt)

    def step(model, opt, sparsifier):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(sparsifier.step_count))
        if cls is sb.BiP:
            sparsifier.upper_step(lambda: model(x).square().sum())
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
        sparsifier.step()

    first, second = build(0), build(1)
    scores = first[2].weights["a"].scores.clone()
    for _ in range(3):
        step(*first)
    assert not torch.equal(first[2].weights["a"].scores, scores)
    assert first[0].b.mask_scores is None
    assert [key for key in first[0].state_dict() if "scores" in key] == ["a.mask_scores"]
    for part, other in zip(first, second, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for run in (first, second):
        step(*run)
    for (key, a), b in zip(first[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert sb.densify(first[0]).b.weight is not None
    if cls is not sb.BiDST:
        first[2].finish()
        assert first[0].a.mask_scores is None


def test_gradients_of_tied_weights_add_up():
    model = sb.sparsify(Tied(), 0.75, seed=0)
    opt = sgd(model)
    sparsifier = sb.RigL(model, opt, update_freq=1)
    x = torch.randn(4, 8)
    expected = dense_gradients(model, lambda dense: dense(x).square().sum())
    model(x).square().sum().backward()
    torch.testing.assert_close(sparsifier.weights["a"].effective_grad, expected["a"])


def test_names_do_not_depend_on_wrappers():
    model = sparse_net()
    assert list(sb.RigL(torch.compile(model), sgd(model)).weights) == ["0", "3", "6"]
    bare = sb.sparsify(nn.Linear(10, 10), 0.9, seed=0)
    sparsifier = sb.SET(bare, sgd(bare), update_freq=1, drop_fraction=1.0)
    bare(torch.randn(2, 10)).sum().backward()
    assert sparsifier.step()
    assert int(bare.mask.sum()) == 10


@pytest.mark.parametrize("name", ["rigl", "bidst", "hydra", "bip"])
def test_channels_last_models_take_the_same_path(name):
    def run(memory_format):
        cls, kwargs, init = METHODS[name]
        model = sparse_net(0.8, 0, init=init).to(memory_format=memory_format)
        opt = sgd(model)
        sparsifier = cls(model, opt, **kwargs)
        train(model, opt, sparsifier, 4)
        return sparsifier

    for a, b in zip(*(run(f).weights.values() for f in (torch.contiguous_format, torch.channels_last)), strict=True):
        if name != "rigl":
            torch.testing.assert_close(a.scores.contiguous(), b.scores.contiguous(), rtol=1e-3, atol=1e-5)
        assert (a.mask == b.mask).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_other_dtypes(name, dtype):
    cls, kwargs, init = METHODS[name]
    model = sparse_net(0.8, init=init).to(dtype)
    opt = sgd(model)
    sparsifier = cls(model, opt, **kwargs)
    for step in range(5):
        x, y = batch(step)
        if cls is sb.BiP:
            sparsifier.upper_step(lambda x=x, y=y: F.cross_entropy(model(x.to(dtype)).float(), y))
        opt.zero_grad()
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        opt.step()
        sparsifier.step()
    assert all(m.layers[0].mask_scores is None or m.scores.dtype == torch.float32 for m in sparsifier.weights.values())


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [Unstructured(), Filter(), Block(2, 3)])
@pytest.mark.parametrize("cls", [sb.Static, sb.RigL, sb.BiDST, sb.OMP, sb.HYDRA, sb.BiP])
@pytest.mark.parametrize("target", [0.3, 0.9])
def test_a_new_target_is_met_and_said(cls, pattern, target, caplog):
    model = sparse_net(0.5, pattern=pattern)
    before = {n: layer.mask.clone() for n, layer in sb.sparse_layers(model)}
    with caplog.at_level(logging.WARNING, logger="sparsebilevel"):
        sparsifier = cls(model, sgd(model), sparsity=target)
    assert f"{cls.__name__} changes the target of 3 layers to sparsity={target}" in caplog.text
    kept = {n: m.pattern.count(m.mask) for n, m in sparsifier.weights.items()}
    wanted = {n: max(1, round(m.num_groups * round(1 - target, 9))) for n, m in sparsifier.weights.items()}
    assert sum(kept.values()) == sum(wanted.values())
    if cls in (sb.Static, sb.RigL, sb.BiDST):
        assert kept == wanted
        for name, masked in sparsifier.weights.items():  # shrunk or extended, not drawn anew
            smaller, larger = sorted((before[name], masked.mask), key=lambda m: int(m.sum()))
            assert not (smaller & ~larger).any()


def test_the_same_target_changes_nothing(caplog):
    model = sparse_net(0.8, distribution="erk")
    before = {n: layer.mask.clone() for n, layer in sb.sparse_layers(model)}
    with caplog.at_level(logging.WARNING, logger="sparsebilevel"):
        sparsifier = sb.Static(model, sparsity=0.8, distribution="erk")
    assert not caplog.text
    assert same_masks(before, masks_of(sparsifier))


def test_rigl_without_an_end_says_so(caplog):
    sb.RigL(sparse_net(), update_end=750)
    sb.RigL(sparse_net(), update_freq=0)
    sb.SET(sparse_net())
    assert not caplog.text
    sb.RigL(sparse_net())
    assert "RigL without update_end= goes on to exchange 0.3 of the weights every 100 steps" in caplog.text


def test_a_target_by_layer():
    model = sparse_net(0.5)
    sparsifier = sb.Static(model, sparsity={"0": 0.0, "3": 0.75, "6": 0.9})
    assert counts(sparsifier) == {"0": 108, "3": 108, "6": 36}


def test_a_distribution_belongs_to_a_new_target():
    with pytest.raises(ValueError, match="distribution='erk' belongs to a sparsity, and none was given with it"):
        sb.Static(sparse_net(0.5), distribution="erk")
    sparsifier = sb.Static(sparse_net(0.5), sparsity=0.8)
    assert counts(sparsifier) == {"0": 22, "3": 86, "6": 72}  # uniform


def test_a_new_target_with_a_pattern_for_each_layer():
    model = sparse_net(0.5, pattern={"3": "filter", "6": "nm:2:4", "*": "unstructured"})
    assert counts(sb.Static(model, sparsity=0.75)) == {"0": 27, "3": 3 * 36, "6": 180}  # 2 of 4, whatever the target


@pytest.mark.parametrize("pattern", ["unstructured", "filter"])
def test_a_new_target_leaves_dense_layers_dense(pattern):
    sparsifier = sb.Static(sparse_net(0.5, pattern=pattern, dense_first=True), sparsity=0.75)
    assert [int(w.mask.all()) for w in sparsifier.weights.values()] == [1, 0, 0]
    assert sparsifier.weights["3"].layers[0].sparsity == 0.75
    all_dense = sb.Static(sparse_net(0.0), sparsity=0.75)  # where no layer is dense beside others
    assert all_dense.weights["0"].layers[0].sparsity == 0.75


@pytest.mark.parametrize("name", ["bip", "omp", "hydra"])
@pytest.mark.parametrize("follower", [sb.Static, sb.RigL, sb.BiDST])
def test_masks_that_another_method_left_are_taken_over(name, follower, caplog):
    model, opt, first = build(name, **({"scope": "global"} if name != "omp" else {}))
    with torch.no_grad():
        model[0].weight.mul_(20)  # so that one ranking over all layers gives them counts of their own
    train(model, opt, first, 3)
    first.finish() if hasattr(first, "finish") else first.release()
    kept, before = counts(first), masks_of(first)
    if name != "hydra":  # whose scores forget how large a layer is
        assert kept != {n: w.num_kept for n, w in first.weights.items()}
    weights = {n: w.weight.detach().clone() for n, w in first.weights.items()}
    with caplog.at_level(logging.WARNING, "sparsebilevel"):
        second = follower(model, opt, **{} if follower is sb.Static else {"update_freq": 2})
    assert same_masks(masks_of(second), before)
    assert all(torch.equal(w.weight, weights[n]) for n, w in second.weights.items())
    train(model, opt, second, 4)
    assert counts(second) == kept
    assert "takes over" not in caplog.text  # as many weights as were asked for, so that it is no news


def test_masks_of_another_sparsity_are_taken_over_and_said(caplog):
    other = sparse_net(0.5)
    model = sparse_net(0.9)
    model.load_state_dict(other.state_dict())
    with caplog.at_level(logging.WARNING, "sparsebilevel"):
        sparsifier = sb.Static(model)
    assert same_masks(masks_of(sparsifier), {n: layer.mask for n, layer in sb.sparse_layers(other)})
    assert "Static takes over masks that keep 450 groups" in caplog.text
    assert sb.Static(sparse_net(0.5), sparsity=0.9).sparsity == pytest.approx(0.9, abs=1e-3)  # unless another is given


def test_masks_that_change_behind_a_method_are_noticed(caplog):
    model, opt, sparsifier = build("rigl")
    model[3].mask.fill_(True)
    train(model, opt, sparsifier, 4)
    assert "RigL gives masks that have changed their target again" in caplog.text
    assert counts(sparsifier)["3"] == sparsifier.weights["3"].num_kept


# -- optimizers and scalers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sb.Static, sb.SET, sb.RigL, sb.OMP, sb.BiP, sb.HYDRA, sb.IMP])
def test_methods_work_without_an_optimizer(cls):
    model = sparse_net()
    sparsifier = cls(model, **{"score_lr": 0.1} if cls is sb.BiP else {})
    for step in range(3):
        loss = compute_loss(model, step)
        loss.backward()
        assert sparsifier.step() is False
    assert sparsifier.step_count == 3


@pytest.mark.parametrize("name", ["rigl", "bidst", "hydra"])
def test_a_step_needs_its_backward_pass(name):
    model, opt, sparsifier = build(name)
    train(model, opt, sparsifier, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        compute_loss(model, 3)
    compute_loss(copy.deepcopy(model).requires_grad_(True), 3).backward()
    with pytest.raises(RuntimeError, match=f"{type(sparsifier).__name__} needs the gradient of this step, and no back"):
        sparsifier.step()
    assert sparsifier.step_count == 3
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "mask" in key)
    take_step(model, opt, sparsifier, 3)
    if name == "rigl":
        assert sparsifier.step() is False  # between changes it needs none


def test_several_optimizers():
    model = sparse_net()
    opts = [sgd(model[:3]), torch.optim.AdamW(model[3:].parameters(), 1e-3)]
    sparsifier = sb.RigL(model, opts, update_freq=2, paper=True)
    for step in range(6):
        for opt in opts:
            opt.zero_grad()
        compute_loss(model, step).backward()
        for opt in opts:
            opt.step()
        sparsifier.step()
    for masked in sparsifier.weights.values():
        values = [v for opt in opts for v in state_tensors(opt, masked.weight)]
        assert values
        assert not any(v[~masked.mask].any() for v in [masked.weight, *values])


@pytest.mark.parametrize("name", ["rigl", "bidst", "hydra"])
def test_a_grad_scaler_changes_nothing(name):
    def run(scale):
        model, opt, sparsifier = build(name)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for step in range(6):
            opt.zero_grad()
            scaler.scale(compute_loss(model, step)).backward()
            if name != "hydra":  # whose optimizer has nothing to step
                scaler.step(opt)
            sparsifier.step(scaler)
            if name != "hydra":
                scaler.update()
        return model.state_dict()

    plain, scaled = run(1), run(1024.0)
    for key, value in plain.items():
        torch.testing.assert_close(scaled[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["static", "rigl", "bidst"])
def test_a_step_that_the_scaler_skips_does_not_count(name):
    model, opt, sparsifier = build(name, update_freq=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train_scaled = [1.0, float("inf"), 1.0]
    steps, states = [], []
    for step, factor in enumerate(train_scaled):
        opt.zero_grad()
        (scaler.scale(compute_loss(model, step)) * factor).backward()
        scaler.step(opt)
        sparsifier.step(scaler)
        scaler.update()
        steps.append(sparsifier.step_count)
        states.append({k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "num_b" not in k})
    assert steps == [1, 1, 2]
    assert all(torch.equal(v, states[0][k]) for k, v in states[1].items())
    assert all(not v.isnan().any() for v in states[2].values())


@pytest.mark.parametrize("name", ["static", "rigl", "bidst", "bip"])
@pytest.mark.parametrize("calls_before", [("step", "update"), ()])
def test_the_order_of_the_calls_with_a_scaler(name, calls_before):
    model, opt, sparsifier = build(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    do = {
        "step": lambda: scaler.step(opt),
        "sparsifier": lambda: sparsifier.step(scaler),
        "update": scaler.update,
    }

    def backward():
        opt.zero_grad()
        scaler.scale(compute_loss(model, 0)).backward()

    backward()
    for call in ("step", "sparsifier", "update"):
        do[call]()
    backward()
    for call in calls_before:
        do[call]()
    with pytest.raises(RuntimeError, match="call scaler.step.* sparsifier.step.* and scaler.update.* in this order"):
        sparsifier.step(scaler)
    assert sparsifier.step_count == 1


def test_an_overflow_that_nothing_would_lower_is_an_error():
    model, opt, sparsifier = build("hydra")
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    scaler.scale(compute_loss(model, 0) * 1e10).backward()
    with pytest.raises(RuntimeError, match="overflow at the scale .* which nothing lowers"):
        sparsifier.step(scaler)


def test_one_of_several_optimizers_may_rest():
    model = sparse_net()
    opts = [sgd(model[:3]), sgd(model[3:])]
    sparsifier = sb.RigL(model, opts, update_freq=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        scaler.scale(compute_loss(model, step)).backward()
        scaler.step(opts[step % 2])
        sparsifier.step(scaler)
        scaler.update()
    assert sparsifier.step_count == 4


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x3", "nm:1:2"])
@pytest.mark.parametrize("name", METHODS)
def test_the_default_device_changes_nothing(name, pattern):
    cls, kwargs, init = METHODS[name]
    if pattern.startswith("nm") and (issubclass(cls, sb.SET) or cls is sb.IMP):
        pytest.skip("refused")

    def run(context):
        model = sparse_net(0.5, pattern=pattern, init=init)
        opt = sgd(model)
        with context():
            target = {} if pattern.startswith("nm") else {"sparsity": 0.6}
            sparsifier = cls(model, opt, **kwargs | target | ({"gumbel": True} if cls is sb.BiDST else {}))
        for step in range(4):
            if cls is sb.BiP:
                sparsifier.upper_step(lambda step=step: compute_loss(model, step))
            opt.zero_grad()
            compute_loss(model, step).backward()
            opt.step()
            with context():
                sparsifier.step()
                state = sparsifier.state_dict()
                sparsifier.load_state_dict(state)
                sparsifier.metrics()
        return model.state_dict()

    expected = run(contextlib.nullcontext)
    for key, value in run(lambda: torch.device("meta")).items():
        assert torch.equal(value, expected[key]), key


# -- what a user reads ------------------------------------------------------------------------------------------------


def test_the_printed_table(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "dense")
    model = sparse_net(0.5, pattern="filter")
    sparsifier = sb.Static(model)
    text = str(sparsifier)
    lines = text.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith(f"Static: sparsity {sparsifier.sparsity:.4f} over 3 weights (")
    share = 100 * sum(layer.weight.numel() for _, layer in sb.sparse_layers(model))
    share /= sum(p.numel() for p in model.parameters())
    assert lines[0].endswith(f"({share:.1f} % of all parameters), step 0, 0 topology changes")
    assert lines[1].split("  ")[0] == "layer"
    for line, (name, layer) in zip(lines[2:5], sb.sparse_layers(model), strict=True):
        backend = layer.backend.name
        assert line.startswith(name)
        for part in ("x".join(map(str, layer.weight.shape)), f"{layer.sparsity:.4f}", "Filter", "not measured"):
            assert part in line
        assert line.endswith(backend)
    backend, reason, _ = model[0].backend
    assert lines[5] == f"{backend}: {reason} (3 layers)"
    assert "measure_layers" in lines[-1]
    model[0].measured_ratio = 0.5
    assert "0.50x" in str(sparsifier)
    model[0].measured_passes = {"forward": 3.0, "weight_grad": 0.25}
    lines = str(sparsifier).splitlines()
    assert lines[1].split() == "layer shape sparsity pattern time vs dense forward input weight backend".split()
    assert "0.50x          3.00x    -      0.25x" in lines[2]
    assert "not measured   -        -      -" in lines[3]
    assert {line.index(model[0].backends["forward"].name) for line in lines[2:5]} == {lines[1].index("backend")}


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")
def test_the_printed_table_shows_the_choice_of_each_pass(monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "auto")
    model = sb.sparsify(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(4, 4)), 0.9)
    sparsifier = sb.Static(model)
    model[1].collect("all")
    _, _, first, second, third, *footer = str(sparsifier).splitlines()
    assert re.search(r" about \d\.\dx +sparse$", first)
    assert re.search(r" about \d\.\dx +sparse, weight gradient dense$", second)
    assert re.search(r" not measured +dense$", third)
    assert re.match(r"sparse: sparse CPU kernel, \w+ \(2 layers\)", footer[0])
    assert "the gradient is wanted everywhere" in footer[1]
    assert footer[2].startswith("dense: BLAS on m*theta; the sparse CPU kernel would be slower")


def test_the_printed_table_of_a_mask_that_may_change_at_every_step():
    assert str(build("hydra")[2]).splitlines()[0].endswith("step 0, mask changes continuously")


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_plain_numbers(name):
    model, opt, sparsifier = build(name)
    train(model, opt, sparsifier, 5)
    metrics = sparsifier.metrics()
    assert {"sparsity", "topology_changes"} <= metrics.keys()
    assert all(type(v) is float and math.isfinite(v) for v in metrics.values()), metrics
    if name.startswith(("set", "rigl", "bidst")):
        assert metrics["topology_changes"] == 1
        assert 0 < metrics["mask_iou"] <= 1
        assert metrics["topology_seconds"] > 0
    if name.startswith(("bip", "bidst")):
        assert metrics["direct"] > 0
        assert metrics["implicit"] > 0
    assert ("mask_iou_start" in metrics) == name.startswith(("bip", "hydra"))


@pytest.mark.parametrize("name", ["hydra", "bip"])
def test_masks_that_change_at_every_step_are_compared_with_the_first(name):
    model, opt, sparsifier = build(name)
    first = masks_of(sparsifier)
    assert sparsifier.metrics()["mask_iou_start"] == 1
    train(model, opt, sparsifier, 5)
    shared = sum(int((first[n] & m.mask).sum()) for n, m in sparsifier.weights.items())
    union = sum(int((first[n] | m.mask).sum()) for n, m in sparsifier.weights.items())
    found = sparsifier.metrics()["mask_iou_start"]
    assert 0 < found == shared / union < 1
    other_model, _, other = build(name, seed=77)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(sparsifier.state_dict())
    assert other.metrics()["mask_iou_start"] == found
    sparsifier.finish()
    assert sparsifier.metrics()["mask_iou_start"] == found


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (sb.Static, {"sparsity": 1.0}, r"sparsity=1.0 is not allowed; expected a number in \[0, 1\)"),
        (sb.Static, {"sparsity": -0.1}, "sparsity=-0.1 is not allowed"),
        (sb.Static, {"sparsity": 0.9, "distribution": "erd"}, "distribution='erd' is not known; allowed: uniform, er"),
        (sb.Static, {"sparsity": {"0": 0.5}}, r"sparsity has no value for \['3', '6'\]"),
        (sb.SET, {"drop_fraction": 1.5}, r"drop_fraction=1.5 is not allowed; expected a number in \[0, 1\]"),
        (sb.SET, {"update_freq": -1}, "update_freq=-1 is not allowed"),
        (sb.RigL, {"update_start": 10, "update_end": 5}, "update_end=5 is not allowed; it is before update_start=10"),
        (sb.RigL, {"optimizer": None, "paper": True}, "paper=True replaces steps of the optimizer, but no"),
        (sb.OMP, {"scope": "network"}, "scope='network' is not known; allowed: global, layer"),
        (sb.HYDRA, {"scope": "network"}, "scope='network' is not known; allowed: global, layer"),
        (sb.HYDRA, {"score_lr": -1.0}, "score_lr=-1.0 is not allowed; expected a finite number >= 0"),
        (sb.IMP, {"levels": 0}, "levels=0 is not allowed; expected a whole number, at least 1"),
        (sb.IMP, {"levels": 2.5}, "levels=2.5 is not allowed; expected a whole number, at least 1"),
        (sb.IMP, {"rate": 1.0}, r"rate=1.0 is not allowed; expected a number in \(0, 1\) or None"),
        (sb.IMP, {"rewind_step": -1}, "rewind_step=-1 is not allowed; expected a whole number, at least 0"),
        (sb.SET, {"update_freq": math.inf}, "update_freq=inf is not allowed; expected a whole number of steps"),
        (sb.SET, {"update_freq": math.nan}, "update_freq=nan is not allowed; expected a whole number of steps"),
        (sb.SET, {"update_freq": 2.5}, "update_freq=2.5 is not allowed; expected a whole number of steps"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    model = sparse_net()
    with pytest.raises(ValueError, match=message):
        cls(model, **{"optimizer": sgd(model)} | arguments)


@pytest.mark.parametrize("cls", [sb.SET, sb.RigL, sb.IMP])
def test_nm_is_refused_where_it_makes_no_sense(cls):
    model = sparse_net(pattern="nm:1:2")
    with pytest.raises(ValueError, match="NM"):
        cls(model, sgd(model))


@pytest.mark.parametrize("optimizer", ["sgd", 3, [None], [torch.zeros(2)]], ids=str)
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(
        ValueError, match="optimizer is or has a .*; expected a torch.optim.Optimizer, several, or None"
    ):
        sb.RigL(sparse_net(), optimizer)


def test_a_weight_that_is_computed_is_refused():
    model = sparse_net()
    nn.utils.parametrizations.weight_norm(model[6])
    with pytest.raises(ValueError, match="the weight of '6' is computed"):
        sb.Static(model)


def test_a_dense_model_is_refused():
    with pytest.raises(
        ValueError, match=r"model has no sparse layers; call sparsebilevel.sparsify\(model, sparsity=...\)"
    ):
        sb.Static(tiny_net())


@pytest.mark.parametrize("name", ["omp", "hydra", "bip"])
def test_nan_weights_raise(name):
    cls, kwargs, _ = METHODS[name]
    model = sparse_net(init="dense")
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        cls(model, sgd(model), **kwargs)


def test_the_checksum_sees_every_bit_and_the_order_of_layers():
    masks = list(masks_of(sb.Static(sparse_net())).values())
    seen = {int(checksum(masks)), int(checksum(masks[::-1]))}
    for mask in masks:
        for i in range(0, mask.numel(), 7):
            mask.view(-1)[i] ^= True
            seen.add(int(checksum(masks)))
            mask.view(-1)[i] ^= True
    assert len(seen) == 2 + sum(len(range(0, mask.numel(), 7)) for mask in masks)
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    lasting = scores.clone(memory_format=torch.preserve_format).t().contiguous().t()  # other strides, the same values
    assert int(checksum([scores])) == int(checksum([lasting])) != int(checksum([-scores]))


# -- many processes ---------------------------------------------------------------------------------------------------


def rank_loss(model, step, rank):
    x, y = batch(step, rank=rank)
    return F.cross_entropy(model(x), y)


def all_ranks(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return parts


def assert_equal_on_ranks(*tensors):
    for tensor in tensors:
        first, second = all_ranks(tensor)
        assert torch.equal(first, second)


def run_method_on_ranks(name, rank, mask_seed):
    """Both ranks see different data; masks, weights and scores must stay equal."""
    cls, kwargs, init = METHODS[name]
    model = sparse_net(0.8, seed=0, init=init)
    for _, layer in sb.sparse_layers(model):
        layer.reset_mask(torch.Generator().manual_seed(mask_seed))
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = sgd(model)
    sparsifier = cls(ddp, opt, **kwargs)
    assert list(sparsifier.weights) == ["0", "3", "6"]
    for step in range(1, 10):
        if cls is sb.BiP:
            sparsifier.upper_step(lambda step=step: rank_loss(ddp, 100 + step, rank))
        opt.zero_grad()
        rank_loss(ddp, step, rank).backward()
        expected = {
            n: sum(all_ranks(g)) / 2 for n, m in sparsifier.weights.items() if (g := m.effective_grad) is not None
        }
        found = sparsifier._take_grads(None)
        assert found.keys() == expected.keys()
        for n, grad in found.items():
            torch.testing.assert_close(grad, expected[n])
        opt.step()
        sparsifier.step()
        assert_equal_on_ranks(*(m.mask.float() for m in sparsifier.weights.values()), *model.parameters())
        if cls in (sb.BiP, sb.BiDST):
            assert_equal_on_ranks(*(m.scores for m in sparsifier.weights.values()))
    assert cls is sb.BiP or len(sparsifier.history) == 2
    return sparsifier


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("rigl", "set", "bidst", "bip"):
        run_method_on_ranks(name, rank, mask_seed=0)
    sparsifier = run_method_on_ranks("bidst", rank, mask_seed=rank)  # rank 0's masks are taken
    masks = masks_of(sparsifier)
    masks["3"] = masks["3"].roll(rank)
    with pytest.raises(RuntimeError, match="ranks disagree on the masks after step 9; were their gradients equal"):
        sparsifier.set_masks(masks)
    dist.barrier()
    gc.collect()  # the wrapped models hold the process group, whose threads must end before the process does
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    torch.multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=2)


# -- what methods notice ----------------------------------------------------------------------------------------------


def test_a_layer_that_a_step_does_not_reach_keeps_its_mask():
    """Growth scores that are all equal would grow the first rows."""
    model, opt, rigl = build("rigl", update_freq=4)
    train(model, opt, rigl, 3)
    before = masks_of(rigl)
    opt.zero_grad()
    (compute_loss(model, 3) * 0).backward()
    opt.step()
    assert rigl.step()
    assert same_masks(before, masks_of(rigl))
    train(model, opt, rigl, 4, start=4)
    assert not same_masks(before, masks_of(rigl))


def test_rigl_names_the_layer_whose_gradient_was_nan():
    model, opt, rigl = build("rigl", update_freq=1)
    (compute_loss(model, 0) * math.nan).backward()
    with pytest.raises(ValueError, match="'0': scores .*NaN.*call sparsifier.zero_grad"):
        rigl.step()


@pytest.mark.parametrize("name", ["omp", "bip", "imp"])
@pytest.mark.parametrize("asked", [{"sparsity": {"0": 0.5, "*": 0.9}}, {"distribution": "erk"}], ids=str)
def test_a_ranking_over_all_layers_says_that_single_targets_do_not_hold(name, asked, caplog):
    cls, kwargs, _ = METHODS[name]
    kwargs = {key: value for key, value in kwargs.items() if key not in ("scope", "score_lr")}
    cls(sparse_net(**{"sparsity": 0.8, "init": "dense"} | asked), **kwargs | ({"score_lr": 1} if name == "bip" else {}))
    (record,) = (r for r in caplog.records if "ranks all layers together" in r.message)
    assert f"{cls.__name__} ranks all layers together, at sparsity 0.8" in record.message
    assert ("scope='layer' keeps to it" in record.message) == (name != "imp")


@pytest.mark.parametrize("name", ["omp", "bip"])
def test_a_ranking_that_was_asked_for_says_nothing(name, caplog):
    cls, pace = METHODS[name][0], {"score_lr": 0.1} if name == "bip" else {}
    cls(sparse_net(0.8, init="dense"), **pace)  # one target for all
    cls(sparse_net(0.8, init="dense", distribution="erk"), scope="global", **pace)
    layered = cls(sparse_net(0.8, init="dense", distribution="erk"), scope="layer", **pace)
    assert "ranks all" not in caplog.text
    assert all(w.pattern.count(w.mask) == w.num_kept for w in layered.weights.values())


def test_code_that_reads_a_weight_past_its_layer_is_noticed_once(caplog):
    model = sparse_net(0.8)
    opt = sgd(model)
    rigl = sb.RigL(model, opt, update_freq=2, update_end=100)
    for step in range(5):
        opt.zero_grad()
        (compute_loss(model, step) + model[6].weight.square().sum()).backward()
        opt.step()
        rigl.step()
        if step == 0:
            assert not any("reads its weight" in r.message for r in caplog.records)  # hidden weights are zero yet
        model[6].weight.data += 0.01
    assert sum("'6' has a gradient where its mask is False" in r.message for r in caplog.records) == 1


def test_a_weight_that_is_tied_to_a_dense_module_is_named(caplog):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    sb.sparsify(model, 0.5)
    sb.Static(model)
    assert not caplog.records
    model["head"].weight = model["embed"].weight
    sb.Static(model)
    assert "'embed' (Embedding) shares the weight of 'head' and reads it without the mask" in caplog.text


def test_a_model_that_was_densified_in_place_is_named():
    model, opt, static = build("static")
    sb.densify(model, inplace=True)
    with pytest.raises(RuntimeError, match=r"the model of Static was densified in place; call release\(\) before"):
        static.step()


def test_nm_masks_are_drawn_within_their_runs():
    model = sparse_net(0.5, init="dense", pattern=NM(1, 2))
    static = sb.Static(model, sgd(model))
    for masked in static.weights.values():
        assert (masked.mask.movedim(1, -1).reshape(-1, 2).sum(1) == 1).all()


def test_hydra_leaves_frozen_what_was_frozen():
    model = sparse_net(0.8, init="dense")
    model[1].requires_grad_(False)
    hydra = sb.HYDRA(model, sgd(model))
    assert not any(p.requires_grad for p in model.parameters())
    hydra.finish()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"1.weight", "1.bias"}


def test_a_refused_state_leaves_the_targets_as_they_were():
    model = sparse_net(0.5)
    static = sb.Static(model, sgd(model))
    other = sparse_net(0.8)
    with pytest.raises(ValueError, match="not those of the state"):
        static.load_state_dict(sb.Static(other, sgd(other)).state_dict())
    assert {n: w.num_kept for n, w in static.weights.items()} == counts(static)


@pytest.mark.parametrize("name", ["hydra", "bidst", "bip"])
def test_a_refused_resumption_gives_scores_back(name):
    model, opt, first = build(name)
    train(model, opt, first, 3)
    cls, kwargs, init = METHODS[name]
    other = sparse_net(0.8, 1, distribution="erk", init=init)
    other.load_state_dict(model.state_dict())
    before = copy.deepcopy(other.state_dict())
    assert any(key.endswith("mask_scores") for key in before)
    with pytest.raises(ValueError, match="not those of the state"):
        cls.resume(build(name, seed=3)[2].state_dict(), other, sgd(other), **kwargs)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_copy_of_a_released_method_leaves_the_model_free():
    model, _, sparsifier = build("static")
    sparsifier.release()
    twin, copied = copy.deepcopy((model, sparsifier))
    assert copied.released
    sb.SET(twin, sgd(twin))


def test_the_overlap_in_the_log_is_that_of_the_last_change():
    model, opt, rigl = build("rigl", update_freq=2, update_end=12)
    found = []
    for step in range(8):
        before = masks_of(rigl)
        if take_step(model, opt, rigl, step):
            shared = sum(int((before[n] & w.mask).sum()) for n, w in rigl.weights.items())
            union = sum(int((before[n] | w.mask).sum()) for n, w in rigl.weights.items())
            found.append(shared / union)
            assert rigl.metrics()["mask_iou"] == found[-1]
    assert len(set(found)) > 1


def test_lbfgs_forgets_its_directions_when_the_topology_changes():
    model = sparse_net(0.8)
    opt = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4)
    method = sb.SET(model, opt, update_freq=2, update_end=50)
    x, y = batch(0)

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    changes = 0
    for _ in range(6):
        opt.step(closure)
        changes += method.step()
        for masked in method.weights.values():
            assert not masked.weight[~masked.mask].any()
    assert changes == 3


@pytest.mark.parametrize("name", ["static", "bidst"])
def test_methods_are_sent_to_spawned_processes(name):
    """As torch.multiprocessing pickles, which sends no generator."""
    model, opt, method = build(name)
    method.generator.manual_seed(5)
    twin = pickle.loads(bytes(ForkingPickler.dumps((model, opt, method))))[2]
    assert torch.rand(3, generator=twin.generator).equal(torch.rand(3, generator=method.generator))
    assert twin.model is not method.model
