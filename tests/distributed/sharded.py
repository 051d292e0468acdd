"""Run by two processes: networks built late, on the meta device, or sharded in ways that cannot work."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_peft import (
    PEFT,
    CheckpointError,
    ConfigError,
    LoRA,
    MergeError,
    MergeOnFitEnd,
    PEFTError,
    PrefixTuning,
    TrainingError,
    adapter_state_dict,
    disabled,
    inject_now,
    load_base,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from lightning_peft.sharding import whole as whole_tensor
from tests.contract.battery import same
from tests.distributed.members import METHODS, Late, Member
from tests.distributed.run import rows, run
from tests.lifecycle.test_optional_parts import Sgd
from tests.models import MODELS, plain_loader

OUT = Path(next(iter(sys.argv[1:]), "."))  # none where doctests are looked for


def refused(kind: type[PEFTError], words: str, act) -> None:
    try:
        act()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def late() -> None:
    """Built in configure_model: adapted before it is sharded, or refused."""
    module, eager = Late(), Member()
    run("file", PEFT(METHODS["lora"])).fit(module, rows())
    run("file", PEFT(METHODS["lora"])).fit(eager, rows())
    assert same(adapter_state_dict(module), adapter_state_dict(eager))
    refused(TrainingError, "are not sharded", lambda: run("file", PEFT(LoRA())).fit(Late(adapts=False), rows()))


def by_hand() -> None:
    """The core on a sharded module: saving, merging, switching off, taking out."""
    module = Member()
    fit = run("file", PEFT(METHODS["lora"]))
    fit.fit(module, rows())

    def loss() -> float:
        return fit.test(module, rows(), verbose=False)[0]["test_loss"]

    trained = loss()
    save_adapter(module, OUT / "sharded.safetensors")
    merge(module)
    assert abs(loss() - trained) < 1e-5 and not module.net.bert.pooler.dense._adapter.active
    unmerge(module)
    assert loss() == trained
    batch = next(iter(rows()))
    plain = MODELS["bert"]()(**batch).logits
    with disabled(module):
        torch.testing.assert_close(module.net(**batch).logits, plain)
    assert loss() == trained
    unload(module)
    torch.testing.assert_close(module.net.eval()(**batch).logits, plain)
    assert module.net.state_dict().keys() == MODELS["bert"]().state_dict().keys()


def refusals() -> None:
    """Each says what to do instead."""
    shared = PrefixTuning(num_virtual_tokens=3, projection=True, hidden_size=8)
    refused(TrainingError, "adapters of several layers share", lambda: run("file", PEFT(shared)).fit(Member(), rows()))
    run("file", PEFT(shared), epochs=1).fit(Member(apart=False), rows())
    writes = run("file", PEFT(LoRA()), MergeOnFitEnd(dirpath=str(OUT / "merged")))
    refused(MergeError, "lightning-peft merge", lambda: writes.fit(Member(), rows()))

    class Columns(Member):
        def configure_model(self):
            plan = {"bert.pooler.dense": ColwiseParallel(use_local_output=False)}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    tensor = run("file", PEFT(LoRA()))
    tensor.strategy._data_parallel_size, tensor.strategy._tensor_parallel_size = 1, 2
    refused(TrainingError, "by tensor parallelism", lambda: tensor.fit(Columns(), rows()))


class Hollow(Sgd):
    """Built without values; the base comes from a state dict."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.base = {n: value + seed for n, value in self.net.state_dict().items()}
        self.net = None

    def configure_model(self):
        if self.net is None:
            with torch.device("meta"):
                self.net = Sgd().net
        inject_now(self)
        if not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def on_fit_start(self):
        load_base(self, self.base)

    on_test_start = on_fit_start


def hollow() -> None:
    """As if it had been built with values, resumed and tested from a file of the adapter alone."""

    class Solid(Hollow):
        def configure_model(self):
            if self.net is None:
                self.net = Sgd().net
                self.net.load_state_dict(self.base)
            super().configure_model()

    ends = []
    for kind, name in ((Solid, "solid"), (Hollow, "hollow")):
        module = kind()
        fit = run("shards", PEFT(LoRA(r=4)), use_distributed_sampler=True)
        fit.fit(module, plain_loader())
        fit.save_checkpoint(OUT / name)
        ends.append((adapter_state_dict(module), fit.test(module, plain_loader(), verbose=False)))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    for name in ("solid", "hollow"):
        fit = run("shards", PEFT(LoRA(r=4)), use_distributed_sampler=True)
        assert fit.test(Hollow(), plain_loader(), ckpt_path=OUT / name, verbose=False) == ends[0][1]
        for act in ("fit", "test"):
            go = getattr(run("shards", PEFT(LoRA(r=4)), epochs=3, use_distributed_sampler=True), act)
            refused(CheckpointError, "another base model", partial(go, Hollow(1), plain_loader(), ckpt_path=OUT / name))
        again = run("shards", PEFT(LoRA(r=4)), epochs=3, use_distributed_sampler=True)
        again.fit(Hollow(), plain_loader(), ckpt_path=OUT / name)
        assert again.global_step == 6
    pissa = run("shards", PEFT(LoRA(r=2, init="pissa")))
    refused(ConfigError, "starts from base weights", lambda: pissa.fit(Hollow(), plain_loader()))


def plain() -> None:
    """FullFineTuning resumes what the same Trainer wrote without it, and gives the same weights."""
    for kind in ("file", "shards"):
        whole = Member()
        fit = run(kind, epochs=1)
        fit.fit(whole, rows())
        fit.save_checkpoint(OUT / f"plain-{kind}")
        ends = []
        for callbacks in ([], [PEFT(METHODS["full"])]):
            module = Member()
            again = run(kind, *callbacks, epochs=2)
            again.fit(module, rows(), ckpt_path=OUT / f"plain-{kind}")
            ends.append({n: whole_tensor(p.detach()) for n, p in module.named_parameters()})
        assert same(*ends)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    for part in (late, by_hand, refusals, hollow, plain):
        print(part.__name__, flush=True)
        part()
