"""Train the LightningModules of real libraries through their own entry points: ``python -m tests.ecosystem.libraries``.

The environments are their own, because the libraries do not all agree on versions:

    python -m venv forecasting && . forecasting/bin/activate
    pip install -c .ci/constraints.txt -e . lightning pytest pytorch-forecasting "gluonts[torch]" chemprop
    pip install -c .ci/constraints.txt darts neuralforecast pytorch-tabular
    python -m tests.ecosystem.libraries [part of a name …]

    python -m venv vision && . vision/bin/activate
    pip install -c .ci/constraints.txt -e . lightning pytest lightning-uq-box torchgeo anomalib
    python -m tests.ecosystem.libraries [part of a name …]

Libraries that are not installed are named and left out. Data are small and random. For each model:

fit           two epochs with `PEFT` as one more callback: only the adapter moves, and the files hold nothing else
resume        the second epoch once more from the file of the first, with the same batches: equal bit for bit
resume later  the same as a later process would do it, which builds no objects from the file
merge         the outputs stay, and unmerging restores every bit
reload        the file into a new instance, and by class

A cell says ``works``, ``refused`` (one clear error, given below the table) or ``wrong``. Where a resume is refused
because the library's own hook wants objects, it is tried again as the message says, with ``weights_only=False``.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from tests.ecosystem.standins import stand_in

replaced = stand_in()  # before anything imports those packages

import numpy  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

#: begins the lines that a process prints for its parent
MARK = "row"


@dataclass
class Case:
    """A model of a library.

    Attributes:
        package: what must be installed.
        train: trains through the library's own entry point with the callbacks given, two epochs; gives the module.
        output: what the module computes from a fixed input; by default from that of its first call in training.
        lightning: the package of Lightning that the library uses.
        method: the method to train with; by default LoRA.
        ignore: trained tensors that get no gradient.
        options: arguments for a reload by class, where the library asks for them.
    """

    package: str
    train: Callable[[list[Any], Path], nn.Module]
    output: Callable[[nn.Module], Any] | None = None
    lightning: str = "lightning.pytorch"
    method: Callable[[], Any] | None = None
    ignore: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


class Wrong(Exception):
    """Something that was promised does not hold."""


def wave(count: int) -> numpy.ndarray:
    """A curve to be forecast."""
    return numpy.sin(numpy.arange(count) / 5).astype("float32")


def flat(value: Any) -> Iterator[Tensor]:
    """All tensors in a nested value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from flat(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from flat(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from flat([getattr(value, entry.name) for entry in fields(value)])
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from flat(vars(value))


def seeded(number: int = 0) -> None:
    """The same random numbers from here on."""
    import random

    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 2,
}


# ---- forecasting -----------------------------------------------------------------------------------------------------
def pytorch_forecasting_data():
    import pandas
    from pytorch_forecasting import TimeSeriesDataSet
    from pytorch_forecasting.data import GroupNormalizer

    frames = [
        pandas.DataFrame(
            {"time": range(60), "series": str(n), "day": [str(i % 7) for i in range(60)], "value": wave(60)}
        )
        for n in range(2)
    ]
    return TimeSeriesDataSet(
        pandas.concat(frames, ignore_index=True),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        static_categoricals=["series"],
        time_varying_known_categoricals=["day"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["series"]),
    )


def pytorch_forecasting_case(name: str, targets: list[str], **options: Any) -> Case:
    def method():
        from lightning_peft import LoRA

        return LoRA(r=2, target_modules=targets)  # without the layers that these data leave idle

    def train(callbacks, folder):
        import lightning.pytorch as L
        import pytorch_forecasting as library

        seeded()
        rows = pytorch_forecasting_data()
        module = getattr(library, name).from_dataset(rows, learning_rate=1e-2, **options)
        trainer = L.Trainer(**QUIET, callbacks=callbacks, default_root_dir=folder, limit_train_batches=4)
        loader = rows.to_dataloader(train=True, batch_size=8, shuffle=False, num_workers=0)
        trainer.fit(module, loader, rows.to_dataloader(train=False, batch_size=8, num_workers=0))
        return module

    return Case("pytorch_forecasting", train, method=method)


CASES["pytorch-forecasting: TemporalFusionTransformer"] = pytorch_forecasting_case(
    "TemporalFusionTransformer",
    ["re:multihead_attn.*", "pos_wise_ff.fc1", "pos_wise_ff.fc2", "output_layer"],
    hidden_size=8,
    attention_head_size=2,
    hidden_continuous_size=4,
    dropout=0.1,
)


def gluonts_case(name: str, **options: Any) -> Case:
    def train(callbacks, folder):
        import gluonts.torch as library
        import pandas
        from gluonts.dataset.common import ListDataset

        seeded()
        rows = [{"start": pandas.Period("2020-01-01", freq="D"), "target": wave(120)} for _ in range(2)]
        estimator = getattr(library, name)(
            prediction_length=4,
            context_length=12,
            num_batches_per_epoch=4,
            batch_size=8,
            trainer_kwargs={**QUIET, "callbacks": callbacks, "default_root_dir": folder},
            **options,
        )
        return estimator.train_model(ListDataset(rows, freq="D")).trained_net

    def output(module):
        inputs = Remember.batches[0, 0]
        return module(*(inputs[name] for name in module.inputs))

    return Case("gluonts", train, output)


CASES["gluonts: SimpleFeedForward"] = gluonts_case("SimpleFeedForwardEstimator", hidden_dimensions=[8, 8])
CASES["gluonts: DeepAR"] = gluonts_case("DeepAREstimator", freq="D", num_layers=1, hidden_size=8)


def darts_train(callbacks, folder):
    from darts import TimeSeries
    from darts.models import TransformerModel

    seeded()
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 32}
    options = {k: v for k, v in QUIET.items() if k != "max_epochs"}
    options |= {"callbacks": callbacks, "enable_checkpointing": True, "default_root_dir": str(folder)}
    model = TransformerModel(
        input_chunk_length=12,
        output_chunk_length=4,
        n_epochs=2,
        batch_size=16,
        dropout=0.0,
        random_state=0,
        pl_trainer_kwargs=options,
        **sizes,
    )
    model.fit(TimeSeries.from_values(wave(120)))
    return model.model


