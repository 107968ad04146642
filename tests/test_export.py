"""Export: what is written loads elsewhere and computes the same; slicing is exact."""

import copy
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebilevel as sb
from sparsebilevel.export import (
    export_model,
    input_shape_of,
    load_network,
    load_sliced,
    slice_model,
    to_semi_structured,
)
from sparsebilevel.models import create_model
from sparsebilevel.training import Config, train


def params(model):
    return sum(p.numel() for p in model.parameters())


def trained(model, x):
    """Normalisation and biases away from their initial values, as after training."""
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.1, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x + torch.randn_like(x))
    return model.eval()


def sliced(model, x):
    """The sliced model, after a check that it computes the same and that ``model`` is as it was."""
    before = copy.deepcopy(model.state_dict())
    small = slice_model(model, x)
    y = torch.randn_like(x)
    torch.testing.assert_close(small(y), model.eval()(y), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(True for _ in sb.sparse_layers(small))
    return small


@pytest.mark.parametrize("arch", ["digits_cnn", "resnet20", "resnet20_b", "vgg19_bn_cifar", "mobilenet_v2_cifar"])
@pytest.mark.parametrize("pattern", ["filter", "channel"])
def test_sliced_network_is_the_same_function(arch, pattern):
    x = torch.randn(2, 1, 8, 8) if arch == "digits_cnn" else torch.randn(2, 3, 32, 32)
    model = sb.sparsify(create_model(arch), 0.5, pattern=pattern, seed=0)
    trained(model, x)
    small = sliced(model, x)
    assert params(small) < params(model)
    x = x[:1]
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)  # the batch size is not fixed


def masked(layer, rows=(), columns=()):
    mask = torch.ones_like(layer.mask)
    mask[list(rows)] = False
    mask[:, list(columns)] = False
    layer.set_mask(mask)


def test_unread_input_channels_take_producer_and_norm_with_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    sb.sparsify(model, 0.5, init="dense")
    masked(model[3], columns=(1, 5))
    small = sliced(trained(model, torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8))
    assert small[0].weight.shape == (6, 3, 3, 3)
    assert small[1].num_features == small[1].running_mean.numel() == 6
    assert small[3].weight.shape == (4, 6, 3, 3)


@pytest.mark.parametrize(("padding", "mode", "expected"), [(0, "zeros", 6), (1, "zeros", 8), (1, "reflect", 6)])
def test_constant_of_a_removed_filter_is_folded_only_where_that_is_exact(padding, mode, expected):
    """BN makes another number of the zero; a zero-padded convolution does not see it at the border."""
    conv = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv)
    sb.sparsify(model, 0.5, init="dense")
    masked(model[0], rows=(0, 7))
    x = torch.randn(4, 3, 8, 8)
    trained(model, x)
    with torch.no_grad():
        model[1].bias.fill_(1.0)
        model[1].running_mean.fill_(0.0)
        model[0].bias.fill_(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing can go
        small = sliced(model, x)
    assert small[0].out_channels == expected
    assert (small[3].bias is not None) == (expected == 6)


def test_constant_that_relu_makes_zero_needs_no_folding():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, bias=False))
    sb.sparsify(model, 0.5, init="dense")
    masked(model[0], rows=(0, 7))
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].bias.fill_(-1.0)
    small = sliced(model.eval(), torch.randn(4, 3, 8, 8))
    assert small[0].out_channels == 6
    assert small[3].bias is None


def test_flattened_features_and_chains_of_linear_layers():
    model = nn.Sequential(
        *(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6 * 9, 16),
            nn.GELU(),
            nn.Linear(16, 3),
        )
    )
    sb.sparsify(model, 0.5, init="dense")
    masked(model[0], rows=(2,))  # constant, folded into the linear layer
    masked(model[6], columns=range(4, 16))  # rows 4 to 15 of the linear layer are not read
    masked(model[4], columns=range(9))  # nor is, by those that stay, channel 0
    small = sliced(model, torch.randn(2, 1, 8, 8))
    assert [m.weight.shape[0] for m in (small[0], small[4], small[6])] == [4, 4, 3]
    assert small[4].in_features == 4 * 9


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(x).mean([2, 3])


