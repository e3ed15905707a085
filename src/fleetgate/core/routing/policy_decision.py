"""What policies read of a request and what they decide: values that the proxy, the simulator and policies share."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from fleetgate.core.model import Deployment, Key

PathStep = str | int  # a field's name, or an index into a list
BodyPath = tuple[PathStep, ...]


class RequestAttributes(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A request as policies see it.

    Shape: `headers` has lower-case names, `body` has paths into the JSON body. Both contain only what some policy names
    (`CompiledPolicies.needs_headers`, `CompiledPolicies.needs_body`); what is missing reads as empty.
    """

    model: str
    path: str = ""
    prompt_tokens: int = 0
    output_tokens_max: int = 0
    stream: bool = False
    headers: Mapping[str, str] = {}
    body: Mapping[BodyPath, object] = {}


class PolicyDecision(msgspec.Struct, frozen=True, kw_only=True):
    """What the policies of a Gateway decide for one request.

    Shape: `allowed` and `preferred` are Deployment slots. `allowed` is None if all may be used, and empty if the
    policies that `denied_by` names leave none. `preferred` is in the order of preference. `priority` is None if no
    policy sets it. `notes` are sentences for the log and contain nothing that the client sent.
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
