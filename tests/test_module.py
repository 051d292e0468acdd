"""`TaskModule`: every task trains, reports, comes back from its adapter checkpoint, and predicts rows."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_peft import (
    PEFT,
    FullFineTuning,
    LoRA,
    TaskModule,
    TrainabilityCheck,
    inject,
    load_from_checkpoint,
    save_merged,
    suggest_lr,
    trainable_names,
)
from lightning_peft.errors import CheckpointError, ConfigError
from tests.models import trainer
from tests.task_cases import BERT, CASES, NAMES, WORDS, Data, tokenizer

SENTENCE = CASES["sequence-classification"]


def fitted(path, case, module=None, **options):
    """A module after one epoch with LoRA, its trainer, and the checkpoint."""
    module = module or TaskModule(case.model, case.task, lr=1e-2, **case.options)
    saver = ModelCheckpoint(path, filename="adapter", save_weights_only=True)
    run = trainer(path, PEFT(LoRA(r=2)), TrainabilityCheck(), saver, max_epochs=1, log_every_n_steps=1, **options)
    run.fit(module, Data(case))
    return module, run, path / "adapter.ckpt"


@pytest.mark.parametrize("task", CASES)
def test_every_task(task, tmp_path):
    case = CASES[task]
    module, run, file = fitted(tmp_path, case)
    logged = run.callback_metrics
    assert {"train_loss", "train_loss_epoch"} <= logged.keys()
    assert {f"{stage}_{n}" for stage in ("train", "val") for n in case.metrics | {"loss"}} <= logged.keys()
    assert all(torch.isfinite(v) for v in logged.values())
    result = run.test(module, Data(case), verbose=False)[0]
    assert set(result) == {f"test_{n}" for n in case.metrics | {"loss"}}
    if "test_perplexity" in result:
        assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]), rel=1e-5)

    stored = torch.load(file, weights_only=True)
    assert set(stored["state_dict"]) == set(trainable_names(module))
    again = TaskModule.load_from_checkpoint(file, tokenizer=tokenizer())
    assert not again.model.training and set(trainable_names(again)) == set(trainable_names(module))
    module.eval()
    module.tokenizer = tokenizer()
    for batch in case.loader(4, predict=True):
        with torch.no_grad():
            rows = again.predict_step(dict(batch), 0)
            assert rows == module.predict_step(dict(batch), 0) and len(rows) == 4
    assert again.hparams.label_names == case.options.get("label_names")


def test_what_the_rows_say(tmp_path):
    def first(task, **changes):
        case = CASES[task]
        module = TaskModule(case.model, task, tokenizer=tokenizer(), **case.options).eval()
        module.configure_model()
        batch = next(iter(case.loader(4, predict=True)))
        return module.predict_step({**batch, **changes}, 0), batch

    rows, _ = first("sequence-classification")
    assert list(rows[1]) == ["text", "label", "score", "scores"] and rows[1]["text"] == "example 1"
    assert set(rows[0]["scores"]) == set(NAMES) and sum(rows[0]["scores"].values()) == pytest.approx(1)
    assert rows[0]["scores"][rows[0]["label"]] == rows[0]["score"] == max(rows[0]["scores"].values())
    rows, _ = first("regression")
    assert [r["id"] for r in rows] == [0, 1, 2, 3] and isinstance(rows[0]["value"], float)
    rows, batch = first("token-classification")
    assert len(rows[0]["labels"]) == 5 and len(rows[1]["labels"]) == 8 and set(rows[0]["labels"]) <= set(NAMES)
    assert rows[0]["tokens"] == [f"w{int(i) - 5}" for i in batch["input_ids"][0, 1:6]]
    rows, batch = first("causal-lm")
    assert list(rows[0]) == ["id", "generated"] and rows[3]["id"] == "row 3" and len(rows[0]["generated"].split()) <= 3
    rows, batch = first("masked-lm")
    assert len(rows[0]["tokens"]) == 2 and "[MASK]" not in rows[0]["text"]
    filled = iter(rows[1]["tokens"])
    words = [next(filled) if i == 4 else WORDS[i] for i in batch["input_ids"][1].tolist()]
    assert rows[1]["text"].split() == [w for w in words if not w.startswith("[")]
    with pytest.raises(ConfigError, match="Pad on the left"):
        first("causal-lm", attention_mask=torch.tensor([[1] * 8 + [0]] * 4))


def test_token_rows_without_labels():
    module = TaskModule(BERT, "token-classification", label_names=NAMES, tokenizer=tokenizer()).eval()
    module.configure_model()
    ids = torch.tensor([[2, 7, 8, 9, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert module.predict_step(batch, 0)[0]["tokens"] == ["w2", "w3", "w4"]  # no special tokens
    words = {**batch, "meta": {"id": ["a"], "word_ids": [[None, 0, 0, 1, None, None]]}}
    row = module.predict_step(words, 0)[0]
    assert row["tokens"] == ["w2", "w4"] and row["id"] == "a" and "word_ids" not in row  # first piece of each word


def test_label_names_come_from_the_data(tmp_path):
    module = TaskModule(BERT, "sequence-classification")
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=1)
    run.fit(module, Data(SENTENCE, ["a", "b", "c"]))
    assert module.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert module.hparams.label_names == ["a", "b", "c"] and module.hparams.num_labels == 3
    for few, why in ((["a", "b"], "label 2"), (None, "has 2 labels .*the data 3 labels")):
        late = TaskModule(BERT, "sequence-classification", label_names=few and None, num_labels=None if few else 2)
        with pytest.raises(ConfigError, match=why):
            trainer(tmp_path, PEFT(LoRA(r=2))).fit(late, Data(SENTENCE, few or ["a", "b", "c"]))


def test_checkpoint_from_a_folder(tmp_path, monkeypatch):
    """Relative folders, new heads and the Trainer's own restore; another base is refused."""
    torch.manual_seed(3)
    base = transformers.BertModel(transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    module = TaskModule("base", "sequence-classification", label_names=NAMES, lr=1e-2)
    module, run, file = fitted(tmp_path, SENTENCE, module)
    assert any(n.startswith("model.classifier") for n in trainable_names(module))
    monkeypatch.chdir("/")
    again = TaskModule.load_from_checkpoint(file)
    batch = next(iter(SENTENCE.loader()))
    assert again.eval().predict_step(batch, 0) == module.eval().predict_step(batch, 0)
    fresh = TaskModule(str(tmp_path / "base"), "sequence-classification", label_names=NAMES)
    kept = trainer(tmp_path, PEFT(LoRA(r=2))).test(fresh, Data(SENTENCE), ckpt_path=str(file), verbose=False)
    assert kept == run.test(module, Data(SENTENCE), verbose=False)
    assert trainer(tmp_path).test(again, Data(SENTENCE), verbose=False) == kept  # no callback needed
    generic = load_from_checkpoint(TaskModule, file).eval()
    assert generic.predict_step(batch, 0) == module.predict_step(batch, 0)

    save_merged(module, tmp_path / "merged")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.label2id == {"red": 0, "green": 1, "blue": 2}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    torch.testing.assert_close(plain(**inputs).logits, module(**inputs).logits)

    other = transformers.BertModel(base.config)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match="another base model"):
        TaskModule.load_from_checkpoint(file)


