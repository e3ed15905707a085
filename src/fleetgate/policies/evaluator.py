"""Adapter of the CEL library: compile an expression, evaluate it with plain values, give the reason of a failure."""

import importlib.machinery
import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol


class EvaluationFailed(Exception):
    """An expression could not be evaluated with these values. The reason never contains a value that a client sent."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Program(Protocol):
    """A compiled expression of the library."""

    def execute(self, context: Mapping[str, object]) -> object:
        """The value of the expression."""


_REASONS: dict[type[Exception], str] = {
    TypeError: "a value has another type than the expression needs",
    ValueError: "a value cannot be passed to CEL",
    RuntimeError: "a value cannot be converted or has another type than the expression needs",
    OverflowError: "a number is too large",
    ZeroDivisionError: "division by zero",
    KeyError: "an entry is missing",
}
_ERRORS = tuple(_REASONS)


@cache
def _library() -> Any:
    """The extension module of `common-expression-language`, loaded without its package.

    The package also imports its command line with typer, rich and prompt_toolkit: 25 MB and 0.3 s in every worker.
    """
    package = importlib.util.find_spec("cel")
    if package is None:
        raise ModuleNotFoundError("policies need the package common-expression-language; install it", name="cel")
    spec = importlib.machinery.PathFinder.find_spec("cel.cel", package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("common-expression-language has no module cel.cel; install 0.10", name="cel.cel")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_expression(text: str) -> Program:
    """Compile an expression. Raises: `ValueError` if it is not valid CEL. Cost: about 20 µs."""
    program: Program = _library().compile(text)
    return program


def evaluate(program: Program, values: Mapping[str, object]) -> object:
    """The value of an expression.

    Raises: `EvaluationFailed`.
    Cost: 0.3 µs, and 2 µs more for each text among the values.
    """
    try:
        return program.execute(values)
    except _ERRORS as error:
        raise EvaluationFailed(_reason(error)) from None


def evaluate_condition(program: Program, values: Mapping[str, object]) -> bool:
    """The value of a condition. Raises: `EvaluationFailed`, also if the value is not true or false."""
    value = evaluate(program, values)
    if value is True or value is False:
        return value
    raise EvaluationFailed("its value is not true or false")


def literal_value(text: str) -> Any:
    """The value of a CEL literal. Raises: `ValueError`."""
    return compile_expression(text).execute({})


def _reason(error: Exception) -> str:
    return next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
