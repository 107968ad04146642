"""Builds what is optional from csrc/, the C++ extension ``sparsebilevel._C`` and, where there is nvcc, the library of
CUDA kernels ``sparsebilevel._cuda``; everything else is declared in pyproject.toml.

Neither includes torch's headers, so they build in seconds, in an isolated environment, and one binary serves every
torch. Where one cannot be built the installation goes on without it, and the package runs on pure PyTorch or Triton.
``pip install -v`` shows the messages.

Environment:
    CXX, CXXFLAGS, LDFLAGS: compiler and additional flags.
    CUDA_HOME: its bin/nvcc is taken, else that of the path.
    NVCCFLAGS: additional flags of nvcc.
    SPARSEBILEVEL_NO_EXT=1: build neither.
    SPARSEBILEVEL_NO_CUDA=1: do not look for nvcc.
"""

import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
# Machine code for the A100, whose family shares it, and the H100 with all it has; and PTX for what comes later.
NVCCFLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2"]
NVCCFLAGS += [f"-gencode=arch=compute_{arch}" for arch in ("80,code=sm_80", "90a,code=sm_90a", "90,code=compute_90")]


def message(text: str) -> None:
    print(f"sparsebilevel: {text}", file=sys.stderr)


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def find_compiler() -> list[str]:
    """The C++ compiler as a command. GCC first: its OpenMP runtime is the one that torch's wheels bring along."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler found (looked for $CXX, g++, clang++, c++)")


def version_line(command: list[str], line: int) -> str:
    return subprocess.run([*command, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[line]


def find_nvcc() -> tuple[str, str] | None:
    """Path of nvcc and its release line, or None."""
    if enabled("SPARSEBILEVEL_NO_CUDA"):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    try:
        return (nvcc, version_line([nvcc], -2)) if nvcc else None
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


class NinjaBuildExt(build_ext):
    """Compiles with ninja: in parallel, and again only what changed, headers included."""

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name.endswith("_cuda")
        try:
            self.build_with_ninja(ext, is_cuda)
        except (CompileError, ImportError, OSError, subprocess.CalledProcessError) as error:
            message(f"{'the library of CUDA kernels' if is_cuda else 'the C++ extension'} was not built: {error}")
            if is_cuda:
                message("going on without it: on GPUs torch and Triton take its place.")
            else:
                message("going on without it: everything works on pure PyTorch, the sparse CPU kernels are missing.")
            # setuptools forgives this error for an optional extension.
            raise CompileError("see the message above") from error

    def build_with_ninja(self, ext: Extension, is_cuda: bool) -> None:
        build = Path(self.build_temp, "cuda" if is_cuda else "").absolute()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_cuda:
            assert NVCC is not None  # or there were no such extension
            host = [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
            flags = [*NVCCFLAGS, *host, *shlex.split(os.environ.get("NVCCFLAGS", ""))]
            text = ninja_file([NVCC[0]], flags, ext.sources, build, target)
        else:
            compiler = find_compiler()
            flags = [*CXXFLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
            build_info = {
                "compiler": version_line(compiler, 0),
                "flags": shlex.join(flags),
                "isa": ["scalar", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["scalar"],
                "nvcc": NVCC and NVCC[1],
            }
            literal = f'R"json({json.dumps(build_info)})json"'
            write_if_changed(build / "build_info.h", f"#define SPARSEBILEVEL_BUILD_INFO {literal}\n")
            text = ninja_file(compiler, flags, ext.sources, build, target)
        write_if_changed(build / "build.ninja", text)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)
        if not is_cuda:  # which may be of another machine
            self.check_loads(target)

    def check_loads(self, target: Path) -> None:
        """A C compiler, for instance, links without what C++ needs at run time."""
        code = "import ctypes, sys; ctypes.PyDLL(sys.argv[1])"
        ran = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
        if ran.returncode:
            target.unlink()
            raise OSError(f"it does not load: {ran.stderr.strip().splitlines()[-1]}")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_file(compiler: list[str], flags: list[str], sources: list[str], build: Path, target: Path) -> str:
    # Imported here: requirements of the build, which making an sdist must not need.
    import pybind11
    from ninja.ninja_syntax import Writer

    python_flags = [f"-I{build}", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    text = io.StringIO()
    ninja = Writer(text, width=10_000)
    ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
    for name, words in (("cxx", compiler), ("cxxflags", flags), ("ldflags", ldflags)):
        ninja.variable(name, shlex.join(words).replace("$", "$$"))  # ninja's own; the shell's are quoted, as $ORIGIN
    ninja.rule("compile", "$cxx -MMD -MF $out.d $cxxflags $includes -c $in -o $out", depfile="$out.d", deps="gcc")
    ninja.rule("link", "$cxx -shared $cxxflags $in $ldflags -o $out")
    objects = []
    for source in sources:
        objects.append(str(build / Path(source).with_suffix(".o")))
        includes = shlex.join(python_flags) if source == "csrc/bindings.cpp" else ""
        ninja.build(objects[-1], "compile", str(Path(source).absolute()), variables={"includes": includes})
    ninja.build(str(target), "link", objects)
    return text.getvalue()


def files(pattern: str) -> list[str]:
    return sorted(path.as_posix() for path in Path("csrc").rglob(pattern))


NVCC = find_nvcc()
extensions = [Extension("sparsebilevel._C", sources=files("*.cpp"), depends=files("*.h"), optional=True)]
if NVCC:
    extensions += [Extension("sparsebilevel._cuda", sources=files("*.cu"), depends=files("*.h"), optional=True)]
elif not enabled("SPARSEBILEVEL_NO_EXT"):
    message("nvcc not found or switched off: building for the CPU only")

setup(
    packages=[
        *find_packages(include=["sparsebilevel", "sparsebilevel.*"]),
        "sparsebilevel.kernels",
        *(f"sparsebilevel.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"sparsebilevel.kernels": "kernels"},
    ext_modules=[] if enabled("SPARSEBILEVEL_NO_EXT") else extensions,
    cmdclass={"build_ext": NinjaBuildExt},
)
