"""secateur.storage.stored: a tensor is read in pieces, and gives the same wherever it lies."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import InputError, InputTypeError
from secateur.storage import stored
from secateur.storage.container import read_header
from secateur.storage.dtypes import KINDS
from secateur.storage.stored import Alias, InFile, InMemory, count_zeros, parts, regrouped, stored_of, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def lying(tmp_path, tensor):
    """The same tensor in a file, at a place that is no multiple of eight."""
    save_file({"before": torch.ones(3, dtype=torch.int8), "w": tensor}, tmp_path / "m.safetensors")
    slot = read_header(tmp_path / "m.safetensors").slots["w"]
    return InFile("w", tensor.dtype, tensor.shape, tmp_path / "m.safetensors", slot.start)


@pytest.fixture(params=["memory", "strided", "alias", "file", "windows"])
def source(request, tmp_path, monkeypatch):
    """One tensor of 40 x 50 in several places."""
    whole = torch.arange(2000.0).view(40, 50).fmod(7)
    if request.param == "windows":
        monkeypatch.setattr(stored, "_WINDOW", 1024)
    made = {
        "memory": lambda: InMemory("w", whole),
        "strided": lambda: InMemory("w", whole.t().contiguous().t()),
        "alias": lambda: Alias("w", InMemory("v", whole)),
    }
    return whole, made.get(request.param, lambda: lying(tmp_path, whole))()


@pytest.mark.parametrize("count", [1, 64, 256, 4096])
def test_pieces_are_the_tensor_in_order(source, count):
    whole, found = source
    pieces = [piece.clone() for piece in found.pieces(count)]
    assert {len(piece) for piece in pieces[:-1]} <= {count}
    assert 0 < len(pieces[-1]) <= count
    assert torch.equal(torch.cat(pieces), whole.flatten())


@pytest.mark.parametrize("indices", [[], [0], [1999], [3, 4, 1024, 1999], range(2000)])
def test_elements_at_indices(source, indices):
    whole, found = source
    assert torch.equal(found.at(np.array(indices, np.int64)), whole.flatten()[list(indices)])


def test_the_whole_its_zeros_and_its_sizes(source):
    whole, found = source
    assert torch.equal(found.tensor(), whole)
    assert found.zeros() == int((whole == 0).sum())
    assert (found.numel(), found.weights, found.nbytes, found.shape) == (2000, 2000, 8000, (40, 50))
    assert repr(found) == f"{type(found).__name__}('w', float32, (40, 50))"
    room = torch.empty(2000)
    found.read_into(room)
    assert torch.equal(room, whole.flatten())


@pytest.mark.parametrize("dtype", [dtype for dtype, kind in KINDS.items() if kind.code], ids=str)
def test_each_dtype_from_a_file(tmp_path, dtype):
    whole = (torch.arange(160_000) % 2).to(torch.uint8).view(dtype)
    found = lying(tmp_path, whole)
    if dtype is not torch.float4_e2m1fn_x2:  # which torch does not index
        some = np.array([0, 7, 9_999])
        assert torch.equal(found.at(some).view(torch.uint8), whole[some].view(torch.uint8))
    assert torch.equal(found.tensor().view(torch.uint8), whole.view(torch.uint8))
    assert found.zeros() == InMemory("w", whole).zeros()


def test_zeros_are_counted_in_each_dtype():
    for dtype in KINDS:
        if dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
            continue
        assert count_zeros(torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0]).to(dtype)) == 3
    assert count_zeros(torch.zeros(3, dtype=torch.uint8).view(torch.float8_e8m0fnu)) == 0
    pairs = torch.tensor([0x00, 0x80, 0x08, 0x01, 0x10, 0x77], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert count_zeros(pairs) == 8  # 0x8 is -0.0
    assert weights_of(pairs.dtype, pairs.shape) == 12


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_tensor_can_be_counted_and_no_more(layout):
    found = InMemory("w", getattr(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), layout)())
    assert found.zeros() == 3
    for read in (lambda: list(found.pieces(4)), lambda: found.at(np.array([0]))):
        with pytest.raises(InputTypeError, match=r"w is torch\.sparse_.*save tensor\.to_dense\(\)"):
            read()


def test_conjugates_and_negatives_are_what_they_show():
    made = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(next(InMemory("w", made.conj()).pieces(2)), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(next(InMemory("w", made.conj().imag).pieces(2)), torch.tensor([-2.0, 4.0]))


def test_one_memory_seen_alike_is_one_tensor():
    square = torch.arange(9.0).view(3, 3)
    state = {"a": square, "b": square, "c": square.t(), "d": square.clone(), "e": square[:2], "f": square.view(9)}
    found = stored_of({**state, "none": torch.ones(0), "no": torch.ones(0)})
    assert [(t.name, t.of.name) for t in found if isinstance(t, Alias)] == [("b", "a")]
    assert [t.name for t in found] == [*state, "none", "no"]


def test_memory_that_is_there_only_by_strides_is_refused():
    wide = torch.ones(1).expand(1 << 27)
    with pytest.raises(InputError, match=r"w is 536\.9 MB, of which 4 B are stored.*copy it with \.clone\(\)"):
        stored_of({"w": wide})
    with pytest.raises(InputError, match=r"v is .* of which 4 B are stored"):
        stored_of({"w": wide[: 1 << 25], "v": wide[: 1 << 26]})
    assert len(stored_of({"w": wide[:1000]})) == 1


def test_more_than_the_memory_of_the_machine_is_refused_in_words():
    with pytest.raises(InputError, match=r"w takes .* of memory, more than there is: use a machine that has it"):
        InFile("w", torch.float32, torch.Size([1 << 50]), None, 0).tensor()


def test_parts_and_regrouped_keep_each_element():
    flat = torch.arange(10)
    assert [piece.tolist() for piece in parts(flat, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for size in (1, 3, 7, 10):
        pieces = [piece.tolist() for piece in regrouped(parts(flat, size), 4)]
        assert pieces == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(regrouped(iter([]), 4)) == []
