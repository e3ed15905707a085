"""Traces: CSV files of arrivals, checked line by line."""

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from fleetgate.simulator.serving.world import Arrival

COLUMNS = ("timestamp_s", "prompt_tokens", "output_tokens")
TOKENS_MAX = 100_000_000  # above every context length, so a larger count is a typing error
OPTIONAL = ("prefix_block_ids_512", "region", "key")


class BadTrace(Exception):
    """A trace cannot be read; the message names file, line and column, and the expected value."""


def read_trace(path: Path, limit: int = 0) -> list[Arrival]:
    """Read a trace, plain or gzipped; at most `limit` requests, 0 for all.

    Raises: `BadTrace`.
    """
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as text:
                arrivals = list(_rows(path, csv.reader(text), limit))
        else:
            with path.open(encoding="utf-8-sig", newline="") as text:
                arrivals = list(_rows(path, csv.reader(text), limit))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise BadTrace(f"{path} cannot be read: {error}") from None
    if not arrivals:
        raise BadTrace(f"{path} has no requests; add at least two lines after the header")
    return arrivals


def _rows(path: Path, lines: Iterator[list[str]], limit: int) -> Iterator[Arrival]:
    """The arrivals of a file; empty lines are skipped."""
    header = next(lines, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise BadTrace(
            f"{path} line 1: column {missing[0]} is missing; the header is {','.join(COLUMNS)}[,{'][,'.join(OPTIONAL)}]"
        )
    unknown = [name for name in header if name not in COLUMNS + OPTIONAL]
    if unknown:
        raise BadTrace(f"{path} line 1: column {unknown[0]!r} is not known; optional ones are {', '.join(OPTIONAL)}")
    last_s, count = 0.0, 0
    for number, fields in enumerate(lines, start=2):
        if limit and count >= limit:
            return
        if not fields:
            continue
        if len(fields) != len(header):
            raise BadTrace(f"{path} line {number}: {len(fields)} fields, but the header has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        at_s = _number(path, number, row, "timestamp_s")
        if at_s < last_s:
            raise BadTrace(f"{path} line {number}: timestamp_s {at_s} is before the line above; sort the trace by time")
        last_s = at_s
        yield Arrival(
            index=count,
            at_s=at_s,
            prompt_tokens=_tokens(path, number, row, "prompt_tokens"),
            output_tokens=_tokens(path, number, row, "output_tokens"),
            blocks=_blocks(path, number, row.get("prefix_block_ids_512", "")),
            region=row.get("region", ""),
            key=row.get("key", ""),
        )
        count += 1


def _number(path: Path, number: int, row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e12:
        raise BadTrace(f"{path} line {number}: {column} is {row[column]!r}; expected a number, 0 or more")
    return value


def _tokens(path: Path, number: int, row: dict[str, str], column: str) -> int:
    """A count of tokens, at least 1: published traces have a few requests with 0, which an engine serves as 1."""
    value = _number(path, number, row, column)
    if value != int(value) or value > TOKENS_MAX:
        raise BadTrace(
            f"{path} line {number}: {column} is {row[column]!r}; expected a whole number, {TOKENS_MAX} at most"
        )
    return max(1, int(value))


def _blocks(path: Path, number: int, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split()))
    except ValueError:
        raise BadTrace(
            f"{path} line {number}: prefix_block_ids_512 is {text[:40]!r}; expected whole numbers separated by spaces"
        ) from None
