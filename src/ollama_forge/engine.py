"""Run a GGUF with llama.cpp: generate, chat, tokenize, log-probabilities, LoRA adapters.

In: a path and how to sample. Out: text, token ids, log-probabilities. llama.cpp (xllamacpp) lives in a child process,
so a bad file or an abort ends the child and is an `EngineError` here; `engine_process` owns that life. What the model
is asked travels over llama-server's own HTTP endpoints on 127.0.0.1, with a random key for each child.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ollama_forge.engine_process import EngineProcess, default_threads
from ollama_forge.engine_sampling import GREEDY, Sampling, loading_from_parameters, sampling_from_parameters
from ollama_forge.errors import EngineError, ForgeError, NotFoundError
from ollama_forge.gguf.reader import open_gguf

__all__ = [
    "GREEDY",
    "Engine",
    "Generation",
    "Sampling",
    "TokenLogprobs",
    "loading_from_parameters",
    "open_engine",
    "sampling_from_parameters",
]

DEFAULT_CONTEXT_LENGTH = 4096
LOAD_TIMEOUT_SECONDS = 600.0
REQUEST_TIMEOUT_SECONDS = 3600.0

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}` and what else the model's template reads (`tool_calls`, ...)."""


@dataclass(frozen=True)
class TokenLogprobs:
    """One generated token: natural logarithms of probabilities over the whole vocabulary, before any sampling setting.

    Attributes:
        token_id: the token that was taken.
        logprob: of that token.
        top: token id -> logprob of the `n_logprobs` likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True)
class Generation:
    """What the model said.

    Attributes:
        text: without the stop string.
        token_ids: every generated token, the end token and those of the stop string included; empty when the text was
            streamed (llama.cpp then does not tell the ids of characters that are spread over tokens).
        n_tokens: how many were generated, always.
        stop_reason: `stop` (the model ended, or a stop string came) or `length` (max_tokens, or the context is full).
        stop_string: the stop string that came, or None.
        logprobs: one for each token from the first on; empty unless asked for. When a stop string came, its tokens,
            and a few before them, can be missing at the end.
        prompt_tokens: tokens of the prompt, the begin token included.
        seconds: from the request to the last token.
    """

    text: str
    token_ids: tuple[int, ...]
    n_tokens: int
    stop_reason: str
    stop_string: str | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_tokens: int
    seconds: float


class Engine:
    """A loaded model. One request at a time runs; more wait. Close it, or use it in a `with` block.

    Attributes:
        model_path: the GGUF.
        context_length: tokens of prompt and answer together.
        n_vocab: tokens that the model knows (rows of its output).
    """

    def __init__(
        self, process: EngineProcess, *, no_template: EngineError | None, request_timeout_seconds: float
    ) -> None:
        self._process = process
        self._no_template = no_template
        self._timeout_seconds = request_timeout_seconds
        self.model_path = process.model_path
        properties = self._call("GET", "/props", None, "read its properties", None)
        models = self._call("GET", "/v1/models", None, "read its properties", None)
        self.context_length = int(properties["default_generation_settings"]["n_ctx"])
        self.n_vocab = int(models["data"][0]["meta"]["n_vocab"])

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; all its memory is given back."""
        self._process.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: add what the model adds by itself (its begin token).
            parse_special: read `<|im_start|>` and its like as the one token that it names.
        """
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return [int(token) for token in self._call("POST", "/tokenize", body, "tokenize", None)["tokens"]]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._call("POST", "/detokenize", {"tokens": list(token_ids)}, "detokenize", None)["content"])

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's own chat template makes of a conversation, as llama.cpp renders it.

        A begin token that the tokenizer adds by itself is not part of it.

        Raises:
            EngineError: the model has no chat template, or it refuses the conversation.
        """
        if self._no_template:
            raise self._no_template
        body: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        if template_arguments:
            body["chat_template_kwargs"] = dict(template_arguments)
        return str(self._call("POST", "/apply-template", body, "render the conversation", None)["prompt"])

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] | None = None,
        *,
        n_logprobs: int = 0,
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
        reuse_prompt: bool = False,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Answer a conversation with the model's own template; see `apply_template` and `generate`."""
        prompt = self.apply_template(messages, tools=tools, template_arguments=template_arguments)
        return self.generate(
            prompt, sampling, n_logprobs, on_text, reuse_prompt=reuse_prompt, timeout_seconds=timeout_seconds
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = GREEDY,
        n_logprobs: int = 0,
        on_text: Callable[[str], None] | None = None,
        *,
        reuse_prompt: bool = False,
        timeout_seconds: float | None = None,
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: a text (the begin token is added where the model wants one, special tokens in it are read as such),
                or token ids, taken as they are.
            n_logprobs: likeliest tokens to report for each generated one, up to `n_vocab`. They travel as text: all of
                a vocabulary of 150,000 takes seconds for each token, twenty of them nothing.
            on_text: called with each piece of text as it comes; with `n_logprobs`, once with the whole text.
            reuse_prompt: keep what is computed of the last prompt for one that begins the same. Faster in a
                conversation, but the last digits of probabilities then depend on what was asked before.
            timeout_seconds: for the whole request; None: as given to `open_engine`.

        Raises:
            EngineError: the prompt is longer than the context, the child died, or the time is over.
        """
        body = _completion_body(prompt, sampling, n_logprobs, reuse_prompt)
        started = time.monotonic()
        if on_text is None or n_logprobs:
            reply = self._call("POST", "/completion", body, "generate", timeout_seconds)
            text = str(reply["content"])
            if on_text:
                on_text(text)
        else:
            pieces = []
            reply = {}
            for event in self._stream("/completion", {**body, "stream": True}, "generate", timeout_seconds):
                piece = str(event.get("content", ""))
                if piece:
                    pieces.append(piece)
                    on_text(piece)
                reply = event
            text = "".join(pieces)
        return _read_generation(reply, text, time.monotonic() - started)

    def _call(self, method: str, path: str, body: Any, doing: str, timeout_seconds: float | None) -> Any:
        for reply in self._replies(method, path, body, doing, timeout_seconds, streamed=False):
            return reply
        raise self._trouble(doing, "an empty answer")

    def _stream(self, path: str, body: Any, doing: str, timeout_seconds: float | None) -> Iterator[dict[str, Any]]:
        last: dict[str, Any] = {}
        for last in self._replies("POST", path, body, doing, timeout_seconds, streamed=True):
            yield last
        if not last.get("stop"):
            raise self._trouble(doing, "the answer broke off")

    def _replies(
        self, method: str, path: str, body: Any, doing: str, timeout_seconds: float | None, *, streamed: bool
    ) -> Iterator[Any]:
        """The JSON documents of one answer. Closing the connection early makes llama.cpp stop generating."""
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + limit
        address = urlsplit(self._process.reply["url"])
        connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=limit)
        headers = {"Authorization": f"Bearer {self._process.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            sock = connection.sock
            response = connection.getresponse()
            if response.status != 200 or not streamed:
                document = json.loads(response.read())
                if response.status != 200:
                    raise self._refusal(doing, document)
                yield document
                return
            for line in response:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                sock.settimeout(remaining)
                kind, _, value = line.partition(b": ")
                if kind == b"error":
                    raise self._refusal(doing, {"error": json.loads(value)})
                if kind == b"data" and value.strip() != b"[DONE]":
                    event = json.loads(value)
                    if "error" in event:
                        raise self._refusal(doing, event)
                    yield event
        except TimeoutError as exc:
            raise EngineError(
                f"llama.cpp did not {doing} with {str(self.model_path)!r} within {limit:g} seconds",
                why=self._process.last_words(),
                next="Ask for fewer tokens (--param num_predict=100), or use a smaller quantization.",
            ) from exc
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as exc:
            raise self._trouble(doing, str(exc) or type(exc).__name__) from exc
        finally:
            connection.close()

    def _refusal(self, doing: str, document: Any) -> EngineError:
        error = document.get("error") if isinstance(document, dict) else None
        message = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        too_long = isinstance(error, dict) and error.get("type") == "exceed_context_size_error"
        return EngineError(
            f"llama.cpp did not {doing} with {str(self.model_path)!r}: {message[:2000]}",
            why=f"The context has {self.context_length} tokens." if too_long else "",
            next="Use a larger context (--param num_ctx=8192) or a shorter prompt."
            if too_long
            else "Check the messages, or the model's template with `ollama-forge show`.",
        )

    def _trouble(self, doing: str, symptom: str) -> EngineError:
        return self._process.death(doing) or EngineError(
            f"llama.cpp did not {doing} with {str(self.model_path)!r}: {symptom}",
            why=self._process.last_words(),
            next="Try again; if it happens again, check the file with `ollama-forge verify`.",
        )


def open_engine(
    gguf_path: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    context_length: int | None = None,
    n_threads: int | None = None,
    n_batch: int | None = None,
    chat_template: str | None = None,
    projector: Path | None = None,
    n_gpu_layers: int | None = None,
    timeout_seconds: float = LOAD_TIMEOUT_SECONDS,
    request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
) -> Engine:
    """Load a GGUF in a child process.

    Args:
        gguf_path: the model (the first file of a split one).
        adapters: LoRA GGUFs, each with its scale (1.0: as trained).
        context_length: in tokens; None: 4096, or the model's own where that is less. Never more than the model's.
        n_threads: None: one for each core that this process may use.
        n_batch: prompt tokens computed at once.
        chat_template: used instead of the model's own: Jinja, or a name that llama.cpp knows (`chatml`, `llama3`).
        projector: the mmproj GGUF of a model that sees or hears.
        n_gpu_layers: None: as many as fit.
        timeout_seconds: for loading.
        request_timeout_seconds: for each request that does not say its own.

    Raises:
        NotFoundError: one of the files is not there.
        EngineError: llama.cpp cannot load the model.
    """
    for path in (gguf_path, *(path for path, _ in adapters), *([projector] if projector else [])):
        if not path.is_file():
            raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.")
    job = {
        "kind": "server",
        "model": str(gguf_path.absolute()),
        "adapters": [[str(path.absolute()), scale] for path, scale in adapters],
        "projector": str(projector.absolute()) if projector else None,
        "context_length": context_length or DEFAULT_CONTEXT_LENGTH,
        "n_threads": n_threads or default_threads(gguf_path),
        "n_batch": n_batch,
        "n_gpu_layers": n_gpu_layers,
        "chat_template": chat_template,
    }
    no_template = None if chat_template else _missing_template(gguf_path)
    try:
        process = EngineProcess(job, model_path=gguf_path, timeout_seconds=timeout_seconds)
    except EngineError as exc:
        if chat_template or no_template or "chat template" not in exc.why:
            raise
        no_template = _unusable_template(gguf_path, exc.why)
        process = EngineProcess(
            {**job, "chat_template": "chatml"}, model_path=gguf_path, timeout_seconds=timeout_seconds
        )
    try:
        return Engine(process, no_template=no_template, request_timeout_seconds=request_timeout_seconds)
    except BaseException:
        process.close()
        raise


def _missing_template(gguf_path: Path) -> EngineError | None:
    """What `chat` answers for a model without template; llama.cpp itself would use chatml, and nobody would know."""
    try:
        with open_gguf(gguf_path) as file:
            if file.metadata.get("tokenizer.chat_template"):
                return None
    except ForgeError:
        # A file that our reader refuses is llama.cpp's to judge.
        return None
    return EngineError(
        f"{str(gguf_path)!r} has no chat template",
        why="Its GGUF has no tokenizer.chat_template, so nobody knows how a conversation is written for it.",
        next="Use it with a plain prompt, or choose a template (chatml is the most common).",
    )


def _unusable_template(gguf_path: Path, why: str) -> EngineError:
    """What `chat` answers for a model whose template llama.cpp refuses at loading; plain prompts still work."""
    return EngineError(
        f"The chat template of {str(gguf_path)!r} cannot be used by llama.cpp",
        why=why,
        next="See it with `ollama-forge show`, correct it, and make the model again.",
    )


def _completion_body(
    prompt: str | Sequence[int], sampling: Sampling, n_logprobs: int, reuse_prompt: bool
) -> dict[str, Any]:
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "n_predict": -1 if sampling.max_tokens is None else sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": -1 if sampling.seed is None else sampling.seed,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "typical_p": sampling.typical_p,
        "repeat_last_n": sampling.repeat_last_n,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(sampling.stop),
        "n_probs": n_logprobs,
        "post_sampling_probs": False,
        "return_tokens": True,
        "cache_prompt": reuse_prompt,
    }


def _read_generation(reply: Mapping[str, Any], text: str, seconds: float) -> Generation:
    kind = reply["stop_type"]
    return Generation(
        text=text,
        token_ids=tuple(int(token) for token in reply.get("tokens") or ()),
        n_tokens=int(reply["tokens_predicted"]),
        stop_reason="stop" if kind in ("eos", "word") else "length",
        stop_string=str(reply["stopping_word"]) if kind == "word" else None,
        logprobs=tuple(_read_logprobs(item) for item in reply.get("completion_probabilities") or ()),
        prompt_tokens=int(reply["tokens_evaluated"]),
        seconds=seconds,
    )


def _read_logprobs(item: Mapping[str, Any]) -> TokenLogprobs:
    top = {int(entry["id"]): _logprob(entry["logprob"]) for entry in item["top_logprobs"]}
    return TokenLogprobs(int(item["id"]), _logprob(item["logprob"]), top)


def _logprob(value: float | None) -> float:
    # JSON has no infinity: a probability of zero comes as null.
    return -math.inf if value is None else float(value)
