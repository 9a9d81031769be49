"""Measurement: counts against hand arithmetic, verdicts on made-up timings, and a model that stays as it was."""

import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence

from secateur.errors import InputError, InputTypeError
from secateur.measurement import timing
from secateur.measurement.timing import Comparison, Measurement, compare, measure

QUICK = {"seconds": 0.002, "threads": 1}


def switches():
    """The settings of the process that a measurement changes for a while."""
    backends = torch.backends
    kernels = backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()
    memory = os.environ.get("KINETO_LOG_LEVEL"), torch.is_autocast_cache_enabled()
    return *kernels, *memory, torch.is_grad_enabled()


AT_IMPORT = switches()  # before the first measurement of this process, which might spoil them


def quick(model, inputs):
    return measure(model, inputs, **QUICK)


def made_up(*block_seconds, **fields):
    """A Measurement with the given timings, of a model with 100 weights on the CPU."""
    plain = {
        "calls": 1, "first_call_seconds": 1.0, "threads": 1, "device": "cpu", "dtype": "float32",
        "parameters": 100, "nonzeros": 100, "denormals": 0, "flushed": False, "macs": 100, "zero_macs": 0,
        "file_bytes": 400, "peak_bytes": 64,
    }  # fmt: skip
    return Measurement(tuple(block_seconds), **{**plain, **fields})


class Tagger(nn.Module):
    def __init__(self, hidden=12):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, hidden, 2, bidirectional=True, batch_first=True, dropout=0.5)
        self.head = nn.Linear(2 * hidden, 5)

    def forward(self, tokens, scale=1.0):
        return self.head(self.lstm(self.embed(tokens))[0].mean(1)) * scale


TOKENS = torch.arange(12).reshape(3, 4)


# MACs: 3 sequences of 7 steps and 10 features = 21 steps --------------------------------------------------

SEQUENCE = torch.ones(7, 3, 10)
MACS = {
    "linear": (lambda: nn.Linear(10, 20), SEQUENCE, 21 * 10 * 20),
    "conv": (lambda: nn.Conv1d(3, 6, 3), SEQUENCE, 7 * 8 * 6 * 3 * 3),
    "conv_groups": (lambda: nn.Conv1d(3, 6, 3, groups=3), SEQUENCE, 7 * 8 * 6 * 3),
    "conv_transpose": (lambda: nn.ConvTranspose1d(3, 6, 3), SEQUENCE, 7 * 10 * 3 * 6 * 3),
    "embedding": (lambda: nn.Embedding(9, 4), torch.arange(9), 0),
    "rnn": (lambda: nn.RNN(10, 20), SEQUENCE, 21 * 20 * (10 + 20)),
    "gru": (lambda: nn.GRU(10, 20), SEQUENCE, 21 * 3 * 20 * (10 + 20)),
    "lstm": (lambda: nn.LSTM(10, 20), SEQUENCE, 21 * 4 * 20 * (10 + 20)),
    "lstm_batch_first": (lambda: nn.LSTM(10, 20, batch_first=True), SEQUENCE, 21 * 4 * 20 * (10 + 20)),
    "lstm_no_bias": (lambda: nn.LSTM(10, 20, bias=False), SEQUENCE, 21 * 4 * 20 * (10 + 20)),
    "lstm_deep": (
        lambda: nn.LSTM(10, 20, 2, bidirectional=True),
        SEQUENCE,
        21 * 2 * 4 * 20 * ((10 + 20) + (40 + 20)),  # the second layer sees both directions of the first
    ),
    "lstm_projected": (lambda: nn.LSTM(10, 20, proj_size=5), SEQUENCE, 21 * (4 * 20 * (10 + 5) + 20 * 5)),
    "lstm_packed": (
        lambda: nn.LSTM(10, 20),
        pack_padded_sequence(SEQUENCE, [7, 5, 3]),
        (7 + 5 + 3) * 4 * 20 * (10 + 20),
    ),
    "lstm_cell": (lambda: nn.LSTMCell(10, 20), SEQUENCE[0], 3 * 4 * 20 * (10 + 20)),
    "gru_cell": (lambda: nn.GRUCell(10, 20), SEQUENCE[0], 3 * 3 * 20 * (10 + 20)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True),
        torch.ones(2, 5, 16),
        10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 5 * 5 * 16,  # projections, feedforward; scores and mixing
    ),
    "attention": (
        lambda: nn.MultiheadAttention(16, 4),
        (torch.ones(5, 2, 16), torch.ones(7, 2, 16), torch.ones(7, 2, 16)),
        2 * (5 + 7 + 7 + 5) * 16 * 16 + 2 * 2 * 5 * 7 * 16,
    ),
    "tagger": (Tagger, TOKENS, 12 * 2 * 4 * 12 * ((6 + 12) + (24 + 12)) + 3 * 24 * 5),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # oneDNN says that it does not know them
