"""The values that expressions read, as plain values that the CEL library takes."""

from fleetgate.core.model import Deployment, Gateway, Key
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.policies.evaluator import EvaluationFailed
from fleetgate.policies.schema import Leaf

ITEMS_MAX = 256  # handing over an item costs 2 to 10 µs, and clients choose how many there are
_SCALARS = frozenset({str, int, float, bool, type(None)})
_CONTAINER: dict[str, object] = {}  # equal to no text or number, and no larger than it


def of_gateway(leaf: Leaf, gateway: Gateway) -> object:
    """A value of the Gateway. Raises: `EvaluationFailed`."""
    return _used(leaf, getattr(gateway, leaf.field))


def of_deployment(leaf: Leaf, deployment: Deployment) -> object:
    """A value of a Deployment. Raises: `EvaluationFailed`."""
    match leaf.field:
        case "labels":
            return _used(leaf, deployment.labels.get(str(leaf.path[0]), ""))
        case "models":
            models = sorted(deployment.models)
            return models if leaf.use == "value" else _used(leaf, models)
        case "tier":
            return _used(leaf, deployment.tier.value)
        case "usd_per_hour" | "usd_per_mtok_input" | "usd_per_mtok_output":
            return _used(leaf, getattr(deployment.price, leaf.field))
    return _used(leaf, getattr(deployment, leaf.field))


def of_key(leaf: Leaf, key: Key) -> object:
    """A value of the client's key. Raises: `EvaluationFailed`."""
    return _used(leaf, key.labels.get(str(leaf.path[0]), "") if leaf.field == "labels" else key.name)


def of_request(leaf: Leaf, facts: RequestAttributes) -> object:
    """A value of the request. Raises: `EvaluationFailed`."""
    match leaf.field:
        case "headers":
            return _used(leaf, facts.headers.get(str(leaf.path[0]), ""))
        case "body":
            return _used(leaf, facts.body.get(leaf.path))
    return _used(leaf, getattr(facts, leaf.field))


def _used(leaf: Leaf, value: object) -> object:
    match leaf.use:
        case "has":
            return value is not None and value != ""
        case "size":
            return _size(value)
        case "items":
            return _items(value, leaf.fields)
    return _scalar(value)


def _scalar(value: object) -> object:
    return value if type(value) in _SCALARS else _CONTAINER


def _size(value: object) -> int:
    match value:
        case None:
            return 0
        case str() | list() | dict():
            return len(value)
    raise EvaluationFailed("a value has no size")


def _items(value: object, fields: tuple[str, ...]) -> list[object]:
    match value:
        case None:
            return []
        case list() if len(value) > ITEMS_MAX:
            raise EvaluationFailed(f"a list has more than {ITEMS_MAX} items")
        case list():
            return [_item(item, fields) for item in value]
    raise EvaluationFailed("a value is no list")


def _item(item: object, fields: tuple[str, ...]) -> object:
    if not fields:
        return _scalar(item)
    match item:
        case dict():
            return {field: _scalar(item.get(field)) for field in fields}
    return dict.fromkeys(fields)
