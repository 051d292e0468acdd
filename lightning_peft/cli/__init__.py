"""The command ``lightning-peft``: answers that need no Lightning come first, because they should come fast."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from lightning_peft.cli.terminal import say_error
from lightning_peft.errors import PEFTError
from lightning_peft.requirements import require_package
from lightning_peft.untrusted import short

USAGE = """usage: lightning-peft COMMAND [options]

  fit       train with a config: lightning-peft fit --config quickstart.yaml [--peft LoRA --peft.r 16]
  validate  measure a checkpoint on the validation data
  test      measure a checkpoint on the test data
  predict   write predictions
  compare   many methods on one task: table and plots (lightning-peft compare --config task/bbc_topics.yaml)
  methods   list the methods with their parameters, learning rates and papers
  inspect   say what a checkpoint or adapter holds: lightning-peft inspect CKPT
  export    write it for peft: lightning-peft export CKPT DIR [--base PATH]
  merge     merge it into its base, for from_pretrained: lightning-peft merge CKPT DIR [--base PATH]

Options of a command: lightning-peft fit --help. A method's options: lightning-peft fit --peft.help LoRA.
Without --config, validate, test and predict read the config that fit saved beside --ckpt_path."""


COMMANDS = ("fit", "validate", "test", "predict", "compare", "methods", "inspect", "export", "merge")
#: what other programs call these commands
_OTHER_NAMES = {"train": "fit", "finetune": "fit", "evaluate": "test", "eval": "test", "generate": "predict"}
#: parts of messages that Lightning means for the user and raises as general errors
_MEANT = ("conditioned on metric", "is set but", "is not in bounds, numpy accepts")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 after a user's error (one message, no traceback)."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        from lightning_peft import __version__

        print(f"lightning-peft {__version__}")
        return 0
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        say_error(_unknown(words[0]))
        return 2
    if words[0] == "methods":
        from lightning_peft.cli.methods import show

        show()
        return 0
    if words[0] in ("inspect", "export", "merge"):
        return _files(words)
    return _train(words)


def _unknown(word: str) -> str:
    names = {**{command: command for command in COMMANDS}, **_OTHER_NAMES}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    hint = f" Did you mean {names[near[0]]}?" if near else ""
    return f"unknown command {word!r}.{hint} Commands: {', '.join(COMMANDS)}."


def _files(words: list[str]) -> int:
    """A command about saved adapters; none of them needs a Trainer."""
    try:
        import_module(f"lightning_peft.cli.{words[0]}").main(words[1:])
    except PEFTError as error:
        say_error(short(error, 1500))
        return 2
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _train(words: list[str]) -> int:
    from lightning_peft.cli import quiet

    quiet.environment()
    try:
        for package in ("jsonargparse", "docstring_parser", "rich"):
            require_package(package, f"lightning-peft {words[0]}")
        import_one_lightning()
        from lightning_peft.cli.compare import compare
        from lightning_peft.cli.run import run
    except PEFTError as error:
        say_error(str(error))
        return 2

    quiet.logs()
    try:
        if words[0] == "compare":
            return compare(words[1:])
        run(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        say_error(short(known, 1500))
        return 2
    return 0


def import_one_lightning() -> None:
    """Import the package that the commands train with: with none imported our classes would serve both."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
            return


def _known(error: BaseException | None) -> str | None:
    """The message of the first error in the chain that was meant for the user."""
    from lightning_peft.cli.messages import chain
    from lightning_peft.lightning_packages import every

    for e in chain(error):
        meant = isinstance(e, (RuntimeError, ValueError)) and any(part in str(e) for part in _MEANT)
        if meant or isinstance(e, (PEFTError, *every("utilities.exceptions.MisconfigurationException"))):
            return " ".join(str(e).split())
        if isinstance(e, OSError) and e.filename:  # a full disk, a file in the way, no permission
            return f"{e.filename}: {e.strerror}."
    return None
