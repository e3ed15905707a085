"""Injected faults on a pool, and the authorities that upstream TLS trusts."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import trustme

from fleetgate.core.exchange import Failure
from fleetgate.core.fault_injection import Fault, FaultKind
from fleetgate.proxy.transport import asyncio_transport
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.fault_injection import CUT_BYTES_MAX, ActiveFaults
from fleetgate.proxy.transport.upstream_tls import UpstreamTls
from tests.conformance.transport_rig import BODY, STREAM, STREAM_HEAD, WHOLE, MemoryWorld, Rig, chunked, content, whole


def fault(kind: FaultKind, share: float = 1.0) -> Fault:
    return Fault(name="f", kind=kind, deployment="one", share=share, begins_s=0.0, ends_s=1e12, delay_s=2.0, status=503)


def run(scene: Callable[[Rig], Coroutine[None, None, None]]) -> None:
    world = MemoryWorld()
    world.run(scene(Rig(world, asyncio_transport)))


def faulty_pool(rig: Rig, kind: FaultKind, share: float = 1.0) -> tuple[ConnectionPool, list[Fault]]:
    """A pool with a fault; the list collects it once for each request that gets it."""
    struck: list[Fault] = []
    pool = rig.pool_at(rig.world.port)
    pool.faults = ActiveFaults((fault(kind, share),), struck.append)
    return pool, struck


def test_a_refused_connection() -> None:
    async def scene(rig: Rig) -> None:
        pool, struck = faulty_pool(rig, FaultKind.REFUSE)
        got = rig.send(WHOLE, pool=pool)
        await rig.over(got)
        assert got.failure is Failure.UNREACHABLE and got.reason == "an injected fault refuses the connection"
        with pytest.raises(ConnectionRefusedError):  # a health probe, which asks no `strikes`
            await pool.connect(rig.world.network, 1.0)
        assert len(struck) == 1 and not rig.world.connections

    run(scene)


def test_probes_pass_where_only_some_requests_are_refused() -> None:
    async def scene(rig: Rig) -> None:
        pool, _ = faulty_pool(rig, FaultKind.REFUSE, share=0.5)
        for _ in range(5):
            (await pool.connect(rig.world.network, 1.0)).drop()

    run(scene)


def test_a_delay() -> None:
    async def scene(rig: Rig) -> None:
        pool, _ = faulty_pool(rig, FaultKind.DELAY)
        begin_s = asyncio.get_running_loop().time()
        got = rig.send(WHOLE, pool=pool)
        (await rig.engine()).send(whole(BODY))
        await rig.over(got)
        assert got.held == BODY and asyncio.get_running_loop().time() - begin_s == pytest.approx(2.0, abs=0.1)

    run(scene)


def test_an_error_without_a_request_to_the_engine() -> None:
    async def scene(rig: Rig) -> None:
        pool, _ = faulty_pool(rig, FaultKind.ERROR)
        got = rig.send(WHOLE, pool=pool)
        await rig.over(got)
        assert got.reports == ["connected", "failed"] and not rig.world.connections[0].received

    run(scene)


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.STALL])
def test_a_stream_that_stops_in_the_middle(kind: FaultKind) -> None:
    async def scene(rig: Rig) -> None:
        pool, _ = faulty_pool(rig, kind)
        got = rig.send(STREAM, pool=pool)
        engine = await rig.engine()
        engine.send(STREAM_HEAD)
        for _ in range(CUT_BYTES_MAX // 100 + 5):
            engine.send(chunked(content("x")))
        await rig.world.turns()
        if kind is FaultKind.CUT:
            assert got.reports[-1] == "failed" and got.failure in (Failure.BROKEN, Failure.BAD_OUTPUT)
            assert engine.is_closed
        else:
            assert not got.is_over and not engine.is_closed
        assert len(got.written) < CUT_BYTES_MAX + 200

    run(scene)


def test_a_connection_with_a_fault_is_not_kept() -> None:
    async def scene(rig: Rig) -> None:
        pool, _ = faulty_pool(rig, FaultKind.STALL)
        assert pool.take_idle() is None
        connection = await pool.connect(rig.world.network, 1.0)
        connection.release(1.0)
        assert connection.transport.is_closing() and pool.take_idle() is None

    run(scene)


@pytest.fixture
def authorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "authorities.pem"
    path.write_bytes(trustme.CA().cert_pem.bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    yield path


def test_new_authorities_are_trusted_and_an_incomplete_file_changes_nothing(authorities: Path) -> None:
    tls = UpstreamTls()
    first = tls.context
    assert first.verify_mode is ssl.CERT_REQUIRED and first.check_hostname
    tls.reload_if_changed()
    assert tls.context is first
    whole_file = trustme.CA().cert_pem.bytes()
    for partial in (whole_file[: len(whole_file) // 2], b""):
        authorities.write_bytes(partial)
        tls.reload_if_changed()
        assert tls.context is first
    authorities.write_bytes(whole_file)
    tls.reload_if_changed()
    assert tls.context is not first and len(tls.context.get_ca_certs()) == 1
    authorities.unlink()
    tls.reload_if_changed()
    assert tls.context is not first
