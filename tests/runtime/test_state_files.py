"""Files of states: what is written comes back, damage is seen, and the file's place is left as it was."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import socket
import stat
import subprocess
import sys
import threading
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.states import Trained, is_same, places, replaced
from torch.optim import lr_scheduler

import hetu
from hetu.runtime import state_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


def saved(path: Path) -> dict[str, Any]:
    """The state of a trained model, which is written."""
    model = Trained(hetu.optim.AdamW(lr=np.float32(0.1), schedule=functools.partial(lr_scheduler.StepLR, step_size=2)))
    model.step()
    model.step(run_level="grad")
    hetu.save(model.graph, path)
    return model.state()


Pair = namedtuple("Pair", "a b")
COME_BACK: dict[str, Any] = {
    "keys": {(1, ("a", None)): 1, None: 2, True: 3, 1.5: 4, -7: 5, "tensor": 6, "": 7},
    "lists and tuples": [(), [], (1, [2, (3,)]), torch.Size([1, 2]), Pair(1, 2)],
    "dicts": {"counter": Counter("aab"), "ordered": OrderedDict(b=1, a=(2,)), "dict": {"int": "0x1", "dict": {}}},
    "ints": [0, -1, 2**63, -(2**64), 10**5000, True, False],
    "floats": [0.1, 1e-320, 1.8e308, -math.inf],
    "strings": ["", "\0", "\ud800", '"\\', "²"],
    "numbers of numpy": [np.int64(3), np.float32(0.1), np.bool_(True), np.array(7), np.float16(0.5)],
    "tensors": [torch.tensor(1.0), torch.ones(0, 3), torch.arange(6).view(2, 3).t(), torch.ones(1).expand(3)],
    "dtypes": [torch.ones(2).to(d) for d in (torch.bfloat16, torch.bool, torch.uint8, torch.float16, torch.float64)],
    "lazy ones": [torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).imag, torch.nn.Parameter(torch.ones(2))],
    "one twice": [torch.ones(2)] * 2,
}


@pytest.mark.parametrize("what", COME_BACK)
def test_what_is_saved_comes_back(what: str, path: Path) -> None:
    value = COME_BACK[what]
    hetu.save({"value": value, what: 1}, path)
    back = hetu.load(path)
    assert back[what] == 1
    assert alike(back["value"], value)


def alike(back: Any, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return type(back) is torch.Tensor and back.dtype == value.dtype and torch.equal(back, value.detach())
    if isinstance(value, dict):
        return (
            type(back) is type(value) and back.keys() == value.keys() and all(alike(back[k], value[k]) for k in value)
        )
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return type(back) is kind and len(back) == len(value) and all(map(alike, back, value))
    return type(back) in (int, float, bool, str, type(None)) and bool(back == value)


def endless() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = [made]
    return made


REFUSED: dict[str, Any] = {
    "a function": lambda: None,
    "bytes": b"x",
    "a key of bytes": {b"x": 1},
    "a tensor as a key": {torch.ones(1): 1},
    "a complex number": 1j,
    "a set": {1},
    "an array": np.ones(2),
    "a masked array": np.ma.masked_array([1]),
    "a date": np.datetime64("2020"),
    "itself": endless(),
    "a sparse tensor": torch.ones(2).to_sparse(),
    "a tensor without values": torch.ones(2, device="meta"),
    "a dtype that no file has": torch.ones(2, dtype=torch.complex128),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_file_can_hold_is_refused(what: str, path: Path) -> None:
    hetu.save({"old": 1}, path)
    with pytest.raises(hetu.HetuError, match=r"\[save\]") as caught:
        hetu.save({"value": REFUSED[what]}, path)
    assert "test_state_files.py:" in str(caught.value)
    assert hetu.load(path) == {"old": 1}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("what", [[1], None, "x", 5, torch.ones(1)])
def test_only_a_dict_or_a_graph_is_saved(what: Any, path: Path) -> None:
    with pytest.raises(hetu.HetuError, match="expected what to be a dict of a graph's state"):
        hetu.save(what, path)


def test_every_changed_bit_is_seen(path: Path) -> None:
    saved(path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(600):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(hetu.HetuError):
            hetu.load(path)
    for size in range(0, len(whole), 41):
        for content in (whole[:size], whole + bytes(size + 1), whole[:size] + draw.randbytes(9) + whole[size + 9 :]):
            path.write_bytes(content)
            with pytest.raises(hetu.HetuError):
                hetu.load(path)


def test_a_file_without_its_checksum_is_refused(path: Path) -> None:
    saved(path)
    with safetensors.safe_open(path, framework="pt") as file:
        text = file.metadata()["hetu"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"hetu": text})
    with pytest.raises(hetu.HetuError, match="no whole safetensors file"):
        hetu.load(path)


def first_version(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A state as files of the first version have it."""
    if isinstance(value, torch.Tensor):
        tensors[key := f"t{len(tensors)}"] = value
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[key, first_version(item, tensors)] for key, item in value.items()]}
    return [first_version(item, tensors) for item in value] if isinstance(value, (list, tuple)) else value


