"""Ways of taking several samples in a pass: each gives what full passes give, or is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
from sampling_cases import FREE, MIXED, ONE_BY_ONE, WAYS, X, exact, near, planned, sample, seeded, taken, zoo
from torch import nn
from zoo import answer, bits, linear, rest

from secateur.dropout.interception.isolation import undisturbed
from secateur.dropout.sampling.monte_carlo import _agree
from secateur.errors import InputError

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


@zoo(FREE)
def test_no_way_and_no_chunk_changes_a_sample(entry):
    """Each way gives what a full pass gives, or is refused: by itself, or by the check of the first two samples."""
    model, inputs, output = entry.build()
    several, refused = [], []
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = planned(model, inputs, output)
        right = torch.cat([run.some("exact", [i])[0] for i in range(7)])
        assert len({bits(one) for one in right}) >= 4  # of StochasticDepth there are not many
        for way in WAYS:
            try:
                got = taken(run, way, range(7), 7, replay=False)
            except Exception as error:
                refused.append(str(error))
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
    assert (entry.name in MIXED) == any("do not stay apart" in one for one in refused)


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
