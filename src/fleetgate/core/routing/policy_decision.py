"""What policies are told of a request and what they answer: values that the proxy, the simulator and rules share."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from fleetgate.core.model import Deployment, Key

PathStep = str | int  # a field's name, or a place in a list
BodyPath = tuple[PathStep, ...]


class RequestAttributes(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A request as policies see it.

    Shape: `headers` has lower-case names and `body` paths into the JSON body, both only what some policy names
    (`RuleSet.needs_headers`, `RuleSet.needs_body`); what is missing there reads as empty.
    """

    model: str
    path: str = ""
    prompt_tokens: int = 0
    output_tokens_max: int = 0
    stream: bool = False
    headers: Mapping[str, str] = {}
    body: Mapping[BodyPath, object] = {}


class PolicyDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What the policies of a Gateway say of one request.

    Shape: `allowed` and `preferred` are Deployment slots, `allowed` None where every one may be used and empty where
    `denied_by` names the policies that leave nobody; `preferred` comes in the order in which they should be tried;
    `priority` None where no policy sets it; `notes` are sentences for the log, without anything the client sent.
    """

    allowed: frozenset[int] | None = None
    preferred: tuple[int, ...] = ()
    priority: str | None = None
    denied_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def denial(self) -> str:
        """The sentence that the client gets with `policy_denied`."""
        several = "," in self.denied_by
        subject = "the policies" if several else "the policy"
        return f"{subject} {self.denied_by} {'leave' if several else 'leaves'} no Deployment for this request"


ALLOWED = PolicyDecision()

# A policy in Python. It may have attributes `needs_headers` (lower-case names) and `needs_body` (paths).
PythonPolicy = Callable[[RequestAttributes, Key, Sequence[Deployment]], PolicyDecision]
