"""The session of a LightningModule with adapters: everything that is patched for them, and how it is undone.

================================  ==============================================  ================================
what                              why                                             until
================================  ==============================================  ================================
of the module
  state-dict hook                 checkpoints hold the adapter alone              `Session.remove`
  load-state-dict hook            frozen weights may be missing in a file         `Session.remove`
  ``on_save_checkpoint``          the file gets its description                   `Session.remove`
  ``on_load_checkpoint``          the file is compared before it is loaded        `Session.remove`
  ``configure_model``             a network that is built there is adapted at     that call, or the end of the run
                                  its end
of the Trainer's strategy
  ``load_checkpoint``             sharding strategies load weights before any     the end of the run
                                  hook: the file is compared first
  ``batch_to_device``             methods see the batch before it is moved        the end of the run
  ``exclude_frozen_parameters``   DeepSpeed writes weights past the module        the next run, or `Session.remove`
  ``checkpoint_io``               a kill leaves no half file, a file is read      stays with the Trainer
                                  without unpickling objects
================================  ==============================================  ================================

What is undone by `Session.remove` stays after a fit, because checkpoints are still saved and loaded then: by
``trainer.save_checkpoint``, by callbacks when the run has failed, by a Trainer without `PEFT`. The hooks are on the
module and not on the callback, because ``Callback.on_save_checkpoint`` is skipped for files of weights alone and runs
before weight averaging rewrites the state; the module's own hooks are always called, and last.

`unload` and `merge_and_unload` remove the session of the module that they are called with. Called with the network
inside it, they leave the hooks, which do nothing in a module without adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.lightning_packages import every
from lightning_peft.model.adapters import Adapters
from lightning_peft.model.hollow import settle_base, waits
from lightning_peft.model.injection import SESSION
from lightning_peft.saving.saved_adapter import check_base
from lightning_peft.saving.section import Section
from lightning_peft.trainer.checkpoint_io import use_safe_files
from lightning_peft.trainer.checkpoints import compare, describe, filter_state, forgive_frozen
from lightning_peft.trainer.driving import Transfer
from lightning_peft.trainer.loading import loader_for
from lightning_peft.trainer.objects import call_without_objects, check_left_out, say_what_is_written
from lightning_peft.trainer.optimizer_states import arrange_states
from lightning_peft.trainer.strategies import explained, filters_itself, loads_late, settings

if TYPE_CHECKING:
    import lightning.pytorch as L

_CHECKPOINT_HOOKS = ("on_save_checkpoint", "on_load_checkpoint")
_ABSENT: Any = object()
#: an attribute that was set on an object, and what it had there before, perhaps `_ABSENT`
Patched = tuple[Any, str, Any]


class Session:
    """What a LightningModule and its Trainer have from us; see the table above.

    It is kept at one attribute of the module, and is copied and pickled with it.

    >>> import lightning.pytorch as L
    >>> from lightning_peft import LoRA, inject, unload
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> module = BoringModel()
    >>> inject(module, LoRA())
    >>> Session.on(module).keep_small("trainable")
    >>> list(module.state_dict())
    ['layer.delta.lora_A', 'layer.delta.lora_B']
    >>> unload(module)
    >>> list(module.state_dict()), Session.of(module)
    (['layer.weight', 'layer.bias'], None)
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        #: what checkpoints hold, "trainable" or "full"; None before adapters are there
        self.save: str | None = None
        self._has_saved = False  # what is said of the files is said of the first one
        self._handles: list[Any] = []
        self._own_hooks: dict[str, Any] = {}  # what the user has set on the instance and ours stand in front of
        # of the Trainer's strategy, and not copied with the module
        self._for_a_run: list[Patched] = []
        self._for_files: list[Patched] = []
        # an injection that waits for so many calls of `configure_model`, and one that waits for the end of such a call
        self._deferred: tuple[Callable[[], None], int] | None = None
        self._due: Callable[[], None] | None = None
        # between the loading of a checkpoint and the moment when the rest of it can be compared
        self._unseen_base: Section | None = None
        self._unsorted: dict[str, Any] | None = None

    @staticmethod
    def of(module: nn.Module) -> Session | None:
        """The session of a module, if it has one."""
        return module.__dict__.get(SESSION)

    @classmethod
    def on(cls, module: L.LightningModule) -> Session:
        """The session of a module, a new one if it has none."""
        return module.__dict__.setdefault(SESSION, cls(module))

    def remove(self) -> None:
        """Undo everything."""
        self.end_run()
        _undo(self._for_files)
        for handle in self._handles:
            handle.remove()
        for name in _CHECKPOINT_HOOKS:
            self._uncover(name)
        self.module.__dict__.pop(SESSION, None)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the module has no part in the run."""
        return self.__dict__ | {"_for_a_run": [], "_for_files": []}

    def _cover(self, name: str, ours: Callable[..., None]) -> None:
        """Put a hook of ours in front of the module's own."""
        if name in self.module.__dict__:
            self._own_hooks[name] = self.module.__dict__[name]
        self.module.__dict__[name] = ours

    def _uncover(self, name: str) -> None:
        self.module.__dict__.pop(name, None)
        if name in self._own_hooks:
            self.module.__dict__[name] = self._own_hooks.pop(name)

    def _own(self, name: str) -> Callable[[dict[str, Any]], None]:
        """The module's own hook: set on the instance, or of its class."""
        return self._own_hooks.get(name) or getattr(type(self.module), name).__get__(self.module)

    # ---- the module's checkpoints ----------------------------------------------------------------------------------
    def keep_small(self, save: str) -> None:
        """Make saving trainable-only and loading strict, from now on."""
        adapters = Adapters.of(self.module)
        if adapters.complete:
            save = "full"  # the whole state of the module, with all that a plain checkpoint holds
        callbacks = self.module._trainer.callbacks if self.module._trainer is not None else []
        if any(isinstance(callback, every("callbacks.WeightAveraging")) for callback in callbacks):
            adapters.record.samples.ignore_rounding = True
        known = self.save is not None
        self.save = save
        if known:
            return
        self._handles = [
            self.module.register_state_dict_post_hook(_filter_state),
            self.module.register_load_state_dict_post_hook(forgive_frozen),
        ]
        self._cover("on_save_checkpoint", self._on_save_checkpoint)
        self._cover("on_load_checkpoint", self._on_load_checkpoint)

    def _on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if Adapters.find(self.module) is not None:
            describe(self.module, checkpoint, self.save, first_time=not self._has_saved)
        self._own("on_save_checkpoint")(checkpoint)
        if not self._has_saved:
            say_what_is_written(checkpoint)
        self._has_saved = True

    def _on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self._own("on_load_checkpoint")
        check_left_out(self.module, checkpoint, own)
        section = compare(self.module, checkpoint)
        if section is not None and waits(self.module):
            self._unseen_base = section
        trainer = self.module._trainer
        fits = section is not None and trainer is not None and trainer.state.fn == "fit" and not loads_late(trainer)
        if fits and "optimizer_states" in checkpoint and "state_dict" in checkpoint:
            self._unsorted = checkpoint  # until the optimizers are there
        call_without_objects(own, self.module, checkpoint)

    def check_base(self) -> None:
        """Compare a base that was loaded late with that of the checkpoint."""
        section, self._unseen_base = self._unseen_base, None
        if settle_base(self.module) and section is not None:
            check_base(section, Adapters.of(self.module))

    def settle_optimizers(self, trainer: L.Trainer) -> None:
        """Bring the optimizer states of a checkpoint into the order of the optimizers that are there by now."""
        checkpoint, self._unsorted = self._unsorted, None
        # BackboneFinetuning and its like rebuild the groups of the saved optimizer in their own on_fit_start.
        rebuilt = any(isinstance(callback, every("callbacks.BaseFinetuning")) for callback in trainer.callbacks)
        if checkpoint is not None and not rebuilt:
            arrange_states(trainer, self.module, checkpoint, "The checkpoint")

    # ---- a run of the Trainer --------------------------------------------------------------------------------------
    def begin_run(self, trainer: L.Trainer) -> None:
        """Patch the strategy of a Trainer."""
        self.end_run()
        _undo(self._for_files)  # if the last run was one of another Trainer
        use_safe_files(trainer)
        strategy = trainer.strategy
        self._for_files = [_set(strategy, name, value) for name, value in settings(trainer).items()]
        self._for_a_run = [
            _set(strategy, "load_checkpoint", loader_for(trainer, self.module, strategy.load_checkpoint)),
            _set(strategy, "batch_to_device", Transfer(self.module, strategy.batch_to_device)),
        ]

    def end_run(self) -> None:
        """Undo what only the run needed."""
        self._unseen_base = self._unsorted = None
        if self._deferred is not None:  # `configure_model` was called less often than expected
            self._deferred = None
            self._uncover("configure_model")
        _undo(self._for_a_run)

    def defer(self, inject: Callable[[], None], calls: int) -> None:
        """Let the next ``calls`` of ``configure_model`` inject at their end: each may build the network anew."""
        self._deferred = inject, calls
        # Without functools.wraps: Lightning looks through that, and does not call a hook that is its own.
        self._cover("configure_model", self._configure_and_inject)

    def _configure_and_inject(self) -> None:
        assert self._deferred is not None
        inject, calls = self._deferred
        self._deferred = None
        self._uncover("configure_model")
        self._due = inject
        try:
            with explained(self.module):
                self.module.configure_model()
        finally:
            self._due = None
        inject()
        if calls > 1:
            self.defer(inject, calls - 1)

    def inject_now(self) -> None:
        """Inject before ``configure_model`` has come to its end."""
        if self._due is not None:
            self._due()


def _filter_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Looks the session up when it is called, because torch notes something on a hook: a bound method does not do."""
    session, trainer = Session.of(module), module._trainer
    if session is None or Adapters.find(module) is None or (trainer is not None and filters_itself(trainer)):
        return
    filter_state(module, state, prefix, session.save)


def _set(target: Any, name: str, value: Any) -> Patched:
    earlier = vars(target).get(name, _ABSENT)
    setattr(target, name, value)
    return target, name, earlier


def _undo(patched: list[Patched]) -> None:
    while patched:
        target, name, earlier = patched.pop()
        if earlier is _ABSENT:
            vars(target).pop(name, None)
        else:
            setattr(target, name, earlier)


def inject_now(pl_module: L.LightningModule) -> None:
    """Inject what the Trainer's `PEFT` callback holds; for ``configure_model``, between building and sharding.

    Does nothing where there is no Trainer, no such callback, or nothing left to inject.
    """
    session = Session.of(pl_module)
    if session is not None:
        session.inject_now()
