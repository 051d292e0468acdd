"""Patterns to modules: which parts of a network a method adapts.

A pattern without a wildcard is a full dotted name or its trailing dotted part (``q_proj``); with ``* ? [`` it is a
glob over the full name; ``re:`` starts a regular expression. The words ``all-linear``, ``attention``, ``mlp``,
``key-value`` and ``down-projection`` stand for roles and need no names. Where a model has no layers in the role of a
word, the word is a name like any other: ``mlp`` then means the modules that are called so.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from lightning_peft.adapted import Adapted, Delta
from lightning_peft.errors import NoMatchError

WORDS = ("all-linear", "attention", "mlp", "key-value", "down-projection")

#: role -> expression over the full dotted name; the names are those of transformers 5 and torch.
ROLES: dict[str, str] = {
    "q": r"(^|\.)(q_proj|query|q_lin|wq|to_q|(SelfAttention|EncDecAttention)\.q)$",
    "k": r"(^|\.)(k_proj|key|k_lin|wk|to_k|(SelfAttention|EncDecAttention)\.k)$",
    "v": r"(^|\.)(v_proj|value|v_lin|wv|to_v|(SelfAttention|EncDecAttention)\.v)$",
    "qkv": r"(^|\.)(c_attn|qkv|Wqkv|query_key_value|qkv_proj|in_proj)$",
    "o": r"(^|\.)(o_proj|out_proj|out_lin|wo|to_out\.0|(attn|attention)\.(c_proj|Wo|dense|proj)"
    r"|attention\.output\.dense|(SelfAttention|EncDecAttention)\.o)$",
    "up": r"(^|\.)(up_proj|gate_proj|gate_up_proj|fc1|lin1|linear1|wi|wi_0|wi_1|c_fc|Wi|intermediate\.dense"
    r"|dense_h_to_4h)$",
    "down": r"(^|\.)(down_proj|fc2|lin2|linear2|DenseReluDense\.wo|mlp\.(c_proj|Wo)|(?<!attention\.)output\.dense"
    r"|dense_4h_to_h)$",
}
_WORD_ROLES = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("up", "down"),
    "key-value": ("k", "v", "qkv"),
    "down-projection": ("down",),
}


def role(name: str) -> str | None:
    """The role of a module by its dotted name, or None.

    >>> role("encoder.layer.0.attention.self.query"), role("h.3.mlp.c_proj"), role("encoder.layer.0.output.dense")
    ('q', 'down', 'down')
    """
    found = [key for key, expression in ROLES.items() if re.search(expression, name)]
    # T5 calls its feed-forward output `wo`, Llama-style checkpoints call the attention output so: the longer wins
    return "down" if "down" in found else found[0] if found else None


def matcher(pattern: str) -> Callable[[str], bool]:
    """Turn one pattern (not a word) into a test on full dotted names.

    >>> matcher("q_proj")("layers.0.q_proj"), matcher("layers.*.q_proj")("layers.0.q_proj"), matcher("re:.*[qv]")("a.v")
    (True, True, True)
    """
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise NoMatchError(f"{pattern!r} is not a regular expression: {error}.") from None
        return lambda name: compiled.fullmatch(name) is not None
    if any(c in pattern for c in "*?["):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith("." + pattern)


def as_patterns(patterns: str | Sequence[str] | None) -> list[str]:
    """One pattern or several, as a list."""
    if patterns is None:
        return []
    return [patterns] if isinstance(patterns, str) else list(patterns)


def bias_names(model: nn.Module) -> list[str]:
    """Names of all bias parameters (``bias``, ``in_proj_bias``, …).

    >>> bias_names(nn.MultiheadAttention(4, 2))
    ['in_proj_bias', 'out_proj.bias']
    """
    leaves = ((n, n.rpartition(".")[2]) for n, _ in model.named_parameters())
    return [name for name, leaf in leaves if leaf == "bias" or leaf.endswith("_bias")]


def layer_index(name: str) -> int | None:
    """The number of the layer a module sits in: the first numeric part of its name behind another part, else the first.

    torchvision's ``encoder_layer_3`` is such a part as well.

    >>> layer_index("encoder.layer.11.attention.self.query"), layer_index("2.linear"), layer_index("pooler.dense")
    (11, 2, None)
    """
    numbers = [_layer_number(part) for part in name.split(".")]
    inner = [number for number in numbers[1:] if number is not None]
    return inner[0] if inner else numbers[0]


def _layer_number(part: str) -> int | None:
    digits = part.removeprefix("encoder_layer_")
    return int(digits) if digits.isdigit() else None


def is_metric(module: nn.Module) -> bool:
    """Whether a module belongs to torchmetrics (its networks are judges, not students)."""
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    return metric is not None and isinstance(module, metric)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module a pattern may name, once each, without torchmetrics and without parts that are adapted already."""
    found: dict[str, nn.Module] = {}
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(c) for c in closed):
            continue
        taken = isinstance(module, Adapted) and "delta" in module._modules
        if is_metric(module) or taken or isinstance(module, Delta):
            closed.append(name + ".")
        elif name:
            found[name] = module
    return found


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Further names of modules that stand in several places, by the first name."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            found.setdefault(first[id(module)], []).append(name)
        else:
            first[id(module)] = name
    return found


