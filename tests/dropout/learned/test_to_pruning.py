"""What was learned, as scores: they serve `sc.prune` as they are, whatever a method has left out."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.dropout.learned import concrete, finish, hard_concrete, to_scores, variational
from secateur.errors import SecateurWarning, StateError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore:concrete learns no rate:secateur.errors.SecateurWarning")
METHODS = {
    "concrete": lambda model, **options: concrete(model, n_data=100, **options),
    "variational": lambda model, **options: variational(model, n_data=100, warmup=5, **options),
    "hard_concrete": lambda model, **options: hard_concrete(model, n_data=100, **options),
}


class Tagger(nn.Module):
    """A recurrent layer, an attention and a head."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.rnn, self.attention = kind(8, 16, batch_first=True), nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.rnn(self.words(tokens))[0]
        return self.head(self.hidden(self.attention(x, x, x, need_weights=False)[0]).relu())


@pytest.mark.filterwarnings("ignore:.*may no longer let anything through:secateur.errors.SecateurWarning")
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", METHODS)
def test_scores_serve_on_the_default_scope(name, kind, sparsity):
    torch.manual_seed(0)
    model = Tagger(kind)
    rates = METHODS[name](model)
    scores = to_scores(model)
    scope = sc.weights(model)
    assert set(scores) == set(scope)
    assert all(scores[key].shape == weight.shape for key, weight in scope.items())
    rates.remove()
    total = sum(weight.numel() for weight in scope.values())
    assert sc.prune(model, sparsity, score=scores).pruned == int(sparsity * total + 0.5)


def test_concrete_says_what_it_leaves_out():
    with pytest.warns(SecateurWarning, match=r"no rate for rnn\.weight_ih_l0, rnn.*recurrent\(model.*only=\['hidden"):
        concrete(Tagger(), n_data=10)
    model = Tagger()
    concrete(model, n_data=10, scope=sc.weights(model, only=["head.weight"]))  # said by the user: no warning


def test_what_concrete_leaves_out_ranks_at_the_mean_rate():
    model = Tagger()
    rates = concrete(model, n_data=10)
    with torch.no_grad():
        for layer, logit in {"hidden": -2.0, "head": 1.0, "attention.out_proj": 0.0}.items():
            if layer in rates.rates:
                rates.value(layer).fill_(logit)
    weight = model.rnn.weight_hh_l0.detach()
    right = weight.abs() / weight.square().mean().sqrt() * torch.tensor(0.25).exp()
    torch.testing.assert_close(to_scores(model)["rnn.weight_hh_l0"], right)


def test_gates_go_before_weights_without_gates():
    model = Tagger()
    hard_concrete(model, n_data=10)
    scores = to_scores(model)
    left = {"head.weight", "attention.out_proj.weight"}
    assert min(scores[name].min() for name in left) > max(scores[name].max() for name in set(scores) - left)


def test_one_method_leaves_to_another():
    model = Tagger()
    concrete(model, n_data=10)
    variational(model, n_data=10, warmup=0, scope=sc.weights(model, only=["rnn.*"]))
    scores, weight = to_scores(model)["rnn.weight_hh_l0"], model.rnn.weight_hh_l0.detach()
    torch.testing.assert_close(scores, 2 * weight.abs().log() + 10.0)  # of variational


def test_outside_a_scope_that_was_given_there_are_none():
    model = Tagger()
    concrete(model, n_data=10, scope=sc.weights(model, only=["head.weight"]))
    scores = to_scores(model)
    assert list(scores) == ["head.weight"]
    with pytest.raises(UnknownNameError, match=r"no score for.*scope=sc\.weights\(model, only=list\(scores\)\)"):
        sc.prune(model, 0.5, score=scores)
    assert sc.prune(model, 0.5, score=scores, scope=sc.weights(model, only=list(scores))).pruned == 24


def test_after_finish_there_is_nothing_to_ask():
    model = Tagger()
    concrete(model, n_data=10)
    finish(model)
    with pytest.raises(StateError, match="call this before finish"):
        to_scores(model)
