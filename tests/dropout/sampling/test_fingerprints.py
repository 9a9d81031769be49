"""What may change between two calls, of a model, its inputs or the output that is asked for."""

import copy
import functools
import operator
import types
import warnings

import pytest
import torch
from sampling_cases import Out, SelfAttention, X, exact, half, mlp, near, sample, seeded
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, linear

from secateur.dropout.sampling.monte_carlo import _PLANS
from secateur.dropout.sampling.passes import Run
from secateur.errors import InputError, SecateurWarning

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


def test_outputs_that_look_alike():
    """By one code or type, but not by what they take."""
    model = seeded(lambda s, x: (s.drop(s.a(x)), s.drop(s.a(x))[:, :3]), a=linear, drop=nn.Dropout)
    right = [exact(model, X, 6, operator.itemgetter(i)) for i in range(2)]
    for make in (
        operator.itemgetter,
        lambda i: lambda out, i=i: out[i],
        lambda i: lambda out: out[i],
        lambda i: lambda out, *, i=i: out[i],
        lambda i: functools.partial(lambda i, out: out[i], i),
    ):
        for i in (0, 1, 0, 1):
            assert near(sample(model, X, n=6, output=make(i)).samples, right[i])


def test_a_lambda_at_each_call_is_one_plan():
    model = seeded(lambda s, x: {"a": s.drop(x)}, drop=nn.Dropout)
    plans = []
    for _ in range(3):
        sample(model, X, output=lambda out: out["a"])
        plans += _PLANS[model].values()
    assert plans[0] is plans[1] is plans[2]


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_shapes(shape):
    model, x = mlp(), torch.randn(shape)
    for _ in range(2):
        assert near(sample(model, x, n=9).samples, exact(model, x, 9))


def test_other_shapes_and_dtypes_by_turns():
    model = mlp()
    for _ in range(2):
        for x in (X, X[:2], X[:2].unsqueeze(1), X.half().float(), X.expand(3, 4, 8), X.T.contiguous().T):
            assert near(sample(model, x, n=6).samples, exact(model, x, 6))
    model.double()
    assert near(sample(model, X.double(), n=6).samples, exact(model, X.double(), 6))
    model.bfloat16()
    assert near(sample(model, X.bfloat16(), n=6).samples, exact(model, X.bfloat16(), 6))


def test_tuples_and_dicts():
    model = seeded(lambda s, x, y, scale=1.0: s.a(s.drop(x * y)) * scale, a=linear, drop=nn.Dropout)
    right = sample(model, (X, X + 1, 2.0)).samples
    assert near(sample(model, {"x": X, "y": X + 1, "scale": 2.0}).samples, right)
    assert near(sample(model, {"x": X, "y": X + 1, "scale": 1.0}).samples * 2, right)  # a value, not a shape
    assert near(sample(model, {"x": X, "y": X + 1}).samples * 2, right)


def test_lengths_of_other_values():
    """Dropout calls whose shape follows from what is in the inputs."""
    model, (x, lengths), _ = next(entry for entry in ZOO if entry.name == "packed LSTM").build()
    for values in (lengths, torch.tensor([5, 5, 5, 5]), torch.tensor([1, 1, 1, 1]), lengths):
        for _ in range(2):
            assert near(sample(model, (x, values), n=6).samples, exact(model, (x, values), 6))


def test_rows_chosen_by_a_mask():
    def forward(self, x, chosen):
        rows = self.drop(self.a(x[chosen]))
        return torch.zeros(4, 8).index_add(0, chosen.nonzero()[:, 0], rows)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        for chosen in ([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]):
            inputs = X, torch.tensor(chosen, dtype=torch.bool)
            for _ in range(2):
                assert near(sample(model, inputs, n=6).samples, exact(model, inputs, 6))


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        x = torch.randn(4, 2, 4)
        model = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), linear(), nn.Dropout(0.5), linear()).eval()
        inside = sample(model, x, n=6).samples
    assert near(sample(model, x, n=6).samples, inside)
    assert near(sample(model, x.clone(), n=6).samples, inside)


def freeze(config):
    config.p = 0.1


