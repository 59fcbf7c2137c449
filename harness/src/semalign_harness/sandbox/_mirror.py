"""Stand-ins for the classes and objects of the other process: they have its names and bases, and ask it to act.

Python looks for operators, `isinstance`, `except` and `with` on the class of an object, so each class of the other
process gets a class here with the same name, the same bases and those operations that it defines. A subclass of a plain
class, such as a namedtuple, holds the plain content too.

The tests trust no object of the program with a comparison. An operator of the program is asked only when both operands
are objects of the program: `f(x) == 5` and `abs(f(x) - 5) < 0.1` would otherwise be decided by a program that returns
an object equal to everything. Between two of its own objects nothing is lost, since a program could return the same
object twice. Conversions (`int`, `len`, `str`, iteration, items) are asked: the program answers them without knowing
what it is compared with. The content of a subclass of a plain container is known here, so that its length, truth,
order and comparison are those of the content; a dict's `items`, `keys`, `values` and `get` and a `deque`'s `__iter__`
are still the program's if it overrides them.

Left open is what one process would allow too, by public names of objects that the tests hand over: to configure their
Mock, to format with their Formatter, and to change lists and dicts that their classes or partials hold.
"""

from collections.abc import Callable

from ._values import NotPlain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn
else:  # typing would take a quarter of the time that a program takes
    Any = NoReturn = object

