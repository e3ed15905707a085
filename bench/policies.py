"""The cost of policies per request: microseconds by kind, and the ratio to a pick among sixteen Deployments.

Run: python -m bench.policies
"""

import timeit
from collections.abc import Callable

from fleetgate.core.model import Deployment, Gateway, Key, Policy, Snapshot, Upstream
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.core.routing.route import model_routes, route
from fleetgate.core.routing.strategies import NO_TURN, CandidateState
from fleetgate.policies.body_fields import BodyReader
from fleetgate.policies.policy_set import CompiledPolicies

ROUNDS, REPEATS = 20_000, 5
DEPLOYMENTS = tuple(
    Deployment(
        slot=slot,
        name=f"d{slot}",
        region="eu" if slot % 2 else "us",
        engine="vllm",
        models={"llama": "llama"},
        endpoints=(),
        labels={"jurisdiction": "eu" if slot % 2 else "us"},
    )
    for slot in range(16)
)
KEY = Key(id="k", name="laptop", secret_hmac="", labels={"jurisdiction": "eu"})
MESSAGES = b",".join([b'{"role":"user","content":"%b"}' % (b"x" * 66)] * 10)
BODY = b'{"model":"llama","messages":[%b],"service_tier":"flex"}' % MESSAGES

IN_EU = 'deployment.labels.jurisdiction == "eu"'
LONG = Policy(name="long", when="request.prompt_tokens > 8000", prefer=("d3",))
BATCH = Policy(name="batch", when='request.body.service_tier == "flex"', priority="sheddable")
EU = Policy(name="eu", when='key.labels.jurisdiction == "eu"', require=IN_EU)
KINDS: dict[str, tuple[Policy, ...]] = {
    "no policies": (),
    "deployment only": (Policy(name="a", require=IN_EU),),
    "key and deployment": (EU,),
    "a number of the request": (LONG,),
    "a field of the body": (BATCH,),
    "a header": (Policy(name="a", when='request.headers["x-team"] == "a"', priority="critical"),),
    "request and deployment": (Policy(name="a", require=f"request.prompt_tokens < 8000 || {IN_EU}"),),
    "a pattern": (Policy(name="a", when='request.model.matches("^ll.*")', priority="critical"),),
    "a loop over 10 messages": (
        Policy(name="a", when='request.body.messages.exists(m, m.role == "system")', priority="critical"),
    ),
    "three policies together": (EU, LONG, BATCH),
}


def gateway(policies: tuple[Policy, ...]) -> Gateway:
    """A Gateway over all Deployments."""
    return Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy="overflow",
        upstreams=tuple(Upstream(deployment=deployment.name, rank=1) for deployment in DEPLOYMENTS),
        policies=policies,
    )


def best_us(call: Callable[[], object]) -> float:
    """The fastest of several repeats."""
    return min(timeit.repeat(call, number=ROUNDS, repeat=REPEATS)) / ROUNDS * 1e6


def main() -> None:
    """Print one line per kind of policy."""
    model_route = model_routes(gateway(()), Snapshot(version=1, made_at_s=0.0, deployments=DEPLOYMENTS), "")["llama"]
    load = {candidate.slot: CandidateState(1, 1.0) for candidate in model_route.candidates}
    pick_us = best_us(lambda: route(model_route, load, NO_TURN))
    print(f"{'':28} {'policy µs':>9} {'body µs':>8} {'of a pick':>10}")
    print(f"{'pick among 16, no policies':28} {pick_us:9.2f}")
    for kind, policies in KINDS.items():
        compiled = CompiledPolicies.compile(gateway(policies), DEPLOYMENTS)
        reader = BodyReader(compiled.needs_body)
        attributes = RequestAttributes(
            model="llama", prompt_tokens=9000, headers={"x-team": "a"}, body=reader.read(BODY)
        )
        policy_us = best_us(lambda compiled=compiled, attributes=attributes: compiled.evaluate(attributes, KEY))
        body_us = best_us(lambda reader=reader: reader.read(BODY)) if compiled.needs_body else 0.0
        print(f"{kind:28} {policy_us:9.2f} {body_us:8.2f} {(policy_us + body_us) / pick_us:10.2f}")


if __name__ == "__main__":
    main()
