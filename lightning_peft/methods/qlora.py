"""QLoRA: LoRA on a base stored in 4 bits (Dettmers et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.methods.lora import LoRA
from lightning_peft.quantized import packed

_FIELDS = {
    "quantization": ("nf4", "fp4"),
    "compute_dtype": ("bfloat16", "float16", "float32"),
}


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA on a base whose linear layers are stored in 4 bits; the factors stay in float32.

    `TaskModule` loads a transformers model so by itself. In your own module load it so, either
    ``from_pretrained(name, **QLoRA().load_options())`` or ``Trainer(plugins=BitsandbytesPrecision("nf4-dq"))``.
    Merging in place is refused; `save_merged` and ``MergeOnFitEnd(dirpath=…)`` write a float model from the original
    base. Other arguments are those of `LoRA`.

    Args:
        quantization: ``nf4`` (quantiles of the normal distribution) or ``fp4``.
        double_quant: quantise the scales, too: 0.37 bits less per number.
        compute_dtype: the base's numbers are unpacked to it for each product.

    Raises:
        ConfigError: at injection, if no target is stored in 4 bits.

    >>> from lightning_peft import QLoRA
    >>> QLoRA(double_quant=False).load_options()["quantization_config"]["bnb_4bit_quant_type"]
    'nf4'
    """

    paper: ClassVar[str] = "QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023, arXiv:2305.14314"
    lr_source: ClassVar[str] = "as LoRA; the paper, arXiv:2305.14314, table 9: 2e-4 up to 13B parameters, 1e-4 above"

    quantization: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    free_fields: ClassVar[frozenset[str]] = LoRA.free_fields | {"quantization", "double_quant", "compute_dtype"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, allowed in _FIELDS.items():
            if getattr(self, option) not in allowed:
                raise ConfigError(f"QLoRA({option}={getattr(self, option)!r}): choose one of {', '.join(allowed)}.")

    def targets(self, model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
        """As `LoRA`; some of them must be in 4 bits."""
        chosen = super().targets(model, prefix)
        if not any(packed(module) == 4 for module in chosen.values()):
            raise ConfigError(
                f"QLoRA: none of the {len(chosen)} targets of {type(model).__name__} is stored in 4 bits. Load the base"
                " so: from_pretrained(name, **QLoRA().load_options()), or give the Trainer"
                " plugins=BitsandbytesPrecision('nf4-dq'); for a float base use LoRA."
            )
        return chosen

    def load_options(self) -> dict[str, Any]:
        """transformers' bitsandbytes configuration, as plain values."""
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.quantization,
                "bnb_4bit_use_double_quant": self.double_quant,
                "bnb_4bit_compute_dtype": self.compute_dtype,
            }
        }
