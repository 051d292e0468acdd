"""A quiet start: what the libraries say to developers is no news for someone who runs a config."""

from __future__ import annotations

import logging
import os
import warnings

_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*LightningCLI's args parameter.*",
    r".*in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*The dirpath has changed from .*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*You have overridden `on_before_batch_transfer`.*",
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
    "Loading `train_dataloader`",
    "An KeyboardInterrupt was raised",
    "An SIGTERMException was raised",
)


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
    """Filter the handlers that Lightning made when it was imported."""
    for name in LIGHTNING_LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_not_a_tip)


def silence_wandb() -> None:
    """Silence W&B's own lines for an offline run, the notice about an option that Lightning passes included."""
    if os.environ.get("WANDB_SILENT") == "true":
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True, show_warnings=False))


def _not_a_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_TIPS)


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
    if not os.path.isfile(netrc):
        return False
    with open(netrc) as file:
        return "wandb" in file.read()
