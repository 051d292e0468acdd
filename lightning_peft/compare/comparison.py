"""The whole comparison: every method measured and trained, rates chosen on validation, each seed tested once."""

from __future__ import annotations

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_peft.compare import training
from lightning_peft.compare.cost import Step, kept_bytes, peak_bytes, time_beside
from lightning_peft.compare.plan import MOST_FURTHER, Candidate, best, next_rate, quality, rate_grid
from lightning_peft.compare.progress import Progress
from lightning_peft.compare.results import Results
from lightning_peft.compare.task import ComparedTask
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.methods.full import FullFineTuning
from lightning_peft.model.injection import inject
from lightning_peft.model.summary import summarize
from lightning_peft.rates import short_rate, suggest_lr
from lightning_peft.saving.checkpoint import save_adapter


@dataclasses.dataclass
class Outcome:
    """What came out for one method: its costs, the runs of its rates, the tested runs, or what went wrong."""

    candidate: Candidate
    cost: dict[str, Any] = dataclasses.field(default_factory=dict)
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tested: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """The method's name in the comparison."""
        return self.candidate.label


class Comparison:
    """Compare methods on one task.

    Args:
        task: model, data and Trainer settings.
        candidates: the methods.
        seeds: the rates are tried with the first; the chosen one is trained and tested with all.
        steps: optimizer steps of every run.
        rates: how many learning rates to try a method, around `suggest_lr`, and further ones while the best is an
            edge; or the rates.
        validations: how often a run validates.
        metric: decides between rates, and goes into the table.
        results: where finished runs are kept.
        progress: told about everything.
    """

    def __init__(
        self,
        task: ComparedTask,
        candidates: list[Candidate],
        seeds: list[int],
        steps: int,
        rates: int | list[float],
        validations: int,
        metric: str,
        results: Results,
        progress: Progress,
    ) -> None:
        self.task, self.candidates, self.seeds, self.steps = task, candidates, seeds, steps
        self.rates, self.validations, self.metric = rates, validations, metric
        self.results, self.progress = results, progress
        self.left_out: dict[str, str] = {}
        self._task_key = task.key()
        self.outcomes: list[Outcome] = []
        self._centres: dict[str, float] = {}  # by label, where the search begins

    @property
    def tried(self) -> str:
        """How many rates, or which."""
        if isinstance(self.rates, list):
            return ", ".join(map(short_rate, self.rates))
        return f"{self.rates} around the default{', and of more where it was an edge,' if self.rates > 1 else ''}"

    def run(self) -> list[Outcome]:
        """Do what is not done yet. Outcomes are in ``outcomes`` as far as they got, should this be interrupted."""
        fitting = [c for c in self.candidates if self._fits(c)]
        if not fitting:
            raise ConfigError(f"No method is left to compare: {'; '.join(self.left_out.values())}.")
        plan = [(c, rate_grid(self._centres[c.label], self.rates)) for c in fitting]
        total = sum(1 + len(grid) + len(self.seeds) - 1 for _, grid in plan)
        with self.progress.over(total, self.steps):
            for candidate, grid in plan:
                self.outcomes.append(Outcome(candidate))
                self._compare(self.outcomes[-1], grid)
        return self.outcomes

    def _fits(self, candidate: Candidate) -> bool:
        """Whether the method can be put into the model; else the reason is noted."""
        try:
            module = self.task.module(candidate.method, None, self.seeds[0])
            inject(module, candidate.method)
        except PEFTError as error:
            self.left_out[candidate.label] = _one_line(error)
            self.progress.say(f"{candidate.label} is left out: {_one_line(error)}")
            return False
        self._centres[candidate.label] = suggest_lr(module, candidate.method, self.steps).lr
        return True

    def _compare(self, outcome: Outcome, grid: list[float]) -> None:
        candidate, first = outcome.candidate, self.seeds[0]
        outcome.cost = self._do(outcome, {"what": "cost"}, candidate.label, lambda: self._measure(candidate)) or {}
        alone = len(grid) == 1
        runs = [self._train(outcome, rate, first, test=alone) for rate in grid]
        outcome.trials = [r for r in runs if r is not None]
        if not isinstance(self.rates, list):
            self._widen(outcome)
        usable = self._usable(outcome)
        if outcome.trials and not usable:
            known = ", ".join(outcome.trials[0]["val"])
            outcome.errors.append(f"no finite validation {self.metric} (there is: {known})")
        if not usable:
            self.progress.skip(len(self.seeds) - 1)
            return
        rate = best(usable, self.metric)["rate"]
        chosen = [self._tested(outcome, rate, first)]
        chosen += [self._train(outcome, rate, seed, test=True) for seed in self.seeds[1:]]
        outcome.tested = [r for r in chosen if r is not None]
        for trial in outcome.trials:
            self.results.path(self._key(candidate, trial["rate"], first), ".safetensors").unlink(missing_ok=True)

    def _usable(self, outcome: Outcome) -> list[dict[str, Any]]:
        """The trials whose metric is a number."""
        return [r for r in outcome.trials if self.metric in r["val"] and math.isfinite(r["val"][self.metric])]

    def _widen(self, outcome: Outcome) -> None:
        """Try further rates while the best one is the lowest or the highest tried."""
        for _ in range(MOST_FURTHER):
            usable = self._usable(outcome)
            # a rate that diverged is as bad as can be, and no edge any more
            tried = {r["rate"]: (-math.inf, -math.inf) for r in outcome.trials}
            tried |= {r["rate"]: quality(r, self.metric) for r in usable}
            rate = next_rate(tried) if usable else None
            if rate is None:
                return
            self.progress.expect(1)
            record = self._train(outcome, rate, self.seeds[0], test=False)
            if record is None:
                return
            outcome.trials.append(record)

    def _key(self, candidate: Candidate, rate: float, seed: int) -> dict[str, Any]:
        method = {"name": type(candidate.method).__name__, **candidate.method.config()}
        run = {"label": candidate.label, "rate": rate, "seed": seed, "steps": self.steps, "points": self.validations}
        return {**self._task_key, "method": method, **run}

    def _train(self, outcome: Outcome, rate: float, seed: int, *, test: bool) -> dict[str, Any] | None:
        """The record of a run, from its file or by training."""
        key = self._key(outcome.candidate, rate, seed)
        keep = None if test else self.results.path(key, ".safetensors")

        def run() -> dict[str, Any]:
            tick = self.progress.tick
            options = {"test": test, "keep": keep, "tick": tick}
            record = training.train(self.task, outcome.candidate, rate, seed, self.steps, self.validations, **options)
            return {"rate": rate, "seed": seed, **record}

        title = f"{outcome.label} lr {short_rate(rate)} seed {seed}"
        return self._do(outcome, key, title, run, needed="test" if test else "val")

    def _tested(self, outcome: Outcome, rate: float, seed: int) -> dict[str, Any] | None:
        """The chosen run of the first seed with its test metrics: from its file, its kept adapter, or trained."""
        key = self._key(outcome.candidate, rate, seed)
        record, adapter = self.results.get(key), self.results.path(key, ".safetensors")
        if record is None or "test" in record or not adapter.exists():
            return self._train(outcome, rate, seed, test=True) if record is None or "test" not in record else record
        try:
            record["test"] = training.test(self.task, outcome.candidate, rate, seed, adapter)
        except Exception as error:
            outcome.errors.append(f"test: {_one_line(error)}")
            return None
        self.results.put(key, record)
        value = record["test"].get(self.metric, math.nan)
        self.progress.say(
            f"{outcome.label} lr {short_rate(rate)} is the best on validation: test {self.metric} {value:.4f}"
        )
        return record

    def _do(
        self, outcome: Outcome, key: dict[str, Any], title: str, run: Callable[[], Any], needed: str = ""
    ) -> dict[str, Any] | None:
        """Take a record from its file, or make it; an error is recorded, and the comparison goes on."""
        if "what" in key:
            key = {**self._task_key, "label": outcome.label, **key, "method": outcome.candidate.method.config()}
        record = self.results.get(key)
        if record is not None and "error" not in record and (not needed or needed in record):
            self.progress.done(title, record, self.metric, fresh=False)
            return record
        self.progress.start(title)
        try:
            record = run()
        except Exception as error:  # whatever one method does must not stop the others
            outcome.errors.append(f"{title.removeprefix(outcome.label).strip() or 'cost'}: {_one_line(error)}")
            record = {"error": _one_line(error)}
        gc.collect()  # module, Trainer and loops hold each other, and a large base should not wait for its turn
        self.results.put(key, record)
        self.progress.done(title, record, self.metric)
        return None if "error" in record else record

    def _measure(self, candidate: Candidate) -> dict[str, Any]:
        """Counts, file size, memory, and step time beside full fine-tuning."""
        step = self._step(candidate)
        network = step.module.model
        summary = summarize(step.module)
        cost = {name: summary[name] for name in ("trainable", "total", "percent")}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "adapter.safetensors")
            save_adapter(step.module, file)
            cost["file"] = file.stat().st_size
        cost["kept"] = kept_bytes(network, step.loss)
        step.optimizer.zero_grad()
        cost["peak"] = peak_bytes(step)
        if isinstance(candidate.method, FullFineTuning):
            return cost | {"step_seconds": time_beside(step, step)[0], "step_ratio": 1.0}
        seconds, ratio = time_beside(step, self._step(Candidate("reference", FullFineTuning())))
        return cost | {"step_seconds": seconds, "step_ratio": ratio}

    def _step(self, candidate: Candidate) -> Step:
        module = self.task.module(candidate.method, None, self.seeds[0])
        inject(module, candidate.method)
        module.to(self.task.device).train()
        return Step(module, self.task.batch())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PEFTError) else f"{type(error).__name__}: {text}"[:300]
