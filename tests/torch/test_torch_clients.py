"""Libraries that train with what they are handed: ours in the native's place, the same losses."""

import pytest
import torch
from support import assert_agree
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from twins import native, ours, trained

pytestmark = pytest.mark.slow
# Written out; made of a rule; with state from the beginning; with numbers in the state.
every_kind = pytest.mark.parametrize("name", ["SGD", "AdamW", "RAdam", "Adagrad", "NAdam"])
LEAF = "ignore:`isinstance.treespec, LeafSpec.` is deprecated"  # Lightning's, of PyTorch 2.13


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def problem():
    """A model and batches, always the same."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.randn(32, 4)
    return model, DataLoader(TensorDataset(x, x[:, :1] * x[:, 1:2]), batch_size=8)


def lightning(make):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    model, batches = problem()
    losses = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            loss = mse_loss(self.model(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", gradient_clip_val=1.0, **dict.fromkeys(quiet, False)
    )
    trainer.fit(Module(), batches)
    return losses


def accelerate(make):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, batches = problem()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)
    losses = []
    for _ in range(4):
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = mse_loss(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def transformers(make, folder):
    pytest.importorskip("accelerate", reason="Accelerate, which the Trainer needs, is missing")
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=8)
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(0, 20, (6,)), "labels": i % 2} for i in range(32)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=8, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    optimizer = make(model.parameters())
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_losses(run, name):
    mine, theirs = (
        run(lambda params, cls=cls: cls(params, **trained(name)))
        for cls in (ours(name), native(name))
    )
    assert_agree(mine, theirs, "float32")
    assert len({*theirs}) >= 8


@every_kind
@pytest.mark.filterwarnings(LEAF)
def test_lightning(name):
    assert_same_losses(lightning, name)


@every_kind
def test_accelerate(name):
    assert_same_losses(accelerate, name)


@every_kind
def test_transformers(name, tmp_path):
    assert_same_losses(lambda make: transformers(make, tmp_path), name)
