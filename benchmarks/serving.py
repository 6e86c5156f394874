"""HTTP clients in their own process, and a plain FastAPI server to compare with."""

import asyncio
import json
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI

from benchmarks.peer import Decoder
from gpt2core.tokenizer import END_OF_TEXT


class Clients:
    """Concurrent clients. Each sends one request over a connection that is already open."""

    def rate(self, url: str, prompts: Sequence[Sequence[int]], n_new: int, fields: dict[str, Any]) -> float:
        """Throughput in new tokens/s: one request per client, from the first request to the last response.

        `fields` are further ones of each request.
        """
        return asyncio.run(self._rate(url, prompts, n_new, fields))

    async def _rate(self, url: str, prompts: Sequence[Sequence[int]], n_new: int, fields: dict[str, Any]) -> float:
        async with _session() as session:
            await asyncio.gather(*(session.get(f"{url}/livez") for _ in prompts))

            async def complete(prompt: Sequence[int]) -> int:
                async with session.post(f"{url}/v1/completions", json=_body(prompt, n_new) | fields) as response:
                    response.raise_for_status()
                    body = await response.json()
                return int(body["usage"]["completion_tokens"])

            start = perf_counter()
            n_tokens = sum(await asyncio.gather(*map(complete, prompts)))
            return n_tokens / (perf_counter() - start)

    def first_token(self, url: str, prompt: Sequence[int], n_new: int) -> float:
        """Time to first token in ms: from sending the request to the first event of the stream."""
        return asyncio.run(self._first_token(url, prompt, n_new))

    async def _first_token(self, url: str, prompt: Sequence[int], n_new: int) -> float:
        async with _session() as session:
            await session.get(f"{url}/livez")
            start = perf_counter()
            async with session.post(f"{url}/v1/completions", json=_body(prompt, n_new) | {"stream": True}) as response:
                await response.content.readline()
                waited = 1e3 * (perf_counter() - start)
                await response.read()
            return waited


class PlainServer:
    """A FastAPI server with `generate`. One request at a time is faster than threads that compete for the cores."""

    def __init__(self, base: Path, prompt: Sequence[int]) -> None:
        app = FastAPI()
        decoders: list[Decoder] = []

        @app.get("/livez")
        async def livez() -> None:
            """Responds with 200."""

        @app.post("/v1/completions")
        async def complete(body: dict[str, Any]) -> dict[str, Any]:
            (completion,) = decoders[0].decode([body["prompt"]], body["max_tokens"])
            return {"tokens": completion, "usage": {"completion_tokens": len(completion)}}

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

        def run() -> None:  # model and server run in one thread
            decoders.append(Decoder(base, [prompt]))
            server.run()

        threading.Thread(target=run, daemon=True).start()
        while not server.started:
            threading.Event().wait(0.05)
        self._url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    def url(self) -> str:
        return self._url


def widen_tokenizer(directory: Path, vocab_size: int) -> None:
    """Add unused tokens until every id that a random model may generate has one."""
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    del vocab[END_OF_TEXT]
    old = list(vocab)
    merges = []
    controls = [chr(256 + byte) for byte in range(1, 9)]  # control bytes, as GPT-2 spells them
    for left, right in product([a + b for a in ["", *controls] for b in controls], old):
        if len(vocab) < vocab_size - 1 and left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append(f"{left} {right}\n")
    vocab[END_OF_TEXT] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with (directory / "merges.txt").open("a", encoding="utf-8") as file:
        file.writelines(merges)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300))


def _body(prompt: Sequence[int], n_new: int) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": n_new}
