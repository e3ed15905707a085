"""The API as a client meets it: a real process, a real socket, a real store."""

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from fleetgate.core.api_keys import hmac_hex, parse_key
from fleetgate.ipc.sealed_secret import unseal
from fleetgate.ipc.shared_memory import EndpointSignal
from tests.loopback.control_rig import DEPLOYMENT, GATEWAY, ControlRig
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlRig]:
    with ControlRig(tmp_path_factory.mktemp("control") / "data") as rig:
        yield rig


@pytest.fixture
def api(rig: ControlRig) -> Iterator[httpx2.Client]:
    """A session on an empty store."""
    with rig.client() as client:
        yield client
        for plural in ("keys", "gateways", "deployments", "profiles", "secrets", "clusters"):
            for item in client.get(f"/api/v1/{plural}").json()["items"]:
                assert client.delete(f"/api/v1/{plural}/{item['name']}").status_code == 200


def apply(api: httpx2.Client, *documents: object, dry_run: bool = False) -> httpx2.Response:
    return api.post("/api/v1/apply", json={"documents": list(documents), "dry_run": dry_run})


def test_applied_documents_reach_the_snapshot_and_nothing_is_published_twice(
    rig: ControlRig, api: httpx2.Client
) -> None:
    secret = {"kind": "Secret", "name": "token", "value": "s3cret-value"}
    deployment = {**DEPLOYMENT, "credential": {"secret": "token"}, "capacity": {"concurrency": 8}}
    outcomes = apply(api, GATEWAY, deployment, secret).json()["results"]
    assert [outcome["outcome"] for outcome in outcomes] == ["created"] * 3
    snapshot = rig.snapshot()
    (published,) = snapshot.deployments
    assert (published.concurrency_max, published.units, published.egress_checked) == (8, 8.0, True)
    assert [(one.host, one.port, one.base_path) for one in published.endpoints] == [("127.0.0.1", 9, "/v1")]
    seal_key = (rig.data_dir / "seal.key").read_bytes()
    assert unseal(published.credential, seal_key, "llama-us") == "s3cret-value"
    assert [gateway.host for gateway in snapshot.gateways] == ["chat.example.com"]
    again = apply(api, GATEWAY, deployment, secret).json()["results"]
    assert [outcome["outcome"] for outcome in again] == ["unchanged"] * 3
    assert rig.snapshot() == snapshot


def test_a_profile_is_kept_shown_published_and_guarded(rig: ControlRig, api: httpx2.Client) -> None:
    profile = {
        "model": "llama",
        "sku": "H100",
        "accelerators_per_replica": 8,
        "engine": "vllm",
        "prefill_tokens_per_s": 15000,
        "decode_step": {"base_s": 0.028, "per_sequence_s": 0.00035},
    }
    made = api.put("/api/v1/profiles/p", json=profile)
    assert (made.status_code, made.json()["batch_max"], made.json()["kv_tokens"]) == (201, 256, 0)
    deployment = {**DEPLOYMENT, "profile": "p", "accelerator": {"sku": "H100", "count": 8}}
    shown = api.put("/api/v1/deployments/llama-us", json=deployment).json()
    assert "Profile p" in shown["status"]["capacity"]["sentence"]
    published = rig.snapshot().deployments[0].profile
    assert published is not None
    assert published.base_s == 0.028
    changed = api.put("/api/v1/profiles/p", json={**profile, "decode_step": {"base_s": 0.02, "per_sequence_s": 0.0}})
    assert changed.json()["generation"] == 2
    published = rig.snapshot().deployments[0].profile
    assert published is not None
    assert published.base_s == 0.02
    assert api.put("/api/v1/deployments/llama-us", json=shown).json()["generation"] == 1, "a status is left aside"
    misfit = api.put("/api/v1/profiles/p", json={**profile, "engine": "sglang"})
    assert (misfit.status_code, "Deployment llama-us uses it" in misfit.text) == (422, True)
    refused = api.delete("/api/v1/profiles/p")
    assert (refused.status_code, "Deployment/llama-us" in refused.text) == (409, True)
    state = api.get("/api/v1/state").json()["deployments"][0]
    assert (state["units"], state["limit"]) == (state["capacity"]["units"], state["capacity"]["limit"])
    assert state["limit"] > 0


