"""sc.scan: each tensor alone and the whole, by the user's metric; files that go on, other processes, refusals."""

import json
import os
from functools import partial

import pytest
import torch
from torch import nn

import secateur as sc
from processes import FORKS
from secateur.calibration import sensitivity
from secateur.calibration.sensitivity import Scan
from secateur.demo import digits
from secateur.errors import (
    FileError,
    InputError,
    InputTypeError,
    PatternError,
    StateError,
    UnknownNameError,
    WriteError,
)
from trial_models import agreement, cnn, everything, noisy, trained_lstm


def zeros(model):
    """Which tensor has how many zeros, in one number: 1 a zero of the first, 1000 a zero of the second."""
    return float((model[0].weight == 0).sum() + 1000 * (model[1].weight == 0).sum())


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1))


def test_each_tensor_alone_and_the_whole():
    model = two()
    before = everything(model)
    found = sc.scan(model, zeros, (0.9, 0.55), progress=True)
    assert found.sparsities == (0.55, 0.9)
    assert found.dense == 0
    assert found.tensors == {"0.weight": (55, 90), "1.weight": (6000, 9000)}
    assert [w % 1000 + w // 1000 for w in found.whole] == [61, 99]  # 60.5 and 99 of 110
    assert found.weights == {"0.weight": 100, "1.weight": 10}
    assert found.falls("0.weight") == (-55, -90)
    assert everything(model) == before


def test_what_it_prints():
    found = Scan((0.5, 0.9), 0.97, (0.9, 0.2), {"a": (0.96, 0.5)}, {"a": 1234}, {})
    title, head, _, a, whole = str(found).splitlines()
    assert title == "How far the metric falls from 0.97, with each tensor alone pruned to a sparsity"
    assert head.split() == ["tensor", "weights", "0.5", "0.9"]
    assert a.split() == ["a", "1,234", "0.01", "0.47"]
    assert whole.split() == ["all", "together", "1,234", "0.07", "0.77"]


def test_the_choices_of_prune():
    model = cnn()
    scope = sc.weights(model, only="4")
    found = sc.scan(model, agreement, [0.5], score="random", pattern="rows", scope=scope)
    assert list(found.tensors) == ["4.weight"]
    sc.prune(model, 0.5, score="random", pattern="rows", scope=scope)
    assert found.whole == (float(agreement(model)),) == found.tensors["4.weight"]


def test_a_file_goes_on_after_an_interruption(tmp_path):
    path, model, calls = tmp_path / "scan.json", two(), []

    def metric(model):
        calls.append(zeros(model))
        if len(calls) == 4:
            raise KeyboardInterrupt("stopped")
        return calls[-1]

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        sc.scan(model, metric, (0.5, 0.9), path=path)
    assert len(json.loads(path.read_text())["results"]) == 3
    with pytest.raises(FileError, match=r"lacks 4 results: let sc.scan\(..., path=...\) finish it"):
        Scan.load(path)
    found = sc.scan(model, metric, (0.5, 0.9), path=path)
    assert len(calls) == 4 + 4
    assert found == sc.scan(model, metric, (0.5, 0.9), path=path) == Scan.load(path)
    assert len(calls) == 8
    assert found.tensors == sc.scan(model, zeros, (0.5, 0.9)).tensors
    found.save(tmp_path / "copy.json")
    assert Scan.load(tmp_path / "copy.json") == found
    assert json.loads(json.dumps(found.to_dict()))["dense"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate": agreement}, "another metric"),
        ({"sparsities": [0.6]}, r"other levels \[0.5\]"),
        ({"score": "random"}, "another score"),
        ({"pattern": "rows"}, "another pattern"),
        ({"score": {"0.weight": -torch.rand(10, 10), "1.weight": torch.rand(1, 10)}}, "another score"),
    ],
)
def test_a_file_of_another_scan_is_refused(tmp_path, change, said):
    path, given = tmp_path / "scan.json", {"evaluate": zeros, "sparsities": [0.5], "path": tmp_path / "scan.json"}
    sc.scan(two(), **given)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"{said}.*: give another path, or remove it"):
        sc.scan(two(), **given | change)
    assert path.read_bytes() == before


def named(what):
    return lambda model: float(what == "a") + sum(zeros(model) for _ in range(1))


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (lambda model: 1.0, lambda model: 2.0),
        (lambda model: zeros(model), lambda model: agreement(model)),
        (named("a"), named("b")),
        (partial(lambda model, share: share, share=0.5), partial(lambda model, share: share, share=0.6)),
        (lambda model, share=0.5: share, lambda model, share=0.6: share),
    ],
)
def test_another_metric_under_the_same_name_is_refused(tmp_path, first, other):
    given = {"sparsities": [0.5], "path": tmp_path / "scan.json"}
    found = sc.scan(two(), first, **given)
    assert sc.scan(two(), first, **given) == found
    with pytest.raises(InputError, match="another metric: give another path, or remove it"):
        sc.scan(two(), other, **given)


