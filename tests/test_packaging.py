"""The installed package: its contents, its configuration, and life without the extension."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sparsebilevel
from sparsebilevel import __config__
from sparsebilevel.kernels import dispatch, measurements, native

ROOT = Path(__file__).parents[1]


def python(code, **environment):
    """Standard output and error of a fresh interpreter outside the source tree."""
    command = [sys.executable, "-W", "always", "-c", code]
    run = subprocess.run(command, cwd="/", env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_version_is_that_of_the_distribution():
    assert sparsebilevel.__version__ == metadata.version("sparsebilevel")


def test_the_installed_package_is_tested():
    assert not (ROOT / "conftest.py").exists()  # it would put the root, and with it the sources, on sys.path
    assert str(ROOT) not in sys.path


def test_only_one_top_level_name_is_installed():
    assert metadata.distribution("sparsebilevel").read_text("top_level.txt").split() == ["sparsebilevel"]


def test_config_is_json_and_complete(capsys):
    facts = json.loads(json.dumps(__config__.info()))
    assert facts["sparsebilevel"] == sparsebilevel.__version__
    assert {"python", "platform", "torch", "numpy", "extension", "threads", "cuda", "optional"} <= set(facts)
    assert facts["extension"]["loaded"] == native.available()
    if native.available():
        assert facts["extension"]["isa_used"] in facts["extension"]["isa_compiled"]
        assert "nvcc" in facts["extension"]
    __config__.show()
    assert "C++ extension" in capsys.readouterr().out


def test_names_are_loaded_at_first_use():
    code = """
import sys
import sparsebilevel, sparsebilevel.cli, sparsebilevel.training
sparsebilevel.cli.make_parser()
print("torch" in sys.modules)
assert sparsebilevel.nn.sparsify is sparsebilevel.sparsify is sys.modules["sparsebilevel.nn"].sparsify
assert sparsebilevel.training.train is sys.modules["sparsebilevel.training.loop"].train
print(hasattr(sparsebilevel, "nothing"), hasattr(sparsebilevel.training, "nothing"))
from sparsebilevel import *
print(BiDST is sparsebilevel.BiDST, set(sparsebilevel.__all__) < set(dir(sparsebilevel)))
"""
    assert python(code)[0].split() == ["False", "False", "False", "True", "True"]


@pytest.mark.parametrize("line", ["import sparsebilevel.schedules", "from sparsebilevel import masks, costs"])
def test_modules_can_be_imported_before_anything_else(line):
    code = "import os\nos.environ['SPARSEBILEVEL_NATIVE'] = '0'  # or a warning says that there is no extension\n"
    assert not python(f"{code}{line}\nimport sparsebilevel as sb\nsb.masks.Filter, sb.sparsify")[1]


def test_optional_packages_are_imported_where_they_are_needed_and_not_before():
    code = """
import sys
import torch.utils.flop_counter  # torch imports some of them itself
before = set(sys.modules)
import sparsebilevel.cli, sparsebilevel.training, sparsebilevel.report, sparsebilevel.export, sparsebilevel.data
from sparsebilevel import __config__, models
names = [*__config__.info()["optional"], "torch.utils.tensorboard"]
print([name for name in names if name in sys.modules and name not in before])
"""
    assert python(code)[0].strip() == "[]"


def test_every_optional_package_belongs_to_a_declared_extra():
    declared = metadata.metadata("sparsebilevel").get_all("Provides-Extra")
    assert {entry["extra"] for entry in __config__.info()["optional"].values()} - {None} <= set(declared)


def test_core_requirements_stay_small():
    core = [line for line in metadata.requires("sparsebilevel") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in core) == ["numpy", "torch"]


def test_native_can_be_switched_off_quietly():
    code = "from sparsebilevel.kernels import native; print(native.available(), native.reason)"
    out, err = python(code, SPARSEBILEVEL_NATIVE="0")
    assert out.strip() == "False switched off by SPARSEBILEVEL_NATIVE=0"
    assert "C++ extension" not in err


def test_missing_extension_warns_once_and_works():
    code = """
