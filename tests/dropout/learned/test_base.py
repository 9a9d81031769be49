"""What the methods share: the model stays itself, hooks follow copies, the bridge to pruning, errors."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import secateur as sc
from secateur.dropout import noise
from secateur.dropout.learned import (
    LearnedRates,
    attached,
    concrete,
    finish,
    hard_concrete,
    penalty,
    to_masks,
    to_scores,
    variational,
)
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError
from secateur.sparsity import fraction, half_up

pytestmark = pytest.mark.filterwarnings("ignore:concrete learns no rate:secateur.errors.SecateurWarning")


class Model(nn.Module):
    """A convolution, a recurrent layer, an attention and a Linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.lstm(self.norm(self.conv(x)).transpose(1, 2))[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


METHODS = {
    "concrete": lambda model, **options: concrete(model, n_data=100, **options),
    "variational": lambda model, **options: variational(model, n_data=100, warmup=5, log_sigma2=-4.0, **options),
    "hard_concrete": lambda model, **options: hard_concrete(model, n_data=100, **options),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


def face(model):
    """What must stay: names, identities and storages of parameters, types of modules, keys."""
    named = [(name, id(p), p.data_ptr(), type(p)) for name, p in model.named_parameters()]
    modules = [(name, id(m), type(m)) for name, m in model.named_modules()]
    flat = [id(w) for w in model.lstm._flat_weights]
    return named, modules, list(model.state_dict()), flat


def train(model, rates, x, steps=3, lr=0.01):
    optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty(model)).backward()
        optimizer.step()


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_the_model_stays_itself_before_during_and_after(method, model, x):
    start = face(model)
    rates = method(model)
    assert face(model) == start
    train(model, rates, x)
    assert face(model) == start
    finish(model)
    assert face(model) == start
    assert hooks(model) == []


def test_an_optimizer_moves_what_is_learned(method, model, x):
    rates = method(model)
    before = {name: p.detach().clone() for name, p in rates.named_parameters()}
    train(model, rates, x, steps=8)
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in rates.named_parameters())


@pytest.mark.parametrize("name", ["concrete", "variational"])
def test_in_eval_nothing_is_added(name, model, x):
    model.eval()
    plain = model(x)
    METHODS[name](model)
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        assert torch.allclose(model(x), plain, atol=1e-6)  # the fused attention
    token = noise.SAMPLING.set(True)
    try:
        assert not torch.equal(model(x), plain)
    finally:
        noise.SAMPLING.reset(token)
    assert torch.equal(model(x), plain)


def test_remove_leaves_a_plain_model(method, model, x):
    model.eval()
    plain = model(x)
    rates = method(model)
    rates.remove()
    assert torch.equal(model.train().eval()(x), plain)
    assert hooks(model) == []
    assert attached(model) == []
    method(model)  # and others may come


def test_an_error_in_the_forward_leaves_the_parameters(method, model, x):
    start = face(model)
    method(model)
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"input.size"):
        model.lstm(torch.randn(2, 3, 5))
    with pytest.raises(AssertionError, match="embedding dimension"):
        model.attention(x, x, x)
    assert face(model) == start


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_a_copy_has_hooks_and_values_of_its_own(copied, method, model, x):
    rates = method(model)
    train(model, rates, x)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    (own,) = attached(twin)
    assert isinstance(own, LearnedRates)
    assert own is not rates
    for one, other in zip(rates.parameters(), own.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one is not other
    for seed in range(2):
        torch.manual_seed(seed)
        ours = model(x)
        torch.manual_seed(seed)
        assert torch.equal(twin(x), ours)
    before = [p.detach().clone() for p in (*model.parameters(), *rates.parameters())]
    train(twin, own, x)
    assert all(torch.equal(p, b) for p, b in zip((*model.parameters(), *rates.parameters()), before, strict=True))
    start = face(twin)
    finish(twin)
    assert face(twin) == start
    assert hooks(twin) == []
    assert attached(model) == [rates]


def test_a_copy_of_the_rates_alone_works(method, model):
    rates = method(model)
    twin = copy.deepcopy(rates)
    assert twin.rates == rates.rates
    assert attached(model) == [rates]


def test_state_goes_through_state_dict(method, model, x):
    rates = method(model)
    train(model, rates, x)
    other_model = Model()
    other = method(other_model)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(rates.state_dict())
    assert other.rates == rates.rates
    for one, two in zip(to_scores(model).values(), to_scores(other_model).values(), strict=True):
        assert torch.equal(one, two)


def test_weights_that_were_assigned_are_the_ones_that_are_used(method, model, x):
    method(model)
    model.eval()
    other = Model().eval()
    model.load_state_dict(other.state_dict(), assign=True)
    start = face(model)
    rates_of_other = method(other)
    assert torch.allclose(model(x), other(x), atol=1e-6)
    assert start[0] == face(model)[0]
    assert rates_of_other.rates == attached(model)[0].rates


@pytest.mark.parametrize("sparsity", [0.5, 0.93])
def test_scores_prune_to_an_exact_count(sparsity, method, model, x):
    rates = method(model)
    train(model, rates, x)
    scores = to_scores(model)
    weights = dict(model.named_parameters())
    assert all(scores[name].shape == weights[name].shape for name in scores)
    assert list(scores) == [name for name in weights if name in scores]
    scope = sc.weights(model, only=list(scores))
    rates.remove()
    masks = sc.prune(model, sparsity, score=scores, scope=scope, allocation=sc.allocation.global_(allow_empty=True))
    assert masks.pruned == half_up(fraction(sparsity) * scope.size)
    assert sum(int((w == 0).sum()) for w in scope.values()) == masks.pruned


def test_scores_go_through_a_pruner_a_pattern_and_a_file(model, x, tmp_path):
    rates = variational(model, n_data=100, warmup=5)
    train(model, rates, x)
    scores = to_scores(model)
    scope = sc.weights(model, only=["conv.weight", "lstm*", "head.weight"])
    pruner = sc.Pruner(model, 0.8, score=scores, scope=scope, schedule=sc.linear(start=0, stop=4, every=1))
    optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()])
    pruner.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty(model)).backward()
        optimizer.step()
    masks = pruner.finish()
    rates.remove()
    assert masks.pruned == round(0.8 * scope.size)
    sc.save(model, tmp_path / "model.safetensors")
    again = Model()
    again.load_state_dict(sc.load(tmp_path / "model.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.warns(SecateurWarning, match="more zeros than asked for"):
        sc.prune(model, 0.5, score=scores, scope=sc.weights(model, only="lstm*"), pattern=sc.n_m(2, 4))


def test_masks_become_zeros_and_state_dict_keys_stay(method, model, x):
    keys = list(model.state_dict())
    rates = method(model)
    with torch.no_grad():
        for value in rates.parameters():
            value.add_(torch.randn(value.shape) * 5)
    masks = to_masks(model)
    assert 0 < masks.pruned < masks.size
    rates.remove()
    masks.apply(model)
    assert sc.check(model, masks) == {}
    assert list(model.state_dict()) == keys
    assert masks == sc.Masks(dict(masks))


def test_several_methods_may_share_a_model(model, x):
    variational(model, n_data=100, warmup=0, scope=sc.weights(model, only="lstm*"))
    one = penalty(model).item()
    concrete(model, n_data=100, scope=sc.weights(model, only=["conv", "head"]))
    assert penalty(model).item() != one
    assert len(attached(model)) == 2
    lstm = {f"lstm.{name}" for name in dict(model.lstm.named_parameters()) if "weight" in name}
    assert set(to_scores(model)) == {"conv.weight", "head.weight"} | lstm
    finish(model)
    assert attached(model) == []


def test_a_wrapped_model_keeps_the_names_of_the_inner_one(method, model):
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    method(wrapped)
    assert all(not name.startswith("module.") for name in to_scores(wrapped))


def test_a_module_used_twice_is_gated_and_a_tied_tensor_refused(method):
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))
    assert method(twice).rates
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match=r"tied to a parameter of another module.*skip="):
        method(tied)
    assert hooks(tied) == []


def test_what_cannot_learn_is_refused_before_anything_changed(method):
    with pytest.raises(InputError, match="run one batch"):
        method(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="materialise"):
        method(nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="remove_parametrizations"):
        method(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="skip="):
        method(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="nothing to prune"):
        method(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        method("a model")
    with pytest.raises(InputTypeError, match=r"give sc\.weights"):
        method(nn.Linear(2, 2), scope=["weight"])
    with pytest.raises(InputError, match=r"call sc\.weights\(model\) again"):
        method(nn.Linear(2, 2), scope=sc.weights(nn.Linear(2, 2)))


def test_learned_rates_come_once_and_go_once(method, model):
    rates = method(model)
    before = len(hooks(model))
    with pytest.raises(StateError, match=r"call remove\(\) on them first"):
        method(model)
    assert len(hooks(model)) == before
    rates.remove()
    with pytest.raises(StateError, match="must not be called again"):
        rates.remove()


def test_without_learned_rates_there_is_nothing_to_ask(method, model):
    for verb in (penalty, to_scores, to_masks, finish):
        with pytest.raises(StateError, match=r"begin with secateur\.dropout\.learned\.variational"):
            verb(model)
    method(model)
    finish(model)
    with pytest.raises(StateError, match="begin with"):
        finish(model)


def test_values_that_diverged_rank_nothing(method, model):
    rates = method(model)
    with torch.no_grad():
        next(rates.parameters()).fill_(float("nan"))
    weights = [p.detach().clone() for p in model.parameters()]
    for verb in (to_scores, to_masks, finish):
        with pytest.raises(InputError, match="lower learning rate"):
            verb(model)
    assert attached(model) == [rates]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
