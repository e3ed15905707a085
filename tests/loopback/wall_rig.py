"""Workers in front of walls: what most tests of the data plane stand on."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fleetgate.core.model import Deployment
from tests.loopback.rig import Rig, deployment, gateway
from tests.loopback.wall import Wall
from tests.loopback.wall_client import Answer, Client, ask
from tests.loopback.wall_replies import REPLIES
from tests.waiting import wait_for

EVERY_MODEL = {name: name for name in (*REPLIES, "m")}
NAMES = ("one", "two", "three")


class Plane:
    """Workers and walls that a module's tests share; `use` gives each test Deployments of which nothing is known yet.

    A breaker belongs to an Endpoint, so a fresh slot is a clean bill of health and a cold pool.
    """

    def __init__(self, rig: Rig, walls: list[Wall]) -> None:
        self.rig = rig
        self.walls = walls
        self.slots: list[int] = []
        self._slot = 0

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self.rig.port

    @property
    def wall(self) -> Wall:
        """The wall behind the first Deployment."""
        return self.walls[0]

    def deployments(self, *options: Mapping[str, object]) -> list[Deployment]:
        """One fresh Deployment for each, `one` at the first wall and so on."""
        made = []
        for place, chosen in enumerate(options):
            self._slot += 1
            port = self.walls[place].port if place < len(self.walls) else 1
            made.append(deployment(NAMES[place], port, self._slot, **{"models": EVERY_MODEL, **chosen}))
        self.slots = [one.slot for one in made]
        return made

    def use(self, *options: Mapping[str, object], **gateway_options: object) -> None:
        """Publish fresh Deployments in one Gateway and wait until they are in use."""
        made = self.deployments(*(options or ({},)))
        self.publish(made, **gateway_options)

    def publish(self, made: list[Deployment], **gateway_options: object) -> None:
        """Publish these Deployments in one Gateway and wait until they are in use."""
        names = [one.name for one in made]
        self.rig.publish(gateways=(gateway(*names, **gateway_options),), deployments=tuple(made))
        self.rig.wait_until_used()
        for wall in self.walls:
            wall.forget()

    def ask(self, data: bytes) -> Answer:
        """One request on a connection of its own."""
        return ask(self.port, data)

    def client(self, receive_bytes: int = 0) -> Client:
        """A connection."""
        return Client(self.port, receive_bytes)

    def in_flight(self) -> int:
        """What the ledger holds for the Deployments in use."""
        return sum(self.rig.board.in_flight_total(slot) for slot in self.slots)

    def wait_idle(self) -> None:
        """Until nothing is in flight in the ledger, nothing waits, and no wall has anything to do."""
        wait_for(lambda: self.in_flight() == 0 and self.rig.board.waiting_total(0) == 0)
        wait_for(lambda: all(wall.active == 0 for wall in self.walls))

    def seen(self, place: int = 0) -> list[str]:
        """The models that a wall was asked for."""
        return [seen.model for seen in self.walls[place].seen]


@contextmanager
def plane(
    workers: int = 1, walls: int = 1, patience: Mapping[str, float | str] | None = None, **options: object
) -> Iterator[Plane]:
    """Start them, and end them."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="fleetgate-test-")))
        running = [stack.enter_context(Wall()) for _ in range(walls)]
        rig = Rig(directory, workers, **options)  # type: ignore[arg-type]
        rig.patience = patience or {}
        made = Plane(stack.enter_context(rig), running)
        made.use(*({} for _ in range(walls)))
        yield made
