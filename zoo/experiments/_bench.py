"""One setting's networks, ready to be merged: the symmetry inferred once, matched once, repaired many ways, scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import automerge
from automerge import Matcher, Matching, Symmetry
from zoo.data import Dataset
from zoo.experiments._settings import Setting

State = dict[str, torch.Tensor]
Batches = list[tuple[torch.Tensor, torch.Tensor]]
CALIBRATION = 512
_BATCH = 512

NORMED = ("none", "reset", "repair", "gaussian", "row norms")
PLAIN = ("none", "repair", "gaussian", "row norms")


def fuse(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms are folded into the convolutions that they follow; it computes the same."""
    graph = fx.symbolic_trace(deepcopy(network).eval())
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        source = node.args[0] if node.args else None
        if not (isinstance(source, fx.Node) and source.op == node.op == "call_module" and len(source.users) == 1):
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            graph.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def batches(x: torch.Tensor, y: torch.Tensor) -> Batches:
    """Labelled batches."""
    return list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))


@dataclass(frozen=True)
class Aligned:
    """Some networks in one universe.

    Attributes:
        states: the moved networks.
        mean: their average.
        matching: the maps.
        seconds: what finding them took.
    """

    states: list[State]
    mean: State
    matching: Matching
    seconds: float


@dataclass
class Bench:
    """One setting on its data.

    Attributes:
        setting: which.
        runs: the cache directory of its networks.
        fused: fold every BatchNorm into the convolution before it (so that a group admits matrices).
        inputs: what is looked at in place of the first training inputs.
    """

    setting: Setting
    runs: Path
    fused: bool = False
    inputs: torch.Tensor | None = None
    _states: dict[int, State] = field(default_factory=dict)

    @cached_property
    def data(self) -> Dataset:
        """The setting's data."""
        return self.setting.dataset

    @cached_property
    def network(self) -> nn.Module:
        """The architecture, with the first network's weights, in eval mode."""
        network = self.setting.factory().eval()
        network.load_state_dict(self.setting.network(0, self.runs).state_dict)
        return fuse(network) if self.fused else network

    @cached_property
    def symmetry(self) -> Symmetry:
        """What may be permuted; tested numerically."""
        return automerge.infer(self.network, self.example)

    @property
    def positions(self) -> int:
        """How many positions of parameters' axes may move; at least one."""
        every = sum(n for shape in self.symmetry.shapes.values() for n in shape if n > 1)
        return max(1, round(self.symmetry.free_share * every))

    @property
    def example(self) -> torch.Tensor:
        """A few inputs."""
        return self.data.x_train[:4]

    @cached_property
    def calibration(self) -> list[torch.Tensor]:
        """Training inputs without labels, for everything that looks at activations."""
        count = CALIBRATION // 8 if self.data.is_text else CALIBRATION
        return list((self.data.x_train[:count] if self.inputs is None else self.inputs).split(_BATCH))

    @cached_property
    def test(self) -> Batches:
        """Labelled data that no network and no merge has seen."""
        return batches(self.data.x_test, self.data.y_test)

    @property
    def normed(self) -> bool:
        """Whether it has BatchNorm statistics."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.network.modules())

    @property
    def repairs(self) -> tuple[str, ...]:
        """The repairs that fit the architecture."""
        return NORMED if self.normed else PLAIN

    # ---------------------------------------------------------------- networks
    def state(self, seed: int) -> State:
        """One network's weights."""
        if seed not in self._states:
            state = self.setting.network(seed, self.runs).state_dict
            if self.fused:
                whole = self.setting.factory().eval()
                whole.load_state_dict(state)
                state = fuse(whole).state_dict()
            self._states[seed] = state
        return self._states[seed]

    def states(self, seeds: Sequence[int]) -> list[State]:
        """Several networks' weights."""
        return [self.state(seed) for seed in seeds]

    def score(self, source: Any, data: Batches | None = None) -> dict[str, float]:
        """Accuracy and loss on held-out data, of a state dict or of several as an ensemble."""
        parts: Any = [(self.network, s) for s in source] if isinstance(source, list) else (self.network, source)
        found = automerge.evaluate(parts, self.test if data is None else data)
        assert found.accuracy is not None
        assert found.loss is not None
        return {"accuracy": found.accuracy, "loss": found.loss}

    # ---------------------------------------------------------------- merging
    def align(self, matcher: Matcher, states: Sequence[Mapping[str, torch.Tensor]]) -> Aligned:
        """Match and average; repairs of the answer all aim at these aligned networks."""
        models: list[Any] = list(states)
        if matcher.needs_data:
            models[0] = self.loaded(states[0])
        begin = time.perf_counter()
        matching = automerge.match(models, self.symmetry, matcher, data=self.calibration)
        if matching.stats.get("interrupted"):
            raise KeyboardInterrupt
        return self.merged(matching, matching.apply(list(states)), time.perf_counter() - begin)

    def merged(self, matching: Matching, moved: list[State], seconds: float = 0.0) -> Aligned:
        """The average of networks that are aligned already."""
        share = [1 / len(moved)] * len(moved)
        mean = automerge.average(moved, share, aliases=dict(self.symmetry.aliases))
        return Aligned(moved, mean, matching, seconds)

    def loaded(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """A module of its own with some weights."""
        own = deepcopy(self.network)
        own.load_state_dict(dict(state))
        return own

    def repaired(self, repair: str, aligned: Aligned, towards: Sequence[State] | None = None) -> State:
        """The average, repaired.

        Args:
            repair: ``none``, ``reset`` (BatchNorm statistics), ``repair`` (REPAIR, and reset where there is BatchNorm),
                ``gaussian`` and ``row norms`` (no data), or ``least squares`` (a fit).
            aligned: what was merged.
            towards: the endpoints; the aligned networks. Others are wrong, and one experiment shows by how much.
        """
        if repair == "none":
            return aligned.mean
        if repair == "reset":
            own = self.loaded(aligned.mean)
            automerge.reset_batchnorm(own, self.calibration)
            return own.state_dict()
        kinds: dict[str, automerge.Renormaliser] = {
            "repair": automerge.Repair(reset=self.normed),
            "gaussian": automerge.GaussianRepair(),
            "row norms": automerge.RowNorms(),
            "least squares": automerge.LeastSquares(),
        }
        ends = aligned.states if towards is None else towards
        found, _ = kinds[repair](self.network, aligned.mean, ends, self.calibration, symmetry=self.symmetry)
        return found
