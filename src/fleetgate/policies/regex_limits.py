"""Regular expressions in policies must be literals, so that they can be checked, and are bounded in cost."""

import re

from fleetgate.policies import cel_parser, evaluator
from fleetgate.policies.cel_parser import CelError, Node

PATTERN_CHARS_MAX = 200
REPEATS_MAX = 100  # product of the counted repeats; the library expands each at every evaluation
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")


def check_pattern(node: Node) -> None:
    """Check the argument of `matches`; matching is linear in the text. Raises: `CelError`."""
    match node:
        case cel_parser.ConstantNode(type="string"):
            pattern = str(evaluator.literal_value(node.text))
        case _:
            raise CelError(node.offset, "the pattern of `matches` must be a literal", "write it in quotes")
    repeats = 1
    for low, high in _REPEAT.findall(pattern):
        repeats *= max(1, int(high or low or 1))
    if len(pattern) > PATTERN_CHARS_MAX or repeats > REPEATS_MAX:
        fix = f"use at most {PATTERN_CHARS_MAX} characters, and counted repeats {{n}} of at most {REPEATS_MAX} together"
        raise CelError(node.offset, "the pattern costs too much", fix)
    try:
        evaluator.evaluate(evaluator.compile_expression(f'"".matches({node.text})'), {})
    except evaluator.EvaluationFailed:
        raise CelError(
            node.offset, "the pattern is not a regular expression", "close its brackets and repeats"
        ) from None
