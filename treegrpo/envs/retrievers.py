"""What a search tool searches in: a local BM25 index, or a retrieval server that speaks Search-R1's protocol."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from treegrpo.files import cache_home, check_utf8, read_lines
from treegrpo.shown import shown

logger = logging.getLogger(__name__)

WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Document:
    """One hit. `Document("17", "Ada Lovelace\\nA mathematician ...", 8.25)`."""

    id: str
    """The corpus' own; "" where a server sends none."""
    text: str
    score: float
    """Higher is better."""


class RetrieverError(RuntimeError):
    """A search could not be done. Says why and the cure."""


class Retriever(Protocol):
    """What environments need. Shared by all of them and called from many threads at once."""

    topk: int

    def search(self, query: str, topk: int | None = None) -> list[Document]:
        """At most `topk` (None: self.topk) documents, best first. RetrieverError where it cannot be done."""

    def search_batch(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """One list per query."""


def make_retriever(spec: str, topk: int = 3, **options: Any) -> BM25Retriever | HTTPRetriever:
    """`bm25:corpus.jsonl` or `http://host:port/retrieve`; options are the constructor's. ValueError on another form."""
    if spec.startswith("bm25:"):
        return BM25Retriever(Path(spec.removeprefix("bm25:")), topk=topk, **options)
    if spec.startswith(("http://", "https://")):
        return HTTPRetriever(spec, topk=topk, **options)
    raise ValueError(f"retriever {spec!r}: give bm25:PATH of a JSONL corpus, or the http:// address of a server")


def _check_topk(topk: int) -> int:
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk={topk!r}: give a whole number, at least 1")
    return topk


class BM25Retriever:
    """BM25 (Lucene's variant, by bm25s) over a JSONL corpus of `{"id": ..., "contents": ...}` lines, also `.gz`.

    Words are runs of letters and digits, lower case, English stop words left out. A document without a word of the
    query is never returned, so a query that is empty or holds only unknown words gives an empty list. Equal scores are
    ordered as in the corpus: the same corpus and query give the same answer.

    The index is built once and kept under `cache_dir` (default: `treegrpo/bm25` in $XDG_CACHE_HOME or ~/.cache), in a
    folder named after the bytes of the corpus and the settings; it is memory-mapped, texts included, and its files'
    checksums are compared when it is opened: a damaged one is built anew. Searching only reads, so threads may share
    one, and copying gives the same object.

    Raises ValueError naming the file and line where the corpus is not as described; ImportError without bm25s.
    """

    def __init__(
        self,
        corpus: str | os.PathLike,
        *,
        topk: int = 3,
        cache_dir: str | os.PathLike | None = None,
        k1: float = 1.5,
        b: float = 0.75,
    ) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("a bm25: retriever needs bm25s: pip install 'treegrpo[search]'") from error
        self.topk = _check_topk(topk)
        self.corpus = Path(corpus)
        if not self.corpus.is_file():
            raise ValueError(f"corpus {self.corpus} is not a file: give a JSONL file with id and contents")
        self._settings = {"layout": 1, "bm25s": bm25s.__version__, "method": "lucene", "k1": k1, "b": b}
        self._stopwords = frozenset(bm25s.stopwords.STOPWORDS_EN)
        self._settings["words"] = hashlib.sha256(
            "\n".join([WORD.pattern, *sorted(self._stopwords)]).encode()
        ).hexdigest()
        root = Path(cache_dir) if cache_dir is not None else cache_home() / "bm25"
        self.index_dir = root / self._key()
        if self.index_dir.exists() and (damage := _damage(self.index_dir)):
            logger.warning("BM25 index %s is damaged (%s): building it again", self.index_dir, damage)
            _discard(self.index_dir)
        if not self.index_dir.exists():
            self._build()
        self._open()

    def __deepcopy__(self, memo: dict) -> BM25Retriever:
        return self

    def __len__(self) -> int:
        return len(self._text_ends)

    def search(self, query: str, topk: int | None = None) -> list[Document]:
        """See the class. Scores are BM25's, float."""
        topk = self.topk if topk is None else _check_topk(topk)
        vocabulary = self._index.vocab_dict
        counts = Counter(vocabulary[word] for word in self._words(query) if word in vocabulary)
        if not counts:
            return []
        # a word walks its documents once, however often a policy that repeats itself writes it
        times: dict[int, list[int]] = {}
        for word, count in counts.items():
            times.setdefault(count, []).append(word)
        scores = sum(count * self._index.get_scores_from_ids(words) for count, words in times.items())
        least = np.partition(scores, -topk)[-topk] if topk < scores.size else 0
        hits = np.flatnonzero((scores >= least) & (scores > 0))
        hits = hits[np.argsort(-scores[hits], kind="stable")][:topk]
        return [Document(*self._document(int(i)), float(scores[i])) for i in hits]

    def search_batch(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """One list per query, each as `search` gives it."""
        return [self.search(query, topk) for query in queries]

    def _words(self, text: str) -> list[str]:
        return [word for word in WORD.findall(text.lower()) if word not in self._stopwords]

    def _key(self) -> str:
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        digest.update(self.corpus.suffix.encode())
        with open(self.corpus, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()[:32]

    def _build(self) -> None:
        import bm25s

        self.index_dir.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{self.index_dir.name}.", dir=self.index_dir.parent))
        try:
            vocabulary: dict[str, int] = {}
            tokens, names, ends = [], [], []
            with open(folder / "texts.bin", "wb") as texts:
                for name, text in read_corpus(self.corpus):
                    names.append(name)
                    texts.write(text.encode())
                    ends.append(texts.tell())
                    tokens.append([vocabulary.setdefault(word, len(vocabulary)) for word in self._words(text)])
            if not vocabulary:
                raise ValueError(f"{self.corpus} has no document with a word to search for: give a corpus with text")
            index = bm25s.BM25(k1=self._settings["k1"], b=self._settings["b"], method="lucene", backend="numpy")
            index.index((tokens, vocabulary), show_progress=False, create_empty_token=False)
            index.save(folder, show_progress=False)
            np.save(folder / "text_ends.npy", np.array(ends, np.int64))
            encoded = [name.encode() for name in names]
            (folder / "ids.bin").write_bytes(b"".join(encoded))
            np.save(folder / "id_ends.npy", np.cumsum([len(name) for name in encoded], dtype=np.int64))
            sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
            (folder / "checksums.json").write_text(json.dumps(sums))
            try:
                os.rename(folder, self.index_dir)
            except OSError:
                # another process was first
                if not self.index_dir.exists() or _damage(self.index_dir):
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _open(self) -> None:
        import bm25s

        folder = self.index_dir
        self._index = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, show_progress=False)
        self._text_ends = np.load(folder / "text_ends.npy", mmap_mode="r", allow_pickle=False)
        self._id_ends = np.load(folder / "id_ends.npy", mmap_mode="r", allow_pickle=False)
        self._texts = np.memmap(folder / "texts.bin", np.uint8, "r")
        self._ids = np.memmap(folder / "ids.bin", np.uint8, "r")

    def _document(self, i: int) -> tuple[str, str]:
        def piece(data: np.ndarray, ends: np.ndarray) -> str:
            return bytes(data[int(ends[i - 1]) if i else 0 : int(ends[i])]).decode()

        return piece(self._ids, self._id_ends), piece(self._texts, self._text_ends)


def read_corpus(path: Path) -> Iterator[tuple[str, str]]:
    """`(id, contents)` of every line of a JSONL corpus (`.gz` allowed); ids may be numbers, blank lines are skipped.
    ValueError naming the file, the line and the cure."""
    for number, line in read_lines(path):
        try:
            pair = _corpus_line(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield pair


def _corpus_line(line: bytes) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): give one object per line") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}: give an object with id and contents")
    name, text = record.get("id"), record.get("contents")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"id is {name!r}: give text or a whole number")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"contents is {text!r}: give text")
    check_utf8(text, "contents")
    check_utf8(str(name), "id")
    return str(name), text


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _damage(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / "checksums.json").read_bytes())
        if not isinstance(sums, dict) or "texts.bin" not in sums:
            return "checksums.json is not a list of files"
        for name, expected in sums.items():
            if _checksum(folder / Path(name).name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _discard(folder: Path) -> None:
    # renamed first, so that nobody opens it half deleted
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    os.rename(folder, aside / "damaged")
    shutil.rmtree(aside, ignore_errors=True)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


class _Within(io.RawIOBase):
    """Reads `stream`, which reads `sock`, for no longer than the socket's time-out in all: its own starts anew with
    every byte."""

    def __init__(self, stream: io.RawIOBase, sock: Any) -> None:
        self._stream, self._sock = stream, sock
        self._deadline = time.monotonic() + sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer came too slowly")
        self._sock.settimeout(left)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Within(self.fp.detach(), sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)


class HTTPRetriever:
    """A retrieval server as of Search-R1: `POST url {"queries": [...], "topk": 3, "return_scores": true}` is answered
    with `{"result": [[{"document": {"id": ..., "contents": ...}, "score": ...}, ...], ...]}`.

    An address without a path gets `/retrieve`. One try may take `timeout` seconds and answer max_bytes; a connection
    that fails, a time-out and a status of 500 or more are tried again max_retries times, after 0.5, 1, 2, ... times
    `backoff` seconds. RetrieverError where that does not help, or where the answer is not as above; ValueError for an
    address that is not http or https. Copying gives the same object.
    """

    def __init__(
        self,
        url: str,
        *,
        topk: int = 3,
        timeout: float = 10.0,
        max_retries: int = 3,
        backoff: float = 1.0,
        max_bytes: int = 16 << 20,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {url!r}: give the http:// or https:// address of a retrieval server")
        if not 0 < timeout < math.inf or not 0 <= backoff < math.inf:
            raise ValueError(f"timeout={timeout}, backoff={backoff}: give seconds")
        if max_retries < 0 or max_bytes < 1:
            raise ValueError(f"max_retries={max_retries}, max_bytes={max_bytes}: give counts")
        self.topk = _check_topk(topk)
        self.url = url if parts.path.strip("/") else urllib.parse.urlunsplit(parts._replace(path="/retrieve"))
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_bytes = max_bytes
        self._opener = urllib.request.build_opener(_NoRedirect, _Handler, _SecureHandler)

    def __deepcopy__(self, memo: dict) -> HTTPRetriever:
        return self

    def search(self, query: str, topk: int | None = None) -> list[Document]:
        """At most `topk` documents, in the server's order; one request."""
        return self.search_batch([query], topk)[0]

    def search_batch(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """One request for all queries."""
        topk = self.topk if topk is None else _check_topk(topk)
        queries = list(queries)
        if not queries:
            return []
        body = json.dumps({"queries": queries, "topk": topk, "return_scores": True}).encode()
        return self._read(self._post(body), len(queries), topk)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(self.backoff * 2.0 ** (attempt - 2))
            try:
                return self._try(urllib.request.Request(self.url, body, headers, method="POST"))
            except urllib.error.HTTPError as error:
                error.close()
                reason = shown(f"status {error.code} {error.reason}")
                if error.code < 500:
                    raise RetrieverError(
                        f"{self.url} refused the request ({reason}): check the address; it must take POST /retrieve"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                reason = shown(str(getattr(error, "reason", error))) or type(error).__name__
        raise RetrieverError(
            f"{self.url} gave no answer in {self.max_retries + 1} tries of {self.timeout:g} s ({reason}): start the "
            "retrieval server, check the address, or raise timeout"
        )

    def _try(self, request: urllib.request.Request) -> bytes:
        with self._opener.open(request, timeout=self.timeout) as response:
            data = bytearray()
            while chunk := response.read1(1 << 16):
                data += chunk
                if len(data) > self.max_bytes:
                    raise RetrieverError(f"{self.url} sent more than {self.max_bytes} bytes: lower topk")
            missing = response.length
        if missing:
            raise http.client.IncompleteRead(bytes(data), missing)
        return bytes(data)

    def _read(self, data: bytes, num_queries: int, topk: int) -> list[list[Document]]:
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._garbage(f"it is not JSON ({error})") from error
        rows = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(rows, list) or len(rows) != num_queries:
            raise self._garbage(f'"result" is not a list with one entry for each of the {num_queries} queries')
        return [
            [self._hit(f"result[{i}][{j}]", hit) for j, hit in enumerate(self._row(i, row)[:topk])]
            for i, row in enumerate(rows)
        ]

    def _row(self, i: int, row: Any) -> list:
        if not isinstance(row, list):
            raise self._garbage(f"result[{i}] is not a list")
        return row

    def _hit(self, where: str, hit: Any) -> Document:
        document = hit.get("document") if isinstance(hit, dict) else None
        if not isinstance(document, dict) or not isinstance(document.get("contents"), str):
            raise self._garbage(f'{where} has no text in ["document"]["contents"]')
        score = hit.get("score")
        # a whole number may be larger than any float
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= sys.float_info.max:
            raise self._garbage(f"{where} has the score {repr(score)[:80]}")
        return Document(str(document.get("id", "")), document["contents"], float(score))

    def _garbage(self, what: str) -> RetrieverError:
        return RetrieverError(f"{self.url} answered, but {what}: check that it is a Search-R1 retrieval server")
