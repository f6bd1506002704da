"""Promises about what trials leave on disk: it stays as long as it may be gone on from, and reaches who shares it."""

import optuna
import pytest
from made_up_trials import a_study, add_trial
from optuna.trial import TrialState

from waferlab.search.trial_files import TrialFiles
from waferlab.training.checkpoints import CheckpointFiles, read_checkpoint


def kept(folder):
    return sorted(file.name for file in folder.iterdir())


def both(*numbers):
    return sorted(f"{number}{end}" for number in numbers for end in (".ckpt", ".state.ckpt"))


def leave_files(files, *numbers):
    files.folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        files.best(number).write_bytes(b"weights of %d" % number)
        files.state(number).write_bytes(b"state of %d" % number)


def test_files_of_trials_that_still_run_or_may_be_gone_on_with_stay_and_no_others(tmp_path):
    study, files = a_study(0.2, 0.6, None, 0.4), TrialFiles(tmp_path)
    add_trial(study, state=TrialState.RUNNING)
    leave_files(files, *range(5), 12)
    (tmp_path / "3-v1.ckpt").touch()  # of nobody
    files.forget_all_but({1}, study)
    assert kept(tmp_path) == both(1, 4)
    files.forget_all_but({1}, study)  # nothing is left to do
    assert kept(tmp_path) == both(1, 4)


def test_a_trial_can_be_gone_on_with_only_where_both_files_are(tmp_path):
    study, files = a_study(0.5), TrialFiles(tmp_path)
    assert not files.fetch(study.best_trial)
    leave_files(files, 0)
    assert files.fetch(study.best_trial)
    files.state(0).unlink()
    assert not files.fetch(study.best_trial)


def leave_checkpoints(files, *numbers):
    files.folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        for file in (files.best(number), files.state(number)):
            CheckpointFiles().save_checkpoint({"of": file.name}, file)


def of(file):
    return read_checkpoint(file)["of"]


def test_what_runs_again_begins_with_copies_of_what_the_last_that_was_cut_off_left(tmp_path):
    study, files = a_study(0.5), TrialFiles(tmp_path)
    for number in range(3):  # the second was never begun, but moved in the queue
        cut_off = {"again": number} if number else {}
        add_trial(study, state=TrialState.FAIL, **cut_off)
    again, other = (add_trial(study, state=TrialState.RUNNING, **more) for more in ({"again": 3}, {}))
    leave_checkpoints(files, 1, again.number, other.number)  # the last two are of an earlier study
    assert files.begin(optuna.Trial(study, other._trial_id)) is None and kept(tmp_path) == both(1, again.number)
    assert files.begin(optuna.Trial(study, again._trial_id)) == files.state(again.number)
    assert of(files.state(again.number)) == "1.state.ckpt" and of(files.best(again.number)) == "1.ckpt"
    assert kept(tmp_path) == both(1, again.number)


def test_a_link_that_somebody_has_put_there_has_no_other_file_written(tmp_path):
    study, files, others = a_study(), TrialFiles(tmp_path / "trials"), tmp_path / "others.txt"
    add_trial(study, state=TrialState.FAIL)
    again = add_trial(study, state=TrialState.RUNNING, again=0)
    leave_checkpoints(files, 0)
    others.write_text("theirs")
    files.best(again.number).with_name(f"{files.best(again.number).name}.unfinished").symlink_to(others)
    assert files.begin(optuna.Trial(study, again._trial_id)) == files.state(again.number)
    assert others.read_text() == "theirs"


@pytest.mark.parametrize("which", ["best", "state"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_trial_begins_anew_where_what_was_cut_off_left_no_whole_epoch(which, damage, tmp_path):
    study, files = a_study(0.5), TrialFiles(tmp_path)
    cut_off = add_trial(study, state=TrialState.FAIL)
    again = add_trial(study, state=TrialState.RUNNING, again=cut_off.number)
    leave_checkpoints(files, cut_off.number)
    file = getattr(files, which)(cut_off.number)
    content = file.read_bytes()
    file.unlink()
    if damage == "cut short":
        file.write_bytes(content[:-100])
    assert files.begin(optuna.Trial(study, again._trial_id)) is None
    assert not files.best(again.number).exists() and not files.state(again.number).exists()


@pytest.fixture
def shared(tmp_path):
    """Two who share a study, and the study: three trials of the first, with their files."""
    here, there = (TrialFiles(tmp_path / name, shared=tmp_path / "shared") for name in ("here", "there"))
    study = optuna.create_study(direction="maximize")
    for value in (0.5, 0.6, 0.4):
        trial = study.ask()
        leave_files(here, trial.number)
        here.share(trial)
        study.tell(trial, value)
    return here, there, study


def test_files_reach_who_shares_the_folder_and_those_of_beaten_trials_go(shared, tmp_path):
    here, there, study = shared
    assert len(kept(tmp_path / "shared")) == 6
    assert there.fetch(study.best_trial)
    assert there.best(1).read_bytes() == b"weights of 1" and there.state(1).read_bytes() == b"state of 1"
    there.forget_all_but({0, 1}, study)
    assert len(kept(tmp_path / "shared")) == 4 and kept(tmp_path / "here") == both(0, 1, 2)
    assert there.fetch(study.trials[0]) and not there.fetch(study.trials[2])
    here.forget_all_but({0, 1}, study)  # the other one was first
    assert kept(tmp_path / "here") == both(0, 1)


def test_files_that_are_here_are_not_fetched_again(shared):
    here, _, study = shared
    here.best(1).write_bytes(b"ours")
    assert here.fetch(study.best_trial) and here.best(1).read_bytes() == b"ours"


def test_files_that_were_not_shared_are_not_there(tmp_path):
    study = a_study(0.5)
    assert not TrialFiles(tmp_path / "a").fetch(study.best_trial)
    assert not TrialFiles(tmp_path / "a", shared=tmp_path / "shared").fetch(study.best_trial)
