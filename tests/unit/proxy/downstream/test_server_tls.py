"""Of a certificate that nears its end is told at 30 days, at 7 and at 1, each once, and anew after a change."""

from pathlib import Path

import trustme
from cryptography import x509

from fleetgate.proxy.downstream.server_tls import ServerTls

DAY_S = 86_400


def put(folder: Path) -> float:
    """A pair of files; when the certificate expires."""
    leaf = trustme.CA().issue_cert("chat.test")
    leaf.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    leaf.private_key_pem.write_to_path(folder / "key.pem")
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes()).not_valid_after_utc.timestamp()


def test_row_67_expiry_is_told_in_time_and_once(tmp_path: Path) -> None:
    end_s = put(tmp_path)
    tls = ServerTls(tmp_path / "cert.pem", tmp_path / "key.pem")
    told = [(days, tls.alarm(end_s - days * DAY_S)) for days in (40, 31, 29, 20, 6.5, 6, 0.9, 0.5, -1)]
    assert [days for days, sentence in told if sentence] == [29, 6.5, 0.9]
    assert "expires in 6.5 days" in dict(told)[6.5]
    end_s = put(tmp_path)
    tls.reload_if_changed()
    assert "has expired" in tls.alarm(end_s + 1)


def test_a_pair_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path)
    tls = ServerTls(tmp_path / "cert.pem", tmp_path / "key.pem")
    before = tls._loaded_stamp
    trustme.CA().issue_cert("other.test").private_key_pem.write_to_path(tmp_path / "key.pem")
    tls.reload_if_changed()
    assert tls._loaded_stamp == before
