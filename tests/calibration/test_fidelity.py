"""The mean cosine of outputs: padding left out, whatever the outputs are, and the model as it was."""

import copy

import pytest
import torch
from torch import nn

from secateur.calibration import fidelity
from secateur.calibration.fidelity import Fidelity
from secateur.errors import InputError, NotFiniteError


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 6)

    def forward(self, x, attention_mask=None):
        return {"hidden": self.layer(x), "count": x.shape[0]}


def test_same_and_opposite():
    model, x = nn.Linear(4, 3), torch.randn(8, 4)
    judge = Fidelity(model, [x, x[:2]])
    assert judge.of(model) == 1
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.weight.neg_()
        other.bias.neg_()
    assert judge.of(other) == pytest.approx(-1)
    with torch.no_grad():
        other.weight[0, 0] = torch.inf
    assert judge.of(other) < 0


def test_mean_over_vectors():
    x = torch.randn(3, 5, 4)
    model, other = nn.Linear(4, 6), nn.Linear(4, 6)
    expected = torch.cosine_similarity(model(x).double(), other(x).double(), dim=-1).mean().detach()
    assert Fidelity(model, [x]).of(other) == pytest.approx(float(expected))


def test_padding_does_not_count():
    model, other = Encoder(), Encoder()
    with torch.no_grad():
        other.layer.weight.add_(0.3)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = Fidelity(model, [{"x": x, "attention_mask": mask}]).of(other)
    far = x.masked_fill(mask.unsqueeze(-1) == 0, 100.0)
    assert Fidelity(model, [{"x": far, "attention_mask": mask}]).of(other) == pytest.approx(found)


def test_numbers_that_were_not_finite_before_do_not_count():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    x = torch.randn(16, 4)
    model, other = Masked(4, 3), Masked(4, 3)
    expected = torch.cosine_similarity(model(x)[:, ::2], other(x)[:, ::2], dim=-1).mean().detach()
    assert Fidelity(model, [x]).of(other) == pytest.approx(float(expected), abs=1e-6)
    x[3] = torch.nan
    rest = Fidelity(model, [x[torch.arange(16) != 3]]).of(other)
    assert Fidelity(model, [x]).of(other) == pytest.approx(rest, abs=1e-6)
    with pytest.raises(NotFiniteError, match="look for them in every fifth batch"):
        Fidelity(model, [x[3:4]])


def test_a_batch_that_the_model_does_not_take():
    with pytest.raises(InputError, match=r"RuntimeError.*calibrate again"):
        Fidelity(nn.Linear(3, 2), [torch.randn(2, 4)])


def test_numbers_of_one():
    x = torch.randn(16, 4)
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    expected = torch.cosine_similarity(model(x)[:, 0], other(x)[:, 0], dim=0).detach()
    assert Fidelity(model, [x]).of(other) == pytest.approx(float(expected), abs=1e-6)


def test_no_numbers():
    class Says(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    with pytest.raises(InputError, match="evaluate="):
        Fidelity(Says(), [torch.randn(2, 3)])


def test_of_large_outputs_some_vectors_are_compared(monkeypatch):
    x = torch.randn(8, 5, 4)
    model, other = nn.Linear(4, 6), nn.Linear(4, 6)
    monkeypatch.setattr(fidelity, "_MOST", 60)  # of 240
    judge = Fidelity(model, [x])
    with torch.no_grad():
        expected = torch.cosine_similarity(model(x), other(x), dim=-1).flatten()[::4].mean()
    assert judge.of(other) == pytest.approx(float(expected), abs=1e-6)


def test_modes_buffers_and_random_numbers_are_as_they_were():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(4, 3), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            assert not self.drop.training
            self.calls += 1
            return torch.dropout(self.layer(x), 0.5, train=True)  # in eval mode too

    model = Draws()
    model.drop.train()
    model.layer.eval()
    state = torch.get_rng_state()
    judge = Fidelity(model, [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))])
    assert judge.of(model) == 1  # the same numbers are dropped each time
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert [module.training for module in model.modules()] == [True, False, True]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_of_which_only_the_attention_is_told_does_not_count():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 6)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)

        def forward(self, ids):
            return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids == 0))

    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    model = Model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight.add_(torch.randn(6, 8))
        cosines = torch.cosine_similarity(model.eval()(ids).double(), other.eval()(ids).double(), dim=-1)
    assert Fidelity(model, [ids]).of(other) == pytest.approx(float(cosines[ids != 0].mean()))
