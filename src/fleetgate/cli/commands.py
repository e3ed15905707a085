"""The commands that are clients of the API: apply, get, describe, delete, keys, calibrate, fault, reload."""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetgate.cli.calibrate import calibrations_path, print_result, run_calibration, show_plan
from fleetgate.cli.client import (
    API_ENV,
    DEFAULT_API,
    DEFAULT_DATA_DIR,
    TOKEN_ENV,
    ApiRejected,
    Client,
    CommandFailed,
    connected,
    resource_path,
)
from fleetgate.cli.confirm import send_confirmed
from fleetgate.cli.fault import FAULT_KINDS, begin_fault, duration_s, stop_fault
from fleetgate.cli.output import Output, console, print_json, print_table, print_yaml
from fleetgate.cli.reload import reload
from fleetgate.cli.revoke import revoke_here
from fleetgate.manifests import Unreadable, read_file, resolve_value

KINDS = ("clusters", "profiles", "deployments", "gateways", "keys", "secrets", "events", "faults", "usage")
EVENTS_DESCRIBED = 20
EVENTS_LISTED = 100
KEY_FLAGS = {"expires": "--expires", "require_fresh_s": "--require-fresh"}

app = typer.Typer(
    name="fleetgate",
    help="One stable endpoint in front of inference Deployments in any region.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(no_args_is_help=True, help="Create and revoke client API keys.", rich_markup_mode="markdown")
app.add_typer(keys_app, name="keys")
fault_app = typer.Typer(
    no_args_is_help=True, help="Inject faults to test a fleet, and end them.", rich_markup_mode="markdown"
)
app.add_typer(fault_app, name="fault")

Api = Annotated[
    str | None, typer.Option("--api", help=f"URL of the API; without it, {API_ENV}.", show_default=DEFAULT_API)
]
Token = Annotated[str | None, typer.Option("--token", help=f"Owner token; without it, {TOKEN_ENV}.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data directory of `fleetgate up` on this machine; URL and token are read there."),
]
Kind = Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(KINDS)}; singular or plural.")]
Form = Annotated[Output, typer.Option("-o", "--output", help="Output format.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a change that removes many Endpoints.")]


