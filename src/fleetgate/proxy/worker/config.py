"""The configuration that the supervisor gives a worker at its start."""

import signal

import msgspec

from fleetgate.proxy.transport import DEFAULT_TRANSPORT

ENV = "FLEETGATE_WORKER"
RETIRE = signal.SIGUSR2  # another worker has replaced this one: finish its requests and exit


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's share of what the supervisor opened, as JSON in the environment variable `FLEETGATE_WORKER`.

    Shape: `*_fd` are inherited descriptors, -1 for none; `wake_fds` are the write ends of all workers' wake pipes, in
    order. Without `tls_cert` the TLS listener uses the development CA in the data directory. `auth` is `keys` or
    `none`; `access_log` a path, `-` for standard output or `off`; `record` a path, `off` for none. `workers` is the
    number of columns in shared memory and `serving` that of one generation (0: all); `layout` identifies the layout of
    shared memory, empty if it cannot differ.
    `connections_max` limits one worker, 0 for half of its descriptors; `ip_connections_max` and `key_connections_max`
    limit one address and one key in one worker, 0 for no limit, -1 for 512 of a public address and half of all;
    `body_budget_bytes` limits all workers, 0 for a quarter of the memory. Keys are valid for `max_stale_s` without the
    control plane, 0 for no limit. `transport` is a name in `fleetgate.proxy.transport`.
    """

    index: int
    workers: int
    serving: int = 0
    layout: str = ""
    data_dir: str
    board_fd: int
    listen_fd: int
    tls_listen_fd: int = -1
    tls_cert: str = ""
    tls_key: str = ""
    wake_fd: int = -1
    wake_fds: list[int] = []
    life_fd: int = -1
    auth: str = "keys"
    cors: list[str] = []
    region: str = ""
    access_log: str = "-"
    record: str = "off"
    ops_listen_fd: int = -1
    canary: bool = True  # whether a new Snapshot goes to one worker first
    lb_grace_s: float = 5.0
    grace_s: float = 30.0
    max_stale_s: float = 0.0
    connections_max: int = 0
    ip_connections_max: int = -1
    key_connections_max: int = -1
    body_budget_bytes: int = 0
    transport: str = DEFAULT_TRANSPORT
