"""secateur.storage.pretrained: models of transformers through packed folders, as through their own."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

import secateur as sc  # noqa: E402
from secateur.errors import FileError, InputError, InputTypeError, WriteError  # noqa: E402
from secateur.storage.checkpoints import inspect  # noqa: E402

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
MODELS = {
    "bert": lambda t: t.BertModel(t.BertConfig(**SMALL)),
    "classifier": lambda t: t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3)),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2)),
    "t5": lambda t: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def build(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = MODELS[kind](transformers).to(dtype)
    sc.prune(model, 0.5, scope=sc.weights(model, only="*"))
    return model


def require_same(found, want):
    assert type(found) is type(want)
    a, b = found.state_dict(), want.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].contiguous().view(torch.uint8).equal(b[name].contiguous().view(torch.uint8)), name


def bytes_of(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_what_from_pretrained_would_give(tmp_path, kind, dtype):
    model = build(kind, dtype)
    if model.can_generate():
        model.generation_config.max_new_tokens = 7
    written = sc.save_pretrained(model, tmp_path / "packed")
    names = ["config.json", *["generation_config.json"] * model.can_generate(), "model.packed.safetensors"]
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == names
    assert written.ratio < 0.75
    assert written.tensors == inspect(tmp_path / "packed").tensors
    found = sc.load_pretrained(tmp_path / "packed", type(model))
    assert not found.training
    model.save_pretrained(tmp_path / "plain")
    want = type(model).from_pretrained(tmp_path / "plain")
    require_same(found, want)
    configs = found.config.to_dict(), want.config.to_dict()
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]
    if model.can_generate():
        assert found.generation_config.to_dict() == want.generation_config.to_dict()
        assert found.generation_config.max_new_tokens == 7
    require_same(found.to(dtype), model)  # transformers before 5 gives float32 for bfloat16


def test_its_name_is_that_of_its_folder(tmp_path):
    sc.save_pretrained(build("bert"), tmp_path / "m")
    for folder in (tmp_path / "m", str(tmp_path / "m")):
        assert sc.load_pretrained(folder, transformers.AutoModel).name_or_path == str(folder)


def test_tied_weights_stay_tied(tmp_path):
    for kind in ("gpt2", "t5"):
        model = build(kind)
        sc.save_pretrained(model, tmp_path / kind)
        found = sc.load_pretrained(tmp_path / kind, type(model))
        assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
        assert len(list(found.parameters())) == len(list(model.parameters()))
    model.get_output_embeddings().weight = nn.Parameter(torch.ones(99, 32))  # and those that are not, do not
    model.config.tie_word_embeddings = False
    sc.save_pretrained(model, tmp_path / "untied")
    found = sc.load_pretrained(tmp_path / "untied", type(model))
    require_same(found, model)
    assert found.get_output_embeddings().weight is not found.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "auto"),
    [("gpt2", "AutoModelForCausalLM"), ("bert", "AutoModel"), ("classifier", "AutoModelForSequenceClassification")],
)
def test_auto_classes(tmp_path, kind, auto):
    model = build(kind)
    sc.save_pretrained(model, tmp_path / "m")
    require_same(sc.load_pretrained(tmp_path / "m", getattr(transformers, auto)), model)


def test_a_base_model_into_one_with_a_head_and_back(tmp_path):
    for kind, cls in [("bert", "BertForSequenceClassification"), ("classifier", "BertModel")]:
        cls, model = getattr(transformers, cls), build(kind)
        sc.save_pretrained(model, tmp_path / kind)
        model.save_pretrained(tmp_path / f"{kind}-plain")
        found, want = sc.load_pretrained(tmp_path / kind, cls), cls.from_pretrained(tmp_path / f"{kind}-plain")
        require_same(found.base_model, want.base_model)
        require_same(found.base_model, model.base_model)


def test_a_sharded_folder(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 3
    sc.pack(tmp_path / "plain", tmp_path / "packed")
    assert (tmp_path / "packed" / "model.packed.safetensors.index.json").exists()
    for folder in ("packed", "plain"):
        require_same(sc.load_pretrained(tmp_path / folder, transformers.AutoModelForCausalLM), model)
    sc.unpack(tmp_path / "packed", tmp_path / "back")
    require_same(type(model).from_pretrained(tmp_path / "back"), model)
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "plain")


def test_an_unpacked_folder_needs_no_secateur(tmp_path):
    code = (
        "import sys, torch; sys.modules['secateur'] = None\n"
        "import transformers\n"
        "transformers.utils.logging.disable_progress_bar()\n"
        "for name in sys.argv[1:]:\n"
        "    kind, cls = name.split('=')\n"
        "    model = getattr(transformers, cls).from_pretrained(f'{kind}-plain')\n"
        "    torch.save(model.state_dict(), f'{kind}.pt')\n"
    )
    models = {kind: build(kind) for kind in MODELS}
    for kind, model in models.items():
        sc.save_pretrained(model, tmp_path / kind)
        sc.unpack(tmp_path / kind, tmp_path / f"{kind}-plain")
    arguments = [f"{kind}={type(model).__name__}" for kind, model in models.items()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, model in models.items():
        found, want = torch.load(tmp_path / f"{kind}.pt", weights_only=True), model.state_dict()
        assert list(found) == list(want)
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_from_pretrained_itself_says_that_it_finds_no_weights(tmp_path):
    model = build("bert")
    sc.save_pretrained(model, tmp_path / "m")
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        type(model).from_pretrained(tmp_path / "m")


def test_a_tokenizer_stays(tmp_path):
    from tokenizers import Tokenizer, models

    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "tree": 2}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "more").mkdir()
    (tmp_path / "m" / "more" / "README.md").write_text("mine")
    model = build("bert")
    for _ in range(2):
        sc.save_pretrained(model, tmp_path / "m")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("tree")["input_ids"] == [2]
        assert (tmp_path / "m" / "more" / "README.md").read_text() == "mine"
    require_same(sc.load_pretrained(tmp_path / "m", type(model)), model)


def test_a_second_model_over_the_first(tmp_path):
    sc.save_pretrained(build("bert"), tmp_path / "m")
    model = build("classifier")
    sc.save_pretrained(model, tmp_path / "m")
    require_same(sc.load_pretrained(tmp_path / "m", type(model)), model)
    sc.save_pretrained(model, str(tmp_path / "fresh"))
    assert bytes_of(tmp_path / "m") == bytes_of(tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "m"]


def test_what_a_killed_process_left_goes(tmp_path):
    code = (
        "import os, signal, transformers, secateur.storage.pretrained as pretrained\n"
        "pretrained.pack = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = transformers.BertModel(transformers.BertConfig(hidden_size=12, num_hidden_layers=1, vocab_size=9))\n"
        "pretrained.save_pretrained(model, 'm')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] != []
    sc.save_pretrained(build("bert"), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_other_weights_are_not_overwritten(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "m")
    before = bytes_of(tmp_path / "m")
    with pytest.raises(WriteError, match=r"m holds model\.safetensors, which would be lost: give a new folder"):
        sc.save_pretrained(model, tmp_path / "m")
    assert bytes_of(tmp_path / "m") == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_where_it_cannot_be_written(tmp_path):
    model = build("bert")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file is a file: give the name of a folder"):
        sc.save_pretrained(model, tmp_path / "file")
    with pytest.raises(WriteError, match="make its folder first"):
        sc.save_pretrained(model, tmp_path / "none" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_lossy_levels_say_what_was_lost(tmp_path):
    model = build("llama")
    written = sc.save_pretrained(model, tmp_path / "m", level="near")
    errors = {t.name: t.error for t in written.tensors if t.error is not None}
    assert "model.layers.0.mlp.up_proj.weight" in errors
    assert "model.norm.weight" not in errors
    assert all(0 < error < 0.02 for error in errors.values())
    found = sc.load_pretrained(tmp_path / "m", type(model)).state_dict()
    for name, want in model.state_dict().items():
        assert torch.equal(found[name] == 0, want == 0)
        lost = (found[name] - want).norm() / want.norm()
        assert float(lost) == pytest.approx(errors.get(name, 0.0), rel=1e-4)


def test_what_is_no_model_of_transformers(tmp_path):
    with pytest.raises(InputTypeError, match=r"Linear is not a model of transformers: use secateur\.save for it"):
        sc.save_pretrained(nn.Linear(2, 2), tmp_path / "m")
    sc.save_pretrained(build("bert"), tmp_path / "m")
    with pytest.raises(InputTypeError, match=r"is not a class of transformers: use secateur\.load\(path, into=model\)"):
        sc.load_pretrained(tmp_path / "m", nn.Linear)
    for options, message in [({"level": "zip"}, "no level named 'zip'"), ({"effort": "x"}, "no effort named 'x'")]:
        with pytest.raises(InputError, match=message):
            sc.save_pretrained(build("bert"), tmp_path / "other", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_damaged_weights(tmp_path):
    model = build("bert")
    sc.save_pretrained(model, tmp_path / "m")
    file = tmp_path / "m" / "model.packed.safetensors"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    with pytest.raises(FileError, match=r"is damaged \(its checksum differs\): copy or download the file again"):
        sc.load_pretrained(tmp_path / "m", type(model))
    file.unlink()
    with pytest.raises(InputError, match="is a folder without an index"):
        sc.load_pretrained(tmp_path / "m", type(model))
