"""The picture of a `Symmetry`: its traced graph, folded by module, with one colour per group."""

from __future__ import annotations

import colorsys
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from automerge._canvas import check_picture, new_figure, save_figure
from automerge._fold import Folded, Key, Shade, fold
from automerge._report import module_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from automerge.symmetry import Symmetry

_PALETTE = (
    "#2f6fb7",
    "#e0793a",
    "#3b9b6d",
    "#c8435a",
    "#8a63b8",
    "#c9a227",
    "#2ea3ab",
    "#d977ab",
    "#7a5c42",
    "#7f9a3c",
)
_INK, _MUTED, _PINNED, _FRAME = "#22272e", "#8b939c", "#d5d9de", "#f4f6f8"
_HEIGHT, _BAND, _JOIN, _GAP, _LANE = 0.36, 0.11, 0.115, 0.27, 0.35
_HEAD, _FOOT = 0.25, 0.1
_LEGEND_ROWS, _LABEL = 40, 30
_MODULES = 6


def draw_symmetry(symmetry: Symmetry, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Draw the traced graph, folded by module, with one colour per group.

    A box is a module; the band below its name shows the groups of its parameters, first those it reads, then those it
    writes, grey if it has none. Thick lines are residual streams; a circle is where tensors meet. Long models are
    folded: of repeated modules that do not fit only the first is shown open.

    Args:
        symmetry: what `automerge.infer` returned, or one read from JSON.
        path: where to write it; the suffix chooses the format (svg, png, pdf).
        force: replace an existing file.

    Returns:
        The path written.

    Raises:
        AutomergeError: if matplotlib is not installed.
        OutputError: if the picture cannot be written.
    """
    check_picture(new_figure(1, 1), path, force)
    picture = _Picture(symmetry, fold(symmetry))
    return save_figure(picture.figure(), path, force)


@dataclass
class _Picture:
    """Places and colours of everything, in inches from the top left corner."""

    symmetry: Symmetry
    folded: Folded
    place: dict[Key, tuple[float, float]] = field(default_factory=dict)
    layer: dict[Key, int] = field(default_factory=dict)
    column: dict[Key, int] = field(default_factory=dict)
    frames: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    colours: dict[Shade, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.folded.graph
        self._choose_colours()
        self._layers()
        self._columns()
        self._choose_frames()
        names = [self.label(n) for n in self.graph]
        self.width = min(2.9, max([1.2, *(0.078 * len(n) + 0.24 for n in names)]))
        self.pitch = self.width + 0.45
        self._places()

    # ---------------------------------------------------------------- colours
    def _choose_colours(self) -> None:
        """Streams first, then in the order of appearance; parts of a nest are tints of one hue."""
        shades = self.folded.shade
        families = sorted(self.folded.streams) + [s.family for s in shades if s.family not in self.folded.streams]
        for number, family in enumerate(dict.fromkeys(families)):
            parts = sorted({s.part for s in shades if s.family == family})
            base = _hue(number)
            for k, part in enumerate(parts):
                self.colours[Shade(family, part)] = _tint(base, 0.6 * k / max(2, len(parts)))

    def stream(self, shades: Sequence[Shade]) -> Shade | None:
        """The residual stream among some groups."""
        return next((s for s in shades if s.family in self.folded.streams and not s.part), None)

    # ---------------------------------------------------------------- layout
    def _layers(self) -> None:
        """The longest way from the input; what has no input stands just above its first use."""
        if not self.graph.number_of_edges():
            self.layer = {n: k for k, n in enumerate(self.graph)}
            return
        for k, layer in enumerate(nx.topological_generations(self.graph)):
            self.layer.update(dict.fromkeys(layer, k))
        for node in self.graph:
            if not self.graph.pred[node] and node[0] != "input" and self.graph.succ[node]:
                self.layer[node] = min(self.layer[b] for b in self.graph.succ[node]) - 1
        lowest = min(self.layer.values())
        self.layer = {n: k - lowest for n, k in self.layer.items()}

    def _columns(self) -> None:
        """Column 0 is the longest path; branches stand to the right of it, straight below where they began."""
        spine = nx.dag_longest_path(self.graph) if self.graph.number_of_edges() else list(self.graph)
        self.column = dict.fromkeys(spine, 0)
        taken: dict[int, set[int]] = {}
        for node in spine:
            taken.setdefault(self.layer[node], set()).add(0)
        for node in sorted(self.graph, key=lambda n: self.layer[n]):
            if node in self.column:
                continue
            full = taken.setdefault(self.layer[node], {0})
            wish = [self.column[a] for a in self.graph.pred[node] if self.column.get(a)]
            self.column[node] = next(c for c in [*wish, *range(1, len(full) + 2)] if c not in full)
            full.add(self.column[node])

    def _choose_frames(self) -> None:
        """Frames around opened modules whose nodes stand together."""
        for module in sorted(self.folded.opened, key=lambda m: m.count(".")):
            inner = [n for n in self.graph if n[0] == module or n[0].startswith(module + ".")]
            if len(inner) < 2:
                continue
            rows, columns = [self.layer[n] for n in inner], [self.column[n] for n in inner]
            box = (min(rows), max(rows), min(columns), max(columns))
            others = [n for n in self.graph if n not in inner]
            if not any(box[0] <= self.layer[n] <= box[1] and box[2] <= self.column[n] <= box[3] for n in others):
                self.frames[module] = box

    def _places(self) -> None:
        layers: dict[int, list[Key]] = {}
        for node, k in self.layer.items():
            layers.setdefault(k, []).append(node)
        skips = [b for a, b in self.graph.edges if self._bulge(a, b)]
        self.left = 0.25 + (_LANE * 2.4 if skips else 0.0)
        x0, y = self.left + self.width / 2, 0.72
        for k in sorted(layers):
            y += _HEAD * max((self._nested(m, 0) for m, box in self.frames.items() if box[0] == k), default=0)
            tall = _HEIGHT if any(self._boxed(n) for n in layers[k]) else 2 * _JOIN
            for node in layers[k]:
                self.place[node] = (x0 + self.column[node] * self.pitch, y + tall / 2)
            y += (
                tall
                + _GAP
                + _FOOT * max((self._nested(m, 1) for m, box in self.frames.items() if box[1] == k), default=0)
            )
        self.bottom = y
        self.right = x0 + self.width / 2 + self.pitch * max(self.column.values(), default=0) + 0.3

    def _nested(self, module: str, side: int) -> int:
        """How many frames, this one and those within it, begin (side 0) or end (side 1) in the same layer."""
        inner = [
            m for m in self.frames if m.startswith(module + ".") and self.frames[m][side] == self.frames[module][side]
        ]
        return 1 + max((self._nested(m, side) for m in inner), default=0)

    def _boxed(self, node: Key) -> bool:
        return not self.graph.nodes[node]["join"]

    def _bulge(self, a: Key, b: Key) -> bool:
        """Whether an edge must go round what stands between its ends."""
        ca, cb = self.column[a], self.column[b]
        lane = cb if ca == 0 else ca
        between = range(self.layer[a] + 1, self.layer[b])
        return any(self.column[n] == lane and self.layer[n] in between for n in self.graph)

    def label(self, node: Key) -> str:
        """The module's path, within the frame that it stands in."""
        if self.graph.nodes[node]["join"]:
            return ""
        name = node[0] or "(model)"
        name = self._within(name)
        return name if len(name) <= _LABEL else "\N{HORIZONTAL ELLIPSIS}" + name[1 - _LABEL :]

    def _within(self, path: str) -> str:
        around = [m for m in self.frames if path.startswith(m + ".")]
        return path[len(max(around, key=len)) + 1 :] if around else path

    # ---------------------------------------------------------------- drawing
    def figure(self) -> Any:
        """The finished figure."""
        rows = self.legend_rows()
        legend_x = self.right + 0.25
        width = legend_x + max(3.1, 0.072 * max((len(t) for _, _, t in rows), default=0) + 0.9)
        below = 5 + min(len(self.symmetry.exchanges), _MODULES + 1)
        height = max(self.bottom + 0.1, 0.95 + 0.24 * (len(rows) + below))
        figure = new_figure(width, height)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        title = self.symmetry.counted if self.symmetry.moved else "no groups: nothing may be permuted"
        axes.text(0.25, 0.26, title, fontsize=12, weight="bold", color=_INK, va="center")
        if self.symmetry.moved:
            share = f"{self.symmetry.free_share:.1%} of the parameter axes' positions are free"
            axes.text(0.25, 0.47, share, fontsize=8, color=_MUTED, va="center")
        self._draw_frames(axes)
        order = sorted(self.graph.edges, key=lambda e: self.stream(self.graph.edges[e]["shades"]) is not None)
        for a, b in order:
            self._draw_edge(axes, a, b)
        for node in self.graph:
            self._draw_node(axes, node)
        self._draw_legend(axes, legend_x, rows)
        return figure

    def _draw_frames(self, axes: Axes) -> None:
        from matplotlib.patches import FancyBboxPatch

        for module, (_, _, left, right) in self.frames.items():
            inner = [self.place[n][1] for n in self.graph if n[0] == module or n[0].startswith(module + ".")]
            deeper = max((m.count(".") for m in self.frames if m.startswith(module + ".")), default=module.count("."))
            pad = 0.1 + 0.07 * (deeper - module.count("."))
            x0 = self.left + left * self.pitch - pad
            x1 = self.left + right * self.pitch + self.width + pad
            y0 = min(inner) - _HEIGHT / 2 - _HEAD * self._nested(module, 0)
            y1 = max(inner) + _HEIGHT / 2 + _FOOT * self._nested(module, 1)
            box = FancyBboxPatch(
                (x0, y0), x1 - x0, y1 - y0, boxstyle="round,pad=0,rounding_size=0.09", fc=_FRAME, ec="#dfe3e8", lw=0.8
            )
            box.set_gid(f"frame:{module}")
            axes.add_patch(box)
            axes.text(x0 + 0.09, y0 + 0.12, self._within(module), fontsize=7.5, color=_MUTED, va="center")

    def _draw_edge(self, axes: Axes, a: Key, b: Key) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Curve

        shades = self.graph.edges[a, b]["shades"]
        stream = self.stream(shades)
        shown = stream or (shades[0] if shades else None)
        colour = "#b4bac1" if shown is None else self.colours[shown]
        (xa, ya), (xb, yb) = self.place[a], self.place[b]
        ya, yb = ya + self._half(a), yb - self._half(b)
        if self._bulge(a, b):
            span = self.layer[b] - self.layer[a]
            side = -1 if self.column[a] == 0 == self.column[b] else 1
            reach = self.width / 2 + _LANE * min(2.2, 0.55 + 0.22 * span)
            xm = (min(xa, xb) if side < 0 else max(xa, xb)) + side * reach
            if self._boxed(a):
                xa, ya = xa + side * self.width / 2, ya - self._half(a)
            else:
                xa, ya = xa + side * _JOIN, ya - _JOIN
            if self._boxed(b):
                xb, yb = xb + side * self.width / 2, yb + self._half(b)
            else:
                xb, yb = xb + side * _JOIN, yb + _JOIN
            bend = min(0.3, (yb - ya) / 3)
            points = [(xa, ya), (xm, ya), (xm, ya), (xm, ya + bend), (xm, yb - bend), (xm, yb), (xm, yb), (xb, yb)]
            codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3]
        elif xa == xb:
            points, codes = [(xa, ya), (xb, yb)], [Curve.MOVETO, Curve.LINETO]
        else:
            points, codes = self._side_path(a, b, (xa, ya), (xb, yb), Curve)
        width = 4.2 if stream else 1.7 if shown else 1.1
        line = PathPatch(Curve(points, codes), fc="none", ec=colour, lw=width, capstyle="round", joinstyle="round")
        line.set_gid(f"{'stream' if stream else 'edge'}:{a[0]}.{a[1]}>{b[0]}.{b[1]}")
        axes.add_patch(line)

    def _side_path(self, a: Key, b: Key, start: tuple[float, float], end: tuple[float, float], curve: Any) -> Any:
        """To another column within the first layer's gap, or back to the first column within the last one's."""
        (xa, ya), (xb, yb) = start, end
        bend = min(yb - ya, _HEIGHT + _GAP)
        if self.column[b] == 0 and self.column[a] != 0:
            at = yb - bend
            points = [(xa, ya), (xa, at), (xa, yb - 0.2 * bend), (xb, yb - 0.8 * bend), (xb, yb)]
            if not self._boxed(b):
                points = [(xa, ya), (xa, at), (xa, yb + _JOIN), (xa, yb + _JOIN), (xb + _JOIN, yb + _JOIN)]
            return points, [curve.MOVETO, curve.LINETO, *[curve.CURVE4] * 3]
        at = ya + bend
        points = [(xa, ya), (xa, ya + 0.8 * bend), (xb, ya + 0.2 * bend), (xb, at), (xb, yb)]
        return points, [curve.MOVETO, *[curve.CURVE4] * 3, curve.LINETO]

    def _half(self, node: Key) -> float:
        return _HEIGHT / 2 if self._boxed(node) else _JOIN

    def _draw_node(self, axes: Axes, node: Key) -> None:
        from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

        x, y = self.place[node]
        data = self.graph.nodes[node]
        shades = list(dict.fromkeys(data["shades"]))
        if data["join"]:
            stream = self.stream(shades)
            colour = self.colours[stream or shades[0]] if shades else _MUTED
            circle = Circle((x, y), _JOIN, fc=colour, ec="white", lw=1.2, zorder=3)
            circle.set_gid(f"join:{node[0]}.{node[1]}")
            axes.add_patch(circle)
            axes.text(x, y, data["sign"], color="white", fontsize=9, weight="bold", ha="center", va="center", zorder=4)
            return
        end = node[0] in ("input", "output")
        shape = f"round,pad=0,rounding_size={_HEIGHT / 2 if end else 0.07}"
        corner = (x - self.width / 2, y - _HEIGHT / 2)
        box = FancyBboxPatch(corner, self.width, _HEIGHT, boxstyle=shape, fc="white", ec="#69727c", lw=0.9, zorder=3)
        box.set_gid(f"node:{node[0]}.{node[1]}")
        axes.add_patch(box)
        text = y if end else y - _BAND / 2 - 0.005
        axes.text(x, text, self.label(node), fontsize=8.5, color=_INK, ha="center", va="center", zorder=5)
        if end:
            return
        segments = [self.colours[s] for s in shades] or [_PINNED]
        step = self.width / len(segments)
        for k, colour in enumerate(segments):
            left = (corner[0] + k * step, y + _HEIGHT / 2 - _BAND)
            band = Rectangle(
                left, step, _BAND, fc=colour, ec="white" if len(segments) > 1 else colour, lw=0.6, zorder=4
            )
            band.set_clip_path(box)
            axes.add_patch(band)
        edge = FancyBboxPatch(corner, self.width, _HEIGHT, boxstyle=shape, fc="none", ec="#69727c", lw=0.9, zorder=5)
        axes.add_patch(edge)

    # ---------------------------------------------------------------- legend
    def legend_rows(self) -> list[tuple[str, bool, str]]:
        """Colour, whether it is a residual stream, and text, for every colour that has a row."""
        members: dict[Shade, list[int]] = {}
        for number, shade in enumerate(self.folded.shade):
            members.setdefault(shade, []).append(number)
        order = sorted(members, key=lambda s: (s.family not in self.folded.streams, s.family, s.part))
        rows = []
        for shade in order:
            sets = [self.symmetry.sets[k] for k in members[shade]]
            sizes = Counter(g.size for g in sets)
            size = ", ".join(f"{n} x {k}" if n > 1 else str(k) for k, n in sizes.items())
            slots = len({(s.param, s.axis) for g in sets for s in g.slots})
            stream = shade.family in self.folded.streams and not shade.part
            kind = " (residual stream)" if stream else ""
            within = "within: " if shade.part else ""
            name = sets[0].name or sets[0].slots[0].param if sets[0].slots else ""
            rows.append((self.colours[shade], stream, f"{within}{size} units, {slots} axes, {name}{kind}"))
        if len(rows) > _LEGEND_ROWS:
            rows = [*rows[: _LEGEND_ROWS - 1], ("none", False, f"and {len(rows) - _LEGEND_ROWS + 1} more colours")]
        return rows

    def _draw_legend(self, axes: Axes, x: float, rows: Sequence[tuple[str, bool, str]]) -> None:
        from matplotlib.patches import Rectangle

        y = 0.3
        for colour, stream, text in rows:
            inset = 0.18 if text.startswith("within") else 0.0
            tall = 0.15
            axes.add_patch(Rectangle((x + inset, y - tall / 2), 0.3 - inset, tall, fc=colour, ec="none"))
            weight = "bold" if stream else "normal"
            axes.text(x + 0.42, y, text, fontsize=8, color=_INK, va="center", weight=weight)
            y += 0.24
        y += 0.16
        notes = ["band of a box: groups that the module's parameters read, then write"]
        if any(
            not d["shades"] and not d["join"] and n[0] not in ("input", "output") for n, d in self.graph.nodes.items()
        ):
            notes.append("grey band: nothing of it is free")
        if self.folded.streams:
            notes.append("thick line: carries a residual stream; circle with +: added to it")
        modules = [f"interchangeable: {module_names(e, 4)}" for e in self.symmetry.exchanges]
        notes += modules[:_MODULES] + ([f"and {len(modules) - _MODULES} more"] if len(modules) > _MODULES else [])
        for note in notes:
            axes.text(x, y, note, fontsize=7.5, color=_MUTED, va="center")
            y += 0.2


def _hue(number: int) -> str:
    """A colour per number, all different: ten chosen ones, then steps of the golden angle at changing lightness."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    k = number - len(_PALETTE)
    rgb = colorsys.hls_to_rgb((0.07 + 0.618034 * k) % 1.0, (0.42, 0.56, 0.34)[k % 3], (0.62, 0.5)[k % 2])
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def _tint(colour: str, share: float) -> str:
    """Mixed with white."""
    parts = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)
