"""The layers, and sparsify and densify on whole models."""

import copy
import gc
import io
import pickle
import shutil
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import sparsebilevel as sb
from sparsebilevel.kernels import reference
from sparsebilevel.masks import NM, Filter, Unstructured


def mlp(sparsity=0.5, **kwargs):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    return sb.sparsify(model, sparsity, **kwargs) if sparsity else model


def cnn(sparsity=0.5, **kwargs):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    return sb.sparsify(model, sparsity, **kwargs) if sparsity else model


def masks(model):
    return {name: layer.mask for name, layer in sb.sparse_layers(model)}


def same_masks(a, b):
    a, b = masks(a), masks(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def saved(value, **kwargs):
    """``value`` after a round trip through ``torch.save`` and ``torch.load``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **kwargs)


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparse", "dense", "args", "kwargs", "shape"),
    [
        (sb.SparseMaskedLinear, nn.Linear, (5, 4), {}, (3, 5)),
        (sb.SparseMaskedLinear, nn.Linear, (5, 4, False), {"dtype": torch.float64}, (2, 3, 5)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, 3), {}, (2, 4, 7, 6)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, (3, 2), (2, 1), 1, 1, 2, False), {}, (2, 4, 7, 6)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, 4), {"padding": "same", "dilation": (1, 2)}, (4, 9, 8)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 7, 6)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, 3, 2, (2, 1)), {"padding_mode": "circular"}, (2, 4, 7, 6)),
        (sb.SparseMaskedConv2d, nn.Conv2d, (4, 6, 2), {"padding": "same", "padding_mode": "replicate"}, (2, 4, 7, 6)),
    ],
)
def test_layer_takes_the_dense_arguments_and_computes_the_dense_layer_of_its_effective_weight(
    sparse, dense, args, kwargs, shape
):
    layer, plain = sparse(*args, **kwargs, sparsity=0.5), dense(*args, **kwargs)
    assert isinstance(layer, dense)
    assert set(layer.state_dict()) == set(plain.state_dict()) | {"mask"}
    assert int(layer.mask.sum()) == layer.mask.numel() // 2
    with torch.no_grad():
        plain.weight.copy_(torch.where(layer.mask, layer.weight, 0.0))
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    assert_close(layer(x), plain(x))
    assert_close(layer.to_dense()(x), plain(x))


def test_from_dense_shares_parameters_and_to_dense_gives_back_the_dense_class():
    dense = nn.Linear(6, 4)
    layer = sb.SparseMaskedLinear.from_dense(dense, 0.75, "filter")
    assert type(dense) is nn.Linear
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert layer.mask.any(1).sum() == 1
    back = layer.to_dense()
    assert type(back) is nn.Linear
    assert type(layer) is sb.SparseMaskedLinear
    assert list(back.state_dict()) == ["weight", "bias"]
    assert back.__dict__.keys() == nn.Linear(6, 4).__dict__.keys()
    assert torch.equal(back.weight, dense.weight * layer.mask)
    assert back.bias is dense.bias
    with pytest.raises(TypeError, match="dense is a Conv2d; expected exactly a Linear"):
        sb.SparseMaskedLinear.from_dense(nn.Conv2d(3, 3, 3))


def test_repr_shows_sparsity_pattern_backend_and_reason():
    layer = sb.SparseMaskedLinear(8, 8, sparsity=0.75, pattern="block:2x2")
    text = repr(layer)
    assert "in_features=8" in text
    assert "sparsity=0.7500" in text
    assert "Block(bh=2, bw=2)" in text
    assert f"backend={layer.backend.name} ({layer.backend.reason})" in text


def test_backend_can_be_forced_and_a_wrong_name_is_refused(monkeypatch):
    layer = sb.SparseMaskedLinear(8, 8)
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "dense")
    assert layer.backend == ("dense", "forced by SPARSEBILEVEL_BACKEND", None)
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "warp")
    with pytest.raises(ValueError, match="SPARSEBILEVEL_BACKEND='warp' is not known; allowed: auto, dense"):
        repr(layer)


def test_an_empty_batch_gives_zero_gradients():
    model = cnn().eval()
    for _, layer in sb.sparse_layers(model):
        layer.collect("all")
    y = model(torch.randn(0, 4, 5, 5))
    y.sum().backward()
    assert y.shape == (0, 4)
    for _, layer in sb.sparse_layers(model):
        assert torch.equal(layer.effective_grad, torch.zeros_like(layer.weight))
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


def test_reset_parameters_draws_weights_and_a_mask_of_the_same_count():
    layer = sb.SparseMaskedLinear(20, 20, sparsity=0.9)
    weight, mask = layer.weight.clone(), layer.mask.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight)
    assert not torch.equal(layer.mask, mask)
    assert int(layer.mask.sum()) == 40


def test_set_mask_writes_in_place_and_refuses_what_does_not_fit():
    layer = sb.SparseMaskedLinear(5, 4)
    mask, new = layer.mask, torch.rand(4, 5) < 0.5
    layer.set_mask(new)
    assert layer.mask is mask
    assert torch.equal(mask, new)
    with pytest.raises(ValueError, match=r"mask has shape \[5, 4\]; expected \[4, 5\]"):
        layer.set_mask(new.t())
    with pytest.raises(ValueError, match="mask has dtype torch.float32; expected torch.bool"):
        layer.set_mask(new.float())


def test_scores_as_a_parameter_are_trained_by_the_users_optimizer():
    layer = sb.SparseMaskedLinear(5, 4, sparsity=0.5)
    layer.set_mask_scores(torch.ones(4, 5))
    assert "mask_scores" not in dict(layer.named_parameters())
    x = torch.randn(3, 5)
    layer(x).sum().backward()  # a buffer takes no part
    layer.set_mask_scores(nn.Parameter(torch.ones(4, 5)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).sum().backward()
    g = torch.ones(3, 4).t() @ x
    before = layer.mask_scores.detach().clone()
    expected = before - layer.weight.detach() * g
    optimizer.step()
    assert_close(layer.mask_scores.detach(), expected)
    assert "mask_scores" in layer.state_dict()
    for scores in (None, torch.zeros(4, 5), None, nn.Parameter(torch.zeros(4, 5)), torch.ones(4, 5)):
        layer.set_mask_scores(scores)
        assert isinstance(layer.mask_scores, nn.Parameter) == isinstance(scores, nn.Parameter)
        assert ("mask_scores" in layer.state_dict()) == (scores is not None)
        assert list(layer.to_dense().state_dict()) == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"mask_scores has shape \[4\]; expected \[4, 5\]"):
        layer.set_mask_scores(torch.zeros(4))


# -- the effective gradient --------------------------------------------------------------------------------------------


def test_collect_gives_g_on_every_support():
    layer, x = sb.SparseMaskedLinear(5, 4, sparsity=0.5), torch.randn(3, 5)
    g = torch.ones(3, 4).t() @ x
    positions = torch.tensor([19, -1, 2])
    for support, where in [("all", None), ("active", layer.mask.flatten().nonzero().squeeze(1)), ("search", positions)]:
        layer.collect(support, positions if support == "search" else None)
        assert layer.effective_grad is None
        layer(x).sum().backward()
        if where is None:
            assert layer.support_positions is None
            assert_close(layer.effective_grad, g)
        else:
            assert torch.equal(layer.support_positions, where)
            assert_close(layer.effective_grad, g.flatten()[where] * (where >= 0))
        layer.collect(support, positions if support == "search" else None)
        assert layer.effective_grad is None  # asking again starts anew
    layer.collect("none")
    layer(x).sum().backward()
    assert layer.effective_grad is None


def test_effective_grad_adds_up_until_it_is_zeroed_and_clipping_does_not_touch_it():
    layer, x = sb.SparseMaskedLinear(5, 4, sparsity=0.5), torch.randn(3, 5)
    layer.collect("all")
    layer(x).sum().backward()
    once = layer.effective_grad.clone()
    layer(x).sum().backward()
    nn.utils.clip_grad_norm_(layer.parameters(), 1e-6)
    layer.zero_grad()
    assert torch.equal(layer.effective_grad, 2 * once)
    layer.zero_effective_grad()
    assert layer.effective_grad is None


def test_positions_are_copied_once_and_their_buffer_is_reused():
    layer = sb.SparseMaskedLinear(5, 4)
    mine = torch.tensor([1, 2, 3])
    layer.collect("search", mine)
    buffer = layer.support_positions
    layer.collect("search", torch.tensor([4, 5, -1]))
    assert layer.support_positions is buffer
    assert buffer.tolist() == [4, 5, -1]
    assert mine.tolist() == [1, 2, 3]
    layer.collect("search", torch.tensor([4]))
    assert layer.support_positions.tolist() == [4]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("most",), "support='most' is not known; allowed: none, active, search, all"),
        (("search",), "positions must be given for support='search' and for no other"),
        (
            ("all", torch.tensor([1])),
            "positions must be given for support='search' and for no other, got support='all'",
        ),
        (("search", torch.tensor([1.0])), r"positions is torch.float32 of shape \[1\]; expected int64"),
        (("search", torch.tensor([[1]])), r"positions is torch.int64 of shape \[1, 1\]; expected int64 \[capacity\]"),
        (("search", torch.tensor([3, 20])), "positions has 20; expected less than 20"),
    ],
)
def test_collect_refuses_bad_arguments_and_keeps_what_it_had(args, message):
    layer = sb.SparseMaskedLinear(5, 4)
    layer.collect("active")
    with pytest.raises(ValueError, match=message):
        layer.collect(*args)
    assert layer.score_support == "active"
    assert layer.support_positions.tolist() == list(range(20))


def test_a_frozen_weight_still_gives_its_effective_gradient():
    layer, x = sb.SparseMaskedLinear(5, 4, sparsity=0.5).requires_grad_(False), torch.randn(3, 5)
    layer.collect("all")
    layer(x).sum().backward()
    assert_close(layer.effective_grad, torch.ones(3, 4).t() @ x)
    assert layer.weight.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_collects_once(reentrant):
    model, x = mlp(), torch.randn(4, 5, requires_grad=True)
    model[0].collect("all")
    model(x).sum().backward()
    expected = model[0].effective_grad.clone()
    model[0].zero_effective_grad()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(model[0].effective_grad, expected)


# -- what torch does to modules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m, weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_equal_independent_and_go_on_collecting(duplicate):
    model, x = cnn(), torch.randn(2, 4, 5, 5)
    model[0].collect("all")
    model[3].collect("search", torch.tensor([0, 7, -1]))
    model[3].set_mask_scores(torch.randn(8, 4, 3, 3))
    twin = duplicate(model)
    assert same_masks(model, twin)
    assert torch.equal(twin[3].mask_scores, model[3].mask_scores)
    for m in (model, twin):
        m(x).square().sum().backward()
    for i in (0, 3):
        assert twin[i].effective_grad.data_ptr() != model[i].effective_grad.data_ptr()
        assert torch.equal(twin[i].effective_grad, model[i].effective_grad)
    model[0].set_mask(~model[0].mask)
    model[3].collect("search", torch.tensor([1, 1, 1]))
    assert not same_masks(model, twin)
    assert twin[3].support_positions.tolist() == [0, 7, -1]


def test_state_dict_survives_weights_only_load_and_restores_masks_and_scores():
    model, other = cnn(seed=0), cnn(seed=1)
    model[0].set_mask_scores(torch.randn(8, 4, 3, 3))
    model[3].set_mask_scores(nn.Parameter(torch.randn(8, 4, 3, 3)))
    assert not same_masks(model, other)
    other.load_state_dict(saved(model.state_dict(), weights_only=True))
    x = torch.randn(2, 4, 5, 5)
    assert same_masks(model, other)
    assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].mask_scores, model[0].mask_scores)
    assert torch.equal(other[3].mask_scores, model[3].mask_scores)
    assert other[5].mask_scores is None


def test_a_checkpoint_without_scores_keeps_those_at_hand():
    model = mlp()
    model[0].set_mask_scores(torch.ones(8, 5))
    for assign in (False, True):
        model.load_state_dict(mlp().state_dict(), assign=assign)
        assert torch.equal(model[0].mask_scores, torch.ones(8, 5))


def test_a_dense_checkpoint_loads_strictly_and_leaves_the_masks():
    model, dense = cnn(), cnn(0)
    before = copy.deepcopy(model)
    model.load_state_dict(dense.state_dict(), strict=True)
    assert same_masks(model, before)
    assert torch.equal(model[0].weight, dense[0].weight)


def test_a_densified_checkpoint_loads_into_the_dense_model():
    model, dense, x = cnn().eval(), cnn(0).eval(), torch.randn(2, 4, 5, 5)
    dense.load_state_dict(sb.densify(model).state_dict(), strict=True)
    assert_close(dense(x), model(x))


def test_a_mask_of_another_shape_is_refused_by_load_state_dict():
    model = mlp()
    state = model.state_dict() | {"0.mask": torch.ones(2, 2, dtype=torch.bool)}
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.mask.*\[2, 2\].*\[8, 5\]"):
        model.load_state_dict(state)
    assert same_masks(model, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_mask_that_breaks_the_pattern_is_refused(assign):
    model = sb.sparsify(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), 0.5, pattern="filter", seed=0)
    before = copy.deepcopy(model)
    half = torch.zeros(6, 4, dtype=torch.bool)
    half[2:, 0] = True
    with pytest.raises(ValueError, match=r"mask does not fit pattern Filter\(\): 12 positions break it.*\[2, 1\]"):
        model[0].set_mask(half)
    with pytest.raises(RuntimeError, match=r"layer '0': mask does not fit pattern Filter\(\): 12 positions"):
        model.load_state_dict(model.state_dict() | {"0.mask": half}, assign=assign)
    assert same_masks(model, before)
    whole = torch.zeros(6, 4, dtype=torch.bool)
    whole[0] = True  # another count than the target's: the layer takes it
    model.load_state_dict(model.state_dict() | {"0.mask": whole}, assign=assign)
    assert torch.equal(model[0].mask, whole)


def test_half_and_back_keeps_scores_and_collected_gradients_in_float32():
    layer = sb.SparseMaskedLinear(5, 4, sparsity=0.5)
    scores = torch.randn(4, 5)
    layer.set_mask_scores(scores)
    layer.collect("all")
    layer(torch.randn(3, 5)).sum().backward()
    grad = layer.effective_grad.clone()
    layer.half()
    assert layer.weight.dtype == torch.float16
    assert layer.mask.dtype == torch.bool
    assert layer.mask_scores.dtype == layer.effective_grad.dtype == torch.float32
    assert torch.equal(layer.mask_scores, scores)
    assert torch.equal(layer.effective_grad, grad)
    layer(torch.randn(3, 5).half()).sum().backward()
    assert layer.effective_grad.dtype == torch.float32
    assert not torch.equal(layer.effective_grad, grad)
    layer.to(torch.float64)
    layer(torch.randn(3, 5).double()).sum().backward()
    assert layer.effective_grad.dtype == torch.float64
    assert torch.equal(layer.mask_scores, scores)


def test_channels_last_conversion_takes_masks_and_scores_along():
    model, x = cnn(), torch.randn(2, 4, 5, 5)
    model[0].set_mask_scores(torch.randn(8, 4, 3, 3))
    model[0].collect("search", torch.arange(7))
    model[3].collect("all")
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)
    for layer in (twin[0], half[0]):
        for tensor in (layer.weight, layer.mask, layer.mask_scores):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    twin.load_state_dict(model.state_dict())
    y = twin(x.to(memory_format=torch.channels_last))
    y.square().sum().backward()
    model(x).square().sum().backward()
    assert_close(y, model(x))
    for i in (0, 3):  # positions stay row-major
        assert_close(twin[i].effective_grad, model[i].effective_grad, rtol=1e-4, atol=1e-4)


def test_meta_construction_then_to_empty_and_reset_gives_exact_counts():
    with torch.device("meta"):
        model = cnn(0.75)
        repr(model)
        built = sb.SparseMaskedLinear(8, 8, sparsity=0.75)
    model[0].collect("all")
    model, built = model.to_empty(device="cpu"), built.to_empty(device="cpu")
    for module in [*model, built]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for layer in (model[0], model[3], model[5], built):
        assert int(layer.mask.sum()) == layer.mask.numel() // 4
    model(torch.randn(2, 4, 5, 5)).sum().backward()
    assert model[0].effective_grad.device.type == "cpu"


@pytest.mark.parametrize("init", ["random", "dense"])
def test_reset_after_the_meta_device_keeps_the_masks_that_were_asked_for(init):
    def build():
        return sb.sparsify(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), 0.5, init=init, seed=3)

    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    assert all(torch.equal(mask, masks(build())[name]) for name, mask in masks(model).items())


def test_masks_that_come_from_the_meta_device_are_drawn():
    """And not what the memory held: a dense checkpoint would leave that in place."""
    with torch.device("meta"):
        model = cnn(0.75)
    model.to_empty(device="cpu")
    assert [int(mask.sum()) for mask in masks(model).values()] == [m.numel() // 4 for m in masks(model).values()]
    model.load_state_dict(cnn(0).state_dict())
    model(torch.randn(2, 4, 5, 5))


def test_ddp_broadcasts_no_masks_of_compiled_models_either():
    model = mlp()
    model[0].set_mask_scores(torch.zeros(8, 5))
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    buffers = {name for name, _ in torch.compile(model).named_buffers()}
    assert buffers == {"_orig_mod.0.mask", "_orig_mod.0.mask_scores", "_orig_mod.2.mask"}
    assert buffers <= ignored
    assert {name for name, _ in model.named_buffers()} <= ignored
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied[2].set_mask_scores(torch.zeros(3, 8))
        assert {name for name, _ in copied.named_buffers()} <= set(copied._ddp_params_and_buffers_to_ignore)


def test_a_model_is_gone_with_its_last_reference():
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), "its weight is computed"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(5, 5, 3)), "its weight is computed"),
        (lambda: nn.LazyLinear(5), "its size is not known yet; run a batch through the model first"),
    ],
)
def test_layers_that_stay_dense_are_named(make, reason):
    with pytest.warns(UserWarning, match=f"'1' stays dense: {reason}"):
        model = sb.sparsify(nn.Sequential(nn.Linear(5, 5), make()), 0.5)
    assert list(masks(model)) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb.sparsify(nn.Sequential(nn.Linear(5, 5), make()), 0.5, exclude="1")


def test_assign_loads_into_a_meta_model_and_moves_the_collection():
    model = mlp()
    with torch.device("meta"):
        empty = mlp()
    empty[0].collect("all")
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 5)
    assert torch.equal(empty(x), model(x))
    empty(x).sum().backward()
    assert empty[0].effective_grad.shape == (8, 5)


def test_ema_follows_weights_and_masks():
    model = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    old = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    model[0].set_mask(~model[0].mask)
    average.update_parameters(model)
    assert same_masks(average.module, model)
    assert_close(average.module[0].weight.detach(), old + 0.5)


def test_symbolic_tracing_keeps_the_ops_whole():
    model, x = mlp(), torch.randn(3, 5)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"] == ["masked_linear"] * 2
    assert torch.equal(graph(x), model(x))
    model[0].set_mask(~model[0].mask)
    assert torch.equal(graph(x), model(x))


@pytest.mark.slow
def test_export_keeps_the_op_and_a_dynamic_batch():
    model = cnn().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(3, 4, 5, 5),), dynamic_shapes={"input": {0: batch}})
    assert sum("masked_conv2d" in str(n.target) for n in program.graph.nodes) == 2
    x = torch.randn(7, 4, 5, 5)
    assert_close(program.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_fullgraph_once_for_all_masks_and_collects_as_eager_does(backend, autocast):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    eager = sb.sparsify(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), 0.5)
    twin, x = copy.deepcopy(eager), torch.randn(4, 3, 6, 6)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for model in (eager, twin):
        model[0].collect("search", torch.tensor([0, 5, 7, -1]))
        model[3].collect("all")
    for i in range(4):
        for forward in (eager, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = forward(x)
            y.float().square().sum().backward()
        for layer, other in ((eager[0], twin[0]), (eager[3], twin[3])):
            tolerance = {"rtol": 0.1, "atol": 0.1} if autocast else {"rtol": 1e-4, "atol": 1e-4}
            assert_close(other.effective_grad, layer.effective_grad, **tolerance)
            assert_close(other.weight.grad, layer.weight.grad, **tolerance)
            assert other.effective_grad.dtype == torch.float32
        for model in (eager, twin):
            for layer in (model[0], model[3]):
                layer.set_mask(layer.mask.roll(1, 0))
            if i % 2:
                model[0].collect("search", torch.tensor([2, 3, -1, i]))
                model[3].zero_effective_grad()
    torch._dynamo.reset()


# -- sparsify ----------------------------------------------------------------------------------------------------------


def test_sparsify_keeps_parameters_hooks_modules_and_an_optimizer_made_before():
    model, x = mlp(0), torch.randn(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, modules, calls = list(model.parameters()), list(model.modules()), []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    assert sb.sparsify(model, 0.5) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    before = model[0].weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    moved = model[0].weight.detach() != before
    assert moved.any()
    assert not (moved & ~model[0].mask).any()
    sb.densify(model)(x).sum().backward()
    assert calls == ["forward", "backward"] * 2


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_counts_are_exact(distribution, sparsity):
    model = cnn(0)
    sb.sparsify(model, sparsity, distribution)
    total = sum(m.numel() for m in masks(model).values())
    kept = {n: int(m.sum()) for n, m in masks(model).items()}
    if distribution == "uniform":
        assert kept == {n: round(m.numel() * (100 - round(100 * sparsity)) / 100) for n, m in masks(model).items()}
    else:
        assert sum(kept.values()) == round(total * (100 - round(100 * sparsity)) / 100)
    assert kept == {name: layer.num_kept for name, layer in sb.sparse_layers(model)}


def test_explicit_sparsity_by_layer():
    model = sb.sparsify(mlp(0), {"0": 0.5, "2": 0.75})
    assert [int(m.sum()) for m in masks(model).values()] == [20, 6]


def test_dense_first_converts_the_first_layer_and_keeps_all_of_it():
    for init in ("random", "magnitude"):
        model = cnn(0.9, dense_first=True, pattern="filter", init=init)
        assert model[0].mask.all()
        assert model[0].num_kept == model[0].weight.numel()
        assert model[3].mask.flatten(1).any(1).sum() == 1


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("filter", lambda m: m.flatten(1)),
        ("channel", lambda m: m.transpose(0, 1).flatten(1)),
        ("block:2x2", lambda m: m.reshape(4, 2, 2, 2, -1).permute(0, 2, 4, 1, 3).flatten(3).flatten(0, 2)),
        ("nm:2:4", lambda m: m.movedim(1, -1).reshape(-1, 4)),
    ],
)
@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_groups_of_a_pattern_live_and_die_together(pattern, groups, init):
    model = sb.sparsify(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 1)), 0.5, pattern=pattern, init=init)
    for mask in masks(model).values():
        alive = groups(mask)
        if pattern.startswith("nm"):
            assert (alive.sum(1) == 2).all()
        else:
            assert (alive.all(1) == alive.any(1)).all()
            assert int(alive.any(1).sum()) == len(alive) // 2


def test_init_chooses_the_masks():
    weights = mlp(0)
    assert all(m.all() for m in masks(sb.sparsify(copy.deepcopy(weights), 0.9, init="dense")).values())
    layerwise = sb.sparsify(copy.deepcopy(weights), 0.75, init="magnitude")
    for layer in (layerwise[0], layerwise[2]):
        size = layer.weight.detach().abs()
        assert int(layer.mask.sum()) == layer.mask.numel() // 4
        assert size[layer.mask].min() > size[~layer.mask].max()
    ranked = sb.sparsify(copy.deepcopy(weights), 0.75, "global", init="magnitude")
    size = torch.cat([ranked[i].weight.detach().abs().flatten() for i in (0, 2)])
    mask = torch.cat([ranked[i].mask.flatten() for i in (0, 2)])
    assert int(mask.sum()) == 16
    assert [ranked[i].num_kept for i in (0, 2)] == [int(ranked[i].mask.sum()) for i in (0, 2)]
    assert size[mask].min() > size[~mask].max()


@pytest.mark.parametrize(
    ("pattern", "init"), [("unstructured", "random"), ("block:2x2", "magnitude"), ("filter", "random")]
)
def test_rescale_gives_kept_weights_the_norm_that_all_had(pattern, init):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 6))
    plain = sb.sparsify(copy.deepcopy(model), 0.5, pattern=pattern, init=init, seed=1)
    rescaled = sb.sparsify(model, 0.5, pattern=pattern, init=init, rescale=True, seed=1)
    for (_, before), (_, after) in zip(sb.sparse_layers(plain), sb.sparse_layers(rescaled), strict=True):
        assert torch.equal(before.mask, after.mask)
        full, kept = before.weight.flatten(1).norm(dim=1), after.effective_weight().flatten(1).norm(dim=1)
        alive = before.mask.flatten(1).any(1)
        assert alive.any()
        torch.testing.assert_close(kept[alive], full[alive])
        assert torch.equal(after.weight[~alive], before.weight[~alive])


def test_rescale_keeps_the_size_of_signals_without_normalization():
    torch.manual_seed(0)
    dense = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(256, 256, bias=False), nn.ReLU())))
    x = torch.randn(64, 256)
    sizes = {
        rescale: (sb.sparsify(copy.deepcopy(dense), 0.9, rescale=rescale, seed=0)(x).norm() / dense(x).norm()).item()
        for rescale in (False, True)
    }
    assert sizes[False] < 0.01  # of five layers: about 0.1 ** 2.5
    assert 0.5 < sizes[True] < 2


def test_rescale_changes_a_shared_weight_once_and_a_dense_mask_not_at_all():
    model = mlp(0)
    model.add_module("again", nn.Linear(*reversed(model[0].weight.shape)))
    model.again.weight = model[0].weight
    before = model[0].weight.detach().clone()
    sb.sparsify(model, 0.5, rescale=True, seed=0)
    assert model.again.weight is model[0].weight
    torch.testing.assert_close(model[0].effective_weight().norm(dim=1), before.norm(dim=1))
    before = mlp(0)
    model = sb.sparsify(copy.deepcopy(before), 0.5, init="dense", rescale=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(ValueError, match="rescale=True is not allowed: the weight of '0' is on the meta device"):
        sb.sparsify(mlp(0).to("meta"), 0.5, rescale=True)


@pytest.mark.parametrize(("distribution", "init"), [("uniform", "random"), ("global", "magnitude"), ("erk", "dense")])
def test_every_layer_has_its_own_pattern(distribution, init):
    make = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 16))
    patterns = {"0": Filter(), "[13]": "unstructured", "*": "nm:2:4"}
    model = sb.sparsify(make, 0.75, distribution, patterns, init=init, seed=0)
    layers = dict(sb.sparse_layers(model))
    assert [layer.pattern for layer in layers.values()] == [Filter(), Unstructured(), Unstructured(), NM(2, 4)]
    for layer in layers.values():
        layer.pattern.check(layer.mask)
        assert layer.mask.all() if init == "dense" else layer.pattern.count(layer.mask) == layer.num_kept
    assert (layers["0"].num_kept, layers["4"].num_kept) == (2, 96)
    assert layers["1"].num_kept + layers["3"].num_kept == (576 + 96) // 4 or distribution == "erk"


def test_a_dense_first_layer_needs_no_pattern():
    model = sb.sparsify(mlp(0), 0.75, pattern={"2": "filter"}, dense_first=True)
    assert (model[0].pattern, model[2].pattern) == (Unstructured(), Filter())
    assert model[0].mask.all()


@pytest.mark.parametrize("sparsity", [0.5, {"*": 0.5}])
def test_layers_that_their_pattern_leaves_whole_are_named(sparsity):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=4))
    with pytest.warns(UserWarning, match="'1', '2' stay dense: to the pattern the whole weight is one group"):
        sb.sparsify(copy.deepcopy(model), sparsity, pattern="channel")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dense: ")
        sb.sparsify(copy.deepcopy(model), 0.0, pattern="channel")
        sb.sparsify(copy.deepcopy(model), {"[12]": 0.0, "*": 0.5}, pattern="channel")
        sb.sparsify(copy.deepcopy(model), sparsity, pattern={"0": "channel", "*": "unstructured"})
        sb.sparsify(copy.deepcopy(model), sparsity, pattern="channel", exclude=["1", "2"])


@pytest.mark.parametrize("options", [{"init": "dense"}, {"seed": 3}, {"seed": 3, "dense_first": True}])
def test_masks_are_the_same_by_way_of_the_meta_device(options):
    expected = sb.sparsify(mlp(0), 0.75, **options)
    model = sb.sparsify(mlp(0).to("meta"), 0.75, **options)
    model = copy.deepcopy(model).to_empty(device="cpu")
    for (_, a), (_, b) in zip(sb.sparse_layers(model), sb.sparse_layers(expected), strict=True):
        assert torch.equal(a.mask, b.mask)


def test_magnitudes_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match="init='magnitude' is not allowed: the weight of '0' is on the meta device"):
        sb.sparsify(mlp(0).to("meta"), 0.75, init="magnitude")


def test_conversions_that_swap_tensors():
    model, other = sb.sparsify(mlp(0), 0.75, seed=0), sb.sparsify(mlp(0), 0.75, seed=1)
    sparsifier = sb.BiDST(model, torch.optim.SGD(model.parameters(), 0.1), update_freq=2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.float()
        model.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(model[0].mask, other[0].mask)
    assert sb.nn.mask_of(model[0].weight) is model[0].mask
    assert sparsifier.weights["0"].weight is model[0].weight


@pytest.mark.parametrize("assign", [False, True])
def test_masks_of_another_dtype_are_loaded_as_bool(assign):
    model, other = sb.sparsify(mlp(0), 0.75, seed=0), sb.sparsify(mlp(0), 0.75, seed=1)
    state = {k: v.float() for k, v in other.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert model[0].mask.dtype == torch.bool
    assert torch.equal(model[0].mask, other[0].mask)


@pytest.mark.parametrize("kind", ["none", "all", "active", "scores", "shared"])
@pytest.mark.parametrize("is_conv", [False, True])
def test_the_gradient_of_a_gradient_follows_the_contract(kind, is_conv):
    """What a gradient penalty sends through the gradient of the input belongs to G, too."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 5, 3, stride=2, padding=1) if is_conv else nn.Linear(12, 20)
    model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(20, 1)).double()
    sb.sparsify(model, 0.5, seed=0)
    layers = [layer for _, layer in sb.sparse_layers(model)]
    for layer in layers:
        if kind in ("all", "active"):
            layer.collect(kind)
        elif kind != "none":
            layer.set_mask_scores(nn.Parameter(torch.randn_like(layer.weight)))
    if kind == "shared":
        sb.optim.share_gradient(model)
    x = torch.randn(4, *((3, 4, 4) if is_conv else (12,)), dtype=torch.float64, requires_grad=True)

    dense = sb.densify(model)
    for net in (model, dense):
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    layers_of_dense = [module for module in dense if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer, other in zip(layers, layers_of_dense, strict=True):
        G = other.weight.grad
        assert_close(layer.weight.grad, G if kind == "shared" else G * layer.mask)
        if kind == "all":
            assert_close(layer.effective_grad, G)
        elif kind == "active":
            assert_close(layer.effective_grad, G.reshape(-1)[layer.support_positions])
        elif kind == "scores":
            assert_close(layer.mask_scores.grad, layer.weight * G)


def test_same_seed_same_masks():
    assert same_masks(cnn(seed=3), cnn(seed=3))
    assert not same_masks(cnn(seed=3), cnn(seed=4))
    state = torch.get_rng_state()
    mlp(0)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    sb.sparsify(mlp(0), 0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), after)  # a seed leaves the global generator alone


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, (), {"0.0", "0.1.0", "1"}),
        (["0"], (), {"0.0", "0.1.0"}),
        ("0", (), {"0.0", "0.1.0"}),
        (["*.0"], (), {"0.0", "0.1.0"}),
        (None, ["0.1"], {"0.0", "1"}),
        (None, "1", {"0.0", "0.1.0"}),
        ([nn.Conv2d], (), {"0.0"}),
        (None, [nn.Conv2d, nn.Embedding, "*shortcut*"], {"0.1.0", "1"}),
        (["0"], ["0.0"], {"0.1.0"}),
        (lambda m: [m[0][1]], (), {"0.1.0"}),
        (None, lambda m: m[0], {"1"}),
    ],
)
def test_include_and_exclude_take_names_globs_types_and_modules(include, exclude, expected):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4))
    include, exclude = (s(model) if callable(s) and not isinstance(s, type) else s for s in (include, exclude))
    sb.sparsify(model, 0.5, include=include, exclude=exclude)
    assert set(masks(model)) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 is not allowed; expected a number in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 is not allowed"),
        ({"sparsity": float("nan")}, r"sparsity=nan is not allowed"),
        ({"sparsity": "0.9"}, r"sparsity='0.9' is not allowed"),
        ({"sparsity": {"0": 0.5, "2": 1.0}}, r"sparsity\['2'\]=1.0 is not allowed"),
        ({"sparsity": {"0": 0.5}}, r"sparsity has no value for \['2'\]"),
        ({"sparsity": {"0": 0.5, "2": 0.5, "9": 0.5}}, r"sparsity has '9', which no layer matches; the layers are"),
        ({"distribution": "even"}, "distribution='even' is not known; allowed: uniform, er, erk, global"),
        ({"sparsity": {0: 0.5}}, r"sparsity has 0; expected names of layers or glob patterns"),
        ({"pattern": None}, r"pattern=None is not allowed; expected a Pattern or its name"),
        ({"include": 3}, r"include=3 is not allowed; expected names, glob patterns, types or modules"),
        ({"exclude": None}, r"exclude=None is not allowed"),
        ({"seed": 1.5}, r"seed=1.5 is not allowed; expected a whole number or None"),
        ({"pattern": "rows"}, "pattern='rows' is not allowed; expected one of unstructured, filter"),
        ({"pattern": "nm:2:4"}, r"weight of shape \[8, 5\] has 5 input channels, not a multiple of m=4"),
        ({"init": "zeros"}, "init='zeros' is not known; allowed: random, magnitude, dense"),
        ({"include": ["head"]}, r"include has 'head', which no module matches; names are \['0', '1', '2'\]"),
        ({"exclude": ["head"]}, r"exclude has 'head', which no module matches"),
        ({"exclude": [3]}, "exclude has 3, which no module matches"),
        ({"include": [nn.Conv2d]}, r"include=\[.*Conv2d'>\] matches no module; names are \['0', '1', '2'\]"),
        ({"include": ["nothing*"]}, r"include=\['nothing\*'\] matches no module; names are \['0', '1', '2'\]"),
        ({"include": nn.ReLU}, "model has no nn.Linear or nn.Conv2d to convert"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(kwargs, message):
    model = mlp(0)
    with pytest.raises(ValueError, match=message):
        sb.sparsify(model, **kwargs)
    assert not masks(model)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_sparsifying_twice_or_without_any_layer_is_refused():
    with pytest.raises(ValueError, match="model has sparse layers already; call densify first"):
        sb.sparsify(mlp(), 0.9)
    with pytest.raises(ValueError, match="model has no nn.Linear or nn.Conv2d"):
        sb.sparsify(nn.ReLU())
    with pytest.raises(ValueError, match=r"sparsity=2 is not allowed; expected a number in \[0, 1\)"):
        sb.SparseMaskedLinear(5, 4, sparsity=2)


@pytest.mark.parametrize("act", [sb.sparsify, sb.densify, sb.Static])
def test_what_is_no_model_is_refused(act):
    with pytest.raises(TypeError, match=r"model is a list; expected a torch.nn.Module"):
        act([1, 2])


def test_a_layer_keeps_at_least_one_weight():
    assert int(sb.SparseMaskedLinear(3, 3, sparsity=0.999).mask.sum()) == 1
    assert all(m.any() for m in masks(cnn(0.98, distribution="erk")).values())


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 3)], ids=["linear", "conv"])
def test_a_bare_layer_is_a_model(layer):
    layer = copy.deepcopy(layer)
    assert sb.sparsify(layer, 0.5) is layer
    assert list(masks(layer)) == [""]
    assert layer.sparsity == 0.5
    dense = sb.densify(layer)
    assert type(dense) in (nn.Linear, nn.Conv2d)
    assert list(dense.state_dict()) == ["weight", "bias"]


