"""Units that are dead already, in models whose zeros are put there by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import StructureError
from secateur.structure.capture import capture
from secateur.structure.dead import dead
from secateur.structure.groups import Groups
from secateur.structure.policy import Policy


def dead_units(model, *inputs):
    """How many groups of each cell are dead."""
    cap = capture(model, [(inputs, {})], Policy())
    groups = Groups(cap)
    found = dead(model, cap.runs, Policy(), groups).units
    return [int(found[cell].sum()) for cell in groups.cells]


@torch.no_grad()
def zero(*views):
    for view in views:
        view.zero_()


def mlp(bias=False):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 2)
    return nn.Sequential(*layers).eval()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_no_way_in_or_no_way_out():
    model = mlp()
    zero(model[0].weight[:3], model[2].weight[:, 7], model[4].weight[:, 5])
    assert dead_units(model, X) == [4, 1]


def test_nothing_is_dead():
    assert dead_units(mlp(bias=True), X) == [0, 0]


def test_a_unit_that_only_dead_ones_read_is_dead():
    model = mlp()
    zero(model[4].weight[:, :3], model[2].weight[3:, 0])
    assert dead_units(model, X) == [1, 3]


def test_a_unit_that_an_example_leaves_at_zero_is_alive():
    model = mlp(bias=True)
    with torch.no_grad():
        model[0].bias[:] = -100
    assert dead_units(model, X) == [0, 0]


def test_the_bias_of_what_reads_it_takes_the_place_of_a_constant():
    model = mlp(bias=True)
    zero(model[0].weight[:3])
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([1.0, 0.0, -1.0])  # of which ReLU lets the first one pass
    assert dead_units(model, X) == [3, 0]
    small = sc.shrink(model, X)
    assert torch.allclose(small[2].bias, model[2].bias + model[2].weight[:, 0])
    assert torch.allclose(small(X), model(X), atol=1e-6)


def test_a_constant_without_a_bias_to_take_its_place_is_alive():
    model = mlp(bias=True)
    model[2].bias = None
    zero(model[0].weight[:2])
    model[0].bias.data[:2] = torch.tensor([1.0, -1.0])
    assert dead_units(model, X) == [1, 0]


@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_is_none_at_a_padded_border(padding):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding)).eval()
    x = torch.randn(2, 1, 8, 8)
    zero(model[0].weight[1])
    model[1].bias.data[1] = 1
    assert dead_units(model, x) == [1 - padding]
    if not padding:
        assert torch.allclose(sc.shrink(model, x)(x), model(x), atol=1e-6)


def folds(between, *arguments):
    """How many units go whose weights are zero and whose biases are not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, *more):
            return self.b(between(self.a(x).relu(), x, *more))

    model = Net().eval()
    zero(model.a.weight[:3])
    model.a.bias.data[:2] = 1
    model.a.bias.data[2] = 0
    (found,) = dead_units(model, torch.randn(2, 5, 4), *arguments)
    return found


@pytest.mark.parametrize(
    "between",
    [
        lambda h, x: h.sum(1),
        lambda h, x: h / len(x),
        lambda h, x: F.pad(h, (0, 0, 0, 8 - x.shape[1])).mean(1),
        lambda h, x: torch.ones(1, x.shape[1]) @ h,
        lambda h, x: torch.einsum("btd->bd", h),
        lambda h, x: h + h if x.mean() > 9 else h,
    ],
)
def test_what_depends_on_a_size_or_a_branch_is_no_constant_but_zeros_are(between):
    assert folds(between) <= 1


def test_a_python_number_may_be_another_one_next_time():
    assert folds(lambda h, x, scale: h * scale, 0.5) == 1


def test_a_mean_over_places_and_functions_without_numbers_keep_constants():
    assert folds(lambda h, x: h.tanh().mean(1)) == 3


