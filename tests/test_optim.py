"""Optimizers that step active weights alone: the numbers of torch's fused steps, whatever the weights and settings."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebilevel as sb
from sparsebilevel import optim
from sparsebilevel.costs import measure_layers
from sparsebilevel.kernels import native, optimizer_step
from sparsebilevel.nn import is_gradient_shared

needs_extension = pytest.mark.skipif(not native.available(), reason="the C++ extension is not there")

SETTINGS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "adamw": ("AdamW", {"lr": 1e-2}),
    "adamw, far": ("AdamW", {"lr": 1e-2, "betas": (0.3, 0.9), "eps": 1e-4, "weight_decay": 0.0, "maximize": True}),
}


def fused_multiply_adds() -> bool:
    """Whether torch's fused steps and ours are known to round alike: as torch 2.13 is built for x86."""
    return (
        torch.__version__.startswith("2.13.")
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and native.available()
        and native.isa() in ("avx2", "avx512")
    )


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    if fused_multiply_adds() and a.numel() % 16 == 0:
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def assert_same_training(model, optimizer, other, other_optimizer) -> None:
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(a.detach(), b.detach())
        assert (a in optimizer.state) == (b in other_optimizer.state)
        states = optimizer.state.get(a, {}), other_optimizer.state.get(b, {})
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            if isinstance(value, torch.Tensor):
                assert_same(value, states[1][name])


def network(sparsity: float = 0.99, width: int = 512, **kwargs) -> nn.Module:
    """A sparse linear layer large enough for steps on active weights, a small one, and biases."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 10))
    return sb.sparsify(model, sparsity, seed=0, **kwargs)


def batch(step: int, width: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, width, generator=generator), torch.randint(10, (16,), generator=generator)


def train(model, optimizer, sparsifier=None, steps: int = 8, start: int = 0) -> None:
    for step in range(start, start + steps):
        x, y = batch(step, model[0].in_features)
        if isinstance(sparsifier, sb.BiP):
            sparsifier.upper_step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()


def make(setting: str, module, parameters, **kwargs) -> torch.optim.Optimizer:
    name, settings = SETTINGS[setting]
    return getattr(module, name)(parameters, **settings | kwargs)


def pair(setting: str, method=sb.Static, method_arguments=None, **kwargs):
    """(model, our optimizer, method) and (the same model, torch's fused optimizer, method)."""
    out = []
    for module, more in ((optim, {}), (torch.optim, {"fused": True})):
        model = network(**kwargs)
        optimizer = make(setting, module, model.parameters(), **more)
        out.append((model, optimizer, method and method(model, optimizer, **(method_arguments or {}))))
    return out


@pytest.fixture
def calls(monkeypatch):
    """How many weights each step on active weights took."""
    counts: list[int] = []
    for name in ("sgd_step", "adamw_step"):
        step = getattr(optimizer_step, name)
        monkeypatch.setattr(
            optimizer_step, name, lambda weights, step=step, **kw: (counts.append(len(weights)), step(weights, **kw))
        )
    return counts


@needs_extension
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_torchs_fused_step(setting, isa, calls):
    before = native.lib.isa()
    native.lib.set_isa(native.lib.Isa.__members__[isa])
    try:
        for width in (512, 509):  # all in whole pieces, and not
            ours, theirs = pair(setting, width=width)
            train(*ours)
            train(*theirs)
            assert_same_training(*ours[:2], *theirs[:2])
    finally:
        native.lib.set_isa(before)
    assert calls == [1] * len(calls)
    assert len(calls) == (16 if setting == "sgd" else 14)  # the first step, which makes the state, is torch's


@needs_extension
@pytest.mark.parametrize("method", [sb.SET, sb.RigL, sb.BiDST])
@pytest.mark.parametrize("setting", ["nesterov", "adamw"])
def test_topology_changes(setting, method, calls):
    if not fused_multiply_adds():
        pytest.skip("a difference in the last bit may change a mask")
    ours, theirs = pair(setting, method, {"update_freq": 3}, sparsity=0.98)
    train(*ours, steps=20)
    train(*theirs, steps=20)
    assert ours[2].history
    assert_same_training(*ours[:2], *theirs[:2])
    assert torch.equal(ours[0][0].mask, theirs[0][0].mask)
    assert len(calls) == 19
    layer = ours[0][0]
    for tensor in (layer.weight, *ours[1].state[layer.weight].values()):
        assert tensor.dim() == 0 or not tensor.detach()[~layer.mask].any()  # exactly zero


@needs_extension
def test_momentum_of_what_is_masked_stays_zero_whatever_the_gradient_is(calls):
    (model, optimizer, sparsifier), _ = pair("momentum")
    train(model, optimizer, sparsifier, steps=2)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    assert len(calls) == 2
    outside = ~model[0].mask
    assert not model[0].weight.detach()[outside].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][outside].any()


