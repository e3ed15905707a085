"""Good requests in every shape that bytes can come in, and answers to what is not a request for a model."""

import gzip
import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetgate.protocols.clients.openai import OPERATIONS
from tests.loopback.rig import gateway
from tests.loopback.wall_client import PATH, Answer, Client, post, request
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_replies import stream_of
from tests.loopback.wall_rig import Plane, plane


@pytest.fixture(scope="module")
def edge() -> Iterator[Plane]:
    with plane() as made:
        yield made


def get(path: str, method: str = "GET", *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: chat.test", *headers, "", ""]).encode()


# --- how bytes come ---------------------------------------------------------------------------------------------------


def test_keep_alive_serves_one_request_after_another(edge: Plane) -> None:
    with edge.client() as client:
        ids = set()
        for number in range(30):
            answer = client.ask(request("ok", stream=number % 3 == 0))
            assert answer.status == 200 and answer.whole
            assert "connection" not in answer.headers
            ids.add(answer.headers["x-request-id"])
        assert len(ids) == 30


def test_requests_on_a_warm_pool_open_no_connection(edge: Plane) -> None:
    edge.use()
    with edge.client() as client:
        for number in range(40):
            assert client.ask(request("ok", stream=number % 2 == 0)).whole
    # Where the machine is busy the next request may come before the last chunk of the answer before it.
    assert len(edge.wall.seen) == 40 and len(edge.wall.carriers) <= 4


def test_pipelined_requests_are_answered_in_order(edge: Plane) -> None:
    """Slow and fast, streamed and not, good and bad: the order of answers is the order of requests."""
    wanted = [
        request("slow", wall={"delay_s": 0.05}),
        request("ok", stream=True),
        request("nothing-of-that-name"),
        request("ok"),
        get("/v1/models/ok"),
        post(b"{"),
        get("/nothing"),
        request("slow", stream=True, wall={"delay_s": 0.05}),
        request("400"),
        get("/v1/models"),
    ]
    with edge.client() as client:
        client.send(b"".join(wanted))
        answers = [client.read() for _ in wanted]
    assert [answer.status for answer in answers] == [200, 200, 404, 200, 200, 400, 404, 200, 400, 200]
    assert answers[0].body == answer_of("slow")
    assert answers[1].body == b"".join(stream_of("ok"))
    assert answers[4].json()["id"] == "ok"
    assert answers[7].body == b"".join(stream_of("slow"))
    assert answers[9].json()["object"] == "list"


def test_a_deep_pipeline_is_read_no_faster_than_it_is_served(edge: Plane) -> None:
    one = request("ok", pad="p" * 2000)
    count = 150  # far over what is buffered for a connection
    with edge.client() as client:
        client.send(one * count)
        assert all(client.read().status == 200 for _ in range(count))


@pytest.mark.parametrize("stream", [False, True])
def test_one_byte_at_a_time(edge: Plane, stream: bool) -> None:
    data = request("ok", stream)
    with edge.client() as client:
        for at in range(len(data)):
            client.send(data[at : at + 1])
        first = client.read()
        assert first.status == 200 and first.whole


def test_a_request_cut_at_every_place(edge: Plane) -> None:
    """On one connection, so that whatever a cut leaves behind meets the next request."""
    data = request("ok")
    chunked = data.replace(b"Content-Length", b"X-Was").replace(
        b"\r\n\r\n{", b"\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n{" % (len(data.partition(b"\r\n\r\n")[2])), 1
    )
    chunked += b"\r\n0\r\n\r\n"
    before = len(edge.wall.seen)
    with edge.client() as client:
        for whole in (data, chunked):
            for cut in range(1, len(whole)):
                client.send(whole[:cut])
                client.send(whole[cut:])
                assert client.read().status == 200, cut
    assert len(edge.wall.seen) - before == len(data) + len(chunked) - 2
    assert len({seen.body for seen in edge.wall.seen[before:]}) == 1


PIPELINE = [
    (request("ok"), 200),
    (request("ok", headers=["X-Other: 1"]), 200),
    (post(b"[]"), 400),
    (request("gone"), 404),
    (get("/v1/models"), 200),
    (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: chat.test\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'4\r\n{"mo\r\n9;x=y\r\ndel":"ok"\r\n1\r\n}\r\n0\r\nx-t: 1\r\n\r\n',
        200,
    ),
    (get("/v1/models", "HEAD"), 200),
    (get(PATH, "PUT", "Content-Length: 5") + b"hello", 405),
    (request("ok", stream=True), 200),
]
WHOLE = b"".join(data for data, _ in PIPELINE)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, len(WHOLE) - 1), unique=True, max_size=25).map(sorted))
def test_any_cut_of_a_pipeline_gives_the_same_answers(edge: Plane, cuts: list[int]) -> None:
    with edge.client() as client:
        for start, end in zip([0, *cuts], [*cuts, len(WHOLE)], strict=True):
            client.send(WHOLE[start:end])
        for data, status in PIPELINE:
            answer = client.read(head_only=data.startswith(b"HEAD"))
            assert answer.status == status and answer.whole


