"""Every error that Fleetgate itself answers with: status, code, message, when it happens, and what a client can do.

docs/reference/client-api.md is generated from it. An error that an engine answers with is passed on unchanged.
"""

from typing import NamedTuple

RETRY_LATER = "retry after `Retry-After`"


class ErrorCode(NamedTuple):
    """One error. Shape: `message` has `{names}` for values; a stream's error event has no status of its own."""

    status: int
    code: str
    message: str
    when: str
    retry: str = ""

    def filled(self, **values: object) -> tuple[int, str, str]:
        """Status, code and message with these values, as `RequestRejected` takes them."""
        return self.status, self.code, self.message.format_map(values)


# --- the request itself ---

MALFORMED_REQUEST = ErrorCode(
    400, "invalid_request", "{reason}", "bad framing; the connection is closed", "correct the request"
)
INVALID_JSON = ErrorCode(
    400,
    "invalid_json",
    "{reason}",
    "the body is not JSON (`NaN` and `Infinity` are not) or not UTF-8",
    "correct the body",
)
INVALID_BODY = ErrorCode(
    400,
    "invalid_request",
    "{reason}",
    "`model` is missing, twice or not a string; a number from 1e309 or with 4,300 digits or more (checked in bodies up "
    "to 1 MB and 50,000 values)",
    "`param` names the field",
)
INVALID_IDEMPOTENCY_KEY = ErrorCode(
    400,
    "invalid_request",
    "Idempotency-Key must have 1 to {bytes_max} ASCII characters",
    "`Idempotency-Key` is over 255 characters or not ASCII",
    "correct the header",
)
REQUEST_TOO_SLOW = ErrorCode(
    408,
    "invalid_request",
    "the request did not arrive in time; the gateway closes the connection",
    "head or body came too slowly",
    "send it again",
)
BODY_TOO_LARGE = ErrorCode(
    413, "invalid_request", "the request body is over {mib} MiB", "the body is over 20 MiB", "send a smaller body"
)
BODY_COMPRESSED = ErrorCode(
    415,
    "invalid_request",
    "content-encoding {encoding!r} is not supported; send the body uncompressed, without that header",
    "the body is compressed",
    "send it uncompressed",
)
UNKNOWN_EXPECT = ErrorCode(
    417, "invalid_request", "{reason}", "an `Expect` header other than `100-continue`", "remove the header"
)
HEAD_TOO_LARGE = ErrorCode(
    431,
    "invalid_request",
    "the request head is over {bytes_max} bytes; send fewer or shorter headers",
    "the head is over 32 KiB or has more than 64 fields",
    "send fewer or shorter headers",
)
UNKNOWN_HTTP_VERSION = ErrorCode(505, "invalid_request", "{reason}", "not HTTP/1.0 or HTTP/1.1", "use HTTP/1.1")

# --- Gateway, key, path, model, policies ---

GATEWAY_NOT_FOUND = ErrorCode(
    404, "gateway_not_found", "no Gateway is served at {host}; {fix}", "no Gateway has this Host", "correct the Host"
)
INVALID_API_KEY = ErrorCode(
    401,
    "invalid_api_key",
    "the API key {reason}; send `{hint}`",
    "no key, or one that is unknown, expired or revoked",
    "use a valid key",
)
KEY_NOT_FRESH = ErrorCode(
    503,
    "no_deployment_available",
    "this API key needs a heartbeat of the control plane every {seconds:g} s, and there was none",
    "the key has `require_fresh_s`, and the control plane was silent for longer",
    RETRY_LATER,
)
GATEWAY_NOT_ALLOWED = ErrorCode(
    403,
    "policy_denied",
    "this API key may not use the Gateway {gateway}",
    "the key may not use this Gateway",
    "use another key",
)
ORIGIN_NOT_ALLOWED = ErrorCode(
    403,
    "policy_denied",
    "requests from web pages of another origin need --cors ORIGIN while --auth is none",
    "a web page of another origin, with `--auth none`",
)
POLICY_DENIED = ErrorCode(
    403, "policy_denied", "{reason}", "[policies](policies.md) leave no Deployment", "the message names the policies"
)
UNKNOWN_PATH = ErrorCode(
    404, "unknown_path", "no such path: {path}; this Gateway serves the {protocol}", "no such path", "correct the path"
)
METHOD_NOT_ALLOWED = ErrorCode(
    405, "invalid_request", "{method} is not allowed for this path; use {allowed}", "wrong method", "use one of `Allow`"
)
MODEL_UNKNOWN = ErrorCode(
    404,
    "model_not_found",
    "the model {model!r} does not exist here or this key may not use it; available models: {available}",
    "the Gateway does not serve the model, or the key may not use it",
    "use a model that the message lists",
)
IDEMPOTENCY_KEY_BUSY = ErrorCode(
    409,
    "invalid_request",
    "a request with this Idempotency-Key is in progress; retry when it has ended",
    "a request with this `Idempotency-Key` is in progress",
    RETRY_LATER,
)
IDEMPOTENCY_KEY_OF_A_STREAM = ErrorCode(
    409,
    "invalid_request",
    "a stream with this Idempotency-Key was answered completely, and streams are not kept; use a new key",
    "the answer with this `Idempotency-Key` was a stream",
    "use a new key",
)
IDEMPOTENCY_KEY_TOO_LARGE = ErrorCode(
    409,
    "invalid_request",
    "the answer with this Idempotency-Key is over {kib} KiB and was not kept; use a new key",
    "the answer with this `Idempotency-Key` was over 64 KiB",
    "use a new key",
)
IDEMPOTENCY_KEY_REUSED = ErrorCode(
    422,
    "invalid_request",
    "this Idempotency-Key was used for another request in the last 24 hours; use a new key for each request",
    "the `Idempotency-Key` was used for another request",
    "use a new key",
)

