"""Prefixes in torch's `nn.MultiheadAttention`, which with ``need_weights`` never calls a fused attention.

The module offers no place where its keys and values could be changed on their way, so its forward is written out here
once more. `CalledAttention` would serve only where the caller asks for no weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return self._base_forward(query, key, value, *options)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        # Everything below is batched, with the batch first.
        is_batched = query.dim() == 3
        length_first = is_batched and not base.batch_first
        if length_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        elif not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)

        queries, keys, values = _project(base, query, key, value)
        if base.bias_k is not None:  # a learned row behind the caller's keys
            batch_size = len(keys)
            keys = torch.cat([keys, _split_heads(base, base.bias_k).expand(batch_size, -1, -1, -1)], dim=-2)
            values = torch.cat([values, _split_heads(base, base.bias_v).expand(batch_size, -1, -1, -1)], dim=-2)
        if base.add_zero_attn:  # and one of zeros
            keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        keys, values, prefix_length = self._put_prefix(keys, values)

        mask = _scores_mask(attn_mask, key_padding_mask, queries)
        if mask is not None:
            # Masks say nothing about the prefix in front and the two rows behind: these are seen by all.
            behind = keys.shape[-2] - prefix_length - mask.shape[-1]
            mask = F.pad(mask, (prefix_length, behind))
        dropout = base.dropout if self.training else 0.0
        attended, weights = _attend(queries, keys, values, mask, dropout, need_weights)
        output = base.out_proj(attended.transpose(1, 2).flatten(2))

        # The caller's keys only, in the caller's form.
        if weights is not None:
            weights = weights[..., prefix_length:]
            if average_attn_weights:
                weights = weights.mean(dim=1)
            if not is_batched:
                weights = weights.squeeze(0)
        if length_first:
            output = output.transpose(0, 1)
        elif not is_batched:
            output = output.squeeze(0)
        return output, weights


def _split_heads(attention: Any, states: Tensor) -> Tensor:
    """(batch, length, embed) -> (batch, heads, length, head)."""
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _project(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads: (batch, length, features) -> (batch, heads, length, head) each."""
    if attention.in_proj_weight is None:  # keys or values have a width of their own
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)
    biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    queries = F.linear(query, weights[0], biases[0])
    keys = F.linear(key, weights[1], biases[1])
    values = F.linear(value, weights[2], biases[2])
    return _split_heads(attention, queries), _split_heads(attention, keys), _split_heads(attention, values)


def _scores_mask(attn_mask: Tensor | None, padding_mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores, (batch or 1, heads or 1, queries or 1, keys); None without any.

    Args:
        attn_mask: (queries, keys), or one for each head (batch · heads, queries, keys).
        padding_mask: (batch, keys).
        queries: (batch, heads, queries, head), for shapes and dtype.
    """
    # Both are added up, so that what either hides stays hidden.
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, queries.dtype)
        if mask.dim() == 3:
            mask = mask.view(-1, queries.shape[1], *mask.shape[1:])
    if padding_mask is not None:
        padding = _additive(padding_mask, queries.dtype).view(-1, 1, 1, padding_mask.shape[-1])
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: minus infinity where a bool mask says True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads: states (batch, heads, queries, head), and weights (batch, heads, queries, keys)."""
    # The fused function is faster and gives no weights.
    if not need_weights:
        return F.scaled_dot_product_attention(queries, keys, values, mask, dropout), None
    scores = queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ values, weights
