"""The documents of the examples: the source files of Python's standard library, a byte a token, packed."""

from __future__ import annotations

import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np

LONGEST = 8192  # tokens of a document; longer files are cut into pieces
VOCABULARY = 256


def read_files() -> list[np.ndarray]:
    """The source files of Python's standard library, a byte a token."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]


def cut(files: list[np.ndarray], longest: int = LONGEST) -> list[np.ndarray]:
    """Cuts long files into documents of at most ``longest`` tokens, and shuffles them the same way on every run."""
    pieces = [file[i : i + longest] for file in files for i in range(0, max(len(file), 1), longest)]
    return [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]


def make_packs(documents: list[np.ndarray], budget: int, count: int) -> list[list[np.ndarray]]:
    """Fills ``count`` packs: each document goes to the emptiest. In a pack the short documents come first."""
    packs: list[list[np.ndarray]] = [[] for _ in range(count)]
    room = np.full(count, budget)
    for document in documents:
        emptiest = room.argmax()
        if len(document) <= room[emptiest]:
            packs[emptiest].append(document)
            room[emptiest] -= len(document)
    return [sorted(pack, key=len) for pack in packs]


def fill(documents: list[np.ndarray], tokens: int) -> list[list[np.ndarray]]:
    """All documents in their order, in packs of at most ``tokens`` tokens; none may be longer than that."""
    packs: list[list[np.ndarray]] = []
    room = 0
    for document in documents:
        if len(document) > room or not packs:
            packs.append([])
            room = tokens
        packs[-1].append(document)
        room -= len(document)
    return packs


def deal(documents: list[np.ndarray], shares: tuple[int, ...]) -> list[list[np.ndarray]]:
    """Cuts a pack into consecutive lists of whole documents, one a context group, near these shares of its tokens."""
    ends = np.cumsum([0, *map(len, documents)])
    wanted = np.cumsum((0, *shares)) / sum(shares) * ends[-1]
    cuts = [int(np.abs(ends - place).argmin()) for place in wanted[:-1]] + [len(documents)]
    return [documents[start:stop] for start, stop in pairwise(cuts)]
