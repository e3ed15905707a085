"""Changes to the resources: whole sets of documents, all or nothing, in one transaction."""

import asyncio
import secrets as dice
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
    """What became of one document.

    Shape: `outcome` is created, changed, unchanged or deleted; `key` is given for a new Key only.
    """

    kind: str
    name: str
    outcome: str
    generation: int
    key: str = ""


class GenerationConflict(Exception):
    """The generation given is not the stored one; `current` is, 0 for what does not exist."""

    def __init__(self, kind: str, name: str, given: int, current: int) -> None:
        if given == 0:
            text = f"{kind}/{name} exists already, at generation {current}; change it with PUT or choose another name"
        else:
            state = f"is at generation {current}" if current else "does not exist"
            text = f"{kind}/{name} {state}, not at {given}; read it again and repeat the change"
        super().__init__(text)
        self.current = current


class ChangeOrigin(msgspec.Struct, frozen=True):
    """Whose documents these are. Shape: `trusted` for the machine's operator's own file; `says` ends an Event."""

    says: str
    trusted: bool = False


API = ChangeOrigin("through the API")
CONFIG = ChangeOrigin("from the --config file", trusted=True)


class CheckedDocuments(msgspec.Struct, frozen=True):
    """Documents without mistakes, with the Deployments whose URLs were looked up."""

    drafts: tuple[ParsedDocument, ...]
    looked_up: frozenset[str] = frozenset()


def full_document(resource: Resource) -> dict[str, Any]:
    """A resource with its defaults filled in, for comparing and showing."""
    return resource.model_dump(exclude_none=True, exclude={"generation", *READ_ONLY}, mode="json")


def parse_stored(stored: StoredResource) -> Resource:
    """The resource that is kept, as values. A Secret's value is not among them."""
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
        """Look for every mistake, at most with look-ups of names and never inside a transaction.

        Raises: `ResourceRefused` with all of them.
        """
        world, drafts, problems = await asyncio.to_thread(self._look, documents, origin)
        looked_up: set[str] = set()
        if not origin.trusted:
            for draft, urls in _urls_to_look_up(drafts, world):
                looked_up.add(draft.name)
                for field, url in urls:
                    denied = await egress.check_url(url, self._ranges)
                    if denied is not None:
                        problems.append(draft.problem(field, denied.message, denied.fix))
        refuse_if_any(problems)
        return CheckedDocuments(tuple(drafts), frozenset(looked_up))

    def _look(
        self, documents: Sequence[object], origin: ChangeOrigin
    ) -> tuple[rows.StoredResources, list[ParsedDocument], list[Problem]]:
        with self._database.read() as connection:
            world = rows.load_resources(connection)
        return world, *find_problems(documents, world, origin)

    def apply(
        self, checked: CheckedDocuments, origin: ChangeOrigin, dry_run: bool = False, confirmed: bool = False
    ) -> list[ApplyResult]:
        """Write documents, all or none. The operator's own file is not asked about: at a start nobody can answer.

        Raises: `ResourceRefused` for what changed in the store since the check, `GenerationConflict` for another
        generation, `ConfirmationRequired` for what takes away so much that it may be a mistake.
        """
        with self._database.write() as connection:
            world = rows.load_resources(connection)
            documents = {(stored.kind, stored.name): stored.document for stored in world.values()}
            refuse_if_any(references.check(checked.drafts, documents))
            if not (confirmed or dry_run or origin.trusted):
                changed = {(draft.kind, draft.name): draft.raw for draft in checked.drafts}
                require_confirmation(removal_warning(documents, {**documents, **changed}))
            writer = _Writer(connection, self._data_dir, origin, dry_run)
            return [writer.write(draft, world, checked.looked_up) for draft in checked.drafts]

    def delete(
        self, kind: str, name: str, generation: int | None = None, confirmed: bool = False, origin: ChangeOrigin = API
    ) -> ApplyResult | None:
        """Delete a resource; None when there is none.

        Raises: `ResourceRefused` naming the resources that still use it, `GenerationConflict` for another generation,
        `ConfirmationRequired` as `apply` does.
        """
        with self._database.write() as connection:
            world = rows.load_resources(connection)
            stored = world.get((kind, name))
            if stored is None:
                return None
            if generation is not None and generation != stored.generation:
                raise GenerationConflict(kind, name, generation, stored.generation)
            documents = {(other.kind, other.name): other.document for other in world.values()}
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
            rows.add_event(connection, time.time(), kind, name, f"{kind} {name} was deleted {origin.says}.")
            return ApplyResult(kind, name, "deleted", stored.generation)


def find_problems(
    documents: Sequence[object], world: rows.StoredResources, origin: ChangeOrigin
) -> tuple[list[ParsedDocument], list[Problem]]:
    """Every mistake that can be seen without asking the network."""
    drafts, problems = parse_documents(documents)
    problems += references.check(drafts, {identity: stored.document for identity, stored in world.items()})
    if origin.trusted:
        for draft in drafts:
            problems.extend(_operator_problems(draft, world.get((draft.kind, draft.name))))
    return drafts, sorted(problems, key=lambda problem: problem.document)


def _operator_problems(draft: ParsedDocument, stored: StoredResource | None) -> Iterable[Problem]:
    """What only matters in a --config file."""
    if draft.kind == "Key" and stored is None:
        fix = f"run `fleetgate keys create {draft.name}`"
        yield draft.problem("", "a --config file cannot hand out a new key", fix)
    given = draft.resource.generation if draft.resource is not None else None
    if given is not None and given != (stored.generation if stored else 0):
        # The file is applied at every start, and at the second one its own change has moved the generation.
        yield draft.problem("generation", f"{given} is not the stored one", "remove `generation:` from the file")
    for field, url in _urls_of(draft):
        denied = egress.check_literal(url)
        if denied is not None:
            yield draft.problem(field, denied.message, denied.fix)


