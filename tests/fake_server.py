"""A real HTTP server on this machine that fails as it is told, and counts what it would have billed.

`script` holds what happens to each request in the order of arrival; when it is used up, all goes well:
"ok", "garbage", "drop" (hangs up without an answer), "cut" (hangs up in the middle of one), ("slow", seconds),
"hold" (waits for `release`), a status, (status, headers), or ("raw", status, body).
"""

import json
import select
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    def __init__(self, answer, name, script=()):
        """answer(body) -> the body of a good answer; name(body) -> what to count the request under."""
        self.answer, self.name, self.script = answer, name, list(script)
        self.paid, self.seen, self.bodies, self.headers, self.arrivals = Counter(), Counter(), [], [], []
        self.in_flight = self.most_at_once = 0
        self.release, self._lock = threading.Event(), threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def arrive(self, body, headers):
        with self._lock:
            self.arrivals.append(time.monotonic())
            self.bodies.append(body)
            self.headers.append(headers)
            self.seen[self.name(body)] += 1
            self.in_flight += 1
            self.most_at_once = max(self.most_at_once, self.in_flight)
            return self.script.pop(0) if self.script else "ok"

    def leave(self):
        with self._lock:
            self.in_flight -= 1

    def pay(self, body):
        with self._lock:
            self.paid[self.name(body)] += 1


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    gone = False

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.fake.arrive(body, {name.lower(): value for name, value in self.headers.items()})
        try:
            self.act(action, body)
        finally:
            self.leave()
            self.close_connection = True

    def leave(self):
        if not self.gone:
            self.gone = True
            self.fake.leave()

    def act(self, action, body):
        if action == "drop":
            return
        if action == "cut":
            self.send(200, b'{"half', {"Content-Length": "99"})
        elif action == "garbage":
            self.send(200, b"<html>busy</html>")
        elif isinstance(action, int):
            self.act((action, {}), body)
        elif action[0] == "raw":
            self.send(action[1], action[2].encode())
        elif isinstance(action[0], int):
            # the worst of servers: it says the caller's secrets back
            self.send(action[0], json.dumps({"error": {"message": str(dict(self.headers))}}).encode(), action[1])
        else:
            if action == "hold":
                self.fake.release.wait(30)
            elif action != "ok":
                time.sleep(action[1])
            if not self.caller_is_gone():
                self.fake.pay(body)
                self.send(200, json.dumps(self.fake.answer(body)).encode())

    def send(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.leave()  # before the last byte: who has that may come again at once
        self.wfile.write(data)

    def caller_is_gone(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
