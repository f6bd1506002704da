"""Muon: orthogonal steps for hidden kernels, AdamW's for the rest."""

import copy

import pytest
import torch
from torch import nn

from simple_model import LightningCNN
from waferlab.models.muon import Muon, hidden_kernels, orthogonalized


@pytest.mark.parametrize("shape", [(32, 144), (64, 32), (48, 48)])
def test_a_matrix_is_made_about_orthogonal_and_keeps_its_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape)
    made = orthogonalized(matrix)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape and values.min() > 0.6 and values.max() < 1.25
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ made @ right.T  # diagonal, if the directions are the same
    assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-3)


def test_the_steps_are_those_of_pytorch_s_own_muon_for_matrices():
    torch.manual_seed(0)
    ours = nn.Linear(24, 16, bias=False)
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    muon = Muon([ours.weight], [], **settings)
    reference = torch.optim.Muon([theirs.weight], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    before = ours.weight.detach().clone()
    for step in range(3):
        gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in ((ours.weight, muon), (theirs.weight, reference)):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = (ours.weight - before).norm()
    assert (ours.weight - theirs.weight).norm() < 0.03 * moved  # theirs computes in bfloat16


def test_the_rest_takes_the_steps_of_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(4, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    muon = Muon([], [{"params": list(ours.parameters()), "weight_decay": 0.1}], lr=0.01, weight_decay=0.0)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(4):
        for layer, optimizer in ((ours, muon), (theirs, adamw)):
            optimizer.zero_grad()
            (layer(torch.full((2, 4), 1.0 + step)) ** 2).sum().backward()
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_are_the_kernels_between_the_first_and_the_last_layer_that_join_channels():
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Linear(16, 9)
    )
    assert [id(kernel) for kernel in hidden_kernels(network)] == [id(network[3].weight)]
    network[3].weight.requires_grad = False
    assert hidden_kernels(network) == []


def model_and_optimizer():
    torch.manual_seed(0)
    model = LightningCNN(base_channels=8, optimizer="muon", learning_rate=0.01)
    model._trainer = type("AnyTrainer", (), {"estimated_stepping_batches": 10})()
    return model, model.configure_optimizers()["optimizer"]


def test_of_a_model_each_parameter_is_in_one_group_and_only_matrices_and_kernels_are_decayed():
    model, muon = model_and_optimizer()
    assert type(muon) is Muon
    of_group = [{id(p) for p in group["params"]} for group in muon.param_groups]
    assert sum(map(len, of_group)) == len(set.union(*of_group)) == len(list(model.parameters()))
    assert of_group[0] == {id(kernel) for kernel in hidden_kernels(model.network)}
    for group in muon.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_what_is_taken_up_from_its_saved_state_goes_on_as_if_it_had_not_been_put_down(tmp_path):
    def train(model, optimizer, steps):
        for step in steps:
            images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model.loss(model(images), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()

    whole, optimizer = model_and_optimizer()
    whole.eval()  # without dropout
    train(whole, optimizer, range(6))
    half, optimizer = model_and_optimizer()
    half.eval()
    train(half, optimizer, range(3))
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    resumed, optimizer = model_and_optimizer()
    resumed.eval()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_a_closure_is_called_with_gradients_and_what_it_returns_is_returned():
    layer = nn.Linear(2, 2)
    muon = Muon([], [{"params": list(layer.parameters())}], lr=0.01, weight_decay=0.0)

    def closure():
        loss = layer(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    before = layer.weight.detach().clone()
    assert muon.step(closure).requires_grad and not torch.equal(layer.weight, before)
