"""The fields of a policy. Expressions are checked when they are written; each mistake has its column and a fix."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from fleetgate.control.resources.field_types import refuse_field
from fleetgate.control.resources.problems import suggest
from fleetgate.policies import plugins
from fleetgate.policies import type_checker as checking
from fleetgate.policies.cel_parser import CHARS_MAX, CelError

POLICIES_MAX = 64  # of one Gateway; each one may be evaluated for every request

# The validation context of stored documents, which were checked when they were written. If a plug-in was removed since
# then, or a rule became stricter, the other resources must still be published: the proxies then refuse the requests
# that the policy protects and report why.
STORED = {"stored": True}


def check_condition(source: str, without: str = "") -> str:
    """Check that an expression is a condition and return it; `without` names a variable that it must not read.

    Raises: `PydanticCustomError` with the column.
    """
    try:
        checking.check(source, without)
    except CelError as mistake:
        refuse_field(f"at {mistake.position(source)}: {mistake.message}", mistake.fix)
    return source


def _condition(source: str, info: ValidationInfo) -> str:
    return source if info.context == STORED else check_condition(source)


def _python_policy(name: str, info: ValidationInfo) -> str:
    known = plugins.names()
    if name not in known and info.context != STORED:
        fix = suggest(name, known) if known else "install the package that provides it and restart"
        refuse_field(f"there is no Python policy {name[:80]!r}", fix)
    return name


Condition = Annotated[str, AfterValidator(_condition), Field(json_schema_extra={"maxLength": CHARS_MAX})]
PythonPolicyName = Annotated[str, AfterValidator(_python_policy)]
