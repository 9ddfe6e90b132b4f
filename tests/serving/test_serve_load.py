"""The program under load and at its end: no request is lost or answered twice, and SIGTERM completes
what was requested."""

import asyncio
import random
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
import running

import transformer_jax as tj

httpx = running.import_httpx()
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.long
NUM_REQUESTS, NUM_CLIENTS = 2000, 32


def test_2000_requests_with_random_cancels_are_answered_once_each():
    """Every answer is the one of its own seed; every cancelled request frees its slot."""
    served = running.make_served(max_batch=16, queue_limit=NUM_REQUESTS)
    seen: dict[int, list[str]] = {number: [] for number in range(NUM_REQUESTS)}
    cancelled = set()

    async def ask(client, address, number):
        draw = random.Random(number)
        body = {"prompt": "the quick"[:1 + number % 9], "max_tokens": 1 + number % 7, "seed": number % 50}
        request = asyncio.create_task(client.post(f"{address}/v1/completions", json=body, timeout=300))
        if draw.random() < 0.2:
            await asyncio.sleep(draw.random() * 0.05)
            if request.cancel():
                cancelled.add(number)
                await asyncio.gather(request, return_exceptions=True)
                return
        response = await request
        assert response.status_code == 200, response.text
        seen[number].append(response.json()["choices"][0]["text"])

    async def everything(address):
        numbers = iter(range(NUM_REQUESTS))
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=NUM_CLIENTS)) as client:
            async def worker():
                for number in numbers:
                    await ask(client, address, number)
            await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(NUM_CLIENTS))), 400)

    with running.served({"tiny": served}) as address:
        asyncio.run(everything(address))
        end = time.monotonic() + 60
        while served.engine.num_running or served.engine.num_waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert len(cancelled) > NUM_REQUESTS // 20
    by_request: dict[tuple, set[str]] = {}
    for number, texts in seen.items():
        assert len(texts) == (number not in cancelled), number
        for text in texts:
            by_request.setdefault((number % 9, number % 7, number % 50), set()).add(text)
    assert all(len(texts) == 1 for texts in by_request.values())
    counts = served.engine.counts
    assert counts["requests"] == counts["completed"] + counts["cancelled"] and counts["failed"] == 0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model = running.make_decoder(banned_ids=running.TOKENIZER.end_ids)
    tj.save(folder, tj.Bundle(model, running.TOKENIZER, model.config))
    return folder


def start(*arguments):
    process = subprocess.Popen([sys.executable, "-m", "experiments.serve", "--port=0", *arguments],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.fullmatch(r"Serving tiny at (http://\S+)\n", line)
    assert found, line + process.stderr.read()
    return process, found[1]


def test_sigterm_completes_what_was_requested_and_takes_no_more(workdir):
    process, address = start(f"--workdir={workdir}", "--max_batch=4", "--max_context=200")
    try:
        body = {"prompt": "the", "max_tokens": 180, "seed": 1, "stream": True}
        with httpx.Client(timeout=120) as client:
            with client.stream("POST", f"{address}/v1/completions", json=body) as response:
                lines = response.iter_lines()
                first = next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert first.startswith("data: {") and rest[-1] == "data: [DONE]"
            assert '"finish_reason": "length"' in rest[-2]
            with pytest.raises(httpx.ConnectError):
                httpx.post(f"{address}/v1/completions", json=body)
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_chat_in_the_terminal_has_several_turns(tmp_path):
    tokenizer = tj.Tokenizer.train(running.TEXT * 3, kind="char", chat=True)
    config = tj.ModelConfig(**(running.SHAPE | dict(vocab_size=tokenizer.vocab_size, max_len=128, num_layers=1)))
    model = tj.Decoder(config, key=jax.random.key(0))
    tj.save(tmp_path / "chat", tj.Bundle(model, tokenizer, config))
    result = subprocess.run(
        [sys.executable, "-m", "experiments.chat", f"--workdir={tmp_path / 'chat'}", "--system=be the fox",
         "--temperature=0", "--max_new_tokens=9"], input="the dog\nand then\n/new\nthe dog\n/quit\n",
        capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    said, messages = [], [tj.data.Message("system", "be the fox")]
    for text in ("the dog", "and then"):
        messages.append(tj.data.Message("user", text))
        said += tj.generate(model, [tj.data.encode_prompt(messages, tokenizer)], tokenizer=tokenizer,
                            max_new_tokens=9, sampling=tj.Sampling(temperature=0)).texts
        messages.append(tj.data.Message("assistant", said[-1]))
    assert result.stdout == f"> {said[0]}\n> {said[1]}\n> > {said[0]}\n> "


@pytest.mark.parametrize(("arguments", "message"), [
    (["--host=0.0.0.0"], "can be reached from other computers"), (["--api_key="], "the API key is empty"),
    (["--max_context=100000"], "max_context=100000 must be")])
def test_wrong_flags_end_with_one_line(workdir, arguments, message):
    result = subprocess.run([sys.executable, "-m", "experiments.serve", f"--workdir={workdir}", "--port=0", *arguments],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr
