"""What may be asked of an answer's form: JSON schemas and regular expressions, checked before they are compiled.

llguidance refuses the keywords of JSON Schema that it knows and does not enforce, but ignores words that it does not
know and lets a schema switch its checks off (`x-guidance`). Here every keyword that would not be honoured is refused.
"""

import json
from collections.abc import Iterator
from typing import Any

MAX_SCHEMA = 100_000
"""Characters of a schema, written as JSON."""
MAX_DEPTH = 64
"""Levels of objects and lists in a schema."""
MAX_PATTERN = 10_000
"""Characters of a regular expression."""

ONE = {"additionalItems", "additionalProperties", "items"}
"""Keywords whose value is a schema (`items` before draft 2020-12 also a list of them)."""
LIST = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"$defs", "definitions", "patternProperties", "properties"}
ENFORCED = {"$ref", "const", "enum", "type", "required", "minProperties", "maxProperties", "minItems", "maxItems"}
ENFORCED |= {"minLength", "maxLength", "pattern", "format"}
ENFORCED |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
SAYS_NOTHING = {"$anchor", "$comment", "$id", "$schema", "id", "title", "description", "default", "examples"}
SAYS_NOTHING |= {"deprecated", "readOnly", "writeOnly"}
KNOWN = ONE | LIST | NAMED | ENFORCED | SAYS_NOTHING


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as JSON, keys in their order: it is the order of an answer's properties.

    Raises ValueError for what is no JSON object, is larger than `MAX_SCHEMA` or deeper than `MAX_DEPTH`, and for
    keywords that an answer would not be held to.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema must be an object, got {type(schema).__name__}")
    if not_deeper(schema, MAX_DEPTH) is False:
        raise ValueError(f"the JSON schema is deeper than {MAX_DEPTH} levels")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as problem:
        raise ValueError(f"the JSON schema is not JSON: {problem}") from None
    if len(text) > MAX_SCHEMA:
        raise ValueError(f"the JSON schema has {len(text)} characters, it may have {MAX_SCHEMA}")
    for place, each in subschemas(schema):
        for keyword in each:
            if keyword not in KNOWN:
                raise ValueError(f"the JSON schema's keyword {keyword!r} at {place} is not supported")
    return text


def pattern_text(pattern: str) -> str:
    """The regular expression. Raises ValueError for what is no string, or longer than `MAX_PATTERN`."""
    if not isinstance(pattern, str):
        raise ValueError(f"a regular expression must be a string, got {type(pattern).__name__}")
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"the regular expression has {len(pattern)} characters, it may have {MAX_PATTERN}")
    try:
        pattern.encode()
    except UnicodeEncodeError:
        raise ValueError("the regular expression has half a surrogate pair in it, which no text has") from None
    return pattern


def not_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists are nested in at most so many levels; a cycle is deeper than any number."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False


def subschemas(schema: Any, place: str = "the top") -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and all within it, each with where it stands. What stands where a schema must and is none is left to
    the compiler to refuse."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    prefix = "" if place == "the top" else f"{place}."
    for keyword, value in schema.items():
        if keyword in ONE or keyword in LIST:
            values = value if isinstance(value, list) else [value]
        elif keyword in NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield from subschemas(each, f"{prefix}{keyword}.{name}")
            continue
        else:
            continue
        for each in values:
            yield from subschemas(each, f"{prefix}{keyword}")
