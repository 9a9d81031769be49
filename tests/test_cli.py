"""secateur.cli: commands, JSON, errors and exit statuses."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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
            raise InputError(f"sparsity is {sparsity}:\n  give 0 <= s < 1")
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


def test_inspect_draws_a_table_on_a_terminal(file, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    result = call("inspect", file)
    assert result.exit_code == 0
    assert "\x1b[" in result.stdout
    assert "[bold]w" in result.stdout
    assert "│" in result.stdout


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
            "inspect": {"path", "tensors", "total", "notes"},
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