@pytest.mark.parametrize("method", [None, sb.BiP])
@pytest.mark.parametrize("setting", ["momentum", "adamw"])
def test_weights_stored_outside_of_the_mask_take_the_dense_step(setting, method, calls):
    ours, theirs = pair(setting, method, {"sparsity": 0.99} if method else {}, init="dense" if method else "random")
    before = ours[0][0].weight.detach().clone()
    train(*ours)
    train(*theirs)
    assert_same_training(*ours[:2], *theirs[:2])
    assert not calls
    outside = ~ours[0][0].mask
    assert (
        ours[0][0].weight.detach()[outside].abs() < before[outside].abs()
    ).any()  # decayed, though the mask hides it


@needs_extension
def test_looks_again_when_something_has_changed(calls):
    (model, optimizer, _), (other, other_optimizer, _) = pair("momentum")
    layers = model[0], other[0]

    def both(count: int) -> None:
        del calls[:]
        train(model, optimizer, steps=2)
        train(other, other_optimizer, steps=2)
        assert_same_training(model, optimizer, other, other_optimizer)
        assert len(calls) == count

    both(1)
    for layer in layers:  # a weight outside of the mask
        with torch.no_grad():
            layer.weight[~layer.mask] = 1.0
    both(0)
    for layer in layers:
        with torch.no_grad():
            layer.weight[~layer.mask] = 0.0
    for some in (optimizer, other_optimizer):  # its momentum
        some.state[some.param_groups[0]["params"][0]]["momentum_buffer"].masked_fill_(~layers[0].mask, 0)
    both(2)
    for layer in layers:  # another mask
        layer.set_mask(layer.mask.roll(7, 1))
        with torch.no_grad():
            layer.weight.masked_fill_(~layer.mask, 0)
    for some in (optimizer, other_optimizer):
        some.state[some.param_groups[0]["params"][0]]["momentum_buffer"].masked_fill_(~layers[0].mask, 0)
    both(2)
    for layer in layers:  # all of it
        layer.set_mask(torch.ones_like(layer.mask))
    both(0)


@needs_extension
@pytest.mark.parametrize("setting", ["momentum", "adamw"])
def test_checkpoints_go_both_ways(setting, calls):
    (model, optimizer, _), (other, other_optimizer, _) = pair(setting)
    train(model, optimizer, steps=6)
    train(other, other_optimizer, steps=3)
    crossed = network()
    sb.Static(crossed, None)
    crossed.load_state_dict(other.state_dict())
    ours = make(setting, optim, crossed.parameters())
    assert ours.state_dict()["param_groups"][0].keys() == other_optimizer.state_dict()["param_groups"][0].keys()
    ours.load_state_dict(other_optimizer.state_dict())
    train(crossed, ours, steps=2, start=3)
    back = make(setting, torch.optim, crossed.parameters(), fused=True)
    back.load_state_dict(ours.state_dict())
    train(crossed, back, steps=1, start=5)
    assert_same_training(model, optimizer, crossed, back)