def test_lazy_subclassed_and_computed_weights_stay_dense():
    class Scaled(nn.Linear):
        pass

    model = nn.Sequential(nn.LazyLinear(4), Scaled(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    model += nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="'3' stays dense: its weight is computed"):
        sb.sparsify(model, 0.5)
    assert list(masks(model)) == ["4"]
    model(torch.randn(2, 6)).sum().backward()


@pytest.mark.parametrize("rows", [(2,), (2, 3)])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_results_can_be_written_to(rows, backend, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", backend)
    model = sb.sparsify(nn.Sequential(nn.Linear(512, 512), nn.ReLU(inplace=True)), 0.9)  # large enough for oneDNN
    x = torch.randn(*rows, 512)
    model(x).sum().backward()
    expected = F.linear(x, model[0].effective_weight(), model[0].bias).relu()
    assert_close(model(x), expected)
    assert_close(model[0].bias.grad, (expected > 0).float().flatten(0, -2).sum(0))


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_tied_layers_have_one_mask_and_stay_tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = sb.sparsify(nn.Sequential(first, nn.Linear(4, 4), second), 0.5, "erk")
    assert torch.equal(first.mask, second.mask)
    assert first.weight is second.weight
    x = torch.randn(3, 4)
    dense = sb.densify(model)
    assert dense[0].weight is dense[2].weight
    assert_close(dense(x), model(x))
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert_close(first.weight.grad, dense[0].weight.grad * first.mask)


def test_tied_layers_of_different_masks_are_tied_no_more_when_dense():
    layers = [nn.Linear(4, 4) for _ in range(4)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    model = sb.sparsify(nn.Sequential(*layers), 0.5)
    for layer in model[2:]:
        layer.mask.logical_not_()
    x = torch.randn(3, 4)
    dense = sb.densify(model)
    assert_close(dense(x), model(x))
    assert dense[0].weight is dense[1].weight
    assert dense[2].weight is dense[3].weight
    assert dense[0].weight is not dense[2].weight


@pytest.mark.parametrize("exclude", [(), ["0"]])
def test_a_weight_shared_with_a_dense_module_stays_dense(exclude):
    shared = nn.Linear(4, 6) if exclude else nn.Embedding(6, 4)
    head = nn.Linear(4, 6)
    head.weight = shared.weight
    model = nn.Sequential(shared, nn.Linear(4, 4), head)
    with pytest.warns(UserWarning, match="'2' stays dense: another module shares its weight"):
        sb.sparsify(model, 0.5, exclude=exclude)
    assert list(masks(model)) == ["1"]


def test_a_module_used_twice_is_converted_once_and_its_gradients_add_up():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = sb.sparsify(nn.Sequential(layer, nn.Tanh(), layer), 0.5)
    assert list(masks(model)) == ["0"]
    layer.collect("all")
    model(x).sum().backward()
    z = reference.effective_weight(layer.weight, layer.mask).detach().requires_grad_()
    F.linear(F.linear(x, z, layer.bias).tanh(), z, layer.bias).sum().backward()
    assert_close(layer.effective_grad, z.grad)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoders_see_the_masks_in_inference_too(norm_first):
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=not norm_first).eval()
    switches = encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu
    sb.sparsify(encoder, 0.5)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = encoder(x), encoder(x, src_key_padding_mask=padding)
    dense = sb.densify(encoder)
    assert (dense.use_nested_tensor, dense.layers[0].activation_relu_or_gelu) == switches
    with torch.no_grad():
        for model in (encoder, dense):
            assert_close(model(x), expected[0])
            assert_close(model(x, src_key_padding_mask=padding)[~padding], expected[1][~padding])
    assert encoder.use_nested_tensor is False  # densify made a copy


def test_attention_projections_stay_dense():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.MultiheadAttention(8, 2)])
    with pytest.warns(UserWarning, match=r"the projections of '0', '2' stay dense: nn.MultiheadAttention") as warned:
        sb.sparsify(model, 0.5)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert list(masks(model)) == ["1"]
    x = torch.randn(3, 2, 8)
    assert model[0](x, x, x)[0].shape == x.shape


