"""Transformers, and attention in other shapes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from structure.architectures import architecture

TOKENS = 40


def tokens(batch=2, time=6):
    return (torch.randint(0, TOKENS, (batch, time)),)


def features(size=12, batch=2, time=6):
    return (torch.randn(batch, time, size),)


class Wrapped(nn.Module):
    """A body of blocks between a first and a last linear layer."""

    def __init__(self, width, *blocks):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(12, width), nn.Sequential(*blocks), nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.blocks(self.first(x)))


class Branch(nn.Module):
    """x + inner(norm(x))."""

    def __init__(self, width, inner, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.inner = norm(width), inner

    def forward(self, x):
        return x + self.inner(self.norm(x))


def feedforward(width, inner):
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


@architecture(least=0.7)
def encoder_layers(w):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.place = nn.Linear(12, 4 * w(8)), nn.Parameter(torch.randn(1, 6, 4 * w(8)))
            layer = nn.TransformerEncoderLayer(4 * w(8), 4, w(48), dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.last = nn.Linear(4 * w(8), 6)

        def forward(self, x):
            return self.last(self.body(self.first(x) + self.place).mean(1))

    return Encoder(), features()


@architecture(least=0.7)
def encoder_and_decoder(w):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(TOKENS, 4 * w(8))
            options = {"dim_feedforward": w(48), "dropout": 0.0, "batch_first": True}
            self.body = nn.Transformer(4 * w(8), 4, 1, 1, **options)
            self.last = nn.Linear(4 * w(8), TOKENS)

        def forward(self, source, target):
            return self.last(self.body(self.embed(source), self.embed(target)))

    return Both(), (*tokens(), *tokens(2, 4))


class SelfAttention(nn.Module):
    """Queries, keys and values from one linear layer; `order` says how its outputs are laid out."""

    def __init__(self, width, heads, size, order):
        super().__init__()
        self.heads, self.size, self.order = heads, size, order
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)

    def forward(self, x):
        batch, time, _ = x.shape
        if self.order == "three heads size":
            q, k, v = self.qkv(x).reshape(batch, time, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        elif self.order == "heads three size":
            q, k, v = self.qkv(x).view(batch, time, self.heads, 3 * self.size).transpose(1, 2).chunk(3, -1)
        else:  # heads size three
            q, k, v = self.qkv(x).view(batch, time, self.heads, self.size, 3).transpose(1, 2).unbind(-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


def fused(w, order):
    attention = Branch(w(32), SelfAttention(w(32), w(4), 8, order))
    return Wrapped(w(32), attention, Branch(w(32), feedforward(w(32), w(64)))), features()


@architecture
def fused_three_heads_size(w):
    return fused(w, "three heads size")


@architecture
def fused_heads_three_size(w):
    return fused(w, "heads three size")


@architecture
def fused_heads_size_three(w):
    return fused(w, "heads size three")


@architecture
def einsum_attention(w):
    class Einsum(nn.Module):
        def __init__(self):
            super().__init__()
            d, h, k = w(24), w(4), 6

            def weight(*shape):
                return nn.Parameter(torch.randn(shape) / math.sqrt(shape[0]))

            self.first, self.last = nn.Linear(12, d), nn.Linear(d, 4)
            self.q, self.k, self.v, self.o = weight(d, h, k), weight(d, h, k), weight(d, h, k), weight(h, k, d)
            self.up, self.down = weight(d, 2 * d), weight(2 * d, d)

        def forward(self, x):
            x = self.first(x)
            q, k, v = (torch.einsum("btd,dhk->bthk", x, p) for p in (self.q, self.k, self.v))
            share = torch.einsum("bthk,bshk->hbts", q, k).softmax(-1)
            x = x + torch.einsum("hbts,bshk,hkd->btd", share, v, self.o)
            return self.last(x + F.gelu(x @ self.up) @ self.down)

    return Einsum(), features()


class Root(nn.Module):
    """RMS norm by hand."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class Grouped(nn.Module):
    """Several heads of queries for each head of keys and values, with rotary positions."""

    def __init__(self, width, heads, groups, size, rotary=True):
        super().__init__()
        self.size, self.rotary = size, rotary
        self.q, self.k = nn.Linear(width, heads * size, bias=False), nn.Linear(width, groups * size, bias=False)
        self.v, self.o = nn.Linear(width, groups * size, bias=False), nn.Linear(heads * size, width, bias=False)

    def turned(self, x):
        if not self.rotary:
            return x
        half = self.size // 2
        angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)
        cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x):
        batch, time, _ = x.shape
        q, k, v = (p(x).view(batch, time, -1, self.size).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Swish(nn.Module):
    """A gated feedforward layer."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@architecture
def rotary_grouped_queries(w):
    attention = Branch(w(32), Grouped(w(32), 2 * w(4), w(4), 8), Root)
    return Wrapped(w(32), attention, Branch(w(32), Swish(w(32), w(48)), Root)), features()


@architecture(least=0.6, limit=1e-7)  # rows of the query are multiplied, and rounded, in single precision
def one_head_of_keys(w):
    attention = Branch(w(32), Grouped(w(32), w(4), 1, 8, rotary=False), Root)
    return Wrapped(w(32), attention, Branch(w(32), Swish(w(32), w(48)), Root)), features()


@architecture
def decoder_with_tied_embedding(w):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(TOKENS, w(32)), nn.Embedding(8, w(32))
            self.attention = Branch(w(32), Grouped(w(32), w(4), w(4), 8, rotary=False))
            self.further = Branch(w(32), feedforward(w(32), w(64)))
            self.out = nn.Linear(w(32), TOKENS, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            x = self.embed(x) + self.place(torch.arange(x.shape[1]))
            return self.out(self.further(self.attention(x)))

    return Decoder(), tokens()


@architecture
def channel_attention(w):
    """Channels attend to channels inside each head: the softmax runs over units."""

    class Channels(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, width)

        def forward(self, x):
            batch, time, _ = x.shape
            q, k, v = (p(x).view(batch, time, self.heads, -1).permute(0, 2, 3, 1) for p in (self.q, self.k, self.v))
            share = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
            return self.out((share @ v).permute(0, 3, 1, 2).reshape(batch, time, -1))

    return Wrapped(w(32), Branch(w(32), Channels(w(32), w(4)))), features()


class Windows(nn.Module):
    """Attention inside windows of 2 x 2 that may be shifted, with a bias for each relative place and head."""

    def __init__(self, width, heads, shift):
        super().__init__()
        self.heads, self.shift = heads, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(9, heads))
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1])

    def forward(self, x):
        batch, high, wide, width = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(batch, high // 2, 2, wide // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        qkv = self.qkv(x).reshape(-1, 4, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = self.bias[self.index.flatten()].view(4, 4, -1).permute(2, 0, 1)
        share = (q @ k.transpose(-2, -1) / 3 + bias.unsqueeze(0)).softmax(-1)
        x = self.out((share @ v).transpose(1, 2).reshape(-1, 4, width))
        x = x.view(batch, high // 2, wide // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(batch, high, wide, width)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


@architecture
def shifted_windows(w):
    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, w(16), 2, 2)
            self.near, self.far = Branch(w(16), Windows(w(16), w(2), 0)), Branch(w(16), Windows(w(16), w(2), 1))
            self.norm, self.merge = nn.LayerNorm(4 * w(16)), nn.Linear(4 * w(16), w(32), bias=False)
            self.last = Branch(w(32), Windows(w(32), w(4), 0))
            self.out = nn.Linear(w(32), 10)

        def forward(self, x):
            x = self.far(self.near(self.patches(x).permute(0, 2, 3, 1)))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            return self.out(self.last(self.merge(self.norm(x))).mean((1, 2)))

    return Swin(), (torch.randn(2, 3, 16, 16),)


@architecture
def vision_transformer(w):
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.first = nn.Conv2d(3, w(32), 4, 4), nn.Parameter(torch.randn(1, 1, w(32)))
            self.place = nn.Parameter(torch.randn(1, 10, w(32)))
            attention = Branch(w(32), SelfAttention(w(32), w(4), 8, "three heads size"))
            self.body = nn.Sequential(attention, Branch(w(32), feedforward(w(32), w(64))), nn.LayerNorm(w(32)))
            self.out = nn.Linear(w(32), 10)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.place
            return self.out(self.body(x)[:, 0])

    return Vision(), (torch.randn(2, 3, 12, 12),)


@architecture
def cross_attention(w):
    """Latent queries read a sequence of another width."""

    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents, self.first = nn.Parameter(torch.randn(3, w(32))), nn.Linear(12, w(24))
            self.q, self.kv, self.o = (
                nn.Linear(w(32), w(4) * 8),
                nn.Linear(w(24), 2 * w(4) * 8),
                nn.Linear(w(4) * 8, w(32)),
            )
            self.out = nn.Linear(w(32), 4)

        def forward(self, x):
            latents = self.latents.unsqueeze(0).expand(len(x), -1, -1)
            k, v = self.kv(self.first(x)).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (self.q(latents), k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(latents + self.o(y))

    return Latents(), features()


@architecture
def listed_experts(w):
    class Experts(nn.Module):
        """Each token goes to the two experts that a linear layer prefers."""

        def __init__(self, width, inner):
            super().__init__()
            self.gate, self.experts = nn.Linear(width, 3), nn.ModuleList(Swish(width, inner) for _ in range(3))

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            share, chosen = self.gate(flat).softmax(-1).topk(2, -1)
            y = torch.zeros_like(flat)
            for i, expert in enumerate(self.experts):
                row, rank = (chosen == i).nonzero(as_tuple=True)
                y.index_add_(0, row, expert(flat[row]) * share[row, rank, None])
            return y.view(x.shape)

    return Wrapped(w(24), Branch(w(24), Experts(w(24), w(32)))), features()


@architecture
def fused_experts(w):
    class Experts(nn.Module):
        """All experts are two tensors [experts, in, out]; each token is weighed over all of them."""

        def __init__(self, width, inner):
            super().__init__()
            self.gate = nn.Linear(width, 3)
            self.up = nn.Parameter(torch.randn(3, width, 2 * inner) / width**0.5)
            self.down = nn.Parameter(torch.randn(3, inner, width) / inner**0.5)

        def forward(self, x):
            flat = x.reshape(-1, x.shape[-1])
            gate, up = torch.bmm(flat.expand(3, *flat.shape), self.up).chunk(2, -1)
            y = torch.bmm(F.silu(gate) * up, self.down)
            return (y * self.gate(flat).softmax(-1).t().unsqueeze(-1)).sum(0).view(x.shape)

    return Wrapped(w(24), Branch(w(24), Experts(w(24), w(32)))), features()


class Talking(nn.Module):
    """Scores of all heads are mixed before and after the softmax."""

    def __init__(self, width, heads, size):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out = nn.Linear(width, 3 * heads * size), nn.Linear(heads * size, width)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x):
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        share = self.before((q @ k.transpose(-2, -1) / 3).permute(0, 2, 3, 1)).softmax(-2)
        y = self.after(share).permute(0, 3, 1, 2) @ v
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


@architecture
def talking_heads(w):
    attention = Branch(w(32), Talking(w(32), w(4), 8))
    return Wrapped(w(32), attention, Branch(w(32), feedforward(w(32), w(64)))), features()


@architecture(least=0.6)
def one_head_then_two(w):
    """Two stages of one class: the first has a single head, which stays, the second has two."""
    near, far = (Branch(w(16) * n, SelfAttention(w(16) * n, n, w(16), "three heads size")) for n in (1, 2))
    return Wrapped(w(16), near, nn.Linear(w(16), 2 * w(16)), far, nn.Linear(2 * w(16), w(16))), features()


@architecture
def linear_attention(w):
    class Linear(nn.Module):
        """Katharopoulos et al. 2020: keys meet values first, so [heads, size] meets [heads, size]."""

        def __init__(self):
            super().__init__()
            self.heads = w(4)
            self.up, self.qkv, self.proj = nn.Linear(12, w(16)), nn.Linear(w(16), 3 * w(16)), nn.Linear(w(16), 5)

        def forward(self, x):
            x = self.up(x)
            b, n, d = x.shape
            q, k, v = (t.reshape(b, n, self.heads, d // self.heads) for t in self.qkv(x).chunk(3, -1))
            q, k = F.elu(q) + 1, F.elu(k) + 1
            z = 1 / torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
            y = torch.einsum("bnhd,bhde,bnh->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v), z)
            return self.proj(y.reshape(b, n, d))

    return Linear(), features()


@architecture
def heads_beside_the_batch(w):
    class Merged(nn.Module):
        """FT-Transformer, Gorishniy et al. 2021: [batch * heads, features, size]."""

        def __init__(self):
            super().__init__()
            self.heads, self.scale = w(4), nn.Parameter(torch.randn(5, w(16)))
            self.first = nn.Parameter(torch.randn(w(16)))
            self.q, self.k, self.v, self.o = (nn.Linear(w(16), w(16)) for _ in range(4))
            self.norm, self.out = nn.LayerNorm(w(16)), nn.Linear(w(16), 2)

        def forward(self, x):
            x = torch.cat([self.first.expand(len(x), 1, -1), self.scale * x[:, :, None]], 1)
            y = self.norm(x)
            b, n, _ = y.shape
            q, k, v = self.q(y), self.k(y), self.v(y)
            size = q.shape[-1] // self.heads
            q, k, v = (
                t.reshape(b, n, self.heads, size).transpose(1, 2).reshape(b * self.heads, n, size) for t in (q, k, v)
            )
            a = F.softmax(q @ k.transpose(1, 2) / size**0.5, -1) @ v
            a = a.reshape(b, self.heads, n, size).transpose(1, 2).reshape(b, n, self.heads * size)
            return self.out((x + self.o(a))[:, 0])

    return Merged(), (torch.randn(3, 5),)
