"""What keeps one worker standing: caps on connections, a budget for bodies, shedding, and mistakes of our own.

A request reads one number here, `shed_share`. All else happens with connections, large bodies, and four times a second.
"""

import ipaddress
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetgate.ipc.event_spool import EventRecord
from fleetgate.ipc.log import Level
from fleetgate.ipc.shared_memory import OverloadBits, WorkerCell
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols import http1
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.downstream.request_authorizer import RequestRejected
from fleetgate.proxy.overload.memory_pressure import MemoryPressure
from fleetgate.proxy.overload.watchdog import Watchdog, stack_summary
from fleetgate.proxy.request.handler import RequestHandler

if TYPE_CHECKING:
    from fleetgate.proxy.worker.services import Hub

LOOK_EVERY = 5  # sweeps
TIGHT, SURPLUS, FULL = 0.85, 0.95, 1.0  # of the connections there may be: idle ones close, new ones get 503, none come
DESCRIPTORS_MAX = 1 << 17  # more than one worker's core can serve
DESCRIPTORS_KEPT = 0.9  # of the limit: the rest is for upstreams, files and the Snapshot
IP_CONNECTIONS_MAX = 512  # of one public address in one worker; proxies and offices share one, so it is not small
BODY_SHARE = 0.25  # of the memory there is, over all workers
BODY_BUDGET_BYTES_MIN = http1.BODY_BYTES_MAX + 4 * 1024 * 1024  # the largest body must have room
LINGERING_MAX = 64  # who is refused is told so, but not when that many are being told already
EVENT_EVERY_S = 60.0
LINE_EVERY_S = 1.0
_RETRY = b"retry-after: 1\r\nretry-after-ms: 1000\r\nx-should-retry: true\r\n"
_DESCRIPTORS = Path("/proc/self/fd")


