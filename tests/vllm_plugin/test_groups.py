# SPDX-License-Identifier: Apache-2.0
"""Which paths are one group: names used twice, paths sent twice, taken back and sent anew, and what is refused."""

from __future__ import annotations

from typing import Any

from m3po_vllm.groups import Groups
from m3po_vllm.requests import Tag


def send(
    groups: Groups, requests: dict[str, Any], request: str, path: int, paths: int = 3, greedy: bool = False
) -> Any:
    why = groups.add(Tag("g", path, paths), request, greedy)
    if why is None and groups["g"].refused is None:
        requests[request] = object()
    return why


def test_a_group_has_arrived_when_each_path_has_also_where_one_is_sent_anew() -> None:
    requests: dict[str, Any] = {}
    groups = Groups(requests)
    assert send(groups, requests, "a", 0) is None and send(groups, requests, "b", 1) is None
    del requests["b"]  # its client has gone, and comes back
    assert send(groups, requests, "b again", 1) is None and not groups["g"].arrived
    assert send(groups, requests, "c", 2) is None and groups["g"].arrived
    assert groups.alive(groups["g"]) == ["a", "b again", "c"]
    del requests["a"]
    assert groups["g"].arrived and groups.alive(groups["g"]) == ["b again", "c"], (
        "one that has gone does not hold it up"
    )


def test_a_path_that_is_there_and_a_group_that_has_begun_take_no_other() -> None:
    requests: dict[str, Any] = {}
    groups = Groups(requests)
    send(groups, requests, "a", 0)
    assert send(groups, requests, "another", 0) == "m3po_path=0 of group g is there already."
    send(groups, requests, "b", 1)
    send(groups, requests, "c", 2)
    groups["g"].begun = True
    assert send(groups, requests, "d", 1) == "group g has begun: give another m3po_group."
    assert groups["g"].members == {0: "a", 1: "b", 2: "c"}
    requests.clear()  # they end, and the name is free
    assert send(groups, requests, "new", 0) is None and groups["g"].members == {0: "new"}


def test_paths_that_differ_are_refused_all_of_them_and_nothing_is_kept() -> None:
    for other in ({"paths": 2}, {"greedy": True}):
        requests: dict[str, Any] = {}
        groups = Groups(requests)
        send(groups, requests, "a", 0)
        assert send(groups, requests, "b", 1, **other) is None
        assert "say different m3po_paths, or some are greedy and some not" in groups["g"].refused
        requests.clear()  # as the scheduler does
        groups.forget()
        send(groups, requests, "c", 2)
        assert groups["g"].refused and not requests, "the last one too, which came later"
        groups.forget()
        assert send(groups, requests, "a", 0) is None and groups["g"].refused is None
    requests.clear()
    groups.forget()
    assert groups._groups == {}
