"""Builds the compiled core with CMake. Everything else about the package is in pyproject.toml.

This file knows how to find cmake, ninja and pybind11 (from the build requirements or from the machine) and where the
extension has to land. It does not know about torch: the core uses raw pointers and loads beside any torch.

PYUNICTOKENS_CUDA=on|off|auto says whether the CUDA part is built (auto, the default: where a working nvcc is found).
PYUNICTOKENS_CMAKE_ARGS adds arguments to the CMake call.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str | None:
    """The path of `name` from its Python package, else beside the running interpreter, else on PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        if folder and (found := shutil.which(name, path=folder)):
            return found
    except ImportError:
        pass
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build `ext` straight into the place setuptools expects it."""
        import pybind11

        cmake = tool("cmake")
        if cmake is None:
            raise SystemExit("cmake is needed to build pyunictokens: pip install cmake ninja pybind11")
        wanted = os.environ.get("PYUNICTOKENS_CUDA", "auto").lower()
        if wanted not in {"on", "off", "auto"}:
            raise SystemExit(f"PYUNICTOKENS_CUDA={wanted}: must be on, off or auto")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "core"
        build.mkdir(parents=True, exist_ok=True)
        configuration = "Debug" if self.debug else "Release"
        arguments = [
            f"-DCMAKE_BUILD_TYPE={configuration}",
            f"-DPYUNICTOKENS_OUTPUT={target.parent.as_posix()}",
            f"-DPYUNICTOKENS_CUDA={wanted}",
            f"-DPYUNICTOKENS_VERSION={self.distribution.get_version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if (ninja := tool("ninja")) is not None:
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        arguments += shlex.split(os.environ.get("PYUNICTOKENS_CMAKE_ARGS", ""))
        # An old cache may name the ninja or pybind11 of an isolated build that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build), "--config", configuration, "--parallel"], check=True)


setup(
    ext_modules=[Extension("pyunictokens._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
