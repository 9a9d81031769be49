"""secateur.storage.archive: a model's state comes back as it was, into whatever it is asked to go."""

import json
import os

import numpy as np
import pytest
import torch
from forgery import PACKED, Forgery
from hypothesis import given, settings
from hypothesis import strategies as st
from oddities import tensor, words
from safetensors.torch import save_file
from saved_models import ZOO, Shared, face, pruned, unchanged
from torch import nn

import secateur as sc
from models import LanguageModel, Mlp, Net, Tagger, build, example, same
from secateur.errors import InputError, WriteError
from secateur.storage.checkpoints import inspect
from secateur.storage.coding import BLOCK
from secateur.storage.dtypes import KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


# ---- a zoo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", ["fast", "normal", "best"])
@pytest.mark.parametrize("kind", ZOO)
def test_a_state_comes_back_to_the_bit(tmp_path, kind, effort):
    model = pruned(kind)
    with unchanged(model, tmp_path / "none"):
        sc.save(model, tmp_path / "m.safetensors", effort=effort)
    state, found = model.state_dict(), sc.load(tmp_path / "m.safetensors", verify=True)
    assert list(found) == list(state)
    assert same(found, state)
    assert all(type(t) is torch.Tensor and t.is_contiguous() and not t.requires_grad for t in found.values())
    fresh = kind().eval()
    fresh.load_state_dict(found, strict=True)
    assert torch.equal(fresh(example(model)), model(example(model)))


@pytest.mark.parametrize("kind", ZOO)
def test_into_a_model_that_stays_what_it_is(tmp_path, kind):
    model, fresh = pruned(kind), build(kind, seed=1).eval()
    for parameter in list(fresh.parameters())[::2]:
        parameter.requires_grad_(False)
    sc.save(model, tmp_path / "m.safetensors")
    before = face(fresh)
    versions = {n: t._version for n, t in fresh.state_dict(keep_vars=True).items()}
    found = sc.load(tmp_path / "m.safetensors", into=fresh)
    assert face(fresh) == before
    assert same(fresh.state_dict(), model.state_dict())
    assert torch.equal(fresh(example(model)), model(example(model)))
    now = fresh.state_dict(keep_vars=True)
    assert all(now[name]._version > versions[name] for name in versions)
    assert list(found) == list(now)
    assert all(found[name].data_ptr() == now[name].data_ptr() for name in now)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore:n_averaged of the AveragedModel")
@pytest.mark.parametrize(
    "wrap",
    [
        *(compiled, nn.DataParallel, torch.optim.swa_utils.AveragedModel),
        *(lambda model: compiled(nn.DataParallel(model)), lambda model: nn.DataParallel(compiled(model))),
    ],
)
def test_into_a_model_through_its_wrappers(tmp_path, wrap):
    model, fresh = pruned(Mlp), wrap(build(Mlp, seed=1))
    plain, wrapped = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    sc.save(model, plain)
    sc.save(wrap(model), wrapped)
    assert wrapped.read_bytes() == plain.read_bytes()
    assert list(sc.load(plain, into=fresh)) == list(model.state_dict())
    sc.save(fresh, wrapped)
    assert wrapped.read_bytes() == plain.read_bytes()


