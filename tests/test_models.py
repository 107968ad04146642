"""Every network against the counts that papers and reference code agree on; see also the package's own docstring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsebilevel._torchvision import import_torchvision
from sparsebilevel.models import create_model, list_models

# name, classes, conv and linear weights, all parameters, multiply-adds of conv and linear layers at the given size (in
# millions, as printed in the papers)
COUNTS = [
    ("resnet8", 10, 74_800, 75_290, 12.24),
    ("resnet14", 10, 171_568, 172_506, 26.40),
    ("resnet20", 10, 268_336, 269_722, 40.55),
    ("resnet32", 10, 461_872, 464_154, 68.86),
    ("resnet44", 10, 655_408, 658_586, 97.17),
    ("resnet56", 10, 848_944, 853_018, 125.49),
    ("resnet110", 10, 1_719_856, 1_727_962, 252.89),
    ("resnet20_b", 10, 270_896, 272_474, 40.81),
    ("resnet32_b", 10, 464_432, 466_906, 69.12),
    ("resnet56_b", 10, 851_504, 855_770, 125.75),
    ("resnet32x2", 10, 1_855_584, 1_860_522, 275.6),
    ("resnet32x2", 100, 1_867_104, 1_872_132, 275.6),
    ("resnet18_cifar", 10, 11_164_352, 11_173_962, 555.4),
    ("resnet18_cifar", 100, 11_210_432, 11_220_132, 555.5),
    ("resnet34_cifar", 10, 21_265_088, 21_282_122, 1159.4),
    ("resnet34_cifar", 100, 21_311_168, 21_328_292, 1159.4),
    ("vgg19_bn_cifar", 10, 20_024_000, 20_035_018, 398.1),
    ("vgg19_bn_cifar", 100, 20_070_080, 20_081_188, 398.2),
    ("mobilenet_v2_cifar", 10, 2_261_824, 2_296_922, 91.15),
    ("mobilenet_v2_cifar", 100, 2_377_024, 2_412_212, 91.27),
    ("mobilenet_v2_dwnp", 10, 2_262_592, 2_297_754, 304.1),
    ("mobilenet_v2", 1000, 3_469_760, 3_504_872, 300.8),
    ("resnet18", 1000, 11_678_912, 11_689_512, 1814),
    ("resnet34", 1000, 21_779_648, 21_797_672, 3664),
    ("resnet50", 1000, 25_502_912, 25_557_032, 4089),
]


def needs_torchvision() -> None:
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")


def multiply_adds(model: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image, from the output shapes on the meta device."""
    total = 0

    def add(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        positions = output[0, 0].numel() if output.dim() == 4 else 1
        total += module.weight.numel() * positions  # each weight is used once at each output position

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return total


@pytest.mark.parametrize(("name", "classes", "weights", "parameters", "millions"), COUNTS)
def test_counts(name: str, classes: int, weights: int, parameters: int, millions: float) -> None:
    imagenet = classes == 1000
    if imagenet:
        needs_torchvision()
    model = create_model(name, classes).to("meta")
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == weights
    assert sum(p.numel() for p in model.parameters()) == parameters
    decimals = len(str(millions).partition(".")[2])
    assert multiply_adds(model, 224 if imagenet else 32) / 1e6 == pytest.approx(millions, abs=0.5001 * 10**-decimals)


@pytest.mark.parametrize("name", list_models())
def test_forward_backward(name: str) -> None:
    shapes = {"digits_cnn": (2, 1, 8, 8), "mlp": (2, 1, 8, 8)}
    x = torch.randn(shapes.get(name, (2, 3, 32, 32)))
    model = create_model(name, 7)
    y = model(x)
    assert y.shape == (2, 7)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_arguments_reach_the_model() -> None:
    assert create_model("resnet20", 10, 1)(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    assert create_model("digits_cnn", 10, 3)(torch.randn(2, 3, 9, 7)).shape == (2, 10)
    mlp = create_model("mlp", 3, 5, hidden=(4,))
    assert [tuple(p.shape) for p in mlp.parameters()] == [(4, 5), (4,), (3, 4), (3,)]


def test_digits_cnn_is_small() -> None:
    assert 40_000 < sum(p.numel() for p in create_model("digits_cnn").parameters()) < 100_000


def test_initialisation_is_reproducible_and_scaled() -> None:
    torch.manual_seed(0)
    first = create_model("mobilenet_v2_cifar")
    torch.manual_seed(0)
    second = create_model("mobilenet_v2_cifar")
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    depthwise = first.blocks[-1].conv2.weight  # [960, 1, 3, 3], fan-out 9
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    dense = first.conv2.weight
    assert dense.std().item() == pytest.approx((2 / 1280) ** 0.5, rel=0.05)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"num_classes=0: must be at least 1"):
        create_model("resnet20", 0)
    with pytest.raises(ValueError, match=r"in_channels=-1: must be at least 1"):
        create_model("resnet20", 10, -1)


def test_unknown_names_list_near_matches() -> None:
    needs_torchvision()
    with pytest.raises(ValueError, match=r"unknown model 'resnet32_x2'.*resnet32x2"):
        create_model("resnet32_x2")
    with pytest.raises(ValueError, match=r"unknown model 'qqq'; ours are resnet8"):
        create_model("qqq")
    with pytest.raises(ValueError, match=r"in_channels=1: torchvision's resnet18 takes 3"):
        create_model("resnet18", 10, 1)


def test_torchvision_is_imported_only_on_demand(tmp_path: Path) -> None:
    code = (
        "import sys, sparsebilevel.models as m; m.create_model('mlp'); assert 'torchvision' not in sys.modules\n"
        "from sparsebilevel._torchvision import import_torchvision\n"
        "try: tv = import_torchvision()\n"
        "except ImportError: sys.exit()\n"
        "assert import_torchvision() is tv and tv.datasets and tv.transforms and tv.models"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)  # not the root, which holds sources


def test_missing_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match=r"pip install sparsebilevel\[vision\]"):
        create_model("resnet50")
