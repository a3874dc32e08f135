"""Assertions about symmetries and matchings, straight from their definitions.

They move parameters by the definition of a generator (``new[index[u]] = old[index[p[u]]]``), not by
`automerge.Symmetry.apply`, so that they are an independent witness.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._errors import AutomergeError
from automerge._subject import fresh_inputs, runnable
from automerge._trials import trial_moves, within_rounding
from automerge.groups import Element
from automerge.infer import infer
from automerge.symmetry import Exchange, Generator, Symmetry
from automerge.testing._networks import Network, canonical
from automerge.testing._witness import Given, State, Witness, difference, lively, permuted
from automerge.trace import normalise_args


def assert_invariant(
    model: nn.Module,
    args: Any,
    symmetry: Symmetry,
    kwargs: Mapping[str, Any] | None = None,
    *,
    elements: int = 3,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> None:
    """Random elements of the group leave the float64 output unchanged, with the model's own weights.

    Args:
        model: any module; it is copied, not changed.
        args: a tensor, or a tuple or list of positional inputs.
        symmetry: the group.
        kwargs: keyword inputs.
        elements: how many random elements, at least one.
        seed: of the elements.
        tolerance: the largest difference, relative to the largest output; below 1.

    Raises:
        AssertionError: naming a generator that changes the output by itself, if there is one; or because nothing could be
            tested: the symmetry is of another architecture, or the outputs hold no finite number.
        AutomergeError: for arguments of another kind.

    Examples:
        >>> from automerge import Generator, Slot, Symmetry
        >>> unit = np.arange(4)[:, None]
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1))
        >>> shapes = {n: tuple(p.shape) for n, p in net.named_parameters()}
        >>> whole = Symmetry(shapes, (Generator(4, (Slot("0.weight", 0, unit), Slot("2.weight", 1, unit))),))
        >>> assert_invariant(net, torch.randn(2, 3), whole)
        >>> half = Symmetry(shapes, (Generator(4, (Slot("0.weight", 0, unit),)),))
        >>> assert_invariant(net, torch.randn(2, 3), half)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: exchanging the units of generator 0 (4 units: 0.weight[0]) changes the output by ...
    """
    _check_arguments(symmetry, elements, tolerance)
    subject = Witness(model)
    _check(subject, dict(subject.own), [normalise_args(args, kwargs)], symmetry, elements, seed, tolerance)


def assert_sound(
    model: nn.Module,
    args: Any,
    symmetry: Symmetry | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    elements: int = 3,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> Symmetry:
    """The group is one of symmetries for all weights and inputs, as far as random ones can tell.

    Weights and normalisation statistics are randomised first, because a fresh initialisation (zeros, ones) hides mistakes;
    every generator is tried alone, then random elements; on the example and on other inputs. Where no randomised weights give
    finite outputs, the model's own are used.

    Args:
        model: any module; it is copied, not changed.
        args: a tensor, or a tuple or list of positional inputs.
        symmetry: the group; inferred if not given.
        kwargs: keyword inputs.
        elements: how many random elements, at least one.
        seed: of weights, inputs and elements.
        tolerance: the largest difference, relative to the largest output; below 1.

    Returns:
        The symmetry, so that a test can go on with it.

    Raises:
        AssertionError: as `assert_invariant`.
        AutomergeError: for arguments of another kind, or a model that does not run.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> len(assert_sound(net, torch.randn(2, 3)).generators())
        1
    """
    group = infer(model, args, kwargs, verify=False) if symmetry is None else symmetry
    _check_arguments(group, elements, tolerance)
    given = normalise_args(args, kwargs)
    subject = Witness(model)
    how, _ = runnable(lambda *other: subject.run(subject.own, other), *given)
    inputs: list[Given] = [given, fresh_inputs(*given, seed, how)]
    state = lively(subject, inputs, group, seed)
    if state is None:
        state, inputs = dict(subject.own), [given]
    _check(subject, state, inputs, group, elements, seed, tolerance, alone=True)
    return group


def assert_same_symmetry(found: Symmetry, expected: Symmetry | Network) -> None:
    """Two symmetries have the same generators: nothing wrong, nothing missing.

    The order of generators and of units, and the choice of corresponding positions inside wreathed units, do not count.
    Exchanges of modules are compared where the expected symmetry names some.

    Raises:
        AssertionError: listing the generators that only one of them has, or has more often.

    Examples:
        >>> from automerge import infer
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> assert_same_symmetry(infer(net, torch.ones(1, 3)), infer(net, torch.zeros(2, 3)))
    """
    truth = expected.symmetry if isinstance(expected, Network) else expected
    for symmetry in (found, truth):
        _check_symmetry(symmetry)
    mine, theirs = canonical(found), canonical(truth)
    modules = [{frozenset(map(frozenset, e.params)) for e in s.exchanges} for s in (found, truth)]
    lines = []
    if modules[1] and modules[0] != modules[1]:
        lines = [f"  found {len(modules[0])} exchanges of modules, expected {len(modules[1])} others"]
    if mine == theirs and not lines:
        return
    for title, symmetry, other in (("found, not expected", found, theirs), ("expected, not found", truth, mine)):
        left = Counter(other)
        for number, generator in enumerate(symmetry.generators()):
            (own,) = canonical(Symmetry(symmetry.shapes, (generator,)))
            left[own] -= 1
            if left[own] < 0:
                lines.append(f"  {title}: {_describe(number, generator)}")
    for name, shape in found.shapes.items():
        if truth.shapes.get(name, shape) != shape:
            lines.append(f"  {name} has the shape {shape}, expected {truth.shapes[name]}")
    sizes = [sorted(g.size for g in s.generators()) for s in (found, truth)]
    raise AssertionError(f"found generators of sizes {sizes[0]}, expected {sizes[1]}\n" + "\n".join(lines))


def assert_cycle_consistent(matching: Any) -> None:
    """The maps between any two models invert each other, and around any triangle they compose to the identity, exactly.

    Args:
        matching: a `Matching`, or anything with a length and ``between(a, b) -> Element``.

    Raises:
        AssertionError: naming the cycle and how many positions it displaces.

    Examples:
        >>> from automerge import Generator, Matching, Slot, Symmetry
        >>> unit = np.arange(3)[:, None]
        >>> s = Symmetry({"a": (3,)}, (Generator(3, (Slot("a", 0, unit),)),))
        >>> assert_cycle_consistent(Matching((s.random_element(0), s.random_element(1), s.identity()), s))
    """
    if not hasattr(matching, "between"):
        raise AutomergeError(f"expected a Matching, as match gives it, got a {type(matching).__name__}")
    n = len(matching)
    if n < 2:
        raise AssertionError(f"a matching of {n} models has no cycle")
    maps: dict[tuple[int, int], Element] = {(a, b): matching.between(a, b) for a in range(n) for b in range(n)}
    for a in range(n):
        _identity(maps[a, a], [a, a])
    for a, b in itertools.permutations(range(n), 2):
        _identity(maps[a, b].then(maps[b, a]), [a, b, a])
    for a, b, c in itertools.permutations(range(n), 3):
        _identity(maps[a, b].then(maps[b, c]).then(maps[c, a]), [a, b, c, a])


def _identity(element: Element, cycle: Sequence[int]) -> None:
    if not element.is_identity():
        path = " -> ".join(map(str, cycle))
        raise AssertionError(
            f"the maps around the cycle {path} displace {element.moved()} positions; they must compose to the identity"
        )


# -------------------------------------------------------------------- how
def _check_arguments(symmetry: Any, elements: int, tolerance: float) -> None:
    """An assertion that could not fail is refused."""
    _check_symmetry(symmetry)
    if elements < 1:
        raise AutomergeError(f"elements={elements} would test nothing; give at least one")
    if not 0 <= tolerance < 1:
        raise AutomergeError(
            f"tolerance={tolerance}: expected a number from 0 to below 1, relative to the largest output"
        )


def _check_symmetry(symmetry: Any) -> None:
    if not isinstance(symmetry, Symmetry):
        raise AutomergeError(f"expected a Symmetry, as infer gives it, got a {type(symmetry).__name__}")


def _outputs_before(
    subject: Witness, state: State, inputs: Sequence[Given], symmetry: Symmetry
) -> list[list[torch.Tensor]]:
    """The outputs for each input; the symmetry must be of this architecture, and numbers that are none agree with any claim."""
    for name in sorted(symmetry.moved):
        if name not in state:
            raise AssertionError(f"the model has no parameter {name!r}, which the symmetry moves")
        if tuple(state[name].shape) != tuple(symmetry.shapes[name]):
            raise AssertionError(
                f"{name} has the shape {tuple(state[name].shape)}, and {tuple(symmetry.shapes[name])} in the symmetry"
            )
    before = [subject.run(state, given) for given in inputs]
    if not any(bool(torch.isfinite(t).any()) for outputs in before for t in outputs):
        raise AssertionError(
            "the outputs hold no finite number, so nothing can be compared; give other inputs or weights"
        )
    return before


def _check(
    subject: Witness,
    state: State,
    inputs: Sequence[Given],
    symmetry: Symmetry,
    elements: int,
    seed: int,
    tolerance: float,
    alone: bool = False,
) -> None:
    generators: list[Generator | Exchange] = [*symmetry.generators(), *symmetry.exchanges]
    before = _outputs_before(subject, state, inputs, symmetry)
    rng = np.random.default_rng(seed)

    def error(moved: State) -> float:
        worst = 0.0
        for own, given in zip(before, inputs, strict=True):
            e = difference(own, subject.run(moved, given))
            if not (e > tolerance and within_rounding(e, own, partial(subject.changed, state, given), difference)):
                worst = e if not e <= worst else worst
        return worst

    worst = 0.0
    for moves in trial_moves(symmetry, elements, seed):  # by chance two units may stay every time, and hide a mistake
        moved = state
        for g, p in zip(generators, moves, strict=True):
            moved = permuted(moved, g, p)
        worst = max(worst, error(moved))
    if worst <= tolerance and not alone:
        return
    for number, g in enumerate(generators):
        changed = max(error(permuted(state, g, p)) for p in (np.roll(np.arange(g.size), 1), rng.permutation(g.size)))
        if not changed <= tolerance:
            raise AssertionError(
                f"exchanging the units of generator {_describe(number, g)} changes the output by {changed:.1e} (relative; "
                f"allowed {tolerance:.0e}): it is no symmetry of {type(subject.model).__name__}"
            )
    if not worst <= tolerance:
        raise AssertionError(
            f"a random group element changes the output by {worst:.1e} (relative; allowed {tolerance:.0e}), though no "
            "generator does so alone"
        )


def _describe(number: int, generator: Generator | Exchange) -> str:
    shown = [f"{s.param}[{s.axis}]" + (f" within {s.within}" if s.within else "") for s in generator.slots[:4]]
    if isinstance(generator, Exchange):
        shown = [*(names[0] for names in generator.params), *shown][:4]
    more = f" and {len(generator.slots) - 4} more" if len(generator.slots) > 4 else ""
    return f"{number} ({generator.size} units: {', '.join(shown)}{more})"