def test_expect_100_continue(edge: Plane) -> None:
    data = request("ok", headers=["Expect: 100-continue"])
    head, _, body = data.partition(b"\r\n\r\n")
    with edge.client() as client:
        for _ in range(2):
            client.send(head + b"\r\n\r\n")
            assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert client.ask(body).status == 200
        # A client that does not wait is served all the same, and a body that came along needs no asking.
        client.send(data)
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_expect_with_a_bad_request_is_refused_without_asking(edge: Plane) -> None:
    with edge.client() as client:
        client.send(get("/v1/nothing", "POST", "Expect: 100-continue", "Content-Length: 10"))
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 404")


def test_connection_close_is_kept(edge: Plane) -> None:
    for data in (
        request("ok", headers=["Connection: close"]),
        request("ok", stream=True, headers=["Connection: Close"]),
        request("gone", headers=["Connection: close"]),
    ):
        with edge.client() as client:
            answer = client.ask(data + request("ok"))
            assert answer.headers["connection"] == "close" and answer.whole
            assert client.closed()


# --- HTTP/1.0 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_http_10_gets_no_chunks_and_a_close(edge: Plane, stream: bool) -> None:
    data = request("ok", stream).replace(b"HTTP/1.1", b"HTTP/1.0")
    with edge.client() as client:
        answer = client.ask(data)
        assert "transfer-encoding" not in answer.headers
        assert answer.body == (b"".join(stream_of("ok")) if stream else answer_of("ok"))
        assert client.closed()


def test_http_10_without_host_goes_to_the_default_gateway(edge: Plane) -> None:
    data = request("ok").replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: chat.test\r\n", b"")
    assert edge.ask(data).status == 200


