"""benchmarks/gpu_training.py, for machines with a GPU, as far as a CPU runs it."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The module, and a `Bench` of small sizes that has all the time it wants."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import gpu_training

    sizes = gpu_training.QUICK._replace(rounds=1)
    monkeypatch.setattr(gpu_training, "ceilings", lambda device, small: (1e10, 1e11))
    return gpu_training, gpu_training.Bench(torch.device("cpu"), sizes, float("inf"), tmp_path / "found.json")


def test_rows_without_convolutions_run(bench):
    module, bench = bench
    for row in "cd":
        module.ROWS[row](bench)
    rows = json.loads(bench.output.read_text())["rows"]
    found = rows["d"]["variants"]
    assert all(f["ms"] > 0 and f["samples"] == 1 for f in found.values()), found
    flops = 3 * 2 * 32 * 2 * 4 * 256**2  # three products of two layers, 32 tokens
    assert found["dense"]["flops"] == flops
    assert found["dense"]["floor_ms"] == pytest.approx(1e3 * flops / 1e11)
    assert [f["flops_left"] for f in found.values()] == pytest.approx([1, 1, 1, 0.4, 0.4, 0.115, 0.1])
    assert not any("error" in f for f in rows["c"]["bytes_a_weight"].values()), rows


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(bench):
    module, bench = bench

    def broken(model):
        raise RuntimeError("out of luck")

    task = module.Task(lambda: torch.nn.Linear(8, 8), torch.randn(4, 8), torch.sum)
    bench.compare("x", "", task, {"dense": module.Variant(), "broken": module.Variant(broken)})
    found = bench.results["rows"]["x"]["variants"]
    assert found["broken"] == {"error": "RuntimeError: out of luck"}
    assert found["dense"]["ratio"] == 1
    bench.budget = 0
    bench.compare("x", "", task, {"dense": module.Variant()})
    assert bench.results["rows"]["x"]["variants"]["dense"] == {"skipped": "the budget of 0 s was over"}


def test_what_is_ready_when_the_budget_ends_is_timed(bench):
    module, bench = bench
    task = module.Task(lambda: torch.nn.Linear(8, 8), torch.randn(4, 8), torch.sum)

    def late(model):
        bench.budget = 0
        return model

    bench.compare("x", "", task, {"dense": module.Variant(), "late": module.Variant(late), "later": module.Variant()})
    found = bench.results["rows"]["x"]["variants"]
    assert [f.get("samples") for f in found.values()] == [1, 1, None]
    assert found["later"] == {"skipped": "the budget of 0 s was over"}


def test_rows_of_the_same_machine_stay_and_those_of_another_are_not_mixed_in(bench):
    module, bench = bench
    bench.keep("a", {"title": "kept"})
    again = module.Bench(bench.device, bench.sizes, 1.0, bench.output)
    again.keep("f", {"title": "new"})
    assert set(json.loads(bench.output.read_text())["rows"]) == {"a", "f"}
    with pytest.raises(SystemExit, match="has rows of another sizes; give another --output"):
        module.Bench(bench.device, bench.sizes._replace(batch=3), 1.0, bench.output)


def test_hand_written_and_own_masks_train_alike(bench):
    module, bench = bench
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)).double()
    state, x = dense.state_dict(), torch.randn(5, 8, dtype=torch.double)
    grads = []
    for convert in (module.unfused, module.learned):
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)).double()
        model.load_state_dict(state)
        model = convert(model)
        model(x).square().sum().backward()
        grads.append({name.rpartition(".")[2]: p.grad for name, p in model[0].named_parameters()})
    torch.testing.assert_close(grads[0]["original"], grads[1]["weight"])
    torch.testing.assert_close(grads[0]["scores"], grads[1]["mask_scores"], check_dtype=False)
