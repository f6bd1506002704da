# %% [markdown]
# # 5. Runs one can trust
#
# **Goal.** You can find every training of last month, what it was trained with and how it ended.
#
# MLflow keeps *runs*: parameters, metrics of each epoch, files. Without a server it writes to a file, `mlflow.db`.

# %%
from mlflow import MlflowClient

from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline

config = ExperimentConfig(
    experiment_name="guide_tracking", model_type="lightning_cnn", samples_per_class=60, image_size=24,
    num_optuna_trials=4, search_epochs=3, max_epochs=5, quiet=True, workers=1,
)  # fmt: skip
summary = IntegratedMLPipeline(config).run_complete_pipeline()
print("test macro F1:", round(summary["models"][0]["test"]["macro_f1"], 3))

# %% [markdown]
# ## A tree
#
# One call made many runs, in a tree: the pipeline, below it a run for each model, below that one for each trial.

# %%
client = MlflowClient("sqlite:///mlflow.db")
experiment = client.get_experiment_by_name("guide_tracking")
runs = client.search_runs([experiment.experiment_id])
by_id = {run.info.run_id: run for run in runs}


def depth(run):
    parent = run.data.tags.get("mlflow.parentRunId")
    return 0 if parent is None else 1 + depth(by_id[parent])


for run in sorted(runs, key=lambda run: run.info.start_time):
    print("    " * depth(run) + f"{run.info.run_name}: {run.info.status}")
assert sorted(depth(run) for run in runs) == [0, 1, 2, 2, 2, 2]

# %% [markdown]
# `mlflow ui` in this folder shows the same tree. Here it is after `python demo.py`:
#
# ![The runs of demo.py on MLflow's page](../pictures/mlflow_runs.png)
#
# ## Before: a logger at each trainer
#
# Lightning's own MLflow logger, handed to each trainer, writes metrics just as well. But nobody tells it how the
# story ended. A trial that Optuna stops leaves through an exception, and the logger marks it as failed:

# %%
import contextlib

import lightning.pytorch as pl
import optuna
from lightning.pytorch.loggers import MLFlowLogger

pipeline = IntegratedMLPipeline(config)
pipeline.prepare_data()


class StopAtOnce(pl.Callback):
    def on_train_epoch_end(self, trainer, model):
        raise optuna.TrialPruned("not promising")


logger = MLFlowLogger("guide_before", tracking_uri="sqlite:///mlflow.db")
trainer = pl.Trainer(
    max_epochs=2, logger=logger, callbacks=[StopAtOnce()], enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip
with contextlib.suppress(optuna.TrialPruned):
    trainer.fit(pipeline.create_model("lightning_cnn"), datamodule=pipeline.data_module())
print("a pruned trial with Lightning's own logger:", client.get_run(logger.run_id).info.status)
assert client.get_run(logger.run_id).info.status == "FAILED"

# %% [markdown]
# **After.** Here a run is closed by whoever knows what became of it. FINISHED: it came to its end. KILLED: it was
# stopped on purpose, with the reason as a tag. FAILED: something broke.

# %%
ended = {run.info.run_name: run.info.status for run in runs}
print(ended)
assert "FAILED" not in ended.values() and "RUNNING" not in ended.values()
for run in runs:
    if run.info.status == "KILLED":
        print(run.info.run_name, "-", run.data.tags["reason"])

# %% [markdown]
# ## The trap: a run that runs for ever
#
# If a program is killed, nobody closes its runs: they say RUNNING for ever. So each run here carries the number and
# the start of its process as a tag, and the next start of the same experiment on this machine closes those whose
# process is gone. You can see the tag:

# %%
pipeline_run = next(run for run in runs if depth(run) == 0)
print("process:", pipeline_run.data.tags["process"].split(" ", 1)[1])
print("commit:", pipeline_run.data.tags.get("commit", "not in a repository"))
assert pipeline_run.data.tags["process"]

# %% [markdown]
# An abandoned run, such as one of a process of this number that began earlier, and the next start:

# %%
from pathlib import Path

from waferlab.tracking.runs import RunTree

host, number, start = pipeline_run.data.tags["process"].rsplit(" ", 2)
gone = f"{host} {number} before-{start}"
abandoned = client.create_run(experiment.experiment_id, run_name="abandoned", tags={"process": gone})
RunTree(experiment.name, uri=None, folder=Path(), warn=print).close()
now = client.get_run(abandoned.info.run_id)
print(abandoned.info.status, "->", now.info.status, "-", now.data.tags["reason"])
assert now.info.status == "KILLED"

# %% [markdown]
# ## Exercise
#
# Ask MLflow itself, not Python, for the best trial: `search_runs` takes a filter such as `tags.mlflow.parentRunId =
# '...'` and an order such as `metrics.best_val_macro_f1 DESC`.

# %% tags=["hide-cell"]
model_run = next(run for run in runs if depth(run) == 1)
best, *_ = client.search_runs(
    [experiment.experiment_id],
    filter_string=f"tags.mlflow.parentRunId = '{model_run.info.run_id}' and attributes.status = 'FINISHED'",
    order_by=["metrics.best_val_macro_f1 DESC"],
)
print(best.info.run_name, round(best.data.metrics["best_val_macro_f1"], 3))
finished = [run for run in runs if depth(run) == 2 and run.info.status == "FINISHED"]
assert best.data.metrics["best_val_macro_f1"] == max(run.data.metrics["best_val_macro_f1"] for run in finished)