@app.command()
def apply(
    file: Annotated[
        list[str], typer.Option("-f", "--file", help="YAML or JSON file, `-` for standard input; repeatable.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the files and show the changes without making them.")
    ] = False,
    yes: Yes = False,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Create or change the resources in files, all or none.

    Every mistake is listed with its place and a fix. A resource that the files do not have is not deleted.

    Examples: `fleetgate apply -f fleet.yaml` · `fleetgate apply -f fleet.yaml --dry-run` ·
    `cat fleet.yaml | fleetgate apply -f -`
    """
    with _failures_printed():
        documents, sources = _read(file)
        with connected(api, token, data_dir) as client:
            try:
                body = {"documents": documents, "dry_run": dry_run}
                answer = send_confirmed(
                    lambda confirmed: client.post("/api/v1/apply", {**body, "confirmed": confirmed}),
                    yes,
                    may_ask="-" not in file,
                )
            except ApiRejected as rejected:
                raise CommandFailed(
                    [
                        f"{sources[mistake.document]}: {mistake.sentence}" if sources else mistake.sentence
                        for mistake in rejected.mistakes
                    ]
                    or rejected.messages
                ) from rejected
        if output is not Output.TABLE:
            _print_value(answer, output)
            return
        for result in answer["results"]:
            would = "would be " if dry_run and result["outcome"] != "unchanged" else ""
            sys.stdout.write(f"{result['kind']}/{result['name']} {would}{result['outcome']}\n")
            if "key" in result:
                sys.stdout.write(f"  key (it is not shown again): {result['key']}\n")


@app.command()
def get(
    kind: Kind,
    name: Annotated[str | None, typer.Argument(help="Name of one resource; all of the kind without it.")] = None,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """List resources, or show one.

    Examples: `fleetgate get deployments` · `fleetgate get gateway chat -o yaml` · `fleetgate get events` ·
    `fleetgate get usage` (sums) · `fleetgate get usage REQUEST_ID` (the attempts of one request)
    """
    plural = _plural(kind)
    with _failures_printed(), connected(api, token, data_dir) as client:
        if plural == "events":
            if name is not None:
                raise CommandFailed(
                    ["Events have no names; use `fleetgate describe KIND NAME` for the Events of a resource"]
                )
            found = client.get("/api/v1/events", limit=EVENTS_LISTED)["items"]
        elif name is not None:
            found = [client.get(resource_path(plural, name))]
            if plural == "usage":
                found = found[0]["attempts"]
        else:
            found = client.get(resource_path(plural))["items"]
        match output:
            case Output.TABLE:
                live = client.get("/api/v1/state") if plural in ("deployments", "gateways") else {}
                print_table(plural, found, live)
            case Output.JSON:
                print_json(found if name is None else found[0])
            case Output.YAML:
                print_yaml(found)


@app.command()
def describe(
    kind: Kind,
    name: Annotated[str, typer.Argument(help="Name of the resource.")],
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Show one resource: its fields, its current state and its Events.

    Examples: `fleetgate describe deployment llama-us` · `fleetgate describe gateway chat -o json`
    """
    plural = _plural(kind)
    if plural in ("events", "faults", "usage"):
        raise typer.BadParameter(
            f"{plural} have no more fields to show; use `fleetgate get {plural}`", param_hint="KIND"
        )
    with _failures_printed(), connected(api, token, data_dir) as client:
        document = client.get(resource_path(plural, name))
        document.pop("status", None)  # `now` includes it
        query = {"kind": document["kind"], "name": name}
        events = client.get("/api/v1/events", limit=EVENTS_DESCRIBED, **query)["items"]
        now = _current_state(client, plural, name)
        if output is not Output.TABLE:
            _print_value({**document, **({"now": now} if now else {}), "events": events}, output)
            return
        print_yaml([document])
        if now:
            sys.stdout.write("\nNow:\n")
            print_yaml([now])
        sys.stdout.write("\nEvents:\n")
        for event in events:
            console().print(f"  {event['at']}  {event['sentence']}", markup=False)


@app.command()
def delete(
    kind: Kind,
    name: Annotated[str, typer.Argument(help="Name of the resource.")],
    yes: Yes = False,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Delete a resource that no other resource uses; a deleted key is refused at once.

    Examples: `fleetgate delete gateway chat` · `fleetgate delete key mobile-app`
    """
    plural = _plural(kind)
    if plural in ("events", "usage"):
        raise typer.BadParameter(f"{plural.capitalize()} cannot be deleted", param_hint="KIND")
    with _failures_printed(), connected(api, token, data_dir) as client:
        path = resource_path(plural, name)
        deleted = send_confirmed(lambda confirmed: client.delete(path, confirmed=int(confirmed)), yes)
        sys.stdout.write(f"{deleted['kind']}/{deleted['name']} deleted\n")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Name of the key: a-z, 0-9 and -.")],
    gateway: Annotated[
        list[str] | None, typer.Option("--gateway", help="Allow this Gateway only; repeatable; all without it.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Allow this model only; repeatable; all without it.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE, for policies; repeatable.")] = None,
    expires: Annotated[
        str, typer.Option("--expires", help="Duration such as 30d or 12h, or a time such as 2030-01-31T12:00:00Z.")
    ] = "",
    kill_streams: Annotated[
        bool, typer.Option("--kill-streams", help="Revoking the key also ends its running requests.")
    ] = False,
    require_fresh: Annotated[
        str,
        typer.Option("--require-fresh", help="Refuse the key if the control plane is away for longer, such as 60s."),
    ] = "",
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Create a client key and print it once: only a hash of it is stored.

    Examples: `fleetgate keys create mobile-app` ·
    `fleetgate keys create batch --gateway chat --model llama-3.3-70b --expires 30d -o json`
    """
    labels = dict(_label(text) for text in label or [])
    document: dict[str, Any] = {"name": name, "gateways": gateway or [], "models": model or [], "labels": labels}
    if expires:
        document["expires"] = expires
    if kill_streams:
        document["kill_streams"] = True
    if require_fresh:
        document["require_fresh_s"] = duration_s(require_fresh, "--require-fresh")
    with _failures_printed(), connected(api, token, data_dir) as client:
        created = client.post(resource_path("keys"), document, KEY_FLAGS)
        if output is Output.TABLE:
            sys.stdout.write(f"{created['key']}\n")
        else:
            _print_value({"name": created["name"], "key": created["key"]}, output)


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="Name or id of the key.")],
    data_dir: Annotated[
        Path, typer.Option("--data-dir", help="Data directory of `fleetgate up` on this machine.")
    ] = DEFAULT_DATA_DIR,
) -> None:
    """Revoke a key on this machine while the control plane cannot be reached.

    The workers refuse the key within 0.2 s. When the control process is back, it deletes the key from the store and
    writes an Event with time and user. While the API answers, use `fleetgate delete key NAME`, which acts everywhere.

    Example: `fleetgate keys revoke mobile-app --data-dir /var/lib/fleetgate`
    """
    with _failures_printed():
        revoke_here(data_dir.expanduser(), name)


