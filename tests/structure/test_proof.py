import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.cut import cut, twin
from secateur.structure.groups import Groups, as_mask, scores
from secateur.structure.plan import as_plan
from secateur.structure.policy import Policy
from secateur.structure.proof import Proof, fresh, repeats, tolerance
from secateur.structure.remains import Remains

assert rules


def halved(model, x):
    small = twin(model)
    cap = capture(small, [((x,), {})], Policy())
    groups = Groups(cap)
    kept, counts = groups.select(scores(groups, lambda name, w: w.square()), 0.5)
    cut(small, as_plan(small, groups, kept, counts, ()).kept)
    return small, cap, Proof(model, [Remains(run, as_mask(kept)) for run in cap.runs], groups.axes)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()


def test_a_right_cut_differs_by_rounding():
    model, x = mlp(), torch.randn(3, 4)
    small, _, proof = halved(model, x)
    small[3].normalized_shape = (4,)
    worst, call, _ = proof.difference(small)
    assert worst < 1e-6
    assert call is None


def test_a_wrong_cut_is_found_where_it_begins():
    model, x = mlp(), torch.randn(3, 4)
    small, _, proof = halved(model, x)
    small[3].normalized_shape = (4,)
    small[2].weight.data[0] += 1
    worst, call, _ = proof.difference(small)
    assert worst > tolerance(model)
    assert (call.name, call.module) == ("linear", "2")


def test_nan_is_a_difference():
    model, x = mlp(), torch.randn(3, 4)
    small, _, proof = halved(model, x)
    small[3].normalized_shape = (4,)
    small[2].weight.data[0] = float("nan")
    assert proof.difference(small)[0] == float("inf")


def test_the_original_is_untouched():
    model, x = mlp(), torch.randn(3, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, _, proof = halved(model, x)
    small[3].normalized_shape = (4,)
    proof.difference(small)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_fresh_inputs_are_of_the_same_kind():
    ids = torch.arange(6).reshape(2, 3)
    (x,), kwargs = fresh(((torch.randn(4, 5),), {"ids": ids, "flag": True}))
    assert x.shape == (4, 5)
    assert sorted(kwargs["ids"].flatten().tolist()) == list(range(6))
    assert kwargs["flag"] is True


def test_half_precision_has_a_wider_tolerance():
    assert tolerance(nn.Linear(2, 2)) == 1e-4 < tolerance(nn.Linear(2, 2).bfloat16())


class TrainsMore(nn.Module):
    """A branch that runs in training only, with dropout before it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.norm(self.a(x))
        return (self.b(y), self.c(self.drop(y))) if self.training else self.b(y)


def test_forwards_in_training_mode_are_proven_without_dropout():
    torch.manual_seed(0)
    model, x = TrainsMore().eval(), torch.randn(5, 4)
    small, cap, proof = halved(model, x)
    training = cap.runs[1]
    assert training.training
    assert repeats(training)
    assert proof.difference(small, 1)[1] is None
    small.c.weight.data[:, [0, 1]] = small.c.weight.data[:, [1, 0]]
    assert proof.difference(small, 1)[1].module == "c"


def test_noise_for_each_unit_is_not_drawn_twice_alike():
    class Noisy(TrainsMore):
        def forward(self, x):
            y = super().forward(x)
            return (*y, torch.rand_like(self.a(x)).sum()) if self.training else y

    cap = capture(twin(Noisy().eval()), [((torch.randn(5, 4),), {})], Policy())
    assert not repeats(cap.runs[1])


def test_numbers_beyond_all_bounds_are_left_out_of_a_comparison():
    class Masking(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return (self.b(self.a(x)) + torch.tensor([0, 0, 0, torch.finfo(x.dtype).min])).softmax(-1)

    torch.manual_seed(0)
    model, x = Masking().eval(), torch.randn(5, 4)
    small, _, proof = halved(model, x)
    assert proof.difference(small)[1] is None


def test_a_result_that_nobody_takes_up_may_differ():
    """The weights of attention are a mean over heads: over fewer when heads go."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(5, 24), nn.MultiheadAttention(24, 3), nn.Linear(24, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    small = sc.shrink(Attends().eval(), torch.randn(2, 7, 5), 0.34).attention
    assert (small.embed_dim, small.num_heads, small.head_dim) == (16, 2, 8)


def test_what_is_rounding_only_is_no_difference():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model = Waves(layers).eval()
    small = sc.shrink(model, torch.randn(16, 8), 0.5)
    assert small.layers[0].out_features == 4


class Waves(nn.Module):
    """Each layer makes a difference many times larger: in single precision little is left of the sums."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(300 * layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_infinite_where_a_unit_goes_is_masked_too(value):
    model, x = mlp(), torch.randn(3, 4)
    small, _, proof = halved(model, x)
    small[3].normalized_shape = (4,)
    model[2].weight.data[:, proof._gone[id(model[2].weight)][-1][1] == 0] = value  # columns that are read of zeros
    model[0].weight.data[proof._gone[id(model[0].weight)][0][1] == 0] = value
    assert proof.difference(small)[1] is None
