"""HTTPS on the client listener: a development CA, one certificate a Gateway by SNI, files that are replaced."""

import socket
import ssl
from pathlib import Path

import httpx2
import pytest
import trustme
from cryptography import x509

from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway
from tests.waiting import wait_for


def shown_names(port: int, server_name: str, trust: ssl.SSLContext) -> set[str]:
    """The names in the certificate that a handshake for `server_name` gets; it must verify."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname=server_name) as wrapped,
    ):
        certificate = x509.load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))


def test_the_development_ca_serves_every_gateway_under_its_own_name(tmp_path: Path) -> None:
    with engine("--model", "m", "--prefill-tokens-per-s", "0", "--decode-base-s", "0") as url:
        documents = [deployment("a", url), gateway("chat", "a", default=True), gateway("lab", "a")]
        with Up(tmp_path, documents, "--tls", "dev") as up:
            authority = up.data_dir / "tls" / "dev-ca.pem"
            assert str(authority) in up.log.read_text()
            trust = ssl.create_default_context(cafile=str(authority))
            assert shown_names(up.tls_port, "chat.test", trust) == {"chat.test"}
            assert shown_names(up.tls_port, "lab.test", trust) == {"lab.test"}
            with pytest.raises(ssl.SSLCertVerificationError):
                shown_names(up.tls_port, "nobody.test", trust)
            key = up.new_key("tls")
            answer = httpx2.post(
                f"https://127.0.0.1:{up.tls_port}/v1/chat/completions",
                json={"model": "m", "messages": [{"role": "user", "content": "x" * 200_000}], "max_tokens": 2},
                headers={"authorization": f"Bearer {key}"},
                verify=trust,
                trust_env=False,
            )
            assert answer.status_code == 200, answer.text
            with socket.create_connection(("127.0.0.1", up.tls_port), timeout=10) as plain:
                old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
                with pytest.warns(DeprecationWarning):
                    old.maximum_version = ssl.TLSVersion.TLSv1_1
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    old.wrap_socket(plain)


def test_replaced_certificate_files_are_used_and_half_written_ones_are_not(tmp_path: Path) -> None:
    authority = trustme.CA()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(*names: str) -> None:
        leaf = authority.issue_cert(*names)
        for path, pem in ((cert, leaf.cert_chain_pems[0]), (key, leaf.private_key_pem)):
            fresh = path.with_suffix(".new")
            pem.write_to_path(fresh)
            fresh.rename(path)

    put("chat.test", "first.test")
    documents = [deployment("a", "http://127.0.0.1:9/v1"), gateway("chat", "a")]
    with Up(tmp_path, documents, "--tls", f"{cert},{key}") as up:
        assert shown_names(up.tls_port, "chat.test", trust) == {"chat.test", "first.test"}
        good = cert.read_bytes()
        cert.write_bytes(good[: len(good) // 2])
        assert shown_names(up.tls_port, "chat.test", trust) == {"chat.test", "first.test"}
        put("chat.test", "second.test")
        wait_for(lambda: "second.test" in shown_names(up.tls_port, "chat.test", trust))