@pytest.mark.parametrize("case", MACS)
def test_macs_are_those_of_the_hand(case):
    build, inputs, macs = MACS[case]
    got = quick(build(), inputs)
    assert (got.macs, got.zero_macs) == (macs, 0)


def test_zero_macs_weigh_each_matrix_by_its_own_use():
    model = nn.LSTM(10, 20)
    nn.init.zeros_(model.weight_hh_l0)
    assert quick(model, SEQUENCE).zero_macs == 21 * 4 * 20 * 20
    model = nn.Sequential(nn.Linear(10, 20), nn.Flatten(), nn.Linear(60, 4))  # 21 rows, then 7
    nn.init.zeros_(model[2].weight[:1])
    got = quick(model, SEQUENCE)
    assert (got.macs, got.zero_macs) == (21 * 200 + 7 * 240, 7 * 60)
    assert got.zero_share == 420 / 5880


def test_zeros_of_activations_and_biases_are_not_weights():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
    nn.init.constant_(model[0].bias, -100.0)  # after the ReLU, everything is zero
    nn.init.zeros_(model[2].bias)
    assert quick(model, SEQUENCE).zero_macs == 0
    attention = nn.MultiheadAttention(10, 2)
    nn.init.zeros_(attention.out_proj.weight)
    assert quick(attention, (SEQUENCE, SEQUENCE, SEQUENCE)).zero_macs == 21 * 10 * 10


def test_a_weight_computed_from_parameters_is_a_weight():
    model = nn.Linear(10, 20)
    prune.l1_unstructured(model, "weight", 0.75)  # weight = weight_orig * weight_mask, at each call
    assert quick(model, SEQUENCE).zero_macs == 21 * 150
    model = nn.Linear(10, 20)
    nn.init.zeros_(model.weight[:5])
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(model, SEQUENCE).zero_macs == 21 * 50


def test_a_compiled_model_is_counted_as_what_it_was():
    assert quick(torch.compile(nn.Linear(10, 20), backend="eager"), SEQUENCE).macs == 21 * 200


def test_a_buffer_that_was_overwritten_by_inputs_is_no_weight():
    class Cache(nn.Linear):
        def __init__(self):
            super().__init__(10, 20)
            self.register_buffer("seen", torch.ones(3, 10))

        def forward(self, x):
            return super().forward(self.seen.copy_(x))

    assert quick(Cache(), torch.zeros(3, 10)).zero_macs == 0


def test_an_operator_that_torch_cannot_count_makes_macs_unknown():
    with torch.library._scoped_library("secateur_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")

        class Custom(nn.Linear):
            def forward(self, x):
                return torch.ops.secateur_test.double(super().forward(x))

        got = quick(Custom(10, 20), SEQUENCE)
    assert (got.macs, got.zero_macs, got.zero_share) == (None, None, 0.0)
    assert "unknown" in str(got)


# Weights, file, memory -------------------------------------------------------------------------------------


def test_parameters_count_tied_ones_once_and_minus_zero_as_zero():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1.0)[0] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    got = quick(model, torch.arange(3))
    assert (got.parameters, got.nonzeros) == (28, 26)
    assert got.file_bytes < 2 * 28 * 4 + 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_denormals_are_the_values_below_the_smallest_normal(dtype):
    tiny = torch.finfo(dtype).tiny
    model = nn.Linear(6, 1, bias=False).to(dtype)
    model.weight.data = torch.tensor([[tiny / 2, -tiny / 2, tiny, -tiny, 0.0, -0.0]], dtype=dtype)
    got = quick(model, torch.ones(1, 6, dtype=dtype))
    assert (got.denormals, got.nonzeros, got.trusted) == (2, 4, False)
    assert got.dtype == str(dtype).removeprefix("torch.")


