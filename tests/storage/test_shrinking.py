"""secateur.storage.shrinking: what a plan cuts from a state in memory, from files that are never touched."""

import pytest
import torch
from checkpoint_files import same, shards, state_of
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import InputError, InputTypeError, MaskError
from secateur.storage import pack, shrink_checkpoint
from secateur.structure import Plan, propose, shrink

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def made(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8, **options),
        nn.BatchNorm1d(8, **options),
        nn.ReLU(),
        nn.Linear(8, 2, **options),
    ).eval()


@pytest.fixture
def plan():
    return propose(made(), X, 0.5)


@pytest.mark.parametrize("kind", ["safetensors", "packed", "torch"])
def test_a_file_is_what_the_state_in_memory_is(plan, tmp_path, kind):
    state = made().state_dict()
    src, dst = tmp_path / ("full.pt" if kind == "torch" else "full.safetensors"), tmp_path / "small.safetensors"
    (torch.save if kind == "torch" else save_file)(state, src)
    if kind == "packed":
        pack(src, tmp_path / "full.packed.safetensors")
        src = tmp_path / "full.packed.safetensors"
    before = state_of(src)
    done = shrink_checkpoint(src, dst, plan)
    same(load_file(dst), plan.apply_state_dict(state))
    assert sum(t.weights for t in done.tensors) == sum(t.numel() for t in load_file(dst).values())
    assert state_of(src) == before


def test_a_folder_of_shards(plan, tmp_path):
    state = made().state_dict()
    first = {name: t for name, t in state.items() if name.startswith("0")}
    src = shards(tmp_path / "full", first, {name: t for name, t in state.items() if name not in first})
    (src / "tokenizer.json").write_text("{}")
    shrink_checkpoint(src, tmp_path / "small", plan)
    found = {name: t for file in (tmp_path / "small").glob("*.safetensors") for name, t in load_file(file).items()}
    same(found, plan.apply_state_dict(state))
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "{}"


def test_no_model_with_all_its_weights_is_needed(tmp_path):
    save_file(made().state_dict(), tmp_path / "full.safetensors")
    model = made(device="meta")
    plan = propose(model, X, 0.5, score="random", verify=False)
    shrink_checkpoint(tmp_path / "full.safetensors", tmp_path / "small.safetensors", plan)
    plan.apply(model)
    model.load_state_dict(load_file(tmp_path / "small.safetensors"), assign=True)
    assert model[0].out_features == 4
    assert torch.equal(model(X), shrink(made(), X, plan=plan)(X))


def test_a_file_of_another_model_is_refused_before_anything_is_written(plan, tmp_path):
    save_file({"0.weight": torch.zeros(8, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(MaskError, match=r"there is no 0\.bias: apply the plan to a copy of the model"):
        shrink_checkpoint(tmp_path / "other.safetensors", tmp_path / "small.safetensors", plan)
    save_file(plan.apply_state_dict(made().state_dict()), tmp_path / "cut.safetensors")
    with pytest.raises(MaskError, match="before anything is cut from it"):
        shrink_checkpoint(tmp_path / "cut.safetensors", tmp_path / "small.safetensors", plan)
    with pytest.raises(InputTypeError, match=r"give what structure\.propose returned"):
        shrink_checkpoint(tmp_path / "cut.safetensors", tmp_path / "small.safetensors", plan.to_json())
    with pytest.raises(InputError, match="no such file"):
        shrink_checkpoint(tmp_path / "none.safetensors", tmp_path / "small.safetensors", plan)
    assert not (tmp_path / "small.safetensors").exists()


def test_numbers_that_are_added_and_multiplied(tmp_path):
    model = made()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].bias[:3] = torch.tensor([1.0, 2.0, -1.0])
    plan = Plan.from_json(propose(model, X).to_json())
    assert plan.shifts
    save_file(model.state_dict(), tmp_path / "full.safetensors")
    shrink_checkpoint(tmp_path / "full.safetensors", tmp_path / "small.safetensors", plan)
    same(load_file(tmp_path / "small.safetensors"), shrink(model, X).state_dict())
    model[1].bias.data[0] += 1
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    with pytest.raises(InputError, match="folds constants of dead units"):
        shrink_checkpoint(tmp_path / "trained.safetensors", tmp_path / "other.safetensors", plan)
    assert not (tmp_path / "other.safetensors").exists()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


def test_blocks_that_go_and_those_that_move_up(tmp_path):
    model = nn.Sequential(*(Residual() for _ in range(4)))
    plan = propose(model, X, depth=0.5)
    save_file(model.state_dict(), tmp_path / "full.safetensors")
    shrink_checkpoint(tmp_path / "full.safetensors", tmp_path / "small.safetensors", plan)
    found = load_file(tmp_path / "small.safetensors")
    assert {*found} == {"0.inner.weight", "0.inner.bias", "1.inner.weight", "1.inner.bias"}
    same(found, plan.apply_state_dict(model.state_dict()))
    with pytest.raises(MaskError, match=r"there is no .*: apply it to a copy"):
        shrink_checkpoint(tmp_path / "small.safetensors", tmp_path / "smaller.safetensors", plan)
    state = model.state_dict()
    src = shards(tmp_path / "folder", *({n: t for n, t in state.items() if n[0] in part} for part in ("01", "23")))
    shrink_checkpoint(src, tmp_path / "smaller", plan)
    parts = {name: t for file in (tmp_path / "smaller").glob("*.safetensors") for name, t in load_file(file).items()}
    same(parts, found)
