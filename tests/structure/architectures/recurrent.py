"""Recurrent networks: torch's own, their cells in loops, and what stands around them."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from structure.architectures import architecture

TOKENS = 40


def tokens(batch=3, time=6):
    return (torch.randint(0, TOKENS, (batch, time)),)


class Tagger(nn.Module):
    """Embedding, a recurrent layer, a linear one at each time or at the last."""

    def __init__(self, kind, embedded, hidden, last=False, **options):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, embedded)
        self.rnn = getattr(nn, kind)(embedded, hidden, batch_first=True, **options)
        ways = 2 if options.get("bidirectional") else 1
        self.out = nn.Linear((options.get("proj_size") or hidden) * ways, 4)
        self.last = last

    def forward(self, x):
        y = self.rnn(self.embed(x))[0]
        return self.out(y[:, -1] if self.last else y)


class FinalState(nn.Module):
    """Classifies the last hidden state of each direction."""

    def __init__(self, kind, hidden, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(5, hidden, batch_first=True, **options)
        self.ways = 2 if options.get("bidirectional") else 1
        self.out = nn.Linear(hidden * self.ways, 4)

    def forward(self, x):
        state = self.rnn(x)[1]
        h = state[0] if isinstance(state, tuple) else state
        return self.out(torch.cat(list(h[-self.ways :]), -1))


def series(batch=3, time=6, size=5):
    return (torch.randn(batch, time, size),)


@architecture
def lstm_last_step(w):
    return Tagger("LSTM", w(16), w(24), last=True), tokens()


@architecture
def lstm_final_state(w):
    return FinalState("LSTM", w(24)), series()


@architecture
def lstm_two_ways_two_layers(w):
    return Tagger("LSTM", w(12), w(16), num_layers=2, bidirectional=True), tokens()


@architecture
def lstm_projected(w):
    return Tagger("LSTM", w(12), w(24), num_layers=2, proj_size=w(8)), tokens()


@architecture
def gru_final_state_two_ways(w):
    return FinalState("GRU", w(16), num_layers=2, bidirectional=True), series()


@architecture
def gru_without_bias(w):
    return Tagger("GRU", w(12), w(24), bias=False), tokens()


@architecture
def rnn_tanh(w):
    return Tagger("RNN", w(12), w(24), num_layers=2), tokens()


@architecture
def rnn_relu(w):
    return FinalState("RNN", w(24), nonlinearity="relu"), series()


@architecture
def lstm_cell_state(w):
    class CellState(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(5, w(24)), nn.Linear(w(24), 4)

        def forward(self, x):
            return self.out(self.rnn(x.transpose(0, 1))[1][1][0])

    return CellState(), series()


@architecture
def lstm_learned_initial_state(w):
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.Parameter(torch.randn(2, 1, w(16)))
            self.c = nn.Parameter(torch.randn(2, 1, w(16)))
            self.rnn = nn.LSTM(5, w(16), num_layers=2, batch_first=True)
            self.out = nn.Linear(w(16), 4)

        def forward(self, x):
            start = [t.expand(-1, len(x), -1).contiguous() for t in (self.h, self.c)]
            return self.out(self.rnn(x, tuple(start))[0])

    return Learned(), series()


@architecture
def gru_zero_initial_state(w):
    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = w(24)
            self.rnn, self.out = nn.GRU(5, w(24), batch_first=True), nn.Linear(w(24), 4)

        def forward(self, x):
            return self.out(self.rnn(x, torch.zeros(1, len(x), self.hidden, dtype=x.dtype))[0])

    return Zeros(), series()


@architecture
def lstm_packed(w):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(TOKENS, w(12))
            self.rnn = nn.LSTM(w(12), w(16), batch_first=True, bidirectional=True)
            self.out = nn.Linear(2 * w(16), 4)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
            return self.out(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    return Packed(), (*tokens(), torch.tensor([4, 6, 3]))


@architecture
def lstm_cell_loop(w):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = w(24)
            self.cell, self.out = nn.LSTMCell(5, w(24)), nn.Linear(w(24), 4)

        def forward(self, x):
            h = c = x.new_zeros(len(x), self.hidden)
            for step in x.unbind(1):
                h, c = self.cell(step, (h, c))
            return self.out(h)

    return Loop(), series()


@architecture
def gru_cell_loop(w):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.cell, self.out = nn.Linear(5, w(16)), nn.GRUCell(w(16), w(24)), nn.Linear(w(24), 4)

        def forward(self, x):
            h, states = torch.zeros(len(x), self.cell.hidden_size, dtype=x.dtype), []
            for t in range(x.shape[1]):
                h = self.cell(F.relu(self.inside(x[:, t])), h)
                states.append(h)
            return self.out(torch.stack(states, 1))

    return Loop(), series()


@architecture
def handwritten_gates(w):
    """A minimal gated unit: two linear layers read the input and the state, concatenated."""

    class Minimal(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = w(24)
            self.forget, self.new = nn.Linear(5 + w(24), w(24)), nn.Linear(5 + w(24), w(24))
            self.out = nn.Linear(w(24), 4)

        def forward(self, x):
            h = torch.zeros(len(x), self.hidden, dtype=x.dtype)
            for step in x.unbind(1):
                f = torch.sigmoid(self.forget(torch.cat([step, h], -1)))
                h = (1 - f) * h + f * torch.tanh(self.new(torch.cat([step, f * h], -1)))
            return self.out(h)

    return Minimal(), series()


@architecture
def encoder_decoder_with_attention(w):
    class Translate(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.target = nn.Embedding(TOKENS, w(12)), nn.Embedding(TOKENS, w(12))
            self.encoder = nn.GRU(w(12), w(16), batch_first=True)
            self.decoder = nn.GRU(w(12), w(16), batch_first=True)
            self.query = nn.Linear(w(16), w(16), bias=False)
            self.mix, self.out = nn.Linear(2 * w(16), w(16)), nn.Linear(w(16), TOKENS)

        def forward(self, source, target):
            memory, state = self.encoder(self.source(source))
            y, _ = self.decoder(self.target(target), state)
            weights = (self.query(y) @ memory.transpose(1, 2)).softmax(-1)
            return self.out(torch.tanh(self.mix(torch.cat([y, weights @ memory], -1))))

    return Translate(), (*tokens(), *tokens(3, 4))


@architecture
def additive_attention_decoder(w):
    """A decoder cell that looks back with an additive score at each step."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.LSTM(5, w(12), batch_first=True, bidirectional=True)
            self.start, self.cell = nn.Linear(2 * w(12), w(16)), nn.GRUCell(2 * w(12), w(16))
            self.key, self.query = nn.Linear(2 * w(12), w(16)), nn.Linear(w(16), w(16))
            self.score, self.out = nn.Linear(w(16), 1, bias=False), nn.Linear(w(16), 4)

        def forward(self, x):
            memory = self.encoder(x)[0]
            keys, h, outs = self.key(memory), torch.tanh(self.start(memory.mean(1))), []
            for _ in range(3):
                score = self.score(torch.tanh(keys + self.query(h).unsqueeze(1))).squeeze(-1)
                context = torch.bmm(score.softmax(-1).unsqueeze(1), memory).squeeze(1)
                h = self.cell(context, h)
                outs.append(self.out(h))
            return torch.stack(outs, 1)

    return Decoder(), series()


