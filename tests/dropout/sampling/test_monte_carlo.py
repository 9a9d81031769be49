"""sample: what a plain loop in train() gives, one sample at a time; whatever the way, the chunk, the order of calls."""

import contextlib
import copy
import functools
import gc
import operator
import random
import subprocess
import sys
import types
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from zoo import ZOO, Model, answer, bits, first, fresh, linear, loop, rest, sequences, untouched, vectors

import secateur as sc
from secateur.dropout.interception.followers import Unsuitable
from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.sampling.monte_carlo import _PLANS, _agree
from secateur.dropout.sampling.passes import Run
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError
from secateur.measurement.costs import peak_bytes
from secateur.support.inputs import arguments

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]
sample = sc.dropout.sample
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
WAYS = "alone", "mapped", "folded"

FREE = [entry for entry in ZOO if entry.free]
ONE_BY_ONE = {
    "in place, into a view",
    "added in place to what came before",
    "added in place to the input",
    "a branch on a value",
}
"""Models of which no way takes several samples a pass."""


def zoo(entries):
    return pytest.mark.parametrize("entry", entries, ids=[entry.name for entry in entries])


def mlp(p=0.5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(linear(), nn.Tanh(), nn.Dropout(p), linear()).eval()


def seeded(forward, **parts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(forward, **{name: part() if callable(part) else part for name, part in parts.items()}).eval()


def planned(model, inputs, output=None, seed=0, shared=False):
    run = Run(model, arguments(inputs), output, seed, shared)
    run.look()
    return run


def exact(model, inputs, n, output=None, seed=0, shared=False):
    """Samples one by one, each in a full pass."""
    with undisturbed():
        run = planned(model, inputs, output, seed, shared)
        return torch.cat([run.some("exact", [i])[0] for i in range(n)])


def in_steps(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def taken(run, way, samples, size, replay):
    """Samples in one of the ways, a few a pass."""
    parts = in_steps(samples, 1 if way == "alone" else size)
    return torch.cat([run.some(way, part, replay=replay)[0] for part in parts])


def near(got, right, accuracy=None, columns=True):
    """Equal to rounding, in each column of the last dimension."""
    if accuracy is None:
        accuracy = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[right.dtype]
    assert got.shape == right.shape
    assert got.dtype == right.dtype
    finite = right.isfinite()
    assert torch.equal(got[~finite], right[~finite])
    got, right = (t.double().where(finite, 0).reshape(-1, right.shape[-1]) for t in (got, right))
    bound = accuracy * (right.abs().amax(0) if columns else right.abs().max())
    return bool(((got - right).abs() <= bound).all())


# ---- every model of the zoo -------------------------------------------------------------------------------------


@zoo(FREE)
def test_no_way_and_no_chunk_changes_a_sample(entry):
    """Each way gives what a full pass gives, or is refused: by itself, or by the check of the first two samples."""
    model, inputs, output = entry.build()
    several = []
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = planned(model, inputs, output)
        right = torch.cat([run.some("exact", [i])[0] for i in range(7)])
        assert len({bits(one) for one in right}) >= 4  # of StochasticDepth there are not many
        for way in WAYS:
            try:
                got = taken(run, way, range(7), 7, replay=False)
            except Exception:
                continue
            if not near(got, right):
                assert not _agree((got,), (right[:2],)), f"{way} is wrong, and is taken"
                continue
            several += [way] * (way != "alone")
            for size, replay in ((2, False), (3, True), (7, True)):
                if replay and entry.name == "a scripted part without noise":
                    continue  # what it computes is not seen, so it cannot be played back
                assert near(taken(run, way, range(7), size, replay), right), f"{way}, {size} a pass, replay={replay}"
            assert near(taken(run, way, [5, 2, 6], 3, False), right[[5, 2, 6]])
    assert (entry.name in ONE_BY_ONE) == (not several)


@zoo(FREE)
def test_sample_gives_what_full_passes_give(entry):
    """At the first call, at the second, which follows a plan, in small chunks, and the first of more samples."""
    model, inputs, output = entry.build()
    right = exact(model, inputs, 9, output)
    for n in (9, 9, 4):
        got = sample(model, inputs, n=n, output=output).samples
        assert near(got, right[:n])
    assert not near(sample(model, inputs, n=9, output=output, seed=1).samples, right)


@zoo(FREE)
def test_each_call_alone_moves_the_output(entry):
    """None of those that are found is met in vain."""
    model, inputs, output = entry.build()
    with undisturbed():
        run = planned(model, inputs, output)
        calls = run.plan.calls
        still = answer(model, inputs, output)
        for place, call in enumerate(calls):
            one = (
                {place} if call.kind not in ("lstm", "gru") else {i for i, c in enumerate(calls) if c.kind == call.kind}
            )
            if call.rate != 0:
                run.plan.calls = [c if i in one else replace(c, rate=0.0) for i, c in enumerate(calls)]
                assert any(not torch.equal(run.some("exact", [i])[0][0], still) for i in range(8)), call


@zoo(FREE)
def test_the_first_20_of_50(entry):
    model, inputs, output = entry.build()
    few = sample(model, inputs, n=20, output=output, seed=3).samples
    assert near(sample(model, inputs, n=50, output=output, seed=3).samples[:20], few)
    assert near(sample(model, inputs, n=50, output=output, seed=3).samples[:20], few)


@zoo(ZOO)
@pytest.mark.filterwarnings("ignore:sample leaves noise out:secateur.errors.SecateurWarning")
def test_the_model_stays_as_it_was(entry):
    with untouched(entry) as (model, inputs, output):
        for _ in range(2):
            sample(model, inputs, n=5, output=output)


def compare(entry, n, groups):
    """Mean difference of log std, and its standard error; the largest z of the means."""
    model, inputs, output = entry.build()
    ours = sample(model, inputs, n=n, output=output, seed=1).samples.double()
    theirs = loop(model, inputs, output, n).double()
    moving = theirs.std(0) > 0
    assert torch.equal(moving, ours.std(0) > 0)
    ours, theirs = ours[:, moving], theirs[:, moving]
    spread = theirs.std(0)
    z = (ours.mean(0) - theirs.mean(0)) / (spread * (2 / n) ** 0.5)
    stds = torch.stack([s.unflatten(0, (groups, -1)).std(1) for s in (ours, theirs)])
    stds = stds[:, :, (stds > 0).all(0).all(0)]
    ratios = (stds[0] / stds[1]).log().mean(1)
    whole = (ours.std(0) / spread).mean() - 1
    return float(ratios.mean()), float(ratios.std() / groups**0.5), float(z.abs().max()), float(whole)


@zoo([entry for entry in FREE if entry.name != "compiled"])
def test_mean_and_std_are_those_of_a_loop_in_training(entry):
    ratio, error, z, _ = compare(entry, 160, 8)
    assert abs(ratio) < max(6 * error, 0.02)
    assert z < 6


@pytest.mark.slow
@zoo([entry for entry in FREE if entry.name != "compiled"])
def test_std_within_3_percent_of_4000_passes(entry):
    ratio, error, z, whole = compare(entry, 4000, 20)
    assert abs(whole) < 0.03
    assert abs(ratio) < max(5 * error, 0.005)
    assert z < 6


# ---- seeds and masks --------------------------------------------------------------------------------------------


def test_seeds():
    model = mlp()
    again = [sample(model, X, seed=7).samples for _ in range(3)]
    assert torch.equal(again[1], again[2])
    assert near(again[0], again[1])
    seeds = [sample(model, X, seed=seed).samples for seed in (0, 1, 2, 2**32, 2**63, -1)]
    assert len({bits(one[0]) for one in seeds}) == len(seeds)


def test_neighbours_have_nothing_in_common():
    """Sample i of one seed is no sample of the next, and the streams do not correlate."""
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    a, b = (sample(model, torch.ones(1, 2000), n=30, seed=seed).samples.squeeze(1) - 1 for seed in (0, 1))
    both = torch.cat([a, b])
    correlation = (both @ both.T / 2000).fill_diagonal_(0)
    assert correlation.abs().max() < 0.12


def test_no_seed_follows_the_global_generator():
    model = mlp()
    torch.manual_seed(0)
    a, b = sample(model, X, seed=None).samples, sample(model, X, seed=None).samples
    assert not near(a, b)
    torch.manual_seed(0)
    assert near(sample(model, X, seed=None).samples, a)


def test_a_seed_leaves_the_global_generators_alone():
    model = mlp()
    states = bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())
    sample(model, X)
    sample(model, X, seed=5)
    assert (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())) == states


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_masks_do_not_depend_on_the_default_dtype(default):
    model = nn.Sequential(nn.Dropout(0.3)).eval()
    right = sample(model, X).samples
    torch.set_default_dtype(default)
    try:
        got = sample(model, X).samples
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, right)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_rate_of_what_is_dropped(rate):
    model = nn.Sequential(nn.Dropout(rate)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        got = sample(model, torch.ones(50, 100), n=20, seed=2).samples
    error = (rate * (1 - rate) / got.numel()) ** 0.5
    assert abs(float((got == 0).double().mean()) - rate) < 5 * error
    kept = got[got != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_each_element_of_a_batch_has_its_own_masks():
    model = mlp()
    got = sample(model, X[:1].expand(3, -1)).samples
    assert len({bits(row) for row in got[0]}) == 3
    assert torch.corrcoef(got[:, :, 0].T).triu(1).abs().max() < 0.8


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


@pytest.mark.parametrize("room", [2**30, 8_000])
def test_progress_is_shown_if_asked(room, capsys):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8)).eval()
    for _ in range(2):  # without a plan, and with one
        assert near(sample(model, X, n=20, max_memory=room, progress=True).samples, exact(model, X, 20))
        out, err = capsys.readouterr()
        assert out == ""
        assert "samples" in err
        assert "20/20" in err
    sample(model, X, n=20, max_memory=room)
    assert capsys.readouterr() == ("", "")


