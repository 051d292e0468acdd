"""Run by two processes: FSDP on the CPU, where Lightning and torch do not mean it to run.

Lightning refuses the CPU for `FSDPStrategy` itself, torch wants a device, gathering a full state dict crashes, and
gathered Adam states share one buffer on the CPU: the subclass gives the device and gathers in another way, and the
optimizer has one state for each tensor. Everything else is as on a GPU.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers.models.bert.modeling_bert import BertLayer

from lightning_peft import (
    PEFT,
    CheckpointError,
    FSDPWrapPolicy,
    LogAdapter,
    MergeError,
    MergeOnFitEnd,
    PEFTError,
    TrainabilityCheck,
    TrainingError,
    adapter_state_dict,
)
from lightning_peft.sharding import unwrapped
from tests.distributed.members import METHODS, Member
from tests.distributed.run import rows
from tests.distributed.run import run as everywhere
from tests.distributed.sharded import refused
from tests.models import trainer

OUT = Path(next(iter(sys.argv[1:]), "."))  # none where doctests are looked for


class OnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FSDP(model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs)

    def lightning_module_state_dict(self):
        with FSDP.summon_full_params(self.model, writeback=False):
            return {unwrapped(n): p.detach().clone() for n, p in self.model.named_parameters()}


class Descending(Member):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def run(*callbacks, epochs=2, policy=True, **options):
    kwargs = {"auto_wrap_policy": FSDPWrapPolicy({BertLayer})} if policy else {}
    strategy = OnCPU(state_dict_type=options.pop("state_dict_type", "full"), **kwargs)
    options = {"devices": 2, "use_distributed_sampler": False, "max_epochs": epochs, **options}
    return trainer(OUT, *callbacks, strategy=strategy, **options)


def life(name: str, policy: bool) -> None:
    """Fit, save, resume."""
    module, again, path = Descending(), Descending(), OUT / f"{name}-{policy}.ckpt"
    fit = run(PEFT(METHODS[name]), TrainabilityCheck(), LogAdapter(), policy=policy)
    fit.fit(module, rows())
    refused(PEFTError, "flattened the parameters", lambda: adapter_state_dict(module))
    fit.save_checkpoint(path)
    if policy and name in ("lora", "houlsby"):
        assert any(isinstance(m, FSDP) and n.endswith("delta") for n, m in module.named_modules()), "kept apart"
    first = run(PEFT(METHODS[name]), epochs=1, policy=policy)
    first.fit(Descending(), rows())
    first.save_checkpoint(OUT / "first.ckpt")
    second = run(PEFT(METHODS[name]), policy=policy)
    second.fit(again, rows(), ckpt_path=OUT / "first.ckpt")
    second.save_checkpoint(OUT / "second.ckpt")
    a, b = (torch.load(p, weights_only=True)["state_dict"] for p in (path, OUT / "second.ckpt"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "resume is not exact"
    moved = run(PEFT(METHODS[name]), policy=policy)
    ddp = everywhere("ddp", PEFT(METHODS[name]), epochs=1)
    ddp.fit(Descending(), rows())
    ddp.save_checkpoint(OUT / "ddp.ckpt")
    moved.fit(Descending(), rows(), ckpt_path=OUT / "ddp.ckpt")
    moved.save_checkpoint(OUT / "moved.ckpt")
    for key, value in torch.load(OUT / "moved.ckpt", weights_only=True)["state_dict"].items():
        torch.testing.assert_close(value, a[key], atol=1e-5, rtol=1e-3, msg=key)


def refusals() -> None:
    wrong = run(PEFT(METHODS["lora"]))
    refused(
        CheckpointError, "another base", lambda: wrong.fit(Descending(seed=1), rows(), ckpt_path=OUT / "lora-True.ckpt")
    )
    for callbacks, kind, words, options in (
        ([PEFT(METHODS["adalora"])], TrainingError, "Use ModelParallelStrategy", {}),
        ([PEFT(METHODS["lora"])], TrainingError, "state_dict_type='full'", {"state_dict_type": "sharded"}),
        ([PEFT(METHODS["lora"]), MergeOnFitEnd()], MergeError, "lightning-peft merge", {}),
    ):
        refused(kind, words, lambda c=callbacks, o=options: run(*c, **o).fit(Descending(), rows()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    for name, policy in (("lora", True), ("houlsby", True), ("prefix", True), ("lora", False)):
        print(name, policy, flush=True)
        life(name, policy)
    refusals()
