"""Arguments: what each converter takes, and that every public callable refuses what it can't read, by hetu's errors."""

from __future__ import annotations

import inspect
import random
import re
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hostile import HOSTILE, Call, Case, op_calls, other_calls, run_calls
from support.hostile_planning import planning_calls
from support.longer import LONGER

import hetu
from hetu import arguments
from hetu.graph import Role
from hetu.ops import PUBLIC


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is saved under a hostile name is saved there."""
    monkeypatch.chdir(tmp_path)


SYMBOLIC = {"symbol", "expression"}
MAY_BE_RIGHT = {"graph tensor", "list", "range", "array", "empty list", "empty array"}


def escapes(name: str, call: Call, changed: dict[str, str], case: Case) -> str | None:
    """What is wrong with how a call takes hostile values; None if nothing is."""
    function, good = call
    hostile = {parameter: HOSTILE[kind]() for parameter, kind in changed.items()}
    try:
        with case.graph:
            result = function(**{**good, **hostile})
        if isinstance(result, (hetu.Tensor, list)) and not name.startswith(("Graph.", "a ", "Layout.")):
            run(case, result)
    except hetu.HetuError as error:
        text = str(error)
        if not any(named(text, parameter, kind, good) for parameter, kind in changed.items()):
            return f"{name}({changed}) doesn't name it: {text.splitlines()[0][:200]}"
        if "where:" in text and not re.search(r"where:  (test_arguments|hostile|hostile_planning)\.py", text):
            return f"{name}({changed}) names another line: {text[:300]}"
    except OSError:  # of files
        return None
    except Exception as error:
        return f"{name}({changed}): {type(error).__name__}: {str(error)[:150]}"
    return None


def named(text: str, parameter: str, kind: str, good: dict[str, Any]) -> bool:
    """Whether an error says which argument is wrong."""
    if kind in SYMBOLIC and "stranger" in text:  # that nothing binds
        return True
    if "too large for any machine" in text:  # which it is together with others
        return True
    if kind == "graph tensor" and "another graph" in text:  # than the others, which it may be told of
        return True
    # What is right by itself may not fit the other arguments, and then they don't fit it.
    # So is any number of classes, but the ids.
    names = {parameter, *good} if kind in MAY_BE_RIGHT or parameter == "num_classes" else {parameter}
    return any(re.search(rf"\b{re.escape(name.rstrip('_'))}\b", text) for name in names)


def run(case: Case, result: Any) -> None:
    """Runs what a call built, as far as it is the graph's."""
    tensors = [item for item in (result if isinstance(result, list) else [result]) if isinstance(item, hetu.Tensor)]
    if any(item.graph is not case.graph or item.op.role is not Role.COMPUTATION for item in tensors):
        return
    try:
        case.graph.run(tensors, case.feeds)
    except (RuntimeError, hetu.HetuError) as error:
        if "can't allocate memory" not in str(error):  # another machine may have it
            raise


def walk(
    calls: Callable[[Case], Iterator[tuple[str, Call]]], count: int | None = None, is_anew: bool = True
) -> tuple[int, list[str]]:
    """Every callable with hostile values for each parameter: how many calls were made, and what is wrong.

    Args:
        calls: The callables.
        count: How many values are drawn for a parameter; None for all of them.
        is_anew: Whether each callable gets a graph of its own.
    """
    made, wrong, draw = 0, list[str](), random.Random(18)
    kinds = list(HOSTILE)
    case = Case.make()
    own = dict(calls(case))
    for name in list(own):
        if is_anew:
            case = Case.make()
            own = dict(calls(case))
        function, good = own[name]
        for parameter in good:
            for kind in kinds if count is None else draw.sample(kinds, count):
                made += 1
                wrong += filter(None, [escapes(name, (function, good), {parameter: kind}, case)])
    return made, wrong


