"""A storage emulator on the loopback address, with what gcp-storage-emulator lacks.

    python -m tests.bucket_server PORT [SECONDS]

It has a bucket named "runs". As Google Cloud Storage does, it honors conditions on the generation
of an object, sends the generation with the contents, serves the last bytes of an object, and moves
objects. It prints its port; 0 lets the system choose it. Objects are kept in memory. With SECONDS,
every response is delayed by so much, and several requests are answered at a time.
"""

import sys
import threading
import time
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

insert, delete, download = objects.insert, objects.delete, objects.download


def generation_of(storage, bucket: str, name: str) -> str:
    """Returns the generation of an object, "0" if there is none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def conditional(handler):
    """Returns a handler that fails if the object does not have the expected generation."""

    def handle(request, response, storage, *args, **kwargs):
        expected = request.query.get("ifGenerationMatch")
        if expected:
            name = request.params.get("object_id") or request.query.get("name", [None])[0]
            name = name or request.data["meta"]["name"]
            if expected[0] != generation_of(storage, request.params["bucket_name"], name):
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        handler(request, response, storage, *args, **kwargs)

    return handle


def download_range(request, response, storage, *args, **kwargs):
    """Sends the contents of an object, or its last bytes."""
    names = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = generation_of(storage, *names)
    last = request.get_header("Range", "")
    if last.startswith("bytes=-"):
        size = int(storage.get_file_obj(*names)["size"])
        first = max(0, size - int(last.removeprefix("bytes=-")))
        request._request_handler.headers.replace_header("Range", f"bytes={first}-")
    download(request, response, storage, *args, **kwargs)


def move(request, response, storage, *args, **kwargs):
    """Renames an object."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    request.params["dest_object_id"] = request.params["target"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


objects.insert, objects.delete = conditional(insert), conditional(delete)
objects.download = download_range

from gcp_storage_emulator import server  # noqa: E402 - its table refers to the handlers

MOVE = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<target>[^/]+)$"
server.HANDLERS = ((MOVE, {"POST": move}), *server.HANDLERS)


class DelayedServer(ThreadingHTTPServer):
    """A server with a latency."""

    latency = 0.0

    def process_request_thread(self, request, client_address):
        time.sleep(self.latency)
        super().process_request_thread(request, client_address)


def main() -> None:
    port = int(sys.argv[1])
    if len(sys.argv) > 2:
        DelayedServer.latency = float(sys.argv[2])
        server.server.HTTPServer = DelayedServer
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="runs")
    emulator.start()
    print(emulator._api._httpd.server_address[1], flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
