"""A sequence classifier on PyTorch's own LSTM."""

import torch
from torch import nn


class LSTMClassifier(nn.Module):
    """The rows of an image as a sequence, an LSTM over them, a linear head on the last state."""

    def __init__(self, features: int = 8, hidden: int = 32, layers: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, 1, height, features)`` images to ``(batch, classes)`` logits."""
        states, _ = self.lstm(x.squeeze(1))
        return self.head(states[:, -1])


def build() -> LSTMClassifier:
    """One layer over the eight rows of a digit."""
    return LSTMClassifier()
