"""Which addresses a URL given through the API may have, in all the ways an address can be spelt."""

import asyncio

import pytest

from fleetgate.control.resources.egress import check_addresses, check_literal, check_url, parse_ranges

ALLOWED = parse_ranges(["127.0.0.0/8", "10.0.0.0/8", "::1/128"])


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/v1",
        "http://2852039166/v1",
        "http://0xa9fea9fe/v1",
        "http://0xa9.0xfe.0xa9.0xfe/v1",
        "http://0251.0376.0251.0376/v1",
        "http://169.254.43518/v1",
        "http://[::ffff:169.254.169.254]/v1",
        "http://[fe80::1]/v1",
        "http://[fd00:ec2::254]/v1",
        "http://100.100.100.200/v1",
        "http://metadata.google.internal/v1",
        "http://METADATA.google.internal./v1",
        "http://0.0.0.0/v1",
        "http://[::]/v1",
        "http://224.0.0.1/v1",
    ],
)
def test_metadata_and_link_local_addresses_are_refused_for_everybody(url: str) -> None:
    assert check_literal(url) is not None
    assert asyncio.run(check_url(url, parse_ranges(["0.0.0.0/0", "::/0"]))) is not None


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v1", "http://0x7f.1/v1", "http://2130706433/v1", "http://[::1]/v1"]
)
def test_every_spelling_of_an_allowed_address_is_allowed(url: str) -> None:
    assert check_literal(url) is None
    assert asyncio.run(check_url(url, ALLOWED)) is None


@pytest.mark.parametrize(
    "url",
    ["http://192.168.1.1/v1", "http://0xc0a80101/v1", "http://[::ffff:192.168.1.1]/v1", "http://[2002:c0a8:101::]/v1"],
)
def test_every_spelling_of_another_address_is_refused(url: str) -> None:
    assert asyncio.run(check_url(url, ALLOWED)) is not None


def test_a_refusal_names_address_range_and_flag() -> None:
    denied = check_addresses("gpu.example", "192.168.1.1", ALLOWED)
    assert denied is not None
    assert "192.168.1.1" in denied.message
    assert "10.0.0.0/8" in denied.message
    assert "--egress-allow 192.168.1.1/32" in denied.fix


def test_a_name_that_does_not_resolve_is_refused() -> None:
    denied = asyncio.run(check_url("http://no-such-host.invalid/v1", ALLOWED))
    assert denied is not None
    assert "no-such-host.invalid" in denied.message


def test_no_range_allows_nothing() -> None:
    assert asyncio.run(check_url("http://127.0.0.1/v1", ())) is not None


@pytest.mark.parametrize("text", ["127.0.0.1/33", "local", "300.0.0.0/8"])
def test_what_is_not_a_range_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=text.split("/", maxsplit=1)[0]):
        parse_ranges([text])
