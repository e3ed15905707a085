"""Flags of `fleetgate up` with long help texts."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file to apply at the start and at a reload, such as fleet.yaml.")
]
DataDir = Annotated[Path, typer.Option(help="Directory for the database, secrets and the Snapshot.")]
ApiListen = Annotated[str, typer.Option(help="HOST:PORT for API, console and metrics; do not open it to clients.")]
Cors = Annotated[
    list[str] | None, typer.Option(help="Origin of web pages that may call the endpoint; *: all; repeatable.")
]
OpsListen = Annotated[
    str, typer.Option(help="HOST:PORT at which workers answer /healthz, /readyz and /metrics, also without the API.")
]
EgressAllow = Annotated[
    str,
    typer.Option(help="CIDRs, comma-separated, in which Deployments given through the API may be, such as 10.0.0.0/8."),
]
MaxStale = Annotated[
    float, typer.Option(help="Seconds for which API keys are accepted without the control plane; 0: no limit.", min=0)
]
LbGrace = Annotated[
    float,
    typer.Option(help="Seconds between failing readiness and refusing connections; -1: 0 on loopback, else 5.", min=-1),
]
Grace = Annotated[float, typer.Option(help="Seconds that running responses get at shutdown.", min=0)]
RecordFile = Annotated[
    Path | None,
    typer.Option(
        help="Append every routing decision to this file, for `fleetgate replay`: about 0.8 KB and 9 µs for each "
        "request with three Deployments. It has names of keys, models and Deployments and token counts; no prompts, "
        "responses or secrets."
    ),
]
ConnectionsMax = Annotated[
    int, typer.Option(help="Limit of client connections of a worker; 0: half of its descriptors.", min=0)
]
IpConnectionsMax = Annotated[
    int,
    typer.Option(help="Limit for one client address in a worker; 0: no limit; -1: 512 for a public address.", min=-1),
]
KeyConnectionsMax = Annotated[
    int, typer.Option(help="Limit for one key in a worker; 0: no limit; -1: half of all connections.", min=-1)
]
BodyBudgetMib = Annotated[
    int,
    typer.Option(help="MiB of memory for request bodies, in all workers; 0: a quarter of the machine's memory.", min=0),
]
Workers = Annotated[int, typer.Option(help="Worker processes; 0: one for each core, 8 at most.")]
Region = Annotated[str, typer.Option(help="Region of this machine, such as us-east; its Deployments are preferred.")]
Tls = Annotated[str, typer.Option(help="`dev` for a development CA, or CERT.pem,KEY.pem; changed files are reloaded.")]
Auth = Annotated[str, typer.Option(help="`keys`, or `none` to accept requests without a key (loopback only).")]
Transport = Annotated[str, typer.Option(help="How workers reach Endpoints: a name in `proxy/transport`.", hidden=True)]
