"""Plays commands as a user types them: each in a process of its own, at a terminal of a given width.

Run by the Python of the environment that is tried: ``python player.py WIDTH < commands.json``. The libraries
are imported once and each command is a fork, because their start takes longer than what most commands do.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import sys
import termios

#: the fifth step of the first epoch, in the progress bar
_FIFTH_STEP = re.compile(rb"Epoch 1/\d+[^\n]*?[^\d/](?:[5-9]|\d\d)/\d+")


def preload() -> None:
    """Import what the commands import, in the order in which they do."""
    from lightning_peft.cli import import_one_lightning, quiet

    quiet.environment()
    import_one_lightning()
    # what is loaded lazily otherwise
    import datasets  # noqa: F401
    import transformers  # noqa: F401

    import lightning_peft.cli.base
    import lightning_peft.cli.compare
    import lightning_peft.formats.peft  # noqa: F401


def typed(words: list[str], width: int, stdin: str | None, interrupted: bool) -> tuple[int, str]:
    """Run one command.

    Args:
        words: without the program's name.
        width: of the terminal, in letters.
        stdin: what is piped into it.
        interrupted: press Ctrl-C in the first epoch.

    Returns:
        Exit status, and all that was written to the terminal.
    """
    child, terminal = pty.fork()
    if child == 0:
        _run(words, width, stdin)
    written, pressed = b"", not interrupted
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        written += part
        if not pressed and _FIFTH_STEP.search(written):
            os.kill(child, signal.SIGINT)
            pressed = True
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written.decode()


def _run(words: list[str], width: int, stdin: str | None) -> None:
    """The command itself, in the child."""
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
    sys.stdin = io.StringIO(stdin) if stdin is not None else open(0, encoding="utf-8")  # noqa: SIM115
    status = 1
    try:
        from lightning_peft.cli import main

        status = main(words)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    preload()
    played = [typed(c["words"], int(sys.argv[1]), c["stdin"], c["interrupted"]) for c in json.load(sys.stdin)]
    json.dump(played, sys.stdout)
