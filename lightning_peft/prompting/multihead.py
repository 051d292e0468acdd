"""Prefixes in torch's `nn.MultiheadAttention`, which with ``need_weights`` never calls a fused attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.prompting.prefix import PrefixedAttention


class MultiheadPrefix(PrefixedAttention):
    """`nn.MultiheadAttention` with a prefix. The same arguments and results; weights cover the caller's keys only."""

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
        """As `nn.MultiheadAttention`: batched or not, batch first or not, masks float or bool (True hides)."""
        base: Any = self
        if not self._adapter.active:
            rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self._base_forward(query, key, value, *rest)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        swap = batched and not base.batch_first
        states = [x.transpose(0, 1) if swap else x if batched else x.unsqueeze(0) for x in (query, key, value)]
        q, k, v = (_split(base, x) for x in _project(base, *states))
        if base.bias_k is not None:
            k = torch.cat([k, _split(base, base.bias_k).expand(len(k), -1, -1, -1)], dim=-2)
            v = torch.cat([v, _split(base, base.bias_v).expand(len(v), -1, -1, -1)], dim=-2)
        if base.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        k, v, n = self._put_prefix(k, v)
        mask = _hidden_to_scores(attn_mask, key_padding_mask, q, n, k.shape[-2])
        dropout = base.dropout if self.training else 0.0
        out, weights = _attend(q, k, v, mask, dropout, need_weights)
        out = base.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights[..., n:]
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out.transpose(0, 1) if swap else out if batched else out.squeeze(0), weights


def _split(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(batch, length, embed) -> (batch, heads, length, head)."""
    return x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _project(base: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    if base.in_proj_weight is None:
        weights = (base.q_proj_weight, base.k_proj_weight, base.v_proj_weight)
    else:
        weights = base.in_proj_weight.chunk(3)
    biases = (None,) * 3 if base.in_proj_bias is None else base.in_proj_bias.chunk(3)
    return (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))


def _hidden_to_scores(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, n: int, total: int) -> Tensor | None:
    """Both masks as one that is added to the scores (batch, heads or 1, queries or 1, total); None if none is given."""
    scores = None
    if attn_mask is not None:
        attn_mask = _added(attn_mask, q.dtype)
        scores = attn_mask.view(-1, q.shape[1], *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask
    if padding is not None:
        padding = _added(padding, q.dtype).view(-1, 1, 1, padding.shape[-1])
        scores = padding if scores is None else scores + padding
    return None if scores is None else F.pad(scores, (n, total - n - scores.shape[-1]))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf) if mask.dtype == torch.bool else mask


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights
