"""
A pretended GPU: tensors that say cuda:0 and whose numbers lie on the CPU.

As on a GPU, an operation on tensors of two devices raises, autocast and GradScaler are CUDA's, and the host waits for
the device wherever it asks for a number; the waits are noted. Since the numbers are there (torch's own FakeTensorMode
has none), a whole run works as it is: loss, checkpoints, pictures. What it cannot know is a GPU's memory, its speed,
the rounding and the limits of its kernels.
"""

import contextlib
import linecache
import sys
from unittest import mock

import torch
import torch._dynamo  # it lists torch's functions when it is imported, and must find none replaced
from torch.utils._python_dispatch import TorchDispatchMode


CPU = torch.device("cpu")
# Operations whose result has a shape that hangs on the numbers, or that hand a number to the host.
WAITING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"}
torch_attention = torch.nn.functional.scaled_dot_product_attention


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0, made from its `numbers`, a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), device="cuda:0", **layout)
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation} on the pretended GPU outside of `with Gpu(...)`")

    def __repr__(self, **_):
        return f"CudaTensor({self.numbers})"

    @property
    def data(self):
        return CudaTensor(self.numbers.detach())

    @data.setter
    def data(self, value):  # how policy and reference change places
        if not isinstance(value, CudaTensor):
            raise RuntimeError("a tensor on cuda:0 was given data on the CPU")
        torch.Tensor.data.__set__(self, value)
        self.numbers = value.numbers

    def tolist(self):  # torch has none for subclasses
        return self.cpu().tolist()

    def untyped_storage(self):  # by which tensors that share memory are found when they are saved
        return self.numbers.untyped_storage()

    def __reduce_ex__(self, protocol):  # in a checkpoint; accelerate reads it to the CPU first
        return self.numbers.detach().__reduce_ex__(protocol)


def hold_to(share):
    """Holds nobody to anything, and refuses what PyTorch refuses."""
    if not isinstance(share, float) or not 0 <= share <= 1:
        raise TypeError(f"a share of the memory is a float from 0 to 1, not {share!r}")


class Gpu(TorchDispatchMode):
    """
    While it is entered, torch has one GPU.

    waits: what made the host wait for the device, each with the line of `file` that it came from.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # torch would wrap each of our calls, which costs more than the call

    def __init__(self, file):
        super().__init__()
        self.file, self.waits, self.leaving = file, [], contextlib.ExitStack()

    def __enter__(self):
        answers = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_bf16_supported": lambda *args, **kwargs: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda *args: (9, 0),
            "get_device_name": lambda *args: "a pretended GPU",
            "mem_get_info": lambda *args: (79 * 10**9, 80 * 10**9),
            "memory_reserved": lambda *args: 0,
            "max_memory_allocated": lambda *args: 0,
            "max_memory_reserved": lambda *args: 0,
            "set_per_process_memory_fraction": hold_to,
            "reset_peak_memory_stats": lambda *args: None,
            "empty_cache": lambda: None,
            "set_sync_debug_mode": lambda mode: None,
            "get_rng_state_all": lambda: [],
            "set_rng_state_all": lambda states: None,
            "synchronize": lambda *args: self.wait("torch.cuda.synchronize"),
        }
        for name, answer in answers.items():
            self.leaving.enter_context(mock.patch.object(torch.cuda, name, answer))
        self.leaving.enter_context(
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention)
        )
        # Module.to keeps its parameters, whatever lies in them; backward stays in this thread, and so in this mode;
        # and torch.tensor(..., device="cuda") shows its copy.
        self.leaving.enter_context(torch.autograd.set_multithreading_enabled(False))
        for switch in (torch.__future__.set_swap_module_params_on_conversion, torch._C._set_only_lift_cpu_tensors):
            switch(True)
            self.leaving.callback(switch, False)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.leaving.close()

    def wait(self, what):
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        if frame is not None:
            number, text = frame.f_lineno, linecache.getline(self.file, frame.f_lineno).strip()
            what += f", line {number} in {frame.f_code.co_name}: {text}"
        self.waits.append(what)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, CudaTensor)]
        to_gpu = bool(on_gpu) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
        if not on_gpu and not to_gpu:
            return operation(*args, **kwargs)

        name = operation.overloadpacket.__name__
        if name in WAITING:
            self.wait(name)
        elif name == "copy_" or name == "_to_copy":
            if len(on_gpu) < len(tensors) or not to_gpu:
                self.wait("copy to the host" if isinstance(args[name == "copy_"], CudaTensor) else "copy to the GPU")
        elif on_gpu:
            self.check_devices(name, operation, args, tensors)
        if to_gpu and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

        numbers, options = unwrap(args), {name: unwrap(value) for name, value in kwargs.items()}
        if kwargs.get("device") is not None and to_gpu:
            options["device"] = CPU
        result = operation(*numbers, **options)
        returned = operation._schema.returns
        if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:
            return kwargs.get("out", args[0])
        return wrap(result) if to_gpu else result

    def check_devices(self, name, operation, args, tensors):
        """Raises as a GPU does for tensors of two devices, and notes the wait for indices that lie on the host."""
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
        if name.strip("_") in ("index", "index_put", "index_put_impl") and isinstance(args[0], CudaTensor):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or not isinstance(index, CudaTensor) for index in indices):
                self.wait(name)
            on_cpu = [tensor for tensor in on_cpu if not any(tensor is index for index in indices)]
        if name not in ("cat", "stack"):  # others take a CPU tensor of no dimensions as a number, if only to read it
            written = args[0] if operation._schema.is_mutable else None
            on_cpu = [tensor for tensor in on_cpu if tensor.ndim > 0 or tensor is written]
        if on_cpu:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cuda:0 and cpu (aten.{name})"
            )


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def unwrap(value):
    if isinstance(value, (list, tuple)):
        return type(value)(unwrap(one) for one in value)
    return value.numbers if isinstance(value, CudaTensor) else value


def wrap(value):
    if isinstance(value, (list, tuple)):
        return type(value)(wrap(one) for one in value)
    return CudaTensor(value) if isinstance(value, torch.Tensor) else value


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """A CPU build of torch cannot choose a kernel of attention for CUDA: the CPU's takes its place."""
    if not isinstance(query, CudaTensor):
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # as PyTorch does before it chooses a kernel
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    options = dict(attn_mask=attn_mask, scale=scale)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value, dropout_p, is_causal, **options)[0]