def test_flushing_subnormals_restores_the_trust_but_not_the_count():
    model = nn.Linear(6, 1)
    nn.init.constant_(model.weight, 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = quick(model, torch.ones(1, 6))
    finally:
        torch.set_flush_denormal(False)
    assert (got.denormals, got.flushed, got.trusted) == (6, True, True)
    assert not quick(model, torch.ones(1, 6)).trusted


def test_file_bytes_are_those_of_the_file(tmp_path):
    from safetensors.torch import save_file

    model = Tagger().double()
    model.register_buffer("steps", torch.arange(5))
    model.head.weight = nn.Parameter(torch.randn(24, 5).double().t())  # not contiguous
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    assert quick(model, TOKENS).file_bytes == path.stat().st_size


def test_peak_is_what_lives_at_once(capfd):
    class Steps(nn.Module):
        def forward(self, x):
            doubled = x * 2  # 1 lives
            tripled = doubled + x  # 2 live
            del doubled
            return tripled * tripled  # 2 live, 1 is returned

    model = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10))
    assert quick(Steps(), torch.ones(1000)).peak_bytes == 2 * 4000
    assert quick(model, torch.ones(50, 10)).peak_bytes == 2 * 50 * 100 * 4
    assert capfd.readouterr() == ("", "")  # torch's own profiler would write to stderr


# The model stays itself ------------------------------------------------------------------------------------


class Noisy(Tagger):
    def forward(self, tokens, scale=1.0):
        return nn.functional.dropout(super().forward(tokens, scale), training=True)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails):
    torch.manual_seed(0)
    model = Noisy().train()
    model.lstm.eval()
    flags = [module.training for module in model.modules()]
    weights = [weight.clone() for weight in model.parameters()]
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    calls = []

    def metric(model):
        calls.append((any(m.training for m in model.modules()), torch.get_num_threads(), torch.is_grad_enabled()))
        return 0.5 if not fails else 1 / 0

    if fails:
        with pytest.raises(ZeroDivisionError, match="division"):
            compare({"model": model}, TOKENS, metric=metric, threads=threads + 1, seconds=0.002)
    else:
        compare({"model": model}, TOKENS, metric=metric, threads=threads + 1, seconds=0.002)
    assert calls == [(False, threads + 1, False)]
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert switches() == AT_IMPORT
    assert not nn.modules.module._global_forward_hooks


def test_backends_are_put_back_when_counting_fails():
    class Picky(nn.Linear):
        def forward(self, x):
            if not torch.backends.mha.get_fastpath_enabled():
                raise OSError("counting")
            return super().forward(x)

    with pytest.raises(OSError, match="counting"):
        quick(Picky(10, 10), SEQUENCE)
    assert switches() == AT_IMPORT
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize(
    "inputs", [TOKENS, (TOKENS,), (TOKENS, 2.0), {"tokens": TOKENS, "scale": 2.0}, OrderedDict(tokens=TOKENS)]
)
def test_forms_of_inputs(inputs):
    assert quick(Tagger(), inputs).macs == MACS["tagger"][2]


# Timing ----------------------------------------------------------------------------------------------------


class FakeTimer:
    """Stands for timeit.Timer: each call takes `model.seconds`; `log` holds what was timed."""

    log: list

    def __init__(self, stmt, globals, timer):
        self.model = globals["model"]

    def timeit(self, number):
        FakeTimer.log.append((self.model.name, number))
        return number * self.model.seconds


class Named(nn.Module):
    def __init__(self, name, seconds):
        super().__init__()
        self.name, self.seconds = name, seconds

    def forward(self, x):
        return x


@pytest.fixture
def fake_timer(monkeypatch):
    FakeTimer.log = []
    monkeypatch.setattr("timeit.Timer", FakeTimer)
    return FakeTimer


def test_blocks_are_interleaved_and_the_order_rotates(fake_timer):
    models = {name: Named(name, seconds) for name, seconds in (("a", 0.001), ("b", 0.010), ("c", 9.0))}
    result = compare(models, torch.ones(1), seconds=1.0)
    rounds = "".join(name for name, _ in fake_timer.log)[-30:]  # a block is 1 / 50 second, or one call
    assert rounds == "aabbc bbcaa caabb aabbc bbcaa caabb".replace(" ", "")  # first two calls to warm up, but for c
    assert [m.calls for m in result.measurements.values()] == [20, 2, 1]
    assert {len(m.block_seconds) for m in result.measurements.values()} == {6}  # enough for an interval


def test_the_time_asked_for_is_the_time_spent(fake_timer):
    got = measure(Named("a", 0.001), torch.ones(1), seconds=1.0)
    assert (got.calls, len(got.block_seconds)) == (20, 50)
    assert got.seconds == pytest.approx(0.001)


def test_first_call_is_apart():
    class Slow(Named):
        def forward(self, x):
            time.sleep(self.seconds)
            self.seconds = 0
            return x

    got = quick(Slow("a", 0.3), torch.ones(1))
    assert got.first_call_seconds >= 0.3
    assert max(got.interval_seconds) < 0.1


