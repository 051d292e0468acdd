"""Compacter++ against reference values."""

from lightning_peft import CompacterPlusPlus
from tests.adapters import check_golden


def test_golden():
    check_golden("compacterpp_bert", CompacterPlusPlus(reduction_factor=4), norm=True)
