"""Where a layer's sub-layers end: the places of adapters, as one table over the architectures.

A sub-layer (attention, feed-forward) computes ``h`` from the residual ``x``. Post-norm models go on with
``LN(h + x)``, pre-norm models with ``h + x``. A row names, relative to the layer, the module whose output is ``h``, the
module whose input is ``x``, and a normalisation: it has the width of ``h``, and in post-norm models it takes ``h + x``.

``h`` is what joins the residual: where a model scales each sub-layer (LayerScale), it is the scaled output. Where a
model applies dropout to ``h`` by a function and not by a module (BART, Whisper, ViT), the output named here is ``h``
before that dropout; the same holds for stochastic depth, unless the scale is no module of its own (EVA, BEiT), so that
``h`` can only be read behind it. Cross-attention has no row: no published default adapts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.errors import NoMatchError

ROLES = ("attention", "mlp")
Place = tuple[str, str, str]
#: normalisations of feature maps, whose features are not in the last dimension
_OVER_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Layout:
    """One kind of layer: the places of its roles, and what tells it from others."""

    models: str
    #: (output: its output is h, source: its input is x ("" for the layer itself), norm), as paths in the layer
    attention: Place | None
    mlp: Place | None
    #: whether norm takes h + x
    post: bool = False
    #: a further module the layer has
    needs: str = ""
    #: expression over the names of the layer's class and its bases, where names of modules do not tell
    kind: str = ""
    #: an attribute of the layer that decides, and its value; None where the layer has no such attribute
    flag: tuple[str, Any] | None = None

    def places(self) -> list[Place]:
        """The places of all roles that the layer has."""
        return [place for place in (self.attention, self.mlp) if place is not None]

    def fits(self, name: str, layer: nn.Module, names: Mapping[str, nn.Module]) -> bool:
        """Whether the module called ``name`` is such a layer."""
        if self.needs and _join(name, self.needs) not in names:
            return False
        for place in self.places():
            if not all(_join(name, path) in names for path in place):
                return False
            # The same names occur in convolutional blocks, whose features are not in the last dimension.
            _, _, norm = place
            if isinstance(names[_join(name, norm)], _OVER_CHANNELS):
                return False
        # A class that derives from such a layer is one as well.
        if self.kind and not any(re.match(self.kind, base.__name__) for base in type(layer).__mro__):
            return False
        if self.flag is None:
            return True
        attribute, value = self.flag
        return getattr(layer, attribute, None) == value


#: for each role the first layout that fits a layer and has a place for it holds; special ones stand before general
LAYOUTS = (
    # X-MOD puts its language adapter between h + x and the end of the layer, and that adapter calls `output.dropout`
    # and, by default, `output.LayerNorm` once more. So the feed-forward part ends at its dense layer, before dropout,
    # and takes the correction there even where the layer is post-norm.
    Layout(
        "X-MOD",
        ("attention.output.dropout", "attention", "attention.output.LayerNorm"),
        None,
        post=True,
        kind="XmodLayer$",
        flag=("pre_norm", False),
    ),
    Layout(
        "X-MOD",
        None,
        ("output.dense", "intermediate", "output.LayerNorm"),
        kind="XmodLayer$",
        flag=("pre_norm", False),
    ),
    Layout(
        "X-MOD",
        ("attention.output.dropout", "attention", "attention.output.LayerNorm"),
        ("output.dense", "output.LayerNorm", "output.LayerNorm"),
        kind="XmodLayer$",
        flag=("pre_norm", True),
    ),
    Layout(
        "BERT, RoBERTa, ELECTRA, DeBERTa",
        ("attention.output.dropout", "attention", "attention.output.LayerNorm"),
        ("output.dropout", "intermediate", "output.LayerNorm"),
        post=True,
    ),
    Layout("DistilBERT", ("attention", "attention", "sa_layer_norm"), ("ffn", "ffn", "output_layer_norm"), post=True),
    # open_clip's blocks over another sequence have a norm for it; their attention is cross-attention
    Layout("open_clip's ViT and text tower", None, ("ls_2", "ln_2", "ln_2"), needs="ln_1_kv"),
    Layout("open_clip's ViT and text tower", ("ls_1", "ln_1", "ln_1"), ("ls_2", "ln_2", "ln_2"), needs="attn"),
    Layout("GPT-2, GPT-Neo", ("attn", "ln_1", "ln_1"), ("mlp", "ln_2", "ln_2")),
    Layout(
        "Gemma 2 and 3",
        ("post_attention_layernorm", "input_layernorm", "input_layernorm"),
        ("post_feedforward_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm"),
    ),
    Layout(
        "OLMo 2",
        ("post_attention_layernorm", "self_attn", "post_attention_layernorm"),
        ("post_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    Layout(
        "Llama, Mistral, Qwen, SmolLM, Phi-3",
        ("self_attn", "input_layernorm", "input_layernorm"),
        ("mlp", "post_attention_layernorm", "post_attention_layernorm"),
    ),
    Layout("T5, mT5, UMT5", ("dropout", "layer_norm", "layer_norm"), None, needs="SelfAttention"),
    Layout("T5, mT5, UMT5", None, ("dropout", "layer_norm", "layer_norm"), needs="DenseReluDense"),
    Layout(
        "BART, Marian",
        ("self_attn", "self_attn", "self_attn_layer_norm"),
        ("fc2", "fc1", "final_layer_norm"),
        post=True,
        kind=r"(Bart|PLBart|Marian)(En|De)coderLayer",
    ),
    Layout(
        "Whisper, mBART, M2M100 (NLLB), Pegasus",
        ("self_attn", "self_attn_layer_norm", "self_attn_layer_norm"),
        ("fc2", "final_layer_norm", "final_layer_norm"),
        kind=r"(Whisper|MBart|M2M100|Pegasus)(En|De)coderLayer",
    ),
    Layout(
        "OPT",
        ("self_attn", "self_attn_layer_norm", "self_attn_layer_norm"),
        ("fc2", "final_layer_norm", "final_layer_norm"),
        kind="OPTDecoderLayer",
        flag=("do_layer_norm_before", True),
    ),
    Layout(
        "ViT, DeiT",
        ("attention", "layernorm_before", "layernorm_before"),
        ("mlp", "layernorm_after", "layernorm_after"),
    ),
    # a block over windows (SAM) takes its input apart between norm and attention, so that h and x differ in shape
    Layout(
        "timm's ViT, DeiT",
        ("ls1", "norm1", "norm1"),
        ("ls2", "norm2", "norm2"),
        needs="attn",
        kind=r"(Block|RelPosBlock|SelfAttentionBlock)$",
        flag=("window_size", None),
    ),
    Layout(
        "timm's Swin v2 and other post-norm ViT",
        ("drop_path1", "", "norm1"),
        ("drop_path2", "mlp", "norm2"),
        needs="attn",
        kind=r"(SwinTransformerV2Block|ResPostBlock|ResPostRelPosBlock|EvaBlockPostNorm)$",
    ),
    Layout(
        "timm's EVA, DINOv3, BEiT",
        ("drop_path1", "norm1", "norm1"),
        ("drop_path2", "norm2", "norm2"),
        needs="attn",
        kind=r"(Block|EvaBlock|DeepseekVitBlock)$",
        flag=("window_size", None),
    ),
    Layout(
        "timm's Swin",
        ("drop_path1", "norm1", "norm1"),
        ("drop_path2", "norm2", "norm2"),
        needs="attn",
        kind="SwinTransformerBlock$",
    ),
    # blocks of timm's first versions, which DeiT, MAE and DINO copied: one drop path for both sub-layers
    Layout(
        "timm's ViT, DeiT",
        ("attn", "norm1", "norm1"),
        ("mlp", "norm2", "norm2"),
        needs="drop_path",
        kind="Block$",
    ),
    Layout(
        "torchvision's ViT",
        ("dropout", "ln_1", "ln_1"),
        ("mlp", "ln_2", "ln_2"),
        needs="self_attention",
        kind="EncoderBlock$",
    ),
    Layout(
        "torchvision's Swin v2",
        ("norm1", "attn", "norm1"),
        ("norm2", "mlp", "norm2"),
        needs="stochastic_depth",
        kind="SwinTransformerBlockV2$",
    ),
    Layout(
        "torchvision's Swin",
        ("attn", "norm1", "norm1"),
        ("mlp", "norm2", "norm2"),
        needs="stochastic_depth",
        kind="SwinTransformerBlock$",
    ),
    Layout("CLIP, SigLIP", ("self_attn", "layer_norm1", "layer_norm1"), ("mlp", "layer_norm2", "layer_norm2")),
    Layout("ModernBERT", ("attn", "attn_norm", "mlp_norm"), ("mlp", "mlp_norm", "mlp_norm")),
    Layout(
        "Wav2Vec2, HuBERT",
        ("attention", "attention", "layer_norm"),
        ("feed_forward", "feed_forward", "final_layer_norm"),
        post=True,
        kind=r"(Wav2Vec2|Hubert)EncoderLayer$",
    ),
    Layout(
        "torch.nn.TransformerEncoderLayer",
        ("dropout1", "self_attn", "norm1"),
        ("dropout2", "linear1", "norm2"),
        post=True,
        kind="TransformerEncoderLayer$",
        flag=("norm_first", False),
    ),
    Layout(
        "torch.nn.TransformerEncoderLayer",
        ("dropout1", "norm1", "norm1"),
        ("dropout2", "norm2", "norm2"),
        kind="TransformerEncoderLayer$",
        flag=("norm_first", True),
    ),
    Layout(
        "torch.nn.TransformerDecoderLayer",
        ("dropout1", "self_attn", "norm1"),
        ("dropout3", "linear1", "norm3"),
        post=True,
        kind="TransformerDecoderLayer$",
        flag=("norm_first", False),
    ),
    Layout(
        "torch.nn.TransformerDecoderLayer",
        ("dropout1", "norm1", "norm1"),
        ("dropout3", "norm3", "norm3"),
        kind="TransformerDecoderLayer$",
        flag=("norm_first", True),
    ),
)


@dataclass(frozen=True)
class Site:
    """One sub-layer of a model; modules by full name."""

    role: str
    output: str
    source: str
    norm: str
    post: bool


def find_sites(modules: Mapping[str, nn.Module]) -> list[Site]:
    """All sub-layers among ``modules`` (full name -> module; the root is ``""``), in their order.

    >>> from torch import nn
    >>> net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    >>> [site.output for site in find_sites(dict(net.named_modules()))]
    ['layers.0.dropout1', 'layers.0.dropout2']
    """
    sites = []
    for name, layer in modules.items():
        layouts = [layout for layout in LAYOUTS if layout.fits(name, layer, modules)]
        for role in ROLES:
            for layout in layouts:
                place: Place | None = getattr(layout, role)
                if place is None:
                    continue
                output, source, norm = place
                site = Site(role, _join(name, output), _join(name, source), _join(name, norm), layout.post)
                sites.append(site)
                break
    return sites


def unknown(method: str, model: nn.Module) -> NoMatchError:
    """The error for a model without a row."""
    known = "; ".join(dict.fromkeys(layout.models for layout in LAYOUTS))  # some have several layouts
    return NoMatchError(
        f"{method} finds no attention or feed-forward sub-layers in {type(model).__name__}. It knows the layers of"
        f" {known}. For other networks name modules: {method}(target_modules=[...]) puts an adapter behind each."
    )


def _join(name: str, path: str) -> str:
    """The full name of a module at ``path`` in the layer called ``name``; the root is called ``""``."""
    return f"{name}.{path}" if name and path else name or path
