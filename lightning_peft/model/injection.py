"""Put a method into a model, and take it out again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.errors import ConfigError, NoMatchError
from lightning_peft.fields import settle
from lightning_peft.fingerprint import fingerprint
from lightning_peft.guards import undone_on_error
from lightning_peft.heads import new_modules, resolve_modules
from lightning_peft.match import as_patterns
from lightning_peft.method import Method, brief
from lightning_peft.model.adapters import (
    MARK,
    Adapters,
    Injection,
    copies,
    is_complete,
    network_of,
    persistent_buffers,
)
from lightning_peft.quantized import bits
from lightning_peft.readers import RootReader, open_to_readers
from lightning_peft.samples import Samples

Methods = Method | Sequence[Method]
#: where a LightningModule keeps what is patched on it for the Trainer; an object with a ``remove`` that undoes it
SESSION = "_peft_session"
#: parts of a method that act on every module of its kind
_DRIVEN = ("regularizer", "transform_grads", "after_step")


def inject(model: nn.Module, method: Methods) -> None:
    """Freeze the model, put the method's parameters in, and thaw what trains in full. In place.

    A second call with an equal method does nothing. Random numbers come from the method's own seed; the global
    generators are left alone.

    Args:
        model: a LightningModule or any network.
        method: one method or several; several must not adapt the same module.

    Raises:
        NoMatchError: a pattern matches nothing.
        ConfigError: the methods collide, or another method is in the model already.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, summarize
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> inject(net, LoRA(r=1))
    >>> summarize(net)["trainable"]
    16
    """
    methods = as_methods(method)
    adapters = Adapters.find(model)
    if adapters is not None:
        _check_same(adapters.methods, methods)
        return
    prefix, root = network_of(model)
    targets = [m.targets(root, prefix) for m in methods]
    inject_at(model, methods, targets, *_modules_to_save(root, methods, prefix))


def inject_at(
    model: nn.Module,
    methods: list[Method],
    targets: list[dict[str, nn.Module]],
    modules_to_save: list[str],
    new: list[str],
) -> Adapters:
    """Inject at modules that are already chosen (by patterns, or by the names in a file)."""
    prefix, root = network_of(model)
    _check_shapes(root)
    targets = [_outside(m, chosen, modules_to_save) for m, chosen in zip(methods, targets, strict=True)]
    _check_overlap(methods, targets)
    thawed = _thawed(root, methods, targets, modules_to_save)
    injection = Injection(
        methods=methods,
        targets=[list(chosen) for chosen in targets],
        modules_to_save=modules_to_save,
        new_modules=new,
        base=fingerprint(root, {id(p) for p in thawed}),
        required_grad={n: p.requires_grad for n, p in root.named_parameters()},
    )
    base = list(root.parameters())
    with undone_on_error(root):
        for m, chosen in zip(methods, targets, strict=True):
            m.attach(root, chosen)
        injection.root_reader = _open_to_readers(root)
    for parameter in base:
        parameter.requires_grad_(False)
    for parameter in thawed:
        parameter.requires_grad_(True)
    if not is_complete(methods):  # full fine-tuning keeps no copy of the base
        thawed_ids = {id(p) for p in thawed}
        values = {n: p for n, p in root.named_parameters() if id(p) in thawed_ids}
        injection.start_values = copies(values)
    injection.start_buffers = copies(persistent_buffers(root))
    root.__dict__[MARK] = injection
    adapters = Adapters.of(model)
    adapters.note_parameters()
    if not adapters.complete:
        injection.samples = Samples(adapters.base_weights())
    if not injection.trained:
        _raise_untrained(adapters)
    if prefix:
        _settle_outside(adapters)
    return adapters


def _settle_outside(adapters: Adapters) -> None:
    """Freeze what stands beside the network (networks inside metrics), and note the buffers there."""
    for name, parameter in adapters.model.named_parameters():
        if not name.startswith(adapters.path):
            parameter.requires_grad_(False)
    buffers = persistent_buffers(adapters.model)
    adapters.record.outside_buffers = copies({n: b for n, b in buffers.items() if not n.startswith(adapters.path)})


def unload(model: nn.Module) -> None:
    """Give back the untouched base: original modules, names, values and ``requires_grad`` flags.

    >>> from torch import nn
    >>> from lightning_peft import LoRA, inject, unload
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> inject(net, LoRA()); unload(net); list(net.state_dict())
    ['0.weight', '0.bias']
    """
    adapters = Adapters.of(model)
    adapters.refuse_complete("unload")
    adapters.refuse_flat("unload")
    adapters.refuse_disabled("unload")
    adapters.check_removable()
    adapters.reset()
    adapters.remove()
    end_session(model)


def end_session(model: nn.Module) -> None:
    """Undo what was patched on a LightningModule, once its adapters are gone."""
    session = model.__dict__.get(SESSION)
    if session is not None:
        session.remove()


def _open_to_readers(root: nn.Module) -> RootReader:
    root_reader, found = open_to_readers(root)
    for reader_name, layer in found:
        reader, dropout = root.get_submodule(reader_name), getattr(layer.delta, "dropout", 0)
        # torch's own encoder layer reads weights only in inference, where nothing is dropped
        if dropout and not isinstance(reader, nn.TransformerEncoderLayer):
            warnings.warn(
                f"{type(reader).__name__} reads the weights of its projections, where no input can be dropped:"
                f" dropout={dropout} does not act in {reader_name or 'it'}.",
                stacklevel=2,
            )
    return root_reader


def as_methods(method: Methods) -> list[Method]:
    """One method or several, as a list; anything else is an error."""
    methods = [method] if isinstance(method, Method) else list(method) if isinstance(method, (list, tuple)) else []
    if not methods or not all(isinstance(m, Method) for m in methods):
        raise ConfigError(
            f"Expected a method such as LoRA(r=8), or a list of methods; got {method!r}."
            " `lightning-peft methods` lists them."
        )
    for m in methods:
        settle(m)
    return methods


def _raise_untrained(adapters: Adapters) -> None:
    """Undo an injection that left nothing to train, and say so."""
    adapters.remove()
    names = " + ".join(type(m).__name__ for m in adapters.methods)
    network = type(adapters.network).__name__
    if not adapters.record.required_grad:
        raise ConfigError(
            f"{names}: {network} has no parameters yet. Build the network in `__init__` or"
            " `configure_model`, not in `setup` (callbacks are set up before the module)."
        )
    raise ConfigError(f"{names} leaves nothing to train in {network}: all its parameters were frozen before.")


def _modules_to_save(root: nn.Module, methods: list[Method], prefix: str) -> tuple[list[str], list[str]]:
    if is_complete(methods):
        return [], []
    patterns = [p for m in methods for p in as_patterns(getattr(m, "modules_to_save", None))]
    new = new_modules(root)
    return list(dict.fromkeys(resolve_modules(root, patterns, prefix) + new)), new


def _thawed(root, methods, targets, saved) -> list[nn.Parameter]:
    names = [n for m, chosen in zip(methods, targets, strict=True) for n in m.thaw(root, chosen)]
    parameters = [root.get_parameter(n) for n in names]
    for name in saved:
        own = dict(root.get_submodule(name).named_parameters())
        if stuck := [n for n, p in own.items() if bits(p) is not None]:
            raise ConfigError(
                f"{name}.{stuck[0]} is to train but is stored in few bits. Leave it out of the quantisation, with"
                f" BitsandbytesPrecision(ignore_modules=…) or BitsAndBytesConfig(llm_int8_skip_modules=[{name!r}])."
            )
        parameters += [p for p in own.values() if p.is_floating_point()]
    return list({id(p): p for p in parameters}.values())


def _outside(method: Method, chosen: dict[str, nn.Module], saved: list[str]) -> dict[str, nn.Module]:
    """Modules trained in full need no adapter."""
    left = {n: m for n, m in chosen.items() if not any(n == s or n.startswith(s + ".") for s in saved)}
    if chosen and not left:
        raise NoMatchError(
            f"{type(method).__name__}: everything it would adapt ({', '.join(chosen)}) trains in full already, as part"
            f" of {', '.join(saved)}. Name other target_modules, or use FullFineTuning."
        )
    return left


def _check_same(present: list[Method], methods: list[Method]) -> None:
    if present == methods:
        return
    ours, theirs = (" + ".join(map(brief, some)) for some in (present, methods))
    raise ConfigError(
        f"The model is adapted already, by {ours}; it cannot take {theirs} on top."
        " Call unload(model) or build the model again; give several methods at once as a list."
    )


def _check_shapes(root: nn.Module) -> None:
    for name, parameter in root.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConfigError(f"{name} is lazy and has no shape yet; run the model on a batch before injection.")


def _check_overlap(methods: list[Method], targets: list[dict[str, nn.Module]]) -> None:
    if is_complete(methods) and len(methods) > 1:
        raise ConfigError("Full fine-tuning trains everything already; give it alone.")
    kinds = [type(m) for m in methods]
    for kind in set(kinds):
        if kinds.count(kind) > 1 and any(getattr(kind, p) is not getattr(Method, p) for p in _DRIVEN):
            raise ConfigError(
                f"{kinds.count(kind)} {kind.__name__} in one list: what it does in each training step would reach the"
                " modules of the others, too. Give one, with all targets (and rank_pattern where it has one)."
            )
    owner: dict[int, str] = {}
    for m, chosen in zip(methods, targets, strict=True):
        for name, module in chosen.items():
            if id(module) in owner:
                raise ConfigError(
                    f"Both {owner[id(module)]} and {type(m).__name__} would adapt {name!r}; set target_modules or"
                    " exclude_modules of one of them so that they do not meet."
                )
            owner[id(module)] = type(m).__name__
