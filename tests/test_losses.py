"""The loss over labelled positions is transformers' own: value, gradients, and only where that can be true."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.errors import ConfigError
from lightning_peft.task.losses import IGNORE, TokenLoss, class_loss, import_callable, number_loss

VOCAB, SIZES = 61, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


def lm(kind: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=0, **fields)
    return transformers.AutoModelForCausalLM.from_config(config)


def seq2seq(kind: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=0, **fields)
    config.decoder_start_token_id = 0
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def masked(kind: str, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, pad_token_id=0, **fields)
    return transformers.AutoModelForMaskedLM.from_config(config)


def softcapped() -> nn.Module:
    """Gemma 2 with logits large enough that the soft cap bends them."""
    sizes = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
    model = lm("gemma2", **sizes, final_logit_softcapping=2.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    return model


T5 = {"d_model": 32, "d_ff": 36, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36, "max_position_embeddings": 64}
MODELS = {
    "llama": ("causal-lm", lambda: lm("llama", **SIZES, num_key_value_heads=2)),
    "gpt2": ("causal-lm", lambda: lm("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gemma2": ("causal-lm", softcapped),
    "cohere": ("causal-lm", lambda: lm("cohere", **SIZES, logit_scale=0.25)),
    "opt": ("causal-lm", lambda: lm("opt", **SIZES, ffn_dim=36, word_embed_proj_dim=16)),
    "bert": ("masked-lm", lambda: masked("bert", **SIZES)),
    "roberta": ("masked-lm", lambda: masked("roberta", **SIZES)),
    "t5": ("seq2seq-lm", lambda: seq2seq("t5", **T5)),
    "bart": ("seq2seq-lm", lambda: seq2seq("bart", **BART)),
}


def rows() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Three padded rows; most labels masked, one row without any."""
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.clone()
    labels[:, :6], labels[2], labels[mask == 0] = IGNORE, IGNORE, IGNORE
    return {"input_ids": ids * mask, "attention_mask": mask}, labels


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_value_and_gradients_are_those_of_transformers(name, adapted):
    task, build = MODELS[name]
    model, (inputs, labels) = build().eval(), rows()
    if adapted:  # also on the head
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        inject(model, LoRA(r=2, target_modules=["attention", head]))
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(0.05) if "lora_B" in n else None
    loss = TokenLoss(task)
    ours, count = loss(model, inputs, labels)
    theirs = model(**inputs, labels=labels).loss
    assert loss.trusted is True
    shift = task == "causal-lm"
    assert count == int((labels[:, shift:] != IGNORE).sum())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mine, other = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == other.keys()
    for n, grad in mine.items():
        torch.testing.assert_close(grad, other[n], rtol=1e-4, atol=1e-6, msg=n)


def test_only_labelled_positions_reach_the_head():
    model, (inputs, labels) = MODELS["llama"][1](), rows()
    loss, seen = TokenLoss("causal-lm"), []
    loss(model, inputs, labels)
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    _, count = loss(model, inputs, labels)
    assert seen == [(1, count, VOCAB)] and count == 5 + 2
    assert not model.model._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_losses_stay_the_models_own(dtype):
    """A router's balancing term, a further small term, a head that mixes positions, a compiled network."""
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
    model, (inputs, labels) = lm("mixtral", **sizes, output_router_logits=True).eval(), rows()
    loss = TokenLoss("causal-lm")
    assert torch.equal(loss(model, inputs, labels)[0], model(**inputs, labels=labels).loss)
    assert loss.trusted is False

    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x + x.mean(1, keepdim=True))

    model = MODELS["llama"][1]().eval().to(dtype)
    own = model.loss_function
    model.loss_function = lambda logits, **rest: own(logits=logits, **rest) + 1e-3 * logits.float().logsumexp(-1).mean()
    loss = TokenLoss("causal-lm")
    assert torch.equal(loss(model, inputs, labels)[0], model(**inputs, labels=labels).loss)
    assert loss.trusted is False
    model = MODELS["llama"][1]().eval()
    model.lm_head = Mixing(32, VOCAB, bias=False)
    model.to(dtype)
    loss = TokenLoss("causal-lm")
    assert torch.equal(loss(model, inputs, labels)[0], model(**inputs, labels=labels).loss)
    assert loss.trusted is False
    model = MODELS["llama"][1]()
    model._compiled_call_impl = model._call_impl
    loss = TokenLoss("causal-lm")
    loss(model, inputs, labels)
    assert loss.trusted is False


def test_the_check_leaves_modes_and_random_numbers_alone():
    model, (inputs, labels) = MODELS["bert"][1](), rows()
    model.train()
    model.bert.pooler = None
    model.cls.eval()
    modes = [m.training for m in model.modules()]
    plain, checked = TokenLoss("masked-lm"), TokenLoss("masked-lm")
    plain.trusted = True
    torch.manual_seed(5)
    expected = plain(model, inputs, labels)[0]
    torch.manual_seed(5)
    assert torch.equal(checked(model, inputs, labels)[0], expected) and checked.trusted
    assert modes == [m.training for m in model.modules()]


def test_a_batch_without_labels_is_no_nan():
    model, (inputs, labels) = MODELS["llama"][1](), rows()
    loss = TokenLoss("causal-lm")
    for _ in range(2):
        value, count = loss(model, inputs, torch.full_like(labels, IGNORE))
        assert (value.item(), count, loss.trusted) == (0.0, 0, True)
        assert all(not g.any() for g in gradients(model, value).values())
        loss(model, inputs, labels)


def test_simple_losses():
    logits, labels = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]), torch.tensor([[0, IGNORE]])
    assert float(class_loss(logits, labels)) == pytest.approx(0.126928, abs=1e-5)
    assert float(number_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 4]))) == 2.5
    for bad, why in (("torch.nope", "cannot be imported"), ("nodots", "cannot be imported"), ("math.pi", "is a float")):
        with pytest.raises(ConfigError, match=why):
            import_callable(bad)


def test_virtual_tokens_inside_the_backbone():
    """Labels refer to the user's tokens: a wrapper that lengthens the sequence and cuts it again fits."""
    model, (inputs, labels) = MODELS["llama"][1]().eval(), rows()

    class Prepending(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.tokens = base, nn.Parameter(torch.randn(4, 32))

        def forward(self, input_ids, attention_mask, **options):
            embedded = self.base.embed_tokens(input_ids)
            front = self.tokens.expand(len(embedded), -1, -1)
            mask = torch.cat([torch.ones(len(embedded), 4, dtype=torch.long), attention_mask], 1)
            options = {**options, "inputs_embeds": torch.cat([front, embedded], 1), "attention_mask": mask}
            out = self.base(**options)
            out["last_hidden_state"] = out.last_hidden_state[:, 4:]
            return out

    model.model = Prepending(model.model)
    loss = TokenLoss("causal-lm")
    ours, _ = loss(model, inputs, labels)
    theirs = model(**inputs, labels=labels).loss
    assert loss.trusted
    torch.testing.assert_close(ours, theirs)
    one, other = gradients(model, ours), gradients(model, theirs)
    torch.testing.assert_close(one["model.tokens"], other["model.tokens"])