def test_equal_weights_under_another_activation_are_another_model(tmp_path):
    layers, given = [*two()], {"sparsities": [0.5], "path": tmp_path / "scan.json"}
    sc.scan(nn.Sequential(layers[0], layers[1], nn.ReLU()), zeros, **given)
    with pytest.raises(InputError, match="another model: give another path, or remove it"):
        sc.scan(nn.Sequential(layers[0], layers[1], nn.Tanh()), zeros, **given)


def test_a_metric_that_was_defined_again_is_the_same(tmp_path):
    def made(calls):
        def metric(model):
            nonlocal calls
            calls += 1
            return {"a", "b"} and 1.0

        return metric

    given = {"sparsities": [0.5], "path": tmp_path / "scan.json"}
    assert sc.scan(two(), made(0), **given) == sc.scan(two(), made(1), **given)


def test_a_file_of_another_model_or_of_other_scores_is_refused(tmp_path):
    path, model = tmp_path / "scan.json", two()
    scores = {name: torch.rand(w.shape) for name, w in sc.weights(model).items()}
    sc.scan(model, zeros, [0.5], score=scores, path=path)
    with pytest.raises(InputError, match="other scores: give another path"):
        sc.scan(model, zeros, [0.5], score={name: 1 - s for name, s in scores.items()}, path=path)
    with torch.no_grad():
        model[0].bias[0] += 1
    with pytest.raises(InputError, match="another model: give another path"):
        sc.scan(model, zeros, [0.5], score=scores, path=path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "x"}', '{"format": "secateur.scan 1", "weights": 3}', "[" * 100_000]
)
def test_a_file_that_is_no_scan(tmp_path, text):
    path = tmp_path / "scan.json"
    path.write_text(text)
    for read in (lambda: sc.scan(two(), zeros, path=path), lambda: Scan.load(path)):
        with pytest.raises(FileError, match=r"holds no scan .*: give another path, or remove it"):
            read()
    assert path.read_text() == text


def test_results_that_nobody_asked_for(tmp_path):
    path = tmp_path / "scan.json"
    sc.scan(two(), zeros, [0.5], path=path)
    data = json.loads(path.read_text())
    for row in (["2.weight", 0.5, 1.0], ["", 0.7, 1.0], ["", 0.5, float("nan")]):
        path.write_text(json.dumps({**data, "results": [row]}))
        with pytest.raises(FileError, match="give another path, or remove it"):
            Scan.load(path)


@pytest.fixture
def forks(monkeypatch):
    """Processes that have imported torch already."""
    monkeypatch.setattr(sensitivity.multiprocessing, "get_context", lambda _: FORKS)


def in_other_processes(path):
    model = cnn()
    before = everything(model)
    found = sc.scan(model, noisy, (0.5, 0.9), processes=2, path=path)
    assert found == sc.scan(model, noisy, (0.5, 0.9)) == Scan.load(path)
    assert everything(model) == before


def test_in_other_processes(tmp_path, forks):
    in_other_processes(tmp_path / "scan.json")


@pytest.mark.slow
def test_in_fresh_processes(tmp_path):
    in_other_processes(tmp_path / "scan.json")


def test_what_cannot_go_to_other_processes():
    calls = []
    with pytest.raises(InputTypeError, match="define evaluate, and a score, with `def` at the top of a module"):
        sc.scan(two(), lambda model: calls.append(1), processes=2)
    assert calls == []


def dies_elsewhere(model):
    if sensitivity.multiprocessing.parent_process() is not None:
        os._exit(1)
    return 1.0


def test_a_process_that_dies(forks):
    with pytest.raises(StateError, match="leave processes at 1"):
        sc.scan(two(), dies_elsewhere, [0.5], processes=2)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"evaluate": 3}, InputTypeError, r"evaluate is 3: give a function"),
        ({"sparsities": 0.5}, InputTypeError, r"sparsities is 0.5: give some fractions"),
        ({"sparsities": []}, InputError, r"give at least one, each above 0 and below 1"),
        ({"sparsities": [0.0, 0.5]}, InputError, r"each above 0 and below 1"),
        ({"sparsities": [90]}, InputTypeError, r"write 0.9 for 90 %"),
        ({"processes": 0}, InputError, r"processes is 0: give 1 or more"),
        ({"progress": 1}, InputTypeError, r"progress is 1: give True or False"),
        ({"pattern": "2:4", "scope": ["4.weight"]}, InputTypeError, r"scope is a list: give sc.weights"),
        ({"path": 3}, InputTypeError, r"path is 3: give a path"),
        ({"path": "no/such/folder/scan.json"}, WriteError, r"make its folder first"),
        ({"path": "/"}, (InputError, WriteError), r"give a file in it|permissions"),
        ({"score": "taylor"}, (InputError, StateError), r"sc.accumulate|backward|gradient"),
    ],
)
def test_what_is_refused_before_anything_is_tried(wrong, error, said):
    def metric(model):
        raise AssertionError("tried")

    with pytest.raises(error, match=said):
        sc.scan(cnn(), **{"evaluate": metric} | wrong)