def test_a_wrapper_with_a_state_of_its_own_is_told(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(pruned(Mlp))
    with pytest.warns(sc.errors.SecateurWarning, match=r"n_averaged of the AveragedModel .*save its state_dict\(\)"):
        sc.save(average, tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_into_a_model_of_another_dtype(tmp_path, dtype):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Net, seed=1).to(dtype)
    before = face(fresh)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert face(fresh) == before
    assert same(fresh.state_dict(), model.to(dtype).state_dict())


def test_into_a_model_of_another_memory_format(tmp_path):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Net, seed=1).to(memory_format=torch.channels_last)
    strides = {n: t.stride() for n, t in fresh.state_dict().items()}
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert {n: t.stride() for n, t in fresh.state_dict().items()} == strides
    assert same(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("inside", [True, False])
def test_into_a_model_of_inference_mode(tmp_path, inside):
    model = pruned(Mlp)
    sc.save(model, tmp_path / "m.safetensors")
    with torch.inference_mode():
        fresh = build(Mlp, seed=1)
    with torch.inference_mode(inside):
        sc.load(tmp_path / "m.safetensors", into=fresh)
        sc.save(fresh, tmp_path / "again.safetensors")
    assert same(sc.load(tmp_path / "again.safetensors"), model.state_dict())


def test_several_blocks_into_a_model(tmp_path):
    model = nn.Linear(3000, 1100)
    sc.prune(model, 0.5)
    sc.save(model, tmp_path / "m.safetensors", effort="fast")
    fresh, turned = nn.Linear(3000, 1100), nn.Linear(1, 1)
    turned.weight, turned.bias = nn.Parameter(torch.zeros(3000, 1100).t()), nn.Parameter(torch.zeros(1100))
    for target in (fresh, turned):
        sc.load(tmp_path / "m.safetensors", into=target)
        assert same(target.state_dict(), model.state_dict())


def test_autograd_is_told_of_weights_that_changed_under_it(tmp_path):
    model = pruned(Mlp)
    sc.save(model, tmp_path / "m.safetensors")
    out = model(example(model)).sum()
    sc.load(tmp_path / "m.safetensors", into=model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    model(example(model)).sum().backward()
    assert model.first.weight.grad is not None


def test_an_optimizer_keeps_its_grip(tmp_path):
    model = pruned(Tagger)
    sc.save(model, tmp_path / "m.safetensors")
    fresh = build(Tagger, seed=1)
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    fresh(example(fresh)).sum().backward()
    optimizer.step()
    assert not same(fresh.state_dict(), model.state_dict())


# ---- tied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LanguageModel, Shared])
def test_tied_weights_are_one_object_stored_once(tmp_path, kind):
    model = build(kind)
    sc.prune(model, 0.5, scope=sc.weights(model, only=["decoder.weight"]))
    written = {t.name: t for t in sc.save(model, tmp_path / "m.safetensors").tensors}
    found = sc.load(tmp_path / "m.safetensors")
    assert found["decoder.weight"] is found["embed.weight"]
    assert (written["decoder.weight"].coding, written["decoder.weight"].stored_bytes) == ("tied to embed.weight", 0)
    assert written["decoder.weight"].zeros == written["embed.weight"].zeros > 0
    assert set(Forgery.of(tmp_path / "m.safetensors").slots).isdisjoint({"decoder.weight", f"decoder.weight{PACKED}"})
    fresh = build(kind, seed=1)
    back = sc.load(tmp_path / "m.safetensors", into=fresh)
    assert back["decoder.weight"].data_ptr() == fresh.embed.weight.data_ptr() == fresh.decoder.weight.data_ptr()
    assert fresh.decoder.weight is fresh.embed.weight


def test_tied_there_and_not_here_and_the_other_way_round(tmp_path):
    tied, loose = pruned(LanguageModel), build(LanguageModel, seed=1)
    loose.decoder.weight = nn.Parameter(loose.decoder.weight.detach().clone())
    sc.save(tied, tmp_path / "tied.safetensors")
    sc.load(tmp_path / "tied.safetensors", into=loose)
    assert same(loose.state_dict(), tied.state_dict())
    assert loose.decoder.weight is not loose.embed.weight

    sc.save({n: t.clone() for n, t in tied.state_dict().items()}, tmp_path / "loose.safetensors")
    again = build(LanguageModel, seed=2)
    sc.load(tmp_path / "loose.safetensors", into=again)
    assert same(again.state_dict(), tied.state_dict())


def test_two_values_for_one_weight(tmp_path):
    """A file in which they differ, into a model in which they are one: the last wins, as in torch, on any threads."""
    first, last = torch.randn(2, BLOCK), torch.ones(2, BLOCK)  # slow to read and fast
    sc.save({"a": first, "b": last}, tmp_path / "m.safetensors", effort="fast")
    model = nn.ParameterDict({"a": nn.Parameter(first.clone())})
    model["b"] = model["a"]
    threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for _ in range(5):
            sc.load(tmp_path / "m.safetensors", into=model)
            assert torch.equal(model["a"], last)
    finally:
        torch.set_num_threads(threads)


def test_one_name_of_a_tied_tensor_is_enough(tmp_path):
    model = pruned(LanguageModel)
    state = model.state_dict()
    del state["decoder.weight"]
    sc.save(state, tmp_path / "m.safetensors")
    fresh = build(LanguageModel, seed=1)
    sc.load(tmp_path / "m.safetensors", into=fresh)
    assert same(fresh.state_dict(), model.state_dict())


def test_what_is_tied_and_what_only_looks_so(tmp_path):
    square = torch.randn(40, 40)
    complex_ = torch.randn(40, 40, dtype=torch.complex64)
    state = {
        "square": square,
        "same": square.detach(),
        "across": square.t(),
        "also across": square.t(),
        "upper": square[:20],
        "lower": square[20:],
        "bits": square.view(torch.int32),
        "line": square.view(-1),
        "waves": complex_,
        "conjugate": complex_.conj(),
        "again": complex_.conj(),
        "real": complex_.real,
        "imaginary": complex_.imag,
        "negative": complex_.conj().imag,
        "spread": torch.ones(1).expand(400),
        "none": torch.empty(0),
        "nor": torch.empty(0),
    }
    sc.save(state, tmp_path / "m.safetensors")
    found = sc.load(tmp_path / "m.safetensors", verify=True)
    assert same(found, {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items()})
    assert found["same"] is found["square"]
    assert found["also across"] is found["across"]
    assert found["conjugate"] is not found["waves"]
    assert found["square"].data_ptr() != found["across"].data_ptr()


# ---- other files ------------------------------------------------------------------------------------------------


def test_files_that_were_never_packed(tmp_path):
    model = pruned(Net)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "m.pth")
    for name in ("m.safetensors", "m.pt", "m.pth"):
        assert same(sc.load(tmp_path / name, verify=True), model.state_dict())
        fresh = build(Net, seed=1)
        before = face(fresh)
        sc.load(tmp_path / name, into=fresh)
        assert face(fresh) == before
        assert same(fresh.state_dict(), model.state_dict())


def test_what_was_loaded_has_nothing_more_to_do_with_the_file(tmp_path):
    state = {"w": torch.randn(30, 30)}
    sc.save(state, tmp_path / "m.safetensors")
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for name in ("m.safetensors", "plain.safetensors", "m.pt"):
        found = sc.load(tmp_path / name)
        found["w"].zero_()
        assert same(sc.load(tmp_path / name), state)
        sc.save(sc.load(tmp_path / name), tmp_path / "m.safetensors")
        os.truncate(tmp_path / name, 0)
        assert not found["w"].any()
        sc.save(state, tmp_path / "m.safetensors")


def test_from_a_file_into_itself(tmp_path):
    model = pruned(Net)
    sc.save(model, tmp_path / "m.safetensors")
    once = (tmp_path / "m.safetensors").read_bytes()
    sc.save(sc.load(tmp_path / "m.safetensors"), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == once


@pytest.mark.parametrize(
    ("code", "shape", "data"),
    [
        ("F4", [2, 3], b"abc"),  # rows of one and a half bytes
        ("F32", [0, 2**62, 4], b""),
        ("F32", [2**64 - 1, 0], b""),
        ("F6_E2M3", [4], b"abc"),
    ],
)
def test_plain_tensors_that_torch_has_not(tmp_path, code, shape, data):
    slot = {"dtype": code, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"odd": slot}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    for read in (sc.load, inspect):
        with pytest.raises(InputError, match=r"m.safetensors.*odd is"):
            read(tmp_path / "m.safetensors")


def test_missing_files_and_other_kinds(tmp_path):
    (tmp_path / "m.h5").touch()
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("nowhere.safetensors", "no such file"),
        ("m.h5", "unknown suffix '.h5': give .safetensors"),
        ("folder", "is a folder without an index"),
    ]:
        with pytest.raises(InputError, match=message):
            sc.load(tmp_path / name)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_state_comes_back(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("any") / "m.safetensors"
    state = {}
    for name in data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, min_size=1)
    ):
        dtype = data.draw(st.sampled_from(list(KINDS)))
        shape = data.draw(
            st.sampled_from(
                [(), (0,), (1,), (3, 0, 2), (255,), (256,), (7, 41), (2, 3, 5, 11), (1000,), (1,) * 70 + (300,)]
            )
        )
        sparsity, seed = data.draw(st.sampled_from([0, 0.5, 0.9, 1])), data.draw(st.integers(0, 99))
        size = int(np.prod(shape))
        flat = tensor(words(dtype, size, sparsity, seed), dtype) if size else torch.empty(0, dtype=dtype)
        state[name] = flat.reshape(shape)
    written = sc.save(state, file, effort="fast")
    found = sc.load(file, verify=True)
    assert list(found) == list(state)
    assert same(found, state)
    assert written.file_bytes == file.stat().st_size


