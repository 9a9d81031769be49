"""secateur.runtime.weight_checks: edits that torch does not count, in every kind of layer, are noticed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import StateError
from secateur.runtime import check_weights, native, trust_weights
from secateur.runtime.weight_checks import Snapshot
from sparse_models import sparse, thin

CHANGED = r"weights of [\w.]+ have changed(.|\n)*sc\.accelerate\(sc\.dense\(fast\)"


class Attend(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4, batch_first=True, **sizes)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0]


KINDS = {
    "Linear": (lambda: nn.Sequential(nn.Linear(16, 32)), (4, 16)),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3)), (2, 4, 16)),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), (2, 4, 8, 8)),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 8, 3)), (2, 4, 4, 5, 6)),
    "ConvTranspose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), (2, 4, 8, 8)),
    "channels_last": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)), (2, 4, 8, 8)),
    "LSTM": (lambda: nn.Sequential(nn.LSTM(16, 8, 2, bidirectional=True, proj_size=4)), (5, 2, 16)),
    "GRU": (lambda: nn.Sequential(nn.GRU(16, 8)), (5, 2, 16)),
    "RNN": (lambda: nn.Sequential(nn.RNN(16, 8, 2)), (5, 2, 16)),
    "LSTMCell": (lambda: nn.Sequential(nn.LSTMCell(16, 8)), (2, 16)),
    "GRUCell": (lambda: nn.Sequential(nn.GRUCell(16, 8)), (2, 16)),
    "attention": (Attend, (2, 5, 16)),
    "attention, apart": (lambda: Attend(kdim=16, vdim=16), (2, 5, 16)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
}
EDITS = {
    "data": lambda w: w.data.mul_(2),
    "copied": lambda w: w.data.copy_(w.data + 1),
    "numpy": lambda w: np.multiply(w.detach().numpy(), 2, out=w.detach().numpy()),
    "zeros filled": lambda w: w.data.masked_fill_(w.data == 0, 0.1),
    "storage": lambda w: w.untyped_storage().copy_((w * 3).untyped_storage()),
}


@pytest.fixture(params=["native", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native library")


def made(kind):
    make, shape = KINDS[kind]
    return sparse(thin(make(), 0.8)), torch.randn(shape)


def packed(fast):
    """The weights that are packed, by name."""
    return {name: p for name, p in fast.named_parameters() if p.dim() > 1 and p.count_nonzero()}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_any_whole_weight_is_noticed_at_the_next_call(kind, edit):
    fast, x = made(kind)
    with torch.inference_mode():
        fast(x)
    for name in packed(fast):
        one = copy.deepcopy(fast)
        EDITS[edit](one.get_parameter(name))
        with pytest.raises(StateError, match=CHANGED), torch.inference_mode():
            one(x)


@pytest.mark.parametrize("kind", ["Linear", "attention"])
def test_without_the_native_library_too(kind, library):
    fast, x = made(kind)
    fast(x)
    next(iter(packed(fast).values())).data.mul_(2)
    with pytest.raises(StateError, match=CHANGED):
        fast(x)


def test_a_chain_looks_at_all_its_layers(library, sparse_wins):
    model = thin(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))))
    for i in range(4):
        fast = sc.accelerate(model, torch.randn(1, 32))
        fast(torch.randn(1, 32))
        fast[i].weight.data.neg_()
        with pytest.raises(StateError, match=CHANGED):
            fast(torch.randn(1, 32))


def test_a_single_weight_is_noticed_within_2048_calls(library):
    weight = torch.randn(300, 1000).masked_fill(torch.rand(300, 1000) < 0.9, 0)
    at = (weight.flatten() == 0).nonzero().flatten()[[0, 17, -1]]
    for place in at.tolist():
        kept = Snapshot({"w": weight})
        assert all(kept.holds({"w": weight}) for _ in range(2100))
        weight.data.view(-1)[place] = 1e-30
        assert not all(kept.holds({"w": weight}) for _ in range(2048))
        assert not kept.same({"w": weight})
        weight.data.view(-1)[place] = 0
        assert kept.same({"w": weight})


def test_a_single_weight_of_a_chain(library, sparse_wins):
    fast, x = (
        sc.accelerate(thin(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))), torch.randn(1, 64)),
        torch.randn(1, 64),
    )
    fast(x)
    fast[1].weight.data[5, 7] += 1

    def often():
        for _ in range(24):  # pieces of 256
            fast(x)

    with pytest.raises(StateError, match=CHANGED):
        often()


def test_check_weights_finds_one_at_once(library):
    fast, _ = made("Linear")
    fast.__dict__["_secateur"] = None
    check_weights(fast)
    fast[0].weight.data[3, 4] += 1
    with pytest.raises(StateError, match=CHANGED):
        check_weights(fast)


def test_weights_that_were_written_but_are_the_same_are_not_changed(library, sparse_wins):
    model, x = thin(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))), torch.randn(2, 32)
    fast = sc.accelerate(model, x)
    before = fast(x)
    fast.load_state_dict(model.state_dict())
    assert fast(x).equal(before)
    fast[0].weight.data = fast[0].weight.data.clone()
    fast.load_state_dict(model.state_dict(), assign=True)
    assert fast.requires_grad_(False)(x).equal(before)


@pytest.mark.parametrize("change", [lambda w: w.t(), lambda w: w.t().contiguous().t()], ids=["turned", "laid anew"])
def test_what_counts_is_which_weight_stands_where(change):
    layer = sparse(thin(nn.Linear(32, 32)))
    x, before = torch.randn(2, 32), layer.weight.clone()
    layer.weight.data = change(layer.weight.data)
    if layer.weight.equal(before):
        assert torch.allclose(layer(x), nn.functional.linear(x, before, layer.bias), atol=1e-5)
    else:
        with pytest.raises(StateError, match="have changed"):
            layer(x)


def test_memory_that_was_given_back_is_not_read():
    layer = sparse(thin(nn.Linear(512, 512)))
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(StateError, match="have changed"):
        layer(torch.randn(2, 512))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        layer = copy.deepcopy(sparse(thin(nn.Linear(16, 16))))
        layer(torch.randn(2, 16))
        layer.weight.mul_(2)
        with pytest.raises(StateError, match="have changed"):
            layer(torch.randn(2, 16))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_trusted_weights_are_not_looked_at(sparse_wins, copied):
    model, x = thin(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))), torch.randn(2, 32)
    fast = sc.accelerate(model, x)
    before = fast(x)
    trust_weights(fast)
    trusted = copied(fast)
    trusted[0].weight.data.mul_(2)
    assert trusted(x).equal(before)
    for verb in (check_weights, lambda model: trust_weights(model, False)):  # who asks is told
        with pytest.raises(StateError, match="have changed"):
            verb(trusted)
    assert trusted(x).equal(before)
    trusted[0].weight.mul_(2)  # which torch counts
    with pytest.raises(StateError, match="have changed"):
        trusted(x)


def test_to_look_again(sparse_wins):
    fast = sc.accelerate(thin(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))), torch.randn(1, 32))
    trust_weights(fast)
    trust_weights(fast, False)
    fast[1].weight.data.mul_(2)
    with pytest.raises(StateError, match=CHANGED):
        fast(torch.randn(1, 32))


@pytest.mark.parametrize("verb", [check_weights, trust_weights])
def test_a_plain_model_has_nothing_to_check(verb):
    with pytest.raises(StateError, match=r"give what sc\.accelerate returned"):
        verb(nn.Linear(2, 2))
