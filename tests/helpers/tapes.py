"""A CUDA graph's way of working, on the CPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# What a graph cannot hold: a look at a value, shapes that depend on one, a generator; and new tensors from lists.
FORBIDDEN = (aten._local_scalar_dense, aten.nonzero, aten.exponential_, aten.uniform_)
LIFTED = (aten.lift_fresh, aten.lift_fresh_copy)


class TapeGraphs:
    """Instead of `CudaGraphs`; counts what it is asked for."""

    recorded = replayed = 0

    def __init__(self, device):
        pass

    def warm_up(self, work):
        work()

    def record(self, work):
        tape = Tape()
        with tape:
            work()
        tape.undo()
        TapeGraphs.recorded += 1
        return tape.replay


class Tape(TorchDispatchMode):
    """Operations with their tensors: recording changes nothing, and a replay runs no Python between them."""

    def __init__(self):
        super().__init__()
        self._calls, self._before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket not in FORBIDDEN, f"{func} in a step"
        assert func.overloadpacket not in LIFTED or args[0].ndim == 0, f"a tensor of the host's in a step: {args}"
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(written):
                    storage = tensor.untyped_storage()
                    self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        outputs = func(*args, **kwargs)
        # A parameter may be given another address later; the tape goes on with this one.
        args, kwargs = tree_map(
            lambda value: value.detach() if isinstance(value, torch.Tensor) else value, (args, kwargs)
        )
        self._calls.append((func, args, kwargs, [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]))
        return outputs

    def undo(self):
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self):
        TapeGraphs.replayed += 1
        for func, args, kwargs, outputs in self._calls:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for output, value in zip(outputs, again, strict=True):
                if output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    output.copy_(value)
