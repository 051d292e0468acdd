"""What is patched on a module and its Trainer, and that it is undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import PEFT, FullFineTuning, LoRA, NoMatchError, inject, merge_and_unload, unload
from lightning_peft.trainer.session import Session
from tests.lifecycle.test_module_shapes import Early, Rebuilds
from tests.models import plain_loader, trainer


def patched(module, run) -> set[str]:
    """Names of what is set on the instances, where a class would do."""
    of_the_strategy = {name for name in vars(run.strategy) if callable(getattr(type(run.strategy), name, None))}
    of_the_module = {name for name in vars(module) if callable(getattr(type(module), name, None))}
    hooks = {name for name in ("_state_dict_hooks", "_load_state_dict_post_hooks") if vars(module)[name]}
    return of_the_strategy | of_the_module | hooks


STAYS = {"_state_dict_hooks", "_load_state_dict_post_hooks", "on_save_checkpoint", "on_load_checkpoint"}


@pytest.mark.parametrize("kind", [Early, Rebuilds])
def test_after_a_run_only_what_checkpoints_need_is_left(kind, tmp_path):
    """Whatever the run was, and whether it failed; a file that is saved then is still small."""
    module = kind()
    fit, again = (trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1) for _ in range(2))
    fit.fit(module, plain_loader())
    assert patched(module, fit) == STAYS
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert len(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == 4

    class Stop(Exception):
        pass

    def broken(*arguments):
        raise Stop

    module.training_step = broken
    with pytest.raises(Stop):
        again.fit(module, plain_loader())
    del module.training_step
    assert patched(module, again) == STAYS


def test_a_run_that_fails_before_the_injection_leaves_nothing(tmp_path):
    module, run = Early(), trainer(tmp_path, PEFT(LoRA(target_modules="nothing")))
    with pytest.raises(NoMatchError):
        run.fit(module, plain_loader())
    assert not patched(module, run) and Session.of(module) is None


@pytest.mark.parametrize("out", [unload, merge_and_unload])
def test_with_the_adapters_everything_goes(out, tmp_path):
    """Hooks that the user has set on the instance, before, are there again."""
    called = []
    module, run = Early(), trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    module.on_save_checkpoint = own = called.append
    run.fit(module, plain_loader())
    out(module)
    assert patched(module, run) == {"on_save_checkpoint"} and module.on_save_checkpoint is own
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert len(called) == 1 and "lightning_peft" not in content and len(content["state_dict"]) == 4
    assert "net.0.weight" in content["state_dict"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_a_session_of_its_own(copied, tmp_path):
    module, run = Early(), trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    run.fit(module, plain_loader())
    twin = copied(module)
    assert Session.of(twin) is not Session.of(module) and Session.of(twin).module is twin
    unload(twin)
    assert len(twin.state_dict()) == 4 and "net.0.weight" in twin.state_dict()
    assert patched(module, run) == STAYS and "net.0.weight" not in module.state_dict()
    # what the copy was taken from a run in the midst of it is of no account
    assert Session.of(module)._for_a_run == []


def test_what_the_user_has_patched_on_a_strategy_is_called_and_left(tmp_path):
    module, run = Early(), trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    original, calls = run.strategy.batch_to_device, []

    def counted(batch, *arguments, **options):
        calls.append(batch)
        return original(batch, *arguments, **options)

    run.strategy.batch_to_device = counted
    run.fit(module, plain_loader())
    assert len(calls) == 4 and run.strategy.batch_to_device is counted


def test_a_second_trainer_finds_the_module_as_the_first_one_left_it(tmp_path):
    """Also a Trainer without the callback: it reads and writes files of the adapter alone."""
    module, saver = Early(), ModelCheckpoint(tmp_path, filename="a")
    trainer(tmp_path, PEFT(LoRA(r=2)), saver, max_epochs=1).fit(module, plain_loader())
    second = trainer(tmp_path, max_epochs=2)
    second.fit(module, plain_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert patched(module, second) == STAYS and second.global_step == 8
    second.save_checkpoint(tmp_path / "b.ckpt")
    assert len(torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]) == 4


def test_full_fine_tuning_is_undone_like_the_others(tmp_path):
    module, run = Early(), trainer(tmp_path, PEFT(FullFineTuning()), max_epochs=1)
    run.fit(module, plain_loader())
    assert patched(module, run) == STAYS
    Session.of(module).remove()
    assert not patched(module, run)


def test_the_network_alone_is_unloaded(tmp_path):
    """The module's hooks are still there, and do nothing."""
    module, run = Early(), trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    run.fit(module, plain_loader())
    unload(module.net)
    assert "net.0.weight" in module.state_dict()
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "lightning_peft" not in torch.load(tmp_path / "a.ckpt", weights_only=True)
    inject(module, LoRA(r=2))
    assert set(module.state_dict()) == {f"net.{i}.delta.lora_{x}" for i in (0, 2) for x in "AB"}
