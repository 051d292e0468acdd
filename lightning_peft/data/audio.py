"""Recordings from folders of wav files."""

from __future__ import annotations

import sys
import wave
from array import array
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.data.base import SplitDataModule
from lightning_peft.data.loaders import Step
from lightning_peft.data.sources import file_tables
from lightning_peft.errors import ConfigError
from lightning_peft.files import locate

if TYPE_CHECKING:
    from datasets import Dataset


class AudioDataModule(SplitDataModule):
    """Recordings and their classes.

    Batches are ``{"input_values": (rows, samples) float32, "attention_mask": (rows, samples), "labels": (rows,)}``,
    padded with zeros to the longest; predict batches have ``meta = {"id": [...]}`` in place of labels.

    Args:
        data: folder of ``<label>/*.wav`` or ``<split>/<label>/*.wav`` (PCM of 8, 16, 24 or 32 bits; channels are
            averaged); predict also takes a folder of wav files.
        label_names: classes in the order of their numbers; by default those of the training rows, sorted.
        sampling_rate: samples a second that the model expects.
        resample: convert other rates by linear interpolation. It has no low-pass filter: going down, what lies above
            half the new rate folds back as noise. Convert files with a proper resampler where that matters.
        max_seconds: keep the beginning of longer recordings.
        do_normalize: give each recording zero mean and unit variance, as Wav2Vec2 expects.
        val_size: rows of the validation split if the source has none: a fraction, or a count.
        test_size: the same for the test split.
        drop_duplicates: drop files equal byte by byte, and in label, before such a split.
        predict_data: what to predict, in any form of ``data``.
        predict_split: which split to predict without ``predict_data``.
        max_train_samples: train on a random subset.
        max_eval_samples: validate and test on random subsets.
        batch_size: recordings of a training batch in one process.
        eval_batch_size: recordings of any other batch; by default ``batch_size``.
        group_by_length: batches of recordings of similar length; see `LengthGroupedBatches`.
        num_workers: processes that read files.
        seed: for the split, subsets and the order of batches.

    Raises:
        ConfigError: a file is no PCM wav, or has another rate and ``resample`` is off.

    >>> AudioDataModule("commands", sampling_rate=8000).max_seconds
    30.0
    """

    label_column = "label"

    def __init__(
        self,
        data: str,
        label_names: list[str] | None = None,
        sampling_rate: int = 16_000,
        resample: bool = False,
        max_seconds: float = 30.0,
        do_normalize: bool = True,
        val_size: int | float = 0.1,
        test_size: int | float = 0.1,
        drop_duplicates: bool = True,
        predict_data: str | None = None,
        predict_split: str = "test",
        max_train_samples: int | None = None,
        max_eval_samples: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        data = str(data)
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.save_hyperparameters(logger=False)
        self._take_fields(given)

    def read(self, data: Any) -> dict[str, Dataset]:
        """Raw rows by split."""
        return file_tables(locate(data), (".wav",))

    def contents(self, rows: Dataset) -> list[Hashable]:
        """Digest and label of each file."""
        return [(sha256(Path(f).read_bytes()).digest(), y) for f, y in zip(rows["file"], rows["label"], strict=True)]

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Numbers for labels and lengths in samples; recordings are read when a batch needs them."""
        headers = {file: _header(file) for file in rows["file"]}
        others = Counter(rate for rate, _ in headers.values() if rate != self.sampling_rate)
        if others and not self.resample:
            found = ", ".join(f"{count} at {rate} Hz" for rate, count in others.most_common(3))
            raise ConfigError(
                f"sampling_rate={self.sampling_rate}, but of {len(headers)} {split} files {found}."
                " Set the rate of the files, convert them, or set resample=True (see its description)."
            )
        lengths = [self._samples(*headers[file]) for file in rows["file"]]
        return self.with_numbers(rows, split, lengths)

    def _samples(self, rate: int, frames: int) -> int:
        return min(round(frames * self.sampling_rate / rate), int(self.max_seconds * self.sampling_rate))

    def collator(self, split: str) -> WaveCollator:
        """Reads, converts and pads."""
        return WaveCollator(self.sampling_rate, self.do_normalize)


@dataclass(frozen=True)
class WaveCollator:
    """Files to ``input_values`` and ``attention_mask`` (rows, samples)."""

    sampling_rate: int
    do_normalize: bool

    def __call__(self, item: tuple[Step, dict[str, list]]) -> dict[str, Any]:
        _, columns = item
        waves = [self._prepare(*row) for row in zip(columns["file"], columns["length"], strict=True)]
        batch: dict[str, Any] = {
            "input_values": pad_sequence(waves, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(w, dtype=torch.long) for w in waves], batch_first=True),
        }
        if "labels" in columns:
            batch["labels"] = torch.tensor(columns["labels"])
        else:
            batch["meta"] = {"id": columns["_id"]}
        return batch

    def _prepare(self, file: str, length: int) -> Tensor:
        rate, sound = read_wave(file)
        if rate != self.sampling_rate:
            size = round(len(sound) * self.sampling_rate / rate)
            sound = F.interpolate(sound[None, None], size, mode="linear", align_corners=False)[0, 0]
        sound = sound[:length]
        return (sound - sound.mean()) / (sound.var(correction=0) + 1e-7).sqrt() if self.do_normalize else sound


def _header(file: str) -> tuple[int, int]:
    """Rate and number of frames.

    Raises:
        ConfigError: not a PCM wav file, or an empty one.
    """
    try:
        with wave.open(file) as source:
            rate, frames = source.getframerate(), source.getnframes()
    except (wave.Error, EOFError) as error:
        raise ConfigError(f"{file} cannot be read as PCM wav: {str(error) or 'it ends early'}.") from None
    if not frames:
        raise ConfigError(f"{file} has no samples.")
    return rate, frames


def read_wave(file: str) -> tuple[int, Tensor]:
    """Rate and samples in [-1, 1), channels averaged."""
    with wave.open(file) as source:
        rate, width, channels = source.getframerate(), source.getsampwidth(), source.getnchannels()
        content = source.readframes(source.getnframes())
    if width == 1:  # the only unsigned one
        sound = (torch.tensor(list(content), dtype=torch.float32) - 128) / 128
    elif width == 3:
        sound = torch.tensor(list(content), dtype=torch.int32).reshape(-1, 3) @ torch.tensor([1, 256, 65536]).int()
        sound = (sound - (sound >= 1 << 23) * (1 << 24)).float() / (1 << 23)
    else:
        numbers = array("h" if width == 2 else "i", content)
        if sys.byteorder == "big":
            numbers.byteswap()
        sound = torch.tensor(numbers).float() / (1 << (8 * width - 1))
    return rate, sound.reshape(-1, channels).mean(1)
