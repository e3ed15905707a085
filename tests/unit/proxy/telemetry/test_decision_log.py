"""The file of `--record`, written from values."""

from pathlib import Path

import msgspec

from fleetgate.core.routing.decision_record import RecordedEnd
from fleetgate.proxy.telemetry.decision_log import DecisionLog


def test_the_end_of_a_request_is_recorded_with_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "records"
    log = DecisionLog(str(path), "eu", 3)
    identity = log.identity(b"req_1", "chat", "m", "key")
    end = RecordedEnd(
        **identity._asdict(), outcome="ok", duration_s=1.0, prompt_tokens=5, output_tokens=7, deployment="a"
    )
    log.ended(end)
    log.log.close()
    record = msgspec.json.decode(path.read_bytes())
    assert (record["record"], record["id"], record["worker"], record["region"]) == ("ended", "req_1", 3, "eu")
    assert (record["deployment"], record["output_tokens"]) == ("a", 7)
