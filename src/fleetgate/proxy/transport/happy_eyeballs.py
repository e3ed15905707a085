"""Dials several addresses of one name: the next one if the last is silent; the first that answers wins (RFC 8305)."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

AFTER_S = 0.25  # faults.md row 2, and RFC 8305

Made = TypeVar("Made")


async def race(attempts: Sequence[Callable[[], Coroutine[Any, Any, Made]]], discard: Callable[[Made], None]) -> Made:
    """Return what the first successful attempt made; what later ones make is discarded.

    Raises: what the last attempt to fail raised; `ssl.SSLError` at once, because another address of the same name would
    only hide a wrong certificate.
    Cost: nothing beside the attempt if there is only one.
    """
    if len(attempts) == 1:
        return await attempts[0]()
    waiting: set[asyncio.Task[Made]] = set()
    made: list[Made] = []
    failure: OSError | TimeoutError = OSError("there is no address")
    try:
        for number, attempt in enumerate(attempts, 1):
            waiting.add(asyncio.create_task(attempt()))
            wait_s = AFTER_S if number < len(attempts) else None
            while waiting and not made:
                done, _ = await asyncio.wait(waiting, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                waiting -= done
                for task in done:
                    try:
                        made.append(task.result())
                    except ssl.SSLError:
                        raise
                    except (OSError, TimeoutError) as error:
                        failure = error
            if made:
                return made.pop()
    finally:
        for task in waiting:
            task.add_done_callback(lambda late: _discard(late, discard))
            task.cancel()
        for late in made:
            discard(late)
    raise failure


def _discard(task: asyncio.Task[Made], discard: Callable[[Made], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        discard(task.result())
