"""The engine against ``tj.generate``: whatever the neighbours and the time of arrival, a request gets
the tokens that it would get alone."""

import itertools
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from running import TOKENIZER, make_decoder

import transformer_jax as tj
from transformer_jax.serving import ClosedError, Engine, QueueFullError, TextRequest
from transformer_jax.serving import slots as slots_module

SAMPLINGS = [
    tj.Sampling(), tj.Sampling(temperature=0), tj.Sampling(temperature=0.7, top_k=9, bias={5: 2.0}),
    tj.Sampling(top_p=0.8, repetition_penalty=1.3), tj.Sampling(temperature=0, no_repeat_ngram=2),
    tj.Sampling(min_p=0.1, presence_penalty=1.0, frequency_penalty=0.5, min_new_tokens=5, typical_p=0.9)]


@pytest.fixture(scope="module")
def model():
    return make_decoder(positions="alibi", max_len=160)


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, tokenizer=TOKENIZER, max_batch=8, num_prefixes=4)
    yield engine
    engine.close()


def requests_for(seed, number, longest=130):
    """Requests of different lengths and settings; a third of them share a beginning of 40 tokens."""
    draw = random.Random(seed)
    system = [draw.randrange(5, 40) for _ in range(40)]
    for index in range(number):
        prompt = system * (index % 3 == 0) + [draw.randrange(5, 40) for _ in range(draw.randrange(1, 30))]
        yield TextRequest(prompt, draw.randrange(1, longest - len(prompt)), draw.choice(SAMPLINGS),
                          jax.random.key(1000 * seed + index), stop=draw.choice([[], ["e"], ["th", "zz"]]))


def alone(model, request):
    return tj.generate(model, [request.prompt], tokenizer=TOKENIZER, key=jnp.stack([request.key]),
                       max_new_tokens=request.max_new_tokens, sampling=request.sampling, stop=request.stop,
                       end_ids=request.end_ids)


def check(model, request, reply):
    new, expected = reply.result(60), alone(model, request)
    assert (new.tokens, new.text, new.reason) == (expected.tokens[0], expected.texts[0], expected.finish_reasons[0])
    np.testing.assert_allclose(new.logprobs, expected.logprobs[0], atol=1e-4)