# ---- shared masks -----------------------------------------------------------------------------------------------


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SHARED = {
    "Linear": (mlp, X),
    "in place": (lambda: nn.Sequential(linear(), nn.Dropout(0.3, inplace=True), linear()), X),
    "Dropout2d": (lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.Dropout2d(0.3), nn.Flatten()), _normal(4, 2, 5, 5)),
    "LSTM": (lambda: _Out(nn.LSTM(8, 8, 3, dropout=0.5, batch_first=True)), _normal(4, 5, 8)),
    "LSTM, time first": (lambda: _Out(nn.LSTM(8, 8, 3, dropout=0.5), time=True), _normal(5, 4, 8)),
    "GRU, time as long as the batch": (lambda: _Out(nn.GRU(8, 8, 2, dropout=0.5), time=True), _normal(4, 4, 8)),
    "attention": (lambda: _Out(_Self(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True))), _normal(4, 5, 8)),
    "attention, time first": (lambda: _Out(_Self(nn.MultiheadAttention(8, 2, dropout=0.5)), True), _normal(5, 4, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), _normal(4, 5, 8)),
    "flattened, batch first": (
        lambda: Model(lambda s, x: s.d(s.a(x).flatten(0, 1)).unflatten(0, (-1, 5)).sum(1), a=linear(), d=nn.Dropout()),
        _normal(4, 5, 8),
    ),
    "DropConnect": (lambda: nn.Sequential(sc.dropout.DropConnect(8, 8, p=0.5), linear()), X),
    "StochasticDepth": (lambda: nn.Sequential(linear(), sc.dropout.StochasticDepth(0.5), linear()), X),
    "LockedDropout": (lambda: sc.dropout.LockedDropout(0.5, batch_first=True), _normal(4, 5, 8)),
}  # fmt: skip


