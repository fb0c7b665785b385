"""The engine over HTTP, in OpenAI's words: chat completions, models, health.

`make_app` in jaxspec/serving/http/app.py is the way in; it needs the `serve` extra.
"""
