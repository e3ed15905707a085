"""Files of documents: what is read, what is refused, and what the sentence says."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.control.resources.config_file import check_file, load_documents
from fleetgate.manifests import Unreadable, parse, read_file, resolve_value


def refused(data: bytes) -> str:
    with pytest.raises(Unreadable) as caught:
        parse(data, "fleet.yaml")
    (message,) = caught.value.messages
    assert message.startswith("fleet.yaml: ")
    return message


def test_yaml_and_json_say_the_same() -> None:
    documents: list[object] = [{"kind": "Cluster", "name": "a"}, {"kind": "Cluster", "name": "b"}]
    assert parse(b"kind: Cluster\nname: a\n---\n---\nkind: Cluster\nname: b\n", "f") == documents
    assert parse(json.dumps(documents).encode(), "f") == documents
    assert parse(json.dumps(documents[0]).encode(), "f") == documents[:1]
    assert parse(b"{kind: Cluster, name: a}", "f") == documents[:1]
    assert parse(b"\xef\xbb\xbfkind: Cluster\nname: a\n", "f") == documents[:1]


def test_a_key_given_twice_is_told_with_its_line() -> None:
    assert "line 3" in refused(b"kind: Cluster\nname: a\nname: b\n")
    assert "`name` is given twice" in refused(b'{"name": "a", "name": "b"}')


def test_bad_yaml_is_told_with_its_line() -> None:
    assert "line 2" in refused(b"kind: Cluster\n  name: [a\n")
    assert "UTF-8" in refused(b"\xff\xfe")
    assert "!!python" not in str(parse(b"a: 1", "f"))
    refused(b"!!python/object/apply:os.system [true]")


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert "aliases" in refused("\n".join(lines).encode())


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_with_a_sentence(data: bytes) -> None:
    try:
        parse(data, "f")
    except Unreadable as unreadable:
        assert all(message.startswith("f: ") for message in unreadable.messages)


def test_secrets_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "from-env")
    (tmp_path / "token").write_text("from-file\n")
    for source, value in (({"env": "TOKEN"}, "from-env"), ({"file": str(tmp_path / "token")}, "from-file")):
        resolved = resolve_value({"kind": "Secret", "name": "s", "value_from": source}, 0)
        assert resolved == {"kind": "Secret", "name": "s", "value": value}


@pytest.mark.parametrize(
    "source", [{"env": "NOT_SET_ANYWHERE"}, {"file": "/nowhere/at/all"}, {}, "x", {"env": "A", "file": "b"}]
)
def test_a_source_that_gives_nothing_is_told(source: object) -> None:
    with pytest.raises(Unreadable) as caught:
        resolve_value({"kind": "Secret", "name": "s", "value_from": source}, 0)
    assert caught.value.messages[0].startswith("Secret/s: value_from")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(Unreadable) as caught:
        read_file(str(tmp_path / "none.yaml"))
    assert "none.yaml" in caught.value.messages[0]


def test_a_bad_source_hides_no_other_mistake(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "kind: Secret\nname: s\nvalue_from: {env: NOT_SET_ANYWHERE}\n---\nkind: Cluster\nname: c\nprovider: local\n"
    )
    messages = check_file(str(path), tmp_path / "data")
    assert [message.split(": ")[1:3] for message in messages] == [
        ["Secret/s", "value_from.env"],
        ["Cluster/c", "region"],
    ]
    assert not (tmp_path / "data").exists(), "a check leaves nothing behind"
    with pytest.raises(Unreadable):
        load_documents(str(path))