def test_files_of_the_first_version_are_read_and_their_damage_is_an_error(path: Path) -> None:
    state, tensors = saved(path), dict[str, torch.Tensor]()
    tree = first_version(state, tensors)
    safetensors.torch.save_file(tensors, path, metadata={"hetu": json.dumps(tree)})
    model = Trained(hetu.optim.AdamW(schedule=functools.partial(lr_scheduler.StepLR, step_size=2)))
    model.graph.load_state_dict(hetu.load(path))
    assert is_same(model.state(), state)
    for place in places(tree):
        for other in (5, [], {}, [[1]], None, "t9"):
            safetensors.torch.save_file(tensors, path, metadata={"hetu": json.dumps(replaced(tree, place, other))})
            try:
                hetu.load(path)
            except hetu.HetuError as error:
                assert "test_state_files.py:" in str(error)  # noqa: PT017 - some of it is taken


def test_a_later_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "VERSION", 3)
    hetu.save({}, path)
    monkeypatch.undo()
    with pytest.raises(hetu.HetuError, match="version 3, expected 2"):
        hetu.load(path)


@pytest.mark.parametrize("size", [0, None])
def test_what_was_loaded_does_not_change_with_the_file(size: int | None, path: Path) -> None:
    hetu.save({"w": torch.ones(100_000)}, path)
    state = hetu.load(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * os.path.getsize(path))
        file.truncate(size)
    assert torch.equal(state["w"], torch.ones(100_000))
    state["w"].add_(1)


# Places


def test_modes_are_kept_and_new_files_have_the_usual_one(path: Path) -> None:
    (path.parent / "plain").touch()
    hetu.save({}, path)
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        hetu.save({}, path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_links_are_followed(path: Path) -> None:
    link, dangling = path.parent / "link", path.parent / "dangling"
    link.symlink_to(path.name)
    dangling.symlink_to("later")
    hetu.save({"step": 1}, path)
    for place, target in ((link, path), (dangling, path.parent / "later")):
        hetu.save({"step": 2}, place)
        assert place.is_symlink() and not target.is_symlink()
        assert hetu.load(target) == hetu.load(place) == {"step": 2}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    for place in (tmp_path, tmp_path / "pipe", tmp_path / "socket", Path("/dev/null"), Path("/dev/zero")):
        for action in (functools.partial(hetu.save, {}, place), functools.partial(hetu.load, place)):
            with pytest.raises(hetu.HetuError, match="is no file"):
                action()
    listener.close()


@pytest.mark.parametrize("place", [None, 5, b"x", ["x"], "a\0b"])
def test_what_is_no_path_is_refused(place: Any) -> None:
    for action in (functools.partial(hetu.save, {}, place), functools.partial(hetu.load, place)):
        with pytest.raises(hetu.HetuError, match="expected path to be a path"):
            action()


def test_names_of_any_length(tmp_path: Path) -> None:
    hetu.save({"step": 1}, tmp_path / ("n" * 255))
    assert hetu.load(tmp_path / ("n" * 255)) == {"step": 1}


def test_errors_name_the_file_that_the_user_named(tmp_path: Path) -> None:
    for place in (tmp_path / "missing" / "x", tmp_path / ("n" * 256)):
        with pytest.raises(OSError, match=str(place)) as caught:
            hetu.save({}, place)
        assert caught.value.filename == str(place)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import safetensors.torch, hetu
write = safetensors.torch.save_file
def killed(*args, **kwargs):
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = killed
hetu.save({"step": 2}, sys.argv[1])
"""


def test_what_a_killed_save_left_is_removed_by_the_next(path: Path) -> None:
    hetu.save({"step": 1}, path)
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    assert len(os.listdir(path.parent)) == 2
    assert hetu.load(path) == {"step": 1}
    hetu.save({}, path.parent / "other")
    assert sorted(os.listdir(path.parent)) == ["other", path.name]


def test_saves_at_the_same_time_leave_each_other_alone(path: Path) -> None:
    failures: list[Exception] = []

    def work(place: Path) -> None:
        try:
            for step in range(15):
                hetu.save({"step": step}, place)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(path.parent / name,)) for name in "aabb"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(os.listdir(path.parent)) == ["a", "b"]
    assert hetu.load(path.parent / "a") == {"step": 14}


FULL = """
import resource, signal, sys
import torch, hetu
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    hetu.save({"w": torch.ones(100_000)}, sys.argv[1])
except (hetu.HetuError, OSError) as error:
    print("refused" if sys.argv[1] in str(error) else error)
"""


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    hetu.save({"step": 1}, path)
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["refused"], done.stderr
    assert hetu.load(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]