@pytest.mark.filterwarnings("error")
def test_attention_that_is_left_out_on_purpose_is_not_mentioned():
    for selection in ({"exclude": nn.MultiheadAttention}, {"include": "1"}):
        model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
        assert list(masks(sb.sparsify(model, 0.5, **selection))) == ["1"]


# -- densify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_densify_gives_the_original_classes_keys_and_function(inplace):
    model, x = cnn(0.9).eval(), torch.randn(2, 4, 5, 5)
    model[0].set_mask_scores(torch.randn(8, 4, 3, 3))
    model[3].set_mask_scores(nn.Parameter(torch.randn(8, 4, 3, 3)))
    model[0].collect("all")
    model[3].weight.requires_grad_(False)
    expected, kept = model(x), masks(model)
    dense = sb.densify(model, inplace=inplace)
    assert (dense is model) == inplace
    assert [type(m) for m in dense] == [type(m) for m in cnn(0)]
    assert list(dense.state_dict()) == list(cnn(0).state_dict())
    assert dense[0].__dict__.keys() == nn.Conv2d(1, 1, 1).__dict__.keys()
    assert_close(dense(x), expected)
    assert all(not dense.get_submodule(n).weight[~m].any() for n, m in kept.items())
    assert [p.requires_grad for p in dense.parameters()].count(False) == 1
    sb.sparsify(dense, 0.5)  # and again
    assert len(masks(dense)) == 3


