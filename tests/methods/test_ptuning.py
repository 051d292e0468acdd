"""P-tuning: the original code's values, placeholders on every text model, batches without any."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_peft import (
    ConfigError,
    NoMatchError,
    PromptTuning,
    PTuning,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    save_adapter,
    trainable_names,
    unload,
)
from lightning_peft.prompting.virtual import PromptedEmbedding
from tests.golden_case import Golden
from tests.grid import GRID, VOCAB, Kind, greedy

CASES = {"ptuning_v1_lstm_bert": None, "ptuning_v1_mlp_bert": None, "ptuning_v1_wide_lstm_bert": 16}
MLP = {"0.weight": "weight_0", "0.bias": "bias_0", "2.weight": "weight_1", "2.bias": "bias_1"}


def tokens_of(model: nn.Module) -> PromptedEmbedding:
    return next(m for m in model.modules() if isinstance(m, PromptedEmbedding))


def ours(model: nn.Module, key: str) -> nn.Parameter:
    """Our tensor for a key of the original code."""
    delta, (owner, _, rest) = tokens_of(model).delta, key.partition(".")
    if owner == "lstm_head":
        return getattr(delta.lstm, rest)
    return getattr(delta, MLP[rest]) if owner in ("mlp_head", "mlp") else delta.embedding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_reference(name, attention, tmp_path):
    case = Golden(name, attention)
    h, inputs, tolerance = case.meta["hyperparameters"], case.part("input"), case.meta["tolerance"]
    model = case.model()
    method = PTuning(h["n"], encoder=h["encoder"], lstm_hidden=CASES[name])
    inject(model, method)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == case.meta["trainable_parameters"]
    for key, value in case.part("adapter").items():
        ours(model, key).data.copy_(value)
    if "block_flag" in inputs:  # the original marks places apart from the ids
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs.pop("block_flag") == 1, model.config.vocab_size)
    out = model(**inputs).logits
    torch.testing.assert_close(out, case.tensors["output.adapted"], atol=tolerance["suggested_atol"], rtol=0)
    (out**2).mean().backward()
    for key, grad in case.part("grad").items():
        torch.testing.assert_close(ours(model, key).grad, grad, atol=tolerance["suggested_grad_atol"], rtol=0)

    save_adapter(model, tmp_path / "a.safetensors")  # the network is in the file: training resumes
    other = case.model()
    load_adapter(other, tmp_path / "a.safetensors")
    assert adapter_state_dict(other).keys() == adapter_state_dict(model).keys()
    method.fold(other)
    prompt = tokens_of(other).delta.prompt
    torch.testing.assert_close(prompt, case.tensors["output.prompt"], atol=tolerance["suggested_atol"], rtol=0)
    save_adapter(other, tmp_path / "b.safetensors")
    plain = case.model()
    load_adapter(plain, tmp_path / "b.safetensors")
    torch.testing.assert_close(plain(**inputs).logits, out, atol=1e-5, rtol=1e-5)


def marked(kind: Kind, n: int = 3) -> dict[str, torch.Tensor]:
    """A batch with n placeholders in each row, at different places."""
    batch = kind.batch()
    places = [(5, 6, 8), (0, 5, 7)] if kind.inputs == "both" else [(0, 4, 7), (1, 2, 5)]
    for row, columns in enumerate(places):
        batch["input_ids"][row, list(columns)[:n]] = VOCAB
    return batch


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "t5", "bart", "llava"]
)
def test_grid(name, encoder):
    """Placeholders keep the length; a hand-filled input gives the same; gradients reach the whole network."""
    kind = GRID[name]
    model, base = kind.make(), kind.make()
    before = kind.output(base)
    inject(model, PTuning(3, encoder=encoder))
    batch, tokens = marked(kind), tokens_of(model)
    out = kind.run(model, batch)
    assert out.shape == before.shape
    if "pixel_values" not in batch:
        found = batch["input_ids"] == VOCAB
        embeds = base.get_input_embeddings()(batch["input_ids"].masked_fill(found, 5))
        embeds[found] = tokens.delta.vectors().repeat(2, 1)
        by_hand = {k: v for k, v in batch.items() if k != "input_ids"} | {"inputs_embeds": embeds}
        real = slice(None) if "decoder_input_ids" in batch else batch["attention_mask"] == 1  # RoBERTa numbers pads
        torch.testing.assert_close(out[real], kind.run(base, by_hand)[real], atol=2e-5, rtol=1e-4)
    (out**2).sum().backward()
    tensors = dict(model.named_parameters())
    assert [n for n in trainable_names(model) if not tensors[n].grad.any()] == []
    if kind.padding:
        alone = {k: v[-1:, :6] if k in ("input_ids", "attention_mask") else v[-1:] for k, v in batch.items()}
        expected = kind.run(model, alone)[-1]
        torch.testing.assert_close(out[-1][: len(expected)], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(kind.run(copy.deepcopy(model), batch), out)
    with disabled(model):
        assert torch.equal(kind.output(model), before)
    unload(model)
    assert list(model.state_dict()) == list(base.state_dict()) and torch.equal(kind.output(model), before)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper", "llava"])
def test_without_placeholders_the_vectors_stand_in_front(name):
    kind = GRID[name]
    model, other = kind.make(), kind.make()
    inject(model, PTuning(3))
    inject(other, PromptTuning(3))
    table = next(m for n, m in other.named_modules() if n.endswith("delta") and hasattr(m, "prompt"))
    table.prompt.data.copy_(tokens_of(model).delta.vectors())
    torch.testing.assert_close(kind.output(model), kind.output(other), atol=1e-6, rtol=1e-5)


def test_ids_inside_the_backbone_are_numbered():
    """Old CLIP models read the state at the largest id of a row: that of their end token, not of a placeholder."""
    kind = GRID["clip"]
    model, base = kind.make(), kind.make()
    inject(model, PTuning(2))
    ids = torch.tensor([[5, 61, 7, 61, 60, 0, 0]])
    prompt, table = tokens_of(model).delta.vectors(), base.text_model.get_input_embeddings()
    pooled = model.text_model(ids).pooler_output
    embeds = table(ids.clamp(max=60))
    embeds[0, [1, 3]] = prompt
    table.forward = lambda ids: embeds
    torch.testing.assert_close(pooled, base.text_model(torch.tensor([[5, 5, 7, 5, 60, 0, 0]])).pooler_output)


@pytest.mark.parametrize("with_places", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "llava"])
def test_generation_is_a_recompute(name, with_places):
    kind = GRID[name]
    model = kind.make()
    inject(model, PTuning(3))
    greedy(kind, model, batch=marked(kind) if with_places else None)


def test_wrong_counts_name_the_row():
    kind = GRID["bert"]
    model = kind.make()
    inject(model, PTuning(3))
    batch = marked(kind)
    batch["input_ids"][1, 2] = 7
    with pytest.raises(ConfigError, match=r"Row 1 of the batch has 2 placeholders \(id 61\).*needs 3"):
        kind.run(model, batch)
    batch["input_ids"][1] = 7
    with pytest.raises(ConfigError, match="Row 1 of the batch has 0"):
        kind.run(model, batch)


def test_any_embedding_can_be_named():
    kind = GRID["hand_written"]
    model = kind.make()
    with pytest.raises(NoMatchError, match="target_modules"):
        inject(model, PTuning(3))
    inject(model, PTuning(3, target_modules="wte", encoder="mlp", placeholder_id=60))
    batch = kind.batch()
    batch["input_ids"].masked_fill_(batch["input_ids"] == 60, 5)
    with pytest.raises(ConfigError, match="no placeholder"):
        kind.run(model, batch)
    batch["input_ids"][:, [0, 2, 4]] = 60
    kind.run(model, batch).sum().backward()
    assert tokens_of(model).delta.embedding.grad.any()


def test_settings():
    for bad in (
        {"encoder": "gru"},
        {"num_virtual_tokens": 0},
        {"encoder": "mlp", "lstm_hidden": 4},
        {"lstm_hidden": 0},
    ):
        with pytest.raises(ConfigError):
            PTuning(**bad)
