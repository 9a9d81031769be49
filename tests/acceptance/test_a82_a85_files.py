"""Files that are hostile or odd, writers that are killed, power that fails, checkpoints with several states."""

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from processes import Command, in_bounded_memory, secateur

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded as Linux does")
MEMORY = 8 << 30


def cli(*arguments):
    """Run a command with bounded memory; returns its exit status, and what it said on stdout and stderr."""
    done = Command(in_bounded_memory, MEMORY, secateur, *arguments).done()
    return done.returncode, done.stdout, done.stderr


def spread(folder):
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, folder / "m.pt")
    return folder / "m.pt"


def surrogate(folder):
    torch.save({"\ud800w": torch.ones(40, 40)}, folder / "m.pt")
    return folder / "m.pt"


def deep(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 200_000 + "]" * 200_000 + "}")
    return folder


def pipe(folder):
    os.mkfifo(folder / "m.safetensors")
    return folder / "m.safetensors"


def cut(folder):
    torch.save({"w": torch.randn(40, 40)}, folder / "m.pt")
    (folder / "m.pt").write_bytes((folder / "m.pt").read_bytes()[:-300])
    return folder / "m.pt"


@LINUX
@pytest.mark.parametrize("make", [spread, surrogate, deep, pipe, cut], ids=lambda make: make.__name__)
def test_a82_hostile_small_files_are_one_sentence(tmp_path, make):
    status, out, error = cli("pack", make(tmp_path), tmp_path / "out.safetensors")
    assert (status, out) == (2, "")
    assert error.startswith(f"secateur: {tmp_path}") or make is surrogate
    assert error.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("command", ["inspect", "prune", "pack", "json", "error"])
def test_a82_no_name_acts_on_a_terminal(tmp_path, command):
    names = ["\x1b]0;title\x07\x1b[31mred", "real\nfake.weight  float32", "a\u202eb", "c\x7fd"]
    file = tmp_path / "m.safetensors"
    save_file({name: torch.ones(4, 4) for name in names}, file)
    arguments = {
        "inspect": ["inspect", file],
        "json": ["inspect", file, "--json"],
        "prune": ["prune", file, "--sparsity", "0.5", "-o", tmp_path / "out.safetensors"],
        "pack": ["pack", file, tmp_path / "out.safetensors"],
        "error": ["prune", file, "--sparsity", "0.5", "--only", "nothing*", "--dry-run"],
    }[command]
    _, out, error = cli(*arguments)
    assert not [letter for letter in out + error if not letter.isprintable() and letter != "\n"]
    assert "\nfake" not in out + error
    assert "\\u202e" in out + error
    if command == "json":
        assert {t["name"] for t in json.loads(out)["tensors"]} == set(names)


def prune_and_die(dies, sparsity):
    from secateur.storage.pruning import Recipe, prune_checkpoint
    from secateur.support import files

    def then_die(function):
        def die(*arguments):
            function(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return die

    if dies == "exchange":
        files.exchange = then_die(files.exchange)
    elif dies == "flush":
        files._flush = then_die(files._flush)
    prune_checkpoint("src", "out", Recipe(sparsity))


@LINUX
def test_a83_a_killed_writer_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    save_file({"w": torch.arange(1.0, 65).view(8, 8)}, tmp_path / "src" / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors"}}
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps(index))

    def prune(dies, sparsity):
        done = Command(prune_and_die, dies, sparsity).done()
        assert done.returncode == (0 if dies == "never" else -signal.SIGKILL), done.stderr
        return int((load_file(tmp_path / "out" / "a.safetensors")["w"] == 0).sum())

    assert prune("never", 0.25) == 16
    assert prune("flush", 0.5) == 16
    assert prune("exchange", 0.5) == 32
    assert len(list(tmp_path.iterdir())) == 3  # of the first that was killed nothing is left, of the second something
    assert prune("never", 0.75) == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


@LINUX
@pytest.mark.parametrize("verb", ["save", "pack", "masks"])
def test_a84_data_is_on_the_disk_before_the_rename_and_the_name_after(tmp_path, monkeypatch, verb):
    save_file({"w": torch.ones(30, 30)}, tmp_path / "m.safetensors")
    target, done, fsync, rename = tmp_path / "out.safetensors", [], os.fsync, os.replace

    def flushed(descriptor):
        done.append(os.path.isdir(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))
    if verb == "save":
        sc.save({"w": torch.ones(30, 30)}, target)
    elif verb == "pack":
        sc.pack(tmp_path / "m.safetensors", target)
    else:
        sc.Masks({"w": torch.ones(3, dtype=torch.bool)}).save(target)
    assert done == [False, "rename", True]


def test_a85_of_several_states_one_is_taken_and_the_others_are_named(tmp_path):
    model = torch.nn.Linear(64, 64)
    ema = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    adam = torch.optim.Adam(model.parameters()).state_dict()
    for name, state in {
        "m.pt": {"model": model.state_dict(), "ema": ema, "optimizer": adam, "epoch": 3},
        "m.ckpt": {"state_dict": model.state_dict(), "ema": ema, "optimizer_states": [adam], "loops": {}},
    }.items():
        torch.save(state, tmp_path / name)
        prune = ["prune", tmp_path / name, "--sparsity", "0.5", "-o", tmp_path / "out.safetensors"]
        status, out, _ = cli(*prune)
        assert status == 0
        assert f"took {next(iter(state))} (2 tensors); left ema (2 tensors), " in out
        assert all(key in out for key in state)
        assert cli(*prune, "--key", "ema")[0] == 0
        kept = load_file(tmp_path / "out.safetensors")["weight"]
        assert int((kept == 0).sum()) == 2048
        assert torch.equal(kept[kept != 0], ema["weight"][kept != 0])
