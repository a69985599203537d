"""What users are shown runs: the examples, and the code of README and docs with the output printed under it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from support.longer import LONGER

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# A python block, and the text block right under it, if any: what the code prints. test_docs.py runs those with prompts.
BLOCK = re.compile(
    r"^```python\n(?!>>>)(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def run_script(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(text: str) -> list[tuple[str, str | None]]:
    return [(match["code"], match["output"]) for match in BLOCK.finditer(text)]


SHOWN = [
    pytest.param(code, output, id=f"{page.name}-{i}")
    for page in (README, *sorted((ROOT / "docs").glob("*.md")))
    for i, (code, output) in enumerate(blocks(page.read_text(encoding="utf-8")))
]


@dataclass(frozen=True)
class Job:
    """What ``support/scripts.py`` runs.

    Attributes:
        script: Its path and arguments.
        out: File of what it prints.
        ranks: Processes that run it side by side, as torchrun would start them; 0 for one without others.
        imports: Modules that take long, which are imported once for all scripts.
    """

    script: list[str]
    out: str
    ranks: int = 0
    imports: tuple[str, ...] = ()


class Scripts:
    """Runs scripts, each in forks of one process, which have imported what takes long."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._out = process, folder / "out"

    def run(self, *script: str, ranks: int = 0, imports: tuple[str, ...] = ()) -> str:
        """What a script prints, or its first rank."""
        assert self._process.stdin and self._process.stdout
        job = Job(list(script), str(self._out), ranks, imports)
        print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
        exit_codes = json.loads(self._process.stdout.readline())
        files = [f"{self._out}.{rank}" if rank else str(self._out) for rank in range(max(ranks, 1))]
        printed, errors = ([Path(f"{name}{end}").read_text(encoding="utf-8") for name in files] for end in ("", ".err"))
        assert not any(exit_codes), "\n".join([*printed, *errors])
        return printed[0]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    command = [sys.executable, "tests/support/scripts.py"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as process:
        yield Scripts(process, tmp_path_factory.mktemp("scripts"))


@pytest.mark.parametrize(("code", "output"), SHOWN)
def test_code_prints_what_it_says(scripts: Scripts, code: str, output: str | None, tmp_path: Path) -> None:
    script = tmp_path / "shown.py"
    script.write_text(code, encoding="utf-8")
    printed = scripts.run(str(script))
    if output is not None:
        assert printed.split() == output.split()


def test_blocks_are_found_with_their_output() -> None:
    text = "```python\na\n```\n\n```text\n1\n```\n\n```python\nb\n```\nwords\n```text\n2\n```\n"
    assert blocks(text) == [("a\n", "1\n"), ("b\n", None)]
    assert any(output for _, output in blocks(README.read_text(encoding="utf-8")))


def test_documents(scripts: Scripts) -> None:
    printed = scripts.run("examples/documents.py", "--packs", "4", "--tokens", "2048" if LONGER > 1 else "1024")
    for name in ("one pipeline", "two pipelines", "three of unequal lengths", "six in three context groups"):
        assert f"{name}, 1 pack" in printed


SMALL = [
    "--tokens=160",
    "--longest=80",
    "--layers=1",
    "--width=32",
    "--heads=2",
    "--kv-heads=1",
    "--head-dim=16",
    "--hidden=32",
]


def test_train_lm(scripts: Scripts, tmp_path: Path) -> None:
    options = [*SMALL, "--plot", str(tmp_path / "loss.png"), "--checkpoint", str(tmp_path / "lm.safetensors")]
    whole = scripts.run("examples/train_lm.py", *options, "--steps", "5")
    assert "5 steps in" in whole
    again = scripts.run("examples/train_lm.py", *options, "--steps", "5", "--recompute", "--zero", "3")
    means = re.compile(r"loss \S+ at the first step, \S+ over the last 5")
    assert means.findall(again) == means.findall(whole) != []
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    resumed = scripts.run(
        "examples/train_lm.py", *options, "--steps", "6", "--resume", "--micro-batches", "2", "--zero", "1"
    )
    assert "resumed after 5 steps" in resumed
    assert "1 steps in" in resumed


LLAMA = "transformers.models.llama.modeling_llama"


def torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def test_train_hf(scripts: Scripts, tmp_path: Path) -> None:
    """The losses are the same however ranks are split, also where a run goes on with another split: under torchrun."""
    pytest.importorskip("transformers")

    def train(
        ranks: int, cp: int, losses: Path, *options: str, by_torchrun: bool = LONGER > 1
    ) -> tuple[str, list[float]]:
        sizes = ["--tokens=200", "--longest=64", "--layers=1", "--width=32", "--heads=2", "--kv-heads=1", "--hidden=32"]
        script = ["examples/train_hf.py", "--steps=5", f"--cp={cp}", f"--losses={losses}", *sizes, *options]
        if by_torchrun:
            printed = run_script(*torchrun(ranks), *script)
        else:
            printed = scripts.run(*script, ranks=ranks, imports=(LLAMA,))
        return printed, json.loads(losses.read_text(encoding="utf-8"))

    printed, wanted = train(2, 2, tmp_path / "one.json", "--recompute")
    assert "1 x 2 ranks" in printed
    checkpoint = f"--checkpoint={tmp_path / 'checkpoint'}"
    printed, first = train(4, 2, tmp_path / "two.json", checkpoint, "--stop=3", "--split=sym", "--method=ring")
    assert "2 x 2 ranks" in printed
    printed, found = train(2, 1, tmp_path / "three.json", checkpoint, by_torchrun=True)
    assert "2 x 1 ranks" in printed
    assert "resumed after 3 steps" in printed
    assert found[:3] == first
    assert found == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] < wanted[0] - 0.1


def test_hf_trainer(scripts: Scripts, tmp_path: Path) -> None:
    """The Trainer of transformers gives one process's losses on two."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    script = ["examples/hf_trainer.py", "--steps=4", "--tokens=200", f"--output={tmp_path}"]
    imports = LLAMA, "transformers.trainer"
    scripts.run(*script, f"--losses={tmp_path / 'one.json'}", imports=imports)
    both = [*script, f"--losses={tmp_path / 'two.json'}"]
    if LONGER > 1:
        run_script(*torchrun(2), *both)
    else:
        scripts.run(*both, ranks=2, imports=imports)
    one, two = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("one.json", "two.json"))
    assert two == pytest.approx(one, rel=1e-5)
    assert len(one) == 4 and one[-1] < one[0]