@pytest.fixture(autouse=True)
def _in_little_memory() -> Iterator[None]:
    """2**31 is a size that a large machine has: nothing gets more than 4 GiB, and so nothing takes all there is."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hostile values are names of files, and states are saved there."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("calls", [op_calls, other_calls, run_calls])
def test_nothing_but_hetus_own_errors_comes_out(calls: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's and torch's, of what the values are
        made, wrong = walk(calls)
    assert made > 800
    assert not wrong, report(wrong, made)


def test_nothing_else_comes_out_of_what_plans_and_tests() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, wrong = walk(planning_calls, 5 if LONGER == 1 else None, is_anew=False)
    assert made > 500
    assert not wrong, report(wrong, made)


def test_nothing_else_comes_out_of_several_hostile_values_either() -> None:
    draw, made, wrong = random.Random(18), 1000 * LONGER, list[str]()
    kinds = list(HOSTILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(made):
            if number % 100 == 0:
                case = Case.make()
                calls = [*op_calls(case), *other_calls(case), *run_calls(case)]
            name, call = draw.choice(calls)
            parameters = draw.sample(list(call[1]), min(len(call[1]), draw.randint(2, 4)))
            changed = {parameter: draw.choice(kinds) for parameter in parameters}
            wrong += filter(None, [escapes(name, call, changed, case)])
    assert not wrong, report(wrong, made)


def report(wrong: list[str], made: int) -> str:
    return f"{len(wrong)} of {made} calls:\n" + "\n".join(wrong[:200])


def test_names_of_nodes_are_strings() -> None:
    for op, _ in op_calls(Case.make()):
        if op == "token_mean_loss":  # it makes several nodes
            continue
        case = Case.make()
        function, good = dict(op_calls(case))[op]
        for make in HOSTILE.values():
            value = make()
            with case.graph:
                if value is None or isinstance(value, str):
                    function(**good, name=value)
                    continue
                with pytest.raises(hetu.HetuError, match="expected name to be a string"):
                    function(**good, name=value)


def test_every_op_and_each_of_its_parameters_is_walked() -> None:
    calls = dict(op_calls(Case.make()))
    assert set(calls) == set(PUBLIC)
    for name, (function, good) in calls.items():
        parameters = set(inspect.signature(function).parameters) - {"name"}
        assert set(good) == parameters, name


def test_everything_else_that_users_call_is_walked() -> None:
    case = Case.make()
    walked = {name for name, _ in (*op_calls(case), *other_calls(case), *run_calls(case))}
    skipped = {
        *("BatchPlan", "Binding", "Constraint", "DType", "Graph", "Layout", "Mask", "Tensor", "tensor"),
        "bool",  # users get these
        *("init_distributed", "shutdown_distributed", "gather_shards", "trace", "optim", "nn"),
        "calibrate",  # it measures for seconds
    }
    errors = {name for name in hetu.__all__ if isinstance(getattr(hetu, name), type) and name.endswith("Error")}
    dtypes = {name for name in hetu.__all__ if isinstance(getattr(hetu, name), hetu.DType)}
    assert set(hetu.__all__) <= walked | skipped | errors | dtypes


@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[(3, 3), (0.5, 0.5), (True, True), (np.int8(3), 3), (np.float16(0.5), 0.5), (np.True_, True)],
        *[(np.array(3), 3), (np.array(0.5), 0.5), (torch.tensor(3), 3), (torch.tensor(0.5).half(), 0.5)],
        *[(torch.tensor(False), False), (np.longdouble(0.5), 0.5), (2**70, 2**70), (np.uint64(2**64 - 1), 2**64 - 1)],
        *[("3", None), (1j, None), (None, None), ([3], None), (np.array([3]), None), (torch.tensor([3]), None)],
        *[(np.ma.masked, None), (np.timedelta64(3, "ns"), None), (torch.ones((), device="meta"), None)],
        *[(np.complex64(1), None), (np.str_("3"), None)],
    ],
)
def test_what_a_number_is(value: Any, number: Any) -> None:
    found = arguments.number_of(value)
    assert found == number
    assert type(found) is type(number)
    whole = number if type(number) is int else None
    assert arguments.int_of(value) == whole
    if isinstance(number, bool):
        assert arguments.flag(value, "flag") is number
    else:
        with pytest.raises(hetu.HetuError, match="expected flag to be a bool"):
            arguments.flag(value, "flag")
    if number is None or isinstance(number, bool):
        with pytest.raises(hetu.HetuError, match="expected real to be a finite number"):
            arguments.real(value, "real")
    else:
        assert arguments.real(value, "real") == float(number)


@pytest.mark.parametrize(
    ("value", "items"),
    [
        *[([1, 2], [1, 2]), ((1, 2), [1, 2]), (range(2), [0, 1]), ({1: "a", 2: "b"}.values(), ["a", "b"])],
        *[(np.array([1, 2]), [1, 2]), (torch.tensor([1, 2]), [1, 2]), (np.ones((1, 2)), [[1.0, 1.0]])],
        *[("ab", None), (b"ab", None), ({1, 2}, None), ({1: 2}, None), (iter([1]), None), (map(abs, [1]), None)],
        *[(np.array(1), None), (torch.tensor(1), None), (None, None), (3, None)],
        *[(np.ma.masked_array([1, 2], [0, 1]), None), (torch.ones(2, device="meta"), None)],
    ],
)
def test_what_a_sequence_is(value: Any, items: Any) -> None:
    if items is not None:
        assert arguments.items(value, "xs") == items
        return
    with pytest.raises(hetu.HetuError, match="expected xs to be a list"):
        arguments.items(value, "xs")


def test_integers_keep_python_ints_and_name_the_entry() -> None:
    assert arguments.integers((2, 3), "xs") == (2, 3)
    assert [type(x) for x in arguments.integers(np.array([2, 3], np.int8), "xs", least=2)] == [int, int]
    for wrong in ((2, True), [2, 1.0], (2, -1), [2, None], np.array([2.0, 1.0])):
        with pytest.raises(hetu.ShapeError, match=r"expected xs\[[01]\] to be "):
            arguments.integers(wrong, "xs", least=0, error=hetu.ShapeError)


def test_devices_are_named_whether_they_are_there_or_not() -> None:
    assert [arguments.device(x) for x in ("cpu", "cuda:7", torch.device("cuda", 3), 0, np.int64(2), None)] == [
        *("cpu", "cuda:7", "cuda:3", "cuda:0", "cuda:2", None)
    ]
    for wrong in ("gpu", "mps", "cuda:", "cuda:01", "cuda:-1", "CUDA", " cpu", torch.device("meta"), -1, 2**63, True):
        with pytest.raises(hetu.HetuError, match="expected device to be a device"):
            arguments.device(wrong)


def test_an_error_shows_a_long_value_in_part_and_a_broken_one_by_its_type() -> None:
    assert len(arguments.shown("x" * 1000)) < 200
    assert arguments.shown(10**5000) == "an int of 16610 bits"
    assert arguments.shown(HOSTILE["broken"]()) == "<Broken>"
