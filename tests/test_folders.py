"""The index of a folder of shards: Pythons write enums and paths in ways of their own; code in it is refused."""

from __future__ import annotations

import copyreg
import io
import pickle
from pathlib import PurePosixPath

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from lightning_peft import CheckpointError
from lightning_peft.folders import INDEX, read_index, shapes


def dumps(value, reduce):
    """A pickle whose enum members are written as `reduce` says."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {**copyreg.dispatch_table, _MEM_FORMAT_ENCODING: reduce}
    pickler.dump(value)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder that torch wrote."""
    checkpoint.save({"state_dict": {"a": torch.ones(2, 3)}}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


@pytest.mark.parametrize(
    "reduce",
    [
        pytest.param(lambda member: (type(member), (member.value,)), id="by value"),
        pytest.param(lambda member: (getattr, (type(member), member.name)), id="by name, Python 3.11.0 to 3.11.3"),
    ],
)
def test_enums_of_every_python(folder, reduce):
    """The same index."""
    index = pickle.loads((folder / INDEX).read_bytes())
    (folder / INDEX).write_bytes(dumps(index, reduce))
    assert read_index(folder) == index
    assert {name: value.shape for name, value in shapes(folder).items()} == {"a": (2, 3)}


def test_paths_of_python_3_13(tmp_path):
    """A path is one on any other Python too."""
    (tmp_path / INDEX).write_bytes(b"cpathlib._local\nPurePosixPath\n(Va\nVb\ntR.")
    assert read_index(tmp_path) == PurePosixPath("a/b")


@pytest.mark.parametrize("kind, name", [(_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__")])
def test_other_attributes_are_refused(tmp_path, kind, name):
    """`getattr` is for members of enums alone."""

    class Taken:
        def __reduce__(self):
            return getattr, (kind, name)

    (tmp_path / INDEX).write_bytes(pickle.dumps(Taken()))
    with pytest.raises(CheckpointError, match=f"it takes '{name}' of .*, which is not loaded"):
        read_index(tmp_path)