def test_both_sides_of_an_addition_lose_the_same_channels():
    model = sb.sparsify(Residual(), 0.5, init="dense")
    masked(model.a, columns=(3, 4), rows=(0,))
    masked(model.head, columns=(4, 5))
    small = sliced(model, torch.randn(2, 3, 4, 4))
    # Channel 4 alone is read by neither; a's dead filter is a constant that b's bias takes.
    assert [m.weight.shape[:2] for m in (small.stem, small.a, small.b, small.head)] == [(7, 3), (7, 7), (7, 7), (2, 7)]


class Shared(nn.Module):
    """Everything that must be left alone: a layer used twice, concatenation, a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.twice(self.twice(x))
        return self.last(self.grouped(torch.cat([x, y], 1)))


def test_what_cannot_be_followed_stays():
    model = sb.sparsify(Shared(), 0.5, pattern="filter", seed=1)
    with pytest.warns(UserWarning, match="nothing could be sliced off Shared: no whole channel can go") as warned:
        small = sliced(model, torch.randn(2, 4, 3, 3))
    assert warned[0].filename == __file__
    assert params(small) == params(model)


def unpack(x):
    n, _, _, _ = x.shape
    return x.view(n, -1)


FLATTENINGS = {
    "flatten": lambda x: torch.flatten(x, 1),
    "size(0)": lambda x: x.view(x.size(0), -1),
    "size(dim=0)": lambda x: x.view(x.size(dim=0), -1),
    "size()[0]": lambda x: x.view(x.size()[0], -1),
    "shape[0]": lambda x: x.reshape(x.shape[0], -1),
    "tuple": lambda x: x.view((x.size(0), -1)),
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
    "torch.reshape by name": lambda x: torch.reshape(x, shape=[x.shape[0], -1]),
    "unpacked shape": unpack,
}


class Flattening(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.flatten = flatten
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 3)

    def forward(self, x):
        return self.fc(self.flatten(F.relu(self.conv(x))))


@pytest.mark.parametrize("spelling", FLATTENINGS)
def test_flattening_is_followed_in_every_spelling(spelling):
    model = sb.sparsify(Flattening(FLATTENINGS[spelling]), 0.75, pattern="filter", exclude="fc", seed=0)
    small = sliced(model, torch.randn(2, 1, 8, 8))
    assert (small.conv.out_channels, small.fc.in_features) == (2, 2 * 36)


def test_flattening_by_the_batch_size_of_the_input():
    class FromInput(Flattening):
        def forward(self, x):
            n = x.shape[0]
            return self.fc(F.relu(self.conv(x)).view(n, -1))

    model = sb.sparsify(FromInput(None), 0.75, pattern="filter", exclude="fc", seed=0)
    assert sliced(model, torch.randn(2, 1, 8, 8)).conv.out_channels == 2


@pytest.mark.parametrize(
    "flatten", [lambda x: x.view(x.size(1), -1), lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3))]
)
def test_other_sizes_keep_their_channels(flatten):
    model = Flattening(flatten)
    model.fc = nn.Linear(8 * 36, 3)
    sb.sparsify(model, 0.75, pattern="filter", exclude="fc", seed=0)
    with pytest.warns(UserWarning, match="nothing could be sliced off"):
        assert sliced(model, torch.randn(8, 1, 8, 8)).conv.out_channels == 8


def test_a_pooling_whose_divisor_is_not_its_size_makes_other_numbers_of_constants():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(8, 2, 1))
    sb.sparsify(model, 0.5, init="dense")
    masked(model[0], rows=(0, 1, 2))
    with torch.no_grad():
        model[0].bias[:2] = 0.0  # zeros stay zeros
        model[0].bias[2] = 1.0
    assert sliced(model, torch.randn(2, 1, 8, 8))[0].out_channels == 6


def test_arguments_of_an_activation_hold_for_constants_too():
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.gelu(F.relu(self.a(x), True), approximate="tanh"))

    model = sb.sparsify(Activated(), 0.5, init="dense").double()
    masked(model.a, rows=range(5))
    with torch.no_grad():
        model.a.bias.fill_(2.0)
        model.b.weight.fill_(1.0)
    x = torch.randn(2, 4, dtype=torch.double)
    torch.testing.assert_close(slice_model(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


def test_optional_arguments_take_their_defaults():
    class Optional(Flattening):
        def forward(self, x, skip=None, pool=(1, 1), *, double=False):
            x = F.max_pool2d(self.conv(x), pool)
            if skip is not None:
                x = x + skip
            return self.fc(self.flatten(F.relu(2 * x if double else x)))

    model = sb.sparsify(Optional(FLATTENINGS["flatten"]), 0.75, pattern="filter", exclude="fc", seed=0)
    assert sliced(model, torch.randn(2, 1, 8, 8)).conv.out_channels == 2


@pytest.mark.parametrize("wrong", [False, True])
def test_several_results_are_compared(wrong):
    class Several(Flattening):
        def forward(self, x):
            y = self.fc(self.flatten(F.relu(self.conv(x))))
            return {"shape": x.shape[2:], "more": (y, y * (self.conv.out_channels if wrong else 1))}

    model = sb.sparsify(Several(FLATTENINGS["flatten"]), 0.75, pattern="filter", exclude="fc", seed=0)
    x = torch.randn(2, 1, 8, 8)
    if wrong:
        with pytest.raises(RuntimeError, match="does not compute the same"):
            slice_model(model, x)
    else:
        torch.testing.assert_close(slice_model(model, x)(x), model.eval()(x))


class Called(nn.Module):
    """Calls a layer by keyword, takes tokens, drops whole maps or has a computed weight."""

    def __init__(self, kind):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.first = nn.Conv2d(8, 16, 1)
        self.between = nn.Dropout2d()
        self.inner = nn.Conv2d(16, 16, 1, bias=False)
        if kind == "computed":
            nn.utils.parametrizations.weight_norm(self.inner)
        self.last = nn.Conv2d(16, 4, 1)
        self.kind = kind

    def forward(self, x):
        x = self.words(x).permute(0, 3, 1, 2) if self.kind == "tokens" else x
        x = self.between(self.first(x))
        return self.last(self.inner(input=x) if self.kind == "keyword" else self.inner(x))


@pytest.mark.filterwarnings("error:dropout2d")
@pytest.mark.filterwarnings("ignore:nothing could be sliced")
@pytest.mark.parametrize(("kind", "kept"), [("plain", 8), ("tokens", 8), ("keyword", 16), ("computed", 16)])
def test_layers_are_followed_or_stay_as_they_are(kind, kept):
    model = sb.sparsify(Called(kind), 0.5, pattern="filter", include=["first", "last"], seed=0)
    x = torch.randint(0, 10, (3, 5, 5)) if kind == "tokens" else torch.randn(3, 8, 5, 5)
    small = slice_model(model, x)
    assert small.first.out_channels == kept
    torch.testing.assert_close(small(x), model.eval()(x))


def test_a_layer_keeps_one_channel():
    model = sb.sparsify(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 0.5, init="dense")
    masked(model[2], columns=range(4))
    assert sliced(model, torch.randn(2, 4))[0].out_features == 1


def test_untraceable_model_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx"):
        slice_model(Branching(), torch.zeros(1, 2))


def test_code_that_depends_on_a_width_is_found_out():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x)).sum() * self.a.out_features

    model = sb.sparsify(Fixed(), 0.5, init="dense")
    masked(model.b, columns=(0,))
    with pytest.raises(RuntimeError, match="does not compute the same"):
        slice_model(model, torch.randn(2, 4))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of the embedded data, as far as export reads it."""

    def write(arch="digits_cnn", sparsity=0.75, pattern="unstructured", data="digits", classes=10, **extra):
        shape = {"digits": (1, 8, 8), "fake": (3, 32, 32)}[data]
        model = create_model(arch, classes, 64 if arch == "mlp" else shape[0])
        sb.sparsify(model, sparsity, pattern=pattern, seed=0)
        trained(model, torch.randn(4, *shape))
        config = {"arch": arch, "data": data, "method": "static", "pattern": pattern}
        torch.save({"model": model.state_dict(), "config": config} | extra, tmp_path / "checkpoint.pth")
        return tmp_path, model

    return write


