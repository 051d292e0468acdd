"""Data modules: rows in, padded batches out."""

from lightning_peft.data.audio import AudioDataModule
from lightning_peft.data.image import ImageDataModule
from lightning_peft.data.text import TextDataModule

__all__ = ["AudioDataModule", "ImageDataModule", "TextDataModule"]
