"""Checks client keys against the Snapshot alone: no request needs a database."""

import hmac

from fleetgate.core.api_keys import hmac_hex, parse_key
from fleetgate.core.model import Gateway, Key
from fleetgate.proxy.routing.routing_table import RoutingTable

MEMO_MAX = 10_000  # keys checked with this Snapshot; bounded: faults.md row 84
ANONYMOUS = Key(id="", name="anonymous", secret_hmac="")
_UNKNOWN_KEY_HMAC = "0" * 64


class Authenticator:
    """Checks client keys. Shape: `pepper` is the data directory's; without it (None) every request is `anonymous`."""

    def __init__(self, pepper: bytes | None) -> None:
        self._pepper = pepper

    def find(self, authorization: bytes, table: RoutingTable) -> Key | None:
        """The key of an Authorization header, valid or expired; None for one that is not known.

        Cost: 0.1 µs for a key seen with this Snapshot, else 5 µs, the same for unknown ids.
        """
        if self._pepper is None:
            return ANONYMOUS
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not token:
            return None
        memo = table.key_memo
        if token in memo:
            return memo[token]
        key = self._check(token.strip(), table)
        if len(memo) >= MEMO_MAX:
            memo.clear()
        memo[token] = key
        return key

    def _check(self, token: bytes, table: RoutingTable) -> Key | None:
        parsed = parse_key(token)
        key_id, secret = parsed if parsed is not None else ("", "")
        key = table.keys.get(key_id)
        given = hmac_hex(self._pepper or b"", secret)
        # The comparison takes constant time and is made for unknown ids too, so that its duration does not depend on
        # whether a key exists.
        same = hmac.compare_digest(given, key.secret_hmac if key is not None else _UNKNOWN_KEY_HMAC)
        return key if same and parsed is not None else None


def may_use(key: Key, gateway: Gateway) -> bool:
    """Whether the key's scope includes the Gateway."""
    return not key.gateways or gateway.name in key.gateways
