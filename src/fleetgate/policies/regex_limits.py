"""Regular expressions in policies: written out, so that they can be checked, and bounded in what they cost."""

import re

from fleetgate.policies import cel_parser as grammar
from fleetgate.policies import evaluator as engine
from fleetgate.policies.cel_parser import CelError, Node

PATTERN_CHARS_MAX = 200
REPEATS_MAX = 100  # the product of a pattern's counted repeats; the library writes each out, at every evaluation
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")


def check_pattern(node: Node) -> None:
    """Check the argument of `matches`. The library's matching is linear in the text. Raises: `CelError`."""
    match node:
        case grammar.ConstantNode(type="string"):
            pattern = str(engine.literal(node.text))
        case _:
            raise CelError(node.at, "the pattern of `matches` must be written out", "write it in quotes")
    repeats = 1
    for low, high in _REPEAT.findall(pattern):
        repeats *= max(1, int(high or low or 1))
    if len(pattern) > PATTERN_CHARS_MAX or repeats > REPEATS_MAX:
        fix = f"use at most {PATTERN_CHARS_MAX} characters, and counted repeats {{n}} of at most {REPEATS_MAX} together"
        raise CelError(node.at, "the pattern costs too much", fix)
    try:
        engine.run(engine.compile_text(f'"".matches({node.text})'), {})
    except engine.EvaluationFailed:
        raise CelError(node.at, "the pattern is not a regular expression", "close its brackets and repeats") from None
