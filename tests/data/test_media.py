"""Images and recordings."""

import math
import struct
import wave

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from lightning_peft import AudioDataModule, ImageDataModule
from lightning_peft.data.audio import read_wave
from lightning_peft.errors import ConfigError


def draw(path, value, size=(6, 4), mode="RGB"):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def batches(data, split="train"):
    return list(getattr(data, f"{split}_dataloader")())


def test_image_folder(tmp_path):
    for i in range(10):
        draw(tmp_path / "red" / f"{i}.png", (255, i, 0))
        draw(tmp_path / "grey" / f"{i}.png", 100 + i, mode="L")
    draw(tmp_path / "grey" / "again.png", 100, mode="L")  # a duplicate
    data = ImageDataModule(str(tmp_path), batch_size=4, image_mean=[0.5, 0.5, 0.0], image_std=1.0, num_workers=1)
    data.setup("fit")
    assert data.label_names == ["grey", "red"] and data.num_labels == 2
    got = batches(data)
    assert sum(len(b["labels"]) for b in got) == 16 and got[0]["pixel_values"].shape == (4, 3, 4, 6)
    assert sorted(len(batches(data, s)) for s in ("val", "test")) == [1, 1]
    for batch in got:
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            if label == 1:
                assert torch.allclose(image[0], torch.tensor(0.5)) and torch.equal(image[2], torch.zeros(4, 6))
                assert -0.5 <= image[1].min() < -0.46
            else:
                assert torch.equal(image[0], image[1]) and torch.allclose(image[2], image[0] + 0.5)
    sized = ImageDataModule(str(tmp_path), image_size=8, num_channels=1, val_size=0, test_size=0)
    sized.setup("fit")
    assert batches(sized)[0]["pixel_values"].shape == (21, 1, 8, 8)
    flat = ImageDataModule(str(tmp_path), predict_data=str(tmp_path / "red"), eval_batch_size=6)
    flat.setup("predict")
    shown = batches(flat, "predict")
    assert [len(b["pixel_values"]) for b in shown] == [6, 4] and "labels" not in shown[0]
    assert shown[0]["meta"]["id"][0] == str(tmp_path / "red" / "0.png")


