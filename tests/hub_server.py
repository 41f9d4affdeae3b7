"""A Hub on the loopback interface: what the huggingface_hub client asks for when it pushes and loads a model or a data
set.

Nothing is written to disk. LFS uploads are checked against their sha256, and a commit may only name objects that were
uploaded. A client speaks to it with `HF_ENDPOINT` set to its address, `HF_TOKEN` to [`TOKEN`], and
`HF_HUB_DISABLE_XET=1`: with hf_xet installed the client uploads by the Xet protocol without asking the server, and
that protocol's storage is not here.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test"
USER = "tester"


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]  # all files of the repository after this commit

    @property
    def sha(self) -> str:
        listing = [(name, hashlib.sha1(content).hexdigest()) for name, content in sorted(self.files.items())]
        return hashlib.sha1(repr((self.message, listing)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {".gitattributes": b""})])


class HubServer:
    """A server from `with HubServer() as hub:` on, with one user, whose token may write unless `role` is changed.

    Attributes:
        url: where it listens.
        repositories: `{"namespace/name": Repository}`; of data sets `"datasets:namespace/name"`.
        objects: `{sha256: content}` of LFS uploads.
        requests: `"METHOD /path"` of every request so far.
        failures: `{regular expression of "METHOD /path": (status, message)}`, answered instead of what was asked for.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: dict[str, tuple[int, str]] = {}
        self.role = "write"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet", ".tar"))