def test_a_layer_that_reads_two_constants_with_one_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x)) + self.b(self.a(x) * 2)

    model = Net().eval()
    zero(model.a.weight[:2], model.a.bias[1])
    assert dead_units(model, X) == [1]


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_hidden_units_of_recurrent_layers(kind, gates, options):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r = kind(4, 8, **options)
            self.head = nn.Linear(8 * (1 + options.get("bidirectional", False)), 2)

        def forward(self, x):
            return self.head(self.r(x)[0][-1])

    model = Net().eval()
    x = torch.randn(5, 2, 4)
    for p in model.r.parameters():
        zero(p.view(gates, 8, -1)[-1 if gates == 3 else 2 % gates, :3])  # what the state is made of, and no gate
    for name, p in model.r.named_parameters():
        if "l1" not in name and "reverse" not in name:
            zero(p.view(gates, 8, -1)[:, 5])
    small = sc.shrink(model, x)
    assert small.r.hidden_size == (4 if not options else 5)
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_a_state_that_is_given_is_alive():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.head = nn.GRU(4, 8), nn.Linear(8, 2)

        def forward(self, x, h):
            return self.head(self.r(x, h.expand(1, 2, 8))[0][-1])

    model = Net().eval()
    for p in model.r.parameters():
        zero(p.view(3, 8, -1)[:, :3])
    assert dead_units(model, torch.randn(5, 2, 4), torch.randn(1, 1, 8)) == []


def test_convolutions_with_a_norm_between():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.c, self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 6, 1)
            self.e = nn.ConvTranspose2d(6, 4, 2)
            self.f = nn.Linear(4, 2)

        def forward(self, x):
            return self.f(self.e(self.d(self.c(self.b(self.a(x)).relu()).relu())).mean((2, 3)))

    model, x = Net().eval(), torch.randn(2, 3, 6, 6)
    zero(model.c.weight[:3], model.d.weight[:, 4], model.a.weight[5], model.b.bias[5], model.a.weight[6])
    model.b.bias.data[6] = model.c.weight.data[6] = 1
    zero(model.e.weight[2], model.f.weight[:, 1:3])
    assert dead_units(model, x) == [5, 1, 2]


def test_embeddings_and_sums():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 8), nn.Embedding(5, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, ids):
            return self.head((self.words(ids) + self.places(torch.arange(5))).tanh())

    model, ids = Net().eval(), torch.arange(5)[None]
    zero(model.words.weight[:, :3], model.places.weight[:, 2:5])
    assert dead_units(model, ids) == [1]


def test_a_head_whose_values_are_dead():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
            self.out = nn.Linear(12, 8)

        def forward(self, x):
            q, k, v = (p(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))

    model = Attention().eval()
    x = torch.randn(2, 5, 8)
    zero(model.v.weight[4:8], model.v.bias[4:8])
    small = sc.shrink(model, x)
    assert small.q.out_features == 8
    assert torch.allclose(small(x), model(x), atol=1e-6)


def test_a_statistic_over_dead_units_would_change():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    zero(model[0].weight[:3], model[2].weight[:, :3])
    with pytest.raises(StructureError, match="Give a sparsity"):
        sc.shrink(model, X)


def test_products_written_in_other_ways():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(n)) for n in ((4, 8), (8, 6), (6, 2)))

        def forward(self, x):
            y = torch.addmm(torch.zeros(()), x @ self.a, self.b)
            return torch.einsum("bi,io->bo", y, self.c) * x.new_ones(2)

    model = Net().eval()
    zero(model.a[:, 0], model.b[1], model.c[2])
    assert dead_units(model, X) == [2, 0]


def test_what_is_written_into_zeros_is_alive():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 2)

        def forward(self, x):
            y = torch.zeros(len(x), 8)
            y[:, :] = self.a(x)
            return self.b(y)

    model = Net().eval()
    zero(model.a.weight[0])
    assert dead_units(model, X) == [1]


def test_a_model_that_does_otherwise_each_time():
    counter = itertools.count(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            y = self.a(x)
            for _ in range(next(counter)):
                y = y + torch.zeros(8)
            return self.b(y)

    with pytest.raises(StructureError, match="make its forward deterministic"):
        dead_units(Net().eval(), X)
