"""As much of the Hub as its client needs to create a repository and commit to it, on a port of this machine."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


TOKEN = "hf_LoopbackTokenThatNobodyMaySee"


@dataclass
class Commit:
    repo_id: str
    revision: str
    message: str
    files: dict[str, bytes]


@dataclass
class HubServer:
    """
    A server in a thread, for use as a context manager.

    Args:
        refusals (`dict[str, int]`, *optional*):
            Paths, as regular expressions, that are answered with an error of this status. The answer quotes the token
            it was sent, as a careless proxy would.
    """

    refusals: dict[str, int] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    repositories: dict[str, dict] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        """Variables with which a subprocess takes this server for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def checkout(self, folder: Path) -> Path:
        """Write what all commits have left behind to `folder`."""
        for commit in self.commits:
            for name, content in commit.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return folder


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_GET(self):
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _answer(self, body: bytes):
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        authorization = self.headers.get("Authorization", "")
        status = next((status for pattern, status in self.hub.refusals.items() if re.search(pattern, path)), None)
        if self.command != "PUT" and authorization != f"Bearer {TOKEN}":
            status = status or 401
        if status:
            return self._send({"error": f"Refused: {authorization}"}, status)
        asked = re.fullmatch(rf"/api/models/{_REPO}/auth-check/write", path)
        if asked and asked[1] not in self.hub.repositories:
            return self._send({"error": "Repository not found"}, 404)
        file = re.fullmatch(rf"/{_REPO}/resolve/main/(.+)", path)
        if file and self.command in ("GET", "HEAD"):
            return self._send_file(*file.groups())
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                return self._send(answer(self.hub, body, *match.groups()))
        return self._send({"error": f"No such address: {self.command} {path}"}, 404)

    def _send(self, answer: dict, status: int = 200):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, repo_id: str, name: str):
        found = [
            commit.files[name] for commit in self.hub.commits if commit.repo_id == repo_id and name in commit.files
        ]
        content = found[-1] if found else b""
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", f"{len(self.hub.commits):040x}")
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _create(hub: HubServer, body: bytes) -> dict:
    asked = json.loads(body)
    repo_id = f"{asked['organization'] or 'somebody'}/{asked['name']}"
    hub.repositories.setdefault(repo_id, asked)
    return {"url": _address(hub, repo_id), "name": repo_id}


def _address(hub: HubServer, repo_id: str) -> str:
    kind = "datasets/" if hub.repositories.get(repo_id, {}).get("type") == "dataset" else ""
    return f"{hub.url}/{kind}{repo_id}"


def _preupload(hub: HubServer, body: bytes, repo_id: str, revision: str) -> dict:
    files = [file["path"] for file in json.loads(body)["files"]]
    large = (".safetensors", ".png", ".parquet")
    return {
        "files": [
            {"path": path, "uploadMode": "lfs" if path.endswith(large) else "regular", "shouldIgnore": False}
            for path in files
        ]
    }


def _batch(hub: HubServer, body: bytes, repo_id: str) -> dict:
    objects = json.loads(body)["objects"]
    upload = lambda oid: {"upload": {"href": f"{hub.url}/lfs/{oid}"}}  # noqa: E731
    return {"transfer": "basic", "objects": [{**asked, "actions": upload(asked["oid"])} for asked in objects]}


def _store(hub: HubServer, body: bytes, oid: str) -> dict:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    return {}


def _commit(hub: HubServer, body: bytes, repo_id: str, revision: str) -> dict:
    lines = [json.loads(line) for line in body.splitlines()]
    commit = Commit(repo_id, revision, "", {})
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            commit.message = value["summary"]
        elif line["key"] == "file":
            commit.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            commit.files[value["path"]] = hub.objects[value["oid"]]
    hub.commits.append(commit)
    oid = f"{len(hub.commits):040x}"
    return {"commitUrl": f"{_address(hub, repo_id)}/commit/{oid}", "commitOid": oid}


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_REPO}/auth-check/write", lambda hub, body, repo_id: {}),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", lambda hub, body: {"errors": [], "warnings": []}),
    ("POST", rf"/api/(?:models|datasets)/{_REPO}/preupload/([\w.-]+)", _preupload),
    ("POST", rf"/(?:datasets/)?{_REPO}\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/lfs/(\w{64})", _store),
    ("POST", rf"/api/(?:models|datasets)/{_REPO}/commit/([\w.-]+)", _commit),
)
