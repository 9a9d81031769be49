"""secateur.masks: an algebra of bits, and a file of one bit a weight."""

import json
import math
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.errors import InputError, InputTypeError, MaskError, UnknownNameError
from secateur.masks import Masks

NAMES = ["a.weight", "b.weight", "c"]
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def models(draw):
    return {name: draw(shapes) for name in NAMES}


def masks_of(shapes_by_name, seed, names=NAMES):
    g = torch.Generator().manual_seed(seed)
    return Masks({name: torch.rand(shapes_by_name[name], generator=g) < 0.5 for name in names})


seeds = st.integers(0, 1000)
some_names = st.lists(st.sampled_from(NAMES), unique=True)


@given(models(), seeds)
@settings(deadline=None, max_examples=100)
def test_reads_as_a_dict_of_bool_tensors(model, seed):
    g = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(shape, generator=g) < 0.5 for name, shape in model.items()}
    masks = Masks(kept)
    assert list(masks) == NAMES
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, kept[name])
        assert masks.shape(name) == mask.shape
        assert masks.counts()[name] == int((~mask).sum())
        assert masks.packed(name).shape == (-(-mask.numel() // 8),)
    assert masks.size == sum(m.numel() for m in kept.values())
    assert masks.pruned == sum(int((~m).sum()) for m in kept.values())
    assert masks.sparsity == (masks.pruned / masks.size if masks.size else 0)


@given(models(), seeds, seeds, seeds, some_names)
@settings(deadline=None, max_examples=100)
def test_laws(model, one, two, three, names):
    a, b, c = (masks_of(model, seed) for seed in (one, two, three))
    part = masks_of(model, two, names)
    for x, y, z in ((a, b, c), (a, part, c)):
        assert x & y == y & x
        assert x | y == y | x
        assert (x & y) & z == x & (y & z)
        assert (x | y) | z == x | (y | z)
        assert x & x == x == x | x
    assert a & (a | b) == a == a | (a & b)
    assert a & (b | c) == (a & b) | (a & c)
    for name in NAMES:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((a & part)[name], a[name] & part[name] if name in part else a[name])


@given(models(), seeds, seeds)
@settings(deadline=None, max_examples=60)
def test_equal_means_same_names_shapes_and_bits(model, one, two):
    a, b = masks_of(model, one), masks_of(model, two)
    assert (a == b) == all(torch.equal(a[name], b[name]) for name in NAMES)
    assert a == Masks({name: a[name] for name in reversed(NAMES)})
    assert a != masks_of(model, one, NAMES[:2])
    assert a != dict(a)


def test_a_shape_is_part_of_what_is_equal():
    assert Masks({"w": torch.ones(2, 3, dtype=torch.bool)}) != Masks({"w": torch.ones(3, 2, dtype=torch.bool)})
    with pytest.raises(TypeError, match="unhashable"):
        hash(Masks({}))


@given(models(), seeds, some_names)
@settings(deadline=None, max_examples=60)
def test_save_and_load(tmp_path_factory, model, seed, names):
    masks = masks_of(model, seed, names)
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    masks.save(path)
    assert Masks.load(path) == masks
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


def test_one_bit_a_weight_in_memory_and_on_disk(tmp_path):
    masks = sc.prune(nn.Linear(512, 512), 0.5)
    assert masks.packed("weight").untyped_storage().nbytes() == 512 * 512 // 8
    masks.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 512 * 512 // 8 + 500


def test_saving_replaces_the_old_file_and_a_failure_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    first, second = masks_of(dict.fromkeys(NAMES, (3,)), 1), masks_of(dict.fromkeys(NAMES, (3,)), 2)
    first.save(path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.support.files._flush", fail)
        with pytest.raises(OSError, match="disk full"):
            second.save(path)
    assert Masks.load(path) == first
    assert len(list(tmp_path.iterdir())) == 1
    second.save(str(path))
    assert Masks.load(str(path)) == second


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_saved_file_is_as_readable_as_any_other(tmp_path):
    Masks({}).save(tmp_path / "m")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_save_into_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Masks({"w": torch.tensor(True)}).save("m.safetensors")
    assert Masks.load("m.safetensors")["w"].shape == ()


DAMAGED = {
    "no metadata": ({"w": torch.zeros(1, dtype=torch.uint8)}, None),
    "another format": ({}, {"format": "pt"}),
    "another version": ({}, {"format": "secateur.masks", "version": "2", "shapes": "{}"}),
    "no shapes": ({}, {"format": "secateur.masks", "version": "1"}),
    "shapes are no json": ({}, {"format": "secateur.masks", "version": "1", "shapes": "{"}),
    "shapes are a list": ({}, {"format": "secateur.masks", "version": "1", "shapes": "[]"}),
    "a shape is text": ({}, {"format": "secateur.masks", "version": "1", "shapes": '{"w": "x"}'}),
    "a shape is a number": ({}, {"format": "secateur.masks", "version": "1", "shapes": '{"w": 3}'}),
    "a tensor is missing": ({}, {"format": "secateur.masks", "version": "1", "shapes": '{"w": [3]}'}),
    "too few bits": (
        {"w": torch.zeros(1, dtype=torch.uint8)},
        {"format": "secateur.masks", "version": "1", "shapes": '{"w": [9]}'},
    ),
    "another dtype": (
        {"w": torch.zeros(1)},
        {"format": "secateur.masks", "version": "1", "shapes": '{"w": [3]}'},
    ),
    "spare bits set": (
        {"w": torch.full((1,), 255, dtype=torch.uint8)},
        {"format": "secateur.masks", "version": "1", "shapes": '{"w": [3]}'},
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(tmp_path, kind):
    tensors, metadata = DAMAGED[kind]
    save_file(tensors, tmp_path / "m", metadata=metadata)
    with pytest.raises(MaskError, match=r"m.*(Masks\.save|damaged)"):
        Masks.load(tmp_path / "m")


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "m"
    masks_of(dict.fromkeys(NAMES, (30,)), 1).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MaskError, match="cannot be read as masks"):
            Masks.load(path)
    with pytest.raises(InputError, match=r"missing cannot be read .*: give a file that is there"):
        Masks.load(tmp_path / "missing")


def test_the_file_is_plain_safetensors(tmp_path):
    from safetensors import safe_open

    masks_of(dict.fromkeys(NAMES, (3, 3)), 1).save(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert json.loads(file.metadata()["shapes"]) == {key: [3, 3] for key in NAMES}
        assert file.get_tensor("c").shape == (2,)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones(2, dtype=torch.uint8), [True], None])
def test_masks_are_boolean(bad):
    with pytest.raises(InputTypeError, match=r"the mask of w is .*give a bool tensor"):
        Masks({"w": bad})


def test_masks_of_other_shapes_cannot_be_combined():
    a, b = (Masks({"w": torch.ones(shape, dtype=torch.bool)}) for shape in ((2, 3), (3, 2)))
    for join in (lambda: a & b, lambda: a | b):
        with pytest.raises(MaskError, match=r"w: masks of shape \(2, 3\) and \(3, 2\).*different models"):
            join()


def test_a_look_up_is_a_copy_and_so_are_the_inputs():
    kept = torch.ones(9, dtype=torch.bool)
    masks = Masks({"w": kept})
    kept.zero_()
    masks["w"].zero_()
    assert masks["w"].all()
    with pytest.raises(KeyError, match="v"):
        masks["v"]


def test_repr_says_how_many():
    masks = Masks({"w": torch.tensor([True, False, False])})
    assert repr(masks) == "Masks(1 tensor, 2 of 3 weights pruned)"
    assert masks.to("cpu") == masks


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))


def test_apply_to_a_model_and_to_its_state_dict():
    model = net()
    masks = sc.prune(net(), 0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masks.apply(model)
    masks.apply(state)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert sc.check(model, masks) == sc.check(state, masks) == {}


def test_from_zeros_takes_both_zeros_and_no_nan():
    found = Masks.from_zeros({"w": torch.tensor([0.0, -0.0, math.nan, 1e-45, 1.0])})
    assert found["w"].tolist() == [False, False, True, True, True]
    model = net()
    masks = sc.prune(model, 0.5)
    assert Masks.from_zeros(sc.weights(model)) == Masks.from_zeros(model) == masks


@pytest.mark.parametrize("verb", ["apply", "check", "remask", "match"])
def test_masks_for_another_model_change_nothing(verb):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    call = {
        "apply": lambda m: m.apply(model),
        "check": lambda m: sc.check(model, m),
        "remask": lambda m: sc.remask(model, m),
        "match": lambda m: m.match(model),
    }[verb]
    good = torch.zeros(3, 5, dtype=torch.bool)
    with pytest.raises(UnknownNameError, match=r"another model: it has no 2\.weight; the nearest names are"):
        call(Masks({"0.weight": good, "2.weight": good}))
    with pytest.raises(MaskError, match=r"1\.weight has shape \(2, 3\), its mask \(3, 2\)"):
        call(Masks({"0.weight": good, "1.weight": torch.zeros(3, 2, dtype=torch.bool)}))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("verb", [sc.check, sc.remask, sc.report])
def test_masks_may_be_a_dict_and_nothing_else(verb):
    model = net()
    masks = sc.prune(model, 0.5)
    assert str(verb(model, dict(masks))) == str(verb(model, masks))
    with pytest.raises(InputTypeError, match=r"masks is a float: give what sc\.prune returned, or a dict of bool"):
        verb(model, 0.5)


@pytest.mark.parametrize("verb", [sc.check, sc.remask, sc.report, lambda model, masks: masks.apply(model)])
@pytest.mark.parametrize(
    ("norm", "remedy"),
    [
        (nn.utils.parametrizations.weight_norm, r"parametrize\.remove_parametrizations\(model\[0\], 'weight'\)"),
        (nn.utils.weight_norm, r"remove_weight_norm\(model\[0\], 'weight'\)"),
        (nn.utils.spectral_norm, r"remove_spectral_norm\(model\[0\], 'weight'\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_weight_that_a_norm_computes_now_is_told_with_the_remedy(norm, remedy, verb):
    model = net()
    masks = sc.prune(model, 0.5)
    norm(model[0])
    with pytest.raises(UnknownNameError, match=rf"0\.weight is computed by .*call torch\.nn\.utils\.{remedy}"):
        verb(model, masks)


def test_check_counts_what_came_back():
    model = net()
    masks = sc.prune(model, 0.5)
    with torch.no_grad():
        model[1].weight[~masks["1.weight"]] = math.nan
    assert sc.check(model, masks) == {"1.weight": masks.counts()["1.weight"]}


def test_remask_says_how_much_was_removed():
    model = nn.Linear(2, 2, bias=False)
    masks = Masks({"weight": torch.tensor([[True, False], [True, True]])})
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 3.0], [6.0, 0.0]]))
    assert sc.remask(model, masks)["weight"] == pytest.approx(3 / 7)
    assert sc.remask(model, masks) == {"weight": 0.0}
    assert sc.check(model, masks) == {}


@pytest.mark.parametrize("removed", [1e-3, 1e-6, 1e-9])
def test_remask_is_right_about_little(removed):
    state = {"w": torch.tensor([1.0, removed])}
    masks = Masks({"w": torch.tensor([True, False])})
    assert sc.remask(state, masks)["w"] == pytest.approx(removed, rel=1e-3)


def test_remask_of_all_and_of_zeros():
    masks = Masks({"w": torch.zeros(3, dtype=torch.bool)})
    assert sc.remask({"w": torch.ones(3)}, masks) == {"w": 1.0}
    assert sc.remask({"w": torch.zeros(3)}, masks) == {"w": 0.0}


def test_a_tied_tensor_answers_to_any_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    Masks({"1.weight": torch.zeros(3, 3, dtype=torch.bool)}).apply(model)
    assert not model[0].weight.any()


# ---- files ------------------------------------------------------------------------------------------------------


def test_the_same_masks_give_the_same_bytes(tmp_path):
    kept = {name: torch.rand(3, 7) > 0.5 for name in ("b", "a.weight", "ä", "c\n")}
    for name, order in (("one", kept), ("two", reversed(kept))):
        Masks({key: kept[key] for key in order}).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert Masks.load(tmp_path / "one") == Masks(kept)


def forged(file, **metadata):
    tensors = {"w": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, file, {"format": "secateur.masks", "version": "1", **metadata})
    return file


@pytest.mark.parametrize(
    "shapes",
    [
        *('{"w": [17]}', '{"w": [1099511627776]}', '{"w": [4294967296, 4294967296]}', '{"w": [-4, -4]}'),
        *('{"w": [9223372036854775808, 0]}', '{"w": [1e400]}', '{"w": 16}', '{"v": [16]}', '["w"]', "16", "", "{"),
        *(
            '{"w": [16.5]}',
            '{"w": [[16]]}',
            '{"w": ["16"]}',
            "[" * 100_000 + "]" * 100_000,
            '{"w": [%s]}' % ("9" * 5000),
        ),
    ],
    ids=lambda text: text[:30],
)
def test_shapes_that_the_bits_do_not_have(tmp_path, shapes):
    with pytest.raises(MaskError, match=r"m\.safetensors (is damaged|cannot be read as masks)"):
        Masks.load(forged(tmp_path / "m.safetensors", shapes=shapes))


def test_what_is_no_file_of_masks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "garbage").write_bytes(os.urandom(1000))
    for place, error, remedy in [
        ("pipe", InputError, "a pipe or a device: copy what it gives to a file first"),
        ("none", InputError, "cannot be read .*: give a file that is there"),
        (".", InputError, "is a folder: give a file in it"),
        ("empty", MaskError, "give a file that Masks.save wrote"),
        ("garbage", MaskError, "give a file that Masks.save wrote"),
    ]:
        with pytest.raises(error, match=remedy):
            Masks.load(tmp_path / place)


