"""The binding: where the library is looked for, what its header says, what is no library of ours, packing."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from secateur.errors import InputError
from secateur.runtime import native

HEADER = (Path(__file__).parents[2] / "native/secateur.h").read_text()
Address, Number, Long, Text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p


@pytest.fixture
def loaded(isa):
    """A library in use."""
    return native.library()


@pytest.fixture
def anew(monkeypatch):
    """Look for the library as in a fresh process."""
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    return lambda path: (monkeypatch.setenv("SECATEUR_LIBRARY", str(path)), native.library())[1]


SIGNATURES = {
    "secateur_isa": (Text, []),
    "secateur_set_isa": (Number, [Text]),
    "secateur_set_parallel": (None, [Address]),
    "secateur_pack": (Long, [Address, Long, Long, Long, Number, Address]),
    "secateur_linear": (Number, [*[Address] * 3, Long, Address, Address, Number]),
    "secateur_chain": (Number, [Number, *[Address] * 5, Long, Address, Number]),
    "secateur_conv2d": (Number, [*[Address] * 6, Number]),
    "secateur_recurrent": (Number, [Number, *[Address] * 8, Long, Long, *[Address] * 4, Long, Number, Number]),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_header_says_what_a_function_takes(name):
    assert native.signatures(HEADER)[name] == SIGNATURES[name]


def test_every_function_of_the_header_is_found():
    assert set(native.signatures(HEADER)) == set(re.findall(r"(secateur_\w+)\(", HEADER))


def test_a_type_that_is_not_known_is_an_error():
    with pytest.raises(KeyError, match="double"):
        native.signatures("SECATEUR_API double secateur_norm(const float* x);")


def test_the_library_tells_the_header_that_it_was_built_with(loaded):
    assert loaded.secateur_header().decode() == HEADER
    assert loaded.secateur_abi() == native.ABI == int(re.search(r"define SECATEUR_ABI (\d+)", HEADER)[1])


def test_each_function_has_its_types(loaded):
    for name, (result, arguments) in native.signatures(HEADER).items():
        function = getattr(loaded, name)
        assert (function.restype, list(function.argtypes)) == (result, arguments)


def test_the_library_of_the_environment_comes_first(loaded, anew):
    path = native._path()
    assert anew(path) is not None
    assert anew("") is None


def test_a_library_of_another_version_is_left_aside(loaded, anew, monkeypatch):
    path = native._path()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert anew(path) is None
    assert native.isa() is None


def test_an_instruction_set_that_is_not_there_is_refused(loaded, isa):
    assert native.isa() == isa
    assert loaded.secateur_set_isa(b"sse9") == -1
    assert native.isa() == isa


@pytest.mark.parametrize("shape", [(1, 1), (5, 0), (40, 100)])
@pytest.mark.parametrize("half", [False, True])
def test_packing_is_deterministic(loaded, shape, half):
    weight = torch.randn(shape) * (torch.rand(shape) < 0.2)
    blob = native.pack(weight, half=half)
    assert (blob.dtype, blob.dim()) == (torch.uint8, 1)
    assert blob.equal(native.pack(weight.t().contiguous().t(), half=half))


def test_what_is_too_large_to_pack_says_what_to_do(loaded):
    weight = torch.zeros(1).expand(65535 * 32 + 1, 1)
    with pytest.raises(InputError, match=r"2097121 x 1 cannot be packed\. Leave this layer dense"):
        native.pack(weight)
