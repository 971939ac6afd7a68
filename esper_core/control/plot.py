"""The ground seeds grow in: the host, its optimiser, the data that judge, and the operations that touch them.

Everything a stage of the lifecycle does to tensors is here; when it is done is ``stages``' and ``grower``'s business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from esper_core.blueprint.build import KernelModule, build
from esper_core.control.roles import LoadedKernel
from esper_core.control.settings import GrowthSettings
from esper_core.errors import InvalidInput
from esper_core.nn.graft import Graft
from esper_core.nn.host import Host, Slot
from esper_core.nn.probe import Batch, LossFunction, run
from esper_core.nn.widen import adopt, fold, forget, morphology, reshape


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
        self.host, self.optimizer, self.loss_fn = host, optimizer, loss_fn
        self.probe, self.validation = probe, validation
        self.settings, self.seed = settings, seed

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

    def blend(self, slot: Slot) -> None:
        """Let the host run through the kernel at its alpha and train it with the host's optimiser."""
        assert slot.graft is not None  # noqa: S101
        slot.graft.attach()
        adopt(self.optimizer, slot.leader, list(slot.graft.kernel.parameters()))
        self.hold_still(slot)

    def hold_still(self, slot: Slot) -> None:
        """Freeze what the settings say holds still under a fresh graft."""
        for parameter in self._still(slot):
            parameter.requires_grad_(False)
            parameter.grad = None

    def let_go(self, slot: Slot) -> None:
        """Undo ``hold_still``."""
        for parameter in self._still(slot):
            parameter.requires_grad_(True)

    def uproot(self, slot: Slot) -> None:
        """Take the kernel out of host and optimiser."""
        if slot.graft is not None:
            forget(self.optimizer, list(slot.graft.kernel.parameters()))
            self.let_go(slot)
            slot.release()

    def snapshot(self) -> dict[str, Any]:
        """Host weights and the optimiser's memory as they are, copied."""
        return {
            "shapes": morphology(self.host),
            "host": copy.deepcopy(dict(self.host.state_dict())),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Back to a snapshot taken with the same parameters in the optimiser; the schedule's present figures stay."""
        present = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        reshape(self.host, self.optimizer, snapshot["shapes"])
        self.host.load_state_dict(snapshot["host"])
        # load_state_dict keeps tensors of the right dtype as they are; without a copy the snapshot would train along.
        self.optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        for group, figures in zip(self.optimizer.param_groups, present, strict=True):
            group.update(figures)

    def fold(self, slot: Slot) -> float | None:
        """Make the slot's kernel part of the host.

        Returns:
            The largest absolute change of the held-back outputs, both networks evaluated in float64, so that it measures the fold
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
            return [run(twin, doubled(inputs)) for inputs, _ in self.validation]

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

    def _still(self, slot: Slot) -> list[nn.Parameter]:
        choice = self.settings.frozen
        if choice == "none":
            return []
        return slot.span_parameters() if choice == "span" else list(self.host.model.parameters())


def doubled(inputs: Any) -> Any:
    """Floating tensors as float64, anything else as it is."""
    if isinstance(inputs, tuple):
        return tuple(doubled(value) for value in inputs)
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
