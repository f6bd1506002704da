# %% [markdown]
# # 9. To work: predict, serve, abstain, watch
#
# **Goal.** You can answer new maps from a file, over HTTP and in a program, let the model say "I do not know", and
# notice when the maps are no longer what it was trained for.

# %%
import subprocess
import sys

import numpy as np

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

config = ExperimentConfig(
    experiment_name="guide_work", model_type="lightning_cnn", samples_per_class=100, image_size=24, max_epochs=4,
    enable_optuna=False, registry_name="guide_model", quiet=True,
)  # fmt: skip
IntegratedMLPipeline(config).run_complete_pipeline()
MODEL = "models:/guide_model@champion"

# %% [markdown]
# ## Predict
#
# Tomorrow's maps come as a file. Here they are drawn by another seed, with lots that the model has never seen.

# %%
from waferlab.data.generator import generate_wafer_maps

drawn, labels, lots = generate_wafer_maps(20, seed=99)


def write(file, maps):
    """In the project's layout: all dies one after the other, and where each map begins."""
    np.savez(
        file,
        maps_flat=np.concatenate([one.ravel() for one in maps]),
        offsets=np.cumsum([0, *(one.size for one in maps)]),
        shapes=np.array([one.shape for one in maps]),
        group=lots,
    )


write("tomorrow.npz", drawn)
from pathlib import Path

import predict as script  # the file predict.py, whose path is needed below

done = subprocess.run(
    [sys.executable, script.__file__, "tomorrow.npz", "--model", MODEL], capture_output=True, text=True, check=True
)
print(done.stdout)
rows = Path("predictions.csv").read_text().splitlines()
print(rows[0], rows[1], sep="\n")
assert len(rows) == 1 + len(drawn)

# %% [markdown]
# ## Abstain
#
# **Before.** Take the likeliest class, whatever its probability. The network always has an answer, also for a map
# that shows nothing it knows, such as a chessboard:

# %%
from waferlab.deployment import Predictor

predictor = Predictor.load(MODEL, tracking_uri="sqlite:///mlflow.db")
chessboard = (np.indices((30, 30)).sum(0) % 2 + 1).astype(np.uint8)
answer = predictor.predict([chessboard])
print(f"a chessboard is {answer.classes[0]}, and sure of it: {answer.probabilities.max():.2f}")
assert answer.classes[0] in predictor.class_names

# %% [markdown]
# **After.** Ask for a *prediction set*: the classes that cannot be ruled out. A set at 90% coverage holds the true
# class in at least 90% of the maps of each class. That is a promise with a proof (conformal prediction), made on
# validation lots. Where the set is not exactly one class, somebody should look.

# %%
answers = predictor.predict(drawn, coverage=0.9)
from waferlab.data.maps import CLASS_NAMES

truth = np.array([predictor.class_names.index(CLASS_NAMES[label]) for label in labels])
held = answers.sets[np.arange(len(truth)), truth]
right = answers.predicted == truth
print(f"all maps: {right.mean():.0%} right; the set holds the truth in {held.mean():.0%}")
print(f"it abstains from {answers.abstains.mean():.0%}; of the rest {right[~answers.abstains].mean():.0%} are right")
assert right[~answers.abstains].mean() > right.mean()

# %% [markdown]
# ## Serve
#
# The same answers over HTTP. The service listens on this machine alone, bounds what it reads, and answers bad input
# with a sentence.

# %%
import json
import re
import urllib.error
import urllib.request

server = subprocess.Popen(
    [sys.executable, "-u", script.__file__, "--serve", "--port", "0", "--model", MODEL],
    stdout=subprocess.PIPE, text=True,
)  # fmt: skip
url = re.search(r"http://[0-9.:]+", next(line for line in server.stdout if "answers at" in line))[0]


def ask(body):
    request = urllib.request.Request(f"{url}/predict", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


reply = ask({"maps": [drawn[0].tolist()]})
print({key: reply["answers"][0][key] for key in ("class", "set", "abstain")})
assert reply["answers"][0]["class"] == answers.classes[0]
try:
    ask({"maps": [[[0, 7, 1]]]})
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
    assert error.code in (400, 422)
server.terminate()
server.wait()

# %% [markdown]
# ## The trap: a model that cannot complain
#
# A tester is set up anew, and from then on one die in ten fails at random. The network answers as surely as ever.
# Nobody notices, unless somebody compares the maps with those that the model was validated on.

# %%
rng = np.random.default_rng(0)
changed = [np.where((one == 1) & (rng.random(one.shape) < 0.1), 2, one).astype(np.uint8) for one in drawn]
write("changed.npz", changed)
verdicts = {}
for batch in ("tomorrow", "changed"):
    command = [sys.executable, script.__file__, f"{batch}.npz", "--model", MODEL, "--monitor", "--quiet"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    verdicts[batch] = next(line for line in said.splitlines() if "larm" in line)
    print(f"{batch}: {verdicts[batch]}")
assert verdicts["changed"] != verdicts["tomorrow"]

# %% [markdown]
# ## Exercise
#
# Ask for sets at 50% and at 90%. What happens to their size, and to the share of maps that the model abstains from?
# Then ask for 99%: why does nothing change any more? (See `predictor.sets.lots` and `predictor.sets.promised(0.99)`.)

# %% tags=["hide-cell"]
for coverage in (0.5, 0.9, 0.99):
    some = predictor.predict(drawn, coverage=coverage)
    print(f"{coverage:.0%}: {some.sets.sum(1).mean():.2f} classes a set, abstains from {some.abstains.mean():.0%}")
print("lots of each class in the validation part:", predictor.sets.lots)
print("classes for which 99% can be promised:", int(predictor.sets.promised(0.99).sum()))
bold, careful = predictor.predict(drawn, coverage=0.5), predictor.predict(drawn, coverage=0.9)
assert careful.sets.sum() > bold.sets.sum() and careful.abstains.mean() > bold.abstains.mean()
assert not predictor.sets.promised(0.99).any(), "a handful of lots cannot carry such a promise"
