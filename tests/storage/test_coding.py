"""secateur.storage.coding: what a block gives back, to the bit or to the step; what is no block is refused."""

import math
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oddities import FLOATS, tensor, words

import secateur as sc
from secateur.errors import InputError
from secateur.storage.coding import BLOCK, EFFORTS, STEPS, CodingError, Decoder, Level, effort_of, encode, level_of
from secateur.storage.dtypes import KINDS, words_of

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

HEAD = struct.Struct("<BBHIIIId")
FIELDS = "sparse", "how", "zero", "count", "gaps", "coded", "exact", "step"
SPARSITIES = 0, 0.05, 0.5, 0.95, 1
SIZES = 0, 1, 7, 1000
NARROW = [Level("fp16"), Level("bf16")]
STEPPED = [*(Level("step", step) for step in STEPS.values()), Level("step", 3.0), Level("step", 1e-3)]
WIDE = torch.float32, torch.float64


def decoded(data, dtype, size, decoder=None):
    out = np.full(size, 0x55, KINDS[dtype].word)
    (decoder or Decoder())(data, dtype, out)
    return out


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SIZES), st.sampled_from(SPARSITIES), st.integers(0, 999), st.sampled_from([0, *EFFORTS.values()])
)
def test_lossless_is_exact_to_the_bit(dtype, size, sparsity, seed, effort):
    original = words(dtype, size, sparsity, seed)
    data = encode(original, dtype, Level(), effort)
    assert np.array_equal(decoded(data, dtype, original.size), original)
    assert encode(original.copy(), dtype, Level(), effort) == data


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_whole_block(dtype):
    original = words(dtype, BLOCK // KINDS[dtype].parts, 0.95)
    data = encode(original, dtype, Level(), 4)
    assert np.array_equal(decoded(data, dtype, BLOCK), original)
    assert len(data) < original.nbytes / 4


@pytest.mark.parametrize("sparsity", [0, 0.95])
def test_more_than_one_block(tmp_path, sparsity):
    for dtype in KINDS:
        state = {"w": tensor(words(dtype, BLOCK + 5, sparsity), dtype)}
        sc.save(state, tmp_path / "m.safetensors", effort="fast")
        back = sc.load(tmp_path / "m.safetensors")["w"]
        assert back.dtype == dtype
        assert np.array_equal(words_of(back), words_of(state["w"])), dtype


def test_zeros_cost_little_and_signs_a_bit():
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    dense = len(encode(words_of(weights), torch.float32, Level(), 8))
    assert dense < 0.95 * weights.nbytes
    weights[torch.arange(100_000) % 10 != 0] = 0
    sparse = len(encode(words_of(weights), torch.float32, Level(), 8))
    assert sparse < 0.12 * weights.nbytes
    assert len(encode(np.zeros(BLOCK, "<u4"), torch.float32, Level(), 8)) < 100


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NARROW), st.sampled_from(SIZES), st.sampled_from(SPARSITIES), st.integers(0, 999), st.booleans())
def test_fp16_and_bf16_round_what_they_can_hold(dtype, level, size, sparsity, seed, tame):
    original = words(dtype, size, sparsity, seed)
    if tame:  # weights as one knows them, and a few odd ones
        usual = np.random.default_rng(seed).standard_normal(size).astype(KINDS[dtype].number)
        original = np.where((original != 0) & (np.arange(size) % 9 != 0), usual.view(KINDS[dtype].word), original)
    data = encode(original, dtype, level, 8)
    back = tensor(decoded(data, dtype, size), dtype)
    exact = tensor(original, dtype)
    narrow = exact.to(torch.float16 if level.name == "fp16" else torch.bfloat16).to(dtype)
    want = torch.where((narrow != 0) & narrow.isfinite(), narrow, exact)  # too large, too small, NaN: exact
    want[exact == 0] = 0.0  # and never -0.0
    assert np.array_equal(words_of(back), words_of(want))
    assert encode(original, dtype, level, 8) == data


