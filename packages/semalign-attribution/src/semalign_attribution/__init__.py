"""Layer attribution: a view of a transformers decoder, scores of its layers, and the pairing with a target's
layers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
