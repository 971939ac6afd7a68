"""A sign on a module that what happens in its call has changed, for compiled code to see.

Compiled code keeps no watch over hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``, on by default): a host that was compiled
before a hook came would go on without it, silently. What it does watch is whether a module has a ``forward`` of its own and which one
(``guard_to_detect_forward_monkeypatching`` in ``torch/_dynamo/variables/nn_module.py``). So a mark is just that: a ``forward`` that calls
the module's. Where none is, nothing is there to be compiled, and code compiled before the mark came fits again once it is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn

FORWARD = "forward"


def mark(module: nn.Module) -> None:
    """Whatever was compiled with ``module`` in it, under another mark or none, does not fit any more."""
    unmark(module)
    # Wrapped, so that whoever asks for the signature of `forward` still gets it.
    module.__dict__[FORWARD] = update_wrapper(partial(_forward, module.forward), module.forward)


def unmark(module: nn.Module) -> None:
    """The module is as before ``mark``; without a mark nothing happens."""
    found = module.__dict__.get(FORWARD)
    if not isinstance(found, partial) or found.func is not _forward:
        return
    (own,) = found.args
    del module.__dict__[FORWARD]
    if getattr(own, "__func__", None) is not type(module).forward:
        module.__dict__[FORWARD] = own  # somebody else's, there before


def _forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return own(*args, **kwargs)
