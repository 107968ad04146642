"""Sparse models under DistributedDataParallel and fully_shard: two processes over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import sparsebilevel as sb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sb.sparsify(model, 0.5, seed=0)
    model[0].set_mask_scores(torch.zeros(8, 5))
    model[2].set_mask_scores(nn.Parameter(torch.zeros(3, 8)))
    for layer in (model[0], model[2]):
        layer.collect("all")
    return model


def batch(rank):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(rank))


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build()
    ddp = DistributedDataParallel(model)
    model[1].running_mean.fill_(rank)
    model[0].mask_scores.fill_(rank)
    ddp(batch(rank)).square().sum().backward()
    result = {
        "mask": model[0].mask,
        "scores": model[0].mask_scores,
        "running_mean": model[1].running_mean,
        "weight.grad": model[0].weight.grad,
        "scores.grad": model[2].mask_scores.grad,
        "effective_grad": model[0].effective_grad,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    alone = []
    for rank in range(2):
        model = build()
        model(batch(rank)).square().sum().backward()
        alone.append(model)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], alone


def test_masks_are_equal_and_gradients_are_averaged(results):
    (first, second), alone = results
    assert torch.equal(first["mask"], second["mask"])
    for key, tensor in [("weight.grad", lambda m: m[0].weight.grad), ("scores.grad", lambda m: m[2].mask_scores.grad)]:
        mean = (tensor(alone[0]) + tensor(alone[1])) / 2
        assert_close(first[key], mean)
        assert_close(second[key], mean)
    assert not first["weight.grad"][~first["mask"]].any()


def test_score_buffers_are_not_broadcast_and_others_are(results):
    (first, second), _ = results
    assert first["scores"].eq(0).all()
    assert second["scores"].eq(1).all()
    assert_close(second["running_mean"], 0.1 * batch_mean(1))
    assert not torch.equal(first["running_mean"], second["running_mean"])


def batch_mean(rank):
    return build()[0](batch(rank)).mean(0).detach()


def test_effective_gradients_stay_local(results):
    ranks, alone = results
    for result, model in zip(ranks, alone, strict=True):
        assert_close(result["effective_grad"], model[0].effective_grad)


def convolutions(optimize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    sb.sparsify(model, 0.5, seed=0)
    return sb.optimize_for_cpu(model) if optimize else model


def work_in_layout(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    x, weights = torch.randn(20, 3, 8, 8, generator=generator), torch.randn(20, 8, 4, 4, generator=generator)
    models = [convolutions(optimize) for optimize in (True, False)]
    for model in models:
        ddp = DistributedDataParallel(model)
        (ddp(x) * weights).mean().backward()
    torch.save([[p.grad for p in model.parameters()] for model in models], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_a_network_in_layout_gives_the_same_averages(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBILEVEL_BACKEND", "sparse")
    torch.multiprocessing.spawn(work_in_layout, (str(tmp_path),), nprocs=2)
    (first, plain), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[0].abs().max() > 1e-4
    for ours, others, expected in zip(first, second, plain, strict=True):
        assert torch.equal(ours, others)
        assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def learner(shared):
    torch.manual_seed(0)
    model = sb.sparsify(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), 0.5, seed=0)
    layers = [layer for _, layer in sb.sparse_layers(model)]
    for layer in layers:
        layer.set_mask_scores(nn.Parameter(torch.randn_like(layer.weight)))
    if shared:
        sb.optim.share_gradient(model)
        for layer in layers:
            layer.mask_scores.requires_grad_(False)
    return model, sb.optim.AdamW(model.parameters(), lr=0.01)


def work_with_scores(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trained = []
    for shared, hook in ((False, False), (True, False), (True, True)):
        model, optimizer = learner(shared)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        sparse = sb.SparseAllReduce(ddp) if hook else None
        for step in range(3):
            optimizer.zero_grad()
            with ddp.no_sync():
                ddp(batch(4 * step + rank)).square().sum().backward()
            ddp(batch(4 * step + 2 + rank)).square().sum().backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
        if sparse is not None:
            assert sparse.bytes_sent == sparse.dense_bytes
    torch.save(trained, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_weights_and_scores_that_share_a_gradient(tmp_path):
    torch.multiprocessing.spawn(work_with_scores, (str(tmp_path),), nprocs=2)
    (plain, *shared), others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = [p.detach() for p in learner(False)[0].parameters()]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(plain, start, strict=True))
    for got in shared:
        for a, b in zip(got, plain, strict=True):
            assert_close(a, b)
    for a, b in zip(others[0], plain, strict=True):
        assert torch.equal(a, b)


def work_sharded(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trained = []
    for make in (torch.optim.SGD, sb.optim.SGD, sb.optim.AdamW):
        models = [build_with_fixed_masks() for _ in range(2)]
        fully_shard(models[0][0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        fully_shard(models[0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        for model, ranks in zip(models, ([rank], [0, 1]), strict=True):
            optimizer = make(model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                model(torch.cat([batch(2 * step + r) for r in ranks])).square().mean().backward()
                optimizer.step()
        trained.append(
            [[p.full_tensor() for p in models[0].parameters()], [p.detach() for p in models[1].parameters()]]
        )
        assert torch.equal(models[0].state_dict()["0.mask"], models[1][0].mask)
    with pytest.raises(ValueError, match=r"the weight of '0' .* is a DTensor; .* use DistributedDataParallel"):
        sb.SET(models[0], optimizer)
    if rank == 0:
        torch.save(trained, f"{folder}/trained.pt")
    dist.barrier()
    dist.destroy_process_group()


def build_with_fixed_masks():
    torch.manual_seed(0)
    return sb.sparsify(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), 0.5, seed=0)


def test_fixed_masks_under_fully_shard(tmp_path):
    torch.multiprocessing.spawn(work_sharded, (str(tmp_path),), nprocs=2)
    start = [p.detach() for p in build_with_fixed_masks().parameters()]
    for sharded, alone in torch.load(tmp_path / "trained.pt"):
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(alone, start, strict=True))
        for a, b in zip(sharded, alone, strict=True):
            assert_close(a, b)
