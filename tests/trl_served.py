"""vLLM's server as TRL's trainer meets it in `vllm_mode="server"`: vLLM itself, or a stand-in that answers the same
requests from a small model or a script. Weights go through a folder that both sides see in the place of NCCL: TRL's
client and vLLM's worker stay what they are, only the transport between them is replaced.
"""

import json
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import torch
from server_process import serving

PLUGIN = """
import os
import trl_served


def register():
    from vllm.distributed.weight_transfer import nccl_engine

    path = os.environ["TRL_SERVED_FOLDER"]
    nccl_engine.worker_init_process_group = lambda init_info, parallel_config: trl_served.Folder(path)
    nccl_engine.packed_nccl_broadcast_consumer = lambda group, **options: group.consume(**options)
"""


class Folder:
    """Stands where the process group of an update stands."""

    def __init__(self, path):
        self.path, self.number = Path(path), 0
        self.group = self  # TRL takes its store from it at the end

    def emptied(self):
        """As a new trainer begins with it."""
        for file in self.path.glob("*.pt"):
            file.unlink()
        return self

    def produce(self, iterator, **_):
        torch.save([(name, tensor.detach().cpu().clone()) for name, tensor in iterator], self.path / "part")
        (self.path / "part").rename(self.path / f"{self.number}.pt")
        self.number += 1

    def consume(self, iterator, post_unpack_func, **_):
        file, end = self.path / f"{self.number}.pt", time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < end, "no weights came"
            time.sleep(0.01)
        self.number += 1
        named = torch.load(file)
        said = [(name, tuple(shape), dtype) for name, (shape, dtype) in iterator]
        assert said == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named]
        post_unpack_func(named)


def trainer_side(path, patch=setattr):
    """TRL's client sends weights through the folder, and asks for no vLLM where none is installed."""
    import trl.generation.vllm_client as client
    import trl.generation.vllm_generation as generation
    from trl.experimental.async_grpo import async_rollout_worker, weight_transfer

    init = client.VLLMClient.init_communicator
    # it refuses other devices, for NCCL's sake
    patch(client.VLLMClient, "init_communicator", lambda self, device: init(self, "cuda"))
    for module in (client, weight_transfer):
        patch(module, "open_trainer_endpoint", lambda init_info: Folder(path).emptied())
        patch(module, "packed_nccl_broadcast_producer", lambda group, **options: group.produce(**options))
    if find_spec("vllm") is None:
        for module in (client, generation, async_rollout_worker, weight_transfer):
            patch(module, "is_vllm_available", lambda *args, **kwargs: True)
        for module in (client, weight_transfer):
            patch(module, "get_ip", lambda: "127.0.0.1")
            patch(module, "_HAS_STATEFUL_TRAINER_ENGINE", True)
        patch(weight_transfer, "get_open_port", lambda: 0)
        patch(client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)


class Server:
    """What a test knows of either."""

    def __init__(self, url, folder, max_model_length, standin=None):
        self.url, self.folder, self.max_model_length, self.standin = url, folder, max_model_length, standin

    def arguments(self):
        """Of TRL's configuration."""
        return dict(use_vllm=True, vllm_mode="server", vllm_server_base_url=self.url, vllm_server_timeout=60.0)


class Refused(Exception):
    """A request that vLLM answers with 400."""


