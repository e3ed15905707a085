"""One file adds a client protocol: it is written, found and checked, and no other file is touched."""

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

TOY = '''"""A protocol with one path, `/say`, on engines that speak the OpenAI API."""

import json
from collections.abc import Mapping

from fleetgate.protocols.clients.openai import (
    CREDENTIAL_HINT,
    ERROR_TYPE,
    EVENT_BEGINS,
    PROMPT_MARKS,
    USAGE_ENGINES,
    authorization_of,
    classify_event,
    credential_lines,
    model_body,
    models_body,
    note_choices,
    other_model_name,
    output_tokens_max,
    parse_request,
    read_answer,
    rename_model,
    request_headers,
    response_headers,
    resume_body,
    rewrite,
    new_splicer,
    new_transcript,
)
from fleetgate.protocols.messages import Operation

TITLE = "toy protocol"
OPERATIONS: Mapping[bytes, Operation] = {
    b"/say": Operation("say", b"/chat/completions", b\'"finish_reason":null\', b"data: [DONE]\\n\\n", usage_option=True)
}
MODELS_PATH = b"/voices"


def methods_of(path):
    """POST to say something, GET for the models."""
    if path in OPERATIONS:
        return b"POST, OPTIONS"
    return b"GET, HEAD, OPTIONS" if path == MODELS_PATH or path.startswith(MODELS_PATH + b"/") else b""


def error_body(status, code, message, param=None):
    """An error in a shape of its own."""
    return json.dumps({"error": {"type": "toy", "code": code, "text": message}}, separators=(",", ":")).encode()


def error_event(code, message):
    """The same inside a stream."""
    return b"event: error\\ndata: %b\\n\\n" % error_body(500, code, message)


def event_of_body(body):
    """The body as an error event, for it is one."""
    return b"event: error\\ndata: %b\\n\\n" % body


def status_of_error(data):
    """It tells no status."""
    return 500


def resume_methods(body, operation):
    """None."""
    return frozenset()


def resume_path(method, path):
    """The same path."""
    return path
'''


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[ClientProtocol]:
    """The file in a folder that the package looks into for a while, with a part that is no protocol of its own."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy_events.py").write_text('"""A part of it."""')
    clients.__path__.append(str(tmp_path))
    names.cache_clear()
    yield find("toy")
    clients.__path__.remove(str(tmp_path))
    names.cache_clear()
    find.cache_clear()


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
    assert names() == ("openai", "toy") and toy.TITLE == "toy protocol"
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
    with pytest.raises(TypeError, match=f"client protocol toy does not define {missing};"):
        find("toy")
