"""The Snapshot of a fleet file without a store, secrets or reachable addresses, for simulations."""

from fleetgate.control.resources.apply import ChangeOrigin, find_problems
from fleetgate.control.snapshot.builder import build, managed_of, snapshot_parts
from fleetgate.control.store.repository import StoredResource
from fleetgate.core.model import Snapshot
from fleetgate.manifests import Unreadable, read_file

SIMULATION = ChangeOrigin("in a simulation")  # not trusted: the rules for a trusted file concern only a real fleet


def read_fleet(path: str) -> Snapshot:
    """Read a file of resources into a Snapshot. A managed Deployment has all its desired replicas.

    Raises: `Unreadable` with every mistake.
    """
    parsed_documents, problems = find_problems(
        [_without_value(document) for document in read_file(path)], {}, SIMULATION
    )
    if problems:
        raise Unreadable([problem.sentence(path) for problem in problems])
    parts = snapshot_parts(
        {(d.kind, d.name): StoredResource(d.kind, d.name, dict(d.raw), 1, False, 0.0, 0.0) for d in parsed_documents}
    )
    # The ports only make the addresses of replicas different.
    ready = {
        managed.name: tuple(f"http://127.0.0.1:{port}/v1" for port in range(1, managed.replicas_desired + 1))
        for managed in managed_of(parts)
    }
    return build(
        parts,
        ready,
        assign=lambda space, owners: {owner: slot for slot, owner in enumerate(owners)},
        credential=lambda deployment, secret: "",
    )


def _without_value(document: object) -> object:
    """A Secret with a placeholder for its value, which a simulation does not need."""
    match document:
        case {"kind": "Secret", **rest}:
            kept = {name: value for name, value in rest.items() if name != "value_from"}
            return {**kept, "kind": "Secret", "value": "-"}
        case _:
            return document
