"""The fields of a policy: expressions checked when they are written, each mistake with its column and a fix."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from fleetgate.control.resources.field_types import refuse
from fleetgate.control.resources.problems import one_of
from fleetgate.policies import plugins
from fleetgate.policies import type_checker as checking
from fleetgate.policies.cel_parser import CHARS_MAX, CelError

POLICIES_MAX = 64  # of one Gateway: each is evaluated for every request that it may concern

# The validation context of what was checked when it was stored. A plug-in that is gone since then, or a rule that has
# become stricter, must not keep everything else from being published: the proxies refuse what it protects, and say so.
STORED = {"stored": True}


def check_condition(source: str, without: str = "") -> str:
    """An expression as it is, once it is known to be a condition; `without` names a variable it may not read.

    Raises: `PydanticCustomError` with the column.
    """
    try:
        checking.check(source, without)
    except CelError as mistake:
        refuse(f"at {mistake.position(source)}: {mistake.message}", mistake.fix)
    return source


def _condition(source: str, info: ValidationInfo) -> str:
    return source if info.context == STORED else check_condition(source)


def _python_policy(name: str, info: ValidationInfo) -> str:
    known = plugins.names()
    if name not in known and info.context != STORED:
        fix = one_of(name, known) if known else "install the package that brings it, and restart"
        refuse(f"there is no Python policy {name[:80]!r}", fix)
    return name


Condition = Annotated[str, AfterValidator(_condition), Field(json_schema_extra={"maxLength": CHARS_MAX})]
PythonPolicyName = Annotated[str, AfterValidator(_python_policy)]
