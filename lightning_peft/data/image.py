"""Images from folders and arrays."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.data.arrays import from_function, from_npz, is_function
from lightning_peft.data.base import SplitDataModule
from lightning_peft.data.loaders import Step
from lightning_peft.data.sources import file_tables
from lightning_peft.errors import ConfigError
from lightning_peft.files import locate
from lightning_peft.requirements import require_package

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class ImageDataModule(SplitDataModule):
    """Images and their classes.

    Batches are ``{"pixel_values": (rows, channels, height, width) float32, "labels": (rows,)}``; predict batches have
    ``meta = {"id": [...]}`` in place of labels.

    Args:
        data: folder of ``<label>/*.png|jpg`` or ``<split>/<label>/*`` (predict also takes a folder of images), an
            ``.npz`` file, or the import path of a function that returns (images, labels) or a mapping with such
            arrays: ``sklearn.datasets.load_digits``. ``pkg://`` paths are taken too.
        label_names: classes in the order of their numbers; by default those of the training rows, sorted.
        image_size: resize to this height and width (bilinear, antialiased).
        num_channels: 3, or 1 for grey; grey images are repeated, coloured ones averaged.
        rescale_factor: multiplies the stored values; by default 1/255 for bytes and 1 for anything else.
        image_mean: subtracted after rescaling, one number or one a channel.
        image_std: divides after that.
        val_size: rows of the validation split if the source has none: a fraction, or a count.
        test_size: the same for the test split.
        drop_duplicates: drop images equal byte by byte, and in label, before such a split.
        predict_data: what to predict, in any form of ``data``.
        predict_split: which split to predict without ``predict_data``.
        max_train_samples: train on a random subset.
        max_eval_samples: validate and test on random subsets.
        batch_size: images of a training batch in one process.
        eval_batch_size: images of any other batch; by default ``batch_size``.
        num_workers: processes that read and resize images.
        seed: for the split, subsets and the order of batches.

    >>> ImageDataModule("sklearn.datasets.load_digits", rescale_factor=1 / 16, image_size=32).label_column
    'label'
    """

    label_column = "label"
    group_by_length = False
    import_fields: ClassVar = {"data": is_function, "predict_data": is_function}

    def __init__(
        self,
        data: str,
        label_names: list[str] | None = None,
        image_size: int | None = None,
        num_channels: int = 3,
        rescale_factor: float | None = None,
        image_mean: float | list[float] = 0.5,
        image_std: float | list[float] = 0.5,
        val_size: int | float = 0.1,
        test_size: int | float = 0.1,
        drop_duplicates: bool = True,
        predict_data: str | None = None,
        predict_split: str = "test",
        max_train_samples: int | None = None,
        max_eval_samples: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        data = str(data)
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.save_hyperparameters(logger=False)
        self._take_fields(given)
        if num_channels not in (1, 3):
            raise ConfigError(f"num_channels={num_channels}: choose 1 or 3.")

    def read(self, data: Any) -> dict[str, Dataset]:
        """Raw rows by split: files, or pixels as bytes."""
        place = locate(data)
        if is_function(data):
            return from_function(data)
        return from_npz(place) if place.suffix == ".npz" and os.path.exists(place) else file_tables(place, SUFFIXES)

    def contents(self, rows: Dataset) -> list[Hashable]:
        """Digest and label of each image."""
        files = "file" in rows.column_names
        column, labels = rows["file" if files else "pixels"], rows["label"]
        return [(sha256(Path(c).read_bytes() if files else c).digest(), y) for c, y in zip(column, labels, strict=True)]

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Numbers for labels; images are read when a batch needs them."""
        if self.image_size is None and "file" in rows.column_names:
            _one_size(rows["file"])
        return self.with_numbers(rows, split, [1] * len(rows))

    def collator(self, split: str) -> PixelCollator:
        """Reads, resizes and normalises."""
        mean, std = (torch.as_tensor(v).float().reshape(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return PixelCollator(self.num_channels, self.image_size, self.rescale_factor, mean, std)


@dataclass(frozen=True)
class PixelCollator:
    """Files or bytes to ``pixel_values`` (rows, channels, height, width)."""

    num_channels: int
    image_size: int | None
    rescale_factor: float | None
    mean: Tensor
    std: Tensor

    def __call__(self, item: tuple[Step, dict[str, list]]) -> dict[str, Any]:
        _, columns = item
        stored = (
            zip(columns["pixels"], columns["shape"], columns["dtype"], strict=True) if "pixels" in columns else None
        )
        images = [_decode(*row) for row in stored] if stored else [_open(file) for file in columns["file"]]
        batch: dict[str, Any] = {"pixel_values": torch.stack([self._prepare(image) for image in images])}
        if "labels" in columns:
            batch["labels"] = torch.tensor(columns["labels"])
        else:
            batch["meta"] = {"id": columns["_id"]}
        return batch

    def _prepare(self, image: Tensor) -> Tensor:
        """(channels, height, width) as stored -> as the model wants it."""
        whole = 1 / 255 if image.dtype == torch.uint8 else 1.0
        image = image.float() * (whole if self.rescale_factor is None else self.rescale_factor)
        if image.shape[0] != self.num_channels:
            image = image[:3].mean(0, keepdim=True).expand(self.num_channels, -1, -1)
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return (image - self.mean) / self.std


def _decode(pixels: bytes, shape: list[int], dtype: str) -> Tensor:
    import numpy as np

    image = np.frombuffer(pixels, dtype).reshape(shape)
    if len(shape) == 2:
        return torch.tensor(image)[None]
    if shape[-1] in (1, 3, 4):
        image = image.transpose(2, 0, 1)
    elif shape[0] not in (1, 3, 4):
        raise ConfigError(
            f"An image has shape {tuple(shape)}: neither the first nor the last axis can be its channels."
        )
    return torch.tensor(image)


def _open(file: str) -> Tensor:
    import numpy as np

    Image = require_package("PIL.Image", f"The image file {file}")
    try:
        with Image.open(file) as image:
            return (
                torch.tensor(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
                .reshape(image.height, image.width, -1)
                .permute(2, 0, 1)
            )
    except OSError as error:
        raise ConfigError(f"{file} cannot be read as an image: {error}") from None


def _one_size(files: Any) -> None:
    """Raise early where images could not be stacked."""
    Image = require_package("PIL.Image", "A folder of image files")
    first = None
    for file in files:
        try:
            with Image.open(file) as image:
                size = image.size
        except OSError as error:
            raise ConfigError(f"{file} cannot be read as an image: {error}") from None
        first = first or (file, size)
        if size != first[1]:
            raise ConfigError(f"{first[0]} is {first[1]} pixels, {file} is {size}; set image_size to resize them.")
