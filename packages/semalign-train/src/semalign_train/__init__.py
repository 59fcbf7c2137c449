"""Training of a target on stored or live supervision: layer by layer, or all layers at once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # names are listed in __init__.pyi
