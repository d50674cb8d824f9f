"""Define few-shot regression and classification on the rows of a table, where a column names the task of each row."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union

import numpy as np
import torch
from torch import Tensor

from metadist.core.errors import ConfigError, DataError
from metadist.core.random import SPLITS, TaskKey, choose
from metadist.core.task import Classification, Examples, Task, TaskFamily, alone, stack
from metadist.tasks.location import located
from metadist.tasks.sizes import Size, bounds, check_size, drawn, shown_size, varies
from metadist.tasks.table_columns import Encoding, TableColumns, read_table, split_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The encoded rows x [N, …] and y [N, …], grouped by task, and the tasks of each split by their first rows."""

    x: Tensor
    y: Tensor
    encoding: Encoding
    names: dict[str, tuple[str, ...]]
    first: dict[str, Tensor]
    counts: dict[str, Tensor]
    #: number of tasks of each split with too few rows
    left_out: dict[str, int]
    data_sha256: str


@dataclass(frozen=True, kw_only=True)
class Table(TaskFamily):
    """The rows of a CSV, Parquet, Arrow or Feather file, of a folder of such files, or of an fsspec URL.

    ``task`` names the column whose value says which task a row belongs to, ``target`` the column (or columns) to
    predict. ``features`` are the input columns; by default all other columns. Numbers are standardised with the mean
    and the standard deviation of the rows of the training tasks alone; text becomes one input for each of its
    values there. ``missing: mean`` replaces missing inputs by that mean; otherwise a missing value is an error.

    A task's support set has ``k_shot`` rows, its query set the other rows, at most ``query_rows``. Tasks with fewer
    than k_shot + 1 rows are left out and counted. ``support: random`` draws the rows by the key of the task;
    ``first`` takes the first rows in the order of the file. In validation and test, task i is the task i mod N of the
    N tasks of the split.

    ``k_shot``, ``query_rows`` and ``seen_features`` can be ranges, such as [3, 10]: ``same_size`` consecutive tasks
    (those of one index div ``same_size``) then share a number between the bounds. A task sees ``seen_features`` of the
    features, drawn by its key; the inputs of the others are 0, the mean of the training tasks.

    ``split_column`` holds train, validation or test for each task. Without it, ``fractions`` splits the tasks in the
    order of the SHA-256 of ``split_seed`` and name.
    """

    path: str
    task: str
    target: Union[str, tuple[str, ...]]
    features: Union[tuple[str, ...], None] = None
    k_shot: Size = 5
    query_rows: Union[Size, None] = None
    seen_features: Union[Size, None] = None
    same_size: int = 4
    support: Literal["random", "first"] = "random"
    missing: Literal["error", "mean"] = "error"
    split_column: str | None = None
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    split_seed: int = 0
    #: the encoding of an exported model as JSON; the table itself then need not exist
    encoding: str | None = None

    def __post_init__(self) -> None:
        for key in ("k_shot", "query_rows", "seen_features", "same_size"):
            check_size(f"tasks.{key}", getattr(self, key), 1)
        if not self.target:
            raise ConfigError("tasks.target: names no column; expected one column, or a list of columns")
        if len(self.fractions) != 3 or min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ConfigError(
                f"tasks.fractions = {list(self.fractions)}: must be three numbers ≥ 0 for {', '.join(SPLITS)} with the "
                "sum 1"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """The target columns."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)

    # Data -------------------------------------------------------------------------------------------------------------

    @cached_property
    def encoded(self) -> Encoding:
        """Return the conversion of rows to inputs and targets, from ``encoding`` or from the training tasks."""
        return self._ready().encoding if self.encoding is None else Encoding.from_json(self.encoding)

    @property
    def input_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.encoded.width,)

    @property
    def data_sha256(self) -> str:
        """Return the SHA-256 of the encoded rows, the names of the tasks and their splits."""
        return self._ready().data_sha256

    @property
    def columns(self) -> str:
        """Return the conversion of rows as JSON, for a server."""
        return self.encoded.to_json()

    def exported(self) -> dict[str, Any]:
        return {"encoding": self.columns}

    def prepare(self, device: torch.device) -> None:
        prepared = self._ready()
        if prepared.x.device != device:
            moved = {n: getattr(prepared, n).to(device) for n in ("x", "y")}
            object.__setattr__(self, "_prepared", _Prepared(**{**vars(prepared), **moved}))

    def _ready(self) -> _Prepared:
        if "_prepared" not in self.__dict__:
            object.__setattr__(self, "_prepared", self._load())
        prepared: _Prepared = self.__dict__["_prepared"]
        return prepared

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_prepared", "encoded")}

    def _load(self) -> _Prepared:
        where = f"tasks.path = {self.path}"
        table = read_table(located("tasks.path", self.path), where, splits_by_file=self.split_column is not None)
        columns = TableColumns.of(table, where, self.task, self.targets, self.features, self.split_column)
        tasks, splits = split_of(columns, self.fractions, self.split_seed)
        row_splits = np.array([splits[name] for name in tasks.names])[tasks.of_row]
        encoding = columns.encoding(row_splits == "train", self.kind == "classification", self.missing)
        if self.seen_features is not None and bounds(self.seen_features)[1] > len(encoding.features):
            raise ConfigError(
                f"tasks.seen_features = {shown_size(self.seen_features)}: {where} has {len(encoding.features)} features"
            )
        x, y = encoding.rows(columns)
        order = np.argsort(tasks.of_row, kind="stable")
        counts = np.bincount(tasks.of_row, minlength=len(tasks.names))
        starts = counts.cumsum() - counts
        names: dict[str, tuple[str, ...]] = {}
        first, rows, left_out = {}, {}, {}
        for split in SPLITS:
            all_of_it = [i for i, name in enumerate(tasks.names) if splits[name] == split]
            chosen = [i for i in all_of_it if counts[i] > self._most_shots]
            left_out[split] = len(all_of_it) - len(chosen)
            if left_out[split]:
                log.warning(
                    "%s: %d of %d %s tasks have fewer than %d rows (tasks.k_shot + 1) and are left out",
                    where,
                    left_out[split],
                    len(all_of_it),
                    split,
                    self._most_shots + 1,
                )
            names[split] = tuple(tasks.names[i] for i in chosen)
            first[split], rows[split] = torch.from_numpy(starts[chosen]), torch.from_numpy(counts[chosen])
        described = json.dumps([names, encoding.to_json()])
        content = hashlib.sha256(described.encode() + x[order].tobytes() + y[order].tobytes()).hexdigest()
        return _Prepared(
            torch.from_numpy(x[order]), torch.from_numpy(y[order]), encoding, names, first, rows, left_out, content
        )

    # Tasks ------------------------------------------------------------------------------------------------------------

    def splits(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the tasks of each split."""
        return dict(self._ready().names)

    def task_names(self, split: str) -> tuple[str, ...]:
        """Return the tasks of ``split`` in the order of their numbers."""
        return self._ready().names[split]

    @property
    def _most_shots(self) -> int:
        return bounds(self.k_shot)[1]

    def _query_size(self, split: str, k_shot: int, query_rows: int | None) -> int:
        """Return the rows of the query sets of a group with these numbers."""
        most = int(self._ready().counts[split].max()) - k_shot
        return most if query_rows is None else min(query_rows, most)

    def _drawn(self, keys: TaskKey, split: str) -> tuple[int, int, int | None]:
        """Return the support rows, the query rows and the seen features of the tasks of ``keys``, of one group."""
        given = [size for size in (self.k_shot, self.query_rows, self.seen_features) if size is not None]
        found = iter(drawn(keys, self.same_size, given))
        k, query, seen = (
            None if size is None else next(found) for size in (self.k_shot, self.query_rows, self.seen_features)
        )
        assert k is not None
        return k, self._query_size(split, k, query), seen

    def _checked(self, split: str) -> _Prepared:
        prepared = self._ready()
        if not prepared.names[split]:
            raise DataError(
                f"tasks.path = {self.path}: the {split} split has no task with {self._most_shots + 1} rows or more; "
                "lower tasks.k_shot, or change tasks.fractions"
            )
        return prepared

    def sample(self, keys: TaskKey, split: str) -> Task:
        """Return the stacked tasks: support [T, k_shot], query [T, rows] with a mask where tasks have fewer rows."""
        groups = [keys] if keys.tasks.dim() == 0 else keys.runs(self.group_size(split))
        if len(groups) == 1:
            return self._sample_group(keys.to(torch.device("cpu")), split)
        sampled = [self._sample_group(group.to(torch.device("cpu")), split) for group in groups]
        return stack([alone(some, i) for some in sampled for i in range(len(some.query.y))])

    def _sample_group(self, keys: TaskKey, split: str) -> Task:
        prepared = self._checked(split)
        counts, (k, size, seen) = prepared.counts[split], self._drawn(keys, split)
        longest = int(counts.max())
        (words,), number = keys.words(rows=longest), self._numbers(keys, split)
        count, place = counts[number].unsqueeze(-1), torch.arange(longest)
        # Rows in random order: sort the words of the rows that exist; the others come last.
        ordered = place.expand_as(words) if self.support == "first" else words
        order = torch.where(place < count, ordered, torch.full_like(ordered, 1 << 33)).argsort(dim=-1, stable=True)
        rows = prepared.first[split][number].unsqueeze(-1) + torch.minimum(order, count - 1)
        rows, real = rows.to(prepared.x.device), (place < count).to(prepared.x.device)
        support, query = rows[..., :k], rows[..., k : k + size]
        mask = real[..., k : k + size]
        alike = int(counts.min()) >= k + size
        x = [prepared.x[support], prepared.x[query]]
        if seen is not None:
            visible = self._visible(keys, seen).to(prepared.x.device).unsqueeze(-2)
            x = [torch.where(visible, part, torch.zeros_like(part)) for part in x]
        return Task(Examples(x[0], prepared.y[support]), Examples(x[1], prepared.y[query], None if alike else mask))

    def _visible(self, keys: TaskKey, seen: int) -> Tensor:
        """Return the inputs of the features that each task sees: bool […, width]."""
        widths = self.encoded.widths
        (words,) = keys.words(features=seen)
        chosen = choose(words, len(widths))
        features = (chosen.unsqueeze(-1) == torch.arange(len(widths))).any(-2)
        return features.repeat_interleave(torch.tensor(widths), dim=-1)

    def sample_task(self, key: TaskKey, split: str) -> Task:
        return self.sample(key, split)

    def sizes(self, split: str) -> tuple[int, int] | None:
        if self.group_size(split) is not None:
            return None
        (size,) = self.possible_sizes(split)
        return size if int(self._ready().counts[split].min()) >= sum(size) else None

    def group_size(self, split: str) -> int | None:
        return self.same_size if varies(self.k_shot, self.query_rows, self.seen_features) else None

    def possible_sizes(self, split: str) -> list[tuple[int, int]]:
        shots, most = bounds(self.k_shot), int(self._checked(split).counts[split].max())
        queries = (most, most) if self.query_rows is None else bounds(self.query_rows)
        return [
            (k, self._query_size(split, k, q))
            for k in range(shots[0], shots[1] + 1)
            for q in range(queries[0], queries[1] + 1)
        ]

    def listed_tasks(self, split: str) -> int | None:
        """Return the number of tasks of ``split`` where a task has the same rows at every draw."""
        return len(self.task_names(split)) if self.support == "first" else None

    def sources(self, key: TaskKey, split: str) -> int:
        """Return the place in ``task_names`` of the task of ``key``."""
        return int(self._numbers(key, split))

    def _numbers(self, keys: TaskKey, split: str) -> Tensor:
        """Return the places in ``task_names`` of the tasks of ``keys``."""
        count = len(self.task_names(split))
        return keys.stream("tasks").integers(count) if split == "train" else keys.tasks % count

    def protocol(self, split: str) -> dict[str, object]:
        prepared = self._checked(split)
        ranges = {"k_shot": self.k_shot, "query_rows": self.query_rows, "seen_features": self.seen_features}
        drawn_sizes = {n: list(size) if isinstance(size, tuple) else size for n, size in ranges.items()}
        varying = {**drawn_sizes, "same_size": self.same_size}
        fixed: dict[str, object] = {"k_shot": self.k_shot, "query_rows": self.possible_sizes(split)[0][1]}
        if self.seen_features is not None:
            fixed["seen_features"] = self.seen_features
        return {
            **(fixed if self.group_size(split) is None else varying),
            "support": self.support,
            "distinct_tasks": len(prepared.names[split]),
            "left_out_tasks": prepared.left_out[split],
            "target": list(self.targets),
            "features": list(prepared.encoding.features),
            "data_sha256": prepared.data_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class TableRegression(Table):
    """Regression: the loss is the squared error of the standardised targets; the metric is in the targets' own units.

    y is float32 [rows, targets], standardised on the training tasks.
    """

    metric_name = "mae"

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return len(self.targets)

    def metric(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the absolute error of each row [N] in the units of the table, averaged over the targets."""
        scale = torch.tensor(self.encoded.target_deviation, dtype=prediction.dtype, device=prediction.device)
        return ((prediction - target).abs() * scale).mean(-1)


@dataclass(frozen=True, kw_only=True)
class TableClassification(Table, Classification):
    """Classification: the classes are the values of the target column, with the same numbers in every task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.targets) != 1:
            raise ConfigError(f"tasks.target = {list(self.targets)}: classification has one target column")

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return len(self.encoded.classes)
