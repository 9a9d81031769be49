import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import secateur as sc
from secateur.errors import InputError, InputTypeError, StructureError, UnknownNameError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, float("nan"), True, "half"])
def test_sparsity(sparsity):
    with pytest.raises(InputError, match="between 0 and 1"):
        sc.shrink(mlp(), X, sparsity)


def test_inputs():
    with pytest.raises(InputTypeError, match=r"give inputs with which model\(...\) runs"):
        sc.shrink(mlp(), torch.randn(3, 5), 0.5)
    with pytest.raises(InputTypeError, match="Pass a tensor"):
        sc.shrink(mlp(), None, 0.5)
    with pytest.raises(InputError, match="give at least one example"):
        sc.shrink(mlp(), [], 0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_that_cannot_be_followed():
    with pytest.raises(InputTypeError, match=r"give an nn\.Module"):
        sc.shrink("model", X)
    with pytest.raises(InputError, match="run the model once"):
        sc.shrink(nn.LazyLinear(3), X)
    with pytest.raises(InputError, match=r"shrink model\._orig_mod"):
        sc.shrink(torch.compile(mlp()), X)


def test_an_optimizer_of_another_model():
    with pytest.raises(InputError, match="give the optimizer that trains this model"):
        sc.shrink(mlp(), X, optimizer=torch.optim.SGD(mlp().parameters(), 0.1))


def test_an_unknown_score():
    with pytest.raises(InputError, match="choose"):
        sc.shrink(mlp(), X, score="weight")


def test_an_unknown_option():
    with pytest.raises(InputTypeError, match=r"there is no option scores: choose macs, .*verify, optimizer"):
        sc.shrink(mlp(), X, scores="magnitude")


def test_what_is_kept_must_be_there():
    with pytest.raises(UnknownNameError, match=r"keep='head' matches no tensor or module; valid names are: 0\.weight"):
        sc.shrink(mlp(), X, keep="head")
    with pytest.raises(InputError, match="none of the model's modules: give its own"):
        sc.shrink(mlp(), X, keep=nn.Linear(1, 1))
    with pytest.raises(InputTypeError, match="give names, globs or modules"):
        sc.shrink(mlp(), X, keep=[3])


@pytest.mark.parametrize("option", [{"round_to": 0}, {"min_width": 0}])
def test_widths_are_whole_numbers(option):
    with pytest.raises(InputError, match="give a number of positions, 1 or more"):
        sc.shrink(mlp(), X, 0.5, **option)


def test_an_option_that_would_choose_nothing():
    with pytest.raises(InputError, match="round_to chooses nothing where zeros say which units go: leave it out"):
        sc.shrink(mlp(), X, round_to=8)


def test_words_for_what_a_newcomer_gives():
    pruned = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(InputError, match=r"0\.weight is computed from other weights.*sc\.from_torch_prune"):
        sc.shrink(pruned, X, 0.5)
    with pytest.raises(InputError, match=r"hold NaN.*give numbers"):
        sc.shrink(mlp(), X * float("nan"), 0.5)
    with pytest.raises(InputError, match=r"\(0, 4\): give a batch of one or more"):
        sc.shrink(mlp(), X[:0], 0.5)
    with pytest.raises(StructureError, match=r"no forward reaches a weight\. .*keep the model as it is"):
        sc.shrink(nn.ReLU(), X, 0.5)
    with pytest.raises(StructureError, match=r"only dead units go.*Give a sparsity, such as 0\.5"):
        sc.shrink(mlp(), X)


def test_two_things_that_say_what_goes():
    plan = sc.structure.propose(mlp(), X, 0.5)
    with pytest.raises(InputError, match=r"sparsity and plan are given together.*give one of them"):
        sc.shrink(mlp(), X, 0.5, plan=plan)
    with pytest.raises(InputError, match="score chooses nothing where the plan says which units go: leave it out"):
        sc.shrink(mlp(), X, plan=plan, score="l2")
    with pytest.raises(InputTypeError, match=r"give what propose\(...\) returned"):
        sc.shrink(mlp(), X, plan=plan.to_json())


def test_models_whose_weights_are_elsewhere():
    model = mlp()
    model[0].to("meta")
    with pytest.raises(InputError, match=r"0\.weight has no weights here, they are offloaded: load it without"):
        sc.shrink(model, X, 0.5)
    model = mlp().to("meta")
    model[0]._hf_hook = object()
    with pytest.raises(InputError, match=r"0\.weight has no weights here.*load it without a device_map"):
        sc.shrink(model, X, 0.5, verify=False)
