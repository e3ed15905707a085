"""What was used, over REST: sums by key, Gateway, model, Deployment and hour, and the attempts of one request."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from fleetgate.control.api.errors import ApiError
from fleetgate.control.api.resources import ERRORS
from fleetgate.control.api.views import rfc3339
from fleetgate.control.context import Control
from fleetgate.control.resources.schema import Part
from fleetgate.control.store import usage

GroupBy = Literal["hour", "key", "gateway", "model", "deployment"]
DEFAULT_BY: list[GroupBy] = ["key", "gateway", "model", "deployment"]


class UsageSum(Part):
    """A sum. Shape: what was not grouped by is absent.

    Units: the billed tokens are what clients are charged, the others what engines worked; `estimated` of the attempts
    ended before their engine told its tokens.
    """

    hour: str | None = None
    key: str | None = None
    gateway: str | None = None
    model: str | None = None
    deployment: str | None = None
    attempts: int
    estimated: int
    prompt_tokens: int
    output_tokens: int
    billed_prompt_tokens: int
    billed_output_tokens: int


class UsageList(Part):
    """Sums, in the order of what they are grouped by."""

    items: list[UsageSum]


class Attempt(Part):
    """One attempt of a request. Shape: `exact` says that the engine told the tokens."""

    attempt_id: str
    began_at: str
    ended_at: str
    key: str
    gateway: str
    model: str
    deployment: str
    region: str
    outcome: str
    prompt_tokens: int
    output_tokens: int
    exact: bool
    billed_prompt_tokens: int
    billed_output_tokens: int
    bytes: int


class RequestUsage(Part):
    """What one request used."""

    name: str
    attempts: list[Attempt]


class UsageQuery(Part):
    """Which sums."""

    by: list[GroupBy] = Field(DEFAULT_BY, description="What to sum by; repeatable. Without it by all but the hour.")
    since: str = Field("", description="From the hour of this time on, like 2030-01-31T12:00:00Z.")
    until: str = Field("", description="Up to the hour of this time.")
    key: str = ""
    gateway: str = ""
    model: str = ""
    deployment: str = ""


def routes(control: Control) -> APIRouter:
    """`/api/v1/usage`."""
    router = APIRouter(prefix="/api/v1/usage", tags=["usage"], responses=ERRORS)

    @router.get("", operation_id="sum_usage", summary="Sums of what was used")
    def sums(asked: Annotated[UsageQuery, Query()]) -> UsageList:
        given = {name: getattr(asked, name) for name in usage.NAMES}
        where = {name: value for name, value in given.items() if value}
        groups = list(dict.fromkeys(asked.by))
        since_ms, until_ms = _ms(asked.since, "since"), _ms(asked.until, "until")
        with control.database.read() as connection:
            found = usage.load_sums(connection, groups, where, since_ms, until_ms)
        for one in found:
            if "hour" in one:
                one["hour"] = rfc3339(one["hour"] * usage.HOUR_MS / 1000)
        return UsageList(items=[UsageSum(**one) for one in found])

    @router.get("/{request_id}", operation_id="get_usage", summary="The attempts of one request")
    def of_request(request_id: str) -> RequestUsage:
        with control.database.read() as connection:
            found = usage.load_attempts(connection, request_id)
        if not found:
            raise ApiError(
                404,
                f"no attempt of a request {request_id[:63]!r} is known; attempts are here a second after they end, "
                f"and the last {usage.ROWS_KEPT:,} are kept",
            )
        return RequestUsage(name=request_id, attempts=[_attempt(row) for row in found])

    return router


def _attempt(row: dict[str, object]) -> Attempt:
    times = {f"{name}_at": rfc3339(float(str(row.pop(f"{name}_ms"))) / 1000) for name in ("began", "ended")}
    row.pop("id")
    return Attempt(**times, **row)  # type: ignore[arg-type]


def _ms(text: str, name: str) -> int:
    if not text:
        return 0
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ApiError(422, f"{name}: {text[:40]!r} is not a time; write it like 2030-01-31T12:00:00Z") from None
