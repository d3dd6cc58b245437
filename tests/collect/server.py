"""
As much of OpenAI's chat completions as a collection needs, on a port of this machine, with faults on request.

A prompt says what happens to it: `[500] Why?` meets status 500 once and is answered then; `[500!] Why?` meets it always. Everything that
was asked, sent and would be paid is counted.

    python -m tests.collect.server --latency 0.05
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from threading import Event, Thread


KEY = "sk-loopback-key-that-nobody-may-see"
MODEL = "teacher-1"
MARK = re.compile(r"^\[([\w ]+)(!?)\] ")
WORDS = "red green blue apple pear plum river stone cloud seven eight nine über 🍏 quick slow".split()
# Passes when it is met once
TRANSIENT = (
    *("429", "429 seconds", "429 date", "429 ms", "500", "503", "hang", "cut", "reset", "malformed", "html"),
    *("error 200", "no choices"),
)
# Is an answer, or a fault that stays
LASTING = ("null", "empty", "length", "filter", "thought", "refusal", "400", "422")
# Is an answer with something missing
NOTED = ("no usage", "no logprobs", "short logprobs", "wrong model", "trickle", "reasoning", "call")
# Ends the run
FATAL = ("quota", "401", "403", "404")
PAID_FAULTS = ("cut", "malformed", "slow trickle")


@dataclass
class TeacherServer:
    """
    A server in a thread, for use as a context manager.

    Args:
        latency (`float`): seconds until an answer.
        ignores (`set[str]`): parameters that are passed over in silence, of `n`, `seed`, `logprobs` and `top_logprobs`.
        echoes_key (`bool`): whether errors and answers quote the key that was sent, as a careless proxy would.
        remembers (`bool`): whether `asked` has every body.
        needs_key (`bool`): whether another key than `KEY` is refused.
        port (`int`): a free one by default.
    """

    latency: float = 0.0
    ignores: set[str] = field(default_factory=set)
    echoes_key: bool = False
    remembers: bool = True
    needs_key: bool = True
    asked: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    requests: int = 0
    answers: Counter = field(default_factory=Counter)
    paid: int = 0
    paid_tokens: Counter = field(default_factory=Counter)
    met: Counter = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    port: int = 0

    def __enter__(self) -> "TeacherServer":
        started = Event()
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(30)
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(30)

    def _run(self, started: Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.serve(started.set))

    async def serve(self, ready) -> None:
        self._ended = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024, limit=1 << 22)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        ready()
        await self._ended.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = head.split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
                key = re.search(r"(?i)^(?:authorization: bearer|api-key:) (.+)$", head, re.MULTILINE)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.in_flight += 1
                self.most_in_flight = max(self.in_flight, self.most_in_flight)
                try:
                    keeps = await self._answer(writer, lines[0].split()[1], body, key and key[1].strip())
                finally:
                    self.in_flight -= 1
                if not keeps:
                    break
        writer.close()

    async def _answer(self, writer, path: str, raw: bytes, key: str | None) -> bool:
        self.requests += 1
        self.times.append(time.monotonic()) if self.remembers else None
        self._key = key
        if not path.startswith("/v1/chat/completions"):
            return await self._error(writer, 404, "no such page", "not_found")
        if self.needs_key and key != KEY:
            return await self._error(writer, 401, f"Incorrect API key provided: {key}", "invalid_api_key")
        body = json.loads(raw)
        if self.remembers:
            self.asked.append(body)
        if body["model"] != MODEL:
            return await self._error(writer, 404, f"The model `{body['model']}` does not exist", "model_not_found")
        text = body["messages"][-1]["content"]
        mark = MARK.match(text)
        fault, always = (mark[1], bool(mark[2])) if mark else ("", False)
        # A look at the seed is short, and meets no fault
        about = (text, body.get("seed"))
        if fault in TRANSIENT:
            self.met[about] += 1
            if self.met[about] == 1 or always:
                return await self._transient(writer, fault, body)
        if fault == "slow trickle":
            self._pay(body, self._completion(body, ""))
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault in ("400", "422"):
            return await self._error(writer, int(fault), "this prompt is too long", "context_length_exceeded")
        if fault == "quota":
            return await self._error(writer, 429, "You exceeded your quota", "insufficient_quota")
        if fault in ("401", "403", "404"):
            return await self._error(writer, int(fault), "no", "permission_denied")
        completion = self._completion(body, fault)
        if fault != "slow trickle":
            self._pay(body, completion)
        self.answers[about] += 1
        data = json.dumps(completion).encode()
        if "trickle" in fault:
            return await self._trickle(writer, data, 0.002 if fault == "trickle" else 10.0)
        await self._write(writer, 200, data)
        return True

    async def _transient(self, writer, fault: str, body: dict) -> bool:
        if fault.startswith("429"):
            after = {
                "429 seconds": {"Retry-After": "0.03"},
                "429 date": {"Retry-After": formatdate(time.time() + 0.5, usegmt=True)},
                "429 ms": {"retry-after-ms": "20"},
            }
            return await self._error(writer, 429, "slow down", "rate_limit_exceeded", after.get(fault, {}))
        if fault in ("500", "503"):
            return await self._error(writer, int(fault), "overloaded", "server_error")
        if fault == "hang":
            await asyncio.sleep(30)
            return False
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "html":
            await self._write(writer, 200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})
        elif fault == "error 200":
            return await self._error(writer, 200, "upstream failed", "upstream_error")
        elif fault == "no choices":
            await self._write(writer, 200, json.dumps({**self._completion(body, ""), "choices": []}).encode())
        else:
            completion = self._completion(body, "")
            self._pay(body, completion)
            data = json.dumps(completion).encode()
            if fault == "malformed":
                await self._write(writer, 200, data[: len(data) // 2])
            else:  # cut
                await self._write(writer, 200, data, cut=len(data) // 2)
                return False
        return True

    async def _trickle(self, writer, data: bytes, seconds: float) -> bool:
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        )
        for start in range(0, len(data), 100):
            writer.write(data[start : start + 100])
            await writer.drain()
            await asyncio.sleep(seconds)
        return True

    async def _write(
        self, writer, status: int, data: bytes, headers: dict | None = None, cut: int | None = None
    ) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + data[:cut])
        await writer.drain()

    async def _error(self, writer, status: int, message: str, code: str, headers: dict | None = None) -> bool:
        if self.echoes_key:
            message += f" (sent: Authorization: Bearer {self._key})"
        data = json.dumps({"error": {"message": message, "type": code, "code": code, "param": None}}).encode()
        await self._write(writer, status, data, headers)
        return True

    def _pay(self, body: dict, completion: dict) -> None:
        self.paid += 1
        choices = len(completion["choices"])
        self.paid_tokens["prompt"] += prompt_tokens(body)
        self.paid_tokens["completion"] += sum(len(answer(body, i, self.ignores)) for i in range(choices))

    def _completion(self, body: dict, fault: str) -> dict:
        count = 1 if "n" in self.ignores else body.get("n", 1)
        choices = [self._choice(body, index, fault) for index in range(count)]
        completion = {
            "id": f"chatcmpl-{self.requests}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "teacher-2" if fault == "wrong model" else f"{body['model']}-2026",
            "system_fingerprint": "fp_1",
            "choices": choices,
        }
        if fault != "no usage":
            tokens = sum(len(answer(body, index, self.ignores)) for index in range(count))
            prompt = prompt_tokens(body)
            completion["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": tokens,
                "total_tokens": prompt + tokens,
            }
        return completion

    def _choice(self, body: dict, index: int, fault: str) -> dict:
        words = answer(body, index, self.ignores)
        text = " ".join(words)
        message = {"role": "assistant", "content": f"{text} {self._key}" if self.echoes_key else text}
        reason = {"length": "length", "filter": "content_filter", "thought": "length"}.get(fault, "stop")
        if fault == "reasoning":
            message["reasoning_content"] = "Let me think."
        changed = {"null": None, "empty": "", "thought": f"<think>{text}", "refusal": None}
        message["content"] = changed.get(fault, message["content"])
        if fault == "refusal":
            message["refusal"] = "I cannot help with that."
        if fault == "call":
            message["content"] = None
            message["tool_calls"] = [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "add", "arguments": json.dumps({"a": 1, "b": [2]})},
                }
            ]
        logprobs = None
        if body.get("logprobs") and "logprobs" not in self.ignores and fault != "no logprobs":
            entries = [self._entry(word if i == 0 else f" {word}", body) for i, word in enumerate(words)]
            logprobs = {
                "content": entries[: len(entries) // 2] if fault == "short logprobs" else entries,
                "refusal": None,
            }
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _entry(self, token: str, body: dict) -> dict:
        entry = {"token": token, "logprob": -0.5, "bytes": list(token.encode())}
        alternatives = 0 if "top_logprobs" in self.ignores else body.get("top_logprobs") or 0
        others = [{"token": f"{token}{i}", "logprob": -0.5 - i, "bytes": None} for i in range(alternatives)]
        return entry | {"top_logprobs": others}


def prompt_tokens(body: dict) -> int:
    return sum(len(str(message["content"]).split()) + 3 for message in body["messages"])


def answer(body: dict, index: int, ignores=()) -> list[str]:
    """Words that follow from the prompt and the seed alone, no more than `max_tokens`."""
    seed = None if "seed" in ignores else body.get("seed")
    dice = hashlib.sha256(json.dumps([body["messages"], body.get("temperature"), seed, index]).encode()).digest()
    if "sampling" in ignores:
        dice = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    words = [WORDS[byte % len(WORDS)] for byte in dice[: 6 + dice[31] % 8]]
    return words[: body.get("max_tokens") or body.get("max_completion_tokens") or len(words)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    server = TeacherServer(latency=options.latency, remembers=False, needs_key=False)
    asyncio.run(server.serve(lambda: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
