"""The tables of the store. A change here needs a migration; a test compares the two."""

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

resources = Table(
    "resources",
    metadata,
    Column("kind", String(32), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("spec", Text, nullable=False),  # JSON as written, without the value of a Secret
    Column("generation", Integer, nullable=False),
    Column("trusted", Boolean, nullable=False),  # the operator wrote the URLs in a --config file on this machine
    Column("created_s", Float, nullable=False),
    Column("updated_s", Float, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("id", String(16), nullable=False, unique=True),
    Column("secret_hmac", String(64), nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("sealed", Text, nullable=False),
)

# Each slot has one owner. `freed` is 0 while the slot is in use, otherwise free slots are ordered by it, oldest first.
slots = Table(
    "slots",
    metadata,
    Column("space", String(16), primary_key=True),
    Column("slot", Integer, primary_key=True),
    Column("owner", String(1024), nullable=False),
    Column("freed", Integer, nullable=False, default=0),
    Index("slots_by_owner", "space", "owner", "freed"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("name", String(63), nullable=False),
    Column("sentence", Text, nullable=False),
    Index("events_by_object", "kind", "name", "id"),
    sqlite_autoincrement=True,  # ids are never reused, so `after=` skips no newer Event
)

numbers = Table(
    "numbers",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", Integer, nullable=False),
)

_NAMES = ("key", "gateway", "model", "deployment")

# One row for each attempt. Only the newest rows are kept; their sums in `usage_hours` are never deleted.
usage_rows = Table(
    "usage_rows",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("attempt_id", String(64), nullable=False, unique=True),
    Column("began_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    *(Column(name, String(200), nullable=False) for name in (*_NAMES, "region")),
    Column("outcome", String(32), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("exact", Boolean, nullable=False),
    Column("billed_prompt_tokens", BigInteger, nullable=False),
    Column("billed_output_tokens", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)

# `hour` is that of an attempt's end, since the epoch; `estimated` counts attempts without an engine's token counts.
usage_hours = Table(
    "usage_hours",
    metadata,
    Column("hour", BigInteger, primary_key=True),
    *(Column(name, String(200), primary_key=True) for name in _NAMES),
    Column("attempts", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("billed_prompt_tokens", BigInteger, nullable=False),
    Column("billed_output_tokens", BigInteger, nullable=False),
)

# Attempts that have not ended. With the read offsets of the journals this is all that a restart needs.
usage_open = Table(
    "usage_open",
    metadata,
    Column("attempt_id", String(64), primary_key=True),
    Column("run", String(64), nullable=False),
    Column("intent", Text, nullable=False),
    Column("progress", Text, nullable=False),
)

usage_read = Table(
    "usage_read",
    metadata,
    Column("file", String(100), primary_key=True),
    Column("offset", BigInteger, nullable=False),
)
