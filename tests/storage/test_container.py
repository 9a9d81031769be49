"""secateur.storage.container: headers are those of safetensors, in both directions."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import FileError
from secateur.storage.container import Slot, Writer, damaged, file_form, possible, read_header, room_for, torch_form
from secateur.storage.dtypes import KINDS

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.arange(5, dtype=torch.int8),
    "none": torch.ones(0, 4),
    "one": torch.tensor(3.0, dtype=torch.float64),
}


def test_the_header_of_a_file_that_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    header, whole = read_header(tmp_path / "m.safetensors"), (tmp_path / "m.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    assert set(header.slots) == set(TENSORS)
    for name, slot in header.slots.items():
        assert torch_form(slot) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
        assert slot.nbytes == TENSORS[name].nbytes
        assert whole[slot.start : slot.stop] == TENSORS[name].numpy().tobytes()
    places = [(slot.start, slot.stop) for slot in header.slots.values()]
    assert places == sorted(places)


def write(path, tensors, metadata):
    """Write plain tensors through a Writer, whose room was asked for before their places were known."""
    guessed = [Slot(name, *file_form(t.dtype, t.shape), 10**9, 10**9 + t.nbytes) for name, t in tensors.items()]
    with open(path, "wb") as file:
        writer = Writer(file, room_for(guessed, metadata))
        for name, tensor in tensors.items():
            start = writer.position
            file.write(tensor.numpy().tobytes())
            writer.close(name, *file_form(tensor.dtype, tensor.shape), start)
        writer.finish(metadata)
    return writer


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "é": '\u2028\\"'}])
def test_safetensors_reads_what_a_writer_wrote(tmp_path, metadata):
    tensors = {"é\n": torch.ones(3), **TENSORS}
    writer = write(tmp_path / "m.safetensors", tensors, metadata)
    assert writer.room % 8 == 0
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert (file.metadata() or {}) == metadata
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert list(read_header(tmp_path / "m.safetensors").slots.values()) == sorted(
        writer.slots, key=lambda slot: (slot.start, slot.stop)
    )


@pytest.mark.parametrize("dtype", [dtype for dtype, kind in KINDS.items() if kind.code], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (0, 4)])
def test_the_form_in_files_and_the_form_of_torch_are_inverse(dtype, shape):
    code, there = file_form(dtype, shape)
    assert torch_form(Slot("w", code, there, 0, math.prod(shape) * dtype.itemsize)) == (dtype, shape)


@pytest.mark.parametrize(
    ("code", "shape"),
    [("F4", ()), ("F4", (2, 3)), ("F6_E2M3", (4,)), ("F32", (2**62, 0)), ("F32", (1,) * 1001), ("I64", (2**61,))],
)
def test_forms_that_torch_has_not(code, shape):
    assert torch_form(Slot("w", code, shape, 0, 0)) is None


def test_a_scalar_of_half_a_byte_has_no_form_in_files():
    assert file_form(torch.float4_e2m1fn_x2, ()) == (None, ())


def test_what_is_possible_ends_where_torch_ends():
    assert possible(torch.int8, (2**62,))
    assert possible(torch.int8, (2**63 - 1,))
    assert not possible(torch.int8, (2**63,))
    assert not possible(torch.float32, (2**61, 0))


def header_of(**entry):
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "whole",
    [
        b"",
        b"\0" * 8,
        b"PK\3\4 a zip file",
        header_of()[:-1],
        header_of() + b"\0",
        header_of(shape=[3]),
        header_of(data_offsets=[8, 0]),
        header_of(data_offsets=[4, 12]),
        header_of(dtype="F33"),
        (10**12).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "zeros", "zip", "cut", "longer", "shape", "backwards", "beyond", "dtype", "huge"],
)
def test_damage_is_one_sentence_with_the_file_and_the_remedy(tmp_path, whole):
    path = tmp_path / "m.safetensors"
    path.write_bytes(whole)
    with pytest.raises(
        FileError, match=r"m\.safetensors is damaged or cut short.*: copy or download it again$"
    ) as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_the_reason_of_damage_is_its_first_line(tmp_path):
    assert "(first)" in damaged(tmp_path / "m.pt", " first\nsecond\n")
