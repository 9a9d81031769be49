"""Composite functions, written in the simpler ones: attention and recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.structure.calls import tensors
from secateur.structure.capture import Site, rule


def _composed(site: Site, made: Any) -> None:
    """Give the results the labels of what a composite made of simpler functions."""
    for t, g in zip(tensors(site.out), tensors(made), strict=False):
        site.capture.same(t, g)


@rule("glu")
def glu(site: Site) -> None:
    """Half of the units gate the other half."""
    with site.capture.inside():
        a, b = site.operand.chunk(2, site.argument(1, "dim", -1))
        made = a * b.sigmoid()
    _composed(site, made)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-2, -1)
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@rule("scaled_dot_product_attention")
def attention(site: Site) -> None:
    """softmax(q k) v, in matrix products."""
    q, k, v = (site.argument(i, name) for i, name in enumerate(("query", "key", "value")))
    site.capture.now.rooted = site.argument(6, "scale") is None
    with site.capture.inside():
        if site.argument(7, "enable_gqa", False):
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        made = _attend(q, k, v, site.argument(3, "attn_mask"))
    _composed(site, made)


_MULTI_HEAD = """query key value embed_dim heads weight bias bias_k bias_v add_zero_attn dropout_p out_weight
out_bias"""


@rule("multi_head_attention_forward")
def multi_head(site: Site) -> None:
    """Projections of query, key and value, attention of each head, and a projection."""
    query, key, value, _, heads, w, b, bias_k, _, _, _, w_out, b_out = (
        site.argument(i, name) for i, name in enumerate(_MULTI_HEAD.split())
    )
    if bias_k is not None or site.argument(18, "static_k") is not None:
        raise ValueError("bias_k and static_k are not written in simpler functions")
    separate = site.argument(14, "use_separate_proj_weight", False)
    site.capture.now.rooted = True
    names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
    with site.capture.inside():
        ws = [site.argument(15 + i, name) for i, name in enumerate(names)] if separate else w.chunk(3)
        bs = b.chunk(3) if b is not None else (None,) * 3
        parts = (F.linear(*one) for one in zip((query, key, value), ws, bs, strict=True))
        q, k, v = (t.reshape(*t.shape[:-1], heads, -1).transpose(0, -2) for t in parts)  # [heads, batch, time, size]
        made = F.linear(_attend(q, k, v).transpose(0, -2).flatten(-2), w_out, b_out)
    _composed(site, made)
    inner, outer = (
        [f for f in fields if f.shape[-1] > 1] for fields in (site.capture.fields(w_out), site.of(query)[1])
    )
    if inner and w_out.shape[1] == query.shape[-1]:  # the module takes one from the other
        if not outer:
            site.capture.hold(inner[0])
            return
        site.capture.balance(torch.stack([inner[0].flatten(), outer[0].flatten()[: query.shape[-1]]]))


Step = Callable[[Tensor, Sequence[Tensor], Sequence[Any], Sequence[Tensor]], tuple[Tensor, ...]]
"""(input, weights, biases, states) to new states, of which the first is the output."""


def _lstm(x: Tensor, w: Sequence[Tensor], b: Sequence[Any], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    h, c = state
    i, f, g, o = (F.linear(x, w[0], b[0]) + F.linear(h, w[1], b[1])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (F.linear(h, w[2]) if len(w) > 2 else h), c


def _gru(x: Tensor, w: Sequence[Tensor], b: Sequence[Any], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (h,) = state
    r, z, n = F.linear(x, w[0], b[0]).chunk(3, -1)
    s, y, m = F.linear(h, w[1], b[1]).chunk(3, -1)
    z = (z + y).sigmoid()
    return ((1 - z) * (n + (r + s).sigmoid() * m).tanh() + z * h,)


def _rnn(x: Tensor, w: Sequence[Tensor], b: Sequence[Any], state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return ((F.linear(x, w[0], b[0]) + F.linear(state[0], w[1], b[1])).tanh(),)


_STEPS: dict[str, Step] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn, "rnn_relu": _rnn}


@rule("lstm gru rnn_tanh rnn_relu")
def recurrent(site: Site) -> None:
    """Two steps of each layer, over all times at once: the second unites what recurrence unites."""
    cap, step = site.capture, _STEPS[site.name]
    packed = isinstance(site.args[1], Tensor) and not isinstance(site.args[3], bool)
    x, hx, flat, biased, layers, _, _, two_way = site.args[0:1] + site.args[2:9] if packed else site.args[:8]
    hx = (hx,) if isinstance(hx, Tensor) else hx
    ways, per = 1 + two_way, len(flat) // (layers * (1 + two_way))
    last: list[list[Tensor]] = []
    with cap.inside():
        states = [h if h.ndim == 3 else h.unsqueeze(1) for h in hx]
        for layer in range(layers):
            outs: list[Tensor] = []
            for at in range(layer * ways, (layer + 1) * ways):
                p = flat[at * per : (at + 1) * per]
                w, b = ([p[0], p[1], *p[4:]], p[2:4]) if biased else (p, (None, None))
                first = [h[at][:1].expand(*[1] * (x.ndim - 2), 1, -1) for h in states]
                state = cap.settle(partial(step, x, w, b), first)
                outs.append(state[0])
                last.append([s.flatten(0, -2)[:1] for s in state])
            x = torch.cat(outs, -1) if two_way else outs[0]
        made = (x, *[torch.stack([s[k] for s in last]) for k in range(len(states))])
    _composed(site, made)
    for t in made[1:]:  # all layers and directions have the same hidden size
        for f in cap.fields(t):
            cap.balance(f.expand(t.shape)[:, 0])


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(site: Site) -> None:
    """One step: a loop in Python unites what recurrence unites."""
    step = _STEPS[site.name.removesuffix("_cell")]
    x, h, *weights = (site.argument(i, n) for i, n in enumerate(["input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"]))
    states = (h,) if isinstance(h, Tensor) else tuple(h)
    with site.capture.inside():
        made = step(x, weights[:2], weights[2:], states)
    _composed(site, made)
