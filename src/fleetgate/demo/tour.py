"""The guided tour: four claims, each shown on real engines and each checked."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from fleetgate.demo.fleet import MODEL, REGIONS, SLOTS, DemoFailed, DemoFleet
from fleetgate.demo.load import DemoLoad, DemoRequest, LoadSummary, quantile_s, sdk, shoot

ANSWER_TOKENS = 16
STORY_TOKENS = 600
PHASE_S_MAX = 90.0
RECOVERY_S_MAX = 60.0
FIRST, SECOND = REGIONS[:2]
_CALM_REQUESTS = 6
_BUSY_REQUESTS = 16
_AFTER_KILL_REQUESTS = 16


def claim(holds: bool, otherwise: str) -> None:
    """Go on only if a claim holds. Raises: `DemoFailed` with the sentence that says what was seen instead."""
    if not holds:
        raise DemoFailed(f"this claim of the tour does not hold: {otherwise}")


def run_tour(fleet: DemoFleet, console: Console) -> None:
    """Show everything. Raises: `DemoFailed` at the first claim that does not hold."""
    steps: Sequence[tuple[str, Callable[[DemoFleet, Console], None]]] = (
        ("One endpoint answers with a real model, as a stream", show_stream),
        ("When the first region is full, the next one takes over", show_overflow),
        ("The first region dies under load, and no request fails", show_death),
        ("It is started again, and takes its place back", show_recovery),
    )
    for number, (title, show) in enumerate(steps, 1):
        console.rule(f"[bold]{number} of {len(steps)}: {title}", align="left")
        begun_s = time.monotonic()
        show(fleet, console)
        console.print(f"[green]✓ holds[/] [dim]({time.monotonic() - begun_s:.0f} s)[/]\n")


def show_stream(fleet: DemoFleet, console: Console) -> None:
    """A streamed answer, printed as it comes."""
    question = "What is a lighthouse? Answer in one sentence."
    console.print(f"[dim]{question}[/]")
    with sdk(fleet) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=60, stream=True
        )
        pieces = 0
        finish_reason = None
        with raw.parse() as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    if choice.delta.content:
                        pieces += 1
                        console.print(choice.delta.content, end="", markup=False, highlight=False, soft_wrap=True)
                    finish_reason = choice.finish_reason or finish_reason
    region = raw.headers.get("x-fleetgate-region", "")
    console.print(f"\n[dim]{pieces} pieces from {region}, finish_reason {finish_reason}[/]")
    claim(pieces > 1 and finish_reason is not None, f"the stream had {pieces} pieces and ended with {finish_reason}")
    claim(
        region == FIRST, f"an idle fleet should answer from {FIRST}, its first rank, and not from {region or 'nowhere'}"
    )


def show_overflow(fleet: DemoFleet, console: Console) -> None:
    """Load within the first region's limit, and above it."""
    calm = _phase(fleet, SLOTS, _CALM_REQUESTS)
    console.print(_table(f"{SLOTS} at once: {FIRST} has room ({SLOTS} slots)", calm))
    busy = _phase(fleet, 2 * SLOTS, _BUSY_REQUESTS)
    console.print(_table(f"{2 * SLOTS} at once: {FIRST} is full, {SECOND} takes the rest", busy))
    _claim_no_failures([*calm, *busy])
    first, second = _share(calm, FIRST), _share(calm, SECOND)
    claim(first == 1.0, f"with room in {FIRST} all should stay there; it got {first:.0%}, {SECOND} {second:.0%}")
    claim(_share(busy, FIRST) > 0 and _share(busy, SECOND) > 0, f"load above {FIRST}'s limit should reach both regions")


