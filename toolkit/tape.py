"""The operations that torch runs, written down one by one as a graph that can be run again.

Why not torch's own `make_fx`: it makes a second, fake tensor of every result, which here nobody reads, and takes five times as
long: ten seconds for a test task of ten steps.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


class NoPeeking(TorchFunctionMode):
    """Refuses what takes the values of tensors without an operation, such as `numpy`, which a tape would not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        numbers = pytree.tree_leaves(args[1:] if func is Tensor.new_tensor else args) if func in MAKERS else ()
        split = func in (torch.tensor_split, Tensor.tensor_split) and isinstance(args[1:] and args[1], Tensor)
        if func in VALUES or split or any(isinstance(number, Tensor) for number in numbers):
            raise RuntimeError(f"{getattr(func, '__name__', func)} looks at the values of tensors")
        return func(*args, **(kwargs or {}))


VALUES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data.__set__}  # type: ignore[attr-defined]
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class Tape(TorchDispatchMode):
    """Writes down every operation that torch runs while it is on, as a graph over these leaves."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.graph, self.outside = fx.Graph(), nn.Module()
        self.kept: set[int] = set()  # memory of tensors from outside, by its address
        self.nodes = WeakTensorKeyDictionary()
        for i, leaf in enumerate(leaves):
            self.nodes[leaf] = self.graph.placeholder(f"given{i}")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, in seconds, only to leave this class alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if _looks(func, args, kwargs):
            raise RuntimeError(f"{func} looks at the values of tensors")
        given, named = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        if func is aten.lift_fresh.default:  # numbers become a tensor, which what follows may change in its place
            func = aten.lift_fresh_copy.default
        elif func._schema.is_mutable and self.kept & {_memory(tensor) for tensor in _written(func, args, kwargs)}:
            raise RuntimeError(f"{func} changes a tensor that is not its own")
        out = func(*args, **kwargs)
        call = self.graph.call_function(func, given, named)
        for place, tensor in enumerate(out) if isinstance(out, list | tuple) else [(None, out)]:
            if isinstance(tensor, Tensor):
                self.nodes[tensor] = call if place is None else self.graph.call_function(operator.getitem, (call, place))
        return out

    def node(self, tensor: Tensor) -> fx.Node:
        """Where a tensor comes from; one that was there before is kept as it is."""
        if tensor not in self.nodes:
            name = f"outside{len(self.graph.nodes)}"
            self.outside.register_buffer(name, tensor)
            self.kept.add(_memory(tensor))
            self.nodes[tensor] = self.graph.get_attr(name)
        return self.nodes[tensor]  # type: ignore[no-any-return]

    def ended(self, results: list[Tensor]) -> fx.GraphModule:
        """What leads to the results, as a function of the leaves."""
        self.graph.output([self.node(result) for result in results])
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.outside, self.graph)


def _looks(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation's result, or its shape, depends on values that a replay would not look at again."""
    if func is aten.index.Tensor:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    sized = func.name().startswith("aten::repeat_interleave") and kwargs.get("output_size") is not None
    if sized or func is aten.linalg_lstsq.default:  # whose parts that hang on values are its residuals and ranks
        return False
    untold = func is aten._nested_tensor_from_mask_left_aligned.default  # has no tag
    return untold or torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of a sparse one
        return id(tensor)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into."""
    places = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    found = pytree.tree_leaves([args[i] if i < len(args) else kwargs.get(name) for i, name in places])
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def reads_host(graph: fx.GraphModule) -> bool:
    """Whether a recording reads tensors from outside in the memory of the CPU, which a CUDA graph would read only once. Numbers
    that become tensors never change."""
    return any(
        not getattr(graph, node.target).is_cuda and any(user.target is not aten.lift_fresh_copy.default for user in node.users)
        for node in graph.graph.nodes
        if node.op == "get_attr"
    )
