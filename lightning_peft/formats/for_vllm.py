"""What vLLM reads of a folder of peft's: LoRA of one rank on a language model, and nothing beside it.

vLLM refuses modules trained in full and DoRA when it loads a folder. Other fields it does not know it passes over, and
the results would silently be others, so they are refused here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.errors import PEFTError

#: ranks that vLLM can be started with
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_for_vllm(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless vLLM would compute what was trained.

    Args:
        config: what is to become ``adapter_config.json``.
        tensors: the adapter's, by their keys in peft.

    Raises:
        PEFTError: says what vLLM does not take.

    >>> check_for_vllm({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "use_dora": True}, {})
    Traceback (most recent call last):
    lightning_peft.errors.PEFTError: vLLM does not take this adapter: it has no DoRA. lightning-peft merge CKPT DIR ...
    """
    faults = []
    if config["peft_type"] != "LORA":
        faults.append(f"it reads LoRA only, and this is {config['peft_type']}")
    if config.get("use_dora"):
        faults.append("it has no DoRA")
    if config.get("modules_to_save"):
        faults.append(f"it takes no module trained in full ({', '.join(config['modules_to_save'])})")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        faults.append("it has one rank and one alpha for all layers")
    if config.get("bias", "none") != "none":
        faults.append("it takes no biases")
    if any("lora_embedding" in key for key in tensors):
        faults.append("it adapts no embeddings")
    if int(config.get("r") or 0) > max(RANKS):
        faults.append(f"its highest rank is {max(RANKS)}, and this has {config['r']}")
    if faults:
        raise PEFTError(
            f"vLLM does not take this adapter: {'; '.join(faults)}. lightning-peft merge CKPT DIR (in Python"
            " save_merged(model, folder)) writes a whole model, which it serves as any other."
        )