def test_densify_by_default_leaves_the_sparse_model_alone():
    model = mlp()
    weight, hidden = model[0].weight, model[0].weight.detach().clone()
    sb.densify(model)
    assert type(model[0]) is sb.SparseMaskedLinear
    assert model[0].weight is weight
    assert torch.equal(weight, hidden)


@pytest.mark.parametrize("compute", [nn.utils.parametrizations.weight_norm, lambda m: prune.identity(m, "bias")])
@pytest.mark.parametrize("convert", [sb.densify, lambda m: sb.densify(m, inplace=True), lambda m: m[2].to_dense()])
def test_layers_that_compute_their_weight_are_not_made_dense(compute, convert):
    model = mlp()
    before = type(model[0])
    compute(model[2])
    with pytest.raises(ValueError, match="its weight or bias is computed"):
        convert(model)
    assert type(model[0]) is before


@pytest.mark.parametrize("init", ["random", "magnitude", "dense"])
def test_masks_lie_in_memory_as_their_weights_do(init):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    sb.sparsify(model, 0.5, init=init)
    for layer in model:
        assert layer.mask.stride() == layer.weight.stride()


def test_a_checkpoint_that_gives_a_model_from_the_meta_device_its_memory():
    dense = nn.Sequential(nn.Linear(16, 8))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
        sb.sparsify(model, 0.75, seed=3)
    model.load_state_dict(dense.state_dict(), strict=False, assign=True)
    expected = sb.sparsify(nn.Sequential(nn.Linear(16, 8)), 0.75, seed=3)
    assert torch.equal(model[0].mask, expected[0].mask)
    assert model(torch.randn(2, 16)).shape == (2, 8)


