"""``lightning-peft export``: a saved adapter as a folder for peft."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.cli.arguments import Parser


def main(words: Sequence[str]) -> None:
    """Build the base, load the adapter, write the folder."""
    parser = Parser("export", "Write a saved adapter as a folder that peft reads, with a model card.")
    parser.add_argument("CKPT", help="checkpoint, adapter.safetensors, or adapter folder")
    parser.add_argument("DIR", help="folder to write")
    parser.add_argument("--base", help="hub id, folder or .gguf of the base, if the file does not name it")
    given = parser.parse_args(words)
    from lightning_peft.cli.base import open_adapter
    from lightning_peft.files import near
    from lightning_peft.formats.peft import export_peft

    opened = open_adapter(given.CKPT, given.base)
    export_peft(opened.network, given.DIR, data=opened.data, metrics=opened.metrics)
    print(f"Written to {near(given.DIR)}: adapter_config.json, adapter_model.safetensors, README.md")
    print(f'Use it:  peft.PeftModel.from_pretrained(base, "{near(given.DIR)}")')
