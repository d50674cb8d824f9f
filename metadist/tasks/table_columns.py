"""Read a table, and convert its columns to the inputs and targets of a model."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metadist.core.errors import ConfigError, DataError, nearest
from metadist.core.random import SPLITS
from metadist.tasks.folders import is_hidden
from metadist.tasks.layout import split_of_table

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".csv.gz", ".parquet", ".arrow", ".feather")
#: spellings of the splits in a column
SPELLINGS = {"val": "validation", "valid": "validation", **{s: s for s in SPLITS}}


def read_table(path: str, where: str, *, splits_by_file: bool = True) -> pa.Table:
    """Read a CSV, Parquet, Arrow or Feather file, or all such files of a folder in the order of their names.

    ``path`` is a local path or an fsspec URL. Hidden files and folders are passed over. Raises DataError that begins
    with ``where``. ``splits_by_file=False`` also refuses files that are named after different splits.
    """
    import fsspec
    import pyarrow as pa

    try:
        system, root = fsspec.core.url_to_fs(path)
        found = [root] if system.isfile(root) else sorted(system.find(root))
    except Exception as error:  # every fsspec backend raises its own
        raise DataError(f"{where}: cannot be reached ({error})") from error
    below = {f: f[len(root) :].strip("/") or posixpath.basename(f) for f in found}
    files = [
        f
        for f, name in below.items()
        if f.lower().endswith(SUFFIXES) and not posixpath.basename(f).startswith("_")
        if not any(map(is_hidden, name.split("/")))
    ]
    if not files:
        raise DataError(f"{where}: has no table; expected {', '.join(SUFFIXES)}")
    named = {split: below[f] for f in files if (split := split_of_table(below[f])) is not None}
    if len(named) > 1 and not splits_by_file:
        raise DataError(
            f"{where}: the files {' and '.join(sorted(named.values()))} are named after splits, and all rows would be "
            "split together; name the column that holds the split in tasks.split_column, or choose one file"
        )
    parts = [_read(system, file, where) for file in files]
    try:
        return pa.concat_tables(parts).combine_chunks() if len(parts) > 1 else parts[0].combine_chunks()
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: its {len(files)} files have different columns ({error})") from error


def _read(system: Any, file: str, where: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    try:
        with system.open(file, "rb", compression="gzip" if file.lower().endswith(".gz") else None) as opened:
            if file.lower().endswith((".csv", ".csv.gz")):
                return pa.csv.read_csv(opened)
            if file.lower().endswith(".parquet"):
                return pq.read_table(opened)
            magic = opened.read(6)
            opened.seek(0)
            return (pa.ipc.open_file(opened) if magic == b"ARROW1" else pa.ipc.open_stream(opened)).read_all()
    except Exception as error:  # Arrow and every fsspec backend raise their own
        raise DataError(f"{where}: cannot read {file} ({' '.join(str(error).split())})") from error


@dataclass(frozen=True, eq=False)
class TaskColumn:
    """The tasks of a table in the order of their first rows, and the task of each row as a number."""

    names: tuple[str, ...]
    of_row: np.ndarray


@dataclass(frozen=True, eq=False)
class TableColumns:
    """The columns of a table that a model uses."""

    table: pa.Table
    where: str
    task: str | None
    target: tuple[str, ...]
    features: tuple[str, ...]
    split: str | None = None

    @classmethod
    def of(
        cls,
        table: pa.Table,
        where: str,
        task: str | None,
        target: Sequence[str],
        features: Sequence[str] | None,
        split: str | None,
    ) -> TableColumns:
        """Check that the columns exist. Without ``features``, all other columns are inputs."""
        named = {
            "task": [task] if task else [],
            "target": target,
            "features": features or (),
            "split_column": [split] if split else [],
        }
        for key, columns in named.items():
            for column in columns:
                if column not in table.column_names:
                    raise DataError(
                        f"{where}: there is no column '{column}' (tasks.{key}), only {', '.join(table.column_names)}"
                        f"{nearest(column, table.column_names)}"
                    )
        taken = {*([task] if task else []), *target, *([split] if split else [])}
        if features and (both := taken & set(features)):
            raise ConfigError(f"tasks.features: '{min(both)}' is the task, the target or the split of a row already")
        chosen = tuple(features) if features else tuple(c for c in table.column_names if c not in taken)
        if not chosen:
            raise ConfigError(f"tasks.features: {where} has no column besides {', '.join(sorted(taken))}")
        if not table.num_rows:
            raise DataError(f"{where}: has no rows")
        return cls(table, where, task, tuple(target), chosen, split)

    def tasks(self) -> TaskColumn:
        """Return the task of each row."""
        assert self.task is not None
        texts = self.texts(self.task)
        names = tuple(dict.fromkeys(texts))
        numbers = {name: i for i, name in enumerate(names)}
        return TaskColumn(names, np.array([numbers[t] for t in texts]))

    def texts(self, column: str) -> list[str]:
        """Return the values of a column as texts. DataError for a missing one."""
        values = self.table[column].to_pylist()
        if None in values:
            raise DataError(f"{self.where}, row {values.index(None)}: column '{column}' has no value; remove the row")
        return [str(v) for v in values]

    def is_text(self, column: str) -> bool:
        import pyarrow as pa

        kind = self.table.schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def numbers(self, column: str) -> np.ndarray:
        """Return a column as float64 [N], NaN where a value is missing. DataError for what is no number."""
        import pyarrow as pa

        kind = self.table.schema.field(column).type
        if pa.types.is_boolean(kind):
            found = self.table[column].cast(pa.uint8())
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            found = self.table[column]
        else:
            raise DataError(
                f"{self.where}: column '{column}' is {kind}; expected numbers, true/false or text; name the columns to "
                "use in tasks.features"
            )
        values = np.array(found.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
        if np.isinf(values).any():
            raise DataError(f"{self.where}, row {int(np.isinf(values).argmax())}: column '{column}' is infinite")
        return values

    def encoding(self, training: np.ndarray, classification: bool, missing: str) -> Encoding:
        """Return the encoding by the rows ``training`` (bool [N]): means, deviations and categories."""
        if not training.any():
            raise DataError(f"{self.where}: no row is of a training task; change tasks.fractions or tasks.split_column")
        categories, mean, deviation = {}, [], []
        for column in self.features:
            if self.is_text(column):
                texts = self.table[column].to_pylist()
                categories[column] = tuple(sorted({str(t) for t, use in zip(texts, training) if use and t is not None}))
                continue
            m, d = _moments(self.numbers(column)[training])
            mean.append(m)
            deviation.append(d)
        classes: tuple[str, ...] = ()
        targets: list[tuple[float, float]] = []
        if classification:
            classes = tuple(sorted(set(self.texts(self.target[0])), key=_natural))
            if len(classes) < 2:
                raise DataError(
                    f"{self.where}: column '{self.target[0]}' has one class, '{classes[0]}'; expected 2 or more"
                )
        else:
            targets = [_moments(self.numbers(column)[training]) for column in self.target]
        return Encoding(
            self.features,
            self.target,
            categories,
            tuple(mean),
            tuple(deviation),
            classes,
            tuple(m for m, _ in targets),
            tuple(d for _, d in targets),
            missing,
        )


def _natural(text: str) -> tuple[int, float, str]:
    """Order numbers by value and before texts."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of the values that are there; 1 in place of a deviation of 0."""
    there = values[~np.isnan(values)]
    if not len(there):
        return 0.0, 1.0
    return float(there.mean()), float(there.std()) or 1.0


