"""Models of transformers, compiled and scripted ones, those with layers of this library, and noise out of reach."""

import random

import torch
from torch import nn
from torch.nn import functional as F
from zoo_parts import Model, entry, first, linear, scripted, sequences, vectors

import secateur as sc

# ---- Hugging Face, tiny, from their configurations --------------------------------------------------------------


def hugging(name, calls):
    def add(make):
        for attention in ("eager", "sdpa"):
            kind = "attention" if attention == "sdpa" else "dropout"
            kinds = [(path, kind if what == "attention" else what, rate) for path, what, rate in calls]
            entry(f"{name}, {attention}", kinds)(lambda attention=attention: make(attention))
        return make

    return add


@hugging(
    "BERT",
    [("bert.embeddings.dropout", "dropout", 0.1)]
    + [(f"bert.encoder.layer.{i}.{path}", kind, rate) for i in range(2) for path, kind, rate in (
        ("attention.self", "attention", 0.2), ("attention.output.dropout", "dropout", 0.1),
        ("output.dropout", "dropout", 0.1))]
    + [("dropout", "dropout", 0.1)],
)  # fmt: skip
def _(attention):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        attention_probs_dropout_prob=0.2, num_labels=6, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5], [6]])).long()
    inputs = {"input_ids": torch.randint(0, 30, (4, 6)), "attention_mask": mask}
    return BertForSequenceClassification(config), inputs, lambda answer: answer.logits


@hugging(
    "GPT-2",
    [("transformer.drop", "dropout", 0.1)]
    + [(f"transformer.h.{i}.{path}", kind, rate) for i in range(2) for path, kind, rate in (
        ("attn", "attention", 0.2), ("attn.resid_dropout", "dropout", 0.1), ("mlp.dropout", "dropout", 0.1))],
)  # fmt: skip
def _(attention):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.2, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0, use_cache=False, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 30, (4, 6))}, lambda answer: answer.logits


@hugging(
    "ViT",
    [("embeddings.dropout", "dropout", 0.1)]
    + [(f"layers.{i}.{path}", kind, rate) for i in range(2) for path, kind, rate in (
        ("attention", "attention", 0.2), ("dropout", "dropout", 0.1), ("dropout", "dropout", 0.1))],
)  # fmt: skip
def _(attention):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, attn_implementation=attention, initializer_range=0.3,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(4, 3, 8, 8)}, lambda answer: answer.last_hidden_state


# ---- compiled, exported, traced ---------------------------------------------------------------------------------


@entry("compiled", [("1", "dropout", 0.3), ("2", "lstm", 0.5)])
def _():
    model = nn.Sequential(linear(), nn.Dropout(0.3), nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True))
    return torch.compile(model, backend="eager"), sequences(), first


@entry("a compiled part", [("1.1", "dropout", 0.3)])
def _():
    part = torch.compile(nn.Sequential(linear(), nn.Dropout(0.3)), backend="eager")
    return nn.Sequential(linear(), part, linear()), vectors()


@entry("exported in train()", [("", "dropout", 0.3)])
def _():
    model = nn.Sequential(linear(), nn.Dropout(0.3), linear()).train()
    return torch.export.export(model, (vectors(),)).module(), vectors()


@entry("traced by fx", [("drop", "dropout", 0.3)])
def _():
    return torch.fx.symbolic_trace(_Traceable()), vectors()


class _Traceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop = linear(), nn.Dropout(0.3)

    def forward(self, x):
        return self.a(self.drop(self.a(x)))


@entry("a scripted part without noise", [("2", "dropout", 0.3)])
def _():
    part = scripted(nn.Sequential(linear(), nn.ReLU()))
    return nn.Sequential(linear(), part, nn.Dropout(0.3), linear()), vectors()


# ---- layers and transforms of this library ----------------------------------------------------------------------


@entry("LockedDropout", [("1", "locked_dropout", 0.3)])
def _():
    return nn.Sequential(linear(), sc.dropout.LockedDropout(0.3, batch_first=True), linear()), sequences()


@entry("WordDropout", [("0", "word_dropout", 0.3)])
def _():
    drop = sc.dropout.WordDropout(0.3, 1, keep=[0])
    tokens = torch.randint(2, 20, (4, 5))
    return nn.Sequential(drop, nn.Embedding(20, 8), linear()), tokens


@entry("DropConnect", [("1", "dropconnect", 0.3)])
def _():
    return nn.Sequential(linear(), sc.dropout.DropConnect(8, 8, p=0.3), nn.Tanh(), linear()), vectors()


