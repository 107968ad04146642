"""The average over the devices that keep an entry."""

import importlib
import sys

import pytest
import torch
from torch.testing import assert_close

from sparsebilevel.federated.aggregate import aggregate_masked


def naive(updates, masks, weights, old):
    """Entry by entry."""
    result = {}
    for name, before in old.items():
        mean = before.clone().reshape(-1)
        for i in range(before.numel()):
            kept = [
                (w, u[name].reshape(-1)[i].item())
                for u, m, w in zip(updates, masks, weights, strict=True)
                if name not in m or m[name].reshape(-1)[i]
            ]
            if sum(w for w, _ in kept) > 0:
                mean[i] = sum(w * value for w, value in kept) / sum(w for w, _ in kept)
        result[name] = mean.view(before.shape)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_an_entry_is_averaged_over_the_devices_that_keep_it(dtype):
    shapes = {"conv": (4, 3, 3), "bias": (4,), "scale": ()}
    old = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    updates = [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(3)]
    masks = [{"conv": torch.rand(4, 3, 3) < 0.4}, {"conv": torch.rand(4, 3, 3) < 0.4, "bias": torch.rand(4) < 0.5}, {}]
    masks[2]["conv"] = torch.rand(4, 3, 3) < 0.2
    assert (~(masks[0]["conv"] | masks[1]["conv"] | masks[2]["conv"])).any()
    weights = [30, 0.5, 7]
    result = aggregate_masked(updates, masks, weights, old)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    assert_close(result, naive(updates, masks, weights, old), rtol=tolerance, atol=tolerance)
    assert {name: value.dtype for name, value in result.items()} == dict.fromkeys(shapes, dtype)


def test_what_a_device_does_not_keep_is_not_looked_at():
    kept = torch.tensor([True, False, False])
    update = {"w": torch.tensor([2.0, torch.nan, torch.inf])}
    other = {"w": torch.tensor([4.0, 6.0, 8.0])}
    result = aggregate_masked(
        [update, other], [{"w": kept}, {"w": torch.tensor([True, True, False])}], [1, 1], {"w": torch.ones(3)}
    )
    assert result["w"].tolist() == [3, 6, 1]


def test_devices_of_no_weight_and_integers():
    old = {"n": torch.tensor([1, 2]), "w": torch.tensor([5.0])}
    updates = [{"n": torch.tensor([4, 5]), "w": torch.tensor([1.0])}, {"n": torch.tensor([7, 9]), "w": torch.ones(1)}]
    for result in (aggregate_masked(updates, [{}, {}], [0, 0], old), aggregate_masked([], [], [], old)):
        assert all(torch.equal(value, old[name]) for name, value in result.items())
    result = aggregate_masked(updates, [{}, {}], [2, 1], old)
    assert result["n"].tolist() == [5, 6]
    assert result["n"].dtype == torch.int64
    assert result["w"].tolist() == [1]


@pytest.mark.parametrize(
    ("updates", "masks", "weights", "match"),
    [
        ([{"w": torch.ones(2)}], [], [1], "1 updates, 0 masks, 1 weights"),
        ([{"w": torch.ones(2)}], [{}], [-1], r"weights=\[-1\]"),
        ([{"w": torch.ones(2)}], [{}], [float("nan")], r"weights=\[nan\]"),
        ([{"w": torch.ones(2)}], [{}], [float("inf")], r"weights=\[inf\]"),
        ([{}], [{}], [1], r"updates \[\] .* do not fit old, \['w'\]"),
        ([{"w": torch.ones(2)}], [{"v": torch.ones(2)}], [1], r"masks \['v'\] do not fit"),
        ([{"w": torch.ones(3)}], [{}], [1], r"w has shape \[3\]; expected \[2\]"),
        ([{"w": torch.ones(2)}], [{"w": torch.ones(1, dtype=torch.bool)}], [1], r"w has shape \[1\]"),
        ([{"w": torch.ones(2)}], [{"w": torch.ones(2)}], [1], "the mask of w has dtype torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(updates, masks, weights, match):
    with pytest.raises(ValueError, match=match):
        aggregate_masked(updates, masks, weights, {"w": torch.zeros(2)})


def test_who_has_no_flower_is_told(monkeypatch):
    for name in ("flwr", "flwr.app"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sparsebilevel.federated.flower", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sparsebilevel\[flower\]'"):
        importlib.import_module("sparsebilevel.federated.flower")
