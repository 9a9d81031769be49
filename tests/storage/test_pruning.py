"""secateur.storage.pruning: what pruning in memory gives, bit for bit, from files that are never touched."""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur import selection
from secateur.errors import (
    FileError,
    InputError,
    InputTypeError,
    PatternError,
    SecateurWarning,
    UnknownNameError,
    WriteError,
)
from secateur.sparsity import half_up
from secateur.storage import Recipe, pack, prune_checkpoint
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.storage.pruning import work
from secateur.support import bits

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
ALLOCATIONS = ["global", "uniform", "erk"]
INDEX = "model.safetensors.index.json"


# ---- helpers ----------------------------------------------------------------------------------------------------


def raw(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found, want):
    assert set(found) == set(want)
    for name in want:
        assert raw(found[name]) == raw(want[name]), name


def in_memory(tensors, sparsity, allocation="global", pattern=None, only="*", skip=()):
    """The same tensors, pruned as the parameters of a module, in their order; a tied one is one parameter."""
    model, names, places = nn.Module(), {}, {}
    for i, (name, tensor) in enumerate(tensors.items()):
        names[name] = places.setdefault(id(tensor), f"t{i}")
        if names[name] == f"t{i}":
            keep = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            own = nn.Parameter(tensor.clone(), requires_grad=False) if keep else tensor.clone()
            (model.register_parameter if keep else model.register_buffer)(f"t{i}", own)
    scope = sc.weights(model, only=only, skip=skip)
    masks = sc.prune(model, sparsity, allocation=allocation, pattern=pattern, scope=scope)
    return {name: getattr(model, place).detach() for name, place in names.items()}, masks


def shards(folder, *parts, order=None, metadata=None):
    """A sharded folder; the index names the tensors in some order."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata=metadata or {"shard": str(i)})
        weight_map |= dict.fromkeys(part, file)
    weight_map = {name: weight_map[name] for name in order or weight_map}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return folder


def state_of(path):
    """Everything below a path: names, bytes, times."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p.relative_to(path)): (hashlib.sha256(p.read_bytes()).digest(), p.stat().st_mtime_ns) for p in files}


def bytes_of(path):
    return {name: digest for name, (digest, _) in state_of(path).items()}


