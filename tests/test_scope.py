"""secateur.scope: which tensors are pruned, and why the others are not."""

import warnings

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.anatomy import Layout
from secateur.errors import InputError, InputTypeError, UnknownNameError
from secateur.scope import unwrap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 4, padding_idx=2)
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3)
        self.cell = nn.GRUCell(4, 5)
        self.conv = nn.Conv2d(3, 4, 3)
        self.turned = nn.ConvTranspose1d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.batch = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
        self.joint = nn.MultiheadAttention(4, 2)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.head = nn.Linear(4, 2)
        self.own = nn.Parameter(torch.randn(3, 3))
        self.scale = nn.Parameter(torch.ones(()))


DEFAULT = [
    *(f"lstm.weight_{k}_l{i}{r}" for i in (0, 1) for r in ("", "_reverse") for k in ("ih", "hh", "hr")),
    "cell.weight_ih",
    "cell.weight_hh",
    "conv.weight",
    "turned.weight",
    *(f"attention.{k}_proj_weight" for k in "qkv"),
    "attention.out_proj.weight",
    "joint.in_proj_weight",
    "joint.out_proj.weight",
    "bilinear.weight",
    "head.weight",
]


def test_the_default():
    model = Net()
    scope = sc.weights(model)
    assert list(scope) == DEFAULT
    assert all(scope[name] is model.get_parameter(name) for name in scope)
    assert scope.size == sum(p.numel() for p in scope.values())
    assert len(scope) == len(DEFAULT)


def test_everything_is_in_or_left_out_with_a_reason():
    scope = sc.weights(Net())
    names = [name for name, _ in Net().named_parameters()]
    assert sorted([*scope, *scope.left_out]) == sorted(names)
    assert "Embedding is not pruned by default" in scope.left_out["words.weight"]
    assert "LayerNorm" in scope.left_out["norm.weight"]
    assert "bias" in scope.left_out["head.bias"]
    assert "bias" in scope.left_out["attention.bias_k"] or "not pruned" in scope.left_out["attention.bias_k"]
    assert "Net is not pruned by default" in scope.left_out["own"]
    text = str(scope)
    assert all(name in text for name in names)
    assert f"{scope.size:,} weights in scope" in text


@pytest.mark.parametrize(
    ("only", "want"),
    [
        ("conv", ["conv.weight"]),
        ("conv.*", ["conv.weight"]),
        ("head*", ["head.weight"]),
        (["head", "own"], ["head.weight", "own"]),
        ("*.weight_ih*", [n for n in DEFAULT if "weight_ih" in n]),
        ("lstm.weight_h?_l1", ["lstm.weight_hh_l1", "lstm.weight_hr_l1"]),
        (nn.Linear, ["attention.out_proj.weight", "joint.out_proj.weight", "head.weight"]),
        ([nn.Embedding, "own"], ["words.weight", "own"]),
        (nn.Bilinear, ["bilinear.weight"]),
        (nn.RNNCellBase, ["cell.weight_ih", "cell.weight_hh"]),
        ("head.bias", ["head.bias"]),
        (["norm.weight", "head"], ["norm.weight", "head.weight"]),
        ("scale", ["scale"]),
    ],
    ids=str,
)
def test_only(only, want):
    scope = sc.weights(Net(), only=only)
    assert sorted(scope) == sorted(want)
    assert list(scope) == [n for n, _ in Net().named_parameters() if n in want]
    assert scope.left_out["conv.bias"]


@pytest.mark.parametrize(
    ("skip", "gone"),
    [
        ("lstm", [n for n in DEFAULT if n.startswith("lstm")]),
        (["head", nn.Conv2d], ["head.weight", "conv.weight"]),
        ("*proj*", [n for n in DEFAULT if "proj" in n]),
        (nn.RNNBase, [n for n in DEFAULT if n.startswith("lstm")]),
    ],
    ids=str,
)
def test_skip(skip, gone):
    scope = sc.weights(Net(), skip=skip)
    assert list(scope) == [n for n in DEFAULT if n not in gone]
    assert all(scope.left_out[name] == "skipped" for name in gone)


def test_where_has_the_last_word():
    seen = []

    def large(name, parameter):
        seen.append(name)
        return parameter.numel() > 50

    scope = sc.weights(Net(), where=large)
    assert list(scope) == [n for n in DEFAULT if Net().get_parameter(n).numel() > 50]
    assert scope.left_out["head.weight"] == "where() returned False"
    assert seen == DEFAULT


def test_a_name_that_matches_nothing():
    model = Net()
    for how in ("only", "skip"):
        with pytest.raises(UnknownNameError, match=r"'hed\*' matches no tensor and no module; .*head\.weight"):
            sc.weights(model, **{how: "hed*"})
        with pytest.raises(UnknownNameError, match=r"no Conv3d; it is made of: .*Conv2d"):
            sc.weights(model, **{how: ["head", nn.Conv3d]})
    with pytest.raises(UnknownNameError, match=r"conv.weight"):
        sc.weights(model, only="Conv.weight")


@pytest.mark.parametrize("bad", [5, [3.0], torch.float32, [nn.Linear(1, 1)], int])
def test_a_selector_of_another_type(bad):
    with pytest.raises(InputTypeError, match="selects nothing: give a glob on names or a module type"):
        sc.weights(Net(), only=bad)


def test_nothing_left():
    with pytest.raises(InputError, match=r"nothing to prune: .* were left out"):
        sc.weights(Net(), skip="*")
    with pytest.raises(InputError, match="the model has no parameters"):
        sc.weights(nn.ReLU())
    with pytest.raises(
        InputError, match=r"nothing to prune: weight: not chosen.*sc\.weights\(model, only=\[\.\.\.\]\)"
    ):
        sc.weights(nn.Linear(2, 2), only="b*")
    with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Module, got dict"):
        sc.weights({})


