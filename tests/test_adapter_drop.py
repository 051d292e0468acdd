"""AdapterDrop against reference values; what is dropped costs nothing, gets no gradient and comes back."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import (
    PEFT,
    AdapterDrop,
    ConfigError,
    Houlsby,
    LoRA,
    PEFTError,
    Pfeiffer,
    TrainabilityCheck,
    TrainingError,
    disabled,
    drop_layers,
    inject,
)
from lightning_peft.bottleneck.layers import WithBottleneck
from tests.adapters import inject_golden
from tests.golden_case import Golden
from tests.models import Foreign, bert, loader, trainer


def test_golden():
    case = Golden("adapterdrop_bert")
    model, parameters = inject_golden(case, Pfeiffer(reduction_factor=4), norm=True)
    for n in range(4):
        drop_layers(model, n)
        atol = case.meta["tolerance"]["suggested_atol"]
        torch.testing.assert_close(case.run(model), case.tensors[f"output.drop_first.{n}"], atol=atol, rtol=0)
        with disabled(model):
            pass
        torch.testing.assert_close(case.run(model), case.tensors[f"output.drop_first.{n}"], atol=atol, rtol=0)
    drop_layers(model, 1)
    case.check(model, parameters)
    dropped = [p for k, p in parameters.items() if ".layer.0." in k]
    assert len(dropped) == 4 and all(p.grad is None for p in dropped)


def test_what_is_dropped_costs_nothing():
    model, x = bert(), torch.randint(1, 61, (4, 32))

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        return counter.get_total_flops()

    base = flops()
    inject(model, Houlsby())
    full = flops()
    drop_layers(model, 1)
    half = flops()
    drop_layers(model, 2)
    assert base == flops() and full - half == half - base == 2 * 2 * (2 * 32 * 2) * 4 * 32
    with pytest.raises(PEFTError, match="no bottleneck adapters"):
        lora = bert()
        inject(lora, LoRA())
        drop_layers(lora, 1)


class Watch(AdapterDrop):
    """Notes which adapters are on when a batch ends and while validating."""

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.train = [*getattr(self, "train", []), active(pl_module)]
        super().on_train_batch_end(trainer, pl_module, *rest)

    def on_validation_batch_end(self, trainer, pl_module, *rest):
        self.val = active(pl_module)


def active(module):
    return tuple(m._adapter.active for m in module.modules() if isinstance(m, WithBottleneck))


def test_training(tmp_path):
    """Random n in each step, equal in a second run; the fixed n while validating; all on afterwards, all trained."""
    seen = []
    for _ in range(2):
        module, drop = Foreign(), Watch(inference=2)
        run = trainer(tmp_path, PEFT(Pfeiffer(reduction_factor=4)), drop, TrainabilityCheck(), max_epochs=4)
        run.fit(module, loader("bert"), loader("bert"))
        assert set(drop.train) == {(True, True), (False, True)} and drop.val == (False, False)
        assert active(module) == (True, True)
        seen.append(drop.train)
    assert seen[0] == seen[1]
    none = Watch(max_drop=0)
    trainer(tmp_path, PEFT(Pfeiffer()), none, max_epochs=1).fit(Foreign(), loader("bert"))
    assert set(none.train) == {(True, True)}


@pytest.mark.parametrize("inference", [[1], {1}, (1, 1)])
def test_numbers_of_layers_at_inference(inference, tmp_path):
    """Only those layers are left out while validating and predicting; training draws as before."""
    module, drop = Foreign(), Watch(max_drop=0, inference=inference)
    run = trainer(tmp_path, PEFT(Pfeiffer(reduction_factor=4)), drop, max_epochs=1)
    run.fit(module, loader("bert"), loader("bert"))
    assert drop.val == (True, False) and set(drop.train) == {(True, True)} and active(module) == (True, True)
    with pytest.raises(ConfigError, match=r"inference=\[0, 2\]\): no adapter stands in layer 2.*layers \[0, 1\]"):
        trainer(tmp_path, PEFT(Pfeiffer()), AdapterDrop(inference=[2, 0])).validate(Foreign(), loader("bert"))


def test_one_draw_for_an_accumulated_step(tmp_path):
    drop = Watch(seed=3)
    trainer(tmp_path, PEFT(Pfeiffer()), drop, max_epochs=6, accumulate_grad_batches=2).fit(Foreign(), loader("bert"))
    assert drop.train[::2] == drop.train[1::2] and len(set(drop.train)) == 2


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="max_drop=-1"):
        AdapterDrop(max_drop=-1)
    for wrong in ([0, -1], ["a", 1], 1.5, "1", True):
        with pytest.raises(ConfigError, match=r"numbers of the layers to drop"):
            AdapterDrop(inference=wrong)
    with pytest.raises(ConfigError, match="at most 1"):
        trainer(tmp_path, PEFT(Pfeiffer()), AdapterDrop(max_drop=2)).fit(Foreign(), loader("bert"))
    with pytest.raises(PEFTError, match="no bottleneck adapters"):
        trainer(tmp_path, PEFT(LoRA()), AdapterDrop()).fit(Foreign(), loader("bert"))
    run = trainer(tmp_path, PEFT(Pfeiffer()), AdapterDrop(), strategy="ddp", devices=1)
    with pytest.raises(TrainingError, match="ddp_find_unused_parameters_true"):
        run.fit(Foreign(), loader("bert"))
