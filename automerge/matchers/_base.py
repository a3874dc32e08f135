"""What every matcher shares: the abstract class, its answer, and the checks of its input."""

from __future__ import annotations

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.parameter import is_lazy

from automerge._errors import CheckpointError, MatchingError, SymmetryError
from automerge._extra_state import weights_of, without_extras
from automerge._linear_maps import LinearElement, Matrix, linear_element
from automerge._loading import check_tied
from automerge._numbers import is_number, is_whole
from automerge.groups import Element
from automerge.io import check_state_dict, save_state_dict
from automerge.symmetry import Symmetry

Model = Mapping[str, torch.Tensor] | nn.Module
Progress = Callable[[dict[str, Any]], None]

_FORMAT = "automerge.matching/1"


class Matcher(ABC):
    """Finds one map per model to a common universe. Implementations are frozen dataclasses of their options.

    Attributes:
        needs_data: whether it looks at activations: then ``data`` is needed, and at least one model as a module.
        exact: whether its maps leave every model's function as it is. Linear maps do so up to what is nonlinear.
        separable: whether each moved model is a network of its own; else only their uniform average is one.
    """

    needs_data: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that options are of their kinds; implementations with checks of their own call it first."""
        check_kinds(self)

    @abstractmethod
    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """Match N models.

        Args:
            models: state dicts or modules of one architecture, at least two.
            symmetry: of that architecture.
            progress: called with a dict of numbers (``iteration``, ``objective``, ...) as the work goes on.
            data: batches, for matchers that look at activations.

        Raises:
            MatchingError: for fewer than two models, or missing data.
            CheckpointError: if a model does not fit the others, or holds NaN or infinite values.
            SymmetryError: if the symmetry is of another architecture.
        """


@dataclass(frozen=True, eq=False)
class Matching:
    """One map per model to a common universe.

    Attributes:
        to_universe: the map of each model: an exact group `Element`, for matchers by linear maps one with matrices.
        symmetry: the group they come from.
        matcher: which matcher, with its options.
        stats: what it measured (objective per iteration, seconds, ...).

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> import numpy as np
        >>> unit = np.arange(3)[:, None]
        >>> s = Symmetry({"a": (3,), "b": (3,)}, (Generator(3, (Slot("a", 0, unit), Slot("b", 0, unit))),))
        >>> m = Matching((s.element([[1, 2, 0]]), s.identity()), s)
        >>> s.apply({"a": torch.arange(3.0), "b": torch.zeros(3)}, m.between(0, 1))["a"]
        tensor([1., 2., 0.])
        >>> m.cycle_error()
        0.0
    """

    to_universe: tuple[Element, ...]
    symmetry: Symmetry
    matcher: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.to_universe)

    @property
    def separable(self) -> bool:
        """Whether each moved model is a network of its own; units of one model that were merged leave only an average."""
        linear = [e for e in self.to_universe if isinstance(e, LinearElement)]
        return all(matrix.invertible for element in linear for matrix in element.matrices.values())

    def between(self, a: int, b: int) -> Element:
        """The map from model a's coordinates to model b's, through the universe.

        Raises:
            MatchingError: for an index that is no model's.
        """
        for i in (a, b):
            if not isinstance(i, Integral) or not 0 <= i < len(self):
                raise MatchingError(f"there is no model {i!r}; this matching has the models 0 to {len(self) - 1}")
        return self.to_universe[a].then(self.to_universe[b].inverse())

    def cycle_error(self) -> float:
        """The largest share of positions that a composition around a pair or a triangle of models displaces.

        Exactly 0 for maps through a universe; measured, not assumed. Matrices count where they are off by more than 1e-8.
        """
        total = max(1, sum(sum(self.symmetry.shapes[n]) for e in self.to_universe for n in e.touched))
        maps = {(a, b): self.between(a, b) for a, b in itertools.permutations(range(len(self)), 2)}
        worst = 0
        for a, b in itertools.combinations(range(len(self)), 2):
            worst = max(worst, maps[a, b].then(maps[b, a]).moved())
        for a, b, c in itertools.combinations(range(len(self)), 3):
            worst = max(worst, maps[a, b].then(maps[b, c]).then(maps[c, a]).moved())
        return worst / total

    def apply(self, models: Sequence[Model]) -> list[dict[str, torch.Tensor]]:
        """The models in the universe's coordinates.

        Raises:
            MatchingError: if their number is another one.
        """
        if len(models) != len(self):
            raise MatchingError(f"this matching is of {len(self)} models, got {len(models)}")
        return [self.symmetry.apply(state_dict(m), e) for m, e in zip(models, self.to_universe, strict=True)]

    def __str__(self) -> str:
        lines = [f"Matching of {len(self)} models by {self.matcher or 'hand'}"]
        for key, label in (
            ("objective", "objective"),
            ("start_objective", "  before matching"),
            ("bound", "  at most"),
        ):
            if key in self.stats:
                lines.append(f"  {label:<22} {self.stats[key]:.6g}")
        for key, label in (("iterations", "iterations"), ("converged", "converged"), ("interrupted", "interrupted")):
            if key in self.stats:
                lines.append(f"  {label:<22} {self.stats[key]}")
        if isinstance(seconds := self.stats.get("seconds"), Mapping):
            lines.append(f"  {'seconds':<22} " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items()))
        lines += [f"  model {i:<16} {e.moved()} positions moved" for i, e in enumerate(self.to_universe)]
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks())])

    __repr__ = __str__

    def remarks(self) -> list[str]:
        """What a reader of the result must know: how far models drift, and which groups got something else than the rest."""
        out = []
        kept, back = self.stats.get("kept_predictions", ()), self.stats.get("fell_back", ())
        for m, drift in enumerate(self.stats.get("drift", ())):
            share = f"{kept[m]:.1%} of its predictions stay" if m < len(kept) else ""
            if m in back:
                out.append(f"model {m} would drift by {drift:.3f}: permutations instead")
            elif drift > 0:
                out.append(f"model {m} drifts by {drift:.3f} (change of its own output by its map); {share}")
        for group, count in self.stats.get("within", {}).items():
            if count:
                out.append(f"group {group}: {count} units are merged with others of their own model")
        reasons: dict[str, list[str]] = {}
        for group, reason in self.stats.get("permuted_groups", {}).items():
            reasons.setdefault(reason, []).append(group)
        out += [f"by permutations only: {_some(groups)} ({reason})" for reason, groups in reasons.items()]
        if unseen := self.stats.get("not_observed", ()):
            out.append(f"shown by no activation: {_some(unseen)}")
        generators = self.symmetry.stacked.generators()
        left = [g for g in self.stats.get("left_out_generators", ()) if generators[g].size > 1]
        if left:
            slots = [generators[g].slots[0] for g in left]
            where = _some(list(dict.fromkeys(f"{s.param}[{s.axis}]" for s in slots)))
            out.append(
                f"{len(left)} of {len(generators)} groups were not searched, since their units overlap without being nested; "
                f"the models keep their own order there: {where}"
            )
        return [*out, *self.stats.get("notes", ())]

    # ---------------------------------------------------------------- files
    def save(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write to a safetensors file (integer maps, matrices; the rest as JSON in the header), all at once or not at all.

        Raises:
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        tensors = {
            f"{m}/{axis}/{name}": torch.from_numpy(index.copy())
            for m, element in enumerate(self.to_universe)
            for name, maps in element.maps.items()
            for axis, index in enumerate(maps)
        }
        header = {"automerge.matching": _FORMAT, "models": str(len(self)), "matcher": self.matcher}
        header["sources"] = json.dumps([dict(e.sources) for e in self.to_universe])
        for m, element in enumerate(self.to_universe):
            if isinstance(element, LinearElement):
                header["roles"] = json.dumps({str(g): roles for g, roles in element.roles.items()})
                header["invertible"] = json.dumps(all(matrix.invertible for matrix in element.matrices.values()))
                for g, matrix in element.matrices.items():
                    tensors[f"{m}/forward/{g}"] = matrix.forward
                    tensors[f"{m}/inverse/{g}"] = matrix.inverse
        header |= {"symmetry": self.symmetry.to_json(), "stats": json.dumps(dict(self.stats))}
        save_state_dict(path, tensors or {"empty": torch.zeros(0)}, header, force)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Matching:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is missing, damaged or something else.
        """
        if not isinstance(path, str | os.PathLike):
            raise CheckpointError(f"Matching.load takes the path of a file, got a {type(path).__name__}")
        if not Path(path).is_file():
            problem = "is a directory; give the file" if Path(path).is_dir() else "does not exist; check the path"
            raise CheckpointError(f"{path} {problem}")
        try:
            Path(path).open("rb").close()  # safetensors calls a file without permission missing
            with safe_open(str(Path(path)), framework="pt") as handle:
                header = handle.metadata() or {}
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            if header.get("automerge.matching") != _FORMAT:
                raise CheckpointError(f"{path} is not a matching: expected the format {_FORMAT!r} in its header")
            symmetry = Symmetry.from_json(header["symmetry"])
            roles = {int(g): tuple(r) for g, r in json.loads(header.get("roles", "{}")).items()}
            whole = bool(json.loads(header.get("invertible", "true")))
            count = int(header["models"])
            sources = json.loads(header.get("sources", "null")) or [{}] * count
            elements = tuple(_read_element(tensors, symmetry, m, sources[m], roles, whole) for m in range(count))
            return Matching(elements, symmetry, header.get("matcher", ""), json.loads(header["stats"]))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except (SafetensorError, SymmetryError, KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read as a matching: {error}") from error


def check_kinds(matcher: Matcher) -> None:
    """Options that are numbers, matchers or matchings are such.

    Raises:
        MatchingError: naming the matcher, the option and what is expected.
    """
    try:
        hints = get_type_hints(type(matcher))
    except NameError:  # a matcher of the caller's, with types that only a type checker sees
        return
    options: Sequence[Field[Any]] = fields(matcher) if is_dataclass(matcher) else ()
    for option in options:
        value = getattr(matcher, option.name)
        kinds = get_args(hints[option.name]) or (hints[option.name],)
        wanted = [_KINDS[kind] for kind in kinds if kind in _KINDS]
        wanted += [(partial(_is, kind), f"a {kind.__name__}") for kind in kinds if _is_ours(kind)]
        if wanted and not (value is None and type(None) in kinds) and not any(fits(value) for fits, _ in wanted):
            name, what = type(matcher).__name__, " or ".join(text for _, text in wanted)
            raise MatchingError(f"{name}({option.name}={value!r}): expected {what}")


_KINDS = {int: (is_whole, "a whole number"), float: (is_number, "a number")}


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind)


