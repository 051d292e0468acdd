"""Tiny random models of every family that prompts and prefixes must get right, and checks that hold on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

VOCAB, LENGTH, WIDTH = 61, 9, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 64}
PATCHES = {"image_size": 16, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Kind:
    """A model family: how to build it, what it eats, which output counts."""

    build: Callable[[], nn.Module]
    inputs: str = "text"
    field: str = "last_hidden_state"
    padding: bool = True
    transformers: bool = True

    def make(self, attention: str = "sdpa") -> nn.Module:
        """The model with its random weights, always the same."""
        torch.manual_seed(0)
        model = self.build().eval()
        if self.transformers:
            model.set_attn_implementation(attention)
        with torch.no_grad():
            for parameter in model.parameters():  # default initialisations are too small to tell results apart
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def batch(self, rows: int = 2) -> dict[str, torch.Tensor]:
        """Inputs; the last row of a text batch is shorter."""
        g = torch.Generator().manual_seed(3)
        ids = torch.randint(4, VOCAB, (rows, LENGTH), generator=g)
        mask = torch.ones(rows, LENGTH, dtype=torch.long)
        if self.inputs in ("text", "encdec", "toy"):
            mask[-1, 6:] = 0
            batch = {"input_ids": ids * mask, "attention_mask": mask}
            if self.inputs == "encdec":
                batch["decoder_input_ids"] = torch.randint(4, VOCAB, (rows, 5), generator=g)
            return batch
        if self.inputs == "speech":
            return {"input_values": torch.randn(rows, 1000, generator=g)}
        if self.inputs == "whisper":
            features = torch.randn(rows, 8, 40, generator=g)
            return {"input_features": features, "decoder_input_ids": ids[:, :5]}
        pixels = torch.randn(rows, 3, 16, 16, generator=g)
        if self.inputs == "image":
            return {"pixel_values": pixels}
        ids[:, 1:5] = 3  # image places
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    def run(self, model: nn.Module, batch: dict[str, torch.Tensor], **options) -> torch.Tensor:
        """The output that counts."""
        out = model(**batch, **options)
        return getattr(out, self.field) if self.transformers else out

    def output(self, model: nn.Module, grad: bool = False) -> torch.Tensor:
        """The output for the fixed batch."""
        with torch.set_grad_enabled(grad):
            return self.run(model, self.batch())


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` with embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 36, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, input_ids, attention_mask):
        return self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)


class Block(nn.Module):
    """A hand-written attention as in small GPTs."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.c_proj(y.transpose(1, 2).flatten(2))