@app.command()
def calibrate(
    deployment: Annotated[str, typer.Argument(help="Name of the Deployment to measure.")],
    model: Annotated[str, typer.Option("--model", help="Model to measure; without it, the first one.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the requests without sending them.")] = False,
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Limit of requests.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Limit of tokens, prompt and output.")
    ] = None,
    tpot_s: Annotated[
        float | None, typer.Option("--tpot-s", help="TPOT target; without it, that of its Gateways' slo.")
    ] = None,
    ttft_s: Annotated[
        float | None, typer.Option("--ttft-s", help="TTFT target; without it, that of its Gateways' slo.")
    ] = None,
    profile: Annotated[str, typer.Option("--profile", help="Name of the Profile; without it, DEPLOYMENT-MODEL.")] = "",
    use: Annotated[bool, typer.Option("--use", help="Set `profile:` of the Deployment to the new Profile.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Measure although clients use it; the figures are worse.")
    ] = False,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Measure the capacity of one replica of a Deployment, and create a Profile.

    It sends real requests, in growing batches until the engine is saturated. It refuses while clients use the
    Deployment.

    Examples: `fleetgate calibrate llama-us --dry-run` · `fleetgate calibrate llama-us --use` ·
    `fleetgate calibrate llama-us --max-tokens 50000 -o yaml`
    """
    flags = {
        "model": model or None,
        "requests_max": max_requests,
        "tokens_max": max_tokens,
        "tpot_s": tpot_s,
        "ttft_s": ttft_s,
        "profile": profile or None,
    }
    body = {name: value for name, value in flags.items() if value is not None} | {"use": use, "force": force}
    path = calibrations_path(deployment)
    with _failures_printed(), connected(api, token, data_dir) as client:
        if dry_run:
            show_plan(client, path, body, output)
        else:
            print_result(run_calibration(client, path, body), use, output)


@fault_app.command("inject")
def inject_fault(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(FAULT_KINDS)}.")],
    deployment: Annotated[str, typer.Option(help="Deployment that the fault is for.")],
    share: Annotated[float, typer.Option(help="Share of its requests that are affected, above 0 to 1.")] = 0.1,
    lasts: Annotated[str, typer.Option("--for", help="Duration, at most 1h, such as 60s, 500ms, 2m.")] = "60s",
    stop_below_slo: Annotated[
        float, typer.Option(help="End it when the share of requests inside the SLO falls below this; 0: never.")
    ] = 0.9,
    delay: Annotated[str, typer.Option(help="For `delay`: time added to a request.")] = "2s",
    status: Annotated[int, typer.Option(help="For `error`: status of the response, 400 to 599.")] = 503,
    name: Annotated[str, typer.Option(help="Name of the fault; without it, one is made up.")] = "",
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Inject a fault into a share of the requests to a Deployment, to test what clients notice.

    `delay` sends a request later, `error` answers with a status, `cut` resets a response in the middle, `stall` stops
    it in the middle, `refuse` refuses the connection. The fault ends when its duration is over, even without the
    control plane, or when too few requests are inside the SLO.

    Examples: `fleetgate fault inject cut --deployment llama-us` ·
    `fleetgate fault inject delay --deployment llama-us --delay 5s --share 0.5 --for 2m`
    """
    if kind not in FAULT_KINDS:
        raise typer.BadParameter(
            f"{kind!r} is not a kind of fault; use one of: {', '.join(FAULT_KINDS)}", param_hint="KIND"
        )
    body = {
        "kind": kind,
        "deployment": deployment,
        "share": share,
        "for_s": duration_s(lasts, "--for"),
        "stop_below_slo": stop_below_slo,
        "delay_s": duration_s(delay, "--delay"),
        "status": status,
    } | ({"name": name} if name else {})
    with _failures_printed(), connected(api, token, data_dir) as client:
        begin_fault(client, body, output)


