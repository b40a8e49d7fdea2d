"""A model hub on the loopback, for tests: what huggingface_hub asks for names, files, parts of files and uploads."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub(ThreadingHTTPServer):
    """repositories: {"OWNER/NAME" or "datasets/OWNER/NAME": {file name: bytes}}, all of revision main, commit COMMIT;
    "OWNER/NAME@TAG" holds the files of a tag, whose commit is commit_of(TAG). objects: {SHA-256: bytes} of large uploads.

    cuts: {file name: [bytes after which a connection breaks, one for each request; below zero: after which it falls silent]};
    asked: (method, path, Range) of all requests; silent: seconds before any answer; redirects: whether files lie on another
    host, as large ones do.
    """

    daemon_threads = True
    COMMIT = "c0ffee" + 34 * "0"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.cuts, self.asked, self.silent, self.redirects = {}, {}, [], 0, False
        self.objects = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def commit_of(revision: str) -> str:
        return Hub.COMMIT if revision in ("main", Hub.COMMIT) else hashlib.sha1(revision.encode()).hexdigest()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version, commit = "HTTP/1.1", Hub.COMMIT

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.asked.append((self.command, path, self.headers.get("Range")))
        time.sleep(hub.silent)
        if match := re.fullmatch(r"/api/(?:models/|(?=datasets/))([^/]+/[^/]+(?:/[^/]+)??)(?:/revision/(.+))?", path):
            name, revision = match.groups()
            if (content := self.files(name, revision or "main")) is None:
                return
            files = [{"rfilename": file, "size": len(data)} for file, data in content.items()]
            facts = {"id": name.removeprefix("datasets/"), "sha": self.commit, "siblings": files, "tags": [], "private": False}
            return self.answer(200, json.dumps(facts).encode())
        elsewhere, name, revision, file = re.fullmatch(r"(/cdn)?/(.+?)/resolve/([^/]+)/(.+)", path).groups()
        if (files := self.files(name, revision)) is None:
            return
        if (content := files.get(file)) is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        if hub.redirects and not elsewhere:
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(content)}
            return self.answer(302, Location=f"http://localhost:{hub.server_port}/cdn{self.path}", **linked)
        self.send_file(content, hub.cuts.get(file), "of the other host" if elsewhere else digest)

    do_HEAD = do_GET

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The repository's files at a branch, tag or commit; None, and the refusal is answered, where there are none."""
        repositories = self.server.repositories
        for tagged, files in repositories.items():
            if tagged.startswith(f"{name}@") and revision in (tag := tagged.partition("@")[2], Hub.commit_of(tag)):
                self.commit = Hub.commit_of(tag)
                return files
        self.commit = Hub.COMMIT
        if name in repositories and revision in ("main", Hub.COMMIT):
            return repositories[name]
        self.answer(404, X_Error_Code="RevisionNotFound" if name in repositories else "RepoNotFound")

    def send_file(self, content: bytes, cuts: list[int] | None, etag: str) -> None:
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if match else 200)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Content-Length": len(content) - start}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cuts:
            self.wfile.write(content[start : start + abs(cuts[0])])
            self.wfile.flush()
            time.sleep(60 * (cuts.pop(0) < 0))
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def do_POST(self):
        """What `hf upload` asks for; *.safetensors are sent by git's protocol of large files, others within the commit."""
        path, body = unquote(self.path), self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(("POST", path, None))
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            name = "/".join(json.loads(body)[part] for part in ("organization", "name"))
            self.server.repositories.setdefault(name, {})
            return self.answer(200, json.dumps({"url": f"{self.server.url}/{name}", "name": name}).encode())
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs"}}}
            objects = [wanted | upload for wanted in json.loads(body)["objects"]]
            return self.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode())
        name, step = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if step == "preupload":
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular"
                     for file in json.loads(body)["files"]}  # fmt: skip
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                self.server.repositories[name][line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
        url = f"{self.server.url}/{name}/commit/{Hub.COMMIT}"
        self.answer(200, json.dumps({"commitUrl": url, "commitOid": Hub.COMMIT, "success": True}).encode())

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)