def test_full_checkpoint_without_adapters(tmp_path):
    module = TaskModule(BERT, "sequence-classification", num_labels=3)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, Data(SENTENCE))
    run.save_checkpoint(tmp_path / "all.ckpt")
    again = TaskModule.load_from_checkpoint(tmp_path / "all.ckpt").eval()
    batch = next(iter(SENTENCE.loader()))
    assert again.predict_step(batch, 0) == module.eval().predict_step(batch, 0)
    assert again.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_network_as_an_object(tmp_path):
    def network():
        torch.manual_seed(0)
        fields = {k: v for k, v in BERT.items() if k != "model_type"}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**fields, num_labels=3))

    module = TaskModule(network(), "sequence-classification")
    inject(module, LoRA(r=2))  # the network is there from the start
    assert trainable_names(module)[0].startswith("model.bert.")
    module, _, file = fitted(tmp_path, SENTENCE, TaskModule(network(), "sequence-classification", lr=1e-2))
    with pytest.raises(ConfigError, match="model=network"):
        TaskModule.load_from_checkpoint(file)
    again = TaskModule.load_from_checkpoint(file, model=network()).eval()
    batch = next(iter(SENTENCE.loader()))
    assert again.predict_step(batch, 0) == module.eval().predict_step(batch, 0)


def squared(outputs, batch):
    error = (outputs.squeeze(-1) - batch[-1]).abs()
    return {"loss": (error**2).mean(), "worst": error.max()}


