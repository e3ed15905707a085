"""The flags of `fleetgate up` whose help takes more than a line."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None, typer.Option(help="YAML file to apply at start and at a reload; a file alone runs a Gateway.")
]
DataDir = Annotated[Path, typer.Option(help="Where state is kept: database, secrets, Snapshot.")]
ApiListen = Annotated[str, typer.Option(help="HOST:PORT for API, console and metrics; keep it private.")]
Cors = Annotated[list[str] | None, typer.Option(help="Origin of web pages that may call; * for all. Repeatable.")]
OpsListen = Annotated[
    str, typer.Option(help="HOST:PORT where workers answer /healthz, /readyz and /metrics, also without the API.")
]
EgressAllow = Annotated[
    str, typer.Option(help="CIDRs, comma-separated, that Deployments given through the API may be in.")
]
MaxStale = Annotated[
    float, typer.Option(help="Seconds for which API keys stay good without the control plane; 0: for ever.", min=0)
]
LbGrace = Annotated[
    float, typer.Option(help="Seconds between failing readiness and refusing; -1: 0 on loopback, else 5.", min=-1)
]
Grace = Annotated[float, typer.Option(help="Seconds that running answers get at shutdown.", min=0)]
RecordFile = Annotated[
    Path | None,
    typer.Option(
        help="Append every routing decision to FILE, for `fleetgate replay`: with three Deployments about 0.8 KB and "
        "9 µs a request. Names of keys, models and Deployments and token counts; no prompts, answers or secrets."
    ),
]


ConnectionsMax = Annotated[int, typer.Option(help="Client connections of a worker; 0: half of its descriptors.", min=0)]
IpConnectionsMax = Annotated[
    int, typer.Option(help="Those of one address in a worker; 0: no limit, -1: 512 of a public address.", min=-1)
]
KeyConnectionsMax = Annotated[
    int, typer.Option(help="Those of one key in a worker; 0: no limit, -1: half of all.", min=-1)
]
BodyBudgetMib = Annotated[
    int, typer.Option(help="For request bodies on their way, of all workers; 0: a quarter of the memory.", min=0)
]