def test_digits_and_npz(tmp_path):
    options = {"rescale_factor": 1 / 16, "num_channels": 1, "image_mean": 0.0, "image_std": 1.0}
    data = ImageDataModule("sklearn.datasets.load_digits", **options)
    data.setup("fit")
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert data.label_names == [str(i) for i in range(10)]
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    count = 0
    for batch in batches(data):
        assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].min() >= 0
        for image, label in zip(batch["pixel_values"][:, 0], batch["labels"], strict=True):
            assert known[(image * 16).round().double().numpy().tobytes()] == label
            count += 1
    assert count == 1797 - 2 * 180
    colour = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x_train=colour, y_train=np.arange(5), x_test=colour[:2], y_test=np.array([1, 0]))
    data = ImageDataModule(str(tmp_path / "a.npz"), val_size=0, eval_batch_size=2)
    data.setup("test")
    (batch,) = batches(data, "test")
    assert batch["labels"].tolist() in ([1, 0], [0, 1])
    first = batch["pixel_values"][batch["labels"].tolist().index(1)]
    assert torch.allclose(first, torch.tensor(colour[0]).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_image_errors(tmp_path):
    draw(tmp_path / "a" / "1.png", 0)
    draw(tmp_path / "b" / "1.png", 0, size=(9, 9))
    (tmp_path / "c" / "x").mkdir(parents=True)
    (tmp_path / "c" / "x" / "1.png").write_text("nothing")
    np.savez(tmp_path / "odd.npz", pictures=np.zeros((2, 2, 2)))
    np.savez(tmp_path / "flat.npz", x=np.zeros((2, 4)))
    np.savez(tmp_path / "long.npz", x=np.zeros((2, 4, 4)), y=np.zeros(3))
    for source, message in {
        str(tmp_path): r"is \(6, 4\) pixels, .* is \(9, 9\); set image_size",
        str(tmp_path / "c"): "1.png cannot be read as an image",
        str(tmp_path / "gone"): "gone does not exist|'.*gone' does not exist",
        str(tmp_path / "odd.npz"): "no array called images, x or data; it has pictures",
        str(tmp_path / "flat.npz"): r"images have shape \(2, 4\)",
        str(tmp_path / "long.npz"): "2 images but 3 labels",
        "sklearn.datasets.load_nothing": "no function that can be imported",
        "math.pi.real": "no function that can be imported",
    }.items():
        with pytest.raises(ConfigError, match=message):
            ImageDataModule(source, val_size=0, test_size=0).setup("fit")


def tone(path, seconds, rate=8000, width=2, channels=1, pitch=440):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [0.5 * math.sin(2 * math.pi * pitch * i / rate) for i in range(int(seconds * rate))]
    packed = {
        1: lambda x: struct.pack("B", int(x * 128) + 128),
        2: lambda x: struct.pack("<h", int(x * 32768)),
        3: lambda x: struct.pack("<i", int(x * (1 << 23)))[:3],
        4: lambda x: struct.pack("<i", int(x * (1 << 31))),
    }[width]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(b"".join(packed(x) * channels for x in samples))
    return torch.tensor(samples)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wave_formats(tmp_path, width, channels):
    expected = tone(tmp_path / "a.wav", 0.1, width=width, channels=channels)
    rate, sound = read_wave(str(tmp_path / "a.wav"))
    assert rate == 8000 and (sound - expected).abs().max() <= 1.01 / (1 << (8 * min(width, 3) - 1))


def test_audio_folder(tmp_path):
    for i in range(8):
        for label, pitch in (("high", 873), ("low", 217)):
            tone(tmp_path / label / f"{i}.wav", 0.1 + 0.05 * i, pitch=pitch)
    data = AudioDataModule(str(tmp_path), sampling_rate=8000, max_seconds=0.4, batch_size=4, test_size=0, val_size=2)
    data.setup("fit")
    assert data.label_names == ["high", "low"]
    got = batches(data)
    assert sum(len(b["labels"]) for b in got) == 14
    assert max(b["input_values"].shape[1] for b in got) == 3200
    for batch in got:
        assert batch["input_values"].shape == batch["attention_mask"].shape
        for sound, mask, label in zip(*(batch[k] for k in ("input_values", "attention_mask", "labels")), strict=True):
            real = sound[: mask.sum()]
            assert (sound[mask.sum() :] == 0).all()
            assert abs(float(real.mean())) < 1e-4 and abs(float(real.std()) - 1) < 1e-2
            crossings = (real[1:] * real[:-1] < 0).sum() / (len(real) / 8000) / 2
            assert abs(float(crossings) - (873, 217)[label]) < 20
    again = AudioDataModule(
        str(tmp_path), sampling_rate=16000, resample=True, do_normalize=False, val_size=0, test_size=0
    )
    again.setup("fit")
    batch = batches(again)[0]
    row = int(batch["labels"].tolist().index(1))
    length = int(batch["attention_mask"][row].sum())
    sine = 0.5 * torch.sin(2 * math.pi * 217 * (torch.arange(length) / 16000 - 0.25 / 8000))
    assert (batch["input_values"][row, :length] - sine)[2:-2].abs().max() < 0.01
    assert batch["input_values"].abs().max() < 0.51


def test_audio_errors(tmp_path):
    tone(tmp_path / "rates" / "a" / "1.wav", 0.1)
    tone(tmp_path / "rates" / "a" / "2.wav", 0.1, rate=16000)
    tone(tmp_path / "none" / "a" / "1.wav", 0)
    for name, content in {"broken": b"nothing at all", "short": b""}.items():
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "1.wav").write_bytes(content)
    for name, message in {
        "rates": "sampling_rate=16000, but of 2 train files 1 at 8000 Hz",
        "none": "1.wav has no samples",
        "broken": "1.wav cannot be read as PCM wav",
        "short": "1.wav cannot be read as PCM wav: it ends early",
    }.items():
        with pytest.raises(ConfigError, match=message):
            AudioDataModule(str(tmp_path / name), val_size=0, test_size=0).setup("fit")


def test_under_a_trainer(tmp_path):
    class Net(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(64, 10)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.net(batch["pixel_values"].flatten(1)), batch["labels"])

        def test_step(self, batch, index):
            right = self.net(batch["pixel_values"].flatten(1)).argmax(1) == batch["labels"]
            self.log("accuracy", right.float().mean(), batch_size=len(right))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    data = ImageDataModule("sklearn.datasets.load_digits", rescale_factor=1 / 16, num_channels=1)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer, net = L.Trainer(max_epochs=5, accelerator="cpu", **quiet), Net()
    trainer.fit(net, datamodule=data)
    assert trainer.test(net, datamodule=data, verbose=False)[0]["accuracy"] > 0.9
