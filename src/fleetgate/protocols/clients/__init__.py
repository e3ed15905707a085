"""Client protocols: one file each, found by its name. `base.ClientProtocol` lists what a file must define.

A protocol's name has no underscore. `NAME_part.py` beside `NAME.py` is a part of that protocol, not another one.
"""

import importlib
import pkgutil
from functools import cache

from fleetgate.protocols.clients.base import ClientProtocol

_CONTRACT = "base"


@cache
def names() -> tuple[str, ...]:
    """Every protocol in the folder, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if name != _CONTRACT and "_" not in name))


@cache
def find(name: str) -> ClientProtocol:
    """The protocol of a name.

    Raises: `KeyError` when there is none.
    """
    if name not in names():
        raise KeyError(f"no client protocol {name!r}; there are: {', '.join(names())}")
    protocol: ClientProtocol = importlib.import_module(f"{__name__}.{name}")
    return protocol
