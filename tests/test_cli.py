"""secateur.cli: commands, JSON, errors and exit statuses."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.errors import InputError

SOURCE = Path(secateur.__file__).parent


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # either would make rich take a pipe for a terminal
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path):
    save_file({"[bold]w": torch.eye(2)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def demo(monkeypatch):
    """A stand-in for secateur.demo; returns the list of calls."""
    calls = []

    def run(*, epochs=20, sparsity=0.9, seed=0, out=Path("secateur-demo"), console):
        calls.append({"epochs": epochs, "sparsity": sparsity, "seed": seed, "out": out})
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity is {sparsity}: give 0 <= s < 1")
        if console is not None:
            console.print("drawn by the demo")
        return {"sparsity": sparsity, "out": out}

    module = types.ModuleType("secateur.demo")
    module.run = run
    monkeypatch.setitem(sys.modules, "secateur.demo", module)
    return calls


def test_inspect_prints_plain_text_into_a_pipe(file):
    result = call("inspect", file)
    assert result.exit_code == 0
    assert str(file) in result.stdout
    assert "[bold]w" in result.stdout
    assert "50.00 %" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_table_fits_its_terminal_and_is_whole(tmp_path, monkeypatch, columns):
    name = "encoder.layers.11.attention.self.query_key_value.projection.weight"
    save_file({name: torch.ones(64, 32), "[bold]w": torch.eye(2)}, tmp_path / "m.safetensors")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    result = call("inspect", tmp_path / "m.safetensors")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "[bold]w" in result.stdout
    assert name in result.stdout.replace("\n", "")
    assert all(number in result.stdout.split() for number in ("float32", "2,048", "50.00"))


def test_a_pipe_gets_one_line_a_row(tmp_path):
    name = "encoder.layers.11.attention.self.query_key_value.projection.weight"
    save_file({name: torch.ones(64, 32)}, tmp_path / "m.safetensors")
    (row,) = [line for line in call("inspect", tmp_path / "m.safetensors").stdout.splitlines() if name in line]
    assert "2,048" in row


def test_names_act_on_no_terminal(tmp_path):
    save_file({"\x1b[31mred\n\u202ew": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    shown = call("inspect", tmp_path / "m.safetensors").stdout
    assert r"\x1b[31mred\n\u202ew" in shown
    assert not set("\x1b\u202e") & set(shown)


def test_doctor():
    result = call("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout
    assert "dense kernels do not skip zeros" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "doctor", "demo"])
def test_every_command_prints_json_and_nothing_else(command, file, demo):
    result = call(command, *([file] if command == "inspect" else []), "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (
        found.keys()
        == {
            "inspect": {"path", "tensors", "total", "file", "notes"},
            "doctor": {"facts", "findings"},
            "demo": {"sparsity", "out"},
        }[command]
    )


def test_demo_passes_its_options_on_and_lets_the_demo_draw(demo):
    result = call("demo", "--epochs", 3, "--sparsity", 0.5, "--seed", 7, "--out", "there")
    assert (result.exit_code, result.stdout) == (0, "drawn by the demo\n")
    assert call("demo").exit_code == 0
    assert demo == [
        {"epochs": 3, "sparsity": 0.5, "seed": 7, "out": Path("there")},
        {"epochs": 20, "sparsity": 0.9, "seed": 0, "out": Path("secateur-demo")},
    ]


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_an_error_is_one_sentence_on_stderr(flag, demo, tmp_path):
    result = call("demo", "--sparsity", 1.5, *flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "secateur: sparsity is 1.5: give 0 <= s < 1\n"
    result = call("inspect", tmp_path / "none.pt", *flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"secateur: {tmp_path}/none.pt: no such file")
    assert result.stderr.count("\n") == 1


def test_a_name_of_a_million_characters_makes_no_page_of_an_error(tmp_path):
    torch.save({"w" * 1_000_000: torch.full((2, 2), math.nan)}, tmp_path / "m.pt")
    result = call("prune", tmp_path / "m.pt", "--sparsity", 0.5, "--dry-run")
    assert (result.exit_code, len(result.stderr) < 1300) == (2, True)
    assert result.stderr.endswith("go back to a sound checkpoint, or repair it with torch.nan_to_num_\n")


def test_an_error_of_the_system_too(demo, monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device", "out.png")

    monkeypatch.setattr(sys.modules["secateur.demo"], "run", full)
    result = call("demo")
    assert result.exit_code == 2
    assert result.stderr == "secateur: [Errno 28] No space left on device: 'out.png'\n"


def test_a_bug_is_not_hidden(demo, monkeypatch):
    monkeypatch.setattr(sys.modules["secateur.demo"], "run", lambda **options: 1 / 0)
    assert isinstance(call("demo").exception, ZeroDivisionError)


def test_control_c(demo, monkeypatch):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["secateur.demo"], "run", interrupted)
    assert call("demo").exit_code == 130


@pytest.mark.parametrize("arguments", [["inspect"], ["prone"], ["demo", "--epochs", "x"], ["demo", "--epochs", "0"]])
def test_usage_errors(arguments, demo):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage" in result.stderr
    assert demo == []


def test_help_and_version():
    result = call("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("inspect", "doctor", "demo"))
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("secateur ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell):
    typed = {"COMP_WORDS": "secateur ins", "COMP_CWORD": "1"}  # bash
    typed |= {"_TYPER_COMPLETE_ARGS": "secateur ins", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # the others
    asked = ({"_SECATEUR_COMPLETE": f"{what}_{shell}", **typed} for what in ("source", "complete"))
    script, completed = (CliRunner().invoke(app, [], env=one, prog_name="secateur").stdout for one in asked)
    assert f"_SECATEUR_COMPLETE=complete_{shell}" in script
    assert "inspect" in completed
    assert "prune" not in completed


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_as_a_process(file, tmp_path):
    good = python("-m", "secateur.cli", "inspect", file, "--json")
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["total"]["zeros"] == 2
    bad = python("-m", "secateur.cli", "inspect", tmp_path / "none.pt")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr


def test_the_command_line_itself_does_not_import_torch():
    code = (
        "import sys, types; package = types.ModuleType('secateur'); "
        f"package.__path__ = [{str(SOURCE)!r}]; sys.modules['secateur'] = package; "
        "import secateur.cli, secateur.doctor; assert 'torch' not in sys.modules"
    )
    assert python("-c", code).stderr == ""


# ---- prune, pack, unpack ----------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(20, 40, generator=generator) for name in ("enc.a", "enc.b", "head")}
    save_file({**tensors, "enc.bias": torch.ones(5)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_prune_prints_a_table(weights, tmp_path):
    result = call("prune", weights, "--sparsity", 0.9, "-o", tmp_path / "out.safetensors")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == str(tmp_path / "out.safetensors")
    assert lines[1].split() == ["tensor", "dtype", "shape", "weights", "zeros", "sparsity", "size"]
    assert [line.split()[0] for line in lines[3:6]] == ["enc.a", "enc.b", "head"]
    assert lines[6].split()[3:7] == ["2,400", "2,160", "90.00", "%"]
    assert lines[7] == "2,160 of 2,400 weights in scope pruned (90.00 %)"
    assert lines[8] == "1 as they are, fewer than two dimensions: enc.bias"
    there = load_file(tmp_path / "out.safetensors")
    assert sum(int((there[name] == 0).sum()) for name in ("enc.a", "enc.b", "head")) == 2160
    assert torch.equal(there["enc.bias"], torch.ones(5))


def test_prune_prints_json_and_nothing_else(weights, tmp_path):
    result = call("prune", weights, "--sparsity", 0.5, "--out", tmp_path / "out.safetensors", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found.keys() == {"path", "tensors", "total", "file", "notes"}
    assert found["total"]["zeros"] == 1200
    assert [t["name"] for t in found["tensors"]] == ["enc.a", "enc.b", "head"]


def test_a_dry_run_writes_nothing(weights, tmp_path):
    result = call("prune", weights, "--sparsity", 0.5, "--dry-run", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["total"]["zeros"] == 1200
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("options", "zeros"),
    [
        (["--sparsity", 0.5, "--pattern", "2:4"], {"enc.a": 400, "enc.b": 400, "head": 400}),
        (["--sparsity", 0.5, "--allocation", "uniform"], {"enc.a": 400, "enc.b": 400, "head": 400}),
        (["--sparsity", 0.25, "--only", "head"], {"head": 200}),
        (["--sparsity", 0.25, "--only", "head", "--only", "enc.b"], {"enc.b": None, "head": None}),
        (["--sparsity", 0.25, "--only", "enc.bias", "--only", "head"], {"enc.bias": None, "head": None}),
        (["--sparsity", 0.25, "--skip", "enc"], {"head": 200}),
        (["--sparsity", 0.25, "--skip", "enc.a", "--skip", "hea?"], {"enc.b": 200}),
    ],
)
def test_prune_passes_its_options_on(weights, options, zeros):
    result = call("prune", weights, "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    counts = {t["name"]: t["zeros"] for t in found["tensors"]}
    assert counts == {name: counts[name] if zeros[name] is None else zeros[name] for name in zeros}
    assert found["total"]["sparsity"] == pytest.approx(options[1], abs=1e-3)


def test_prune_and_pack_at_once(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    result = call("prune", weights, "--sparsity", 0.9, "--pack", "lossless", "-o", out)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].split()[-3:] == ["coding", "stored", "ratio"]
    shown = call("inspect", out)
    assert shown.stdout.splitlines()[1].split()[-3:] == ["coding", "stored", "ratio"]
    (row,) = [line.split() for line in shown.stdout.splitlines() if line.startswith("head ")]
    assert "lossless" in row
    assert 0 < float(row[-1]) < 0.3
    found = {t["name"]: t for t in json.loads(call("inspect", out, "--json").stdout)["tensors"]}
    head = found["head"]
    assert (head["coding"], head["error"], head["bytes"]) == ("lossless", None, 3200)
    assert head["ratio"] == head["stored_bytes"] / 3200 < 0.3
    assert found["enc.bias"]["coding"] == "plain"
    lossy = call("prune", weights, "--sparsity", 0.9, "--pack", "tiny", "-o", out)
    assert lossy.stdout.splitlines()[1].split()[-2:] == ["ratio", "error"]


def test_pack_and_unpack(weights, tmp_path):
    packed, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    result = call("pack", weights, packed)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].split()[-3:] == ["coding", "stored", "ratio"]
    found = json.loads(call("pack", weights, packed, "--json", "--level", "near", "--effort", "fast").stdout)
    assert {t["coding"] for t in found["tensors"]} == {"plain", "step 0.015625"}
    assert found["total"]["stored_bytes"] == packed.stat().st_size
    found = json.loads(call("pack", weights, packed, "--json", "--step", 0.5).stdout)
    assert {t["coding"] for t in found["tensors"]} == {"plain", "step 0.5"}
    assert call("pack", weights, packed).exit_code == 0
    result = call("unpack", packed, plain)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].split()[-1] == "size"
    assert plain.read_bytes() == weights.read_bytes()
    assert json.loads(call("unpack", packed, plain, "--json").stdout)["total"]["ratio"] > 1  # its header


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "FILE"],
        ["prune", "FILE", "--sparsity", "0.5"],
        ["prune", "FILE", "--sparsity", "0.5", "--dry-run", "-o", "OUT"],
        ["prune", "FILE", "--sparsity", "half", "-o", "OUT"],
        ["prune", "--sparsity", "0.5", "-o", "OUT"],
        ["pack", "FILE"],
        ["pack", "FILE", "OUT", "--step", "x"],
        ["unpack", "FILE"],
        ["unpack", "FILE", "OUT", "--level", "near"],
    ],
)
def test_usage_errors_of_the_verbs_on_files(weights, tmp_path, arguments):
    places = {"FILE": weights, "OUT": tmp_path / "out.safetensors"}
    result = call(*(places.get(argument, argument) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("flag", [[], ["--json"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "FILE", "--sparsity", "1.5", "-o", "OUT"], "sparsity is 1.5, outside 0 to 1: give the fraction"),
        (["prune", "FILE", "--sparsity", "nan", "-o", "OUT"], "sparsity is nan: give the fraction"),
        (["prune", "FILE", "--sparsity", "0.5", "-o", "FILE"], "is the source, or lies in it"),
        (["prune", "FILE", "--sparsity", "0.5", "-o", "OUT", "--only", "x.*"], "'x.*' matches no tensor; "),
        (
            ["prune", "FILE", "--sparsity", "0.5", "-o", "OUT", "--pattern", "2"],
            "no pattern named '2' for files: choose free, 2:4, rows",
        ),
        (["prune", "FILE", "--sparsity", "0.9", "-o", "OUT", "--pattern", "2:4"], "gives a sparsity of 0.5"),
        (["prune", "FILE", "--sparsity", "0.5", "-o", "OUT", "--allocation", "lamp"], "choose global, uniform, erk"),
        (["prune", "FILE", "--sparsity", "0.5", "-o", "OUT", "--pack", "zip"], "no level named 'zip'"),
        (["prune", "NONE", "--sparsity", "0.5", "-o", "OUT"], "no such file"),
        (["prune", "FILE", "--sparsity", "0.5", "-o", "none/out.safetensors"], "make its folder first"),
        (["pack", "FILE", "OUT", "--level", "zip"], "no level named 'zip'"),
        (["pack", "NONE", "OUT"], "no such file"),
        (["unpack", "FILE", "out.pt"], "give a name that ends in it"),
    ],
)
def test_their_errors_are_one_sentence(weights, tmp_path, monkeypatch, arguments, message, flag):
    monkeypatch.chdir(tmp_path)
    places = {"FILE": weights, "OUT": "out.safetensors", "NONE": "none.safetensors"}
    result = call(*(places.get(argument, argument) for argument in arguments), *flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("secateur: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_on_stderr(tmp_path):
    save_file({"big": torch.rand(40, 40) + 9, "small": torch.rand(20, 20)}, tmp_path / "w.safetensors")
    result = call("prune", tmp_path / "w.safetensors", "--sparsity", 0.5, "--dry-run", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["total"]["zeros"] == 1000
    assert result.stderr.startswith("secateur: warning: small keeps under 1 % of its weights")
    assert result.stderr.endswith("try the allocation erk or uniform\n")  # min_keep= is for Python
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_a_bar_on_a_terminal_only(weights, tmp_path, monkeypatch, command):
    out = tmp_path / "out.safetensors"
    arguments = ["prune", weights, "--sparsity", 0.5, "-o", out] if command == "prune" else [command, weights, out]
    quiet = call(*arguments)
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    shown = call(*arguments, "--json")
    assert shown.exit_code == 0
    assert {"prune": "pruning", "pack": "packing", "unpack": "unpacking"}[command] in shown.stderr
    assert "kB" in shown.stderr
    assert json.loads(shown.stdout)["path"] == str(out)


def test_a_bar_leaves_nothing_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = call("pack", tmp_path / "none.safetensors", tmp_path / "out.safetensors")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("secateur: ")


def test_folders_from_the_command_line(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.randn(30, 40)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    assert call("prune", folder, "--sparsity", 0.9, "-o", tmp_path / "pruned").exit_code == 0
    assert call("pack", tmp_path / "pruned", tmp_path / "packed").exit_code == 0
    assert call("unpack", tmp_path / "packed", tmp_path / "plain").exit_code == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    packed = call("inspect", tmp_path / "packed", "--json")
    assert json.loads(packed.stdout)["total"]["zeros"] == 1080
    result = call("pack", tmp_path / "pruned", tmp_path / "plain")
    assert result.exit_code == 2
    assert "which would be lost: give a new folder, or move it away" in result.stderr


# ---- bench --------------------------------------------------------------------------------------------------------

OF_THE_USER = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(100, 8), nn.Embedding(2, 8), nn.Linear(8, 3)

    def forward(self, words, kinds):
        return self.head(self.words(words) + self.kinds(kinds))

class Family:
    small = staticmethod(mlp)

def sized(width):
    return nn.Linear(width, width)

def words():
    return {"a": 1}

ready, number = nn.Linear(8, 8), 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with models.py, in which the commands run; returns the name of the module."""
    name = f"models_{tmp_path.name}"  # imported once a process
    (tmp_path / f"{name}.py").write_text(OF_THE_USER)
    (tmp_path / "broken_models.py").write_text("import a_module_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def bench(*arguments):
    return call("bench", *arguments, "--seconds", 0.01, "--threads", 1)


def test_bench_explains_and_compares(models):
    result = bench(f"{models}:mlp", "--input", "4x8")
    assert (result.exit_code, result.stderr) == (0, "")
    explained, _, compared = result.stdout.partition("\n\n")
    assert explained.strip()
    assert "time of a call" in compared
    assert "dense" in compared
    assert "fast: " in compared


def test_bench_prints_json_and_nothing_else(models):
    result = bench(f"{models}:mlp", "--input", "4x8", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found.keys() == {"explanation", "comparison"}
    assert found["comparison"]["baseline"] == "dense"
    assert found["comparison"]["measurements"]["fast"]["threads"] == 1


def test_bench_draws_tables_on_a_terminal(models, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    result = bench(f"{models}:mlp", "--input", "4x8")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "time of a call" in result.stdout


@pytest.mark.parametrize(
    ("factory", "inputs"),
    [
        ("Family.small", ["2x8"]),
        ("ready", ["3x2x8"]),
        ("Tagger", ["1x6:int64", "1x6:int64:2"]),
        ("Tagger", ["4x1:int32", "4x1:int32:1"]),
    ],
)
def test_bench_builds_what_it_is_told(models, factory, inputs):
    result = bench(f"{models}:{factory}", *(argument for one in inputs for argument in ("--input", one)))
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("form", ["plain.safetensors", "packed.safetensors", "plain.pt"])
def test_bench_fills_the_model(models, tmp_path, monkeypatch, form):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    secateur.prune(model, 0.5)
    file = tmp_path / form
    if form == "plain.pt":
        torch.save(model.state_dict(), file)
    else:
        (secateur.save if form.startswith("packed") else lambda m, f: save_file(m.state_dict(), f))(model, file)
    found = json.loads(bench(f"{models}:mlp", "--input", "4x8", "--weights", file, "--json").stdout)
    assert found["comparison"]["measurements"]["dense"]["nonzeros"] == 80 + 18


@pytest.mark.parametrize("flag", [[], ["--json"]])
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("MODELS", ["--input", "1x8"], "is not MODULE:FACTORY: give for example models:build"),
        ("MODELS:", ["--input", "1x8"], "is not MODULE:FACTORY"),
        (":mlp", ["--input", "1x8"], "is not MODULE:FACTORY"),
        ("none:mlp", ["--input", "1x8"], "no module named 'none' here or installed: give MODULE as in `import MODULE`"),
        ("MODELS.py:mlp", ["--input", "1x8"], "without .py"),
        (".models:mlp", ["--input", "1x8"], "'.models' is not the name of a module"),
        ("MODELS:mpl", ["--input", "1x8"], "that module has no mpl; the nearest names are: mlp"),
        ("MODELS:Family.large", ["--input", "1x8"], "that module has no Family.large; "),
        ("MODELS:number", ["--input", "1x8"], "is an int, not callable: give a function that makes a model"),
        ("MODELS:sized", ["--input", "1x8"], "without arguments (missing a required argument: 'width')"),
        ("MODELS:words", ["--input", "1x8"], "gave a dict, not an nn.Module: let it return the model"),
        ("MODELS:mlp", ["--input", "1,8"], "'1,8' is not a shape: give sizes such as 1x784"),
        ("MODELS:mlp", ["--input", "0x8"], "'0x8' is not a shape"),
        ("MODELS:mlp", ["--input", ""], "'' is not a shape"),
        ("MODELS:mlp", ["--input", "1x8:int64:2:3"], "is not a shape"),
        ("MODELS:mlp", ["--input", "1x8:long"], "choose float32, float64, float16, bfloat16, int64, int32"),
        ("MODELS:mlp", ["--input", "1x8:float32:5"], "only whole numbers have one"),
        ("MODELS:mlp", ["--input", "1x8:int64:no"], "has no bound"),
        ("MODELS:mlp", ["--input", "99999999x99999999"], "is over a terabyte"),
        ("MODELS:mlp", ["--input", "1x9"], "does not run on inputs 1x9 (RuntimeError: mat1 and mat2"),
        ("MODELS:mlp", ["--input", "1x8:int64"], "does not run on inputs 1x8:int64 (RuntimeError"),
        ("MODELS:mlp", ["--input", "1x8", "--input", "1x8"], "give an --input of the right shape and dtype for each"),
        ("MODELS:mlp", ["--input", "1x8", "--weights", "other.safetensors"], "is of another model: "),
        ("MODELS:mlp", ["--input", "1x8", "--checkpoint", "none.pt"], "no such file"),
        ("MODELS:mlp", ["--input", "1x8", "--seconds", "0"], "seconds is 0"),
    ],
)
def test_errors_of_bench_are_one_sentence(models, tmp_path, target, options, message, flag):
    save_file({"0.weight": torch.ones(16, 9)}, tmp_path / "other.safetensors")
    result = call("bench", target.replace("MODELS", models), *options, *flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("secateur: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["a:b"], ["a:b", "--input", "1", "--threads", "0"], ["--input", "1"]])
def test_usage_errors_of_bench(arguments):
    result = call("bench", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage" in result.stderr


def test_what_the_module_of_a_user_lacks_is_not_hidden(models):
    error = bench("broken_models:mlp", "--input", "1x8").exception
    assert isinstance(error, ModuleNotFoundError)
    assert error.name == "a_module_nobody_has"
