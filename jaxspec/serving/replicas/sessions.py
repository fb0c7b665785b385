"""What makes requests one conversation, so that they meet the same replica and what it has read of them before."""

import hashlib
import json
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers

SESSION_HEADER = "x-session-id"
"""Names a conversation, where the client does."""


def session_of(headers: Headers, body: bytes) -> str:
    """The name of a request's conversation, empty where it has none.

    It is made of the session header; without one of the body's `user`; without that of all messages up to the first of
    a user, pictures included, which every later turn repeats. A hash: what clients call themselves reaches no log.
    """
    named = headers.get(SESSION_HEADER)
    return hashed("header", named) if named else session_of_body(body)


def session_of_body(body: bytes) -> str:
    """`session_of` without headers. What is no chat has no conversation: to refuse it is not the business here."""
    try:
        request = from_json(body, cache_strings="none")
    except ValueError:
        return ""
    if not isinstance(request, dict):
        return ""
    if isinstance(user := request.get("user"), str) and user:
        return hashed("user", user)
    messages = request.get("messages")
    if not isinstance(messages, list):
        return ""
    for count, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return hashed("messages", messages[:count])
    return ""


def hashed(kind: str, value: Any) -> str:
    return hashlib.sha256(json.dumps([kind, value]).encode()).hexdigest()
