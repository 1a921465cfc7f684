"""An S3 server on the loopback interface, and a proxy before it that breaks requests as it is told."""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
READ_TIMEOUT = 0.75  # seconds, where a server is to stall; a busy machine has more elsewhere
STALL = 2 * READ_TIMEOUT


@dataclass
class Storage:
    """A running server; `faults` are the names of FAULTS for the next requests of a method, `always` one for all of them."""

    url: str
    direct: str
    faults: dict[str, deque] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def break_next(self, method: str, *names: str) -> None:
        self.faults[method] = deque(names)

    def next_fault(self, method: str) -> str | None:
        queue = self.faults.get(method)
        return queue.popleft() if queue else self.always.get(method)

    def client(self):
        """A client that goes to the server past the proxy."""
        import boto3

        return boto3.client("s3", endpoint_url=self.direct)

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Sizes of all objects, by key."""
        listed = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {entry["Key"]: entry["Size"] for entry in listed}

    def environment(self, store: str = f"s3://{BUCKET}/test") -> dict[str, str]:
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url, "FISHERFOLD_STORE": store}

    def calm(self) -> None:
        self.faults.clear()
        self.always.clear()
        self.requests.clear()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: Storage
    upstream: tuple[str, int]

    def handle_any(self) -> None:
        self.storage.requests.append((self.command, self.path))
        fault = self.storage.next_fault(self.command)
        if fault is None:
            self.answer(*self.forward())
        else:
            FAULTS[fault](self)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = HTTPConnection(*self.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        answer = response.status, response.getheaders(), response.read()
        upstream.close()
        return answer

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None) -> None:
        """Send a response, or all its headers and only the first `sent` bytes of its body."""
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[:sent])
        self.wfile.flush()

    def reset(self) -> None:
        """Close the connection as a crashed peer does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        pass


def refuse(status: int, code: str) -> Callable[[Proxy], None]:
    def answer(request: Proxy) -> None:
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        request.answer(status, [], b"" if request.command == "HEAD" else body)

    return answer


def reset_halfway(request: Proxy) -> None:
    request.rfile.read(int(request.headers.get("Content-Length") or 0) // 2)
    request.reset()


def truncate(request: Proxy) -> None:
    status, headers, body = request.forward()
    request.answer(status, headers, body, sent=len(body) // 2)
    request.reset()


def shorten(request: Proxy) -> None:
    """Half of the body, with headers that say it is all."""
    status, headers, body = request.forward()
    headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
    request.answer(status, headers, body[: len(body) // 2])


def flip(request: Proxy) -> None:
    status, headers, body = request.forward()
    place = len(body) // 2
    request.answer(status, headers, body[:place] + bytes([body[place] ^ 8]) + body[place + 1 :])


def stall(request: Proxy) -> None:
    answer = request.forward()
    time.sleep(STALL)
    request.answer(*answer)


def lose_answer(request: Proxy) -> None:
    """The request is carried out, and the client never hears of it."""
    request.forward()
    request.reset()


FAULTS: dict[str, Callable[[Proxy], None]] = {
    "500": refuse(500, "InternalError"),
    "503": refuse(503, "SlowDown"),
    "403": refuse(403, "AccessDenied"),
    "reset": reset_halfway,
    "truncate": truncate,
    "shorten": shorten,
    "flip": flip,
    "stall": stall,
    "lose answer": lose_answer,
}


@contextmanager
def running_storage() -> Iterator[Storage]:
    """A server with one empty bucket, behind a proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    upstream = server.get_host_and_port()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnProxy", (Proxy,), {"upstream": upstream}))
    proxy.daemon_threads = True
    proxy.RequestHandlerClass.storage = storage = Storage(
        f"http://127.0.0.1:{proxy.server_port}", f"http://127.0.0.1:{upstream[1]}"
    )
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        storage.client().create_bucket(Bucket=BUCKET)
        try:
            yield storage
        finally:
            proxy.shutdown()
            proxy.server_close()
            server.stop()


def configure(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """Set how botocore asks, from the next request on."""
    from s3fs import S3FileSystem

    from fisherfold.run import objects

    config = {**objects.OPTIONS["s3"]["config_kwargs"], **settings}
    monkeypatch.setitem(objects.OPTIONS["s3"], "config_kwargs", config)
    objects._open_system.cache_clear()
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def server() -> Iterator[Storage]:
    with running_storage() as storage:
        yield storage


@pytest.fixture
def storage(server: Storage, monkeypatch) -> Iterator[Storage]:
    """The server, set as shared storage, its requests counted anew; faults pass quickly."""
    from fisherfold.run import objects, store

    server.calm()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_DELAY", 0.01)
    configure(monkeypatch, retries={"mode": "standard", "total_max_attempts": 1})
    store._open_objects.cache_clear()
    yield server
    client, keys = server.client(), server.objects()
    for key in keys:
        client.delete_object(Bucket=BUCKET, Key=key)
