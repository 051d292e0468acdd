"""QLoRA on a base that is really in 4 bits (bitsandbytes, which packs and multiplies NF4 on the CPU as well)."""

import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_peft import (
    PEFT,
    ConfigError,
    DoRA,
    LoRA,
    MergeError,
    MergeOnFitEnd,
    QLoRA,
    TrainabilityCheck,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter,
    merge,
    save_adapter,
    save_merged,
    state_names,
    trainable_names,
    unload,
)
from lightning_peft.quantized import packed, plain
from tests.contract.battery import same, shake, train
from tests.models import VOCAB, bert, llama, loader, logits, trainer

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder to load a Llama from; wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def in_four_bits(source, method=None):
    method = method or QLoRA(compute_dtype="float32")
    return transformers.AutoModelForCausalLM.from_pretrained(source, **method.load_options()).eval()


class Module(L.LightningModule):
    def __init__(self, source):
        super().__init__()
        self.net = in_four_bits(source)

    def training_step(self, batch, index):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_options_reach_the_layers(source, quantization, double):
    model = in_four_bits(source, QLoRA(quantization=quantization, double_quant=double))
    layer = model.model.layers[0].mlp.up_proj
    assert packed(layer) == 4 and layer.weight.quant_state.quant_type == quantization
    assert layer.weight.quant_state.nested == double and layer.compute_dtype == torch.bfloat16
    assert packed(model.lm_head) is None


@pytest.mark.parametrize(
    "method", [QLoRA(r=2), QLoRA(r=2, init="pissa"), LoRA(r=2), DoRA(r=2)], ids=lambda m: type(m).__name__
)
def test_promises(source, method, tmp_path):
    """What the battery asks of other methods, on a base in 4 bits."""
    model, base = in_four_bits(source), logits(in_four_bits(source), "llama")
    inject(model, method)
    # DoRA's norms read scales that bitsandbytes rounds to bfloat16 for eval mode on some CPUs
    torch.testing.assert_close(logits(model, "llama"), base, atol=1e-2 if isinstance(method, DoRA) else 2e-5, rtol=1e-4)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".delta." in n)
    before = {n: p.clone() for n, p in model.named_parameters() if ".delta." not in n}
    assert all(train(model, "llama").values())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if ".delta." not in n)
    shake(model)
    expected = logits(model, "llama")
    save_adapter(model, tmp_path / "a.safetensors")
    fresh = in_four_bits(source)
    load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh, "llama"), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, "llama"), expected)
    with disabled(model):
        assert torch.equal(logits(model, "llama"), base)
    with pytest.raises(MergeError, match="stored in 4 bits, and rounding the sum"):
        merge(model)
    assert torch.equal(logits(model, "llama"), expected)
    unload(model)
    assert torch.equal(logits(model, "llama"), base)
    assert all(".delta." in n for n in state_names(fresh) + trainable_names(fresh))


def test_correction_in_the_forward_pass(source):
    """The layer gives the unpacked weight plus s·B·A; also where eval mode has bitsandbytes rearrange the weight."""
    model = in_four_bits(source).train()
    inject(model, QLoRA(r=2))
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    layer.delta.lora_B.data.normal_()
    weight = plain(layer.weight).float()
    torch.testing.assert_close(layer(x), x @ (weight + layer.delta.product()).T, atol=1e-4, rtol=1e-4)
    original = transformers.AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.up_proj.weight
    assert 0 < (weight - original).abs().max() < 0.2 * original.abs().max()
    model.eval()
    layer(x)
    torch.testing.assert_close(plain(layer.weight).float(), weight, atol=2e-4, rtol=1e-2)


def test_trainer(source, tmp_path):
    """Trains, writes only the adapter, resumes bit for bit."""

    class Cut(L.Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.should_stop = trainer.current_epoch == 0

    straight, first, second = (Module(source) for _ in range(3))
    method = QLoRA(r=2)
    trainer(tmp_path, PEFT(method), TrainabilityCheck()).fit(straight, loader("llama"))
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_epochs=1)
    trainer(tmp_path, PEFT(method), saver, Cut()).fit(first, loader("llama"))
    content = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert set(content["state_dict"]) == set(adapter_state_dict(first)) and all(
        ".delta." in n for n in content["state_dict"]
    )
    trainer(tmp_path, PEFT(method)).fit(second, loader("llama"), ckpt_path=tmp_path / "cut.ckpt")
    assert same(adapter_state_dict(straight), adapter_state_dict(second))


def test_merged_float_model(source, tmp_path):
    """Written from the original base, in its own dtype: the float base with the adapter, not unpacked 4-bit numbers."""
    module = Module(source)
    with pytest.warns(UserWarning, match="leaves the adapters beside the base: .* stored in 4 bits"):
        trainer(tmp_path, PEFT(QLoRA(r=2)), MergeOnFitEnd(dirpath=str(tmp_path / "m"))).fit(module, loader("llama"))
    assert packed(module.net.model.layers[0].mlp.up_proj) == 4
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert getattr(written.config, "quantization_config", None) is None
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    layer = module.net.model.layers[0].mlp.up_proj
    expected = original.model.layers[0].mlp.up_proj.weight + layer.delta.product()
    torch.testing.assert_close(written.model.layers[0].mlp.up_proj.weight, expected, atol=1e-6, rtol=0)
    load_adapter(original, {"state_dict": adapter_state_dict(module), "lightning_peft": _section(module)})
    torch.testing.assert_close(logits(written, "llama"), logits(original, "llama"), atol=2e-5, rtol=1e-4)


