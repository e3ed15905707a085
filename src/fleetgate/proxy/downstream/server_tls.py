"""Certificates of the client listener: loaded from files, reloaded when they change, or made by a development CA."""

import datetime
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 825
LEAF_DAYS = 90
ALARM_DAYS = (30, 7, 1)  # faults.md row 67
DAY_S = 86_400.0
_PEM = serialization.Encoding.PEM


class ServerTls:
    """A listener's TLS context. New handshakes use replaced files at once; open connections keep theirs.

    Raises: `OSError` or `ssl.SSLError` if the first load fails. A later bad pair leaves the good one in use.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self.context = server_context()
        self._loaded_stamp = self._stamp()
        self._load()

    def _stamp(self) -> tuple[int, int]:
        return self._cert.stat().st_mtime_ns, self._key.stat().st_mtime_ns

    def _load(self) -> None:
        """Read each file once, check the pair, then use it: the files may change between the check and the use."""
        chain = self._cert.read_bytes()
        with _as_file(self._key.read_bytes() + b"\n" + chain) as pair:
            server_context().load_cert_chain(pair)  # a pair that does not match must not reach the context in use
            self.context.load_cert_chain(pair)
        self._expires_s = x509.load_pem_x509_certificate(chain).not_valid_after_utc.timestamp()
        self._warned_days = 0

    def reload_if_changed(self) -> None:
        """Load the files again if they were replaced by a certificate and key that match."""
        try:
            stamp = self._stamp()
            if stamp != self._loaded_stamp:
                self._load()
                self._loaded_stamp = stamp
        except (OSError, ssl.SSLError, ValueError):
            return

    def alarm(self, now_s: float) -> str:
        """A warning, once each, when the certificate expires in less than 30, 7 and 1 days; else an empty string.

        Units: `now_s` seconds since the epoch.
        """
        left_s = self._expires_s - now_s
        if left_s > ALARM_DAYS[0] * DAY_S:
            return ""
        days = min(days for days in ALARM_DAYS if left_s <= days * DAY_S)
        if days == self._warned_days:
            return ""
        self._warned_days = days
        when = f"expires in {left_s / DAY_S:.1f} days" if left_s > 0 else "has expired"
        return f"The certificate {self._cert} {when}; replace it and its key, the new files are used at once."


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path that only this process can read, for the ssl module to load; in memory only, if the system supports it."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("fleetgate-tls"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.NamedTemporaryFile() as named:
        named.write(content)
        named.flush()
        yield named.name


class DevelopmentTls:
    """A TLS context with a certificate of the development CA for each Gateway, made at its first handshake (SNI).

    Shape: `is_served` says whether a host name is a Gateway's. Other names get the certificate of `localhost`.
    """

    def __init__(self, directory: Path, is_served: Callable[[str], bool]) -> None:
        self._is_served = is_served
        self._ca, self._ca_key = _load_authority(directory)
        self._contexts: dict[str, ssl.SSLContext] = {}
        self.context = self._context_for("localhost", "127.0.0.1", "::1")
        self.context.sni_callback = self._choose

    def reload_if_changed(self) -> None:
        """Do nothing: certificates are made at each start."""

    def alarm(self, now_s: float) -> str:
        """No warning: the certificates are valid for 90 days from the start of the process."""
        return ""

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if name is None or not self._is_served(name.lower()):
            return
        known = self._contexts.get(name.lower())
        if known is None:
            known = self._contexts[name.lower()] = self._context_for(name.lower())
        connection.context = known

    def _context_for(self, *names: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        certificate = _leaf(self._ca, self._ca_key, key, names, now)
        context = server_context()
        with _as_file(_private_bytes(key) + certificate.public_bytes(_PEM) + self._ca.public_bytes(_PEM)) as pair:
            context.load_cert_chain(pair)
        return context


def server_context() -> ssl.SSLContext:
    """TLS 1.2 or later, HTTP/1.1 only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def development_authority(directory: Path) -> Path:
    """Make the development CA if it does not exist. Returns the path of its certificate, which clients must trust."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca_path, key_path = directory / "dev-ca.pem", directory / "dev-ca.key"
    if not (ca_path.exists() and key_path.exists()):
        key = ec.generate_private_key(ec.SECP256R1())
        key_path.touch(mode=0o600)
        key_path.write_bytes(_private_bytes(key))
        ca_path.write_bytes(_authority(key, datetime.datetime.now(datetime.UTC)).public_bytes(_PEM))
    return ca_path


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = serialization.load_pem_private_key((directory / "dev-ca.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{directory / 'dev-ca.key'} is not the key that `--tls dev` made; remove it to make a new CA")
    return x509.load_pem_x509_certificate((directory / "dev-ca.pem").read_bytes()), key


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fleetgate development CA")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key, now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    now: datetime.datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fleetgate development")])
    issuer_key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, key, now, LEAF_DAYS)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer_key_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
