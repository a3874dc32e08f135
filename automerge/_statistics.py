"""Statistics of activations at the values of the traced graph that carry groups, for N models in one pass over data.

No hook and no name of a layer is needed: the graph knows where the units of every generator are seen (`_places.survey`).
Each model runs as that graph, so only what a later operator still needs stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from automerge._copies import copied
from automerge._data import Batch
from automerge._errors import CheckpointError, MatchingError, TraceError
from automerge._extra_state import load_weights, weights_of
from automerge._forward import device_of, few_inputs
from automerge._moments import CrossMoments
from automerge._places import Place, Survey, survey
from automerge._random import drawing, gpus
from automerge._tree_io import map_tensors
from automerge.io import tied_names
from automerge.symmetry import Symmetry
from automerge.trace import TraceInfo, trace

Mask = Callable[[Batch], torch.Tensor | None]
State = Mapping[str, torch.Tensor]
_COVARIED = 8192


class Accumulator(Protocol):
    """Streaming statistics of N models' activations at one place: `CrossMoments`, or `CountSketch`."""

    count: int

    @property
    def means(self) -> torch.Tensor:
        """``(N, n)``."""
        ...

    def update(self, rows: Sequence[torch.Tensor]) -> None:
        """Add ``(samples, n)`` activations of every model."""
        ...

    def variances(self) -> torch.Tensor:
        """``(N, n)``."""
        ...

    def covariance(self, a: int, b: int) -> torch.Tensor:
        """Of two models, ``(n, n)``."""
        ...


