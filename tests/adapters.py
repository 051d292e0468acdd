"""What the tests of the bottleneck adapters share: golden values put in place, and a zoo of tiny architectures."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lightning_peft import inject
from lightning_peft.method import Method
from tests.golden_case import Golden

_PLACES = {
    "attention_adapters": {"gpt2": "attn", "llama": "self_attn"},
    "output_adapters": {"gpt2": "mlp", "llama": "mlp"},
}
LEAVES = {
    "adapter_down.0.weight": "down_weight",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up_weight",
    "adapter_up.bias": "up_bias",
    "adapter_down.0.W_left": "down_left",
    "adapter_down.0.W_right": "down_right",
    "adapter_down.0.b": "down_bias",
    "adapter_up.W_left": "up_left",
    "adapter_up.W_right": "up_right",
    "adapter_up.b": "up_bias",
    "scaling": "scale",
}


def place_of(case: Golden, key: str, norm: bool) -> str:
    """The module that carries the adapter a golden key belongs to."""
    owner = key.partition(".adapters.")[0]
    kind = case.meta["model"]["model_type"]
    if kind == "bert":
        return f"{owner}.{'LayerNorm' if norm else 'dropout'}"
    layer, _, part = owner.rpartition(".")
    return f"{layer}.{_PLACES[part][kind]}"


def inject_golden(case: Golden, method: Method, norm: bool = False) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The case's model with its adapter values; the case's keys to our parameters."""
    model = case.model()
    inject(model, method)
    parameters = {}
    for key, value in case.part("adapter").items():
        if key.startswith("shared_parameters."):
            ours = next(p for n, p in model.named_parameters() if n.endswith("shared.rule"))
        else:
            leaf = key.partition(".adapters.golden.")[2]
            ours = getattr(model.get_submodule(place_of(case, key, norm)).delta, LEAVES[leaf])
        assert ours.shape == value.shape, key
        ours.data.copy_(value)
        parameters[key] = ours
    return model, parameters


def check_golden(name: str, method: Method, norm: bool = False) -> None:
    """Output, loss, gradients and the number of trained parameters of a golden case."""
    from lightning_peft import summarize

    for attention in ("eager", "sdpa"):
        case = Golden(name, attention)
        model, parameters = inject_golden(case, method, norm)
        assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
        torch.testing.assert_close(
            case.run(case.model()), case.tensors["output.base"], atol=case.meta["tolerance"]["suggested_atol"], rtol=0
        )
        case.check(model, parameters)


# ---- the zoo: name -> (model, inputs); no dropout, random weights, float32 -------------------------------------------
def _text(seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def _hf(auto: str, kind: str, **options) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, **options)
    return getattr(transformers, auto).from_config(config)


_BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2}
_BERT |= {"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "pad_token_id": 0}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
_SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0}
_SEQ |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "vocab_size": 61}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_ENCDEC = ("AutoModelForSeq2SeqLM", {"decoder_input_ids": torch.tensor([[1, 5, 9], [1, 8, 4]])})

ZOO = {
    "bert": ("AutoModel", _BERT, {}),
    "roberta": ("AutoModel", _BERT, {}),
    "xmod": ("AutoModel", {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"}, {}),
    "electra": ("AutoModel", {**_BERT, "embedding_size": 16}, {}),
    "deberta-v2": ("AutoModel", _BERT, {}),
    "distilbert": (
        "AutoModel",
        {"vocab_size": 61, "dim": 32, "hidden_dim": 36, "n_layers": 2, "n_heads": 4, "dropout": 0.0},
        {},
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 36}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        {},
    ),
    "llama": ("AutoModelForCausalLM", _LLAMA, {}),
    "mistral": ("AutoModelForCausalLM", _LLAMA, {}),
    "qwen2": ("AutoModelForCausalLM", _LLAMA, {}),
    "qwen3": ("AutoModelForCausalLM", _LLAMA, {}),
    "gemma2": ("AutoModelForCausalLM", _LLAMA, {}),
    "olmo2": ("AutoModelForCausalLM", _LLAMA, {}),
    "opt": (
        "AutoModelForCausalLM",
        {**_LLAMA, "ffn_dim": 36, "word_embed_proj_dim": 32, "dropout": 0.0, "do_layer_norm_before": True},
        {},
    ),
    "t5": (
        _ENCDEC[0],
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 36, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0},
        _ENCDEC[1],
    ),
    "bart": (_ENCDEC[0], _SEQ | _IDS | {"forced_eos_token_id": None}, _ENCDEC[1]),
    "marian": (_ENCDEC[0], _SEQ | _IDS | {"forced_eos_token_id": None}, _ENCDEC[1]),
    "mbart": (_ENCDEC[0], _SEQ | _IDS | {"forced_eos_token_id": None}, _ENCDEC[1]),
    "whisper": (
        "WhisperForConditionalGeneration",
        _SEQ | _IDS | {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16},
        {"input_features": torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(2)), **_ENCDEC[1]},
    ),
    "vit": (
        "AutoModel",
        {**_BERT, "image_size": 8, "patch_size": 4, "num_channels": 3},
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))},
    ),
    "clip_vision_model": (
        "CLIPVisionModel",
        {**_BERT, "image_size": 8, "patch_size": 4},
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))},
    ),
    "modernbert": ("AutoModel", _BERT | _IDS | {"cls_token_id": 1, "sep_token_id": 2}, {}),
    "wav2vec2": (
        "AutoModel",
        {**_BERT, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
        | {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [4, 4], "mask_time_prob": 0.0}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_proj_dropout": 0.0},
        {"input_values": torch.randn(2, 160, generator=torch.Generator().manual_seed(2))},
    ),
}
TORCH = ("encoder_post", "encoder_pre", "decoder_post", "decoder_pre")


class Stack(nn.Module):
    """torch's own encoder or decoder behind one name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        part, pre = kind.split("_")[0], kind.endswith("pre")
        options = {"d_model": 32, "nhead": 4, "dim_feedforward": 36, "dropout": 0.0, "batch_first": True}
        layer = (nn.TransformerEncoderLayer if part == "encoder" else nn.TransformerDecoderLayer)(
            **options, norm_first=pre
        )
        whole = nn.TransformerEncoder if part == "encoder" else nn.TransformerDecoder
        self.part, self.stack = part, whole(layer, 2)
        for parameter in self.stack.parameters():  # the copies start equal
            parameter.data.add_(torch.randn(parameter.shape) * 0.02)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        if self.part == "encoder":
            return self.stack(x, src_key_padding_mask=padding)
        return self.stack(x, x.flip(0), tgt_key_padding_mask=padding)


def build(kind: str) -> nn.Module:
    """A tiny model with random weights, in eval mode."""
    torch.manual_seed(0)
    if kind in TORCH:
        return Stack(kind).eval()
    auto, options, _ = ZOO[kind]
    return _hf(auto, kind, **options).eval() if "AutoModel" in auto else _direct(auto, options).eval()


def _direct(name: str, options: dict) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Arguments for `build(kind)`."""
    if kind in TORCH:
        x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
        return {"x": x, "padding": torch.tensor([[False] * 7, [False] * 5 + [True] * 2])}
    extra = ZOO[kind][2]
    return (
        dict(extra) if not ({"pixel_values", "input_features", "input_values"}.isdisjoint(extra)) else _text() | extra
    )


def outputs(model: nn.Module, kind: str) -> torch.Tensor:
    """The first output tensor, padded positions of torch's stacks left out."""
    given = inputs(kind)
    out = model(**given)
    if kind in TORCH:
        return out[~given["padding"]]
    return out[0]
