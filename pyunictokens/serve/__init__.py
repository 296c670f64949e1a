"""Trained runs for others to use: an OpenAI-compatible server over one engine, and the page on top of it."""
