"""The commands that are clients of the API: apply, get, describe, delete, keys."""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetgate.cli import calibrate as calibrating
from fleetgate.cli import fault as faulting
from fleetgate.cli import reload as reloading
from fleetgate.cli import revoke as revoking
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
from fleetgate.cli.confirm import sent_once_sure
from fleetgate.cli.output import Output, console, print_json, print_table, print_yaml
from fleetgate.manifests import Unreadable, read_file, resolve_value

KINDS = ("clusters", "profiles", "deployments", "gateways", "keys", "secrets", "events", "faults", "usage")
EVENTS_DESCRIBED = 20
EVENTS_LISTED = 100

app = typer.Typer(
    name="fleetgate",
    help="One stable endpoint in front of inference Deployments in any region.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_app = typer.Typer(no_args_is_help=True, help="Client API keys.", rich_markup_mode="markdown")
app.add_typer(keys_app, name="keys")
fault_app = typer.Typer(no_args_is_help=True, help="Faults on purpose, with an end.", rich_markup_mode="markdown")
app.add_typer(fault_app, name="fault")

Api = Annotated[str | None, typer.Option("--api", help=f"The API's URL, else {API_ENV}.", show_default=DEFAULT_API)]
Token = Annotated[str | None, typer.Option("--token", help=f"The owner's token, else {TOKEN_ENV}.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where `fleetgate up` on this machine keeps its data: finds URL and token."),
]
Kind = Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {', '.join(KINDS)}; singular or plural.")]
Form = Annotated[Output, typer.Option("-o", "--output", help="How to print.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask although many Endpoints go out of use.")]


@app.command()
def apply(
    file: Annotated[list[str], typer.Option("-f", "--file", help="A YAML or JSON file, `-` for standard input.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and tell, but change nothing.")] = False,
    yes: Yes = False,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Create or change everything in files, all or nothing.

    Every mistake is listed, each with its place and a fix. What is missing in a file is not deleted.

    Examples: `fleetgate apply -f fleet.yaml` · `fleetgate apply -f fleet.yaml --dry-run` ·
    `cat fleet.yaml | fleetgate apply -f -`
    """
    with _told():
        documents, sources = _read(file)
        with connected(api, token, data_dir) as client:
            try:
                given = {"documents": documents, "dry_run": dry_run}
                answer = sent_once_sure(
                    lambda sure: client.post("/api/v1/apply", {**given, "confirmed": sure}), yes, "-" not in file
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
            _print_one(answer, output)
            return
        for result in answer["results"]:
            would = "would be " if dry_run and result["outcome"] != "unchanged" else ""
            sys.stdout.write(f"{result['kind']}/{result['name']} {would}{result['outcome']}\n")
            if "key" in result:
                sys.stdout.write(f"  its key, shown this once: {result['key']}\n")


@app.command()
def get(
    kind: Kind,
    name: Annotated[str | None, typer.Argument(help="Only this one.")] = None,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """List resources, or show one.

    Examples: `fleetgate get deployments` · `fleetgate get gateway chat -o yaml` · `fleetgate get events` ·
    `fleetgate get usage` (sums) · `fleetgate get usage REQUEST_ID` (its attempts)
    """
    plural = _plural(kind)
    with _told(), connected(api, token, data_dir) as client:
        if plural == "events":
            if name is not None:
                raise CommandFailed(
                    ["Events have no names; use `fleetgate describe KIND NAME` for one resource's Events"]
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
    name: Annotated[str, typer.Argument(help="Which one.")],
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Show one resource in full, how it is now, and what happened to it.

    Examples: `fleetgate describe deployment llama-us` · `fleetgate describe gateway chat -o json`
    """
    plural = _plural(kind)
    if plural in ("events", "faults", "usage"):
        raise typer.BadParameter(f"there is no more to tell; use `fleetgate get {plural}`", param_hint="KIND")
    with _told(), connected(api, token, data_dir) as client:
        document = client.get(resource_path(plural, name))
        document.pop("status", None)  # `now` has it, and more
        query = {"kind": document["kind"], "name": name}
        events = client.get("/api/v1/events", limit=EVENTS_DESCRIBED, **query)["items"]
        now = _now(client, plural, name)
        if output is not Output.TABLE:
            _print_one({**document, **({"now": now} if now else {}), "events": events}, output)
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
    name: Annotated[str, typer.Argument(help="Which one.")],
    yes: Yes = False,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Delete a resource that nothing else uses; a deleted key is refused at once.

    Examples: `fleetgate delete gateway chat` · `fleetgate delete key mobile-app`
    """
    plural = _plural(kind)
    if plural in ("events", "usage"):
        raise typer.BadParameter(f"{plural.capitalize()} cannot be deleted", param_hint="KIND")
    with _told(), connected(api, token, data_dir) as client:
        path = resource_path(plural, name)
        deleted = sent_once_sure(lambda sure: client.delete(path, confirmed=int(sure)), yes)
        sys.stdout.write(f"{deleted['kind']}/{deleted['name']} deleted\n")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is: a-z, 0-9 and -.")],
    gateway: Annotated[list[str] | None, typer.Option("--gateway", help="Only this Gateway; may be repeated.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="NAME=VALUE; may be repeated.")] = None,
    expires: Annotated[str, typer.Option("--expires", help="30d, 12h, or a time like 2030-01-31T12:00:00Z.")] = "",
    kill_streams: Annotated[
        bool, typer.Option("--kill-streams", help="Revoking it ends its running requests too.")
    ] = False,
    require_fresh: Annotated[
        str, typer.Option("--require-fresh", help="60s: refused when the control plane is away for longer.")
    ] = "",
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Create a client key and print it, this once: only a hash is kept.

    Without --gateway and --model it may use all of them.

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
        document["require_fresh_s"] = faulting.duration_s(require_fresh, "--require-fresh")
    with _told(), connected(api, token, data_dir) as client:
        created = client.post(resource_path("keys"), document)
        if output is Output.TABLE:
            sys.stdout.write(f"{created['key']}\n")
        else:
            _print_one({"name": created["name"], "key": created["key"]}, output)


@keys_app.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="The key's name or id.")],
    data_dir: Annotated[
        Path, typer.Option("--data-dir", help="Where `fleetgate up` on this machine keeps its data.")
    ] = DEFAULT_DATA_DIR,
) -> None:
    """Revoke a key on this machine without the API, for when the control plane cannot be reached.

    The workers refuse it within 0.2 s. The store learns of it when the control process is back, with an Event that
    says who did it and when. While the API answers, `fleetgate delete key NAME` does the same for all.

    Example: `fleetgate keys revoke mobile-app --data-dir /var/lib/fleetgate`
    """
    with _told():
        revoking.revoke_here(data_dir.expanduser(), name)


@app.command()
def calibrate(
    deployment: Annotated[str, typer.Argument(help="Which Deployment is measured.")],
    model: Annotated[str, typer.Option("--model", help="Which of its models, else the first.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    max_requests: Annotated[int | None, typer.Option("--max-requests", min=1, help="Send no more.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Prompt and output, no more.")] = None,
    tpot_s: Annotated[float | None, typer.Option("--tpot-s", help="Held to this, else to its Gateways' slo.")] = None,
    ttft_s: Annotated[float | None, typer.Option("--ttft-s", help="Held to this, else to its Gateways' slo.")] = None,
    profile: Annotated[str, typer.Option("--profile", help="The Profile's name, else DEPLOYMENT-MODEL.")] = "",
    use: Annotated[bool, typer.Option("--use", help="Let the Deployment name the Profile at once.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also while it serves traffic: the figures suffer.")] = False,
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Measure what one replica of a Deployment takes, and write a Profile.

    It sends real requests, in ever larger waves until the engine is saturated, and refuses while clients use it.

    Examples: `fleetgate calibrate llama-us --dry-run` · `fleetgate calibrate llama-us --use` ·
    `fleetgate calibrate llama-us --max-tokens 50000 -o yaml`
    """
    given = {
        "model": model or None,
        "requests_max": max_requests,
        "tokens_max": max_tokens,
        "tpot_s": tpot_s,
        "ttft_s": ttft_s,
        "profile": profile or None,
    }
    order = {name: value for name, value in given.items() if value is not None} | {"use": use, "force": force}
    path = calibrating.path_of(deployment)
    with _told(), connected(api, token, data_dir) as client:
        if dry_run:
            calibrating.show_plan(client, path, order, output)
        else:
            calibrating.print_result(calibrating.calibrate(client, path, order), use, output)


@fault_app.command("inject")
def inject_fault(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {', '.join(faulting.KINDS)}.")],
    deployment: Annotated[str, typer.Option(help="The Deployment whose requests are struck.")],
    share: Annotated[float, typer.Option(help="Which share of them, 0 to 1.")] = 0.1,
    lasts: Annotated[str, typer.Option("--for", help="How long, an hour at most: 60s, 500ms, 2m.")] = "60s",
    stop_below_slo: Annotated[
        float, typer.Option(help="End when a smaller share of requests is inside the SLO; 0 for never.")
    ] = 0.9,
    delay: Annotated[str, typer.Option(help="How much later, with `delay`.")] = "2s",
    status: Annotated[int, typer.Option(help="The answer's status, with `error`.")] = 503,
    name: Annotated[str, typer.Option(help="What to call it.")] = "",
    output: Form = Output.TABLE,
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Let some requests to a Deployment fail, to see what clients notice.

    It ends by itself: when its time is over, whatever else has died, and when too few requests are inside the SLO.

    Examples: `fleetgate fault inject cut --deployment llama-us` ·
    `fleetgate fault inject delay --deployment llama-us --delay 5s --share 0.5 --for 2m`
    """
    if kind not in faulting.KINDS:
        raise typer.BadParameter(f"{kind!r} is none of: {', '.join(faulting.KINDS)}", param_hint="KIND")
    order = {
        "kind": kind,
        "deployment": deployment,
        "share": share,
        "for_s": faulting.duration_s(lasts, "--for"),
        "stop_below_slo": stop_below_slo,
        "delay_s": faulting.duration_s(delay, "--delay"),
        "status": status,
    } | ({"name": name} if name else {})
    with _told(), connected(api, token, data_dir) as client:
        faulting.inject(client, order, output)


@fault_app.command("end")
def end_fault(
    name: Annotated[str, typer.Argument(help="Which one; `fleetgate get faults` lists them.")],
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """End an injected fault now.

    Example: `fleetgate fault end cut-3fa9c1`
    """
    with _told(), connected(api, token, data_dir) as client:
        faulting.end(client, name)


@app.command("reload")
def reload_workers(
    api: Api = None,
    token: Token = None,
    data_dir: DataDir = None,
) -> None:
    """Replace all workers and the control process by ones with the code on disk; no answer is refused or cut.

    The new workers come up first, on the same sockets; the old ones finish their answers. The same as sending SIGHUP
    to `fleetgate up`.

    Example: `fleetgate reload`
    """
    with _told(), connected(api, token, data_dir) as client:
        serving = reloading.reload(client)
        sys.stdout.write(f"{len(serving)} new workers serve; the old ones finish their answers\n")


@contextmanager
def _told() -> Iterator[None]:
    """Failures as sentences on standard error and exit code 1."""
    try:
        yield
    except (CommandFailed, Unreadable) as failure:
        for message in failure.messages:
            sys.stderr.write(f"{message}\n")
        raise typer.Exit(1) from None


def _read(files: list[str]) -> tuple[list[object], list[str]]:
    """The documents of all files, and of each the file it came from; every unreadable one is told."""
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
    meant = next(iter(difflib.get_close_matches(word, KINDS, n=1)), "")
    hint = f"did you mean `{meant}`?" if meant else f"use one of: {', '.join(KINDS)}"
    raise typer.BadParameter(f"there is no kind {kind!r}; {hint}", param_hint="KIND")


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--label")
    return name, value


def _now(client: Client, plural: str, name: str) -> dict[str, Any]:
    if plural not in ("deployments", "gateways"):
        return {}
    entries = client.get("/api/v1/state")[plural]
    found: dict[str, Any] = next((entry for entry in entries if entry["name"] == name), {})
    return found


def _print_one(value: Any, output: Output) -> None:
    if output is Output.JSON:
        print_json(value)
    else:
        print_yaml([value])


if __name__ == "__main__":
    app()
