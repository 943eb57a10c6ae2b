"""A Hugging Face Hub of one process: repositories in memory, over the end points that huggingface_hub and datasets call.

    with hub() as server:
        run(..., env=os.environ | server.environment(cache))
        server.repositories["datasets/user/name"].files

Content of LFS files is kept as any other; a repository's every revision is the newest one.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS = re.compile(r".*\.(parquet|safetensors|bin|png)")
USER = {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Paths that each commit added, in their order."""

    @property
    def sha(self):
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()

    def commit(self, lines, stored):
        added = []
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del self.files[value["path"]]
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = stored[value["oid"]]
            added += [value["path"]] if line["key"] in {"file", "lfsFile"} else []
        self.commits.append(added)


@dataclass
class Server:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By `datasets/user/name` or `models/user/name`."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Content of LFS files by its sha256."""
    requests: list[str] = field(default_factory=list)

    def environment(self, cache):
        """What a process needs to talk to this server alone, with its cache in a folder of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def hub():
    """A server on a free port of this machine."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.hub = Server(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield listener.hub
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing at the terminal."""

    def do_GET(self):
        self.answer(b"")

    do_HEAD = do_GET

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(content).hexdigest()
        self.server.hub.stored[digest] = content
        self.send(200 if self.path.endswith(digest) else 400)

    def answer(self, content):
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        for pattern, answer in ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found:
                return answer(self, content, **found.groupdict())
        return self.send(404)

    def send(self, status, content=b"", headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code):
        self.send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def repository(self, repo):
        """`repo` with or without its kind in front; answers where there is none."""
        name = repo if repo.startswith(("datasets/", "models/")) else f"models/{repo}"
        found = self.server.hub.repositories.get(name)
        if found is None:
            self.refuse("RepoNotFound")
        return found

    def create(self, content):
        wanted = json.loads(content)
        name = f"{wanted['type']}s/{wanted.get('organization') or USER['name']}/{wanted['name']}"
        known = name in self.server.hub.repositories
        if not known:
            self.server.hub.repositories[name] = Repository(wanted.get("visibility") == "private", {".gitattributes": b""})
        self.send(409 if known else 200, {"url": f"{self.server.hub.url}/{name.removeprefix('models/')}", "name": name.split("/", 1)[1]})

    def info(self, _, repo):
        if found := self.repository(repo):
            siblings = [{"rfilename": path} for path in sorted(found.files)]
            self.send(200, {"id": repo.split("/", 1)[1], "private": found.private, "sha": found.sha, "siblings": siblings, "tags": []})

    def preupload(self, content, repo):
        if self.repository(repo):
            files = [
                {"path": file["path"], "uploadMode": "lfs" if LFS.fullmatch(file["path"]) else "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.send(200, {"files": files})

    def batch(self, content, repo):
        wanted = [
            {"oid": file["oid"], "size": file["size"], "actions": {"upload": {"href": f"{self.server.hub.url}/lfs/{file['oid']}"}}}
            for file in json.loads(content)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": wanted})

    def commit(self, content, repo):
        if found := self.repository(repo):
            found.commit([json.loads(line) for line in content.splitlines()], self.server.hub.stored)
            self.send(200, {"success": True, "commitOid": found.sha, "commitUrl": f"{self.server.hub.url}/{repo}/commit/{found.sha}"})

    def tree(self, _, repo, folder=None):
        if not (found := self.repository(repo)):
            return
        inside = [path for path in sorted(found.files) if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            return self.refuse("EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        entries = [file_entry(path, found.files[path]) for path in inside if self.recursive() or path.count("/") == depth]
        folders = {"/".join(path.split("/")[: level + 1]) for path in inside for level in range(depth, path.count("/"))}
        shown = [path for path in sorted(folders) if self.recursive() or path.count("/") == depth]
        self.send(200, [*({"type": "directory", "path": path, "oid": found.sha, "size": 0} for path in shown), *entries])

    def recursive(self):
        return "recursive=true" in urlsplit(self.path).query.lower()

    def paths_info(self, content, repo):
        if found := self.repository(repo):
            wanted = json.loads(content)["paths"]
            folders = {path for path in wanted if any(file.startswith(f"{path}/") for file in found.files)}
            files = [file_entry(path, found.files[path]) for path in wanted if path in found.files]
            self.send(200, [*files, *({"type": "directory", "path": path, "oid": found.sha, "size": 0} for path in folders)])

    def resolve(self, _, repo, path):
        if not (found := self.repository(repo)):
            return
        if path not in found.files:
            return self.refuse("EntryNotFound")
        content = found.files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found.sha, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        return self.send(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def validate_yaml(self, content):
        card = json.loads(content)["content"]
        try:
            valid = isinstance(yaml.safe_load(card.split("---")[1]), dict)
        except (IndexError, yaml.YAMLError):
            valid = False
        self.send(200 if valid else 400, {"errors": [] if valid else [{"message": "no valid YAML between ---"}], "warnings": []})


def file_entry(path, content):
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130} if LFS.fullmatch(path) else None
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], **({"lfs": lfs} if lfs else {})}


REPO = r"(?P<repo>(?:datasets|models)/[^/]+/[^/]+)"
ROUTES = {
    r"/api/whoami-v2": lambda handler, _: handler.send(200, USER),
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate_yaml,
    rf"/api/{REPO}(?:/revision/.+)?": Handler.info,
    rf"/api/{REPO}/preupload/[^/]+": Handler.preupload,
    rf"/api/{REPO}/commit/[^/]+": Handler.commit,
    rf"/api/{REPO}/tree/[^/]+(?:/(?P<folder>.+))?": Handler.tree,
    rf"/api/{REPO}/paths-info/[^/]+": Handler.paths_info,
    rf"/api/{REPO}/refs": lambda handler, _, repo: handler.send(200, {"branches": [], "tags": [], "converts": []}),
    r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)": Handler.resolve,
}


def read_card(server, name):
    """Front matter and text of a repository's card."""
    _, front, text = server.repositories[name].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text
