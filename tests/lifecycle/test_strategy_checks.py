"""What strategies are told and refused before anything runs. DeepSpeed needs a GPU: here a stand-in has its name."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lightning_peft import (
    PEFT,
    AdaLoRA,
    CheckpointError,
    Compacter,
    FSDPWrapPolicy,
    LoRA,
    MergeError,
    MergeOnFitEnd,
    PEFTError,
    PrefixTuning,
    TrainingError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
)
from lightning_peft.trainer.optimizer_states import NamedStates
from lightning_peft.trainer.strategies import check_methods
from tests.contract.battery import same
from tests.models import Foreign, Plain, bert, loader, plain_loader, trainer


class Unheard(SingleDeviceStrategy):
    """Not known, once the list of the known ones is shortened."""


def test_unknown_strategies(tmp_path, monkeypatch):
    """Refused, unless allowed; relatives of known ones pass."""
    monkeypatch.setattr("lightning_peft.trainer.strategies.KNOWN", ("DeepSpeedStrategy",))
    run = trainer(tmp_path, PEFT(LoRA()), strategy=Unheard("cpu"))
    with pytest.raises(TrainingError, match=r"Unheard is not among .*PEFT\(\.\.\., allow_untested=True\)"):
        run.fit(Plain(), plain_loader())
    trainer(tmp_path, PEFT(LoRA(), allow_untested=True), strategy=Unheard("cpu"), max_epochs=1).fit(
        Plain(), plain_loader()
    )
    monkeypatch.undo()
    trainer(tmp_path, PEFT(LoRA()), strategy=Unheard("cpu"), max_epochs=1).fit(Plain(), plain_loader())


def like_deepspeed(tmp_path, *callbacks):
    """A Trainer whose strategy says that it is DeepSpeed; nothing is run with it."""
    run = trainer(tmp_path, *callbacks)
    run.strategy.__class__ = type("DeepSpeedStrategy", (DeepSpeedStrategy,), {"broadcast": lambda self, x: x})
    run.strategy.load_full_weights = False
    return run


def test_deepspeed(tmp_path):
    """Its checkpoints are told to leave frozen weights out, its sections are compared, foreign files refused."""
    saved = trainer(tmp_path, PEFT(LoRA()), max_epochs=1)
    saved.fit(Plain(), plain_loader())
    saved.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    rest = {k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")}
    module, callback = Plain(), PEFT(LoRA())
    run = module.trainer = like_deepspeed(tmp_path, callback)
    callback.setup(run, module, "fit")
    assert run.strategy.exclude_frozen_parameters is True
    module.on_load_checkpoint(dict(rest))  # as its engine gives it back: without weights
    rest["lightning_peft"]["methods"][0]["config"]["r"] = 3
    with pytest.raises(CheckpointError, match=r"r=3 \(here 8\)"):
        module.on_load_checkpoint(dict(rest))
    with pytest.raises(CheckpointError, match=r"is not by DeepSpeed.*PEFT\(init_from=PATH\)"):
        run.strategy.load_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(PEFTError, match="flattened the parameters"):
        adapter_state_dict(module)
    with pytest.raises(MergeError, match="lightning-peft merge CKPT DIR"):
        MergeOnFitEnd().setup(run, module, "fit")
    other, adaptive = Plain(), PEFT(AdaLoRA(init_r=3, target_r=2))
    run = like_deepspeed(tmp_path, adaptive)
    adaptive.setup(run, other, "fit")
    with pytest.raises(TrainingError, match=r"AdaLoRA works on whole adapters.*Use ModelParallelStrategy"):
        adaptive.on_fit_start(run, other)
    inject(third := Plain(), LoRA(r=2, init="pissa"))
    with pytest.raises(TrainingError, match=r"frozen tensors \(net.0.delta.start_A"):
        check_methods(run, third)
    folder = tmp_path / "deepspeed.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "latest").write_text("checkpoint")
    with pytest.raises(CheckpointError, match="convert_zero_checkpoint_to_fp32_state_dict"):
        load_adapter(Plain(), folder)


@pytest.mark.parametrize(
    "method",
    [Compacter(), PrefixTuning(num_virtual_tokens=3, projection=True, hidden_size=8)],
    ids=lambda m: type(m).__name__,
)
def test_a_file_that_deepspeed_converted_holds_shared_tensors_under_all_their_names(method, tmp_path):
    """Its converter adds the names that the module knows for one tensor; every way to load takes them."""
    saved = trainer(tmp_path, PEFT(method), max_epochs=1)
    module = Foreign()
    saved.fit(module, loader("bert"))
    loss = saved.test(module, loader("bert"), verbose=False)
    saved.save_checkpoint(tmp_path / "a.ckpt")
    trained = adapter_state_dict(module)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = content["state_dict"]
    first_names = {id(p): n for n, p in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first_names[id(parameter)] in state:
            state[name] = state[first_names[id(parameter)]]
    assert len(state) > len(trained), "nothing is shared: this test shows nothing"
    torch.save(content, tmp_path / "converted.ckpt")

    bare, adapted = Foreign(), Foreign()
    load_adapter(bare, tmp_path / "converted.ckpt")
    reloaded = load_from_checkpoint(Foreign, tmp_path / "converted.ckpt")
    for other in (bare, reloaded):
        assert same(adapter_state_dict(other), trained)
    run = trainer(tmp_path, PEFT(method))
    assert run.test(adapted, loader("bert"), ckpt_path=tmp_path / "converted.ckpt", verbose=False) == loss

    copied = next(n for n in state if n not in trained)
    state[copied] = state[copied].clone()  # equal, but a tensor of its own: nobody knows what it is for
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=f"it has in excess {copied}"):
        load_adapter(Foreign(), tmp_path / "odd.ckpt")


def test_wrap_policy():
    """Blocks and called adapters are wrapped; factors that a convolution reads are not."""
    net = nn.Sequential(bert(), nn.Conv1d(4, 4, 1))
    inject(net, LoRA(r=2, target_modules=["attention", "1"]))
    block = net[0].bert.encoder.layer[0]
    policy = FSDPWrapPolicy({type(block)})
    for module in net.modules():
        assert policy(module, True, 0)
    chosen = {name for name, module in net.named_modules() if policy(module, False, 0)}
    assert "0.bert.encoder.layer.0" in chosen and "0.bert.encoder.layer.0.attention.self.query.delta" in chosen
    assert "1.delta" not in chosen and all(n.endswith("delta") or n[-1].isdigit() for n in chosen)


def test_optimizer_states_go_by_name():
    """Another order is put right; other tensors and other groups are refused."""
    state = {"state": {0: "a", 1: "b", 2: "c"}, "param_groups": [{"lr": 1, "params": [0, 1]}, {"lr": 2, "params": [2]}]}
    named = NamedStates.from_optimizer_order(state, [["a", "b"], ["c"]])
    moved = named.arranged_as([["b", "a"], ["c"]], "x").to_optimizer_order()
    assert moved["state"] == {0: "b", 1: "a", 2: "c"} and [g["params"] for g in moved["param_groups"]] == [[0, 1], [2]]
    assert NamedStates.from_names(named.to_names(), named.names).to_optimizer_order() == state
    for names, words in (
        ([["a", "b"], ["d"]], "they differ in c, d"),
        ([["a", "b", "c"], []], "grouped in another way"),
    ):
        with pytest.raises(CheckpointError, match=rf"{words}.*init_from=PATH"):
            named.arranged_as(names, "x")


def test_states_that_count_the_parameters_of_the_model():
    """As FSDP and ModelParallel number them."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    state = {"state": {1: "m", 2: "n"}, "param_groups": [{"lr": 1, "params": [2, 1]}]}
    named = NamedStates.from_model_order(state, net, [["1.weight", "0.bias"]])
    assert named.tensors == {"0.bias": "m", "1.weight": "n"}
    assert named.to_optimizer_order() == {"state": {1: "m", 0: "n"}, "param_groups": [{"lr": 1, "params": [0, 1]}]}


def test_another_optimizer_is_refused(tmp_path):
    """A resume with other groups does not load moments into the wrong tensors."""

    class Grouped(Plain):
        def configure_optimizers(self):
            a, b, c, d = (p for p in self.parameters() if p.requires_grad)
            return torch.optim.AdamW([{"params": [a, d]}, {"params": [b, c]}], lr=1e-2)

    class Turned(Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad][::-1], lr=1e-2)

    def resumed(kind):
        module = kind()
        trainer(tmp_path, PEFT(LoRA()), max_epochs=2).fit(module, plain_loader(), ckpt_path=tmp_path / "a.ckpt")
        return adapter_state_dict(module)

    class Straight(Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    first = trainer(tmp_path, PEFT(LoRA()), max_epochs=1)
    first.fit(Straight(), plain_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    for name, value in resumed(Straight).items():
        torch.testing.assert_close(value, resumed(Turned)[name])
    with pytest.raises(CheckpointError, match="grouped in another way"):
        resumed(Grouped)