import sys
sys.modules["sparsebilevel._C"] = None  # importing it now raises ModuleNotFoundError
import torch, sparsebilevel
from sparsebilevel.kernels import binarize, native
assert not native.available()
print(binarize(torch.tensor([1.0, 3.0, 2.0]), 2).tolist())
"""
    out, err = python(code, SPARSEBILEVEL_NATIVE="1")
    assert out.strip() == "[False, True, True]"
    assert err.count("The C++ extension of sparsebilevel is missing") == 1


@pytest.mark.skipif(not native.available(), reason=f"C++ extension: {native.reason}")
def test_instruction_set_can_be_limited():
    code = "from sparsebilevel.kernels import native; print(native.lib.isa().name)"
    assert python(code, SPARSEBILEVEL_CPU="scalar")[0].strip() == "scalar"


def test_source_distribution_has_what_its_tests_read(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    folders = ("benchmarks", "csrc", "docs", "kernels", "sparsebilevel", "tests")
    files = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md")
    source = tmp_path / "source"
    for name in folders:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in (*files, "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    code = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    paths = [path for folder in folders for path in (source / folder).rglob("*") if path.is_file()]
    assert {*files, *(path.relative_to(source).as_posix() for path in paths)} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken", [{"CXX": "/bin/false"}, {"CXX": "/nonexistent/c++"}, {"SPARSEBILEVEL_NO_EXT": "1"}, {}]
)
def test_wheel(broken, tmp_path):
    """Builds in a copy of the tree; a missing or broken compiler costs the extension, not the installation."""
    if not broken and not native.available():
        pytest.skip(f"C++ extension: {native.reason}")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "csrc", "kernels", "sparsebilevel"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, source]
    subprocess.run(command, cwd=tmp_path, env=os.environ | broken, check=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sparsebilevel"}
    assert {"sparsebilevel/kernels/native.py", "sparsebilevel/py.typed"} <= set(names)
    assert any(name.startswith("sparsebilevel/_C.") for name in names) == (not broken)

    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "installed"], check=True)
    out, err = python(
        "import sparsebilevel; print(sparsebilevel.__file__); sparsebilevel.sparsify",
        PYTHONPATH=str(tmp_path / "installed"),
    )
    assert out.startswith(str(tmp_path))
    assert err.count("The C++ extension of sparsebilevel is missing") == bool(broken)


def test_the_compiler_of_torch_is_imported_by_who_compiles():
    """It takes two seconds, which workers that load data need not spend. (torch.optim imports it, too.)"""
    code = """
import sys
import torch
before = "torch._dynamo" in sys.modules
import sparsebilevel as sb
model = sb.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), 0.5)
model(torch.randn(4, 8)).sum().backward()
print(before or "torch._dynamo" not in sys.modules)
"""
    assert python(code)[0].split() == ["True"]
    assert torch.compiler.assume_constant_result(lambda: 1)._dynamo_marked_constant
    assert dispatch.library_is_best._dynamo_marked_constant


@pytest.mark.parametrize(("value", "is_on"), [("", True), ("1", True), ("On", True), ("0", False), ("false", False)])
def test_switches_read_words_too(value, is_on):
    assert native.is_on("SPARSEBILEVEL_NATIVE", value) == is_on


def test_switches_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="SPARSEBILEVEL_CUDA='maybe' is not known; allowed: 0, 1, false"):
        native.is_on("SPARSEBILEVEL_CUDA", "maybe")


def test_measurements_need_no_home(monkeypatch):
    monkeypatch.delenv("SPARSEBILEVEL_MEASUREMENTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(measurements.os.path, "expanduser", lambda path: path)  # as for a user without one
    assert measurements.path() == Path("~/.cache/sparsebilevel/gpu.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert measurements.path() == Path("/cache/sparsebilevel/gpu.json")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX systems")
@pytest.mark.parametrize(
    "command", ["config", "train --epochs 1 --method static --arch mlp --no-measure --output-dir run"]
)
def test_readers_may_leave(command, tmp_path):
    """As `head` does. A run goes on."""
    read, write = os.pipe()
    os.close(read)
    code = f"from sparsebilevel.cli import main; main({command.split()!r})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ran.returncode == 141
    assert "Traceback" not in ran.stderr
    assert "error" not in ran.stderr
    if command.startswith("train"):
        assert '"result"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_commands_say_in_a_line_what_keeps_the_package_from_loading(tmp_path):
    code = "from sparsebilevel.cli import main; main(['config'])"
    environment = os.environ | {"SPARSEBILEVEL_NATIVE": "maybe"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: SPARSEBILEVEL_NATIVE='maybe' is not known")
    assert len(ran.stderr.splitlines()) == 1


def test_training_without_a_place_for_errors(tmp_path):
    """Some daemons close it."""
    line = (
        "main(['train', '--epochs', '1', '--method', 'static', '--arch', 'mlp', '--no-measure', '--output-dir', 'run'])"
    )
    code = f"import sys; sys.stderr = None; from sparsebilevel.cli import main; {line}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
