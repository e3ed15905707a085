"""The guided tour: four claims, each shown and checked on real engines."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from fleetgate.demo.fleet import MODEL, REGIONS, SLOTS, DemoFailed, DemoFleet
from fleetgate.demo.load import DemoLoad, DemoRequest, LongStream, quantile_s, sdk, send_request

RESPONSE_TOKENS = 16
LONG_STREAM_TOKENS = 600
PHASE_S_MAX = 90.0
RECOVERY_S_MAX = 60.0
FIRST, SECOND = REGIONS[:2]
_BELOW_LIMIT_REQUESTS = 6
_ABOVE_LIMIT_REQUESTS = 16
_AFTER_KILL_REQUESTS = 16


def claim(holds: bool, failure: str) -> None:
    """Check a claim. Raises: `DemoFailed`, with a sentence on what was seen instead."""
    if not holds:
        raise DemoFailed(f"this claim of the tour does not hold: {failure}")


def run_tour(fleet: DemoFleet, console: Console) -> None:
    """Show all claims. Raises: `DemoFailed` at the first one that does not hold."""
    steps: Sequence[tuple[str, Callable[[DemoFleet, Console], None]]] = (
        ("One endpoint answers with a real model, as a stream", show_stream),
        ("When the first region is full, the next one takes the rest", show_overflow),
        ("The first region dies under load, and no request fails", show_death),
        ("The first region is started again and gets its traffic back", show_recovery),
    )
    for number, (title, show) in enumerate(steps, 1):
        console.rule(f"[bold]{number} of {len(steps)}: {title}", align="left")
        began_s = time.monotonic()
        show(fleet, console)
        console.print(f"[green]✓ holds[/] [dim]({time.monotonic() - began_s:.0f} s)[/]\n")


def show_stream(fleet: DemoFleet, console: Console) -> None:
    """Print a streamed response as it arrives."""
    question = "What is a lighthouse? Answer in one sentence."
    console.print(f"[dim]{question}[/]")
    with sdk(fleet) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=60, stream=True
        )
        chunks = 0
        finish_reason = None
        with raw.parse() as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    if choice.delta.content:
                        chunks += 1
                        console.print(choice.delta.content, end="", markup=False, highlight=False, soft_wrap=True)
                    finish_reason = choice.finish_reason or finish_reason
    region = raw.headers.get("x-fleetgate-region", "")
    console.print(f"\n[dim]{chunks} chunks from {region}, finish_reason {finish_reason}[/]")
    claim(chunks > 1 and finish_reason is not None, f"the stream had {chunks} chunks and ended with {finish_reason}")
    claim(
        region == FIRST,
        f"an idle fleet should answer from {FIRST}, its first rank; the region was {region or 'not named'}",
    )


def show_overflow(fleet: DemoFleet, console: Console) -> None:
    """Send load within the first region's limit, and above it."""
    below = _phase(fleet, SLOTS, _BELOW_LIMIT_REQUESTS)
    console.print(_table(f"{SLOTS} in parallel: {FIRST} has free slots ({SLOTS})", below))
    above = _phase(fleet, 2 * SLOTS, _ABOVE_LIMIT_REQUESTS)
    console.print(_table(f"{2 * SLOTS} in parallel: {FIRST} is full, {SECOND} takes the rest", above))
    _claim_no_failures([*below, *above])
    first, second = _share(below, FIRST), _share(below, SECOND)
    claim(first == 1.0, f"below the limit of {FIRST} all should stay there; it got {first:.0%}, {SECOND} {second:.0%}")
    claim(
        _share(above, FIRST) > 0 and _share(above, SECOND) > 0, f"load above {FIRST}'s limit should reach both regions"
    )


def show_death(fleet: DemoFleet, console: Console) -> None:
    """Kill a region under load."""
    long_stream = LongStream(fleet, LONG_STREAM_TOKENS)
    long_stream.start()
    long_stream.begun.wait(PHASE_S_MAX)
    claim(
        long_stream.region == FIRST and not long_stream.error,
        f"the long stream should run in {FIRST}: {long_stream.error or long_stream.region}",
    )
    load = DemoLoad(fleet, clients=2 * SLOTS - 1, tokens=RESPONSE_TOKENS, streamed_every=3)
    load.start()
    try:
        load.wait(lambda requests: len(requests) >= _BELOW_LIMIT_REQUESTS, PHASE_S_MAX)
        was_running = long_stream.is_alive()
        killed_s = time.monotonic()
        victim = fleet.kill_region(FIRST)
        console.print(f"[bold red]kill -9[/] the engine of {FIRST} (process {victim.ref}) while it works")
        enough = load.wait(
            lambda requests: sum(request.started_s > killed_s for request in requests) >= _AFTER_KILL_REQUESTS,
            PHASE_S_MAX,
        )
    finally:
        requests = load.stop()
    long_stream.join(PHASE_S_MAX)
    before = [request for request in requests if request.started_s <= killed_s]
    after = [request for request in requests if request.started_s > killed_s]
    console.print(_table("started before the kill", before))
    console.print(_table("started after the kill", after))
    moved = sum(request.attempts > 1 for request in requests)
    failed = sum(bool(request.error) for request in requests)
    console.print(f"{len(requests)} requests, {failed} failed, {moved} moved to another region without an error")
    _claim_no_failures(requests)
    claim(enough, f"{_AFTER_KILL_REQUESTS} requests should end within {PHASE_S_MAX:.0f} s of the kill")
    _check_long_stream(fleet, long_stream, was_running, console)


