"""What the processes of a distributed test share: modules that shard themselves, methods, strategies."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_peft import (
    IA3,
    AdaLoRA,
    DeltaLoRA,
    FullFineTuning,
    Houlsby,
    LoRA,
    PrefixTuning,
    PromptTuning,
    inject_now,
)
from tests.models import MODELS, Foreign

#: one method of every family at least
METHODS = {
    "lora": LoRA(r=2, modules_to_save="classifier"),
    "houlsby": Houlsby(),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "adalora": AdaLoRA(init_r=3, target_r=2),
    "deltalora": DeltaLoRA(r=2, start_step=1),
    "ia3": IA3(),
    "full": FullFineTuning(),
}


class Member(Foreign):
    """`Foreign` with an optimizer that rounding does not upset, predictions as rows, and its network sharded."""

    def __init__(self, kind: str = "bert", seed: int = 0, apart: bool = True) -> None:
        super().__init__(kind, seed=seed)
        self.apart = apart

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)

    def configure_model(self):
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self, self.net, self.apart)

    def predict_step(self, batch, index):
        batch.pop("labels")
        scores = self.net(**batch).logits[:, 0]
        return [{"row": int(i), "score": float(s)} for i, s in zip(batch["input_ids"][:, 0], scores, strict=True)]


class Late(Member):
    """Builds its network in ``configure_model``, on whatever device Lightning says, and shards it there."""

    def __init__(self, adapts: bool = True) -> None:
        super().__init__()
        self.net, self.adapts = None, adapts

    def configure_model(self):
        if self.net is None:
            self.net = MODELS["bert"](0)
        if self.adapts:
            inject_now(self)
        super().configure_model()


def shard(module: L.LightningModule, net: torch.nn.Module, apart: bool) -> None:
    """FSDP2 on each layer and on the rest."""
    if isinstance(net, FSDPModule):
        return
    mesh = module.device_mesh["data_parallel"]
    for layer in net.bert.encoder.layer if apart else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def strategy(name: str) -> object:
    """By the name used in the tests."""
    if name == "ddp":
        return "ddp"
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=name == "shards"
    )
