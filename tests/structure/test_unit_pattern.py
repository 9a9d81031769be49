"""Units pruned gradually, in a loop that stays as it is; then the small model."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputTypeError, PatternError, StructureError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 25, 2),
    ).eval()


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.r = kind(4, 8, 2, **options)
        self.head = nn.Linear(8 * (1 + options.get("bidirectional", False)), 2)

    def forward(self, x):
        return self.head(self.r(x)[0])


def test_units_are_what_reads_them():
    pattern = sc.units(mlp(), X)
    assert [[(one.name, one.dim, len(one.at)) for one in kind] for kind in pattern.slices] == [
        [("2.weight", 1, 8)],
        [("4.weight", 1, 6)],
    ]


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_convolutions_with_norms_and_padding(allocation):
    model, x = convolutions(), torch.randn(2, 1, 4, 4)
    masks = sc.prune(model, 0.5, pattern=sc.units(model, x), allocation=allocation)
    small = sc.shrink(model, x, masks=masks)
    dead = [int((~masks[name].any(dim)).sum()) for name, dim in (("3.weight", (1, 2, 3)), ("6.weight", (0, 2, 3)))]
    assert (small[0].out_channels, small[3].out_channels) == (8 - dead[0], 6 - dead[1])
    assert allocation == "global" or dead == [4, 3]
    assert torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("two_way", [False, True])
def test_hidden_units_one_by_one_in_a_training_loop(kind, two_way):
    torch.manual_seed(0)
    model, x = Tagger(kind, bidirectional=two_way), torch.randn(5, 2, 4)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = sc.Pruner(model, 0.5, pattern=sc.units(model, x), schedule=sc.linear(0, 4))
    pruner.attach(optimizer)
    for step in range(1, 5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert int((~pruner.masks["head.weight"].any(0)).sum()) == step * (1 + two_way)
    small = sc.shrink(model.eval(), x, masks=pruner.finish(), optimizer=optimizer)
    assert small.r.hidden_size == 4
    assert torch.allclose(small(x), model(x), atol=1e-6)
    small(x).sum().backward()
    optimizer.step()


def test_the_last_unit_of_a_kind_stays():
    model = mlp()
    masks = sc.prune(model, 0.8, pattern=sc.units(model, X))
    assert [int(masks[name].any(0).sum()) > 0 for name in masks] == [True, True]


def test_the_count_is_met_to_the_nearest_unit():
    model = mlp()
    masks = sc.prune(model, 0.5, pattern=sc.units(model, X), allocation="uniform")
    assert (masks.pruned, masks.size) == (4 * 6 + 3 * 2, 8 * 6 + 6 * 2)


def test_other_weights_stay():
    model = mlp()
    assert set(sc.prune(model, 0.5, pattern=sc.units(model, X))) == {"2.weight", "4.weight"}
    assert bool((model[0].weight != 0).all())


def test_a_scope_beside_it():
    model = mlp()
    with pytest.raises(PatternError, match="leave the scope out"):
        sc.prune(model, 0.5, pattern=sc.units(model, X), scope=sc.weights(model))


def test_another_model():
    pattern = sc.units(mlp(), X)
    with pytest.raises(PatternError, match="make it anew"):
        sc.prune(nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]), 0.5, pattern=pattern)


def test_units_behind_a_norm_over_them_are_left_out():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    assert [kind[0].name for kind in sc.units(model, X).slices] == ["4.weight"]


def test_no_unit_is_an_error():
    with pytest.raises(StructureError, match=r"propose\(model, example_inputs, 0\.5\)\.explain\(\)"):
        sc.units(nn.Sequential(nn.Linear(4, 2)), X)
    with pytest.raises(StructureError, match=r"no kind of unit can go alone: see propose"):
        sc.units(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), X)


def test_units_that_go_only_with_others_are_left_out():
    """The heads of nn.MultiheadAttention are as wide together as what it reads."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(4, 24), nn.MultiheadAttention(24, 3), nn.Linear(24, 2)
            self.up, self.down = nn.Linear(24, 6), nn.Linear(6, 24)

        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.attention(x, x, x)[0] + self.down(self.up(x).relu()))

    model, x = Attends().eval(), torch.randn(2, 5, 4)
    pattern = sc.units(model, x)
    assert [one.name for kind in pattern.slices for one in kind] == ["down.weight"]
    assert sc.shrink(model, x, masks=sc.prune(model, 0.5, pattern=pattern)).up.out_features == 3


def test_wrong_types():
    with pytest.raises(InputTypeError, match=r"give an nn\.Module"):
        sc.units("model", X)
    with pytest.raises(InputTypeError, match="Pass a tensor"):
        sc.units(mlp(), 3)
