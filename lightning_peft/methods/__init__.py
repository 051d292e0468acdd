"""The methods: one file each, one export line each."""

from lightning_peft.methods.full import FullFineTuning as FullFineTuning
from lightning_peft.methods.lora import LoRA as LoRA
