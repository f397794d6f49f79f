"""What a user reads of an error, and how signals end the program."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

_SOURCE = re.compile(r"^\w+, \S+\.(?:cpp|h|cu):\d+, ")  # where in C++ an operator's error is from


class Damaged(ValueError):
    """A file is not what it must be as a whole: truncated, damaged or of another format."""


def way_out(problem: str) -> str:
    """What helps against weights that an operator or the engine refused, to end the error with.

    Of a saliency nothing: it is the caller's own.
    """
    if problem.startswith("saliency"):
        return ""
    if "must be finite" in problem:
        return (
            ": a model computes nothing with it, so take weights from before that, or never prune "
            "this layer (ignore, --ignore)"
        )
    if "must be float32, bfloat16 or float16" in problem:
        wide = problem.endswith(("float64", "double"))
        return (
            ": cast it first, as tensor.float() does"
            if wide
            else ": dequantize the model first, or prune the one that it was made from"
        )
    return ""


def sentence(error: BaseException) -> str:
    """An error in one sentence, for a user."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error.strerror)
    if isinstance(error, UnicodeEncodeError):  # of a name that a library hands on as UTF-8
        return f"{error.object} must be a name in UTF-8"
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (ValueError, TypeError, OSError, ImportError)) and first:
        return str(error)
    if isinstance(error, RuntimeError) and first:  # of the operators, and of a forward pass
        return _SOURCE.sub("", first)
    return f"{type(error).__name__}: {first} (--debug shows where)"


def near(name: str, known: Iterable[str]) -> str:
    """What an error of an unknown name ends with: the known ones that look like it, if there are."""
    found = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; near it are {', '.join(found)}" if found else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def need(package: str, purpose: str, *, module: str = "", install: str = "") -> Any:
    """Import a package that need not be there, or a module of it.

    purpose: the error's first words, as "timm models need". install: what pip is given in its place.
    Raises ModuleNotFoundError that says how to get it.
    """
    try:
        return import_module(module or package)
    except ModuleNotFoundError as error:
        problem = f"{purpose} the package {package}: pip install {install or package}"
        raise ModuleNotFoundError(problem, name=package) from error


def unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit, so that outputs are cleaned up as after Ctrl-C."""

    def unwind(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, unwind)
