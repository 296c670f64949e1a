"""Reward models in a process of their own: messages, server, client."""
