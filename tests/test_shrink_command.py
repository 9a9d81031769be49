"""What `secateur shrink` does."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from typer.testing import CliRunner

from secateur.cli import app
from secateur.errors import InputError, InputTypeError, UnknownNameError, WriteError
from secateur.shrink_command import by_plan, class_of, run
from secateur.structure import Plan, propose, shrink

OF_THE_USER = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a module of models, in which the test runs; its name."""
    name = f"of_shrink_{tmp_path.name}"  # imported once a process
    (tmp_path / f"{name}.py").write_text(OF_THE_USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"{name}:mlp"


def test_a_file_and_the_plan_beside_it(place, tmp_path):
    full = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    out = tmp_path / "small.safetensors"
    result = run(place, ["2x8"], weights=tmp_path / "full.safetensors", out=out, sparsity=0.5)
    assert (result.weights, result.written) == ((178, 90), (str(out), str(tmp_path / "small.plan.json")))
    assert load_file(out)["0.weight"].shape == (8, 8)
    Plan.from_json((tmp_path / "small.plan.json").read_text()).apply(full)
    before = full[0].weight.clone()
    load_model(full, out)
    assert torch.equal(full[0].weight, before)


def test_a_dry_run_shows_the_plan_and_writes_nothing(place, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["shrink", place, "--input", "2x8", "--sparsity", "0.5", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "0.weight[0]" in result.stdout
    assert "178 weights become 90" in result.stdout
    shown = CliRunner().invoke(app, ["shrink", place, "--input", "2x8", "--sparsity", "0.5", "--dry-run", "--json"])
    assert json.loads(shown.stdout)["weights"] == [178, 90]
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before


def test_either_out_or_dry_run(place):
    result = CliRunner().invoke(app, ["shrink", place, "--input", "2x8", "--sparsity", "0.5"])
    assert result.exit_code == 2
    assert "give either --out or --dry-run" in result.output


def test_what_remains(place, tmp_path):
    arguments = ["shrink", place, "--input", "2x8", "--dry-run"]
    for what in ("--macs", "--params", "--sparsity"):
        result = CliRunner().invoke(app, [*arguments, what, "0.5"])
        assert "178 weights become 90" in result.stdout, result.output
    result = CliRunner().invoke(app, [*arguments, "--latency", "1.5"])
    assert result.exit_code == 2
    assert "give the fraction of the latency that remains" in result.output


def test_blocks_in_a_table_and_in_the_plan(place, tmp_path):
    target = place.replace("mlp", "encoder")
    arguments = ["shrink", target, "--input", "2x5x8", "--depth", "0.5"]
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "layers.0, influence 0." in shown.stdout
    assert shown.stdout.count("1 block") == 4
    whole = CliRunner().invoke(app, [*arguments, "-o", "small.safetensors"])
    assert whole.exit_code == 0, whole.output
    assert {name.split(".")[1] for name in load_file("small.safetensors")} == {"0", "1"}
    assert sum(block.becomes == "" for block in Plan.from_json((tmp_path / "small.plan.json").read_text()).blocks) == 2
    both = CliRunner().invoke(app, [*arguments, "--macs", "0.5", "--dry-run"])
    assert both.exit_code == 2
    assert "depth=0.5 first, then shrink the result with macs=" in both.output


def test_which_model(place, tmp_path):
    for target, hf in ((None, None), (place, tmp_path)):
        with pytest.raises(InputError, match="give either MODULE:FACTORY or --hf FOLDER"):
            run(target, [], hf=hf)


def test_inputs(place):
    with pytest.raises(InputTypeError, match="give --input once for each argument"):
        run(place, [], sparsity=0.5)
    with pytest.raises(InputError, match="some inputs have a name"):
        run(place, ["2x8", "x=2x8"], sparsity=0.5)
    assert run(place, ["input=2x8"], sparsity=0.5).weights == (178, 90)


def test_where_to(place, tmp_path):
    with pytest.raises(InputError, match=r"give one, such as small\.safetensors"):
        run(place, ["2x8"], out=tmp_path / "small.pt", sparsity=0.5)
    with pytest.raises(WriteError, match="No such file or directory"):
        run(place, ["2x8"], out=tmp_path / "nowhere" / "small.safetensors", sparsity=0.5)


def test_a_folder_of_save_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "full")
    (tmp_path / "full" / "vocab.txt").write_text("words")
    result = run(None, [], hf=tmp_path / "full", out=tmp_path / "small", sparsity=0.5)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    assert again.config.hidden_size == 16
    assert sum(p.numel() for p in again.parameters()) == result.weights[1] < 0.5 * result.weights[0]
    assert (tmp_path / "small" / "vocab.txt").read_text() == "words"
    with pytest.raises(InputError, match="give a new folder"):
        run(None, [], hf=tmp_path / "full", out=tmp_path / "small", sparsity=0.5)


def test_a_folder_of_something_else(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="give a folder of save_pretrained"):
        run(None, [], hf=tmp_path, sparsity=0.5)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["MyBert"]}')
    with pytest.raises(UnknownNameError, match="give a model of transformers' own"):
        run(None, [], hf=tmp_path, sparsity=0.5)


def test_a_plan_cuts_a_checkpoint(place, tmp_path):
    full = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    once = run(place, ["2x8"], weights=tmp_path / "full.safetensors", out=tmp_path / "a.safetensors", sparsity=0.5)
    arguments = ["shrink", "--weights", "full.safetensors", "--plan", "a.plan.json"]
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "178 weights become 90" in shown.stdout, shown.output
    result = CliRunner().invoke(app, [*arguments, "-o", "b.safetensors"])
    assert result.exit_code == 0, result.output
    found, want = load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "a.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], t) for name, t in want.items())
    assert once.weights == (178, 90)


def test_a_plan_is_for_a_checkpoint(place, tmp_path):
    (tmp_path / "p.json").write_text("[]")
    for more in ([place], ["--sparsity", "0.5"], ["--depth", "0.5"], ["--input", "2x8"]):
        result = CliRunner().invoke(app, ["shrink", "--plan", "p.json", "--weights", "f", "--dry-run", *more])
        assert "--plan says what goes" in result.output
    with pytest.raises(InputError, match="give either --weights F or --hf FOLDER"):
        by_plan(tmp_path / "p.json")
    with pytest.raises(InputError, match="give a file that is there"):
        by_plan(tmp_path / "q.json", weights=tmp_path / "f")
    with pytest.raises(InputError, match="give what to_json"):
        by_plan(tmp_path / "p.json", weights=tmp_path / "f")


def test_a_folder_cut_by_a_plan_of_its_shapes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
    plan = propose(model, {"input_ids": ids}, 0.5, score="random", verify=False)
    (tmp_path / "plan.json").write_text(plan.to_json())
    result = by_plan(tmp_path / "plan.json", hf=tmp_path / "full", out=tmp_path / "small")
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert sum(p.numel() for p in small.parameters()) == result.weights[1] < 0.5 * result.weights[0]
    full = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "full").eval()
    want = shrink(full, {"input_ids": ids}, plan=plan)
    assert torch.equal(small(ids).logits, want(ids).logits)


