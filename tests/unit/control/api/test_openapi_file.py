"""The OpenAPI document in docs/ is the one that the code gives."""

import json
from pathlib import Path

from fleetgate.control.api.openapi_file import description
from fleetgate.control.resources.schema import KINDS

FILE = Path(__file__).parents[4] / "docs" / "reference" / "openapi.json"


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == description(), (
        "run: python -m fleetgate.control.api.openapi_file > docs/reference/openapi.json"
    )


def test_every_kind_is_described_with_its_fields() -> None:
    described = json.loads(description())
    for kind, model in KINDS.items():
        assert set(described["components"]["schemas"][kind]["properties"]) == set(model.model_fields)
        assert f"/api/v1/{kind.lower()}s/{{name}}" in described["paths"]
