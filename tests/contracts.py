"""What every group of settings and every contract keeps, whatever its package."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
from pydantic import ValidationError
from semalign_geometry.base import Contract, SemalignError, Settings


def settings_of(package: ModuleType) -> set[type[Settings]]:
    """The groups of settings and contracts that a package exports, without their bases."""
    exported = [value for name in package.__all__ if isinstance(value := getattr(package, name), type)]
    return {value for value in exported if issubclass(value, Settings)} - {Settings, Contract}


def assert_keeps_the_laws(value: Settings) -> None:
    """JSON and back, frozen, documented, closed; a contract is versioned and goes through a file, too."""
    group = type(value)
    plain = json.loads(value.model_dump_json(), parse_constant=pytest.fail)  # strict JSON: no bare Infinity
    assert group.parse(plain) == value
    for name, field in group.model_fields.items():
        assert field.description, f"{group.__name__}.{name} has no docstring"
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, name, getattr(value, name))
        with pytest.raises(SemalignError) as caught:
            group.parse({**plain, f"{name}x": 1}, origin="here")
        assert str(caught.value) == f"here: unknown key '{name}x': did you mean '{name}'?"
    with pytest.raises(SemalignError, match="^here: unknown key '0': known keys are .+"):
        group.parse({**plain, "0": 1}, origin="here")
    if isinstance(value, Contract):
        _assert_keeps_the_laws_of_contracts(value)


def _assert_keeps_the_laws_of_contracts(value: Contract) -> None:
    contract = type(value)
    with TemporaryDirectory() as folder:
        path = value.write(Path(folder) / "deeper" / "contract.json")
        assert path == Path(folder) / "deeper" / "contract.json"
        assert contract.read(path) == value
    plain = value.model_dump(mode="json")
    for ahead in (1, 9):
        newer = contract.current_version + ahead
        message = rf"^here: {contract.__name__} has format version {newer}, .* upgrade semalign"
        with pytest.raises(SemalignError, match=message):
            contract.parse({**plain, "version": newer, "key of the future": 1}, origin="here")
