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
    """repositories: {"OWNER/NAME" or "datasets/OWNER/NAME": {file name: bytes}}, all of revision main, commit COMMIT.

    cuts: {file name: [bytes after which a connection breaks, one for each request; below zero: after which it falls silent]};
    asked: (method, path, Range) of all requests; silent: seconds before any answer; redirects: whether files lie on another
    host, as large ones do.
    """

    daemon_threads = True
    COMMIT = "c0ffee" + 34 * "0"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.cuts, self.asked, self.silent, self.redirects = {}, {}, [], 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": Hub.COMMIT, **headers}.items():
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
            files = [{"rfilename": file, "size": len(content)} for file, content in hub.repositories.get(name, {}).items()]
            facts = {"id": name.removeprefix("datasets/"), "sha": Hub.COMMIT, "siblings": files, "tags": [], "private": False}
            return self.there(name, revision) and self.answer(200, json.dumps(facts).encode())
        elsewhere, name, revision, file = re.fullmatch(r"(/cdn)?/(.+?)/resolve/([^/]+)/(.+)", path).groups()
        if not self.there(name, revision):
            return
        content = hub.repositories[name].get(file)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        digest = hashlib.sha256(content).hexdigest()
        if hub.redirects and not elsewhere:
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(content)}
            return self.answer(302, Location=f"http://localhost:{hub.server_port}/cdn{self.path}", **linked)
        self.send_file(content, hub.cuts.get(file), "of the other host" if elsewhere else digest)

    do_HEAD = do_GET

    def there(self, name: str, revision: str | None) -> bool:
        if name not in self.server.repositories:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif revision not in (None, "main", Hub.COMMIT):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            return True
        return False

    def send_file(self, content: bytes, cuts: list[int] | None, etag: str) -> None:
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if match else 200)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": Hub.COMMIT, "Content-Length": len(content) - start}
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
        """What upload_folder asks for, the files within the commit."""
        path, body = unquote(self.path), self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(("POST", path, None))
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        name, step = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if step == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer(200, json.dumps({"files": files}).encode())
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        self.server.repositories.setdefault(name, {}).update(files)
        url = f"{self.server.url}/{name}/commit/{Hub.COMMIT}"
        self.answer(200, json.dumps({"commitUrl": url, "commitOid": Hub.COMMIT, "success": True}).encode())
