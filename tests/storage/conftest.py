"""Checkpoints that many tests begin with."""

import pytest
import torch
from checkpoint_files import shards
from safetensors.torch import save_file


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {"enc.fc.weight": torch.randn(8, 12), "enc.fc.bias": torch.randn(8), "head.weight": torch.randn(4, 8)}
    save_file({**tensors, "table": torch.arange(6, dtype=torch.int8).view(2, 3)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    first, second = {"b": torch.randn(9, 7), "b.bias": torch.randn(9)}, {"a": torch.randn(5, 9).half()}
    made = shards(tmp_path / "model", first, second)
    (made / "config.json").write_text("{}")
    (made / "tokenizer").mkdir()
    (made / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return made