class _Out(nn.Module):
    def __init__(self, inner, time=False):
        super().__init__()
        self.inner, self.time = inner, time

    def forward(self, x):
        return self.inner(x)[0].transpose(0, 1) if self.time else self.inner(x)[0]


class _Self(nn.Module):
    def __init__(self, mha):
        super().__init__()
        self.mha = mha

    def forward(self, x):
        return self.mha(x, x, x)


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


# ---- outputs and inputs -----------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match=r"no tensor: say what to take.*output=lambda out: out\["):
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
    with pytest.raises(InputError, match="no tensor"):
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


# ---- what may change between two calls --------------------------------------------------------------------------


def half(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


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
        lambda: _Out(nn.LSTM(8, 8, 2, dropout=0.5)).eval(),
        lambda m: setattr(m.inner, "dropout", 0.1),
    ),
    "rate of attention": (
        lambda: _Out(_Self(nn.MultiheadAttention(8, 2, dropout=0.5))).eval(),
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
    with pytest.raises(InputError, match=r"no dropout.*1 calls drop nothing"):
        sample(model, X)
    model[2].p = 0.2
    sample(model, X)


def test_eval_only():
    model = mlp()
    sample(model, X)
    model.train()
    with pytest.raises(StateError, match=r"training mode: call model\.eval\(\) first"):
        sample(model, X)
    model.eval()
    sample(model, X)


# ---- errors and warnings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(linear()), r"no dropout to take samples of; train it with nn\.Dropout"),
        (lambda: nn.Sequential(linear(), nn.Dropout(0.0)), r"no dropout.*1 calls drop nothing: their rate is 0"),
        (lambda: Model(lambda s, x: F.dropout(x, 0.5, False)), r"1 calls drop nothing.*off in training too"),
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(mlp())
    with pytest.raises(InputError, match=r"no dropout.*torch\.jit runs it.*before torch\.jit\.script"):
        sample(model, X)


RATES = {
    "nn.Dropout": lambda p: nn.Sequential(linear(), nn.Sequential(nn.Dropout(p))),
    "F.dropout": lambda p: nn.Sequential(linear(), Model(lambda s, x: F.dropout(x, s.p, s.training), p=p)),
    "torch.dropout": lambda p: nn.Sequential(linear(), Model(lambda s, x: torch.dropout(x, s.p, s.training), p=p)),
    "alpha": lambda p: nn.Sequential(linear(), nn.Sequential(nn.AlphaDropout(p))),
    "LSTM": lambda p: nn.Sequential(linear(), _Out(nn.LSTM(8, 8, 2, dropout=p))),
    "attention": lambda p: nn.Sequential(linear(), _Out(_Self(nn.MultiheadAttention(8, 2, dropout=p)))),
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
    with pytest.raises((InputError, RuntimeError)):
        sample(model, X)


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_rates_of_other_types(rate):
    right = sample(Model(lambda s, x: F.dropout(x, 0.5, s.training)).eval(), X).samples
    assert near(sample(Model(lambda s, x: F.dropout(x, rate, s.training)).eval(), X).samples, right)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"n": 1}, ValueError, "n is 1: give 2 or more"),
        ({"n": 0}, ValueError, "n is 0"),
        ({"n": -3}, ValueError, "n is -3"),
        ({"n": 2.0}, TypeError, r"n is 2\.0: give a whole number"),
        ({"n": True}, TypeError, "n is True"),
        ({"seed": 1.5}, TypeError, r"seed is 1\.5: give a whole number, or None"),
        ({"seed": "a"}, TypeError, "seed is 'a'"),
        ({"seed": True}, TypeError, "seed is True"),
        ({"max_memory": 0}, ValueError, "max_memory is 0"),
        ({"max_memory": 1e9}, TypeError, r"max_memory is 1000000000\.0"),
        ({"max_memory": 10}, ValueError, r"max_memory is 10 bytes, and one sample takes [\d,]+: give more"),
    ],
)
def test_bad_options(options, kind, message):
    model = mlp()
    before = rest(model, X)
    with pytest.raises(kind, match=message) as caught:
        sample(model, X, **options)
    assert isinstance(caught.value, sc.errors.SecateurError)
    assert rest(model, X) == before


