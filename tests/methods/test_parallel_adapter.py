"""Parallel adapters against reference values."""

import pytest

from lightning_peft import ParallelAdapter
from tests.adapters import check_golden


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("parallel_bert", ParallelAdapter(reduction_factor=4)),
        ("parallel_llama", ParallelAdapter(reduction_factor=4)),
        ("parallel_learned_scale_bert", ParallelAdapter(scaling="learned")),
    ],
)
def test_golden(name, method):
    check_golden(name, method)
