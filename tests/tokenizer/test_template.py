# ruff: noqa: E501 (a template is one line)
"""Chat templates: the same text as transformers gives, and no way out of the sandbox."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny_templates
import tiny_tokenizers
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ollama_forge.errors import NotFoundError, TemplateError
from ollama_forge.tokenizer.template import ChatTemplate, read_chat_template, read_gguf_template, validate_template

NOON = datetime(2026, 3, 4, 12, 0, 0)

USER = {"role": "user", "content": "What is 2 + 2? <b>&</b> \"quoted\" 'single' \\n"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "two rounds": [USER, {"role": "assistant", "content": " Four. "}, {"role": "user", "content": "\nAnd 3 + 3?\n"}],
    "system": [{"role": "system", "content": "Be kind.\n"}, USER, {"role": "assistant", "content": "4"}],
    "not ascii": [{"role": "user", "content": "Grüße 今日は 🚀 \u200d שלום"}],
}
TOOL_CHAT = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "exact": True, "note": None}},
            }
        ],
    },
    {"role": "tool", "content": '{"degrees": 21.5}', "tool_call_id": "c1"},
    {"role": "assistant", "content": "21.5 degrees."},
    {"role": "user", "content": "Thanks"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <now> & later",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


class Noon(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOON


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """transformers' own renderer, at noon."""
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")

    def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)

    return render


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>", now=lambda: NOON).render(messages, **options)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", tiny_templates.TEMPLATES)
def test_text_equals_transformers(reference: Callable[..., str], style: str, chat: str, prompt: bool) -> None:
    source = tiny_templates.TEMPLATES[style]
    expected = reference(source, CHATS[chat], add_generation_prompt=prompt)
    assert ours(source, CHATS[chat], add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("style", ["llama3", "qwen2", "mistral"])
def test_text_with_tools_equals_transformers(reference: Callable[..., str], style: str) -> None:
    source = tiny_templates.TEMPLATES[style]
    expected = reference(source, TOOL_CHAT, tools=TOOLS, add_generation_prompt=True)
    assert "Köln" in expected and "Weather <now> & later" in expected
    assert ours(source, TOOL_CHAT, tools=TOOLS) == expected


def test_variables_reach_the_template(reference: Callable[..., str]) -> None:
    source = tiny_templates.QWEN2
    expected = reference(source, [USER], add_generation_prompt=True, enable_thinking=False)
    assert "<think>" in expected
    assert ours(source, [USER], enable_thinking=False) == expected


def test_date_is_the_clock_that_was_given() -> None:
    assert "Today: 04 Mar 2026" in ours(tiny_templates.LLAMA3, [USER])


PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_and_their_generation_blocks_equal_transformers(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Noon)
    source = path.read_text()
    reasoning = [USER, {"role": "assistant", "content": "x", "reasoning_content": "why"}, USER]
    chats = [(chat, None) for chat in (*CHATS.values(), reasoning, TOOL_CHAT)] + [(TOOL_CHAT, TOOLS)]
    n_equal = 0
    for messages, tools in chats:
        cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
        options = {"bos_token": "<s>", "eos_token": "</s>", "return_assistant_tokens_mask": True}
        template = ChatTemplate(source, "<s>", "</s>", now=lambda: NOON)
        try:
            texts, spans = chat_template_utils.render_jinja_template(
                [cleaned], tools=tools, chat_template=source, add_generation_prompt=True, **options
            )
        except (jinja2.TemplateError, TypeError):
            with pytest.raises(TemplateError):
                template.render(messages, tools=tools)
            continue
        rendered = template.render_spans(messages, tools=tools)
        assert (rendered.text, list(rendered.spans)) == (texts[0], [tuple(span) for span in spans[0]])
        n_equal += 1
    assert n_equal > 0


SNIPPETS = {
    "dict items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "loop facts": "{% for m in [1,2,3] %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}",
    "generator loop": "{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "loop with if": "{% for n in range(10) if n is odd %}{{ n }}{% else %}none{% endfor %}",
    "recursive loop": "{% for n in [[1,[2,[3]]]] recursive %}{{ n[0] }}{% if n[1] %}{{ loop([n[1]]) }}{% endif %}{% endfor %}",
    "break and continue": "{% for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 5 %}{% break %}{% endif %}{{ n }}{% endfor %}",
    "slices": "{{ 'abcdef'[1:-1][::-1] }}{{ messages[-1:][0].role }}{{ messages[::-1] | length }}",
    "tilde": "{{ 'a' ~ 1 ~ none ~ [1, 'x'] ~ undefined_thing ~ {'k': 1.5} }}",
    "membership": "{{ 'us' in messages[0].role }}{{ 'x' in {'x': 1} }}{{ 3 not in [1, 2] }}",
    "strings": "{{ ' x y '.strip().split(' ') }}{{ 'a-b'.replace('-', '+') }}{{ ','.join(['a', 'b']) }}{{ 'x'.upper() * 3 }}",
    "formats": "{{ '%s-%03d' % ('a', 7) }}{{ '{} {k}'.format(1700000000, k='v') }}{{ '%s' | format('z') }}",
    "filters": "{{ [3,1,2] | sort | join('-') }}{{ 'a,b' | replace(',', ';') }}{{ ' t ' | trim }}{{ 'x' | indent(2, true) }}",
    "map and attr": "{{ messages | map(attribute='role') | list }}{{ ['a'] | map('upper') | first }}",
    "json": "{{ {'b': 1, 'a': ['é', none, true]} | tojson }}{{ {'a': 1} | tojson(indent=2) }}{{ [1,2] | tojson(separators=(',', ':')) }}",
    "json sorted": "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}{{ 'é<' | tojson(ensure_ascii=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in range(4) %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro f(a, b='d') %}[{{ a }}|{{ b }}]{% endmacro %}{{ f(1) }}{{ f('x', b=2) }}",
    "call block": "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}",
    "set block": "{% set t %}  one\n two{% endset %}{{ t | trim | length }}",
    "whitespace": "  {% if true %}\n    a\n  {% endif %}\n\n{{- ' b' -}}\n c",
    "tests": "{{ 1 is number }}{{ 'a' is string }}{{ none is none }}{{ x is defined }}{{ [] is iterable }}{{ {} is mapping }}",
    "dictionary": "{{ dict(a=1).a }}{{ dict({'x': 2})['x'] }}{{ {'a': 1} | dictsort }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 8 }}{{ 7 % 3 }}{{ -3 | abs }}{{ 2.5 | round(1) }}{{ '3' | int + 1 }}",
    "escaping": "{{ '<&>' }}{{ '<&>' | e }}{{ '<b>' | safe }}{{ ('<' | e) ~ '<' }}",
    "grouping": "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}",
    "numbers in data": "{{ messages[0].stamp + 1 }}{{ messages[0].stamp | string }}",
    "print containers": "{{ [1, 'a', none, {'k': (1, 2)}] }}{{ none }}{{ true }}{{ 1.0 }}",
    "conditional": "{{ 'a' if messages else 'b' }}{{ messages[5] is defined }}{{ messages[0].missing or 'none' }}",
    "filter block": "{% filter upper %}abc{{ 'd' }}{% endfilter %}",
    "cycle": "{% for n in range(3) %}{{ loop.cycle('a', 'b') }}{{ loop.changed(n) }}{% endfor %}",
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_language_features_equal_transformers(reference: Callable[..., str], snippet: str) -> None:
    messages = [{"role": "user", "content": "one", "stamp": 1700000000}, {"role": "assistant", "content": "two"}]
    assert ours(SNIPPETS[snippet], messages) == reference(SNIPPETS[snippet], messages, add_generation_prompt=True)


text = st.text(max_size=40)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(text, min_size=1, max_size=5), style=st.sampled_from(["chatml", "qwen2", "phi3", "alpaca"]))
def test_any_text_is_rendered_like_transformers_do(contents: list[str], style: str) -> None:
    source = tiny_templates.TEMPLATES[style]
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    compiled = chat_template_utils._compile_jinja_template(source)
    expected = compiled.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ours(source, messages) == expected


def test_generation_spans_enclose_what_the_assistant_says() -> None:
    messages = [USER, {"role": "assistant", "content": "Four"}, USER, {"role": "assistant", "content": "Füñf 🚀"}]
    rendered = ChatTemplate(tiny_templates.QWEN_GENERATION).render_spans(messages, add_generation_prompt=False)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Four<|im_end|>", "Füñf 🚀<|im_end|>"]


def test_generation_block_inside_a_macro_is_refused_when_its_place_is_unknown() -> None:
    source = "lead {% macro m(t) %}{% generation %}{{ t }}{% endgeneration %}{% endmacro %}x{{ m('abc') | upper }}"
    with pytest.raises(TemplateError, match="generation"):
        ChatTemplate(source).render_spans([USER])


def test_refusal_of_the_template_is_told_in_its_words() -> None:
    with pytest.raises(TemplateError, match="Turns must go user"):
        ours(tiny_templates.LLAMA2, [USER, USER])


HOSTILE = {
    "class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "clock function's module": "{{ strftime_now.__globals__['sys'] }}",
    "cycler globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner globals": "{{ joiner.__init__.__globals__ }}",
    "namespace dunder": "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
    "namespace dunder set": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "macro internals": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a dict": "{{ messages[0].update({'a': 1}) }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered ranges": "{% for a in range(99999) if false %}{% endfor %}" * 40,
    "huge range": "{% for a in range(999999999) %}{% endfor %}",
    "range as list": "{% for a in range(9999) %}{{ range(99999) | list | length }}{% endfor %}",
    "text times number": "{{ 'a' * 999999999 }}",
    "list times number": "{{ ([0] * 999999999) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "doubling text": "{% set ns = namespace(t='aaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
    "doubling by tilde": "{% set ns = namespace(t='aaaa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "doubling by join": "{% set ns = namespace(t='aaaa') %}{% for i in range(60) %}{% set ns.t = [ns.t, ns.t] | join %}{% endfor %}{{ ns.t }}",
    "doubling by set block": "{% set ns = namespace(t='aaaa') %}{% for i in range(60) %}{% set u %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = u %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(t='aa') %}{% for i in range(60) %}{% set ns.t = ns.t.replace('a', 'aa') %}{% endfor %}{{ ns.t }}",
    "replace product": "{% set a = 'a' * 900000 %}{{ a.replace('a', a) }}",
    "replace filter product": "{% set a = 'a' * 900000 %}{{ a | replace('a', a) | length }}",
    "shared lists": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "shared lists as json": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a | tojson }}",
    "shared lists compared": "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "wide format": "{{ '%999999999d' % 1 }}",
    "star format": "{{ '%*d' % (999999999, 1) }}",
    "new style wide format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "center": "{{ 'x' | center(999999999) }}",
    "center method": "{{ 'x'.center(999999999) }}",
    "zfill": "{{ 'x'.zfill(999999999) }}",
    "expandtabs": "{{ ('\\t' * 9000).expandtabs(99999) }}",
    "indent": "{{ 'x' | indent(999999999, true) }}",
    "indent of json": "{{ [1] | tojson(indent=999999999) }}",
    "round": "{{ 1.5 | round(999999999, 'floor') }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big') | length }}",
    "sum of lists": "{{ [[1], [2]] | sum(start=[]) }}",
    "macro recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "much text in a loop": "{% for a in range(99999) %}" + "x" * 9000 + "{% endfor %}",
    "much text in a macro": "{% macro m() %}"
    + "x" * 9000
    + "{% endmacro %}{% for a in range(99999) %}{{ m() }}{% endfor %}",
    "much text in a set block": "{% set t %}{% for a in range(99999) %}" + "x" * 9000 + "{% endfor %}{% endset %}",
    "big text again and again": "{% set a = 'a' * 999999 %}{% set t %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
    "slices of a big text": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "search in a big text": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{% if 'ab' in a %}{% endif %}{% endfor %}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "random": "{{ [1, 2] | random }}",
    "division by zero": "{{ 1 / 0 }}",
    "undefined call": "{{ nothing() }}",
    "does not parse": "{% if %}",
    "unclosed": "{% for a in b %}",
    "many parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "long number": "{{ " + "9" * 90000 + " }}",
    "too long": "x" * 600_000,
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_template_ends_in_a_clear_error(attack: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(HOSTILE[attack], "<s>", "</s>").render([USER])
    assert caught.value.what and caught.value.next


def test_long_conversation_is_within_the_limits() -> None:
    chat = [{"role": ("user", "assistant")[n % 2], "content": f"line {n} " * 200} for n in range(1000)]
    for style in ("chatml", "llama3", "qwen2", "gemma"):
        rendered = ours(tiny_templates.TEMPLATES[style], chat)
        assert "line 999" in rendered


def test_rich_objects_in_messages_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"PosixPath|WindowsPath"):
        ours(tiny_templates.CHATML, [{"role": "user", "content": Path("/")}])


def test_a_rendering_does_not_use_up_the_next_one() -> None:
    template = ChatTemplate("{% for a in range(90000) %}{% endfor %}done")
    assert [template.render([USER]) for _ in range(10)] == ["done"] * 10


@pytest.mark.parametrize("kind", ["llama3-bpe", "qwen2-bpe", "llama2-spm", "gemma-spm", "phi3-spm"])
def test_folder_and_transformers_render_the_same(tmp_path: Path, kind: str) -> None:
    tiny_tokenizers.build_tokenizer(kind, tmp_path)
    template = read_chat_template(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(CHATS["two rounds"], tokenize=False, add_generation_prompt=True)
    assert template.render(CHATS["two rounds"]) == expected


def test_named_templates_and_jinja_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<b>"}}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}main")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert read_chat_template(tmp_path).render([USER]) == "<b>main"
    assert read_chat_template(tmp_path, "tool_use").render([USER]) == "tools"
    with pytest.raises(NotFoundError, match="rag"):
        read_chat_template(tmp_path, "rag")


def test_gguf_metadata_gives_the_template_and_its_tokens() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
        "tokenizer.chat_template.rag": "named",
    }
    assert read_gguf_template(metadata).render([{"role": "user", "content": "x"}]) == "<s>x</s>"
    assert read_gguf_template(metadata, "rag").render([USER]) == "named"
    with pytest.raises(NotFoundError):
        read_gguf_template({})


def test_validation_names_the_line() -> None:
    with pytest.raises(TemplateError, match="line 2"):
        validate_template("fine\n{% endfor %}")