def test_too_little_memory_after_a_plan():
    model = mlp()
    sample(model, X)
    with pytest.raises(InputError, match="one sample takes"):
        sample(model, X, max_memory=10)


@pytest.mark.parametrize("wrong", [None, 3, lambda x: x, "model"])
def test_no_module(wrong):
    with pytest.raises(InputTypeError, match=r"torch\.nn\.Module"):
        sample(wrong, X)


def test_calls_that_depend_on_what_is_dropped():
    def forward(self, x):
        for _ in range(50):
            x = self.drop(self.a(x))
            if x.abs().max() < 0.2:
                break
            self.other(x) if x.sum() > 0 else x
        return x

    model = seeded(forward, a=linear, drop=nn.Dropout, other=nn.AlphaDropout)
    before = rest(model, X)

    def several():
        for seed in range(5):
            sample(model, X, seed=seed)

    with pytest.raises(InputError, match=r"other dropout calls.*must not depend on what is dropped"):
        several()
    assert rest(model, X) == before


def test_noise_out_of_reach_is_named():
    for entry in ZOO:
        if not entry.free:
            model, inputs, output = entry.build()
            for _ in range(2):  # of a plan too
                with pytest.warns(SecateurWarning, match="sample leaves noise out") as caught:
                    sample(model, inputs, n=3, output=output)
                told = " ".join(str(one.message) for one in caught)
                for path, what in entry.named:
                    assert f"{what} " in told
                    assert f"in {path or 'the model'}" in told
                assert all(one.filename == __file__ for one in caught)


