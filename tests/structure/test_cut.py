import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.masks import Masks
from secateur.structure.cut import check_optimizer, cut, follow, masked, own_memory, sliced, twin, undo


def test_sliced():
    assert sliced(torch.arange(6).reshape(2, 3), {0: [1], 1: [0, 2]}).tolist() == [[3, 5]]


def test_a_twin_shares_memory_until_it_is_cut():
    model = nn.Linear(3, 4)
    small = twin(model)
    assert small.weight is not model.weight
    assert small.weight.data_ptr() == model.weight.data_ptr()
    done = cut(small, {"weight": {0: [0, 2]}, "bias": {0: [0, 2]}})
    assert small.weight.shape == (2, 3)
    assert model.weight.shape == (4, 3)
    undo(done)
    assert small.weight.shape == (4, 3)


def test_a_twin_has_buffers_and_ties_of_its_own():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    small = twin(model)
    assert small[1].weight is small[0].weight
    assert small[2].running_mean.data_ptr() != model[2].running_mean.data_ptr()
    cut(small, {"0.weight": {1: [0]}, "1.weight": {1: [0]}})
    assert small[1].weight is small[0].weight
    assert small[0].weight.shape == (5, 1)


def test_parted_models_share_nothing_and_gradients_are_cut():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(2, 3)).sum().backward()
    small = twin(model)
    kept = {"0.weight": {0: [1]}, "0.bias": {0: [1]}, "1.weight": {1: [1]}}
    cut(small, kept)
    own_memory(model, small, kept)
    assert small[1].bias.data_ptr() != model[1].bias.data_ptr()
    assert torch.equal(small[0].weight.grad, model[0].weight.grad[1:2])
    assert torch.equal(small[1].weight.grad, model[1].weight.grad[:, 1:2])


def test_an_optimizer_follows():
    model = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    old = {k: v.clone() for k, v in optimizer.state[model.weight].items()}
    small = twin(model)
    kept = {"weight": {0: [0, 2]}, "bias": {0: [0, 2]}}
    cut(small, kept)
    follow(model, small, kept, optimizer)
    state = optimizer.state[small.weight]
    assert torch.equal(state["exp_avg"], old["exp_avg"][[0, 2]])
    assert torch.equal(state["step"], old["step"])
    assert optimizer.param_groups[0]["params"] == [small.weight, small.bias]
    assert len(optimizer.state) == 2
    small(torch.randn(2, 3)).sum().backward()
    optimizer.step()


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(InputError, match="give the optimizer that trains this model"):
        check_optimizer(nn.Linear(3, 4), torch.optim.SGD(nn.Linear(3, 4).parameters(), 0.1))


def test_a_masked_copy_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = model[0].weight.clone()
    copied = masked(model, Masks({"0.weight": torch.eye(4, 3, dtype=torch.bool)}))
    assert torch.equal(copied[0].weight != 0, torch.eye(4, 3, dtype=torch.bool))
    assert torch.equal(model[0].weight, before)
    assert copied[1].weight.data_ptr() == model[1].weight.data_ptr()


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.rows = (i for i in range(3))
    with pytest.raises(InputError, match=r"cannot be copied .*generator.*: change what it holds"):
        twin(model)
