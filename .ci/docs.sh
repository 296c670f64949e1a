#!/usr/bin/env bash
# Builds the documentation site into build/site, strictly: a warning ends it. Then every link and picture of the built pages
# must lead to a file (and an anchor) of the site, nothing may be loaded from elsewhere, and the notebook must run.
# `--site` leaves the notebook out.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
export NO_MKDOCS_2_WARNING=1
"$python" -m mkdocs build --strict --quiet
"$python" .ci/site_links.py build/site
[ "${1:-}" = --site ] || "$python" -m pytest -q -m "slow or not slow" tests/test_notebook.py
echo "build/site/index.html"
