"""One file adds a client protocol: it is written, found and checked, and no other file is touched."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetgate.protocols import clients
from fleetgate.protocols.clients import find, names
from fleetgate.protocols.clients.base import ClientProtocol
from tests.conformance.test_client_protocols import (
    EVENTS,
    HEADS,
    MODELS,
    STREAMS,
    TEXTS,
    AnyRequest,
    bodies,
    check_any_event,
    check_any_request,
    check_errors,
    check_headers,
    check_marks,
    check_members,
    check_models,
    check_paths,
    check_prompt_marks,
    check_rename,
    check_request,
    check_resume,
    check_usage,
)
from tests.conformance.toys import say
from tests.conformance.transport_rig import dropped_in

TYPED: ClientProtocol = say  # mypy compares every signature of the module with the contract


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[ClientProtocol]:
    """The file in a folder that the package looks into for a while, with a part that is no protocol of its own."""
    shutil.copy(say.__file__, tmp_path)
    (tmp_path / "say_events.py").write_text('"""A part of it."""')
    with dropped_in(clients, str(tmp_path)):
        yield find("say")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(made=bodies(), event=EVENTS, headers=HEADS, model=MODELS, text=TEXTS, streams=st.tuples(STREAMS, STREAMS))
def test_a_dropped_in_protocol_conforms(
    toy: ClientProtocol,
    made: AnyRequest,
    event: bytes,
    headers: dict[bytes, bytes],
    model: str,
    text: str,
    streams: tuple[list[bytes], list[bytes]],
) -> None:
    assert names() == ("openai", "say") and toy.TITLE == "Say API"
    check_members(toy)
    check_paths(toy)
    check_marks(toy)
    check_prompt_marks(toy)
    check_headers(toy, headers)
    check_request(toy, made, model)
    check_any_request(toy, made[1][:-1])
    check_any_event(toy, event)
    check_usage(toy, 3, 4)
    check_rename(toy, made[0]["model"], model, text)
    check_errors(toy, 404, "model_not_found", text)
    check_models(toy, [model])
    check_resume(toy, made[1], *streams)


@pytest.mark.parametrize("missing", ["resume_path", "TITLE", "error_event"])
def test_a_file_without_a_member_is_a_clear_error(
    toy: ClientProtocol, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delattr(toy, missing)
    find.cache_clear()
    with pytest.raises(TypeError, match=f"client protocol say does not define {missing};"):
        find("say")
