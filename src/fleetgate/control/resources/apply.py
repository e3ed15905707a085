"""Changes to the resources: a set of documents is applied as a whole or not at all, in one transaction."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from fleetgate.control.data_dir import DataDir
from fleetgate.control.resources import egress, references
from fleetgate.control.resources.parser import ParsedDocument, parse_documents
from fleetgate.control.resources.policy_fields import STORED
from fleetgate.control.resources.problems import Problem, ResourceRefused
from fleetgate.control.resources.removal_guard import ConfirmationRequired, removal_warning
from fleetgate.control.resources.schema import KINDS, READ_ONLY, Deployment, Key, Resource, Secret
from fleetgate.control.store import repository as rows
from fleetgate.control.store.database import Database
from fleetgate.control.store.repository import StoredResource
from fleetgate.core.api_keys import ID_BYTES, SECRET_BYTES, hmac_hex, mint_key, parse_key
from fleetgate.ipc.sealed_secret import UnsealFailed, seal, unseal

KEY_ENV = "live"
HIDDEN_FIELDS = READ_ONLY | {"generation", "value"}


class ApplyResult(msgspec.Struct, frozen=True):
    """The result of one document.

    Shape: `outcome` is created, changed, unchanged or deleted; `key` is the token of a new Key, otherwise empty.
    """

    kind: str
    name: str
    outcome: str
    generation: int
    key: str = ""


class GenerationConflict(Exception):
    """The given generation is not the stored one. Shape: `current` is the stored one, 0 if the resource is absent."""

    def __init__(self, kind: str, name: str, given: int, current: int) -> None:
        if given == 0:
            text = f"{kind}/{name} already exists at generation {current}; change it with PUT or choose another name"
        else:
            state = f"is at generation {current}" if current else "does not exist"
            text = f"{kind}/{name} {state}, not at generation {given}; read it again and repeat the change"
        super().__init__(text)
        self.current = current


class ChangeOrigin(msgspec.Struct, frozen=True):
    """The source of a change.

    Shape: `description` ends the sentence of an Event; `trusted` is true for the operator's own file on this machine.
    """

    description: str
    trusted: bool = False


API = ChangeOrigin("through the API")
CONFIG = ChangeOrigin("from the --config file", trusted=True)


class CheckedDocuments(msgspec.Struct, frozen=True):
    """Documents without mistakes. Shape: `resolved` names the Deployments with resolved and allowed hosts."""

    parsed: tuple[ParsedDocument, ...]
    resolved: frozenset[str] = frozenset()


def full_document(resource: Resource) -> dict[str, Any]:
    """The document of a resource with its defaults filled in, to compare it and to return it."""
    return resource.model_dump(exclude_none=True, exclude={"generation", *READ_ONLY}, mode="json")


def parse_stored(stored: StoredResource) -> Resource:
    """The values of a stored resource. A Secret has `-` in place of its value."""
    document = stored.document
    if stored.kind == "Secret":
        document = {**document, "value": "-"}
    return KINDS[stored.kind].model_validate(document, context=STORED)


class ResourceWriter:
    """Applies documents to the store."""

    def __init__(self, database: Database, data_dir: DataDir, egress_ranges: Sequence[egress.IpNetwork] = ()) -> None:
        self._database = database
        self._data_dir = data_dir
        self._ranges = egress_ranges

    async def check(self, documents: Sequence[object], origin: ChangeOrigin) -> CheckedDocuments:
        """Find every mistake. It may resolve host names, so it runs outside of transactions.

        Raises: `ResourceRefused` with all mistakes.
        """
        resources, parsed_documents, problems = await asyncio.to_thread(self._find_problems, documents, origin)
        resolved: set[str] = set()
        if not origin.trusted:
            for parsed, urls in _urls_to_resolve(parsed_documents, resources):
                resolved.add(parsed.name)
                for field, url in urls:
                    denied = await egress.check_url(url, self._ranges)
                    if denied is not None:
                        problems.append(parsed.problem(field, denied.message, denied.fix))
        refuse_if_any(problems)
        return CheckedDocuments(tuple(parsed_documents), frozenset(resolved))

    def _find_problems(
        self, documents: Sequence[object], origin: ChangeOrigin
    ) -> tuple[rows.StoredResources, list[ParsedDocument], list[Problem]]:
        with self._database.read() as connection:
            resources = rows.load_resources(connection)
        return resources, *find_problems(documents, resources, origin)

    def apply(
        self, checked: CheckedDocuments, origin: ChangeOrigin, dry_run: bool = False, confirmed: bool = False
    ) -> list[ApplyResult]:
        """Write all documents or none. The operator's own file needs no confirmation, since nothing can ask at a start.

        Raises: `ResourceRefused` if the store changed since the check and the documents no longer fit,
        `GenerationConflict` for another generation, `ConfirmationRequired` if the change removes many Endpoints.
        """
        with self._database.write() as connection:
            resources = rows.load_resources(connection)
            documents = {(stored.kind, stored.name): stored.document for stored in resources.values()}
            refuse_if_any(references.check(checked.parsed, documents))
            if not (confirmed or dry_run or origin.trusted):
                changed = {(parsed.kind, parsed.name): parsed.raw for parsed in checked.parsed}
                require_confirmation(removal_warning(documents, {**documents, **changed}))
            writer = _Writer(connection, self._data_dir, origin, dry_run)
            return [writer.write(parsed, resources, checked.resolved) for parsed in checked.parsed]

    def delete(
        self, kind: str, name: str, generation: int | None = None, confirmed: bool = False, origin: ChangeOrigin = API
    ) -> ApplyResult | None:
        """Delete a resource. The result is None if it does not exist.

        Raises: `ResourceRefused` with the resources that still use it, `GenerationConflict` for another generation,
        `ConfirmationRequired` as `apply` does.
        """
        with self._database.write() as connection:
            resources = rows.load_resources(connection)
            stored = resources.get((kind, name))
            if stored is None:
                return None
            if generation is not None and generation != stored.generation:
                raise GenerationConflict(kind, name, generation, stored.generation)
            documents = {(other.kind, other.name): other.document for other in resources.values()}
            users = references.users_of(kind, name, documents)
            if users:
                raise ResourceRefused(
                    f"{kind}/{name} is used by {', '.join(users)}; change or delete that first",
                    [Problem(user, f"uses {kind}/{name}", "change or delete it first") for user in users],
                    conflict=True,
                )
            if not confirmed:
                kept = {identity: document for identity, document in documents.items() if identity != (kind, name)}
                require_confirmation(removal_warning(documents, kept))
            rows.remove_resource(connection, kind, name)
            rows.add_event(connection, time.time(), kind, name, f"{kind} {name} was deleted {origin.description}.")
            return ApplyResult(kind, name, "deleted", stored.generation)


def find_problems(
    documents: Sequence[object], resources: rows.StoredResources, origin: ChangeOrigin
) -> tuple[list[ParsedDocument], list[Problem]]:
    """Every mistake that can be found without the network."""
    parsed_documents, problems = parse_documents(documents)
    problems += references.check(
        parsed_documents, {identity: stored.document for identity, stored in resources.items()}
    )
    if origin.trusted:
        for parsed in parsed_documents:
            problems.extend(_operator_problems(parsed, resources.get((parsed.kind, parsed.name))))
    return parsed_documents, sorted(problems, key=lambda problem: problem.document)


def _operator_problems(parsed: ParsedDocument, stored: StoredResource | None) -> Iterable[Problem]:
    """Mistakes that only a --config file can have."""
    if parsed.kind == "Key" and stored is None:
        fix = f"run `fleetgate keys create {parsed.name}`"
        yield parsed.problem("", "a --config file cannot create a Key, because nothing receives its token", fix)
    given = parsed.resource.generation if parsed.resource is not None else None
    if given is not None and given != (stored.generation if stored else 0):
        # The file is applied at every start. At the second start its own first change has raised the generation.
        yield parsed.problem("generation", f"{given} is not the stored one", "remove `generation:` from the file")
    for field, url in _urls_of(parsed):
        denied = egress.check_literal(url)
        if denied is not None:
            yield parsed.problem(field, denied.message, denied.fix)


def require_confirmation(sentence: str) -> None:
    """Ask for a confirmation if there is a warning. Raises: `ConfirmationRequired` with it."""
    if sentence:
        raise ConfirmationRequired(sentence)


def refuse_if_any(problems: Sequence[Problem]) -> None:
    """Refuse documents with mistakes. Raises: `ResourceRefused` with them."""
    if problems:
        count = len(problems)
        raise ResourceRefused(f"{count} mistake{'s' if count > 1 else ''}: nothing was changed", problems)


class _Writer:
    """Writes the documents of one transaction."""

    def __init__(self, connection: Connection, data_dir: DataDir, origin: ChangeOrigin, dry_run: bool) -> None:
        self._connection = connection
        self._data_dir = data_dir
        self._origin = origin
        self._dry_run = dry_run
        self._now_s = time.time()
        self._sealed = rows.load_secrets(connection)

    def write(
        self, parsed: ParsedDocument, resources: Mapping[tuple[str, str], StoredResource], resolved: frozenset[str]
    ) -> ApplyResult:
        """Write one document if it differs from the stored one."""
        resource = parsed.resource
        if resource is None:
            raise ResourceRefused("a document with mistakes cannot be written")
        stored = resources.get((parsed.kind, parsed.name))
        current = stored.generation if stored else 0
        if resource.generation is not None and resource.generation != current:
            raise GenerationConflict(parsed.kind, parsed.name, resource.generation, current)
        trusted = self._trust(parsed, stored, resolved)
        if stored is not None and trusted == stored.trusted and self._same(resource, stored):
            return ApplyResult(parsed.kind, parsed.name, "unchanged", stored.generation)
        outcome = "changed" if stored else "created"
        if self._dry_run:
            return ApplyResult(parsed.kind, parsed.name, outcome, current + 1)
        document = {field: value for field, value in parsed.raw.items() if field not in HIDDEN_FIELDS}
        created_s = stored.created_s if stored else self._now_s
        rows.save_resource(
            self._connection,
            StoredResource(parsed.kind, parsed.name, document, current + 1, trusted, created_s, self._now_s),
        )
        self._record(parsed, resource, stored, current + 1)
        return ApplyResult(parsed.kind, parsed.name, outcome, current + 1, self._save_secret(resource, stored is None))

    def _trust(self, parsed: ParsedDocument, stored: StoredResource | None, resolved: frozenset[str]) -> bool:
        """Whether a Deployment's URLs come from the operator's own file. A change that keeps them keeps the trust."""
        if parsed.kind != "Deployment":
            return False
        if self._origin.trusted:
            return True
        if parsed.name in resolved or not _urls_of(parsed):
            return False
        if stored is not None and stored.trusted and _same_urls(parsed, stored):
            return True
        message = f"{parsed.label} changed while this request was checked; send it again"
        problem = parsed.problem("url", "changed while this request was checked", "send it again")
        raise ResourceRefused(message, [problem], conflict=True)

    def _same(self, resource: Resource, stored: StoredResource) -> bool:
        if full_document(resource) | {"value": ""} != full_document(parse_stored(stored)) | {"value": ""}:
            return False
        match resource:
            case Secret(name=name, value=value):
                return self._unseal(name) == value
            case _:
                return True

    def _unseal(self, name: str) -> str:
        try:
            return unseal(self._sealed.get(name, ""), self._data_dir.seal_key, name)
        except UnsealFailed:  # sealed with another seal.key: storing the given value repairs it
            return ""

    def _save_secret(self, resource: Resource, new: bool) -> str:
        """Store the secret of a Secret or Key. The result is the token of a new Key, which is not stored."""
        match resource:
            case Secret(name=name, value=value):
                rows.save_secret(self._connection, name, seal(value, self._data_dir.seal_key, name))
            case Key(name=name) if new:
                token = mint_key(KEY_ENV, secrets.token_bytes(ID_BYTES), secrets.token_bytes(SECRET_BYTES))
                key_parts = parse_key(token.encode())
                assert key_parts is not None  # minted a line above
                key_id, secret = key_parts
                hashed = hmac_hex(self._data_dir.pepper, secret)
                rows.save_key(self._connection, rows.StoredKey(name, key_id, hashed))
                return token
        return ""

    def _record(
        self, parsed: ParsedDocument, resource: Resource, stored: StoredResource | None, generation: int
    ) -> None:
        origin = self._origin.description
        if stored is None:
            sentence = f"{parsed.kind} {parsed.name} was created {origin}."
        else:
            changed = ", ".join(_changed_fields(resource, stored)) or "its value"
            sentence = f"{parsed.kind} {parsed.name} was changed {origin}: {changed} (generation {generation})."
        rows.add_event(self._connection, self._now_s, parsed.kind, parsed.name, sentence)


def _changed_fields(resource: Resource, stored: StoredResource) -> list[str]:
    before, after = full_document(parse_stored(stored)), full_document(resource)
    return [field for field in {**before, **after} if field != "value" and before.get(field) != after.get(field)]


def _urls_to_resolve(
    parsed_documents: Iterable[ParsedDocument], resources: Mapping[tuple[str, str], StoredResource]
) -> Iterable[tuple[ParsedDocument, list[tuple[str, str]]]]:
    """The URLs that do not come from the operator's own file."""
    for parsed in parsed_documents:
        urls = _urls_of(parsed)
        stored = resources.get((parsed.kind, parsed.name))
        if urls and not (stored is not None and stored.trusted and _same_urls(parsed, stored)):
            yield parsed, urls


def _urls_of(parsed: ParsedDocument) -> list[tuple[str, str]]:
    """The fields and base URLs of an external Deployment that are text."""
    if parsed.kind != "Deployment":
        return []
    urls = parsed.raw.get("urls")
    listed = [(f"urls[{at}]", url) for at, url in enumerate(urls)] if type(urls) is list else []
    return [(field, url) for field, url in [("url", parsed.raw.get("url")), *listed] if type(url) is str]


def _same_urls(parsed: ParsedDocument, stored: StoredResource) -> bool:
    match parsed.resource, parse_stored(stored):
        case Deployment() as new, Deployment() as old:
            return new.base_urls() == old.base_urls()
        case _:
            return False
