"""AdaLoRA against peft's numbers: outputs, loss term, and the allocator on scripted gradients."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    AdaLoRA,
    ConfigError,
    TrainingError,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    summarize,
)
from lightning_peft.methods.adalora import AdaLoRAFactors
from tests.contract.battery import same
from tests.golden_case import Golden, adapter_parameters
from tests.models import Foreign, loader, logits, trainer

#: the battery asks that every tensor moves: too few triplets may go for a whole matrix to lose all of its own
BATTERY_FIELDS = {"init_r": 6, "target_r": 5}


def factors(model: nn.Module) -> list[AdaLoRAFactors]:
    return [m for m in model.modules() if isinstance(m, AdaLoRAFactors)]


def kept(model: nn.Module) -> int:
    return sum(int((d.lora_E != 0).sum()) for d in factors(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden(attention):
    case = Golden("adalora_qv_bert", attention)
    h, model = case.meta["hyperparameters"], case.model()
    method = AdaLoRA(init_r=h["init_r"], target_r=h["target_r"], alpha=h["alpha"], target_modules=h["targets"])
    inject(model, method)
    parameters = adapter_parameters(case, model)
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    case.check(model, parameters)
    term, weight = case.tensors["loss.orthogonality"], h["orth_reg_weight"]
    torch.testing.assert_close(method.regularizer(model), weight * term, atol=1e-5, rtol=0)
    merge(model)
    for key, value in case.part("output.merged_weight").items():
        torch.testing.assert_close(model.get_submodule(key).weight.data, value, atol=2e-6, rtol=0)


def test_golden_allocator():
    """Budget, choice and parameters of every step of a scripted run; statistics go after the final choice."""
    case = Golden("adalora_rank_allocator")
    h, model = case.meta["hyperparameters"], case.model()
    method = AdaLoRA(
        init_r=h["init_r"],
        target_r=h["target_r"],
        alpha=h["alpha"],
        tinit=h["tinit"],
        tfinal=h["tfinal"],
        delta_t=h["deltaT"],
        beta1=h["beta1"],
        beta2=h["beta2"],
    )
    inject(model, method)
    parameters = adapter_parameters(case, model)
    atol = case.meta["tolerance"]["suggested_atol"]
    torch.testing.assert_close(case.run(model), case.tensors["output.adapted"], atol=atol, rtol=0)
    for step in case.meta["steps"]:
        t = step["step"]
        for key, p in parameters.items():
            p.grad = case.tensors[f"step{t:02d}.grad.{key}"].reshape(p.shape).clone()
            p.data -= h["sgd_lr"] * p.grad
        method.after_step(model, t + 1, h["total_step"])
        for key, value in case.part(f"step{t:02d}.param").items():
            torch.testing.assert_close(parameters[key].data, value.reshape(parameters[key].shape), atol=atol, rtol=0)
        if step["budget"] is not None:
            assert method.budget(t, h["total_step"], 3) == step["budget"]
        for name, mask in (step["kept"] or {}).items():
            ours = model.get_submodule(name.removesuffix(".lora_E")).delta.lora_E != 0
            assert ours.long().tolist() == mask, (t, name)
    final = {n: [bool(x) for x in m] for n, m in case.meta["final_rank_pattern"].items()}
    for name, mask in final.items():
        delta = model.get_submodule(name.removesuffix(".lora_E")).delta
        assert delta.kept.tolist() == mask and not delta.importance
    torch.testing.assert_close(case.run(model), case.tensors["output.final"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "fields", [{}, {"tinit": 3, "tfinal": 5}, {"delta_t": 7}, {"tfinal": 19}, {"target_r": 6}], ids=str
)
def test_ends_at_the_budget(fields, tmp_path):
    """The callback knows the length of the run; the last allocation leaves the budget, not a triplet more."""
    module, method = Foreign(), AdaLoRA(**{"init_r": 6, "target_r": 2} | fields)
    trainer(tmp_path, PEFT(method), max_epochs=5).fit(module, loader("bert"))
    assert module.trainer.global_step == 20
    assert kept(module) == method.target_r * len(factors(module))


def test_resume_in_the_middle_of_pruning(tmp_path):
    """Importance travels with the checkpoint: the same choice and the same bits as without the break."""

    class Cut(L.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = trainer.current_epoch == 1

    method, plan = AdaLoRA(init_r=6, target_r=2, tfinal=3), {"max_epochs": 5}
    straight, first, second = Foreign(), Foreign(), Foreign()
    trainer(tmp_path, PEFT(method), **plan).fit(straight, loader("bert"))
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_epochs=1)
    trainer(tmp_path, PEFT(method), saver, Cut(), **plan).fit(first, loader("bert"))
    assert 2 * len(factors(first)) < kept(first) < 6 * len(factors(first))
    trainer(tmp_path, PEFT(method), **plan).fit(second, loader("bert"), ckpt_path=tmp_path / "cut.ckpt")
    assert same(adapter_state_dict(straight), adapter_state_dict(second))
    assert kept(second) == 2 * len(factors(second))
    fresh = Foreign()
    second.trainer.save_checkpoint(tmp_path / "end.ckpt")
    load_adapter(fresh, tmp_path / "end.ckpt")
    assert torch.equal(logits(fresh.net, "bert"), logits(straight.net, "bert"))


def test_without_a_known_length_nothing_is_pruned():
    net, method = nn.Sequential(nn.Linear(4, 4)), AdaLoRA(init_r=3, target_r=1)
    inject(net, method)
    net[0].delta.lora_E.data.fill_(1.0)
    for step in range(1, 20):
        method.after_step(net, step, None)
    assert kept(net) == 3 and not net[0].delta.importance


def test_loss_term_without_outputs_loss(tmp_path):
    """peft adds the term to `outputs.loss` only; here it reaches every module's own loss."""
    losses = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, *_):
            losses.append(sum(float(t) for d in factors(module) for t in d.orthogonality()))

    run = trainer(tmp_path, PEFT(AdaLoRA(init_r=4, target_r=4, orth_reg_weight=5.0)), Watch(), max_epochs=10)
    run.fit(Foreign(), loader("bert"))
    assert losses[-1] < 0.8 * losses[0]