def test_a_folder_with_fewer_layers_and_a_plan_for_another(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    for name in ("full", "other"):
        transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / name)
    result = run(None, [], hf=tmp_path / "full", out=tmp_path / "small", depth=0.67)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    assert (again.config.num_hidden_layers, len(again.bert.encoder.layer)) == (2, 2)
    assert sum(p.numel() for p in again.parameters()) == result.weights[1]
    done = by_plan(tmp_path / "small" / "secateur.plan.json", hf=tmp_path / "other", out=tmp_path / "second")
    assert done.weights[1] == result.weights[1]
    assert transformers.BertForMaskedLM.from_pretrained(tmp_path / "second").config.num_hidden_layers == 2


def test_the_commands_of_the_docs_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/shrinking.md").read_text()
    code = re.search(r"^```python\n(.*?)^torch.manual_seed", page, re.MULTILINE | re.DOTALL)[1]
    name = f"of_docs_{tmp_path.name}"  # imported once a process
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    space: dict = {}
    exec(code, space)
    save_file(space["Tagger"]().state_dict(), "tagger.safetensors")
    commands = re.findall(r"^secateur (shrink .*)", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        result = CliRunner().invoke(app, command.replace("tagger:", f"{name}:").split())
        assert result.exit_code == 0, result.output
    small, again = load_file("small.safetensors"), load_file("again.safetensors")
    assert all(torch.equal(again[name], t) for name, t in small.items())


def test_a_config_that_transformers_does_not_know(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"does not know the config\.json"):
        class_of(tmp_path)


@pytest.mark.parametrize("spelling", ["w.safetensors", "./w.safetensors", "sub/../w.safetensors", "link.safetensors"])
@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_the_weights_are_never_written_over(place, tmp_path, command, spelling):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.safetensors").symlink_to("w.safetensors")
    save_file(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).state_dict(), tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    more = ["--input", "2x8"] if command == "shrink" else ["--data", place.replace("mlp", "batches")]
    words = [command, place, "--weights", "w.safetensors", *more, "--sparsity", "0.5", "-o", spelling]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "the source is never touched: give another place" in result.output
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_nor_is_a_shard_of_them_nor_a_folder(place, tmp_path):
    state = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).state_dict()
    (tmp_path / "shards").mkdir()
    save_file(state, tmp_path / "one.safetensors")
    (tmp_path / "shards/part.safetensors").symlink_to(tmp_path / "one.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    for weights in ("shards", "shards/model.safetensors.index.json"):
        for out in ("one.safetensors", "shards/part.safetensors"):
            with pytest.raises(InputError, match="the source is never touched: give another place"):
                run(place, ["2x8"], weights=tmp_path / weights, out=tmp_path / out, sparsity=0.5)
    (tmp_path / "one.safetensors").unlink()
    for out in ("shards", "shards/small"):
        with pytest.raises(InputError, match="the source is never touched: give another place"):
            run(None, [], hf=tmp_path / "shards", out=tmp_path / out, sparsity=0.5)
