"""The tensors behind virtual tokens: plain vectors, or a network that produces them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapted import Delta, factor_dtype
from lightning_peft.prompting.prefix import linear_, normal_


class Prompt(Delta):
    """The vectors themselves: ``prompt`` (n, dim).

    Args:
        like: a tensor of the base, for dtype and device.
        count: number n of vectors.
        dim: numbers in each.
    """

    def __init__(self, like: Tensor, count: int, dim: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(count, dim, dtype=factor_dtype(like), device=like.device))

    def vectors(self) -> Tensor:
        """(n, dim)."""
        return self.prompt

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"tokens={self.prompt.shape[0]}, dim={self.prompt.shape[1]}"


class PromptEncoder(Delta):
    """P-tuning's prompt encoder: ``MLP(BiLSTM(E))``, or ``MLP(E)`` without an LSTM.

    E (n, dim); the LSTM has two layers in both directions; the MLP is Linear - ReLU - Linear.

    Args:
        like: a tensor of the base, for dtype and device.
        count: number n of vectors.
        dim: numbers in each.
        hidden: numbers in each direction of the LSTM; None for no LSTM.
    """

    def __init__(self, like: Tensor, count: int, dim: int, hidden: int | None) -> None:
        super().__init__()
        dtype, device = factor_dtype(like), like.device
        self.embedding = nn.Parameter(torch.empty(count, dim, dtype=dtype, device=device))
        self.lstm: nn.LSTM | None = None
        width = dim
        if hidden is not None:
            # Made on the meta device, it draws no random numbers.
            lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True, dtype=dtype, device="meta")
            self.lstm = lstm.to_empty(device=device)
            width = 2 * hidden
        self.weight_0 = nn.Parameter(torch.empty(dim, width, dtype=dtype, device=device))
        self.bias_0 = nn.Parameter(torch.empty(dim, dtype=dtype, device=device))
        self.weight_1 = nn.Parameter(torch.empty(dim, dim, dtype=dtype, device=device))
        self.bias_1 = nn.Parameter(torch.empty(dim, dtype=dtype, device=device))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the start values: those of `nn.Embedding`, `nn.LSTM` and `nn.Linear`."""
        normal_(self.embedding, generator, 1.0)
        if self.lstm is not None:
            for name, weight in self.lstm.named_parameters():
                if name.startswith("weight"):
                    bias = getattr(self.lstm, name.replace("weight", "bias"))
                    linear_(weight, bias, generator, self.lstm.hidden_size)
        linear_(self.weight_0, self.bias_0, generator)
        linear_(self.weight_1, self.bias_1, generator)

    def vectors(self) -> Tensor:
        """(n, dim). The same for every input."""
        # The network is small, and autocast would compute it in a narrower dtype than its own.
        with torch.autocast(self.embedding.device.type, enabled=False):
            states = self.embedding
            if self.lstm is not None:
                states = self.lstm(states.unsqueeze(0))[0].squeeze(0)
            states = F.relu(F.linear(states, self.weight_0, self.bias_0))
            return F.linear(states, self.weight_1, self.bias_1)

    def folded(self) -> Prompt:
        """The same vectors without the network."""
        prompt = Prompt(self.embedding, *self.embedding.shape)
        with torch.no_grad():
            prompt.prompt.copy_(self.vectors())
        return prompt
