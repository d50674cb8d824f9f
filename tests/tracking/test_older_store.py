"""The SQLite store of an older or a newer MLflow."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

import pytest

from metadist.core.errors import ConfigError
from metadist.tracking import make_tracker
from metadist.tracking.sqlite_schema import schema_of, upgrade_sqlite

pytestmark = pytest.mark.lane("services")

#: what an MLflow of that time wrote: its own migrations, up to the revision of 3.0
OLDER = "400f98739977"
MAKE = """
import sys
from alembic import command
from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
url = f"sqlite:///{sys.argv[1]}"
engine = create_sqlalchemy_engine(url)
InitialBase.metadata.create_all(engine)
config = _get_alembic_config(url)
with engine.begin() as connection:
    config.attributes["connection"] = connection
    command.upgrade(config, sys.argv[2])
"""


@pytest.fixture
def older(tmp_path):
    path = tmp_path / "mlflow.db"
    done = subprocess.run([sys.executable, "-c", MAKE, path, OLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage) "
            "VALUES (7, 'earlier', '/x', 'active')"
        )
        connection.commit()
    return path


@pytest.mark.long
def test_an_older_store_is_upgraded_after_a_backup_and_takes_runs(older, tmp_path, empty_store, caplog):
    assert schema_of(older) == OLDER
    tracker = make_tracker(f"sqlite:///{older}", spool=tmp_path / "spool", experiment="e", runs_root=tmp_path)
    tracker.start(run_id="a", name="a", params={}, tags={})
    tracker.metrics(1, {"loss": 0.5})
    assert tracker.finish("FINISHED", 180) == 0
    assert "is upgraded; the old file is" in caplog.text
    assert schema_of(tmp_path / f"mlflow.db.backup-{OLDER}") == OLDER
    empty_store(tmp_path / "new/mlflow.db")
    assert schema_of(older) == schema_of(tmp_path / "new/mlflow.db")
    with contextlib.closing(sqlite3.connect(older)) as connection:
        assert connection.execute("SELECT name FROM experiments WHERE experiment_id = 7").fetchall() == [("earlier",)]
        assert connection.execute("SELECT value FROM metrics WHERE key = 'loss'").fetchall() == [(0.5,)]
    caplog.clear()
    upgrade_sqlite(older)
    assert caplog.text == ""


def test_a_newer_store_is_refused_in_one_line(older):
    with contextlib.closing(sqlite3.connect(older)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffff00000000'")
        connection.commit()
    with pytest.raises(ConfigError, match="written by a newer MLflow .*pip install -U mlflow"):
        upgrade_sqlite(older)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "a.db").write_bytes(b"no database")
    upgrade_sqlite(tmp_path / "a.db")
    assert (tmp_path / "a.db").read_bytes() == b"no database"
