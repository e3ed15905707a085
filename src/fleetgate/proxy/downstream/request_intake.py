"""Makes a routable request, or a response of the gateway itself, from an authorized head and a complete body."""

from typing import NamedTuple

from fleetgate.core.routing.policy_decision import ALLOWED
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.proxy.downstream.idempotency import IdempotencyStore, IdempotentReplay
from fleetgate.proxy.downstream.local_responses import RequestRejected
from fleetgate.proxy.downstream.policy_filter import PolicyFilter
from fleetgate.proxy.request.request_context import ReceivedRequest, RequestContext
from fleetgate.proxy.request.response.heads import JSON


class LocalResponse(NamedTuple):
    """A response without a Deployment. Shape: `extra` are header lines; `code` of its counter, empty for none."""

    status: int
    body: bytes
    extra: bytes
    code: str


class RequestIntake:
    """Reads requests for one worker."""

    def __init__(self, policies: PolicyFilter, idempotency: IdempotencyStore) -> None:
        self._policies = policies
        self._idempotency = idempotency

    def receive(self, context: RequestContext, body: bytes) -> ReceivedRequest | LocalResponse:
        """Read the body, find the route, evaluate policies, and claim the idempotency key, in this order.

        Raises: `RequestRejected`.
        """
        operation = context.operation
        if operation is None:
            return _models(context)
        try:
            info = context.protocol.parse_request(body)
            route = context.gateway.routes.get(info.model)
            if route is None or (context.key.models and info.model not in context.key.models):
                raise RequestRejected(*_no_model(info.model, context), "model")
            decision, claim = ALLOWED, None
            if not context.gateway.policies.is_empty:
                decision = self._policies.evaluate(context, info, body)
            if context.idempotency_key:
                claim = self._idempotency.claim(context, body)
        except InvalidBody as error:
            raise RequestRejected(400, error.code, error.message, error.param, context.response_headers) from None
        except RequestRejected as rejected:
            rejected.extra += context.response_headers
            raise
        if isinstance(claim, IdempotentReplay):
            extra = claim.headers + context.response_headers + b"idempotent-replayed: true\r\n"
            return LocalResponse(200, claim.body, extra, "replayed")
        return ReceivedRequest(context, operation, route, info, body, decision, claim)


def _models(context: RequestContext) -> LocalResponse:
    protocol = context.protocol
    name = context.path.removeprefix(protocol.MODELS_PATH).removeprefix(b"/").decode("ascii", "replace")
    models, key = context.gateway.routes, context.key
    allowed = [model for model in models if not key.models or model in key.models]
    if name and name not in allowed:
        raise RequestRejected(*_no_model(name, context), "model")
    owners = dict.fromkeys(allowed, "fleetgate")
    body = protocol.model_body(name, "fleetgate") if name else protocol.models_body(owners)
    return LocalResponse(200, body, JSON + context.response_headers, "")


def _no_model(name: str, context: RequestContext) -> tuple[int, str, str]:
    models, key = sorted(context.gateway.routes), context.key
    known = [model for model in models if not key.models or model in key.models]
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    return errors.MODEL_UNKNOWN.filled(model=name[:200], available=shown or "none")