def names_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"enc.fc.weight": torch.randn(8, 12), "enc.fc.bias": torch.randn(8), "head.weight": torch.randn(4, 8)}
    save_file({**tensors, "table": torch.arange(6, dtype=torch.int8).view(2, 3)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    first, second = {"b": torch.randn(9, 7), "b.bias": torch.randn(9)}, {"a": torch.randn(5, 9).half()}
    made = shards(tmp_path / "model", first, second)
    (made / "config.json").write_text("{}")
    (made / "tokenizer").mkdir()
    (made / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return made


# ---- bit for bit what pruning in memory gives -------------------------------------------------------------------


SHAPES = [(1, 1), (0, 3), (3, 0), (2, 2), (5, 7), (3, 4, 2), (16, 4), (7,), (), (40, 3)]
PATTERNS = [sc.n_m(2, 4), sc.n_m(1, 4), sc.n_m(4, 8), sc.n_m(2, 3, tail="keep")]
GROUPED = [(1, 8), (3, 8), (3, 0), (5, 16), (2, 8, 3), (3,)]


@st.composite
def states(draw, shapes):
    """Tensors of any dtype, of values with many ties, zeros of both signs among them."""
    tensors = {}
    for i in range(draw(st.integers(1, 5))):
        shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        values = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None)
        kind = draw(st.sampled_from(["fine", "coarse", "constant", "denormal"]))
        if kind == "coarse":
            values = torch.view_as_real(values).round() if dtype.is_complex else (values * 2).round()
            values = torch.view_as_complex(values) if dtype.is_complex else values
        elif kind == "constant":
            values = torch.full_like(values, -0.25)
        elif kind == "denormal":
            values = values * 1e-44
        zeros = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        values = torch.where(zeros, torch.where(values.real > 0, 0.0, -0.0).to(values.dtype), values).to(dtype)
        tensors[f"{'zyxwv'[i]}.{i}"] = values
    if draw(st.booleans()):
        tensors["count"] = torch.tensor([[3, 0], [1, 2]])
    return tensors


@st.composite
def sources(draw, tensors):
    """Write tensors somehow: a function of a folder that returns the path, and the tensors in their order."""
    layout = draw(st.sampled_from(["file", "folder", "packed folder", "pt", "packed"]))

    def write(place):
        if layout == "file":
            save_file(tensors, place / "m.safetensors")
            return place / "m.safetensors", load_file(place / "m.safetensors")
        if "folder" in layout:
            parts = [{name: tensors[name] for name in names} for names in halves if names]
            shards(place / "plain", *parts, order=order)
            if layout == "folder":
                return place / "plain", {name: tensors[name] for name in order}
            pack(place / "plain", place / "packed")
            return place / "packed", {name: tensors[name] for name in order}
        if layout == "pt":
            state = tensors
            if tied:
                state = {**tensors, "tied": next(iter(tensors.values()))}
            torch.save({"epoch": 3, "model": {"state_dict": state}} if nested else state, place / "m.pt")
            return place / "m.pt", state
        sc.save(tensors, place / "m.safetensors")
        return place / "m.safetensors", tensors

    order = draw(st.permutations(list(tensors)))
    cut = draw(st.integers(0, len(tensors)))
    halves = order[::2][:cut], [name for name in order if name not in order[::2][:cut]]
    tied, nested = draw(st.booleans()), draw(st.booleans())
    tied = tied and next(iter(tensors.values())).numel() > 0
    return write


def legal(draw, tensors, dims=2):
    """A sparsity that leaves each tensor a weight."""
    sizes = [t.numel() for t in tensors.values() if t.ndim >= dims and t.dtype in DTYPES]
    most = sum(max(size - 1, 0) for size in sizes)
    asked = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]) | st.floats(0, 1) | st.integers(0, most))
    asked = asked / max(sum(sizes), 1) if isinstance(asked, int) else asked
    return asked if sum(sizes) and half_up(Fraction(str(asked)) * sum(sizes)) <= most else 0.0


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@settings(deadline=None, max_examples=250)
@given(st.data())
def test_as_in_memory(tmp_path_factory, data):
    grouped = data.draw(st.booleans())
    tensors = data.draw(states(GROUPED if grouped else SHAPES))
    chosen = {name: t for name, t in tensors.items() if t.ndim > 1 and t.dtype in DTYPES}
    if not any(t.numel() for t in chosen.values()):
        tensors["w"] = torch.randn(3, 8)
    pattern = data.draw(st.sampled_from(PATTERNS)) if grouped else None
    sparsity = float(pattern.sparsity) if grouped else legal(data.draw, tensors)
    allocation = data.draw(st.sampled_from(ALLOCATIONS))
    place = tmp_path_factory.mktemp("as")
    src, ordered = data.draw(sources(tensors))(place)
    level = data.draw(st.sampled_from([None, "lossless"]))
    before = state_of(src)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK", data.draw(st.sampled_from([8, 16, 1 << 18])))
        patch.setattr(selection, "_SAMPLE", data.draw(st.sampled_from([2, 3, 7, 1 << 16])))
        patch.setattr(selection, "_SIGMAS", 0.5)
        want, masks = in_memory(ordered, sparsity, allocation, pattern)
        out = place / "out" if src.is_dir() else place / "out.safetensors"
        written = prune_checkpoint(src, out, Recipe(sparsity, allocation, pattern), level=level)
        said = prune_checkpoint(src, None, Recipe(sparsity, allocation, pattern))
        loaded = sc.load(out)
    same(loaded, want)
    if level is None and not src.is_dir():
        same(load_file(out), want)
    require_true(written, want, masks.pruned, masks.size)
    assert [(t.name, t.zeros) for t in said.tensors] == [(t.name, t.zeros) for t in written.tensors]
    assert said.notes == written.notes
    assert state_of(src) == before


def require_true(result, found, pruned, size):
    """What a result says of the pruned tensors is what the tensors hold."""
    for tensor in result.tensors:
        values = found[tensor.name]
        facts = values.numel(), values.numel() - int(torch.count_nonzero(values)), tuple(values.shape)
        assert (tensor.weights, tensor.zeros, tensor.shape) == facts
    assert result.total.weights == size
    assert result.notes[0].startswith(f"{pruned:,} of {size:,} weights in scope pruned (")
    more = result.total.zeros - pruned
    assert result.notes[0].endswith(f"and {more:,} others were zero already" if more else ")")


BIG = {
    "coarse bf16": lambda g: {
        f"w{i}": (torch.randn(n, 3, generator=g) * 8).round().bfloat16() for i, n in enumerate((90_001, 7, 40_000))
    },
    "floats and doubles": lambda g: {
        "a": torch.randn(300, 1000, generator=g),
        "b": torch.randn(70_001, 2, generator=g).double(),
        "c": torch.randn(3, generator=g),
    },
    "complex": lambda g: {"a": torch.randn(300, 500, 2, generator=g, dtype=torch.complex64), "b": torch.ones(50, 50)},
    "constants": lambda g: {"a": torch.full((600, 500), 0.5), "b": torch.full((600, 500), -0.5)},
    "long rows": lambda g: {"a": torch.randn(2, 300_008, generator=g), "b": (torch.randn(9, 4) * 2).round().half()},
}


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@pytest.mark.parametrize("kind", BIG)
def test_as_in_memory_beyond_a_chunk(tmp_path, kind):
    tensors = BIG[kind](torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "m.safetensors")
    sc.save(tensors, tmp_path / "p.safetensors", effort="fast")
    for source, allocation, sparsity in [("m", "global", 0.9), ("p", "global", 0.35), ("m", "erk", 0.5)]:
        src, out = tmp_path / f"{source}.safetensors", tmp_path / "out.safetensors"
        ordered = dict(iter_tensors(src))
        want, _ = in_memory(ordered, sparsity, allocation)
        prune_checkpoint(src, out, Recipe(sparsity, allocation))
        same(load_file(out), want)


