"""A language model with the awkward cases: a layer used twice, one that sees some tokens only, one never used."""

from types import SimpleNamespace

import torch
from torch import nn

VOCABULARY = 12
WIDTH = 6


class ToyModel(nn.Module):
    """h = e + W tanh(e) + W tanh(.), then an expert for even tokens; logits from an output embedding of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.expert = nn.Linear(WIDTH, 4, bias=False)
        self.back = nn.Linear(4, WIDTH)
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        h = self.embedding(input_ids)
        for _ in range(2):
            h = h + self.twice(h.tanh())
        even = input_ids % 2 == 0
        addition = torch.zeros_like(h)
        addition[even] = self.back(self.expert(h[even]))
        return SimpleNamespace(logits=self.head(h + addition))