def test_a_changed_secret_is_published_and_never_shown(rig: ControlRig, api: httpx2.Client) -> None:
    deployment = {**DEPLOYMENT, "credential": {"secret": "token"}}
    assert apply(api, deployment, {"kind": "Secret", "name": "token", "value": "first-value"}).status_code == 200
    before = rig.snapshot().deployments[0].credential
    shown = api.put("/api/v1/secrets/token", json={"value": "second-value"})
    assert shown.status_code == 200
    seal_key = (rig.data_dir / "seal.key").read_bytes()
    after = rig.snapshot().deployments[0].credential
    assert before != after
    assert unseal(after, seal_key, "llama-us") == "second-value"
    told = [shown, api.get("/api/v1/secrets"), api.get("/api/v1/events"), api.get("/api/v1/state")]
    assert not [answer.text for answer in told if "second-value" in answer.text]
    files = [path.read_bytes() for path in rig.data_dir.iterdir() if path.is_file()]
    assert not [data for data in files if b"second-value" in data]


def test_five_mistakes_are_five_messages_and_change_nothing(rig: ControlRig, api: httpx2.Client) -> None:
    before = rig.snapshot().version
    broken_deployment = {**DEPLOYMENT, "url": "ftp://127.0.0.1/v1", "capacity": {"concurrency": -1}}
    broken_gateway = {
        **GATEWAY,
        "strategy": "overflw",
        "domian": "example.com",
        "upstreams": [{"deployment": "llama-eu"}],
    }
    del broken_gateway["domain"]
    answer = apply(api, broken_deployment, broken_gateway)
    assert answer.status_code == 422
    paths = {error["path"]: error for error in answer.json()["error"]["errors"]}
    assert set(paths) == {
        "Deployment/llama-us: url",
        "Deployment/llama-us: capacity.concurrency",
        "Gateway/chat: strategy",
        "Gateway/chat: domian",
        "Gateway/chat: upstreams[0].deployment",
    }
    assert paths["Gateway/chat: domian"]["fix"] == "did you mean `domain`?"
    assert "overflow" in paths["Gateway/chat: strategy"]["fix"]
    assert api.get("/api/v1/deployments").json() == {"items": []}
    assert rig.snapshot().version == before


def test_a_dry_run_tells_and_changes_nothing(api: httpx2.Client) -> None:
    assert apply(api, DEPLOYMENT, dry_run=True).json()["results"][0]["outcome"] == "created"
    assert api.get("/api/v1/deployments/llama-us").status_code == 404


def test_generations_compare_and_swap(api: httpx2.Client) -> None:
    assert api.put("/api/v1/deployments/llama-us", json=DEPLOYMENT).status_code == 201
    document = api.get("/api/v1/deployments/llama-us").json()
    changed = {**document, "region": "us-west"}
    assert api.put("/api/v1/deployments/llama-us", json=changed).json()["generation"] == 2
    stale = api.put("/api/v1/deployments/llama-us", json={**document, "region": "eu-west"})
    assert (stale.status_code, stale.json()["error"]["generation"]) == (409, 2)
    by_header = api.put("/api/v1/deployments/llama-us", json=DEPLOYMENT, headers={"if-match": '"1"'})
    assert by_header.status_code == 409
    assert api.delete("/api/v1/deployments/llama-us", headers={"if-match": '"1"'}).status_code == 409
    assert api.get("/api/v1/deployments/llama-us").json()["region"] == "us-west"
    assert api.post("/api/v1/deployments", json=DEPLOYMENT).status_code == 409


def test_of_many_concurrent_writers_of_one_generation_exactly_one_wins(rig: ControlRig, api: httpx2.Client) -> None:
    writers = 8
    assert api.put("/api/v1/deployments/llama-us", json=DEPLOYMENT).status_code == 201
    together = threading.Barrier(writers)

    def put(index: int) -> int:
        with rig.client() as client:
            together.wait()
            document = {**DEPLOYMENT, "generation": 1, "region": f"region-{index}"}
            return client.put("/api/v1/deployments/llama-us", json=document).status_code

    with concurrent.futures.ThreadPoolExecutor(writers) as pool:
        statuses = list(pool.map(put, range(writers)))
    assert sorted(statuses) == [200] + [409] * (writers - 1)
    assert api.get("/api/v1/deployments/llama-us").json()["generation"] == 2
    assert api.get("/api/v1/deployments/llama-us").json()["region"] == f"region-{statuses.index(200)}"


def test_what_is_used_is_not_deleted_and_the_users_are_named(api: httpx2.Client) -> None:
    assert apply(api, DEPLOYMENT, GATEWAY).status_code == 200
    refused = api.delete("/api/v1/deployments/llama-us")
    assert refused.status_code == 409
    assert "Gateway/chat" in refused.json()["error"]["message"]
    assert api.delete("/api/v1/gateways/chat").status_code == 200
    assert api.delete("/api/v1/deployments/llama-us").status_code == 200


