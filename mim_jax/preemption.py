"""Preemption notices of Google Compute Engine, which stop a run like SIGTERM.

A machine's metadata server announces that the machine will be preempted (30 seconds before), or
terminated for maintenance (up to an hour before, for machines with GPUs). Sources:
https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
https://cloud.google.com/compute/docs/metadata/querying-metadata#waitforchange
"""

import http.client
import os
import signal
import sys
import threading
from pathlib import Path

NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
PRODUCT = Path("/sys/class/dmi/id/product_name")
WAIT = 60  # seconds after which the server answers although nothing has changed
PAUSE = 1.0  # seconds between two requests; doubled after each failure
LONGEST_PAUSE = 60.0


def metadata_host() -> str:
    """Returns the address of the metadata server, "" if the machine is not of Compute Engine.

    No request is made. GCE_METADATA_HOST takes precedence, as in google-auth.
    """
    try:
        is_google = PRODUCT.read_text().strip() in ("Google", "Google Compute Engine")
    except (OSError, ValueError):
        is_google = False
    default = "metadata.google.internal" if is_google else ""
    return os.environ.get("GCE_METADATA_HOST") or default


def watch(ended: threading.Event) -> None:
    """Sends SIGTERM to this process at a notice, until `ended` is set. Returns immediately."""
    if host := metadata_host():
        for key in NOTICES:
            threading.Thread(target=wait_for, args=[host, key, ended], daemon=True).start()


def wait_for(host: str, key: str, ended: threading.Event) -> None:
    """Sends SIGTERM to this process when a key of the metadata has its value in NOTICES.

    A preemption counts even if it was announced before. Maintenance must be announced while this
    function waits: a run that starts within the hour before it may use that time.
    """
    etag, pause, first = "0", PAUSE, True  # the server answers at once if the etag is not its own
    while not ended.is_set():
        try:
            value, etag = request(host, key, etag)
        except (OSError, http.client.HTTPException):
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            if value == NOTICES[key] and (key == "preempted" or not first) and not ended.is_set():
                text = f"warning: Compute Engine announces {key} = {value}: the run stops"
                print(text, file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            pause, first = PAUSE, False
        ended.wait(pause)


def request(host: str, key: str, etag: str) -> tuple[str, str]:
    """Returns the value of a key and its etag, when the etag differs or after WAIT seconds.

    Raises OSError or HTTPException if the server does not answer with a value.
    """
    connection = http.client.HTTPConnection(host, timeout=WAIT + 30)  # ignores proxies
    path = f"/computeMetadata/v1/instance/{key}"
    query = f"wait_for_change=true&timeout_sec={WAIT}&last_etag={etag}"
    try:
        connection.request("GET", f"{path}?{query}", headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise ConnectionError(f"the metadata server answers with status {response.status}")
        return response.read().decode(errors="replace").strip(), response.headers["ETag"] or "0"
    finally:
        connection.close()
