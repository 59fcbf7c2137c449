"""Devices that are not the CPU: CUDA where there is one, and on any machine one that lacks float64, as MPS does.

The tensors of the latter keep their numbers on the CPU and say that they lie on `mps`. Operations that mix them with
tensors of the CPU fail as on a real device, and so does float64.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("mps")
_INSIDE = torch.device("lazy")  # what torch is told: a device that it knows in every build

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
"""Marks of a test that needs a CUDA device."""
elsewhere = pytest.mark.parametrize("name", ["mps", pytest.param("cuda", marks=ON_CUDA)])
"""Runs a test for each device, by its `name`."""


@contextmanager
def usable(name: str) -> Iterator[torch.device]:
    """A device by name; tensors on it are usable inside of the block."""
    if name != str(DEVICE):
        yield torch.device(name)
        return
    run = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _Names():  # torch leaves a function mode while one of its own functions runs
            return run(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", backward))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes are of one thread
        stack.enter_context(_Operations())
        stack.enter_context(_Names())
        yield DEVICE


class _There(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls: "type[_There]", held: Tensor) -> "_There":
        if held.dtype == torch.float64:
            raise TypeError("the device has no float64")
        there: _There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_INSIDE,
        )
        there.held = held
        return there

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Names(TorchFunctionMode):
    """`DEVICE` to the outside, `_INSIDE` to torch."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") in (DEVICE, str(DEVICE)):
            kwargs = kwargs | {"device": _INSIDE}
        args = tuple(_INSIDE if isinstance(value, torch.device) and value == DEVICE else value for value in args)
        if function is Tensor.to and args[1:] and args[1] == str(DEVICE):
            args = (args[0], _INSIDE, *args[2:])
        result = function(*args, **kwargs)
        return DEVICE if isinstance(result, torch.device) and result == _INSIDE else result


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, _There)]
    here = [value for value in tensors if not isinstance(value, _There) and value.dim()]
    if there and here and not (operation in _COPIES or (operation in _INDEXED and isinstance(args[0], _There))):
        raise RuntimeError(f"{operation} was given tensors of the CPU and of {DEVICE}")
    if there and kwargs.get("dtype") == torch.float64:
        raise TypeError("a tensor is converted where it lies, and that device has no float64")
    device = kwargs.get("device")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    held = tree_map_only(_There, lambda value: value.held, (args, kwargs))
    result = operation(*held[0], **held[1])
    if operation is _aten.copy_.default:
        return args[0]
    if not there if device is None else device != _INSIDE:
        return result
    result = tree_map_only(Tensor, _There, result)
    return return_and_correct_aliasing(operation, args, kwargs, result)
