"""Config files read once before the parser sees them: where a file is wrong is said with its name and line."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_peft.errors import ConfigError


def check_config(path: str) -> None:
    """Raise unless a file is YAML, a mapping of options, and names each key once (YAML itself takes the last).

    Raises:
        ConfigError: names file, line and fault. A file that does not exist is left to the parser.
    """
    file = Path(path)
    if not file.is_file():
        return
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: this is not YAML: {error.problem}. Check indentation and brackets.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{path}: this is not a text file in YAML: {what}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path}: a config is a mapping of options (peft:, model:, data:, trainer:), and this is none."
        )
    _check_once(root, path)


def _check_once(node: yaml.Node, path: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and isinstance(key.value, str):
                raise ConfigError(
                    f"{path}, line {line}: {key.value!r} stands a second time in one mapping (first in line"
                    f" {seen[key.value]}); only one would count. Keep one."
                )
            if isinstance(key.value, str):
                seen[key.value] = line
            _check_once(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_once(value, path)
