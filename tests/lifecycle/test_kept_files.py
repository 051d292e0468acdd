"""ModelCheckpoint deletes what its state names, so a resumed state must name files of its own folder only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_peft import PEFT, CheckpointError, LoRA
from lightning_peft.trainer.kept_files import is_inside
from tests.faults.workload import Net, rows
from tests.models import trainer


class Falling(Net):
    """Its loss gets better with every epoch, whatever it learns."""

    def training_step(self, batch, index):
        self.log("score", 10.0 - self.current_epoch, on_epoch=True, on_step=False)
        return super().training_step(batch, index)


def saver(folder: Path, **options) -> ModelCheckpoint:
    settings = {"monitor": "score", "filename": "{epoch}", "save_top_k": 1, "save_last": True, **options}
    return ModelCheckpoint(folder, **settings)


def fit(folder: Path, epochs: int, resume: Path | str | None = None, **options) -> ModelCheckpoint:
    """A run, or the rest of it."""
    keeper = saver(folder, **options)
    run = trainer(folder.parent, PEFT(LoRA(r=2)), keeper, max_epochs=epochs)
    run.fit(Falling(), rows(), ckpt_path=resume)
    return keeper


@pytest.fixture
def first(tmp_path):
    """A run of one epoch, a folder of the victim's beside it, and the content of its last checkpoint."""
    keeper = fit(tmp_path / "run", 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.ckpt").write_text("precious")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "other")
    return keeper


def changed(keeper: ModelCheckpoint, to: Path, **fields) -> Path:
    """The last checkpoint with another state of ModelCheckpoint."""
    content = torch.load(keeper.last_model_path, weights_only=True)
    state = content["callbacks"][keeper.state_key]
    for name, value in fields.items():
        if value is KeyError:
            del state[name]
        else:
            state[name] = value
    torch.save(content, to)
    return to


OUTSIDE = [
    *("{run}/../other", "{run}/../other/x.ckpt", "{top}/other/x.ckpt", "{run}/link/x.ckpt", "{run}/link", "{run}"),
    *(
        "local://{top}/other/x.ckpt",
        "file://{top}/other/x.ckpt",
        "s3://bucket/x.ckpt",
        "simplecache::file://{top}/x.ckpt",
    ),
    *("{run}/a\0b.ckpt", "{run}/sub/../../other/x.ckpt", "x.ckpt", "{run}-2/x.ckpt", "{run}/notes"),
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("field", ["best_model_path", "last_model_path", "kth_best_model_path", "best_k_models"])
def test_paths_outside_the_folder_are_refused(first, tmp_path, field, path):
    """Without a look at them the next better score deletes the folder beside the run."""
    path = path.format(run=tmp_path / "run", top=tmp_path)
    value = {path: torch.tensor(10.0)} if field == "best_k_models" else path
    also = {"best_k_models": {path: torch.tensor(10.0)}} if field == "kth_best_model_path" else {}
    also |= {"kth_best_model_path": path} if field == "best_k_models" else {}
    bad = changed(first, tmp_path / "run" / "bad.ckpt", **{field: value}, **also)
    with pytest.raises(CheckpointError, match=r"ModelCheckpoint.*deletes.*PEFT\(init_from=PATH\)") as refused:
        fit(tmp_path / "run", 3, bad)
    assert "\n" not in str(refused.value) and "\0" not in str(refused.value)
    assert (tmp_path / "other" / "x.ckpt").read_text() == "precious"


@pytest.mark.parametrize(
    "fields",
    [
        {"best_k_models": ["x"]},
        {"best_k_models": {3: torch.tensor(1.0)}},
        {"best_k_models": {"{run}/epoch=0.ckpt": "low"}},
        {"best_k_models": {"{run}/epoch=0.ckpt": torch.ones(2)}},
        {"kth_best_model_path": "{run}/nothing.ckpt"},
        {"best_model_path": 3},
        {"kth_best_model_path": ["x"]},
        {"best_model_path": KeyError},
        {"best_model_score": KeyError},
        {"best_model_score": "high"},
        {"kth_value": "high"},
        {"dirpath": 7},
        {"last_model_path": None},
    ],
)
def test_states_of_another_form_are_refused(first, tmp_path, fields):
    def filled(value):
        if isinstance(value, dict):
            return {filled(k): v for k, v in value.items()}
        return value.format(run=tmp_path / "run") if isinstance(value, str) else value

    bad = changed(first, tmp_path / "run" / "bad.ckpt", **{k: filled(v) for k, v in fields.items()})
    with pytest.raises(CheckpointError, match="state of ModelCheckpoint"):
        fit(tmp_path / "run", 3, bad)


def test_a_refused_state_leaves_the_module_alone(first, tmp_path):
    bad = changed(first, tmp_path / "run" / "bad.ckpt", best_model_path=str(tmp_path / "other"))
    net = Falling()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(CheckpointError):
        trainer(tmp_path, PEFT(LoRA(r=2)), saver(tmp_path / "run"), max_epochs=2).fit(net, rows(), ckpt_path=bad)
    after = net.state_dict()
    assert all(not after[n].any() for n in after if n.endswith("lora_B"))
    assert all(torch.equal(t, after[n]) for n, t in before.items() if n in after)


def test_a_test_reads_no_foreign_path_either(first, tmp_path):
    bad = changed(first, tmp_path / "run" / "bad.ckpt", best_model_path=str(tmp_path / "other" / "x.ckpt"))
    run = trainer(tmp_path, PEFT(LoRA(r=2)), saver(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="state of ModelCheckpoint"):
        run.test(Falling(), rows(), ckpt_path=bad, verbose=False)


def test_a_run_goes_on(first, tmp_path):
    """Its own paths are its own: the best is replaced by a better one, and the last by the next."""
    keeper = fit(tmp_path / "run", 3, first.last_model_path)
    assert sorted(p.name for p in (tmp_path / "run").glob("*.ckpt")) == ["epoch=2.ckpt", "last.ckpt"]
    assert keeper.best_model_path == str(tmp_path / "run" / "epoch=2.ckpt")


def test_a_run_reached_by_a_link_goes_on(first, tmp_path, recwarn):
    """The same folder under another name is the same folder: nothing is forgotten."""
    (tmp_path / "road").symlink_to(tmp_path / "run")
    content = torch.load(first.last_model_path, weights_only=True)
    state = content["callbacks"][first.state_key]
    away = str(tmp_path / "road")
    state["dirpath"] = away
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        state[name] = state[name].replace(str(tmp_path / "run"), away)
    state["best_k_models"] = {k.replace(str(tmp_path / "run"), away): v for k, v in state["best_k_models"].items()}
    torch.save(content, tmp_path / "linked.ckpt")
    keeper = fit(tmp_path / "run", 3, tmp_path / "linked.ckpt")
    assert sorted(p.name for p in (tmp_path / "run").glob("*.ckpt")) == ["epoch=2.ckpt", "last.ckpt"]
    assert set(keeper.best_k_models) == {str(tmp_path / "run" / "epoch=2.ckpt")}
    assert not [w for w in recwarn if "dirpath has changed" in str(w.message)]


def test_a_run_that_keeps_fewer_checkpoints_goes_on(tmp_path):
    """Lightning names the worst of the best only when it has as many as it may keep."""
    first = fit(tmp_path / "run", 2, save_top_k=3)
    assert len(first.best_k_models) == 2 and not first.kth_best_model_path
    keeper = fit(tmp_path / "run", 3, first.last_model_path, save_top_k=1)
    assert keeper.best_model_path == str(tmp_path / "run" / "epoch=2.ckpt")


def test_links_among_checkpoints_stay(tmp_path):
    """With save_last="link" the last checkpoint is a link to another one, which must not be taken for it."""
    keeper = fit(tmp_path / "run", 2, save_last="link", save_top_k=2)
    assert Path(keeper.last_model_path).is_symlink()
    keeper = fit(tmp_path / "run", 3, keeper.last_model_path, save_last="link", save_top_k=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("*.ckpt")) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]


def test_a_run_that_was_moved_goes_on(first, tmp_path):
    """Lightning then keeps the best path alone: here it is that of the new place, and the old place is left alone."""
    shutil.copytree(tmp_path / "run", tmp_path / "moved", symlinks=True)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    keeper = saver(tmp_path / "moved")
    run = trainer(tmp_path, PEFT(LoRA(r=2)), keeper, max_epochs=1)
    with pytest.warns(UserWarning, match="dirpath has changed"):
        run.fit(Falling(), rows(), ckpt_path=tmp_path / "moved" / "last.ckpt")  # it has nothing left to do
    assert keeper.best_model_path == str(tmp_path / "moved" / "epoch=0.ckpt")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        fit(tmp_path / "moved", 3, tmp_path / "moved" / "last.ckpt")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_new_folder_for_the_rest_of_a_run(first, tmp_path):
    """The best so far lies beside the checkpoint that is resumed, in a folder that the user has named."""
    keeper = saver(tmp_path / "second")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        trainer(tmp_path, PEFT(LoRA(r=2)), keeper, max_epochs=1).fit(Falling(), rows(), ckpt_path=first.last_model_path)
    assert keeper.best_model_path == str(tmp_path / "run" / "epoch=0.ckpt")


def test_a_best_path_that_leads_nowhere_is_forgotten(first, tmp_path):
    """The checkpoint alone was moved: what its old folder is now, nobody knows."""
    (tmp_path / "alone").mkdir()
    shutil.copy(first.last_model_path, tmp_path / "alone" / "last.ckpt")
    keeper = saver(tmp_path / "alone" / "new")
    with pytest.warns(UserWarning, match="is forgotten"):
        trainer(tmp_path, PEFT(LoRA(r=2)), keeper, max_epochs=1).fit(
            Falling(), rows(), ckpt_path=tmp_path / "alone" / "last.ckpt"
        )
    assert keeper.best_model_path == ""


@pytest.mark.parametrize("state", [["x"], {"patience": 3}, {"wait_count": "x"}, {"wait_count": None}, {"patience": {}}])
def test_states_of_other_callbacks_are_looked_at_as_well(tmp_path, state):
    """Lightning takes them as they are, and fails at the first use of a damaged one."""

    def run():
        stopper = EarlyStopping("score", patience=9, check_on_train_epoch_end=True)
        return trainer(tmp_path, PEFT(LoRA(r=2)), saver(tmp_path / "run"), stopper, max_epochs=2)

    first = run()
    first.fit(Falling(), rows())
    content = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    key = next(k for k in content["callbacks"] if k.startswith("EarlyStopping"))
    sound = content["callbacks"][key]
    content["callbacks"][key] = state
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="part for resuming is damaged: the state of EarlyStopping"):
        run().fit(Falling(), rows(), ckpt_path=tmp_path / "bad.ckpt")
    content["callbacks"][key] = sound
    torch.save(content, tmp_path / "good.ckpt")
    run().fit(Falling(), rows(), ckpt_path=tmp_path / "good.ckpt")


@pytest.mark.parametrize("version", [None, "", "0.9.0", "1.9", 3, "x"])
def test_a_version_that_lightning_would_rewrite_is_refused(first, tmp_path, version):
    """Before anyone has looked at it, Lightning turns fields of old checkpoints into states of callbacks."""
    content = torch.load(first.last_model_path, weights_only=True)
    content |= {"pytorch-lightning_version": version, "checkpoint_callback_best_model_path": str(tmp_path / "other")}
    torch.save(content, tmp_path / "run" / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"it says that version .* of Lightning wrote it"):
        fit(tmp_path / "run", 3, tmp_path / "run" / "bad.ckpt")


@pytest.mark.parametrize(
    ("path", "folder", "inside"),
    [
        ("s3://bucket/run/a.ckpt", "s3://bucket/run", True),
        ("s3://bucket/run/sub/a.ckpt", "s3://bucket/run/", True),
        ("s3://bucket/run2/a.ckpt", "s3://bucket/run", False),
        ("s3://bucket/run/../other/a.ckpt", "s3://bucket/run", False),
        ("s3://other/run/a.ckpt", "s3://bucket/run", False),
        ("/home/a.ckpt", "s3://bucket/run", False),
        ("s3://bucket/run", "s3://bucket/run", False),
    ],
)
def test_remote_paths_are_compared_as_text(path, folder, inside):
    assert is_inside(path, folder) == inside