def test_blocks_are_read_in_place(tmp_path):
    """Nothing of the size of the model is allocated on the way in."""
    model = nn.Linear(1500, 1500, bias=False)
    sc.prune(model, 0.9)
    sc.save(model, tmp_path / "m.safetensors", effort="fast")
    assert model.weight.numel() > BLOCK
    place = model.weight.data_ptr()
    with torch.no_grad():
        model.weight.fill_(7)
    assert sc.load(tmp_path / "m.safetensors", into=model)["weight"].data_ptr() == place
    assert model.weight.count_nonzero() == model.weight.numel() // 10


def test_what_was_filled_prints_in_a_line_and_is_saved_as_plain(tmp_path):
    model = nn.Linear(3, 2)
    sc.save(model, tmp_path / "m.safetensors")
    filled = sc.load(tmp_path / "m.safetensors", into=model)
    assert repr(filled) == "Filled(2 tensors, 32 B)"
    assert filled["weight"].data_ptr() == model.weight.data_ptr()
    torch.save(filled, tmp_path / "m.pt")
    assert list(torch.load(tmp_path / "m.pt", weights_only=True)) == ["weight", "bias"]
    assert type(sc.load(tmp_path / "m.safetensors")) is dict


# ---- several files ------------------------------------------------------------------------------------------------


