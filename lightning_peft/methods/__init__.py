"""The methods: one file each, one export line each."""

from lightning_peft.methods.full import FullFineTuning as FullFineTuning
from lightning_peft.methods.lora import LoRA as LoRA
from lightning_peft.methods.prefix_tuning import PrefixTuning as PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning as PromptTuning
from lightning_peft.methods.ptuning import PTuning as PTuning
from lightning_peft.methods.ptuning_v2 import PTuningV2 as PTuningV2
