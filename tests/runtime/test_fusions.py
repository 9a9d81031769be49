"""secateur.runtime.fusions: what of a model could be one call, put in place and taken away."""

import torch
from torch import nn

from secateur.runtime import products
from secateur.runtime.chains import Chain
from secateur.runtime.fusions import Fusions
from sparse_models import off, sparse, thin


def model():
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8), nn.Softmax(1), nn.Linear(8, 8))
    return sparse(thin(nn.ModuleDict({"convolutions": convolutions, "head": head})))


def test_without_the_library_there_is_nothing(without_native):
    assert list(Fusions(model()).find()) == []


def test_a_run_is_found_by_where_it_is_and_comes_and_goes(isa):
    given = model()
    fusions = Fusions(given)
    plans = {plan.name: plan for plan in fusions.find()}
    assert [name for name in plans if "head" in name] == [*fusions.runs] == ["head[0:3]"]
    assert plans["head[0:3]"].shape == (32, 16, 8)
    head, x = given["head"], torch.randn(4, 32)
    assert fusions.ids(["head[0:3]"]) == {id(module) for module in head[:3]}
    with torch.inference_mode():
        before = head(x)
        found = fusions.fuse({"head[0:3]": products.ALL})
        assert isinstance(found["head[0:3]"], Chain)
        assert type(head).__name__ == "SparseSequential"
        assert off(head(x), before) <= 1e-5
        assert fusions.fuse({}) == {}
    assert type(head) is nn.Sequential


def test_a_network_is_found_and_comes_and_goes(isa):
    given = model()
    fusions = Fusions(given)
    plans = {plan.name: plan for plan in fusions.find()}
    (name,) = fusions.networks
    assert plans[name].kind == "network of 2 convolutions"
    assert fusions.runs_in([name]) == []  # the run is in another module
    layers = [module for module in given.modules() if isinstance(module, nn.Conv2d)]
    assert fusions.ids([name]) == set(map(id, layers))
    assert set(fusions.install({name: products.ALL})) == {name}
    assert type(given["convolutions"]) is not nn.Sequential
    assert fusions.install({}) == {}
    assert type(given["convolutions"]) is nn.Sequential
