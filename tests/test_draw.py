"""Pictures of a symmetry."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import automerge
from automerge.cli import main
from zoo.models import ZOO


def drawn(symmetry: automerge.Symmetry, path: Path) -> str:
    text = symmetry.draw(path).read_text("utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    return text


@pytest.mark.parametrize("name", ["resnet", "vit", "lm"])
def test_a_valid_picture_with_a_colour_for_every_kind_of_group(name: str, tmp_path: Path) -> None:
    factory, args = ZOO[name]
    symmetry = automerge.infer(factory(), args, verify=False)
    text = drawn(symmetry, tmp_path / "groups.svg")
    assert len(set(re.findall(r"fill: (#[0-9a-f]{6})", text))) > 3


def test_no_groups(tmp_path: Path) -> None:
    drawn(automerge.infer(nn.Linear(3, 2), torch.randn(1, 3)), tmp_path / "none.svg")


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "groups.svg"
    path.write_text("mine")
    symmetry = automerge.infer(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(automerge.OutputError, match="force"):
        symmetry.draw(path)
    assert path.read_text() == "mine"
    symmetry.draw(path, force=True)
    assert path.read_text() != "mine"


def test_inspect_draws(tmp_path: Path) -> None:
    path = tmp_path / "groups.svg"
    assert main(["inspect", "zoo.models.mlp:build", "--input", "2,64", "--draw", str(path)]) == 0
    assert path.exists()
