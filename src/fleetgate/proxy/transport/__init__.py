"""Transports: how requests reach Endpoints. Each is one module `NAME_transport.py` here, found by its name."""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

DEFAULT_TRANSPORT = "asyncio"
_SUFFIX = "_transport"


@cache
def names() -> tuple[str, ...]:
    """Every transport, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in modules if name.endswith(_SUFFIX)))


@cache
def find(name: str) -> ModuleType:
    """The module of a transport: `NAME` and `make(network, spawn)`, as `interface.TransportModule` says.

    Raises: `KeyError` if there is none of this name, `TypeError` if its file does not define both.
    """
    if name not in names():
        raise KeyError(f"no transport {name!r}; there are: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}{_SUFFIX}")
    if getattr(module, "NAME", None) != name or not callable(getattr(module, "make", None)):
        raise TypeError(
            f'transport {name} does not define `NAME = "{name}"` and `make`; see proxy/transport/interface.py'
        )
    return module