@needs_extension
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(duplicate, calls):
    (model, optimizer, _), _ = pair("adamw")
    train(model, optimizer, steps=3)
    other, other_optimizer = duplicate((model, optimizer))
    train(model, optimizer, start=3)
    train(other, other_optimizer, start=3)
    assert len(calls) == 2 + 8 + 8
    assert_same_training(model, optimizer, other, other_optimizer)


@needs_extension
def test_weights_are_swapped_between_steps(calls):
    """As torch does where it is told to, unless somebody holds a weak reference to weight or mask."""
    (model, optimizer, _), _ = pair("momentum")
    train(model, optimizer, steps=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.zero_grad()
        model.load_state_dict(before)
        model.to(memory_format=torch.channels_last).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(model, optimizer, steps=1, start=3)
    assert len(calls) == 3


@needs_extension
def test_a_parameter_put_in_place_of_another(calls):
    (model, _, _), _ = pair("momentum")
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    optimizer = make("momentum", optim, model.parameters())
    train(model, optimizer, steps=3)
    assert calls == [1, 1]


@needs_extension
@pytest.mark.parametrize("setting", ["nesterov", "adamw"])
def test_number_of_threads(setting, calls):
    before, results = torch.get_num_threads(), []
    (start, start_optimizer, _), _ = pair(setting)
    train(start, start_optimizer, steps=2)
    gradients = [torch.randn_like(p) for p in start.parameters()]
    try:
        for threads in (1, 2, 5):
            model, optimizer = copy.deepcopy((start, start_optimizer))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            torch.set_num_threads(threads)
            optimizer.step()
            results.append(model[0].weight.detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_without_the_extension(monkeypatch, calls):
    monkeypatch.setattr(native, "lib", None)
    ours, theirs = pair("nesterov")
    train(*ours)
    train(*theirs)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True))


@needs_extension
def test_channels_last_weights_filters_and_groups(calls):
    trained = []
    for module, more in ((optim, {}), (torch.optim, {"fused": True})):
        torch.manual_seed(0)
        model = sb.sparsify(nn.Conv2d(64, 128, 3, padding=1), 0.9, pattern="filter", seed=0)
        model = model.to(memory_format=torch.channels_last)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0, "lr": 0.2}]
        optimizer = make("momentum", module, groups, **more)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        sb.Static(model, optimizer)
        for step in range(5):
            x = torch.randn(4, 64, 6, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()
            schedule.step()
        trained.append((model, optimizer))
    assert calls == [1] * 4
    assert_same_training(*trained[0], *trained[1])


@needs_extension
def test_layers_that_share_a_weight(calls):
    first = nn.Linear(512, 512)
    tied = nn.Linear(512, 512)
    tied.weight = first.weight
    model = sb.sparsify(nn.Sequential(first, nn.ReLU(), tied), 0.99, seed=0)
    optimizer = make("momentum", optim, model.parameters())
    sb.Static(model, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)[0]).square().mean().backward()
        optimizer.step()
    assert not calls  # two masks, which could differ