@pytest.mark.parametrize("kind", ["floats and doubles", "complex", "long rows"])
def test_patterns_as_in_memory_beyond_a_chunk(tmp_path, kind):
    tensors = {n: t for n, t in BIG[kind](torch.Generator().manual_seed(0)).items() if t.shape[-1] != 2 or t.ndim > 2}
    tensors = {name: t[:, :-2] if t.ndim > 1 and t.shape[1] % 4 == 2 else t for name, t in tensors.items()}
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    want, _ = in_memory(load_file(tmp_path / "m.safetensors"), 0.5, pattern=sc.n_m(2, 4))
    prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", Recipe(0.5, pattern=sc.n_m(2, 4)))
    same(load_file(tmp_path / "out.safetensors"), want)


@given(st.floats(0, 1), st.lists(st.integers(1, 300), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_the_count_is_exact(tmp_path_factory, sparsity, rows):
    place = tmp_path_factory.mktemp("count")
    tensors = {f"w{i}": torch.rand(n, 2) + 1 for i, n in enumerate(rows)}
    save_file(tensors, place / "m.safetensors")
    count = math.floor(Fraction(str(sparsity)) * 2 * sum(rows) + Fraction(1, 2))
    if count > 2 * sum(rows) - len(rows):
        with pytest.raises(InputError, match=r"weights cannot go: each tensor keeps 1 at least, .*; ask for less"):
            prune_checkpoint(place / "m.safetensors", None, Recipe(sparsity))
        return
    for allocation in ALLOCATIONS:
        found = prune_checkpoint(place / "m.safetensors", place / "out.safetensors", Recipe(sparsity, allocation))
        assert (
            found.total.zeros
            == count
            == sum(int((t == 0).sum()) for t in load_file(place / "out.safetensors").values())
        )


def test_ties_go_in_the_order_of_the_index(tmp_path):
    first, second = {"a": torch.ones(2, 2), "d": torch.ones(2, 2)}, {"b": torch.ones(2, 2), "c": torch.ones(2, 2)}
    shards(tmp_path / "model", first, second, order=["c", "a", "d", "b"])
    found = prune_checkpoint(tmp_path / "model", tmp_path / "out", Recipe(6 / 16))
    assert {t.name: t.zeros for t in found.tensors} == {"c": 3, "a": 3, "d": 0, "b": 0}
    assert [t.name for t in found.tensors] == ["c", "a", "d", "b"]


def test_a_tensor_that_would_end_empty_keeps_its_largest_weight(tmp_path):
    torch.manual_seed(0)
    tensors = {"big": torch.randn(40, 40) + 9, "small": torch.randn(20, 20) / 1e6}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.warns(SecateurWarning, match=r"small keeps under 1 % of its weights.*raise its share with allocation"):
        found = prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe(0.5))
    assert {t.name: t.zeros for t in found.tensors} == {"big": 601, "small": 399}
    left = load_file(tmp_path / "o.safetensors")["small"]
    assert left.abs().max() == tensors["small"].abs().max()


def test_tied_tensors_are_pruned_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    torch.save({"embed": shared, "fc": torch.randn(4, 4), "head": shared}, tmp_path / "m.pt")
    found = prune_checkpoint(tmp_path / "m.pt", tmp_path / "plain.safetensors", Recipe(0.5))
    assert (found.total.weights, found.total.zeros) == (40, 20)
    assert "1 as they are, tied to embed: head" in found.notes
    prune_checkpoint(tmp_path / "m.pt", tmp_path / "packed.safetensors", Recipe(0.5), level="lossless")
    plain, packed = (sc.load(tmp_path / f"{name}.safetensors") for name in ("plain", "packed"))
    same(plain, packed)
    assert torch.equal(plain["embed"], plain["head"])
    assert packed["embed"] is packed["head"]


@pytest.mark.parametrize("name", ["embed", "head", "hea?"])
def test_a_tied_tensor_goes_by_any_of_its_names(tmp_path, name):
    shared = torch.rand(6, 4) + 1
    torch.save({"embed": shared, "fc": torch.rand(4, 4) + 1, "head": shared}, tmp_path / "m.pt")
    found = prune_checkpoint(tmp_path / "m.pt", None, Recipe(0.5, only=(name,)))
    assert [(t.name, t.zeros) for t in found.tensors] == [("embed", 12)]
    found = prune_checkpoint(tmp_path / "m.pt", None, Recipe(0.5, skip=(name,)))
    assert [(t.name, t.zeros) for t in found.tensors] == [("fc", 8)]


@pytest.mark.parametrize("level", ["lossless", "fp16", "near"])
def test_packed_as_it_is_pruned(file, tmp_path, level):
    plain, there = tmp_path / "plain.safetensors", tmp_path / "there.safetensors"
    prune_checkpoint(file, plain, Recipe(0.5))
    found = prune_checkpoint(file, tmp_path / "once.safetensors", Recipe(0.5), level=level)
    pack(plain, there, level=level)
    assert (tmp_path / "once.safetensors").read_bytes() == there.read_bytes()
    assert found.total.zeros == 64


@pytest.mark.parametrize("level", [None, "lossless", "bf16", "small"])
def test_what_it_says_of_packed_tensors_is_what_the_file_says(tmp_path, level):
    tensors = {"w": torch.randn(40, 50), "tiny": torch.randn(3, 5), "half": torch.randn(40, 50).half()}
    torch.save(tensors, tmp_path / "m.pt")
    found = prune_checkpoint(tmp_path / "m.pt", tmp_path / "o.safetensors", Recipe(0.5), level=level)
    there = {t.name: replace(t, error=None) for t in inspect(tmp_path / "o.safetensors").tensors}
    assert {t.name: replace(t, error=None) for t in found.tensors} == there
    lossy = {t.name for t in found.tensors if t.error is not None}
    assert lossy == {None: set(), "lossless": set(), "bf16": {"w"}, "small": {"w", "half"}}[level]
    assert all(0 < t.error < 0.1 for t in found.tensors if t.error is not None)


# ---- what is chosen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "skip", "names"),
    [
        ((), (), ["enc.fc.weight", "head.weight"]),
        (("enc",), (), ["enc.fc.weight"]),
        (("enc.*",), (), ["enc.fc.weight"]),
        (("enc.fc.bias",), (), ["enc.fc.bias"]),
        (("enc.fc.bias", "head"), (), ["enc.fc.bias", "head.weight"]),
        ((), ("head",), ["enc.fc.weight"]),
        (("*",), ("enc.*",), ["head.weight"]),
        (("*weight",), (), ["enc.fc.weight", "head.weight"]),
    ],
)
def test_only_and_skip(file, only, skip, names):
    found = prune_checkpoint(file, None, Recipe(0.5, only=only, skip=skip))
    assert sorted(t.name for t in found.tensors) == names
    assert found.total.zeros == found.total.weights // 2