def test_a_pattern_of_one_sparsity():
    assert len(sc.scan(nn.Linear(8, 8), lambda model: 1.0, [0.5], pattern="2:4").whole) == 1
    with pytest.raises(InputError, match=r"ask for 0.5, or choose another pattern"):
        sc.scan(nn.Linear(8, 8), lambda model: 1.0, [0.5, 0.9], pattern="2:4")


def test_units_span_tensors():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PatternError, match="scanned one by one: give another pattern"):
        sc.scan(model, zeros, pattern=sc.units(model, torch.ones(2, 8)))


@pytest.mark.parametrize("value", [None, float("nan"), torch.ones(2)])
def test_a_metric_that_is_no_number_names_the_tensor_and_the_level(value):
    model = two()
    before = everything(model)

    def metric(model):
        return value if (model[1].weight == 0).sum() == 9 else torch.tensor(1.0)

    said = r"for (1.weight|all tensors together) at sparsity 0.9: let it return"
    with pytest.raises((InputError, InputTypeError), match=said):
        sc.scan(model, metric, (0.5, 0.9))
    assert everything(model) == before


def made(tensors, weights, levels=(0.5, 0.9), dense=1.0, whole=0.0):
    return Scan(levels, dense, tuple(whole for _ in levels), tensors, weights, {})


def weights(scan):
    return {name: torch.empty(n) for name, n in scan.weights.items()}


def test_the_share_is_exact_and_rises():
    scan = made({"a": (0.9, 0.5), "b": (1.0, 0.7), "c": (0.3, 0.2)}, {"a": 1000, "b": 77, "c": 3})
    before = dict.fromkeys("abc", 0)
    for count in range(0, 1081, 40):
        counts = scan.share(weights(scan), count)
        assert sum(counts.values()) == count
        assert all(before[name] <= counts[name] <= scan.weights[name] for name in "abc")
        before = counts


def test_what_matters_less_goes_first():
    scan = made({"tough": (1.0, 0.99), "frail": (0.6, 0.1)}, {"tough": 1000, "frail": 1000})
    counts = scan.share(weights(scan), 900)
    assert counts["tough"] > 850
    assert counts["frail"] < 50


def test_where_nothing_falls_all_lose_the_same_fraction():
    for metric in (1.0, 1.1):
        scan = made({"a": (metric, metric), "b": (metric, metric)}, {"a": 4000, "b": 1000}, whole=metric)
        counts = scan.share(weights(scan), 3000)
        assert counts["a"] == pytest.approx(2400, abs=40)


def test_the_sum_of_the_falls_is_the_least():
    """Beside all other ways to share, on a grid; that equal falls are shared evenly costs a hundredth."""
    scan = made({"a": (0.95, 0.6), "b": (0.99, 0.4), "c": (0.9, 0.8)}, {"a": 100, "b": 200, "c": 300})
    curves = {n: torch.tensor([0, *scan.falls(n)]) for n in "abc"}

    def fall(counts):
        total = 0.0
        for name, count in counts.items():
            s, (_, half, most) = count / scan.weights[name], curves[name].tolist()
            if s > 0.9:
                return 9.0
            total += half * s / 0.5 if s <= 0.5 else half + (most - half) * (s - 0.5) / 0.4
        return total

    count = 400
    ways = [(a, b) for a in range(0, 101, 5) for b in range(0, 201, 5) if 0 <= count - a - b <= 300]
    least = min(fall({"a": a, "b": b, "c": count - a - b}) for a, b in ways)
    assert fall(scan.share(weights(scan), count)) <= least + 0.02


def test_the_share_of_other_tensors():
    scan = made({"a": (0.9, 0.5)}, {"a": 100})
    with pytest.raises(UnknownNameError, match=r"no b: scan this model"):
        scan.share({"b": torch.empty(3)}, 1)
    with pytest.raises(InputError, match=r"its a has 100 weights, and yours 99; scan yours"):
        scan.share({"a": torch.empty(99)}, 1)


def test_a_trained_lstm():
    """The scan's allocation keeps more of the digits than the default does."""
    with digits.alone(0):
        model, metric = trained_lstm()
        scan = sc.scan(model, metric, (0.5, 0.8, 0.95))
        assert scan.dense == metric(model)
        got = {}
        for allocation in ("global", scan.allocation()):
            copy = digits.LSTMClassifier(64)
            copy.load_state_dict(model.state_dict())
            sc.prune(copy, 0.8, allocation=allocation)
            got[str(allocation)[:6]] = metric(copy)
    assert got["Alloca"] >= got["global"] - 0.02