ELSEWHERE = {
    "foreach": ("momentum", {"foreach": True}),
    "not fused": ("adamw", {"fused": False}),
    "tensor lr": ("momentum", {"lr": torch.tensor(0.1)}),
    "amsgrad": ("adamw", {"amsgrad": True}),
    "for loop": ("adamw", {"foreach": False}),
    "eps": ("adamw", {"eps": 0.0, "weight_decay": 0.0}),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_settings_that_are_left_to_torch(case, calls):
    setting, arguments = ELSEWHERE[case]
    trained = []
    for module in (optim, torch.optim):
        model = network()
        optimizer = make(setting, module, model.parameters(), **arguments)
        train(model, optimizer, sb.Static(model, optimizer), steps=4)
        trained.append(model)
    assert not calls
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_tensors_that_are_left_to_torch(calls):
    trained = []
    for module in (optim, torch.optim):
        torch.manual_seed(0)
        double = sb.sparsify(nn.Linear(512, 512).double(), 0.99, seed=0)
        embedding = nn.Embedding(10, 4, sparse=True)
        odd, half = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8).bfloat16())
        parameters = [double.weight, embedding.weight, odd, half]
        optimizer = module.SGD(parameters, lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            double(batch(step)[0].double()).square().mean().backward()
            embedding(torch.tensor([1, 2, step])).square().mean().backward()
            odd.grad, half.grad = torch.randn(6, 8).t(), torch.randn(8).bfloat16()
            optimizer.step()
        trained.append(parameters)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_parameters_whose_training_starts_later(calls):
    """Torch's fused step cannot take tensors with a momentum buffer and tensors without."""
    model = network()
    model[2].requires_grad_(False)
    optimizer = make("momentum", optim, model.parameters())
    train(model, optimizer, steps=2)
    model[2].requires_grad_(True)
    before = model[2].weight.detach().clone()
    train(model, optimizer, steps=2)
    assert not torch.equal(model[2].weight, before)


@needs_extension
def test_closure_and_hooks(calls):
    model = network()
    torch.optim.SGD(model.parameters(), lr=0.1)  # torch hooks its own step from now on
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sb.Static(model, optimizer)
    hooks = []
    optimizer.register_step_pre_hook(lambda *_: hooks.append("pre"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(3):
        x, y = batch(step)
        assert optimizer.step(closure).requires_grad
    assert hooks == ["pre", "post"] * 3
    assert calls == [1, 1]


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(fused):
    trained = []
    for module in (optim, torch.optim):
        model = network()
        optimizer = make("adamw", module, model.parameters(), fused=True if module is torch.optim else fused)
        sb.Static(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if step == 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        trained.append((model, optimizer))
    assert scaler.get_scale() == 512
    for a, b in zip(trained[0][0].parameters(), trained[1][0].parameters(), strict=True):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()
        assert trained[0][1].state[a]["step"] == trained[1][1].state[b]["step"] == 3


def test_the_loss_stays_differentiable():
    weight = nn.Parameter(torch.randn(4))
    optimizer = optim.SGD([weight.clone()], lr=0.1, differentiable=True)
    moved = optimizer.param_groups[0]["params"][0]
    moved.grad = torch.ones(4)
    optimizer.step()
    moved.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4))


def test_compiled_training_step(calls):
    trained = []
    for module, more in ((optim, {}), (torch.optim, {})):
        model = network()
        optimizer = make("momentum", module, model.parameters(), **more)
        sb.Static(model, optimizer)
        step = torch.compile(optimizer.step, backend="eager")
        for i in range(3):
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step()
        trained.append(model)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


# -- one gradient for weights and scores -------------------------------------------------------------------------------


def learner(setting: str, shared: bool, dtype=torch.float32, **kwargs):
    """A model that learns weights and scores, and our optimizer, which steps them with settings of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.Linear(6, 4)).to(dtype)
    sb.sparsify(model, 0.5, seed=0)
    layers = [layer for _, layer in sb.sparse_layers(model)]
    for layer in layers:
        layer.set_mask_scores(nn.Parameter(torch.randn_like(layer.weight)))
    if shared:
        assert optim.share_gradient(model) == ["0", "3", "4"]
    scores = [layer.mask_scores for layer in layers]
    others = [p for p in model.parameters() if all(p is not s for s in scores)]
    groups = [{"params": others}, {"params": scores, "lr": 0.03, "weight_decay": 0.1}]
    return model, layers, make(setting, optim, groups, **kwargs)


def images(step: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model, step: int, factor: float = 1.0) -> torch.Tensor:
    loss = F.cross_entropy(model(images(step, next(model.parameters()).dtype)), torch.arange(4)) * factor
    loss.backward()
    return loss


def assert_learned_alike(plain, shared, **tolerance) -> None:
    for a, b in zip(plain[0].parameters(), shared[0].parameters(), strict=True):
        torch.testing.assert_close(b.detach(), a.detach(), **tolerance)
        states = shared[2].state[b], plain[2].state[a]
        assert states[0].keys() == states[1].keys()
        torch.testing.assert_close(dict(states[0]), dict(states[1]), **tolerance)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_shared_gradient_gives_the_numbers_of_two(setting):
    trained = []
    for shared in (False, True):
        model, layers, optimizer = learner(setting, shared, torch.float64)
        for step in range(6):
            optimizer.zero_grad()
            for part in range(3):  # accumulation
                backward(model, 3 * step + part)
            held = [layer.weight.grad for layer in layers]
            optimizer.step()
            assert all(layer.weight.grad is grad for layer, grad in zip(layers, held, strict=True))
            assert all((layer.mask_scores.grad is None) == shared for layer in layers)
        trained.append((model, layers, optimizer))
    assert_learned_alike(*trained, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [None, "lines"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_shared_gradient_is_that_of_the_effective_weight(layout, autocast):
    found = []
    for shared in (False, True):
        model, layers, _ = learner("sgd", shared)
        if not shared:
            for layer in layers:
                layer.set_mask_scores(None)
                layer.collect("all")
        model = model if layout is None else sb.optimize_for_cpu(model, layout=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for step in range(2):
                model(images(step).repeat(5, 1, 1, 1)).square().sum().backward()
        found.append([layer.weight.grad if shared else layer.effective_grad for layer in layers])
    for got, want, layer in zip(*reversed(found), layers, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        assert got[~layer.mask].any()
        assert layer.mask_scores.grad is None


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("setting", ["momentum", "adamw"])
def test_a_shared_gradient_with_a_scaler_that_skips_a_step(setting, fused):
    trained = []
    for shared in (False, True):
        model, layers, optimizer = learner(setting, shared, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(images(step)), torch.arange(4)) * (1e300 if step == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512
        trained.append((model, layers, optimizer))
    assert_learned_alike(*trained, rtol=1e-5, atol=1e-6)


def test_clipping_clips_the_shared_gradient():
    trained = []
    for shared in (False, True):
        model, layers, optimizer = learner("momentum", shared, torch.float64)
        if not shared:
            for layer in layers:
                layer.collect("all")
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step, 10.0)
            norms = [layer.weight.grad if shared else layer.effective_grad for layer in layers]
            norms += [layer.bias.grad for layer in layers]
            norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in norms]))
            assert norm > 1
            if shared:
                torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), norm)
            else:
                for parameter in model.parameters():
                    parameter.grad /= norm + 1e-6
                for layer in layers:
                    layer.zero_effective_grad()
            optimizer.step()
        trained.append((model, layers, optimizer))
    assert_learned_alike(*trained, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", ["momentum", "adamw"])
def test_checkpoints_with_and_without_a_shared_gradient(setting):
    expected = learner(setting, False)
    for step in range(4):
        expected[2].zero_grad()
        backward(expected[0], step)
        expected[2].step()
    model, layers, optimizer = learner(setting, False)
    for step in range(4):  # after each step the other way, and in a copy
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        state = model.state_dict(), optimizer.state_dict()
        model, layers, optimizer = learner(setting, step % 2 == 0)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        if step == 0:
            model, layers, optimizer = pickle.loads(pickle.dumps((model, layers, optimizer)))
            assert all(layer.shares_gradient for layer in layers)
    assert_learned_alike(expected, (model, layers, optimizer), rtol=1e-5, atol=1e-6)


def test_a_shared_gradient_with_a_closure_compiled_and_with_a_penalty_on_scores():
    def train_learner(shared):
        model, layers, optimizer = learner("adamw", shared, torch.float64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled_step = torch.compile(optimizer.step, backend="eager")

        def closure():
            optimizer.zero_grad()
            loss = backward(model if step < 2 else compiled, step)
            if step % 2:
                sum(layer.mask_scores.sigmoid().sum() for layer in layers).backward()
            return loss

        for step in range(6):
            if step < 4:
                assert optimizer.step(closure).requires_grad
            else:
                closure()
                compiled_step()
        return model, layers, optimizer

    # What torch compiles of the plain step rounds its numbers to float32.
    assert_learned_alike(*map(train_learner, (False, True)), rtol=1e-5, atol=1e-6)


def test_who_may_step_a_shared_gradient():
    model, layers, _ = learner("sgd", True)
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"torch\.optim\.sgd\.SGD, which does not know.*sparsebilevel\.optim"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"optimizer has the weight of a layer of shape \[8, 3, 3, 3\].*mask_scores"):
        optim.SGD([layers[0].weight, layers[0].bias], lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"optimizer has the mask_scores of a layer of shape \[6, 128\].*weight"):
        optim.AdamW([layers[1].mask_scores]).step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    torch.optim.SGD([layers[0].bias], lr=0.1).step()
    optim.SGD([layers[0].bias], lr=0.1).step()
    sb.densify(model, inplace=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_scores_of_a_frozen_weight_learn_on():
    """It has no gradient that could be shared."""
    plain, shared = learner("momentum", False), learner("momentum", True)
    for model, layers, optimizer in (plain, shared):
        layers[0].weight.requires_grad_(False)
        assert not layers[0].shares_gradient
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step)
            assert layers[0].mask_scores.grad.any()
            optimizer.step()
    assert_learned_alike(plain, shared)


def test_which_layers_share_their_gradient():
    model, layers, _ = learner("sgd", False)
    layers[0].set_mask_scores(None)  # none to train
    layers[1].collect("all")  # a method's
    layers[2].mask_scores = nn.Parameter(layers[2].mask_scores.detach().double())
    with pytest.raises(ValueError, match="model has no sparse layer that can share its gradient; expected one whose"):
        optim.share_gradient(model)
    layers[1].collect("none")
    assert optim.share_gradient(model) == ["3"]
    assert [layer.shares_gradient for layer in layers] == [False, True, False]
    assert len(measure_layers(model, images(0), repeats=1)) == 3
    with pytest.raises(ValueError, match=r"support='all': the layer shares its gradient .*; allowed: none"):
        layers[1].collect("all")
    assert optim.share_gradient(model, False) == ["3"]
    layers[1].collect("all")
    backward(model, 0)
    assert not layers[1].weight.grad[~layers[1].mask].any()
    assert layers[1].mask_scores.grad.any()
    layers[1].collect("none")
    optim.share_gradient(model)
    assert is_gradient_shared()
    sb.densify(model, inplace=True)
    gc.collect()  # layers of other tests
    assert not is_gradient_shared()

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    sb.sparsify(tied, 0.5)
    for layer in tied:
        layer.set_mask_scores(nn.Parameter(torch.zeros(4, 4)))
    assert optim.share_gradient(tied) == ["2"]


@needs_extension
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_step_on_active_weights_is_seen_by_autograd(name):
    """What a graph has saved of the weights, its backward must refuse afterwards."""
    model = network()
    weight, mask = model[0].weight, model[0].mask
    with torch.no_grad():
        weight.mul_(mask)
    optimizer = make(name, optim, model.parameters())
    x, _ = batch(0)
    for _ in range(2):  # the first of them is torch's own, which makes the state
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = weight._version
        loss = model(x.clone().requires_grad_()).square().sum()
        optimizer.step()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_dense_steps_are_seen_by_autograd(name):
    """Torch's fused steps, which these take, are not."""
    layer = nn.Linear(4, 4)
    optimizer = getattr(sb.optim, name)(layer.parameters(), lr=0.1)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    loss = layer(x).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()