def test_one_glob_may_stand_alone(file):
    for options in ({"only": "enc"}, {"skip": "head"}):
        found = prune_checkpoint(file, None, Recipe(0.5, **options))
        assert [t.name for t in found.tensors] == ["enc.fc.weight"]


def test_it_says_what_is_left_and_why(file):
    notes = prune_checkpoint(file, None, Recipe(0.5, skip=("head*",))).notes
    assert notes == (
        "48 of 96 weights in scope pruned (50.00 %)",
        "1 as they are, fewer than two dimensions: enc.fc.bias",
        "1 as they are, skipped: head.weight",
        "1 as they are, int8: table",
    )


def test_zeros_that_were_there_count(tmp_path):
    save_file({"w": torch.tensor([[0.0, -0.0, 0.0], [1.0, 2.0, 3.0]])}, tmp_path / "m.safetensors")
    found = prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe(1 / 3))
    assert found.notes == ("2 of 6 weights in scope pruned (33.33 %), and 1 others were zero already",)
    assert found.total.zeros == 3
    left = load_file(tmp_path / "o.safetensors")["w"]
    assert torch.equal(left.signbit(), torch.zeros(2, 3, dtype=torch.bool))
    found = prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "o.safetensors", Recipe(4 / 6))
    assert found.total.zeros == 4


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe(0.5, only=("decoder.*",)), UnknownNameError, r"'decoder\.\*' matches no tensor; .*names are: "),
        (Recipe(0.5, skip=("head.wieght",)), UnknownNameError, "nearest names are: head.weight"),
        (Recipe(0.5, skip=("*",)), InputError, "nothing to prune: .*skipped"),
        (Recipe(0.5, only=("table",)), InputTypeError, r"table is torch.int8: only fp16, bf16, fp32, fp64 and complex"),
        (Recipe(0.5, "lamp"), InputError, "no allocation named 'lamp' for files: choose global, uniform, erk$"),
        (Recipe(0.5, "Global"), InputError, "choose global, uniform, erk"),
        (Recipe(True), InputError, "sparsity is True, a bool: give the fraction"),
        (Recipe("0.9"), InputError, "sparsity is '0.9', a str: give the fraction"),
        (Recipe(math.nan), InputError, "sparsity is nan: give the fraction"),
        (Recipe(1.1), InputError, "sparsity is 1.1, outside 0 to 1: give the fraction"),
        (Recipe(-0.1), InputError, "outside 0 to 1: give the fraction"),
        (Recipe(1), InputTypeError, r"the int 1, .*write 1.0 for a fraction"),
        (
            Recipe(1.0),
            InputError,
            "128 weights cannot go: each tensor keeps 1 at least, which leaves 126; ask for less",
        ),
        (Recipe(0.9, pattern=sc.n_m(2, 4)), InputError, "pattern .* makes a sparsity of 0.5; asked was 0.9"),
        (Recipe(True, pattern=sc.n_m(2, 4)), InputError, "sparsity is True"),
        (Recipe(0.4, pattern=sc.n_m(3, 5)), PatternError, r"has 12 inputs, no multiple of 5: .*leave it out"),
        (Recipe(0.5, pattern="2/4"), InputError, "no pattern named '2/4' for files: choose free, 2:4, rows$"),
        (Recipe(0.5, pattern="4:4"), InputError, "n of m weights are kept, so 0 < n < m"),
        (Recipe(0.5, pattern="columns"), InputError, "no pattern named 'columns' for files: choose free, 2:4, rows$"),
        (Recipe(0.5, pattern=sc.blocks(2, 2)), InputError, r"no pattern named .*blocks.* for files: choose free, 2:4"),
        (Recipe(0.5, pattern=2), InputTypeError, r"pattern is a int: give sc\.n_m\(2, 4\)"),
        (Recipe(sc.Count(129)), InputError, r"Count\(129\) is more than the 128 weights in scope: ask for fewer"),
        (Recipe({"tail*": 0.5}), UnknownNameError, r"'tail\*' matches no tensor in scope"),
        (Recipe(90.0), InputError, "sparsity is 90.0, .*: write 0.9 for 90 %"),
        (
            Recipe(0.5, only=("enc.fc.bias",), pattern=sc.n_m(2, 4)),
            PatternError,
            "has no input dimension: leave it out",
        ),
    ],
)
def test_a_recipe_that_cannot_be_followed(file, recipe, error, message):
    before = state_of(file.parent)
    for dst in (file.parent / "out.safetensors", None):
        with pytest.raises(error, match=message):
            prune_checkpoint(file, dst, recipe)
    assert state_of(file.parent) == before


