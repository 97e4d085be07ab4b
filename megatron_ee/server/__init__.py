"""Serves a model over HTTP, as OpenAI's clients expect it."""
