"""Distributions against the published Erdos-Renyi-Kernel figures, exact sums, and when topologies change."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsebilevel._torchvision import import_torchvision
from sparsebilevel.masks import NM, Block, Channel, Filter, Unstructured, as_fraction
from sparsebilevel.models import create_model
from sparsebilevel.schedules import (
    UpdateSchedule,
    cosine_drop_fraction,
    erdos_renyi_densities,
    layer_counts,
)

quick = settings(max_examples=80, deadline=None)


@cache
def layers_of(name: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """layer -> (shape of the weight, output positions) of every Conv2d and Linear, from the meta device."""
    size, classes = (224, 1000) if name == "resnet50" else (32, 10)
    if name == "resnet50":
        try:
            import_torchvision()
        except ImportError:
            pytest.skip("torchvision is not installed")
    found = {}
    model = create_model(name, num_classes=classes).to("meta").eval()
    for layer, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, _, y, layer=layer: found.__setitem__(
                    layer, (tuple(m.weight.shape), y[0, 0].numel() if y.dim() == 4 else 1)
                )
            )
    model(torch.zeros(1, 3, size, size, device="meta"))
    order = [layer for layer, _ in model.named_modules() if layer in found]
    return {layer: found[layer] for layer in order}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {layer: shape for layer, (shape, _) in layers_of(name).items()}


def flops_ratio(name: str, densities: dict[str, float]) -> float:
    macs = {layer: math.prod(shape) * positions for layer, (shape, positions) in layers_of(name).items()}
    return float(sum(macs[n] * densities[n] for n in macs)) / sum(macs.values())


def uniform_densities(name: str, sparsity: float) -> dict[str, float]:
    first = next(iter(shapes_of(name)))
    return {n: 1.0 if n == first else 1 - sparsity for n in shapes_of(name)}


# -- algorithms of Evci et al. 2020: ResNet-50 ------------------------------------------------------------------------

RESNET50_DENSITIES = {  # shape -> density at 90 %
    (64, 3, 7, 7): 0.420033,
    (64, 64, 1, 1): 1.0,
    (64, 256, 1, 1): 0.958809,
    (256, 64, 1, 1): 0.958809,
    (64, 64, 3, 3): 0.177337,
    (128, 256, 1, 1): 0.574690,
    (128, 512, 1, 1): 0.477916,
    (512, 128, 1, 1): 0.477916,
    (128, 128, 3, 3): 0.086683,
    (512, 256, 1, 1): 0.286600,
    (256, 512, 1, 1): 0.286600,
    (256, 1024, 1, 1): 0.238586,
    (1024, 256, 1, 1): 0.238586,
    (256, 256, 3, 3): 0.042845,
    (1024, 512, 1, 1): 0.143114,
    (512, 1024, 1, 1): 0.143114,
    (512, 2048, 1, 1): 0.119200,
    (2048, 512, 1, 1): 0.119200,
    (512, 512, 3, 3): 0.021299,
    (2048, 1024, 1, 1): 0.071511,
    (1000, 2048): 0.072607,
}


def test_a_weight_that_a_pattern_does_not_fit_is_named():
    shapes = {"stem": (8, 3, 3, 3), "conv": (8, 8, 3, 3)}
    with pytest.raises(ValueError, match=r"layer 'stem': weight of shape .* 3 input channels.*exclude it"):
        layer_counts(shapes, 0.5, "uniform", NM(2, 4))
    assert layer_counts(shapes, 0.5, "uniform", NM(2, 4), ["stem"]) == {"stem": 216, "conv": 288}


def test_erk_of_resnet50_at_90_percent():
    shapes = shapes_of("resnet50")
    densities, eps = erdos_renyi_densities(shapes, 0.9)
    assert eps == pytest.approx(48.7861, abs=5e-5)
    assert {shapes[n] for n in shapes} == set(RESNET50_DENSITIES)
    for name, density in densities.items():
        assert float(density) == pytest.approx(RESNET50_DENSITIES[shapes[name]], abs=1e-6), name
    counts = layer_counts(shapes, 0.9, "erk")
    assert sum(counts.values()) == 2_550_291
    for name, count in counts.items():
        assert abs(count - densities[name] * math.prod(shapes[name])) < 1, name


@pytest.mark.parametrize(("sparsity", "eps", "dense"), [(0.8, 99.5612, 8), (0.9, 48.7861, 1), (0.95, 24.3716, 0)])
def test_erk_of_resnet50_dense_layers(sparsity, eps, dense):
    densities, found = erdos_renyi_densities(shapes_of("resnet50"), sparsity)
    assert found == pytest.approx(eps, abs=5e-5)
    assert sum(d == 1 for d in densities.values()) == dense


@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"),
    [(0.8, 0.4138, 0.2231), (0.9, 0.2418, 0.1260), (0.95, 0.1217, 0.0774), (0.965, 0.0852, 0.0628)],
)
def test_flops_of_sparse_resnet50(sparsity, erk, uniform):
    densities, _ = erdos_renyi_densities(shapes_of("resnet50"), sparsity)
    assert flops_ratio("resnet50", densities) == pytest.approx(erk, abs=5e-5)
    assert flops_ratio("resnet50", uniform_densities("resnet50", sparsity)) == pytest.approx(uniform, abs=5e-5)


def exact_count(total, sparsity):
    return round(total * (1 - as_fraction(sparsity)))


def test_erk_of_resnet50_with_a_dense_first_layer():
    shapes = shapes_of("resnet50")
    counts = layer_counts(shapes, 0.99, "erk", dense_layers=["conv1"])
    assert counts["conv1"] == 64 * 3 * 49
    assert sum(counts.values()) == 9408 + exact_count(25_502_912 - 9408, 0.99)
    densities = {n: counts[n] / math.prod(shapes[n]) for n in shapes}
    assert flops_ratio("resnet50", densities) == pytest.approx(0.0520, abs=5e-5)


MIXED = {"a": (8, 40), "b": (10, 8, 3, 3), "c": (16, 16), "d": (12, 16), "e": (6, 16)}
PATTERNS = {"b": Filter(), "d": NM(1, 4), "*": Unstructured()}


def test_uniform_counts_with_patterns_by_layer():
    counts = layer_counts(MIXED, 0.75, "uniform", PATTERNS, dense_layers=["a"])
    assert counts == {"a": 320, "b": 2, "c": 64, "d": 48, "e": 24}  # 2.5 of 10 filters rounds to even
    assert list(counts) == list(MIXED)
    by_name = layer_counts(MIXED, {"[ab]": 0.5, "d": 0.1, "*": 0.75}, pattern=PATTERNS)
    assert by_name == {"a": 160, "b": 5, "c": 64, "d": 48, "e": 24}


@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_shared_counts_with_patterns_by_layer(distribution):
    counts = layer_counts(MIXED, 0.75, distribution, PATTERNS)
    free = {name: shape for name, shape in MIXED.items() if name != "d"}  # NM stands outside of the target
    densities, _ = erdos_renyi_densities(free, 0.75, kernel=distribution == "erk")
    assert counts["d"] == 48
    assert counts["b"] == round(10 * densities["b"])
    unstructured = {name: math.prod(MIXED[name]) * densities[name] for name in "ace"}
    assert sum(counts[name] for name in "ace") == round(sum(unstructured.values()))
    assert all(abs(counts[name] - wanted) < 1 for name, wanted in unstructured.items())


def test_global_counts_with_patterns_by_layer():
    counts = layer_counts(MIXED, 0.75, "global", PATTERNS)
    assert counts["b"] == 2
    assert sum(counts[name] for name in "ace") == (320 + 256 + 96) // 4
    with pytest.raises(ValueError, match="is not allowed in a ranking over all layers"):
        layer_counts(MIXED, 0.75, "global", {"b": Filter(2), "*": Unstructured()})


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"x": Filter()}, r"pattern has 'x', which no layer matches; the layers are \['a', 'b'"),
        ({"a": Filter()}, r"pattern has no value for \['b', 'c', 'd', 'e'\]; .* such as '\*': 'unstructured'"),
        ({"*": Unstructured(), "b": Filter()}, "pattern has 'b' after entries that match its layers already"),
        ({3: Filter()}, "pattern has 3; expected names of layers"),
        ({"a": NM(2, 3), "*": Unstructured()}, "layer 'a': .*exclude it, or keep it dense"),
    ],
)
def test_wrong_patterns_by_layer(patterns, message):
    with pytest.raises(ValueError, match=message):
        layer_counts(MIXED, 0.5, pattern=patterns)


def model_size(name: str, counts: dict[str, int], channels_and_biases: int, dense: set[str] = frozenset()) -> float:
    """Megabytes: 4 B a non-zero, 1 bit a weight of masked layers, 4 B a channel of a folded norm and bias of the fc."""
    bits = sum(math.prod(shape) for n, shape in shapes_of(name).items() if n not in dense)
    return (4 * sum(counts.values()) + bits / 8 + 4 * channels_and_biases) / 1e6


@pytest.mark.parametrize(
    ("distribution", "sparsity", "megabytes"),
    [
        ("erk", 0.9, 13.499),
        ("uniform", 0.9, 13.532),
        ("erk", 0.95, 8.399),
        ("uniform", 0.95, 8.433),
        ("erk", 0.99, 4.354),
    ],
)
def test_model_size_of_resnet50(distribution, sparsity, megabytes):
    shapes = shapes_of("resnet50")
    dense = ["conv1"] if distribution == "uniform" or sparsity == 0.99 else []
    counts = layer_counts(shapes, sparsity, distribution, dense_layers=dense)
    channels = sum(shape[0] for n, shape in shapes.items() if n != "fc") + 1000
    assert model_size("resnet50", counts, channels, set(dense)) == pytest.approx(megabytes, abs=5e-4)


# -- and elsewhere ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sparsity", "eps", "flops", "dense"),
    [
        ("resnet32x2", 0.90, 38.118, 0.1749, 3),
        ("resnet32x2", 0.95, 18.685, 0.0878, 1),
        ("resnet32x2", 0.98, 7.371, 0.0346, 0),
        ("vgg19_bn_cifar", 0.90, 189.66, 0.2225, 2),
        ("vgg19_bn_cifar", 0.95, None, 0.1131, None),
        ("vgg19_bn_cifar", 0.98, None, 0.0475, None),
        ("resnet18_cifar", 0.90, 131.96, 0.2482, 4),
        ("resnet20", 0.90, 18.349, 0.1857, 2),
        ("resnet56", 0.90, 19.457, 0.1851, None),
        ("mobilenet_v2_cifar", 0.90, 8.084, 0.2364, 1),
    ],
)
def test_erk_elsewhere(name, sparsity, eps, flops, dense):
    densities, found = erdos_renyi_densities(shapes_of(name), sparsity)
    if eps is not None:
        assert found == pytest.approx(eps, abs=5e-3 if eps > 100 else 5e-4)
    assert flops_ratio(name, densities) == pytest.approx(flops, abs=5e-5)
    if dense is not None:
        assert sum(d == 1 for d in densities.values()) == dense


@pytest.mark.parametrize(
    ("name", "densities"),
    [
        (
            "resnet32x2",
            {
                (32, 3, 3, 3): 1,
                (10, 128): 1,
                (64, 32, 1, 1): 1,
                (128, 64, 1, 1): 0.9027,
                (32, 32, 3, 3): 0.2895,
                (64, 32, 3, 3): 0.2109,
                (64, 64, 3, 3): 0.1386,
                (128, 64, 3, 3): 0.1024,
                (128, 128, 3, 3): 0.0677,
            },
        ),
        (
            "vgg19_bn_cifar",
            {
                (64, 3, 3, 3): 1,
                (10, 512): 1,
                (64, 64, 3, 3): 0.6894,
                (128, 64, 3, 3): 0.5093,
                (128, 128, 3, 3): 0.3370,
                (256, 128, 3, 3): 0.2508,
                (256, 256, 3, 3): 0.1666,
                (512, 256, 3, 3): 0.1244,
                (512, 512, 3, 3): 0.0828,
            },
        ),
    ],
)
def test_erk_densities_elsewhere(name, densities):
    found, _ = erdos_renyi_densities(shapes_of(name), 0.9)
    for layer, shape in shapes_of(name).items():
        assert float(found[layer]) == pytest.approx(densities[shape], abs=5e-5), layer


def test_erk_of_mobilenet_makes_the_first_depthwise_layer_dense():
    densities, _ = erdos_renyi_densities(shapes_of("mobilenet_v2_cifar"), 0.9)
    (dense,) = [n for n, d in densities.items() if d == 1]
    assert shapes_of("mobilenet_v2_cifar")[dense] == (32, 1, 3, 3)


def test_er_takes_the_first_two_sizes_only():
    shapes = {"a": (8, 4, 3, 3), "b": (8, 4, 1, 1)}
    er, _ = erdos_renyi_densities(shapes, 0.9, kernel=False)
    erk, _ = erdos_renyi_densities(shapes, 0.9)
    assert er["a"] == er["b"]
    assert erk["a"] < erk["b"]


# -- exact counts -----------------------------------------------------------------------------------------------------


def test_counts_are_made_in_exact_arithmetic():
    assert int((1 - 0.9) * 10) == 0  # the trap
    for size, sparsity, count in (
        *((10, 0.9, 1), (100_000, 0.99999, 1), (7, 0.0, 7), (3, Fraction(1, 3), 2)),
        *zip([1000] * 5, (0.7, 0.8, 0.9, 0.95, 0.99), (300, 200, 100, 50, 10), strict=True),
    ):
        assert layer_counts({"a": (size, 1)}, sparsity) == {"a": count}
        assert exact_count(size, sparsity) == count


shape_lists = st.lists(
    st.one_of(st.tuples(*[st.integers(1, 12)] * 2), st.tuples(*[st.integers(1, 6)] * 4)), min_size=1, max_size=6
)


@quick
@given(shape_lists, st.integers(0, 99), st.sampled_from(["er", "erk", "global"]))
def test_distributions_sum_to_the_exact_total(shapes, percent, distribution):
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    sizes = {n: math.prod(s) for n, s in named.items()}
    total = exact_count(sum(sizes.values()), percent / 100)
    if total < len(sizes):
        with pytest.raises(ValueError, match=f"sparsity is too high: it leaves {total} groups to {len(sizes)} layers"):
            layer_counts(named, percent / 100, distribution)
        return
    counts = layer_counts(named, percent / 100, distribution)
    assert sum(counts.values()) == total
    assert all(1 <= counts[n] <= sizes[n] for n in sizes)
    # Largest-remainder rounding: no layer is further than one from its share, but where it had to keep its one group.
    if distribution != "global":
        densities, _ = erdos_renyi_densities(
            named, 1 - Fraction(total, sum(sizes.values())), kernel=distribution == "erk"
        )
        assert all(counts[n] < densities[n] * sizes[n] + 1 or counts[n] == 1 for n in sizes)


@quick
@given(shape_lists, st.integers(0, 99))
def test_uniform_rounds_each_layer(shapes, percent):
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    counts = layer_counts(named, percent / 100)
    assert counts == {n: max(1, exact_count(math.prod(s), percent / 100)) for n, s in named.items()}


def test_uniform_with_dense_layers_does_not_rebalance():
    counts = layer_counts({"a": (10, 10), "b": (10, 10)}, 0.9, dense_layers=["a"])
    assert counts == {"a": 100, "b": 10}


def test_largest_remainders_win():
    # 0.5 of 3, 3 and 3 are 1.5 each; the total of 4 or 5 goes to the first layers.
    counts = layer_counts(dict.fromkeys("abc", (3, 1)), 0.5, "global")
    assert counts == {"a": 2, "b": 1, "c": 1}


def test_explicit_sparsity_by_layer():
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert layer_counts(shapes, {"a": 0.9, "b": 0.5}) == {"a": 10, "b": 50}
    with pytest.raises(ValueError, match=r"sparsity has 'c', which no layer matches; the layers are \['a', 'b'\]"):
        layer_counts(shapes, {"a": 0.9, "b": 0.5, "c": 0.1})
    with pytest.raises(ValueError, match=r"sparsity has no value for \['b'\]"):
        layer_counts(shapes, {"a": 0.9})
    with pytest.raises(ValueError, match=r"sparsity\['b'\]=1.2 is not allowed; expected a number in \[0, 1\)"):
        layer_counts(shapes, {"a": 0.9, "b": 1.2})


@pytest.mark.parametrize(
    ("pattern", "counts"),
    [
        (Filter(), {"a": 4, "b": 8}),
        (Channel(), {"a": 4, "b": 4}),
        (Block(4, 4), {"a": 18, "b": 4}),
        (NM(1, 4), {"a": 144, "b": 32}),
        (Unstructured(), {"a": 288, "b": 64}),
    ],
)
def test_counts_are_groups_of_the_pattern(pattern, counts):
    assert layer_counts({"a": (8, 8, 3, 3)} | {"b": (16, 8)}, 0.5, pattern=pattern) == counts


@pytest.mark.parametrize(
    ("channels", "sparsity", "kept"),
    [(64, 0.5, 32), (64, 0.9, 32), (64, 0.3, 32), (64, 0.2, 64), (100, 0.01, 100), (100, 0.1, 96), (16, 0.9, 16)],
)
def test_counts_are_multiples_where_the_pattern_says_so(channels, sparsity, kept):
    assert layer_counts({"a": (channels, 3)}, sparsity, pattern=Filter(32)) == {"a": kept}
    assert layer_counts({"a": (3, channels, 2, 2)}, {"*": sparsity}, pattern=Channel(32)) == {"a": kept}


def test_multiples_come_before_the_exact_total():
    shapes = {"a": (64, 64, 3, 3), "b": (128, 64, 3, 3), "c": (256, 128, 1, 1)}
    for distribution in ("er", "erk"):
        counts, exact = (layer_counts(shapes, 0.6, distribution, Filter(m)) for m in (16, 1))
        assert all(counts[name] % 16 == 0 and abs(counts[name] - exact[name]) <= 8 for name in shapes)
    assert layer_counts(shapes, 0.6, "erk", Filter(16), ["a"])["a"] == 64


@pytest.mark.parametrize("distribution", ["er", "erk"])
@pytest.mark.parametrize("pattern", [Filter(), Channel(), Block(4, 4)])
def test_erdos_renyi_of_structured_patterns_keeps_its_proportions(distribution, pattern):
    shapes = {"a": (64, 64, 3, 3), "b": (256, 64), "c": (64, 256), "d": (32, 64, 3, 3)}
    densities, _ = erdos_renyi_densities(shapes, 0.7, kernel=distribution == "erk")
    counts = layer_counts(shapes, 0.7, distribution, pattern)
    for name, count in counts.items():
        groups = pattern.num_groups(shapes[name])
        assert abs(count - densities[name] * groups) <= 1, name


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "high"])
@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
def test_sparsity_outside_its_range(value, distribution):
    with pytest.raises(ValueError, match=r"sparsity=.* is not allowed; expected a number in \[0, 1\)"):
        layer_counts({"a": (4, 4)}, value, distribution)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_every_argument_is_checked_even_where_it_is_not_used(pattern):
    shapes = {"a": (4, 4), "b": (8, 4)}
    for sparsity in (0.5, {"a": 0.5, "b": 0.5}):
        with pytest.raises(ValueError, match="distribution='erd' is not known; allowed: uniform, er, erk, global"):
            layer_counts(shapes, sparsity, "erd", pattern)
    for sparsity, message in [
        (1.5, r"sparsity=1.5 is not allowed; expected a number in \[0, 1\)"),
        ({"a": 0.5, "b": -0.1}, r"sparsity\['b'\]=-0.1 is not allowed"),
        ({"a": 0.5}, r"sparsity has no value for \['b'\]"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, r"sparsity has 'c', which no layer matches"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_counts(shapes, sparsity, "erk", pattern)
    assert layer_counts(shapes, {"a": 0.5, "b": 0.5}, "erk", pattern) == {"a": 8, "b": 16}


def test_sparsity_by_pattern_is_that_of_the_first_that_fits():
    shapes = dict.fromkeys(("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc"), (10, 10))
    sparsity = {"layer1.1.*": 0.5, "layer?.*": 0.8, "fc": 0, "*": 0.9}
    assert list(layer_counts(shapes, sparsity).values()) == [10, 20, 50, 20, 100]
    assert layer_counts({"a": (10, 10)}, {"a": 0.5, "*": 0.9}) == {"a": 50}  # a default may find nothing left
    assert layer_counts({"": (10, 10)}, {"*": 0.9}) == {"": 10}  # a model that is one layer
    assert layer_counts({"a[0]": (10, 10)}, {"a[0]": 0.5}) == {"a[0]": 50}
    assert layer_counts({"a": (10, 10), "b": (10, 10)}, {"b": 0.5}, dense_layers=["a"]) == {"a": 100, "b": 50}


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ({"layer9.*": 0.5, "*": 0.9}, r"sparsity has 'layer9.\*', which no layer matches; the layers are \['a', 'b'\]"),
        ({"*": 0.9, "a": 0.5}, "sparsity has 'a' after entries that match its layers already; the first that fits"),
        ({"a*": 0.9}, r"sparsity has no value for \['b'\]; name them, or end with a default such as '\*': 0.9"),
        ({"a*": 1.0, "*": 0.9}, r"sparsity\['a\*'\]=1.0 is not allowed"),
    ],
)
def test_sparsity_by_pattern_says_what_is_wrong(sparsity, message):
    with pytest.raises(ValueError, match=message):
        layer_counts({"a": (10, 10), "b": (10, 10)}, sparsity)


def test_unknown_names():
    with pytest.raises(ValueError, match="distribution='erd' is not known; allowed: uniform, er, erk, global"):
        layer_counts({"a": (4, 4)}, 0.5, "erd")
    with pytest.raises(ValueError, match=r"dense_layers names unknown layers \['b'\]; the layers are \['a'\]"):
        layer_counts({"a": (4, 4)}, 0.5, dense_layers=["b"])


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", "global"])
def test_dense_layers_stand_outside_the_target(distribution):
    shapes = {"a": (10, 10), "b": (10, 10), "c": (10, 10)}
    assert layer_counts(shapes, 0.9, distribution, dense_layers=["b"]) == {"a": 10, "b": 100, "c": 10}
    assert layer_counts(shapes, 0.9, distribution, dense_layers=["a", "b", "c"]) == dict.fromkeys("abc", 100)


# -- when -------------------------------------------------------------------------------------------------------------


def test_18_changes_in_148_epochs_of_every_eighth():
    steps = 50
    schedule = UpdateSchedule(freq=8 * steps, end=148 * steps)
    assert sum(schedule.is_due(t) for t in range(1, 148 * steps + 1)) == 18
    for epochs, changes in ((99, 12), (250, 31)):
        assert (
            sum(UpdateSchedule(8 * steps, end=epochs * steps).is_due(t) for t in range(1, epochs * steps + 1))
            == changes
        )


def test_update_schedule_bounds():
    schedule = UpdateSchedule(freq=5, start=10, end=25)
    assert [t for t in range(60) if schedule.is_due(t)] == [10, 15, 20]
    assert [t for t in range(1, 12) if UpdateSchedule(5).is_due(t)] == [5, 10]
    assert not any(UpdateSchedule(0).is_due(t) for t in range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freq": -1}, "update_freq=-1 is not allowed"),
        ({"freq": 1.5}, "update_freq=1.5 is not allowed"),
        ({"freq": 5, "start": 10, "end": 9}, "update_end=9 is not allowed; it is before update_start=10"),
    ],
)
def test_update_schedule_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        UpdateSchedule(**arguments)


def test_cosine_drop_fraction():
    assert cosine_drop_fraction(0, 1000, 0.3) == pytest.approx(0.3, abs=1e-15)
    assert cosine_drop_fraction(500, 1000, 0.3) == pytest.approx(0.15, abs=1e-15)
    assert cosine_drop_fraction(1000, 1000, 0.3) == 0
    assert cosine_drop_fraction(2000, 1000, 0.3) == 0


def test_the_largest_remainders_are_rounded_up_and_the_smallest_give_way():
    assert layer_counts({"a": (1, 11), "b": (1, 14)}, 0.7, "global") == {"a": 4, "b": 4}  # of 3.3 and 4.2
    # a and b have one each, so that 1 + 1 + 3 + 3 is one too much.
    shapes = {"a": (1, 1), "b": (1, 1), "c": (1, 38), "d": (1, 33)}
    assert layer_counts(shapes, 0.9, "global") == {"a": 1, "b": 1, "c": 3, "d": 2}
    shapes = {"a": (1, 1), "b": (1, 1), "d": (1, 33), "c": (1, 38)}
    assert layer_counts(shapes, 0.9, "global") == {"a": 1, "b": 1, "c": 3, "d": 2}
