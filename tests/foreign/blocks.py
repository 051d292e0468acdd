"""Transformer blocks as timm, torchvision, open_clip and x-transformers write them, with the names that they give."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS = 16, 2


class TimmAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))


class TimmMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, 24), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(24, WIDTH), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.7))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """timm's vision transformer."""

    def __init__(self, scale: bool = True) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), TimmAttention()
        self.ls1, self.drop_path1 = LayerScale() if scale else nn.Identity(), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), TimmMlp()
        self.ls2, self.drop_path2 = LayerScale() if scale else nn.Identity(), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class EvaBlock(nn.Module):
    """timm's EVA: the scale of a sub-layer is a parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(WIDTH), TimmAttention(), nn.Identity()
        self.gamma_1 = nn.Parameter(torch.full((WIDTH,), 0.7))
        self.norm2, self.mlp, self.drop_path2 = nn.LayerNorm(WIDTH), TimmMlp(), nn.Identity()
        self.gamma_2 = nn.Parameter(torch.full((WIDTH,), 0.6))

    def forward(self, x):
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))


class ResPostBlock(nn.Module):
    """timm's blocks that normalise what a sub-layer gives, as Swin v2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.drop_path1 = TimmAttention(), nn.LayerNorm(WIDTH), nn.Identity()
        self.mlp, self.norm2, self.drop_path2 = TimmMlp(), nn.LayerNorm(WIDTH), nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.norm1(self.attn(x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class MLPBlock(nn.Sequential):
    """torchvision's."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, WIDTH), nn.Dropout(0.0))


class EncoderBlock(nn.Module):
    """torchvision's vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.dropout, self.ln_2, self.mlp = nn.Dropout(0.0), nn.LayerNorm(WIDTH), MLPBlock()

    def forward(self, input):
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class ResidualAttentionBlock(nn.Module):
    """open_clip's."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ls_1 = nn.Identity()
        self.ln_2 = nn.LayerNorm(WIDTH)
        steps = [("c_fc", nn.Linear(WIDTH, 24)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(24, WIDTH))]
        self.mlp = nn.Sequential(OrderedDict(steps))
        self.ls_2 = nn.Identity()

    def forward(self, q_x):
        x = q_x + self.ls_1(self.attention(self.ln_1(q_x)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def attention(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """Two blocks, an embedding in front and a head behind."""

    def __init__(self, block: type[nn.Module], *arguments) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.Sequential(block(*arguments), block(*arguments))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


#: name -> (block, its arguments, the modules that give h in the attention and in the feed-forward part, the module
#: that takes the residual to which the feed-forward part is added)
BLOCKS = {
    "timm": (Block, (True,), ("attn", "ls1", "drop_path1"), ("mlp", "ls2", "drop_path2"), "norm2"),
    "timm_without_scale": (Block, (False,), ("attn", "ls1", "drop_path1"), ("mlp", "ls2", "drop_path2"), "norm2"),
    "timm_eva": (EvaBlock, (), ("drop_path1",), ("drop_path2",), "norm2"),
    "timm_res_post": (ResPostBlock, (), ("norm1", "drop_path1"), ("norm2", "drop_path2"), "mlp"),
    "torchvision": (EncoderBlock, (), ("self_attention", "dropout"), ("mlp",), "ln_2"),
    "open_clip": (ResidualAttentionBlock, (), ("attn", "ls_1"), ("mlp", "ls_2"), "ln_2"),
}


def build(name: str) -> nn.Module:
    """A network of such blocks with its random weights, always the same, in eval mode."""
    kind, arguments, *_ = BLOCKS[name]
    torch.manual_seed(0)
    model = Network(kind, *arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs() -> torch.Tensor:
    """For `Network`."""
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))


# ---- x-transformers ------------------------------------------------------------------------------------------------
class Attend(nn.Module):
    """x-transformers': the product of queries, keys and values, without a parameter of its own."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """x-transformers': the projections around it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.attend, self.to_out = Attend(), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        parts = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(self.attend(*parts).transpose(1, 2).flatten(2))