@dataclass(frozen=True)
class Encoding:
    """The conversion of rows to inputs and targets.

    ``mean`` and ``deviation`` belong to the numeric features in their order, ``categories`` to the text features. An
    input has the standardised numbers and the 0/1 inputs of each category in the order of ``features``.
    """

    features: tuple[str, ...]
    target: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    classes: tuple[str, ...]
    target_mean: tuple[float, ...]
    target_deviation: tuple[float, ...]
    missing: str = "error"

    def to_json(self) -> str:
        """Return the encoding as JSON; ``from_json`` gives it back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Encoding:
        """Return the encoding of ``to_json``. Raises ConfigError for another text."""
        try:
            found = json.loads(text)
            categories = {name: tuple(values) for name, values in found.pop("categories").items()}
            plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
            return cls(categories=categories, **plain)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"tasks.encoding: not the encoding of a table ({error}); export the model again"
            ) from error

    @property
    def width(self) -> int:
        """The number of inputs of a row."""
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of inputs of each feature."""
        return tuple(len(self.categories[f]) if f in self.categories else 1 for f in self.features)

    def rows(self, columns: TableColumns) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs float32 [N, width], and targets: float32 [N, targets] or classes int64 [N]."""
        return self.inputs(columns), self.targets(columns)

    def inputs(self, columns: TableColumns) -> np.ndarray:
        """Return the inputs float32 [N, width] of every row; a category that training did not have is all zeros."""
        parts, number = [], 0
        for feature in self.features:
            if feature in self.categories:
                values = columns.table[feature].to_pylist()
                self._refuse_missing(columns, feature, np.array([v is None for v in values]))
                parts += [np.array([str(v) == c for v in values], dtype=np.float64) for c in self.categories[feature]]
                continue
            found = columns.numbers(feature)
            self._refuse_missing(columns, feature, np.isnan(found))
            found = np.where(np.isnan(found), self.mean[number], found)
            parts.append((found - self.mean[number]) / self.deviation[number])
            number += 1
        return np.stack(parts, axis=1).astype(np.float32)

    def targets(self, columns: TableColumns) -> np.ndarray:
        """Return the standardised targets float32 [N, targets], or classes int64 [N]."""
        if self.classes:
            known = {name: i for i, name in enumerate(self.classes)}
            texts = columns.texts(self.target[0])
            if unknown := set(texts) - set(known):
                raise DataError(
                    f"{columns.where}: column '{self.target[0]}' has the class '{min(unknown)}'; the model knows "
                    f"{', '.join(self.classes)}"
                )
            return np.array([known[t] for t in texts], dtype=np.int64)
        parts = []
        for column, mean, deviation in zip(self.target, self.target_mean, self.target_deviation):
            values = columns.numbers(column)
            if np.isnan(values).any():
                raise DataError(
                    f"{columns.where}, row {int(np.isnan(values).argmax())}: column '{column}' has no value; remove "
                    "the row"
                )
            parts.append((values - mean) / deviation)
        return np.stack(parts, axis=1).astype(np.float32)

    def in_units(self, prediction: np.ndarray) -> np.ndarray:
        """Return predicted targets [N, targets] in the units of the table."""
        return prediction * np.array(self.target_deviation) + np.array(self.target_mean)

    def _refuse_missing(self, columns: TableColumns, feature: str, missing: np.ndarray) -> None:
        if missing.any() and self.missing == "error":
            raise DataError(
                f"{columns.where}: column '{feature}' has no value in {int(missing.sum())} of {len(missing)} rows "
                f"(first: row {int(missing.argmax())}); use tasks.missing: mean, or remove the rows or the column"
            )


def split_of(columns: TableColumns, fractions: Sequence[float], seed: int) -> tuple[TaskColumn, dict[str, str]]:
    """Return the tasks, and task name → split: by the split column, or by ``fractions`` in the order of SHA-256."""
    tasks = columns.tasks()
    if columns.split is None:
        order = sorted(tasks.names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
        cuts = round(len(order) * fractions[0]), round(len(order) * (fractions[0] + fractions[1]))
        pieces = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]
        return tasks, {name: split for split, piece in zip(SPLITS, pieces) for name in piece}
    found: dict[str, str] = {}
    for row, (number, text) in enumerate(zip(tasks.of_row.tolist(), columns.texts(columns.split))):
        name, split = tasks.names[number], SPELLINGS.get(text.lower())
        if split is None:
            raise DataError(
                f"{columns.where}, row {row}: column '{columns.split}' is '{text}'; expected {', '.join(SPLITS)}"
                f"{nearest(text, SPLITS)}"
            )
        if found.setdefault(name, split) != split:
            raise DataError(
                f"{columns.where}, row {row}: task '{name}' is in the {found[name]} split and again in {split}; put "
                "each task in one split"
            )
    return tasks, found
