"""A stand-in for the metadata server of Google Compute Engine."""

import http.server
import threading
import urllib.parse


class MetadataServer:
    """A context with a server on this machine, whose address is `host`.

    Args:
        failures: number of requests of each key that are refused with status 503.
        values: {key: value} below computeMetadata/v1/instance/.
    """

    def __init__(self, failures: int = 0, **values: str):
        self.values = {key.replace("_", "-"): value for key, value in values.items()}
        self.etags = dict.fromkeys(self.values, 1)
        self.failures = dict.fromkeys(self.values, failures)
        self.requests: list[str] = []  # keys
        self.changed = threading.Condition()
        state = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                state.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def set(self, key: str, value: str) -> None:
        """Changes a value, which answers the requests that wait."""
        with self.changed:
            self.values[key], self.etags[key] = value, self.etags[key] + 1
            self.changed.notify_all()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        key = url.path.removeprefix("/computeMetadata/v1/instance/")
        with self.changed:
            if request.headers["Metadata-Flavor"] != "Google":
                return request.send_error(403)
            if key not in self.values:
                return request.send_error(404)
            self.requests.append(key)
            self.changed.notify_all()
            if self.failures[key]:
                self.failures[key] -= 1
                return request.send_error(503)
            if query.get("wait_for_change") == "true":
                differs = lambda: query.get("last_etag") != str(self.etags[key])  # noqa: E731
                self.changed.wait_for(differs, timeout=float(query["timeout_sec"]))
            value, etag = self.values[key], self.etags[key]
        request.send_response(200)
        request.send_header("ETag", str(etag))
        request.end_headers()
        request.wfile.write(value.encode())
