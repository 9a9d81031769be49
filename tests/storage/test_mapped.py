"""A model without values computes as the one that was saved, and has none again afterwards."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.errors import InputError
from secateur.storage.checkpoints import opened
from secateur.storage.mapped import mapped


class Rotary(nn.Module):
    def __init__(self, width, base=100.0):
        super().__init__()
        self.width, self.base = width, base
        self.register_buffer("angles", base ** -torch.arange(0.0, width), persistent=False)

    def forward(self, x):
        return x * self.angles.cos()


class Model(nn.Module):
    base_model_prefix = "inner"

    def __init__(self, rotary=Rotary):
        super().__init__()
        self.embed, self.rotary, self.norm = nn.Embedding(9, 4), rotary(4), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.rotary(self.embed(x))))


def made(*args):
    torch.manual_seed(0)
    model = Model(*args).eval()
    model.norm.running_mean += 1
    return model


def empty(*args):
    with torch.device("meta"):
        return Model(*args).eval()


X = torch.arange(9)


@pytest.mark.parametrize("prefix", ["", "inner."])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_it_computes_as_the_saved_one(tmp_path, prefix, suffix):
    model, meta = made(), empty()
    state = {prefix + name: t.clone() for name, t in model.state_dict().items() if name != "out.weight"}
    path = tmp_path / f"model.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    places = [(id(p), name) for name, p in meta.named_parameters()]
    random = torch.get_rng_state()
    with mapped(meta, opened(path)) as plain:
        assert plain is meta
        assert meta.out.weight is meta.embed.weight
        assert torch.equal(meta(X), model(X))
        sc.weights(meta, also="embed")
    assert torch.equal(torch.get_rng_state(), random)
    assert [(id(p), name) for name, p in meta.named_parameters()] == places
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))


def test_what_is_written_never_reaches_the_file(tmp_path):
    save_file({name: t.clone() for name, t in made().state_dict().items()}, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    with mapped(empty(), opened(tmp_path / "m.safetensors")) as model, torch.no_grad():
        model.embed.weight.zero_()
    assert (tmp_path / "m.safetensors").read_bytes() == before


class Strange(nn.Module):
    def __init__(self, width, secret=2.0):
        super().__init__()
        self.register_buffer("angles", torch.ones(width) * secret, persistent=False)

    forward = Rotary.forward


class Known(Model):
    """As a model of transformers, which fills such buffers after loading."""

    def _init_weights(self, module):
        if isinstance(module, Strange):
            module.angles.fill_(2.0)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)


def test_buffers_that_no_file_holds(tmp_path):
    save_file({name: t.clone() for name, t in made().state_dict().items()}, tmp_path / "m.safetensors")
    checkpoint = opened(tmp_path / "m.safetensors")
    with (
        pytest.raises(InputError, match=r"rotary: its buffers angles .* set them to their values first"),
        mapped(empty(Strange), checkpoint),
    ):
        pass
    meta = empty(Strange)
    meta.rotary.angles = torch.ones(4) * 2
    with mapped(meta, checkpoint):
        assert torch.equal(meta(X), made(Strange)(X))
    with torch.device("meta"):
        known = Known(Strange).eval()
    with mapped(known, checkpoint):
        assert torch.equal(known(X), made(Strange)(X))


def test_another_checkpoint_is_refused(tmp_path):
    state = {name: t.clone() for name, t in made().state_dict().items()}
    save_file({**state, "norm.weight": torch.ones(5)}, tmp_path / "shape.safetensors")
    del state["norm.weight"]
    save_file(state, tmp_path / "lacks.safetensors")
    sc.save(made(), tmp_path / "packed.safetensors")
    for name, words in (
        ("shape", r"norm.weight has shape \(5,\).*: give the checkpoint of this model"),
        ("lacks", "lacks norm.weight: give the checkpoint of this model"),
        ("packed", "is packed.*: unpack it first"),
    ):
        meta = empty()
        with pytest.raises(InputError, match=words), mapped(meta, opened(tmp_path / f"{name}.safetensors")):
            pass
        assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    with pytest.raises(InputError, match="has values already: make the model under"), mapped(made(), None):
        pass