# Statistics and words on made-up timings -------------------------------------------------------------------


def test_interval_of_few_values_is_students_of_the_logarithms():
    low, high = timing.interval([1.0, math.e, math.e**2])  # their mean is 1, the standard error 1 / sqrt(3)
    assert (math.log(low), math.log(high)) == pytest.approx((1 - 2.484, 1 + 2.484), abs=1e-3)
    assert timing.interval([3.0, 3.0]) == pytest.approx((3.0, 3.0))


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (50, 18), (100, 40)])
def test_interval_takes_the_ranks_of_the_textbook(n, rank):
    values = list(range(1, n + 1))
    assert timing.interval(values[::-1]) == (rank, n + 1 - rank)


@given(st.lists(st.floats(1e-9, 1e3), min_size=6, max_size=80))
def test_statistics_are_in_order(values):
    got = made_up(*values)
    low, high = got.interval_seconds
    first, third = got.quartile_seconds
    slack = 1 + 1e-12
    assert min(values) <= low <= got.seconds * slack <= high * slack**2 <= max(values) * slack**2
    assert first <= got.seconds * slack <= third * slack**2


STEADY = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99]
VERDICTS = {
    "faster": ([t / 2 for t in STEADY], "2.00x faster"),
    "slower": ([t * 1.5 for t in STEADY], "1.50x slower"),
    "itself": (STEADY, "no difference"),
    "shuffled": (STEADY[::-1], "no difference"),
    "a hair faster, each time": ([t * 0.999 for t in STEADY], "no difference"),  # the times overlap
    "one lucky block": ([0.1, *STEADY[1:]], "cannot tell"),
    "wild": ([t * f for t, f in zip(STEADY, [0.5, 2, 1, 0.6, 1.8, 1, 0.7, 1.5], strict=True)], "cannot tell"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case):
    timings, verdict = VERDICTS[case]
    result = Comparison({"dense": made_up(*STEADY), "other": made_up(*timings)})
    assert result.verdict("other") == verdict
    assert result.verdict("dense") == "no difference"
    assert verdict in str(result)


def test_nobody_can_tell_if_only_the_times_are_apart():
    quicker, slower = made_up(9.0, *[1.0] * 8), made_up(2.0, 0.1, *[2.0] * 7)  # two rounds say the opposite
    assert quicker.interval_seconds[1] < slower.interval_seconds[0]
    assert Comparison({"a": quicker, "b": slower}).verdict("b") == "cannot tell"
    assert Comparison({"a": slower, "b": quicker}).verdict("b") == "cannot tell"


def test_the_summary_tells_no_faster_from_cannot_tell():
    steady, wild = made_up(*STEADY), made_up(*[t * f for t, f in zip(STEADY, [0.5, 2] * 4, strict=True)])
    found = Comparison({"a": steady, "same": steady, "wild": wild})
    same, unclear = found.summary.splitlines()
    assert same.startswith("same: no faster")
    assert unclear.startswith("wild: cannot tell (0.50x to 2.00x): the machine is busy, so measure longer (seconds=)")


def test_speedup_is_paired_so_a_drift_of_the_machine_cancels():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    result = Comparison({"dense": made_up(*drift), "fast": made_up(*[t / 2 for t in drift])})
    assert result.speedup("fast") == (2.0, (2.0, 2.0))
    assert result.verdict("fast") == "cannot tell"  # the ratio is certain, but the times overlap


@pytest.mark.parametrize("spoiled", ["dense", "pruned"])
def test_subnormal_weights_allow_no_verdict(spoiled):
    models = {"dense": made_up(*STEADY), "pruned": made_up(*(t / 9 for t in STEADY))}
    models[spoiled] = replace(models[spoiled], denormals=3)
    result = Comparison(models)
    assert result.verdict("pruned") == "no verdict"
    assert "faster" not in str(result)
    assert f"{spoiled}: do not take this time" in str(result)
    assert "Zero them" in str(result)
    models[spoiled] = replace(models[spoiled], device="cuda:0")  # a GPU takes them at full speed
    assert Comparison(models).verdict("pruned") == "9.00x faster"


def test_summary_tells_what_pruning_gained():
    dense = made_up(*STEADY, metric=0.95)
    pruned = made_up(*STEADY, zero_macs=90, metric=0.94)
    small = made_up(*(t / 2 for t in STEADY), file_bytes=100)
    result = Comparison({"dense": dense, "pruned": pruned, "small": small})
    assert result.summary.splitlines() == [
        "pruned: no faster although 90.00 % of its MACs meet a zero weight (dense kernels do not skip zeros), "
        "same size as a dense file, metric 0.94 (was 0.95)",
        "small: 2.00x faster, 4.00x smaller as a dense file",
    ]


def test_forms_of_results():
    result = compare({"a": Tagger(), "b": Tagger(4)}, TOKENS, metric=lambda model: 0.25, **QUICK)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["baseline"] == "a"
    assert list(data["measurements"]) == ["a", "b"]
    assert data["measurements"]["b"]["parameters"] == result.measurements["b"].parameters
    assert data["measurements"]["a"]["metric"] == 0.25
    low, high = data["speedup_interval"]["b"]
    assert low <= data["speedup"]["b"] <= high
    assert data["verdict"] == {"b": result.verdict("b")}
    for text in (str(result), result.markdown()):
        assert "0.25" in text
        assert "baseline" in text
        assert f"{result.measurements['a'].parameters:,}" in text
    assert "|---|---:|---:|" in result.markdown()
    with pytest.raises(FrozenInstanceError, match="macs"):
        result.measurements["a"].macs = 0


# Errors ----------------------------------------------------------------------------------------------------

BAD = {
    "no models": ({}, SEQUENCE, {}, InputError, "at least one named model"),
    "a list": ([nn.Linear(10, 1)], SEQUENCE, {}, InputTypeError, "Pass a dict"),
    "no module": ({"a": torch.relu}, SEQUENCE, {}, InputTypeError, "'a' is a .*Pass the model itself"),
    "meta": ({"a": nn.Linear(10, 1, device="meta")}, SEQUENCE, {}, InputError, "'weight' of model 'a'.*to_empty"),
    "elsewhere": (
        {"a": nn.Linear(10, 1)},
        SEQUENCE.to("meta"),
        {},
        InputError,
        "on the meta device.*give tensors",
    ),
    "list": ({"a": nn.Linear(10, 1)}, [SEQUENCE], {}, InputTypeError, "Pass a tensor, a tuple"),
    "threads": ({"a": nn.Linear(10, 1)}, SEQUENCE, {"threads": 0}, InputError, "threads is 0.*leave it out"),
    "seconds": ({"a": nn.Linear(10, 1)}, SEQUENCE, {"seconds": 0}, InputError, "seconds is 0.*above 0"),
    "nan": ({"a": nn.Linear(10, 1)}, SEQUENCE, {"seconds": float("nan")}, InputError, "above 0"),
    "endless": ({"a": nn.Linear(10, 1)}, SEQUENCE, {"seconds": float("inf")}, InputError, "above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(case):
    models, inputs, keywords, error, remedy = BAD[case]
    with pytest.raises(error, match=remedy):
        compare(models, inputs, **keywords)


def test_lazy_parameters_are_explained():
    with pytest.raises(InputError, match="lazy"):
        measure(nn.LazyLinear(3), SEQUENCE)


def test_an_error_of_a_model_names_it():
    models = {"good": nn.Linear(10, 1).train(), "bad": nn.Linear(11, 1).train()}
    with pytest.raises(RuntimeError, match="shapes") as caught:
        compare(models, SEQUENCE, **QUICK)
    assert "'bad'" in caught.value.__notes__[-1]
    assert all(model.training for model in models.values())


def test_an_error_of_a_later_call_names_the_model_too():
    class Tired(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > self.last:
                raise OSError("tired")
            return x

    for last in (1, 4, 20):  # fails while its calls are counted, in a block, and later
        Tired.last = last
        with pytest.raises(OSError, match="tired") as caught:
            compare({"fine": nn.Identity(), "tired": Tired()}, SEQUENCE, **QUICK)
        assert caught.value.__notes__ == ["secateur was measuring the model 'tired'"]


@pytest.mark.filterwarnings("ignore:.*beta state")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_a_model_of_sparse_weights_is_timed_and_its_size_is_not_told(layout):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(model[0].weight.detach().relu().to_sparse(layout=layout))
    found = measure(model, torch.zeros(2, 8), seconds=0.001)
    assert found.seconds > 0
    assert (found.parameters, found.nonzeros, found.file_bytes, found.macs) == (None, None, None, None)


def test_a_metric_that_gives_no_number_is_named():
    with pytest.raises(InputTypeError, match="metric gave a list: let it return one number"):
        compare({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), metric=lambda model: [], seconds=0.001)
