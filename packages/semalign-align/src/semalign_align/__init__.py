"""Alignment supervision: the source runs once, and its supervision is stored at the target's width."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