@pytest.mark.parametrize("loss", [squared, "tests.test_module.squared"])
def test_custom_loss_on_any_network(loss, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, a, b):
            return self.out(self.hidden(a + b).tanh())

    g = torch.Generator().manual_seed(0)
    rows = [(a := torch.randn(4, generator=g), b := torch.randn(4, generator=g), (a + b).sum()) for _ in range(32)]
    load = torch.utils.data.DataLoader(rows, batch_size=8)
    module = TaskModule(Sum(), "custom", loss=loss, lr=5e-2, warmup=0)
    run = trainer(tmp_path, PEFT(LoRA(r=4)), TrainabilityCheck(), max_epochs=12)
    before = trainer(tmp_path, PEFT(LoRA(r=4))).validate(module, load, verbose=False)[0]
    run.fit(module, load, load)
    assert run.callback_metrics["val_loss"] < 0.5 * before["val_loss"]
    assert {"train_worst", "val_worst", "train_loss"} <= run.callback_metrics.keys()
    assert [len(batch) for batch in run.predict(module, load)] == [8] * 4
    assert module.predict_step(tuple(rows[0]), 0)[0].keys() == {"output"}


class Rates(L.Callback):
    """The rate used in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, run, module, batch, index):
        self.seen.append(run.optimizers[0].param_groups[0]["lr"])


def started(path, *methods, steps=1, **options):
    """A module that ran some steps, its optimizer, its schedule, and the rates."""
    module, rates = TaskModule(BERT, "sequence-classification", label_names=NAMES, **options), Rates()
    callbacks = [PEFT(list(methods))] if methods else []
    run = trainer(path, *callbacks, rates, max_epochs=-1, max_steps=steps)
    run.fit(module, Data(SENTENCE))
    return module, run.optimizers[0], run.lr_scheduler_configs[0], rates.seen


def test_the_methods_own_rate_and_a_schedule_in_steps(tmp_path):
    module, optimizer, schedule, rates = started(tmp_path, LoRA(r=2), steps=50)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] and schedule.interval == "step"
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters() if p.requires_grad}
    peak = suggest_lr(module, LoRA(r=2), 50).lr
    assert rates[:4] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak]) and len(rates) == 50
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx(peak / 47)
    plain = started(tmp_path)[1]
    assert {g["initial_lr"] for g in plain.param_groups} == {suggest_lr(module, FullFineTuning(), 1).lr}
    given = started(tmp_path, LoRA(r=2), lr=1e-3, weight_decay=0.1)[1]
    assert {(g["initial_lr"], g["weight_decay"]) for g in given.param_groups} == {(1e-3, 0.1), (1e-3, 0.0)}
    assert started(tmp_path, LoRA(r=2), lr=1.0, warmup=4, steps=5)[3] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_bfloat16_autocast_and_gradient_clipping_go_together(tmp_path):
    """The standard setting; Lightning refuses to clip for a fused optimizer in any mixed precision."""
    _, run, _ = fitted(tmp_path, SENTENCE, precision="bf16-mixed", gradient_clip_val=1.0)
    assert run.global_step > 0 and not run.optimizers[0].defaults["fused"]


def test_the_users_own_optimizer_and_schedule(tmp_path):
    own = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    }
    module, optimizer, schedule, rates = started(tmp_path, LoRA(r=2), steps=6, **own)
    assert type(optimizer) is torch.optim.SGD
    assert len(optimizer.param_groups[0]["params"]) == len(trainable_names(module))
    assert schedule.interval == "epoch" and rates == pytest.approx([0.1] * 4 + [0.05] * 2)
    assert started(tmp_path, LoRA(r=2), steps=3, lr_interval="step", **own)[3] == pytest.approx([0.1, 0.05, 0.025])
    own["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert started(tmp_path, LoRA(r=2), steps=5, **own)[2].monitor == "val_loss"


def test_resume_equals_an_uninterrupted_run(tmp_path):
    def run(epochs, ckpt=None):
        torch.manual_seed(0)
        module = TaskModule(BERT, "sequence-classification", label_names=NAMES, warmup=2, lr=1e-2, base_mode="eval")
        saver = ModelCheckpoint(tmp_path / str(epochs), filename="{epoch}", save_top_k=-1)
        trainer(tmp_path, PEFT(LoRA(r=2)), saver, max_epochs=epochs).fit(module, Data(SENTENCE), ckpt_path=ckpt)
        return {n: p for n, p in module.named_parameters() if p.requires_grad}

    whole, resumed = run(3), run(3, ckpt=str(tmp_path / "3" / "epoch=0.ckpt"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_base_mode(mode, tmp_path, caplog):
    seen = {}

    class Look(L.Callback):
        def on_train_batch_start(self, run, module, batch, index):
            seen.update({n: m.training for n, m in module.model.named_modules()})

    module = TaskModule(BERT, "sequence-classification", label_names=NAMES, base_mode=mode)
    run = trainer(tmp_path, PEFT(LoRA(r=2, dropout=0.1)), Look(), max_epochs=1)
    run.fit(module, Data(SENTENCE))
    assert seen["bert.embeddings.dropout"] is (mode == "train")
    assert seen["bert.encoder.layer.0.attention.self.query.delta"] and seen["classifier"]
    assert seen["bert.encoder.layer.0.attention.self.query"] is (mode == "train")


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    losses, packed = [], []
    for on in (False, True):
        torch.manual_seed(0)
        case = CASES["causal-lm"]
        module = TaskModule(case.model, case.task, lr=1e-2, gradient_checkpointing=on)
        run = trainer(tmp_path, PEFT(LoRA(r=2)), TrainabilityCheck(), max_epochs=1)
        run.fit(module, Data(case))
        losses.append(float(run.callback_metrics["val_loss"]))
        module.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            module.token_loss(module.model, *split(next(iter(case.loader()))))
        packed.append(sum(sizes))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert packed[1] < 0.7 * packed[0]
    with pytest.raises(ConfigError, match="Tiny does not support"):
        module = TaskModule(Tiny(), "custom", loss=squared, gradient_checkpointing=True)
        module.configure_model()


def test_mixed_precision_and_what_loggers_get(tmp_path):
    case = CASES["causal-lm"]
    module, log = TaskModule(case.model, case.task, lr=1e-2), CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, PEFT(LoRA(r=2)), max_epochs=2, precision="bf16-mixed", logger=log, log_every_n_steps=1)
    run.fit(module, Data(case))
    assert module.token_loss.trusted
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "train_loss_epoch", "train_perplexity", "val_loss", "val_perplexity"} <= set(
        header.split(",")
    )
    at = header.split(",").index("train_loss")
    assert sum(bool(row.split(",")[at]) for row in rows) == 8
    assert "task: causal-lm" in (tmp_path / "hparams.yaml").read_text()


def split(batch):
    return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"task": "sequence-clasification"}, "did you mean 'sequence-classification'"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"base_mode": "on"}, "base_mode='on'"),
        ({"base_mode": "eval", "gradient_checkpointing": True}, "needs base_mode='train'"),
        ({"lr": 1e-3, "optimizer": torch.optim.SGD}, "belong to the default optimizer"),
        ({"warmup": 3, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR}, "not both"),
        ({"lr_interval": "step"}, "belongs to `lr_scheduler`"),
        ({"loss": squared}, "loss is for task='custom'"),
        ({"num_labels": 2, "label_names": NAMES}, "label_names holds 3"),
        ({"label_names": ["a", "a"]}, "each once"),
        ({"task": "regression", "num_labels": 2}, "one number"),
    ],
)
def test_wrong_arguments(options, why):
    with pytest.raises(ConfigError, match=why):
        TaskModule(**{"model": BERT, "task": "sequence-classification", **options})


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("./nowhere", {}, "does not exist"),
        ("pkg://no_such_package/model", {}, "no package 'no_such_package'"),
        ("someone/unknown-model", {}, "cannot be loaded"),
        ({"hidden_size": 8}, {}, "without model_type"),
        ({"model_type": "brt"}, {}, "Did you mean bert"),
        ({**BERT, "num_attention_heads": 5}, {}, "cannot be loaded"),
        (None, {}, "model is missing"),
        (Tiny(), {}, "an unknown number of labels"),
    ],
)
def test_wrong_models(model, options, why):
    module = TaskModule(model, "sequence-classification", **options)
    with pytest.raises(Exception, match=why) as caught:
        module.configure_model()
    assert type(caught.value).__module__ == "lightning_peft.errors"


def test_wrong_batches(tmp_path):
    module = TaskModule(BERT, "sequence-classification", num_labels=2)
    module.configure_model()
    batch = next(iter(SENTENCE.loader()))
    with pytest.raises(ConfigError, match="has the label 2, but the labels go from 0 to 1"):
        module.training_step(batch, 0)
    with pytest.raises(ConfigError, match="no 'labels', only: input_ids"):
        module.training_step({"input_ids": batch["input_ids"]}, 0)
    with pytest.raises(ConfigError, match="give a function"):
        TaskModule(Tiny(), "custom").training_step((torch.ones(1, 2), 1), 0)
    with pytest.raises(ConfigError, match="make them equal"):
        trainer(tmp_path, PEFT(LoRA())).fit(module.__class__(BERT, "regression"), Data(SENTENCE))