class OverloadManager:
    """One worker's. Made with the hub, before the loop runs."""

    def __init__(self, hub: "Hub") -> None:
        config = hub.config
        self._hub = hub
        self._descriptors = _raise_descriptor_limit()
        self._memory = MemoryPressure()
        self.connections_max = config.connections_max or self._descriptors // 2  # FAULTS.md row 69
        self._ip_max = config.ip_connections_max
        self._key_max = config.key_connections_max
        if self._key_max < 0 or config.auth == "none":
            self._key_max = self.connections_max // 2 if config.auth == "keys" else 0
        share_bytes = int(self._memory.limit_bytes * BODY_SHARE)
        self.body_budget_bytes = (config.body_budget_bytes or share_bytes) // (config.serving or config.workers)
        if not config.body_budget_bytes:
            self.body_budget_bytes = max(self.body_budget_bytes, BODY_BUDGET_BYTES_MIN)
        self.shed_share = 0.0
        self._shed_sum = 0.0
        self._held_bytes = 0
        self._connections = 0
        self._by_address: dict[str, int] = {}
        self._by_key: dict[str, int] = {}
        self._doors: list[Listener] = []
        self._sweeps = 0
        self._refused = 0
        self._said: dict[str, float] = {}
        self._watchdog: Watchdog | None = None
        telemetry = hub.telemetry
        self._mistakes = telemetry.counter("fleetgate_internal_errors_total", {})
        self._lags = telemetry.counter("fleetgate_loop_lags_total", {})
        self._lag_ms = telemetry.counter("fleetgate_loop_lag_milliseconds_total", {})

    def begin(self, period_s: float) -> None:
        """The loop runs and will call `beat` this often."""
        self._watchdog = Watchdog(period_s, self._lagged)
        self._hub.loop.set_exception_handler(lambda _, context: self._uncaught(context))

    def watch(self, door: Listener) -> Listener:
        """Close this door while there are too many connections."""
        self._doors.append(door)
        return door

    # --- connections ---

    def greet(self, client: ClientConnection) -> RequestRejected | None:
        """Count a new connection; the refusal if there are too many."""
        self._connections += 1
        if self._connections >= self.connections_max * SURPLUS:
            self._refused += 1
            if self._refused > LINGERING_MAX:
                client.transport.abort()
            if self._connections >= self.connections_max:
                for door in self._doors:
                    door.pause()
            return self.refusal()
        if not self._ip_max:
            return None
        client.address = _address(str((client.transport.get_extra_info("peername") or ("",))[0]))
        count = self._by_address[client.address] = self._by_address.get(client.address, 0) + 1
        limit = self._ip_max if self._ip_max > 0 else IP_CONNECTIONS_MAX
        if count <= limit or (self._ip_max < 0 and not _is_public(client.address)):
            return None
        self._refused += 1
        if self._refused > LINGERING_MAX:
            client.transport.abort()
        return RequestRejected(*errors.TOO_MANY_CONNECTIONS_OF_ADDRESS.filled(), extra=_RETRY)

    def left(self, client: ClientConnection) -> None:
        """A connection ended."""
        self._connections -= 1
        _count_down(self._by_address, client.address)
        _count_down(self._by_key, client.key)

    def carries(self, client: ClientConnection, key: str) -> bool:
        """Count a connection as that of a key; False if the key has too many. Called for heads not seen before."""
        if not self._key_max or client.key == key:
            return True
        _count_down(self._by_key, client.key)
        client.key = ""
        if self._by_key.get(key, 0) >= self._key_max:
            return False
        self._by_key[key] = self._by_key.get(key, 0) + 1
        client.key = key
        return True

    # --- bodies and shedding ---

    def hold_body(self, more_bytes: int) -> bool:
        """Take bytes of the budget for bodies that do not come in one read; False if there are none left."""
        if self._held_bytes + more_bytes > self.body_budget_bytes:
            self.say("bodies", f"request bodies hold their {self.body_budget_bytes >> 20} MiB; more get 503")
            return False
        self._held_bytes += more_bytes
        return True

    def release_body(self, held_bytes: int) -> None:
        """Give them back."""
        self._held_bytes -= held_bytes

    def sheds(self) -> bool:
        """Whether this new request is one of those to refuse."""
        self._shed_sum += self.shed_share
        if self._shed_sum < 1.0:
            return False
        self._shed_sum -= 1.0
        return True

    def refusal(self) -> RequestRejected:
        """What is said to those."""
        return RequestRejected(*errors.OVERLOADED.filled(), extra=_RETRY)

    # --- the sweep ---

    def sweep(self) -> None:
        """The hub's sweep, which no mistake with one request may end, and a look at what may run short."""
        if self._watchdog is not None:
            self._watchdog.beat()
        self.tend(self._hub.sweep)
        self._sweeps += 1
        if self._sweeps % LOOK_EVERY == 0:
            self._look()

    def tend(self, work: Callable[[], None]) -> None:
        """Do what is done again and again, and must not end with a mistake. FAULTS.md row 75."""
        try:
            work()
        except Exception as error:
            self.mishap(error)

    def _look(self) -> None:
        hub = self._hub
        self._refused = 0
        used = _open_descriptors() / (self._descriptors * DESCRIPTORS_KEPT)
        full = max(self._connections / self.connections_max, used)
        if full >= TIGHT:
            for client in hub.connections:
                if not client.busy and not client.closing and not client.is_new:
                    client.close_if_idle()
        for door in self._doors:
            if full >= FULL:
                door.pause()
            elif full < SURPLUS:
                door.resume()
        by_memory = self._memory.shed_share()
        self.shed_share = max(by_memory, min(1.0, max(0.0, (used - SURPLUS) / (FULL - SURPLUS))))
        short = OverloadBits.MEMORY * (by_memory > 0) + OverloadBits.CONNECTIONS * (full >= TIGHT)
        short += OverloadBits.BODIES * (self._held_bytes > self.body_budget_bytes * TIGHT)
        hub.board.set(hub.config.index, WorkerCell.SHORT, short)
        if by_memory > 0:
            self.say("memory", f"memory runs short: {by_memory:.0%} of new requests get 503, running answers go on")
        if full >= TIGHT:
            self.say("connections", f"connections are at {full:.0%} of what there may be; idle ones close")

    # --- what should not happen ---

    def mishap(self, error: BaseException, client: ClientConnection | None = None) -> None:
        """A mistake of ours: count it, tell where, and end only what it happened to. FAULTS.md row 75."""
        hub = self._hub
        hub.telemetry.cells[self._mistakes] += 1
        touched = _touched(error)
        clients = {each.client for each in touched} | ({client} if client is not None else set())
        ids = {each.client: each.request_id for each in touched if hasattr(each, "request_id")}
        if client is not None and client.conversation is not None:
            touched.add(client.conversation)
            ids.setdefault(client, client.conversation.request_id)
        # The place, not the message: that may hold a prompt or a secret.
        where = stack_summary(error.__traceback__) if error.__traceback__ is not None else "an unknown place"
        for each in clients:
            request_id = ids.setdefault(each, hub.next_id())
            self._line("internal_error", f"{type(error).__name__} at {where}", request_id.decode())
            each.fail(request_id, _put_away)
        if not clients:
            self._line("internal_error", f"{type(error).__name__} at {where}", "")
        for conversation in touched:
            _put_away(conversation)  # those whose client has already gone on

    def _uncaught(self, context: dict[str, Any]) -> None:
        """The loop's handler: of callbacks of upstream connections, of tasks, of what was called soon."""
        error = context.get("exception")
        if isinstance(error, Exception):
            self.mishap(error)
        else:
            self._line("loop", str(context.get("message", "")), "")

    def _lagged(self, lag_s: float, where: str) -> None:
        hub, lag_ms = self._hub, int(lag_s * 1000)
        cells, index = hub.telemetry.cells, hub.config.index
        cells[self._lags] += 1
        cells[self._lag_ms] += lag_ms
        hub.board.set(index, WorkerCell.LAG_MS, lag_ms)
        hub.board.set(index, WorkerCell.LAG_AT_MS, int(hub.clock() * 1000))
        self.say("lag", f"the event loop stood still for {lag_ms} ms: {where}")

    def say(self, what: str, sentence: str) -> None:
        """A line in the log, and an Event, each now and then."""
        now_s = self._hub.clock()
        if now_s - self._said.get(what, float("-inf")) >= LINE_EVERY_S:
            self._said[what] = now_s
            self._line(what, sentence, "")
        if now_s - self._said.get(f"event {what}", float("-inf")) >= EVENT_EVERY_S:
            self._said[f"event {what}"] = now_s
            self._hub.spool.add(EventRecord("Proxy", f"worker {self._hub.config.index}", sentence))

    def _line(self, event: str, message: str, request_id: str) -> None:
        level = Level.ERROR if event == "internal_error" else Level.WARNING
        self._hub.process_log.write(level, event, message, id=request_id)


