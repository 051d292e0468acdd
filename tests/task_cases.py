"""One small case for each task: a model's configuration, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

VOCAB, LENGTH, BATCH = 61, 9, 4
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 5))]
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
BERT = {"model_type": "bert", "vocab_size": VOCAB, "max_position_embeddings": 64, **_SMALL}
LLAMA = {"model_type": "llama", "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, **_SMALL}
T5 = {"model_type": "t5", "vocab_size": VOCAB, "d_model": 32, "d_ff": 36, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 2, "num_channels": 1, **_SMALL}
WAV = {"model_type": "wav2vec2", **_SMALL, "conv_dim": [16, 16], "conv_kernel": [5, 5], "conv_stride": [4, 4]}
WAV |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAV |= {"classifier_proj_size": 16, "apply_spec_augment": False, "feat_extract_norm": "layer"}
NAMES = ["red", "green", "blue"]


def tokenizer() -> Any:
    """A word-level tokenizer of our own words, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", eos_token="[SEP]", **special)


def text(g: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCAB, (BATCH, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def classes(g: torch.Generator, labels: bool = True) -> dict[str, Any]:
    batch = text(g)
    return {**batch, "labels": batch["input_ids"][:, 0] % 3, "text": [f"example {i}" for i in range(BATCH)]}


def numbers(g: torch.Generator) -> dict[str, Any]:
    batch = text(g)
    return {**batch, "labels": batch["input_ids"][:, 0].float() / VOCAB, "id": torch.arange(BATCH)}


def tokens(g: torch.Generator) -> dict[str, Any]:
    batch = text(g)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100
    return {**batch, "labels": labels}


def following(g: torch.Generator) -> dict[str, Any]:
    batch = text(g)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**batch, "labels": labels}


def hidden(g: torch.Generator) -> dict[str, Any]:
    batch = text(g)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 2], labels[:, 4] = batch["input_ids"][:, 2], batch["input_ids"][:, 4]
    batch["input_ids"][:, [2, 4]] = 4
    return {**batch, "labels": labels}


def images(g: torch.Generator) -> dict[str, Any]:
    labels = torch.randint(0, 3, (BATCH,), generator=g)
    return {"pixel_values": torch.randn(BATCH, 1, 8, 8, generator=g) + labels.view(-1, 1, 1, 1), "labels": labels}


def sounds(g: torch.Generator) -> dict[str, Any]:
    labels = torch.randint(0, 3, (BATCH,), generator=g)
    return {"input_values": torch.randn(BATCH, 800, generator=g) * (1 + labels.view(-1, 1)), "labels": labels}


def prompts(batch: dict[str, Any]) -> dict[str, Any]:
    """The same rows to continue: padded on the left, no labels."""
    return {
        "input_ids": batch["input_ids"].flip(1),
        "attention_mask": batch["attention_mask"].flip(1),
        "id": [f"row {i}" for i in range(BATCH)],
    }


@dataclass
class Case:
    task: str
    model: dict[str, Any]
    batch: Callable[[torch.Generator], dict[str, Any]]
    metrics: set[str]
    options: dict[str, Any] = field(default_factory=dict)
    predict: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def loader(self, seed: int = 1, predict: bool = False) -> DataLoader:
        g = torch.Generator().manual_seed(seed)
        made = [self.batch(g) for _ in range(4)]
        return DataLoader([self.predict(b) for b in made] if predict else made, batch_size=None)


_NAMED = {"label_names": NAMES}
CASES = {
    c.task: c
    for c in (
        Case("sequence-classification", BERT, classes, {"accuracy", "f1"}, _NAMED),
        Case("regression", BERT, numbers, {"mae", "pearson"}),
        Case("token-classification", BERT, tokens, {"accuracy", "f1"}, _NAMED),
        Case("causal-lm", LLAMA, following, {"perplexity"}, {"generate": {"max_new_tokens": 3}}, prompts),
        Case("masked-lm", BERT, hidden, {"perplexity"}),
        Case("seq2seq-lm", T5, following, {"perplexity"}, {"generate": {"max_new_tokens": 3}}),
        Case("image-classification", VIT, images, {"accuracy", "f1"}, _NAMED),
        Case("audio-classification", WAV, sounds, {"accuracy", "f1"}, _NAMED),
    )
}


class Data(L.LightningDataModule):
    """What `TaskModule` asks of a data module: label names, a tokenizer, the task."""

    def __init__(self, case: Case, names: list[str] | None = None) -> None:
        super().__init__()
        self.case, self.label_names, self.task = case, names, case.task
        self.tokenizer = None

    def setup(self, stage: str) -> None:
        self.tokenizer = tokenizer()

    def train_dataloader(self) -> DataLoader:
        return self.case.loader(1)

    def val_dataloader(self) -> DataLoader:
        return self.case.loader(2)

    def test_dataloader(self) -> DataLoader:
        return self.case.loader(3)

    def predict_dataloader(self) -> DataLoader:
        return self.case.loader(4, predict=True)
