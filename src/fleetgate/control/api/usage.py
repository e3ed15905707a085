"""Usage over REST: sums by key, Gateway, model, Deployment and hour, and the attempts of one request."""

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
    """A sum of usage.

    Units: clients are charged for the billed tokens, engines processed the others; `estimated` counts the attempts that
    ended before their engine reported token counts.
    Shape: a field that is not grouped by is absent.
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
    """Sums in the order of their groups."""

    items: list[UsageSum]


class Attempt(Part):
    """One attempt of a request. Shape: `exact` is true if the engine reported the token counts."""

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
    """The usage of one request."""

    name: str
    attempts: list[Attempt]


class UsageQuery(Part):
    """The groups and the filter of the sums."""

    by: list[GroupBy] = Field(
        DEFAULT_BY, description="A field to group by; repeatable. The default is every field but the hour."
    )
    since: str = Field("", description="Include hours from the hour of this time, like 2030-01-31T12:00:00Z.")
    until: str = Field("", description="Include hours that begin before this time.")
    key: str = ""
    gateway: str = ""
    model: str = ""
    deployment: str = ""


def routes(control: Control) -> APIRouter:
    """`/api/v1/usage`."""
    router = APIRouter(prefix="/api/v1/usage", tags=["usage"], responses=ERRORS)

    @router.get("", operation_id="sum_usage", summary="Sums of usage")
    def sums(query: Annotated[UsageQuery, Query()]) -> UsageList:
        given = {name: getattr(query, name) for name in usage.NAMES}
        where = {name: value for name, value in given.items() if value}
        groups = list(dict.fromkeys(query.by))
        since_ms, until_ms = _ms(query.since, "since"), _ms(query.until, "until")
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
                f"there is no attempt of a request {request_id[:63]!r}; attempts appear a second after they end, "
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