def test_a_level_that_there_is_not(file):
    with pytest.raises(InputError, match="no level named 'zip': choose lossless, fp16"):
        prune_checkpoint(file, file.parent / "out.safetensors", Recipe(0.5), level="zip")
    assert names_in(file.parent) == ["m.safetensors"]


@pytest.mark.parametrize("recipe", [*(Recipe(0.5, name) for name in ALLOCATIONS), Recipe(0.5, pattern=sc.n_m(2, 4))])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("packed", [False, True])
def test_nan_and_inf(tmp_path, recipe, bad, packed):
    tensors = {"a": torch.ones(8, 4), "b.weight": torch.ones(8, 4), "c": torch.full((4,), math.nan)}
    tensors["b.weight"][5, 2] = bad
    (sc.save if packed else save_file)(tensors, tmp_path / "m.safetensors")
    kind = r"1 NaN and 0 inf" if math.isnan(bad) else r"0 NaN and 1 inf"
    with pytest.raises(InputError, match=rf"b\.weight holds {kind} among 32 weights.*torch\.nan_to_num_"):
        prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", recipe)
    assert names_in(tmp_path) == ["m.safetensors"]


def test_a_damaged_source(tmp_path):
    sc.save({"a": torch.randn(40, 50), "b": torch.ones(3)}, tmp_path / "m.safetensors")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-400] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=r"a is damaged \(its checksum differs\): copy or download the file again"):
        prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", Recipe(0.5))
    assert names_in(tmp_path) == ["m.safetensors"]


