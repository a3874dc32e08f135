"""The README's example runs as it stands, and its commands are one line each."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.S)


def test_two_commands_of_one_line() -> None:
    first, second = blocks("bash")
    for command in (first, second):
        assert len(command.strip().splitlines()) == 1
        assert command.startswith("pip install -c constraints.txt -e ")
    assert "automerge demo" in first
    assert "pytest" in second


def test_the_example_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 18
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 groups" in done.stdout
    assert "Merged 3 models" in done.stdout


def test_links_point_at_files() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
