"""As much of the Hugging Face hub as its clients ask for when they load a data set or a pipeline: a folder's files over HTTP."""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "1" * 40


class Hub(BaseHTTPRequestHandler):  # `root` holds owner/name folders
    def log_message(self, *args): ...

    def reply(self, status: int, body, **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def entry(self, repo, path) -> dict:
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory"}
        return kind | {"path": str(path.relative_to(repo)), "oid": hashlib.sha1(str(path).encode()).hexdigest()}

    def do_GET(self):
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if path[0] == "api":  # api/datasets/owner/name[/revision/R][/tree/R/folder]
            repo = self.root.joinpath(*path[2:4])
            if "tree" in path[4:5]:
                folder, deep = repo.joinpath(*path[6:]), "recursive=true" in self.path.lower()
                return self.reply(200, [self.entry(repo, p) for p in sorted(folder.glob("**/*" if deep else "*"))])
            files = [{"rfilename": str(p.relative_to(repo))} for p in sorted(repo.rglob("*")) if p.is_file()]
            facts = {"id": f"{path[2]}/{path[3]}", "sha": REVISION, "private": False, "tags": []}
            return self.reply(200, facts | {"siblings": files})
        owner, name, _, _, *rest = path[path[0] == "datasets" :]  # [datasets/]owner/name/resolve/R/file
        if not (file := self.root.joinpath(owner, name, *rest)).is_file():
            return self.reply(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=REVISION)
        content = file.read_bytes()
        facts = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": REVISION, "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            return self.reply(200, content, **facts)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.reply(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}", **facts)

    do_HEAD = do_GET

    def do_POST(self):  # api/datasets/owner/name/paths-info/R
        repo = self.root.joinpath(*urlparse(self.path).path.split("/")[3:5])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.reply(200, [self.entry(repo, repo / p) for p in asked if (repo / p).exists()])


@contextlib.contextmanager
def serve(root):
    """The address of a hub with the folders owner/name under root."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (Hub,), {"root": root})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
