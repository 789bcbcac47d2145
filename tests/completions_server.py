"""A real HTTP server on loopback that serves a real (tiny, random) transformers model by token ids.

    python tests/completions_server.py      prints two ports: one speaks vLLM's dialect, the other SGLang's

It is neither vLLM nor SGLang: it does what vLLM 0.30 and SGLang 0.5.23 were seen to do at the endpoints used here, so
the client's side of the protocol runs for real. On request it misbehaves: POST /misbehave {"kind": ..., "times": n,
"first_id": i} spoils the next n completions (of prompts that begin with i, if given). GET /count tells the completions
asked for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

VOCAB = 48
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 5)), "</search>"]
CONTEXT = 96
SGLANG_CONTEXT = CONTEXT + 6
"""What SGLang's side says, which takes prompts of 95 tokens at most."""


def tiny_tokenizer() -> Any:
    """One word is one id; `</search>` is the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(seed: int = 0) -> Any:
    from tiny import MODEL
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(**{**MODEL, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: list[str] | None = None,
    stop_token_ids: list[int] | None = None,
    seed: int = 0,
    before_top_p: bool = False,
) -> tuple[list[int], list[float], str]:
    """Ids, log-probs in the sampled distribution (float32; of temperature 1 where greedy; of all tokens if
    `before_top_p`) and the finish reason."""
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs = [], []
    while len(ids) < max_tokens:
        logits = model(torch.tensor([prompt + ids])).logits[0, -1].float()
        values = whole = torch.log_softmax(logits / (temperature or 1.0), -1)
        if top_p < 1:
            order = values.argsort(descending=True)
            before = values[order].exp().cumsum(0) - values[order].exp()
            values = values.index_fill(0, order[before >= top_p], -torch.inf)
            values = torch.log_softmax(values, -1)
        token = (
            int(values.argmax()) if temperature == 0 else int(torch.multinomial(values.exp(), 1, generator=generator))
        )
        ids.append(token)
        logprobs.append(float((whole if before_top_p else values)[token]))
        text = tokenizer.decode(ids)
        if token in (stop_token_ids or ()) or any(s in text for s in stop or ()):
            return ids, logprobs, "stop"
    return ids, logprobs, "length"


class State:
    """The model and what one server remembers."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.model, self.tokenizer = tiny_model(), tiny_tokenizer()
        self.lock = threading.Lock()
        self.cached: list[list[int]] = []
        self.calls: list[str] = []
        self.name = "tiny"
        self.num_completions = 0
        self.misbehaviour: dict[str, Any] = {}

    def num_cached(self, prompt: list[int]) -> int:
        """Tokens a prefix cache would hold; the last one is always computed."""
        best = 0
        for other in self.cached:
            same = 0
            while same < min(len(other), len(prompt) - 1) and other[same] == prompt[same]:
                same += 1
            best = max(best, same)
        return best

    def kind_of_trouble(self, prompt: list[int]) -> str | None:
        trouble = self.misbehaviour
        if not trouble.get("times") or trouble.get("first_id", prompt[0]) != prompt[0]:
            return None
        trouble["times"] -= 1
        return trouble["kind"]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Silent."""

    @property
    def state(self) -> State:
        return self.server.state

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/count":
            self.answer({"completions": self.state.num_completions, "calls": self.state.calls})
        elif self.path == "/v1/models":
            length = CONTEXT if self.state.dialect == "openai" else SGLANG_CONTEXT
            self.answer({"data": [{"id": self.state.name, "max_model_len": length}]})
        elif self.path == "/get_model_info" and self.state.dialect == "sglang":
            self.answer({"model_path": "tiny", "is_generation": True})
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        state = self.state
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        path = self.path.partition("?")[0]
        if path == "/misbehave":
            state.misbehaviour = body
            self.answer({})
        elif (path, state.dialect) in (("/v1/completions", "openai"), ("/generate", "sglang")):
            self.completion(body)
        elif path == "/collective_rpc" and state.dialect == "openai" and body["method"] == "reload_weights":
            self.load(body["kwargs"]["weights_path"])
            self.answer({"results": [None]})
        elif path == "/update_weights_from_disk" and state.dialect == "sglang":
            self.load(body["model_path"])
            state.cached.clear()
            state.name = body["model_path"]
            self.answer({"success": True, "message": "Succeeded to update model weights."})
        elif path == "/reset_prefix_cache" and state.dialect == "openai":
            state.calls.append(self.path)
            state.cached.clear()
            self.answer(b"")
        else:
            self.answer({"error": "not found"}, 404)

    def load(self, folder: str) -> None:
        from safetensors.torch import load_file

        self.state.calls.append(self.path)
        with self.state.lock:
            result = self.state.model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
        assert not result.unexpected_keys, result

    def completion(self, body: dict[str, Any]) -> None:
        state = self.state
        is_openai = state.dialect == "openai"
        prompt = body["prompt" if is_openai else "input_ids"]
        params = body if is_openai else body["sampling_params"]
        with state.lock:
            state.num_completions += 1
            kind = state.kind_of_trouble(prompt)
        if self.trouble(kind):
            return
        if is_openai and body.get("model") != "tiny":
            return self.answer({"error": {"message": "The model does not exist."}}, 404)
        if not is_openai:
            assert all(0 <= i < VOCAB for i in prompt), "SGLang ends with an error of its embedding"
            if len(prompt) >= CONTEXT:
                return self.answer({"error": {"message": f"{len(prompt)} tokens are longer than the context"}}, 400)
        if any(not 0 <= i < VOCAB for i in prompt):
            return self.answer({"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}, 400)
        # as if the model's generation_config.json said top_k=1 and penalties: servers use it where a request is silent
        said = {"top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"} <= params.keys()
        with state.lock:
            cached = state.num_cached(prompt)
            ids, logprobs, reason = complete(
                state.model,
                state.tokenizer,
                prompt,
                max_tokens=params["max_tokens" if is_openai else "max_new_tokens"],
                temperature=params["temperature"] if said else 0.0,
                top_p=params["top_p"],
                # as if its words were spelled in more tokens than their own encoding has
                stop=[] if kind == "missed stop" else params["stop"],
                stop_token_ids=params["stop_token_ids"],
                seed=params["seed" if is_openai else "sampling_seed"],
                before_top_p=not is_openai,
            )
            state.cached.append(prompt + ids)
        text = state.tokenizer.decode(ids)
        if kind == "early length":
            reason = "length"
        ids, logprobs, reason, sent = spoil(kind, ids, logprobs, reason, prompt)
        if is_openai:
            tokens = [f"token_id:{i}" if body.get("return_tokens_as_token_ids") else str(i) for i in ids]
            choice = {
                "index": 0,
                "text": text,
                "finish_reason": reason,
                "logprobs": {"tokens": tokens, "token_logprobs": logprobs},
            }
            if body.get("return_token_ids") and kind != "old":
                choice |= {"token_ids": ids, "prompt_token_ids": sent}
            if kind == "no ids":
                del choice["token_ids"]
                choice["logprobs"]["tokens"] = text.split()
            usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}
            self.answer({"choices": [choice], "usage": usage})
        else:
            info = {
                "prompt_tokens": len(sent),
                "completion_tokens": len(ids),
                "cached_tokens": cached,
                "finish_reason": {"type": reason},
                "output_token_logprobs": [[p, i, None] for p, i in zip(logprobs, ids, strict=False)],
            }
            self.answer({"text": text, "output_ids": ids, "meta_info": info})

    def trouble(self, kind: str | None) -> bool:
        """Misbehaves instead of completing; False where it is to go on."""
        if kind in ("503", "429", "400", "307"):
            where = {"Location": "http://127.0.0.1:9/generate"} if kind == "307" else {}
            self.answer({"error": f"said {kind}"}, int(kind), where)
        elif kind == "sleep":
            time.sleep(2.0)
            self.answer({})
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(20):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif kind == "not json":
            self.answer(b"<html>it works!</html>")
        elif kind == "deep":
            self.answer(b"[" * 200_000)
        elif kind == "a list":
            self.answer([1, 2])
        elif kind == "empty object":
            self.answer({})
        elif kind == "huge":
            self.send_response(200)
            self.end_headers()
            for _ in range(70):
                self.wfile.write(b" " * 2**20)
        elif kind == "close":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        else:
            return False
        return True


def spoil(
    kind: str | None, ids: list[Any], logprobs: list[Any], reason: str, prompt: list[int]
) -> tuple[list[Any], list[Any], str, list[int]]:
    """A completion with one thing wrong, and the prompt the server says it got."""
    if kind == "nan":
        logprobs[-1] = float("nan")
    elif kind == "minus infinity":
        logprobs[-1] = float("-inf")
    elif kind == "positive":
        logprobs[-1] = 0.5
    elif kind == "beyond float32":
        logprobs[-1] = -1e300
    elif kind == "beyond float64":
        logprobs[-1] = -(10**400)
    elif kind == "null":
        logprobs[-1] = None
    elif kind == "lengths":
        logprobs = logprobs[:-1]
    elif kind == "no token":
        ids, logprobs = [], []
    elif kind == "too many":
        ids, logprobs = ids * 50, logprobs * 50
    elif kind == "big id":
        ids[-1] = VOCAB
    elif kind == "negative id":
        ids[-1] = -1
    elif kind == "text id":
        ids[-1] = "7"
    elif kind == "true id":
        ids[-1] = True
    elif kind == "abort":
        reason = "abort"
    elif kind == "other prompt":
        prompt = [1, *prompt]
    return ids, logprobs, reason, prompt


def main() -> None:
    torch.set_num_threads(1)
    servers = []
    for dialect in ("openai", "sglang"):
        server = Server(("127.0.0.1", 0), Handler)
        server.state = State(dialect)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    print(*(s.server_address[1] for s in servers), flush=True)
    # ends with the test that started it, however that ended
    sys.stdin.read()


if __name__ == "__main__":
    main()
