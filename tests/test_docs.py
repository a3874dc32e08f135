"""The pages' examples run as they stand, and every public name has a place in the reference."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import automerge
from automerge import cli, testing
from zoo.models import mlp

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the demo leaves behind, untrained."""
    (tmp_path / "demo").mkdir()
    for seed in range(3):
        torch.manual_seed(seed)
        automerge.save_state_dict(tmp_path / "demo" / f"mlp-{seed}.safetensors", mlp.build().state_dict())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    return tmp_path


def test_getting_started_s_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _ = blocks("getting-started.md", "python")
    (folder / "my_data.py").write_text(data)
    commands = [block.split() for block in blocks("getting-started.md", "bash") if block.startswith("automerge ")]
    assert [c[1] for c in commands] == ["demo", "inspect", "verify", "merge", "compare"]
    for command in commands[1:]:
        assert cli.main(command[1:]) == 0
    assert "channels by" in capsys.readouterr().out  # what the repair did, layer by layer
    assert set(automerge.load_state_dict("merged.safetensors")) == set(mlp.build().state_dict())


def test_getting_started_s_python_runs(folder: Path) -> None:
    _, code = blocks("getting-started.md", "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Merged 3 models" in done.stdout
    assert (folder / "again.safetensors").is_file()


def test_the_tests_of_the_testing_page_pass() -> None:
    (code,) = blocks("reference/testing.md", "python")
    names: dict[str, Callable[[], None]] = {}
    torch.manual_seed(0)
    exec(compile(code, "testing.md", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def documented(page: str = "**/*.md") -> set[str]:
    """What the pages document by `:::`: whole modules by their public names, and single names."""
    lines = [line for path in DOCS.glob(page) for line in path.read_text(encoding="utf-8").splitlines()]
    out: set[str] = set()
    for target in (line.removeprefix("::: ") for line in lines if line.startswith("::: ")):
        if importlib.util.find_spec(target.rpartition(".")[0]) and not _is_module(target):
            out.add(target.rpartition(".")[2])
            continue
        module = importlib.import_module(target)
        own = (n for n, v in vars(module).items() if getattr(v, "__module__", "") == target and n[0] != "_")
        out.update(getattr(module, "__all__", own))
    return out


def _is_module(target: str) -> bool:
    try:
        return importlib.util.find_spec(target) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", [n for n in automerge.__all__ if n != "__version__"])
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert name in documented()


@pytest.mark.parametrize("name", testing.__all__)
def test_every_name_of_the_testing_module_is_in_its_reference(name: str) -> None:
    assert name in documented("reference/testing.md")


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [p for p in sorted(DOCS.rglob("*.md")) if f": {p.relative_to(DOCS)}\n" not in text] == []
