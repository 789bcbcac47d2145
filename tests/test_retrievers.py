"""BM25 over a corpus file, and the client of Search-R1's protocol against a real server on loopback."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from treegrpo.envs.retrievers import BM25Retriever, Document, HTTPRetriever, RetrieverError, make_retriever

pytest.importorskip("bm25s")

TEXTS = [
    "Ada Lovelace wrote the first program for the Analytical Engine",
    "Charles Babbage designed the Analytical Engine",
    "Ada is a town in Ohio",
    "Zürich liegt an der Limmat 7",
    "Ada is a town in Ohio",
]


def write_corpus(path: Path, texts: list[str] = TEXTS) -> Path:
    lines = "".join(json.dumps({"id": f"d{i}", "contents": text}) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture
def bm25(tmp_path: Path) -> BM25Retriever:
    return BM25Retriever(write_corpus(tmp_path / "corpus.jsonl"), cache_dir=tmp_path / "cache")


def ids(documents: list[Document]) -> list[str]:
    return [document.id for document in documents]


def test_finds_the_documents_that_share_words(bm25: BM25Retriever) -> None:
    hits = bm25.search("Who designed the analytical engine?")
    assert ids(hits) == ["d1", "d0"]
    assert hits[0].text == TEXTS[1] and hits[0].score > hits[1].score > 0
    assert ids(bm25.search("ZÜRICH")) == ["d3"] and bm25.search("7")[0].text == TEXTS[3]
    assert len(bm25) == 5
    assert bm25.search_batch(["Babbage", "Ohio"]) == [bm25.search("Babbage"), bm25.search("Ohio")]


def test_scores_are_those_of_lucenes_formula(bm25: BM25Retriever) -> None:
    import math

    lengths = [7, 5, 3, 6, 3]  # words that are no stop words; "is a in for the" are, "an der" is not: an is
    lengths[3] = 5
    for word, index in (("babbage", 1), ("limmat", 3)):
        idf = math.log(1 + (5 - 1 + 0.5) / (1 + 0.5))
        weight = 1 / (1 + 1.5 * (1 - 0.75 + 0.75 * lengths[index] / (sum(lengths) / 5)))
        assert bm25.search(word)[0].score == pytest.approx(idf * weight, rel=1e-5)


def test_a_repeated_word_counts_again_but_is_looked_up_once(bm25: BM25Retriever, monkeypatch) -> None:
    ada, engine = ({hit.id: hit.score for hit in bm25.search(word, 5)} for word in ("ada", "engine"))
    looked_up, look_up = [], bm25._index.get_scores_from_ids
    monkeypatch.setattr(bm25._index, "get_scores_from_ids", lambda words: looked_up.extend(words) or look_up(words))
    hits = bm25.search("ada " * 500 + "engine", 5)
    assert len(looked_up) == 2
    want = {name: 500 * ada.get(name, 0) + engine.get(name, 0) for name in ada.keys() | engine.keys()}
    assert {hit.id: hit.score for hit in hits} == pytest.approx(want, rel=1e-5)


def test_ties_keep_the_order_of_the_corpus(tmp_path: Path) -> None:
    bm25 = BM25Retriever(write_corpus(tmp_path / "c.jsonl", ["same words"] * 50 + ["else"]), cache_dir=tmp_path)
    for topk in (1, 7, 50, 51, 200):
        assert ids(bm25.search("same", topk)) == [f"d{i}" for i in range(min(topk, 50))]
    bm25 = BM25Retriever(write_corpus(tmp_path / "d.jsonl", ["same words", "same"] * 200), cache_dir=tmp_path)
    assert ids(bm25.search("same", 400)) == [f"d{i}" for start in (1, 0) for i in range(start, 400, 2)]


@pytest.mark.parametrize("query", ["", "   ", "?!", "the of a", "xylophone quux"])
def test_a_query_without_known_words_finds_nothing(bm25: BM25Retriever, query: str) -> None:
    assert bm25.search(query) == []


def test_compressed_corpus_gives_the_same(tmp_path: Path, bm25: BM25Retriever) -> None:
    other = BM25Retriever(write_corpus(tmp_path / "c.jsonl.gz"), cache_dir=tmp_path / "cache")
    assert other.search("Ada engine") == bm25.search("Ada engine")
    assert other.index_dir != bm25.index_dir


def test_index_is_built_once_and_follows_the_corpus(tmp_path: Path, bm25: BM25Retriever, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BM25Retriever, "_build", lambda self: pytest.fail("built again"))
        again = BM25Retriever(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache")
        assert again.search("Ada engine") == bm25.search("Ada engine")
    write_corpus(tmp_path / "corpus.jsonl", ["Ada only"])
    assert ids(BM25Retriever(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache").search("Ada")) == ["d0"]
    assert len(list((tmp_path / "cache").iterdir())) == 2  # no temporary folder stays
    assert BM25Retriever(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache", b=0.1).index_dir != again.index_dir


def test_default_cache_follows_xdg(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    bm25 = make_retriever(f"bm25:{write_corpus(tmp_path / 'c.jsonl')}", topk=1)
    assert bm25.index_dir.parent == tmp_path / "xdg" / "treegrpo" / "bm25"
    assert len(bm25.search("Ada")) == 1


@pytest.mark.parametrize("name", ["data.csc.index.npy", "texts.bin", "vocab.index.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_index_is_built_again(tmp_path: Path, bm25: BM25Retriever, caplog, name: str, damage: str) -> None:
    expected = bm25.search("Ada engine")
    file = bm25.index_dir / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        again = BM25Retriever(tmp_path / "corpus.jsonl", cache_dir=tmp_path / "cache")
    assert again.search("Ada engine") == expected
    assert len(caplog.records) == 1 and "building it again" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [again.index_dir.name]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl")
    monkeypatch.setattr("treegrpo.envs.retrievers.np.save", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BM25Retriever(corpus, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_copies_are_the_same_object_and_threads_share_it(bm25: BM25Retriever) -> None:
    assert copy.deepcopy({"env": bm25})["env"] is bm25
    expected = bm25.search("Ada engine")
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.extend(bm25.search("Ada engine") == expected for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        ("[1]", "line 2: a JSON list"),
        ('{"contents": "x"}', "line 2: id is None"),
        ('{"id": 1}', "line 2: contents is None"),
        ('{"id": 1, "contents": "  "}', "line 2: contents is '  '"),
        ('{"id": 1, "contents": "\\ud800"}', "line 2: contents holds half of a surrogate"),
    ],
)
def test_bad_lines_of_a_corpus_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": 0, "contents": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        BM25Retriever(path, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_bad_corpora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no document with a word"):
        BM25Retriever(write_corpus(tmp_path / "e.jsonl", []), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="is not a file"):
        BM25Retriever(tmp_path / "none.jsonl", cache_dir=tmp_path / "cache")
    whole = write_corpus(tmp_path / "c.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz, line .* the compressed data is damaged"):
        BM25Retriever(tmp_path / "cut.jsonl.gz", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="topk=0"):
        BM25Retriever(tmp_path / "c.jsonl.gz", topk=0, cache_dir=tmp_path / "cache")


@contextlib.contextmanager
def serving(answer) -> Iterator[str]:
    """A server on loopback; `answer(handler, request)` writes the reply."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self, json.loads(body))

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/retrieve"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def serve(bm25: BM25Retriever, handler: BaseHTTPRequestHandler, request: dict) -> None:
    """Search-R1's retrieval server over a BM25 index."""
    if handler.path != "/retrieve" or request["return_scores"] is not True:
        return reply(handler, b"", 404)
    rows = [
        [{"document": {"id": hit.id, "contents": hit.text}, "score": hit.score} for hit in hits]
        for hits in bm25.search_batch(request["queries"], request["topk"])
    ]
    return reply(handler, json.dumps({"result": rows}).encode())


