"""A second device without a GPU: tensors that lie on the CPU but say cuda:0, and an error wherever CUDA would raise one.

    second_device()     in here, what is made on "cuda" or moved there is a SecondDeviceTensor
    DEVICE              what these tensors say
    WrongDevice         the error

What is checked: operations on tensors of both devices, indices and random numbers from the wrong one, NumPy's view of a GPU's memory,
and pinning it. It knows nothing of streams, CUDA graphs, autocast to half precision and several processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 0)
plainly = torch._C.DisableTorchFunctionSubclass  # in here, all tensors are the CPU's that they are

GET_DEVICE, GET_IS_CUDA = Tensor.device.__get__, Tensor.is_cuda.__get__
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
ANYWHERE = {  # the same on both devices, and no tensors: most of the calls
    torch._C._set_grad_enabled, Tensor.dim, Tensor.size, Tensor.stride, Tensor.numel, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_contiguous, Tensor.untyped_storage, Tensor.data_ptr, Tensor.has_names,
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "layout", "requires_grad", "is_leaf", "is_meta", "is_sparse", "is_nested", "is_quantized"))}
ACROSS = ("copy_", "_foreach_copy_", "__set__", "_has_compatible_shallow_copy_type")  # what takes tensors of both devices
JOINS = ("cat", "concat", "stack")  # where a CPU's scalar is not enough


class WrongDevice(RuntimeError):
    """What CUDA would say."""


class SecondDeviceTensor(Tensor):
    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(function, args, kwargs or {})

    def numpy(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    __array__ = numpy

    def pin_memory(self) -> None:
        raise WrongDevice("cannot pin a tensor of cuda:0, only dense CPU tensors can be pinned")

    def cpu(self) -> Tensor:
        return move(self, "cpu")

    def __format__(self, form: str) -> str:
        return format(self.item(), form)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # in a file, it is an ordinary tensor

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]


@contextmanager
def second_device() -> Iterator[None]:
    apply = torch.nn.Module._apply

    def swapping(*args: Any) -> torch.nn.Module:
        """Module.to, in which a parameter stays the same object, as optimizers need it, but of another class."""
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(*args)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    torch.nn.Module._apply = swapping
    try:
        with Mode():
            yield
    finally:
        torch.nn.Module._apply = apply


class Mode(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(function, args, kwargs or {})


def call(function: Callable, args: tuple, kwargs: dict) -> Any:
    """function(*args, **kwargs), on the device where CUDA would compute it."""
    if function in ANYWHERE:
        with plainly():
            return function(*args, **kwargs)
    inputs = leaves(args) + leaves(kwargs)
    there = any(is_there(x) for x in inputs)
    if function == GET_DEVICE:
        return DEVICE if there else torch.device("cpu")
    if function == GET_IS_CUDA:
        return there
    if function is Tensor.to:
        return to(*args, **kwargs)
    if function is Tensor.cuda:
        return move(args[0], "cuda")
    if function is Tensor.pin_memory:
        return args[0]  # pinning needs CUDA
    device = kwargs.pop("device", None)
    if function in INDEXING:
        there = is_there(args[0])
        check_indexing(*args)
    elif device is not None:
        there = torch.device(device).type == "cuda"
    elif there:
        check(function, args, inputs)
    if there and any(isinstance(x, torch.Generator) for x in inputs):  # of the CPU, as all are
        raise WrongDevice(f"{function.__name__}: expected a 'cuda' device type for generator but found 'cpu'")
    with plainly():
        return on(there, function(*args, **kwargs))


def leaves(values: Any) -> list[Any]:
    """The tensors and generators in nested lists, tuples and dicts."""
    if isinstance(values, (Tensor, torch.Generator)):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    found = []
    for value in values:
        if isinstance(value, (Tensor, torch.Generator)):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += leaves(value)
    return found


def is_there(value: Any) -> bool:
    return isinstance(value, SecondDeviceTensor)


def on(there: bool, values: Any) -> Any:
    """What was computed, as tensors of the second device or of the CPU."""
    if isinstance(values, Tensor):
        if is_there(values) == there:
            return values
        is_leaf = values.is_leaf and values.requires_grad
        moved = (values.detach() if is_leaf else values).as_subclass(SecondDeviceTensor if there else Tensor)
        return moved.requires_grad_() if is_leaf else moved
    if isinstance(values, (list, tuple)) and leaves(values):
        return tree_map(lambda value: on(there, value) if isinstance(value, Tensor) else value, values)
    return values


def move(tensor: Tensor, device: Any) -> Tensor:
    """A copy on the other device, or the tensor itself."""
    there = torch.device(device).type == "cuda"
    if there == is_there(tensor):
        return tensor
    with plainly():
        return on(there, tensor.clone())


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, with a device, a type or another tensor."""
    device, rest = kwargs.pop("device", None), []
    for value in args:
        if isinstance(value, (str, torch.device)):
            device = value
        elif isinstance(value, Tensor):
            device, kwargs["dtype"] = (DEVICE if is_there(value) else "cpu"), value.dtype
        else:
            rest.append(value)
    if len(rest) > 1 or (rest and isinstance(rest[0], bool)):  # non_blocking
        rest = [value for value in rest if isinstance(value, torch.dtype)]
    tensor = tensor if device is None else move(tensor, device)
    if not rest and not kwargs:
        return tensor
    there = is_there(tensor)
    with plainly():
        return on(there, tensor.to(*rest, **kwargs))


def check(function: Callable, args: tuple, inputs: list[Any]) -> None:
    """WrongDevice if CUDA cannot compute this."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ours = [x for x in tensors if not is_there(x)]
    name = getattr(function, "__name__", str(function))
    if not ours or name in ACROSS or function in INDEXING:
        return
    into = args[0] if name.endswith("_") and not name.endswith("__") or name.startswith("__i") else None
    if name in JOINS or any(x.dim() for x in ours) or any(into is x for x in ours):
        shapes = [f"{'cuda:0' if is_there(x) else 'cpu'} {tuple(x.shape)}" for x in tensors]
        raise WrongDevice(f"{name}: expected all tensors to be on the same device, but they are {', '.join(shapes)}")


def check_indexing(tensor: Tensor, index: Any, value: Any = None) -> None:
    """Indices may lie on the CPU; a CPU's tensor takes no others. Values come from the same device, but a slice is a copy."""
    indices = [x for x in leaves(index) if x.dim()]
    if not is_there(tensor) and any(is_there(x) for x in indices):
        raise WrongDevice("indices should be on the device of the indexed tensor (cpu)")
    if indices and isinstance(value, Tensor) and value.dim() and is_there(value) != is_there(tensor):
        raise WrongDevice("values should be on the device of the tensor")
