"""Experiments with semantic alignment: settings in, a run folder with the trained target and its metrics out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
