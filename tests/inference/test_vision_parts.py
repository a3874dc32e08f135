"""What networks for images do and others seldom: pieces of a modulation that nobody reads, kernels made on the way, boxes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automerge import infer, register_rule
from automerge.rules._registry import find_rule
from automerge.testing import assert_sound


def sizes(model: nn.Module, *inputs: torch.Tensor) -> list[int]:
    """The sizes of the groups, without and with verification; sound either way."""
    torch.manual_seed(0)
    model = model.eval()
    found = infer(model, inputs, verify=False)
    assert_sound(model, inputs, found)
    out = sorted(g.size for g in found.generators())
    assert sorted(g.size for g in infer(model, inputs).generators()) == out
    return out


class Modulated(nn.Module):
    """Shift, scale and gate from one layer, of which some are not used (the last block of a diffusion transformer)."""

    def __init__(self, used: tuple[int, int], heads: int = 1) -> None:
        super().__init__()
        self.used, self.heads = used, heads
        self.stem, self.norm = nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=False)
        self.ada, self.head = nn.Linear(4, 24), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        pieces = self.ada(c).chunk(3, -1)
        shift, scale = (pieces[k] for k in self.used)
        x = self.norm(self.stem(x)) * (1 + scale) + shift
        if self.heads > 1:
            x = x.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        return self.head(x)


@pytest.mark.parametrize("used", [(0, 1), (1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_piece_that_is_not_read_may_be_in_another_order(used: tuple[int, int], heads: int) -> None:
    """Other inputs may read it against other partners: no group is claimed of an axis that is read in part."""
    found = infer(Modulated(used, heads), (torch.randn(2, 3), torch.randn(2, 4)))
    assert not any(s.param == "ada.weight" and s.axis == 0 for g in found.generators() for s in g.slots)


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("border", [5, 6, 7])
def test_rows_that_longer_inputs_read_differently_are_not_claimed(border: int, verified: bool) -> None:
    """Rows of a flattened layer output meet the units as they are up to a border, and mixed from there on."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.stem = nn.Linear(4, 48), nn.Linear(4, 6)
            self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, h = self.rows(x.mean(1)).view(-1, 8, 6), self.stem(x)
            parts = [rows[:, k] * (h[:, k] if k < border else self.mix(h[:, k])) for k in range(x.shape[1])]
            return self.head(torch.stack(parts).relu().sum(0))

    model = Rows()
    found = infer(model, torch.randn(2, 5, 4), verify=verified)
    for length in (2, 5, 6, 7, 8):
        assert_sound(model, torch.randn(2, length, 4), found)


