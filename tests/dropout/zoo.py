"""Models with dropout in every place where people put it, and the calls that are in them; free of pytest."""

import os
import random
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import secateur as sc

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Entry(NamedTuple):
    """One model of the zoo.

    Attributes:
        name: of the case.
        build: gives the model in `eval()`, its inputs, and what takes a tensor out of its answer (None: it is one).
        calls: path, kind and rate of each dropout call, in order.
        named: path and function of each that is out of reach.
        free: nothing is out of reach.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Any, Callable[[Any], Any] | None]]
    calls: list[tuple[str, str, float | None]]
    named: list[tuple[str, str]]

    @property
    def free(self) -> bool:
        return not self.named


ZOO: list[Entry] = []


def entry(name, calls, named=()):
    """Add what a function makes: a model, its inputs, and possibly what takes a tensor out of its answer."""

    def add(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(map(ord, name)))
                model, inputs, *output = make()
            if "eval" not in vars(model):  # an exported graph has no mode
                model.eval()
            return model, inputs, output[0] if output else None

        ZOO.append(Entry(name, build, list(calls), list(named)))
        return make

    return add


class Model(nn.Module):
    """A forward function, and what it uses."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def scripted(part):
    """torch.jit.script is deprecated; people have models of it all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15
        return torch.jit.script(part)


def first(answer):
    return answer[0]


def linear(inputs=8, outputs=8):
    return nn.Linear(inputs, outputs)


def vectors(batch=4):
    return torch.randn(batch, 8)


def sequences(batch=4, time=5):
    return torch.randn(batch, time, 8)


# ---- functions and modules --------------------------------------------------------------------------------------


@entry("F.dropout", [("", "dropout", 0.3)])
def _():
    return Model(lambda s, x: s.b(F.dropout(s.a(x), 0.3, s.training)), a=linear(), b=linear()), vectors()


@entry("F.dropout always on", [("", "dropout", 0.5)])
def _():
    return Model(lambda s, x: s.b(F.dropout(s.a(x))), a=linear(), b=linear()), vectors()


@entry("Sequential", [("1", "dropout", 0.2), ("4", "dropout", 0.5)])
def _():
    parts = linear(), nn.Dropout(0.2), linear(), nn.Tanh(), nn.Dropout(0.5), nn.Dropout(0.0), linear()
    return nn.Sequential(*parts), vectors()


@entry("first of all", [("0", "dropout", 0.4)])
def _():
    return nn.Sequential(nn.Dropout(0.4), linear(), nn.Tanh(), linear()), vectors()


@entry("nested", [("0.1.1", "dropout", 0.2), ("1.drop", "dropout", 0.3)])
def _():
    inner = Model(lambda s, x: s.drop(s.a(x)), a=linear(), drop=nn.Dropout(0.3))
    return nn.Sequential(nn.Sequential(linear(), nn.Sequential(nn.Tanh(), nn.Dropout(0.2))), inner), vectors()


@entry("one module twice", [("drop", "dropout", 0.3), ("drop", "dropout", 0.3)])
def _():
    return Model(lambda s, x: s.a(s.drop(s.a(s.drop(x)))), a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("alpha", [("1", "alpha_dropout", 0.2)])
def _():
    return nn.Sequential(linear(), nn.AlphaDropout(0.2), linear()), vectors()


@entry("feature alpha", [("1", "feature_alpha_dropout", 0.3)])
def _():
    return nn.Sequential(nn.Conv1d(8, 8, 3), nn.FeatureAlphaDropout(0.3), nn.Flatten(), nn.Linear(24, 8)), torch.randn(
        4, 8, 5
    )


@entry("Dropout1d", [("1", "dropout1d", 0.3)])
def _():
    return nn.Sequential(nn.Conv1d(8, 8, 3), nn.Dropout1d(0.3), nn.Flatten(), nn.Linear(24, 8)), torch.randn(4, 8, 5)


@entry("Dropout2d and BatchNorm", [("3", "dropout2d", 0.3), ("6", "dropout", 0.5)])
def _():
    head = nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 16, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3), nn.MaxPool2d(2), *head
    )
    return model, torch.randn(4, 3, 8, 8)


@entry("Dropout3d", [("1", "dropout3d", 0.3)])
def _():
    model = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.Dropout3d(0.3), nn.Flatten(), nn.Linear(8 * 27, 8))
    return model, torch.randn(4, 2, 3, 3, 3)


@entry("in place", [("1", "dropout", 0.3)])
def _():
    return nn.Sequential(linear(), nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True), linear()), vectors()


@entry("in place, into the input", [("0", "dropout", 0.3)])
def _():
    return nn.Sequential(nn.Dropout(0.3, inplace=True), linear()), vectors()


@entry("in place, into a view", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.a(x)
        self.drop(hidden[:, :4])
        return self.b(hidden)

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3, inplace=True)), vectors()


@entry("residual", [("drop", "dropout", 0.3), ("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        x = x + self.drop(self.a(x))
        return x + self.drop(self.b(x).relu())

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), sequences()


@entry("added in place to what came before", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.a(x)
        hidden += self.drop(hidden)
        return self.b(hidden)

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("added in place to the input", [("drop", "dropout", 0.3)])
def _():
    return Model(lambda s, x: x.add_(s.drop(s.a(x))), a=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("torch.dropout and aten", [("", "dropout", 0.3), ("", "dropout", 0.2), ("", "dropout", 0.1)])
def _():
    def forward(self, x):
        x = torch.dropout(self.a(x), 0.3, self.training)
        x = torch.ops.aten.dropout.default(self.b(x), 0.2, self.training)
        return self.a(torch.native_dropout(x, 0.1, self.training)[0])

    return Model(forward, a=linear(), b=linear()), vectors()


@entry("sizes known before", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        batch, time, _ = x.shape
        hidden = self.drop(self.a(x))
        return self.b(hidden.reshape(batch, time * 8)).view(batch, 2, 4).sum(1)

    return Model(forward, a=linear(), b=nn.Linear(40, 8), drop=nn.Dropout(0.3)), sequences()


@entry("batch along another dimension", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        return self.b(self.drop(self.a(x).transpose(0, 1)).mean(0))

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), sequences()


@entry("centred over the batch", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.drop(self.a(x))
        return self.b(hidden - hidden.mean(0))

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("masked logits", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.drop(self.a(x))
        logits = self.b(hidden - hidden.mean(0))
        return torch.cat([logits, torch.full_like(logits[:, :1], -torch.inf)], 1)

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("columns of other sizes", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.drop(self.a(x))
        return self.b(hidden - hidden.mean(0)) * 10.0 ** torch.arange(-2, 6) + 1

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("a branch on a value", [("drop", "dropout", 0.3), ("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        hidden = self.drop(self.a(x))
        hidden = self.b(hidden) if hidden.sum() > 0 else hidden.tanh()
        return self.a(self.drop(hidden))

    return Model(forward, a=linear(), b=linear(), drop=nn.Dropout(0.3)), vectors()


@entry("a value read before", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x, lengths):
        lengths, scale = lengths.tolist(), 0
        while lengths:
            scale += lengths.pop()
        return self.a(self.drop(x)) * scale

    return Model(forward, a=linear(), drop=nn.Dropout(0.3)), (vectors(), torch.tensor([1, 2, 1, 1]))


@entry("bfloat16", [("1", "dropout", 0.5)])
def _():
    return nn.Sequential(linear(), nn.Dropout(0.5), nn.GELU(), linear()).bfloat16(), vectors().bfloat16()


@entry("float64", [("1", "dropout", 0.5)])
def _():
    return nn.Sequential(linear(), nn.Dropout(0.5), nn.GELU(), linear()).double(), vectors().double()


@entry("a dict in and out", [("drop", "dropout", 0.3)])
def _():
    def forward(self, *, left, right):
        return {"size": 8, "logits": self.a(self.drop(left * right))}

    inputs = {"left": vectors(), "right": vectors()}
    return Model(forward, a=linear(), drop=nn.Dropout(0.3)), inputs, lambda answer: answer["logits"]


# ---- recurrent layers -------------------------------------------------------------------------------------------


@entry("LSTM", [("lstm", "lstm", 0.5)])
def _():
    lstm = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)
    return Model(lambda s, x: s.head(s.lstm(x)[0]), lstm=lstm, head=linear()), sequences()


@entry("LSTM, its states", [("", "lstm", 0.5)] * 2)
def _():
    lstm = nn.LSTM(8, 4, 3, dropout=0.5, bidirectional=True, batch_first=True)
    return lstm, sequences(), lambda answer: torch.cat(answer[1], -1).transpose(0, 1)


@entry("GRU both ways", [("gru", "gru", 0.4)] * 2)
def _():
    gru = nn.GRU(8, 4, 3, dropout=0.4, bidirectional=True, batch_first=True)
    return Model(lambda s, x: s.head(s.gru(x)[0]), gru=gru, head=linear()), sequences()


@entry("RNN, time first", [("rnn", "rnn_tanh", 0.5)])
def _():
    rnn = nn.RNN(8, 8, 2, dropout=0.5)
    return Model(lambda s, x: s.head(s.rnn(x)[0][-1]), rnn=rnn, head=linear()), sequences(5, 4)


@entry("RNN of ReLU", [("0", "rnn_relu", 0.5)])
def _():
    return nn.Sequential(nn.RNN(8, 8, 2, nonlinearity="relu", dropout=0.5, batch_first=True)), sequences(), first


@entry("packed LSTM", [("drop", "dropout", 0.2), ("lstm", "lstm", 0.5)])
def _():
    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.drop(x), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(output.sum(1))

    lstm = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)
    inputs = sequences(), torch.tensor([3, 5, 1, 4])
    return Model(forward, drop=nn.Dropout(0.2), lstm=lstm, head=linear()), inputs


@entry("packed GRU both ways", [("gru", "gru", 0.5)])
def _():
    def forward(self, x, lengths):
        packed = pack_padded_sequence(self.a(x), lengths, enforce_sorted=True)
        return self.head(self.gru(packed)[1].transpose(0, 1).flatten(1))

    gru = nn.GRU(8, 4, 2, dropout=0.5, bidirectional=True)
    return Model(forward, a=linear(), gru=gru, head=nn.Linear(16, 8)), (sequences(5, 4), torch.tensor([5, 4, 2, 2]))


@entry("a loop over cells", [("drop", "dropout", 0.3)] * 4)
def _():
    def forward(self, x):
        hidden = x.new_zeros(x.shape[0], 8)
        for step in x.transpose(0, 1):
            hidden = self.drop(self.cell(step, hidden))
        return hidden

    return Model(forward, cell=nn.GRUCell(8, 8), drop=nn.Dropout(0.3)), sequences(time=4)


# ---- attention --------------------------------------------------------------------------------------------------


@entry("MultiheadAttention", [("mha", "attention", 0.3)])
def _():
    mha = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    return Model(lambda s, x: s.mha(x, x, x)[0], mha=mha), sequences()


@entry("MultiheadAttention without weights", [("mha", "attention", 0.3)])
def _():
    def forward(self, x, memory, padding):
        return self.mha(x, memory, memory, key_padding_mask=padding, need_weights=False)[0].mean(0)

    mha = nn.MultiheadAttention(8, 2, dropout=0.3, kdim=6, vdim=4)
    mha.forward = _split_memory(mha.forward)
    return Model(forward, mha=mha), (sequences(5, 4), torch.randn(3, 4, 6), torch.arange(3) > torch.tensor([[2]] * 4))


def _split_memory(forward):
    return lambda query, key, value, **options: forward(query, key, value[..., :4], **options)


@entry(
    "TransformerEncoder with padding",
    [(f"layers.{i}{path}", kind, 0.2) for i in range(2) for path, kind in (
        (".self_attn", "attention"), (".dropout1", "dropout"), (".dropout", "dropout"), (".dropout2", "dropout"),
    )],
)  # fmt: skip
def _():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [2]])
    return model, {"src": sequences(), "src_key_padding_mask": padding}, lambda answer: answer[:, :2]


@entry(
    "TransformerEncoderLayer, norm first",
    [("self_attn", "attention", 0.2), ("dropout1", "dropout", 0.2), ("dropout", "dropout", 0.2),
     ("dropout2", "dropout", 0.2)],
)  # fmt: skip
def _():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, norm_first=True)
    return layer, sequences(5, 4), lambda answer: answer.transpose(0, 1)


@entry(
    "TransformerDecoderLayer",
    [("self_attn", "attention", 0.2), ("dropout1", "dropout", 0.2), ("multihead_attn", "attention", 0.2),
     ("dropout2", "dropout", 0.2), ("dropout", "dropout", 0.2), ("dropout3", "dropout", 0.2)],
)  # fmt: skip
def _():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    return layer, {"tgt": sequences(), "memory": sequences(4, 3), "tgt_mask": mask, "tgt_is_causal": True}


def heads(x, count=2):
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


def attend(**options):
    def forward(self, x, *masks):
        query, key, value = (heads(part(x), n) for part, n in ((self.q, 4), (self.k, self.kv), (self.v, self.kv)))
        rate = self.p if self.training else 0.0
        mask = {"attn_mask": masks[0]} if masks else {}
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, **mask, **options)
        return found.transpose(-3, -2).flatten(-2)

    kv = 2 if options.get("enable_gqa") else 4
    return Model(forward, p=0.3, kv=kv, q=linear(), k=linear(8, 2 * kv), v=linear(8, 2 * kv))


@entry("attention", [("", "attention", 0.3)])
def _():
    return attend(), sequences()


@entry("attention, causal, grouped", [("", "attention", 0.3)])
def _():
    return attend(is_causal=True, enable_gqa=True, scale=0.7), sequences(), lambda answer: answer[:, 1:]


@entry("attention, mask of bool", [("", "attention", 0.3)])
def _():
    mask = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    mask |= torch.eye(5, dtype=torch.bool)
    return attend(), (sequences(), mask)


@entry("attention, mask of numbers", [("", "attention", 0.3)])
def _():
    return attend(), (sequences(), torch.randn(5, 5).triu(1))


@entry("attention, dropped with matmul", [("drop", "dropout", 0.3)])
def _():
    def forward(self, x):
        query, key, value = heads(self.qkv(x)).chunk(3, -1)
        return (self.drop((query @ key.mT).softmax(-1)) @ value).transpose(1, 2).flatten(2)

    return Model(forward, qkv=nn.Linear(8, 24), drop=nn.Dropout(0.3)), sequences()


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


# ---- what a call must leave as it was ---------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def bits(tensor):
    """A tensor as bytes: NaN equals itself, 0 is not -0."""
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).clone().numpy().tobytes()


def rest(model, inputs=()):
    """All of a model, of its inputs and of the process that a call must leave as it was; compare with ==."""
    modules = dict(model.named_modules())
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return {
        "state_dict": {name: bits(value) for name, value in model.state_dict().items()},
        "ids": {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())},
        "grad": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "plain": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, tuple))}
            for name, module in modules.items()
        },
        "hooks": {name: [list(getattr(module, kind, ())) for kind in HOOKS] for name, module in modules.items()},
        "flat weights": {
            name: [id(weight) for weight in module._flat_weights]
            for name, module in modules.items()
            if isinstance(module, nn.RNNBase)
        },
        "inputs": [bits(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        "random": (bits(torch.get_rng_state()), random.getstate(), str(np.random.get_state())),
        "modes": (
            torch._C._len_torch_function_stack(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            sc.dropout.noise.SAMPLING.get(),
        ),
    }


@contextmanager
def untouched(entry):
    """A model of the zoo, its inputs and output; afterwards all must be as it was, and the model answer as before."""
    model, inputs, output = entry.build()
    torch.manual_seed(5)
    value = bits(answer(model, inputs, output))
    torch.manual_seed(5)
    before = rest(model, inputs)
    yield model, inputs, output
    after = rest(model, inputs)
    if entry.name == "noise in eval() too":  # of which each pass draws some
        del before["random"]
    for part, was in before.items():
        assert after[part] == was, part
    torch.manual_seed(5)
    assert bits(answer(model, inputs, output)) == value


def answer(model, inputs, output=None):
    """What a model gives; the inputs are copied first."""
    args, kwargs = fresh(inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors")  # of the fast path of TransformerEncoder
        found = model(*args, **kwargs)
    return found if output is None else output(found)


def fresh(inputs):
    """Positional and keyword arguments, copied."""
    inputs = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def loop(model, inputs, output, n, seed=0):
    """The plain way: n passes in `train()` with frozen normalisation; the model stays so."""
    plain = getattr(model, "_orig_mod", model)
    if "train" not in vars(plain):
        plain.train()
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()
    torch.manual_seed(seed)
    return torch.stack([answer(plain, inputs, output) for _ in range(n)])
