"""secateur.storage.pruning: what pruning in memory gives, bit for bit, from files that are never touched."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from checkpoint_files import in_memory, names_in, same, shards, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import secateur as sc
from secateur import selection
from secateur.errors import (
    FileError,
    InputError,
    InputTypeError,
    PatternError,
    SecateurWarning,
    UnknownNameError,
)
from secateur.sparsity import half_up
from secateur.storage import Recipe, pack, prune_checkpoint
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.support import bits

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
ALLOCATIONS = ["global", "uniform", "erk"]


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
        with pytest.raises(
            InputError, match=r"weights cannot be pruned: each tensor keeps at least 1, .*; ask for less"
        ):
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
    with pytest.warns(SecateurWarning, match=r"small keeps under 1 % of its weights.*try the allocation erk"):
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
            "128 weights cannot be pruned: each tensor keeps at least 1, so that at most 126 can; ask for less",
        ),
        (Recipe(0.9, pattern=sc.n_m(2, 4)), InputError, "pattern .* always gives a sparsity of 0.5, not 0.9"),
        (Recipe(True, pattern=sc.n_m(2, 4)), InputError, "sparsity is True"),
        (Recipe(0.4, pattern=sc.n_m(3, 5)), PatternError, r"has 12 inputs, no multiple of 5: .*leave it out"),
        (Recipe(0.5, pattern="2/4"), InputError, "no pattern named '2/4' for files: choose free, 2:4, rows$"),
        (Recipe(0.5, pattern="4:4"), InputError, "n of m weights are kept, so 0 < n < m"),
        (Recipe(0.5, pattern="columns"), InputError, "no pattern named 'columns' for files: choose free, 2:4, rows$"),
        (Recipe(0.5, pattern=sc.blocks(2, 2)), InputError, r"no pattern named .*blocks.* for files: choose free, 2:4"),
        (Recipe(0.5, pattern=2), InputTypeError, r"pattern is an int: give sc\.n_m\(2, 4\)"),
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


# ---- what pruning in memory takes, files take too ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_as_in_memory(tmp_path_factory, data):
    drawn = data.draw(states([(1, 8), (3, 8), (5, 16), (2, 8, 3), (40, 3)]))
    tensors = {name: tensor for name, tensor in drawn.items() if tensor.ndim > 1}
    place = tmp_path_factory.mktemp("rows")
    sparsity = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.7]))
    allocation = sc.allocation.Allocation(allow_empty=True, shapes_only=True)
    src, ordered = data.draw(sources(tensors))(place)
    out = place / "out" if src.is_dir() else place / "out.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK", data.draw(st.sampled_from([8, 16, 1 << 18])))
        want, masks = in_memory(ordered, sparsity, allocation, "rows")
        written = prune_checkpoint(src, out, Recipe(sparsity, allocation, "rows"))
    same(sc.load(out), want)
    require_true(written, want, masks.pruned, masks.size)


def test_rows_of_any_length_are_ranked_alike(tmp_path):
    torch.manual_seed(0)
    tensors = {"long": torch.randn(3, 300_001), "wide": torch.randn(700, 1000), "one": torch.randn(1, 500_000)}
    save_file(tensors, tmp_path / "m.safetensors")
    want, _ = in_memory(load_file(tmp_path / "m.safetensors"), 0.5, pattern="rows")
    prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", Recipe(0.5, pattern="rows"))
    same(load_file(tmp_path / "out.safetensors"), want)


@pytest.mark.parametrize("sparsity", [{"enc": 0.5, "head.*": 0.25}, {"head": 0.75}, sc.Count(7), sc.Count(0)], ids=str)
def test_a_sparsity_for_each_tensor_and_a_count(file, tmp_path, sparsity):
    tensors = load_file(file)
    found = prune_checkpoint(file, tmp_path / "out.safetensors", Recipe(sparsity))
    after = load_file(tmp_path / "out.safetensors")
    lost = {name: int((t == 0).sum()) for name, t in after.items() if name.endswith(("fc.weight", "head.weight"))}
    if isinstance(sparsity, sc.Count):
        assert sum(lost.values()) == sparsity.weights
    elif "enc" in sparsity:
        assert lost == {"enc.fc.weight": 48, "head.weight": 8}
    else:
        assert lost == {"enc.fc.weight": 0, "head.weight": 24}
        assert "1 as they are, no sparsity is given for them: enc.fc.weight" in found.notes
        assert torch.equal(after["enc.fc.weight"], tensors["enc.fc.weight"])


def test_an_allocation_that_keeps_more(file):
    found = prune_checkpoint(file, None, Recipe(0.8, sc.allocation.uniform(min_keep=10)))
    assert {t.name: t.weights - t.zeros for t in found.tensors} == {"enc.fc.weight": 16, "head.weight": 10}
    with pytest.raises(InputError, match=r"each tensor keeps at least 0\.5, so that at most 64 can; ask for less"):
        prune_checkpoint(file, None, Recipe(0.9, sc.allocation.uniform(min_keep=0.5)))
    with pytest.raises(InputError, match="for files: choose global, uniform, erk"):
        prune_checkpoint(file, None, Recipe(0.9, sc.allocation.lamp(min_keep=3)))


@pytest.mark.parametrize(
    ("target", "error", "remedy"),
    [
        ("out.pt", sc.errors.InputError, r"give a name that ends in it: out\.safetensors"),
        ("none/out.safetensors", sc.errors.WriteError, "make its folder first"),
        ("m.safetensors", sc.errors.InputError, "give another place"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_a_weight_is_read(tmp_path, target, error, remedy):
    save_file({"w": torch.rand(8, 8)}, tmp_path / "m.safetensors")
    read = []
    with pytest.raises(error, match=remedy):
        prune_checkpoint(tmp_path / "m.safetensors", tmp_path / target, Recipe(0.5), progress=read.append)
    assert read == []


def test_a_number_is_no_recipe(tmp_path):
    save_file({"w": torch.rand(8, 8)}, tmp_path / "m.safetensors")
    with pytest.raises(sc.errors.InputTypeError, match=r"recipe is 0\.95: give a secateur\.storage\.Recipe"):
        prune_checkpoint(tmp_path / "m.safetensors", None, 0.95)


def test_a_tensor_without_a_name_is_shown(tmp_path):
    save_file({"": torch.rand(8)}, tmp_path / "m.safetensors")
    with pytest.raises(sc.errors.InputError, match="nothing to prune: '': fewer than two dimensions"):
        prune_checkpoint(tmp_path / "m.safetensors", None, Recipe(0.5))