@fault_app.command("end")
def end_fault(
    name: Annotated[str, typer.Argument(help="Name of the fault; `fleetgate get faults` lists them.")],
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """End an injected fault now.

    Example: `fleetgate fault end cut-3fa9c1`
    """
    with _failures_printed(), connected(api, token, data_dir) as client:
        stop_fault(client, name)


@app.command("reload")
def reload_workers(
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Replace all workers and the control process by new ones with the code on disk, without losing a request.

    The new workers start first, on the same sockets; then the old workers finish their responses and exit. To send
    SIGHUP to `fleetgate up` does the same.

    Example: `fleetgate reload`
    """
    with _failures_printed(), connected(api, token, data_dir) as client:
        serving = reload(client)
        sys.stdout.write(f"{len(serving)} new workers serve; the old workers finish their responses and exit\n")


@contextmanager
def _failures_printed() -> Iterator[None]:
    """Print failures as sentences on standard error, and exit with code 1."""
    try:
        yield
    except (CommandFailed, Unreadable) as failure:
        for message in failure.messages:
            sys.stderr.write(f"{message}\n")
        raise typer.Exit(1) from None


def _read(files: list[str]) -> tuple[list[object], list[str]]:
    """Read all files. Return the documents, and the file of each.

    Raises: `Unreadable`, with all mistakes in all files.
    """
    documents: list[object] = []
    sources: list[str] = []
    messages: list[str] = []
    for file in files:
        try:
            values = read_file(file)
        except Unreadable as unreadable:
            messages += unreadable.messages
            continue
        for index, value in enumerate(values):
            try:
                documents.append(resolve_value(value, index))
                sources.append(file)
            except Unreadable as unreadable:
                messages += [f"{file}: {message}" for message in unreadable.messages]
    if messages:
        raise Unreadable(messages)
    return documents, sources


def _plural(kind: str) -> str:
    word = kind.lower()
    for known in KINDS:
        if word in (known, known.removesuffix("s")):
            return known
    close = next(iter(difflib.get_close_matches(word, KINDS, n=1)), "")
    hint = f"did you mean `{close}`?" if close else f"use one of: {', '.join(KINDS)}"
    raise typer.BadParameter(f"there is no kind {kind!r}; {hint}", param_hint="KIND")


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE; write it like team=search", param_hint="--label")
    return name, value


def _current_state(client: Client, plural: str, name: str) -> dict[str, Any]:
    if plural not in ("deployments", "gateways"):
        return {}
    entries = client.get("/api/v1/state")[plural]
    found: dict[str, Any] = next((entry for entry in entries if entry["name"] == name), {})
    return found


def _print_value(value: Any, output: Output) -> None:
    if output is Output.JSON:
        print_json(value)
    else:
        print_yaml([value])


if __name__ == "__main__":
    app()
