"""Small models, batches and LightningModules that the tests share."""

from __future__ import annotations

import lightning.pytorch as L
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

VOCAB, LENGTH = 61, 9

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(seed: int = 0) -> nn.Module:
    """A BERT classifier with random weights."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**_SMALL, **_QUIET, intermediate_size=36, max_position_embeddings=64, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


def llama(seed: int = 0) -> nn.Module:
    """A Llama with grouped queries and random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **_SMALL, intermediate_size=36, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {"bert": bert, "llama": llama}


class Rows(Dataset):
    """Padded rows of token ids with labels."""

    def __init__(self, kind: str, count: int = 16, seed: int = 1) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCAB, (count, LENGTH), generator=g)
        self.mask = (torch.arange(LENGTH) < torch.randint(5, LENGTH + 1, (count, 1), generator=g)).long()
        self.ids = self.ids * self.mask
        labels = torch.randint(0, 3, (count,), generator=g)
        self.labels = labels if kind == "bert" else self.ids.masked_fill(self.mask == 0, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i], "labels": self.labels[i]}


def batch(kind: str, count: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """One batch for a model of `MODELS`."""
    rows = Rows(kind, count, seed)
    return {"input_ids": rows.ids, "attention_mask": rows.mask, "labels": rows.labels}


def loader(kind: str, count: int = 16, batch_size: int = 4) -> DataLoader:
    """The same batches in every epoch."""
    return DataLoader(Rows(kind, count), batch_size=batch_size)


def logits(model: nn.Module, kind: str) -> torch.Tensor:
    """Outputs for a fixed batch, without gradient."""
    inputs = batch(kind)
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits


class Foreign(L.LightningModule):
    """A LightningModule that knows nothing of adapters: its own network, loss and optimizer."""

    def __init__(self, kind: str = "bert", lr: float = 1e-2, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = MODELS[kind](seed)

    def step(self, batch: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        loss = self.net(**batch).loss
        self.log(name, loss, batch_size=4)
        return loss

    def training_step(self, batch, index):
        return self.step(batch, "train_loss")

    def validation_step(self, batch, index):
        self.step(batch, "val_loss")

    def test_step(self, batch, index):
        self.step(batch, "test_loss")

    def predict_step(self, batch, index):
        batch.pop("labels")
        return self.net(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)


class Plain(L.LightningModule):
    """A convolution-free toy: normalisation with running statistics, a hidden layer, a head."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, index):
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def plain_loader(count: int = 32, batch_size: int = 8) -> DataLoader:
    """Rows for `Plain`."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(count, 8, generator=g) * 2 + 1
    y = (x.sum(1).abs() % 3).long()
    return DataLoader(list(zip(x, y, strict=True)), batch_size=batch_size)


def trainer(path, *callbacks: L.Callback, **options) -> L.Trainer:
    """A quiet Trainer on the CPU that writes below ``path``."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 2, "default_root_dir": path, "enable_checkpointing": False, **quiet, **options}
    if any(isinstance(c, L.callbacks.ModelCheckpoint) for c in callbacks):
        options["enable_checkpointing"] = True
    return L.Trainer(callbacks=list(callbacks), **options)


def frozen_copy(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, copied."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}
