"""The examples of docs/trainers.md as they stand there, where the trainers are installed: trained, stopped, resumed."""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparsebilevel as sb

DOCUMENT = Path(__file__).parent.parent / "docs" / "trainers.md"


def example(heading):
    """Code below a heading of the document, with topology changes often enough for a short run."""
    (code,) = re.findall(rf"^## {heading}\n+```python\n(.*?)```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert "update_freq=1000" in code
    return code.replace("update_freq=1000", "update_freq=5")


def create_model():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def dataset():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 20, generator=generator), torch.randn(20, 5, generator=generator)
    return TensorDataset(x, (x @ w).argmax(1))


def assert_same_end(straight, resumed, start):
    """Two runs ended in the same bits, after changes of topology in both halves."""
    assert straight.step_count == resumed.step_count
    changes = [record["step"] for record in resumed.history]
    assert min(changes) < start < max(changes)
    for (name, a), (_, b) in zip(straight.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_lightning(tmp_path):
    L = pytest.importorskip("lightning")
    scope = {"L": L, "sb": sb, "create_model": create_model}
    exec(example("Lightning"), scope)

    class Model(scope["LitModel"]):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

    def run(seed, epochs, path=None):
        torch.manual_seed(seed)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet)
        model = Model()
        trainer.fit(model, DataLoader(dataset(), 32), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
        return model.sparsifier

    straight = run(0, 4)
    run(0, 2)
    assert_same_end(straight, run(1, 4, tmp_path / "saved.ckpt"), 16)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    prepare, loop = re.split(r"\n(?=for )", example("Accelerate"))

    def build(seed):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        torch.manual_seed(seed)
        model = create_model()
        scope = {"sb": sb, "F": F, "accelerator": accelerator, "create_model": lambda: model}
        scope["optimizer"] = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scope["loader"] = DataLoader(dataset(), 16)
        exec(prepare, scope)
        return scope

    def run(scope, epochs):
        for _ in range(epochs):
            exec(loop, scope)
        return scope

    straight = run(build(0), 4)["sparsifier"]
    run(build(0), 2)["accelerator"].save_state(tmp_path / "saved")
    second = build(1)
    second["accelerator"].load_state(tmp_path / "saved")
    assert_same_end(straight, run(second, 2)["sparsifier"], 16)


class Classifier(nn.Module):
    """As transformers.Trainer takes models: batches come as keywords, the loss is in what goes out."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = create_model()[:-1], nn.Linear(64, 5)

    def forward(self, x, labels):
        logits = self.classifier(self.body(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    code = example("transformers")
    data = [{"x": x, "labels": y} for x, y in dataset()]

    def run(seed, resume=None):
        torch.manual_seed(seed)
        args = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=4,
            per_device_train_batch_size=32,
            learning_rate=1e-2,
            save_strategy="epoch",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        scope = {"os": os, "torch": torch, "transformers": transformers, "sb": sb}
        exec(code, scope | (names := {"create_model": Classifier, "data": data, "args": args}), names)
        names["trainer"].train(resume_from_checkpoint=resume)
        (callback,) = [c for c in names["trainer"].callback_handler.callbacks if type(c).__name__ == "Sparsify"]
        return callback.sparsifier

    assert_same_end(run(0), run(1, resume=str(tmp_path / "checkpoint-16")), 16)