CHANGES = {
    "rate": (mlp, lambda m: setattr(m[2], "p", 0.1)),
    "weights in place": (mlp, half),
    "weights through .data": (mlp, lambda m: setattr(m[0].weight, "data", m[0].weight.data * 2)),
    "weights exchanged": (mlp, lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight.detach() * 2))),
    "module exchanged": (mlp, lambda m: m.__setitem__(1, nn.ReLU())),
    "dropout exchanged": (mlp, lambda m: m.__setitem__(2, nn.AlphaDropout(0.5))),
    "dropout added": (mlp, lambda m: m.append(nn.Dropout(0.2))),
    "hook": (mlp, lambda m: m[0].register_forward_hook(lambda mod, args, out: F.dropout(out, 0.5))),
    "forward": (mlp, lambda m: setattr(m[1], "forward", lambda x: F.dropout(x, 0.5).relu())),
    "list of rates": (
        lambda: seeded(
            lambda s, x: s.a(F.dropout(F.dropout(x, s.r[0], s.training), s.r[1], s.training)), a=linear, r=[0.5, 0.0]
        ),
        lambda m: m.r.__setitem__(1, 0.4),
    ),
    "settings": (
        lambda: seeded(
            lambda s, x: F.scaled_dot_product_attention(
                s.a(x)[None], s.a(x)[None], s.a(x)[None], dropout_p=s.cfg.p if s.training else 0.0
            )[0],
            a=linear, cfg=types.SimpleNamespace(p=0.5),
        ),
        lambda m: setattr(m.cfg, "p", 0.1),
    ),
    "settings in a dict": (
        lambda: seeded(
            lambda s, x: F.scaled_dot_product_attention(
                s.a(x)[None], s.a(x)[None], s.a(x)[None], dropout_p=s.cfg["attention"]["p"] if s.training else 0.0
            )[0],
            a=linear, cfg={"attention": {"p": 0.5}},
        ),
        lambda m: m.cfg["attention"].update(p=0.1),
    ),
    "rate of an LSTM": (
        lambda: Out(nn.LSTM(8, 8, 2, dropout=0.5)).eval(),
        lambda m: setattr(m.inner, "dropout", 0.1),
    ),
    "rate of attention": (
        lambda: Out(SelfAttention(nn.MultiheadAttention(8, 2, dropout=0.5))).eval(),
        lambda m: setattr(m.inner.mha, "dropout", 0.1),
    ),
    "a branch": (
        lambda: seeded(lambda s, x: s.a(s.drop(x)) if s.flag else s.drop(s.a(x)), a=linear, drop=nn.Dropout, flag=True),
        lambda m: setattr(m, "flag", False),
    ),
    "dtype": (
        lambda: seeded(lambda s, x: s.a(s.drop(x.to(s.a.weight))), a=linear, drop=nn.Dropout),
        lambda m: m.double(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_stale(change):
    make, alter = CHANGES[change]
    model = make()
    before = sample(model, X, n=6).samples
    assert near(sample(model, X, n=6).samples, before)
    alter(model)
    model.eval()
    after = sample(model, X, n=6).samples
    assert before.dtype != after.dtype or not near(after, before)
    right = exact(model, X, 6)
    assert near(after, right)
    assert near(sample(model, X, n=6).samples, right)


def test_a_rate_of_hugging_face():
    for name in ("BERT, eager", "BERT, sdpa", "GPT-2, eager", "GPT-2, sdpa", "ViT, sdpa"):
        model, inputs, output = next(entry for entry in ZOO if entry.name == name).build()
        before = sample(model, inputs, n=60, output=output).std.mean()
        for module in model.modules():
            for place in ("dropout", "attn_dropout"):
                part = getattr(module, place, None)
                if type(module).__name__.endswith("Attention") and isinstance(part, nn.Dropout):
                    part.p = 0.9
            for place in ("dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, place, None), float):
                    setattr(module, place, 0.9)
        after = sample(model, inputs, n=60, output=output)
        assert near(after.samples[:4], exact(model, inputs, 4, output))
        assert after.std.mean() > 1.1 * before, name


def test_a_rate_that_becomes_0():
    model = mlp()
    sample(model, X)
    model[2].p = 0.0
    with pytest.raises(InputError, match=r"no dropout.*1 call drops nothing"):
        sample(model, X)
    model[2].p = 0.2
    sample(model, X)


def test_copies_of_a_sampled_model():
    model = mlp()
    right = sample(model, X, n=6).samples
    assert near(sample(copy.deepcopy(model), X, n=6).samples, right)


def test_two_plans_do_not_mix():
    """n, shared and memory by turns."""
    model = mlp()
    for _ in range(2):
        for n, shared, room in ((6, False, 2**30), (6, True, 2**30), (9, False, 5000), (9, True, 5000)):
            got = sample(model, X, n=n, shared=shared, max_memory=room).samples
            assert near(got, exact(model, X, n, shared=shared))


def test_the_second_call_looks_for_nothing(monkeypatch):
    model = mlp()
    sample(model, X)
    monkeypatch.setattr(Run, "look", lambda self: pytest.fail("looked again"))
    sample(model, X)
    sample(model, X + 1, seed=4)
    half(model)
    sample(model, X)
