"""The optional parts of a method, driven by the callback: loss terms, gradients, steps, state, loss scaling, DDP."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_peft import PEFT, FullFineTuning, LoRA, TrainabilityCheck, TrainingError, adapter_state_dict, inject
from lightning_peft.model.adapters import adapted_modules
from tests.models import Plain, plain_loader, trainer


@dataclass(frozen=True)
class Toy(LoRA):
    """LoRA with a loss term, doubled gradients and a step counter kept for resuming."""

    def regularizer(self, model):
        return sum((m.delta.lora_A**2).sum() for _, m in adapted_modules(model))

    def transform_grads(self, model):
        for _, m in adapted_modules(model):
            m.delta.lora_A.grad.mul_(2)
            m.delta.__dict__.setdefault("seen", []).append(m.delta.lora_A.grad.clone())

    def after_step(self, model, step, total_steps):
        for _, m in adapted_modules(model):
            m.delta.__dict__["steps"] = (step, total_steps)

    def resume_state(self, model):
        return {"steps": [list(m.delta.__dict__["steps"]) for _, m in adapted_modules(model)]}

    def load_resume_state(self, model, state):
        for (_, m), steps in zip(adapted_modules(model), state["steps"], strict=True):
            m.delta.__dict__["resumed"] = steps


class Sgd(Plain):
    """Plain gradient descent makes the expected values easy; no batch norm, so that rows are independent."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def expected_gradients(accumulate: int, batch_size: int) -> list[torch.Tensor]:
    """Gradients of A in the first layer by hand: mean loss over the window plus the term, doubled."""
    torch.manual_seed(0)
    net = Sgd().net
    inject(net, Toy())
    rows = list(plain_loader(batch_size=batch_size))
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    found = []
    for start in range(0, len(rows), accumulate):
        optimizer.zero_grad()
        losses = [nn.functional.cross_entropy(net(x), y) for x, y in rows[start : start + accumulate]]
        (sum(losses) / accumulate + Toy().regularizer(net)).backward()
        for _, m in adapted_modules(net):
            m.delta.lora_A.grad.mul_(2)
        found.append(net[0].delta.lora_A.grad.clone())
        optimizer.step()
    return found


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_term_and_gradients(tmp_path, accumulate, scaled):
    """Right under accumulation, and under a GradScaler that multiplies the loss by 1024."""
    torch.manual_seed(0)
    module, options = Sgd(), {}
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        class Scaled(MixedPrecision):
            def forward_context(self):  # scaling without half precision: the numbers stay comparable
                return torch.autocast("cpu", enabled=False)

        options["plugins"] = Scaled("16-mixed", "cpu", scaler)
    run = trainer(tmp_path, PEFT(Toy()), max_epochs=1, accumulate_grad_batches=accumulate, **options)
    run.fit(module, plain_loader())
    ours, theirs = module.net[0].delta.__dict__["seen"], expected_gradients(accumulate, 8)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert module.net[0].delta.__dict__["steps"] == (4 // accumulate, 4 // accumulate)


def test_manual_optimization(tmp_path):
    class Manual(Sgd):
        automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    torch.manual_seed(0)
    module = Manual()
    module.automatic_optimization = False
    trainer(tmp_path, PEFT(Toy()), TrainabilityCheck(), max_epochs=1).fit(module, plain_loader())
    for a, b in zip(module.net[0].delta.__dict__["seen"], expected_gradients(1, 8), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_resume_state_travels(tmp_path):
    module = Sgd()
    run = trainer(tmp_path, PEFT(Toy()), max_epochs=1)
    run.fit(module, plain_loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    again = Sgd()
    trainer(tmp_path, PEFT(Toy()), max_epochs=2).fit(again, plain_loader(), ckpt_path=tmp_path / "full.ckpt")
    assert again.net[0].delta.__dict__["resumed"] == [4, 4]
    assert "resume" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)["lightning_peft"]


class Cut(Sgd):
    """One layer is cut off from the loss."""

    def training_step(self, batch, index):
        with torch.no_grad():
            hidden = self.net[0](batch[0])
        return nn.functional.cross_entropy(self.net[2](hidden.tanh()), batch[1])


def test_trainability_names_what_stands_still(tmp_path):
    with pytest.raises(TrainingError, match=r"2 of 4 trainable .*net.0.delta.lora_A \(no gradient\)"):
        trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck()).fit(Cut(), plain_loader())
    trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck(ignore=["net.0"])).fit(Cut(), plain_loader())

    class Zero(Sgd):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * 0

    with pytest.raises(TrainingError, match="no non-zero gradient"):
        trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck()).fit(Zero(), plain_loader())

    class Broken(Sgd):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * float("nan")

    with pytest.raises(TrainingError, match="no finite gradient"):
        trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck()).fit(Broken(), plain_loader())


def test_trainability_skips_warm_up_steps(tmp_path):
    """Steps with a learning rate of zero are no steps: five of them, with gradients of zero, then three real ones."""

    class Warm(Sgd):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * float(self.global_step >= 5)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 5))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    check = TrainabilityCheck()
    trainer(tmp_path, PEFT(LoRA()), check, max_epochs=3).fit(Warm(), plain_loader())
    assert not check._watched, "every tensor was judged"