def _touched(error: BaseException) -> set[RequestHandler]:
    """The requests that a mistake happened to: those that functions on its stack were given."""
    found: set[RequestHandler] = set()
    at = error.__traceback__
    while at is not None:
        code, held = at.tb_frame.f_code, at.tb_frame.f_locals
        # Arguments only: a loop's variable may be somebody whose turn is over.
        given = (held.get(name) for name in code.co_varnames[: code.co_argcount])
        found.update(each for each in given if isinstance(each, RequestHandler))
        at = at.tb_next
    return found


def _put_away(conversation: RequestHandler) -> None:
    """Cancel upstream, settle the place, leave the books; whatever of it does not work any more is left out."""
    conversation.tail = b""
    try:
        conversation.client_gone()
    except Exception:
        hub = conversation.hub
        if conversation.relay is not None:
            conversation.relay.cancel()
        hub.conversations.pop(conversation, None)
        conversation._settle(hub.clock())


def _count_down(counts: dict[str, int], name: str) -> None:
    left = counts.get(name, 0) - 1
    if left > 0:
        counts[name] = left
    else:
        counts.pop(name, None)


def _address(text: str) -> str:
    """What is counted as one address: of IPv6 the network that one customer has."""
    if ":" not in text:
        return text
    address = ipaddress.IPv6Address(text.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)).network_address)


@lru_cache(1024)
def _is_public(address: str) -> bool:
    """Load balancers, and tests, stand at private and loopback addresses and speak for many clients."""
    return ipaddress.ip_address(address).is_global


def _raise_descriptor_limit() -> int:
    """Take as many descriptors as the operator allows; what most systems give at first is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return min(soft, DESCRIPTORS_MAX) if soft > 0 else DESCRIPTORS_MAX
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _open_descriptors() -> int:
    """How many descriptors this process has; 0 where nobody tells."""
    try:
        return _DESCRIPTORS.stat().st_size or len(list(_DESCRIPTORS.iterdir()))  # the size is told since Linux 6.2
    except OSError:
        return 0
