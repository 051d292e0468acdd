"""A LightningModule for the usual tasks on any transformers model, and for any loss on any network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.callbacks.peft import PEFT
from lightning_peft.errors import ConfigError
from lightning_peft.files import SECTION
from lightning_peft.format1 import upgraded_section
from lightning_peft.lightning_packages import L, LightningModule, every, rank_zero_info, restricted_classmethod
from lightning_peft.model.adapters import Adapters
from lightning_peft.rates import SuggestedRate
from lightning_peft.saving.checkpoint import inject_saved
from lightning_peft.saving.section import Section
from lightning_peft.task.batches import check_labels
from lightning_peft.task.divergence import check_finite, warn_of_rise
from lightning_peft.task.hyperparameters import check, numbered, package_of_cli, plain_options, tidy, unstorable
from lightning_peft.task.kinds import find_task
from lightning_peft.task.labels import ask_data, check_words, fit_network
from lightning_peft.task.loading import load, load_tokenizer
from lightning_peft.task.losses import TokenLoss
from lightning_peft.task.metrics import stages
from lightning_peft.task.modes import checkpoint_activations, train_mode
from lightning_peft.task.objectives import custom_loss, task_loss
from lightning_peft.task.optimization import build_optimizer, default_rate, linear_schedule
from lightning_peft.task.predictions import predict
from lightning_peft.task.speed import Speed
from lightning_peft.trainer.reload import rebuild
from lightning_peft.trainer.session import Session

if TYPE_CHECKING:
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
else:
    # LightningCLI looks these types up here when it parses the arguments of a TaskModule.
    _cli = import_module(f"{L.__name__}.cli")
    LRSchedulerCallable, OptimizerCallable = _cli.LRSchedulerCallable, _cli.OptimizerCallable

#: share of all steps the default schedule warms up for: LoRA, arXiv:2106.09685, table 9
WARMUP = 0.06


class TaskModule(LightningModule):
    """Train, test and predict with a pretrained model; methods come from the `PEFT` callback.

    Logs ``{train,val,test}_loss`` and, per task, accuracy and macro F1, MAE and Pearson's r, or perplexity. Batches
    are dicts as transformers' tokenizers and processors give them, with ``labels``; fields that are no tensors are
    not shown to the model but repeated in predictions. With ``task="custom"`` a dict gives ``forward`` the fields it
    names, a tuple its all but last elements (the last is the target), anything else goes in as it is.

    The network is built in ``configure_model`` as ``self.model``. What rebuilds it is in the hyper-parameters, so
    ``TaskModule.load_from_checkpoint(path)`` works on adapter checkpoints, without a Trainer. A network given as an
    object cannot be rebuilt: ``TaskModule.load_from_checkpoint(path, model=network)``.

    Args:
        model: hub id, folder, GGUF file (both also ``pkg://PACKAGE/PATH``), a network, or the fields of a
            transformers configuration with its ``model_type``, for a network with (reproducible) random weights.
        task: ``sequence-classification``, ``regression``, ``token-classification``, ``causal-lm``, ``masked-lm``,
            ``seq2seq-lm``, ``causal-cloze``, ``masked-cloze``, ``image-classification``, ``audio-classification`` or
            ``custom``.
        num_labels: number of classes, where they have no names.
        label_names: the classes; by default those of the data module, else of the checkpoint.
        label_words: for the cloze tasks, token ids of each class's words; by default those of the data module.
        optimizer: by default AdamW at `suggest_lr`, the rate for the method, the network and the length of the run.
        lr_scheduler: by default linear warm-up and decay, over optimizer steps.
        lr_interval: whether ``lr_scheduler`` counts epochs or optimizer steps.
        lr: replaces that rate in the default optimizer.
        weight_decay: of the default optimizer.
        warmup: optimizer steps (int) or share of them (float; 0.06 by default) of the default schedule.
        gradient_checkpointing: recompute activations in backward: less memory, more time.
        base_mode: ``train`` (dropout in the base is on, as in full fine-tuning) or ``eval`` (only what trains drops).
        loss: for ``custom``: a function of (outputs, batch), or its import path. Gives the loss, or a dict with
            ``loss`` and further values to log.
        model_kwargs: for ``from_pretrained``: ``dtype``, ``attn_implementation``, …
        tokenizer: the tokenizer or its source, for predictions; by default the data module's, else the model's.
        generate: options of ``generate`` in predictions, e.g. ``{"max_new_tokens": 32}``.

    Raises:
        ConfigError: an unknown task, a model that is not there, options that exclude each other.

    >>> from lightning_peft import TaskModule
    >>> tiny = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> module = TaskModule(tiny, "sequence-classification", label_names=["no", "yes"])
    >>> module.configure_model(); module.label_names
    ['no', 'yes']
    """

    def __init__(
        self,
        model: str | nn.Module | dict[str, Any] | None,
        task: str,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        label_words: list[list[int]] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr: float | None = None,
        weight_decay: float = 0.0,
        warmup: int | float | None = None,
        gradient_checkpointing: bool = False,
        base_mode: Literal["train", "eval"] = "train",
        loss: Callable[..., Any] | str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer: Any = None,
        generate: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.task = find_task(task)
        self.label_names, self.label_words = numbered(label_names, num_labels), label_words
        check(self.task, self.label_names, locals())
        # Of the package whose LightningCLI builds this module, if one does: it hands over the parsed configuration.
        package_of_cli().LightningModule.save_hyperparameters(self, ignore=unstorable(locals()), logger=False)
        tidy(self, model, model_kwargs)
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        self.custom_loss, self.generate = loss, generate or {}
        self.load_options = dict(model_kwargs or {})
        self.tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.token_loss = TokenLoss(task)
        self.speed = Speed()
        self.suggested: SuggestedRate | None = None  # where the learning rate of this fit comes from, if not from lr
        self.first_loss: Tensor | None = None  # of this fit
        self.metrics: Any = None  # a ModuleDict once the labels are known
        given = isinstance(model, nn.Module)
        self.source = None if given else self.hparams["model"]
        self.model: Any = model if given else None

    #: arguments that may be import paths, which a file does not choose, each with a test whether a value is one
    import_fields: ClassVar[Mapping[str, Callable[[Any], bool]]] = {"loss": lambda value: isinstance(value, str)}

    @restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> TaskModule:
        """As `LightningModule.load_from_checkpoint`; nothing in the checkpoint chooses code.

        Options such as ``trust_remote_code`` in it are left out, and import paths must lead to classes of torch,
        lightning, torchmetrics, transformers or lightning_peft. What is given here as an argument is used as it is.

        Raises:
            CheckpointError: the checkpoint is damaged, or names other code; the message says which argument to give.
        """
        return rebuild(cls, checkpoint_path, *args, **kwargs)

    # ---- building --------------------------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Build the network, once; label names come from the data module where none are given."""
        if self.metrics is not None:
            return
        self.label_names = ask_data(self._data(), self.task, self.label_names)
        if self.model is None:
            self.model = self._load()
        if self.task.is_cloze or self.task.target in ("class", "token"):
            self._settle_classes(self.model)
        if self.hparams.gradient_checkpointing:
            checkpoint_activations(self.model)
        self._set_padding(self.model)
        self.metrics = stages(self.task, len(self.label_names or []))

    def _load(self) -> nn.Module:
        if self.source is None:
            raise ConfigError(
                "model is missing. A checkpoint of a network given as an object does not hold the network:"
                " TaskModule.load_from_checkpoint(path, model=network)."
            )
        callbacks = self._trainer.callbacks if self._trainer is not None else []
        for method in [m for c in callbacks if isinstance(c, PEFT) for m in c.methods or []]:
            self.load_options = {**method.load_options(), **self.load_options}
        self.hparams["model_kwargs"] = plain_options(self.load_options)
        network, said = load(self.source, self.task, self.label_names, self.load_options)
        fits = self._trainer is not None and self._trainer.state.fn == "fit"
        for line in said if fits else []:  # otherwise a checkpoint fills a new head at once
            rank_zero_info(line)
        return network

    def _settle_classes(self, network: nn.Module) -> None:
        if self.task.is_cloze:
            self.label_words = self.label_words or getattr(self._data(), "label_words", None)
            check_words(self.task, self.label_names, self.label_words)
            self.hparams["label_words"] = self.label_words
        else:
            self.label_names = fit_network(network, self.label_names)
            self.hparams["num_labels"] = len(self.label_names)
        self.hparams["label_names"] = list(self.label_names or [])

    def _set_padding(self, network: nn.Module) -> None:
        """Decoders with a classifier on top must know the padding token to find the last real one."""
        config = getattr(network, "config", None)
        tokenizer = self.tokenizer or getattr(self._data(), "tokenizer", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        if config is None or pad is None or getattr(config, "pad_token_id", None) is not None:
            return
        config.pad_token_id = pad
        if isinstance(self.source, str):
            self.hparams["model_kwargs"] = {**self.hparams.model_kwargs, "pad_token_id": pad}

    def _data(self) -> Any:
        return self._trainer.datamodule if self._trainer is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt the network as the checkpoint describes, if nothing else has; the strict load follows."""
        if SECTION in checkpoint and Adapters.find(self) is None:
            section = Section.parse(upgraded_section(checkpoint[SECTION]), "The checkpoint")
            inject_saved(self, section, values=not section.full)
            Session.on(self).keep_small("full" if section.full else "trainable")
            self.on_load_checkpoint(checkpoint)  # now the installed hook, which compares and makes way

    # ---- training --------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        self.configure_model()
        return self.model(*args, **kwargs)

    def on_fit_start(self) -> None:
        """Choose train or eval mode for the base; say that, and where the learning rate comes from."""
        rank_zero_info(train_mode(self.model, self.hparams.base_mode))
        logged = {k: v for k, v in self.hparams.items() if not k.startswith("_")}
        if self.suggested is not None:
            rank_zero_info(str(self.suggested))
            logged |= {"lr": self.suggested.lr, "lr_derivation": self.suggested.derivation}
        if self.hparams.base_mode == "eval":  # asked for, so no news
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training")
        self.first_loss = None
        data = getattr(self._data(), "hparams", None)
        if data:
            logged["data"] = dict(data)  # under a name of their own: both may have options that are called the same
        for logger in self.loggers:
            logger.log_hyperparams(logged)

    def on_validation_end(self) -> None:
        """Validation is no training time. A loss that is no number ends the fit."""
        self.speed.restart()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            check_finite(self.trainer.callback_metrics, "val_loss", self._rate())

    def on_train_end(self) -> None:
        """Say whether the fit has diverged."""
        metrics = self.trainer.callback_metrics
        check_finite(metrics, "train_loss_epoch", self._rate())
        warn_of_rise(self.first_loss, metrics.get("train_loss_epoch"), self._rate())

    def _rate(self) -> float:
        """The highest learning rate of the optimizers, before schedules."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step; logs ``train_loss`` per step and ``train_loss_epoch`` and the metrics per epoch.

        Of text also ``train_tokens_per_second``: of one process, padding not counted.
        """
        loss, count = self._step(batch, "train")
        if self.first_loss is None:
            self.first_loss = loss.detach()
        if (rate := self.speed.step(batch)) is not None:
            self.log("train_tokens_per_second", rate, batch_size=1)
        self.log("train_loss", loss, prog_bar=True, batch_size=count)
        self.log("train_loss_epoch", loss, on_step=False, on_epoch=True, batch_size=count, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss`` and the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss`` and the metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, stage: str) -> None:
        loss, count = self._step(batch, stage)
        self.log(f"{stage}_loss", loss, prog_bar=stage == "val", batch_size=count, sync_dist=True)

    def _step(self, batch: Any, stage: str) -> tuple[Tensor, int]:
        options = {"on_step": False, "on_epoch": True}
        if self.task.target == "custom":
            loss, count, values = custom_loss(self.custom_loss, self.model, batch)
            values = {f"{stage}_{name}": value for name, value in values.items()}
            self.log_dict(values, batch_size=count, sync_dist=True, **options)
            return loss, count
        if self.task.target in ("class", "token") and (self.current_epoch == 0 or not self.training):
            check_labels(batch, self.label_names or [])  # waits for the GPU, and an epoch has shown them all
        loss, count, seen = task_loss(self.task, self.model, batch, self.token_loss, self.label_words)
        metrics = self.metrics[f"{stage}_"]
        metrics.update(*seen)
        self.log_dict(metrics, batch_size=count, **options)
        return loss, count

    def configure_optimizers(self) -> Any:
        """The user's factories over what trains, or the method's own settings with warm-up and linear decay."""
        self.suggested = None
        if self.optimizer_factory is not None:
            optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        else:
            precision = self.trainer.precision_plugin
            mixed = (
                isinstance(precision, every("plugins.MixedPrecision")) or getattr(precision, "scaler", None) is not None
            )
            lr = self.hparams.lr
            if lr is None:
                self.suggested = default_rate(self, self.trainer.estimated_stepping_batches)
                lr = self.suggested.lr
            optimizer = build_optimizer(self, lr, self.hparams.weight_decay, mixed_precision=mixed)
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}

    def _schedule(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self.scheduler_factory is None:
            warmup = WARMUP if self.hparams.warmup is None else self.hparams.warmup
            schedule = linear_schedule(optimizer, warmup, self.trainer.estimated_stepping_batches)
            return {"scheduler": schedule, "interval": "step"}
        schedule = self.scheduler_factory(optimizer)
        settings = {"scheduler": schedule, "interval": self.hparams.lr_interval}
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            settings["monitor"] = getattr(schedule, "monitor", "val_loss")
        return settings

    # ---- predictions -----------------------------------------------------------------------------------------------
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One dict for each example: what the batch says of it, and the prediction.

        ``label``, ``score`` and ``scores`` for classes; ``value``; ``labels`` and ``scores`` of the real tokens;
        ``generated`` text; ``text`` with the masks filled in; or ``output`` of a custom network.
        """
        return predict(
            self.task, self.model, batch, self.label_names, self.find_tokenizer, self.generate, self.label_words
        )

    def find_tokenizer(self, needed: bool = True) -> Any:
        """The tokenizer given, that of the data module, or that of the model's source.

        Raises:
            ConfigError: there is none, and it is needed.
        """
        self.tokenizer = self.tokenizer or getattr(self._data(), "tokenizer", None)
        name = self.hparams.get("tokenizer") or self.source
        if self.tokenizer is None and isinstance(name, str):
            self.tokenizer = load_tokenizer(name, bool(self.load_options.get("trust_remote_code")))
        if self.tokenizer is None and needed:
            raise ConfigError(f"{self.task.name} predictions need a tokenizer, {name!r} has none: give tokenizer=... .")
        return self.tokenizer
