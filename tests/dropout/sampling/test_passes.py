"""Passes: masks of a whole batch, outputs, rates, memory."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from sampling_cases import (
    WAYS,
    Out,
    SelfAttention,
    X,
    exact,
    mlp,
    near,
    planned,
    sample,
    seeded,
    taken,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map
from zoo import ZOO, Model, bits, first, fresh, linear, rest, scripted, sequences, vectors

import secateur as sc
from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.sampling.monte_carlo import _PLANS, _agree
from secateur.errors import InputError, InputTypeError
from secateur.measurement.costs import peak_bytes

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


@pytest.mark.parametrize("n", [2, 3, 50, 51])
@pytest.mark.parametrize("room", [2**30, 40_000, 8_000])
def test_chunks_change_nothing(n, room):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    right = exact(model, X, n)
    assert near(sample(model, X, n=n, max_memory=room).samples, right)
    assert near(sample(model, X, n=n, max_memory=room).samples, right)
    ((plan),) = _PLANS[model].values()
    assert plan.chunk <= n
    assert plan.chunk * 64 * 4 * 4 <= room


def test_a_larger_batch_has_smaller_chunks():
    """The plan for a small one is none for it."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    chunks = []
    for batch in (1, 40):
        sample(model, torch.ones(batch, 8), n=50, max_memory=60_000)
        chunks += [plan.chunk for plan in _PLANS[model].values()]
    assert chunks[1] * 40 * 64 * 4 <= 60_000 < 50 * 40 * 64 * 4


