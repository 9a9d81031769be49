"""sc.recover: a pruned model says again what the dense one does, and nothing else of it changes."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InputError, MaskError, NotFiniteError, SecateurWarning


def made(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 6))


def batches(n=6, seed=1, size=64):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(12, 12, generator=generator)
    return [torch.randn(size, 12, generator=generator) @ mixed for _ in range(n)]


def pruned(sparsity=0.8):
    dense = made().eval()
    model = copy.deepcopy(dense)
    return model, dense, sc.prune(model, sparsity)


def apart(model, dense, data):
    with torch.no_grad():
        return float(sum((model(x) - dense(x)).square().mean() for x in data))


def test_outputs_come_nearer_on_other_inputs_and_zeros_stay():
    model, dense, masks = pruned()
    held = batches(seed=2)
    before = apart(model, dense, held)
    losses = sc.recover(model, dense, batches(), steps=60)
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert apart(model, dense, held) < 0.5 * before
    assert sc.check(model, masks) == {}
    assert all(not torch.signbit(w[w == 0]).any() for w in sc.weights(model).values())
    assert sc.Masks.from_zeros(model) == masks


def test_all_else_is_as_before():
    model, dense, _ = pruned()
    model.train()
    model[3].eval()
    frozen = model[5].weight.requires_grad_(False).clone()
    model[0].weight.grad = torch.ones(40, 12)
    modes = [m.training for m in (*model.modules(), *dense.modules())]
    taught = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    state = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    sc.recover(model, dense, iter(batches()), steps=8)
    assert [m.training for m in (*model.modules(), *dense.modules())] == modes
    assert torch.equal(model[5].weight, frozen)
    assert torch.equal(model[0].weight.grad, torch.ones(40, 12))
    assert model[3].weight.grad is None
    assert all(torch.equal(tensor, taught[name]) for name, tensor in dense.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert not any(m._forward_hooks for m in (*model.modules(), *dense.modules()))


def test_the_same_call_gives_the_same_weights():
    found = []
    for _ in range(2):
        model, dense, _ = pruned()
        torch.rand(3)
        sc.recover(model, dense, batches(), steps=5)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_batch_norm_keeps_its_statistics():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    dense[1].running_mean.normal_()
    model = copy.deepcopy(dense)
    sc.prune(model, 0.7)
    before = [buffer.clone() for buffer in model.buffers()]
    losses = sc.recover(model, dense, [x.unsqueeze(1) for x in batches()], steps=30)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


class Words(nn.Module):
    """Padded words, through blocks, as a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, ids, attention_mask):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        return {"states": x, "ids": ids}


def words(seed=0, rubbish=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 5, 2])
    real = torch.arange(7) < lengths[:, None]
    ids = torch.randint(1, 30, (4, 7), generator=generator)
    return {"ids": torch.where(real, ids, rubbish), "attention_mask": real.long()}


def test_blocks_are_compared_padding_is_not_and_embeddings_stay():
    torch.manual_seed(0)
    dense = Words()
    model = copy.deepcopy(dense)
    sc.prune(model, 0.7)
    other = copy.deepcopy(model)
    before = model.embed.weight.clone()
    losses = sc.recover(model, dense, [words(seed) for seed in range(3)], steps=12)
    again = sc.recover(other, dense, [words(seed, rubbish=5) for seed in range(3)], steps=12)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(again, rel=1e-3)
    assert torch.equal(model.embed.weight, before)


def test_half_precision_moves_by_less_than_a_bit_at_a_time():
    model, dense, masks = pruned()
    model, dense = model.bfloat16(), dense.bfloat16()
    losses = sc.recover(model, dense, [x.bfloat16() for x in batches()], steps=60)
    assert losses[-1] < 0.6 * losses[0]
    assert sc.check(model, masks) == {}


def test_masks_may_be_given():
    model, dense, masks = pruned()
    with torch.no_grad():
        model[3].weight.add_(0.01)  # zeros that came back
    sc.recover(model, dense, batches(), steps=3, masks=masks)
    assert sc.check(model, masks) == {}


class Sequences(nn.Module):
    """A GRU that few steps at a high rate make worse."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 32, 2, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0])


@pytest.mark.parametrize("count", [3, 12])  # held out or not
def test_what_rises_is_not_kept(count):
    torch.manual_seed(0)
    dense = Sequences()
    model = copy.deepcopy(dense)
    sc.prune(model, 0.2)
    data = [torch.randn(8, 12, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2 * count)]
    before, other = apart(model, dense, data[count:]), copy.deepcopy(model)
    losses = sc.recover(model, dense, data[:count], steps=60)
    assert max(losses[3:]) > 2 * min(losses[:3])  # it did rise
    assert apart(model, dense, data[count:]) < 0.8 * before
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.warns(SecateurWarning, match="give more steps, or a lower lr"):
        sc.recover(other, dense, data[:count], steps=2, lr=0.5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


class Last(nn.Module):
    """The last step of an LSTM."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def recovered(dense, data, held, steps=200):
    """What is left of the error, and the losses."""
    model = copy.deepcopy(dense)
    sc.prune(model, 0.7, allocation="uniform")
    before = apart(model, dense, held)
    losses = sc.recover(model, dense, data, steps=steps)
    return apart(model, dense, held) / before, losses


def test_a_last_batch_of_one_row_weighs_as_others_do():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    rows, held = torch.randn(353, 8), [torch.randn(500, 8)]
    without, _ = recovered(dense, rows[:352].split(32), held, 300)
    left, losses = recovered(dense, rows.split(32), held, 300)
    assert without < 0.5
    assert left < 1.1 * without
    assert max(losses) < 10


