"""Upstreams whose certificate does not verify: never spoken to; unseen where there is another, named where not."""

import datetime
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import trustme

from tests.loopback.wall import Wall
from tests.loopback.wall_client import request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

BAD = ("expired", "wrong name", "not yet valid", "untrusted")


def context_of(name: str, trusted: trustme.CA) -> ssl.SSLContext:
    """A server's side with such a certificate."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    match name:
        case "expired":
            leaf = trusted.issue_cert("localhost", not_before=now - 3 * day, not_after=now - day)
        case "not yet valid":
            leaf = trusted.issue_cert("localhost", not_before=now + day, not_after=now + 3 * day)
        case "wrong name":
            leaf = trusted.issue_cert("elsewhere.test")
        case "untrusted":
            leaf = trustme.CA().issue_cert("localhost")
        case _:
            leaf = trusted.issue_cert("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    return context


class Secure:
    """A plane whose workers trust one authority, and a wall for each certificate."""

    def __init__(self, made: Plane, walls: dict[str, Wall]) -> None:
        self.plane = made
        self.walls = walls

    def use(self, port: int, alone: bool) -> None:
        """`one` over TLS at this port, `two` without unless the first is to be alone."""
        one, *rest = self.plane.deployments(*({},) if alone else ({}, {}))
        endpoint = msgspec.structs.replace(one.endpoints[0], scheme="https", host="localhost", port=port)
        # The plane's own wall stands behind whoever is left.
        rest = [
            msgspec.structs.replace(
                each, endpoints=(msgspec.structs.replace(each.endpoints[0], port=self.plane.wall.port),)
            )
            for each in rest
        ]
        self.plane.publish([msgspec.structs.replace(one, endpoints=(endpoint,)), *rest])


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    trusted = trustme.CA()
    bundle: Path = tmp_path_factory.mktemp("tls") / "ca.pem"
    trusted.cert_pem.write_to_path(bundle)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SSL_CERT_FILE", str(bundle))
        walls = {name: stack.enter_context(Wall(tls=context_of(name, trusted))) for name in (*BAD, "good")}
        yield Secure(stack.enter_context(plane()), walls)


def test_row_3_a_certificate_that_verifies_is_used(secure: Secure) -> None:
    secure.use(secure.walls["good"].port, alone=True)
    answer = secure.plane.ask(request("ok"))
    assert answer.status == 200 and len(secure.walls["good"].seen) == 1


@pytest.mark.parametrize("name", BAD)
def test_row_3_a_certificate_that_does_not_verify_is_not_seen_where_there_is_another(secure: Secure, name: str) -> None:
    secure.use(secure.walls[name].port, alone=False)
    answer = secure.plane.ask(request("ok"))
    assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "two"
    assert answer.headers["x-fleetgate-attempts"] == "2"
    assert not secure.walls[name].seen, "nothing is said to who cannot prove its name"


@pytest.mark.parametrize("name", BAD)
def test_row_3_a_certificate_that_does_not_verify_is_named_where_there_is_no_other(secure: Secure, name: str) -> None:
    secure.use(secure.walls[name].port, alone=True)
    answer = secure.plane.ask(request("ok"))
    assert (answer.status, answer.code) == (502, "upstream_tls_error")
    assert answer.headers["x-should-retry"] == "false"
    assert not secure.walls[name].seen and not secure.walls[name].probes


def test_row_3_a_handshake_that_stalls_is_left_for_another(secure: Secure) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(16)
        secure.use(mute.getsockname()[1], alone=False)
        answer = secure.plane.ask(request("ok"))
        assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "two"
        assert answer.headers["x-fleetgate-attempts"] == "2"
    wait_for(lambda: secure.plane.in_flight() == 0)
