"""Settings for all tests: no network, one thread, quiet libraries, reproducible numbers."""

import itertools
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

_ports = itertools.count()


@pytest.fixture(autouse=True)
def _own_port(monkeypatch):
    """Distributed tests of two workers must not choose one port; below the range that the system hands out itself."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    monkeypatch.setenv("MASTER_PORT", str(20000 + 2000 * worker + next(_ports) % 2000))
    yield
    # A Trainer that ran processes in this test has left its rank here. The next one that starts processes would take
    # itself for one of them, and wait for the others for ever.
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _settled():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning.*")
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parent.parent
