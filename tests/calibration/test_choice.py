"""sc.choose_allocation and sc.recommend: by the user's metric, and what they return goes into prune and Pruner."""

import json
import math
import pickle

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation import Allocation
from secateur.calibration.choice import Choice
from secateur.demo import digits
from secateur.errors import InputError, InputTypeError, PatternError, UnknownNameError
from trial_models import agreement, cnn, everything, trained_lstm


def apart():
    """Two layers whose weights differ a hundredfold in scale: ranked together, the first one goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[0].weight.mul_(0.01)
    return model


def least(model):
    """The smallest share of weights that a layer keeps."""
    return min(float((layer.weight != 0).double().mean()) for layer in model)


def test_the_best_is_taken_and_prunes():
    model = apart()
    before = everything(model)
    choice = sc.choose_allocation(model, least, 0.5, progress=True)
    assert everything(model) == before
    assert choice.best == "uniform"
    assert list(choice.metrics) == ["global", "uniform", "erk", "lamp"]
    assert choice.metrics["uniform"] == 0.5
    assert choice.metrics["global"] < 0.02
    assert choice.at_stake == 0.5 - min(choice.metrics.values())
    assert (choice.dense, choice.sparsity) == (1.0, 0.5)
    masks = sc.prune(model, 0.5, allocation=choice)
    assert masks.counts() == {"0.weight": 200, "1.weight": 200}


def test_a_pruner_takes_it_and_goes_on():
    model = apart()
    choice = pickle.loads(pickle.dumps(sc.choose_allocation(model, least, sc.Count(400))))
    schedule = sc.linear(start=0, stop=4)
    pruner = sc.Pruner(model, 0.5, schedule=schedule, allocation=choice)
    for _ in range(2):
        pruner.step()
    again = sc.Pruner(model, 0.5, schedule=schedule, allocation="uniform")
    again.load_state_dict(pruner.state_dict())
    for _ in range(2):
        again.step()
    assert again.finish().counts() == {"0.weight": 200, "1.weight": 200}


def test_what_it_prints():
    choice = Choice(best="erk", sparsity=0.8, dense=0.97, metrics={"global": 0.31, "erk": 0.9})
    lines = str(choice).splitlines()
    assert lines[0] == "At sparsity 0.8; the model as it is has a metric of 0.97"
    assert lines[-2].split() == ["erk", "0.9", "0.07"]
    assert lines[-1] == "best: erk; global in its place would cost 0.59"
    assert json.loads(json.dumps(choice.to_dict()))["at_stake"] == pytest.approx(0.59)


def test_with_a_scan():
    model = apart()
    scan = sc.scan(model, least, (0.5, 0.9))
    choice = sc.choose_allocation(model, least, 0.7, scan=scan)
    assert list(choice.metrics)[-1] == "sensitivity"
    first = Choice(**vars(scan.allocation()), best="sensitivity", sparsity=0.7, dense=1.0, metrics={"sensitivity": 1})
    assert sc.prune(model, 0.7, allocation=pickle.loads(pickle.dumps(first))).pruned == 560
    assert sc.recommend(model, lambda model: 1, allocation=scan.allocation()).tried[0][1] == "sensitivity"


def test_every_named_allocation_that_needs_no_more():
    @sc.allocation.allocation("all_in_the_second")
    def mine(weights, count):
        return {"0.weight": 0, "1.weight": count}

    sc.allocation.ALLOCATIONS.add("more", Allocation, call="more(data)")
    choice = sc.choose_allocation(apart(), lambda model: (model[0].weight != 0).sum(), 0.4)
    assert choice.best == "all_in_the_second"
    assert "more" not in choice.metrics


def test_the_choices_of_prune():
    model = cnn()
    scope = sc.weights(model, only="4")
    choice = sc.choose_allocation(model, agreement, 0.5, score="random", pattern="rows", scope=scope)
    sc.prune(model, 0.5, score="random", pattern="rows", scope=scope, allocation=choice)
    assert choice.metrics[choice.best] == float(agreement(model))


def test_units():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    pattern = sc.units(model, torch.ones(2, 8))
    choice = sc.choose_allocation(model, lambda model: model[2].weight.norm(), 0.5, pattern=pattern)
    masks = sc.prune(model, choice.sparsity, pattern=pattern, allocation=choice)
    assert choice.sparsity == 0.5 == float(sum(masks.counts().values())) / masks.size
    assert sc.recommend(model, lambda model: model[2].weight.norm(), 0, pattern=pattern).sparsity >= 0.49


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"evaluate": None}, InputTypeError, "evaluate is None: give a function"),
        ({"sparsity": {"0.weight": 0.5}}, InputError, "give one for all of them"),
        ({"sparsity": 1.5}, InputError, r"0.0 <= sparsity <= 1.0"),
        ({"scan": "scan.json"}, InputTypeError, "scan is 'scan.json': give what sc.scan returned"),
        ({"progress": None}, InputTypeError, "progress is None: give True or False"),
        ({"evaluate": lambda model: math.nan}, InputError, "for the model as it is: let it return a finite number"),
        (
            {"evaluate": lambda model: math.nan if least(model) < 0.1 else 1},
            InputError,
            "for allocation 'global' at sparsity 0.5: let it return a finite number",
        ),
    ],
)
def test_what_is_refused(wrong, error, said):
    model = apart()
    before = everything(model)
    with pytest.raises(error, match=said):
        sc.choose_allocation(model, **{"evaluate": least, "sparsity": 0.5} | wrong)
    assert everything(model) == before


def test_a_scan_of_another_model():
    scan = sc.scan(cnn(), agreement, [0.5])
    with pytest.raises((UnknownNameError, InputError), match=r"scan is of another model: .*; scan yours"):
        sc.choose_allocation(apart(), least, 0.5, scan=scan)


def test_the_highest_sparsity_within_a_loss():
    model = apart()
    before = everything(model)
    found = sc.recommend(model, least, 0.625, allocation="uniform", progress=True)
    assert everything(model) == before
    assert (found.sparsity, found.allocation, found.dense) == (0.62, "uniform", 1.0)
    assert found.evaluations == 7
    assert found.metric == pytest.approx(0.38)
    assert sc.recommend(model, least, 0.625, allocation=found.allocation) == found


def test_all_allocations_are_tried():
    model = apart()
    found = sc.recommend(model, least, 0.625)
    assert found.sparsity >= 0.62
    assert found.metric >= found.dense - 0.625
    assert found.evaluations <= 29
    sc.prune(model, found.sparsity, allocation=found.allocation)
    assert least(model) == found.metric


def test_it_takes_a_choice():
    model = apart()
    choice = sc.choose_allocation(model, least, 0.5)
    found = sc.recommend(model, least, 0.3, allocation=choice)
    assert found.sparsity == 0.3
    assert found.allocation is choice
    assert {name for _, name, _ in found.tried} == {"uniform"}
    assert sc.prune(model, found.sparsity, allocation=found.allocation).pruned == 240


def test_what_it_says():
    found = sc.recommend(apart(), least, 0.25, allocation=lambda weights, count: dict.fromkeys(weights, count // 2))
    lines = str(found).splitlines()
    assert lines[0] == "The model as it is has a metric of 1, which may fall by 0.25"
    assert lines[-1] == "highest within that: 0.25 with <lambda>, after 7 evaluations"
    assert [float(line.split()[0]) for line in lines[3:-1]] == sorted(one[0] for one in found.tried)
    assert json.loads(json.dumps(found.to_dict()))["evaluations"] == 7


@pytest.mark.parametrize(
    ("given", "most"), [({"allocation": sc.allocation.global_(min_keep=0.3)}, 0.7), ({"pattern": "rows"}, 0.95)]
)
def test_what_is_out_of_reach_is_not_recommended(given, most):
    model = apart()
    found = sc.recommend(model, lambda model: 1.0, **given)
    assert found.sparsity == most
    masks = sc.prune(model, found.sparsity, **{"allocation": found.allocation} | given)
    assert masks.pruned == round(800 * most)


def test_where_nothing_can_go_and_where_all_can():
    nothing = sc.recommend(apart(), least, 0.0, allocation="uniform")
    assert (nothing.sparsity, nothing.metric) == (0.0, 1.0)
    assert sc.recommend(apart(), lambda model: 1, 0).sparsity == 0.99


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"evaluate": "accuracy"}, InputTypeError, "evaluate is 'accuracy': give a function"),
        ({"tolerance": -0.1}, InputError, "give how far the metric may fall, 0 or more"),
        ({"tolerance": math.nan}, InputError, "give how far the metric may fall, 0 or more"),
        ({"tolerance": "1 %"}, InputTypeError, "give how far the metric may fall"),
        ({"allocation": "best"}, InputError, "choose global, uniform"),
        ({"allocation": 3}, InputTypeError, "give a name or a function"),
        ({"pattern": "2:4"}, PatternError, "has one sparsity, 0.5: evaluate the model there"),
        ({"progress": 0}, InputTypeError, "give True or False"),
        ({"evaluate": lambda model: None}, InputTypeError, "for the model as it is: let it return one number"),
    ],
)
def test_what_is_not_recommended(wrong, error, said):
    model = apart()
    before = everything(model)
    with pytest.raises(error, match=said):
        sc.recommend(model, **{"evaluate": least} | wrong)
    assert everything(model) == before


def test_a_trained_lstm():
    with digits.alone(0):
        model, metric = trained_lstm()
        dense = metric(model)
        choice = sc.choose_allocation(model, metric, 0.7)
        found = sc.recommend(model, metric, 0.02, allocation=choice)
        sc.prune(model, found.sparsity, allocation=found.allocation)
        assert metric(model) == found.metric >= dense - 0.02
    assert found.sparsity > 0.2


def test_a_metric_that_all_share():
    choice = sc.choose_allocation(apart(), lambda model: 1.0, 0.5)
    assert (
        str(choice).splitlines()[-1] == "all have the same metric, so that none is better; global is the first of them"
    )
