"""The processes of one run: ranks, the optimizer spread over them, heartbeats."""
