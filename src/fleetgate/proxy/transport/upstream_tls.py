"""TLS towards Endpoints: which certificate authorities are trusted."""

import ssl
from pathlib import Path


class UpstreamTls:
    """The authorities of the system, or of SSL_CERT_FILE, as they are now. TLS always verifies.

    While an authority is being replaced, both are in the file. Running connections stay; new ones use the new file.
    """

    def __init__(self) -> None:
        paths = ssl.get_default_verify_paths()
        self._paths = [Path(path) for path in (paths.cafile, paths.capath) if path]
        self._loaded = self._stamp()
        self.context = ssl.create_default_context()

    def _stamp(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self._paths]
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]

    def reload_if_changed(self) -> None:
        """Load the authorities again when their files changed. An incomplete file changes nothing."""
        try:
            stamp = self._stamp()
            if stamp == self._loaded:
                return
            for path in self._paths:
                if path.is_file():
                    # `create_default_context` skips files that it cannot read, and would then trust no authority.
                    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            self.context = ssl.create_default_context()
            self._loaded = stamp
        except (OSError, ssl.SSLError):
            return
