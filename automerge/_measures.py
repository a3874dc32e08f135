"""What `automerge.evaluate` returns: frozen measurements that turn into plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """How good a network is on labelled data.

    Attributes:
        accuracy: share of labels whose class has the largest score, 0 to 1; None if the labels are no classes.
        loss: mean cross-entropy per label in nats; None if the labels are no classes.
        samples: the number of labels.
        metrics: further metrics, means over the batches weighted by their sizes.
        average: for an ensemble, what was averaged: ``probabilities`` or ``logits``.
        members: the number of networks.
    """

    accuracy: float | None
    loss: float | None
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    average: str | None = None
    members: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [] if self.accuracy is None else [f"accuracy {self.accuracy:.2%}"]
        parts += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        who = f" (ensemble of {self.members}, mean of {self.average})" if self.average else ""
        return f"{', '.join(parts)} on {self.samples} samples{who}"


@dataclass(frozen=True)
class Agreement:
    """How often two sources choose the same class; needs no labels.

    Attributes:
        share: 0 to 1.
        samples: the number of predictions compared.
    """

    share: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Barrier:
    """Loss and accuracy along the straight line between two networks.

    The loss barrier is ``max over t of L((1-t) a + t b) - ((1-t) L(a) + t L(b))`` (Entezari et al., ICLR 2022,
    definition 1), never below zero because the end points are on the path; the accuracy barrier is the largest drop
    below the straight line between the end points' accuracies.

    Attributes:
        positions: t, from 0 (a) to 1 (b).
        losses: mean cross-entropy at each t.
        accuracies: accuracy at each t, 0 to 1.
        repaired: what was done at every inner point: None, ``reset`` or the description of the repair.
        samples: how many labels each point rests on.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    repaired: str | None = None
    samples: int = 0

    @property
    def loss_barrier(self) -> float:
        """The height of the loss above the straight line between the end points."""
        return max(v - line for v, line in zip(self.losses, self._line(self.losses), strict=True))

    @property
    def accuracy_barrier(self) -> float:
        """The depth of the accuracy below the straight line between the end points."""
        return max(line - v for v, line in zip(self.accuracies, self._line(self.accuracies), strict=True))

    def _line(self, values: Sequence[float]) -> list[float]:
        inner = [(1 - t) * values[0] + t * values[-1] for t in self.positions[1:-1]]
        return [values[0], *inner, values[-1]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the heights."""
        return {**asdict(self), "loss_barrier": self.loss_barrier, "accuracy_barrier": self.accuracy_barrier}

    def __str__(self) -> str:
        how = f", repaired ({self.repaired})" if self.repaired else ""
        return (
            f"loss barrier {self.loss_barrier:.4f}, accuracy barrier {self.accuracy_barrier:.2%} "
            f"over {len(self.positions)} points{how}"
        )


@dataclass(frozen=True)
class CycleError:
    """How far the pairwise maps of a matching are from composing to the identity around cycles; 0 is exact.

    Attributes:
        value: what `Matching.cycle_error` gives.
        models: the number of models.
    """

    value: float
    models: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity of two networks' weights.

    Attributes:
        cosine: over all float tensors as one vector, -1 to 1; 0 if one of them is zero.
        per_tensor: the same for each tensor.
    """

    cosine: float
    per_tensor: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