def test_nan_where_nothing_would_be_pruned(tmp_path):
    save_file({"a": torch.randn(100, 100), "b": torch.full((2, 2), math.nan)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="b holds 4 NaN"):  # erk takes nothing of a tensor as small as that
        prune_checkpoint(tmp_path / "m.safetensors", None, Recipe(0.01, "erk"))


def test_finite_numbers_whose_sum_is_not(tmp_path):
    save_file({"w": torch.full((8, 4), torch.finfo(torch.float32).max)}, tmp_path / "m.safetensors")
    assert prune_checkpoint(tmp_path / "m.safetensors", None, Recipe(0.25)).total.zeros == 8


def test_empty_tensors(tmp_path):
    tensors = {"w": torch.empty(0, 4), "v": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    for recipe in (Recipe(0.5), Recipe(0.5, pattern=sc.n_m(2, 4))):
        found = prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", recipe)
        assert [(t.name, t.weights, t.zeros) for t in found.tensors] == [("v", 16, 8)]
        assert found.notes[1:] == ("1 as they are, empty: w",)
        same(load_file(tmp_path / "out.safetensors"), in_memory(tensors, 0.5, pattern=recipe.pattern)[0])
    with pytest.raises(InputError, match=r"nothing to prune: .*w: empty"):
        prune_checkpoint(tmp_path / "m.safetensors", None, Recipe(0.5, skip=("v",)))


# ---- where it is written ----------------------------------------------------------------------------------------


def test_the_source_is_never_the_target(file, folder):
    before = state_of(file.parent)
    inside = folder / "tokenizer" / "out"
    link = file.parent / "link.safetensors"
    link.symlink_to(file)
    for src, dst in [(file, file), (file, link), (folder, folder), (folder, inside), (folder / INDEX, folder / "x")]:
        with pytest.raises(InputError, match=r"is the source, or lies in it, .*: give another place"):
            prune_checkpoint(src, dst, Recipe(0.5))
    link.unlink()
    assert state_of(file.parent) == before


@pytest.mark.parametrize("packed", [False, True])
def test_an_earlier_run_gives_way(folder, tmp_path, packed):
    level = "lossless" if packed else None
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5), level=level)
    prune_checkpoint(folder, tmp_path / "want", Recipe(0.9), level=level)
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.9), level=level)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "want")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "want"]


def test_a_folder_with_anything_else_in_it_stays(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    (tmp_path / "out" / "notes.md").write_text("mine")
    before = state_of(tmp_path)
    with pytest.raises(
        WriteError, match=r"out holds notes.md, which would be lost: give a new folder, or move it away"
    ):
        prune_checkpoint(folder, tmp_path / "out", Recipe(0.9))
    assert state_of(tmp_path) == before


def test_a_file_where_a_folder_is_due_and_the_other_way_round(file, folder, tmp_path):
    before = state_of(tmp_path)
    with pytest.raises(WriteError, match=r"m\.safetensors is a file: give the name of a folder"):
        prune_checkpoint(folder, file, Recipe(0.5))
    with pytest.raises(InputError, match="so let its name end so"):
        prune_checkpoint(file, folder, Recipe(0.5))
    with pytest.raises(WriteError, match=r"was not written .*make its folder first"):
        prune_checkpoint(file, tmp_path / "none" / "out.safetensors", Recipe(0.5))
    with pytest.raises(WriteError, match=r"was not written .*make its folder first"):
        prune_checkpoint(folder, tmp_path / "none" / "out", Recipe(0.5))
    assert state_of(tmp_path) == before


def test_nothing_is_written_without_a_target(folder, tmp_path):
    before = state_of(tmp_path)
    said = prune_checkpoint(folder, None, Recipe(0.5))
    assert state_of(tmp_path) == before
    done = prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    assert said.notes == done.notes
    assert [(t.name, t.zeros) for t in said.tensors] == [(t.name, t.zeros) for t in done.tensors]


@pytest.mark.parametrize("level", [None, "lossless"])
def test_the_files_of_a_folder(folder, tmp_path, level):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    before = state_of(folder)
    found = prune_checkpoint(folder, tmp_path / "out", Recipe(0.5), level=level)
    assert state_of(folder) == before
    names = [name for name in names_in(folder) if name != "pytorch_model.bin"]
    if level:
        names = sorted(name.replace(".safetensors", ".packed.safetensors") for name in names)
    assert names_in(tmp_path / "out") == names
    assert found.notes[-1] == "left out: pytorch_model.bin (other weights)"
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    index = tmp_path / "out" / (INDEX.replace("model.", "model.packed.") if level else INDEX)
    before, after = json.loads((folder / INDEX).read_text()), json.loads(index.read_text())
    assert after["metadata"] == before["metadata"]
    want = before["weight_map"]
    if level:
        want = {name: shard.replace(".safetensors", ".packed.safetensors") for name, shard in want.items()}
    assert list(after["weight_map"].items()) == list(want.items())
    assert found.file_bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_each_shard_keeps_its_metadata(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    for i, shard in enumerate(sorted((tmp_path / "out").glob("*.safetensors")), 1):
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"shard": str(i)}


@pytest.mark.parametrize("level", [None, "lossless"])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path, level):
    tensors = {"a": torch.randn(700, 900), "b": (torch.randn(1200, 1000) * 4).round().bfloat16()}
    save_file(tensors, tmp_path / "m.safetensors")
    threads, found = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", Recipe(0.7, "erk"), level=level)
            found.add((tmp_path / "out.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_write_the_same_bytes(tmp_path, packed):
    metadata = {f"key{i}": "ü" * i for i in range(20)}
    shards(tmp_path / "model", {"a": torch.randn(20, 30)}, {"b": torch.randn(20, 30)}, metadata=metadata)
    for name in ("one", "two"):
        prune_checkpoint(tmp_path / "model", tmp_path / name, Recipe(0.5), level="lossless" if packed else None)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_with_nothing_pruned_the_file_is_that_of_safetensors(folder, file, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.0))
    assert bytes_of(tmp_path / "out") == bytes_of(folder)
    prune_checkpoint(file, tmp_path / "out.safetensors", Recipe(0.0))
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


def test_a_folder_of_links(folder, tmp_path):
    snapshot = tmp_path / "snapshot"  # as in the cache of Hugging Face
    snapshot.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    before = state_of(folder)
    prune_checkpoint(snapshot, tmp_path / "out", Recipe(0.5))
    prune_checkpoint(folder, tmp_path / "want", Recipe(0.5))
    assert state_of(folder) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    want = bytes_of(tmp_path / "want")
    assert bytes_of(tmp_path / "out") == {name: want[name] for name in want if "tokenizer" not in name}


def test_a_folder_that_holds_one_file(file, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes(file.read_bytes())
    (alone / "config.json").write_text("{}")
    prune_checkpoint(file, tmp_path / "want.safetensors", Recipe(0.5))
    prune_checkpoint(alone, tmp_path / "out", Recipe(0.5))
    assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "want.safetensors").read_bytes()
    prune_checkpoint(alone, tmp_path / "one.safetensors", Recipe(0.5))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "want.safetensors").read_bytes()


