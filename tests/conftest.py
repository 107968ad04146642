"""Options and fixtures of all tests. It lies here and not in the root, which must stay off ``sys.path``."""

import os
import subprocess
import sys

import pytest
import torch
import torch.utils._device


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    # ``with torch.device(...)`` looks functions up in a list that torch fills at the first use: with the real
    # torch.empty, or what poisoned_empty puts in its place would be listed, and every call inside it would be missed.
    torch.utils._device._device_constructors()


def pytest_collection_modifyitems(config, items):
    # Takes minutes, all other tests seconds: at the end one worker would run it and the others wait.
    items.sort(key=lambda item: item.name != "test_in_the_interpreter")
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: needs --run-slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run and every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Memory that the library asks for with ``torch.empty`` starts as NaN, so that reading it unwritten shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(function):
    def wrapper(*args, **kwargs):
        out = function(*args, **kwargs)
        if torch.compiler.is_compiling() or not out.is_floating_point():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return out.fill_(float("nan")) if caller.startswith("sparsebilevel") else out

    return wrapper


@pytest.fixture
def torchrun(tmp_path):
    """Call it with the arguments of the command ``sparsebilevel``, to run that in several processes."""

    def run(arguments, processes=2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*launch, "-m", "sparsebilevel", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums depend on it
        )
        assert done.returncode == 0, done.stderr

    return run
