"""Every public verb, given something of the wrong type for each of its arguments: an error of ours that names it."""

import inspect
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import secateur as sc
from secateur import (
    allocation,
    distillation,
    dropout,
    feedback,
    patterns,
    regrow,
    runtime,
    schedules,
    scores,
    storage,
    structure,
)
from secateur.calibration import sensitivity
from secateur.calibration.statistics import Statistics
from secateur.dropout import metrics
from secateur.storage.checkpoints import inspect as inspect_file
from secateur.storage.checkpoints import opened


class Odd:
    """Of no type that anything takes."""

    def __repr__(self):
        return "Odd()"


ODD = [Odd(), 3, "text", 1.5, None, [1], b"x", True, {"a": 1}, {1}, float("nan"), torch.zeros(2), (i for i in [])]
"""What each argument is given."""

NUMBER, FLAG, COUNT = {3, 1.5}, {True}, {3}


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2)).eval()


WAYS = {"effort": "full", "allocation": "uniform", "progress": False}
WAYS |= dict.fromkeys(("solver", "pattern", "scope", "evaluate"))


def read_by_net():
    return sc.calibrate(net(), [torch.randn(16, 4)])


def first(model):
    return model[0].weight.sum()


def learned():
    model = net()
    dropout.variational(model, n_data=10.0, warmup=1)
    return model


def pruned_by_torch():
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", 3)
    return model


X, P, LABELS = torch.zeros(2, 4), torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])
FAST, MASKS = sc.accelerate(net(), X), sc.prune(net(), 0.5)
STATISTICS = sc.calibrate(net(), [torch.rand(9, 4)])
SCAN = sc.scan(nn.Linear(4, 2), lambda model: 1.0, [0.5])
PREDICTION = dropout.Prediction(torch.rand(30, 2, 2))
SIZES = {"in_features": 3, "out_features": 3, "bias": True}
TAKES = {"in_features": COUNT, "out_features": COUNT, "bias": FLAG, "units": FLAG}
LEVELS, STEP = {"level": "lossless", "step": None, "effort": "normal"}, {"step": {3, 1.5, None}}
PRUNED = {"score": "magnitude", "allocation": "global", "pattern": None, "scope": None}
NONE = {"pattern": {None}, "scope": {None}}
GRASP = {"batches": {"several"}}
OPTIMIZER = ("optimizer", "optimizer_state")
MOVES = {"every": COUNT, "drop": {True}, "stop": COUNT, "seed": COUNT}