# --- overload of the gateway ---

TOO_MANY_CONNECTIONS_OF_ADDRESS = ErrorCode(
    429,
    "rate_limited",
    "this address has as many connections open as --ip-connections-max allows; reuse connections",
    "more connections from one address than a worker accepts; the connection is closed",
    "reuse connections",
)
TOO_MANY_CONNECTIONS_OF_KEY = ErrorCode(
    429,
    "rate_limited",
    "this API key has as many connections open as --key-connections-max allows; reuse connections",
    "more connections with one key than a worker accepts; the connection is closed",
    "reuse connections",
)
OVERLOADED = ErrorCode(
    503,
    "overloaded",
    "the gateway is short of memory or connections; retry after Retry-After; running answers continue",
    "a worker is short of memory, descriptors or room for bodies; running answers continue",
    f"{RETRY_LATER}; `x-should-retry: true`",
)
INTERNAL_ERROR = ErrorCode(
    500,
    "internal_error",
    "internal error; search the gateway log for this x-request-id",
    "a fault of Fleetgate; its log has a line with the same `x-request-id`",
)

# --- after routing: the codes of `core.exchange.Refuse` ---

QUEUE_FULL = ErrorCode(
    429,
    "queue_full",
    "every Deployment that serves this model is full and the queue too; retry after Retry-After",
    "all Deployments are full, and `queue_max` requests wait already",
    RETRY_LATER,
)
CAPACITY_EXHAUSTED = ErrorCode(
    429,
    "capacity_exhausted",
    "every Deployment that serves this model is full; retry after Retry-After",
    "all Deployments are full for as long as the request may wait or would have to wait (then at once), or engines "
    "answered 429",
    RETRY_LATER,
)
MODEL_MISSING = ErrorCode(
    404,
    "model_not_found",
    "no Deployment of this Gateway serves this model at this path now",
    "the engines do not know the model at this path",
)
UPSTREAM_ERROR = ErrorCode(
    502,
    "upstream_error",
    "every Deployment that was tried failed before its answer began",
    "every Deployment that was tried failed before its answer began",
    "as `x-should-retry` says",
)
UPSTREAM_AUTH_ERROR = ErrorCode(
    502,
    "upstream_auth_error",
    "the engines refused the credential of this Gateway; its operator must renew the Secret",
    "the engines refuse the Gateway's own credential",
    "do not retry; the operator renews the Secret",
)
UPSTREAM_TLS_ERROR = ErrorCode(
    502,
    "upstream_tls_error",
    "no Deployment has a TLS certificate that verifies",
    "no Deployment has a certificate that verifies",
    "do not retry",
)
POISON_REQUEST = ErrorCode(
    502,
    "poison_request",
    "two engines ended while they processed this request; the gateway does not send it again",
    "two engines ended while they processed this request",
    "do not retry",
)
NO_DEPLOYMENT_AVAILABLE = ErrorCode(
    503,
    "no_deployment_available",
    "no Deployment that serves this model is up; retry after Retry-After",
    "no Deployment of the model is up",
    RETRY_LATER,
)
SHUTTING_DOWN = ErrorCode(
    503,
    "shutting_down",
    "the gateway stopped before the answer was complete; any answer above is incomplete",
    "the gateway stopped, and its `--grace-s` was over before the answer began; in a stream, before it ended",
    f"{RETRY_LATER}; `x-should-retry: true`",
)
UPSTREAM_TIMEOUT = ErrorCode(
    504,
    "upstream_timeout",
    "no Deployment began its answer in time",
    "no Deployment began its answer in time",
    "as `x-should-retry` says",
)
KEY_REVOKED = ErrorCode(
    401,
    "invalid_api_key",
    "the API key was revoked during this request; any answer above is incomplete",
    "a key with `kill_streams` was revoked during the request",
    "use a valid key",
)
UPSTREAM_INTERRUPTED = ErrorCode(
    502,
    "upstream_interrupted",
    "the connection to the Deployment was lost; the answer above is incomplete",
    "only in a stream: the Deployment failed after the first content, and no other could continue the answer",
    "send the request again",
)

ERRORS = {name: error for name, error in list(globals().items()) if isinstance(error, ErrorCode)}
_AFTER_ROUTING = (
    QUEUE_FULL,
    CAPACITY_EXHAUSTED,
    MODEL_MISSING,
    UPSTREAM_ERROR,
    UPSTREAM_AUTH_ERROR,
    UPSTREAM_TLS_ERROR,
    POISON_REQUEST,
    NO_DEPLOYMENT_AVAILABLE,
    SHUTTING_DOWN,
    UPSTREAM_TIMEOUT,
    KEY_REVOKED,
    UPSTREAM_INTERRUPTED,
)
MESSAGES = {error.code: error.message for error in _AFTER_ROUTING}  # by the code of a Refuse or an Interrupt
