"""How a `Symmetry` prints."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from automerge.symmetry import Exchange, Generator, Symmetry

_MEMBERS = 6


def _members(generator: Generator | Exchange) -> str:
    names = []
    for slot in generator.slots:
        width = slot.index.shape[1]
        text = f"{slot.param}[{slot.axis}]" + (f"x{width}" if width > 1 else "")
        if slot.within:
            text += "{" + ",".join(f"{a}:{b}-{c}" for a, b, c in slot.within) + "}"
        names.append(text)
    unique = list(dict.fromkeys(names))
    more = f", and {len(unique) - _MEMBERS} more" if len(unique) > _MEMBERS else ""
    return ", ".join(unique[:_MEMBERS]) + more


def _common(paths: list[list[str]]) -> str:
    """The module path that some state-dict names begin with."""
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in alike)


def module_names(exchange: Exchange, most: int = _MEMBERS) -> str:
    """The modules of an exchange; the parameters where these are no modules."""
    whole = [_common([n.split(".") for n in names]) for names in exchange.params]
    if len({*whole, ""}) <= len(whole) or any(len(names) < 2 for names in exchange.params):
        whole = [" with ".join(names[:2]) + (", ..." if len(names) > 2 else "") for names in exchange.params]
    return ", ".join(whole[:most]) + (f", and {len(whole) - most} more" if len(whole) > most else "")


def _modules(exchange: Exchange) -> str:
    """The modules of an exchange, and what moves with them."""
    return module_names(exchange) + (f"; with them {_members(exchange)}" if exchange.slots else "")


def symmetry_report(symmetry: Symmetry, *, limit: int = 40) -> str:
    """The report a person reads: groups with size and members, what is pinned and why, the free share."""
    sets = sorted(symmetry.sets, key=lambda g: (-len(g.slots), g.name))
    lines = [
        f"Symmetry: {symmetry.counted} over {len(symmetry.shapes)} parameters; "
        f"{symmetry.free_share:.1%} of the parameter axes' positions are free"
    ]
    for number, generator in enumerate(sets[:limit]):
        lines.append(f"  group {number}: {generator.size} units, {len(generator.slots)} slots: {_members(generator)}")
    if len(sets) > limit:
        lines.append(f"  ... and {len(sets) - limit} more groups")
    lines += [f"  modules: {e.size} units: {_modules(e)}" for e in symmetry.exchanges[:limit]]
    if symmetry.pins:
        lines.append("Pinned:")
        pins: Counter[tuple[str, str]] = Counter()
        who: dict[tuple[str, str], list[str]] = {}
        for pin in symmetry.pins:
            pins[pin.reason, pin.where] += pin.count
            who.setdefault((pin.reason, pin.where), []).append(f"{pin.param}[{pin.axis}]")
        for (reason, where), count in list(pins.items())[:limit]:
            names = who[reason, where]
            more = f", and {len(names) - _MEMBERS} more" if len(names) > _MEMBERS else ""
            at = f" ({where})" if where else ""
            lines.append(f"  {reason}{at}: {count} positions of {', '.join(names[:_MEMBERS])}{more}")
        if len(pins) > limit:
            lines.append(f"  ... and {len(pins) - limit} more reasons")
    if symmetry.unruled:
        lines.append("Operators without a rule (what they touch is pinned; automerge.register_rule adds one):")
        lines += [f"  {name}" for name in symmetry.unruled]
    lines += [f"Note: {note}" for note in symmetry.notes]
    return "\n".join(lines)
