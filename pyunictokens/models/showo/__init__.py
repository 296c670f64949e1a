"""Show-o: the transformer, its sequences and masks, and its cached paths."""
