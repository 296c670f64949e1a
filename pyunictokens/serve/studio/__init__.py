"""The studio: a page in the browser over the serving engine, for a person with photos and no command line.

`backend.py` does what the pages ask; the pages are a file each; `page.py` puts them together.
"""