class Standin:
    """A model, or a function from a context's text to what is said next, behind vLLM's paths."""

    def __init__(self, path, folder, max_model_length, tokenizer=None, speak=None):
        self.name, self.folder, self.max_model_length = str(path), folder, max_model_length
        self.tokenizer, self.speak, self.model = tokenizer, speak, None
        self.requests, self.updates, self.lock = [], 0, threading.Lock()
        if speak is None:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
            self.end = self.model.config.eos_token_id

    def get(self, path):
        info = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "max_model_len": self.max_model_length}
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": self.name, "max_model_len": self.max_model_length}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}, "model_config": info}},
        }[path]

    def post(self, path, body):
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/init_weight_transfer_engine":
            self.group = Folder(self.folder)
        elif path == "/update_weights":
            info = body["update_info"]
            dtypes = [getattr(torch, name) for name in info["dtype_names"]]
            metadata = zip(info["names"], zip(info["shapes"], dtypes, strict=True), strict=True)
            self.group.consume(metadata, self.load)
        else:
            paths = ("start_weight_update", "finish_weight_update", "reset_prefix_cache", "pause", "resume")
            assert path.removeprefix("/") in paths, path
        return {"success": True}

    def load(self, named):
        self.updates += 1
        if self.model is not None:
            left = self.model.load_state_dict(dict(named), strict=False)
            assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}

    def complete(self, body):
        with self.lock:
            self.requests.append(body)
            assert body["return_token_ids"]
            if body["logprobs"] != 0:
                raise Refused("log-probs of sampled tokens alone")
            most, prompts = body["max_tokens"], body["prompt"]
            prompts = prompts if isinstance(prompts[0], list) else [prompts]
            for prompt in prompts:
                if len(prompt) + most > self.max_model_length:
                    raise Refused(f"This model's maximum context length is {self.max_model_length} tokens")
            choices = []
            for prompt in prompts:
                for _ in range(body["n"]):
                    ids, values = (self.script if self.model is None else self.sample)(prompt, most, body)
                    tokens = [f"token_id:{token}" for token in ids]
                    top = [{token: value} for token, value in zip(tokens, values, strict=True)]
                    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": top}
                    choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs})
            return {"choices": choices}

    def script(self, prompt, most, body):
        ids = self.tokenizer.encode(self.speak(self.tokenizer.decode(prompt)), add_special_tokens=False)[:most]
        # 1 / 64 of a token's place: a value that tells where it was recorded
        return ids, [-(i + 1) / 64 for i in range(len(ids))]

    @torch.no_grad()
    def sample(self, prompt, most, body):
        ids, values = list(prompt), []
        while len(values) < most and (not values or ids[-1] != self.end):
            table = (self.model(torch.tensor([ids])).logits[0, -1].float() / body["temperature"]).log_softmax(-1)
            ids.append(int(table.exp().multinomial(1)))
            values.append(float(table[ids[-1]]))
        return ids[len(prompt) :], values


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin = None

    def log_message(self, *args):
        pass

    def answer(self, make):
        try:
            code, found = 200, make()
        except Refused as error:
            code, found = 400, {"error": {"message": str(error)}}
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(lambda: self.standin.get(self.path.partition("?")[0]))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.answer(lambda: self.standin.post(self.path.partition("?")[0], body))


@contextmanager
def standin(path, folder, max_model_length, **options):
    """A stand-in at an address of this machine."""
    made = Standin(path, folder, max_model_length, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"standin": made}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}", folder, max_model_length, made)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def vllm(path, folder, max_model_length, work):
    """vLLM's own server of the model, in processes of its own, started as TRL asks for it."""
    info = work / "plugin" / "trl_served-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl_served\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nserved = trl_served_plugin:register\n")
    (work / "plugin" / "trl_served_plugin.py").write_text(PLUGIN)
    # the folder of this file, and that of the plugin
    paths = [str(work / "plugin"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    arguments = f"vllm.entrypoints.cli.main serve {path} --dtype float32 --enforce-eager --gpu-memory-utilization 0.2"
    arguments += f" --max-model-len {max_model_length} --logprobs-mode processed_logprobs --max-logprobs -1"
    arguments = [*arguments.split(), "--weight-transfer-config", '{"backend": "nccl"}']
    environment = {"PYTHONPATH": os.pathsep.join(paths), "TRL_SERVED_FOLDER": str(folder)}
    with serving(arguments, work / "log.txt", **environment) as url:
        yield Server(url, folder, max_model_length)
