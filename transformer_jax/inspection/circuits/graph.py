"""The graph of a model: which heads and feed-forward layers read the outputs of which others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from transformer_jax.inspection.parts import LanguageModel, checked_model, stack_of
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.sites import PREFIXES


@dataclasses.dataclass(frozen=True)
class StackShape:
    """The numbers that define the nodes of one stack of layers.

    Attributes:
      kind: the kind of self-attention of the stack: ``"self"`` or ``"encoder"``.
      num_layers: the number L of layers.
      num_heads: the number N of query heads in a layer.
      num_kv_heads: the number K of key heads in a layer.
      has_memory: True if the layers also attend to an encoder's output.
      is_sequential: True if a feed-forward layer reads the output of its own layer's attention.
    """

    kind: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    has_memory: bool
    is_sequential: bool

    def senders(self) -> Iterator[tuple[str, int, int]]:
        """Yields each sender as (name, layer, place in the layer); the embeddings are in layer
        -1. The places 0, 1 and 2 are attention, cross-attention and the feed-forward layer."""
        prefix = PREFIXES[self.kind]
        yield f"{prefix}embeddings", -1, 2
        for layer in range(self.num_layers):
            start = f"layers.{layer}.{prefix}"
            yield from ((f"{start}heads.{head}", layer, 0) for head in range(self.num_heads))
            if self.has_memory:
                yield from ((f"layers.{layer}.cross_heads.{head}", layer, 1) for head in range(self.num_heads))
            yield f"{start}mlp", layer, 2

    def receivers(self) -> Iterator[tuple[str, int, int]]:
        """Yields each receiver that reads this stack's stream, as (name, layer, place)."""
        prefix = PREFIXES[self.kind]
        for layer in range(self.num_layers):
            start = f"layers.{layer}.{prefix}"
            for name, count in (("queries", self.num_heads), ("keys", self.num_kv_heads),
                                ("values", self.num_kv_heads)):
                yield from ((f"{start}{name}.{head}", layer, 0) for head in range(count))
            if self.has_memory:
                yield from ((f"layers.{layer}.cross_queries.{head}", layer, 1) for head in range(self.num_heads))
            yield f"{start}mlp", layer, 2 if self.is_sequential else 0

    def memory_receivers(self) -> Iterator[str]:
        """Yields the keys and values of cross-attention, which read the encoder's stream."""
        for layer in range(self.num_layers if self.has_memory else 0):
            for name in ("cross_keys", "cross_values"):
                yield from (f"layers.{layer}.{name}.{head}" for head in range(self.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class EdgeGraph:
    """The nodes of a model and the edges between them.

    A sender is something that adds to the residual stream: the embeddings, a head, or a
    feed-forward layer. A receiver is something that reads the stream: the queries, keys or values
    of a head, a feed-forward layer, or the logits. The names follow those of sites:
    ``layers.1.heads.3`` sends, and ``layers.2.queries.0`` receives.

    Attributes:
      senders: the names of the U senders.
      receivers: the names of the V receivers.
      stacks: the shapes of the model's stacks of layers, the encoder's before the decoder's.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    stacks: tuple[StackShape, ...]

    @functools.cached_property
    def allowed_VU(self) -> Bool[np.ndarray, "V U"]:
        """True where a receiver reads a sender, which the order of the layers decides."""
        allowed = np.zeros((len(self.receivers), len(self.senders)), bool)
        senders = [(stack.kind, layer, place) for stack in self.stacks for _, layer, place in stack.senders()]
        receivers = [(stack.kind, layer, place) for stack in self.stacks for _, layer, place in stack.receivers()]
        receivers += [("encoder", np.inf, 0) for stack in self.stacks for _ in stack.memory_receivers()]
        receivers += [(self.stacks[-1].kind, np.inf, 0)]
        for row, (kind, *when) in enumerate(receivers):
            allowed[row] = [kind == sender_kind and tuple(sent) < tuple(when) for sender_kind, *sent in senders]
        return allowed

    @functools.cached_property
    def feeds_UV(self) -> Bool[np.ndarray, "U V"]:
        """True where the output of a sender depends directly on what a receiver reads."""
        feeds = np.zeros((len(self.senders), len(self.receivers)), bool)
        groups = {stack.kind: stack.num_heads // stack.num_kv_heads for stack in self.stacks}
        for row, sender in enumerate(self.senders):
            start, is_head, head = sender.partition("heads.")
            group = groups["encoder" if "encoder_" in sender else "self"]
            inputs = {sender} if not is_head else {f"{start}queries.{head}", *(
                f"{start}{name}.{int(head) // group}" for name in ("keys", "values"))}
            feeds[row] = [receiver in inputs for receiver in self.receivers]
        return feeds

    def connected(self, kept_VU: Bool[np.ndarray, "V U"]) -> Bool[np.ndarray, "V U"]:
        """Removes the edges that lie on no path of kept edges from the embeddings to the logits.

        They do not change what the circuit computes.

        Args:
          kept_VU: True for the edges of a circuit.

        Returns:
          True for the edges that remain, ``[V, U]``.
        """
        kept = np.asarray(kept_VU, bool) & self.allowed_VU
        are_embeddings_U = np.array([sender.endswith("embeddings") for sender in self.senders])
        is_logits_V = np.array([receiver == "logits" for receiver in self.receivers])
        while True:
            hears_U = are_embeddings_U | (self.feeds_UV @ kept.any(1))
            is_heard_V = is_logits_V | (kept.any(0) @ self.feeds_UV)
            remaining = kept & hears_U & is_heard_V[:, None]
            if (remaining == kept).all():
                return kept
            kept = remaining

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return int(self.allowed_VU.sum())

    def edge(self, sender: str, receiver: str) -> tuple[int, int]:
        """Returns the place of an edge in arrays ``[V, U]``.

        Args:
          sender: the name of the sender, such as ``"layers.0.heads.1"``.
          receiver: the name of the receiver, such as ``"layers.1.queries.0"`` or ``"logits"``.

        Returns:
          The row of the receiver and the column of the sender.

        Raises:
          ValueError: if there is no such node, or if the receiver does not read the sender.
        """
        for name, known, what in ((sender, self.senders, "senders"), (receiver, self.receivers, "receivers")):
            if name not in known:
                raise ValueError(f"{name!r} is not one of the {what}: {', '.join(known)}")
        place = self.receivers.index(receiver), self.senders.index(sender)
        if not self.allowed_VU[place]:
            raise ValueError(f"{receiver!r} does not read {sender!r}, which comes after it or belongs to another stack")
        return place


def edge_graph(model: LanguageModel) -> EdgeGraph:
    """Returns the nodes of a model and the edges between them.

    Source: Wang et al. (2022), section 2; Conmy et al. (2023), section 2.

    Args:
      model: a decoder, an encoder or an encoder-decoder whose layers are ``transformer_jax.nn.Block``.

    Returns:
      The graph.

    Raises:
      ValueError: if the model is made of blocks of another class, whose inner structure is unknown,
        or normalizes the outputs of its heads.
    """
    kinds = [kind for kind in ("encoder", "self") if kind in checked_model(model).stacks()]
    shapes = []
    for kind in kinds:
        stack = stack_of(model, kind)
        if type(stack.blocks) is not Block:
            raise ValueError(f"the layers are of type {type(stack.blocks).__name__}; the edges of a model are known "
                             "only if its layers are transformer_jax.nn.Block")
        config = stack.blocks.attention.config
        if config.norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position={config.norm_position!r}: the edges of a model are known only for 'pre' "
                             "and 'post', because another norm stands between a head and the residual stream")
        if stack.is_mixed:
            raise ValueError("only some layers of this model have experts (config.moe); the edges of a model are known "
                             "only if all layers have the same parts")
        if config.shared_layers:
            raise ValueError("all layers of this model share their weights (shared_layers), so that no edge belongs to "
                             "one layer alone")
        shapes.append(StackShape(kind, stack.num_layers, config.num_heads, config.num_kv_heads or config.num_heads,
                                 stack.blocks.cross_attention is not None, config.residual == "sequential"))
    senders = tuple(name for shape in shapes for name, *_ in shape.senders())
    receivers = (*(name for shape in shapes for name, *_ in shape.receivers()),
                 *(name for shape in shapes for name in shape.memory_receivers()), "logits")
    return EdgeGraph(senders, receivers, tuple(shapes))
