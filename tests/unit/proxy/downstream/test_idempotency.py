"""A request that was sent twice on purpose is worked once."""

import os
import time
from pathlib import Path

import pytest

from fleetgate.proxy.downstream.idempotency import DIRECTORY, KEPT_S, NAME_BYTES_MAX, remove_expired
from fleetgate.proxy.transport.memory_network import RemoteEnd
from tests.conformance.transport_rig import BODY, DONE, FINISH, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane, header_of, status_of

NAME = b"idempotency-key: order-7\r\n"


def worked(plane: Plane, stream: bool = False, answer: bytes = whole(BODY), **fields: object) -> RemoteEnd:
    client = plane.ask(stream, NAME, **fields)  # type: ignore[arg-type]
    plane.answer(plane.engine(0), answer)
    return client


def test_the_second_gets_the_answer_of_the_first(plane: Plane) -> None:
    first, second = worked(plane), plane.ask(headers=NAME)
    assert plane.engine(0).received.count(b"POST ") == 1
    assert second.received.endswith(BODY) and header_of(second, "idempotent-replayed") == "true"
    assert header_of(second, "x-fleetgate-deployment") == header_of(first, "x-fleetgate-deployment") == "one"


def test_the_same_name_for_another_request_is_refused(plane: Plane) -> None:
    worked(plane)
    assert status_of(plane.ask(headers=NAME, max_tokens=1)) == 422


def test_while_the_first_runs_the_second_is_told_to_wait(plane: Plane) -> None:
    plane.ask(headers=NAME)
    second = plane.ask(headers=NAME)
    assert status_of(second) == 409 and header_of(second, "retry-after") == "1"
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(plane.ask(headers=NAME)) == 200


def test_a_stream_is_not_kept_but_not_worked_again(plane: Plane) -> None:
    worked(plane, True, streamed(content("a"), FINISH, DONE))
    again = plane.ask(True, NAME)
    assert status_of(again) == 409 and header_of(again, "x-should-retry") == "false"


def test_what_failed_may_be_sent_again(plane: Plane) -> None:
    client = plane.ask(headers=NAME)
    for engine in (plane.engine(0),):
        plane.answer(engine, whole(b"{}", b"500 Internal Server Error"))
    plane.answer(plane.engine(1), whole(b"{}", b"500 Internal Server Error"))
    assert status_of(client) == 502
    again = plane.ask(headers=NAME)
    plane.answer(plane.engines[0].connections[-1], whole(BODY))
    assert status_of(again) == 200 and not header_of(again, "idempotent-replayed")


def test_a_client_that_left_may_send_its_request_again(plane: Plane) -> None:
    plane.ask(headers=NAME).reset()
    plane.run()
    again = plane.ask(headers=NAME)
    plane.answer(plane.engines[0].connections[-1], whole(BODY))
    assert status_of(again) == 200


def test_an_invalid_name_is_refused(plane: Plane) -> None:
    assert status_of(plane.ask(headers=b"idempotency-key: %b\r\n" % (b"x" * (NAME_BYTES_MAX + 1)))) == 400


def test_a_disk_that_keeps_nothing_stops_no_request(plane: Plane) -> None:
    (plane.data_dir / DIRECTORY).write_text("not a folder")
    assert status_of(worked(plane)) == 200


@pytest.mark.parametrize(("age_s", "is_kept"), [(KEPT_S - 60.0, True), (KEPT_S + 60.0, False)])
def test_what_is_too_old_is_removed(tmp_path: Path, age_s: float, is_kept: bool) -> None:
    (tmp_path / DIRECTORY).mkdir()
    claim = tmp_path / DIRECTORY / "claim"
    claim.write_text("{}")
    os.utime(claim, (time.time() - age_s,) * 2)
    remove_expired(tmp_path)
    assert claim.exists() is is_kept
