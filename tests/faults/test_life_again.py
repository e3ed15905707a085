"""A machine that is started again: beside itself, after kill -9 of everything, with a file that is being edited."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path

from tests.faults.test_accounts import CONTROL, WORKER, journal_files, rows_of
from tests.loopback.up_rig import Up, deployment, free_port, gateway, is_alive, kill, run
from tests.loopback.wall import Wall
from tests.loopback.wall_client import Client, request
from tests.waiting import wait_for

MODELS = [{"name": name} for name in ("m", "held")]


def made(folder: Path, wall: Wall, *flags: str) -> Up:
    documents = [deployment("a", f"http://127.0.0.1:{wall.port}/v1", models=MODELS), gateway("chat", "a")]
    return Up(folder, documents, "--auth", "none", *flags)


def streaming(up: Up) -> Client:
    """A client in the middle of a stream."""
    client = Client(up.port)
    client.send(request("held", stream=True))
    client.read_until(b"tok")
    return client


def rest_of(client: Client) -> bytes:
    """What still comes, to the end of the connection."""
    rest = b""
    while data := client.socket.recv(1 << 16):
        rest += data
    return rest


def test_a_second_one_on_the_same_data_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """With a last good Snapshot there, too, which workers would otherwise serve from without a control process."""
    with Wall() as wall, made(tmp_path, wall) as up:
        wait_for(lambda: (up.data_dir / "snapshot.good").exists())
        flags = ("--listen", f"127.0.0.1:{free_port()}", "--api-listen", f"127.0.0.1:{free_port()}")
        second = run("up", "--config", str(up.config), "--data-dir", str(up.data_dir), "--auth", "none", *flags)
        assert second.returncode == 1
        assert "is in use by another `fleetgate up`" in second.stderr and "--data-dir" in second.stderr
        assert up.ask().status_code == 200 and up.is_ready()


def test_after_kill_9_of_the_supervisor_nothing_is_left_and_the_next_starts_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        wall = stack.enter_context(Wall())
        wall.hold()
        up = stack.enter_context(made(tmp_path, wall))
        clients = [stack.enter_context(streaming(up)) for _ in range(3)]
        wait_for(lambda: len(wall.seen) == 3)
        first = [*up.children(WORKER), *up.children(CONTROL)]
        assert len(first) == 3
        kill(up.process.pid)
        up.process.wait(10)
        with up:  # the same directory and ports
            assert not [pid for pid in first if is_alive(pid)]
            for rest in map(rest_of, clients):
                assert b'"code":"shutting_down"' in rest and not rest.endswith(b"0\r\n\r\n"), "none may look whole"
            wall.release()
            assert up.ask().status_code == 200
            wait_for(lambda: len(rows_of(up)) == 4)
            assert sorted(row.outcome for row in rows_of(up)) == ["client_gone"] * 3 + ["ok"]
            assert len({name.partition(".")[0] for name in journal_files(up)}) == 2


def serving(up: Up) -> str:
    return up.ask().headers["x-fleetgate-deployment"]


def test_row_47_a_control_process_that_dies_takes_no_change_back(tmp_path: Path) -> None:
    """The file is applied when an operator says so, by a start or a reload, and by nothing that happens at night."""
    with Wall() as wall:
        url = f"http://127.0.0.1:{wall.port}/v1"
        written = [deployment("a", url), deployment("b", url), gateway("chat", "a", "b")]
        with Up(tmp_path, written, "--auth", "none") as up:
            assert serving(up) == "a"
            changed = tmp_path / "changed.json"
            changed.write_text(json.dumps([gateway("chat", "b", "a")]))
            assert up.cli("apply", "-f", str(changed)).returncode == 0
            wait_for(lambda: serving(up) == "b")
            restarted(up)
            assert "(generation 2)" in up.cli("get", "events").stdout
            assert "(generation 3)" not in up.cli("get", "events").stdout
            assert serving(up) == "b"
            assert up.cli("reload").returncode == 0
            wait_for(lambda: serving(up) == "a")


def restarted(up: Up) -> None:
    """Kill the control process, and wait for the next."""
    (control,) = up.children(CONTROL)
    kill(control)
    wait_for(lambda: control not in up.children(CONTROL) and up.is_ready())


def test_a_file_that_is_being_edited_costs_nobody_the_api(tmp_path: Path) -> None:
    with Wall() as wall, made(tmp_path, wall) as up:
        good = up.config.read_text()
        up.config.write_text(good + "---\nkind: Gateway\nname: second\nstrateggy: overflow\n")
        before = up.children(WORKER)
        told = up.cli("reload")
        assert told.returncode == 1 and "nothing was replaced" in told.stderr
        assert "fleet.yaml: Gateway/second: strateggy" in told.stderr and "`strategy`" in told.stderr
        assert up.children(WORKER) == before
        restarted(up)
        (control,) = up.children(CONTROL)
        up.process.send_signal(signal.SIGHUP)  # nobody asks here whether the file is good
        wait_for(lambda: control not in up.children(CONTROL) and up.is_ready())
        assert "was not applied and the stored resources stay in use" in up.cli("get", "events").stdout
        assert up.ask().status_code == 200