def test_a_folder_of_several_files(tmp_path):
    model = build(Shared)
    state = model.state_dict()
    written = sc.save(model, tmp_path / "set", max_file_bytes=1700)  # the embedding is larger
    files = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert files[:2] == [f"model-0000{k}-of-00003.packed.safetensors" for k in (1, 2)]
    assert files[3:] == ["model.packed.safetensors.index.json"]
    assert written.file_bytes == sum((tmp_path / "set" / name).stat().st_size for name in files[:3])
    assert [tensor.name for tensor in written.tensors] == list(state)
    found = sc.load(tmp_path / "set", verify=True)
    assert list(found) == list(state)
    assert same(found, state)
    assert found["decoder.weight"] is found["embed.weight"]
    sc.unpack(tmp_path / "set", tmp_path / "plain")
    plain = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert plain == [*(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), "model.safetensors.index.json"]
    sc.save(model, tmp_path / "one", max_file_bytes=10**9)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.packed.safetensors"]
    assert same(sc.load(tmp_path / "one"), state)


def test_a_folder_is_asked_for_and_stays_whole(tmp_path):
    model = build(Shared)
    sc.save(model, tmp_path / "set", max_file_bytes=4000)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for path, most, told in (
        ("set", 10**9, "which would be lost: give a new folder"),
        ("m.safetensors", 4000, "so give its name, or leave max_file_bytes out"),
        ("set", 0, "max_file_bytes=0: give a whole number of bytes"),
        ("set", True, "max_file_bytes=True: give a whole number of bytes"),
        ("set", None, "give a name that ends in it"),
    ):
        with pytest.raises((InputError, WriteError), match=told):
            sc.save(model, tmp_path / path, max_file_bytes=most)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
