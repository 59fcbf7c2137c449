"""Hypothesis profiles, and every jaxtyping signature checked at run time."""

import os

from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("dev", deadline=None, max_examples=30)
settings.register_profile("ci", settings.get_profile("ci"), deadline=None)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

install_import_hook(
    ["semalign_geometry", "semalign_attribution", "semalign_align", "semalign_train", "semalign_harness"],
    "beartype.beartype",
)
