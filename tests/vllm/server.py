"""A server of the stand-in: what TRL's client asks of `vllm serve`, on the loopback interface."""

import contextlib
import json
import math
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from .stand_in import LLM, SamplingParams, connect_to_trainer


SAMPLING = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "logprobs")
CONFIG = {"weight_transfer_config": {"backend": "nccl"}, "model_config": {"logprobs_mode": "processed_logprobs"}}


class Server:
    """What a test sees of it: its address, its engine, and what it was asked for."""

    def __init__(self, path: str):
        self.engine = LLM(path)
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.trainer: socket.socket | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def take_weights(self, names: list[str], dtype_names: list[str], shapes: list[list[int]]) -> None:
        for name, dtype_name, shape in zip(names, dtype_names, shapes, strict=True):
            dtype = getattr(torch, dtype_name)
            left, parts = math.prod(shape) * dtype.itemsize, []
            while left:
                parts.append(self.trainer.recv(left))
                assert parts[-1], "the trainer sent less than it said"
                left -= len(parts[-1])
            values = torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).view(shape)
            self.engine.weights.load_weights([(name, values)])

    def complete(self, body: dict) -> dict:
        params = SamplingParams(**{key: body[key] for key in SAMPLING if key in body})
        params.stop_token_ids = body.get("stop_token_ids", [])
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in body["prompt"]], params)
        return {
            "choices": [
                {
                    "prompt_token_ids": output.prompt_token_ids,
                    "token_ids": completion.token_ids,
                    "logprobs": in_openai_format(completion),
                }
                for output in outputs
                for completion in output.outputs
            ]
        }


def in_openai_format(completion) -> dict | None:
    if completion.logprobs is None:
        return None
    tokens = [f"token_id:{token}" for token in completion.token_ids]
    values = [next(iter(position.values())).logprob for position in completion.logprobs]
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": [{token: value} for token, value in zip(tokens, values, strict=True)],
    }


class Handler(BaseHTTPRequestHandler):
    server_: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": "student"}]},
            "/server_info": {"vllm_config": CONFIG},
            "/get_world_size": {"world_size": 1},
        }
        self._answer(200 if path in answers else 404, answers.get(path, {}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        server = self.server_
        with server.lock:
            server.asked.append(self.path)
            if self.path == "/init_weight_transfer_engine":
                server.trainer = connect_to_trainer(body["init_info"])
            elif self.path == "/update_weights":
                server.take_weights(**body["update_info"])
            elif self.path == "/v1/completions":
                return self._answer(200, server.complete(body))
            elif self.path == "/reset_prefix_cache":
                return self._answer(200, {"success": True})
            elif self.path not in ("/start_weight_update", "/finish_weight_update"):
                return self._answer(404, {})
        self._answer(200, {})

    def _answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def serving(path: str) -> Iterator[Server]:
    server = Server(path)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
        LLM.made.remove(server.engine)
