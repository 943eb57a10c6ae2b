"""A Hugging Face Hub of one process: repositories in memory, over the end points that its clients call, and what can go wrong there.

    with hub() as server:
        run(..., env=os.environ | server.environment(cache))
        server.repositories["datasets/user/name"].files
        server.faults.append(Fault("POST .*/commit/", 503, times=2))

Content of LFS files is kept as any other; a branch has its newest revision only.
"""

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response

LFS = re.compile(r".*\.(parquet|safetensors|bin|png)")
USER = {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz"
FIRST = "f" * 40
"""The commit with which a repository is made."""
EMPTY = {".gitattributes": b""}
KINDS = {"dataset": "datasets", "model": "models", "space": "spaces"}


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": dict(EMPTY)})
    commits: list[list[str]] = field(default_factory=list)
    """Paths that each commit added, in their order."""
    variables: dict[str, str] = field(default_factory=dict)
    """Of a Space."""

    @property
    def files(self):
        return self.branches["main"]

    def sha(self, branch):
        return hashlib.sha1(repr((branch, len(self.commits), sorted(self.branches[branch]))).encode()).hexdigest()

    def branch_of(self, revision):
        """Of a branch's name, or of a commit."""
        return next((name for name in self.branches if revision in {name, self.sha(name)}), None)

    def commit(self, branch, lines, stored):
        files, added = dict(self.branches[branch]), []
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = stored[value["oid"]]
            added += [value["path"]] if line["key"] in {"file", "lfsFile"} else []
        self.branches[branch] = files
        self.commits.append(added)


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path` a pattern finds, so many times, after so many that went well."""

    pattern: str
    what: int | str
    """A status, or `drop` (no answer, and nothing done), `lose` (done, and no answer), `hang` (an answer after `seconds`)."""
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Server:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By `datasets/user/name`, `models/user/name` or `spaces/user/name`."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Content of LFS files by its sha256."""
    requests: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    """Every body, as it came."""
    faults: list[Fault] = field(default_factory=list)

    def environment(self, cache):
        """What a process needs to talk to this server alone, with its cache in a folder of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fault_of(self, request):
        for fault in self.faults:
            if re.search(fault.pattern, request):
                if fault.after:
                    fault.after -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def texts(self):
        """All that was received and kept, decoded as far as it goes."""
        kept = [
            content for repository in self.repositories.values() for files in repository.branches.values() for content in files.values()
        ]
        return "\n".join(content.decode("utf-8", "replace") for content in (*self.received, *kept))


@contextmanager
def hub():
    """A server on a free port of this machine."""
    server = Server()
    listener = uvicorn.Server(uvicorn.Config(Faulty(application(server), server), port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    while not listener.started:
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{listener.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.should_exit = True
        listener.force_exit = True
        thread.join()


class Faulty:
    """ASGI middleware: notes every request, and lets it go wrong where a fault says so."""

    def __init__(self, app, server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        request = f"{scope['method']} {scope['path']}"
        self.server.requests.append(request)
        fault = self.server.fault_of(request)
        if fault is None:
            await self.app(scope, receive, send)
        elif fault.what == "hang":
            await asyncio.sleep(fault.seconds)
            await self.app(scope, receive, send)
        elif fault.what in {"drop", "lose"}:
            if fault.what == "lose":
                await self.app(scope, receive, silent)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100000")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            raise ConnectionError
        else:
            await body_of(receive)
            await Response("{}", fault.what, fault.headers)(scope, receive, send)


async def silent(_):
    """Where an answer gets lost."""


async def body_of(receive):
    while (await receive()).get("more_body"):
        pass


def application(server):
    app = FastAPI()

    def found(kind, repo):
        return server.repositories.get(f"{kind}/{repo}")

    async def body(request):
        content = await request.body()
        server.received.append(content)
        return content

    @app.get("/api/whoami-v2")
    def whoami():
        return USER

    @app.post("/api/validate-yaml")
    async def validate_yaml(request: Request):
        card = json.loads(await body(request))
        errors = card_errors(card["content"], card.get("repoType"))
        return Response(json.dumps({"errors": [{"message": error} for error in errors], "warnings": []}), 400 if errors else 200)

    @app.post("/api/repos/create")
    async def create(request: Request):
        wanted = json.loads(await body(request))
        name = f"{KINDS[wanted['type']]}/{wanted.get('organization') or USER['name']}/{wanted['name']}"
        known = name in server.repositories
        if not known:
            server.repositories[name] = Repository(wanted.get("visibility") == "private")
        told = {"url": f"{server.url}/{name.removeprefix('models/')}", "name": name.split("/", 1)[1]}
        return Response(json.dumps(told), 409 if known else 200)

    @app.get("/api/{kind}/{user}/{name}")
    @app.get("/api/{kind}/{user}/{name}/revision/{revision:path}")
    def info(kind: str, user: str, name: str, revision: str = "main"):
        repository = found(kind, f"{user}/{name}")
        if repository is None:
            return refusal("RepoNotFound")
        branch = repository.branch_of(revision)
        if branch is None:
            return refusal("RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(repository.branches[branch])]
        told = {"id": f"{user}/{name}", "private": repository.private, "sha": repository.sha(branch), "siblings": siblings, "tags": []}
        return told | ({"cardData": card} if (card := front_of(repository.branches[branch].get("README.md", b""))) else {})

    @app.get("/api/{kind}/{user}/{name}/refs")
    def refs(kind: str, user: str, name: str):
        repository = found(kind, f"{user}/{name}")
        if repository is None:
            return refusal("RepoNotFound")
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": repository.sha(branch)} for branch in repository.branches
        ]
        return {"branches": branches, "tags": [], "converts": []}

    @app.post("/api/spaces/{user}/{name}/variables")
    async def variables(user: str, name: str, request: Request):
        repository, wanted = found("spaces", f"{user}/{name}"), json.loads(await body(request))
        if repository is None:
            return refusal("RepoNotFound")
        repository.variables[wanted["key"]] = wanted["value"]
        return {key: {"key": key, "value": value} for key, value in repository.variables.items()}

    @app.get("/api/{kind}/{user}/{name}/commits/{revision:path}")
    def commits(kind: str, user: str, name: str, revision: str):
        dated = {"date": "2026-01-01T00:00:00.000Z", "authors": [], "title": "a commit", "message": ""}
        return [{"id": sha} | dated for sha in (found(kind, f"{user}/{name}").sha(revision), FIRST)]

    @app.post("/api/{kind}/{user}/{name}/branch/{revision:path}")
    async def branch(kind: str, user: str, name: str, revision: str, request: Request):
        repository, asked = found(kind, f"{user}/{name}"), json.loads(await body(request) or "{}")
        if repository is None:
            return refusal("RepoNotFound")
        known = revision in repository.branches
        start = EMPTY if asked.get("startingPoint") == FIRST else repository.files
        repository.branches.setdefault(revision, dict(start))
        return Response("{}", 409 if known else 200)

    @app.post("/api/{kind}/{user}/{name}/preupload/{revision:path}")
    async def preupload(kind: str, user: str, name: str, revision: str, request: Request):
        if found(kind, f"{user}/{name}") is None:
            return refusal("RepoNotFound")
        asked = json.loads(await body(request))["files"]
        mode = {True: "lfs", False: "regular"}
        return {
            "files": [
                {"path": file["path"], "uploadMode": mode[bool(LFS.fullmatch(file["path"]))], "shouldIgnore": False} for file in asked
            ]
        }

    @app.post("/api/{kind}/{user}/{name}/commit/{revision:path}")
    async def commit(kind: str, user: str, name: str, revision: str, request: Request):
        repository = found(kind, f"{user}/{name}")
        if repository is None:
            return refusal("RepoNotFound")
        repository.commit(revision, [json.loads(line) for line in (await body(request)).splitlines()], server.stored)
        sha = repository.sha(revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{server.url}/{user}/{name}/commit/{sha}"}

    @app.get("/api/{kind}/{user}/{name}/tree/{place:path}")
    def tree(kind: str, user: str, name: str, place: str, recursive: bool = False):
        repository = found(kind, f"{user}/{name}")
        if repository is None:
            return refusal("RepoNotFound")
        revision, _, folder = place.partition("/")
        branch = repository.branch_of(revision)
        if branch is None:
            return refusal("RevisionNotFound")
        files = repository.branches[branch]
        inside = [path for path in sorted(files) if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            return refusal("EntryNotFound")
        depth = folder.count("/") + 1 if folder else 0
        folders = {"/".join(path.split("/")[: level + 1]) for path in inside for level in range(depth, path.count("/"))}
        shown = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries = [*shown, *(file_entry(path, files[path]) for path in inside)]
        return [entry for entry in entries if recursive or entry["path"].count("/") == depth]

    @app.post("/api/{kind}/{user}/{name}/paths-info/{revision:path}")
    async def paths_info(kind: str, user: str, name: str, revision: str, request: Request):
        repository = found(kind, f"{user}/{name}")
        if repository is None:
            return refusal("RepoNotFound")
        files, wanted = repository.branches[repository.branch_of(revision)], json.loads(await body(request))["paths"]
        folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in files)]
        entries = [file_entry(path, files[path]) for path in wanted if path in files]
        return [*entries, *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders)]

    @app.post("/{repo:path}.git/info/lfs/objects/batch")
    async def batch(repo: str, request: Request):
        asked = json.loads(await body(request))["objects"]
        upload = {file["oid"]: {"upload": {"href": f"{server.url}/lfs/{file['oid']}?X-Amz-Signature=signed"}} for file in asked}
        missing = [{"oid": file["oid"], "size": file["size"]} | {"actions": upload[file["oid"]]} for file in asked]
        known = [{"oid": file["oid"], "size": file["size"]} for file in asked]
        objects = [there if there["oid"] in server.stored else wanted for there, wanted in zip(known, missing, strict=True)]
        return Response(json.dumps({"transfer": "basic", "objects": objects}), media_type="application/json")

    @app.put("/lfs/{oid}")
    async def put(oid: str, request: Request):
        content = await request.body()
        server.received.append(content)
        whole = hashlib.sha256(content).hexdigest() == oid
        if whole:
            server.stored[oid] = content
        return Response("", 200 if whole else 400)

    @app.api_route("/{place:path}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(place: str, revision: str, path: str, request: Request):
        kind, repo = place.split("/", 1) if place.startswith(("datasets/", "spaces/")) else ("models", place)
        repository = found(kind, repo)
        if repository is None:
            return refusal("RepoNotFound")
        branch = repository.branch_of(revision)
        if branch is None:
            return refusal("RevisionNotFound")
        if path not in repository.branches[branch]:
            return refusal("EntryNotFound", {"X-Repo-Commit": repository.sha(branch)})
        content = repository.branches[branch][path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repository.sha(branch), "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if request.method == "HEAD" or asked is None:
            return Response(content, headers=headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        return Response(content[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    return app


def refusal(code, headers=None):
    return Response(json.dumps({"error": code}), 404, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))


def file_entry(path, content):
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130} if LFS.fullmatch(path) else None
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], **({"lfs": lfs} if lfs else {})}


def front_of(card):
    """The card's metadata."""
    parts = card.decode().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 else None


def card_errors(card, kind):
    """What the Hub's validation has against a card."""
    try:
        front = front_of(card.encode())
    except yaml.YAMLError as error:
        return [f"no valid YAML between ---: {error}"]
    if not isinstance(front, dict):
        return ["no YAML between ---"]
    wanted = {"tags": list, "license": str, "library_name": str, "pipeline_tag": str, "base_model": str, "model-index": list}
    errors = [f"{name} must be a {of.__name__}" for name, of in wanted.items() if name in front and not isinstance(front[name], of)]
    if front.get("license") == "other" and kind == "model" and "license_name" not in front:
        errors.append("license other needs a license_name")
    if re.search(r"[^a-z0-9-.]", front.get("license_name", "")):
        errors.append("license_name is in lower case, with - . only")
    for model in front.get("model-index", []):
        for result in model["results"]:
            missing = {"task", "dataset", "metrics"} - result.keys()
            if missing or not {"name", "type"} <= result["dataset"].keys() or "type" not in result["task"]:
                errors.append(f"model-index: {sorted(missing) or 'name and type of the data set, type of the task'} missing")
            errors += [f"model-index: {metric} has no value" for metric in result["metrics"] if not {"type", "value"} <= metric.keys()]
    return errors


def read_card(server, name):
    """Front matter and text of a repository's card."""
    card = server.repositories[name].files["README.md"]
    return front_of(card), card.decode().split("---\n", 2)[2]
