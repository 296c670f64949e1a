"""The concept stages: where a concept's rows begin, their losses, and the loop."""