def step_of(level, exact):
    """The step of a block by its definition."""
    sizes = exact.double().abs().numpy()
    sizes = sizes[sizes != 0]
    with np.errstate(all="ignore"):
        finite = sizes[np.isfinite(sizes)]
        usual = sizes[sizes <= 64 * np.median(finite)] if finite.size else sizes
        return level.step * np.sqrt(np.square(usual).mean()) if usual.size else 0.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(STEPPED),
    st.sampled_from(SIZES),
    st.sampled_from(SPARSITIES),
    st.integers(0, 999),
    st.sampled_from([None, 1e-30, 0.02, 1.0, 1e4]),
)
def test_a_step_keeps_zeros_signs_survivors_and_half_a_step(dtype, level, size, sparsity, seed, scale):
    original = words(dtype, size, sparsity, seed)
    if scale is not None:
        usual = torch.tensor(scale * np.random.default_rng(seed).standard_normal(1000))
        usual = words_of(usual.to(dtype))[:size]
        original = np.where((original != 0) & (np.arange(size) % 9 != 0), usual, original)
    data = encode(original, dtype, level, 8)
    assert encode(original, dtype, level, 8) == data
    back, exact = tensor(decoded(data, dtype, size), dtype), tensor(original, dtype)
    step = step_of(level, exact)
    assert HEAD.unpack_from(data)[-1] == pytest.approx(step, rel=1e-12, nan_ok=True)

    zero = exact == 0
    assert not words_of(back[zero].contiguous()).any()  # +0.0, to the bit
    assert bool((back[~zero] != 0).all())
    kept = ~zero & ~exact.isnan()
    assert torch.equal(back[kept].sign(), exact[kept].sign())

    same = torch.from_numpy(words_of(back) == words_of(exact))
    sizes, found = exact.double().abs(), back.double().abs()
    out_of_range = ~(sizes <= 65535.5 * step) | ~exact.isfinite()
    assert bool(same[out_of_range & ~zero].all())
    ulp = torch.finfo(dtype).eps * torch.maximum(sizes, found) + torch.finfo(dtype).smallest_normal
    close = (found - sizes).abs() <= step / 2 + ulp
    raised = (sizes < step / 2) & ((found - step).abs() <= ulp)
    assert bool((zero | same | close | raised).all())


@pytest.mark.parametrize("stray", [1e38, -1e38, math.inf, math.nan])
def test_one_stray_number_does_not_make_the_step_coarse(stray):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02
    weights[3] = 0
    level = Level("step", 1 / 64)
    calm = encode(words_of(weights), torch.float32, level, 8)
    wild = torch.cat([weights, torch.tensor([stray])])
    data = encode(words_of(wild), torch.float32, level, 8)
    assert HEAD.unpack_from(data)[-1] == HEAD.unpack_from(calm)[-1] > 0
    assert HEAD.unpack_from(calm)[-2] == 0  # all of them got a code
    back = decoded(data, torch.float32, 1001)
    assert np.array_equal(back[:1000], decoded(calm, torch.float32, 1000))
    assert back[1000] == words_of(wild)[1000]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", ["smallest_normal", "max"])
def test_numbers_at_the_ends_of_a_dtype_survive_a_step(dtype, scale):
    """A step that is nothing, or whose multiples overflow, loses nothing instead."""
    size = getattr(torch.finfo(dtype), scale)
    weights = torch.linspace(-1, 1, 99, dtype=torch.float64).mul(size).to(dtype)
    for level in STEPPED:
        back = tensor(decoded(encode(words_of(weights), dtype, level, 8), dtype, 99), dtype)
        assert bool(back.isfinite().all())
        assert torch.equal(back.sign(), weights.sign())


def test_which_tensors_a_level_is_for():
    for level in NARROW:
        assert [d for d in KINDS if level.for_tensor(d, (3,)) == level] == [torch.float64, torch.float32]
    for level in STEPPED:
        assert {d for d in KINDS if level.for_tensor(d, (3, 4)) == level} == set(FLOATS)
        assert all(level.for_tensor(d, shape) == Level() for d in KINDS for shape in ((), (3,)))


# ---- what is no block -------------------------------------------------------------------------------------------


def block(level, dtype=torch.float32, size=1000):
    """A block with numbers that a level cannot hold among the others, and its bytes."""
    weights = torch.randn(size, generator=torch.Generator().manual_seed(1))
    weights[::3], weights[1::50] = 0, 1e30
    weights[-1] = 1  # a number in the last place
    weights = weights.to(dtype)
    return weights, encode(words_of(weights), dtype, level, 8)