ANSWERS = frozenset(
    f"__{name}__"
    for name in (
        "call iter next reversed len length_hint getitem setitem delitem missing bool int float complex index abs neg "
        "pos invert round trunc floor ceil bytes format str repr fspath dir enter exit aenter aexit aiter anext"
    ).split()
)
"""Operations without an operand that the other side could compare with."""
COMPARISONS = frozenset(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge"))
ARITHMETIC = frozenset(
    f"__{way}{name}__"
    for name in "add sub mul truediv floordiv mod divmod pow matmul and or xor lshift rshift".split()
    for way in ("", "r", "i")
)
OPERATIONS = ANSWERS | COMPARISONS | ARITHMETIC | {"__contains__", "__hash__"}
INSPECTED = frozenset(
    f"__{name}__"
    for name in (
        "name qualname module doc defaults kwdefaults annotations wrapped code closure self func dict members slots "
        "notes signature dataclass_fields match_args version author all"
    ).split()
)
"""Attributes with underscores that are data; the others are protocols, which must be on the class."""
CONTENTS = (int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)
"""Plain classes: an object of a subclass compares by its content."""
KNOWN = frozenset({"__len__", "__iter__", "__bool__"})
"""Operations of a plain container that its content answers, whatever the subclass says."""


def is_data(name: str) -> bool:
    """Whether an attribute can be read from the other process."""
    return not (name.startswith("__") and name.endswith("__")) or name in INSPECTED


class Mirrors:
    """Makes classes whose objects stand for those of the other process.

    Args:
        ask: operation, object and arguments to result, in the other process.
        hash_of: hash of an object, as the other process has sent it.
        trusting: whether the other process decides comparisons and arithmetic of its objects with any operand.
    """

    def __init__(self, ask: Callable[..., Any], hash_of: Callable[[Any], int], *, trusting: bool) -> None:
        self.ask, self.hash_of, self.trusting = ask, hash_of, trusting

        class RemoteClass(type):
            """Class of the stand-ins for classes."""

            def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
                return ask("__call__", cls, *arguments, **keywords)

            def __getattr__(cls, name: str) -> Any:
                if not is_data(name):
                    raise AttributeError(name)
                return ask("getattr", cls, name)

            def __setattr__(cls, name: str, value: Any) -> None:
                ask("setattr", cls, name, value)

            def __instancecheck__(cls, value: Any) -> bool:
                if type.__instancecheck__(cls, value):
                    return True
                return isinstance(type(value), RemoteClass) and ask("isinstance", cls, value) is True

            def __iter__(cls) -> Any:
                return ask("__iter__", cls)

            def __len__(cls) -> Any:
                return ask("__len__", cls)

            def __bool__(cls) -> bool:
                return True

            def __getitem__(cls, key: Any) -> Any:
                return ask("__getitem__", cls, key)

            def __dir__(cls) -> Any:
                return ask("__dir__", cls)

        class Remote(metaclass=RemoteClass):
            """Base of the stand-ins; without storage, since the other process has the object."""

            __slots__ = ()
            __dict__ = property(lambda self: ask("getattr", self, "__dict__"))

            def __init_subclass__(cls, **keywords: Any) -> None:
                if "__slots__" not in cls.__dict__:
                    raise NotPlain("the tests derive a class from a class of the program")

            def __getattr__(self, name: str) -> Any:
                if not is_data(name):
                    raise AttributeError(name)
                return ask("getattr", self, name)

            def __setattr__(self, name: str, value: Any) -> None:
                if name.startswith("__"):
                    object.__setattr__(self, name, value)
                else:
                    ask("setattr", self, name, value)

            def __delattr__(self, name: str) -> None:
                ask("delattr", self, name)

            def __copy__(self) -> Any:
                return ask("copy", self)

            def __deepcopy__(self, memo: Any) -> Any:
                return ask("deepcopy", self)

            def __reduce_ex__(self, protocol: Any) -> NoReturn:
                raise TypeError("an object of the program cannot be pickled by its tests")

        self.metaclass, self.base, self.doc = RemoteClass, Remote, _Doc(ask)

    def make(
        self, name: str, qualname: str, module: str, bases: tuple[type, ...], operations: tuple[str, ...], real: Any
    ) -> type:
        """The class that stands for another.

        Args:
            name: of the class.
            qualname: with the names of what it is defined in.
            module: where it is defined.
            bases: stand-ins, plain classes and exceptions.
            operations: operators and overridden methods of the class.
            real: standard class that its objects say they have; None for the class itself.
        """
        if not any(isinstance(base, self.metaclass) for base in bases):
            bases = (self.base, *bases)
        plain = any(issubclass(base, CONTENTS) for base in bases)
        sized = plain and any(hasattr(base, "__len__") for base in bases) and not self.trusting
        space: dict[str, Any] = {"__slots__": (), "__module__": module, "__qualname__": qualname, "__doc__": self.doc}
        for operation in operations:
            if operation in COMPARISONS or operation in ("__hash__", "__contains__"):
                if plain:
                    continue
            elif sized and operation in KNOWN:
                continue
            elif not (operation in OPERATIONS or (plain and not operation.startswith("__"))):
                continue
            space[operation] = self._operation(operation)
        counter = next((base for base in bases for base in base.__mro__ if _is_counter(base)), None)
        if counter is not None and not self.trusting:
            space.update(_by_count(counter))
        if real is not None:
            space["__class__"] = property(lambda self: real)
        if "__await__" in operations:
            space.update(self._coroutine())
        return self.metaclass(name, bases, space)

    def _operation(self, name: str) -> Any:
        ask = self.ask

        def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
            return ask(name, self, *arguments, **keywords)

        def among_its_own(this: Any, other: Any, *more: Any) -> Any:
            if not isinstance(type(other), self.metaclass):
                return getattr(super(self.base, this), name, lambda *_: NotImplemented)(other, *more)
            return ask(name, this, other, *more)

        def contains(this: Any, item: Any) -> Any:
            if isinstance(type(item), self.metaclass):
                return ask(name, this, item)
            return any(each is item or each == item for each in this)

        def leave(this: Any, kind: Any, error: Any, trace: Any) -> bool:
            ask(name, this, kind, error, None)
            return False  # the program does not swallow an error of the tests

        async def leave_later(this: Any, kind: Any, error: Any, trace: Any) -> bool:
            await ask(name, this, kind, error, None)
            return False

        async def step(this: Any) -> Any:
            return ask(name, this)

        if not name.startswith("__"):
            return property(lambda this: ask("getattr", this, name))
        if name == "__hash__":
            return lambda this: self.hash_of(this)
        if name == "__anext__":
            return step
        if self.trusting:
            return forward
        if name == "__contains__":
            return contains
        if name == "__exit__":
            return leave
        if name == "__aexit__":
            return leave_later
        return among_its_own if name in COMPARISONS or name in ARITHMETIC else forward

    def _coroutine(self) -> dict[str, Any]:
        """Methods of something to await: the other process runs it to its end."""
        ask = self.ask

        def send(self: Any, value: Any) -> NoReturn:
            raise StopIteration(ask("run", self))

        def wait(self: Any) -> Any:
            return ask("run", self)
            yield

        return {"send": send, "__await__": wait}


def _is_counter(kind: type) -> bool:
    return (kind.__module__, kind.__qualname__) == ("collections", "Counter") and type(kind) is type


def _by_count(counter: Any) -> dict[str, Any]:
    """Comparisons and arithmetic of a Counter's stand-in: the class's own would read it by the program's methods."""

    def content(value: Any) -> Any:
        found = counter()
        dict.update(found, dict.copy(value))
        return found

    def own(method: Any) -> Any:
        return lambda this, other: (
            method(content(this), content(other)) if isinstance(other, counter) else NotImplemented
        )

    def reflected(method: Any) -> Any:
        return lambda this, other: (
            method(content(other), content(this)) if isinstance(other, counter) else NotImplemented
        )

    methods = {name: getattr(counter, f"__{name}__") for name in ("add", "sub", "and", "or")}
    return {
        **{name: own(getattr(counter, name)) for name in COMPARISONS},
        **{f"__{name}__": own(method) for name, method in methods.items()},
        **{f"__r{name}__": reflected(method) for name, method in methods.items()},
    }


class _Doc:
    """The docstring that an object or a class has in the other process."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self.ask = ask

    def __get__(self, value: Any, kind: Any) -> Any:
        return self.ask("getattr", kind if value is None else value, "__doc__")