def test_masks_are_no_weights_to_load(tmp_path):
    Masks({"w": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "m.safetensors")
    with pytest.raises(
        InputError, match=r"m\.safetensors holds masks, not weights: read it with secateur\.Masks\.load"
    ):
        sc.load(tmp_path / "m.safetensors")


def test_a_name_that_no_file_holds(tmp_path):
    with pytest.raises(InputError, match=r"whose name has '\\ud800': rename it"):
        Masks({"\ud800": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


LAYOUTS = {"csr": torch.Tensor.to_sparse_csr, "coo": torch.Tensor.to_sparse}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_layouts_are_read_and_not_written(layout):
    model = nn.Sequential(nn.Linear(6, 4))
    masks = sc.prune(model, 0.5)
    model[0].weight = nn.Parameter(LAYOUTS[layout](model[0].weight.detach()), requires_grad=False)
    assert sc.check(model, masks) == {}
    assert sc.report(model, masks).got == sc.report(model).got == 0.5
    for verb in (masks.apply, lambda m: sc.remask(m, masks)):
        with pytest.raises(InputTypeError, match=rf"0\.weight is stored as sparse_{layout}.*use its \.to_dense\(\)"):
            verb(model)
    for verb in (sc.weights, lambda m: sc.prune(m, 0.5), lambda m: sc.Pruner(m, 0.5)):
        with pytest.raises(InputError, match=rf"stored as sparse_{layout}.*make it dense first.*skip=\['0\.weight'\]"):
            verb(model)


def test_what_holds_no_numbers_is_named():
    masks = sc.prune(nn.Linear(6, 4), 0.5)
    for model, remedy in [
        (nn.Linear(6, 4, device="meta"), "materialise it first"),
        (nn.LazyLinear(4), "run one batch through the model first"),
    ]:
        verbs = sc.report, *(lambda m, f=f: f(m, masks) for f in (sc.report, sc.check, sc.remask))
        for verb in verbs:
            with pytest.raises(InputError, match=rf"weight is .*{remedy}"):
                verb(model)


def test_what_is_neither_model_nor_state():
    masks = sc.prune(nn.Linear(6, 4), 0.5)
    program = torch.export.export(nn.Linear(6, 4), (torch.ones(1, 6),))
    for verb in (sc.check, sc.remask):
        with pytest.raises(InputTypeError, match=r"expected a torch\.nn\.Module, got ExportedProgram"):
            verb(program, masks)
