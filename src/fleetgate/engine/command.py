"""`fleetgate engine` for the command line's tree; its own arguments are read by `engine.main`."""

import typer

from fleetgate.engine.main import main

# Everything after the command's name, --help included, is the engine's: one list of options for both ways to start it.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def engine(context: typer.Context) -> None:
    """Run a simulated inference server (or with --llamacpp a real one) behind the OpenAI protocol."""
    raise typer.Exit(main(context.args))