def test_a_std_of_exactly_0_is_explained():
    model = seeded(lambda s, x: torch.cat([s.drop(x), x], 1), drop=nn.Dropout)
    with pytest.warns(
        SecateurWarning, match=r"of 32 of 64 outputs is exactly 0.*do not depend on dropout.*dropout in drop"
    ):
        got = sample(model, X)
    assert (got.std[:, 8:] == 0).all()
    assert (got.std[:, :8] > 0).all()
    nothing = seeded(lambda s, x: (s.drop(x), x)[1], drop=nn.Dropout)
    with pytest.warns(SecateurWarning, match=r"32 of 32 outputs is exactly 0.*do not depend on any dropout.*drop"):
        sample(nothing, X)


def test_a_plain_model_warns_of_nothing():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for entry in FREE:
            model, inputs, output = entry.build()
            sample(model, inputs, n=8, output=output)
    told = [str(one.message) for one in caught]
    assert [message for message in told if "standard deviation" not in message] == []


# ---- other modes, errors and callers ----------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 6, 9, 15, 25])
def test_an_error_in_the_model(at):
    """Wherever it comes, it comes through as it is, or, where another way is left, not at all."""

    def forward(self, x):
        x = self.lstm(self.drop(self.a(x)))[0]
        self.counts[0] += 1
        if self.counts[0] > at:
            raise Boom("its own")
        return self.drop(x)

    model = seeded(forward, a=linear, drop=nn.Dropout, lstm=lambda: nn.LSTM(8, 8, 2, dropout=0.5), counts=[0])
    sc.dropout.recurrent(model, hidden=0.2)
    before = rest(model, X)

    def several():
        for n, seed in ((30, 0), (30, 0), (30, 1), (31, 0)):
            sample(model, X, n=n, seed=seed)

    with pytest.raises(Boom, match="its own"):
        several()
    after = rest(model, X)
    for part, was in before.items():
        assert after[part] == was, part
    assert torch.equal(model.a(X), model.a(X))


def test_an_interrupt_is_not_swallowed():
    def forward(self, x):
        x = self.drop(x)
        self.counts[0] += 1
        if self.counts[0] == 6:
            raise KeyboardInterrupt
        return x

    model = seeded(forward, drop=nn.Dropout, counts=[0])
    depth = torch._C._len_torch_function_stack()
    with pytest.raises(KeyboardInterrupt):
        sample(model, X)
    assert torch._C._len_torch_function_stack() == depth
    assert not sc.dropout.noise.SAMPLING.get()


def test_a_model_that_catches_everything():
    def forward(self, x):
        x = self.a(x)
        try:
            x = self.drop(x)
        except Exception:
            return x
        return self.a(x)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    assert near(sample(model, X, n=9).samples, exact(model, X, 9))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode):
    model = mlp()
    right = exact(model, X, 6)
    with mode():
        got = sample(model, X.clone(), n=6).samples
        assert torch.is_grad_enabled() is (mode is torch.enable_grad)
    assert near(got, right)
    assert not got.requires_grad
    assert not got.is_inference()


