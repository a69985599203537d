"""Names that can be found: those that hetu has, and those of the other Hetu."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys

import pytest

import hetu
from hetu.ops.common.other_names import OTHER_HETU, TORCHS


def test_dir_has_every_public_name_and_no_other() -> None:
    text = "import hetu; print(*(n for n in dir(hetu) if n[0] != '_'))"  # in a process in which nothing was used yet
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == {*hetu.__all__, "functional", "testing"}
    assert all(hasattr(hetu, name) for name in dir(hetu))
    assert {"__version__", "__doc__"} <= set(dir(hetu))


def test_help_of_graph_shows_what_it_takes() -> None:
    assert inspect.signature(hetu.graph) == inspect.signature(hetu.Graph)
    assert {"num_strategy", "device"} <= set(inspect.signature(hetu.graph).parameters)
    shown = pydoc.plain(pydoc.render_doc(hetu.graph))
    for word in ("num_strategy", '"eager"', "with hetu.graph", "load_parameters", "find(self, name"):
        assert word in shown


def test_dir_of_a_tensor_has_the_ops() -> None:
    assert {"reshape", "sum", "permute", "masked_fill", "numpy", "topk", "T"} <= set(dir(hetu.Tensor))
    assert "as ``torch.amax``" in (inspect.getdoc(hetu.Tensor.max) or "")
    assert set(hetu.nn.__all__) <= set(dir(hetu.nn))


@pytest.mark.parametrize("name", sorted(OTHER_HETU))
def test_a_name_of_the_other_hetu_says_what_it_is_called_here(name: str) -> None:
    assert name not in dir(hetu)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; that name is of another Hetu: use ") as caught:
        getattr(hetu, name)
    for word in str(caught.value).split("use ", 1)[1].replace("'s", "").replace("(", " ").replace(",", " ").split():
        if word.startswith("hetu."):  # what is advised is there
            found: object = hetu
            for part in word.split(".")[1:]:
                found = getattr(found, part)


@pytest.mark.parametrize("name", sorted(TORCHS))
def test_a_name_of_torch_says_what_it_is_called_here(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; use ") as caught:
        getattr(hetu, name)
    for word in str(caught.value).split("use ", 1)[1].split():
        if word.startswith(("hetu.", "x.")):  # what is advised is there
            found: object = hetu if word.startswith("hetu.") else hetu.Tensor
            for part in word.split(".")[1:]:
                found = getattr(found, part)


@pytest.mark.parametrize(
    ("name", "why", "instead"),
    [
        ("add_", "in place", "hetu.add"),
        ("relu_", "in place", "hetu.relu"),
        ("neg_", "in place", "-x"),
        ("matmul_op", "of another Hetu", "hetu.matmul"),
        ("softmaxcrossentropy_sparse_op", "of another Hetu", "hetu.cross_entropy"),
    ],
)
def test_forms_of_ops_have_another(name: str, why: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"{why}: use {instead}$"):
        getattr(hetu, name)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("HtMultiQKVColumnParallelLinear", "hetu.nn.Linear, which knows no tensor parallelism"),
        ("HtMultiVocabParallelEmbedding", "hetu.nn.Embedding, which knows no tensor parallelism"),
        ("HtParallelRMSNorm", "hetu.nn.RMSNorm, which knows no tensor parallelism"),
        ("ParallelLayerNorm", "hetu.layer_norm, which knows no tensor parallelism"),
        ("ModuleList", "a list of modules"),
        ("Parameter", "hetu.parameter"),
    ],
)
def test_modules_of_others_say_what_they_are_called_here(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"'hetu.nn' has no attribute '{name}'; use {instead}$"):
        getattr(hetu.nn, name)
    with pytest.raises(AttributeError, match=r"no attribute 'HtNonsense'$"):
        _ = hetu.nn.HtNonsense


def test_a_name_of_nobody_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = hetu.nonsense
    assert getattr(hetu, "nonsense", None) is None
