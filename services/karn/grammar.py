"""The typed grammar: valid designs for a slot, grown at random from rules over the op registry.

    design  → way | way + way (+ way)
    way     → stage* close
    stage   → widen act | norm | scale | residual | gate | local | attend
    close   → affine map to the width that leaves, silent at first, and to the size that leaves

A way ends in an op that can be silenced, a sum of such ways is silent, and a gate reads from before what it gates: so every design
starts as nothing and still learns. Over TOKENS nothing looks ahead. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR
from esper_core.errors import InvalidInput, Unsupported
from services.karn.dice import Dice
from services.karn.draft import Draft

WIDTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48)
"""Defaults of symbols; the catalogue offers 4, 8, 16 and 32."""
BENDS = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")
TRIES = 60


def sprout(interface: SlotInterface, dice: Dice) -> BlueprintIR:
    """A random design, valid and affordable at ``interface``.

    Raises:
        Unsupported: none was found, as where not even one linear map is affordable.
    """
    for _ in range(TRIES):
        draft = Draft(interface)
        try:
            ways = [way(draft, INPUT, dice) for _ in range(dice.pick((1, 2, 3), (6, 3, 1)))]
            draft.output = ways[0] if len(ways) == 1 else draft.add("add", *ways)
            return draft.finished()
        except InvalidInput:
            continue  # too dear, mostly
    raise Unsupported(f"no design found for {interface.id[:22]}…", hint="its slot is larger than Karn designs for")


def way(draft: Draft, start: str, dice: Dice) -> str:
    """A path from ``start`` to what leaves."""
    name = start
    for _ in range(dice.pick((0, 1, 2, 3), (1, 6, 3, 1))):
        name = stage(draft, name, dice)
    return close(draft, name, dice)


def stage(draft: Draft, name: str, dice: Dice) -> str:
    """A step on the way, by any rule that suits the layout."""
    rules = _RULES[draft.interface.layout]
    return dice.pick(list(rules), list(rules.values()))(draft, name, dice)


def close(draft: Draft, name: str, dice: Dice) -> str:
    """From ``name`` to the shape that leaves, by something that can be silenced."""
    interface = draft.interface
    if interface.layout is not Layout.IMAGE:
        return affine(draft, name, "out_width", "sink", dice)
    size, wanted = draft.shapes[name][1:], interface.out_size
    same_side = interface.sink is not None and interface.sink.leaving((size[0], size[1])) == wanted
    if same_side and dice.chance(0.6):
        return draft.add("sink_conv", name, out="out_width", bias="sink")
    if interface.sink is not None and interface.sink.stride != (1, 1) and size != wanted and dice.chance(0.7):
        end = draft.add("conv", name, out="out_width", stride="sink", bias="sink")
    else:
        end = affine(draft, name, "out_width", "sink", dice)
    return end if draft.shapes[end] == interface.out_shape else draft.add("match_output_size", end)


def affine(draft: Draft, name: str, out: str, side: str, dice: Dice) -> str:
    """A linear map of the features, or a convolution that keeps the size."""
    bias = dice.pick((side, "no"), (4, 1))
    if draft.interface.layout is not Layout.IMAGE:
        return draft.add("linear", name, out=out, bias=bias)
    kernel = dice.pick((1, 3, 5), (5, 4, 1))
    return draft.add("conv", name, out=out, bias=bias, **window(kernel, dice.pick((1, 2), (4, 1))))


def window(kernel: int, dilation: int = 1) -> dict[str, str]:
    """Attributes of a convolution that keeps the size; ``kernel`` odd."""
    if kernel == 1:
        return {"kernel": "1"}
    return {"kernel": str(kernel), "padding": str(dilation * (kernel // 2)), "dilation": str(dilation)}


def width(draft: Draft, dice: Dice) -> str:
    """An expression for how many units a layer has."""
    known = list(draft.symbols)
    if not known or dice.chance(0.25):
        return draft.symbol(dice.pick(WIDTHS))
    return dice.pick(
        (dice.pick(known), f"2 * {dice.pick(known)}", "hidden_width", "max(2, hidden_width // 2)", "2 * hidden_width"),
        (8, 1, 2, 1, 1),
    )


def bend(draft: Draft, name: str, dice: Dice) -> str:
    """An activation, the host's own one more often than not."""
    if dice.chance(0.5):
        return draft.add("activation", name, kind="host", otherwise="relu")
    return draft.add("activation", name, kind=dice.pick(BENDS))


