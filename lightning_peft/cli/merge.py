"""``lightning-peft merge``: a saved adapter, merged into its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_peft.cli.arguments import Parser


def main(words: Sequence[str]) -> None:
    """Build the base, load the adapter, write the merged model."""
    parser = Parser("merge", "Merge a saved adapter into its base and write the model for from_pretrained.")
    parser.add_argument("CKPT", help="checkpoint, adapter.safetensors, or adapter folder")
    parser.add_argument("DIR", help="folder to write")
    parser.add_argument("--base", help="hub id, folder or .gguf of the base, if the file does not name it")
    given = parser.parse_args(words)
    from lightning_peft.cli.base import open_adapter
    from lightning_peft.files import near
    from lightning_peft.model.summary import size
    from lightning_peft.saving.export import save_merged

    opened = open_adapter(given.CKPT, given.base)
    save_merged(opened.network, given.DIR, opened.tokenizer)
    total = sum(f.stat().st_size for f in Path(given.DIR).expanduser().iterdir() if f.is_file())
    print(f"Written to {near(given.DIR)} ({size(total)})")
    print(f'Use it:  transformers.{type(opened.network).__name__}.from_pretrained("{near(given.DIR)}")')