def test_a_server_answers_as_the_index_behind_it(bm25: BM25Retriever) -> None:
    with serving(lambda handler, request: serve(bm25, handler, request)) as url:
        client = make_retriever(url, topk=2)
        assert client.search("Ada engine") == bm25.search("Ada engine", 2)
        assert client.search("Ada engine", 1) == bm25.search("Ada engine", 1)
        queries = ["Babbage", "xylophone", "Zürich <b>"]
        assert client.search_batch(queries) == bm25.search_batch(queries, 2)
        assert client.search_batch([]) == []
        assert HTTPRetriever(url.removesuffix("/retrieve")).search("Ohio") == bm25.search("Ohio")
        assert copy.deepcopy([client])[0] is client
        with pytest.raises(RetrieverError, match=r"refused the request .status 404"):
            HTTPRetriever(url + "/else").search("Ada")


def test_a_failing_server_is_asked_again(bm25: BM25Retriever) -> None:
    calls = []

    def answer(handler, request) -> None:
        calls.append(request)
        if len(calls) < 3:
            return reply(handler, b"busy", 503)
        return serve(bm25, handler, request)

    with serving(answer) as url:
        assert HTTPRetriever(url, backoff=0.01).search("Ohio") == bm25.search("Ohio")
        assert len(calls) == 3
        calls.clear()
        with pytest.raises(RetrieverError, match=r"no answer in 2 tries .*503"):
            HTTPRetriever(url, backoff=0.01, max_retries=1).search("Ohio")
        assert len(calls) == 2


