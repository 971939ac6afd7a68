"""Small changes of a design that keep its interface and its validity, each with a name that people read in `karn proposals`.

An operator changes a draft in one place drawn at random. Where it finds none, or what it made does not fit, another is tried: what
leaves :func:`mutate` is valid and differs from its parent. How often the first try already is, is a figure of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from esper_core.blueprint.interface import Layout, SlotInterface
from esper_core.blueprint.ir import INPUT, BlueprintIR, Node
from esper_core.errors import InvalidInput, Unsupported
from services.karn import grammar
from services.karn.dice import Dice
from services.karn.draft import Draft, form

TRIES = 40
AFFINE = ("linear", "conv", "source_conv", "sink_conv")
NORMS = ("layer_norm", "group_norm", "host_norm")


class NoPlace(Exception):
    """The design has no place for that operator."""


def mutate(parent: BlueprintIR, interface: SlotInterface, dice: Dice, generation: int = 0) -> tuple[BlueprintIR, str]:
    """A changed design and the operator's name.

    Raises:
        InvalidInput: ``parent`` does not fit ``interface``.
        Unsupported: no operator found anything to change.
    """
    Draft.of(parent, interface)
    for _ in range(TRIES):
        operator = choose(dice)
        child = attempt(operator, parent, interface, dice, generation)
        if child is not None:
            return child, operator
    raise Unsupported(f"nothing to change in {parent.name}", hint="propose another design")


def choose(dice: Dice) -> str:
    """An operator's name, the useful ones more often."""
    return dice.pick(list(OPERATORS), [weight for _, weight in OPERATORS.values()])


def attempt(
    operator: str, parent: BlueprintIR, interface: SlotInterface, dice: Dice, generation: int = 0
) -> BlueprintIR | None:
    """One try of one operator; None when it found no place or what came of it is not valid, or nothing new."""
    draft = Draft.of(parent, interface)
    try:
        OPERATORS[operator][0](draft, dice)
        child = draft.finished(generation, (parent.id,))
    except (NoPlace, InvalidInput):
        return None
    return child if form(child) != form(parent) else None


def _any(draft: Draft, dice: Dice, wanted: Callable[[Node], bool]) -> Node:
    found = [node for node in draft.nodes.values() if wanted(node)]
    if not found:
        raise NoPlace
    return dice.pick(found)


def _edge(draft: Draft, dice: Dice) -> tuple[str, Node]:
    """A value and one of the nodes that read it."""
    reader = dice.pick(list(draft.nodes.values()))
    return dice.pick(reader.inputs), reader


def _insert(draft: Draft, dice: Dice) -> None:
    """A step that keeps the shape, between a value and one of its readers."""
    name, reader = _edge(draft, dice)
    image = draft.interface.layout is Layout.IMAGE
    if len(draft.shapes[name]) != len(draft.interface.in_shape):
        new = draft.add("activation", name, kind=dice.pick(grammar.BENDS))
    else:
        steps: Sequence[grammar.Rule] = (grammar.bend, grammar.norm, _scale, _map, *((_depthwise,) if image else ()))
        new = dice.pick(steps, (4, 2, 1, 2, 2)[: len(steps)])(draft, name, dice)
    draft.change(reader.name, inputs=[new if source == name else source for source in reader.inputs])


def _scale(draft: Draft, name: str, _: Dice) -> str:
    return draft.add("scale", name)


def _map(draft: Draft, name: str, dice: Dice) -> str:
    return grammar.affine(draft, name, draft.width_of(name), "no", dice)


def _depthwise(draft: Draft, name: str, dice: Dice) -> str:
    return draft.add("depthwise_conv", name, **grammar.window(dice.pick((3, 5))))


def _remove(draft: Draft, dice: Dice) -> None:
    """A step that keeps the shape gives way to what enters it."""
    node = _any(draft, dice, lambda n: draft.shapes[n.name] == draft.shapes[n.inputs[0]] and n.inputs[0] != INPUT)
    draft.redirect(node.name, node.inputs[0])


def _prune(draft: Draft, dice: Dice) -> None:
    """A sum or product loses one of its parts."""
    node = _any(draft, dice, lambda n: n.op in ("add", "multiply"))
    lost = dice.below(len(node.inputs))
    left = [name for index, name in enumerate(node.inputs) if index != lost]
    if draft.shapes[left[0]] != draft.shapes[node.name] or left == [INPUT]:
        raise NoPlace
    if len(left) == 1:
        draft.redirect(node.name, left[0])
    else:
        draft.change(node.name, inputs=left)


