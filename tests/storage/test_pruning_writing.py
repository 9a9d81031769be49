"""secateur.storage.pruning: where it writes, killed at any moment, by several processes, in bounded memory."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX, bytes_of, names_in, shards, state_of
from safetensors import safe_open
from safetensors.torch import save_file

import secateur as sc
from processes import Command, as_torchrun, free_port, secateur
from secateur.errors import (
    InputError,
    WriteError,
)
from secateur.storage import Recipe, prune_checkpoint
from secateur.storage.pruning import work

# ---- where it is written ----------------------------------------------------------------------------------------


def test_the_source_is_never_the_target(file, folder):
    before = state_of(file.parent)
    inside = folder / "tokenizer" / "out"
    link = file.parent / "link.safetensors"
    link.symlink_to(file)
    for src, dst in [(file, file), (file, link), (folder, folder), (folder, inside), (folder / INDEX, folder / "x")]:
        with pytest.raises(InputError, match=r"is the source, or lies in it, .*: give another place"):
            prune_checkpoint(src, dst, Recipe(0.5))
    link.unlink()
    assert state_of(file.parent) == before


@pytest.mark.parametrize("packed", [False, True])
def test_an_earlier_run_gives_way(folder, tmp_path, packed):
    level = "lossless" if packed else None
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5), level=level)
    prune_checkpoint(folder, tmp_path / "want", Recipe(0.9), level=level)
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.9), level=level)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "want")
    assert names_in(tmp_path / "out") == names_in(tmp_path / "want")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "want"]


def test_a_folder_with_anything_else_in_it_stays(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    (tmp_path / "out" / "notes.md").write_text("mine")
    before = state_of(tmp_path)
    with pytest.raises(
        WriteError, match=r"out holds notes.md, which would be lost: give a new folder, or move it away"
    ):
        prune_checkpoint(folder, tmp_path / "out", Recipe(0.9))
    assert state_of(tmp_path) == before


def test_a_file_where_a_folder_is_due_and_the_other_way_round(file, folder, tmp_path):
    before = state_of(tmp_path)
    with pytest.raises(WriteError, match=r"m\.safetensors is a file: give the name of a folder"):
        prune_checkpoint(folder, file, Recipe(0.5))
    with pytest.raises(InputError, match="so give a name that ends in it"):
        prune_checkpoint(file, folder, Recipe(0.5))
    with pytest.raises(WriteError, match=r"was not written .*make its folder first"):
        prune_checkpoint(file, tmp_path / "none" / "out.safetensors", Recipe(0.5))
    with pytest.raises(WriteError, match=r"was not written .*make its folder first"):
        prune_checkpoint(folder, tmp_path / "none" / "out", Recipe(0.5))
    assert state_of(tmp_path) == before


def test_nothing_is_written_without_a_target(folder, tmp_path):
    before = state_of(tmp_path)
    said = prune_checkpoint(folder, None, Recipe(0.5))
    assert state_of(tmp_path) == before
    done = prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    assert said.notes == done.notes
    assert [(t.name, t.zeros) for t in said.tensors] == [(t.name, t.zeros) for t in done.tensors]


@pytest.mark.parametrize("level", [None, "lossless"])
def test_the_files_of_a_folder(folder, tmp_path, level):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    before = state_of(folder)
    found = prune_checkpoint(folder, tmp_path / "out", Recipe(0.5), level=level)
    assert state_of(folder) == before
    names = [name for name in names_in(folder) if name != "pytorch_model.bin"]
    if level:
        names = sorted(name.replace(".safetensors", ".packed.safetensors") for name in names)
    assert names_in(tmp_path / "out") == names
    assert found.notes[-1] == "left out: pytorch_model.bin (other weights)"
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    index = tmp_path / "out" / (INDEX.replace("model.", "model.packed.") if level else INDEX)
    before, after = json.loads((folder / INDEX).read_text()), json.loads(index.read_text())
    assert after["metadata"] == before["metadata"]
    want = before["weight_map"]
    if level:
        want = {name: shard.replace(".safetensors", ".packed.safetensors") for name, shard in want.items()}
    assert list(after["weight_map"].items()) == list(want.items())
    assert found.file_bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


def test_each_shard_keeps_its_metadata(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.5))
    for i, shard in enumerate(sorted((tmp_path / "out").glob("*.safetensors")), 1):
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"shard": str(i)}


@pytest.mark.parametrize("level", [None, "lossless"])
def test_any_number_of_threads_writes_the_same_bytes(tmp_path, level):
    tensors = {"a": torch.randn(700, 900), "b": (torch.randn(1200, 1000) * 4).round().bfloat16()}
    save_file(tensors, tmp_path / "m.safetensors")
    threads, found = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            prune_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", Recipe(0.7, "erk"), level=level)
            found.add((tmp_path / "out.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_write_the_same_bytes(tmp_path, packed):
    metadata = {f"key{i}": "ü" * i for i in range(20)}
    shards(tmp_path / "model", {"a": torch.randn(20, 30)}, {"b": torch.randn(20, 30)}, metadata=metadata)
    for name in ("one", "two"):
        prune_checkpoint(tmp_path / "model", tmp_path / name, Recipe(0.5), level="lossless" if packed else None)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_with_nothing_pruned_the_file_is_that_of_safetensors(folder, file, tmp_path):
    prune_checkpoint(folder, tmp_path / "out", Recipe(0.0))
    assert bytes_of(tmp_path / "out") == bytes_of(folder)
    prune_checkpoint(file, tmp_path / "out.safetensors", Recipe(0.0))
    assert (tmp_path / "out.safetensors").read_bytes() == file.read_bytes()


def test_a_folder_of_links(folder, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"  # as in the cache of Hugging Face
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (blobs / path.name).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(blobs / path.name)
    before = state_of(folder)
    prune_checkpoint(snapshot, tmp_path / "out", Recipe(0.5))
    prune_checkpoint(folder, tmp_path / "want", Recipe(0.5))
    assert state_of(folder) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    want = bytes_of(tmp_path / "want")
    assert bytes_of(tmp_path / "out") == {name: want[name] for name in want if "tokenizer" not in name}


def test_a_folder_that_holds_one_file(file, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.safetensors").write_bytes(file.read_bytes())
    (alone / "config.json").write_text("{}")
    prune_checkpoint(file, tmp_path / "want.safetensors", Recipe(0.5))
    prune_checkpoint(alone, tmp_path / "out", Recipe(0.5))
    assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "want.safetensors").read_bytes()
    prune_checkpoint(alone, tmp_path / "one.safetensors", Recipe(0.5))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "want.safetensors").read_bytes()


def test_progress_adds_up_to_the_work(folder, tmp_path):
    for recipe in (Recipe(0.5), Recipe(0.25, "uniform"), Recipe(0.5, only=("a",), allocation="erk")):
        done = []
        prune_checkpoint(folder, tmp_path / "out", recipe, progress=done.append)
        assert all(n > 0 for n in done)
        assert sum(done) >= work(folder, recipe)
    pattern = Recipe(0.5, only=("c",), pattern=sc.n_m(2, 4))
    save_file({"c": torch.randn(4, 8)}, tmp_path / "c.safetensors")
    done = []
    prune_checkpoint(tmp_path / "c.safetensors", tmp_path / "o.safetensors", pattern, progress=done.append)
    assert sum(done) == work(tmp_path / "c.safetensors", pattern) == 3 * 4 * 32


def test_an_error_on_the_way_leaves_no_trace(file, folder, tmp_path):
    before = state_of(tmp_path)
    for src, dst in [(file, tmp_path / "out.safetensors"), (folder, tmp_path / "out")]:
        for moment in range(work(src, Recipe(0.5)) // 100):
            seen = iter(range(moment))

            def stop(_, seen=seen):
                if next(seen, None) is None:
                    raise KeyboardInterrupt

            try:
                prune_checkpoint(src, dst, Recipe(0.5), level="lossless", progress=stop)
            except KeyboardInterrupt:
                assert state_of(tmp_path) == before
            else:
                break
        shutil.rmtree(dst) if dst.is_dir() else dst.unlink()
        assert moment > 3


# ---- killed at any moment ---------------------------------------------------------------------------------------


TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile", "shutil.rmtree"}


def killed_at_each(folder, level, old):
    """Prune in forks, each killed one step later than the one before; returns the number of steps."""
    src, out, want = folder / "model", folder / "out", folder / "want"

    def prune(sparsity=0.5):
        prune_checkpoint(src, out, Recipe(sparsity), level=level)

    def killed_at(moment):
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in TOUCHES:
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        prune()

    def ended(moment):
        pid = os.fork()
        if not pid:
            try:
                killed_at(moment)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(pid, 0)[1]

    source = bytes_of(src)
    prune()
    out.rename(want)
    wanted, earlier = bytes_of(want), None
    for moment in itertools.count(1):
        if old:
            prune(0.25)
            earlier = bytes_of(out)
        status = ended(moment)
        assert bytes_of(src) == source, moment
        if status == 0:
            print(moment)
            return
        assert status == signal.SIGKILL, (moment, status)
        assert not out.exists() or bytes_of(out) in (wanted, earlier), moment
        prune()
        assert bytes_of(out) == wanted, moment
        left = sorted(p.name for p in folder.iterdir())
        assert left == ["model", "out", "want"], (moment, left)
        shutil.rmtree(out)


def told(work, *arguments):
    done = Command(work, *arguments).done()
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("old", ["", "old"])
@pytest.mark.parametrize("level", [None, "lossless"])
def test_killed_at_each_step_it_takes_on_files(folder, tmp_path, level, old):
    """Before each opening, renaming or removing of a file: then, as ever, what is there is whole, and is made again."""
    steps = int(told(killed_at_each, tmp_path, level, old))
    assert steps > 20


def test_killed_at_any_moment(tmp_path):
    torch.manual_seed(0)
    parts = [{f"{i}.{j}": torch.randn(1024, 2048) for j in range(2)} for i in range(4)]  # 67 MB
    src, want, out = shards(tmp_path / "model", *parts), tmp_path / "want", tmp_path / "out"
    (src / "config.json").write_text("{}")

    def pruning(out):
        return Command(secateur, "prune", src, "--sparsity", 0.9, "-o", out)

    start = time.monotonic()
    assert pruning(want).done().returncode == 0
    whole = time.monotonic() - start
    source, wanted = state_of(src), bytes_of(want)
    seen = set()
    for i in range(12):
        command = pruning(out)
        if i % 2:  # while it writes
            while command.process.is_alive() and not list(tmp_path.glob(".out.*")):
                time.sleep(0.001)
            time.sleep(0.004 * i)
        else:
            time.sleep(whole * (0.4 + 0.055 * i))
        command.process.kill()
        command.done()
        assert state_of(src) == source
        assert not out.exists() or bytes_of(out) == wanted
        seen.add((bool(list(tmp_path.glob(".out.*"))), out.exists()))
    assert (True, False) in seen  # some were killed as they wrote
    assert pruning(out).done().returncode == 0
    assert bytes_of(out) == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "want"]


# ---- several processes ------------------------------------------------------------------------------------------


def torchrun(processes, *arguments):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
    command = [sys.executable, *map(str, (*command, "-m", "secateur", "prune", *arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def together(processes, *arguments):
    """What torchrun does, by forks; returns what the first process printed."""
    done = as_torchrun(processes, secateur, "prune", *arguments)
    assert [rank.returncode for rank in done] == [0] * processes, done
    assert not any(rank.stdout for rank in done[1:])  # one says it, for all
    return done[0].stdout


def many_ties(folder, bad=None):
    """Four shards of several sizes, of bf16 and fp32; the ties of the threshold are in all of them."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i, rows in enumerate((300, 3, 120, 40)):
        coarse = (torch.randn(rows, 400, generator=generator) * 4).round()
        parts.append({f"{9 - i}.w": coarse.bfloat16(), f"{i}.v": coarse.t().contiguous(), f"{i}.b": torch.randn(7)})
    if bad is not None:
        parts[2]["2.v"][5, 5] = bad
    return shards(folder, *parts)


