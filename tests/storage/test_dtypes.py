"""secateur.storage.dtypes: each dtype of torch has a form in files, or is refused in words."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import InputTypeError
from secateur.storage.dtypes import BY_CODE, BY_NAME, KINDS, kind_of, name_of, words_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_facts_of_a_dtype_are_those_of_torch(dtype):
    kind = KINDS[dtype]
    assert kind.itemsize == dtype.itemsize
    assert (kind.parts == 2) == dtype.is_complex
    assert kind.word.itemsize == kind.number.itemsize
    assert kind.word.kind == "u"
    if kind.signed and not dtype.is_complex:
        assert words_of(torch.tensor([-0.0]).to(dtype))[0] in (0, 1 << 8 * dtype.itemsize - 1)  # fnuz has no -0.0
        assert words_of(torch.tensor([-1.0]).to(dtype))[0] >> 8 * dtype.itemsize - 1 == 1
    assert BY_NAME[name_of(dtype)] is dtype


@pytest.mark.parametrize("dtype", [dtype for dtype, kind in KINDS.items() if kind.code], ids=str)
def test_safetensors_calls_it_the_same(tmp_path, dtype):
    whole = torch.zeros(2, 8, dtype=torch.uint8).view(dtype)
    save_file({"w": whole}, tmp_path / "m.safetensors")
    assert f'"dtype":"{KINDS[dtype].code}"'.encode() in (tmp_path / "m.safetensors").read_bytes()
    assert load_file(tmp_path / "m.safetensors")["w"].dtype is dtype
    assert BY_CODE[KINDS[dtype].code] is dtype


def test_no_two_dtypes_share_a_code():
    assert len(BY_CODE) == sum(kind.code is not None for kind in KINDS.values())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_words_are_the_bits_in_memory(dtype):
    flat = (torch.arange(64, dtype=torch.uint8) % 2).view(dtype)
    words = words_of(flat)
    assert len(words) == flat.numel() * KINDS[dtype].parts
    assert words.tobytes() == bytes([0, 1] * 32)
    assert words.ctypes.data == flat.data_ptr()


@pytest.mark.parametrize("make", [lambda: torch.ones(3), lambda: nn.Parameter(torch.ones(3)), lambda: torch.ones(())])
def test_plain_tensors_have_a_kind(make):
    assert kind_of("w", make()) is KINDS[torch.float32]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"^w is torch\.sparse_coo, .*: save tensor\.to_dense\(\)$"),
        (
            lambda: torch.empty(3, device="meta"),
            r"^w is on the meta device .*: materialise it first \(to_empty, then load\)$",
        ),
        (nn.UninitializedParameter, "^w is lazy: run one batch through the model first"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            r"^w is a nested tensor, of rows of several sizes: save each of tensor\.unbind\(\)$",
        ),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
            r"^w is torch\.qint8, .*: save tensor\.dequantize\(\)$",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*nested tensors")
def test_others_are_refused_with_what_to_save(make, message):
    with pytest.raises(InputTypeError, match=message):
        kind_of("w", make())
