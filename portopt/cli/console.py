"""What the commands share: their arguments, and how they show progress and results."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from portopt import worker

NAMES = {"torch": "PyTorch", "keras": "Keras"}
Failures = list[worker.WorkerError]


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """A whole number of at least 0, as an argument's type."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return int(text)


def checked(read: Callable[[str], Any]) -> Callable[[str], str]:
    """An argument's type: a text that ``read`` reads without an error."""

    def check(text: str) -> str:
        try:
            read(text)
        except (ValueError, ImportError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return check


def output(text: str) -> Path:
    """A file to write, which is found out before the work and not after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text}")
    return path


def picture(text: str) -> Path:
    """An `output` that matplotlib can write."""
    path = output(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end with .png, .svg or .pdf, got {text}")
    return path


TRAINING_BACKENDS = ("tensorflow", "jax", "torch")


def each_framework() -> Iterator[str]:
    """The frameworks that can be used; says which cannot, and that each of the others starts."""
    for framework, name in NAMES.items():
        absent = worker.missing(framework)
        if absent is not None:
            print(f"{name} is left out: {absent} is not installed")
            continue
        if framework == "keras" and worker.keras_backend() not in TRAINING_BACKENDS:
            print(f"{name} is left out: its backend {worker.keras_backend()} cannot train")
            continue
        status(f"{name} starts ...")
        yield framework


def status(text: str, last: bool = False) -> None:
    """A line of progress that the next one overwrites; in a file, only the last one is kept."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def word(checked: Any) -> str:
    """What a table says of a row that has been checked."""
    return "ok" if checked.passed else "FAILED"


def print_table(head: list[str], lines: list[list[str]]) -> None:
    """Print columns that are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, ["-" * width for width in widths], *lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def write(results: Any, path: Path | None) -> None:
    """Write results as JSON, if they are asked for."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def draw(path: Path, what: str, write: Callable[[Path], Any]) -> None:
    """Write a picture, and say where it is, or why there is none."""
    try:
        write(path)
        print(f"\n{what} in {path}")
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"\nNo picture: {error}")


def verdict(passed: list[bool], failures: Failures) -> int:
    """Say the result; its exit status."""
    for failure in failures:
        print(f"\nportopt: {failure}", file=sys.stderr)
    if not all(passed):
        print("\nPARITY IS LOST: see the lines marked FAILED.")
    elif not passed:
        print("\nThere is nothing to compare with.")
    elif not failures:
        print("\nParity holds.")
    return 1 if not all(passed) else 2 if failures else 0