def _is_ours(kind: object) -> TypeGuard[type]:
    return isinstance(kind, type) and issubclass(kind, (Matcher, Matching))


def check_matcher(matcher: object) -> None:
    """A matcher that was given is one.

    Raises:
        MatchingError: if it is a class, a name or something else.
    """
    if isinstance(matcher, Matcher):
        return
    if isinstance(matcher, type):
        raise MatchingError(f"matcher is the class {matcher.__name__}; give one with its options: {matcher.__name__}()")
    raise MatchingError(f"matcher is {matcher!r}; give a matcher such as FrankWolfe()")


def check_symmetry(symmetry: object) -> None:
    """A symmetry that was given is one.

    Raises:
        MatchingError: if it is something else.
    """
    if not isinstance(symmetry, Symmetry):
        raise MatchingError(
            f"expected the Symmetry of the models, got a {type(symmetry).__name__}; automerge.infer(model, inputs) makes it"
        )


def _some(names: Sequence[str], most: int = 4) -> str:
    """A list of names that does not fill the page."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_element(
    tensors: Mapping[str, torch.Tensor],
    symmetry: Symmetry,
    model: int,
    sources: Mapping[str, str],
    roles: Mapping[int, tuple[bool, ...]],
    whole: bool,
) -> Element:
    """One model's element, from the tensors of a file."""
    maps: dict[str, dict[int, Any]] = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition("/")
        axis, _, name = rest.partition("/")
        if number == str(model) and axis not in ("forward", "inverse"):
            maps.setdefault(name, {})[int(axis)] = tensor.numpy()
    arrays = {n: tuple(i[k] for k in range(len(i))) for n, i in sorted(maps.items())}
    if not {*sources, *sources.values()} <= set(symmetry.shapes):
        raise ValueError("its modules are not those of its symmetry")
    element = Element(symmetry.shapes, arrays, sources)
    if not roles:
        return element
    matrices = {g: Matrix(tensors[f"{model}/forward/{g}"], tensors[f"{model}/inverse/{g}"], whole) for g in roles}
    return linear_element(symmetry, element, roles, matrices)


