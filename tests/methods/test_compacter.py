"""Compacter against reference values."""

from lightning_peft import Compacter
from tests.adapters import check_golden


def test_golden():
    check_golden("compacter_bert", Compacter(reduction_factor=4))
