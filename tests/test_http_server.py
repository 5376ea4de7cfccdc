"""The server under the app: what one client does must not reach the others."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from structlog.testing import capture_logs

from serving.api.server import uvicorn_config
from serving.config import EdgeSettings
from tests.fakes import FakeEngine, repeat_forever
from tests.http_case import Case, make_case, served, wait_until


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path, header_timeout_s=0.3)


def connect(url: str) -> socket.socket:
    """A connection on which waiting fails after a while: far beyond every limit that the cases set."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def until_closed(peer: socket.socket) -> bytes:
    """What still comes until the server closes. Raises TimeoutError when it never does."""
    received = b""
    try:
        while chunk := peer.recv(65536):
            received += chunk
    except ConnectionError:
        pass
    return received


def test_F16_a_huge_header_is_cut_and_harms_no_one_else(case: Case) -> None:
    """Scale: 60 MB from one client while another asks 30 times."""
    with served(case) as url, httpx.Client(base_url=url, timeout=30) as good, connect(url) as bad:
        sent = 0

        def flood() -> None:
            nonlocal sent
            try:
                bad.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Big: ")
                for _ in range(60 * 16):
                    bad.sendall(b"x" * 65536)
                    sent += 65536
            except OSError:
                pass

        thread = threading.Thread(target=flood)
        thread.start()
        assert {good.get("/version").status_code for _ in range(30)} == {200}
        thread.join(30)
        answer = until_closed(bad)
    assert sent < 60 * 1 << 20, "the server read it all"
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"431")


def test_a_header_that_never_ends_is_cut(case: Case) -> None:
    with served(case) as url, connect(url) as peer:
        peer.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Slow")
        assert until_closed(peer) == b""


def test_a_connection_that_is_at_work_outlives_the_header_deadline(tmp_path: Path) -> None:
    case = make_case(tmp_path, FakeEngine(script=repeat_forever, pause_s=0.02), header_timeout_s=0.2)
    with served(case) as url:
        body = {"model": "base", "prompt": "x", "max_tokens": 25, "stream": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_body_that_never_ends_is_cut(tmp_path: Path) -> None:
    case = make_case(tmp_path, body_timeout_s=0.3)
    with served(case) as url, connect(url) as peer:
        peer.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\nConnection: close\r\n\r\n{"
        )
        answer = until_closed(peer)
    assert answer.split(b" ")[1] == b"408"


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\r\nversion HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_closed(case: Case, raw: bytes) -> None:
    with served(case) as url, connect(url) as peer, capture_logs() as logged:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        answer = until_closed(peer)
        assert answer == b"" or answer.split(b" ")[1][:1] == b"4"
        assert httpx.get(f"{url}/version", timeout=30).status_code == 200
    assert "request_failed" not in {line["event"] for line in logged}, "a client's bytes made a fault of ours"


def test_a_reader_that_stops_reading_is_let_go_when_it_leaves(tmp_path: Path) -> None:
    case = make_case(tmp_path, FakeEngine(script=repeat_forever, max_model_len=100_000))
    with served(case) as url:
        with connect(url) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            body = b'{"model":"base","prompt":"x","max_tokens":50000,"stream":true}'
            peer.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: bool(case.engine.submissions))
            wait_until(lambda: case.engine.submissions[0].sent > 1000)
        wait_until(lambda: case.engine.running == 0 and case.gateway.admission.inflight == 0)


def test_every_limit_reaches_the_server() -> None:
    settings = EdgeSettings(max_header_bytes=2048, max_connections=7, keep_alive_s=3, drain_s=4)
    config = uvicorn_config(lambda: None, settings)  # type: ignore[arg-type]
    assert config.h11_max_incomplete_event_size == 2048
    assert (config.limit_concurrency, config.timeout_keep_alive, config.timeout_graceful_shutdown) == (7, 3, 4)
    assert (config.proxy_headers, config.server_header, config.ws) == (False, False, "none")
