"""Packed rows: nothing is lost, and loss and gradients are those of the same rows unpacked."""

import lightning.pytorch as L
import pytest
import torch
import transformers

from lightning_peft import PEFT, LoRA, PromptTuning, TaskModule, inject
from lightning_peft.data import TextDataModule
from lightning_peft.data.packing import fill
from lightning_peft.errors import ConfigError
from lightning_peft.task.batches import inputs_of
from lightning_peft.task.losses import TokenLoss
from tests.data.conftest import WORDS, write_jsonl

LENGTHS = [3, 9, 1, 14, 6, 2, 11, 4]


@pytest.fixture
def data(tmp_path, decoder_tokenizer):
    rows = [{"prompt": " ".join(WORDS[i : i + n]), "answer": " ".join(WORDS[n : n + 2])} for i, n in enumerate(LENGTHS)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(**options):
        columns = {"prompt_column": "prompt", "answer_column": "answer", "use_chat_template": False}
        sizes = {"val_size": 0, "test_size": 0, "batch_size": 8, "max_length": 24}
        module = TextDataModule(str(path), "causal-lm", tokenizer=decoder_tokenizer, **columns, **sizes | options)
        module.setup("fit")
        return module

    return make


def llama(vocabulary: int = 80) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=vocabulary)).double()


def step(network, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    loss, count = TokenLoss("causal-lm")(network, inputs, batch["labels"])
    trained = [p for p in network.parameters() if p.requires_grad]
    return loss, count, torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("workers", [0, 1])
def test_loss_and_gradients_are_those_of_the_rows(data, workers):
    network = llama()
    inject(network, LoRA(r=2))
    for p in network.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.3)
    (plain,), (packed,) = (list(data(packing=p, num_workers=workers).train_dataloader()) for p in (False, True))
    assert packed["input_ids"].numel() < 0.7 * plain["input_ids"].numel() and len(packed["input_ids"]) < len(LENGTHS)
    assert "attention_mask" not in packed and int((packed["position_ids"] == 0).sum()) >= len(LENGTHS)
    ours, right = step(network, packed), step(network, plain)
    assert ours[1] == right[1]
    torch.testing.assert_close(ours[0], right[0], rtol=1e-6, atol=1e-7)
    for a, b in zip(ours[2], right[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    own = network(**packed, use_cache=False).loss
    torch.testing.assert_close(own.double(), ours[0].double(), rtol=1e-5, atol=1e-6)


def test_every_row_once_and_none_too_long():
    lengths = torch.randint(1, 50, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = fill(lengths, 64)
    assert sorted(row for members in packs for row in members) == list(range(500))
    sums = [sum(lengths[row] for row in members) for members in packs]
    assert max(sums) <= 64 and len(packs) <= 1.02 * -(-sum(lengths) // 64)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "opt": {**SMALL, "ffn_dim": 36, "word_embed_proj_dim": 32},
    "bert-generation": SMALL,
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_oss": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
BOTH = [(k, a) for k in ("gpt2", "qwen2", "opt", "bert-generation") for a in ("eager", "sdpa")]


@pytest.mark.parametrize(("kind", "attention"), [*BOTH, ("gemma2", "eager"), ("gpt_oss", "eager")])
def test_models_whose_rows_would_mix_are_refused(data, kind, attention):
    """They take positions, and look for no rows in them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=80, pad_token_id=0, is_decoder=True, **SIZES[kind])
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    (batch,) = list(data(packing=True).train_dataloader())
    inputs, loss = inputs_of(network, {k: v for k, v in batch.items() if k != "labels"}), TokenLoss("causal-lm")
    if kind in ("gpt2", "qwen2", "gemma2"):
        assert loss(network, inputs, batch["labels"])[0] > 0 and loss.apart and loss.trusted
    else:
        with pytest.raises(ConfigError, match="takes no note of where packed rows begin"):
            loss(network, inputs, batch["labels"])


def test_refused_where_rows_would_mix(data, tmp_path):
    with pytest.raises(ConfigError, match="packing belongs to causal-lm"):
        TextDataModule("a.csv", packing=True)
    trainer = L.Trainer(callbacks=[PEFT(PromptTuning(2))], max_epochs=1, logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match="PromptTuning puts vectors in front"):
        trainer.fit(TaskModule(llama().float(), "causal-lm"), data(packing=True))


def test_trains_and_says_how_fast(data, tmp_path):
    """Under a Trainer; tokens a second are logged, padding not counted."""
    module, rows = TaskModule(llama().float(), "causal-lm"), data(packing=True, batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[PEFT(LoRA(r=2))], max_epochs=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(module, rows)
    assert trainer.callback_metrics["train_tokens_per_second"] > 0
    seen = sum(int((b["labels"] != -100).sum()) for b in rows.train_dataloader())
    assert module.speed.tokens >= seen
