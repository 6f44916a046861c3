import pytest
import torch
from torch import nn

from lightning_l2l import MLP, CoordinatewiseLSTM, MetaOptimizer, NetworkTask, RNNprop
from lightning_l2l.rules.describe import build_rule, describe


def test_a_rule_comes_back_as_it_was():
    rule = CoordinatewiseLSTM(hidden_size=3, num_layers=1, preprocessing="identity", output_scale=0.5, forget_bias=2.0)
    twin = build_rule(describe(rule))
    assert describe(twin) == describe(rule)
    assert describe(rule)["init_args"]["forget_bias"] == 2.0


@pytest.mark.parametrize("make", [CoordinatewiseLSTM, RNNprop])
def test_a_description_from_before_an_argument_has_its_default(make):
    description = describe(make(hidden_size=3))
    assert description["init_args"].pop("wait_for_gradient") is True
    assert build_rule(description).wait_for_gradient is True


def test_a_task_is_described_with_its_network():
    found = describe(NetworkTask(MLP(hidden_size=7), init_scale=0.1))["init_args"]
    assert found["module"]["init_args"]["hidden_size"] == 7
    assert (found["loss_fn"], found["init_scale"]) == ("torch.nn.functional.cross_entropy", 0.1)


class Forgetful(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)


@pytest.mark.parametrize("thing", [Forgetful(3), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_what_does_not_keep_its_arguments_is_not_described_wrongly(thing):
    with pytest.raises(ValueError, match=r"does not keep|no argument"):
        describe(thing)


def test_such_a_network_has_to_be_brought_along_when_a_checkpoint_is_loaded(tmp_path):
    task = NetworkTask(Forgetful(3))
    module = MetaOptimizer(task, CoordinatewiseLSTM(hidden_size=2))
    assert "task" not in module.hparams
    from lightning.pytorch import Trainer

    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    twin = MetaOptimizer.load_from_checkpoint(tmp_path / "x.ckpt", task=task, weights_only=True)
    for a, b in zip(module.rule.parameters(), twin.rule.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_rules_are_refused():
    for description in ({"class_path": "os.system", "init_args": {}}, None, {}):
        with pytest.raises(ValueError, match="is not known"):
            build_rule(description)
    with pytest.raises(ValueError, match="cannot be built"):
        build_rule({"class_path": "lightning_l2l.rules.lstm.CoordinatewiseLSTM", "init_args": {"width": 3}})