def test_a_key_is_shown_once_and_kept_as_a_hash(rig: ControlRig, api: httpx2.Client) -> None:
    created = api.post("/api/v1/keys", json={"name": "app", "labels": {"team": "a"}, "expires": "30d"})
    assert created.status_code == 201
    parsed = parse_key(created.json()["key"].encode())
    assert parsed is not None
    (key,) = rig.snapshot().keys
    assert key.id == parsed[0]
    assert key.secret_hmac == hmac_hex((rig.data_dir / "pepper").read_bytes(), parsed[1])
    assert key.labels == {"team": "a"}
    assert key.expires_s == pytest.approx(time.time() + 30 * 86_400, abs=600)
    assert "key" not in api.get("/api/v1/keys/app").json()
    files = [path.read_bytes() for path in rig.data_dir.iterdir() if path.is_file()]
    assert not [data for data in files if parsed[1].encode() in data]
    assert api.delete("/api/v1/keys/app").status_code == 200
    assert rig.snapshot().keys == ()


def test_a_key_document_may_be_applied_like_any_other(rig: ControlRig, api: httpx2.Client) -> None:
    document = {"kind": "Key", "name": "app", "expires": "12h"}
    (created,) = apply(api, document).json()["results"]
    assert parse_key(created["key"].encode()) is not None
    (again,) = apply(api, document).json()["results"]
    assert (again["outcome"], "key" in again) == ("unchanged", False)
    secret_hmac = rig.snapshot().keys[0].secret_hmac
    (changed,) = apply(api, {**document, "models": ["llama"]}).json()["results"]
    assert (changed["outcome"], "key" in changed) == ("changed", False)
    assert rig.snapshot().keys[0].secret_hmac == secret_hmac


def test_a_reference_and_the_deletion_of_its_target_never_both_succeed(rig: ControlRig, api: httpx2.Client) -> None:
    for _ in range(5):
        assert apply(api, DEPLOYMENT).status_code == 200
        together = threading.Barrier(2)

        def point(together: threading.Barrier = together) -> int:
            with rig.client() as client:
                together.wait()
                return client.put("/api/v1/gateways/chat", json=GATEWAY).status_code

        def take_away(together: threading.Barrier = together) -> int:
            with rig.client() as client:
                together.wait()
                return client.delete("/api/v1/deployments/llama-us").status_code

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            statuses = pool.submit(point), pool.submit(take_away)
        assert (statuses[0].result(), statuses[1].result()) in ((201, 409), (422, 200))
        api.delete("/api/v1/gateways/chat")


def test_a_change_waits_for_workers_that_lag_but_not_for_ever(rig: ControlRig, api: httpx2.Client) -> None:
    rig.act_as_worker(0, rig.snapshot().version)
    assert api.post("/api/v1/keys", json={"name": "late"}).status_code == 201  # no worker ever takes it up
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.005):
            rig.act_as_worker(0, rig.snapshot().version)

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        assert api.delete("/api/v1/keys/late").status_code == 200
    finally:
        done.set()
        follower.join()


