"""Several rules side by side."""

import copy

import pytest
import torch
from torch import nn

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, MetaOptimizer, Quadratic, RNNprop, load_rule
from lightning_l2l.rules import RuleGroups
from lightning_l2l.rules.describe import build_rule, describe
from lightning_l2l.rules.files import save_rule
from optimizers import feed, gradients, through_a_file, values


def conv_and_rest():
    torch.manual_seed(0)
    return RuleGroups({"conv*": CoordinatewiseLSTM(hidden_size=4), "!conv*": RNNprop(hidden_size=3)})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.convert = nn.Conv1d(1, 2, 3), nn.Linear(4, 2), nn.Linear(2, 2, bias=False)


def net():
    torch.manual_seed(1)
    return Net()


def test_every_name_goes_to_the_one_rule_whose_pattern_it_matches():
    conv, fc, last = CoordinatewiseLSTM(2), CoordinatewiseLSTM(3), CoordinatewiseLSTM(4)
    rule = RuleGroups({"conv?.*": conv, "*.fc[ab].weight": fc, "!*[.]*": last, "x.*": conv})
    found = dict(rule.by_name(["conv1.weight", "net.fca.weight", "theta", "x.y", "conv2.bias", "net.fcb.weight"]))
    assert found == {
        conv: ["conv1.weight", "x.y", "conv2.bias"],
        fc: ["net.fca.weight", "net.fcb.weight"],
        last: ["theta"],
    }
    assert rule.by_name([]) == []
    alone = CoordinatewiseLSTM(2)
    assert alone.by_name(["a", None]) == [(alone, ["a", None])]


@pytest.mark.parametrize(
    "names, message",
    [
        (["conv.weight", "fc.weight"], "'fc.weight' matches none of conv\\*, \\*bias, .* add a pattern"),
        (["conv.bias"], "'conv.bias' matches 'conv\\*', '\\*bias' at once"),
        ([None], "give model.named_parameters\\(\\)"),
    ],
)
def test_a_name_that_matches_no_pattern_or_several_is_told(names, message):
    rule = RuleGroups({"conv*": CoordinatewiseLSTM(2), "*bias": CoordinatewiseLSTM(2)})
    with pytest.raises(ValueError, match=message):
        rule.by_name(names)


@pytest.mark.parametrize(
    "rules, error, message",
    [
        ({}, ValueError, "no rule"),
        ([CoordinatewiseLSTM(2)], TypeError, "rules by pattern"),
        ({"": CoordinatewiseLSTM(2)}, ValueError, "pattern ''"),
        ({"!": CoordinatewiseLSTM(2)}, ValueError, "pattern '!'"),
        ({3: CoordinatewiseLSTM(2)}, ValueError, "pattern 3"),
        ({"*": "lstm"}, TypeError, "'lstm' is not one rule"),
        ({"*": RuleGroups({"*": CoordinatewiseLSTM(2)})}, TypeError, "is not one rule"),
    ],
)
def test_bad_arguments(rules, error, message):
    with pytest.raises(error, match=message):
        RuleGroups(rules)


def test_by_itself_it_updates_nothing():
    rule = conv_and_rest()
    for use in (lambda: rule.state_size, lambda: rule(torch.ones(2), torch.zeros(1, 2))):
        with pytest.raises(TypeError, match="by_name"):
            use()


def test_an_optimizer_of_groups_is_an_optimizer_for_each():
    rule, together, apart = conv_and_rest(), net(), net()
    optimizer = LearnedOptimizer(together.named_parameters(), rule)
    conv, rest = rule.rules.values()
    others = [p for name, p in apart.named_parameters() if not name.startswith("conv")]
    convs = [p for name, p in apart.named_parameters() if name.startswith("conv")]
    both = [LearnedOptimizer(convs, conv), LearnedOptimizer(others, rest)]
    params = list(together.parameters())
    given = gradients(params, 4)
    feed(optimizer, params, given)
    for step in given:
        of_name = dict(zip(dict(apart.named_parameters()), step, strict=True))
        for name, p in apart.named_parameters():
            p.grad = of_name[name]
        for one in both:
            one.step()
    for a, b in zip(params, apart.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.state[params[0]]["rule_state"].shape[0] == conv.state_size
    assert optimizer.state[together.fc.weight]["rule_state"].shape[0] == rest.state_size


@pytest.mark.parametrize("way", ["file", "deepcopy"])
def test_it_goes_on_exactly_from_a_state_dict_or_a_copy(way):
    rule, module = conv_and_rest(), net()
    optimizer = LearnedOptimizer(module.named_parameters(), rule)
    params = list(module.parameters())
    given = gradients(params, 6)
    feed(optimizer, params, given[:3])
    twin, twin_optimizer = copy.deepcopy((module, optimizer))
    if way == "file":
        twin_optimizer = LearnedOptimizer(twin.named_parameters(), rule)
        twin_optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    feed(optimizer, params, given[3:])
    feed(twin_optimizer, list(twin.parameters()), given[3:])
    for a, b in zip(values(params), values(twin.parameters()), strict=True):
        assert torch.equal(a, b)


def test_without_names_or_with_a_name_too_many_an_optimizer_is_refused_and_stays_as_it_was():
    rule, module = conv_and_rest(), net()
    with pytest.raises(ValueError, match="named_parameters"):
        LearnedOptimizer(module.parameters(), rule)
    one = RuleGroups({"conv.*": CoordinatewiseLSTM(2)})
    optimizer = LearnedOptimizer(module.conv.named_parameters(prefix="conv"), one)
    with pytest.raises(ValueError, match=r"'fc\.weight' matches none"):
        optimizer.add_param_group({"params": list(module.fc.named_parameters(prefix="fc"))})
    feed(optimizer, list(module.conv.parameters()), gradients(list(module.conv.parameters()), 2))
    assert len(optimizer.param_groups) == 1


def test_it_is_described_built_and_kept_in_files(tmp_path):
    rule = conv_and_rest()
    described = describe(rule)
    assert list(described["init_args"]["rules"]) == ["conv*", "!conv*"]
    assert build_rule(described).rules["!conv*"].hidden_size == 3
    save_rule(rule, tmp_path / "two.npz")
    module = MetaOptimizer(Quadratic(2), RuleGroups({"theta": CoordinatewiseLSTM(2)}), num_steps=2, unroll_length=1)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, tmp_path / "x.ckpt")
    for found, wanted in ((load_rule(tmp_path / "two.npz"), rule), (load_rule(tmp_path / "x.ckpt"), module.rule)):
        assert describe(found) == describe(wanted)
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(a, b)
        for (pattern, one), member in zip(found.rules.items(), found.members, strict=True):
            assert one is member and pattern in wanted.rules


def test_moved_or_copied_the_rules_stay_those_of_the_groups():
    for rule in (conv_and_rest().double(), copy.deepcopy(conv_and_rest()).double()):
        assert all(p.dtype == torch.float64 for one in rule.rules.values() for p in one.parameters())
        assert [id(one) for one in rule.rules.values()] == [id(one) for one in rule.members]
