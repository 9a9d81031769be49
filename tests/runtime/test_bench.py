"""What `secateur bench` does: the model and the inputs that are spelled, and the trial."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, UnknownNameError
from secateur.runtime.bench import BOUND, input_of, model_of, run

OF_THE_USER = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def sized(width):
    return nn.Linear(width, width)

def words():
    return {"a": 1}

class Family:
    small = staticmethod(mlp)

ready, number = nn.Linear(8, 8), 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module of models, in which the test runs; its name."""
    name = f"of_bench_{tmp_path.name}"  # imported once a process
    (tmp_path / f"{name}.py").write_text(OF_THE_USER)
    (tmp_path / "of_bench_broken.py").write_text("import a_module_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def made(spelled):
    return input_of(spelled, torch.Generator().manual_seed(0))


def test_inputs_are_the_same_each_time_and_as_spelled():
    assert torch.equal(made("1x784"), made("1x784"))
    assert made("1x784").std() == pytest.approx(1, abs=0.1)
    assert (made("2x3:float16").dtype, made("2x3:float16").shape) == (torch.float16, (2, 3))
    assert (made("9x99:int64").min(), made("9x99:int64").max()) == (0, BOUND - 1)
    assert made("9:int32:2").unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spelled", "remedy"),
    [
        ("1,8", "'1,8' is not a shape: give sizes such as 1x784"),
        ("0x8", "is not a shape: give sizes"),
        ("", "is not a shape: give sizes"),
        ("1x8:int64:2:3", "is not a shape: give sizes"),
        ("1x8:long", "has no dtype secateur makes inputs of: choose float32, float64"),
        ("1x8:float32:5", "only whole numbers have one, of 1 or more; give sizes"),
        ("1x8:int64:0", "has no bound.* with a bound too"),
        ("99999999x99999999", "is over a terabyte: give sizes"),
    ],
)
def test_inputs_that_are_spelled_otherwise(spelled, remedy):
    with pytest.raises(InputError, match=remedy):
        made(spelled)


def test_models_are_functions_names_with_dots_or_there(place):
    kinds = [type(model_of(f"{place}:{name}")) for name in ("mlp", "Family.small", "ready")]
    assert kinds == [nn.Sequential, nn.Sequential, nn.Linear]
    assert type(model_of("torch.nn:Identity")) is nn.Identity


@pytest.mark.parametrize(
    ("target", "error", "remedy"),
    [
        ("PLACE", InputError, "is not MODULE:FACTORY: give for example models:build"),
        (":mlp", InputError, "is not MODULE:FACTORY: give for example"),
        ("none_such:mlp", InputError, "no module named 'none_such' here or installed: give MODULE as in `import"),
        ("PLACE.py:mlp", InputError, "without .py, and run this in its folder"),
        (".models:mlp", InputError, "'.models' is not the name of a module: give MODULE as"),
        ("PLACE:mpl", UnknownNameError, "has no mpl; the nearest names are: mlp"),
        ("PLACE:number", InputTypeError, "is an int, not callable: give a function that makes a model"),
        ("PLACE:sized", InputTypeError, "without arguments .*'width'.*: wrap it in a function"),
        ("PLACE:words", InputTypeError, "gave a dict, not an nn.Module: let it return the model"),
        ("of_bench_broken:mlp", ModuleNotFoundError, "a_module_nobody_has"),
    ],
)
def test_models_that_are_not_there(place, target, error, remedy):
    with pytest.raises(error, match=remedy):
        model_of(target.replace("PLACE", place))


def test_a_trial_explains_and_compares(place, tmp_path, sparse_wins):
    model = model_of(f"{place}:mlp")
    sc.prune(model, 0.5)
    save_file(model.state_dict(), tmp_path / "pruned.safetensors")
    found = run(f"{place}:mlp", ["4x8"], checkpoint=tmp_path / "pruned.safetensors", threads=1, seconds=0.01)
    assert found.explanation.sparse[:2] == ("0", "2")
    assert found.comparison.measurements["dense"].nonzeros == 80 + 18
    assert str(found) == f"{found.explanation}\n\n{found.comparison}"
    assert json.loads(json.dumps(found.to_dict())).keys() == {"explanation", "comparison"}


@pytest.mark.parametrize("inputs", [["1x9"], ["1x8:int64"], ["1x8", "1x8"]])
def test_inputs_that_the_model_does_not_take(place, inputs):
    with pytest.raises(InputError, match=r"does not run on inputs .*give an --input of the right shape and dtype"):
        run(f"{place}:mlp", inputs)
