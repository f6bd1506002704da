# %% [markdown]
# # 6. YOLO's blocks, for classification
#
# **Goal.** You can take the network of a detector, use it for whole pictures, and know the two surprises that come
# with the package.
#
# YOLO networks find objects in photographs. Their first half, the *backbone*, turns a picture into features, and a
# classifier can stand behind it: ultralytics ships such networks as `yolo11n-cls` and larger ones. (ultralytics is
# under the AGPL-3.0. To use it in your own experiments is one thing; to distribute or serve what contains it is
# another: read its licence first.)

# %%
import torch

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

torch.set_num_threads(1)
config = ExperimentConfig(
    model_type="yolo_inspired",
    samples_per_class=40,
    image_size=32,
    use_pretrained=False,
    enable_mlflow=False,
    threads=1,
)
pipeline = IntegratedMLPipeline(config)
model = pipeline.create_model("yolo_inspired")
for block in model.network.model:
    weights = sum(p.numel() for p in block.parameters())
    print(f"{type(block).__name__:10} {weights:9,} weights")
assert type(model.network.model[-1]).__name__ == "Classify"

# %% [markdown]
# `Conv` is a convolution with batch normalisation and the activation SiLU. `C3k2` sends half of the features through
# a few small blocks and joins both halves again, which saves half of the work. `C2PSA` lets every place look at every
# other one (*attention*). `Classify` pools over the picture and gives nine numbers.
#
# ## Before: the package's own trainer
#
# `YOLO("yolo11n-cls.yaml").train(data=folder)` reads pictures, scales and augments them as photographs, and reports
# accuracy. It knows nothing of lots or macro F1, and the network that it builds takes no map as it is:

# %%
from waferlab.models.yolo import import_ultralytics_tasks

packaged = import_ultralytics_tasks().ClassificationModel("yolo11n-cls.yaml", nc=9, verbose=False)
try:
    packaged(torch.zeros(4, 1, 32, 32))
    refused = ""
except RuntimeError as error:
    refused = str(error).splitlines()[0]
print("as packaged:", refused)
assert "channels" in refused

# %% [markdown]
# ## After: the network alone
#
# Only the network is taken, for one channel and nine classes. It is trained by the same step and on the same batches
# as every other model here, so that they can be compared.

# %%
from lightning.pytorch import seed_everything

from waferlab.training.callbacks import History

seed_everything(0, verbose=False)
history = History()
pipeline.fit("yolo_inspired", model, pipeline.data_module(), [history], max_epochs=3)
print("validation macro F1 by epoch:", [round(score, 3) for score in history.series()["val_macro_f1"]])
assert len(history.epochs) == 3

# %% [markdown]
# ## The traps
#
# **Probabilities in the place of logits.** While it trains, the network returns nine logits. Otherwise it returns a
# pair: probabilities first, then logits. Whoever takes the first for logits and puts them through a softmax again
# gets answers that are nearly equal for all classes, and no error.

# %%
images = torch.randn(4, 1, 32, 32)
with torch.inference_mode():
    pair = model.network.eval()(images)
probabilities, logits = pair
twice = probabilities.softmax(-1)
print("it returns", type(pair).__name__, "of", len(pair))
print(f"surest answer: {float(logits.softmax(-1).max()):.2f}; after a second softmax {float(twice.max()):.2f}")
torch.testing.assert_close(logits.softmax(-1), probabilities)
assert twice.max() < 1 / 9 * 2.5, "nine classes that all look alike"
torch.testing.assert_close(model(images), logits, rtol=1e-3, atol=1e-3)  # the project's own forward gives logits

# %% [markdown]
# **One thread for everything.** Importing ultralytics sets the environment variable `OMP_NUM_THREADS` to 1 and tells
# PyTorch so. From then on *every* model in the program trains on one core, and only the clock shows it. The project
# imports it in one place and puts the number back.

# %%
torch.set_num_threads(2)
import_ultralytics_tasks()
print("threads after the import:", torch.get_num_threads())
assert torch.get_num_threads() == 2

# %% [markdown]
# ## Exercise
#
# The network halves the picture again and again. How large are the features before the classifier for maps of 32, 40
# and 64 pixels? Run `model.network.model[:-1]` block by block. From which size on is there more than one place to
# look at?


# %% tags=["hide-cell"]
def last_size(pixels):
    features = torch.zeros(1, 1, pixels, pixels)
    with torch.inference_mode():
        for block in model.network.model[:-1]:
            features = block(features)
    return tuple(features.shape[2:])


sizes = {pixels: last_size(pixels) for pixels in (32, 40, 64)}
print(sizes)
assert sizes == {32: (1, 1), 40: (2, 2), 64: (2, 2)}