class Faint(Sgd):
    """Gradients so small that A does not move at first: its step is lost in rounding while B is near zero."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def training_step(self, batch, index):
        return super().training_step(batch, index) * 3e-4


def moved_after(steps: int, tmp_path, module: Sgd) -> set[str]:
    """Which trainable tensors plain gradient descent has changed after so many steps."""
    seen = {}

    class Values(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    trainer(tmp_path, PEFT(LoRA()), Values(), max_epochs=-1, max_steps=steps).fit(module, plain_loader())
    tensors = dict(module.named_parameters())
    return {n for n, old in seen.items() if not torch.equal(tensors[n], old)}


def test_trainability_lets_small_steps_of_gradient_descent_pass(tmp_path):
    """A moves later than in the third step; it had its gradient by then, and nothing is said."""
    names = {f"net.{i}.delta.lora_{f}" for i in (0, 2) for f in "AB"}
    assert moved_after(3, tmp_path, Faint()) != names, "else this test shows nothing"
    assert moved_after(50, tmp_path, Faint()) == names
    check = TrainabilityCheck()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have not moved")
        run = trainer(tmp_path, PEFT(LoRA()), check, max_epochs=-1, max_steps=60)
        run.fit(Faint(), plain_loader())
    assert run.global_step == 60 and not check._watched


def test_trainability_names_what_never_moved_in_fifty_steps(tmp_path):
    """A warning where other tensors move, an error where none does; a rate that still rises is given its time."""

    class Slow(Sgd):
        rate, rising = 1e-8, False

        def configure_optimizers(self):
            optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: (step + 1) / 100_000 if self.rising else 1.0
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(rate: float, rising: bool = False, steps: int = 60) -> int:
        module = Slow()
        module.rate, module.rising = rate, rising
        with torch.no_grad():
            module.net[0].weight.fill_(1.0)
            module.net[2].bias.zero_()  # every step shows here
        run = trainer(tmp_path, PEFT(FullFineTuning()), TrainabilityCheck(), max_epochs=-1, max_steps=steps)
        run.fit(module, plain_loader())
        return run.global_step

    named = r"of 4 trainable tensors have not moved in 50 optimizer steps.*: net.0.weight"
    with pytest.warns(UserWarning, match=named):
        assert fit(1e-8) == 60
    with pytest.raises(TrainingError, match=r"4 of 4.*have not moved in 50.*too small for their dtype"):
        fit(1e-50)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have not moved")
        fit(1e-8, steps=49)
        fit(1e-3, rising=True)


def test_trainability_names_a_frozen_head_of_zeros(tmp_path):
    """torchvision's ViT starts with one: no gradient passes it, and the adapters before it are not to blame."""

    class ZeroHead(Sgd):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[2].weight)

    wanted = r"2 of 2.*\(no non-zero gradient\).*weights of 2 are all zero and frozen.*LoRA\(modules_to_save=\['2'\]\)"
    with pytest.raises(TrainingError, match=wanted):
        trainer(tmp_path, PEFT(LoRA(target_modules="0")), TrainabilityCheck()).fit(ZeroHead(), plain_loader())
    method = LoRA(target_modules="0", modules_to_save=["2"])
    trainer(tmp_path, PEFT(method), TrainabilityCheck()).fit(ZeroHead(), plain_loader())


def test_trainability_patterns_must_match(tmp_path):
    with pytest.raises(TrainingError, match=r"ignore='typo'\) matches no trainable tensor"):
        trainer(tmp_path, PEFT(LoRA()), TrainabilityCheck(["net.0", "typo"])).fit(Sgd(), plain_loader())


def test_trainability_skips_steps_the_scaler_skipped(tmp_path):
    class Overflow(Sgd):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * float("inf") if self.global_step < 2 and index < 2 else loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    check = TrainabilityCheck()
    trainer(tmp_path, PEFT(LoRA()), check, max_epochs=3, plugins=plugin).fit(Overflow(), plain_loader())
    assert not check._watched, "every tensor was judged"


DDP_SCRIPT = """
import sys, torch, lightning.pytorch as L
sys.path.insert(0, sys.argv[1])
from tests.lifecycle.test_optional_parts import Sgd, Toy
from tests.models import plain_loader, trainer
from lightning_peft import PEFT, adapter_state_dict
torch.set_num_threads(1); torch.manual_seed(0)
module = Sgd()
run = trainer(sys.argv[2], PEFT(Toy()), max_epochs=1, devices=2, strategy="ddp")
run.fit(module, plain_loader(batch_size=4))
run.save_checkpoint(sys.argv[2] + "/ddp.ckpt")
if run.is_global_zero:
    torch.save(module.net[0].delta.__dict__["seen"], sys.argv[2] + "/seen.pt")
"""


def test_ddp_equals_one_process(tmp_path, root):
    """Two processes with half the batch each: the same gradients, loss term counted once; a small checkpoint."""
    script = tmp_path / "run.py"
    script.write_text(DDP_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(root), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    seen = torch.load(tmp_path / "seen.pt")
    content = torch.load(tmp_path / "ddp.ckpt", weights_only=True)
    module = Sgd()
    inject(module, Toy())
    assert set(content["state_dict"]) == set(adapter_state_dict(module))
    torch.manual_seed(0)
    reference = Sgd().net
    inject(reference, Toy())
    rows = plain_loader().dataset[:8]  # the sampler deals rows out in turn: the first eight are the first two halves
    x, y = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    (nn.functional.cross_entropy(reference(x), y) + Toy().regularizer(reference)).backward()
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], 2 * reference[0].delta.lora_A.grad, atol=1e-6, rtol=1e-4)
