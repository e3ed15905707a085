"""Client keys at the edge: known, mistyped, expired, scoped, revoked; nothing is sent for one that may not."""

import time
from collections.abc import Iterator

import pytest

from fleetgate.core.api_keys import hmac_hex, mint_key, parse_key
from fleetgate.core.model import Key
from tests.loopback.rig import PEPPER, gateway
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_rig import Plane, plane


def minted(number: int, **fields: object) -> tuple[str, Key]:
    """The text of a key and what a worker knows of it."""
    text = mint_key("test", number.to_bytes(7, "big"), number.to_bytes(32, "big"))
    parsed = parse_key(text.encode())
    assert parsed is not None
    return text, Key(id=parsed[0], name=f"k{number}", secret_hmac=hmac_hex(PEPPER, parsed[1]), **fields)  # type: ignore[arg-type]


GOOD, GOOD_KEY = minted(1 << 50)
EXPIRED, EXPIRED_KEY = minted(2 << 50, expires_s=time.time() - 60)
LATER, LATER_KEY = minted(3 << 50, expires_s=time.time() + 3600)
SCOPED, SCOPED_KEY = minted(4 << 50, gateways=("chat",), models=("ok", "m"))
ELSEWHERE, ELSEWHERE_KEY = minted(5 << 50, gateways=("other",))
UNKNOWN, _ = minted(6 << 50)
KEYS = (GOOD_KEY, EXPIRED_KEY, LATER_KEY, SCOPED_KEY, ELSEWHERE_KEY)


@pytest.fixture(scope="module")
def edge() -> Iterator[Plane]:
    with plane(auth="keys") as made:
        publish(made, KEYS)
        yield made


def publish(made: Plane, keys: tuple[Key, ...]) -> None:
    deployments = made.deployments({})
    made.rig.publish(gateways=(gateway("one"),), deployments=tuple(deployments), keys=keys)
    made.rig.wait_until_used()
    made.wall.forget()


def with_key(made: Plane, text: str, model: str = "ok", scheme: str = "Bearer ") -> Answer:
    return made.ask(request(model, headers=[f"Authorization: {scheme}{text}"]))


@pytest.mark.parametrize("text", [GOOD, LATER, SCOPED])
def test_good_keys_pass(edge: Plane, text: str) -> None:
    for scheme in ("Bearer ", "bearer ", "BEARER "):
        assert with_key(edge, text, scheme=scheme).status == 200
    assert text.encode() not in b"".join(seen.head + seen.body for seen in edge.wall.seen)


def mistyped() -> dict[str, str]:
    flipped = {
        f"letter {at} changed": GOOD[:at] + ("b" if GOOD[at] != "b" else "c") + GOOD[at + 1 :]
        for at in range(0, len(GOOD), 5)
    }
    other = {
        "nothing": "", "a word": "secret", "cut": GOOD[:-1], "longer": GOOD + "0", "unknown": UNKNOWN,
        "upper case": GOOD.upper(), "expired": EXPIRED, "twice": f"{GOOD},{GOOD}", "quoted": f'"{GOOD}"',
        "its id with another secret": GOOD.split("_")[0] + "_test_" + GOOD.split("_")[2] + "_" + "_".join(
            UNKNOWN.split("_")[3:]),
        "high bytes": "f\xff_test", "long": "x" * 9000,
    }  # fmt: skip
    return {**flipped, **other}


@pytest.mark.parametrize("name", mistyped())
def test_every_other_key_is_401_and_reaches_nobody(edge: Plane, name: str) -> None:
    before = len(edge.wall.seen)
    data = request("ok").replace(b"\r\n", b"\r\nAuthorization: Bearer %b\r\n" % mistyped()[name].encode("latin-1"), 1)
    with edge.client() as client:
        for _ in range(2):  # the second time from the memo
            answer = client.ask(data)
            assert (answer.status, answer.code) == (401, "invalid_api_key")
            assert answer.json()["error"]["type"] == "authentication_error"
            assert GOOD not in answer.body.decode()
        assert client.ask(request("ok", headers=[f"Authorization: Bearer {GOOD}"])).status == 200
    assert len(edge.wall.seen) == before + 1


@pytest.mark.parametrize("value", ["", GOOD, f"Basic {GOOD}", f"Token {GOOD}", f"Bearer{GOOD}", "Bearer", "Bearer "])
def test_other_schemes_are_401(edge: Plane, value: str) -> None:
    assert edge.ask(request("ok", headers=[f"Authorization: {value}"])).status == 401
    assert edge.ask(request("ok", headers=[f"X-Api-Key: {GOOD}"])).status == 401


def test_two_authorizations_are_401(edge: Plane) -> None:
    both = [f"Authorization: Bearer {UNKNOWN}", f"Authorization: Bearer {GOOD}"]
    assert edge.ask(request("ok", headers=both)).status == 401
    assert edge.ask(request("ok", headers=both[::-1])).status == 401


def test_scopes_hold(edge: Plane) -> None:
    before = len(edge.wall.seen)
    answer = with_key(edge, ELSEWHERE)
    assert (answer.status, answer.code) == (403, "policy_denied")
    answer = with_key(edge, SCOPED, model="slow")
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert len(edge.wall.seen) == before
    get = "GET /v1/models{} HTTP/1.1\r\nHost: chat.test\r\nAuthorization: Bearer {}\r\n\r\n"
    listed = edge.ask(get.format("", SCOPED).encode()).json()
    assert [model["id"] for model in listed["data"]] == ["m", "ok"]
    assert edge.ask(get.format("/slow", SCOPED).encode()).status == 404


def test_a_key_taken_away_is_refused_on_the_connection_it_used(edge: Plane) -> None:
    data = request("ok", headers=[f"Authorization: Bearer {GOOD}"])
    with edge.client() as client:
        for _ in range(3):
            assert client.ask(data).status == 200
        publish(edge, KEYS[1:])
        assert client.ask(data).status == 401
        publish(edge, KEYS)
        assert client.ask(data).status == 200


@pytest.mark.parametrize("known", [False, True])
def test_row_64_a_key_taken_away_while_a_body_is_coming_is_refused(edge: Plane, known: bool) -> None:
    """A body may take its time, and a key must not be good for longer because of that."""
    publish(edge, KEYS)
    ask = request("ok", headers=[f"Authorization: Bearer {GOOD}"])
    with edge.client() as client:
        if known:
            assert client.ask(ask).status == 200
        client.send(ask[:-5])
        time.sleep(0.2)
        publish(edge, KEYS[1:])
        client.send(ask[-5:])
        assert client.read().status == 401
    assert edge.wall.seen == []


def test_a_key_expires_on_the_connection_it_used(edge: Plane) -> None:
    text, key = minted(7 << 50, expires_s=time.time() + 1.0)
    publish(edge, (*KEYS, key))
    data = request("ok", headers=[f"Authorization: Bearer {text}"])
    with edge.client() as client:
        first = client.ask(data).status
        while time.time() < key.expires_s:
            time.sleep(0.05)
        assert client.ask(data).status == 401
    assert first in (200, 401)  # a slow machine may come too late
    publish(edge, KEYS)


def test_no_log_line_tells_a_key(edge: Plane) -> None:
    log = (edge.rig.data_dir / "access.log").read_text()
    assert '"key":"k' in log
    for text in (GOOD, EXPIRED, UNKNOWN, SCOPED):
        assert text not in log and text.split("_")[3] not in log
