"""Losses. For language models the output head runs only where a label counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.errors import ConfigError

IGNORE = -100
_HALF = (torch.float16, torch.bfloat16)
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


class TokenLoss:
    """Cross entropy over the labelled positions only; the same value and gradients as transformers' own loss.

    The backbone's output is cut down to the positions whose label is not -100 before the model's own head sees it:
    whatever the head does to a position (scaling, soft caps, transforms, biases) still happens, but with most labels
    masked most of the logits are never made. On the first batch the value is compared with the model's own loss for one
    row; where they differ (a loss with further terms, a head that mixes positions) or the network is compiled, the
    model's own loss is used throughout. ``trusted`` says which. On the first packed batch it is tried out, too, that
    packed rows do not see each other.

    Args:
        task: ``causal-lm`` (labels are shifted), ``masked-lm`` or ``seq2seq-lm``.

    Raises:
        ConfigError: rows of a pack see each other.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self.trusted: bool | None = None
        self.place = 0  # of the backbone among the candidates
        self.apart = False

    def __call__(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, int]:
        """inputs: without labels; labels: (batch, length). Returns the mean loss and the number of labels."""
        inputs = self._complete(network, inputs, labels)
        targets = shifted(labels) if self.task == "causal-lm" else labels
        keep = targets != IGNORE
        count = int(keep.sum())
        self.apart = self.apart or rows_stay_apart(network, inputs)
        if self.trusted is None:  # also without labels: sharded processes must call the network equally often
            self.trusted = self._try(network, inputs, labels if count else labels.clamp(min=0))
        if count and not self.trusted:
            return network(**inputs, labels=labels).loss, count
        backbones = self._backbones(network)
        logits = picked_logits(network, backbones[self.place] if self.trusted and backbones else None, inputs, keep)
        if not count:
            return logits.sum() * 0, 0  # transformers' mean over nothing is NaN, which would end the training
        return F.cross_entropy(logits.float().flatten(0, -2), targets[keep]), count

    def _complete(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
        inputs = dict(inputs)
        if "use_cache" in inspect.signature(network.forward).parameters:
            inputs["use_cache"] = False
        if self.task == "seq2seq-lm" and "decoder_input_ids" not in inputs:
            make = getattr(network, "prepare_decoder_input_ids_from_labels", None)
            if make is not None:
                inputs["decoder_input_ids"] = make(labels=labels)
        return inputs

    def _backbones(self, network: nn.Module) -> list[nn.Module]:
        """Modules whose output may be one hidden state for each label; which one the head reads, a trial tells."""
        compiled = type(network).__name__ == "OptimizedModule" or getattr(network, "_compiled_call_impl", None)
        if compiled or getattr(getattr(network, "config", None), "output_router_logits", False):
            return []  # a compiled graph does not see hooks come and go; routers add a term to the loss
        base = getattr(network, getattr(network, "base_model_prefix", "") or "-", None)
        decoder = network.get_decoder() if hasattr(network, "get_decoder") else None
        wanted = [decoder] if self.task == "seq2seq-lm" else [base, decoder]
        return [m for m in wanted if isinstance(m, nn.Module) and m is not network]

    def _try(self, network: nn.Module, inputs: dict[str, Any], labels: Tensor) -> bool:
        """Whether one row gives the model's own logits and loss, without dropout; settles the backbone."""
        keep = (shifted(labels) if self.task == "causal-lm" else labels) != IGNORE
        i, rows = int(keep.sum(1).argmax()), len(labels)
        one = {k: v[i : i + 1] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v for k, v in inputs.items()}
        row, where = labels[i : i + 1], keep[i : i + 1]
        targets = shifted(row) if self.task == "causal-lm" else row
        for place, backbone in enumerate(self._backbones(network)):
            try:
                with torch.no_grad(), evaluating(network):
                    logits = picked_logits(network, backbone, one, where)[0]
                    theirs = network(**one, labels=row)
                    right = theirs.logits[where].float()
                loss = F.cross_entropy(right, targets[where]).to(theirs.loss.dtype)
                if same(logits, right, network) and torch.allclose(loss, theirs.loss, rtol=1e-4):
                    self.place = place
                    return True
            except _FAILURES:
                continue
        return False


def same(found: Tensor, right: Tensor, network: nn.Module) -> bool:
    """Whether two outputs of a network differ by no more than its rounding."""
    parameter = next(network.parameters())
    half = parameter.dtype in _HALF or torch.is_autocast_enabled(parameter.device.type)
    return bool((found.float() - right.float()).norm() <= (2e-2 if half else 1e-3) * right.float().norm())


def rows_stay_apart(network: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Try out whether other tokens in the first of two packed rows leave the second one's logits as they were.

    Returns:
        Whether there was a pack of two rows to try.

    Raises:
        ConfigError: they do not: the model takes ``position_ids`` and does not look for rows in them.
    """
    positions = inputs.get("position_ids")
    if positions is None or positions.ndim != 2 or "input_ids" not in inputs:
        return False
    starts = (positions == 0).nonzero().tolist()
    row, second = next(((i, at) for i, at in starts if at), (None, 0))
    if row is None:
        return False
    one = {k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim > 1 else v for k, v in inputs.items()}
    first = one["input_ids"][:, :second]
    other = torch.cat([torch.where(first > 0, first - 1, first + 1), one["input_ids"][:, second:]], dim=1)
    with torch.no_grad(), evaluating(network):
        right, found = (network(**one | {"input_ids": ids}).logits[:, second:] for ids in (one["input_ids"], other))
    if not same(found, right, network):
        raise ConfigError(
            f"packing=True: {type(network).__name__} takes no note of where packed rows begin, so they would see each"
            " other (other tokens in one changed the output for the next). Set packing=False."
        )
    return True


def picked_logits(network: nn.Module, backbone: nn.Module | None, inputs: Mapping[str, Any], keep: Tensor) -> Tensor:
    """Logits (1, number of True in keep, vocabulary) at the positions in ``keep`` (batch, length)."""
    if backbone is None:
        return network(**inputs).logits[keep].unsqueeze(0)

    def pick(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0]
        if hidden.shape[:2] != keep.shape:
            raise ConfigError(
                f"The backbone gives {tuple(hidden.shape[:2])} hidden states for {tuple(keep.shape)} labels. Labels"
                " must match the input tokens; a method that adds virtual tokens takes them out of the output again."
            )
        rows = hidden[keep].unsqueeze(0)
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output[next(iter(output))] = rows
        return output

    handle = backbone.register_forward_hook(pick)
    try:
        logits = network(**inputs).logits
    finally:
        handle.remove()
    if logits.shape[:-1] != (1, int(keep.sum())):
        raise ConfigError(f"{type(network).__name__} does not apply its head to the output of its backbone.")
    return logits


def shifted(labels: Tensor) -> Tensor:
    """The label of the next token at each position.

    >>> import torch
    >>> shifted(torch.tensor([[1, 2, 3]])).tolist()
    [[2, 3, -100]]
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy; labels of -100 do not count. logits: (…, classes), labels: (…)."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten().long(), ignore_index=IGNORE)


def number_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error. logits: (batch, 1), labels: (batch,)."""
    return F.mse_loss(logits.float().flatten(), labels.float().flatten())


def import_callable(path: str) -> Callable[..., Any]:
    """The function at ``package.module.name``.

    Raises:
        ConfigError: there is none.

    >>> import_callable("torch.nn.functional.mse_loss").__name__
    'mse_loss'
    """
    from importlib import import_module

    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"loss={path!r} cannot be imported: {error}. Write package.module.function.") from None
    if not callable(found):
        raise ConfigError(f"loss={path!r} is a {type(found).__name__}, not a function of (outputs, batch).")
    return found


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
