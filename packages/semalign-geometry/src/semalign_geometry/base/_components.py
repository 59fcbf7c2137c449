"""Components by name: built-in ones, and those that installed packages add through entry points.

Entry points are searched only for names that are not built in: without one, nothing is slower and nothing
foreign is imported.
"""

import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from ._code import code_sha256
from ._contracts import MisfitError, Settings
from ._errors import SemalignError

ComponentT = TypeVar("ComponentT")


class Components(Generic[ComponentT]):
    """One sort of component, such as frames."""

    def __init__(
        self,
        group: str,
        what: str,
        built_in: Mapping[str, ComponentT],
        *,
        expected: str,
        fits: Callable[[Any], bool],
        name_of: Callable[[Any], Any],
    ) -> None:
        """Name the sort; nothing is looked up yet.

        Args:
            group: entry points of this group name components of installed packages.
            what: the sort in a word, for messages.
            built_in: the built-in components, by name.
            expected: what a component is, for messages.
            fits: whether an object that a package adds is one.
            name_of: the component's own name, which must equal its entry point's.
        """
        self.group = group
        """Group of the entry points of installed packages."""
        self.what = what
        """The sort in a word."""
        self.built_in = built_in
        """The built-in components, by name."""
        self.fits = fits
        """Whether something is a component of this sort."""
        self._expected = expected
        self._name_of = name_of

    def find(self, name: str, *, besides: Sequence[str] = ()) -> ComponentT:
        """A component by name.

        Args:
            name: its name.
            besides: names that mean something to the caller, for the message.

        Raises:
            SemalignError: the name is unknown, or an installed package adds something else by it.
        """
        if name in self.built_in:
            return self.built_in[name]
        entries = list(entry_points(group=self.group))
        found = [entry for entry in entries if entry.name == name]
        if not found:
            known = dict.fromkeys((*self.built_in, *besides, *(entry.name for entry in entries)))
            raise SemalignError(
                f"unknown {self.what} {name!r}: choose one of {', '.join(known)}, or install the package that adds it"
            )
        return self._loaded(found[0], taken=len(found) > 1)

    def all(self) -> dict[str, ComponentT]:
        """Every component by name, those of installed packages last.

        Raises:
            SemalignError: a package adds something else, or a name that is taken.
        """
        found = dict(self.built_in)
        for entry in entry_points(group=self.group):
            found[entry.name] = self._loaded(entry, taken=entry.name in found)
        return found

    def packages(self, *names: str) -> dict[str, str]:
        """Versions of the installed packages that add components of these names; none for built-in ones."""
        foreign = set(names) - set(self.built_in)
        entries = [entry for entry in entry_points(group=self.group) if entry.name in foreign] if foreign else []
        return {entry.dist.name: entry.dist.version for entry in entries if entry.dist is not None}

    def code(self, component: ComponentT, *, name: str | None = None) -> dict[str, str]:
        """Hash of the code of a component, under its sort and name; nothing for a built-in one.

        A component passed in Python, without an installed package, counts as foreign too. `code_sha256` lists
        what is covered.

        Args:
            component: the class or the object.
            name: its name; None takes the component's own.

        Example:
            >>> from semalign_geometry import FRAMES, KNOWN_FRAMES
            >>> KNOWN_FRAMES.code(FRAMES["dual"])
            {}
        """
        if any(component is ours for ours in self.built_in.values()):
            return {}
        name = name or str(self._name_of(component))
        modules = [entry.module for entry in entry_points(group=self.group) if entry.name == name]
        return {f"{self.what} {name}": code_sha256(component, *modules)}

    def _loaded(self, entry: EntryPoint, *, taken: bool) -> ComponentT:
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
        whose = f"the {self.what} {entry.name} of {package}"
        if taken:
            raise SemalignError(f"{whose} has the name of another {self.what}: rename its entry point")
        try:
            component: Any = entry.load()
        except Exception as error:  # whatever a foreign module raises
            raise SemalignError(
                f"{whose} cannot be imported ({type(error).__name__}: {error}): uninstall it, or fix it"
            ) from error
        if not self.fits(component):
            raise SemalignError(f"{whose} is no {self._expected}: uninstall it, or fix it")
        if self._name_of(component) != entry.name:
            raise SemalignError(f"{whose} calls itself {self._name_of(component)!r}: rename it to its entry point")
        return typing.cast(ComponentT, component)


class Kinds(Components[type[Settings]]):
    """One sort of component that is a class of settings, chosen in a configuration by its `kind`.

    A field of a configuration that takes them is annotated with the union of the built-in ones:
    `Annotated[SerializeAsAny[A | B], Field(discriminator="kind"), WrapValidator(kinds.or_foreign)]`.
    """

    def __init__(self, group: str, what: str, built_in: Collection[type[Settings]], *, needs: Collection[str]) -> None:
        """Name the sort.

        Args:
            group: entry points of this group name classes of installed packages.
            what: the sort in a word, for messages.
            built_in: the built-in classes; the default of the field `kind` is the name of each.
            needs: attributes and methods that a class must have.
        """
        super().__init__(
            group,
            what,
            {_kind_of(each): each for each in built_in},
            expected=f"class of settings with {', '.join(('kind', *needs))}",
            fits=lambda given: (
                isinstance(given, type) and issubclass(given, Settings) and _has(given, ("kind", *needs))
            ),
            name_of=_kind_of,
        )

    def parse(self, value: Any, *, default: str | None = None) -> Settings:
        """Settings from a mapping read from YAML or JSON; settings pass through.

        Args:
            value: the mapping.
            default: its kind where it names none.

        Raises:
            SemalignError: the kind is unknown, or one of its settings is unknown or wrong.
        """
        if isinstance(value, Settings) and self.fits(type(value)):
            return value
        first = next(iter(self.built_in))
        if not isinstance(value, dict):
            meant = value if isinstance(value, str) and value in self.built_in else first
            raise SemalignError(f"{self.what} is {value!r}: expected settings such as {self.what}.kind={meant}")
        kind = value.get("kind", default)
        if not isinstance(kind, str):
            raise SemalignError(f"{self.what}.kind is {kind!r}: choose one such as {self.what}.kind={first}")
        chosen = self.find(kind)
        try:
            return chosen.model_validate({**value, "kind": kind})
        except ValidationError as error:
            raise MisfitError(chosen, error) from error

    def or_foreign(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        """Validate a field over the built-in classes: pydantic's `handler` takes those, others are parsed here."""
        if isinstance(value, dict):
            kind = value.get("kind")
            return self.parse(value) if isinstance(kind, str) and kind not in self.built_in else handler(value)
        foreign = isinstance(value, Settings) and type(value) not in self.built_in.values() and self.fits(type(value))
        return value if foreign else handler(value)


def _kind_of(settings: type[Settings]) -> Any:
    return settings.model_fields["kind"].default


def _has(settings: type[Settings], names: Collection[str]) -> bool:
    # Not hasattr: a class is callable whether its instances are or not, and a field is no attribute of its class.
    return set(names) <= {*dir(settings), *settings.model_fields}
