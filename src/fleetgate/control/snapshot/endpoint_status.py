"""Whether an Endpoint of the Snapshot answers its probe, read from shared memory."""

from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory


def endpoint_up(shared_memory: SharedMemory | None, slot: int) -> bool:
    """Whether an Endpoint counts as up. An Endpoint that was never probed counts as up."""
    if shared_memory is None or not shared_memory.signal(slot, EndpointSignal.SEEN_MS):
        return True
    return bool(shared_memory.signal(slot, EndpointSignal.UP))
