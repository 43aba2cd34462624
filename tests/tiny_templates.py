"""Chat templates in the manner of the main families, written for the tests; only the marker tokens are theirs.

Keys of `TEMPLATES` are style names. Some use tools, a default system prompt, a date, named blocks or macros, so that
the renderer meets the constructs that published templates use.
"""

from __future__ import annotations

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set intro = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set intro = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Turns must go user, assistant, user, assistant') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (intro if loop.first else '') + turn['content'].strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_text = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'You may call these functions. Answer with one JSON object to call one.\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- 'Today: ' + date_string + '\\n\\n' + system_text + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('One call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- (message.content if message.content is string else message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN2 = """\
{%- set first = messages[0] %}
{%- set guide = first.content if first.role == 'system' else 'You are a careful assistant.' %}
{{- '<|im_start|>system\\n' + guide }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nCall a function where it helps. Signatures:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

QWEN_GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0].role == 'system' -%}
    {%- set preface = messages[0].content + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set preface = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message.role == 'assistant') -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message.role -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (preface if loop.first else '') }}
    {%- if message.content is string -%}
        {{ message.content | trim }}
    {%- elif message.content is iterable -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}{{ part.text | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Content is neither text nor parts') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

PHI3 = """\
{% for message in messages %}{% set text = message['content'] + '<|end|>\\n' %}\
{% if message['role'] == 'system' %}{{ '<|system|>\\n' + text }}\
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + text }}\
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + text }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""

MISTRAL = """\
{%- macro call_of(entry) -%}
    {%- set body = entry.function -%}
    {{- '{"name": "' ~ body.name ~ '", "arguments": ' ~ (body.arguments | tojson) ~ ', "id": "' ~ entry.id ~ '"}' -}}
{%- endmacro -%}
{%- set state = namespace(last_user=-1, system='') -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- set state.system = message.content -%}{%- endif -%}
    {%- if message.role == 'user' -%}{%- set state.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- if tools and loop.index0 == state.last_user -%}
            {{- '[AVAILABLE_TOOLS]' -}}{{- tools | tojson -}}{{- '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' -}}
        {%- if loop.index0 == state.last_user and state.system -%}{{- state.system ~ '\\n\\n' -}}{%- endif -%}
        {{- message.content ~ '[/INST]' -}}
    {%- elif message.role == 'assistant' and message.tool_calls -%}
        {{- '[TOOL_CALLS][' -}}
        {%- for entry in message.tool_calls -%}
            {{- call_of(entry) ~ (', ' if not loop.last else '') -}}
        {%- endfor -%}
        {{- ']' ~ eos_token -}}
    {%- elif message.role == 'assistant' -%}
        {{- message.content ~ eos_token -}}
    {%- elif message.role == 'tool' -%}
        {{- '[TOOL_RESULTS]' ~ ({'content': message.content} | tojson) ~ '[/TOOL_RESULTS]' -}}
    {%- endif -%}
{%- endfor -%}
"""

ALPACA = """\
{%- for message in messages %}
{%- if message.role == 'user' %}
### Instruction:
{{ message.content }}

{% elif message.role == 'assistant' %}
### Response:
{{ message.content }}{{ eos_token }}

{% elif message.role == 'system' %}
{{ message.content }}

{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
### Response:
{% endif %}
"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen-generation": QWEN_GENERATION,
    "gemma": GEMMA,
    "phi3": PHI3,
    "mistral": MISTRAL,
    "alpaca": ALPACA,
}
