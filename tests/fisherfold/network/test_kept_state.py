"""Modules that keep what they have read."""

import torch
from torch import nn

from fisherfold.network.kept_state import keeps_state


class Model(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(9, 4), nn.BatchNorm1d(4)
        self.recurrent, self.state, self.scale = recurrent, None, torch.tensor(2.0)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        x = self.norm(self.embedding(input_ids).mT) * self.scale
        self.state = x.mean() if self.recurrent else None
        return x


def test_a_state_is_told_from_constants_parameters_and_buffers():
    ids = torch.arange(8).view(2, 4)
    recurrent, plain = Model(True), Model(False)
    assert keeps_state(recurrent, ids) and keeps_state(recurrent, ids)
    assert not keeps_state(plain, ids)
