"""Tiny random networks of the packages: real classes, small sizes. Each gives one tensor for its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Example:
    """A network, its inputs, and where a bottleneck goes: None for the method's own choice of places."""

    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    #: patterns for `Houlsby`; None: its own choice
    bottleneck: str | list[str] | None = None
    #: the method of the last column: "Houlsby" or "PrefixTuning"
    last: str = "Houlsby"
    call: Callable[..., Any] | None = None

    def make(self) -> nn.Module:
        """The network with random weights, always the same, no part of it at zero."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def output(self, model: nn.Module) -> Tensor:
        """The output for the fixed inputs; random numbers inside the network are the same each time."""
        torch.manual_seed(1)
        given = self.inputs()
        out = self.call(model, *given) if self.call else model(*given)
        return out[0] if isinstance(out, (tuple, list)) else out


def _images(size: int = 32, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3)),)


def _ids() -> Inputs:
    return (torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(3)),)


def _sound() -> Inputs:
    return (torch.randn(2, 40, 20, generator=torch.Generator().manual_seed(3)),)


def _graph() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(0, 12, (2, 40), generator=generator)
    return torch.randn(12, 16, generator=generator), edges


# ---- timm ----------------------------------------------------------------------------------------------------------
def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=4, **options)

    return build


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}

_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}


def _nfnet() -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    cfg = NfCfg(depths=(1, 1), channels=(32, 64), stem_type="3x3", stem_chs=16, group_size=8, num_features=64)
    return NormFreeNet(cfg, num_classes=4)


def _bit() -> nn.Module:
    from timm.layers import StdConv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(layers=(1, 1), channels=(128, 256), stem_chs=32, conv_layer=StdConv2d, num_classes=4)


TIMM = {
    "timm ViT": Example("timm", _timm("vit_tiny_patch16_224", **_VIT), _images()),
    "timm ViT, prefix": Example("timm", _timm("vit_tiny_patch16_224", **_VIT), _images(), last="PrefixTuning"),
    "timm EVA": Example("timm", _timm("eva02_tiny_patch14_224", **_VIT), _images()),
    "timm DINOv3": Example("timm", _timm("vit_small_patch16_dinov3", **_VIT), _images()),
    "timm BEiT": Example("timm", _timm("beit_base_patch16_224", **_VIT), _images()),
    "timm Swin": Example("timm", _timm("swin_tiny_patch4_window7_224", **_SWIN), _images()),
    "timm Swin V2": Example("timm", _timm("swinv2_tiny_window8_256", **_SWIN), _images()),
    "timm ConvNeXt": Example(
        "timm", _timm("convnext_atto", **_CONVNEXT), _images(), bottleneck="re:stages.[0-3].blocks.0"
    ),
    "timm NFNet": Example("timm", _nfnet, _images(), bottleneck="re:stages.[01].0.conv3"),
    "timm BiT": Example("timm", _bit, _images(), bottleneck="re:stages.[01].blocks.0"),
    "timm EfficientNet": Example("timm", _timm("efficientnet_b0"), _images(), bottleneck="re:blocks.[0-6].0"),
    "timm tf_efficientnet": Example("timm", _timm("tf_efficientnet_b0"), _images(), bottleneck="re:blocks.[0-6].0"),
}


# ---- torchvision ---------------------------------------------------------------------------------------------------
def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision.models.convnext
        import torchvision.models.swin_transformer
        import torchvision.models.vision_transformer as vision_transformer

        swin, convnext = torchvision.models.swin_transformer, torchvision.models.convnext
        if name == "vit":
            return vision_transformer.VisionTransformer(**options)
        if name == "convnext":
            return convnext.ConvNeXt(
                [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)], **options
            )
        if name == "swin_v2":
            options["block"] = swin.SwinTransformerBlockV2
            options["downsample_layer"] = swin.PatchMergingV2
        return swin.SwinTransformer(**options)

    return build


_TV_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
_TV_SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
_TV_SWIN |= {"num_classes": 4, "stochastic_depth_prob": 0.0}
TORCHVISION = {
    "torchvision ViT": Example("torchvision", _torchvision("vit", **_TV_VIT, num_classes=4), _images()),
    "torchvision Swin": Example(
        "torchvision", _torchvision("swin", **_TV_SWIN), _images(), bottleneck="re:features.[13].0.mlp"
    ),
    "torchvision Swin V2": Example(
        "torchvision", _torchvision("swin_v2", **_TV_SWIN), _images(), bottleneck="re:features.[13].0.mlp"
    ),
    "torchvision ConvNeXt": Example(
        "torchvision", _torchvision("convnext", num_classes=4), _images(), bottleneck="re:features.[13].0.block.5"
    ),
}


# ---- torch_geometric -----------------------------------------------------------------------------------------------
class _GPS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, GPSConv

        self.first, self.second = (GPSConv(16, GCNConv(16, 16), heads=2, norm="layer_norm") for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x, edge_index):
        return self.head(self.second(self.first(x, edge_index), edge_index))


def _graph_net(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torch_geometric.nn as graph

        return getattr(graph, name)(16, 8, num_layers=2, out_channels=4)

    return build


GRAPHS = {
    "PyG GPSConv": Example("torch_geometric", _GPS, _graph, bottleneck="re:(first|second).mlp"),
    "PyG GPSConv, prefix": Example("torch_geometric", _GPS, _graph, last="PrefixTuning"),
    "PyG GCN": Example("torch_geometric", _graph_net("GCN"), _graph, bottleneck="re:convs.[01].lin"),
    "PyG GAT": Example("torch_geometric", _graph_net("GAT"), _graph, bottleneck="re:convs.[01].lin"),
    "PyG SAGE": Example("torch_geometric", _graph_net("GraphSAGE"), _graph, bottleneck="re:convs.[01].lin_l"),
}


# ---- scvi-tools ----------------------------------------------------------------------------------------------------
def _vae() -> nn.Module:
    from scvi.module import VAE

    return VAE(
        n_input=20, n_batch=2, n_hidden=16, n_latent=4, n_layers=2, dropout_rate=0.0, deeply_inject_covariates=True
    )


def _counts() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(0, 9, (6, 20), generator=generator).float()
    return ({"X": counts, "batch": torch.tensor([[0], [1]] * 3), "labels": torch.zeros(6, 1)},)


def _run_vae(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    inference, generative, _ = model(tensors)
    return torch.cat([inference["qz"].loc, generative["px"].mean], dim=-1)


CELLS = {
    "scvi-tools VAE": Example(
        "scvi", _vae, _counts, bottleneck=["z_encoder.encoder", "decoder.px_decoder"], call=_run_vae
    )
}


# ---- open_clip, x-transformers -------------------------------------------------------------------------------------
def _clip() -> nn.Module:
    from open_clip import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 61, "width": 32, "heads": 2, "layers": 2}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def _pooled_clip() -> nn.Module:
    from open_clip import CustomTextCLIP

    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "attentional_pool": True}
    vision |= {"attn_pooler_heads": 2, "attn_pooler_queries": 4}
    text = {"context_length": 8, "vocab_size": 61, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True}
    return CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def _pairs() -> Inputs:
    return (*_images()(), *_ids())


def _run_clip(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([model.encode_image(images), model.encode_text(ids)], dim=-1)


def _x_transformer(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import x_transformers

        layers = getattr(x_transformers, kind)(dim=32, depth=2, heads=2, attn_dim_head=16, **options)
        return x_transformers.TransformerWrapper(num_tokens=61, max_seq_len=16, attn_layers=layers)

    return build


LANGUAGE = {
    "open_clip CLIP": Example("open_clip", _clip, _pairs, call=_run_clip),
    "open_clip, pooled by attention": Example("open_clip", _pooled_clip, _pairs, call=_run_clip, last="PrefixTuning"),
    "x-transformers decoder": Example(
        "x_transformers",
        _x_transformer("Decoder", rotary_pos_emb=True),
        _ids,
        bottleneck="re:attn_layers.layers.[0-9]+.1",
    ),
    "x-transformers encoder, prefix": Example(
        "x_transformers", _x_transformer("Encoder", attn_flash=True), _ids, last="PrefixTuning"
    ),
}


# ---- MONAI, speechbrain --------------------------------------------------------------------------------------------
def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import monai.networks.nets as nets

        return getattr(nets, name)(**options)

    return build


_UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "channels": (8, 16),
    "strides": (2,),
    "num_res_units": 1,
}
_UNETR = {"in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 32}
_UNETR |= {"num_heads": 2, "spatial_dims": 2}
_MONAI_VIT = {"in_channels": 1, "img_size": 32, "patch_size": 8, "hidden_size": 32, "mlp_dim": 48, "num_layers": 2}
_MONAI_VIT |= {"num_heads": 2, "spatial_dims": 2, "classification": True, "num_classes": 4}
MEDICAL = {
    "MONAI UNet": Example("monai", _monai("UNet", **_UNET), _images(32, 1), bottleneck="re:model.0"),
    "MONAI UNETR": Example("monai", _monai("UNETR", **_UNETR), _images(32, 1), bottleneck="re:vit.blocks.[0-9]+.mlp"),
    "MONAI ViT": Example("monai", _monai("ViT", **_MONAI_VIT), _images(32, 1)),
}


def _ecapa() -> nn.Module:
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN

    return ECAPA_TDNN(20, lin_neurons=8, channels=[16] * 5, attention_channels=8, res2net_scale=2, se_channels=8)


def _crdnn() -> nn.Module:
    from speechbrain.lobes.models.CRDNN import CRDNN

    sizes = {
        "cnn_blocks": 1,
        "cnn_channels": (4,),
        "rnn_layers": 1,
        "rnn_neurons": 8,
        "dnn_blocks": 1,
        "dnn_neurons": 8,
    }
    return CRDNN(input_shape=[None, None, 20], dropout=0.0, **sizes)


def _conformer() -> nn.Module:
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder

    return ConformerEncoder(2, 20, 32, 2, kernel_size=5, dropout=0.0, attention_type="regularMHA")


SPEECH = {
    "speechbrain ECAPA-TDNN": Example("speechbrain", _ecapa, _sound, bottleneck="re:blocks.[0-3]"),
    "speechbrain CRDNN": Example("speechbrain", _crdnn, _sound, bottleneck="DNN.block_0.linear"),
    "speechbrain Conformer": Example("speechbrain", _conformer, _sound, bottleneck="re:layers.[01].ffn_module2"),
}

EXAMPLES = {**TIMM, **TORCHVISION, **GRAPHS, **CELLS, **LANGUAGE, **MEDICAL, **SPEECH}
