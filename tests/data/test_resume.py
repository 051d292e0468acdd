"""A run that was interrupted inside an epoch ends in the very same parameters as one that was not."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft.data import TextDataModule


class Net(L.LightningModule):
    """Remembers what it was shown; can fail on purpose."""

    def __init__(self, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.out = nn.Embedding(100, 8), nn.Linear(8, 2)
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, index):
        if self.global_step == self.fail_at:
            raise RuntimeError("on purpose")
        self.seen.append((self.trainer.current_epoch, batch["input_ids"].tolist()))
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (self.emb(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        return nn.functional.cross_entropy(self.out(mean), batch["labels"])

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(tmp_path, data, *, ckpt=None, fail_at=None, accumulate=1, validate=True, **limits):
    net = Net(fail_at)
    keeper = ModelCheckpoint(
        tmp_path, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=3, save_on_exception=fail_at is not None
    )
    trainer = L.Trainer(
        callbacks=[keeper],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if validate else 0,
        accumulate_grad_batches=accumulate,
        **limits,
    )
    try:
        trainer.fit(net, datamodule=data, ckpt_path=ckpt)
    except RuntimeError as error:
        assert "on purpose" in str(error)
    return net, trainer


def module(table, tokenizer, **options):
    return TextDataModule(table, tokenizer=tokenizer, batch_size=8, test_size=0, **options)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("limits", "accumulate", "validate", "workers"),
    [
        ({"max_epochs": 3}, 1, True, 0),
        ({"max_epochs": 3}, 2, False, 0),
        ({"max_steps": 24, "max_epochs": -1}, 1, True, 0),
        ({"max_epochs": 3, "limit_train_batches": 6}, 1, True, 0),
        ({"max_epochs": 3, "val_check_interval": 4}, 1, True, 0),
        ({"max_epochs": 2}, 1, False, 2),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path, table, encoder_tokenizer, limits, accumulate, validate, workers):
    """From every checkpoint: at the start, inside and at the end of each epoch (9 batches each)."""
    options = {"accumulate": accumulate, "validate": validate, **limits}
    whole, trainer = fit(tmp_path, module(table, encoder_tokenizer, num_workers=workers), **options)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda f: int(f.stem.split("step=")[1]))
    assert len(files) >= 4
    for file in files[:: 3 if workers else 1]:
        resumed, again = fit(
            tmp_path / "again", module(table, encoder_tokenizer, num_workers=workers), ckpt=file, **options
        )
        assert again.global_step == trainer.global_step
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
        assert same(resumed, whole), file.name


def test_a_batch_that_failed_is_shown_again(tmp_path, table, encoder_tokenizer):
    whole, _ = fit(tmp_path / "whole", module(table, encoder_tokenizer), max_epochs=2)
    broken, _ = fit(tmp_path / "broken", module(table, encoder_tokenizer), max_epochs=2, fail_at=13)
    file = next((tmp_path / "broken").glob("*step=13*.ckpt"))
    resumed, _ = fit(tmp_path / "resumed", module(table, encoder_tokenizer), max_epochs=2, ckpt=file)
    assert broken.seen + resumed.seen == whole.seen
    assert same(resumed, whole)


def test_each_epoch_and_each_fit_shows_every_row_in_a_new_order(tmp_path, table, encoder_tokenizer):
    data = module(table, encoder_tokenizer, val_size=0)
    net, _ = fit(tmp_path, data, max_epochs=2)
    epochs = [sorted(r for e, ids in net.seen if e == epoch for r in map(tuple, ids)) for epoch in (0, 1)]
    widths = [[len(ids[0]) for e, ids in net.seen if e == epoch] for epoch in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 80
    assert widths[0] != widths[1]
    again, _ = fit(tmp_path, data, max_epochs=2)
    assert again.seen == net.seen
    fixed, _ = fit(tmp_path, data, max_epochs=3, overfit_batches=2)
    shown = [ids for _, ids in fixed.seen]
    assert shown[:2] == shown[2:4] == shown[4:]


def test_a_schedule_that_asks_for_the_length_of_the_run(table, encoder_tokenizer, tmp_path):
    """TaskModule's default schedule reads the length in ``configure_optimizers``; the resume sees the right batches."""
    from lightning_peft import PEFT, LoRA, TaskModule, adapter_state_dict

    shown = {}

    class Shown(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            shown.setdefault(id(trainer), []).append(batch["input_ids"].tolist())

    def run(ckpt=None):
        tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        tiny |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        net = TaskModule(tiny, "sequence-classification", lr=0.01)
        keeper = ModelCheckpoint(tmp_path / "t", "{step}", save_top_k=-1, every_n_train_steps=3)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_epochs=2, callbacks=[PEFT(LoRA(r=2)), keeper, Shown()], **quiet)
        trainer.fit(net, datamodule=module(table, encoder_tokenizer), ckpt_path=ckpt)
        return net, shown[id(trainer)]

    straight, all_batches = run()
    resumed, rest = run(tmp_path / "t" / "step=3.ckpt")
    assert rest == all_batches[3:]
    first, second = adapter_state_dict(straight), adapter_state_dict(resumed)
    assert all(torch.equal(first[n], second[n]) for n in first)
