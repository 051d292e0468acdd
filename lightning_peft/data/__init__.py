"""Data modules: rows in, padded batches out."""

from lightning_peft.data.text import TextDataModule

__all__ = ["TextDataModule"]