def test_no_graph_is_kept():
    model = mlp()
    x = X.clone().requires_grad_()
    assert sample(model, x).samples.grad_fn is None
    model(x).sum().backward()
    assert x.grad is not None


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_inside_another_torch_function_mode():
    for name in ("Sequential", "LSTM", "BERT, sdpa", "TransformerDecoderLayer", "LockedDropout"):
        model, inputs, output = next(entry for entry in ZOO if entry.name == name).build()
        right = exact(model, inputs, 6, output)
        with Counting() as mode:
            assert near(sample(model, inputs, n=6, output=output).samples, right)
            assert mode.count > 0
        assert torch._C._len_torch_function_stack() == 0


def test_inside_a_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(linear(), nn.Dropout(0.5), _Out(nn.LSTM(8, 8, 2, dropout=0.5))).eval()
    right = exact(model, X, 6)
    with FlopCounterMode(display=False):
        assert near(sample(model, X, n=6).samples, right)


def test_under_a_profiler():
    """There can be one only: it goes on."""
    model = mlp()
    with torch.profiler.profile() as profile:
        sample(model, X, n=6)
        model(X)
    assert len(profile.events()) > 10


def test_under_autocast():
    model = mlp()
    right = sample(model, X, n=6).samples
    with torch.autocast("cpu", torch.bfloat16):
        got = sample(model, X, n=6).samples
        assert got.dtype == torch.bfloat16
        assert near(sample(model, X, n=6).samples, got)
    assert near(got.float(), right, 3e-2)
    assert near(sample(model, X, n=6).samples, right)


def test_on_several_threads():
    """Of models that are new to it; in another process, as the profiler of torch can take this one with it."""
    code = """
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo
from torch import nn
import secateur as sc

warnings.simplefilter("ignore")
torch.set_num_threads(1)
torch.manual_seed(0)
models = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.LSTM(8, 8, 2, dropout=0.5)).eval() for _ in range(24)]
x = torch.randn(4, 8)
first = lambda answer: answer[0]
with ThreadPoolExecutor(4) as pool:
    got = list(pool.map(lambda i: sc.dropout.sample(models[i], x, n=6, output=first).samples, range(24)))
    again = list(pool.map(lambda i: sc.dropout.sample(models[0], x, n=6, output=first, seed=i % 2).samples, range(24)))
for i in range(24):
    assert torch.allclose(got[i], sc.dropout.sample(models[i], x, n=6, output=first).samples, atol=1e-6)
    assert torch.allclose(again[i], again[i % 2], atol=1e-6)
assert torch._dynamo.eval_frame._stance.stance == "default"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore:sample leaves noise out:secateur.errors.SecateurWarning")
def test_a_sample_of_a_model_that_samples():
    """A model inside which another one is sampled."""
    inner = mlp()
    model = seeded(lambda s, x: s.drop(x) + sample(inner, X, n=4).mean, drop=nn.Dropout)
    right = sample(inner, X, n=4).mean
    got = sample(model, X, n=4).samples
    assert near(got, exact(model, X, 4), 1e-5)
    assert torch.allclose(sample(inner, X, n=4).mean, right)


def test_inside_compiled_code():
    """torch.compile cannot trace it."""
    model = mlp()
    right = sample(model, X, n=6).samples
    torch.compiler.reset()
    compiled = torch.compile(lambda x: sample(model, x, n=6).samples * 2, backend="eager")
    with pytest.raises(StateError, match="outside of the compiled"):
        compiled(X)
    assert near(sample(model, X, n=6).samples, right)


def test_a_compiled_model_goes_on_compiled():
    torch.compiler.reset()
    model = torch.compile(mlp(), backend="eager")
    plain = mlp()
    model(X)
    assert near(sample(model, X, n=6).samples, exact(plain, X, 6))
    assert torch.equal(model(X), plain(X))


# ---- state of the model -----------------------------------------------------------------------------------------


def test_no_leak():
    for name in ("Sequential", "LSTM", "recurrent", "concrete", "BERT, sdpa"):
        model, inputs, output = next(entry for entry in ZOO if entry.name == name).build()
        sample(model, inputs, n=6, output=output)
        sc.dropout.find(model, inputs)
        watched = [weakref.ref(model), *(weakref.ref(module) for module in model.modules())]
        del model
        gc.collect()
        assert all(ref() is None for ref in watched), name


def test_no_tensors_stay_behind():
    model = mlp()
    sample(model, X, n=6)
    gc.collect()
    before = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
    for seed in range(5):
        sample(model, X, n=6, seed=seed)
    gc.collect()
    assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) <= before


def test_copies_of_a_sampled_model():
    model = mlp()
    right = sample(model, X, n=6).samples
    assert near(sample(copy.deepcopy(model), X, n=6).samples, right)


def test_a_model_that_counts_in_a_buffer():
    """In eval() too: samples are no calls of the user's."""

    def forward(self, x):
        self.count += 1
        return self.drop(x)

    model = seeded(forward, drop=nn.Dropout)
    model.register_buffer("count", torch.zeros(()))
    sample(model, X)
    assert model.count == 0