BLOCKS = [Level(), Level("fp16"), Level("bf16"), Level("step", 1 / 16)]


def changed(data, **fields):
    head = dict(zip(FIELDS, HEAD.unpack_from(data), strict=True))
    for field, value in fields.items():
        head[field] = value(head[field]) if callable(value) else value
    return HEAD.pack(*head.values()) + data[HEAD.size :]


@pytest.mark.parametrize("level", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("sparse", [0, 2, 255]),
        ("how", [4, 77, 255]),
        ("zero", [1, 0xFFFF]),
        ("count", [0, 1, lambda n: n - 1, lambda n: n + 1, lambda n: n + 8, 1000, 1001, 2**31, 2**32 - 1]),
        ("gaps", [0, 1, lambda n: n - 1, lambda n: n + 1, 2**31, 2**32 - 1]),
        ("coded", [0, 1, lambda n: n - 1, lambda n: n + 1, 2**31, 2**32 - 1]),
        ("exact", [1, lambda n: n + 1, 2**31, 2**32 - 1]),
    ],
)
def test_a_head_that_lies(level, field, values):
    _, data = block(level)
    for value in values:
        with pytest.raises(CodingError, match=r"^has a block "):
            decoded(changed(data, **{field: value}), torch.float32, 1000)


@pytest.mark.parametrize("level", BLOCKS, ids=str)
def test_any_step_and_any_code_gives_numbers_or_a_refusal(level):
    _, data = block(level)
    for step in (0.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan):
        decoded(changed(data, step=step), torch.float32, 1000)
    for how in range(4):
        try:
            decoded(changed(data, how=how), torch.float32, 1000)
        except CodingError:
            assert (how == 0) != (level.name == "lossless")


@pytest.mark.parametrize("level", BLOCKS, ids=str)
def test_truncations_and_additions(level):
    _, data = block(level)
    for end in [*range(200), *range(200, len(data), 41), len(data) - 1]:
        with pytest.raises(CodingError, match=r"cut short|contradicts itself"):
            decoded(data[:end], torch.float32, 1000)
    with pytest.raises(CodingError, match="contradicts itself"):
        decoded(data + b"\0", torch.float32, 1000)


