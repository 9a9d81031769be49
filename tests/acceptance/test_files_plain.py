"""What comes out of a packed file is the plain model: anywhere, to the bit, in a file that is really smaller."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import secateur as sc
from models import MODELS, Net, Tagger, build, copies, example, k, same, zeros
from secateur.storage.checkpoints import inspect


def pruned(kind, sparsity=0.9):
    model = build(kind).eval()
    sc.prune(model, sparsity)
    return model


def reloaded(model, kind, file, **how):
    """The same through a file, in another object."""
    sc.save(model, file, **how)
    fresh = build(kind, seed=1).eval()
    sc.load(file, into=fresh)
    return fresh


def test_a05_a_model_from_a_packed_file_pickles(tmp_path, elsewhere):
    for kind in MODELS:
        model = reloaded(pruned(kind), kind, tmp_path / "m.safetensors")
        assert b"secateur" not in ForkingPickler.dumps(model).tobytes()
        (tmp_path / f"{kind.__name__}.pkl").write_bytes(pickle.dumps(model))
        torch.save({"x": example(model), "y": model(example(model))}, tmp_path / f"{kind.__name__}.pt")
    elsewhere(
        "import pickle, torch, models\n"
        "for kind in models.MODELS:\n"
        "    expected = torch.load(f'{kind.__name__}.pt')\n"
        "    with open(f'{kind.__name__}.pkl', 'rb') as file:\n"
        "        model = pickle.load(file)\n"
        "    assert type(model) is kind\n"
        "    assert torch.equal(model(expected['x']), expected['y'])\n"
    )


def test_a06_an_unpacked_file_and_a_saved_state_load_where_the_library_is_not(tmp_path, elsewhere):
    for kind in MODELS:
        model, name = pruned(kind), kind.__name__
        sc.save(model, tmp_path / f"{name}.packed.safetensors")
        sc.unpack(tmp_path / f"{name}.packed.safetensors", tmp_path / f"{name}.safetensors")
        torch.save(sc.load(tmp_path / f"{name}.packed.safetensors"), tmp_path / f"{name}.state")
        torch.save({"x": example(model), "y": model(example(model))}, tmp_path / f"{name}.expected")
    elsewhere(
        "import torch, models\n"
        "from safetensors.torch import load_file\n"
        "for kind in models.MODELS:\n"
        "    expected = torch.load(f'{kind.__name__}.expected', weights_only=True)\n"
        "    unpacked = load_file(f'{kind.__name__}.safetensors')\n"
        "    for state in (unpacked, torch.load(f'{kind.__name__}.state', weights_only=True)):\n"
        "        model = kind().eval()\n"
        "        model.load_state_dict(state, strict=True)\n"
        "        assert torch.equal(model(expected['x']), expected['y'])\n"
    )


def test_a06_packing_and_unpacking_gives_the_file_that_was_packed(tmp_path):
    save_file(copies(pruned(Net)), tmp_path / "m.safetensors", {"format": "pt"})
    sc.pack(tmp_path / "m.safetensors", tmp_path / "m.packed.safetensors")
    sc.unpack(tmp_path / "m.packed.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_a07_names_and_their_order(tmp_path, kind):
    model = pruned(kind)
    parameters, state = [n for n, _ in model.named_parameters()], list(model.state_dict())
    fresh = reloaded(model, kind, tmp_path / "m.safetensors")
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()] == parameters
    assert list(sc.load(tmp_path / "m.safetensors")) == list(fresh.state_dict()) == state
    assert [t.name for t in inspect(tmp_path / "m.safetensors").tensors] == state


def test_a16_zeros_that_were_there_and_a_padding_row(tmp_path):
    model = nn.Sequential(nn.Embedding(100, 40, padding_idx=0), nn.Linear(40, 50))
    with torch.no_grad():
        model[1].weight[:30] = 0  # of 50 rows
    sc.prune(model[1], 0.5)
    sc.prune(model, 0.5, scope=sc.weights(model, only=[nn.Embedding]))
    rest = 99 * 40
    assert zeros(model.state_dict()) == 30 * 40 + 40 + k(0.5, rest)
    sc.save(model, tmp_path / "m.safetensors")
    found, told = sc.load(tmp_path / "m.safetensors"), {t.name: t for t in inspect(tmp_path / "m.safetensors").tensors}
    assert same(found, dict(model.state_dict()))
    assert not found["0.weight"][0].any()
    assert not found["1.weight"][:30].any()
    assert told["1.weight"].sparsity == 0.6
    assert told["0.weight"].zeros == 40 + k(0.5, rest)
    assert told["1.bias"].zeros == 0


def test_a16_a_padding_row_that_is_not_zero(tmp_path):
    """It is whatever the model has there."""
    model = nn.Embedding(100, 40, padding_idx=0)
    nn.init.ones_(model.weight)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = nn.Embedding(100, 40, padding_idx=0)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert bool(fresh.weight[0].eq(1).all())


@pytest.mark.parametrize("level", ["lossless", "fp16", "bf16", "near", "small", "tiny"])
def test_a26_no_pruned_weight_is_minus_zero_and_others_keep_theirs(tmp_path, level):
    model = nn.Linear(40, 40)
    with torch.no_grad():
        model.weight.copy_(-model.weight.abs())
        model.bias[:7] = -0.0
    model.register_buffer("ints", torch.arange(1000))
    model.register_buffer("scratch", torch.full((1000,), -0.0, dtype=torch.bfloat16))
    masks = sc.prune(model, 0.9)
    sc.save(model, tmp_path / "m.safetensors", level=level)
    sc.unpack(tmp_path / "m.safetensors", tmp_path / "plain.safetensors")
    for found in (sc.load(tmp_path / "m.safetensors"), load_file(tmp_path / "plain.safetensors")):
        gone = found["weight"][~masks["weight"]]
        assert gone.numel() == k(0.9, 1600)
        assert not gone.view(torch.int32).any()
        assert same(found["scratch"], model.scratch)
        assert same(found["bias"], model.bias) or level in ("fp16", "bf16")  # which are for vectors too


def test_a26_minus_zero_among_the_weights(tmp_path):
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    weight[::2] = -0.0
    sc.save({"weight": weight}, tmp_path / "m.safetensors")
    assert same(sc.load(tmp_path / "m.safetensors"), {"weight": weight})
    assert inspect(tmp_path / "m.safetensors").total.zeros == 800
    sc.save({"weight": weight}, tmp_path / "m.safetensors", level="near")
    found = sc.load(tmp_path / "m.safetensors")["weight"]
    assert not found[::2].view(torch.int32).any()
    assert inspect(tmp_path / "m.safetensors").total.zeros == 800


def test_a47_a_packed_file_is_small(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(1024, 1024)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    dense = (tmp_path / "dense.safetensors").stat().st_size
    sc.prune(model, 0.9)
    for level, most in (("lossless", 0.14), ("fp16", 0.09)):
        file = tmp_path / f"{level}.safetensors"
        written = sc.save(model, file, level=level)
        assert file.stat().st_size == written.file_bytes <= most * dense
        fresh = nn.Linear(1024, 1024)
        fresh.load_state_dict(sc.load(file), strict=True)
        want = {n: t if level == "lossless" else t.half().float() for n, t in model.state_dict().items()}
        assert same(dict(fresh.state_dict()), want)
        assert type(fresh.weight) is nn.Parameter


class Legacy(Tagger):
    """A model pruned by torch.nn.utils.prune: the attention's projections and the LSTM's weights too."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens):
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states + self.attention(states, states, states)[0])


