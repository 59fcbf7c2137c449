"""Arguments of the wrong kind are refused in one sentence, before anything is computed.

torch is imported when a checked function is first called: functions of modules without tensors are checked too.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ._errors import SemalignError

ParametersT = ParamSpec("ParametersT")
ResultT = TypeVar("ResultT")

_LEFT_ALONE = (int, float, bool, str, Any, inspect.Parameter.empty)
_KINDS = {"Float": "a floating-point", "Int": "an integer", "Bool": "a boolean"}


def checked(function: Callable[ParametersT, ResultT]) -> Callable[ParametersT, ResultT]:
    """Refuse arguments that are not the tensors or objects that a function's signature names.

    Numbers, strings and the content of containers are left to the function, and so is which model a module is: adapters
    wrap models.

    Example:
        >>> from torch import Tensor
        >>> @checked
        ... def size(weight: Tensor) -> int:
        ...     return weight.numel()
        >>> size([1.0, 2.0])
        Traceback (most recent call last):
        semalign_geometry.base._errors.SemalignError: weight is of type list, expected a Tensor: pass torch.as_tensor(…)
    """
    signature = inspect.signature(function)

    @functools.cache
    def wanted() -> dict[str, tuple[type, ...]]:
        return {name: kinds for name, each in signature.parameters.items() if (kinds := _kinds(each.annotation))}

    @functools.wraps(function)
    def call(*args: ParametersT.args, **kwargs: ParametersT.kwargs) -> ResultT:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in wanted():
                check(name, value, *wanted()[name])
        return function(*args, **kwargs)

    return call


def check(name: str, value: Any, *kinds: Any) -> None:
    """Check that a value is of one of some classes or jaxtyping annotations.

    Raises:
        SemalignError: it is of none.
    """
    from jaxtyping import jaxtyped
    from torch import Tensor

    with jaxtyped("context"):  # names of axes mean nothing beyond this value
        if isinstance(value, kinds):
            return
    given = f"of type {type(value).__name__}"
    if isinstance(value, Tensor):
        given = f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    expected = " or ".join(_in_words(kind) for kind in kinds if kind is not type(None))
    raise SemalignError(f"{name} is {given}, expected {expected}{_remedy(value, kinds)}")


def _kinds(annotation: Any) -> tuple[type, ...]:
    """The classes that an annotation names; none where a value cannot be judged by its class."""
    from torch import nn

    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [typing.get_origin(each) or each for each in (typing.get_args(annotation) if union else (annotation,))]
    kinds = [nn.Module if isinstance(each, type) and issubclass(each, nn.Module) else each for each in kinds]
    known = all(isinstance(each, type) and not getattr(each, "_is_protocol", False) for each in kinds)
    return tuple(kinds) if known and not set(kinds) & set(_LEFT_ALONE) else ()


def _in_words(kind: Any) -> str:
    if hasattr(kind, "array_type"):
        return f"{_KINDS[kind.dtype.__name__]} tensor of shape ({kind.dim_str.strip().replace(' ', ', ')})"
    return f"a {kind.__name__}"


def _remedy(value: Any, kinds: tuple[type, ...]) -> str:
    from torch import Tensor, nn

    if any(hasattr(kind, "array_type") or kind is Tensor for kind in kinds):
        if isinstance(value, nn.Module):
            return ": pass its .weight"
        return "" if isinstance(value, Tensor) else ": pass torch.as_tensor(…)"
    makers = [
        f"{kind.__name__}.{name}"
        for kind in kinds
        for name, member in vars(kind).items()
        if isinstance(member, classmethod) and name.startswith(("from_", "load", "read", "open"))
    ]
    return f": make one with {' or '.join(makers)}" if makers else ""