def test_dense_export_loads_into_the_original_model(run, tmp_path):
    folder, model = run()
    path = export_model(folder, tmp_path / "dense.pth", "dense")
    dense = create_model("digits_cnn")
    dense.load_state_dict(torch.load(path, weights_only=True))
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(dense.eval()(x), model(x))
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_full_disk_is_an_error_of_the_system(name, run, tmp_path, monkeypatch):
    """The writers of torch and safetensors raise errors of their own, which do not say what went wrong."""
    if name == "x.safetensors":
        pytest.importorskip("safetensors")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", *a: opened(Path("/dev/full") if "w" in mode else path, mode)
    )
    with pytest.raises(OSError, match=f"No space left on device: '.*/{name}'"):
        export_model(run()[0], tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_to_names_the_output(run):
    with pytest.raises(OSError, match=r": '/proc/x\.pth'"):
        export_model(run()[0], "/proc/x.pth")


def test_only_federated_runs_have_clients(run, tmp_path):
    folder, _ = run()
    with pytest.raises(ValueError, match=r"client=0 is not allowed: .* is not of a federated run"):
        export_model(folder, tmp_path / "x.pth", client=0)


@pytest.mark.parametrize("is_older", [False, True])
def test_averaged_weights_of_a_run_are_exported(is_older, tmp_path):
    options = {"measure": False, "quiet": True, "validation": 0.1, "batch_size": 256, "update_freq": "2"}
    train(Config(method="rigl", epochs=1, model_ema=True, output_dir=str(tmp_path / "run"), **options))
    for file in (tmp_path / "run" / "checkpoint.pth", tmp_path / "run" / "best.pth"):
        checkpoint = torch.load(file, weights_only=True)
        ema = checkpoint["ema"]
        if is_older:  # the count stood among the weights
            torch.save(checkpoint | {"ema": ema | {"ema_steps": torch.tensor(checkpoint.pop("ema_steps"))}}, file)
        found = torch.load(export_model(file, tmp_path / "ema.pth"), weights_only=True)
        create_model("digits_cnn").load_state_dict(found)
        assert not torch.equal(ema["0.weight"], checkpoint["model"]["0.weight"])
        assert torch.equal(found["0.weight"], ema["0.weight"] * ema["0.mask"])
    network, _ = load_network(tmp_path / "run")
    assert torch.equal(network[0].weight, checkpoint["ema"]["0.weight"])


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "nm:2:4"])
def test_a_loaded_network_goes_on_with_its_masks_and_its_pattern(run, pattern):
    folder, model = run("mlp", 0.5, pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network, _ = load_network(folder)
    sb.Static(network)
    for (_, found), (_, expected) in zip(sb.sparse_layers(network), sb.sparse_layers(model), strict=True):
        assert torch.equal(found.mask, expected.mask)
        assert (found.pattern, found.num_kept) == (expected.pattern, expected.num_kept)


def test_safetensors_export(run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    folder, model = run("mlp")
    found = safetensors.load_file(export_model(folder, tmp_path / "model.safetensors", "safetensors"))
    expected = sb.densify(model).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in found)


@pytest.mark.slow
def test_onnx_export_computes_the_same(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder, model = run()
    path = export_model(folder, tmp_path / "model.onnx", "onnx")
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(5, 1, 8, 8)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "data"), [("digits_cnn", "digits"), ("mlp", "digits"), ("mobilenet_v2_cifar", "fake")]
)
def test_sliced_export_is_smaller_and_comes_back(run, tmp_path, arch, data):
    folder, model = run(arch, 0.5, "channel" if arch != "mlp" else "filter", data, classes=7)
    small = load_sliced(export_model(folder, tmp_path / "small.pth", "sliced"))
    assert params(small) < params(model)
    x = torch.randn(3, *((1, 8, 8) if data == "digits" else (3, 32, 32)))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_suffix_says_the_format_and_the_folder_is_made(run, tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder, _ = run()
    written = export_model(folder, tmp_path / "new" / "net.safetensors")
    assert set(load_file(written)) == set(torch.load(export_model(folder, tmp_path / "net.pt"), weights_only=True))


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("net.foo", None, "net.foo' is not allowed; expected a name that ends in .pth, .pt, .safetensors, .onnx"),
        ("net", None, "net' is not allowed; expected a name that ends in .pth, .pt, .safetensors, .onnx"),
        ("net.safetensors", "dense", "is not allowed with format='dense'; expected a name that ends in .pth, .pt"),
        ("net.pth", "onnx", "is not allowed with format='onnx'; expected a name that ends in .onnx"),
        ("net.bin", "sliced", "is not allowed with format='sliced'; expected a name that ends in .pth, .pt"),
    ],
)
def test_a_suffix_that_says_another_format_is_refused(run, tmp_path, name, format, message):
    folder, _ = run()
    with pytest.raises(ValueError, match=re.escape(message)):
        export_model(folder, tmp_path / name, format)
    assert not (tmp_path / name).exists()


