# SPDX-License-Identifier: Apache-2.0
"""A real server in a process of its own and real clients (package `openai`): groups are kept apart and none is lost."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from m3po_vllm.requests import GROUP, PATH, PATHS, RECORD
from openai import APIError, AsyncOpenAI, BadRequestError, OpenAI
from transformers.m3po import write_checkpoint_info
from transformers.m3po.settings import ThinkingSettings
from vllm_engine import LENGTH, PATHS_OF_A_GROUP, checkpoint, generate, prompts

from m3po_lab.core.errors import UserError
from m3po_lab.serve import server_flags

GROUPS, PLAIN = 12, 52  # 12 groups of 4 and 52 plain ones are 100 requests
HERE = Path(__file__).parent


class Server:
    """`bash scripts/serve.sh` without its shell, on a checkpoint, until it is closed."""

    def __init__(self, folder: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "m3po_lab.serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--dtype", "float32", "--served-model-name", "tiny", *flags]
        env = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])  # for the worker's class
        self.log = folder / "server.log"
        with self.log.open("w") as stream:
            self._process = subprocess.Popen(words, stdout=stream, stderr=stream, env=env)
        deadline = time.monotonic() + 150
        while not self._is_up():
            assert self._process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def bags(self, group: str) -> dict[str, Any]:
        """The bags of a group that has ended: ids and weights, (N, T, K) each."""
        body = json.dumps({"method": "take_bags", "args": [group]}).encode()
        request = Request(f"{self.url}/collective_rpc", body, {"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=60))["results"][0]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """`serve(mode, *flags)`: a server on a tiny checkpoint of the mode, and its model."""
    servers: list[Server] = []

    def start(mode: str, *flags: str) -> tuple[Server, Any]:
        model = save(tmp_path, mode)
        servers.append(Server(tmp_path, "--max-model-len", "128", *flags))
        return servers[-1], model

    yield start
    for server in servers:
        server.close()


def save(folder: Path, mode: str) -> Any:
    model = checkpoint(folder, "llama", mode)
    settings = ThinkingSettings(mode=mode, cross_path_lambda=0.3).hyperparameters()
    write_checkpoint_info(folder, {**settings, "sampling_temperature": 1.0})
    return model


def test_a_hundred_requests_at_once_keep_to_their_groups_and_none_is_lost(serve: Any) -> None:
    """One client of the first group goes away on its way; the rest of its group goes on."""
    server, model = serve("m3po", "--worker-cls", "vllm_engine.BagsWorker", "--max-num-seqs", "40")
    asked = prompts([4 + number % 9 for number in range(GROUPS)])
    alone = prompts([3 + number % 11 for number in range(PLAIN)])

    async def one(client: AsyncOpenAI, prompt: list[int], more: dict[str, Any], **given: Any) -> list[int] | None:
        body = {"return_token_ids": True, "ignore_eos": True, "vllm_xargs": more}
        call = client.completions.create(model="tiny", prompt=prompt, max_tokens=LENGTH, extra_body=body, **given)
        return (await call).choices[0].token_ids

    async def gone(client: AsyncOpenAI, prompt: list[int], more: dict[str, Any]) -> None:
        body = {"ignore_eos": True, "vllm_xargs": more}
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=LENGTH, extra_body=body, stream=True
        )
        async for _ in stream:
            await stream.close()  # after its first token
            return

    async def all_at_once() -> tuple[list[Any], list[Any]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=240, max_retries=0) as client:
            thinking, plain = [], []
            for group, prompt in enumerate(asked):
                for path in range(PATHS_OF_A_GROUP):
                    more = {PATHS: PATHS_OF_A_GROUP, GROUP: f"g{group}", PATH: path, RECORD: 1}
                    call = gone if (group, path) == (0, 2) else one
                    thinking.append(asyncio.create_task(call(client, prompt, more)))
            for prompt in alone:
                plain.append(asyncio.create_task(one(client, prompt, {PATHS: 0}, temperature=0.0)))
            return await asyncio.gather(*thinking), await asyncio.gather(*plain)

    thinking, plain = asyncio.run(all_at_once())
    wanted = generate(model, None, alone, torch.full((PLAIN, LENGTH), 0.5), ends=[], greedy=True)[0]
    assert plain == wanted, "plain requests are those of the plain model"
    for group in range(GROUPS):
        completions = thinking[group * PATHS_OF_A_GROUP : (group + 1) * PATHS_OF_A_GROUP]
        bags = server.bags(f"g{group}")
        ids, weights = torch.tensor(bags["ids"]), torch.tensor(bags["weights"])
        paths = [path for path, tokens in enumerate(completions) if tokens is not None]
        assert len(paths) == (PATHS_OF_A_GROUP - 1 if group == 0 else PATHS_OF_A_GROUP)
        assert all(len(completions[path]) == LENGTH for path in paths)
        heard = 0
        for path in paths:
            for step in range(LENGTH):
                told = set(ids[path, step, 1:][weights[path, step, 1:] > 0].tolist())
                own = {completions[other][step] for other in paths if other != path}
                if group == 0 and step < LENGTH // 2:
                    own |= told - own if len(told - own) == 1 else set()  # of the one that has gone
                assert told <= own, f"group {group}, path {path}, step {step}: {told - own} of another group"
                heard += len(told)
        assert heard, "paths interact"


def test_the_paths_of_a_request_are_a_group_and_a_request_may_be_plain(serve: Any) -> None:
    """With thoughts: a request that says nothing thinks, so that its greedy tokens are not those of a plain one."""
    server, model = serve("hrpo")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)
    prompt = prompts()[0]

    def tokens(more: dict[str, Any], **given: Any) -> list[list[int]]:
        body = {"return_token_ids": True, "ignore_eos": True, **({"vllm_xargs": more} if more else {})}
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=LENGTH, extra_body=body, **given)
        return [choice.token_ids for choice in answer.choices]

    settings = ThinkingSettings(mode="hrpo", cross_path_lambda=0.3)
    thought = generate(model, settings, [prompt], torch.full((4, LENGTH), 0.5), ends=[], greedy=True)[0][0]
    model.config.thinking_residual_enabled = False
    plain = generate(model, None, [prompt], torch.full((1, LENGTH), 0.5), ends=[], greedy=True)[0]
    assert tokens({PATHS: 0}, temperature=0.0) == plain and thought != plain[0]
    assert tokens({}, temperature=0.0) == [thought]
    assert len(tokens({}, n=3)) == 3
    assert len(tokens({}, temperature=0.0, stop="zzzz")) == 1
    with pytest.raises(BadRequestError, match="top_p cannot be combined with thinking inputs"):
        tokens({}, top_p=0.5)
    with pytest.raises(BadRequestError, match="m3po_path='x' is none of the 2 paths of a group"):
        tokens({PATHS: 2, GROUP: "g", PATH: "x"})
    tags = [{PATHS: 2, GROUP: "g", PATH: 0}, {PATHS: 3, GROUP: "g", PATH: 1}, {PATHS: 1, GROUP: "h", PATH: 0}]
    with ThreadPoolExecutor(3) as pool:  # two clients with one name: both are told, and the third is another group
        calls = [pool.submit(tokens, tag) for tag in tags]
        assert [type(call.exception()).__name__ for call in calls] == ["InternalServerError"] * 2 + ["NoneType"]
    assert "paths of group g say different m3po_paths" in server.log.read_text()
    with pytest.raises(APIError):  # more paths than seats: the log names the argument
        tokens({PATHS: 2000, GROUP: "many", PATH: 0})
    assert "2000 paths behind a prompt of 4 tokens need 2000 max_num_seqs" in server.log.read_text()
    assert tokens({}, temperature=0.0) == [thought], "the server goes on"


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, "m3po")
    assert "m3po_vllm.worker.Worker" in server_flags(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "aslr_enabled": True}))
    with pytest.raises(UserError, match=r"has ASLR, which vLLM's forward has not \(make export-model"):
        server_flags(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a LoRA adapter; merge it first: make export-model"):
        server_flags(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json: give the folder of a checkpoint"):
        server_flags(tmp_path / "none")