def test_progress_adds_up_to_the_work(folder, tmp_path):
    for recipe in (Recipe(0.5), Recipe(0.25, "uniform"), Recipe(0.5, only=("a",), allocation="erk")):
        done = []
        prune_checkpoint(folder, tmp_path / "out", recipe, progress=done.append)
        assert all(n > 0 for n in done)
        assert sum(done) >= work(folder, recipe)
    pattern = Recipe(0.5, only=("c",), pattern=sc.n_m(2, 4))
    save_file({"c": torch.randn(4, 8)}, tmp_path / "c.safetensors")
    done = []
    prune_checkpoint(tmp_path / "c.safetensors", tmp_path / "o.safetensors", pattern, progress=done.append)
    assert sum(done) == work(tmp_path / "c.safetensors", pattern) == 3 * 4 * 32


def test_an_error_on_the_way_leaves_no_trace(file, folder, tmp_path):
    before = state_of(tmp_path)
    for src, dst in [(file, tmp_path / "out.safetensors"), (folder, tmp_path / "out")]:
        for moment in range(work(src, Recipe(0.5)) // 100):
            seen = iter(range(moment))

            def stop(_, seen=seen):
                if next(seen, None) is None:
                    raise KeyboardInterrupt

            try:
                prune_checkpoint(src, dst, Recipe(0.5), level="lossless", progress=stop)
            except KeyboardInterrupt:
                assert state_of(tmp_path) == before
            else:
                break
        shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
        assert moment > 3


# ---- killed at any moment ---------------------------------------------------------------------------------------


KILLER = """
import json, os, signal, sys
from pathlib import Path
from secateur.storage import Recipe, prune_checkpoint
import secateur.storage.stored, shutil

folder, level, old = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
src, out, want = folder / "model", folder / "out", folder / "want"
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree"}


def bytes_of(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def in_a_fork(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def prune(sparsity=0.5):
    prune_checkpoint(src, out, Recipe(sparsity), level=level)


def killed_at(moment):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in TOUCHES:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    prune()


source = bytes_of(src)
in_a_fork(prune)
out.rename(want)
wanted, earlier, moment = bytes_of(want), None, 0
while True:
    if old:
        assert in_a_fork(lambda: prune(0.25)) == 0
        earlier = bytes_of(out)
    moment += 1
    status = in_a_fork(lambda: killed_at(moment))
    assert bytes_of(src) == source, moment
    if status == 0:
        break
    assert status == signal.SIGKILL, (moment, status)
    assert not out.exists() or bytes_of(out) in (wanted, earlier), moment
    assert in_a_fork(prune) == 0, moment
    assert bytes_of(out) == wanted, moment
    left = sorted(p.name for p in folder.iterdir())
    assert left == ["model", "out", "want"], (moment, left)
    shutil.rmtree(out)
print(moment)
"""


def run(*arguments, **options):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("old", ["", "old"])
@pytest.mark.parametrize("level", ["", "lossless"])
def test_killed_at_each_step_it_takes_on_files(folder, tmp_path, level, old):
    """Before each opening, renaming or removing of a file: then, as ever, what is there is whole, and is made again."""
    steps = int(run("-c", KILLER, tmp_path, level, old))
    assert steps > 20


def started(src, out, *more):
    command = [sys.executable, "-m", "secateur", "prune", src, "--sparsity", "0.9", "-o", out, *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_at_any_moment(tmp_path):
    torch.manual_seed(0)
    parts = [{f"{i}.{j}": torch.randn(1024, 2048) for j in range(2)} for i in range(4)]  # 67 MB
    src, want, out = shards(tmp_path / "model", *parts), tmp_path / "want", tmp_path / "out"
    (src / "config.json").write_text("{}")
    start = time.monotonic()
    assert started(src, want).wait() == 0
    whole = time.monotonic() - start
    source, wanted = state_of(src), bytes_of(want)
    seen = set()
    for i in range(12):
        process = started(src, out)
        if i % 2:  # while it writes
            while process.poll() is None and not list(tmp_path.glob(".out.*")):
                time.sleep(0.001)
            time.sleep(0.004 * i)
        else:
            time.sleep(whole * (0.4 + 0.055 * i))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state_of(src) == source
        assert not out.exists() or bytes_of(out) == wanted
        seen.add((bool(list(tmp_path.glob(".out.*"))), out.exists()))
    assert (True, False) in seen  # some were killed as they wrote
    assert started(src, out).wait() == 0
    assert bytes_of(out) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "want"]


# ---- several processes ------------------------------------------------------------------------------------------


def torchrun(processes, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port]
    command = [sys.executable, *map(str, (*command, "-m", "secateur", "prune", *arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def many_ties(folder, bad=None):
    """Four shards of several sizes, of bf16 and fp32; the ties of the threshold are in all of them."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i, rows in enumerate((300, 3, 120, 40)):
        coarse = (torch.randn(rows, 400, generator=generator) * 4).round()
        parts.append({f"{9 - i}.w": coarse.bfloat16(), f"{i}.v": coarse.t().contiguous(), f"{i}.b": torch.randn(7)})
    if bad is not None:
        parts[2]["2.v"][5, 5] = bad
    return shards(folder, *parts)


@pytest.mark.parametrize("options", [[], ["--pack", "lossless", "--allocation", "erk"]], ids=["plain", "packed"])
def test_of_several_processes_each_writes_its_own_shards(tmp_path, options):
    src = many_ties(tmp_path / "model")
    (src / "config.json").write_text("{}")
    level = "lossless" if options else None
    recipe = Recipe(0.61, "erk" if options else "global")
    alone = prune_checkpoint(src, tmp_path / "alone", recipe, level=level)
    done = torchrun(2, src, "--sparsity", "0.61", "-o", tmp_path / "out", "--json", *options)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    said = json.loads(done.stdout)  # one says it, for all
    assert said == {**alone.to_dict(), "path": str(tmp_path / "out")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "model", "out"]


def test_a_process_may_have_nothing_to_do(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "alone", Recipe(0.5))
    done = torchrun(3, folder, "--sparsity", "0.5", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_of_one_file_the_first_process_does_all(file, tmp_path):
    prune_checkpoint(file, tmp_path / "alone.safetensors", Recipe(0.5, pattern=sc.n_m(2, 4)))
    done = torchrun(2, file, "--sparsity", "0.5", "--pattern", "2:4", "-o", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_what_one_process_finds_ends_all(tmp_path):
    src = many_ties(tmp_path / "model", bad=math.nan)
    before = state_of(src)
    done = torchrun(2, src, "--sparsity", "0.5", "-o", tmp_path / "out")
    assert done.returncode != 0
    assert "2.v holds 1 NaN and 0 inf among 48,000 weights" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert state_of(src) == before


# ---- memory -----------------------------------------------------------------------------------------------------


MEMORY = """
import sys
from pathlib import Path
import torch
from secateur.storage import Recipe, prune_checkpoint


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
prune_checkpoint(sys.argv[1], sys.argv[2], Recipe(0.8), level=sys.argv[3] or None)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("level", ["", pytest.param("lossless", marks=pytest.mark.slow)])
def test_memory_holds_a_few_pieces_only(tmp_path, level):
    wide = torch.randn(20_000_000).view(5000, 4000)
    parts = [{f"{i}.w": wide * (i + 1), f"{i}.v": torch.cat([wide, wide], 1).bfloat16()} for i in range(4)]  # 640 MB
    shards(tmp_path / "model", *parts)
    del wide, parts
    peak = float(run("-c", MEMORY, tmp_path / "model", tmp_path / "out", level))
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "out")
    assert peak < 300  # MB
