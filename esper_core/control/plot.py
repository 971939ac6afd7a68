"""The ground seeds grow in: the host, its optimiser, the data that judge, and the operations that touch them.

Everything a stage of the lifecycle does to tensors is here; when it is done is ``stages``' and ``grower``'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import structlog
import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.control.roles import LoadedKernel
from esper_core.control.seed import Seed
from esper_core.control.settings import GrowthSettings
from esper_core.errors import Corrupt, InvalidInput
from esper_core.nn.chance import random_state, set_random_state
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction, each_tensor, first, mean_loss, run
from esper_core.nn.shrink import shrink
from esper_core.nn.widen import adopt, fold, forget, morphology, reshape

log = structlog.get_logger(__name__)
FOLD_ROWS = 256
"""Held-back rows on which a fold is compared with what it replaces; the comparison is what a fold costs."""


class Plot:
    """A run's host with what growing it needs.

    Args:
        host: the wrapped network.
        optimizer: over the host's parameters.
        loss_fn: (outputs, targets) → mean loss over the batch.
        probe: batches of training data for signals and isolated training, 1024 samples or more.
        validation: held-back batches for the counterfactual.
        settings: constants.
        seed: of everything random here.

    Raises:
        InvalidInput: when there are no batches, or nothing that could grow or that the optimiser trains.
    """

    def __init__(
        self,
        host: Host,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        probe: Sequence[Batch],
        validation: Sequence[Batch],
        settings: GrowthSettings,
        seed: int,
    ) -> None:
        if not probe or not validation:
            raise InvalidInput(
                "growing needs probe and validation batches",
                hint="pass lists of (inputs, targets) that can be read again",
            )
        host.require_slots()
        self.host, self.optimizer, self.loss_fn = host, optimizer, loss_fn
        self.probe, self.validation = probe, validation
        self.settings, self.seed = settings, seed
        self.still: dict[str, frozenset[str]] = {}
        """Names of the host parameters that each graft, by slot, holds still; what the user froze is not among them."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for slot in host.slots.values():
            if id(slot.leader) not in trained:
                raise InvalidInput(
                    f"the optimiser does not train {slot.sink_path}, where slot {slot.name} would grow",
                    hint="build it over host.parameters(), or name other spans when wrapping",
                )

    def plant(self, slot: Slot, kernel: LoadedKernel) -> Graft:
        """Build a kernel and bind it to its slot; the host does not notice.

        Raises:
            InvalidInput: when it was made for another interface, or its weights do not fit its blueprint.
        """
        if (
            kernel.interface.in_shape != slot.interface.in_shape
            or kernel.interface.out_shape != slot.interface.out_shape
        ):
            raise InvalidInput(
                f"kernel {kernel.kernel_id[:19]} maps {kernel.interface.in_shape} to {kernel.interface.out_shape}, "
                f"slot {slot.name} needs {slot.interface.in_shape} to {slot.interface.out_shape}",
                hint="the host has grown since; ask for kernels again",
            )
        module = build(kernel.blueprint, kernel.interface, kernel.symbols)
        try:
            module.load_state_dict(dict(kernel.weights))
        except RuntimeError as problem:
            raise InvalidInput(f"weights of {kernel.kernel_id[:19]} do not fit its blueprint") from problem
        return slot.bind(module)

    def quicken(self, slot: Slot, kernel: LoadedKernel, seed: Seed) -> None:
        """Have the slot's kernel run natively where it came with compiled code; the seed knows whether it does, or why not."""
        seed.native, seed.eager = kernel.native is not None, kernel.eager
        if kernel.native is None:
            return
        try:
            kernel.native.attach(self.kernel(slot), seed.passes)
        except Corrupt as problem:  # the kernel itself is sound: it runs without
            log.warning("native.declined", kernel_id=kernel.kernel_id, reason=problem.message)
            seed.native, seed.eager = False, problem.message

    def blend(self, slot: Slot) -> None:
        """Let the host run through the kernel at its alpha and train it with the host's optimiser."""
        assert slot.graft is not None  # noqa: S101
        slot.graft.attach()
        adopt(self.optimizer, slot.leader, list(slot.graft.kernel.parameters()))
        self.hold_still(slot)

    def hold_still(self, slot: Slot) -> None:
        """Freeze what the settings say holds still under a fresh graft."""
        wanted = {id(parameter) for parameter in self._wanted_still(slot)}
        held = self._held_elsewhere(slot)
        named = {name: p for name, p in self.host.model.named_parameters() if id(p) in wanted}
        self.still[slot.name] = frozenset(name for name, p in named.items() if p.requires_grad or name in held)
        for name in self.still[slot.name]:
            named[name].requires_grad_(False)
            named[name].grad = None

    def let_go(self, slot: Slot) -> None:
        """Undo ``hold_still``, but for what another graft holds."""
        free = self.still.pop(slot.name, frozenset()) - self._held_elsewhere(slot)
        for name, parameter in self.host.model.named_parameters():
            if name in free:
                parameter.requires_grad_(True)

    def uproot(self, slot: Slot) -> None:
        """Take the kernel out of host and optimiser."""
        if slot.graft is not None:
            forget(self.optimizer, list(slot.graft.kernel.parameters()))
            self.let_go(slot)
            slot.release()

    def snapshot(self) -> dict[str, Any]:
        """A way back: the host's weights, what the optimiser remembers of them, and the random state, copied."""
        memory = {name: self.optimizer.state[p] for name, p in self._trained() if p in self.optimizer.state}
        kept = {"shapes": morphology(self.host), "host": dict(self.host.state_dict()), "memory": memory}
        return copy.deepcopy(kept | {"random": random_state()})

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Back to a snapshot. Kernels that are blended now keep theirs, and the schedule its present figures."""
        reshape(self.host.model, self.optimizer, snapshot["shapes"])
        self.host.load_state_dict(snapshot["host"])
        for name, parameter in self._trained():
            self.optimizer.state.pop(parameter, None)
            if name in snapshot["memory"]:
                self.optimizer.state[parameter] = snapshot["memory"][name]
        # Through its own state_dict the optimiser puts everything on the device it wants; what it keeps as it is must be a copy,
        # or the snapshot would train along.
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        set_random_state(snapshot["random"])

    def shrink(self) -> float:
        """Scale down what the optimiser trains as far as the held-back loss hardly rises; the factor, 1 when it was left alone."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        chosen = self.settings
        return shrink(
            trained,
            lambda: mean_loss(self.host, self.validation, self.loss_fn),
            chosen.smallest_shrink,
            chosen.shrink_rise,
        )

    def fold(self, slot: Slot) -> float | None:
        """Make the slot's kernel part of the host.

        Returns:
            The largest absolute change of held-back outputs, both networks evaluated in float64, so that it measures the fold
            and not the rounding of two differently ordered float32 sums; None when it cannot be folded.
        """
        before = self._outputs()
        if not fold(self.host, slot, self.optimizer):
            return None
        return max(float((a - b).abs().max()) for a, b in zip(before, self._outputs(), strict=True))

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        """Outputs on the held-back batches of a float64 copy in evaluation mode."""
        twin = copy.deepcopy(self.host).double()
        for slot in twin.slots.values():
            if slot.graft is not None:
                slot.graft.double()
        with twin.evaluating():
            return [run(twin, each_tensor(inputs, _doubled)) for inputs, _ in first(self.validation, FOLD_ROWS)]

    @property
    def parameters(self) -> int:
        """Parameters of the host and of every kernel that is blended into it."""
        kernels = [slot.graft.kernel for slot in self.host.slots.values() if slot.graft and slot.graft.attached]
        return self.host.parameter_count + sum(p.numel() for kernel in kernels for p in kernel.parameters())

    def finite(self) -> bool:
        """Whether every parameter of the host is."""
        checks = [torch.isfinite(parameter.detach()).all() for parameter in self.host.model.parameters()]
        return bool(torch.stack(checks).all()) if checks else True

    def kernel(self, slot: Slot) -> KernelModule:
        """The slot's kernel."""
        return cast(KernelModule, cast(Graft, slot.graft).kernel)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Named host parameters that the optimiser holds."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        return [(name, parameter) for name, parameter in self.host.model.named_parameters() if id(parameter) in held]

    def _wanted_still(self, slot: Slot) -> list[nn.Parameter]:
        choice = self.settings.frozen
        if choice == "none":
            return []
        return slot.span_parameters() if choice == "span" else list(self.host.model.parameters())

    def _held_elsewhere(self, slot: Slot) -> frozenset[str]:
        return frozenset().union(*(names for other, names in self.still.items() if other != slot.name))


def _doubled(value: Tensor) -> Tensor:
    """Floating tensors as float64, others as they are."""
    return value.double() if value.is_floating_point() else value
