"""`fleetgate engine` as a command; `engine.main` parses its arguments."""

import typer

from fleetgate.engine.main import main

# All arguments, --help included, go to `engine.main`, so that both ways to start it share one list of options.
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def engine(context: typer.Context) -> None:
    """Run a simulated inference server, or with --llamacpp a real one, with the OpenAI protocol."""
    raise typer.Exit(main(context.args))
