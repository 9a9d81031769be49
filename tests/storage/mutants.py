"""Damages packed files and reads them: `python mutants.py FOLDER FIRST COUNT`, in a process that may crash.

Each seed makes one damaged file. What was not forged gives what was saved, or an error of secateur that names the file
and leaves a model as it was; what was forged (its checksums are right) gives some tensors or such an error. Prints as
JSON what came of them, how much memory it took, and the seeds that broke this.
"""

import copy
import json
import os
import random
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from forgery import PACKED, Forgery

import secateur as sc
from models import same
from secateur.storage.checkpoints import inspect, iter_tensors
from secateur.storage.coding import BLOCK

ROOM = 256 << 20  # bytes of address space beyond what torch takes
VALUES = [None, True, -1, 0, 1, 2, 7, 255, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63, 10**30, 1.5, 1e308, float("nan")]
VALUES += ["", "x", "float64", "float16", "uint8", "int64", "bool", "complex128", "plain", "lossless", "step 0.1", "0"]
VALUES += ["embed.weight", "tied", [], [0], [1], [[]], {}, {"a": 1}, [2**40, 0], [BLOCK], [BLOCK + 1], [1, 1, 1]]


def states():
    """States that have all that a file can have, each with how it is saved."""
    generator = torch.Generator().manual_seed(0)

    def sparse(*shape):
        return torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.3)

    weight, large = sparse(40, 30), torch.zeros(BLOCK + 100, dtype=torch.uint8)
    large[::70_000] = 7
    small = {
        "embed.weight": weight,
        "bias": torch.arange(30.0),
        "tied": weight,
        "brain": sparse(20, 20).to(torch.bfloat16),
        "dense": torch.randn(20, 20, generator=generator).double(),
        "counts": torch.arange(500),
        "mask": sparse(20, 20) > 0,
        "wave": torch.randn(4, dtype=torch.complex128, generator=generator),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    yield small, {}
    yield small, {"level": "near"}
    yield small, {"level": "fp16"}
    yield {"large": large, "small": weight}, {}


class Holder(nn.Module):
    """A model with a state of any names."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            module = self
            *path, leaf = name.split(".")
            for part in path:
                module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(leaf, torch.zeros_like(tensor))


# ---- damage, of the bytes ---------------------------------------------------------------------------------------


def flips(rng, data):
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwritten(rng, data):
    start = rng.randrange(len(data))
    stop = min(start + rng.choice([1, 4, 50, 1000]), len(data))
    data[start:stop] = rng.choice([bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)])


def truncated(rng, data):
    del data[rng.choice([rng.randrange(len(data)), len(data) - rng.randrange(1, 20)]) :]


def longer(rng, data):
    at = rng.choice([len(data), rng.randrange(len(data))])
    data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))


def shorter(rng, data):
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 8, 100])]


def spliced(rng, data):
    size = rng.choice([1, 8, 64, 500])
    here, there = (rng.randrange(max(len(data) - size, 1)) for _ in range(2))
    data[here : here + size] = data[there : there + size]


# ---- damage, of what the bytes mean -----------------------------------------------------------------------------


def header(rng, forgery):
    """The header of safetensors, not the manifest; no checksum tells."""
    name, slot = rng.choice(list(forgery.slots.items()))
    match rng.randrange(7):
        case 0:
            del forgery.slots[name]
        case 1:
            forgery.slots[name + rng.choice([PACKED, "x"])] = forgery.slots.pop(name)
        case 2:
            slot[rng.choice(list(slot))] = copy.deepcopy(rng.choice(VALUES))
        case 3:
            slot["shape"] = slot["shape"][::-1] + [1] * rng.randrange(2)
        case 4:
            slot["dtype"] = rng.choice(
                ["U8", "I8", "F32", "I32", "F64", "BF16", "F4", "BOOL", "C64", "F8_E4M3", "F6_E2M3"]
            )
        case 5:
            slot["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 2**40])
        case 6:
            forgery.slots["another"] = copy.deepcopy(slot)


def swapped(rng, forgery):
    """Two tensors lie where the other does."""
    one, other = (forgery.slots[rng.choice(list(forgery.slots))] for _ in range(2))
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    if rng.random() < 0.5:
        one["shape"], other["shape"] = other["shape"], one["shape"]
        one["dtype"], other["dtype"] = other["dtype"], one["dtype"]


def manifest(rng, forgery):
    """Anything in the manifest may be anything."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = forgery.manifest
        while isinstance(place, (dict, list)) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or rng.random() < 0.2:
                break
            place = place[key]
        if not isinstance(place, (dict, list)) or not place:
            continue
        old = place[key]
        match rng.randrange(5):
            case 0:
                del place[key]
            case 1:
                other = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
                place[key], place[other] = place[other], place[key]
            case 2 if type(old) is int:
                place[key] = old + rng.choice([-1, 1, old, 2**20, 2**40])
            case 3 if isinstance(place, dict):
                place[str(rng.choice(VALUES))] = copy.deepcopy(old)
            case _:
                place[key] = copy.deepcopy(rng.choice(VALUES))


def blob(rng, forgery):
    """The bytes of tensors, their checksums made right."""
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([n for n, entry in forgery.tensors.items() if isinstance(entry, list) and forgery.blob(n)])
        data = bytearray(forgery.blob(name))
        match rng.randrange(6):
            case 0:  # the head of the first block
                data[rng.randrange(min(28, len(data)))] = rng.choice([0, 1, 2, 3, 127, 128, 255, rng.randrange(256)])
            case 1:  # the table of blocks
                data[-rng.randrange(1, min(9, len(data) + 1))] = rng.randrange(256)
            case 2:  # what pcodec reads first
                data[min(len(data) - 1, rng.randrange(28, 80))] ^= 1 << rng.randrange(8)
            case 3:
                rng.choice([flips, overwritten, spliced])(rng, data)
            case 4:
                rng.choice([truncated, longer, shorter])(rng, data)
            case 5:
                data = bytearray(
                    forgery.blob(rng.choice([n for n, e in forgery.tensors.items() if isinstance(e, list)]))
                )
        if len(data) != len(forgery.blob(name)) and name in forgery.slots:
            continue  # a plain tensor of another size is a matter of the header
        forgery.splice(name, data)
    forgery.repair()


def both(rng, forgery):
    manifest(rng, forgery)
    if isinstance(forgery.manifest.get("tensors"), dict):
        forgery.repair()


BYTES = [flips, overwritten, truncated, longer, shorter, spliced]
MEANING = [header, swapped]
FORGED = [manifest, blob, blob, both]


def mutant(rng, path, pristine):
    """Write a damaged file; returns what was done to it."""
    how = rng.choice([*BYTES, *MEANING, *FORGED])
    if how in BYTES:
        data = bytearray(pristine)
        how(rng, data)
        path.write_bytes(data)
    else:
        forgery = Forgery.of(path)
        how(rng, forgery)
        forgery.save(path)
    return how


def broken(path, rng, saved, how):
    """Read a damaged file in one of many ways; returns what came of it, and what is wrong with that."""
    reads = {
        "load": lambda: sc.load(path),
        "verify": lambda: sc.load(path, verify=True),
        "iterate": lambda: dict(iter_tensors(path)),
        "inspect": lambda: inspect(path) and None,
        "into": lambda: sc.load(path, into=model),
    }
    verb = rng.choice(list(reads))
    model = Holder(saved)
    try:
        found = reads[verb]()
    except sc.SecateurError as error:
        if str(path) not in str(error):
            return "refused", f"{verb}: does not name the file: {error}"
        if how not in FORGED and any(bool(t.view(-1).view(torch.uint8).any()) for t in model.buffers() if t.numel()):
            return "refused", f"{verb}: changed a model"
        return "refused", None
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return "refused", f"{verb}: {type(error).__name__}: {error}"
    exact = how not in FORGED or (how is blob and verb == "verify")
    if exact and found is not None and not same(found, saved):
        return "kept", f"{verb}: gave what was not saved"
    return "kept", None


def main(folder, first, count):
    path, seed_file = folder / "m.safetensors", os.open(folder / "seed", os.O_CREAT | os.O_WRONLY)
    cases = []
    for state, how in states():
        sc.save(state, path, **how)
        cases.append((path.read_bytes(), sc.load(path)))
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, resource.RLIM_INFINITY))
    before, told, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter(), []
    for seed in range(first, first + count):
        os.pwrite(seed_file, f"{seed:12}".encode(), 0)
        rng = random.Random(seed)
        pristine, saved = rng.choice(cases)
        path.write_bytes(pristine)
        how = mutant(rng, path, pristine)
        outcome, fault = broken(path, rng, saved, how)
        told[f"{how.__name__} {outcome}"] += 1
        if fault:
            wrong.append(f"seed {seed}: {how.__name__}, {fault}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"told": told, "wrong": wrong[:20], "grown": grown * 1024}))


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