def test_assigned_scores_are_float32():
    model = sb.sparsify(nn.Sequential(nn.Linear(16, 8)), 0.75, seed=3)
    model[0].set_mask_scores(torch.rand(8, 16))
    state = {key: value.bfloat16() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].mask_scores.dtype == torch.float32
    assert torch.equal(model[0].mask_scores, state["0.mask_scores"].float())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("filter", r"pattern Filter\(\) takes 5 of the 10 outputs of '2', the last layer; leave it out"),
        ("channel", r"pattern Channel\(\) takes 1 of the 3 inputs of '0', the first layer; leave it out"),
    ],
)
def test_channels_of_the_ends_are_not_lost_in_silence(pattern, message):
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 10, 1))

    with pytest.warns(UserWarning, match=message):
        sb.sparsify(net(), 0.5, pattern=pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb.sparsify(net(), 0.5, pattern=pattern, exclude=["0", "2"])
        sb.sparsify(net(), {"0": 0, "2": 0, "*": 0.5}, pattern=pattern)
        sb.sparsify(net(), 0.5, pattern={"0": pattern, "2": pattern, "*": "unstructured"})
        sb.sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5, pattern=pattern)


def test_a_sparsity_of_its_own_that_a_pattern_overrides_is_said():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.warns(UserWarning, match=r"NM\(n=2, m=4\) fixes the sparsity of '0' at 0.5, not 0.9"):
        sb.sparsify(net, {"0": 0.9, "*": 0.9}, pattern={"0": "nm:2:4", "*": "unstructured"})


