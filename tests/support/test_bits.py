"""secateur.support.bits: one bit a weight, and +0.0 whatever was there."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.support import bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (0, 3), (3, 0), (5, 7), (16, 16), (3, 4, 5), (2, 3, 4, 5), (1, 1, 1, 1)]
LAYOUTS = ["contiguous", "transposed", "channels_last", "offset", "strided", "column_slice"]


def words(tensor):
    """The bytes of each number, [n, bytes]."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor.detach())
    return flat.view(torch.uint8).view(-1, tensor.element_size())


def anything(shape, dtype, seed=0):
    """Random bits: inf, NaN with any payload, denormals, both zeros."""
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


def laid_out(values, layout):
    """The same numbers in another layout of memory, None where the shape has none such."""
    shape = values.shape
    if layout == "contiguous":
        return values.clone()
    if layout == "offset":
        base = torch.zeros(values.numel() + 3, dtype=values.dtype)
        view = base[3:].view(shape)
    elif layout == "strided":
        base = torch.zeros((*shape, 2), dtype=values.dtype)
        view = base[..., 1]
    elif layout == "transposed" and values.ndim >= 2:
        view = torch.zeros((shape[1], shape[0], *shape[2:]), dtype=values.dtype).transpose(0, 1)
    elif layout == "channels_last" and values.ndim == 4:
        view = torch.zeros(shape, dtype=values.dtype).contiguous(memory_format=torch.channels_last)
    elif layout == "column_slice" and values.ndim >= 2:
        view = torch.zeros((shape[0], shape[1] + 2, *shape[2:]), dtype=values.dtype)[:, 1:-1]
    else:
        return None
    view.copy_(values)
    return view


def some(count, seed=1, density=0.4):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 16])
def test_the_scores_of_pruned_weights_are_floored(dtype, start):
    kept = some(37)
    scores = torch.randn(37 - start, dtype=dtype)
    before = scores.clone()
    want = torch.where(kept[start:], scores, -math.inf)
    assert torch.equal(bits.floor(scores, bits.pack(kept), start), want)
    assert torch.equal(scores, before)


@given(st.lists(st.booleans(), max_size=70))
@settings(deadline=None, max_examples=60)
def test_pack_unpack_count(flags):
    kept = torch.tensor(flags, dtype=torch.bool)
    packed = bits.pack(kept)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-len(flags) // 8),)
    assert torch.equal(bits.unpack(packed, len(flags)), kept)
    assert bits.count(packed) == sum(flags)  # so the spare bits are 0
    for i, flag in enumerate(flags):
        assert (int(packed[i // 8]) >> (i % 8)) & 1 == flag


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_takes_any_shape_in_row_major_order(shape):
    kept = some(math.prod(shape)).view(shape)
    assert torch.equal(bits.unpack(bits.pack(kept), kept.numel()).view(shape), kept)
    if kept.ndim >= 2:
        turned = kept.transpose(0, 1)
        assert torch.equal(bits.unpack(bits.pack(turned), kept.numel()), turned.reshape(-1))


def test_count_of_many():
    assert bits.count(torch.full((100_000,), 255, dtype=torch.uint8)) == 800_000


@pytest.mark.parametrize("chunk", [8, 24, 64, 1 << 18])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (100, 3)])
def test_chunks_cover_row_major(monkeypatch, shape, layout, chunk):
    monkeypatch.setattr(bits, "CHUNK", chunk)
    tensor = laid_out(torch.arange(math.prod(shape), dtype=torch.float32).view(shape), layout)
    if tensor is None:
        return
    position, seen = 0, [torch.empty(0)]
    for start, piece in bits.chunks(tensor):
        assert start == position
        assert start % 8 == 0
        position += piece.numel()
        seen.append(piece)
    assert torch.equal(torch.cat(seen), tensor.reshape(-1))


def test_chunks_of_contiguous_tensors_are_views():
    tensor = torch.zeros(3, 5)
    for _, piece in bits.chunks(tensor):
        piece.fill_(1)
    assert tensor.sum() == 15


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeroer_writes_positive_zero_and_nothing_else(monkeypatch, dtype, layout):
    for chunk in (8, 64, 1 << 18):
        monkeypatch.setattr(bits, "CHUNK", chunk)
        zero = bits.Zeroer()
        for seed, shape in enumerate([*SHAPES, (13, 11), (3, 3, 4, 4)]):
            tensor = laid_out(anything(shape, dtype, seed), layout)
            if tensor is None:
                continue
            kept = some(tensor.numel(), seed)
            want = words(tensor)
            want[~kept] = 0
            zero(tensor, bits.pack(kept))
            assert torch.equal(words(tensor), want), (shape, chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "offset"])
def test_inf_and_nan_never_leak(dtype, layout):
    for value in (math.inf, -math.inf, math.nan, -0.0):
        tensor = laid_out(torch.full((5, 7), value, dtype=dtype), layout)
        bits.Zeroer()(tensor, bits.pack(torch.zeros(35, dtype=torch.bool)))
        assert not words(tensor).any()


def test_zeroer_leaves_the_neighbours_of_a_view_alone():
    base = torch.ones(64)
    bits.Zeroer()(base[5:30].view(5, 5), torch.zeros(4, dtype=torch.uint8))
    assert base[5:30].eq(0).all()
    assert base[:5].eq(1).all()
    assert base[30:].eq(1).all()


