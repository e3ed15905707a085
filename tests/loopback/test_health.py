"""Who is taken out, how soon, for how long, and what clients see of it: nothing, where anybody else is left."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleetgate.core.health.circuit_breaker import CONSECUTIVE_FAILURES_MAX
from fleetgate.core.model import Endpoint
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.proxy.health.passive_health import PANIC_EVERY_S
from tests.loopback.rig import deployment
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import Answer, post, request
from tests.loopback.wall_replies import CHUNKED, DONE, EVENT_STREAM, LAST, REPLIES, chunk, finish, role, tokens
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane
from tests.waiting import wait_for

SLACK_S = 2.0  # on top of a fault's own limit: the machine may be busy


@pytest.fixture(scope="module")
def three() -> Iterator[Plane]:
    with plane(walls=3) as made:
        yield made


def use(made: Plane, *engines: str, **options: object) -> None:
    """Deployments whose engine does this for model `m`."""
    made.use(*({"models": {**EVERY_MODEL, "m": name, "dies": "dies"}} for name in engines), **options)


def told_out(made: Plane, place: int = 0) -> int:
    board: SharedMemory = made.rig.board
    return board.ejected_until(made.slots[place])


def by(answer: Answer) -> str:
    return answer.headers["x-fleetgate-deployment"]


def events(made: Plane) -> list[str]:
    return [happened.message for happened in EventSpool(made.rig.data_dir).take()]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_row_1_a_closed_port_is_seen_at_once_and_again_when_it_opens(three: Plane) -> None:
    use(three, "ok", "ok")
    assert by(three.ask(request("m"))) == "one"
    three.wall.fall()
    fell_s = time.monotonic()
    while not told_out(three):
        assert three.ask(request("m")).status == 200
    assert time.monotonic() - fell_s < 1.0 + SLACK_S
    three.wall.rise()
    rose_s = time.monotonic()
    wait_for(lambda: by(three.ask(request("m"))) == "one")
    assert time.monotonic() - rose_s < 3.0 + SLACK_S, "its probe shortens its pause"
    three.wait_idle()


def test_row_18_probes_that_go_well_do_not_bring_back_whose_answers_break(three: Plane) -> None:
    """The port answers all the time; its pause is two seconds all the same."""
    use(three, "500", "ok")
    begun_s, asked = time.monotonic(), 0
    while time.monotonic() - begun_s < 4.0:
        assert by(three.ask(request("m"))) == "two"
        asked += 1
        time.sleep(0.005)
    assert asked > 100
    assert CONSECUTIVE_FAILURES_MAX <= len(three.wall.seen) <= CONSECUTIVE_FAILURES_MAX + 2, (
        "once more after two seconds, no oftener"
    )
    assert (len(three.wall.seen) + len(three.walls[1].seen)) <= 1.05 * asked + CONSECUTIVE_FAILURES_MAX


# --- credentials and models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["401", "403"])
def test_row_21_a_refused_credential_is_not_used_again(three: Plane, status: str) -> None:
    first, second = (
        Endpoint(
            slot=2000 + int(status) + n, scheme="http", host="127.0.0.1", port=three.walls[n].port, base_path="/v1"
        )
        for n in range(2)
    )
    (made,) = three.deployments({"models": {"m": status}, "endpoints": (first, second)})
    other = deployment("other", three.walls[2].port, made.slot + 1, models={"m": "ok"})
    three._slot += 1
    three.publish([made, other])
    events(three)
    for _ in range(6):
        assert by(three.ask(request("m"))) == "other"
    seen = [len(wall.seen) for wall in three.walls[:2]]
    assert sum(seen) == 1, "not even the other Endpoint of the Deployment is asked with it"
    assert any("refuses the Deployment's credential" in told for told in events(three))


def test_row_21_when_all_refuse_it_the_client_is_not_told_that_its_own_key_is_bad(three: Plane) -> None:
    use(three, "401", "401")
    answers = [three.ask(request("m")) for _ in range(4)]
    assert [(answer.status, answer.code) for answer in answers] == [(502, "upstream_auth_error")] * 4
    assert all(answer.headers["x-should-retry"] == "false" for answer in answers)
    assert [len(wall.seen) for wall in three.walls[:2]] == [1, 1]


def test_a_prompt_that_an_engine_forbids_does_not_take_it_out(three: Plane) -> None:
    """Providers answer 403 to single prompts: an engine that has just answered others does accept the credential."""
    three.use({"models": {"m": "ok", "forbidden": "403"}}, {"models": {"m": "ok", "forbidden": "ok"}})

    def is_proven() -> bool:
        return bool(by(three.ask(request("m"))) == "one" and len(three.wall.seen) > 30)

    wait_for(is_proven)
    three.rig.wait_a_look()
    assert by(three.ask(request("forbidden"))) == "two"
    assert by(three.ask(request("m"))) == "one"


def test_row_20_a_model_that_an_engine_lacks_is_asked_of_others_and_the_rest_stays(three: Plane) -> None:
    three.use({"models": {"m": "404", "n": "ok"}}, {"models": {"m": "ok", "n": "ok"}})
    events(three)
    for _ in range(5):
        assert by(three.ask(request("m"))) == "two"
        assert by(three.ask(request("n"))) == "one"
    assert three.seen().count("404") == 1
    assert any("answers 404 for model m" in told for told in events(three))
    use(three, "404", "404")
    for _ in range(3):
        answer = three.ask(request("m"))
        assert (answer.status, answer.code) == (404, "model_not_found")


@pytest.mark.parametrize("status", ["404", "405", "501"])
def test_a_path_that_an_engine_lacks_says_nothing_about_the_others(three: Plane, status: str) -> None:
    """vLLM with a chat model answers 404 at `/v1/embeddings`, llama.cpp 501: who asks there moves nobody's chat."""

    async def chats_only(line: Line, seen: Seen) -> None:
        await three.wall.replies["ok" if seen.path == "/v1/chat/completions" else status](line, seen)

    three.wall.replies["chat"] = chats_only
    use(three, "chat", "ok")
    for _ in range(5):
        assert by(three.ask(post(b'{"model": "m", "input": "x"}', path="/v1/embeddings"))) == "two"
        assert by(three.ask(request("m"))) == "one"
    assert [seen.path for seen in three.wall.seen].count("/v1/embeddings") == 1


