"""The communication hook: the gradients of plain DDP, fewer bytes. Two processes over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import sparsebilevel as sb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
    ),
]


class Net(nn.Module):
    """Masked and unmasked parameters in one bucket, channels_last, scores as a Parameter, a shared weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, bias=False)
        self.dense = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 12)
        self.tied = nn.Linear(16, 20, bias=False)
        self.embedding = nn.Embedding(20, 16)

    def forward(self, x, words):
        x = self.conv2(self.norm(self.conv(x)).relu()).mean((2, 3))
        x = self.dense(x).relu()
        return self.fc(x).square().sum() + self.tied(x + self.embedding(words)).square().sum()


def build():
    torch.manual_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    sb.sparsify(model, 0.9, seed=0, exclude=["dense"])
    model.embedding.weight = model.tied.weight  # its rows get gradients outside of the mask
    model.fc.set_mask_scores(nn.Parameter(torch.zeros(12, 16)))
    return model


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 20, (6,), generator=generator)


def train(ddp, model, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(5):
        if step == 3:  # a change of topology
            for layer in (model.conv, model.fc):
                layer.set_mask(layer.mask.roll(1, 0))
        optimizer.zero_grad()
        with ddp.no_sync():
            ddp(*batch(rank, 2 * step)).backward()
        ddp(*batch(rank, 2 * step + 1)).backward()
        yield {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {}
    for name, options in [("whole", {}), ("small buckets", {"bucket_cap_mb": 0.002, "gradient_as_bucket_view": True})]:
        plain, hooked = build(), build()
        hook = sb.SparseAllReduce(ddp := DistributedDataParallel(hooked, **options))
        expected = list(train(DistributedDataParallel(plain, **options), plain, rank))
        found = list(train(ddp, hooked, rank))
        numel = sum(p.numel() for p in hooked.parameters())
        kept = [m.mask for m in (hooked.conv, hooked.conv2, hooked.fc)]  # not of `tied`
        sent = numel - sum(int((~mask).sum()) for mask in kept)
        result[name] = (expected, found, hook.bytes_sent, hook.dense_bytes, sent, numel, repr(hook))
    # One rank alone writes its masks: what they were, and then others.
    for name, options in [("one bucket", {}), ("several buckets", {"bucket_cap_mb": 0.002})]:
        model = build()
        ddp = DistributedDataParallel(model, **options)
        hook = sb.SparseAllReduce(ddp)
        for step in range(3):
            if rank == 0:
                model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
            ddp(*batch(rank, step)).backward()
        gradient, counts = model.fc.weight.grad.clone(), (hook.bytes_sent, hook.dense_bytes)
        if rank == 0:
            model.fc.set_mask(model.fc.mask.roll(1, 0))
            model.conv.set_mask(torch.ones_like(model.conv.mask), check=False)
        try:
            ddp(*batch(rank, 3)).backward()
        except RuntimeError as error:
            result[name] = (gradient, counts, str(error))
    # Everything that a parameter sends may be masked away.
    torch.manual_seed(0)
    empty = sb.sparsify(nn.Sequential(nn.Linear(4, 4, bias=False)), 0.5, seed=0)
    empty[0].set_mask(torch.zeros(4, 4, dtype=torch.bool), check=False)
    hook = sb.SparseAllReduce(ddp := DistributedDataParallel(empty))
    ddp(torch.ones(2, 4)).sum().backward()
    result["empty"] = (empty[0].weight.grad, hook.bytes_sent)
    # Ranks with other masks: all of them say so.
    torch.manual_seed(0)
    other = sb.sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5, seed=rank)
    hook = sb.SparseAllReduce(ddp := DistributedDataParallel(other))
    try:
        ddp(torch.ones(2, 4)).sum().backward()
    except RuntimeError as error:
        result["error"] = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("buckets", ["whole", "small buckets"])
def test_gradients_are_those_of_plain_ddp(results, buckets):
    for expected, found, *_ in (result[buckets] for result in results):
        assert len(found) == 5
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert_close(ours[name], theirs[name], msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}")
            assert ours["tied.weight"].count_nonzero() > 0.5 * ours["tied.weight"].numel()
    for ours, theirs in zip(results[0][buckets][1], results[1][buckets][1], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("buckets", ["whole", "small buckets"])
def test_bytes_are_counted(results, buckets):
    for result in results:
        _, _, bytes_sent, dense_bytes, sent, numel, text = result[buckets]
        assert dense_bytes == 5 * 4 * numel
        assert bytes_sent == 5 * (4 * sent + 16)
        assert (
            text == f"SparseAllReduce({bytes_sent} bytes sent of {dense_bytes} dense ({bytes_sent / dense_bytes:.1%}))"
        )


def test_a_bucket_may_be_empty(results):
    for result in results:
        gradient, bytes_sent = result["empty"]
        assert gradient.eq(0).all()
        assert bytes_sent == 16


@pytest.mark.parametrize("buckets", ["one bucket", "several buckets"])
def test_one_rank_may_write_the_masks_that_it_has(results, buckets):
    (first, counts, _), (second, other, _) = (result[buckets] for result in results)
    assert torch.equal(first, second)
    assert first.abs().max() > 0
    assert counts == other


@pytest.mark.parametrize("buckets", ["one bucket", "several buckets"])
def test_masks_that_one_rank_alone_changes_are_an_error_on_all_ranks(results, buckets):
    for result in results:
        assert (
            result[buckets][2]
            == "ranks disagree on the masks of conv.weight, fc.weight; change masks on all ranks together"
        )


def test_other_masks_are_an_error_on_all_ranks(results):
    for result in results:
        assert "ranks disagree on the masks of 0.weight;" in result["error"]


def test_only_ddp_models_are_taken():
    with pytest.raises(TypeError, match="ddp is a Linear; expected a DistributedDataParallel"):
        sb.SparseAllReduce(nn.Linear(2, 2))