def require_confirmation(sentence: str) -> None:
    """Raises: `ConfirmationRequired` with the sentence, if there is one."""
    if sentence:
        raise ConfirmationRequired(sentence)


def refuse_if_any(problems: Sequence[Problem]) -> None:
    """Raises: `ResourceRefused` with the mistakes, if there are any."""
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
        self, draft: ParsedDocument, world: Mapping[tuple[str, str], StoredResource], looked_up: frozenset[str]
    ) -> ApplyResult:
        """Write one document, if it says something new."""
        resource = draft.resource
        if resource is None:
            raise ResourceRefused("a document with mistakes cannot be written")
        stored = world.get((draft.kind, draft.name))
        current = stored.generation if stored else 0
        if resource.generation is not None and resource.generation != current:
            raise GenerationConflict(draft.kind, draft.name, resource.generation, current)
        trusted = self._trust(draft, stored, looked_up)
        if stored is not None and trusted == stored.trusted and self._same(resource, stored):
            return ApplyResult(draft.kind, draft.name, "unchanged", stored.generation)
        outcome = "changed" if stored else "created"
        if self._dry_run:
            return ApplyResult(draft.kind, draft.name, outcome, current + 1)
        document = {field: value for field, value in draft.raw.items() if field not in HIDDEN_FIELDS}
        created_s = stored.created_s if stored else self._now_s
        rows.save_resource(
            self._connection,
            StoredResource(draft.kind, draft.name, document, current + 1, trusted, created_s, self._now_s),
        )
        self._record(draft, resource, stored, current + 1)
        return ApplyResult(draft.kind, draft.name, outcome, current + 1, self._secrets(resource, stored is None))

    def _trust(self, draft: ParsedDocument, stored: StoredResource | None, looked_up: frozenset[str]) -> bool:
        """Whether the operator's own file vouches for a Deployment's URLs, also after a change that leaves them."""
        if draft.kind != "Deployment":
            return False
        if self._origin.trusted:
            return True
        if draft.name in looked_up or not _urls_of(draft):
            return False
        if stored is not None and stored.trusted and _same_urls(draft, stored):
            return True
        message = f"{draft.label} was changed by someone else meanwhile; send it again"
        raise ResourceRefused(message, [draft.problem("url", "was changed meanwhile", "send it again")], conflict=True)

    def _same(self, resource: Resource, stored: StoredResource) -> bool:
        if full_document(resource) | {"value": ""} != full_document(parse_stored(stored)) | {"value": ""}:
            return False
        match resource:
            case Secret(name=name, value=value):
                return self._opened(name) == value
            case _:
                return True

    def _opened(self, name: str) -> str:
        try:
            return unseal(self._sealed.get(name, ""), self._data_dir.seal_key, name)
        except UnsealFailed:  # seal.key is another one: the value given now mends it
            return ""

    def _secrets(self, resource: Resource, new: bool) -> str:
        """Keep what must not be readable; a new Key's text is returned, this once."""
        match resource:
            case Secret(name=name, value=value):
                rows.save_secret(self._connection, name, seal(value, self._data_dir.seal_key, name))
            case Key(name=name) if new:
                token = mint_key(KEY_ENV, dice.token_bytes(ID_BYTES), dice.token_bytes(SECRET_BYTES))
                parsed = parse_key(token.encode())
                assert parsed is not None  # minted a line above
                key_id, secret = parsed
                hashed = hmac_hex(self._data_dir.pepper, secret)
                rows.save_key(self._connection, rows.StoredKey(name, key_id, hashed))
                return token
        return ""

    def _record(
        self, draft: ParsedDocument, resource: Resource, stored: StoredResource | None, generation: int
    ) -> None:
        says = self._origin.says
        if stored is None:
            sentence = f"{draft.kind} {draft.name} was created {says}."
        else:
            changed = ", ".join(_changed_fields(resource, stored)) or "its value"
            sentence = f"{draft.kind} {draft.name} was changed {says}: {changed} (generation {generation})."
        rows.add_event(self._connection, self._now_s, draft.kind, draft.name, sentence)


def _changed_fields(resource: Resource, stored: StoredResource) -> list[str]:
    before, after = full_document(parse_stored(stored)), full_document(resource)
    return [field for field in {**before, **after} if field != "value" and before.get(field) != after.get(field)]


def _urls_to_look_up(
    drafts: Iterable[ParsedDocument], world: Mapping[tuple[str, str], StoredResource]
) -> Iterable[tuple[ParsedDocument, list[tuple[str, str]]]]:
    """The URLs that nobody has vouched for."""
    for draft in drafts:
        urls = _urls_of(draft)
        stored = world.get((draft.kind, draft.name))
        if urls and not (stored is not None and stored.trusted and _same_urls(draft, stored)):
            yield draft, urls


def _urls_of(draft: ParsedDocument) -> list[tuple[str, str]]:
    """The fields and base URLs of an external Deployment, as far as they are text."""
    if draft.kind != "Deployment":
        return []
    urls = draft.raw.get("urls")
    listed = [(f"urls[{at}]", url) for at, url in enumerate(urls)] if type(urls) is list else []
    return [(field, url) for field, url in [("url", draft.raw.get("url")), *listed] if type(url) is str]


def _same_urls(draft: ParsedDocument, stored: StoredResource) -> bool:
    match draft.resource, parse_stored(stored):
        case Deployment() as new, Deployment() as old:
            return new.base_urls() == old.base_urls()
        case _:
            return False
