"""The optimizers of the small world's models."""

import math

import pytest
import torch
from torch import nn

from cim.world.optimize import Muon, minimize, muon


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_muon_updates_as_pytorchs_does_but_for_its_bfloat16(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.05 * start.norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_treats_a_kernel_as_a_matrix_in_any_memory_format():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 8, 3, 5, 5)
    shapes = weight.clone(), weight.clone().to(memory_format=torch.channels_last), weight.flatten(1).clone()
    kernel, channels_last, matrix = map(nn.Parameter, shapes)
    for p in (kernel, channels_last, matrix):
        p.grad = gradient.view(p.shape).clone()
        Muon([p], lr=0.1, weight_decay=0.0).step()
    assert not torch.equal(kernel, weight)
    assert torch.equal(kernel, channels_last)
    assert torch.equal(kernel.flatten(1), matrix)


def test_every_trained_parameter_has_one_optimizer():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight  # tied: an embedding, so no matrix for Muon
    model[2].bias.requires_grad_(False)
    matrices, others = (optimizer.param_groups[0]["params"] for optimizer in muon(model, 0.1, 0.0))
    assert [id(p) for p in matrices] == [id(model[1].weight)]
    assert {id(p) for p in others} == {id(p) for p in (model[0].weight, model[1].bias, model[2].weight)}


def test_what_a_loss_does_not_use_stays_as_it_is():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    before = model[1].weight.clone()
    minimize(muon(model, 0.1, 0.5), lambda x: model[0](x).square().mean(), torch.ones(5, 4, 3), 5, 0.2, "test")
    assert torch.equal(model[1].weight, before)


def test_rates_rise_and_decay_and_gradients_are_clipped():
    p, rates, norms = nn.Parameter(torch.ones(3, 2)), [], []
    optimizer = torch.optim.SGD([p], lr=1.0)

    def note(*_):
        rates.append(optimizer.param_groups[0]["lr"])
        norms.append(float(p.grad.norm()))

    optimizer.register_step_post_hook(note)
    losses = minimize([optimizer], lambda scale: (scale * p).sum(), [3.0] * 10, 10, 0.2, "test", max_norm=0.5)
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert rates == pytest.approx(expected)
    assert norms == pytest.approx([0.5] * 10)
    assert losses[0] == pytest.approx(18.0)
    assert losses == sorted(losses, reverse=True)
