"""Alembic's entry point; it runs on the store's connection and inside its transaction."""

from alembic import context

from fleetgate.control.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite rolls DDL back too if the driver does not commit by itself
    transaction_per_migration=False,
)
context.run_migrations()
