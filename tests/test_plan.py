"""secateur.plan: what was asked, checked against the model, turned into masks."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur import plan
from secateur.errors import InputError, InputTypeError, SecateurError, SecateurWarning, UnknownNameError
from secateur.plan import Share


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def make(model, sparsity, **options):
    settled = {"score": "magnitude", "allocation": "global", "pattern": None, "scope": None}
    return plan.make(model, sparsity, **{**settled, **options})


@given(st.integers(1, 2000), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_exactly_floor_of_s_n_and_a_half(size, parts):
    model = nn.utils.skip_init(nn.Linear, size, 1, bias=False)
    model.weight.data.fill_(1)
    sparsity = float(f"{parts / 10_000:.4f}")
    want = (2 * parts * size + 10_000) // 20_000
    assert sc.prune(model, sparsity, allocation=sc.allocation.global_(allow_empty=True)).pruned == want
    assert int((model.weight == 0).sum()) == want
    assert (model.weight.flatten()[want:] == 1).all()  # ties: the first go


@pytest.mark.parametrize(("size", "want"), [(5, 3), (7, 4), (3, 2), (2, 1)])
def test_halves_go_up(size, want):
    assert sc.prune(nn.Linear(size, 1, bias=False), 0.5).pruned == want


def test_a_share_counts_on_the_way():
    share = Share(("w",), Fraction(9, 10), Fraction(45))
    assert [share.count(Fraction(s, 10)) for s in range(11)] == [0, 5, 9, 14, 18, 23, 27, 32, 36, 41, 45]


def test_planning_changes_nothing():
    model = net()
    versions = [p._version for p in model.parameters()]
    chosen = make(model, 0.5)
    assert chosen.counts() == (25,)
    assert chosen.counts(lambda final: final / 2) == (13,)
    masks = chosen.masks((10,))
    assert masks.pruned == 10
    assert [p._version for p in model.parameters()] == versions


def test_settings_are_plain_data_that_tell_plans_apart(tmp_path):
    options = [
        {"sparsity": 0.5},
        {"sparsity": 0.6},
        {"sparsity": {"0.weight": 0.5}},
        {"sparsity": sc.Count(24)},
        {"sparsity": 0.5, "score": "random"},
        {"sparsity": 0.5, "score": "taylor"},
        {"sparsity": 0.5, "allocation": "uniform"},
        {"sparsity": 0.5, "allocation": sc.allocation.uniform(min_keep=3)},
        {"sparsity": 0.5, "allocation": sc.allocation.uniform(allow_empty=True)},
        {"sparsity": 0.5, "allocation": lambda weights, count: {}},
        {"sparsity": 0.5, "pattern": "rows"},
        {"sparsity": 0.5, "pattern": sc.n_m(1, 2, tail="keep")},
    ]
    found = [make(net(), **each).settings() for each in options]
    assert all(found.count(settings) == 1 for settings in found)
    assert found == [make(net(), **each).settings() for each in options]
    torch.save(found, tmp_path / "settings.pt")
    assert torch.load(tmp_path / "settings.pt", weights_only=True) == found


def test_held_weights_stay_pruned():
    model = net()
    chosen = make(model, 0.5)
    first = chosen.masks((10,))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape))
    second = chosen.masks((25,), first)
    assert second.pruned == 25
    assert second & first == second
    assert chosen.masks((10,), first) == first


@given(st.integers(0, 100), st.lists(st.integers(0, 48), min_size=1, max_size=4), st.sampled_from(["uniform", "lamp"]))
@settings(deadline=None, max_examples=40)
def test_held_and_shared(seed, counts, allocation):
    model, held = net(seed), None
    chosen = make(model, 0.9, allocation=allocation)
    for count in sorted(counts):
        torch.manual_seed(count)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape))
        masks = chosen.masks((count,), held)
        assert masks.pruned == count
        assert held is None or masks & held == masks
        assert all(mask.any() for mask in masks.values())
        held = masks


def test_global_over_mixed_dtypes_and_layouts():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "fp16": nn.Linear(6, 6).half(),
            "bf16": nn.Linear(6, 6).bfloat16(),
            "fp64": nn.Linear(6, 6).double(),
            "cplx": nn.Linear(6, 6, dtype=torch.complex64),
            "last": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        }
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, dtype=weight.dtype))
    flat = torch.cat([w.detach().abs().double().flatten() for w in sc.weights(model).values()])
    count = math.floor(0.7 * len(flat) + 0.5)
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.sort(stable=True).indices[:count]] = False
    strides = [p.stride() for p in model.parameters()]
    masks = sc.prune(model, 0.7)
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), kept)
    assert [p.stride() for p in model.parameters()] == strides
    assert model["fp16"].weight.dtype == torch.float16
    assert sc.check(model, masks) == {}


BAD = {
    "int": ({"sparsity": 1}, r"or sc\.Count\(1\)"),
    "bool": ({"sparsity": True}, r"such as 0\.9"),
    "str": ({"sparsity": "0.9"}, r"such as 0\.9"),
    "nan": ({"sparsity": math.nan}, r"such as 0\.9"),
    "below": ({"sparsity": -0.1}, r"such as 0\.9"),
    "above": ({"sparsity": 1.1}, r"such as 0\.9"),
    "all": ({"sparsity": 1.0}, r"ask for less"),
    "count": ({"sparsity": sc.Count(51)}, r"ask for fewer"),
    "glob": ({"sparsity": {"conv*": 0.5}}, r"names are"),
    "glob value": ({"sparsity": {"0*": 0.5, "2*": 2.0}}, r"write 0\.02"),
    "score": ({"sparsity": 0.5, "score": "size"}, r"choose magnitude"),
    "score shape": ({"sparsity": 0.5, "score": lambda n, w: w.sum()}, r"must be"),
    "late score": ({"sparsity": 0.5, "score": {"0.weight": torch.ones(5, 7)}}, r"names are"),
    "gradient score": ({"sparsity": 0.5, "score": "taylor"}, r"sc\.accumulate"),
    "allocation": ({"sparsity": 0.5, "allocation": "fair"}, r"choose global"),
    "allocation function": ({"sparsity": 0.5, "allocation": lambda w, n: {}}, r"it must give"),
    "pattern": ({"sparsity": 0.5, "pattern": sc.n_m(2, 4)}, r"tail='keep'"),
    "pattern name": ({"sparsity": 0.5, "pattern": "2to4"}, r"choose free"),
    "scope": ({"sparsity": 0.5, "scope": ["0.weight"]}, r"give sc\.weights"),
    "scope name": ({"sparsity": 0.5, "scope": {"9.weight": None}}, r"names are"),
    "scope of another": ({"sparsity": 0.5, "scope": sc.weights(net())}, r"again"),
    "scope of a larger": ({"sparsity": 0.5, "scope": sc.weights(nn.Sequential(*net(), nn.Linear(3, 3)))}, r"again"),
}


@pytest.mark.parametrize("kind", BAD)
def test_errors_come_before_anything_changes(kind):
    model = net()
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    asked, remedy = BAD[kind]
    with pytest.raises(SecateurError, match=remedy):
        sc.prune(model, **asked)
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number(bad):
    model = net()
    with torch.no_grad():
        model[2].weight[1, 2] = bad
    before = model[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"2\.weight holds . NaN and . inf among 15 weights"):
        sc.prune(model, 0.5)
    assert torch.equal(model[0].weight, before)
    sc.prune(model, 0.5, scope=sc.weights(model, only="0"))


def test_a_scope_from_sc_weights_or_a_plain_dict():
    model = net()
    for scope in (sc.weights(model, only="0"), {"0.weight": model[0].weight}):
        assert list(sc.prune(copy.deepcopy(model), 0.5, scope=dict(scope))) == ["0.weight"]
    masks = sc.prune(model, 0.5, scope={"0.bias": model[0].bias, "0.weight": model[0].weight})
    assert set(masks) == {"0.weight", "0.bias"}
    assert masks.pruned == 20


def test_a_scope_of_another_model_or_no_scope():
    with pytest.raises(InputError, match=r"another model: 0\.weight.*call sc\.weights\(model\) again"):
        sc.prune(net(), 0.5, scope=sc.weights(net()))
    with pytest.raises(InputTypeError, match=r"scope is a list: give sc\.weights"):
        sc.prune(net(), 0.5, scope=["0.weight"])
    with pytest.raises(UnknownNameError, match="nearest names are"):
        sc.prune(net(), 0.5, scope={"7.weight": None})


def test_count():
    model = net()
    assert sc.prune(model, sc.Count(0)).pruned == 0
    assert sc.prune(model, sc.Count(1)).pruned == 1
    with pytest.raises(InputError, match=r"Count\(51\) is more than the 50 weights in scope"):
        sc.prune(model, sc.Count(51))


def test_zero_sparsity_prunes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    masks = sc.prune(model, 0.0)
    assert masks.pruned == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_collapse_warns_and_the_remedies_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    again = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.warns(
        SecateurWarning, match=r"0\.weight keeps under 1 % .*allocation erk .*global_\(min_keep=0\.05\)"
    ) as caught:
        masks = sc.prune(model, 0.5)
    assert masks.counts() == {"0.weight": 899, "1.weight": 1}
    assert caught[0].filename == __file__
    sc.prune(again[0], 0.5, allocation="erk")
    masks = sc.prune(again[1], 0.5, allocation=sc.allocation.global_(min_keep=0.01))
    assert masks.counts() == {"0.weight": 891, "1.weight": 9}


def test_a_collapse_in_a_pruner_points_at_the_loop():
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.warns(SecateurWarning, match="keeps under 1 %") as caught:
        sc.Pruner(model, 0.5).step()
    assert caught[0].filename == __file__


def test_a_padding_row_survives_any_score():
    model = nn.Embedding(6, 4, padding_idx=0)
    for score in ("magnitude", "random", {"weight": -torch.ones(6, 4)}):
        m = copy.deepcopy(model)
        masks = sc.prune(m, 0.8, score=score, scope=sc.weights(m, only=nn.Embedding))
        assert masks["weight"][0].all()
        assert masks.pruned == 16