def test_a_model_that_keeps_what_it_computed():
    def forward(self, x):
        self.before = self.a(x)
        self.after = self.drop(self.before)
        return self.a(self.after)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    right = exact(model, X, 9)
    for room in (2**30, 3000):
        for _ in range(2):
            assert near(sample(model, X, n=9, max_memory=room).samples, right)
    assert torch.equal(model.before, model.a(X))  # a tensor, not a stand-in
    model(X)
    assert torch.equal(model.after, model.before)


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


def test_writing_into_a_buffer_that_is_read():
    """A ring buffer in eval(): each sample starts from the same."""

    def forward(self, x):
        self.state.mul_(0.5).add_(self.a(x))
        return self.drop(self.state)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    model.register_buffer("state", torch.zeros(4, 8))
    got = sample(model, X, n=9).samples
    right = model.a(X).detach() * 2
    kept = got != 0
    assert near(got.where(kept, 0), (right.expand_as(got) * kept).contiguous())


def test_scale_and_offset_do_not_hide_a_leak():
    """Of a way that mixes samples, however small they are beside the output."""
    for offset, dtype in ((0.0, torch.float32), (1e4, torch.float32), (5.0, torch.bfloat16), (1e6, torch.float64)):
        model = seeded(
            lambda s, x: (s.drop(s.a(x)) - s.drop(s.a(x)).mean(0)) * 0.05 + offset, a=linear, drop=nn.Dropout
        ).to(dtype)
        x = X.to(dtype)
        for n in (6, 6, 25):
            got, right = sample(model, x, n=n).samples.double(), exact(model, x, n).double()
            rounding = torch.finfo(dtype).eps * max(offset, 1)
            assert (got - right).abs().max() <= 2 * rounding + 1e-6


def test_one_sample_does_not_decide_for_all():
    """A threshold on the whole batch, passed by a rare sample only, of a seed that comes later."""

    def forward(self, x):
        hidden = self.a(self.drop(x))
        return hidden * torch.where(hidden.abs().max() > 2.0, 0.1, 1.0)

    model = seeded(forward, a=linear, drop=nn.Dropout)
    for seed in range(8):
        assert near(sample(model, X, n=20, seed=seed).samples, exact(model, X, 20, seed=seed))


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


class Uses(TorchFunctionMode):
    """Counts the rows that meet a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.rows = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[1] is self.weight:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))


def test_what_comes_before_the_first_dropout_is_computed_once():
    model = nn.Sequential(nn.Linear(8, 200), nn.Linear(200, 8), nn.Dropout(0.5), linear()).eval()
    sample(model, X, n=64, max_memory=9000)
    ((plan),) = _PLANS[model].values()
    assert plan.chunk < 64
    with Uses(model[0].weight) as first_layer, Uses(model[3].weight) as last_layer:
        sample(model, X, n=64, max_memory=9000)
    assert first_layer.rows == len(X)
    if plan.way == "folded":
        assert last_layer.rows == 64 * len(X)


def test_fresh_copies_of_inputs_are_what_the_tests_compare_with():
    args, kwargs = fresh({"a": X})
    assert args == ()
    assert kwargs["a"] is not X
    assert bits(kwargs["a"]) == bits(X)
    assert tree_map(type, fresh(X)[0]) == (torch.Tensor,)
    assert Unsuitable.__mro__[1] is Exception
    assert sequences().shape == (4, 5, 8)
    assert vectors().shape == (4, 8)
