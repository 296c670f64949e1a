#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel (isolated, so with nothing but the declared build requirements), and proves that
# the wheel works outside the source tree. Then the same without CUDA. BUILD_FLAGS=--no-isolation builds offline.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build ${BUILD_FLAGS:-} --outdir "$work/dist" . >"$work/build.log" 2>&1 || { tail -40 "$work/build.log"; exit 1; }

tar -tzf "$work"/dist/*.tar.gz >"$work/members"
for member in csrc/bindings.cpp csrc/include/noise.h csrc/cuda/info.cu pyunictokens/kernels/__init__.py CMakeLists.txt LICENSE; do
  grep -q "/$member\$" "$work/members" || { echo "the sdist lacks $member"; exit 1; }
done

check() { # the site folder to use, and what build_info()["cuda"] must be: any | none
  (cd "$work" && PYTHONPATH=$1 "$python" - "$1" "$2" <<'PY'
import importlib.metadata
import pathlib
import sys

site, cuda = sys.argv[1:]
import pyunictokens, pyunictokens.kernels, pyunictokens._core as core
for module in (pyunictokens, pyunictokens.kernels, core):
    assert module.__file__.startswith(site), f"{module.__name__} comes from {module.__file__}"
package = pathlib.Path(pyunictokens.__file__).parent
members = [m.split("/", 1)[1] for m in pathlib.Path("members").read_text().split() if not m.endswith("/")]
left_out = "pyunictokens/assets/composed/"  # a clone has it; a wheel stays below 20 MB without
wanted = [m for m in members if m.startswith("pyunictokens/") and not m.startswith(left_out)]
assert not (package.parent / left_out).exists(), f"the wheel holds {left_out}"
assert "pyunictokens/py.typed" in wanted and len(wanted) > 10
for member in wanted:
    assert (package.parent / member).is_file(), f"the wheel lacks {member}"
info = core.build_info()
assert info["version"] == importlib.metadata.version("pyunictokens") == pyunictokens.__version__
assert cuda == "any" or info["cuda"] is None, info
import torch
out = pyunictokens.ops.maskgit_step(torch.randn(2, 9, 70), torch.full((2, 9), -1), mask_len=4, temperature=1.0, seed=1,
                                    sample_ids=torch.arange(2), step=0, backend="cpu")
assert int(out.masked.sum()) == 8
print("wheel works outside the source tree:", info)
PY
  )
}

"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/dist/*.whl
check "$work/site" any

if command -v ldd >/dev/null; then
  linked=$(ldd "$work"/site/pyunictokens/_core*.so)
  if grep -E 'libcuda\.|libcudart|libtorch|libc10' <<<"$linked"; then echo "the core must not link these"; exit 1; fi
fi

PYUNICTOKENS_CUDA=off "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$work/cpu" "$work"/dist/*.tar.gz
"$python" -m pip install --quiet --no-deps --target "$work/site-cpu" "$work"/cpu/*.whl
check "$work/site-cpu" none
