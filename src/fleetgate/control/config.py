"""The configuration of the control process."""

import msgspec

ENV = "FLEETGATE_CONTROL"


class ControlConfig(msgspec.Struct, frozen=True, kw_only=True):
    """JSON in the environment variable `FLEETGATE_CONTROL`.

    Shape: `workers` is the number of columns in shared memory and `serving` the number of workers that should accept
    (0: all of them); `*_fd` are inherited descriptors, -1 if absent, and `board_fd` is that of the shared memory;
    `listen`, `tls_listen` and `api_listen` are HOST:PORT; `egress_allow` are CIDRs; `api_hosts` are further Host names
    of the API; `supervised` means that the parent process replaces workers at SIGHUP.
    """

    data_dir: str
    api_fd: int
    board_fd: int
    workers: int
    serving: int = 0
    config_file: str = ""
    api_listen: str = "127.0.0.1:7801"
    listen: str = ""
    tls_listen: str = ""
    auth: str = "keys"
    egress_allow: list[str] = []
    region: str = ""
    life_fd: int = -1
    supervised: bool = False
    api_hosts: list[str] = []
