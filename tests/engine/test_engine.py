"""The engine answers as llama.cpp does: the same text each time, whole or streamed, with true probabilities."""

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_gguf import CONTEXT_LENGTH, vocabulary, write_tiny_gguf, write_tiny_lora

from ollama_forge.engine import Engine, Sampling, loading_from_parameters, open_engine, sampling_from_parameters
from ollama_forge.errors import EngineError, NotFoundError, UsageError

GREEDY_24 = Sampling(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[Engine]:
    with open_engine(model_path, n_threads=1) as opened:
        yield opened


def test_greedy_gives_the_same_text_every_time_and_in_every_process(engine: Engine, model_path: Path) -> None:
    first = engine.generate("the cat", GREEDY_24)
    engine.generate("something else", GREEDY_24)
    assert engine.generate("the cat", GREEDY_24).token_ids == first.token_ids
    with open_engine(model_path, n_threads=1) as another:
        assert another.generate("the cat", GREEDY_24).token_ids == first.token_ids
    assert first.text.isascii() and len(first.text) >= 24


def test_a_seed_repeats_a_sampled_text_and_another_seed_does_not(engine: Engine) -> None:
    hot = {"max_tokens": 24, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    assert engine.generate("a", Sampling(seed=7, **hot)).text == engine.generate("a", Sampling(seed=7, **hot)).text
    assert engine.generate("a", Sampling(seed=7, **hot)).text != engine.generate("a", Sampling(seed=8, **hot)).text


def test_max_tokens_ends_with_length(engine: Engine) -> None:
    answer = engine.generate("the", Sampling(max_tokens=5, temperature=0.0))
    assert (answer.stop_reason, answer.n_tokens, len(answer.token_ids)) == ("length", 5, 5)


def test_a_full_context_ends_with_length(engine: Engine) -> None:
    answer = engine.generate("the", Sampling(temperature=0.0))
    assert answer.stop_reason == "length"
    assert answer.prompt_tokens + answer.n_tokens >= CONTEXT_LENGTH


def test_a_model_that_ends_its_answer_stops(tmp_path: Path) -> None:
    with open_engine(write_tiny_gguf(tmp_path / "short.gguf", ends_at_once=True), n_threads=1) as engine:
        answer = engine.generate("the", GREEDY_24)
    assert (answer.text, answer.stop_reason, answer.stop_string) == ("", "stop", None)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(engine: Engine, streamed: bool) -> None:
    whole = engine.generate("the cat", GREEDY_24)
    pieces = [engine.detokenize([token]) for token in whole.token_ids]
    start = sum(map(len, pieces[:9])) + len(pieces[9]) - 1
    stop = whole.text[start : start + 3]
    pieces_heard: list[str] = []
    sampling = Sampling(max_tokens=24, temperature=0.0, stop=("never said", stop))
    answer = engine.generate("the cat", sampling, on_text=pieces_heard.append if streamed else None)
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.stop_reason, answer.stop_string) == ("stop", stop)
    assert answer.n_tokens < whole.n_tokens
    assert not streamed or "".join(pieces_heard) == answer.text


def test_streamed_text_equals_the_whole(engine: Engine) -> None:
    pieces: list[str] = []
    streamed = engine.generate("the cat", GREEDY_24, on_text=pieces.append)
    whole = engine.generate("the cat", GREEDY_24)
    assert "".join(pieces) == streamed.text == whole.text
    assert len(pieces) > 5
    assert streamed.n_tokens == whole.n_tokens == 24


def test_logprobs_cover_the_vocabulary_and_sum_to_one(engine: Engine) -> None:
    sampling = Sampling(max_tokens=4, temperature=0.9, top_k=2, seed=3)
    answer = engine.generate("the", sampling, n_logprobs=engine.n_vocab)
    assert engine.n_vocab == len(vocabulary())
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert sorted(entry.top) == list(range(engine.n_vocab))
        assert math.isclose(sum(math.exp(value) for value in entry.top.values()), 1.0, abs_tol=1e-4)
        assert entry.logprob == pytest.approx(entry.top[entry.token_id])


def test_token_ids_are_a_prompt_as_they_are(engine: Engine) -> None:
    ids = engine.tokenize("the cat", add_special=True)
    assert ids[0] == 1
    by_ids = engine.generate(ids, GREEDY_24)
    assert by_ids.token_ids == engine.generate("the cat", GREEDY_24).token_ids
    assert by_ids.prompt_tokens == len(ids)


def test_tokenize_and_detokenize_are_each_others_way_back(engine: Engine) -> None:
    text = "the caf\u00e9 \U0001f600<|im_end|>"
    assert engine.detokenize(engine.tokenize(text)).strip() == text
    assert 4 in engine.tokenize(text)
    assert 4 not in engine.tokenize(text, parse_special=False)


def test_chat_uses_the_models_own_template(engine: Engine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    prompt = engine.apply_template(messages)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.chat(messages, GREEDY_24).text == engine.generate(prompt, GREEDY_24).text


def test_a_finished_conversation_is_rendered_whole(engine: Engine) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rendered = engine.apply_template(messages, add_generation_prompt=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


def test_a_model_without_template_generates_but_does_not_chat_unless_one_is_given(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "plain.gguf", chat_template=None)
    with open_engine(path, n_threads=1) as engine:
        assert engine.generate("the", GREEDY_24).n_tokens == 24
        with pytest.raises(EngineError, match="has no chat template"):
            engine.chat([{"role": "user", "content": "hi"}])
    with open_engine(path, n_threads=1, chat_template="chatml") as engine:
        assert engine.apply_template([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user\nhi<|im_end|>")


def test_a_template_that_refuses_the_conversation_says_why(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}"
        "{% if message['content'] == 'no' %}{{ raise_exception('I refuse no') }}{% endif %}"
        "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    with open_engine(write_tiny_gguf(tmp_path / "t.gguf", chat_template=template), n_threads=1) as engine:
        assert engine.apply_template([{"role": "user", "content": "yes"}]) == "user: yes\n"
        with pytest.raises(EngineError, match="I refuse no"):
            engine.chat([{"role": "user", "content": "no"}])


@pytest.mark.parametrize("template", ["{% for message in messages %}{{ message", "{{ raise_exception('never') }}"])
def test_a_template_that_llama_cpp_cannot_use_leaves_plain_prompts(template: str, tmp_path: Path) -> None:
    with open_engine(write_tiny_gguf(tmp_path / "t.gguf", chat_template=template), n_threads=1) as engine:
        assert engine.generate("the", GREEDY_24).n_tokens == 24
        with pytest.raises(EngineError, match=r"chat template of .* cannot be used") as caught:
            engine.chat([{"role": "user", "content": "hi"}])
        assert "template" in caught.value.why


def test_an_adapter_changes_what_the_model_says_and_scale_zero_does_not(model_path: Path, tmp_path: Path) -> None:
    adapter = write_tiny_lora(tmp_path / "with, comma.gguf")
    said = {}
    for scale in (0.0, 1.0):
        with open_engine(model_path, adapters=[(adapter, scale)], n_threads=1) as engine:
            said[scale] = engine.generate("the cat", GREEDY_24).text
    with open_engine(model_path, n_threads=1) as engine:
        plain = engine.generate("the cat", GREEDY_24).text
    assert said[0.0] == plain != said[1.0]


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_size(engine: Engine) -> None:
    with pytest.raises(EngineError) as caught:
        engine.generate("z" * 2 * CONTEXT_LENGTH, GREEDY_24)
    assert str(CONTEXT_LENGTH) in caught.value.why
    assert "num_ctx" in caught.value.next
    assert engine.generate("the", GREEDY_24).n_tokens == 24


def test_the_context_is_never_larger_than_the_models(engine: Engine, model_path: Path) -> None:
    assert engine.context_length == CONTEXT_LENGTH
    with open_engine(model_path, context_length=256, n_threads=1) as small:
        assert small.context_length == 256


def test_the_port_refuses_whoever_has_no_key(engine: Engine) -> None:
    url = engine._process.reply["url"]
    assert url.startswith("http://127.0.0.1:")
    for key in (None, "wrong"):
        request = urllib.request.Request(
            f"{url}/completion",
            json.dumps({"prompt": "the", "n_predict": 1}).encode(),
            {"Authorization": f"Bearer {key}"} if key else {},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 401
        caught.value.close()


def test_modelfile_parameters_become_sampling_and_loading() -> None:
    parameters = {"temperature": 0, "num_predict": -1, "stop": ("a", "b"), "seed": -1, "num_ctx": 2048, "num_gpu": 0}
    sampling = sampling_from_parameters(parameters | {"top_k": 5, "repeat_penalty": 1.1, "num_keep": 4})
    assert sampling == Sampling(None, 0.0, None, top_k=5, repeat_penalty=1.1, stop=("a", "b"))
    assert loading_from_parameters(parameters) == {"context_length": 2048, "n_gpu_layers": 0}
    assert loading_from_parameters({"num_gpu": -1, "num_thread": 0}) == {}


@pytest.mark.parametrize("parameters", [{"temprature": 1.0}, {"top_k": "many"}, {"min_p": math.nan}, {"seed": True}])
def test_an_unknown_parameter_or_a_wrong_value_is_a_usage_error(parameters: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(parameters))):
        sampling_from_parameters(parameters)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_engine(tmp_path / "none.gguf")


def test_the_child_has_its_own_process(engine: Engine) -> None:
    assert engine.pid != os.getpid()
