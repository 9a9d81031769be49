"""The binding: where the library is looked for, what its header says, what is no library of ours, packing."""

import ctypes
import pickle
import re
from pathlib import Path

import pytest
import torch

from secateur.errors import InputError
from secateur.runtime import native, products

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
    "secateur_pack": (Long, [Address, Long, Long, Long, Number, Address, Long]),
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
@pytest.mark.parametrize("values", native.VALUES)
def test_packing_is_deterministic(loaded, shape, values):
    weight = torch.randn(shape) * (torch.rand(shape) < 0.2)
    blob = native.pack(weight, values=values)
    assert (blob.dtype, blob.dim()) == (torch.uint8, 1)
    assert blob.equal(native.pack(weight.t().contiguous().t(), values=values))


@pytest.mark.parametrize("values", native.VALUES)
@pytest.mark.parametrize(("shape", "groups"), [((1, 1), 1), ((5, 0), 1), ((0, 3), 1), ((40, 1000), 1), ((300, 7), 6)])
def test_what_was_packed_comes_back_rounded_to_nearest_even(isa, shape, groups, values):
    whole = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32).view(torch.float32)  # all bits
    weight = torch.where(torch.rand(shape) < 0.5, whole, torch.randn(shape)) * (torch.rand(shape) < 0.4)
    weight = weight.where(weight.to(values).isfinite() & (weight.to(values) != 0), 0)
    found = native.unpack(native.pack(weight, groups, values), *shape, groups)
    assert found.view(torch.int32).equal(weight.to(values).float().view(torch.int32))


@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16])
def test_every_value_of_16_bits_is_kept(isa, values):
    every = torch.arange(-(2**15), 2**15).short().view(values)
    weight = every.where(every.isfinite(), 1).float().view(-1, 32)
    packed = native.pack(weight, values=values)
    for n in (1, 3, 8, 32):
        got = products.linear(torch.eye(32)[-n:], weight, packed, None, products.ALL)
        assert got.equal(weight[:, -n:].t())


def _thin(*shape, density):
    return torch.randn(shape) * (torch.rand(shape) < density)


@pytest.mark.parametrize(
    ("weight", "groups", "values", "masked"),
    [
        (_thin(64, 256, density=0.5), 1, torch.float32, True),
        (_thin(64, 256, density=0.3), 1, torch.float32, False),
        (_thin(64, 256, density=0.3), 1, torch.bfloat16, True),
        (_thin(64, 256, density=0.3), 1, torch.float16, True),
        (_thin(64, 256, density=0.1), 1, torch.bfloat16, False),
        (torch.ones(2, 256), 1, torch.float32, False),  # as strips of eight rows are computed
        (torch.ones(64, 4), 8, torch.float32, False),
    ],
)
def test_masks_are_for_avx2_and_what_is_dense_enough(isa, weight, groups, values, masked):
    blob = native.pack(weight, groups, values)
    table = int(blob[144:152].view(torch.int64))  # masked_table of the header
    assert (table != 0) == (masked and isa == "avx2")


@pytest.mark.parametrize(("density", "values", "block"), [(0.02, torch.float32, 1000), (0.08, torch.bfloat16, 1000)])
def test_blocks_are_longer_where_rows_would_be_short(isa, density, values, block):
    for share, found in ((density, block), (0.5, 375)):
        blob = native.pack(_thin(16, 3000, density=share), values=values)
        assert int(blob[24:28].view(torch.int32)) == (375 if isa == "avx512" else found)  # block of the header


def test_a_matrix_packed_for_one_instruction_set_runs_on_each(loaded, isa):
    weight, x = _thin(70, 300, density=0.6), torch.randn(1, 300)
    packed = native.pack(weight)
    for other in (b"portable", isa.encode()):
        assert loaded.secateur_set_isa(other) == 0
        found = products.linear(x, weight, packed, None, products.ALL)
        assert torch.allclose(found, x @ weight.t(), atol=1e-4)


def test_what_is_no_packed_matrix_is_not_unpacked(isa):
    blob = native.pack(torch.eye(6, 4))
    assert native.unpack(blob, 6, 4) is not None
    for rows, columns, groups in ((4, 6, 1), (6, 2, 2), (6, 4, 4), (12, 2, 1)):
        assert native.unpack(blob, rows, columns, groups) is None
    assert native.unpack(blob[:-64].clone(), 6, 4) is None
    assert native.unpack(torch.zeros_like(blob), 6, 4) is None
    assert native.unpack(native.pack(torch.ones(4, 4)), 4, 2, groups=2) is None  # not block-diagonal


def test_what_is_too_large_to_pack_says_what_to_do(loaded):
    weight = torch.zeros(1).expand(65535 * 32 + 1, 1)
    with pytest.raises(InputError, match=r"2097121 x 1 cannot be packed\. Leave this layer dense"):
        native.pack(weight)


def test_products_of_one_input_want_matrices_of_one_width(loaded):
    wide, narrow = (native.pack(torch.ones(4, columns)) for columns in (6, 5))
    x, y = torch.ones(2, 6), torch.empty(2, 4)

    def call(count, *blobs):
        given = (ctypes.c_void_p * 2)(*(blob.data_ptr() for blob in blobs))
        none, ys = (ctypes.c_void_p * 2)(), (ctypes.c_void_p * 2)(y.data_ptr(), y.data_ptr())
        return loaded.secateur_products(count, given, None, none, x.data_ptr(), 2, ys, 1)

    assert call(2, wide, wide) == 0
    assert y.equal(torch.full((2, 4), 6.0))
    assert [call(2, wide, narrow), call(0, wide, wide), call(17, wide, wide), call(2, wide, x)] == [-1] * 4


def test_what_fills_large_pages_is_as_small_as_any_other() -> None:
    weight = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    blob = native.pack(weight)
    assert blob.numel() > 2 << 20
    assert blob.untyped_storage().nbytes() == blob.numel()  # all of which a pickle holds
    assert torch.equal(pickle.loads(pickle.dumps(blob)), blob)
    found = native.unpack(blob, 2048, 512)
    assert found is not None
    assert torch.equal(found, weight)