def test_http_10_keep_alive_with_an_answer_of_unknown_length_ends_with_the_connection(edge: Plane) -> None:
    """A body over what is held back has no length, and an HTTP/1.0 client knows its end by the close only."""
    size = 9 * 1024 * 1024
    data = request("ok", headers=["Connection: keep-alive"], wall={"size": size}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with edge.client() as client:
        answer = client.ask(data)
        assert answer.body == answer_of("ok", "x" * size)


# --- methods and paths ------------------------------------------------------------------------------------------------


def test_unknown_paths_are_404_and_the_connection_stays(edge: Plane) -> None:
    with edge.client() as client:
        for path in (
            "/",
            "/v1",
            "/v1/",
            "/v1/chat",
            "/v1/chat/completions/",
            "/v2/chat/completions",
            "/v1/modelsx",
            "//v1/chat/completions",
            "/v1/../v1/models",
            "/v1/%63hat/completions",
            "/healthz",
            "/metrics",
        ):
            answer = client.ask(post(b"{}", path=path))
            assert (answer.status, answer.code) == (404, "unknown_path"), path
        assert client.ask(request("ok")).status == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_are_405_with_allow(edge: Plane, method: str) -> None:
    with edge.client() as client:
        for path in (*(name.decode() for name in OPERATIONS),):
            answer = client.ask(get(path, method))
            assert (answer.status, answer.code) == (405, "invalid_request")
            assert answer.headers["allow"] == "POST, OPTIONS"
        answer = client.ask(post(b"{}", path="/v1/models"))
        assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD, OPTIONS"
        assert client.ask(request("ok")).status == 200


def test_head_has_the_headers_of_get_and_no_body(edge: Plane) -> None:
    with edge.client() as client:
        for path in ("/v1/models", "/v1/models/ok", "/v1/models/gone", "/nothing"):
            full = client.ask(get(path))
            client.send(get(path, "HEAD"))
            bare = client.read(head_only=True)
            assert bare.status == full.status
            assert bare.headers["content-length"] == full.headers["content-length"]
        assert client.ask(request("ok")).status == 200, "no body was sent after any HEAD"


def test_options_say_what_is_allowed(edge: Plane) -> None:
    with edge.client() as client:
        answer = client.ask(get(PATH, "OPTIONS"))
        assert (answer.status, answer.headers["allow"]) == (204, "POST, OPTIONS")
        assert client.ask(get("*", "OPTIONS")).status == 204
        assert client.ask(get("/v1/models", "OPTIONS")).headers["allow"] == "GET, HEAD, OPTIONS"


def test_models_are_those_of_the_gateway(edge: Plane) -> None:
    edge.use(
        {"models": {"b": "x", "a": "y"}},
    )
    listed = edge.ask(get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["a", "b"] and listed["object"] == "list"
    assert edge.ask(get("/v1/models/a")).json()["id"] == "a"
    missing = edge.ask(get("/v1/models/x"))
    assert (missing.status, missing.code, missing.json()["error"]["param"]) == (404, "model_not_found", "model")
    edge.use()


# --- which Gateway ----------------------------------------------------------------------------------------------------


def test_the_host_chooses_the_gateway(edge: Plane) -> None:
    one, two = edge.deployments({"models": {"m": "first"}}, {"models": {"m": "second"}})
    two = two.__class__(
        **{
            **{f: getattr(two, f) for f in two.__struct_fields__},
            "endpoints": (
                one.endpoints[0].__class__(
                    slot=two.slot, scheme="http", host="127.0.0.1", port=edge.wall.port, base_path=""
                ),
            ),
        }
    )
    gateways = (gateway("one"), gateway("two", slot=1, name="other", domain="example.com"))
    edge.rig.publish(gateways=gateways, deployments=(one, two))
    edge.rig.wait_until_used()
    edge.wall.forget()
    with edge.client() as client:

        def at(host: str) -> Answer:
            return client.ask(request("m").replace(b"Host: chat.test", b"Host: " + host.encode()))

        for host in ("chat.test", "CHAT.test:443", "other.example.com", "Other.Example.Com."):
            assert at(host).status == 200
        assert edge.seen() == ["first", "first", "second", "second"]
        assert [seen.path for seen in edge.wall.seen] == [PATH, PATH, "/chat/completions", "/chat/completions"]
        for host in ("nobody.test", "test", "chat", "chat.test.evil.test", "127.0.0.1", "localhost", "[::1]:80"):
            answer = at(host)
            assert (answer.status, answer.code) == (404, "gateway_not_found"), host
    chosen = (gateways[0], gateway("two", slot=1, name="other", domain="example.com", default=True))
    edge.rig.publish(gateways=chosen, deployments=(one, two))
    edge.rig.wait_until_used()
    edge.wall.forget()
    with edge.client() as client:
        for host in ("127.0.0.1:1", "localhost", "[::1]:80"):
            assert client.ask(request("m").replace(b"chat.test", host.encode())).status == 200
        assert edge.seen() == ["second"] * 3
        assert client.ask(request("m").replace(b"chat.test", b"nobody.test")).status == 404
    edge.use()


# --- bodies -----------------------------------------------------------------------------------------------------------

BAD_BODIES: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "invalid_json", None),
    "space": (b"  ", "invalid_json", None),
    "not closed": (b'{"model":"ok"', "invalid_json", None),
    "trailing bytes": (b'{"model":"ok"} {}', "invalid_json", None),
    "trailing comma": (b'{"model":"ok",}', "invalid_json", None),
    "single quotes": (b"{'model':'ok'}", "invalid_json", None),
    "a comment": (b'{"model":"ok"/**/}', "invalid_json", None),
    "NaN": (b'{"model":"ok","x":NaN}', "invalid_json", None),
    "Infinity": (b'{"model":"ok","x":-Infinity}', "invalid_json", None),
    "NaN in a list": (b'{"model":"ok","x":[1, NaN]}', "invalid_json", None),
    "too large a number": (b'{"model":"ok","temperature":1e400}', "invalid_request", "temperature"),
    "too small a number": (b'{"model":"ok","x":{"y":[-1E+999]}}', "invalid_request", "x"),
    "too large and written out": (b'{"model":"ok","x":' + b"9" * 400 + b".5}", "invalid_request", "x"),
    "too many digits": (b'{"model":"ok","logit_bias":{"5":' + b"1" * 5000 + b"}}", "invalid_request", "logit_bias"),
    "too large beside options": (
        b'{"model":"ok","stream_options":{"include_usage":true},"seed":1e400}',
        "invalid_request",
        "seed",
    ),
    "a leading zero": (b'{"model":"ok","x":01}', "invalid_json", None),
    "a byte order mark": (b'\xef\xbb\xbf{"model":"ok"}', "invalid_json", None),
    "UTF-16": ('{"model":"ok"}'.encode("utf-16"), "invalid_json", None),
    "invalid UTF-8": (b'{"model":"ok","x":"\xff"}', "invalid_json", None),
    "overlong UTF-8": (b'{"model":"ok","x":"\xc0\xaf"}', "invalid_json", None),
    "a surrogate in UTF-8": (b'{"model":"ok","x":"\xed\xa0\x80"}', "invalid_json", None),
    "a lone surrogate": (b'{"model":"ok","x":"\\ud800"}', "invalid_json", None),
    "a lone surrogate as model": (b'{"model":"\\udc00"}', "invalid_json", None),
    "a raw line feed": (b'{"model":"ok","x":"a\nb"}', "invalid_json", None),
    "a bad escape": (b'{"model":"ok","x":"\\q"}', "invalid_json", None),
    "deep nesting": (b'{"model":"ok","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "invalid_json", None),
    "deep and escaped": (b'{"model":"ok","y":"\\u0041","x":' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json", None),
    "an array": (b'["model"]', "invalid_request", None),
    "a string": (b'"model"', "invalid_request", None),
    "a number": (b"5", "invalid_request", None),
    "null": (b"null", "invalid_request", None),
    "no model": (b'{"messages":[]}', "invalid_request", "model"),
    "nothing": (b"{}", "invalid_request", "model"),
    "model null": (b'{"model":null}', "invalid_request", "model"),
    "model a number": (b'{"model":5}', "invalid_request", "model"),
    "model a list": (b'{"model":["ok"]}', "invalid_request", "model"),
    "model empty": (b'{"model":""}', "invalid_request", "model"),
    "model twice": (b'{"model":"ok","model":"ok"}', "invalid_request", "model"),
    "model twice, far apart": (b'{"model":"ok","x":{"model":1},"y":[1,2],"model":"m"}', "invalid_request", "model"),
    "model twice, escaped": (b'{"model":"ok","mod\\u0065l":"m"}', "invalid_request", "model"),
    "model twice, both escaped": (b'{"\\u006dodel":"ok","mode\\u006C":"m"}', "invalid_request", "model"),
    "model once in capitals": (b'{"Model":"ok"}', "invalid_request", "model"),
    "stream a string": (b'{"model":"ok","stream":"yes"}', "invalid_request", "stream"),
    "stream a number": (b'{"model":"ok","stream":1}', "invalid_request", "stream"),
    "stream options a list": (b'{"model":"ok","stream_options":[]}', "invalid_request", "stream_options"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_400_reach_nobody_and_leave_the_connection_clean(edge: Plane, name: str) -> None:
    body, code, param = BAD_BODIES[name]
    before = len(edge.wall.seen)
    with edge.client() as client:
        for _ in range(2):
            answer = client.ask(post(body))
            error = answer.json()["error"]
            assert (answer.status, error["code"], error["param"]) == (400, code, param), error
            assert error["type"] == "invalid_request_error"
            assert "Traceback" not in error["message"] and "msgspec" not in error["message"]
        assert client.ask(request("ok")).status == 200
    assert len(edge.wall.seen) == before + 1


def test_an_unknown_model_is_404_and_names_those_there_are(edge: Plane) -> None:
    answer = edge.ask(request("gone"))
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert answer.json()["error"]["param"] == "model" and "gone" in answer.json()["error"]["message"]


def test_odd_bodies_pass_byte_for_byte(edge: Plane) -> None:
    for body in (
        b'{"model":"ok","x":{"model":"nested","y":[{"model":1}]}}',
        b'{"x":"\\"model\\":\\"m\\"","model":"ok"}',
        b'{"\\u006dodel":"ok"}',
        b'{"model":"\\u006fk","x":"\\ud83d\\ude00"}',
        b' \r\n\t{ "stream" : null , "model"\n:\t"ok" } \n',
        '{"model":"ok","x":"é😀\u2028"}'.encode(),
        b'{"model":"ok","x":1e308,"y":-0.0,"z":123456789012345678901234567890,"stream_options":null}',
        b'{"model":"ok","unknown":{"a":[null,true,false]},"wall":{}}',
        b'{"model":"ok","x":' + b"1" * 4000 + b',"stream_options":{}}',
    ):
        assert edge.ask(post(body)).status == 200, body
        assert edge.wall.seen[-1].body == body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model":"ok","temperature":1e400}', "`temperature` holds a number that is too large"),
        (b'{"model":"ok","temperature":NaN}', "NaN and Infinity are not JSON"),
        (b'{"model":"ok","temperature":-Infinity}', "NaN and Infinity are not JSON"),
    ],
)
def test_row_37_numbers_that_are_none_are_named(edge: Plane, body: bytes, said: str) -> None:
    assert said in edge.ask(post(body)).json()["error"]["message"]


def test_every_operation_has_its_path(edge: Plane) -> None:
    for path in OPERATIONS:
        assert edge.ask(post(json.dumps({"model": "ok"}).encode(), path=path.decode())).status == 200
        assert edge.wall.seen[-1].path == path.decode()


# --- the order of checks ----------------------------------------------------------------------------------------------


def test_checks_come_in_the_order_of_the_contract(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Framing, Gateway, key, path and method, body, model: each case has all later faults too."""
    bad = b"{"
    with plane(auth="keys") as made:

        def at(data: bytes) -> tuple[int, str]:
            with Client(made.port) as client:
                answer = client.ask(data)
                return answer.status, answer.code

        assert at(post(bad, ["Content-Length: 1"], host="nobody.test", path="/x")) == (400, "invalid_request")
        assert at(post(bad, host="nobody.test", path="/x")) == (404, "gateway_not_found")
        assert at(post(bad, path="/x")) == (401, "invalid_api_key")
        assert at(post(bad)) == (401, "invalid_api_key")
        assert not made.wall.seen


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, br", "x-unknown"])
def test_row_39_a_compressed_body_is_refused_and_never_inflated(edge: Plane, encoding: str) -> None:
    bomb = gzip.compress(b'{"model":"ok","messages":[' + b" " * 20_000_000 + b"]}")
    with edge.client() as client:
        answer = client.ask(post(bomb, [f"Content-Encoding: {encoding}"]))
        assert answer.status == 415 and encoding in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "identity"
    before = len(edge.wall.seen)
    assert edge.ask(request("ok", headers=["Content-Encoding: identity"])).status == 200
    assert len(edge.wall.seen) == before + 1