@given(st.integers(0, 300), st.sampled_from(DTYPES), st.sampled_from([8, 16, 128]), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_zeroer_of_any_length(length, dtype, chunk, seed):
    tensor, kept = anything((length,), dtype, seed), some(length, seed, 0.5)
    want = words(tensor)
    want[~kept] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "CHUNK", chunk)
        bits.Zeroer()(tensor, bits.pack(kept))
    assert torch.equal(words(tensor), want)


def test_one_zeroer_serves_small_and_large_tensors_of_all_dtypes():
    zero = bits.Zeroer()
    for size in (9, bits.CHUNK + 17, 3 * bits.CHUNK, 1):
        for dtype in DTYPES:
            tensor, kept = torch.ones(size, dtype=dtype), some(size, 3, 0.5)
            zero(tensor, bits.pack(kept))
            assert torch.equal(tensor != 0, kept)


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (2,), ()])
@pytest.mark.parametrize("turned", [False, True])
def test_the_version_of_a_parameter_rises(shape, turned):
    weight = torch.nn.Parameter(torch.ones(shape))
    if turned and len(shape) == 2:
        weight = torch.nn.Parameter(torch.ones(shape[::-1]).t())
    before = weight._version
    bits.Zeroer()(weight, torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8))
    assert weight._version > before
    assert weight.eq(0).all()


def test_a_backward_through_overwritten_weights_is_refused_not_wrong():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    loss = (weight * weight).sum()
    bits.Zeroer()(weight, torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_storage_stays():
    weight = torch.nn.Parameter(torch.randn(9, 9))
    where = weight.data_ptr()
    bits.Zeroer()(weight, bits.pack(some(81)))
    assert weight.data_ptr() == where
    assert weight.requires_grad


def test_zeroing_in_inference_mode():
    with torch.inference_mode():
        tensor = torch.ones(3, 3)
        bits.Zeroer()(tensor, torch.zeros(2, dtype=torch.uint8))
        assert not tensor.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [8, 1 << 18])
def test_alive_counts_pruned_weights_that_are_not_zero(monkeypatch, layout, chunk):
    monkeypatch.setattr(bits, "CHUNK", chunk)
    values = torch.tensor([0.0, -0.0, 1.0, math.nan, math.inf, 1e-45]).repeat(20)[:117].view(9, 13)
    tensor, kept = laid_out(values, layout), some(117, 5).view(9, 13)
    if tensor is not None:
        assert bits.alive(tensor, bits.pack(kept)) == int(((values != 0) & ~kept).sum())


def test_alive_of_a_parameter_that_requires_grad():
    weight = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))
    assert bits.alive(weight, bits.pack(torch.zeros(9, dtype=torch.bool))) == 9


def test_bits_do_not_depend_on_numpy_order():
    kept = torch.from_numpy(np.asfortranarray(np.array([[1, 0, 1], [0, 0, 1]], dtype=bool)))
    assert bits.unpack(bits.pack(kept), 6).tolist() == [True, False, True, False, False, True]


def test_what_is_held_ready_goes_with_its_bits():
    """Small tensors are zeroed again and again: of any layout, dtype and shape, by new bits too, and from copies."""
    zero = bits.Zeroer()
    room = zero._room
    for seed in range(3):
        packed = bits.pack(some(35, seed))
        for _ in range(2):
            for dtype in DTYPES:
                for tensor in (laid_out(anything((5, 7), dtype), layout) for layout in ("contiguous", "transposed")):
                    want = words(tensor)
                    want[~some(35, seed)] = 0
                    zero(tensor, packed)
                    assert torch.equal(words(tensor), want)
            flat = torch.full((35,), math.nan)
            zero(flat, packed)
            assert torch.equal(flat.isnan(), some(35, seed))
        zero = copy.deepcopy(zero)
        assert zero._room == room
    zero(torch.ones(35), packed)
    assert zero._room == room - 35
    del packed
    assert zero._room == room
    assert not zero._ready


def test_what_is_held_ready_follows_a_tensor_to_other_memory():
    zero, packed = bits.Zeroer(), bits.pack(some(35))
    weight = torch.nn.Parameter(torch.ones(5, 7))
    zero(weight, packed)
    first = weight.data
    renewed = (torch.ones(5, 7), torch.ones(7, 5).t(), torch.ones(64)[3:38].view(5, 7), first)
    for data in renewed:
        data.fill_(math.nan)
        weight.data = data
        for _ in range(2):
            before = weight._version
            zero(weight, packed)
            assert weight._version > before
            assert torch.equal(weight.isnan(), some(35).view(5, 7))
            data.fill_(math.nan)
    with torch.no_grad():
        torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.full((5, 7), math.nan)))
    zero(weight, packed)
    assert torch.equal(weight.isnan(), some(35).view(5, 7))


def test_no_more_than_a_million_words_are_held_ready():
    zero, every = bits.Zeroer(), [bits.pack(some(bits.SMALL, seed)) for seed in range(20)]
    for packed in every:
        for _ in range(2):
            tensor = torch.ones(bits.SMALL)
            zero(tensor, packed)
            assert torch.equal(bits.pack(tensor != 0), packed)
    assert len(zero._ready) == 16