def test_urls_given_through_the_api_stay_inside_the_allowed_ranges(api: httpx2.Client) -> None:
    refused = api.put("/api/v1/deployments/llama-us", json={**DEPLOYMENT, "url": "http://10.1.2.3:8000/v1"})
    assert refused.status_code == 422
    (error,) = refused.json()["error"]["errors"]
    assert error["path"] == "Deployment/llama-us: url"
    assert "10.1.2.3" in error["message"]
    assert "127.0.0.0/8" in error["message"]
    assert "--egress-allow" in error["fix"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/api/v1/gateways/chat", b"{", 400),
        ("PUT", "/api/v1/gateways/chat", b"[]", 422),
        ("PUT", "/api/v1/gateways/chat", b'{"name": "\\ud800"}', 400),
        ("PUT", "/api/v1/gateways/chat", b"[" * 100_000, 400),
        ("PUT", "/api/v1/gateways/chat", b'{"kind": "Deployment"}', 422),
        ("PUT", "/api/v1/gateways/chat", b'{"name": "other"}', 422),
        ("POST", "/api/v1/apply", b'{"documents": 1}', 422),
        ("POST", "/api/v1/apply", b'{"documents": [], "dryrun": true}', 422),
        ("GET", "/api/v1/gateways/none", b"", 404),
        ("GET", "/api/v1/nothing", b"", 404),
        ("PATCH", "/api/v1/gateways", b"", 405),
        ("GET", "/api/v1/events?limit=0", b"", 422),
    ],
)
def test_bad_requests_have_clear_answers(api: httpx2.Client, method: str, path: str, body: bytes, status: int) -> None:
    answer = api.request(method, path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_without_the_owners_token_nothing_under_api_answers_but_its_description(rig: ControlRig) -> None:
    with httpx2.Client(base_url=rig.base_url, trust_env=False) as stranger:
        described = stranger.get("/api/v1/openapi.json")
        assert described.status_code == 200
        for path, operations in described.json()["paths"].items():
            for method in operations:
                answer = stranger.request(method.upper(), path.replace("{name}", "x"))
                assert answer.status_code == 401, (method, path)
        wrong = stranger.get("/api/v1/gateways", headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost:7801", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("[::1]:7801", True),
        ("10.0.0.7:7801", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("localhost@evil.example", False),
        ("", False),
    ],
)
def test_only_known_hosts_are_answered(rig: ControlRig, host: str, known: bool) -> None:
    with httpx2.Client(base_url=rig.base_url, trust_env=False) as stranger:
        assert stranger.get("/healthz", headers={"host": host}).status_code == (200 if known else 421)


def test_the_console_and_its_headers(rig: ControlRig) -> None:
    with httpx2.Client(base_url=rig.base_url, trust_env=False) as stranger:
        page = stranger.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in page.headers["content-security-policy"]
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in page.headers
        assert "style=" not in page.text
        for file in ("/console.js", "/console.css", "/icon.svg"):
            assert file in page.text
            assert stranger.get(file).status_code == 200
        assert "innerHTML" not in stranger.get("/console.js").text
        for path in ("/../server.py", "/%2e%2e/server.py", "/static/index.html"):
            assert stranger.get(path).status_code == 404


def test_state_metrics_and_events_tell_what_the_board_shows(rig: ControlRig, api: httpx2.Client) -> None:
    assert apply(api, {**DEPLOYMENT, "capacity": {"concurrency": 4}}, GATEWAY).status_code == 200
    deployment, gateway = rig.snapshot().deployments[0], rig.snapshot().gateways[0]
    endpoint = deployment.endpoints[0]
    rig.board.in_flight[deployment.slot * rig.board.workers] = 3
    rig.board.waiting[gateway.slot * rig.board.workers] = 2
    rig.board.set_signal(endpoint.slot, EndpointSignal.SEEN_MS, 1)
    rig.board.set_signal(endpoint.slot, EndpointSignal.UP, 0)
    labels = '{deployment="llama-us",gateway="chat",outcome="ok",region="us-east"}'
    at = rig.board.add_series(0, f"fleetgate_requests_total{labels}")
    rig.board.series[at] = 7
    state = api.get("/api/v1/state").json()
    (shown,) = state["deployments"]
    assert (shown["in_flight"], shown["limit"], shown["up"], shown["requests"]) == (3, 4, False, {"ok": 7})
    assert state["gateways"][0]["waiting"] == 2
    text = api.get("/metrics").text
    assert 'fleetgate_in_flight{deployment="llama-us",region="us-east"} 3.0' in text
    assert 'fleetgate_limit{deployment="llama-us",region="us-east"} 4.0' in text
    assert 'fleetgate_queue{gateway="chat"} 2.0' in text
    assert 'fleetgate_endpoint_up{deployment="llama-us",endpoint="http://127.0.0.1:9/v1"} 0.0' in text
    requests = [line for line in text.splitlines() if line.startswith("fleetgate_requests_total{")]
    assert requests == [f"fleetgate_requests_total{labels} 7.0"]
    wait_for(lambda: any("is down" in item["sentence"] for item in api.get("/api/v1/events").json()["items"]))
    rig.board.set_signal(endpoint.slot, EndpointSignal.UP, 1)
    wait_for(lambda: any("is up again" in item["sentence"] for item in api.get("/api/v1/events").json()["items"]))


def test_events_are_read_page_by_page(api: httpx2.Client) -> None:
    for region in ("a", "b", "c"):
        assert api.put("/api/v1/deployments/llama-us", json={**DEPLOYMENT, "region": region}).is_success
    events = api.get("/api/v1/events", params={"kind": "Deployment", "name": "llama-us", "limit": 3}).json()["items"]
    assert [event["sentence"].split(" through")[0] for event in events] == [
        "Deployment llama-us was created",
        "Deployment llama-us was changed",
        "Deployment llama-us was changed",
    ]
    later = api.get("/api/v1/events", params={"after": events[0]["id"], "limit": 1}).json()["items"]
    assert later[0]["id"] == events[1]["id"]


def test_the_data_directory_is_its_owners_alone(rig: ControlRig) -> None:
    assert rig.data_dir.stat().st_mode & 0o777 == 0o700
    for path in Path(rig.data_dir).iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
