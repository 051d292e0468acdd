"""What every method promises under a Trainer: small checkpoints on every path, exact resume, merge and test."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_peft import (
    PEFT,
    ConfigError,
    MergeOnFitEnd,
    TrainabilityCheck,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
)
from tests.contract.battery import CONFIGS, example, same
from tests.models import MODELS, Foreign, loader, logits, trainer


@pytest.fixture(params=CONFIGS, ids=lambda c: c.stem)
def method(request, tmp_path):
    return example(request.param, tmp_path, "bert")


class Stop(L.Callback):
    """Interrupts a run."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            raise RuntimeError("power cut")


def test_every_checkpoint_is_the_adapter(method, tmp_path):
    """last, top-k, weights-only, on exception, by hand, with weight averaging: the same keys, safe to load."""
    module = Foreign()
    savers = [
        ModelCheckpoint(tmp_path / "k", monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(tmp_path / "w", save_weights_only=True),
        OnExceptionCheckpoint(tmp_path / "e"),
    ]
    run = trainer(tmp_path, PEFT(method), EMAWeightAveraging(decay=0.5), *savers, Stop())
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(module, loader("bert"), loader("bert"))
    run.save_checkpoint(tmp_path / "hand.ckpt")
    keys = set(adapter_state_dict(module))
    files = list(tmp_path.rglob("*.ckpt"))
    assert len(files) >= 5
    for file in files:
        content = torch.load(file, weights_only=True)
        assert set(content["state_dict"]) == keys == set(content["lightning_peft"]["keys"]), file
        assert set(content.get("current_model_state", keys)) == keys, file
        assert ("resume" in content["lightning_peft"]) == ("optimizer_states" in content)
        load_adapter(Foreign().net, file)


def test_resume_is_exact(method, tmp_path):
    """Four epochs equal two epochs, a resume from the file, and two more."""
    straight, first, second = Foreign(), Foreign(), Foreign()
    trainer(tmp_path, PEFT(method), max_epochs=4).fit(straight, loader("bert"))
    saver = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, PEFT(method), saver, Cut(), max_epochs=4).fit(first, loader("bert"))
    trainer(tmp_path, PEFT(method), max_epochs=4).fit(second, loader("bert"), ckpt_path=tmp_path / "c" / "epoch=1.ckpt")
    assert same(adapter_state_dict(straight), adapter_state_dict(second))
    assert torch.equal(logits(straight.net, "bert"), logits(second.net, "bert"))


class Cut(L.Callback):
    """Ends a planned run of four epochs after the second, so that schedules have the same length."""

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = trainer.current_epoch == 1


def test_fit_check_merge_test(method, tmp_path):
    """Everything trains within three steps; the merged model tests like the best checkpoint; and fits again."""
    module = Foreign()
    saver = ModelCheckpoint(tmp_path / "c", monitor="val_loss")
    run = trainer(tmp_path, PEFT(method), TrainabilityCheck(), MergeOnFitEnd(), saver)
    run.fit(module, loader("bert"), loader("bert"))
    live = run.test(module, loader("bert"), verbose=False)[0]["test_loss"]
    best = run.test(module, loader("bert"), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert live == pytest.approx(best, abs=1e-5)
    path = saver.best_model_path
    for again in (load_from_checkpoint(Foreign, path), load_from_checkpoint(Foreign(), path)):
        loss = trainer(tmp_path).test(again, loader("bert"), verbose=False)[0]["test_loss"]
        assert loss == pytest.approx(best, abs=1e-6)
    trainer(tmp_path, PEFT(method), MergeOnFitEnd("last"), max_epochs=1).fit(module, loader("bert"))
    trainer(tmp_path, PEFT(method), max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(
        module, loader("bert")
    )


def test_bf16_true_keeps_factors_wide(method, tmp_path):
    if method.complete:
        pytest.skip("the base itself trains, in the precision asked for")
    module = Foreign()
    trainer(tmp_path, PEFT(method), precision="bf16-true", max_epochs=1).fit(module, loader("bert"))
    dtypes = {p.dtype for n, p in module.named_parameters() if ".delta." in n and p.requires_grad}
    assert dtypes <= {torch.float32}


@pytest.mark.parametrize("kind", MODELS)
def test_trains_by_itself(method, kind, tmp_path):
    """On both kinds of model the Trainer drives every optional part; the loss goes down or the method says why not."""
    try:
        inject(MODELS[kind](), method)
    except ConfigError:
        pytest.skip("refused with a reason; see the battery")
    losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            losses.append(float(outputs["loss"]))

    run = trainer(tmp_path, PEFT(method), Watch(), max_epochs=12)
    run.fit(Foreign(kind), loader(kind))
    assert sum(losses[-4:]) < sum(losses[:4])
