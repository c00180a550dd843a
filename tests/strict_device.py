"""A script on a device other than the CPU, on a machine that has none: `python tests/strict_device.py pd_ddil.py FLAGS`.

The device "strict" keeps its tensors in the CPU's memory, and refuses what a GPU refuses: operands or a generator from another
device, NumPy, and collectives of tensors that are on the CPU. It is built on PyTorch's interface for backends in Python.
"""

import importlib
import json
import os
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Backend(_DummyBackendModule):
    """torch.strict, as far as libraries ask for it."""

    device = nullcontext

    def synchronize(self, device=None): ...

    def empty_cache(self): ...

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None): ...


_setup_privateuseone_for_python_backend("strict", backend_module=Backend())
STRICT, CPU, aten = torch.device("strict:0"), torch.device("cpu"), torch.ops.aten
CPUGenerator = torch.Generator
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def is_strict(device) -> bool:
    return device is not None and torch.device(device).type == "strict"


class Generator(CPUGenerator):
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.place = STRICT if is_strict(device) else CPU
        return generator

    @property
    def device(self):
        return self.place


class StrictTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=STRICT
        )
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor on strict:0 has no NumPy array; copy it to the CPU first")

    __array__ = numpy

    def tolist(self):
        return self.cpu().tolist()

    def storage(self):
        return self.raw.storage()

    def untyped_storage(self):
        return self.raw.untyped_storage()

    def data_ptr(self):
        return self.raw.data_ptr()

    def __reduce_ex__(self, protocol):  # in files that are loaded to the CPU
        return self.raw.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]


def bare(value):
    """As it lies in the CPU's memory."""
    if isinstance(value, StrictTensor):
        return value.raw
    return CPU if isinstance(value, torch.device) and is_strict(value) else value


waits = Counter()  # of the host for the device


def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.is_in_pinned_memory = True
    return copy


def makes_host_wait(function, args, kwargs) -> bool:
    """item(), tolist(), bool(); what has as many rows as a mask on the device has ones; a copy to the CPU, and one from
    it unless it is out of pinned memory and need not be waited for."""
    if function in (aten._to_copy.default, aten.copy_.default):
        source = args[1] if function is aten.copy_.default else args[0]
        arrives = is_strict(kwargs["device"]) if kwargs.get("device") else is_on_strict(args[0])
        is_free = getattr(source, "is_in_pinned_memory", False) and kwargs.get("non_blocking", False)
        return arrives != is_on_strict(source) and not is_free
    is_mask = function in INDEXING and any(a.dtype == torch.bool for a in tree_leaves(args[1]) if is_on_strict(a))
    return function in (aten._local_scalar_dense.default, aten.nonzero.default) or is_mask


def is_on_strict(value) -> bool:
    return isinstance(value, StrictTensor)


def count_waits(updates):
    """Run.updates, with the number of waits within each update in the file STRICT_WAITS."""
    counts = []

    def counted(*args, **kwargs):
        for update in updates(*args, **kwargs):
            waits.clear()
            yield update
            counts.append(waits.total())
            Path(os.environ["STRICT_WAITS"]).write_text(json.dumps(counts))

    return counted


def run(function, args, kwargs):
    """An operation on the device, after a check of where its operands are."""
    waits.update([1] * makes_host_wait(function, args, kwargs))
    if function is aten.copy_.default:
        bare(args[0]).copy_(bare(args[1]))
        return args[0]
    if function is aten._fused_sdp_choice.default:
        return 0  # attention by plain operations
    operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    here = {id(a.raw): a for a in operands if isinstance(a, StrictTensor)}
    may_be_indices = function in INDEXING and is_on_strict(args[0])  # these may be on the CPU
    indices = tree_leaves(args[1]) if may_be_indices else []
    elsewhere = [a for a in operands if a.dim() and not is_on_strict(a) and not any(a is i for i in indices)]
    if here and elsewhere and function is not aten._to_copy.default:
        where = [(str(a.device), tuple(a.shape)) for a in operands]
        raise RuntimeError(f"{function} of tensors on strict:0 and on the CPU: {where}")
    stays = is_strict(kwargs["device"]) if kwargs.get("device") else bool(here)

    def dressed(value):
        if not isinstance(value, torch.Tensor) or not stays:
            return value
        return here[id(value)] if id(value) in here else StrictTensor(value)  # in place: the operand itself

    return tree_map(dressed, function(*tree_map(bare, args), **tree_map(bare, kwargs)))


class Factories(TorchDispatchMode):
    """Tensors that are made on the device, from none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        strict = any(isinstance(a, StrictTensor) or isinstance(a, torch.device) and is_strict(a) for a in leaves)
        return run(function, args, kwargs) if strict else function(*args, **kwargs)


class Generators(TorchFunctionMode):
    """A generator is of its tensor's device. Below here, its own class is lost."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_strict(kwargs.get("device")):
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None:
            on_strict = (
                any(is_on_strict(a) for a in tree_leaves((args, kwargs))) if device is None else is_strict(device)
            )
            if is_strict(generator.device) != on_strict:
                raise RuntimeError(f"{function}: the generator is on {generator.device}, the tensor is not")
        return function(*args, **kwargs)


def on_device(value):
    if not isinstance(value, StrictTensor):
        raise RuntimeError(f"collective of a tensor on {value.device}, which is for a GPU's")  # noqa: TRY004
    return value


class Accelerator(accelerate.Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings)
        for state in PartialState, AcceleratorState:
            state._shared_state["device"] = STRICT

    def gather(self, value):
        return super().gather(on_device(value))

    def reduce(self, value, *args, **kwargs):
        return super().reduce(on_device(value), *args, **kwargs)


def check_refusals() -> None:
    """This device is strict: SystemExit if it lets pass what a GPU does not."""
    here, there = torch.ones(2, 2, device=STRICT), torch.ones(2, 2)
    mistakes = {
        "operands": lambda: here + there, "weights": lambda: torch.nn.Linear(2, 2)(here), "indices": lambda: there[here[0] > 0],
        "generator": lambda: torch.randn(2, device=STRICT, generator=torch.Generator()), "NumPy": here.numpy,
        "CPU's collective": lambda: on_device(there),
    }  # fmt: skip
    for name, mistake in mistakes.items():
        with suppress(RuntimeError, TypeError):
            mistake()
            raise SystemExit(f"{name} pass")


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1].removesuffix(".py"))
    accelerate.Accelerator, torch.Generator, torch.Tensor.pin_memory = Accelerator, Generator, pin_memory
    with Factories(), Generators():
        check_refusals()
        if "STRICT_WAITS" in os.environ:
            script.Run.updates = count_waits(script.Run.updates)
        script.main(sys.argv[2:])