# what is called, with which arguments (a function where they must be fresh), and what else each of them takes
CASES = {
    "Count": (sc.Count, {"weights": 3}, {"weights": COUNT}),
    "Masks": (sc.Masks, {"kept": MASKS}, {}),
    "Masks.save": (MASKS.save, {"path": "masks.safetensors"}, {"path": {"text"}}),
    "Masks.load": (sc.Masks.load, {"path": "masks.safetensors"}, {}),
    "Masks.apply": (MASKS.apply, lambda: {"model": net()}, {}),
    "Masks.from_zeros": (sc.Masks.from_zeros, lambda: {"model": net()}, {}),
    "Pruner": (
        sc.Pruner,
        lambda: {"model": net(), "sparsity": 0.5, "schedule": "one_shot", **PRUNED, "regrow": None},
        {**NONE, "score": {"dict"}, "regrow": {None}},
    ),
    "Pruner.load_state_dict": (
        sc.Pruner(net(), 0.5).load_state_dict,
        {"state": sc.Pruner(net(), 0.5).state_dict()},
        {},
    ),
    "Pruner.finish": (
        lambda lift_denormals: at_its_end().finish(lift_denormals=lift_denormals),
        {"lift_denormals": False},
        {"lift_denormals": FLAG},
    ),
    "accelerate": (
        sc.accelerate,
        lambda: {
            "model": net(),
            "example_inputs": X,
            "threads": 1,
            "plan": None,
            "values": torch.float32,
            "check_inputs": False,
            "generated": True,
            "keep_dense": True,
            "progress": False,
        },
        {"threads": {3, None}, "plan": {None}, "example_inputs": {"inputs"}}
        | dict.fromkeys(("check_inputs", "generated", "keep_dense", "progress"), FLAG),
    ),
    "accumulate": (
        sc.accumulate,
        lambda: {
            "model": net(),
            "batches": [X],
            "loss": lambda model, batch: model(batch).sum(),
            "score": "taylor",
            "scope": None,
            "progress": False,
        },
        {"scope": {None}, "progress": FLAG, "batches": {"several"}},
    ),
    "blocks": (sc.blocks, {"height": 2, "width": 2, "tail": "error"}, {"height": COUNT, "width": COUNT}),
    "calibrate": (
        sc.calibrate,
        lambda: {"model": net(), "batches": [X], "loss": None, "scope": None, "progress": False},
        {"batches": {"several"}, "loss": {None}, "scope": {None}, "progress": FLAG},
    ),
    "Statistics.merge": (STATISTICS.merge, {"other": STATISTICS}, {}),
    "Statistics.reduced": (STATISTICS.reduced, {"all_reduce": lambda total: total}, {}),
    "Statistics.save": (STATISTICS.save, {"path": "stats.safetensors"}, {"path": {"text"}}),
    "Statistics.load": (Statistics.load, {"path": "stats.safetensors", "device": "cpu"}, {"device": {"text"}}),
    "Statistics.require": (STATISTICS.require, lambda: {"model": net()}, {}),
    "check": (sc.check, lambda: {"model": net(), "masks": MASKS}, {}),
    "compare": (
        sc.compare,
        lambda: {"models": {"a": net()}, "inputs": X, "metric": None, "threads": 1, "seconds": 0.01},
        {"metric": {None}, "threads": {3, None}, "seconds": NUMBER, "inputs": {"inputs"}},
    ),
    "dense": (sc.dense, {"fast": FAST}, {}),
    "explain": (sc.explain, {"fast": FAST}, {}),
    "from_torch_prune": (sc.from_torch_prune, lambda: {"model": pruned_by_torch()}, {}),
    "load": (
        sc.load,
        {"path": "m.safetensors", "into": None, "strict": True, "verify": False, "key": None},
        {"into": {None}, "strict": FLAG, "verify": FLAG, "key": {None}},
    ),
    "load_pretrained": (sc.load_pretrained, {"folder": "f", "cls": OrderedDict}, {"folder": {"text"}}),
    "measure": (
        sc.measure,
        lambda: {"model": net(), "inputs": X, "threads": 1, "seconds": 0.01},
        {"threads": {3, None}, "seconds": NUMBER, "inputs": {"inputs"}},
    ),
    "n_m": (sc.n_m, {"n": 2, "m": 4, "tail": "error"}, {"n": COUNT, "m": COUNT}),
    "pack": (
        sc.pack,
        {"src": "m.safetensors", "dst": "p.safetensors", **LEVELS, "progress": None},
        {**STEP, "progress": {None, True}},
    ),
    "plain_state_dict": (sc.plain_state_dict, lambda: {"state_dict": pruned_by_torch().state_dict()}, {}),
    "oneshot": (
        sc.oneshot,
        lambda: {"model": net(), "stats": read_by_net(), "sparsity": 0.5, **WAYS, "sequential": False},
        {**{key: {None} for key in WAYS if WAYS[key] is None}, "sequential": {True, "text"}, "progress": FLAG},
    ),
    "prune": (
        sc.prune,
        lambda: {"model": net(), "sparsity": 0.5, **PRUNED, "optimizer": ()},
        {**NONE, "optimizer": {"several"}},
    ),
    "recalibrate": (
        sc.recalibrate,
        lambda: {"model": nn.Sequential(net(), nn.BatchNorm1d(2)), "batches": [X], "progress": False},
        {"batches": {"several"}, "progress": FLAG},
    ),
    "recommend": (
        sc.recommend,
        lambda: {"model": net(), "evaluate": first, "tolerance": 0.1, **PRUNED, "progress": False},
        {**NONE, "tolerance": NUMBER, "allocation": {None}, "score": {"dict"}, "progress": FLAG},
    ),
    "refit": (
        sc.refit,
        lambda: {"model": net(), "masks": MASKS, "stats": read_by_net(), "dense": None, "progress": False},
        {"dense": {None, "dict"}, "progress": FLAG},
    ),
    "recover": (
        sc.recover,
        lambda: {
            "model": net(),
            "dense": net(),
            "batches": [X],
            "steps": 1,
            "lr": 0.1,
            "masks": None,
            "progress": False,
        },
        {"batches": {"several"}, "steps": COUNT, "lr": NUMBER, "masks": {None}, "progress": FLAG},
    ),
    "choose_allocation": (
        sc.choose_allocation,
        lambda: {
            "model": net(),
            "evaluate": first,
            "sparsity": 0.5,
            "scan": None,
            **{name: default for name, default in PRUNED.items() if name != "allocation"},
            "progress": False,
        },
        {**NONE, "scan": {None}, "score": {"dict"}, "progress": FLAG},
    ),
    "scan": (
        sc.scan,
        lambda: {
            "model": net(),
            "evaluate": first,
            "sparsities": [0.5],
            **{name: default for name, default in PRUNED.items() if name != "allocation"},
            "path": None,
            "progress": False,
        },
        {**NONE, "sparsities": {"several"}, "path": {None, "text"}, "progress": FLAG},
    ),
    "Scan.save": (SCAN.save, {"path": "scan.json"}, {"path": {"text"}}),
    "Scan.load": (sensitivity.Scan.load, {"path": "scan.json"}, {}),
    "remask": (sc.remask, lambda: {"model": net(), "masks": MASKS}, {}),
    "rewind": (
        sc.rewind,
        lambda: {
            "model": net(),
            "state": net().state_dict(),
            "masks": MASKS,
            **dict.fromkeys(OPTIMIZER),
        },
        {key: {None} for key in OPTIMIZER},
    ),
    "report": (sc.report, lambda: {"model": net(), "masks": MASKS}, {"masks": {None}}),
    "save": (
        sc.save,
        lambda: {"model": net(), "path": "s", "max_file_bytes": 10_000_000, "stats": None, **LEVELS},
        {**STEP, "path": {"text"}, "max_file_bytes": {3, None}, "stats": {None}},
    ),
    "save_pretrained": (
        sc.save_pretrained,
        lambda: {"model": Pretrained(), "folder": "f", **LEVELS},
        {**STEP, "folder": {"text"}},
    ),
    "units": (sc.units, lambda: {"model": net(), "example_inputs": X}, {"example_inputs": {"inputs"}}),
    "shrink": (
        sc.shrink,
        lambda: {
            "model": net(),
            "example_inputs": X,
            "sparsity": 0.5,
            "score": "magnitude",
            "allocation": "uniform",
            "round_to": 1,
            "min_width": 1,
            "keep": (),
            "verify": False,
            **dict.fromkeys(("macs", "params", "latency", "depth", "masks", "plan", "optimizer", "stats")),
        },
        {
            **{
                key: {None}
                for key in ("sparsity", "macs", "params", "latency", "depth", "masks", "plan", "optimizer", "stats")
            },
            "example_inputs": {"inputs"},
            "keep": {"several"},
            "round_to": COUNT,
            "min_width": COUNT,
            "verify": FLAG,
        },
    ),
    "unpack": (
        sc.unpack,
        {"src": "m.safetensors", "dst": "u.safetensors", "progress": None},
        {"progress": {None, True}},
    ),
    "weights": (
        sc.weights,
        lambda: {"model": net(), "only": None, "also": (), "skip": (), "where": None},
        {"only": {None}, "also": {None, "several"}, "skip": {None, "several"}, "where": {None}},
    ),
    "Recipe": (
        storage.Recipe,
        {"sparsity": 0.5, "allocation": "global", "pattern": None, "only": (), "skip": ()},
        {
            "sparsity": {"any"},  # these three are read when a file is pruned
            "allocation": {"any"},
            "pattern": {"any"},
            "only": {"text", "several"},
            "skip": {"text", "several"},
        },
    ),
    "prune_checkpoint": (
        storage.prune_checkpoint,
        {
            "src": "m.safetensors",
            "dst": "o.safetensors",
            "recipe": storage.Recipe(0.5),
            "level": None,
            "progress": None,
        },
        {"dst": {None}, "level": {None}, "progress": {None}},
    ),
    "shrink_checkpoint": (
        storage.shrink_checkpoint,
        {"src": "m.safetensors", "dst": "o.safetensors", "plan": structure.Plan({}, {}, (), (), ())},
        {},
    ),
    "opened": (opened, {"path": "m.safetensors", "key": None}, {"key": {None}}),
    "inspect": (inspect_file, {"path": "m.safetensors"}, {}),
    "check_weights": (runtime.check_weights, {"fast": FAST}, {}),
    "trust_weights": (runtime.trust_weights, {"fast": FAST, "trusted": True}, {"trusted": FLAG}),
    "Schedule": (
        schedules.Schedule,
        {"kind": "cubic", "start": 0, "stop": 5, "every": 1},
        {"start": COUNT, "stop": COUNT, "every": COUNT},
    ),
    **{
        made.__name__: (made, {"start": 0, "stop": 5, "every": 1}, {"start": COUNT, "stop": COUNT, "every": COUNT})
        for made in (sc.cubic, sc.geometric, sc.linear, schedules.cosine, schedules.gmp_star, schedules.ac_dc)
    },
    **{
        made.__name__: (made, {"every": 2, "drop": 0.5, "stop": 5, "seed": 0}, MOVES)
        for made in (regrow.rigl, regrow.set_)
    },
    "Regrowth": (regrow.Regrowth, {"kind": "set", "every": 2, "drop": 0.5, "stop": 5, "seed": 0}, MOVES),
    "dpf": (
        feedback.dpf,
        {"every": 2, "decay": 0.1, "stop": 5},
        {"every": COUNT, "decay": NUMBER, "stop": {None, *COUNT}},
    ),
    "sr_ste": (
        feedback.sr_ste,
        {"every": 2, "decay": 0.1, "stop": 5},
        {"every": COUNT, "decay": NUMBER, "stop": {None, *COUNT}},
    ),
    "soft_movement": (feedback.soft_movement, {"every": 2, "stop": 5}, {"every": COUNT, "stop": {None, *COUNT}}),
    "str_": (
        feedback.str_,
        {"every": 2, "learn": 0.1, "stop": 5},
        {"every": COUNT, "learn": NUMBER, "stop": {None, *COUNT}},
    ),
    "Feedback": (
        feedback.Feedback,
        {
            "kind": "mine",
            "every": 2,
            "stop": 5,
            "straight": True,
            "decay": 0.1,
            "score": None,
            "soft": False,
            "learn": 0.1,
        },
        {
            "kind": {"text"},
            "every": COUNT,
            "stop": {None, *COUNT},
            "straight": FLAG,
            "decay": NUMBER,
            "score": {None},
            "soft": FLAG,
            "learn": NUMBER,
        },
    ),
    "regrowth.over": (regrow.rigl().over, {"total_steps": 1000}, {"total_steps": COUNT}),
    "cycles": (
        schedules.cycles,
        {"schedule": sc.cubic(0, 5), "total_steps": 9, "low": 0.1},
        {"total_steps": COUNT, "low": NUMBER},
    ),
    "distillation.loss": (
        distillation.loss,
        {"student": P, "teacher": P, "temperature": 2.0, "where": None},
        {"temperature": NUMBER, "where": {None}},
    ),
    "one_shot": (schedules.one_shot, {"at": 0}, {"at": COUNT}),
    "over": (sc.cubic(0, 0.5).over, {"total_steps": 9}, {"total_steps": COUNT}),
    "Pruner.over": (sc.Pruner(net(), 0.5).over, {"total_steps": 9}, {"total_steps": COUNT}),
    "Pruner.on_update": (sc.Pruner(net(), 0.5).on_update, {"call": print}, {}),
    "in_epochs": (sc.cubic(0, 3).in_epochs, {"steps_per_epoch": 2}, {"steps_per_epoch": COUNT}),
    "Allocation": (
        allocation.Allocation,
        {"share": None, "min_keep": 1, "allow_empty": False, "shapes_only": False},
        {"share": {None}, "min_keep": COUNT, "allow_empty": FLAG, "shapes_only": FLAG},
    ),
    **{
        made.__name__: (
            made,
            {"min_keep": 1, "allow_empty": False},
            {"min_keep": COUNT, "allow_empty": FLAG},
        )
        for made in (allocation.erk, allocation.global_, allocation.lamp, allocation.uniform)
    },
    "lines": (patterns.lines, {"along": 0}, {}),
    "GradientScore": (
        scores.GradientScore,
        {"name": "mine", "statistic": lambda w, g: g, "score": lambda w, total: total, "forget": True},
        {"name": {"any"}, "forget": FLAG},
    ),
    "random": (scores.random, {"seed": 0, "generator": None}, {"seed": COUNT, "generator": {None}}),
    "given": (scores.given, {"table": {"a": X}}, {"table": {"dict"}}),
    "grasp": (scores.grasp, lambda: {"model": net(), "batches": [X], "loss": lambda m, x: m(x).sum()}, GRASP),
    "synflow": (scores.synflow, lambda: {"model": net(), "inputs": X}, {"inputs": {"inputs"}}),
    "closed_form": (dropout.closed_form, lambda: {"model": net(), "inputs": X}, {"inputs": {"inputs"}}),
    "find": (dropout.find, lambda: {"model": net(), "inputs": X}, {"inputs": {"inputs"}}),
    "sample": (
        dropout.sample,
        lambda: {
            "model": net(),
            "inputs": X,
            "n": 3,
            "seed": 0,
            "shared": False,
            "output": None,
            "max_memory": 2**30,
            "progress": False,
        },
        {
            "inputs": {"inputs"},
            "n": COUNT,
            "seed": {3, None},
            "shared": FLAG,
            "output": {None},
            "max_memory": COUNT,
            "progress": FLAG,
        },
    ),
    "concrete": (
        dropout.concrete,
        lambda: {"model": net(), "n_data": 10.0, "length_scale": 1e-4, "rate": 0.1, "scope": None},
        {"n_data": NUMBER, "length_scale": NUMBER, "scope": {None}},
    ),
    "hard_concrete": (
        dropout.hard_concrete,
        lambda: {"model": net(), "n_data": 10.0, "strength": 1.0, "rate": 0.1, "scope": None},
        {"n_data": NUMBER, "strength": NUMBER, "scope": {None}},
    ),
    "variational": (
        dropout.variational,
        lambda: {"model": net(), "n_data": 10.0, "warmup": 3, "log_sigma2": -10.0, "scope": None},
        {"n_data": NUMBER, "warmup": COUNT, "log_sigma2": NUMBER, "scope": {None}},
    ),
    **{
        verb.__name__: (verb, lambda: {"model": learned()}, {})
        for verb in (dropout.finish, dropout.penalty, dropout.to_masks, dropout.to_scores)
    },
    "recurrent": (
        dropout.recurrent,
        lambda: {"model": nn.LSTM(3, 3), "weight": 0.1, "input": 0.1, "hidden": 0.1, "embedding": 0.0},
        {},
    ),
    "DropBlock2d": (dropout.DropBlock2d, {"p": 0.1, "size": 3}, {"size": COUNT}),
    "DropConnect": (dropout.DropConnect, {**SIZES, "p": 0.1}, TAKES),
    "LockedDropout": (dropout.LockedDropout, {"p": 0.1, "batch_first": False}, {"batch_first": FLAG}),
    "StochasticDepth": (dropout.StochasticDepth, {"p": 0.1, "per_batch": False}, {"per_batch": FLAG}),
    "TargetedDropout": (dropout.TargetedDropout, {**SIZES, "p": 0.1, "target": 0.5, "units": False}, TAKES),
    "WordDropout": (
        dropout.WordDropout,
        {"p": 0.1, "replacement": 3, "keep": ()},
        {"replacement": COUNT, "keep": {"several"}},
    ),
    "Prediction": (dropout.Prediction, {"samples": torch.zeros(3, 2, 2), "noise": None}, {"noise": {None}}),
    "Prediction.interval": (PREDICTION.interval, {"level": 0.9}, {}),
    **{
        f"metrics.{made.__name__}": (made, {"probabilities": P, "labels": LABELS, **more}, takes)
        for made, more, takes in (
            (metrics.brier, {}, {}),
            (metrics.nll, {}, {}),
            (metrics.ece, {"bins": 3}, {"bins": COUNT}),
            (metrics.adaptive_ece, {"bins": 3}, {"bins": COUNT}),
            (metrics.calibration_curve, {"bins": 3, "adaptive": False}, {"bins": COUNT, "adaptive": FLAG}),
        )
    },
    "metrics.coverage": (metrics.coverage, {"lower": X, "upper": X, "targets": X}, {"lower": {"tensor"}}),
    "metrics.crps": (
        metrics.crps,
        {"samples": torch.zeros(3, 2), "targets": torch.zeros(2)},
        {"targets": {"tensor"}},
    ),
    "metrics.risk_coverage": (
        metrics.risk_coverage,
        {"uncertainty": torch.zeros(3), "errors": torch.zeros(3)},
        {"uncertainty": {"tensor"}},
    ),
}

