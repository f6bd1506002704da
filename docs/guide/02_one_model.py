# %% [markdown]
# # 2. One model, in plain PyTorch and in Lightning
#
# **Goal.** You have trained the same small network twice, with a loop of your own and with Lightning, and you know
# what the second way takes off your hands.

# %%
import torch

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

config = ExperimentConfig(
    model_type="lightning_cnn", samples_per_class=60, image_size=32, batch_size=32, enable_mlflow=False, threads=1
)
pipeline = IntegratedMLPipeline(config)
data = pipeline.data_module()
data.setup()
images, target = next(iter(data.train_dataloader()))
print("a batch:", tuple(images.shape), images.dtype, "- labels", tuple(target.shape), target.dtype)

# %% [markdown]
# The loaders give one byte for each pixel. `encode` turns them into numbers from -1 to 1.
#
# ## Before: a loop of your own
#
# Everything is in sight, and everything is yours to get right.

# %%
from waferlab.data.images import encode

EPOCHS = 3


def train_by_hand(model, data):
    """A training as one writes it; macro F1 on the validation part after each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = EPOCHS * len(data.train_dataloader())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    scores = []
    for _ in range(EPOCHS):
        model.train()
        for images, target in data.train_dataloader():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(encode(images)), target).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            pairs = [(model(encode(images)).argmax(1), target) for images, target in data.val_dataloader()]
        scores.append(macro_f1(*map(torch.cat, zip(*pairs, strict=True))))
    return scores


def macro_f1(predicted, target):
    """The mean over the classes of the harmonic mean of precision and recall."""
    hits = torch.stack([((predicted == c) & (target == c)).sum() for c in range(9)])
    sizes = torch.stack([(predicted == c).sum() + (target == c).sum() for c in range(9)])
    return float((2 * hits / sizes.clamp(min=1)).mean())


torch.manual_seed(0)
by_hand = train_by_hand(pipeline.create_model("lightning_cnn").network, data)
print("by hand:", [round(score, 3) for score in by_hand])
assert len(by_hand) == EPOCHS and by_hand[-1] > 1 / 9

# %% [markdown]
# ## After: Lightning
#
# A `LightningModule` says what a step is and which optimiser takes it. The `Trainer` does the rest: loops, devices,
# precision, checkpoints, progress. All models of this project share one such module, `WaferClassifier`, so a new one
# brings nothing but a network.

# %%
import lightning.pytorch as pl

from waferlab.training.callbacks import History

torch.manual_seed(0)
model = pipeline.create_model("lightning_cnn")
history = History()
trainer = pl.Trainer(
    max_epochs=EPOCHS, callbacks=[history], logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, datamodule=data)
print("Lightning:", [round(score, 3) for score in history.series()["val_macro_f1"]])
assert len(history.series()["val_macro_f1"]) == EPOCHS

# %% [markdown]
# The scores differ, and should: the second way augments the maps, and its optimiser is Muon. The point is what you
# did not have to write. Another device or precision changes the loop by hand; here it is an argument.

# %%
print({name: type(value).__name__ for name, value in model.hparams.items()})
assert model.hparams["dropout"] == 0.1

# %% [markdown]
# ## The trap: a network that was left in training mode
#
# Two layers work differently while training: dropout leaves out features, and batch normalisation takes the
# statistics of the batch in the place of those that it has learnt. If one forgets `model.eval()`, nothing fails. The
# answers are merely worse, and depend on which maps are asked about together.

# %%
batch = encode(torch.cat([images for images, _ in data.val_dataloader()]))
with torch.inference_mode():
    model.train()
    together, alone = model(batch)[:8], model(batch[:8])
    model.eval()
    together_right, alone_right = model(batch)[:8], model(batch[:8])
print(f"in training mode the same map gets answers that differ by {float((together - alone).abs().max()):.2f}")
print(f"in evaluation mode by {float((together_right - alone_right).abs().max()):.1e}")
assert (together - alone).abs().max() > 0.05
torch.testing.assert_close(together_right, alone_right, rtol=1e-3, atol=1e-3)

# %% [markdown]
# That is how one notices: ask about the same map twice, in different company. Lightning switches the mode for you,
# before and after each validation.
#
# ## Exercise
#
# The macro F1 above counts a class as zero that the maps do not hold. Write `macro_f1_of_present`, the mean over the
# classes that are among the targets, and check it against scikit-learn.

# %% tags=["hide-cell"]
from sklearn.metrics import f1_score


def macro_f1_of_present(predicted, target):
    present = target.unique()
    hits = torch.stack([((predicted == c) & (target == c)).sum() for c in present])
    sizes = torch.stack([(predicted == c).sum() + (target == c).sum() for c in present])
    return float((2 * hits / sizes).mean())


target = torch.tensor([0, 0, 1, 1, 1, 4])
predicted = torch.tensor([0, 1, 1, 1, 4, 4])
wanted = f1_score(target, predicted, labels=target.unique(), average="macro")
assert abs(macro_f1_of_present(predicted, target) - wanted) < 1e-6
