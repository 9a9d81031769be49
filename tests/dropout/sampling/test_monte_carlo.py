"""sample: what a plain loop in train() gives, one sample at a time; whatever the way, the chunk, the order of calls."""

import warnings

import pytest
import torch
from sampling_cases import FREE, X, exact, mlp, near, sample, seeded, zoo
from torch import nn
from zoo import ZOO, loop, rest, untouched

import secateur as sc
from secateur.errors import InputError, InputTypeError, SecateurWarning, StateError

# of few samples some outputs have none in which they were dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard deviation:secateur.errors.SecateurWarning"),
]


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


def test_eval_only():
    model = mlp()
    sample(model, X)
    model.train()
    with pytest.raises(StateError, match=r"training mode: call model\.eval\(\) first"):
        sample(model, X)
    model.eval()
    sample(model, X)


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