def state_dict(model: Model) -> dict[str, torch.Tensor]:
    """The tensors of a model, detached."""
    if not isinstance(model, Mapping | nn.Module):
        raise MatchingError(f"each model must be a state dict or a module, got a {type(model).__name__}")
    values = weights_of(model) if isinstance(model, nn.Module) else without_extras(model)
    return {n: v.detach() if isinstance(v, torch.Tensor) and not is_lazy(v) else v for n, v in values.items()}


def check_models(models: Sequence[Model], symmetry: Symmetry | None = None) -> list[dict[str, torch.Tensor]]:
    """The state dicts of some models, after checking that they belong together.

    Args:
        models: state dicts or modules.
        symmetry: if given, its parameters must be there with their shapes.

    Raises:
        MatchingError: for fewer than two models.
        CheckpointError: for a missing or an extra key, another shape or kind, NaN or infinite values, or two values for names
            of one tensor, naming the tensor and the model.
        SymmetryError: if the symmetry is of another architecture.
    """
    if isinstance(models, Mapping | nn.Module) or not isinstance(models, Sequence) or len(models) < 2:
        given = f"{len(models)}" if isinstance(models, list | tuple) else f"a {type(models).__name__}"
        raise MatchingError(f"matching needs a list of at least 2 models (state dicts or modules), got {given}")
    if symmetry is not None:
        check_symmetry(symmetry)
    values = [state_dict(m) for m in models]
    if symmetry is not None:  # the adjacency of a graph is no weight
        values = [without_extras(v, dict.fromkeys(v.keys() - symmetry.shapes.keys())) for v in values]
    still = set(values[0]) - (symmetry.moved if symmetry is not None else set(values[0]))
    for i, value in enumerate(values):
        check_state_dict(value, values[0], f"model {i}", still)
    if symmetry is not None:
        for name, shape in symmetry.shapes.items():
            if name not in values[0] or tuple(values[0][name].shape) != tuple(shape):
                found = tuple(values[0][name].shape) if name in values[0] else "nothing"
                raise SymmetryError(
                    f"the symmetry has {name} of shape {tuple(shape)}, the models have {found}; infer it again"
                )
        for i, value in enumerate(values):
            check_tied(value, symmetry.aliases, f"model {i}")
    return values
