"""Base of all packages: contracts and settings, artifacts and their hashes, errors, components by name. No maths."""

from ._artifact import MANIFEST as MANIFEST
from ._artifact import ArtifactManifest as ArtifactManifest
from ._artifact import check_replaceable as check_replaceable
from ._artifact import read_artifact as read_artifact
from ._artifact import read_manifest as read_manifest
from ._artifact import save_tensors as save_tensors
from ._artifact import sha256_of as sha256_of
from ._artifact import write_artifact as write_artifact
from ._checked import checked as checked
from ._code import code_sha256 as code_sha256
from ._components import Components as Components
from ._components import Kinds as Kinds
from ._contracts import Contract as Contract
from ._contracts import Settings as Settings
from ._errors import ComponentError as ComponentError
from ._errors import SemalignError as SemalignError
from ._errors import brief as brief
from ._files import new_folder as new_folder
from ._files import replace_file as replace_file
from ._shown import short_repr as short_repr

__all__ = [
    "ArtifactManifest",
    "ComponentError",
    "Components",
    "Contract",
    "Kinds",
    "MANIFEST",
    "SemalignError",
    "Settings",
    "brief",
    "check_replaceable",
    "checked",
    "code_sha256",
    "new_folder",
    "read_artifact",
    "read_manifest",
    "replace_file",
    "save_tensors",
    "sha256_of",
    "write_artifact",
    "short_repr",
]
