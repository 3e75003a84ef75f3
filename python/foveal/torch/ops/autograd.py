"""How an op of attention gets a gradient: an autograd.Function, and the autograd kernels that apply it.

A kernel stands below the transforms of torch.func and below Dynamo, so both see one op whatever its tensors are: the
same one twice, wrapped, or symbolic. The public functions skip the dispatcher where neither looks on: they apply the
Function themselves, or call the op past its kernel where nothing requires a gradient.

There is no second derivative: the gradients can be computed with ``create_graph=True``, but using their graph raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from foveal.torch.ops.records import ASKED, OPTION_GRADIENTS, SAVED

_functorch = torch._C._functorch


def below_autograd(op: Any, inputs: Any) -> Any:
    """Call an op where autograd has been taken care of."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def apply(function: type[torch.autograd.Function], inputs: Any) -> Any:
    """Apply a Function inside an autograd kernel, or where there is no transform.

    torch.func's level has been chosen before a kernel is reached, so this is autograd of that level alone;
    ``Function.apply`` would look for the level again. It also binds the arguments to the signature of ``forward``,
    which takes half of its time.
    """
    directly: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if not torch._C._are_functorch_transforms_active():
        return directly(*inputs)
    with enable_single_level_autograd_function():
        return directly(*inputs)


def is_differentiated(*values: Any) -> bool:
    """Whether autograd follows a tensor among the values, under whatever torch.func has wrapped it in."""
    grad, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for x in values:
        if not isinstance(x, Tensor):
            continue
        while _functorch.is_functorch_wrapped_tensor(x):
            if _functorch.is_gradtrackingtensor(x):
                return True
            x = _functorch.get_unwrapped(x)
        if (grad and x.requires_grad) or (forward and forward_ad.unpack_dual(x).tangent is not None):
            return True
    return False


class Differentiable:
    """An op with its gradient.

    Parameters
    ----------
    function : str
        The public function, for errors.
    forward, backward : op
        ``forward(*arrays, *options)`` gives (out, lse, ...), the rest without a gradient, or with statistics (out, lse,
        weights, entropy, mass, ...), where the entropy has one; ``backward(dout, dlse, out, lse, *arrays, *options,
        *asked, dentropy, entropy, mass)`` gives the gradients of q, k, v and of the options (OPTION_GRADIENTS).
    num_arrays : int
        How many arrays come first; all but q, k and v have no gradient.
    options, backward_options : record
        The arguments after them, of either op. Those of ``forward`` may end with what ``backward`` does not have.
    """

    def __init__(
        self, function: str, forward: Any, backward: Any, num_arrays: int, options: Any, backward_options: Any
    ) -> None:
        self._function, self._forward, self._backward, self._options = function, forward, backward, options
        places = {
            name: num_arrays + options._fields.index(name) for name in OPTION_GRADIENTS if name in options._fields
        }
        end = num_arrays + len(backward_options._fields) - len(ASKED) - len(SAVED)
        has_stats = len(forward._schema.returns) > 3
        num_tensors = num_arrays + options.num_tensors
        num_inputs = num_arrays + len(options._fields)
        normalizer = num_arrays + options._fields.index("normalizer")

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(*inputs: Any) -> Any:
                return below_autograd(forward, inputs)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                out, lse, *others = output
                ctx.has_lse = inputs[normalizer] == 0  # of softmax; what others save of a row is no result
                entropy = others[1:3] if has_stats else (None, None)  # and mass
                without = [x for x in others if not has_stats or x is not others[1]]
                ctx.mark_non_differentiable(*without if ctx.has_lse else (lse, *without))
                ctx.save_for_backward(out, lse, *entropy, *inputs[:num_tensors])
                ctx.numbers = inputs[num_tensors:end]

            @staticmethod
            def backward(ctx: Any, dout: Tensor, dlse: Tensor, *others: Tensor) -> Any:
                out, lse, entropy, mass, *tensors = ctx.saved_tensors
                dentropy = others[1] if has_stats else None
                wanted = {name: name in places and ctx.needs_input_grad[places[name]] for name in OPTION_GRADIENTS}
                asked = [any(wanted[name] for name, by in OPTION_GRADIENTS.items() if by == x) for x in ASKED]
                dlse_or_none = dlse if ctx.has_lse else None
                dq, dk, dv, *found = backward(
                    dout, dlse_or_none, out, lse, *tensors, *ctx.numbers, *asked, dentropy, entropy, mass
                )
                gradients: list[Tensor | None] = [dq, dk, dv] + [None] * (num_inputs - 3)
                for name, gradient in zip(OPTION_GRADIENTS, found, strict=True):
                    if wanted[name]:
                        gradients[places[name]] = gradient.to(tensors[places[name]].dtype)
                return tuple(gradients)

        class NoSecondDerivative(torch.autograd.Function):
            @staticmethod
            def forward(*inputs: Any) -> Any:
                return below_autograd(backward, inputs)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise NotImplementedError(f"{function}: there is no second derivative, expected a single backward pass")

        self._num_arrays, self._apply, self._apply_backward = num_arrays, Function, NoSecondDerivative

    def __call__(self, *inputs: Any) -> Any:
        """Call the op on inputs that require a gradient."""
        arrays, options = inputs[: self._num_arrays], self._options(*inputs[self._num_arrays :])
        if options.alibi_slopes is not None and options.alibi_slopes.requires_grad:
            raise NotImplementedError(
                f"{self._function}: alibi_slopes requires grad, expected no gradient: there is none for the slopes; "
                "detach them"
            )
        if getattr(options, "return_weights", False):
            raise NotImplementedError(
                f"{self._function}: return_weights is asked of inputs that require grad, expected no gradient: there "
                "is none through the weights; detach the inputs or call under torch.no_grad()"
            )
        device = arrays[0].device.type
        if torch.is_autocast_enabled(device):  # here, so that what is saved has the dtype of the output
            dtype = torch.get_autocast_dtype(device)
            qkv = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in arrays[:3])
            arrays = (*qkv, *arrays[3:])
        return apply(self._apply, (*arrays, *options))

    def register(self, library: torch.library.Library, *, backward_too: bool = True) -> None:
        """Give both ops their autograd kernels, or the forward op alone, whose backward op is another's too."""

        def forward(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
            if not is_differentiated(*values):
                return self._forward.redispatch(keyset & torch._C._after_autograd_keyset, *values)
            return self(*values)

        def backward(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
            if not is_differentiated(*values):
                return self._backward.redispatch(keyset & torch._C._after_autograd_keyset, *values)
            return apply(self._apply_backward, values)

        library.impl(self._forward, forward, "Autograd", with_keyset=True)
        if backward_too:
            library.impl(self._backward, backward, "Autograd", with_keyset=True)
