"""A Hugging Face Hub on this machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0" * 40


class Hub(http.server.SimpleHTTPRequestHandler):
    """A Hub whose repositories are the folders ``org/name`` of ``root``."""

    root: Path

    @property
    def repository(self) -> Path:
        return self.root.joinpath(*self.path.removeprefix("/api/models").split("/")[1:3])

    def translate_path(self, path: str) -> str:
        return str(self.repository.joinpath(*path.split("/")[5:]))  # /ORG/NAME/resolve/main/FILE

    def do_GET(self) -> None:
        if not self.path.startswith("/api/models/") or not self.repository.is_dir():
            super().do_GET()
            return
        top = self.repository
        files = [path for path in top.rglob("*") if path.is_file()]
        sizes = {path.relative_to(top).as_posix(): path.stat().st_size for path in files}
        sizes = dict(sorted(sizes.items()))
        told: Any = {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in sizes]}
        if "/tree/" in self.path:
            told = [
                {"type": "file", "path": name, "size": size, "oid": COMMIT}
                for name, size in sizes.items()
            ]
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        lacks = "EntryNotFound" if self.repository.is_dir() else "RepoNotFound"
        headers = {"ETag": f'"{hash(self.path)}"', "X-Repo-Commit": COMMIT, "X-Error-Code": lacks}
        for key, value in headers.items():
            self.send_header(key, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def own_hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start a Hub that huggingface_hub asks, with an empty cache; give the repositories' folder."""
    from huggingface_hub import constants, file_download

    Hub.root = folder / "hub"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if hasattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE"):  # up to version 0.36
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
    try:
        yield Hub.root
    finally:
        server.shutdown()
        server.server_close()
        reset_sessions()


def cut_off(patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask an address where nothing answers."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def reset_sessions() -> None:
    """Have huggingface_hub read its settings anew."""
    from huggingface_hub import utils

    (utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions)()
