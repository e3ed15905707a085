"""Output of resources: a table for a terminal, JSON or YAML for scripts."""

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200  # a program that reads the output needs whole cells
_NONE = "–"


class Output(StrEnum):
    """The formats of output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_yaml(documents: Sequence[Any]) -> None:
    """Print documents as YAML that `apply -f` accepts."""
    sys.stdout.write(yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True))


def print_table(plural: str, documents: Sequence[Mapping[str, Any]], live: Mapping[str, Any]) -> None:
    """Print a table. Shape: `live` is the API's `/state`, which has the current figures of Deployments and Gateways."""
    if not documents:
        sys.stdout.write(f"Nothing to show: no {plural} yet.\n")
        return
    states = {entry["name"]: entry for entry in live.get(plural, [])}
    rows = [_row(plural, document, states.get(document.get("name"), {})) for document in documents]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))  # Text: a name is never markup
    console().print(table)


def console() -> Console:
    """Return a console on standard output, as wide as the terminal, or wide enough for a pipe."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _usage_row(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the row of a sum or of one attempt."""
    if "attempt_id" in document:
        counts = {"ATTEMPT": document["attempt_id"], "OUTCOME": document["outcome"]}
        estimated = "no" if document["exact"] else "yes"
    else:
        counts = {"ATTEMPTS": f"{document['attempts']:,}"}
        estimated = f"{document['estimated']:,}"
    return {
        "KEY": document["key"],
        "GATEWAY": document["gateway"],
        "MODEL": document["model"],
        "DEPLOYMENT": document["deployment"],
        **counts,
        "ESTIMATED": estimated,
        "WORKED": f"{document['prompt_tokens']:,} + {document['output_tokens']:,}",
        "BILLED": f"{document['billed_prompt_tokens']:,} + {document['billed_output_tokens']:,}",
    }


def _up(live: Mapping[str, Any]) -> str:
    """Return a Deployment's state in a word."""
    if not live:
        return _NONE
    if not live["endpoints"]:
        return "no replica"
    return "up" if live["up"] else "down"


def _row(plural: str, document: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, str]:
    name = {"NAME": str(document.get("name", ""))}
    match plural:
        case "clusters":
            return name | {"PROVIDER": document["provider"], "REGION": document["region"]}
        case "deployments":
            return name | {
                "REGION": live.get("region", document.get("region", _NONE)),
                "ENGINE": document["engine"],
                "MODELS": ", ".join(model["name"] for model in document["models"]),
                "UP": _up(live),
                "IN FLIGHT": str(live.get("in_flight", _NONE)),
                "LIMIT": str(live.get("limit") or _NONE),
            }
        case "profiles":
            step = document["decode_step"]
            return name | {
                "MODEL": document["model"],
                "REPLICA": f"{document['accelerators_per_replica']} x {document['sku']}",
                "ENGINE": document["engine"],
                "PREFILL TOKENS/S": f"{document['prefill_tokens_per_s']:.6g}",
                "DECODE STEP": f"{step['base_s'] * 1e3:.3g} ms + {step['per_sequence_s'] * 1e3:.3g} ms a sequence",
            }
        case "gateways":
            return name | {
                "HOST": f"{document['name']}.{document['domain']}",
                "STRATEGY": document["strategy"],
                "UPSTREAMS": ", ".join(upstream["deployment"] for upstream in document["upstreams"]),
                "WAITING": str(live.get("waiting", _NONE)),
            }
        case "keys":
            return name | {
                "ID": document.get("id", _NONE),
                "GATEWAYS": ", ".join(document["gateways"]) or "all",
                "MODELS": ", ".join(document["models"]) or "all",
                "EXPIRES": document.get("expires_at", "never"),
            }
        case "faults":
            return name | {
                "KIND": document["kind"],
                "DEPLOYMENT": document["deployment"],
                "SHARE": f"{document['share']:.0%}",
                "LEFT": f"{document['left_s']:.0f} s",
                "STRUCK": str(document["struck"]),
            }
        case "usage":
            return _usage_row(document)
        case "events":
            resource = document["object"]
            return {
                "AT": document["at"],
                "OBJECT": f"{resource['kind']}/{resource['name']}",
                "WHAT": document["sentence"],
            }
        case _:
            return name | {"CREATED": document["created_at"], "UPDATED": document["updated_at"]}
