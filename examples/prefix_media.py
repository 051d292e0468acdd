"""A prefix on an image model and on a speech model: each learns one task in full, then another through a prefix of its
frozen layers and a new head. For comparison, the new head alone. Rates are chosen on validation rows, test rows are
looked at once.

    python examples/prefix_media.py [digits] [tones]

Digits are scikit-learn's 8×8 images: 0 to 4, then 5 to 9. Sounds are tones in noise made here: of six pitches, then of
the six between, which last for a sixth of the recording. Both models start from random weights.
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
    options = {"num_channels": 1, "rescale_factor": 1 / 16, "val_size": 0.2, "test_size": 0.3}
    return ImageDataModule(str(folder / f"digits{classes.start}.npz"), **options)


def tones(folder: Path, classes: range) -> AudioDataModule:
    """A tenth of a second of a tone in half as much noise: of six pitches, or, shorter, of the six between."""
    draw = np.random.default_rng(classes.start)
    place = folder / f"tones{classes.start}"
    for number in classes:
        (place / f"tone{number:02}").mkdir(parents=True)
        for i in range(90):
            time = np.linspace(0, 1, int(RATE * draw.uniform(0.08, 0.12)))
            pitch = 2 * (number % 6) + number // 6
            sound = np.sin(2 * math.pi * (500 * 2 ** (pitch / 12) * len(time) / RATE * time + draw.random()))
            if number >= 6:
                sound *= abs(time - draw.uniform(0.15, 0.85)) < 1 / 12
            sound = 8000 * (sound + 0.5 * draw.normal(size=len(time)))
            with wave.open(str(place / f"tone{number:02}" / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
                file.writeframes(sound.clip(-32767, 32767).astype("<i2").tobytes())
    return AudioDataModule(str(place), sampling_rate=RATE, val_size=0.2, test_size=0.3)


def vit(labels: int) -> nn.Module:
    """A ViT for 8×8 images."""
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **image, num_labels=labels))


def wav2vec2(labels: int) -> nn.Module:
    """A small Wav2Vec2."""
    config = transformers.Wav2Vec2Config(**SIZES, **CONVS, **PLACES, num_labels=labels, mask_time_prob=0.0)
    return transformers.Wav2Vec2ForSequenceClassification(config)


def train(network: nn.Module, task: str, data: L.LightningDataModule, method, lr: float, epochs: int):
    """Train the method, or without one what requires a gradient; gives the accuracy on validation, Trainer, module."""
    L.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "num_sanity_val_steps": 0, "check_val_every_n_epoch": epochs}
    callbacks = [] if method is None else [PEFT(method)]
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    module = TaskModule(network, task, label_names=data.label_names, lr=lr)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["val_accuracy"]), trainer, module


def test(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> float:
    """Accuracy on the test rows."""
    return float(trainer.test(module, data, verbose=False)[0]["test_accuracy"])


def transfer(build, task: str, first, second, rates=(3e-3, 1e-2, 3e-2)) -> dict[str, float]:
    """Test accuracies of the first task, and of the second with a new head alone and with a prefix."""
    for data in (first, second):
        data.setup("fit")
    torch.manual_seed(0)
    network = build(len(first.label_names))
    _, *trained = train(network, task, first, FullFineTuning(), 1e-3, 12)
    found = {"first task, full": test(*trained, first)}
    base = build(len(first.label_names)).requires_grad_(False)
    base.load_state_dict(network.state_dict())
    base.classifier = nn.Linear(base.classifier.in_features, len(second.label_names))
    base.config.id2label = dict(enumerate(second.label_names))
    prefix = PrefixTuning(num_virtual_tokens=10, modules_to_save="classifier")
    for name, method in (("second, head alone", None), ("second, prefix and head", prefix)):
        runs = [train(copy.deepcopy(base), task, second, method, lr, 30) for lr in rates]
        _, *best = max(runs, key=lambda run: run[0])
        found[name] = test(*best, second)
    return found


#: the model, its data, its task, and how many classes each half has
KINDS = {"digits": (vit, digits, "image-classification", 5), "tones": (wav2vec2, tones, "audio-classification", 6)}


def compare(name: str, **options) -> dict[str, float]:
    """What `transfer` finds for one kind."""
    build, data, task, count = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        halves = [data(Path(folder), classes) for classes in (range(count), range(count, 2 * count))]
        return transfer(build, task, *halves, **options)


def main() -> None:
    """Prints what the models reach."""
    for name in sys.argv[1:] or KINDS:
        print(name, *(f"{what} {value:.3f}" for what, value in compare(name).items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
