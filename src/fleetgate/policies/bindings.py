"""The values that expressions read, as plain values for the CEL library."""

from fleetgate.core.model import Deployment, Gateway, Key
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.policies.evaluator import EvaluationFailed
from fleetgate.policies.schema import Selector

ITEMS_MAX = 256  # the client chooses the number of items, and passing one to CEL costs 2 to 10 µs
_SCALARS = frozenset({str, int, float, bool, type(None)})
_CONTAINER: dict[str, object] = {}  # stands for a list or object: not equal to, nor ordered with, text or numbers


def of_gateway(selector: Selector, gateway: Gateway) -> object:
    """A value of the Gateway. Raises: `EvaluationFailed`."""
    return _convert(selector, getattr(gateway, selector.field))


def of_deployment(selector: Selector, deployment: Deployment) -> object:
    """A value of a Deployment. Raises: `EvaluationFailed`."""
    match selector.field:
        case "labels":
            return _convert(selector, deployment.labels.get(str(selector.path[0]), ""))
        case "models":
            models = sorted(deployment.models)
            return models if selector.use == "value" else _convert(selector, models)
        case "tier":
            return _convert(selector, deployment.tier.value)
        case "usd_per_hour" | "usd_per_mtok_input" | "usd_per_mtok_output":
            return _convert(selector, getattr(deployment.price, selector.field))
    return _convert(selector, getattr(deployment, selector.field))


def of_key(selector: Selector, key: Key) -> object:
    """A value of the client's key. Raises: `EvaluationFailed`."""
    return _convert(selector, key.labels.get(str(selector.path[0]), "") if selector.field == "labels" else key.name)


def of_request(selector: Selector, attributes: RequestAttributes) -> object:
    """A value of the request. Raises: `EvaluationFailed`."""
    match selector.field:
        case "headers":
            return _convert(selector, attributes.headers.get(str(selector.path[0]), ""))
        case "body":
            return _convert(selector, attributes.body.get(selector.path))
    return _convert(selector, getattr(attributes, selector.field))


def _convert(selector: Selector, value: object) -> object:
    match selector.use:
        case "has":
            return value is not None and value != ""
        case "size":
            return _size(value)
        case "items":
            return _items(value, selector.fields)
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
    raise EvaluationFailed("a value is not a list")


def _item(item: object, fields: tuple[str, ...]) -> object:
    if not fields:
        return _scalar(item)
    match item:
        case dict():
            return {field: _scalar(item.get(field)) for field in fields}
    return dict.fromkeys(fields)
