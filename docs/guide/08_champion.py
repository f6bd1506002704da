# %% [markdown]
# # 8. From the best run to a champion
#
# **Goal.** You have a file that answers without PyTorch, the proof that it answers as the network did, and a name
# under which a program finds the best model of that day.

# %%
import numpy as np

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

config = ExperimentConfig(
    experiment_name="guide_champion", model_type="lightning_cnn", samples_per_class=80, image_size=24, max_epochs=4,
    enable_optuna=False, registry_name="guide_model", quiet=True,
)  # fmt: skip
pipeline = IntegratedMLPipeline(config)
summary = pipeline.run_complete_pipeline()
registered = summary["registered"]
print(f"{registered['name']} version {registered['version']} is {registered['alias']}")
assert registered["alias"] == "champion" and registered["version"] == "1"

# %% [markdown]
# ## Before: a pickle
#
# `torch.save(model)` and `torch.load` are quick to write. But the file needs the very code that made it, and loading
# it runs whatever is in it. A file from somebody else can do anything that you can.

# %%
import pickle


class Harmless:
    def __reduce__(self):
        return print, ("this line was printed by a file that was merely opened",)


pickle.loads(pickle.dumps(Harmless()))  # our own bytes; with a file of somebody else it would be too late

# %% [markdown]
# ## After: ONNX
#
# ONNX holds a graph of operations and their weights, and no code. The preprocessing is inside: raw die maps of any
# size go in, and nobody can resize them otherwise than the training did.

# %%
from waferlab.deployment.predictor import Predictor

file = config.checkpoints_dir / "lightning_cnn" / "model.onnx"
predictor = Predictor(file)
small, large = np.ones((20, 22), np.uint8), np.ones((61, 58), np.uint8)
large[20:40, 20:40] = 2  # a square of failed dies
for name, share in zip(predictor.class_names, predictor.probabilities([large])[0], strict=True):
    print(f"{name:10} {share:.3f}")
assert predictor.probabilities([small, large]).shape == (2, 9)

# %% [markdown]
# ## Parity: does the file answer as the network?
#
# Exporters have bugs, and runtimes compute in another order. So the file and the checkpoint are both asked about all
# test maps. A file that answers otherwise is not registered.

# %%
from waferlab.evaluation.inference import decision_of

finished = IntegratedMLPipeline(ExperimentConfig(**vars(config) | {"resume": True}))  # takes what is trained already
finished.prepare_data()
(result,), (checkpoint,) = finished.evaluate([finished.train_final_model("lightning_cnn")])
test_maps = [finished.maps[i] for i in finished.split.test]
difference = np.abs(predictor.probabilities(test_maps) - checkpoint.probabilities).max()
print(f"largest difference of a probability over {len(test_maps)} test maps: {difference:.1e}")
print("the decision in the file:", decision_of(result))
assert difference < 1e-3

# %% [markdown]
# ## The trap: a champion by luck
#
# The next run splits otherwise and reaches a score that is a little higher, on other test maps. Is its model better?
# Both have to be asked about the same maps, and about maps that neither was trained on. A new model becomes champion
# only if the interval of the difference lies above zero. Until then it is a challenger.

# %%
again = IntegratedMLPipeline(
    ExperimentConfig(**vars(config) | {"experiment_name": "guide_challenger", "seed": 1, "max_epochs": 2})
)
second = again.run_complete_pipeline()["registered"]
print(f"version {second['version']} is {second['alias']}")
print(second["verdict"])
assert second["version"] == "2" and second["alias"] == "challenger"

# %% [markdown]
# On MLflow's page each version has its alias. These are of `python demo.py` and then `python quick_start.py`:
#
# ![The versions of the registered model on MLflow's page](../pictures/mlflow_registry.png)
#
# Whoever asks for `models:/guide_model@champion` still gets version 1. The alias moves when a better model comes, and
# the program that asks does not change.

# %%
champion = Predictor.load("models:/guide_model@champion", tracking_uri="sqlite:///mlflow.db")
print(champion.name, champion.sha256[:12])
assert champion.name == "guide_model version 1"

# %% [markdown]
# ## Exercise
#
# A wafer turned is the same wafer. Give the predictor the same map three times: as it is, turned by 90 degrees, and
# mirrored. By how much does the probability of the likeliest class move?

# %% tags=["hide-cell"]
views = [large, np.rot90(large).copy(), large[:, ::-1].copy()]
shares = champion.probabilities(views)
likeliest = shares[:, shares[0].argmax()]
moved = float(np.ptp(likeliest))
print(f"it moves by {moved:.3f}; `tune_decision=True` answers with the mean of the eight views where that pays")
assert shares.shape == (3, 9) and moved == likeliest.max() - likeliest.min()