OF_ONE_THING = {  # what a message calls an argument that it does not name
    "model": "Module|module|model|state_dict|scripted|transformers",
    "fast": "Module|accelerated",
    "models": "models|'model' is a",
    "masks": "mask|name",
    "kept": "kept|mask",
    "state": "state",
    "src": "checkpoint|no such file",
    "path": "path|checkpoint|no such file|cannot be read|masks|safetensors",
    "dst": "dst|path|safetensors",
    "folder": "folder|path",
    "cls": "class of transformers",
    "sparsity": "sparsity|names no tensor|matches no tensor",
    "weights": "Count",
    "optimizer": "ptimizer",
    "example_inputs": "inputs",
    "inputs": "inputs",
    "score": "score|masks",
    "schedule": "schedule",
    "kind": "kind|schedule named",
    "into": "Module",
    "along": "along|lines",
    "share": "share",
    "at": "at=|start",
    "state_dict": "state_dict",
    "steps_per_epoch": "steps_per_epoch",
}
KINDS = {
    "inputs": (dict, torch.Tensor),  # with which a model may be called
    "several": (list, set, type(i for i in []), torch.Tensor),  # of what an iterable gives, or the user's function says
    "dict": (dict,),
    "tensor": (torch.Tensor,),
    "any": (object,),
}


