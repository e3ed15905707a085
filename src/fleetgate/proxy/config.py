"""What a worker is told when it is started."""

import signal

import msgspec

ENV = "FLEETGATE_WORKER"
RETIRE = signal.SIGUSR2  # another worker has taken over: finish and end


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's share of what the supervisor opened, as JSON in the environment variable `FLEETGATE_WORKER`.

    Shape: `*_fd` are inherited descriptors, -1 where there is none; `wake_fds` are the write ends of every worker's
    wake pipe, in order. Without `tls_cert` the TLS listener uses the development CA in the data directory. `auth` is
    `keys` or `none`; `access_log` a path, `-` for standard output or `off`; `record` a path, `off` for none. `workers`
    counts the board's columns and `serving` those of one generation (0: all); `layout` is the mark of how the board is
    laid out, empty where that cannot differ.
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
    lb_grace_s: float = 5.0
    grace_s: float = 30.0