def etag(path: str, content: bytes) -> str:
    """sha256 for LFS files, git's own sha1 for others; the client compares them with its files'."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # keeps connections open, as the client expects

    def log_message(self, *args):
        pass

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        asked, request = (f"{self.command} {p}" for p in (path, re.sub(DATASETS, _as_model, path)))
        self.hub.requests.append(asked)
        body = self._body()
        for pattern, (status, message) in self.hub.failures.items():
            if re.search(pattern, asked):
                return self._error(status, message)
        for pattern, needs_token, answer in ROUTES:
            if match := re.fullmatch(pattern, request):
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._error(401, "Invalid credentials in Authorization header")
                return answer(self, body, *match.groups())
        return self._error(404, f"no such endpoint: {request}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200, **headers: str):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _error(self, status: int, message: str, **headers: str):
        self._json({"error": message}, status, X_Error_Message=message, **headers)

    def _repository(self, model_id: str) -> Repository | None:
        """The repository; none after an error that was sent, also where it is private and the token is not there."""
        repository = self.hub.repositories.get(model_id)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not allowed):
            self._error(401 if not allowed else 404, "Repository not found", X_Error_Code="RepoNotFound")
            return None
        return repository

    def whoami(self, body):
        token = {"displayName": "test", "role": self.hub.role}
        self._json({"type": "user", "name": USER, "orgs": [{"name": "lab"}], "auth": {"accessToken": token}})

    def create(self, body):
        wanted = json.loads(body)
        model_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        is_dataset = wanted.get("type") == "dataset"
        key = f"datasets:{model_id}" if is_dataset else model_id
        known = key in self.hub.repositories
        if not known:
            self.hub.repositories[key] = Repository(private=wanted.get("visibility") == "private")
        self._json(
            {"url": f"{self.hub.url}/{'datasets/' * is_dataset}{model_id}", "name": model_id}, 409 if known else 200
        )

    def validate_yaml(self, body):
        front_matter = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            valid = isinstance(yaml.safe_load(front_matter[1]), dict) if front_matter else False
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "front matter is no YAML mapping"}]
        self._json({"errors": errors, "warnings": []}, 200 if valid else 400)

    def preupload(self, body, model_id):
        if repository := self._repository(model_id):
            there = repository.commits[-1].files
            files = [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_lfs(path) else "regular",
                    "shouldIgnore": False,
                    "oid": etag(path, there[path]) if path in there else None,
                }
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            self._json({"files": files})

    def lfs_batch(self, body, model_id):
        if self._repository(model_id):
            objects = json.loads(body)["objects"]
            for wanted in objects:
                if wanted["oid"] not in self.hub.objects:
                    wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, f"content is not that of {oid}")
        self.hub.objects[oid] = body
        return self._send(b"")

    def commit(self, body, model_id):
        repository = self._repository(model_id)
        if repository is None:
            return None
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(repository.commits[-1].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                return self._error(400, f"cannot do {operation['key']}")
        repository.commits.append(Commit(header["value"]["summary"], files))
        sha = repository.commits[-1].sha
        shown = model_id.replace("datasets:", "datasets/")
        return self._json({"commitUrl": f"{self.hub.url}/{shown}/commit/{sha}", "commitOid": sha})

    def info(self, body, model_id):
        if repository := self._repository(model_id):
            last = repository.commits[-1]
            siblings = [{"rfilename": path} for path in last.files]
            self._json({"id": model_id, "sha": last.sha, "private": repository.private, "siblings": siblings})

    def tree(self, body, model_id, folder):
        """The files and folders in a folder of the newest commit; those below it too where they are asked for."""
        repository = self._repository(model_id)
        if repository is None:
            return None
        prefix, found = f"{folder}/" if folder else "", {}
        recursive = "recursive=true" in self.path.lower()
        for path, content in repository.commits[-1].files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    name = prefix + "/".join(parts[:depth])
                    found[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    found[path] = {"type": "file", "path": path, "oid": etag(path, content), "size": len(content)}
        if not found:
            return self._error(404, "no such folder", X_Error_Code="EntryNotFound")
        return self._json(list(found.values()))

    def paths_info(self, body, model_id):
        if repository := self._repository(model_id):
            files = repository.commits[-1].files
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            self._json(
                [
                    {"type": "file", "path": path, "oid": etag(path, files[path]), "size": len(files[path])}
                    for path in wanted
                    if path in files
                ]
            )

    def resolve(self, body, model_id, revision, path):
        repository = self._repository(model_id)
        if repository is None:
            return None
        commits = {commit.sha: commit for commit in repository.commits} | {"main": repository.commits[-1]}
        if revision not in commits:
            return self._error(404, f"no revision {revision}", X_Error_Code="RevisionNotFound")
        commit = commits[revision]
        if path not in commit.files:
            return self._error(404, f"no {path}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.sha)
        content = commit.files[path]
        return self._send(content, X_Repo_Commit=commit.sha, ETag=f'"{etag(path, content)}"')


MODEL = "([^/]+/[^/]+)"
DATASETS = r"(/api)?/datasets/([^/]+/)"  # data sets are repositories beside the models, with ids of their own


def _as_model(match: re.Match) -> str:
    return f"{'/api/models' if match[1] else ''}/datasets:{match[2]}"


# "METHOD /path", whether the token is needed, what answers. An LFS upload carries its permission in its address.
ROUTES = [
    (r"GET /api/whoami-v2", True, _Handler.whoami),
    (r"POST /api/repos/create", True, _Handler.create),
    (r"POST /api/validate-yaml", False, _Handler.validate_yaml),
    (rf"POST /api/models/{MODEL}/preupload/main", True, _Handler.preupload),
    (rf"POST /{MODEL}\.git/info/lfs/objects/batch", True, _Handler.lfs_batch),
    (r"PUT /lfs/(\w+)", False, _Handler.lfs_put),
    (rf"POST /api/models/{MODEL}/commit/main", True, _Handler.commit),
    (rf"GET /api/models/{MODEL}(?:/revision/[^/]+)?", False, _Handler.info),
    (rf"GET /api/models/{MODEL}/tree/[^/]+/?(.*)", False, _Handler.tree),
    (rf"POST /api/models/{MODEL}/paths-info/.*", False, _Handler.paths_info),
    (rf"(?:GET|HEAD) /{MODEL}/resolve/([^/]+)/(.+)", False, _Handler.resolve),
]
