"""A local stand-in of the Hugging Face Hub's HTTP API: as much of it as an upload uses."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "f" * 40


@dataclasses.dataclass
class Hub:
    """What the stand-in holds and was asked.

    files:   contents of the files of the repository "org/name", by name;  private: as it was made.
    objects: contents of large files by sha256;  branches: made beside main.
    tokens:  what requests brought as authorization;  refuse: status that a commit is answered with.
    """

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    branches: list[str] = dataclasses.field(default_factory=list)
    commits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: set[str] = dataclasses.field(default_factory=set)
    created: bool = False
    private: bool = False
    refuse: int = 0


@contextlib.contextmanager
def running_hub(repository: str = "org/name") -> Iterator[Hub]:
    """A stand-in on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, repository))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub, repository: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{repository}/tree/"):
                found = [{"type": "file", "path": p, "size": len(d)} for p, d in hub.files.items()]
                self.answer([{**entry, "oid": "0"} for entry in found])
            elif path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in hub.files]
                self.answer({"id": repository, "sha": COMMIT, "siblings": siblings})
            else:
                self.answer({"error": f"unknown {path}"}, 404)

        def do_PUT(self) -> None:
            data = self.body()
            assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
            hub.objects[self.path.rpartition("/")[2]] = data
            self.answer({})

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            path, data = self.path.partition("?")[0], self.body()
            api = f"/api/models/{repository}"
            if path == "/api/repos/create":
                self.create(json.loads(data))
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif path.startswith(f"{api}/branch/"):
                hub.branches.append(path.rpartition("/")[2])
                self.answer({}, 201)
            elif path.startswith(f"{api}/preupload/"):
                self.answer({"files": [self.mode(file) for file in json.loads(data)["files"]]})
            elif path == f"/{repository}.git/info/lfs/objects/batch":
                self.answer({"transfer": "basic", "objects": self.actions(json.loads(data))})
            elif path.startswith(f"{api}/commit/"):
                self.commit([json.loads(line) for line in data.splitlines()])
            else:
                self.answer({"error": f"unknown {path}"}, 404)

        def create(self, asked: dict[str, Any]) -> None:
            known = (asked.get("organization"), asked["name"]) == tuple(repository.split("/"))
            if not known:
                self.answer({"error": "You don't have the rights to create this"}, 403)
                return
            status = 409 if hub.created else 200
            if not hub.created:
                hub.private = asked.get("private") or asked.get("visibility") == "private"
            hub.created = True
            self.answer({"url": f"{hub.url}/{repository}", "id": repository}, status)

        def mode(self, file: dict[str, Any]) -> dict[str, Any]:
            large = file["path"].endswith(".safetensors")
            kind = "lfs" if large else "regular"
            return {"path": file["path"], "uploadMode": kind, "shouldIgnore": False, "oid": None}

        def actions(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
            result = []
            for entry in asked["objects"]:
                href = f"{hub.url}/objects/{entry['oid']}"
                actions = {} if entry["oid"] in hub.objects else {"upload": {"href": href}}
                result.append({**entry, **({"actions": actions} if actions else {})})
            return result

        def commit(self, lines: list[dict[str, Any]]) -> None:
            if hub.refuse:
                self.answer({"error": "Not today"}, hub.refuse)
                return
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value)
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            address = f"{hub.url}/{repository}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address})

    return Handler
