"""The command ``lightning-peft``: answers that need no Lightning come first, because they should come fast."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_peft.errors import PEFTError

USAGE = """usage: lightning-peft COMMAND [options]

  fit       train with a config: lightning-peft fit --config quickstart.yaml [--peft LoRA --peft.r 16]
  validate  measure a checkpoint on the validation data
  test      measure a checkpoint on the test data
  predict   write predictions
  methods   list the methods with their parameters, learning rates and papers

Options of a command: lightning-peft fit --help. A method's options: lightning-peft fit --peft.help LoRA.
Without --config, validate, test and predict read the config that fit saved beside --ckpt_path."""


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
    if words[0] == "methods":
        from lightning_peft.cli.methods import show

        show()
        return 0
    return _train(words)


def _train(words: list[str]) -> int:
    from lightning_peft.cli import quiet

    quiet.environment()
    from lightning_peft.cli.run import run

    quiet.logs()
    try:
        run(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        print(f"lightning-peft: error: {known}", file=sys.stderr)
        return 2
    return 0


def _known(error: BaseException | None) -> str | None:
    """The message of the first error in the chain that was meant for the user."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    while error is not None:
        if isinstance(error, (PEFTError, MisconfigurationException)):
            return str(error)
        if isinstance(error, OSError) and error.filename:  # a full disk, a file in the way, no permission
            return f"{error.filename}: {error.strerror}."
        error = error.__cause__ or error.__context__
    return None