def norm(draft: Draft, name: str, dice: Dice) -> str:
    """A normalisation that the layout knows."""
    if draft.interface.layout is not Layout.IMAGE:
        return draft.add("layer_norm", name)
    channels = draft.shapes[name][0]
    return draft.add("group_norm", name, groups=str(dice.pick([n for n in (1, 2, 4) if channels % n == 0])))


def _widen(draft: Draft, name: str, dice: Dice) -> str:
    """As the host's own spanned layer, and so often foldable: affine → its norm → activation."""
    interface, out = draft.interface, width(draft, dice)
    if interface.layout is Layout.IMAGE and interface.source is not None and name == INPUT and dice.chance(0.5):
        wide = draft.add("source_conv", name, out=out, bias="source")
    else:
        wide = affine(draft, name, out, "source", dice)
    if interface.norm is not None and dice.chance(0.7):
        wide = draft.add("host_norm", wide)
    elif dice.chance(0.15):
        wide = norm(draft, wide, dice)
    return bend(draft, wide, dice)


def _normed(draft: Draft, name: str, dice: Dice) -> str:
    return norm(draft, name, dice)


def _scaled(draft: Draft, name: str, dice: Dice) -> str:
    return draft.add("scale", bend(draft, name, dice))


def residual(draft: Draft, name: str, dice: Dice) -> str:
    """``name`` plus a short path from it back to its own width."""
    inner = bend(draft, affine(draft, name, width(draft, dice), "no", dice), dice)
    back = affine(draft, inner, draft.width_of(name), "no", dice)
    return draft.add("add", name, back)


def gate(draft: Draft, name: str, dice: Dice) -> str:
    """``name`` times what is read from it: by position, or over an image by what the whole shows."""
    if draft.interface.layout is Layout.IMAGE and dice.chance(0.6):
        squeezed = draft.add("global_average_pool", name)
        reduced = draft.add("activation", draft.add("linear", squeezed, out=width(draft, dice)), kind="relu")
        opened = draft.add("linear", reduced, out=draft.width_of(name))
    else:
        opened = affine(draft, name, draft.width_of(name), "no", dice)
    return draft.add("multiply", name, draft.add("activation", opened, kind=dice.pick(("sigmoid", "tanh", "identity"))))


def _local(draft: Draft, name: str, dice: Dice) -> str:
    """Each channel's own filter."""
    return draft.add("depthwise_conv", name, **window(dice.pick((3, 5), (4, 1)), dice.pick((1, 2), (4, 1))))


def _attend(draft: Draft, name: str, dice: Dice) -> str:
    """Every token hears those before it; to its own width, so that a sum with ``name`` stays possible."""
    heads = dice.pick((1, 2, 4))
    inner = heads * dice.pick((4, 8))
    heard = draft.add("attention", name, width=str(inner), heads=str(heads), causal="yes", out=draft.width_of(name))
    return draft.add("add", name, heard) if dice.chance(0.6) else heard


Rule = Callable[[Draft, str, Dice], str]
_ROWS: Mapping[Rule, float] = {_widen: 7, _normed: 1, _scaled: 0.5, residual: 1.5, gate: 2}
_RULES: Mapping[Layout, Mapping[Rule, float]] = {
    Layout.FEATURES: _ROWS,
    Layout.TOKENS: {**_ROWS, _attend: 3},
    Layout.IMAGE: {**_ROWS, _local: 2},
}
