"""Sequence lengths as symbols: exact integer expressions over sympy, with ranges, constraints and bindings."""

from hetu.symbols.analysis import magnitude_of
from hetu.symbols.binding import Binding, Equation, Solver, Source, check_leaf
from hetu.symbols.compile import compile_exprs
from hetu.symbols.constraint import Constraint, equal
from hetu.symbols.functions import ceil_div, maximum, minimum
from hetu.symbols.int_symbol import IntSymbol, as_size, as_symbol
from hetu.symbols.interval import Interval

__all__ = [
    "Binding",
    "Constraint",
    "Equation",
    "IntSymbol",
    "Interval",
    "Solver",
    "Source",
    "as_size",
    "as_symbol",
    "ceil_div",
    "check_leaf",
    "compile_exprs",
    "equal",
    "magnitude_of",
    "maximum",
    "minimum",
]
