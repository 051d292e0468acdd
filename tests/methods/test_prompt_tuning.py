"""Prompt tuning: reference values, and one promise on every model: the caller's tokens in, the caller's tokens out."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import ConfigError, NoMatchError, PromptTuning, disabled, inject, unload
from lightning_peft.adapted import AdapterState
from lightning_peft.prompting.call import cache_among, length_of
from lightning_peft.prompting.virtual import PromptedEmbedding
from lightning_peft.prompting.visual import PromptedImage
from tests.golden_case import Golden
from tests.grid import GRID, OTHERS, Kind, greedy, padded_alone

TEXT = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "t5", "bart", "whisper", "llava", "clip"]
ENCODERS = ["bert", "roberta", "distilbert", "modernbert", "t5", "bart"]


def give(model: nn.Module, vectors: torch.Tensor) -> nn.Parameter:
    """Set the prompt."""
    module = next(m for m in model.modules() if isinstance(m, (PromptedEmbedding, PromptedImage)))
    module.delta.prompt.data.copy_(vectors)
    return module.delta.prompt


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", ["prompt_prepend_llama", "prompt_append_llama", "prompt_append_bert", "prompt_prepend_t5"]
)
def test_reference(name, attention):
    """The reference's outputs at the caller's tokens; gradients of the same outputs against plain autograd."""
    case = Golden(name, attention)
    model, n = case.model(), case.meta["hyperparameters"]["n"]
    position, atol = case.meta["hyperparameters"]["placement"], case.meta["tolerance"]["suggested_atol"]
    given = case.part("adapter")["prompt_embeddings"][:n]
    inject(model, PromptTuning(n, position=position))
    prompt = give(model, given)
    out, expected = case.run(model), case.tensors["output.adapted"]
    if position == "prepend" and "t5" not in name:
        expected = expected[:, n:]
    if position == "append":
        last = expected[:, -1]
        expected = expected[:, :-n].clone()
        if "llama" in name:  # causal: only the end of the prompt has seen text and prompt
            expected[:, -1] = last
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
    if "t5" in name:  # here the reference's loss is over the same outputs
        (out**2).mean().backward()
        grad = case.part("grad")["prompt_embeddings"][:n]
        torch.testing.assert_close(prompt.grad, grad, atol=case.meta["tolerance"]["suggested_grad_atol"], rtol=0)


def test_gradient_reference():
    """All outputs of the longer sequence, virtual ones included, by reading the backbone before they are cut."""
    case = Golden("prompt_prepend_llama")
    model, n = case.model(), case.meta["hyperparameters"]["n"]
    inject(model, PromptTuning(n))
    prompt = give(model, case.part("adapter")["prompt_embeddings"])
    states = []
    model.model.norm.register_forward_hook(lambda m, a, out: states.append(out))
    case.run(model)
    out = model.lm_head(states[0])
    torch.testing.assert_close(
        out, case.tensors["output.adapted"], atol=case.meta["tolerance"]["suggested_atol"], rtol=0
    )
    (out**2).mean().backward()
    grad = case.part("grad")["prompt_embeddings"]
    torch.testing.assert_close(prompt.grad, grad, atol=case.meta["tolerance"]["suggested_grad_atol"], rtol=0)


def promise(kind: Kind, method: PromptTuning) -> nn.Module:
    """Length kept, output changed, gradient everywhere, off is the base, out is the base itself."""
    model, base = kind.make(), kind.make()
    before, names = kind.output(base), list(base.state_dict())
    inject(model, method)
    tokens = next(m for m in model.modules() if isinstance(m, (PromptedEmbedding, PromptedImage)))
    torch.manual_seed(5)
    give(model, torch.randn_like(tokens.delta.prompt))
    changed = kind.output(model)
    assert changed.shape == before.shape and not torch.allclose(changed, before, atol=1e-4)
    (kind.output(model, grad=True) ** 2).sum().backward()
    assert tokens.delta.prompt.grad.abs().sum(1).bool().all()
    with disabled(model):
        assert torch.equal(kind.output(model), before)
    assert torch.equal(kind.output(copy.deepcopy(model)), changed)
    other = copy.deepcopy(model)
    unload(other)
    assert list(other.state_dict()) == names and torch.equal(kind.output(other), before)
    hooks = [h for m in other.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any(isinstance(getattr(h, "__self__", None), AdapterState) for h in hooks)
    assert "generate" not in other.__dict__
    return model


@pytest.mark.parametrize("name", TEXT)
def test_grid_prepend(name):
    kind = GRID[name]
    model = promise(kind, PromptTuning(4))
    if kind.padding:
        padded_alone(kind, model)


@pytest.mark.parametrize("name", [n for n in TEXT if n not in ("whisper", "clip", "llava")])
def test_grid_append(name):
    kind = GRID[name]
    model = promise(kind, PromptTuning(4, position="append"))
    padded_alone(kind, model)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_grid_vision(name):
    method = PromptTuning(4, target_modules="vision_model.embeddings" if name == "clip" else None)
    promise(GRID[name], method)


def test_vision_tokens_stand_behind_the_class_token():
    kind = GRID["vit"]
    model = kind.make()
    inject(model, PromptTuning(3))
    prompt = next(m for m in model.modules() if isinstance(m, PromptedImage)).delta.prompt
    base = kind.make()
    states = base.embeddings(**kind.batch())
    states = torch.cat([states[:, :1], prompt.expand(2, -1, -1), states[:, 1:]], 1)
    for layer in base.layers:
        states = layer(states, None)
    states = base.layernorm(states)
    out = model(**kind.batch(), output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, torch.cat([states[:, :1], states[:, 4:]], 1))
    torch.testing.assert_close(out.pooler_output, base.pooler(states))
    assert all(h.shape[1] == 5 for h in out.hidden_states)


@pytest.mark.parametrize("position", ["prepend", "append"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5", "bart", "whisper", "llava"])
def test_generation_is_a_recompute(name, position):
    kind = (GRID | OTHERS)[name]
    model = kind.make()
    if (name, position) == ("whisper", "append"):
        with pytest.raises(ConfigError, match="starts from fixed tokens"):
            inject(model, PromptTuning(4, position=position))
        return
    inject(model, PromptTuning(4, position=position, init="random"))
    greedy(kind, model, recompute=position == "prepend" or name in ("t5", "bart"))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_appended_prompt_stands_between_text_and_answer(name):
    """generate() and labels agree with vectors put there by hand."""
    kind = (GRID | OTHERS)[name]
    model, base = kind.make(), kind.make()
    inject(model, PromptTuning(4, position="append", init="random"))
    prompt = model.get_input_embeddings().delta.prompt
    text, answer = kind.batch()["input_ids"][:1, :6], torch.tensor([[7, 8, 9]])
    table = base.get_input_embeddings()
    by_hand = torch.cat([table(text), prompt[None], table(answer)], 1)
    expected = base(inputs_embeds=by_hand).logits[:, 9:12]
    ids, labels = torch.cat([text, answer], 1), torch.cat([text.clone().fill_(-100), answer], 1)
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.logits[:, 5:8], expected)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(expected[0], answer[0]))
    out.loss.backward()
    assert prompt.grad.any()
    drawn = model.generate(text, max_new_tokens=4, do_sample=False)[:, 6:]
    rows = torch.cat([table(text), prompt[None]], 1)
    for token in drawn[0]:
        assert base(inputs_embeds=rows).logits[0, -1].argmax() == token
        rows = torch.cat([rows, table(token.view(1, 1))], 1)


@pytest.mark.parametrize("position", ["prepend", "append"])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_left_padding_does_not_matter(name, position):
    kind = GRID[name]
    model = kind.make()
    inject(model, PromptTuning(4, position=position, init="random"))
    batch = kind.batch()
    flipped = {k: v.roll(3, 1) for k, v in batch.items()}  # the last row has three pads, now on the left
    flipped = {k: v[-1:] for k, v in flipped.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = {k: v[-1:, :6] for k, v in batch.items()} | {"position_ids": torch.arange(6)[None]}
    torch.testing.assert_close(kind.run(model, flipped)[:, 3:], kind.run(model, alone), atol=2e-5, rtol=1e-4)


def test_heads_losses_and_states_refer_to_the_callers_tokens():
    """Pooler, token labels, spans, hidden states, attentions: lengths and values of a hand-made longer input."""
    sizes = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(
        **sizes, vocab_size=61, num_labels=2, hidden_dropout_prob=0.0, attn_implementation="eager"
    )
    batch = GRID["bert"].batch()
    for kind, labels in (
        (transformers.BertForTokenClassification, {"labels": torch.ones(2, 9, dtype=torch.long)}),
        (
            transformers.BertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 8])},
        ),
        (transformers.BertForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (transformers.BertForMaskedLM, {"labels": batch["input_ids"]}),
    ):
        torch.manual_seed(0)
        model = kind(config).eval()
        plain = copy.deepcopy(model)
        inject(model, PromptTuning(4))
        prompt = next(m for m in model.modules() if isinstance(m, PromptedEmbedding)).delta.prompt
        out = model(**batch, **labels, output_hidden_states=True, output_attentions=True)
        assert torch.isfinite(out.loss)
        assert all(h.shape[1] == 9 for h in out.hidden_states) and all(a.shape[2:] == (9, 9) for a in out.attentions)
        embeds = torch.cat([prompt.expand(2, -1, -1), plain.get_input_embeddings()(batch["input_ids"])], 1)
        mask = torch.cat([torch.ones(2, 4, dtype=torch.long), batch["attention_mask"]], 1)
        longer = plain.bert(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        for ours, theirs in zip(out.hidden_states, longer.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs[:, 4:])
        if kind is transformers.BertForSequenceClassification:  # the real [CLS], not the first virtual token
            pooled = plain.bert.pooler(longer.last_hidden_state[:, 4:])
            torch.testing.assert_close(out.logits, plain.classifier(pooled))
        out.loss.backward()
        assert prompt.grad.any()


def test_encoder_states_of_an_encoder_decoder_have_the_callers_length():
    for name in ("t5", "bart"):
        kind = GRID[name]
        model = kind.make("eager")
        inject(model, PromptTuning(4))
        out = model(**kind.batch(), output_hidden_states=True, output_attentions=True)
        assert out.encoder_last_hidden_state.shape[1] == 9
        assert all(h.shape[1] == 9 for h in out.encoder_hidden_states)
        assert all(a.shape[2:] == (9, 9) for a in out.encoder_attentions)
        assert all(a.shape[2:] == (5, 9) for a in out.cross_attentions)


def test_causal_classifier_pools_the_last_token():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=61,
        pad_token_id=0,
        num_labels=3,
    )
    for position in ("prepend", "append"):
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(config).eval()
        inject(model, PromptTuning(4, position=position))
        batch = GRID["llama"].batch()
        out = model(**batch, labels=torch.tensor([0, 2]))
        alone = model(batch["input_ids"][-1:, :6])
        torch.testing.assert_close(out.logits[-1:], alone.logits, atol=1e-5, rtol=1e-4)
        out.loss.backward()
        assert model.get_input_embeddings().delta.prompt.grad.any()


def test_cache_continues_and_ids_or_embeddings_are_the_same():
    kind = GRID["gpt2"]
    model = kind.make()
    inject(model, PromptTuning(4, init="random"))
    ids = kind.batch()["input_ids"][:1, :6]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, attention_mask=torch.ones(1, 6)).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-5, rtol=1e-4)
        assert first.past_key_values.get_seq_length() == 10  # the virtual tokens are in it
        embeds = model.get_input_embeddings()._base_forward(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, whole)
        with pytest.raises(ConfigError, match="mask covers 3 tokens"):
            model(ids[:, 4:], past_key_values=first.past_key_values, attention_mask=torch.ones(1, 3))


def test_starts():
    kind = GRID["llama"]
    model = kind.make()
    table = model.get_input_embeddings().weight.detach().clone()
    inject(model, PromptTuning(5, init="text", init_text=[7, 9]))
    prompt = model.get_input_embeddings().delta.prompt
    assert torch.equal(prompt, table[[7, 9, 7, 9, 7]])
    model = kind.make()
    inject(model, PromptTuning(5))
    rows = model.get_input_embeddings().delta.prompt
    assert all((table == row).all(1).any() for row in rows)
    with pytest.raises(ConfigError, match=r"no tokenizer.*token ids"):
        inject(kind.make(), PromptTuning(5, init="text", init_text="a text"))


def test_text_start_uses_the_models_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 5, "film": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    GRID["bert"].make().save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    inject(model, PromptTuning(3, init="text", init_text="good film"))
    table = model.get_input_embeddings()
    assert torch.equal(table.delta.prompt, table.weight[[5, 6, 5]])


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_too_long_names_both(name):
    kind = GRID[name]
    model = kind.make()
    inject(model, PromptTuning(60))
    with pytest.raises(ConfigError, match=r"9 tokens and 60 virtual tokens make 69.*maximum of 6[34]"):
        kind.output(model)


def test_errors():
    with pytest.raises(NoMatchError, match=r"no input embedding in Sequential.*PTuning"):
        inject(nn.Sequential(nn.Embedding(4, 4)), PromptTuning())
    with pytest.raises(NoMatchError, match="no input embedding in Wav2Vec2Model"):
        inject(GRID["wav2vec2"].make(), PromptTuning())
    sizes = {"d_model": 16, "block_sizes": [1, 1], "n_head": 2, "d_head": 8, "d_inner": 16, "vocab_size": 61}
    pooled = transformers.FunnelBaseModel(transformers.FunnelConfig(**sizes)).eval()
    inject(pooled, PromptTuning(4))
    with pytest.raises(ConfigError, match=r"FunnelBaseModel gives 7 states for 13 tokens"):
        pooled(**GRID["bert"].batch())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    hidden = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes))
    inject(hidden, PromptTuning(4))
    with pytest.raises(ConfigError, match=r"ViTMAEEmbeddings gives a tuple.*PrefixTuning"):
        hidden(**GRID["vit"].batch())
    model = GRID["llama"].make()
    inject(model, PromptTuning(4))
    with pytest.raises(ConfigError, match=r"of the form \(batch, tokens\); this one is \(2, 1, 9, 9\)"):
        model(GRID["llama"].batch()["input_ids"], attention_mask=torch.ones(2, 1, 9, 9))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 61, "pad_token_id": 0}
    recurrent = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    inject(recurrent, PromptTuning(4, position="append"))
    ids = torch.arange(5, 10)[None]
    with pytest.raises(ConfigError, match="use_cache=False"):
        recurrent.generate(ids, max_new_tokens=2)
    assert recurrent.generate(ids, max_new_tokens=2, use_cache=False).shape == (1, 7)
    for name in ("cache", "past_key_values", "cache_params"):
        with pytest.raises(ConfigError, match="use_cache=False"):
            length_of(cache_among({name: object()}))
    for bad in ({"position": "middle"}, {"init": "text"}, {"init_text": "x"}, {"num_virtual_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            PromptTuning(**bad)
