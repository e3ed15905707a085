"""The database: open it, migrate it and run transactions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from fleetgate.control.data_dir import DataDirUnusable

BUSY_TIMEOUT_MS = 5_000  # longer than any own transaction, so that a slow backup tool does not fail a write at once
_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """A SQLite file in WAL mode. Transactions are short and never wait for a network."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._engine = _engine(path)

    def migrate(self) -> None:
        """Run the pending migrations. Raises: `DataDirUnusable`."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        try:
            with self.write() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except CommandError as error:
            text = f"{self.path} was written by a newer Fleetgate ({error}); start that version"
            raise DataDirUnusable(text) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one consistent state. Raises: `DataDirUnusable` if the file cannot be read."""
        with self._begin(self._engine) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its start, so that no other process changes what it has read.

        Raises: `DataDirUnusable` if the file cannot be written.
        """
        with self._begin(self._engine.execution_options(immediate=True)) as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _begin(self, engine: Engine) -> Iterator[Connection]:
        try:
            with engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            if type(error) not in (DatabaseError, OperationalError):
                raise  # a violated constraint is a bug and not an error of the disk
            reason = str(error.orig)
            raise DataDirUnusable(
                f"the store {self.path} cannot be used ({reason}); check the disk and its permissions, restore the "
                f"file from a backup, or give another directory with --data-dir"
            ) from error


def _engine(path: Path) -> Engine:
    url = f"sqlite:///{path}"
    engine = create_engine(url, poolclass=QueuePool, pool_size=2, max_overflow=8, connect_args={"timeout": 5.0})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # BEGIN is sent below; the driver would commit before DDL
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = FULL",  # a key that was returned must exist after a power failure
            "foreign_keys = ON",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin_transaction(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine
