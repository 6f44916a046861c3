"""Arguments that a data module hands on: the command line, type checkers and the constructors agree on them."""

import inspect
import typing

import pytest
from jsonargparse import ArgumentParser

from lightning_l2l import QuadraticDataModule
from lightning_l2l.data import (
    CIFAR10DataModule,
    EpisodeDataModule,
    GeneratedDataModule,
    ImageDataModule,
    MixtureDataModule,
    MNISTDataModule,
    PoolDataModule,
    SequenceDataModule,
)

SIZES = "num_tasks seed num_steps episodes_per_epoch num_val_tasks num_test_tasks eval_tasks num_workers".split()
IMAGES = [*SIZES, "root", "batch_size", "download", "num_unseen", "image_size"]
NAMES = {
    QuadraticDataModule: [*SIZES, "dim"],
    GeneratedDataModule: [*SIZES, "task"],
    MixtureDataModule: [*SIZES, "members", "weights", "root"],
    SequenceDataModule: [*SIZES, "vocab_size", "sequence_length", "order", "batch_size", "num_unseen"],
    MNISTDataModule: IMAGES,
    CIFAR10DataModule: [*IMAGES, "classes", "train_classes"],
}


@pytest.mark.parametrize("module", NAMES)
def test_the_command_line_has_every_argument_with_its_default_and_help(module):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(module, "data")
    found = vars(parser.get_defaults().data)
    assert sorted(found) == sorted(NAMES[module])
    given = {"members": [QuadraticDataModule()]} if "members" in found else {}
    made = module(**given)
    for name, default in found.items():
        if name not in {*given, "eval_tasks", "root", "classes", "train_classes"}:  # of these another value is kept
            assert getattr(made, name) == default, name
    helped = {action.dest.removeprefix("data."): action.help for action in parser._actions}
    assert all(helped[name] for name in ("seed", "num_steps", "episodes_per_epoch", "eval_tasks", "num_workers"))


@pytest.mark.parametrize("module", [*NAMES, ImageDataModule, PoolDataModule])
def test_types_of_the_options_are_those_of_the_constructors_that_take_them(module):
    constructors = [vars(base)["__init__"] for base in module.__mro__ if "__init__" in vars(base)]
    constructors = constructors[: constructors.index(EpisodeDataModule.__init__) + 1]
    options = typing.get_type_hints(constructors[0])["options"]
    own = inspect.signature(constructors[0]).parameters.keys() - {"self", "options"}
    taken = {}
    for constructor in reversed(constructors[1:]):
        taken |= {name: kind for name, kind in typing.get_type_hints(constructor).items() if name != "options"}
    assert not own & options.__annotations__.keys()  # a type checker would refuse the class
    assert typing.get_type_hints(options).items() <= taken.items()
    wanted = set(SIZES) | ({"batch_size"} if issubclass(module, PoolDataModule) else set())
    assert wanted <= own | options.__annotations__.keys()


def test_an_argument_that_there_is_not():
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_task'"):
        QuadraticDataModule(num_task=3)
