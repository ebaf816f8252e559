"""Keeps activations in ONNX Runtime's blocked layout where its own optimiser leaves it.

ONNX Runtime goes back to plain NCHW for every operator without a blocked kernel. Two of its detours cost much of a
small network. Pooling behind a convolution whose channels do not fill a block: here it runs on the padded blocks, whose
spare channels are zeros. And the tail of a normalisation: a gain and an offset a channel, the sum of a residual block
and the rectifier are four passes over plain memory and a fifth into blocks; here they are one depthwise convolution of
one point, which takes the sum and the rectifier along.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, cast

from onnx import ModelProto, NodeProto, helper, numpy_helper

from .passes.editing import attribute, keep_live_nodes, new_node, replace_nodes

__all__ = ["BLOCKED_DOMAIN", "stay_blocked"]

BLOCKED_DOMAIN: Final = "com.microsoft.nchwc"


def stay_blocked(model: ModelProto, block: int) -> None:
    """Rewrite a model that ONNX Runtime has optimised, in place.

    Args:
        model: Its weights are constants.
        block: Channels in a block.
    """
    rewriting = _Rewriting(model, block)
    for node in model.graph.node:
        kept = NodeProto()
        kept.CopyFrom(node)
        rewriting.visit(kept)
    replace_nodes(model.graph, rewriting.nodes)
    keep_live_nodes(model.graph)


class _Rewriting:
    """One walk over the nodes in order. A value that exists in blocks is read from them wherever a kernel can.

    Every blocked value that is made gets a way back to plain memory, which dies where nobody needs it.
    """

    def __init__(self, model: ModelProto, block: int) -> None:
        self.nodes: list[NodeProto] = []
        self._block = block
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._uses = Counter(name for node in model.graph.node for name in node.input)
        self._uses.update(value.name for value in model.graph.output)
        self._blocked: dict[str, str] = {}  # plain value -> the same in blocks
        self._channels: dict[str, int] = {}  # plain value -> channels, without padding
        self._images: set[str] = set()  # plain values known to have two spatial axes
        self._gained: dict[str, tuple[str, str]] = {}  # product -> the plain value and its gain
        self._affine: dict[str, NodeProto] = {}  # plain value -> the depthwise convolution that makes it
        self._same: dict[str, str] = {}  # value that went -> the blocked value in its place
        self._rules: Final = {
            "ReorderOutput": self._from_blocks,
            "ReorderInput": self._to_blocks,
            "Reshape": self._reshape,
            "Mul": self._multiply,
            "Add": self._add,
            "Relu": self._rectify,
            "AveragePool": self._pool,
            "MaxPool": self._pool,
            "GlobalAveragePool": self._pool,
        }

    def visit(self, node: NodeProto) -> None:
        """Take over a node, or what replaces it."""
        for position, name in enumerate(node.input):
            node.input[position] = self._same.get(name, name)
        rule = self._rules.get(node.op_type)
        if rule is None or not rule(node):
            self.nodes.append(node)

    def _from_blocks(self, node: NodeProto) -> bool:
        if not attribute(node, "channels_last", 0):
            self._blocked[node.output[0]] = node.input[0]
            self._channels[node.output[0]] = cast(int, attribute(node, "channels"))
        return False

    def _to_blocks(self, node: NodeProto) -> bool:
        (name,), blocked = node.input, self._blocked.get(node.input[0])
        if blocked is None or not self._full(name) or attribute(node, "channels_last", 0):
            return False
        self._same[node.output[0]] = blocked
        return True

    def _reshape(self, node: NodeProto) -> bool:
        target = self._constants.get(node.input[1])
        if target is not None and target.dims == [4]:
            self._images.add(node.output[0])
        return False

    def _pool(self, node: NodeProto) -> bool:
        name, blocked = node.input[0], self._blocked.get(node.input[0])
        odd = any(attribute(node, name, 0) for name in ("ceil_mode", "storage_order"))
        if blocked is None or node.domain or odd or len(node.output) > 1:
            return False
        node.domain, node.input[0] = BLOCKED_DOMAIN, blocked
        self._emit(node, node.output[0], self._channels[name])
        return True

    def _multiply(self, node: NodeProto) -> bool:
        """A gain for each channel; nothing is done before its offset is seen."""
        for name, gain in (tuple(node.input), tuple(reversed(node.input))):
            if (name in self._images or name in self._blocked) and self._channels_of(gain):
                self._gained[node.output[0]] = name, gain
        return False

    def _add(self, node: NodeProto) -> bool:
        pairs = (tuple(node.input), tuple(reversed(node.input)))
        for product, offset in pairs:
            if product in self._gained and self._uses[product] == 1:
                name, gain = self._gained[product]
                channels = self._channels_of(offset)
                if channels and channels == self._channels_of(gain):
                    self._affine_convolution(name, gain, offset, node.output[0])
                    return True
        if not all(name in self._blocked and self._full(name) for name in node.input):
            return False
        for name, other in pairs:
            convolution = self._open_convolution(name)
            if convolution is not None and name != other and len(convolution.input) == 3:
                convolution.input.append(self._blocked[other])
                self._extend(convolution, name, node.output[0])
                return True
        node.input[:] = [self._blocked[name] for name in node.input]
        self._emit(node, node.output[0], self._channels[pairs[0][0]])
        return True

    def _rectify(self, node: NodeProto) -> bool:
        (name,) = node.input
        if name not in self._blocked:
            return False
        convolution = self._open_convolution(name)
        if convolution is not None:
            convolution.attribute.append(helper.make_attribute("activation", "Relu"))
            self._extend(convolution, name, node.output[0])
        else:
            node.input[0] = self._blocked[name]
            self._emit(node, node.output[0], self._channels[name])
        return True

    def _affine_convolution(self, name: str, gain: str, offset: str, result: str) -> None:
        """``gain * x + offset`` with one of each a channel."""
        channels = self._channels_of(gain)
        for constant, dims in ((gain, [channels, 1, 1, 1]), (offset, [channels])):
            values = numpy_helper.to_array(self._constants[constant]).reshape(dims)
            self._constants[constant].CopyFrom(numpy_helper.from_array(values, constant))
        if name not in self._blocked:
            entry = new_node("ReorderInput", [name], [f"{name}.blocked"], channels_last=0)
            entry.domain = BLOCKED_DOMAIN
            self.nodes.append(entry)
            self._blocked[name] = entry.output[0]
        convolution = new_node(
            "Conv", [self._blocked[name], gain, offset], [result], group=channels, kernel_shape=[1, 1]
        )
        convolution.domain = BLOCKED_DOMAIN
        self._emit(convolution, result, channels)
        self._affine[result] = convolution

    def _open_convolution(self, name: str) -> NodeProto | None:
        """The depthwise convolution that made ``name``, if it can take one more step along."""
        node = self._affine.get(name)
        if node is None or self._uses[name] > 1 or attribute(node, "activation"):
            return None
        return node

    def _extend(self, convolution: NodeProto, old: str, result: str) -> None:
        """Let a convolution that made ``old`` make ``result``, at this point of the graph."""
        self.nodes = [node for node in self.nodes if node is not convolution]
        self._emit(convolution, result, self._channels[old])
        self._affine[result] = convolution

    def _emit(self, node: NodeProto, name: str, channels: int) -> None:
        """Add a node that makes ``name`` in blocks, and the way back."""
        node.output[0] = node.name = self._blocked[name] = f"{name}.blocked"
        self._channels[name] = channels
        back = new_node("ReorderOutput", [node.output[0]], [name], channels=channels, channels_last=0)
        back.domain = BLOCKED_DOMAIN
        self.nodes += [node, back]

    def _full(self, name: str) -> bool:
        """Whether the channels fill their blocks."""
        return self._channels[name] % self._block == 0

    def _channels_of(self, constant: str) -> int:
        """How many channels a constant has one number for; 0 unless they fill blocks and only one node reads it."""
        tensor = self._constants.get(constant)
        if (
            tensor is None
            or self._uses[constant] > 1
            or len(tensor.dims) != 3
            or list(tensor.dims[1:]) != [1, 1]
            or tensor.dims[0] % self._block
        ):
            return 0
        return int(tensor.dims[0])
