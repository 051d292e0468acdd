"""A quiet start: what the libraries say to developers is no news for someone who runs a config."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from typing import Any

from lightning_peft.cli.terminal import filled, width_of

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*The dirpath has changed from .*",
    r".*The number of training batches .* is smaller than the logging interval.*",
)
#: what they say at import is about kernels for other machines, and about each other
_LOGGERS = ("torchao", "torch.utils._pytree")
_TIPS = (
    "💡 Tip",
    "GPU available",
    "TPU available",
    "HPU available",
    "`Trainer.fit` stopped",
    "Seed set to",
    "`weights_only` was not set",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Loading `train_dataloader`",
)
#: of a run that is cut short; the command says itself what was saved
_CUT_SHORT = re.compile(r"An \w+ was raised with message")


#: loggers of Lightning under both names that it is published by
LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


def environment() -> None:
    """Set variables and warning filters: before the libraries are imported."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not _wandb_key():
        os.environ.setdefault("WANDB_MODE", "offline")
    if os.environ.get("WANDB_MODE") == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")  # the last screen says where the run is and how to upload it
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)


def logs() -> None:
    """Filter the handlers that Lightning made when it was imported, and fit lines and warnings to the terminal."""
    for name in LIGHTNING_LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_not_a_tip)
            handler.setFormatter(_Filled())
    warnings.formatwarning = _one_warning


class _Filled(logging.Formatter):
    """Lines that end between words."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, as wide as the terminal."""
        return filled(super().format(record), width_of(sys.stderr))


def _one_warning(message: Warning | str, *place: Any, **options: Any) -> str:
    """A warning without the line of code that gave it, which is none of the user's."""
    return filled(f"lightning-peft: warning: {' '.join(str(message).split())}", width_of(sys.stderr)) + "\n"


def silence_wandb() -> None:
    """Silence W&B's own lines for an offline run, the notice about an option that Lightning passes included."""
    if os.environ.get("WANDB_SILENT") == "true":
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True, show_warnings=False))


def _not_a_tip(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not message.startswith(_TIPS) and not _CUT_SHORT.match(message)


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    if not os.path.isfile(netrc):
        return False
    with open(netrc) as file:
        return "wandb" in file.read()
