"""Files are told apart by what is in them."""

import json

import pytest
import torch
import transformers
from torch import nn

from lightning_peft import LoRA, LoRAFA, adapter_state_dict, inject, save_adapter
from lightning_peft.files import read, write_adapter
from lightning_peft.saving.saved_adapter import SavedAdapter


def test_a_safetensors_file_may_start_like_a_pickle(tmp_path):
    """Its first byte is the low one of a length; 0x80, with which every pickle begins, is one of 32."""
    net, starts = nn.Sequential(nn.Linear(2, 2)), set()
    inject(net, LoRA(r=1))
    state, info = adapter_state_dict(net), SavedAdapter.of(net).section.as_dict()
    for size in range(0, 320, 8):
        path = tmp_path / f"{size}.safetensors"
        write_adapter(path, state, info | {"note": "x" * size})
        starts.add(path.read_bytes()[0])
        assert all(torch.equal(tensor, state[name]) for name, tensor in read(path)[0].items())
    assert 0x80 in starts


@pytest.mark.parametrize(("method", "kib"), [(LoRA(r=8), 64), (LoRAFA(r=8), 80)], ids=["LoRA", "LoRAFA"])
def test_a_header_is_short_and_says_everything(method, kib, tmp_path):
    """Thirty decoder layers, 420 tensors: read again, the section is that of a checkpoint."""
    sizes = {"hidden_size": 18, "intermediate_size": 24, "num_attention_heads": 9, "num_key_value_heads": 3}
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=30, vocab_size=32))
    inject(net, method)
    save_adapter(net, tmp_path / "a.safetensors")
    state, info = read(tmp_path / "a.safetensors")
    there = (tmp_path / "a.safetensors").stat().st_size
    assert len(state) == 420 and there - sum(t.nbytes for t in state.values()) <= kib * 1024
    expected = json.loads(json.dumps(SavedAdapter.of(net).section.as_dict()))
    for key in ("keys", "trainable"):
        assert sorted(info.pop(key)) == sorted(expected.pop(key))
    assert info.pop("checksum") and info == expected
