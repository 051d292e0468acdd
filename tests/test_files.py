"""Files are told apart by what is in them."""

import torch

from lightning_peft.files import read, write_adapter


def test_a_safetensors_file_may_start_like_a_pickle(tmp_path):
    """Its first byte is the low one of a length; 0x80, with which every pickle begins, is one of 32."""
    starts = set()
    for size in range(0, 320, 8):
        path = tmp_path / f"{size}.safetensors"
        write_adapter(path, {"a": torch.ones(2)}, {"format_version": 1, "note": "x" * size})
        starts.add(path.read_bytes()[0])
        assert torch.equal(read(path)[0]["a"], torch.ones(2))
    assert 0x80 in starts