@entry("DropBlock2d", [("1", "dropblock", 0.3)])
def _():
    parts = nn.Conv2d(3, 8, 3, padding=1), sc.dropout.DropBlock2d(0.3, 2), nn.Flatten(), nn.Linear(8 * 36, 8)
    return nn.Sequential(*parts), torch.randn(4, 3, 6, 6)


@entry("StochasticDepth", [("drop", "stochastic_depth", 0.3)])
def _():
    drop = sc.dropout.StochasticDepth(0.3)
    return Model(lambda s, x: x + s.drop(s.a(x)), a=linear(), drop=drop), sequences()


@entry("TargetedDropout", [("1", "targeted_dropout", 0.6)])
def _():
    layer = sc.dropout.TargetedDropout(8, 8, p=0.6, target=0.5)
    return nn.Sequential(linear(), layer, nn.Tanh(), linear()), vectors()


@entry(
    "recurrent",
    [
        ("embed", "embedding", 0.1),
        ("lstm", "recurrent_weight", 0.2),
        ("lstm", "recurrent_hidden", 0.3),
        ("lstm", "recurrent_input", 0.25),
        ("lstm", "recurrent_weight", 0.2),
        ("lstm", "recurrent_hidden", 0.3),
        ("lstm", "recurrent_input", 0.25),
        ("lstm", "lstm", 0.4),
    ],
)
def _():
    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])

    lstm = nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)
    model = Model(forward, embed=nn.Embedding(20, 8), lstm=lstm, head=linear())
    sc.dropout.recurrent(model, weight=0.2, hidden=0.3, input=0.25, embedding=0.1)
    return model, torch.randint(0, 20, (4, 5))


@entry("concrete", [("0", "concrete", None), ("2", "concrete", None)])
def _():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    sc.dropout.concrete(model, n_data=100, rate=0.2)
    return model, vectors()


@entry("variational", [("0", "variational", None), ("2", "variational", None)])
def _():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    sc.dropout.variational(model, n_data=100, warmup=10)
    return model, vectors()


@entry("hard_concrete", [("0", "hard_concrete", None)])
def _():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    sc.dropout.hard_concrete(model, n_data=100)
    return model, vectors()


# ---- out of reach -----------------------------------------------------------------------------------------------


@entry("behind if self.training", [("drop", "dropout", 0.3)], [("", "dropout")])
def _():
    def forward(self, x):
        x = self.drop(self.a(x))
        if self.training:
            x = F.dropout(x, 0.5)
        return self.a(x)

    return Model(forward, a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("a mask of one's own", [("drop", "dropout", 0.3)], [("", "rand_like")])
def _():
    def forward(self, x):
        x = self.drop(self.a(x))
        if self.training:
            mask = torch.rand_like(x) > 0.5
            x = x * mask
        return self.a(x)

    return Model(forward, a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("layers left out at random", [(f"layers.{i}.1", "dropout", 0.3) for i in range(4)], [("", "rand")])
def _():
    def forward(self, x):
        for layer in self.layers:
            if self.training and torch.rand(()) < 0.5:
                continue
            x = x + layer(x)
        return x

    return Model(forward, layers=nn.ModuleList(nn.Sequential(linear(), nn.Dropout(0.3)) for _ in range(4))), vectors()


@entry("a random number of Python", [("drop", "dropout", 0.3)], [("", "random numbers of Python's random")])
def _():
    def forward(self, x):
        return self.a(self.drop(x)) * (random.random() if self.training else 0.5)

    return Model(forward, a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("a scripted part", [("1", "dropout", 0.3)], [("2", "dropout")])
def _():
    return nn.Sequential(linear(), nn.Dropout(0.3), scripted(nn.Sequential(nn.Dropout(0.5)))), vectors()


@entry("a scripted function", [("drop", "dropout", 0.3)], [("", "bernoulli_")])
def _():
    return Model(lambda s, x: _scripted(s.drop(s.a(x)), s.training), a=linear(), drop=nn.Dropout(0.3)), vectors()


@scripted
def _scripted(x, training: bool):
    return torch.dropout(x, 0.5, training)


@entry("noise in eval() too", [("drop", "dropout", 0.3)], [("", "randn_like")])
def _():
    return Model(lambda s, x: s.a(s.drop(x)) + torch.randn_like(x), a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("RReLU", [("2", "dropout", 0.3)], [("1", "rrelu_with_noise")])
def _():
    return nn.Sequential(linear(), nn.RReLU(), nn.Dropout(0.3), linear()), vectors()
