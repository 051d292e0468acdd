"""``lightning-peft export``: a saved adapter as a folder for peft."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.cli.arguments import Parser
from lightning_peft.cli.terminal import filled, width_of

_AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}


def main(words: Sequence[str]) -> None:
    """Build the base, load the adapter, write the folder."""
    parser = Parser("export", "Write a saved adapter as a folder that peft reads, with a model card.")
    parser.add_argument("CKPT", help="checkpoint, adapter.safetensors, or adapter folder")
    parser.add_argument("DIR", help="folder to write")
    parser.add_argument("--base", help="hub id, folder or .gguf of the base, if the file does not name it")
    parser.add_argument("--base_name", help="what the folder calls the base: its hub id, where others are to load it")
    reader = {"dest": "reader", "choices": ("peft", "vllm"), "default": "peft", "help": "what shall read it (peft)"}
    parser.add_argument("--for", **reader)
    given = parser.parse_args(words)
    from lightning_peft.cli.base import open_adapter
    from lightning_peft.files import near
    from lightning_peft.formats.folder import CONFIG
    from lightning_peft.formats.peft import export_peft

    opened = open_adapter(given.CKPT, given.base)
    known = {"data": opened.data, "metrics": opened.metrics, "tokenizer": opened.tokenizer}
    export_peft(opened.network, given.DIR, **known, base_name=given.base_name, reader=given.reader)
    folder = near(given.DIR)
    files = ", ".join(sorted(os.listdir(Path(given.DIR).expanduser())))
    print(filled(f"Written to {folder}: {files}", width_of(sys.stdout)))
    print(filled(f"Use it:  {_use(opened.network, folder, given.reader)}", width_of(sys.stdout)))
    config = json.loads((Path(given.DIR).expanduser() / CONFIG).read_text())
    base = config["base_model_name_or_path"]
    if base and os.path.exists(base):
        print(filled(f"The base is named by its path here: {base}", width_of(sys.stdout)))
        print("Where others are to find it, give its id on the hub: --base_name ID")


def _use(network: Any, folder: str, reader: str) -> str:
    """What loads the folder."""
    from lightning_peft.formats.naming import task_of

    if reader == "vllm":
        return f"vllm serve BASE --enable-lora --lora-modules adapter={folder}"
    auto = _AUTO.get(task_of(network) or "")
    if auto is None:
        return f'peft.PeftModel.from_pretrained(base, "{folder}")'
    # transformers gives a new head two outputs unless it is told
    heads = auto in ("AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification")
    labels = f", num_labels={network.config.num_labels}" if heads and network.config.num_labels != 2 else ""
    return f'peft.{auto}.from_pretrained("{folder}"{labels})'
