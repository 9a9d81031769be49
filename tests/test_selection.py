"""secateur.selection: bit for bit what a stable sort of all scores gives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import selection
from secateur.errors import InputError
from secateur.scores import elementwise, magnitude
from secateur.streams import Stream
from secateur.support import bits
from secateur.support.process_groups import ALONE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def ranks(stream):
    """The scores of a stream as a plain reader would compute them, flat, in double precision."""
    found = stream.values.detach().reshape(-1)
    found = (found if stream.score is None else stream.score(stream.name, found)).double()
    if stream.kept is not None:
        found = found.masked_fill(~bits.unpack(stream.kept, len(found)), -math.inf)
    found[list(stream.protected)] = math.inf
    return found


def by_sort(streams, *counts):
    """For each count the kept flags of each stream: the first `count` of a stable sort go."""
    scores = [ranks(stream) for stream in streams]
    order = torch.cat(scores).sort(stable=True).indices
    for count in counts:
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[order[:count]] = False
        yield list(kept.split([len(s) for s in scores]))


def by_selection(streams, count):
    cut = selection.threshold(streams, count)
    found = []
    for stream in streams:
        packed, pruned = selection.keep(stream, cut)
        flags = bits.unpack(packed, stream.values.numel())
        assert pruned == int((~flags).sum())
        assert bits.count(packed) == int(flags.sum())
        found.append(flags)
    return found


def bracket(low, high):
    """In the place of the one that the sample gives."""

    def ends(streams, count, dtype, digit):
        yield from ()
        return selection._key(low, dtype), selection._key(high, dtype)

    return ends


def require_same(streams, *counts):
    for count, want in zip(counts, by_sort(streams, *counts), strict=True):
        got = by_selection(streams, count)
        assert sum(int((~flags).sum()) for flags in got) == count
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@st.composite
def streams_and_count(draw):
    """Several small tensors of few values and any dtype, some weights gone already, some protected; a legal count."""
    streams, most = [], 0
    for i in range(draw(st.integers(1, 5))):
        seed, size = draw(st.integers(0, 10**6)), draw(st.integers(0, 60))
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(-3, 4, (size,), generator=generator) * draw(st.sampled_from([1.0, 0.25, 1e-45, 1e30]))
        if draw(st.booleans()):
            values = torch.randn(size, generator=generator)
        dtype = draw(st.sampled_from(DTYPES))
        if dtype == torch.float16:
            values = values.clamp(-60_000, 60_000)
        kept = protected = None
        if draw(st.booleans()):
            kept = torch.rand(size, generator=generator) < 0.7
        if draw(st.booleans()):
            first = draw(st.integers(0, size))
            protected = range(first, draw(st.integers(first, size)))
        score = None if not dtype.is_complex and draw(st.booleans()) else magnitude
        streams.append(
            Stream(f"t{i}", values.to(dtype), score, None if kept is None else bits.pack(kept), protected or range(0))
        )
        most += size - len(protected or ())
    return streams, draw(st.integers(0, most))


@given(
    streams_and_count(),
    st.sampled_from([8, 16, 1 << 18]),
    st.sampled_from([2, 3, 7, 1 << 16]),
    st.sampled_from([1, 4, 10]),
    st.sampled_from([1 << 12, 1 << 20]),
    st.sampled_from([0, 9, 1 << 20]),
)
@settings(deadline=None, max_examples=300)
def test_like_a_stable_sort(case, chunk, sample, digit, cells, few):
    streams, count = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK", chunk)
        patch.setattr(selection, "_SAMPLE", sample)  # a few samples: the bracket is used, and often wrong
        patch.setattr(selection, "_SIGMAS", 0.5)
        patch.setattr(selection, "WIDE", digit)
        patch.setattr(selection, "_CELLS", cells)
        patch.setattr(selection, "_FEW", few)
        require_same(streams, count)


@given(streams_and_count(), st.data())
@settings(deadline=None, max_examples=100)
def test_exact_whatever_the_bracket(case, data):
    streams, count = case
    ends = st.sampled_from([-math.inf, math.inf, -4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 1e31])
    low = data.draw(ends)
    high = data.draw(ends.filter(lambda value: value >= low))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_bracket", bracket(low, high))
        require_same(streams, count)


BIG = 4 * 65_536 + 2 * (1 << 18) + 4_321  # above the sampling threshold, several chunks, no multiple of 8


def adversarial():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(BIG, generator=g)
    yield "normal", normal
    yield "all equal", torch.full((BIG,), 0.1)
    yield "two values", torch.where(normal > 0, 1.0, -1e-3)
    yield "ascending", torch.linspace(-1, 1, BIG)
    yield "descending", torch.linspace(1, -1, BIG)
    yield "99 % zeros", torch.where(normal > 2.3263, normal, 0.0)
    yield "zeros of both signs", torch.where(normal > 0, 0.0, -0.0)
    yield "denormals", (normal * 100).round() * 1e-45
    yield "huge", (normal * 1e37).round()
    yield "coarse", (normal * 8).round()
    sparse = torch.zeros(BIG)
    sparse[::70_001] = -torch.arange(1.0, len(sparse[::70_001]) + 1)  # rare low ones, which no sample meets
    yield "rare", sparse


@pytest.mark.parametrize(("kind", "values"), list(adversarial()), ids=[kind for kind, _ in adversarial()])
def test_large_and_adversarial(kind, values):
    parts = [values[:300_003].view(3, -1), values[300_003:300_010], values[300_010:]]
    for score in (None, magnitude):
        streams = [Stream(f"t{i}", part, score) for i, part in enumerate(parts)]
        require_same(streams, 1, BIG // 2, BIG - 1)


def test_large_with_weights_gone_protected_and_of_several_dtypes():
    g = torch.Generator().manual_seed(1)
    values = torch.randn(BIG, generator=g)
    kept = bits.pack(torch.rand(400_000, generator=g) < 0.3)
    streams = [
        Stream("half", values[:400_000].bfloat16().view(-1, 8), magnitude, kept),
        Stream("pads", values[400_000:600_000].view(200, 1000), magnitude, protected=range(3000, 4000)),
        Stream("double", values[600_000:].double(), magnitude),
        Stream("turned", values[:90_000].view(300, 300).t(), magnitude),
    ]
    require_same(streams, 100, 700_000, BIG - 1000 + 90_000)
    with pytest.raises(InputError, match="protect less"):
        selection.threshold(streams, BIG - 1000 + 90_000 + 1)


@pytest.mark.parametrize("end", ["low", "high"])
def test_ties_at_the_ends_of_the_bracket(monkeypatch, end):
    values = torch.zeros(BIG)
    values[: BIG // 3], values[-BIG // 3 :] = -1.0, 1.0
    values = values[torch.randperm(BIG, generator=torch.Generator().manual_seed(2))]
    monkeypatch.setattr(selection, "_bracket", bracket(0.0, 0.5) if end == "low" else bracket(-0.5, 0.0))
    require_same([Stream("t", values)], BIG // 2)


@pytest.mark.parametrize("ends", [(-9.0, -8.0), (8.0, 9.0), (0.1, 0.1), (-math.inf, -7.0), (7.0, math.inf)])
def test_a_misleading_sample_costs_time_and_nothing_else(monkeypatch, ends):
    values = torch.randn(BIG, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(selection, "_bracket", bracket(*ends))
    require_same([Stream("t", values)], BIG // 2)


@pytest.mark.parametrize("digit", [selection.NARROW, selection.WIDE])
def test_the_bracket_really_holds_the_cut_and_little_else(digit):
    values = torch.randn(BIG, generator=torch.Generator().manual_seed(4))
    finding = selection._bracket([Stream("t", values)], BIG // 2, torch.float32, digit)
    low, high = (selection._float(key, torch.float32) for key in selection.run([finding], ALONE)[0])
    inside = int(((values > low) & (values < high)).sum())
    assert low < float(values.sort().values[BIG // 2 - 1]) < high
    assert 0 < inside < 0.06 * BIG


def test_any_number_of_threads_and_any_chunk(monkeypatch):
    values = (torch.randn(BIG, generator=torch.Generator().manual_seed(5)) * 50).round()
    streams = [Stream("a", values[:600_000].view(600, -1).t(), magnitude), Stream("b", values[600_000:], magnitude)]
    first, threads = next(by_sort(streams, BIG // 3)), torch.get_num_threads()
    try:
        for number, chunk in ((1, 1 << 18), (2, 1 << 18), (4, 1 << 16), (3, 1000)):
            torch.set_num_threads(number)
            monkeypatch.setattr(bits, "CHUNK", chunk)
            assert all(torch.equal(a, b) for a, b in zip(by_selection(streams, BIG // 3), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_values_that_differ_in_double_precision_only():
    values = 1 + torch.arange(20, 0, -1, dtype=torch.float64) * 1e-14
    require_same([Stream("d", values, magnitude), Stream("f", torch.ones(5), magnitude)], 9)


def test_a_score_of_ones_own_is_ranked_in_double_precision():
    @elementwise
    def fine(name, weight):
        return 1 + weight.double() * 1e-14

    require_same([Stream("t", torch.arange(30.0).flip(0), fine)], 11)


def test_the_bf16_copy_gets_the_same_mask():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(6)).bfloat16()
    for count in (1, 777, 4500):
        half, full = (by_selection([Stream("t", v, magnitude)], count)[0] for v in (values, values.float()))
        assert torch.equal(half, full)


def test_fewer_than_are_gone_already_takes_only_those():
    kept = torch.tensor([True, False, True, False, False])
    flags = by_selection([Stream("t", torch.arange(5.0), None, bits.pack(kept))], 2)[0]
    assert flags.tolist() == [True, False, True, False, True]


def test_nothing_to_prune():
    assert by_selection([Stream("t", torch.zeros(9))], 0)[0].all()
    assert by_selection([Stream("t", torch.zeros(0)), Stream("u", torch.zeros(3))], 3)[1].tolist() == [False] * 3


def test_infinite_scores_protect():
    scores = torch.tensor([math.inf, 1.0, math.inf, 0.0])
    assert by_selection([Stream("t", scores)], 2)[0].tolist() == [True, False, True, False]
    with pytest.raises(InputError, match=r"3 weights of t were to be pruned.*ask for less"):
        selection.threshold([Stream("t", scores)], 3)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_an_elementwise_score_that_cannot_rank(bad):
    @elementwise
    def score(name, weight):
        return torch.where(weight > 3, bad, weight)

    with pytest.raises(InputError, match=r"score of fc\.weight holds NaN or -inf"):
        selection.threshold([Stream("fc.weight", torch.arange(6.0), score)], 2)


@pytest.mark.parametrize("count", range(25))
def test_groups_of_one_size_are_ranked_as_groups_of_several_are(count):
    one, other = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.5, 3.0, 2.0])
    streams = [Stream("a", one, group=3), Stream("b", other, group=3)]
    cut = selection.threshold(streams, min(count, 21))
    mixed = selection.threshold([*streams, Stream("c", torch.tensor([9.0]), group=2)], min(count, 21))
    kept, same = ([selection.keep(stream, each) for stream in streams] for each in (cut, mixed))
    assert [packed.tolist() for packed, _ in kept] == [packed.tolist() for packed, _ in same]
    assert sum(pruned for _, pruned in kept) == (2 * min(count, 21) + 3) // 6


def test_groups_go_whole_to_the_nearest_count():
    streams = [Stream("a", torch.tensor([1.0, 5.0]), group=3), Stream("b", torch.tensor([2.0, 3.0]), group=4)]
    for count, want in ((1, []), (2, [1]), (3, [1]), (5, [1, 2]), (7, [1, 2]), (8, [1, 2]), (9, [1, 2, 3])):
        flags = by_selection(streams, count)
        gone = sorted(v for s, f in zip(streams, flags, strict=True) for v in s.values[~f].tolist())
        assert gone == want, count
