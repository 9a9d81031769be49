"""Sparse projections of MultiheadAttention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.runtime import operators as operators  # registers torch.ops.secateur
from secateur.runtime import products
from secateur.runtime.swapping import Sparse, sparse, worth_packing

__all__: list[str] = []  # reached through secateur.accelerate alone

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@sparse
class SparseMultiheadAttention(Sparse, nn.MultiheadAttention):
    """An nn.MultiheadAttention whose projections have packed weights."""

    plain = nn.MultiheadAttention
    _apart: bool
    """Whether query, key and value may be different tensors; if not, one product projects all three."""

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn are not supported"
        return ""

    def prepare(self, place: str) -> None:
        super().prepare(place)
        self._apart = not self._qkv_same_embed_dim

    def observe(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
        self._apart |= not (query is key and key is value)

    def matrices(self) -> Iterator[tuple[str, Tensor, int]]:
        weights = {"in": self.in_proj_weight} if not self._apart else dict(zip("qkv", self._parts(), strict=True))
        for name, weight in (*weights.items(), ("out", self.out_proj.weight)):
            if worth_packing(weight):
                yield name, weight, 1

    def sources(self) -> dict[str, Tensor | None]:
        return {**self._parameters, "out": self.out_proj._parameters.get("weight")}

    def watched(self) -> tuple[str, ...]:
        return ("out", "in_proj_weight") if self._qkv_same_embed_dim else ("out", *_SEPARATE)

    def rows(self, query: Tensor, *_: Any, **__: Any) -> int:
        return query.numel() // int(self.embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention."""
        if not self._takes(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batch_dim = 0 if self.batch_first else 1
        single = query.dim() == 2
        q, k, v = self._project(query, key, value)
        if single:
            q, k, v = (part.unsqueeze(batch_dim) for part in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (self._by_head(part) for part in (q, k, v))  # [batch, heads, length, width of a head]
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merge(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            weights = q * math.sqrt(1 / q.shape[-1]) @ k.transpose(-2, -1)
            weights = torch.softmax(weights if mask is None else weights + mask, -1)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        out = out.permute((0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)).flatten(2)
        out = self._product("out", out, self.out_proj.weight, self.out_proj.bias)
        if single:
            return out.squeeze(batch_dim), None if weights is None else weights[0]
        return out, weights

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the sparse kernels take this call; arguments that are wrong are left to the plain class."""
        same = query is key and key is value
        if torch.compiler.is_compiling():
            usable = all(self._traceable(x) for x in (query, key, value))
        else:
            usable = self._ready(*((query,) if same else (query, key, value)))
            if torch.is_grad_enabled() and (bias := self.out_proj.bias) is not None and bias.requires_grad:
                raise self._no_gradient()
            usable = usable and bool(self._choices >> products.bucket(self.rows(query)) & 1)
        if not usable or query.is_nested or (self.training and self.dropout) or not (same or self._apart):
            return False
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        length, batch = self._sizes(query)
        source, batches = self._sizes(key)
        if self._sizes(value) != (source, batches) or batches != batch or (is_causal and attn_mask is None):
            return False
        padding = (source,) if query.dim() == 2 else (batch, source)
        return _is_mask(key_padding_mask, padding) and (
            _is_mask(attn_mask, (length, source)) or _is_mask(attn_mask, (batch * self.num_heads, length, source))
        )

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Length and batch."""
        if x.dim() == 2:
            return x.shape[0], 1
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def _parts(self) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if not self._apart:
            return self._product("in", query, self.in_proj_weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = zip("qkv", (query, key, value), self._parts(), biases, strict=True)
        return tuple(self._product(*one) for one in given)

    def _product(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packed = self._buffers.get(f"packed_{name}")
        if packed is None:
            return F.linear(x, weight, bias)
        if torch.compiler.is_compiling():
            found: Tensor = torch.ops.secateur.linear(x, weight, packed, bias, self._choices)
            return found
        return products.linear(x, weight, packed, bias, self._choices, self._codes.get(name))

    def _by_head(self, x: Tensor) -> Tensor:
        x = torch.unflatten(x, -1, (self.num_heads, -1))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _extras(self) -> tuple[str, ...]:
        return ("_apart",)


def _is_mask(mask: Tensor | None, shape: tuple[int, ...]) -> bool:
    return mask is None or (tuple(mask.shape) == shape and (mask.dtype is torch.bool or mask.is_floating_point()))


def _merge(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one to be added to the scores, [batch or 1, heads or 1, length or 1, source]."""
    parts = []
    if attn_mask is not None:
        parts.append(attn_mask[None, None] if attn_mask.dim() == 2 else torch.unflatten(attn_mask, 0, q.shape[:2]))
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None])
    added = [
        torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -math.inf)
        if part.dtype is torch.bool
        else part.to(q.dtype)
        for part in parts
    ]
    return sum(added[1:], added[0]) if added else None
