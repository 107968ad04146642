"""Masks and methods that users bring: the examples of docs/methods.md as they stand there, and ``set_masks``."""

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_training import batch, masks_of, same_masks, sgd, sparse_net, take_step, tiny_net, train
from torch import nn

import sparsebilevel as sb

BLOCKS = re.findall(
    r"^```python\n(.*?)```",
    (Path(__file__).parent.parent / "docs" / "methods.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
SNIP, GMP, GRANET = BLOCKS


def methods():
    """The classes of the document."""
    scope = {"sb": sb, "math": math}
    for code in (GMP.split("\n\n\nsb.sparsify")[0], GRANET):
        exec(code, scope)
    return scope


def gradual(name, pattern="unstructured", seed=0):
    model = sparse_net(0.75, init="dense", pattern=pattern, seed=seed)
    opt = sgd(model)
    return model, opt, methods()[name](model, opt, ramp=12, update_freq=3)


def test_the_first_example_keeps_what_the_loss_depends_on_most():
    torch.manual_seed(0)
    model = tiny_net()
    x, y = batch(0)
    scope = {"sb": sb, "F": F, "model": model, "x": x, "y": y, "optimizer": sgd(model)}
    exec(SNIP.replace("sb.sparsify(model, 0.9,", "sb.sparsify(model, 0.75,"), scope)
    torch.manual_seed(0)
    dense = tiny_net()
    F.cross_entropy(dense(x), y).backward()
    weights = [dense[i].weight for i in (0, 3, 6)]
    salience = torch.cat([(w * w.grad).abs().flatten() for w in weights])
    masks = torch.cat([m.flatten() for m in masks_of(scope["sparsifier"]).values()])
    assert masks.sum() == sum(round(w.numel() * 0.25) for w in weights)
    assert salience[masks].min() >= salience[~masks].max()
    take_step(model, scope["optimizer"], scope["sparsifier"], 1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "filter"])
@pytest.mark.parametrize("name", ["GMP", "GraNet"])
def test_the_examples_prune_step_by_step_to_the_target(name, pattern, caplog):
    model, opt, method = gradual(name, pattern)
    target = {n: layer.pattern.num_groups(layer.weight.shape) for n, layer in sb.sparse_layers(model)}
    wanted = {n: m.num_kept for n, m in sb.sparse_layers(sparse_net(0.75, pattern=pattern))}
    assert method.sparsity == 0
    seen = [dict(target)]
    for step in range(15):
        if take_step(model, opt, method, step):
            seen.append({n: w.pattern.count(w.mask) for n, w in method.weights.items()})
            assert {n: w.num_kept for n, w in method.weights.items()} == seen[-1]
    assert len(seen) == 6
    assert seen[-1] == seen[-2] == wanted
    assert all(seen[1][n] < target[n] for n in target if wanted[n] < target[n] - 1)
    assert all(later[n] <= earlier[n] for earlier, later in itertools.pairwise(seen) for n in target)
    if name == "GMP" or pattern != "filter":  # of which there are too few to exchange any
        assert (sum(record["grown"] for record in method.history) > 0) == (name == "GraNet")
    assert not caplog.records
    for w in method.weights.values():
        assert (w.weight[~w.mask] == 0).all()
        assert (opt.state[w.weight]["momentum_buffer"][~w.mask] == 0).all()


@pytest.mark.parametrize("name", ["GMP", "GraNet"])
@pytest.mark.parametrize("steps", [2, 7, 13])
def test_the_examples_resume_to_the_same_bits(name, steps):
    first = gradual(name)
    train(*first, steps)
    second = gradual(name, seed=7)
    for object_, state in zip(second, copy.deepcopy([one.state_dict() for one in first]), strict=True):
        object_.load_state_dict(state)
    for run in (first, second):
        train(*run, 8, start=steps)
    assert same_masks(masks_of(first[2]), masks_of(second[2]))
    for (key, a), b in zip(first[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert len(first[2].history) == len(second[2].history)


# -- set_masks --------------------------------------------------------------------------------------------------------


def with_method(name, sparsity=0.5, **kwargs):
    model = sparse_net(sparsity, **kwargs)
    opt = sgd(model)
    method = getattr(sb, name)(model, opt)
    train(model, opt, method, 2)
    return model, opt, method


def everything(model, opt, method):
    state = [v.clone() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    counts = [w.num_kept for w in method.weights.values()]
    return [*(v.clone() for v in model.state_dict().values()), *state, torch.tensor(counts)]


@pytest.mark.parametrize("name", ["Static", "SET", "RigL", "BiDST"])
def test_layers_keep_as_many_weights_as_the_masks_that_they_are_given(name):
    model, opt, method = with_method(name)
    mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    mask.view(-1)[::5] = True
    others = {n: m for n, m in masks_of(method).items() if n != "3"}
    was = method.weights["3"].mask.clone()
    weight = model[3].weight.detach().clone()
    method.set_masks({"3": mask})
    assert torch.equal(model[3].mask, mask)
    assert same_masks(others, {n: m for n, m in masks_of(method).items() if n != "3"})
    assert torch.equal(model[3].weight[mask & was], weight[mask & was])
    assert (model[3].weight[~(mask & was)] == 0).all()
    assert (opt.state[model[3].weight]["momentum_buffer"][~(mask & was)] == 0).all()
    train(model, opt, method, 5, start=2)
    method.change_topology({n: torch.randn(w.weight.shape) for n, w in method.weights.items()})
    assert int(model[3].mask.sum()) == int(mask.sum()) == method.weights["3"].num_kept


@pytest.mark.parametrize("how", ["method", "layer"])
@pytest.mark.parametrize("name", ["Static", "RigL", "BiDST"])
def test_a_run_with_masks_from_outside_resumes(name, how):
    first = with_method(name)
    mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
    mask.view(-1)[::5] = True
    first[2].set_masks({"3": mask}) if how == "method" else first[0][3].set_mask(mask)
    second = with_method(name)
    for object_, state in zip(second, copy.deepcopy([one.state_dict() for one in first]), strict=True):
        object_.load_state_dict(state)
    assert torch.equal(second[0][3].mask, mask)
    for run in (first, second):
        train(*run, 3, start=2)
    assert all(torch.equal(a, b) for a, b in zip(everything(*first), everything(*second), strict=True))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.mask": torch.ones(6, 2, 3, 3) > 0},
            r"masks has '0.mask', which is no weight of the method; allowed: '0', '3'",
        ),
        (
            {"3": torch.ones(6, dtype=torch.bool)},
            r"mask of '3' is a torch.bool \[6\]; expected torch.bool \[8, 6, 3, 3\]",
        ),
        ({"3": torch.ones(8, 6, 3, 3)}, r"mask of '3' is a torch.float32 \[8, 6, 3, 3\]; expected torch.bool"),
        ({"3": torch.ones(8, 6, 3, 3).numpy() > 0}, "mask of '3' is a ndarray; expected torch.bool"),
        ({"3": torch.eye(8).bool()[:, :6, None, None].expand(8, 6, 3, 3)}, "'3': mask does not fit pattern Block"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks, message):
    model, opt, method = with_method("SET", pattern="block:2x2")
    before = everything(model, opt, method)
    good = {"0": torch.zeros(6, 2, 3, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        method.set_masks(good | masks)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, opt, method), strict=True))


def test_a_proposal_that_does_not_fit_is_refused_too():
    class Wrong(sb.Sparsifier):
        def propose_masks(self, grads):
            return {"3": torch.ones(8, dtype=torch.bool)}

    model = sparse_net(0.5)
    with pytest.raises(ValueError, match=r"mask of '3' is a torch.bool \[8\]"):
        Wrong(model).change_topology()


@pytest.mark.parametrize("name", ["OMP", "BiP"])
def test_a_ranking_over_all_layers_keeps_its_sum(name):
    model, opt, method = with_method(name, init="dense")
    masks = masks_of(method)
    masks["3"] = masks["3"].roll(1)
    method.set_masks(masks)
    assert torch.equal(model[3].mask, masks["3"])
    with pytest.raises(ValueError, match=rf"masks keep \d+ groups, and {name} keeps {method.target_count()} over all"):
        method.set_masks({"3": torch.zeros_like(masks["3"])})
    assert torch.equal(model[3].mask, masks["3"])


def test_masks_are_not_changed_for_a_method_that_has_left():
    model, opt, method = with_method("Static")
    method.release()
    before = masks_of(method)
    with pytest.raises(RuntimeError, match="Static was released, and its model is not its own any more"):
        method.set_masks({"3": ~before["3"]})
    model, opt, bip = with_method("BiP", init="dense")
    bip.finish()
    with pytest.raises(RuntimeError, match="BiP was released"):
        bip.set_masks(masks_of(bip))
    train(model, opt, bip, 2, start=2)  # fine-tuning goes on


# -- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Static", "RigL", "BiDST"])
def test_random_pruning_of_a_dense_start_is_said(name, caplog):
    model = sparse_net(0.75, init="dense")
    getattr(sb, name)(model, sgd(model), update_freq=10, update_end=20)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        f"{name} changes the masks of 3 layers at random, from 900 groups in all to their target of 225"
        in record.message
    )


def test_masks_that_were_chosen_are_kept_or_their_loss_is_said(caplog):
    model = sparse_net(0.75, init="dense")
    for kept, (_, layer) in zip((20, 100, 90), sb.sparse_layers(model), strict=True):
        layer.set_mask(sb.binarize(layer.weight.abs(), kept))
    chosen = {n: layer.mask.clone() for n, layer in sb.sparse_layers(model)}
    static = sb.Static(model)
    assert same_masks(chosen, masks_of(static))
    assert not any("at random" in record.message for record in caplog.records)
    static.release()
    sb.Static(model, sparsity=0.75)
    assert (
        "Static changes the masks of 2 layers at random, from 120 groups in all to their target of 135" in caplog.text
    )


def test_a_method_without_hooks_leaves_masks_as_its_initialize_does():
    class Own(sb.Sparsifier):
        def initialize(self):
            pass

    model = sparse_net(0.75, init="dense")
    own = Own(model, sgd(model))
    assert own.sparsity == 0
    assert [w.num_kept for w in own.weights.values()] == [108, 432, 360]
    other = Own(sparse_net(0.75, init="dense"))
    other.model.load_state_dict(model.state_dict())
    other.load_state_dict(own.state_dict())


def test_a_search_space_that_another_took_away_is_named():
    model, opt, bidst = with_method("BiDST")
    model[3].collect("all")
    with pytest.raises(RuntimeError, match="'3' collects no search space any more; did another call its collect"):
        take_step(model, opt, bidst, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_a_state_with_numbers_for_a_mask(dtype):
    model = sb.sparsify(nn.Sequential(nn.Linear(4, 3)), 0.5)
    mask = torch.tensor([[1, 0, 0, 1]] * 3, dtype=dtype)
    model.load_state_dict({"0.mask": mask}, strict=False)
    assert model[0].mask.dtype == torch.bool
    assert torch.equal(model[0].mask, mask.bool())
    soft = mask * 2 if dtype != torch.float32 else mask * 0.1
    with pytest.raises(RuntimeError, match=rf"layer '0': mask has dtype {dtype} and values other than 0 and 1"):
        model.load_state_dict({"0.mask": soft}, strict=False)
    assert torch.equal(model[0].mask, mask.bool())


def test_a_layer_of_a_ranking_may_exchange_as_many_weights_as_it_has():
    """What the other layers keep is what their masks keep, not their share of the target."""
    _, _, method = with_method("OMP", init="dense")
    masked = method.weights["3"]
    assert int(masked.mask.sum()) != masked.num_kept
    mask = masked.mask.flip(0)
    assert not torch.equal(mask, masked.mask)
    method.set_masks({"3": mask})
    assert torch.equal(masked.mask, mask)
