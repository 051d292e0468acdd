"""Files are told apart by what is in them."""

import torch
from torch import nn

from lightning_peft import LoRA, adapter_state_dict, inject
from lightning_peft.checkpoint import section
from lightning_peft.files import read, write_adapter


def test_a_safetensors_file_may_start_like_a_pickle(tmp_path):
    """Its first byte is the low one of a length; 0x80, with which every pickle begins, is one of 32."""
    net, starts = nn.Sequential(nn.Linear(2, 2)), set()
    inject(net, LoRA(r=1))
    state, info = adapter_state_dict(net), section(net)
    for size in range(0, 320, 8):
        path = tmp_path / f"{size}.safetensors"
        write_adapter(path, state, info | {"note": "x" * size})
        starts.add(path.read_bytes()[0])
        assert all(torch.equal(tensor, state[name]) for name, tensor in read(path)[0].items())
    assert 0x80 in starts
