"""Semantic bases of language-model heads, transport between widths, and relation geometry. Pure maths on torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
