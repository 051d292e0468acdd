"""AdapterFusion against reference values; files in, a self-contained file out."""

import dataclasses

import pytest
import torch
from torch import nn

from lightning_peft import (
    AdapterFusion,
    CheckpointError,
    Compacter,
    ConfigError,
    Houlsby,
    LoRA,
    NoMatchError,
    ParallelAdapter,
    Pfeiffer,
    adapter_state_dict,
    fusion_weights,
    inject,
    load_adapter,
    save_adapter,
    state_names,
    summarize,
)
from lightning_peft.method import Method
from tests.adapters import LEAVES
from tests.contract.battery import shake
from tests.golden_case import Golden
from tests.models import bert, llama, logits


def trained(path, make, method: Method, seed: int = 0):
    """An adapter file with values far from the start."""
    model = make()
    inject(model, dataclasses.replace(method, init_seed=seed))
    g = torch.Generator().manual_seed(seed)
    for tensor in adapter_state_dict(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
    save_adapter(model, path)
    return str(path)


def battery_example(folder, make):
    """Two adapters for the contract battery."""
    method = Pfeiffer(reduction_factor=4)
    files = {n: folder / "adapters" / f"{n}.safetensors" for n in "ab"}
    return AdapterFusion({n: trained(path, make, method, i) for i, (n, path) in enumerate(files.items())})


def test_golden(tmp_path):
    case = Golden("adapterfusion_bert")
    values, files = case.part("adapter"), {}
    for title in "ab":
        model = case.model()
        inject(model, Pfeiffer(reduction_factor=4))
        for key, value in values.items():
            owner, _, leaf = key.partition(f".adapters.{title}.")
            if leaf:
                getattr(model.get_submodule(f"{owner}.LayerNorm").delta, LEAVES[leaf]).data.copy_(value)
        files[title] = str(tmp_path / f"{title}.safetensors")
        save_adapter(model, files[title])
    model = case.model()
    method = AdapterFusion(files)
    inject(model, method)
    parameters = {}
    for key, value in values.items():
        owner, _, leaf = key.partition(".adapter_fusion_layer.a,b.")
        if leaf:
            parameters[key] = getattr(model.get_submodule(f"{owner}.LayerNorm").delta, leaf.replace(".", "_"))
            parameters[key].data.copy_(value)
        else:
            owner, _, rest = key.partition(".adapters.")
            title, _, leaf = rest.partition(".")
            delta = model.get_submodule(f"{owner}.LayerNorm").delta.adapters[title]
            parameters[key] = getattr(delta, LEAVES[leaf])
            assert torch.equal(parameters[key], value) and not parameters[key].requires_grad
    assert summarize(model)["trainable"] == case.meta["trainable_parameters"]
    assert sum(t.numel() for n, t in model.named_parameters() if n in state_names(model)) == 2208
    term = method.regularizer(model)
    torch.testing.assert_close(term, case.tensors["loss.fusion_regularisation"])
    term.backward()
    for key, grad in case.part("grad_regularisation").items():
        torch.testing.assert_close(parameters[key].grad, grad)
    model.zero_grad()
    for parameter in parameters.values():  # the case has gradients of the adapters, too
        parameter.requires_grad_(True)
    case.check(model, parameters)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize(
    "method", [Houlsby(), Pfeiffer(), ParallelAdapter(reduction_factor=8), Compacter(), Houlsby(target_modules="mlp")]
)
def test_one_file_is_enough(method, make, tmp_path):
    """The frozen adapters travel inside; their own files may be gone. Each adapter alone is what it was."""
    kind = make.__name__
    files = {n: trained(tmp_path / f"{n}.safetensors", make, method, i) for i, n in enumerate("abc")}
    model = make()
    inject(model, AdapterFusion(files))
    alone = make()
    load_adapter(alone, files["b"])
    for module in model.modules():  # a key that fits only b, and the fusion is b
        if hasattr(module, "adapters"):
            module.adapters["a"], module.adapters["c"] = module.adapters["b"], module.adapters["b"]
            module.value_weight.data.copy_(torch.eye(32))
    torch.testing.assert_close(logits(model, kind), logits(alone, kind), atol=1e-5, rtol=1e-4)
    model = make()
    inject(model, AdapterFusion(files))
    shake(model)
    save_adapter(model, tmp_path / "fused.safetensors")
    for file in files.values():
        (tmp_path / file).unlink()
    again = make()
    load_adapter(again, tmp_path / "fused.safetensors")
    assert torch.equal(logits(again, kind), logits(model, kind)) and not logits(again, kind).isnan().any()
    save_adapter(again, tmp_path / "again.safetensors")
    load_adapter(model, tmp_path / "again.safetensors")
    with fusion_weights(again) as weights:
        logits(again, kind)
    assert len(weights) == 2 * len(getattr(method, "roles", ())) or method.target_modules
    assert all(set(w) == set("abc") and sum(w.values()) == pytest.approx(1, abs=1e-5) for w in weights.values())


def test_another_head(tmp_path):
    """Adapters of tasks with heads of their own are fused for a task with a third one."""
    files = {}
    for name, labels in (("a", 2), ("b", 5)):
        model = bert()
        model.classifier = nn.Linear(32, labels)
        inject(model, Pfeiffer(modules_to_save="classifier"))
        shake(model)
        files[name] = str(tmp_path / f"{name}.safetensors")
        save_adapter(model, files[name])
    model = bert()
    inject(model, AdapterFusion(files, modules_to_save="classifier"))
    assert logits(model, "bert").shape[-1] == 3


def test_files_that_do_not_fit(tmp_path):
    def file(name, method, make=bert, seed=0):
        return trained(tmp_path / f"{name}.safetensors", make, method, seed)

    a = file("a", Pfeiffer())
    for other, kind, message in (
        (file("h", Houlsby()), ConfigError, "was trained with"),
        (file("r", Pfeiffer(reduction_factor=2)), ConfigError, "was trained with"),
        (file("l", Pfeiffer(layers=[1])), ConfigError, "other places"),
        (file("o", LoRA()), ConfigError, "holds LoRA"),
        (file("n", Pfeiffer(train_layer_norms=True)), ConfigError, "train_layer_norms"),
        (file("s", Pfeiffer(), lambda: bert(5)), CheckpointError, "another base model"),
        (str(tmp_path / "none.safetensors"), CheckpointError, "does not exist"),
    ):
        model = bert()
        with pytest.raises(kind, match=message):
            inject(model, AdapterFusion({"a": a, "b": other}))
        assert torch.equal(logits(model, "bert"), logits(bert(), "bert"))
    with pytest.raises(NoMatchError, match="has no"):
        inject(llama(), AdapterFusion({"a": a, "b": a}))
    with pytest.raises(ConfigError, match="two or more"):
        AdapterFusion({"a": a})
    with pytest.raises(ConfigError, match=r"'a\.b' cannot serve"):
        AdapterFusion({"a.b": a, "c": a})
