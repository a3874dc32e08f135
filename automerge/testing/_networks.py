"""Random small networks whose symmetry is known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._errors import AutomergeError
from automerge._random import forked
from automerge.symmetry import Generator, Symmetry
from automerge.testing._blocks import BLOCKS, Make, dense
from automerge.testing._builder import Block, Builder, Built, Pick
from automerge.testing._ledger import Layout, Units, cells
from automerge.testing._spatial import IMAGE, TOKENS, to_vector

KINDS = ("vector", "tokens", "image")


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A network, example inputs, and its symmetry as it was decided while the network was built.

    Attributes:
        model: the network, with random weights and statistics, float32.
        args: example inputs.
        symmetry: the ground truth; never inferred.
        description: the blocks, one per line.
        recipe: an expression that builds the same network again, weights and inputs included; the last line of its repr.
    """

    model: nn.Module
    args: tuple[Any, ...]
    symmetry: Symmetry
    description: str = ""
    recipe: str = ""

    @property
    def generators(self) -> list[Generator]:
        """The ground truth's generators."""
        return self.symmetry.generators()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of all generators, sorted."""
        return tuple(sorted(g.size for g in self.generators))

    @cached_property
    def free(self) -> Mapping[tuple[str, int], frozenset[int]]:
        """``(param, axis)`` -> the positions that some generator moves; axes without any are left out."""
        return free_positions(self.symmetry)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        _print_lines(printer, repr(self))

    def __repr__(self) -> str:
        return f"Network(sizes={self.sizes},\n{self.description},\n  {self.recipe})"


def _print_lines(printer: Any, text: str) -> None:
    for number, line in enumerate(text.splitlines()):
        if number:
            printer.break_()
        printer.text(line)


def free_positions(symmetry: Symmetry) -> dict[tuple[str, int], frozenset[int]]:
    """``(param, axis)`` -> the positions that some generator of a symmetry moves."""
    out: dict[tuple[str, int], set[int]] = {}
    for generator in symmetry.generators():
        for slot in generator.slots:
            out.setdefault((slot.param, slot.axis), set()).update(slot.index.reshape(-1).tolist())
    return {key: frozenset(positions) for key, positions in out.items()}


def canonical(symmetry: Symmetry) -> list[tuple[int, frozenset[Any]]]:
    """The generators in a form that two equal groups share: the size, and what every unit covers.

    What a unit covers is the set of ``(param, axis, entries)``; the order of generators, units and columns is gone, and
    so is the choice of which positions of two wreathed units correspond.
    """
    return sorted(((g.size, _units(g, symmetry)) for g in symmetry.generators()), key=repr_of)


def repr_of(item: tuple[int, frozenset[Any]]) -> tuple[int, str]:
    """A key to sort generators by."""
    return item[0], repr(sorted(sorted((p, a, m.hex()) for p, a, m in unit) for unit in item[1]))


def _units(generator: Generator, symmetry: Symmetry) -> frozenset[Any]:
    units = []
    for u in range(generator.size):
        masks: dict[tuple[str, int], np.ndarray] = {}
        for slot in generator.slots:
            mask = masks.setdefault((slot.param, slot.axis), np.zeros(symmetry.shapes[slot.param], bool))
            window: list[Any] = [slice(None)] * mask.ndim
            for axis, start, stop in slot.within:
                window[axis] = slice(start, stop)
            window[slot.axis] = slot.index[u]
            mask[tuple(window)] = True
        units.append(frozenset((p, a, np.packbits(m).tobytes()) for (p, a), m in masks.items()))
    return frozenset(units)


# -------------------------------------------------------------------- building
def build(pick: Pick, kinds: tuple[str, ...] = KINDS, blocks: int = 4) -> Network:
    """Build a network from choices.

    Args:
        pick: chooses one of some options.
        kinds: what the input may be.
        blocks: at most this many blocks between the input and the head.
    """
    chosen: list[int] = []

    def noted(options: Sequence[Any]) -> Any:
        value = pick(options)
        chosen.append(
            next(i for i, o in enumerate(options) if o is value or o == value)
        )  # equal options build the same
        return value

    with forked(seed=0):  # choices alone decide about weights
        return replace(
            _assembled(noted, kinds, blocks), recipe=f"rebuild({chosen}, kinds={kinds!r}, max_blocks={blocks})"
        )


def rebuild(choices: Sequence[int], kinds: Sequence[str] = KINDS, max_blocks: int = 4) -> Network:
    """The network that `networks` drew before: what its repr says in the last line.

    Args:
        choices: the number of every option that was chosen, in order.
        kinds: as given to `networks`.
        max_blocks: as given to `networks`.

    Raises:
        AutomergeError: if the choices are no network's.

    Examples:
        >>> rebuild([0, 0, 0, 4, 0, 0, 0, 0, 2, 0], kinds=["vector"], max_blocks=1)
        Network(sizes=(2, 2),
          Block(
            split [2, 2], join
            (parts): ModuleList(
              (0): Linear(in_features=2, out_features=4, bias=True)
            )
          )
          Block(
            sum of tanh
            (parts): ModuleList()
          ),
          rebuild([0, 0, 0, 4, 0, 0, 0, 0, 2, 0], kinds=('vector',), max_blocks=1))
    """
    left = iter(choices)
    try:
        return build(lambda options: options[next(left)], checked_kinds(kinds, max_blocks), max_blocks)
    except (StopIteration, IndexError, TypeError) as error:
        raise AutomergeError("these choices are of no network, or of other kinds or max_blocks") from error


def checked_kinds(kinds: Sequence[str], max_blocks: int) -> tuple[str, ...]:
    """The kinds as a tuple.

    Raises:
        AutomergeError: if there is none or an unknown one, or no block.
    """
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise AutomergeError(f"kinds={kinds!r}: expected a list of some of {', '.join(KINDS)}")
    if not isinstance(max_blocks, int) or max_blocks < 1:
        raise AutomergeError(f"max_blocks={max_blocks!r}: expected a whole number of at least 1")
    return tuple(kinds)


def _assembled(pick: Pick, kinds: tuple[str, ...], blocks: int) -> Network:
    b = Builder(pick, pick(kinds))
    b.space = pick([2, 4]) if b.kind == "image" else 3
    channels = pick([2, 3])
    x: Layout = cells(Units(channels, pinned=True))
    shape = {"vector": (3, channels), "tokens": (2, b.space, channels), "image": (2, channels, b.space, b.space)}[
        b.kind
    ]
    modules: list[nn.Module] = []
    count = pick(range(1, blocks + 1))
    for i in range(count):
        module, x = _block(b, x, first=i == 0)
        modules.append(module)
    if b.kind != "vector" and pick([True, False]):
        module, x = to_vector(b, x)
        modules.append(module)
        if pick([True, False]):
            module, x = _block(b, x, first=False)
            modules.append(module)
    modules.append(_head(b, x))
    model = nn.Sequential(*modules)
    seed = pick(range(1000))
    _randomise(model, seed)
    args = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)),)
    text = "\n".join(f"  {m}".replace("\n", "\n  ") for m in modules)
    return Network(model, args, b.ledger.symmetry(model), text)


def _block(b: Builder, x: Layout, first: bool) -> Built:
    """One block; where a choice does not fit the present layout, a plain layer."""
    table: dict[str, Make] = dict(BLOCKS)
    if b.kind != "vector":
        table |= IMAGE if b.kind == "image" else TOKENS
    name = b.pick(["dense", "residual", "shared", "concat_branch", "split_join"] if first else list(table))
    made = table[name](b, x) if len(x) <= 24 else None
    return dense(b, x) if made is None else made


def _head(b: Builder, x: Layout) -> nn.Module:
    if b.pick([True, True, False]):
        return b.mix(x, cells(Units(2, pinned=True)))
    d = b.dim
    return Block("sum of tanh", lambda self, x: x.tanh().sum(d))


def _randomise(model: nn.Module, seed: int) -> None:
    """Weights and statistics without coincidences; signs and sizes stay reasonable."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=rng)
            if name.endswith(("running_var", "original0")):
                tensor.copy_(torch.exp(0.3 * noise))
            elif tensor.ndim > 1:
                fan = max(1, tensor[0].numel())
                tensor.copy_(noise / fan**0.5)
            else:
                tensor.add_(0.3 * noise)
