"""The store: migrations and tables agree, Events are bounded, and refusals are sentences."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.store import repository as rows
from fleetgate.control.store.database import Database
from fleetgate.control.store.schema import metadata


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "fleetgate.db")
    database.migrate()
    yield database
    database.close()


def test_migrations_make_exactly_the_tables_of_the_schema(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    with database.write() as connection:
        rows.add_event(connection, 1.0, "Gateway", "chat", "It happened.")
    database.migrate()
    with database.read() as connection:
        assert [event.sentence for event in rows.load_events(connection, 0, 10)] == ["It happened."]


def test_a_store_of_a_newer_release_is_refused(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DataDirUnusable, match="newer Fleetgate"):
        database.migrate()


def test_it_keeps_its_promises_about_disks_and_readers(database: Database) -> None:
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert rows.load_number(connection, "n") == 0
        with database.write() as writer:  # a reader never blocks the writer
            rows.save_number(writer, "n", 1)
        assert rows.load_number(connection, "n") == 0
    with database.read() as connection:
        assert rows.load_number(connection, "n") == 1


def test_a_failed_transaction_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        rows.save_number(connection, "n", 1)
        _ = 1 // 0
    with database.read() as connection:
        assert rows.load_number(connection, "n") == 0


def test_events_are_bounded_and_their_ids_never_return(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "EVENTS_KEPT", 300)
    with database.write() as connection:
        for index in range(2_000):
            rows.add_event(connection, float(index), "Gateway", "chat", str(index))
        kept = rows.load_events(connection, 0, 10_000)
        assert 300 <= len(kept) <= 300 + 256
        assert kept[-1].sentence == "1999"
        first_page = rows.load_events(connection, kept[0].id, 5)
        assert [event.id for event in first_page] == [kept[0].id + step for step in range(1, 6)]


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "fleetgate.db").mkdir()
    with pytest.raises(DataDirUnusable, match=r"fleetgate\.db"):
        Database(tmp_path / "fleetgate.db").migrate()
