"""`/docs`: every route and field on one page, written from the OpenAPI schema.

The page has no script and asks nothing of any network, so its policy forbids both.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["ReferencePage", "reference_page"]

Schema = Mapping[str, Any]

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
<p>The same for machines: <a href="openapi.json">openapi.json</a></p></header>
<nav aria-label="Routes"><ul>{contents}</ul></nav>
<main>{sections}</main>
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class ReferencePage:
    """Attributes: html: the page; headers: to send with it, its content policy among them."""

    html: str
    headers: Mapping[str, str]


class _Field(NamedTuple):
    name: str
    kind: str
    default: str


def reference_page(schema: Schema) -> ReferencePage:
    """Write out an OpenAPI schema whose definitions stand in their places."""
    style = resources.files(__package__).joinpath("reference.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    info = schema["info"]
    operations = [
        (method.upper(), path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    html = _DOCUMENT.format(
        title=escape(f"{info['title']} {info['version']}: the API"),
        style=style,
        contents="".join(
            f'<li><a href="#{escape(operation["operationId"])}">{method} {escape(path)}</a></li>'
            for method, path, operation in operations
        ),
        sections="".join(_section(*operation) for operation in operations),
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return ReferencePage(html=html, headers=headers)


def _section(method: str, path: str, operation: Schema) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    said = escape(operation.get("description", ""))
    parts = [
        f'<section id="{escape(operation["operationId"])}">',
        f"<h2><code>{method}</code> {escape(path)}</h2>",
        f"<p>{said}</p>" if said else "",
    ]
    if "example" in body:
        call = f"curl -s http://HOST:PORT{path} -H 'Content-Type: application/json' -d '"
        written = json.dumps(body["example"], indent=2).replace("'", "'\\''")
        parts.append(f"<pre>{escape(call + written)}'</pre>")
    if "schema" in body:
        parts.append(_table(body["schema"]))
    return "".join([*parts, "</section>"])


def _table(schema: Schema) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field.name)}</code></td><td>{escape(field.kind)}</td>"
        f"<td>{escape(field.default)}</td></tr>"
        for field in _fields(schema, "")
    )
    head = "<tr><th>field</th><th>what it may be</th><th>default</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _fields(schema: Schema, prefix: str) -> Iterator[_Field]:
    """The properties of an object, and those of the objects inside it."""
    required = schema.get("required", ())
    for name, field in sorted(
        schema["properties"].items(), key=lambda item: item[0] not in required
    ):
        default = "needed" if name in required else json.dumps(field.get("default"))
        whole = prefix + name
        yield _Field(whole, _kind(field), "" if default == "null" else default)
        for choice in _choices(field):
            if "properties" in choice:
                yield from _fields(choice, f"{whole}.")
            elif "properties" in choice.get("items", {}):
                yield from _fields(choice["items"], f"{whole}[].")


def _choices(schema: Schema) -> list[Schema]:
    """What a value may be, apart from null, which is as good as nothing."""
    given: list[Schema] = schema.get("anyOf", [schema])
    return [choice for choice in given if choice.get("type") != "null"]


def _kind(schema: Schema) -> str:
    choices = _choices(schema)
    if len(choices) > 1:
        return ", or ".join(_kind(choice) for choice in choices)
    schema = choices[0]
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        return f"a list{_count(schema, 'Items')} of: {_kind(schema['items'])}"
    if kind == "string":
        return f"text{_count(schema, 'Length')}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"object, each value: {_kind(inner)}" if isinstance(inner, Mapping) else "object"
    return _number(schema) if kind in ("integer", "number") else "true or false"


def _count(schema: Schema, what: str) -> str:
    """How many items or characters there may be."""
    least, most = schema.get(f"min{what}"), schema.get(f"max{what}")
    bounds = [f"at least {least:,}" if least else "", f"at most {most:,}" if most else ""]
    unit = {"Items": "", "Length": " characters"}[what]
    said = " and ".join(bound for bound in bounds if bound)
    return f" ({said}{unit})" if said else ""


def _number(schema: Schema) -> str:
    kind = {"integer": "whole number", "number": "number"}[schema["type"]]
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {_exact(schema[name])}" for name, word in words.items() if name in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()


def _exact(value: float) -> str:
    """FastAPI writes whole bounds as broken numbers."""
    return f"{int(value) if value == int(value) else value:,}"
