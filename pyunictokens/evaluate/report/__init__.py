"""The page about a run: its files, figures, gallery and summary in words."""