@dataclass(frozen=True, eq=False)
class Observed:
    """What was measured at one place.

    Attributes:
        place: where.
        moments: of the activations of all models there.
    """

    place: Place
    moments: Accumulator

    def check(self) -> None:
        """Refuse what no statistic can be made of.

        Raises:
            MatchingError: if some activations are NaN or infinite.
        """
        for m, (mean, spread) in enumerate(zip(self.moments.means, self.moments.variances(), strict=True)):
            if not (torch.isfinite(mean).all() and torch.isfinite(spread).all()):
                raise MatchingError(
                    f"model {m}: activations at {self.place.where} are NaN or infinite, or too large to square; "
                    "check the data and the model"
                )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of all models at all places; what `collect` returns.

    Attributes:
        observed: in order of execution.
        unseen: generator numbers that no place shows.
        survey: the graph of the first batch with its places.
    """

    observed: tuple[Observed, ...]
    unseen: tuple[int, ...]
    survey: Survey

    @property
    def samples(self) -> int:
        """The largest number of samples at a place."""
        return max((o.moments.count for o in self.observed), default=0)

    def of(self, generator: int) -> list[Observed]:
        """The places that show a generator."""
        return [o for o in self.observed if generator in o.place.slots]

    def covariance(self, generator: int, a: int, b: int) -> torch.Tensor:
        """The (cross-)covariance of a generator's units in models a and b, ``(units, units)``, float64.

        The mean over all places that show it, and over the positions that a unit owns there.

        Raises:
            KeyError: if no place shows the generator, or the pair is not kept.
        """
        parts = []
        for o in self.of(generator):
            table = torch.from_numpy(o.place.slots[generator]).to(o.moments.means.device)
            whole = o.moments.covariance(a, b)
            parts.append(torch.stack([whole[column][:, column] for column in table.T]).mean(0))
        if not parts:
            raise KeyError(f"no activation shows generator {generator}")
        return torch.stack(parts).mean(0)

    def report(self, symmetry: Symmetry) -> dict[str, Any]:
        """Plain data: the places, the number of samples, and the generators that were not observed."""
        return {
            "sites": [o.place.where for o in self.observed],
            "samples": self.samples,
            "not_observed": [symmetry.sets[g].name or str(g) for g in self.unseen],
        }


# -------------------------------------------------------------------- collecting
def attention_mask(batch: Batch) -> torch.Tensor | None:
    """The keyword input ``attention_mask`` of shape ``(batch, tokens)``, if there is one: what is zero is padding."""
    mask = batch.kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def covariances(place: Place, reference: int | None = None) -> CrossMoments | None:
    """What gathers all covariances at a place; None if there are too many positions for that."""
    return CrossMoments(reference) if place.size <= _COVARIED else None


def collect(
    network: nn.Module,
    states: Sequence[State],
    symmetry: Symmetry,
    batches: Iterable[Batch],
    *,
    moments: Callable[[Place], Accumulator | None] = covariances,
    mask: Mask | None = attention_mask,
) -> Statistics:
    """Run N models over the data once, and gather the statistics of every generator's activations.

    Every sample, pixel and token counts as one sample. A generator is observed at the inputs of linear maps,
    convolutions and attention products (after the nonlinearity; at a residual stream's consumers), else at the last value
    that carries it. Values are float64, exact for unequal batches; memory does not depend on the number of samples.

    Args:
        network: the architecture; a copy of it is traced, once for every shape of the inputs. Its own weights do not
            matter.
        states: the weights of each model.
        symmetry: of the architecture.
        batches: the inputs, as from `automerge._data.Batches`.
        moments: what gathers the activations at a place, or None to leave it out; covariances of all pairs by default,
            ``(N n)^2`` numbers.
        mask: gives for a batch a bool tensor such as ``(batch, tokens)``, True for what counts; None: everything counts.

    Returns:
        The statistics; where a model lacks a value (control flow that depends on data), its place is left out.

    Raises:
        CheckpointError: if a state dict lacks a tensor of the network.
        TraceError: if the network does not run on a batch.
        MatchingError: if activations are NaN or infinite, or too large to square.

    Examples:
        >>> from automerge import infer
        >>> from automerge._data import Batches
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> s = infer(net, torch.ones(1, 3))
        >>> other = s.apply(net.state_dict(), s.element([list(range(1, 8)) + [0]]))
        >>> found = collect(net, [net.state_dict(), other], s, Batches([torch.randn(20, 3), torch.randn(5, 3)]))
        >>> found.samples, tuple(found.covariance(0, 0, 1).shape)
        (25, (8, 8))
        >>> torch.allclose(found.covariance(0, 0, 1), found.covariance(0, 0, 0).roll(-1, 1))
        True
    """
    run = _Run(network, states, symmetry)
    gathered: dict[str, Accumulator | None] = {}
    lost: set[str] = set()
    for batch, counted in _parts(batches, mask):
        values = run.observe(batch, counted)
        for name in {n for v in values for n in v} | set(gathered):
            rows = [v.get(name) for v in values]
            kept = [r for r in rows if r is not None]
            if len(kept) < len(rows) or any(r.shape != kept[0].shape for r in kept):
                lost.add(name)
            else:
                if name not in gathered:
                    gathered[name] = moments(run.places[name])
                if (held := gathered[name]) is not None:
                    held.update(kept)
    first = run.first
    assert first is not None
    measured = [(p, gathered.get(p.node)) for p in first.places if p.node not in lost]
    observed = tuple(Observed(p, held) for p, held in measured if held is not None and held.count)
    for one in observed:
        one.check()
    seen = {g for o in observed for g in o.place.slots}
    return Statistics(observed, tuple(g for g in range(len(symmetry.sets)) if g not in seen), first)


def _parts(batches: Iterable[Batch], mask: Mask | None) -> Iterator[tuple[Batch, torch.Tensor | None]]:
    """Every batch with its mask; a batch of as many sequences as tokens in two, so that its axes differ in length."""
    for batch in batches:
        counted = None if mask is None else mask(batch)
        if counted is None or counted.ndim < 2 or counted.shape[0] not in counted.shape[1:]:
            yield batch, counted
            continue
        n = counted.shape[0]
        for part in (slice(0, n - 1), slice(n - 1, n)) if n > 1 else (slice(0, n),):

            def cut(_: str, tensor: torch.Tensor, part: slice = part, n: int = n) -> torch.Tensor:
                return tensor[part] if tensor.ndim and tensor.shape[0] == n else tensor

            args, kwargs = map_tensors(cut, tuple(batch.args)), map_tensors(cut, dict(batch.kwargs))
            yield Batch(args, kwargs, None, batch.number), counted[part]


class _Reached(Exception):
    """Ends a replay after the last value that is wanted."""


class _Replay(fx.Interpreter):
    """Runs a graph, hands over some of its values, and keeps none for longer than needed."""

    def __init__(self, graph: fx.GraphModule, listen: Callable[[str, Any], bool]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._listen = listen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self._listen(n.name, value):
            raise _Reached
        return value


class _Run:
    """All models on one batch after the other."""

    def __init__(self, network: nn.Module, states: Sequence[State], symmetry: Symmetry) -> None:
        self.network = copied(network)
        self.symmetry = symmetry
        self.states = [_fitted(self.network, s, k) for k, s in enumerate(states)]
        self.graphs: dict[str, fx.GraphModule] = {}
        self.first: Survey | None = None
        self.places: dict[str, Place] = {}

    def observe(self, batch: Batch, mask: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
        """For each model the activations ``(samples, positions)`` at every place; all draw the same random numbers."""
        graph = self._graph(batch)
        fed = [] if graph is None else _inputs(batch)
        out = []
        for state in self.states:
            with drawing(batch.number, gpus(state.values())):
                if graph is None:
                    out.append(self._traced(state, batch, mask))
                else:
                    info: TraceInfo = graph.meta["trace"]
                    out.append(self._replayed(graph, [state[n] for n in info.names.values()] + fed, mask))
        return out

    def _graph(self, batch: Batch) -> fx.GraphModule | None:
        """The graph for a batch's shapes and layouts; None if the path depends on values, so that each run must be recorded."""
        key = repr(map_tensors(lambda _, t: _form(t), (batch.args, dict(batch.kwargs))))
        if key not in self.graphs:
            load_weights(self.network, self.states[0])
            graph = self._recorded(batch, values=False)
            self._survey(graph)
            self.graphs[key] = graph
        graph = self.graphs[key]
        info: TraceInfo = graph.meta["trace"]
        return None if info.data_dependent or info.rewritten else graph

    def _recorded(self, batch: Batch, *, values: bool) -> fx.GraphModule:
        try:
            return trace(self.network, batch.args, batch.kwargs, values=values)
        except TraceError as error:
            hint = few_inputs(batch, error.__cause__)
            raise TraceError(f"batch {batch.number} of the data: {error}{hint}") from error

    def _survey(self, graph: fx.GraphModule) -> None:
        if self.first is None:
            self.first = survey(graph, self.symmetry)
            self.places = {p.node: p for p in self.first.places}

    def _same(self, graph: fx.GraphModule) -> dict[str, str]:
        """Node -> place, for the nodes of another graph that are a place's operator: on its line and at its turn there.

        Where a line calls an operator more or less often than in the first graph, it is not known which call is which.
        """
        assert self.first is not None
        if graph is self.first.graph:
            return {name: name for name in self.places}
        own, other = _calls(self.first.graph), _calls(graph)
        return {
            there: here
            for origin, names in own.items()
            if len(names) == len(other.get(origin, ()))
            for here, there in zip(names, other[origin], strict=True)
            if here in self.places
        }

    def _replayed(
        self, graph: fx.GraphModule, fed: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        left = self._same(graph)

        def listen(name: str, value: Any) -> bool:
            if name not in left:
                return False
            self._take(out, left.pop(name), value, mask)
            return not left

        if left:
            try:
                with torch.no_grad():
                    _Replay(graph, listen).run(*fed, enable_io_processing=False)
            except _Reached:
                pass
        return out

    def _traced(self, state: State, batch: Batch, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        load_weights(self.network, state)
        graph = self._recorded(batch, values=True)
        out: dict[str, torch.Tensor] = {}
        wanted = self._same(graph)
        for node in graph.graph.nodes:
            if node.name in wanted:
                self._take(out, wanted[node.name], node.meta["val"], mask)
        return out

    def _take(self, out: dict[str, torch.Tensor], name: str, value: Any, mask: torch.Tensor | None) -> None:
        rows = self.places[name].read(value, mask) if isinstance(value, torch.Tensor) else None
        if rows is not None:
            out[name] = rows


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    layout = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tuple(tensor.shape), layout, tensor.dtype


def _inputs(batch: Batch) -> list[torch.Tensor]:
    """The tensors of a batch, in the order and the layouts in which `trace` records them."""
    found: list[torch.Tensor] = []

    def keep(_: str, tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.clone())  # what is cut out of a larger tensor becomes dense, as when it is recorded
        return tensor

    map_tensors(keep, tuple(batch.args))
    map_tensors(keep, dict(batch.kwargs))
    return found


def _calls(graph: fx.GraphModule) -> dict[tuple[str, str, str], list[str]]:
    """(operator, module, source line) -> its nodes in order."""
    out: dict[tuple[str, str, str], list[str]] = {}
    for n in graph.graph.nodes:
        out.setdefault((str(n.target), n.meta.get("module", ""), n.meta.get("source", "")), []).append(n.name)
    return out


def _fitted(network: nn.Module, state: State, number: int) -> dict[str, torch.Tensor]:
    """A state dict on the device and in the dtypes of the network, tied names as one tensor."""
    own = weights_of(network)
    missing = [n for n in own if n not in state]
    if missing:
        raise CheckpointError(f"model {number} has no {missing[0]!r}, which the network needs")
    device = device_of(network)
    out = {n: state[n].detach().to(device=device, dtype=own[n].dtype) for n in own}
    for alias, name in tied_names(own).items():
        out[alias] = out[name]
    return out