@pytest.mark.long
def test_64_requests_of_several_clients_get_the_tokens_of_generate(engine, model):
    requests = list(requests_for(1, 64))
    replies = {}

    def client(mine, pauses):
        for number in mine:
            time.sleep(pauses.random() * 0.02)
            replies[number] = engine.submit(requests[number])

    clients = [threading.Thread(target=client, args=(range(first, 64, 8), random.Random(first))) for first in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for number, request in enumerate(requests):
        check(model, request, replies[number])
    assert sum(reply.num_reused > 0 for reply in replies.values()) > 5
    assert engine.num_running == engine.num_waiting == 0


@pytest.mark.long
@pytest.mark.parametrize("changes", [
    dict(positions="learned"), dict(positions="rope", sliding_window=7, num_kv_heads=1), dict(positions="relative"),
    dict(positions="sinusoidal", norm_position="post")], ids=str)
def test_decoders_of_all_kinds_get_the_tokens_of_generate(changes):
    model = make_decoder(max_len=160, num_layers=2, **changes)
    engine = Engine(model, tokenizer=TOKENIZER, max_batch=4)
    requests = list(requests_for(4, 12))
    for request, reply in [(request, engine.submit(request)) for request in requests]:
        check(model, request, reply)
    engine.close()


def test_a_handful_of_programs_is_compiled(engine, model):
    """One decoding program for each shape of the batch, and one or two to join it (for one request
    and for a group), however many requests there were."""
    num_joins = slots_module.join._cache_size()
    for reply in [engine.submit(request) for request in requests_for(2, 24)]:
        reply.result(60)
    shapes = engine.num_programs
    assert shapes <= len(engine._batch.row_counts) * len(engine._batch.capacities) == 4
    num_decodes = slots_module.decode.num_programs
    for reply in [engine.submit(request) for request in requests_for(3, 24)]:
        reply.result(60)
    assert slots_module.decode.num_programs - num_decodes == engine.num_programs - shapes
    assert slots_module.join._cache_size() - num_joins <= 2 * engine.num_programs


@pytest.mark.long
def test_the_beginning_of_a_conversation_is_read_once(engine, model):
    first = TextRequest(TOKENIZER.encode("the quick brown fox jumps over the lazy dog"), 30, key=jax.random.key(0),
                        end_ids=())
    reply = engine.submit(first)
    said = [*first.prompt, *reply.result(60).tokens]
    second = TextRequest([*said, *TOKENIZER.encode(" and then sleeps")], 10, key=jax.random.key(1))
    check(model, second, reply := engine.submit(second))
    assert len(said) - 16 <= reply.num_reused <= len(said)


def test_alternatives_and_scores_of_the_prompt_are_those_of_the_model(engine, model):
    prompt = TOKENIZER.encode("the lazy dog " * 4)
    reply = engine.submit(TextRequest(prompt, 5, tj.Sampling(temperature=0), wants_alternatives=True,
                                      scores_prompt=True, end_ids=()))
    tokens = [*prompt, *reply.result(60).tokens]
    logprobs_TV = np.asarray(jax.nn.log_softmax(tj.forward(model, np.array([tokens]))[0]))[:-1]
    expected = logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose([*reply.prompt_scores.logprobs, *reply.new.logprobs], expected, atol=1e-4)
    top_tokens = [*reply.prompt_scores.top_tokens, *reply.top_tokens]
    top_logprobs = [*reply.prompt_scores.top_logprobs, *reply.top_logprobs]
    np.testing.assert_allclose(top_logprobs, np.sort(logprobs_TV, axis=1)[:, :-21:-1], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(logprobs_TV, np.array(top_tokens), 1), top_logprobs, atol=1e-4)
    assert engine.submit(TextRequest(prompt, 0, scores_prompt=True)).result(60).tokens == []


def test_pieces_are_the_text(engine):
    request = TextRequest(TOKENIZER.encode("the "), 40, key=jax.random.key(2), stop=["qq"])
    assert "".join(engine.submit(request).pieces()) == engine.submit(request).result(60).text


def test_a_cancelled_request_frees_its_slot(model):
    engine = Engine(model, tokenizer=TOKENIZER, max_batch=2)
    endless = TextRequest([5], 150, key=jax.random.key(0), end_ids=())
    hold = threading.Event()
    decode = engine._batch.decode
    engine._batch.decode = lambda: (time.sleep(0.02), hold.is_set() and time.sleep(0.2), decode())[2]
    hold.set()
    first, second, third = (engine.submit(endless) for _ in range(3))
    first.cancel()
    third.cancel()
    first.result(60), third.result(60)
    hold.clear()
    check(model, endless, second)
    assert engine.counts["cancelled"] == 2 and engine.counts["completed"] == 1
    assert first.new.reason is None and engine.num_running == 0
    engine.close()


def test_a_full_queue_and_a_closed_engine_refuse_requests(model):
    engine = Engine(model, max_batch=1, queue_limit=2)
    request = TextRequest([5, 6], 100, key=jax.random.key(0))
    replies = []
    with pytest.raises(QueueFullError, match="requests are waiting"):
        for _ in range(100):
            replies.append(engine.submit(request))
    engine.close()  # completes what was requested
    assert all(reply.is_done and reply.new.reason for reply in replies)
    with pytest.raises(ClosedError):
        engine.submit(request)


def test_a_grammar_masks_the_tokens_of_its_row_only(engine, model):
    class Alternating:
        """Allows token 7, then 9, then 7 and so on, five times."""

        definition = "7 9 7 9 7"

        def __init__(self):
            self.tokens, self.is_complete = itertools.cycle([7, 9]), False
            self.next, self.left = next(self.tokens), 5

        def allowed(self):
            bits = np.zeros(-(-TOKENIZER.vocab_size // 32), np.uint32)
            bits[self.next // 32] = 1 << (self.next % 32)
            return bits

        def push(self, token):
            assert token == self.next
            self.next, self.left = next(self.tokens), self.left - 1
            self.is_complete = self.left == 0

    free = TextRequest([5, 6], 20, key=jax.random.key(0))
    constrained = engine.submit(TextRequest([5, 6], 20, key=jax.random.key(0), constraint=Alternating()))
    check(model, free, engine.submit(free))
    assert constrained.result(60).tokens == [7, 9, 7, 9, 7] and constrained.new.reason == "grammar"


def test_a_model_that_is_not_finite_fails_its_requests_and_says_so():
    model = make_decoder()
    model.final_norm.scale[...] = model.final_norm.scale[...] * jnp.nan
    engine = Engine(model)
    for _ in range(2):  # the engine lives on
        with pytest.raises(ValueError, match="new token 1 are NaN or infinite, because weights of the model are"):
            engine.submit(TextRequest([5], 3, key=jax.random.key(0))).result(60)
    assert engine.counts["failed"] == 2
    engine.close()


@pytest.mark.parametrize(("options", "message"), [
    (dict(prompt=[]), "empty"), (dict(prompt=[10**6]), "outside the vocabulary"), (dict(max_new_tokens=160), "exceed"),
    (dict(key=None), "sampling needs key"), (dict(stop=[""]), "empty"), (dict(max_new_tokens=-1), "max_new_tokens=-1")])
def test_requests_that_cannot_be_answered_are_refused_at_once(engine, options, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(TextRequest(**(dict(prompt=[5], max_new_tokens=5, key=jax.random.key(0)) | options)))


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Engine is for models of family decoder"):
        Engine(tj.Encoder(tj.ModelConfig(family="encoder", **running.SHAPE), key=jax.random.key(0)))