def select(
    modules: dict[str, nn.Module],
    patterns: str | Sequence[str],
    kinds: Callable[[nn.Module], bool],
    linear: Callable[[nn.Module], bool],
    *,
    exclude: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Iterable[str] = (),
    prefix: str = "",
    method: str = "the method",
    other_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, nn.Module]:
    """Choose modules by name.

    Args:
        modules: full name -> module, candidates of every type.
        patterns: patterns and words (see the module's docstring).
        kinds: whether the method can adapt a module.
        linear: whether ``all-linear`` means a module.
        exclude: patterns of modules to leave alone.
        layers: keep only modules whose layer number is listed.
        heads: names the words skip (the output head).
        prefix: path of the network in the module the user sees; patterns may be written with or without it.
        method: name used in messages.
        other_names: further names of modules (see `aliases`); patterns may mean these.

    Raises:
        NoMatchError: nothing is left; the message shows what could have been meant.
    """
    wanted, banned = as_patterns(patterns), [matcher(p) for p in as_patterns(exclude)]
    for pattern, ban in zip(as_patterns(exclude), banned, strict=True):
        if modules and not any(ban(prefix + name) or ban(name) for name in modules):
            raise NoMatchError(f"{method}: exclude_modules={pattern!r} matches no module, so it would do nothing.")
    tests = []
    for pattern in wanted:
        test = _named(matcher(pattern), prefix, other_names or {})
        if pattern in WORDS:
            # a word means modules of its role; where there are none, modules of that very name
            role_test = _word(pattern, linear, set(heads))
            if any(role_test(name, module) and kinds(module) for name, module in modules.items()):
                test = role_test
        tests.append(test)
    if len(wanted) > 1 and modules:
        # With several patterns each must find something to adapt: what one of them misses, no other may hide.
        for pattern, test in zip(wanted, tests, strict=True):
            if pattern in WORDS:
                continue
            named = {n: m for n, m in modules.items() if test(n, m)}
            left = {n: m for n, m in named.items() if not excluded(n, prefix, banned)}
            cannot_be_adapted = bool(left) and not any(kinds(m) for m in left.values())
            if not named or cannot_be_adapted:
                raise NoMatchError(_explain(method, [pattern], exclude, layers, modules, left, kinds))
    chosen: dict[str, nn.Module] = {}
    hit: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not any(test(name, module) for test in tests):
            continue
        hit[name] = module
        if excluded(name, prefix, banned) or not kinds(module):
            continue
        if layers is None or layer_index(name) in layers:
            chosen[name] = module
    if not chosen:
        raise NoMatchError(_explain(method, wanted, exclude, layers, modules, hit, kinds))
    return chosen


def excluded(name: str, prefix: str, banned: Sequence[Callable[[str], bool]]) -> bool:
    """Whether a module or one that contains it is banned."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))] if banned else []
    return any(ban(prefix + path) or ban(path) for path in paths for ban in banned)


def means(patterns: str | Sequence[str], name: str, module: nn.Module, linear: Callable[[nn.Module], bool]) -> bool:
    """Whether one of the patterns or words means this module; a pattern may be written with a path in front.

    >>> means("down-projection", "layers.0.mlp.down_proj", nn.Linear(1, 1), bool), means("net.0", "0", nn.Tanh(), bool)
    (True, True)
    """
    for pattern in as_patterns(patterns):
        if pattern in WORDS and _word(pattern, linear, set())(name, module):
            return True
        if matcher(pattern)(name) or pattern.endswith("." + name):
            return True
    return False


def _named(
    test: Callable[[str], bool], prefix: str, other_names: Mapping[str, Sequence[str]]
) -> Callable[[str, nn.Module], bool]:
    def means(name: str, module: nn.Module) -> bool:
        names = [name, *other_names.get(name, ())]
        return any(test(each) or (bool(prefix) and test(prefix + each)) for each in names)

    return means


def _word(word: str, linear: Callable[[nn.Module], bool], heads: set[str]) -> Callable[[str, nn.Module], bool]:
    if word == "all-linear":
        return lambda name, module: linear(module) and name not in heads
    roles = _WORD_ROLES[word]
    packed = "qkv" in roles  # torch's attention has its projections inside, under no name of theirs
    return lambda name, module: (
        name not in heads and (role(name) in roles or (packed and isinstance(module, nn.MultiheadAttention)))
    )


def _explain(method, wanted, exclude, layers, modules, hit, kinds) -> str:
    """The text of a failed match: the fact, the candidates by type, the nearest names, the way out."""
    asked = ", ".join(repr(p) for p in wanted)
    if not modules:
        return (
            f"{method}: target_modules={asked} matched nothing because the model has no modules yet. Build the network"
            " in `__init__` or `configure_model`, not in `setup` (callbacks are set up before the module)."
        )
    usable = {name: module for name, module in modules.items() if kinds(module)}
    lines = [f"{method}: target_modules={asked} matched no module it can adapt."]
    if hit and any(kinds(m) for m in hit.values()):
        why = [
            f"exclude_modules={exclude!r}" if exclude else "",
            f"layers={list(layers)}" if layers is not None else "",
        ]
        numbers = sorted({i for n in hit if (i := layer_index(n)) is not None})
        lines.append(
            f"All {len(hit)} hits were dropped by {' and '.join(w for w in why if w)}; layers here: {numbers}."
        )
    elif hit:
        name, module = next(iter(hit.items()))
        lines.append(f"The name matches, but {name!r} is a {type(module).__name__}.")
    counts = Counter(type(m).__name__ for m in usable.values())
    if usable:
        lines.append("It can adapt: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) + ".")
        lines.append("Names, for example: " + ", ".join(_near(wanted, list(usable))) + ".")
        lines.append("Write one of these, its last part, a glob ('*.q_proj'), 're:…', or 'all-linear'.")
    else:
        there = Counter(type(m).__name__ for m in modules.values() if not list(m.children()))
        lines.append(
            "The model has none of the types it can adapt; it has "
            + ", ".join(f"{n} {kind}" for kind, n in there.most_common(6))
            + "."
        )
    return " ".join(lines)


def _near(wanted: Sequence[str], names: list[str], count: int = 6) -> list[str]:
    """The names most like what was asked for, else the first ones."""
    last = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    close = [m for p in wanted for m in difflib.get_close_matches(p.rsplit(".", 1)[-1], last, n=2, cutoff=0.5)]
    near = [last[c] for c in dict.fromkeys(close)]
    return (near + [n for n in last.values() if n not in near][::-1])[:count]
