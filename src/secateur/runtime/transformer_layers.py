"""Transformer layers around sparse ones: they call their layers, and their feed-forward block is one native call.

In evaluation torch runs an `nn.TransformerEncoderLayer` as one fused operator that reads the dense weights of
its layers. The classes here never use this operator; else they compute what torch's do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.runtime.chains import Fused, Span, SparseSequential, Step
from secateur.runtime.swapping import Swapped

__all__: list[str] = []  # reached through secateur.accelerate alone


class _FeedForward(Fused):
    """What both layers share: Linear, activation, Dropout and Linear are a run."""

    @classmethod
    def takes(cls, kind: type[nn.Module]) -> bool:
        plain: Any = cls.plain
        return issubclass(kind, plain) and getattr(kind, "_ff_block", None) is plain._ff_block

    @classmethod
    def place(cls, module: Any, span: Span) -> str:
        return "linear1:linear2"

    @staticmethod
    def sequence(module: Any) -> list[Step]:
        return [module.linear1, module.activation, module.dropout, module.linear2]

    def _as_one(self) -> bool:
        return bool(self._fused) and not torch.compiler.is_compiling()


class SparseTransformerEncoderLayer(_FeedForward, nn.TransformerEncoderLayer):
    """An nn.TransformerEncoderLayer that always calls its layers."""

    plain = nn.TransformerEncoderLayer

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """0: what torch's forward takes for "no fused operator"."""
        return 0

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self._through(x)) if self._as_one() else super()._ff_block(x)


class SparseTransformerDecoderLayer(_FeedForward, nn.TransformerDecoderLayer):
    """An nn.TransformerDecoderLayer whose feed-forward block is a run."""

    plain = nn.TransformerDecoderLayer

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self._through(x)) if self._as_one() else super()._ff_block(x)


class SparseTransformerEncoder(Swapped, nn.TransformerEncoder):
    """An nn.TransformerEncoder that makes no nested tensors, which only the fused operator takes.

    The plain one leaves zeros in the padding when it makes them, and so does this one.
    """

    plain = nn.TransformerEncoder

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        """False: the layers get padded tensors."""
        return False

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder."""
        out = super().forward(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not self._would_nest(src, mask, src_key_padding_mask):
            return out
        padded = src_key_padding_mask if src_key_padding_mask.dtype is torch.bool else src_key_padding_mask != 0
        zero = out.new_zeros(out.shape[-1])
        return torch.where(padded[..., None], zero if self.norm is None else self.norm(zero), out)

    def _would_nest(self, src: Tensor, mask: Tensor | None, padding: Tensor) -> bool:
        """Whether the plain class would have run on nested tensors."""
        if not self.__dict__.get("use_nested_tensor") or not torch.backends.mha.get_fastpath_enabled():
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled() or torch.is_grad_enabled():
            return False
        if self.layers[0].training or src.dim() != 3 or mask is not None or src.is_nested:
            return False
        kept = padding.logical_not() if padding.dtype is torch.bool else padding == 0
        return not self.mask_check or bool(torch._nested_tensor_from_mask_left_aligned(src, kept))


AROUND: tuple[type[Swapped], ...] = (SparseTransformerEncoderLayer, SparseTransformerEncoder)
"""What layers that contain sparse ones become."""

FUSED: tuple[type[Fused], ...] = (SparseSequential, SparseTransformerEncoderLayer, SparseTransformerDecoderLayer)
"""What layers that contain runs become."""
