# %% [markdown]
# # 10. More than one machine
#
# **Goal.** You can let processes on as many machines as you like work on one search, and you know what happens when
# one of them dies.
#
# The study is in a database that all can reach. A worker takes the next setting, trains, writes down what came out,
# and takes the next. Nobody hands out work, so nobody can be missing.
#
# Here two processes share a database in a file. On several machines it is PostgreSQL, and only the address changes.

# %%
import json
import subprocess
import sys
from pathlib import Path

settings = dict(
    experiment_name="guide_many", model_type="lightning_cnn", samples_per_class=40, image_size=24, search_epochs=2,
    max_epochs=3, num_optuna_trials=6, storage="sqlite:///study.db", workers=1, threads=1, enable_mlflow=False,
    quiet=True, pruner="none",
)  # fmt: skip
Path("lead.py").write_text(
    "import json, sys\n"
    "from integrated_pipeline import ExperimentConfig, IntegratedMLPipeline\n"
    "IntegratedMLPipeline(ExperimentConfig(**json.loads(sys.argv[1]))).run_complete_pipeline()\n"
)

# %% [markdown]
# ## Before: a list of settings, cut into pieces
#
# One gives each machine its share of the settings. All wait for the slowest; one dies, and its share is lost; and no
# machine learns from what another has found.

# %%
rates = [10 ** (-4 + number / 4) for number in range(8)]
pieces = {"machine 1": rates[:4], "machine 2": rates[4:]}
tried = [rate for machine, piece in pieces.items() if machine != "machine 2" for rate in piece]  # the other one died
print(f"{len(tried)} of {len(rates)} settings were tried, none larger than {max(tried):.4f}")
assert len(tried) == len(rates) / 2

# %% [markdown]
# ## After: one study
#
# One program leads: it waits for the others, trains the winner and reports. The others join, before or after it
# began.

# %%
join = [sys.executable, "-m", "waferlab.search.workers", "--storage", "sqlite:///study.db", "--model", "lightning_cnn"]
worker = subprocess.Popen([*join, "--output-dir", "worker"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
lead = subprocess.run([sys.executable, "lead.py", json.dumps(settings)], capture_output=True, text=True)
print(lead.stdout[-400:], lead.stderr[-2000:] if lead.returncode else "")
assert lead.returncode == 0 and worker.wait(timeout=60) == 0

# %%
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(study_name="guide_many/lightning_cnn", storage="sqlite:///study.db")
done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
by_process = {}
for trial in done:
    by_process.setdefault(trial.user_attrs["process"].split(" ")[1], []).append(trial.number)
print(f"{len(done)} trials by {len(by_process)} processes: {list(by_process.values())}")
assert len(done) == 6

# %% [markdown]
# ## The trap: a worker that dies, and one that only slept
#
# A worker that is killed says nothing, and its trial would run for ever. So each gives a *sign of life* every few
# seconds, and the trial of one that has missed five is put back into the queue by whoever notices first.
#
# But a laptop whose lid was closed misses them as well, and wakes up. Its trial is another's by then: if it wrote
# down its result, the trial would count twice. It finds the trial taken and takes another. Counting shows it:

# %%
from waferlab.search.study import run_again
from waferlab.search.trials import counted_trials

made_up = optuna.create_study(direction="maximize")
lost = made_up.ask()
lost.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
made_up.tell(lost, state=optuna.trial.TrialState.FAIL)  # its worker was gone
run_again(made_up, lost)
again = made_up.ask()
value = again.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
made_up.tell(again, 0.8)
print(
    "the same setting again:",
    value == lost.params["learning_rate"],
    "- trials that count:",
    len(counted_trials(made_up)),
)
assert value == lost.params["learning_rate"] and len(counted_trials(made_up)) == 1

# %% [markdown]
# `deploy/kubernetes` starts the same commands on a cluster, and `waferlab.search.ray_workers` lets Ray start them.
#
# ## Exercise
#
# A trial takes 60 seconds, and the database takes 20 trials per second at most. How many workers saturate it? And
# if a trial takes 10 minutes?


# %% tags=["hide-cell"]
def workers_that_fill(database_a_second, seconds_a_trial):
    return database_a_second * seconds_a_trial


print(workers_that_fill(20, 60), "workers, and", workers_that_fill(20, 600))
assert workers_that_fill(20, 60) == 1200
