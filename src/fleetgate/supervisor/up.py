"""`fleetgate up`: opens sockets and shared memory, and runs workers and the control process under a supervisor."""

import fcntl
import ipaddress
import os
import sys
from functools import partial
from math import inf
from pathlib import Path

import msgspec

from fleetgate.control.config import ENV as CONTROL_ENV
from fleetgate.control.config import ControlConfig
from fleetgate.control.data_dir import DataDirUnusable, open_data_dir, unusable_sentence
from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.shared_memory import WORKERS_MAX, layout
from fleetgate.ipc.signed_file import LAST_GOOD
from fleetgate.policies import plugins
from fleetgate.proxy import transport
from fleetgate.proxy.worker.config import ENV as WORKER_ENV
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.supervisor.child_process import ChildProcess, python_child
from fleetgate.supervisor.listeners import CannotStart, open_listener, open_listeners, split_address
from fleetgate.supervisor.rolling_upgrade import UpgradeHooks
from fleetgate.supervisor.supervisor import Supervisor, create_shared_memory, write_log

LOCK = "up.lock"
GENERATIONS = 2  # of workers: those that serve, and those that they replace
WAIT_S_MAX = 3600.0  # no service manager waits for longer before it kills
LB_GRACE_S = 5.0  # a load balancer in front may send requests for this long after readiness fell
PRIVATE_RANGES = ["127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of `fleetgate up`."""

    config: Path | None
    data_dir: Path
    listen: str
    api_listen: str
    ops_listen: str
    workers: int
    region: str
    tls_listen: str
    tls: str
    auth: str
    cors: list[str]
    egress_allow: list[str]
    access_log: str
    record: Path | None
    lb_grace_s: float
    grace_s: float
    max_stale_s: float
    connections_max: int
    ip_connections_max: int
    key_connections_max: int
    body_budget_mib: int
    transport: str = transport.DEFAULT_TRANSPORT


class OpenedSockets(msgspec.Struct, frozen=True):
    """The descriptors that children inherit."""

    memory: int
    listeners: list[int]
    tls_listeners: list[int]
    api: int
    ops: int
    wake: list[tuple[int, int]]
    life: int


def is_loopback(address: str, flag: str) -> bool:
    """Return whether only this machine can reach a listener."""
    host, _ = split_address(address, flag)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_options(options: UpOptions) -> None:
    """Refuse flags that are unsafe together or cannot work.

    Raises: `CannotStart`, which names the flag and the fix.
    """
    if options.auth not in ("keys", "none"):
        raise CannotStart(f"--auth {options.auth!r} is unknown; give `keys` or `none`")
    for address, flag in ((options.listen, "--listen"), (options.tls_listen, "--tls-listen")):
        if address and options.auth == "none" and not is_loopback(address, flag):
            raise CannotStart(
                f"--auth none accepts requests without a key, so it needs a loopback address, and {flag} is {address}; "
                "use 127.0.0.1 or leave --auth none out"
            )
    if not 1 <= options.workers <= WORKERS_MAX:
        raise CannotStart(f"--workers {options.workers} is out of range; give 1 to {WORKERS_MAX}")
    if bool(options.tls_listen) != bool(options.tls):
        raise CannotStart(
            "--tls-listen and --tls need each other; give --tls-listen HOST:PORT and --tls dev or --tls CERT,KEY"
        )
    for flag, seconds in (("--lb-grace-s", options.lb_grace_s), ("--grace-s", options.grace_s)):
        if seconds > WAIT_S_MAX:
            raise CannotStart(f"{flag} {seconds} is over an hour; give at most {WAIT_S_MAX:.0f}")
    if options.max_stale_s == inf:
        raise CannotStart("--max-stale-s inf is not a number of seconds; give 0 for no limit")
    for text in options.egress_allow:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            raise CannotStart(f"--egress-allow {text!r} is not a CIDR; write it like 10.0.0.0/8") from None
    if options.transport not in transport.names():
        raise CannotStart(f"--transport {options.transport!r} is unknown; give one of: {', '.join(transport.names())}")
    if options.access_log not in ("-", "off"):
        check_writable("--access-log", Path(options.access_log), "choose another path, `-` or `off`")
    if options.record is not None:
        check_writable("--record", options.record, "choose another path")


def check_writable(flag: str, path: Path, fix: str) -> None:
    """Open a file for appending once. Raises: `CannotStart`, which names the flag and the fix."""
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise CannotStart(f"{flag} {path} cannot be written: {error.strerror}; {fix}") from None


def certificate_files(tls: str) -> tuple[str, str]:
    """Split `--tls CERT,KEY` into two paths; both are empty without `--tls` and for `dev`.

    Raises: `CannotStart`, which names the flag and the fix.
    """
    if tls in ("", "dev"):
        return "", ""
    cert, comma, key = tls.partition(",")
    if not comma:
        raise CannotStart(f"--tls {tls!r} is not known; give `dev` or two paths CERT,KEY")
    for path in (cert, key):
        if not Path(path).is_file():
            raise CannotStart(f"--tls: {path} is not a file; give the path of a PEM file")
    return cert, key


def run_up(options: UpOptions) -> int:
    """Open sockets and memory, and run the processes until a signal stops them. Return the exit code.

    Raises: `CannotStart`.
    """
    # Imported here: validation, store and cryptography take half a second, which no other command must wait for.
    from fleetgate.control.resources.config_file import check_file
    from fleetgate.proxy.downstream.server_tls import development_authority

    check_options(options)
    files = certificate_files(options.tls)
    try:
        open_data_dir(options.data_dir)
        lock_fd = lock_data_dir(options.data_dir)
    except DataDirUnusable as error:
        raise CannotStart(str(error)) from None
    plugins.load()  # the control process reports plugins that cannot be used
    if options.config is not None:
        mistakes = check_file(str(options.config), options.data_dir)
        if mistakes:
            raise CannotStart("\n".join(mistakes))
    if options.tls == "dev":
        development_authority(options.data_dir / "tls")
    listeners = open_listeners(options.listen, "--listen", options.workers)
    tls_listeners = open_listeners(options.tls_listen, "--tls-listen", options.workers) if options.tls else []
    api = open_listener(options.api_listen, "--api-listen")
    ops = open_listener(options.ops_listen, "--ops-listen") if options.ops_listen else None
    columns = GENERATIONS * options.workers
    memory_fd, memory = create_shared_memory(columns)
    life_read, life_write = os.pipe()  # only the supervisor has the write end, so its death is an end of file
    wake = [os.pipe() for _ in range(columns)]
    for pair in wake:
        os.set_blocking(pair[0], False)
        os.set_blocking(pair[1], False)
    opened = OpenedSockets(
        memory=memory_fd,
        listeners=[listener.fileno() for listener in listeners],
        tls_listeners=[listener.fileno() for listener in tls_listeners],
        api=api.fileno(),
        ops=ops.fileno() if ops is not None else -1,
        wake=wake,
        life=life_read,
    )

    def workers_of(generation: int) -> list[ChildProcess]:
        first = generation * options.workers
        return [worker_child(first + index, options, opened, files) for index in range(options.workers)]

    children = [*workers_of(0), control_child(options, opened)]
    print_addresses(options, listeners[0].getsockname()[1], api.getsockname()[1])
    try:
        grace_s = options.grace_s + max(options.lb_grace_s, LB_GRACE_S)
        hooks = UpgradeHooks(workers_of, partial(emit_event, EventSpool(options.data_dir)))
        return Supervisor(children, memory, grace_s, write_log, hooks, [*listeners, *tls_listeners]).run()
    finally:
        os.close(life_write)
        os.close(lock_fd)


def lock_data_dir(data_dir: Path) -> int:
    """Lock the data directory for the life of this process; the kernel frees the lock when the process ends.

    Two supervisors on one directory would count the same reservations twice.

    Raises: `CannotStart` if another process has the lock; `DataDirUnusable`.
    """
    try:
        lock_fd = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirUnusable(unusable_sentence(data_dir, error)) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        raise CannotStart(
            f"the data directory {data_dir} is in use by another `fleetgate up`; stop it, or give another directory "
            "with --data-dir"
        ) from None
    return lock_fd


def emit_event(spool: EventSpool, sentence: str) -> None:
    """Log what the supervisor did, and make it an Event."""
    write_log(sentence)
    spool.add(EventRecord("Worker", "all", sentence[:1].upper() + sentence[1:] + "."))


def worker_child(column: int, options: UpOptions, opened: OpenedSockets, files: tuple[str, str]) -> ChildProcess:
    """Return the worker of a column of the shared memory, for the supervisor to start."""
    loopback = is_loopback(options.listen, "--listen")
    index = column % options.workers  # both generations accept from the same sockets
    config = WorkerConfig(
        index=column,
        workers=GENERATIONS * options.workers,
        serving=options.workers,
        layout=layout(),
        data_dir=str(options.data_dir),
        board_fd=opened.memory,
        listen_fd=opened.listeners[index],
        tls_listen_fd=opened.tls_listeners[index] if opened.tls_listeners else -1,
        tls_cert=files[0],
        tls_key=files[1],
        wake_fd=opened.wake[column][0],
        wake_fds=[pair[1] for pair in opened.wake],
        life_fd=opened.life,
        ops_listen_fd=opened.ops,
        auth=options.auth,
        cors=options.cors,
        region=options.region,
        access_log=options.access_log,
        record=str(options.record.absolute()) if options.record is not None else "off",
        lb_grace_s=options.lb_grace_s if options.lb_grace_s >= 0 else 0.0 if loopback else LB_GRACE_S,
        grace_s=options.grace_s,
        max_stale_s=options.max_stale_s,
        connections_max=options.connections_max,
        ip_connections_max=options.ip_connections_max,
        key_connections_max=options.key_connections_max,
        body_budget_bytes=options.body_budget_mib << 20,
        transport=options.transport,
    )
    fds = [config.board_fd, config.listen_fd, config.wake_fd, *config.wake_fds, config.life_fd]
    fds += [fd for fd in (config.tls_listen_fd, config.ops_listen_fd) if fd >= 0]
    argv, env = python_child("fleetgate.proxy.worker", WORKER_ENV, msgspec.json.encode(config))
    return ChildProcess(name=f"worker {index}", argv=argv, env=env, fds=fds, worker=column)


def control_child(options: UpOptions, opened: OpenedSockets) -> ChildProcess:
    """Return the control process, for the supervisor to start."""
    default_ranges = PRIVATE_RANGES if is_loopback(options.api_listen, "--api-listen") else []
    config = ControlConfig(
        data_dir=str(options.data_dir),
        config_file=str(options.config) if options.config is not None else "",
        api_fd=opened.api,
        api_listen=options.api_listen,
        listen=options.listen,
        tls_listen=options.tls_listen,
        board_fd=opened.memory,
        workers=GENERATIONS * options.workers,
        serving=options.workers,
        auth=options.auth,
        egress_allow=options.egress_allow or default_ranges,
        region=options.region,
        life_fd=opened.life,
        supervised=True,
    )
    argv, env = python_child("fleetgate.control.process", CONTROL_ENV, msgspec.json.encode(config))
    fds = [opened.api, opened.memory, opened.life]
    essential = not has_last_good(options.data_dir)
    return ChildProcess(name="control process", argv=argv, env=env, fds=fds, essential=essential)


def has_last_good(data_dir: Path) -> bool:
    """Return whether workers can serve from a Snapshot on disk if the control process does not start."""
    return (data_dir / LAST_GOOD).exists()


def print_addresses(options: UpOptions, port: int, api_port: int) -> None:
    """Print the addresses of the endpoint and the console on standard error."""
    host, _ = split_address(options.listen, "--listen")
    api_host, _ = split_address(options.api_listen, "--api-listen")
    lines = [
        f"endpoint    http://{host}:{port}/v1",
        f"console     http://{api_host}:{api_port}/   (token: {options.data_dir / 'owner-token'})",
    ]
    if options.tls:
        lines.insert(1, f"endpoint    https://{options.tls_listen}/v1")
    if options.tls == "dev":
        lines.append(f"dev CA      {options.data_dir / 'tls' / 'dev-ca.pem'}")
    if options.auth == "none":
        lines.append("client keys are off (--auth none): every process on this machine can use the endpoint")
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()
