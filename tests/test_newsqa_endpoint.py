"""daa newsqa build against an HTTP server of the test: retries, keys, errors, concurrency."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_newsqa import Stub, rows_of, write_articles
from typer.testing import CliRunner

from daa_ext.newsqa import generate
from daa_ext.newsqa.command import newsqa_app
from daa_ext.newsqa.generate import Endpoint, RefusedError, Sampling

Reply = tuple[int, dict[str, str], str]
HELLO = [{"role": "user", "content": "Hello"}]


def chat(content: str | None) -> Reply:
    message = {"role": "assistant", "content": content}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": message}]})


class Server:
    """An endpoint on 127.0.0.1; `reply` answers the n-th request (from 0) and its body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda n, body: chat("Hello")
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                status, headers, text = outer.reply(number, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between tries, which the tests do not sit through."""
    asked: list[float] = []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(generate.time, "sleep", asked.append)
    return asked


def test_what_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret\n")
    endpoint = Endpoint(server.url + "/", "m", Sampling(0.5, 99), "SOME_KEY")
    assert endpoint(HELLO) == "Hello"
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests == [
        {"model": "m", "messages": HELLO, "temperature": 0.5, "max_tokens": 99}
    ]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


def test_what_is_left_to_the_endpoint(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not for everyone")
    assert Endpoint(server.url + "/chat/completions", "m", Sampling())(HELLO) == "Hello"
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests == [{"model": "m", "messages": HELLO}]
    assert "Authorization" not in server.headers[0], "a key goes only where it is named for"


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_error_is_tried_again(server: Server, waits: list[float], status: int) -> None:
    server.reply = lambda n, body: (status, {}, "busy") if n < 3 else chat("At last")
    assert Endpoint(server.url, "m", Sampling())(HELLO) == "At last"
    assert len(server.requests) == 4
    for i, seconds in enumerate(waits):
        assert 0.5 * 2**i <= seconds <= 1.5 * 2**i


def test_the_server_says_how_long_to_wait(server: Server, waits: list[float]) -> None:
    after = iter(["7", "100000", "Wed, 21 Oct 2026 07:28:00 GMT"])
    server.reply = lambda n, body: (
        (429, {"Retry-After": next(after)}, "") if n < 3 else chat("x")
    )  # fmt: skip
    Endpoint(server.url, "m", Sampling())(HELLO)
    assert waits[:2] == [7, 60]
    assert 2 <= waits[2] <= 6


def test_an_error_that_does_not_pass(server: Server) -> None:
    server.reply = lambda n, body: (429, {}, "slow\ndown")
    message = r"no answer in 3 tries \(HTTP 429: slow down\). Try a lower --concurrency.*is kept: r"
    with pytest.raises(ValueError, match=message):
        Endpoint(server.url, "m", Sampling(), retries=2)(HELLO)
    assert len(server.requests) == 3


def test_an_endpoint_that_is_not_there(waits: list[float]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        message = rf"endpoint={url}: no answer in 3 tries \(ConnectError: .*\). Does it run\?"
        with pytest.raises(ValueError, match=message):
            Endpoint(url, "m", Sampling(), retries=2)(HELLO)
    assert len(waits) == 2


def test_an_endpoint_that_hangs(server: Server) -> None:
    release = threading.Event()

    def hang(number: int, body: dict[str, Any]) -> Reply:
        if number == 0:
            release.wait(10)
        return chat("second try")

    server.reply = hang
    started = time.monotonic()
    assert Endpoint(server.url, "m", Sampling(), timeout=0.3)(HELLO) == "second try"
    assert time.monotonic() - started < 5
    release.set()


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (401, '{"error": "bad key"}', r'HTTP 401: \{"error": "bad key"\}. It does not take a req'),
        (403, "", r"HTTP 403: \(empty\). It does not take a request without key: see --api-key"),
        (404, "no model", r"HTTP 404: no model. Is --endpoint the base .* have a model named m\?"),
        (302, "", r"HTTP 302: \(empty\). Is --endpoint the base URL \(most end in /v1\)"),
        (200, "<html>", "no chat completion: <html>. Is this an OpenAI-compatible endpoint"),
        (200, '{"choices": []}', "no chat completion"),
        (200, "[]", "no chat completion"),
    ],
)
def test_errors_that_end_the_build(server: Server, status: int, text: str, message: str) -> None:
    server.reply = lambda n, body: (status, {"Location": "http://127.0.0.1:1/"}, text)
    with pytest.raises(ValueError, match=message):
        Endpoint(server.url, "m", Sampling())(HELLO)
    assert len(server.requests) == 1, "no further try would help"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_errors_that_concern_one_article(server: Server, status: int) -> None:
    server.reply = lambda n, body: (status, {}, "too long")
    with pytest.raises(RefusedError, match=f"HTTP {status}: too long"):
        Endpoint(server.url, "m", Sampling())(HELLO)


def test_no_content_is_an_empty_answer(server: Server) -> None:
    server.reply = lambda n, body: chat(None)
    assert Endpoint(server.url, "m", Sampling())(HELLO) == ""


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:port/v1"])
def test_urls_that_are_none(url: str) -> None:
    message = re.escape(f"endpoint={url}: a URL such as http://localhost:8000/v1 is needed")
    with pytest.raises(ValueError, match=message):
        Endpoint(url, "m", Sampling())


def test_keys_that_are_not_there_or_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    message = "api-key-env=NO_SUCH_KEY: that environment variable is not set"
    with pytest.raises(ValueError, match=message):
        Endpoint("http://x/v1", "m", Sampling(), "NO_SUCH_KEY")
    with pytest.raises(ValueError, match="endpoint: x comes with a password") as caught:
        Endpoint("http://me:s3cret@x/v1", "m", Sampling())
    assert "s3cret" not in str(caught.value)


# whole builds


def command(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(newsqa_app, ["build", *map(str, words)])
    return done.exit_code, " ".join(done.output.split())


def test_a_build_over_http(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    stub, together = Stub(bad=["Headline 4"]), threading.Barrier(3)

    def reply(number: int, body: dict[str, Any]) -> Reply:
        if number < 3:
            together.wait(10)  # breaks, and the build with it, unless three come at a time
        return (503, {}, "") if number == 5 else chat(stub(body["messages"]))

    server.reply = reply
    out = tmp_path / "out"
    code, output = command(
        write_articles(tmp_path / "a.jsonl", 8), "--out", out, "--endpoint", server.url,
        "--model", "m", "--api-key-env", "SOME_KEY", "--concurrency", 3, "--attempts", 2,
    )  # fmt: skip
    assert code == 0, output
    assert "8/8" in output
    assert "rejected articles" in output
    assert len(rows_of(out / "questions.jsonl")) == 21
    assert [row["id"] for row in rows_of(out / "rejected.jsonl")] == ["n4"]
    assert len(server.requests) == 8 + 1 + 1, "one more for the bad answer, one for the 503"
    assert not any("s3cret" in path.read_text() for path in out.iterdir())


def test_a_build_that_the_endpoint_ends_is_continued(server: Server, tmp_path: Path) -> None:
    stub = Stub()
    server.reply = lambda n, body: (401, {}, "quota") if n == 5 else chat(stub(body["messages"]))
    words = (
        write_articles(tmp_path / "a.jsonl", 8), "--out", tmp_path / "out", "--endpoint",
        server.url, "--model", "m", "--concurrency", 2,
    )  # fmt: skip
    code, output = command(*words)
    assert code == 1
    assert "HTTP 401: quota" in output
    assert "run the same command again to continue" in output
    answered = len(rows_of(tmp_path / "out" / "journal.jsonl")) - 1
    assert answered == len(stub.asked) < 8, "what was under way at the failure is kept, too"
    code, output = command(*words)
    assert code == 0, output
    assert sorted(stub.asked) == [f"Headline {i}" for i in range(8)], "each was answered once"
    assert len(rows_of(tmp_path / "out" / "questions.jsonl")) == 24
    code, output = command(*words[:-3], "other", "--endpoint", server.url)
    assert code == 1
    assert "begun with other settings: model=m there, other now" in output
