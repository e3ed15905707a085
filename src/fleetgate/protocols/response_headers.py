"""Every header of a response to a client: when it is there and what it means.

docs/reference/client-api.md is generated from it; a test compares it with the headers that the proxy writes.
"""

from typing import NamedTuple


class ResponseHeader(NamedTuple):
    """One header. Shape: `for_pages` headers are readable by scripts of other origins, in this order."""

    name: str
    when: str
    meaning: str
    for_pages: bool = False


RESPONSE_HEADERS = (
    ResponseHeader(
        "x-request-id", "always", "the request's name; the engine gets it too, and the logs have it", for_pages=True
    ),
    ResponseHeader(
        "x-fleetgate-deployment", "a Deployment answers", "the Deployment that the answer comes from", for_pages=True
    ),
    ResponseHeader("x-fleetgate-region", "a Deployment answers", "its region", for_pages=True),
    ResponseHeader(
        "x-fleetgate-attempts",
        "the request was routed",
        "how many Deployments were tried, the one that answers included",
        for_pages=True,
    ),
    ResponseHeader("content-type", "always but for 204", "the engine's; of Fleetgate's own answers `application/json`"),
    ResponseHeader("openai-processing-ms", "the engine sends it", "the engine's"),
    ResponseHeader("openai-version", "the engine sends it", "the engine's"),
    ResponseHeader("openai-model", "the engine sends it", "the engine's"),
    ResponseHeader("content-length", "the length is known", "bytes of the body"),
    ResponseHeader("transfer-encoding", "a stream to an HTTP/1.1 client", "`chunked`"),
    ResponseHeader("connection", "the last answer of a connection", "`close`"),
    ResponseHeader("date", "always", "the gateway's clock"),
    ResponseHeader("retry-after", "429, 503, and 409 of a request in progress", "seconds until a retry makes sense"),
    ResponseHeader("retry-after-ms", "with most `retry-after`", "the same in milliseconds; official SDKs prefer it"),
    ResponseHeader(
        "x-should-retry",
        "some errors",
        "`true` or `false`; official SDKs obey it",
    ),
    ResponseHeader("idempotent-replayed", "a kept answer of an `Idempotency-Key`", "`true`"),
    ResponseHeader("allow", "405, and answers to OPTIONS", "the methods of this path"),
    ResponseHeader("accept-encoding", "415", "`identity`: bodies must not be compressed"),
    ResponseHeader("access-control-allow-origin", "an `Origin` that `--cors` allows", "that origin"),
    ResponseHeader("access-control-allow-methods", "the same", "methods that a page may use"),
    ResponseHeader("access-control-allow-headers", "the same", "headers that a page may send"),
    ResponseHeader("access-control-expose-headers", "the same", "headers that a page may read"),
    ResponseHeader("vary", "the same", "`origin`"),
)
EXPOSED_HEADERS = ", ".join(header.name for header in RESPONSE_HEADERS if header.for_pages).encode()
