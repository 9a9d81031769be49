"""What `secateur prune` does with data."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import secateur as sc
from secateur.cli import app
from secateur.errors import InputError, InputTypeError, UnknownNameError
from secateur.oneshot_command import Source, run

OF_THE_USER = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

batches = [torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)).cumsum(1) for seed in range(6)]

def made():
    return iter(batches)

number = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The name of a module of the user's, in the folder in which the test runs."""
    name = f"of_oneshot_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"  # imported once a process
    (tmp_path / f"{name}.py").write_text(OF_THE_USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.mark.parametrize("batches", ["batches", "made"])
def test_a_file_is_written_and_the_table_tells_what_was_lost(place, tmp_path, batches):
    full = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    words = ("--weights", "full.safetensors", "--data", f"{place}:{batches}", "--sparsity", 0.5)
    result = call("prune", f"{place}:mlp", *words, "-o", "out.safetensors")
    assert result.exit_code == 0, result.output
    assert "output lost" in result.stdout
    assert "written: out.safetensors" in result.stdout
    stats = sc.calibrate(full, sys.modules[place].batches)
    sc.oneshot(full, stats, 0.5)
    found = load_file("out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in full.state_dict().items())


def test_a_dry_run_writes_nothing_and_prints_json(place, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    words = ("--data", f"{place}:batches", "--sparsity", 0.5, "--only", "0", "--dry-run", "--json")
    result = call("prune", f"{place}:mlp", *words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["zeros"], found["weights"], found["written"]) == (64, 128, "")
    (layer,) = found["layers"]
    assert layer["name"] == "0.weight"
    assert 0 < layer["lost"] < 1
    assert found["way"] in found["tried"]
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


def test_a_packed_file_is_rounded_by_the_data(place):
    call("prune", f"{place}:mlp", "--data", f"{place}:batches", "--sparsity", 0.5, "-o", "plain.safetensors")
    words = ("--data", f"{place}:batches", "--sparsity", 0.5, "--pack", "tiny", "-o", "out.safetensors")
    assert call("prune", f"{place}:mlp", *words).exit_code == 0
    plain, found = load_file("plain.safetensors"), sc.load("out.safetensors")
    assert all((found[name] == 0)[plain[name] == 0].all() for name in plain)


@pytest.mark.parametrize(
    ("source", "kind", "remedy"),
    [
        (lambda place: Source(data="a:b"), InputError, "give either MODULE:FACTORY or --hf FOLDER"),
        (lambda place: Source(f"{place}:mlp"), InputError, "give either --data MODULE:BATCHES or --texts FILE"),
        (lambda place: Source(f"{place}:mlp", data=place), InputError, "give for example data:batches"),
        (lambda place: Source(f"{place}:mlp", data=f"{place}:batch"), UnknownNameError, "valid names are"),
        (lambda place: Source(f"{place}:mlp", data=f"{place}:number"), InputTypeError, "give an iterable of inputs"),
    ],
)
def test_what_is_not_clear_is_refused(place, source, kind, remedy):
    with pytest.raises(kind, match=remedy):
        run(source(place), 0.5)


def test_texts_need_a_tokenizer(place, tmp_path):
    (tmp_path / "texts").write_text("a line")
    with pytest.raises(InputError, match="give --data MODULE:BATCHES"):
        run(Source(f"{place}:mlp", texts=tmp_path / "texts"), 0.5)


@pytest.mark.parametrize("words", [[], ["m.pt", "--weights", "w.pt"]])
def test_a_checkpoint_alone_is_pruned_without_data(words):
    result = call("prune", *words, "--sparsity", 0.5, "--dry-run")
    assert result.exit_code == 2
    assert "MODULE:FACTORY with --data" in re.sub(r"[^\w:/-]+", " ", result.output)


def test_a_folder_and_its_texts(place, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained("bert")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained("bert")
    lines = [" ".join("abcdefgh"[(i * k) % 8] for k in range(3 + i % 5)) for i in range(90)]
    (tmp_path / "texts").write_text("\n".join(lines))
    done = run(
        Source(hf=tmp_path / "bert", texts=tmp_path / "texts"),
        0.5,
        out=tmp_path / "small",
        chosen=((), ("pooler*",)),
    )
    assert done.masks.sparsity == 0.5
    small = transformers.BertModel.from_pretrained("small")
    assert sc.check(small, done.masks) == {}
    assert transformers.AutoTokenizer.from_pretrained("small").vocab_size == 13


def sizes(**more):
    return {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 20,
        **more,
    }


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Llama", "XLMRoberta"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**sizes(vocab_size=64), bos_token_id=0, eos_token_id=1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "texts").write_text("some words\nand others\n")
    with pytest.raises(InputError, match=r"tokenizer.*: save the tokenizer of the model there with save_pretrained"):
        run(Source(hf=tmp_path / "hf", texts=tmp_path / "texts"), 0.5)


def test_a_tokenizer_of_other_words_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    transformers.BertModel(transformers.BertConfig(**sizes(vocab_size=6))).save_pretrained(tmp_path / "hf")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "hf")
    (tmp_path / "texts").write_text("some words\nand others\n")
    with pytest.raises(InputError, match=r"knows no word of .*texts: save the tokenizer"):
        run(Source(hf=tmp_path / "hf", texts=tmp_path / "texts"), 0.5)


@pytest.mark.parametrize(("kind", "most"), [("Bert", 20), ("Roberta", 18)])
def test_long_lines_are_cut_to_the_positions_of_the_model(tmp_path, kind, most):
    transformers = pytest.importorskip("transformers")
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = getattr(transformers, f"{kind}Config")(**sizes(vocab_size=13), pad_token_id=1)
    model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(tmp_path / "hf")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "hf")
    (tmp_path / "texts").write_text("\n".join(" ".join("abcdefgh"[i:] * 9) for i in range(8)))
    source = Source(hf=tmp_path / "hf", texts=tmp_path / "texts")
    assert [batch["input_ids"].shape[1] for batch in source.batches(model)] == [most]
    assert run(source, 0.5, chosen=(("*query*",), ())).masks.sparsity == 0.5


def test_a_factory_without_data_is_told_what_is_missing(place):
    result = call("prune", f"{place}:mlp", "--sparsity", 0.5, "-o", "out.safetensors")
    assert result.exit_code == 2
    assert "give --data MODULE:BATCHES" in " ".join(result.output.split())
    missing = call("prune", "missing.safetensors", "--sparsity", 0.5, "-o", "out.safetensors")
    assert "--data" not in missing.output
    assert "missing.safetensors" in missing.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sparsity", "1.0"], "ask for less"),
        (["--sparsity", "0.5", "--allocation", "erc"], "choose global, uniform, erk, lamp, sensitivity"),
        (["--sparsity", "0.5", "--weights", "other.safetensors"], "give one of this model"),
    ],
)
def test_a_remedy_is_one_for_the_command_line(place, words, told):
    save_file({"1.weight": torch.zeros(3)}, "other.safetensors")
    result = call("prune", f"{place}:mlp", "--data", f"{place}:batches", *words, "--dry-run")
    assert result.exit_code == 2
    assert result.output.strip().endswith(told)


def test_the_help_lists_what_data_allows():
    help_ = " ".join(CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "300"}).output.split())
    assert "global, uniform, erk; with data also lamp, sensitivity." in help_