@architecture
def convolutional_lstm(w):
    class ConvLSTM(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = w(12)
            self.gates = nn.Conv2d(2 + w(12), 4 * w(12), 3, padding=1)
            self.out = nn.Conv2d(w(12), 2, 1)

        def forward(self, x):
            h = c = x.new_zeros(len(x), self.hidden, *x.shape[-2:])
            for frame in x.unbind(1):
                i, f, o, g = torch.split(self.gates(torch.cat([frame, h], 1)), self.hidden, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            return self.out(h)

    return ConvLSTM(), (torch.randn(2, 3, 2, 5, 5),)


@architecture
def cnn_then_lstm(w):
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv1d(6, w(16), 3, padding=1), nn.BatchNorm1d(w(16)), nn.ReLU())
            self.rnn, self.norm = nn.LSTM(w(16), w(24), batch_first=True), nn.LayerNorm(w(24))
            self.out = nn.Linear(w(24), 5)

        def forward(self, x):
            return self.out(self.norm(self.rnn(self.conv(x).permute(0, 2, 1))[0])[:, -1])

    return Speech(), (torch.randn(2, 6, 12),)


@architecture
def stacked_lstms_with_residuals(w):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, w(16))
            self.layers = nn.ModuleList(nn.LSTM(w(16), w(16), batch_first=True) for _ in range(3))
            self.norms = nn.ModuleList(nn.LayerNorm(w(16)) for _ in range(3))
            self.out = nn.Linear(w(16), 4)

        def forward(self, x):
            x = self.first(x)
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = norm(x + layer(x)[0])
            return self.out(x)

    return Stacked(), series()


@architecture
def language_model_with_tied_embedding(w):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(TOKENS, w(16))
            self.rnn = nn.LSTM(w(16), w(24), num_layers=2, batch_first=True)
            self.back = nn.Linear(w(24), w(16))
            self.out = nn.Linear(w(16), TOKENS, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.back(self.rnn(self.embed(x))[0]))

    return Language(), tokens()


@architecture
def character_words(w):
    """Words made of characters: a recurrent layer inside the input of another."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.letters = nn.Embedding(20, w(8))
            self.inner = nn.GRU(w(8), w(12), batch_first=True, bidirectional=True)
            self.outer = nn.LSTM(2 * w(12), w(16), batch_first=True)
            self.out = nn.Linear(w(16), 4)

        def forward(self, x):
            batch, time, size = x.shape
            h = self.inner(self.letters(x.reshape(batch * time, size)))[1]
            words = h.transpose(0, 1).reshape(batch, time, -1)
            return self.out(self.outer(words)[0])

    return Words(), (torch.randint(0, 20, (2, 4, 5)),)
