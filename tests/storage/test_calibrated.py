"""A checkpoint pruned from its files is what pruning the same model in memory gives, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.calibration.by_blocks import Task, prune_by_blocks
from secateur.errors import InputError, SecateurWarning
from secateur.storage.calibrated import oneshot_checkpoint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(3, 6),
            nn.Sequential(*(Block() for _ in range(3))),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        return self.head(self.blocks(self.first(x)))


def made():
    torch.manual_seed(0)
    return Model().eval()


def empty():
    with torch.device("meta"):
        return Model().eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 3, generator=generator) for _ in range(3)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


TASK = Task(0.5)


def test_a_file(tmp_path):
    model, meta = made(), empty()
    save_file({"other": torch.ones(3), **model.state_dict()}, tmp_path / "in.safetensors", metadata={"format": "pt"})
    before = (tmp_path / "in.safetensors").read_bytes()
    masks = oneshot_checkpoint(meta, tmp_path / "in.safetensors", tmp_path / "out.safetensors", data(), TASK)
    assert prune_by_blocks(model, data(), TASK) == masks
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written.pop("other"), torch.ones(3))
    assert same(written, model.state_dict())
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert (tmp_path / "in.safetensors").read_bytes() == before


def test_it_goes_on_in_a_folder(tmp_path):
    model = made()
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    seen = []

    def fails(weights, curvature, select):
        seen.append(weights)
        if len(seen) > 4:
            raise ValueError("enough")
        return sc_magnitude(weights, curvature, select)

    def sc_magnitude(weights, curvature, select):
        kept = select(weights.abs())
        return weights * kept, kept

    fails.__qualname__ = sc_magnitude.__qualname__ = "mine"
    places = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="enough"):
        oneshot_checkpoint(empty(), *places, data(), Task(0.5, solver=fails), folder=tmp_path / "run")
    assert not places[1].exists()
    oneshot_checkpoint(empty(), *places, data(), Task(0.5, solver=sc_magnitude), folder=tmp_path / "run")
    prune_by_blocks(model, data(), Task(0.5, solver=sc_magnitude))
    assert same(load_file(places[1]), model.state_dict())


def test_a_folder_of_hugging_face(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**small, num_hidden_layers=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "in", max_shard_size="30KB")
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 50, (4, 16), generator=generator)} for _ in range(2)]
    with torch.device("meta"):
        meta = LlamaForCausalLM(config).eval()

    def scope(model):
        return sc.weights(model, skip="lm_head")

    masks = oneshot_checkpoint(meta, tmp_path / "in", tmp_path / "out", batches, TASK, scope=scope)
    assert prune_by_blocks(model, batches, TASK, scope=scope(model)) == masks
    written = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same(written.state_dict(), model.state_dict())
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((tmp_path / "in" / index).read_text())


def test_what_cannot_be_done_is_told_before(tmp_path):
    save_file(made().state_dict(), tmp_path / "in.safetensors")
    with pytest.raises(InputError, match=r"first.weight.* make the model under `with torch.device\('meta'\)`"):
        oneshot_checkpoint(made(), tmp_path / "in.safetensors", tmp_path / "out.safetensors", data(), TASK)
    with pytest.raises(InputError, match=r"is the source.*: give another place"):
        oneshot_checkpoint(empty(), tmp_path / "in.safetensors", tmp_path / "in.safetensors", data(), TASK)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_warning_points_at_the_caller(tmp_path):
    save_file(made().state_dict(), tmp_path / "in.safetensors")
    few = [batch[:2] for batch in data()]
    with pytest.warns(SecateurWarning, match="saw fewer samples than inputs") as seen:
        oneshot_checkpoint(empty(), tmp_path / "in.safetensors", tmp_path / "out.safetensors", few, TASK)
    assert {warning.filename for warning in seen} == {__file__}
