"""Unstructured masks in federated rounds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from sparsebilevel import BiDST, BiP, sparsify
from sparsebilevel.federated import Settings
from sparsebilevel.federated.local import train_weights
from sparsebilevel.federated.unstructured import MaskedModule, Pruner, decay_closed
from sparsebilevel.nn import sparse_layers

LR, DECAY, WEIGHT_DECAY = 0.05, 0.9, 1e-3


def make_net(dtype=torch.float32):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(1, 6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    return net.to(dtype)


def make_batches(count, size=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 1, 4, 4, generator=generator, dtype=dtype)
    y = torch.randint(5, (count, size), generator=generator)
    return list(zip(x, y, strict=True))


# -- what clients compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1.0, 0.4, 0.0])
def test_collected_gradients_are_those_of_the_effective_weights(part):
    dense = make_net(torch.float64)
    flat = MaskedModule(sparsify(copy.deepcopy(dense), 0.5, init="dense"))
    mask = ~flat.prunable | (torch.rand(flat.values.shape) < 0.5)
    where = flat.prunable & (torch.rand(flat.values.shape) < part)
    values = torch.randn_like(flat.values)
    flat.load(values * mask)
    flat.set_mask(mask)
    assert torch.equal(flat.mask, mask)
    flat.collect(where)
    batches = make_batches(3, dtype=torch.float64)
    total = torch.zeros_like(values)
    for x, y in batches:
        gradient = flat.gradient_of(lambda x=x, y=y: F.cross_entropy(flat.module(x), y))[1]
        with torch.no_grad():
            for name, p in dense.named_parameters():
                p.copy_((values * mask)[flat.spans[name]].view(p.shape))
        dense.zero_grad()
        F.cross_entropy(dense(x), y).backward()
        truth = torch.cat([p.grad.reshape(-1) for p in dense.parameters()])
        assert_close(gradient, truth * mask)
        total += truth
    assert_close(flat.collected(), total * where)
    flat.collect(None)
    assert flat.collected().abs().max() == 0


def test_closed_weights_stay_zero_in_local_steps():
    flat = MaskedModule(sparsify(make_net(), 0.5, init="random"))
    mask = flat.mask
    start = flat.values * mask
    flat.load(start)
    momentum, _ = train_weights(flat, make_batches(4), start, torch.zeros_like(start), LR, DECAY, WEIGHT_DECAY)
    assert (flat.values[~mask] == 0).all()
    assert (momentum[~mask] == 0).all()
    assert (flat.values[mask] != start[mask]).float().mean() > 0.9


# -- one client is the library's method --------------------------------------------------------------------------------


def client_steps(net, mask, weights, momentum, batches, where=None):
    """A round of weights of one client: what it returns, and mean G at ``where``."""
    net.set_mask(mask)
    start, state = weights * mask, momentum * mask
    net.load(start)
    net.collect(where)
    state, _ = train_weights(net, batches, start, state, LR, DECAY, WEIGHT_DECAY)
    return net.values.clone(), state, net.collected() / len(batches)


def train_library(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def flat_of(model, of):
    return torch.cat([of(p).detach().reshape(-1) for p in model.parameters()])


def test_one_client_is_bip():
    """Exactly, with one local step a round: masks, scores, open and closed weights and momentum."""
    lower, upper = make_batches(12), make_batches(12, seed=1)
    model = sparsify(make_net(), 0.8, "global", init="dense")
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=DECAY, weight_decay=WEIGHT_DECAY)
    train_library(model, optimizer, *lower[0])  # momentum that is not zero
    server = Pruner(make_net(), Settings("bip", sparsity=0.8, momentum=DECAY), 12)
    client = MaskedModule(sparsify(make_net(), 0.8, "global", init="dense"))
    weights, momentum, _ = client_steps(client, server.mask, server.flat.values, server.momentum, lower[:1])
    bip = BiP(model, optimizer)
    weights, momentum = server.start(weights, momentum)
    seen = set()
    for batch, (x, y) in zip(lower[1:], upper[1:], strict=True):
        bip.upper_step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        train_library(model, optimizer, *batch)
        bip.step()

        mask = server.mask
        client.set_mask(mask)
        client.load(weights * mask)
        client.collect(client.prunable)
        client.gradient_of(lambda x=x, y=y: F.cross_entropy(client.module(x), y))
        weights, momentum = server.learn(weights, momentum, client.collected(), LR, 1)
        mask = server.mask
        new, state, _ = client_steps(client, mask, weights, momentum, [batch])
        weights, momentum = decay_closed(weights, momentum, ~mask, 1, LR, DECAY, WEIGHT_DECAY)
        weights, momentum = torch.where(mask, new, weights), torch.where(mask, state, momentum)

        theirs = flat_of(model, lambda p: optimizer.state[p]["momentum_buffer"])
        assert_close(weights, flat_of(model, lambda p: p), rtol=1e-4, atol=1e-6)
        assert_close(momentum, theirs, rtol=1e-4, atol=1e-6)
        for (_, a), (_, b) in zip(sparse_layers(model), sparse_layers(server.flat.module), strict=True):
            assert_close(a.mask_scores, b.mask_scores, rtol=1e-4, atol=1e-7)
            assert torch.equal(a.mask, b.mask)
        seen.add(tuple(mask.tolist()))
    assert len(seen) > 3
    assert ((weights != 0) & ~server.mask).any()


def test_one_client_is_bidst():
    batches = make_batches(24)
    model = sparsify(make_net(), 0.8, "erk", init="dense")
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=DECAY, weight_decay=WEIGHT_DECAY)
    bidst = BiDST(model, optimizer, search_space=0.1, update_freq=4, update_end=20)
    settings = Settings("bidst", sparsity=0.8, search_space=0.1, momentum=DECAY, mask_interval=4, local_steps=1)
    server = Pruner(make_net(), settings, 20)
    weights, momentum = server.start(server.flat.values.clone(), server.momentum.clone())
    client = MaskedModule(sparsify(make_net(), 0.8, "erk", init="dense"))
    masks = [server.mask]
    for batch in batches:
        train_library(model, optimizer, *batch)
        bidst.step()
        weights, momentum, gradient = client_steps(client, server.mask, weights, momentum, [batch], server.learning())
        weights, momentum = server.learn(weights, momentum, gradient, LR, 1)
        assert_close(weights, flat_of(model, lambda p: p), rtol=1e-4, atol=1e-6)
        for (_, a), (_, b) in zip(sparse_layers(model), sparse_layers(server.flat.module), strict=True):
            assert_close(a.mask_scores, b.mask_scores, rtol=1e-4, atol=1e-7)
            assert torch.equal(a.mask, b.mask)
        assert_close(momentum, flat_of(model, lambda p: optimizer.state[p]["momentum_buffer"]), rtol=1e-4, atol=1e-6)
        if not torch.equal(server.mask, masks[-1]):
            masks.append(server.mask)
    assert len(masks) == 5  # the first and four changes
    assert (weights[~server.mask] == 0).all()
