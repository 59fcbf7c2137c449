"""`semalign models`: models that have a name."""

import argparse
from pathlib import Path

from semalign_geometry.base import SemalignError

from ..util.cache import cache_folder
from ._options import console_of, volume_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "action",
        choices=("list", "pull", "add", "where"),
        help="show all, fetch one, keep a local file, or print a path",
    )
    parser.add_argument("name", nargs="?", help="its name in the list, or its hub id; for add, the path of the file")
    volume_arguments(parser, "path")


def run(options: argparse.Namespace) -> int:
    """List the models, fetch or add one, or print its path."""
    from ..models.catalogue import find_known, known_models
    from ..models.pull import add, models_table, pull

    if options.action == "list":
        if options.name is not None:
            raise SemalignError(f"list shows all models: leave {options.name} out")
        print(models_table(list(known_models().values())))
        return 0
    if options.name is None:
        wanted = "the path of a file" if options.action == "add" else "the name of a model"
        raise SemalignError(f"{options.action} needs {wanted}: semalign models list shows those known")
    console = console_of(options)
    if options.action == "add":
        print(add(Path(options.name), console=console))
    elif options.action == "pull":
        print(pull(find_known(options.name), console=console))
    else:
        print(find_known(options.name).pulled(cache_folder()))
    return 0
