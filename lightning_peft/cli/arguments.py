"""Arguments of the commands about saved adapters; no torch, no Lightning."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_peft.errors import PEFTError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"lightning-peft {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """As the other commands: one line, status 2."""
        raise PEFTError(f"{self.prog.split()[-1]}: {message}. See lightning-peft {self.prog.split()[-1]} --help.")