@pytest.fixture
def legacy():
    model = build(Legacy).eval()
    pairs = [(model.lstm, name) for name in model.lstm._flat_weights_names]
    pairs += [(model.attention, "in_proj_weight"), (model.attention.out_proj, "weight"), (model.head, "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.6)
    prune.ln_structured(model.head, "weight", 0.2, n=2, dim=0)
    return model


def test_a64_a_legacy_state_becomes_plain_and_small(tmp_path, legacy):
    sc.save(sc.plain_state_dict(legacy.state_dict()), tmp_path / "m.safetensors")
    fresh = Legacy().eval()
    sc.load(tmp_path / "m.safetensors", into=fresh)
    tokens = example(legacy)
    assert torch.equal(fresh(tokens), legacy(tokens))
    assert list(sc.load(tmp_path / "m.safetensors")) == list(Legacy().state_dict())
    assert inspect(tmp_path / "m.safetensors").notes == ()


def test_a64_a_legacy_file_that_was_packed_says_what_it_is(tmp_path, legacy):
    torch.save(legacy.state_dict(), tmp_path / "old.pt")
    sc.pack(tmp_path / "old.pt", tmp_path / "m.safetensors")
    (note,) = inspect(tmp_path / "m.safetensors").notes
    assert "are pruned with torch.nn.utils.prune: to make them plain" in note
    assert "secateur.torch_prune.plain_state_dict(state_dict)" in note
    fresh = Legacy().eval()
    fresh.load_state_dict(sc.plain_state_dict(sc.load(tmp_path / "m.safetensors")), strict=True)
    assert torch.equal(fresh(example(legacy)), legacy(example(legacy)))
