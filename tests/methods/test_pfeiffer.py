"""Pfeiffer adapters against reference values."""

import pytest

from lightning_peft import Pfeiffer
from tests.adapters import check_golden


@pytest.mark.parametrize("name", ["pfeiffer_bert", "pfeiffer_llama"])
def test_golden(name):
    check_golden(name, Pfeiffer(reduction_factor=4), norm=True)
