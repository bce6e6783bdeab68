"""A page of this machine: one HTML file and one function that answers its questions. Nobody else is served.

Only the address 127.0.0.1 is bound. A request must name this host, so that no other site can reach the page
through a name of its own (DNS rebinding). A question must be JSON, which a page of another site cannot send
unasked.
"""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MOST_BYTES = 1_000_000  # of a question


def server(page, answer, port):
    """A server at 127.0.0.1 for `serve_forever`. GET / gives the HTML file `page`. POST / with a JSON
    dictionary gives answer(dictionary) as JSON, one question at a time: those of several tabs wait their
    turn. A ValueError in it becomes {"error": line}. port: 0 takes a free one. ValueError if it is taken."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds, for a request that never ends

        def do_GET(self):
            if self.knows_us():
                found = self.path == "/"
                body = Path(page).read_bytes() if found else b"there is only /"
                self.reply(200 if found else 404, "text/html; charset=utf-8", body)

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not self.knows_us():
                return
            if self.headers.get_content_type() != "application/json" or not length.isdecimal():
                return self.reply(415, "text/plain", b"a question is JSON")
            if len(length) > 7 or int(length) > MOST_BYTES:
                return self.reply(413, "text/plain", b"this question is too long")
            body = self.rfile.read(int(length))
            try:
                with turn:
                    status, found = 200, answer(asked(body))
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: torch's, such as no memory
                status, found = 400, {"error": " ".join(str(error).split())[:500]}
            self.reply(status, "application/json", json.dumps(found).encode())

        def knows_us(self):
            """Whether the request names this host; if not, it is refused."""
            own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
            if self.headers.get("Host") in own:
                return True
            self.reply(403, "text/plain", f"this page is at http://{min(own)}".encode())
            return False

        def reply(self, status, kind, body):
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                pass  # the tab was closed

        def log_message(self, *parts):
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; try another") from None


def asked(body):
    """The dictionary of a question. ValueError if it is none."""
    try:
        question = json.loads(body)
    except (ValueError, RecursionError):
        question = None
    if not isinstance(question, dict):
        raise ValueError("a question is a JSON dictionary")
    return question


def serve(page, answer, port):
    """Serves until Ctrl-C, and prints where."""
    with server(page, answer, port) as running:
        print(f"open http://127.0.0.1:{running.server_port} in a browser; Ctrl-C ends it", flush=True)
        running.serve_forever()
