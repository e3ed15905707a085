"""A `--config` file: read, check and apply it.

A resource that is removed from the file stays in the store; `fleetgate delete` removes it.
"""

from pathlib import Path

from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.resources.apply import CONFIG, ApplyResult, ResourceWriter, find_problems
from fleetgate.control.resources.problems import ResourceRefused
from fleetgate.control.store import repository as rows
from fleetgate.control.store.database import Database
from fleetgate.ipc.signed_file import LAST_GOOD
from fleetgate.manifests import Unreadable, read_file, resolve_value


def load_documents(path: str) -> list[object]:
    """The documents of a file, with `value_from` resolved.

    Raises: `Unreadable` with a sentence for each mistake.
    """
    documents: list[object] = []
    messages: list[str] = []
    for index, value in enumerate(read_file(path)):
        try:
            documents.append(resolve_value(value, index))
        except Unreadable as error:
            messages += [f"{path}: {message}" for message in error.messages]
            documents.append(_without_source(value))
    if messages:
        problems = find_problems(documents, {}, CONFIG)[1]
        raise Unreadable(messages + [problem.sentence(path) for problem in problems])
    return documents


def check_file(path: str, data_dir: str | Path) -> list[str]:
    """A sentence for each mistake of a file, checked together with the resources in the data directory."""
    try:
        documents = load_documents(path)
        resources = _stored_resources(Path(data_dir) / "fleetgate.db")
    except Unreadable as error:
        return error.messages
    except DataDirUnusable as error:
        # Workers that have a last good Snapshot serve from it without the store. Source: faults.md row 48.
        return [] if (Path(data_dir) / LAST_GOOD).exists() else [str(error)]
    return [problem.sentence(path) for problem in find_problems(documents, resources, CONFIG)[1]]


async def apply_file(path: str, writer: ResourceWriter) -> list[ApplyResult]:
    """Apply a file as a whole or not at all.

    Raises: `Unreadable` with a sentence for each mistake.
    """
    documents = load_documents(path)
    try:
        return writer.apply(await writer.check(documents, CONFIG), CONFIG)
    except ResourceRefused as error:
        sentences = [problem.sentence(path) for problem in error.problems]
        raise Unreadable(sentences or [f"{path}: {error.message}"]) from error


def _stored_resources(database_file: Path) -> rows.StoredResources:
    if not database_file.exists():
        return {}
    database = Database(database_file)
    try:
        database.migrate()
        with database.read() as connection:
            return rows.load_resources(connection)
    finally:
        database.close()


def _without_source(value: object) -> object:
    """A Secret with a placeholder instead of its unreadable source, so that its other mistakes are still found."""
    match value:
        case {"value_from": _, **rest}:
            return {**rest, "value": "-"}
        case _:
            return value
