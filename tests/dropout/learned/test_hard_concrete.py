"""A gate for each unit, channel or head: hard concrete gates."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.dropout import noise
from secateur.dropout.learned import finish, hard_concrete, penalty, to_masks, to_scores
from secateur.dropout.learned.hard_concrete import drawn, probability, settled
from secateur.errors import InputError, InputTypeError


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 6, num_layers=2, bidirectional=True, **options)

    def forward(self, x):
        return self.rnn(x)[0]


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(3, 6)

    def forward(self, x):
        state = None
        for row in x:
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


class Heads(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True, **options)

    def forward(self, x):
        seen = x[..., : self.attention.kdim]
        seen = x if seen.shape == x.shape else seen
        return self.attention(x, seen, seen, need_weights=False)[0]


CASES = {
    "Linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "Linear without bias": (lambda: nn.Linear(5, 6, bias=False), (4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "Conv1d": (lambda: nn.Conv1d(2, 6, 3), (2, 2, 5)),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 2, 3)),
    "LSTM with projections": (lambda: Recurrent(nn.LSTM, proj_size=4), (5, 2, 3)),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 2, 3)),
    "RNN": (lambda: Recurrent(nn.RNN), (5, 2, 3)),
    "RNN without bias": (lambda: Recurrent(nn.RNN, bias=False), (5, 2, 3)),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), (5, 2, 3)),
    "GRUCell": (lambda: Cell(nn.GRUCell), (5, 2, 3)),
    "attention": (Heads, (2, 5, 8)),
    "attention of other keys": (lambda: Heads(kdim=4, vdim=4), (2, 5, 8)),
    "attention with added rows": (lambda: Heads(add_bias_kv=True, add_zero_attn=True), (2, 5, 8)),
}


def gated(case, seed=0):
    """A model in eval() whose gates are off, between, and fully on."""
    torch.manual_seed(seed)
    build, shape = CASES[case]
    model = build().eval()
    for parameter in model.parameters():  # biases of attention begin at 0
        nn.init.normal_(parameter, std=0.5)
    rates = hard_concrete(model, n_data=10, scope=sc.weights(model))
    with torch.no_grad():
        for value in rates.parameters():
            value.copy_(torch.linspace(-4, 4, len(value))[torch.randperm(len(value))])
    return model, rates, torch.randn(shape)


ONEDNN = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@ONEDNN
@pytest.mark.parametrize("case", CASES)
def test_folding_is_exact(case):
    model, _, x = gated(case)
    with torch.no_grad():
        before = model(x)
    with_grad = model(x).detach()
    masks = finish(model)
    with torch.no_grad():
        after = model(x)
    assert torch.allclose(before, after, atol=1e-6)
    assert torch.allclose(with_grad, after, atol=1e-6)
    assert masks.pruned > 0
    for name, parameter in model.named_parameters():
        if name in masks:
            zeros = parameter[~masks[name]]
            assert not zeros.any()
            assert not torch.signbit(zeros).any()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@ONEDNN
@pytest.mark.parametrize("case", CASES)
def test_gates_change_what_the_model_computes(case):
    model, rates, x = gated(case)
    with torch.no_grad():
        among = model(x)
        rates.remove()
        assert not torch.allclose(among, model(x), atol=1e-3)


@ONEDNN
@pytest.mark.parametrize("case", CASES)
def test_in_training_gates_are_drawn_and_learn(case):
    model, rates, x = gated(case)
    model.train()
    assert not torch.equal(model(x), model(x))
    (model(x).square().sum() + penalty(model)).backward()
    assert all(float(value.grad.abs().sum()) > 0 for value in rates.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_unit_whose_gate_is_off_is_zero_at_every_step(kind):
    torch.manual_seed(0)
    rnn = kind(3, 4)
    rates = hard_concrete(rnn, n_data=10)
    with torch.no_grad():
        rates.value("l0").copy_(torch.tensor([5.0, -5.0, 5.0, -5.0]))
    rnn.eval()
    x = torch.randn(7, 2, 3)
    assert not rnn(x)[0][..., [1, 3]].any()
    assert rnn(x)[0][..., [0, 2]].all()
    finish(rnn)
    assert not rnn(x)[0][..., [1, 3]].any()


def test_a_head_whose_gate_is_off_gives_nothing():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4)
    rates = hard_concrete(attention, n_data=10)
    with torch.no_grad():
        rates.value("").copy_(torch.tensor([5.0, -5.0, 5.0, 5.0]))
    masks = finish(attention)
    assert masks.counts() == {"in_proj_weight": 3 * 2 * 8, "in_proj_bias": 3 * 2}
    assert not attention.in_proj_weight.view(3, 4, 2, 8)[:, 1].any()
    assert attention.in_proj_weight.view(3, 4, 2, 8)[:, [0, 2, 3]].all()


@pytest.mark.parametrize("p", [-3.0, -1.0, 0.0, 2.0])
def test_probability_is_that_of_drawn_gates(p):
    torch.manual_seed(0)
    log_alpha = torch.full((200_000,), p)
    gates = drawn(log_alpha, torch.rand(200_000))
    assert float((gates != 0).double().mean()) == pytest.approx(float(probability(torch.tensor(p))), abs=0.005)
    assert 0 <= float(gates.min()) <= float(gates.max()) <= 1


def test_settled_gates_run_from_zero_to_one():
    assert settled(torch.tensor([-10.0, -2.4, -2.39, 0.0, 2.5])).tolist() == pytest.approx(
        [0, 0, 0.0006, 0.5, 1], abs=1e-3
    )
    assert settled(torch.tensor(-2.4)) == 0
    assert settled(torch.tensor(-2.39)) > 0


def test_the_penalty_counts_expected_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 5), nn.Linear(5, 2))
    rates = hard_concrete(model, n_data=100, strength=2.0, rate=0.3)
    assert set(rates.rates) == {"0", "1.l0"}
    open_ = probability(torch.tensor(0.7 / 0.3).log()).item()
    size = 4 * 3 + 3 + sum(p.numel() for p in model[1].parameters())
    assert penalty(model).item() == pytest.approx(2.0 / 100 * size * open_, rel=1e-5)


def test_by_default_the_last_layer_has_no_gates_but_may_get_them():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    rates = hard_concrete(model, n_data=10)
    assert list(rates.rates) == ["0"]
    rates.remove()
    rates = hard_concrete(model, n_data=10, scope=sc.weights(model, only="2"))
    assert list(rates.rates) == ["2"]
    rates.remove()
    with pytest.raises(InputError, match="name the layers, scope="):
        hard_concrete(nn.Linear(2, 2), n_data=10)
    recurrent = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 5, num_layers=2))
    assert list(hard_concrete(recurrent, n_data=10).rates) == ["0", "1.l0", "1.l1"]


def test_any_tensor_stands_for_its_layer():
    model = nn.ModuleList([nn.LSTM(3, 5, num_layers=2, bidirectional=True), nn.MultiheadAttention(8, 2)])
    scope = sc.weights(model, only=["0.weight_hh_l1_reverse", "1.out_proj.weight"])
    rates = hard_concrete(model, n_data=10, scope=scope)
    assert list(rates.rates) == ["0.l1_reverse", "1"]
    assert set(to_masks(model)) == {
        *(f"0.{kind}_l1_reverse" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        "1.in_proj_weight",
        "1.in_proj_bias",
    }


def test_a_layer_that_has_no_units_to_gate_is_refused():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Linear(3, 3))
    with pytest.raises(InputError, match=r"0\.weight.*not for ConvTranspose2d: leave it out"):
        hard_concrete(model, n_data=10, scope=sc.weights(model))
    assert not model[1]._forward_hooks


def test_scores_prune_whole_units_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    rates = hard_concrete(model, n_data=10)
    with torch.no_grad():
        rates.value("0").copy_(torch.randn(8))
    lowest = rates.value("0").argsort()[:3].tolist()
    scores = to_scores(model)
    assert list(scores) == ["0.weight", "2.weight"]
    assert scores["2.weight"].min() > scores["0.weight"].max()  # it has no gates, and goes last
    rates.remove()
    masks = sc.prune(model, sc.Count(30), score=scores, scope=sc.weights(model, only=list(scores)))
    assert masks.pruned == 30
    assert (~masks["0.weight"]).all(1).nonzero().flatten().tolist() == sorted(lowest)


def test_noise_reaches_a_model_in_eval_while_it_is_sampled():
    model, _, x = gated("LSTM")
    token = noise.SAMPLING.set(True)
    try:
        assert not torch.equal(model(x), model(x))
    finally:
        noise.SAMPLING.reset(token)
    assert torch.equal(model(x), model(x))


def test_units_that_are_not_needed_are_found():
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = x[:, :1] + (x[:, 1:2] > 0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    rates = hard_concrete(model, n_data=512, strength=3.0, rate=0.5)
    optimizer = torch.optim.Adam(
        [{"params": model.parameters(), "lr": 0.01}, {"params": rates.parameters(), "lr": 0.1}]
    )
    for _ in range(800):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean() / 0.05 + penalty(model)).backward()
        optimizer.step()
    finish(model)
    left = int(model[0].weight.any(1).sum())
    assert 2 <= left <= 16
    assert (model(x) - y).square().mean().item() < 0.1


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"rate": 1.0}, InputError, "above 0 and below 1"),
        ({"strength": 0}, InputError, "such as 1.0"),
        ({"strength": "strong"}, InputTypeError, "such as 1.0"),
        ({"n_data": None}, InputTypeError, "number of training examples"),
    ],
)
def test_values_that_cannot_be_used(options, error, remedy):
    with pytest.raises(error, match=remedy):
        hard_concrete(nn.LSTM(2, 2), **{"n_data": 10, **options})
