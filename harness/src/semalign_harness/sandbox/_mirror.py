"""Stand-ins for classes and objects of the other process, which ask that process to act.

Python looks for operators, `isinstance`, `except` and `with` on the class of an object. So each
class of the other process has a class here with the same name, the same bases and the operations
that it defines. A subclass of a plain class, such as a namedtuple, holds the plain content too.

The tests trust no object of the program with a comparison. An operator of the program is asked
only when both operands are objects of the program: an object equal to everything would otherwise
decide `f(x) == 5` and `abs(f(x) - 5) < 0.1`. Between two of its own objects nothing is lost, since
a program could return the same object twice. Conversions (`int`, `len`, `str`, iteration, items)
are asked: the program answers them without knowing what it is compared with. The content of a
subclass of a plain container is known here and decides its length, truth, order and comparison;
`items`, `keys`, `values` and `get` of a dict and `__iter__` of a `deque` are still the program's
if it overrides them.

A program can still do what one process would allow too, by public names of objects that the tests
hand over: configure their Mock, format with their Formatter, and change lists and dicts that their
classes or partials hold.
"""

from collections.abc import Callable

from ._typing import Any, NoReturn
from ._values import NotPlain, name_of


def _special(names: str) -> frozenset[str]:
    return frozenset(f"__{name}__" for name in names.split())


ANSWERS = _special(
    "call iter next reversed len length_hint getitem setitem delitem missing bool int float complex index abs neg pos "
    "invert round trunc floor ceil bytes format str repr fspath dir enter exit aenter aexit aiter anext"
)
"""Operations without an operand that the other side could compare with."""
COMPARISONS = _special("eq ne lt le gt ge")
ARITHMETIC = frozenset(
    f"__{way}{name}__"
    for name in "add sub mul truediv floordiv mod divmod pow matmul and or xor lshift rshift".split()
    for way in ("", "r", "i")
)
OPERATIONS = ANSWERS | COMPARISONS | ARITHMETIC | _special("contains hash")
INSPECTED = _special(
    "name qualname module doc defaults kwdefaults annotations wrapped code closure self func dict members slots notes "
    "signature dataclass_fields match_args version author all"
)
"""Attributes with underscores that are data; the others are protocols of the class."""
CONTENTS = (int, float, complex, str, bytes, tuple, frozenset, list, dict, set, bytearray)
"""Plain classes: an object of a subclass compares by its content."""
KNOWN = _special("len iter bool")
"""Operations of a plain container that its content answers, whatever the subclass defines."""


def is_data(name: str) -> bool:
    """Return whether an attribute can be read from the other process."""
    return not (name.startswith("__") and name.endswith("__")) or name in INSPECTED


class Mirrors:
    """Classes whose objects stand for those of the other process.

    Args:
        ask: operation, object and arguments to result, in the other process.
        hash_of: hash of an object, as the other process has sent it.
        trusting: whether the other process decides comparisons and arithmetic with any operand.
    """

    def __init__(self, ask: Callable[..., Any], hash_of: Callable[[Any], int], *, trusting: bool) -> None:
        self.ask, self.hash_of, self.trusting = ask, hash_of, trusting

        def attribute(this: Any, name: str) -> Any:
            if not is_data(name):
                raise AttributeError(name)
            return ask("getattr", this, name)

        class RemoteClass(type):
            __call__, __iter__, __len__, __getitem__, __dir__, __setattr__ = map(
                self.forward, ("__call__", "__iter__", "__len__", "__getitem__", "__dir__", "setattr")
            )
            __getattr__ = attribute
            __doc__ = property(lambda cls: ask("getattr", cls, "__doc__"))

            def __instancecheck__(cls, value: Any) -> bool:
                if type.__instancecheck__(cls, value):
                    return True
                return isinstance(type(value), RemoteClass) and ask("isinstance", cls, value) is True

            def __bool__(cls) -> bool:
                return True

        class Remote(metaclass=RemoteClass):
            __slots__ = ()  # the other process has the object
            __dict__ = property(lambda self: ask("getattr", self, "__dict__"))
            __getattr__ = attribute
            __delattr__ = self.forward("delattr")
            __copy__ = self.forward("copy")

            def __init_subclass__(cls, **keywords: Any) -> None:
                if "__slots__" not in cls.__dict__:
                    raise NotPlain("the tests derive a class from a class of the program")

            def __setattr__(self, name: str, value: Any) -> None:
                if name.startswith("__"):
                    object.__setattr__(self, name, value)
                else:
                    ask("setattr", self, name, value)

            def __deepcopy__(self, memo: Any) -> Any:
                return ask("deepcopy", self)

            def __reduce_ex__(self, protocol: Any) -> NoReturn:
                raise TypeError("an object of the program cannot be pickled by its tests")

        self.metaclass, self.base = RemoteClass, Remote

    def forward(self, name: str) -> Any:
        """Return a method that requests an operation."""
        ask = self.ask

        def forward(this: Any, *arguments: Any, **keywords: Any) -> Any:
            return ask(name, this, *arguments, **keywords)

        return forward

    def make(
        self, name: str, qualname: str, module: str, bases: tuple[type, ...], operations: tuple[str, ...], real: Any
    ) -> type:
        """Return the class that stands for one of these names, bases and overridden operations.

        Its objects claim the standard class `real`, or with None the class itself.
        """
        if not any(isinstance(base, self.metaclass) for base in bases):
            bases = (self.base, *bases)
        plain = any(issubclass(base, CONTENTS) for base in bases)
        sized = plain and any(hasattr(base, "__len__") for base in bases) and not self.trusting
        doc = property(lambda this: self.ask("getattr", this, "__doc__"))
        space: dict[str, Any] = {"__slots__": (), "__module__": module, "__qualname__": qualname, "__doc__": doc}
        for operation in operations:
            if operation in COMPARISONS or operation in ("__hash__", "__contains__"):
                asked = not plain
            elif sized and operation in KNOWN:
                asked = False
            else:
                asked = operation in OPERATIONS or (plain and not operation.startswith("__"))
            if asked:
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
        distrusting = {"__contains__": contains, "__exit__": leave, "__aexit__": leave_later}
        distrusting |= dict.fromkeys(COMPARISONS | ARITHMETIC, among_its_own)
        return self.forward(name) if self.trusting else distrusting.get(name) or self.forward(name)

    def _coroutine(self) -> dict[str, Any]:
        """Return methods of something to await: the other process runs it to its end."""
        ask = self.ask

        def send(self: Any, value: Any) -> NoReturn:
            raise StopIteration(ask("run", self))

        def wait(self: Any) -> Any:
            return ask("run", self)
            yield

        return {"send": send, "__await__": wait}


def _is_counter(kind: type) -> bool:
    return type(kind) is type and name_of(kind) == "collections.Counter"


def _by_count(counter: Any) -> dict[str, Any]:
    """Return operators for a stand-in of a Counter: its own would call the program's methods."""

    def content(value: Any) -> Any:
        found = counter()
        dict.update(found, dict.copy(value))
        return found

    def own(method: Any, order: int = 1) -> Any:
        def by_content(this: Any, other: Any) -> Any:
            return method(*map(content, (this, other)[::order])) if isinstance(other, counter) else NotImplemented

        return by_content

    found = {name: own(getattr(counter, name)) for name in COMPARISONS}
    for name in ("add", "sub", "and", "or"):
        method = getattr(counter, f"__{name}__")
        found |= {f"__{name}__": own(method), f"__r{name}__": own(method, -1)}
    return found
