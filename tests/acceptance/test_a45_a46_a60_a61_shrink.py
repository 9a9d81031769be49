"""A45, A46, A60, A61: what is removed is gone, the function is that of the masked model, and a no-op is an error."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import structure


def largest(a, b):
    return float((a - b).detach().abs().max())


def test_a45_half_the_channels_of_a_convolution_are_gone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))
    for _ in range(3):
        model(torch.randn(16, 3, 9, 9))  # the statistics of the norm
    model.eval()
    x = torch.randn(4, 3, 9, 9)
    small = sc.shrink(model, x, 0.5)
    assert [tuple(p.shape) for p in small.parameters()] == [(4, 3, 3, 3), (4,), (4,), (4,), (5, 4, 3, 3), (5,)]
    assert small[1].running_mean.shape == (4,)
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (4, 4, 4)
    kept = structure.propose(model, x, 0.5).kept["0.weight"][0]
    masked = copy.deepcopy(model)
    gone = [i for i in range(8) if i not in kept]
    masked[3].weight.data[:, gone] = 0
    assert largest(small(x), masked(x)) < 1e-5


@pytest.mark.parametrize("way", ["rows of zeros", "masks"])
def test_a45_constants_of_dead_channels_are_folded(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))
    for _ in range(3):
        model(torch.randn(16, 3, 9, 9))
    nn.init.uniform_(model[1].bias, 0.5, 1.0)  # so that a dead channel is no zero behind the norm
    model.eval()
    x = torch.randn(4, 3, 9, 9)
    dead = copy.deepcopy(model)
    masks = sc.prune(dead, {"0.weight": 0.5}, pattern="rows")
    small = sc.shrink(dead, x) if way == "rows of zeros" else sc.shrink(model, x, masks=masks)
    assert small[0].out_channels == small[3].in_channels == 4
    assert largest(small(x), dead(x)) < 1e-5


RECURRENT = [
    (kind, layers, both, first, proj)
    for kind in (nn.LSTM, nn.GRU)
    for layers in (1, 2, 3)
    for both in (False, True)
    for first in (False, True)
    for proj in ((0, 8) if kind is nn.LSTM and layers != 2 else (0,))
]


class Tagger(nn.Module):
    def __init__(self, kind, layers, both, first, proj):
        super().__init__()
        own = {"proj_size": proj} if proj else {}
        self.rnn = kind(6, 16, layers, bidirectional=both, batch_first=first, **own)
        self.head = nn.Linear((proj or 16) * (2 if both else 1), 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "layers", "both", "first", "proj"), RECURRENT)
def test_a46_a_recurrent_layer_of_half_the_size(kind, layers, both, first, proj):
    torch.manual_seed(0)
    model = Tagger(kind, layers, both, first, proj).eval()
    x = torch.randn(3, 7, 6)
    small = sc.shrink(model, x, 0.5)
    assert type(small.rnn) is kind
    assert (small.rnn.hidden_size, small.rnn.num_layers, small.rnn.bidirectional) == (8, layers, both)
    assert small.rnn.proj_size == proj // 2
    plain = Tagger(kind, layers, both, first, proj)
    plain.rnn = kind(6, 8, layers, bidirectional=both, batch_first=first, **({"proj_size": proj // 2} if proj else {}))
    plain.head = nn.Linear(small.head.in_features, 5)
    plain.load_state_dict(small.state_dict())  # an ordinary layer of that size
    assert torch.equal(plain(x), small(x))

    masked, seen = copy.deepcopy(model), {}
    for name, dims in structure.propose(model, x, 0.5).kept.items():
        for d, kept in dims.items():
            t = masked.get_parameter(name).data
            gone = torch.ones(t.shape[d], dtype=torch.bool)
            gone[kept] = False
            t[(slice(None),) * d + (gone,)] = 0
    masked.rnn.register_forward_hook(lambda module, args, out: seen.update(states=out[0]))
    assert largest(masked(x), small(x)) < 1e-6
    assert int((seen["states"] == 0).flatten(0, 1).all(0).sum()) == seen["states"].shape[-1] // 2


class Attention(nn.Module):
    def __init__(self, heads=4):
        super().__init__()
        self.before = nn.Linear(6, 32)
        self.mha = nn.MultiheadAttention(32, heads, batch_first=True)
        self.after = nn.Linear(32, 5)

    def forward(self, x):
        h = self.before(x)
        return self.after(self.mha(h, h, h, need_weights=False)[0])


def test_a60_attention_keeps_whole_and_equal_heads():
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(3, 7, 6)
    small = sc.shrink(model, x, 0.5)
    assert small.mha.embed_dim == small.mha.num_heads * small.mha.head_dim < 32
    kept = structure.propose(model, x, 0.5).kept
    masked = copy.deepcopy(model)
    for name, dims in kept.items():
        for d, stays in dims.items():
            t = masked.get_parameter(name).data
            gone = torch.ones(t.shape[d], dtype=torch.bool)
            gone[stays] = False
            t[(slice(None),) * d + (gone,)] = 0
    assert largest(masked(x), small(x)) < 1e-5
    rows = kept["mha.in_proj_weight"][0]
    query, key, value = ([i - 32 * part for i in rows if i // 32 == part] for part in range(3))
    assert query == key  # heads pair the same positions
    for part in (query, value):
        sizes = {sum(i // 8 == head for i in part) for head in range(4)}
        assert len(sizes - {0}) == 1


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 8))


@pytest.mark.parametrize(
    ("model", "sparsity", "axis"),
    [
        (nn.Linear(4, 2), 0.5, r"weight\[0\].*an output of the model"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), 0.01, r"0\.weight\[0\].*8 units.*Ask for more to go"),
        (
            Literal(),
            0.5,
            r"^nothing can be removed: view in the model \(.*\.py:\d+\).*a number in the code\. Change the code",
        ),
    ],
    ids=["outputs only", "less than a unit", "a size in the code"],
)
def test_a61_what_removes_nothing_says_what_held_it(model, sparsity, axis):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sc.errors.StructureError, match=axis):
        sc.shrink(model, torch.randn(3, 4), sparsity)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a61_a_missed_target_is_an_error():
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(40, 2)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x)).view(-1, 40)).view(-1, 40))

    with pytest.raises(sc.errors.StructureError, match=r"weights were to go, and only \d+ can: view in the model"):
        sc.shrink(Bound(), torch.randn(3, 4), 0.5)
