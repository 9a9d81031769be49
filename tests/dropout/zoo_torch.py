"""Models of torch: dropout functions and modules, recurrent layers, attention."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo_parts import Model, entry, first, linear, sequences, vectors

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