class Pretrained(nn.Linear):
    """What has a save_pretrained."""

    def __init__(self):
        super().__init__(3, 3)

    def save_pretrained(self, folder):
        sc.save(self, folder / "model.safetensors")


def at_its_end():
    pruner = sc.Pruner(net(), 0.5)
    pruner.step()
    return pruner


def takes(value, allowed):
    plain = value is None or isinstance(value, (bool, int, float, str))
    if plain and any(type(one) is type(value) and one == value for one in allowed):
        return True
    return any(isinstance(value, KINDS[kind]) for kind in allowed if kind in KINDS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sc.save(net(), "m.safetensors")
    MASKS.save("masks.safetensors")


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@pytest.mark.parametrize("name", CASES)
def test_a14_a_wrong_type_is_an_error_that_names_the_argument(folder, name):
    verb, good, allowed = CASES[name]
    arguments = good if callable(good) else lambda: dict(good)
    for argument in arguments():
        called = OF_ONE_THING.get(argument, argument)
        for value in ODD:
            if not takes(value, allowed.get(argument, ())):
                inside = "|^'?a'? " if isinstance(value, dict) else "|'text'" if isinstance(value, str) else ""
                with pytest.raises(sc.SecateurError, match=called + inside):
                    verb(**{**arguments(), argument: value})


def test_every_public_name_is_in_the_table():
    tried = {verb for verb, _, _ in CASES.values()} | {sc.SecateurError, sc.dropout, dropout.metrics}
    tried |= {dropout.RecurrentDropout}  # made by `recurrent`
    for room in (sc, storage, runtime, dropout, metrics):
        missing = [name for name in room.__all__ if getattr(room, name) not in tried and callable(getattr(room, name))]
        assert missing == [name for name in missing if name in ("Calibration", "RiskCoverage")], room.__name__


@pytest.mark.parametrize("name", CASES)
def test_the_table_gives_every_argument(name):
    verb, good, _ = CASES[name]
    named = set(inspect.signature(verb).parameters) - {"processes"}  # which torchrun's caller hands in
    if verb is sc.shrink:
        named = named - {"options"} | set(structure.Options.__annotations__)
    assert set(good() if callable(good) else good) == named - {"self"}