def test_layers_put_into_torchs_attention_by_hand(caplog):
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    block.linear1 = sb.SparseMaskedLinear(8, 16, sparsity=0.9)
    block.self_attn.out_proj = sb.SparseMaskedLinear(8, 8, sparsity=0.5)
    method = sb.SET(block, torch.optim.SGD(block.parameters(), lr=0.1), update_freq=10)
    assert "'self_attn' is nn.MultiheadAttention, which reads the weight of its projection past" in caplog.text
    method.release()
    sb.Static(block, None)  # closes nothing twice
    with torch.no_grad():
        block.linear1.weight.fill_(1.0)  # values under the mask
        block.eval()
        x = torch.randn(2, 3, 8)
        inference = block(x)
    assert_close(inference, block(x))
    assert sb.densify(block).activation_relu_or_gelu == 1


def test_sparsity_on_the_meta_device_is_what_was_asked_for():
    with torch.device("meta"):
        model = mlp(0.75)
    assert model[0].sparsity == 0.75
    assert "sparsity=0.7500" in repr(model[0])


def test_a_dense_checkpoint_loads_into_a_meta_model():
    with torch.device("meta"):
        model = mlp(0.5, seed=0)
    dense = mlp(None)
    model.load_state_dict(dense.state_dict(), assign=True)
    assert torch.equal(model[0].mask, mlp(0.5, seed=0)[0].mask)
    with pytest.raises(RuntimeError, match='Missing key.*"0.weight"'):
        model.load_state_dict({name: t for name, t in dense.state_dict().items() if name != "0.weight"})


