"""A Jinja environment for templates that strangers wrote: no reach outside, and a bound on every kind of work.

In: template source. Out: a compiled template whose every loop round, call, filter, operator and piece of output is
charged to a `Meter`; when the meter is empty, rendering ends with `LimitReached`. Time is bounded without signals or
threads, because no single step can cost more than it is charged: products (`"x" * n`, `replace`, `join`, `format`,
padding) are computed as numbers before they are made. Filters and functions that are random or reach for text of
their own (`random`, `lipsum`, `urlize`) are left out. Everything else is as transformers sets it up, so that a
template gives the same text.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ollama_forge.tokenizer.meter import (
    CHARS_PER_STEP,
    FILTER_CHECKS,
    MAX_COUNT,
    LimitReached,
    Meter,
    check_method,
    check_operator,
)

MAX_SOURCE_CHARS = 512 * 1024


class Refused(jinja2.TemplateError):
    """The template called `raise_exception`: it does not want this conversation."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, metered. One rendering at a time in each thread; `meter` is that rendering's."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, now: Callable[[], datetime] = datetime.now) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_finalize,
            cache_size=0,
        )
        self._local = threading.local()
        for name in ("random", "urlize"):
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: _metered_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: _counted, _CHARGED: _charged, _COMPARED: _compared, _CONCAT: _concat}
        for name, function in list(self.tests.items()):
            self.tests[name] = _metered_test(cast("Callable[..., Any]", function))
        del self.globals["lipsum"]
        self.globals["range"] = self._range
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now().strftime(format)

    @property
    def meter(self) -> Meter:
        meter = getattr(self._local, "meter", None)
        return meter if meter is not None else Meter()

    @meter.setter
    def meter(self, meter: Meter | None) -> None:
        self._local.meter = meter

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _instrument(tree, self)
        return tree

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        if len(made) > MAX_COUNT:
            raise LimitReached(f"range{bounds} has {len(made):,} numbers")
        self.meter.charge(1 + len(made) // 8)
        return made

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(f"it asks for {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(self.meter, operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        bound = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(bound, (str, int, float, list, tuple, dict, set)):
            check_method(meter, bound, str(getattr(__obj, "__name__", "")), args, kwargs)
        meter.charge(16 if isinstance(__obj, Macro) else 4)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (str, list, tuple, dict)) and bound is not None:
            meter.charge_size(result)
        return result


# --- what templates may call ------------------------------------------------------------------------------------------


class _TemplateDict:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` that refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _TemplateNamespace._require_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _TemplateNamespace._require_public(name)
        super().__setitem__(name, value)

    @staticmethod
    def _require_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: Any = "") -> None:
    raise Refused(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: renders its body and notes where it stands in the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Macro) -> str:
        text = str(caller())
        meter = _environment_of(self.environment).meter
        meter.spans.append((meter.emitted, meter.emitted + len(text), text))
        return text


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> str:
    """Every printed expression passes here."""
    meter = _meter_of(context)
    if not isinstance(value, str):
        meter.allow(meter.measure(value), "printing a value")
        value = str(value)
    meter.charge_output(len(value))
    return value


# --- metering ---------------------------------------------------------------------------------------------------------

_COUNTED, _CHARGED, _COMPARED, _CONCAT = "forge counted", "forge charged", "forge compared", "forge concat"


def _meter_of(context: Context) -> Meter:
    return _environment_of(context).meter


@jinja2.pass_context
def _counted(context: Context, iterable: Iterable[Any], cost: int) -> Iterable[Any]:
    """The same items, each charged; containers stay what they are so that `loop.length` knows them."""
    meter = _meter_of(context)
    if isinstance(iterable, (list, tuple, dict, range, str)):
        meter.charge(cost * len(iterable))
        meter.charge_output(0)
        return iterable
    return _charge_each(meter, iterable, cost)


def _charge_each(meter: Meter, iterable: Iterable[Any], cost: int) -> Iterator[Any]:
    for item in iterable:
        meter.charge(cost)
        yield item


@jinja2.pass_context
def _charged(context: Context, value: Any, cost: int = 0) -> Any:
    meter = _meter_of(context)
    meter.charge(cost)
    meter.charge_size(value)
    return value


@jinja2.pass_context
def _concat(context: Context, parts: Sequence[Any]) -> str:
    meter = _meter_of(context)
    meter.allow(sum(meter.measure(part) for part in parts), "'~'")
    return "".join(str(part) for part in parts)


@jinja2.pass_context
def _compared(context: Context, value: Any) -> Any:
    meter = _meter_of(context)
    if isinstance(value, (list, tuple)):
        meter.measure(value)
    elif isinstance(value, str):
        meter.charge_size(value)
    return value


def _filter(node: nodes.Expr, name: str, cost: int | None = None) -> nodes.Filter:
    made = nodes.Filter(node, name, [] if cost is None else [nodes.Const(cost)], [], None, None)
    made.set_lineno(node.lineno)
    return made


def _static_cost(body: Sequence[nodes.Node]) -> int:
    n_chars = sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))
    n_chars += sum(len(node.data) for node in body if isinstance(node, nodes.TemplateData))
    return 1 + n_chars // CHARS_PER_STEP


def _tick(body: Sequence[nodes.Node], line: int) -> nodes.ExprStmt:
    made = nodes.ExprStmt(_filter(nodes.Const(None), _CHARGED, _static_cost(body)))
    made.set_lineno(line)
    return made


def _instrument(tree: nodes.Template, environment: jinja2.Environment) -> None:
    """Charge loops, macros, slices, membership tests and `~`, where Jinja compiles them to plain Python."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filter(cast("nodes.Expr", loop.iter), _COUNTED, _static_cost(loop.body))
        if loop.recursive:
            loop.body = [_tick(loop.body, loop.lineno), *loop.body]
    for block in list(tree.find_all((nodes.Macro, nodes.CallBlock))):
        if isinstance(block, (nodes.Macro, nodes.CallBlock)):
            block.body = [_tick(block.body, block.lineno), *block.body]
    for access in list(tree.find_all(nodes.Getitem)):
        if isinstance(access.arg, nodes.Slice) and isinstance(access.node, nodes.Expr):
            access.node = _filter(access.node, _CHARGED)
    for operand in list(tree.find_all(nodes.Operand)):
        operand.expr = _filter(operand.expr, _COMPARED)
    _replace_concats(tree)
    tree.set_environment(environment)


def _replace_concats(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_without_concat(item) for item in value])
        else:
            setattr(node, name, _without_concat(value))


def _without_concat(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_concats(value)
    if isinstance(value, nodes.Concat):
        parts = nodes.List(value.nodes)
        parts.set_lineno(value.lineno)
        return _filter(parts, _CONCAT)
    return value


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = FILTER_CHECKS.get(name)

    @functools.wraps(function)
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        meter = _meter_of(context)
        value, *rest = args or (None,)
        if check is not None:
            value = check(meter, value, rest, kwargs)
        meter.charge_size(value)
        result = function(*_passed(function, context), value, *rest, **kwargs)
        meter.charge_size(result)
        return result

    return jinja2.pass_context(metered)


def _metered_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def metered(context: Context, *args: Any, **kwargs: Any) -> Any:
        for value in args[1:]:
            _compared(context, value)
        _meter_of(context).charge()
        return function(*_passed(function, context), *args, **kwargs)

    return jinja2.pass_context(metered)


def _environment_of(passed: Any) -> TemplateEnvironment:
    environment = passed.environment if isinstance(passed, Context) else passed
    if not isinstance(environment, TemplateEnvironment):
        raise jinja2.exceptions.SecurityError("a filter is used outside its environment")
    return environment


def _passed(function: Callable[..., Any], context: Context) -> tuple[Any, ...]:
    """What Jinja would pass to a function before its own arguments."""
    kind = getattr(function, "jinja_pass_arg", None)
    if kind is None:
        return ()
    by_name = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
    return (by_name[kind.name],)
