"""A prefix on an image model and on a speech model: each learns half of the classes in full, then the other half
through a prefix of its frozen layers and a new head. For comparison, the new head alone.

    python examples/prefix_media.py [digits] [tones]

Digits are scikit-learn's 8×8 images, sounds are tones in noise made here; both models start from random weights.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import wave
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
import transformers
from torch import nn

from lightning_peft import PEFT, AudioDataModule, FullFineTuning, ImageDataModule, PrefixTuning, TaskModule

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
CONVS = {"conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
PLACES = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 64}
RATE = 8000


def digits(folder: Path, classes: range) -> ImageDataModule:
    """Images of some digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.isin(labels, list(classes))
    np.savez(folder / f"digits{classes.start}.npz", images=images.reshape(-1, 8, 8)[chosen], labels=labels[chosen])
    options = {"num_channels": 1, "rescale_factor": 1 / 16, "val_size": 0, "test_size": 0.3}
    return ImageDataModule(str(folder / f"digits{classes.start}.npz"), **options)


def tones(folder: Path, classes: range) -> AudioDataModule:
    """A tenth of a second of a tone, 12 semitones in all, in as much noise."""
    draw = np.random.default_rng(classes.start)
    place = folder / f"tones{classes.start}"
    for number in classes:
        (place / f"tone{number:02}").mkdir(parents=True)
        for i in range(60):
            time = np.arange(int(RATE * draw.uniform(0.08, 0.12))) / RATE
            sound = np.sin(2 * math.pi * (500 * 2 ** (number / 12) * time + draw.random()))
            sound = 8000 * (sound + draw.normal(size=len(time)))
            with wave.open(str(place / f"tone{number:02}" / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
                file.writeframes(sound.clip(-32767, 32767).astype("<i2").tobytes())
    return AudioDataModule(str(place), sampling_rate=RATE, val_size=0, test_size=0.3)


def vit(labels: int) -> nn.Module:
    """A ViT for 8×8 images."""
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **image, num_labels=labels))


def wav2vec2(labels: int) -> nn.Module:
    """A small Wav2Vec2."""
    config = transformers.Wav2Vec2Config(**SIZES, **CONVS, **PLACES, num_labels=labels, mask_time_prob=0.0)
    return transformers.Wav2Vec2ForSequenceClassification(config)


def accuracy(network: nn.Module, task: str, data: L.LightningDataModule, method, lr: float, epochs: int) -> float:
    """Test accuracy after training what the method trains, or without one what requires a gradient."""
    L.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[] if method is None else [PEFT(method)],
        **quiet,
    )
    module = TaskModule(network, task, label_names=data.label_names, lr=lr)
    trainer.fit(module, data)
    return float(trainer.test(module, data, verbose=False)[0]["test_accuracy"])


def transfer(build, task: str, first: L.LightningDataModule, second: L.LightningDataModule) -> dict[str, float]:
    """Accuracies on the test rows of the first classes, and of the second with a new head alone and with a prefix."""
    for data in (first, second):
        data.setup("fit")
    torch.manual_seed(0)
    network = build(len(first.label_names))
    found = {"first classes, full": accuracy(network, task, first, FullFineTuning(), 1e-3, 12)}
    base = build(len(first.label_names)).requires_grad_(False)
    base.load_state_dict(network.state_dict())
    base.classifier = nn.Linear(base.classifier.in_features, len(second.label_names))
    base.config.id2label = dict(enumerate(second.label_names))
    found["others, head alone"] = accuracy(copy.deepcopy(base), task, second, None, 1e-2, 20)
    method = PrefixTuning(num_virtual_tokens=10, modules_to_save="classifier")
    found["others, prefix and head"] = accuracy(base, task, second, method, 1e-2, 20)
    return found


def main() -> None:
    """Both models; prints what they reach."""
    halves = {"digits": (range(5), range(5, 10)), "tones": (range(0, 12, 2), range(1, 12, 2))}
    kinds = {"digits": (vit, digits, "image-classification"), "tones": (wav2vec2, tones, "audio-classification")}
    for name in sys.argv[1:] or kinds:
        build, data, task = kinds[name]
        with tempfile.TemporaryDirectory() as folder:
            found = transfer(build, task, *(data(Path(folder), classes) for classes in halves[name]))
        print(name, *(f"{what} {value:.3f}" for what, value in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
