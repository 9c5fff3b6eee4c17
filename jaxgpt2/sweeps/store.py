"""A sweep's directory: rows as they come, and the table that they become.

sweep.json    what was asked for; another sweep's directory is refused
rows.jsonl    a row a line, appended as measured: what an interrupted sweep goes on from
rows.parquet, rows.csv    the table, for pandas and polars, written at the end
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxgpt2.errors import InputError, MissingExtra
from weights.checkpoint import write_atomically, write_text_atomically

Row = dict[str, Any]


class DirectoryError(InputError):
    """A directory that is not this sweep's."""


def require_extra() -> None:
    """Refuses to begin what could not be written down in the end.

    Raises:
        MissingExtra: pandas, pyarrow or matplotlib is not there.
    """
    try:
        import matplotlib  # noqa: F401
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401  # what pandas writes Parquet with
    except ImportError as error:
        raise MissingExtra(error, "a sweep's table", "sweep") from None


@dataclass(frozen=True)
class SweepDirectory:
    """An open directory, and the rows that were there when it was opened.

    Args:
        path: where.
        rows: by key, see `jaxgpt2.sweeps.runner.Configuration.key`.
    """

    path: Path
    rows: dict[str, Row]

    @classmethod
    def open(cls, path: Path, identity: Row, resume: bool) -> SweepDirectory:
        """Makes a new directory, or opens the one of this very sweep again.

        Args:
            identity: what must be equal for rows to belong into one table.
            resume: whether rows may be there already.

        Raises:
            DirectoryError: the directory holds something else, another sweep, this one while not resuming, or nothing
                to resume.
        """
        description = path / "sweep.json"
        if path.exists() and not path.is_dir():
            raise DirectoryError(f"{path} is a file: give a directory for --out")
        if not path.exists() or not any(path.iterdir()):
            if resume:
                raise DirectoryError(f"{path} holds no sweep to go on with: leave --resume out to begin one")
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(identity, indent=2) + "\n"
            write_text_atomically(description, text)
            return cls(path, {})
        there = read_sweep(path)
        if there != identity:
            differing = sorted(name for name in {**there, **identity} if there.get(name) != identity.get(name))
            raise DirectoryError(f"{path} holds another sweep (of other {', '.join(differing)}): give another --out")
        if not resume:
            raise DirectoryError(f"{path} holds this sweep already: go on with --resume, or give another --out")
        return cls(path, read_rows(path))

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows, on the disk when this returns."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with (self.path / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, keys: Sequence[str]) -> Any:
        """Writes the table of these rows, in this order."""
        rows = read_rows(self.path)
        frame = table([rows[key] for key in keys])
        write_atomically(self.path / "rows.parquet", lambda name: frame.to_parquet(name, index=False))
        write_atomically(self.path / "rows.csv", lambda name: frame.to_csv(name, index=False))
        return frame


def read_sweep(path: Path) -> Row:
    """What the rows of a sweep's directory have in common.

    Raises:
        DirectoryError: it is not the directory of a sweep.
    """
    try:
        found = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DirectoryError(f"{path} holds no sweep: give another directory")
    return found


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a directory by key; a last line that was cut off by a kill is cut away.

    Raises:
        DirectoryError: another line is no row.
    """
    file = path / "rows.jsonl"
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(file, lambda name: Path(name).write_bytes(whole))
    rows = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DirectoryError(f"{file}, line {number}: this is no row of a sweep; give another directory") from None
    return rows


def table(rows: Sequence[Row]) -> Any:
    """A tidy table (a pandas DataFrame): a row for every configuration, a column for everything known of it.

    `pbs_N` counts lookups of N bits; `error` says why a configuration could not be calibrated, and is empty otherwise.
    """
    import pandas as pd

    names = dict.fromkeys(name for row in rows for name in row if name not in ("key", "error"))
    widths = sorted(
        (name for name in names if name.startswith("pbs_") and name[4:].isdigit()), key=lambda n: int(n[4:])
    )
    columns = [name for name in names if name not in widths] + widths + ["error"]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns)
    measured = frame["error"].isna()
    for name in widths:
        frame.loc[measured, name] = frame.loc[measured, name].fillna(0)
    return frame.convert_dtypes()
