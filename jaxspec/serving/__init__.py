"""Serving: many requests at once on one target, from Python or over HTTP."""
