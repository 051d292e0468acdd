"""The methods: one file each, one export line each."""

from lightning_peft.methods.adalora import AdaLoRA as AdaLoRA
from lightning_peft.methods.adapter_fusion import AdapterFusion as AdapterFusion
from lightning_peft.methods.bitfit import BitFit as BitFit
from lightning_peft.methods.compacter import Compacter as Compacter
from lightning_peft.methods.compacter_plus_plus import CompacterPlusPlus as CompacterPlusPlus
from lightning_peft.methods.deltalora import DeltaLoRA as DeltaLoRA
from lightning_peft.methods.dora import DoRA as DoRA
from lightning_peft.methods.full import FullFineTuning as FullFineTuning
from lightning_peft.methods.houlsby import Houlsby as Houlsby
from lightning_peft.methods.ia3 import IA3 as IA3
from lightning_peft.methods.lora import LoRA as LoRA
from lightning_peft.methods.lorafa import LoRAFA as LoRAFA
from lightning_peft.methods.parallel_adapter import ParallelAdapter as ParallelAdapter
from lightning_peft.methods.pfeiffer import Pfeiffer as Pfeiffer
from lightning_peft.methods.prefix_tuning import PrefixTuning as PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning as PromptTuning
from lightning_peft.methods.ptuning import PTuning as PTuning
from lightning_peft.methods.ptuning_v2 import PTuningV2 as PTuningV2
from lightning_peft.methods.qlora import QLoRA as QLoRA
from lightning_peft.methods.vera import VeRA as VeRA
