"""What is compared: methods by label, learning rates, and how long each run trains."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning_peft.methods  # noqa: F401  (defines the classes)
from lightning_peft.errors import ConfigError
from lightning_peft.method import Method, registry

#: metrics of which less is better; of any other, more
LOWER_IS_BETTER = ("loss", "mae", "perplexity", "error")

#: ratio of neighbouring rates
STEP = 3.0
#: most rates that are tried beyond the planned ones
MOST_FURTHER = 4


@dataclass(frozen=True)
class Candidate:
    """A method in the comparison, and how it is called there."""

    label: str
    method: Method

    def seeded(self, seed: int) -> Method:
        """The method with its start values drawn anew for a seed."""
        fields = {f.name for f in dataclasses.fields(self.method)}  # type: ignore[arg-type]
        return dataclasses.replace(self.method, init_seed=seed) if "init_seed" in fields else self.method  # type: ignore[type-var]


def choose(words: Sequence[str] | None, given: Sequence[Method] = ()) -> tuple[list[Candidate], dict[str, str]]:
    """The methods to compare, and which are left out for which reason.

    Args:
        words: ``NAME`` or ``NAME(field=value, …)`` each; None takes every method that needs no argument and no other
            base.
        given: methods with the settings of the user's config; they stand in for the defaults of their class.

    Raises:
        ConfigError: an unknown method or field, or one label twice.

    >>> [c.label for c in choose(["LoRA", "LoRA(r=2)"])[0]]
    ['LoRA', 'LoRA(r=2)']
    >>> choose(["Lora"])
    Traceback (most recent call last):
    lightning_peft.errors.ConfigError: --methods: unknown method 'Lora'. Did you mean LoRA? Known: AdaLoRA, ...
    """
    settings = {type(m).__name__: m for m in given}
    if words:
        found = [Candidate(word, settings.get(word) or _build(word)) for word in words]
        twice = next((c.label for i, c in enumerate(found) if c.label in [o.label for o in found[:i]]), None)
        if twice:
            raise ConfigError(f"--methods: {twice} is named twice.")
        return found, {}
    found, left_out = [], {}
    for name, kind in registry().items():
        needed = [f.name for f in dataclasses.fields(kind) if _required(f)]  # type: ignore[arg-type]
        if name not in settings and needed:
            left_out[name] = f"needs {', '.join(needed)}: name it as '{name}({needed[0]}=…)' to compare it"
            continue
        method = settings.get(name) or kind()
        if method.load_options():
            left_out[name] = "stands on another (quantised) base: name it with --methods to compare it"
        else:
            found.append(Candidate(name, method))
    return found, left_out


def _build(word: str) -> Method:
    """A method from ``NAME`` or ``NAME(field=value)``."""
    try:
        tree = ast.parse(word.strip(), mode="eval").body
        name = tree.func.id if isinstance(tree, ast.Call) else tree.id  # type: ignore[attr-defined]
        keywords = tree.keywords if isinstance(tree, ast.Call) else []
        fields = {str(k.arg): ast.literal_eval(k.value) for k in keywords}
        if isinstance(tree, ast.Call) and tree.args:
            raise ValueError
    except (SyntaxError, AttributeError, ValueError):
        raise ConfigError(f"--methods: {word!r} is no method; write LoRA, or 'LoRA(r=16, alpha=32)'.") from None
    kind = registry().get(name)
    if kind is None:
        raise ConfigError(f"--methods: unknown method {name!r}.{_near(name, list(registry()))}")
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    wrong = next((field for field in fields if field not in known), None)
    if wrong:
        raise ConfigError(f"--methods: {name} has no option {wrong!r}.{_near(wrong, known)}")
    needed = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in fields]  # type: ignore[arg-type]
    if needed:
        raise ConfigError(f"--methods: {name} needs {', '.join(needed)}: write '{name}({needed[0]}=…)'.")
    return kind(**fields)


def _near(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return (f" Did you mean {lower[near[0]]}?" if near else "") + f" Known: {', '.join(known)}."


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def rate_grid(centre: float, count: int | list[float]) -> list[float]:
    """Learning rates to try: those given, or as many around a centre.

    Of the latter: the centre, then three times it, a third of it, and so on outwards. So a larger grid holds the
    smaller ones, and more rates can be tried later without repeating any.

    >>> rate_grid(2e-3, 1), rate_grid(2e-3, 4)
    ([0.002], [0.00067, 0.002, 0.006, 0.018])
    """
    if isinstance(count, list):
        return count
    powers = [(-1) ** (i + 1) * ((i + 1) // 2) for i in range(count)]  # 0, 1, -1, 2, -2, …
    return sorted(_rounded(centre * STEP**power) for power in powers)


def next_rate(tried: Mapping[float, Any]) -> float | None:
    """The rate to try next while the best one is an edge: beyond it; None once it has a worse one on both sides.

    Args:
        tried: rate -> how good it is, the greatest value being the best.

    >>> next_rate({1e-3: 0.8, 3e-3: 0.9}), next_rate({1e-3: 0.8, 3e-3: 0.9, 9e-3: 0.7})
    (0.009, None)
    """
    rates = sorted(tried)
    chosen = max(rates, key=lambda rate: tried[rate])
    if len(rates) < 2 or rates[0] < chosen < rates[-1]:
        return None
    return _rounded(chosen * STEP if chosen == rates[-1] else chosen / STEP)


def _rounded(rate: float) -> float:
    """To two digits."""
    return float(f"{rate:.1e}")


def read_rates(words: Sequence[str]) -> int | list[float]:
    """How many learning rates, or which.

    >>> read_rates(["3"]), read_rates(["3e-3", "1e-3"])
    (3, [0.001, 0.003])
    """
    if len(words) == 1 and words[0].isdigit() and int(words[0]) > 0:
        return int(words[0])
    try:
        rates = sorted({float(word) for word in words})
    except ValueError:
        rates = []
    if not rates or not 0 < rates[0] <= rates[-1] < 1:
        text = " ".join(words)
        raise ConfigError(f"--rates {text}: give how many to try (3), or the rates, each below 1 (1e-3 3e-3).")
    return rates


def read_budget(text: str) -> tuple[int, str]:
    """A budget as a number and its unit, ``steps`` or ``epochs``.

    >>> read_budget("200"), read_budget("3epochs")
    ((200, 'steps'), (3, 'epochs'))
    """
    match = re.fullmatch(r"(\d+)\s*(steps?|epochs?|e)?", str(text).strip())
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"--budget {text}: give a number of optimizer steps (200) or of epochs (3epochs).")
    return int(match[1]), "epochs" if (match[2] or "").startswith("e") else "steps"


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is the better one.

    >>> lower_is_better("loss"), lower_is_better("accuracy")
    (True, False)
    """
    return any(word in metric.lower() for word in LOWER_IS_BETTER)


def quality(record: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """How good a run is on the validation data, greater being better: by a metric, then by the loss."""
    value = record["val"][metric]
    return (-value if lower_is_better(metric) else value, -record["val"].get("loss", 0.0))


def best(records: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any]:
    """The run with the best value of a metric on the validation data; the lower loss decides between equal ones."""
    return max(records, key=lambda record: quality(record, metric))
