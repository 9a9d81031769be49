"""A trial: whatever the metric does to the model, it is bit for bit as it was."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import secateur as sc
from secateur import plan
from secateur.calibration.trials import Before, number, tried
from secateur.errors import InputError, InputTypeError
from trial_models import cnn, everything, images


def planned(model, sparsity=0.5):
    return plan.make(model, sparsity, score="magnitude", allocation="global", pattern=None, scope=None)


def prepared():
    model = cnn()
    with torch.no_grad():
        model[0].weight.view(-1)[:3] = torch.tensor([-0.0, 1e-40, 3.0])
    model(images()[0]).sum().backward()
    return model


def trains(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    optimizer.zero_grad()
    x, y = images()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def converts(model):
    model.half()
    model[4].weight.requires_grad_(False)
    model[0].register_buffer("more", torch.ones(2))
    model[4].bias = nn.Parameter(torch.ones(10))


def recalibrates(model):
    sc.recalibrate(model, [images()[0]])


def removes(model):
    model[4] = nn.Linear(1, 1)
    model.append(nn.ReLU())
    del model[0].bias
    model[1].register_buffer("running_mean", None)


@pytest.mark.parametrize("act", [trains, converts, recalibrates, removes])
def test_the_model_is_as_it_was(act):
    model = prepared()
    before = everything(model)
    seen = []

    def evaluate(given):
        seen.append(int((given[4].weight == 0).sum()))
        act(given)
        return 1

    assert tried(model, evaluate, "here", planned(model)) == 1.0
    assert seen[0] > 500
    assert everything(model) == before
    assert list(model[0]._parameters) == ["weight", "bias"]
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear]


class Tagger(nn.Module):
    """Keeps what is no parameter and no buffer: the flat weights of an LSTM, a state, a list."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)
        self.state, self.seen = torch.ones(2), []

    def forward(self, x):
        return self.head(self.lstm(x)[0]) * self.state


def renews(model):
    model.lstm.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))


def masks_by_torch(model):
    prune.l1_unstructured(model.lstm, "weight_hh_l0", 0.5)
    prune.l1_unstructured(model.head, "weight", 0.5)


def parametrizes(model):
    nn.utils.parametrizations.weight_norm(model.lstm, "weight_hh_l0")


def hooks(model):
    model.head.register_forward_hook(lambda module, args, out: 2 * out)


def remembers(model):
    model.state.mul_(2)
    model.state = model.state + 1
    model.seen.append(1)
    model.head.forward = lambda x: x


@pytest.mark.parametrize("act", [renews, masks_by_torch, parametrizes, hooks, remembers])
def test_what_is_no_parameter_is_as_it_was_too(act):
    torch.manual_seed(0)
    model, x = Tagger(), torch.ones(5, 1, 3)
    before, out, seen = everything(model), model(x), []

    def evaluate(given):
        seen.append(given(x).sum().item())
        act(given)
        return 1.0

    for _ in range(2):
        tried(model, evaluate, "here", planned(model))
    assert seen[0] == seen[1]
    assert torch.equal(model(x), out)
    assert everything(model) == before
    assert model.seen == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine")])
def test_also_after_an_error_or_an_interruption(error):
    model = prepared()
    before = everything(model)

    def evaluate(given):
        trains(given)
        raise error

    with pytest.raises(type(error), match="mine") as found:
        tried(model, evaluate, "head at sparsity 0.5", planned(model))
    assert everything(model) == before
    if isinstance(error, ValueError):
        assert "head at sparsity 0.5" in found.value.__notes__[0]


def test_tied_overlapping_and_sparse_tensors():
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 4), nn.Linear(4, 4)
    model.b.weight = model.a.weight
    model.register_buffer("wide", torch.ones(1).expand(5))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("none", None)
    kept = model.a.weight.detach().clone()
    before = Before(model)
    with torch.no_grad():
        model.a.weight.zero_()
        model.sparse.mul_(2)
    before.restore()
    assert torch.equal(model.b.weight, kept)
    assert model.b.weight is model.a.weight
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model():
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    kept = model.state_dict()["0.weight"].clone()

    def evaluate(given):
        with torch.no_grad():
            next(given.parameters()).fill_(7)
        given.train(False)
        return 0

    tried(model, evaluate, "here")
    assert torch.equal(model.state_dict()["0.weight"], kept)
    assert model.training


def test_a_generator_is_as_it_was():
    model, generator = cnn(), torch.Generator().manual_seed(3)
    state = generator.get_state()
    score = sc.scores.random(generator=generator)
    one = plan.make(model, 0.5, score=score, allocation="global", pattern=None, scope=None)
    zeros = [tried(model, lambda given: (given[4].weight == 0).sum(), "here", one) for _ in range(2)]
    assert zeros[0] == zeros[1]
    assert torch.equal(generator.get_state(), state)


def test_each_trial_sees_the_same_random_numbers():
    model, state = cnn(), torch.get_rng_state()
    drawn = [tried(model, lambda _: torch.rand(1), "here", planned(model)) for _ in range(2)]
    assert drawn[0] == drawn[1] == torch.rand(1).item()
    torch.set_rng_state(state)


def test_no_warning_of_a_bad_choice():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    tried(model, lambda model: 1.0, "here", planned(model))


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([[0.5]]), torch.tensor(0.5).half()]
)
def test_one_number(value):
    assert number(value, "here") == 0.5


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "evaluate gave None for here: let it return one number"),
        (torch.ones(3), r"a tensor of shape \(3,\) for here: let it return one number"),
        ("0.5", "evaluate gave '0.5' for here: let it return one number"),
        (torch.tensor(True), "let it return one number"),
        ((0.5, 0.6), "evaluate gave a tuple for here: let it return one number"),
        (float("nan"), "evaluate gave nan for here: let it return a finite number"),
        (torch.tensor(-float("inf")), "evaluate gave -inf for here: let it return a finite number"),
    ],
)
def test_what_is_no_number(value, said):
    with pytest.raises((InputError, InputTypeError), match=said):
        number(value, "here")