def _check_long_stream(fleet: DemoFleet, long_stream: LongStream, was_running: bool, console: Console) -> None:
    """Compare the stream that ran when its region died with the same stream without a fault."""
    claim(
        long_stream.is_complete,
        f"the interrupted stream should be resumed: {long_stream.error or 'it ended without a finish_reason'}",
    )
    if not was_running:
        console.print("[dim]The long stream had ended before the kill.[/]")
        return
    undisturbed = LongStream(fleet, LONG_STREAM_TOKENS)
    undisturbed.start()
    undisturbed.join(PHASE_S_MAX)
    claim(
        undisturbed.is_complete, f"the same stream without a fault should end with a finish_reason: {undisturbed.error}"
    )
    claim(
        undisturbed.text == long_stream.text,
        "the interrupted stream should have the same text as the stream without a fault",
    )
    console.print(
        f"The long stream was interrupted in {FIRST} and resumed from another region: "
        f"its {len(long_stream.text)} characters equal those of the same stream without a fault"
    )
    console.print(
        "[dim]A stream is resumed if its text is deterministic (temperature 0) and the engine passed the resume check; "
        "other streams end with an explicit error.[/]"
    )


def show_recovery(fleet: DemoFleet, console: Console) -> None:
    """Wait until the killed engine is started again and answers."""
    end_s = time.monotonic() + RECOVERY_S_MAX
    number, request = 0, None
    with sdk(fleet) as client, console.status(f"waiting for {FIRST}"):
        while time.monotonic() < end_s and (request is None or request.region != FIRST):
            request = send_request(client, number := number + 1, streamed=False, tokens=4)
            claim(not request.error, f"a request failed while {FIRST} was starting: {request.error}")
            time.sleep(0.2)
    sentences = fleet.sentences(FIRST)
    for sentence in sentences[_last(sentences, "failed") :]:
        console.print(f"  {sentence}", markup=False, highlight=False)
    region = request.region if request is not None else ""
    replica = fleet.replicas().get(FIRST)
    claim(replica is not None and replica.ref != fleet.killed, f"a new engine should run in {FIRST}")
    claim(
        region == FIRST,
        f"{FIRST} should answer again within {RECOVERY_S_MAX:.0f} s; the last response came from {region}",
    )


def _last(sentences: Sequence[str], word: str) -> int:
    return max((index for index, sentence in enumerate(sentences) if word in sentence), default=0)


def _phase(fleet: DemoFleet, clients: int, count: int) -> list[DemoRequest]:
    load = DemoLoad(fleet, clients, RESPONSE_TOKENS, streamed_every=1)  # only a stream has a first token to time
    load.start()
    load.wait(lambda requests: len(requests) >= count, PHASE_S_MAX)
    return load.stop()


def _claim_no_failures(requests: Sequence[DemoRequest]) -> None:
    failed = [request for request in requests if request.error]
    claim(
        not failed,
        f"{len(failed)} of {len(requests)} requests failed, the first with: {failed[0].error if failed else ''}",
    )


def _share(requests: Sequence[DemoRequest], region: str) -> float:
    return sum(request.region == region for request in requests) / max(1, len(requests))


def _table(title: str, requests: Sequence[DemoRequest]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("region", "requests", "share", "TTFT p50", "TTFT p99"):
        table.add_column(column, justify="left" if column == "region" else "right")
    for region in REGIONS:
        in_region = [request for request in requests if request.region == region]
        times_s = [request.ttft_s for request in in_region if request.streamed and not request.error]
        quantiles = [f"{quantile_s(times_s, share):.2f} s" if times_s else "–" for share in (0.5, 0.99)]
        table.add_row(region, str(len(in_region)), f"{_share(requests, region):.0%}", *quantiles)
    return table
