import copy
import functools

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurWarning, StructureError


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_half_of_each_layer_goes_and_the_given_model_stays():
    model = mlp()
    before = copy.deepcopy(model)
    small = sc.shrink(model, X, 0.5)
    assert type(small) is nn.Sequential
    assert [m.out_features for m in small if isinstance(m, nn.Linear)] == [4, 3, 2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [8, 6, 2]
    small[4].bias.data += 1
    assert torch.equal(model[4].bias, before[4].bias)


def test_a_score_by_name_or_function():
    def first(name, weight):
        return torch.arange(weight.numel()).reshape(weight.shape).float() if name == "0.bias" else weight * 0

    small = sc.shrink(mlp(), X, 0.5, score=first)
    assert torch.equal(small[0].bias, mlp()[0].bias[4:])
    assert sc.shrink(mlp(), X, 0.5, score="magnitude")[0].out_features == 4


def test_several_examples():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x, second=False):
            return self.c(self.a(x)) if second else self.b(self.a(x))

    small = sc.shrink(Branch().eval(), [X, {"x": X, "second": True}], 0.5)
    assert small(X, second=True).shape == small(X).shape == (3, 2)


def test_an_optimizer_goes_on():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    small = sc.shrink(model, X, 0.5, optimizer=optimizer)
    small(X).sum().backward()
    optimizer.step()
    assert small[0].weight.grad is not None


def test_a_model_with_nothing_to_remove_is_an_error():
    with pytest.raises(StructureError, match=r"0\.weight\[.\].*: an output of the model.*keep the model as it is"):
        sc.shrink(nn.Sequential(nn.Linear(4, 2)), X, 0.5)


def test_too_small_a_sparsity_is_an_error():
    with pytest.raises(StructureError, match="Ask for more to go"):
        sc.shrink(mlp(), X, 0.01)


def test_a_branch_that_runs_only_in_training_is_cut_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return (self.b(self.a(x)), self.c(self.a(x))) if self.training else self.b(self.a(x))

    small = sc.shrink(Auxiliary().eval(), X, 0.5)
    assert small.c.in_features == 4
    assert len(small.train()(X)) == 2


def test_a_branch_that_cannot_be_seen_is_refused():
    class Targets(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x, targets=None):
            return self.c(self.a(x)) - targets if self.training else self.b(self.a(x))

    with pytest.raises(StructureError, match=r"c\.weight, c\.bias may take part in training.*give inputs with which"):
        sc.shrink(Targets().eval(), X, 0.5)
    assert sc.shrink(Targets().eval(), {"x": X, "targets": torch.zeros(3, 2)}, 0.5).c.in_features == 4


def test_unknown_places_are_held_not_guessed():
    class TopK(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            values, at = y.topk(3, -1)
            return self.c(self.b(torch.zeros_like(y).scatter(-1, at, values)))

    small = sc.shrink(TopK().eval(), X, 0.5)
    assert (small.a.out_features, small.b.out_features) == (8, 4)


def test_a_missed_target_is_an_error_with_what_held_it():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).view(-1, 64)).view(-1, 64)))

    model = Wide().eval()
    with pytest.raises(StructureError, match=r"were to go, and only \d+ can: .*view.*Change the code at that place"):
        sc.shrink(model, X, 0.5)
    assert model.b.weight.shape == (64, 64)


def test_widths_are_rounded_and_have_a_least():
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 2))
    small = sc.shrink(model, X, 0.5, round_to=8)
    assert (small[0].out_features, small[2].out_features) == (16, 8)
    assert sc.shrink(model, X, 0.9, min_width=5)[2].out_features == 5


def test_heads_are_whole_multiples_already():
    layer = nn.TransformerEncoderLayer(64, 4, 48, batch_first=True)
    small = sc.shrink(nn.Sequential(nn.Linear(4, 64), layer, nn.Linear(64, 2)).eval(), X[None], 0.5, round_to=16)[1]
    assert (small.self_attn.num_heads, small.linear1.in_features, small.linear1.out_features) == (2, 32, 16)


def test_a_lone_encoder_layer_keeps_its_width_and_heads():
    layer = nn.TransformerEncoderLayer(64, 4, 48, batch_first=True).eval()
    with pytest.warns(SecateurWarning, match=r"only 0\.13 of the weights go, where 0\.5 of .* shows all"):
        small = sc.shrink(layer, torch.randn(2, 5, 64), 0.5)
    assert (small.self_attn.num_heads, small.linear1.in_features, small.linear1.out_features) == (4, 64, 24)


class Heads(nn.Module):
    """Two heads, with a softmax over each."""

    def __init__(self, inputs):
        super().__init__()
        self.heads, self.linear = 2, nn.Linear(inputs, 16)

    def forward(self, x):
        return self.linear(x).view(-1, self.heads, 8).softmax(-1).flatten(1)


def test_where_more_goes_than_was_asked_for_there_is_a_word():
    model = nn.Sequential(Heads(4), Heads(16), nn.Linear(16, 3)).eval()
    with pytest.warns(SecateurWarning, match=r"more than where 0\.3 of .* change in steps.* params=0\.49"):
        small = sc.shrink(model, X, 0.3)
    assert [m.heads for m in small[:2]] == [1, 1]


@pytest.mark.parametrize("keep", ["2", "2.weight", "[2]", ["2.*"], lambda model: model[2], lambda model: [model[2]]])
def test_what_is_kept_keeps_its_shape(keep):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    small = sc.shrink(model, X, 0.5, keep=keep(model) if callable(keep) else keep)
    assert [m.out_features for m in small] == [4, 6, 6, 3, 2]


def test_units_with_an_infinite_score_stay():
    def first(name, weight):
        return torch.where(torch.arange(len(weight)) < 6, torch.inf, 1.0) if name == "0.bias" else weight * 0

    assert sc.shrink(mlp(), X, 0.5, score=first)[0].out_features == 6


def test_a_cache_that_the_first_forward_fills():
    class Index(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x) + places(x.shape[0])[:, None])

    @functools.lru_cache
    def places(count):
        return torch.arange(count).float()

    assert sc.shrink(Index().eval(), X, 0.5).a.out_features == 4


class Relative(nn.Module):
    """Attention of which the logits, two sums, are divided by the root of a size that is an attribute."""

    def __init__(self):
        super().__init__()
        self.heads, self.size = 4, 6
        self.qkv, self.far, self.out = nn.Linear(8, 72), nn.Parameter(torch.randn(4, 6)), nn.Linear(24, 5)
        self.inner, self.outer = nn.Linear(5, 200), nn.Linear(200, 3)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, self.size)) for y in self.qkv(x).chunk(3, -1))
        logits = torch.einsum("bihd,bjhd->bhij", q + self.far, k) + torch.einsum("bihd,bjhd->bhij", q - self.far, v)
        y = torch.einsum("bhij,bjhd->bihd", (logits / self.size**0.5).softmax(-1), v)
        return self.outer(self.inner(self.out(y.flatten(2))).relu())


def test_a_scale_that_cannot_change_holds_what_it_is_the_size_of_and_no_more():
    torch.manual_seed(0)
    small = sc.shrink(Relative(), torch.randn(2, 5, 8), 0.5)
    assert small.inner.out_features == 100
    assert small.size == 6