def test_schedules_that_cannot_be():
    with pytest.raises(ConfigError, match="target_r must be between 1 and 4"):
        AdaLoRA(init_r=4, target_r=5)
    net, method = nn.Sequential(nn.Linear(4, 4)), AdaLoRA(tinit=8, tfinal=4)
    inject(net, method)
    with pytest.raises(ConfigError, match=r"leaves no step to prune in, the run has 10"):
        method.after_step(net, 1, 10)


@pytest.mark.parametrize("before", [True, False])
def test_manual_optimization(before, tmp_path):
    """Importance comes from the gradients of the step: dropped right after it, nothing could be measured."""

    class Manual(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            if before:
                optimizer.zero_grad()
            self.manual_backward(self.net(**batch).loss)
            optimizer.step()
            if not before:
                optimizer.zero_grad()

    module, run = Manual(), trainer(tmp_path, PEFT(AdaLoRA(init_r=6, target_r=2)), max_epochs=2)
    if before:
        run.fit(module, loader("bert"))
        assert kept(module) == 2 * len(factors(module))
    else:
        with pytest.raises(TrainingError, match=r"call zero_grad\(\) before the backward pass"):
            run.fit(module, loader("bert"))


def test_a_skipped_step():
    """Under a GradScaler a step with an overflow is not taken; its gradients must not spoil the statistics."""
    torch.manual_seed(0)
    net, method = nn.Sequential(nn.Linear(4, 4)), AdaLoRA(init_r=3, target_r=1)
    inject(net, method)
    delta = net[0].delta
    for step in range(1, 7):
        for p in (delta.lora_A, delta.lora_B, delta.lora_E):
            p.grad = torch.full_like(p, float("inf")) if step == 1 else torch.randn_like(p)
            p.data += 0.1
        method.after_step(net, step, 6)
    assert delta.kept is not None and int(delta.kept.sum()) == 1 and torch.isfinite(delta.lora_E).all()