def crops(x: torch.Tensor, boxes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """One sample per cell of a box, in the image that its first number names."""
    out = []
    for image, x0, y0, x1, y1 in boxes.tolist():
        v = y0 + (torch.arange(rows, dtype=x.dtype) + 0.5) / rows * (y1 - y0)
        h = x0 + (torch.arange(columns, dtype=x.dtype) + 0.5) / columns * (x1 - x0)
        out.append(at(x[int(image)][None], *torch.meshgrid(v, h, indexing="ij"))[0])
    return torch.stack(out)


def at(x: torch.Tensor, v: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Bilinear samples at pixel coordinates, 0 outside."""
    v, h = v / (x.shape[2] - 1) * 2 - 1, h / (x.shape[3] - 1) * 2 - 1
    grid = torch.stack([h, v], -1).expand(len(x), *v.shape[-2:], 2)
    return nn.functional.grid_sample(x, grid.to(x.dtype), align_corners=True)


@torch.library.custom_op("automerge_test::roi_align", mutates_args=())
def roi_align(x: torch.Tensor, boxes: torch.Tensor, scale: float, rows: int, columns: int) -> torch.Tensor:
    return crops(x, torch.cat([boxes[:, :1], boxes[:, 1:] * scale], 1), rows, columns)


@torch.library.custom_op("automerge_test::ps_roi_align", mutates_args=())
def ps_roi_align(
    x: torch.Tensor, boxes: torch.Tensor, scale: float, rows: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    every = crops(x, torch.cat([boxes[:, :1], boxes[:, 1:] * scale], 1), rows, columns)
    channel = torch.arange(x.shape[1]).view(-1, rows, columns)
    return every.gather(1, channel.expand(len(boxes), *channel.shape)), channel.expand(
        len(boxes), *channel.shape
    ).clone()


@torch.library.custom_op("automerge_test::nms", mutates_args=())
def nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    return scores.argsort(descending=True)[:2]


@torch.library.custom_op("automerge_test::deform_conv2d", mutates_args=())
def deform_conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor,
    options: list[int],
    masked: bool,
) -> torch.Tensor:
    """Stride 1; ``options`` are the padding, the groups and the groups of offsets."""
    padding, groups, kinds = options
    n, _, rows, columns = offset.shape
    offset = offset.view(n, kinds, -1, 2, rows, columns)
    out = []
    for k in range(w.shape[2] * w.shape[3]):
        v = torch.arange(rows)[:, None] - padding + k // w.shape[3] + offset[:, :, k, 0]
        h = torch.arange(columns) - padding + k % w.shape[3] + offset[:, :, k, 1]
        parts = zip(x.chunk(kinds, 1), v.unbind(1), h.unbind(1), strict=True)
        taken = torch.cat([torch.cat([at(p[i : i + 1], a[i], b[i]) for i in range(n)]) for p, a, b in parts], 1)
        weight = mask.view(n, kinds, -1, rows, columns)[:, :, k] if masked else torch.ones(n, kinds, rows, columns)
        out.append(taken * weight.to(x.dtype).repeat_interleave(x.shape[1] // kinds, 1))
    kernel = w.flatten(2).unbind(2)
    return sum(
        nn.functional.conv2d(o, k[..., None, None], groups=groups) for o, k in zip(out, kernel, strict=True)
    ) + bias.view(-1, 1, 1)


@pytest.fixture(autouse=True)
def rules_of_torchvision() -> None:
    """The rules under the names of the operators above, which stand for those of torchvision."""
    for name in ("nms", "roi_align", "ps_roi_align"):
        register_rule(f"automerge_test::{name}", find_rule(f"torchvision::{name}"))
    rule = find_rule("torchvision::deform_conv2d")
    register_rule(
        "automerge_test::deform_conv2d",
        lambda context, x, w, offset, mask, bias, options, masked: rule(
            context, x, w, offset, mask, bias, 1, 1, options[0], options[0], 1, 1, *options[1:], masked
        ),
    )


class Detector(nn.Module):
    """Boxes are proposed from features, which are then cut out; with ``parts``, from a channel for every place."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        self.parts = parts
        self.stem, self.propose = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.hidden, self.head = nn.Linear(2 if parts else 32, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        found = self.propose(x[0].flatten(1).T).sigmoid()
        found = found[torch.ops.automerge_test.nms(found[:, :4], found[:, 4], 0.5)]
        low = found[:, :2] * 3
        boxes = torch.cat([torch.zeros(len(found), 1), low, low + 1 + found[:, 2:4]], 1)
        if self.parts:
            cut = torch.ops.automerge_test.ps_roi_align(x, boxes, 1.0, 2, 2)[0].mean((2, 3))
        else:
            cut = torch.ops.automerge_test.roi_align(x, boxes, 1.0, 2, 2).flatten(1)
        return self.head(self.hidden(cut).relu())


@pytest.mark.parametrize(("parts", "expected"), [(False, [6, 8]), (True, [2, 6])])
def test_channels_of_features_that_are_cut_out_by_boxes(parts: bool, expected: list[int]) -> None:
    assert sizes(Detector(parts), torch.randn(1, 3, 7, 7)) == expected
    assert not infer(Detector(parts), torch.randn(1, 3, 7, 7)).unruled


class Deformed(nn.Module):
    def __init__(self, groups: int, kinds: int, masked: bool) -> None:
        super().__init__()
        self.options, self.masked = [1, groups, kinds], masked
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(6, 2)
        self.offset, self.mask = nn.Conv2d(3, 18 * kinds, 1), nn.Conv2d(3, 9 * kinds, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8 // groups, 3, 3)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, offset, mask = self.stem(x), self.offset(x), self.mask(x).sigmoid()
        y = torch.ops.automerge_test.deform_conv2d(
            y,
            self.weight,
            offset,
            mask if self.masked else x.new_zeros(len(x), 1),
            self.bias,
            self.options,
            self.masked,
        )
        return self.head(y.relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("groups", "kinds", "masked", "expected"),
    [
        (1, 1, True, [6, 8]),
        (1, 1, False, [6, 8]),
        (2, 1, True, [2, 3, 3, 4, 4]),
        (1, 2, True, [2, 4, 4, 6]),
        (2, 2, True, [2, 3, 3, 4, 4]),
    ],
)
def test_a_convolution_at_places_that_are_computed(groups: int, kinds: int, masked: bool, expected: list[int]) -> None:
    assert sizes(Deformed(groups, kinds, masked), torch.randn(2, 3, 5, 5)) == expected


def test_positions_drawn_at_random() -> None:
    """As masked autoencoders keep some of the patches."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.places = nn.Linear(3, 8), nn.Parameter(torch.randn(6, 8))
            self.inner, self.head = nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = torch.multinomial(torch.ones(len(x), x.shape[1]), 3)
            x = (self.stem(x) + self.places)[torch.arange(len(x))[:, None], kept]
            return self.head(self.inner(x).relu()).mean(1)

    assert sizes(Kept(), torch.randn(2, 6, 3)) == [5, 8]
    assert not infer(Kept(), torch.randn(2, 6, 3)).unruled


def test_a_view_that_mixes_channels_with_pixels_is_tried_on_smaller_images() -> None:
    """Positions of channels viewed as channels of positions: the size of the image decides which of them meet."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.values, self.head = nn.Conv2d(3, 8, 17, 17), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = x + self.values(x).flatten(2).mT.sigmoid().reshape(x.shape)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Mixed().eval()
    with pytest.raises(AssertionError, match="no symmetry"):
        assert_sound(model, torch.randn(2, 3, 17, 17), infer(model, torch.randn(1, 3, 34, 34), verify=False))
    symmetry = infer(model, torch.randn(1, 3, 34, 34))
    assert_sound(model, torch.randn(2, 3, 17, 17), symmetry)
    assert any("not on inputs of the shapes" in note for note in symmetry.notes)


class Resized(nn.Module):
    """A table of positions by channels that is resized as an image is, to as many positions as there are tokens."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        self.how, self.table = how, nn.Parameter(torch.randn(1, 1, 9, 8))
        self.tokens, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        size = None if "scale_factor" in self.how else (tokens.shape[1], 8)
        table = nn.functional.interpolate(self.table, size=size, **self.how)
        h = self.tokens(tokens) + table[:, 0, : tokens.shape[1]]
        return self.head(nn.functional.layer_norm(h + self.mid(h).relu(), (8,)))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"mode": "bilinear"}, [8]),
        ({"mode": "bilinear", "align_corners": True}, [8]),
        ({"mode": "bicubic", "antialias": True}, [8]),
        ({"mode": "nearest"}, [8]),
        ({"mode": "nearest-exact"}, [8]),
        ({"mode": "bilinear", "scale_factor": (0.6, 1)}, [8]),
        ({"mode": "bilinear", "scale_factor": (0.6, 1.1)}, []),  # as many channels, but of other places
    ],
)
def test_an_axis_that_an_interpolation_leaves_as_it_is(how: dict[str, object], expected: list[int]) -> None:
    model, tokens = Resized(**how), torch.randint(11, (2, 5))
    assert sizes(model, tokens) == expected
    if "scale_factor" not in how:
        assert sizes(model, torch.randint(11, (2, 9))) == expected  # as many as the table has
        for length in (3, 9, 12):
            assert_sound(model, torch.randint(11, (2, length)), infer(model, tokens, verify=False))


@pytest.mark.parametrize("width", [5, 7])
def test_an_interpolation_to_the_same_size_keeps_its_places(width: int) -> None:
    """That the example has the size of the table may be by chance: other inputs mix the positions."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Linear(3, 20), nn.Linear(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            image = self.rows(x.mean((2, 3))).view(-1, 1, 4, 5)
            image = nn.functional.interpolate(image, size=x.shape[2:], mode="bilinear")
            return self.head(image.relu().flatten(2).sum(-1))

    assert infer(Places(), torch.randn(2, 3, 4, width), verify=False).generators() == []


@pytest.mark.parametrize("normed", [False, True])
def test_an_interpolation_to_as_many_places_as_units_keeps_their_order(normed: bool) -> None:
    """The example's width is the number of units by chance: what is computed before says nothing of the width asked for."""

    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Linear(3, 5), nn.Linear(1, 2)
            self.norm = nn.LayerNorm(5) if normed else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = self.norm(self.rows(x.mean((2, 3))))[:, None, None]
            row = nn.functional.interpolate(row, size=(1, x.shape[-1]), mode="bilinear")
            return self.head(row.relu().flatten(1).sum(-1, keepdim=True))

    for verify in (False, True):
        assert infer(Chance(), torch.randn(2, 3, 4, 5), verify=verify).generators() == []