@pytest.mark.parametrize(("kind", "shape"), [(made, (1, 12)), (Last, (1, 9, 6))])
def test_batches_of_one_row_each(kind, shape):
    torch.manual_seed(0)
    dense = kind()
    left, losses = recovered(dense, [torch.randn(shape) for _ in range(100)], [torch.randn(200, *shape[1:])])
    assert left < 0.8
    assert max(losses) < 100


def test_one_row_that_comes_again_and_again_is_learned():
    torch.manual_seed(0)
    row = torch.randn(1, 12)
    for data in ([row], [row] * 10, [row.expand(8, 12)]):
        left, _ = recovered(made().eval(), data, [row], 60)
        assert left < 0.8


class Closed(nn.Module):
    """A module that says next to nothing, or one constant, beside another."""

    def __init__(self, activation, bias):
        super().__init__()
        torch.manual_seed(0)
        self.shut = nn.Sequential(nn.Linear(12, 16), activation, nn.Linear(16, 6))
        self.open = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 6))
        with torch.no_grad():
            self.shut[0].bias += bias
            self.shut[0].weight *= 8

    def forward(self, x):
        return self.shut(x) + self.open(x)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid()], ids=str)
@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_a_module_that_says_a_constant_does_not_outweigh_the_others(activation, bias):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(32, 12, generator=generator) for _ in range(8)]
    left, losses = recovered(Closed(activation, bias).eval(), data[:7], data[7:])
    assert left < 0.6
    assert max(losses) < 100


def test_a_batch_without_rows_says_nothing():
    model, dense, _ = pruned()
    losses = sc.recover(model, dense, [torch.randn(0, 12), *batches(3)], steps=8)
    assert losses[0] == losses[4] == 0
    assert losses[5] > 0


def test_where_all_the_dense_model_says_is_zero_nothing_is_learned():
    model, dense, _ = pruned()
    for one in (model, dense):
        nn.init.zeros_(one[5].weight), nn.init.zeros_(one[5].bias)
    assert all(loss < 100 for loss in sc.recover(model, dense, batches(), steps=8))


def test_batches_that_are_held_out_are_spread_and_not_trained_on():
    model, dense, _ = pruned()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((int(args[0][0, 0]), torch.is_grad_enabled())))
    given = batches(10)
    for i, batch in enumerate(given):
        batch[0, 0] = i
    sc.recover(model, dense, iter(given), steps=8)
    assert {i for i, trained in seen if not trained} == {2, 7}
    assert [i for i, trained in seen if trained] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert len([i for i, trained in seen if not trained]) == 2 * 9  # before, and after each step of so few


class Falling(nn.Module):
    """Fails, or gives NaN, at a call."""

    def __init__(self, at, error):
        super().__init__()
        self.inner = made()
        self.left, self.error = at, error

    def forward(self, x):
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error
        return self.inner(x) * (float("nan") if self.left == 0 else 1.0)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (ValueError("no"), InputError, "ValueError: no.*give each as a tensor"),
        (None, NotFiniteError, "look for NaN or inf in the batches, or give a lower lr"),
    ],
)
def test_after_a_failure_the_model_is_that_of_before(error, kind, words):
    dense = Falling(-1, None)
    model = Falling(3, error)
    sc.prune(model, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    with pytest.raises(kind, match=words):
        sc.recover(model, dense, batches(), steps=10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 3)

    def forward(self, x):
        return self.inner(x).argmax(-1)


@pytest.mark.parametrize(
    ("change", "kind", "remedy"),
    [
        (lambda k: {"dense": k["model"]}, InputError, "give a copy that was made before pruning"),
        (lambda k: {"dense": nn.Linear(12, 5)}, InputError, "give the dense model of the pruned one"),
        (lambda k: {"model": Ids(), "dense": Ids()}, InputError, "with outputs of floating-point numbers"),
        (lambda k: {"batches": []}, InputError, "give an iterable of at least one batch"),
        (lambda k: {"lr": 0.0}, InputError, "give a number above 0"),
        (lambda k: {"steps": 0}, InputError, "give a number of steps, 1 or more"),
        (lambda k: {"model": k["model"].requires_grad_(False)}, InputError, r"call model\.requires_grad_\(\) first"),
        (lambda k: {"masks": {"0.weight": torch.ones(2, 2, dtype=torch.bool)}}, MaskError, "for another model"),
    ],
)
def test_what_cannot_be_is_refused(change, kind, remedy):
    model, dense, _ = pruned()
    given = {"model": model, "dense": dense, "batches": batches(), "steps": 3}
    given |= change(given)
    before = {name: tensor.clone() for name, tensor in given["model"].state_dict().items()}
    with pytest.raises(kind, match=remedy):
        sc.recover(given.pop("model"), given.pop("dense"), given.pop("batches"), **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


class Told(nn.Module):
    """Makes the mask of its attention itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(x, src_key_padding_mask=x[..., 0] == 0))


def test_padding_of_which_only_the_attention_is_told_is_not_compared():
    losses = []
    for rubbish in (1.0, 50.0):
        x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
        x[:, 3:, 0] = 0
        x[:, 3:, 1:] *= rubbish
        dense = Told()
        model = copy.deepcopy(dense)
        sc.prune(model, 0.5)
        losses.append(sc.recover(model, dense, [x], steps=1)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
