"""Check a pair of models in seconds: by configurations, tokenizers and heads, before any weights load."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
