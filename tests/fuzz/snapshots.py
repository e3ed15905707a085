"""Snapshot decoding under fire: the bytes are a whole, usable Snapshot or refused, and nothing else happens."""

import random

import msgspec

from fleetgate.core.model import (
    DEPLOYMENTS_MAX,
    ENDPOINTS_MAX,
    GATEWAYS_MAX,
    Key,
    Policy,
    Price,
    Profile,
    Slo,
    Snapshot,
    decode_snapshot,
    encode_snapshot,
)
from fleetgate.ipc.sealed_secret import UnsealFailed, seal
from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.proxy.routing.routing_table import RoutingTable, RoutingTableBuilder
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetricsCache
from tests.fuzz.mutation import Mutator
from tests.loopback.rig import deployment, gateway

SEAL_KEY = b"s" * 32
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"-1", b"0", b"1e400", b"-1e-400", b"NaN",
    b"9" * 20, b"1.5", b'""', b'"slot":-1,', b'"slot":999999,', b'"port":0,', b'"port":70000,', b'"deployments":[]',
    b'"endpoints":[],', b'"models":{},', b'"version":0,', b'"x":' + b"[" * 2000, b"\xff", b"\x00", b"\\ud800",
    b"\\u0000",
    b'"host":"\\n",', b'"credential":"x",', b'"strategy":"none",', b'"when":"((",', b'"hmac":"",',
    b'"egress_allow":["x"],',
    b'"overflow_at":-1,', b'"retry_budget":1e300,', b'"rank":-5,', b'"units":0,', b'"units":-1e9,', b'"batch_max":0,',
]  # fmt: skip


def examples() -> list[bytes]:
    """Snapshots as the publisher writes them."""
    one = deployment("one", 8001, 0, cluster="c", labels={"a": "b"}, concurrency_max=8, concurrency_written=True)
    two = deployment(
        "two", 8002, 1, models={"m": "meta/llama", "é": "x"}, price=Price(usd_per_hour=2.5), egress_checked=True,
        credential=seal("token", SEAL_KEY, "two"),
        profile=Profile(name="p", prefill_tokens_per_s=15000.0, base_s=0.028, per_sequence_s=0.0004, kv_tokens=120000),
    )  # fmt: skip
    rule = Policy(name="r", when='key.labels.a == "b"', require='deployment.labels.a == "b"', prefer=("one",))
    site = gateway("one", "two", slo=Slo(), policies=(rule,), default=True)
    key = Key(id="AAAABBBBCC", name="k", secret_hmac="0" * 64, models=("m",), labels={"a": "b"}, expires_s=2e9)
    whole = Snapshot(
        version=7, made_at_s=1.7e9, gateways=(site,), deployments=(one, two), keys=(key,), egress_allow=("10.0.0.0/8",)
    )
    small = Snapshot(version=1, made_at_s=0.0, gateways=(gateway("one"),), deployments=(one,))
    return [encode_snapshot(whole), encode_snapshot(small), encode_snapshot(Snapshot(version=1, made_at_s=0.0))]


class Snapshots:
    """Mutated Snapshots. What a worker does with one that decodes, it does here too."""

    name = "snapshots"

    def __init__(self) -> None:
        self._examples = examples()
        self._maker: RoutingTableBuilder
        self._uses = 0
        self.taken = 0

    def make(self, rng: random.Random) -> bytes:
        """An input."""
        return Mutator(rng, TOKENS).damage(rng.choice(self._examples))

    def check(self, data: bytes, rng: random.Random) -> None:
        """It is refused, or it can be used, and says the same when it is written again."""
        try:
            snapshot = decode_snapshot(data)
        except msgspec.MsgspecError as error:
            assert str(error)
            return
        self.taken += 1
        assert decode_snapshot(encode_snapshot(snapshot)) == snapshot
        places = [(one.slot, DEPLOYMENTS_MAX) for one in snapshot.deployments]
        places += [(one.slot, ENDPOINTS_MAX) for made in snapshot.deployments for one in made.endpoints]
        places += [(one.slot, GATEWAYS_MAX) for one in snapshot.gateways]
        assert all(0 <= slot < end for slot, end in places), "a slot outside of the shared memory"
        if self._uses % 1000 == 0:  # metric cells are for names, and damage makes new names
            board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
            self._maker = RoutingTableBuilder(
                RequestMetricsCache(WorkerMetrics(board, 0)), "here", lambda: SEAL_KEY, lambda deployment: None
            )
        self._uses += 1
        try:
            RoutingTable(snapshot, self._maker, None, 1.0)
        except (UnsealFailed, KeyError, ValueError):
            return  # what the worker refuses with a line, keeping the last good one