class HandWritten(nn.Module):
    """A GPT of hand-written blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def _clip() -> nn.Module:
    text = hf.CLIPTextConfig(**TEXT, projection_dim=16, **SPECIAL)
    vision = hf.CLIPVisionConfig(**SIZES, **PATCHES, projection_dim=16)
    return hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def _llava() -> nn.Module:
    text = hf.LlamaConfig(**TEXT, num_key_value_heads=2, **SPECIAL)
    vision = hf.CLIPVisionConfig(**SIZES, **PATCHES)
    options = {"image_token_id": 3, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, **options))


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "num_mel_bins": 8, "vocab_size": VOCAB}
    limits = {"max_source_positions": 20, "max_target_positions": 40, "dropout": 0.0, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**layers, **sizes, **limits, **SPECIAL))


def _wav2vec2() -> nn.Module:
    convs = {"conv_dim": (WIDTH, WIDTH), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    drops = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SIZES, **convs, **position, **drops, vocab_size=VOCAB))


def _bart() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "vocab_size": VOCAB}
    start = {"decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 64, "dropout": 0.0}
    return hf.BartForConditionalGeneration(hf.BartConfig(**layers, **sizes, **start, **SPECIAL))


def _pegasus() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "vocab_size": VOCAB, "dropout": 0.0}
    start = {"decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 64}
    return hf.PegasusForConditionalGeneration(hf.PegasusConfig(**layers, **sizes, **start, **SPECIAL))


def _bloom() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    return hf.BloomForCausalLM(hf.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, **SPECIAL))


def _t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 36, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    bias = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **bias, **special))


def _distilbert() -> nn.Module:
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 36, "dropout": 0.0, "attention_dropout": 0.0}
    return hf.DistilBertModel(hf.DistilBertConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64))


def _modernbert() -> nn.Module:
    local = {"local_attention": 4, "global_attn_every_n_layers": 2}
    return hf.ModernBertModel(hf.ModernBertConfig(**TEXT, **local, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def _gpt2() -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 36, "vocab_size": VOCAB, "n_positions": 64}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **drops, **SPECIAL))


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, **SPECIAL))


GRID = {
    "bert": Kind(lambda: hf.BertModel(hf.BertConfig(**TEXT, **QUIET))),
    "roberta": Kind(lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, **QUIET, pad_token_id=0))),
    "distilbert": Kind(_distilbert),
    "modernbert": Kind(_modernbert),
    "gpt2": Kind(_gpt2, field="logits"),
    "llama": Kind(_llama, field="logits"),
    "t5": Kind(_t5, "encdec", "logits"),
    "bart": Kind(_bart, "encdec", "logits"),
    "vit": Kind(lambda: hf.ViTModel(hf.ViTConfig(**SIZES, **QUIET, **PATCHES)), "image", padding=False),
    "clip": Kind(_clip, "both", "logits_per_image", padding=False),
    "whisper": Kind(_whisper, "whisper", "logits", padding=False),
    "wav2vec2": Kind(_wav2vec2, "speech", padding=False),
    "llava": Kind(_llava, "both", "logits", padding=False),
    "torch_encoder": Kind(TorchEncoder, "toy", transformers=False),
    "hand_written": Kind(HandWritten, "toy", padding=False, transformers=False),
}
#: families that only some methods work on, or that a few tests need
OTHERS = {
    "bloom": Kind(_bloom, field="logits"),  # no attention says that it is causal; positions come from the mask
    "pegasus": Kind(_pegasus, "encdec", "logits"),  # sinusoids, counted from the cache
}
GENERATORS = ["gpt2", "llama", "t5", "bart", "whisper", "llava"]


def padded_alone(kind: Kind, model: nn.Module) -> None:
    """The short row alone gives what it gives inside the padded batch, padded right and (with positions) left."""
    batch = kind.batch()
    with torch.no_grad():
        together = kind.run(model, batch)[-1]
        alone = {k: v[-1:, :6] if k in ("input_ids", "attention_mask") else v[-1:] for k, v in batch.items()}
        expected = kind.run(model, alone)[-1]
    torch.testing.assert_close(together[: len(expected)], expected, atol=2e-5, rtol=1e-4)


def greedy(kind: Kind, model: nn.Module, steps: int = 5, recompute: bool = True, batch: dict | None = None) -> None:
    """generate(): greedy, sampling and beams are the same cached and uncached, and with a static cache.

    With ``recompute`` each step also equals a plain call on everything generated so far.
    """
    batch = kind.batch() if batch is None else batch
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    if kind.inputs == "text":  # generation needs left padding
        batch = {k: v.flip(1) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    if kind.inputs == "both":
        options["suppress_tokens"] = [3]  # an image place, drawn by chance, would ask for an image
    with torch.no_grad():
        cached = model.generate(**batch, **options)
        start = cached.sequences.shape[1] - steps
        for step in range(steps if recompute else 0):
            row = dict(batch) | {name: cached.sequences[:, : start + step]}
            if name == "input_ids":
                ones = row[name].new_ones(len(row[name]), step)
                row["attention_mask"] = torch.cat([batch["attention_mask"], ones], 1)
                if kind.inputs == "text":
                    row["position_ids"] = (row["attention_mask"].cumsum(1) - 1).clamp(min=0)
            expected = model(**row, use_cache=False).logits[:, -1]
            torch.testing.assert_close(cached.logits[step], expected, atol=5e-5, rtol=1e-3)
        for other in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
            again = model.generate(**batch, **options, **other)
            if "num_beams" not in other:
                assert torch.equal(again.sequences, cached.sequences), other
        beams = [model.generate(**batch, **options, num_beams=2, use_cache=c).sequences for c in (True, False)]
        assert torch.equal(*beams)
        drawn, sampling = [], {"do_sample": True, "top_k": 0}
        for use_cache in (True, False):
            torch.manual_seed(0)
            drawn.append(model.generate(**batch, **options | sampling, use_cache=use_cache).sequences)
        assert torch.equal(*drawn)