@pytest.mark.parametrize("level", BLOCKS, ids=str)
def test_sections_that_end_elsewhere_or_change_places(level):
    _, data = block(level)
    _, _, _, count, gaps, coded, exact, _ = HEAD.unpack_from(data)
    cuts = np.cumsum([HEAD.size, gaps, -(-count // 8), coded, exact])
    parts = [data[a:b] for a, b in pairwise(cuts)]
    for one, other in [(0, 2), (0, 3), (2, 3)]:
        swapped = list(parts)
        swapped[one], swapped[other] = parts[other], parts[one]
        lengths = {"gaps": len(swapped[0]), "coded": len(swapped[2]), "exact": len(swapped[3])}
        if parts[one] == parts[other]:
            continue
        with pytest.raises(CodingError, match="has a block"):
            decoded(changed(data[: HEAD.size], **lengths) + b"".join(swapped), torch.float32, 1000)
    for this, that in [("gaps", "coded"), ("coded", "gaps"), ("coded", "exact")]:
        shifted = changed(data, **{this: lambda n: n + 1, that: lambda n: n - 1 if n else 0})
        with pytest.raises(CodingError, match="has a block"):
            decoded(shifted, torch.float32, 1000)


@pytest.mark.parametrize("level", BLOCKS, ids=str)
def test_numbers_beyond_the_end_and_blocks_of_another_size_or_dtype(level):
    _, data = block(level)
    with pytest.raises(CodingError, match="numbers beyond its end"):
        decoded(data, torch.float32, 999)
    assert not decoded(data, torch.float32, 1001)[1000]  # a block ends with as many zeros as one likes
    with pytest.raises(CodingError, match="contradicts itself"):
        decoded(data, torch.float32, 10)
    for dtype in KINDS:
        if dtype is not torch.float32 and (level.name == "lossless" or dtype not in FLOATS):
            if dtype is torch.complex64:
                continue  # two float32 each
            with pytest.raises(CodingError, match="has a block"):
                decoded(data, dtype, 1000)


def test_a_dense_block_has_the_size_it_has():
    original = words(torch.float32, 1000, 0)
    data = encode(original, torch.float32, Level(), 8)
    assert not data[0]
    for size in (0, 999, 1001):
        with pytest.raises(CodingError, match="contradicts itself"):
            decoded(data, torch.float32, size)
    for fields in ({"sparse": 1}, {"how": 1}, {"gaps": 4}):
        with pytest.raises(CodingError, match="has a block"):
            decoded(changed(data, **fields), torch.float32, 1000)


@pytest.mark.parametrize("dtype", [d for d in KINDS if d not in FLOATS], ids=str)
def test_only_floats_lose_bits(dtype):
    data = encode(words(dtype, 1000, 0.5), dtype, Level(), 8)
    for how in (1, 2, 3):
        with pytest.raises(CodingError, match=f"says that a {dtype} lost bits"):
            decoded(changed(data, how=how), dtype, 1000 * KINDS[dtype].parts)


def test_no_number_and_yet_some():
    data = encode(np.zeros(1000, "<u4"), torch.float32, Level(), 8)
    assert len(data) == HEAD.size
    for field in ("gaps", "coded"):
        with pytest.raises(CodingError, match="numbers that nothing asks for"):
            decoded(changed(data, **{field: 4}) + b"1234", torch.float32, 1000)


@pytest.mark.parametrize("level", BLOCKS, ids=str)
def test_flipped_bytes_give_numbers_or_a_coding_error(level):
    _, data = block(level)
    rng, decoder, refused = np.random.default_rng(2), Decoder(), 0
    for _ in range(3000):
        hostile = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            # mostly the head, and the tables of pcodec behind it
            hostile[min(int(rng.exponential(100)), len(data) - 1)] = rng.integers(256)
        try:
            decoded(bytes(hostile), torch.float32, 1000, decoder)
        except CodingError:
            refused += 1
    assert refused > 1000
    assert np.array_equal(decoded(data, torch.float32, 1000, decoder), decoded(data, torch.float32, 1000))


def test_a_decoder_serves_many_blocks():
    rng, decoder = np.random.default_rng(3), Decoder()
    for seed in range(400):
        dtype = list(KINDS)[rng.integers(len(KINDS))]
        size, sparsity = int(rng.choice([0, 1, 7, 300, 5000])), float(rng.choice(SPARSITIES))
        original = words(dtype, size, sparsity, seed)
        levels = [level for level in BLOCKS if level.for_tensor(dtype, (2, 2)) == level]
        data = encode(original, dtype, levels[seed % len(levels)], 4)
        found = decoded(data, dtype, original.size, decoder)
        assert np.array_equal(found, decoded(data, dtype, original.size))
        if seed % 5 == 0:
            with pytest.raises(CodingError, match="has a block"):
                decoded(data[:-1], dtype, original.size, decoder)


# ---- what users may ask for -------------------------------------------------------------------------------------


def test_levels_and_efforts():
    assert [str(level_of(name, None)) for name in ("lossless", "fp16", "bf16")] == ["lossless", "fp16", "bf16"]
    assert [str(level_of(name, None)) for name in STEPS] == ["step 0.015625", "step 0.0625", "step 0.25"]
    assert level_of("lossless", 1 / 64) == level_of("near", None)
    assert level_of("lossless", 2) == Level("step", 2.0)
    assert effort_of("fast") < effort_of("normal") < effort_of("best")


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("fp8", None, "no level named 'fp8': choose lossless, fp16, bf16, near, small, tiny, or give step="),
        (None, None, "no level named None: choose lossless"),
        ("step", None, "no level named 'step'.*or give step="),
        ("near", 0.1, "level='near' and step=0.1 are two levels: give one of them"),
        *(
            ("lossless", step, "step=.*: give a step relative to the rms of the weights, such as 1/64")
            for step in (0, -1.0, math.nan, math.inf, True, "1/64", 0j, [1])
        ),
    ],
)
def test_no_such_level(name, step, message):
    with pytest.raises(InputError, match=message):
        level_of(name, step)


@pytest.mark.parametrize("name", ["slow", None, 8, ""])
def test_no_such_effort(name):
    with pytest.raises(InputError, match=f"no effort named {name!r}: choose fast, normal, best"):
        effort_of(name)
