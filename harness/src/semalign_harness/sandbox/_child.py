"""Entry of a bare interpreter (`python -P -s -S`): make this folder a package, and supervise.

The interpreter sees the standard library and this folder, nothing else, so that it starts fast and
imports no code that the sandbox does not need.
"""

import os
import sys
from importlib import import_module

if __name__ == "__main__":
    package = type(sys)("sandbox")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["sandbox"] = package
    settings = import_module("sandbox._values").Codec().decode(bytes.fromhex(sys.argv[1]))
    supervise = import_module("sandbox._supervise")
    sys.dont_write_bytecode = True  # from here on
    supervise.main(settings)