def show_death(fleet: DemoFleet, console: Console) -> None:
    """A region killed under load."""
    story = LoadSummary(fleet, STORY_TOKENS)
    story.start()
    story.begun.wait(PHASE_S_MAX)
    claim(
        story.region == FIRST and not story.error,
        f"the long stream should run in {FIRST}: {story.error or story.region}",
    )
    load = DemoLoad(fleet, clients=2 * SLOTS - 1, tokens=ANSWER_TOKENS, streamed_every=3)
    load.start()
    try:
        load.wait(lambda shots: len(shots) >= _CALM_REQUESTS, PHASE_S_MAX)
        half_way = story.is_alive()
        killed_s = time.monotonic()
        victim = fleet.kill_region(FIRST)
        console.print(f"[bold red]kill -9[/] the engine of {FIRST} (process {victim.ref}) while it works")
        enough = load.wait(lambda s: sum(one.started_s > killed_s for one in s) >= _AFTER_KILL_REQUESTS, PHASE_S_MAX)
    finally:
        shots = load.stop()
    story.join(PHASE_S_MAX)
    before = [shot for shot in shots if shot.started_s <= killed_s]
    after = [shot for shot in shots if shot.started_s > killed_s]
    console.print(_table("started before the kill", before))
    console.print(_table("started after the kill", after))
    moved = sum(shot.attempts > 1 for shot in shots)
    failed = sum(bool(shot.error) for shot in shots)
    console.print(f"{len(shots)} requests, {failed} failed, {moved} moved to another region unseen")
    _claim_no_failures(shots)
    claim(enough, f"{_AFTER_KILL_REQUESTS} requests should be answered within {PHASE_S_MAX:.0f} s of the kill")
    _tell_story(fleet, story, half_way, console)


def _tell_story(fleet: DemoFleet, story: LoadSummary, half_way: bool, console: Console) -> None:
    """The stream that was half-way out when its region died, beside the same one left alone."""
    claim(story.whole, f"the stream that was cut off should go on: {story.error or 'it ended without a finish_reason'}")
    if not half_way:
        console.print("[dim]The long stream had ended before the kill.[/]")
        return
    again = LoadSummary(fleet, STORY_TOKENS)
    again.start()
    again.join(PHASE_S_MAX)
    claim(again.whole, f"the same stream, left alone, should come to its end: {again.error}")
    claim(again.text == story.text, "the stream that was cut off should say what it says when it is left alone")
    console.print(
        f"The long stream was half-way out in {FIRST} and went on from another region: "
        f"its {len(story.text)} characters are those of the same stream left alone"
    )
    console.print(
        "[dim]This holds for answers that can be compared (temperature 0) and for engines that were seen to go on with "
        "what another had begun; other streams end with an explicit error.[/]"
    )


def show_recovery(fleet: DemoFleet, console: Console) -> None:
    """The killed engine comes back by itself."""
    end_s = time.monotonic() + RECOVERY_S_MAX
    number, shot = 0, None
    with sdk(fleet) as client, console.status(f"waiting for {FIRST}"):
        while time.monotonic() < end_s and (shot is None or shot.region != FIRST):
            shot = shoot(client, number := number + 1, streamed=False, tokens=4)
            claim(not shot.error, f"a request failed while {FIRST} was coming back: {shot.error}")
            time.sleep(0.2)
    sentences = fleet.sentences(FIRST)
    for sentence in sentences[_last(sentences, "failed") :]:
        console.print(f"  {sentence}", markup=False, highlight=False)
    region = shot.region if shot is not None else ""
    replica = fleet.replicas().get(FIRST)
    claim(replica is not None and replica.ref != fleet.killed, f"a new engine should run in {FIRST}")
    claim(
        region == FIRST,
        f"{FIRST} should answer again within {RECOVERY_S_MAX:.0f} s; the last answer came from {region}",
    )


def _last(sentences: Sequence[str], word: str) -> int:
    return max((index for index, sentence in enumerate(sentences) if word in sentence), default=0)


def _phase(fleet: DemoFleet, clients: int, requests: int) -> list[DemoRequest]:
    load = DemoLoad(fleet, clients, ANSWER_TOKENS, streamed_every=1)  # only a stream has a first token to time
    load.start()
    load.wait(lambda shots: len(shots) >= requests, PHASE_S_MAX)
    return load.stop()


def _claim_no_failures(shots: Sequence[DemoRequest]) -> None:
    failed = [shot for shot in shots if shot.error]
    claim(
        not failed,
        f"{len(failed)} of {len(shots)} requests failed, the first with: {failed[0].error if failed else ''}",
    )


def _share(shots: Sequence[DemoRequest], region: str) -> float:
    return sum(shot.region == region for shot in shots) / max(1, len(shots))


def _table(title: str, shots: Sequence[DemoRequest]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("region", "requests", "share", "TTFT p50", "TTFT p99"):
        table.add_column(column, justify="left" if column == "region" else "right")
    for region in REGIONS:
        mine = [shot for shot in shots if shot.region == region]
        times_s = [shot.ttft_s for shot in mine if shot.streamed and not shot.error]
        quantiles = [f"{quantile_s(times_s, share):.2f} s" if times_s else "–" for share in (0.5, 0.99)]
        table.add_row(region, str(len(mine)), f"{_share(shots, region):.0%}", *quantiles)
    return table