# tied and shared


def test_a_head_tied_to_an_embedding_stays_dense_unless_it_is_named():
    model = nn.ModuleDict({"words": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False), "body": nn.Linear(4, 4)})
    model["head"].weight = model["words"].weight
    scope = sc.weights(model)
    assert list(scope) == ["body.weight"]
    assert scope.left_out["words.weight"] == "Embedding, tied to head.weight, is not pruned by default"
    for selector in ("head", "words", nn.Embedding, "head.weight"):
        chosen = sc.weights(model, only=selector)
        assert list(chosen) == ["words.weight"]
        assert chosen.size == 28
        assert chosen.members["words.weight"].aliases == ("head.weight",)
        assert "tied to head.weight" in str(chosen)
        assert list(sc.weights(model, also=selector)) == ["words.weight", "body.weight"]
        with pytest.raises(InputError, match=r"nothing to prune.*sc\.weights\(model, only=\[\.\.\.\]\)"):
            sc.weights(model, only=["words", "head"], skip=selector)


def test_a_tied_padding_row_is_protected_whichever_name_comes_first():
    for first in ("words", "head"):
        modules = {"words": nn.Embedding(7, 4, padding_idx=3), "head": nn.Linear(4, 7, bias=False)}
        modules["head"].weight = modules["words"].weight
        model = nn.ModuleDict(sorted(modules.items(), key=lambda item: item[0] != first))
        scope = sc.weights(model, only="head")
        assert list(scope) == [f"{first}.weight"]
        assert scope.size == 24


def test_a_shared_module_counts_once():
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    scope = sc.weights(model)
    assert list(scope) == ["0.weight"]
    assert scope.members["0.weight"].aliases == ("2.weight",)
    assert sc.prune(model, 0.4).pruned == 10
    with pytest.raises(InputError, match="skip"):
        sc.weights(model, skip="2")


# padding


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("row", [0, 4, -1])
def test_the_padding_row_is_no_weight(kind, row):
    model = kind(10, 4, padding_idx=row)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 41.0).view(10, 4))
    scope = sc.weights(model, only=kind)
    member = scope.members["weight"]
    assert (scope.size, member.free) == (36, 36)
    start = row % 10 * 4
    assert member.protected == range(start, start + 4)
    assert f"row {row % 10} is padding" in str(scope)
    mask = sc.prune(model, 0.5, scope=scope)["weight"]
    assert mask[row].all()
    assert int((~mask).sum()) == 18


def test_an_embedding_without_padding():
    scope = sc.weights(nn.Embedding(10, 4), only=nn.Embedding)
    assert scope.size == 40
    assert scope.members["weight"].protected == range(0)


# dimensions


def test_layouts():
    members = sc.weights(Net()).members
    assert {name: m.layout for name, m in members.items() if not m.layout.identity} == {
        "turned.weight": Layout("gio", 1),
        "bilinear.weight": Layout("oii"),
    }


# what cannot be pruned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_dtypes_that_can(dtype):
    assert sc.weights(nn.Linear(2, 2, dtype=dtype)).size == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_that_cannot(dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
    with pytest.raises(InputTypeError, match=r"1\.weight is torch\..*skip=\['1\.weight'\]"):
        sc.weights(model)
    assert list(sc.weights(model, skip=["1.weight"])) == ["0.weight"]


def test_meta_and_lazy():
    with pytest.raises(InputError, match=r"weight is on the meta device.*to_empty"):
        sc.weights(nn.Linear(2, 2, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"1\.weight is lazy: run one batch"):
        sc.weights(model)
    assert list(sc.weights(model, skip="1")) == ["0.weight"]
    model(torch.ones(1, 2))
    assert len(sc.weights(model)) == 2


# wrappers


def plain():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "twice": lambda m: nn.DataParallel(torch.compile(m)),
    "compiled average": lambda m: torch.compile(torch.optim.swa_utils.AveragedModel(m)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when torch.compile is first imported
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrappers_are_looked_through(kind):
    wrapped = WRAPPERS[kind](plain())
    assert list(sc.weights(wrapped)) == ["0.weight", "2.weight"]
    assert type(unwrap(wrapped)) is nn.Sequential
    masks = sc.prune(wrapped, 0.5)
    assert list(masks) == ["0.weight", "2.weight"]
    assert sc.check(wrapped, masks) == sc.check(unwrap(wrapped), masks) == {}
    assert sc.report(wrapped, masks).got == 0.5


def test_a_module_that_is_called_module_is_no_wrapper():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert list(sc.weights(model)) == ["module.weight", "other.weight"]


def test_frozen_weights_can_be_pruned():
    model = plain()
    model[0].weight.requires_grad_(False)
    sc.prune(model, 0.5)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_assigned_parameters_are_seen():
    model = plain()
    scope = sc.weights(model)
    model.load_state_dict({n: v.clone() for n, v in plain().state_dict().items()}, assign=True)
    assert scope["0.weight"] is model[0].weight


def test_a_long_table_sums_up_what_differs_only_in_numbers():
    blocks = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 3)}) for _ in range(31))})
    lines = str(sc.weights(blocks)).splitlines()
    assert lines[2].split() == ["layers.*.fc.weight", "in", "372", "31", "x", "Linear"]
    assert lines[3].split() == ["(others)", "out", "31", "x", "a", "bias,", "or", "one-dimensional"]
    assert lines[4].startswith("372 weights in scope, 80.00 % of the 465 parameters")


def test_one_thing_is_counted_in_the_singular():
    assert repr(sc.weights(nn.Linear(4, 3))) == "Scope(1 tensor, 12 weights; 1 tensor left out)"