def test_the_peak_stays_within_the_room():
    model = nn.Sequential(nn.Linear(8, 512), nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    x = torch.randn(64, 8)

    class Samples(nn.Module):
        def forward(self):
            return sample(model, x, n=40, max_memory=2**21).samples

    sample(model, x, n=40, max_memory=2**21)
    assert peak_bytes(Samples(), ((), {})) < 2 * 2**21 + 40 * 64 * 8 * 4 * 3


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SHARED = {
    "Linear": (mlp, X),
    "in place": (lambda: nn.Sequential(linear(), nn.Dropout(0.3, inplace=True), linear()), X),
    "Dropout2d": (lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.Dropout2d(0.3), nn.Flatten()), _normal(4, 2, 5, 5)),
    "LSTM": (lambda: Out(nn.LSTM(8, 8, 3, dropout=0.5, batch_first=True)), _normal(4, 5, 8)),
    "LSTM, time first": (lambda: Out(nn.LSTM(8, 8, 3, dropout=0.5), time=True), _normal(5, 4, 8)),
    "GRU, time as long as the batch": (lambda: Out(nn.GRU(8, 8, 2, dropout=0.5), time=True), _normal(4, 4, 8)),
    "attention": (
        lambda: Out(SelfAttention(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))), _normal(4, 5, 8),
    ),
    "attention, time first": (
        lambda: Out(SelfAttention(nn.MultiheadAttention(8, 2, dropout=0.5)), True), _normal(5, 4, 8),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), _normal(4, 5, 8)),
    "flattened, batch first": (
        lambda: Model(lambda s, x: s.d(s.a(x).flatten(0, 1)).unflatten(0, (-1, 5)).sum(1), a=linear(), d=nn.Dropout()),
        _normal(4, 5, 8),
    ),
    "DropConnect": (lambda: nn.Sequential(sc.dropout.DropConnect(8, 8, p=0.5), linear()), X),
    "StochasticDepth": (lambda: nn.Sequential(linear(), sc.dropout.StochasticDepth(0.5), linear()), X),
    "LockedDropout": (lambda: sc.dropout.LockedDropout(0.5, batch_first=True), _normal(4, 5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_one_mask_for_the_batch(name):
    """Identical rows have identical samples; of one element, those of shared=False."""
    make, x = SHARED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    axis = 1 if "time" in name else 0
    same = x.select(axis, 0).unsqueeze(axis).expand_as(x).contiguous()
    got = sample(model, same, shared=True, n=12).samples
    assert len({bits(one) for one in got}) == 12 or "Depth" in name
    assert near(got, got[:, :1].expand_as(got).contiguous(), 1e-5, columns=False)
    for way in WAYS:
        with undisturbed():
            run = planned(model, same, None, shared=True)
            try:
                other = taken(run, way, range(12), 12, False)
            except Exception:
                continue
            if near(other, got, 1e-5, columns=False) or not _agree((other,), (exact(model, same, 2, shared=True),)):
                continue
            pytest.fail(f"{way} is wrong, and is taken")
    one = same.narrow(axis, 0, 1)
    if name != "GRU, time as long as the batch":
        assert near(sample(model, one, n=12).samples, got[:, :1], 1e-5, columns=False)


LAYOUTS = [
    "packed",
    "time and batch flattened",
    "heads and batch flattened",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_mask_for_the_batch_or_an_error(name):
    """Where the layout does not show which rows belong together, there are no samples rather than wrong ones."""

    def packed(self, x):
        x = x.transpose(0, 1)
        packed = pack_padded_sequence(x, torch.tensor([5] * (len(x) // 2) + [5] * (len(x) - len(x) // 2)), True)
        return pad_packed_sequence(self.lstm(packed)[0], True)[0].sum(1)

    def flat(self, x):
        return self.drop(self.a(x).flatten(0, 1)).unflatten(0, (5, -1)).sum(0)

    def heads(self, x):
        heads = self.a(x[0]).unflatten(-1, (2, 4)).transpose(0, 1).flatten(0, 1)
        return self.drop(heads).unflatten(0, (2, -1)).sum(0)

    forward = {"packed": packed, "time and batch flattened": flat, "heads and batch flattened": heads}[name]
    model = seeded(forward, a=linear, drop=nn.Dropout, lstm=lambda: nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True))
    x = torch.randn(5, 1, 8).repeat(1, 3, 1)
    with contextlib.suppress(InputError):
        got = sample(model, x, shared=True).samples
        assert near(got, got[:, :1].expand_as(got).contiguous(), 1e-5, columns=False)


@pytest.mark.parametrize("others", [2, 4, 40])
def test_the_batch_among_other_sizes(others):
    model = Model(lambda s, x, table: s.b(s.d(s.a(x))) @ table.T, a=linear(), b=linear(), d=nn.Dropout(0.5)).eval()
    got = sample(model, (X[:1].repeat(3, 1), torch.randn(others, 8)), shared=True, n=5).samples
    assert near(got, got[:, :1].expand_as(got).contiguous(), 1e-5, columns=False)


def test_shared_without_a_batch():
    model = seeded(lambda s, x: s.drop(s.a(x)).mean(0, keepdim=True), a=linear, drop=nn.Dropout)
    with pytest.raises(InputError, match="shared=True needs to know"):
        sample(model, X, shared=True)


def test_output_of_logits_of_hugging_face():
    model, inputs, output = next(entry for entry in ZOO if entry.name == "GPT-2, sdpa").build()
    with pytest.raises(InputError, match=r"of logits.*output=lambda out: out\['logits'\]"):
        sample(model, inputs)
    got = sample(model, inputs, output=output, n=4).samples
    assert got.shape == (4, 4, 6, 30)
    assert near(sample(model, inputs, output=lambda out: out["logits"], n=4).samples, got)


@pytest.mark.parametrize("given", [tuple, list, dict])
def test_an_answer_that_is_no_tensor(given):
    pairs = {"left": 0, "right": 1}
    model = seeded(
        lambda s, x: {name: s.drop(s.a(x)) for name in pairs} if given is dict else given([s.drop(s.a(x)), x]),
        a=linear, drop=nn.Dropout,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"not a tensor: say what to take.*output=lambda out: out\["):
        sample(model, X)
    with pytest.raises(InputTypeError, match=r"output= gave a str.*tensor"):
        sample(model, X, output=lambda answer: "left")
    assert sample(model, X, output=lambda answer: answer["left"] if given is dict else answer[0]).samples.ndim == 3


def test_mean_and_variance():
    def forward(self, x):
        hidden = self.drop(self.a(x))
        return hidden, F.softplus(self.b(hidden))

    model = seeded(forward, a=linear, b=linear, drop=nn.Dropout)
    got = sample(model, X, output=lambda pair: pair, n=20)
    assert near(got.samples, exact(model, X, 20, first))
    assert near(got.noise, exact(model, X, 20, lambda pair: pair[1]))
    assert got.aleatoric.shape == got.epistemic.shape == (4, 8)
    with pytest.raises(InputError, match="not a tensor"):
        sample(model, X)


@pytest.mark.parametrize("what", ["argmax", "bool", "complex"])
def test_classes_have_no_spread(what):
    def forward(self, x):
        hidden = self.drop(x)
        return {"argmax": hidden.argmax(-1), "bool": hidden > 0, "complex": torch.complex(hidden, hidden)}[what]

    with pytest.raises(InputTypeError, match=r"floating-point.*logits rather than classes"):
        sample(seeded(forward, drop=nn.Dropout), X)


@pytest.mark.parametrize("shape", [(0, 8), (0, 5, 8)])
def test_an_empty_batch(shape):
    with pytest.raises(InputError, match="empty"):
        sample(mlp(), torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(linear()), r"no dropout to take samples of; train it with nn\.Dropout"),
        (lambda: nn.Sequential(linear(), nn.Dropout(0.0)), r"no dropout.*1 call drops nothing: rate 0"),
        (lambda: Model(lambda s, x: F.dropout(x, 0.5, False)), r"1 call drops nothing.*off in training too"),
        (lambda: Model(lambda s, x: F.dropout(x) if s.training else x), r"reach is dropout \(line.*self\.training"),
        (lambda: Model(lambda s, x: x * torch.rand(()) if s.training else x), r"out of reach is rand \(line"),
        (lambda: nn.LSTM(8, 8, 2), r"no dropout"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0), r"no dropout.*4 calls drop nothing"),
    ],
)  # fmt: skip
def test_no_dropout(make, message):
    model = make().eval()
    before = rest(model)
    with pytest.raises(InputError, match=message):
        sample(model, X, output=first)
    assert rest(model) == before


def test_a_scripted_model():
    model = scripted(mlp())
    with pytest.raises(InputError, match=r"no dropout.*torch\.jit runs it.*before torch\.jit\.script"):
        sample(model, X)


RATES = {
    "nn.Dropout": lambda p: nn.Sequential(linear(), nn.Sequential(nn.Dropout(p))),
    "F.dropout": lambda p: nn.Sequential(linear(), Model(lambda s, x: F.dropout(x, s.p, s.training), p=p)),
    "torch.dropout": lambda p: nn.Sequential(linear(), Model(lambda s, x: torch.dropout(x, s.p, s.training), p=p)),
    "alpha": lambda p: nn.Sequential(linear(), nn.Sequential(nn.AlphaDropout(p))),
    "LSTM": lambda p: nn.Sequential(linear(), Out(nn.LSTM(8, 8, 2, dropout=p))),
    "attention": lambda p: nn.Sequential(linear(), Out(SelfAttention(nn.MultiheadAttention(8, 2, dropout=p)))),
    "by hand": lambda p: nn.Sequential(
        linear(),
        Model(lambda s, x: F.scaled_dot_product_attention(x, x, x, dropout_p=s.p if s.training else 0.0), p=p),
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_rate_1(name):
    """At which nothing would be left, and kept values would be divided by 0."""
    model = RATES[name](1.0).eval()
    x = X[None] if name == "by hand" else X
    before = rest(model)
    with pytest.raises(InputError, match=r"rate of \w+ in 1(\.\S+)? is 1\.0: give a rate of at least 0 and below 1"):
        sample(model, x)
    assert rest(model) == before


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_rates_that_are_none(rate):
    model = Model(lambda s, x: torch.dropout(x, s.p, s.training), p=rate).eval()
    with pytest.raises(
        InputError, match=r"the rate of dropout in the model is .*: give a rate of at least 0 and below 1"
    ):
        sample(model, X)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_rates_of_other_types(rate):
    right = sample(Model(lambda s, x: F.dropout(x, 0.5, s.training)).eval(), X).samples
    assert near(sample(Model(lambda s, x: F.dropout(x, rate, s.training)).eval(), X).samples, right)


def test_a_model_that_counts_in_a_buffer():
    """In eval() too: samples are no calls of the user's."""

    def forward(self, x):
        self.count += 1
        return self.drop(x)

    model = seeded(forward, drop=nn.Dropout)
    model.register_buffer("count", torch.zeros(()))
    sample(model, X)
    assert model.count == 0


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_cache_in_the_inputs():
    """Keys and values of Hugging Face, to which a forward appends."""
    model, inputs, output = next(entry for entry in ZOO if entry.name == "GPT-2, sdpa").build()
    tokens = inputs["input_ids"]
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    long = model(tokens[:, :4]).logits[:, -1:]
    given = {"input_ids": tokens[:, 3:4], "past_key_values": cache, "use_cache": True}
    got = sample(model, given, n=40, output=output)
    assert cache.get_seq_length() == 3
    assert got.samples.shape == (40, 4, 1, 30)
    assert not near(got.mean, long)


def test_fresh_copies_of_inputs_are_what_the_tests_compare_with():
    args, kwargs = fresh({"a": X})
    assert args == ()
    assert kwargs["a"] is not X
    assert bits(kwargs["a"]) == bits(X)
    assert tree_map(type, fresh(X)[0]) == (torch.Tensor,)
    assert Unsuitable.__mro__[1] is Exception
    assert sequences().shape == (4, 5, 8)
    assert vectors().shape == (4, 8)


class Stateful(nn.Module):
    """Keeps what it computes and reads it again, in eval() too; in between, another thread may have its turn."""

    def __init__(self, write, read, pause):
        super().__init__()
        self.a, self.drop, self.b = linear(), nn.Dropout(0.5), linear()
        self.write, self.read, self.pause = write, read, pause
        self.kept, self.state = {}, None
        self.register_buffer("buffer", torch.zeros(4, 8))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.write(self, self.drop(self.a(x)))
        self.pause()
        return self.b(self.read(self))


KEPT = {
    "written into a buffer": (lambda m, x: m.buffer.copy_(x), lambda m: m.buffer * 1.0),
    "a new buffer": (lambda m, x: setattr(m, "buffer", x), lambda m: m.buffer),
    "an attribute": (lambda m, x: setattr(m, "state", x), lambda m: m.state),
    "in a dict": (lambda m, x: m.kept.update(x=x), lambda m: m.kept["x"]),
}


@pytest.mark.parametrize(("name", "shared"), [*((name, False) for name in KEPT), ("an attribute", True)])
def test_a_model_that_writes_into_itself_is_asked_while_it_is_sampled(name, shared):
    answers = []

    def plain_call():
        with torch.no_grad():
            answers.append(model(X))

    def pause():
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=plain_call)
            other.start()
            other.join()

    model = Stateful(*KEPT[name], lambda: None).eval()
    plain_call()
    right, model.pause = answers.pop(), pause
    samples = sample(model, X, n=5, shared=shared).samples
    assert answers
    assert all(torch.equal(answer, right) for answer in answers)
    assert model.count == 1 + len(answers)
    model.pause = lambda: None
    assert near(sample(model, X, n=5, shared=shared).samples, samples)
