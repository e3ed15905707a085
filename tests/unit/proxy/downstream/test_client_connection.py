"""The client's side of a connection: framing, limits, local answers and slow clients, without a socket."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetgate.core.api_keys import hmac_hex, mint_key, parse_key
from fleetgate.core.model import Key, Policy
from fleetgate.proxy.downstream.authenticator import MEMO_MAX, Authenticator, may_use
from fleetgate.proxy.downstream.client_connection import HEAD_WAIT_MAX_S, IDLE_MAX_S
from fleetgate.proxy.downstream.local_responses import LocalResponder
from fleetgate.proxy.downstream.request_authorizer import RequestAuthorizer
from fleetgate.proxy.downstream.request_intake import RequestIntake
from tests.conformance.transport_rig import BODY, whole
from tests.loopback.rig import gateway
from tests.unit.proxy.plane_rig import Plane, code_of, header_of, plane_in, status_of

TOKEN = mint_key("test", b"i" * 7, b"s" * 32).encode()
PARSED = parse_key(TOKEN)
assert PARSED is not None
KEY = Key(id=PARSED[0], name="k", secret_hmac=hmac_hex(b"p" * 32, PARSED[1]))
GET = b"GET %b HTTP/1.1\r\nhost: chat.test\r\n%b\r\n"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Plane]:
    with plane_in(tmp_path, auth="keys") as made:
        made.take(keys=(KEY,))
        yield made


def get(plane: Plane, path: bytes = b"/v1/models", headers: bytes = b"") -> tuple[int, bytes]:
    client = plane.connect()
    client.send(GET % (path, headers))
    plane.run()
    return status_of(client), bytes(client.received)


# --- heads ---


def test_the_parts_are_those_that_this_test_means(plane: Plane) -> None:
    services = plane.services.connection_services
    assert isinstance(services.authorizer, RequestAuthorizer) and isinstance(services.intake, RequestIntake)
    assert isinstance(services.responder, LocalResponder)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\nhost: other.test\r\n\r\n", 404),
        (b"GET /v1/surprise HTTP/1.1\r\nhost: chat.test\r\n\r\n", 404),
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\n\r\n", 405),
        (b"GET /v1/models HTTP/1.1\r\nhost: chat.test\r\norigin: http://evil.example\r\n\r\n", 403),
        (b"OPTIONS /v1/models HTTP/1.1\r\nhost: chat.test\r\n\r\n", 204),
        (b"GET  /v1/models HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nx: " + b"x" * 70_000, 431),
    ],
)
def test_heads_that_lead_nowhere(plane: Plane, head: bytes, status: int) -> None:
    client = plane.connect()
    client.send(head)
    plane.run()
    assert status_of(client) == status
    plane.wait(3.0)


def test_a_compressed_body_is_refused(plane: Plane) -> None:
    client = plane.ask(headers=b"content-encoding: gzip\r\n")
    assert status_of(client) == 415 and header_of(client, "accept-encoding") == "identity"


def test_models_are_listed_without_an_engine(plane: Plane) -> None:
    assert b'"id":"m"' in get(plane)[1] and get(plane, b"/v1/models/m")[0] == 200
    assert get(plane, b"/v1/models/x")[0] == 404 and not plane.engines[0].dials


def test_a_body_that_is_not_json_or_of_an_unknown_model_is_refused(plane: Plane) -> None:
    client = plane.ask(model="x")
    assert (status_of(client), code_of(client)) == (404, "model_not_found")
    client.read_all()
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\ncontent-length: 2\r\n\r\n{]")
    plane.run()
    assert status_of(client) == 400 and not client.is_closed


def test_a_policy_denies_before_anything_is_placed(plane: Plane) -> None:
    plane.take(policies=(Policy(name="never", require="false"),))
    client = plane.ask()
    assert (status_of(client), code_of(client)) == (403, "policy_denied") and b"never" in client.received


# --- keys ---


def test_keys_are_checked(keyed: Plane) -> None:
    bearer = b"authorization: Bearer %b\r\n"
    assert get(keyed, headers=bearer % TOKEN)[0] == 200
    assert get(keyed)[0] == get(keyed, headers=bearer % (TOKEN[:-1] + b"x"))[0] == 401
    assert get(keyed, headers=b"authorization: Basic abc\r\n")[0] == 401


def test_a_key_that_has_expired_or_is_of_another_gateway_is_refused(keyed: Plane) -> None:
    for fields, status in (({"expires_s": time.time() - 1.0}, 401), ({"gateways": ("other",)}, 403)):
        keyed.take(keys=(Key(id=KEY.id, name="k", secret_hmac=KEY.secret_hmac, **fields),))
        assert get(keyed, headers=b"authorization: Bearer %b\r\n" % TOKEN)[0] == status


def test_the_memo_of_tokens_is_bounded(keyed: Plane) -> None:
    authenticator, table = Authenticator(b"p" * 32), keyed.services.active.current
    for number in range(MEMO_MAX + 10):
        assert authenticator.find(b"Bearer %d" % number, table) is None
    assert len(table.key_memo) <= MEMO_MAX
    assert authenticator.find(b"bearer " + TOKEN, table) == KEY
    assert may_use(KEY, gateway("one")) and not may_use(Key(id="", name="", secret_hmac="", gateways=("x",)), gateway())


# --- framing and time ---


def test_pipelined_requests_wait_for_the_answer_before_them(plane: Plane) -> None:
    client = plane.ask()
    client.send(GET % (b"/v1/models", b""))
    plane.run()
    assert not client.received
    plane.answer(plane.engine(0), whole(BODY))
    first, second = client.received.find(BODY), client.received.find(b'"object":"list"')
    assert 0 < first < second


def test_a_client_that_sends_much_while_it_waits_is_not_read(plane: Plane) -> None:
    client = plane.ask()
    for _ in range(10):
        client.send(bytes(32 * 1024))
        plane.run()
    assert client.is_paused
    client.reset()
    plane.run()


def test_a_body_in_pieces_is_waited_for_and_continue_is_said(plane: Plane) -> None:
    client = plane.connect()
    body = b'{"model":"m","messages":[]}'
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    )
    client.send(head % len(body))
    plane.run()
    assert client.read_all() == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send_bytewise(body)
    plane.run()
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(client) == 200


@pytest.mark.parametrize(
    ("sent", "after_s", "status"),
    [(b"", HEAD_WAIT_MAX_S, 0), (b"GET /v1", HEAD_WAIT_MAX_S, 408), (GET % (b"/v1/models", b""), IDLE_MAX_S, 200)],
)
def test_a_client_that_says_nothing_more_is_closed(plane: Plane, sent: bytes, after_s: float, status: int) -> None:
    client = plane.connect()
    client.send(sent)
    plane.wait(after_s - 1.0)
    assert not client.is_closed
    plane.wait(5.0)
    assert client.is_closed and (status_of(client) if client.received else 0) == status


def test_a_slow_body_is_given_up_and_its_budget_is_free_again(plane: Plane) -> None:
    client = plane.connect()
    client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\ncontent-length: 1000000\r\n\r\n{")
    plane.wait(10.0)
    assert status_of(client) == 408 and client.is_closed
    assert not plane.services.limits.bodies._held_bytes


def test_a_client_that_does_not_read_its_answer_is_cut_off(plane: Plane) -> None:
    client = plane.connect()
    client.stop_reading()
    client.send(GET % (b"/v1/models", b""))
    plane.wait(200.0)
    assert client.is_closed and client.is_aborted and not plane.services.limits.count
