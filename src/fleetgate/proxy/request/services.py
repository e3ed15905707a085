"""The services that request handlers of one worker use. The worker makes them once."""

from collections.abc import Iterator

import msgspec

from fleetgate.proxy.request.attempt import AttemptServices
from fleetgate.proxy.request.attempts import AttemptEffects
from fleetgate.proxy.request.placement import Placer
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.response.heads import ResponseDefaults


class HandlerServices(msgspec.Struct, frozen=True):
    """Shape: `defaults` is shared by all responses; the clock is in `attempts`."""

    ids: Iterator[bytes]
    defaults: ResponseDefaults
    placer: Placer
    registry: RequestRegistry
    attempts: AttemptServices
    effects: AttemptEffects