def _section(module):
    from lightning_peft.saving.saved_adapter import SavedAdapter

    return SavedAdapter.of(module).section.as_dict()


def test_no_original_no_merge(source, tmp_path):
    module = Module(source)
    module.net.config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(MergeError, match=r"float base could not be loaded from .*gone"):
        trainer(tmp_path, PEFT(QLoRA(r=2)), MergeOnFitEnd(dirpath=str(tmp_path / "m"))).fit(module, loader("llama"))
    assert module.trainer.global_step == 0  # said before training
    module.net.config._name_or_path = ""
    with pytest.raises(MergeError, match="does not say where its base came from"):
        save_merged(module, tmp_path / "m")


def test_float_base_is_refused():
    model = llama()
    with pytest.raises(
        ConfigError, match=r"none of the 14 targets of LlamaForCausalLM is stored in 4 bits. Load the base so"
    ):
        inject(model, QLoRA())
    assert not any(".delta." in n for n, _ in model.named_parameters())
    with pytest.raises(ConfigError, match="choose one of nf4, fp4"):
        QLoRA(quantization="int8")


def test_torchao():
    """A base that torchao packed: adapted, trained, not merged."""
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(128, 64)).to(torch.bfloat16)
    wide = net[0].weight.detach().float()
    torchao.quantize_(net, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4))
    assert packed(net[0]) == 4 and (plain(net[0].weight).float() - wide).abs().max() < 0.02
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    before = net(x)
    inject(net, QLoRA(r=2))
    assert torch.equal(net(x), before) and net[0].delta.lora_A.dtype == torch.float32
    net[0].delta.lora_B.data.normal_()
    net(x).sum().backward()
    assert net[0].delta.lora_A.grad.any()
    with pytest.raises(MergeError, match="stored in 4 bits"):
        merge(net)
    unload(net)
    assert torch.equal(net(x), before)


def test_lightnings_precision(tmp_path):
    """Layers that BitsandbytesPrecision made are adapted, and a head that it quantised is an error.

    The Trainer refuses that plugin without CUDA, so it is called by hand; its layers would pack on the way to CUDA.
    """
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = bert()

        def training_step(self, batch, index):
            return self.net(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def run(method, ignore, module):
        BitsandbytesPrecision("nf4-dq", dtype=torch.float32, ignore_modules=ignore).convert_module(module)
        trainer(tmp_path, PEFT(method), Stop()).fit(module, loader("bert"))

    class Stop(L.Callback):
        def on_train_start(self, *_):
            raise InterruptedError

    module, method = Classifier(), QLoRA(r=2, modules_to_save="classifier")
    with pytest.raises(InterruptedError):
        run(method, {"net.classifier"}, module)
    layer = module.net.bert.encoder.layer[0].attention.self.query
    assert packed(layer) == 4 and packed(module.net.classifier) is None
    assert type(layer.delta.lora_A) is nn.Parameter and layer.delta.lora_A.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"classifier.weight is to train but is stored in few bits"):
        run(method, None, Classifier())


def test_eight_bits():
    """LoRA needs no values of the base; those of bitsandbytes' 8-bit weights cannot be read off the weight."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    net, x = nn.Sequential(layer.to("cpu")), torch.randn(3, 64)
    before = net(x)
    for method in (DoRA(r=2), LoRA(r=2, init="pissa")):
        with pytest.raises(ConfigError, match="scales of this 8-bit weight are kept apart"):
            inject(net, method)
        assert net[0] is layer
    inject(net, LoRA(r=2))
    assert torch.equal(net(x), before)
    net[0].delta.lora_B.data.normal_()
    net(x).sum().backward()
    assert net[0].delta.lora_A.grad.any()
    with pytest.raises(MergeError, match="stored in 8 bits"):
        merge(net)


def test_a_source_in_four_bits(source, tmp_path):
    """Files that are quantised themselves hold no float base: said before training, nothing is written."""
    in_four_bits(source).save_pretrained(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    inject(model, QLoRA(r=2))
    with pytest.raises(MergeError, match="its files are quantised themselves"):
        save_merged(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_float8_is_no_plain_weight():
    """A layer that keeps scales beside a float8 weight (as in FP8 models): adapted, never merged, never misread."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8, bias=False)
            self.scale = nn.Parameter(self.weight.detach().abs().max() / 448)
            self.weight = nn.Parameter((self.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x):
            return x @ (self.weight.float() * self.scale).T

    net, x = nn.Sequential(Scaled()), torch.randn(3, 8)
    before = net(x)
    with pytest.raises(ConfigError, match="scales of this 8-bit weight are kept apart"):
        inject(net, DoRA(r=2))
    inject(net, LoRA(r=2))
    assert torch.equal(net(x), before) and net[0].delta.lora_A.dtype == torch.float32
    with pytest.raises(MergeError, match="stored in 8 bits"):
        merge(net)
