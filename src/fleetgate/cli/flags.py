"""Flags of `fleetgate up`: where it may dial, what a worker takes, how it ends."""

from typing import Annotated

import typer

EgressAllow = Annotated[
    str, typer.Option(help="CIDRs, comma-separated, that Deployments given through the API may be in.")
]
LbGrace = Annotated[
    float, typer.Option(help="Seconds between failing readiness and refusing; -1: 0 on loopback, else 5.")
]
Grace = Annotated[float, typer.Option(help="Seconds that running answers get at shutdown.")]
Connections = Annotated[int, typer.Option(help="Client connections of a worker; 0: half of its descriptors.", min=0)]
IpConnections = Annotated[
    int, typer.Option(help="Of one address in a worker; 0: no limit, -1: 512 of a public address.", min=-1)
]
KeyConnections = Annotated[int, typer.Option(help="Of one key in a worker; 0: no limit, -1: half of all.", min=-1)]
BodyBudget = Annotated[
    int, typer.Option(help="For request bodies on their way, of all workers; 0: a quarter of the memory.", min=0)
]
