#!/usr/bin/env bash
# Builds a wheel for each of CPython 3.10 to 3.13 that is found here (on PATH, or as a pyenv version) into dist/, and
# checks each: below 20 MB, and its core loads and computes in that Python. Names the interpreters that are missing; with
# STRICT=1 that is an error. `make wheels` runs it. PYTHONS="3.11 3.13" chooses; PYUNICTOKENS_CUDA=off leaves CUDA out.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHONS=${PYTHONS:-3.10 3.11 3.12 3.13}
LIMIT=20000000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p dist
tools=${PYTHON:-.venv/bin/python}

find_python() { # version → an interpreter that runs, with headers and pip
  local candidate found
  for candidate in "python$1" "$HOME"/.pyenv/versions/"$1"*/bin/python; do
    found=$("$candidate" -c 'import os, pip, sys, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(sys.executable if "%d.%d" % sys.version_info[:2] == sys.argv[1] else "")' "$1" 2>/dev/null) || continue
    [ -z "$found" ] || { echo "$found"; return; }
  done
}

# from an sdist: what earlier builds left in this tree has no part in it
"$tools" -m build ${BUILD_FLAGS:-} --sdist --outdir "$work" . > "$work/sdist.log" 2>&1 || { tail -20 "$work/sdist.log"; exit 1; }

missing=()
for version in $PYTHONS; do
  python=$(find_python "$version")
  [ -n "$python" ] || { missing+=("$version"); continue; }
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps -w "$work/$version" ${PIP_FLAGS:-} "$work"/*.tar.gz
  wheel=$(echo "$work/$version"/*.whl)
  size=$(wc -c < "$wheel")
  [ "$size" -lt "$LIMIT" ] || { echo "$(basename "$wheel"): $size bytes, must be below $LIMIT"; exit 1; }
  (cd "$work" && "$python" - "$wheel" <<'PY'
import importlib.util
import pathlib
import sys
import sysconfig
import zipfile

folder = pathlib.Path(sys.argv[1]).parent / "core"
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = wheel.namelist()
    (name,) = (name for name in names if name.startswith("pyunictokens/_core"))
    wheel.extract(name, folder)
assert name.endswith(sysconfig.get_config_var("EXT_SUFFIX")), name
assert "pyunictokens/assets/rewards.yaml" in names and "pyunictokens/kernels/__init__.py" in names
spec = importlib.util.spec_from_file_location("pyunictokens._core", folder / name)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
assert core.philox4x32(0, 0, 0, 0, 0, 0)[0] == 0x6627E8D5, "Philox of zeros"
PY
  )
  mv "$wheel" dist/
  echo "dist/$(basename "$wheel"): $size bytes, its core computes in Python $version"
done
[ ${#missing[@]} -eq 0 ] || { echo "no interpreter with headers and pip here for: ${missing[*]}"; [ -z "${STRICT:-}" ]; }
