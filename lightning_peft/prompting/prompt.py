"""The tensors behind virtual tokens: plain vectors, or a network that produces them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.prompting.prefix import linear_, normal_


class Prompt(Delta):
    """``prompt`` (n, dim): the vectors themselves."""

    def __init__(self, weight: Tensor, n: int, dim: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(n, dim, dtype=factor_dtype(weight), device=weight.device))

    def vectors(self) -> Tensor:
        """(n, dim)."""
        return self.prompt

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"tokens={self.prompt.shape[0]}, dim={self.prompt.shape[1]}"


class PromptEncoder(Delta):
    """P-tuning's prompt encoder: ``MLP(BiLSTM(E))``, or ``MLP(E)`` where ``hidden`` is None.

    E (n, dim); the LSTM has two layers, ``hidden`` numbers in each direction; the MLP is Linear - ReLU - Linear.
    """

    def __init__(self, weight: Tensor, n: int, dim: int, hidden: int | None) -> None:
        super().__init__()
        options = {"dtype": factor_dtype(weight), "device": weight.device}
        self.embedding = nn.Parameter(torch.empty(n, dim, **options))
        self.lstm: nn.LSTM | None = None
        if hidden is not None:
            sizes = {"num_layers": 2, "bidirectional": True, "batch_first": True}
            empty = nn.LSTM(dim, hidden, **sizes, dtype=options["dtype"], device="meta")  # draws no random numbers
            self.lstm = empty.to_empty(device=options["device"])
        width = dim if hidden is None else 2 * hidden
        self.weight_0, self.bias_0 = (nn.Parameter(torch.empty(*s, **options)) for s in ((dim, width), (dim,)))
        self.weight_1, self.bias_1 = (nn.Parameter(torch.empty(*s, **options)) for s in ((dim, dim), (dim,)))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the start values: those of `nn.Embedding`, `nn.LSTM` and `nn.Linear`."""
        normal_(self.embedding, generator, 1.0)
        for name, parameter in self.lstm.named_parameters() if self.lstm is not None else ():
            if name.startswith("weight"):
                bias = getattr(self.lstm, name.replace("weight", "bias"))
                linear_(parameter, bias, generator, self.lstm.hidden_size)
        linear_(self.weight_0, self.bias_0, generator)
        linear_(self.weight_1, self.bias_1, generator)

    def vectors(self) -> Tensor:
        """(n, dim). The same for every input."""
        with torch.autocast(self.embedding.device.type, enabled=False):  # small, and kept in its own precision
            states = self.embedding if self.lstm is None else self.lstm(self.embedding.unsqueeze(0))[0].squeeze(0)
            states = F.relu(F.linear(states, self.weight_0, self.bias_0))
            return F.linear(states, self.weight_1, self.bias_1)

    def folded(self) -> Prompt:
        """The same vectors without the network."""
        prompt = Prompt(self.embedding, *self.embedding.shape)
        with torch.no_grad():
            prompt.prompt.copy_(self.vectors())
        return prompt