CASES["darts: TransformerModel"] = Case("darts", darts_train, lightning="pytorch_lightning")


def neuralforecast_train(callbacks, folder):
    import neuralforecast
    import pandas
    from neuralforecast.models import NHITS

    seeded()
    options = {k: v for k, v in QUIET.items() if k != "max_epochs"}
    options |= {"callbacks": callbacks, "enable_checkpointing": True, "default_root_dir": str(folder)}
    model = NHITS(
        h=4, input_size=12, max_steps=4, val_check_steps=2, mlp_units=[[16, 16]] * 3, scaler_type="identity", **options
    )
    forecast = neuralforecast.NeuralForecast(models=[model], freq="D")
    days = pandas.date_range("2020-01-01", periods=150, freq="D")
    tables = [pandas.DataFrame({"unique_id": n, "ds": days, "y": wave(150)}) for n in range(64)]
    forecast.fit(pandas.concat(tables))
    return forecast.models[0]


CASES["neuralforecast: NHITS"] = Case("neuralforecast", neuralforecast_train, lightning="pytorch_lightning")


def tabular_train(callbacks, folder):
    import pandas
    from pytorch_tabular import TabularModel, config
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    seeded()
    rows = pandas.DataFrame({"a": wave(200), "b": wave(400)[200:]})
    rows["y"] = (rows.a > rows.b).astype(int)
    settings = {"early_stopping": None, "checkpoints": "valid_loss", "load_best": False, "progress_bar": "none"}
    settings["checkpoints_path"] = str(folder / "own")
    model = TabularModel(
        data_config=config.DataConfig(target=["y"], continuous_cols=["a", "b"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8", use_batch_norm=True),
        optimizer_config=config.OptimizerConfig(),
        trainer_config=config.TrainerConfig(
            max_epochs=2,
            batch_size=32,
            accelerator="cpu",
            trainer_kwargs={"enable_model_summary": False, "default_root_dir": str(folder)},
            **settings,
        ),
        verbose=False,
    )
    model.fit(train=rows, callbacks=callbacks)
    return model.model


CASES["pytorch-tabular: CategoryEmbedding"] = Case("pytorch_tabular", tabular_train, lightning="pytorch_lightning")


# ---- molecules -------------------------------------------------------------------------------------------------------
def chemprop_data():
    from chemprop import data

    points = [data.MoleculeDatapoint.from_smi("C" * (n + 1) + "O", [float(n)]) for n in range(16)]
    return data.MoleculeDataset(points)


def chemprop_train(callbacks, folder):
    import lightning.pytorch as L
    from chemprop import data, models
    from chemprop import nn as parts

    seeded()
    module = models.MPNN(
        parts.BondMessagePassing(d_h=16, depth=2),
        parts.MeanAggregation(),
        parts.RegressionFFN(input_dim=16, hidden_dim=16),
    )
    trainer = L.Trainer(**QUIET, callbacks=callbacks, default_root_dir=folder)
    trainer.fit(module, data.build_dataloader(chemprop_data(), batch_size=8, shuffle=False, num_workers=0))
    return module


def chemprop_output(module):
    from chemprop import data

    batch = next(iter(data.build_dataloader(chemprop_data(), batch_size=8, shuffle=False, num_workers=0)))
    return module(batch.bmg, batch.V_d, batch.X_d)


CASES["chemprop: MPNN"] = Case("chemprop", chemprop_train, chemprop_output)


# ---- pictures --------------------------------------------------------------------------------------------------------
class Pictures(torch.utils.data.Dataset):
    """Small random pictures."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return {"image": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(number))}


def torchgeo_case(name: str, ignore: tuple[str, ...], **options: Any) -> Case:
    """Teacher and student get the same adapters: torchgeo moves the one's tensors after the other's, in their order."""

    def train(callbacks, folder):
        import lightning.pytorch as L
        import torchgeo.trainers as library

        seeded()
        module = getattr(library, name)(model="resnet18", in_channels=3, lr=1e-3, **options)
        for part in ("augmentation1", "augmentation2"):
            if hasattr(module, part):
                setattr(module, part, nn.Identity())
        if hasattr(module.model if name == "BYOLTask" else module, "augment"):
            module.model.augment = nn.Identity()
        trainer = L.Trainer(**QUIET, callbacks=callbacks, default_root_dir=folder, log_every_n_steps=1)
        trainer.fit(module, torch.utils.data.DataLoader(Pictures(), batch_size=4))
        return module

    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Case("torchgeo", train, lambda module: module(pictures), ignore=ignore)


CASES["torchgeo: MoCo"] = torchgeo_case(
    "MoCoTask", ("*momentum*",), version=3, layers=2, hidden_dim=32, output_dim=16, size=32
)
CASES["torchgeo: BYOL"] = torchgeo_case("BYOLTask", ("*target*", "*.fc.*"))


def uq_box_train(callbacks, folder):
    import lightning.pytorch as L
    from lightning_uq_box.uq_methods import MVERegression

    seeded()
    network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    module = MVERegression(network, burnin_epochs=1)
    rows = [{"input": torch.randn(4), "target": torch.randn(1)} for _ in range(32)]
    trainer = L.Trainer(**QUIET, callbacks=callbacks, default_root_dir=folder, log_every_n_steps=1)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    return module


CASES["lightning-uq-box: MVERegression"] = Case(
    "lightning_uq_box", uq_box_train, lambda module: module.model(torch.ones(3, 4))
)


def convolutions():
    from lightning_peft import LoRA

    return LoRA(r=2, target_modules=["re:.*decoder.*conv[12]"])


def anomalib_train(callbacks, folder):
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import ReverseDistillation
    from PIL import Image

    seeded()
    for kind in ("good", "bad"):
        (folder / "pictures" / kind).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            picture = numpy.random.RandomState(number).randint(0, 255, (64, 64, 3)).astype("uint8")
            Image.fromarray(picture).save(folder / "pictures" / kind / f"{number}.png")
    data = Folder(
        "tiny",
        root=folder / "pictures",
        normal_dir="good",
        abnormal_dir="bad",
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=0,
    )
    module = ReverseDistillation(
        backbone="resnet18",
        pre_trained=False,
        pre_processor=ReverseDistillation.configure_pre_processor(image_size=(64, 64)),
        evaluator=False,
        visualizer=False,
    )
    options = {k: v for k, v in QUIET.items() if k != "logger"}
    Engine(**options, logger=False, callbacks=callbacks, default_root_dir=folder).fit(model=module, datamodule=data)
    return module


CASES["anomalib: ReverseDistillation"] = Case(
    "anomalib",
    anomalib_train,
    lambda module: module.model.train()(torch.ones(2, 3, 64, 64) * 0.5),
    method=convolutions,
)


# ---- what is checked -------------------------------------------------------------------------------------------------
@contextmanager
def fits_with(**options: Any) -> Iterator[None]:
    """Hand options to every ``Trainer.fit``: few libraries let their users resume."""
    from lightning_peft.lightning_packages import PACKAGES

    originals = [(package.Trainer, package.Trainer.fit) for package in PACKAGES]

    def with_options(original):
        return lambda self, *args, **given: original(self, *args, **{**given, **options})

    for kind, original in originals:
        kind.fit = with_options(original)
    try:
        yield
    finally:
        for kind, original in originals:
            kind.fit = original


def callbacks(case: Case, folder: Path | None) -> list[Any]:
    """Those of a run, which saves after every epoch if it has a folder."""
    from lightning_peft import PEFT, LoRA, TrainabilityCheck, adapter_state_dict
    from lightning_peft.lightning_packages import Callback

    class Watch(Callback):
        """Remembers the start of the first run; every other run gets the same batches and random numbers.

        Lightning replays batches where the loader does, which is up to each library.
        """

        def on_fit_start(self, trainer, pl_module):
            if folder is not None:
                Remember.start = {name: tensor.detach().clone() for name, tensor in tensors(pl_module).items()}
                pl_module.register_forward_pre_hook(Remember.take_call, with_kwargs=True)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            place = trainer.current_epoch, batch_idx
            if folder is not None:
                Remember.batches[place] = copy.deepcopy(batch)
            else:
                for tensor, recorded in zip(flat(batch), flat(Remember.batches[place]), strict=True):
                    tensor.copy_(recorded)
            seeded(trainer.global_step + 1)

        def on_train_end(self, trainer, pl_module):
            # some libraries load the best weights afterwards
            Remember.ends.append({n: t.clone() for n, t in adapter_state_dict(pl_module).items()})

    method = case.method() if case.method else LoRA(r=2)
    found: list[Any] = [PEFT(method), TrainabilityCheck(ignore=case.ignore), Watch()]
    if folder is not None:
        kind = sys.modules[case.lightning].callbacks.ModelCheckpoint
        # nothing is monitored; the mode only tells it from a library's own ModelCheckpoint
        options: dict[str, Any] = {"auto_insert_metric_name": False, "save_top_k": -1, "mode": "max"}
        found.append(kind(folder, filename="epoch-{epoch}", **options))
    return found


class Remember:
    """What the first run was like, and how each ended; some libraries copy the callbacks they are given."""

    start: ClassVar[dict[str, Tensor]] = {}
    batches: ClassVar[dict[tuple[int, int], Any]] = {}
    call: ClassVar[Any] = None
    ends: ClassVar[list[dict[str, Tensor]]] = []

    @classmethod
    def take_call(cls, module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
        """The first call of the module."""
        cls.call = cls.call or copy.deepcopy((args, options))


def output(case: Case, module: nn.Module) -> Tensor:
    """What the module computes from a fixed input."""
    torch.manual_seed(1)
    if case.output is not None:
        out = case.output(module)
    else:
        args, options = copy.deepcopy(Remember.call)
        out = module(*args, **options)
    return torch.cat([part.flatten().float() for part in flat(out)])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def untrained(case: Case, folder: Path) -> nn.Module:
    """The module as the library hands it to the Trainer; nothing is trained."""
    kind = sys.modules[case.lightning].Trainer
    original, handed = kind.fit, []
    kind.fit = lambda self, model, *args, **options: handed.append(model)
    try:
        case.train([], folder)
    except Exception:  # the library misses the results of a training
        if not handed:
            raise
    finally:
        kind.fit = original
    return handed[0]


def check_fit(case: Case, folder: Path) -> nn.Module:
    from lightning_peft import adapter_state_dict, state_names, trainable_names
    from lightning_peft.objects import load_plain

    module = case.train(callbacks(case, folder), folder)
    after, ours = tensors(module), {*trainable_names(module), *state_names(module)}
    for name, tensor in Remember.start.items():
        moved = not torch.equal(tensor, after[name])
        idle = any(fnmatchcase(name, pattern) for pattern in case.ignore)
        if moved and name not in ours:
            raise Wrong(f"{name} moved")
        if not moved and name in trainable_names(module) and not idle:
            raise Wrong(f"{name} did not move")
    states = [load_plain(folder / f"epoch-{epoch}.ckpt")["state_dict"] for epoch in range(2)]
    if any(set(state) != ours for state in states):
        raise Wrong("a file holds more or less than the adapter")
    if not any(equal(state, adapter_state_dict(module)) for state in states):  # some libraries load the best
        raise Wrong("no file holds the adapter that the module ends with")
    return module


def check_resume(case: Case, folder: Path, module: nn.Module, **options: Any) -> None:
    with fits_with(ckpt_path=str(folder / "epoch-0.ckpt"), **options), tempfile.TemporaryDirectory() as elsewhere:
        case.train(callbacks(case, None), Path(elsewhere))
    if not equal(Remember.ends[-1], Remember.ends[0]):
        raise Wrong("the resumed run ends elsewhere")


def check_later_resume(case: Case, folder: Path, module: nn.Module) -> str:
    """Without what this process knows of its files; a remark where the user must trust the file."""
    from lightning_peft import CheckpointError
    from lightning_peft.trainer import checkpoint_io

    checkpoint_io._written.clear()
    try:
        check_resume(case, folder, module)
        return ""
    except CheckpointError as error:
        if "weights_only=False" not in str(error):
            raise
        check_resume(case, folder, module, weights_only=False)
        return f"with weights_only=False, which the message asks for: {error}"


@torch.no_grad()
def check_merge(case: Case, folder: Path, module: nn.Module) -> None:
    from lightning_peft import merge, unmerge

    module.eval()
    before, expected = {n: t.clone() for n, t in tensors(module).items()}, output(case, module)
    merge(module)
    merged = output(case, module)
    if (merged - expected).abs().max() > 1e-4 * max(1.0, float(expected.abs().max())):
        raise Wrong("merged it computes something else")
    unmerge(module)
    if not equal(before, tensors(module)) or not torch.equal(output(case, module), expected):
        raise Wrong("unmerging does not restore")


@torch.no_grad()
def check_instance(case: Case, folder: Path, module: nn.Module) -> None:
    from lightning_peft import load_adapter, load_from_checkpoint

    load_adapter(module, folder / "epoch-1.ckpt")  # some libraries end with the best
    again = load_from_checkpoint(untrained(case, folder), folder / "epoch-1.ckpt")
    if not torch.equal(output(case, again.eval()), output(case, module.eval())):
        raise Wrong("the reloaded module computes something else")


@torch.no_grad()
def check_class(case: Case, folder: Path, module: nn.Module) -> None:
    from lightning_peft import load_from_checkpoint

    fresh = untrained(case, folder)
    again = load_from_checkpoint(type(module), folder / "epoch-1.ckpt", **case.options)
    # The base is the one that the class builds: random, where it has no seed of its own.
    base = tensors(fresh)
    for name, tensor in tensors(again).items():
        if name in base:
            tensor.copy_(base[name])
    if not torch.equal(output(case, again.eval()), output(case, module.eval())):
        raise Wrong("the reloaded module computes something else")


CHECKS: dict[str, Callable[..., Any]] = {
    "fit": check_fit,
    "resume": check_resume,
    "resume later": check_later_resume,
    "merge": check_merge,
    "reload: instance": check_instance,
    "reload: class": check_class,
}


def rows(name: str) -> Iterator[tuple[str, str]]:
    """A word and a remark for every check of a model."""
    from lightning_peft import PEFTError

    case, module = CASES[name], None
    with tempfile.TemporaryDirectory() as place:
        for column, check in CHECKS.items():
            try:
                if column == "fit":
                    module, remark = check(case, Path(place)), ""
                elif module is None:
                    yield "-", ""
                    continue
                else:
                    remark = check(case, Path(place), module) or ""
                yield "works" + ("*" if remark else ""), remark
            except PEFTError as error:
                yield "refused", str(error)
            except Wrong as error:
                yield "wrong", str(error)
            except Exception as error:  # a crash in code that knows nothing of adapters
                traceback.print_exc()
                yield "wrong", f"{type(error).__name__}: {error}"


def one(name: str) -> None:
    """All about one model, for `main`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case = CASES[name]
    importlib.import_module(case.lightning)  # before lightning_peft, which serves what is imported
    importlib.import_module(case.package)
    for word, remark in rows(name):
        print(json.dumps([MARK, word, remark]), flush=True)


def main(asked: list[str]) -> None:
    """Print the table, and below it the reasons. Each model has a process of its own."""
    chosen = [n for n in CASES if not asked or any(a.lower() in n.lower() for a in asked)]
    print(f"torch {torch.__version__}; stand-ins for the compiled parts of: {', '.join(replaced) or 'nothing'}\n")
    print(f"| model | {' | '.join(CHECKS)} |\n|{' --- |' * (len(CHECKS) + 1)}")
    notes, absent = [], []
    for name in chosen:
        if importlib.util.find_spec(CASES[name].package) is None:
            absent.append(CASES[name].package)
            continue
        command = [sys.executable, "-m", "tests.ecosystem.libraries", "--one", name]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with tempfile.TemporaryDirectory() as folder:  # some libraries write where they are run
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(f'["{MARK}"')]
        found = [json.loads(line)[1:] for line in lines]
        found += [("wrong", f"the process ended: {done.stderr[-300:]}")] * (len(CHECKS) - len(found))
        print(f"| {name} | {' | '.join(word for word, _ in found)} |", flush=True)
        for column, (_, remark) in zip(CHECKS, found, strict=True):
            if remark:
                notes.append(f"- {name}, {column}: {' '.join(remark.split())[:600]}")
    print("\n" + "\n".join(notes))
    if absent:
        print(f"\nNot installed here: {', '.join(dict.fromkeys(absent))}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main(sys.argv[1:])
