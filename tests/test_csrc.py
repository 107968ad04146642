"""The C++ kernels under the address and undefined-behaviour sanitizers, driven by the programs in tests/csrc."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVERS = sorted(Path(__file__).with_name("csrc").glob("test_*.cpp"))
KERNELS = Path(__file__).parents[1] / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds sources into a program with the sanitizers; skips where there is no compiler that has them."""
    found = filter(None, map(shutil.which, ("g++", "clang++", "c++")))
    compiler = shlex.split(os.environ.get("CXX", "")) or [next(found, "")]
    folder = tmp_path_factory.mktemp("sanitizers")

    def build(name, *sources):
        command = [*compiler, *FLAGS, f"-I{KERNELS}", *map(str, sources), "-o", str(folder / name)]
        return subprocess.run(command, capture_output=True, text=True), folder / name

    (folder / "empty.cpp").write_text("int main() {}\n")
    if not compiler[0] or build("empty", folder / "empty.cpp")[0].returncode:
        pytest.skip("no C++ compiler with OpenMP and sanitizers")
    return build


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS, ids=lambda path: path.stem)
def test_kernels_stay_in_bounds(build, driver):
    compiled, program = build(driver.stem, driver, *sorted(KERNELS.glob("*.cpp")))
    assert compiled.returncode == 0, compiled.stderr
    # Leaks are not looked for: where processes may not be traced the search itself fails.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300, env=env)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout == "ok\n"