# --- nobody left ------------------------------------------------------------------------------------------------------


def test_row_19_with_everybody_out_requests_fail_at_once_and_few_are_tried(three: Plane) -> None:
    three.wall.replies["ill"] = three.walls[1].replies["ill"] = three.wall.replies["500"]
    use(three, "ill", "ill")
    wait_for(lambda: three.ask(request("m")).code == "no_deployment_available")
    for wall in three.walls:
        wall.forget()
    begun_s, asked, waits_ms = time.monotonic(), 0, set()
    while time.monotonic() - begun_s < 3.0:
        answer = three.ask(request("m"))
        again = three.ask(request("m", headers=("x-stainless-retry-count: 1",)))
        assert {answer.status, again.status} <= {502, 503}
        assert answer.headers["x-should-retry"] == "true" and again.headers["x-should-retry"] == "false"
        if answer.status == 503:
            assert 4 <= int(answer.headers["retry-after"]) <= 6
            waits_ms.add(answer.headers["retry-after-ms"])
        asked += 2
    assert asked > 50 and len(waits_ms) > 5, "not all are told the same moment"
    attempts = len(three.wall.seen) + len(three.walls[1].seen)
    passed_s = time.monotonic() - begun_s
    assert 1 <= attempts <= 2.0 * passed_s + 4, "the least bad once a second, and whose pause is over"
    for wall in three.walls[:2]:
        wall.replies["ill"] = wall.replies["ok"]
    wait_for(lambda: three.ask(request("m")).status == 200)
    three.wait_idle()


def test_row_19_the_last_falls_while_the_others_are_well_again_but_not_yet_believed(three: Plane) -> None:
    """Nobody knows of those that they are well until one request tried them; the crowd waits for what that shows."""
    ill, last = three.walls[:2], three.walls[2]
    for wall in ill:
        wall.replies["ill"] = wall.replies["500"]
    last.replies["ill"] = late
    use(three, "ill", "ill", "ill")
    while not (told_out(three, 0) and told_out(three, 1)):
        three.ask(request("m"))
    for wall in ill:
        wall.replies["ill"] = late
    time.sleep(PANIC_EVERY_S)  # those before may have tried them, in vain
    last.fall()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: three.ask(request("m", stream=True)), range(96)))
    assert [answer.status for answer in answers] == [200] * 96
    last.rise()
    three.wait_idle()