@pytest.mark.parametrize("line", [b"HTTP/1.1 404 \x1b[2Jgone\r\n\r\n", b"\x1b[2Jgone\r\n"])
def test_what_a_server_says_gives_a_terminal_no_orders(line: bytes) -> None:
    answer = lambda handler, request: handler.wfile.write(line)  # noqa: E731
    with serving(answer) as url, pytest.raises(RetrieverError, match=r"\\x1b\[2Jgone") as caught:
        HTTPRetriever(url, max_retries=0).search("x")
    assert "\x1b" not in str(caught.value)


def test_an_unreachable_server_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/retrieve"
    with pytest.raises(RetrieverError, match=f"{url} gave no answer in 2 tries.*start the retrieval server"):
        HTTPRetriever(url, max_retries=1, backoff=0.01).search("x")


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("begin", [None, HEAD + b"\r\n", b"", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_slow_server_is_given_up(begin: bytes | None) -> None:
    """It is silent, or drips: its answer, its status line, the length of a chunk."""

    def answer(handler, request) -> None:
        if begin is None:
            time.sleep(0.6)
            return
        handler.wfile.write(begin)
        for _ in range(40):
            handler.wfile.write(b"0")
            handler.wfile.flush()
            time.sleep(0.05)

    with serving(answer) as url:
        start = time.monotonic()
        with pytest.raises(RetrieverError, match=r"no answer in 2 tries of 0.2 s"):
            HTTPRetriever(url, timeout=0.2, max_retries=1, backoff=0.01).search("x")
        assert time.monotonic() - start < 1.5


GOOD = {"document": {"contents": "x"}, "score": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[]", "not a list with one entry"),
        ({"result": []}, "not a list with one entry"),
        ({"result": [[], []]}, "not a list with one entry"),
        ({"result": ["x"]}, r"result\[0\] is not a list"),
        ({"result": [[GOOD, {"document": {"contents": 3}, "score": 1}]]}, r"result\[0\]\[1\] has no text"),
        ({"result": [["x"]]}, r"result\[0\]\[0\] has no text"),
        ({"result": [[{**GOOD, "score": None}]]}, "has the score None"),
        ({"result": [[{**GOOD, "score": 10**400}]]}, "has the score 1000"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": NaN}]]}', "has the score nan"),
        ({"result": [[{"document": {"contents": "x" * 5000}, "score": 1}]]}, "more than 4000 bytes"),
    ],
)
def test_garbage_is_refused_at_once(body, message: str) -> None:
    calls = []

    def answer(handler, request) -> None:
        calls.append(1)
        reply(handler, body if isinstance(body, bytes) else json.dumps(body).encode())

    with serving(answer) as url, pytest.raises(RetrieverError, match=message):
        HTTPRetriever(url, max_bytes=4000).search("x")
    assert calls == [1]


def test_half_an_answer_is_asked_for_again() -> None:
    def answer(handler, request) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"result": [[]]}')

    with serving(answer) as url, pytest.raises(RetrieverError, match="no answer in 2 tries"):
        HTTPRetriever(url, max_retries=1, backoff=0.01).search("x")


@pytest.mark.parametrize("status", [302, 307])
def test_redirects_are_not_followed(status: int) -> None:
    def answer(handler, request) -> None:
        handler.send_response(status)
        handler.send_header("Location", "/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with serving(answer) as url, pytest.raises(RetrieverError, match=f"status {status}"):
        HTTPRetriever(url).search("x")


def test_more_than_asked_for_is_cut() -> None:
    with serving(lambda h, request: reply(h, json.dumps({"result": [[GOOD] * 9]}).encode())) as url:
        assert HTTPRetriever(url, topk=2).search("x") == [Document("", "x", 1.0)] * 2


@pytest.mark.parametrize("spec", ["ftp://x/y", "file:///etc/passwd", "corpus.jsonl", "bm25", "http://"])
def test_other_addresses_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="give"):
        make_retriever(spec)