@pytest.mark.parametrize("way", ["plain", "packed", "rows"])
def test_of_several_processes_each_writes_its_own_shards(tmp_path, way):
    src = many_ties(tmp_path / "model")
    (src / "config.json").write_text("{}")
    level, allocation = ("lossless", "erk") if way == "packed" else (None, "global")
    alone = prune_checkpoint(
        src, tmp_path / "alone", Recipe(0.61, allocation, "rows" if way == "rows" else None), level=level
    )
    options = {"plain": [], "packed": ["--pack", "lossless", "--allocation", "erk"], "rows": ["--pattern", "rows"]}[way]
    arguments = [src, "--sparsity", "0.61", "-o", tmp_path / "out", "--json", *options]
    if way == "packed":
        done = torchrun(2, *arguments)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        said = together(2, *arguments)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert json.loads(said) == {**alone.to_dict(), "path": str(tmp_path / "out")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "model", "out"]


def test_a_process_may_have_nothing_to_do(folder, tmp_path):
    prune_checkpoint(folder, tmp_path / "alone", Recipe(0.5))
    together(3, folder, "--sparsity", "0.5", "-o", tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


def test_of_one_file_the_first_process_does_all(file, tmp_path):
    prune_checkpoint(file, tmp_path / "alone.safetensors", Recipe(0.5, pattern=sc.n_m(2, 4)))
    together(2, file, "--sparsity", "0.5", "--pattern", "2:4", "-o", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_what_one_process_finds_ends_all(tmp_path):
    src = many_ties(tmp_path / "model", bad=math.nan)
    before = state_of(src)
    done = as_torchrun(2, secateur, "prune", src, "--sparsity", "0.5", "-o", tmp_path / "out")
    assert all(rank.returncode != 0 for rank in done)
    assert any("2.v holds 1 NaN and 0 inf among 48,000 weights" in rank.stderr for rank in done)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert state_of(src) == before


# ---- memory -----------------------------------------------------------------------------------------------------


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory_of_pruning(src, out, level):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prune_checkpoint(src, out, Recipe(0.8), level=level)
    print(resident("VmHWM") - before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("level", [None, pytest.param("lossless", marks=pytest.mark.slow)])
def test_memory_holds_a_few_pieces_only(tmp_path, level):
    wide = torch.randn(20_000_000).view(5000, 4000)
    parts = [{f"{i}.w": wide * (i + 1), f"{i}.v": torch.cat([wide, wide], 1).bfloat16()} for i in range(4)]  # 640 MB
    shards(tmp_path / "model", *parts)
    del wide, parts
    peak = float(told(memory_of_pruning, tmp_path / "model", tmp_path / "out", level))
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "out")
    assert peak < 300  # MB