async def late(line: Line, seen: Seen) -> None:
    """First content after 100 ms, the rest a second later."""
    await asyncio.sleep(0.1)
    line.write(EVENT_STREAM + CHUNKED + chunk(role("m")) + b"".join(chunk(one) for one in tokens("m", 3)))
    await asyncio.sleep(1.0)
    line.write(chunk(finish("m")) + chunk(DONE))
    line.write(LAST)


# --- poison -----------------------------------------------------------------------------------------------------------


async def dies(line: Line, seen: Seen) -> None:
    """The engine's process ends: every connection is reset and nobody listens any more."""
    wall = line.wall
    wall._server.close()
    for one in list(wall.lines):
        one.reset()


async def resets(line: Line, seen: Seen) -> None:
    """Only this connection is lost."""
    line.reset()


def test_a_request_that_ends_two_engines_is_not_tried_at_a_third(three: Plane) -> None:
    for wall in three.walls:
        wall.replies["dies"] = dies
    use(three, "ok", "ok", "ok", strategy="capacity_round_robin")
    for _ in range(12):
        assert three.ask(request("m")).status == 200
    three.rig.wait_a_look()
    events(three)
    try:
        answer = three.ask(request("dies"))
        assert (answer.status, answer.code) == (502, "poison_request")
        assert answer.headers["x-should-retry"] == "false"
        assert sum(seen.model == "dies" for wall in three.walls for seen in wall.seen) == 2
        assert any("was refused with 502 poison_request" in told for told in events(three))
        assert three.ask(request("m")).status == 200, "the third is still there for others"
    finally:
        for wall in three.walls:
            if not wall._server.is_serving():
                wall.rise()
    three.wait_idle()


def test_an_engine_that_dies_once_or_lives_on_says_nothing_of_the_request(three: Plane) -> None:
    for wall in three.walls:
        wall.replies["resets"] = resets
    three.wall.replies["dies"] = dies
    three.walls[1].replies["dies"] = resets
    three.walls[2].replies["dies"] = three.walls[2].replies["ok"]
    use(three, "ok", "ok", "ok")
    for model in ("m", "ok", "m"):
        assert three.ask(request(model)).status == 200
    three.rig.wait_a_look()
    try:
        answer = three.ask(request("dies"))
        assert answer.status == 200 and by(answer) == "three"
    finally:
        three.wall.rise()
    use(three, "resets", "resets", "resets")
    assert three.ask(request("m")).code == "upstream_error"
    three.wait_idle()


# --- coming back ------------------------------------------------------------------------------------------------------


def test_row_60_who_comes_back_is_not_given_everything_at_once(three: Plane) -> None:
    """By rank all would go to the first; on its way back it gets little, and the second takes the rest."""
    three.wall.replies["ill"] = three.wall.replies["500"]
    use(three, "ill", "ok")
    while not told_out(three):
        assert three.ask(request("m")).status == 200
    three.wall.replies["ill"] = three.wall.replies["ok"]
    wait_for(lambda: by(three.ask(request("m"))) == "one")
    three.wall.hold()
    three.walls[1].hold()
    for wall in three.walls:
        wall.replies["ill"] = wall.replies["ok"] = wall.replies["held"]
    clients = [three.client() for _ in range(12)]
    try:
        for client in clients:
            client.send(request("m"))
        wait_for(lambda: three.in_flight() == 12)
        assert 0 < three.wall.active <= 4 and three.walls[1].active >= 8
    finally:
        three.wall.release()
        three.walls[1].release()
        for client in clients:
            assert client.read().status == 200
            client.socket.close()
        for wall in three.walls:
            wall.replies["ok"] = REPLIES["ok"]
    three.wait_idle()


# --- slow -------------------------------------------------------------------------------------------------------------


