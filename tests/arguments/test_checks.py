"""Whatever the arguments of a constructor are: it gives something that works, or says in one line which is wrong."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from hostile import VALUES, result_of
from lightning_l2l import (
    MLP,
    Autoencoder,
    CIFAR10DataModule,
    CoordinatewiseLSTM,
    FirstOrder,
    GeneratedDataModule,
    Imitation,
    Lasso,
    LearnedOptimizer,
    LogisticRegression,
    MetaOptimizer,
    Mixture,
    MixtureDataModule,
    MNISTDataModule,
    NetworkTask,
    Quadratic,
    QuadraticDataModule,
    Rastrigin,
    RNNprop,
    Rosenbrock,
    SequenceDataModule,
    Transformer,
)
from lightning_l2l.arguments import brief, check_at_least, check_fits_memory
from lightning_l2l.data import write_digits
from lightning_l2l.evaluation.baselines import Baseline, find_baselines
from lightning_l2l.evaluation.learning_curves import LearningCurves
from lightning_l2l.rules.describe import build_rule, describe

RULE = CoordinatewiseLSTM(hidden_size=2)
MOST = 2000  # of what is tried out; larger sizes are constructed only


def use_rule(rule):
    if rule.hidden_size * rule.num_layers <= MOST:
        update, state = rule(torch.ones(2), rule.init_state(2))
        assert update.shape == (2,) and state.shape == (rule.state_size, 2)
        assert describe(build_rule(describe(rule))) == describe(rule)


def use_meta_optimizer(module):
    if module.num_steps <= 40:
        assert len(module.weights) == module.num_steps and module.num_steps % module.unroll_length == 0
        assert sum(module.weights) == pytest.approx(module.num_steps)
        batch = next(iter(QuadraticDataModule(num_tasks=2, dim=2).train_dataloader()))
        truncation = module.unroll.run(module.unroll.start(batch), module.unroll_length)
        assert truncation.losses.shape == (module.unroll_length, 2)
    assert describe(module.rule) == module.hparams["rule"]


def use_data(data):
    if not data.num_workers and data.num_tasks * data.dim**2 <= MOST:
        batch = next(iter(data.train_dataloader()))
        assert batch["W"].shape == (data.num_tasks, data.dim, data.dim)


def use_task(task):
    if task.dim <= MOST:
        assert task.init_params(2, torch.Generator())["theta"].shape == (2, task.dim)


def use_generated_task(task):
    if max(value for value in vars(task).values() if isinstance(value, int)) <= MOST:
        params = task.init_params(2, torch.Generator())
        batch = next(iter(GeneratedDataModule(task, num_tasks=2).train_dataloader()))
        assert task.loss(params, batch, 0).shape == (2,)


def use_generated_data(data):
    unknown = isinstance(data, GeneratedDataModule) and data.task is None
    if not data.num_workers and data.num_tasks <= MOST and not unknown:
        data.setup()
        assert len(next(iter(data.train_dataloader()))["seed"]) == data.num_tasks


def use_sequences(data):
    sizes = (data.num_tasks, data.num_steps or 2**60, data.batch_size, data.sequence_length)
    if not data.num_workers and math.prod(sizes) <= 100 * MOST:
        batch = next(iter(data.train_dataloader()))
        assert batch["inputs"].shape == (data.num_tasks, data.num_steps + 1, *sizes[2:])
        assert batch["targets"].max() < data.vocab_size


def use_transformer(network):
    if network.hidden_size * network.sequence_length * network.num_layers <= 10 * MOST:
        tokens = torch.zeros(2, network.sequence_length, dtype=torch.int64)
        assert network(tokens).shape == (2, network.vocab_size, network.sequence_length)


def use_mixture(mixture):
    assert mixture.of_episode({"member": torch.zeros(2, dtype=torch.int64)}) is mixture.tasks[0]


def use_autoencoder(network):
    if network.in_features <= MOST:
        assert network(torch.ones(3, network.in_features)).shape == (3, network.in_features)


def use_mlp(network):
    if network.in_features <= MOST:
        assert network(torch.ones(3, network.in_features)).shape == (3, network.out_features)


def use_network_task(task):
    params = task.init_params(2, torch.Generator())
    batch = {"inputs": torch.ones(2, 1, 4, 3), "targets": torch.ones(2, 1, 4).byte(), "seed": torch.arange(2)}
    assert task.loss(params, batch, 0).shape == (2,)


def use_optimizer(optimizer):
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    optimizer.step(loss=torch.tensor(1.0))
    assert parameter.shape == (2,)


def use_cifar10(data):
    assert 2 <= len(data.classes) <= len(data.train_classes) <= 10
    assert set(data.classes) | set(data.train_classes) <= set(range(10))


def leave(thing):
    assert thing is not None


def make_optimizer(**options):
    options = {"rule": RULE, **options}
    return LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], **options)


def make_module(**options):
    return MetaOptimizer(
        **{"task": Quadratic(2), "rule": CoordinatewiseLSTM(2), "num_steps": 4, "unroll_length": 2, **options}
    )


def make_generated_data(**options):
    return GeneratedDataModule(**{"task": Rosenbrock(2), **options})


def make_mixture_data(**options):
    return MixtureDataModule(**{"members": [GeneratedDataModule(Rosenbrock(2))], **options})


def make_sequences(**options):
    return SequenceDataModule(**{"num_steps": 2, **options})


def make_network_task(**options):
    return NetworkTask(**{"module": torch.nn.Linear(3, 2), **options})


def make_imitation(**options):
    return Imitation(**{"weight": 1.0, **options})


def make_baseline(**options):
    return Baseline(**{"name": "own", "optimizer": torch.optim.SGD, **options})


SIZES = "episodes_per_epoch num_val_tasks num_test_tasks eval_tasks num_workers num_steps num_tasks seed".split()
IMAGES = "root batch_size download num_unseen".split()
CONSTRUCTORS = {
    RNNprop: (
        "hidden_size num_layers beta1 beta2 eps output_scale time decay horizon warmup wait_for_gradient".split(),
        use_rule,
    ),
    CoordinatewiseLSTM: (
        "hidden_size num_layers preprocessing p output_scale forget_bias wait_for_gradient".split(),
        use_rule,
    ),
    FirstOrder: ("memory memory_budget block".split(), leave),
    make_imitation: ("weight teacher schedule epochs".split(), leave),
    make_module: (
        "task rule num_steps unroll_length loss_weights final_steps lr optimizer lr_scheduler anneal gradient_clip "
        "max_skipped meta_gradient imitation train_task start log_loss".split(),
        use_meta_optimizer,
    ),
    Quadratic: (["dim"], use_task),
    QuadraticDataModule: (["dim", *SIZES], use_data),
    Rosenbrock: (["dim"], use_generated_task),
    Rastrigin: ("dim amplitude random_amplitude".split(), use_generated_task),
    LogisticRegression: ("num_features num_examples l2".split(), use_generated_task),
    Lasso: ("num_features num_measurements l1 density".split(), use_generated_task),
    Mixture: (["tasks"], use_mixture),
    Transformer: ("vocab_size hidden_size num_heads num_layers sequence_length".split(), use_transformer),
    Autoencoder: ("in_features hidden_size activation".split(), use_autoencoder),
    make_generated_data: (["task", *SIZES], use_generated_data),
    make_mixture_data: (["members", "weights", *SIZES], use_generated_data),
    make_sequences: (["vocab_size", "sequence_length", "order", "batch_size", "num_unseen", *SIZES], use_sequences),
    MNISTDataModule: ([*IMAGES, *SIZES], leave),
    CIFAR10DataModule: (["classes", "train_classes", *IMAGES, *SIZES], use_cifar10),
    MLP: ("in_features hidden_size num_layers out_features activation".split(), use_mlp),
    make_network_task: ("module loss_fn init_scale stochastic reconstruct".split(), use_network_task),
    make_baseline: ("name optimizer options lr schedule".split(), leave),
    LearningCurves: ("baselines quantiles every_n_epochs test_command".split(), leave),
    make_optimizer: ("rule lr weight_decay maximize max_update skip_nonfinite fallback_lr".split(), use_optimizer),
}


def options_of(constructor):
    names, _ = CONSTRUCTORS[constructor]
    return st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2)


@given(st.sampled_from(list(CONSTRUCTORS)).flatmap(lambda c: st.tuples(st.just(c), options_of(c))))
@example((CoordinatewiseLSTM, {"hidden_size": True}))
@example((CoordinatewiseLSTM, {"hidden_size": 10**9}))
@example((CoordinatewiseLSTM, {"p": 10**400}))
@example((CoordinatewiseLSTM, {"forget_bias": math.nan}))
@example((CoordinatewiseLSTM, {"forget_bias": 2**63}))
@example((CoordinatewiseLSTM, {"output_scale": 10**30}))
@example((make_optimizer, {"max_update": 3.402823466385289e38}))
@example((make_module, {"num_steps": "5"}))
@example((make_module, {"num_steps": 10**9, "unroll_length": 7}))
@example((make_module, {"loss_weights": []}))
@example((make_module, {"lr": 10**400}))
@example((make_module, {"task": Quadratic}))
@example((QuadraticDataModule, {"dim": 10**5, "num_tasks": 10**6}))
@example((QuadraticDataModule, {"num_workers": 10**6}))
@example((QuadraticDataModule, {"num_tasks": None}))
@example((CIFAR10DataModule, {"classes": [5, "cat"]}))
@example((CIFAR10DataModule, {"classes": ["x" * 500]}))
@example((CIFAR10DataModule, {"classes": [True, False]}))
@example((CIFAR10DataModule, {"train_classes": {"a": 1}}))
@example((MLP, {"hidden_size": 10**6, "num_layers": 40}))
@example((MLP, {"out_features": 10**9}))
@example((make_network_task, {"module": lambda: 3}))
@example((Rastrigin, {"amplitude": math.nan}))
@example((LogisticRegression, {"num_features": 10**5, "num_examples": 10**9}))
@example((Lasso, {"num_measurements": 10**6, "num_features": 10**6}))
@example((Lasso, {"density": "0.1"}))
@example((Mixture, {"tasks": [Quadratic]}))
@example((Transformer, {"hidden_size": 9, "num_heads": 2}))
@example((Transformer, {"hidden_size": 10**5, "num_layers": 100}))
@example((make_generated_data, {"task": Quadratic}))
@example((make_mixture_data, {"weights": ["1"]}))
@example((make_mixture_data, {"members": [3]}))
@example((make_sequences, {"order": 40}))
@example((make_sequences, {"batch_size": 10**9}))
@example((make_baseline, {"name": "a\nb"}))
@example((LearningCurves, {"baselines": "adam"}))
@example((LearningCurves, {"baselines": [["adam"]]}))
@example((LearningCurves, {"quantiles": [0.1, "0.9"]}))
@example((make_optimizer, {"lr": "0.1"}))
@example((make_optimizer, {"lr": 5e-324}))
@example((make_optimizer, {"lr": 10**9, "weight_decay": 10**9}))
@example((make_optimizer, {"rule": None}))
def test_a_constructor_gives_what_works_or_names_the_argument(case):
    constructor, options = case
    # Which file or folder a text names is another matter.
    assume(not (constructor is make_optimizer and isinstance(options.get("rule"), str)))
    _, use = CONSTRUCTORS[constructor]
    made = result_of(constructor, **options)
    if made is not None:
        use(made)
    else:
        told = result_of.told
        assert any(name.removesuffix("s") in told for name in options), told


@pytest.mark.parametrize("options", [{"num_train": True}, {"num_test": 1.5}, {"seed": -1}, {"num_train": "9"}])
def test_drawn_digits_refuse_what_is_no_size(tmp_path, options):
    assert result_of(write_digits, tmp_path, **options) is None


@given(VALUES)
def test_baselines_are_found_or_told(given):
    result_of(find_baselines, given)


def test_numbers_of_numpy_become_plain_ones():
    """Else a checkpoint would hold a class that `weights_only` does not load."""
    rule = CoordinatewiseLSTM(p=np.float64(9.0), preprocessing=np.str_("identity"))
    assert [type(v) for v in describe(rule)["init_args"].values()] == [int, int, str, float, float, float, bool]


@given(st.recursive(VALUES, lambda v: st.lists(v) | st.dictionaries(st.text(), v)), st.integers(10, 300))
@example(10**5000, 80)
def test_any_value_is_shown_in_one_short_line(value, length):
    text = brief(value, length)
    assert len(text) <= length and text == " ".join(text.split())


def test_what_cannot_be_shown_is_named_by_its_type():
    class Bad:
        def __repr__(self):
            raise KeyError("no")

    assert "Bad" in brief(Bad())
    assert "\n" not in brief(torch.zeros(5, 5))


def test_what_a_file_made_up_is_shown_quickly():
    value = ["x"]
    for _ in range(100):
        value = [value] * 10  # no repr of it would ever end
    assert len(brief(value, 300)) <= 300


def test_sizes_have_an_upper_end():
    check_at_least(1, 10, a=10)
    with pytest.raises(ValueError, match="a=11 is too large; use at most 10"):
        check_at_least(1, 10, a=11)
    check_at_least(1, optional=True, a=None)
    with pytest.raises(ValueError, match="a=None is not an integer of 1 or more"):
        check_at_least(1, a=None)


def test_more_memory_than_the_machine_has_is_refused():
    check_fits_memory(10**6, a=3)
    with pytest.raises(ValueError, match=r"^a=3, b=4 need 1e\+15 GB of memory, .* has .* GB; use a smaller a or b$"):
        check_fits_memory(10**24, a=3, b=4)


class Wide(QuadraticDataModule):
    def sample(self, stage, generator):
        return {"W": torch.zeros(1).expand(10**9)}  # which take no memory by themselves


def test_a_batch_that_does_not_fit_the_memory_is_refused_before_it_is_drawn():
    with pytest.raises(ValueError, match=r"num_tasks=100000 need 4e\+05 GB of memory, .*; use a smaller num_tasks"):
        next(iter(Wide(num_tasks=10**5).train_dataloader()))


def test_a_million_tasks_are_counted_and_not_listed():
    """A sampler that listed the tasks of an epoch would need a hundred gigabytes here."""
    data = QuadraticDataModule(num_tasks=2, dim=1, episodes_per_epoch=10**9, num_val_tasks=10**9)
    assert len(next(iter(data.train_dataloader()))["seed"]) == 2
    assert len(next(iter(data.val_dataloader()))["seed"]) == 2
