"""Houlsby adapters against reference values."""

import pytest

from lightning_peft import Houlsby
from tests.adapters import check_golden


@pytest.mark.parametrize("name", ["houlsby_bert", "houlsby_gpt2"])
def test_golden(name):
    check_golden(name, Houlsby(reduction_factor=4))
