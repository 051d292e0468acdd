"""No training step of any method waits for the device: it would stand still until the program has read a number."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, AdaLoRA, ConfigError, LoRAFA, PTuning, inject
from lightning_peft.methods.ptuning import ArrivingCounts, Placeholders
from lightning_peft.trainable import adapted_modules
from lightning_peft.trainer.driving import add_loss_terms
from tests.contract.battery import CONFIGS, example
from tests.device import DEVICE, Machine, Remote, WaitError, move
from tests.models import MODELS, Foreign, batch, loader, trainer

MARK = MODELS["bert"]().config.vocab_size  # PTuning's placeholder in these models


@pytest.fixture(autouse=True)
def autocast_everywhere(monkeypatch):
    """Torch knows no autocast for the device of these tests."""
    known = torch.autocast

    def autocast(device_type: str, **options):
        return nullcontext() if device_type == DEVICE.type else known(device_type, **options)

    monkeypatch.setattr(torch, "autocast", autocast)


def remote(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: Remote(value) for name, value in inputs.items()}


def test_the_device_notices_who_waits():
    """Else the tests below show nothing."""
    for wait in (
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3, 3).copy_(x),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.linalg.inv(x),
    ):
        with Machine(), pytest.raises(WaitError):
            wait(Remote(torch.eye(3)))
    with Machine():
        x = Remote(torch.eye(3))
        assert torch.zeros(3, 3).copy_(x * 2, non_blocking=True).sum() == 6


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_a_training_step_does_not_wait_for_the_device(config, kind, tmp_path):
    """LoRA-FA decomposes its frozen A once, PTuning looks at the first batch; nothing else, from the first step on."""
    method = example(config, tmp_path, kind)
    model = MODELS[kind]()
    try:
        inject(model, method)
    except ConfigError as error:
        pytest.skip(str(error))  # methods for encoders; see the battery
    move(model).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, foreach=False)
    for step in range(1, 6):
        with Machine(strict=step > 1 or not isinstance(method, (LoRAFA, PTuning))):
            loss = model(**remote(batch(kind, seed=step)), use_cache=False).loss
            term = method.regularizer(model)
            (loss if term is None else loss + term).backward()
            method.transform_grads(model)
            optimizer.step()
            method.after_step(model, step, 5)
            optimizer.zero_grad()


def test_a_loss_term_under_a_scaler_does_not_wait_for_the_device():
    net, method = nn.Sequential(nn.Linear(4, 4)), AdaLoRA(init_r=2, target_r=1)
    inject(net, method)
    nn.init.normal_(net[0].delta.lora_B)
    method.regularizer(net).backward()
    expected = net[0].delta.lora_A.grad.clone()
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # makes its factor
    move(net)
    scaler._scale = Remote(scaler._scale)
    net.automatic_optimization = True
    run = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=2)
    with Machine():
        add_loss_terms(run, net)
    torch.testing.assert_close(net[0].delta.lora_A.grad.value, expected * 512)


# ---- placeholders --------------------------------------------------------------------------------------------------
def marked(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    """A batch with two placeholders in each row."""
    inputs = batch("bert", rows, seed)
    inputs["input_ids"][:, [1, 3]] = MARK
    return inputs


def prompted() -> tuple[nn.Module, Placeholders]:
    """BERT with two virtual tokens, in training."""
    model = MODELS["bert"]()
    inject(model, PTuning(2))
    model.eval()  # no dropout, so that results compare
    table = next(layer for _, layer in adapted_modules(model))
    table.training = True
    return model, table._adapter


def test_ids_that_come_on_the_device_are_counted_once():
    model, tokens = prompted()
    expected = [model(**marked(seed)).loss.item() for seed in (1, 2, 3)]
    move(model)
    losses = []
    for step, seed in enumerate((1, 2, 3)):
        with Machine(strict=step > 0):
            losses.append(model(**remote(marked(seed))).loss.value.item())
    assert losses == pytest.approx(expected, abs=1e-6) and tokens.used
    again = copy.deepcopy(tokens)
    assert again.first_had is None and not again.arriving


@pytest.mark.parametrize(("first", "count"), [(True, 1), (True, 3), (True, 0), (False, 2)])
def test_a_batch_on_the_device_that_is_unlike_the_first_is_found_out(first, count):
    """In the step after it, for nothing waits for its counts; outside training at once."""
    model, _ = prompted()
    move(model)
    alike, other = marked(1) if first else batch("bert", seed=1), marked(2)
    other["input_ids"][2] = torch.tensor([MARK] * count + [5] * (9 - count))
    row, expected = (2, 2) if first else (0, 0)
    with Machine(strict=False):
        model(**remote(alike))
        model(**remote(other))
        with pytest.raises(
            ConfigError, match=f"Row {row} of an earlier batch has {count} placeholders.* have {expected},"
        ):
            model(**remote(alike))
        with torch.no_grad():  # every batch is looked at by itself
            if count != 2:
                with pytest.raises(ConfigError, match=f"Row 2 of the batch has {count} placeholders"):
                    model(**remote(other))
            for inputs in (alike, batch("bert", seed=3), marked(3)):
                model(**remote(inputs))


def test_counts_that_have_not_arrived_say_so():
    counts = ArrivingCounts(torch.tensor([2, 0]))
    assert counts.values() == [2, 0]
    counts._host[1] = -1  # still on its way
    assert counts.values() is None


def test_ids_are_counted_before_they_go_to_the_device():
    """As the callback does it: each batch by its own counts, without waiting, and a wrong row is named at once."""
    model, _ = prompted()
    move(model)
    method = PTuning(2)
    wrong = marked(3)
    wrong["input_ids"][2, 1] = 5
    for inputs in (marked(1), batch("bert", seed=2), wrong):
        seen = method.before_transfer(model, inputs)
        moved = remote(inputs)
        method.after_transfer(model, moved, seen)
        with Machine():
            if inputs is wrong:
                with pytest.raises(ConfigError, match="Row 2 of the batch has 1 placeholders"):
                    model(**moved)
            else:
                model(**moved)
    seen = method.before_transfer(model, marked(1))
    moved = remote(marked(1))
    method.after_transfer(model, moved, seen)
    moved["input_ids"].mul_(1)
    with Machine(), pytest.raises(WaitError):  # changed since: counted again
        model(**moved)


def test_the_callback_shows_methods_each_batch_before_its_transfer(tmp_path):
    """In every loop of the Trainer, whatever the batch is made of; nothing is left behind."""
    noted = []

    class Moved(Foreign):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return {name: value.clone() for name, value in batch.items()}

        def step(self, batch, name):
            noted.append(hasattr(batch["input_ids"], "_lightning_peft_placeholders"))
            return super().step(batch, name)

    module = Moved("bert")
    run = trainer(tmp_path, PEFT(PTuning(2)), max_epochs=1)
    run.fit(module, loader("bert"), loader("bert"))
    run.test(module, loader("bert"))
    assert noted and all(noted)
    assert "batch_to_device" not in vars(run.strategy)
