"""The API against its own OpenAPI document: random requests of the described shapes, and of others."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fleetgate.control.resources.schema import KINDS
from tests.loopback.control_rig import ControlRig

EXAMPLES = 8  # of each of 28 operations, right and wrong ones


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlRig]:
    with ControlRig(tmp_path_factory.mktemp("control") / "data") as rig:
        yield rig


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_upsets_the_api(rig: ControlRig, mode: GenerationMode) -> None:
    described = schemathesis.openapi.from_url(f"{rig.base_url}/api/v1/openapi.json")
    token = (rig.data_dir / "owner-token").read_text().strip()
    tried = set()
    for found in described.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        @settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck], database=None)
        @given(operation.as_strategy(generation_mode=mode))
        def hold(case: "schemathesis.Case[Any]") -> None:
            tried.add(f"{case.method} {case.path}")
            case.call_and_validate(
                headers={"authorization": f"Bearer {token}"},
                checks=[
                    not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        hold()
        assert rig.process is not None
        assert rig.process.poll() is None
    assert len(tried) >= 5 * len(KINDS)
