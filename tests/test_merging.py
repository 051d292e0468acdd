"""Merging where weights are tied, and whole models out."""

import pytest
import torch
import transformers

from lightning_peft import LoRA, MergeError, VeRA, inject, merge, merge_and_unload, save_merged, unmerge
from tests.contract.battery import shake
from tests.models import bert, logits


def tied(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=61,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_target_is_untied_while_merged(target, tmp_path):
    """The other side of the tie keeps its value; unmerging ties again; the folder reloads with two tensors."""
    model = tied()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inject(model, LoRA(r=2, target_modules=target))
    shake(model)
    expected = logits(model, "llama")
    merge(model)
    torch.testing.assert_close(logits(model, "llama"), expected, atol=1e-5, rtol=1e-5)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_merged(model, tmp_path / "m")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(reloaded, "llama"), expected, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings and not reloaded.config.tie_word_embeddings


@pytest.mark.parametrize("method", [LoRA(r=2), VeRA(r=4)], ids=["LoRA", "VeRA"])
def test_a_tie_beside_the_targets_stays(method, tmp_path):
    """Also where the method itself shares tensors among its adapters, as VeRA does."""
    model = tied()
    inject(model, method)
    shake(model)
    expected = logits(model, "llama")
    save_merged(model, tmp_path / "m")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(reloaded, "llama"), expected, atol=1e-5, rtol=1e-5)
    assert reloaded.config.tie_word_embeddings
    merge_and_unload(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "unloaded")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "unloaded").eval()
    torch.testing.assert_close(logits(again, "llama"), expected, atol=1e-5, rtol=1e-5)


def test_a_diverged_adapter_is_not_merged():
    model = bert()
    inject(model, LoRA(r=2))
    layers = [m for m in model.modules() if hasattr(m, "delta")]
    layers[-1].delta.lora_B.data.fill_(float("nan"))
    with pytest.raises(MergeError, match="NaN or infinity"):
        merge(model)
    assert not any(m._adapter.originals for m in layers) and all(m._adapter.active for m in layers)
    with pytest.raises(MergeError, match="not merged"):
        unmerge(model)


def sequence_model(kind: str):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "vocab_size": 61, "decoder_start_token_id": 1}
    if kind == "t5":
        sizes |= {"d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
    else:
        sides = ("encoder", "decoder")
        sizes |= {
            f"{side}_{n}": v for side in sides for n, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 20))
        }
    return transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize("targets", [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"]], ids=str)
def test_one_of_four_ties(targets, tmp_path):
    """BART ties four tensors; those the adapters left alone are written one by one, as nothing ties them at reload."""
    model, ids = sequence_model("bart"), torch.randint(3, 61, (2, 7))
    inject(model, LoRA(r=2, target_modules=targets))
    shake(model)
    expected = model(ids, decoder_input_ids=ids).logits
    save_merged(model, tmp_path / "m")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(again(ids, decoder_input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    merge_and_unload(model)
    model.save_pretrained(tmp_path / "n")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "n").eval()
    torch.testing.assert_close(again(ids, decoder_input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_ties_that_come_back(tmp_path):
    """T5 ties at every load: a folder with two different tensors would load as another model, so none is written."""
    model = sequence_model("t5")
    inject(model, LoRA(r=2, target_modules="encoder.embed_tokens"))
    shake(model)
    with pytest.raises(MergeError, match=r"T5ForConditionalGeneration ties .* whenever it is loaded"):
        save_merged(model, tmp_path / "m")
    assert not (tmp_path / "m").exists() and model.encoder.embed_tokens._adapter.active
    other = sequence_model("t5")
    inject(other, LoRA(r=2, target_modules="all-linear"))
    save_merged(other, tmp_path / "m")
