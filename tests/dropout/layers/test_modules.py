"""Dropout layers: the mean stays, masks have the shape that they should, and nothing happens in eval()."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import secateur as sc
from secateur.dropout import noise
from secateur.dropout.layers.modules import (
    DropBlock2d,
    DropConnect,
    LockedDropout,
    StochasticDepth,
    TargetedDropout,
    WordDropout,
)
from secateur.errors import InputError, InputTypeError

SEQUENCES = torch.arange(1.0, 1 + 6 * 3 * 5).view(6, 3, 5)
LAYERS = {
    "LockedDropout": (lambda p: LockedDropout(p), SEQUENCES),
    "LockedDropout, batch first": (lambda p: LockedDropout(p, batch_first=True), SEQUENCES),
    "WordDropout": (lambda p: WordDropout(p, 1, keep=[0]), torch.arange(40).view(8, 5) % 7),
    "DropConnect": (lambda p: DropConnect(5, 4, p=p), SEQUENCES),
    "DropBlock2d": (lambda p: DropBlock2d(p, 2), torch.ones(2, 3, 6, 5)),
    "StochasticDepth": (lambda p: StochasticDepth(p), torch.ones(16, 3)),
    "StochasticDepth, per batch": (lambda p: StochasticDepth(p, per_batch=True), torch.ones(16, 3)),
    "TargetedDropout": (lambda p: TargetedDropout(5, 4, p=p, target=0.6), SEQUENCES),
    "TargetedDropout, units": (lambda p: TargetedDropout(5, 4, p=p, target=0.5, units=True), SEQUENCES),
}


@pytest.fixture(params=list(LAYERS))
def case(request):
    torch.manual_seed(0)
    make, x = LAYERS[request.param]
    return make(0.5), x


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else x


def seeded(layer, x, seed):
    torch.manual_seed(seed)
    return layer(x)


def differs(layer, x):
    return any(not torch.equal(seeded(layer, x, 0), seeded(layer, x, i)) for i in range(1, 20))


# ---- what all have in common ------------------------------------------------------------------------------------


def test_it_is_the_identity_in_eval(case):
    layer, x = case
    assert torch.equal(layer.eval()(x), plain(layer, x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_rate_of_0_drops_nothing(name):
    make, x = LAYERS[name]
    layer = make(0)
    assert torch.equal(layer(x), plain(layer, x))


def test_it_is_random_in_training_and_follows_the_seed(case):
    layer, x = case
    assert torch.equal(seeded(layer, x, 7), seeded(layer, x, 7))
    assert differs(layer, x)


def test_it_is_random_in_eval_while_samples_are_taken(case):
    layer, x = case
    layer.eval()
    token = noise.SAMPLING.set(True)
    try:
        assert differs(layer, x)
    finally:
        noise.SAMPLING.reset(token)
    assert not differs(layer, x)


def test_it_compiles_without_a_graph_break(case):
    layer, x = case
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(seeded(compiled, x, 3), seeded(layer, x, 3))
    layer.eval()
    assert torch.equal(compiled(x), plain(layer, x))


class Numbers(TorchFunctionMode):
    """Gives each call its numbers from a table of samples, at an index that vmap may map over."""

    def __init__(self, tables, index):
        super().__init__()
        self.tables, self.index, self.calls = tables, index, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is noise.uniform:
            return self.draw(args[1])
        if func is noise.drop:
            x, rate = args
            numbers = self.draw(x.shape if kwargs["shape"] is None else kwargs["shape"])
            return x * noise.mask_of(numbers, rate, x.dtype)
        return func(*args, **kwargs)

    def draw(self, shape):
        self.calls += 1
        if len(self.tables) < self.calls:
            self.tables.append(torch.rand(4, *shape))
        table = self.tables[self.calls - 1]
        return table.index_select(0, self.index.reshape(1))[0]  # torch 2.9 cannot map table[index]


def test_samples_mapped_by_vmap_are_those_taken_one_by_one(case):
    layer, x = case
    tables = []

    def one(index):
        with Numbers(tables, index):
            return layer(x)

    each = torch.stack([one(torch.tensor(i)) for i in range(4)])
    assert not torch.equal(each[0], each[1]) or not torch.equal(each[0], each[2])
    assert len(tables) == 1
    torch.testing.assert_close(torch.vmap(one)(torch.arange(4)), each)


def test_it_is_copied_and_pickled(case):
    layer, x = case
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        assert torch.equal(seeded(twin, x, 1), seeded(layer, x, 1))


def test_it_says_its_rate(case):
    assert "p=0.5" in repr(case[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_outside_are_refused(name, rate):
    with pytest.raises(InputError, match=re.escape("at least 0 and below 1")):
        LAYERS[name][0](rate)
    with pytest.raises(InputTypeError, match="give a rate"):
        LAYERS[name][0]("half")


@pytest.mark.parametrize("name", [n for n in LAYERS if "Word" not in n and "Targeted" not in n])
def test_the_mean_stays(name):
    torch.manual_seed(0)
    make, x = LAYERS[name]
    layer = make(0.3)
    x = torch.ones_like(x)
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    if isinstance(layer, DropBlock2d):  # on the average of a map: its border is dropped less often
        assert (mean.mean() - 1).abs() < 0.01
    else:
        torch.testing.assert_close(mean, plain(layer, x), atol=0.06, rtol=0)


# ---- each of them -----------------------------------------------------------------------------------------------


def test_locked_dropout_is_the_same_at_all_steps_and_another_in_each_sequence():
    torch.manual_seed(0)
    x = torch.ones(9, 4, 64)
    first = LockedDropout(0.5)(x)
    assert (first == first[0]).all()
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in first[0]}) == 4
    second = LockedDropout(0.5, batch_first=True)(x)
    assert (second == second[:, :1]).all()
    assert len({tuple(row.tolist()) for row in second[:, 0]}) == 9
    one = LockedDropout(0.5, batch_first=True)(torch.ones(9, 64))
    assert (one == one[0]).all()
    assert 10 < int((one[0] == 0).sum()) < 54


def test_locked_dropout_of_packed_sequences():
    torch.manual_seed(0)
    packed = pack_sequence([torch.ones(n, 32) for n in (2, 5, 3)], enforce_sorted=False)
    padded, lengths = pad_packed_sequence(LockedDropout(0.5)(packed))
    assert lengths.tolist() == [2, 5, 3]
    for i, length in enumerate(lengths):
        steps = padded[:length, i]
        assert (steps == steps[0]).all()
        assert set(steps.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in padded[0]}) == 3
    assert LockedDropout(0.5).eval()(packed) is packed


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4)])
def test_locked_dropout_wants_sequences(shape):
    with pytest.raises(InputError, match=re.escape("give it [time, batch, features]")):
        LockedDropout(0.5)(torch.ones(shape))


def test_word_dropout_replaces_words_one_by_one_but_not_those_to_keep():
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (200, 100), dtype=torch.int32)
    out = WordDropout(0.25, replacement=9, keep=[0, 3])(tokens)
    assert out.dtype == torch.int32
    changed = out != tokens
    assert (out[changed] == 9).all()
    kept = (tokens == 0) | (tokens == 3)
    assert not changed[kept].any()
    assert abs(float(changed[~kept].float().mean()) - 0.25) < 0.01
    assert not torch.equal(changed[0], changed[1])


def test_word_dropout_refuses_what_are_no_tokens():
    with pytest.raises(InputTypeError, match="before the embedding"):
        WordDropout(0.1, 1)(torch.ones(3))
    with pytest.raises(InputTypeError, match="give the id of a token"):
        WordDropout(0.1, "unk")
    with pytest.raises(InputError, match="0 or more"):
        WordDropout(0.1, 1, keep=[-1])


@pytest.mark.parametrize("name", ["DropConnect", "TargetedDropout"])
def test_a_linear_layer_takes_the_state_of_another(name):
    linear, layer = nn.Linear(5, 4), LAYERS[name][0](0.5)
    layer.load_state_dict(linear.state_dict())
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 5)
    assert torch.equal(layer.eval()(x), linear(x))
    assert list(sc.weights(nn.Sequential(layer))) == ["0.weight"]


def test_dropconnect_drops_weights_for_the_whole_batch_and_never_the_bias():
    torch.manual_seed(0)
    layer = DropConnect(64, 32, p=0.25)
    assert torch.equal(layer(torch.zeros(1, 64))[0], layer.bias)
    layer = DropConnect(64, 32, bias=False, p=0.25)
    nn.init.ones_(layer.weight)
    out = layer(torch.eye(64))  # its rows are the columns of the masked weight
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.04
    same = layer(torch.ones(5, 64))
    assert (same == same[0]).all()
    layer(torch.eye(64)).sum().backward()
    assert layer.weight.grad.unique().tolist() == [0.0, pytest.approx(4 / 3)]


def squares_in(gone, size):
    """Whether what is gone is a union of squares."""
    whole = -F.max_pool2d(-gone[None, None].float(), size, stride=1)  # 1 where a whole square begins
    again = F.max_pool2d(F.pad(whole, (size - 1,) * 4), size, stride=1)
    return torch.equal(again[0, 0], gone.float())


@pytest.mark.parametrize("size", [2, 3])
def test_dropblock_drops_squares_that_differ_between_channels(size):
    torch.manual_seed(0)
    out = DropBlock2d(0.2, size)(torch.ones(2, 4, 12, 10))
    gone = out == 0
    assert gone.any()
    for maps in gone:
        assert all(squares_in(one, size) for one in maps)
        assert len({one.numpy().tobytes() for one in maps}) > 1
    for example in out:  # what is left is scaled by what was kept of this example
        assert float(example.mean()) == pytest.approx(1, abs=1e-5)
        assert len(example.unique()) == 2


@pytest.mark.parametrize(
    ("rate", "size", "fraction"), [(0.1, 7, 0.094), (0.25, 7, 0.21), (0.3, 1, 0.3), (0.3, 28, 0.3)]
)
def test_how_much_dropblock_drops(rate, size, fraction):
    torch.manual_seed(0)
    out = DropBlock2d(rate, size)(torch.ones(150, 32, 28, 28))
    assert abs(float((out == 0).float().mean()) - fraction) < 0.01


def test_dropblock_of_half_precision_and_of_one_example():
    torch.manual_seed(0)
    out = DropBlock2d(0.2, 3)(torch.ones(64, 40, 40, dtype=torch.float16))  # more than 65,504 activations
    assert out.dtype == torch.float16
    assert torch.isfinite(out).all()
    assert abs(float(out.float().mean()) - 1) < 1e-3


def test_dropblock_may_drop_all_of_a_small_example():
    torch.manual_seed(0)
    out = DropBlock2d(0.9, 4)(torch.ones(40, 1, 4, 4))
    assert set(out.unique().tolist()) == {0.0, 1.0}


def test_dropblock_refuses_squares_that_do_not_fit():
    with pytest.raises(InputError, match="a size of at most 4"):
        DropBlock2d(0.1, 5)(torch.ones(1, 1, 4, 9))
    with pytest.raises(InputError, match="1 or more"):
        DropBlock2d(0.1, 0)
    with pytest.raises(InputTypeError, match="a whole number"):
        DropBlock2d(0.1, 2.0)
    with pytest.raises(InputError, match=re.escape("[channels, height, width]")):
        DropBlock2d(0.1, 2)(torch.ones(4, 9))


def test_stochastic_depth_drops_whole_examples():
    torch.manual_seed(0)
    out = StochasticDepth(0.25)(torch.ones(4000, 2, 3))
    assert (out == out[:, :1, :1]).all()
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert abs(float((out[:, 0, 0] == 0).float().mean()) - 0.25) < 0.03
    assert all(len(StochasticDepth(0.5, per_batch=True)(torch.ones(9, 2)).unique()) == 1 for _ in range(9))
    with pytest.raises(InputError, match=re.escape("give it [batch, ...]")):
        StochasticDepth(0.5)(torch.tensor(1.0))


def test_targeted_dropout_drops_the_smallest_weights_of_each_row_only():
    torch.manual_seed(0)
    layer = TargetedDropout(10, 40, p=0.5, target=0.25, bias=False)
    assert layer.targets().sum(1).tolist() == [3] * 40  # 2.5, rounded up
    sizes = layer.weight.detach().abs()
    assert (sizes[layer.targets()].view(40, 3).amax(1) <= sizes[~layer.targets()].view(40, 7).amin(1)).all()
    weights = torch.stack([layer(torch.eye(10)).T.detach() for _ in range(400)])
    gone = weights == 0
    assert not gone[:, ~layer.targets()].any()
    assert abs(float(gone[:, layer.targets()].float().mean()) - 0.5) < 0.02
    assert torch.equal(torch.where(gone, 0, layer.weight.detach()), weights)  # not scaled


def test_targeted_dropout_of_units():
    torch.manual_seed(0)
    layer = TargetedDropout(10, 8, p=0.5, target=0.5, units=True, bias=False)
    with torch.no_grad():
        layer.weight[::2] *= 0.01
    assert layer.targets().all(1).tolist() == [True, False] * 4
    gone = torch.stack([(layer(torch.eye(10)).T == 0) for _ in range(200)])
    assert torch.equal(gone.all(2), gone.any(2))  # whole rows
    assert not gone[:, 1::2].any()
    assert abs(float(gone[:, ::2].float().mean()) - 0.5) < 0.06


@pytest.mark.parametrize(("target", "error"), [(0, InputError), (1.5, InputError), ("all", InputTypeError)])
def test_targets_outside_are_refused(target, error):
    with pytest.raises(error, match="give the fraction of weights that may be dropped"):
        TargetedDropout(4, 4, p=0.5, target=target)
