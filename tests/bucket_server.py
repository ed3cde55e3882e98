"""A storage emulator on the loopback address, with what gcp-storage-emulator lacks.

    python -m tests.bucket_server FOLDER PORT

It has a bucket named "runs". As Google Cloud Storage does, it honors conditions on the generation
of an object, sends the generation with the contents, and moves objects. It prints its port; 0 lets
the system choose it. Objects are kept in FOLDER.
"""

import sys
import threading
from http import HTTPStatus

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


def download_with_generation(request, response, storage, *args, **kwargs):
    """Sends the contents of an object."""
    names = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = generation_of(storage, *names)
    download(request, response, storage, *args, **kwargs)


def move(request, response, storage, *args, **kwargs):
    """Renames an object."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    request.params["dest_object_id"] = request.params["target"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


objects.insert, objects.delete = conditional(insert), conditional(delete)
objects.download = download_with_generation

from gcp_storage_emulator import server  # noqa: E402 - its table refers to the handlers

MOVE = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<target>[^/]+)$"
server.HANDLERS = ((MOVE, {"POST": move}), *server.HANDLERS)


def main() -> None:
    folder, port = sys.argv[1], int(sys.argv[2])
    emulator = server.create_server(
        "127.0.0.1", port, in_memory=False, default_bucket="runs", data_dir=folder
    )
    emulator.start()
    while not emulator._api._httpd:
        pass
    print(emulator._api._httpd.server_address[1], flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
