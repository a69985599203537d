"""The distribution: it builds, installs without the sources beside it, and says one version in one place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import hetu

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and with the wheel that was built from it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder), cwd=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    source = next(folder.glob("hetu_attention-*/"))
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder), cwd=source)
    return folder


def test_the_sdist_has_what_the_tests_and_the_site_need(built: Path) -> None:
    source = next(built.glob("hetu_attention-*/"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml", "Makefile"):
        assert (source / name).is_file()
    assert (source / "docs" / "images" / "packed_batch.svg").is_file() and (source / "tests").is_dir()


def test_the_wheel_installs_and_runs_alone(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hetu").rglob("*.py")}
    assert {name for name in names if name.startswith("hetu/")} == sources | {"hetu/py.typed"}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    text = "import hetu, importlib.metadata as m; print(hetu.__file__, m.version('hetu-attention'), hetu.Mask.causal())"
    said = run(sys.executable, "-c", text, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert Path(said[0]).is_relative_to(tmp_path) and said[1] == hetu.__version__


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    heads = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == hetu.__version__  # what has changed in this release is told


def test_readme_names_the_distribution() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"pip install {PROJECT['name']}" in text and "`pip install hetu` is an unrelated project" in text


def test_every_extra_is_of_known_names() -> None:
    """An extra that names this distribution by another name would install somebody else's."""
    extras = PROJECT["optional-dependencies"]
    own = [wanted for wanteds in extras.values() for wanted in wanteds if wanted.startswith(("hetu", PROJECT["name"]))]
    for wanted in own:
        name, _, rest = wanted.partition("[")
        assert name == PROJECT["name"] and set(rest.rstrip("]").split(",")) <= set(extras)
    assert own
