"""Any order of events: no slot is left taken, nothing is written after the end, and every attempt is settled once."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetgate.core.exchange import Failure
from fleetgate.core.model import Admission, Resilience
from fleetgate.proxy.request.handler import REVOKED, SHUTTING_DOWN
from tests.unit.proxy.request.handler_rig import Bench, FakeClient, FakeResponse

REQUESTS_MAX = 6
RESPONSES_MAX = 6  # the latest ones, so that a request comes to its end among many
Action = Callable[[], object]


class Story:
    """A worker to which anything may happen that its transport, its clients and its clock allow."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.clients: list[FakeClient] = []
        self.slow: set[FakeResponse] = set()
        self.reported: set[FakeResponse] = set()
        self.dialled: set[FakeResponse] = set()

    def actions(self) -> list[Action]:
        """What may happen now."""
        bench = self.bench
        found: list[Action] = [lambda: bench.wait(0.5), lambda: bench.wait(3.0, 1.0), lambda: bench.wait(61.0, 1.0)]
        found.append(self._toggle)
        if len(self.clients) < REQUESTS_MAX:
            found += [lambda: self._ask(True), lambda: self._ask(False), lambda: self._ask(True, temperature=0, seed=1)]
        for client in self.clients:
            if not client.ends:
                found += self._of_client(client)
        for response in bench.transport.sent[-RESPONSES_MAX:]:
            found += self._of_response(response)
        return found

    def _toggle(self) -> None:
        self.bench.transport.keeps = not self.bench.transport.keeps

    def _ask(self, stream: bool, **fields: object) -> None:
        self.clients.append(self.bench.request(stream, **fields))

    def _of_client(self, client: FakeClient) -> list[Action]:
        handler = client.handler

        def read(reads: bool) -> None:
            client.is_behind = not reads
            (handler.resume if reads else handler.pause)()

        why = REVOKED if len(self.clients) % 2 else SHUTTING_DOWN
        return [handler.client_gone, lambda: handler.terminate(why), lambda: read(client.is_behind)]

    def _of_response(self, response: FakeResponse) -> list[Action]:
        if not response.is_connected and response not in self.reported and not response.has_content:
            if response.over and "cancel" not in response.commands:
                return []

            def not_connected() -> None:
                self.reported.add(response)
                response.not_connected()

            if response.over:
                return [not_connected] if response not in self.dialled and not response.was_kept else []
            return [not_connected, lambda: self._connect(response), lambda: self._dial_slow(response)]
        if response.over:
            return []
        losses = [Failure.BROKEN, Failure.FULL, Failure.BAD_OUTPUT, Failure.CREDENTIAL, Failure.MODEL_MISSING]
        losses += [Failure.MISMATCH] if response.expected.resumed is not None else []
        fails: list[Action] = [lambda failure=failure: response.fail(failure) for failure in losses]  # type: ignore[misc]
        if not response.has_content:
            stale = [response.stale] if response not in self.dialled else []
            refused: list[Action] = [] if response.expected.resumed else [lambda: response.content("{}", 400)]
            return [*[response.content] * 4, *fails, *refused, *stale]
        return [response.event, response.event, response.end, response.end, *fails]

    def _connect(self, response: FakeResponse) -> None:
        self.dialled.add(response)
        response.connect()

    def _dial_slow(self, response: FakeResponse) -> None:
        if response not in self.slow:
            self.slow.add(response)
            response.dial_slow()

    def play(self, choices: list[int]) -> None:
        """Let these things happen, then end everything, and look at what is left."""
        bench = self.bench
        for choice in choices:
            actions = self.actions()
            actions[choice % len(actions)]()
            bench.run()
        for client in self.clients:
            client.handler.client_gone()
        bench.run()
        late = [one for one in bench.transport.sent if one.over and not one.has_content]
        for response in late:
            for action in self._of_response(response):
                action()
        bench.run()
        assert bench.is_idle(), "a slot, token work or a place in a queue is left"
        assert all(client.ends == ["ended"] for client in self.clients)
        assert all(response.over for response in bench.transport.sent), "an upstream goes on for no client"
        bench.settlements()


ORDERS = st.lists(st.integers(0, 1000), min_size=40, max_size=80)
LIMIT = {"concurrency_max": 1, "concurrency_written": True}
BENCHES: dict[str, Callable[[], Bench]] = {
    "lead": lambda: Bench(2),
    "scheduler": lambda: Bench(3, strategy="least_cost"),
    "queue": lambda: Bench(2, each=LIMIT, admission=Admission(queue_max=2, queue_timeout_s=10.0)),
    "hedge": lambda: Bench(
        3, each={"concurrency_max": 9, "concurrency_written": True}, resilience=Resilience(hedge="all")
    ),
    "no retries": lambda: Bench(2, resilience=Resilience(attempts_max=1, resume="off")),
}


@pytest.mark.parametrize("kind", BENCHES)
@given(choices=ORDERS)
@settings(max_examples=40)
def test_whatever_happens_nothing_is_left(kind: str, choices: list[int]) -> None:
    bench = BENCHES[kind]()
    if kind == "hedge":
        for _ in range(20):  # usual first tokens, without which nothing counts as slow
            bench.active.current.routes[0].hedge_threshold.record(15.0, 0.1)
    Story(bench).play(choices)