def _activation(draft: Draft, dice: Dice) -> None:
    node = _any(draft, dice, lambda n: n.op == "activation")
    kind = dice.pick([kind for kind in ("host", *grammar.BENDS) if kind != node.attributes.get("kind")])
    attributes = {"kind": kind} if kind != "host" else {"kind": kind, "otherwise": "relu"}
    draft.change(node.name, op="activation", **attributes)


def _size(draft: Draft, dice: Dice) -> None:
    """Another default for a symbol: the same design, wider or narrower."""
    if not draft.symbols:
        raise NoPlace
    name = dice.pick(list(draft.symbols))
    now = draft.symbols[name]
    near = {*grammar.WIDTHS, now + 1, now - 1, 2 * now, now // 2}
    choices = sorted(value for value in near if value != now and max(1, now // 4) <= value <= 4 * now)
    draft.symbols[name] = dice.pick(choices)


def _express(draft: Draft, dice: Dice) -> None:
    """All layers of one inner width get another, so that what is joined still fits."""
    inner = {
        node.attributes["out"]
        for node in draft.nodes.values()
        if node.attributes.get("out") not in (None, "out_width") and node.name != draft.output
    }
    if not inner:
        raise NoPlace
    old, new = dice.pick(sorted(inner)), grammar.width(draft, dice)
    for node in list(draft.nodes.values()):
        if node.attributes.get("out") == old:
            draft.change(node.name, out=new)


def _branch(draft: Draft, dice: Dice) -> None:
    """Another way from the input to what leaves, beside all there is."""
    draft.output = draft.add("add", draft.output, grammar.way(draft, INPUT, dice))


def _detour(draft: Draft, dice: Dice) -> None:
    """A short path around an inner step, added to it: the step becomes one of two ways."""
    node = _any(draft, dice, lambda n: n.name != draft.output and len(n.inputs) == 1)
    source, shape = node.inputs[0], draft.shapes[node.name]
    if draft.shapes[source][1:] != shape[1:] and draft.interface.layout is Layout.IMAGE:
        raise NoPlace
    round_it = grammar.affine(draft, source, draft.width_of(node.name), "no", dice)
    _replace(draft, node.name, draft.add("add", node.name, round_it))


def _skip(draft: Draft, dice: Dice) -> None:
    """What an earlier step gave is added to a later one of the same shape."""
    pairs = [
        (early, late)
        for late in draft.nodes
        if late != draft.output
        for early in sorted(draft.above(late) - {late})
        if draft.shapes[early] == draft.shapes[late]
    ]
    if not pairs:
        raise NoPlace
    early, late = dice.pick(pairs)
    _replace(draft, late, draft.add("add", late, early))


def _gate(draft: Draft, dice: Dice) -> None:
    node = _any(
        draft, dice, lambda n: len(draft.shapes[n.name]) == len(draft.interface.in_shape) and n.op != "multiply"
    )
    _replace(draft, node.name, _gated(draft, node, dice))


def _gated(draft: Draft, node: Node, dice: Dice) -> str:
    if node.name != draft.output:
        return grammar.gate(draft, node.name, dice)
    # What is silent at first is gated by what the input says: read from itself, it could never wake.
    if draft.interface.layout is Layout.IMAGE:
        read = draft.add("linear", draft.add("global_average_pool", INPUT), out="out_width")
    else:
        read = draft.add("linear", INPUT, out="out_width")
    return draft.add(
        "multiply", node.name, draft.add("activation", read, kind=dice.pick(("sigmoid", "tanh", "identity")))
    )


def _residual(draft: Draft, dice: Dice) -> None:
    node = _any(
        draft, dice, lambda n: n.name != draft.output and len(draft.shapes[n.name]) == len(draft.interface.in_shape)
    )
    _replace(draft, node.name, grammar.residual(draft, node.name, dice))


def _deepen(draft: Draft, dice: Dice) -> None:
    """One more stage between a value and one of its readers, from the grammar, back to the width the reader expects."""
    name, reader = _edge(draft, dice)
    shape = draft.shapes[name]
    if len(shape) != len(draft.interface.in_shape):
        raise NoPlace
    new = grammar.stage(draft, name, dice)
    if draft.shapes[new] != shape and reader.op not in AFFINE:
        new = grammar.affine(draft, new, draft.width_of(name), "no", dice)
    draft.change(reader.name, inputs=[new if source == name else source for source in reader.inputs])


def _factor(draft: Draft, dice: Dice) -> None:
    """One linear map becomes two with few units between: cheaper, and of low rank."""
    node = _any(draft, dice, lambda n: n.op in ("linear", "conv"))
    thin = draft.symbol(dice.pick(grammar.WIDTHS[:6]))
    if node.op == "linear":
        first = draft.add("linear", node.inputs[0], out=thin, bias="no")
    else:
        first = draft.add("conv", node.inputs[0], out=thin, bias="no")
    draft.change(node.name, inputs=[first])


def _window(draft: Draft, dice: Dice) -> None:
    """Another kernel or dilation, padded so that the size stays; or the host's own geometry."""
    node = _any(draft, dice, lambda n: n.op in ("conv", "depthwise_conv", "source_conv", "sink_conv"))
    kept = {key: node.attributes[key] for key in ("out", "bias", "stride", "groups") if key in node.attributes}
    if node.op != "depthwise_conv" and dice.chance(0.4):
        host = "source_conv" if node.inputs[0] == INPUT else "sink_conv"
        draft.change(node.name, op=host, **{key: kept[key] for key in ("out", "bias") if key in kept})
        return
    op = node.op if node.op == "depthwise_conv" else "conv"
    geometry = grammar.window(dice.pick((1, 3, 5), (2, 3, 1)), dice.pick((1, 2, 3), (4, 2, 1)))
    draft.change(node.name, op=op, **(kept | geometry))


def _groups(draft: Draft, dice: Dice) -> None:
    node = _any(draft, dice, lambda n: n.op in ("conv", "group_norm"))
    entering, leaving = draft.shapes[node.inputs[0]][0], draft.shapes[node.name][0]
    now = node.attributes.get("groups", "1")
    choices = [str(n) for n in (1, 2, 3, 4, 6, 8) if entering % n == 0 and leaving % n == 0 and str(n) != now]
    if not choices:
        raise NoPlace
    draft.change(node.name, groups=dice.pick(choices))


def _heads(draft: Draft, dice: Dice) -> None:
    node = _any(draft, dice, lambda n: n.op == "attention")
    heads = dice.pick((1, 2, 4))
    draft.change(node.name, heads=str(heads), width=str(heads * dice.pick((2, 4, 8, 16))))


def _bias(draft: Draft, dice: Dice) -> None:
    node = _any(draft, dice, lambda n: "bias" in n.attributes or n.op in AFFINE)
    draft.change(node.name, bias="no" if node.attributes.get("bias", "yes") != "no" else dice.pick(("source", "sink")))


def _replaced(draft: Draft, dice: Dice) -> None:
    """A norm becomes another norm or an activation; an activation a norm."""
    node = _any(draft, dice, lambda n: n.op in (*NORMS, "activation", "scale"))
    if len(draft.shapes[node.name]) != len(draft.interface.in_shape):
        raise NoPlace
    rule: grammar.Rule = dice.pick((grammar.norm, grammar.bend, _host_norm))
    draft.redirect(node.name, rule(draft, node.inputs[0], dice))


def _host_norm(draft: Draft, name: str, _: Dice) -> str:
    if draft.interface.norm is None:
        raise NoPlace
    return draft.add("host_norm", name)


def _widener(draft: Draft, dice: Dice) -> None:
    """The whole becomes a widening of the host's own layer, in a width of its own: it can become part of the host."""
    interface, out = draft.interface, draft.symbol(dice.pick(grammar.WIDTHS))
    ops = ("source_conv", "sink_conv") if interface.layout is Layout.IMAGE else ("linear", "linear")
    if interface.layout is Layout.IMAGE and (interface.source is None or interface.sink is None):
        raise NoPlace
    wide = draft.add("host_norm", draft.add(ops[0], INPUT, out=out, bias="source"))
    bent = draft.add("activation", wide, kind="host", otherwise="relu")
    end = draft.add(ops[1], bent, out="out_width", bias="sink")
    if draft.shapes[end] != interface.out_shape:
        end = draft.add("match_output_size", end)
    draft.output = end if dice.chance(0.7) else draft.add("add", draft.output, end)


def _replace(draft: Draft, old: str, new: str) -> None:
    """Readers of ``old`` read ``new``, but not those that ``new`` is made of."""
    draft.redirect(old, new, draft.above(new) - {old} | {new})


Operator = Callable[[Draft, Dice], None]
OPERATORS: Mapping[str, tuple[Operator, float]] = {
    "insert": (_insert, 2),
    "remove": (_remove, 2),
    "prune": (_prune, 2),
    "activation": (_activation, 3),
    "size": (_size, 4),
    "express": (_express, 1.5),
    "branch": (_branch, 1.5),
    "detour": (_detour, 1),
    "skip": (_skip, 1.5),
    "gate": (_gate, 2),
    "residual": (_residual, 1),
    "deepen": (_deepen, 1.5),
    "factor": (_factor, 1),
    "window": (_window, 2),
    "groups": (_groups, 1),
    "heads": (_heads, 1.5),
    "bias": (_bias, 0.5),
    "replace": (_replaced, 1),
    "widener": (_widener, 0.7),
}
"""Name → (operator, how often it is chosen relative to the others)."""