def test_layers_made_by_hand_say_what_their_pattern_fixes():
    with pytest.warns(UserWarning, match="fixes the sparsity at 0.5, not 0.9"):
        layer = sb.SparseMaskedLinear(8, 4, sparsity=0.9, pattern="nm:2:4")
    assert layer.sparsity == 0.5


def test_states_without_masks_of_sparse_layers_are_said():
    """A dense checkpoint, or one of a network in which fewer layers were sparse."""
    dense, sparse = mlp(None), mlp(0.5, exclude="2")
    for state in (dense.state_dict(), sparse.state_dict()):
        with pytest.warns(UserWarning, match="the state has weights of sparse layers without masks"):
            mlp(0.5).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp(0.5, init="dense").load_state_dict(dense.state_dict())
        mlp(0.5, exclude="2").load_state_dict(sparse.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_mask_of_numbers_is_read_if_they_are_zeros_and_ones(dtype):
    """Scores under the name of a mask, or counts, would otherwise keep whatever is not zero."""
    layer = sb.SparseMaskedLinear(4, 3, sparsity=0.5)
    mask = ~layer.mask
    state = layer.state_dict() | {"mask": mask.to(dtype)}
    layer.load_state_dict(state)
    assert layer.mask.dtype == torch.bool
    assert torch.equal(layer.mask, mask)
    state["mask"] = 2 * mask.to(dtype)
    with pytest.raises(RuntimeError, match="values other than 0 and 1; expected torch.bool"):
        layer.load_state_dict(state)
    assert torch.equal(layer.mask, mask)


def test_scores_are_kept_in_float32():
    """A sum of many small steps would lose them in 16 bits."""
    layer = sb.SparseMaskedLinear(4, 3, sparsity=0.5).bfloat16()
    layer.set_mask_scores(torch.full((3, 4), 0.5, dtype=torch.bfloat16, requires_grad=True))
    assert layer.mask_scores.dtype == torch.float32
    assert not layer.mask_scores.requires_grad


def test_backends_say_that_a_gradient_wanted_everywhere_is_dense():
    layer = sb.SparseMaskedLinear(1024, 1024, sparsity=0.99)
    layer.collect("all")
    assert layer.backends["weight_grad"].name == "dense"
    layer.collect("none")
    layer.set_mask_scores(nn.Parameter(torch.zeros(1024, 1024)))
    assert layer.backends["weight_grad"].name == "dense"


def test_a_module_is_left_out_by_any_of_its_names():
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["decoder"] = model["encoder"]
    sb.sparsify(model, 0.5, exclude="decoder")
    assert [name for name, _ in sb.sparse_layers(model)] == ["head"]
