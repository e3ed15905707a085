import asyncio
import time

import pytest

from fleetgate.proxy.transport.network import LATE_S, peer_timeout


def test_a_peer_that_answers_while_the_loop_is_blocked_is_not_late() -> None:
    async def wait() -> str:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()

        def read_after_some_passes(left: int) -> None:
            if left:
                loop.call_soon(read_after_some_passes, left - 1)
            else:
                answer.set_result("here")

        loop.call_later(0.01, time.sleep, 0.05 + 3 * LATE_S)
        loop.call_later(0.06, read_after_some_passes, 5)  # due behind the limit, as sockets are read behind timers
        async with peer_timeout(0.05):
            return await answer

    assert asyncio.run(wait()) == "here"


def test_a_peer_that_does_not_answer_is_late_also_after_the_loop_was_blocked() -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, time.sleep, 0.05 + 3 * LATE_S)
        async with peer_timeout(0.05):
            await loop.create_future()

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_no_timer_is_left_behind() -> None:
    async def wait() -> int:
        async with peer_timeout(60.0):
            pass
        return sum(not timer.cancelled() for timer in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]

    assert asyncio.run(wait()) == 0