def test_an_export_from_which_nothing_can_be_sliced_says_so(run, tmp_path):
    folder, _ = run("mlp", sparsity=0.1)
    with pytest.warns(UserWarning, match="nothing could be sliced off"):
        export_model(folder, tmp_path / "small.pth", "sliced")


def test_two_of_four_says_what_it_needs(run, tmp_path):
    folder, _ = run("mlp")
    with pytest.raises(ValueError, match="pattern nm:2:4"):
        export_model(folder, tmp_path / "x.pth", "2:4")
    folder, _ = run("mlp", pattern="nm:2:4")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"compute capability 8\.0 or later; there is none"):
            export_model(folder, tmp_path / "x.pth", "2:4")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_of_four_computes_the_same():
    model = sb.sparsify(create_model("mlp", 64, 128), 0.5, pattern="nm:2:4").cuda()
    packed = to_semi_structured(model)
    x = torch.randn(64, 128, device="cuda")
    torch.testing.assert_close(packed(x.half()).float(), model(x), rtol=1e-2, atol=1e-2)


def test_what_cannot_be_exported_is_refused_and_nothing_is_lost(run, tmp_path):
    folder, _ = run()
    target = tmp_path / "out.pth"
    target.write_text("old")
    with pytest.raises(ValueError, match="format='tflite' is not known; allowed: dense"):
        export_model(folder, target, "tflite")
    with pytest.raises(ValueError, match="has masks; expected a file that .* wrote as 'sliced'"):
        load_sliced(folder / "checkpoint.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        export_model(tmp_path / "nowhere", target)
    with pytest.raises(ValueError, match="expected a file, and this is a folder"):
        export_model(folder, tmp_path)
    with pytest.raises(ValueError, match="is the source itself"):
        export_model(folder, folder / "checkpoint.pth")
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    torch.save(checkpoint["model"], tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth has no 'config'"):
        export_model(tmp_path / "bare.pth", target)
    checkpoint["config"]["arch"] = "resnet20"
    torch.save(checkpoint, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is of another architecture"):
        export_model(tmp_path / "other.pth", target)
    with pytest.raises(ValueError, match=r"out\.pth cannot be read"):
        load_sliced(target)
    assert target.read_text() == "old"


class PreActivation(nn.Module):
    """The activation writes into what the skip reads."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def activate(self, x):
        return {"module": self.relu, "function": lambda x: nn.functional.relu(x, True), "method": lambda x: x.relu_()}[
            self.kind
        ](x)

    def forward(self, x):
        alias = self.same(x)
        y = self.activate(x)
        return alias + self.second(self.relu(self.first(y)))


@pytest.mark.parametrize("kind", ["module", "function", "method"])
def test_slices_of_networks_that_write_in_place(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), PreActivation(kind), PreActivation(kind)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    sb.sparsify(net, 0.5, pattern="filter", exclude="5", seed=0)
    x = torch.randn(2, 3, 8, 8)
    small = slice_model(net.eval(), x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.9 * sum(p.numel() for p in net.parameters())


class OfLayers(nn.Module):
    """Some layers, and what is called with them and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def test_what_an_unknown_operation_read_before_an_addition_stays():
    """The two maps are one set of channels from the addition on; what protects either protects both."""

    def forward(net, x):
        a, b = net.a(x), net.b(x)
        sums = b.cumsum(1)
        return net.head(a + b), sums

    model = OfLayers(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3), head=nn.Conv2d(8, 4, 1))
    sb.sparsify(model, 0.5, init="dense")
    masked(model.head, columns=(1, 5))
    with pytest.warns(UserWarning, match="nothing could be sliced off"):
        small = slice_model(model, torch.randn(2, 3, 8, 8))
    assert small.b.out_channels == 8


def test_a_module_that_writes_in_place_behind_a_pooling_leaves_what_was_pooled():
    """The constant channel is -1 for one reader and, after the ReLU, 0 for the other."""

    def forward(net, x):
        x = net.first(x)
        return net.left(net.relu(net.pool(x))) + net.right(x).mean((-1, -2), keepdim=True)

    layers = {"first": nn.Conv2d(3, 8, 3), "pool": nn.MaxPool2d(2), "relu": nn.ReLU(inplace=True)}
    model = OfLayers(forward, **layers, left=nn.Conv2d(8, 4, 1), right=nn.Conv2d(8, 4, 1))
    sb.sparsify(model, 0.5, init="dense")
    masked(model.first, rows=(2,))
    with torch.no_grad():
        model.first.bias.fill_(-1.0)
    small = sliced(model, torch.randn(2, 3, 8, 8))
    assert small.first.out_channels == 7


@pytest.mark.parametrize("dims", [(2, 3), (-1, -2), [3, -2]], ids=str)
def test_a_mean_over_pixels_in_any_spelling(dims):
    def forward(net, x):
        return net.fc(net.conv(x).mean(dims))

    model = OfLayers(forward, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4))
    sb.sparsify(model, 0.5, init="dense")
    masked(model.fc, columns=(1, 5))
    assert sliced(model, torch.randn(2, 3, 8, 8)).conv.out_channels == 6


def test_padding_of_one_side_of_a_map_alone_keeps_constants():
    """A channel that is constant inside and zero beyond the left border is no constant."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=(0, 1)))
    sb.sparsify(model, 0.5, init="dense")
    masked(model[0], rows=(0, 7))
    with pytest.warns(UserWarning, match="nothing could be sliced off"):
        small = sliced(model, torch.randn(4, 3, 8, 8))
    assert small[0].out_channels == 8


def test_three_of_four_is_not_two_of_four():
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.view(8, 4, 4)[:, :, 0] = 0
    with pytest.raises(ValueError, match="at most 2 non-zeros in every 4 consecutive inputs, and the model has none"):
        to_semi_structured(layer)


def test_the_source_is_not_overwritten_under_another_spelling(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "checkpoint.pth").write_bytes(b"weeks of training")
    with pytest.raises(ValueError, match="is the source itself; give another file"):
        export_model(tmp_path, tmp_path / "runs" / ".." / "checkpoint.pth")
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"weeks of training"


def test_the_shape_of_a_sample_is_that_of_the_run():
    assert input_shape_of({"data": "fake", "image_size": 16}) == (3, 16, 16)
    assert input_shape_of({"data": "fake", "image_size": None}) == (3, 32, 32)
    assert input_shape_of({"data": "imagefolder"}) == (3, 224, 224)
