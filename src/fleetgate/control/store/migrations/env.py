"""Alembic's entry: runs on the connection that the store hands over, inside its transaction."""

from alembic import context

from fleetgate.control.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite rolls DDL back too, when the driver does not commit behind our back
    transaction_per_migration=False,
)
context.run_migrations()
