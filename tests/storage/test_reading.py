"""secateur.storage.reading: no damage goes unseen, no lie of a manifest is believed."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from forgery import PACKED, Forgery
from packings import identical, on_threads, sparse, state
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.errors import FileError
from secateur.storage.checkpoints import inspect, iter_tensors, opened
from secateur.storage.coding import BLOCK
from secateur.storage.pruning import Recipe, prune_checkpoint


@pytest.fixture
def file(tmp_path):
    sc.save(state(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


# ---- damage -----------------------------------------------------------------------------------------------------

READS = {
    "load": sc.load,
    "inspect": inspect,
    "iterate": lambda file: dict(iter_tensors(file)),
    "pack": lambda file: sc.pack(file, file.with_name("again.safetensors")),
    "unpack": lambda file: sc.unpack(file, file.with_name("plain.safetensors")),
    "prune": lambda file: prune_checkpoint(file, file.with_name("pruned.safetensors"), Recipe(0.5)),
}
NAMES = [name for name in state() if name != "decoder.weight"]


@pytest.mark.parametrize("name", [name for name in NAMES if state()[name].numel()])
def test_a_flip_anywhere_in_a_tensor_is_found_and_named(file, name):
    forgery = Forgery.of(file)
    place = forgery.place(name)
    for at in {place.start, (place.start + place.stop) // 2, place.stop - 1}:
        for flip in (1, 0x80):
            forgery.data[at] ^= flip
            forgery.save(file)
            for read in READS.values():
                with pytest.raises(FileError, match=rf"m.safetensors: {name} is damaged.*copy or download the file"):
                    read(file)
            forgery.data[at] ^= flip
    identical(sc.load(forgery.save(file)), state())
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]


def outcome(file):
    try:
        return sc.load(file)
    except FileError as error:
        return str(error)


def test_a_flip_anywhere_in_the_header_is_found_or_harmless(file):
    whole = bytearray(file.read_bytes())
    origin, refusals = 8 + int.from_bytes(whole[:8], "little"), 0
    header = whole[8:origin].rstrip()
    for at in range(8, 8 + len(header), 2):
        whole[at] ^= 1
        file.write_bytes(whole)
        found = outcome(file)
        whole[at] ^= 1
        if isinstance(found, dict):  # it was the shape that safetensors is told of an empty tensor or of a scalar
            identical(found, state())
        else:
            assert re.search(
                r"m.safetensors.*(copy or download it again|update it with pip|without its manifest)", found
            )
            refusals += 1
    assert refusals > 0.98 * len(header) / 2


def test_a_packed_file_without_its_manifest_is_no_plain_one(file):
    """Who reads the raw tensors and saves them again, loses the manifest."""
    save_file(load_file(file), file)
    for read in (sc.load, inspect, opened):
        with pytest.raises(FileError, match=r"m.safetensors.*packed.*manifest"):
            read(file)


def refused(file, forgery, message, **how):
    forgery.save(file, **how)
    for read in (sc.load, inspect, opened):
        with pytest.raises(FileError, match=message) as caught:
            read(file)
        assert str(file) in str(caught.value)


DAMAGE = r"its manifest is damaged \(its checksum differs\): copy or download it again"
UNFIT = r"its manifest does not fit the file \(.*\): copy or download it again"


def test_a_manifest_whose_checksum_differs(file):
    forgery = Forgery.of(file)
    forgery.metadata["secateur.crc32"] = "00000000"
    refused(file, forgery, DAMAGE, sealed=False)
    del forgery.metadata["secateur.crc32"]
    refused(file, forgery, DAMAGE, sealed=False)
    forgery.manifest["sha256"] = "0" * 64
    refused(file, forgery, DAMAGE, sealed=False)


@pytest.mark.parametrize("version", [0, 2, 1.5, "1", None, [1], {"a": 1}])
def test_another_version(file, version):
    forgery = Forgery.of(file)
    forgery.manifest = {"version": version, "of": "things unknown"}
    message = "of the format, and this secateur reads version 1: update it with pip install --upgrade secateur"
    refused(file, forgery, message)
    refused(file, forgery, message, sealed=False)  # whose checksum may have another name


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "1", "[]", "{}", '"text"', "[1,", '{"version": 1', "NaN", '{"version":1}', "\x00", "ü"),
        "[" * 20_000,
        "[" * 20_000 + "]" * 20_000,
        '{"version":' * 20_000,
        '{"version":1,"tensors":' * 5_000 + "{}" + "}" * 5_000,
        '{"version":' + "9" * 5_000 + "}",
        '{"version":1,"tensors":{},"metadata":{},"sha256":""}',
        '{"version":1,"tensors":[],"metadata":{},"sha256":""}',
        '{"version":1,"tensors":null,"metadata":{},"sha256":""}',
        '{"version":1,"tensors":"steps","metadata":{},"sha256":""}',
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_manifest(file, text):
    refused(file, Forgery.of(file), f"{UNFIT}|update it with pip", text=text)


@pytest.mark.parametrize("key", ["version", "tensors", "metadata", "sha256"])
def test_a_manifest_that_lacks_a_key(file, key):
    forgery = Forgery.of(file)
    del forgery.manifest[key]
    refused(file, forgery, rf"{UNFIT.replace('.*', f'.*{key}.*')}")


@pytest.mark.parametrize("metadata", [None, [], "pt", 1, ["format"]])
def test_metadata_that_is_none(file, metadata):
    forgery = Forgery.of(file)
    forgery.manifest["metadata"] = metadata
    refused(file, forgery, UNFIT)


HUGE = 2**62


@pytest.mark.parametrize("name", ["embed.weight", "bias", "steps", "empty"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((0, dtype) for dtype in ("float33", "torch.float32", "int4", "", None, 1, [], {}, "quint8", "bits8")),
        *((1, shape) for shape in ([1 << 40], [-1], [-40, -30], [40.0, 30], ["40", 30], [True], None, 7, "ab")),
        *((1, shape) for shape in ([[40, 30]], [HUGE, HUGE], [10**30], [HUGE, HUGE, HUGE, 2**70], [None])),
        *((1, shape) for shape in ([10**30, 0], [HUGE, HUGE, 0], [0, HUGE, HUGE], [2**63, 0])),
        *((3, nonzeros) for nonzeros in (-1, 1201, 10**6, 1.0, None, "1", True, [], 2**70)),
    ],
    ids=str,
)
def test_entries_that_cannot_be(file, name, field, value):
    forgery = Forgery.of(file)
    forgery.tensors[name][field] = value
    forgery.save(file)
    for read in (sc.load, inspect):
        with pytest.raises(FileError, match=r"m.safetensors.*copy or download it again"):
            read(file)


@pytest.mark.parametrize("name", ["embed.weight", "bias"])
@pytest.mark.parametrize(
    "entry",
    [
        *([], {}, None, 1, True, "", "nowhere", 1.5),
        *(["float32"], ["float32", [30], "plain", 30], ["float32", [30], "plain", 30, "0", 0], [None] * 5, [[]] * 5),
    ],
    ids=str,
)
def test_what_is_no_entry(file, name, entry):
    forgery = Forgery.of(file)
    forgery.tensors[name] = entry
    refused(file, forgery, UNFIT)


@pytest.mark.parametrize("name", ["embed.weight", "half", "counts"])
@pytest.mark.parametrize("shape", [[1], [0], [], [20], [BLOCK + 1], [3 * BLOCK], [0, 5], [1 << 40]], ids=str)
def test_a_shape_that_the_blocks_do_not_fit(file, name, shape):
    forgery = Forgery.of(file)
    forgery.tensors[name][1:4:2] = shape, 0
    forgery.save(file)
    with pytest.raises(FileError, match=rf"m.safetensors: {name} .*: the file is damaged, copy or download it again"):
        sc.load(file)


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int32", "uint32", "complex128"])
def test_a_dtype_that_the_blocks_do_not_have(file, dtype):
    forgery = Forgery.of(file)
    forgery.tensors["embed.weight"][0] = dtype
    forgery.save(file)
    with pytest.raises(FileError, match=r"m.safetensors: embed.weight has a block that.*copy or download it again"):
        sc.load(file)


@pytest.mark.parametrize(("field", "value"), [(1, [30, 40]), (1, [41, 30]), (0, "complex64")], ids=str)
def test_a_form_that_the_blocks_may_have_is_found_on_request(file, field, value):
    forgery = Forgery.of(file)
    forgery.tensors["embed.weight"][field] = value
    forgery.save(file)
    assert sc.load(file)["bias"].equal(state()["bias"])
    with pytest.raises(FileError, match=r"m.safetensors: what it decodes to is not what was saved: copy or download"):
        sc.load(file, verify=True)


def test_plain_tensors_of_another_dtype_or_size(file):
    original = Forgery.of(file)
    for name, field, value in [
        *(("bias", 0, "int32"), ("bias", 0, "float16"), ("bias", 1, [29]), ("bias", 1, [31]), ("steps", 1, [2])),
        *(("bias", 2, "lossless"), ("embed.weight", 2, "plain"), ("empty", 1, [3]), ("noise", 0, "uint64")),
    ]:
        forgery = copy.deepcopy(original)
        forgery.tensors[name][field] = value
        if field == 0:
            forgery.tensors[name][3] = 0
        refused(file, forgery, UNFIT)


def test_tensors_that_are_missing_or_unlisted(file):
    original = Forgery.of(file)
    for name in NAMES:
        forgery = copy.deepcopy(original)
        del forgery.tensors[name]
        refused(file, forgery, UNFIT)
        forgery = copy.deepcopy(original)
        forgery.tensors["another"] = list(forgery.tensors[name])
        refused(file, forgery, UNFIT)
        forgery = copy.deepcopy(original)
        forgery.slots["another"] = {
            "dtype": "U8",
            "shape": [8],
            "data_offsets": [len(forgery.data), len(forgery.data) + 8],
        }
        forgery.data += bytes(8)
        refused(file, forgery, UNFIT)


@pytest.mark.parametrize("of", ["nowhere", "decoder.weight", "other", "", "embed.weight" + PACKED])
def test_bad_ties(file, of):
    forgery = Forgery.of(file)
    forgery.tensors["decoder.weight"] = of
    forgery.tensors["other"] = "decoder.weight"
    refused(file, forgery, UNFIT)


def test_ties_in_any_order(file):
    """Nothing says that a tensor comes before its other names."""
    forgery = Forgery.of(file)
    forgery.manifest["tensors"] = dict(sorted(forgery.tensors.items()))
    found = sc.load(forgery.save(file), verify=True)
    assert list(found)[:4] == ["bias", "counts", "decoder.weight", "embed.weight"]
    assert found["decoder.weight"] is found["embed.weight"]


@pytest.mark.parametrize("crc32", ["", "0", "00000000", None, 0, "zzzzzzzz", []])
def test_bad_checksums(file, crc32):
    original = Forgery.of(file)
    for name in NAMES:
        forgery = copy.deepcopy(original)
        if (forgery.tensors[name][4], crc32) != ("00000000", "00000000"):  # that of nothing
            forgery.tensors[name][4] = crc32
            forgery.save(file)
            with pytest.raises(FileError, match=rf"m.safetensors: {name} is damaged \(its checksum differs\)"):
                sc.load(file)


def test_tables_of_blocks_that_lie(file):
    forgery = Forgery.of(file)
    whole = forgery.blob("embed.weight")
    length = int.from_bytes(whole[-4:], "little")
    for table in (0, 1, length - 1, length + 8, len(whole), 2**31, 2**32 - 1):
        forgery.splice("embed.weight", whole[:-4] + table.to_bytes(4, "little"))
        forgery.repair()
        forgery.save(file)
        with pytest.raises(FileError, match=r"m.safetensors: embed.weight has a (table of )?block"):
            sc.load(file)
    for blob in (b"", b"\0" * 4, whole[:-4], whole + bytes(8), whole[8:], bytes(8) + whole):
        forgery.splice("embed.weight", blob)
        forgery.repair()
        forgery.save(file)
        with pytest.raises(FileError, match=r"m.safetensors: embed.weight (has a|claims)"):
            sc.load(file)


def test_blocks_of_one_tensor_in_the_place_of_another(file):
    forgery = Forgery.of(file)
    half, embed = forgery.blob("half"), forgery.blob("embed.weight")
    forgery.splice("half", embed)
    forgery.splice("embed.weight", half)
    forgery.repair()
    forgery.save(file)
    with pytest.raises(FileError, match=r"m.safetensors: (half|embed.weight) has a block that"):
        sc.load(file)


def test_a_bad_block_among_many_on_many_threads(tmp_path):
    sc.save({"w": sparse(5 * BLOCK), "v": torch.ones(300)}, tmp_path / "m.safetensors", effort="fast")
    pristine, model = Forgery.of(tmp_path / "m.safetensors"), nn.ParameterDict({"w": torch.zeros(5 * BLOCK)})
    lengths = np.frombuffer(pristine.blob("w")[-20:], "<u4")
    with on_threads(4):
        for start in np.cumsum([0, *lengths[:-1]]).tolist():
            forgery, blob = copy.deepcopy(pristine), bytearray(pristine.blob("w"))
            blob[start + 4] ^= 1  # the count of its numbers
            forgery.splice("w", blob)
            forgery.repair()
            forgery.save(tmp_path / "m.safetensors")
            for how in ({}, {"verify": True}, {"into": model, "strict": False}):
                with pytest.raises(FileError, match=r"m.safetensors: w has a block .*copy or download it again"):
                    sc.load(tmp_path / "m.safetensors", **how)


def test_blocks_in_another_order_are_found_on_request(tmp_path):
    tensors = {"w": torch.cat([sparse(BLOCK), sparse(BLOCK, seed=1)])}
    file = tmp_path / "m.safetensors"
    sc.save(tensors, file)
    forgery = Forgery.of(file)
    blob = forgery.blob("w")
    first, second = np.frombuffer(blob[-8:], "<u4").tolist()
    rest = blob[first + second : -8]
    forgery.splice("w", blob[first : first + second] + blob[:first] + rest + blob[-4:] + blob[-8:-4])
    forgery.repair()
    found = sc.load(forgery.save(file))["w"]
    assert torch.equal(found, torch.cat(tensors["w"].split(BLOCK)[::-1]))
    with pytest.raises(
        FileError, match=r"m.safetensors: what it decodes to is not what was saved: copy or download it"
    ):
        sc.load(file, verify=True)


# ---- what a small file may claim --------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
import torch
import secateur as sc
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.errors import FileError

sc.load  # imported at first use, which takes memory
torch.ones(8).sum()
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), resource.RLIM_INFINITY))
reads = {
    "load": lambda path: sc.load(path),
    "verify": lambda path: sc.load(path, verify=True),
    "into": lambda path: sc.load(path, into=torch.nn.Linear(30, 40, bias=False)),
    "iterate": lambda path: [tensor.shape for _, tensor in iter_tensors(path)],
}
for path in sys.argv[1:]:
    for how, read in reads.items():
        try:
            read(path)
        except sc.SecateurError as error:
            print(type(error).__name__, how, error)
        else:
            print("read", how, path)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space is bounded as Linux does")
def test_a_small_file_that_claims_a_terabyte(tmp_path):
    sc.save({"weight": sparse(40, 30)}, tmp_path / "m.safetensors")
    huge = [("float32", [1 << 38]), ("float32", [1 << 10, 1 << 28]), ("uint8", [1 << 40]), ("complex128", [1 << 36])]
    many = [("float32", [200 << 20]), ("complex128", [200 << 20])]  # of blocks that take no bytes
    files = []
    for number, (dtype, shape) in enumerate(huge + many):
        forgery = Forgery.of(tmp_path / "m.safetensors")
        forgery.tensors["weight"][:2] = dtype, shape
        files += [forgery.save(tmp_path / f"{number}.safetensors")]
        forgery.splice("weight", bytes(804))
        forgery.repair()
        files += [forgery.save(tmp_path / f"{number}.zeros.safetensors")]
    assert max(file.stat().st_size for file in files) < 2500
    done = subprocess.run([sys.executable, "-W", "error", "-c", BOUNDED, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * len(files)
    assert not [line for line in lines if not line.startswith(("FileError", "InputError into"))]


def test_a_plain_file_with_other_metadata_is_no_packed_one(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", {"format": "pt", "secateur.masks": "1"})
    identical(sc.load(tmp_path / "m.safetensors"), {"w": torch.ones(2)})
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", {"secateur": "pruned to 0.9"})
    with pytest.raises(FileError, match=UNFIT):
        sc.load(tmp_path / "m.safetensors")
