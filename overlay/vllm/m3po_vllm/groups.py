# SPDX-License-Identifier: Apache-2.0
"""The groups whose paths are in an engine: which have arrived, which are still there, and which cannot be one group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .requests import PATH, PATHS, Tag


@dataclass
class Group:
    """A group of which a path has arrived.

    Attributes:
        paths: N.
        greedy: whether its tokens are the likeliest ones.
        members: the request of each path that has arrived; of one that was taken back it stays, unless it is sent anew.
        begun: whether it was let go.
        refused: why its paths are refused, if they are.
    """

    paths: int
    greedy: bool
    members: dict[int, str] = field(default_factory=dict)
    begun: bool = False
    refused: str | None = None

    @property
    def arrived(self) -> bool:
        """Whether every path has."""
        return len(self.members) == self.paths


class Groups:
    """Groups by their names.

    Args:
        requests: those of the engine by their ids; one that has ended or was taken back is not among them.
    """

    def __init__(self, requests: Mapping[str, Any]) -> None:
        self._requests = requests
        self._groups: dict[str, Group] = {}

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def alive(self, group: Group) -> list[str]:
        """The requests of a group that are in the engine."""
        return [request for request in group.members.values() if request in self._requests]

    def add(self, tag: Tag, request: str, greedy: bool) -> str | None:
        """Takes a path in; returns why it cannot be, in a line. Then the others of the group are as they were."""
        group = self._groups.get(tag.group)
        if group is not None and not self.alive(group) and (group.begun or group.refused is None):
            group = None  # all of it has gone: the name is free
        if group is None:
            group = self._groups[tag.group] = Group(tag.paths, greedy)
        elif group.begun:
            return f"group {tag.group} has begun: give another m3po_group."
        elif group.members.get(tag.path) in self._requests:
            return f"{PATH}={tag.path} of group {tag.group} is there already."
        group.members[tag.path] = request
        if tag.paths != group.paths or greedy != group.greedy:
            self.refuse(group, f"paths of group {tag.group} say different {PATHS}, or some are greedy and some not.")
        return None

    def refuse(self, group: Group, why: str) -> None:
        """Refuses every path of a group, those that are still to come too."""
        group.refused = group.refused or why

    def forget(self) -> None:
        """Drops what has gone."""
        for name, group in list(self._groups.items()):
            if not self.alive(group) and (group.refused is None or group.arrived):
                del self._groups[name]