class Load:
    """Streams one after the other on several connections until told to stop."""

    def __init__(self, made: Plane, connections: int, **wishes: object) -> None:
        self.made = made
        self.wishes = wishes
        self.bad: list[Answer] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(connections)]

    def _run(self) -> None:
        with self.made.client() as client:
            while not self._stop.is_set():
                answer = client.ask(request("m", stream=True, wall=self.wishes))
                if answer.status != 200 or not answer.whole:
                    self.bad.append(answer)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def test_rows_9_and_57_a_brownout_moves_the_traffic_within_ten_seconds() -> None:
    """Tokens that took 20 ms take ten times as long: nothing breaks, and yet the other Deployment gets the work."""
    with plane(walls=2, patience={"fleetgate.core.health.outlier_detection.BASELINE_SAMPLES": 4}) as made:
        pace_s = [0.02]
        usual = made.wall.replies["ok"]

        async def paced(line: Line, seen: Seen) -> None:
            seen.ask.setdefault("wall", {})["pace_s"] = pace_s[0]
            await usual(line, seen)

        made.wall.replies["paced"] = paced
        use(made, "paced", "ok")
        with Load(made, connections=6, count=60, pace_s=0.02) as load:
            time.sleep(7.0)
            assert not told_out(made), "nothing is slow yet"
            pace_s[0] = 0.2
            slow_s = time.monotonic()
            wait_for(lambda: told_out(made) > 0, timeout_s=30)
            found_s = time.monotonic() - slow_s
            wait_for(lambda: by(made.ask(request("m"))) == "two")
        assert found_s < 10.0 + SLACK_S
        assert not load.bad
        assert any("latency is several times its usual" in told for told in events(made))


def test_row_6_first_tokens_that_are_known_to_come_soon_are_not_waited_for_a_minute() -> None:
    """No Profile says what to expect, but twenty streams have shown it: five seconds are enough."""
    with plane(walls=2) as made:
        use(made, "ok", "ok")
        made.walls[1].replies["silent"] = made.walls[1].replies["ok"]
        clients = [made.client() for _ in range(30)]
        for client in clients:
            client.send(request("ok", stream=True, wall={"count": 30, "pace_s": 0.1}))
        for client in clients:
            assert client.read().whole
            client.socket.close()
        begun_s = time.monotonic()
        answer = made.ask(request("silent", stream=True))
        took_s = time.monotonic() - begun_s
        assert answer.whole and by(answer) == "two"
        assert 4.5 < took_s < 5.0 + 1.0 + SLACK_S


def test_rows_2_and_55_what_waits_at_an_endpoint_that_probes_cannot_reach_is_moved(three: Plane) -> None:
    """It takes requests and is silent; then nobody listens any more: who waits there is not left to its deadline."""
    use(three, "silent", "ok")
    wall = three.wall

    async def stop_listening() -> None:
        wall._server.close()

    with three.client() as client:
        client.send(request("m"))
        wait_for(lambda: bool(wall.seen))
        wall.call(stop_listening())
        gone_s = time.monotonic()
        try:
            answer = client.read()
        finally:
            wall.rise()
        assert answer.status == 200 and by(answer) == "two"
        assert time.monotonic() - gone_s < 6.0 + SLACK_S, "of 600 s that an unstreamed answer may take"
    three.wait_idle()


def test_what_one_worker_is_asked_the_other_keeps() -> None:
    """One worker meets a Retry-After and a refused credential; the other neither asks nor tries."""

    async def asks_for_a_minute(line: Line, seen: Seen) -> None:
        line.end()
        line.write(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 60\r\ncontent-length: 0\r\n\r\n")

    with plane(workers=2, walls=2) as made:
        made.wall.replies["full"] = asks_for_a_minute
        for engine in ("full", "401"):
            use(made, engine, "ok")
            assert made.ask(request("m")).status == 200
            time.sleep(0.5)
            for _ in range(30):
                assert by(made.ask(request("m"))) == "two"
            assert made.seen().count(engine) == 1, engine


# --- half open --------------------------------------------------------------------------------------------------------


def test_a_trial_that_brings_content_holds_nobody_up_until_its_end(three: Plane) -> None:
    """With one Deployment and a long stream as the trial: whoever comes next is served meanwhile."""
    use(three, "ok")
    three.wall.fall()
    while three.ask(request("m")).status != 503:
        pass
    wait_for(lambda: bool(told_out(three)))
    three.wall.rise()
    three.wall.hold()
    deadline_s = time.monotonic() + 20
    while True:  # until it is half open, a trial is refused at once
        assert time.monotonic() < deadline_s
        with three.client() as client:
            client.send(request("held", stream=True))
            if client.read(head_only=True).status == 200:
                assert three.ask(request("m")).status == 200, "the trial still runs"
                three.wall.release()
                break
    three.wait_idle()
