"""Which ranks of a run are there, by rank 0's key-value store: a collective that one of them never reaches would
hang, or end in an error that names nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import orjson
import torch.distributed as dist

from packcli.errors import NodeError, PeerError
from packcli.train.distributed import rank, world_size

ANSWER_S = 120.0
"""How much later than rank 0 a rank may come: torch may be loaded from a busy network disk."""
FIRST_S = 600.0
"""How much later than the others rank 0 may come: it first waits until an earlier attempt stopped writing."""
_READ_S = 10.0  # and 20 ms a rank: all of them read from rank 0
FIX = "look at it, or leave it out; then run the same command again: it goes on from its last checkpoint"


@dataclass(frozen=True, slots=True)
class Nodes:
    """`names`: of each node, in the order of ranks; `per_node` ranks on each."""

    names: tuple[str, ...]
    per_node: int

    @classmethod
    def of(cls, world: int, per_node: int, names: Sequence[str] | None) -> Nodes:
        """`names` where they are known and tell nodes apart, else numbers."""
        count = world // per_node
        known = names is not None and len(names) == len(set(names)) == count
        return cls(tuple(names) if known and names else tuple(f"node {n}" for n in range(count)), per_node)

    def __len__(self) -> int:
        return len(self.names)

    def where(self, ranks: Sequence[int]) -> str:
        """Such as `node2` or `node2 (ranks 16, 17)`: ranks only where not all of a node are meant."""
        by_node: dict[int, list[int]] = {}
        for number in ranks:
            by_node.setdefault(number // self.per_node, []).append(number)
        return " and ".join(self._part(node, own) for node, own in by_node.items())

    def _part(self, node: int, own: list[int]) -> str:
        if len(own) == self.per_node:
            return self.names[node]
        return f"{self.names[node]} (rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))})"


@dataclass(frozen=True, slots=True)
class Board:
    """Where every rank of a run leaves a value, and reads those of all."""

    store: Any
    rank: int
    world: int
    nodes: Nodes

    def gather(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, on every rank; JSON. Each `what` once.

        Raises:
            NodeError: ranks left none within `ANSWER_S`; on all that did, alike.
            PeerError: rank 0, which keeps the board, ended meanwhile.
        """
        keys = [f"{what}/{number}" for number in range(self.world)]
        try:
            self.store.set(keys[self.rank], orjson.dumps(value))
            missing = self._missing(what, keys)
            found = [] if missing else [orjson.loads(one) for one in self.store.multi_get(keys)]
            self._all_have_read(what, missing)
            if not missing:
                return found
        except dist.DistStoreError:  # rank 0 decided nothing in time
            missing = [0]
        except dist.DistError as error:
            raise PeerError(
                f"lost rank 0 on {self.nodes.names[0]}", "it says why; run the same command again"
            ) from error
        raise NodeError(f"{self.nodes.where(missing)} did not answer within {ANSWER_S:.0f} s", FIX)

    def _missing(self, what: str, keys: list[str]) -> list[int]:
        """Ranks that left no value, as rank 0 sees it: a rank that comes late must not see it otherwise."""
        decided = f"{what}/missing"
        if self.rank == 0:
            with contextlib.suppress(dist.DistStoreError):  # on timeout
                self.store.wait(keys, timedelta(seconds=ANSWER_S))
            missing = [number for number, key in enumerate(keys) if not self.store.check([key])]
            self.store.set(decided, orjson.dumps(missing))
            return missing
        self.store.wait([decided], timedelta(seconds=2 * ANSWER_S))  # it may be late itself, and then waits
        found: list[int] = orjson.loads(self.store.get(decided))
        return found

    def _all_have_read(self, what: str, missing: list[int]) -> None:
        """The store ends with rank 0, which what it read may make fail: it stays until the others know, too."""
        self.store.set(f"{what}/read/{self.rank}", b"")
        if self.rank == 0:
            there = [number for number in range(self.world) if number not in missing]
            with contextlib.suppress(dist.DistStoreError):
                last_s = timedelta(seconds=_READ_S + self.world / 50)
                self.store.wait([f"{what}/read/{number}" for number in there], last_s)


def apart(store: Any, prefix: str) -> Any:
    """The same store, its keys out of the way of others."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def join(nodes: Nodes, timeout: timedelta | None) -> Any:
    """Rank 0's store, once all ranks are there; what `distributed.start` takes. `timeout`: of its later users.

    Raises:
        NodeError: some ranks, or rank 0, did not come.
    """
    host, port, own = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank()
    first = timedelta(seconds=FIRST_S)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=own == 0, timeout=first, wait_for_workers=False
        )
    except dist.DistError as error:
        if own == 0:
            raise
        silent = f"{nodes.names[0]} did not answer within {FIRST_S:.0f} s at {host}:{port}, where rank 0 listens"
        raise NodeError(silent, FIX) from error
    Board(apart(store, "roll"), own, world_size(), nodes).gather("here", None)
    store.set_timeout(timeout or dist.default_pg_timeout)
    return store
