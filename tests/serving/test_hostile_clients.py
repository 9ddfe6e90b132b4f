"""Requests that mean harm get an error of one line in JSON, and the server goes on."""

import contextlib
import http.client
import json
import socket
import time

import jax
import pytest

import transformer_jax as tj
from tests.serving.running import SHAPE, make_served, served

pytest.importorskip("starlette", reason='needs pip install "transformer_jax[serve]"')
pytest.importorskip("prometheus_client")

GENERATES, CHATS = "/v1/completions", "/v1/chat/completions"
DEEP = '{"a":' * 900 + "1" + "}" * 900


@pytest.fixture(scope="module")
def address():
    encoder = tj.Encoder(tj.ModelConfig(family="encoder", num_layers=1, max_len=64, **SHAPE), key=jax.random.key(2))
    with served({"tiny": make_served(max_batch=2), "encoder": make_served("encoder", model=encoder)},
                body_seconds=0.5) as address:
        host, port = address.removeprefix("http://").split(":")
        yield host, int(port)


def ask(address, method, route, body=None):
    """The status and the content of an answer."""
    connection = http.client.HTTPConnection(*address, timeout=300)
    connection.request(method, route, body, {"Content-Type": "application/json"} if body else {})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def is_well(address):
    return ask(address, "GET", "/health") == (200, {"status": "ok"})


def raw(address, content, wait=5.0):
    """What the server answers to some bytes."""
    with socket.create_connection(address, timeout=wait) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # the server may end the connection before it has read everything
            connection.sendall(content)
            while part := connection.recv(1 << 16):
                answer += part
    return answer


BODIES = [
    (GENERATES, '{"model": ["tiny"]}', 404, "there is no model ['tiny']"),
    (GENERATES, '{"model": {"a": {}}}', 404, "there is no model"),
    (GENERATES, '{"model": 3}', 404, "there is no model 3"),
    (GENERATES, '{"prompt": "\\ud800"}', 400, "half a surrogate pair"),
    (GENERATES, '{"prompt": [[1], "a", null]}', 400, "neither a string nor a list of token ids"),
    (GENERATES, '{"prompt": [[]]}', 400, "neither a string nor a list of token ids"),
    (GENERATES, '{"prompt": {"a": 1}}', 400, "prompt must be"),
    (GENERATES, '{"prompt": [1, "a"]}', 400, "prompt"),
    (GENERATES, '{"prompt": [1e400]}', 400, "prompt"),
    (GENERATES, '{"prompt": [[true]]}', 400, "prompt"),
    (GENERATES, '{"prompt": [[-1]]}', 400, "prompt"),
    (GENERATES, f'{{"prompt": [[{10**30}]]}}', 400, "prompt"),
    (GENERATES, f'{{"max_tokens": {"9" * 5000}}}', 400, "not valid JSON"),
    (GENERATES, '{"max_tokens": NaN}', 400, "max_tokens=nan must be a whole number"),
    (GENERATES, '{"max_tokens": -1}', 400, "max_tokens=-1 must be a whole number"),
    (GENERATES, f'{{"max_tokens": {10**300}}}', 400, "new ones are requested"),
    (GENERATES, '{"temperature": Infinity}', 400, "temperature=inf must be"),
    (GENERATES, '{"temperature": "hot"}', 400, "temperature="),
    (GENERATES, '{"n": 1e308}', 400, "n=1e+308 must be a whole number"),
    (GENERATES, f'{{"seed": {10**30}}}', 400, "seed=1000"),
    (GENERATES, f'{{"logit_bias": {{"{"9" * 5000}": 1}}}}', 400, "digits"),
    (GENERATES, '{"logit_bias": {"1": NaN}}', 400, "logit_bias must be an object"),
    (GENERATES, '{"logit_bias": [1]}', 400, "logit_bias must be an object"),
    (GENERATES, '{"stop": [["a"]]}', 400, "stop="),
    (GENERATES, '{"stream": "yes"}', 400, "stream='yes' must be true or false"),
    (GENERATES, f'{{"stop": {DEEP}}}', 400, "stop="),
    (GENERATES, f'{{"response_format": {DEEP}}}', 400, "response_format="),
    (CHATS, '{"messages": "hello"}', 400, "messages must be a list"),
    (CHATS, '{"messages": [null]}', 400, ""),
    (CHATS, f'{{"messages": [{DEEP}]}}', 400, ""),
    ("/v1/embeddings", '{"input": ["a", [[1]]]}', 400, "input"),
    ("/v1/embeddings", '{"input": "a", "encoding_format": ["float"]}', 400, "encoding_format="),
    ("/v1/embeddings", '{"input": "a", "pooling": "largest"}', 400, "pooling"),
    ("/v1/score", '{"input": ["\\ud800"]}', 400, "half a surrogate pair"),
    ("/v1/score", '{"input": [""]}', 400, "none of them empty"),
    ("/v1/fill-mask", '{"input": "a", "model": "encoder"}', 400, "mask"),
    ("/v1/translate", '{"input": "a"}', 400, "needs an encoder-decoder"),
    ("/v1/attention", '{"tokens": [3, 4], "query": 99}', 400, "query=99 must be a whole number from -2 to 1"),
    ("/tokenize", '{"prompt": 3}', 400, "prompt=3 must be a string"),
]


def test_fields_of_every_kind(address):
    for route, body, status, message in BODIES:
        found, content = ask(address, "POST", route, body)
        assert found == status, (body[:200], content)
        error = content["error"]["message"]
        assert message in error and "\n" not in error and len(error) < 500, (body[:200], error)
    # A key that is given twice has its last value, as in every parser of JSON.
    assert ask(address, "POST", "/tokenize", '{"prompt": "the fox", "prompt": "dog"}')[1]["count"] == 3


def test_a_body_that_does_not_arrive_ends_after_a_while_and_stops_nobody(address):
    begin = time.monotonic()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(address, timeout=120) as slow:
        slow.sendall(head)
        assert is_well(address)
        answer = b""
        while b"}}" not in answer:
            answer += slow.recv(1 << 16)
    assert b" 408 " in answer and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"] == (
        "the body did not arrive within 0.5 s")
    assert time.monotonic() - begin >= 0.5


@pytest.mark.long
@pytest.mark.parametrize("content", [
    b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(20_000)) + b"\r\n",
    b"\xff\xfe\x00 nothing of HTTP\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\nffffffffffffffff\r\n",
    b"GET /v1/models/%ff%fe%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: \xff\xfe\r\nConnection: close\r\n\r\n",
])
def test_bytes_that_are_no_request(address, content):
    answer = raw(address, content)
    assert answer == b"" or b"HTTP/1.1 500" not in answer[:20]
    assert is_well(address)
