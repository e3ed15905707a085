"""The OpenAPI document as a file: `python -m fleetgate.control.api.openapi_file > docs/reference/openapi.json`."""

import json
import sys
import tempfile
from pathlib import Path

from fleetgate.control.api.app import create_app
from fleetgate.control.config import ControlConfig
from fleetgate.control.context import Control
from fleetgate.control.data_dir import open_data_dir
from fleetgate.control.resources.apply import ResourceWriter
from fleetgate.control.snapshot.publisher import Publisher
from fleetgate.control.store.database import Database


def description() -> str:
    """The text of the document; the same code gives the same text."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = open_data_dir(Path(folder))
        database = Database(data_dir.database)
        publisher = Publisher(database, data_dir, (), dict)
        config = ControlConfig(data_dir=folder, api_fd=-1, board_fd=-1, workers=1)
        control = Control(config, data_dir, database, ResourceWriter(database, data_dir), publisher)
        document = create_app(control, []).openapi()
        database.close()
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(description())
