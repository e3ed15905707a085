"""Detects requests that crash engines, before a third engine gets one."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping

from fleetgate.core.health.poison_request import TOGETHER_S, LostAttempt, is_poison, is_suspicious
from fleetgate.proxy.health.event_messages import DeploymentEvents, poison_message
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.dns import AddressRefused
from fleetgate.proxy.transport.network import Network

EXIT_S = 0.05  # an ending process closes its connections before its listening socket
CONNECT_TIMEOUT_S = 0.5


class PoisonDetector:
    """Checks lost attempts that the request itself may have caused."""

    def __init__(
        self, active: ActiveTable, network: Network, events: DeploymentEvents, clock: Callable[[], float]
    ) -> None:
        self._active = active
        self._network = network
        self._events = events
        self._clock = clock

    def probe_if_suspicious(
        self, endpoint: EndpointState, others: int, without_content: int
    ) -> "asyncio.Task[bool] | None":
        """A task that checks whether an Endpoint is down after a reset connection; None if the loss is not suspicious.

        Shape: `others` counts other requests there, `without_content` those of them without content yet. Requests that
        were lost together with another one are not suspected.
        """
        last_loss_age_s = endpoint.note_loss(self._clock())
        if last_loss_age_s <= TOGETHER_S:
            others = without_content = 0
        served = any(one.ended_count for one in self._active.current.deployments_at.get(endpoint, ()))
        loss = LostAttempt(True, without_content, served or others > without_content, last_loss_age_s)
        return asyncio.ensure_future(self._is_down(endpoint)) if is_suspicious(loss) else None

    async def is_poison(
        self, downs: Mapping[EndpointState, Awaitable[bool]], request_id: bytes, last: DeploymentState | None
    ) -> bool:
        """Whether the Endpoints that a request was lost at are down, so that it must not be tried again."""
        if not is_poison(sum(await asyncio.gather(*downs.values()))):
            return False
        if last is not None:
            origins = [endpoint.spec.origin for endpoint in downs]
            self._events.emit(last.spec, "poison", poison_message(request_id.decode(), origins))
        return True

    async def _is_down(self, endpoint: EndpointState) -> bool:
        """Whether connections to it are refused."""
        await asyncio.sleep(EXIT_S)
        try:
            connection = await endpoint.pool.connect(self._network, CONNECT_TIMEOUT_S)
        except ssl.SSLError:
            return False
        except (OSError, TimeoutError, AddressRefused):
            return True
        connection.drop()
        return False
