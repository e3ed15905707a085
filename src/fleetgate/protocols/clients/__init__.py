"""Client protocols: one file each, found by its name. `base.ClientProtocol` lists what a file must define.

A protocol's name has no underscore. `NAME_part.py` beside `NAME.py` is a part of that protocol, not another one.
"""

import importlib
import pkgutil
from functools import cache

from fleetgate.protocols.clients.base import ClientProtocol, missing_members

_CONTRACT = "base"


@cache
def names() -> tuple[str, ...]:
    """Every protocol in the folder, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in modules if name != _CONTRACT and "_" not in name))


@cache
def find(name: str) -> ClientProtocol:
    """The protocol of a name.

    Raises: `KeyError` if there is none, `TypeError` if its file does not define all members of the contract.
    """
    if name not in names():
        raise KeyError(f"no client protocol {name!r}; there are: {', '.join(names())}")
    protocol: ClientProtocol = importlib.import_module(f"{__name__}.{name}")
    missing = missing_members(protocol)
    if missing:
        raise TypeError(f"client protocol {name} does not define {', '.join(missing)}; see protocols/clients/base.py")
    return protocol
