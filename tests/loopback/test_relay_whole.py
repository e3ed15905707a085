"""Answers that are not streamed: checked whole before a byte goes out, so that any fault can still move."""

import socket
from collections.abc import Iterator

import msgspec
import pytest

from fleetgate.core.model import Endpoint
from fleetgate.ipc.sealed_secret import seal
from tests.loopback.wall_client import request
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane

SECOND_IS_GOOD = {"models": {name: "ok" for name in EVERY_MODEL}}
SECOND_IS_THE_SAME: dict[str, object] = {}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2) as made:
        yield made


GOOD = ["ok", "in-pieces", "odd-chunks", "until-close", "old-http", "informed-first", "extra-bytes", "evil-headers"]
BAD = [
    "rst-before", "fin-before", "rst-mid", "fin-mid", "truncated-json", "long-length", "short-length",
    "garbage", "two-lengths", "tiny-chunks", "not-text",
    "length-and-chunks", "bad-chunk", "bare-lf", "huge-head", "switch", "empty-json",
    "not-json", "500", "502", "503", "503-full", "504", "529", "429", "401", "403", "404", "302", "304", "204",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_answer_is_relayed_byte_for_byte(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    with two.client() as client:
        for _ in range(3):
            answer = client.ask(request(name))
            assert answer.status == 200 and answer.whole
            assert answer.body == answer_of(name)
            assert answer.headers["x-fleetgate-deployment"] == "one"
            assert answer.headers["x-fleetgate-attempts"] == "1"
    assert two.seen(0) == [name] * 3 and not two.seen(1)
    two.wait_idle()


def test_a_connection_with_bytes_nobody_asked_for_is_never_used_again(two: Plane) -> None:
    two.use({})
    with two.client() as client:
        for _ in range(4):
            assert client.ask(request("extra-bytes")).body == answer_of("extra-bytes")
    assert len(two.wall.carriers) == 4


@pytest.mark.parametrize("count", [20, 5000])
def test_interim_answers_are_dropped_however_many(two: Plane, count: int) -> None:
    two.use({})
    answer = two.ask(request("informed-first", wall={"count": count}))
    assert answer.status == 200 and answer.body == answer_of("informed-first")


@pytest.mark.parametrize("name", BAD)
def test_rows_10_15_17_18_and_44_any_fault_moves_invisibly(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    answer = two.ask(request(name))
    assert answer.status == 200 and answer.whole
    assert answer.json()["model"] == name
    assert answer.headers["x-fleetgate-deployment"] == "two"
    assert answer.headers["x-fleetgate-attempts"] == "2"
    assert two.seen(0) == [name] and two.seen(1) == ["ok"]
    two.wait_idle()


@pytest.mark.parametrize("name", ["torn-end", "error-mid", "damaged", "usage-first"])
def test_row_11_a_stream_that_nobody_asked_for_moves_invisibly(two: Plane, name: str) -> None:
    """Its client could not tell a whole one from one that broke off."""
    two.use({}, SECOND_IS_GOOD)
    answer = two.ask(request(name))
    assert answer.status == 200 and answer.whole and answer.json()["model"] == name
    assert (answer.headers["x-fleetgate-deployment"], answer.headers["x-fleetgate-attempts"]) == ("two", "2")
    two.wait_idle()


ALONE = {
    "rst-before": (502, "upstream_error"),
    "fin-mid": (502, "upstream_error"),
    "truncated-json": (502, "upstream_error"),
    "garbage": (502, "upstream_error"),
    "500": (502, "upstream_error"),
    "503": (502, "upstream_error"),
    "302": (502, "upstream_error"),
    "429": (429, "capacity_exhausted"),
    "529": (429, "capacity_exhausted"),
    "503-full": (429, "capacity_exhausted"),
    "401": (502, "upstream_auth_error"),
    "403": (502, "upstream_auth_error"),
    "404": (404, "model_not_found"),
    "error-first": (502, "upstream_error"),
    "full-first": (429, "capacity_exhausted"),
    "empty": (502, "upstream_error"),
}
STREAMS = ("error-first", "full-first", "empty")


@pytest.mark.parametrize("name", ALONE)
def test_rows_17_18_20_and_21_when_all_fail_the_client_gets_one_clear_error(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_THE_SAME)
    status, code = ALONE[name]
    with two.client() as client:
        answer = client.ask(request(name, stream=name in STREAMS))
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (status, code), error
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-fleetgate-attempts"] == "2" and answer.headers["x-request-id"]
        assert "says no" not in error["message"]
        # The client's connection is as good as before; a credential that was refused is not used for anything else.
        denied = {502} if code == "upstream_auth_error" else set()
        assert client.ask(request("ok")).status in {200, 429, 503} | denied
    assert two.seen(0)[0] == name and two.seen(1)[0] == name
    two.wait_idle()


def test_row_16_retry_after_of_a_full_upstream_reaches_the_client(two: Plane) -> None:
    two.use({})
    answer = two.ask(request("429"))
    assert answer.headers["retry-after"] == "7" and answer.headers["retry-after-ms"] == "7000"
    assert "x-should-retry" not in answer.headers


def test_an_sdk_that_retries_already_is_told_not_to(two: Plane) -> None:
    two.use({})
    first = two.ask(request("500"))
    again = two.ask(request("500", headers=["x-stainless-retry-count: 1"]))
    assert first.headers["x-should-retry"] == "true" and again.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", ["400", "422"])
def test_row_22_an_error_that_is_the_clients_goes_back_as_it_is(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    for _ in range(5):  # and never counts against the Deployment
        answer = two.ask(request(name))
        assert answer.status == int(name)
        assert answer.body == b'{"error":{"message":"upstream says no"}}'
        assert answer.headers["x-fleetgate-deployment"] == "one" and "set-cookie" not in answer.headers
    assert not two.seen(1)


def test_row_1_nobody_listens(two: Plane) -> None:
    two.use({}, SECOND_IS_GOOD)
    two.wall.fall()
    try:
        for _ in range(5):
            answer = two.ask(request("ok"))
            assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "two"
    finally:
        two.wall.rise()
    assert not two.seen(0)


def test_row_19_all_down_is_503_with_retry_after(two: Plane) -> None:
    two.use({}, {})
    for wall in two.walls:
        wall.fall()
    try:
        for _ in range(6):
            answer = two.ask(request("ok"))
            assert (answer.status, answer.code) == (503, "no_deployment_available")
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        for wall in two.walls:
            wall.rise()
    two.wait_idle()


def test_other_endpoints_of_a_deployment_are_tried_before_the_client_hears_of_it(two: Plane) -> None:
    """`urls` of one Deployment: one refuses, one answers 500, one is well."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    (one,) = two.deployments({})
    good = one.endpoints[0]
    for number, bad_port in enumerate((port, two.walls[1].port)):
        bad = Endpoint(slot=3000 + number, scheme="http", host="127.0.0.1", port=bad_port, base_path="/v1")
        both = msgspec.structs.replace(one, endpoints=(bad, good))
        two.walls[1].replies["ok"] = two.walls[1].replies["500"]
        try:
            two.publish([both])
            for _ in range(8):
                answer = two.ask(request("ok"))
                assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "one"
        finally:
            two.walls[1].replies["ok"] = two.walls[0].replies["ok"]
    two.wait_idle()


# --- headers ----------------------------------------------------------------------------------------------------------


def test_the_upstream_sees_only_what_it_may(two: Plane) -> None:
    two.use({})
    secret = ["Authorization: Bearer client-secret", "Cookie: a=b", "X-Api-Key: k", "X-Forwarded-For: 1.2.3.4"]
    other = ["OpenAI-Organization: o", "User-Agent: u", "Proxy-Authorization: p", "X-Stainless-Lang: python"]
    passed = ["Accept: text/event-stream", "traceparent: 00-a-b-01", "tracestate: x=y", "OpenAI-Beta: assistants=v2"]
    answer = two.ask(request("ok", headers=[*secret, *other, *passed, "X-Session-Id: s", "X-Request-Id: theirs"]))
    headers = two.wall.seen[-1].headers
    assert headers["x-request-id"] == [answer.headers["x-request-id"]] != ["theirs"]
    assert headers["host"] == [f"127.0.0.1:{two.wall.port}"]
    assert headers["accept-encoding"] == ["identity"]
    assert headers["user-agent"] == ["fleetgate"]
    assert headers["accept"] == ["text/event-stream"] and headers["openai-beta"] == ["assistants=v2"]
    assert set(headers) == {
        "host", "user-agent", "accept-encoding", "content-type", "accept", "traceparent", "tracestate", "openai-beta",
        "x-session-id", "x-request-id", "content-length",
    }  # fmt: skip
    assert b"client-secret" not in two.wall.seen[-1].head


@pytest.mark.parametrize(
    "kind", [[], ["Content-Type: application/x-www-form-urlencoded"], ["Content-Type: text/plain"]]
)
def test_the_upstream_is_told_that_it_gets_json(two: Plane, kind: list[str]) -> None:
    """`curl -d` names a form, which vLLM refuses."""
    two.use({})
    assert two.ask(request("ok", headers=kind)).status == 200


def test_a_credential_goes_to_its_own_origin_only(two: Plane) -> None:
    key = b"s" * 32
    two.use(
        {"credential": seal("for-one", key, "one")},
        {**SECOND_IS_GOOD, "credential": seal("for-two", key, "two")},
    )
    assert two.ask(request("500", headers=["Authorization: Bearer client"])).status == 200
    assert two.walls[0].seen[-1].headers["authorization"] == ["Bearer for-one"]
    assert two.walls[1].seen[-1].headers["authorization"] == ["Bearer for-two"]
    two.use({"credential": seal("for-one", key, "one")}, SECOND_IS_GOOD)
    assert two.ask(request("500", headers=["Authorization: Bearer client"])).status == 200
    assert "authorization" not in two.walls[1].seen[-1].headers


def test_row_27_the_client_sees_only_what_it_may(two: Plane) -> None:
    two.use({})
    with two.client() as client:
        for _ in range(2):  # the second answer's head is a remembered one
            answer = client.ask(request("evil-headers"))
            assert set(answer.headers) == {
                "date", "content-type", "openai-processing-ms", "x-fleetgate-deployment", "x-fleetgate-region",
                "content-length", "x-request-id", "x-fleetgate-attempts",
            }  # fmt: skip
            assert answer.headers["x-request-id"] != "theirs" and answer.headers["x-fleetgate-deployment"] == "one"


def test_operations_without_streams_are_relayed(two: Plane) -> None:
    two.use({})
    for path in ("/v1/embeddings", "/v1/responses", "/v1/completions"):
        data = request("ok").replace(b"/v1/chat/completions", path.encode())
        assert two.ask(data).body == answer_of("ok")
        assert two.wall.seen[-1].path == path
