"""The configuration that the supervisor gives to a worker."""

import signal

import msgspec

from fleetgate.proxy.transport import DEFAULT_TRANSPORT

ENV = "FLEETGATE_WORKER"
RETIRE = signal.SIGUSR2  # another worker has taken over: drain and exit


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a worker and the descriptors that it inherits, as JSON in the variable `FLEETGATE_WORKER`.

    Shape: `*_fd` are inherited descriptors, -1 for none; `board_fd` is the shared memory's; `wake_fds` are the write
    ends of every worker's wake pipe, in order. Without `tls_cert` the TLS listener uses the development CA in the data
    directory. `auth` is `keys` or `none`; `access_log` is a path, `-` for standard output or `off`; `record` is a path
    or `off`. `workers` counts the columns of shared memory, `serving` those of one generation (0: all). `layout`
    identifies the layout of shared memory; it is empty if the worker's cannot differ.
    `connections_max` is for one worker, 0 for half of its descriptors; `ip_connections_max` and `key_connections_max`
    are for one address and one key in one worker, 0 for no limit, -1 for 512 of a public address and for half of
    `connections_max` of a key; `body_budget_bytes` is for all workers, 0 for a quarter of the memory. `max_stale_s` is
    the time for which keys stay valid without the control plane, 0 for no end.
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
