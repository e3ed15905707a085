"""A client protocol and a transport dropped into a copy of the package serve real requests; nothing else is changed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import fleetgate
from fleetgate.control.resources.config_file import check_file
from tests.conformance.toys import loud_transport, say
from tests.loopback.up_rig import Up, deployment, free_port, gateway
from tests.loopback.wall import Line, Reply, Seen, Wall
from tests.loopback.wall_client import Answer, Client, ask, post
from tests.loopback.wall_replies import REPLIES, chunk
from tests.waiting import wait_for

CREDENTIAL = "engine-credential"
HOST = "talk.test"
ANSWER = b'{"model":"engine-m","said":"Good day.","usage":{"prompt_tokens":5,"completion_tokens":3}}'
HEAD = b"HTTP/1.1 200 OK\r\nx-say-voice: alto\r\nserver: hidden\r\n"
STREAM_HEAD = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TURN = b'event: turn\ndata: {"model":"engine-m","turn":"speaker"}\n\n'
END = b'event: end\ndata: {"model":"engine-m","end":"full stop","usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'


def word(text: str) -> bytes:
    """A content event, as the engine writes it."""
    return b'event: word\ndata: {"model":"engine-m","word":"%b"}\n\n' % text.encode()


def oops(status: int) -> bytes:
    """An error in a stream."""
    return b'event: oops\ndata: {"oops":{"status":%d,"text":"hoarse"}}\n\n' % status


STREAMS = {
    "good": [TURN, word("Good"), b": breath\n\n", word("day"), END],
    "hoarse": [TURN, oops(503)],
    "refusing": [TURN, oops(400)],
    "cough": [TURN, word("Good"), oops(500)],
    "silent": [TURN, word("Good")],
    "openai": [b'data: {"model":"engine-m","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'],
}


def speaker(is_good: bool) -> Reply:
    """What an engine answers: the text of the request chooses the stream, unless the engine is good in any case."""

    async def speak(line: Line, seen: Seen) -> None:
        if not seen.ask.get("stream"):
            line.end()
            line.write(HEAD + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
            return
        line.write(STREAM_HEAD)
        for event in STREAMS["good" if is_good else seen.ask["text"]]:
            line.write(chunk(event))
        line.end()
        line.write(b"0\r\n\r\n")

    return speak


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, which has two files more."""
    site = tmp_path_factory.mktemp("site")
    copy = site / "fleetgate"
    shutil.copytree(Path(fleetgate.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(say.__file__, copy / "protocols" / "clients")
    shutil.copy(loud_transport.__file__, copy / "proxy" / "transport")
    return site


class Talk:
    """A running `fleetgate up` from the copy, with two engines behind the toy protocol and the toy transport."""

    def __init__(self, up: Up, walls: list[Wall]) -> None:
        self.up = up
        self.walls = walls
        self.key = up.new_key("one")

    def send(self, path: str = "/say", host: str = HOST, key: str | None = None, **body: object) -> Answer:
        """One request. It forgets what the walls saw before."""
        for wall in self.walls:
            wall.forget()
        key = self.key if key is None else key
        headers = ["X-Say-Mood: merry", "Cookie: a=b", *([f"X-Say-Key: {key}"] if key else [])]
        return ask(self.up.port, post(compact(body), headers, path=path, host=host))


def compact(value: object) -> bytes:
    """JSON with an order and spaces of its own, of which the engine must get every byte."""
    return json.dumps(value, separators=(" ,", ":  ")).encode()


def documents(walls: list[Wall], closed_port: int) -> list[dict[str, Any]]:
    """Gateways of the toy protocol and of OpenAI's over the same engines, and one with an engine that is down."""
    models = [{"name": "m", "upstream_name": "engine-m"}]
    fields: dict[str, Any] = {"models": models, "credential": {"secret": "token"}}
    urls = [f"http://127.0.0.1:{port}/v1" for port in (walls[0].port, walls[1].port, closed_port)]
    return [
        {"kind": "Secret", "name": "token", "value": CREDENTIAL},
        *(deployment(name, url, **fields) for name, url in zip(("a", "b", "deaf"), urls, strict=True)),
        gateway("talk", "a", "b", protocol="say"),
        gateway("chat", "b"),
        gateway("void", "deaf", protocol="say"),
    ]


@pytest.fixture(scope="module")
def running(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    folder = tmp_path_factory.mktemp("talk")
    with ExitStack() as stack:
        walls = [stack.enter_context(Wall({**REPLIES, "engine-m": speaker(is_good)})) for is_good in (False, True)]
        made = documents(walls, free_port())
        up = Up(folder, made, "--workers", "1", "--transport", "loud", "--access-log", str(folder / "access.jsonl"))
        up.env = {"PYTHONPATH": str(site)}
        yield Talk(stack.enter_context(up), walls)


@pytest.fixture
def talk(running: Talk) -> Talk:
    """The same, with an engine `a` that is healthy: failures of the test before may have ejected it."""
    wait_for(lambda: running.send(model="m", text="good").headers["x-fleetgate-deployment"] == "a")
    return running


def oops_of(answer: Answer) -> dict[str, Any]:
    """An error in the protocol's own shape."""
    assert answer.headers["content-type"] == "application/oops+json"
    told: dict[str, Any] = answer.json()["oops"]
    assert told["type"] == "say" and told["status"] == answer.status
    return told


# --- accepted ---------------------------------------------------------------------------------------------------------


def test_the_package_without_the_file_refuses_the_protocol(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text(
        yaml.safe_dump_all([deployment("a", "http://127.0.0.1:1/v1"), gateway("talk", "a", protocol="say")])
    )
    (mistake,) = check_file(str(config), tmp_path / "data")
    assert "Gateway/talk: protocol: there is no protocol 'say'; use openai" in mistake


def test_a_gateway_is_applied_while_it_runs(talk: Talk, tmp_path: Path) -> None:
    config = tmp_path / "more.yaml"
    for protocol, told in {
        "say": "",
        "shout": "there is no protocol 'shout'; use openai or say",
        "anthropic": "protocol anthropic comes in a later release; use openai or say",
    }.items():
        config.write_text(yaml.safe_dump(gateway(f"more-{protocol}", "b", protocol=protocol)))
        applied = talk.up.cli("apply", "-f", str(config))
        assert applied.returncode == (1 if told else 0), applied.stderr
        assert told in applied.stderr
    wait_for(lambda: talk.send(host="more-say.test", model="m", text="x").status == 200)


# --- routed -----------------------------------------------------------------------------------------------------------


def test_a_request_reaches_an_engine_with_its_path_body_and_credential(talk: Talk) -> None:
    answer = talk.send(model="m", text="good", max_tokens=3)
    assert answer.status == 200 and answer.whole
    (seen,) = talk.walls[0].seen
    assert (seen.method, seen.path) == ("POST", "/v1/speak")
    assert seen.body == compact({"model": "m", "text": "good", "max_tokens": 3}).replace(b'"m"', b'"engine-m"')
    assert seen.headers["x-say-key"] == [CREDENTIAL] and seen.headers["x-say-mood"] == ["merry"]
    assert not {"authorization", "cookie"} & set(seen.headers) and talk.key.encode() not in seen.head
    assert answer.body == ANSWER.replace(b'"engine-m"', b'"m"')
    assert answer.headers["x-say-voice"] == "alto" and "server" not in answer.headers
    assert answer.headers["x-fleetgate-deployment"] == "a"


def test_models_are_listed_in_its_own_words(talk: Talk) -> None:
    with Client(talk.up.port) as client:
        listed = client.ask(f"GET /voices HTTP/1.1\r\nhost: {HOST}\r\nx-say-key: {talk.key}\r\n\r\n".encode())
        assert (listed.status, listed.json()) == (200, {"voices": ["m"]})
        one = client.ask(f"GET /voices/m HTTP/1.1\r\nhost: {HOST}\r\nx-say-key: {talk.key}\r\n\r\n".encode())
        assert (one.status, one.json()) == (200, {"voice": "m"})


def test_both_protocols_are_served_side_by_side(talk: Talk) -> None:
    headers = [f"Authorization: Bearer {talk.key}"]
    for _ in range(4):
        body = compact({"model": "m", "messages": []})
        assert ask(talk.up.port, post(body, headers, host="chat.test")).json()["said"] == "Good day."
        assert talk.walls[1].seen[-1].path == "/v1/chat/completions"
        assert talk.walls[1].seen[-1].headers["authorization"] == [f"Bearer {CREDENTIAL}"]
        assert talk.send(model="m", text="good").status == 200
        assert talk.walls[0].seen[-1].headers.get("authorization") is None
    refused = ask(talk.up.port, post(compact({"model": "m"}), headers, host=HOST, path="/say"))
    assert refused.status == 401, "a key in the other protocol's header"
    assert oops_of(refused)["code"] == "invalid_api_key"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_before_routing_have_its_shape(talk: Talk) -> None:
    for key in ("", "fg_wrong"):
        told = oops_of(talk.send(key=key, model="m"))
        assert told["code"] == "invalid_api_key" and told["text"].endswith("send `X-Say-Key: <key>`")
    told = oops_of(talk.send("/v1/chat/completions", model="m", messages=[]))
    assert told["code"] == "unknown_path" and told["text"].endswith("this Gateway serves the Say API")
    assert oops_of(talk.send(model="other"))["code"] == "model_not_found"
    assert oops_of(talk.send(text="no model"))["code"] == "invalid_request"
    with Client(talk.up.port) as client:
        wrong = client.ask(f"GET /say HTTP/1.1\r\nhost: {HOST}\r\nx-say-key: {talk.key}\r\n\r\n".encode())
    assert wrong.headers["allow"] == "POST, OPTIONS" and oops_of(wrong)["status"] == 405
    assert not any(wall.seen for wall in talk.walls)


def test_an_error_of_routing_has_its_shape(talk: Talk) -> None:
    answer = talk.send(host="void.test", model="m", text="good")
    assert answer.status == 503, answer.body
    assert oops_of(answer)["text"]
    assert answer.headers["retry-after"]


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_passed_on_and_its_usage_is_read(talk: Talk) -> None:
    answer = talk.send(model="m", text="good", stream=True)
    assert answer.status == 200 and answer.whole
    assert answer.body == b"".join(STREAMS["good"]).replace(b'"engine-m"', b'"m"')
    log = talk.up.folder / "access.jsonl"

    def logged() -> dict[str, Any]:
        lines = [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]
        return next((line for line in lines if line.get("id") == answer.headers["x-request-id"]), {})

    wait_for(lambda: bool(logged()))
    assert (logged()["prompt_tokens"], logged()["output_tokens"], logged()["stream"]) == (5, 2, True)


@pytest.mark.parametrize("text", ["hoarse", "openai"])
def test_a_stream_that_fails_before_its_content_moves(talk: Talk, text: str) -> None:
    """An event of the OpenAI protocol is no content here, so that stream is empty."""
    answer = talk.send(model="m", text=text, stream=True)
    assert answer.headers["x-fleetgate-deployment"] == "b" and len(talk.walls[0].seen) == 1
    assert answer.body == b"".join(STREAMS["good"]).replace(b'"engine-m"', b'"m"')


def test_an_error_that_is_the_clients_keeps_its_status(talk: Talk) -> None:
    answer = talk.send(model="m", text="refusing", stream=True)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/oops+json")
    assert answer.json() == {"oops": {"status": 400, "text": "hoarse"}} and not talk.walls[1].seen


@pytest.mark.parametrize("text", ["cough", "silent"])
def test_a_stream_that_fails_after_content_ends_with_its_own_error(talk: Talk, text: str) -> None:
    answer = talk.send(model="m", text=text, stream=True)
    *events, last, rest = answer.body.split(b"\n\n")
    assert rest == b"" and b"\n\n".join([*events, b""]) == (TURN + word("Good")).replace(b'"engine-m"', b'"m"')
    assert last.startswith(b'event: oops\ndata: {"oops":{"type":"say","status":502,')


# --- the transport ----------------------------------------------------------------------------------------------------


def test_the_chosen_transport_carried_the_requests(talk: Talk) -> None:
    log = talk.up.log
    number = int(log.read_text().rpartition("loud: request ")[2].partition(" ")[0])
    assert number > 0
    for _ in range(5):
        assert talk.send(model="m", text="good").status == 200
    port = talk.walls[0].port
    told = "".join(f"loud: request {number + step} to port {port}\n" for step in range(1, 6))
    wait_for(lambda: told in log.read_text())


def test_the_copy_differs_by_two_files(site: Path) -> None:
    """Every other source file is the package's own, byte for byte."""
    package = Path(fleetgate.__file__).parent
    files = {path.relative_to(site / "fleetgate") for path in (site / "fleetgate").rglob("*.py")}
    added = {path for path in files if not (package / path).exists()}
    assert added == {Path("protocols/clients/say.py"), Path("proxy/transport/loud_transport.py")}
    assert all((package / path).read_bytes() == (site / "fleetgate" / path).read_bytes() for path in files - added)
