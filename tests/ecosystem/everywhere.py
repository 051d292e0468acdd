"""A plugin of pytest: it puts `PEFT` into every Trainer that a test makes, and notes how each test ended.

`lightning_suite` runs Lightning's own tests with it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this plugin."""
    group = parser.getgroup("everywhere")
    group.addoption("--outcomes", type=Path, required=True, help="a file that gets a line for each test that ended")
    group.addoption("--with-peft", action="store_true", help="add PEFT(FullFineTuning()) to every Trainer")
    group.addoption("--package", default="lightning.pytorch", help="the package of Lightning that is tested")


def pytest_configure(config: pytest.Config) -> None:
    """Change the Trainer before any test imports it."""
    if config.getoption("--with-peft"):
        add_to_every_trainer(config.getoption("--package"))
    config.pluginmanager.register(Notes(config.getoption("--outcomes")))


def add_to_every_trainer(package: str) -> None:
    """Every Trainer of a package gets the callback before all others, as if the user had listed it."""
    from importlib import import_module

    trainer_class = import_module(package).Trainer
    from lightning_peft import PEFT, FullFineTuning

    original = trainer_class.__init__

    @functools.wraps(original)
    def with_callback(self: Any, *arguments: Any, callbacks: Any = None, **options: Any) -> None:
        if callbacks is None:
            others = []
        elif isinstance(callbacks, Sequence):
            others = [*callbacks]
        else:
            others = [callbacks]
        original(self, *arguments, callbacks=[PEFT(FullFineTuning()), *others], **options)

    trainer_class.__init__ = with_callback


class Notes:
    """Writes how each test ended, and runs only those of which that is not known yet.

    A test is noted as ``died`` when it starts: this stays if it takes the whole process down with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcome = "passed"
        self.reason = ""

    def write(self, test: str) -> None:
        note = {"test": test, "outcome": self.outcome, "reason": self.reason}
        with self.path.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = read_notes(self.path)
        old = [item for item in items if item.nodeid in known]
        items[:] = [item for item in items if item.nodeid not in known]
        config.hook.pytest_deselected(items=old)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome = "failed"
            self.reason = last_line(str(report.longrepr))
            self.write(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = "died"
        self.reason = ""
        self.write(nodeid)
        self.outcome = "passed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.outcome != "failed":
            self.outcome = "failed"
            self.reason = f"{report.when}: {last_line(str(report.longrepr))}"
        elif report.skipped and self.outcome == "passed":
            self.outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        ended = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if exitstatus in ended:
            complete_file(self.path).touch()


def last_line(text: str) -> str:
    """What pytest prints of an error: the last of the lines that it marks with an E."""
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.splitlines() or [""])[-1].removeprefix("E").strip()[:300]


def complete_file(path: Path) -> Path:
    """A file that says that notes are complete."""
    return path.with_suffix(".complete")


def read_notes(path: Path) -> dict[str, dict[str, str]]:
    """The last note on each test."""
    if not path.exists():
        return {}
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    return {note["test"]: note for note in notes}
